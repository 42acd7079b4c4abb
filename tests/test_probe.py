"""The hook: on real tiny pipelines against sums made by hand, and on an exact denoiser against the analytic MI."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mitune.denoiser.network import denoiser_of
from mitune.denoiser.path import path_of
from mitune.denoiser.probe import MIProbe
from mitune.errors import GuidanceError, MituneError, ModelError
from mitune.information import SCORES, Estimate, get_score
from mitune.worlds.shapes.training.architecture import BETAS
from tests.tiny import PROMPTS, SD3_CALL, tiny_sd, tiny_sd3

STEPS = 6


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(pipe, prompts=PROMPTS, *, seeds=(0, 1), **call):
    """Final latents of a guided run."""
    arguments = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"}
    extra = SD3_CALL if hasattr(pipe, "transformer") else {}
    return pipe(prompts, generator=generators(seeds), **arguments | extra | call).images


def watch(pipe, prompts=PROMPTS, **call):
    with MIProbe(pipe) as probe:
        latents = sample(pipe, prompts, **call)
    return latents, probe


class TestByHand:
    """Per-step terms on the unmodified pipelines, from the callback's latents and the denoiser called again."""

    @pytest.fixture(params=["sd", "sd-v", "sd-euler", "sd3"])
    def run(self, request):
        """(pipe, trace, latents z_t of each step as the denoiser got them, σ, α, final latents)."""
        if request.param == "sd3":
            pipe = tiny_sd3(shift=3.0)
        else:
            pipe = tiny_sd(prediction_type="v_prediction" if request.param == "sd-v" else "epsilon")
        if request.param == "sd-euler":
            pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        seen = []

        def remember(_pipe, _step, _timestep, given):
            seen.append(given["latents"].clone())
            return {}

        start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
        with MIProbe(pipe) as probe:
            final = sample(pipe, latents=start, callback_on_step_end=remember)
        noisy = [start * pipe.scheduler.init_noise_sigma if request.param != "sd3" else start, *seen[:-1]]
        scheduler = pipe.scheduler
        if request.param == "sd3":
            sigma = scheduler.sigmas[:-1]
            alpha = 1 - sigma
        elif request.param == "sd-euler":
            ratio = scheduler.sigmas[:-1]
            sigma, alpha = ratio / (1 + ratio**2).sqrt(), 1 / (1 + ratio**2).sqrt()
            noisy = [z / (1 + r**2).sqrt() for z, r in zip(noisy, ratio, strict=True)]
        else:
            alpha = scheduler.alphas_cumprod[scheduler.timesteps].sqrt()
            sigma = (1 - alpha**2).sqrt()
        return pipe, probe, final, noisy, alpha.double(), sigma.double()

    def test_terms_and_scores(self, run):
        pipe, probe, final, noisy, alpha, sigma = run
        trace = probe.trace(final)
        flow = hasattr(pipe, "transformer")
        velocity = flow or pipe.scheduler.config.prediction_type == "v_prediction"
        differences, errors, null_errors, dots, guided = [], [], [], [], []
        for z, t, a, s in zip(noisy, pipe.scheduler.timesteps, alpha, sigma, strict=True):
            outputs = []
            for conditioning in (probe.conditioning, probe.null_conditioning):
                ((_, told),) = conditioning.arguments()
                with torch.no_grad():
                    out = denoiser_of(pipe)(z, timestep=t.expand(2), **told).sample.double()
                z64 = z.double()
                if flow:
                    outputs.append((z64 + a * out, z64 - s * out))
                elif velocity:
                    outputs.append((s * z64 + a * out, a * z64 - s * out))
                else:
                    outputs.append((out, (z64 - s * out) / a))
            (epsilon, clean), (epsilon_null, clean_null) = outputs
            noise = (z.double() - a * final.double()) / s
            differences.append(((epsilon - epsilon_null) ** 2).sum(dim=(1, 2, 3)))
            errors.append(((epsilon - noise) ** 2).sum(dim=(1, 2, 3)))
            null_errors.append(((epsilon_null - noise) ** 2).sum(dim=(1, 2, 3)))
            u, u_null = clean - epsilon, clean_null - epsilon_null
            u_guided = u_null + 3.0 * (u - u_null)
            dots.append((u * (u - u_null)).sum(dim=(1, 2, 3)))
            guided.append((u_guided * (u_guided - u_null)).sum(dim=(1, 2, 3)))
        for measured, by_hand in (
            (trace.difference, differences),
            (trace.error_conditional, errors),
            (trace.error_null, null_errors),
            (trace.dot_conditional, dots),
            (trace.dot_guided, guided),
        ):
            expected = torch.stack(by_hand, dim=1)
            # The products are sums of terms that cancel: in float32, their error goes by the size of these.
            atol = 2e-5 * expected.abs().max().item()
            torch.testing.assert_close(measured.double(), expected, rtol=2e-3, atol=atol)

        log_snr = 2 * (alpha / sigma).log()
        kept = log_snr.isfinite() & (sigma / (alpha + sigma) > 0.05)
        by_hand = np.trapezoid(0.5 * torch.stack(differences, dim=1)[:, kept].numpy(), log_snr[kept].numpy(), axis=1)
        assert kept.sum() >= STEPS - 2
        assert get_score("mi-tune")(trace).tolist() == pytest.approx(by_hand.tolist(), rel=2e-3)
        assert trace.dimensions == 4 * 8 * 8
        assert trace.planned_steps == STEPS

    def test_conditioning_is_what_the_denoiser_got(self, run):
        pipe, probe, *_ = run
        names = set(probe.conditioning.rows)
        assert names == set(probe.null_conditioning.rows)
        assert "encoder_hidden_states" in names and not names & {"sample", "hidden_states", "timestep"}
        assert all(len(value) == 2 for value in probe.conditioning.rows.values())
        null = probe.null_conditioning.rows["encoder_hidden_states"]
        assert torch.equal(null[0], null[1])  # the empty prompt
        assert not torch.equal(*probe.conditioning.rows["encoder_hidden_states"])


class ExactDenoiser(nn.Module):
    """Of x ~ N(mean, variance) for each row: what an ε-, v- or z₀-network would say if it were perfect."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def forward(self, sample, timestep, mean, variance, return_dict=True):
        _, log_snr = self.path.at_steps(timestep)
        ratio = torch.exp(log_snr / 2)
        if self.path.is_flow:
            sigma = 1 / (1 + ratio)
            alpha = 1 - sigma
        else:
            sigma = (1 + ratio**2) ** -0.5
            alpha = (1 - sigma**2).sqrt()
        deviation = (sample - alpha * mean) / (alpha**2 * variance + sigma**2)
        noise, clean = sigma * deviation, mean + alpha * variance * deviation
        if self.path.predicts == "epsilon":
            output = noise
        elif self.path.predicts == "sample":
            output = clean
        else:
            output = noise - clean if self.path.is_flow else alpha * noise - sigma * clean
        return SimpleNamespace(sample=output) if return_dict else (output,)


def exact_trace(scheduler, *, candidates=3000, rho=0.8, seed=0):
    """The trace of Gaussian pairs x, y, corr ρ, each noised anew at every step of the scheduler's run."""
    path = path_of(scheduler)
    rng = torch.Generator().manual_seed(seed)
    y, noise = torch.randn(2, candidates, 1, 1, 1, generator=rng)
    x = rho * y + math.sqrt(1 - rho**2) * noise
    mean = torch.cat([torch.zeros_like(y), rho * y])
    variance = torch.cat([torch.ones_like(y), torch.full_like(y, 1 - rho**2)])
    pipe = SimpleNamespace(unet=ExactDenoiser(path), scheduler=scheduler, guidance_scale=1.0)
    with MIProbe(pipe) as probe:
        for t in scheduler.timesteps:
            ratio = torch.exp(path.at_steps(t)[1] / 2)
            sigma = 1 / (1 + ratio) if path.is_flow else (1 + ratio**2) ** -0.5
            alpha = 1 - sigma if path.is_flow else (1 - sigma**2).sqrt()
            noisy = alpha * x + sigma * torch.randn(x.shape, generator=rng)
            pipe.unet(torch.cat([noisy, noisy]), t, mean=mean, variance=variance, return_dict=False)
    return probe.trace(x)


SCHEDULERS = [
    *(DDIMScheduler(**BETAS, prediction_type=p, steps_offset=1) for p in ("epsilon", "v_prediction", "sample")),
    *(EulerDiscreteScheduler(**BETAS, prediction_type=p) for p in ("epsilon", "v_prediction", "sample")),
    DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    DDPMScheduler(**BETAS),
    PNDMScheduler(**BETAS, skip_prk_steps=True),
    DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True),
    EulerAncestralDiscreteScheduler(**BETAS, prediction_type="v_prediction"),
    HeunDiscreteScheduler(**BETAS, prediction_type="sample"),
    UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    FlowMatchEulerDiscreteScheduler(),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
]


def name_of(scheduler):
    return f"{type(scheduler).__name__}-{scheduler.config.get('prediction_type', 'flow')}"


@pytest.mark.parametrize("steps", [2, 50])
def test_v_models_of_zero_terminal_snr_score_as_published(steps):
    """β_t T/(2(1−ᾱ_t)) ‖Δv‖², of the network's own outputs, at t = 999 too, where the schedule holds no signal."""
    pipe = tiny_sd(prediction_type="v_prediction")
    odd = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **odd)
    outputs = []
    handle = pipe.unet.register_forward_hook(lambda _m, _a, output: outputs.append(output[0].double()))
    latents, probe = watch(pipe, num_inference_steps=steps)
    handle.remove()
    scheduler, terms = pipe.scheduler, []
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        null, conditional = output.chunk(2)
        weight = scheduler.betas[t] * len(scheduler.betas) / (2 * (1 - scheduler.alphas_cumprod[t]))
        if t > 50:
            terms.append(weight * ((conditional - null) ** 2).sum(dim=(1, 2, 3)))
    trace = probe.trace(latents)
    assert scheduler.timesteps[0] == 999 and trace.log_snr[0] == -math.inf
    score = get_score("mi-tune-release-v")
    score.check(trace)
    assert score(trace).tolist() == pytest.approx(torch.stack(terms).mean(dim=0).tolist(), rel=1e-5)


class TestGaussianPair:
    """x ~ N(0, 1), corr(x, y) = ρ = 0.8: I(x; y) = −½ ln(1 − ρ²) = 0.511 nats, whatever the network predicts."""

    @pytest.mark.parametrize("scheduler", SCHEDULERS, ids=name_of)
    def test_every_form_gives_the_analytic_value(self, scheduler):
        scheduler.set_timesteps(100)
        trace = exact_trace(scheduler)
        kept = trace.log_snr[trace.log_snr.isfinite() & (torch.sigmoid(-trace.log_snr / 2) > 0.05)].double()
        snr, v = kept.exp(), 1 - 0.8**2
        within = (0.5 * ((1 + snr) / (1 + v * snr)).log()).tolist()  # ½ ∫ up to each λ
        expected = within[-1] - within[0]
        # What lies beyond the first and the last λ of a finite schedule is a few percent of the whole.
        assert expected == pytest.approx(-0.5 * math.log(v), rel=0.04)
        for name in ("mi-tune", "rfmi", "rfmi-squared", "log-likelihood-ratio"):
            # RFMI's integral begins at t = 0, so at pure noise, where the run does.
            truth = within[-1] if "rfmi" in name and not trace.log_snr[0].isfinite() else expected
            estimate = Estimate.of_mean(SCORES[name](trace))
            assert estimate.standard_error <= 0.03
            # The trapezoid rule on 100 steps is good to 0.005.
            assert estimate.value == pytest.approx(truth, abs=4 * estimate.standard_error + 0.005), name

    @pytest.mark.parametrize("family", [DDIMScheduler, EulerDiscreteScheduler])
    def test_networks_that_encode_the_same_denoiser_score_the_same(self, family):
        """ε, v and z₀ from the same z: candidate by candidate, all scores but the deliberately wrong one."""
        traces = []
        for prediction in ("epsilon", "v_prediction", "sample"):
            scheduler = family(**BETAS, prediction_type=prediction)
            scheduler.set_timesteps(50)
            traces.append(exact_trace(scheduler, candidates=20))
        for name, score in SCORES.items():
            first = score.values(traces[0])
            assert first.isfinite().all()
            for other in traces[1:]:
                torch.testing.assert_close(score.values(other), first, rtol=2e-3, atol=2e-4, msg=name)


class TestStrides:
    """DDIM with linspace tells its denoiser other timesteps than its latents are at. A run by its own steps, with an
    exact denoiser of the same pair."""

    def run(self, prediction, *, steps, candidates):
        """The trace of the whole run, and its final latents."""
        scheduler = DDIMScheduler(**BETAS, prediction_type=prediction, timestep_spacing="linspace", clip_sample=False)
        scheduler.set_timesteps(steps)
        path = path_of(scheduler)
        # Quantiles in place of draws, of y with those of the noise, and with their negatives.
        quantiles = torch.special.ndtri((torch.arange(candidates) + 0.5) / candidates)
        y = quantiles.repeat_interleave(2).reshape(-1, 1, 1, 1)
        noise = torch.stack([quantiles, -quantiles], dim=1).reshape(-1, 1, 1, 1)
        mean = torch.cat([torch.zeros_like(y), 0.8 * y])
        variance = torch.cat([torch.ones_like(y), torch.full_like(y, 0.36)])
        alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps[0]]
        z = alpha_bar.sqrt() * 0.8 * y + (1 - 0.64 * alpha_bar).sqrt() * noise
        pipe = SimpleNamespace(unet=ExactDenoiser(path), scheduler=scheduler, guidance_scale=1.0)
        with MIProbe(pipe) as probe:
            for t in scheduler.timesteps:
                both = pipe.unet(torch.cat([z, z]), t, mean=mean, variance=variance, return_dict=False)[0]
                z = scheduler.step(both[2 * candidates :], t, z, return_dict=False)[0]
        before, trace = probe.trace_so_far(), probe.trace(z)  # the last step makes its ẑ₀ the end
        torch.testing.assert_close(before.error_null, trace.error_null, rtol=1e-3, atol=1e-4)
        return trace, z

    def test_networks_that_encode_the_same_denoiser_score_the_same(self):
        """An output is what the scheduler takes it for."""
        (trace, z), *others = (
            self.run(prediction, steps=10, candidates=50) for prediction in ("epsilon", "v_prediction", "sample")
        )
        for other, latents in others:
            torch.testing.assert_close(latents, z, rtol=1e-4, atol=1e-4)
            for name, score in SCORES.items():
                torch.testing.assert_close(score(other), score(trace), rtol=2e-3, atol=2e-4, msg=name)

    @pytest.mark.parametrize(("steps", "within"), [(10, 0.08), (28, 0.035), (120, 0.035)])
    def test_information(self, steps, within):
        """½ ∫ between the first and the last λ that count. The tolerance is that of the run, whose latents drift; and
        at 10 steps, of the trapezoid rule."""
        trace, _ = self.run("epsilon", steps=steps, candidates=2000)
        snr = trace.log_snr[torch.sigmoid(-trace.log_snr / 2) > 0.05].double().exp()
        first, *_, last = (0.5 * ((1 + snr) / (1 + 0.36 * snr)).log()).tolist()
        assert get_score("mi-tune")(trace).mean().item() == pytest.approx(last - first, rel=within)


class Waits(TorchDispatchMode):
    """Counts the operations that would make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "equal", "is_nonzero", "nonzero")
        return function(*args, **(kwargs or {}))


class TestHook:
    def test_waits_for_the_device_at_the_first_step_alone(self):
        pipe, further = tiny_sd(), []
        for steps in (STEPS, 2 * STEPS):
            with Waits() as plain:
                sample(pipe, num_inference_steps=steps)
            with MIProbe(pipe), Waits() as probed:
                sample(pipe, num_inference_steps=steps)
            further.append(probed.count - plain.count)
        assert further[0] == further[1] <= 5

    def test_leaves_samples_as_they_are(self):
        for pipe in (tiny_sd(), tiny_sd3()):
            latents, probe = watch(pipe)
            assert torch.equal(latents, sample(pipe))  # and the hook is gone
            assert probe.steps == STEPS

    def test_both_kinds_of_output(self):
        """Pipelines ask for tuples; a denoiser that gives output classes is read as well."""
        pipe = tiny_sd()
        traces = []
        for return_dict in (False, True):
            with MIProbe(pipe) as probe, torch.no_grad():
                pipe.unet(torch.ones(4, 4, 8, 8), 500, torch.ones(4, 8, 16), return_dict=return_dict)
            traces.append(probe.trace())
        assert torch.equal(traces[0].difference, traces[1].difference)

    def test_accumulates_in_float32(self):
        """A bfloat16 model's terms are those of its outputs, summed in float32: exact to 1e-5, not to 1e-2."""
        pipe = tiny_sd3().to(torch.bfloat16)
        outputs = []
        handle = pipe.transformer.register_forward_hook(lambda _, __, output: outputs.append(output[0].double()))
        latents, probe = watch(pipe)
        handle.remove()
        trace = probe.trace(latents)
        sigma = torch.sigmoid(-trace.log_snr.double() / 2)
        by_hand = [((1 - s) * (v[2:] - v[:2])).square().sum(dim=(1, 2, 3)) for s, v in zip(sigma, outputs, strict=True)]
        assert trace.difference.dtype == torch.float32
        torch.testing.assert_close(trace.difference.double(), torch.stack(by_hand, dim=1), rtol=1e-5, atol=1e-9)

    def test_a_second_call_starts_anew(self):
        pipe = tiny_sd()
        with MIProbe(pipe) as probe:
            first = probe_trace(probe, pipe, PROMPTS, seeds=(0, 1))
            second = probe_trace(probe, pipe, PROMPTS[:1], seeds=(0,))
        assert first.difference.shape == (2, STEPS)
        assert second.difference.shape == (1, STEPS)
        torch.testing.assert_close(second.difference[0], first.difference[0], rtol=1e-3, atol=0)

    def test_skip_layer_guidance_is_no_step(self):
        pipe = tiny_sd3()
        extra = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
        latents, probe = watch(pipe, **extra)
        assert not torch.equal(latents, sample(pipe))
        assert probe.trace(latents).difference.shape == (2, STEPS)

    def test_without_the_final_latents_there_are_no_errors(self):
        _, probe = watch(tiny_sd())
        trace = probe.trace()
        assert trace.error_conditional.isnan().all() and trace.error_null.isnan().all()
        assert get_score("self-confidence")(trace).isnan().all()
        assert get_score("mi-tune")(trace).isfinite().all()


def probe_trace(probe, pipe, prompts, seeds):
    return probe.trace(sample(pipe, prompts, seeds=seeds))


class TestDroppedCandidates:
    def test_survivors_have_the_same_trace(self):
        """Two of four candidates leave after the third step, by the callback that diffusers gives."""
        pipe, prompts, seeds = tiny_sd(), PROMPTS * 2, [0, 1, 2, 3]
        whole, probe = watch(pipe, prompts, seeds=seeds)
        unpruned = probe.trace(whole)
        half_way = []

        def drop(_pipe, step, _timestep, given):
            if step != 2:
                return {}
            half_way.append(probe.trace())
            probe.keep([1, 2])
            embeds = given["prompt_embeds"]
            return {"latents": given["latents"][[1, 2]], "prompt_embeds": embeds[[1, 2, 5, 6]]}

        with MIProbe(pipe) as probe:
            latents = sample(
                pipe,
                prompts,
                seeds=seeds,
                callback_on_step_end=drop,
                callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
            )
        pruned = probe.trace(latents)
        torch.testing.assert_close(latents, whole[[1, 2]], rtol=1e-4, atol=1e-5)
        for name in ("difference", "dot_conditional", "error_conditional", "error_null"):
            expected = getattr(unpruned.select([1, 2]), name)
            torch.testing.assert_close(getattr(pruned, name), expected, rtol=1e-3, atol=1e-4)
        conditioning = probe.conditioning.rows["encoder_hidden_states"]
        assert torch.equal(conditioning[0], pipe.encode_prompt(PROMPTS[1], "cpu", 1, False)[0][0])
        assert half_way[0].difference.shape == (4, 3)
        torch.testing.assert_close(half_way[0].difference, unpruned.difference[:, :3])
        assert half_way[0].planned_steps == STEPS

    def test_dropping_without_telling_the_probe(self):
        pipe = tiny_sd()

        def drop(_pipe, _step, _timestep, given):
            return {"latents": given["latents"][:1], "prompt_embeds": given["prompt_embeds"][[0, 2]]}

        names = ["latents", "prompt_embeds"]
        with (
            pytest.raises(MituneError, match=r"from 2 to 1 candidates at step 1; call probe.keep\(candidates\)"),
            MIProbe(pipe),
        ):
            sample(pipe, callback_on_step_end=drop, callback_on_step_end_tensor_inputs=names)


class TestRefusals:
    @pytest.mark.parametrize("make", [tiny_sd, tiny_sd3])
    @pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
    def test_no_guidance(self, make, prompts):
        pipe = make()
        with (
            pytest.raises(GuidanceError, match=r"ran its denoiser without an unconditional half at step 0.*scale > 1"),
            MIProbe(pipe),
        ):
            sample(pipe, prompts, seeds=range(len(prompts)), guidance_scale=1.0)

    def test_unknown_scheduler_before_the_first_step(self):
        pipe = tiny_sd()
        pipe.scheduler = EDMEulerScheduler()
        with pytest.raises(MituneError, match="EDMEulerScheduler has no noise path"), MIProbe(pipe):
            pytest.fail("the pipeline must not run")

    def test_no_denoiser(self):
        with pytest.raises(ModelError, match="neither a unet nor a transformer"):
            MIProbe(SimpleNamespace())

    def test_nothing_seen(self):
        with MIProbe(tiny_sd()) as probe:
            pass
        for ask in (probe.trace, lambda: probe.conditioning):
            with pytest.raises(MituneError, match="has seen no denoising step"):
                ask()

    def test_two_calls_without_a_trace_between(self):
        pipe = tiny_sd()
        with MIProbe(pipe) as probe:
            sample(pipe)
            latents = sample(pipe)
        with pytest.raises(MituneError, match="seen 12 denoising steps, but the scheduler ran 6"):
            probe.trace(latents)

    def test_lists_of_tensors_cannot_be_kept(self):
        pipe = tiny_sd()
        unet = pipe.unet
        residuals = [torch.zeros(2, *shape) for shape in ((8, 8, 8), (8, 8, 8), (8, 4, 4), (16, 4, 4))]
        with MIProbe(pipe) as probe, torch.no_grad():
            unet(
                torch.ones(2, 4, 8, 8),
                500,
                torch.ones(2, 8, 16),
                down_block_additional_residuals=residuals,
                mid_block_additional_residual=torch.zeros(2, 16, 4, 4),
            )
        assert probe.trace().difference.shape == (1, 1)
        with pytest.raises(ModelError, match="list of tensors as down_block_additional_residuals"):
            _ = probe.conditioning
