"""A denoiser's arguments for N candidates beside z and t; kept row by row, and turned back into a call's."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mitune.denoiser.arguments import PADDING, Form, Parts, nested, plain_values
from mitune.errors import MituneError

ABSENT = -1  # the length of a row whose argument is None
_LENGTHS, _SHARED, _CALL, _PLAIN, _NULL = "lengths/", "shared/", "call", "plain", "null."  # in a file


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """The arguments that all rows of a call have in common."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # by argument: positions, mostly
    plain: Mapping[str, Any] = field(default_factory=dict)  # arguments that JSON can hold, also those inside mappings

    def same_as(self, other: Shared) -> bool:
        """Whether both hold the same."""
        return (
            self.plain == other.plain
            and self.tensors.keys() == other.tensors.keys()
            and all(torch.equal(value, other.tensors[name]) for name, value in self.tensors.items())
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Conditioning:
    """The arguments of a denoiser for N candidates, but for z and t, by the names of `arguments.py`.

    Rows of different length are padded, and `lengths` has their own.
    """

    rows: Mapping[str, Tensor]  # (N, ...) each
    lengths: Mapping[str, Tensor] = field(default_factory=dict)  # (N,) whole numbers; `ABSENT` where it is None
    forms: Mapping[str, Form] = field(default_factory=dict)  # of `rows` that the denoiser takes in another form
    shared: Sequence[Shared] = (Shared(),)  # one for each kind of call
    call: Tensor  # (N,) which of `shared` goes with a row

    def __len__(self) -> int:
        return len(self.call)

    @classmethod
    def of_call(
        cls,
        arguments: Mapping[str, Any],
        rows: int,
        picked: Tensor,
        *,
        shared: Collection[str] = (),
        layered: Collection[str] = (),
        listed: bool = False,
    ) -> Self:
        """That of the rows `picked` (N,), out of the arguments of a call of the denoiser with `rows` rows.

        shared: names of arguments that are the same for all rows, whatever their length. layered: of those that have
        the rows in their second dimension. listed: whether lists have one tensor a row. Raises ModelError for any other
        tensor with rows in its second dimension or inside a list, such as the residuals of a ControlNet.
        """
        parts = Parts(rows, picked, shared, layered, listed)
        parts.add(arguments)
        plain = plain_values({name: value for name, value in arguments.items() if name != "return_dict"})
        return cls(
            rows=parts.tensors,
            lengths=parts.lengths,
            forms=parts.forms,
            shared=(Shared(parts.shared, plain),),
            call=torch.zeros(len(picked), dtype=torch.int64),
        )

    def take(self, places: Tensor | Sequence[int]) -> Self:
        """The rows at these places."""
        index = torch.as_tensor(places, dtype=torch.int64, device="cpu")

        def taken(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value[index.to(value.device)] for name, value in tensors.items()}

        return replace(self, rows=taken(self.rows), lengths=taken(self.lengths), call=self.call[index])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None, *, non_blocking: bool = False) -> Self:
        """The same on a device, and its rows in a dtype. What rows share are positions, and keep the precision that
        the pipeline chose for them; lengths stay where they are."""

        def moved(value: Tensor, dtype: torch.dtype | None) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None, non_blocking=non_blocking)

        shared = [Shared({k: moved(v, None) for k, v in each.tensors.items()}, each.plain) for each in self.shared]
        return replace(self, rows={k: moved(v, dtype) for k, v in self.rows.items()}, shared=shared)

    def arguments(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Rows that one call can be made for, (n,), with its arguments: texts of one length, without padding.

        Where all are of one length and share the rest, that is one group.
        """
        ragged = [name for name in self.lengths if self.forms.get(name) != "list"]
        kinds = torch.stack([*(self.lengths[name] for name in ragged), self.call], dim=1)
        for kind in torch.unique(kinds, dim=0):
            *lengths, call = kind.tolist()
            places = (kinds == kind).all(dim=1).nonzero().flatten()
            part = self if len(places) == len(self) else self.take(places)
            tensors = dict(part.rows)
            for name, length in zip(ragged, lengths, strict=True):
                if length == ABSENT:
                    del tensors[name]
                else:
                    tensors[name] = tensors[name][:, :length]
            values = {name: part._formed(name, value) for name, value in tensors.items()}
            yield places, nested(values | dict(self.shared[call].tensors), self.shared[call].plain)

    def _formed(self, name: str, value: Tensor) -> Tensor | list[Tensor]:
        """Rows of that name in the form that the denoiser takes."""
        form = self.forms.get(name)
        if form == "list":
            return [row[:size] for row, size in zip(value, self.lengths[name].tolist(), strict=True)]
        return value.transpose(0, 1) if form == "layers" else value

    def to_tensors(self) -> dict[str, Tensor]:
        """For a file of tensors: rows by their names, the rest by names with a stroke, and what is plain as JSON."""
        tensors = dict(self.rows)
        tensors |= {_LENGTHS + name: lengths for name, lengths in self.lengths.items()}
        tensors |= {
            f"{_SHARED}{place}/{name}": value.clone()  # a file takes no tensors that share memory
            for place, each in enumerate(self.shared)
            for name, value in each.tensors.items()
        }
        if len(self.shared) > 1:
            tensors[_CALL] = self.call
        plain = [dict(each.plain) for each in self.shared]
        if self.forms or any(plain):
            text = json.dumps({"forms": dict(self.forms), "calls": plain})
            tensors[_PLAIN] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `to_tensors`; those of the other pass are left out (`Passes`).

        Raises ValueError for tensors that were not made by it.
        """
        tensors = {name: value for name, value in tensors.items() if not name.startswith(_NULL)}
        rows = {name: value for name, value in tensors.items() if "/" not in name and name not in (_CALL, _PLAIN)}
        if not rows or any(set("=#[^") & set(name) for name in rows):
            raise ValueError("the conditioning has names that this version of mitune does not know")
        plain: dict[str, Any] = {"forms": {}, "calls": [{}]}
        if _PLAIN in tensors:
            plain = json.loads(bytes(tensors[_PLAIN].tolist()))
        shared = [
            Shared({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}, values)
            for start, values in ((f"{_SHARED}{place}/", values) for place, values in enumerate(plain["calls"]))
        ]
        count = len(next(iter(rows.values())))
        return cls(
            rows=rows,
            lengths={k.removeprefix(_LENGTHS): v for k, v in tensors.items() if k.startswith(_LENGTHS)},
            forms=plain["forms"],
            shared=shared,
            call=tensors.get(_CALL, torch.zeros(count, dtype=torch.int64)),
        )


def stack(parts: Sequence[Conditioning]) -> Conditioning:
    """The rows of all parts, one after another.

    Pipelines pad texts to the longest of a batch, and leave out a mask that hides nothing: so lengths and names may
    differ from part to part. Raises MituneError if anything else differs.
    """
    rows: dict[str, Tensor] = {}
    lengths: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for part in parts for name in part.rows):
        present = [part.rows[name] for part in parts if name in part.rows]
        if len({value.shape[2:] for value in present}) > 1 or len({value.ndim for value in present}) > 1:
            raise MituneError(f"The prompts' {name} differ in more than their length; make them with one setting.")
        whole = len(present) == len(parts) and len({value.shape[1:] for value in present}) == 1
        if whole:
            rows[name] = torch.cat(present)
        else:
            empty = present[0][:1, :0]
            texts = [part.rows.get(name, empty.expand(len(part), *empty.shape[1:])) for part in parts]
            rows[name] = pad_sequence([row for text in texts for row in text], batch_first=True, padding_value=PADDING)
        if not whole or any(name in part.lengths for part in parts):
            lengths[name] = torch.cat([_lengths(part, name) for part in parts])
    shared: list[Shared] = []
    calls = []
    for part in parts:
        places = []
        for each in part.shared:
            place = next((i for i, other in enumerate(shared) if each.same_as(other)), len(shared))
            shared += [each] if place == len(shared) else []
            places.append(place)
        calls.append(torch.tensor(places)[part.call])
    forms = {name: form for part in parts for name, form in part.forms.items()}
    return Conditioning(rows=rows, lengths=lengths, forms=forms, shared=shared, call=torch.cat(calls))


@dataclass(frozen=True, slots=True, eq=False)
class Passes:
    """The conditioning of the two passes of a guided step, for the same N candidates."""

    conditional: Conditioning
    null: Conditioning

    @property
    def are_alike(self) -> bool:
        """Whether the arguments of both have the same shapes, so that one call can be made for both without padding."""
        shapes = [{name: value.shape for name, value in each.rows.items()} for each in (self.conditional, self.null)]
        return shapes[0] == shapes[1]

    def take(self, places: Tensor | Sequence[int]) -> Self:
        """The rows at these places."""
        return replace(self, conditional=self.conditional.take(places), null=self.null.take(places))

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        return replace(self, conditional=self.conditional.to(device), null=self.null.to(device))

    def to_tensors(self) -> dict[str, Tensor]:
        """For a file of tensors; names of the pass without the prompt begin with `null.`."""
        return self.conditional.to_tensors() | {_NULL + k: v for k, v in self.null.to_tensors().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `to_tensors`. Raises ValueError for tensors that were not made by it."""
        null = {name.removeprefix(_NULL): value for name, value in tensors.items() if name.startswith(_NULL)}
        return cls(Conditioning.from_tensors(tensors), Conditioning.from_tensors(null))


def stack_passes(parts: Sequence[Passes]) -> Passes:
    """The rows of all parts, as in `stack`."""
    return Passes(stack([part.conditional for part in parts]), stack([part.null for part in parts]))


def _lengths(part: Conditioning, name: str) -> Tensor:
    """(N,) of the rows of that name."""
    if name in part.lengths:
        return part.lengths[name]
    return torch.full((len(part),), part.rows[name].shape[1] if name in part.rows else ABSENT)
