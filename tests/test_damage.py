"""Whatever happened to a file of a run, the same command makes it again, sets it aside, or names it in a sentence."""

import re
import shutil
from pathlib import Path

import pytest

from mitune.errors import MituneError
from mitune.evaluation.images import folder_name
from mitune.evaluation.variant import Variant
from mitune.run.locks import LOCK
from mitune.tuning import tune
from tests.test_tuning import tiny

GARBLE = {
    "empty": lambda _: b"",
    "cut": lambda content: content[: len(content) // 2],
    "changed": lambda content: content[: len(content) // 2] + b"\x9c" + content[len(content) // 2 + 1 :],
    "of another kind": lambda _: b"[1, 2]",
    "null": lambda _: b"null",
    "zeros": lambda content: bytes(len(content)),
    "folder": None,
}
RECORD = (".json", ".parquet", ".safetensors")
NAMED = ("settings.json",)  # nobody knows what these said
READ_BY_THE_REPORT = ("cost.json", "report.html", "config.yaml", "candidates.parquet", "images.parquet")
KEPT = ("cost.json", "report.html")  # which tell of every try


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with a run, and a copy of it."""
    folder = tmp_path_factory.mktemp("whole")
    tune(tiny(folder), folder / "run")
    shutil.copytree(folder / "run", folder / "copy")
    return folder


@pytest.fixture
def run(whole) -> Path:
    """The run, as it was."""
    shutil.rmtree(whole / "run")
    shutil.copytree(whole / "copy", whole / "run")
    return whole / "run"


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run that is a function of its settings."""
    files = (path for path in run.rglob("*") if path.is_file() and ".damaged" not in str(path.relative_to(run)))
    return {str(path.relative_to(run)): path.read_bytes() for path in files if path.name not in (*KEPT, LOCK)}


def files_of_a_run() -> list[str]:
    """One of each kind, as they lie in a run."""
    pool, training, verdict = "round-1/pool", "round-1/adapters/self-confidence", "eval"
    images = f"{verdict}/images/{folder_name(Variant(name='base'))}"
    return [
        "config.yaml", "settings.json", "variants.json", "cost.json", "report.html", f"{verdict}/settings.json",
        f"{verdict}/images.parquet", f"{verdict}/variants/base.parquet", f"{verdict}/variants/base.json",
        f"{verdict}/pictures/base/00000-0.png", f"{pool}/settings.json", f"{pool}/batch_size.json",
        f"{pool}/candidates.parquet", f"{pool}/seal.json", f"{pool}/extremes/00000-000.png",
        *(f"{folder}/00001{ending}" for folder in (f"{pool}/records", images) for ending in RECORD),
        *(f"round-1/sets/self-confidence/{name}" for name in ("seal.json", "metadata.jsonl", "latents.safetensors")),
        f"{training}/settings.json", f"{training}/README.md",
    ]  # fmt: skip


def test_every_kind_of_file_is_listed(whole):
    def kind(name):
        folder = re.sub("-[0-9a-f]{8}$", "", Path(name).parent.name)  # images lie in VARIANT-CHECKSUM
        return folder.replace("self-confidence", "base"), Path(name).suffix

    listed = {kind(name) for name in files_of_a_run()} | {("checkpoint", ".safetensors")}
    assert {kind(name) for name in contents(whole / "copy")} <= listed


def garble(file: Path, how: str) -> None:
    change = GARBLE[how]
    if change is not None:
        file.write_bytes(change(file.read_bytes()))
    else:
        file.unlink()
        file.mkdir()
        (file / "inner").touch()


SLOW = [pytest.param(how, marks=pytest.mark.slow) for how in GARBLE if how != "changed"]


@pytest.mark.parametrize("how", ["changed", *SLOW])
@pytest.mark.parametrize("name", files_of_a_run())
def test_a_garbled_file(whole, run, name, how, monkeypatch):
    if Path(name).name not in READ_BY_THE_REPORT:  # its drawings take longer than all the rest
        monkeypatch.setattr("mitune.tuning.build_report", lambda run: run / "report.html")
    garble(run / name, how)
    try:
        tune(tiny(whole), run)
    except MituneError as error:
        assert Path(name).name in NAMED or how == "folder", error
        assert Path(name).name in str(error) and str(error).count(". ") == 0
        return
    before, after = contents(whole / "copy"), contents(run)
    assert {name for name in before | after if before.get(name) != after.get(name)} == set()
    assert (run / "report.html").is_file() and (run / "cost.json").is_file()
