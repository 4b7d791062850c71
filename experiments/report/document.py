"""The frame of all pages: one self-contained HTML file, light or dark, for desk and phone."""

import base64
import hashlib
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from PIL import Image
from torch import Tensor

from experiments.report.pictures import to_image

Picture = Tensor | Path | Image.Image  # uint8 [3, H, W], a file, or a PIL image
SMALL = 128  # pixels; a picture with a shorter side is enlarged without smoothing


def document(title: str, parts: Iterable[str], script: str = "", style: str = "") -> str:
    """Return a whole page made of parts, of which empty ones are left out.

    `script` is the only one that a browser will run, and `style` follows that of all pages.
    """
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    runs = f"; script-src 'sha256-{known}'" if script else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        # nothing may be loaded, whatever a prompt or a note contains
        '<meta http-equiv="Content-Security-Policy" '
        f"content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'{runs}\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + (f"\n<script>{script}</script>" if script else "")
        + "\n</body>\n</html>\n"
    )


def section(title: str, body: str, about: str = "") -> str:
    """Return a part of a page under its title, `about` between them; empty without a body."""
    intro = f"<p class=muted>{escape(about)}</p>" if about else ""
    return f"<section><h2>{escape(title)}</h2>{intro}{body}</section>" if body else ""


def anchor(name: str, body: str) -> str:
    """Return a part of a page that `link_to` leads to."""
    return f'<div id="{escape(name)}">{body}</div>' if body else ""


def link_to(name: str, text: str) -> str:
    """Return a link to an anchor of the same page."""
    return f'<a href="#{escape(name)}">{escape(text)}</a>'


def details(summary: str, body: str) -> str:
    """Return what is shown on demand; empty without a body."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>" if body else ""


def paragraphs(texts: Iterable[str]) -> str:
    """Return plain texts as a paragraph each."""
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def code(text: str) -> str:
    """Return a text as it is typed, long lines broken; empty without any."""
    return f"<pre>{escape(text)}</pre>" if text else ""


def boxes(kind: str, contents: Iterable[str]) -> str:
    """Return contents side by side, as many in a row as fit; empty without any."""
    inside = "".join(contents)
    return f'<div class="boxes {kind}">{inside}</div>' if inside else ""


def clamped(text: str) -> str:
    """Return a paragraph of at most three lines, with the whole text where a mouse rests."""
    return f'<p class=clamped title="{escape(text)}">{escape(text)}</p>' if text else ""


def html_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of plain texts, which scrolls sideways in its own box; empty without rows.

    Args:
        heads: of the columns.
        rows: as many texts each; what follows a line break is put small below the rest.
    """

    def cell(tag: str, text: str) -> str:
        first, _, rest = text.partition("\n")
        small = f"<small>{escape(rest)}</small>" if rest else ""
        return f"<{tag}>{escape(first)}{small}</{tag}>"

    def row(tag: str, texts: Sequence[str]) -> str:
        return f"<tr>{''.join(cell(tag, text) for text in texts)}</tr>"

    body = "".join(row("td", texts) for texts in rows)
    table = f"<table><thead>{row('th', heads)}</thead><tbody>{body}</tbody></table>"
    # a box that scrolls must be reachable by keyboard
    return f'<div class=wide tabindex="0">{table}</div>' if body else ""


def picture_tag(picture: Picture, alt: str) -> str:
    """Embed a picture; a small one is enlarged by the browser without smoothing.

    Raises:
        OSError: a file that is not there or no picture.
    """
    if isinstance(picture, Path):
        with Image.open(picture) as opened:
            image = opened.copy()
    else:
        image = to_image(picture) if isinstance(picture, Tensor) else picture
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    small = " class=small" if min(image.size) <= SMALL else ""
    return (
        f'<img{small} src="{data_url(buffer.getvalue(), "image/png")}" alt="{escape(alt)}" '
        f'width="{image.width}" height="{image.height}">'
    )


def data_url(content: bytes, kind: str) -> str:
    """Return bytes as an address that holds them."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


STYLE = """
:root {
  --ground: #fbfbfa; --box: #ffffff; --ink: #1d2126; --muted: #5f666f; --rule: #e3e3df;
  --accent: #2f6fae; --right: #1a7340; --wrong: #b3331f; --shadow: #0000002e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #15171a; --box: #1d2024; --ink: #e4e6e9; --muted: #a0a7b0; --rule: #31353b;
    --accent: #74aee6; --right: #7fd09b; --wrong: #f2917e; --shadow: #ffffff38;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 70rem; padding: 1.25rem clamp(1rem, 4vw, 2.5rem) 4rem;
  background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  overflow-wrap: break-word;
}
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 0.25rem; letter-spacing: -0.01em; }
h2 { font-size: 1.2rem; margin: 0 0 0.25rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 -0.25rem; }
p, figure { margin: 0; }
body > p, section > p { margin: 0.35rem 0; }
section { margin-top: 2.5rem; }
small, .muted { color: var(--muted); }
small { display: block; font-size: 0.8rem; line-height: 1.35; }
.headline { margin-top: 1rem; max-width: 40rem; }
.headline .value { font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.headline strong { font-size: 2.4rem; line-height: 1.2; letter-spacing: -0.02em; }
.clamped { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3;
  overflow: hidden; }
/* a shadow at the edge behind which a table goes on: the covers scroll along, the shadows do not */
.wide { overflow-x: auto; max-width: 100%; margin: 0.75rem 0; background:
  linear-gradient(to right, var(--ground) 40%, transparent) left / 2.5rem 100%,
  linear-gradient(to left, var(--ground) 40%, transparent) right / 2.5rem 100%,
  linear-gradient(to right, var(--shadow), transparent) left / 1rem 100%,
  linear-gradient(to left, var(--shadow), transparent) right / 1rem 100%, var(--ground);
  background-repeat: no-repeat; background-attachment: local, local, scroll, scroll; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 0.35rem 1.25rem 0.35rem 0;
  white-space: nowrap; border-bottom: 1px solid var(--rule); }
td:first-child, td small { white-space: normal; }
td:first-child { min-width: 9rem; }
th { color: var(--muted); font-weight: 500; }
.scores table { width: 100%; max-width: 44rem; }
.scores td:last-child { width: 45%; }
img { display: block; max-width: 100%; height: auto; }
img.small { image-rendering: pixelated; width: 100%; }
.boxes { display: grid; gap: 0.75rem; margin-top: 0.75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)); }
a { color: var(--accent); }
.wall img { width: 7rem; min-width: 5rem; }
.wall td:first-child { min-width: 9rem; }
.pairs { --least: 10rem; }
.traces, .charts { --least: 25.5rem; gap: 1.5rem; }
.examples { --least: 9.5rem; font-size: 0.85rem; line-height: 1.4; }
.example { background: var(--box); border: 1px solid var(--rule); border-radius: 8px;
  overflow: hidden; display: flex; flex-direction: column; }
.example.wrong { border-color: var(--wrong); }
.example figcaption { padding: 0.4rem 0.6rem 0.5rem; display: flex; flex-direction: column;
  flex: 1; }
.example .clamped + .clamped { color: var(--wrong); }
.line { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 0.5rem;
  margin-top: auto; padding-top: 0.3rem; }
.mark { font-weight: 600; }
.mark.right { color: var(--right); }
.mark.wrong { color: var(--wrong); }
.traces figcaption { font-weight: 600; }
.charts img { width: 100%; max-width: 30rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; }
pre { background: var(--box); border: 1px solid var(--rule); border-radius: 8px; margin: 0.75rem 0;
  padding: 0.75rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 0.85rem/1.5 ui-monospace, Menlo, Consolas, "Liberation Mono", monospace; }
summary { cursor: pointer; padding: 0.4rem 0; color: var(--accent); }
@media (max-width: 30rem) {
  .examples { grid-template-columns: repeat(3, 1fr); gap: 0.5rem; font-size: 0.75rem; }
}
@media print { details { display: none; } figure { break-inside: avoid; } }
"""
