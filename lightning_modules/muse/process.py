"""Muse's mathematics: masking, loss, parallel decoding. Tensors in, tensors out.

Sources: arXiv 2301.00704 (Muse), 2202.04200 (MaskGIT), 2209.04439 (Token-Critic) and the public
code that the settings name: google-research/maskgit, diffusers (aMUSEd), huggingface/open-muse,
lucidrains/muse-maskgit-pytorch, bytedance/1d-tokenizer, baaivision/MUSE-Pytorch,
valeoai/Halton-MaskGIT.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.common.categorical import DRAWN_AT_ONCE, draw_rows, likeliest, pieces
from lightning_modules.common.guidance import Guidance, equals
from lightning_modules.common.places import Picked
from lightning_modules.muse.config import (
    Confidence,
    Counting,
    DecodeConfig,
    Order,
    exponent,
)
from lightning_modules.samplers.kernel import Absorbing
from lightning_modules.samplers.loop import gumbel, lowest

Predict = Callable[..., Tensor]
Head = Callable[[Tensor], Tensor]


def mask_ratio(schedule: str, r: Tensor, total: Tensor | float = 2.0) -> Tensor:
    """Share gamma(r) of tokens that is masked at ratio r (MaskGIT: libml/mask_schedule.py).

    cosine cos(pi r / 2), pow<p> 1 - r^p (linear, square, cubic, sqrt are pow1, 2, 3, 0.5),
    exp 1 - 2^(-(1 - r) log2 N), log -log2(r) / log2(N), arccos 2 arccos(r) / pi; all are clipped
    to [1e-6, 1]. Computed in float32: floor(N gamma) depends on it, at r = 2/3 for one.

    Args:
        schedule: its name.
        r: float32 in [0, 1].
        total: N of exp and log, broadcast with r.

    Returns:
        As r and total broadcast.
    """
    bits = torch.log2(torch.as_tensor(total, dtype=torch.float32, device=r.device).clamp(min=2))
    if schedule == "cosine":
        ratio = torch.cos(math.pi / 2 * r)
    elif schedule == "exp":
        ratio = 1 - torch.exp2(-bits * (1 - r))
    elif schedule == "log":
        ratio = -torch.log2(r) / bits
    elif schedule == "arccos":
        ratio = torch.arccos(r) / (math.pi * 0.5)
    else:
        ratio = 1 - r ** exponent(schedule)
    return ratio.clamp(1e-6, 1.0)


def masked_rate(uniforms: Tensor, law: str, total: float = 2.0, min_rate: float = 0.0) -> Tensor:
    """Masked shares of training, r = gamma(u).

    cosine gives Muse's r = cos(pi u / 2), density 2/(pi sqrt(1 - r^2)), mean 2/pi; arccos gives the
    other law in use (1d-tokenizer, Halton-MaskGIT) with the same mean.

    Args:
        uniforms: [B] in [0, 1).
        law: name of the schedule.
        total: tokens of a picture.
        min_rate: least share.

    Returns:
        [B] in [min_rate, 1].
    """
    return mask_ratio(law, uniforms, total).clamp(min=min_rate)


def masked_number(rates: Tensor, total: int) -> Tensor:
    """Tokens to mask, max(1, round(r N)) with halves to the even side: rates [B] -> [B] int64."""
    return (rates * total).round().clamp(min=1).long()


def scattered_mask(number: Tensor, uniforms: Tensor) -> Tensor:
    """Mask `number` places at random: token j is masked where argsort(u)_j < number.

    The argsort itself is compared, not its inverse (open-muse: training/train_muse.py).

    Args:
        number: [B] int64.
        uniforms: [B, h, w] in [0, 1).

    Returns:
        [B, h, w] bool, True = masked.
    """
    places = uniforms.flatten(1).argsort(dim=1, stable=True)
    return (places < number[:, None]).view(uniforms.shape)


def rectangle_mask(number: Tensor, grid: tuple[int, int], uniforms: Tensor) -> Tensor:
    """Mask a rectangle of about `number` tokens, as training for inpainting does (aMUSEd-512).

    Its height is uniform among those with which a rectangle of that many tokens fits the grid, its
    width rounds the area up, its place is uniform.

    Args:
        number: [B] int64, 1 to h w.
        grid: h and w.
        uniforms: [B, 3] in [0, 1).

    Returns:
        [B, h, w] bool, True = masked.
    """
    h, w = grid
    lowest = (number + w - 1) // w
    highest = number.clamp(max=h)
    height = lowest + (uniforms[:, 0] * (highest - lowest + 1)).long()
    width = (number + height - 1) // height
    top = (uniforms[:, 1] * (h - height + 1)).long()
    left = (uniforms[:, 2] * (w - width + 1)).long()
    rows = torch.arange(h, device=number.device)
    columns = torch.arange(w, device=number.device)
    inside_rows = (rows >= top[:, None]) & (rows < (top + height)[:, None])  # [B, h]
    inside_columns = (columns >= left[:, None]) & (columns < (left + width)[:, None])  # [B, w]
    return inside_rows[:, :, None] & inside_columns[:, None, :]


def loss_weight(mask: Tensor, rates: Tensor, visible: float = 0.0, rises: bool = False) -> Tensor:
    """Loss weight of every token: 1 where masked; elsewhere `visible`.

    With `rises` it is 1 - (1 - r)(1 - visible) there, which reaches 1 at r = 1 (open-muse's
    predict_all_tokens has visible = 0.3; 1d-tokenizer a constant 0.1; Halton-MaskGIT 1).

    Args:
        mask: [B, ...] bool, True = masked.
        rates: [B] masked share r.
        visible: weight of a visible token (at r = 0).
        rises: whether it rises with r.

    Returns:
        [B, ...] float.
    """
    shape = (-1, *[1] * (mask.dim() - 1))
    elsewhere = torch.full_like(rates, visible)
    if rises:
        elsewhere = 1 - (1 - rates) * (1 - visible)
    return torch.where(mask, torch.ones_like(rates).view(shape), elsewhere.view(shape))


def masked_loss(ce: Tensor, weight: Tensor, reduction: str = "tokens") -> Tensor:
    """Weighted mean of the token losses.

    Args:
        ce: [B, N] cross entropy of every token (any number where the weight is 0).
        weight: [B, N].
        reduction: tokens, over all tokens of the batch (the torch references); samples, over those
            of a sample and then over the samples (MaskGIT: libml/losses.py).

    Returns:
        Scalar.
    """
    if reduction == "tokens":
        return (ce * weight).sum() / weight.sum()
    return ((ce * weight).sum(1) / weight.sum(1)).mean()


def critic_loss(scores: Tensor, real: Tensor) -> Tensor:
    """Binary cross entropy of a Token-Critic: is this token the picture's own?

    A sampled token that happens to be right counts as real (lucidrains; the paper's label is the
    mask).

    Args:
        scores: [B, h, w] logits of "real".
        real: [B, h, w] bool.

    Returns:
        Scalar.
    """
    return F.binary_cross_entropy_with_logits(scores, real.to(scores.dtype))


def mask_counts(
    unknown: Tensor,
    steps: int,
    schedule: str = "cosine",
    counting: Counting = "maskgit",
    *,
    first_step: int = 0,
    total: Tensor | int | None = None,
    share: float = 1.0,
) -> Tensor:
    """Tokens that are still masked after each step, per picture.

    With gamma the schedule, N the tokens it runs over, U those masked before step s, T steps:

    - maskgit: max(1, min(U - 1, floor(N gamma((s+1)/T)))). Where a steep schedule or a small N
      reaches 1 early, the last token is drawn and masked again until the end.
    - strict: the same, but at least as many as steps are left, so that every step opens a token
      while one is masked; N < T tokens are done in N steps.
    - halton: N - max(s + 1, floor(N (1 - gamma((s+1)/T)))), which counts the known ones.
    - halton_confidence: the same with gamma(s/(T-1)).
    - lucidrains: max(1, floor(N gamma((s+1)/(T-1)))): the ratio is 1 at the last step but one.

    Nothing is masked after the last step.

    Args:
        unknown: [B] int64 tokens masked at the start.
        steps: T.
        schedule: share that is masked.
        counting: one of the rules above.
        first_step: the loop begins with this step.
        total: N where it is not `unknown`.
        share: factor of gamma (AmusedScheduler's starting_mask_ratio).

    Returns:
        [steps - first_step, B] int64, falling.
    """
    whole = unknown if total is None else torch.as_tensor(total).expand(unknown.shape)
    number = whole.to(torch.float32)

    def ratio(numerator: int, denominator: int) -> Tensor:
        r = torch.tensor(min(numerator, denominator), dtype=torch.float32) / max(denominator, 1)
        return share * mask_ratio(schedule, r.to(unknown.device), number)

    left, counts = unknown, []
    for step in range(first_step, steps):
        if step == steps - 1:
            after = torch.zeros_like(left)
        elif counting in ("halton", "halton_confidence"):
            now = (step, steps - 1) if counting == "halton_confidence" else (step + 1, steps)
            known = ((1 - ratio(*now)) * number).floor().long().clamp(min=step + 1)
            after = torch.minimum(left, whole - known).clamp(min=0)
        elif counting == "lucidrains":
            after = (number * ratio(step + 1, steps - 1)).floor().long().clamp(min=1)
            after = torch.minimum(left, after)
        else:
            after = (number * ratio(step + 1, steps)).floor().long()
            if counting == "strict":
                after = after.clamp(min=steps - 1 - step)
                after = torch.minimum(left - 1, after).clamp(min=0)
            else:
                after = torch.minimum(left - 1, after).clamp(min=1)
                after = torch.minimum(left, after)  # a picture without masks gets none
        counts.append(after)
        left = after
    return torch.stack(counts)


def choice_temperatures(config: DecodeConfig) -> list[float]:
    """Factors of the Gumbel noise on the confidence, one per step; laws as `DecodeConfig` says."""
    steps, start, end = config.steps, config.choice_temperature, config.choice_end
    if config.choice_law == "linspace":
        return torch.linspace(start, end, steps).tolist()
    left = [1 - (s + 1) / steps for s in range(steps)]
    if config.choice_law == "ratio":
        return [end + (start - end) * share for share in left]
    return [start * math.prod(left[: s + 1]) for s in range(steps)]


def guidance_of(config: DecodeConfig) -> Guidance:
    """Guidance u + s (c - u); laws as `DecodeConfig` says."""
    c = config
    return Guidance(
        c.guidance_start,
        c.guidance_end,
        c.guidance_law,
        c.guidance_power,
        c.guidance_first,
        c.guidance_last,
        c.guidance_normalised,
    )


def guidance_scales(config: DecodeConfig) -> list[float]:
    """Guidance scales, one per step."""
    return guidance_of(config).scales(config.steps)


def noise_of(config: DecodeConfig, codes: int) -> Absorbing:
    """The noise that the schedule undoes, with time 1 - r."""

    def masked(time: Tensor) -> Tensor:
        share = mask_ratio(config.schedule, (1 - time).float(), codes)
        return torch.where(time > 0, share, torch.zeros_like(share))

    return Absorbing(codes, masked)


def loop_settings(config: DecodeConfig, unknown: Tensor) -> dict[str, Any]:
    """The settings as keywords of `decode`.

    Args:
        config: the settings.
        unknown: [B] int64 tokens that are masked at the start.
    """
    first = config.first_step
    choice = choice_temperatures(config)
    heat = torch.linspace(config.temperature_start, config.temperature_end, config.steps).tolist()
    return {
        "counts": mask_counts(
            unknown, config.steps, config.schedule, config.counting, first_step=first
        ),
        "choice_temperature": choice[first:],
        "temperature": (choice if config.tie_temperatures else heat)[first:],
        "weights": guidance_scales(config)[first:],
        "order": config.order,
        "confidence": config.confidence,
        "frozen": config.frozen,
        "top_k": config.top_k,
    }


def sample_noise(seeds: Sequence[int], steps: int, grid: tuple[int, int]) -> dict[str, Tensor]:
    """All randomness of `decode`. Image i depends on seeds[i] only, never on the batch it is in.

    Args:
        seeds: one per image.
        steps: steps that the loop makes (T).
        grid: height and width in tokens.

    Returns:
        draws [T, B, h, w] uniform in [0, 1) and choice_noise [T, B, h, w] Gumbel, on the CPU.
    """
    draws, noise = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        draws.append(torch.rand(steps, *grid, generator=generator))
        noise.append(gumbel(torch.rand(steps, *grid, generator=generator)))
    return {"draws": torch.stack(draws, dim=1), "choice_noise": torch.stack(noise, dim=1)}


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of each row [n, K]; the others become -inf."""
    kept = logits.topk(min(k, logits.shape[1]), dim=1)
    return torch.full_like(logits, -torch.inf).scatter(1, kept.indices, kept.values)


def confidence_of(
    logits: Tensor, tokens: Tensor, kind: Confidence, temperature: float | Tensor
) -> Tensor:
    """How sure the network is of tokens: logits [n, K], tokens [n] -> [n].

    logp: log softmax(logits)[token]; tempered: that of logits / temperature; logit: the logit.
    """
    chosen = logits.gather(1, tokens[:, None]).squeeze(1)
    if kind == "logit":
        return chosen
    scale: float | Tensor = 1.0
    if kind == "tempered" and (isinstance(temperature, Tensor) or temperature > 0):
        scale = 1 / temperature
    # few rows at a time, which stay in a core's cache
    parts = pieces(logits, DRAWN_AT_ONCE)
    totals = [(part if equals(scale, 1) else part * scale).logsumexp(1) for part in parts]
    return chosen * scale - torch.cat(totals)


def decode(
    predict: Predict,
    head: Head,
    *,
    start: Tensor,
    mask_id: int,
    counts: Tensor,
    draws: Tensor,
    choice_noise: Tensor | None = None,
    choice_temperature: float | Sequence[float] = 0.0,
    weights: float | Sequence[float] = 1.0,
    temperature: float | Sequence[float] = 1.0,
    order: Order = "confidence",
    confidence: Confidence = "logp",
    frozen: bool = True,
    top_k: int | None = None,
    ranks: Tensor | None = None,
    critic: Callable[[Tensor], Tensor] | None = None,
    draw: Callable[..., Tensor] = draw_rows,
    places: Picked | None = None,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
    on_scores: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Parallel decoding (section 2.8; MaskGIT: libml/parallel_decode.py).

    Every step draws the masked tokens and masks the `counts` worst of them again. Where the order
    does not depend on what is drawn (random, halton), only the tokens that open are predicted.
    Tokens that are known at the start never change.

    Args:
        predict: (x [B, h, w], guidance scale, keep [B, h, w] bool or None for all) -> rows
            [keep.sum(), C].
        head: [m, C] -> logits [m, K].
        start: [B, h, w] int64, `mask_id` where a token is to be generated.
        mask_id: id of the mask.
        counts: [T, B] int64 tokens masked after each step, from `mask_counts`.
        draws: [T, B, h, w] in [0, 1) for `draw`.
        choice_noise: [T, B, h, w] noise on the scores; the score itself with order random.
        choice_temperature: its factor, one or per step.
        weights: guidance scale, one or per step; 1 is none.
        temperature: of the token draw, one or per step; 0 takes the likeliest.
        order: confidence, random, halton (lowest of `ranks` first) or critic.
        confidence: what `confidence_of` makes of a drawn token.
        frozen: tokens that were opened stay; else all generated ones are scored in every step.
        top_k: draw among so many of the likeliest codes.
        ranks: [B, h, w] for order halton.
        critic: (tokens [B, h, w] without masks) -> scores [B, h, w] for order critic.
        draw: like `draw_rows`; receives logits as rows, draws[i][keep] and the identity as head.
        places: how places are computed.
        on_step: called with the step's number, its input and its result [B, h, w].
        on_scores: called with the step's number, the tokens before masking and their scores
            [B, h, w] (inf where they cannot be masked); not where the order was planned.

    Returns:
        [B, h, w] int64, no mask left where counts end with 0.

    Raises:
        ValueError: an order misses the tensor or function that it needs.
    """
    if order == "halton" and ranks is None:
        raise ValueError("order halton needs ranks")
    if order == "random" and choice_noise is None:
        raise ValueError("order random needs choice_noise")
    if order == "critic" and critic is None:
        raise ValueError(
            "order critic needs a Token-Critic; this checkpoint was trained without one "
            "(critic.layers=0)"
        )
    places, steps = places or Picked(), len(counts)
    weights = [weights] * steps if isinstance(weights, int | float) else weights
    heats = [temperature] * steps if isinstance(temperature, int | float) else temperature
    if isinstance(choice_temperature, int | float):
        choice_temperature = [choice_temperature] * steps
    # a scale of 1 or 0 asks one condition alone, a temperature of 0 draws nothing
    scales = places.numbers([float(weight) for weight in weights], plain=(0.0, 1.0))
    warmth = places.numbers([float(heat) for heat in heats], plain=(0.0,))
    choices = places.numbers([float(choice) for choice in choice_temperature])
    generate = start == mask_id
    planned = order in ("random", "halton")
    again = not frozen and order == "confidence"  # visible tokens are scored too
    x = start

    def step(
        x: Tensor,
        count: Tensor,
        chances: Tensor,
        noise: Tensor | None,
        scale: Any,
        heat: Any,
        choice: Any,
        scored: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        masked = x == mask_id
        opened = masked
        if planned:
            plan = -ranks.float() if ranks is not None and order == "halton" else noise
            assert plan is not None
            opened = masked & ~lowest(plan, masked, count)
        if not places.any(opened):
            return x, x, None
        keep = generate if again else opened
        rows = predict(x, scale, places.keep(keep))  # [n, C]
        tokens, sure = draw_tokens(
            places.among(rows, keep, opened) if again else rows,
            places.pick(chances, opened),
            head,
            draw,
            temperature=heat,
            top_k=top_k,
            confidence=confidence if scored and order == "confidence" else None,
            likeliest=places.likeliest,
        )
        drawn = places.put(x, opened, tokens)
        if not scored:
            return drawn, drawn, None
        candidates = opened if frozen else generate
        if order == "critic":
            assert critic is not None
            scores = critic(drawn).masked_fill(~candidates, torch.inf)
        else:
            unable = torch.full(x.shape, torch.inf, device=x.device)
            scores = places.put(unable, opened, sure)
            if again:
                old = keep & ~opened
                known = places.among(rows, keep, old), places.pick(x, old)
                scores = places.put(scores, old, _score(*known, head, confidence, heat))
        if noise is not None:
            scores = scores + choice * noise
        return drawn.masked_fill(lowest(scores, candidates, count), mask_id), drawn, scores

    made = places.step(step)
    for i in range(steps):
        scored = not planned and (on_scores is not None or places.any(counts[i]))
        noise = None if choice_noise is None else choice_noise[i]
        own = (scales[i], warmth[i], choices[i])
        out, drawn, scores = made(x, counts[i], draws[i], noise, *own, scored)
        if on_scores is not None and scores is not None:
            on_scores(i, drawn, scores)
        if on_step is not None:
            on_step(i, x, out)
        x = out
    places.check()
    return x


def draw_tokens(
    rows: Tensor,
    chances: Tensor,
    head: Head,
    draw: Callable[..., Tensor],
    *,
    temperature: float | Tensor,
    top_k: int | None,
    confidence: Confidence | None = None,
    likeliest: Callable[[Tensor], Tensor] = likeliest,
    chunk: int = 256,
) -> tuple[Tensor, Tensor]:
    """Draw a token per row, `chunk` rows at a time, and say how sure it is.

    Args:
        rows: [n, C].
        chances: [n] in [0, 1) for `draw`.
        head: [m, C] -> logits [m, K].
        draw: like `draw_rows`.
        temperature: of the draw; 0 takes the likeliest.
        top_k: draw among so many of the likeliest codes.
        confidence: what `confidence_of` gives; None gives nothing.
        likeliest: takes the likeliest token per row of logits.
        chunk: rows that pass the head at once on a CPU.

    Returns:
        Tokens [n] int64, and their confidence [n] or [0].
    """

    def narrowed(logits: Tensor) -> Tensor:
        return logits if top_k is None else top_k_filter(logits, top_k)

    tokens, sure = [], []
    for part, chance in zip(pieces(rows, chunk), pieces(chances, chunk), strict=True):
        logits = head(part)  # [m, K]
        if isinstance(temperature, Tensor) or temperature > 0:
            token = draw(
                logits,
                chance,
                _identity,
                temperature=temperature,
                logits_filter=None if top_k is None else narrowed,
            )
        else:
            token = likeliest(logits)
        tokens.append(token)
        if confidence is not None:
            sure.append(confidence_of(logits, token, confidence, temperature))
    return torch.cat(tokens), torch.cat(sure) if sure else rows.new_empty(0)


def _score(
    rows: Tensor,
    tokens: Tensor,
    head: Head,
    kind: Confidence,
    temperature: float | Tensor,
    chunk: int = 256,
) -> Tensor:
    """Confidence of given tokens [n], `chunk` rows at a time; that of a mask is any number."""
    pairs = zip(pieces(rows, chunk), pieces(tokens, chunk), strict=True)
    parts = []
    for part, token in pairs:
        logits = head(part)
        known = token.clamp(max=logits.shape[1] - 1)
        parts.append(confidence_of(logits, known, kind, temperature))
    return torch.cat(parts) if parts else rows.new_empty(0)


def _identity(logits: Tensor) -> Tensor:
    return logits
