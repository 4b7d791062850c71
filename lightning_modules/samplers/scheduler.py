"""The samplers behind the signature of diffusers' discrete schedulers, for loops that are not ours.

    scheduler = DiscreteScheduler(Absorbing(codes), SamplerConfig("confidence"))
    scheduler.set_timesteps(12)
    x = scheduler.noise((batch, h, w), generator)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, generator=generator).prev_sample

The conventions are those of huggingface/diffusers: scheduling_amused and scheduling_discrete_ddim
(0.42), and pull request 14741: times fall from 1 and stay above 0, temperature and filters belong
to the scheduler, and `pred_logits` is what tokens are drawn from.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.common.guidance import ratio
from lightning_modules.samplers.kernel import Corruption
from lightning_modules.samplers.loop import COLDEST, Rows, Sampler, State
from lightning_modules.samplers.serve import make
from lightning_modules.samplers.settings import NEEDS, SamplerConfig, check_sampler

SAME = 1e-6  # times closer than that are one
Generators = torch.Generator | Sequence[torch.Generator] | None


class SchedulerOutput(NamedTuple):
    """What a step gives."""

    prev_sample: Tensor
    """Tokens after the step, in the form of its input."""
    pred_original_sample: Tensor
    """The same with the likeliest token at every place that is not known: a preview of the end."""
    pred_logits: Tensor
    """Logits that tokens are drawn from, in the form of the model's output."""


@dataclass(frozen=True)
class Way:
    """Where a loop stands after some steps."""

    sampler: Sampler
    steps: int
    """Steps made."""
    state: State
    finished: Tensor
    """[B] bool."""


class DiscreteScheduler:
    """A sampler that is given logits instead of asking a network for them.

    Tokens are [B, N] with logits [B, N, K], or [B, h, w] with logits [B, K, h, w] as of aMUSEd;
    logits are guided, if at all, before they come here. Where noise is masks alone, tokens that are
    none at the start stay; steps open shares of the masks, where AmusedScheduler counts known
    tokens too. `finished` [B] says which pictures have all their tokens: these do not
    change, and a loop may end when all have.

    Args:
        kernel: what training did to tokens.
        config: the sampler and its settings.
        mask_token_id: id of the mask in samples; None is K.
        temperature: of the draw at the first step and at the last, at least 0, linear in between;
            `config.temperature` replaces both.
        narrow: logits [m, K] -> the same with excluded codes at -inf.

    Raises:
        ValueError: the sampler does not fit the noise, or needs what a step is not given.
    """

    order = 1

    def __init__(
        self,
        kernel: Corruption,
        config: SamplerConfig,
        *,
        mask_token_id: int | None = None,
        temperature: tuple[float, float] = (1.0, 1.0),
        narrow: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if config.own:
            raise ValueError("sampler must name one that serves several papers, not own")
        replaces = float(kernel.end.replace) > 0
        check_sampler(config, masks=kernel.masks, replaces=replaces, at="sampler")
        if config.roll != "none":
            raise ValueError(f"roll must be none: a step is given no seeds, got {config.roll}")
        if replaces and make(config, kernel, 1, (1, 1), [0]).pace is None:
            raise ValueError(
                f"sampler must not be {config.name}, which tells the network a time of each "
                "picture's own: timesteps are the same for all; it can be posterior or flow"
            )
        self.kernel, self.sampler, self.narrow = kernel, config, narrow
        heat = config.temperature
        self.temperature = temperature if heat is None else (heat, heat)
        mask_id = kernel.codes if mask_token_id is None else mask_token_id
        self.config = SimpleNamespace(**asdict(config), mask_token_id=mask_id)
        self.timesteps = torch.empty(0)
        self._steps, self._choice = 0, config.choice
        self._way: Way | None = None

    def set_timesteps(
        self,
        num_inference_steps: int,
        temperature: float | Sequence[float] | None = None,
        device: Any = None,
    ) -> None:
        """Begin a loop over `timesteps`: T of them, more with correctors, with a limit so many.

        Args:
            num_inference_steps: T.
            temperature: as of AmusedScheduler, the factor of the Gumbel noise on the choice at the
                first step, or (first, 0); confidence and moment read it; None takes `choice`.
            device: of `timesteps`.

        Raises:
            ValueError: no steps, or a choice that does not end at 0.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        self._steps, self._choice = num_inference_steps, self.sampler.choice
        if temperature is not None:
            pair = temperature if isinstance(temperature, Sequence) else (temperature, 0.0)
            if len(pair) != 2 or pair[0] < 0 or pair[1] != 0:
                raise ValueError(f"temperature must be a number or (number, 0), got {temperature}")
            # the factor of step i is c (1 - (i + 1) / T)
            self._choice = pair[0] * num_inference_steps / max(1, num_inference_steps - 1)
        told = self._made((1, 1)).told
        self.timesteps = torch.tensor(told, dtype=torch.float32, device=device)
        self._way = None

    @property
    def finished(self) -> Tensor:
        """[B] bool, which pictures of the loop have all their tokens."""
        if self._way is None:
            raise ValueError("no step was made since set_timesteps")
        return self._way.finished

    def noise(self, shape: Sequence[int], generator: Generators = None) -> Tensor:
        """Draw what a loop begins with: [B, ...] int64."""
        tokens = self.kernel.noise(_uniforms(generator, 2, shape[0], shape[1:]))
        if NEEDS[self.sampler.name].masks:
            tokens = torch.full_like(tokens, self.kernel.codes)
        return self._outside(tokens)

    def add_noise(
        self, original_samples: Tensor, timesteps: Tensor | float, generator: Generators = None
    ) -> Tensor:
        """Draw x_t for clean tokens [B, ...] at one time in [0, 1]."""
        shape = original_samples.shape
        u = _uniforms(generator, 2, shape[0], shape[1:]).to(original_samples.device)
        return self._outside(self.kernel.noised(original_samples, float(timesteps), u))

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        *,
        generator: Generators = None,
        uniforms: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Make one step.

        Args:
            model_output: [B, N, K] or [B, K, h, w] logits of the clean tokens.
            timestep: one of `timesteps`; the first call may begin in the midst of them, every other
                takes the next one.
            sample: [B, N] or [B, h, w] int64.
            generator: draws the uniforms; of several, each draws those of its picture.
            uniforms: [STREAMS of the sampler, B, N] in [0, 1) in place of a generator.
            return_dict: false gives a plain tuple.

        Raises:
            ValueError: no timesteps, or not the one that comes next; logits of another shape.
        """
        codes = self.kernel.codes
        logits = model_output.flatten(2).movedim(1, 2) if sample.ndim == 3 else model_output
        x = sample.flatten(1)
        x = x.masked_fill(x == self.config.mask_token_id, codes)
        if logits.shape != (*x.shape, codes):
            form = "[B, K, h, w]" if sample.ndim == 3 else "[B, N, K]"
            raise ValueError(
                f"model_output must be {form} with K={codes} for a sample of shape "
                f"{tuple(sample.shape)}, got {tuple(model_output.shape)}"
            )
        way = self._at(timestep, x, sample.shape[1:])
        if uniforms is None:
            uniforms = _uniforms(generator, way.sampler.STREAMS, len(x), x.shape[1:], way.finished)
        logits = logits.float() if logits.element_size() < 4 else logits
        if self.narrow is not None:
            logits = self.narrow(logits.flatten(0, 1)).view(logits.shape)
        way, heat = self._stepped(way, logits, x, uniforms.to(x.device))
        self._way = way
        shaped = logits / heat.clamp_min(COLDEST)[:, None, None].to(logits)
        free = way.state["generate"] if self._renews else x == codes
        preview = torch.where(free, shaped.argmax(2), x)
        if sample.ndim == 3:
            shaped = shaped.movedim(2, 1)
        found = SchedulerOutput(
            self._outside(way.state["x"]).view(sample.shape),
            preview.view(sample.shape),
            shaped.reshape(model_output.shape),
        )
        return found if return_dict else tuple(found)

    @property
    def _renews(self) -> bool:
        """Whether tokens that are no mask may change too."""
        return self.kernel.replaced > 0 and not NEEDS[self.sampler.name].masks

    def _at(self, timestep: Tensor | float, x: Tensor, grid: Sequence[int]) -> Way:
        """Return where the loop stands, which is at the step of this time."""
        times, time = self.timesteps.tolist(), float(timestep)
        if not times:
            raise ValueError("a step needs timesteps: call set_timesteps first")
        way = self._way
        if way is None:
            number = next((i for i, t in enumerate(times) if abs(t - time) < SAME), len(times))
            sampler = self._made((grid[0], grid[1]) if len(grid) == 2 else (1, grid[0]), len(x))
            generate = (
                torch.ones_like(x, dtype=torch.bool) if self._renews else x == self.kernel.codes
            )
            state = {"x": x, "generate": generate, **sampler.memory(x, generate)}
            way = Way(sampler, number, state, ~generate.any(1))
        if way.steps >= len(times) or abs(times[way.steps] - time) >= SAME:
            following = f"{times[way.steps]}" if way.steps < len(times) else "none"
            raise ValueError(
                f"timestep {time} is not the next of this loop ({following}): take `timesteps` in "
                "their order; set_timesteps begins another loop"
            )
        return way

    def _stepped(self, way: Way, logits: Tensor, x: Tensor, u: Tensor) -> tuple[Way, Tensor]:
        """Make the step of those who are not finished; return also everyone's temperature [B]."""
        sampler, heat = way.sampler, torch.ones(len(x), device=x.device)
        live = (~way.finished).nonzero().squeeze(1)
        if not len(live):
            return replace(way, steps=way.steps + 1), heat
        first, last = self.temperature

        def ask(x: Tensor, time: Tensor | float, done: Tensor | float, keep: Tensor) -> Rows:
            share = torch.as_tensor(done, dtype=torch.float32, device=x.device).expand(len(x))
            own = first + (last - first) * ratio(share, sampler.pace, ends=True).to(share)
            heat[live] = own
            return Rows(logits[live][keep], lambda rows: rows, own[keep.nonzero()[:, 0]])

        state = {name: value[live] for name, value in way.state.items()} | {"x": x[live]}
        after, ended = sampler.step(way.steps, state, ask, u[:, live])
        kept = {k: v.index_copy(0, live, after[k].to(v)) for k, v in way.state.items()}
        finished = way.finished.index_copy(0, live, ended)
        return Way(sampler, way.steps + 1, kept, finished), heat

    def _made(self, grid: tuple[int, int], batch: int = 1) -> Sampler:
        """The sampler of a loop; the pictures' seeds, which no setting asks for, are any."""
        config = replace(self.sampler, choice=self._choice)
        return make(config, self.kernel, self._steps, grid, range(batch))

    def _outside(self, x: Tensor) -> Tensor:
        """The same tokens with the mask as the caller has it."""
        return x.masked_fill(x == self.kernel.codes, self.config.mask_token_id)


def _uniforms(
    generator: Generators,
    streams: int,
    batch: int,
    shape: Sequence[int],
    finished: Tensor | None = None,
) -> Tensor:
    """Draw [streams, B, ...] in [0, 1); a picture that is finished takes nothing of its generator.

    Raises:
        ValueError: several generators, but not one per picture.
    """
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        return torch.rand(streams, batch, *shape, generator=generator, device=device)
    if len(generator) != batch:
        raise ValueError(
            f"generator must be one or one per picture ({batch}), got {len(generator)}"
        )
    done = [False] * batch if finished is None else finished.tolist()
    none = torch.zeros(streams, *shape)
    rows = [
        none if ended else torch.rand(streams, *shape, generator=own, device=own.device).cpu()
        for own, ended in zip(generator, done, strict=True)
    ]
    return torch.stack(rows, dim=1)
