"""The 40 benchmark tasks: truths against the published list and against densities, samples against what they claim."""

import math

import numpy as np
import pytest
from scipy.integrate import trapezoid
from scipy.special import ndtr
from scipy.stats import chi2, kstest, multivariate_normal, multivariate_t, norm

from mitune.bench.mi_tasks import (
    TASKS,
    additive,
    additive_information,
    dense_covariance,
    get_task,
    half_cube,
    mixture_quantile,
    normal,
    paired_covariance,
    spiral,
    student,
    swiss_roll,
    wiggly_x,
    wiggly_y,
)
from mitune.errors import MituneError

# The published truths, in nats, by what a task is made from.
PUBLISHED = {
    "1v1-normal-0.75": 0.413339,
    "1v1-bimodal-0.75": 0.413339,
    "1v1-additive-0.1": 1.709438,
    "1v1-additive-0.75": 0.333333,
    "multinormal-dense-2-2-0.5": 0.293893,
    "multinormal-dense-3-3-0.5": 0.413339,
    "multinormal-dense-5-5-0.5": 0.592812,
    "multinormal-dense-25-25-0.5": 1.292184,
    "multinormal-dense-50-50-0.5": 1.624265,
    "multinormal-sparse": 1.021651,
    "student-identity-1-1-1": 0.224171,
    "student-identity-2-2-1": 0.431946,
    "student-identity-2-2-2": 0.193147,
    "student-identity-3-3-2": 0.290922,
    "student-identity-3-3-3": 0.178712,
    "student-identity-5-5-2": 0.448151,
    "student-identity-5-5-3": 0.298544,
}


def test_forty_tasks_with_the_published_truths():
    assert len(TASKS) == 40
    for name, task in TASKS.items():
        [truth] = [value for part, value in PUBLISHED.items() if part in name]
        assert task.mutual_information == pytest.approx(truth, abs=1e-6), name


@pytest.mark.parametrize("name", TASKS)
def test_samples_have_the_promised_shape_and_come_again_with_their_seed(name):
    task = get_task(name)
    x, y = task.sample(50, seed=1)
    assert x.shape == (50, task.dim_x) and y.shape == (50, task.dim_y)
    assert np.isfinite(x).all() and np.isfinite(y).all()
    again, other = task.sample(50, seed=1), task.sample(50, seed=2)
    np.testing.assert_array_equal(x, again[0])
    assert not np.array_equal(x, other[0])


def log_ratio(joint, first, second, x, y):
    return joint.logpdf(np.hstack([x, y])) - first.logpdf(x) - second.logpdf(y)


@pytest.mark.parametrize("dof", [1, 3, math.inf])
def test_normal_and_student_truths_are_mean_log_ratios_of_the_densities(dof):
    """I = E[ln p(x, y) / p(x) p(y)], with the densities of SciPy, over samples of the task."""
    covariance = dense_covariance(2, 3, 0.4)
    task = normal("", covariance, 2) if math.isinf(dof) else student("", covariance, 2, dof)
    parts = (covariance, covariance[:2, :2], covariance[2:, 2:])
    if math.isinf(dof):
        densities = [multivariate_normal(cov=part) for part in parts]
    else:
        densities = [multivariate_t(shape=part, df=dof) for part in parts]
    values = log_ratio(*densities, *task.sample(40_000, seed=0))
    error = values.std() / math.sqrt(len(values))
    assert error < 0.01
    assert task.mutual_information == pytest.approx(values.mean(), abs=4 * error)


@pytest.mark.parametrize("width", [0.1, 0.5, 0.75])
def test_additive_truth_is_the_entropy_of_the_sum_less_that_of_the_noise(width):
    y = np.linspace(-width, 1 + width, 200_001)
    density = (np.clip(y + width, 0, 1) - np.clip(y - width, 0, 1)) / (2 * width)
    entropy = trapezoid(-density * np.log(np.where(density > 0, density, 1)), y)
    assert additive_information(width) == pytest.approx(entropy - math.log(2 * width), abs=1e-6)
    x, y = additive("", width).sample(5000, seed=0)
    assert kstest((y - x)[:, 0], "uniform", args=(-width, 2 * width)).pvalue > 0.01


@pytest.mark.parametrize("name", ["student-identity-2-2-1", "multinormal-sparse-5-5-2-2.0"])
def test_joint_samples_are_distributed_as_the_base_says(name):
    """‖(x, y)‖² is F-distributed for Student's t, χ² for a whitened normal."""
    task = get_task(name)
    joint = np.hstack(task.sample(5000, seed=0))
    if name.startswith("student"):
        assert kstest((joint**2).mean(axis=1), "f", args=(4, 1)).pvalue > 0.01
    else:
        covariance = paired_covariance(5, 5, 2, 0.8)
        squared = np.einsum("ni,ij,nj->n", joint, np.linalg.inv(covariance), joint)
        assert kstest(squared, chi2(10).cdf).pvalue > 0.01


def test_maps_are_one_to_one():
    """Increasing on a grid, or undone by hand."""
    grid = np.linspace(-6, 6, 10_001)
    for rising in (half_cube, wiggly_x, wiggly_y):
        assert (np.diff(rising(grid)) > 0).all()
    u = np.linspace(0.001, 0.999, 101)
    mixed = mixture_quantile(0.3, 0, 5)(u)
    np.testing.assert_allclose(0.3 * norm.cdf(mixed) + 0.7 * norm.cdf(mixed - 5), u, atol=1e-12)
    t = 21 * np.linalg.norm(swiss_roll(u[:, None]), axis=1)
    np.testing.assert_allclose((t / (1.5 * math.pi) - 1) / 2, u, atol=1e-12)


def test_spiral_turns_by_the_squared_norm_and_keeps_it():
    x = np.random.default_rng(0).standard_normal((100, 4))
    turned = spiral(1, 2, 0.25)(x)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(x, axis=1))
    np.testing.assert_array_equal(turned[:, [0, 3]], x[:, [0, 3]])
    back = spiral(1, 2, -0.25)(turned)  # the norm is the same, so the opposite speed undoes it
    np.testing.assert_allclose(back, x, atol=1e-12)


def test_transformed_tasks_are_maps_of_the_same_draws():
    x, y = get_task("1v1-normal-0.75").sample(100, seed=3)
    uniform_x, _ = get_task("normal_cdf-1v1-normal-0.75").sample(100, seed=3)
    np.testing.assert_allclose(uniform_x, ndtr(x))
    rolled, plain = get_task("swissroll_x-normal_cdf-1v1-normal-0.75").sample(100, seed=3)
    np.testing.assert_allclose(rolled, swiss_roll(ndtr(x)))
    np.testing.assert_allclose(plain, ndtr(y))


def test_unknown_task():
    with pytest.raises(MituneError, match="no task 'cube'"):
        get_task("cube")
