"""Muse's decoding with aMUSEd's U-ViT against a plain loop as in diffusers: time, equal tokens.

    python -m tests.bench.muse [--repeats 5] [--steps 12] [--check-steps 12]

Both sides run in one process on one thread with the same weights, interleaved. The plain side is
tests/bench/plain_muse.py. Before timing, both draw by inverse CDF from the same uniforms and score
with the same Gumbel noise in float64, where rounding does not reach a decision, and must give the
same tokens. Ours counts everything from the text encoder's states to the tokens. `sampler` is what
neither network nor output table need: guidance, draw, confidence, masking.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_modules.muse import process
from lightning_modules.muse.config import DecodeConfig, UViTConfig
from lightning_modules.muse.uvit import UViT
from tests.bench.machine import as_shipped, heading, one_thread
from tests.bench.plain_muse import PlainUViT, plain_sample

SIDE = 16
CONFIG = UViTConfig(
    hidden_size=512,
    num_hidden_layers=8,
    num_attention_heads=8,
    intermediate_size=1408,
    in_channels=384,
    block_out_channels=384,
    block_num_heads=6,
    num_res_blocks=2,
)
GUIDANCE = 10.0
TEMPERATURE = (2.0, 0.0)


class Timer:
    """Wall and core seconds per part, between one call and the next."""

    def __init__(self) -> None:
        self.parts: Counter[str] = Counter()
        self.last = time.perf_counter(), time.thread_time()
        self.first = self.last

    def __call__(self, part: str) -> None:
        now = time.perf_counter(), time.thread_time()
        self.parts[part] += now[0] - self.last[0]  # type: ignore[assignment]
        self.parts[f"{part} core"] += now[1] - self.last[1]  # type: ignore[assignment]
        self.last = now

    def stop(self, part: str) -> dict[str, float]:
        self(part)
        self.parts["whole"] = self.last[0] - self.first[0]  # type: ignore[assignment]
        self.parts["whole core"] = self.last[1] - self.first[1]  # type: ignore[assignment]
        return dict(self.parts)


def make_networks() -> tuple[UViT, PlainUViT]:
    """Both networks with the same weights; zeros of the initialisation are made small noise."""
    torch.manual_seed(0)
    ours, plain = UViT(CONFIG), PlainUViT(CONFIG)
    for p in ours.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
        elif p.ndim > 1:
            p.data.mul_(2.0)  # a spread of logits as of a trained network
    plain.load_state_dict(ours.state_dict())
    return ours.eval(), plain.eval()


def make_inputs() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Text states and pooled vector of a caption and of '', with their micro-conditions."""
    g = torch.Generator().manual_seed(1)
    micro = torch.tensor([[256.0, 256.0, 0.0, 0.0, 6.0]])

    def side() -> dict[str, Tensor]:
        text = torch.randn(1, 77, CONFIG.encoder_hidden_size, generator=g)
        pooled = torch.randn(1, CONFIG.cond_embed_dim, generator=g)
        return {"text": text, "pooled": pooled, "micro": micro}

    return side(), side()


def settings(steps: int) -> DecodeConfig:
    """The settings of diffusers' pipeline."""
    return DecodeConfig(
        steps=steps,
        counting="maskgit",
        choice_law="linspace",
        choice_temperature=TEMPERATURE[0],
        choice_end=TEMPERATURE[1],
        guidance_start=GUIDANCE,
        guidance_end=GUIDANCE,
    )


def our_sample(
    network: UViT,
    inputs: dict[str, Tensor],
    null_inputs: dict[str, Tensor],
    steps: int,
    timer: Callable[[str], None] = lambda part: None,
) -> Tensor:
    cond, null = network.prepare(**inputs), network.prepare(**null_inputs)

    def predict(x: Tensor, weight: float, keep: Tensor) -> Tensor:
        timer("sampler")
        rows = network.mixed_rows(x, [cond, null], [weight, 1 - weight], keep)
        timer("network")
        return rows

    def head(rows: Tensor) -> Tensor:
        timer("sampler")
        logits = network.head(rows)
        timer("network")
        return logits

    timer("network")
    noise = process.sample_noise([7], steps, (SIDE, SIDE))
    start = torch.full((1, SIDE, SIDE), network.mask_id)
    loop = process.loop_settings(settings(steps), torch.tensor([SIDE * SIDE]))
    tokens = process.decode(predict, head, start=start, mask_id=network.mask_id, **noise, **loop)
    timer("sampler")
    return tokens


def check_tokens(ours: UViT, plain: PlainUViT, steps: int) -> int:
    """Draw by the same uniforms on both sides, in float64; the number of tokens compared."""
    noise = process.sample_noise([7], steps, (SIDE, SIDE))

    def inverse_cdf(probs: Tensor, step: int) -> Tensor:
        cdf = probs.cumsum(1)
        u = noise["draws"][step].reshape(-1, 1) * cdf[:, -1:]
        return (cdf <= u).sum(1).clamp(max=probs.size(1) - 1)

    cond, null = ({k: v.double() for k, v in side.items()} for side in make_inputs())
    start = torch.full((1, SIDE, SIDE), ours.mask_id)
    expected = plain_sample(
        plain.double(),
        cond,
        null,
        start,
        steps=steps,
        guidance=GUIDANCE,
        temperature=TEMPERATURE,
        draw=inverse_cdf,
        noise=noise["choice_noise"].flatten(2),
    )
    tokens = our_sample(ours.double(), cond, null, steps)
    ours.float(), plain.float()
    if not torch.equal(tokens, expected):
        raise SystemExit(f"tokens differ at {int((tokens != expected).sum())} positions")
    return tokens.numel()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--check-steps", type=int, default=12)
    args = parser.parse_args()
    one_thread()
    print(heading())
    ours, plain = make_networks()
    count = sum(p.numel() for p in ours.parameters())
    print(f"U-ViT of {count:,} parameters, {SIDE}x{SIDE} tokens of {CONFIG.codebook_size} codes")
    if args.check_steps:
        count = check_tokens(ours, plain, args.check_steps)
        print(f"tokens: all {count} equal after {args.check_steps} guided steps in float64")
    cond, null = make_inputs()

    def run_ours() -> dict[str, float]:
        timer = Timer()
        our_sample(ours, cond, null, args.steps, timer)
        return timer.stop("sampler")

    def run_plain() -> dict[str, float]:
        timer = Timer()
        start = torch.full((1, SIDE, SIDE), ours.mask_id)
        plain_sample(
            plain,
            cond,
            null,
            start,
            steps=args.steps,
            guidance=GUIDANCE,
            temperature=TEMPERATURE,
            timer=timer,
        )
        return timer.stop("sampler")

    plain_times, our_times = [], []
    for _ in range(args.repeats):
        plain_times.append(as_shipped(run_plain)())
        our_times.append(run_ours())
    medians: dict[str, dict[str, float]] = {}
    for name, runs in (("plain", plain_times), ("ours", our_times)):
        medians[name] = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
        whole, shown = medians[name], ", ".join(f"{run['whole']:.2f}" for run in runs)
        print(
            f"{name:5s} median {whole['whole']:.2f} s wall ({shown}), {whole['whole core']:.2f} s "
            f"core, sampler {1000 * whole['sampler']:.0f} ms of it, {args.steps} steps"
        )

    share = medians["ours"]["network core"] / medians["ours"]["whole core"]
    print(f"network and output table: {share:.0%} of ours")

    def ratio(part: str) -> float:
        return medians["plain"][part] / medians["ours"][part]

    print(f"sampler: ratio {ratio('sampler'):.1f}, of core times {ratio('sampler core'):.1f}")
    print(f"ratio of core times {ratio('whole core'):.2f}")
    print(f"ratio {ratio('whole'):.2f}")


if __name__ == "__main__":
    main()
