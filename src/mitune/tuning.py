"""A whole run: a method makes variants of a model for given prompts; then the verdict and the report.

prompts → method → variants → evaluation → report
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mitune.config.resolve import write_config
from mitune.config.schema import Config
from mitune.denoiser.opening.identity import model_identity, settings_that_matter
from mitune.denoiser.opening.models import Model, load_model
from mitune.errors import MituneError
from mitune.evaluation.evaluate import evaluate
from mitune.evaluation.metrics.base import ImageMetric
from mitune.evaluation.metrics.table import metric_for
from mitune.evaluation.variant import BASE, Variant, check_names, read_variants, write_variants
from mitune.methods.base import METHODS, Method
from mitune.prompts.lists import load_prompts
from mitune.report.build import build_report
from mitune.run.executors.base import Executor
from mitune.run.locks import LOCK, sole_worker
from mitune.run.stages import Run, Stages, silent
from mitune.run.store import SETTINGS, claim
from mitune.run.stores.base import Store
from mitune.run.stores.folder import Folder
from mitune.worlds.base import Listed

CONFIG = "config.yaml"  # of a run


@dataclass(frozen=True, slots=True)
class TuneResult:
    """Where a run left its variants, its verdict and its report."""

    run: Path
    variants: list[Variant]
    verdict: Path | None
    report: Path

    @property
    def adapters(self) -> dict[str, Path]:
        """The adapters of the variants that have one, by name: for MI-TUNE those of the last round, by selection."""
        return {variant.name: variant.adapter for variant in self.variants if variant.adapter is not None}


def claim_run(run: Path, config: Config, prompts: Sequence[str]) -> None:
    """Ties the run directory to what its variants depend on, and writes the resolved settings into it.

    The number of rounds is none of it, as a round depends on those before alone: there may be more later.

    Raises MituneError for a directory of another run.
    """
    sections = {"pool": config.pool, "finetune": config.finetune}
    settings = {name: settings_that_matter(section) for name, section in sections.items()}
    identity = {
        "model": model_identity(config.model),
        "prompts": list(prompts),
        "method": config.method,
        "round_prompts": config.round_prompts,
    }
    claim(run, identity | settings, "run")
    write_config(config, run / CONFIG)


def _require_run(run: Path) -> None:
    """Raises MituneError for a directory with anything but a run in it."""
    known = {SETTINGS, CONFIG, LOCK}
    if run.is_dir() and (names := {path.name for path in run.iterdir()}) and not names & known:
        raise MituneError(f"{run} is not empty and holds no run; choose another folder with --run.")


def tune(config: Config, run: Path, *, stages: Stages = silent) -> TuneResult:
    """Runs `config.method` in the directory `run`; the same call goes on where it stopped.

    Where the verdict fails, the report is written without it.
    Raises MituneError for bad settings or prompts before anything is made, and if another process works on the run.
    """
    method = METHODS.resolve(config.method)
    prompts = _checked_prompts(config, method)
    _require_run(run)
    with sole_worker(run):
        claim_run(run, config, [listed.text for listed in prompts])
        variants = method.prepare(config, prompts, Run(run, stages))
        check_names(variants)
        write_variants(run, variants)
        try:
            verdict = judge_run(config, run, stages=stages) if config.eval_prompts else None
        except Exception:
            build_report(run)  # what was made can be looked at all the same
            raise
        return TuneResult(run, variants, verdict, build_report(run))


def _checked_prompts(config: Config, method: Method) -> list[Listed]:
    """The prompts, once method, model and prompts are known to go together: refused now rather than hours later."""
    base = load_model(config.model)
    prompts = load_prompts(config.prompts, base, config.prompt_field)
    method.check(config, prompts, base)
    if config.eval_prompts:
        _held_out(config, base)
    return prompts


def judge_run(
    config: Config,
    run: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    executor: Executor | None = None,
    store: Callable[[Path], Store] = Folder,
    stages: Stages = silent,
) -> Path | None:
    """Judges the base, the variants of the run and `config.eval.guidance_scales`; returns the table.

    `shard`, `executor`, `store`: as in `build_pool`; None is returned while images of other shards are missing.
    Raises MituneError if no metric is named, and neither the prompts nor the model come with one.
    """
    base = load_model(config.model)
    prompts, metric = _held_out(config, base)
    variants = [Variant(name=BASE), *sorted(read_variants(run), key=lambda variant: variant.name)]
    variants += [Variant(name=f"base, guidance {s:g}", guidance_scale=s) for s in config.eval.guidance_scales]
    with Run(run).cost("evaluation") as cost:
        images = len(variants) * len(prompts) * config.eval.images
        cost |= {"candidates": images, "denoiser_calls": images * base.steps}
        return evaluate(
            config,
            prompts,
            variants,
            run / "eval",
            metric,
            shard=shard,
            executor=executor,
            store=store,
            stages=stages,
        )


def _held_out(config: Config, base: Model) -> tuple[list[Listed], ImageMetric]:
    """The prompts to judge by, and what judges. Raises MituneError if nothing does."""
    source = config.eval_prompts or config.prompts
    prompts = load_prompts(source, base, config.prompt_field)
    metric = metric_for(config.metric, source=source, model=config.model.name, prompts=[p.text for p in prompts])
    if metric is None:
        raise MituneError(
            f"Neither {config.model.name} nor {source} comes with a judge; name a metric with --metric (`mitune list "
            "metrics` shows them), or leave eval_prompts out."
        )
    return prompts, metric
