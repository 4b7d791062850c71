"""Scores against the usual packages: time, equal values, and memory.

    python -m tests.bench.evaluation [--pictures 300] [--size 256] [--count 30000] [--only PART]

frechet: our Frechet distance at d = 2048 against the one by scipy's sqrtm, on one thread.
features: features/s of a folder, by clean-fid with 2 workers and by our path on 2 threads, through
one TorchScript network of the published file's form and little work, so that reading and resizing
decide. memory: peak of a process that makes all scores of so many pictures of 2,048 features.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cleanfid import fid as cleanfid
from cleanfid.inception_torchscript import InceptionV3W
from PIL import Image

from eval.extractors import InceptionRows
from eval.frechet import FeatureStats, frechet_distance
from eval.rows import Measured, load_measured, save_measured
from eval.scorers import SCORERS
from experiments.pipeline.given import FolderPictures
from experiments.pipeline.stage import Folders, Machine
from tests.bench.machine import as_shipped, heading, one_thread
from tests.tiny_networks import inception_file

ROOT = Path(__file__).parents[2]
SCORES = ("fid", "sfid", "kid", "prdc", "inception_score", "cmmd", "giqa")
PART = 500  # pictures of a file of rows


def seconds(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall time, time on cores by this process and its children, and the result."""
    wall, core = time.perf_counter(), core_time()
    result = run()
    return time.perf_counter() - wall, core_time() - core, result


def core_time() -> float:
    used = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def report(what: str, times: dict[str, list[tuple[float, float]]]) -> None:
    """Print the medians of both sides, theirs first, and their ratios."""
    medians = []
    for name, values in times.items():
        wall, core = (statistics.median(v) for v in zip(*values, strict=True))
        medians.append((wall, core))
        print(f"{what} {name}: {wall:.2f} s wall, {core:.2f} s core")
    (their_wall, their_core), (our_wall, our_core) = medians
    print(f"{what} ratio of core times {their_core / our_core:.2f}")
    print(f"{what} ratio {their_wall / our_wall:.2f}")


def bench_frechet(repeats: int) -> None:
    """Time both distances in turn, on features of a spectrum that falls like Inception's."""
    one_thread()
    rng = np.random.default_rng(0)
    spectrum = np.linspace(1, 0.02, 2048) ** 2
    sets = [rng.standard_normal((5000, 2048)) * spectrum + shift for shift in (0, 0.05)]
    a, b = (FeatureStats.of(x) for x in sets)
    moments = [m.numpy() for s in (a, b) for m in (s.mean, s.covariance)]
    times: dict[str, list[tuple[float, float]]] = {"scipy": [], "ours": []}
    for _ in range(repeats):
        *took, theirs = seconds(lambda: cleanfid.frechet_distance(*moments))
        times["scipy"].append((took[0], took[1]))
        *took, ours = seconds(lambda: frechet_distance(a, b))
        times["ours"].append((took[0], took[1]))
        if abs(ours - theirs) > 1e-6 * theirs:
            raise SystemExit(f"distances differ: {ours} and {theirs}")
    print("frechet: d = 2048, equal to 1e-6")
    report("frechet", times)


def bench_features(pictures: int, size: int, repeats: int) -> None:
    """Features of a folder of PNGs in mode clean by either path, in turn."""
    one_thread()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = inception_file(folder)
        network = InceptionV3W(name, download=False, resize_inside=False)
        measure = InceptionRows(weights).load("cpu", folder=folder)
        (folder / "p").mkdir()
        rng = np.random.default_rng(0)
        for i in range(pictures):
            pixels = rng.integers(0, 256, (size // 8, size // 8, 3), np.uint8)
            image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
            image.save(folder / "p" / f"{i:05d}.png")
        names = tuple(sorted(path.name for path in (folder / "p").iterdir()))
        read = FolderPictures(folder / "p", names, "").reader(Folders(folder), Machine())

        def theirs() -> np.ndarray:
            return cleanfid.get_folder_features(
                str(folder / "p"),
                network,
                num_workers=2,
                batch_size=50,
                device="cpu",
                mode="clean",
                verbose=False,
            )

        def ours() -> np.ndarray:
            starts = range(0, pictures, 50)
            rows = [measure(read(i, i + 50)[0], [], i).rows for i in starts]
            return np.concatenate([r["features.inception"] for r in rows])

        times: dict[str, list[tuple[float, float]]] = {"clean-fid": [], "ours": []}
        for _ in range(repeats):
            *took, expected = seconds(as_shipped(theirs))
            times["clean-fid"].append((took[0], took[1]))
            *took, found = seconds(ours)
            times["ours"].append((took[0], took[1]))
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    for name, values in times.items():
        speed = pictures / statistics.median(wall for wall, _ in values)
        print(f"features {name}: {speed:.0f}/s of {size} px")
    report("features", times)


def write_rows(folder: Path, count: int) -> None:
    """Rows as a features stage leaves them: pool3, spatial features and classes."""
    rng = np.random.default_rng(0)
    widths = {
        "features.inception": 2048,
        "spatial.inception": 2023,
        "probabilities.inception": 1008,
    }
    for first in range(0, count, PART):
        rows = {
            name: rng.random((min(PART, count - first), width), np.float32)
            for name, width in widths.items()
        }
        rows["probabilities.inception"] /= rows["probabilities.inception"].sum(1, keepdims=True)
        models = dict.fromkeys(widths, "random")
        save_measured(folder / f"{first:06d}.safetensors", Measured(rows, models=models))


def score_all(folder: Path, scores: list[str]) -> None:
    """Make the scores of one set against the other, and print the peak of this process."""
    one_thread()
    made, real = (load_measured(sorted((folder / k).iterdir())) for k in ("made", "real"))
    for name in scores:
        start = time.process_time()
        SCORERS[name](made, [], real, prefix="eval", resamples=100, seed=0)
        core, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            f"memory {name}: {core:.0f} s of a core, peak so far {peak / 1024:.0f} MB", flush=True
        )


def bench_memory(count: int, scores: list[str]) -> None:
    """All scores of so many pictures in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        for kind in ("made", "real"):
            write_rows(Path(name) / kind, count)
        command = [sys.executable, "-m", "tests.bench.evaluation", "--folder", name]
        subprocess.run([*command, "--scores", *scores], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("frechet", "features", "memory"))
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--count", type=int, default=30_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scores", nargs="+", default=list(SCORES), choices=SCORES)
    parser.add_argument("--folder", type=Path, help="score the rows there, in this process")
    args = parser.parse_args()
    if args.folder is not None:
        score_all(args.folder, args.scores)
        return
    print(heading())
    if args.only in (None, "frechet"):
        bench_frechet(args.repeats)
    if args.only in (None, "features"):
        bench_features(args.pictures, args.size, args.repeats)
    if args.only in (None, "memory"):
        bench_memory(args.count, args.scores)


if __name__ == "__main__":
    main()
