"""The front door of every evaluation; the commands in eval/ say which scores they are about.

The work is that of a run's stages: pictures that are drawn, or are there -> Features -> Score.
`--out` holds it; features of real pictures are shared by all evaluations through `--cache`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.files import write_json
from eval.choices import CHOICES, OF_MOMENTS, WIDTHS, Wanted, wanted
from eval.spaces import SPACES
from experiments.checkpoint import find_device
from experiments.cli import first_line, prepare_torch, show_outcome, speaker
from experiments.evaluation.options import Door, Options, make_parser
from experiments.evaluation.results import guard, remember, result
from experiments.evaluation.sources import (
    Source,
    asked,
    check_named,
    ids,
    reconstructed,
    reference,
    scored,
    sized,
)
from experiments.pipeline.data import Captions
from experiments.pipeline.features import Features
from experiments.pipeline.given import GivenMoments
from experiments.pipeline.prompts import Prompts, remarks, some
from experiments.pipeline.ranks import end_with_parent
from experiments.pipeline.reconstruct import Reconstruct
from experiments.pipeline.sample import Sample
from experiments.pipeline.score import Score, Scored
from experiments.pipeline.stage import Log, Machine, Stage, order
from experiments.pipeline.store import Store
from experiments.settings import ConfigError, UserError

BOOTSTRAP = 1000
STAGES, IMAGES = "stages", "images"  # folders of --out


def evaluate(door: Door, argv: Sequence[str]) -> int:
    """Do what the command line asks for.

    Raises:
        ConfigError: a wrong word, or something that is missing; no picture was made.
        UserError: what stopped the work; finished pictures are kept.
    """
    parser = make_parser(door)
    args, words = parser.split(argv)
    if args.help:
        print(parser.format_help())
        return 0
    options, say = Options(door, args, words), speaker()
    if options.protocol is not None:
        for line in options.protocol.told():
            say(line)
    check_named(options)
    choices = [CHOICES[score] for score in options.scores]
    prompts = asked(options)
    captioned = prompts is not None and getattr(prompts, "captioned", True)
    if any(choice.prompts for choice in choices) and not captioned:
        raise ConfigError("a score of pictures and prompts needs --prompts, --coco or data=NAME")
    real = None
    if any(choice.reference for choice in choices) and not door.first_stage:
        real = reference(options, prompts)
    try:
        measured = wanted(options.scores, options.features, options.weights, args.clip)
    except ValueError as error:
        raise ConfigError(first_line(error)) from error
    if real is not None and isinstance(real.images, Path):
        check_statistics(real.images, measured)
    if door.first_stage:
        made, real = reconstructed(options)
    else:
        made = scored(options, prompts)
        real = None if real is None else sized(options, real, made)
        made = sized(options, made, made)
    score = scoring(options, made, real, measured)
    work(options, prompts, made, real, measured, score, shlex.join([*door.command.split(), *argv]))
    return 0


def check_statistics(path: Path, measured: Sequence[Wanted]) -> None:
    """Refuse a file of mean and covariance for what needs more, or other features.

    Raises:
        ConfigError: it holds no statistics, or not those that a score needs.
    """
    from eval.statistics import read_reference

    for one in [one for one in measured if one.reference]:
        if one.score not in OF_MOMENTS:
            raise ConfigError(
                f"{one.score} compares pictures, and {path} holds mean and covariance alone; name "
                "a folder, or leave the score out"
            )
        try:
            found = read_reference(path, one.space).moments
        except ValueError as error:
            raise ConfigError(f"--reference: {first_line(error)}") from error
        space = SPACES[one.space]
        name = space.rows if one.score == "fid" else space.spatial
        if name not in found:
            raise ConfigError(f"{path} holds no statistics for {one.score} (mu_s and sigma_s)")
        wide, right = len(found[name].mean), WIDTHS.get(one.space)
        if one.score == "fid" and right not in (None, wide):
            raise ConfigError(
                f"{path} holds statistics of {wide} features, and {one.space} has {right}"
            )


def scoring(
    options: Options, made: Source, real: Source | None, measured: Sequence[Wanted]
) -> Score:
    """Return the stage of all scores."""
    prefix = "reconstruction" if options.door.first_stage else "eval"
    sets = []
    for one in measured:
        against: Features | GivenMoments | None = None
        if one.reference and real is not None:
            if isinstance(real.images, Path):
                against = GivenMoments(real.images, one.space)
            else:
                against = Features(real.images, one.extractor)
        sets.append(Scored(one.scorer, prefix, Features(made.images, one.extractor), against))
    if options.door.first_stage and real is not None:
        rows = Features(real.images, pair_rows(options), made.images.first_stage)
        sets.append(Scored("reconstruction", prefix, rows))
    return Score(tuple(sets), BOOTSTRAP, 0)


def pair_rows(options: Options) -> Any:
    """Return what compares originals and reconstructions pair by pair.

    Raises:
        ConfigError: the weights of LPIPS are not there.
    """
    from eval.downloads import find_lpips
    from eval.extractors import ReconstructionRows
    from experiments.papers.base import LPIPS_SCENES

    given = options.weights.get("lpips")
    if given is None and options.features == ["scenes"]:
        return ReconstructionRows(lpips=LPIPS_SCENES)
    try:
        return ReconstructionRows(lpips=find_lpips(given))
    except ValueError as error:
        raise ConfigError(first_line(error)) from error


def work(
    options: Options,
    prompts: Prompts | Captions | None,
    made: Source,
    real: Source | None,
    measured: Sequence[Wanted],
    score: Score,
    command: str,
) -> None:
    """Do the stages, write result.json and show the scores."""
    prepare_torch()  # a folder is read without a checkpoint, whose loading would do it
    from experiments.pipeline.runner import check_writable, in_one_line

    args, say = options.args, speaker()
    name = options.door.command.rpartition(".")[2]
    out = args.out or Path("runs") / f"{name}-{score.key[:8]}"
    stages = order([score])
    pictures = next((s for s in stages if isinstance(s, (Sample, Reconstruct))), None)
    homes: dict[Stage, Path] = {}
    if real is not None and not isinstance(real.images, Path):
        of_real = [s for s in stages if isinstance(s, Features) and s.images == real.images]
        homes = {s: args.cache / s.folder for s in order(of_real)}
    if pictures is not None:
        homes = {s: f for s, f in homes.items() if pictures not in order([s])}
        homes[pictures] = out / IMAGES
    store = Store(out / STAGES, homes=homes)
    machine = Machine(
        device=str(find_device(args.device)),
        batch_size=args.batch_size,
        classifiers=args.cache / "classifiers",
    )
    log = Log(say, machine.progress)
    with in_one_line():
        if store.leader:
            with suppress(OSError):  # it stays, since other tasks of an array may be writing there
                out.mkdir(parents=True, exist_ok=True)
            check_writable(out)
            guard(out, pictures)
            remember(out, stages, pictures, args.cache)
            Store(args.cache).remember(out, [s for s in homes if s != pictures])
        else:
            end_with_parent()
        if prompts is not None:
            store.run(order([prompts]), machine, log)
            check_list(options, prompts, store, out, log)
        store.run(stages, machine, log, [score, *([] if pictures is None else [pictures])])
        if not store.leader:
            return
        scores = named(options, score.scores(store.folders))
        told = (scores, made, real, measured, score, pictures, prompts, command)
        content = result(options, store, *told)
        write_json(out / "result.json", content)
    files = {"result": out / "result.json"}
    show_outcome(scores, files if pictures is None else {**files, "pictures": out / IMAGES})


def named(options: Options, scores: dict[str, Any]) -> dict[str, Any]:
    """Call the Frechet distances of reconstructions to their originals rFID, rFD."""
    if not options.door.first_stage:
        return scores
    parts = ((name.partition("/"), score) for name, score in scores.items())
    return {
        f"{prefix}/r{name}" if name.startswith(("fid", "fd_")) else f"{prefix}/{name}": score
        for (prefix, _, name), score in parts
    }


def check_list(
    options: Options, prompts: Prompts | Captions, store: Store, out: Path, log: Log
) -> None:
    """Write the list beside the result, and say what of it may surprise.

    Raises:
        UserError: fewer prompts than asked, or ids that occur twice.
    """
    rows = prompts.rows(store.folders)
    if options.num is not None and len(rows) != options.num:
        raise UserError(f"the data hold {len(rows)} prompts, not the {options.num} of --num")
    names = ids(rows)
    if len({*names}) < len(names):
        twice = [n for i, n in enumerate(names) if n in names[:i]]
        raise UserError(f"{len(twice)} ids occur more than once: {some(twice)}")
    if store.leader:
        write_json(out / "prompts.json", rows)
        for line in remarks(rows):
            log.note(line)
