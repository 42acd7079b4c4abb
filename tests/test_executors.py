"""Executors and stores of a user's own file, from the command line: the same files as without them."""

import re
import sqlite3
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mitune.config.resolve import write_config
from mitune.config.schema import Config, EvalConfig, ModelConfig
from mitune.evaluation.variant import write_variants
from mitune.run.executors.base import EXECUTORS
from mitune.run.records import Records
from mitune.run.stores.base import STORES
from tests.test_cli_errors import invoke

PAGES = ("own-executor.md", "own-store.md")
DOCS = Path(__file__).parent.parent / "docs"
MINE = """
class Backwards:
    def map(self, task, items):
        for item in reversed(items):
            task([item])
            yield item

class Lazy:
    def map(self, task, items):
        task(items[:1])
        yield items[0]

class Deaf:
    def map(self, items):
        pass

class Keyless:
    def __init__(self, folder):
        pass
    create = read = list = set_aside = lambda self, key: None
"""
TINY = ["--set", "model.steps=2", "--set", "pool.batch_size=4", "--device", "cpu"]
OTHERWISE = ["--executor", "mine:Backwards", "--store", "mine:OneFile"]
POOL = [
    "pool",
    "-p",
    "three.txt",
    "-M",
    "3",
    "-s",
    "self-confidence",
    "-s",
    "random",
    "--set",
    "pool.batch_size=4",
    *TINY,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    examples = [re.search(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.S)[1] for page in PAGES]
    assert all(len(example.splitlines()) < 30 for example in examples)
    (folder / "mine.py").write_text(MINE + "".join(examples))
    (folder / "three.txt").write_text("a red circle\nthree green crosses\na blue square\n")
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    """The current folder, with a user's own file and three prompts."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield folder
    sys.modules.pop("mine", None)


@pytest.fixture
def plain(here):
    """A pool by the executor and the store that need no naming."""
    if not (here / "plain").exists():
        assert invoke(*POOL, "--run", "plain")[0] == 0
    return here / "plain"


def made_of_records(run):
    """What a pool makes once its records are there; the seals repeat it."""
    files = [run / "pool" / "candidates.parquet", *(path for path in (run / "sets").rglob("*") if path.is_file())]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


@pytest.mark.parametrize("name", ["Backwards", "InTime"])
def test_an_executor_makes_the_same_pool_in_its_own_order(plain, name):
    run = plain.parent / name
    status, shown = invoke(*POOL, "--run", run, "--executor", f"mine:{name}")
    assert status == 0 and "Set self-confidence" in shown, shown
    assert made_of_records(run) == made_of_records(plain)


def test_what_an_executor_leaves_is_made_by_the_next_command(plain):
    run = plain.parent / "lazy"
    status, shown = invoke(*POOL, "--run", run, "--executor", "mine:Lazy")
    assert status == 0 and "when all prompts have their records" in shown, shown
    assert len(list((run / "pool" / "records").glob("*.json"))) == 1
    assert invoke(*POOL, "--run", run)[0] == 0
    assert made_of_records(run) == made_of_records(plain)


def test_a_store_keeps_the_records_of_a_pool(plain):
    run = plain.parent / "stored"
    status, shown = invoke(*POOL, "--run", run, "--store", "mine:OneFile", "--shard", "1/2")
    assert status == 0 and "when all prompts have their records" in shown, shown
    assert invoke(*POOL, "--run", run, "--store", "mine:OneFile", "--shard", "2/2")[0] == 0
    assert [path.name for path in (run / "pool" / "records").iterdir()] == ["records.sqlite"]
    assert made_of_records(run) == made_of_records(plain)


def test_a_damaged_record_in_a_store_is_made_again(plain, caplog):
    run = plain.parent / "damaged"
    assert invoke(*POOL, "--run", run, "--store", "mine:OneFile")[0] == 0
    base = sqlite3.connect(run / "pool" / "records" / "records.sqlite", isolation_level=None)
    base.execute("UPDATE records SET content = substr(content, 1, 100) WHERE key = '00001.safetensors'")
    assert invoke(*POOL, "--run", run, "--store", "mine:OneFile")[0] == 0
    assert "Record 00001 is damaged" in caplog.text
    store = STORES.resolve("mine:OneFile", run / "pool" / "records")
    assert Records(store).read(1) is not None
    assert made_of_records(run) == made_of_records(plain)


def test_an_evaluation_takes_both(here):
    config = Config(model=ModelConfig(device="cpu", steps=2), eval=EvalConfig(images=2, batch_size=4))
    tables = []
    for name, more in (
        ("judged", []),
        ("judged-otherwise", ["--executor", "mine:Backwards", "--store", "mine:OneFile"]),
    ):
        run = here / name
        run.mkdir()
        write_config(config, run / "config.yaml")
        write_variants(run, [])
        status, shown = invoke("eval", run, "-p", "three.txt", "--shard", "2/2", *more)
        assert status == 0 and "when all prompts have their images" in shown, shown
        status, shown = invoke("eval", run, "-p", "three.txt", *more)
        assert status == 0 and "Report" in shown, shown
        tables.append((run / "eval" / "images.parquet").read_bytes())
    assert tables[0] == tables[1] and pq.read_table(run / "eval" / "images.parquet").num_rows == 6
    assert [path.name for path in (run / "eval" / "images").rglob("*.*")] == ["records.sqlite"]


@pytest.mark.parametrize(
    ("option", "name", "sentence"),
    [
        ("--executor", "loca", "Unknown executor 'loca' (did you mean local?)"),
        ("--executor", "mine:Forwards", "has no Forwards (did you mean Backwards?)"),
        ("--executor", "mine:MINE", "has no MINE"),
        ("--executor", "mine:sqlite3", "lacks map"),
        ("--executor", "mine:Deaf", "which is called with (task, items); let it take these."),
        ("--store", "mine:Keyless", "which is called with (key, content); let it take these."),
        ("--store", "folders", "Unknown store 'folders' (did you mean folder?)"),
        ("--store", "mine:Lazy", "cannot be made (TypeError: Lazy() takes no arguments)"),
        ("--store", "absent:Store", "needs the module absent"),
    ],
)
def test_names_that_stand_for_nothing_are_refused_before_anything_is_made(here, option, name, sentence):
    for line in (POOL, ["eval", here]):
        status, shown = invoke(*line, *(["--run", "none"] if line == POOL else []), option, name)
        assert (status, sentence in shown) == (2, True), shown
    assert not (here / "none").exists()


def test_the_tables_hold_what_they_name(tmp_path):
    for name in EXECUTORS.rows:
        assert callable(EXECUTORS.resolve(name).map)
    for name in STORES.rows:
        assert STORES.resolve(name, tmp_path).create("a", b"b") and not STORES.resolve(name, tmp_path).create("a", b"c")
