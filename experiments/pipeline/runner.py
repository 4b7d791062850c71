"""A run from its settings to its folder."""

import errno
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data.files import atomic
from experiments.cli import first_line
from experiments.papers.base import RunSettings
from experiments.pipeline.plan import Plan, chosen, plan
from experiments.pipeline.publish import Outcome, Titles, publish
from experiments.pipeline.ranks import end_with_parent
from experiments.pipeline.stage import Log
from experiments.pipeline.store import Store
from experiments.settings import ConfigError, UserError, resolved


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
    with in_one_line():
        if store.leader:
            return _execute(titles, run, out, say, until, store)
        end_with_parent()
        try:
            return _execute(titles, run, out, say, until, store)
        except Exception:
            time.sleep(3)  # where the leader was interrupted, this process ends here, quietly
            raise


@contextmanager
def in_one_line() -> Iterator[None]:
    """Turn what stages raise for a person to put right into a UserError of one line."""
    try:
        yield
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
    machine = run.machine()
    if store.leader and not until:
        check_writable(out)
    if store.leader and run.note():
        say(f"      note: {run.note()}")
    loggers = {} if until else wandb_loggers(planned, run, titles, out, say)
    machine = replace(machine, loggers=loggers)
    read = stages[-1:] if until else planned.published
    store.run(stages, machine, Log(say, machine.progress), read)
    if not store.leader or until:
        return Outcome()
    outcome = publish(planned, run, store, out, titles)
    if loggers:
        logger = next(iter(loggers.values()))
        logger.log_metrics({name: score["value"] for name, score in outcome.scores.items()})
        logger.log_image("samples/grid", [str(outcome.files["samples.png"])])
        logger.experiment.finish()
    return outcome


def check_writable(out: Path) -> None:
    """Refuse a run folder that cannot be written to, before any work.

    Raises:
        ConfigError: it cannot.
    """
    try:
        # in the folder that is there already: a run that fails leaves none, and no process takes
        # away what another one has just made
        place = next(path for path in (out, *out.parents) if path.exists())
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(out))
        trial = place / f".{out.name}.{os.getpid()}.try"
        with atomic(trial) as temporary:
            temporary.touch()
        trial.unlink()
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror or error}") from error


def wandb_mode(say: Callable[[str], None]) -> str | None:
    """Return online or offline, or None where the user's WANDB_MODE is to decide.

    Raises:
        ConfigError: the user insists on online, and there is no key or no server.
    """
    import wandb

    wandb.setup()  # reads WANDB_SILENT before there is anything to warn of
    asked = os.environ.get("WANDB_MODE")
    if asked not in (None, "online"):
        return asked
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    problem = f"{server.hostname} cannot be reached"
    try:
        socket.create_connection((server.hostname, server.port or 443), timeout=3).close()
        problem = "there is no W&B key"
        if wandb.login(prompt=False):
            return None
    except OSError:
        pass  # no network
    except Exception as error:  # whatever wandb makes of a key that it refuses
        problem = first_line(error)
    if asked == "online":
        raise ConfigError(f"WANDB_MODE=online: {problem}; leave it out, or take logger=csv")
    say(f"      curves go to W&B offline: {problem}")
    return "offline"


def wandb_loggers(
    planned: Plan, run: RunSettings, titles: Titles, out: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return the W&B logger of every training that is the run's own; none with logger=csv.

    They share one W&B run, offline where there is no key. The first training logs under its own
    names, further ones under theirs.
    """
    if run.logger != "wandb":
        return {}
    from lightning.pytorch.loggers import WandbLogger

    os.environ.setdefault("WANDB_SILENT", "true")
    if not os.access(os.environ.get("HOME", ""), os.W_OK):
        # wandb's service writes its log to the screen where it finds no folder for it
        os.environ.setdefault("XDG_CACHE_HOME", tempfile.gettempdir())
    mode: Any = wandb_mode(say)
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
