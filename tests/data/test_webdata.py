"""Virtual epochs repeat exactly, ranks share the data, validation is exact and kept apart."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from data.select import holdout_share, is_held_out
from data.shards import write_shards
from data.webdata import DataConfig, ExactBatches, WebData, prepare


def made_samples(count: int) -> list[dict]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    return [
        {"key": f"{i:06d}", "image": image, "caption": f"number {i}", "label": i}
        for i, image in enumerate(images)
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(made_samples(130), folder, 13)
    return str(folder)


@pytest.fixture
def config(shards: str) -> DataConfig:
    return DataConfig(shards=shards, val_shards=shards, resolution=8, shuffle_buffer=20, workers=0)


def web(config: DataConfig, **options) -> WebData:
    defaults = {"batch_size": 4, "seed": 0, "epoch_batches": 5}
    return WebData(config, prepare(config, Path()), **{**defaults, **options})


def keys(loader) -> list[list[str]]:
    return [batch["key"] for batch in loader]


@pytest.mark.parametrize("workers", [0, 3])
def test_an_epoch_is_a_function_of_its_seed(config: DataConfig, workers: int) -> None:
    data = web(replace(config, workers=workers))
    first = keys(data.stream(epoch=1))
    assert [len(batch) for batch in first] == [4] * 5
    assert first == keys(web(replace(config, workers=workers)).stream(epoch=1))
    assert first != keys(data.stream(epoch=0))
    assert first != keys(data.stream(epoch=1, rank=1, world=2))
    assert first != keys(web(replace(config, workers=workers), seed=1).stream(epoch=1))


def test_random_crops_and_flips_repeat_too(config: DataConfig) -> None:
    config = replace(config, crop="random", flip=True)
    one, two = (torch.cat([b["image"] for b in web(config).stream(2)]) for _ in range(2))
    assert torch.equal(one, two)
    plain = torch.cat([b["image"] for b in web(replace(config, flip=False)).stream(2)])
    assert not torch.equal(one, plain)


def test_ranks_and_workers_see_all_good_keys_once_in_one_pass(config: DataConfig) -> None:
    data = web(replace(config, shuffle_buffer=0, workers=1), batch_size=13, epoch_batches=5)
    seen = [keys(data.stream(0, rank, 2)) for rank in range(2)]
    flat = [{key for batch in rank for key in batch} for rank in seen]
    assert flat[0].isdisjoint(flat[1])
    assert len(flat[0] | flat[1]) == 130


def test_fewer_shards_than_workers_and_fewer_batches_than_workers(tmp_path: Path) -> None:
    write_shards(made_samples(6), tmp_path, 6)
    config = DataConfig(shards=str(tmp_path), val_shards=str(tmp_path), resolution=8, workers=3)
    loader = web(config, epoch_batches=2).stream()
    assert len(loader) == 2
    assert [len(batch) for batch in keys(loader)] == [4, 4]


def test_batches_hold_what_the_shards_hold(config: DataConfig) -> None:
    made = made_samples(130)
    for batch in web(config).stream():
        assert batch["image"].dtype == torch.float32
        for i, label in enumerate(batch["label"].tolist()):
            expected = torch.from_numpy(made[label]["image"]).permute(2, 0, 1) / 127.5 - 1
            torch.testing.assert_close(batch["image"][i], expected)
            assert batch["caption"][i] == f"number {label}"
            assert batch["key"][i] == f"{label:06d}"


def test_the_global_generator_is_left_alone(config: DataConfig) -> None:
    before = torch.get_rng_state()
    keys(web(config).stream())
    assert torch.equal(before, torch.get_rng_state())


def test_what_workers_skip_reaches_the_main_process(tmp_path: Path) -> None:
    shard = Path(write_shards(made_samples(20), tmp_path, 20)[0])
    with tarfile.open(shard, "a") as tar:
        for name in ("x.png", "x.txt"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"junk"))
    config = DataConfig(shards=str(shard), val_shards=str(shard), resolution=8, shuffle_buffer=0)
    for workers in (0, 2):
        data = web(replace(config, workers=workers), batch_size=21, epoch_batches=4)
        for batch in data.stream():
            data.on_before_batch_transfer(batch, 0)
            assert "skipped" not in batch
        assert data.skipped["UnidentifiedImageError"] == 4
        assert data.skipped["seen"] == 84 + 4
    assert len(web(config).samples("val")) == 20


def test_a_stream_of_bad_samples_ends_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("x.png"))
    config = DataConfig(shards=str(path), val_shards=str(path), resolution=8, workers=0)
    with pytest.raises(ValueError, match=r"samples were skipped: 499 no image.*raise max_skipped"):
        keys(web(config).stream())
    with pytest.raises(ValueError, match="1 of 1 samples were skipped"):
        web(config).samples("val")


def test_validation_is_exact_and_in_order(config: DataConfig) -> None:
    data = web(config)
    assert [s["key"] for s in data.samples("val")] == [f"{i:06d}" for i in range(130)]
    assert [s["label"] for s in data.samples("val", 7)] == list(range(7))
    limited = web(replace(config, val_size=50))
    assert len(limited.samples("val", 70)) == 50
    batched = [key for batch in keys(limited.val_dataloader()) for key in batch]
    assert batched == [f"{i:06d}" for i in range(50)]
    with pytest.raises(ValueError, match="shards has train, val, not 'heldout'"):
        data.samples("heldout")


@given(count=st.integers(1, 60), size=st.integers(1, 9), world=st.integers(1, 5))
def test_ranks_share_validation_without_repeats(count: int, size: int, world: int) -> None:
    pixels = np.zeros((1, 1, 3), np.uint8)
    samples = [{"key": str(i), "caption": "", "pixels": pixels} for i in range(count)]
    if count < world:
        with pytest.raises(ValueError, match="cannot be shared"):
            ExactBatches(samples, size, 0, world)
        return
    ranks = [ExactBatches(samples, size, rank, world) for rank in range(world)]
    steps = min(-(-count // (size * world)), count // world)  # none more than needed
    assert {len(rank) for rank in ranks} == {steps}
    seen = [key for rank in ranks for batch in rank for key in batch["key"]]
    assert sorted(seen, key=int) == [str(i) for i in range(count)]
    assert all(0 < len(b["key"]) for rank in ranks for b in rank)


def test_held_out_keys_never_occur_in_training(shards: str) -> None:
    config = DataConfig(shards=shards, resolution=8, shuffle_buffer=0, workers=0)
    data = web(config, batch_size=10, epoch_batches=40)
    val = {s["key"] for s in data.samples("val")}
    train = {key for batch in keys(data.stream()) for key in batch}
    assert val and val.isdisjoint(train)
    assert val | train == {f"{i:06d}" for i in range(130)}
    assert {s["key"] for s in data.samples("train")} == train


def test_about_two_percent_are_held_out_and_more_of_small_sets(shards: str, tmp_path) -> None:
    held = sum(is_held_out(f"{i:09d}", 0.02) for i in range(20_000))
    assert 330 < held < 470
    config = DataConfig(shards=shards)
    assert holdout_share(config, prepare(config, tmp_path)) == pytest.approx(16 / 130)
    assert holdout_share(replace(config, val_shards=shards), {"train": []}) == 0
    assert holdout_share(DataConfig(), {"train": []}) == 0


def test_metadata_filters(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    metas = {
        "good": '{"AESTHETIC_SCORE": 6, "pwatermark": 0.1, "punsafe": 0.1}',
        "alias": '{"aesthetic_score_laion_v2": 6, "pwatermark": 0.1, "punsafe": 0.1}',
        "ugly": '{"aesthetic": 4, "pwatermark": 0.1, "punsafe": 0.1}',
        "marked": '{"aesthetic": 6, "pwatermark": 0.9, "punsafe": 0.1}',
        "unsafe": '{"aesthetic": 6, "pwatermark": 0.1, "punsafe": 0.9}',
        "unknown": '{"aesthetic": null}',
        "small": '{"aesthetic": 6, "original_width": 9, "original_height": 3}',
    }
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for key, meta in metas.items():
            for suffix, data in {
                "png": file.getvalue(),
                "txt": b"x",
                "json": meta.encode(),
            }.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

    def kept(**filters) -> list[str]:
        config = DataConfig(shards=str(tmp_path), val_shards=str(tmp_path), resolution=8, **filters)
        return [s["key"] for s in web(config).samples("val")]

    assert kept() == list(metas)
    assert kept(min_aesthetic=5.0) == ["good", "alias", "marked", "unsafe", "small"]
    assert kept(max_pwatermark=0.5) == ["good", "alias", "ugly", "unsafe"]
    assert kept(max_punsafe=0.5) == ["good", "alias", "ugly", "marked"]
    assert kept(min_size=8) == [key for key in metas if key != "small"]
    with pytest.raises(ValueError, match="the val split of shards has no sample"):
        kept(min_size=9_000)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "shards"}, "shards must name"),
        ({"resolution": 4}, "resolution must be at least 8, got 4"),
        ({"max_skipped": 1.0}, r"max_skipped must be in \[0, 1\)"),
        ({"max_objects": 5}, "max_objects must be 2, 3 or 4, got 5"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"flip": True}, "flip must be false for scenes"),
    ],
)
def test_impossible_settings_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DataConfig(**options)
    assert DataConfig(shards="x").name == "shards"


def test_scenes_are_prepared_once_and_again_after_an_interruption(tmp_path: Path) -> None:
    config = DataConfig(train_size=300, val_size=12, heldout_size=10, resolution=16, workers=0)
    told: list[str] = []
    splits = prepare(config, tmp_path, told.append)
    assert told == [f"writing scenes/{s}" for s in ("train", "val", "heldout")]
    assert {s: len(paths) for s, paths in splits.items()} == {"train": 2, "val": 1, "heldout": 1}
    before = {p: Path(p).read_bytes() for paths in splits.values() for p in paths}
    assert prepare(config, tmp_path, told.append) == splits and len(told) == 3
    (tmp_path / "train" / "done.json").unlink()  # as if stopped while writing
    Path(splits["train"][1]).unlink()
    assert prepare(config, tmp_path, told.append) == splits and len(told) == 4
    assert before == {p: Path(p).read_bytes() for p in before}
    prepare(replace(config, seed=1), tmp_path, told.append)
    assert before != {p: Path(p).read_bytes() for p in before}

    data = WebData(config, splits, batch_size=4, seed=0, epoch_batches=2)
    assert len(data.samples("heldout")) == 10
    sample = data.samples("val")[0]
    assert sample["image"].shape == (3, 16, 16) and len(sample["attributes"]["things"]) == 2


class Recorder(LightningModule):
    """Remembers which keys it was trained on in which epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[str]]] = []

    def training_step(self, batch, index: int):
        assert "skipped" not in batch
        self.seen.append((self.current_epoch, batch["key"]))
        return (self.weight - batch["image"].mean()) ** 2

    def validation_step(self, batch, index: int) -> None:
        assert "image" in batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(epochs: int, folder: Path) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=5,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[ModelCheckpoint(folder, save_last=True, every_n_epochs=1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_a_run_resumed_at_the_border_of_an_epoch_sees_the_same(config, tmp_path: Path) -> None:
    whole = Recorder()
    trainer(3, tmp_path / "whole").fit(whole, datamodule=web(config))
    first, second = Recorder(), Recorder()
    trainer(1, tmp_path / "parts").fit(first, datamodule=web(config))
    data = web(config)
    last = str(tmp_path / "parts" / "last.ckpt")
    trainer(3, tmp_path / "parts").fit(second, datamodule=data, ckpt_path=last)
    assert [epoch for epoch, _ in whole.seen] == [0] * 5 + [1] * 5 + [2] * 5
    assert first.seen + second.seen == whole.seen
    assert torch.equal(whole.weight, second.weight)
    assert data.skipped["seen"] > 40
