"""The token cache is exact and resumable; its order is a pure function of seed, epoch and rank."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from torch import Tensor

from data.shards import write_shards
from data.tokens import TokenData, cache_settings, count_tokens, write_token_cache
from data.webdata import DataConfig, WebData, prepare

COUNT = 23


def encode(images: Tensor) -> Tensor:
    """Tokens [B, 4, 4]: the red value of every other pixel."""
    return ((images[:, 0, ::2, ::2] + 1) * 127.5).round().long()


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, 8, 8, 3)).astype(np.uint8)
    folder = tmp_path_factory.mktemp("shards")
    samples = [
        {"key": f"{i:04d}", "image": image, "caption": f"number {i}", "label": i}
        for i, image in enumerate(images)
    ]
    write_shards(samples, folder, 6)
    return DataConfig(shards=str(folder), val_shards=str(folder), resolution=8, workers=0)


def write(config: DataConfig, folder: Path, function=encode, sha256="abc", **options) -> dict:
    splits = prepare(config, folder)
    settings = {"sha256": sha256, "num_codes": 256, "batch_size": 4, **options}
    return write_token_cache(function, config, splits, folder, **settings)


@pytest.fixture(scope="module")
def cache(config: DataConfig, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write(config, folder)
    return folder


def batches(data: TokenData, **where) -> list[dict]:
    return list(data.stream(**where))


def test_codes_are_counted(config: DataConfig, cache: Path, tmp_path: Path) -> None:
    counts = count_tokens(cache, 256, "abc")
    data = TokenData(cache, batch_size=COUNT, epoch_batches=1)
    expected = np.bincount(data.tokens.astype(np.int64).ravel(), minlength=256)
    assert counts.tolist() == expected.tolist() and counts.sum() == COUNT * 16
    write(replace(config, flip=True), tmp_path)
    assert count_tokens(tmp_path, 256).sum() == 2 * COUNT * 16
    for wrong in ((cache, 200), (cache, 256, "abd")):
        with pytest.raises(ValueError, match="another tokenizer, of 256 codes"):
            count_tokens(*wrong)
    with pytest.raises(ValueError, match=r"no finished cache .* no cache\.json"):
        count_tokens(tmp_path / "none", 256)


def test_tokens_are_what_the_tokenizer_says(config: DataConfig, cache: Path) -> None:
    data = TokenData(cache, batch_size=COUNT, epoch_batches=1)
    assert data.tokens.dtype == np.uint16 and len(data) == COUNT
    truth = {
        s["key"]: s for s in WebData(config, prepare(config, cache), batch_size=1).samples("val")
    }
    (batch,) = batches(data)
    assert batch["tokens"].dtype == torch.int64
    assert sorted(batch["key"]) == sorted(truth)
    for i, key in enumerate(batch["key"]):
        assert torch.equal(batch["tokens"][i], encode(truth[key]["image"][None])[0])
        assert batch["caption"][i] == truth[key]["caption"]
        assert batch["label"][i] == truth[key]["label"]


def test_a_finished_shard_is_not_encoded_again(config: DataConfig, tmp_path: Path) -> None:
    calls = []

    def counting(images: Tensor) -> Tensor:
        calls.append(len(images))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode(images)

    with pytest.raises(KeyboardInterrupt):
        write(config, tmp_path, counting)
    assert not (tmp_path / "cache.json").exists()
    assert sum(calls) == 16  # two shards of 6 and the first 4 of the third
    with pytest.raises(ValueError, match="no finished token cache"):
        TokenData(tmp_path, batch_size=1)
    told: list[str] = []
    summary = write(config, tmp_path, counting, progress=told.append)
    assert told == ["shard 3 of 4: 6 images encoded", "shard 4 of 4: 5 images encoded"]
    assert sum(calls[5:]) == 11 and summary["count"] == COUNT and summary["shards"] == 4
    write(config, tmp_path, counting)
    assert sum(calls[5:]) == 11
    write(config, tmp_path, counting, sha256="other tokenizer")
    assert sum(calls[5:]) == 11 + COUNT


def test_a_shard_that_changed_is_encoded_again(config: DataConfig, tmp_path: Path) -> None:
    own = replace(config, shards=str(tmp_path / "own"), val_shards=str(tmp_path / "own"))
    image = np.zeros((8, 8, 3), np.uint8)
    made = [{"key": str(i), "image": image, "caption": "x"} for i in range(9)]
    write_shards(made[:5], tmp_path / "own", 9)
    assert write(own, tmp_path / "cache")["count"] == 5
    write_shards(made, tmp_path / "own", 9)
    assert write(own, tmp_path / "cache")["count"] == 9


def test_a_cache_of_other_settings_is_refused(config: DataConfig, cache: Path) -> None:
    TokenData(cache, batch_size=1, expect=cache_settings(config, "abc", 256))
    with pytest.raises(ValueError, match=r"made with tokenizer='abc', not 'xyz'"):
        TokenData(cache, batch_size=1, expect=cache_settings(config, "xyz", 256))
    with pytest.raises(ValueError, match=r"made with resolution=8, not 16"):
        TokenData(
            cache, batch_size=1, expect=cache_settings(replace(config, resolution=16), "abc", 256)
        )


def test_damage_is_noticed(config: DataConfig, tmp_path: Path) -> None:
    write(config, tmp_path)
    summary = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps({**summary, "count": COUNT + 1}))
    with pytest.raises(ValueError, match="is damaged"):
        TokenData(tmp_path, batch_size=1)


def test_a_token_outside_the_codebook_is_refused(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="outside the 100 codes"):
        write(config, tmp_path, num_codes=100)


def test_large_codebooks_take_four_bytes(config: DataConfig, tmp_path: Path) -> None:
    write(config, tmp_path, lambda images: encode(images) + 70_000, num_codes=2**18)
    data = TokenData(tmp_path, batch_size=4)
    assert data.tokens.dtype == np.int32
    assert batches(data)[0]["tokens"].min() >= 70_000


@given(
    size=st.integers(1, 7),
    world=st.integers(1, 3),
    epoch_batches=st.integers(1, 9),
    epochs=st.integers(1, 4),
)
def test_passes_are_permutations_shared_by_the_ranks(cache, size, world, epoch_batches, epochs):
    data = TokenData(cache, batch_size=size, seed=5, epoch_batches=epoch_batches)

    def keys(rank: int) -> list[list[str]]:
        loaders = [data.stream(epoch, rank, world) for epoch in range(epochs)]
        return [batch["key"] for loader in loaders for batch in loader]

    ranks = [keys(rank) for rank in range(world)]
    assert all(len(rank) == epochs * epoch_batches for rank in ranks)
    # all ranks' batches together, laid end to end, go through the samples pass by pass
    flat = [
        rank[b][i] for b in range(epochs * epoch_batches) for i in range(size) for rank in ranks
    ]
    for start in range(0, len(flat), COUNT):
        part = flat[start : start + COUNT]
        assert len(set(part)) == len(part)


def test_order_depends_on_seed_and_pass_alone(cache: Path) -> None:
    def keys(seed: int, epoch: int) -> list[str]:
        data = TokenData(cache, batch_size=COUNT, seed=seed, epoch_batches=1)
        return batches(data, epoch=epoch)[0]["key"]

    assert keys(0, 3) == keys(0, 3)
    assert keys(0, 3) != keys(0, 4)
    assert keys(0, 3) != keys(1, 3)


def test_mirrored_tokens_are_used_about_half_the_time(config: DataConfig, tmp_path: Path) -> None:
    config = replace(config, flip=True)
    write(config, tmp_path)
    data = TokenData(tmp_path, batch_size=COUNT, epoch_batches=8)
    web = WebData(config, prepare(config, tmp_path), batch_size=1)
    truth = {s["key"]: s["image"] for s in web.samples("val")}
    mirrored = 0
    for batch in batches(data):
        for key, tokens in zip(batch["key"], batch["tokens"], strict=True):
            image = truth[key][None]
            flipped = torch.equal(tokens, encode(image.flip(-1))[0])
            assert flipped or torch.equal(tokens, encode(image)[0])
            mirrored += flipped
    assert 0.35 * 8 * COUNT < mirrored < 0.65 * 8 * COUNT
    again = TokenData(tmp_path, batch_size=COUNT, epoch_batches=8)
    for one, two in zip(batches(data), batches(again), strict=True):
        assert torch.equal(one["tokens"], two["tokens"])


def test_random_crops_freeze_by_key(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (8, 40, 3)).astype(np.uint8)
    write_shards(
        [{"key": str(i), "image": image, "caption": "x"} for i in range(8)], tmp_path / "s", 8
    )
    own = str(tmp_path / "s")
    config = DataConfig(shards=own, val_shards=own, resolution=8, crop="random")
    write(config, tmp_path / "one")
    write(config, tmp_path / "two")
    one, two = (TokenData(tmp_path / name, batch_size=1).tokens for name in ("one", "two"))
    np.testing.assert_array_equal(one, two)
    assert len(np.unique(one, axis=0)) > 3


def test_held_out_samples_are_not_encoded(config: DataConfig, tmp_path: Path) -> None:
    config = replace(config, val_shards=None)
    web = WebData(config, prepare(config, tmp_path), batch_size=1)
    val = {s["key"] for s in web.samples("val")}
    assert write(config, tmp_path)["count"] == COUNT - len(val)
    assert val.isdisjoint(TokenData(tmp_path, batch_size=1).rows["key"].to_pylist())


class Recorder(LightningModule):
    """Remembers the tokens that it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []

    def training_step(self, batch, index: int):
        self.seen.append(batch["key"])
        return (self.weight - batch["tokens"].float().mean()) ** 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-5)


def test_training_resumes_exactly_at_the_border_of_an_epoch(cache: Path, tmp_path: Path) -> None:
    def fit(module: Recorder, epochs: int, ckpt: str | None = None) -> Trainer:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            limit_train_batches=4,
            reload_dataloaders_every_n_epochs=1,
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = TokenData(cache, batch_size=3, epoch_batches=4)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt)
        return trainer

    whole, first, second = Recorder(), Recorder(), Recorder()
    fit(whole, 3)
    fit(first, 2).save_checkpoint(tmp_path / "border.ckpt")
    fit(second, 3, str(tmp_path / "border.ckpt"))
    assert len(whole.seen) == 12
    assert first.seen + second.seen == whole.seen
    assert torch.equal(whole.weight, second.weight)


def moments(images: Tensor) -> Tensor:
    """Moments [B, 4, 4, 4]: red and green of every other pixel, and logarithms of variances."""
    means = images[:, :2, ::2, ::2]
    return torch.cat([means, means * 10 - 20], dim=1)


def test_moments_are_kept_in_half_precision(config: DataConfig, tmp_path: Path) -> None:
    flipped = replace(config, flip=True)
    summary = write(flipped, tmp_path, moments, num_codes=None)
    assert summary["num_codes"] is None and summary["count"] == COUNT
    assert sorted(p.name for p in tmp_path.glob("*.safetensors"))[0] == "00000.moments.safetensors"
    data = TokenData(
        tmp_path, batch_size=COUNT, epoch_batches=4, expect=cache_settings(flipped, "abc", None)
    )
    web = WebData(flipped, prepare(flipped, tmp_path), batch_size=1)
    truth = {s["key"]: s["image"][None] for s in web.samples("val")}
    mirrored = 0
    for batch in batches(data):
        assert "tokens" not in batch and batch["moments"].dtype == torch.float32
        for key, found in zip(batch["key"], batch["moments"], strict=True):
            plain, other = (moments(x)[0].half().float() for x in (truth[key], truth[key].flip(-1)))
            assert torch.equal(found, plain) or torch.equal(found, other)
            mirrored += torch.equal(found, other)
    assert 0.3 * 4 * COUNT < mirrored < 0.7 * 4 * COUNT
    with pytest.raises(ValueError, match="made with num_codes=None, not 256"):
        TokenData(tmp_path, batch_size=1, expect=cache_settings(flipped, "abc", 256))


def test_moments_that_half_precision_cannot_hold_are_refused(
    config: DataConfig, tmp_path: Path
) -> None:
    for wrong in (1e6, float("nan")):
        with pytest.raises(ValueError, match="no finite number of half precision"):
            write(config, tmp_path, lambda x, w=wrong: moments(x) * w, num_codes=None)


def test_what_was_left_out_is_counted_once_however_often_it_resumes(
    config: DataConfig, tmp_path: Path
) -> None:
    config = replace(config, val_shards=None)
    calls = []

    def breaking(images: Tensor) -> Tensor:
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(images)

    with pytest.raises(KeyboardInterrupt):
        write(config, tmp_path / "a", breaking)
    found = [write(config, tmp_path / "a")["skipped"] for _ in range(2)]
    straight = write(config, tmp_path / "b")
    assert found[0] == found[1] == straight["skipped"]
    out = {"seen": COUNT, "filtered: other split": COUNT - straight["count"]}
    assert straight["skipped"] == out and out["filtered: other split"] > 0


def test_rows_are_read_across_files(config: DataConfig, cache: Path) -> None:
    data = TokenData(cache, batch_size=1)
    everything = data.tokens  # [23, 4, 4] of four files
    assert everything.shape == (COUNT, 4, 4)
    where = np.array([22, 0, 5, 6, 6, 18])
    np.testing.assert_array_equal(data.stored[where], everything[where])
