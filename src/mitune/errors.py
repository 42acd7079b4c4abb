"""Errors that the user can act on: one sentence that says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import sysconfig
import traceback
from collections.abc import Collection, Iterable
from pathlib import Path

_MITUNE = Path(__file__).resolve().parent
_STANDARD = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")]


class MituneError(ValueError):
    """Bad input or settings. The command line prints the sentence and exits with status 2."""


class GuidanceError(MituneError):
    """The pipeline ran without an unconditional pass, so there is nothing to hold the prompt against."""


class ModelError(MituneError):
    """The model does not exist, is no diffusers pipeline, or is of a kind that mitune cannot score."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type's name where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known names nearest to an unknown one, in brackets after it; empty where none is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def raised_in(error: BaseException, packages: Collection[str]) -> str | None:
    """Of these packages the one whose code was running last when an exception was raised."""
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    names = [str(name).partition(".")[0] for name in frames]
    return next((name for name in reversed(names) if name in packages), None)


def place_in_own_file(error: BaseException) -> str | None:
    """`file:line` of the user's own code where an exception was raised; None where it was raised in mitune's.

    What libraries raise is of whoever called them.
    """
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = Path(frame.f_code.co_filename).resolve()
        if file.is_relative_to(_MITUNE):
            return None
        if file.is_file() and not _is_library(file):
            return f"{file}:{line}"
    return None


def _is_library(file: Path) -> bool:
    installed = "site-packages" in file.parts or "dist-packages" in file.parts
    return installed or any(file.is_relative_to(folder) for folder in _STANDARD)
