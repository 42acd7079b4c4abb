"""Versions that do not go together are one sentence at the start."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mitune.run.versions import check_versions, mismatch

NEEDS = {"mitune": ["transformers<6,>=5", "peft>=0.20", 'colorama; sys_platform == "win32"', 'pytest; extra == "dev"']}
FITS = {"transformers": "5.3.0", "peft": "0.21.2"}


@pytest.mark.parametrize(
    ("others", "installed", "needs", "finds", "remedy"),
    [
        ({}, {"peft": "0.20.0rc1+local"}, "mitune needs peft>=0.20", "peft 0.20.0rc1+local", '"peft>=0.20"'),
        ({}, {"transformers": None}, "mitune needs transformers<6,>=5", "no transformers", '"transformers<6,>=5"'),
        (
            {},
            {"transformers": "6.0", "peft": "0.3"},
            "mitune needs transformers<6,>=5, peft>=0.20",
            "transformers 6.0, peft 0.3",
            '"transformers<6,>=5" "peft>=0.20"',
        ),
        ({"transformers": ["peft>=0.22.0"]}, {}, "transformers needs peft>=0.22.0", "peft 0.21.2", '"peft>=0.22.0"'),
        (  # mitune's own ranges come first: what they ask for can be had
            {"transformers": ["peft>=0.22.0"]},
            {"transformers": "6.1"},
            "mitune needs transformers<6,>=5",
            "transformers 6.1",
            '"transformers<6,>=5"',
        ),
        (
            {"diffusers": ["The_Hub>=1"]},
            {"the-hub": "0.36"},
            "diffusers needs The_Hub>=1",
            "The_Hub 0.36",
            '"The_Hub>=1"',
        ),
    ],
)
def test_first_package_whose_needs_are_not_met(others, installed, needs, finds, remedy):
    found = {name: version for name, version in (FITS | installed).items() if version}
    assert mismatch(NEEDS | others, found) == f"{needs}, but finds {finds}; run: pip install {remedy}"


@pytest.mark.parametrize("installed", [{}, {"peft": "0.21.0.dev0+git"}, {"transformers": "5.0"}])
def test_what_fits(installed):
    """Builds of one's own count; a package that diffusers misses is for diffusers to say."""
    assert mismatch(NEEDS | {"diffusers": ["requests"]}, FITS | installed) is None


def test_what_is_installed_here_goes_together():
    check_versions()


def test_every_range_has_a_tested_lower_end():
    ours = [Requirement(line) for line in requires("mitune") or [] if "extra ==" not in line]
    assert all(any(part.operator == ">=" for part in each.specifier) for each in ours)


def test_asking_is_quick_and_imports_no_heavy_library():
    program = (
        "import sys, time; began = time.process_time();"
        "from mitune.run.versions import check_versions; check_versions();"
        "took = time.process_time() - began; heavy = {'torch', 'transformers', 'diffusers', 'peft'} & set(sys.modules);"
        "assert not heavy, heavy; assert took < 1, took"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_constraints_pin_every_dependency_within_its_range():
    root = Path(__file__).parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)  # no path, no host, no build of one machine
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    needed = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    needed += project["project"]["optional-dependencies"]["dev"]
    for each in map(Requirement, needed):
        assert each.specifier.contains(pinned[canonicalize_name(each.name)]), each
