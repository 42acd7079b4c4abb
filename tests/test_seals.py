"""A seal tells which of a folder's files are as they were."""

import pytest

from mitune.run.seals import SEAL, faults, read_seal, write_seal


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "sub/b.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    write_seal(tmp_path, ["a.txt", "sub/b.txt", "c.txt"], made="something")
    return tmp_path


def test_a_whole_folder_has_no_faults(folder):
    assert faults(folder) == []
    assert read_seal(folder)["made"] == "something"
    (folder / "note.txt").touch()
    assert faults(folder) == []  # what is not ours does not concern us


def test_missing_and_changed_files_are_named(folder):
    (folder / "sub" / "b.txt").unlink()
    (folder / "sub" / "b.txt").mkdir()
    (folder / "c.txt").write_text("c.tx")
    assert faults(folder) == ["c.txt", "sub/b.txt"]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"files": []}', "\0\0"])
def test_a_garbled_seal_is_none(folder, content):
    (folder / SEAL).write_text(content)
    assert read_seal(folder) is None and faults(folder) == [SEAL]
