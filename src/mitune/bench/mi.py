"""Is the number right? Estimators of mutual information on tasks with known truth: the runs, the table, the plot."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mitune.bench.mi_tasks import TASKS, Task, get_task
from mitune.errors import MituneError
from mitune.estimators.table import ESTIMATORS, get_estimator
from mitune.evaluation.tables import DASH, number, plus_minus, table
from mitune.report.style import INK, on_paper, png, sheet
from mitune.run.store import write_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One estimator on one sample of one task; in nats and seconds."""

    task: str
    estimator: str
    samples: int
    seed: int
    truth: float
    value: float
    standard_error: float
    seconds: float  # of fit and estimate, on the wall

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.task, self.estimator, self.samples, self.seed


def run_benchmark(
    tasks: Sequence[str],
    estimators: Sequence[str],
    sizes: Sequence[int],
    *,
    seeds: int,
    file: Path,
    progress: Callable[[int, int], None],
) -> list[Result]:
    """Fits every estimator on every sample and adds its result to `file`, a Parquet table, at once.

    What the file already holds is not made again. Returns all results that it then holds. The samples of a seed are
    the same for all estimators. Raises MituneError for unknown names.
    """
    for name in tasks:
        get_task(name)
    for name in estimators:
        get_estimator(name)
    known = {result.key: result for result in read_results(file)}
    # Seeds last and sizes in the middle: a run that is stopped has whole columns of the table.
    wanted = [
        (task, estimator, size, seed) for seed, estimator, size, task in product(range(seeds), estimators, sizes, tasks)
    ]
    for done, key in enumerate(wanted):
        progress(done, len(wanted))
        if key not in known:
            known[key] = measure(get_task(key[0]), *key[1:])
            write_table(file, pa.Table.from_pylist([asdict(result) for result in known.values()]))
    progress(len(wanted), len(wanted))
    return list(known.values())


def measure(task: Task, estimator: str, samples: int, seed: int) -> Result:
    """Samples the task, fits the estimator and reads it on the same samples."""
    x, y = task.sample(samples, seed)
    start = time.perf_counter()
    estimate = get_estimator(estimator, seed).fit(x, y).estimate(x, y)
    return Result(
        task=task.name,
        estimator=estimator,
        samples=samples,
        seed=seed,
        truth=task.mutual_information,
        value=estimate.value,
        standard_error=estimate.standard_error,
        seconds=time.perf_counter() - start,
    )


def read_results(file: Path) -> list[Result]:
    """All results in a file, none where there is no file. Raises MituneError for a table of another kind."""
    if not file.exists():
        return []
    try:
        return [Result(**row) for row in pq.read_table(file).to_pylist()]
    except (OSError, TypeError, pa.ArrowException) as error:
        raise MituneError(f"{file} holds no results of this benchmark; name another file.") from error


# --- The table ---------------------------------------------------------------------------------------------------

GROUPS: Mapping[str, Callable[[Task], bool]] = {
    "all": lambda task: task.name in TASKS,
    "wide (25, 50)": lambda task: max(task.dim_x, task.dim_y) >= 25,
    "spirals": lambda task: task.name.startswith("spiral"),
    "Student-t": lambda task: "student" in task.name,
    "Student-t, dof 1": lambda task: "student" in task.name and task.name.endswith("-1"),
}


EXPLANATION = """\
Over tasks × seeds, whose number stands beside it. *worst*: the largest error. *seconds*: median of fit and
estimate together."""


def mean_absolute_error(results: Sequence[Result]) -> float:
    """In nats; a seed of a task counts as one. Infinite where an estimate is not finite."""
    errors = [abs(result.value - result.truth) for result in results]
    return sum(error if math.isfinite(error) else math.inf for error in errors) / len(errors)


def markdown(results: Sequence[Result]) -> str:
    """Mean absolute errors by estimator, size and group of tasks; then each task's estimates."""
    present = {result.estimator for result in results}
    estimators = [name for name in ESTIMATORS if name in present]
    sizes = sorted({result.samples for result in results})
    lines = []
    for estimator, size in product(estimators, sizes):
        rows = [result for result in results if (result.estimator, result.samples) == (estimator, size)]
        if rows:
            lines.append([estimator, f"{size:,}", *_group_cells(rows), *_worst(rows)])
    errors = table(["estimator", "samples", *GROUPS, "worst", "seconds"], lines)
    sections = [f"## Mean absolute error, nats\n\n{EXPLANATION}\n\n{errors}"]
    for size in sizes:
        estimates = _per_task([result for result in results if result.samples == size], estimators)
        sections.append(f"## Estimates from {size:,} samples, nats\n\n{estimates}")
    return "\n".join(sections)


def _group_cells(rows: Sequence[Result]) -> list[str]:
    groups = [[row for row in rows if member(get_task(row.task))] for member in GROUPS.values()]
    return [f"{number(mean_absolute_error(group))} ({len(group)})" if group else DASH for group in groups]


def _worst(rows: Sequence[Result]) -> list[str]:
    worst = max(rows, key=lambda row: abs(row.value - row.truth))
    seconds = statistics.median(row.seconds for row in rows)
    return [f"{number(worst.value - worst.truth, sign=True)} {worst.task}", number(seconds, 1)]


def _per_task(rows: Sequence[Result], estimators: Sequence[str]) -> str:
    """Value ± standard error of the first seed."""
    present = [name for name in estimators if any(row.estimator == name for row in rows)]
    first = min(row.seed for row in rows)
    cells = {
        (row.task, row.estimator): plus_minus(row.value, row.standard_error, 3) for row in rows if row.seed == first
    }
    lines = [
        [
            name,
            number(get_task(name).mutual_information),
            *(cells.get((name, estimator), DASH) for estimator in present),
        ]
        for name in _tasks_of(rows)
    ]
    return table(["task", "truth", *present], lines)


def _tasks_of(rows: Sequence[Result]) -> list[str]:
    present = {row.task for row in rows}
    return [name for name in TASKS if name in present]


# --- The plot ----------------------------------------------------------------------------------------------------


def figure(results: Sequence[Result], estimators: Sequence[str]) -> bytes:
    """PNG: estimate ± standard error of these estimators beside each task's truth, a panel for every sample size."""
    with on_paper():
        sizes = sorted({result.samples for result in results})
        tasks = _tasks_of(results)
        drawing = sheet(3 + 3.4 * len(sizes), 1.2 + 0.24 * len(tasks))
        panels = drawing.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
        for panel, size in zip(panels, sizes, strict=True):
            for row, name in enumerate(tasks):
                truth = get_task(name).mutual_information
                panel.plot([truth, truth], [row - 0.4, row + 0.4], color=INK, linewidth=2, zorder=1)
            for index, estimator in enumerate(estimators):
                points = [
                    r for r in results if (r.estimator, r.samples) == (estimator, size) and math.isfinite(r.value)
                ]
                offset = 0.5 * ((index + 0.5) / len(estimators) - 0.5)
                panel.errorbar(
                    [r.value for r in points],
                    [tasks.index(r.task) + offset for r in points],
                    xerr=[r.standard_error for r in points],
                    fmt="o",
                    markersize=3.5,
                    linewidth=1,
                    label=estimator,
                )
            panel.set_title(f"{size:,} samples")
            panel.set_xlabel("mutual information, nats (bar: truth)")
            panel.set_xlim(left=-0.1)
            panel.grid(axis="x")
            panel.tick_params(labelsize=7)
        panels[0].set_yticks(range(len(tasks)), tasks)
        panels[0].set_ylim(len(tasks) - 0.5, -0.5)
        panels[-1].legend(loc="lower right")
        return png(drawing)
