"""Tiny corpora as they lie on a disk once they are downloaded, and tars with anything in them."""

import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WNIDS = ("n01440764", "n01443537", "n01484850")  # tench, goldfish, great white shark


def picture(path: Path, seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (24, 20)) -> Path:
    """Write a picture of noise; mode RGB, L, CMYK, or EXIF for one that lies on its side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(seed, mode, size, path.suffix))
    return path


def encoded(
    seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (24, 20), suffix: str = ".jpg"
) -> bytes:
    """Encode a picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    image, file = Image.fromarray(pixels), io.BytesIO()
    exif = Image.Exif()
    if mode == "EXIF":
        exif[0x0112] = 6
    elif mode != "RGB":
        image = image.convert(mode)
    image.save(file, "PNG" if suffix == ".png" else "JPEG", exif=exif)
    return file.getvalue()


def with_header(side: int) -> bytes:
    """Encode a PNG of a few hundred bytes that promises side x side pixels and holds none."""
    data = bytearray(encoded(mode="L", size=(8, 8), suffix=".png"))
    data[16:24] = side.to_bytes(4) * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    return bytes(data)


def tar(
    path: Path,
    members: Mapping[str, bytes] | Iterable[tuple[str, bytes | str]],
    mode: Any = "w",
    **options: Any,
) -> Path:
    """Write a tar of files, and of links where a member's content is the name of another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **options) as file:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                file.addfile(member)
            else:
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    return path


def coco(root: Path, year: int = 2014, train: int = 40, val: int = 24) -> Path:
    """MS-COCO: grey, CMYK and lying pictures among them, five captions for each."""
    modes = ["RGB", "L", "CMYK", "EXIF"]
    for split, count, first in (("train", train, 1), ("val", val, 5001)):
        images, annotations = [], []
        for number in range(first, first + count):
            name = f"{number:012d}.jpg"
            name = f"COCO_{split}{year}_{name}" if year == 2014 else name
            picture(root / f"{split}{year}" / name, number, modes[number % 8 % 4])
            images.append({"id": number, "file_name": name, "width": 24, "height": 20})
            for i in range(5):
                text = f"picture {number} said in way {i}" + (" \n" if i == 3 else "")
                told = {"image_id": number, "id": 10 * number + i, "caption": text}
                annotations.insert(0, told)
        content = {"info": {"year": year}, "images": images, "annotations": annotations}
        path = root / "annotations" / f"captions_{split}{year}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return root


def imagenet(root: Path, flat: bool = False) -> Path:
    """ILSVRC 2012 in folders of classes; val flat with Kaggle's table on request."""
    lines = ["ImageId,PredictionString"]
    for label, wnid in enumerate(WNIDS):
        for i in range(8):
            picture(root / "train" / wnid / f"{wnid}_{i}.JPEG", 10 * label + i)
        for i in range(4):
            name = f"ILSVRC2012_val_{4 * label + i + 1:08d}"
            picture(root / "val" / ("" if flat else wnid) / f"{name}.JPEG", 10 * label + i)
            lines.append(f"{name},{wnid} 1 2 3 4 {wnid} 5 6 7 8")
    if flat:
        (root / "LOC_val_solution.csv").write_text("\n".join(lines))
    return root


def birds(root: Path, split: str = "classes") -> Path:
    """CUB-200 with Reed's captions; its splits by classes, by pictures, or in pickles."""
    home = root / "CUB_200_2011"
    kinds = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")
    listed = []
    for label, kind in enumerate(kinds):
        for i in range(8):
            name = f"{kind[4:]}_{i:04d}_{label}{i}"
            picture(home / "images" / kind / f"{name}.jpg", 10 * label + i)
            text = root / "text_c10" / kind / f"{name}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text("".join(f"bird {label}{i} said in way {j} .\n" for j in range(10)))
            listed.append(f"{kind}/{name}.jpg")
    picture(home / "images" / kinds[0] / "made_rgb.jpg")
    lines = [f"{i} {name}" for i, name in enumerate(listed, 1)]
    (home / "images.txt").write_text("\n".join(lines))
    if split == "classes":
        (root / "trainvalclasses.txt").write_text("\n".join(kinds[:2]))
        (root / "testclasses.txt").write_text(kinds[2])
    elif split == "pictures":
        flags = [f"{i} {int(i % 4 != 0)}" for i in range(1, len(listed) + 1)]
        (home / "train_test_split.txt").write_text("\n".join(flags))
    elif split == "pickles":
        import pickle

        for part, names in {"train": listed[:20], "test": listed[20:]}.items():
            (root / part).mkdir()
            stems = [name.removesuffix(".jpg") for name in names]
            (root / part / "filenames.pickle").write_bytes(pickle.dumps(stems, protocol=0))
    return root


def flowers(root: Path) -> Path:
    """Oxford-102 with Reed's captions, split by classes."""
    for i in range(1, 25):
        kind = f"class_{(i - 1) % 3 + 1:05d}"
        picture(root / "jpg" / f"image_{i:05d}.jpg", i)
        text = root / "text_c10" / kind / f"image_{i:05d}.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("".join(f"flower {i} said in way {j}\n" for j in range(10)))
    (root / "trainvalclasses.txt").write_text("class_00001\nclass_00002\n")
    (root / "testclasses.txt").write_text("class_00003\n")
    return root


def faces(root: Path, numbers: range = range(59990, 60010)) -> Path:
    """FFHQ: folders of a thousand, PNGs named by their numbers."""
    for number in numbers:
        folder = f"{number // 1000 * 1000:05d}"
        picture(root / folder / f"{number:05d}.png", number, size=(16, 16))
    return root


def imagefolder(root: Path, metadata: str = "") -> Path:
    """Hugging Face's imagefolder: classes, or a table of captions (csv or jsonl)."""
    rows = []
    for split, count in (("train", 16), ("validation", 8)):
        for i in range(count):
            name = f"{split}/{'' if metadata else ('cat', 'tabby_dog')[i % 2] + '/'}{i:03d}.png"
            picture(root / name, i, size=(16, 16))
            rows.append({"file_name": name, "text": f"a {split} picture, {i}", "label": i % 2})
    if metadata == "csv":
        lines = [f'{r["file_name"]},"{r["text"]}",{r["label"]}' for r in rows]
        (root / "metadata.csv").write_text("\n".join(["file_name,text,label", *lines]))
    elif metadata == "jsonl":
        (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def parquet(root: Path, struct: bool = True) -> Path:
    """Parquet files as `datasets` pushes them: pictures, texts and a label of two classes."""
    import pyarrow
    import pyarrow.parquet

    (root / "data").mkdir(parents=True)
    for split, count in (("train", 40), ("validation", 12)):
        for part in range(2):
            images = [encoded(100 * part + i, suffix=".png") for i in range(count // 2)]
            column = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
            table = {
                "image": column if struct else images,
                "text": [f"{split} {part} {i}" for i in range(count // 2)],
                "label": [i % 2 for i in range(count // 2)],
            }
            features = {"image": {"_type": "Image"}, "text": {"_type": "Value", "dtype": "string"}}
            features["label"] = {"_type": "ClassLabel", "names": ["cat", "dog"]}
            told = {"huggingface": json.dumps({"info": {"features": features}})}
            made = pyarrow.table(table).replace_schema_metadata(told if struct else None)
            name = f"{split}-{part:05d}-of-00002.parquet"
            pyarrow.parquet.write_table(made, root / "data" / name, row_group_size=7)
    return root
