"""A set is read whole, or refused in a sentence that says what is wrong with it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mitune.config.schema import FinetuneConfig, ModelConfig
from mitune.denoiser.opening.identity import model_parts
from mitune.errors import MituneError
from mitune.finetuning.card import public_name
from mitune.finetuning.dataset import TrainingSet, model_of
from mitune.finetuning.run import finetune
from mitune.run.seals import write_seal
from tests.sets import write_set
from tests.tiny import PROMPTS, TOKENS, saved_pipeline


def test_set_holds_what_was_written(tmp_path):
    folder = write_set("sd", tmp_path / "set")
    images = TrainingSet.read(folder)
    assert images.prompts == PROMPTS * 3
    assert images.selection == "mi-tune"
    assert torch.equal(images.latents, load_file(folder / "latents.safetensors")["latents"])
    assert {name: tensor.shape for name, tensor in images.conditioning.rows.items()} == {
        "encoder_hidden_states": (6, TOKENS, 16)
    }  # without the unconditional half
    assert torch.equal(images.weights, torch.ones(6))


def test_weights_come_out_with_mean_one(tmp_path):
    images = TrainingSet.read(write_set("sd", tmp_path / "set", weights=[2.0, 0.0, 4.0, 0.0, 0.0, 0.0]))
    assert images.weights.tolist() == [2.0, 0.0, 4.0, 0.0, 0.0, 0.0]
    images = TrainingSet.read(write_set("sd", tmp_path / "other", weights=[20.0] * 6))
    assert images.weights.tolist() == [1.0] * 6


def test_advantages_make_a_set_ranked(tmp_path):
    folder = write_set("sd", tmp_path / "set")
    images = TrainingSet.read(folder)
    assert (images.is_ranked, images.advantages.tolist()) == (False, [1.0] * 6)
    for at in range(6):
        _row(at, advantage=at - 3)(folder)
    images = TrainingSet.read(folder)
    assert (images.is_ranked, images.advantages.tolist()) == (True, [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0])


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


def _row(at, **values):
    def apply(folder):
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        lines[at] = json.dumps(json.loads(lines[at]) | values)
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    return apply


def _weight(value):
    return _row(0, weight=value)


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
        (_weight(-1.0), "the weight of row 1, -1, must be finite and not negative"),
        (_weight(float("nan")), "the weight of row 1, nan, must be finite and not negative"),
        (_weight(1e300), "the weight of row 1, inf, must be finite and not negative"),
        (_row(1, advantage=0.5), "1 of 6 rows have an advantage; give all one, or none"),
        (_row(2, advantage=float("inf")), "the advantage of row 3, inf, must be finite"),
        (lambda folder: [_row(at, weight=0)(folder) for at in range(6)], "every weight is 0"),
        (lambda folder: [_row(at, advantage=0)(folder) for at in range(6)], "every advantage is 0"),
        (_weight("much"), "damaged fine-tuning set"),
        (_cut("latents.safetensors"), "damaged fine-tuning set"),
        (lambda folder: (folder / "metadata.jsonl").write_text("[]\n" * 6), "damaged fine-tuning set"),
        (_latents(lambda _: torch.tensor(1.0)), "6 rows of metadata but 0 of latents"),
    ],
)
def test_bad_set_is_refused(damage, sentence, tmp_path):
    folder = write_set("sd", tmp_path / "set")
    damage(folder)
    with pytest.raises(MituneError, match=sentence):
        TrainingSet.read(folder)


def sealed(folder, model):
    made_by = {"name": public_name(model.name), "parts": model_parts(model)}
    write_seal(folder, [file.name for file in folder.iterdir()], made="fine-tuning set", model=made_by)
    return folder


@pytest.fixture
def made(tmp_path):
    """Two models of one kind, and a set that the first has made."""
    first, second = (saved_pipeline("sd", tmp_path / name / "tiny") for name in ("first", "second"))
    file = tmp_path / "second" / "tiny" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.5 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return first, second, sealed(write_set("sd", tmp_path / "set"), first)


SETTINGS = FinetuneConfig(rank=2, batch_size=2, iterations=1)


@pytest.mark.parametrize("name", ["metadata.jsonl", "0.png", "seal.json"])
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_file_that_the_seal_misses(name, damage, tmp_path):
    folder = write_set("sd", tmp_path / "set")
    (folder / "0.png").write_bytes(b"a picture")
    write_seal(folder, [file.name for file in folder.iterdir()], model={"name": "shapes-sd", "parts": {}})
    assert TrainingSet.read(folder).made_by == {"name": "shapes-sd", "parts": {}}
    if damage == "changed":
        (folder / name).write_bytes((folder / name).read_bytes() + b" ?")
    elif name == "seal.json":
        return  # a set of somebody's own
    else:
        (folder / name).unlink()
    sentence = rf"{name} of this fine-tuning set .*`mitune pool` or `mitune tune` command .* makes it again"
    with pytest.raises(MituneError, match=sentence):
        TrainingSet.read(folder)


def test_set_of_another_model_is_refused(made, tmp_path):
    first, second, folder = made
    finetune(first, folder, tmp_path / "adapter", SETTINGS)
    with pytest.raises(MituneError, match="made by another tiny, whose weights differ, and cannot train .*tiny; name"):
        finetune(second, folder, tmp_path / "other", SETTINGS)
    with pytest.raises(MituneError, match="The set was made by tiny and cannot train shapes-sd; name its own model"):
        finetune(ModelConfig(device="cpu"), folder, tmp_path / "other", SETTINGS)
    assert not (tmp_path / "other").exists()


def test_going_on_with_other_weights_is_refused(made, tmp_path):
    """A set without a seal leaves the question of who made it, but a folder is one model's."""
    first, second, folder = made
    (folder / "seal.json").unlink()
    finetune(first, folder, tmp_path / "adapter", SETTINGS)
    with pytest.raises(MituneError, match="other settings .*model.parts.unet"):
        finetune(second, folder, tmp_path / "adapter", SETTINGS)
    with pytest.raises(MituneError, match=r"other settings .*model\.dtype: \"float32\" there, \"bfloat16\" now"):
        finetune(replace(first, dtype="bfloat16"), folder, tmp_path / "adapter", SETTINGS)
    moved = Path(first.name).rename(tmp_path / "moved")
    going_on = replace(SETTINGS, micro_batch_size=1, checkpoint_every=7)
    assert finetune(replace(first, name=str(moved)), folder, tmp_path / "adapter", going_on).iterations == 1


@pytest.mark.parametrize(("kind", "other"), [("sd", "sdxl"), ("sdxl", "sd"), ("sd3", "sd")])
def test_shapes_of_another_model_are_refused(kind, other, tmp_path, caplog):
    model, folder = saved_pipeline(kind, tmp_path / "model"), write_set(other, tmp_path / "set")
    with pytest.raises(MituneError, match="The set does not fit the .* name the model that made it with --model"):
        finetune(model, folder, tmp_path / "adapter", SETTINGS)
    assert "so nobody knows whether" in caplog.text


def test_latents_of_other_channels_are_refused(tmp_path):
    model, folder = saved_pipeline("sd", tmp_path / "model"), write_set("sd", tmp_path / "set")
    save_file({"latents": torch.randn(6, 16, 8, 8)}, folder / "latents.safetensors")
    with pytest.raises(MituneError, match="The set does not fit the UNet2DConditionModel"):
        finetune(model, folder, tmp_path / "adapter", SETTINGS)


def test_model_of_a_set(tmp_path):
    folder = write_set("sd", tmp_path / "set")
    assert model_of(folder) is None
    for name, opened_by in (("shapes-sd3", "shapes-sd3"), ("a/hub-id", "a/hub-id"), ("tiny", None)):
        write_seal(folder, [], model={"name": name, "parts": {}})
        assert model_of(folder) == opened_by


def test_prompts_may_hold_any_end_of_a_line_but_their_own(tmp_path):
    folder = write_set("sd", tmp_path / "set")
    prompt = "a red\u2028ball\x85\u2029\x0b\x0c"
    rows = [json.dumps({"prompt": prompt}, ensure_ascii=False)] * 6
    (folder / "metadata.jsonl").write_text("\r\n".join(rows) + "\n\n", encoding="utf-8", newline="")
    assert TrainingSet.read(folder).prompts == [prompt] * 6
