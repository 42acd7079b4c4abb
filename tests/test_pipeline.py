"""The list of doors: what `denoiser/` uses of a pipeline stands in one file, and other packages use nothing."""

import ast
from pathlib import Path

import pytest

import mitune
from mitune.denoiser import pipeline
from tests.families import CASES

SOURCE = Path(mitune.__file__).parent
DENOISER = SOURCE / "denoiser"
DOORS = {
    "pipe": (pipeline.Pipeline, pipeline.OptionalMembers),
    "scheduler": (pipeline.Scheduler, pipeline.OptionalSchedulerMembers),
}


def members(kind):
    """What a Protocol lists."""
    names = {*kind.__annotations__, *vars(kind)} - set(vars(pipeline.Protocol))
    return {name for name in names if not name.startswith("__") or name == "__call__"}


def is_named(node, name):
    """Whether an expression is `pipe`, `text_pipe`, `self.pipe`, `model.pipe`, …"""
    last = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return last == name or last.endswith(f"_{name}") or (name == "scheduler" and last == "tables")


def uses(file, name):
    """(line, attribute) wherever a file asks a thing of that name for an attribute."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and is_named(node.value, name):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            asked, attribute = node.args[:2]
            if is_named(asked, name) and isinstance(attribute, ast.Constant):
                yield node.lineno, attribute.value


@pytest.mark.parametrize("name", DOORS)
def test_what_is_used_is_listed(name):
    listed = set().union(*map(members, DOORS[name])) | {"__dict__"}
    used = {attribute for file in DENOISER.rglob("*.py") for _, attribute in uses(file, name)}
    assert used - listed == set()
    assert len(used) > 4


def test_other_packages_touch_no_pipeline():
    files = [file for file in SOURCE.rglob("*.py") if DENOISER not in file.parents]
    assert [f"{file}:{line} {attribute}" for file in files for line, attribute in uses(file, "pipe")] == []


@pytest.mark.parametrize("family", CASES)
def test_pipelines_have_what_is_listed(family):
    """Whatever `Pipeline`, `Scheduler` and `DenoiserModule` name, the real classes have."""
    pipe = CASES[family].make()
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    for kind, thing in (
        (pipeline.Pipeline, pipe),
        (pipeline.Scheduler, pipe.scheduler),
        (pipeline.DenoiserModule, denoiser),
    ):
        assert [name for name in members(kind) if not hasattr(thing, name)] == []
