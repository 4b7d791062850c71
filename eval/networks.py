"""What feature networks share: exact float32, and pictures prepared by several threads."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from data.files import file_hash

T = TypeVar("T")
Images = Tensor | Sequence[Tensor]
"""Pictures [B, 3, H, W] uint8, or B pictures [3, H, W] uint8 of any sizes."""


@contextmanager
def exact() -> Iterator[None]:
    """Compute in full float32 without gradients: TF32 moves a Frechet distance visibly."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        with torch.inference_mode():
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def load_torchscript(path: Path, device: torch.device | str) -> Any:
    """Load a TorchScript file, the form in which Inception and OpenAI's CLIP are published."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 calls the form deprecated
        return torch.jit.load(path, map_location=device)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0))))


def in_threads(prepare: Callable[[np.ndarray], T], images: Images) -> list[T]:
    """Prepare pictures, given as [3, H, W] uint8, side by side: Pillow frees the interpreter."""
    return list(_pool().map(prepare, [image.numpy() for image in images]))


def of_one_size(images: Images) -> Iterator[tuple[list[int], Tensor]]:
    """Yield places and pictures [b, 3, H, W] of every size that occurs."""
    places: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        places.setdefault(image.shape, []).append(i)
    for found in places.values():
        yield found, torch.stack([images[i] for i in found])


def content_of(path: Path) -> str:
    """Say which file, or folder of files, weights are from: its name and hash."""
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    hashes = ", ".join(file_hash(p)[:12] for p in files if p.suffix != ".lock")
    return f"{path.name}, sha256 {hashes}"
