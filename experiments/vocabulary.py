"""The words of the embedded captions, for prompts that ask for what training never showed."""

import re
from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np

from data.digits import NAMES, PHRASES, digit_caption
from data.scene_captions import caption, caption_in_part
from data.scene_drawing import sample_scene

DRAWN = 1000  # captions of scenes, which hold every word many times


def unseen(prompts: Iterable[str], data: str) -> list[str]:
    """Return the words of prompts that no caption of some embedded data holds, in their order."""
    known = vocabulary(data)
    found = dict.fromkeys(word for prompt in prompts for word in words(prompt))
    return [word for word in found if known and word not in known]


@cache
def vocabulary(data: str) -> frozenset[str]:
    """Return all words of embedded data; none where its captions are not the project's own."""
    return frozenset(word for text in _captions(data) for word in words(text))


def words(text: str) -> list[str]:
    """Split a text into words in lower case."""
    return re.findall(r"[\w'-]+", text.lower())


def _captions(data: str) -> Iterator[str]:
    if data == "scenes":
        generator = np.random.default_rng(0)
        for write in (caption, caption_in_part):
            yield from (write(sample_scene(generator, 4), generator) for _ in range(DRAWN))
    if data == "digits":
        yield from (digit_caption(k, i) for k in range(len(NAMES)) for i in range(len(PHRASES)))
