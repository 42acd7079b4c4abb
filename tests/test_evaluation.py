"""The verdict's pictures, on pipelines whose guidance has another name."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from mitune.config.schema import Config, EvalConfig, ModelConfig
from mitune.evaluation.evaluate import evaluate
from mitune.evaluation.metrics.base import Judgment
from mitune.evaluation.variant import Variant
from mitune.worlds.base import Listed
from tests.families import CASES

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
