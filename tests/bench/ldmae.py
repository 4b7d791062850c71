"""LDMAE's speed against textbook versions of the same networks, in one process on one thread.

    python -m tests.bench.ldmae [--repeats 5]

VMAE-f8d16 encodes and decodes one image of 256 px with fused attention, with explicit softmax
attention (as released) and, for scale, the convolutional autoencoder of the SD3 setting does. All
have random weights; before timing, both VMAE must give the same moments and images.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_modules.ldmae.autoencoder import AutoencoderModule
from lightning_modules.ldmae.vmae import Attention


class ExplicitAttention(nn.Module):
    """Attention that holds all scores, as in the released VMAE."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = attention.qkv, attention.proj, attention.heads

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * (d // self.heads) ** -0.5  # [B, heads, N, N]
        return self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, n, d))


def explicit(module: AutoencoderModule) -> AutoencoderModule:
    """The same VMAE with explicit attention."""
    plain = copy.deepcopy(module)
    for block in [*plain.network.blocks, *plain.network.decoder_blocks]:
        block.attn = ExplicitAttention(block.attn)
    return plain


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Wall time and time of this thread on a core; they differ where the machine is busy."""
    wall, core = time.perf_counter(), time.thread_time()
    run()
    return time.perf_counter() - wall, time.thread_time() - core


def compare(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Time all runs in turn, `repeats` times; print medians and return those of the core time."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
    medians = {}
    for name, values in times.items():
        wall, core = (statistics.median(v) for v in zip(*values, strict=True))
        medians[name] = core
        print(f"{name:28s} median {wall:.3f} s wall, {core:.3f} s core")
    return medians


def bench_autoencoders(repeats: int) -> None:
    """Encode and decode one image of 256 px."""
    torch.manual_seed(0)
    vmae = AutoencoderModule({"kind": "vmae"}).eval()
    plain = explicit(vmae)
    sd3 = AutoencoderModule({"kind": "sdvae", "objective": {"disc_weight": 0.0}}).eval()
    image = torch.rand(1, 3, 256, 256) * 2 - 1
    moments = vmae.moments(image)
    torch.testing.assert_close(plain.moments(image), moments, atol=2e-5, rtol=1e-4)
    latents = moments[:, : vmae.channels]
    torch.testing.assert_close(plain.decode(latents), vmae.decode(latents), atol=2e-5, rtol=1e-4)

    def both(module: AutoencoderModule) -> Callable[[], object]:
        return lambda: module.decode(module.encode(image))

    names = {"VMAE, fused": vmae, "VMAE, explicit softmax": plain, "SD3 setting": sd3}
    medians = compare({name: both(module) for name, module in names.items()}, repeats)
    fused = medians["VMAE, fused"]
    print(f"ratio of explicit softmax to fused {medians['VMAE, explicit softmax'] / fused:.2f}")
    print(f"ratio of the SD3 setting to VMAE {medians['SD3 setting'] / fused:.1f}")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("VMAE-f8d16 and the SD3 setting: encode and decode 1 image of 256 px, 1 thread")
    bench_autoencoders(args.repeats)


if __name__ == "__main__":
    main()
