r"""The 40 tasks of the mutual-information benchmark "Beyond Normal" (Czyż et al., NeurIPS 2023, arXiv 2306.11078).

A task is a joint distribution of x and y that can be sampled and whose I(x; y) is known. Three closed forms are the
source of every truth: the normal, Student's t and additive uniform noise. The rest are invertible maps of x and of y
alone, which change the samples and not the information. Names are those of the benchmark's own package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from scipy.special import digamma, gammaln, ndtr, ndtri

from mitune.errors import MituneError
from mitune.evaluation.statistics import Array

Pair = tuple[Array, Array]


@dataclass(frozen=True, slots=True)
class Task:
    """A joint distribution of x (dim_x) and y (dim_y) with its mutual information in nats."""

    name: str
    dim_x: int
    dim_y: int
    mutual_information: float
    draw: Callable[[int, np.random.Generator], Pair]

    def sample(self, n: int, seed: int) -> Pair:
        """n independent pairs, x (n, dim_x) and y (n, dim_y); the same seed gives the same pairs."""
        return self.draw(n, np.random.default_rng(seed))


# --- Closed forms ------------------------------------------------------------------------------------------------


def normal_information(covariance: Array, dim_x: int) -> float:
    """½ ln(|Σ_x| |Σ_y| / |Σ|), the mutual information of a normal's first dim_x coordinates with the rest, in nats."""
    blocks = (covariance[:dim_x, :dim_x], covariance[dim_x:, dim_x:], covariance)
    log_x, log_y, log_xy = (np.linalg.slogdet(block).logabsdet for block in blocks)
    return float(log_x + log_y - log_xy) / 2


def student_entropy(dimensions: int, dof: float) -> float:
    """Differential entropy of Student's t with unit dispersion, in nats (Arellano-Valle et al., 2013, eq. 7)."""
    half = (dof + dimensions) / 2
    norm = gammaln(dof / 2) - gammaln(half) + dimensions / 2 * math.log(dof * math.pi)
    return float(norm + half * (digamma(half) - digamma(dof / 2)))


def student_information(covariance: Array, dim_x: int, dof: float) -> float:
    """The normal's information of that dispersion, plus what the shared scale adds: H(x) + H(y) − H(x, y), in nats."""
    total = len(covariance)
    shared = student_entropy(dim_x, dof) + student_entropy(total - dim_x, dof) - student_entropy(total, dof)
    return normal_information(covariance, dim_x) + shared


def additive_information(width: float) -> float:
    """I(x; x + n) for x uniform on [0, 1], n on [−width, width]: width − ln(2 width), or 1/(4 width) above ½; nats."""
    return 1 / (4 * width) if width > 0.5 else width - math.log(2 * width)


# --- Base distributions ------------------------------------------------------------------------------------------


def dense_covariance(dim_x: int, dim_y: int, off_diagonal: float) -> Array:
    """Every two coordinates have the same correlation."""
    total = dim_x + dim_y
    return np.full((total, total), off_diagonal) + (1 - off_diagonal) * np.eye(total)


def paired_covariance(dim_x: int, dim_y: int, pairs: int, correlation: float) -> Array:
    """x_i goes with y_i for the first `pairs` coordinates; all else is independent."""
    covariance = np.eye(dim_x + dim_y)
    for i in range(pairs):
        covariance[i, dim_x + i] = covariance[dim_x + i, i] = correlation
    return covariance


def normal(name: str, covariance: Array, dim_x: int) -> Task:
    """A centered normal, split after its first dim_x coordinates."""
    root = np.linalg.cholesky(covariance)

    def draw(n: int, rng: np.random.Generator) -> Pair:
        samples = rng.standard_normal((n, len(root))) @ root.T
        return samples[:, :dim_x], samples[:, dim_x:]

    return Task(name, dim_x, len(root) - dim_x, normal_information(covariance, dim_x), draw)


def student(name: str, covariance: Array, dim_x: int, dof: float) -> Task:
    """A centered multivariate t: a normal whose coordinates are all divided by one random scale."""
    base = normal(name, covariance, dim_x)

    def draw(n: int, rng: np.random.Generator) -> Pair:
        x, y = base.draw(n, rng)
        scale = np.sqrt(rng.chisquare(dof, size=(n, 1)) / dof)
        return x / scale, y / scale

    return replace(base, mutual_information=student_information(covariance, dim_x, dof), draw=draw)


def additive(name: str, width: float) -> Task:
    """x uniform on [0, 1], y = x + n with n uniform on [−width, width]."""

    def draw(n: int, rng: np.random.Generator) -> Pair:
        x = rng.random((n, 1))
        return x, x + rng.uniform(-width, width, (n, 1))

    return Task(name, 1, 1, additive_information(width), draw)


# --- Invertible maps ---------------------------------------------------------------------------------------------

Map = Callable[[Array], Array]


def half_cube(x: Array) -> Array:
    """x √|x|, elementwise: longer tails."""
    return x * np.sqrt(np.abs(x))


def wiggly_x(x: Array) -> Array:
    """A strictly increasing, uneven map, elementwise."""
    return x + 0.4 * np.sin(x) + 0.2 * np.sin(1.7 * x + 1) + 0.03 * np.sin(3.3 * x - 2.5)


def wiggly_y(y: Array) -> Array:
    """Another such map."""
    return y - 0.4 * np.sin(0.4 * y) + 0.17 * np.sin(1.3 * y + 3.5) + 0.02 * np.sin(4.3 * y - 2.5)


def mixture_quantile(weight: float, first: float, second: float) -> Map:
    """u in (0, 1) ↦ the quantile of weight · N(first, 1) + (1 − weight) · N(second, 1), elementwise."""

    def quantile(u: Array) -> Array:
        below = np.minimum(first, second) + ndtri(u)  # the quantile of either part bounds the mixture's
        above = np.maximum(first, second) + ndtri(u)
        for _ in range(60):  # bisection, down to the last bit
            middle = (below + above) / 2
            low = weight * ndtr(middle - first) + (1 - weight) * ndtr(middle - second) < u
            below, above = np.where(low, middle, below), np.where(low, above, middle)
        mean: Array = (below + above) / 2
        return mean

    return quantile


def swiss_roll(u: Array) -> Array:
    """(n, 1) in [0, 1] ↦ (n, 2): a spiral curve in the plane."""
    t = 1.5 * math.pi * (1 + 2 * u)
    roll: Array = np.hstack([t * np.cos(t), t * np.sin(t)]) / 21
    return roll


def spiral(first: int, second: int, speed: float) -> Map:
    """Rotates two coordinates by the angle speed · ‖x‖², the norm over all of them; it keeps volume and norm."""

    def rotate(x: Array) -> Array:
        angle = speed * (x**2).sum(axis=1)
        cos, sin = np.cos(angle), np.sin(angle)
        out = x.copy()
        out[:, first] = cos * x[:, first] - sin * x[:, second]
        out[:, second] = sin * x[:, first] + cos * x[:, second]
        return out

    return rotate


def mapped(task: Task, prefix: str, map_x: Map, map_y: Map, dim_x: int | None = None) -> Task:
    """The task of map_x(x) and map_y(y), both one-to-one: same information. dim_x, where map_x changes it."""

    def draw(n: int, rng: np.random.Generator) -> Pair:
        x, y = task.draw(n, rng)
        return map_x(x), map_y(y)

    return replace(task, name=f"{prefix}-{task.name}", dim_x=dim_x or task.dim_x, draw=draw)


# --- The benchmark -----------------------------------------------------------------------------------------------


def _identity(x: Array) -> Array:
    return x


def _dense(dimensions: int) -> Task:
    covariance = dense_covariance(dimensions, dimensions, 0.5)
    return normal(f"multinormal-dense-{dimensions}-{dimensions}-0.5", covariance, dimensions)


def _two_pair(dimensions: int, strength: float = 2.0) -> Task:
    # A latent of weight `strength` is shared by x_i and y_i, each with unit noise of its own.
    correlation = strength**2 / (1 + strength**2)
    covariance = paired_covariance(dimensions, dimensions, 2, correlation)
    return normal(f"multinormal-sparse-{dimensions}-{dimensions}-2-{strength}", covariance, dimensions)


def _student(dimensions: int, dof: int) -> Task:
    name = f"student-identity-{dimensions}-{dimensions}-{dof}"
    return student(name, np.eye(2 * dimensions), dimensions, dof)


def _spiral(task: Task) -> Task:
    # With speed 1/d a normal turns by one radian on average, in every dimension d.
    return mapped(task, "spiral", spiral(0, 1, 1 / task.dim_x), spiral(1, 2, 1 / task.dim_y))


def _all_tasks() -> list[Task]:
    pair = normal("1v1-normal-0.75", dense_covariance(1, 1, 0.75), 1)
    uniform = mapped(pair, "normal_cdf", ndtr, ndtr)
    bimodal = mapped(uniform, "", mixture_quantile(0.3, 0, 5), mixture_quantile(0.5, -1, 3))
    cauchy = _student(1, 1)
    two_pair = {dimensions: _two_pair(dimensions) for dimensions in (2, 3, 5, 25)}
    wide = [two_pair[dimensions] for dimensions in (3, 5, 25)]
    students = {(d, dof): _student(d, dof) for d, dof in ((2, 1), (2, 2), (3, 2), (3, 3), (5, 2), (5, 3))}
    return [
        pair,
        uniform,
        additive("1v1-additive-0.1", 0.1),
        additive("1v1-additive-0.75", 0.75),
        replace(bimodal, name="1v1-bimodal-0.75"),
        mapped(pair, "wiggly", wiggly_x, wiggly_y),
        mapped(pair, "half_cube", half_cube, half_cube),
        cauchy,
        mapped(cauchy, "asinh", np.arcsinh, np.arcsinh),
        mapped(uniform, "swissroll_x", swiss_roll, _identity, dim_x=2),
        *(_dense(dimensions) for dimensions in (2, 3, 5, 25, 50)),
        *two_pair.values(),
        *students.values(),
        *(mapped(task, "normal_cdf", ndtr, ndtr) for task in wide),
        *(mapped(task, "half_cube", half_cube, half_cube) for task in wide),
        *(_spiral(task) for task in wide),
        *(_spiral(mapped(task, "normal_cdf", ndtr, ndtr)) for task in wide),
        *(mapped(students[key], "asinh", np.arcsinh, np.arcsinh) for key in ((2, 1), (3, 2), (5, 2))),
    ]


TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _all_tasks()})


def get_task(name: str) -> Task:
    """The task of that name. Raises MituneError, with where to look, for any other."""
    if name not in TASKS:
        raise MituneError(f"There is no task {name!r}; the {len(TASKS)} names are the keys of mi_tasks.TASKS.")
    return TASKS[name]
