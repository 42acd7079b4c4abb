"""Where the command line ends: whatever a command raises is one sentence and an exit status; --debug shows the rest."""

from __future__ import annotations

import contextlib
import errno
import traceback
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from rich.text import Text
from typer import Exit
from typer.core import TyperGroup

from mitune.cli.options import console
from mitune.errors import MituneError, first_line, place_in_own_file, raised_in
from mitune.run.stopping import Stopped, signals_raised

P = ParamSpec("P")
R = TypeVar("R")
_GOES_ON = "goes_on"  # an attribute of commands
PACKAGES = {
    "mitune", "accelerate", "diffusers", "huggingface_hub", "matplotlib", "peft", "PIL", "pyarrow", "safetensors",
    "tokenizers", "torch", "transformers", "yaml",
}  # fmt: skip


def resumable(command: Callable[P, R]) -> Callable[P, R]:
    """Marks a command that goes on where it was stopped, when it is given again."""
    setattr(command, _GOES_ON, True)
    return command


class Commands(TyperGroup):
    """A group of commands that let no traceback out. Usage errors stay typer's own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Takes --debug, an option of the whole, anywhere in the line; whoever needs it adds it to the end."""
        if ctx.parent is None:
            for argument in args:
                if not argument.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in argument):
                    ctx.fail(f"The argument {ascii(argument)} is not text in UTF-8.")
            end = args.index("--") if "--" in args else len(args)
            if "--debug" in args[:end]:
                args = ["--debug", *(argument for argument in args[:end] if argument != "--debug"), *args[end:]]
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed

    def invoke(self, ctx: Any) -> Any:
        try:
            with signals_raised():
                return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            if hasattr(error, "exit_code") or isinstance(error, BrokenPipeError):  # typer's own, and `| head`
                raise
            if ctx.find_root().params.get("debug"):
                traceback.print_exception(error)
            command = self.commands.get(ctx.invoked_subcommand or "")
            goes_on = getattr(command and command.callback, _GOES_ON, False)
            sentence, status = last_word(error, goes_on=goes_on)
            with contextlib.suppress(OSError):  # the terminal may be gone
                console.print(sentence, soft_wrap=True)
            raise Exit(status) from None


def last_word(error: BaseException, *, goes_on: bool) -> tuple[Text, int]:
    """What is said of an exception, and the exit status: 2 where the user can act on it, 1 for a fault of mitune."""
    stop = _stop_behind(error)
    if stop is not None:
        name, status = (str(stop), stop.status) if isinstance(stop, Stopped) else ("SIGINT", 130)
        return Text(f"Stopped by {name}{'; the same command goes on from here' if goes_on else ''}."), status
    if isinstance(error, MituneError):
        return _error(str(error)), 2
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return _error("Out of memory; set model.dtype=bfloat16 or model.offload=model, or smaller batches."), 2
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return _error(f"Cannot use {error.filename!r} ({_reason(error)}); give another path, or mend this one."), 2
    cause = f"{type(error).__name__}: {first_line(error)}"
    if place := place_in_own_file(error):
        return _error(f"{place} raised {cause}; mend it there (--debug shows the traceback)."), 2
    package = raised_in(error, PACKAGES)
    if package != "mitune" or isinstance(error, OSError):
        return _error(f"{package} cannot go on ({cause}); --debug shows where."), 2
    return _error(
        f"This looks like a fault in mitune ({cause}); run the command with --debug and report what it shows."
    ), 1


def _error(sentence: str) -> Text:
    return Text.assemble(("Error: ", "bold red"), sentence)


def _reason(error: OSError) -> str:
    if error.errno == errno.ENAMETOOLONG:
        return "the name is too long"
    return (error.strerror or type(error).__name__).lower()


def _stop_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """The signal that an exception came of: a terminal that is gone makes the clearing up fail as well."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error
