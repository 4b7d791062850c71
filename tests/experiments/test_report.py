"""The page of a run is well-formed, self-contained and escaped; pictures survive their files."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.pictures import grid, load_png, save_png, strip, to_uint8
from experiments.report import Card, Report, StageRow, Trace, page, write_report

NASTY = '<script src="http://evil.example/x.js">alert(1)</script> & "quotes"'
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
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
def report(tmp_path: Path) -> Report:
    images = noise(4)
    save_png(tmp_path / "strip.png", strip(noise(3), torch.ones(3, 4, 4, dtype=torch.bool)))
    scores = {}
    for prefix in ("eval", "eval/heldout"):
        scores[f"{prefix}/scene_accuracy"] = score(0.861, model="judge")
        scores[f"{prefix}/scene_accuracy/color"] = score(0.97)
        scores[f"{prefix}/scene_accuracy/size"] = score(0.88)
        scores[f"{prefix}/fd_scenes"] = score(3.25)
        scores[f"{prefix}/fd_scenes_floor"] = score(0.41)
    return Report(
        title=f"Title {NASTY}",
        paper="paella",
        scale="micro",
        command=f"python -m experiments.run --paper paella {NASTY}",
        machine="CPU, torch 2",
        scores=scores,
        notes=[f"note {NASTY}"],
        cards=[
            Card(images[0], f"prompt {NASTY}", "val", 0, True, "asked: a; read: a"),
            Card(images[1], "wrong one", "val", 1, False, f"asked: x; read: y {NASTY}"),
            Card(images[2], "unseen one", "heldout", 2, True),
        ],
        traces=[Trace(f"trace {NASTY}", tmp_path / "strip.png", [16, 7, 0], 16)],
        curves={
            "train/loss": [(i, 5 / (i + 1)) for i in range(1000)],
            "val/loss": [(500, 0.5), (999, float("nan"))],
        },
        reconstructions=[(images[0], images[3])],
        config_yaml=f"seed: 0\nname: {NASTY}\n",
        stages=[StageRow("train", "abc123", 75.0, False), StageRow("data", "d0", 9.0, True)],
        files={"checkpoint": Path("runs/x/checkpoint.safetensors")},
    )


def test_page_is_whole_and_self_contained(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path / "deep" / "report.html", report)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["report.html"]
    text = (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    found = Page(text)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in found.tags}
    for _, attrs in found.tags:
        assert not {name for name in attrs if name.startswith("on")}
        for name in ("src", "href", "srcset", "data", "action"):
            assert attrs.get(name) is None or str(attrs[name]).startswith("data:image/png;base64,")
    assert "url(" not in text and "@import" not in text
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in found.all(
        "meta"
    )
    assert "prefers-color-scheme: dark" in text
    assert found.all("html") == [{"lang": "en"}]
    assert len(found.all("h1")) == 1


def test_everything_is_said_and_escaped(report: Report) -> None:
    text = page(report)
    found = Page(text)
    said = " ".join(found.said().split())
    assert "<script" not in text
    for words in ("Title", "prompt", "note", "trace", "asked: x; read: y"):
        assert f"{words} {NASTY}" in said
    assert f"--paper paella {NASTY}" in said
    assert "86.1 %" in said and "84.1 % to 88.1 %" in said and "n = 512" in said
    assert "floor 0.41" in said and "FD scenes, floor" not in said
    assert "1 of the 2 shown here are right." in said
    assert "Tokens changed at each step of 16: 16, 7, 0" in said
    assert "1 min 15 s" in said and "runs/x/checkpoint.safetensors" in said
    assert "asked: a; read: a" not in said  # only wrong pictures need it
    headings = [t for t in found.text["h2"] if t.strip()]
    assert headings == [
        "Scores",
        "By attribute",
        "Prompts",
        "Prompts with combinations never seen (heldout)",
        "How tokens change from first to last step",
        "Loss curve",
        "Reconstructions",
        "Run it again",
        "Settings",
    ]
    marks = [a["class"] for a in found.all("span") if "mark" in str(a.get("class"))]
    assert marks == ["mark right", "mark wrong", "mark right"]


def test_attributes_stand_beside_each_other_per_split(report: Report) -> None:
    found = Page(page(report))
    table = found.text["th"]
    assert table[table.index("attribute") :][:3] == ["attribute", "val", "heldout"]
    cells = found.text["td"]
    row = cells[cells.index("color") :][:3]
    assert [c.replace("\N{NO-BREAK SPACE}", " ") for c in row[1:]] == [
        "97.0 % (95.0 % to 99.0 %)"
    ] * 2


def test_pictures_are_embedded_with_their_prompts(report: Report) -> None:
    images = Page(page(report)).all("img")
    assert all(image["alt"] for image in images)
    assert images[0]["alt"] == f"prompt {NASTY}"
    data = base64.b64decode(str(images[0]["src"]).partition(",")[2])
    with Image.open(io.BytesIO(data)) as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(pixels, noise(4)[0])


def test_curve_is_thinned_and_survives_flat_and_missing_values() -> None:
    curves = {"train/loss": [(i, 1.0) for i in range(5000)], "val/loss": [(0, float("inf"))]}
    report = Report("t", "p", "s", "c", curves=curves)
    found = Page(page(report))
    lines = found.all("polyline")
    assert len(lines) == 1 and len(str(lines[0]["points"]).split()) <= 302
    assert "loss over training steps; train ends at 1" in str(found.all("svg")[0]["aria-label"])
    assert "nan" not in str(lines[0]["points"])
    assert Page(page(Report("t", "p", "s", "c", curves={"train/loss": [(3, 2.0)]}))).all("svg")


def test_empty_report_has_only_what_there_is() -> None:
    found = Page(page(Report("Only a title", "vqgan", "tiny", "python -m x")))
    assert found.text["h2"] == ["Run it again"]
    assert found.text["h1"] == ["Only a title"]


def test_scores_of_the_tokenizer_stand_apart() -> None:
    """Its parts have the names of those of the samples, and must not take their place."""
    scores = {}
    for prefix, value in (("eval", 0.5), ("tokenizer", 0.75)):
        scores[f"{prefix}/scene_accuracy"] = {"value": value}
        scores[f"{prefix}/scene_accuracy/shape"] = {"value": value + 0.125}
    said = Page(page(Report("t", "p", "micro", "c", scores=scores))).said()
    assert "62.5" in said and "87.5" in said
    assert "Val" in said and "Tokenizer: reconstructions of val" in said


def test_tokenizer_scores_keep_their_units() -> None:
    scores = {
        "eval/psnr": score(27.123456),
        "eval/codebook_usage": {"value": 0.9375, "n": 256},
        "eval/new_metric": {"value": 3},
    }
    said = " ".join(Page(page(Report("t", "vqgan", "tiny", "c", scores=scores))).said().split())
    assert "PSNR 27.12" in said and "Codebook usage 93.8 %" in said and "New metric 3" in said


def test_missing_picture_leaves_no_page(tmp_path: Path) -> None:
    report = Report("t", "p", "s", "c", cards=[Card(tmp_path / "gone.png", "x")])
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path / "report.html", report)
    assert list(tmp_path.iterdir()) == []


def test_rounding_of_pictures() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1 / 255, 1.0, 3.0])
    assert to_uint8(values).tolist() == [0, 0, 128, 128, 255, 255]
    every = torch.arange(256)
    assert torch.equal(to_uint8(every / 127.5 - 1).long(), every)


def test_png_keeps_pixels_and_text(tmp_path: Path) -> None:
    picture = noise(1)[0]
    text = {"prompt": "ein größerer Kreis, 赤い円", "seed": "3", "settings": '{"steps": 12}'}
    save_png(tmp_path / "a" / "x.png", picture, text)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.png"]
    found, said = load_png(tmp_path / "a" / "x.png")
    assert torch.equal(found, picture) and said == text
    save_png(tmp_path / "y.png", picture, {"seed": "3"})
    assert b"tEXtseed\x003" in (tmp_path / "y.png").read_bytes()
    with pytest.raises(ValueError, match="uint8"):
        save_png(tmp_path / "z.png", picture.float())
    assert not (tmp_path / "z.png").exists()


def test_grid_enlarges_by_whole_factors_and_makes_room_for_captions() -> None:
    images = noise(5)
    sheet = np.array(grid(images, 3, 4))
    assert sheet.shape == (2 * 38 + 6, 3 * 38 + 6, 3)
    assert np.array_equal(sheet[6:38:4, 44:76:4], images[1].permute(1, 2, 0).numpy())
    assert np.array_equal(sheet[9:38:4, 47:76:4], images[1].permute(1, 2, 0).numpy())
    assert grid(images, 8, 1).width == 5 * 14 + 6
    plain, said = grid(images, 5, 8), grid(images, 5, 8, ["a word"] * 4 + ["many words " * 9])
    assert said.height > plain.height and said.width == plain.width
    below = np.array(said)[6 + 64 :, :70]
    assert (below < 128).any()  # ink
    with pytest.raises(ValueError, match="at least one"):
        grid(images[:0], 2)
    with pytest.raises(ValueError, match="as many captions"):
        grid(images, 2, captions=["a"])


def test_strip_shows_pictures_and_changed_tokens() -> None:
    steps, changed = noise(5), torch.zeros(5, 4, 4, dtype=torch.bool)
    changed[1, 0, 3] = True
    sheet = np.array(strip(steps, changed, columns=5))
    side, label, gap = 96, 13, 6
    first = sheet[label : label + side : 12, :side:12, :3]
    assert np.array_equal(first, steps[0].permute(1, 2, 0).numpy())
    tokens = sheet[label + side + 4 :, side + gap : 2 * side + gap]
    marked = tokens[..., 3] == 255
    assert marked[:24, 72:].all() and marked.sum() == 24 * 24
    assert strip(steps, changed).width < sheet.shape[1]


def test_what_was_left_out_is_shown_where_anything_was() -> None:
    def text(skipped: dict[str, dict[str, int]]) -> str:
        made = Report("t", "p", "micro", "c", skipped=skipped)
        return Page(page(made)).said()

    assert "Samples left out" not in text({"cache": {"seen": 12}})
    said = text({"cache": {"seen": 12}, "tokenizer": {"seen": 40, "no caption": 3}})
    assert "Samples left out" in said and "no caption" in said
    assert "cache" not in said.split("Samples left out")[1]
