"""VQ-Diffusion's mathematics: noise, posterior, loss and sampling loop. Tensors in, tensors out.

Sources: arXiv 2111.14822; microsoft/VQ-Diffusion at d1d3948 (diffusion_transformer.py).

Notation of the paper, with K codes 0..K-1, the mask token K and times t = 0..T-1 (its t is t + 1):
a step keeps a token with probability a, replaces it by any one code with b each and masks it with
c; A, B and C are the same from clean tokens to time t. Index -1 of these is time "before 0", the
clean tokens themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.common.categorical import draw as draw_logits
from lightning_modules.common.categorical import draw_rows, pieces
from lightning_modules.common.places import Picked
from lightning_modules.samplers.kernel import (
    Chance,
    Kernel,
    Level,
    MaskAndReplace,
    Moves,
    step_back,
)
from lightning_modules.vq_diffusion.config import SamplingConfig

# alpha_schedule of the released code: A from the first to the last time, and C at the first
KEEP_FIRST, KEEP_LAST, MASK_FIRST = 0.99999, 0.000009, 0.000009
LIKELY = 128  # codes that are sorted first; of a trained network they have most of the mass
TRUNCATED_AT_ONCE = 32  # rows; the order of K codes takes three times the memory of their logits
LEAST = 1e-30  # probabilities below are taken for this in logarithms, as in the released code


# Forward process ----


@dataclass(frozen=True)
class Schedule:
    """A_t, B_t and C_t of all times; entry T, which is also entry -1, is that of clean tokens.

    Attributes:
        num_codes: K.
        keep: [T + 1] float64, A.
        replace: [T + 1] float64, B, for each single code.
        mask: [T + 1] float64, C.
    """

    num_codes: int
    keep: Tensor
    replace: Tensor
    mask: Tensor

    @property
    def steps(self) -> int:
        """Number of times T."""
        return len(self.keep) - 1

    @property
    def replaced(self) -> Tensor:
        """[T + 1] float64, K B / (1 - C): share of replaced tokens among those not masked."""
        shown = 1 - self.mask
        return self.num_codes * self.replace / torch.where(shown > 0, shown, 1)

    def kernel(self, t: Tensor | int, s: Tensor | int | None = None) -> Kernel:
        """The kernel from time s (default t - 1) to time t, exact for any stride.

        a = A_t / A_s, c = 1 - (1 - C_t) / (1 - C_s), b = (1 - a - c) / K.

        Args:
            t: one time or several, in 0..T-1.
            s: as many earlier times, from -1 on.
        """
        t = torch.as_tensor(t)
        s = t - 1 if s is None else torch.as_tensor(s)
        return Kernel.between(self.num_codes, self._level(t), self._level(s))

    def _level(self, t: Tensor) -> Level:
        return Level(self.keep[t], self.replace[t], self.mask[t])

    def corruption(self) -> MaskAndReplace:
        """The same with the clean tokens first, as the samplers take it."""
        order = [-1, *range(self.steps)]
        return MaskAndReplace(self.num_codes, self._level(torch.tensor(order)))


def linear_schedule(
    steps: int,
    num_codes: int,
    *,
    keep: tuple[float, float] = (KEEP_FIRST, KEEP_LAST),
    mask: tuple[float, float] = (MASK_FIRST, 1 - 1e-5),
) -> Schedule:
    """A and C linear in t (alpha_schedule of the released code); B = (1 - A - C) / K is the rest.

    Args:
        steps: T, at least 2.
        num_codes: K.
        keep: A at the first and the last time.
        mask: C at the first and the last time.

    Raises:
        ValueError: fewer than two steps, or probabilities that do not fit together.
    """
    if steps < 2:
        raise ValueError(f"a schedule needs at least 2 steps, got {steps}")
    cpu = torch.device("cpu")  # also where a module is made without memory, on device meta
    share = torch.arange(steps, dtype=torch.float64, device=cpu) / (steps - 1)
    a_bar = keep[0] + share * (keep[1] - keep[0])
    c_bar = mask[0] + share * (mask[1] - mask[0])
    rest = 1 - a_bar - c_bar
    if keep[1] <= 0 or mask[0] < 0 or mask[1] < mask[0] or rest.min() < -1e-12:
        raise ValueError(f"no schedule keeps {keep} and masks {mask} from first to last time")
    rest = torch.where(rest.abs() < 1e-12, torch.zeros_like(rest), rest)  # rounding, not noise
    one, zero = torch.ones_like(rest[:1]), torch.zeros_like(rest[:1])
    return Schedule(
        num_codes,
        torch.cat([a_bar, one]),
        torch.cat([rest / num_codes, zero]),
        torch.cat([c_bar, zero]),
    )


def mask_schedule(steps: int, num_codes: int, mask_rate: float) -> Schedule:
    """The released A with a chosen share of masks at the last time; the rest of the noise replaces.

    0.99999 is the released code's, in effect mask-only (K B = 1e-6 at all times); 0.9 the paper's
    (K B rises to 0.1); 1 masks alone, with B = 0 exactly; 0 replaces alone.

    Args:
        steps: T, at least 2.
        num_codes: K.
        mask_rate: C at the last time, in [0, 1].
    """
    if mask_rate >= 1 - KEEP_LAST:
        mask = (1 - KEEP_FIRST, 1 - KEEP_LAST)
    else:
        mask = (min(MASK_FIRST, mask_rate), mask_rate)
    return linear_schedule(steps, num_codes, mask=mask)


# Loss ----


class TokenLosses(NamedTuple):
    """Three numbers of every position, each [...]."""

    kl: Tensor
    """KL between q(x_s | x_t, x_0) and p(x_s | x_t), in nats."""
    nll: Tensor
    """-log p(x_s = x_0 | x_t)."""
    cross_entropy: Tensor
    """-log p(x_0 | x_t)."""


def token_losses(logits: Tensor, x_0: Tensor, x_t: Tensor, kernel: Kernel) -> TokenLosses:
    """The terms of the bound without a posterior in memory.

    Of the true posterior only x_0, x_t and the mask have probabilities of their own; all other
    codes share one value. The KL therefore needs log p(x_s = i | x_t) at two codes and its sum
    over all, one pass over the K logits.

    Args:
        logits: [..., K] float32.
        x_0: [...] int64 clean tokens.
        x_t: [...] int64 noisy tokens, K = mask.
        kernel: numbers that broadcast to [...].
    """
    n, codes = kernel.map(lambda v: v.to(logits)), kernel.num_codes
    log_p = logits.log_softmax(-1)
    masked, same = x_t == codes, x_t == x_0
    both = torch.stack([x_t.clamp_max(codes - 1), x_0], dim=-1)
    log_own, log_true = log_p.gather(-1, both).unbind(-1)
    one, zero = torch.ones_like(log_own), torch.zeros_like(log_own)

    # the model: p(i) = scale (A_s p_i + base) for every code but x_t
    own = log_own.exp()
    others = torch.where(masked, one, -torch.expm1(log_own) + n.right * own)
    scale = torch.where(masked, n.fresh, n.moved)
    base = n.replace * others
    log_at_true = _log(scale) + _log(n.keep * log_true.exp() + base)
    log_at_own = _log(n.stays * (n.kept * own + n.back * others))

    # the truth: the same with a one-hot p
    rest = torch.where(same, n.right, one)
    at_true = torch.where(same, zero, scale * (n.keep + n.replace))
    at_own = n.stays * (torch.where(same, n.kept, zero) + n.back * rest)
    at_own = torch.where(masked, zero, at_own)
    at_other = scale * n.replace * rest
    count = codes - 1 - (~masked & ~same).to(at_other.dtype)

    kl = torch.xlogy(at_true, at_true) - at_true * log_at_true
    kl = kl + torch.xlogy(at_own, at_own) - at_own * log_at_own
    if kernel.replaces:
        # at s = -1, where no code is replaced, the sum has no weight and must not be infinite
        floor = torch.where(base > 0, base, one)[..., None]
        log_all = torch.addcmul(floor, n.keep[..., None], log_p.exp()).log().sum(-1)
        log_all = log_all + codes * _log(scale)
        log_self = _log(scale) + _log(n.keep * own + base)
        log_others = log_all - torch.where(same, zero, log_at_true)
        log_others = log_others - torch.where(masked, zero, log_self)
        kl = kl + count * torch.xlogy(at_other, at_other) - at_other * log_others
    nll = -torch.where(same, log_at_own, log_at_true)
    return TokenLosses(kl, nll, -log_true)


def _log(probability: Tensor) -> Tensor:
    return probability.clamp_min(LEAST).log()


def image_losses(
    losses: TokenLosses,
    masked: Tensor,
    t: Tensor,
    time_probability: Tensor,
    steps: int,
    *,
    auxiliary_weight: float,
    adaptive: bool,
    mask_weight: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """The training loss of each image and its part from the bound (_train_loss, released code).

    bound = sum of KL (at t = 0: of the NLL), loss = (bound + w_t lambda aux) / p(t) with
    aux = sum of the cross entropy (at t = 0: of the NLL) and w_t = 2 - t / T, or 1. The scalar that
    is trained on is the sum of the losses over batch size and positions.

    Args:
        losses: of every position, each [B, N].
        masked: [B, N] bool, x_t = mask.
        t: [B] int64.
        time_probability: [B], p(t) that t was drawn with.
        steps: T.
        auxiliary_weight: lambda.
        adaptive: w_t = 2 - t / T instead of 1.
        mask_weight: weight of masked and of other positions, in KL and cross entropy.

    Returns:
        losses [B] and bounds [B].
    """
    weight = torch.where(masked, mask_weight[0], mask_weight[1]).to(losses.kl)
    nll = losses.nll.sum(1)
    first = t == 0
    bound = torch.where(first, nll, (losses.kl * weight).sum(1))
    auxiliary = torch.where(first, nll, (losses.cross_entropy * weight).sum(1))
    factor = 2 - t / steps if adaptive else torch.ones_like(time_probability)
    return (bound + factor * auxiliary_weight * auxiliary) / time_probability, bound


def time_law(history: Tensor, count: Tensor) -> Tensor:
    """p(t) of importance sampling: uniform until every t was seen more than 10 times.

    Then sqrt(history + 1e-10) + 1e-4, normalised; t = 0 takes the weight of t = 1.

    Args:
        history: [T] running mean of the squared bounds.
        count: [T] how often each t was seen.

    Returns:
        [T], sums to 1.
    """
    weight = (history + 1e-10).sqrt() + 1e-4
    weight = torch.cat([weight[1:2], weight[1:]])
    return torch.where((count > 10).all(), weight / weight.sum(), 1 / len(weight))


def draw_times(law: Tensor, uniforms: Tensor) -> Tensor:
    """Draw times [B] int64 of p(t) [T] with uniforms [B]."""
    # a law of NaN gives any time: the loss is NaN, too, and ends the training
    return draw_logits(law.log().expand(len(uniforms), -1), uniforms).clamp(max=len(law) - 1)


def update_history(history: Tensor, count: Tensor, t: Tensor, bounds: Tensor) -> None:
    """history[t] <- 0.9 history[t] + 0.1 bound^2, count[t] += 1, in place.

    Where t occurs more than once, the mean of the squared bounds enters (the released code lets one
    of them win).

    Args:
        history: [T].
        count: [T].
        t: [B] int64.
        bounds: [B], second result of `image_losses`.
    """
    seen = torch.zeros_like(count).index_add_(0, t, torch.ones_like(bounds, dtype=count.dtype))
    square = bounds.detach().square().to(history)
    mean = torch.zeros_like(history).index_add_(0, t, square) / seen.clamp_min(1)
    history.copy_(torch.where(seen > 0, 0.9 * history + 0.1 * mean, history))
    count.add_(seen)


# Sampling ----


class Step(NamedTuple):
    """One call of the network."""

    t: int
    """What the network is told."""
    kernel: Kernel
    """The step that is made."""
    moves: Moves | None = None
    """Its probabilities as a loop hands them to its steps; None: those of the kernel."""

    def moving(self, moves: Moves) -> "Step":
        """The same with probabilities."""
        return self._replace(moves=moves)


def exact_steps(schedule: Schedule, steps: int) -> list[Step]:
    """From time T - 1 to the clean tokens in even strides, each with its exact kernel.

    Raises:
        ValueError: more steps than the schedule has times.
    """
    if not 1 <= steps <= schedule.steps:
        raise ValueError(
            f"steps must be between 1 and the {schedule.steps} steps of the training, got {steps}"
        )
    borders = [schedule.steps - 1 - i * schedule.steps // steps for i in range(steps + 1)]
    return [Step(t, schedule.kernel(t, s)) for t, s in pairwise(borders)]


def released_times(steps: int, stride: int) -> list[int]:
    """Times of sample_type "timeN" with N = stride: T - 1, T - 1 - N, ... and finally 0."""
    times = list(range(steps - 1, -1, -stride))
    return times if times[-1] == 0 else [*times, 0]


def released_steps(schedule: Schedule, stride: int) -> list[Step]:
    """The released fast rule: strides of N in what the network is told, single steps of the tokens.

    At time t above N - 1 the one-step posterior of time t - (N - 1) is applied to x_t, so that few
    masks open until the last calls; the paper's rule is `exact_steps`.
    """
    skip = stride - 1
    return [
        Step(t, schedule.kernel(t - skip if t > skip else t))
        for t in released_times(schedule.steps, stride)
    ]


def make_steps(schedule: Schedule, config: SamplingConfig) -> list[Step]:
    """The steps that the settings ask for, those before `first_step` left out."""
    if config.rule == "exact":
        steps = exact_steps(schedule, config.steps)
    else:
        strides = range(1, schedule.steps + 1)
        counts = {n: len(released_times(schedule.steps, n)) for n in strides}
        fits = [n for n in strides if counts[n] <= config.steps]
        steps = released_steps(schedule, fits[0] if fits else schedule.steps)
    return steps[config.first_step :]


@torch.no_grad()
def truncate(logits: Tensor, rate: float, looks: bool = True) -> Tensor:
    """Truncation sampling: keep the likeliest codes whose predecessors sum to less than `rate`.

    Args:
        logits: [n, K].
        rate: truncation rate in (0, 1]; 1 keeps everything.
        looks: sort all codes only where the likeliest turn out not to do; else always.

    Returns:
        [n, K], dropped codes at -inf; at least one code stays.
    """
    if rate >= 1:
        return logits
    kept = logits.clone()
    for part in pieces(kept, TRUNCATED_AT_ONCE):
        p = part.softmax(-1)
        few = min(LIKELY, p.shape[-1]) if looks else p.shape[-1]
        keep, mass = _likeliest(p, few, rate)
        flat = ~(mass >= rate)  # mass that lies further out, or NaN: these are sorted whole
        if few < p.shape[-1] and bool(flat.any()):
            keep[flat] = _likeliest(p[flat], p.shape[-1], rate)[0]
        part.masked_fill_(~keep, -torch.inf)
    return kept


def _likeliest(p: Tensor, few: int, rate: float) -> tuple[Tensor, Tensor]:
    """Which of the `few` likeliest codes have predecessors that sum to less than `rate`.

    Args:
        p: [n, K] probabilities.
        few: at most K.
        rate: in (0, 1).

    Returns:
        [n, K] bool, and the mass of those few codes [n].
    """
    largest, order = p.topk(few, dim=-1)
    sums = largest.cumsum(-1)
    keep = ~torch.nn.functional.pad(sums[..., :-1] >= rate, (1, 0))
    return torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, keep), sums[..., -1]


Head = Callable[[Tensor], Tensor]
Draw = Callable[..., Tensor]


def transition(
    x: Tensor,
    step: Step,
    rows: Callable[[Tensor], Tensor],
    head: Head,
    chance: Chance,
    generate: Tensor,
    draw: Draw = draw_rows,
    places: Picked | None = None,
) -> Tensor:
    """Make one step of the posterior; arguments as of `step_back`, the kernel in a step."""
    moves = Moves.of(step.kernel) if step.moves is None else step.moves
    codes = step.kernel.num_codes
    return step_back(x, moves, codes, rows, head, chance, generate, draw, places)


def start_tokens(schedule: Schedule, uniforms: Tensor) -> Tensor:
    """Tokens of pure noise: codes and masks in the shares that replacement and masking end with.

    Args:
        schedule: the noise.
        uniforms: [2, B, h, w] in [0, 1).

    Returns:
        [B, h, w] int64.
    """
    return schedule.corruption().noise(uniforms)


def sample_noise(seeds: Sequence[int], calls: int, grid: tuple[int, int]) -> dict[str, Tensor]:
    """All randomness of `sample`. Image i depends on seeds[i] only, never on the batch it is in.

    Args:
        seeds: one per image.
        calls: steps that the loop makes (R).
        grid: height and width in tokens.

    Returns:
        start [2, B, h, w] for `start_tokens` or `corrupt`; opens, draws and swaps [R, B, h, w].
    """
    made = [
        torch.rand(calls * 3 + 2, *grid, generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    noise = torch.stack(made, dim=1)  # [3 R + 2, B, h, w]
    opens, draws, swaps = noise[2:].unflatten(0, (calls, 3)).unbind(1)
    return {"start": noise[:2], "opens": opens, "draws": draws, "swaps": swaps}


def sample(
    predict: Callable[..., Tensor],
    head: Head,
    *,
    x: Tensor,
    steps: Sequence[Step],
    opens: Tensor,
    draws: Tensor,
    swaps: Tensor,
    truncation: float = 1.0,
    mask: Tensor | None = None,
    draw: Draw = draw_rows,
    transition: Callable[..., Tensor] = transition,
    places: Picked | None = None,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """The sampling loop of arXiv 2111.14822 for every rule and every order.

    Args:
        predict: (x [B, h, w], t [B] int64, keep [B, h, w] bool or None for all) -> features
            [keep.sum(), C].
        head: [m, C] -> logits [m, K].
        x: [B, h, w] int64 tokens to start from, K = mask.
        steps: R steps, from noise to tokens.
        opens: [R, B, h, w] in [0, 1).
        draws: [R, B, h, w] in [0, 1), for `draw`.
        swaps: [R, B, h, w] in [0, 1).
        truncation: truncation rate.
        mask: [B, h, w], 1 = generate, 0 = keep the token of x; None generates all.
        draw: like `draw_rows`.
        transition: makes one step; another one gives another order of positions.
        places: how places are computed.
        on_step: called with the step's number, its input and its result [B, h, w].

    Returns:
        [B, h, w] int64.
    """
    places = places or Picked()
    generate = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    times = torch.tensor([step.t for step in steps], device=x.device)
    moves = places.numbers([[*Moves.of(step.kernel)] for step in steps])

    def truncated(features: Tensor) -> Tensor:
        return truncate(head(features), truncation, places.looks)

    def move(x: Tensor, step: Any, t: Tensor, chance: Chance) -> Tensor:
        def rows(keep: Tensor) -> Tensor:
            return predict(x, t.expand(len(x)), places.keep(keep))

        return transition(x, step, rows, truncated, chance, generate, draw, places=places)

    made = places.step(move)
    for i, step in enumerate(steps):
        before = x
        prepared = step.moving(Moves(*moves[i]))
        x = made(before, prepared, times[i], Chance(opens[i], draws[i], swaps[i]))
        if on_step is not None:
            on_step(i, before, x)
    places.check()
    return x
