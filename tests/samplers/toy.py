"""A joint of 5 tokens and 4 codes whose denoiser is exact: only the sampler can err."""

import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from scipy import stats
from torch import Tensor

from lightning_modules.samplers.kernel import Absorbing, Corruption, Level, MaskAndReplace, Uniform
from lightning_modules.samplers.loop import Rows, Sampled, Sampler, run

K, N, DRAWS = 4, 5, 50_000
CLEAN = torch.tensor(list(itertools.product(range(K), repeat=N)))  # [K^N, N]
NOISY = torch.tensor(list(itertools.product(range(K + 1), repeat=N)))  # [(K + 1)^N, N], K = mask


def joint() -> Tensor:
    """p [K^N]: 40 codewords have 85 % of the mass, so that tokens depend on each other."""
    generator = torch.Generator().manual_seed(1)
    p = torch.full((K**N,), 0.15 / K**N, dtype=torch.float64)
    chosen = torch.randperm(K**N, generator=generator)[:40]
    weight = torch.rand(40, generator=generator, dtype=torch.float64) + 0.2
    p[chosen] += 0.85 * weight / weight.sum()
    return p


P = joint()


def mask_and_replace(replaced: float = 0.2, steps: int = 60, codes: int = K) -> MaskAndReplace:
    """Tables of a linear schedule, `replaced` of whose noise is codes."""
    noise = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return MaskAndReplace(codes, Level(1 - noise, noise * replaced / codes, noise * (1 - replaced)))


KERNELS: dict[str, Corruption] = {
    "absorbing": Absorbing(K),
    "uniform": Uniform(K),
    "mask and replace": mask_and_replace(),
}


def place(x: Tensor, base: int) -> Tensor:
    """Number of tokens [..., N] in the list of all states."""
    return (x * base ** torch.arange(N - 1, -1, -1)).sum(-1)


@lru_cache(maxsize=64)
def likelihood(keep: float, replaced: float, mask: float) -> Tensor:
    """q(noisy state | clean state) [(K + 1)^N, K^N]."""
    one = torch.full((K + 1, K), replaced, dtype=torch.float64)
    one[:K] += keep * torch.eye(K, dtype=torch.float64)
    one[K] = mask
    whole = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(N):
        whole = torch.kron(whole, one)
    return whole


@lru_cache(maxsize=64)
def denoiser(keep: float, replaced: float, mask: float) -> Tensor:
    """p(x_0 at each place | noisy state) [(K + 1)^N, N, K]; 0 where a state cannot be."""
    weight = likelihood(keep, replaced, mask) * P
    total = weight.sum(1, keepdim=True)
    weight = weight / torch.where(total > 0, total, 1)
    return torch.einsum("ys,snk->ynk", weight, torch.nn.functional.one_hot(CLEAN, K).double())


def exact(kernel: Corruption, time: float) -> Tensor:
    """The denoiser of a kernel at a time; that of masks alone is the same at all of them."""
    if kernel.replaced == 0:
        return denoiser(0.5, 0.0, 0.5)
    return denoiser(*(float(v) for v in kernel.at(time)))


def predictor(
    kernel: Corruption, temperature: float = 1.0, shift: float = 3.0
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Rows]:
    """The exact denoiser as a network, whose logits have another constant at every place."""
    constants = shift * torch.arange(N)

    def predict(pictures: Tensor, x: Tensor, time: Tensor, done: Tensor, keep: Tensor) -> Rows:
        logits = torch.empty(*x.shape, K, dtype=torch.float64)
        for t in time.unique().tolist():
            at = time == t
            logits[at] = exact(kernel, t)[place(x[at], K + 1)].log()
        rows = (logits + constants[:, None])[keep]
        return Rows(rows, lambda r: r, torch.full((len(rows),), temperature))

    return predict


class Uniforms:
    """Chances from one generator for all pictures."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, pictures: Tensor, streams: int) -> Tensor:
        shape = (streams, len(pictures), N)
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)


def start(kernel: Corruption, n: int = DRAWS, seed: int = 5) -> Tensor:
    """Pure noise [n, N]."""
    return kernel.noise(torch.rand(2, n, N, generator=torch.Generator().manual_seed(seed)))


def sampled(sampler: Sampler, n: int = DRAWS, seed: int = 0, masks: bool = False) -> Sampled:
    """Draw n pictures with the exact denoiser, from masks alone or from the kernel's noise."""
    x = torch.full((n, N), K) if masks else start(sampler.kernel, n)
    everywhere = torch.ones(n, N, dtype=torch.bool)
    return run(sampler, predictor(sampler.kernel), x, everywhere, Uniforms(seed))


def clean_law(noisy: Tensor) -> Tensor:
    """The part of a law over noisy states that has no mask: [K^N]."""
    return noisy[place(CLEAN, K + 1)]


def chain(steps: Sequence[Tensor], first: Tensor) -> Tensor:
    """Law over noisy states after steps whose places move independently given the state.

    Args:
        steps: [(K + 1)^N, N, K + 1] law of every place given a state, per step.
        first: [(K + 1)^N].
    """
    law = first
    for step in steps:
        there = law.nonzero().squeeze(1)
        after = torch.zeros_like(law)
        for part in there.split(256):
            moved = law[part, None]
            for i in range(N):
                moved = (moved[:, :, None] * step[part, i, None, :]).flatten(1)
            after += moved.sum(0)
        law = after
    return law


def noise_law(kernel: Corruption) -> Tensor:
    """Law of pure noise over the noisy states."""
    end = kernel.end
    one = torch.full((K + 1,), float(end.replace), dtype=torch.float64)
    one[K] = float(end.mask)
    one = one / one.sum()
    law = torch.ones(1, dtype=torch.float64)
    for _ in range(N):
        law = torch.kron(law, one)
    return law


def p_value(x: Tensor, law: Tensor, base: int = K) -> float:
    """Chi-square test of draws [n, N] against a law over all states; rare states are one cell."""
    if int(x.max()) >= base:
        return 0.0  # a mask is left
    counts = torch.bincount(place(x, base), minlength=len(law)).double()
    expected = law * len(x)
    impossible = expected == 0
    if bool(counts[impossible].any()):
        return 0.0
    rare = (expected < 5) & ~impossible
    cells = [counts[~rare & ~impossible], expected[~rare & ~impossible]]
    if bool(rare.any()):
        cells = [
            torch.cat([values, whole[rare].sum()[None]])
            for values, whole in zip(cells, (counts, expected), strict=True)
        ]
    statistic = ((cells[0] - cells[1]) ** 2 / cells[1]).sum()
    return float(stats.chi2.sf(float(statistic), len(cells[0]) - 1))
