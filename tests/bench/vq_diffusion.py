"""VQ-Diffusion's sampling loop against a plain loop as released: time, memory, equal tokens.

    python -m tests.bench.vq_diffusion [--repeats 3] [--steps 25] [--check-steps 3]

The S-sized text model (18 blocks, width 192) with 2887 codes and 32x32 tokens, guidance 5,
truncation 0.86, batch 1. Both sides run in one process on one thread with the same weights,
interleaved. The plain side is tests/bench/plain_vq_diffusion.py.

Before timing, both sides draw from the same uniforms in float64, where rounding does not reach a
decision, and must give the same tokens: a mask opens by one uniform and its code comes by inverse
CDF from another, on the plain side of the dense posterior over K + 1 classes. The released draw
needs K + 1 uniforms per position in place of two, so that under its own noise the two sides are
equal in distribution only. The dense posterior must also be that of posterior.
"""

import argparse
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules.samplers.kernel import posterior
from lightning_modules.vq_diffusion import process
from lightning_modules.vq_diffusion.config import MODELS, ScheduleConfig
from lightning_modules.vq_diffusion.network import Denoiser, Side
from tests.bench.machine import as_shipped, heading, network_share, one_thread, seconds
from tests.bench.plain_vq_diffusion import PlainDenoiser, plain_sample, plain_step

CONFIG = MODELS["s"]
GRID = (32, 32)
GUIDANCE, TRUNCATION = 5.0, 0.86
TEXT_LENGTH = 77
SCHEDULE = process.mask_schedule(
    CONFIG.diffusion_steps, CONFIG.num_codes, ScheduleConfig().mask_rate
)


def make_networks() -> tuple[Denoiser, PlainDenoiser]:
    """Both networks with the same weights, large enough for peaked predictions."""
    torch.manual_seed(0)
    ours, plain = Denoiser(CONFIG), PlainDenoiser(CONFIG)
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.05)
    plain.load_state_dict(ours.state_dict())
    return ours.eval(), plain.eval()


def make_texts() -> tuple[Tensor, Tensor]:
    """Condition and null [1, 77, 512] of unit length per token."""
    g = torch.Generator().manual_seed(1)
    both = torch.randn(2, 1, TEXT_LENGTH, CONFIG.condition_dim, generator=g)
    text, null = torch.nn.functional.normalize(both, dim=-1)
    return text, null


class Stopwatch:
    """Seconds spent inside a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: Any) -> Any:
        start = time.perf_counter()
        out = self.function(*args)
        self.seconds += time.perf_counter() - start
        return out


def our_sample(
    network: Denoiser,
    sides: list[Side],
    noise: dict[str, Tensor],
    steps: int,
    rows: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Tokens [1, h, w]; `rows` stands for the network without its head."""
    shares, rows = [GUIDANCE, 1 - GUIDANCE], rows or network.mixed_rows
    return process.sample(
        lambda x, t, keep: rows(x, t, sides, shares, keep),
        network.head,
        x=torch.full((1, *GRID), CONFIG.num_codes),
        steps=process.exact_steps(SCHEDULE, steps),
        opens=noise["opens"],
        draws=noise["draws"],
        swaps=noise["swaps"],
        truncation=TRUNCATION,
    )


def borders(steps: int) -> list[int]:
    """Times of the walk of `steps` calls, from the last one to -1."""
    return [*(step.t for step in process.exact_steps(SCHEDULE, steps)), -1]


def inverse_cdf(law: Tensor, uniforms: Tensor) -> Tensor:
    """law [n, K], uniforms [n] -> [n]."""
    cdf = law.cumsum(1)
    return (cdf <= uniforms[:, None] * cdf[:, -1:]).sum(1).clamp(max=law.size(1) - 1)


def check_tokens(ours: Denoiser, plain: PlainDenoiser, steps: int) -> tuple[int, float]:
    """Draw from the same uniforms on both sides, in float64.

    Returns:
        The number of tokens compared and the largest difference of the posteriors.
    """
    noise = process.sample_noise([7], steps, GRID)
    walk = process.exact_steps(SCHEDULE, steps)
    calls, worst = [0], [0.0]

    def draw(log_law: Tensor, log_start: Tensor, log_x: Tensor) -> Tensor:
        i, kernel = calls[0], walk[calls[0]].kernel
        calls[0] += 1
        law, x = log_law.exp().transpose(1, 2)[0], log_x.argmax(1)[0]  # [N, K + 1], [N]
        start = log_start.exp().transpose(1, 2)[0, :, :-1]
        lean = posterior(start, x, kernel)
        worst[0] = max(worst[0], float((law - lean).abs().max()))
        opens, draws = (noise[k][i].flatten().double() for k in ("opens", "draws"))
        masked = x == CONFIG.num_codes
        opens_at = 1 - law[:, -1] / law.sum(1)
        # whether a shown token is looked at again is decided without the network
        changes = opens < torch.where(masked, opens_at, 1 - kernel.stays_wrong)
        shown = inverse_cdf(torch.where(masked[:, None], law[:, :-1], start), draws)
        return torch.where(changes, shown, x)[None]

    text, null = (v.double() for v in make_texts())
    expected = plain_sample(
        plain.double(),
        text,
        null,
        borders(steps),
        guidance=GUIDANCE,
        truncation=TRUNCATION,
        draw=draw,
    )
    sides = [ours.double().prepare(v) for v in (text, null)]
    tokens = our_sample(ours, sides, noise, steps).flatten(1)
    ours.float(), plain.float()
    if not torch.equal(tokens, expected):
        raise SystemExit(f"tokens differ at {int((tokens != expected).sum())} positions")
    return tokens.numel(), worst[0]


class PeakBytes(TorchDispatchMode):
    """Largest number of bytes that lived at once among tensors made while it was active."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, weakref.ref] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        given -= {t.untyped_storage().data_ptr() for t in self._tensors()}
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in given:
                self.alive[id(value)] = weakref.ref(value)
        storages = [t.untyped_storage() for t in self._tensors()]
        self.peak = max(self.peak, sum({s.data_ptr(): s.nbytes() for s in storages}.values()))
        return out

    def _tensors(self) -> list[Tensor]:
        found = {key: ref() for key, ref in self.alive.items()}
        self.alive = {key: self.alive[key] for key, tensor in found.items() if tensor is not None}
        return [tensor for tensor in found.values() if tensor is not None]


def post_processing_bytes(ours: Denoiser, plain: PlainDenoiser, steps: int) -> tuple[int, int]:
    """Peak of what a step needs beside the network: plain and ours, the largest over the steps."""
    text, null = make_texts()
    peaks = [0, 0]

    def watched_step(*args: Any) -> Tensor:
        with PeakBytes() as watch:
            out = plain_step(*args)
        peaks[0] = max(peaks[0], watch.peak)
        return out

    walk = borders(steps)
    plain_sample(
        plain,
        text,
        null,
        [walk[0], walk[1]],
        guidance=GUIDANCE,
        truncation=TRUNCATION,
        step=watched_step,
    )
    watch, noise = PeakBytes(), process.sample_noise([7], steps, GRID)
    sides = [ours.prepare(text), ours.prepare(null)]

    def unwatched_rows(*args: Any) -> Tensor:
        watch.__exit__(None, None, None)
        out = ours.mixed_rows(*args)
        watch.__enter__()
        return out

    with watch:
        our_sample(ours, sides, noise, steps, unwatched_rows)
    return peaks[0], watch.peak


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--check-steps", type=int, default=3)
    args = parser.parse_args()
    one_thread()
    print(heading())
    ours, plain = make_networks()
    text, null = make_texts()
    if args.check_steps:
        count, error = check_tokens(ours, plain, args.check_steps)
        print(f"tokens: all {count} equal after {args.check_steps} guided steps in float64")
        print(f"posterior: dense and lean differ by at most {error:.1e}")

    shares: dict[str, list[float]] = {"plain": [], "ours": []}

    def run_ours() -> Tensor:
        start, rows = time.perf_counter(), Stopwatch(ours.mixed_rows)
        prepare = Stopwatch(lambda: [ours.prepare(text), ours.prepare(null)])
        noise = process.sample_noise([7], args.steps, GRID)
        tokens = our_sample(ours, prepare(), noise, args.steps, rows)
        network = rows.seconds + prepare.seconds
        shares["ours"].append(1 - network / (time.perf_counter() - start))
        return tokens

    def run_plain() -> Tensor:
        start, post = time.perf_counter(), Stopwatch(plain_step)
        tokens = plain_sample(
            plain,
            text,
            null,
            borders(args.steps),
            guidance=GUIDANCE,
            truncation=TRUNCATION,
            step=post,
        )
        shares["plain"].append(post.seconds / (time.perf_counter() - start))
        return tokens

    times: dict[str, list[tuple[float, float]]] = {"plain": [], "ours": []}
    for _ in range(args.repeats):
        times["plain"].append(seconds(as_shipped(run_plain)))
        times["ours"].append(seconds(run_ours))
    medians = {}
    for name, values in times.items():
        wall, core = (statistics.median(v) for v in zip(*values, strict=True))
        medians[name] = wall, core
        shown = ", ".join(f"{v:.2f}" for v, _ in values)
        print(
            f"{name:5s} median {wall:.2f} s wall ({shown}), {core:.2f} s core, {args.steps} steps, "
            f"post-processing {statistics.median(shares[name]):.1%}"
        )
    dense, lean = post_processing_bytes(ours, plain, args.steps)
    print(
        f"post-processing memory: plain {dense / 2**20:.1f} MiB, ours {lean / 2**20:.1f} MiB, "
        f"1/{dense / lean:.0f}"
    )
    share = network_share(run_ours, ours, "mixed_rows", "head", "prepare")
    print(f"network and output table: {share:.0%} of ours")
    print(f"ratio of core times {medians['plain'][1] / medians['ours'][1]:.2f}")
    print(f"ratio {medians['plain'][0] / medians['ours'][0]:.2f}")


if __name__ == "__main__":
    main()
