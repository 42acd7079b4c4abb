"""What a result depends on, and nothing else."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mitune.config.schema import EvalConfig, FinetuneConfig, ModelConfig, PoolConfig
from mitune.denoiser.opening.identity import digest, model_identity, model_parts, settings_that_matter
from mitune.errors import ModelError


@pytest.fixture
def model(sd_folder, tmp_path):
    """A copy, to be changed."""
    shutil.copytree(sd_folder, tmp_path / "tiny")
    return ModelConfig(name=str(tmp_path / "tiny"))


def test_the_same_files_in_another_place_are_the_same_model(sd_folder, model):
    assert model_identity(model) == model_identity(ModelConfig(name=str(sd_folder)))


def change_weights(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"][0] += 1e-6
    save_file(tensors, file, metadata={"format": "pt"})


def change_scheduler(folder):
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace('"epsilon"', '"v_prediction"'))


def change_vocabulary(folder):
    file = folder / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + "\n")


@pytest.mark.parametrize(
    ("change", "part"), [(change_weights, "unet"), (change_scheduler, "scheduler"), (change_vocabulary, "tokenizer")]
)
def test_other_contents_are_another_model(model, change, part, tmp_path):
    before = model_parts(model)
    change(tmp_path / "tiny")
    after = model_parts(model)
    assert {name for name in before if before[name] != after[name]} == {part}


def test_what_diffusers_does_not_read_does_not_count(model, tmp_path):
    before = model_identity(model)
    unet = tmp_path / "tiny" / "unet"
    (tmp_path / "tiny" / "README.md").write_text("words")
    (unet / "diffusion_pytorch_model.bin").write_bytes(b"old")
    (unet / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half")
    os.utime(unet / "diffusion_pytorch_model.safetensors")
    assert model_identity(model) == before
    of_variant = model_parts(replace(model, variant="fp16"))
    assert {name for name in of_variant if of_variant[name] != before["parts"][name]} == {"unet"}


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"device": "cpu"}, True),
        ({"offload": "model"}, True),
        ({"compile": True}, True),
        ({"dtype": "bfloat16"}, False),
        ({"steps": 7}, False),
        ({"guidance_scale": 3.0}, False),
        ({"call": {"height": 64}}, False),
        ({"guidance_scale": 2.0, "steps": 12}, True),  # shapes-sd's own
        ({"name": "shapes-sd3"}, False),
    ],
)
def test_settings_of_the_model(changes, same):
    assert (model_identity(ModelConfig(**changes)) == model_identity(ModelConfig())) == same


@pytest.mark.parametrize(
    ("config", "changes", "same"),
    [
        (PoolConfig(), {"batch_size": 3}, True),
        (PoolConfig(), {"seed": 3}, False),
        (FinetuneConfig(), {"micro_batch_size": 4, "checkpoint_every": 7}, True),
        (FinetuneConfig(), {"batch_size": 8}, False),
        (EvalConfig(), {"batch_size": 3, "guidance_scales": (3.0,)}, True),
        (EvalConfig(), {"images": 3}, False),
    ],
)
def test_settings_of_the_steps(config, changes, same):
    assert (settings_that_matter(replace(config, **changes)) == settings_that_matter(config)) == same


def test_a_large_file_of_the_hub_is_known_by_its_name(tmp_path):
    name = "ab" * 32
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / name).write_bytes(b"gigabytes")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
    assert digest(tmp_path / "model.safetensors") == name


def test_a_single_file_is_the_denoiser(sd_folder, tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for number, file in enumerate(files):
        save_file({"weight": torch.full((2,), float(number))}, file)
    one, other = (model_parts(ModelConfig(name=str(file), base=str(sd_folder))) for file in files)
    assert {name for name in one if one[name] != other[name]} == {"unet"}


def test_an_unknown_model_is_refused():
    with pytest.raises(ModelError, match="neither a folder nor in the hub's cache"):
        model_identity(ModelConfig(name="nobody/nothing-here"))
