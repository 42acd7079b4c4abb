"""Text files of the user's, line by line, with all that is wrong in one reported at once."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from mitune.errors import MituneError

SHOWN = 10  # faults in one error
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(slots=True)
class Faults:
    """What is wrong with a file or a list, by line or entry; the first fault of each is reported."""

    source: str
    separator: str = ":"  # between the source and the number
    by_number: dict[int, str] = field(default_factory=dict)

    def add(self, number: int, what: str) -> None:
        self.by_number.setdefault(number, what)

    def refuse(self) -> None:
        """Raises MituneError if there are any."""
        if not self.by_number:
            return
        messages = [f"{self.source}{self.separator}{n}: {what}" for n, what in sorted(self.by_number.items())[:SHOWN]]
        more = len(self.by_number) - len(messages)
        raise MituneError("; ".join(messages) + (f"; and {more} more." if more else "."))


def read_lines(file: Path) -> tuple[list[str], Faults]:
    r"""The lines of a text file, which end at \n, \r\n or \r alone, and those that are not UTF-8 as faults.

    Blank lines at the end are left out. Raises MituneError for a file that cannot be read or is in UTF-16.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise MituneError(f"{file} cannot be read ({error.strerror}); give a text file.") from error
    if content.startswith(_UTF_16):
        raise MituneError(f"{file} is in UTF-16; save it in UTF-8 encoding.")
    faults, lines = Faults(str(file)), []
    for number, line in enumerate(re.split(rb"\r\n|\n|\r", content.removeprefix(b"\xef\xbb\xbf")), start=1):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError:
            faults.add(number, "not UTF-8; save the file in UTF-8 encoding")
            lines.append(line.decode("utf-8", errors="replace"))
    while lines and not lines[-1].strip():
        lines.pop()
    return lines, faults
