"""Published numbers, experiments/reported/<paper>.yaml, to stand beside measured ones."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from omegaconf import OmegaConf

from lightning_modules.common.settings import build

REPORTED = Path(__file__).parents[1] / "reported"
Evidence = Literal["paper", "code", "secondary"]
Test = Literal["better", "best", "order", "monotone", "optimum"]


@dataclass
class Table:
    """One published table."""

    title: str = ""
    """What it shows."""
    source: str = ""
    """Where it stands in the paper."""
    evidence: Evidence = "secondary"
    """Where the numbers were read: the paper itself, the released code, or a summary of either."""
    protocol: str = ""
    """How they were measured."""
    columns: dict[str, str | None] = field(default_factory=dict)
    """Published score -> the measured one that it stands beside; null has none."""
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    """Value of `setting` -> published score -> number."""
    sweep: str | None = None
    """Name of the sweep that measures these rows."""
    reason: str = ""
    """Why no sweep does."""
    setting: str | None = None
    """The setting whose values are the rows of that sweep; without one they stand apart."""
    across: str | None = None
    """The setting whose values are the columns, where these are no scores."""


@dataclass
class Claim:
    """What a paper says, as a direction that a sweep can show."""

    claim: str = ""
    """The words."""
    source: str = ""
    """Where they stand in the paper."""
    evidence: Evidence = "secondary"
    """As of a table."""
    sweep: str | None = None
    """Name of the sweep that measures it."""
    score: str | None = None
    """The measured score that it speaks of."""
    test: Test | None = None
    """better: the first of two values is; best: the first of all values is; order: from the best
    to the worst; monotone: the score is rising or falling; optimum: the best value lies between
    two, these included."""
    setting: str | None = None
    """The setting whose values are compared."""
    values: list[Any] = field(default_factory=list)
    """The values, or the word of a monotone claim."""
    where: dict[str, Any] = field(default_factory=dict)
    """Values of other settings for which it is said; without one it is a mean over them."""
    reason: str = ""
    """Why nothing of this suite tests it."""


@dataclass
class Published:
    """Everything that is known of the results of a paper, or of those that a sweep measures."""

    tables: dict[str, Table] = field(default_factory=dict)
    """Name -> table."""
    claims: list[Claim] = field(default_factory=list)
    """Statements without numbers."""

    def of_sweep(self, name: str) -> "Published":
        """Return what a sweep measures."""
        tables = {key: table for key, table in self.tables.items() if table.sweep == name}
        return Published(tables, [claim for claim in self.claims if claim.sweep == name])

    def provenance(self) -> Iterator[str]:
        """Tell in a line each where the numbers and claims come from."""
        for table in self.tables.values():
            yield (
                f"published: {table.title}; {table.source}; evidence: {table.evidence}; "
                f"{table.protocol}. Another data set and size: compare the order, not the numbers."
            )
        for claim in self.claims:
            yield f"published: {claim.claim} {claim.source}; evidence: {claim.evidence}"


def load_published(path: Path) -> Published:
    """Read a file of published numbers.

    Raises:
        ValueError: an unknown key or mark of evidence, a row with a score that is no column, or a
            table or claim that has both what measures it and a reason why nothing does, or neither.
    """
    content: Any = OmegaConf.to_container(OmegaConf.load(path))
    tables = {name: build(Table, table) for name, table in content.get("tables", {}).items()}
    claims = [build(Claim, claim) for claim in content.get("claims", [])]
    for evidence in [*(t.evidence for t in tables.values()), *(c.evidence for c in claims)]:
        if evidence not in get_args(Evidence):
            known = ", ".join(get_args(Evidence))
            raise ValueError(f"{path}: evidence must be one of {known}, got {evidence}")
    for claim in claims:
        wrong = _wrong(claim)
        if wrong:
            raise ValueError(f"{path}: {claim.claim!r} {wrong}")
    for name, table in tables.items():
        strange = {score for row in table.rows.values() for score in row} - table.columns.keys()
        if strange:
            raise ValueError(f"{path}: {name} has no column {sorted(strange)[0]!r}")
        if bool(table.sweep) == bool(table.reason):
            raise ValueError(f"{path}: {name} needs a sweep, or a reason why it has none")
    return Published(tables, claims)


def _wrong(claim: Claim) -> str:
    """Say what keeps a claim from being tested; "" for one that can be, or says it cannot."""
    if bool(claim.test) == bool(claim.reason):
        return "needs a test, or a reason why it has none"
    if claim.test is None:
        return ""
    if claim.test not in get_args(Test):
        return f"has the test {claim.test}, which is none of {', '.join(get_args(Test))}"
    if not (claim.sweep and claim.score and claim.setting):
        return "has a test and no sweep, score or setting"
    least = {"better": 2, "best": 1, "order": 2, "monotone": 1, "optimum": 2}[claim.test]
    if len(claim.values) < least:
        return f"needs {least} values for the test {claim.test}"
    if claim.test == "monotone" and claim.values not in (["rising"], ["falling"]):
        return "is monotone with the value rising or falling"
    return ""


def load_all() -> dict[str, Published]:
    """Return the published numbers by paper."""
    return {path.stem: load_published(path) for path in sorted(REPORTED.glob("*.yaml"))}


def all_published() -> Published:
    """Return the published numbers of all papers together."""
    found = Published()
    for paper, one in load_all().items():
        found.tables |= {f"{paper}/{name}": table for name, table in one.tables.items()}
        found.claims += one.claims
    return found
