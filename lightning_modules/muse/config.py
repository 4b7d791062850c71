"""Every setting of Muse and the sizes of its networks (arXiv 2301.00704; huggingface/amused).

Sizes of Tables 4 and 6 are the paper's. What the paper leaves open (heads, norms, dropout, tying,
block size) is a setting whose default is ours.
"""

from dataclasses import dataclass
from typing import Literal


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass
class ModelConfig:
    """Base transformer (section 2.3); defaults: the 3B of Table 4, 3,270,541,312 parameters."""

    num_codes: int = 8192
    """Number of codes of the tokenizer; the mask is one id more."""
    hidden: int = 2048
    """Width of the residual stream."""
    mlp: int = 8192
    """Width inside the MLP."""
    layers: int = 48
    """Blocks of self-attention, cross-attention and MLP."""
    heads: int = 16
    """Attention heads (not published)."""
    max_side: int = 16
    """Longest side of the token grid that has positions."""
    positions: Literal["factorised", "flat"] = "factorised"
    """Learned 2D positions: a row's plus a column's vector, or one vector per cell."""
    text_width: int = 4096
    """Width of the text encoder's states (4096 is T5-XXL)."""
    norm: Literal["pre", "post"] = "pre"
    """LayerNorm in front of each part, or after its sum with the residual (MaskGIT's BERT)."""
    qk_norm: bool = False
    """Normalise queries and keys of every head, with a learned gain per dimension."""
    dropout: float = 0.1
    """Dropout of the embeddings, the attention and after every part (MaskGIT's value)."""
    null_text: Literal["masked", "learned", "empty"] = "masked"
    """Dropped caption: no text key at all (section 2.7), one learned vector, or that of ''."""
    head_mlp: bool = True
    """A layer, GELU and LayerNorm in front of the output table ("an MLP", section 2.3)."""
    tied_head: bool = False
    """The output table is that of the input embeddings."""

    def __post_init__(self) -> None:
        for name in ("num_codes", "hidden", "mlp", "layers", "heads", "max_side", "text_width"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be at least 1, got {value}")
        _require(
            self.hidden % self.heads == 0,
            f"heads must divide hidden, got {self.heads} heads for width {self.hidden}",
        )
        _require(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def grid_multiple(self) -> int:
        """What height and width of the token grid must be multiples of."""
        return 1


@dataclass
class SuperResConfig(ModelConfig):
    """Super-resolution network (section 2.4); defaults: Table 6, 762,429,440 parameters."""

    hidden: int = 1024
    """Width of the residual stream, also of the low-res encoder."""
    mlp: int = 4096
    """Width inside the MLP, also of the low-res encoder."""
    layers: int = 32
    """Blocks over the high-res tokens."""
    heads: int = 16
    """Attention heads (not published); even, as half of them are local."""
    max_side: int = 64
    """Longest side of the high-res token grid."""
    low_num_codes: int = 8192
    """Number of codes of the low-res tokenizer."""
    low_layers: int = 16
    """Self-attention blocks of the low-res encoder."""
    low_max_side: int = 16
    """Longest side of the low-res token grid."""
    block: int = 8
    """Side of the local blocks of the multi-axis attention (not published)."""
    drop_low: bool = False
    """Hide the low-res tokens where the text is dropped; section 2.7 speaks of the text only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("low_num_codes", "low_max_side", "block"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be at least 1, got {value}")
        _require(self.low_layers >= 0, f"low_layers must be at least 0, got {self.low_layers}")
        _require(self.heads % 2 == 0, f"heads must be even, got {self.heads}")
        _require(
            not (self.drop_low and self.null_text == "masked"),
            "drop_low must be false with null_text=masked: nothing would be left to attend to",
        )

    @property
    def grid_multiple(self) -> int:
        """What height and width of the high-res token grid must be multiples of."""
        return self.block


@dataclass
class UViTConfig:
    """aMUSEd's U-ViT by the names of its config.json; defaults: amused-256."""

    hidden_size: int = 1024
    """Width of the transformer."""
    num_hidden_layers: int = 22
    """Blocks of the transformer."""
    num_attention_heads: int = 16
    """Heads of the transformer."""
    intermediate_size: int = 2816
    """Width inside the transformer's gated MLP."""
    in_channels: int = 768
    """Width of a token's embedding and of the features in front of the output table."""
    block_out_channels: int = 768
    """Width of the convolutional blocks on both sides of the transformer."""
    block_num_heads: int = 12
    """Heads of the convolutional blocks' attention to the text."""
    num_res_blocks: int = 3
    """Convolutional blocks on each side."""
    downsample: bool = False
    """Halve the grid in front of the first blocks and double it after the last (amused-512)."""
    vocab_size: int = 8256
    """Rows of the input table; the last is the mask."""
    codebook_size: int = 8192
    """Number of codes of the tokenizer."""
    encoder_hidden_size: int = 768
    """Width of the text states."""
    cond_embed_dim: int = 768
    """Width of the pooled text vector."""
    micro_cond_encode_dim: int = 256
    """Width of the sinusoidal embedding of each micro-condition."""
    micro_cond_embed_dim: int = 1280
    """Width of all of them together (five: width, height, two of the crop, aesthetic score)."""
    layer_norm_eps: float = 1e-6
    """Added to the mean square in every norm."""
    hidden_dropout: float = 0.0
    """Dropout after the parts of the blocks."""
    attention_dropout: float = 0.0
    """Dropout of the attention of the convolutional blocks."""

    def __post_init__(self) -> None:
        names = ("hidden_size", "num_attention_heads", "intermediate_size", "in_channels")
        more = ("block_out_channels", "block_num_heads", "codebook_size", "encoder_hidden_size")
        for name in (*names, *more, "num_hidden_layers", "num_res_blocks", "cond_embed_dim"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be at least 1, got {value}")
        for heads, width in (
            ("num_attention_heads", "hidden_size"),
            ("block_num_heads", "block_out_channels"),
        ):
            count, size = getattr(self, heads), getattr(self, width)
            _require(size % count == 0, f"{heads} must divide {width} ({size}), got {count}")
        _require(
            self.vocab_size > self.codebook_size,
            f"vocab_size must be above codebook_size ({self.codebook_size}), got {self.vocab_size}",
        )
        encode, embed = self.micro_cond_encode_dim, self.micro_cond_embed_dim
        _require(encode >= 2 and encode % 2 == 0, "micro_cond_encode_dim must be even, at least 2")
        _require(
            embed >= encode and embed % encode == 0,
            f"micro_cond_embed_dim must be a multiple of {encode}, got {embed}",
        )
        for name in ("hidden_dropout", "attention_dropout"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name} must be in [0, 1), got {value}")

    @property
    def num_codes(self) -> int:
        """Number of codes of the tokenizer."""
        return self.codebook_size

    @property
    def grid_multiple(self) -> int:
        """What height and width of the token grid must be multiples of."""
        return 2 if self.downsample else 1


# 3b and superres: Tables 4 and 6. The paper names a 632M base and a 268M super-resolution net for
# CC3M and gives no shapes: 632m and superres-268m are ours. The aMUSEd networks are the released.
MODELS: dict[str, ModelConfig] = {
    "3b": ModelConfig(),
    "632m": ModelConfig(hidden=1024, mlp=4096, layers=36),
}
SUPERRES_MODELS: dict[str, SuperResConfig] = {
    "3b": SuperResConfig(),
    "268m": SuperResConfig(hidden=768, mlp=3072, layers=20, low_layers=8, heads=12),
}
UVIT_MODELS: dict[str, UViTConfig] = {
    "amused-256": UViTConfig(),
    "amused-512": UViTConfig(downsample=True),
}
