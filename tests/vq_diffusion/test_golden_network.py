"""VQ-Diffusion's networks against numbers of the released code, all read from the case."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.common.checkpoint import load_strict
from lightning_modules.common.config import TextConfig
from lightning_modules.common.settings import build
from lightning_modules.common.text import ClipTextEncoder, clip_token_ids, openai_clip_text
from lightning_modules.vq_diffusion.config import ModelConfig
from lightning_modules.vq_diffusion.convert import Official, convert
from lightning_modules.vq_diffusion.network import Attention, Denoiser
from lightning_modules.vqgan import convert as vqgan_convert
from lightning_modules.vqgan.module import VQGANModule
from lightning_modules.vqgan.quantizer import used_from_map

pytestmark = pytest.mark.golden
CPU = torch.device("cpu")


def settings(config: dict) -> dict[str, Any]:
    """All named settings of a case, whatever section of the released config they stand in."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= settings(value) if isinstance(value, dict) else {key: value}
    return flat


def load(case) -> tuple[Official, Denoiser]:
    official = convert(case.weights, settings(case.config))
    network = Denoiser(build(ModelConfig, official.model))
    load_strict(network, official.network, case.name)
    return official, network.eval()


def square(tokens: Tensor, case) -> Tensor:
    """[B, L] -> [B, h, w] of the case's grid."""
    found = settings(case.config)
    side = found.get("content_spatial_size") or [found["sample_size"]] * 2
    return tokens.unflatten(1, side)


def limits(case, words: str) -> dict[str, float]:
    """The tolerance whose name holds the given words."""
    (found,) = [v for k, v in case.tolerance.items() if words in k]
    return {"rtol": 0.0, **found}


def condition(case, io: dict[str, Tensor]) -> Tensor | None:
    return io.get("cond_emb", io.get("label"))


def attention_means(network: Denoiser) -> dict[str, Tensor]:
    """Hooks that fill in softmax(q k^T / sqrt(d)) of each block's last one, averaged over heads."""
    seen: dict[str, Tensor] = {}

    def record(name: str):
        def hook(module: Attention, args: tuple) -> None:
            keys = (
                args[1][0].keys if len(args) > 1 and args[1] else module.split(module.key(args[0]))
            )
            query = module.split(module.query(args[0]))
            weights = query @ keys.transpose(-1, -2) / math.sqrt(query.shape[-1])
            seen[name] = weights.softmax(-1).mean(1)

        return hook

    for i, block in enumerate(network.blocks):
        last = block.attn2 if network.config.condition == "text" else block.attn1
        last.register_forward_pre_hook(record(f"block{i}_attn_mean"))
    return seen


@pytest.mark.parametrize("name", ["text", "text_conv_abs", "class", "class_insnorm", "uncond"])
@torch.inference_mode()
def test_denoiser(golden, name):
    case = golden(f"vq_diffusion/denoiser_{name}")
    io, tolerance = case.io, limits(case, "logits")
    _, network = load(case)
    seen = attention_means(network)

    def record(key: str):
        return lambda module, args, output: seen.__setitem__(key, output)

    network.content_emb.register_forward_hook(record("content_emb"))
    for i, block in enumerate(network.blocks):
        block.register_forward_hook(record(f"block{i}_out"))
        for part, module in block.named_children():
            # the released class and unconditional blocks have one attention without a number
            released = part if network.config.condition == "text" else part.replace("attn1", "attn")
            module.register_forward_hook(record(f"block{i}_{released}"))
    x, given = square(io["x_t"], case), condition(case, io)
    seen["logits"] = network(x, io["t"], given).transpose(1, 2)
    seen["log_x0"] = seen["logits"].double().log_softmax(1).float()
    inputs = {"x_t", "t", "cond_emb", "label", "logits_null_class"}
    compared = io.keys() - inputs
    assert compared <= seen.keys() and "logits" in compared
    for key in sorted(compared):
        torch.testing.assert_close(
            seen[key], io[key], **tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )
    if "logits_null_class" in io:
        null = torch.full_like(io["label"], case.config["class_number"])
        logits = network(x, io["t"], null).transpose(1, 2)
        torch.testing.assert_close(logits, io["logits_null_class"], **tolerance)


@pytest.mark.parametrize("name", ["text", "class", "uncond"])
@torch.inference_mode()
def test_kept_rows_are_those_of_the_logits(golden, name):
    case = golden(f"vq_diffusion/denoiser_{name}")
    io, tolerance = case.io, limits(case, "logits")
    _, network = load(case)
    x = square(io["x_t"], case)
    keep = torch.arange(x.numel()).view(x.shape) % 3 == 0
    rows = network.mixed_rows(x, io["t"], [network.prepare(condition(case, io))], [1.0], keep)
    expected = io["logits"].transpose(1, 2)[keep.flatten(1)]
    torch.testing.assert_close(network.head(rows), expected, **tolerance)


@torch.inference_mode()
def test_hf_layout(golden):
    case = golden("vq_diffusion/hf_layout")
    io = case.io
    official, network = load(case)
    log_x0 = network(square(io["x_t"], case), io["t"], io["cond_emb"]).double().log_softmax(2)
    torch.testing.assert_close(
        log_x0.transpose(1, 2).float(), io["log_x0"], **limits(case, "log_x0")
    )
    twin = golden("vq_diffusion/denoiser_text")
    if torch.equal(io["x_t"], twin.io["x_t"]):  # the case says: the same numbers, other names
        released = convert(twin.weights, settings(twin.config))
        assert build(ModelConfig, released.model) == network.config
        assert released.network.keys() == official.network.keys()
        for key, value in released.network.items():
            assert torch.equal(official.network[key], value), key


def text_encoder(official: Official) -> ClipTextEncoder:
    encoder = ClipTextEncoder(TextConfig(name="clip"))
    encoder.use(openai_clip_text(official.text).text_model, CPU)
    return encoder


@torch.inference_mode()
def test_full_model_reads_its_text(golden):
    case = golden("vq_diffusion/full_model")
    io, tolerance = case.io, limits(case, "logits")
    official, network = load(case)
    features = text_encoder(official).states(io["condition_token"]).tokens
    torch.testing.assert_close(features, io["clip_text_features"], **tolerance)
    empty = ~io["condition_mask"].bool()[:, 2]
    assert empty.any() and not empty.all()
    shown = torch.where(empty[:, None, None], official.null, features)
    torch.testing.assert_close(shown, io["cond_emb"], **tolerance)
    logits = network(square(io["x_t"], case), io["t"], shown).transpose(1, 2)
    torch.testing.assert_close(logits, io["logits"], **tolerance)
    assert network.config.diffusion_steps == case.config["diffusion_step"]
    assert official.mask_rate == 0.99999 and set(official.statistics) == {"Lt_history", "Lt_count"}


@torch.inference_mode()
def test_checkpoint_layout(golden):
    case = golden("vq_diffusion/checkpoint_layout")
    io, found = case.io, settings(case.config)
    official, network = load(case)
    assert official.null is not None and official.null.shape[1] == network.config.condition_dim
    sides = network.prepare(official.null[None])
    x = square(io["decode_tokens"], case)
    rows = network.mixed_rows(x, torch.zeros(1, dtype=torch.int64), [sides], [1.0])
    assert network.head(rows).shape == (x.numel(), found["quantize_number"])
    text = text_encoder(official)
    assert (
        text.states(torch.zeros(1, len(official.null), dtype=torch.int64)).tokens.isfinite().all()
    )

    ids = clip_token_ids(case.config["texts"], found["context_length"], found["pad_value"])
    assert torch.equal(ids, io["text_token"])
    end = ids.argmax(1, keepdim=True)  # the end token has the largest id
    assert torch.equal(torch.arange(ids.shape[1]) <= end, io["text_mask"].bool())

    used = used_from_map(io["full_to_quantize"])
    assert torch.equal(used, io["quantize_to_full"])
    state, config = vqgan_convert.convert(
        {**case.weights, "content_codec.quantize.used": used}, {**found, "unknown_index": 0}
    )
    tokenizer = VQGANModule.from_export(state, config).eval()
    assert tokenizer.num_codes == found["quantize_number"] == network.config.num_codes
    check_tokenizer(tokenizer, case)


def check_tokenizer(tokenizer: VQGANModule, case) -> None:
    io, tolerance = case.io, limits(case, "features")
    quantizer = tokenizer.autoencoder.quantize
    latents = tokenizer.autoencoder.encode(io["image"] / 127.5 - 1)
    torch.testing.assert_close(latents, io["quant_conv_out"], **tolerance)
    torch.testing.assert_close(quantizer.proj(latents), io["quantizer_logits"], **tolerance)
    assert torch.equal(quantizer.proj(latents).argmax(1).flatten(1), io["argmax_token_full"])
    gumbel = -torch.log(-torch.log(io["gumbel_u"] + 1e-30) + 1e-30)
    drawn = quantizer.to_used(quantizer(latents, noise=gumbel).tokens)
    assert torch.equal(drawn.flatten(1), io["tokens_with_noise"])
    tokens = square(io["decode_tokens"], case)
    pictures = ((tokenizer.decode(tokens) + 1) * 127.5).clamp(0, 255)
    torch.testing.assert_close(pictures, io["decoded"], **tolerance)
    assert F.mse_loss(pictures, io["decoded"]) < 1e-3
