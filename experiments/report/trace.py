"""A page that plays samplings step by step: several ways of drawing one prompt, side by side."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from torch import Tensor

from experiments.report.document import boxes, data_url, document, section
from experiments.report.pictures import to_image

KINDS = ("opened", "put back", "rewritten")


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
    calls: int
    """Network calls in all."""

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
            counts = " ".join(f'<span class="k{i}">{kind}</span>' for i, kind in enumerate(KINDS))
            cards.append(
                f'<figure class=box><canvas id="c{number}" role=img '
                f'aria-label="{escape(one.name)}: {escape(prompt)}"></canvas>'
                f"<figcaption><b>{escape(one.name)}</b> <span id=t{number}></span>"
                f"<br><small>{counts}</small></figcaption></figure>"
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
    }


def _json(data: object) -> str:
    """Write data so that no text in it can end the element it stands in."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


LOOK = """
.players { grid-template-columns: repeat(auto-fill, minmax(min(100%, 14rem), 1fr)); }
.players canvas { width: 100%; image-rendering: pixelated; display: block; }
.controls { position: sticky; top: 0; background: var(--ground); padding: .5rem 0; z-index: 1; }
.controls input { width: min(60vw, 30rem); vertical-align: middle; }
.controls button { font: inherit; min-width: 5rem; min-height: 2.75rem; }
.k0 { color: var(--right); } .k1 { color: var(--muted); } .k2 { color: var(--wrong); }
"""
PLAYER = """
'use strict';
const players = JSON.parse(document.getElementById('data').textContent);
const slider = document.getElementById('step'), play = document.getElementById('play');
const style = getComputedStyle(document.documentElement);
const colors = ['--right', '--muted', '--wrong'].map(name => style.getPropertyValue(name));
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
  document.getElementById('t' + n).textContent =
    `step ${step} of ${last}, ${p.calls} calls in all: ${counts.join(' / ')}`;
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
