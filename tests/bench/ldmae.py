"""LDMAE's speed against textbook versions of the same networks, in one process on one thread.

    python -m tests.bench.ldmae [--repeats 5] [--steps 50] [--part autoencoders|sampling]

VMAE-f8d16 encodes and decodes one image of 256 px with fused attention, with explicit softmax
attention (as released) and, for scale, the convolutional autoencoder of the SD3 setting does. All
have random weights; before timing, both VMAE must give the same moments and images.

LightningDiT-B/1 draws one latent of 16x16 by Euler steps with the released guidance: by our loop,
and by the textbook one, which carries a doubled batch through every step, keeps all states and
computes norm, rotation and modulation as the released code does. Both have fused attention. Before
timing, they must end in the same latent.
"""

import argparse
import copy
import dataclasses
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.ldmae import process
from lightning_modules.ldmae.autoencoder import AutoencoderModule
from lightning_modules.ldmae.config import DIT_MODELS, DIT_SAMPLING, SamplingConfig
from lightning_modules.ldmae.network import DiT
from lightning_modules.ldmae.vmae import Attention
from tests.bench.machine import as_shipped, heading, network_share, one_thread, seconds


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

    runs = {"VMAE, fused": both(vmae)}
    runs |= {
        name: as_shipped(both(module))
        for name, module in {"VMAE, explicit softmax": plain, "SD3 setting": sd3}.items()
    }
    medians = compare(runs, repeats)
    fused = medians["VMAE, fused"]
    print(f"ratio of explicit softmax to fused {medians['VMAE, explicit softmax'] / fused:.2f}")
    print(f"ratio of the SD3 setting to VMAE {medians['SD3 setting'] / fused:.1f}")


def textbook_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm, one operation after the other."""
    weight = norm.get_parameter("weight")
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def textbook_attention(attention: nn.Module, x: Tensor, rotation: nn.Module) -> Tensor:
    """Attention with queries and keys that are normalised, then rotated by halves of pairs."""
    b, n, d = x.shape
    qkv = attention.qkv(x).reshape(b, n, 3, attention.heads, d // attention.heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def rotate(y: Tensor) -> Tensor:
        first, second = y.reshape(*y.shape[:-1], -1, 2).unbind(-1)
        turned = torch.stack((-second, first), dim=-1).reshape(y.shape)
        return y * rotation.freqs_cos + turned * rotation.freqs_sin

    q = rotate(textbook_norm(attention.q_norm, q))
    k = rotate(textbook_norm(attention.k_norm, k))
    seen = F.scaled_dot_product_attention(q, k, v)
    return attention.proj(seen.transpose(1, 2).reshape(b, n, d))


def textbook_dit(network: DiT, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """The network as released: every sample of the batch is modulated on its own."""

    def modulate(y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return y * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    x = network.x_embedder(x) + network.pos_embed
    c = network.t_embedder(t) + network.y_embedder(labels)
    for block in network.blocks:
        made = block.adaLN_modulation(c).chunk(6, dim=1)
        y = modulate(textbook_norm(block.norm1, x), made[0], made[1])
        x = x + made[2].unsqueeze(1) * textbook_attention(block.attn, y, network.feat_rope)
        y = modulate(textbook_norm(block.norm2, x), made[3], made[4])
        gate, value = block.mlp.w12(y).chunk(2, dim=-1)
        x = x + made[5].unsqueeze(1) * block.mlp.w3(F.silu(gate) * value)
    final = network.final_layer
    shift, scale = final.adaLN_modulation(c).chunk(2, dim=1)
    return network.unpatchify(
        final.linear(modulate(textbook_norm(final.norm_final, x), shift, scale))
    )


def textbook_loop(network: DiT, z: Tensor, labels: Tensor, s: SamplingConfig) -> Tensor:
    """Euler over a doubled batch that keeps every state; only what is guided depends on t."""
    null = torch.full_like(labels, network.config.num_classes)
    x, labels = torch.cat([z, z]), torch.cat([labels, null])
    times = process.time_grid(s.steps, s.timestep_shift)
    states = [x]
    for i in range(s.steps):
        half = x[: len(z)]
        out = textbook_dit(network, torch.cat([half, half]), times[i].expand(len(x)), labels)
        channels = s.guidance_channels
        own, other = out[:, :channels].chunk(2)
        guided = own if times[i] < s.guidance_start else other + s.guidance * (own - other)
        velocity = torch.cat([torch.cat([guided, guided]), out[:, channels:]], dim=1)
        x = x + (times[i + 1] - times[i]) * velocity
        states.append(x)
    return torch.stack(states)[-1, : len(z)]


def our_loop(network: DiT, z: Tensor, labels: Tensor, s: SamplingConfig) -> Tensor:
    null = network.label_side(torch.tensor([network.config.num_classes]))
    sides = {"own": network.label_side(labels), "null": null}
    velocity = process.guided(
        lambda x, t, conditions: network(x, t, [sides[name] for name in conditions]),
        s.guidance,
        s.guidance_channels,
        (s.guidance_start, s.guidance_end),
    )
    return process.integrate(velocity, z, process.time_grid(s.steps, s.timestep_shift))


def bench_sampling(repeats: int, steps: int) -> None:
    """Draw one latent under guidance."""
    torch.manual_seed(0)
    network = DiT(dataclasses.replace(DIT_MODELS["paper"], input_size=16)).eval()
    for p in network.parameters():
        if not p.any():  # a new network predicts nothing
            nn.init.normal_(p, std=0.02)
    settings = dataclasses.replace(DIT_SAMPLING["released"], steps=steps)
    z, labels = torch.randn(1, 16, 16, 16), torch.tensor([7])
    few = dataclasses.replace(settings, steps=8)
    ours, textbook = (loop(network, z, labels, few) for loop in (our_loop, textbook_loop))
    torch.testing.assert_close(ours, textbook, atol=1e-3, rtol=1e-3)
    runs: dict[str, Callable[[], object]] = {
        "textbook loop": as_shipped(lambda: textbook_loop(network, z, labels, settings)),
        "our loop": lambda: our_loop(network, z, labels, settings),
    }
    medians = compare(runs, repeats)
    share = network_share(runs["our loop"], network, "forward")
    print(f"network: {share:.0%} of ours")
    print(
        f"ratio of the textbook loop to ours {medians['textbook loop'] / medians['our loop']:.2f}"
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--part", choices=["autoencoders", "sampling"])
    args = parser.parse_args()
    one_thread()
    print(heading())
    if args.part != "sampling":
        print("VMAE-f8d16 and the SD3 setting: encode and decode 1 image of 256 px, 1 thread")
        bench_autoencoders(args.repeats)
    if args.part != "autoencoders":
        print(f"LightningDiT-B/1: 1 latent of 16x16 in {args.steps} guided steps, 1 thread")
        bench_sampling(args.repeats, args.steps)


if __name__ == "__main__":
    main()
