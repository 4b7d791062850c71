"""One training through Lightning: virtual epochs, a checkpoint at each border, resumable."""

import csv
import re
import signal
import threading
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy

from data.files import atomic
from experiments.pipeline.loop import Loop, Monitor
from experiments.pipeline.stage import Log, Machine, Say
from experiments.progress import Counter
from lightning_modules.common.blocks import (
    compile_blocks,
    local,
    missing_compiler,
    recompute_blocks,
    whole,
)
from lightning_modules.common.checkpoint import save_weights

RESUME = "resume.ckpt"
# how gloo and NCCL tell of a rank that is not there any more
LOST = re.compile("closed by peer|reset by peer|remote process exited|watchdog", re.IGNORECASE)
EXPLODED = 10.0  # factor by which no loss of a training that learns rises

# DDP doubts the layout of channels-last gradients; it copies them, which is what is meant here
warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
# FSDP warns of views that somebody might write into; nobody does
warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints that appear whole or not at all.

    Lightning's own writer moves them from the system's folder for temporary files, which is a copy
    where that lies on another disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write beside the target, then rename."""
        with atomic(path) as temporary:
            torch.save(checkpoint, temporary)


class Divergence(Callback):
    """Ends a training whose loss explodes or whose weights are no finite numbers.

    Weights are looked at before they are kept, and so is a loss that is still finite: more than
    EXPLODED times that of the first batch, which a network makes before it has learnt anything.

    A step that mixed precision skips for an overflow is none: its loss is finite, and so stay the
    weights.

    Args:
        what: name of the stage.
        every: batches between two looks on a GPU, where looking waits.
        signed: the loss may have any size, as that of adversaries may.
    """

    def __init__(self, what: str, every: int, signed: bool) -> None:
        self.what, self.every, self.signed = what, every, signed
        self.first: torch.Tensor | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss."""
        loss = trainer.callback_metrics.get("train/loss")
        if self.first is None and loss is not None:
            self.first = loss.detach().clone()
        seldom = pl_module.device.type == "cuda" and (batch_idx + 1) % self.every
        if loss is not None and not seldom and not bool(torch.isfinite(loss)):
            self._stop(trainer, f"the loss is {float(loss)}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the loss and all weights, before the checkpoint of this border is written."""
        if self.first is not None and not self.signed:
            first, loss = float(self.first), float(trainer.callback_metrics["train/loss"])
            if loss > EXPLODED * max(abs(first), 1):
                self._stop(trainer, f"the loss rose from {first:.3g} to {loss:.3g}")
        state = {k: v for k, v in pl_module.state_dict().items() if v.is_floating_point()}
        odd = torch.stack([~torch.isfinite(local(value)).all() for value in state.values()])
        odd = trainer.strategy.reduce(odd.int(), reduce_op="max")  # ranks may hold parts of them
        for name, found in zip(state, odd.tolist(), strict=True):
            if found:
                self._stop(trainer, f"{name} holds numbers that are not finite")

    def _stop(self, trainer: Trainer, found: str) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else 0.0
        step = trainer.fit_loop.total_batch_idx + 1
        raise ValueError(
            f"{self.what} diverged at batch {step} with learning rate {rate:g}: {found}; try a "
            "lower optim.lr, a longer warm-up or optim.clip (what stood at the last border of an "
            "epoch is kept)"
        )


class PlainSignals(Callback):
    """Leaves SIGTERM to the handler that was there before the trainer.

    Lightning's own waits for the other ranks inside the signal, where they may wait for this one.
    """

    def __init__(self) -> None:
        self.handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put it back; the trainer registered its own just before."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.handler)


class KeepWeights(Callback):
    """Writes the weights of every few epochs, as a series to average over."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write those of the epoch that ended, where it is time."""
        if (trainer.current_epoch + 1) % self.every:
            return
        state = whole(pl_module.state_dict(), trainer.is_global_zero)
        if trainer.is_global_zero:
            name = f"weights-{trainer.global_step:08d}.safetensors"
            save_weights(self.folder / name, state, dict(pl_module.hparams["config"]))


class TrainingProgress(Callback):
    """Counts the batches of a training over all virtual epochs.

    Args:
        what: name of the stage.
        total: batches of the whole training.
        write: gets the plain lines.
        style: see `Counter`.
    """

    def __init__(self, what: str, total: int, write: Say, style: str) -> None:
        self.what, self.total, self.write, self.style = what, total, write, style
        self.counter: Counter | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count where the training begins or resumes."""
        if trainer.is_global_zero:
            done = trainer.fit_loop.total_batch_idx + 1
            self.counter = Counter(self.what, self.total, self.write, self.style, done)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any
    ) -> None:
        """Count a batch."""
        if self.counter is not None:
            done = trainer.fit_loop.total_batch_idx + 1
            loss = trainer.logged_metrics.get("train/loss")
            self.counter.update(done, "" if loss is None else f"loss {float(loss):.3f}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar away."""
        if self.counter is not None:
            self.counter.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: Any) -> None:
        """Take the bar away."""
        self.on_train_end(trainer, pl_module)


def fit(
    module: LightningModule,
    data: LightningDataModule,
    loop: Loop,
    folder: Path,
    *,
    what: str,
    machine: Machine,
    log: Log,
    monitor: Monitor | None = None,
    adversarial: bool = False,
) -> None:
    """Train `module` in place; what an interrupted call left in `folder` is taken up again.

    Budgets are counted in batches: virtual epochs of equally many, never Lightning's steps, of
    which a GAN makes two per batch.

    Args:
        module: what is trained.
        data: gives virtual epochs of `loop.length` batches.
        loop: how long.
        folder: receives resume.ckpt at every border of an epoch, and the curves.
        what: name of the stage, for the progress and its logger.
        machine: on what.
        log: gets lines of progress.
        monitor: what is watched.
        adversarial: the module optimizes by hand with parameters that one optimizer leaves unused.
    """
    monitor = monitor or Monitor()
    options = dict(machine.trainer)
    if options.pop("compile", False):
        missing = missing_compiler(machine.device)
        if missing:
            log.note(f"trainer.compile has no effect: {missing} not here")
        else:
            compile_blocks(module)
    if options.pop("checkpoint_activations", False):
        recompute_blocks(module)
    strategy = strategy_of(options.pop("strategy", "auto"), loop.world, adversarial)
    precision: Any = loop.precision
    if precision == "auto":
        precision = "bf16-mixed" if machine.device == "cuda" else "32-true"
    attempt = len(list((folder / "log").glob("*/metrics.csv")))
    loggers: list[Logger] = [CSVLogger(folder, "log", f"{attempt:03d}")]
    if what in machine.loggers:
        loggers.append(machine.loggers[what])
    checkpoint = ModelCheckpoint(
        folder,
        RESUME.removesuffix(".ckpt"),
        every_n_epochs=1,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    kept = [KeepWeights(folder, monitor.keep_every)] if monitor.keep_every else []
    trainer = Trainer(
        max_epochs=loop.epochs,
        limit_train_batches=loop.length,
        limit_val_batches=monitor.val_batches,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        accumulate_grad_batches=loop.accumulate,
        strategy=strategy,
        precision=precision,
        log_every_n_steps=monitor.log_every,
        logger=loggers,
        callbacks=[
            checkpoint,
            TrainingProgress(what, loop.epochs * loop.length, log.say, log.style),
            Divergence(what, monitor.log_every, adversarial),
            PlainSignals(),
            *kept,
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        plugins=[WholeCheckpoints()],
        **options,
    )
    resume = folder / RESUME
    if resume.exists() and not whole_zip(resume):
        log.note(f"{resume} is damaged; {what} begins anew")
        resume.unlink()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume if resume.exists() else None)
    except RuntimeError as error:
        if loop.world > 1 and LOST.search(str(error)):
            raise ValueError(
                f"{what}: another process of this training ended; its own message says why, and "
                "the same command resumes at the last border of an epoch"
            ) from error
        raise
    if trainer.interrupted:
        raise KeyboardInterrupt


def strategy_of(name: str, world: int, adversarial: bool) -> Any:
    """Return Lightning's strategy for one of `trainer.strategy`.

    A first stage leaves the parameters of one network unused in either step, and is small: it is
    never sharded.
    """
    if name == "fsdp" and not adversarial:
        # one file, which any number of devices can read
        return ModelParallelStrategy(world, 1, save_distributed_checkpoint=False)
    if name == "auto":
        name = "auto" if world == 1 else "ddp"
    return "ddp_find_unused_parameters_true" if adversarial and name in ("ddp", "fsdp") else name


def whole_zip(path: Path) -> bool:
    """Say whether a checkpoint is a zip file whose every entry has its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # whatever zipfile and its decompressors make of what they find
        return False


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the logged curves of a training from the CSVs of all its attempts.

    Where a later attempt repeats the steps after a border, its values replace the earlier ones.

    Returns:
        {"train/loss": [(step, value), ...], "val/loss": ..., ...}.
    """
    values: dict[str, dict[int, float]] = {}
    for path in sorted((folder / "log").glob("*/metrics.csv")):
        with open(path, newline="", errors="replace") as f:
            for row in csv.DictReader(line.replace("\0", "") for line in f):
                with suppress(KeyError, TypeError, ValueError):  # a kill left half a line
                    step = int(row.pop("step"))
                    for name, value in row.items():
                        if value and name != "epoch":
                            values.setdefault(name, {})[step] = float(value)
    return {name: sorted(points.items()) for name, points in values.items()}
