"""Pictures are the pipeline's own, whatever it does around its autoencoder, and latents are what it would decode."""

from __future__ import annotations

import functools
import logging

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, VQModel
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha
from PIL import Image

from mitune.batches import called_through
from mitune.config import PoolConfig
from mitune.denoiser import denoiser_of
from mitune.errors import MituneError, ModelError
from mitune.latent_map import LatentMap, probes
from mitune.models import Model
from mitune.pictures import check_pictures, decode, encode_images
from mitune.pool import build_pool
from mitune.scoring import score
from tests.families import CASES, PICTURE, PROMPTS
from tests.tiny import tiny_sd, tiny_sd3

SEEDS = (0, 1)


def pictures(side=16):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in PROMPTS]


def run(pipe, output_type, **call):
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipe(PROMPTS, num_inference_steps=3, generator=generators, output_type=output_type, **call)[0]


def same_pictures(pipe, **call):
    """Whether mitune's pictures of the pipeline's latents are the pipeline's own."""
    expected = run(pipe, "pil", **call)
    made = list(decode(Model(pipe, call, "tiny"), run(pipe, "latent", **call).float()))
    assert len(made) == len(expected)
    return all(np.array_equal(one, other) for one, other in zip(made, expected, strict=True))


def overflowing(pipe, lifted):
    """The pipeline in float16, with an autoencoder whose pictures are right in float32 and infinite in float16."""
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.mul_(3e5)
    pipe.vae.register_to_config(force_upcast=lifted)
    return pipe.to(dtype=torch.float16)


def levels(images):
    return len(np.unique(np.asarray(images)))


class TestDecoding:
    @pytest.mark.parametrize("name", ["SDXL", "AuraFlow"])
    def test_a_decoder_that_the_pipeline_lifts(self, name, caplog):
        case = CASES[name]
        pipe = overflowing(case.make(), lifted=True)
        latents = run(pipe, "latent", **PICTURE)
        caplog.clear()
        made = list(decode(Model(pipe, PICTURE, "tiny"), latents.float()))
        assert not caplog.records
        assert levels(made) > 50
        assert all(np.array_equal(*pair) for pair in zip(made, run(pipe, "pil", **PICTURE), strict=True))

    def test_one_that_it_does_not_lift_is_reported(self, caplog):
        pipe = overflowing(tiny_sd(), lifted=False)
        with caplog.at_level(logging.WARNING):
            made = list(decode(Model(pipe, {}, "tiny"), torch.randn(2, 4, 8, 8)))
        assert levels(made) == 1
        assert [record.message for record in caplog.records if record.name == "mitune.pictures"] == [
            "2 of 2 pictures came out broken, as the autoencoder overflows in float16; set model.dtype to float32."
        ]

    def test_a_pipeline_of_its_own_kind(self):
        """Other numbers before the decoder, another picture behind it, and one that is left as it is."""

        class Own(StableDiffusionPipeline):
            def run_safety_checker(self, image, *_):
                return -image, [False, True]

        pipe = Own(**tiny_sd().components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        with called_through(pipe.vae, lambda inner, z, **more: inner(z.flip(2) ** 3, **more), "decode"):
            assert same_pictures(pipe)
        assert same_pictures(pipe)

    def test_means_and_deviations(self):
        pipe = CASES["SDXL"].make()
        plain = run(pipe, "pil", **PICTURE)
        pipe.vae.register_to_config(latents_mean=[0.5, -1.0, 0.0, 2.0], latents_std=[1.0, 3.0, 0.5, 2.0])
        assert not np.array_equal(plain[0], run(pipe, "pil", **PICTURE)[0])
        assert same_pictures(pipe, **PICTURE)

    def test_a_watermark(self):
        pipe = CASES["SDXL"].make()

        class Watermark:
            def apply_watermark(self, images):
                return images.flip(3)

        pipe.watermark = Watermark()
        assert same_pictures(pipe, **PICTURE)

    def test_sizes_that_are_cut(self, monkeypatch):
        """PixArt makes a picture of the nearest size that it knows and cuts it to the one that is asked for."""
        pipe = CASES["PixArt-alpha"].make()
        pipe.transformer.register_to_config(sample_size=32)
        monkeypatch.setattr(pipeline_pixart_alpha, "ASPECT_RATIO_256_BIN", {"1.0": [16.0, 16.0]})
        call = {"height": 8, "width": 16, "use_resolution_binning": True, "clean_caption": False}
        assert run(pipe, "pil", **call)[0].size == (16, 8)
        assert same_pictures(pipe, **call)

    def test_leaves_the_pipeline_as_it_is(self):
        pipe = tiny_sd()
        before, scheduler = run(pipe, "latent"), pipe.scheduler
        timesteps = scheduler.timesteps
        state = torch.get_rng_state()
        list(decode(Model(pipe, {}, "tiny"), before))
        encode_images(pipe, pictures())
        assert pipe.scheduler is scheduler
        assert torch.equal(scheduler.timesteps, timesteps)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(run(pipe, "latent"), before)

    def test_none(self):
        assert list(decode(Model(tiny_sd(), {}, "tiny"), torch.empty(0, 4, 8, 8))) == []

    def test_refusals(self):
        with pytest.raises(MituneError, match=r"shape \(1, 4, 8, 8\), but these have \(1, 4, 4, 4\); set model.call"):
            list(decode(Model(tiny_sd(), {}, "tiny"), torch.zeros(1, 4, 4, 4)))
        film = CASES["Wan 2.1 (video)"]
        with pytest.raises(ModelError, match="WanPipeline makes no pictures"):
            list(decode(Model(film.make(), film.call, "tiny"), torch.zeros(1, 4, 2, 4, 4)))

    def test_latents_that_change_after_the_last_step(self):
        with pytest.raises(ModelError, match="Changing changes its latents after the last step"):
            list(decode(Model(changing(), {}, "tiny"), torch.ones(1, 4, 8, 8)))


class Changing(StableDiffusionPipeline):
    def maybe_free_model_hooks(self):
        pass

    def __call__(self, *args, **kwargs):
        output = super().__call__(*args, **kwargs)
        if kwargs["output_type"] == "latent":
            output.images = output.images * 2
        return output


def changing():
    pipe = Changing(**tiny_sd().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("make", "call", "what"),
    [
        (CASES["Wan 2.1 (video)"].make, CASES["Wan 2.1 (video)"].call, "WanPipeline makes no pictures"),
        (CASES["LTX-Video (video)"].make, CASES["LTX-Video (video)"].call, "LTXPipeline makes no pictures"),
        (changing, {}, "Changing changes its latents after the last step"),
    ],
)
def test_what_makes_no_pictures_is_refused_before_anything_is_sampled(make, call, what, tmp_path, monkeypatch):
    pipe = make()
    denoiser = denoiser_of(pipe)
    never = functools.wraps(denoiser.forward)(lambda *_, **__: pytest.fail("the network was called"))
    model = Model(pipe, call | {"num_inference_steps": 4, "guidance_scale": 3.0}, "tiny")
    with monkeypatch.context() as patched:
        patched.setattr(denoiser, "forward", never)
        with pytest.raises(ModelError, match=what):
            build_pool(model, PROMPTS, tmp_path / "pool", PoolConfig(candidates=2), identity={})
    assert not (tmp_path / "pool").exists()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.makes == "pictures"])
def test_what_makes_pictures_is_not(name):
    case = CASES[name]
    check_pictures(Model(case.make(), case.call, "tiny"))


class TestEncoding:
    def test_the_encoder_s_mode(self):
        pipe = tiny_sd()
        pixels = pipe.image_processor.preprocess(pictures())
        with torch.no_grad():
            expected = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
        torch.testing.assert_close(encode_images(pipe, pictures()), expected, rtol=1e-6, atol=1e-7)
        assert expected.shape == (2, 4, 8, 8)

    def test_the_shift_is_subtracted(self):
        pipe = tiny_sd3()
        plain = encode_images(pipe, pictures())
        pipe.vae.register_to_config(shift_factor=0.25)
        shifted = encode_images(pipe, pictures())
        torch.testing.assert_close(plain - shifted, torch.full_like(plain, 0.25 * pipe.vae.config.scaling_factor))

    def test_means_and_deviations(self):
        pipe = CASES["SDXL"].make()
        plain = encode_images(pipe, pictures())
        mean, deviation = [0.5, -1.0, 0.0, 2.0], [1.0, 3.0, 0.5, 2.0]
        pipe.vae.register_to_config(latents_mean=mean, latents_std=deviation)
        mean, deviation = (torch.tensor(values).reshape(1, 4, 1, 1) for values in (mean, deviation))
        expected = (plain - mean * pipe.vae.config.scaling_factor) / deviation
        torch.testing.assert_close(encode_images(pipe, pictures()), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("kind", [AutoencoderTiny, VQModel])
    def test_encoders_without_a_distribution(self, kind):
        torch.manual_seed(0)
        shapes = {"in_channels": 3, "out_channels": 3, "latent_channels": 4}
        if kind is AutoencoderTiny:
            shapes |= {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
            shapes |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
        else:
            shapes |= {"block_out_channels": (8, 8), "norm_num_groups": 2, "num_vq_embeddings": 8}
            shapes |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        pipe = tiny_sd()
        pipe.vae = kind(**shapes).eval()
        with torch.no_grad():
            expected = pipe.vae.encode(pipe.image_processor.preprocess(pictures())).latents
        encoded = encode_images(pipe, pictures())
        torch.testing.assert_close(encoded, expected * pipe.vae.config.scaling_factor, rtol=1e-5, atol=1e-6)
        assert score(pipe, pictures(), PROMPTS, draws=4).draws.isfinite().all()
        if kind is AutoencoderTiny:  # Stable Diffusion's pipeline encodes with a VQ model, but does not decode
            assert same_pictures(pipe)

    @pytest.mark.parametrize("lifted", [True, False])
    def test_half_precision_overflows_nowhere(self, lifted):
        pipe = CASES["SDXL"].make()
        with torch.no_grad():
            pipe.vae.encoder.conv_in.weight.mul_(3e5)
        expected = encode_images(pipe, pictures())
        pipe.vae.register_to_config(force_upcast=lifted)
        pipe.to(dtype=torch.float16)
        torch.testing.assert_close(encode_images(pipe, pictures()), expected, rtol=0.05, atol=0.05)
        assert pipe.vae.dtype == torch.float16

    def test_an_image_does_not_hang_on_its_neighbors(self):
        pipe = tiny_sd3()
        one, other = pictures()
        together = encode_images(pipe, [one, other])
        torch.testing.assert_close(encode_images(pipe, [other]), together[1:], rtol=1e-5, atol=1e-6)

    def test_refusals(self):
        film = CASES["Wan 2.1 (video)"].make()
        with pytest.raises(ModelError, match="WanPipeline has no autoencoder that reads pictures; give latents"):
            encode_images(film, pictures())
        with pytest.raises(MituneError, match="makes no pictures of 18 × 18 pixels"):
            encode_images(tiny_sd(), pictures(18))

    def test_what_cannot_be_turned_round_is_refused(self):
        pipe = tiny_sd()
        pipe.vae.register_to_config(scaling_factor=Squaring())
        with pytest.raises(ModelError, match="does more to its latents than to order, scale and shift them"):
            encode_images(pipe, pictures())


class Squaring:
    """A scaling factor by which latents are no longer divided."""

    def __rtruediv__(self, latents):
        return latents**2


class TestLatentMap:
    """v = scale · z[source] + shift, for every order, scale and shift."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(4, 8, 8), (3, 5, 7), (16, 64, 64)])
    def test_is_found(self, shape, dtype):
        generator = torch.Generator().manual_seed(0)
        places = torch.randperm(int(np.prod(shape)), generator=generator)
        scale = (0.7 + 5 * torch.rand(len(places), generator=generator)) * torch.sign(torch.randn(len(places)))
        shift = torch.randn(len(places), generator=generator)

        def handed(z):
            return (z.flatten(1)[:, places] * scale + shift).reshape(-1, len(places), 1, 1).to(dtype)

        z = torch.randn(2, *shape, generator=generator)
        mapping = LatentMap.between(probes(z), handed(probes(z)))
        assert mapping is not None
        assert torch.equal(mapping.source, places)
        found = mapping.latents(handed(z).float())
        torch.testing.assert_close(found, z, rtol=0, atol=150 * torch.finfo(dtype).eps)

    def test_tokens(self):
        """Patches of 2 × 2 as tokens, as FLUX has them."""
        z = torch.randn(2, 16, 16)  # (N, tokens, channels)

        def unpacked(z):
            return z.reshape(-1, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, 4, 8, 8)

        mapping = LatentMap.between(probes(z), unpacked(probes(z)) / 0.36 + 0.12)
        torch.testing.assert_close(mapping.latents(unpacked(z) / 0.36 + 0.12), z, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        "other",
        [
            lambda z: z**3,
            lambda z: z.tanh(),
            lambda z: z + 0.01 * z.mean(dim=(1, 2, 3), keepdim=True),
            lambda z: z[:, :1],
            lambda z: z.abs(),
            lambda z: 0 * z,
            lambda z: z.repeat(2, 1, 1, 1),
            lambda z: z + 0.1 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1)),
        ],
    )
    def test_other_ways_have_none(self, other):
        z = probes(torch.empty(1, 4, 8, 8))
        assert LatentMap.between(z, other(z)) is None
