"""A set is read whole, or refused in a sentence that says what is wrong with it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mitune.errors import MituneError
from mitune.training_set import TrainingSet
from tests.sets import write_set
from tests.tiny import PROMPTS


def test_set_holds_what_was_written(tmp_path):
    folder = write_set("sd", tmp_path / "set")
    images = TrainingSet.read(folder)
    assert images.prompts == PROMPTS * 3
    assert images.selection == "mi-tune"
    assert torch.equal(images.latents, load_file(folder / "latents.safetensors")["latents"])
    assert {name: tensor.shape for name, tensor in images.conditioning.items()} == {
        "encoder_hidden_states": (6, 8, 16)
    }  # without the unconditional half
    assert torch.equal(images.weights, torch.ones(6))


def test_weights_come_out_with_mean_one(tmp_path):
    images = TrainingSet.read(write_set("sd", tmp_path / "set", weights=[2.0, 0.0, 4.0, 0.0, 0.0, 0.0]))
    assert images.weights.tolist() == [2.0, 0.0, 4.0, 0.0, 0.0, 0.0]
    images = TrainingSet.read(write_set("sd", tmp_path / "other", weights=[20.0] * 6))
    assert images.weights.tolist() == [1.0] * 6


def test_checksum_tells_sets_apart(tmp_path):
    first, second = write_set("sd", tmp_path / "first"), write_set("sd", tmp_path / "second")
    assert TrainingSet.read(first).checksum == TrainingSet.read(second).checksum
    latents = load_file(second / "latents.safetensors")["latents"]
    save_file({"latents": latents + 1}, second / "latents.safetensors")
    assert TrainingSet.read(first).checksum != TrainingSet.read(second).checksum


def _without(name):
    return lambda folder: (folder / name).unlink()


def _cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-10])


def _latents(change):
    def apply(folder):
        save_file(
            {"latents": change(load_file(folder / "latents.safetensors")["latents"])}, folder / "latents.safetensors"
        )

    return apply


def _weight(value):
    def apply(folder):
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        lines[0] = json.dumps(json.loads(lines[0]) | {"weight": value})
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    return apply


def _poison(latents):
    latents[2, 0, 0, 0] = torch.nan
    return latents


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_without("latents.safetensors"), "latents.safetensors is missing"),
        (_without("metadata.jsonl"), "metadata.jsonl is missing"),
        (_cut("conditioning.safetensors"), "damaged fine-tuning set"),
        (_cut("metadata.jsonl"), "damaged fine-tuning set"),
        (_latents(lambda latents: latents[:4].clone()), "6 rows of metadata but 4 of latents"),
        (_latents(_poison), "latents of row 3 are not finite"),
        (_weight(-1.0), "must be finite and not negative"),
        (_weight(float("nan")), "must be finite and not negative"),
        (_weight("much"), "damaged fine-tuning set"),
    ],
)
def test_bad_set_is_refused(damage, sentence, tmp_path):
    folder = write_set("sd", tmp_path / "set")
    damage(folder)
    with pytest.raises(MituneError, match=sentence):
        TrainingSet.read(folder)
