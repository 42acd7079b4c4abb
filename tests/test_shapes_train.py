"""Training of the embedded models: the targets against Bayes' rule, and a stopped training against a whole one."""

import json
import random
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file

from mitune.denoiser.opening.models import model_folder
from mitune.worlds.shapes.grammar import forms
from mitune.worlds.shapes.training import train
from mitune.worlds.shapes.training.autoencoder import AutoencoderConfig, encode_world, training_prompts
from mitune.worlds.shapes.training.phases import PHASES, DenoiserConfig
from mitune.worlds.shapes.training.train import export, miscaptioned, stable_targets, train_denoiser
from mitune.worlds.shapes.world import MODELS
from tests.test_cli_errors import invoke


def test_every_prompt_has_wrong_captions_that_are_not_its_own():
    prompts = [str(prompt) for form in forms() for prompt in form.prompts[:3]]
    for prompt, wrong in zip(prompts, miscaptioned(prompts), strict=True):
        assert wrong and prompt not in wrong


def test_stable_targets_are_the_posterior_mean():
    """Two scenes on a line: the posterior is a logistic function of where the noisy state lies between them."""
    scenes = torch.tensor([[-1.0], [1.0]]).expand(2, 8).reshape(1, 2, 8, 1, 1)
    alpha, sigma = torch.full((1, 1, 1, 1), 0.6), torch.full((1, 1, 1, 1), 0.8)
    noisy = torch.randn(1, 8, 1, 1, generator=torch.Generator().manual_seed(0))
    clean, noise = stable_targets(noisy, scenes, alpha, sigma)
    log_odds = 2 * 0.6 * noisy.sum() / 0.8**2  # log N(z | α, σ²) − log N(z | −α, σ²)
    assert torch.allclose(clean, torch.tanh(log_odds / 2).expand_as(clean), atol=1e-5)
    assert torch.allclose(0.6 * clean + 0.8 * noise, noisy, atol=1e-6)


def test_targets_go_from_the_mean_to_the_scene_itself():
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randn(3, 5, 4, 2, 2, generator=generator)
    noise = torch.randn(3, 4, 2, 2, generator=generator)
    for sigma, expected in ((1e-3, scenes[:, 0]), (1 - 1e-4, scenes.mean(dim=1))):
        level = torch.full((3, 1, 1, 1), sigma)
        clean, _ = stable_targets((1 - level) * scenes[:, 0] + level * noise, scenes, 1 - level, level)
        assert torch.allclose(clean, expected, atol=5e-3)


def test_training_prompts_are_distributed_like_the_world():
    weights = training_prompts(seed=1)
    assert sum(weights.values()) == pytest.approx(1)
    small = [form for form in forms() if len(form.prompts) <= 3000]
    assert all(str(prompt) in weights for form in small for prompt in form.prompts)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    vae = AutoencoderKL.from_pretrained(model_folder("shapes-sd"), subfolder="vae")
    vae.save_pretrained(folder / "vae")
    encode_world(folder, vae, few_prompts(seed=1), scenes=3, seed=0)
    return folder


def few_prompts(seed):
    chosen = random.Random(0).sample(sorted(training_prompts(seed)), 12)
    return dict.fromkeys(chosen, 1 / 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_stopped_training_ends_like_a_whole_one(world, tmp_path, name):
    def config(steps):
        return DenoiserConfig(steps=steps, batch_size=4, warmup=2, stable=True, cool_down=0.0, emphasis={"color": 2.0})

    ends = []
    for pieces in ((3,), (2, 3)):
        for file in world.glob(f"{name}.*"):
            file.unlink()
        for steps in pieces:
            train_denoiser(world, name, config(steps), curve_prompts=1)
        ends.append(load_file(world / f"{name}.safetensors"))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    export(world, name, tmp_path / name)
    expected = "StableDiffusion3Pipeline" if name == "shapes-sd3" else "StableDiffusionPipeline"
    assert type(DiffusionPipeline.from_pretrained(tmp_path / name)).__name__ == expected


@pytest.mark.slow
def test_the_command_trains_from_nothing_and_goes_on(tmp_path, monkeypatch):
    """All of its stages, in two steps each; a second time it goes on at the end, and trains no further."""
    monkeypatch.setitem(PHASES, "shapes-sd", (DenoiserConfig(steps=2, batch_size=4, warmup=1),))
    monkeypatch.setattr(train, "AutoencoderConfig", partial(AutoencoderConfig, steps=2, batch_size=4))
    monkeypatch.setattr(train, "training_prompts", few_prompts)
    monkeypatch.setattr(train, "train_denoiser", partial(train_denoiser, curve_prompts=1))
    command = "shapes", "train", tmp_path / "work", "-o", tmp_path / "models", "-m", "shapes-sd", "--scenes", 2
    model = tmp_path / "models" / "shapes-sd"
    contents = []
    for _ in range(2):
        status, shown = invoke(*command)
        assert status == 0, shown
        contents.append({file: file.read_bytes() for file in model.rglob("*") if file.is_file()})
    assert contents[0] == contents[1]
    (line,) = (model / "training.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["step"] == 2
    status, shown = invoke("generate", "a red circle", "-m", model, "-n", 1, "-o", tmp_path, "--set", "model.steps=4")
    assert status == 0 and "self-confidence" in shown, shown
