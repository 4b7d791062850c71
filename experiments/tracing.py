"""Samplings that a page plays step by step: which can be played, and what they show."""

from collections.abc import Sequence
from typing import Any

from experiments.cli import first_line
from experiments.edits import trained_size
from experiments.pipeline.sample import decode_unfinished
from experiments.report.pictures import to_uint8
from experiments.report.trace import Played, Recorder
from experiments.settings import ConfigError, override
from lightning_modules.common.generator import GeneratorModule
from lightning_modules.common.request import Request
from lightning_modules.samplers.loop import entropy_of


def traced_settings(settings: Any, samplers: str | None) -> list[Any]:
    """Return the settings of each sampling that --trace plays: of --samplers, or as they are.

    Raises:
        ConfigError: no such sampler, or a paper that has its own loop alone.
    """
    return [by_sampler(settings, name) for name in samplers.split(",")] if samplers else [settings]


def by_sampler(settings: Any, name: str) -> Any:
    """Return settings with another sampler.

    Raises:
        ConfigError: no such sampler, or a paper that has its own loop alone.
    """
    if not hasattr(settings, "sampler"):
        raise ConfigError("--samplers: this checkpoint's paper has its own loop alone")
    try:
        return override(settings, [f"sampler={name}"])
    except ConfigError as error:
        raise ConfigError(f"--samplers: {error}") from error


def check_playable(module: GeneratorModule, width: int, height: int) -> None:
    """Refuse to play pictures of so many pixels that are made window by window.

    Raises:
        ConfigError: a checkpoint of one size, and a larger picture.
    """
    most = trained_size(module)
    if module.fixed_size and (width > most[0] or height > most[1]):
        raise ConfigError(
            f"--trace cannot follow a picture of {width}x{height} pixels, which this checkpoint "
            f"makes window by window: leave it out, or draw at most {most[0]}x{most[1]}"
        )


def played(module: GeneratorModule, request: Request, traced: Sequence[Any]) -> list[list[Played]]:
    """Draw the pictures of a request once more by each of the `traced` settings.

    Raises:
        ConfigError: settings that do not fit, or a sampling that takes no step.
    """
    shown: list[list[Played]] = [[] for _ in request.prompts]
    for settings in traced:
        head = getattr(module.network, "head", None)
        recorder = Recorder(len(request.prompts), None if head is None else entropy_of(head))
        try:
            with module.heard_by(recorder.on_call):
                module.sample(request, settings, recorder.on_step)
        except ValueError as error:
            raise ConfigError(first_line(error)) from error
        if not recorder.states:
            raise ConfigError("--trace has nothing to play: this sampling took no step")
        for i in range(len(request.prompts)):
            one, calls, entropy = recorder.of(i)  # [T + 1, h, w]
            drawn = decode_unfinished(module.first_stage, one.to(module.device))
            frames = to_uint8(drawn.cpu())
            codes = module.first_stage.num_codes if one.ndim == 3 else None
            label = getattr(getattr(settings, "sampler", None), "name", "own")
            shown[i].append(Played(label, frames, one, codes, calls, entropy))
    return shown
