"""The files of weights that scores need: where they lie, where they come from, how they are known.

Light to import, so that a file that cannot be had is named before any work.
"""

import os
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from data.files import atomic, file_hash, link

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without an answer


@dataclass(frozen=True)
class WeightFile:
    """A published file of weights."""

    what: str
    """The network in a few words."""
    name: str
    """Name of the file."""
    url: str
    """Where it is published."""
    sha256: str = ""
    """Its checksum; empty where none is published."""
    repository: str = ""
    """Repository of the Hugging Face hub that holds the same weights; its cache is looked into."""
    files: tuple[str, ...] = ()
    """Names that they may have there, if not `name`."""

    def find(self, given: Path | str | None = None) -> Path:
        """Return the file: the given one, one of the usual caches, or a download.

        A file of a cache, or a download, counts only with the right checksum; one whose checksum
        is not published only in its own place, since caches hold others of its name. One process
        downloads while others wait, and nothing half-written is ever left.

        Raises:
            ValueError: the given file is not there, or there is none and none can be downloaded.
        """
        if given is not None:
            path = Path(given).expanduser()
            if not path.exists():
                raise ValueError(f"there is no file {path} with the weights of {self.what}")
            return path
        # where torch, clean-fid and CLIP keep their files
        for folder in (checkpoints(), Path(tempfile.gettempdir()), Path.home() / ".cache" / "clip"):
            if self.sha256 and self.fits(folder / self.name):
                return folder / self.name
        return self.of_hub() or self.download(self.place)

    @property
    def place(self) -> Path:
        """Where a download goes."""
        owner = [] if self.sha256 else [self.repository.replace("/", "--")]
        return checkpoints().joinpath(*owner, self.name)

    def fits(self, path: Path) -> bool:
        """Return whether the file is there with its checksum."""
        return path.is_file() and (not self.sha256 or file_hash(path) == self.sha256)

    def of_hub(self) -> Path | None:
        """Return the file of the hub's cache, which names large files by their checksum."""
        snapshots = hub() / f"models--{self.repository.replace('/', '--')}" / "snapshots"
        for name in self.files or (self.name,):
            for path in sorted(snapshots.glob(f"*/{name}")) if self.repository else []:
                whole = path.resolve()
                if whole.is_file() and (len(whole.name) != 64 or file_hash(whole) == whole.name):
                    return whole
        return None

    def download(self, path: Path) -> Path:
        """Download to `path`, whole or not at all.

        Raises:
            ValueError: it cannot be had, or is another file.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if not self.fits(path):
                    self._download(path)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise ValueError(
                f"{self.what} is not here and cannot be downloaded: put {self.name} from "
                f"{self.url} at {path}, or name the file"
            ) from error
        return path

    def _download(self, path: Path) -> None:
        print(f"downloading {self.what}: {self.url}", flush=True)
        request = urllib.request.Request(self.url, headers={"User-Agent": "tokengrid"})
        with atomic(path) as temporary:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                total = int(answer.headers.get("Content-Length") or 0)
                done, shown = 0, 0
                with open(temporary, "wb") as file:
                    while part := answer.read(CHUNK):
                        file.write(part)
                        done += len(part)
                        if total and done * 10 // total > shown:
                            shown = done * 10 // total
                            print(f"  {shown * 10} % of {total / 1e6:.0f} MB", flush=True)
            if total and done != total:
                raise urllib.error.URLError("the connection ended early")
            if self.sha256 and file_hash(temporary) != self.sha256:
                raise ValueError(
                    f"{self.url} is another file than expected (its sha256 does not begin "
                    f"{self.sha256[:12]}); name a file of your own"
                )


def checkpoints() -> Path:
    """Return torch's folder of downloaded weights."""
    cache = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(os.environ.get("TORCH_HOME", Path(cache) / "torch")) / "hub" / "checkpoints"


def hub() -> Path:
    """Return the cache of the Hugging Face hub."""
    cache = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    home = os.environ.get("HF_HOME", Path(cache) / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE", Path(home) / "hub"))


INCEPTION = WeightFile(
    "Inception-v3 of FID (TorchScript)",
    "inception-2015-12-05.pt",
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
    "inception-2015-12-05.pt",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
)
INCEPTION_PT = WeightFile(
    "Inception-v3 of pytorch-fid",
    "pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
DINOV2 = WeightFile(
    "DINOv2 ViT-L/14",
    "dinov2_vitl14_pretrain.pth",
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
)
HPSV2 = WeightFile(
    "HPSv2.1",
    "HPS_v2.1_compressed.pt",
    "https://huggingface.co/xswu/HPSv2/resolve/main/HPS_v2.1_compressed.pt",
    repository="xswu/HPSv2",
)
PICKSCORE = WeightFile(
    "PickScore v1",
    "model.safetensors",
    "https://huggingface.co/yuvalkirstain/PickScore_v1/resolve/main/model.safetensors",
    repository="yuvalkirstain/PickScore_v1",
)


VGG16 = WeightFile(
    "VGG16 of LPIPS",
    "vgg16-397923af.pth",
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
)
LPIPS_LINEAR = WeightFile(
    "the linear weights of LPIPS",
    "vgg.pth",
    "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/"
    "vgg.pth",
    "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
)


def find_lpips(given: Path | str | None = None) -> Path:
    """Return the file or folder of LPIPS's weights: the given one, or both parts side by side.

    Raises:
        ValueError: see `WeightFile.find`.
    """
    if given is not None:
        return LPIPS_LINEAR.find(given)
    folder = checkpoints() / "lpips-vgg16"
    for part in (VGG16, LPIPS_LINEAR):
        if not part.fits(folder / part.name):
            link(part.find(), folder / part.name)
    return folder


OF_OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def _openai(what: str, name: str, sha256: str, repository: str) -> WeightFile:
    url = f"https://openaipublic.azureedge.net/clip/models/{sha256}/{name}"
    return WeightFile(what, name, url, sha256, repository, OF_OPEN_CLIP)


def _laion(what: str, repository: str) -> WeightFile:
    url = f"https://huggingface.co/{repository}/resolve/main/{OF_OPEN_CLIP[1]}"
    return WeightFile(what, OF_OPEN_CLIP[1], url, "", repository, OF_OPEN_CLIP)


# model of open_clip and tag of its weights; weights of OpenAI need quick GELU
CLIPS: dict[tuple[str, str], WeightFile] = {
    ("ViT-B-32-quickgelu", "openai"): _openai(
        "CLIP ViT-B/32",
        "ViT-B-32.pt",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        "timm/vit_base_patch32_clip_224.openai",
    ),
    ("ViT-L-14-quickgelu", "openai"): _openai(
        "CLIP ViT-L/14",
        "ViT-L-14.pt",
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
        "timm/vit_large_patch14_clip_224.openai",
    ),
    ("ViT-L-14-336-quickgelu", "openai"): _openai(
        "CLIP ViT-L/14 of 336 px",
        "ViT-L-14-336px.pt",
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
        "timm/vit_large_patch14_clip_336.openai",
    ),
    ("ViT-H-14", "laion2b_s32b_b79k"): _laion(
        "CLIP ViT-H/14 of LAION", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    ),
    ("ViT-g-14", "laion2b_s12b_b42k"): _laion(
        "CLIP ViT-g/14 of LAION", "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
    ),
}
