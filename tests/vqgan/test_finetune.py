"""Fine-tuning of the decoder: the tokens stay what they were, and generators go on with them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from data.files import file_hash
from experiments.settings import ConfigError, UserError
from lightning_modules.common.checkpoint import load_weights, save_weights
from lightning_modules.common.request import Request
from lightning_modules.muse.module import MuseModule
from lightning_modules.registry import load_first_stage, load_generator
from lightning_modules.vqgan.module import VQGANModule
from tests import micro_runs

pytestmark = pytest.mark.filterwarnings("ignore:Found", "ignore:You def", *micro_runs.QUIET)
TAMING = {
    "ch": 8,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "z_channels": 4,
    "embed_dim": 4,
    "num_codes": 12,
    "norm_groups": 4,
    "quantizer": "ema",
    "restart_after": 2,
}
PAELLA = {
    "network": "paella",
    "num_codes": 12,
    "c_hidden": 8,
    "c_latent": 4,
    "bottleneck_blocks": 1,
    "levels": 2,
    "quantizer": "ema",
}
WIDER = {
    "taming": {**TAMING, "decoder_ch": 16, "decoder_res_blocks": 4},
    "paella": {**PAELLA, "decoder_hidden": 16, "bottleneck_blocks": 2},
}
SAME = {"taming": TAMING, "paella": PAELLA}


def images(n: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def make(model: dict[str, Any], **more: Any) -> VQGANModule:
    torch.manual_seed(len(more))
    objective = {"disc_start": 1, "disc_layers": 1, "disc_width": 8, "perceptual_weight": 0.0}
    return VQGANModule({"model": model, "objective": objective, "optim": {"lr": 1e-2}, **more})


@pytest.fixture(params=["taming", "paella"])
def first(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A tokenizer file of either network."""
    module = make(SAME[request.param])
    for p in module.autoencoder.parameters():
        torch.nn.init.normal_(p, std=0.2)
    path = tmp_path / "first.safetensors"
    save_weights(path, *module.export())
    return request.param, path


def finetuned(path: Path, model: dict[str, Any]) -> VQGANModule:
    """The decoder trained for a few batches on the tokens of the file."""
    module = make(model, finetune=str(path))
    module.adopt(load_weights(path)[0], file_hash(path))
    batches: Any = [{"image": images(seed=i)} for i in range(6)]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return module.eval()


@pytest.mark.parametrize("wider", [False, True])
def test_only_the_decoder_is_trained(first: tuple[str, Path], wider: bool, tmp_path: Path) -> None:
    kind, path = first
    before = load_first_stage(path)
    module = finetuned(path, (WIDER if wider else SAME)[kind])
    new = tmp_path / "new.safetensors"
    save_weights(new, *module.export())
    after = load_first_stage(new)
    x = images(8, seed=9)
    assert torch.equal(after.encode(x), before.encode(x))
    assert torch.equal(after.codebook(), before.codebook())
    tokens = before.encode(x)
    assert not torch.equal(after.decode(tokens), before.decode(tokens))
    old, state = load_weights(path)[0], load_weights(new)[0]
    decoding = tuple(f"{n}." for n in module.autoencoder.decoding)
    kept = [k for k in state if not k.startswith(decoding)]
    assert kept and all(torch.equal(state[k], old[k]) for k in kept)
    count = sum(v.numel() for k, v in state.items() if k.startswith(decoding))
    assert (count > sum(v.numel() for k, v in old.items() if k.startswith(decoding))) == wider


def test_a_decoder_as_wide_is_trained_further(first: tuple[str, Path]) -> None:
    kind, path = first
    module = make(SAME[kind], finetune=str(path))
    module.adopt(load_weights(path)[0], file_hash(path))
    before = load_first_stage(path)
    tokens = before.encode(images())
    assert torch.equal(module.eval().decode(tokens), before.decode(tokens))


def test_blocks_and_widths_of_the_wider_decoder() -> None:
    decoder = make(WIDER["taming"]).autoencoder.decoder
    assert [len(level.block) for level in decoder.up] == [4, 4]
    assert decoder.conv_out.in_channels == 16


def test_another_encoder_is_refused(first: tuple[str, Path]) -> None:
    kind, path = first
    width = {"ch": 16} if kind == "taming" else {"c_hidden": 16}
    module = make({**SAME[kind], **width}, finetune=str(path))
    with pytest.raises(ValueError, match="the tokenizer that finetune names does not fit"):
        module.adopt(load_weights(path)[0], "")


def test_generators_take_the_new_decoder(first: tuple[str, Path], tmp_path: Path) -> None:
    kind, path = first
    module = finetuned(path, WIDER[kind])
    new = tmp_path / "new.safetensors"
    save_weights(new, *module.export())
    model = {
        "num_codes": 12,
        "hidden": 8,
        "mlp": 8,
        "layers": 1,
        "heads": 2,
        "max_side": 8,
        "text_width": 8,
    }
    generator = MuseModule(
        {
            "paper": "muse",
            "grid": [8, 8],
            "num_codes": 12,
            "model": model,
            "text": {"name": "bytes", "width": 8, "buckets": 16},
        }
    )
    state, config = generator.export()
    named = {"file": path.name, "sha256": file_hash(path)}
    save_weights(tmp_path / "g.safetensors", state, {**config, "first_stage": named})
    plain, finer = (load_generator(tmp_path / "g.safetensors", t) for t in (path, new))
    asked = Request(["a"], [0])
    assert torch.equal(plain.sample_tokens(asked), finer.sample_tokens(asked))
    assert not torch.equal(plain.sample(asked), finer.sample(asked))
    # a file fine-tuned twice still says whose tokens it has
    assert load_first_stage(new).same_tokens_as == file_hash(path)
    assert load_first_stage(new).export()[1]["tokens_of"] == file_hash(path)


def test_a_run_goes_on_from_another_runs_tokenizer(tmp_path: Path) -> None:
    def go(name: str, *words: str, paper: str = "vqgan") -> Path:
        micro_runs.go(paper, tmp_path / name, tmp_path / "cache", *words)
        return tmp_path / name / "tokenizer.safetensors"

    original = go("original")
    wider = ["model.decoder_ch=32", "model.decoder_res_blocks=4"]
    finer = go("finer", f"finetune={original}", *wider)
    before, after = load_first_stage(original), load_first_stage(finer)
    x = images(4)
    assert torch.equal(after.encode(x), before.encode(x))
    assert after.same_tokens_as == file_hash(original)
    # what was trained on the tokens of the one samples through the other
    go("paella", f"tokenizer.ckpt={original}", paper="paella")
    plain, tuned = (load_generator(tmp_path / "paella", file) for file in (original, finer))
    asked = Request(["a red circle"], [0])
    assert torch.equal(plain.sample_tokens(asked), tuned.sample_tokens(asked))
    assert not torch.equal(plain.sample(asked), tuned.sample(asked))

    with pytest.raises(ConfigError, match="finetune: there is no file none"):
        micro_runs.stages("vqgan", "finetune=none.safetensors")
    with pytest.raises(UserError, match="does not fit"):
        go("other", f"finetune={original}", "model.ch=8")
