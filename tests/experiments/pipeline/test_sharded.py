"""A generator that is spread over two processes: trained as by DDP, exported whole, resumed."""

import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from experiments.papers.sections import TrainerConfig
from experiments.pipeline.fit import RESUME, curves, fit, strategy_of
from experiments.pipeline.loop import Loop, Monitor
from experiments.pipeline.stage import Log, Machine
from lightning_modules.common.checkpoint import load_weights, save_weights
from tests.tiny_generators import asked, batch, draw, same, tiny

# processes are forks of one that has imported torch and run nothing
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.tiny_generators", "experiments.pipeline.fit"])
KINDS = ["paella", "muse critic", "muse uvit", "vq_diffusion", "ldmae"]
LOOP = Loop(epochs=3, length=2, batch_size=4, accumulate=1, precision="32-true", world=2)
OPTIM = {"lr": 3e-3, "ema": 0.8, "clip": 0.5, "warmup_steps": 1}


class StoppedError(Exception):
    """Ends a training at the border of an epoch."""


class Batches(LightningDataModule):
    """Other batches for every rank and epoch; something happens before the third one."""

    def __init__(self, kind: str, happens: str) -> None:
        super().__init__()
        self.kind, self.happens = kind, happens

    def train_dataloader(self) -> DataLoader:
        trainer: Any = self.trainer
        if trainer.current_epoch == 2 and self.happens == "stop":
            raise StoppedError
        if trainer.current_epoch == 2 and self.happens == "kill" and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        first = 100 * trainer.global_rank + LOOP.length * trainer.current_epoch
        batches: Any = [batch(self.kind, first + i) for i in range(LOOP.length)]
        return DataLoader(batches, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        batches: Any = [batch(self.kind, 1000)]
        return DataLoader(batches, batch_size=None)


def train(kind: str, strategy: str, folder: Path, happens: str = "", **more: bool) -> None:
    """Train a generator as one of two ranks, and write its weights."""
    module = tiny(kind, random=0.02, optim=OPTIM).train()
    options = {"accelerator": "cpu", "devices": 2, "strategy": strategy, **more}
    machine = Machine(progress="none", trainer=options)
    log, monitor = Log(lambda line: None), Monitor(val_batches=1, log_every=1)
    data = Batches(kind, happens)
    fit(module, data, LOOP, folder, what="train", machine=machine, log=log, monitor=monitor)
    state, config = module.export()
    if os.environ["RANK"] == "0":
        save_weights(folder / "out.safetensors", state, config)


def first_launch(folder: Path) -> None:
    """Train every kind in both ways; then one is stopped, and one loses a rank."""
    for kind in KINDS:
        for strategy in ("ddp", "fsdp"):
            train(kind, strategy, folder / kind / strategy)
    train("muse critic", "fsdp", folder / "muse critic/again", checkpoint_activations=True)
    with pytest.raises(StoppedError):
        train("muse critic", "fsdp", folder / "muse critic/resumed", "stop")
    try:
        train("paella", "fsdp", folder / "paella/resumed", "kill")
    except ValueError as error:
        (folder / "lost").write_text(str(error))


def second_launch(folder: Path) -> None:
    """Take up what the first one left."""
    for kind in ("muse critic", "paella"):
        train(kind, "fsdp", folder / kind / "resumed")


def as_rank(rank: int, port: int, body: Any, folder: Path) -> None:
    """Be one of two processes, as torchrun starts them."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    body(folder)


def launch(body: Any, folder: Path) -> list[int | None]:
    """Run a body in two processes; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [FORKS.Process(target=as_rank, args=(rank, port, body, folder)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(240)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    assert launch(first_launch, folder) == [0, -signal.SIGKILL]
    assert launch(second_launch, folder) == [0, 0]
    return folder


def pictures(kind: str, folder: Path) -> torch.Tensor:
    """What the weights of a folder draw."""
    module, (state, _) = tiny(kind), load_weights(folder / "out.safetensors")
    module.load_state_dict(state)
    return draw(module, asked(kind), range(4))


@pytest.mark.parametrize("kind", KINDS)
def test_shards_learn_what_copies_learn(kind: str, trained: Path) -> None:
    copies, shards = curves(trained / kind / "ddp"), curves(trained / kind / "fsdp")
    assert copies.keys() == shards.keys() and len(copies["train/loss"]) == 6
    for name, points in copies.items():
        assert dict(shards[name]) == pytest.approx(dict(points), abs=1e-5), name
    one, two = (load_weights(trained / kind / s / "out.safetensors")[0] for s in ("ddp", "fsdp"))
    begun = tiny(kind, random=0.02).state_dict()
    assert one.keys() == two.keys() == begun.keys() and not same(begun, one)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=2e-4)
    one, two = (pictures(kind, trained / kind / s) for s in ("ddp", "fsdp"))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def test_computing_again_changes_nothing(trained: Path) -> None:
    kept, again = (curves(trained / "muse critic" / name) for name in ("fsdp", "again"))
    assert dict(kept["val/loss"]) == pytest.approx(dict(again["val/loss"]), abs=1e-5)


def test_a_lost_rank_is_told_of_in_one_line(trained: Path) -> None:
    said = (trained / "lost").read_text()
    assert said.startswith("train: another process of this training ended") and "\n" not in said


@pytest.mark.parametrize("kind", ["paella", "muse critic"])
def test_resuming_is_exact(kind: str, trained: Path) -> None:
    whole, resumed = trained / kind / "fsdp", trained / kind / "resumed"
    assert sorted(p.name for p in (resumed / "log").iterdir()) == ["000", "001"]
    assert curves(whole) == curves(resumed)
    one, two = (load_weights(f / "out.safetensors")[0] for f in (whole, resumed))
    assert same(one, two)


def test_the_checkpoint_of_shards_is_one_file_like_that_of_copies(trained: Path) -> None:
    one, two = (
        torch.load(trained / "paella" / s / RESUME, weights_only=True) for s in ("ddp", "fsdp")
    )
    for name in ("state_dict", "ema"):
        one[name], two[name] = (c[name].get("shadow", c[name]) for c in (one, two))
        assert {k: v.shape for k, v in one[name].items()} == {
            k: v.shape for k, v in two[name].items()
        }
    moments = [c["optimizer_states"][0]["state"] for c in (one, two)]
    assert moments[0].keys() == moments[1].keys()
    shapes = [[m[k]["exp_avg"].shape for k in sorted(m)] for m in moments]
    assert shapes[0] == shapes[1]


def test_first_stages_are_never_sharded() -> None:
    assert strategy_of("fsdp", 2, True) == "ddp_find_unused_parameters_true"


def test_scaled_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^precision must not be 16-mixed with strategy=fsdp"):
        TrainerConfig(strategy="fsdp", precision="16-mixed")
