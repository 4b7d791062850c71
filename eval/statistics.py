"""Reference statistics in files: mean and covariance, as clean-fid and ADM publish them.

A .npz of "mu" [d] and "sigma" [d, d]; ADM's also hold "mu_s" and "sigma_s" of spatial features.
Only these arrays are read of a file, and nothing of it is unpickled.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch

from data.files import file_hash
from eval.frechet import Moments
from eval.rows import Measured
from eval.spaces import SPACES

PAIRS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def read_reference(path: Path, space: str) -> Measured:
    """Read the moments of a reference whose pictures are not here.

    Args:
        path: the .npz.
        space: a key of SPACES: which features the file is believed to hold. It does not say so
            itself; its name and hash stand beside the scores.

    Raises:
        ValueError: no such file, or none of moments.
    """
    names = {"features": SPACES[space].rows, "spatial": SPACES[space].spatial}
    moments = {}
    try:
        with zipfile.ZipFile(path) as archive:
            there = set(archive.namelist())
            for kind, (mean, covariance) in PAIRS.items():
                if {f"{mean}.npy", f"{covariance}.npy"} <= there:
                    arrays = (_array(archive, name) for name in (mean, covariance))
                    moments[names[kind]] = _moments(*arrays)
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"{path} holds no statistics that can be read: {error}") from error
    if names["features"] not in moments:
        raise ValueError(f"{path} holds no statistics: it has no arrays mu and sigma")
    model = f"statistics {path.name}, sha256 {file_hash(path)[:12]}, taken for {SPACES[space].what}"
    return Measured({}, models=dict.fromkeys(moments, model), moments=moments)


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _moments(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    width = mean.shape[-1]
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise ValueError(f"mu {list(mean.shape)} and sigma {list(covariance.shape)} do not fit")
    m, c = (torch.from_numpy(np.asarray(x, np.float64)) for x in (mean, covariance))
    return Moments(m, c)
