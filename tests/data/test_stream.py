"""Any number of ranks and workers sees the same global batches, and resumes exactly."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data.cache import Encoder, Encoding, encode_shard, finish_cache
from data.cached import part_names
from data.shards import CHANGED, GONE, write_shards
from data.tokens import TokenData
from data.view import Order, ShardList, View
from data.webdata import WebData
from tests import planted

GLOBAL = 8
SIZES = (13, 1, 7, 4, 18)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> ShardList:
    """43 samples in 5 shards, of which the third holds a corrupt picture besides."""
    folder = tmp_path_factory.mktemp("uneven")
    images = np.random.default_rng(0).integers(0, 256, (sum(SIZES), 8, 12, 3)).astype(np.uint8)
    made = [
        {"key": f"{i:03d}", "image": image, "caption": f"number {i}"}
        for i, image in enumerate(images)
    ]
    paths = []
    for number, size in enumerate(SIZES):
        part, made = made[:size], made[size:]
        paths += write_shards(part, folder / str(number), size)
    planted.tar(Path(paths[2]), {"bad.png": b"junk", "bad.txt": b"junk"}, "a")
    return ShardList(tuple(paths))


def data_of(shards: ShardList, world: int = 1, workers: int = 0, **options) -> WebData:
    view = View(8, crop="random", flip=True)
    options = {"batch_size": GLOBAL // world, "epoch_batches": 4, "max_skipped": 0.9, **options}
    return WebData(shards, None, view, Order(workers, 24), **options)


def global_batches(
    shards: ShardList, world: int, workers: int, epochs: range
) -> list[tuple[list[str], torch.Tensor]]:
    """Return keys and pictures of the batches of all ranks, joined."""
    ranks = []
    for rank in range(world):
        data = data_of(shards, world, workers)
        ranks.append([b for epoch in epochs for b in data.stream(epoch, rank, world)])
    return [
        ([key for part in parts for key in part["key"]], torch.cat([p["image"] for p in parts]))
        for parts in zip(*ranks, strict=True)
    ]


def same(one, two) -> bool:
    return [keys for keys, _ in one] == [keys for keys, _ in two] and all(
        torch.equal(a, b) for (_, a), (_, b) in zip(one, two, strict=True)
    )


def test_ranks_and_workers_only_divide_the_global_batches(uneven: ShardList) -> None:
    """Over three passes, with fewer shards than places; crops and mirrors too."""
    whole = global_batches(uneven, 1, 0, range(5))
    assert len(whole) == 20 > 3 * 43 / GLOBAL
    for world, workers in ((2, 2), (4, 1), (1, 3)):
        assert same(whole, global_batches(uneven, world, workers, range(5)))
    seen = Counter(key for keys, _ in whole for key in keys)
    assert set(seen) == {f"{i:03d}" for i in range(43)}
    assert max(seen.values()) - min(seen.values()) <= 2


def test_without_faults_every_sample_comes_once_in_a_pass(uneven: ShardList) -> None:
    shards = ShardList((*uneven.paths[:2], *uneven.paths[3:]))
    flat = [key for keys, _ in global_batches(shards, 2, 1, range(5)) for key in keys]
    passes = [flat[i * 36 : (i + 1) * 36] for i in range(4)]
    assert all(len(set(part)) == 36 for part in passes)
    assert len({tuple(part) for part in passes}) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_begins_where_its_cursors_say(uneven: ShardList, workers: int) -> None:
    """Kept in a checkpoint, found by reading what comes before, or going on: it is the same."""
    whole = global_batches(uneven, 1, 0, range(4))
    data = data_of(uneven, 1, workers)
    assert len(list(data.stream(0))) + len(list(data.stream(1))) == 8
    state = data.state_dict()
    assert state["epoch"] == 2 and len(state["cursors"]) == GLOBAL
    resumed = data_of(uneven, 1, workers)
    resumed.load_state_dict(state)
    reads = count_reads(resumed)
    later = [(b["key"], b["image"]) for epoch in (2, 3) for b in resumed.stream(epoch)]
    assert same(whole[8:], later)
    if not workers:
        assert reads["rows"] < 100  # four batches of eight, and what the windows hold
    again = [(b["key"], b["image"]) for b in resumed.stream(1)]
    assert same(whole[4:8], again)


def count_reads(data: WebData) -> Counter:
    """Count the rows that are read from here on."""
    counts: Counter = Counter()
    source_of = data.source

    def source():
        made = source_of()
        rows = made.rows

        def counting(shard, first):
            for row in rows(shard, first):
                counts["rows"] += 1
                yield row

        made.rows = counting
        return made

    data.source = source
    return counts


def test_cursors_serve_another_number_of_ranks(uneven: ShardList) -> None:
    whole = global_batches(uneven, 1, 0, range(3))
    data = data_of(uneven)
    list(data.stream(0))
    states = data.state_dict()
    ranks = []
    for rank in range(4):
        part = data_of(uneven, 4)
        part.load_state_dict(states)
        ranks.append([b["key"] for epoch in (1, 2) for b in part.stream(epoch, rank, 4)])
    joined = [[key for keys in parts for key in keys] for parts in zip(*ranks, strict=True)]
    assert joined == [keys for keys, _ in whole[4:]]


def one_rank(rank: int, shards: ShardList, folder: Path) -> None:
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    data = data_of(shards, 2)
    for _ in data.stream(0, rank, 2):
        pass
    torch.save(data.state_dict(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_checkpoint_has_the_cursors_and_counts_of_all_ranks(uneven: ShardList, tmp_path) -> None:
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=one_rank, args=(rank, uneven, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    alone = data_of(uneven)
    list(alone.stream(0))
    whole = alone.state_dict()
    assert states[0] == states[1] == whole
    assert len(whole["cursors"]) == GLOBAL
    again = data_of(uneven)
    again.load_state_dict(whole)
    assert again.skipped == alone.skipped
    list(again.stream(1))
    list(alone.stream(1))
    alone.state_dict(), again.state_dict()
    assert again.skipped["seen"] >= alone.skipped["seen"]  # a window is read again


def test_workers_go_on_from_epoch_to_epoch_and_end_with_the_training(uneven: ShardList) -> None:
    before = set(torch.multiprocessing.active_children())
    data = data_of(uneven, 1, 2)
    list(data.stream(0))
    workers = set(torch.multiprocessing.active_children()) - before
    list(data.stream(1))
    assert workers == set(torch.multiprocessing.active_children()) - before != set()
    data.teardown("fit")
    assert not workers & set(torch.multiprocessing.active_children())


def written(folder: Path, shards: int, each: int) -> list[str]:
    image = np.zeros((8, 8, 3), np.uint8)
    made = ({"key": f"{i:04d}", "image": image, "caption": "x"} for i in range(shards * each))
    return write_shards(made, folder, each)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fate", ["gone", "changed"])
def test_a_shard_that_goes_or_changes_is_counted_and_the_others_go_on(
    tmp_path: Path, workers: int, fate: str
) -> None:
    paths = written(tmp_path, 10, 30)
    data = data_of(ShardList(tuple(paths)), 1, workers, epoch_batches=75)  # two passes
    seen = Counter(key for batch in data.stream(0) for key in batch["key"])
    assert set(seen.values()) == {2} and data.skipped == {"seen": 600}
    if fate == "gone":
        Path(paths[3]).unlink()
    else:
        written(tmp_path / "other", 1, 7)
        (tmp_path / "other" / "00000.tar").replace(paths[3])
    epochs = [Counter(key for b in data.stream(e) for key in b["key"]) for e in range(1, 5)]
    lost = {f"{i:04d}" for i in range(90, 120)}
    assert lost.isdisjoint(epochs[-1]) and len(epochs[-1]) == 270
    kind = {"gone": GONE, "changed": CHANGED}[fate]
    assert data.skipped[kind] > 120 and set(data.skipped) == {"seen", kind}
    assert paths[3] in data.left_out.examples[kind]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_worker_refuses_is_one_sentence(tmp_path: Path, workers: int) -> None:
    paths = written(tmp_path, 4, 30)
    data = data_of(ShardList(tuple(paths)), 1, workers, epoch_batches=1000, max_skipped=0.2)
    with pytest.raises(ValueError, match=r"^\d+ of \d+ samples were skipped: ") as error:
        for number, _ in enumerate(data.stream(0)):
            if number == 20:
                for path in paths[1:]:
                    Path(path).unlink()
    assert "\n" not in str(error.value)


def test_the_cache_of_a_training_set_has_its_order(uneven: ShardList, tmp_path: Path) -> None:
    def encode(images: torch.Tensor) -> torch.Tensor:
        return ((images[:, 0] + 1) * 127.5).round().long()

    view = View(8, flip=True)
    sources = dict(zip(part_names(uneven.paths), uneven.paths, strict=True))
    made = {"tokenizer": "x", "num_codes": 256, "crops": 1, "flip": True}
    encoding = Encoding(view, {"a": Encoder(encode, 256)}, batch_size=4)
    for name, url in sources.items():
        path = tmp_path / f"{name}.safetensors"
        encode_shard(path, url, uneven, encoding, made=made, max_skipped=0.9)
    finish_cache(tmp_path, sources, made)
    options = {"batch_size": GLOBAL, "epoch_batches": 18, "seed": 3}
    web = WebData(uneven, None, view, Order(0, 24), max_skipped=0.9, **options)
    cached = TokenData(tmp_path, shuffle_buffer=24, **options)
    for one, two in zip(web.stream(0), cached.stream(0), strict=True):
        assert one["key"] == two["key"] and one["caption"] == two["caption"]
        assert torch.equal(encode(one["image"]), two["tokens"])
