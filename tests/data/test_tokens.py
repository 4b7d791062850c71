"""The token cache is exact and resumable; its order is a pure function of seed, epoch and rank."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import avg_pool2d

import data.select
from data.cache import Encoder, Encoding, TextStates, count_tokens, encode_shard, finish_cache
from data.cached import part_names, read_index
from data.images import to_tensor
from data.select import captions, pictures
from data.shards import LOST, SkipCounter, write_shards
from data.sources import find_shards
from data.tokens import TokenData
from data.view import Order, ShardList, View
from data.webdata import WebData

COUNT = 23


def encode(images: Tensor) -> Tensor:
    """Tokens [B, 4, 4]: the red value of every other pixel."""
    return ((images[:, 0, ::2, ::2] + 1) * 127.5).round().long()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardList:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, 8, 8, 3)).astype(np.uint8)
    samples = [
        {"key": f"{i:04d}", "image": image, "caption": f"number {i}", "label": i}
        for i, image in enumerate(images)
    ]
    return ShardList(tuple(write_shards(samples, tmp_path_factory.mktemp("shards"), 6)))


def write(
    shards: ShardList, folder: Path, *encoders: Encoder, view=None, stamp: str = "", **options
) -> dict:
    """Encode all shards; views after the first are called 1, 2, ..."""
    views = {str(i): encoder for i, encoder in enumerate(encoders or [Encoder(encode, 256)])}
    encoding = Encoding(view or View(8), views, **{"batch_size": 4, **options})
    made = {"stamp": stamp, "tokenizer": "abc", "crops": encoding.crops}
    made["flip"] = encoding.view.flip
    made["text"] = {"name": "letters"} if encoding.text else None
    for name, url in zip(part_names(shards.paths), shards.paths, strict=True):
        encode_shard(folder / f"{name}.safetensors", url, shards, encoding, made=made)
    return finish_cache(folder, named(shards), {**made, "num_codes": views["0"].num_codes})


def named(shards: ShardList) -> dict[str, str]:
    return dict(zip(part_names(shards.paths), shards.paths, strict=True))


def all_of(folder: Path, name: str = "tokens") -> np.ndarray:
    view = TokenData(folder, batch_size=1).tensors[name]
    return view[np.arange(len(view))]


@pytest.fixture(scope="module")
def cache(shards: ShardList, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write(shards, folder)
    return folder


@pytest.fixture(scope="module")
def truth(shards: ShardList) -> dict[str, Tensor]:
    """Key -> picture [1, 3, 8, 8]."""
    return {s["key"]: to_tensor(s["pixels"])[None] for s in pictures(shards, View(8))}


def batches(source: TokenData, **where) -> list[dict]:
    return list(source.stream(**where))


def test_codes_are_counted(shards: ShardList, cache: Path, tmp_path: Path) -> None:
    counts = count_tokens(cache, 256, "abc")
    expected = np.bincount(all_of(cache).astype(np.int64).ravel(), minlength=256)
    assert counts.tolist() == expected.tolist() and counts.sum() == COUNT * 16
    low = Encoder(lambda x: encode(x) + 1000, 2000)  # of another codebook: not counted
    write(shards, tmp_path, Encoder(encode, 256), low, view=View(8, flip=True))
    assert count_tokens(tmp_path, 256).sum() == 2 * COUNT * 16
    for wrong in ((cache, 200), (cache, 256, "abd")):
        with pytest.raises(ValueError, match="another tokenizer, of 256 codes"):
            count_tokens(*wrong)
    with pytest.raises(ValueError, match=r"no finished cache of tokens: there is no cache\.json"):
        count_tokens(tmp_path / "none", 256)


def test_tokens_are_what_the_tokenizer_says(shards, cache: Path, truth) -> None:
    source = TokenData(cache, batch_size=COUNT, epoch_batches=1)
    known = {s["key"]: s for s in captions(shards, View(8))}
    assert all_of(cache).dtype == np.uint16 and len(source) == COUNT
    (batch,) = batches(source)
    assert batch["tokens"].dtype == torch.int64
    assert sorted(batch["key"]) == sorted(truth)
    for i, key in enumerate(batch["key"]):
        assert torch.equal(batch["tokens"][i], encode(truth[key])[0])
        assert batch["caption"][i] == known[key]["caption"]
        assert batch["label"][i] == known[key]["label"]


def test_one_decode_serves_all_views(shards, truth, tmp_path: Path, monkeypatch) -> None:
    decoded: list[bytes] = []
    decode = data.select.decode_image
    monkeypatch.setattr(
        data.select, "decode_image", lambda x, *a, **o: (decoded.append(x), decode(x, *a, **o))[1]
    )
    high, low = Encoder(encode, 256), Encoder(lambda x: encode(avg_pool2d(x, 2)), 256)
    write(shards, tmp_path, high, low, view=View(8, flip=True))
    assert len(decoded) == len(set(decoded)) == COUNT
    mirrored = 0
    for batch in batches(TokenData(tmp_path, batch_size=COUNT, epoch_batches=4)):
        assert set(batch) == {"tokens", "1", "key", "caption", "label"}
        for key, tokens, small in zip(batch["key"], batch["tokens"], batch["1"], strict=True):
            image = truth[key]
            if not torch.equal(tokens, encode(image)[0]):
                image, mirrored = image.flip(-1), mirrored + 1
            assert torch.equal(tokens, encode(image)[0])
            assert torch.equal(small, encode(avg_pool2d(image, 2))[0])
    assert 0.3 * 4 * COUNT < mirrored < 0.7 * 4 * COUNT


def test_all_batches_have_one_shape(shards: ShardList, tmp_path: Path) -> None:
    """The last of a shard is filled, so that its rows are those of a full batch."""
    shapes = set()

    def shaped(images: Tensor) -> Tensor:
        shapes.add(tuple(images.shape))
        return encode(images)

    write(shards, tmp_path / "a", Encoder(shaped, 256), batch_size=4)
    assert shapes == {(4, 3, 8, 8)}
    write(shards, tmp_path / "b", Encoder(shaped, 256), batch_size=50)
    assert shapes == {(4, 3, 8, 8), (50, 3, 8, 8)}
    np.testing.assert_array_equal(all_of(tmp_path / "a"), all_of(tmp_path / "b"))


def test_a_finished_shard_is_not_encoded_again(shards: ShardList, tmp_path: Path) -> None:
    calls = []

    def counting(images: Tensor) -> Tensor:
        calls.append(len(images))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return encode(images)

    counted = Encoder(counting, 256)
    with pytest.raises(KeyboardInterrupt):
        write(shards, tmp_path, counted, stamp="one")
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".safetensors") == [
        "00000.safetensors",
        "00001.safetensors",
    ]
    with pytest.raises(ValueError, match="no finished cache of tokens"):
        TokenData(tmp_path, batch_size=1)
    with pytest.raises(ValueError, match=r"00002\.safetensors is missing or damaged"):
        finish_cache(tmp_path, named(shards), {})
    summary = write(shards, tmp_path, counted, stamp="one")
    assert len(calls) == 6 + 4 and summary["count"] == COUNT and len(summary["parts"]) == 4
    assert json.loads((tmp_path / "cache.json").read_text()) == summary
    write(shards, tmp_path, counted, stamp="one")
    assert len(calls) == 10
    write(shards, tmp_path, counted, stamp="two")
    assert len(calls) == 10 + 8
    (tmp_path / "00001.parquet").unlink()
    write(shards, tmp_path, counted, stamp="two")
    assert len(calls) == 10 + 8 + 2


@pytest.mark.parametrize("name", ["00002.safetensors", "00002.parquet"])
@pytest.mark.parametrize("kept", [None, 0, 40, -1])
def test_a_damaged_file_is_named(shards, tmp_path: Path, name: str, kept: int | None) -> None:
    write(shards, tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if kept is not None:
        (tmp_path / name).write_bytes(content[:kept])
    finish = lambda: finish_cache(tmp_path, named(shards), {})  # noqa: E731
    for use in (lambda: TokenData(tmp_path, batch_size=1), finish):
        with pytest.raises(ValueError, match=rf"{name} is missing or damaged: encode again"):
            use()


def test_missing_rows_are_noticed(shards: ShardList, tmp_path: Path) -> None:
    summary = write(shards, tmp_path)
    (tmp_path / "cache.json").write_text(json.dumps({**summary, "count": COUNT + 1}))
    with pytest.raises(ValueError, match="is damaged, its files do not hold the 24 rows"):
        TokenData(tmp_path, batch_size=1)
    for broken in ("{", "[]", "{}", "\xff"):
        (tmp_path / "cache.json").write_text(broken, "latin-1")
        with pytest.raises(ValueError, match=r"cache\.json is damaged, or none of this version"):
            TokenData(tmp_path, batch_size=1)


def test_bad_samples_are_counted_over_all_shards(shards: ShardList, tmp_path: Path) -> None:
    bad = tmp_path / "bad.tar"
    whole = Path(shards.paths[0]).read_bytes()
    bad.write_bytes(whole[: len(whole) // 7])  # one of six samples
    both = ShardList((*shards.paths, str(bad)))
    write(both, tmp_path / "a")
    with pytest.raises(ValueError, match=r"5 of 29 samples were skipped: 5 in broken .*bad\.tar"):
        finish_cache(tmp_path / "a", named(both), {}, SkipCounter(max_skipped=0.1))
    skips = SkipCounter(max_skipped=0.3)
    summary = finish_cache(tmp_path / "a", named(both), {}, skips)
    assert summary["skipped"] == {"seen": COUNT + 6, LOST: 5}
    assert skips.told("train").startswith("train: 24 samples, 5 skipped: 5 in broken shards (est")
    bad.write_bytes(b"no tar")
    with pytest.raises(ValueError, match=r"bad\.tar cannot be read \(last: "):
        write(both, tmp_path / "c")
    bad.unlink()
    with pytest.raises(ValueError, match=r"bad\.tar cannot be read \(last: .* No such file"):
        write(both, tmp_path / "c")
    assert not [*(tmp_path / "c").glob("*bad*")]
    none = ShardList(shards.paths[:1], holdout=1.0)  # all keys are validation
    with pytest.raises(ValueError, match="hold no sample to encode"):
        write(none, tmp_path / "b")


def test_a_token_outside_the_codebook_is_refused(shards: ShardList, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="outside the 100 codes"):
        write(shards, tmp_path, Encoder(encode, 100))


def test_large_codebooks_take_four_bytes(shards: ShardList, tmp_path: Path) -> None:
    write(shards, tmp_path, Encoder(lambda images: encode(images) + 70_000, 2**18))
    assert all_of(tmp_path).dtype == np.int32
    assert batches(TokenData(tmp_path, batch_size=4))[0]["tokens"].min() >= 70_000


@settings(deadline=None)
@given(
    size=st.integers(1, 7),
    world=st.integers(1, 3),
    epoch_batches=st.integers(1, 9),
    epochs=st.integers(1, 4),
)
def test_passes_are_permutations_shared_by_the_ranks(cache, size, world, epoch_batches, epochs):
    source = TokenData(cache, batch_size=size, seed=5, epoch_batches=epoch_batches)

    def keys(rank: int) -> list[list[str]]:
        loaders = [source.stream(epoch, rank, world) for epoch in range(epochs)]
        return [batch["key"] for loader in loaders for batch in loader]

    ranks = [keys(rank) for rank in range(world)]
    assert all(len(rank) == epochs * epoch_batches for rank in ranks)
    # all ranks' batches together, laid end to end, go through the samples pass by pass
    flat = [
        rank[b][i] for b in range(epochs * epoch_batches) for rank in ranks for i in range(size)
    ]
    for start in range(0, len(flat), COUNT):
        part = flat[start : start + COUNT]
        assert len(set(part)) == len(part)


def test_order_depends_on_seed_and_pass_alone(cache: Path) -> None:
    def keys(seed: int, epoch: int) -> list[str]:
        source = TokenData(cache, batch_size=COUNT, seed=seed, epoch_batches=1)
        return batches(source, epoch=epoch)[0]["key"]

    assert keys(0, 3) == keys(0, 3)
    assert keys(0, 3) != keys(0, 4)
    assert keys(0, 3) != keys(1, 3)


def test_random_crops_freeze_by_key_and_seed(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 40, 3)).astype(np.uint8)
    made = [{"key": str(i), "image": image, "caption": "x"} for i in range(8)]
    wide = ShardList(tuple(write_shards(made, tmp_path / "s", 8)))
    for name, seed in {"one": 0, "two": 0, "three": 1}.items():
        write(wide, tmp_path / name, view=View(8, crop="random", seed=seed))
    one, two, three = (all_of(tmp_path / name) for name in ("one", "two", "three"))
    np.testing.assert_array_equal(one, two)
    assert len(np.unique(one, axis=0)) > 3 and not np.array_equal(one, three)


def test_held_out_samples_are_not_encoded(shards: ShardList, tmp_path: Path) -> None:
    folder = str(Path(shards.paths[0]).parent)
    train, val = (find_shards(folder, None, split) for split in ("train", "val"))
    held = {s["key"] for s in captions(val, View(8))}
    summary = write(train, tmp_path)
    assert held and summary["count"] == COUNT - len(held)
    assert summary["skipped"] == {"seen": COUNT, "filtered: other split": len(held)}
    assert held.isdisjoint(TokenData(tmp_path, batch_size=1).rows["key"].to_pylist())


class Recorder(LightningModule):
    """Remembers the tokens that it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []
        self.validated: list[str] = []

    def validation_step(self, batch, index: int) -> None:
        self.validated += batch["key"]

    def training_step(self, batch, index: int):
        self.seen.append(batch["key"])
        return (self.weight - batch["tokens"].float().mean()) ** 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-5)


@pytest.mark.parametrize("validates", [False, True])
def test_training_resumes_exactly_at_the_border_of_an_epoch(
    cache: Path, shards: ShardList, tmp_path: Path, validates: bool
) -> None:
    web = WebData(shards, shards, View(8), Order(), batch_size=4, val_batches=2)

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
            num_sanity_val_steps=0,
        )
        source = TokenData(cache, batch_size=3, epoch_batches=4, val=web if validates else None)
        trainer.fit(module, datamodule=source, ckpt_path=ckpt)
        return trainer

    whole, first, second = Recorder(), Recorder(), Recorder()
    fit(whole, 3)
    fit(first, 2).save_checkpoint(tmp_path / "border.ckpt")
    fit(second, 3, str(tmp_path / "border.ckpt"))
    assert len(whole.seen) == 12
    assert first.seen + second.seen == whole.seen
    assert torch.equal(whole.weight, second.weight)
    assert whole.validated == validates * 3 * [f"{i:04d}" for i in range(8)]


def moments(images: Tensor) -> Tensor:
    """Moments [B, 4, 4, 4]: red and green of every other pixel, and logarithms of variances."""
    means = images[:, :2, ::2, ::2]
    return torch.cat([means, means * 10 - 20], dim=1)


def test_moments_are_kept_in_half_precision(shards, truth, tmp_path: Path) -> None:
    summary = write(shards, tmp_path, Encoder(moments, None), view=View(8, flip=True))
    assert summary["made"]["num_codes"] is None and summary["count"] == COUNT
    source = TokenData(tmp_path, batch_size=COUNT, epoch_batches=4)
    assert source.views == ["moments"] and {*source.tensors} == {"moments", "moments_flip"}
    mirrored = 0
    for batch in batches(source):
        assert "tokens" not in batch and batch["moments"].dtype == torch.float32
        for key, found in zip(batch["key"], batch["moments"], strict=True):
            plain, other = (moments(x)[0].half().float() for x in (truth[key], truth[key].flip(-1)))
            assert torch.equal(found, plain) or torch.equal(found, other)
            mirrored += torch.equal(found, other)
    assert 0.3 * 4 * COUNT < mirrored < 0.7 * 4 * COUNT


def test_moments_that_half_precision_cannot_hold_are_refused(shards, tmp_path: Path) -> None:
    for wrong in (1e6, float("nan")):
        with pytest.raises(ValueError, match="no finite number of half precision"):
            write(shards, tmp_path, Encoder(lambda x, w=wrong: moments(x) * w, None))


def test_rows_are_read_across_files(cache: Path) -> None:
    view = TokenData(cache, batch_size=1).tensors["tokens"]
    everything = view[np.arange(COUNT)]  # [23, 4, 4] of four files
    assert everything.shape == (COUNT, 4, 4)
    where = np.array([22, 0, 5, 6, 6, 18])
    np.testing.assert_array_equal(view[where], everything[where])


def test_several_crops_are_kept_and_drawn(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 40, 3)).astype(np.uint8)
    made = [{"key": str(i), "image": image, "caption": "x"} for i in range(5)]
    wide = ShardList(tuple(write_shards(made, tmp_path / "s", 3)))
    view = View(8, crop="random", flip=True)
    write(wide, tmp_path / "one", view=view)
    write(wide, tmp_path / "three", view=view, crops=3)
    source = TokenData(tmp_path / "three", batch_size=5, epoch_batches=40)
    endings = ["", "_crop1", "_crop1_flip", "_crop2", "_crop2_flip", "_flip"]
    assert [*source.tensors] == [f"tokens{end}" for end in endings] and source.views == ["tokens"]
    for end in ("", "_flip"):  # the first crop is the one that a cache of one crop has
        one, three = (all_of(tmp_path / name, f"tokens{end}") for name in ("one", "three"))
        np.testing.assert_array_equal(one, three)
    known = {name: all_of(tmp_path / "three", name) for name in source.tensors}
    for row, boxes in enumerate(source.rows["crops"].to_pylist()):
        assert len(boxes) == 3
        for number, (left, top, right, bottom) in enumerate(boxes):
            assert (top, bottom, right - left) == (0, 8, 8)
            part = to_tensor(image[:, int(left) : int(right)])[None]
            stored = known["tokens" + (f"_crop{number}" if number else "")][row]
            assert (encode(part)[0].numpy() == stored).all()
    assert len({rows.tobytes() for rows in known.values()}) == 6
    keys = source.rows["key"].to_pylist()
    drawn: dict[str, set[str]] = {key: set() for key in keys}
    for batch in batches(source):
        for key, tokens in zip(batch["key"], batch["tokens"].numpy(), strict=True):
            drawn[key] |= {
                n for n, rows in known.items() if (rows[keys.index(key)] == tokens).all()
            }
    assert all(names == {*known} for names in drawn.values())


def letters(captions: Sequence[str]) -> TextStates:
    """One state [3] per letter, and the number of letters as pooled vector [1]."""
    states = [torch.tensor([[ord(c), i, 0.5] for i, c in enumerate(f"{t}.")]) for t in captions]
    return TextStates(states, torch.tensor([[float(len(t))] for t in captions]))


def test_states_of_captions_come_with_the_batches(shards: ShardList, tmp_path: Path) -> None:
    write(shards, tmp_path, text=letters)
    stored = load_file(tmp_path / "00003.text.safetensors")
    assert {name: t.dtype for name, t in stored.items()} == {
        "states": torch.float16,
        "pooled": torch.float16,
        "lengths": torch.int64,
    }
    assert len(stored["lengths"]) == 5 + 1 and len(stored["states"]) == int(stored["lengths"].sum())
    source = TokenData(tmp_path, batch_size=7, epoch_batches=4, text=True)
    for batch in batches(source):
        expected = letters([*batch["caption"], ""])
        found = batch["text"]
        assert found["lengths"].tolist() == [len(rows) for rows in expected.states]
        assert torch.equal(found["states"].float(), torch.cat(expected.states))
        assert torch.equal(found["pooled"].float(), expected.pooled)
    assert "text" not in batches(TokenData(tmp_path, batch_size=7, epoch_batches=1))[0]


def test_states_that_float16_cannot_hold_are_bfloat16(shards: ShardList, tmp_path: Path) -> None:
    def large(captions: Sequence[str]) -> TextStates:
        states, _ = letters(captions)
        return TextStates([rows * 1000 for rows in states], None)

    write(shards, tmp_path, text=large)
    batch = batches(TokenData(tmp_path, batch_size=7, epoch_batches=1, text=True))[0]
    assert batch["text"]["states"].dtype == torch.bfloat16 and "pooled" not in batch["text"]
    expected = torch.cat(large([*batch["caption"], ""]).states).bfloat16()
    assert torch.equal(batch["text"]["states"], expected)


def test_a_cache_without_states_has_none(cache: Path) -> None:
    with pytest.raises(ValueError, match="holds no states of captions"):
        TokenData(cache, batch_size=1, text=True)


@pytest.mark.parametrize("damage", ["gone", "short", "other"])
def test_damaged_states_are_named(damage: str, shards: ShardList, tmp_path: Path) -> None:
    write(shards, tmp_path, text=letters)
    path = tmp_path / "00001.text.safetensors"
    if damage == "gone":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.write_bytes((tmp_path / "00003.text.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"00001\.text\.safetensors (is missing|does not hold)"):
        TokenData(tmp_path, batch_size=1, text=True)
    write(shards, tmp_path, text=letters) if damage == "gone" else None
    assert path.exists()


def test_what_a_part_is_made_of(shards: ShardList, tmp_path: Path) -> None:
    write(shards, tmp_path, view=View(8, seed=3))
    table = pyarrow.parquet.read_table(tmp_path / "00001.parquet").to_pylist()
    assert [row["key"] for row in table] == [f"{i:04d}" for i in range(6, 12)]
    assert table[2] == {
        "key": "0008",
        "captions": ["number 8"],
        "label": 8,
        "width": 8,
        "height": 8,
        "row": 2,
        "crops": [[0.0, 0.0, 8.0, 8.0]],
    }
    index = read_index(tmp_path)
    assert [part["rows"] for part in index["parts"]] == [6, 6, 6, 5]
    assert index["parts"][1]["source"] == shards.paths[1]
    assert {*index["parts"][1]["files"]} == {"00001.safetensors", "00001.parquet"}
