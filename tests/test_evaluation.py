"""Images and their verdict: made prompt by prompt, judged as often as one likes; and what a variant's scale means."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import pyarrow.parquet as pq
import pytest

from mitune.config.schema import Config, EvalConfig, ModelConfig
from mitune.errors import MituneError
from mitune.evaluation.evaluate import evaluate
from mitune.evaluation.images import ImageMaker, make_images
from mitune.evaluation.judging import judge_images
from mitune.evaluation.metrics.base import Judgment
from mitune.evaluation.variant import Variant
from mitune.worlds.base import Listed
from tests.families import CASES
from tests.test_pool import files_of

SCALES = {"base": None, "the same": 2.0, "more": 6.0}


class Content:
    """Likes whatever it sees."""

    name, higher_is_better, bounds = "content", True, (0.0, 1.0)

    def __call__(self, images, prompts):
        return [Judgment(graded=1.0, exact=True, drawn=prompt) for _, prompt in zip(images, prompts, strict=True)]


@pytest.mark.parametrize("family", ["Flux (true CFG)", "SD 1.x, 2.x base (epsilon)"])
def test_guidance_scales(family, tmp_path):
    """A variant's scale is that of the pass with the prompt: the model's own scale again gives the same images."""
    case = CASES[family]
    case.make().save_pretrained(tmp_path / "model")
    model = ModelConfig(name=str(tmp_path / "model"), device="cpu", steps=3, guidance_scale=2.0, call=case.call)
    config = Config(model=model, eval=EvalConfig(images=2, batch_size=2))
    prompts = [Listed(text="a red ball", category="balls", split="test")]
    variants = [Variant(name=name, guidance_scale=scale) for name, scale in SCALES.items()]
    rows = pq.read_table(evaluate(config, prompts, variants, tmp_path / "eval", Content())).to_pylist()
    found = {name: [row["information"] for row in rows if row["variant"] == name] for name in SCALES}
    assert found["the same"] == found["base"]
    assert all(one != other for one, other in zip(found["more"], found["base"], strict=True))


PROMPTS = [Listed(text=text, category="shapes", split="test") for text in ("a red circle", "a blue square", "a cross")]
VARIANTS = [Variant(name="base"), Variant(name="base, guidance 5", guidance_scale=5.0)]


class Half(Content):
    """Is never quite content."""

    name = "half"

    def __call__(self, images, prompts):
        return [Judgment(graded=0.5) for _ in zip(images, prompts, strict=True)]


@pytest.fixture(scope="module")
def config(sd_folder):
    model = ModelConfig(name=str(sd_folder), device="cpu", steps=3, guidance_scale=2.0)
    return Config(model=model, eval=EvalConfig(images=3, batch_size=2))  # batches across prompts


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "eval"
    evaluate(config, PROMPTS, VARIANTS, folder, Content())
    return folder


def test_a_verdict_rests_on_an_image_of_each_seed(whole):
    rows = pq.read_table(whole / "images.parquet").to_pylist()
    assert [(row["variant"], row["prompt"], row["image"]) for row in rows] == [
        (variant.name, listed.text, image) for variant in VARIANTS for listed in PROMPTS for image in range(3)
    ]
    seeds = {name: [row["seed"] for row in rows if row["variant"] == name] for name in ("base", "base, guidance 5")}
    assert seeds["base"] == seeds["base, guidance 5"] and len(set(seeds["base"])) == 9
    assert [bool(row["picture"]) for row in rows] == [row["prompt"] == "a red circle" for row in rows]


def test_a_stopped_evaluation_goes_on_prompt_by_prompt(config, whole, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    @contextmanager
    def kill(title):
        def step(done, _total):
            if "guidance" in title and done == 6:
                raise Killed

        yield step

    made = []
    records = ImageMaker.records
    monkeypatch.setattr(ImageMaker, "records", lambda self, items, on: made.append(items) or records(self, items, on))
    with pytest.raises(Killed):
        evaluate(config, PROMPTS, VARIANTS, tmp_path / "eval", Content(), stages=kill)
    assert made == [[0, 1], [2], [0, 1]]
    evaluate(config, PROMPTS, VARIANTS, tmp_path / "eval", Content())
    assert made[3:] == [[2]]
    assert files_of(tmp_path / "eval") == files_of(whole)


def test_shards_of_an_evaluation_end_with_the_same_files(config, whole, tmp_path):
    folder = tmp_path / "eval"
    assert evaluate(config, PROMPTS, VARIANTS, folder, Content(), shard=(0, 2)) is None
    assert not (folder / "variants").exists()
    assert evaluate(config, PROMPTS, VARIANTS, folder, Content(), shard=(1, 2)) == folder / "images.parquet"
    assert files_of(folder) == files_of(whole)


def test_another_metric_judges_the_same_images(config, whole, tmp_path, monkeypatch, caplog):
    shutil.copytree(whole, tmp_path / "eval")
    before = files_of(tmp_path / "eval" / "images")
    monkeypatch.setattr(ImageMaker, "records", lambda *_: pytest.fail("images were made"))
    rows = pq.read_table(evaluate(config, PROMPTS, VARIANTS, tmp_path / "eval", Half())).to_pylist()
    assert {(row["graded"], row["exact"]) for row in rows} == {(0.5, None)} and "base is judged again" in caplog.text
    assert files_of(tmp_path / "eval" / "images") == before
    evaluate(config, PROMPTS, VARIANTS, tmp_path / "eval", Content())
    assert files_of(tmp_path / "eval") == files_of(whole)


def test_images_that_are_missing_are_named(config, tmp_path):
    texts = [listed.text for listed in PROMPTS]
    assert not make_images(config, texts, VARIANTS[:1], tmp_path / "eval", shard=(0, 2))
    with pytest.raises(MituneError, match="no images of base for 'a blue square'; make them first"):
        judge_images(config, PROMPTS, VARIANTS[:1], tmp_path / "eval", Content())


def test_nothing_to_evaluate_and_a_metric_without_bounds_are_refused(config, tmp_path):
    with pytest.raises(MituneError, match="nothing to evaluate"):
        evaluate(config, PROMPTS, [], tmp_path / "eval", Content())
    boundless = Content()
    boundless.bounds = None
    with pytest.raises(MituneError, match="content has no bounds"):
        evaluate(config, PROMPTS, VARIANTS, tmp_path / "eval", boundless)
    assert not (tmp_path / "eval").exists()
