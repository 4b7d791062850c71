"""The repeated parts of networks: what is sharded, recomputed and compiled one at a time."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """A part that a network repeats; most of its parameters and activations lie in such.

    All parameters of a block are gathered when it is called, so that no other module may read
    them but through `forward` and ENTRIES.
    """

    ENTRIES: ClassVar[tuple[str, ...]] = ()
    """Methods besides `forward` that are called from outside; they return tensors, or tuples."""
    recomputed: bool = False
    """Whether its activations are made again in the backward pass."""


def blocks_of(module: nn.Module) -> list[Block]:
    """List the blocks of a network, in order."""
    return [part for part in module.modules() if isinstance(part, Block)]


def compile_blocks(module: nn.Module) -> None:
    """Compile the blocks: those of one kind and shape share their code.

    Compiled code belongs to a code object, and what varies between two uses of it becomes symbolic.
    So every shape has a copy of its own: a caption's length may vary in it, and no width does.
    """
    compiled: dict[Any, Callable[..., Any]] = {}
    for block in blocks_of(module):
        shape = (type(block), *(p.shape for p in block.parameters()))
        if shape not in compiled:
            plain = type(block).forward
            code = plain.__code__.replace(co_name=f"forward_{len(compiled)}")
            own = FunctionType(code, plain.__globals__, code.co_name, None, plain.__closure__)
            own.__kwdefaults__, own.__defaults__ = plain.__kwdefaults__, plain.__defaults__
            compiled[shape] = torch.compile(own)
        block.forward = MethodType(compiled[shape], block)


def missing_compiler(device: str) -> str | None:
    """Say what torch.compile needs on a kind of device and does not find here, if anything."""
    if device == "cuda":
        return None if importlib.util.find_spec("triton") else "the package triton is"
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return None if any(map(shutil.which, names)) else f"a C++ compiler ({names[0]}) is"


def recompute_blocks(module: nn.Module) -> None:
    """Keep of every block in training only what enters it; backward passes make the rest again."""
    for block in [block for block in blocks_of(module) if not block.recomputed]:
        block.recomputed = True
        forward = partial(_recomputed, block, block.forward)
        block.forward = forward


def keep_blocks(module: nn.Module) -> bool:
    """Undo `recompute_blocks`; says whether it was done."""
    again = [block for block in blocks_of(module) if block.recomputed]
    for block in again:
        block.recomputed = False
        del block.forward
    return bool(again)


def _recomputed(block: Block, forward: Callable[..., Any], *args: Any, **more: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **more)
    return checkpoint(forward, *args, use_reentrant=False, **more)


def shard(
    module: nn.Module, mesh: Any, forwards: Iterable[str], dtype: torch.dtype | None = None
) -> None:
    """Spread the parameters over the devices of a mesh (FSDP2): each block's own, then the rest.

    Args:
        module: what owns the blocks; what it has besides stays gathered while it works.
        mesh: one dimension of devices.
        forwards: its methods that are called from outside.
        dtype: what blocks are gathered in; None keeps the parameters' own.
    """
    # a second to import, which only those pay who shard
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    policy = MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=False)
    for block in blocks_of(module):
        fully_shard(block, mesh=mesh, mp_policy=policy)
        for name in block.ENTRIES:
            register_fsdp_forward_method(block, name)
    fully_shard(module, mesh=mesh, reshard_after_forward=False)
    for name in forwards:
        register_fsdp_forward_method(module, name)


def whole(state: Mapping[str, Any], keep: bool = True) -> dict[str, Any]:
    """Gather tensors that are sharded, by all devices together, into the memory of the host.

    Args:
        state: tensors by name, the same on all devices.
        keep: whether this process gets them; otherwise it helps the others and gets nothing.
    """
    found = {}
    for name, value in state.items():
        full = value.full_tensor() if sharded(value) else value
        if keep:
            found[name] = full.cpu() if sharded(value) else full
    return found


def local(value: Any) -> Tensor:
    """Return what of a tensor lies on this device, sharing its memory."""
    return value.to_local() if sharded(value) else value


def sharded(value: Any) -> bool:
    """Say whether a tensor is spread over devices (a DTensor)."""
    return hasattr(value, "full_tensor")


def like(value: Tensor, other: Any) -> Tensor:
    """Shard a whole tensor as another one is, if that is."""
    if not sharded(other):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = other.device_mesh, other.placements
    # every rank has read the whole one, so that nothing need be sent
    return distribute_tensor(value.to(other.device), mesh, placements, src_data_rank=None)
