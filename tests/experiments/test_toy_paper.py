"""A seventh paper beside the six: what it needs, and that no file of another one is touched.

The toy draws every token on its own, from a table of its place and the mean of the caption.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import convert as converting
from experiments import run as running
from experiments import sample
from experiments.cli import command
from experiments.papers import registry as papers
from experiments.papers.vqgan import TOKENIZER_PRESETS, TokenRun
from lightning_modules import registry as modules
from lightning_modules.common.categorical import draw
from lightning_modules.common.checks import at_least, positive
from lightning_modules.common.config import OptimConfig, TextConfig
from lightning_modules.common.generator import GeneratorModule
from lightning_modules.common.interfaces import Geometry
from lightning_modules.common.request import OnStep, Request, seeded_uniforms
from lightning_modules.common.text import Condition
from tests.micro_runs import QUIET

pytestmark = pytest.mark.filterwarnings(*QUIET)


# lightning_modules/toy/config.py ----


@dataclass
class ModelConfig:
    """The table."""

    num_codes: int = 32
    """Codes of the tokenizer."""
    side: int = 8
    """Tokens along a side of a picture."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_codes", "side")


@dataclass
class SamplingConfig:
    """How tokens are drawn."""

    temperature: float = 1.0
    """Logits are divided by it."""

    def __post_init__(self) -> None:
        positive(self, "temperature")


PRESETS = {"sharp": SamplingConfig(temperature=0.1)}


@dataclass
class ToyConfig:
    """All settings of the toy."""

    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def check_fit(self, first: Geometry) -> None:
        """Check the sections against the first stage."""
        first.check_codes("model.num_codes", self.model.num_codes)
        if first.grid != (self.model.side, self.model.side):
            raise ValueError(f"model.side must be {first.grid[0]}, got {self.model.side}")


# lightning_modules/toy/module.py ----


class ToyModule(GeneratorModule):
    """Tokens by place and caption: softmax(table[place] + W mean(caption))."""

    config_class = ToyConfig

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        model: ModelConfig = self.config.model
        self.table = nn.Parameter(torch.zeros(model.side**2, model.num_codes))  # [n, K]
        self.caption = nn.Linear(self.config.text.width, model.num_codes, bias=False)

    @property
    def text_widths(self) -> tuple[int, int]:
        return self.config.text.width, 0

    def logits(self, text: Condition) -> Tensor:
        return self.table + self.caption(text.tokens.mean(1))[:, None]  # [B, n, K]

    def inputs(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        return {"tokens": self.batch_tokens(batch), "text": self.encode_text(batch["caption"])}

    def compute_loss(  # type: ignore[override]
        self, tokens: Tensor, text: Condition
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return F.cross_entropy(self.logits(text).transpose(1, 2), tokens.flatten(1)), {}

    @torch.no_grad()
    def sample_tokens(
        self, request: Request, settings: Any = None, on_step: OnStep | None = None
    ) -> Tensor:
        self.check_request(request)
        settings = settings or self.config.sampling
        logits = self.logits(self.encode_text(request.prompts))
        u = seeded_uniforms(request.seeds, (logits.shape[1],), 0).to(self.device)  # [B, n]
        drawn = draw(logits.flatten(0, 1), u.flatten(), settings.temperature)
        tokens = drawn.view(len(u), *self.grid)
        if on_step is not None:
            on_step(0, torch.full_like(tokens, self.config.model.num_codes), tokens)
        return tokens


# experiments/papers/toy.py ----


@dataclass
class ToyRun(ToyConfig, TokenRun):
    """Toy: every token drawn on its own."""

    PRESETS: ClassVar[dict[str, Mapping[str, Any]]] = {"sampling": PRESETS, **TOKENIZER_PRESETS}


# experiments/configs/toy/micro.yaml ----

MICRO = """# Smallest toy
data: {name: scenes, resolution: 32, train_size: 64, val_size: 16, heldout_size: 16, workers: 0}
tokenizer: {preset: micro, ckpt: null}
text: {name: bytes, width: 16, buckets: 64, max_length: 32}
optim: {lr: 0.01, warmup_steps: 1}
trainer: {max_steps: 8, epoch_steps: 4, batch_size: 8, val_batches: 1, log_every: 1}
eval: {prompts: 16, heldout: 16, partial: 8, batch_size: 16, bootstrap: 20, grid: 4, traces: 1,
       edits: 2}
"""


# What it gets for that ----


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with micro.yaml, the toy being known; the words of the command use it."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "micro.yaml").write_text(MICRO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(papers.PAPERS, "toy", ToyRun)
        patch.setitem(modules.GENERATORS, "toy", ToyModule)
        patch.chdir(folder)
        yield folder


def go(*words: str) -> int:
    scale = ["--paper", "toy", "--scale", "micro.yaml", "logger=csv", "cache=cache"]
    return command(running.run, [*scale, *words])


def test_a_run_from_end_to_end(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go("--out", "edits") == 1
    assert "this checkpoint's paper cannot take `mask`" in capsys.readouterr().err
    assert go("--out", "first", "eval.edits=0") == 0
    said = capsys.readouterr().out
    for score in ("eval/scene_accuracy", "eval/heldout/fd_scenes", "tokenizer/psnr"):
        assert score in said
    page = (toy / "first" / "report.html").read_text()
    assert "toy on scenes" in page and "tokens change from first to last step" in page
    # other settings of sampling train nothing
    assert go("--out", "second", "eval.edits=0", "sampling=sharp") == 0
    said = capsys.readouterr().out
    assert "] train: reused" in said and "] sample-val: runs" in said


def test_what_was_trained_is_sampled_by_hand(toy: Path) -> None:
    words = ["--ckpt", "first", "--device", "cpu", "--prompt", "a red circle"]
    assert command(sample.run, [*words, "--out", "a"]) == 0
    assert command(sample.run, [*words, "--out", "b", "sampling.temperature=0.01"]) == 0
    assert (toy / "a" / "00000.png").read_bytes() != (toy / "b" / "00000.png").read_bytes()


def test_commands_tell_of_it(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(running.run, ["--help"]) == 0
    assert "toy: Toy: every token drawn on its own." in capsys.readouterr().out
    assert command(converting.run, ["--help"]) == 0
    assert "toy      nothing yet" in capsys.readouterr().out
    words = ["--paper", "toy", "--from", "micro.yaml", "--out", "x"]
    assert command(converting.run, words) == 2
    assert "no files of others are known of this paper" in capsys.readouterr().err


def test_wrong_settings_are_one_line(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for word, message in (
        ("model.side=4", "model.side must be 8, got 4"),
        ("model.num_codes=5", "model.num_codes must be the tokenizer's 32 codes, got 5"),
        ("sampling.temperature=0", "sampling.temperature must be"),
        ("sampling=sharpe", "did you mean sharp?"),
        ("model.sied=8", "did you mean model.side?"),
    ):
        assert go("--out", "wrong", word) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
