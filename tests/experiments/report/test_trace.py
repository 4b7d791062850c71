"""The page that plays samplings: one file, one script, and the cells of every step."""

import base64
import hashlib
import json
import re

import torch

from experiments.report.trace import Played, Recorder, trace_page

MASK = 5
STATES = torch.tensor([[[5, 5], [5, 1]], [[2, 5], [5, 3]], [[2, 4], [0, 5]]])


def one(name: str = "eb") -> Played:
    entropy = torch.tensor(
        [[[0.0, 0.8], [1.6094, torch.nan]], torch.full((2, 2), torch.nan).tolist()]
    )
    frames = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    return Played(name, frames, STATES, MASK, [1, 1], entropy)


def test_cells_are_opened_put_back_or_rewritten() -> None:
    assert one().changes() == [[[0], [], [3]], [[1, 2], [3], []]]


def test_latents_have_no_cells() -> None:
    played = Played(
        "own", torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.rand(2, 4, 2, 2), None, [1]
    )
    assert played.changes() == [[[], [], []]]


def test_the_page_holds_everything_and_runs_its_own_script_alone() -> None:
    prompt = 'a "red" </script><script>alert(1)</script> circle'
    page = trace_page("Samplings", [prompt, "two"], [[one(), one("own")], [one()]])
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{known}'" in page and "default-src 'none'" in page
    assert re.findall(r"(?:src|href)=\"?(?!data:)\w+:", page) == []
    assert "alert(1)</script>" not in page and page.count("<canvas") == 6
    (store,) = re.findall(r'<script type="application/json" id=data>(.*?)</script>', page)
    told = json.loads(store)
    assert [len(t["changes"]) for t in told] == [2, 2, 2] and told[0]["calls"] == [1, 1]
    assert told[0]["grid"] == [2, 2] and told[0]["frame"] == [8, 8]
    assert 'name="viewport"' in page


def test_every_element_that_the_script_looks_for_is_there() -> None:
    page = trace_page("x", ["p"], [[one()]])
    for name in ("data", "step", "play", "c0", "e0", "t0"):
        assert re.search(rf'id="?{name}"?[ >]', page), name


def test_entropies_are_bytes_of_their_ceiling() -> None:
    page = trace_page("x", ["p"], [[one()]])
    (store,) = re.findall(r'<script type="application/json" id=data>(.*?)</script>', page)
    told = json.loads(store)[0]["entropy"]
    assert list(base64.b64decode(told["cells"])) == [0, 126, 254, 255] + [255] * 4
    assert told["ceiling"] == 1.609 and told["means"] == [0.803, None]


def test_a_recording_keeps_states_calls_and_entropies() -> None:
    recorder = Recorder(2, lambda rows: rows[:, 0])
    x = torch.full((2, 1, 3), MASK)
    places = torch.tensor([[[True, False, True]], [[False, True, False]]])
    recorder.on_call(torch.arange(2), places, torch.tensor([[0.1], [0.2], [0.3]]))
    recorder.on_call(torch.tensor([1]), places[1:], torch.tensor([[0.5]]))  # the later one counts
    recorder.on_step(0, x, x * 0)
    recorder.on_call(torch.tensor([1]), None, torch.zeros(4, 1))
    recorder.on_step(1, x * 0, x * 0 + 1)
    states, calls, entropy = recorder.of(1)
    assert calls == [2, 3] and states[:, 0, 0].tolist() == [MASK, 0, 1]
    assert entropy is not None and float(entropy[0, 0, 1]) == 0.5
    assert int(entropy.isfinite().sum()) == 1
    assert recorder.of(0)[1] == [1, 1]
    silent = Recorder(1, None)
    for i in range(3):
        silent.on_step(i, torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2))
    assert silent.of(0)[1:] == ([1, 2, 3], None)
