"""What a pool selects by: scores of its table, the user's own, and the user's hard negatives."""

import json
import math
import random
import sys
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mitune.bench.variants import COMBINATIONS
from mitune.config.schema import Config, ModelConfig, PoolConfig
from mitune.denoiser.opening.identity import settings_that_matter
from mitune.denoiser.opening.models import Model
from mitune.errors import MituneError
from mitune.evaluation.metrics.base import Judgment
from mitune.methods.mi_tune import _pools
from mitune.pool.build import build_pool
from mitune.pool.evidence import gather
from mitune.pool.scores import CONTRAST, FITS, Candidates, score_named, scores_of
from mitune.pool.selection import parse_rule
from mitune.prompts.rivals import NEGATIVES, WORDS, rivals_of
from mitune.tuning import tune
from mitune.worlds.shapes.grammar import parse
from mitune.worlds.shapes.metric import ShapesMetric
from mitune.worlds.shapes.scene import render, sample_scene
from tests.tiny import SD3_CALL, tiny_sd, tiny_sd3

PROMPT = "a red circle and a blue square"


@pytest.fixture(params=["sd", "sd3"])
def model(request):
    extra = SD3_CALL if request.param == "sd3" else {}
    pipe = tiny_sd3() if request.param == "sd3" else tiny_sd()
    return Model(pipe, {"guidance_scale": 3.0, "num_inference_steps": 4, **extra}, request.param)


def candidates_of(model, latents, online, rivals, keep=1):
    return Candidates(
        model=model, prompt="a red ball", rivals=rivals, latents=latents, trace=None, online=online, keep=keep, seed=0,
        batch_size=64,
    )  # fmt: skip


RIVALS = {NEGATIVES: ["a blue ball", "two red cubes"], WORDS: ["a ball"]}


def test_paying_for_what_is_needed_alone_changes_nothing(model):
    """As in the study, where all rivals, levels and candidates are known."""
    latents = torch.randn(7, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    online = {"self-confidence": torch.arange(7.0)}
    evidence = gather(model, latents, "a red ball", RIVALS)
    candidates = candidates_of(model, latents, online, RIVALS)
    torch.testing.assert_close(candidates.contrast(FITS), FITS(evidence))
    staged = CONTRAST(candidates)
    assert staged.isfinite().nonzero().flatten().tolist() == [5, 6]
    torch.testing.assert_close(staged[5:], CONTRAST.contrast(evidence)[5:], rtol=1e-3, atol=1e-4)
    two = CONTRAST(candidates_of(model, latents, online, RIVALS, keep=2))
    assert two.isfinite().nonzero().flatten().tolist() == [3, 4, 5, 6]  # two for each that will be picked
    assert staged.nan_to_num(-math.inf).argmax() == COMBINATIONS["contrast"](online, evidence).argmax()


def test_without_rivals_the_online_score_decides(model):
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    online = {"self-confidence": torch.tensor([0.1, 0.4, math.nan, 0.3, 0.2])}
    candidates = candidates_of(model, latents, online, {NEGATIVES: []})
    torch.testing.assert_close(CONTRAST(candidates), online["self-confidence"].double(), equal_nan=True)
    assert score_named("fits")(candidates).isnan().all()


@pytest.mark.parametrize(("name", "paid"), [("fits", 8), ("contrast", 2), ("reward", 8)])
def test_a_pool_selects_by_its_own_column(model, tmp_path, name, paid):
    config = PoolConfig(candidates=8, keep=1, select=(name,), batch_size=8, race="off")
    rows = pq.read_table(build_pool(model, ["a circle and a square"], tmp_path / "pool", config).table).to_pydict()
    values = torch.tensor(rows[f"score.{name}"])
    assert values.isfinite().sum() == paid
    assert values[rows[f"kept.{name}"].index(True)] == values.nan_to_num(-math.inf).max()


def test_a_tie_changes_no_stored_value(model, tmp_path, monkeypatch):
    """With every candidate at the ceiling, a threshold of 1 keeps the most self-confident k of them."""
    monkeypatch.setattr(Candidates, "contrast", lambda self, _contrast, _places: self.online["mi-tune"] * 0 + 1)
    config = PoolConfig(candidates=8, keep=3, select=("contrast>=1",), batch_size=8, race="off")
    rows = pq.read_table(build_pool(model, [PROMPT], tmp_path / "pool", config).table).to_pydict()
    assert rows["score.contrast"] == [1.0] * 8
    confidence = torch.tensor(rows["score.self-confidence"])
    kept = torch.tensor(rows["kept.contrast-from-1"]).nonzero().flatten().tolist()
    assert kept == sorted(confidence.topk(3).indices.tolist())


MINE = """
def pair(one, other):
    return one

def sharp(candidates):
    return candidates.latents.flatten(1).std(dim=1)
def rival(candidates):
    return [float("ball" in text) for text in candidates.rivals["negatives"]] * 4
def short(candidates):
    return [1.0]
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_scores.py").write_text(MINE)
    yield
    sys.modules.pop("my_scores", None)


@pytest.mark.usefixtures("mine")
def test_a_score_of_ones_own(model, tmp_path):
    config = PoolConfig(candidates=4, keep=1, select=("my_scores:sharp", "mi-tune"), batch_size=4)
    result = build_pool(model, [PROMPT], tmp_path / "pool", config)
    rows = pq.read_table(result.table).to_pydict()
    values = rows["score.my_scores:sharp"]
    assert rows["kept.my-scores-sharp"].index(True) == values.index(max(values))
    assert list(result.sets) == ["my-scores-sharp", "mi-tune"]


def test_a_metric_selects(model, tmp_path):
    """By its name, or one's own; the judge of the world gives what the oracle has."""
    config = PoolConfig(candidates=4, select=("shapes", "tests.test_scores:Darkness"), batch_size=4)
    rows = pq.read_table(
        build_pool(model, [PROMPT], tmp_path / "pool", config, metric=ShapesMetric()).table
    ).to_pydict()
    assert rows["score.shapes"] == rows["score.oracle"]
    darkness = rows["score.tests.test_scores:Darkness"]
    assert len(set(darkness)) == 4 and rows["kept.tests.test-scores-Darkness"].index(True) == darkness.index(
        max(darkness)
    )
    with pytest.raises(MituneError, match="a lighthouse"):
        build_pool(model, ["a lighthouse"], tmp_path / "other", replace(config, select=("shapes",)))
    assert not (tmp_path / "other").exists()


class Darkness:
    """A metric of one's own: the lower the brighter."""

    name, higher_is_better, bounds = "darkness", False, (0.0, 255.0)

    def __call__(self, images, _prompts):
        return [Judgment(graded=float(np.asarray(image).mean())) for image in images]


@pytest.mark.usefixtures("mine")
def test_a_score_that_takes_other_arguments_is_refused():
    with pytest.raises(MituneError, match=r"has pair\(one, other\) \(/.*my_scores.py:2\), which is called with \(ca"):
        score_named("my_scores:pair")


@pytest.mark.usefixtures("mine")
def test_a_score_of_ones_own_from_the_command_line(tmp_path):
    from mitune.cli import app

    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n")
    command = ["pool", "-m", "shapes-sd", "-p", "prompts.txt", "-M", "2", "-s", "my_scores:sharp@0.5"]
    app([*command, "--set", "model.steps=2", "-r", str(tmp_path / "run")], standalone_mode=False)
    assert (tmp_path / "run" / "sets" / "my-scores-sharp-upper-0.5" / "metadata.jsonl").is_file()


@pytest.mark.usefixtures("mine")
def test_mistakes_in_a_score_are_named(model, tmp_path):
    with pytest.raises(MituneError, match="Unknown score 'contrats' .*did you mean contrast"):
        build_pool(model, [PROMPT], tmp_path / "pool", PoolConfig(select=("contrats",)))
    config = PoolConfig(candidates=2, select=("my_scores:short",), batch_size=2)
    with pytest.raises(MituneError, match=r"my_scores:short returned values of shape \(1,\) for 2 candidates"):
        build_pool(model, [PROMPT], tmp_path / "pool", config)
    with pytest.raises(MituneError, match="my-scores-sharp', which needs all of them finished"):
        build_pool(model, [PROMPT], tmp_path / "pool", replace(config, select=("my_scores:sharp",), race=((0.5, 0.5),)))


class TestNegatives:
    """The user's own hard negatives take the place of those that rules make."""

    @pytest.fixture
    def file(self, tmp_path):
        path = tmp_path / "negatives.jsonl"
        path.write_text(json.dumps({"prompt": PROMPT, "negatives": ["a ball"]}) + "\n")
        return path

    @pytest.mark.usefixtures("mine")
    def test_they_reach_the_scores(self, model, tmp_path, file):
        config = PoolConfig(candidates=4, select=("my_scores:rival", "contrast"), batch_size=4, negatives=str(file))
        rows = pq.read_table(build_pool(model, [PROMPT], tmp_path / "pool", config).table).to_pydict()
        assert rows["score.my_scores:rival"] == [1.0] * 4
        other = pq.read_table(
            build_pool(model, [PROMPT], tmp_path / "other", replace(config, negatives=None, select=("contrast",))).table
        ).to_pydict()
        assert rows["score.contrast"] != other["score.contrast"]
        assert rivals_of(PROMPT, [])[NEGATIVES] != ["a ball"]

    def test_a_folder_depends_on_what_is_in_the_file(self, model, tmp_path, file):
        config = PoolConfig(candidates=2, select=("contrast",), batch_size=2, negatives=str(file))
        build_pool(model, [PROMPT], tmp_path / "pool", config)
        again = file.rename(tmp_path / "moved.jsonl")
        assert settings_that_matter(replace(config, negatives=str(again))) == json.loads(
            (tmp_path / "pool" / "settings.json").read_text()
        )["pool"] | {"select": ("contrast",)}
        again.write_text(json.dumps({"prompt": PROMPT, "negatives": ["a cube"]}) + "\n")
        with pytest.raises(MituneError, match=r"other settings \(pool.negatives"):
            build_pool(model, [PROMPT], tmp_path / "pool", replace(config, negatives=str(again)))
        assert "negatives" in settings_that_matter(PoolConfig())

    @pytest.mark.parametrize(
        ("select", "prompt", "sentence"),
        [
            ("self-confidence", PROMPT, "no score of pool.select asks for hard negatives; leave it out"),
            ("random", PROMPT, "no score of pool.select asks for hard negatives; leave it out"),
            ("contrast", "a cat", "hard negatives for none of the prompts"),
        ],
    )
    def test_what_nothing_needs_is_refused(self, model, tmp_path, file, select, prompt, sentence):
        config = PoolConfig(candidates=2, select=(select,), negatives=str(file))
        with pytest.raises(MituneError, match=sentence):
            build_pool(model, [prompt], tmp_path / "pool", config)
        assert not (tmp_path / "pool").exists()

    def test_a_run_refuses_them_before_it_begins(self, tmp_path, file):
        settings = Config(
            model=ModelConfig(device="cpu"),
            pool=PoolConfig(select=("mi-tune",), negatives=str(file)),
            prompts="shapes:train",
        )
        with pytest.raises(MituneError, match="no score of pool.select"):
            tune(settings, tmp_path / "run")
        absent = replace(settings, pool=PoolConfig(negatives=str(tmp_path / "absent.jsonl")))
        with pytest.raises(MituneError, match="There is no file"):
            tune(absent, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_in_later_rounds_only_who_needs_them_has_them(self, tmp_path, file):
        config = PoolConfig(select=("contrast", "random"), negatives=str(file))
        adapters = {rule.slug: tmp_path for rule in map(parse_rule, config.select)}
        assert [pool.negatives for _, _, pool in _pools(config, adapters)] == [str(file), None]


def test_the_table_names_each_score_once():
    scores = scores_of(map(parse_rule, ["contrast", "mi-tune@0.5", "random", "oracle"]))
    assert {name: score.online for name, score in scores.items()} == {
        "contrast": "self-confidence", "mi-tune": "mi-tune"
    }  # fmt: skip


def test_score_against_hard_negatives_from_the_command_line(tmp_path, capsys):
    from mitune.cli import app

    picture, file = tmp_path / "picture.png", tmp_path / "negatives.jsonl"
    Image.fromarray(render(sample_scene(parse(PROMPT), random.Random(0)))).save(picture)
    file.write_text(json.dumps({"prompt": PROMPT, "negatives": ["two crosses", "a green diamond"]}) + "\n")
    command = ["score", str(picture), PROMPT, "-m", "shapes-sd", "--estimator", "contrast"]
    app([*command, "--negatives", str(file)], standalone_mode=False)
    first, second, least = capsys.readouterr().out.splitlines()
    ratios = [float(line.split()[0]) for line in (first, second)]
    assert first.endswith("against two crosses") and second.endswith("against a green diamond")
    assert min(ratios) > 0.5  # a scene of the prompt
    assert least == f"contrast {min(1.0, *ratios):.3f}"
    app([*command[:-1], "standard", "--negatives", str(file)], standalone_mode=False)
    assert "is for --estimator contrast alone" in capsys.readouterr().err
