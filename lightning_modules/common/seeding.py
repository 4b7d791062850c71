"""Seeds made of several numbers."""

import numpy as np


def mix_seed(*words: int) -> int:
    """Mix non-negative integers (seed, epoch, rank, ...) into one 63-bit seed.

    Neighbouring words give unrelated seeds (numpy's SeedSequence).
    """
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
