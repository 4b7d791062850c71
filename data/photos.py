"""The photographs that scikit-learn ships, cut into captioned patches: how own shards look.

python -m data.photos --out photos
python -m experiments.run --paper vqgan data.shards=photos/{00000..00001}.tar
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.shards import write_shards

SUBJECTS = {"china.jpg": "a temple in china", "flower.jpg": "a pink flower"}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")


def photos(size: int = 64, stride: int = 32) -> Iterator[dict[str, Any]]:
    """Yield overlapping patches of both photographs (427 x 640 pixels each).

    Args:
        size: width and height of a patch.
        stride: pixels from one patch to the next.

    Yields:
        {"key": str, "image": uint8 [size, size, 3], "caption": str, "label": 0 china, 1 flower}.
    """
    from sklearn.datasets import load_sample_images  # a second that --help does without

    source = load_sample_images()
    for label, (path, image) in enumerate(zip(source.filenames, source.images, strict=True)):
        height, width, _ = image.shape
        for top in range(0, height - size + 1, stride):
            for left in range(0, width - size + 1, stride):
                row = ROWS[3 * (top + size // 2) // height]
                column = COLUMNS[3 * (left + size // 2) // width]
                yield {
                    "key": f"{label}{top:04d}{left:04d}",
                    "image": image[top : top + size, left : left + size],
                    "caption": f"a patch of {SUBJECTS[Path(path).name]}, {row} {column}",
                    "label": label,
                }


def main() -> None:
    """Write the patches as JPEG shards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--size", type=int, default=64, help="width and height of a patch")
    parser.add_argument("--per-shard", type=int, default=250, help="patches in a shard")
    arguments = parser.parse_args()
    if not 8 <= arguments.size <= 427:
        parser.error(
            f"--size must be between 8 and 427, the photographs' height, not {arguments.size}"
        )
    if arguments.per_shard < 1:
        parser.error(f"--per-shard must be at least 1, not {arguments.per_shard}")
    shards = write_shards(photos(arguments.size), arguments.out, arguments.per_shard, "jpg")
    print(f"wrote {len(shards)} shards: {shards[0]} ... {shards[-1]}")


if __name__ == "__main__":
    main()
