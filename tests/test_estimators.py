"""Estimators of mutual information on samples: closed forms, exact networks, and what any estimator must obey."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chi, kstest, multivariate_normal

from mitune.bench import mi
from mitune.bench.mi_tasks import TASKS, dense_covariance, get_task, normal, paired_covariance, student
from mitune.errors import MituneError
from mitune.estimators.fields import Gap, PaperField, PlainField, SkeletonField
from mitune.estimators.gaussian import (
    Canonical,
    Ranks,
    Skeleton,
    marginal_map,
    normalizing_map,
    radial_map,
    summary_map,
)
from mitune.estimators.networks import Folds, Training
from mitune.estimators.references import (
    CCA,
    KSG,
    GaussianCopula,
    Variational,
    donsker_varadhan,
    info_nce,
    nguyen_wainwright_jordan,
    smile,
)
from mitune.estimators.table import ESTIMATORS, get_estimator
from mitune.information import TRUNCATION, LogisticProposal
from tests.test_statistics import cells

QUICK = Training(members=2, width=32, steps=200, batch=128, patience=2, draws=8)
PAIR = get_task("1v1-normal-0.75")


def quick_rfmi():
    return SkeletonField(is_flow=True, scale=2, training=QUICK)


def value_of(estimator, x, y):
    return estimator.fit(x, y).estimate(x, y).value


# --- The skeleton ------------------------------------------------------------------------------------------------


def test_canonical_coordinates_give_the_closed_form_and_their_log_ratios_average_to_it():
    task = normal("", dense_covariance(2, 4, 0.5), 2)
    x, y = task.sample(20_000, seed=0)
    canonical = Canonical.of(x, y)
    u, w = canonical(x, y)
    np.testing.assert_allclose(np.cov(u.T, bias=True), np.eye(2), atol=1e-9)
    expected = np.zeros((2, 4))
    np.fill_diagonal(expected, canonical.correlations)
    np.testing.assert_allclose(u.T @ w / len(u), expected, atol=1e-9)
    assert canonical.log_ratios(u, w).mean() == pytest.approx(canonical.information, abs=1e-9)
    assert canonical.information == pytest.approx(task.mutual_information, abs=0.02)
    assert canonical.significant == 1


def test_bias_is_what_sampling_adds():
    """Mean of 100 estimates from 150 samples of 10 + 10 dimensions: .4 nats too high without it."""
    task = normal("", paired_covariance(10, 10, 3, 0.6), 10)
    fits = [Canonical.of(*task.sample(150, seed)) for seed in range(100)]
    corrected = np.array([fit.information - fit.bias for fit in fits])
    error = corrected.std() / 10
    assert fits[0].bias > 0.35
    assert corrected.mean() == pytest.approx(task.mutual_information, abs=4 * error)


def test_ranks_share_ties_and_stop_at_the_ends():
    ranks = Ranks.of(np.array([3.0, 1.0, 1.0, 2.0]))
    np.testing.assert_allclose(ranks(np.array([1.0, 2.0, 3.0, 99.0, 1.5])), [0.25, 0.625, 0.875, 0.875, 0.4375])


def test_each_map_normalizes_its_own_kind_and_is_chosen_for_it():
    """Radii for heavy tails, marginals for bent axes."""
    heavy = student("", np.eye(6), 3, 1.0).sample(4000, seed=0)[0]
    bent = get_task("half_cube-multinormal-sparse-3-3-2-2.0").sample(4000, seed=0)[0]
    assert kstest(radial_map(heavy)(heavy)[:, 0], "norm").pvalue > 0.01
    for sample, right in ((heavy, radial_map), (bent, marginal_map)):
        np.testing.assert_array_equal(normalizing_map(sample)(sample), right(sample)(sample))


def test_summary_keeps_the_first_coordinates_and_the_norm_of_the_rest():
    u = np.random.default_rng(0).standard_normal((500, 8))
    short = summary_map(u, 2)(u)
    np.testing.assert_array_equal(short[:, :2], u[:, :2])
    assert np.array_equal(np.argsort(short[:, 2]), np.argsort((u[:, 2:] ** 2).sum(axis=1)))


def test_skeleton_of_new_samples_uses_what_was_fitted():
    x, y = student("", dense_covariance(3, 3, 0.5), 3, 2.0).sample(2000, seed=0)
    skeleton = Skeleton.of(x, y)
    u, _ = skeleton(x, y)
    fresh, _ = skeleton(x[:10], y[:10])
    np.testing.assert_allclose(fresh, u[:10])
    assert kstest(np.linalg.norm(u, axis=1), chi(3).cdf).pvalue > 0.01


# --- The integrals, with exact networks ---------------------------------------------------------------------------


@pytest.mark.parametrize("is_flow", [True, False])
def test_gap_of_a_shifted_normal_is_its_divergence(is_flow):
    """x ~ N(m, 1) against N(0, 1): KL = m²/2, and the exact network's offset is −m at every λ. Both forms of (3)."""
    shift, samples = 0.7, 4000
    x = torch.randn(samples, 1, generator=torch.Generator().manual_seed(0)) + shift
    gap = Gap(x, torch.zeros(samples, 0), torch.zeros(1), is_flow, LogisticProposal(-10, 10))

    def exact(features):
        return torch.tensor([-shift, 0.0]).expand(*features.shape[:-1], 2)

    rows, generator = torch.arange(samples)[None], torch.Generator().manual_seed(1)
    assert gap.information(exact, rows, generator).mean().item() == pytest.approx(shift**2 / 2, abs=1e-3)
    loss = gap.loss(exact, rows, generator)[0]
    assert -loss.mean().item() == pytest.approx(shift**2 / 2, abs=4 * loss.std().item() / math.sqrt(samples))


def test_untrained_gap_is_zero():
    gap = Gap.of(np.zeros((8, 2)), np.ones((8, 1)), np.array([0.5]), is_flow=True, scale=2)
    network = gap.network(QUICK)
    rows = torch.arange(8).reshape(2, 4)
    assert gap.information(network, rows, torch.Generator()).abs().max() == 0


@pytest.mark.parametrize("is_flow", [True, False])
def test_paper_integrals_of_a_normal_pair(is_flow):
    """With the exact velocity or ε of a pair of correlation ρ: ½ ln((1+S)/(1+vS)) up to the truncation at S = e^λ."""
    rho, samples = 0.8, 40_000
    x, y = (torch.from_numpy(side).float() for side in normal("", dense_covariance(1, 1, rho), 1).sample(samples, 0))

    def exact(features):
        noisy, given, asked, scaled = features[..., :1], features[..., 1:2], features[..., 2:3], features[..., 3:4]
        root = torch.exp(2 * scaled)  # e^{λ/2}, from λ/4
        alpha = root / (1 + root) if is_flow else root / (1 + root**2).sqrt()
        sigma = alpha / root
        variance = 1 - rho**2 * asked
        epsilon = sigma * (noisy - alpha * rho * given) / (alpha**2 * variance + sigma**2)
        return epsilon if not is_flow else (epsilon - noisy) / alpha  # z = αx + σε and v = ε − x

    draws = PaperField(x, y, is_flow).information(exact, torch.arange(samples)[None], torch.Generator().manual_seed(0))
    snr = ((1 - TRUNCATION) / TRUNCATION) ** 2 if is_flow else math.exp(12)
    expected = 0.5 * math.log((1 + snr) / (1 + (1 - rho**2) * snr))
    error = draws.std().item() / math.sqrt(samples)
    assert error < 0.02
    assert draws.mean().item() == pytest.approx(expected, abs=4 * error)


def test_folds_hold_every_sample_out_once():
    folds = Folds.of(11, 3, torch.Generator().manual_seed(0))
    assert sorted({row for part in folds.held_out.tolist() for row in part}) == list(range(11))
    for held_out, trained_on in zip(folds.held_out.tolist(), folds.trained_on.tolist(), strict=True):
        assert not set(held_out) & set(trained_on) and len(set(held_out) | set(trained_on)) == 11


# --- What any estimator must obey ---------------------------------------------------------------------------------

CONSISTENT = pytest.mark.parametrize("make", [quick_rfmi, GaussianCopula, KSG], ids=["RFMI", "copula", "KSG"])


@CONSISTENT
def test_independence_is_zero(make):
    x, _ = PAIR.sample(1500, seed=0)
    _, y = PAIR.sample(1500, seed=1)
    assert value_of(make(), x, y) == pytest.approx(0, abs=0.03)


@CONSISTENT
def test_symmetry(make):
    x, y = normal("", dense_covariance(1, 2, 0.6), 1).sample(1500, seed=0)
    assert value_of(make(), x, y) == pytest.approx(value_of(make(), y, x), abs=1e-4)


@CONSISTENT
def test_invertible_maps_change_nothing(make):
    x, y = PAIR.sample(1500, seed=0)
    assert value_of(make(), np.exp(x), y**3) == pytest.approx(value_of(make(), x, y), abs=0.08)


@CONSISTENT
def test_data_processing(make):
    """y's noisy copy says less of x, and no more is said by y with a second look at x that is all noise."""
    x, y = PAIR.sample(1500, seed=0)
    noise = np.random.default_rng(1).standard_normal(y.shape)
    whole = value_of(make(), x, y)
    assert value_of(make(), x, y + noise) < whole - 0.1
    assert value_of(make(), x, np.hstack([y, noise])) == pytest.approx(whole, abs=0.08)


@CONSISTENT
def test_additivity(make):
    """Two independent pairs know as much as both together."""
    first, second = PAIR.sample(1500, seed=0), PAIR.sample(1500, seed=1)
    both = value_of(make(), np.hstack([first[0], second[0]]), np.hstack([first[1], second[1]]))
    assert both == pytest.approx(value_of(make(), *first) + value_of(make(), *second), abs=0.12)


def test_invariance_under_rising_maps_is_exact_with_a_skeleton():
    """Ranks do not change, so nothing does."""
    x, y = PAIR.sample(800, seed=0)
    assert value_of(quick_rfmi(), np.exp(x), y**3) == value_of(quick_rfmi(), x, y)


# --- The estimators -----------------------------------------------------------------------------------------------


def test_where_the_skeleton_is_right_the_networks_leave_it():
    x, y = get_task("half_cube-multinormal-sparse-25-25-2-2.0").sample(1500, seed=0)
    field, closed = quick_rfmi().fit(x, y).estimate(x, y), GaussianCopula().fit(x, y).estimate(x, y)
    assert field.value == pytest.approx(closed.value, abs=0.02)
    assert field.standard_error == pytest.approx(closed.standard_error, rel=0.2)
    assert (field.samples, field.unit) == (1500, "nats")


@pytest.mark.slow
@pytest.mark.parametrize("is_flow", [True, False])
def test_shared_scale_without_correlation_is_found(is_flow):
    """Student's t has no linear dependence at all, so the skeleton says 0, and on new samples the value holds."""
    task = get_task("student-identity-2-2-1")
    x, y = task.sample(2000, seed=5)
    training = Training(members=2, steps=800)
    field = SkeletonField(is_flow=is_flow, scale=2, training=training).fit(x, y)
    assert abs(field.skeleton_.canonical.information) < 0.02
    assert field.estimate(x, y).value == pytest.approx(task.mutual_information, abs=0.09)
    assert field.estimate(*task.sample(2000, seed=6)).value == pytest.approx(task.mutual_information, abs=0.09)


@pytest.mark.slow
@pytest.mark.parametrize("is_flow", [True, False])
def test_plain_fields_find_a_normal_pair(is_flow):
    task = normal("", dense_covariance(1, 1, 0.6), 1)
    x, y = task.sample(3000, seed=0)
    field = PlainField(is_flow=is_flow, training=Training(members=2, steps=1000, learning_rate=2e-3)).fit(x, y)
    assert field.estimate(x, y).value == pytest.approx(task.mutual_information, abs=0.12)


def test_same_seed_same_value_and_global_state_untouched():
    x, y = get_task("student-identity-1-1-1").sample(400, seed=0)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = value_of(quick_rfmi(), x, y), value_of(quick_rfmi(), x, y)
    assert first == second
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("estimator", [CCA(), KSG()], ids=["CCA", "KSG"])
def test_references_on_a_normal_pair(estimator):
    x, y = PAIR.sample(4000, seed=0)
    assert value_of(estimator, x, y) == pytest.approx(PAIR.mutual_information, abs=0.05)


def exact_scores(rho, batch, seed):
    x, y = normal("", dense_covariance(1, 1, rho), 1).sample(batch, seed)
    joint = multivariate_normal(cov=dense_covariance(1, 1, rho))
    pairs = np.stack(np.broadcast_arrays(x, y.T), axis=-1)
    single = multivariate_normal(cov=1)
    return torch.from_numpy(joint.logpdf(pairs) - single.logpdf(x)[:, None] - single.logpdf(y)[None])


@pytest.mark.parametrize("bound", [donsker_varadhan, nguyen_wainwright_jordan, info_nce, smile])
def test_bounds_are_tight_for_the_exact_critic(bound):
    """With f = ln p(x, y) / p(x) p(y); NWJ wants one more. Mean over 20 batches."""
    rho = 0.6
    extra = 1.0 if bound is nguyen_wainwright_jordan else 0.0
    values = torch.stack([bound(exact_scores(rho, 300, seed) + extra) for seed in range(20)])
    error = values.std().item() / math.sqrt(20)
    assert error < 0.03
    assert values.mean().item() == pytest.approx(-0.5 * math.log1p(-(rho**2)), abs=4 * error + 0.005)


def test_variational_critic_learns():
    x, y = PAIR.sample(3000, seed=0)
    estimate = Variational(donsker_varadhan, donsker_varadhan, steps=200).fit(x, y).estimate(x, y)
    assert estimate.value == pytest.approx(PAIR.mutual_information, abs=0.1)


def bad_samples():
    """(x, y) by what is wrong with them: what any estimator would answer with a number that means nothing."""
    rng = np.random.default_rng(4)
    x, y, z = (rng.standard_normal((1000, 1)) for _ in range(3))
    die, coin = (rng.integers(0, faces, (1000, 1)).astype(float) for faces in (3, 2))
    broken, endless = x.copy(), y.copy()
    broken[3], endless[5] = np.nan, -np.inf
    return {
        "a die and its copy": (die, die, "Column 1 of x is not continuous: 1000 of its 1000"),
        "a coin and noise": (coin, y, "Column 1 of x is not continuous"),
        "noise and a coin": (x, coin, "Column 1 of y is not continuous"),
        "a die among others": (np.hstack([x, die, z]), y, "Column 2 of x is not continuous"),
        "a die beside y": (x, np.hstack([y, die]), "Column 2 of y is not continuous"),
        "counts": (rng.poisson(50, (1000, 1)), y, "Column 1 of x is not continuous"),
        "half of them zero": (np.maximum(x, 0), y, "Column 1 of x is not continuous"),
        "rows twice": (np.repeat(x[:500], 2, axis=0), np.repeat(y[:500], 2, axis=0), "Drop repeated rows"),
        "a constant": (np.hstack([x, np.ones_like(x)]), y, "Column 2 of x is constant"),
        "not finite": (broken, y, "not finite"),
        "infinite": (x, endless, "not finite"),
        "other lengths": (x, y[:500], "same number of rows"),
        "no table": (x[:, 0], y, "two tables"),
        "no rows": (x[:0], y[:0], "two tables"),
        "words": (np.full((1000, 1), "red"), y, "tables of numbers"),
        "three rows": (x[:3], y[:3], "too few"),
    }


@pytest.mark.parametrize("name", ESTIMATORS)
def test_bad_samples_are_refused_by_every_estimator(name):
    """When fitted, or at the latest when asked."""
    for kind, (x, y, message) in bad_samples().items():
        estimator = get_estimator(name)
        with pytest.raises(MituneError, match=message):
            estimator.fit(x, y).estimate(x, y)
            pytest.fail(kind)


@pytest.mark.parametrize("make", [quick_rfmi, GaussianCopula, CCA, KSG], ids=["RFMI", "copula", "CCA", "KSG"])
def test_bad_samples_are_refused_after_a_fit(make):
    x, y = PAIR.sample(300, seed=0)
    estimator = make().fit(x, y)
    for a, b, message in (
        (np.hstack([x, x[::-1]]), y, "the 1 and 1 columns of the fit"),
        (x, np.sign(y), "Column 1 of y is not continuous"),
        (x[:200], y, "same number of rows"),
    ):
        with pytest.raises(MituneError, match=message):
            estimator.estimate(a, b)


def determined_samples():
    """(x, y) of which a part of one is a part of the other, in other units: their information is infinite."""
    rng = np.random.default_rng(5)
    x, rest, more = (rng.standard_normal((1000, 1)) for _ in range(3))
    return {
        "itself": (x, x),
        "a line": (x, 3 - 2 * x),
        "large units": (x, 1e200 * x),
        "a curve": (x, np.exp(2 * x)),
        "one of two columns": (np.hstack([x, rest]), np.hstack([more, -x])),
        "a sum": (np.hstack([x, rest]), x + rest),
        "with a column twice": (np.hstack([x, x]), np.hstack([x, rest])),
    }


@pytest.mark.parametrize("name", ESTIMATORS)
def test_what_determines_the_other_is_refused_by_every_estimator(name):
    for kind, (x, y) in determined_samples().items():
        with pytest.raises(MituneError, match="x and y determine each other, so their information is infinite"):
            get_estimator(name).fit(x, y)
            pytest.fail(kind)


def test_columns_that_depend_on_each_other_within_a_side_do_not_count():
    x, y = PAIR.sample(1000, seed=0)
    twice = KSG().fit(np.hstack([x, x]), y).estimate(np.hstack([x, x]), y)
    assert twice.value == pytest.approx(KSG().fit(x, y).estimate(x, y).value, abs=0.05)


def test_float32_is_continuous_and_spread_counts_keep_their_information():
    """The remedy of the message: k + U(0, 1) tells k, so a fair coin and its copy share ln 2, found by neighbors."""
    x, y = PAIR.sample(20_000, seed=0)
    GaussianCopula().fit(x.astype(np.float32), y.astype(np.float32))
    rng = np.random.default_rng(0)
    coin = rng.integers(0, 2, (3000, 1))
    first, second = (coin + rng.random(coin.shape) for _ in range(2))
    assert value_of(KSG(), first, second) == pytest.approx(math.log(2), abs=0.05)


def test_unknown_estimator():
    with pytest.raises(MituneError, match="no estimator 'MIME'; the known ones are RFMI"):
        get_estimator("MIME")


# --- The benchmark ------------------------------------------------------------------------------------------------


def test_a_stopped_benchmark_goes_on(tmp_path, monkeypatch):
    file = tmp_path / "results.parquet"
    asked = (["1v1-normal-0.75", "student-identity-1-1-1"], ["Gaussian-copula"], [200])
    seen = []
    half = mi.run_benchmark(asked[0][:1], *asked[1:], seeds=1, file=file, progress=lambda *step: seen.append(step))
    assert seen == [(0, 1), (1, 1)]
    made = []
    measure = mi.measure
    monkeypatch.setattr(mi, "measure", lambda task, *rest: made.append(task.name) or measure(task, *rest))
    whole = mi.run_benchmark(*asked, seeds=1, file=file, progress=lambda *_: None)
    assert made == ["student-identity-1-1-1"]
    assert whole[0] == half[0] and mi.read_results(file) == whole
    assert whole[1].truth == TASKS["student-identity-1-1-1"].mutual_information


def test_table_and_figure():
    rows = [
        mi.Result(task=name, estimator="CCA", samples=n, seed=0, truth=t, value=t + e, standard_error=0.01, seconds=2.0)
        for name, t, e in (("1v1-normal-0.75", 0.413339, 0.1), ("student-identity-1-1-1", 0.224171, -0.3))
        for n in (1000, 5000)
    ]
    table = cells(mi.markdown(rows))
    worst = "−0.300 student-identity-1-1-1"
    assert ["CCA", "1,000", "0.200 (2)", "–", "–", "0.300 (1)", "0.300 (1)", worst, "2.0"] in table
    assert ["1v1-normal-0.75", "0.413", "0.513 ± 0.010"] in table
    assert mi.figure(rows, ["CCA"]).startswith(b"\x89PNG")


def test_all_estimators_can_be_made():
    for name in ESTIMATORS:
        assert hasattr(get_estimator(name, seed=1), "fit")
