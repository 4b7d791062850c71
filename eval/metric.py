"""How a score is shown."""

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """Label and meaning of a score on a page and in a table."""

    label: str
    """What it is called."""
    what: str
    """What it measures, in a few words."""
    better: Literal["higher", "lower", ""] = ""
    """Which way is better; empty where neither is."""
