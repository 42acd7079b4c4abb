"""A run's settings from a preset, a YAML file and the command line, in this order; and back into a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from mitune.config.presets import PRESET_TABLE
from mitune.config.schema import Config
from mitune.errors import MituneError, did_you_mean

Nested = dict[str, Any]


def resolve(
    *,
    preset: str | None = None,
    file: Path | None = None,
    assignments: Sequence[str] = (),
    options: Nested | None = None,
    defaults: Nested | None = None,
) -> Config:
    """The settings of a run: defaults, then a preset, a YAML file, `key=value` assignments, and options; the last wins.

    preset: a name of `mitune.config.presets`, or `module:attribute` of a `Config` of one's own. defaults: in place of
    those of `Config`.

    Raises MituneError that names the preset, the file or the key at fault.
    """
    merged: Nested = _merge({}, defaults or {})
    if preset is not None:
        merged = _merge(merged, as_mapping(PRESET_TABLE.resolve(preset)))
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

    text = yaml.safe_dump(as_mapping(config), sort_keys=False, allow_unicode=True)
    write_bytes(file, text.encode())


def as_mapping(config: Config) -> Nested:
    """The settings as nested dictionaries and lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value

    mapping: Nested = plain(asdict(config))
    return mapping


def differences(config: Config) -> dict[str, Any]:
    """The settings other than the defaults, by dotted name."""
    return dict(_differences(as_mapping(config), as_mapping(Config())))


def _differences(settings: Nested, defaults: Nested, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict):
            yield from _differences(value, default, f"{prefix}{name}.")
        elif value != default:
            yield f"{prefix}{name}", value


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
            known = [field.name for field in fields(cls)]
            raise MituneError(f"Unknown setting {name!r}{did_you_mean(key, known)}; known here: {', '.join(known)}.")
        if is_dataclass(hints[key]):
            values[key] = _build(hints[key], value, name)
    return cls(**values)


def _merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> Nested:
    merged = dict(base)
    for key, value in update.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged
