"""Names of what a user may add: a short name from a table, or `package.module:attribute` from anybody's own file.

Scores, metrics, objectives, methods, executors, stores, worlds and presets are all named in this way. A table says what
each of its names stands for in one line, and imports nothing until a name is resolved.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from typing_extensions import get_protocol_members, is_protocol

from mitune.errors import MituneError, did_you_mean, first_line

T = TypeVar("T")
_LOCATION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True, slots=True)
class Row(Generic[T]):
    """What a short name stands for: the object, or the `package.module:attribute` to import it from."""

    summary: str  # one line, for `mitune list`
    target: T | str


@dataclass(frozen=True, slots=True)
class Table(Generic[T]):
    """Everything of one kind that has a short name."""

    kind: str  # as it stands in a sentence, e.g. "metric"
    fits: type[object]  # the Protocol or the class that each must fit
    rows: Mapping[str, Row[T]]
    may_fit: tuple[type[object], ...] = ()  # Protocols of what an object may have beside

    def resolve(self, name: str, *arguments: object) -> T:
        """What `name` stands for; if that is a class, its instance made of `arguments`.

        Raises MituneError for an unknown name, a module that cannot be imported or lacks the attribute, and an object
        that does not fit.
        """
        return self.fitting(name, self.find(name, *arguments))

    def find(self, name: str, *arguments: object) -> object:
        """As `resolve`, whether or not the object fits."""
        row = self.rows.get(name)
        if row is None and not is_location(name):
            raise MituneError(
                f"Unknown {self.kind} {name!r}{did_you_mean(name, self.rows)}; `mitune list {self.kind}s` shows all, "
                f"and your own is module:attribute, e.g. mine:my_{self.kind} for my_{self.kind} in a file mine.py here."
            )
        target = name if row is None else row.target
        value = _import(self.kind, target) if isinstance(target, str) else target
        if inspect.isclass(value):
            value = _instance(self.kind, name, value, arguments)
        return value

    def fitting(self, name: str, value: object) -> T:
        """The object. Raises MituneError if it lacks something, or takes other arguments than it is called with."""
        _require_fit(self.kind, name, value, self.fits)
        for protocol in filter(is_protocol, (self.fits, *self.may_fit)):
            _require_calls(self.kind, name, value, protocol)
        return cast(T, value)

    def summaries(self) -> dict[str, str]:
        """One line of each name."""
        return {name: row.summary for name, row in self.rows.items()}


def is_location(name: str) -> bool:
    """Whether a name has the form `package.module:attribute`."""
    return _LOCATION.fullmatch(name) is not None


def _import(kind: str, location: str) -> object:
    """The attribute of a module that is installed, or lies in the current folder."""
    module_name, _, path = location.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # behind all others: a file here hides no library
        importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except MituneError:
        raise
    except Exception as error:  # whatever somebody's file raises
        absent = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        reason = f"there is none in {here} or installed" if absent else f"{type(error).__name__}: {first_line(error)}"
        raise MituneError(f"The {kind} {location} needs the module {module_name} ({reason}); mend it.") from error
    value: Any = module
    for name in path.split("."):
        if not hasattr(value, name):
            known = [public for public in vars(module) if not public.startswith("_")] if value is module else []
            raise MituneError(
                f"The {kind} {location}: {getattr(module, '__file__', None) or module_name} has no "
                f"{path}{did_you_mean(path, known)}; define it there, or name another."
            )
        value = getattr(value, name)
    return cast(object, value)


def _instance(kind: str, name: str, made_of: type[object], arguments: tuple[object, ...]) -> object:
    try:
        return made_of(*arguments)
    except MituneError:
        raise
    except Exception as error:
        takes = ", ".join(type(argument).__name__ for argument in arguments) or "no arguments"
        cause = f"{type(error).__name__}: {first_line(error)}"
        raise MituneError(f"The {kind} {name} cannot be made ({cause}); its class is called with {takes}.") from error


def _require_fit(kind: str, name: str, value: object, fits: type[object]) -> None:
    """Raises MituneError for an object without all that the Protocol asks for, or of another class."""
    if not is_protocol(fits):
        if not isinstance(value, fits):
            raise MituneError(f"The {kind} {name} is of the type {type(value).__name__}; it must be a {_place(fits)}.")
    elif missing := sorted(member for member in get_protocol_members(fits) if not _has(value, member)):
        raise MituneError(f"The {kind} {name} lacks {', '.join(missing)}; add what {_place(fits)} asks for.")


def _require_calls(kind: str, name: str, value: object, fits: type[object]) -> None:
    """Raises MituneError for a method that does not take what that of the Protocol is called with."""
    for member in sorted(get_protocol_members(fits)):
        method = inspect.getattr_static(fits, member, None)
        if not (inspect.isfunction(method) and _has(value, member)):
            continue
        _self, *arguments = inspect.signature(method).parameters
        called: Any = value if member == "__call__" else getattr(value, member)
        try:
            inspect.signature(called).bind(*arguments)
        except ValueError:  # of a builtin, which does not say
            continue
        except TypeError as error:
            raise MituneError(
                f"The {kind} {name} has {_definition(called, member)}, which is called with ({', '.join(arguments)}); "
                "let it take these."
            ) from error


def _definition(called: Any, member: str) -> str:
    """A function with its parameters, and the line that it stands in; or what stands in a function's place."""
    if not callable(called):
        return f"{member} = {called!r}"
    function = inspect.unwrap(called if inspect.isroutine(called) else called.__call__)
    place = f" ({code.co_filename}:{code.co_firstlineno})" if (code := getattr(function, "__code__", None)) else ""
    return f"{function.__qualname__}({', '.join(inspect.signature(called).parameters)}){place}"


def _has(value: object, member: str) -> bool:
    """Whether there is such an attribute; one that is computed is not asked for, as it may be dear."""
    try:
        inspect.getattr_static(value, member)
    except AttributeError:
        return hasattr(value, member)
    return True


def _place(fits: type[object]) -> str:
    return f"{fits.__module__}.{fits.__qualname__}"
