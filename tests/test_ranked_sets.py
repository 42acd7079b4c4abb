"""Ranked sets: the best and the worst of each prompt, with advantages that add up to nothing."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from mitune.config.schema import Config, FinetuneConfig, PoolConfig
from mitune.denoiser.opening.models import Model, load_model
from mitune.denoiser.sampling import Request, candidate_seed, generate
from mitune.errors import MituneError
from mitune.finetuning.dataset import TrainingSet
from mitune.finetuning.objectives.base import pool_settings
from mitune.finetuning.run import finetune
from mitune.pool.advantage import advantages, best_and_worst
from mitune.pool.build import build_pool
from mitune.pool.evidence import gather
from tests.tiny import saved_pipeline, tiny_sd

PROMPTS = ["a red circle", "a blue square", "two green crosses"]
CONFIG = PoolConfig(candidates=5, select=("self-confidence", "random"), batch_size=4, ranked=1)


class TestAdvantages:
    def test_two_against_one(self):
        """s − mean is (1/3, 1/3, −2/3), its root mean square √2/3, so the clipped are (1/√2, 1/√2, −1)."""
        expected = np.array([2**-0.5, 2**-0.5, -1.0])
        assert advantages([5, 5, 4], [0, 0, 0]) == pytest.approx(expected - expected.mean())

    def test_add_up_to_nothing_a_prompt(self):
        scores = np.random.default_rng(0).standard_normal(60) * 5
        prompts = np.repeat([3, 1, 2], 20)
        values = np.array(advantages(scores.tolist(), prompts.tolist()))
        for prompt in (1, 2, 3):
            assert abs(values[prompts == prompt].sum()) < 1e-12
            in_order = values[prompts == prompt][np.argsort(scores[prompts == prompt])]
            assert (np.diff(in_order) >= 0).all() and in_order[0] < 0 < in_order[-1]

    def test_what_differs_between_prompts_or_in_scale_does_not_count(self):
        scores, prompts = np.random.default_rng(0).standard_normal(12), np.repeat([0, 1, 2], 4)
        moved = 7 * scores + 100 * prompts
        assert advantages(moved.tolist(), prompts.tolist()) == pytest.approx(
            advantages(scores.tolist(), prompts.tolist())
        )

    def test_equal_scores_have_none(self):
        assert advantages([2.0, 2.0, 7.0], [0, 0, 1]) == [0, 0, 0]


@pytest.mark.parametrize(
    ("count", "members"), [(1, [4, 2]), (2, [4, 3, 1, 2]), (3, [4, 3, 0, 1, 2]), (9, [4, 3, 0, 1, 2])]
)
def test_best_and_worst(count, members):
    assert best_and_worst([4, 3, 0, 1, 2], count) == members


@pytest.fixture(scope="module")
def model():
    return Model(tiny_sd(), {"guidance_scale": 3.0, "num_inference_steps": 4}, "tiny-sd")


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_set_holds_best_and_worst_with_scores_and_latents(model, tmp_path):
    result = build_pool(model, PROMPTS, tmp_path / "pool", CONFIG)
    table = pq.read_table(result.table).to_pandas()
    for slug, folder in result.sets.items():
        rows, latents = rows_of(folder), load_file(folder / "latents.safetensors")["latents"]
        assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(2)]
        assert all((folder / row["file_name"]).is_file() for row in rows)
        images = TrainingSet.read(folder)
        assert images.is_ranked and images.advantages.tolist() == pytest.approx([row["advantage"] for row in rows])
        for prompt, mine in table.groupby("prompt"):
            members = [row for row in rows if row["prompt"] == prompt]
            assert sum(row["advantage"] for row in members) == pytest.approx(0)
            if slug == "self-confidence":
                scores = mine["score.self-confidence"]
                assert sorted(row["score"] for row in members) == [scores.min(), scores.max()]
                assert mine[f"kept.{slug}"].sum() == 1
                assert mine.loc[mine[f"kept.{slug}"], "score.self-confidence"].item() == scores.max()
        for row, stored in zip(rows, latents, strict=True):
            seed = candidate_seed(0, row["prompt"], row["candidate"])
            made = generate(model, [Request(prompt=row["prompt"], seed=seed)], 4).latents[0]
            torch.testing.assert_close(stored, made, rtol=0, atol=1e-4 * made.std().item())


def test_candidates_without_a_score_are_in_no_ranked_set(model, tmp_path):
    """`contrast` asks again about the best by self-confidence alone: two of five here."""
    result = build_pool(model, PROMPTS, tmp_path / "pool", replace(CONFIG, select=("contrast",), ranked=5))
    scores = pq.read_table(result.table)["score.contrast"].to_numpy()
    rows = rows_of(result.sets["contrast"])
    assert [row["score"] for row in rows] == scores[np.isfinite(scores)].tolist()
    assert 0 < len(rows) < len(scores)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"race": ((0.25, 0.5),), "select": ("self-confidence",)}, "a ranked set needs the worst of them finished"),
        ({"select": ("self-confidence>=0",)}, "names a threshold, but a ranked set holds the worst"),
    ],
)
def test_what_a_ranked_set_cannot_be_made_with_is_refused(changes, sentence, model, tmp_path):
    with pytest.raises(MituneError, match=sentence):
        build_pool(model, PROMPTS, tmp_path / "pool", replace(CONFIG, **changes))


def test_objective_decides_what_the_pool_ranks():
    ranked = Config(finetune=FinetuneConfig(objective="advantage"), pool=PoolConfig(candidates=7))
    assert pool_settings(ranked).ranked == 7
    assert pool_settings(replace(ranked, pool=PoolConfig(ranked=2))).ranked == 2
    assert pool_settings(Config()).ranked is None


def test_scores_are_those_of_the_base_unless_told_otherwise(tmp_path):
    """`fits` asks the model again: the base about what an adapter made, as if that had made it itself."""
    config = saved_pipeline("sd", tmp_path / "model")
    config = replace(config, device="cpu", guidance_scale=3.0, steps=4)
    prompts = ["a red ball", "two blue cubes"]
    settings = PoolConfig(candidates=4, select=("self-confidence", "fits"), batch_size=4, ranked=4)
    dataset = build_pool(load_model(config), prompts, tmp_path / "pool", settings).sets["self-confidence"]
    training = FinetuneConfig(
        objective="advantage", adapter="lora", rank=4, batch_size=4, iterations=3, learning_rate=0.3
    )
    adapter = finetune(config, dataset, tmp_path / "adapter", training).adapter
    tuned = load_model(config, adapter=adapter)

    tables = {}
    for name in ("base", "present"):
        own = replace(settings, select=("tests.test_ranked_sets:denoising_error",), scored_by=name)
        tables[name] = pq.read_table(build_pool(tuned, prompts, tmp_path / name / "pool", own).table).to_pandas()
        latents = load_file(next((tmp_path / name / "sets").iterdir()) / "latents.safetensors")["latents"]
        asked = load_model(config, adapter=adapter if name == "present" else None)
        expected = torch.cat([errors_of(asked, part, p) for p, part in zip(prompts, latents.split(4), strict=True)])
        errors = torch.tensor(tables[name]["score.tests.test_ranked_sets:denoising_error"])
        torch.testing.assert_close(errors, expected.double(), rtol=1e-5, atol=0)
    confidence = [table["score.self-confidence"] for table in tables.values()]
    assert (confidence[0] == confidence[1]).all()  # of the sampling, which the adapter did both times


def denoising_error(candidates):
    """A score that depends on who is asked."""
    return errors_of(candidates.model, candidates.latents, candidates.prompt)


def errors_of(model, latents, prompt):
    return gather(model, latents, prompt, {}, seed=0, batch_size=4).errors.sum(dim=(1, 2))
