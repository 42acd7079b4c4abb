"""mitune: aligns a text-to-image model with its prompts, by its own mutual information.

The names below read like the papers; `mitune.cli` offers the same from the command line. They are imported when they
are first used, so that `import mitune` is quick.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Config": "config.schema",
    "ModelConfig": "config.schema",
    "PoolConfig": "config.schema",
    "FinetuneConfig": "config.schema",
    "EvalConfig": "config.schema",
    "MituneError": "errors",
    "Estimate": "information",
    "SCORES": "information",
    "Trace": "information",
    "MIProbe": "denoiser.probe",
    "score": "scoring",
    "load_model": "denoiser.opening.models",
    "build_pool": "pool.build",
    "select": "pool.selection",
    "finetune": "finetuning.run",
    "tune": "tuning",
    "evaluate": "evaluation.evaluate",
    "build_report": "report.build",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mitune' has no attribute {name!r}")
    return getattr(import_module(f"mitune.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
