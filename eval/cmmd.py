"""CMMD: a kernel distance of CLIP embeddings, which needs few pictures.

python -m eval.cmmd --help
"""

import sys

from experiments.cli import command
from experiments.evaluation.door import evaluate
from experiments.evaluation.options import Door

DOOR = Door(
    "python -m eval.cmmd",
    "CMMD: a kernel distance of CLIP embeddings, which needs few pictures.",
    scores=("cmmd",),
    examples=(
        "--images DIR --reference REAL",
        "--ckpt runs/x data=scenes --features scenes",
    ),
)

if __name__ == "__main__":
    sys.exit(command(lambda argv: evaluate(DOOR, argv), sys.argv[1:]))
