"""What all samplers share: what they ask of a network, their chances, and the loop around them.

A sampler is a frozen dataclass of settings. It says how one step turns the tokens of some pictures
into others; the loop calls it until each picture is finished, and finished pictures leave the
batch. Tokens stand in one row per picture, [n, N], whatever the grid is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_modules.common.categorical import check_numbers, locate
from lightning_modules.common.seeding import mix_seed
from lightning_modules.samplers.kernel import Corruption

State = dict[str, Tensor]
"""Of n pictures: x [n, N] int64, generate [n, N] bool, and what a sampler remembers, [n, ...]."""
CHANCES = 6  # stream of the seeds
COLDEST = 1e-6  # temperature 0 is the limit, in which the likeliest token has everything
FARTHEST = -1e30  # finite in float32
AT_ONCE = 256  # rows that pass the head together
IN_CACHE = 2**20  # logits that are measured together


@dataclass(frozen=True)
class Rows:
    """What a network says of n places: features in front of its head, never all logits at once."""

    features: Tensor
    """[n, C]."""
    head: Callable[[Tensor], Tensor]
    """[m, C] -> logits [m, K]."""
    heat: Tensor
    """[n] temperature of the draw, at least 0."""
    narrow: Callable[[Tensor], Tensor] | None = None
    """logits [m, K] at temperature 1 -> the same with excluded codes at -inf."""
    mass: Tensor | None = None
    """[n] sum of the guided law where it is not normalised; None is 1."""

    def __getitem__(self, keep: Tensor) -> "Rows":
        mass = None if self.mass is None else self.mass[keep]
        return replace(self, features=self.features[keep], heat=self.heat[keep], mass=mass)

    def at(self, temperature: float) -> "Rows":
        """Return the same at another temperature."""
        return replace(self, heat=torch.full_like(self.heat, temperature))

    def map(self, measure: Callable[..., tuple[Tensor, ...]], *beside: Tensor) -> list[Tensor]:
        """Measure the logits that tokens are drawn from, few rows at a time.

        Args:
            measure: (logits [m, K] float, *others [m, ...]) -> tensors [m, ...].
            beside: [n, ...] what belongs to the rows.
        """
        parts = []
        pieces = [tensor.split(AT_ONCE) for tensor in (self.features, self.heat, *beside)]
        for features, heat, *others in zip(*pieces, strict=True):
            logits = self.head(features)
            logits = logits.float() if logits.element_size() < 4 else logits
            if self.narrow is not None:
                logits = self.narrow(logits)
            heat = heat.clamp_min(COLDEST).to(logits)[:, None]
            some = max(1, IN_CACHE // max(1, logits.shape[1]))
            few = [tensor.split(some) for tensor in (logits, heat, *others)]
            for part, warm, *more in zip(*few, strict=True):
                parts.append(measure(part / warm, *more))
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def draw(self, uniforms: Tensor) -> Tensor:
        """Draw a token per row with uniforms [n]: [n] int64."""
        return self.map(lambda logits, u: (draw(logits.softmax(1), u),), uniforms)[0]


def draw(p: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a token per row of probabilities [m, K] with uniforms [m], by the draw of the suite."""
    tokens = locate(p, uniforms)
    check_numbers(tokens < p.shape[1])
    return tokens


def log_p(p: Tensor, tokens: Tensor) -> Tensor:
    """log p of tokens [m], drawn from probabilities [m, K]: [m]."""
    return p.gather(1, tokens[:, None]).squeeze(1).log()


def entropy(logits: Tensor, p: Tensor | None = None) -> Tensor:
    """Entropy of softmax(logits [m, K]) in nats: [m]; p [m, K] is the softmax, if it is known.

    H = -sum p (l - max l) - log max p, which needs one exponential per code and no logarithm.
    """
    p = logits.softmax(1) if p is None else p
    # a code at -inf has p = 0, which takes it out of the sum only while the gap is finite
    gap = (logits - logits.amax(1, keepdim=True)).clamp_min_(FARTHEST)
    return -(torch.linalg.vecdot(p, gap) + p.amax(1).log()).clamp_max(0)


def entropy_of(head: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return what measures the entropy of features [n, C] behind a head, in nats: [n]."""

    def measure(rows: Tensor) -> Tensor:
        flat = torch.ones(len(rows), device=rows.device)
        return Rows(rows, head, flat).map(lambda logits: (entropy(logits),))[0]

    return measure


def gumbel(uniforms: Tensor) -> Tensor:
    """Gumbel noise -log(-log u), finite for every u in [0, 1)."""
    tiny = torch.finfo(uniforms.dtype).tiny
    return -(-uniforms.clamp(min=tiny).log()).log()


def lowest(scores: Tensor, candidates: Tensor, number: Tensor) -> Tensor:
    """Mark the `number` candidates of lowest score in each picture; ties go by place.

    Args:
        scores: [n, ...].
        candidates: [n, ...] bool.
        number: [n] int64, at most the candidates.

    Returns:
        [n, ...] bool.
    """
    scored = scores.masked_fill(~candidates, torch.inf).flatten(1)
    ranked = scored.argsort(dim=1, stable=True)
    first = torch.arange(ranked.shape[1], device=ranked.device) < number[:, None]
    chosen = torch.zeros_like(first).scatter(1, ranked, first)
    return chosen.view(scores.shape) & candidates


def spread(values: Tensor, keep: Tensor, empty: float) -> Tensor:
    """Put values [keep.sum()] where keep [n, N] is true, `empty` elsewhere: [n, N]."""
    return torch.full(keep.shape, empty, dtype=values.dtype, device=keep.device).masked_scatter(
        keep, values
    )


class Ask(Protocol):
    """What a step may ask of the network; pictures without a kept place make no call."""

    def __call__(self, x: Tensor, time: Tensor | float, done: Tensor | float, keep: Tensor) -> Rows:
        """Ask about tokens.

        Args:
            x: [n, N] int64 tokens, K = mask.
            time: [n] or one: noise that the network is told of, 1 = pure noise.
            done: [n] or one, share of the way that is done before this call, in [0, 1]: guidance
                and temperature follow it (`common.guidance.ratio`).
            keep: [n, N] bool, not all false.

        Returns:
            The rows of the kept places, in the order of keep.nonzero().
        """
        ...


Predict = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Rows]
"""(pictures [n] int64, x [n, N], time [n], done [n], keep [n, N] bool) -> Rows."""


@dataclass(frozen=True)
class Sampler:
    """A way of sampling; a subclass has its settings as further fields."""

    STREAMS: ClassVar[int] = 1
    """Uniforms that a step needs at each place."""

    kernel: Corruption

    @property
    def told(self) -> list[float]:
        """Times in (0, 1] of the calls, as many as there can be; where `pace` is None, even ones
        stand for each picture's own."""
        raise NotImplementedError

    @property
    def pace(self) -> int | None:
        """Steps T of which `done` counts the equal shares s / T; None: each picture has its own."""
        return None

    def memory(self, x: Tensor, generate: Tensor) -> State:
        """Return what the first step remembers of tokens [B, N]."""
        return {}

    def step(self, i: int, state: State, ask: Ask, u: Tensor) -> tuple[State, Tensor]:
        """Make one step.

        Args:
            i: its number.
            state: of n pictures.
            ask: the network.
            u: [STREAMS, n, N] in [0, 1).

        Returns:
            The state after it, and which pictures [n] are finished.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Stepped(Sampler):
    """A sampler of a fixed number of steps, in even times from 1 to 0."""

    steps: int = 12

    def times(self, i: int) -> tuple[float, float]:
        """Return the times before and after step i."""
        return 1 - i / self.steps, 1 - (i + 1) / self.steps

    @property
    def told(self) -> list[float]:
        """Return the times before all steps."""
        return [self.times(i)[0] for i in range(self.steps)]

    @property
    def pace(self) -> int | None:
        """Return T."""
        return self.steps

    def done(self, i: int) -> float:
        """Return the share of the way that is done before step i."""
        return i / self.steps

    def ends(self, i: int, x: Tensor) -> Tensor:
        """Return which of the pictures x [n, N] are finished after step i."""
        return torch.full((len(x),), i >= self.steps - 1, device=x.device)


class Chances:
    """Uniforms of B pictures; those of picture i depend on seed i and its own steps alone.

    Args:
        seeds: one per picture.
        places: tokens per picture N.
        device: where they are needed; they are drawn on the CPU.
    """

    def __init__(self, seeds: Sequence[int], places: int, device: Any = "cpu") -> None:
        self.generators = [torch.Generator().manual_seed(mix_seed(seed, CHANCES)) for seed in seeds]
        self.places, self.device = places, device

    def __call__(self, pictures: Tensor, streams: int) -> Tensor:
        """Draw the next uniforms [streams, n, N] of some pictures [n]."""
        shape = (streams, self.places)
        rows = [torch.rand(shape, generator=self.generators[p]) for p in pictures.tolist()]
        return torch.stack(rows, dim=1).to(self.device)


class Sampled(NamedTuple):
    """What a loop made."""

    tokens: Tensor
    """[B, N] int64."""
    calls: Tensor
    """[B] int64, network calls for each picture."""


def run(
    sampler: Sampler,
    predict: Predict,
    start: Tensor,
    generate: Tensor,
    chances: Callable[[Tensor, int], Tensor],
    *,
    first: int = 0,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Sampled:
    """Sample until every picture is finished.

    Args:
        sampler: makes the steps.
        predict: the network.
        start: [B, N] int64 noise, and given tokens where nothing is generated; those never change.
        generate: [B, N] bool.
        chances: (pictures [n], streams) -> uniforms [streams, n, N].
        first: number of the first step.
        on_step: called with the step's number, its input and its result [B, N].
    """
    state = {"x": start, "generate": generate, **sampler.memory(start, generate)}
    calls = torch.zeros(len(start), dtype=torch.int64, device=start.device)
    pictures = generate.any(1).nonzero().squeeze(1)
    i = first
    while len(pictures):
        ask = _asking(predict, pictures, calls)
        now = {name: value[pictures] for name, value in state.items()}
        after, finished = sampler.step(i, now, ask, chances(pictures, sampler.STREAMS))
        before = state["x"]
        state = {k: v.index_copy(0, pictures, after[k].to(v)) for k, v in state.items()}
        if on_step is not None:
            on_step(i, before, state["x"])
        pictures, i = pictures[~finished], i + 1
    return Sampled(state["x"], calls)


def _asking(predict: Predict, pictures: Tensor, calls: Tensor) -> Ask:
    """What the pictures of one step ask by; every call is counted."""

    def ask(x: Tensor, time: Tensor | float, done: Tensor | float, keep: Tensor) -> Rows:
        asking = keep.any(1)
        told = [
            torch.as_tensor(value, dtype=torch.float32, device=x.device).expand(len(x))[asking]
            for value in (time, done)
        ]
        calls.index_add_(0, pictures, asking.to(calls))
        return predict(pictures[asking], x[asking], told[0], told[1], keep[asking])

    return ask
