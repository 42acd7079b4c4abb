"""Whatever is wrong with a command, it ends in a sentence and a status: in this process, on tiny inputs."""

import importlib
import signal
import subprocess
import sys
import time

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from mitune.cli import app
from mitune.cli.boundary import Commands, last_word, resumable
from mitune.config.presets import PRESETS
from mitune.errors import MituneError
from mitune.pool.selection import apply, parse_rule
from mitune.run.stopping import Stopped
from tests.tiny import tiny_sd

LONG = "x" * 300


def invoke(*arguments, application=app):
    result = CliRunner().invoke(application, [str(a) for a in arguments], prog_name="mitune")
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands are given."""
    folder = tmp_path_factory.mktemp("errors")
    (folder / "one.txt").write_text("a red circle\n")
    (folder / "file").write_text("x")
    (folder / "folder").mkdir()
    (folder / "garbled.yaml").write_text("a: [1")
    (folder / "code.yaml").write_text("a: !!python/object/apply:os.system ['id']")
    Image.new("RGB", (32, 32)).save(folder / "picture.png")
    tiny_sd().save_pretrained(folder / "fp16", variant="fp16")
    return folder


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("tune --config absent.yaml", "Cannot read the settings in absent.yaml"),
        ("tune --config folder", "Cannot read the settings in folder"),
        ("tune --config garbled.yaml", "Cannot read the settings in garbled.yaml"),
        ("tune --config code.yaml", "Cannot read the settings in code.yaml"),
        ("tune --set pool.candidates=[1", "the value is no valid YAML"),
        ("tune --set model=3", "model must be a mapping"),
        ("tune --set model.name.x=3", "model.name"),
        ("pool -p one.txt --shard ²/3", "--shard '²/3' needs the form i/n"),
        ("pool -p one.txt --shard 0/2", "--shard '0/2' needs the form i/n"),
        ("pool -p one.txt --device cuda:99", "model.device = cuda:99 is no device that torch sees here"),
        ("demo -m [bold]x[/]", "There is no model '[bold]x[/]'"),
        ("demo --device nonsense", "model.device = nonsense is no device that torch sees here"),
        ("train file", "--help"),
        ("train folder", "is missing"),
        ("generate a --set model.call.heigth=33", "takes no heigth; set in model.call what it does take: height"),
        ("generate a --set model.call.guidance_scale=1", "guidance_scale = 1, which must be above 1"),
        ("generate a --set model.call.height=64", "name both"),
        ("generate a --set model.steps=2", "The score 'mi-tune' needs two steps short of pure noise"),
        ("generate a --set model.offload=model --device cpu", "model.offload = model needs a GPU"),
        ("generate a -m fp16", "set model.variant, e.g. --set model.variant=fp16"),
        ("score picture.png a -m fp16", "set model.variant, e.g. --set model.variant=fp16"),
        ("shapes check -m fp16", "set model.variant, e.g. --set model.variant=fp16"),
        ("bench truth -m fp16", "set model.variant, e.g. --set model.variant=fp16"),
        ("bench race -m shapes-sd4", "did you mean shapes-sd"),
        ("bench knows -m nobody", "There is no model 'nobody'"),
        ("bench mi --n ²,3", "--n '²,3' needs whole numbers"),
        ("bench mi --n x", "--n 'x' needs whole numbers"),
        ("eval folder", "config.yaml"),
        ("report folder", "config.yaml"),
        ("shapes prompts colour", "There is no prompt list"),
        ("shapes figure out.png -m nobody", "There is no model 'nobody'"),
        ("shapes train work -m nobody", "Unknown embedded model 'nobody'"),
        ("frobnicate", "No such command"),
    ],
)
def test_bad_input(folder, monkeypatch, line, sentence):
    monkeypatch.chdir(folder)
    status, shown = invoke(*line.split())
    assert (status, sentence in shown) == (2, True), shown


def commands(group, path=()):
    """Every command, as the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


def test_help_ends_in_an_example():
    found = list(commands(typer.main.get_command(app)))
    assert ("bench", "tune") in found and ("generate",) in found
    for words in found:
        status, shown = invoke(*words, "--help")
        example = f"mitune {' '.join(words)} "
        assert status == 0 and "Example" in shown and example in shown.partition("Example")[2], words


def test_help_says_which_models_presets_take():
    _, shown = invoke("tune", "--help")
    for name, preset in PRESETS.items():
        assert name in shown and preset.model.name in shown
    assert "hf auth login" in shown


def test_arguments_that_are_no_text():
    status, shown = invoke("generate", "a red \udcff circle")
    assert status == 2 and "is not text in UTF-8" in shown


def failing(error):
    """A command line whose commands raise."""

    def fail():
        raise error

    return running(fail)


def running(action):
    """A command line whose commands do this."""
    application = typer.Typer(cls=Commands)

    @application.callback()
    def options(debug: bool = False):
        pass

    @application.command()
    @resumable
    def pool():
        action()

    @application.command()
    def score():
        action()

    return application


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (MituneError("Bad [bold]input[/]; mend it."), 2, "Error: Bad [bold]input[/]; mend it."),
        (
            FileNotFoundError(2, "No such file or directory", "a.png"),
            2,
            "Cannot use 'a.png' (no such file or directory)",
        ),
        (PermissionError(13, "Permission denied", "a.png"), 2, "Cannot use 'a.png' (permission denied)"),
        (OSError(36, "File name too long", LONG), 2, "(the name is too long)"),
        (MemoryError(), 2, "Out of memory"),
        (Stopped(signal.SIGTERM), 143, "Stopped by SIGTERM; the same command goes on from here."),
        (Stopped(signal.SIGHUP), 129, "Stopped by SIGHUP; the same command goes on from here."),
        (KeyboardInterrupt(), 130, "Stopped by SIGINT; the same command goes on from here."),
    ],
)
def test_what_a_command_raises(error, status, sentence):
    given, shown = invoke("pool", application=failing(error))
    assert (given, sentence in shown) == (status, True), shown
    assert "Traceback" not in shown


def test_a_fault_of_mitune():
    status, shown = invoke("pool", application=running(lambda: apply(parse_rule("sharp"), {}, keep=1, seed=0)))
    assert status == 1
    assert "This looks like a fault in mitune (KeyError: 'sharp'); run the command with --debug" in shown


@pytest.mark.parametrize(
    ("line", "raised"),
    [
        ("return {}['weights']", "KeyError: 'weights'"),
        ("return torch.nn.Linear(2, 2)(torch.ones(3))", "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("return json.loads('[')", "JSONDecodeError: Expecting value"),
        ("raise OSError('no answer')", "OSError: no answer"),
    ],
)
def test_a_fault_in_a_file_of_the_users_own(tmp_path, monkeypatch, line, raised):
    """Also where a library that it calls raises."""
    file = tmp_path / "mine.py"
    file.write_text(f"import json, torch\ndef sharp():\n    {line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    sharp = importlib.import_module("mine").sharp
    monkeypatch.delitem(sys.modules, "mine")
    status, shown = invoke("pool", application=running(sharp))
    assert status == 2 and f"Error: {file}:3 raised {raised}" in shown, shown
    assert shown.endswith("; mend it there (--debug shows the traceback).") and "Traceback (" not in shown


def test_going_on_is_promised_only_where_it_is_true():
    _, shown = invoke("score", application=failing(Stopped(signal.SIGTERM)))
    assert shown == "Stopped by SIGTERM."


@pytest.mark.parametrize("line", [["--debug", "pool"], ["pool", "--debug"]])
def test_debug_shows_where(line):
    status, shown = invoke(*line, application=failing(MituneError("Bad input.")))
    assert status == 2 and "Traceback" in shown and "Bad input." in shown


def test_errors_of_libraries_are_no_fault_of_mitune():
    import pyarrow.parquet
    import safetensors.torch
    import torch
    import yaml

    calls = [
        lambda: yaml.safe_load("a: [1"),
        lambda: pyarrow.parquet.ParquetFile(__file__),
        lambda: safetensors.torch.load_file(__file__),
        lambda: torch.nn.Linear(2, 2)(torch.ones(3)),
        lambda: Image.open(__file__),
    ]
    for call in calls:
        with pytest.raises(Exception) as caught:
            call()
        libraries_alone = caught.tb.tb_next.tb_next  # type: ignore[union-attr]  # as if mitune had called them
        sentence, status = last_word(caught.value.with_traceback(libraries_alone), goes_on=False)
        assert status == 2 and "cannot go on" in sentence.plain, sentence.plain


def test_a_stop_counts_behind_what_it_led_to():
    """A terminal that is gone makes the clearing up after a signal fail as well."""
    try:
        try:
            raise Stopped(signal.SIGHUP)
        except Stopped:
            raise OSError(5, "Input/output error")  # noqa: B904
    except OSError as error:
        assert last_word(error, goes_on=True)[1] == 129


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals(tmp_path, number):
    """In a real process, while it makes candidates."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    code = "from mitune.cli import main; main()"
    options = ["pool", "-p", "prompts.txt", "-M", "9999", "--set", "pool.batch_size=64", "--no-race"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options], cwd=tmp_path, stderr=subprocess.PIPE, text=True, bufsize=0
    )
    deadline = time.monotonic() + 300
    try:
        while not (tmp_path / "runs" / "pool" / "pool" / "settings.json").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(number)
        _, shown = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, shown
    assert f"Stopped by {number.name}; the same command goes on from here." in shown
    assert "Traceback" not in shown
