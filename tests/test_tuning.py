"""A whole run: what it goes on with, what it refuses at once, and what it leaves when its verdict fails."""

from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import yaml

import mitune.tuning
from mitune.config.schema import Config, EvalConfig, FinetuneConfig, ModelConfig, PoolConfig
from mitune.denoiser.opening.models import model_folder
from mitune.errors import MituneError
from mitune.run.locks import LOCK
from mitune.run.sealed import pack, unpack
from mitune.tuning import judge_run, tune


def tiny(tmp_path, **changes) -> Config:
    """Seconds on an embedded model."""
    (tmp_path / "prompts.txt").write_text("a red circle\nthree green crosses\n")
    config = Config(
        model=ModelConfig(device="cpu", steps=2),
        pool=PoolConfig(candidates=3, select=("self-confidence",), race="off"),
        finetune=FinetuneConfig(adapter="lora", rank=2, alpha=2.0, batch_size=2, iterations=2, checkpoint_every=1),
        eval=EvalConfig(images=1, batch_size=4),
        prompts=str(tmp_path / "prompts.txt"),
        eval_prompts=str(tmp_path / "prompts.txt"),
    )
    return replace(config, **changes)


@pytest.fixture
def unjudged() -> ModelConfig:
    """A model without a judge, as its name is no embedded one."""
    return ModelConfig(name=model_folder("shapes-sd"), device="cpu", steps=2, guidance_scale=2.0)


def test_eval_prompts_without_a_judge_are_refused_before_anything_is_made(tmp_path, unjudged):
    with pytest.raises(MituneError, match="comes with a judge; name a metric with --metric"):
        tune(tiny(tmp_path, model=unjudged), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_verdict_that_fails_does_not_cost_the_report(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise MituneError("The judge is ill.")

    config, run = tiny(tmp_path), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(mitune.tuning, "evaluate", fail)
        with pytest.raises(MituneError, match="The judge is ill"):
            tune(config, run)
    assert "three green crosses" in (run / "report.html").read_text("utf-8")
    assert tune(config, run).verdict == run / "eval" / "images.parquet"


def test_goes_on_with_settings_that_no_result_depends_on(tmp_path):
    config, run = tiny(tmp_path), tmp_path / "run"
    tune(config, run)
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    (tmp_path / "same.txt").write_text((tmp_path / "prompts.txt").read_text())
    other = replace(
        config,
        pool=replace(config.pool, batch_size=2),
        finetune=replace(config.finetune, micro_batch_size=1, checkpoint_every=7),
        eval=replace(config.eval, batch_size=1, guidance_scales=(3.0,)),
        prompts=str(tmp_path / "same.txt"),
    )
    table = pq.read_table(tune(other, run).verdict)
    assert set(table["variant"].to_pylist()) == {"base", "self-confidence", "base, guidance 3"}
    after = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    further = {path for path in after if path.parent.name.startswith("base-guidance-3-")}  # the new variant's images
    assert len(further) == 2 and {path: after[path] for path in after.keys() - further} == before
    assert yaml.safe_load((run / "config.yaml").read_text())["finetune"]["micro_batch_size"] == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": ModelConfig(device="cpu", steps=2, dtype="bfloat16")}, 'dtype: "float32" there, "bfloat16" now'),
        ({"model": ModelConfig(device="cpu", steps=3)}, "model.call.num_inference_steps: 2 there, 3 now"),
        ({"model": ModelConfig(name="shapes-sd3", device="cpu", steps=2)}, "model.parts.pipeline"),
        ({"pool": PoolConfig(candidates=4, select=("self-confidence",))}, "pool.candidates: 3 there, 4 now"),
        ({"finetune": FinetuneConfig(batch_size=2, iterations=2)}, "finetune.adapter"),
        ({"round_prompts": 1}, "round_prompts: null there, 1 now"),
    ],
)
def test_other_settings_are_refused(tmp_path, changes, sentence):
    config, run = tiny(tmp_path, eval_prompts=None), tmp_path / "run"
    run.mkdir()
    prompts = ["a red circle", "three green crosses"]
    mitune.tuning.claim_run(run, config, prompts)
    written = (run / "config.yaml").read_bytes()
    with pytest.raises(MituneError, match=sentence):
        mitune.tuning.claim_run(run, replace(config, **changes), prompts)
    assert (run / "config.yaml").read_bytes() == written


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(MituneError, match="not empty and holds no run"):
        tune(tiny(tmp_path), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_another_adapter_is_judged_again(tmp_path, caplog):
    config, run = tiny(tmp_path), tmp_path / "run"
    tune(config, run)
    variants = run / "eval" / "variants"
    before = {path.name: path.read_bytes() for path in variants.glob("*.json")}
    adapter = run / "round-1" / "adapters" / "self-confidence" / "pytorch_lora_weights.safetensors"
    tensors, notes = unpack(adapter.read_bytes())
    adapter.write_bytes(pack({name: 2 * tensor for name, tensor in tensors.items()}, notes))
    judge_run(config, run)
    assert "self-confidence is judged again" in caplog.text
    after = {path.name: path.read_bytes() for path in variants.glob("*.json")}
    assert {name for name in before if before[name] != after[name]} == {"self-confidence.json"}
    assert (run / LOCK).exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rank": 129}, "finetune.rank = 129 is above the width of most layers of this UNet2DConditionModel, 128"),
        ({"precision": "fp16"}, "finetune.precision = fp16 needs a GPU"),
    ],
)
def test_training_that_cannot_be_is_refused_before_anything_is_made(tmp_path, changes, sentence):
    config = tiny(tmp_path)
    with pytest.raises(MituneError, match=sentence):
        tune(replace(config, finetune=replace(config.finetune, **changes)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
