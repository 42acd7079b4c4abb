"""Adapters that mitune did not write: loaded whole, or refused in one sentence; a pickle is never opened."""

import pickle

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from mitune.config.schema import FinetuneConfig, ModelConfig
from mitune.denoiser.fusing import export_fused
from mitune.denoiser.opening.adapter_file import WEIGHTS_FILE, adapter_checksum, load_adapter
from mitune.errors import ModelError
from mitune.finetuning.adapter import add_adapter, save_adapter, trainable
from tests.sets import images_of
from tests.tiny import tiny_sd, tiny_sd3, tiny_sdxl


class Pickled:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


def write_pickle(file):
    file.parent.mkdir(exist_ok=True)
    with file.open("wb") as opened:
        pickle.dump({"unet.x.lora_A.weight": Pickled()}, opened)
    return file


def with_adapter(pipe, component, rank=2):
    module = getattr(pipe, component)
    add_adapter(module, FinetuneConfig(adapter="lora", rank=rank, alpha=float(rank)))
    generator = torch.Generator().manual_seed(3)
    for parameter in trainable({component: module}).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return pipe


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Of the tiny Stable Diffusion, by mitune."""
    folder = tmp_path_factory.mktemp("adapters") / "sd"
    pipe = with_adapter(tiny_sd(), "unet")
    save_adapter(folder, type(pipe), {"unet": pipe.unet})
    return folder


@pytest.fixture(scope="module")
def tuned(adapter):
    return images_of(loaded(tiny_sd(), adapter), "sd")


def loaded(pipe, adapter):
    load_adapter(pipe, adapter)
    return pipe


def weights(adapter):
    return load_file(adapter / WEIGHTS_FILE)


def kohya(tensors):
    """The weights as kohya's scripts name them, with an alpha for each layer: here the rank, 2."""
    renamed = {}
    for key, tensor in tensors.items():
        layer, factor = key.removeprefix("unet.").removesuffix(".weight").rsplit(".", 1)
        name = f"lora_unet_{layer.replace('.', '_')}"
        renamed[f"{name}.{ {'lora_A': 'lora_down', 'lora_B': 'lora_up'}[factor] }.weight"] = tensor
        renamed[f"{name}.alpha"] = torch.tensor(2.0)
    return renamed


def test_file_in_place_of_its_folder(adapter, tuned):
    assert torch.equal(images_of(loaded(tiny_sd(), adapter / WEIGHTS_FILE), "sd"), tuned)
    assert adapter_checksum(adapter / WEIGHTS_FILE) == adapter_checksum(adapter)
    assert not torch.equal(images_of(tiny_sd(), "sd"), tuned)


@pytest.mark.parametrize("name", ["any-name.safetensors", WEIGHTS_FILE])
def test_layouts_of_other_programs(name, adapter, tuned, tmp_path):
    """kohya's, with its alphas, and diffusers' without a header, where alpha is the rank."""
    save_file(kohya(weights(adapter)), tmp_path / name)
    assert any("lora_down" in key for key in load_file(tmp_path / name))
    assert torch.allclose(images_of(loaded(tiny_sd(), tmp_path), "sd"), tuned, atol=1e-5)
    save_file(weights(adapter), tmp_path / name)
    assert torch.equal(images_of(loaded(tiny_sd(), tmp_path), "sd"), tuned)


def _only(part):
    return lambda tensors: {key: value for key, value in tensors.items() if part in key}


def _poisoned(tensors):
    return tensors | {key: torch.full_like(value, torch.nan) for key, value in list(tensors.items())[:1]}


def _wider(tensors):
    return {key: torch.cat([value, value], dim=1 if "lora_A" in key else 0) for key, value in tensors.items()}


def _elsewhere(tensors):
    """One layer of ten is none of the model's."""
    return {key.replace("mid_block.attentions.0", "mid_block.attentions.7"): value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda _: {}, "holds no weights"),
        (_only("lora_A"), "without its other factor"),
        (_only("lora_B"), "without its other factor"),
        (_poisoned, "weights that are not finite"),
        (_wider, "does not fit this model, a StableDiffusionPipeline"),
        (_elsewhere, "does not fit this model"),
        (lambda _: {"unet.x.weight": torch.ones(2)}, "does not fit this model"),
        (lambda _: {"a.b.hada_w1_a": torch.ones(2)}, "does not fit this model"),
    ],
)
def test_weights_that_are_none_of_this_model(change, sentence, adapter, tmp_path):
    save_file(change(weights(adapter)), tmp_path / WEIGHTS_FILE)
    with pytest.raises(ModelError, match=sentence) as caught:
        load_adapter(tiny_sd(), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [0, 3, 100, -1])
def test_damaged_file(cut, adapter, tmp_path):
    (tmp_path / WEIGHTS_FILE).write_bytes((adapter / WEIGHTS_FILE).read_bytes()[:cut])
    with pytest.raises(ModelError, match="is damaged"):
        load_adapter(tiny_sd(), tmp_path)


def test_changed_byte(adapter, tmp_path):
    content = bytearray((adapter / WEIGHTS_FILE).read_bytes())
    content[-7] ^= 1
    (tmp_path / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(ModelError, match="checksum differs"):
        load_adapter(tiny_sd(), tmp_path)


@pytest.mark.parametrize(("pipe", "component"), [(tiny_sdxl, "unet"), (tiny_sd3, "transformer")])
def test_adapter_of_another_model(pipe, component, adapter, tmp_path):
    other = with_adapter(pipe(), component)
    save_adapter(tmp_path, type(other), {component: getattr(other, component)})
    with pytest.raises(
        ModelError, match="does not fit this model, a StableDiffusionPipeline .*trained for another one"
    ):
        load_adapter(tiny_sd(), tmp_path)
    with pytest.raises(ModelError, match="trained for another one"):
        load_adapter(pipe(), adapter)


def test_pickles_stay_closed(tmp_path):
    folders = [write_pickle(tmp_path / name / "adapter_model.bin").parent for name in ("one", "two")]
    for place in (*folders, folders[0] / "adapter_model.bin"):
        for use in (lambda place: load_adapter(tiny_sd(), place), adapter_checksum):
            with pytest.raises(ModelError, match="may run code"):
                use(place)
    write_pickle(tmp_path / "one" / WEIGHTS_FILE)  # under another name
    with pytest.raises(ModelError, match="is damaged"):
        load_adapter(tiny_sd(), tmp_path / "one")


def test_folder_with_two_adapters(adapter, tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file(weights(adapter), tmp_path / name)
    with pytest.raises(ModelError, match=r"holds 2 \.safetensors files; name the one"):
        load_adapter(tiny_sd(), tmp_path)
    load_adapter(tiny_sd(), tmp_path / "b.safetensors")


def test_nothing_there(tmp_path):
    for use in (lambda place: load_adapter(tiny_sd(), place), adapter_checksum):
        with pytest.raises(ModelError, match="There is no adapter folder"):
            use(tmp_path / "none")
    assert adapter_checksum(None) == ""


def test_fused_model_of_a_file_in_another_layout(adapter, tuned, tmp_path):
    tiny_sd().save_pretrained(tmp_path / "model")
    save_file(kohya(weights(adapter)), tmp_path / "k.safetensors")
    export_fused(
        ModelConfig(name=str(tmp_path / "model"), device="cpu"), tmp_path / "k.safetensors", tmp_path / "fused"
    )
    assert torch.allclose(images_of(DiffusionPipeline.from_pretrained(tmp_path / "fused"), "sd"), tuned, atol=1e-4)
