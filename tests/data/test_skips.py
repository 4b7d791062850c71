"""What is left out is counted by kind with an example, and too much of it is an error."""

import pytest

from data.skips import NOTED, SampleError, SkipCounter


def test_only_what_filters_remove_is_not_bad() -> None:
    skips = SkipCounter(max_skipped=0.0, window=10)
    for _ in range(30):
        skips.add({"seen": 1})
        skips.skip(SampleError("filtered: min_size"), "x")
    assert skips.counts == {"seen": 30, "filtered: min_size": 30}
    with pytest.raises(ValueError, match="none of the last 20000"):
        for _ in range(20_000):
            skips.add({"seen": 1})
            skips.skip(SampleError("filtered: min_size"), "x")


def test_filters_do_not_thin_the_bad_samples_out() -> None:
    """Of 100 samples a filter removes 80; 6 of the other 20 are bad: more than a fifth."""
    skips = SkipCounter(max_skipped=0.2, window=1000)
    for number in range(100):
        skips.add({"seen": 1})
        if number % 5:
            skips.skip(SampleError("filtered: min_size"), "x")
        elif number < 30:
            skips.skip(SampleError("no caption"), "x")
    with pytest.raises(ValueError, match="6 of 20 samples were skipped: 6 no caption"):
        skips.check()
    few = SkipCounter(max_skipped=0.2, window=10)  # a window is full of samples that count
    few.add({"seen": 9})
    few.skip(SampleError("no caption"), "x")
    for _ in range(50):
        few.skip(SampleError("filtered: min_size"), "x")
        few.add({"seen": 1})
    with pytest.raises(ValueError, match="3 of 10 samples"):
        few.skip(SampleError("no caption"), "x")
        few.skip(SampleError("no caption"), "x")
        few.add({"seen": 1})


def read(skips: SkipCounter, good: int, bad: int = 0) -> None:
    for number in range(good + bad):
        skips.add({"seen": 1})
        if number < bad:
            skips.skip(SampleError("corrupt image", why=f"byte {number}"), f"{number} in x.tar")


def test_a_corpus_that_goes_bad_late_stops_too() -> None:
    """The whole so far is as good as nothing else."""
    skips = SkipCounter(max_skipped=0.2, window=100)
    read(skips, 100_000)
    with pytest.raises(ValueError, match=r"of 100 samples were skipped: .* corrupt image \(last: "):
        for _ in range(10):
            read(skips, 70, 30)
    assert skips.counts["seen"] < 100_000 + 300


def test_a_window_with_a_broken_shard_is_longer_and_the_next_is_not() -> None:
    skips = SkipCounter(max_skipped=0.2, window=100)
    read(skips, 50)
    skips.add({"seen": 90, "in broken shards (estimated)": 90})  # of 900, in ten shards
    read(skips, 760)
    assert skips.recent == {}
    with pytest.raises(ValueError, match="of 100 samples"):
        read(skips, 79, 21)


def test_the_last_example_of_every_kind_is_kept_and_travels() -> None:
    skips, other = SkipCounter(0.9), SkipCounter(0.9)
    skips.skip(SampleError("no caption"), "a in 0.tar")
    skips.skip(SampleError("corrupt image", why="byte 3\nmore"), "b in 0.tar")
    skips.skip(SampleError("no caption"), "c in 1.tar")
    skips.note(f"{NOTED}pickled member, not read", "1.tar", "d.pkl")
    skips.add({f"{NOTED}pickled member, not read": 1})
    assert skips.examples == {
        "corrupt image": "b in 0.tar: byte 3",
        "no caption": "c in 1.tar: no caption",
        "noted: pickled member, not read": "1.tar: d.pkl",
    }
    other.merge(*skips.take())
    assert other.examples == skips.examples and other.counts == skips.counts
    assert skips.take() == ({}, {})
    other.merge(*skips.take())
    assert other.found() == {"skipped": dict(skips.counts), "examples": skips.examples}
    other.add({"seen": 10})
    assert other.told("train") == (
        "train: 7 samples, 1 noted: pickled member, not read, 3 skipped: 1 corrupt image, "
        "2 no caption (last: c in 1.tar: no caption)"
    )
