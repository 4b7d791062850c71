"""What is measured of pictures, as plain fields; light to import, networks come with `load`.

Each is an `eval.rows.Extractor`; what its rows mean stands in the module that scores them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eval import downloads
from eval.classifier_config import KIND, WEIGHTS, ClassifierConfig, shipped_weights, weight_name

if TYPE_CHECKING:
    from torch import device as Device

    from eval.classifier_network import Classifier
    from eval.rows import Extractor, Measure

LEVELS = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3)  # of the noise added to latents


@dataclass(frozen=True)
class DigitRows:
    """Which digit a classifier reads. Rows: read [N] int16."""

    def load(self, device: Device | str, *, folder: Path, first_stage: Any = None) -> Measure:
        """Make ready, see `Extractor.load`; runs on the CPU whatever the device."""
        from eval.digits import measure_digits

        return measure_digits


@dataclass(frozen=True)
class FeatureRows:
    """Features of pictures of which nothing is known: those of the scenes' classifier.

    Rows: features [N, 64] float32.
    """

    classifier: Path = WEIGHTS / weight_name(KIND, ClassifierConfig())
    """Weights of the classifier."""

    def load(self, device: Device | str, *, folder: Path, first_stage: Any = None) -> Measure:
        """Make ready, see `Extractor.load`."""
        from eval.classifier_network import read_classifier
        from eval.features import feature_measure

        return feature_measure(read_classifier(self.classifier).to(device))


@dataclass(frozen=True)
class SceneRows:
    """What a classifier and a CLIP of scenes see in pictures.

    Rows: labels [N, 2 + 3 S] int16 of `Classifier.read`, features [N, 64] float32, cosine [N]
    float32 of each picture with what was asked of it, its prompt or its caption.
    """

    resolution: int = 32
    """Width of the pictures that both learnt from; larger ones are reduced to it first."""
    max_objects: int = 2
    """Most things in a scene."""
    classifier: Path | None = None
    """Weights of the classifier; where none are given it is trained once."""
    clip: Path | None = None
    """Weights of the CLIP; where none are given it is trained once."""

    @classmethod
    def of(cls, resolution: int, max_objects: int) -> SceneRows:
        """Return the extractor of this kind of picture, with the weights that ship for it."""
        config = ClassifierConfig(resolution, max_objects)
        files = (shipped_weights(kind, config) for kind in (KIND, "clip"))
        return cls(resolution, max_objects, *files)

    def load_classifier(self, device: Device | str, folder: Path) -> Classifier:
        """Return the classifier; `folder` keeps one that was trained."""
        from eval.classifier import load_classifier
        from eval.classifier_network import read_classifier

        if self.classifier is not None:
            return read_classifier(self.classifier).to(device)
        return load_classifier(self.resolution, self.max_objects, folder).to(device)

    def load(self, device: Device | str, *, folder: Path, first_stage: Any = None) -> Measure:
        """Make ready, see `Extractor.load`."""
        from eval.scene_clip import load_clip, read_clip
        from eval.scenes import scene_measure

        if self.clip is not None:
            clip = read_clip(self.clip)
        else:
            clip = load_clip(self.resolution, self.max_objects, folder)
        classifier = self.load_classifier(device, folder)
        return scene_measure(classifier, clip.to(device), self.resolution)


@dataclass(frozen=True)
class EditRows:
    """What is read in edited pictures, and what changed outside the mask.

    What was asked of a picture is its task of `edit_tasks` and "original" [3, H, W] uint8: what an
    edit that changes nothing would give, that is, the picture as the first stage has it. Rows:
    labels [N, 2 + 3 S] int16; l1 [N] float32, mean absolute difference to the original outside the
    mask, in [0, 1].
    """

    scenes: SceneRows
    """Whose classifier reads, at its resolution."""

    def load(self, device: Device | str, *, folder: Path, first_stage: Any = None) -> Measure:
        """Make ready, see `Extractor.load`."""
        from eval.edits import edit_measure

        return edit_measure(self.scenes.load_classifier(device, folder), self.scenes.resolution)


@dataclass(frozen=True)
class ReconstructionRows:
    """How pictures come back from a first stage, and how its latents are made.

    Both sides are rounded to 8 bit and scaled to [0, 1] first, as when a picture is saved; LPIPS
    sees them as they are. Rows: psnr, ssim, l1, mse [N] float64; lpips or lpips_scenes [N]
    float32; with `scenes` labels [N, 2 + 3 S] int16 of the reconstructions; with `levels` what
    `score_smoothness` reads; with `compress` what `score_compression` reads. Sums: codes [K]
    int64, the histogram of a codebook's codes.
    """

    lpips: Path | None = None
    """Weights of LPIPS, or of the small network of eval/perceptual.py; none leaves it out."""
    scenes: SceneRows | None = None
    """Whose classifier reads the reconstructions, where they are of scenes."""
    show: int = 0
    """Pairs of original and reconstruction that are kept, of the first pictures."""
    levels: tuple[float, ...] = ()
    """Strengths of the noise added to continuous latents; none for a codebook."""
    compress: bool = False
    """Measure the compression of continuous latents; what was asked must hold attributes."""
    seed: int = 0
    """Seed of the noise."""

    def load(self, device: Device | str, *, folder: Path, first_stage: Any = None) -> Measure:
        """Make ready, see `Extractor.load`; the first stage works on `device`.

        Raises:
            ValueError: no first stage.
        """
        from eval.reconstruction_scores import reconstruction_measure
        from lightning_modules.common.perceptual import load_lpips

        if first_stage is None:
            raise ValueError("reconstructions need the first stage that makes them")
        lpips = None if self.lpips is None else load_lpips(self.lpips).to(device)
        classifier = None if self.scenes is None else self.scenes.load_classifier(device, folder)
        return reconstruction_measure(
            first_stage,
            lpips,
            classifier,
            show=self.show,
            levels=self.levels,
            compress=self.compress,
            seed=self.seed,
            device=device,
        )


@dataclass(frozen=True)
class InceptionRows:
    """Features of Inception-v3, the network of FID, as clean-fid makes them.

    Rows (their names end _tf and _pt in the legacy modes): features.inception [N, 2048],
    spatial.inception [N, 2023], probabilities.inception [N, 1008], all float32.
    """

    weights: Path
    """inception-2015-12-05.pt; of legacy_pytorch pt_inception-2015-12-05-6726825d.pth."""
    mode: Literal["clean", "legacy_tensorflow", "legacy_pytorch"] = "clean"
    """How pictures come to 299 x 299 pixels."""
    spatial: bool = False
    """Also the features of sFID."""
    classes: bool = False
    """Also the class probabilities of the Inception Score."""

    @classmethod
    def of(cls, weights: Path | None = None, mode: str = "clean", **extras: bool) -> InceptionRows:
        """Return the extractor with the given file, that of a cache or a downloaded one.

        Raises:
            ValueError: there is none, see `downloads.WeightFile.find`.
        """
        known = downloads.INCEPTION_PT if mode == "legacy_pytorch" else downloads.INCEPTION
        return cls(known.find(weights), mode, **extras)  # type: ignore[arg-type]

    def load(self, device: Device | str, *, folder: Path, first_stage: Any = None) -> Measure:
        """Make ready, see `Extractor.load`."""
        from eval.inception import inception_measure

        return inception_measure(
            self.weights, self.mode, device, spatial=self.spatial, classes=self.classes
        )


@dataclass(frozen=True)
class DinoRows:
    """Features of DINOv2. Rows: features.dinov2 [N, 1024] float32."""

    weights: Path
    """dinov2_vitl14_pretrain.pth, or a file or folder of transformers."""

    @classmethod
    def of(cls, weights: Path | None = None) -> DinoRows:
        """Return the extractor with the given file, that of a cache or a downloaded one."""
        return cls(downloads.DINOV2.find(weights))

    def load(self, device: Device | str, *, folder: Path, first_stage: Any = None) -> Measure:
        """Make ready, see `Extractor.load`."""
        from eval.dino import dino_measure

        return dino_measure(self.weights, device)


@dataclass(frozen=True)
class ClipRows:
    """What a CLIP model sees in pictures and their captions.

    Rows: with `features` features.clip [N, E], with `texts` cosine.clip [N] or preference.hpsv2 or
    preference.pickscore [N], all float32.
    """

    model: str
    """Name of the model in open_clip."""
    weights: Path
    """Its file, of open_clip, OpenAI or transformers, or a folder of the last."""
    kind: Literal["clip", "hpsv2", "pickscore"] = "clip"
    """A plain CLIP, or which model of human preferences."""
    features: bool = False
    """Keep the image embeddings, for CMMD."""
    texts: bool = True
    """Compare with the captions."""
    prefix: str = ""
    """Put before every caption; CLIPScore's is "A photo depicts "."""
    crop: Literal["resize first", "crop first", "pad"] = "resize first"
    """How pictures that are no squares are cut; CMMD crops first, HPSv2 pads."""

    @classmethod
    def of(
        cls,
        model: str = "ViT-L-14-quickgelu",
        tag: str = "openai",
        weights: Path | None = None,
        **options: Any,
    ) -> ClipRows:
        """Return the extractor of a model and the tag of its weights, or with a given file.

        Raises:
            ValueError: there is no file, or the tag is unknown and none is given.
        """
        if tag == "openai" and not model.endswith("-quickgelu"):
            model += "-quickgelu"  # open_clip would only warn, and score lower
        known = downloads.CLIPS.get((model, tag))
        if known is None and weights is None:
            names = ", ".join(f"{m} {t}" for m, t in downloads.CLIPS)
            raise ValueError(
                f"weights of CLIP {model} {tag} are not known here (known: {names}); name the file"
            )
        known = known or downloads.WeightFile(f"CLIP {model}", "", "")
        return cls(model, known.find(weights), **options)

    @classmethod
    def cmmd(cls, weights: Path | None = None) -> ClipRows:
        """Return the extractor of CMMD: ViT-L/14 of 336 px by OpenAI, without captions."""
        return cls.of(
            "ViT-L-14-336-quickgelu",
            weights=weights,
            features=True,
            texts=False,
            crop="crop first",
        )

    @classmethod
    def preference(cls, kind: str, weights: Path | None = None) -> ClipRows:
        """Return the extractor of a model of human preferences, hpsv2 or pickscore."""
        known = {"hpsv2": downloads.HPSV2, "pickscore": downloads.PICKSCORE}[kind]
        crop: Any = "pad" if kind == "hpsv2" else "resize first"
        return cls("ViT-H-14", known.find(weights), kind, crop=crop)  # type: ignore[arg-type]

    def load(self, device: Device | str, *, folder: Path, first_stage: Any = None) -> Measure:
        """Make ready, see `Extractor.load`."""
        from eval.clip import clip_measure

        options = {k: v for k, v in vars(self).items() if k not in ("model", "weights")}
        return clip_measure(self.model, self.weights, device, **options)


# what a person calls features -> their extractor, with a given file of weights or the usual one
FEATURES: Mapping[str, Callable[[Path | None], Extractor]] = {
    "inception": InceptionRows.of,
    "inception_tf": lambda weights: InceptionRows.of(weights, "legacy_tensorflow"),
    "inception_pt": lambda weights: InceptionRows.of(weights, "legacy_pytorch"),
    "dinov2": DinoRows.of,
    "clip": ClipRows.cmmd,
    "scenes": lambda weights: FeatureRows() if weights is None else FeatureRows(weights),
}
