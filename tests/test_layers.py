"""Imports go one way: cli → tools → train, evaluate → stages → rollout → models, data → stats."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import posttrain

PACKAGE = Path(posttrain.__file__).parent
STOREYS = [
    {"stats", "errors", "places", "disk", "allocator", "launch"},
    {"data", "models"},
    {"rollout", "generation", "library_generation", "sampling", "rewards", "verify", "optim", "stochastic_rounding"},
    {"stages"},
    {
        "train",
        "finite",
        "runfiles",
        "evaluate",
        "session",
        "fits",
        "supply",
        "runtime",
        "together",
        "precision",
        "reference",
        "answers",
        "calibration",
        "changes",
        "companions",
        "comparison",
        "examples",
        "records",
        "sides",
        "slices",
        "frozen",
        "judge",
        "rollout_server",
        "reward_model",
        "layout",
        "alarm",
        "allocator",
        "checkpoint",
        "claim",
        "environment",
        "resume",
        "rundir",
        "saving",
        "joining",
        "seeds",
        "shards",
        "startup",
        "report",
        "meter",
        "planning",
        "signals",
        "summary",
        "zero",
        "zero3",
    },
    {"config"},
    {"tools", "sweep"},
    {"cli"},
]
"""From the ground up; a module imports from its own storey and those below. A new module must be given its place here."""

STOREY = {room: height for height, rooms in enumerate(STOREYS) for room in rooms}
READS_CONFIG = {"cli", "tools", "sweep", "config", "__init__", "__main__"}


def room_of(module: str) -> str:
    """posttrain.data.formats → data; posttrain itself → __init__."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def run_time_imports(tree: ast.AST) -> Iterator[str]:
    """Modules imported anywhere but under `if TYPE_CHECKING`, also inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from run_time_imports(ast.Module(node.orelse, []))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "posttrain":
            yield from (f"posttrain.{alias.name}" for alias in node.names if not alias.name.startswith("__"))
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        else:
            yield from run_time_imports(node)


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of_file(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_down(file):
    room = room_of_file(file)
    found = list(run_time_imports(ast.parse(file.read_text(encoding="utf-8"))))
    if room in ("__init__", "__main__"):
        return  # the front door: lazily, whatever it needs
    assert room in STOREY, f"{room} has no storey in this test"
    ours = [name for name in found if name.split(".")[0] == "posttrain"]
    above = [name for name in ours if room_of(name) != "__init__" and STOREY[room_of(name)] > STOREY[room]]
    assert not above, f"{room} imports from above: {above}"
    if room not in READS_CONFIG:
        assert not [name for name in ours if room_of(name) == "config"], f"{room} imports config at run time"
    if room == "stats":
        assert all(room_of(name) == "stats" for name in ours), f"stats imports {ours}"
        outside = {name.split(".")[0] for name in found} - {"posttrain", "numpy", "scipy"}
        assert not outside & {"torch", "transformers", "accelerate", "datasets", "peft"}, outside
    if room == "stages":
        assert not [name for name in found if name.split(".")[0] == "accelerate"], "stages never import accelerate"


def test_the_reader_of_imports_sees_what_it_should():
    source = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import posttrain.config\nelse:\n    import a\n"
        "def f():\n    from posttrain import stats\n    from posttrain.cli import main\n"
    )
    assert set(run_time_imports(ast.parse(source))) == {"typing", "a", "posttrain.stats", "posttrain.cli"}
