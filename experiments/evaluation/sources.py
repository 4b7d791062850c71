"""Pictures that are scored, and those that they are compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import coco as corpus
from data.files import file_hash
from experiments.checkpoint import (
    PLACES,
    checkpoint_file,
    checkpoint_files,
    load,
    read_settings,
)
from experiments.cli import counted, first_line, prepare_torch, speaker
from experiments.evaluation.options import Options
from experiments.papers.registry import PAPERS
from experiments.papers.sections import MAX_SEED
from experiments.pipeline.data import Captions, Pictures
from experiments.pipeline.first_stage import Given
from experiments.pipeline.given import (
    CUTS,
    FolderPictures,
    GivenGenerator,
    Prepared,
    content_of,
    matched,
    pictures_of,
    sizes_of,
)
from experiments.pipeline.prompts import (
    ClassList,
    CocoCaptions,
    NoPrompts,
    PromptFile,
    Prompts,
    PromptSource,
    list_hash,
    some,
)
from experiments.pipeline.reconstruct import Foreign, Reconstruct
from experiments.pipeline.sample import Sample
from experiments.pipeline.stage import FileStage
from experiments.settings import ConfigError, parse_overrides, pick, resolved

SCENES = 32  # pixels of the pictures that the embedded classifier learnt from
WAYS = {"val2014": "--coco ROOT", "classes": "--classes K", "file": "--prompts FILE"}


@dataclass
class Source:
    """Pictures, and what a result says of them."""

    images: Any
    """What `Features` reads; a Path of statistics."""
    told: dict[str, Any]


def check_named(options: Options) -> None:
    """Check what can be seen without reading anything.

    Raises:
        ConfigError: pictures are named in no way or two, what is named is not there, or an option
            goes with the other way.
    """
    args = options.args
    if options.door.first_stage and args.ckpt is None:
        raise ConfigError("--ckpt is missing; name a tokenizer or an autoencoder")
    if not options.door.first_stage and (args.ckpt is None) == (args.images is None):
        raise ConfigError("name either --ckpt, a generator, or --images, a folder of pictures")
    names = ("tokenizer", "paper", "negative")
    of_checkpoint = [f"--{name}" for name in names if getattr(args, name) is not None]
    if args.ckpt is None and (given := [*of_checkpoint, *options.words]):
        raise ConfigError(f"{given[0]} goes with --ckpt; the pictures of --images are there")
    if args.ckpt is not None and not checkpoint_file(args.ckpt).exists():
        raise ConfigError(f"there is no checkpoint {args.ckpt}")


def asked(options: Options) -> Prompts | Captions | None:
    """Return what is asked of the pictures; None of pictures of which nobody says it.

    Raises:
        ConfigError: two lists, none where one is needed, or one that does not hold what is asked.
    """
    args, first_stage = options.args, options.door.first_stage
    if args.prompts is not None and args.classes is not None:
        raise ConfigError("--prompts and --classes exclude each other")
    source: PromptSource
    if args.prompts is not None:
        if not args.prompts.is_file():
            raise ConfigError(f"--prompts: there is no file {args.prompts}")
        source = PromptFile(args.prompts)
    elif args.classes is not None:
        source = ClassList(args.classes)
    elif args.coco is not None and not first_stage:
        source = CocoCaptions(coco_path(options, "captions"), args.list_seed)
    elif options.data is not None:
        check_seed(args.seed + options.data.prompts - 1)
        return options.data.captions("val", options.data.prompts)
    elif first_stage or args.images is not None:
        return None
    elif options.said("prompts") in WAYS:
        raise ConfigError(f"{WAYS[options.said('prompts')]} is missing, which the protocol needs")
    else:
        source = NoPrompts()
    try:
        rows = source.rows(options.num)
    except ValueError as error:
        raise ConfigError(first_line(error)) from error
    check_seed(args.seed + max(row["number"] for row in rows))
    options.num = len(rows)
    return Prompts(source, len(rows))


def check_seed(last: int) -> None:
    """Refuse seeds of pictures, up to the last one, that no generator takes.

    Raises:
        ConfigError: they exceed MAX_SEED.
    """
    if last > MAX_SEED:
        raise ConfigError(f"--seed: no picture's seed may exceed {MAX_SEED}, got {last}")


def coco_path(options: Options, what: str) -> Path:
    """Return the captions of val2014, or the folder of its pictures.

    Raises:
        ConfigError: they are not there.
    """
    root = options.args.coco
    if root is None:
        raise ConfigError("--coco is missing; name the folder that holds annotations/ and val2014/")
    if not root.is_dir():
        raise ConfigError(f"--coco: there is no folder {root}")
    try:
        return (corpus.annotations if what == "captions" else corpus.pictures_folder)(
            root, "val", 2014
        )
    except ValueError as error:
        raise ConfigError(f"--coco: {first_line(error)}") from error


def reference(options: Options, prompts: Prompts | Captions | None) -> Source:
    """Return what pictures are compared with.

    Raises:
        ConfigError: nobody says with what, or it is not there.
    """
    what = options.reference
    if what in (None, "given"):
        if options.data is None:
            raise ConfigError(
                "--reference is missing: a folder of real pictures, an npz of their statistics, "
                "val2014 (with --coco), or data (with data=NAME)"
            )
        what = "data"
    if what == "data":
        if options.data is None:
            raise ConfigError("--reference data needs data=NAME or data.shards=...")
        source = of_data(options, options.data.reference("val"))
        return Source(source.images, {**source.told, "captions": "shares none with the prompts"})
    if what in ("val2014", "val2014-list"):
        listed = prompts if what == "val2014-list" else None
        if what == "val2014-list" and not isinstance(listed, Prompts):
            raise ConfigError("--reference val2014-list needs the list of --coco or --prompts")
        source = folder(
            options, coco_path(options, "pictures"), "--coco", listed, None, strict=False
        )
        of_list = prompts is not None and options.args.coco is not None
        shares = "holds the pictures that the prompts were written for" if of_list else "unknown"
        return Source(source.images, {**source.told, "name": what, "captions": shares})
    path = Path(str(what))
    if path.suffix != ".npz":
        source = folder(options, path, "--reference", None, None, strict=False)
        return Source(source.images, {**source.told, "captions": "unknown"})
    if not path.is_file():
        raise ConfigError(f"--reference: there is no file {path}")
    told = {"name": path.name, "from": "npz", "sha256": file_hash(path), "captions": "unknown"}
    return Source(path, {**told, "sizes": []})


def scored(options: Options, prompts: Prompts | Captions | None) -> Source:
    """Return the pictures that are scored, of a folder or a generator.

    Raises:
        ConfigError: they do not fit what is asked.
    """
    args = options.args
    if args.images is not None:
        return folder(options, args.images, "--images", prompts, options.num, strict=True)
    assert prompts is not None
    return drawn(options, prompts)


def drawn(options: Options, prompts: Prompts | Captions) -> Source:
    """Return the pictures that a checkpoint draws.

    Raises:
        ConfigError: no such checkpoint, one that takes no such prompts, or a wrong setting.
    """
    args = options.args
    prepare_torch()
    module = load(args.ckpt, args.tokenizer, "cpu", args.paper)
    sampling = resolved(read_settings(module, options.words))
    by_class = isinstance(prompts, Prompts) and isinstance(prompts.source, ClassList)
    if isinstance(prompts, Prompts) and module.labelled != by_class:
        way = "classes: give --classes K" if module.labelled else "text, not on classes"
        raise ConfigError(f"{args.ckpt} is conditioned on {way}")
    if args.negative is not None and "negative" not in module.ABILITIES:
        raise ConfigError("this checkpoint's paper knows no --negative")
    try:
        if by_class or not module.labelled:
            module.check_prompts([str(args.classes - 1) if by_class else "a picture"])
    except (ValueError, OSError, RuntimeError) as error:
        what = "--classes" if by_class else "the text encoder"
        raise ConfigError(f"{what}: {first_line(error)}") from error
    path = checkpoint_file(args.ckpt)
    files, first = checkpoint_files(path, args.tokenizer)
    text = resolved(module.config.text)
    places = {n: text[n] for n in (p.partition(".")[2] for p in PLACES) if text.get(n)}
    encoders = [Path(place) for place in places.values() if Path(place).exists()]
    generator = GivenGenerator(path, (*files, *encoders), args.paper, args.tokenizer, places)
    sample = Sample(generator, prompts, sampling, args.seed, negative=args.negative)
    height, width = module.grid
    told = {
        "name": str(args.ckpt),
        "from": "generator",
        "paper": args.paper or module.hparams["config"].get("paper"),
        "checkpoint_sha256": file_hash(path),
        "first_stage_sha256": file_hash(first),
        "sampling": sampling,
        "text": text,
        "negative": args.negative,
        "seed_rule": f"picture number i is drawn from seed {args.seed} + i",
        "batch_size": args.batch_size,
        "format": "png",
        "sizes": [[width * module.pixels_per_token, height * module.pixels_per_token]],
    }
    return Source(sample, told)


def folder(
    options: Options,
    path: Path,
    option: str,
    prompts: Prompts | Captions | None,
    count: int | None,
    *,
    strict: bool,
) -> Source:
    """Return the pictures of a folder: those of a list, or `count` of them, or all.

    Args:
        options: whose cache keeps their hashes.
        path: the folder.
        option: what named it.
        prompts: the list.
        count: how many.
        strict: whether a broken picture is refused, or left out and counted.

    Raises:
        ConfigError: there are not as many, some of the list are missing, or some are broken.
    """
    try:
        found = pictures_of(path)
        if isinstance(prompts, Prompts):
            found = matched(path, found, prompts.source.rows(prompts.count))
        elif count is not None and len(found) < count:
            raise ValueError(f"{path} holds {counted(len(found), 'picture')}, not {count}")
        elif count is not None:  # a fair part, where names are sorted by what they show
            found = sorted(found, key=lambda n: list_hash([{"id": n, "prompt": ""}]))[:count]
        sizes = sizes_of(path, found, strict)
        content = content_of(path, [*sizes], options.args.cache / "contents")
    except ValueError as error:
        raise ConfigError(f"{option}: {first_line(error)}") from error
    own = prompts if isinstance(prompts, Prompts) else None
    images = FolderPictures(path, tuple(sizes), content, path.name or "folder", own, strict)
    kinds = {Path(name).suffix.lower().lstrip(".").replace("jpg", "jpeg") for name in sizes}
    left_out = [name for name in found if name not in sizes]
    if left_out:
        files = counted(len(left_out), "file")
        speaker()(f"      note: {files} of {path} cannot be read, left out: {some(left_out)}")
    told = {
        "name": str(path),
        "from": "folder",
        "sha256": content,
        "n": len(sizes),
        "left_out": len(left_out),
        "format": ", ".join(sorted(kinds)),
        "sizes": [list(size) for size, _ in Counter(sizes.values()).most_common()],
    }
    return Source(images, told)


def of_data(options: Options, captions: Captions) -> Source:
    """Return the pictures of some captions of a data set."""
    assert options.data is not None
    side = options.data.config.resolution
    told = {"name": f"data={options.data.config.name}", "from": "data", "sha256": captions.key}
    return Source(Pictures(captions), {**told, "sizes": [[side, side]]})


def sized(options: Options, source: Source, like: Source) -> Source:
    """Bring pictures to one size: the asked one, else that of `like`, else none.

    Raises:
        ConfigError: they have another size, and nobody says how they are prepared.
    """
    if isinstance(source.images, Path):
        return source
    size, own = options.resolution, like.told["sizes"]
    if size is None and len(own) == 1 and own[0][0] == own[0][1]:
        size = own[0][0]
    if size is None:
        if options.features == ["scenes"] or options.door.first_stage:
            some_sizes = ", ".join(f"{w}x{h}" for w, h in own[:4])
            raise ConfigError(
                f"{like.told['name']} holds pictures that are no squares of one size "
                f"({some_sizes}); give --resolution and --crop"
            )
        return source
    if options.features == ["scenes"] and size > SCENES and size % SCENES:
        raise ConfigError(
            f"the embedded classifier reads pictures of {SCENES} px or multiples of it, not of "
            f"{size}; give --resolution and --crop"
        )
    others = [s for s in source.told["sizes"] if s != [size, size]]
    if not others:
        return source
    if options.crop == "none":
        raise ConfigError(
            f"{source.told['name']} holds pictures of {others[0][0]}x{others[0][1]} pixels, and "
            f"{size}x{size} are scored; --crop says how others are cut ({', '.join(CUTS)})"
        )
    told = {"resolution": size, "crop": options.crop, "filter": options.filter}
    images = Prepared(source.images, size, options.crop, options.filter)  # type: ignore[arg-type]
    return Source(images, {**source.told, "prepared": told})


def reconstructed(options: Options) -> tuple[Source, Source]:
    """Return what a first stage makes of pictures, and the pictures.

    Raises:
        ConfigError: no pictures, or no such first stage.
    """
    args = options.args
    if args.images is not None:
        real = folder(options, args.images, "--images", None, options.num, strict=True)
    elif args.coco is not None:
        real = folder(
            options, coco_path(options, "pictures"), "--coco", None, options.num, strict=False
        )
    elif options.data is not None:
        real = of_data(options, options.data.captions("val", options.data.prompts))
    else:
        raise ConfigError("name the pictures: --images DIR, --coco ROOT or data=NAME")
    real = sized(options, real, real)
    stage = first_stage(options)
    own = {k: v for k, v in real.told.items() if k not in ("sha256", "name", "from")}
    told = {
        "name": str(args.ckpt),
        "from": "reconstructions",
        "first_stage": stage.content,
        "originals": real.told,
        **own,
        "format": "png",
    }
    return Source(Reconstruct(real.images, stage), told), real


def first_stage(options: Options) -> FileStage:
    """Return the tokenizer or autoencoder that is named, or that a generator stands on.

    Raises:
        ConfigError: there is none.
    """
    args = options.args
    kinds = sorted({cls.FIRST_STAGE.paper for cls in PAPERS.values()})
    if args.paper is not None:
        paper = pick("--paper", args.paper, kinds)
        hints = dict(parse_overrides(PAPERS[paper], options.words))
        prepare_torch()
        return Foreign(args.ckpt, paper, hints, PAPERS[paper].reader())
    prepare_torch()
    from lightning_modules.common.checkpoint import load_weights

    path = checkpoint_file(args.ckpt)
    try:
        found = str(load_weights(path)[1].get("paper"))
        if found not in kinds:
            _, path = checkpoint_files(path, args.tokenizer)
            found = str(load_weights(path)[1].get("paper"))
    except (FileNotFoundError, ValueError) as error:
        other = " or ".join(f"--paper {kind}" for kind in kinds)
        raise ConfigError(f"{first_line(error)}; an official file needs {other}") from error
    return Given(path, found)


def ids(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the ids of prompts, or the keys of a data set's captions."""
    return [str(row.get("id", row.get("key"))) for row in rows]
