"""The repeated parts of networks: compiled and recomputed they do what they did."""

from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from lightning_modules.common import blocks
from lightning_modules.common.blocks import (
    Block,
    blocks_of,
    compile_blocks,
    keep_blocks,
    missing_compiler,
    recompute_blocks,
)
from tests.tiny_generators import KINDS, batch, tiny

STILL = {"dropout": 0.0}  # compiled code draws other numbers
WITHOUT = {"muse uvit": {"uvit": {"hidden_dropout": 0.0, "attention_dropout": 0.0}}}


def one(kind: str) -> Any:
    paper = kind.split()[0]
    sections = WITHOUT.get(kind, {"model": STILL} if paper in ("paella", "muse") else {})
    return tiny(kind, random=0.02, **sections).train()


def losses(module: Any, kind: str, sizes: tuple[int, ...] = (4, 4)) -> tuple[list[float], Any]:
    """Losses of batches of some sizes, and the gradients of them all."""
    found = []
    for number, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(number)
        loss, _ = module.loss(batch(kind, number, size), generator)
        loss.backward()
        found.append(loss.item())
    return found, [p.grad for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", list(KINDS))
def test_blocks_hold_the_network(kind: str) -> None:
    """What lies in no block is gathered all the time, so that it must not be much."""
    network = one(kind).network
    inside = sum(p.numel() for block in blocks_of(network) for p in block.parameters())
    assert inside > 0.4 * sum(p.numel() for p in network.parameters())
    assert not any(isinstance(part, Block) for b in blocks_of(network) for part in b.children())


@pytest.mark.parametrize("kind", list(KINDS))
def test_recomputed_blocks_give_the_same_gradients(kind: str) -> None:
    plain, again = one(kind), one(kind)
    recompute_blocks(again)
    recompute_blocks(again)  # twice is once
    assert losses(plain, kind)[0] == losses(again, kind)[0]
    for p, q in zip(plain.parameters(), again.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)
    assert keep_blocks(again) and not keep_blocks(again)
    assert losses(again.eval(), kind)[0] == losses(plain.eval(), kind)[0]


@pytest.mark.parametrize("kind", ["paella", "vq_diffusion", "muse", "muse uvit", "ldmae"])
def test_every_block_is_traced_whole(kind: str, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = one(kind), one(kind)
    compile_blocks(compiled)
    sizes = (4, 3) if kind == "muse" else (4,)
    (a, grads_a), (b, grads_b) = losses(plain, kind, sizes), losses(compiled, kind, sizes)
    assert a == pytest.approx(b, rel=1e-5)
    for p, q in zip(grads_a, grads_b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


def test_compiled_code_computes_the_same() -> None:
    """Through the compiler of this machine, with blocks that are computed again."""
    torch._dynamo.reset()
    kind, layer = "vq_diffusion none", {"model": {"n_layer": 1}}
    plain, compiled = (tiny(kind, random=0.02, **layer).train() for _ in range(2))
    compile_blocks(compiled)
    recompute_blocks(compiled)
    (a, grads_a), (b, grads_b) = losses(plain, kind, (4,)), losses(compiled, kind, (4,))
    assert a == pytest.approx(b, rel=1e-5)
    for p, q in zip(grads_a, grads_b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    names = compiled.state_dict().keys()
    assert names == plain.state_dict().keys()


def test_a_compiler_that_is_missing_is_named(monkeypatch) -> None:
    assert missing_compiler("cpu") is None
    monkeypatch.setattr(blocks.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert missing_compiler("cpu") == "a C++ compiler (g++) is"
    monkeypatch.setattr(blocks.importlib.util, "find_spec", lambda name: None)
    assert missing_compiler("cuda") == "the package triton is"
