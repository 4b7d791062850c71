"""What is left out of the samples, counted by kind, and when that is too much."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from data.view import MAX_SKIPPED

SEEN = "seen"
FILTERED = "filtered: "
NOTED = "noted: "
OTHER_SPLIT = f"{FILTERED}other split"
WINDOW = 500
IN_A_ROW = 20_000


class SampleError(Exception):
    """A sample to leave out; the text is the kind of fault that it is counted under.

    Args:
        kind: the text.
        images: for how many it counts.
        why: what was found, for the example.
    """

    def __init__(self, kind: str, images: int = 1, why: str = ""):
        super().__init__(kind)
        self.images, self.why = images, why or kind


class SkipCounter:
    """Counts samples by what became of them, and says when too many are bad.

    `counts` holds SEEN, one entry per kind of fault, one per metadata filter (prefix FILTERED; what
    these remove is neither good nor bad), and one per thing that was found and takes no sample away
    (prefix NOTED). `examples` holds the last one of every kind of fault, shard and key.

    Faults are judged window by window, so a corpus that goes bad late stops a run too.

    Args:
        max_skipped: share of bad samples in a window at which a ValueError is raised.
        window: samples in it. What a broken shard loses comes at once: a window with one spans ten
            times as many.
    """

    def __init__(self, max_skipped: float = MAX_SKIPPED, window: int = WINDOW):
        self.max_skipped = max_skipped
        self.window = window
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.recent: Counter[str] = Counter()  # since the last full window
        self.at_once = 0  # most of one kind that were added at once in this window
        self.untold: Counter[str] = Counter()  # since the last `take`
        self.in_a_row = 0  # left out since a sample last passed

    def add(self, counts: Mapping[str, int]) -> None:
        """Count.

        Raises:
            ValueError: a window is full and more than `max_skipped` of it is bad.
        """
        for counter in (self.counts, self.recent, self.untold):
            counter.update(counts)
        self.at_once = max(self.at_once, *bad(counts).values(), 0)
        if _considered(self.recent) >= max(self.window, 10 * self.at_once):
            recent, self.recent, self.at_once = self.recent, Counter(), 0
            self.check(recent)

    def skip(self, error: Exception, where: str) -> None:
        """Count a sample that is left out because of an error.

        Raises:
            ValueError: too many were, in a window or in a row.
        """
        known = isinstance(error, SampleError)
        kind = str(error) if known else type(error).__name__
        if not kind.startswith(FILTERED):
            self.note(kind, where, error.why if isinstance(error, SampleError) else str(error))
        images = error.images if isinstance(error, SampleError) else 1
        self.add({SEEN: images - 1, kind: images})
        self.in_a_row += 1
        if self.in_a_row >= IN_A_ROW:
            raise ValueError(f"none of the last {IN_A_ROW} samples was usable: {dict(self.counts)}")

    def note(self, kind: str, where: str, why: str) -> None:
        """Keep an example of a kind."""
        line = (why.splitlines() or [""])[0][:200].rstrip(": ")
        told = f"{where}: {line}" if line else where
        self.examples.pop(kind, None)  # so that the last one stands last
        self.examples[kind] = " ".join(told.split())

    def take(self) -> tuple[dict[str, int], dict[str, str]]:
        """Return what was counted since the last call, and examples, to be merged elsewhere."""
        counts, self.untold = dict(self.untold), Counter()
        return counts, {kind: text for kind, text in self.examples.items() if kind in counts}

    def merge(self, counts: Mapping[str, int], examples: Mapping[str, str]) -> None:
        """Add what another counter took.

        Raises:
            ValueError: too many are bad, as `add` says.
        """
        for kind, text in examples.items():
            self.examples.pop(kind, None)
            self.examples[kind] = text
        self.add(counts)

    def check(self, counts: Mapping[str, int] | None = None) -> None:
        """Raise ValueError where more than `max_skipped` of the counted samples is bad."""
        counts = self.counts if counts is None else counts
        skipped, seen = sum(bad(counts).values()), _considered(counts)
        if skipped > self.max_skipped * seen:
            raise ValueError(
                f"{skipped} of {seen} samples were skipped: {_listed(bad(counts))}{self._last()}, "
                f"more than max_skipped={self.max_skipped} allows; repair the shards or raise "
                "max_skipped"
            )

    def told(self, split: str) -> str:
        """Return a line that says what became of the samples of a split."""
        faults = bad(self.counts)
        parts = [f"{_considered(self.counts) - sum(faults.values())} samples"]
        if others := self.counts[OTHER_SPLIT]:
            parts.append(f"{others} {'validation' if split.startswith('train') else 'training'}")
        parts += [
            f"{n} {kind}"
            for kind, n in sorted(self.counts.items())
            if kind.startswith((FILTERED, NOTED)) and kind != OTHER_SPLIT
        ]
        reasons = f": {_listed(faults)}{self._last()}" if faults else ""
        return f"{split}: {', '.join(parts)}, {sum(faults.values())} skipped{reasons}"

    def found(self) -> dict[str, dict[str, Any]]:
        """Return the counts and examples as what a stage says of itself."""
        return {"skipped": dict(self.counts), "examples": dict(self.examples)}

    def _last(self) -> str:
        """Return the last example in brackets."""
        faults = [text for kind, text in self.examples.items() if not kind.startswith(NOTED)]
        return f" (last: {faults[-1]})" if faults else ""


def bad(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the counts of samples that are left out for a fault."""
    return {
        kind: n
        for kind, n in counts.items()
        if kind != SEEN and not kind.startswith((FILTERED, NOTED))
    }


def _considered(counts: Mapping[str, int]) -> int:
    """Return how many samples were seen and not removed by a filter."""
    filtered = sum(n for kind, n in counts.items() if kind.startswith(FILTERED))
    return max(0, counts.get(SEEN, 0) - filtered)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
