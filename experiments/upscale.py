"""The super-resolution stage of a run: pairs of tokens, its training, and both stages in one file.

Everything is made from pictures at the larger resolution: their own tokens, and those of the same
pictures reduced by area averaging, which are what the base would have made of them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from lightning import seed_everything
from torch import Tensor

from data.config import DataConfig
from data.tokens import TokenData, cache_settings, write_token_cache
from data.webdata import WebData, prepare
from experiments.config import MuseRun, resolved
from experiments.stages import high_data, on_machine, sections
from experiments.training import CachedData, fit
from lightning_modules.common.checkpoint import file_hash, load_weights, save_weights
from lightning_modules.muse.module import MuseModule, SuperResModule
from lightning_modules.registry import load_generator, load_tokenizer

if TYPE_CHECKING:
    from experiments.work import Work

CHECKPOINT, OWN, HIGH = "checkpoint.safetensors", "superres.safetensors", "high.safetensors"


class PairData(CachedData):
    """Batches of high-res tokens with those of the reduced pictures under `low`.

    Args:
        folder: what `write_pairs` wrote.
        web: the pictures, for validation.
        expect: settings that the two caches must have been made with.
        **arguments: as `CachedData` takes them.
    """

    def __init__(
        self, folder: Path, web: WebData, expect: dict[str, dict[str, Any]], **arguments: Any
    ) -> None:
        super().__init__(folder / "high", web, expect=expect["high"], **arguments)
        # the same shards in the same order, and the same seed: the same samples
        self.low = TokenData(folder / "low", expect=expect["low"], **arguments)

    def batch(self, positions: np.ndarray) -> dict[str, Any]:
        """Return the samples at positions [B] of the endless list of permutations."""
        low = self.low.batch(positions)
        return {**super().batch(positions), "low": low["tokens"]}


def upscale(work: Work, config: MuseRun, generator: Path, codec: Path) -> Path:
    """Train the super-resolution stage and return the folder of a checkpoint with both stages.

    Args:
        work: the run.
        config: its settings.
        generator: folder of the trained base.
        codec: file of the base's tokenizer.
    """
    low = {
        "real": "the pictures' own low-res tokens",
        "predicted": f"low-res tokens of which up to {config.superres.low_rate:.0%} were predicted "
        "by the base",
    }
    work.notes.append(f"super-resolution was trained with {low[config.superres.low]}")
    own = codec if config.superres.tokenizer is None else Path(config.superres.tokenizer)
    data, splits, pairs = write_pairs(work, config, codec, own)
    trained = train(work, config, generator, codec, own, data, splits, pairs)
    if not work.store.leader:
        return trained
    return join(work, generator, trained, codec, own)


def write_pairs(
    work: Work, config: MuseRun, codec: Path, own: Path
) -> tuple[DataConfig, dict[str, list[str]], Path]:
    """Draw the data at the larger resolution and encode it twice, where data.cache says so."""
    data = high_data(config)

    def make(folder: Path) -> dict[str, Any]:
        splits = prepare(data, folder, work._note)
        if not config.data.cache:
            return {}
        tokenizer, high = (load_tokenizer(path, work.device) for path in (codec, own))

        def low(images: Tensor) -> Tensor:
            return tokenizer.encode(
                F.interpolate(images, scale_factor=1 / config.superres.factor, mode="area")
            )

        what: dict[str, Any] = {"batch_size": config.eval.batch_size, "device": work.device}
        expected = _expected(config, data, codec, own, tokenizer.num_codes, high.num_codes)
        for name, encode in (("high", high.encode), ("low", low)):
            write_token_cache(
                encode, data, splits, folder / name, sha256=expected[name]["tokenizer"],
                num_codes=expected[name]["num_codes"], progress=work._note, **what,
            )  # fmt: skip
        return {"resolution": data.resolution}

    folder = work._stage("pairs", make)
    return data, prepare(data, folder), folder


def _expected(
    config: MuseRun, data: DataConfig, codec: Path, own: Path, codes: int, high_codes: int
) -> dict[str, dict[str, Any]]:
    """Settings that name the two caches; the low one is of reduced pictures."""
    return {
        "high": cache_settings(data, file_hash(own), high_codes),
        "low": cache_settings(data, f"{file_hash(codec)}/{config.superres.factor}", codes),
    }


def train(
    work: Work,
    config: MuseRun,
    generator: Path,
    codec: Path,
    own: Path,
    data: DataConfig,
    splits: dict[str, list[str]],
    pairs: Path,
) -> Path:
    """Train the stage on pairs of tokens, or on pictures that are encoded in every step."""
    trainer = on_machine(config, config.superres_trainer)

    def make(folder: Path) -> dict[str, Any]:
        tokenizer, high = load_tokenizer(codec), load_tokenizer(own)
        base = load_generator(generator / CHECKPOINT, codec)
        assert isinstance(base, MuseModule)
        side = config.data.resolution // tokenizer.factor
        high_side = data.resolution // high.factor
        seed_everything(config.seed, verbose=False)
        module = SuperResModule(
            {
                "paper": work.paper,
                "seed": config.seed,
                "grid": [side, side],
                "num_codes": tokenizer.num_codes,
                "high": {"grid": [high_side, high_side], "num_codes": high.num_codes},
                **sections(config),
                "superres": resolved(config.superres),
                "sampling": resolved(config)["sampling"],
            }
        )
        module.attach(high)
        module.attach_low(tokenizer, base if config.superres.low == "predicted" else None)
        length = trainer.epochs[1]
        web = WebData(
            data, splits, batch_size=trainer.batch_size, seed=config.seed, epoch_batches=length
        )
        source: Any = web
        if config.data.cache:
            codes = (tokenizer.num_codes, high.num_codes)
            source = PairData(
                pairs, web, _expected(config, data, codec, own, *codes), seed=config.seed,
                batch_size=trainer.batch_size, epoch_batches=length,
            )  # fmt: skip
        fit(module, source, trainer, folder, what="superres", say=work.say)
        if work.store.leader:
            save_weights(folder / OWN, *module.export())
        return {"parameters": sum(p.numel() for p in module.parameters())}

    return work._stage("superres", make, everyone=True)


def join(work: Work, generator: Path, trained: Path, codec: Path, own: Path) -> Path:
    """Put both stages into one checkpoint, beside the tokenizers that it needs."""

    def make(folder: Path) -> dict[str, Any]:
        state, settings = load_weights(generator / CHECKPOINT)
        stage, its = load_weights(trained / OWN)
        high = dict(its["high"])
        shutil.copyfile(codec, folder / work.codec_name)
        if own != codec:
            shutil.copyfile(own, folder / HIGH)
            high["tokenizer"] = {"file": HIGH, "sha256": file_hash(own)}
        save_weights(
            folder / CHECKPOINT,
            {**state, **{f"superres.{name}": tensor for name, tensor in stage.items()}},
            {**settings, "superres": its["superres"], "high": high},
        )
        return {"parameters": sum(t.numel() for t in [*state.values(), *stage.values()])}

    return work._stage("joined", make)
