"""The names of `import mitune`: typed as they are, and imported when they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mitune

HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "pyarrow", "scipy", "matplotlib", "numpy", "PIL"}


def test_a_type_checker_sees_what_is_there():
    """The imports for type checkers are those that happen."""
    tree = ast.parse(Path(mitune.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = {(alias.name, alias.asname): node.module for node in block.body for alias in node.names}
    assert imports == {(name, name): f"mitune.{home}" for name, home in mitune._HOME.items()}
    assert (Path(mitune.__file__).parent / "py.typed").is_file()


def test_every_name_is_there():
    assert all(getattr(mitune, name) is not None for name in mitune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mitune.nothing  # noqa: B018


@pytest.mark.parametrize("arguments", [["--help"], ["list", "--help"], ["tune", "--help"], ["list", "presets"]])
def test_help_is_quick_and_imports_no_heavy_library(arguments):
    program = f"""
import sys, time
from mitune.cli import app
app({arguments!r}, standalone_mode=False)
heavy = {HEAVY!r} & set(sys.modules)
assert not heavy, heavy
assert time.process_time() < 2, time.process_time()  # a third of a second with compiled files on a usual machine
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
