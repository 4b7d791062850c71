"""Virtual epochs repeat exactly, ranks share the data, validation is exact and kept apart."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import data.select
from data.config import DataConfig
from data.select import pictures
from data.shards import write_shards
from data.sources import find_shards, write_embedded
from data.view import Order, View
from data.webdata import WebData
from tests import planted


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


def web(shards: str, view: View | None = None, order: Order | None = None, **options) -> WebData:
    """Train and validate on the same shards."""
    train, val = (find_shards(shards, shards, split) for split in ("train", "val"))
    defaults = {"batch_size": 4, "seed": 0, "epoch_batches": 5, "val_batches": 50}
    order = order or Order(workers=0, shuffle_buffer=20)
    return WebData(train, val, view or View(8), order, **{**defaults, **options})


def keys(loader) -> list[list[str]]:
    return [batch["key"] for batch in loader]


@pytest.mark.parametrize("workers", [0, 3])
def test_an_epoch_is_a_function_of_its_seed(shards: str, workers: int) -> None:
    order = Order(workers, shuffle_buffer=20)
    data = web(shards, order=order)
    first = keys(data.stream(epoch=1))
    assert [len(batch) for batch in first] == [4] * 5
    assert first == keys(web(shards, order=order).stream(epoch=1))
    assert first != keys(data.stream(epoch=0))
    assert first != keys(data.stream(epoch=1, rank=1, world=2))
    assert first != keys(web(shards, order=order, seed=1).stream(epoch=1))


def test_random_crops_and_flips_repeat_too(shards: str) -> None:
    view = View(8, crop="random", flip=True)
    one, two = (torch.cat([b["image"] for b in web(shards, view).stream(2)]) for _ in range(2))
    assert torch.equal(one, two)
    plain = web(shards, replace(view, flip=False)).stream(2)
    assert not torch.equal(one, torch.cat([b["image"] for b in plain]))


def test_ranks_and_workers_see_all_good_keys_once_in_one_pass(shards: str) -> None:
    data = web(shards, order=Order(1, 0), batch_size=13, epoch_batches=5)
    seen = [keys(data.stream(0, rank, 2)) for rank in range(2)]
    flat = [{key for batch in rank for key in batch} for rank in seen]
    assert flat[0].isdisjoint(flat[1])
    assert len(flat[0] | flat[1]) == 130


def test_fewer_shards_than_workers_and_fewer_batches_than_workers(tmp_path: Path) -> None:
    write_shards(made_samples(6), tmp_path, 6)
    loader = web(str(tmp_path), order=Order(3, 1000), epoch_batches=2).stream()
    assert len(loader) == 2
    assert [len(batch) for batch in keys(loader)] == [4, 4]


def test_batches_hold_what_the_shards_hold(shards: str) -> None:
    made = made_samples(130)
    for batch in web(shards).stream():
        assert batch["image"].dtype == torch.float32
        for i, label in enumerate(batch["label"].tolist()):
            expected = torch.from_numpy(made[label]["image"]).permute(2, 0, 1) / 127.5 - 1
            torch.testing.assert_close(batch["image"][i], expected)
            assert batch["caption"][i] == f"number {label}"
            assert batch["key"][i] == f"{label:06d}"


def test_the_global_generator_is_left_alone(shards: str) -> None:
    before = torch.get_rng_state()
    keys(web(shards).stream())
    assert torch.equal(before, torch.get_rng_state())


def test_what_workers_skip_reaches_the_main_process(tmp_path: Path) -> None:
    shard = Path(write_shards(made_samples(20), tmp_path, 20)[0])
    planted.tar(shard, {"x.png": b"junk", "x.txt": b"junk"}, "a")
    counts = []
    for workers in (0, 2):
        data = web(str(shard), order=Order(workers, 0), batch_size=21, epoch_batches=4)
        assert all("skipped" not in batch for batch in data.stream())
        counts.append(data.skipped)
    assert counts[0] == counts[1]
    assert counts[0]["corrupt image"] in (3, 4, 5)
    assert counts[0]["seen"] == 84 + counts[0]["corrupt image"]
    assert sum(map(len, keys(data.val_stream()))) == 20
    with pytest.raises(ValueError, match="1 of 21 samples were skipped"):
        web(str(shard), max_skipped=0.01).val_stream()


def test_a_stream_of_bad_samples_ends_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    planted.tar(path, {"x.png": b""})
    with pytest.raises(ValueError, match=r"samples were skipped: 499 no image.*raise max_skipped"):
        keys(web(str(path)).stream())
    with pytest.raises(ValueError, match="1 of 1 samples were skipped"):
        web(str(path)).val_stream()


def test_validation_is_exact_and_in_order(shards: str) -> None:
    batched = keys(web(shards).val_dataloader())
    assert [key for batch in batched for key in batch] == [f"{i:06d}" for i in range(130)]
    assert [len(batch) for batch in batched] == [4] * 31 + [3] * 2
    limited = web(shards, val_batches=3)
    assert [key for b in keys(limited.val_stream()) for key in b] == [f"{i:06d}" for i in range(12)]
    limited.val = replace(limited.val, limit=7)
    assert [len(b) for b in keys(limited.val_stream(0, 2))] == [4]
    assert web(shards, val_batches=0).val_dataloader() == []
    data = WebData(limited.train, None, View(8), Order(), batch_size=4, val_batches=3)
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match="no validation split"):
        data.val_stream()
    with pytest.raises(ValueError, match="a training split has no limit, got limit=7"):
        WebData(limited.val, None, View(8), Order(), batch_size=4)


def test_a_rank_decodes_only_what_it_validates_and_only_once(shards: str, monkeypatch) -> None:
    decoded: list[int] = []
    decode = data.select.decode_image
    monkeypatch.setattr(
        data.select, "decode_image", lambda *a, **o: (decoded.append(1), decode(*a, **o))[1]
    )
    web_data = web(shards, val_batches=3)
    first, again = (keys(web_data.val_stream(1, 4)) for _ in range(2))
    assert first == again == [[f"{i:06d}" for i in range(n, n + 16, 4)] for n in (1, 17, 33)]
    assert len(decoded) == 12


@given(count=st.integers(1, 60), size=st.integers(1, 9), world=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_ranks_share_validation_without_repeats(shards, count: int, size: int, world: int) -> None:
    web_data = web(shards, batch_size=size, val_batches=60)
    web_data.val = replace(web_data.val, limit=count)
    if count < world:
        with pytest.raises(ValueError, match="cannot be shared"):
            web_data.val_stream(0, world)
        return
    ranks = [web_data.val_stream(rank, world) for rank in range(world)]
    steps = min(-(-count // (size * world)), count // world)  # none more than needed
    assert {len(rank) for rank in ranks} == {steps}
    batches = [batch for rank in ranks for batch in keys(rank)]
    assert sorted(key for batch in batches for key in batch) == [f"{i:06d}" for i in range(count)]
    assert all(0 < len(batch) for batch in batches)


def test_held_out_keys_never_occur_in_training(shards: str) -> None:
    train, val = (find_shards(shards, None, split) for split in ("train", "val"))
    data = WebData(train, val, View(8), Order(), batch_size=10, epoch_batches=40, val_batches=99)
    held = {key for batch in keys(data.val_stream()) for key in batch}
    seen = {key for batch in keys(data.stream()) for key in batch}
    assert held and held.isdisjoint(seen)
    assert held | seen == {f"{i:06d}" for i in range(130)}
    assert {s["key"] for s in pictures(train, View(8))} == seen


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


def test_settings_give_a_view() -> None:
    config = DataConfig(
        shards="x",
        resolution=16,
        crop="adm",
        flip=True,
        seed=3,
        min_size=20,
    )
    assert config.view() == View(16, "adm", True, 3, 20)


def test_scenes_train_and_validate(tmp_path: Path) -> None:
    train, val = (
        write_embedded(tmp_path / split, "scenes", split, size, 0, 16, 2)
        for split, size in (("train", 300), ("val", 12))
    )
    data = WebData(train, val, View(16), Order(), batch_size=4, epoch_batches=2, val_batches=9)
    for loader, count in ((data.stream(), 2), (data.val_stream(), 3)):
        assert [batch["image"].shape for batch in loader] == [(4, 3, 16, 16)] * count


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


def test_a_run_resumed_at_the_border_of_an_epoch_sees_the_same(shards: str, tmp_path: Path) -> None:
    whole = Recorder()
    trainer(3, tmp_path / "whole").fit(whole, datamodule=web(shards))
    first, second = Recorder(), Recorder()
    trainer(1, tmp_path / "parts").fit(first, datamodule=web(shards))
    data = web(shards)
    last = str(tmp_path / "parts" / "last.ckpt")
    trainer(3, tmp_path / "parts").fit(second, datamodule=data, ckpt_path=last)
    assert [epoch for epoch, _ in whole.seen] == [0] * 5 + [1] * 5 + [2] * 5
    assert first.seen + second.seen == whole.seen
    assert torch.equal(whole.weight, second.weight)
    assert data.skipped["seen"] > 40
