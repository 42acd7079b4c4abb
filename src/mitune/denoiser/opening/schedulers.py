"""Which scheduler a model is used with: by the settings, by what a single file says of itself, by its pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import SchedulerMixin
from safetensors import SafetensorError, safe_open

from mitune.config.schema import ModelConfig
from mitune.denoiser.path import path_of
from mitune.denoiser.pipeline import Scheduler
from mitune.errors import ModelError, did_you_mean, first_line

_VELOCITY = {"prediction_type": "v_prediction"}
# Without trailing steps, sampling would not begin at the pure noise that such a model knows.
_ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
# As ComfyUI, A1111 and InvokeAI mark a file, with an empty tensor of that name.
_KEYS: Mapping[str, Mapping[str, Any]] = {"v_pred": _VELOCITY, "ztsnr": _ZERO_SNR}
# As kohya's trainers and the model spec of Stability AI do, in the header.
_HEADER: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("modelspec.prediction_type", "v"): _VELOCITY,
    ("modelspec.prediction_type", "v_prediction"): _VELOCITY,
    ("ss_v_parameterization", "true"): _VELOCITY,
    ("ss_zero_terminal_snr", "true"): _ZERO_SNR,
}
_UNKNOWN = "edm_vpred.sigma_max"


def scheduler_for(config: ModelConfig, shipped: Scheduler) -> Scheduler:
    """The scheduler that a model is to be used with, in place of the one that it was `shipped` with.

    `model.scheduler` goes before what a single file says of itself, and that before the pipeline's configuration.
    Raises ModelError for a name or option that the installed diffusers does not have, and where a file asks for what
    its scheduler cannot do; MituneError for a scheduler without a known noise path.
    """
    options = dict(config.scheduler)
    kind = _kind(options.pop("name", None), type(shipped))
    accepted = [name for name in inspect.signature(kind.__init__).parameters if name not in ("self", "kwargs")]
    for option in options:
        if option not in accepted:
            raise ModelError(
                f"model.scheduler.{option} is no option of {kind.__name__}{did_you_mean(option, accepted)}; it has "
                f"{', '.join(accepted)}."
            )
    of_file = options_of_file(config.name) if config.is_single_file and "://" not in config.name else {}
    for option, value in of_file.items():
        if option not in accepted and option not in options and shipped.config.get(option) != value:
            raise ModelError(
                f"{config.name} says that it needs {option} = {value}, which {kind.__name__} does not have; set "
                "model.scheduler.name to one that has it, such as DDIMScheduler or EulerDiscreteScheduler."
            )
    overrides = of_file | options
    if kind is type(shipped) and all(shipped.config.get(name) == value for name, value in overrides.items()):
        return shipped
    try:
        scheduler: Scheduler = kind.from_config(shipped.config, **overrides)
        if not scheduler.config.get("use_dynamic_shifting"):
            kind.from_config(scheduler.config).set_timesteps(10)  # says whether the values are ones that it knows
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise ModelError(
            f"model.scheduler = {dict(config.scheduler)} makes no {kind.__name__} ({first_line(error)}); see its "
            "options in the documentation of diffusers."
        ) from error
    path_of(scheduler)
    return scheduler


def options_of_file(file: str) -> dict[str, Any]:
    """The options of the scheduler that the model in a .safetensors file was trained for, by its header and keys.

    Raises ModelError if it cannot be read, or asks for a scheduler that mitune does not know.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            keys, header = set(opened.keys()), opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"Cannot read {file} as a .safetensors file ({first_line(error)}); give the path of a whole one."
        ) from error
    if _UNKNOWN in keys:
        raise ModelError(f"{file} says that it was trained for EDM's noise levels, which mitune does not know.")
    settings: dict[str, Any] = {}
    for key, options in _KEYS.items():
        if key in keys:
            settings |= options
    for (name, value), options in _HEADER.items():
        if str(header.get(name, "")).lower() == value:
            settings |= options
    return settings


def _kind(name: str | None, shipped: type[Any]) -> type[Any]:
    if name is None:
        return shipped
    known = [each for each in dir(diffusers) if each.endswith("Scheduler")]
    kind = getattr(diffusers, name, None) if name in known else None
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        missing = " that can be used here (a package that it needs is not installed)" if kind is not None else ""
        raise ModelError(
            f"model.scheduler.name = {name} is no scheduler of diffusers{missing}{did_you_mean(str(name), known)}; "
            "give the name of a class, such as DDIMScheduler."
        )
    return kind
