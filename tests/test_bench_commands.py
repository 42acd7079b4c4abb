"""Every study runs from the command line, at a size at which its figures say nothing, and says what made its tables."""

import pytest
from PIL import Image

from mitune.cli import app
from mitune.worlds.shapes.prompts import shapes_prompts
from tests.test_statistics import cells

SMALL = "-m shapes-sd --set model.steps=2"
COMMANDS = {
    "mi": "bench mi --tasks 1v1-normal-0.75 --estimators CCA --n 100,200 --results {run}.parquet -o {out}",
    "knows": f"bench knows {SMALL} -p shapes:heldout/shape --scenes 2 -n 1 -r {{run}} -o {{out}}",
    "check": f"shapes check {SMALL} --category shape --scenes 2 --images 1 --run {{run}} -o {{out}}",
    "select": f"bench select {SMALL} -p shapes:heldout/shape --per-category 2 -M 4 --draws 2 -r {{run}}",
    "reward": f"bench reward {SMALL} -p shapes:train/shape --per-category 1 -M 4 -r {{run}} -o {{out}}",
    "race": f"bench race {SMALL} --steps 4 -p shapes:heldout/shape --per-category 2 -M 8 -r {{run}} -o {{out}}",
    "truth": f"bench truth {SMALL} --scenes 2 --draws 4 -o {{out}}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_runs_and_names_itself(name, tmp_path, monkeypatch):
    monkeypatch.setattr("mitune.worlds.shapes.truth_study.WORLD_SCENES", 16)
    monkeypatch.setattr("mitune.worlds.shapes.truth_tables.RESAMPLES", 10)
    out = tmp_path / "run" / "summary.md" if name == "select" else tmp_path / "table.md"
    command = COMMANDS[name].format(run=tmp_path / "run", out=out)
    app(command.split(), standalone_mode=False)
    text = out.read_text(encoding="utf-8")
    verb = " ".join(command.split()[:2])
    assert f"ade by `mitune {verb} " in text
    line = next(line for line in text.splitlines() if f"mitune {verb} " in line)
    if name != "mi":
        assert "--model shapes-sd" in line and "--set model.steps=2" in line
    assert str(tmp_path) in line and "None" not in line
    tables = [row for row in cells(text) if len(row) > 2]
    assert len(tables) > 3 and "nan" not in text


def test_prompts_are_listed(capsys):
    app(["shapes", "prompts", "heldout/color"], standalone_mode=False)
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(shapes_prompts("heldout/color"))


@pytest.mark.slow
def test_a_figure_is_drawn(tmp_path):
    app(["shapes", "figure", str(tmp_path / "samples.png"), "-n", "1"], standalone_mode=False)
    assert Image.open(tmp_path / "samples.png").width > 64
