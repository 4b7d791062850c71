"""One order for all who read: every good row once in a pass, whoever reads it."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import Cursor, GlobalOrder, Slot

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)


class Numbers:
    """Rows (shard, number); some are bad, some shards hold others than was counted."""

    def __init__(self, rows: list[int], bad: frozenset[tuple[int, int]] = frozenset()):
        self.held, self.bad, self.opened = rows, bad, 0

    def rows(self, shard: int, first: int) -> Iterator[tuple[int, int] | None]:
        self.opened += 1
        for number in range(first, self.held[shard]):
            yield None if (shard, number) in self.bad else (shard, number)

    def show(self, row: tuple[int, int], visit: int) -> tuple[int, tuple[int, int]]:
        return visit, row

    def stack(self, samples: list) -> list:
        return samples

    def take(self) -> tuple[dict[str, int], dict[str, str]]:
        return {}, {}


def drawn(order: GlobalOrder, source: Numbers, batches: int) -> list[list]:
    """Return what every slot yields in so many batches."""
    slots = [Slot(order, source, slot, Cursor()) for slot in range(order.slots)]
    return [[sample for sample, _ in islice(slot, batches)] for slot in slots]


def laid_out(slots: list[list]) -> list:
    """All batches end to end."""
    return [sample for batch in zip(*slots, strict=True) for sample in batch]


@given(rows=COUNTS, slots=st.integers(1, 12), window=st.integers(1, 7), seed=st.integers(0, 3))
@settings(deadline=None)
def test_batches_laid_end_to_end_go_through_the_rows_pass_by_pass(
    rows, slots, window, seed
) -> None:
    order, total = GlobalOrder(tuple(rows), slots, seed, window), sum(rows)
    batches = -(-3 * total // slots)
    flat = laid_out(drawn(order, Numbers(rows), batches))
    everything = {(s, n) for s, count in enumerate(rows) for n in range(count)}
    for number in range(3):
        part = flat[number * total : (number + 1) * total]
        assert {row for _, row in part} == everything and len(part) == total
        assert {visit for visit, _ in part} == {number}


@given(
    rows=COUNTS,
    held=st.lists(st.integers(0, 9), min_size=6, max_size=6),
    bad=st.frozensets(st.tuples(st.integers(0, 5), st.integers(0, 8)), max_size=12),
    slots=st.integers(1, 6),
    window=st.integers(1, 7),
)
@settings(deadline=None)
def test_bad_rows_and_wrong_counts_lose_nothing_and_repeat_nothing(
    rows, held, bad, slots, window
) -> None:
    """Every good row once in every pass, though slots reach a pass at different batches."""
    held = [n if count else 0 for n, count in zip(held, rows, strict=False)]
    good = {(s, n) for s, count in enumerate(held) for n in range(count)} - bad
    if not good:
        return
    order = GlobalOrder(tuple(rows), slots, 0, window)
    seen: dict[int, Counter] = {0: Counter(), 1: Counter()}
    for slot in range(slots):
        for (visit, row), _ in Slot(order, Numbers(held, bad), slot, Cursor()):
            if visit > 1:
                break
            seen[visit][row] += 1
    assert seen == {0: Counter(good), 1: Counter(good)}


@given(
    rows=COUNTS,
    slots=st.integers(1, 5),
    window=st.integers(1, 7),
    at=st.integers(0, 30),
    bad=st.frozensets(st.tuples(st.integers(0, 5), st.integers(0, 8)), max_size=4),
)
@settings(deadline=None)
def test_a_slot_goes_on_where_its_cursor_stands(rows, slots, window, at, bad) -> None:
    if not {(s, n) for s, count in enumerate(rows) for n in range(count)} - bad:
        return
    order = GlobalOrder(tuple(rows), slots, 0, window)
    for slot in range(slots):
        whole = list(islice(Slot(order, Numbers(rows, bad), slot, Cursor()), at + 20))
        again = islice(Slot(order, Numbers(rows, bad), slot, whole[at][1]), 19)
        assert [sample for sample, _ in again] == [sample for sample, _ in whole[at + 1 :]]


def test_passes_seeds_and_windows_give_other_orders() -> None:
    rows = [50] * 4
    one = drawn(GlobalOrder(tuple(rows), 10, 0, 4), Numbers(rows), 60)
    first, second = (laid_out(one)[i * 200 : (i + 1) * 200] for i in range(2))
    assert [row for _, row in first] != [row for _, row in second]
    for seed, window in ((1, 4), (0, 5)):
        assert one != drawn(GlobalOrder(tuple(rows), 10, seed, window), Numbers(rows), 60)


def test_a_slot_meets_all_rows_in_time() -> None:
    """Also where the rows fill the places of a batch exactly."""
    order = GlobalOrder((20,), 20)
    rows = Counter(row for _, row in drawn(order, Numbers([20]), 400)[3])
    assert len(rows) == 20


def test_many_shards_are_read_whole_and_in_one_go() -> None:
    rows = [10] * 2048
    source = Numbers(rows)
    assert len(drawn(GlobalOrder(tuple(rows), 4, 0, 16), source, 5120)[0]) == 5120
    assert source.opened <= 2048 + 4


def test_shards_without_a_row_end_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="the 2 training shards hold no sample at all"):
        GlobalOrder((0, 0), 4)
    with pytest.raises(ValueError, match="passes over the training shards gave no sample"):
        next(iter(Slot(GlobalOrder((1,), 2), Numbers([0]), 0, Cursor())))
