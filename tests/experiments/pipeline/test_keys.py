"""Keys: what a setting makes anew, and that nothing that changes a result is left out of them."""

import ast
import copy
import dataclasses
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig
from experiments.papers.base import RunSettings
from experiments.papers.registry import PAPERS, load
from experiments.papers.sections import EvalConfig, TrainerConfig
from experiments.pipeline.encode import Encode
from experiments.pipeline.plan import plan
from experiments.pipeline.publish import Titles
from experiments.pipeline.runner import execute
from experiments.pipeline.stage import Stage
from experiments.settings import ConfigError, UserError, describe
from lightning_modules.common.checkpoint import load_weights
from tests import planted

PIPELINE = Path(__file__).parents[3] / "experiments" / "pipeline"
Stages = list[tuple[str, str]]  # name and key


@cache
def micro(paper: str, *words: str) -> RunSettings:
    return load(paper, "micro", words)


def keys(paper: str, run: RunSettings) -> Stages:
    return [(stage.name, stage.key) for stage in plan(paper, run).stages]


def changes(before: Stages, after: Stages) -> set[str]:
    """Names of the stages that are made anew."""
    return {name for name, key in after if (name, key) not in before}


SPLITS = ("val", "heldout", "partial")
DRAWN = {f"{what}sample-{split}" for what in ("", "features-") for split in SPLITS} | {"score"}
TRAINED = {"train", "generator", *DRAWN}
FIRST = {"tokenizer", "encode", "features-val", *TRAINED}
ASKED = {"captions-val", "sample-val", "features-sample-val", "features-val", "score"}
OTHERS = {"data-reference", "captions-reference", "features-reference"}
HELDOUT = {"captions-heldout", "sample-heldout", "features-sample-heldout", "score"}
HELDOUT_OTHERS = {f"{k}-heldout_reference" for k in ("data", "captions", "features")}
PARTIAL = {f"{k}-partial" for k in ("data", "captions", "sample", "features-sample")} | {"score"}
TABLE: list[tuple[str, str, set[str]]] = [
    ("paella", "sampling.steps=2", DRAWN),
    ("paella", "eval.seed=1", {*DRAWN, "features-val"}),
    ("paella", "eval.prompts=8", ASKED | OTHERS),
    ("paella", "eval.heldout=8", HELDOUT | HELDOUT_OTHERS),
    ("paella", "eval.partial=8", PARTIAL),
    ("paella", "eval.traces=1", {"sample-val", "features-sample-val", "score"}),
    ("paella", "eval.bootstrap=30", {"score"}),
    ("paella", "eval.grid=8", {"features-val", "score"}),
    ("paella", "trainer.max_steps=4", TRAINED),
    ("paella", "optim.lr=0.01", TRAINED),
    ("paella", "objective.eta=0.5", TRAINED),
    ("paella", "text.layers=2", TRAINED),
    ("paella", "data.cache=false", TRAINED),
    ("paella", "tokenizer.trainer.max_steps=4", FIRST),
    ("paella", "tokenizer.optim.lr=0.01", FIRST),
    ("paella", "data.shuffle_buffer=1", FIRST),  # it orders the samples
    ("paella", "data.workers=1", set()),
    ("paella", "seed=1", FIRST),
    ("paella", "data.train_size=32", {"data-train", *FIRST}),
    ("paella", "data.val_size=17", {"data-val", *ASKED}),
    ("paella", "data.heldout_size=17", {"data-heldout", *HELDOUT}),
    ("paella", "data.seed=1", {name for name, _ in keys("paella", micro("paella"))}),
    ("vqgan", "eval.heldout=0", set()),
    ("vqgan", "optim.lr=0.01", {"tokenizer", "features-val", "score"}),
    ("vqgan", "data.val_size=17", {"data-val", "captions-val", "features-val", "score"}),
]


@pytest.mark.parametrize(("paper", "word", "changed"), TABLE)
def test_a_setting_changes_what_depends_on_it(paper: str, word: str, changed: set[str]) -> None:
    before, after = keys(paper, micro(paper)), keys(paper, micro(paper, word))
    assert changes(before, after) == changed


def test_papers_share_a_first_stage() -> None:
    def tokenizer(paper: str, *words: str) -> str:
        return dict(keys(paper, micro(paper, *words)))["tokenizer"]

    assert len({tokenizer(p) for p in ("vqgan", "paella", "muse", "vq_diffusion")}) == 1
    assert tokenizer("paella", "trainer.devices=2") == tokenizer("vqgan", "trainer.devices=2")
    assert tokenizer("paella", "trainer.devices=2") != tokenizer("vqgan")


# Every setting ----

# settings that no other value of their own makes a plan; what their keys are is asked below
ELSEWHERE = (
    "data.name",
    "data.shards",
    "data.root",
    "data.path",
    "data.crops",
    "eval.scores",
    "eval.features",
    "eval.weights",
)
OF_TRAINERS = (
    "accelerator",
    "strategy",
    "compile",
    "checkpoint_activations",
    "keep_every",
    "val_batches",
    "log_every",
    "progress",
)
MACHINE = {"logger", "cache", "data.max_skipped", "data.workers", "eval.batch_size"}
WITHOUT_PICTURES = {"data.cache", "data.heldout_size", "eval.heldout", "eval.partial"}
WITHOUT_PICTURES |= {"eval.traces", "eval.edits"}


def machine(paper: str) -> set[str]:
    """Settings that say where and how, by their names in the run of a paper."""
    found = set(MACHINE)
    for setting in describe(micro(paper)):
        section, _, name = setting.key.rpartition(".")
        of_a_part = section.endswith("trainer") and section != "trainer"
        if section.endswith("trainer") and name in OF_TRAINERS:
            found.add(setting.key)
        if of_a_part and name in ("devices", "num_nodes"):  # they are trainer's
            found.add(setting.key)
    return found


def idle(paper: str) -> set[str]:
    """Settings that nothing reads at scale micro."""
    found = {"data.val_shards", "data.allow_pipe"}  # of shards that are not drawn
    if PAPERS[paper].FIRST_STAGE.paper == paper:
        return found | WITHOUT_PICTURES
    read = ("name", "width", "layers", "buckets", "max_length")  # by the encoder `bytes`
    text = [s.key for s in describe(micro(paper)) if s.key.startswith("text.")]
    aside = tuple(f"sampling.{name}." for name in PAPERS[paper].ASIDE)  # of commands of their own
    found |= {s.key for s in describe(micro(paper)) if aside and s.key.startswith(aside)}
    # the settings that the preset gave count, not its name
    section = PAPERS[paper].FIRST_STAGE.section
    return found | {f"{section}.preset"} | {k for k in text if k.partition(".")[2] not in read}


def others(value: Any, kind: str, file: Path) -> list[Any]:
    """Other values of a setting."""
    words = [w for w in kind.split(" | ") if w not in ("null", "str", "int", "float", "bool")]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value + 1, value * 2 + 3, type(value)(value / 2)]
    if isinstance(value, list):
        return [[*value, *(value[-1:] or [2])]]
    if kind.startswith("list"):
        return [[1]]
    if kind.startswith(("int", "float")):
        return [1]
    return [word for word in words if word != value] or [str(file)]


def with_setting(run: RunSettings, key: str, value: Any) -> RunSettings:
    """Return settings with another one, whether or not they fit each other."""
    changed = copy.deepcopy(run)
    *sections, name = key.split(".")
    node: Any = changed
    for section in sections:
        node = getattr(node, section)
    setattr(node, name, value)
    return changed


@pytest.mark.parametrize("paper", PAPERS)
def test_every_setting_is_in_a_key_or_of_the_machine_or_idle(paper: str, tmp_path: Path) -> None:
    run, file = micro(paper), tmp_path / "file"
    file.write_bytes(b"other")
    before, unkeyed = keys(paper, run), set()
    for setting in describe(run):
        if setting.key in ELSEWHERE:
            continue
        results = []
        for value in others(setting.default, setting.type, file):
            try:
                changed = with_setting(run, setting.key, value)
                results.append(keys(paper, changed) != before)
            except (UserError, ValueError, KeyError):  # another setting would have to change, too
                continue
        assert results, f"no other value of {setting.key} makes a plan"
        if not any(results):
            unkeyed.add(setting.key)
    assert unkeyed == machine(paper) | idle(paper)


def test_further_scores_draw_nothing_anew() -> None:
    words = ["eval.scores=[kid]", "eval.features=[scenes]"]
    before, after = keys("paella", micro("paella")), keys("paella", micro("paella", *words))
    assert {name for name, _ in {*before} - {*after}} == {"score"}
    assert keys("paella", micro("paella", "eval.scores=[kid,prdc]", words[1])) != after


@pytest.mark.parametrize(
    ("paper", "words", "said"),
    [
        ("paella", ["eval.scores=[kit]"], "eval.scores: 'kit' is not one of fid, kid"),
        ("paella", ["eval.scores=[kid]", "eval.features=[scene]"], "did you mean scenes?"),
        ("paella", ["eval.features=[scenes]"], "eval.features must be empty without scores"),
        ("paella", ["eval.scores=[kid]", "eval.weights=[x=y]"], "'x=y' is no NAME=FILE"),
        ("paella", ["eval.scores=[sfid]", "eval.features=[scenes]"], "of Inception-v3 alone"),
        ("vqgan", ["eval.scores=[kid]"], "python -m eval.reconstruction"),
        (
            "paella",
            ["data=digits", "eval.scores=[kid]", "eval.features=[scenes]", "tokenizer.ckpt=null"],
            "data=digits has no real pictures",
        ),
    ],
)
def test_further_scores_that_cannot_be(paper: str, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        keys(paper, micro(paper, *words))


@pytest.mark.parametrize("paper", PAPERS)
def test_devices_count_by_their_product(paper: str) -> None:
    one, two, nodes = (
        keys(paper, micro(paper, *words))
        for words in ([], ["trainer.devices=2"], ["trainer.num_nodes=2"])
    )
    assert two == nodes != one


def test_what_is_idle_or_of_the_machine_changes_no_score(tmp_path: Path) -> None:
    """Nothing is shared between the two runs, so each setting had its chance."""
    words = ["data.max_skipped=0.1", "text.path=nowhere", "text.clip=none", "text.pad_id=7"]
    for section in ("trainer", "tokenizer.trainer"):
        words += [f"{section}.{w}" for w in ("val_batches=2", "log_every=3", "keep_every=1")]
    made = []
    for name, changed in (("plain", []), ("changed", words)):
        run = load("paella", "micro", ["logger=csv", f"cache={tmp_path / name}", *changed])
        out = tmp_path / f"{name}-out"
        execute(Titles("paella", "micro", ""), run, out, lambda line: None)
        weights = load_weights(out / "checkpoint.safetensors")[0]
        plain = {k: v.numpy().tobytes() for k, v in weights.items()}
        made.append(((out / "metrics.json").read_bytes(), plain))
    assert made[0] == made[1]


# Files ----


@pytest.mark.parametrize(
    ("paper", "setting", "words", "first"),
    [
        ("paella", "text.path", ["text.name=byt5"], "train"),
        ("improved_vqd", "init.ckpt", [], "train"),
        ("vqgan", "objective.lpips_path", [], "tokenizer"),
        ("vqgan", "finetune", [], "tokenizer"),
        ("paella", "tokenizer.finetune", [], "tokenizer"),
        ("autoencoder", "start", [], "autoencoder"),
        ("ldmae", "autoencoder.start", [], "autoencoder"),
        ("ldmae", "autoencoder.ckpt", [], "given-autoencoder"),
        ("muse", "superres.tokenizer", [], "superres"),
    ],
)
def test_a_file_counts_by_its_content(
    paper: str, setting: str, words: list[str], first: str, tmp_path: Path
) -> None:
    run = micro(paper)
    for word in words:
        run = with_setting(run, *word.split("="))
    found = []
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        path = tmp_path / name
        path.write_bytes(content)
        found.append(keys(paper, with_setting(run, setting, str(path))))
    assert found[0] == found[1]
    assert first in changes(found[0], found[2])


def test_shards_are_known_by_their_files(tmp_path: Path) -> None:
    """Not by how they are spelled; and a file that was replaced is another one."""
    for name in ("0.tar", "1.tar"):
        (tmp_path / name).write_bytes(b"0" * 1024)

    def tokenizer(*words: str) -> str:
        found = dict(keys("vqgan", load("vqgan", "micro", words)))
        return found["tokenizer"]

    spelled = [f"data.shards={tmp_path}{p}" for p in ("/{0,1}.tar", "/*.tar", "/[0-1].tar", "")]
    assert len({tokenizer(word) for word in spelled}) == 1
    own_val = tokenizer(f"data.shards={tmp_path}/0.tar", f"data.val_shards={tmp_path}/1.tar")
    before = tokenizer(spelled[0])
    assert own_val != before
    (tmp_path / "1.tar").write_bytes(b"1" * 2048)
    assert tokenizer(spelled[0]) != before


def test_a_corpus_is_known_by_its_lists_and_folders(tmp_path: Path) -> None:
    planted.coco(tmp_path / "coco", train=2, val=2)

    def made() -> dict[str, str]:
        words = ["data=coco2014", f"data.root={tmp_path / 'coco'}"]
        return dict(keys("vqgan", load("vqgan", "micro", words)))

    before = made()
    assert made() == before
    planted.picture(tmp_path / "coco" / "train2014" / "COCO_train2014_000000000099.jpg")
    between = made()
    assert between["data-train"] != before["data-train"]
    (tmp_path / "coco" / "annotations" / "captions_val2014.json").touch()
    assert made()["data-val"] != between["data-val"]


def test_crops_make_another_cache() -> None:
    before, after = (
        keys("paella", micro("paella", "data.crop=random", *more))
        for more in ([], ["data.crops=2"])
    )
    assert changes(before, after) == {"encode", *TRAINED}


# What a stage is ----


def test_a_cache_knows_by_how_much_its_pictures_were_reduced() -> None:
    """128 px reduced to 32 and to 64 px by the same tokenizer are two caches."""
    caches = []
    for resolution, factor in ((32, 4), (64, 2)):
        run = with_setting(micro("muse"), "data.resolution", resolution)
        run = with_setting(run, "superres.factor", factor)
        found = [s for s in plan("muse", run).stages if isinstance(s, Encode)]
        caches.append(max(found, key=lambda stage: stage.view.resolution))
    assert [c.view.resolution for c in caches] == [128, 128]
    same_source = dataclasses.replace(
        caches[1],
        shards=caches[0].shards,
        views=tuple(
            dataclasses.replace(v, first_stage=w.first_stage)
            for v, w in zip(caches[1].views, caches[0].views, strict=True)
        ),
    )
    assert same_source.key != caches[0].key


def test_a_version_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys("paella", micro("paella"))
    monkeypatch.setattr(Encode, "VERSION", Encode.VERSION + 1)
    assert changes(before, keys("paella", micro("paella"))) == {"encode", *TRAINED}


def inside(value: Any) -> Iterator[Any]:
    """All that a field holds, other stages left out."""
    yield value
    if dataclasses.is_dataclass(value):
        value = vars(value)
    parts = value.values() if isinstance(value, dict) else value
    if isinstance(parts, (dict, list, tuple)) or parts is not value:
        for part in parts:
            if not isinstance(part, Stage):
                yield from inside(part)


@pytest.mark.parametrize("paper", PAPERS)
def test_no_stage_holds_the_settings_of_a_run(paper: str) -> None:
    whole = (RunSettings, TrainerConfig, EvalConfig, DataConfig)
    for stage in plan(paper, micro(paper)).stages:
        fields = [getattr(stage, f.name) for f in dataclasses.fields(stage)]
        assert not [v for field in fields for v in inside(field) if isinstance(v, whole)]


def test_modules_of_stages_read_neither_settings_nor_the_environment() -> None:
    """What is no field must not reach the work."""
    free = {"ranks.py", "store.py", "runner.py", "plan.py", "publish.py", "memory.py"}
    modules = [path for path in sorted(PIPELINE.glob("*.py")) if path.name not in free]
    assert len(modules) > 8
    for path in modules:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.startswith("experiments.papers")], path
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("environ", "getenv"), path
