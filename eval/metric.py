"""What a score is called, what it says and which way is better."""

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """How a score is called and shown."""

    label: str
    what: str
    percent: bool = False
    better: Literal["higher", "lower", ""] = ""
