"""Post-hoc scores of images on real tiny pipelines."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import nn

from mitune.denoiser.network import denoiser_of
from mitune.denoiser.opening.models import model_folder
from mitune.denoiser.path import path_of
from mitune.denoiser.pictures import encode_images
from mitune.errors import GuidanceError, MituneError
from mitune.information import UNITS, Estimate, LogisticProposal, RectifiedFlowProposal
from mitune.scoring import default_proposal, grid_of, save_heat_map, score
from tests.draws import ESTIMATORS, MODELS, covered, recorded
from tests.families import CASES
from tests.tiny import PROMPTS, SD3_CALL, tiny_sd, tiny_sd3, tiny_sdxl

PIPELINES = {"sd": (tiny_sd, {}), "sd3": (tiny_sd3, SD3_CALL), "sdxl": (tiny_sdxl, {})}


@pytest.fixture(params=PIPELINES)
def model(request):
    """(pipe, its call)."""
    make, call = PIPELINES[request.param]
    return make(), call


@pytest.fixture
def latents():
    """(2, 4, 8, 8)"""
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def shapes_path(name):
    kind = {"shapes-sd": DDIMScheduler, "shapes-sd3": FlowMatchEulerDiscreteScheduler}[name]
    return path_of(kind.from_pretrained(model_folder(name), subfolder="scheduler"))


def pictures():
    return [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]


class TestByHand:
    @pytest.mark.parametrize("estimator", list(UNITS))
    def test_one_stratum(self, estimator, latents):
        """Two antithetic pairs at λ of the proposal's density, from the U-Net and the prompts' own embeddings."""
        pipe = tiny_sd()
        proposal = LogisticProposal(-2, 3)
        scores = score(pipe, latents, PROMPTS, estimator=estimator, draws=4, seed=5, proposal=proposal)
        rng = torch.Generator().manual_seed(5)
        prompt, null = (pipe.encode_prompt(text, "cpu", 1, False)[0] for text in (PROMPTS, ["", ""]))
        draws = []
        for _ in range(2):
            log_snr = proposal.at(torch.rand((), generator=rng, dtype=torch.float64))
            noise = torch.randn(4, 8, 8, generator=rng)
            alpha, sigma = log_snr.sigmoid().sqrt().float(), (-log_snr).sigmoid().sqrt().float()
            t = path_of(pipe.scheduler).timestep(log_snr)
            total = torch.zeros(2)
            for epsilon in (noise, -noise):
                noisy = alpha * latents + sigma * epsilon
                with torch.no_grad():
                    with_prompt, without = (pipe.unet(noisy, t, embeds).sample for embeds in (prompt, null))
                total += {
                    "standard": (epsilon - without) ** 2 - (epsilon - with_prompt) ** 2,
                    "orthogonal": (with_prompt - without) ** 2,
                    "self-confidence": -((epsilon - with_prompt) ** 2),
                }[estimator].sum(dim=(1, 2, 3))
            weight = 1 / 256 if estimator == "self-confidence" else 0.5 / proposal.density(log_snr).float()
            draws.append(weight * total / 2)
        by_hand = torch.stack(draws, dim=1)
        torch.testing.assert_close(scores.draws[:, 0], by_hand, rtol=1e-3, atol=1e-4)
        for row, estimate in zip(by_hand, scores.estimates, strict=True):
            assert estimate.value == pytest.approx(row.mean().item(), rel=1e-3, abs=1e-4)
            assert estimate.standard_error == pytest.approx((row[0] - row[1]).abs().item() / 2, rel=1e-2, abs=1e-4)
            assert estimate.unit == UNITS[estimator]
            assert estimate.samples == 2  # antithetic pairs


class ExactUnet(nn.Module):
    """In place of a U-Net: x | y ~ N(ρ y, 1 − ρ²) in every latent, y read off the prompt; the empty prompt: N(0, 1)."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, pipe, y_of_prompt, rho):
        super().__init__()
        self.config = denoiser_of(pipe).config
        self.path, self.y_of_prompt, self.rho = path_of(pipe.scheduler), y_of_prompt, rho

    def forward(self, sample, timestep, encoder_hidden_states, **_):
        # Told apart by their embeddings; the last known one is the empty prompt.
        gaps = (encoder_hidden_states[:, None] - self.y_of_prompt[0]).abs().amax(dim=(2, 3))
        which = gaps.argmin(dim=1)
        asked = (which < len(self.y_of_prompt[1])).view(-1, 1, 1, 1)
        y = torch.cat([self.y_of_prompt[1], torch.zeros(1)])[which].view(-1, 1, 1, 1)
        mean, variance = self.rho * y, torch.where(asked, 1 - self.rho**2, 1.0)
        t = torch.as_tensor(timestep).flatten()[0]
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        deviation = (sample - alpha * mean) / (alpha**2 * variance + sigma**2)
        noise, clean = sigma * deviation, mean + alpha * variance * deviation
        output = {
            "epsilon": noise,
            "sample": clean,
            "velocity": noise - clean if self.path.is_flow else alpha * noise - sigma * clean,
        }[self.path.predicts]
        return (output,)


class TestGaussianPair:
    """The whole way through a real pipeline, with an exact denoiser: the log-ratio of each image is known."""

    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
    @pytest.mark.parametrize("estimator", ["standard", "orthogonal"])
    def test_diffusion(self, prediction, estimator):
        self.check(DDIMScheduler(prediction_type=prediction), estimator)

    @pytest.mark.parametrize("estimator", ["standard", "orthogonal"])
    def test_flow(self, estimator):
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
        self.check(DPMSolverMultistepScheduler(**flow), estimator)

    def check(self, scheduler, estimator):
        """Standard: log p(x|y) − log p(x) of each image. Orthogonal: that in the mean over x ~ p(x|y), here KL."""
        pipe, rho = tiny_sd(), 0.8
        pipe.scheduler = scheduler
        y = torch.tensor([1.0, -0.5])
        embeds = pipe.encode_prompt([*PROMPTS, ""], "cpu", 1, False)[0].detach()
        pipe.unet = ExactUnet(pipe, (embeds, y), rho)
        v = 1 - rho**2
        mean = rho * y.view(-1, 1, 1, 1)
        x = mean + math.sqrt(v) * torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        prompts = PROMPTS if estimator == "standard" else PROMPTS * 8
        if estimator == "orthogonal":
            noise = torch.randn(16, 4, 16, 16, generator=torch.Generator().manual_seed(1))
            x = mean.repeat(8, 1, 1, 1) + math.sqrt(v) * noise
        proposal = LogisticProposal(-8, 8)
        scores = score(pipe, x, prompts, estimator=estimator, draws=256, batch_size=16, proposal=proposal)
        if estimator == "standard":
            truth = (-0.5 * math.log(v) - (x - mean) ** 2 / (2 * v) + x**2 / 2).sum(dim=(1, 2, 3)).tolist()
            estimates = scores.estimates
        else:
            kl = 1024 * (-0.5 * math.log(v) + (v + mean.flatten() ** 2 - 1) / 2)
            truth = kl.tolist()
            estimates = [Estimate.of_strata(scores.draws[i::2].mean(dim=0)) for i in range(2)]
        for estimate, value in zip(estimates, truth, strict=True):
            assert estimate.standard_error <= 0.03 * value
            # Beyond λ = ±8 lies under 0.5 %. The orthogonal form of one latent varies with x by some 0.3 nats.
            own = 0.0 if estimator == "standard" else 4 * 0.3 * 1024 / math.sqrt(8 * 1024)
            assert estimate.value == pytest.approx(value, abs=4 * estimate.standard_error + own + 0.005 * value)


class TestPromises:
    def test_batches_make_no_difference(self, model, latents):
        pipe, call = model
        kwargs = {"draws": 4, "estimator": "standard", "call": call}
        together = score(pipe, latents, PROMPTS, **kwargs)
        apart = score(pipe, latents, PROMPTS, batch_size=1, **kwargs)
        alone = score(pipe, latents[1:], PROMPTS[1:], **kwargs)
        torch.testing.assert_close(apart.draws, together.draws, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(alone.draws[0], together.draws[1], rtol=1e-3, atol=1e-3)

    def test_seeds(self, model, latents):
        pipe, call = model
        state = torch.get_rng_state()
        first, again, other = (score(pipe, latents, PROMPTS, draws=4, seed=seed, call=call).draws for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(torch.get_rng_state(), state)

    def test_map(self, model, latents):
        pipe, call = model
        scores = score(pipe, latents, PROMPTS, draws=8, call=call)
        assert scores.maps.shape == (2, 8, 8)
        assert scores.draws.shape == (2, 2, 2)
        values = [estimate.value for estimate in scores.estimates]
        assert scores.maps.sum(dim=(1, 2)).tolist() == pytest.approx(values, rel=1e-4)
        assert (scores.maps >= 0).all()  # of the orthogonal estimator

    def test_the_empty_prompt_says_nothing(self, model, latents):
        pipe, call = model
        call = {**call, "negative_prompt": ""}  # else SDXL's null is zero embeddings, not the empty prompt
        for estimator in ("standard", "orthogonal"):
            for estimate in score(pipe, latents, ["", ""], estimator=estimator, draws=4, call=call).estimates:
                assert estimate.value == pytest.approx(0, abs=1e-4)

    def test_differences_between_prompts_are_paired(self, latents):
        """One image and two prompts share their noise, so the difference is known better than either value."""
        pipe = tiny_sd()
        same = latents[:1].repeat(2, 1, 1, 1)
        scores = score(pipe, same, PROMPTS, estimator="self-confidence", draws=64)
        difference = Estimate.of_strata(scores.draws[0] - scores.draws[1])
        assert difference.standard_error < 0.5 * scores.estimates[0].standard_error
        assert difference.value == pytest.approx(scores.estimates[0].value - scores.estimates[1].value, abs=1e-5)

    def test_proposals_agree(self, latents):
        """RFMI's importance sampling and the default estimate one integral; where its weights are not too unequal."""
        pipe = tiny_sd()
        a, b = (
            score(pipe, latents, PROMPTS, draws=128, proposal=kind(-3.0, 2.0)).estimates
            for kind in (LogisticProposal, RectifiedFlowProposal)
        )
        for one, other in zip(a, b, strict=True):
            error = math.hypot(one.standard_error, other.standard_error)
            assert error <= 0.08 * one.value
            assert one.value == pytest.approx(other.value, abs=4 * error)

    def test_default_proposal(self):
        flow = default_proposal(path_of(FlowMatchEulerDiscreteScheduler()), "orthogonal")
        assert flow.high == pytest.approx(2 * math.log(19))
        nats, confidence = (
            default_proposal(path_of(tiny_sd().scheduler), name) for name in UNITS if name != "standard"
        )
        assert nats.low == confidence.low == pytest.approx(-5.36, abs=0.01)
        assert nats.scale == 2 * confidence.scale == 4  # a mean over flow time has to be drawn uniformly in it


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", MODELS)
class TestRecordedDraws:
    """The error of `score`, on draws of the embedded models; chance moves the percentages by less than 0.3."""

    @pytest.mark.parametrize(("noisings", "below"), [(64, 2), (16, 4)])
    def test_intervals_cover_what_they_say(self, name, estimator, noisings, below):
        """68 and 95 % within 2 points; four degrees of freedom at most are too few for the skew of 16 noisings."""
        proposal = default_proposal(shapes_path(name), estimator)
        rng = np.random.default_rng(0)
        shares = [
            covered(scene.draws(proposal, 4000, noisings // 4, 2, rng), scene.integral)
            for scene in recorded(name, estimator, proposal)
        ]
        excess = np.mean(shares, axis=0) - (68.27, 95)
        assert (-below < excess).all() and (excess < 2).all()

    def test_density(self, name, estimator):
        """Unbiased by the default density, and of less variance than by uniform flow times."""
        proposal, flow_times = (default_proposal(shapes_path(name), which) for which in (estimator, "self-confidence"))
        rng = np.random.default_rng(0)
        ratios = []
        for scene in recorded(name, estimator, proposal):
            here, there = (scene.draws(p, 4000, 16, 2, rng).mean(dim=(1, 2)) for p in (proposal, flow_times))
            assert here.mean().item() == pytest.approx(scene.integral, abs=4 * here.std().item() / math.sqrt(4000))
            ratios.append((here.var() / there.var()).log().item())
        assert math.exp(np.mean(ratios)) < {"shapes-sd": 0.6, "shapes-sd3": 0.97}[name]


class TestImages:
    def test_pictures_score_as_their_latents(self):
        pipe = tiny_sd()
        direct = score(pipe, pictures(), PROMPTS, draws=4).draws
        assert torch.equal(direct, score(pipe, encode_images(pipe, pictures()), PROMPTS, draws=4).draws)

    @pytest.mark.parametrize("mode", ["RGBA", "I;16", "P", "turned"])
    def test_pictures_score_as_they_are_shown(self, mode):
        """Transparent, 16-bit, with a palette, or turned by EXIF: the number is that of the plain picture."""
        ramp = np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16)
        plain = Image.fromarray(ramp).convert("RGB")
        if mode == "RGBA":
            given = Image.merge("RGBA", [Image.new("L", (16, 16))] * 3 + [Image.fromarray(255 - ramp)])
        elif mode == "turned":
            given = plain.transpose(Image.Transpose.ROTATE_90)
            given.getexif()[0x0112] = 6
        else:
            given = Image.fromarray(ramp.astype(np.uint16) * 257) if mode == "I;16" else plain.convert("L").convert("P")
        pipe = tiny_sd()
        expected = score(pipe, [plain], PROMPTS[:1], draws=4).draws
        assert torch.equal(score(pipe, [given], PROMPTS[:1], draws=4).draws, expected)

    def test_sizes(self):
        """Sides come down to the grid, of 8 pixels here; the map says which."""
        pipe = tiny_sd()
        scores = score(pipe, [Image.new("RGB", (29, 19), "red")], PROMPTS[:1], draws=4)
        assert scores.maps.shape == (1, 8, 12)
        with pytest.raises(MituneError, match="1 × 1 pixels; the smallest that this model takes has 8 × 8"):
            score(pipe, [Image.new("RGB", (1, 1))], PROMPTS[:1], draws=4)

    def test_grid(self):
        """Eight pixels of the VAE, two latents of the transformer, as in SD3 and Flux."""
        pipes = {
            name: CASES[name].make() for name in ("SD3, SD3.5", "Flux (true CFG)", "Z-Image", "Qwen-Image", "Sana")
        }
        for pipe in pipes.values():
            pipe.vae_scale_factor = 8
        assert {name: grid_of(pipe) for name, pipe in pipes.items()} == dict.fromkeys(pipes, 16) | {"Sana": 8}

    def test_heat_map_is_a_picture(self, tmp_path: Path):
        file = tmp_path / "maps" / "red.png"
        information = torch.zeros(8, 8)
        information[2, 3] = 1.0
        save_heat_map(file, pictures()[0], information)
        drawn = np.asarray(Image.open(file).convert("RGB")).astype(int)
        assert drawn.shape[0] > 100
        hot = np.argwhere((drawn[..., 0] - drawn[..., 2] > 60) & (np.arange(drawn.shape[1]) < 0.7 * drawn.shape[1]))
        # the one warm spot lies up and left of the middle, as the map has it
        assert len(hot) and (hot.mean(axis=0) < np.array(drawn.shape[:2]) / 2).all()


class TestRefusals:
    def test_numbers_that_do_not_fit(self, latents):
        pipe = tiny_sd()
        with pytest.raises(MituneError, match="2 images for 1 prompts; give one prompt for each image"):
            score(pipe, latents, PROMPTS[:1])
        for draws in (0, 6):
            with pytest.raises(MituneError, match=f"draws = {draws} must be a multiple of 4"):
                score(pipe, latents, PROMPTS, draws=draws)
        with pytest.raises(MituneError, match=r"shape \(2, 4, 64\); this model takes \(N, C, H, W\)"):
            score(pipe, latents.flatten(2), PROMPTS)
        with pytest.raises(MituneError, match="differ in size"):
            score(pipe, [pictures()[0], pictures()[1].resize((32, 32))], PROMPTS)

    def test_unknown_estimator(self, latents):
        with pytest.raises(MituneError, match="no estimator 'difference'; the known ones are standard, orth"):
            score(tiny_sd(), latents, PROMPTS, estimator="difference")

    def test_no_guidance(self, latents):
        pipe = tiny_sd()
        pipe.unet.register_to_config(time_cond_proj_dim=4)  # what makes a distilled pipeline skip its second half
        pipe.unet.time_embedding.cond_proj = nn.Linear(4, 8)
        with pytest.raises(GuidanceError, match="not guidance-distilled"):
            score(pipe, latents, PROMPTS, draws=4)
