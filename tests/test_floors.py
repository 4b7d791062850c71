"""The floors of the house: imports go down only, and nothing loads a file by running it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("experiments", "eval", "data", "lightning_modules", "tests", "sweeps")
MODULES = ROOT / "lightning_modules"
PAPERS = sorted(p.name for p in MODULES.iterdir() if (p / "config.py").exists())
PAPERS.remove("common")
NAMES = {path.stem for path in (ROOT / "experiments" / "configs").iterdir() if path.is_dir()}
NAMES.remove("autoencoder")  # which is also the name of a kind of first stage

SHARED = ("base", "first_stage", "sections", "registry")  # of experiments/papers, by all papers

# what the files of a room may import besides their own room; a prefix stands for all below it
COMMON, DATA, FILES = "lightning_modules.common", "data", "data.files"
SAMPLERS = "lightning_modules.samplers"
ALLOWED = {
    "data": [],
    "lightning_modules/common": [FILES],  # atomic writing and hashes serve every room
    "lightning_modules/samplers": [COMMON],
    "lightning_modules": [FILES, COMMON, *(f"lightning_modules.{paper}" for paper in PAPERS)],
    **{f"lightning_modules/{paper}": [FILES, COMMON, SAMPLERS] for paper in PAPERS},
    "eval": [DATA, "lightning_modules"],
    "experiments": [DATA, "eval", "lightning_modules"],
}
TOP = [DATA, "eval", "lightning_modules", "experiments"]  # what a command may import
if "improved_vqd" in PAPERS:  # it is what a second paper changes in the first
    ALLOWED["lightning_modules/improved_vqd"].append("lightning_modules.vq_diffusion")


def files() -> list[Path]:
    return [
        path
        for room in ("experiments", "eval", "data", "lightning_modules")
        for path in sorted((ROOT / room).rglob("*.py"))
    ]


def imports(path: Path, tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports, inside functions too; `from a import b` gives a.b."""
    package = list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files()
    }


def needs() -> dict[str, set[str]]:
    """Module -> those of ours that it imports."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        found = imports(path, ast.parse(path.read_text()))
        own = {n if n in known else n.rpartition(".")[0] for n in found}
        graph[name] = own & known.keys() - {name}
    return graph


def private_names(source: str) -> list[str]:
    """Names with an underscore that a module takes from another, or reads in another's object."""
    tree, found = ast.parse(source), []
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {
        n.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute)
        and ast.unparse(n.value) == "self"
        and isinstance(n.ctx, ast.Store)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            found += [a.name for a in node.names if a.name.startswith("_")]
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
            of = ast.unparse(node.value)
            if of not in ("self", "cls", "super()", "os", "torch") and node.attr not in own:
                found.append(f"{of}.{node.attr}")
    return found


def papers_named(source: str) -> list[str]:
    """Names of papers that a module knows: as a text of its own, or as a package it imports."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in NAMES:
            found.append(node.value)
        if isinstance(node, ast.ImportFrom | ast.Import):
            text = ast.unparse(node)
            named = re.findall(r"lightning_modules(?:\.| import )(\w+)", text)
            found += [name for name in named if name in PAPERS]
            named = re.findall(r"experiments\.papers(?:\.| import )(\w+)", text)
            found += [name for name in named if name not in SHARED]
    return found


def kinds_asked(source: str) -> list[str]:
    """Classes of settings of papers that a module asks an object about."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            asked = re.findall(r"\w+", ast.unparse(node.args[1]))
            found += [name for name in asked if re.search(r"(Run|RunSettings|Config)$", name)]
    return found


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return "/".join(parts[:2]) if parts[0] == "lightning_modules" and len(parts) > 2 else parts[0]


def stands_under(name: str, allowed: str) -> bool:
    return name == allowed or name.startswith(f"{allowed}.")


def is_command(source: str) -> bool:
    """A command stands on the top floor, in whichever room it lies."""
    return 'if __name__ == "__main__":' in source and "from experiments.cli import" in source


def climbs(path: Path, source: str) -> list[str]:
    """The imports of a file that its floor does not allow."""
    room = room_of(path)
    allowed = [*(TOP if is_command(source) else ALLOWED[room]), room.replace("/", ".")]
    ours = [n for n in imports(path, ast.parse(source)) if n.partition(".")[0] in OURS]
    return [name for name in ours if not any(stands_under(name, a) for a in allowed)]


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    assert climbs(path, path.read_text()) == []


def test_nobody_imports_a_command() -> None:
    commands = {name for name, path in modules().items() if is_command(path.read_text())}
    assert {"experiments.run", "experiments.sample"} <= commands
    taken = {name: sorted(needed & commands) for name, needed in needs().items()}
    assert {name: found for name, found in taken.items() if found} == {}


def test_every_paper_is_known() -> None:
    folders = {p.name for p in MODULES.iterdir() if (p / "__init__.py").exists()}
    assert folders == {*PAPERS, "common", "samplers"} and {"paella", "vqgan"} <= folders & NAMES
    assert len(files()) > 40


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("data/x.py", "from eval.scenes import a"),
        ("data/x.py", "def f():\n    import lightning_modules.common.text"),
        ("eval/x.py", "from experiments import stages"),
        ("lightning_modules/common/x.py", "from lightning_modules.paella.config import a"),
        ("lightning_modules/common/x.py", "from data.scenes import draw"),
        ("lightning_modules/common/x.py", "from ..paella import config"),
        ("lightning_modules/paella/x.py", "from lightning_modules.vqgan.module import V"),
        ("lightning_modules/samplers/x.py", "from lightning_modules.muse import process"),
        ("lightning_modules/common/x.py", "from lightning_modules.samplers import loop"),
        ("lightning_modules/paella/x.py", "from lightning_modules import registry"),
        ("lightning_modules/paella/x.py", "from ..vqgan import module"),
        ("lightning_modules/vqgan/x.py", "import data.webdata"),
        ("experiments/x.py", "from tests.conftest import golden"),
        ("lightning_modules/x.py", "import importlib\nimportlib.import_module('experiments.run')"),
    ],
)
def test_a_climb_is_seen(path: str, source: str) -> None:
    assert len(climbs(ROOT / path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("data/x.py", "import datasets\nfrom data import shards"),
        ("lightning_modules/paella/x.py", "from lightning_modules.common import text"),
        ("lightning_modules/paella/x.py", "from . import process\nfrom ..common import text"),
        ("lightning_modules/x.py", "from lightning_modules.vqgan.module import V"),
        ("experiments/x.py", "from lightning_modules.registry import a\nfrom eval import b"),
    ],
)
def test_a_way_down_is_open(path: str, source: str) -> None:
    assert climbs(ROOT / path, source) == []


def test_imports_go_in_no_circle() -> None:
    graph = needs()
    assert {"data.files"} < graph["experiments.pipeline.train"]
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_private_names_stay_in_their_module(path: Path) -> None:
    assert private_names(path.read_text()) == []


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in files()
        if (p.parent.name, p.name) != ("lightning_modules", "registry.py")
        and p.parent.name not in ("papers", *PAPERS)
    ],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_only_its_own_files_name_a_paper(path: Path) -> None:
    source = path.read_text()
    assert papers_named(source) == []
    assert kinds_asked(source) == []


def test_what_names_a_paper_or_something_private_is_seen() -> None:
    for source in (
        "paper == 'muse'",
        "from lightning_modules.paella.config import P",
        "from lightning_modules import muse",
        "import lightning_modules.ldmae.network",
        "from experiments.papers.muse import MuseRun",
        "from experiments.papers import muse",
    ):
        assert papers_named(source)
    for source in ("from data.tokens import _read", "module._attached", "self.a._b"):
        assert private_names(source)
    assert kinds_asked("isinstance(run, a.MuseRun)") and kinds_asked(
        "issubclass(c, (int, XConfig))"
    )


def test_what_names_nothing_stays_allowed() -> None:
    assert not papers_named("help = 'such as muse'\nfrom experiments.papers.registry import PAPERS")
    assert not private_names("class A:\n    def f(self):\n        self._x = 1\na._x\nos._exit(1)")
    assert not kinds_asked("isinstance(stage, Train)")


def unsafe(tree: ast.AST) -> list[str]:
    """Calls that would run what a file or a text says."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "weights_only":
            if not (isinstance(node.value, ast.Constant) and node.value.value is True):
                found.append(f"weights_only={ast.unparse(node.value)}")
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("eval", "exec", "builtins.eval", "builtins.exec", "__import__"):
                found.append(name)
            if name.partition(".")[0] in ("pickle", "dill", "joblib", "cloudpickle"):
                found.append(name)
            if name == "torch.load" and "weights_only" not in {k.arg for k in node.keywords}:
                found.append("torch.load without weights_only")
            if name.endswith("np.load") or name == "yaml.load":
                found.append(name)
        if isinstance(node, ast.ImportFrom) and node.module == "pickle":
            found += [a.name for a in node.names if not a.name.endswith("Error")]
    return found


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_loaded_by_running_it(path: Path) -> None:
    assert unsafe(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(p, weights_only=False)",
        "torch.load(p)",
        "trainer.fit(m, weights_only=None)",
        "eval('1')",
        "exec(text)",
        "pickle.load(f)",
        "pickle.Unpickler(f).load()",
        "from pickle import loads",
        "yaml.load(f)",
    ],
)
def test_running_what_a_file_says_is_seen(source: str) -> None:
    assert unsafe(ast.parse(source))


def test_safe_words_stay_allowed() -> None:
    for source in (
        "from pickle import UnpicklingError",
        "module.eval()\nre.compile('x')",
        "torch.load(p, weights_only=True)",
    ):
        assert unsafe(ast.parse(source)) == []


def test_packages_hold_only_their_docstring() -> None:
    for path in files():
        if path.name == "__init__.py" and path.parent != MODULES:  # which has the lazy names
            (only,) = ast.parse(path.read_text()).body
            assert isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant), path


def test_the_papers_are_imported_by_name() -> None:
    import lightning_modules

    for name in lightning_modules.HOMES:
        assert getattr(lightning_modules, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = lightning_modules.Nothing
    code = "import sys, lightning_modules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_tests_are_no_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []
