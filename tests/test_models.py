"""Opening models: folders, variants, precisions, single files and adapters; and the sizes of the published ones."""

import pytest
import torch
from diffusers import (
    SD3Transformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file

from benchmarks.published import SD21_BASE, SD35_MEDIUM, SDXL_BASE
from mitune.config.schema import FinetuneConfig, ModelConfig
from mitune.denoiser.fusing import export_fused
from mitune.denoiser.network import denoiser_of
from mitune.denoiser.opening.components import Components
from mitune.denoiser.opening.models import guidance_name, load_model, prompted
from mitune.errors import MituneError, ModelError
from mitune.finetuning.adapter import adapted_layers, add_adapter, save_adapter, trainable
from tests.families import CASES, flux
from tests.tiny import PROMPTS, tiny_sd


def config_of(name, **settings):
    return ModelConfig(name=str(name), device="cpu", **settings)


def weights(pipe):
    return pipe.unet.conv_in.weight.detach()


class TestFolders:
    def test_what_is_saved_is_opened(self, sd_folder):
        model = load_model(config_of(sd_folder, guidance_scale=3.0, steps=4, call={"height": 16, "width": 8}))
        assert torch.equal(weights(model.pipe), weights(tiny_sd()))
        assert model.call == {"guidance_scale": 3.0, "num_inference_steps": 4, "height": 16, "width": 8}
        assert (model.steps, model.guidance_scale) == (4, 3.0)
        defaults = load_model(config_of(sd_folder))
        assert (defaults.steps, defaults.guidance_scale) == (50, 7.5)  # the pipeline's own

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_precision(self, sd_folder, dtype):
        config, expected = config_of(sd_folder, dtype=dtype), getattr(torch, dtype)
        assert denoiser_of(load_model(config).pipe).dtype == expected
        assert Components.of(config).denoiser().dtype == expected

    def test_variant(self, tmp_path):
        tiny_sd(seed=1).save_pretrained(tmp_path, variant="fp16")
        config = config_of(tmp_path, variant="fp16")
        assert torch.equal(weights(load_model(config).pipe), weights(tiny_sd(seed=1)))
        assert torch.equal(Components.of(config).denoiser().conv_in.weight, weights(tiny_sd(seed=1)))
        for open_it in (load_model, lambda config: Components.of(config).denoiser()):
            with pytest.raises(ModelError, match="in the variant fp16 alone; set model.variant"):
                open_it(config_of(tmp_path))
            with pytest.raises(ModelError, match="(no weights|fp16 alone)"):
                open_it(config_of(tmp_path, variant="ema"))

    def test_no_pickles(self, tmp_path):
        """Weights in the old format, which can run code, are not opened."""
        tiny_sd().save_pretrained(tmp_path, safe_serialization=False)
        with pytest.raises(ModelError, match="in an old format alone, which may run code when opened"):
            load_model(config_of(tmp_path))

    def test_not_a_pipeline(self, sd_folder):
        with pytest.raises(ModelError, match=r"folder without model_index.json.*name its parent folder"):
            load_model(config_of(sd_folder / "unet"))

    @pytest.mark.parametrize("offload", ["model", "sequential"])
    def test_offload_needs_a_gpu(self, sd_folder, offload):
        with pytest.raises(ModelError, match=f"model.offload = {offload} needs a GPU; set it to none"):
            load_model(config_of(sd_folder, offload=offload))


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
}
VAE = {
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_q": "mid.attn_1.q",
    "mid_block.attentions.0.to_k": "mid.attn_1.k",
    "mid_block.attentions.0.to_v": "mid.attn_1.v",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "conv_shortcut": "nin_shortcut",
}


def renamed(key, names):
    for ours, theirs in names.items():
        if key.startswith(ours + ".") or f".{ours}." in key:
            key = key.replace(ours, theirs, 1)
    return key


def as_one_file(pipe):
    """The weights under the names that Stable Diffusion was published with."""
    state = {}
    for key, tensor in pipe.unet.state_dict().items():
        name = renamed(key, UNET)
        state["model.diffusion_model." + (renamed(name, RESNET) if "resnets" in key else name)] = tensor
    for key, tensor in pipe.vae.state_dict().items():
        name = renamed(key, VAE)
        for side, last in (("down", 0), ("up", 1)):
            for level in range(2):
                theirs = f"{side}.{abs(last - level)}"
                name = name.replace(f"{side}_blocks.{level}.resnets", f"{theirs}.block")
                name = name.replace(f"{side}_blocks.{level}.{side}samplers.0", f"{theirs}.{side}sample")
        square = "attn_1" in name and name.endswith("weight") and tensor.ndim == 2
        state["first_stage_model." + name] = tensor[:, :, None, None] if square else tensor
    for key, tensor in pipe.text_encoder.state_dict().items():
        name = key if key.startswith("text_model.") else f"text_model.{key}"
        state["cond_stage_model.transformer." + name] = tensor
    return {key: tensor.contiguous() for key, tensor in state.items()}


class TestSingleFiles:
    """Weights in one file, beside the folder that says what they are."""

    @pytest.fixture
    def other(self):
        return tiny_sd(seed=1)

    @pytest.fixture(params=["whole", "denoiser"])
    def file(self, request, other, tmp_path):
        """All of Stable Diffusion, or its denoiser alone under diffusers' names."""
        state = as_one_file(other) if request.param == "whole" else other.unet.state_dict()
        save_file(state, tmp_path / f"{request.param}.safetensors")
        return tmp_path / f"{request.param}.safetensors"

    def test_opened(self, file, sd_folder, other):
        pipe = load_model(config_of(file, base=str(sd_folder))).pipe
        base = tiny_sd()
        whole = file.stem == "whole"
        for part, expected in (("unet", other), ("vae", other if whole else base)):
            state = getattr(pipe, part).state_dict()
            for key, tensor in getattr(expected, part).state_dict().items():
                assert torch.equal(state[key], tensor), key
        text = next(iter(pipe.text_encoder.parameters()))
        assert torch.equal(text, next(iter((other if whole else base).text_encoder.parameters())))
        assert pipe(PROMPTS, num_inference_steps=2, output_type="latent").images.isfinite().all()

    def test_part_by_part(self, file, sd_folder, other):
        components = Components.of(config_of(file, base=str(sd_folder)))
        assert torch.equal(components.denoiser().conv_in.weight, weights(other))
        assert components.scheduler().config.prediction_type == "epsilon"
        pipe = components.text_pipeline()
        assert pipe.unet is None and pipe.vae is None and pipe.text_encoder is not None

    def test_settings(self, sd_folder):
        with pytest.raises(MituneError, match="may run code when opened; convert it to .safetensors"):
            ModelConfig(name="model.ckpt", base=str(sd_folder))
        for settings in ({"name": "model.safetensors"}, {"name": str(sd_folder), "base": str(sd_folder)}):
            with pytest.raises(MituneError, match="a single .safetensors file, and it alone, needs a base"):
                ModelConfig(**settings)
        with pytest.raises(ModelError, match=r"Cannot read .*none.safetensors as a .safetensors file"):
            load_model(config_of(sd_folder / "none.safetensors", base=str(sd_folder)))

    def test_families_without(self, tmp_path):
        CASES["PixArt-alpha"].make().save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="diffusers opens no single files of a PixArtTransformer2DModel"):
            load_model(config_of(tmp_path / "model.safetensors", base=str(tmp_path)))


class TestAdapters:
    """Those of earlier rounds."""

    @pytest.mark.parametrize("name", ["SD 1.x, 2.x base (epsilon)", "PixArt-alpha"])
    def test_of_another_model(self, name, tmp_path):
        """An adapter that fits nothing in the model is refused, by either way of loading."""
        other = CASES["Z-Image"].make()
        add_adapter(other.transformer, FinetuneConfig(rank=2))
        save_adapter(tmp_path / "adapter", type(CASES["PixArt-Sigma"].make()), {"transformer": other.transformer})
        CASES[name].make().save_pretrained(tmp_path / "model")
        with pytest.raises(ModelError, match="trained for another one"):
            load_model(config_of(tmp_path / "model"), adapter=tmp_path / "adapter")

    @pytest.mark.parametrize("name", ["SD 1.x, 2.x base (epsilon)", "PixArt-alpha"])
    def test_merged(self, name, tmp_path):
        """The model with the adapter in its weights does what the two do together, by either way of loading."""
        case = CASES[name]
        pipe = case.make()
        pipe.save_pretrained(tmp_path / "model")
        network = denoiser_of(pipe)
        add_adapter(network, FinetuneConfig(rank=2))
        for key, parameter in network.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        component = "unet" if hasattr(pipe, "unet") else "transformer"
        save_adapter(tmp_path / "adapter", type(pipe), {component: network})
        config = config_of(tmp_path / "model")
        merged = load_model(config_of(export_fused(config, tmp_path / "adapter", tmp_path / "merged"))).pipe
        call = prompted(pipe, PROMPTS, case.call) | {"num_inference_steps": 2, "output_type": "latent"}
        given, expected = (
            each(**call, generator=torch.Generator().manual_seed(0))[0]
            for each in (merged, load_model(config, adapter=tmp_path / "adapter").pipe)
        )
        torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-3)

    def test_no_folder(self, sd_folder, tmp_path):
        with pytest.raises(ModelError, match="There is no adapter folder .*none; train one with `mitune train`"):
            load_model(config_of(sd_folder), adapter=tmp_path / "none")


class TestCalls:
    def test_true_guidance(self):
        """Where guidance_scale is told to the network, a blank prompt is the null."""
        torch.manual_seed(0)
        pipe = flux()
        assert guidance_name(type(pipe)) == "true_cfg_scale"
        assert prompted(pipe, PROMPTS, {})["negative_prompt"] == [" ", " "]
        assert prompted(pipe, PROMPTS, {"negative_prompt": "bad"})["negative_prompt"] == ["bad", "bad"]
        assert guidance_name(StableDiffusionXLPipeline) == "guidance_scale"
        assert "negative_prompt" not in prompted(tiny_sd(), PROMPTS, {})

    def test_true_guidance_of_a_folder(self, tmp_path):
        """model.guidance_scale is the true one; the other goes into model.call."""
        torch.manual_seed(0)
        flux().save_pretrained(tmp_path)
        model = load_model(config_of(tmp_path, guidance_scale=4.0, call={"guidance_scale": 2.5}))
        assert model.call == {"true_cfg_scale": 4.0, "guidance_scale": 2.5}
        assert model.guidance_scale == 4.0


RANK = 32


def of_unet(channels, context, blocks):
    """Sum of (inputs + outputs) over the adapted layers of transformer blocks: q, k, v, out twice and GEGLU's two."""
    own = 4 * 2 * channels
    cross = 2 * 2 * channels + 2 * (channels + context)
    feed_forward = (channels + 8 * channels) + (4 * channels + channels)
    return blocks * (own + cross + feed_forward)


def of_sd35():
    """The same for 24 joint blocks, of which 13 attend twice to the picture and the last ends with the text's keys."""
    attention, feed_forward = 4 * 2 * 1536, 2 * (1536 + 4 * 1536)
    last_text = 3 * 2 * 1536  # q, k, v: what they give is not used after the last block
    return 24 * (attention + feed_forward) + 23 * (attention + feed_forward) + last_text + 13 * attention


class TestPublishedSizes:
    """The architectures of the papers, without memory for their weights."""

    @pytest.mark.parametrize(
        ("kind", "config", "millions", "layers", "sizes"),
        [
            # 16 transformer blocks: two in each of three levels on the way down, three on the way up, one between.
            (
                UNet2DConditionModel,
                SD21_BASE,
                865.9,
                16 * 10,
                of_unet(320, 1024, 5) + of_unet(640, 1024, 5) + of_unet(1280, 1024, 6),
            ),
            # Depths 2 and 10, in two and three places; ten blocks between.
            (
                UNet2DConditionModel,
                SDXL_BASE,
                2567.5,
                70 * 10,
                of_unet(640, 2048, 2 * 2 + 3 * 2) + of_unet(1280, 2048, 2 * 10 + 3 * 10 + 10),
            ),
            (SD3Transformer2DModel, SD35_MEDIUM, 2243.2, 24 * 6 + 23 * 6 + 3 + 13 * 4, of_sd35()),
        ],
        ids=["SD 2.1 base", "SDXL base", "SD 3.5 medium"],
    )
    def test_parameters_layers_and_adapter(self, kind, config, millions, layers, sizes):
        with torch.device("meta"):
            network = kind(**config)
            count = sum(parameter.numel() for parameter in network.parameters())
            assert count / 1e6 == pytest.approx(millions, abs=0.05)
            assert len(adapted_layers(network)) == layers
            add_adapter(network, FinetuneConfig(adapter="lora", rank=RANK))
        adapter = sum(parameter.numel() for parameter in trainable({"denoiser": network}).values())
        assert adapter == RANK * sizes
