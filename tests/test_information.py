"""The integral and its presets, against closed forms of a Gaussian pair.

x ~ N(0, 1), corr(x, y) = ρ, v = 1 − ρ²: x | y ~ N(ρ y, v), so I(x; y) = −½ ln v. With S = α²/σ² = e^λ the errors of
ε̂ are S/(1+S) without y and vS/(1+vS) with it, and their difference is E‖Δε‖². Its integral is known between any two λ:
½ ∫ E‖Δε‖² dλ = ½ ln((1+S)/(1+vS)).
"""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from scipy.special import lambertw
from torch import Tensor

from mitune.denoiser.path import path_of
from mitune.errors import MituneError
from mitune.information import (
    SCORES,
    TRUNCATION,
    Estimate,
    LogisticProposal,
    RectifiedFlowProposal,
    Trace,
    alpha_sigma,
    epsilon_and_sample,
    epsilon_difference,
    get_score,
    integral,
    lambert_w,
    point_wise_draws,
    point_wise_terms,
    stratified_mean,
    true_noise,
    velocity_difference,
)
from tests.draws import covered

RHO = 0.8
V = 1 - RHO**2


def cumulative(log_snr: float) -> float:
    """½ ∫ E‖Δε‖² dλ from −∞ to λ, in nats."""
    snr = math.exp(log_snr)
    return 0.5 * math.log((1 + snr) / (1 + V * snr))


def expected_trace(log_snr: Tensor, *, is_flow: bool, timestep: Tensor, beta: Tensor) -> Trace:
    """The expectations of all terms for the Gaussian pair, as the trace of one trajectory."""
    snr = log_snr.exp()
    null, conditional = snr / (1 + snr), V * snr / (1 + V * snr)
    difference = null - conditional
    dot = difference * (1 + torch.exp(-log_snr / 2)) ** 2  # Δu = −Δε (α + σ)/α, and E[u·Δu] = E‖Δu‖²
    return Trace(
        log_snr=log_snr,
        timestep=timestep,
        beta=beta,
        difference=difference[None],
        difference_velocity=difference[None] / alpha_sigma(log_snr, is_flow=is_flow)[0] ** 2,
        dot_conditional=dot[None],
        dot_guided=dot[None],
        error_conditional=conditional[None],
        error_null=null[None],
        dimensions=1,
        is_flow=is_flow,
    )


def vp_trace() -> Trace:
    """On all 1000 timesteps of Stable Diffusion's schedule."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - beta, dim=0)
    log_snr = (alpha_bar / (1 - alpha_bar)).log().flip(0).float()
    timestep = torch.arange(999, -1, -1).float()
    return expected_trace(log_snr, is_flow=False, timestep=timestep, beta=beta.flip(0).float())


def flow_trace() -> Trace:
    """On 1000 equal steps of flow time, from σ = 1."""
    sigma = torch.linspace(1, 0.001, 1000)
    log_snr = 2 * (torch.log1p(-sigma) - sigma.log())
    trace = expected_trace(log_snr, is_flow=True, timestep=1000 * sigma, beta=torch.full_like(sigma, math.nan))
    trace.dot_conditional[:, 0] = trace.dot_guided[:, 0] = 1.0  # finite at pure noise, as measured ones are
    return trace


SCHEDULES = {  # (scheduler, steps): name
    (DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"), 50): "zero terminal SNR",
    (DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"), 2): "zero terminal SNR, 2 steps",
    (DDIMScheduler(num_train_timesteps=500), 20): "T = 500",
    (DDIMScheduler(num_train_timesteps=2000), 20): "T = 2000",
    (DDIMScheduler(num_train_timesteps=40), 10): "T = 40, no t > 50",
    **{(DDIMScheduler(), n): f"{n} steps" for n in (1, 2, 3, 4)},
    **{(FlowMatchEulerDiscreteScheduler(shift=3.0), n): f"flow, {n} steps" for n in (1, 2, 3, 4, 28)},
    (FlowMatchEulerDiscreteScheduler(shift=0.02), 12): "flow, nearly all truncated",
    (FlowMatchEulerDiscreteScheduler(shift=0.3), 9): "flow, the last fifth truncated",
}


def random_trace(scheduler, steps: int) -> Trace:
    """Two candidates with terms between 1 and 2 at each of the scheduler's steps."""
    scheduler.set_timesteps(steps)
    path = path_of(scheduler)
    timestep, log_snr = path.at_steps(path.steps)
    terms = 1 + torch.rand(6, 2, len(timestep), generator=torch.Generator().manual_seed(0))
    names = ("difference", "difference_velocity", "dot_conditional", "dot_guided", "error_conditional", "error_null")
    return Trace(
        log_snr=log_snr,
        timestep=timestep,
        beta=path.beta(timestep),
        dimensions=3,
        is_flow=path.is_flow,
        training_steps=path.training_steps,
        planned_steps=len(timestep),
        **dict(zip(names, terms, strict=True)),
    )


def literal(name: str, trace: Trace, candidate: int) -> float | None:
    """A score step by step, as its formula says; None where a term or the sum has no value."""
    levels = trace.log_snr.double().tolist()
    sigma = [1 / (1 + math.exp(level / 2)) if level > -math.inf else 1.0 for level in levels]  # flow time of λ
    alpha_bar = [1 / (1 + math.exp(-level)) if level > -math.inf else 0.0 for level in levels]
    times, beta = trace.timestep.tolist(), trace.beta.tolist()
    term = {n: getattr(trace, n)[candidate].tolist() for n in ("difference", "difference_velocity", "dot_conditional")}
    term |= {n: getattr(trace, n)[candidate].tolist() for n in ("dot_guided", "error_conditional", "error_null")}
    steps = range(len(levels))
    kept = [i for i in steps if sigma[i] > 0.05]
    inner = [i for i in kept if sigma[i] < 1]

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values and all(map(math.isfinite, values)) else None

    def trapezoid(x: list[float], y: list[float]) -> float | None:
        pairs = range(len(x) - 1)
        return sum((y[i] + y[i + 1]) / 2 * (x[i + 1] - x[i]) for i in pairs) if len(x) > 1 else None

    def kappa(i: int) -> float:
        return beta[i] * trace.training_steps / (2 * (1 - alpha_bar[i]))

    def scores(indices: list[int]) -> list[float]:
        variance = [sigma[i] ** 2 if trace.is_flow else 1 - alpha_bar[i] for i in steps]
        return [term["difference"][i] / variance[i] for i in indices]

    if name == "mi-tune":
        return trapezoid([levels[i] for i in inner], [term["difference"][i] / 2 for i in inner])
    if name == "log-likelihood-ratio":
        gaps = [(term["error_null"][i] - term["error_conditional"][i]) / 2 for i in inner]
        return trapezoid([levels[i] for i in inner], gaps)
    if name == "mi-tune-discrete":
        return mean([kappa(i) / (1 - beta[i]) * term["difference"][i] if beta[i] != 1 else math.nan for i in steps])
    if name == "mi-tune-release":
        return mean([kappa(i) * term["difference"][i] for i in steps if times[i] > 50])
    if name == "mi-tune-release-v":
        return mean([kappa(i) * term["difference_velocity"][i] for i in steps if times[i] > 50])
    if name == "rfmi":
        return trapezoid(
            [1 - sigma[i] for i in kept], [(1 - sigma[i]) / sigma[i] * term["dot_conditional"][i] for i in kept]
        )
    if name == "rfmi-squared":  # ‖Δu‖² = ‖Δε‖²/t², so t/(1−t) ‖Δu‖² vanishes with t for any prompt that has a limit
        squares = [term["difference"][i] / ((1 - sigma[i]) * sigma[i]) if sigma[i] < 1 else 0.0 for i in kept]
        return trapezoid([1 - sigma[i] for i in kept], squares)
    if name == "rfmi-release":
        return mean([(1 - sigma[i]) / sigma[i] * term["dot_guided"][i] for i in inner])
    fifth = math.ceil(len(levels) / 5)
    if name == "early":
        return sum(scores(list(steps)[:fifth]))
    if name == "late":
        last = [i for i in inner if i >= len(levels) - fifth]
        return sum(scores(last)) if last else None
    half = [i for i in inner if i >= len(levels) - len(levels) // 2] if name.endswith("late") else inner
    error = mean([term["error_conditional"][i] for i in half])
    return None if error is None else -error / 3


END = 2 * math.log((1 - TRUNCATION) / TRUNCATION)  # λ ≈ 5.9, where all integrals stop


class TestQuadrature:
    """Each preset on the exact expectations of a fine grid: what is left is the rule's own error."""

    @pytest.mark.parametrize("name", ["mi-tune", "rfmi", "rfmi-squared", "log-likelihood-ratio"])
    @pytest.mark.parametrize("make", [vp_trace, flow_trace])
    def test_integrals(self, name, make):
        trace = make()
        start = cumulative(trace.log_snr[0].item()) if trace.log_snr[0].isfinite() else 0.0
        # one step of the grid around the truncation: g(λ) dλ/2 is below 1e-3 there
        assert get_score(name)(trace).item() == pytest.approx(cumulative(END) - start, abs=1e-3)

    def test_eq_2_to_the_letter_is_the_same_integral(self):
        """Σ_t β_t/(2 α_t (1−ᾱ_t)) E‖Δε‖² is ½ ∫ E‖Δε‖² dλ over the whole schedule, up to O(β²)."""
        trace = vp_trace()
        whole = cumulative(trace.log_snr[-1].item()) - cumulative(trace.log_snr[0].item())
        assert get_score("mi-tune-discrete")(trace).item() == pytest.approx(whole, rel=0.01)

    def test_published_code_leaves_out_alpha_and_the_clean_end(self):
        trace = vp_trace()
        kept = trace.timestep > 50
        kappa = trace.beta * 1000 / (2 * torch.sigmoid(-trace.log_snr))
        by_hand = (kappa * trace.difference)[0, kept].mean()
        assert get_score("mi-tune-release")(trace).item() == pytest.approx(by_hand.item(), rel=1e-6)

    def test_published_code_scores_v_models_215_times_over_at_the_noise_end(self):
        """Δv = Δε/α, so the term at t = 999 weighs 1/ᾱ = 215 times as much."""
        trace = vp_trace()
        ratios = []
        for name in ("mi-tune-release-v", "mi-tune-release"):
            names = ("difference", "difference_velocity")
            first = {n: (getattr(trace, n) * (trace.timestep == 999)).tolist() for n in names}
            changed = Trace.from_columns(trace.to_columns() | first)
            ratios.append(get_score(name)(changed).item())
        assert ratios[0] / ratios[1] == pytest.approx(215, abs=1)

    def test_published_rfmi_is_a_plain_mean(self):
        """Over equal steps of σ in (0.05, 1), the mean is the integral divided by 0.95."""
        assert get_score("rfmi-release")(flow_trace()).item() == pytest.approx(cumulative(END) / 0.95, abs=2e-3)

    def test_early_and_late_steps(self):
        """Σ ‖Δε‖²/σ² over the first and the last fifth, without those beyond the truncation."""
        trace = flow_trace()
        s = torch.sigmoid(-trace.log_snr / 2)
        terms = trace.difference[0] / s**2
        assert get_score("early")(trace).item() == pytest.approx(terms[:200].sum().item(), rel=1e-5)
        late = terms[800:][s[800:] > TRUNCATION]
        assert get_score("late")(trace).item() == pytest.approx(late.sum().item(), rel=1e-5)

    def test_early_counts_the_planned_steps(self):
        """A run that was cut short after 100 of 1000 steps has no more early steps than those 100."""
        whole = flow_trace()
        columns = {k: [v[0][:100]] if isinstance(v[0], list) else v for k, v in whole.to_columns().items()} | {
            "planned_steps": [1000]
        }
        part = Trace.from_columns(columns)
        expected = (whole.difference / torch.sigmoid(-whole.log_snr / 2) ** 2)[:, :100].sum()
        assert get_score("early")(part).item() == pytest.approx(expected.item(), rel=1e-5)

    def test_self_confidence(self):
        """The negative mean error per dimension, of all kept steps and of the kept ones in the second half."""
        trace = flow_trace()
        kept = trace.log_snr.isfinite() & (torch.sigmoid(-trace.log_snr / 2) > TRUNCATION)
        errors = trace.error_conditional[0]
        late = kept & (torch.arange(1000) >= 500)
        assert get_score("self-confidence")(trace).item() == pytest.approx(-errors[kept].mean().item(), rel=1e-5)
        assert get_score("self-confidence-late")(trace).item() == pytest.approx(-errors[late].mean().item(), rel=1e-5)

    def test_trapezoid_is_exact_for_straight_lines(self):
        grid = torch.tensor([-2.0, 0.5, 1.0, 4.0])
        assert integral(3 * grid[None] + 1, grid).item() == pytest.approx(24.0)  # ∫ 3x + 1 from −2 to 4
        assert integral(torch.ones(1, 1), grid[:1]).isnan().item()


class TestScores:
    def test_unknown_name_lists_the_known_ones(self):
        with pytest.raises(MituneError, match="no score 'mitune'; the known ones are mi-tune, .*log-likelihood-ratio"):
            get_score("mitune")

    def test_each_has_a_source_and_one_value_a_candidate(self):
        trace = flow_trace()
        for name, score in SCORES.items():
            assert score.name == name
            assert score.formula and score.source
            assert score.values(trace).shape == (1,)
            assert score.values(trace).dtype == torch.float32

    def test_non_finite_terms_give_nan_for_that_candidate_alone(self):
        columns = flow_trace().to_columns()
        broken = [value.copy() for value in columns["difference"]]
        broken[0][500] = math.inf
        both = {name: value * 2 for name, value in columns.items()} | {"difference": columns["difference"] + broken}
        values = get_score("mi-tune")(Trace.from_columns(both))
        assert values.isnan().tolist() == [False, True]

    def test_scores_of_diffusion_schedules_do_not_exist_for_flow(self):
        assert get_score("mi-tune-release").values(flow_trace()).isnan().item()
        with pytest.raises(MituneError, match=r"'mi-tune-release' needs a β_t \(no flow path\) .* the 1000 steps of"):
            get_score("mi-tune-release")(flow_trace())

    @pytest.mark.parametrize("schedule", SCHEDULES, ids=SCHEDULES.get)
    def test_every_score_is_its_literal_form_or_refused(self, schedule):
        """On odd schedules, too: the sums written out step by step have a value exactly where `check` lets it pass."""
        trace = random_trace(*schedule)
        refused = set()
        for name, score in SCORES.items():
            expected = [literal(name, trace, candidate) for candidate in range(len(trace))]
            if None in expected:
                refused.add(name)
                assert score.values(trace).isnan().all(), name
                for asked in (score.check, score):
                    with pytest.raises(MituneError, match=f"'{name}' needs .*; take another score, or other steps"):
                        asked(trace)
            else:
                score.check(trace)
                assert score(trace).tolist() == pytest.approx(expected, rel=1e-4), name
        assert len(refused) < len(SCORES)


class TestTrace:
    def test_columns_and_back(self):
        """One row a candidate, infinities and NaN included; scores come out the same."""
        trace = flow_trace()
        columns = trace.to_columns()
        two = Trace.from_columns({name: rows * 2 for name, rows in columns.items()})
        assert all(len(rows) == 1 for rows in columns.values())
        assert len(two) == 2
        assert two.difference.shape == (2, 1000)
        assert two.is_flow and two.dimensions == 1 and two.planned_steps is None
        assert torch.equal(two.log_snr, trace.log_snr)
        assert get_score("mi-tune")(two).tolist() == get_score("mi-tune")(trace).tolist() * 2

    def test_select(self):
        two = Trace.from_columns({name: rows * 2 for name, rows in flow_trace().to_columns().items()})
        two.difference[1] *= 2
        chosen = two.select([1])
        assert torch.equal(chosen.difference, two.difference[1:])
        assert torch.equal(chosen.log_snr, two.log_snr)

    @pytest.mark.parametrize("name", ["difference_velocity", "training_steps", "log_snr"])
    def test_a_table_that_lacks_a_column_is_refused(self, name):
        columns = flow_trace().to_columns()
        del columns[name]
        with pytest.raises(MituneError, match=f"^A table of trajectories lacks {name}, as those of other versions"):
            Trace.from_columns(columns)

    def test_rows_of_different_schedules_are_refused(self):
        columns = {
            name: rows + other
            for (name, rows), other in zip(
                flow_trace().to_columns().items(), vp_trace().to_columns().values(), strict=True
            )
        }
        with pytest.raises(MituneError, match="Column log_snr differs"):
            Trace.from_columns(columns)


class TestPredictions:
    @pytest.mark.parametrize("predicts", ["epsilon", "velocity", "sample"])
    @pytest.mark.parametrize("is_flow", [False, True])
    def test_noise_and_signal_come_back(self, predicts, is_flow):
        """From what a perfect network would say of z = α z₀ + σ ε, with v = α ε − σ z₀ (VP) or ε − z₀ (flow)."""
        rng = torch.Generator().manual_seed(0)
        z0, noise = torch.randn(2, 3, 4, 5, 5, generator=rng)
        alpha, sigma = alpha_sigma(torch.tensor(-1.3), is_flow=is_flow)
        noisy = alpha * z0 + sigma * noise
        velocity = noise - z0 if is_flow else alpha * noise - sigma * z0
        output = {"epsilon": noise, "velocity": velocity, "sample": z0}[predicts]
        epsilon, sample = epsilon_and_sample(output, noisy, alpha, sigma, predicts, is_flow=is_flow)
        torch.testing.assert_close(epsilon, noise, atol=1e-5, rtol=0)
        torch.testing.assert_close(sample, z0, atol=1e-5, rtol=0)
        torch.testing.assert_close(true_noise(noisy, z0, alpha, sigma), noise, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("predicts", ["epsilon", "velocity", "sample"])
    @pytest.mark.parametrize("is_flow", [False, True])
    def test_difference_is_that_of_the_noises(self, predicts, is_flow):
        rng = torch.Generator().manual_seed(0)
        noisy, one, other = torch.randn(3, 2, 4, 5, 5, generator=rng)
        alpha, sigma = alpha_sigma(torch.tensor(0.7), is_flow=is_flow)
        a, b = (epsilon_and_sample(o, noisy, alpha, sigma, predicts, is_flow=is_flow)[0] for o in (one, other))
        torch.testing.assert_close(epsilon_difference(one - other, alpha, sigma, predicts), a - b)
        torch.testing.assert_close(velocity_difference(one - other, alpha, sigma, predicts), (a - b) / alpha)

    def test_ends_of_the_path(self):
        ends = torch.tensor([-math.inf, math.inf])
        for is_flow in (False, True):
            alpha, sigma = alpha_sigma(ends, is_flow=is_flow)
            assert alpha.tolist() == [0, 1]
            assert sigma.tolist() == [1, 0]


class TestEstimate:
    def test_mean_and_error(self):
        estimate = Estimate.of_mean(torch.tensor([1.0, 2.0, 3.0, 6.0]))
        assert estimate.value == 3.0
        assert estimate.standard_error == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3 / 4))
        assert estimate.samples == 4
        assert str(estimate) == "3.000 ± 1.293 nats (n = 4)"  # 1.197 = t of 3 degrees of freedom
        assert estimate.interval(0.95) == pytest.approx((3 - 3.1824 * 1.0801, 3 + 3.1824 * 1.0801), abs=1e-3)
        assert math.isnan(Estimate.of_mean(torch.tensor([1.0])).standard_error)

    def test_error_of_strata_is_unbiased(self):
        """400 estimates from 8 strata of widely different means: their spread is the stated error, ± 1/√800."""
        rng = torch.Generator().manual_seed(0)
        draws = torch.randn(400, 8, 2, generator=rng, dtype=torch.float64) + 10 * torch.arange(8.0)[:, None]
        estimates = [Estimate.of_strata(each) for each in draws]
        spread = torch.tensor([e.value for e in estimates]).std().item()
        stated = math.sqrt(sum(e.standard_error**2 for e in estimates) / 400)
        assert stated == pytest.approx(spread, rel=4 / math.sqrt(800))

    @pytest.mark.parametrize("skewed", [False, True])
    @pytest.mark.parametrize(
        ("each", "shares"),
        [
            (16, [1]),
            (4, [0.2, 0.44, 0.05, 0.31, 0.1, 0.1, 0.1, 0.1]),
            (2, [1] * 16),
            (2, [0.01, 0.01, 0.04, 0.12, 0.18, 0.2, 0.11, 0.03, 0.01, 0.01, 0.01, 0.01, 0.02, 0.03, 0.07, 0.14]),
        ],
        ids=["plain mean", "8 strata of four", "16 equal strata", "16 strata as of a shapes model"],
    )
    def test_intervals_cover_what_they_say(self, each, shares, skewed):
        """68 and 95 % within 2 points, of 40,000 estimates of normal draws, and of gamma ones of shape 4."""
        rng = np.random.default_rng(0)
        size = (40_000, len(shares), each)
        draws = rng.gamma(4, 0.5, size) - 2 if skewed else rng.standard_normal(size)
        scaled = torch.from_numpy(draws * np.sqrt(shares)[:, None])
        first, (value, error, degrees) = Estimate.of_strata(scaled[0]), stratified_mean(scaled)
        same = (first.value, first.standard_error, first.degrees_of_freedom)
        assert same == pytest.approx((value[0].item(), error[0].item(), degrees[0].item()), rel=1e-12)
        assert covered(scaled, 0.0) == pytest.approx((68.27, 95), abs=2)

    def test_equal_draws_have_no_error(self):
        estimate = Estimate.of_strata(torch.ones(4, 2))
        assert (estimate.value, estimate.error, estimate.interval()) == (1, 0, (1, 1))


class TestProposals:
    @pytest.mark.parametrize("kind", [LogisticProposal, RectifiedFlowProposal])
    def test_density_is_the_slope_of_the_distribution_function(self, kind):
        proposal = kind(-6.0, 4.0)
        uniform = torch.linspace(0.01, 0.99, 2001, dtype=torch.float64)
        at = proposal.at(uniform)
        assert at.min() >= -6 and at.max() <= 4 and (at.diff() > 0).all()
        middle = (at[1:] + at[:-1]) / 2
        torch.testing.assert_close(proposal.density(middle), uniform.diff() / at.diff(), rtol=2e-3, atol=0)

    def test_logistic_default_is_uniform_flow_time(self):
        times = torch.sigmoid(-LogisticProposal(-50, 50).at(torch.linspace(0.1, 0.9, 9)) / 2)
        torch.testing.assert_close(times, torch.linspace(0.9, 0.1, 9, dtype=torch.float64), atol=1e-6, rtol=0)

    def test_rectified_flow_is_prop_3_3(self):
        """F(t) = (−t − ln(1−t)) / (−T − ln(1−T)) at t = sigmoid(λ/2)."""
        end = 0.95
        uniform = torch.linspace(0.05, 1, 20, dtype=torch.float64)
        t = torch.sigmoid(RectifiedFlowProposal(-60, 2 * math.log(end / (1 - end))).at(uniform) / 2)
        torch.testing.assert_close((-t - torch.log1p(-t)) / (-end - math.log1p(-end)), uniform, atol=1e-6, rtol=0)

    def test_lambert_w(self):
        x = -torch.exp(-(1 + torch.logspace(-8, 2, 200, dtype=torch.float64)))
        torch.testing.assert_close(lambert_w(x), torch.from_numpy(lambertw(x.numpy()).real), atol=2e-8, rtol=1e-8)
        assert lambert_w(torch.tensor(-1 / math.e)).item() == pytest.approx(-1, abs=1e-3)  # float32's −1/e


class TestPostHoc:
    """Point-wise draws with the exact denoiser: their mean over the joint distribution is the MI."""

    @pytest.mark.parametrize("estimator", ["standard", "orthogonal"])
    @pytest.mark.parametrize("proposal", [LogisticProposal(-8, END), RectifiedFlowProposal(-8, END)])
    @pytest.mark.parametrize("is_flow", [False, True])
    def test_gaussian_pair(self, estimator, proposal, is_flow):
        x, predict = gaussian_pair(is_flow)
        draws = point_wise_draws(
            predict,
            x,
            estimator=estimator,
            proposal=proposal,
            strata=100,
            generator=torch.Generator().manual_seed(1),
            is_flow=is_flow,
        )
        assert draws.shape == (10, 100, 2)
        draws /= x[0].numel()
        # The images share their noise: the error of the grand mean comes from the strata, and from the images.
        over_images, over_noise = Estimate.of_mean(draws.mean(dim=(1, 2))), Estimate.of_strata(draws.mean(dim=0))
        error = math.hypot(over_images.standard_error, over_noise.standard_error)
        assert error <= 0.02
        assert over_noise.value == pytest.approx(cumulative(END), abs=4 * error)
        assert cumulative(END) == pytest.approx(-0.5 * math.log(V), abs=0.005)  # the truncation costs 0.5 %

    def test_standard_error_of_one_image(self):
        """200 repeats with other seeds spread by what each of them states."""
        x, predict = gaussian_pair(is_flow=True)
        repeats = [
            Estimate.of_strata(
                point_wise_draws(
                    predict,
                    x,
                    estimator="standard",
                    proposal=LogisticProposal(-8, END),
                    strata=8,
                    generator=torch.Generator().manual_seed(seed),
                    is_flow=True,
                )[0]
            )
            for seed in range(200)
        ]
        spread = torch.tensor([r.value for r in repeats]).std().item()
        stated = math.sqrt(sum(r.standard_error**2 for r in repeats) / len(repeats))
        assert stated == pytest.approx(spread, rel=0.25)

    def test_self_confidence(self):
        """−E[vS/(1+vS)] over uniform flow time; S = ((1−s)/s)²."""
        x, predict = gaussian_pair(is_flow=True)
        draws = point_wise_draws(
            predict,
            x,
            estimator="self-confidence",
            proposal=LogisticProposal(-50, 50),
            strata=100,
            generator=torch.Generator().manual_seed(1),
            is_flow=True,
        )
        s = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
        snr = ((1 - s) / s) ** 2
        expected = -(V * snr / (1 + V * snr)).mean().item()
        estimate = Estimate.of_strata(draws.mean(dim=0), "per dimension")
        assert estimate.standard_error <= 0.003
        assert estimate.value == pytest.approx(expected, abs=4 * estimate.standard_error + 0.005)  # images: √10240

    def test_map_sums_to_the_value(self):
        def predict(noisy: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            return noisy / 2, noisy / 3

        latents = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
        whole, spatial = (
            point_wise_draws(
                predict,
                latents,
                estimator="orthogonal",
                proposal=LogisticProposal(-3, 3),
                strata=2,
                generator=torch.Generator().manual_seed(0),
                is_flow=True,
                spatial=spatial,
            )
            for spatial in (False, True)
        )
        assert spatial.shape == (2, 2, 2, 3, 5)
        torch.testing.assert_close(spatial.sum(dim=(-2, -1)), whole)

    def test_unknown_estimator(self):
        zero = torch.zeros(1)
        with pytest.raises(MituneError, match="no estimator 'itd'; the known ones are standard, orthogonal"):
            point_wise_terms(zero, zero, zero, "itd")


def gaussian_pair(is_flow: bool):
    """Ten images x (10, 1, 32, 32) whose pixels are pairs with a y each, and the exact ε̂ with and without y."""
    rng = torch.Generator().manual_seed(0)
    y, noise = torch.randn(2, 10, 1, 32, 32, generator=rng)
    x = RHO * y + math.sqrt(V) * noise

    def predict(noisy: Tensor, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = (value.float() for value in alpha_sigma(log_snr, is_flow=is_flow))
        conditional = sigma * (noisy - alpha * RHO * y) / (alpha**2 * V + sigma**2)
        return conditional, sigma * noisy / (alpha**2 + sigma**2)

    return x, predict
