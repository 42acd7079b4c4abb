"""Arguments of a call of the denoiser, taken apart into what has a row for each candidate and what rows share.

Arguments go by name; an entry of a mapping by both names, `added_cond_kwargs.text_embeds`; an item of a tuple by its
place, `image_rotary_emb.0`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mitune.errors import ModelError

Form = Literal["list", "layers"]  # of an argument: a tensor for each row, in a list; or the rows second, after layers
PADDING = 0.0


@dataclass(slots=True)
class Parts:
    """The tensors among the arguments of a call, sorted into those with rows and those that rows share."""

    count: int
    picked: Tensor
    always_shared: Collection[str]
    layered: Collection[str]
    lists_have_rows: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)
    lengths: dict[str, Tensor] = field(default_factory=dict)
    forms: dict[str, Form] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)

    def add(self, arguments: Mapping[str, Any], prefix: str = "") -> None:
        """Sorts in the tensors among these. Raises ModelError where rows cannot be told apart."""
        for key, value in arguments.items():
            name = prefix + key
            if isinstance(value, Tensor):
                self._add_tensor(name, key, value.detach())
            elif isinstance(value, Mapping):
                self.add(value, f"{name}.")
            elif _holds_tensors(value):
                self._add_list(name, key, value)

    def _add_tensor(self, name: str, key: str, value: Tensor) -> None:
        if key in self.layered:
            self.tensors[name] = value.transpose(0, 1)[self.picked.to(value.device)]
            self.forms[name] = "layers"
        elif key not in self.always_shared and _has_rows(value, self.count):
            self.tensors[name] = value[self.picked.to(value.device)]
        else:
            if key not in self.always_shared:
                refuse_second_dimension(name, value, self.count)
            self.shared[name] = value

    def _add_list(self, name: str, key: str, values: Sequence[Any]) -> None:
        if self.lists_have_rows and len(values) == self.count:
            rows = [values[row].detach() for row in self.picked.tolist()]
            self.tensors[name] = pad_sequence(rows, batch_first=True, padding_value=PADDING)
            self.lengths[name] = torch.tensor([len(row) for row in rows])
            self.forms[name] = "list"
            return
        if key not in self.always_shared and any(_has_rows(value, self.count) for value in values):
            raise ModelError(
                f"The denoiser takes a list of tensors as {name}, which cannot be kept candidate by candidate; "
                "leave out what the pipeline makes it from (ControlNet, adapters), or score on-line alone."
            )
        self.shared |= {f"{name}.{place}": value.detach() for place, value in enumerate(values)}


def refuse_second_dimension(name: str, value: Any, rows: int) -> None:
    """Raises ModelError for a tensor that seems to have its rows in the second dimension."""
    if isinstance(value, Tensor) and not _has_rows(value, rows) and value.ndim > 2 and value.shape[1] == rows:
        raise ModelError(
            f"The denoiser takes {name} with the candidates in its second dimension, which mitune does not know how "
            "to take apart; see docs/support.md for the models that it knows."
        )


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value)


def plain_values(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold of the arguments, and of mappings among them."""
    plain: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            if inner := plain_values(value):
                plain[name] = inner
        elif _is_plain(value):
            plain[name] = json.loads(json.dumps(value))  # as it comes back from a file
    return plain


def _is_plain(value: Any) -> bool:
    """A number, a text, or a sequence of plain values."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, (bool, int, float, str))


def nested(values: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments from values by dotted names, and from what is plain."""
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = name.split(".")
        inner = arguments
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return {name: _as_tuple(value) for name, value in _merged(arguments, plain).items()}


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    both = one.keys() & other.keys()
    return {**one, **other, **{name: _merged(one[name], other[name]) for name in both}}


def _as_tuple(value: Any) -> Any:
    """Mappings with the keys 0, 1, … were tuples."""
    if not isinstance(value, dict):
        return value
    inner = {key: _as_tuple(item) for key, item in value.items()}
    return tuple(inner.values()) if inner and all(key.isdigit() for key in inner) else inner
