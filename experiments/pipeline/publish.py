"""What a person wants of a run, in one folder: scores, page, pictures, settings and checkpoint."""

import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.files import link, write_json, write_text
from eval.scorers import METRICS
from experiments.papers.base import RunSettings
from experiments.pipeline.edit import Edits
from experiments.pipeline.fit import curves
from experiments.pipeline.generator import ABOUT, CHECKPOINT
from experiments.pipeline.plan import SPLITS, Plan
from experiments.pipeline.sample import Sample
from experiments.pipeline.stage import Folders
from experiments.pipeline.store import Store
from experiments.pipeline.train import Train
from experiments.report.page import Example, RunPage, StageRow, Trace, write_page
from experiments.report.pictures import grid, load_png, save_png
from experiments.settings import resolved, to_yaml


@dataclass(frozen=True)
class Titles:
    """What a run is called."""

    paper: str
    scale: str
    command: str


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: scores by name, and the paths of its files."""

    scores: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)


def publish(plan: Plan, run: RunSettings, store: Store, out: Path, titles: Titles) -> Outcome:
    """Fill the run folder from the results of the stages; nothing large is copied.

    Args:
        plan: the stages, all done.
        run: the settings.
        store: where the results lie.
        out: the run folder.
        titles: for the page.
    """
    inputs, scores = store.folders, plan.score.scores(store.folders)
    names = ("metrics.json", "samples.png", "report.html")
    files = {name: out / name for name in names}
    write_json(files["metrics.json"], scores)
    _overview(plan, run, inputs, files["samples.png"], titles.command)
    write_page(files["report.html"], _page(plan, run, store, titles, scores))
    files["checkpoint"] = _checkpoint(plan, run, inputs, out)
    write_text(out / "config.yaml", to_yaml(run))
    stages = [{"name": s.name, "key": s.key, "folder": s.folder} for s in plan.stages]
    write_json(out / "stages.json", {"cache": str(store.root), "stages": stages})
    store.remember(out, plan.stages)
    return Outcome(scores, files)


def _checkpoint(plan: Plan, run: RunSettings, inputs: Folders, out: Path) -> Path:
    """Link the trained files, and say beside them how this run samples."""
    if plan.drawing is None:
        name = run.FIRST_STAGE.section
        link(plan.first_stage.file(inputs), out / f"{name}.safetensors")
        return out / f"{name}.safetensors"
    folder = inputs[plan.drawing.generator]
    about = json.loads((folder / ABOUT).read_text())
    named = [about["first_stage"], *about.get("parts", {}).values()]
    for file in (CHECKPOINT, *(n["file"] for n in [*named, *about.get("further", {}).values()])):
        link(folder / file, out / file)
    write_json(out / ABOUT, {**about, "sampling": resolved(run)["sampling"], "data": run.data.name})
    return out / CHECKPOINT


def _final(plan: Plan) -> Iterator[tuple[str, Sample]]:
    """The pictures of every split that a person is shown, with the prefix of their scores."""
    if plan.drawing is not None:
        for end in (split.end for split in SPLITS.values()):
            prefix = f"{plan.drawing.shown}{end}"
            if prefix in plan.samples:
                yield prefix, plan.samples[prefix]


def _overview(plan: Plan, run: RunSettings, inputs: Folders, path: Path, command: str) -> None:
    """Lay the first pictures out with their prompts, or reconstructions beside originals."""
    text = {"command": command}
    finals = list(_final(plan))
    if not finals:
        shown = plan.reconstructions.measured(inputs)[0].shown
        save_png(path, grid(torch.from_numpy(shown).flatten(0, 1), columns=8), text)
        return
    _, sample = finals[0]
    rows = sample.rows(inputs)[: run.eval.grid]
    images = torch.stack([load_png(inputs[sample] / row["file"])[0] for row in rows])
    captions = [row["prompt"] for row in rows]
    save_png(path, grid(images, columns=8, captions=captions), text)


def _page(
    plan: Plan, run: RunSettings, store: Store, titles: Titles, scores: dict[str, Any]
) -> RunPage:
    """Collect what the page shows."""
    inputs = store.folders
    done = {stage: store.done(stage) or {"what": {}, "seconds": 0.0} for stage in plan.stages}
    shown = plan.reconstructions.measured(inputs)[0].shown
    pairs = [] if shown is None else [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in shown]
    return RunPage(
        title=f"{titles.paper} on {run.data.name}, scale {titles.scale}",
        command=titles.command,
        machine=_machine(),
        scores=scores,
        metrics=METRICS,
        notes=notes(plan, run),
        examples=[*_examples(plan, run, inputs), *_edits(plan.edits, run, plan, inputs)],
        traces=_traces(plan, inputs),
        curves=_losses(plan.trainings, inputs),
        reconstructions=pairs,
        config_yaml=to_yaml(run),
        stages=[
            StageRow(
                stage.name,
                stage.key,
                marker["seconds"],
                marker["what"].get("skipped", {}),
                marker["what"].get("examples", {}),
            )
            for stage, marker in done.items()
        ],
    )


def notes(plan: Plan, run: RunSettings) -> list[str]:
    """Return what a reader must know besides the settings."""
    trained = [stage.recipe.note() for stage in plan.stages if isinstance(stage, Train)]
    return [note for note in (run.note(), *trained) if note]


def _losses(trained: list[Train], inputs: Folders) -> dict[str, list[tuple[int, float]]]:
    """The loss curves of trainings; beside another one each has its name in front."""
    return {
        name if number == 0 else f"{stage.name} {name}": points
        for number, stage in enumerate(trained)
        for name, points in curves(inputs[stage]).items()
        if name.endswith("/loss")
    }


def _examples(plan: Plan, run: RunSettings, inputs: Folders) -> list[Example]:
    """The first final pictures of every split, eval.grid in all."""
    finals = list(_final(plan))
    each = -(-run.eval.grid // max(1, len(finals)))
    examples = []
    for prefix, sample in finals:
        verdicts = plan.score.verdicts(inputs, prefix)
        for place, row in enumerate(sample.rows(inputs)[:each]):
            read: Mapping[str, Any] = verdicts.get(place, {})
            wrong = read.get("wrong")
            detail = f"wrong: {', '.join(wrong)}; read: {read['text']}" if wrong else ""
            examples.append(
                Example(
                    inputs[sample] / row["file"],
                    row["prompt"],
                    row["split"],
                    row["seed"],
                    read.get("right"),
                    detail,
                )
            )
    return examples


def _edits(edits: Edits | None, run: RunSettings, plan: Plan, inputs: Folders) -> list[Example]:
    """The first edits: the picture, what was masked, and what became of it."""
    if edits is None:
        return []
    verdicts = plan.score.verdicts(inputs, "edit")
    tasks = edits.rows(inputs)[: run.eval.grid // 2]
    return [
        Example(
            inputs[edits] / f"triple-{i:05d}.png",
            task["prompt"],
            "edit",
            None,
            verdicts[i]["right"],
            f"wrong: {', '.join(verdicts[i]['wrong'])}",
        )
        for i, task in enumerate(tasks)
    ]


def _traces(plan: Plan, inputs: Folders) -> list[Trace]:
    """What was kept of the samplings step by step."""
    found: list[Trace] = []
    for sample in plan.samples.values():
        path = inputs[sample] / "traces.json"
        if path.is_file() and not found:
            found = [
                Trace(t["prompt"], inputs[sample] / t["file"], t["changed"], t["tokens"])
                for t in json.loads(path.read_text())
            ]
    return found


def _machine() -> str:
    name = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"
