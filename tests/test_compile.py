"""torch.compile changes how the denoiser is computed, and nothing that depends on it."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from mitune.config.schema import GRADUAL, FinetuneConfig, ModelConfig
from mitune.denoiser.opening.models import load_model
from mitune.denoiser.sampling import Request, generate
from mitune.errors import MituneError
from mitune.finetuning.run import finetune
from mitune.pool.race import Race
from tests.sets import write_set
from tests.test_finetuning import largest_difference, rows_of, weights_of
from tests.tiny import PROMPTS, saved_pipeline

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs the C++ compiler g++")


@pytest.mark.slow
@needs_compiler
def test_images_and_adapter_are_those_of_the_plain_model(tmp_path):
    model = replace(saved_pipeline("sd3", tmp_path / "sd3"), device="cpu", guidance_scale=3.0, steps=4)
    compiled = replace(model, compile=True)
    requests = [Request(prompt=prompt, seed=seed) for prompt in PROMPTS for seed in range(4)]
    plain, fused = (generate(load_model(config), requests, 4) for config in (model, compiled))
    torch.testing.assert_close(fused.latents, plain.latents, rtol=1e-3, atol=1e-3)
    race = Race(rungs=GRADUAL, scores=("rfmi",), candidates=4, keep=1)
    raced = generate(load_model(compiled), requests, 4, race.drop)
    left = [place for place, step in enumerate(raced.dropped) if not step]
    assert len(left) == 2
    assert torch.equal(raced.latents[left], fused.latents[left])

    config = FinetuneConfig(adapter="lora", rank=2, batch_size=4, iterations=3, learning_rate=1e-2)
    dataset = write_set("sd3", tmp_path / "set")
    for name, settings in (("plain", model), ("fused", compiled)):
        finetune(settings, dataset, tmp_path / name, config)
    losses = [[row["loss"] for row in rows_of(tmp_path / name)] for name in ("plain", "fused")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert largest_difference(weights_of(tmp_path / "plain"), weights_of(tmp_path / "fused")) < 1e-3


@pytest.mark.slow
def test_without_a_compiler_it_is_refused_at_the_start(tmp_path):
    # In a process of its own, as torch remembers the compiler that it has once found.
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    program = "from mitune.cli import main; main()"
    settings = ["--set", "model.compile=true", "--set", "model.device=cpu"]
    done = subprocess.run(
        [sys.executable, "-c", program, "pool", "--prompts", "prompts.txt", *settings],
        cwd=tmp_path,
        env={**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2
    assert "nothing to compile with for cpu; install a C++ compiler such as g++" in " ".join(done.stderr.split())


def test_offload_part_by_part_leaves_nothing_to_compile():
    with pytest.raises(MituneError, match="set model.offload to model or none"):
        ModelConfig(compile=True, offload="sequential")
