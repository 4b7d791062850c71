"""What a generator's loss keeps in memory, found on torch's meta device: shapes without numbers."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from lightning_modules.common.attention import products, short
from lightning_modules.common.blocks import blocks_of
from lightning_modules.common.text import Condition

ATTENTION = torch.nn.functional.scaled_dot_product_attention
ANSWERS: dict[Any, Callable[[Tensor], Any]] = {
    Tensor.all: lambda x: torch.ones((), dtype=torch.bool, device="cpu"),
    Tensor.__bool__: lambda x: False,
    Tensor.__int__: lambda x: 0,
    Tensor.__float__: lambda x: 0.0,
    Tensor.__index__: lambda x: 0,
    Tensor.item: lambda x: 0,
    Tensor.tolist: lambda x: torch.zeros(x.shape, dtype=x.dtype, device="cpu").tolist(),
}
# functions that autocast computes in the lower precision, and in float32
LOWER = {
    torch.nn.functional.linear,
    torch.conv2d,
    torch.conv_transpose2d,
    torch.matmul,
    torch.bmm,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.einsum,
    ATTENTION,
}
FULL = {
    torch.nn.functional.layer_norm,
    torch.nn.functional.rms_norm,
    torch.nn.functional.group_norm,
    torch.nn.functional.cross_entropy,
    torch.nn.functional.log_softmax,
    torch.softmax,
    torch.log_softmax,
    Tensor.softmax,
    Tensor.log_softmax,
    Tensor.exp,
    torch.exp,
    Tensor.log,
    torch.log,
    Tensor.square,
    Tensor.sum,
    torch.sum,
    Tensor.pow,
    torch.pow,
    Tensor.norm,
}


class Pretend(TorchFunctionMode):
    """Lets a training step run on tensors that hold no numbers.

    A number is 0 or False where one is asked for, and all checks pass. A mask picks everything, so
    that what depends on one is counted at its most. Attention is that of a device.

    Args:
        precision: bf16-mixed and 16-mixed are imitated as autocast on a GPU does them.
        cpu: whether the device is a CPU, on which short attention keeps its weights.
    """

    def __init__(self, precision: str = "32-true", cpu: bool = False) -> None:
        super().__init__()
        self.cpu = cpu
        lower = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        self.lower = lower.get(precision)
        self._copies: dict[int, Tensor] = {}  # autocast casts a weight once per pass
        self._storages: list[Any] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in ANSWERS and len(args) == 1 and not kwargs and args[0].is_meta:
            return ANSWERS[func](args[0])
        if func in (Tensor.__getitem__, Tensor.__setitem__) and is_mask(args[1]):
            return picked(*args)
        if self.lower is not None and func in LOWER | FULL:
            target = self.lower if func in LOWER else torch.float32
            args = [self._to(value, target) for value in args]
            kwargs = {name: self._to(value, target) for name, value in kwargs.items()}
        if func is ATTENTION and args[0].is_meta:
            q, k, v = args
            if self.cpu and self.lower is None and short(q, k) and not kwargs["is_causal"]:
                return products(q, k, v, kwargs["attn_mask"], kwargs["dropout_p"])
            return fused_attention(q, k, v, kwargs["attn_mask"])
        return func(*args, **kwargs)

    def _to(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
            return type(value)(self._to(v, dtype) for v in value)
        if not isinstance(value, Tensor) or not value.is_meta or not value.is_floating_point():
            return value
        if value.dtype == dtype:
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(dtype)
        if id(value) not in self._copies:
            self._copies[id(value)] = copy = value.to(dtype)
            self._storages.append(copy.untyped_storage())
        return self._copies[id(value)]

    @property
    def copies(self) -> dict[int, int]:
        """Storage -> bytes of the weights that were cast."""
        return {id(storage): storage.nbytes() for storage in self._storages}


def is_mask(index: Any) -> bool:
    """Say whether an index is a mask without numbers."""
    return isinstance(index, Tensor) and index.is_meta and index.dtype == torch.bool


def picked(x: Tensor, mask: Tensor, value: Tensor | None = None) -> Tensor | None:
    """Do x[mask], or x[mask] = value, as if the mask were true everywhere."""
    if value is None:
        return x.flatten(0, mask.ndim - 1).clone()
    x.copy_(value.reshape(x.shape) if value.ndim else value)
    return None


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attend as flash attention does, which keeps no matrix of all pairs."""
    return _Fused.apply(query, key, value, None if mask is None else mask.to(query.dtype))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        heads, count = query.shape[-3:-1]
        # heads lie beside each other, so that they are joined without a copy
        out = query.new_empty(*query.shape[:-3], count, heads, value.shape[-1]).transpose(-3, -2)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, *([] if mask is None else [mask]))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return query.new_empty(query.shape), key.clone(), value.clone(), None


@dataclass
class Kept:
    """Bytes that one pass keeps for the way back, besides the weights.

    Storages are counted once however many views of them are kept.
    """

    outside: dict[int, int] = field(default_factory=dict)
    """Storage -> bytes, of what is made outside of blocks."""
    blocks: list[dict[int, int]] = field(default_factory=list)
    """The same of every call of a block."""
    entering: dict[int, int] = field(default_factory=dict)
    """The same of what enters blocks."""
    alive: list[Any] = field(default_factory=list)
    """All storages, so that none takes another one's place."""

    def bytes(self, recomputed: bool = False, without: Collection[int] = ()) -> int:
        """Count them.

        Args:
            recomputed: blocks keep only what enters them, and the largest one is made again.
            without: storages that do not count.
        """

        def size(storages: Mapping[int, int]) -> int:
            return sum(v for k, v in storages.items() if k not in without)

        if recomputed:
            return size(self.outside | self.entering) + max(map(size, self.blocks), default=0)
        return size({k: v for part in (self.outside, *self.blocks) for k, v in part.items()})


def kept_by(module: nn.Module, step: Callable[[], Any]) -> Kept:
    """Measure what one pass keeps, of tensors with or without numbers.

    Args:
        module: what has the blocks and the weights.
        step: does the pass; its result is kept until all is counted.
    """
    owned = [v.untyped_storage() for v in [*module.parameters(), *module.buffers()]]
    weights = set(map(id, owned))
    kept = Kept()
    inside: list[dict[int, int]] = []

    def note(value: Tensor, where: dict[int, int]) -> None:
        storage = value.untyped_storage()
        if id(storage) not in weights:
            where[id(storage)] = storage.nbytes()
            kept.alive.append(storage)

    def pack(value: Tensor) -> Tensor:
        note(value, inside[-1] if inside else kept.outside)
        return value

    def enter(block: nn.Module, args: Any, more: Any) -> None:
        for value in tensors_in((args, more)):
            note(value, kept.entering)
        kept.blocks.append({})
        inside.append(kept.blocks[-1])

    def leave(block: nn.Module, args: Any, result: Any) -> None:
        inside.pop()

    hooks = []
    for block in blocks_of(module):
        hooks.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(block.register_forward_hook(leave))
    try:
        with saved_tensors_hooks(pack, lambda value: value):
            result = step()
        del result
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """List the tensors in containers, dataclasses and plain objects."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, (str, bytes, int, float, nn.Module, type(None))):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        inner: Any = value.values()
    elif isinstance(value, (list, tuple)):
        inner = value
    elif dataclasses.is_dataclass(value):
        inner = [getattr(value, f.name) for f in dataclasses.fields(value)]
    else:
        inner = vars(value).values() if hasattr(value, "__dict__") else []
    for part in inner:
        yield from tensors_in(part, seen)


class BlankFirstStage:
    """A first stage, or a base under super-resolution, that computes nothing.

    Args:
        factor: pixels per token along a side.
        channels: of its latents; None of a tokenizer.
    """

    def __init__(self, factor: int, channels: int | None = None) -> None:
        self.factor, self.channels = factor, channels

    def sample_posterior(self, moments: Tensor, noise: Tensor) -> Tensor:
        """moments: [B, 2 C, h, w] -> [B, C, h, w]."""
        return moments[:, : moments.shape[1] // 2]

    def normalise(self, latents: Tensor) -> Tensor:
        """latents: [B, C, h, w]."""
        return latents

    def predicted(self, tokens: Tensor, *others: Any) -> Tensor:
        """tokens: [B, h, w]."""
        return tokens


def blank_condition(
    count: int, length: int, width: int, pooled: int, masked: bool, trained: bool
) -> Condition:
    """Make the condition of a text encoder without one: shapes alone.

    Args:
        count: captions.
        length: tokens of each.
        width: of a token's vector.
        pooled: width of the pooled vector; 0 for none.
        masked: whether padding is hidden.
        trained: whether gradients go through it.
    """
    tokens = torch.empty(count, length, width, device="meta", requires_grad=trained)
    mask = torch.empty(count, length, dtype=torch.bool, device="meta") if masked else None
    vector = torch.empty(count, pooled, device="meta", requires_grad=trained) if pooled else None
    return Condition(tokens, mask, vector)
