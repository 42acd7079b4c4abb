"""How fast is mitune?  Runs the benchmarks one after the other and writes docs/performance.md.

    python benchmarks/performance.py

Each part of the page is what its command has printed. Without a GPU, full_size.py runs on small networks.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

HERE = Path(__file__).parent
NAMES = ("probe_overhead", "pool_throughput", "pool_parts", "training", "memory", "scaling", "full_size")
VARIANTS = {  # further options that a benchmark runs with
    "pool_throughput": ("--candidates 16", "--no-race", "--compile"),
    "training": ("--compile",),
}
TINY = "--tiny --candidates 2 --steps 3 --batch 4 --micro-batch 2 --iterations 1"
HEADING = "\n## "
HEADER = """# Speed and memory

Made by `python benchmarks/performance.py`; each part is what the command under its heading has printed. Ratios are the
median of alternating pairs in one process, with the lowest and the highest. On a CPU, time is the processor time of one
thread, so that other work on the machine does not count; on a GPU it is wall time.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs" / "performance.md")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="The others stay as they are.")
    arguments = parser.parse_args(argv)
    page: Path = arguments.output
    _, *found = page.read_text(encoding="utf-8").split(HEADING) if page.exists() else [""]
    sections = {section.partition("\n")[0]: section.strip() for section in found}
    questions = {name: question(HERE / f"{name}.py") for name in NAMES}
    for name in arguments.only:
        first = TINY if name == "full_size" and not torch.cuda.is_available() else ""
        parts = [questions[name], *(run(name, options) for options in (first, *VARIANTS.get(name, ())))]
        sections[questions[name]] = "\n\n".join(parts)
        ordered = [sections[asked] for asked in questions.values() if asked in sections]
        page.write_text(HEADER + "".join(f"{HEADING}{section}\n" for section in ordered), encoding="utf-8")


def run(name: str, options: str) -> str:
    """The command, and what it printed."""
    command = [f"benchmarks/{name}.py", *options.split()]
    print("python", *command, flush=True)
    done = subprocess.run([sys.executable, *command], cwd=HERE.parent, check=True, stdout=subprocess.PIPE, text=True)
    return f"`python {' '.join(command)}`\n\n{done.stdout.strip()}"


def question(file: Path) -> str:
    """The first sentence of its docstring."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.partition("?")[0] + "?"


if __name__ == "__main__":
    main()
