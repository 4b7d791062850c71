"""FID on COCO: one picture for each of 30,000 captions of val2014, under a named protocol.

python -m eval.fid_coco30k --help
"""

import sys

from experiments.cli import command
from experiments.evaluation.door import evaluate
from experiments.evaluation.options import Door

DOOR = Door(
    "python -m eval.fid_coco30k",
    "FID on COCO: one picture for each of 30,000 captions of val2014, under a named protocol.",
    scores=("fid", "kid", "clip_score"),
    protocol="coco30k",
    examples=(
        "--ckpt runs/x --coco ROOT",
        "--ckpt runs/x --coco ROOT --out DIR sampling.steps=12",
        "--images DIR --coco ROOT --protocol ldm",
        "--ckpt runs/x --coco ROOT --num 64 --features scenes --resolution 32",
    ),
)

if __name__ == "__main__":
    sys.exit(command(lambda argv: evaluate(DOOR, argv), sys.argv[1:]))
