"""The mathematics of the latent diffusion model: paths, losses, guidance and the sampling loops.

Time runs from 0 (noise) to 1 (data) on the straight path of SiT (arXiv 2401.08740), and from the
last to the first step of the chain with the objective of DDPM (arXiv 2006.11239), which is that of
LDM. No loop keeps its states.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.common.guidance import Guidance, mix
from lightning_modules.common.places import Picked
from lightning_modules.common.seeding import mix_seed
from lightning_modules.ldmae.config import DiffusionConfig

Condition = Literal["own", "null"]
Predict = Callable[[Tensor, Tensor, Sequence[Condition]], Tensor]
Velocity = Callable[..., Tensor]
OnStep = Callable[[int, Tensor, Tensor], None]
OnCalls = Callable[[Tensor], None]

# Dormand and Prince 1980, RK5(4)7M: nodes, stages, and fifth minus fourth order
NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def training_times(normals: Tensor) -> Tensor:
    """Lognormal law of the times (SD3, arXiv 2403.03206, section 3.1): t = sigmoid(n), n ~ N(0, 1).

    Args:
        normals: [B] float.

    Returns:
        [B] float32 in (0, 1).
    """
    return normals.sigmoid().float()


def straight_path(noise: Tensor, data: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Point and velocity of the straight path: x_t = t x1 + (1 - t) x0, u = x1 - x0.

    Args:
        noise: [B, C, h, w] x0.
        data: [B, C, h, w] x1.
        t: [B] in [0, 1], or [1] for all.

    Returns:
        x_t and u, both [B, C, h, w].
    """
    t = t[:, None, None, None]
    return t * data + (1 - t) * noise, data - noise


def squared_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of every sample: [B, C, h, w] -> [B]."""
    return (predicted - target).square().flatten(1).mean(1)


def direction_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cosine along the channels (LightningDiT, velocity direction): -> [B]."""
    return (1 - F.cosine_similarity(predicted, target, dim=1)).flatten(1).mean(1)


def signal_shares(config: DiffusionConfig) -> Tensor:
    """Share alpha-bar of the signal's variance after every step of the chain (DDPM, section 2).

    alpha-bar_k = prod_{j <= k} (1 - beta_j); scaled_linear spaces the square roots of beta evenly.

    Returns:
        [train_steps] float64, falling.
    """
    power = 2 if config.beta_schedule == "scaled_linear" else 1
    ends = (config.beta_start ** (1 / power), config.beta_end ** (1 / power))
    betas = torch.linspace(*ends, config.train_steps, dtype=torch.float64) ** power
    return (1 - betas).cumprod(0)


def diffuse(noise: Tensor, data: Tensor, share: Tensor) -> Tensor:
    """x_k = sqrt(alpha-bar) x + sqrt(1 - alpha-bar) noise (DDPM eq. 4).

    Args:
        noise: [B, C, h, w].
        data: [B, C, h, w].
        share: [B] alpha-bar, or [1] for all.
    """
    share = share[:, None, None, None].to(data.dtype)
    return share.sqrt() * data + (1 - share).sqrt() * noise


def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Times at the borders of all steps: t' = s t / (1 + (s - 1) t), t even in [0, 1].

    Args:
        steps: number of updates.
        shift: s; below 1 there are more steps near the noise.

    Returns:
        [steps + 1] float32 on the CPU.
    """
    t = torch.linspace(0, 1, steps + 1)
    return shift * t / (1 + (shift - 1) * t)


def chain_grid(steps: int, train_steps: int) -> list[int]:
    """Steps of the chain that `ddim` visits: the noisiest first, evenly spaced to the end."""
    return [round(train_steps * (1 - i / steps)) - 1 for i in range(steps)]


def sample_noise(seeds: Sequence[int], shape: tuple[int, ...], *words: int) -> Tensor:
    """Normal noise [B, *shape] on the CPU; sample i depends on seeds[i] and words alone."""
    made = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(mix_seed(seed, *words))
        made.append(torch.randn(shape, generator=generator))
    return torch.stack(made)


def guided(
    predict: Predict,
    scale: float,
    channels: int | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    progress: Callable[[Tensor], Tensor] = lambda t: t,
) -> Velocity:
    """Make the guided prediction; outside the interval the network sees the condition alone.

    No condition is asked whose weight is 0 for all samples.

    Args:
        predict: (x [B, C, h, w], t [B or 1], S conditions) -> [S, B, C, h, w] in their order.
        scale: 1 is no guidance, 0 the null alone.
        channels: guide only so many, the first; None guides all.
        interval: guide from the first time to the second (arXiv 2404.07724), both included.
        progress: maps t to the interval's scale, 0 = noise, 1 = data.

    Returns:
        (x [B, C, h, w], t [B or 1] on the CPU) -> [B, C, h, w]. Given a third argument, whether all
        of t lies inside (`insides`), it does not look at t, which may be anywhere.
    """

    def velocity(x: Tensor, t: Tensor, known: bool | None = None) -> Tensor:
        guides = insides(scale, interval, progress(t)) if known is None else [known]
        if not any(guides):
            return predict(x, t, ["own"])[0]
        if scale == 0 and channels is None and all(guides):
            return predict(x, t, ["null"])[0]
        own, null = predict(x, t, ["own", "null"])
        mixed = mix(own, null, scale, channels)
        if all(guides):
            return mixed
        return torch.where(torch.tensor(guides, device=x.device)[:, None, None, None], mixed, own)

    return velocity


def insides(scale: float, interval: tuple[float, float], progress: Tensor) -> list[bool]:
    """Say at which shares of the way [n] on the CPU there is guidance."""
    return (Guidance.constant(scale, *interval).at(progress) != 1).tolist()


def held(velocity: Velocity, known: Tensor, noise: Tensor, generate: Tensor) -> Velocity:
    """Make the velocity that draws only a part: elsewhere that of the straight path to `known`.

    Args:
        velocity: of all latents.
        known: [B, C, h, w] latents to keep.
        noise: [B, C, h, w] what the loop starts from.
        generate: [B, 1, h, w] bool, True = draw.
    """
    path = known - noise
    return lambda x, t, *known: torch.where(generate, velocity(x, t, *known), path)


def held_noise(predict: Velocity, known: Tensor, shares: Tensor, generate: Tensor) -> Velocity:
    """`held` for `ddim`: elsewhere the noise that lies between x and `known`.

    Args:
        predict: noise of all latents.
        known: [B, C, h, w] latents to keep.
        shares: [train_steps] alpha-bar, where the times are.
        generate: [B, 1, h, w] bool, True = draw.
    """

    def noise(x: Tensor, t: Tensor, *inside: bool) -> Tensor:
        share = shares[t].view(-1, 1, 1, 1)
        between = (x - share.sqrt().to(x) * known) / (1 - share).sqrt().to(x)
        return torch.where(generate, predict(x, t, *inside), between)

    return noise


@torch.no_grad()
def integrate(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    solver: Literal["euler", "heun"] = "euler",
    on_step: OnStep | None = None,
    *,
    inside: Sequence[bool] | None = None,
    places: Picked | None = None,
) -> Tensor:
    """Follow dx/dt = velocity(x, t) over given times.

    Euler: x + h v(x, t). Heun: x + h (v(x, t) + v(x + h v(x, t), t + h)) / 2.

    Args:
        velocity: (x [B, C, h, w], t [1]) -> [B, C, h, w], with what is known of t third.
        x: [B, C, h, w] state at times[0].
        times: [T + 1] on the CPU.
        solver: of first or second order.
        on_step: called with the step's number, its input and its result.
        inside: [T + 1], what the velocity is told of each time; None leaves it to look.
        places: how steps are computed.

    Returns:
        The state at times[-1].
    """
    places = places or Picked()
    lengths = places.numbers([float(b) - float(a) for a, b in itertools.pairwise(times)])
    told: list[tuple[bool, ...]] = [()] * len(times)
    if inside is not None:
        told = [(known,) for known in inside]

    def move(x: Tensor, here: Tensor, there: Tensor, length: Any, *known: Any) -> Tensor:
        v = velocity(x, here, *known[0])
        if solver == "heun":
            v = (v + velocity(advance(x, v, length), there, *known[1])) / 2
        return advance(x, v, length)

    times, made = places.send(times), places.step(move)
    for i, length in enumerate(lengths):
        here, there = times[i : i + 1], times[i + 1 : i + 2]
        out = made(x, here, there, length, told[i], told[i + 1])
        if on_step is not None:
            on_step(i, x, out)
        x = out
    return x


def advance(x: Tensor, v: Tensor, length: float | Tensor) -> Tensor:
    """x + length v; the length may be a tensor []."""
    if isinstance(length, Tensor):
        return torch.addcmul(x, v, length.to(x.dtype))
    return torch.add(x, v, alpha=length)


@torch.no_grad()
def dopri5(
    velocity: Velocity,
    x: Tensor,
    *,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    start: float = 0.0,
    end: float = 1.0,
    on_step: OnStep | None = None,
    on_calls: OnCalls | None = None,
) -> Tensor:
    """Follow dx/dt = velocity(x, t) from start to end with steps that an error estimate chooses.

    Every sample has its own steps, so that it does not depend on its batch. The estimate is the
    difference of the embedded orders 5 and 4, as a root mean square over the sample of
    error / (atol + rtol max(|x|, |x'|)); a step is accepted where it is at most 1. The step size
    follows Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section II.4.

    Args:
        velocity: (x [B, C, h, w], t [B] on the CPU) -> [B, C, h, w].
        x: [B, C, h, w] state at `start`.
        atol: absolute error per step.
        rtol: error per step relative to the state.
        start: first time.
        end: last time, above `start`.
        on_step: called with the round's number, its input and its result.
        on_calls: called with further evaluations [B] int64 that samples needed; one that is at the
            end needs none, though it is in the batch.

    Returns:
        The state at `end`.

    Raises:
        ValueError: the velocity is not finite, or changes so fast that no step is small enough.
    """

    def size(value: Tensor, scale: Tensor) -> Tensor:
        return (value / scale).square().flatten(1).mean(1).sqrt().double().cpu()  # [B]

    def move(x: Tensor, stages: Sequence[Tensor], weights: Sequence[float], h: Tensor) -> Tensor:
        change = sum(w * k for w, k in zip(weights, stages, strict=True) if w)
        return x + h.to(x)[:, None, None, None] * change

    t = torch.full((x.shape[0],), start, dtype=torch.float64)
    first = velocity(x, t)
    h = _first_step(velocity, x, t, first, size, atol, rtol, end - start)
    if on_calls is not None:
        on_calls(torch.full_like(t, 2, dtype=torch.int64))  # the velocity at x, and the first step
    count = 0
    while (t < end).any():
        if on_calls is not None:
            on_calls((t < end) * len(STAGES))
        last = h >= end - t
        h = torch.where(last, end - t, h)
        stages = [first]
        for node, weights in zip(NODES[1:], STAGES, strict=True):
            moved = move(x, stages, weights, h)
            stages.append(velocity(moved, t + node * h))
        # the last stage stands where the step ends: it begins the next one
        off = move(torch.zeros_like(x), stages, ERROR, h)
        error = size(off, atol + rtol * torch.maximum(x.abs(), moved.abs()))
        if not error.isfinite().all():
            raise ValueError("dopri5 met a velocity that is not finite")
        taken = error <= 1
        if (h[~taken] < 1e-10 * (end - start)).any():
            raise ValueError("dopri5 finds no step that is small enough; take euler or heun")
        there = taken.to(x.device)[:, None, None, None]
        before, x = x, torch.where(there, moved, x)
        first = torch.where(there, stages[-1], first)
        t = torch.where(taken & last, end, torch.where(taken, t + h, t))
        growth = (0.9 * error.clamp(min=1e-10) ** -0.2).clamp(0.2, 10.0)
        h = h * torch.where(taken, growth, growth.clamp(max=1.0))
        if on_step is not None:
            on_step(count, before, x)
        count += 1
    return x


def piecewise_dopri5(
    velocity: Callable[[tuple[float, float]], Velocity],
    x: Tensor,
    interval: tuple[float, float],
    *,
    atol: float,
    rtol: float,
    on_step: OnStep | None = None,
    on_calls: OnCalls | None = None,
) -> Tensor:
    """Follow a velocity that jumps at the ends of the guidance interval: no step crosses them.

    Args:
        velocity: interval of guidance -> velocity, as `dopri5` takes it.
        x: [B, C, h, w] state at time 0.
        interval: guide from the first time to the second, in [0, 1].
        atol: absolute error per step.
        rtol: relative error per step.
        on_step: called with the round's number, its input and its result.
        on_calls: as `dopri5` takes it.

    Returns:
        The state at time 1.
    """
    rounds = itertools.count()

    def follow(i: int, before: Tensor, after: Tensor) -> None:
        if on_step is not None:
            on_step(next(rounds), before, after)

    borders = sorted({0.0, *interval, 1.0})
    for start, end in itertools.pairwise(borders):
        inside = interval[0] <= start and end <= interval[1]
        piece = velocity((0.0, 1.0) if inside else (2.0, 2.0))  # at all times, or at none
        where: dict[str, Any] = {"start": start, "end": end}
        x = dopri5(piece, x, atol=atol, rtol=rtol, **where, on_step=follow, on_calls=on_calls)
    return x


def _first_step(
    velocity: Velocity,
    x: Tensor,
    t: Tensor,
    first: Tensor,
    size: Callable[[Tensor, Tensor], Tensor],
    atol: float,
    rtol: float,
    longest: float,
) -> Tensor:
    """Guess the first step of every sample [B] (Hairer, Norsett and Wanner I, section II.4)."""
    scale = atol + rtol * x.abs()
    d0, d1 = size(x, scale), size(first, scale)
    small = torch.minimum(d0, d1) < 1e-5
    h0 = torch.where(small, 1e-6, 0.01 * d0 / d1.clamp(min=1e-30)).clamp(max=longest)
    step = h0.to(x)[:, None, None, None]
    d2 = size(velocity(x + step * first, t + h0) - first, scale) / h0
    steepest = torch.maximum(d1, d2)
    flat = steepest <= 1e-15
    h1 = torch.where(flat, (h0 * 1e-3).clamp(min=1e-6), (0.01 / steepest.clamp(min=1e-30)) ** 0.2)
    return torch.minimum(100 * h0, h1).clamp(max=longest)


@torch.no_grad()
def ddim(
    predict: Velocity,
    x: Tensor,
    grid: Sequence[int],
    shares: Tensor,
    *,
    eta: float = 0.0,
    fresh: Iterable[Tensor] = (),
    on_step: OnStep | None = None,
    inside: Sequence[bool] | None = None,
    places: Picked | None = None,
) -> Tensor:
    """Walk down the chain (DDIM, arXiv 2010.02502, eq. 12 and 16).

    x' = sqrt(a') x0 + sqrt(1 - a' - s^2) noise + s z, with x0 = (x - sqrt(1 - a) noise) / sqrt(a),
    s = eta sqrt((1 - a') / (1 - a)) sqrt(1 - a / a'), and a' = 1 after the last step. With eta 1
    and every step of the chain this is DDPM's ancestral sampling (Algorithm 2).

    Args:
        predict: (x [B, C, h, w], step [1]) -> noise [B, C, h, w], with what is known of the step
            third.
        x: [B, C, h, w] state at grid[0].
        grid: falling steps of the chain, of `chain_grid`.
        shares: [train_steps] alpha-bar on the CPU.
        eta: share of fresh noise, 0 to 1.
        fresh: z [B, C, h, w] of every step but the last; not read with eta 0.
        on_step: called with the step's number, its input and its result.
        inside: per step, what the prediction is told of it; None leaves it to look.
        places: how steps are computed.

    Returns:
        The latents [B, C, h, w].
    """
    places, supply = places or Picked(), iter(fresh)
    told: list[tuple[bool, ...]] = [()] * len(grid)
    if inside is not None:
        told = [(known,) for known in inside]
    ahead = [*(float(shares[k]) for k in grid[1:]), 1.0]
    spreads, rows = [], []
    for k, after in zip(grid, ahead, strict=True):
        share = float(shares[k])
        spread = eta * math.sqrt((1 - after) / (1 - share) * (1 - share / after))
        left = math.sqrt(max(0.0, 1 - after - spread**2))
        spreads.append(spread)
        rows.append([math.sqrt(1 - share), math.sqrt(share), math.sqrt(after), left, spread])

    def move(x: Tensor, k: Tensor, row: Any, fresh: Tensor | None, known: Any) -> Tensor:
        noisy, clear, after, left, spread = row
        noise = predict(x, k, *known)
        out = after * ((x - noisy * noise) / clear) + left * noise
        return out if fresh is None else out + spread * fresh

    numbers, steps, made = places.numbers(rows), places.send(torch.tensor(grid)), places.step(move)
    for i, spread in enumerate(spreads):
        noise = next(supply) if spread > 0 else None
        out = made(x, steps[i : i + 1], numbers[i], noise, told[i])
        if on_step is not None:
            on_step(i, x, out)
        x = out
    return x
