"""The studies of scores: kinds of failure follow the judge, figures have known values, a stopped study goes on."""

import math
import random
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mitune.bench.knows import Knowledge, knowledge, markdown, prediction
from mitune.bench.select import SelectConfig, run_study, some_of_each
from mitune.bench.select_figures import gap_figure, tau_figure
from mitune.bench.select_summary import only, summarize_study
from mitune.bench.select_tables import SHOWN, prediction_of, tables_of
from mitune.bench.variants import COMBINATIONS, CONTRASTS, FREE
from mitune.config.schema import ModelConfig
from mitune.errors import MituneError
from mitune.evaluation.metrics.base import BOUND, FAILURES, PLACED, TOO_LITTLE, TOO_MUCH
from mitune.evaluation.statistics import Share, bootstrap_ratio
from mitune.run.store import write_json
from mitune.worlds.shapes.failures import failures_of
from mitune.worlds.shapes.grammar import CATEGORIES, parse
from mitune.worlds.shapes.judge import judge
from mitune.worlds.shapes.metric import ShapesMetric
from mitune.worlds.shapes.negatives import shapes_negatives, wider_negatives
from mitune.worlds.shapes.prompts import prompt_list, shapes_prompts
from mitune.worlds.shapes.scene import parts, render, sample_scene
from tests.test_statistics import cells

PROMPT = "a red circle to the left of a blue square"


@pytest.mark.parametrize(
    ("shown", "failures"),
    [
        (PROMPT, set()),
        ("a red circle to the right of a blue square", {PLACED}),
        ("a blue circle to the left of a red square", {BOUND}),
        ("a blue circle to the right of a red square", {BOUND, PLACED}),
        ("a red circle", {TOO_LITTLE}),
        ("a red circle and two crosses", {TOO_LITTLE, TOO_MUCH}),
        ("three red circles and a blue square", {TOO_MUCH}),
    ],
)
def test_kinds_of_failure(shown, failures):
    scene = sample_scene(parse(shown), random.Random(0))
    assert failures_of(judge(render(scene), PROMPT), parse(PROMPT)) == failures


@pytest.mark.parametrize("category", CATEGORIES)
def test_wider_negatives_are_other_prompts_that_no_scene_fits(category):
    rng = random.Random(0)
    for listed in prompt_list(category)[::8]:
        scene = sample_scene(parse(listed.text), rng)
        texts = [negative.prompt for negative in shapes_negatives(listed.text) + wider_negatives(listed.text)]
        assert len(set(texts)) == len(texts)
        for text in texts:
            assert not all(met for _, met in parts(scene, parse(text))), (listed.text, text)


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_failure_has_a_kind(category):
    rng = random.Random(0)
    for listed in prompt_list(category)[::8]:
        for text in [listed.text, *(negative.prompt for negative in shapes_negatives(listed.text))]:
            verdict = judge(render(sample_scene(parse(text), rng)), listed.text)
            assert verdict.exact == (not failures_of(verdict, parse(listed.text)))


def test_ratio_of_means():
    """Prompts whose gap is small count little: (.1 + .3)/(.2 + .8) rather than the mean of .5 and .375."""
    above, below = np.array([[0.1, 1.0], [0.3, 1.0]]), np.array([[0.2, 0.0], [0.8, 0.0]])
    ratio, none = bootstrap_ratio(above, below, -np.ones((2, 2)), resamples=200)
    assert ratio.value == pytest.approx(0.4)
    assert (ratio.low, ratio.high) == pytest.approx((0.375, 0.5))
    assert math.isnan(none.value) and (ratio.prompts, none.prompts) == (2, 0)


def test_a_ratio_that_all_prompts_share_is_not_certain():
    """All closed, 9 of 9 times: at 97.5 % another prompt differs with probability up to 1 − 0.025^(1/9) = 0.336, and
    then by 0.4 + 0.6 of a gap of 0.4 at most."""
    above = below = np.full((9, 1), 0.4)
    (ratio,) = bootstrap_ratio(above, below, np.full((9, 1), -0.6), resamples=50)
    assert (ratio.value, ratio.high) == (1, 1)
    assert ratio.low == pytest.approx(1 - 0.3363 * 1 / 0.4, abs=1e-3)


def study_rows(prompts=6, candidates=10):
    """Three right candidates a prompt: "truth" puts them first, "wrong" last, "one" is constant, "none" has none."""
    rows = []
    for prompt in range(prompts):
        for j in range(candidates):
            right = j < 3
            kind = FAILURES[j % 2]
            rows.append(
                {"model": "m", "guidance_scale": 2.0, "calls.making": 24.0, "prompt_index": prompt}
                | {"category": CATEGORIES[prompt % 2], "exact": right, "graded": float(right), "malformed": False}
                | {name: not right and name == kind for name in FAILURES if name != "malformed"}
                | {"score.truth": right + j / 100, "score.wrong": -right - j / 100, "score.none": math.nan}
                | {"score.one": 1.0, "score.margin-negatives": right - 0.5}
                | {f"calls.{name}": 2.0 * prompt for name in ("truth", "wrong", "none", "one", "margin-negatives")}
            )
    return rows


def test_figures_of_known_scores():
    result = summarize_study(pa.Table.from_pylist(study_rows()), resamples=200)
    pooled = {quality.score: quality for quality in result.qualities if quality.category == "all"}
    truth, wrong, one = pooled["truth"], pooled["wrong"], pooled["one"]
    assert (truth.top.value, truth.middle.value, truth.last.value, truth.closed.value) == (1, 0, 0, 1)
    assert (wrong.top.value, wrong.last.value) == (0, 1)
    assert wrong.closed.value == pytest.approx(-0.3 / 0.7)
    assert one.closed.value == pytest.approx(0, abs=1e-9)
    assert pooled["none"].top.value == pytest.approx(0.3)
    assert pooled["margin-negatives"].tau.value == pytest.approx(1)
    assert truth.calls == 5.0
    condition = next(c for c in result.conditions if c.category == "all")
    assert (condition.drawn.value, condition.oracle.value) == (pytest.approx(0.3), 1)
    assert condition.right_known.value == condition.wrong_known.value == 1
    assert condition.untied.value == pytest.approx(math.sqrt(3 * 7 / 45))  # of 45 pairs, those of a right and a wrong
    shares = {(d.score, d.failure): d.share.value for d in result.discernments}
    assert {failure for _, failure in shares} == {TOO_MUCH, TOO_LITTLE}
    assert shares["truth", TOO_MUCH] == 1 and shares["wrong", TOO_MUCH] == 0
    assert shares["none", TOO_LITTLE] == shares["one", TOO_LITTLE] == 0.5


def test_tables_and_figures_show_every_score():
    result = summarize_study(pa.Table.from_pylist(study_rows()), resamples=50)
    text = tables_of(result)
    assert text.index("| truth ") < text.index("| one ") < text.index("| wrong ")
    some = only(result, ["truth", "one"])
    assert (
        {quality.score for quality in some.qualities} == {each.score for each in some.discernments} == {"truth", "one"}
    )
    assert "| wrong " not in tables_of(some) and some.conditions == result.conditions
    assert ["m, guidance 2", "color", "1.00", "0.70", "0.70", "0.70"] in cells(prediction_of(result, "truth"))
    for picture in (tau_figure(result), gap_figure(result)):
        assert picture.startswith(b"\x89PNG")


def test_shown_scores_exist():
    assert {*FREE, *CONTRASTS, *COMBINATIONS} >= set(SHOWN)


def test_some_prompts_of_each_category_and_split():
    some = some_of_each(shapes_prompts("heldout"), 4)
    assert len(some) == 4 * len(CATEGORIES)
    assert [p.split for p in some[:4]] == ["seen", "seen", "unseen", "unseen"]


@pytest.mark.slow
def test_a_stopped_study_goes_on(tmp_path):
    """The same table whether or not it was stopped in between; other settings are refused."""
    models = [ModelConfig(name="shapes-sd", device="cpu", steps=3)]
    prompts, config = some_of_each(shapes_prompts("heldout/color"), 2), SelectConfig(candidates=3, draws=2)
    whole = run_study(models, prompts, tmp_path / "whole", config)

    class StoppedError(Exception):
        pass

    def stop(_done, _total):
        raise StoppedError

    with pytest.raises(StoppedError):
        run_study(models, prompts, tmp_path / "stopped", config, progress=stop)
    again = run_study(models, prompts, tmp_path / "stopped", config)
    assert again.read_bytes() == whole.read_bytes()
    table = pq.read_table(whole)
    assert len(table) == 6
    assert "score.self-confidence" in table.column_names and "calls.normalized-negatives" in table.column_names
    with pytest.raises(MituneError, match="candidates"):
        run_study(models, prompts, tmp_path / "whole", SelectConfig(candidates=4, draws=2))


@pytest.mark.slow
def test_knowledge_with_and_without_a_judge(tmp_path):
    models = [ModelConfig(name="shapes-sd", device="cpu", steps=3)]
    prompts = some_of_each(shapes_prompts("heldout/color"), 2)

    def ask(metric, scenes, images=2):
        folder = tmp_path / f"{scenes}"
        return knowledge(
            models, prompts, folder, negatives=shapes_negatives, metric=metric, scenes=scenes, images=images
        )[0]

    judged, unjudged = ask(ShapesMetric(), 3), ask(None, 0)
    assert judged.rendered.trials == 3 and judged.shows.trials == 4
    assert judged.right.trials + judged.wrong.trials == judged.wins.trials == 4
    assert judged.wins == unjudged.wins
    assert (unjudged.rendered, unjudged.shows, unjudged.right, unjudged.wrong, unjudged.semantic) == (None,) * 5
    assert cells(markdown([unjudged]))[-1].count("–") == 5
    assert judged.semantic.trials == judged.shows.trials - judged.shows.hits
    assert judged.kinds["color swapped"].trials == 3
    assert ["color", "shapes-sd", "color swapped"] in [row[:3] for row in cells(markdown([judged]))]
    file = tmp_path / "3" / "knowledge.json"
    write_json(file, [asdict(replace(judged, rendered=Share(hits=7, trials=9)))])
    assert ask(ShapesMetric(), 3).rendered == Share(hits=7, trials=9)  # read, not made again
    with pytest.raises(MituneError, match="images"):
        ask(ShapesMetric(), 3, images=1)
    file.write_text("[{")
    with pytest.raises(MituneError, match="knowledge.json is damaged"):
        ask(ShapesMetric(), 3)


def test_no_candidates_no_study():
    with pytest.raises(MituneError, match="at least 2"):
        SelectConfig(candidates=1)


def known_of(category, wrong=1):
    half = Share(hits=1, trials=2)
    return Knowledge(
        model="m", category=category, guidance_scale=2.0, rendered=None, shows=half, right=half,
        wrong=Share(hits=wrong, trials=2), semantic=half, wins=half,
    )  # fmt: skip


def test_a_table_of_knowledge():
    *where, right = cells(markdown([known_of("color")]))[-1][:5]
    assert where == ["color", "m", "2", "–"] and right.startswith("0.500 [")


def test_what_was_promised_is_held_against_what_was_gained():
    """By the first selection, at the guidance scale of the candidates."""
    right = {"base": (0, 0), "contrast": (1, 2), "random": (2, 0)}  # of two images, by category
    rows = [
        {
            "model": "m", "guidance_scale": scale, "variant": variant, "prompt": category, "category": category,
            "split": "seen", "image": image, "seed": image, "exact": scale == 2 and image < count, "graded": 1.0,
            "malformed": False,
        }
        for scale in (2.0, 4.0)
        for variant, counts in right.items()
        for category, count in zip(("color", "shape"), counts, strict=True)
        for image in range(2)
    ]  # fmt: skip
    study = pa.Table.from_pylist(rows)
    shown = prediction([known_of("color"), known_of("shape", wrong=2)], [study])
    promised = [(row[3], row[4].lstrip("*")[:6]) for row in cells(shown) if row[0] in ("color", "shape")]
    assert promised == [("0.250", "+0.500"), ("0.500", "+1.000")]
    assert "`contrast`" in shown and "2 rows: 1.00" in shown
    with pytest.raises(MituneError, match="shares no model"):
        prediction([known_of("numeracy")], [study])
