"""Every setting says what it may be, and whatever else it is given is refused in one sentence that names it."""

import math
import re
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
from typer.testing import CliRunner

from mitune.cli import app
from mitune.config.ranges import Range, convert, ends_of
from mitune.config.resolve import from_mapping, resolve
from mitune.config.schema import Config, EvalConfig, FinetuneConfig, ModelConfig, PoolConfig
from mitune.errors import MituneError

SECTIONS = {"model": ModelConfig, "pool": PoolConfig, "finetune": FinetuneConfig, "eval": EvalConfig, "": Config}
SETTINGS = [
    (section, field.name, get_type_hints(cls, include_extras=True)[field.name])
    for section, cls in SECTIONS.items()
    for field in fields(cls)
    if not is_dataclass(get_type_hints(cls)[field.name])
]
NUMBERS = [(section, name, hint) for section, name, hint in SETTINGS if "Range(" in str(hint)]
CYCLE = {}
CYCLE["self"] = CYCLE
# No setting takes one of these. None and {} are left out: some do.
ODD = [
    math.nan, math.inf, -math.inf, -1, -0.5, 10**400, 1e300, [[[1]]], [None], {"a": math.nan}, {1: 2}, {"a": {1, 2}},
    CYCLE, "nan", "\0", "\ud800", b"8", object(), 1j,
]  # fmt: skip


def name_of(section, name):
    return f"{section}.{name}" if section else name


def set_to(section, name, value):
    return from_mapping({section: {name: value}} if section else {name: value})


def numbers_of(hint):
    """The number types in a type hint, each with whether it stands inside Annotated."""
    if hint in (int, float):
        return [False]
    if get_origin(hint) is Annotated:
        return [True]
    return [found for argument in get_args(hint) if argument is not Ellipsis for found in numbers_of(argument)]


def test_every_number_has_a_range():
    assert len(NUMBERS) >= 22
    for section, name, hint in SETTINGS:
        assert all(numbers_of(hint)), name_of(section, name)


@pytest.mark.parametrize(("section", "name", "hint"), SETTINGS, ids=[name_of(*found[:2]) for found in SETTINGS])
def test_odd_values_are_refused_in_a_sentence(section, name, hint):
    for value in ODD:
        if value == "nan" and "str" in str(hint):
            continue  # may be a name
        for build in (set_to, lambda section, name, value: SECTIONS[section](**{name: value})):
            with pytest.raises(MituneError) as caught:
                build(section, name, value)
            sentence = str(caught.value)
            assert sentence.startswith(name_of(section, name)), sentence
            assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 300


@pytest.mark.parametrize(("section", "name", "hint"), NUMBERS, ids=[name_of(*found[:2]) for found in NUMBERS])
def test_numbers_are_no_other_things(section, name, hint):
    for value in (True, False, "many", [], {}, [[]], "1,5"):
        if (value == [] and "..." in str(hint)) or (value is False and "'off'" in str(hint)):
            continue  # no sweep; what YAML makes of `off`
        with pytest.raises(MituneError, match=rf"^{name_of(section, name)}"):
            set_to(section, name, value)
    if NoneType not in get_args(hint):
        with pytest.raises(MituneError, match=rf"^{name_of(section, name)} = None must be"):
            set_to(section, name, None)


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("finetune.rank=0", "finetune.rank = 0 must be a whole number, at least 1 and at most 10,000,000."),
        ("finetune.rank=8.5", "finetune.rank = 8.5 must be a whole number"),
        ("finetune.learning_rate=.nan", "finetune.learning_rate = nan must be a number, at least 1e-10 and at most 1."),
        ("finetune.learning_rate=0", "finetune.learning_rate = 0 must be"),
        ("finetune.weight_decay=-1e-3", "finetune.weight_decay = '-1e-3' must be a number, at least 0 and at most 1."),
        ("finetune.clip=.inf", "finetune.clip = inf must be a number, above 0"),
        ("finetune.ema=1", "finetune.ema = 1 must be a number, above 0 and below 1."),
        ("finetune.timesteps=[0.5]", r"finetune.timesteps = \[0.5\] must be a list of 2."),
        ("finetune.timesteps=[0.9, 0.1]", "must be a range, the lower end first"),
        ("finetune.timesteps=[0, 1.5]", r"finetune.timesteps\[1\] = 1.5 must be a number"),
        ("pool.race=[[0.5, 0.5, 0.5]]", r"pool.race\[0\] = \[0.5, 0.5, 0.5\] must be a list of 2."),
        ("pool.race=[]", r"pool.race = \[\] must be a list of .*; or auto, or off."),
        ("pool.race=null", "pool.race = None must be auto, off, or a list"),
        ("pool.race=half", "pool.race = 'half' must be auto, off, or a list"),
        ("pool.select=contrast", "pool.select = 'contrast' must be a list"),
        ("pool.seed=9223372036854775808", "pool.seed = 9223372036854775808 must be"),
        ("eval.guidance_scales=[2, .nan]", r"eval.guidance_scales\[1\] = nan must be a number, above 1"),
        ("model.call=[1]", r"model.call = \[1\] must be a mapping"),
        ("model.call={at: 2020-01-01}", "model.call = .* must be a mapping of names to plain values"),
        ("model.steps=2020-13-45", "the value is no valid YAML"),
        ("pool.seed=" + "9" * 5000, "the value is no valid YAML"),
        ("model.dtype=16", "model.dtype = 16 must be one of float32, float16, bfloat16."),
        ("model.compile=1", "model.compile = 1 must be true or false."),
        ("model=shapes-sd", "model must be a mapping"),
        ("pool..keep=1", "Unknown setting 'pool.'"),
        ("=1", "Unknown setting ''"),
    ],
)
def test_refusals_on_the_command_line(assignment, sentence):
    with pytest.raises(MituneError, match=sentence) as caught:
        resolve(assignments=[assignment])
    assert len(str(caught.value)) < 6000


def test_values_of_yaml_come_out_as_their_types():
    config = resolve(assignments=["finetune.learning_rate=1e-3", "finetune.alpha=8", "pool.race=[[0.5, 0.25]]"])
    assert (config.finetune.learning_rate, config.pool.race) == (1e-3, ((0.5, 0.25),))
    assert isinstance(config.finetune.alpha, float)
    assert PoolConfig(select=["random"]).select == ("random",)


@pytest.mark.parametrize(
    ("range_", "inside", "outside"),
    [
        (Range(least=1), [1, 10**400], [0, math.inf, math.nan]),
        (Range(above=0, below=1), [1e-300, 0.999], [0, 1, math.nan]),
        (Range(most=3), [3, -(10**400)], [3.1, -math.inf]),
    ],
)
def test_a_range_has_its_ends(range_, inside, outside):
    for number in inside:
        assert convert(number, Annotated[type(number), range_], "x") == number
    assert not any(number in range_ and convert(number, Annotated[float, range_], "x") for number in outside)


@pytest.mark.parametrize("option", ["--guidance-scale", "--candidates", "--seed", "--rounds"])
def test_the_help_shows_the_range_that_is_checked(option):
    """Options without an end of their own; a number just outside is refused with the same words."""
    cls, name, outside = {
        "--guidance-scale": (ModelConfig, "guidance_scale", 1.0),
        "--candidates": (PoolConfig, "candidates", 0),
        "--seed": (PoolConfig, "seed", -1),
        "--rounds": (Config, "rounds", 1001),
    }[option]
    shown = CliRunner().invoke(app, ["tune", "--help"], env={"COLUMNS": "400", "TERM": "dumb"}).output
    line = next(line for line in shown.splitlines() if option in line)
    assert ends_of(cls, name) in line
    with pytest.raises(MituneError, match=re.escape(ends_of(cls, name))):
        cls(**{name: outside})
