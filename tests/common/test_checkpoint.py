"""Weights to files and back; foreign checkpoints without running what they hold."""

import argparse
import collections
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.data import AttributeDict
from safetensors.torch import save_file
from torch import Tensor, nn

from data.files import file_hash
from lightning_modules.common import checkpoint
from lightning_modules.common.checkpoint import (
    load_entries,
    load_foreign,
    load_strict,
    load_tensor,
    load_weights,
    save_weights,
)

CONFIG = {"paper": "none", "sizes": [1, 2], "rate": 0.5, "deep": {"name": "größer", "none": None}}


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4, generator=generator),
        "a.half": torch.randn(2, generator=generator).half(),
        "count": torch.tensor(7),
        "turned": torch.randn(3, 4, generator=generator).t(),  # not contiguous
    }


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[k].dtype == expected[k].dtype and torch.equal(found[k], expected[k]) for k in found
    )


def test_weights_and_settings_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "x.safetensors"
    save_weights(path, weights(), CONFIG)
    state, config = load_weights(path)
    assert same(state, weights()) and config == CONFIG
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]
    assert file_hash(path) == file_hash(str(path)) and len(file_hash(path)) == 64
    before = file_hash(path)
    save_weights(path, {**weights(), "count": torch.tensor(8)}, CONFIG)
    assert file_hash(path) != before


def test_a_failed_save_leaves_the_former_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "x.safetensors"
    save_weights(path, weights(), CONFIG)
    before = path.read_bytes()

    def half(tensors: Any, name: Path, **options: Any) -> None:
        Path(name).write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", half)
    for target in (path, tmp_path / "other.safetensors"):
        with pytest.raises(KeyboardInterrupt):
            save_weights(target, {"b": torch.zeros(2)}, {})
    assert path.read_bytes() == before
    assert not (tmp_path / "other.safetensors").exists()


class Small(LightningModule):
    def __init__(self, config: dict) -> None:
        super().__init__()
        self.save_hyperparameters({"config": config})
        self.layer = nn.Linear(2, 2)


def test_reads_a_lightning_checkpoint(tmp_path: Path, monkeypatch) -> None:
    module = Small(CONFIG)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    asked = []
    load = torch.load

    def note(*args: Any, **options: Any) -> Any:
        asked.append(options.get("weights_only"))
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", note)
    state, config = load_weights(tmp_path / "x.ckpt")
    assert same(state, module.state_dict()) and config == CONFIG
    assert asked == [True]


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*none\.ckpt"):
        load_weights(tmp_path / "none.ckpt")
    save_file(weights() | {"turned": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match=r"holds no settings.*experiments\.convert"):
        load_weights(tmp_path / "bare.safetensors")
    for content in ({"state_dict": weights()}, [1, 2]):
        torch.save(content, tmp_path / "foreign.ckpt")
        with pytest.raises(ValueError, match=r"not a checkpoint of this suite.*convert"):
            load_weights(tmp_path / "foreign.ckpt")


class Trap:
    """Writes a file when it is unpickled without care."""

    marker = ""

    def __reduce__(self) -> tuple:
        return open, (self.marker, "w")


class Evaluated(Trap):
    def __reduce__(self) -> tuple:
        return eval, (f"open({self.marker!r}, 'w')",)


class Stateful:
    """A class whose own code would run while its state is set."""

    marker = ""

    def __init__(self) -> None:
        self.state = {"a": torch.zeros(1)}

    def __setstate__(self, state: Any) -> None:
        Path(Stateful.marker).touch()


EXTRAS = {
    "nothing": lambda: None,
    "namespace": lambda: argparse.Namespace(lr=1.0, layers=[1, 2], inner=argparse.Namespace()),
    "trap": Trap,
    "eval": Evaluated,
    "setstate": Stateful,
    "class as a key": lambda: {Stateful: {"best": 0.1}},
    "numpy": lambda: {"best": np.float64(0.5), "order": np.arange(3)},
    "counter": lambda: collections.Counter("aab"),
    "path": lambda: Path("/somewhere"),
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_foreign_objects_stay_inert(extra: str, tmp_path: Path, monkeypatch) -> None:
    marker = tmp_path / "was-run"
    for cls in (Trap, Stateful):
        monkeypatch.setattr(cls, "marker", str(marker))
    content = {"epoch": 3, "state_dict": weights(), "hyper_parameters": EXTRAS[extra]()}
    torch.save(content, tmp_path / "x.ckpt")
    assert same(load_foreign(tmp_path / "x.ckpt"), weights())
    assert not marker.exists()
    # the stand-ins are gone afterwards
    if extra in ("namespace", "trap", "setstate"):
        with pytest.raises(Exception, match="Unsupported global"):
            torch.load(tmp_path / "x.ckpt", weights_only=True)
        assert not marker.exists()


def test_the_traps_would_run(tmp_path: Path, monkeypatch) -> None:
    """What the test above rests on: a plain unpickling does run them."""
    import pickle

    monkeypatch.setattr(Trap, "marker", str(tmp_path / "was-run"))
    pickle.loads(pickle.dumps(Trap())).close()
    assert (tmp_path / "was-run").exists()


def test_commands_of_the_system_are_refused(tmp_path: Path) -> None:
    class Command:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path / 'was-run'}",)

    torch.save({"state_dict": weights(), "extra": Command()}, tmp_path / "x.ckpt")
    with pytest.raises(Exception, match="read safely"):
        load_foreign(tmp_path / "x.ckpt")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "model", "both"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", "old.pth"])
def test_layouts_of_foreign_files(wrap: str, prefix: str, suffix: str, tmp_path: Path) -> None:
    state: Any = {prefix + k: v for k, v in weights().items()}
    content = {
        "bare": state,
        "state_dict": {"state_dict": state, "step": 3, "lr": 0.1},
        "model": {"model": collections.OrderedDict(state), "optimizer": {"state": {}}},
        "both": {"state_dict": {"model": state}},
    }[wrap]
    path = tmp_path / f"x{suffix}"
    torch.save(content, path, _use_new_zipfile_serialization=not suffix.startswith("old"))
    assert same(load_foreign(path), weights())


def test_a_prefix_of_some_names_only_stays(tmp_path: Path) -> None:
    state = {"module.a": torch.zeros(1), "b": torch.ones(1)}
    torch.save(state, tmp_path / "x.pt")
    assert load_foreign(tmp_path / "x.pt").keys() == state.keys()


def test_safetensors_and_folders(tmp_path: Path) -> None:
    state = {k: v.contiguous() for k, v in weights().items()}
    save_file(state, tmp_path / "x.safetensors")
    assert same(load_foreign(tmp_path / "x.safetensors"), state)
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"vae holds no \.safetensors or \.bin weights"):
        load_foreign(folder)
    torch.save({"old": torch.zeros(1)}, folder / "diffusion_pytorch_model.bin")
    assert load_foreign(folder).keys() == {"old"}
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    assert same(load_foreign(folder), state)  # rather than the pickle


def test_files_without_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_foreign(tmp_path / "none.pt")
    torch.save({"state_dict": {"a": 1}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds no tensors"):
        load_foreign(tmp_path / "x.pt")
    for i, content in enumerate(([1, 2], None, 3.0)):
        torch.save(content, tmp_path / f"{i}.pt")
        with pytest.raises(ValueError, match="holds no tensors"):
            load_foreign(tmp_path / f"{i}.pt")


def test_strict_loading(tmp_path: Path) -> None:
    state = {k: v.clone() for k, v in nn.Linear(2, 3).state_dict().items()}
    module = nn.Linear(2, 3)
    load_strict(module, state, "the file")
    assert same(module.state_dict(), state)
    wrong = {"weight": torch.zeros(3, 5), "z.extra": torch.zeros(1), "extra": torch.zeros(1)}
    with pytest.raises(ValueError) as raised:
        load_strict(module, wrong, "x.pt")
    said = str(raised.value)
    assert said == (
        "x.pt does not fit Linear: 1 missing, first 'bias'; 2 left over, first 'extra'; "
        "1 of wrong shape, first 'weight'"
    )
    assert same(module.state_dict(), state)  # nothing was loaded by halves


def test_entries_of_a_training_file(tmp_path: Path) -> None:
    model = {f"module.{k}": v for k, v in weights().items()}
    file = {"model": model, "ema": weights(), "step": 3, "rest": {"state": {}}, "b": torch.ones(1)}
    torch.save(file, tmp_path / "a.pth")
    found = load_entries(tmp_path / "a.pth")
    assert found.keys() == {"", "model", "ema"} and same(found[""], {"b": torch.ones(1)})
    assert same(found["model"], weights()) and same(found["ema"], weights())
    torch.save({"step": 3}, tmp_path / "b.pth")
    assert load_entries(tmp_path / "b.pth") == {}
    with pytest.raises(FileNotFoundError):
        load_entries(tmp_path / "none.pth")


def test_a_single_tensor(tmp_path: Path) -> None:
    value = torch.arange(4)
    for content in (value, {"map": value}, {"module.map": value, "note": "x"}):
        torch.save(content, tmp_path / "a.pt")
        assert torch.equal(load_tensor(tmp_path / "a.pt"), value)
    for content in ({"map": value, "other": value}, {"note": "x"}, [value]):
        torch.save(content, tmp_path / "b.pt")
        with pytest.raises(ValueError, match=r"b\.pt must hold one tensor"):
            load_tensor(tmp_path / "b.pt")


def test_tensors_that_share_storage_are_written(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    state = {"a": whole, "b": whole, "half": whole[:3], "turned": whole.view(2, 3).t()}
    save_weights(tmp_path / "x.safetensors", state, {})
    assert same(load_weights(tmp_path / "x.safetensors")[0], state)


@pytest.mark.parametrize("found", [3, None, [1], {"config": 3}, "text"], ids=str)
def test_a_lightning_file_of_others_is_refused(found: Any, tmp_path: Path) -> None:
    torch.save({"hyper_parameters": found, "state_dict": weights()}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="not a checkpoint of this suite"):
        load_weights(tmp_path / "x.ckpt")


CONTAINERS = {
    "defaultdict": lambda: collections.defaultdict(list, {"a": [1]}),
    "deque": lambda: collections.deque([1, 2], maxlen=4),
    "counter": lambda: collections.Counter("aab"),
    "ordered": lambda: collections.OrderedDict(a=1),
    "attributes": lambda: AttributeDict(a=1, inner=AttributeDict(b=[2])),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_are_read(kind: str, tmp_path: Path) -> None:
    torch.save({"state_dict": weights(), "extra": CONTAINERS[kind]()}, tmp_path / "x.ckpt")
    assert same(load_foreign(tmp_path / "x.ckpt"), weights())
    torch.save({"state_dict": AttributeDict(weights())}, tmp_path / "y.ckpt")
    assert same(load_foreign(tmp_path / "y.ckpt"), weights())


class Odd(dict):
    """A dict that no stand-in takes the place of."""


@pytest.mark.parametrize("zipped", [True, False])
def test_a_class_that_cannot_be_read_is_named(zipped: bool, tmp_path: Path) -> None:
    content = {"state_dict": weights(), "extra": Odd(a=1)}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"read safely: it holds a \S*Odd$"):
        load_foreign(tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse_coo", "sparse_csr", "quantized", "meta", "nested"])
def test_other_kinds_of_tensors_are_refused(kind: str, tmp_path: Path) -> None:
    value = {
        "sparse_coo": lambda: torch.eye(3).to_sparse(),
        "sparse_csr": lambda: torch.eye(3).to_sparse_csr(),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "meta": lambda: torch.ones(2, device="meta"),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    }[kind]()
    torch.save({"a": torch.ones(1), "odd": value}, tmp_path / "x.pt")
    for read in (load_foreign, load_entries):
        with pytest.raises(ValueError, match=rf"odd is a tensor of kind \S*{kind}"):
            read(tmp_path / "x.pt")


def test_no_key_is_lost(tmp_path: Path) -> None:
    torch.save({0: torch.ones(1), "a": torch.zeros(1)}, tmp_path / "x.pt")
    assert load_foreign(tmp_path / "x.pt").keys() == {"0", "a"}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_several_files_are_read_whole(kind: str, tmp_path: Path) -> None:
    state = {k: v.contiguous() for k, v in weights().items()}
    files = {}
    for i, (key, value) in enumerate(state.items(), 1):
        files[key] = f"model-{i:05d}-of-{len(state):05d}.{kind}"
        write = save_file if kind == "safetensors" else torch.save
        write({key: value}, tmp_path / files[key])
    index = tmp_path / f"model.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert same(load_foreign(tmp_path), state)
    (tmp_path / files["a.half"]).unlink()
    with pytest.raises(FileNotFoundError, match=files["a.half"]):
        load_foreign(tmp_path)
    for content in ([], {"weight_map": {"a": "../x.bin"}}, {"weight_map": {}}, {"weight_map": 3}):
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="weight_map"):
            load_foreign(tmp_path)
