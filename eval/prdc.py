"""Precision, recall, density and coverage of pictures against real ones.

python -m eval.prdc --help
"""

import sys

from experiments.cli import command
from experiments.evaluation.door import evaluate
from experiments.evaluation.options import Door

DOOR = Door(
    "python -m eval.prdc",
    "Precision, recall, density and coverage of pictures against real ones.",
    scores=("prdc",),
    examples=(
        "--images DIR --reference REAL --num 10000 --resolution 256 --crop square",
        "--ckpt runs/x data=scenes --features scenes",
    ),
)

if __name__ == "__main__":
    sys.exit(command(lambda argv: evaluate(DOOR, argv), sys.argv[1:]))
