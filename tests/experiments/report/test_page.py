"""The page of a run is well-formed, self-contained, escaped; pictures and one score come first."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eval.metric import Metric
from experiments.report.page import Example, RunPage, StageRow, Trace, render, write_page
from experiments.report.pictures import save_png, strip
from experiments.report.scores import notation

NASTY = '<script src="http://evil.example/x.js">alert(1)</script> & "quotes"'
VOID = {"meta", "img", "source", "link", "br", "hr", "input"}
METRICS = {
    "scene_accuracy": Metric("Scene accuracy", "prompts all of which is right", better="higher"),
    "fd_scenes": Metric("FD scenes", "Frechet distance", better="lower"),
    "psnr": Metric("PSNR", "dB", better="higher"),
}


class Parsed(HTMLParser):
    """Collects elements and text; complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)
        if "style" not in self.open:
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def said(self) -> str:
        return " ".join(self.words)


def noise(count: int, side: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator).to(torch.uint8)


def score(value: float, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": value - 0.02, "high": value + 0.02, "n": 512, **more}


@pytest.fixture
def report(tmp_path: Path) -> RunPage:
    images = noise(9)
    save_png(tmp_path / "strip.png", strip(noise(3), torch.ones(3, 4, 4, dtype=torch.bool)))
    scores = {}
    for prefix in ("eval", "eval/heldout"):
        scores[f"{prefix}/scene_accuracy"] = score(0.861, model="classifier")
        scores[f"{prefix}/scene_accuracy/color"] = score(0.97)
        scores[f"{prefix}/scene_accuracy/size"] = score(0.88)
        scores[f"{prefix}/fd_scenes"] = score(3.25)
        scores[f"{prefix}/fd_scenes_floor"] = score(0.41)
    scores["tokenizer/psnr"] = score(27.123456)
    return RunPage(
        title=f"Title {NASTY}",
        command=f"python -m experiments.run --paper paella {NASTY}",
        machine="CPU, torch 2",
        scores=scores,
        metrics=METRICS,
        notes=[f"note {NASTY}"],
        examples=[
            Example(images[0], f"prompt {NASTY}", "val", 0, True, "asked: a; read: a"),
            Example(images[1], "wrong one", "val", 1, False, f"asked: x; read: y {NASTY}"),
            Example(images[2], "unseen one", "heldout", 2, True),
        ],
        traces=[Trace(f"trace {NASTY}", tmp_path / "strip.png", [16, 7, 0], 16)],
        curves={
            "train/loss": [(i, 5 / (i + 1)) for i in range(1000)],
            "val/loss": [(500, 0.5), (999, float("nan"))],
        },
        reconstructions=[(images[0], images[3])],
        config_yaml=f"seed: 0\nname: {NASTY}\n",
        stages=[
            StageRow("train", "abc123", 75.0, {"seen": 40, "no caption": 3}),
            StageRow("data", "d0", 9.0, {"seen": 12}),
        ],
        files={"checkpoint": Path("runs/x/checkpoint.safetensors")},
    )


def test_the_first_stages_scores_head_no_page_of_a_generator(report: RunPage) -> None:
    assert "class=headline" in render(report)
    report.scores = {k: v for k, v in report.scores.items() if k.startswith("tokenizer/")}
    assert "class=headline" not in render(report) and "27.1" in render(report)


def test_page_is_whole_and_self_contained(report: RunPage, tmp_path: Path) -> None:
    write_page(tmp_path / "deep" / "report.html", report)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["report.html"]
    text = (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    found = Parsed(text)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in found.tags}
    for _, attrs in found.tags:
        assert not {name for name in attrs if name.startswith("on")}
        for name in ("src", "href", "srcset", "data", "action"):
            assert str(attrs.get(name, "data:image/")).startswith("data:image/")
    assert "url(" not in text and "@import" not in text
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in found.all(
        "meta"
    )
    assert "prefers-color-scheme: dark" in text
    assert found.all("html") == [{"lang": "en"}]
    assert len(found.all("h1")) == 1


def test_everything_is_said_and_escaped(report: RunPage) -> None:
    text = render(report)
    found = Parsed(text)
    said = " ".join(found.said().split())
    assert "<script" not in text
    for words in ("Title", "prompt", "note", "trace", "asked: x; read: y"):
        assert f"{words} {NASTY}" in said
    assert f"--paper paella {NASTY}" in said
    assert "0.86 (0.84 to 0.88) Scene accuracy, val: prompts all of which is right;" in said
    assert "higher is better. 95 % interval of n = 512." in said
    assert "3.25 (3.23 to 3.27) n = 512, floor 0.41 (0.39 to 0.43)" in said
    assert "1 of the 2 shown here are right." in said
    assert "Tokens changed at each step of 16: 16, 7, 0" in said
    assert "1:15" in said and "runs/x/checkpoint.safetensors" in said
    assert "no caption: 3, of 40 read" in said and "of 12 read" not in said
    assert "asked: a; read: a" not in said  # only wrong pictures need it
    assert found.text["h2"] == [
        "Prompts",
        "Scores",
        "Prompts with combinations never seen (heldout)",
        "How tokens change from first to last step",
        "Loss curve",
        "By attribute",
        "First stage",
        "Reconstructions",
        "Run it again",
    ]
    marks = [a["class"] for a in found.all("span") if "mark" in str(a.get("class"))]
    assert marks == ["mark right", "mark wrong", "mark right"]


def test_attributes_stand_beside_each_other_per_split(report: RunPage) -> None:
    found = Parsed(render(report))
    table = found.text["th"]
    assert table[table.index("attribute") :][:3] == ["attribute", "val", "heldout"]
    cells = found.text["td"]
    assert cells[cells.index("color") :][1:3] == ["0.97 (0.95 to 0.99)"] * 2


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (0.9216, 0.902, 0.941, "0.92 (0.90 to 0.94)"),
        (0.7, 0.54, 0.86, "0.70 (0.54 to 0.86)"),
        (0.5, 0.1, 0.9, "0.5 (0.1 to 0.9)"),
        (27.1234, 26.5, 27.7, "27.1 (26.5 to 27.7)"),
        (1234.5, 1200.0, 1270.0, "1234 (1200 to 1270)"),
        (0.00213, 0.00211, 0.00215, "0.00213 (0.00211 to 0.00215)"),
        (1.0, 1.0, 1.0, "1 (1 to 1)"),
        (201.3456, None, None, "201.3"),
        (3, None, None, "3"),
    ],
)
def test_a_value_has_the_digits_that_its_interval_leaves_certain(value, low, high, said) -> None:
    assert notation({"value": value, "low": low, "high": high}) == said


def test_what_a_score_means_is_told_once(report: RunPage) -> None:
    small = Parsed(render(report)).text["small"]
    assert small.count("Frechet distance; lower is better") == 1


def test_many_pictures_are_shown_on_demand() -> None:
    examples = [Example(image, f"prompt {i}") for i, image in enumerate(noise(9))]
    text = render(RunPage("t", "c", examples=examples))
    shown, _, more = text.partition("<details>")
    assert shown.count("<figure") == 6 and more.count("<figure") == 3 and "3 more" in more
    assert "<details>" not in render(RunPage("t", "c", examples=examples[:6]))


def test_a_long_caption_is_clamped_and_whole_where_a_mouse_rests() -> None:
    long = "a word " * 100
    (caption,) = Parsed(render(RunPage("t", "c", examples=[Example(noise(1)[0], long)]))).all("p")[
        1:-1
    ]
    assert caption["class"] == "clamped" and caption["title"] == long


def test_pictures_are_embedded_with_their_prompts(report: RunPage) -> None:
    images = Parsed(render(report)).all("img")
    assert all(image["alt"] for image in images)
    assert images[0]["alt"] == f"prompt {NASTY}"
    data = base64.b64decode(str(images[0]["src"]).partition(",")[2])
    with Image.open(io.BytesIO(data)) as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(pixels, noise(4)[0])


def test_curves_of_a_quantity_share_a_chart_and_survive_missing_values() -> None:
    curves = {
        "train/loss": [(i, 1.0) for i in range(5000)],
        "superres train/loss": [(3, 2.0)],
        "val/loss": [(0, float("inf"))],
        "train/accuracy": [(0, 0.5), (9, 0.75)],
    }
    text = render(RunPage("t", "c", curves=curves))
    assert [image["alt"] for image in Parsed(text).all("img")] == [
        "loss over training steps; train ends at 1; superres train ends at 2",
        "accuracy over training steps; train ends at 0.75",
    ]
    assert len(text) < 150_000


def test_an_empty_page_has_only_what_there_is() -> None:
    found = Parsed(render(RunPage("Only a title", "python -m x")))
    assert found.text["h2"] == ["Run it again"] and found.text["h1"] == ["Only a title"]
    assert not {"table", "img", "details"} & {tag for tag, _ in found.tags}


def test_scores_of_the_first_stage_stand_apart() -> None:
    """Its parts have the names of those of the samples, and must not take their place."""
    scores = {}
    for prefix, value in (("eval", 0.5), ("tokenizer", 0.75)):
        scores[f"{prefix}/scene_accuracy"] = {"value": value}
        scores[f"{prefix}/scene_accuracy/shape"] = {"value": value + 0.125}
    page = RunPage("t", "c", scores=scores, metrics=METRICS, examples=[Example(noise(1)[0], "x")])
    said = Parsed(render(page)).said()
    generated, apart = said.split("First stage")
    assert "0.625" in generated and "0.875" in generated  # by attribute
    assert "Val" in generated and "Tokenizer: reconstructions of val" in apart
    assert "0.75" in apart and "0.5" not in apart


def test_the_page_of_a_first_stage_begins_with_its_reconstructions() -> None:
    scores = {
        "eval/psnr": score(27.123456),
        "eval/psnr/noise=0.1": score(20.0),
        "eval/codebook_usage": {"value": 0.9375, "n": 256},
        "eval/new_metric": {"value": 3},
    }
    pairs = [(noise(2)[0], noise(2)[1])]
    found = Parsed(render(RunPage("t", "c", scores=scores, metrics=METRICS, reconstructions=pairs)))
    assert found.text["h2"][:3] == ["Reconstructions", "Scores", "Smoothness of the latents"]
    said = " ".join(found.said().split())
    assert "PSNR dB; higher is better 27.12 (27.10 to 27.14)" in said
    assert "New metric 3" in said and "Codebook usage 0.9375" in said
    assert found.all("img")[-1]["alt"] == "PSNR over noise; PSNR ends at 20"


def test_missing_picture_leaves_no_page(tmp_path: Path) -> None:
    report = RunPage("t", "c", examples=[Example(tmp_path / "gone.png", "x")])
    with pytest.raises(FileNotFoundError):
        write_page(tmp_path / "report.html", report)
    assert list(tmp_path.iterdir()) == []
