"""Every command line that README, docs and help show can be given as it stands there."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from mitune.cli import app
from tests.test_cli_errors import commands

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = re.compile(r"^ {4}(mitune .+?)(?:  +#.*)?$", re.MULTILINE)
MADE_BY = re.compile(r"[Mm]ade by `(mitune [^`]+)`")
EXAMPLE = re.compile(r"Example: +(mitune .+?)$", re.MULTILINE)


def lines() -> list[str]:
    texts = [page.read_text("utf-8") for page in PAGES]
    found = [line for text in texts for pattern in (SHOWN, MADE_BY) for line in pattern.findall(text)]
    group = typer.main.get_command(app)
    for words in commands(group):
        command = group
        for word in words:
            command = command.commands[word]
        found += EXAMPLE.findall(command.help or "")
    return sorted(set(found))


def test_there_are_such_lines():
    assert len(lines()) > 30


@pytest.mark.parametrize("line", lines())
def test_line_can_be_given(line):
    words = shlex.split(line)[1:]
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    try:
        command.make_context(command.name, words)
    except typer.BadParameter as error:  # as of a file that only the reader has
        assert "does not exist" in error.message
