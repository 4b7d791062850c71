"""Peak memory of sampling and scoring: `python -m tests.bench.memory [--prompts 500 5000]`.

One tiny generator at 64 px, drawn from with so many prompts, each count in a process of its own.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.shards import write_shards
from experiments.papers.registry import load
from experiments.pipeline.plan import plan
from experiments.pipeline.stage import Log
from experiments.pipeline.store import Store
from lightning_modules.common.processor import prepare_cpu

ROOT = Path(__file__).parents[2]
WORDS = [
    "logger=csv",
    "data.resolution=64",
    "trainer.max_steps=1",
    "tokenizer.trainer.max_steps=1",
    "eval.heldout=0",
    "eval.traces=0",
    "eval.batch_size=50",
    "sampling.steps=1",
]


def prepare(folder: Path, prompts: int) -> None:
    """Write shards for so many prompts and their references, and train the tiny generator."""
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for split, count in (("train", 64), ("val", 3 * prompts)):
        samples = ({"key": f"{i:06d}", "image": image, "caption": "a thing"} for i in range(count))
        write_shards(samples, folder / split, 1000)
    work(folder, 16, "generator")


def work(folder: Path, prompts: int, until: str = "score") -> None:
    """Do the stages of a run up to one of that name."""
    prepare_cpu()
    words = [
        f"eval.prompts={prompts}",
        f"data.val_size={3 * prompts}",
        f"cache={folder / 'cache'}",
        f"data.shards={folder / 'train'}",
        f"data.val_shards={folder / 'val'}",
    ]
    run = load("paella", "micro", [*WORDS, *words])
    stages = plan("paella", run).stages
    names = [stage.name for stage in stages]
    machine = run.machine()
    Store(folder / "cache").run(
        stages[: names.index(until) + 1], machine, Log(lambda line: None, "none")
    )


def peak(folder: Path, prompts: int) -> float:
    """Return the peak resident memory, in MB, of a process that samples and scores."""
    command = [sys.executable, "-m", "tests.bench.memory", "--folder", str(folder)]
    command += ["--prompts", str(prompts)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the peak for every number of prompts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[500, 5000])
    parser.add_argument("--folder", type=Path, help="measure this process, in a prepared folder")
    args = parser.parse_args(argv)
    if args.folder is not None:
        work(args.folder, args.prompts[0])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), max(args.prompts))
        for prompts in args.prompts:
            print(f"{prompts} prompts: {peak(Path(folder), prompts):.0f} MB")


if __name__ == "__main__":
    main()
