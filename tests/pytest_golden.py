"""The option `--golden DIR` of the tests, as a plugin of its own.

Options of a conftest.py are unknown while pytest looks for its settings: it takes DIR for a folder
of tests, searches above it, and would start without this project's settings or conftest.
"""

import os
import sys
from collections.abc import Iterator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the option."""
    parser.addoption(
        "--golden", metavar="DIR", help="folder TOPIC/CASE of reference cases (default: our own)"
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Iterator[None]:
    """Start again with the settings of the project around, where DIR led away from them."""
    given, folder = early_config.invocation_params, early_config.known_args_namespace.golden
    around = [place / "pyproject.toml" for place in (given.dir, *given.dir.parents)]
    settings = next((path for path in around if path.is_file()), None)
    if folder is not None and early_config.inipath is None and settings is not None:
        os.execv(sys.executable, [sys.executable, "-m", "pytest", "-c", str(settings), *given.args])
    return (yield)
