"""One training through Lightning: virtual epochs, a checkpoint at each border, resumable."""

import csv
import os
import signal
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader

from data.tokens import TokenData
from data.webdata import WebData
from experiments.config import RunSettings, TrainerConfig, UserError
from experiments.progress import Say, TrainingProgress
from lightning_modules.common.checkpoint import save_weights

RESUME = "resume.ckpt"

# DDP doubts the layout of channels-last gradients; it copies them, which is what is meant here
warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints that appear whole or not at all.

    Lightning's own writer moves them from the system's folder for temporary files, which is a copy
    where that lies on another disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write beside the target, then rename."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")
        torch.save(checkpoint, temporary)
        os.replace(temporary, path)


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
        if (trainer.current_epoch + 1) % self.every == 0 and trainer.is_global_zero:
            name = f"weights-{trainer.global_step:08d}.safetensors"
            save_weights(
                self.folder / name, pl_module.state_dict(), dict(pl_module.hparams["config"])
            )


def end_with_parent(pause: float = 1.0) -> None:
    """End this process soon after the one that started it.

    A rank that another started would otherwise wait for ever for one that was killed.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(pause)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class CachedData(TokenData):
    """Trains on cached tokens, validates on the pictures of the val split."""

    def __init__(self, folder: Path, web: WebData, **arguments: Any) -> None:
        super().__init__(folder, **arguments)
        self.web = web

    def val_dataloader(self) -> DataLoader:
        """Return this rank's part of the validation pictures."""
        self.web.trainer = self.trainer
        return self.web.val_dataloader()


def device_of(config: TrainerConfig) -> torch.device:
    """Return where a single process samples and scores.

    Raises:
        UserError: this machine has no such device.
    """
    wanted = config.accelerator
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(wanted, True):
        raise UserError(f"trainer.accelerator={wanted}: this machine shows none; use cpu or auto")
    if wanted in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if wanted in ("auto", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def wandb_logger(config: RunSettings, paper: str, scale: str, out: Path) -> WandbLogger | None:
    """Return the W&B logger of a run: offline where there is no key, None with logger=csv."""
    if config.logger != "wandb":
        return None
    import wandb

    from experiments.settings import resolved

    os.environ.setdefault("WANDB_SILENT", "true")
    mode = os.environ.get("WANDB_MODE")  # the user's own word goes first
    if mode is None and not wandb.login(prompt=False):
        mode = "offline"
    out.mkdir(parents=True, exist_ok=True)
    return WandbLogger(
        project=os.environ.get("WANDB_PROJECT", "tokengrid"),
        name=None if "WANDB_SWEEP_ID" in os.environ else out.name,
        group=paper,
        job_type="train",
        tags=[scale, config.data.name],
        save_dir=str(out),
        config=resolved(config),
        mode=mode,  # WandbLogger(offline=True) sets a mode that wandb no longer knows
    )


def fit(
    module: LightningModule,
    data: LightningDataModule,
    config: TrainerConfig,
    folder: Path,
    *,
    what: str,
    say: Say,
    loggers: Sequence[Logger] = (),
    two_players: bool = False,
) -> None:
    """Train `module` in place; what an interrupted call left in `folder` is taken up again.

    Budgets are counted in batches: `max_epochs` virtual epochs of equally many, never Lightning's
    steps, of which a GAN makes two per batch.

    Args:
        module: what is trained.
        data: gives virtual epochs of `config.epochs[1]` batches.
        config: how long and on what machine.
        folder: receives resume.ckpt at every border of an epoch, and the curves.
        what: name of the stage, for the progress.
        say: gets lines of progress.
        loggers: besides the CSV in the folder.
        two_players: the module optimizes by hand with parameters that one player leaves unused.
    """
    epochs, length = config.epochs
    strategy = config.strategy
    if strategy == "auto" and config.world_size > 1:
        strategy = "ddp"
    if strategy == "ddp" and two_players:
        strategy = "ddp_find_unused_parameters_true"
    precision = config.precision
    if precision == "auto":
        precision = "bf16-mixed" if device_of(config).type == "cuda" else "32-true"
    attempt = len(list((folder / "log").glob("*/metrics.csv")))
    if config.compile:
        module.compile()
    trainer = Trainer(
        max_epochs=epochs,
        limit_train_batches=length,
        limit_val_batches=config.val_batches,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        accumulate_grad_batches=config.accumulate,
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=strategy,
        precision=precision,
        log_every_n_steps=config.log_every,
        logger=[CSVLogger(folder, "log", f"{attempt:03d}"), *loggers],
        callbacks=[
            ModelCheckpoint(
                folder, RESUME.removesuffix(".ckpt"), every_n_epochs=1,
                save_on_train_epoch_end=True, enable_version_counter=False,
            ),
            TrainingProgress(what, epochs * length, say, config.progress),
            PlainSignals(),
            *([KeepWeights(folder, config.keep_every)] if config.keep_every else []),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        plugins=[WholeCheckpoints()],
    )  # fmt: skip
    resume = folder / RESUME
    trainer.fit(module, datamodule=data, ckpt_path=resume if resume.exists() else None)
    if trainer.interrupted:
        raise KeyboardInterrupt


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the logged curves of a training from the CSVs of all its attempts.

    Where a later attempt repeats the steps after a border, its values replace the earlier ones.

    Returns:
        {"train/loss": [(step, value), ...], "val/loss": ..., ...}.
    """
    values: dict[str, dict[int, float]] = {}
    for path in sorted((folder / "log").glob("*/metrics.csv")):
        with open(path, newline="") as f:
            for row in csv.DictReader(f):
                step = int(row.pop("step"))
                for name, value in row.items():
                    if value and name != "epoch":
                        values.setdefault(name, {})[step] = float(value)
    return {name: sorted(points.items()) for name, points in values.items()}
