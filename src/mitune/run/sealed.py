"""safetensors files that carry the checksum of what is in them, and whose bytes are a function of that alone.

The checksum stands among the file's notes (`__metadata__`), so that the file stays one that any program reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

_NOTES, _CHECKSUM = "__metadata__", "mitune_sha256"


def pack(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> bytes:
    """A safetensors file of `tensors` and `notes`, with its checksum; safetensors itself puts notes in any order."""
    header, data = _split(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))
    header = {_NOTES: dict(sorted(notes.items())), **dict(sorted(header.items()))}
    header[_NOTES][_CHECKSUM] = _checksum(header, data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors wants the data aligned
    return len(text).to_bytes(8, "little") + text + data


def unpack(content: bytes, *, ours: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and notes of a safetensors file. Raises ValueError if it is damaged, as far as can be seen.

    What `pack` has made is held against its checksum, which is then left out of the notes. ours: whether a file
    without a checksum counts as damaged.
    """
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    header, data = _split(content)
    notes: dict[str, str] = header.setdefault(_NOTES, {})
    sealed = notes.pop(_CHECKSUM, None)
    if ours and sealed is None:
        raise ValueError("it has no checksum")
    if sealed is not None and sealed != _checksum(header, data):
        raise ValueError("its checksum differs")
    return tensors, notes


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8:end])
    return header, content[end:]


def _checksum(header: Mapping[str, Any], data: bytes) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode() + data).hexdigest()
