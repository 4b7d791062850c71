"""Stand-ins of the networks that scores are made with: same layout of file, little work."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn


class Mixed(nn.Module):
    """A block that begins with a convolution of its own, as mixed_6 does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


class Inception(nn.Module):
    """What inception-2015-12-05.pt can do, of random weights: resize, pool3, classes."""

    def __init__(self, width: int = 2048) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        self.layers.add_module("conv", nn.Conv2d(3, 8, 11, stride=17, padding=0))  # 17 x 17
        self.layers.add_module("mixed_5", Mixed(8))
        self.layers.add_module("mixed_6", Mixed(8))
        self.layers.add_module("mixed_7", nn.Conv2d(8, width, 1))
        self.layers.add_module("pool2", nn.AdaptiveAvgPool2d(1))
        self.output = nn.Linear(width, 1008)

    def forward(
        self,
        img: Tensor,
        return_features: bool = False,
        use_fp16: bool = False,
        no_output_bias: bool = False,
    ) -> Tensor:
        b, _, h, w = img.shape
        theta = torch.eye(2, 3)
        theta[0, 2] += 1.0 / w - 1.0 / 299
        theta[1, 2] += 1.0 / h - 1.0 / 299
        grid = nn.functional.affine_grid(theta.expand(b, 2, 3), [b, 3, 299, 299], False)
        x = nn.functional.grid_sample(img.float(), grid, "bilinear", "border", False)
        features = self.layers((x - 128) / 128).flatten(1)
        if return_features:
            return features
        logits = self.output(features)
        if no_output_bias:
            logits = logits - self.output.bias
        return logits.softmax(dim=1)


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all weights anew, without touching the global seed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        spread = 1 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
        nn.init.normal_(parameter, std=spread, generator=generator)
    return network.eval()


def inception_file(folder: Path) -> Path:
    """Write the stand-in as the TorchScript file that clean-fid looks for."""
    path = folder / "inception-2015-12-05.pt"
    torch.jit.script(randomised(Inception())).save(path)
    return path


def clip_file(folder: Path, name: str = "tiny-for-scores") -> tuple[str, Path]:
    """Register a tiny model with open_clip and write its weights: its name and the file."""
    import open_clip

    vision = {"image_size": 32, "layers": 2, "width": 16, "patch_size": 8, "head_width": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    config = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    network = randomised(open_clip.create_model(name))
    path = folder / "clip.pt"
    torch.save(network.state_dict(), path)
    return name, path
