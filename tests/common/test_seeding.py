"""Seeds made of several numbers."""

import pytest

from lightning_modules.common.seeding import mix_seed


def test_every_word_counts_and_so_does_their_order() -> None:
    words = [(s, e, r) for s in range(6) for e in range(6) for r in range(6)]
    assert len({mix_seed(*w) for w in words}) == len(words)


def test_seeds_are_the_same_on_every_machine() -> None:
    # a run that resumes after an update of the project needs the same ones
    assert [mix_seed(0), mix_seed(1, 2, 3)] == [7896617691693857887, 6498626229777268288]


def test_torch_takes_them() -> None:
    assert all(0 <= mix_seed(n, 2**40) < 2**63 for n in range(200))


def test_negative_words_are_refused() -> None:
    with pytest.raises(ValueError):
        mix_seed(-1)
