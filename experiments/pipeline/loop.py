"""How long a training goes, and what is watched of it; light to import."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Loop:
    """How long a module is trained, and on how much at once."""

    epochs: int
    """Virtual epochs; checkpoints stand at their borders."""
    length: int
    """Batches of an epoch that each device sees."""
    batch_size: int
    """Samples per batch and device."""
    accumulate: int = 1
    """Batches whose gradients are summed before one update."""
    precision: str = "auto"
    """Arithmetic; auto is bf16-mixed on CUDA and 32-true elsewhere."""
    world: int = 1
    """Devices that train together."""


@dataclass(frozen=True)
class Monitor:
    """What is watched and kept of a training; changes no weight."""

    val_batches: int = 0
    """Batches of the validation loss after every epoch; 0 for none."""
    log_every: int = 20
    """Batches between two logged points."""
    keep_every: int = 0
    """Epochs between two weights that are kept; 0 keeps none."""
