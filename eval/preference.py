"""What models of human preferences say of pictures and their prompts: HPSv2, PickScore.

python -m eval.preference --help
"""

import sys

from experiments.cli import command
from experiments.evaluation.door import evaluate
from experiments.evaluation.options import Door

DOOR = Door(
    "python -m eval.preference",
    "What models of human preferences say of pictures and their prompts: HPSv2, PickScore.",
    scores=("hpsv2", "pickscore"),
    examples=(
        "--images DIR --prompts list.csv",
        "--ckpt runs/x --coco ROOT --num 1000 --scores pickscore --weights pickscore=FILE",
    ),
)

if __name__ == "__main__":
    sys.exit(command(lambda argv: evaluate(DOOR, argv), sys.argv[1:]))
