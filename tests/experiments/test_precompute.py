"""A cache made by a command of its own, by any number of processes, and training on it."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

import data.cache
from data.cached import read_index
from data.scenes import scenes
from data.shards import write_shards
from data.tokens import TokenData
from experiments import precompute
from experiments.cli import command
from experiments.papers.registry import load
from experiments.pipeline.encode import Encode
from experiments.pipeline.fit import curves
from experiments.settings import ConfigError, UserError
from lightning_modules.common.checkpoint import load_weights
from lightning_modules.common.text import T5Encoder
from tests.micro_runs import QUIET, Run, go

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "lightning_modules" / "vqgan" / "shipped" / "tiny.safetensors"
AUTOENCODER = ROOT / "lightning_modules" / "ldmae" / "shipped" / "tiny.safetensors"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "experiments.precompute",
        "experiments.pipeline.runner",
        "lightning_modules.registry",
        "data.cache",
    ]
)
pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 scenes in five shards, and three of validation."""
    folder = tmp_path_factory.mktemp("shards")
    for split, size, per_shard in (("train", 27, 6), ("val", 24, 8)):
        write_shards(scenes(split, size, resolution=32), folder / split, per_shard)
    return folder


def words(shards: Path, root: Path, out: str | Path = "out", *more: str) -> list[str]:
    own = [f"data.shards={shards}/train", f"data.val_shards={shards}/val", f"cache={root}/cache"]
    given = [f"--tokenizer={TOKENIZER}", f"--out={root / out}", *own]
    return [*given, "progress=none", "batch_size=4", *more]


def left(folder: Path) -> dict[str, bytes]:
    """Every file of a cache, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def cache(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache")
    assert precompute.run(words(shards, root)) == 0
    return root / "out"


def test_remote_shards_are_encoded_as_local_ones_are(
    cache: Path, shards: Path, tmp_path: Path
) -> None:
    memory = fsspec.filesystem("memory")
    for path in (shards / "train").iterdir():
        memory.pipe(f"/precompute/train/{path.name}", path.read_bytes())
    remote = "data.shards=memory://precompute/train/*.tar"
    assert precompute.run([*words(shards, tmp_path), remote]) == 0
    for path in cache.glob("*.parquet"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def process(argv: list[str], env: dict[str, str], killed_at: int | None, made: Path) -> None:
    """Run the command as one of several processes; the body of a process."""
    torch.set_num_threads(1)
    os.environ |= env
    open_ = Encode.open

    def counted(self: Encode, *arguments: Any) -> Callable[[int], None]:
        make, count = open_(self, *arguments), 0

        def one(i: int) -> None:
            nonlocal count
            count += 1
            if count == killed_at:
                data.cache.save_file = die  # type: ignore[assignment]
            make(i)
            with made.open("a") as file:
                file.write(f"{i} ")

        return one

    def die(*arguments: Any) -> None:  # the table is written, and half of the tokens
        Path(arguments[1]).write_bytes(b"half")
        while not [*made.parent.iterdir()]:  # until this or another process made a part
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    Encode.open = counted  # type: ignore[method-assign]
    raise SystemExit(command(precompute.run, argv))


def processes(
    argv: list[str], made: Path, envs: list[dict[str, str]], killed_at: int | None = None
) -> list[int | None]:
    """Run in several processes, of which the first may be killed; returns their exit codes."""
    made.mkdir(exist_ok=True)
    started = [
        FORKS.Process(
            target=process, args=(argv, env, None if i else killed_at, made / os.urandom(8).hex())
        )
        for i, env in enumerate(envs)
    ]
    for one in started:
        one.start()
    for one in started:
        one.join(200)
    return [one.exitcode for one in started]


TORCHRUN = [{"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": "2"} for i in range(2)]
ARRAY = [{"SLURM_ARRAY_TASK_ID": str(i), "SLURM_ARRAY_TASK_COUNT": "2"} for i in range(2)]


@pytest.mark.parametrize("envs", [TORCHRUN, ARRAY], ids=["torchrun", "array"])
def test_two_processes_of_which_one_is_killed_make_the_same_bytes(
    envs: list[dict[str, str]], shards: Path, cache: Path, tmp_path: Path
) -> None:
    argv = words(shards, tmp_path)
    made = tmp_path / "made"
    assert processes(argv, made, envs[:1], killed_at=3) == [-signal.SIGKILL]
    assert len([*(tmp_path / "out").glob("*.safetensors")]) == 2
    assert not (tmp_path / "out" / "cache.json").exists()
    assert processes(argv, made, envs) == [0, 0]
    assert left(tmp_path / "out") == left(cache)
    parts = [part for path in made.iterdir() for part in path.read_text().split()]
    assert sorted(parts) == ["0", "1", "2", "3", "4"]  # none was made twice


def test_the_rest_of_a_launch_takes_over_from_one_that_is_killed(
    shards: Path, cache: Path, tmp_path: Path
) -> None:
    codes = processes(words(shards, tmp_path), tmp_path / "made", TORCHRUN, killed_at=1)
    assert codes == [-signal.SIGKILL, 0]
    assert left(tmp_path / "out") == left(cache)


def test_what_a_cache_says_of_itself(shards: Path, cache: Path) -> None:
    assert sorted(p.name for p in cache.iterdir()) == sorted(
        ["cache.json", *(f"{i:05d}.{end}" for i in range(5) for end in ("safetensors", "parquet"))]
    )
    index = read_index(cache)
    assert index["count"] == 27 and [part["rows"] for part in index["parts"]] == [6, 6, 6, 6, 3]
    assert index["parts"][4]["source"] == f"{shards}/train/00004.tar"
    made = index["made"]
    assert (made["num_codes"], made["resolution"], made["crop"]) == (512, 32, "center")
    assert made["tokenizer"] == data.cache.file_hash(TOKENIZER) and made["text"] is None
    assert index["about"]["tokenizer"] == str(TOKENIZER)


def test_a_broken_shard_is_named_and_mended_alone(
    shards: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path(shutil.copytree(shards, tmp_path / "shards", copy_function=shutil.copy2))
    broken = own / "train" / "00003.tar"
    whole = broken.read_bytes()
    broken.write_bytes(b"no tar")
    argv = words(own, tmp_path)
    with pytest.raises(UserError, match=r"1 of 5 parts of encode failed: 00003\.safetensors") as e:
        precompute.run(argv)
    assert f"{broken} cannot be read" in str(e.value) and "\n" not in str(e.value)
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.safetensors")}
    assert sorted(kept) == [f"{i:05d}.safetensors" for i in (0, 1, 2, 4)]
    assert not (tmp_path / "out" / "cache.json").exists()
    broken.write_bytes(whole)
    assert precompute.run(argv) == 0
    assert {n: (tmp_path / "out" / n).stat().st_mtime_ns for n in kept} == kept
    assert read_index(tmp_path / "out")["count"] == 27
    # another shard joins
    shutil.copy2(own / "train" / "00000.tar", own / "train" / "00005.tar")
    assert precompute.run(argv) == 0
    assert {n: (tmp_path / "out" / n).stat().st_mtime_ns for n in kept} == kept
    assert read_index(tmp_path / "out")["count"] == 33
    assert "33 samples of 6 shards" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["00001.safetensors", "00001.parquet"])
@pytest.mark.parametrize("how", ["gone", "flipped"])
def test_the_same_command_mends_a_damaged_cache(
    name: str, how: str, shards: Path, cache: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(cache, tmp_path / "out", copy_function=shutil.copy2))
    content = (out / name).read_bytes()
    (out / name).unlink()
    if how == "flipped":
        (out / name).write_bytes(content[:-9] + b"x" + content[-8:])
    other = (out / "00002.safetensors").stat().st_mtime_ns
    assert precompute.run(words(shards, tmp_path)) == 0
    assert left(out) == left(cache)
    assert (out / "00002.safetensors").stat().st_mtime_ns == other


def test_a_full_disk_leaves_no_half_file_and_one_line(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save, calls = data.cache.save_file, list[Path]()

    def full(tensors: Any, path: Path, *more: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path, *more)

    monkeypatch.setattr(data.cache, "save_file", full)
    assert command(precompute.run, words(shards, tmp_path)) == 1
    out = tmp_path / "out"
    error = capsys.readouterr().err
    assert error == f"error: No space left on device: {out}/00002.safetensors\n"
    assert sorted(p.name for p in out.glob("[!.]*.safetensors")) == [
        "00000.safetensors",
        "00001.safetensors",
    ]
    assert not [*out.glob(".*.tmp")]
    assert precompute.run(words(shards, tmp_path)) == 0 and len(calls) == 3 + 3


# Training on it ----


def trained(run: Run, name: str = "train") -> tuple[Any, Any]:
    folder = run.folder(name)
    return curves(folder), load_weights(folder / "checkpoint.safetensors")[0]


PAELLA = [
    "tokenizer.preset=tiny",
    "tokenizer.ckpt=shipped",
    "model.num_labels=512",
    "eval.prompts=8",
    "eval.heldout=0",
    "data.val_size=24",
]


def test_training_from_it_equals_training_from_the_runs_own_cache(
    shards: Path, cache: Path, tmp_path: Path
) -> None:
    own = [f"data.shards={shards}/train", f"data.val_shards={shards}/val", "data.val_size=24"]
    store = cache.parent / "cache"
    one = go("paella", tmp_path / "one", store, *PAELLA, *own, "eval.batch_size=4")
    other = go("paella", tmp_path / "two", store, *PAELLA, "data=cache", f"data.path={cache}")
    assert "encode" not in other.made() and "encode" in one.made() and "train" in other.made()
    assert other.config.data.name == "shards"
    for mine, theirs in zip(trained(one), trained(other), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(mine[k]), torch.as_tensor(theirs[k])) for k in mine)
    assert {k: s["value"] for k, s in one.scores.items()} == {
        k: s["value"] for k, s in other.scores.items()
    }


def refused(cache: Path, *more: str, paper: str = "paella") -> str:
    with pytest.raises(ConfigError) as raised:
        load(paper, "micro", [*PAELLA, f"data.path={cache}", *more])
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_cache_of_other_settings_is_refused(shards: Path, cache: Path, tmp_path: Path) -> None:
    assert load("paella", "micro", [*PAELLA, "data=cache", f"data.path={cache}"])
    both = refused(cache, "data.resolution=64")
    assert "data.resolution is 64 here and 32 in the cache" in both
    assert "data.crop is random here and center in the cache" in refused(cache, "data.crop=random")
    assert "data.flip is True here and False" in refused(cache, "data.flip=true")
    assert "data.min_size is 64 here and None" in refused(cache, "data.min_size=64")
    other = tmp_path / "other.safetensors"
    state, config = load_weights(TOKENIZER)
    name = next(name for name, value in state.items() if value.is_floating_point())
    state[name] = state[name] + 1
    data.cache.save_torch(
        {k: v.contiguous() for k, v in state.items()}, other, {"config": json.dumps(config)}
    )
    told = refused(cache, f"tokenizer.ckpt={other}")
    assert str(other) in told and str(TOKENIZER) in told
    assert data.cache.file_hash(other)[:12] in told
    assert data.cache.file_hash(TOKENIZER)[:12] in told
    assert "tokenizer.ckpt must name" in refused(cache, "tokenizer.ckpt=null")
    assert "there is no cache.json" in refused(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"data\.path: path must name the folder|path must name"):
        load("paella", "micro", [*PAELLA, "data=cache"])
    with pytest.raises(ConfigError, match="a first stage is trained on pictures"):
        load("vqgan", "micro", [f"data.path={cache}"])


def test_a_cache_of_other_data_is_not_replaced(tmp_path: Path) -> None:
    given = [f"--tokenizer={TOKENIZER}", f"--out={tmp_path / 'out'}", f"cache={tmp_path}/cache"]
    given += ["progress=none", "data.train_size=12"]
    assert precompute.run(given) == 0
    before = left(tmp_path / "out")
    for word, says in [
        ("data.train_size=6", "data.train_size is 12 there and 6 here; name another folder"),
        ("data.seed=1", "seed is 0 there and 1 here"),
    ]:
        with pytest.raises(ConfigError, match=says):
            precompute.run([*given, word])
        assert left(tmp_path / "out") == before
    assert precompute.run(given) == 0


def test_a_folder_of_other_settings_is_not_touched(
    shards: Path, cache: Path, tmp_path: Path
) -> None:
    before = left(cache)
    for more, told in (
        (["data.flip=true"], "flip is False there and True here"),
        ([f"--tokenizer={AUTOENCODER}"], "tokenizer is"),
    ):
        with pytest.raises(ConfigError, match=told):
            precompute.run(words(shards, cache.parent, "out", *more))
    begun = Path(shutil.copytree(cache, tmp_path / "out"))
    (begun / "cache.json").unlink()
    with pytest.raises(ConfigError, match="flip is False there and True here"):
        precompute.run(words(shards, tmp_path, "out", "data.flip=true"))
    (begun / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other files \(notes\.txt\)"):
        precompute.run(words(shards, tmp_path))
    assert left(cache) == before


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--tokenizer=none.safetensors"], "there is no file none.safetensors"),
        (["--tokenizer=README.md"], "is no tokenizer or autoencoder"),
        (["data.resolution=34"], "data.resolution must be a multiple of 4"),
        (["data.crops=2"], "crops must be 1 with crop=center"),
        (["data.path=x"], "data.path names a cache"),
        (["text=t5", "text.mask_padding=false"], "text.mask_padding must be true"),
        (["data.reslution=64"], "data.resolution"),
        (["batch_size=0"], "batch_size must be at least 1"),
        (["--paper=paela"], "paella"),
    ],
)
def test_refusals(
    more: list[str], told: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=told):
        precompute.run(words(shards, tmp_path, "out", *more))
    assert not (tmp_path / "out").exists()


# Text ----


@pytest.fixture(scope="module")
def with_text(
    shards: Path,
    tiny_t5: str,
    tiny_clip: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[str]]:
    root = tmp_path_factory.mktemp("text")
    text = [
        "text=byt5",
        "text.max_length=32",
        f"text.path={tiny_t5}",
        *(f"text.{k}={v}" for k, v in tiny_clip.items()),
    ]
    assert precompute.run(words(shards, root, "out", *text)) == 0
    return root / "out", text


def test_captions_states_reach_the_training_without_the_encoder(
    with_text: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, text = with_text
    more = [
        *PAELLA,
        *text,
        "model.clip_embd=12",
        "model.clip_seq_len=2",
        "objective.text_drop=0.5",
        "objective.pooled_drop=0.3",
        "trainer.val_batches=0",
    ]
    store, given = tmp_path / "cache", ["data=cache", f"data.path={cache}"]
    batch = next(iter(TokenData(cache, batch_size=4, text=True).stream()))
    assert batch["text"]["states"].dtype == torch.float16 and len(batch["text"]["pooled"]) == 5
    without = Path(shutil.copytree(cache, tmp_path / "without"))
    index = read_index(without)
    index["made"]["text"] = None
    (without / "cache.json").write_text(json.dumps(index))
    encoded = Run("paella", tmp_path, store, [*more, "data=cache", f"data.path={without}"])
    known = Run("paella", tmp_path, store, [*more, *given])
    train = [dict((s.name, s.key) for s in run.plan.stages)["train"] for run in (encoded, known)]
    assert train[0] != train[1]  # a cache is known by what it says of its files
    losses = []
    for run in (encoded, known):
        if run is known:  # both are the run's only encoder
            monkeypatch.setattr(T5Encoder, "_load", None)
        stages = run.plan.stages
        from experiments.pipeline.stage import Log
        from experiments.pipeline.store import Store

        upto = [stage.name for stage in stages].index("train") + 1
        Store(store).run(stages[:upto], run.config.machine(), Log(lambda line: None, "none"))
        losses.append([value for _, value in curves(run.folder("train"))["train/loss"]])
    assert losses[0] != losses[1]  # of half precision
    assert losses[1] == pytest.approx(losses[0], abs=2e-2)


def test_a_cache_of_another_text_encoder_is_refused(with_text: tuple[Path, list[str]]) -> None:
    cache, text = with_text
    model = ["model.clip_embd=12", "model.clip_seq_len=2"]
    own = [*PAELLA, *text, *model, f"data.path={cache}"]
    assert "validation loads the text encoder, since" in load("paella", "micro", own).note()
    without = load("paella", "micro", [*own, "trainer.val_batches=0"])
    assert without.note().endswith("can be")
    told = refused(cache, *text, *model, "text.max_length=7")
    assert "text.max_length is 7 here and 32 in the states of captions" in told
    told = refused(cache, "text=open_clip", *text[3:], "model.byt5_embd=12")
    assert "text.name is open_clip here and byt5 in the states" in told
    trained = load("paella", "micro", [*PAELLA, f"data.path={cache}"])
    assert "text.name=bytes is trained with the generator: the states of byt5" in trained.note()


# Moments ----


def test_moments_of_an_autoencoder(shards: Path, tmp_path: Path) -> None:
    argv = [*words(shards, tmp_path), f"--tokenizer={AUTOENCODER}"]
    assert precompute.run([w for w in argv if not w.endswith(f"{TOKENIZER}")]) == 0
    out = tmp_path / "out"
    assert read_index(out)["made"]["num_codes"] is None
    own = [f"data.shards={shards}/train", f"data.val_shards={shards}/val", "data.val_size=24"]
    ldmae = [
        "autoencoder.preset=tiny",
        "autoencoder.ckpt=shipped",
        "eval.prompts=8",
        "eval.heldout=0",
        "eval.batch_size=4",
        "model.in_channels=8",
    ]
    store = tmp_path / "cache"
    one = go("ldmae", tmp_path / "one", store, *ldmae, *own)
    two = go("ldmae", tmp_path / "two", store, *ldmae, f"data.path={out}")
    assert "encode" not in two.made() and trained(one)[0] == trained(two)[0]
