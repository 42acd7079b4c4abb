"""Sealed files are ordinary safetensors files, of bytes that depend on their content alone, and notice every change."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from mitune.run.sealed import pack, unpack

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1, 2, 3]), "c": torch.tensor(0.5).bfloat16()}
NOTES = {"format": "pt", "what": "ü", "mitune": '{"n": 1}'}


def test_safetensors_reads_it(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(pack(TENSORS, NOTES))
    found = load_file(file)
    assert found.keys() == TENSORS.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    with safe_open(file, framework="pt") as opened:
        assert NOTES.items() <= opened.metadata().items()


def test_round_trip():
    tensors, notes = unpack(pack(TENSORS, NOTES), ours=True)
    assert notes == NOTES
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert pack(dict(reversed(tensors.items())), dict(reversed(notes.items()))) == pack(TENSORS, NOTES)


def test_bytes_do_not_depend_on_the_process():
    program = "import sys; from tests.test_sealed import *; sys.stdout.buffer.write(pack(TENSORS, NOTES))"
    for seed in ("1", "2"):
        made = subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        assert made.stdout == pack(TENSORS, NOTES)


def test_every_changed_byte_is_noticed():
    content = pack(TENSORS, NOTES)
    padding = content.index(b"}  ") if b"}  " in content else None
    for at in range(len(content)):
        if content[at : at + 1] == b" " and padding is not None and at > padding:
            continue
        with pytest.raises(ValueError):
            unpack(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :], ours=True)
        with pytest.raises(ValueError):
            unpack(content[:at], ours=True)


def test_files_of_other_programs():
    content = save(TENSORS, metadata={"format": "pt"})
    assert unpack(content)[1] == {"format": "pt"}
    assert unpack(save(TENSORS))[1] == {}
    with pytest.raises(ValueError, match="no checksum"):
        unpack(content, ours=True)
