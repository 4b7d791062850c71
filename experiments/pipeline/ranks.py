"""Which process of a launch this is; light to import."""

import os
import threading
import time

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")


def is_leader() -> bool:
    """Say whether this process is rank 0 of its launch (also true without any launcher)."""
    return not any(int(os.environ.get(name) or 0) for name in RANKS)


def launched() -> tuple[int, int] | None:
    """Return processes per node and nodes of a launch by torchrun or srun; None without.

    Every process of the launch trains: a launcher that starts eight is no setting to be overlooked.
    """
    tasks = os.environ.get("WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else None
    here = os.environ.get("LOCAL_WORLD_SIZE")
    if tasks is None and "SLURM_STEP_ID" in os.environ:
        tasks, nodes = os.environ.get("SLURM_NTASKS"), os.environ.get("SLURM_NNODES", "1")
        here = None if tasks is None else str(int(tasks) // int(nodes))
    if tasks is None or here is None or int(tasks) < 2:
        return None
    return int(here), int(tasks) // int(here)


def launch() -> str:
    """Return what the processes of one launch by torchrun or Slurm share; empty without."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    job = [os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "/".join(os.environ.get(name, "") for name in names)
    return "/".join(part for part in job if part)


def end_with_parent(pause: float = 1.0) -> None:
    """End this process soon after the one that started it.

    A rank that another started would otherwise wait for ever for one that was killed.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(pause)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
