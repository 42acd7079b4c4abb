"""An adapter must survive the file: what pipe.load_lora_weights makes of it is what was trained."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, PixArtSigmaPipeline, StableDiffusion3Pipeline
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mitune.config.schema import FinetuneConfig, ModelConfig
from mitune.denoiser.fusing import export_fused
from mitune.denoiser.opening.components import Components
from mitune.errors import MituneError, ModelError
from mitune.finetuning.adapter import (
    WEIGHTS_FILE,
    adapted_layers,
    add_adapter,
    check_rank,
    load_weights,
    save_adapter,
    trainable,
)
from mitune.finetuning.card import write_card
from tests.sets import images_of
from tests.tiny import saved_pipeline, tiny_sd, tiny_sd3

TEXT_ENCODERS = {
    "sd": ["text_encoder"],
    "sdxl": ["text_encoder", "text_encoder_2"],
    "sd3": ["text_encoder", "text_encoder_2"],
}


def config_of(adapter="dora", **changes):
    return FinetuneConfig(adapter=adapter, rank=2, alpha=3.0, **changes)


def adapted(pipe, names, config):
    """The named components of a pipeline with an adapter of random weights, as if it were trained."""
    modules = {name: getattr(pipe, name) for name in names}
    for module in modules.values():
        add_adapter(module, config)
    generator = torch.Generator().manual_seed(3)
    for parameter in trainable(modules).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return modules


def test_layers_are_those_of_attention_and_fully_connected_blocks():
    layers = adapted_layers(tiny_sd().unet)
    block = "mid_block.attentions.0.transformer_blocks.0"
    projections = ["to_q", "to_k", "to_v", "to_out.0"]
    expected = [f"{block}.{attn}.{layer}" for attn in ("attn1", "attn2") for layer in projections]
    expected += [f"{block}.ff.net.0.proj", f"{block}.ff.net.2"]
    assert sorted(expected) == sorted(name for name in layers if name.startswith("mid_block"))
    assert all(".attn" in name or ".ff." in name for name in layers)
    transformer = adapted_layers(tiny_sd3().transformer)
    assert "transformer_blocks.0.attn.add_q_proj" in transformer
    assert "transformer_blocks.0.ff_context.net.2" in transformer
    assert not [name for name in transformer if "norm" in name or "embed" in name]
    with pytest.raises(ModelError, match="Conv2d has no attention or fully connected layers"):
        adapted_layers(nn.Conv2d(1, 1, 1))


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_new_adapter_changes_no_output_and_no_global_state(adapter):
    pipe = tiny_sd()
    before, state = images_of(pipe, "sd"), torch.get_rng_state()
    add_adapter(pipe.unet, config_of(adapter))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(images_of(pipe, "sd"), before, atol=1e-5)


def test_new_adapter_is_a_function_of_the_seed():
    def weights(seed):
        unet = tiny_sd().unet
        add_adapter(unet, config_of(seed=seed))
        return torch.cat([parameter.flatten() for parameter in trainable({"unet": unet}).values()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_adapter_of_a_low_precision_model_is_float32():
    unet = tiny_sd().unet.to(torch.bfloat16)
    add_adapter(unet, config_of())
    assert {parameter.dtype for parameter in trainable({"unet": unet}).values()} == {torch.float32}
    assert unet.dtype == torch.bfloat16


@pytest.mark.parametrize("text", [False, True], ids=["denoiser", "with text encoders"])
@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_loaded_adapter_makes_the_images_of_the_trained_one(kind, adapter, text, tmp_path):
    model = saved_pipeline(kind, tmp_path / "model")
    pipe = DiffusionPipeline.from_pretrained(model.name)
    components = Components.of(model)
    assert components.text_encoder_names == TEXT_ENCODERS[kind]
    names = [components.denoiser_name, *(components.text_encoder_names if text else [])]
    base = images_of(pipe, kind)
    modules = adapted(pipe, names, config_of(adapter))
    trained = images_of(pipe, kind)
    assert (trained - base).abs().max() > 1e-3  # else there is nothing to lose
    save_adapter(tmp_path / "adapter", components.pipeline_class, modules)

    loaded = DiffusionPipeline.from_pretrained(model.name)
    loaded.load_lora_weights(str(tmp_path / "adapter"))
    file = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    for name in names:
        own = get_peft_model_state_dict(modules[name])
        found = get_peft_model_state_dict(getattr(loaded, name), adapter_name="default_0")
        layers = sum(key.endswith("lora_A.weight") for key in found)
        assert layers > 0
        assert sum("lora_magnitude_vector" in key for key in found) == (layers if adapter == "dora" else 0)
        assert found.keys() == own.keys()
        assert all(torch.equal(found[key], own[key]) for key in own)
        assert sum(key.startswith(f"{name}.") for key in file) == len(own)
    assert torch.equal(images_of(loaded, kind), trained)


def test_file_keeps_rank_and_alpha(tmp_path):
    pipe = tiny_sd()
    save_adapter(tmp_path, type(pipe), adapted(pipe, ["unet"], config_of()))
    with safe_open(tmp_path / WEIGHTS_FILE, framework="pt") as opened:
        header = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (header["unet.r"], header["unet.lora_alpha"], header["unet.use_dora"]) == (2, 3.0, True)
    assert [file.name for file in tmp_path.iterdir()] == [WEIGHTS_FILE]


@pytest.mark.parametrize("names", [["unet"], ["unet", "text_encoder"]])
def test_training_goes_on_from_an_earlier_adapter(names, tmp_path):
    pipe, other = tiny_sd(), tiny_sd()
    earlier = adapted(pipe, names, config_of())
    save_adapter(tmp_path, type(pipe), earlier)
    modules = {name: getattr(other, name) for name in names}
    for module in modules.values():
        add_adapter(module, config_of(seed=7))
    load_weights(tmp_path, modules)
    found, wanted = trainable(modules), trainable(earlier)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "other", [FinetuneConfig(adapter="dora", rank=3, alpha=3.0), FinetuneConfig(rank=2, alpha=2.0), config_of("lora")]
)
def test_earlier_adapter_of_other_settings_is_refused(other, tmp_path):
    pipe = tiny_sd()
    save_adapter(tmp_path, type(pipe), adapted(pipe, ["unet"], config_of()))
    unet = tiny_sd().unet
    add_adapter(unet, other)
    with pytest.raises(MituneError, match="is of another model, kind, rank or alpha"):
        load_weights(tmp_path, {"unet": unet})
    with pytest.raises(MituneError, match="There is no adapter folder"):
        load_weights(tmp_path / "nowhere", {"unet": unet})


def test_training_cannot_go_on_from_an_adapter_without_header(tmp_path):
    pipe = tiny_sd()
    save_adapter(tmp_path, type(pipe), adapted(pipe, ["unet"], config_of()))
    save_file(load_file(tmp_path / WEIGHTS_FILE), tmp_path / WEIGHTS_FILE)
    unet = tiny_sd().unet
    add_adapter(unet, config_of())
    with pytest.raises(MituneError, match="says nothing of its rank and alpha"):
        load_weights(tmp_path, {"unet": unet})


@pytest.mark.slow
@pytest.mark.parametrize("pipeline_class", [StableDiffusion3Pipeline, PixArtSigmaPipeline])
def test_equal_adapters_make_equal_files(pipeline_class, tmp_path):
    """In any process: hashes of text, and with them the order of sets, differ from one to the next."""
    program = (
        f"import sys; from pathlib import Path; from diffusers import {pipeline_class.__name__}; "
        "from tests.test_adapter import *; "
        "pipe = tiny_sd3(); modules = adapted(pipe, ['transformer'], config_of()); "
        f"save_adapter(Path(sys.argv[1]), {pipeline_class.__name__}, modules, {{'b': '1', 'a': '2', 'c': '3'}})"
    )
    for seed in ("1", "2"):
        command = [sys.executable, "-c", program, str(tmp_path / seed)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    names = sorted(file.name for file in (tmp_path / "1").iterdir())
    assert len(names) == (1 if pipeline_class is StableDiffusion3Pipeline else 3)
    assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() for name in names)


@pytest.mark.parametrize(("rank", "fits"), [(16, True), (17, False), (10_000, False)])
def test_rank_above_the_layers_is_refused(rank, fits):
    """Most layers of the tiny U-Net are 16 wide."""
    with (
        nullcontext() if fits else pytest.raises(MituneError, match=f"rank = {rank} is above .*; set it to at most 16")
    ):
        check_rank(tiny_sd().unet, rank)


def test_fused_model_that_finds_no_room(tmp_path, monkeypatch):
    model = saved_pipeline("sd", tmp_path / "model")
    pipe = tiny_sd()
    save_adapter(tmp_path / "adapter", type(pipe), adapted(pipe, ["unet"], config_of()))

    def full(*_args, **_kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("diffusers.DiffusionPipeline.save_pretrained", full)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MituneError, match="No space left on the disk of .*fused"):
        export_fused(model, tmp_path / "adapter", tmp_path / "fused")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_fused_model_makes_the_same_images_without_peft(kind, tmp_path):
    model = saved_pipeline(kind, tmp_path / "model")
    pipe = DiffusionPipeline.from_pretrained(model.name)
    components = Components.of(model)
    size = sum(parameter.numel() for parameter in getattr(pipe, components.denoiser_name).parameters())
    modules = adapted(pipe, [components.denoiser_name, "text_encoder"], config_of())
    save_adapter(tmp_path / "adapter", components.pipeline_class, modules)
    assert export_fused(model, tmp_path / "adapter", tmp_path / "fused") == tmp_path / "fused"
    fused = DiffusionPipeline.from_pretrained(tmp_path / "fused")
    assert torch.allclose(images_of(fused, kind), images_of(pipe, kind), atol=1e-4)
    assert sum(parameter.numel() for parameter in getattr(fused, components.denoiser_name).parameters()) == size
    with pytest.raises(MituneError, match="exists already"):
        export_fused(model, tmp_path / "adapter", tmp_path / "fused")


def test_card_names_model_prompts_selection_settings_and_loading(tmp_path):
    prompts = ["a red ball", "a red ball", "two blue cubes"]
    write_card(tmp_path, ModelConfig(), config_of(), prompts=prompts, selection="self-confidence", skipped=4)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for part in (
        'base_model: "shapes-sd"',
        "3 of the model's own images, for 2 prompts",
        "self-confidence",
        "4 of 300",
        "| learning_rate | 0.0001 |",
        "DiffusionPipeline.from_pretrained(model_folder('shapes-sd'))",
        "load_lora_weights(\".\", weight_name='pytorch_lora_weights.safetensors')",
    ):
        assert part in card


@pytest.mark.parametrize("name", ["a/hub-id", "{folder}/mine", "{folder}/mine.safetensors"])
def test_card_names_no_folder_of_this_machine(name, tmp_path):
    name = name.format(folder=tmp_path)
    base = "a/base" if name.endswith(".safetensors") else None
    write_card(tmp_path, ModelConfig(name=name, base=base), config_of(), prompts=["a"], selection="random", skipped=0)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in card
    assert f'base_model: "{name if name.startswith("a/") else Path(name).name}"' in card
