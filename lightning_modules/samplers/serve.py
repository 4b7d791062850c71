"""A sampler by its settings, served by a paper's network: guidance, temperature, grid and seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_modules.common.guidance import Guidance, mixed_rows, ratio
from lightning_modules.common.request import OnCall, OnStep, seeded_uniforms
from lightning_modules.samplers.entropy_bound import EntropyBound, EntropyBoundUniform
from lightning_modules.samplers.flow import Flow
from lightning_modules.samplers.gidd import SelfCorrection
from lightning_modules.samplers.kernel import Corruption
from lightning_modules.samplers.klass import KLASS
from lightning_modules.samplers.loop import Chances, Rows, Sampled, Sampler, run
from lightning_modules.samplers.ordered import Halton, Ordered, halton_ranks
from lightning_modules.samplers.planning import PathPlanning
from lightning_modules.samplers.posterior import Gibbs, Posterior
from lightning_modules.samplers.remdm import ReMDM
from lightning_modules.samplers.renoise import Renoise
from lightning_modules.samplers.settings import NEEDS, SamplerConfig

START = 7  # stream of the seeds for the noise that a loop begins with
Features = Callable[[Tensor, Tensor, Tensor, float, Tensor], Tensor]
"""(pictures [n] int64, x [n, h, w], time [n], guidance scale, keep [n, h, w] bool) -> features
[keep.sum(), C] of some pictures of a request; scale 1 asks the condition alone, 0 the null."""
Critic = Callable[[Tensor, Tensor], Tensor]
"""(pictures [n] int64, tokens [n, h, w]) -> logits of "real" [n, h, w]."""


@dataclass(frozen=True)
class Network:
    """A paper's network under the conditions of a request."""

    features: Features
    head: Callable[[Tensor], Tensor]
    """[m, C] -> logits [m, K]."""
    kernel: Corruption
    """What training did to tokens."""
    guidance: Guidance
    temperature: tuple[float, float] = (1.0, 1.0)
    """At the first step and at the last, at least 0; linear in between."""
    narrow: Callable[[Tensor], Tensor] | None = None
    """logits [m, K] -> the same with excluded codes at -inf."""
    critic: Critic | None = None


def make(
    config: SamplerConfig,
    kernel: Corruption,
    steps: int,
    grid: tuple[int, int],
    seeds: Sequence[int],
    critic: Critic | None = None,
    normalised: bool = True,
) -> Sampler:
    """Make the sampler that the settings name."""
    name = config.name
    family, _, rest = name.partition("_")
    if name == "eb":
        kind = EntropyBound if kernel.masks else EntropyBoundUniform
        return kind(kernel, config.gamma, config.limit)
    if name == "klass":
        return KLASS(kernel, steps, config.kl, config.sure)
    if family in ("remdm", "mdlm"):
        rule: Any = rest or "none"
        return ReMDM(kernel, steps, rule, config.rate)
    if name == "posterior":
        return Posterior(kernel, steps, normalised)
    if name == "gibbs":
        count = 1 if config.corrections is None else config.corrections
        return Gibbs(kernel, steps, corrections=count, places=config.places, tau=config.choice_heat)
    if name == "gidd":
        count = 128 if config.corrections is None else config.corrections
        return SelfCorrection(kernel, steps, corrections=count, places=config.places)
    if name == "flow":
        return Flow(kernel, steps, config.divergence_free, config.divergence_law)
    if family == "renoise":
        mode: Any = rest
        return Renoise(kernel, steps, mode)
    judge = _flat(critic, grid) if NEEDS[name].critic else None
    if family == "p2":
        return PathPlanning(kernel, steps, config.rate, judge)
    if name == "halton":
        return Halton(kernel, steps, ranks=halton_ranks(grid, seeds, config.roll).flatten(1))
    return Ordered(kernel, steps, name, config.choice, judge)


def sample(
    config: SamplerConfig,
    network: Network,
    *,
    seeds: Sequence[int],
    steps: int,
    given: Tensor | None,
    generate: Tensor,
    first: int = 0,
    on_step: OnStep | None = None,
    on_call: OnCall | None = None,
) -> Sampled:
    """Draw tokens [B, h, w] for B seeds, and count the network calls of each picture.

    Args:
        config: names the sampler.
        network: answers it.
        seeds: one per picture; all its randomness.
        steps: steps of the samplers that have a number of them.
        given: [B, h, w] int64 known tokens; None where everything is generated. With `first` above
            0 the loop begins with these, noised to the time of that step.
        generate: [B, h, w] bool.
        first: number of the first step.
        on_step: called with the step's number, its input and its result [B, h, w].
        on_call: called with every network call.
    """
    grid, kernel, device = generate.shape[1:], network.kernel, generate.device
    places = (grid[0], grid[1])
    uniforms = seeded_uniforms(seeds, (2, *grid), START).movedim(0, 1).to(device)  # [2, B, h, w]
    masked = NEEDS[config.name].masks or (config.name == "eb" and kernel.masks)
    if given is not None and first > 0:
        noise = kernel.noised(given, 1 - first / steps, uniforms)
    elif masked:
        noise = torch.full(generate.shape, kernel.codes, device=device)
    else:
        noise = kernel.noise(uniforms)
    start = noise if given is None else torch.where(generate, noise, given)
    normalised = network.guidance.normalised
    sampler = make(config, kernel, steps, places, seeds, network.critic, normalised)

    def predict(pictures: Tensor, x: Tensor, time: Tensor, done: Tensor, keep: Tensor) -> Rows:
        tokens, kept = x.unflatten(1, places), keep.unflatten(1, places)

        def ask(scale: float, some: Tensor) -> Tensor:
            return network.features(pictures[some], tokens[some], time[some], scale, kept[some])

        scales, of = network.guidance.at(done, sampler.pace), keep.nonzero()[:, 0]
        rows = mixed_rows(ask, scales, keep)
        if on_call is not None:
            on_call(pictures, kept, rows)
        first_heat, last_heat = network.temperature
        heat = first_heat + (last_heat - first_heat) * ratio(done, sampler.pace, ends=True).to(done)
        mass = None
        if not network.guidance.normalised:
            everyone = torch.arange(len(x), device=x.device)
            sides = (ask(1.0, everyone), ask(0.0, everyone))
            mass = guided_mass(network.head, rows, *sides, scales[of])
        return Rows(rows, network.head, heat[of], network.narrow, mass)

    shown: OnStep | None = None
    if on_step is not None:

        def shown(i: int, before: Tensor, after: Tensor) -> None:
            on_step(i, before.unflatten(1, places), after.unflatten(1, places))

    chances = Chances(seeds, grid.numel(), device)
    flat = (start.flatten(1), generate.flatten(1))
    found = run(sampler, predict, *flat, chances, first=first, on_step=shown)
    return Sampled(found.tokens.view(start.shape), found.calls)


def guided_mass(
    head: Callable[[Tensor], Tensor], mixed: Tensor, own: Tensor, null: Tensor, scales: Tensor
) -> Tensor:
    """Z = sum_k own(k)^w null(k)^(1 - w) of every row: [n].

    With the mixed logits w l + (1 - w) l' this is log Z = lse(mixed) - w lse(l) - (1 - w) lse(l').

    Args:
        head: [m, C] -> logits [m, K].
        mixed: [n, C] guided features.
        own: [n, C] features under the condition.
        null: [n, C] features without.
        scales: [n] w.
    """
    flat = torch.zeros_like(scales) + 1
    guided, with_it, without = (
        Rows(rows, head, flat).map(lambda logits: (logits.logsumexp(1),))[0]
        for rows in (mixed, own, null)
    )
    weight = scales.to(guided)
    return (guided - weight * with_it - (1 - weight) * without).exp()


def _flat(critic: Critic | None, grid: tuple[int, int]) -> Critic | None:
    """The same for tokens in one row per picture."""
    if critic is None:
        return None
    return lambda pictures, x: critic(pictures, x.unflatten(1, grid)).flatten(1)


class Conditions:
    """Prepared conditions of B pictures, of which a loop asks for those still in it.

    Args:
        conditions: each with `take(pictures)`, or a tensor [B or 1, ...].
        batch: B.
    """

    def __init__(self, conditions: Sequence[Any], batch: int) -> None:
        self.conditions, self.batch = list(conditions), batch
        self._latest: tuple[tuple[int, ...], list[Any]] = ((), [])

    def __call__(self, pictures: Tensor | None) -> list[Any]:
        """Return the conditions of some pictures [n], in order; None are all."""
        if pictures is None or len(pictures) == self.batch:
            return self.conditions
        key = tuple(pictures.tolist())
        if key != self._latest[0]:
            self._latest = key, [taken(c, pictures) for c in self.conditions]
        return self._latest[1]


def taken(condition: Any, pictures: Tensor) -> Any:
    """Return a condition of some pictures; one that serves all pictures stays."""
    if isinstance(condition, Tensor):
        return condition if len(condition) == 1 else condition[pictures]
    return condition.take(pictures)
