"""What a denoiser is told beside z and t, as tensors with one row a candidate; and back into its arguments.

The name of a tensor says how it is handed on:

    encoder_hidden_states          (B, ...) as it is
    added_cond_kwargs.text_embeds  an entry of a mapping
    img_ids=                       the same for all rows: the first row
    image_rotary_emb.0=            an item of a tuple of such
    cap_feats[]                    a list with one tensor a row
    text_states^                   (B, layers, ...) the batch is the second dimension of the argument
    cap_feats[]#                   (B,) the length of each row, where they differ; −1 where the argument is None
    =                              JSON of the arguments that are no tensors, also those in mappings, as bytes
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mitune.errors import MituneError, ModelError

SHARED, LISTED, LAYERED, LENGTHS = "=", "[]", "^", "#"
_PLAIN = SHARED  # the nameless shared tensor
_PADDING = 0.0


def flatten(
    arguments: Mapping[str, Any],
    rows: int,
    picked: Tensor,
    *,
    shared: Collection[str] = (),
    layered: Collection[str] = (),
    listed: bool = False,
) -> dict[str, Tensor]:
    """The arguments of a call of the denoiser with `rows` rows, those in `picked` alone.

    shared: names of arguments that are the same for all rows, whatever their length. layered: of those that have the
    rows in their second dimension. listed: whether lists have one tensor a row. Raises ModelError for any other tensor
    with rows in its second dimension or inside a list, such as the residuals of a ControlNet.
    """
    flat = {
        name + LAYERED: arguments[name].detach().transpose(0, 1)[picked.to(arguments[name].device)]
        for name in layered
        if name in arguments
    }
    rest = {name: value for name, value in arguments.items() if name not in layered}
    flat |= _tensors(rest, "", rows, picked, shared, listed)
    if plain := _plain({name: value for name, value in arguments.items() if name != "return_dict"}):
        encoded = torch.frombuffer(bytearray(json.dumps(plain).encode()), dtype=torch.uint8)
        flat[_PLAIN] = encoded.expand(len(picked), -1)
    return flat


def _tensors(
    arguments: Mapping[str, Any], prefix: str, rows: int, picked: Tensor, shared: Collection[str], listed: bool
) -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for key, value in arguments.items():
        name = prefix + key
        if isinstance(value, Tensor):
            value = value.detach()
            if key not in shared and _has_rows(value, rows):
                flat[name] = value[picked.to(value.device)]
            else:
                if key not in shared:
                    refuse_second_dimension(name, value, rows)
                flat[name + SHARED] = value.expand(len(picked), *value.shape)
        elif isinstance(value, Mapping):
            flat |= _tensors(value, f"{name}.", rows, picked, shared, listed)
        elif _holds_tensors(value):
            if listed and len(value) == rows:
                flat |= _padded(name + LISTED, [value[row].detach() for row in picked.tolist()])
                continue
            if key not in shared and any(_has_rows(item, rows) for item in value):
                raise ModelError(
                    f"The denoiser takes a list of tensors as {name}, which cannot be kept candidate by candidate; "
                    "leave out what the pipeline makes it from (ControlNet, adapters), or score on-line alone."
                )
            items = {str(place): item for place, item in enumerate(value)}
            flat |= _tensors(items, f"{name}.", rows, picked, list(items), listed)
    return flat


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


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What is plain in the arguments, and in mappings among them."""
    plain: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            if inner := _plain(value):
                plain[name] = inner
        elif _is_plain(value):
            plain[name] = value
    return plain


def _is_plain(value: Any) -> bool:
    """A number, a text, or a sequence of plain values."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, (bool, int, float, str))


def unflatten(conditioning: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments for the denoiser from `flatten`; texts are handed on padded as they are (`groups` knows better)."""
    nested: dict[str, Any] = {}
    for name, value in conditioning.items():
        if name == _PLAIN:
            nested = _merged(nested, json.loads(bytes(value[0].tolist())))
            continue
        if name.endswith(LENGTHS):
            continue
        *parents, last = name.removesuffix(SHARED).removesuffix(LISTED).removesuffix(LAYERED).split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        if name.endswith(LISTED):
            lengths = conditioning.get(name + LENGTHS)
            sizes = [value.shape[1]] * len(value) if lengths is None else lengths.tolist()
            inner[last] = [row[:size] for row, size in zip(value, sizes, strict=True)]
        elif name.endswith(LAYERED):
            inner[last] = value.transpose(0, 1)
        else:
            inner[last] = value[0] if name.endswith(SHARED) else value
    return {name: _as_tuple(value) for name, value in nested.items()}


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    both = one.keys() & other.keys()
    return one | other | {name: _merged(one[name], other[name]) for name in both}


def _as_tuple(value: Any) -> Any:
    """Mappings with the keys 0, 1, … were tuples."""
    if not isinstance(value, dict):
        return value
    inner = {key: _as_tuple(item) for key, item in value.items()}
    return tuple(inner.values()) if all(key.isdigit() for key in inner) else inner


def groups(conditioning: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Rows whose texts are of one length, (n,), with their arguments for the denoiser: texts without padding.

    Where all are of one length, that is one group; the denoiser is called once for each.
    """
    ragged = [name for name in conditioning if name.endswith(LENGTHS) and not name.endswith(LISTED + LENGTHS)]
    first = next(iter(conditioning.values()))
    if not ragged:
        yield torch.arange(len(first), device=first.device), unflatten(conditioning)
        return
    lengths = torch.stack([conditioning[name] for name in ragged], dim=1)
    for signature in torch.unique(lengths, dim=0):
        rows = torch.nonzero((lengths == signature).all(dim=1)).flatten()
        part = {name: value[rows] for name, value in conditioning.items() if name not in ragged}
        for name, length in zip(ragged, signature.tolist(), strict=True):
            text = part.pop(name.removesuffix(LENGTHS))
            if length >= 0:
                part[name.removesuffix(LENGTHS)] = text[:, :length]
        yield rows, unflatten(part)


def stack(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The conditioning of N candidates, (N, ...) each, from that of each one, without a batch dimension.

    Pipelines pad texts to the longest of a batch, and leave out a mask that hides nothing: so lengths and names may
    differ from row to row; then they are padded, and their lengths kept under the name with `#`.
    Raises MituneError if anything else differs.
    """
    stacked: dict[str, Tensor] = {}
    names = dict.fromkeys(name for row in rows for name in row if not name.endswith(LENGTHS))
    for name in names:
        values = [row.get(name) for row in rows]
        found = [value for value in values if value is not None]
        if len({value.shape[1:] for value in found}) > 1 or len({value.ndim for value in found}) > 1:
            raise MituneError(f"The prompts' {name} differ in more than their length; make them with one setting.")
        lengths = [_length(row, name) for row in rows]
        if all(value is not None for value in values) and len({value.shape for value in found}) == 1:
            stacked[name] = torch.stack(found)
            if any(name + LENGTHS in row for row in rows):
                stacked[name + LENGTHS] = torch.tensor(lengths)
        else:
            stacked |= _padded(name, [found[0][:0] if value is None else value for value in values])
            stacked[name + LENGTHS] = torch.tensor(lengths)
    return stacked


def _length(row: Mapping[str, Tensor], name: str) -> int:
    if name + LENGTHS in row:
        return int(row[name + LENGTHS])
    if name not in row:
        return -1
    return len(row[name]) if row[name].ndim else 1


def _padded(name: str, texts: Sequence[Tensor]) -> dict[str, Tensor]:
    padded = pad_sequence(list(texts), batch_first=True, padding_value=_PADDING)
    return {name: padded, name + LENGTHS: torch.tensor([len(text) for text in texts], device=padded.device)}
