"""What does fine-tuning on each score's picks gain?  Both embedded models, against an exact judge.

    python benchmarks/results.py            # both models, then docs/results.md

Each model makes one pool (336 prompts × 50 candidates). From it four sets are selected, by the paper's score, by
on-line self-confidence, at random, and by the judge itself; an adapter is fine-tuned on each and judged on held-out
prompts, with the same seeds as the base. The runs land in runs/results-*, and the same command goes on with them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow.parquet as pq

from mitune.metrics.statistics import POOLED, markdown_table, summarize
from mitune.report.build import headline
from mitune.settings import resolve
from mitune.tuning import tune

HEADER = """# Results on the embedded models

Made by `python benchmarks/results.py`, which `--models` keeps to the models named here. Settings: the preset
`shapes-study` (`mitune tune --preset shapes-study`), whose run folders hold every setting, score and picture.

*exact*: share of images that the judge finds exactly right. *graded*: share of the prompt's parts that are met.
All intervals are 95 % bootstrap intervals over prompts; differences are paired by prompt and seed.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["shapes-sd", "shapes-sd3"])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--output", type=Path, default=Path("docs/results.md"))
    arguments = parser.parse_args()
    sections = [HEADER]
    for name in arguments.models:
        run = arguments.runs / f"results-{name}"
        result = tune(resolve(preset="shapes-study", options={"model": {"name": name}}), run)
        comparisons = summarize(pq.read_table(result.verdict))
        shown = [c for c in comparisons if POOLED in (c.split, c.category)]  # seen and unseen apart: only in all
        sections.append(f"## {name}\n\n{headline(run)}\n\n{markdown_table(shown)}")
    arguments.output.write_text("\n".join(sections), encoding="utf-8")


if __name__ == "__main__":
    main()
