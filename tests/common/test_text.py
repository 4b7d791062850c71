"""Text encoders: the trained one, and tiny stand-ins of the frozen ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.common.config import TextConfig
from lightning_modules.common.text import (
    TEXT_ENCODERS,
    ByT5Encoder,
    ByteEncoder,
    ClipTextEncoder,
    OpenClipEncoder,
    T5Encoder,
    clip_token_ids,
    ngram_ids,
)

CPU = torch.device("cpu")
CAPTIONS = [
    "a small red circle left of a large blue square",
    "",
    "red.",
    "größer, 大きい 🙂 — «naïve»",
    "one two three four five six seven",
]


def byte_encoder(**settings) -> ByteEncoder:
    torch.manual_seed(0)
    config = TextConfig(width=16, layers=2, buckets=128, **settings)
    return ByteEncoder(config).eval()


def test_a_captions_encoding_does_not_depend_on_its_batch() -> None:
    encoder = byte_encoder()
    together = encoder(CAPTIONS, CPU)
    assert together.mask is not None and together.pooled is not None
    lengths = [len(encoder.split(c)) or 1 for c in CAPTIONS]
    assert together.mask.sum(1).tolist() == lengths
    assert together.tokens.shape == (5, max(lengths), 16)
    for i, caption in enumerate(CAPTIONS):
        alone = encoder([caption], CPU)
        assert alone.mask is not None and alone.mask.all()
        assert torch.equal(together.mask[i], torch.arange(max(lengths)) < lengths[i])
        torch.testing.assert_close(together.tokens[i, : lengths[i]], alone.tokens[0])
        torch.testing.assert_close(together.pooled[i], alone.tokens[0].mean(0))


def test_the_empty_caption_is_one_learned_token() -> None:
    encoder = byte_encoder()
    for empty in ("", "   ", "\n\t"):
        assert encoder([empty], CPU).tokens.shape == (1, 1, 16)
    encoder([""], CPU).tokens.square().sum().backward()
    gradient = encoder.ngrams.weight.grad
    assert gradient is not None
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == [128]


def test_words_case_and_punctuation() -> None:
    encoder = byte_encoder()
    assert encoder.split("A red circle, left-most.") == [
        "a",
        "red",
        "circle",
        ",",
        "left-most",
        ".",
    ]
    assert encoder.split("it's (very)large") == ["it's", "(", "very", ")", "large"]
    one, two = (encoder([c], CPU).tokens for c in ("A Red  circle.", "a red circle ."))
    assert torch.equal(one, two)
    for other in ("a red circle", "circle red a .", "a red circles ."):
        tokens = encoder([other], CPU).tokens
        assert tokens.shape != one.shape or not torch.allclose(tokens, one, atol=1e-3)


def test_relatives_share_ngrams() -> None:
    square, squares, circle = (set(ngram_ids(w, 4096)) for w in ("square", "squares", "circle"))
    assert len(square & squares) > len(square) / 2 > len(square & circle)
    assert all(0 <= i < 50 for i in ngram_ids("größer大きい", 50))
    assert ngram_ids("a", 4096)


def test_half_a_surrogate_pair_is_a_caption_too() -> None:
    caption = json.loads('"a \\ud83d smile"')
    assert byte_encoder()([caption], CPU).tokens.isfinite().all()


def test_long_captions_are_cut() -> None:
    encoder = byte_encoder(max_length=4)
    long, short = (encoder([c], CPU) for c in ("one two three four five six", "one two three four"))
    assert torch.equal(long.tokens, short.tokens)


def test_it_is_trained_with_the_generator() -> None:
    encoder = byte_encoder().train()
    found = encoder(CAPTIONS, CPU)
    found.tokens[found.mask].square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def byt5(path: str, **settings) -> ByT5Encoder:
    return ByT5Encoder(TextConfig(**{"name": "byt5", "path": path, "clip": None, **settings}))


def test_masked_padding_equals_encoding_one_by_one(tiny_t5: str) -> None:
    encoder = byt5(tiny_t5)
    together = encoder(CAPTIONS, CPU)
    assert together.mask is not None and together.tokens.dtype == torch.float32
    for i, caption in enumerate(CAPTIONS):
        alone = encoder([caption], CPU)
        length = min(len(caption.encode()), 63) + 1  # bytes and the end
        assert alone.tokens.shape == (1, length, 16) and together.mask[i].sum() == length
        torch.testing.assert_close(
            together.tokens[i, :length], alone.tokens[0], rtol=1e-4, atol=1e-5
        )


def test_attended_padding_is_a_setting(tiny_t5: str) -> None:
    shown = byt5(tiny_t5, mask_padding=False)
    together, alone = shown(CAPTIONS, CPU), shown(CAPTIONS[2:3], CPU)
    assert together.mask is None and alone.mask is None
    length = alone.tokens.shape[1]
    assert not torch.allclose(together.tokens[2, :length], alone.tokens[0], atol=1e-3)
    torch.testing.assert_close(alone.tokens, byt5(tiny_t5)(CAPTIONS[2:3], CPU).tokens)


def test_byt5_cuts_at_max_length(tiny_t5: str) -> None:
    found = byt5(tiny_t5, max_length=8)(CAPTIONS, CPU)
    assert found.tokens.shape[1] == 8
    torch.testing.assert_close(
        byt5(tiny_t5, max_length=8)(["abcdefghij"], CPU).tokens,
        byt5(tiny_t5, max_length=8)(["abcdefg"], CPU).tokens,
    )


def test_a_missing_t5_is_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as raised:
        byt5(str(tmp_path / "none"))(["a"], CPU)
    said = str(raised.value)
    assert said.startswith(f"text.path={tmp_path}/none is neither") and "\n" not in said


@pytest.fixture
def worded_t5(tiny_t5: str, tmp_path: Path) -> str:
    """A T5 encoder beside the vocabulary of a few pieces."""
    from transformers import T5Tokenizer

    folder = shutil.copytree(tiny_t5, tmp_path / "worded")
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁red", "▁dog", "▁on", "s"]
    T5Tokenizer(vocab=[(p, -float(i)) for i, p in enumerate(pieces)], extra_ids=0).save_pretrained(
        folder
    )
    return str(folder)


def test_t5_gives_the_states_of_its_pieces(worded_t5: str) -> None:
    from transformers import T5EncoderModel

    encoder = T5Encoder(TextConfig(name="t5", path=worded_t5, max_length=5))
    found = encoder(["a red dog", "", "a dogs on a dogs"], CPU)
    assert found.pooled is None and found.mask is not None
    assert found.mask.sum(1).tolist() == [4, 1, 5]  # the end of the text counts, cut or not
    model = T5EncoderModel.from_pretrained(worded_t5).eval()
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([[4, 5, 6, 1]])).last_hidden_state
    torch.testing.assert_close(found.tokens[0, :4], alone[0], rtol=1e-4, atol=1e-5)
    shown = T5Encoder(TextConfig(name="t5", path=worded_t5, mask_padding=False))
    assert shown(["a", "a dog"], CPU).mask is None


def test_a_t5_without_vocabulary_is_refused(tiny_t5: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no vocabulary; put the tokenizer\.json"):
        T5Encoder(TextConfig(name="t5", path=tiny_t5))(["a"], CPU)
    with pytest.raises(ValueError, match=r"is neither a folder .* download google/t5-v1_1-xxl"):
        T5Encoder(TextConfig(name="t5", path=str(tmp_path / "none")))(["a"], CPU)


def test_open_clip_gives_pooled_vectors_of_text_and_images(tiny_clip: dict[str, str]) -> None:
    import open_clip

    encoder = OpenClipEncoder(TextConfig(name="open_clip", **tiny_clip))
    found = encoder(CAPTIONS[:3], CPU)
    assert found.pooled is not None and found.mask is None and found.pooled.shape == (3, 12)
    assert torch.equal(found.tokens, found.pooled[:, None])
    model = open_clip.create_model(tiny_clip["clip"], tiny_clip["clip_pretrained"]).eval()
    tokens = open_clip.get_tokenizer(tiny_clip["clip"])(CAPTIONS[:3])
    with torch.no_grad():
        torch.testing.assert_close(found.pooled, model.encode_text(tokens))
    for i, caption in enumerate(CAPTIONS[:3]):
        alone = encoder([caption], CPU).pooled
        torch.testing.assert_close(found.pooled[i : i + 1], alone)

    images = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (model.visual.image_mean, model.visual.image_std)
    )
    with torch.no_grad():
        expected = model.encode_image(((images + 1) / 2 - mean) / std)
    torch.testing.assert_close(encoder.encode_images(images), expected)
    flat = torch.full((1, 3, 40, 56), 0.25)  # the whole picture is used, whatever its shape
    torch.testing.assert_close(encoder.encode_images(flat), encoder.encode_images(flat[..., :9]))


def test_byt5_with_open_clip(tiny_t5: str, tiny_clip: dict[str, str]) -> None:
    encoder = byt5(tiny_t5, **tiny_clip)
    found = encoder(CAPTIONS, CPU)
    alone = OpenClipEncoder(TextConfig(name="open_clip", **tiny_clip))
    torch.testing.assert_close(found.pooled, alone(CAPTIONS, CPU).pooled)
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(encoder.encode_images(images), alone.encode_images(images))
    with pytest.raises(ValueError, match=r"image vectors need text\.clip"):
        byt5(tiny_t5).encode_images(images)


@pytest.mark.parametrize("wrong", ["clip", "clip_pretrained"])
def test_a_missing_clip_is_named_in_one_line(
    wrong: str, tiny_clip: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    encoder = OpenClipEncoder(TextConfig(name="open_clip", **{**tiny_clip, wrong: "/nowhere/x.pt"}))
    with pytest.raises(ValueError) as raised:
        encoder(["a"], CPU)
    said = str(raised.value)
    assert said.startswith("text.clip=") and "/nowhere/x.pt" in said and "\n" not in said
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def openai_clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """A small CLIP with OpenAI's activation, and the file of its weights."""
    import open_clip

    vision = {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8}
    text = {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(10, vision, text, quick_gelu=True).eval()
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(p, std=0.1)
    path = tmp_path_factory.mktemp("openai") / "clip.pt"
    torch.save({k: v.half() for k, v in model.state_dict().items()}, path)
    return model.half().float(), path


def clip(path: Path | str, **settings) -> ClipTextEncoder:
    return ClipTextEncoder(TextConfig(name="clip", path=str(path), **settings))


def test_clip_tokens() -> None:
    long = " ".join(["cat"] * 20)
    ids = clip_token_ids(["A  CAT!", "", long], 6)
    assert ids.tolist() == [
        [49406, 320, 2368, 256, 49407, 0],
        [49406, 49407, 0, 0, 0, 0],
        [49406, 2368, 2368, 2368, 2368, 49407],
    ]
    padded = clip_token_ids(["! a", "", long], 6, pad_id=49407)
    assert padded.tolist() == [
        [49406, 256, 320, *[49407] * 3],
        [49406, *[49407] * 5],
        ids[2].tolist(),
    ]


@torch.no_grad()
def test_clip_states_of_openai_weights(openai_clip: tuple[torch.nn.Module, Path]) -> None:
    model, path = openai_clip
    found = clip(path, unit_norm=False, projected=True)(CAPTIONS, CPU)
    assert found.tokens.shape == (5, 12, 64) and found.mask is None
    ids = clip_token_ids(CAPTIONS, 12)
    expected = model.encode_text(ids)
    torch.testing.assert_close(found.pooled, expected, rtol=1e-4, atol=1e-4)
    ends = found.tokens[torch.arange(5), ids.argmax(1)] @ model.text_projection
    torch.testing.assert_close(ends, expected, rtol=1e-4, atol=1e-4)

    unit = clip(path)(CAPTIONS, CPU)
    assert unit.pooled is None and not unit.tokens.requires_grad
    torch.testing.assert_close(unit.tokens.norm(dim=-1), torch.ones(5, 12))
    torch.testing.assert_close(unit.tokens, torch.nn.functional.normalize(found.tokens, dim=-1))
    alone = clip(path)(CAPTIONS[1:2], CPU)
    torch.testing.assert_close(alone.tokens[0], unit.tokens[1])


@torch.no_grad()
def test_clip_states_in_front_of_the_last_layer(
    openai_clip: tuple[torch.nn.Module, Path], tmp_path: Path
) -> None:
    whole = clip(openai_clip[1], projected=True)
    whole(["a"], CPU)
    whole._model.save_pretrained(tmp_path)
    folder = clip(tmp_path, hidden_state=-2, unit_norm=False, projected=True, pad_id=49407)
    found = folder(CAPTIONS, CPU)
    seen = []
    layers = folder._model.text_model.encoder.layers
    layers[-1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    again = folder.encode(CAPTIONS, CPU)
    assert torch.equal(found.tokens, seen[0]) and torch.equal(again.tokens, seen[0])
    # padding stands behind the end token, which therefore does not see it
    torch.testing.assert_close(found.pooled, whole(CAPTIONS, CPU).pooled)
    lengths = clip_token_ids(CAPTIONS, 12).argmax(1)
    shown = clip(tmp_path, hidden_state=-2, unit_norm=False)(CAPTIONS, CPU)
    assert shown.pooled is None
    torch.testing.assert_close(shown.tokens[2, : lengths[2]], found.tokens[2, : lengths[2]])
    assert not torch.allclose(shown.tokens[2, -1], found.tokens[2, -1], atol=1e-3)


def test_a_missing_or_foreign_clip_text_model_is_named_in_one_line(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pt")
    for path in (tmp_path / "none", tmp_path / "x.pt"):
        with pytest.raises(ValueError) as raised:
            clip(path)(["a"], CPU)
        said = str(raised.value)
        assert said.startswith(f"text.path={path} is neither") and "\n" not in said


def test_frozen_encoders_are_no_modules() -> None:
    kinds = {
        name: isinstance(cls, type) and issubclass(cls, torch.nn.Module)
        for name, cls in TEXT_ENCODERS.items()
    }
    assert kinds.pop("bytes") and not any(kinds.values())


def test_frozen_encoders_have_no_gradient(tiny_t5: str, tiny_clip: dict[str, str]) -> None:
    encoder = byt5(tiny_t5, **tiny_clip)
    found = encoder(CAPTIONS[:1], CPU)
    assert not found.tokens.requires_grad
    assert found.pooled is not None and not found.pooled.requires_grad
    assert not any(p.requires_grad for p in encoder._model.parameters())
    assert not encoder._model.training


@pytest.mark.parametrize(
    ("settings", "pooled"),
    [
        ({"name": "bytes"}, False),
        ({"name": "t5"}, False),
        ({"name": "byt5"}, True),
        ({"name": "byt5", "clip": None}, False),
        ({"name": "open_clip"}, True),
        ({"name": "clip"}, False),
        ({"name": "clip", "projected": True}, True),
    ],
)
def test_which_encoders_pool_is_known_before_any_is_loaded(
    settings: dict[str, Any], pooled: bool
) -> None:
    assert TextConfig(**settings).pooled == pooled
