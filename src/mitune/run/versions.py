"""Do the installed packages go together? Asked at the start, as one that does not fit fails late and deep inside.

The ranges are those of the packages' own metadata; what transformers asks of PEFT stands in a table of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mitune.errors import MituneError

_OURS = "mitune"


def mismatch(needs: Mapping[str, Sequence[str]], installed: Mapping[str, str]) -> str | None:
    """A sentence about the first package whose needs are not met, with the `pip install` that mends it, or None.

    needs: what each package requires, in the form of PEP 508, mitune's first. installed: versions by package. A package
    that is missing counts for mitune's own needs alone; the others say that better themselves.
    """
    for package, lines in needs.items():
        required = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate({"extra": ""})]
        versions = {r: installed.get(canonicalize_name(r.name)) for r in required}
        unmet = [
            r
            for r, present in versions.items()
            if (package == _OURS if present is None else not r.specifier.contains(present, prereleases=True))
        ]
        if unmet:
            requirements = ", ".join(f"{r.name}{r.specifier}" for r in unmet)
            state = ", ".join(f"{r.name} {versions[r]}" if versions[r] else f"no {r.name}" for r in unmet)
            remedy = " ".join(f'"{r.name}{r.specifier}"' for r in unmet)
            return f"{package} needs {requirements}, but finds {state}; run: pip install {remedy}"
    return None


@cache
def check_versions() -> None:
    """Raises MituneError if an installed package is outside the range that mitune, or what it stands on, needs."""
    ours = _required_by(_OURS)  # nothing where mitune runs from a folder that was never installed
    direct = [Requirement(line).name for line in ours if "extra ==" not in line]
    needs = {_OURS: ours} | {name: _required_by(name) for name in direct}
    needs.setdefault("transformers", []).extend(_peft_of_transformers())
    packages = {canonicalize_name(Requirement(line).name) for lines in needs.values() for line in lines}
    if sentence := mismatch(needs, {name: version for name in packages if (version := _version(name))}):
        raise MituneError(sentence)


def _required_by(package: str) -> list[str]:
    try:
        return requires(package) or []
    except PackageNotFoundError:
        return []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _peft_of_transformers() -> list[str]:
    """What transformers asks of PEFT: its metadata leave it out, and it is checked when an adapter is made."""
    spec = find_spec("transformers")  # without importing it
    if spec is None or spec.origin is None:
        return []
    table = Path(spec.origin).with_name("dependency_versions_table.py")
    return re.findall(r'"(peft[<>=!~][^"]*)"', table.read_text(encoding="utf-8")) if table.exists() else []
