"""Records are whole or absent, and a folder belongs to its settings."""

import errno

import pyarrow as pa
import pytest
import torch

from mitune.errors import MituneError
from mitune.store import Records, claim, room_on, write_bytes


def write_one(folder):
    records = Records(folder)
    records.write(3, pa.table({"a": [1, 2]}), {"x": torch.arange(4.0)})
    return records


def test_round_trip(tmp_path):
    table, tensors = write_one(tmp_path).read(3)
    assert table.to_pydict() == {"a": [1, 2]}
    assert torch.equal(tensors["x"], torch.arange(4.0))
    assert Records(tmp_path).read(4) is None


@pytest.mark.parametrize("ending", [".parquet", ".safetensors", ".json"])
@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_damaged_record_is_set_aside(tmp_path, ending, damage, caplog):
    records = write_one(tmp_path)
    file = tmp_path / f"00003{ending}"
    content = file.read_bytes()
    middle = len(content) // 2
    broken = content[:middle] if damage == "truncated" else content[:middle] + b"?!" + content[middle + 2 :]
    file.write_bytes(broken)
    assert records.read(3) is None
    assert "set aside" in caplog.text
    assert (tmp_path / f"00003{ending}.damaged").exists()
    write_one(tmp_path)
    assert records.read(3) is not None


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    write_bytes(file, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(MituneError, match="No space left"):
        write_bytes(file, b"new")
    assert file.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]


def test_other_faults_pass_through(tmp_path):
    with pytest.raises(PermissionError), room_on(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_claim_names_the_setting_that_differs(tmp_path):
    claim(tmp_path, {"seed": 1, "prompts": ["a"]}, "pool")
    claim(tmp_path, {"seed": 1, "prompts": ["a"]}, "pool")
    with pytest.raises(MituneError, match=r"seed: 1 there, 2 now"):
        claim(tmp_path, {"seed": 2, "prompts": ["a"]}, "pool")
