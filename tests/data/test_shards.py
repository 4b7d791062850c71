"""Shards are written exactly, found by pattern, striped without loss, and bad samples counted."""

import io
import itertools
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.images import decode_image
from data.patterns import expand_shards
from data.readers import tar_keys
from data.select import caption_of, decoded, selected
from data.shards import (
    GONE,
    LOST,
    SkipCounter,
    apply,
    parse,
    read_samples,
    write_shards,
)
from data.view import ShardList, View
from tests import planted


def made_samples(count: int, size: int = 8) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {
            "key": f"{i:06d}",
            "image": rng.integers(0, 256, (size, size, 3)).astype(np.uint8),
            "caption": f"number {i} é",
            "label": i % 3,
            "attributes": {"n": i},
        }
        for i in range(count)
    ]


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"")


def test_patterns_find_files_in_order(tmp_path: Path) -> None:
    touch(tmp_path, *[f"{i:05d}.tar" for i in range(12)], "a.tar", "b.tar")

    def names(pattern: str | list[str]) -> list[str]:
        return [Path(shard).name for shard in expand_shards(pattern)]

    at = str(tmp_path)
    assert names(f"{at}/{{00000..00009}}.tar") == [f"{i:05d}.tar" for i in range(10)]
    assert names(f"{at}/{{b,a}}.tar") == ["b.tar", "a.tar"]
    assert names(f"{at}/0001?.tar") == ["00010.tar", "00011.tar"]
    assert names(f"{at}/a.tar,{at}/{{00001,00003}}.tar") == [
        "a.tar",
        "00001.tar",
        "00003.tar",
    ]
    assert names([f"{at}/b.tar", f"{at}/a.tar"]) == ["b.tar", "a.tar"]
    assert len(expand_shards(at)) == 14


def test_a_path_may_hold_a_comma(tmp_path: Path) -> None:
    at, other = tmp_path / "red, {blue}", tmp_path / "b"
    for folder in (at, other):
        folder.mkdir()
        touch(folder, "0,1.tar", "2.tar")
    both = [f"{at}/0,1.tar", f"{at}/2.tar"]
    assert expand_shards(str(at)) == both
    assert expand_shards(f"{other}/0,1.tar,{at}/2.tar, {other}") == [
        f"{other}/0,1.tar",
        f"{at}/2.tar",
        f"{other}/0,1.tar",
        f"{other}/2.tar",
    ]
    assert expand_shards(f"{tmp_path}/b/*,1.tar,{at}") == [f"{other}/0,1.tar", *both]


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("{at}/none*.tar", "no shard matches"),
        ("{at}/none.tar", "no shard matches"),
        ("{at}/00000.tar,{at}/none.tar", "no shard matches .*none.tar"),
        ("{at}/{{0,none}}*.tar", "no shard matches .*none"),
        ("{at}/{{00000..00002}}.tar", "00001.tar does not exist"),
        ("pipe:cat x.tar", "add data.allow_pipe=true"),
        ("nope://host/*.tar", "nope://host/\\*.tar cannot be read here"),
    ],
)
def test_a_wrong_pattern_is_named(tmp_path: Path, pattern: str, says: str) -> None:
    touch(tmp_path, "00000.tar")
    pattern = pattern.format(at=tmp_path)
    with pytest.raises(ValueError, match=says) as error:
        expand_shards(pattern)
    assert pattern in str(error.value)


@given(count=st.integers(0, 12), per_shard=st.integers(1, 5))
def test_what_is_written_is_read(tmp_path_factory, count: int, per_shard: int) -> None:
    folder = tmp_path_factory.mktemp("written")
    samples = made_samples(count)
    paths = write_shards(iter(samples), folder, per_shard)
    assert len(paths) == -(-count // per_shard)
    skips = SkipCounter()
    read = list(apply(parse, read_samples(paths, skips), skips))
    assert [s["key"] for s in read] == [s["key"] for s in samples]
    for got, made in zip(read, samples, strict=True):
        assert got["captions"] == [made["caption"]]
        assert got["meta"]["label"] == made["label"]
        assert got["meta"]["attributes"] == made["attributes"]
        np.testing.assert_array_equal(decode_image(got["data"], 8), made["image"])
    assert skips.counts == ({"seen": count} if count else {})


@pytest.mark.parametrize("image_format", ["png", "jpg"])
def test_writing_twice_gives_equal_bytes(tmp_path: Path, image_format) -> None:
    one = write_shards(made_samples(5), tmp_path / "one", 2, image_format)
    two = write_shards(made_samples(5), tmp_path / "two", 2, image_format)
    assert [Path(p).read_bytes() for p in one] == [Path(p).read_bytes() for p in two]
    with tarfile.open(one[0]) as tar:
        assert tar.getnames()[:3] == [f"000000.{s}" for s in (image_format, "txt", "json")]
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar} == {(0, 0, 0, "")}


def test_an_interrupted_shard_never_appears(tmp_path: Path) -> None:
    def broken():
        yield from made_samples(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(broken(), tmp_path, 2)
    assert sorted(p.name for p in tmp_path.glob("*.tar")) == ["00000.tar"]


def picture(size: tuple[int, int] = (10, 8), mode: str = "RGB") -> Image.Image:
    rng = random.Random(0)
    channels = len(Image.new(mode, (1, 1)).getbands())
    data = bytes(rng.randrange(256) for _ in range(size[0] * size[1] * channels))
    return Image.frombytes(mode, size, data)


def read_all(urls: list[str], skips: SkipCounter) -> dict[str, dict]:
    def decode(sample: dict) -> dict:
        return {**sample, "pixels": decode_image(sample["data"], 8)}

    parsed = apply(parse, read_samples(urls, skips), skips)
    return {s["key"]: s for s in apply(decode, parsed, skips)}


def test_every_planted_fault_is_counted_and_every_good_sample_kept(tmp_path: Path) -> None:
    good, jpeg = encoded(picture()), encoded(picture((64, 64)), "JPEG")
    members = {
        "ok1.png": good,
        "ok1.txt": b"one",
        "broken.jpg": jpeg[: len(jpeg) // 2],
        "broken.txt": b"half an image",
        "garbage.jpg": b"not an image",
        "garbage.txt": b"text",
        "notext.png": good,
        "empty.png": good,
        "empty.txt": b" \n",
        "noimage.txt": b"only text",
        "noimage.json": b"{}",
        "badjson.png": good,
        "badjson.txt": b"text",
        "badjson.json": b"{",
        "huge.png": planted.with_header(50_000),
        "huge.txt": b"huge",
        "large.png": planted.with_header(9_000),
        "large.txt": b"large",
        "fromjson.png": good,
        "fromjson.txt": b"",
        "fromjson.json": b'{"caption": "from json"}',
        "webp.webp": encoded(picture(), "WEBP"),
        "webp.txt": b"webp",
        "upper.JPEG": jpeg,
        "upper.txt": b"upper",
    }
    skips = SkipCounter(max_skipped=0.99)
    kept = read_all([str(planted.tar(tmp_path / "0.tar", members))], skips)
    assert list(kept) == ["ok1", "fromjson", "webp", "upper"]
    assert kept["fromjson"]["captions"] == ["from json"]
    assert skips.counts == {
        "seen": 12,
        "truncated image": 1,
        "corrupt image": 1,
        "no caption": 2,
        "no image": 1,
        "bad json": 1,
        "decompression bomb": 2,
    }


def test_truncated_and_missing_shards_lose_only_themselves(tmp_path: Path) -> None:
    paths = write_shards(made_samples(9), tmp_path, 3)
    whole = Path(paths[1]).read_bytes()
    with tarfile.open(paths[1]) as tar:
        cut = tar.getmember("000004.txt").offset_data - 700  # within the image of the second
    Path(paths[1]).write_bytes(whole[:cut])
    missing = str(tmp_path / "missing.tar")
    skips = SkipCounter(max_skipped=0.99)
    kept = read_all([*paths[:2], missing, paths[2]], skips)
    assert list(kept) == ["000000", "000001", "000002", "000003", "000006", "000007", "000008"]
    assert skips.counts == {
        "seen": 10,
        "cut off with its shard": 1,
        LOST: 1,
        GONE: 1,
    }  # 4 without its text
    assert "missing.tar" in skips.examples[GONE] and paths[1] in skips.examples[LOST]
    assert "000004" in skips.examples["cut off with its shard"]


def test_keys_that_repeat_across_shards_are_not_merged(tmp_path: Path) -> None:
    good = encoded(picture())
    one = str(planted.tar(tmp_path / "1.tar", {"a.png": good, "a.txt": b"first"}))
    two = str(planted.tar(tmp_path / "2.tar", {"a.txt": b"second", "a.png": good}))
    skips = SkipCounter()
    read = list(apply(parse, read_samples([one, two], skips), skips))
    assert [(s["key"], s["captions"]) for s in read] == [("a", ["first"]), ("a", ["second"])]
    # the first shard breaks off before its caption: it must not take that of the next
    cut = str(planted.tar(tmp_path / "3.tar", {"a.png": good}))
    skips = SkipCounter(max_skipped=0.99)
    read = list(apply(parse, read_samples([cut, two], skips), skips))
    assert [s["captions"] for s in read] == [["second"]]


def test_too_many_bad_samples_end_the_run_with_their_numbers(tmp_path: Path) -> None:
    members = {f"{i}.png": b"junk" for i in range(30)}
    members |= {f"g{i}.png": encoded(picture()) for i in range(70)}
    members |= {f"g{i}.txt": b"good" for i in range(70)}
    names = sorted(members)
    url = str(planted.tar(tmp_path / "0.tar", {name: members[name] for name in names}))
    skips = SkipCounter(max_skipped=0.2, window=100)
    with pytest.raises(ValueError, match=r"30 of 100 samples were skipped: 30 no caption.*0\.tar"):
        read_all([url, url], skips)
    skips = SkipCounter(max_skipped=0.3, window=100)
    assert len(read_all([url, url], skips)) == 70
    counts, examples = skips.take()
    assert counts == {"seen": 200, "no caption": 60} and url in examples["no caption"]
    assert skips.take() == ({}, {})


def test_shards_without_samples_do_not_hang(tmp_path: Path) -> None:
    empty = str(planted.tar(tmp_path / "0.tar", {}))
    with pytest.raises(ValueError, match="held no sample"):
        next(read_samples(itertools.repeat(empty), SkipCounter()))


def test_json_of_a_sample_reads_back(tmp_path: Path) -> None:
    (path,) = write_shards(made_samples(1), tmp_path, 1)
    with tarfile.open(path) as tar:
        meta = json.load(tar.extractfile("000000.json"))  # type: ignore[arg-type]
    assert meta == {
        "key": "000000",
        "caption": "number 0 é",
        "width": 8,
        "height": 8,
        "label": 0,
        "attributes": {"n": 0},
    }


def parsed(tmp_path: Path, members: dict[str, bytes], seed: int = 0) -> tuple[dict, dict]:
    """Return captions by key, and what became of the samples."""
    skips = SkipCounter(max_skipped=0.99)
    url = str(planted.tar(tmp_path / "0.tar", members))
    samples = apply(parse, read_samples([url], skips), skips)
    captions = {s["key"]: caption_of(s["captions"], f"{seed}/{s['key']}") for s in samples}
    return captions, dict(skips.counts)


def test_texts_are_decoded_by_their_mark_or_left_out(tmp_path: Path) -> None:
    texts = {
        "plain": "ein grünes Quadrat 你好".encode(),
        "marked": b"\xef\xbb\xbfa square",
        "little": "a blue square".encode("utf-16"),
        "big": b"\xfe\xff" + "a red square".encode("utf-16-be"),
        "latin": "un carré".encode("latin-1"),
        "broken": b"\xff\xfe\xff",
        "nul": b"a square\0",
    }
    members = {}
    for key, text in texts.items():
        members |= {f"{key}.png": b"x", f"{key}.txt": text}
    members |= {"half.png": b"x", "half.json": b'{"caption": "\\ud83d"}'}
    captions, counts = parsed(tmp_path, members)
    assert captions == {
        "plain": "ein grünes Quadrat 你好",
        "marked": "a square",
        "little": "a blue square",
        "big": "a red square",
    }
    assert counts == {"seen": 8, "bad text": 4}


def test_one_of_several_captions_is_chosen_by_seed(tmp_path: Path) -> None:
    members = {}
    for i in range(20):
        members |= {f"{i:02d}.png": b"x", f"{i:02d}.json": b'{"caption": ["one", "two", " ", 3]}'}
    first, again, other = (parsed(tmp_path, members, seed)[0] for seed in (0, 0, 1))
    assert set(first.values()) == {"one", "two"} and first == again != other
    nothing = {}
    for i, caption in enumerate([b"{}", b"NaN", b"null", b"[]", b"[null]", b'{"en": "a"}']):
        nothing |= {f"{i}.png": b"x", f"{i}.json": b'{"caption": ' + caption + b"}"}
    assert parsed(tmp_path, nothing) == ({}, {"seen": 6, "no caption": 6})


def test_names_that_begin_with_a_dot_are_no_members(tmp_path: Path) -> None:
    members = {"train/.DS_Store": b"x"}
    for i in range(3):
        for suffix in ("png", "txt"):
            members |= {f"train/._{i}.{suffix}": b"\0\5\x16\7", f"train/{i}.{suffix}": b"x"}
    captions, counts = parsed(tmp_path, members)
    assert list(captions) == ["train/0", "train/1", "train/2"] and counts == {"seen": 3}
    assert list(tar_keys(str(tmp_path / "0.tar"))) == list(captions)


def test_a_dot_within_a_name_is_named(tmp_path: Path) -> None:
    members = {
        f"photo v{i}.{i} (clean).{suffix}": b"x" for i in range(3) for suffix in ("png", "txt")
    }
    captions, counts = parsed(tmp_path, members)
    assert captions == {}
    assert counts == {"seen": 3, "no image (a key ends at the first dot of a name)": 3}
    assert list(tar_keys(str(tmp_path / "0.tar"))) == ["photo v0", "photo v1", "photo v2"]


@pytest.mark.parametrize("where", ["content", "header", "border", "middle"])
def test_a_shard_that_breaks_off_counts_for_what_it_loses(tmp_path: Path, where: str) -> None:
    """24 of 60 can be read: within a file, within a header, between two, or with junk between."""
    paths = write_shards(made_samples(120), tmp_path, 60)
    data = bytearray(Path(paths[0]).read_bytes())
    with tarfile.open(paths[0]) as tar:
        header = tar.getmember("000024.png").offset
    cut = {"content": header + 600, "header": header + 100, "border": header}.get(where, len(data))
    if where == "middle":
        data[header : header + 512] = b"x" * 512
    Path(paths[0]).write_bytes(data[:cut])
    skips = SkipCounter(max_skipped=0.2)
    kept = [s["__key__"] for s in read_samples(paths, skips, paths)]
    assert kept == [f"{i:06d}" for i in (*range(24), *range(60, 120))]
    assert skips.counts == {"seen": 120, LOST: 36}
    assert skips.told("train").startswith(
        f"train: 84 samples, 36 skipped: 36 in broken shards (estimated) (last: {paths[0]}: "
    )
    with pytest.raises(ValueError, match="36 of 120 samples were skipped"):
        skips.check()
    alone = SkipCounter(max_skipped=0.99)  # nothing to compare it with but its own length
    assert len(list(read_samples(paths[:1], alone))) == 24
    assert alone.counts[LOST] == pytest.approx(36, abs=4) if where == "middle" else 1


def test_one_broken_shard_of_many_ends_nothing_at_once(tmp_path: Path) -> None:
    paths = write_shards(made_samples(600), tmp_path, 60)
    Path(paths[0]).write_bytes(Path(paths[0]).read_bytes()[:9000])
    skips = SkipCounter(max_skipped=0.2, window=50)
    assert 540 < len(list(read_samples(paths, skips, paths))) < 550
    skips.check()
    with pytest.raises(ValueError, match="samples were skipped"):  # as two in three it does
        list(read_samples(itertools.cycle([paths[0], paths[0], paths[1]]), skips, paths))


NAMES = st.text(st.sampled_from("ab./é\udce9 _\n"), max_size=6)
SUFFIXES = st.sampled_from([*"jpg png JPEG txt json a.png b.c.jpg cls __key__".split(), ""])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
)
META = st.fixed_dictionaries(
    {}, optional={n: JSON for n in ("caption", "label", "attributes", "punsafe", "original_width")}
)
TEXTS = st.binary(max_size=12) | st.text(max_size=6).map(lambda t: t.encode("utf-16"))
CONTENTS = TEXTS | (META | JSON).map(lambda value: json.dumps(value).encode())


@given(
    files=st.lists(st.tuples(NAMES, SUFFIXES, CONTENTS), max_size=12),
    good=st.sampled_from([[], ["z.png", "z.txt"]]),
)
def test_whatever_a_tar_holds_every_image_is_kept_or_counted(tmp_path_factory, files, good) -> None:
    """Names, captions and metadata of any kind: no error, no image lost without a word."""
    picture_of, names = encoded(picture()), [f"{name}.{suffix}" for name, suffix, _ in files]
    path = tmp_path_factory.mktemp("any") / "0.tar"
    contents = [(name, data or b"text") for name, (*_, data) in zip(names, files, strict=True)]
    members = [*contents, *((name, b"text") for name in good)]
    planted.tar(path, [(n, picture_of if n.endswith("png") else data) for n, data in members])
    images = list(tar_keys(str(path)))
    samples = [s["__key__"] for s in read_samples([str(path)], SkipCounter())]
    skips = SkipCounter(max_skipped=0.99, window=10**6)
    view = View(8, min_size=1, max_punsafe=None if good else 1.0)
    shards = ShardList((str(path),))
    kept = list(
        apply(lambda s: decoded(s, view), selected(shards.paths, shards, view, skips), skips)
    )
    counts = dict(skips.counts)
    assert len(kept) + sum(n for reason, n in counts.items() if reason != "seen") == counts.get(
        "seen", 0
    )
    assert counts.get("seen", 0) >= len(set(images) & set(samples))
    assert {s["key"] for s in kept} <= set(images) and set(images) <= set(samples)
    if good:
        assert kept and kept[-1]["key"] == "z"
    for sample in kept:
        sample["key"].encode(), sample["caption"].encode()
        json.dumps({**sample, "pixels": None}, allow_nan=False)
        assert isinstance(sample.get("label", 0), int) and "\0" not in sample["caption"]
    assert "\n" not in skips.told("train")
