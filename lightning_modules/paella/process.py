"""Paella's mathematics: noising, loss and the sampling loop. Tensors in, tensors out.

Sources: arXiv 2211.07292; dome272/Paella (v3: src_distributed, v1: the code of 2022).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.common.categorical import draw_rows, pieces
from lightning_modules.common.guidance import Guidance
from lightning_modules.common.places import Picked
from lightning_modules.paella.config import DrawMode, RenoiseMode, SamplingConfig, TimeLaw


def noise_rate(uniforms: Tensor, law: TimeLaw) -> Tensor:
    """Noise rates t of training.

    simple: 1 - u. released: (1 - u) + 0.001, wuerstchen: 1.08 (1 - u) + 0.001, both clamped to
    [0.001, 1]; the last gives 7.5 % of the samples the full noise that sampling starts from.

    Args:
        uniforms: [B] in [0, 1).
        law: name of the law.

    Returns:
        [B] in (0, 1].
    """
    if law == "simple":
        return 1 - uniforms
    scale = 1.08 if law == "wuerstchen" else 1.0
    return ((1 - uniforms) * scale + 0.001).clamp(0.001, 1.0)


def cosine_rate(r: Tensor) -> Tensor:
    """Replacement probability gamma(r) = cos(r pi / 2) of v1, whose time r = 0 is full noise."""
    return torch.cos(r * math.pi / 2)


def add_noise(
    tokens: Tensor, t: Tensor, uniforms: Tensor, random_tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Replace each token by a random one with probability t. There is no mask token.

    Args:
        tokens: [B, h, w] int64.
        t: [B] replacement probability in [0, 1].
        uniforms: [B, h, w] in [0, 1).
        random_tokens: [B, h, w] int64 replacements; one may equal the token it replaces.

    Returns:
        The noised tokens and the mask (True = replaced), both [B, h, w].
    """
    mask = uniforms <= t[:, None, None]
    return torch.where(mask, random_tokens, tokens), mask


def loss_weight(mask: Tensor, t: Tensor, eta: float) -> Tensor:
    """Weight 1 - (1 - mask)(1 - t)(1 - eta): 1 for replaced tokens, less for untouched ones.

    Args:
        mask: [B, h, w] bool, True = replaced.
        t: [B] noise rate in [0, 1].
        eta: weight of an untouched token at t = 0.

    Returns:
        [B, h, w] in [eta, 1].
    """
    return 1 - (~mask).to(t.dtype) * ((1 - t) * (1 - eta))[:, None, None]


def token_loss(logits: Tensor, tokens: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of every token.

    Args:
        logits: [B, K, h, w].
        tokens: [B, h, w] int64 clean tokens.
        label_smoothing: share of the target that is spread over all labels.

    Returns:
        [B, h, w].
    """
    rows = logits.permute(0, 2, 3, 1).flatten(0, 2)  # [B h w, K]
    ce = F.cross_entropy(rows, tokens.flatten(), reduction="none", label_smoothing=label_smoothing)
    return ce.view(tokens.shape)


def sample_loss(ce: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of the token losses [B, h, w] over the tokens of each sample: [B].

    The training loss is its mean over the batch.
    """
    return (ce * weight).sum((1, 2)) / weight.sum((1, 2))


def typical_filter(logits: Tensor, mass: float, min_tokens: int = 1) -> Tensor:
    """Locally typical filtering (arXiv 2202.00666), with the boundary rule of Paella v1.

    Labels are sorted by |-log p - H|, H the entropy; the first ones whose probabilities sum up to
    `mass` stay, the one that crosses it included.

    Args:
        logits: [n, K] at temperature 1.
        mass: probability mass in (0, 1].
        min_tokens: so many labels stay in any case.

    Returns:
        [n, K], dropped labels at -inf.
    """
    logp = logits.log_softmax(dim=1)
    p = logp.exp()
    entropy = -(logp * p).nansum(dim=1, keepdim=True)
    ranked, order = (-logp - entropy).abs().sort(dim=1)
    below = (p.gather(1, order).cumsum(dim=1) < mass).sum(dim=1, keepdim=True)
    drop = ranked > ranked.gather(1, below.clamp(max=logits.shape[1] - 1))
    if min_tokens > 1:
        drop[:, :min_tokens] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)


def _grid(config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Times and replacement probabilities at the borders of all steps, both [steps + 1]."""
    if config.schedule == "linear":
        times = torch.linspace(config.t_start, config.t_end, config.steps + 1)
        return times, times
    times = torch.linspace(1 - config.t_start, 1 - config.t_end, config.steps + 1)
    return times, cosine_rate(times)


def start_rate(config: SamplingConfig) -> Tensor:
    """Replacement probability (scalar) of the tokens that the first step made is told to see."""
    return _grid(config)[1][config.first_step]


def guidance_of(config: SamplingConfig) -> Guidance:
    """Guidance of the settings, linear from the first step to the last."""
    c = config
    first, last = c.guidance_first, c.guidance_last
    return Guidance(c.guidance_start, c.guidance_end, first=first, last=last)


def loop_settings(config: SamplingConfig) -> dict[str, Any]:
    """The settings as keywords of `sample`: schedules per step and the loop's constants.

    linear (v3): t_i = linspace(t_start, t_end, steps + 1), renoise probability t_{i+1}.
    cosine (v1): r_i = linspace(1 - t_start, 1 - t_end, steps + 1), probability cos(r_{i+1} pi/2).
    """
    c, first = config, config.first_step
    times, probability = _grid(c)
    weights = guidance_of(c).scales(c.steps)
    temperature = torch.linspace(c.temperature_start, c.temperature_end, c.steps)
    renoise_steps = c.steps - 1 if c.renoise_steps is None else c.renoise_steps
    guided_steps = c.steps if c.guided_steps is None else c.guided_steps
    return {
        "times": times[first:-1],
        "renoise_probability": probability[first + 1 :],
        "weights": weights[first:],
        "temperature": temperature[first:].tolist(),
        "renoise_steps": max(renoise_steps - first, 0),
        "guided_steps": max(guided_steps - first, 0),
        "quant_steps": max((c.quant_steps or 0) - first, 0),
        "renoise_mode": c.renoise_mode,
        "mode": c.mode,
        "typical_mass": c.typical_mass,
        "typical_min_tokens": c.typical_min_tokens,
    }


def sample_noise(
    seeds: Sequence[int],
    steps: int,
    renoise_steps: int,
    grid: tuple[int, int],
    num_codes: int,
    *,
    random_tokens: bool = False,
) -> dict[str, Any]:
    """All randomness of `sample`. Image i depends on seeds[i] only, never on the batch it is in.

    Args:
        seeds: one per image.
        steps: steps that the loop makes (T).
        renoise_steps: how many of them are followed by renoising (R).
        grid: height and width in tokens.
        num_codes: tokens are 0..num_codes-1.
        random_tokens: also draw the fresh tokens of renoise mode rand.

    Returns:
        init_noise [B, h, w], uniform_renoise [R, B, h, w], draws [T, B, h, w] and, if asked for,
        random_tokens [R, B, h, w], on the CPU.
    """
    images: list[dict[str, Tensor]] = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        noise = {
            "init_noise": torch.randint(num_codes, grid, generator=generator),
            "draws": torch.rand(steps, *grid, generator=generator),
            "uniform_renoise": torch.rand(renoise_steps, *grid, generator=generator),
        }
        if random_tokens:
            shape = (renoise_steps, *grid)
            noise["random_tokens"] = torch.randint(num_codes, shape, generator=generator)
        images.append(noise)
    return {name: torch.stack([n[name] for n in images], dim=-3) for name in images[0]}


def sample(
    predict: Callable[..., Tensor],
    head: Callable[[Tensor], Tensor],
    *,
    init_noise: Tensor,
    uniform_renoise: Tensor,
    draws: Tensor | None,
    times: Tensor,
    renoise_probability: Tensor,
    weights: float | Sequence[float] = 1.0,
    temperature: float | Sequence[float] = 1.0,
    renoise_steps: int,
    guided_steps: int | None = None,
    renoise_mode: RenoiseMode = "start",
    mode: DrawMode = "multinomial",
    quant_steps: int = 0,
    typical_mass: float | None = None,
    typical_min_tokens: int = 1,
    mask: Tensor | None = None,
    start: Tensor | None = None,
    random_tokens: Tensor | None = None,
    codebook: Tensor | None = None,
    draw: Callable[..., Tensor] = draw_rows,
    places: Picked | None = None,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Sampling loop of v1 and v3 (Algorithm 1 of arXiv 2211.07292v2; they differ in the schedules).

    Every step predicts all tokens, draws them and puts noise back with the next step's rate. Which
    tokens get noise does not depend on the draw, so it is decided first: tokens about to be
    replaced, and known ones, are neither put through the output table nor drawn.

    Args:
        predict: (x [B, h, w], t [B], guidance weight, keep [B, h, w] bool or None for all) ->
            [keep.sum(), C].
        head: [m, C] -> logits [m, K].
        init_noise: [B, h, w] int64 random tokens, also those of renoise mode start.
        uniform_renoise: [>= renoise_steps, B, h, w] in [0, 1).
        draws: [T, B, h, w] in [0, 1) for `draw`; None with mode argmax, or quant from step 0 on.
        times: [T] what the network is told: t (v3) or r (v1).
        renoise_probability: [T] share of tokens replaced after each step.
        weights: guidance weight, one or per step; 1 is none.
        temperature: one or per step, above 0.
        renoise_steps: renoise after each of the first steps.
        guided_steps: guide only the first steps; None guides all.
        renoise_mode: replace by init_noise (start), the step's input (prev) or random_tokens.
        mode: draw; argmax; or quant, the code nearest to the mean code.
        quant_steps: with mode quant, draw before this step.
        typical_mass: mass of `typical_filter`; None is no filter.
        typical_min_tokens: labels that the filter always leaves.
        mask: [B, h, w], 1 = generate, 0 = keep the token of `start`; None generates all.
        start: [B, h, w] int64 tokens to start from; None starts from init_noise.
        random_tokens: [>= renoise_steps, B, h, w] int64 for renoise mode rand.
        codebook: [K, c] for mode quant.
        draw: like `draw_rows`; receives draws[i][keep].
        places: how places are computed.
        on_step: called with the step's number, its input and its result [B, h, w].

    Returns:
        [B, h, w] int64.

    Raises:
        ValueError: if a mode misses the tensor that it needs.
    """
    if mask is not None and start is None:
        raise ValueError("an inpainting mask needs the given tokens (start)")
    if renoise_mode == "rand" and renoise_steps > 0 and random_tokens is None:
        raise ValueError("renoise_mode rand needs random_tokens")
    if mode == "quant" and codebook is None:
        raise ValueError("mode quant needs the tokenizer's codebook")
    if draws is None and (mode == "multinomial" or (mode == "quant" and quant_steps > 0)):
        raise ValueError(f"mode {mode} needs draws")
    places, steps = places or Picked(), len(times)
    weights = [weights] * steps if isinstance(weights, int | float) else weights
    temperature = [temperature] * steps if isinstance(temperature, int | float) else temperature
    guided = steps if guided_steps is None else guided_steps
    scales = [float(weight) if i < guided else 1.0 for i, weight in enumerate(weights)]
    # a weight of 1 or 0 asks one condition alone
    scales = places.numbers(scales, plain=(0.0, 1.0))
    heats = places.numbers([float(heat) for heat in temperature])
    times, rates = times.to(init_noise.device), renoise_probability.to(init_noise.device)

    def logits_filter(logits: Tensor) -> Tensor:
        assert typical_mass is not None
        return typical_filter(logits, typical_mass, typical_min_tokens)

    filtered = None if typical_mass is None else logits_filter
    generate = torch.ones_like(init_noise, dtype=torch.bool) if mask is None else mask.bool()
    if start is not None and mask is not None:
        init_noise = torch.where(generate, init_noise, start)
    x = start if start is not None and mask is None else init_noise.clone()

    def step(
        x: Tensor,
        replaced: Tensor,
        fresh: Tensor,
        chances: Tensor | None,
        t: Tensor,
        scale: Any,
        heat: Any,
    ) -> Tensor:
        keep, out = generate & ~replaced, x
        if places.any(keep):
            rows = predict(x, t.expand(x.shape[0]), scale, places.keep(keep))  # [n, C]
            if mode == "argmax":
                tokens = _choose(rows, head, filtered, places.likeliest)
            elif chances is None:
                tokens = _choose(rows, head, filtered, _nearest_mean_code(codebook, heat))
            else:
                asked = places.pick(chances, keep)
                tokens = draw(rows, asked, head, temperature=heat, logits_filter=filtered)
            out = places.put(x, keep, tokens)
        return torch.where(replaced, fresh, out)

    made = places.step(step)
    for i in range(steps):
        replaced = torch.zeros_like(generate)
        fresh = x if renoise_mode == "prev" else init_noise
        if i < renoise_steps:
            replaced = generate & (uniform_renoise[i] <= rates[i])
            if random_tokens is not None and renoise_mode == "rand":
                fresh = random_tokens[i]
        drawn = mode == "multinomial" or (mode == "quant" and i < quant_steps)
        chances = draws[i] if drawn and draws is not None else None
        out = made(x, replaced, fresh, chances, times[i], scales[i], heats[i])
        if on_step is not None:
            on_step(i, x, out)
        x = out
    places.check()
    return x


def _choose(
    rows: Tensor,
    head: Callable[[Tensor], Tensor],
    logits_filter: Callable[[Tensor], Tensor] | None,
    choose: Callable[[Tensor], Tensor],
    chunk: int = 256,
) -> Tensor:
    """A token per row without randomness, `chunk` rows at a time."""
    tokens = []
    for part in pieces(rows, chunk):
        logits = head(part)
        tokens.append(choose(logits if logits_filter is None else logits_filter(logits)))
    return torch.cat(tokens)


def _nearest_mean_code(codebook: Tensor | None, heat: float | Tensor) -> Callable[[Tensor], Tensor]:
    """Mode quant: the code nearest to the mean code under softmax(logits / temperature)."""
    assert codebook is not None
    return lambda logits: torch.cdist(
        (logits / heat).softmax(1) @ codebook, codebook, compute_mode="donot_use_mm_for_euclid_dist"
    ).argmin(1)
