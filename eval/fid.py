"""Frechet distances of pictures of any kind to any reference: FID, FD in other features.

python -m eval.fid --help
"""

import sys

from experiments.cli import command
from experiments.evaluation.door import evaluate
from experiments.evaluation.options import Door

DOOR = Door(
    "python -m eval.fid",
    "Frechet distances of pictures of any kind to any reference: FID, FD in other features.",
    scores=("fid",),
    examples=(
        "--ckpt runs/x data=scenes --features scenes",
        "--images DIR --reference REAL --resolution 256 --crop square",
        "--ckpt runs/x --protocol adm50k --classes 1000 --reference imagenet256.npz",
        "--images DIR --reference REAL --features inception,dinov2 --scores fid,kid,prdc",
    ),
)

if __name__ == "__main__":
    sys.exit(command(lambda argv: evaluate(DOOR, argv), sys.argv[1:]))
