"""A model that is not all there is refused by name, and never filled up with random weights."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from mitune.config.schema import ModelConfig
from mitune.denoiser.opening import layout
from mitune.denoiser.opening.components import Components
from mitune.denoiser.opening.models import load_model
from mitune.errors import ModelError
from tests.tiny import tiny_sd


@pytest.fixture
def folder(sd_folder, tmp_path):
    return shutil.copytree(sd_folder, tmp_path / "model")


def opened(folder, **settings):
    return load_model(ModelConfig(name=str(folder), device="cpu", **settings))


def weights_of(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    return file, load_file(file)


PARTS = {
    "text_encoder": "encoder.layers.1.mlp.fc1.weight",
    "unet": "mid_block.resnets.0.conv1.weight",
    "vae": "decoder.conv_out.bias",
}


@pytest.mark.parametrize("part", PARTS)
class TestWeights:
    """Libraries fill what a checkpoint lacks with random values, others at each start."""

    def test_missing(self, folder, part):
        file, state = weights_of(folder, part)
        (name,) = (key for key in state if key.endswith(PARTS[part]))
        del state[name]
        save_file(state, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=rf"The weights in .*{part} lack {PARTS[part]} of a"):
            opened(folder)
        if part == "unet":
            with pytest.raises(ModelError, match="lack mid_block"):
                Components.of(ModelConfig(name=str(folder))).denoiser()
        if part == "text_encoder":
            with pytest.raises(ModelError, match="lack encoder"):
                Components.of(ModelConfig(name=str(folder))).text_pipeline()

    def test_of_another_size(self, folder, part):
        file, state = weights_of(folder, part)
        (name,) = (key for key in state if key.endswith(PARTS[part]))
        state[name] = state[name][:-1].contiguous()
        save_file(state, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=rf"{PARTS[part]}|{part}.*{PARTS[part]}"):
            opened(folder)

    def test_more_than_there_is_place_for(self, folder, part, caplog):
        """No reason to refuse a model, but said."""
        file, state = weights_of(folder, part)
        state["layers.7.weight"] = next(iter(state.values())).clone()
        save_file(state, file, metadata={"format": "pt"})
        opened(folder)
        assert "layers.7.weight" in caplog.text and part in caplog.text

    def test_cut(self, folder, part):
        file, _ = weights_of(folder, part)
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ModelError, match=f"Cannot open the .* in .*{part}"):
            opened(folder)


@pytest.mark.parametrize(
    ("gone", "sentence"),
    [
        ("unet", "lacks its part unet"),
        ("scheduler", "lacks its part scheduler"),
        ("tokenizer", "lacks its part tokenizer"),
        ("unet/config.json", "lacks unet/config.json"),
        ("unet/diffusion_pytorch_model.safetensors", "lacks the weights of unet"),
        ("text_encoder/model.safetensors", "lacks the weights of text_encoder"),
        ("tokenizer/tokenizer.json", "lacks merges.txt and vocab.json of its tokenizer"),  # it would know no word
        ("model_index.json", "is a folder without model_index.json"),
    ],
)
def test_files_that_are_gone(folder, gone, sentence):
    if (folder / gone).is_dir():
        shutil.rmtree(folder / gone)
    else:
        (folder / gone).unlink()
    with pytest.raises(ModelError, match=sentence):
        opened(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe"])
@pytest.mark.parametrize(
    "file",
    ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"],
)
def test_garbled_settings(folder, file, content):
    (folder / file).write_bytes(content)
    with pytest.raises(ModelError, match=file):
        opened(folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"_class_name": None}, "names no pipeline as its _class_name"),
        ({"_class_name": "SomePipeline"}, r"is a SomePipeline, which diffusers .* does not have"),
        ({"_class_name": ["my_pipeline", "Mine"]}, "code that comes with a model is never run"),
        ({"_class_name": "UNet2DConditionModel"}, "is a UNet2DConditionModel, which diffusers"),
        ({"_class_name": "DDPMPipeline"}, "takes no prompt"),
        ({"unet": ["unet_of_mine", "Mine"]}, "The part unet is a Mine of unet_of_mine, which is not there"),
        ({"unet": ["diffusers", "UNetOfTomorrow"]}, "The part unet is a UNetOfTomorrow of diffusers"),
    ],
)
def test_pipelines_that_mitune_cannot_use(folder, change, sentence):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | change))
    for open_it in (opened, lambda folder: Components.of(ModelConfig(name=str(folder))).denoiser()):
        with pytest.raises(ModelError, match=sentence):
            open_it(folder)


def test_shards_and_variants_are_found(tmp_path):
    """By the names that both libraries give them."""
    tiny_sd().save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    with pytest.raises(ModelError, match=r"variant fp16 alone; set model.variant, e.g. --set model.variant=fp16"):
        opened(tmp_path)
    opened(tmp_path, variant="fp16")
    tiny_sd().save_pretrained(tmp_path)  # both
    opened(tmp_path)
    with pytest.raises(ModelError, match=r"no weights in the variant ema; .* \(fp16\)"):
        opened(tmp_path, variant="ema")


@pytest.mark.parametrize("missing", [["sentencepiece"], ["protobuf"], ["sentencepiece", "protobuf"], []])
def test_packages_for_a_vocabulary(folder, missing, monkeypatch):
    """All that are missing at once: transformers names one that would not help."""
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "spiece.model").write_bytes(b"")
    index = json.loads((folder / "model_index.json").read_text()) | {"tokenizer": ["transformers", "T5Tokenizer"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    installed = {module for module, package in layout.SENTENCEPIECE.items() if package not in missing}
    monkeypatch.setattr(layout, "_installed", installed.__contains__)
    sentence = f"pip install {' '.join(missing)}$" if missing else "Cannot open the model"
    with pytest.raises(ModelError, match=sentence):
        opened(folder)


@pytest.mark.parametrize(
    "device", ["cuda", "cuda:99", "mps", "0", "xpu", "nonsense", "meta", "cpu:3", "", "CPU", "cuda:-1"]
)
def test_devices_that_are_not_there(device, monkeypatch):
    """Refused before the model is opened."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(ModelError, match=rf"model.device = {device} is no device that torch sees here \(cpu\)"):
        load_model(ModelConfig(name="no/model", device=device))
