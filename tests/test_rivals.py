"""Sets that have the hard negatives of their prompts: written by a pool, read, drawn from, and trained on."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from mitune.config.schema import Config, FinetuneConfig, PoolConfig
from mitune.denoiser.opening.models import load_model
from mitune.denoiser.path import path_of
from mitune.denoiser.replay import condition
from mitune.errors import MituneError
from mitune.finetuning.adapter import WEIGHTS_FILE
from mitune.finetuning.dataset import TrainingSet
from mitune.finetuning.draws import draw
from mitune.finetuning.objectives.base import pool_settings
from mitune.finetuning.rivals import DRAWN
from mitune.finetuning.run import finetune
from mitune.pool.build import build_pool
from tests.tiny import saved_pipeline

PROMPTS = ["a red circle", "two green crosses", "joy"]  # of the last, no rule makes a hard negative
NEGATIVES = {"a red circle": ["a blue circle", "a red square", "a circle", "two red circles", "a red cross"]}
NEGATIVES["two green crosses"] = ["a red square", "three green crosses"]
CONFIG = PoolConfig(candidates=3, keep=2, select=("self-confidence", "random"), batch_size=3, rivals=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A saved tiny model, and its pool with the user's own hard negatives."""
    folder = tmp_path_factory.mktemp("rivals")
    model = replace(saved_pipeline("sd", folder / "model"), guidance_scale=3.0, steps=2)
    lines = [json.dumps({"prompt": prompt, "negatives": texts}) for prompt, texts in NEGATIVES.items()]
    (folder / "negatives.jsonl").write_text("\n".join(lines))
    config = replace(CONFIG, negatives=str(folder / "negatives.jsonl"))
    return model, build_pool(load_model(model), PROMPTS, folder / "run" / "pool", config).sets


def training(**changes):
    settings = {"objective": "rival-target", "adapter": "lora", "rank": 4, "batch_size": 4, "iterations": 2}
    return FinetuneConfig(**(settings | {"learning_rate": 1e-2} | changes))


def test_set_has_each_rival_once_with_its_conditioning(world):
    model, sets = world
    loaded = load_model(model)
    for folder in sets.values():
        images = TrainingSet.read(folder)
        rivals = images.rivals
        assert sorted(rivals.prompts) == sorted({text for texts in NEGATIVES.values() for text in texts})
        for prompt, places in zip(images.prompts, rivals.of_images, strict=True):
            assert [rivals.prompts[place] for place in places] == NEGATIVES.get(prompt, [])
        expected = condition(loaded, rivals.prompts).rows["encoder_hidden_states"]
        torch.testing.assert_close(rivals.conditioning.rows["encoder_hidden_states"], expected)


def test_some_rivals_of_each_image_are_drawn(world):
    images = TrainingSet.read(world[1]["random"])
    path, config = path_of(DDIMScheduler()), FinetuneConfig(batch_size=300)
    drawn = draw(images, path, 1.0, config, 0)
    batch = drawn.batch(torch.arange(100, 300), images, path, torch.device("cpu"))
    held_against = [[] for _ in range(200)]
    for place, prompt in zip(batch.rivals.images.tolist(), batch.rivals.prompts, strict=True):
        held_against[place].append(prompt)
    seen = {prompt: set() for prompt in PROMPTS}
    for prompt, rivals in zip(batch.prompts, held_against, strict=True):
        assert len(set(rivals)) == len(rivals) == min(DRAWN, len(NEGATIVES.get(prompt, [])))
        seen[prompt] |= set(rivals)
    assert seen == {prompt: set(NEGATIVES.get(prompt, [])) for prompt in PROMPTS}
    told, known = images.rivals.conditioning.rows["encoder_hidden_states"], list(images.rivals.prompts)
    places = [known.index(prompt) for prompt in batch.rivals.prompts]
    assert torch.equal(batch.rivals.conditioning.rows["encoder_hidden_states"], told[places])
    # The rest of the draw is that of a set without rivals.
    plain = draw(replace(images, rivals=None), path, 1.0, config, 0)
    assert all(torch.equal(getattr(plain, name), getattr(drawn, name)) for name in ("rows", "noise", "timesteps"))


@pytest.mark.parametrize(("adapter", "text"), [("lora", False), ("dora", False), ("lora", True)])
def test_training_away_from_rivals(adapter, text, world, tmp_path):
    """Changes the adapter, otherwise than the denoising loss does; the same in micro-batches, but for rounding."""
    model, sets = world
    losses = {}
    for name, changes in {
        "whole": {},
        "parts": {"micro_batch_size": 1},
        "denoising": {"objective": "denoising"},
    }.items():
        finetune(model, sets["random"], tmp_path / name, training(adapter=adapter, text_encoder=text, **changes))
        rows = (tmp_path / name / "training.jsonl").read_text().splitlines()
        losses[name] = [json.loads(row)["loss"] for row in rows]
    assert losses["parts"][0] == pytest.approx(losses["whole"][0], rel=1e-6)
    assert losses["denoising"][0] != pytest.approx(losses["whole"][0], rel=1e-5)
    weights = load_file(tmp_path / "whole" / WEIGHTS_FILE)
    assert all(value.any() for name, value in weights.items() if "lora_B" in name)


def copied(folder, target):
    """A set without its seal, as if somebody had changed it."""
    target.mkdir()
    for file in folder.iterdir():
        if file.name != "seal.json":
            (target / file.name).write_bytes(file.read_bytes())
    return target


def test_damaged_rivals_are_refused(world, tmp_path):
    folder = copied(world[1]["random"], tmp_path / "set")
    checksum = TrainingSet.read(folder).checksum
    file = folder / "rivals.safetensors"
    tensors = load_file(file)
    save_file({name: value + 1 for name, value in tensors.items()}, file)
    assert TrainingSet.read(folder).checksum != checksum
    save_file({name: value[:2].clone() for name, value in tensors.items()}, file)
    with pytest.raises(MituneError, match="is for 2 prompts, but the rows of metadata.jsonl name 6 rivals"):
        TrainingSet.read(folder)
    file.write_bytes(b"nothing")
    with pytest.raises(MituneError, match="rivals.safetensors is missing or damaged"):
        TrainingSet.read(folder)
    file.unlink()
    with pytest.raises(MituneError, match="No such file"):
        TrainingSet.read(folder)


def test_what_lacks_rivals_is_refused(world, tmp_path):
    model, sets = world
    folder = copied(sets["random"], tmp_path / "set")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if name != "rivals"} for row in rows]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert TrainingSet.read(folder).rivals is None
    with pytest.raises(MituneError, match="rival-target needs a set with the hard negatives of its prompts"):
        finetune(model, folder, tmp_path / "adapter", training())
    with pytest.raises(MituneError, match="none of the prompts has a hard negative"):
        build_pool(load_model(model), ["joy"], tmp_path / "pool", CONFIG)


def test_objective_decides_whether_the_pool_stores_rivals():
    assert pool_settings(Config(finetune=FinetuneConfig(objective="rival-target"))).rivals
    assert not pool_settings(Config()).rivals
