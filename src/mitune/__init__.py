"""mitune: aligns a text-to-image model with its prompts, by its own mutual information.

The names below read like the papers; `mitune.cli` offers the same from the command line. They are imported when they
are first used, so that `import mitune` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {
    "Config": "config.schema",
    "EmbeddedModel": "worlds.base",
    "Estimate": "information",
    "EvalConfig": "config.schema",
    "FinetuneConfig": "config.schema",
    "ImageMetric": "evaluation.metrics.base",
    "Judgment": "evaluation.metrics.base",
    "Listed": "worlds.base",
    "MIProbe": "denoiser.probe",
    "MituneError": "errors",
    "ModelConfig": "config.schema",
    "Negative": "worlds.base",
    "PoolConfig": "config.schema",
    "SCORES": "information",
    "Trace": "information",
    "World": "worlds.base",
    "build_pool": "pool.build",
    "build_report": "report.build",
    "evaluate": "evaluation.evaluate",
    "finetune": "finetuning.run",
    "load_model": "denoiser.opening.models",
    "merge_adapters": "finetuning.merging",
    "score": "scoring",
    "select": "pool.selection",
    "tune": "tuning",
}
__all__ = list(_HOME)

if TYPE_CHECKING:
    from mitune.config.schema import Config as Config
    from mitune.config.schema import EvalConfig as EvalConfig
    from mitune.config.schema import FinetuneConfig as FinetuneConfig
    from mitune.config.schema import ModelConfig as ModelConfig
    from mitune.config.schema import PoolConfig as PoolConfig
    from mitune.denoiser.opening.models import load_model as load_model
    from mitune.denoiser.probe import MIProbe as MIProbe
    from mitune.errors import MituneError as MituneError
    from mitune.evaluation.evaluate import evaluate as evaluate
    from mitune.evaluation.metrics.base import ImageMetric as ImageMetric
    from mitune.evaluation.metrics.base import Judgment as Judgment
    from mitune.finetuning.merging import merge_adapters as merge_adapters
    from mitune.finetuning.run import finetune as finetune
    from mitune.information import SCORES as SCORES
    from mitune.information import Estimate as Estimate
    from mitune.information import Trace as Trace
    from mitune.pool.build import build_pool as build_pool
    from mitune.pool.selection import select as select
    from mitune.report.build import build_report as build_report
    from mitune.scoring import score as score
    from mitune.tuning import tune as tune
    from mitune.worlds.base import EmbeddedModel as EmbeddedModel
    from mitune.worlds.base import Listed as Listed
    from mitune.worlds.base import Negative as Negative
    from mitune.worlds.base import World as World
else:

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module 'mitune' has no attribute {name!r}")
        return getattr(import_module(f"mitune.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
