"""Records are whole or absent, whatever store they lie in, and a task makes those that are missing."""

import pyarrow as pa
import pytest
import torch

from mitune.run.executors.local import Local
from mitune.run.executors.shards import Shards
from mitune.run.making import Making
from mitune.run.records import Records
from mitune.run.stores.folder import Folder


def write_one(folder):
    records = Records(Folder(folder))
    records.write(3, pa.table({"a": [1, 2]}), {"x": torch.arange(4.0)})
    return records


def test_round_trip(tmp_path):
    table, tensors = write_one(tmp_path).read(3)
    assert table.to_pydict() == {"a": [1, 2]}
    assert torch.equal(tensors["x"], torch.arange(4.0))
    assert Records(Folder(tmp_path)).read(4) is None


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


def test_what_was_killed_before_its_seal_is_written_again(tmp_path):
    """As it was, if it is the same; else what lies there makes way."""
    for old, aside in ((torch.arange(4.0), 0), (torch.zeros(4), 1)):
        folder = Folder(tmp_path / str(aside))
        Records(folder).write(3, pa.table({"a": [1, 2]}), {"x": old})
        (tmp_path / str(aside) / "00003.json").unlink()
        write_one(tmp_path / str(aside))
        assert torch.equal(Records(folder).read(3)[1]["x"], torch.arange(4.0))
        assert len(list((tmp_path / str(aside)).glob("*.damaged"))) == aside


def test_numbers_are_those_with_a_seal(tmp_path):
    records = write_one(tmp_path)
    (tmp_path / "00004.parquet").touch()
    (tmp_path / "settings.json").touch()
    assert records.numbers() == {3} and Records(Folder(tmp_path / "nowhere")).numbers() == set()


class Squares:
    """Item i → i², two images each, in groups of three."""

    images, together = 2, 3

    def __init__(self):
        self.calls = []

    def records(self, items, on_images):
        self.calls.append(list(items))
        for item in items:
            yield item, pa.table({"square": [item**2]}), {}
        on_images(2 * len(items))


@pytest.fixture
def making(tmp_path):
    shown, watched = [], []
    maker, records = Squares(), Records(Folder(tmp_path))
    task = Making(
        maker,
        records,
        items=8,
        progress=lambda *done: shown.append(done),
        watch=lambda table, new: watched.append((table["square"][0].as_py(), new)),
    )
    task.shown, task.watched, task.maker, task.records = shown, watched, maker, records
    return task


def test_local_fills_groups_with_what_is_missing(making):
    for item in (1, 4):
        making.records.write(item, pa.table({"square": [item**2]}), {})
    assert sorted(Local().map(making, range(8))) == list(range(8))
    assert making.maker.calls == [[0, 2, 3], [5, 6, 7]]
    assert making.shown == [(4, 16), (10, 16), (16, 16)]
    assert making.watched[:2] == [(1, False), (16, False)] and (4, True) in making.watched
    assert len(making.watched) == 8


def test_shards_make_every_item_once(making):
    for shard in (0, 1, 2):
        list(Shards(shard, 3, Local()).map(making, range(8)))
    assert sorted(sum(making.maker.calls, [])) == list(range(8))
    assert making.maker.calls[0] == [0, 3, 6]


def test_a_task_that_is_called_twice_makes_a_record_once(making):
    making([2])
    making([2, 5])
    assert making.maker.calls == [[2], [5]]
    assert making.records.read(5)[0].to_pydict() == {"square": [25]}
