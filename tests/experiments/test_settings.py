import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.papers.registry import PAPERS, header, load, scale_file, scales
from experiments.papers.sections import TrainerConfig
from experiments.settings import (
    ConfigError,
    describe,
    diff,
    file_pairs,
    fill,
    override,
    parse_overrides,
    resolved,
    to_yaml,
)

ALL_SCALES = [(paper, scale) for paper in PAPERS for scale in scales(paper)]


@dataclass
class Loader:
    name: Literal["scenes", "digits"] = "scenes"
    """Which pictures."""
    shards: str | None = None
    """Where they are."""
    workers: int = 2
    """Processes."""


@dataclass
class Optim:
    lr: float = 1e-3
    """Rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Decays."""
    nesterov: bool = False
    """Look ahead."""


@dataclass
class Loop:
    steps: int = 12
    """Sampling
    steps."""
    stop: int | None = 3
    """Stop early."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


@dataclass
class Base:
    seed: int = 0
    """The seed."""
    data: Loader = field(default_factory=Loader)
    """The data."""


@dataclass
class Toy(Base):
    PRESETS: ClassVar[dict] = {"sampling": {"fast": Loop(steps=4, stop=None)}}

    optim: Optim = field(default_factory=Optim)
    """The optimizer."""
    sampling: Loop = field(default_factory=Loop)
    """The loop."""


def make(*words: str) -> Toy:
    return override(Toy(), words)


def message(*words: str) -> str:
    with pytest.raises(ConfigError) as error:
        make(*words)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_values_by_type():
    config = make("seed=3", "optim.lr=1e-5", "optim.betas=[0.5,0.9]", "optim.nesterov=True")
    assert (config.seed, config.optim) == (3, Optim(1e-5, [0.5, 0.9], True))
    assert type(make("optim.lr=1").optim.lr) is float
    assert isinstance(make("seed=3").data, Loader)


def test_dashes_order_and_last_one_wins():
    assert make("--seed=1", "sampling.steps=5") == make("sampling.steps=5", "seed=1")
    assert make("seed=1", "--seed=2").seed == 2


@pytest.mark.parametrize("text", ["null", "None"])
def test_null(text: str):
    assert make(f"sampling.stop={text}").sampling.stop is None
    assert make("data.shards=a.tar", f"data.shards={text}").data.shards is None
    assert "seed: may not be null" in message(f"seed={text}")


def test_section_word_is_its_name_or_a_preset():
    assert make("data=digits").data.name == "digits"
    assert make("sampling=fast").sampling == Loop(4, None)
    assert make("sampling=fast", "sampling.steps=6").sampling == Loop(6, None)
    assert "did you mean fast?" in message("sampling=fats")
    assert "optim is a section" in message("optim=adam")
    assert make("optim={lr: 0.5, betas: [0.1, 0.2]}").optim == Optim(0.5, [0.1, 0.2])


def test_an_alias_sets_all_that_it_stands_for():
    paella = load("paella", "micro", ["sampling.guidance=3", "sampling.guidance_end=5"]).sampling
    assert (paella.guidance_start, paella.guidance_end) == (3.0, 5.0)
    muse = load("muse", "micro", ["--sampling.guidance=3", "sampling.superres.guidance=2"]).sampling
    assert (muse.guidance_start, muse.guidance_end, muse.superres.guidance_end) == (1.0, 3.0, 2.0)
    assert load("ldmae", "micro", ["sampling.guidance=3"]).sampling.guidance == 3.0
    for word in ("sampling.guidance=3", "guidance=3", "samplin.guidance=3"):
        with pytest.raises(ConfigError, match="unknown setting"):
            load("vq_diffusion", "micro", [word])


def test_text_is_taken_as_it_stands():
    for text in ("path/{00000..00009}.tar", "[a", "12", "a: b # c", "{a,b}.tar", "x=y", "true"):
        assert make(f"data.shards={text}").data.shards == text


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("sampling.step=3", "'sampling.step'; did you mean sampling.steps?"),
        ("samplin.steps=3", "did you mean sampling.steps?"),
        ("steps=3", "did you mean sampling.steps?"),
        ("model.betas=[1,2]", "did you mean optim.betas?"),
        ("seed.x=3", "unknown setting 'seed.x'"),
        ("seed=1.0", "seed: expected int, got 1.0"),
        ("seed=abc", "seed: expected int, got 'abc'"),
        ("seed=true", "seed: expected int, got True"),
        ("optim.lr=fast", "optim.lr: expected float"),
        ("optim.betas=3", "optim.betas: expected list of float"),
        ("optim.betas=[a,b]", "optim.betas: expected list of float"),
        ("optim.nesterov=maybe", "optim.nesterov: expected bool"),
        ("sampling.stop=x", "sampling.stop: expected int | null"),
        ("data=digit", "data.name: expected one of scenes, digits; got 'digit'; did you mean"),
        ("sampling.steps=0", "sampling.steps must be at least 1, got 0"),
        ("seed", "'seed' is not a setting; write key=value"),
        ("--sampling.steps", "unknown option --sampling.steps"),
        ("optim.betas=[1,", "optim.betas: cannot read the value '[1,'"),
        ("data.shards=${nowhere}", "nowhere"),
    ],
)
def test_mistakes_are_one_line(word: str, said: str):
    assert said in message(word)


def test_override_leaves_the_given_config_alone():
    config = Toy()
    assert override(config, ["sampling.steps=4"]).sampling.steps == 4
    assert config == Toy()


def test_override_of_one_section():
    assert override(Loop(steps=7), ["sampling.stop=2"], section="sampling") == Loop(7, 2)
    with pytest.raises(ConfigError, match=r"did you mean sampling\.steps\?"):
        override(Loop(), ["sampling.stpes=2"], section="sampling")
    with pytest.raises(ConfigError, match=r"sampling\.steps must be at least 1"):
        override(Loop(), ["sampling.steps=0"], section="sampling")


def test_yaml_errors_name_the_file(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("sampling:\n  step: 3\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: unknown setting 'sampling\.step'; did you"):
        file_pairs(Toy, path)
    path.write_text("sampling: [\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: no readable YAML"):
        file_pairs(Toy, path)
    path.write_text("data:\n  shards: 12\n")  # YAML reads a number where text is meant
    with pytest.raises(ConfigError, match=r"mine\.yaml: data\.shards: expected str \| null"):
        file_pairs(Toy, path)
    path.write_text("")
    assert fill(Toy, file_pairs(Toy, path)) == Toy()


def test_describe_reads_the_help_from_the_source():
    rows = {row.key: row for row in describe(Toy)}
    assert rows["seed"].help == "The seed." and rows["seed"].default == 0
    assert rows["sampling.steps"].help == "Sampling steps."
    assert rows["data.name"].type == "scenes | digits"
    assert rows["optim.betas"].type == "list of float"
    assert rows["sampling.stop"].type == "int | null"
    assert {r.key: r.default for r in describe(make("seed=5"))}["seed"] == 5


def test_every_setting_of_every_paper_has_help():
    for paper in PAPERS:
        assert [row.key for row in describe(load(paper)) if not row.help] == []


def test_diff_and_yaml_round_trip(tmp_path: Path):
    config = make("sampling.steps=4", "optim.lr=1e-5", "data=digits")
    assert [tuple(d) for d in diff(config, Toy())] == [
        ("data.name", "digits", "scenes"),
        ("optim.lr", 1e-5, 1e-3),
        ("sampling.steps", 4, 12),
    ]
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert fill(Toy, file_pairs(Toy, path)) == config


@given(st.integers(1, 5000), st.integers(1, 800))
def test_virtual_epochs_end_exactly_at_max_steps(max_steps: int, epoch_steps: int):
    count, length = TrainerConfig(max_steps=max_steps, epoch_steps=epoch_steps).epochs
    assert count * length == max_steps
    assert length <= epoch_steps or count == 1


def test_virtual_epochs_that_divide_are_kept():
    assert TrainerConfig(max_steps=2000, epoch_steps=500).epochs == (4, 500)
    assert TrainerConfig(max_steps=200, epoch_steps=500).epochs == (1, 200)
    assert TrainerConfig(max_steps=250, epoch_steps=90).epochs == (5, 50)
    assert TrainerConfig(max_steps=257, epoch_steps=100).epochs == (1, 257)


@pytest.mark.parametrize("name", ["max_steps", "epoch_steps", "batch_size", "devices", "log_every"])
def test_trainer_ranges(name: str):
    with pytest.raises(ConfigError, match=rf"trainer\.{name} must be at least 1, got 0"):
        load("paella", "micro", [f"trainer.{name}=0"])


@pytest.mark.parametrize(("paper", "scale"), ALL_SCALES)
def test_every_scale_builds_and_says_what_it_is(paper: str, scale: str):
    config = load(paper, scale)
    assert isinstance(config, PAPERS[paper]) and dataclasses.is_dataclass(config.data)
    text = "\n".join(header(paper, scale))
    assert f"command: python -m experiments.run --paper {paper}" in text
    assert scale == "tiny" or f"--scale {scale}" in text
    for word in ("time:", "memory:", "score:"):
        assert word in text
    yaml = scale_file(paper, scale).with_suffix(".yaml")
    assert yaml.read_text().isascii()


@pytest.mark.parametrize("paper", list(PAPERS))
def test_scales_of_every_paper(paper: str):
    assert scales(paper)[:4] == ["micro", "tiny", "small", "paper"]


def test_a_resolved_config_is_a_scale_again(tmp_path: Path):
    config = load("paella", "micro", ["sampling.steps=2", "trainer.max_steps=6"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load("paella", str(path)) == config


def test_published_paella():
    config = resolved(load("paella", "paper"))
    trainer, optim = config["trainer"], config["optim"]
    assert trainer["batch_size"] * trainer["devices"] * trainer["num_nodes"] == 2048
    assert (trainer["max_steps"], optim["lr"], optim["warmup_steps"]) == (1_500_000, 1e-4, 10_000)
    assert config["model"]["c_hidden"] == [640, 1280, 1280]
    assert config["sampling"]["steps"] == 12 and config["sampling"]["temperature_end"] == 0.3
    assert config["tokenizer"]["model"]["network"] == "paella"
    assert load("paella", "paper", ["sampling=paper"]).sampling.temperature_end == 1.0


def test_published_vqgan():
    config = load("vqgan", "paper")
    assert (config.model.num_codes, config.model.factor) == (16384, 16)
    assert (config.objective.disc_weight, config.objective.disc_layers) == (0.75, 2)
    assert config.optim.lr == 1.08e-4 and config.trainer.batch_size * config.trainer.devices == 24


def test_tokenizer_preset_fills_its_section():
    config = load("paella", "micro")
    alone = load("vqgan", "micro")
    for section in ("model", "objective", "optim", "trainer"):
        assert getattr(config.tokenizer, section) == getattr(alone, section)
    other = load("paella", "micro", ["tokenizer.preset=tiny", "model.num_labels=512"])
    assert other.tokenizer.model == load("vqgan", "tiny").model
    assert load("paella", "micro", ["tokenizer.model.ch=24"]).tokenizer.model.ch == 24


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tokenizer.preset=tin"], "tokenizer.preset: 'tin' is not one of"),
        (["tokenizer.ckpt=a.ckpt", "tokenizer.model.ch=8"], "tokenizer.model.ch has no effect"),
        (["model.num_labels=33"], "model.num_labels must be the tokenizer's 32 codes, got 33"),
        (["data.resolution=36"], "data.resolution must be a multiple of 8, got 36 (near: 32)"),
        (["text.width=32"], "model.byt5_embd must be text.width (32)"),
        (["model.clip_embd=8"], "model.clip_embd must be 0 without a CLIP encoder, got 8"),
        (
            ["model.clip_embd=8", "model.clip_image=true", "text=byt5", "data.cache=true"],
            "data.cache must be false with model.clip_image=true",
        ),
        (["network=v1", "v1.num_labels=32"], "network=v1 needs one CLIP vector per caption"),
        (["network=v1"], "v1.num_labels must be the tokenizer's 32 codes, got 8192"),
        (["eval.prompts=17"], "eval.prompts must be at most data.val_size (16), got 17"),
        (["tokenizer.trainer.accumulate=2"], "tokenizer.trainer.accumulate must be 1"),
        (["tokenizer.trainer.precision=16-mixed"], "tokenizer.trainer.precision must not be"),
        (["sampling.guidance_start=.inf"], "sampling.guidance_start: must be a finite number"),
        (["data=digits", "data.shards=a.tar"], "data=digits and data.shards=a.tar exclude each"),
    ],
)
def test_combinations_that_cannot_be(words: list[str], said: str):
    with pytest.raises(ConfigError) as error:
        load("paella", "micro", words)
    assert said in str(error.value)


def test_a_tokenizer_file_decides_for_itself():
    words = ["tokenizer.ckpt=a.safetensors", "model.num_labels=33", "data.resolution=36"]
    assert load("paella", "micro", words).model.num_labels == 33


def test_digits_by_one_word():
    config = load("paella", "micro", ["data=digits"])
    assert config.data.name == "digits"


def test_overrides_parse_to_pairs():
    assert parse_overrides(Toy, ["--data=digits", "seed=2"]) == [
        ("data.name", "digits"),
        ("seed", 2),
    ]
