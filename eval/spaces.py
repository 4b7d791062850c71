"""Feature spaces, and the names that scores in them have earned; light to import."""

from typing import NamedTuple


class Space(NamedTuple):
    """What features are of, and how their scores are called."""

    rows: str
    """Name of their rows in `eval.rows.Measured`."""
    suffix: str
    """End of the names of its scores: precision_dinov2."""
    what: str
    """The features in a few words."""
    inception: bool = False
    """Only Inception-v3 pool3 makes FID and KID; other features make FD and KD."""

    def named(self, score: str) -> str:
        """Return the name of a score in this space: fid, fid_tf, fd_dinov2, ..."""
        if score == "cmmd":  # only CLIP's embeddings make CMMD
            return "cmmd" if self.suffix == "_clip" else f"mmd{self.suffix}"
        if score in ("fid", "kid") and not self.inception:
            score = score[0] + "d"
        return score + self.suffix

    @property
    def spatial(self) -> str:
        """Name of the rows of its spatial features."""
        return self.rows.replace("features", "spatial")

    @property
    def probabilities(self) -> str:
        """Name of the rows of its class probabilities."""
        return self.rows.replace("features", "probabilities")


# FeatureRows and SceneRows were the first to make features, and theirs have no further name
SPACES: dict[str, Space] = {
    "inception": Space("features.inception", "", "Inception-v3 pool3, clean-fid clean", True),
    "inception_tf": Space(
        "features.inception_tf", "_tf", "Inception-v3 pool3, clean-fid legacy_tensorflow", True
    ),
    "inception_pt": Space(
        "features.inception_pt", "_pt", "Inception-v3 pool3, clean-fid legacy_pytorch", True
    ),
    "dinov2": Space("features.dinov2", "_dinov2", "DINOv2 ViT-L/14, class token"),
    "clip": Space("features.clip", "_clip", "CLIP image embeddings"),
    "scenes": Space("features", "_scenes", "the scenes' classifier"),
}
INCEPTION = {name: space for name, space in SPACES.items() if space.inception}
