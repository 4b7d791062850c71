"""The sampler of a checkpoint as settings, and which checkpoint it fits."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from lightning_modules.common.checks import at_least, require, within

Name = Literal[
    "own",
    "confidence",
    "max_p",
    "margin",
    "entropy",
    "random",
    "halton",
    "critic",
    "moment",
    "eb",
    "klass",
    "remdm_cap",
    "remdm_rescale",
    "remdm_conf",
    "remdm_loop",
    "mdlm",
    "posterior",
    "gibbs",
    "gidd",
    "p2",
    "p2_critic",
    "flow",
    "renoise_start",
    "renoise_prev",
    "renoise_rand",
]

Roll = Literal["none", "order", "grid"]


class Needs(NamedTuple):
    """What a sampler needs of a checkpoint."""

    masks: bool | None = None
    """Noise that is masks (True), that is none (False), or any."""
    replaces: bool = False
    """Noise that replaces tokens, so that a visible token may be wrong."""
    visible: bool = False
    """Whether it reads what the network says of visible tokens."""
    critic: bool = False
    """A Token-Critic."""


OPENS = Needs(masks=True)
NEEDS: dict[str, Needs] = {
    **dict.fromkeys(get_args(Name), OPENS),
    "own": Needs(),
    "eb": Needs(),
    "posterior": Needs(),
    "flow": Needs(),
    "critic": Needs(masks=True, critic=True),
    "gibbs": Needs(replaces=True, visible=True),
    "gidd": Needs(replaces=True, visible=True),
    "p2": Needs(masks=True, visible=True),
    "p2_critic": Needs(masks=True, critic=True),
    "renoise_start": Needs(masks=False),
    "renoise_prev": Needs(masks=False),
    "renoise_rand": Needs(masks=False),
}
REMASKING = {"remdm_cap": 0.02, "remdm_rescale": 0.05, "remdm_loop": 0.02, "p2": 1.0}


@dataclass
class SamplerConfig:
    """Another way of sampling the same checkpoint; steps, guidance and filters stay the paper's."""

    name: Name = "own"
    """own: the paper's loop. Orders in which masks open: confidence, max_p, margin, entropy,
    random, halton, critic, moment. eb: entropy bound; klass: stable and sure. mdlm: masks open at
    random times, remdm_cap, remdm_rescale, remdm_conf, remdm_loop: and close again. posterior:
    exact, gibbs: with a corrector, gidd: with self-correction. p2, p2_critic: path planning. flow:
    discrete flow. renoise_start, renoise_prev, renoise_rand: Paella's.
    """
    temperature: float | None = None
    """Temperature of every draw; null is the paper's own setting, which is how own is set."""
    roll: Roll = "none"
    """halton: the reference's one order (none), begun at a random point of it per picture (order,
    its `randomize`), or shifted over the picture (grid)."""
    choice: float = 4.5
    """confidence, moment: factor of the Gumbel noise on the choice at the first step."""
    gamma: float = 0.1
    """eb: bound in nats; 0 opens one token at a time."""
    limit: int = 48
    """eb: most calls."""
    kl: float = 0.01
    """klass: KL in nats between calls below which a place is stable."""
    sure: float = 0.9
    """klass: probability above which a token is sure."""
    eta: float | None = None
    """remdm: rate of masking again, at most 1 (null: 0.02, rescale 0.05); p2: weight of visible
    scores (1)."""
    corrections: int | None = None
    """gibbs: corrector calls after each step (null: 1); gidd: most calls at the end (128)."""
    places: int = 1
    """gibbs, gidd: tokens that a corrector call rewrites."""
    choice_heat: float | None = 1.0
    """gibbs: temperature of the choice of these tokens; null chooses at random."""
    divergence_free: float = 0.0
    """flow: factor of the term that moves tokens back and forth."""
    divergence_law: Literal["constant", "bump"] = "constant"
    """flow: its factor is constant, or times k^2 (1 - k)^(1/4), k the clean share."""

    def __post_init__(self) -> None:
        at_least(self, 0, "temperature", "choice", "gamma", "kl", "eta", "divergence_free")
        at_least(self, 1, "limit", "places")
        at_least(self, 0, "corrections")
        within(self, 0, 1, "sure")
        unread = "temperature must be null with sampler=own, which draws at the paper's settings"
        require(not self.own or self.temperature is None, f"{unread}, got {self.temperature}")
        is_rate = not self.name.startswith("remdm") or self.rate <= 1
        require(is_rate, f"eta must be at most 1 with sampler={self.name}, got {self.eta}")
        heat = self.choice_heat
        require(heat is None or heat > 0, f"choice_heat must be positive or null, got {heat}")

    @property
    def own(self) -> bool:
        """Whether it is the paper's loop."""
        return self.name == "own"

    @property
    def rate(self) -> float:
        """The eta that is set, or the sampler's own."""
        return REMASKING.get(self.name, 1.0) if self.eta is None else self.eta


def check_normalised(normalised: bool, sampler: SamplerConfig) -> None:
    """Refuse an unnormalised guided law where nothing but the posterior would read its sum."""
    require(
        normalised or sampler.name == "posterior",
        f"guidance_normalised must be true with sampler={sampler.name}: only posterior reads the "
        "sum of the guided law",
    )


def check_sampler(
    config: SamplerConfig,
    *,
    masks: bool,
    replaces: bool,
    untrained: str = "",
    critic: bool = False,
    at: str = "sampling.sampler",
) -> None:
    """Refuse a sampler that a checkpoint does not fit.

    Args:
        config: the sampler.
        masks: whether its noise is masks.
        replaces: whether its noise replaces tokens.
        untrained: the setting by which its network learnt nothing of visible tokens, if so.
        critic: whether it has a Token-Critic.
        at: name of the setting.

    Raises:
        ValueError: it does not; one sentence with the way out.
    """
    name, needs = config.name, NEEDS[config.name]
    fits = [
        other
        for other, need in NEEDS.items()
        if need.masks in (None, masks)
        and (replaces or not need.replaces)
        and (critic or not need.critic)
        and not (untrained and need.visible)
    ]
    others = f"it can be one of {', '.join(fits)}"
    kind = "masks" if masks else "random tokens"
    require(
        needs.masks in (None, masks),
        f"{at} must not be {name}, which is not for a checkpoint whose noise is {kind}; {others}",
    )
    require(
        replaces or not needs.replaces,
        f"{at} must not be {name}, which mends wrong tokens: this checkpoint's noise makes none; "
        f"{others}",
    )
    require(
        critic or not needs.critic,
        f"{at} must not be {name} without a Token-Critic (critic.layers=0); {others}",
    )
    require(
        not (untrained and needs.visible),
        f"{at} must not be {name}, which reads the network at visible tokens: with {untrained} "
        f"this checkpoint never learnt them; {others}",
    )
