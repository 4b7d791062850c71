"""What Improved VQ-Diffusion adds to the sampling loop: guidance and purity. Tensors in and out.

Sources: arXiv 2205.16007; microsoft/VQ-Diffusion at d1d3948 (p_sample of diffusion_transformer.py).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.common.categorical import draw_rows, pieces
from lightning_modules.common.guidance import Guidance
from lightning_modules.common.places import Picked
from lightning_modules.improved_vqd.config import (
    RELEASED_SLOW_TABLE,
    RELEASED_TABLES,
    SamplingConfig,
    check_released,
)
from lightning_modules.samplers.kernel import Chance, Kernel, Moves
from lightning_modules.vq_diffusion import process
from lightning_modules.vq_diffusion.process import Draw, Head, Schedule


def guidance_of(config: SamplingConfig) -> Guidance:
    """Guidance of the settings, with weights [s, 1 - s] of features under condition and null.

    log p_null + s (log p - log p_null), normalised again, is the softmax of the logits mixed with
    these weights; and the logits are affine in the features, so that the features can be mixed.
    """
    scale, law = config.guidance, config.guidance_law
    start, end = (1.0 if law == "up" else scale), (1.0 if law == "down" else scale)
    first, last = config.guidance_first, config.guidance_last
    normalised = config.guidance_normalised
    return Guidance(start, end, "ratio", first=first, last=last, normalised=normalised)


class Call(NamedTuple):
    """One call of the network."""

    t: int
    """What the network is told."""
    kernel: Kernel
    """The step, where it is an ordinary one."""
    reveals: tuple[int, int] | None
    """How many tokens of the walk are revealed before and after it; None: an ordinary step."""
    moves: Moves | None = None
    """As of `process.Step`."""

    def moving(self, moves: Moves) -> "Call":
        """The same with probabilities."""
        return self._replace(moves=moves)

    def revealing(self, reveals: Sequence[Any]) -> "Call":
        """The same with other counts, where it reveals any; they may be tensors []."""
        return self if self.reveals is None else self._replace(reveals=tuple(reveals))


def make_calls(schedule: Schedule, config: SamplingConfig, tokens: int) -> list[Call]:
    """The calls that the settings ask for, those before `first_step` left out.

    Args:
        schedule: the noise that the network was trained with.
        config: the settings.
        tokens: number of positions N of an image.

    Raises:
        ValueError: settings that do not fit the schedule or the number of tokens.
    """
    limit = config.tokens_per_call
    if config.order == "diffusion":
        calls = [Call(s.t, s.kernel, None) for s in process.make_steps(schedule, config)]
        return calls
    if config.reveal == "constant":
        calls = constant_calls(schedule, tokens, limit or tokens)
    elif config.reveal == "released":
        calls = table_calls(schedule, released_table(schedule.steps, tokens, limit), limit)
    else:
        calls = schedule_calls(schedule, config.steps, tokens, limit)
    if config.first_step >= len(calls):
        raise ValueError(
            f"first_step must be below the number of calls ({len(calls)}), got {config.first_step}"
        )
    return calls[config.first_step :]


def released_table(steps: int, tokens: int, limit: int | None) -> list[int]:
    """The released number of tokens per time.

    Raises:
        ValueError: a number of tokens or steps that the released code has no table for.
    """
    check_released(tokens, steps)
    if steps == 100 and limit is not None and limit <= 10:
        return RELEASED_SLOW_TABLE
    return RELEASED_TABLES[steps]


def table_calls(schedule: Schedule, table: Sequence[int], limit: int | None) -> list[Call]:
    """The released walk t = T - 1..0: table[t] tokens at time t, in calls of at most `limit`.

    If a call would leave a single token it takes that, too. At t = 0 everything that is left is
    filled and everything else drawn again, as in VQ-Diffusion.
    """
    calls, done = [], 0
    for t in range(schedule.steps - 1, 0, -1):
        for count in _parts(table[t], limit):
            calls.append(Call(t, schedule.kernel(t), (done, done + count)))
            done += count
    return [*calls, Call(0, schedule.kernel(0), None)]


def schedule_calls(
    schedule: Schedule, steps: int, tokens: int, limit: int | None = None
) -> list[Call]:
    """The released walk for any number of tokens and steps.

    A step from t to s reveals so many tokens as the noise schedule does on average,
    N (C_t - C_s); the last one is an ordinary step.
    """
    walk = process.exact_steps(schedule, steps)
    ends = [tokens - round(tokens * float(step.kernel.mask)) for step in walk[:-1]]
    calls = []
    for (before, after), step in zip(pairwise([0, *ends]), walk[:-1], strict=True):
        done = before
        for count in _parts(after - before, limit):
            calls.append(Call(step.t, step.kernel, (done, done + count)))
            done += count
    return [*calls, Call(walk[-1].t, walk[-1].kernel, None)]


def constant_calls(schedule: Schedule, tokens: int, each: int) -> list[Call]:
    """The paper's walk: `each` tokens per call, where C_t is nearest to the share of masks."""
    borders = [*range(0, tokens, each), tokens]
    calls = []
    for before, after in pairwise(borders):
        t = int((schedule.mask[:-1] - (1 - before / tokens)).abs().argmin())
        calls.append(Call(t, schedule.kernel(t), (before, after)))
    return calls


def _parts(count: int, limit: int | None) -> list[int]:
    """Cut a number into parts of at most `limit`, or one more where 1 would be left."""
    parts = []
    while count > 0:
        part = count if limit is None or count - limit <= 1 else limit
        parts.append(part)
        count -= part
    return parts


def purity(rows: Tensor, head: Head, chunk: int = 256) -> Tensor:
    """Probability of the likeliest code, max_k p(x_0 = k | x_t), for features [n, C]: [n]."""
    peaks = []
    for part in pieces(rows, chunk):
        logits = head(part)
        peaks.append(1 / (logits - logits.amax(1, keepdim=True)).exp_().sum(1))
    return torch.cat(peaks)


def choose(score: Tensor, masked: Tensor, counts: Tensor, uniforms: Tensor) -> Tensor:
    """Draw positions without replacement with probability proportional to their score.

    These are the largest of log score - log(-log u) (Gumbel top-k).

    Args:
        score: [B, N] at least 0.
        masked: [B, N] bool, the positions to choose from.
        counts: [B] how many of each image.
        uniforms: [B, N] in [0, 1).

    Returns:
        [B, N] bool.
    """
    key = score.log() - (-uniforms.clamp_min(torch.finfo(uniforms.dtype).tiny).log()).log()
    order = key.masked_fill(~masked, -torch.inf).argsort(dim=1, descending=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return masked & (rank < counts[:, None])


def sample(
    predict: Callable[..., Tensor],
    head: Head,
    *,
    x: Tensor,
    calls: Sequence[Call],
    opens: Tensor,
    draws: Tensor,
    swaps: Tensor,
    order: str = "purity",
    purity_weight: float = 1.0,
    raw: bool = False,
    shares: Tensor | None = None,
    tokens: int | None = None,
    truncation: float = 1.0,
    mask: Tensor | None = None,
    draw: Draw = draw_rows,
    transition: Callable[..., Tensor] = process.transition,
    places: Picked | None = None,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """VQ-Diffusion's loop, in which a call may reveal a chosen number of tokens.

    Such a call scores every position with its purity over the image's largest, as released, or with
    the purity itself (Algorithm 2), draws the positions in proportion to the scores and their
    tokens of p^(1 + r score) (with order=random: the score is 1 and the tokens come from p). Where
    less than the whole image is generated, so is the share of what each call reveals.

    Args:
        predict: (x [B, h, w], t [B] int64, keep [B, h, w] bool or None for all) -> features
            [keep.sum(), C].
        head: [m, C] -> logits [m, K].
        x: [B, h, w] int64 tokens to start from, K = mask.
        calls: R calls, from noise to tokens.
        opens: [R, B, h, w] in [0, 1), which positions are chosen or change.
        draws: [R, B, h, w] in [0, 1), for `draw`.
        swaps: [R, B, h, w] in [0, 1), for ordinary steps.
        order: purity or random.
        purity_weight: r.
        raw: take the purity as it is.
        shares: [T] C_t: in calls that reveal, each image's time is the one whose share of masks is
            nearest to its own; None takes the calls' times.
        tokens: number of tokens that the calls' counts are made for; default h w.
        truncation: truncation rate.
        mask: [B, h, w], 1 = generate, 0 = keep the token of x; None generates all.
        draw: like `draw_rows`.
        transition: makes the ordinary steps.
        places: how places are computed.
        on_step: called with the step's number, its input and its result [B, h, w].

    Returns:
        [B, h, w] int64.
    """
    places, codes = places or Picked(), calls[0].kernel.num_codes
    generate = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    total = ((x == codes) & generate).flatten(1).sum(1)  # [B]
    first = calls[0].reveals[0] if calls[0].reveals is not None else 0
    whole = (x[0].numel() if tokens is None else tokens) - first
    shares = None if shares is None else places.send(shares)
    revealed = places.numbers([[*(call.reveals or (0, 0))] for call in calls])
    calls = [call.revealing(n) for call, n in zip(calls, revealed, strict=True)]

    def step(
        x: Tensor,
        call: Call,
        rows: Callable[[Tensor], Tensor],
        truncated: Head,
        chance: Chance,
        generate: Tensor,
        draw: Draw,
        places: Picked,
    ) -> Tensor:
        if call.reveals is None:
            ordinary = process.Step(call.t, call.kernel, call.moves)
            return transition(x, ordinary, rows, truncated, chance, generate, draw, places=places)
        before, after = ((n - first) * total // whole for n in call.reveals)
        masked = (x == codes) & generate
        if not places.any((after > before)[:, None, None] & masked):
            return x
        if shares is not None:
            share = (x == codes).flatten(1).double().mean(1)  # [B]
            t = (shares.to(share) - share[:, None]).abs().argmin(1)

            def rows(keep: Tensor) -> Tensor:
                return predict(x, t, places.keep(keep))

        features = score = None
        asked = masked if raw else torch.ones_like(masked)
        if order == "purity":
            features = rows(asked)  # [n, C]
            nothing = x.new_zeros(x.shape, dtype=features.dtype)
            peak = places.put(nothing, asked, purity(features, head)).flatten(1)  # [B, N]
            score = peak if raw else peak / (peak.amax(1, keepdim=True) + 1e-10)
        chosen = choose(
            torch.ones_like(chance.opens).flatten(1) if score is None else score,
            masked.flatten(1),
            after - before,
            chance.opens.flatten(1),
        ).view_as(x)
        picked = rows(chosen) if features is None else places.among(features, asked, chosen)
        sharp = torch.ones_like(picked[:, :1])
        if score is not None:
            sure = places.pick(score.view_as(x), chosen)[:, None]
            sharp = sharp + purity_weight * sure.to(picked)
        # the power travels with its row, because `draw` cuts the rows into pieces
        packed = torch.cat([picked, sharp], dim=1)
        drawn = draw(
            packed,
            places.pick(chance.draws, chosen),
            lambda some: truncated(some[:, :-1]) * some[:, -1:],
        )
        return places.put(x, chosen, drawn)

    return process.sample(
        predict,
        head,
        x=x,
        steps=calls,  # type: ignore[arg-type]
        opens=opens,
        draws=draws,
        swaps=swaps,
        truncation=truncation,
        mask=mask,
        draw=draw,
        transition=step,
        places=places,
        on_step=on_step,
    )
