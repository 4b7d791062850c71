"""A run from its settings to its folder."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.papers.base import RunSettings
from experiments.pipeline.plan import Plan, chosen, plan
from experiments.pipeline.publish import Outcome, Titles, publish
from experiments.pipeline.ranks import end_with_parent
from experiments.pipeline.stage import Log
from experiments.pipeline.store import Store
from experiments.settings import UserError, resolved


def execute(
    titles: Titles,
    run: RunSettings,
    out: Path,
    say: Callable[[str], None],
    until: str | None = None,
) -> Outcome:
    """Do every stage of a run whose result does not stand yet, and publish the results.

    Args:
        titles: paper, scale and what was typed.
        run: the checked settings.
        out: the run folder.
        say: gets one line per event.
        until: name of the last stage that is done; None does all and publishes.

    Returns:
        Scores and files; nothing on other ranks than the first, or with `until`.

    Raises:
        UserError: something the user can put right, in one sentence.
    """
    store = Store(run.cache)
    try:
        if store.leader:
            return _execute(titles, run, out, say, until, store)
        end_with_parent()
        try:
            return _execute(titles, run, out, say, until, store)
        except Exception:
            time.sleep(3)  # where the leader was interrupted, this process ends here, quietly
            raise
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise UserError(f"{error.strerror or error}{where}") from error
    except ValueError as error:
        # a worker process passes its error on with a traceback in front
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


def _execute(
    titles: Titles,
    run: RunSettings,
    out: Path,
    say: Callable[[str], None],
    until: str | None,
    store: Store,
) -> Outcome:
    planned = plan(titles.paper, run)
    stages = chosen(planned.stages, until)
    loggers = {} if until else wandb_loggers(planned, run, titles, out)
    machine = run.machine(loggers=loggers)
    store.run(stages, machine, Log(say, machine.progress))
    if not store.leader or until:
        return Outcome()
    outcome = publish(planned, run, store, out, titles)
    if loggers:
        logger = next(iter(loggers.values()))
        logger.log_metrics({name: score["value"] for name, score in outcome.scores.items()})
        logger.log_image("samples/grid", [str(outcome.files["samples.png"])])
        logger.experiment.finish()
    return outcome


def wandb_loggers(planned: Plan, run: RunSettings, titles: Titles, out: Path) -> dict[str, Any]:
    """Return the W&B logger of every training that is the run's own; none with logger=csv.

    They share one W&B run, offline where there is no key. The first training logs under its own
    names, further ones under theirs.
    """
    if run.logger != "wandb":
        return {}
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    os.environ.setdefault("WANDB_SILENT", "true")
    mode: Any = os.environ.get("WANDB_MODE")  # the user's own word goes first
    if mode is None and not wandb.login(prompt=False):
        mode = "offline"
    out.mkdir(parents=True, exist_ok=True)
    first = WandbLogger(
        project=os.environ.get("WANDB_PROJECT", "tokengrid"),
        name=None if "WANDB_SWEEP_ID" in os.environ else out.name,
        group=titles.paper,
        job_type="train",
        tags=[titles.scale, run.data.name],
        save_dir=str(out),
        config=resolved(run),
        mode=mode,  # WandbLogger(offline=True) sets a mode that wandb no longer knows
    )
    loggers: dict[str, Any] = {planned.trainings[0].what: first}
    for stage in planned.trainings[1:]:
        loggers[stage.what] = WandbLogger(experiment=first.experiment, prefix=stage.what)
    return loggers
