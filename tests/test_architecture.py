"""Who may import whom: a package only what stands below it, so that each can be read without those above."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "mitune"
# From the ground up; what stands in one tuple is one floor, whose rooms do not know of each other but for their doors.
FLOORS = (
    ("errors",),
    ("information", "files", "resolver", "seeds"),
    ("run",),
    ("config",),
    ("evaluation.metrics.base",),
    ("worlds.base",),
    ("evaluation.metrics",),
    ("denoiser",),
    ("prompts",),
    ("pool",),
    ("finetuning",),
    ("evaluation",),
    ("report",),
    ("methods",),
    ("tuning", "scoring", "estimators"),
    ("bench",),
    ("worlds",),
    ("cli", "worlds.shapes.cli"),
)
MODULES = sorted(".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in SOURCE.rglob("*.py"))


def imports_of(module: str, *, only_at_start: bool = False) -> Iterator[str]:
    """The modules that one imports, absolute, without those that a type checker alone imports."""
    tree = ast.parse(SOURCE.joinpath(*module.split(".")).with_suffix(".py").read_text("utf-8"))
    nodes = tree.body if only_at_start else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor_of(module: str) -> int:
    """The floor of a module of ours: that of the longest name that it begins with."""
    rooms = [(len(name), floor) for floor, names in enumerate(FLOORS) for name in names if is_within(module, name)]
    return max(rooms)[1]


def is_within(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__"])
def test_nothing_imports_upward(module):
    room = module.removesuffix(".__init__")
    upward = [
        name
        for name in imports_of(module)
        if name.startswith("mitune.") and floor_of(name.removeprefix("mitune.")) > floor_of(room)
    ]
    assert upward == []


def test_information_is_mathematics_alone():
    allowed = {"torch", "mitune.errors", "mitune.information"}
    beside = {"__future__", "collections", "dataclasses", "math", "types", "typing", "scipy"}
    for module in MODULES:
        if module.startswith("information."):
            for name in imports_of(module):
                assert name.split(".")[0] in beside or any(is_within(name, each) for each in allowed), (module, name)


def test_only_worlds_know_shapes():
    for module in MODULES:
        if not module.startswith("worlds."):
            assert [name for name in imports_of(module) if name.startswith("mitune.worlds.shapes")] == [], module


def test_modules_and_functions_are_short():
    for module in MODULES:
        text = SOURCE.joinpath(*module.split(".")).with_suffix(".py").read_text("utf-8")
        assert len(text.splitlines()) < 300, module
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                # What it does: the options of a command are declarations, and as long as the command has many.
                assert node.end_lineno - node.body[0].lineno < 60, (module, node.name)
