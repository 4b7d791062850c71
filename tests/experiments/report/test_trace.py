"""The page that plays samplings: one file, one script, and the cells of every step."""

import base64
import hashlib
import json
import re

import torch

from experiments.report.trace import Played, trace_page

MASK = 5
STATES = torch.tensor([[[5, 5], [5, 1]], [[2, 5], [5, 3]], [[2, 4], [0, 5]]])


def one(name: str = "eb") -> Played:
    return Played(name, torch.zeros(3, 3, 8, 8, dtype=torch.uint8), STATES, MASK, 2)


def test_cells_are_opened_put_back_or_rewritten() -> None:
    assert one().changes() == [[[0], [], [3]], [[1, 2], [3], []]]


def test_latents_have_no_cells() -> None:
    played = Played(
        "own", torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.rand(2, 4, 2, 2), None, 1
    )
    assert played.changes() == [[[], [], []]]


def test_the_page_holds_everything_and_runs_its_own_script_alone() -> None:
    prompt = 'a "red" </script><script>alert(1)</script> circle'
    page = trace_page("Samplings", [prompt, "two"], [[one(), one("own")], [one()]])
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{known}'" in page and "default-src 'none'" in page
    assert re.findall(r"(?:src|href)=\"?(?!data:)\w+:", page) == []
    assert "alert(1)</script>" not in page and page.count("<canvas") == 3
    (store,) = re.findall(r'<script type="application/json" id=data>(.*?)</script>', page)
    told = json.loads(store)
    assert [len(t["changes"]) for t in told] == [2, 2, 2] and told[0]["calls"] == 2
    assert told[0]["grid"] == [2, 2] and told[0]["frame"] == [8, 8]
    assert 'name="viewport"' in page


def test_every_element_that_the_script_looks_for_is_there() -> None:
    page = trace_page("x", ["p"], [[one()]])
    for name in ("data", "step", "play", "c0", "t0"):
        assert re.search(rf'id="?{name}"?[ >]', page), name
