"""A pipeline whose parts wait until they are called, by accelerate's hooks, gives the same numbers as another."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from mitune.config.schema import PoolConfig
from mitune.denoiser.batches import called_through, constant_batches, texts_encoded_once
from mitune.denoiser.network import execution_device
from mitune.denoiser.opening.models import Model
from mitune.denoiser.pictures import decode, encode_images
from mitune.denoiser.sampling import Request, generate
from mitune.finetuning.dataset import TrainingSet
from mitune.pool.build import build_pool
from mitune.pool.evidence import gather
from mitune.scoring import score
from tests.families import CASES

PROMPTS = ["a red ball", "two blue cubes"]


def layer_by_layer(pipe):
    """What `enable_sequential_cpu_offload` does, but for a CPU, which has no index as GPUs have."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)


OFFLOADS = {
    "none": lambda _: None,
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": layer_by_layer,
}
FAMILIES = ["SD 1.x, 2.x base (epsilon)", "SDXL", "SD3, SD3.5", "Flux (true CFG)"]


def opened(family, offload, dtype=torch.float32):
    case = CASES[family]
    pipe = case.make().to(dtype=dtype)
    OFFLOADS[offload](pipe)
    return Model(pipe, case.call | {"num_inference_steps": 4, case.guidance: 3.0}, "tiny")


def numbers(model):
    """Whatever mitune says of two images and their prompts."""
    requests = [Request(prompt=prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    batch = generate(model, requests, 2)
    pictures = list(decode(model, batch.latents))
    evidence = gather(model, batch.latents, PROMPTS[0], {"negatives": ["a blue ball", "a ball"]}, draws=2)
    return {
        "latents": batch.latents,
        "difference": batch.trace.difference,
        "pictures": torch.from_numpy(np.stack(pictures)),
        "encoded": encode_images(model.pipe, pictures, model.call),
        "errors": evidence.errors,
        "score of latents": score(model.pipe, batch.latents, PROMPTS, draws=4, call=model.call).draws,
        "score of pictures": score(model.pipe, pictures, PROMPTS, draws=4, call=model.call).draws,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_numbers(family):
    expected = numbers(opened(family, "none"))
    for offload in ("model", "sequential"):
        model = opened(family, offload)
        assert execution_device(model.pipe).type == "cpu"
        found = numbers(model)
        for name, value in expected.items():
            assert torch.equal(found[name], value), (offload, name)
    assert model.pipe.device.type == "meta"  # where the parts of the last one wait


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_the_same_pool(offload, tmp_path):
    """With the default score, from the candidates to the training set."""
    results = []
    for name in ("none", offload):
        model = opened("SD 1.x, 2.x base (epsilon)", name)
        results.append(build_pool(model, PROMPTS, tmp_path / name / "pool", PoolConfig(candidates=4, batch_size=2)))
    plain, offloaded = (str(pq.read_table(result.table).to_pylist()) for result in results)
    assert offloaded == plain
    sets = [TrainingSet.read(result.sets["contrast"]) for result in results]
    assert torch.equal(sets[0].latents, sets[1].latents)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_wrappers_are_gone_and_the_hooks_are_the_latest(offload):
    """At the end of a call, accelerate hooks every part anew; what stood there before must not come back."""
    pipe = opened("SD 1.x, 2.x base (epsilon)", offload).pipe
    parts = {"denoiser": pipe.unet, "text encoder": pipe.text_encoder}
    before = {name: part.__dict__.get("forward") for name, part in parts.items()}
    rows = []

    def noted(forward, *args, **kwargs):
        rows.append(len(args[0]))
        return forward(*args, **kwargs)

    with called_through(pipe.unet, noted), texts_encoded_once(pipe), constant_batches(pipe, 1):
        pipe(PROMPTS, num_inference_steps=2, output_type="latent")
        left = {name: part.__dict__.get("forward") for name, part in parts.items()}
    assert rows == [2] * 4  # two steps of two candidates, one at a time
    expected = left if offload == "model" else before
    assert {name: part.__dict__.get("forward") for name, part in parts.items()} == expected
    assert pipe(PROMPTS, num_inference_steps=2, output_type="latent")[0].isfinite().all()
    assert rows == [2] * 4


def test_half_precision_that_is_lifted():
    """The pipeline lifts its decoder, and mitune the encoder, in the midst of the hooks."""
    pictures, encoded = [], []
    for offload in OFFLOADS:
        model = opened("SDXL", offload, torch.float16)
        model.pipe.vae.register_to_config(force_upcast=True)
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half().float()
        pictures.append(np.stack(list(decode(model, latents))))
        encoded.append(encode_images(model.pipe, list(decode(model, latents)), model.call))
    assert all(np.array_equal(one, pictures[0]) for one in pictures)
    assert all(torch.equal(one, encoded[0]) for one in encoded)


def test_a_denoiser_that_was_called_alone_makes_room():
    """Before a call of the pipeline comes to its text encoders, accelerate has taken the denoiser away again."""
    model = opened("SD 1.x, 2.x base (epsilon)", "model")
    pipe, requests = model.pipe, [Request(prompt=PROMPTS[0], seed=0)]
    latents = generate(model, requests, 1).latents

    def scored():
        score(pipe, latents, PROMPTS[:1], draws=4, call=model.call)

    for again in (scored, lambda: generate(model, requests, 1)):
        scored()
        hooks, left = [], pipe.unet._hf_hook
        handle = pipe.text_encoder.register_forward_pre_hook(lambda *_, hooks=hooks: hooks.append(pipe.unet._hf_hook))
        again()
        handle.remove()
        assert hooks and left not in hooks
