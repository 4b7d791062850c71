"""CLIP score: cosine of pictures and their prompts; model, tag and scale are named.

python -m eval.clip_score --help
"""

import sys

from experiments.cli import command
from experiments.evaluation.door import evaluate
from experiments.evaluation.options import Door

DOOR = Door(
    "python -m eval.clip_score",
    "CLIP score: cosine of pictures and their prompts; model, tag and scale are named.",
    scores=("clip_score",),
    examples=(
        "--ckpt runs/x --coco ROOT --num 1000",
        '--images DIR --prompts list.csv --clip "ViT-g-14 laion2b_s12b_b42k"',
        "--ckpt runs/x data=scenes --features scenes",
    ),
)

if __name__ == "__main__":
    sys.exit(command(lambda argv: evaluate(DOOR, argv), sys.argv[1:]))
