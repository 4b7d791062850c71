"""What captions of scenes say: whole or in part, written and read back.

A caption in part leaves something out: the background, sizes, colours, how the things stand, or one
of the things. What it asks for is an `AskedScene`; what it leaves out may be anything that a scene
can have.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations, product

import numpy as np

from data.scene_drawing import (
    BACKGROUNDS,
    COLORS,
    LAYOUTS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    sample_scene,
)

# how a caption relates two things: the first to the second, and the second to the first
RELATIONS = {
    "row": (("left of", "to the left of"), ("right of", "to the right of")),
    "column": (("above", "over"), ("below", "under")),
}
BODIES = {
    "two above one": "{} left of {}, and {} below them",
    "one above two": "{} above {} left of {}",
    "two above two": "{} left of {}, above {} left of {}",
}
SWAPPED = 0.25  # share of captions that name the second thing first
# chance of each omission in a caption in part; one in which none of them fell leaves the background
OMITTED = {"background": 0.6, "size": 0.3, "color": 0.15, "layout": 0.15, "thing": 0.15}
MANNER = 0.2  # chance of each other manner of writing a caption in part


@dataclass(frozen=True)
class AskedThing:
    """What a caption says of one thing; None where it says nothing."""

    shape: str
    color: str | None
    size: str | None

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.color, self.shape) if word)

    def without(self, name: str) -> "AskedThing":
        """Leave its "color" or its "size" open."""
        return replace(self, color=None) if name == "color" else replace(self, size=None)

    def options(self) -> Iterator[Thing]:
        """Yield every thing that this may be."""
        colors = COLORS if self.color is None else [self.color]
        sizes = SIZES if self.size is None else [self.size]
        return (Thing(color, self.shape, size) for color, size in product(colors, sizes))


@dataclass(frozen=True)
class AskedScene:
    """What a caption says of a scene; None where it says nothing.

    With a layout these are all things, in reading order. Without one they may stand anywhere, and
    there may be others.
    """

    things: tuple[AskedThing, ...]
    layout: str | None
    background: str | None

    @classmethod
    def of(cls, scene: Scene) -> "AskedScene":
        """Ask for everything that a scene shows."""
        things = tuple(AskedThing(t.shape, t.color, t.size) for t in scene.things)
        return cls(things, scene.layout, scene.background)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Say all that a scene shows, in one of several phrasings.

    Two things are named in either order: "left of" or, less often, "right of", "above" or "below".
    """
    return say(AskedScene.of(scene), rng)


def caption_in_part(scene: Scene, rng: np.random.Generator) -> str:
    """Say a part of what a scene shows, also in another order of words or with capitals.

    The picture is that of a scene that training may show, so a combination that is held out stays
    unseen whatever the caption leaves out.
    """
    text = say(ask_in_part(scene, rng), rng)
    order, first, loud, stop = rng.random(4) < MANNER
    if order:
        text = re.sub(rf"\b({'|'.join(SIZES)}) ({'|'.join(COLORS)})\b", r"\2 \1", text)
    if first:
        text = text[0].upper() + text[1:]
    if loud:
        words = text.split()
        chosen = rng.random(len(words)) < rng.choice([0.25, 1.0])
        text = " ".join(w.upper() if c else w for w, c in zip(words, chosen, strict=True))
    return f"{text}." if stop else text


def ask_in_part(scene: Scene, rng: np.random.Generator) -> AskedScene:
    """Leave something out of a scene, by the chances of OMITTED."""
    omitted = {name for name, chance in OMITTED.items() if rng.random() < chance}
    asked, count = AskedScene.of(scene), len(scene.things)
    things = list(asked.things)
    for name in ("size", "color"):
        if name in omitted:  # of a subset that is not empty
            subset = int(rng.integers(1, 2**count))
            things = [t.without(name) if subset >> i & 1 else t for i, t in enumerate(things)]
    if not omitted or "background" in omitted:
        asked = replace(asked, background=None)
    if omitted & {"layout", "thing"}:
        named = count - ("thing" in omitted)
        things = [things[i] for i in rng.permutation(count)[:named]]
        asked = replace(asked, layout=None)
    return replace(asked, things=tuple(things))


def say(asked: AskedScene, rng: np.random.Generator) -> str:
    """Write a caption; things without a layout are listed in their order."""
    named = [f"a {thing}" for thing in asked.things]
    if asked.layout is None:
        body = " and ".join(part for part in (", ".join(named[:-1]), named[-1]) if part)
    elif asked.layout in RELATIONS:
        forth, back = RELATIONS[asked.layout]
        swap, variant = int(rng.random() < SWAPPED), rng.integers(2)
        first, second = named[swap], named[1 - swap]
        body = f"{first} {(back if swap else forth)[variant]} {second}"
    else:
        body = BODIES[asked.layout].format(*named)
    templates: tuple[str, ...] = (
        f"{body} on a {asked.background} background",
        f"{body}, {asked.background} background",
        f"on a {asked.background} background, {body}",
        f"a picture of {body} on {asked.background}",
    )
    if asked.background is None:
        templates = (body, body, f"a picture of {body}")
    return templates[rng.integers(len(templates))]


def _skeletons() -> dict[str, tuple[str | None, tuple[int, ...]]]:
    """Map captions without words for things to the layout and the reading order of the mention."""
    found: dict[str, tuple[str | None, tuple[int, ...]]] = {}
    for layout, (forth, back) in RELATIONS.items():
        found |= {f"X {relation} X": (layout, (0, 1)) for relation in forth}
        found |= {f"X {relation} X": (layout, (1, 0)) for relation in back}
    for layout, body in BODIES.items():
        order = tuple(range(len(LAYOUTS[layout])))
        found[body.format(*"XXXX").replace(",", "")] = layout, order
    lists = ("X", "X and X", "X X and X", "X X X and X")
    return found | {text: (None, tuple(range(text.count("X")))) for text in lists}


SKELETONS = _skeletons()
ADJECTIVES = "|".join([*COLORS, *SIZES])
THING = re.compile(rf"\ba((?: (?:{ADJECTIVES}))*) ({'|'.join(SHAPES)})\b")
GROUND = re.compile(rf"\b(?:on (?:a )?)?({'|'.join(BACKGROUNDS)})(?: background)?\b")


def parse(text: str) -> AskedScene:
    """Read what a caption asks for; case, punctuation and the order of adjectives do not count.

    Raises:
        ValueError: a text that `caption` and `caption_in_part` do not write.
    """
    plain = " ".join(re.findall(r"\w+", text.lower())).removeprefix("a picture of ")
    grounds, things = GROUND.findall(plain), []
    for adjectives, shape in THING.findall(plain):
        given = adjectives.split()
        colors, sizes = ([w for w in given if w in table] for table in (COLORS, SIZES))
        if len(colors) > 1 or len(sizes) > 1:
            raise ValueError(f"the caption {text!r} names two colours or sizes of a {shape}")
        things.append(AskedThing(shape, *(next(iter(w), None) for w in (colors, sizes))))
    skeleton = " ".join(THING.sub("X", GROUND.sub("", plain)).split())
    if skeleton not in SKELETONS or len(grounds) > 1:
        raise ValueError(f"the caption {text!r} is none of scenes, so nobody can say what it asks")
    layout, order = SKELETONS[skeleton]
    return AskedScene(tuple(things[i] for i in order), layout, next(iter(grounds), None))


def completions(asked: AskedScene, max_objects: int = 2) -> Iterator[Scene]:
    """Yield every scene that shows what is asked, some more than once.

    Args:
        asked: what is asked.
        max_objects: most things in a scene.
    """
    grounds = BACKGROUNDS if asked.background is None else [asked.background]
    anything = [thing for shape in SHAPES for thing in AskedThing(shape, None, None).options()]
    named = [list(thing.options()) for thing in asked.things]
    for layout, centres in LAYOUTS.items():
        slots, count = range(len(centres)), len(named)
        if asked.layout is None and count <= len(slots) <= max_objects:
            places = [*permutations(slots, count)]
        else:
            places = [tuple(slots)] if asked.layout == layout else []
        for place in places:
            options = [named[place.index(s)] if s in place else anything for s in slots]
            for things, background in product(product(*options), grounds):
                yield Scene(things, layout, background)


def complete(asked: AskedScene, rng: np.random.Generator, max_objects: int = 2) -> Scene:
    """Draw a scene that shows what is asked; all else is drawn as `sample_scene` does."""
    drawn = sample_scene(rng, max_objects)
    while len(drawn.things) < len(asked.things) or (
        asked.layout is not None and len(drawn.things) != len(asked.things)
    ):
        drawn = sample_scene(rng, max_objects)
    things = list(drawn.things)
    slots = range(len(things)) if asked.layout else rng.permutation(len(things))
    for thing, slot in zip(asked.things, slots, strict=False):
        old = things[slot]
        things[slot] = Thing(thing.color or old.color, thing.shape, thing.size or old.size)
    ground = asked.background or drawn.background
    return Scene(tuple(things), asked.layout or drawn.layout, ground)
