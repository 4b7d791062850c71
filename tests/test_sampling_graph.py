"""A step with all places masked: the tokens of the picking one, one graph, and no look at a number.

On a GPU a look at a number waits until all work before it is done, and no CUDA graph can hold it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules.common.places import Masked, Picked
from lightning_modules.common.request import Request
from tests.test_training_graph import HIGH, SUPERRES, THIN
from tests.tiny_generators import SAMPLERS, asked, exact, tiny, tokens

SEEDS = [3, 1, 4, 1]
LOOKS = {"nonzero", "item", "_local_scalar_dense", "masked_select", "is_nonzero", "equal"}
# kind, changes of the sampling settings, and how many kinds of steps the loop has
STEPS: list[tuple[str, dict[str, Any], int]] = [
    ("paella", {}, 1),
    ("vq_diffusion", {}, 1),
    ("improved_vqd", {}, 2),  # the last one is an ordinary one
    ("muse", {"guidance_start": 2.0}, 1),
    ("muse uvit", {"guidance_start": 2.0}, 1),
    ("superres", {}, 1),
    ("ldmae", {}, 2),  # outside of the interval one condition is asked
]
OWN = [
    *((kind, changes) for kind, changes, _ in STEPS),
    *((p, changes) for p, more in SAMPLERS.items() for changes in more if "sampler" not in changes),
    ("vq_diffusion class", {}),
    ("vq_diffusion none", {}),
    ("vq_diffusion replacing", {}),
    ("improved_vqd class", {"purity": "raw"}),
    ("muse learned", {"order": "random", "top_k": 3}),
    ("ldmae ddpm", {}),
    ("muse critic", {"order": "critic"}),
    ("muse", {"confidence": "tempered", "temperature_end": 0.0, "frozen": False}),
    ("ldmae", {"guidance_start": 0.4}),
]


class NoLook(TorchDispatchMode):
    """Refuses operations whose result the program needs before it can go on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert name not in LOOKS, f"a step looks at a number by {name}"
        masks = [i for i in args[1] if i is not None] if name == "index" else []
        assert all(index.dtype != torch.bool for index in masks), "a step picks places"
        return func(*args, **(kwargs or {}))


def watched(step: Callable[..., Any]) -> Callable[..., Any]:
    def watching(*args: Any) -> Any:
        with NoLook():
            return step(*args)

    return watching


def make(kind: str, **sections: Any) -> tuple[Any, dict[str, Any]]:
    """The generator of a kind in float64, and what it is asked besides prompts and seeds."""
    if kind != "superres":
        return exact(tiny(kind, 0.3, **sections)), {}
    stage = {"enabled": True, "model": {**SUPERRES, "layers": 1}}
    sampling = {"superres": {"steps": 3, "guidance_start": 2.0, "guidance_end": 3.0}}
    whole = tiny("muse", 0.3, superres=stage, high=HIGH, sampling=sampling)
    stage = whole.superres.attach(whole.first_stage)
    return exact(stage), {"low": tokens("muse", 3)}


def drawn(module: Any, kind: str, changes: dict[str, Any], seed: int = 0) -> Tensor:
    module, more = module
    seeds = [s + seed for s in SEEDS]
    request = Request(asked("muse" if kind == "superres" else kind), seeds, **more)
    return module.sample_tokens(request, module.settings(changes))


@pytest.mark.parametrize(("kind", "changes"), OWN, ids=lambda v: str(v))
def test_masked_places_give_the_same_tokens_without_a_look(
    kind: str, changes: dict[str, Any]
) -> None:
    module = make(kind)
    picked = drawn(module, kind, changes)
    calls = module[0].calls
    module[0].compiler = watched
    masked = drawn(module, kind, changes)
    torch.testing.assert_close(masked, picked, rtol=1e-4, atol=1e-4)
    assert masked.is_floating_point() == (kind.startswith("ldmae"))
    assert (module[0].calls >= calls).all()  # a step is a call even where nothing is left to do


@pytest.mark.parametrize("kind", ["paella", "vq_diffusion", "muse", "ldmae"])
def test_masked_places_keep_what_is_given(kind: str) -> None:
    module, start = exact(tiny(kind, 0.3)), tokens(kind, 3)
    mask = torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    request = Request(asked(kind), SEEDS, start=start, mask=mask)
    picked = module.sample_tokens(request)
    module.compiler = watched
    torch.testing.assert_close(module.sample_tokens(request), picked, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "changes", "kinds"), STEPS, ids=lambda v: str(v))
def test_a_step_is_one_graph(kind: str, changes: dict[str, Any], kinds: int) -> None:
    torch._dynamo.reset()
    counters.clear()
    module = make(kind, **({} if "uvit" in kind else THIN.get(kind.split()[0], {})))
    expected = [drawn(module, kind, changes, seed) for seed in (0, 5)]
    # nothing is translated: a break of the graph raises, whatever the backend
    module[0].compiler = partial(torch.compile, backend="eager", fullgraph=True)
    for seed, wanted in zip((0, 5), expected, strict=True):
        torch.testing.assert_close(drawn(module, kind, changes, seed), wanted, rtol=1e-4, atol=1e-4)
        assert counters["stats"]["unique_graphs"] == kinds and not counters["graph_break"]
    torch._dynamo.reset()


def test_logits_that_are_no_numbers_are_refused_after_the_loop() -> None:
    module = tiny("paella", 0.3)
    module.network.get_parameter("out_mapper.1.weight").data[:] = torch.nan
    for compiler in (None, watched):
        module.compiler = compiler
        with pytest.raises(ValueError, match="are not finite numbers"):
            drawn((module, {}), "paella", {})


def test_the_device_chooses_the_form() -> None:
    module = tiny("paella")
    assert type(module.places()) is Picked
    module.compiler = watched
    assert type(module.places()) is Masked
    with module.heard_by(lambda *call: None):
        assert type(module.places()) is Picked
