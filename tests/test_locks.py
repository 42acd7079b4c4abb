"""One folder, one process: those that meet hear of each other, and a killed one blocks nobody."""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest

from mitune.errors import MituneError
from mitune.run.locks import LOCK, one_of_many, sole_worker, sweep
from mitune.run.store import unfinished, unfinished_folder

HOLD = """
import sys, time
from pathlib import Path
from mitune.run.locks import one_of_many, sole_worker
folder, *shard = sys.argv[1:]
with one_of_many(Path(folder), (int(shard[0]), int(shard[1]))) if shard else sole_worker(Path(folder)):
    print("here", flush=True)
    time.sleep(60)
"""


def another(folder, *shard):
    """A process that holds the folder until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder, *map(str, shard)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"here\n"
    return process


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_a_folder_has_one_worker_and_a_killed_one_blocks_nobody(tmp_path):
    process = another(tmp_path)
    with pytest.raises(MituneError, match="Another process works on"), sole_worker(tmp_path):
        pass
    kill(process)
    with sole_worker(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [
        ((0, 2), (1, 2), False),
        ((0, 2), (0, 2), True),
        ((0, 1), (0, 1), True),
        ((0, 1), (1, 2), True),
        ((1, 2), (2, 4), False),
        ((1, 2), (3, 4), True),
        ((0, 2), (1, 3), True),  # both make the fifth
    ],
)
def test_shards_meet_where_they_share_a_prompt(tmp_path, one, other, meet):
    assert meet == bool({*range(one[0], 24, one[1])} & {*range(other[0], 24, other[1])})
    with (
        one_of_many(tmp_path, one),
        pytest.raises(MituneError, match="Another process") if meet else nullcontext(),
        one_of_many(tmp_path, other),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_killed_shard_blocks_nobody(tmp_path):
    kill(another(tmp_path, 0, 2))
    with one_of_many(tmp_path, (0, 2)), one_of_many(tmp_path, (1, 2)):
        pass


def leftovers(folder):
    """What a killed write leaves: a file, and a folder with files in it."""
    folder.mkdir(parents=True, exist_ok=True)
    file, inner = unfinished(folder / "a.json"), unfinished(folder / "set")
    file.write_text("{")
    inner.mkdir()
    (inner / "picture.png").write_bytes(b"half")
    return [file, inner]


def test_leftovers_are_swept_and_nothing_else(tmp_path):
    mine = [tmp_path / ".hidden", tmp_path / ".a.json.4711", tmp_path / "sub" / ".x.unfinished", tmp_path / "b.json"]
    gone = leftovers(tmp_path) + leftovers(tmp_path / "sub")
    held = leftovers(tmp_path / "held")
    elsewhere = leftovers(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    (tmp_path / "held" / LOCK).touch()  # another worker's, who sweeps it
    (tmp_path / "link").symlink_to(elsewhere[0].parent)
    for path in mine:
        path.write_text("mine")
    with sole_worker(tmp_path):
        assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in [*mine, *held, *elsewhere])


def test_shards_sweep_only_where_nobody_else_works(tmp_path):
    with one_of_many(tmp_path, (0, 2)):
        others = leftovers(tmp_path)
        with one_of_many(tmp_path, (1, 2)):
            assert all(path.exists() for path in others)
    with one_of_many(tmp_path, (1, 2)):
        assert not any(path.exists() for path in others)


def test_an_unfinished_folder_goes_unless_it_is_renamed(tmp_path):
    with pytest.raises(KeyboardInterrupt), unfinished_folder(tmp_path / "a"):
        raise KeyboardInterrupt
    with unfinished_folder(tmp_path / "b") as folder:
        (folder / "file").touch()
        folder.replace(tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MituneError, match="Cannot write"), sole_worker(tmp_path / "file" / "run"):
        pass
    sweep(tmp_path)
