"""Files are written whole or not at all, and a folder belongs to its settings."""

import errno
import json
import os

import pytest

from mitune.errors import MituneError
from mitune.run.store import claim, read_again, write_bytes, writing


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    write_bytes(file, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(MituneError, match="No space left"):
        write_bytes(file, b"new")
    assert file.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("code", ["EROFS", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "ENAMETOOLONG", "EIO"])
def test_what_the_system_has_against_a_write_is_a_sentence(tmp_path, code):
    number = getattr(errno, code)
    with pytest.raises(MituneError, match=f"Cannot write .*{os.strerror(number)}"), writing(tmp_path / "a.txt"):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("where", ["file/a.txt", "folder", "x" * 300])
def test_places_that_cannot_be_written(tmp_path, where):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(MituneError, match="Cannot write"):
        write_bytes(tmp_path / where, b"new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_damaged_file_never_takes_anothers_place(tmp_path):
    for content in ("one", "two", "three"):
        (tmp_path / "a.json").write_text(content)
        assert read_again(tmp_path / "a.json", json.loads) is None
    (tmp_path / "a.json").mkdir()
    assert read_again(tmp_path / "a.json", json.loads) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.json.damaged{i}" for i in ("", 1, 2, 3)]


def test_claim_names_the_setting_that_differs(tmp_path):
    claim(tmp_path, {"seed": 1, "prompts": ["a"]}, "pool")
    claim(tmp_path, {"seed": 1, "prompts": ["a"]}, "pool")
    with pytest.raises(MituneError, match=r"seed: 1 there, 2 now"):
        claim(tmp_path, {"seed": 2, "prompts": ["a"]}, "pool")


def test_claim_names_nested_settings(tmp_path):
    claim(tmp_path, {"model": {"parts": {"unet": "a", "vae": "b"}}}, "pool")
    with pytest.raises(MituneError, match=r'model.parts.vae: "b" there, "c" now'):
        claim(tmp_path, {"model": {"parts": {"unet": "a", "vae": "c"}}}, "pool")
