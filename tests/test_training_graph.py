"""The loss of every paper is one graph: no break, and no other code for a second batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from lightning_modules.ldmae.autoencoder import AutoencoderModule
from lightning_modules.muse.module import MuseModule
from lightning_modules.vqgan.module import VQGANModule
from tests import tiny_generators
from tests.tiny_generators import MUSE, source, tiny

HIGH = {"grid": [8, 8], "num_codes": tiny_generators.K}
SUPERRES = {
    **{k: v for k, v in MUSE.items() if k != "max_side"},
    "low_num_codes": tiny_generators.K,
    "low_layers": 1,
    "block": 2,
    "max_side": 8,
    "low_max_side": 4,
}
VIT = {
    "image_size": 16,
    "patch_size": 4,
    "embed_dim": 8,
    "depth": 1,
    "num_heads": 2,
    "decoder_embed_dim": 8,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
VQ = {
    "ch": 8,
    "ch_mult": [1, 2],
    "norm_groups": 4,
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "z_channels": 4,
    "embed_dim": 4,
    "num_codes": 16,
}
# tracing takes seconds per layer
THIN: dict[str, dict[str, Any]] = {
    "vq_diffusion": {"model": {"n_layer": 1}},
    "improved_vqd": {"model": {"n_layer": 1}},
    "muse": {"model": {"layers": 1}},
    "ldmae": {"model": {"depth": 1}},
}
# one of each code that a loss takes
KINDS_TRACED = [
    "paella",
    "vq_diffusion",
    "improved_vqd",
    "muse critic",
    "muse uvit",
    "ldmae",
]


@pytest.fixture
def watched() -> Any:
    """What the tracer counts, from an empty cache on."""
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


def traced_twice(
    watched: Any,
    loss: Callable[..., Any],
    one: dict[str, Any],
    two: dict[str, Any],
    parameters: list[Tensor],
) -> None:
    """Compare loss and gradients of two batches with those of plain code; count the graphs."""
    # nothing is translated: a break of the graph raises, whatever the backend
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    for inputs in (one, two):
        found = []
        for function in (loss, compiled):
            torch.manual_seed(0)
            for p in parameters:
                p.grad = None
            value = function(**inputs)[0]
            value.backward()
            found.append([value.detach(), *(p.grad for p in parameters if p.grad is not None)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        assert len(found[0]) > 1
    assert watched["stats"]["unique_graphs"] == 1 and not watched["graph_break"]


def leaves(module: Any) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def apart(inputs: Any) -> Any:
    """Inputs as an encoder gives them, without the graph that they were made by."""
    if isinstance(inputs, Tensor):
        return inputs.detach()
    if isinstance(inputs, dict):
        return {k: apart(v) for k, v in inputs.items()}
    if isinstance(inputs, tiny_generators.Condition):
        return type(inputs)(**apart(vars(inputs)))
    if isinstance(inputs, tuple) and type(inputs) is tuple:
        return tuple(map(apart, inputs))
    return inputs


@pytest.mark.parametrize("kind", KINDS_TRACED)
def test_the_loss_is_one_graph(kind: str, watched: Any) -> None:
    paper = kind.split()[0]
    sections = {name: dict(own) for name, own in THIN.get(paper, {"model": {}}).items()}
    if kind == "muse uvit":
        sections = {"uvit": {"hidden_dropout": 0.0, "attention_dropout": 0.0}}
    elif paper in ("paella", "muse"):
        sections["model"]["dropout"] = 0.0
    module = tiny(kind, random=0.1, **sections).train()
    batches = [tiny_generators.batch(kind, seed) for seed in (1, 2)]
    one, two = (apart(module.inputs(given, source(i))) for i, given in enumerate(batches))
    loss = module.compute_loss
    if hasattr(module, "loss_history"):  # what a first call writes, a second one reads
        history = module.loss_history.clone(), module.loss_count.clone()

        def loss(**inputs: Any) -> Any:
            module.loss_history.copy_(history[0])
            module.loss_count.copy_(history[1])
            return module.compute_loss(**inputs)

    traced_twice(watched, loss, one, two, leaves(module.network))


def test_the_loss_of_super_resolution_is_one_graph(watched: Any) -> None:
    stage = {"enabled": True, "model": {**SUPERRES, "dropout": 0.0, "layers": 1}}
    whole: MuseModule = tiny("muse", random=0.1, superres=stage, high=HIGH)
    module = whole.superres
    assert module is not None
    module.train()
    found = []
    for seed in (1, 2):
        low = tiny_generators.batch("muse", seed)
        tokens = low["tokens"].repeat_interleave(2, 1).repeat_interleave(2, 2)
        given = {**low, "tokens": tokens, "low": low["tokens"]}
        found.append(apart(module.inputs(given, source(seed))))
    traced_twice(watched, module.compute_loss, *found, leaves(module.network))


def images(seed: int) -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=source(seed)) * 2 - 1


def test_the_loss_of_a_tokenizer_is_one_graph(watched: Any) -> None:
    torch.manual_seed(0)
    model = {**VQ, "dropout": 0.0}
    module = VQGANModule({"model": model, "objective": {"disc_weight": 0.0}}).train()
    found = [{"images": images(seed)} for seed in (1, 2)]
    traced_twice(watched, module.compute_loss, *found, leaves(module.autoencoder))


def test_the_loss_of_an_autoencoder_is_one_graph(watched: Any) -> None:
    torch.manual_seed(0)
    module = AutoencoderModule({"kind": "vmae", "channels": 4, "vit": VIT}).train()

    def loss(images: Tensor, noise: Any) -> Any:
        return module.loss(images, module(images, noise))

    found = []
    for seed in (1, 2):
        noise = module.draw(images(seed), source(seed))
        found.append({"images": images(seed), "noise": noise})
    traced_twice(watched, loss, *found, leaves(module.network))
