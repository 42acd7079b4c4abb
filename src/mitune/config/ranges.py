"""What a setting may be: its type and a number's range, which stand at its field and are checked when it is set."""

from __future__ import annotations

import functools
import json
import math
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from mitune.errors import MituneError

_YAML_WORDS = {False: ("off", "no"), True: ("on", "yes")}  # that YAML 1.1 reads as these, unless they are quoted


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The numbers that a setting takes, as `Annotated[int, Range(least=1)]`; NaN and infinity are never among them."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    why: str = ""  # where the sentence of a refusal is to give a reason

    def __contains__(self, number: float) -> bool:
        return self.least <= number <= self.most and self.above < number < self.below

    @property
    def ends(self) -> str:
        """In words."""
        ends = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {end:,}" for word, end in ends.items() if -math.inf < end < math.inf)

    def __str__(self) -> str:
        return f"{self.ends}: {self.why}" if self.why else self.ends


def settle(settings: Any, section: str) -> None:
    """Checks every field of a new frozen dataclass, and puts a list where YAML has one for a tuple, 1 for 1.0.

    Raises MituneError that names the setting, the value, and what it must be.
    """
    cls: Any = type(settings)
    for name, hint in _hints(cls).items():
        value = convert(getattr(settings, name), hint, f"{section}.{name}" if section else name)
        object.__setattr__(settings, name, value)


@functools.cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def ends_of(cls: Any, name: str) -> str:
    """The range of a numeric field of these settings, in words, for the help of the options that set it."""
    hint = _hints(cls)[name]
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not types.NoneType)
    within: Range = get_args(hint)[1]
    return within.ends


def convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as the type that a field asks for, and within its range; else a MituneError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _one_of(value, arguments, name)
    if origin is Annotated:
        kind, within = arguments
        return _number(value, kind, within, name)
    if origin is Literal:
        word = _word(value, arguments)
        _require(word is not None, name, value, f"one of {', '.join(map(str, arguments))}")
        return word
    if origin is tuple:
        return _items(value, arguments, name)
    if origin is dict:
        return _mapping(value, name)
    what = {str: "text", bool: "true or false"}.get(hint, "a mapping of settings")
    _require(isinstance(value, hint) and (hint is not str or _is_plain(value)), name, value, what)
    return value


def _one_of(value: Any, hints: tuple[Any, ...], name: str) -> Any:
    """A value of `X | None`, or of `Literal[...] | X`."""
    if value is None and types.NoneType in hints:
        return None
    words = [word for hint in hints if get_origin(hint) is Literal for word in get_args(hint)]
    if (word := _word(value, words)) is not None:
        return word
    if words and (value is None or isinstance(value, str)):
        _require(False, name, value, f"{', '.join(words)}, or a list, e.g. [...]")
    return convert(value, next(h for h in hints if h is not types.NoneType and get_origin(h) is not Literal), name)


def _word(value: Any, words: Sequence[Any]) -> Any:
    """The word that a value is, or that YAML took for a truth value (`race: off`); None if it is none of them."""
    written = _YAML_WORDS[value] if isinstance(value, bool) else (value,)
    return next((word for word in words if word in written), None)


def _number(value: Any, kind: type[int] | type[float], within: Range, name: str) -> int | float:
    number: Any = None
    if kind is int and isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
    elif kind is float and isinstance(value, (Real, str)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            number = float(value)  # YAML reads 1e-4 as text
    what = "a whole number" if kind is int else "a number"
    _require(number is not None and number in within, name, value, f"{what}, {within}")
    checked: int | float = number
    return checked


def _items(value: Any, hints: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    _require(isinstance(value, (list, tuple)), name, value, "a list, e.g. [...]")
    if hints[-1] is Ellipsis:
        hints = (hints[0],) * len(value)
    _require(len(value) == len(hints), name, value, f"a list of {len(hints)}")
    return tuple(convert(item, hint, f"{name}[{at}]") for at, (item, hint) in enumerate(zip(value, hints, strict=True)))


def _mapping(value: Any, name: str) -> dict[str, Any]:
    _require(
        isinstance(value, Mapping) and all(isinstance(key, str) for key in value) and _is_plain(value),
        name,
        value,
        "a mapping of names to plain values (text, finite numbers, true, false, null, lists and mappings of these)",
    )
    return dict(value)


def _is_plain(value: Any) -> bool:
    """Whether a value can be kept in a file, and handed to other programs: neither NUL nor half a character in it."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        return "\\u0000" not in text and bool(text.encode())
    except (TypeError, ValueError, RecursionError):
        return False


def _require(condition: bool, name: str, value: Any, what: str) -> None:
    if not condition:
        raise MituneError(f"{name} = {_quoted(value)} must be {what}.")


def _quoted(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more than 4,300 digits, lists in lists without end
        return "what was given"
    return text if len(text) <= 60 else text[:57] + "..."
