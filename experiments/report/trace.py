"""A page that plays samplings step by step: several ways of drawing one prompt, side by side."""

import base64
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import torch
from torch import Tensor

from experiments.report.document import boxes, data_url, document, section
from experiments.report.pictures import to_image

KINDS = ("opened", "put back", "rewritten")
LEVELS = 254  # of entropy in the page, in a byte each; 255 is a cell that nobody asked about


@dataclass(frozen=True)
class Played:
    """One sampling of a picture."""

    name: str
    """The way of sampling."""
    frames: Tensor
    """[T + 1, 3, H, W] uint8: the picture before the first step and after each."""
    states: Tensor
    """[T + 1, h, w] int64 tokens, or [T + 1, C, h, w] latents, of which no cell is told."""
    masks: int | None
    """Tokens from this number on are masks; None where there are no tokens."""
    calls: list[int]
    """[T] network calls until the end of each step."""
    entropy: Tensor | None = None
    """[T, h, w] entropy in nats of what the network said in each step, NaN where it was not asked;
    guided, before temperature and filters. None where there are no tokens."""

    def changes(self) -> list[list[list[int]]]:
        """Return per step the cells of each of KINDS, numbered by rows."""
        if self.masks is None:
            return [[[], [], []] for _ in self.states[1:]]
        found = []
        for before, after in pairwise(self.states.flatten(1)):
            was, hidden = before >= self.masks, after >= self.masks
            sets = (was & ~hidden, ~was & hidden, ~was & ~hidden & (before != after))
            found.append([cells.nonzero().flatten().tolist() for cells in sets])
        return found


class Recorder:
    """Hears a sampling of B pictures: `on_step` its states, `on_call` its network calls.

    Args:
        pictures: B.
        entropy: features [n, C] -> entropies [n] of the codes; None where there are none.
    """

    def __init__(self, pictures: int, entropy: Callable[[Tensor], Tensor] | None) -> None:
        self.measure = entropy
        self.states: list[Tensor] = []
        self.calls: list[Tensor] = []
        self.maps: list[Tensor] = []
        self._called = torch.zeros(pictures, dtype=torch.int64)
        self._map: Tensor | None = None

    def on_call(self, pictures: Tensor, places: Tensor | None, rows: Tensor) -> None:
        """Count a call, and keep how unsure the network was."""
        pictures = pictures.cpu()
        self._called[pictures] += 1
        if places is None or self.measure is None:
            return
        places, found = places.cpu(), self.measure(rows).float().cpu()
        if self._map is None:
            self._map = torch.full((len(self._called), *places.shape[1:]), torch.nan)
        self._map[pictures] = self._map[pictures].masked_scatter(places, found)

    def on_step(self, step: int, before: Tensor, after: Tensor) -> None:
        """Keep the state after a step."""
        if not self.states:
            self.states.append(before.cpu())
        self.states.append(after.cpu())
        self.calls.append(self._called.clone())
        empty = torch.full((len(after), *after.shape[-2:]), torch.nan)
        self.maps.append(empty if self._map is None else self._map)
        self._map = None

    def of(self, picture: int) -> tuple[Tensor, list[int], Tensor | None]:
        """Return states, calls and entropies of a picture, as `Played` has them."""
        calls = [int(so_far[picture]) for so_far in self.calls]
        if not any(calls):  # a loop that tells of no calls has one in each step
            calls = list(range(1, len(self.calls) + 1))
        maps = torch.stack([one[picture] for one in self.maps])
        told = not bool(maps.isnan().all())
        return torch.stack([one[picture] for one in self.states]), calls, maps if told else None


def trace_page(title: str, prompts: Sequence[str], played: Sequence[Sequence[Played]]) -> str:
    """Return a page without links or files beside it, readable on a phone.

    Args:
        title: of the page.
        prompts: one per picture.
        played: for each prompt, the samplings of it.
    """
    data: list[dict[str, object]] = []
    parts = []
    for prompt, samplings in zip(prompts, played, strict=True):
        cards = []
        for one in samplings:
            number = len(data)
            data.append(_told(one))
            unsure = told = ""
            if one.entropy is not None:
                label = f"{escape(one.name)}: entropy of the network's answer"
                told = "; map: dark is sure, bright is unsure"
                unsure = f'<canvas id="e{number}" role=img aria-label="{label}"></canvas>'
            counts = " ".join(f'<span class="k{i}">{kind}</span>' for i, kind in enumerate(KINDS))
            cards.append(
                f'<figure class=box><div><canvas id="c{number}" role=img '
                f'aria-label="{escape(one.name)}: {escape(prompt)}"></canvas>'
                f"{unsure}</div><figcaption><b>{escape(one.name)}</b> <span id=t{number}></span>"
                f"<br><small>{counts}{told}</small></figcaption></figure>"
            )
        parts.append(section(prompt, boxes("players", cards)))
    controls = (
        "<p class=controls><button id=play type=button>Play</button> "
        "<label>Step <input id=step type=range min=0 max=1000 value=1000></label></p>"
    )
    store = f'<script type="application/json" id=data>{_json(data)}</script>'
    return document(title, [f"<h1>{escape(title)}</h1>", controls, *parts, store], PLAYER, LOOK)


def _told(one: Played) -> dict[str, object]:
    """What the script draws: all frames in one picture, and the cells of every step."""
    count, _, height, width = one.frames.shape
    rows, columns = one.states.shape[-2:]
    strip = to_image(one.frames.movedim(0, 2).reshape(3, height, count * width))
    buffer = io.BytesIO()
    strip.save(buffer, format="PNG", optimize=True)
    return {
        "strip": data_url(buffer.getvalue(), "image/png"),
        "frame": [width, height],
        "grid": [rows, columns],
        "changes": one.changes(),
        "calls": one.calls,
        "entropy": _entropies(one),
    }


def _entropies(one: Played) -> dict[str, object] | None:
    """The entropies in bytes, with their ceiling log K and the mean of each step in nats."""
    if one.entropy is None or one.masks is None:
        return None
    ceiling, asked = math.log(max(2, one.masks)), ~one.entropy.isnan()
    level = (one.entropy / ceiling * LEVELS).round().clamp(0, LEVELS)
    cells = torch.where(asked, level, LEVELS + 1).to(torch.uint8)
    means = one.entropy.flatten(1).nanmean(1).tolist()
    shown = [None if math.isnan(mean) else round(mean, 3) for mean in means]
    code = base64.b64encode(cells.numpy().tobytes()).decode()
    return {"cells": code, "ceiling": round(ceiling, 3), "means": shown}


def _json(data: object) -> str:
    """Write data so that no text in it can end the element it stands in."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


LOOK = """
.players { grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); }
.players div { display: flex; gap: .25rem; }
.players canvas { width: 0; flex: 1; image-rendering: pixelated; aspect-ratio: auto; }
.controls { position: sticky; top: 0; background: var(--ground); padding: .5rem 0; z-index: 1; }
.controls input { width: min(60vw, 30rem); vertical-align: middle; }
.controls button { font: inherit; min-width: 5rem; min-height: 2.75rem; }
.k0 { color: var(--right); } .k1 { color: var(--muted); } .k2 { color: var(--wrong); }
"""
PLAYER = """
'use strict';
const LEVELS = 254, NONE = 255;
const players = JSON.parse(document.getElementById('data').textContent);
const slider = document.getElementById('step'), play = document.getElementById('play');
const style = getComputedStyle(document.documentElement);
const colors = ['--right', '--muted', '--wrong'].map(name => style.getPropertyValue(name));
const maps = players.map(p => p.entropy && Uint8Array.from(
  atob(p.entropy.cells), letter => letter.charCodeAt(0)));
const images = players.map(p => {
  const image = new Image();
  image.onload = draw;
  image.src = p.strip;
  return image;
});
function drawOne(p, n) {
  const image = images[n], canvas = document.getElementById('c' + n);
  if (!image.complete) return;
  const [w, h] = p.frame, [rows, columns] = p.grid, scale = Math.max(1, Math.round(256 / w));
  const last = p.changes.length, step = Math.round(slider.value / 1000 * last);
  canvas.width = w * scale; canvas.height = h * scale;
  const pen = canvas.getContext('2d');
  pen.imageSmoothingEnabled = false;
  pen.drawImage(image, step * w, 0, w, h, 0, 0, w * scale, h * scale);
  const cw = w * scale / columns, ch = h * scale / rows, counts = [0, 0, 0];
  if (step > 0) p.changes[step - 1].forEach((cells, kind) => {
    counts[kind] = cells.length;
    pen.strokeStyle = colors[kind]; pen.lineWidth = 2;
    for (const cell of cells) {
      const x = cell % columns, y = Math.floor(cell / columns);
      pen.strokeRect(x * cw + 1, y * ch + 1, cw - 2, ch - 2);
    }
  });
  const calls = step > 0 ? p.calls[step - 1] : 0, mean = drawMap(p, n, step);
  document.getElementById('t' + n).textContent =
    `step ${step} of ${last}, ${calls} of ${p.calls[last - 1]} calls: ${counts.join(' / ')}${mean}`;
}
function drawMap(p, n, step) {
  if (!p.entropy) return '';
  const canvas = document.getElementById('e' + n), [rows, columns] = p.grid;
  canvas.width = columns; canvas.height = rows;
  const pen = canvas.getContext('2d'), picture = pen.createImageData(columns, rows);
  const from = (step - 1) * rows * columns;
  for (let i = 0; i < rows * columns; i++) {
    const level = step > 0 ? maps[n][from + i] : NONE;
    if (level === NONE) continue;
    const share = level / LEVELS;
    picture.data.set([255 * Math.min(1, 2 * share), 230 * share, 60 + 100 * share, 255], 4 * i);
  }
  pen.putImageData(picture, 0, 0);
  const mean = step > 0 ? p.entropy.means[step - 1] : null;
  const most = p.entropy.ceiling.toFixed(2);
  return mean === null ? '' : `, entropy ${mean.toFixed(2)} of ${most} nats`;
}
function draw() { players.forEach(drawOne); }
let timer = null;
function stop() { clearInterval(timer); timer = null; play.textContent = 'Play'; }
play.onclick = () => {
  if (timer) return stop();
  if (Number(slider.value) >= 1000) slider.value = 0;
  const most = Math.max(...players.map(p => p.changes.length));
  play.textContent = 'Pause';
  timer = setInterval(() => {
    slider.value = Number(slider.value) + 1000 / most;
    draw();
    if (Number(slider.value) >= 1000) stop();
  }, 500);
};
slider.oninput = draw;
draw();
"""
