"""mitune: aligns a text-to-image model with its prompts, by its own mutual information.

The names below read like the papers; `mitune.cli` offers the same from the command line. They are imported when they
are first used, so that `import mitune` is quick.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Config": "config",
    "ModelConfig": "config",
    "PoolConfig": "config",
    "FinetuneConfig": "config",
    "EvalConfig": "config",
    "MituneError": "errors",
    "Estimate": "information",
    "SCORES": "information",
    "Trace": "information",
    "MIProbe": "probe",
    "score": "scoring",
    "load_model": "models",
    "build_pool": "pool",
    "select": "selection",
    "finetune": "finetuning",
    "tune": "tuning",
    "evaluate": "evaluation",
    "build_report": "report.build",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mitune' has no attribute {name!r}")
    return getattr(import_module(f"mitune.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
