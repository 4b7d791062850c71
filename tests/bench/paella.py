"""Paella's sampling loop against a plain loop as released: time, and equal tokens.

    python -m tests.bench.paella [--repeats 3] [--steps 12] [--check-steps 3]

Both sides run in one process on one thread with the same weights, interleaved. The plain side is
tests/bench/plain_paella.py. Before timing, both draw by inverse CDF from the same uniforms in
float64, where rounding does not reach a decision, and must give the same tokens.
"""

import argparse
import statistics

import torch
from torch import Tensor

from lightning_modules.paella import process
from lightning_modules.paella.config import ModelConfig, SamplingConfig
from lightning_modules.paella.network import Paella
from tests.bench.machine import as_shipped, heading, network_share, one_thread, seconds
from tests.bench.plain_paella import PlainPaella, plain_sample

GRID = (64, 64)
CONFIG = ModelConfig(
    c_hidden=[160, 320, 320],
    blocks=[3, 8, 3],
    nhead=[-1, 4, 4],
    level_config=["CT", "CTA", "CTA"],
    num_labels=8192,
)


def make_networks() -> tuple[Paella, PlainPaella]:
    """Both networks with the same weights; zeros of the initialisation are made small noise."""
    torch.manual_seed(0)
    ours, plain = Paella(CONFIG), PlainPaella(CONFIG)
    for p in ours.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    plain.load_state_dict(ours.state_dict())
    return ours.eval(), plain.eval()


def make_inputs() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A caption of 60 bytes with text and image vector; '' with its text vector."""
    g = torch.Generator().manual_seed(1)
    clip, null_clip, image = (torch.randn(1, CONFIG.clip_embd, generator=g) for _ in range(3))
    text = torch.randn(1, 60, CONFIG.byt5_embd, generator=g)
    null_text = torch.randn(1, 1, CONFIG.byt5_embd, generator=g)
    cond = {"byt5": text, "clip": clip, "clip_image": image}
    return cond, {"byt5": null_text, "clip": null_clip}


def our_sample(
    network: Paella,
    inputs: dict[str, Tensor],
    null_inputs: dict[str, Tensor],
    noise: dict[str, Tensor],
    config: SamplingConfig,
) -> Tensor:
    cond = network.prepare(*network.condition(**inputs))
    null = network.prepare(*network.condition(**null_inputs))
    predict = network.predictor(cond, null)
    return process.sample(predict, network.head, **noise, **process.loop_settings(config))


def check_tokens(ours: Paella, plain: PlainPaella, steps: int) -> int:
    """Draw by the same uniforms on both sides, in float64; the number of tokens compared."""
    config = SamplingConfig(steps=steps)
    noise = process.sample_noise([7], steps, steps - 1, GRID, CONFIG.num_labels)

    def inverse_cdf(scores: Tensor, step: int) -> Tensor:
        cdf = scores.cumsum(1)
        u = noise["draws"][step].reshape(-1, 1) * cdf[:, -1:]
        return (cdf <= u).sum(1).clamp(max=scores.size(1) - 1)

    cond, null = ({k: v.double() for k, v in side.items()} for side in make_inputs())
    expected = plain_sample(
        plain.double(),
        cond,
        null,
        noise["init_noise"],
        noise["uniform_renoise"],
        steps=steps,
        temperature=(config.temperature_start, config.temperature_end),
        guidance=(config.guidance_start, config.guidance_end),
        draw=inverse_cdf,
    )
    tokens = our_sample(ours.double(), cond, null, noise, config)
    ours.float(), plain.float()
    if not torch.equal(tokens, expected):
        raise SystemExit(f"tokens differ at {int((tokens != expected).sum())} positions")
    return tokens.numel()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--check-steps", type=int, default=3)
    args = parser.parse_args()
    one_thread()
    print(heading())
    ours, plain = make_networks()
    if args.check_steps:
        count = check_tokens(ours, plain, args.check_steps)
        print(f"tokens: all {count} equal after {args.check_steps} guided steps in float64")

    config = SamplingConfig(steps=args.steps)
    cond, null = make_inputs()

    def run_ours() -> Tensor:
        noise = process.sample_noise([7], args.steps, args.steps - 1, GRID, CONFIG.num_labels)
        return our_sample(ours, cond, null, noise, config)

    def run_plain() -> Tensor:
        init_noise = torch.randint(CONFIG.num_labels, (1, *GRID))
        return plain_sample(
            plain,
            cond,
            null,
            init_noise,
            None,
            steps=args.steps,
            temperature=(config.temperature_start, config.temperature_end),
            guidance=(config.guidance_start, config.guidance_end),
        )

    plain_times, our_times = [], []
    for _ in range(args.repeats):
        plain_times.append(seconds(as_shipped(run_plain)))
        our_times.append(seconds(run_ours))
    medians = {}
    for name, values in (("plain", plain_times), ("ours", our_times)):
        wall, core = (statistics.median(v) for v in zip(*values, strict=True))
        medians[name] = wall, core
        shown = ", ".join(f"{v:.2f}" for v, _ in values)
        print(
            f"{name:5s} median {wall:.2f} s wall ({shown}), {core:.2f} s core, {args.steps} steps"
        )
    share = network_share(run_ours, ours, "mixed_rows", "head", "prepare")
    print(f"network and output table: {share:.0%} of ours")
    print(f"ratio of core times {medians['plain'][1] / medians['ours'][1]:.2f}")
    print(f"ratio {medians['plain'][0] / medians['ours'][0]:.2f}")


if __name__ == "__main__":
    main()
