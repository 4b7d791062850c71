"""One training through Lightning: epochs, checkpoints, resuming, signals and progress."""

import dataclasses
import io
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from experiments import progress
from experiments.papers.base import device_of
from experiments.papers.sections import TrainerConfig
from experiments.pipeline import fit as training
from experiments.pipeline.fit import RESUME, WholeCheckpoints, curves, fit
from experiments.pipeline.loop import Loop, Monitor
from experiments.pipeline.stage import Log, Machine
from experiments.progress import Counter, clock
from experiments.settings import ConfigError
from lightning_modules.common.checkpoint import load_weights

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")
ROOT = Path(__file__).parents[3]
LOOP = Loop(epochs=3, length=4, batch_size=2)
MONITOR = Monitor(val_batches=1, log_every=1)
MACHINE = Machine(progress="none", trainer={"accelerator": "cpu", "devices": 1})


class Line(LightningModule):
    """Fits a line; every batch is noted, and one of them can be made to fail."""

    def __init__(self, stop_at: int | None = None, how: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        self.stop_at, self.how = stop_at, how
        self.seen: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if len(self.seen) == self.stop_at:
            raise self.how
        self.seen.append(batch[0, 0].item())
        loss = (self.layer(batch).squeeze(1) - batch.sum(1)).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", (self.layer(batch).squeeze(1) - batch.sum(1)).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Points(LightningDataModule):
    """Virtual epochs: batch b of epoch e begins with 100 e + b."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        epoch = self.trainer.current_epoch
        batches: Any = [torch.full((2, 3), 100.0 * epoch + b) / 1000 for b in range(self.length)]
        return DataLoader(batches, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        batches: Any = [torch.ones(2, 3)] * 3
        return DataLoader(batches, batch_size=None)


def train(
    module: Line, folder: Path, loop: Loop = LOOP, machine: Machine = MACHINE, **options: Any
) -> list[str]:
    said: list[str] = []
    log = Log(said.append, machine.progress)
    options = {"monitor": MONITOR, **options}
    fit(
        module, Points(loop.length), loop, folder, what="train", machine=machine, log=log, **options
    )
    return said


def test_every_batch_of_every_epoch_is_seen(tmp_path: Path) -> None:
    module = Line()
    train(module, tmp_path)
    expected = [(100 * epoch + b) / 1000 for epoch in range(3) for b in range(4)]
    assert module.seen == pytest.approx(expected)
    found = curves(tmp_path)
    assert [step for step, _ in found["train/loss"]] == list(range(12))
    assert [step for step, _ in found["val/loss"]] == [3, 7, 11]
    assert set(found) == {"train/loss", "val/loss"}


@pytest.mark.parametrize("how", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("stop_at", [2, 6, 8])
def test_an_interrupted_training_is_taken_up(
    stop_at: int, how: type[BaseException], tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGINT)
    whole = Line()
    train(whole, tmp_path / "whole")
    part = tmp_path / "part"
    # Lightning turns an interrupt into an exit
    with pytest.raises((how, SystemExit) if how is KeyboardInterrupt else how):
        train(Line(stop_at, how), part)
    signal.signal(signal.SIGINT, before)
    assert (part / RESUME).exists() == (stop_at >= 4)
    again = Line()
    train(again, part)
    assert len(again.seen) == 12 - stop_at // 4 * 4
    assert again.seen == whole.seen[-len(again.seen) :]
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert curves(part) == curves(tmp_path / "whole")
    assert sorted(p.name for p in (part / "log").iterdir()) == ["000", "001"]


def test_a_finished_training_is_only_read(tmp_path: Path) -> None:
    first = Line()
    train(first, tmp_path)
    again = Line()
    train(again, tmp_path)
    assert again.seen == []
    assert torch.equal(first.layer.weight, again.layer.weight)


@pytest.mark.parametrize("damage", [lambda whole: whole[:-30], lambda whole: b"", None])
def test_a_damaged_checkpoint_is_not_resumed(
    damage: Callable[[bytes], bytes] | None, tmp_path: Path
) -> None:
    whole = Line()
    train(whole, tmp_path)
    content = bytearray((tmp_path / RESUME).read_bytes())
    content[content.index(struct.pack("f", whole.layer.bias.item()))] ^= 1  # of a weight
    (tmp_path / RESUME).write_bytes(damage(content) if damage else content)
    again = Line()
    said = train(again, tmp_path)
    assert said == [f"      {tmp_path / RESUME} is damaged; train begins anew"]
    assert again.seen == whole.seen and torch.equal(again.layer.weight, whole.layer.weight)


class Diverging(Line):
    """Its loss, or only a weight, is no number from some batch on."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if len(self.seen) == 6 and self.what == "weight":
            self.register_buffer("scale", torch.tensor(float("inf")))
        if len(self.seen) == 6 and self.what == "loss":
            loss = loss * float("nan")
        if len(self.seen) > 6 and self.what == "size":
            loss = loss * 0 + 300.0
        self.log("train/loss", loss)
        return loss


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("loss", "batch 6 with learning rate 0.1: the loss is nan; try a lower optim.lr"),
        ("size", "batch 8 with learning rate 0.1: the loss rose from "),
        ("weight", "batch 8 with learning rate 0.1: scale holds numbers that are not finite"),
    ],
)
def test_a_training_that_diverges_ends_at_once(what: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^train diverged at {found}") as raised:
        train(Diverging(what), tmp_path)
    assert "\n" not in str(raised.value)
    # what is kept is the last border of an epoch, before it happened
    assert torch.load(tmp_path / RESUME, weights_only=True)["global_step"] == 4


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "deep" / RESUME
    path.parent.mkdir()
    writer = WholeCheckpoints()
    writer.save_checkpoint({"step": 1}, path)
    save = torch.save

    def half(content: Any, file: Any) -> None:
        whole = io.BytesIO()
        save(content, whole)
        Path(file).write_bytes(whole.getvalue()[:50])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        writer.save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    monkeypatch.undo()
    writer.save_checkpoint({"step": 3}, path)
    assert torch.load(path, weights_only=True) == {"step": 3}
    assert [p.name for p in path.parent.iterdir()] == [RESUME]


def test_the_trainer_writes_with_it(tmp_path: Path, monkeypatch) -> None:
    written: list[str] = []
    save = WholeCheckpoints.save_checkpoint

    def note(self: Any, checkpoint: dict, path: Any, **rest: Any) -> None:
        written.append(Path(path).name)
        save(self, checkpoint, path, **rest)

    monkeypatch.setattr(WholeCheckpoints, "save_checkpoint", note)
    train(Line(), tmp_path)
    assert written == [RESUME] * 3  # at every border
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", RESUME]


@pytest.mark.parametrize(
    ("asked", "world", "adversarial", "expected"),
    [
        ("auto", 1, False, "auto"),
        ("auto", 1, True, "auto"),
        ("auto", 2, False, "ddp"),
        ("auto", 2, True, "ddp_find_unused_parameters_true"),
        ("ddp", 2, False, "ddp"),
        ("ddp", 2, True, "ddp_find_unused_parameters_true"),
    ],
)
def test_strategies(
    asked: str, world: int, adversarial: bool, expected: str, tmp_path: Path, monkeypatch
) -> None:
    """A GAN leaves one network's parameters unused in either step, also where the user says ddp."""
    asked_for: dict[str, Any] = {}

    class SeenError(Exception):
        pass

    def trainer(**options: Any) -> None:
        asked_for.update(options)
        raise SeenError

    monkeypatch.setattr(training, "Trainer", trainer)
    options = {"accelerator": "cpu", "devices": world, "strategy": asked, "compile": False}
    machine = dataclasses.replace(MACHINE, trainer=options)
    with pytest.raises(SeenError):
        loop = dataclasses.replace(LOOP, world=world)
        train(Line(), tmp_path, loop, machine, adversarial=adversarial)
    assert asked_for["strategy"] == expected and asked_for["devices"] == world
    assert asked_for["max_epochs"] == 3 and asked_for["limit_train_batches"] == 4
    assert "max_steps" not in asked_for and asked_for["reload_dataloaders_every_n_epochs"] == 1
    assert "compile" not in asked_for and asked_for["precision"] == "32-true"
    with pytest.raises(SeenError):
        train(Line(), tmp_path, LOOP, dataclasses.replace(MACHINE, device="cuda"))
    assert asked_for["precision"] == "bf16-mixed"


def test_sigterm_reaches_the_handler_that_was_there(tmp_path: Path) -> None:
    class NotedError(Exception):
        pass

    def handler(number: int, frame: Any) -> None:
        raise NotedError

    class Terminated(Line):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if len(self.seen) == 6:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            return super().training_step(batch, batch_idx)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(NotedError):
            train(Terminated(), tmp_path)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


ORPHAN = """
import os, sys, time
from experiments.pipeline.ranks import end_with_parent
child = os.fork()
if child:
    print(child, flush=True)
    time.sleep(0.5)
    os._exit(0)
end_with_parent(0.1)
time.sleep(60)
"""


def test_a_rank_ends_with_the_one_that_started_it() -> None:
    begin = time.monotonic()
    command = [sys.executable, "-c", ORPHAN]
    # the child holds the pipe: this returns once it has ended too
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0 and done.stdout.strip().isdigit()
    assert time.monotonic() - begin < 40


def test_later_attempts_replace_what_they_repeat(tmp_path: Path) -> None:
    rows = {
        "000": ["0,0,1.0,", "0,1,0.9,", "0,1,,0.8", "1,2,0.7,", "1,3,0.65,"],
        "001": ["1,2,0.5,", "1,3,0.4,0.3"],
    }
    for name, lines in rows.items():
        (tmp_path / "log" / name).mkdir(parents=True)
        (tmp_path / "log" / name / "metrics.csv").write_text(
            "\n".join(["epoch,step,train/loss,val/loss", *lines, ""])
        )
    assert curves(tmp_path) == {
        "train/loss": [(0, 1.0), (1, 0.9), (2, 0.5), (3, 0.4)],
        "val/loss": [(1, 0.8), (3, 0.3)],
    }
    assert curves(tmp_path / "nothing") == {}


def test_device_of_a_single_process() -> None:
    assert device_of("cpu") == "cpu"
    assert device_of("auto") in ("cuda" if torch.cuda.is_available() else "cpu", "mps")


def test_a_device_that_is_not_there_is_named(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="accelerator=cuda: this machine shows none"):
        device_of("cuda")


def test_a_loop_is_what_changes_the_result() -> None:
    config = TrainerConfig(max_steps=12, epoch_steps=4, batch_size=5, accumulate=2, log_every=7)
    assert config.loop(3) == Loop(3, 4, 5, 2, "auto", world=3)


def test_weights_of_every_few_epochs_are_kept(tmp_path: Path) -> None:
    module = Line()
    module.save_hyperparameters({"config": {"paper": "line"}})
    train(module, tmp_path, monitor=Monitor(keep_every=2, log_every=1))
    (path,) = tmp_path.glob("weights-*.safetensors")
    assert path.name == "weights-00000008.safetensors"
    state, config = load_weights(path)
    assert config["paper"] == "line" and state.keys() == module.state_dict().keys()
    assert not torch.equal(state["layer.weight"], module.layer.weight)  # four batches ago


# Progress ----


@pytest.fixture
def now(monkeypatch) -> Iterator[list[float]]:
    """A clock that stands at now[0]."""
    time_is = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time_is[0])
    yield time_is


def test_plain_lines_say_how_far_and_how_long(now: list[float]) -> None:
    said: list[str] = []
    counter = Counter("train", 400, said.append, "plain", done=100, every=15)
    for done, second in ((110, 5), (130, 15), (140, 20), (190, 45)):
        now[0] = 100 + second
        counter.update(done, "loss 0.5" if done == 190 else "")
    counter.close()
    assert said == [
        "      train 130/400, 2:15 left",  # 30 in 15 s: 270 more in 135 s
        "      train 190/400, 1:45 left, loss 0.5",
    ]


@pytest.mark.parametrize("style", ["none", "rich"])
def test_other_styles_say_nothing(style: str, now: list[float]) -> None:
    said: list[str] = []
    counter = Counter("train", 4, said.append, style)
    now[0] += 100
    counter.update(2)
    counter.close()
    assert said == [] and counter.done == 2


def test_clock() -> None:
    said = ["0:00", "0:59", "1:01", "1:00:00", "10:01:01"]
    assert [clock(s) for s in (0, 59.4, 61, 3600, 36_061)] == said


def test_a_training_counts_on_where_it_resumes(tmp_path: Path, monkeypatch) -> None:
    made: list[Counter] = []

    class Quick(Counter):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "every": 0})
            made.append(self)

    monkeypatch.setattr(training, "Counter", Quick)
    machine = dataclasses.replace(MACHINE, progress="plain")
    with pytest.raises(RuntimeError):
        train(Line(6), tmp_path, machine=machine)
    assert (made[0].first, made[0].done) == (0, 6)
    said = train(Line(), tmp_path, machine=machine)
    assert (made[1].first, made[1].done, made[1].total) == (4, 12, 12)
    assert len(said) == 8 and said[-1].startswith("      train 12/12, 0:00 left, loss 0.")
