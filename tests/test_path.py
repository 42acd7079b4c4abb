"""Paths of real diffusers schedulers, against what the schedulers themselves do to latents."""

import inspect
import math
import re
from contextlib import suppress
from copy import deepcopy

import diffusers
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMParallelScheduler,
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

from mitune.denoiser.path import path_of
from mitune.errors import MituneError
from mitune.information import alpha_sigma
from mitune.worlds.shapes.training.architecture import BETAS

VP = [
    DDPMScheduler(**BETAS),
    DDIMScheduler(**BETAS, steps_offset=1),
    PNDMScheduler(**BETAS, skip_prk_steps=True),
    PNDMScheduler(**BETAS),
    LCMScheduler(**BETAS),
    DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True),
    UniPCMultistepScheduler(**BETAS),
    DEISMultistepScheduler(**BETAS),
]
SCALED = [  # latents z₀ + σε, divided by √(1 + σ²) before the denoiser
    EulerDiscreteScheduler(**BETAS, timestep_spacing="linspace"),
    EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True),
    EulerAncestralDiscreteScheduler(**BETAS),
    HeunDiscreteScheduler(**BETAS),
    LMSDiscreteScheduler(**BETAS),
    KDPM2DiscreteScheduler(**BETAS),
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
        path = path_of(DDIMScheduler(**BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction"))
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
        scheduler.set_timesteps(10)
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

    def test_rounded_timesteps_that_repeat(self):
        """The i-th step lies at the i-th σ, also where a run is entered half-way."""
        scheduler = DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True)
        scheduler.set_timesteps(150)
        steps, sigmas = scheduler.timesteps, scheduler.sigmas[:-1]
        assert len(steps.unique()) < len(steps)
        path = path_of(scheduler)
        for first in (0, 20, 140):
            timesteps, log_snr = path.at_steps(steps[first:])
            assert torch.equal(timesteps, steps[first:].float())
            torch.testing.assert_close(log_snr, -2 * sigmas[first:].log())

    def test_before_any_run(self):
        """Tables that run the other way then are not taken for a run's."""
        for scheduler in (PNDMScheduler(**BETAS), DPMSolverMultistepScheduler(**BETAS)):
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


class TestStrides:
    """Schedulers that step T // steps timesteps down, whatever the next of their list is."""

    @pytest.mark.parametrize(
        ("scheduler", "steps", "said"),
        [
            # log(ᾱ/(1 − ᾱ)) at t = 0 and 2, the first of which it says at the last step, for β = 0.0001, 0.00012, …
            (DDIMScheduler(timestep_spacing="linspace"), 26, r"\(up to 1.3 in log-SNR\), but the .* 'leading' would"),
            (DDIMParallelScheduler(timestep_spacing="trailing"), 31, "but 25 steps, or the .* 'leading', would"),
            (CogVideoXDDIMScheduler(timestep_spacing="trailing"), 33, "but 40 steps, or the scheduler's"),
            (PNDMScheduler(timestep_spacing="linspace", skip_prk_steps=True), 30, "'linspace' tells.*'leading' would"),
            (PNDMScheduler(), 40, "40 steps and timestep_spacing='leading' tells .* 'leading' with skip_prk_steps wo"),
        ],
    )
    def test_warning(self, scheduler, steps, said, caplog):
        """The denoiser is told other timesteps than the latents are at: said once, with what avoids it."""
        scheduler.set_timesteps(steps)
        path = path_of(scheduler)
        assert not caplog.records  # the path of training is what it was
        for _ in range(2):
            path.at_steps(scheduler.timesteps)
        assert re.search(said, caplog.text)
        assert len(caplog.records) == 1

    @pytest.mark.parametrize(
        ("scheduler", "steps"),
        [
            (DDIMScheduler(), 37),
            (DDIMScheduler(timestep_spacing="trailing"), 25),
            (DDIMScheduler(timestep_spacing="linspace"), 1),
            (DDIMScheduler(timestep_spacing="linspace"), 1000),
            (PNDMScheduler(), 50),
            (PNDMScheduler(skip_prk_steps=True, steps_offset=1), 30),
        ],
    )
    def test_where_the_timesteps_are_its_strides(self, scheduler, steps, caplog):
        scheduler.set_timesteps(steps)
        path = path_of(scheduler)
        _, log_snr = path.at_steps(scheduler.timesteps)
        assert torch.equal(log_snr, path.taken_at(scheduler.timesteps))
        assert torch.equal(log_snr, path.log_snr(scheduler.timesteps))
        assert not caplog.records

    @pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, CogVideoXDDIMScheduler])
    def test_a_timestep_below_zero(self, kind):
        """1000 − 61 · (1000/61) is not quite 0, which is one timestep more, −1; where ᾱ is that of pure noise."""
        scheduler = kind(timestep_spacing="trailing")
        scheduler.set_timesteps(61)
        with pytest.raises(MituneError, match="timestep below 0 among its 62, .* take another number"):
            path_of(scheduler).at_steps(scheduler.timesteps)

    @pytest.mark.parametrize("first", [0, 11, 20])
    def test_a_run_entered_half_way(self, first):
        """Latents are at the timestep where it is entered, from there on where its steps put them."""
        scheduler = DDIMScheduler(timestep_spacing="linspace")
        scheduler.set_timesteps(26)
        path, told = path_of(scheduler), scheduler.timesteps[first:]
        timesteps, log_snr = path.at_steps(told)
        assert torch.equal(timesteps, told.float())
        assert torch.equal(path.taken_at(told), path.log_snr(told))
        assert torch.equal(log_snr, path.log_snr(torch.cat([told[:1], told[:-1] - 1000 // 26])))

    def test_pndm_takes_its_second_step_again(self):
        """From the noise's end: 900 to 800; there, told 800, once more to 800; 800 to 700; also half-way."""
        scheduler = PNDMScheduler(skip_prk_steps=True)
        scheduler.set_timesteps(10)
        assert scheduler.timesteps[:4].tolist() == [900, 800, 800, 700]
        path = path_of(scheduler)
        for told, at in (([900, 800, 800, 700], [900, 800, 800, 700]), ([700, 600, 500], [700, 600, 600])):
            _, log_snr = path.at_steps(torch.tensor(told))
            assert torch.equal(log_snr, path.log_snr(torch.tensor(at)))


VARIANTS = (
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_lu_lambdas": True},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    {"final_sigmas_type": "sigma_min"},
    {"stochastic_sampling": True},
    {"shift_terminal": 0.02},
    {"shift": 3.0},
    {"skip_prk_steps": True},
    {"skip_prk_steps": True, "timestep_spacing": "linspace"},
    {"algorithm_type": "sde-dpmsolver++"},
    {"interpolation_type": "log_linear"},
)
SCHEDULER_CLASSES = [
    kind
    for kind in (getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler"))
    if isinstance(kind, type) and issubclass(kind, SchedulerMixin)
]
COUNTS = (10, 28, 37, 120)  # that divide the 1000 steps of training and that do not
EVERY = [
    pytest.param(kind, variant, id=", ".join([kind.__name__, *(f"{k}={v}" for k, v in variant.items())]))
    for kind in sorted(SCHEDULER_CLASSES, key=lambda kind: kind.__name__)
    for variant in VARIANTS
    if set(variant) <= set(inspect.signature(kind.__init__).parameters)
]


def scheduler_of(kind, variant):
    """The scheduler on the path of SD; skips what diffusers cannot make."""
    accepted = inspect.signature(kind.__init__).parameters
    base = {key: value for key, value in (BETAS | {"clip_sample": False}).items() if key in accepted}
    try:
        scheduler = kind(**base | variant)
        scheduler.set_timesteps(12)
    except (TypeError, ValueError, KeyError, ImportError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"cannot be made like others: {error}")
    return scheduler


class Axes:
    """Latents as coordinates: of z₀, and of every noise that was ever drawn, which are all orthogonal."""

    def __init__(self, count):
        self.axes = torch.eye(count).reshape(count, 1, 1, 1, count)
        self.clean, self.drawn = self.axes[0], 0

    def draw(self, *_, **__):
        self.drawn += 1
        return self.axes[self.drawn]


STRIDING = (DDIMScheduler, DDIMParallelScheduler, CogVideoXDDIMScheduler, CogVideoXDPMScheduler, PNDMScheduler)


def walk(scheduler, path, monkeypatch):
    """α and σ of the latents that the denoiser gets at each step of the run, and those that the path names.

    The denoiser is exact for data that are one point z₀: it hands back the noise that is in its input. Schedulers that
    go on from another timestep than they made their latents for get them, once seen, as of the former: so each step
    shows where it goes from where it thinks it is.
    """
    axes = Axes(3 * len(scheduler.timesteps) + 2)
    module = inspect.getmodule(type(scheduler))
    for owner, name in ((module, "randn_tensor"), (torch, "randn_like"), (torch, "randn")):
        monkeypatch.setattr(owner, name, axes.draw, raising=False)
    monkeypatch.setattr(scheduler, "noise_sampler", axes.draw, raising=False)
    scaled = getattr(scheduler, "scale_model_input", lambda latents, _: latents)
    parameters = inspect.signature(scheduler.step).parameters
    _, log_snr = path.at_steps(scheduler.timesteps)
    levels = list(zip(*alpha_sigma(log_snr, is_flow=path.is_flow), strict=True))
    given, made, earlier = None, [], {}
    for i, (t, (alpha, sigma)) in enumerate(zip(scheduler.timesteps, levels, strict=True)):
        if given is None:
            given = (alpha * axes.clean + sigma * axes.draw()) / scaled(torch.ones(()), t)
        seen = scaled(given, t)
        at, noise = (seen * axes.clean).sum(), seen * (1 - axes.clean)
        made.append((at.item(), noise.norm().item()))
        epsilon = noise / noise.norm()
        if isinstance(scheduler, STRIDING):
            alpha, sigma = scheduler.alphas_cumprod[t].sqrt(), (1 - scheduler.alphas_cumprod[t]).sqrt()
            given = alpha * axes.clean + sigma * epsilon
            if isinstance(scheduler, PNDMScheduler) and scheduler.config.skip_prk_steps and scheduler.counter == 1:
                before = scheduler.alphas_cumprod[t + 1000 // scheduler.num_inference_steps]  # goes from there again
                scheduler.cur_sample = before.sqrt() * axes.clean + (1 - before).sqrt() * epsilon
        velocity = epsilon - axes.clean if path.is_flow else alpha * epsilon - sigma * axes.clean
        output = {"epsilon": epsilon, "sample": axes.clean, "velocity": velocity}[path.predicts]
        if "timestep_back" in parameters:
            back = scheduler.timesteps[i - 1] if i else None
            given, earlier["x0"] = scheduler.step(
                output, earlier.get("x0"), t, back, given, generator=torch.Generator(), return_dict=False
            )
        else:
            given = scheduler.step(output, t, given, return_dict=False)[0]
    return torch.tensor(made), torch.tensor(levels)


@pytest.mark.parametrize(("kind", "variant"), EVERY)
def test_every_scheduler(kind, variant, record_property, monkeypatch):
    """Each scheduler of diffusers is refused, or its trajectory lies where our λ says, to 0.0005.

    With an exact denoiser of data that are one point z₀, every sampler stays on z = α z₀ + σ ε, whether the number of
    steps divides that of training or not, and where rounded timesteps repeat.
    """
    placed = 0
    for count in COUNTS[: 2 if kind.__name__.startswith("KDPM2") else None]:  # slow, and its timesteps not rounded
        scheduler = scheduler_of(kind, variant)
        with suppress(ValueError):  # more than it can make
            scheduler.set_timesteps(count)
        if hasattr(scheduler, "set_begin_index"):  # else it begins at the second of two equal timesteps, and ends late
            scheduler.set_begin_index(0)
        try:
            path = path_of(scheduler)
            path.at_steps(scheduler.timesteps)
        except MituneError:
            continue
        if kind is DEISMultistepScheduler:  # takes small differences of large integrals
            scheduler.sigmas = scheduler.sigmas.double()
        made, named = walk(scheduler, path, monkeypatch)
        torch.testing.assert_close(made, named, rtol=5e-4, atol=1e-6)
        made, named = (2 * (levels[:, 0] / levels[:, 1]).log() for levels in (made, named))
        torch.testing.assert_close(made[named.isfinite()], named[named.isfinite()], rtol=0, atol=5e-4)
        placed += 1
    if not placed:
        record_property("refused", True)


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
