"""How well a tokenizer or an autoencoder gives pictures back: rFID, PSNR, SSIM, LPIPS.

python -m eval.reconstruction --help
"""

import sys

from experiments.cli import command
from experiments.evaluation.door import evaluate
from experiments.evaluation.options import Door

DOOR = Door(
    "python -m eval.reconstruction",
    "How well a tokenizer or an autoencoder gives pictures back: rFID, PSNR, SSIM, LPIPS.",
    scores=("fid",),
    first_stage=True,
    examples=(
        "--ckpt runs/x --images DIR --resolution 256 --crop square",
        "--ckpt model.ckpt --paper vqgan --coco ROOT --num 5000 --resolution 256 --crop square",
        "--ckpt runs/x data=scenes --features scenes",
    ),
)

if __name__ == "__main__":
    sys.exit(command(lambda argv: evaluate(DOOR, argv), sys.argv[1:]))
