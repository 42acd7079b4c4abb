"""Paths of real diffusers schedulers, against what the schedulers themselves do to latents."""

import inspect
import math
from copy import deepcopy

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from mitune.errors import MituneError
from mitune.information import alpha_sigma
from mitune.path import path_of

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VP = [
    DDPMScheduler(**SD),
    DDIMScheduler(**SD, steps_offset=1),
    PNDMScheduler(**SD, skip_prk_steps=True),
    PNDMScheduler(**SD),
    LCMScheduler(**SD),
    DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True),
    UniPCMultistepScheduler(**SD),
    DEISMultistepScheduler(**SD),
]
SCALED = [  # latents z₀ + σε, divided by √(1 + σ²) before the denoiser
    EulerDiscreteScheduler(**SD, timestep_spacing="linspace"),
    EulerDiscreteScheduler(**SD, use_karras_sigmas=True),
    EulerAncestralDiscreteScheduler(**SD),
    HeunDiscreteScheduler(**SD),
    LMSDiscreteScheduler(**SD),
    KDPM2DiscreteScheduler(**SD),
]
FLOW = [
    FlowMatchEulerDiscreteScheduler(),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
    FlowMatchHeunDiscreteScheduler(shift=3.0),
    DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
]


def name_of(scheduler):
    return type(scheduler).__name__


@pytest.fixture
def pair():
    """Latents and noise, (5, 4, 8, 8)."""
    return torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class TestPathOfTraining:
    @pytest.mark.parametrize("scheduler", [*VP, *SCALED], ids=name_of)
    def test_vp(self, scheduler):
        """α² is the table of ᾱ at whole timesteps, α² + σ² = 1, and λ = log(α²/σ²) falls with t."""
        path = path_of(scheduler)
        t = torch.arange(1000)
        torch.testing.assert_close(path.alpha(t) ** 2, scheduler.alphas_cumprod, atol=1e-6, rtol=0)
        torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones(1000))
        assert (path.log_snr(torch.linspace(0, 999, 5000)).diff() < 0).all()
        assert torch.equal(path.beta(t), scheduler.betas)
        assert not path.is_flow

    @pytest.mark.parametrize("scheduler", FLOW, ids=name_of)
    def test_flow(self, scheduler):
        """σ = t/1000, whatever the shift of the sampling steps, and α + σ = 1."""
        path = path_of(scheduler)
        t = torch.linspace(0, 1000, 101)
        torch.testing.assert_close(path.sigma(t), t / 1000)
        torch.testing.assert_close(path.alpha(t), 1 - t / 1000, atol=1e-6, rtol=0)
        assert path.log_snr(torch.tensor([0.0, 1000.0])).tolist() == [math.inf, -math.inf]
        assert path.beta(t).isnan().all()
        assert path.is_flow and path.predicts == "velocity"

    @pytest.mark.parametrize("scheduler", [VP[0], FLOW[0]], ids=name_of)
    def test_timestep_inverts_log_snr(self, scheduler):
        path = path_of(scheduler)
        t = torch.linspace(3, 997, 400)
        torch.testing.assert_close(path.timestep(path.log_snr(t)), t, atol=2e-2, rtol=0)
        low, high = path.log_snr_range()
        inside = torch.linspace(low, high, 50)
        torch.testing.assert_close(path.log_snr(path.timestep(inside)), inside, atol=1e-3, rtol=0)

    def test_range(self):
        assert path_of(VP[0]).log_snr_range() == pytest.approx((-5.36, 7.07), abs=0.01)  # ᾱ = 0.00466 and 0.99915
        assert path_of(FLOW[0]).log_snr_range() == pytest.approx((-2 * math.log(99), 2 * math.log(99)))

    def test_beta_over_noise_variance_is_the_slope_of_log_snr(self):
        """dλ/dt = −β/(1−ᾱ) up to O(β²): what makes κ_t of MI-TUNE's eq. (2) half of dλ."""
        path = path_of(VP[0])
        t = torch.arange(100, 999)
        slope = path.log_snr(t + 1) - path.log_snr(t)
        expected = -path.beta(t + 1) / path.sigma(t + 1) ** 2
        torch.testing.assert_close(slope, expected, rtol=0.02, atol=0)

    def test_zero_terminal_snr(self):
        path = path_of(DDIMScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction"))
        assert path.alpha(torch.tensor(999)).item() == 0
        assert path.log_snr(torch.tensor(999)).item() == -math.inf
        assert path.log_snr(torch.tensor(998)).isfinite()
        assert path.log_snr_range()[0] == path.log_snr(torch.tensor(998)).item()

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
    def test_prediction_type(self, kind):
        expected = {"epsilon": "epsilon", "v_prediction": "velocity", "sample": "sample"}[kind]
        assert path_of(DDIMScheduler(prediction_type=kind)).predicts == expected


class TestAddNoise:
    @pytest.mark.parametrize("scheduler", [VP[0], VP[1], VP[4]], ids=name_of)
    def test_vp_is_the_scheduler_s_own(self, scheduler, pair):
        t = torch.tensor([1, 50, 400, 800, 999])
        expected = scheduler.add_noise(*pair, t)
        torch.testing.assert_close(path_of(scheduler).add_noise(*pair, t), expected, atol=1e-5, rtol=0)

    def test_flow_is_the_scheduler_s_own(self, pair):
        scheduler = FlowMatchEulerDiscreteScheduler()
        t = scheduler.timesteps[[10, 200, 500, 800, 990]]
        latents, noise = pair
        expected = scheduler.scale_noise(latents, t, noise)
        torch.testing.assert_close(path_of(scheduler).add_noise(latents, noise, t), expected, atol=1e-5, rtol=0)

    def test_keeps_the_dtype_of_the_latents(self, pair):
        latents, noise = (x.bfloat16() for x in pair)
        assert path_of(VP[0]).add_noise(latents, noise, torch.tensor(500)).dtype == torch.bfloat16


class TestStepsOfARun:
    """The λ of a trajectory's latents, from the scheduler's own σ."""

    @pytest.mark.parametrize("scheduler", SCALED[:5], ids=name_of)
    def test_scaled_latents_are_on_the_vp_path(self, scheduler, pair):
        """(z₀ + σε)/√(1+σ²), as the scheduler scales it for the denoiser, is α z₀ + σ ε at the λ that we name."""
        scheduler = deepcopy(scheduler)
        scheduler.set_timesteps(12)
        timesteps, log_snr = path_of(scheduler).at_steps(scheduler.timesteps)
        latents, noise = pair
        for i in (0, 4, len(timesteps) - 1):
            scheduler._step_index = i
            given = scheduler.scale_model_input(latents + scheduler.sigmas[i] * noise, scheduler.timesteps[i])
            ours = torch.sigmoid(log_snr[i]).sqrt() * latents + torch.sigmoid(-log_snr[i]).sqrt() * noise
            torch.testing.assert_close(given, ours, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("scheduler", [*VP, *SCALED], ids=name_of)
    def test_near_the_path_of_training(self, scheduler):
        """What the denoiser is told, t, and where the latents lie differ by the rounding of t at most."""
        scheduler = deepcopy(scheduler)
        scheduler.set_timesteps(12)
        path = path_of(scheduler)
        timesteps, log_snr = path.at_steps(scheduler.timesteps)
        torch.testing.assert_close(timesteps, scheduler.timesteps.float())
        margin = (path.log_snr(timesteps - 0.6) - path.log_snr(timesteps + 0.6)).abs() + 1e-3
        assert ((log_snr - path.log_snr(timesteps)).abs() <= margin).all()

    @pytest.mark.parametrize("scheduler", FLOW, ids=name_of)
    def test_flow(self, scheduler):
        scheduler = deepcopy(scheduler)
        scheduler.set_timesteps(12)
        path = path_of(scheduler)
        _, log_snr = path.at_steps(scheduler.timesteps)
        assert path.steps_sigma is not None
        torch.testing.assert_close(torch.sigmoid(-log_snr / 2), scheduler.sigmas[:-1], atol=1e-6, rtol=0)

    def test_pure_noise_is_at_minus_infinity(self):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(10)
        assert path_of(scheduler).at_steps(torch.tensor(1000.0))[1].item() == -math.inf

    def test_a_rounded_timestep_finds_its_step(self):
        """bfloat16 moves t = 889 to 888."""
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(10)
        told = torch.tensor(889.0).bfloat16()
        assert told.item() != 889
        assert path_of(scheduler).at_steps(told)[0].item() == 889

    def test_before_any_run(self):
        """Tables that run the other way then are not taken for a run's."""
        for scheduler in (PNDMScheduler(**SD), DPMSolverMultistepScheduler(**SD)):
            timesteps, log_snr = path_of(scheduler).at_steps(torch.tensor([999.0, 1.0]))
            assert timesteps.tolist() == [999, 1]
            assert log_snr[0] < log_snr[1]


class TestRefusals:
    def test_unknown_scheduler(self):
        with pytest.raises(MituneError, match="EDMEulerScheduler has no noise path that mitune knows; set pipe"):
            path_of(EDMEulerScheduler())
        with pytest.raises(MituneError, match="object has no noise path"):
            path_of(object())

    def test_unknown_prediction_type(self):
        with pytest.raises(MituneError, match="prediction_type='score'; mitune knows epsilon, v_prediction, flow"):
            path_of(DDIMScheduler(prediction_type="score"))

    @pytest.mark.parametrize(
        ("scheduler", "option"),
        [
            (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas=True.*set invert_sigmas=False"),
            (
                EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
                "timestep_type='continuous'.*set timestep_type='discrete'",
            ),
            (EulerDiscreteScheduler(interpolation_type="log_linear"), "interpolation_type='log_linear'"),
            (KDPM2DiscreteScheduler(use_karras_sigmas=True), "use_karras_sigmas=True"),
        ],
    )
    def test_options(self, scheduler, option):
        with pytest.raises(MituneError, match=f"{option}|{option}.*cannot place on a path"):
            path_of(scheduler)


VARIANTS = (
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_lu_lambdas": True},
    {"timestep_spacing": "trailing"},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    {"final_sigmas_type": "sigma_min"},
    {"stochastic_sampling": True},
    {"shift_terminal": 0.02},
    {"shift": 3.0},
    {"skip_prk_steps": True},
    {"algorithm_type": "sde-dpmsolver++"},
    {"interpolation_type": "log_linear"},
)
SCHEDULER_CLASSES = [
    kind
    for kind in (getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler"))
    if isinstance(kind, type) and issubclass(kind, SchedulerMixin)
]
EVERY = [
    pytest.param(kind, variant, id=", ".join([kind.__name__, *(f"{k}={v}" for k, v in variant.items())]))
    for kind in sorted(SCHEDULER_CLASSES, key=lambda kind: kind.__name__)
    for variant in VARIANTS
    if set(variant) <= set(inspect.signature(kind.__init__).parameters)
]


def scheduler_of(kind, variant):
    """The scheduler on the path of SD; skips what diffusers cannot make."""
    accepted = inspect.signature(kind.__init__).parameters
    base = {key: value for key, value in (SD | {"clip_sample": False}).items() if key in accepted}
    try:
        scheduler = kind(**base | variant)
        scheduler.set_timesteps(12)
    except (TypeError, ValueError, KeyError, ImportError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"cannot be made like others: {error}")
    return scheduler


@pytest.mark.parametrize(("kind", "variant"), EVERY)
def test_every_scheduler(kind, variant, record_property):
    """Each scheduler of diffusers is refused, or its trajectory lies where our λ says.

    With an exact denoiser of data that are one point z₀, every sampler stays on z = α z₀ + σ ε: ε stays as it was under
    a deterministic sampler, and is fresh but of unit variance, and independent of z₀, under one that draws.
    """
    scheduler = scheduler_of(kind, variant)
    try:
        path = path_of(scheduler)
    except MituneError:
        record_property("refused", True)
        return
    clean, noise = torch.randn(2, 1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    parameters = inspect.signature(scheduler.step).parameters
    if "timestep_back" in parameters:
        pytest.skip("its step takes other arguments")
    draws = {"generator": torch.Generator().manual_seed(1)} if "generator" in parameters else {}
    scaled = getattr(scheduler, "scale_model_input", lambda latents, _: latents)
    given = None
    for t in scheduler.timesteps:
        alpha, sigma = alpha_sigma(path.at_steps(t)[1], is_flow=path.is_flow)
        if given is None:
            given = (alpha * clean + sigma * noise) / scaled(torch.ones(()), t)
        seen = scaled(given, t)
        epsilon = (seen - alpha * clean) / sigma
        assert epsilon.std().item() == pytest.approx(noise.std().item(), abs=0.04)
        assert (epsilon * clean).mean().item() == pytest.approx(0, abs=0.04)
        velocity = epsilon - clean if path.is_flow else alpha * epsilon - sigma * clean
        output = {"epsilon": epsilon, "sample": clean, "velocity": velocity}[path.predicts]
        given = scheduler.step(output, t, given, **draws, return_dict=False)[0]


def test_schedulers_that_are_known():
    """What the papers' models and most others come with is not among the refused."""
    names = """DDPM DDIM PNDM LCM TCD DPMSolverMultistep DPMSolverSinglestep UniPCMultistep DEISMultistep SASolver
    EulerDiscrete EulerAncestralDiscrete HeunDiscrete LMSDiscrete KDPM2Discrete
    FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM"""
    for name in names.split():
        assert path_of(getattr(diffusers, f"{name}Scheduler")()).steps.numel()


def test_dynamic_shift():
    """The λ of a run is that of σ as the size of the picture has shifted it: σ/(1−σ) times e^μ."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu, sigmas = 0.8, torch.linspace(1, 0.1, 10)
    scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=mu)
    _, log_snr = path_of(scheduler).at_steps(scheduler.timesteps)
    torch.testing.assert_close(log_snr[1:], -2 * (torch.logit(sigmas[1:]) + mu), rtol=1e-4, atol=1e-4)
