"""The support table of the docs, from what the tests of the families and of the schedulers gave."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.families import CASES

# A column of the table and the tests that stand behind it.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "scores while it samples": ("test_scoring",),
    "scores given latents": ("test_scoring_afterwards",),
    "dropped candidates": ("test_pruning",),
    "pictures ↔ latents": ("test_pictures_and_latents",),
    "in float16": ("test_pictures_and_latents_in_half_precision",),
    "pool and training": ("test_training",),
    "adapter": ("test_adapter",),
}
COMMAND = "python -m pytest tests/test_families.py tests/test_path.py --support-table docs/support.md"


def table_of_families(outcomes: Mapping[tuple[str, str], str]) -> list[str]:
    """Rows of Markdown. outcomes: passed, failed or skipped, by test function and family."""
    lines = ["| family | pipeline | scheduler | " + " | ".join(COLUMNS) + " |", "|---" * (3 + len(COLUMNS)) + "|"]
    for family, case in CASES.items():
        pipe = case.make()
        cells = [family, f"`{type(pipe).__name__}`", f"`{type(pipe.scheduler).__name__}`"]
        for column, tests in COLUMNS.items():
            found = {outcomes.get((test, family)) for test in tests}
            if found == {None}:
                cells.append("–" if case.makes != "pictures" else "not run")
            elif found != {"passed"}:
                cells.append("**no**")
            elif column == "adapter":
                cells.append("`load_lora_weights`" if hasattr(pipe, "load_lora_weights") else "PEFT")
            else:
                cells.append("yes")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table_of_schedulers(outcomes: Mapping[tuple[str, str], str], refused: Sequence[str]) -> list[str]:
    """Rows of Markdown: every scheduler of diffusers that could be made, with the options that were tried."""
    tried: dict[str, dict[str, list[str]]] = defaultdict(lambda: {"right": [], "refused": [], "wrong": []})
    for (test, name), outcome in outcomes.items():
        if test != "test_every_scheduler" or outcome == "skipped":
            continue
        kind, _, options = name.partition(", ")
        verdict = "refused" if name in refused else {"passed": "right"}.get(outcome, "wrong")
        tried[kind][verdict].append(options or "as it comes")
    lines = ["| scheduler | λ is right | refused |", "|---|---|---|"]
    for kind, verdicts in sorted(tried.items()):
        if verdicts["refused"] and not verdicts["right"]:
            verdicts["refused"] = ["always"]
        cells = ["; ".join(verdicts[verdict]) or "–" for verdict in ("right", "refused")]
        wrong = f" **wrong: {', '.join(verdicts['wrong'])}**" if verdicts["wrong"] else ""
        lines.append(f"| `{kind}` | {cells[0]}{wrong} | {cells[1]} |")
    return lines


def write(file: Path, outcomes: Mapping[tuple[str, str], str], refused: Sequence[str], versions: str) -> None:
    """Writes the page. versions: of the libraries that the tests ran with."""
    text = [
        "# Which models and schedulers work",
        "",
        f"Written by `{COMMAND}`, with {versions}. Nothing here is said by hand: a cell is what a test gave.",
        "",
        "The tests build each pipeline's real classes with small random weights, offline. So they say that mitune",
        "reads such a model rightly, and not how well it does with published weights.",
        "",
        "## Families",
        "",
        *table_of_families(outcomes),
        "",
        "- *scores while it samples*: the scores are those of sums made by hand from the network's outputs, and these,",
        "  put together, are what the scheduler got.",
        "- *scores given latents*: the network, called alone, repeats what it said in the pipeline.",
        "- *dropped candidates*: those that stay come out the same, bit for bit, where the network computes row by",
        "  row; in batches of another size its sums round otherwise.",
        "- *pictures ↔ latents*: latents become the pipeline's own pictures, bit for bit, and what its decoder is",
        "  handed becomes the latents again; *in float16* likewise.",
        "- *pool and training*: from prompts to an adapter, which lowers the loss on the batch it was trained on.",
        "- *adapter*: how it is loaded. `PEFT`: diffusers has no adapters for this pipeline, so the folder is one for",
        "  `PeftModel.from_pretrained(pipe.transformer, folder)`.",
        "- –: not a matter of pictures, so not tried.",
        "",
        "Models whose guidance is built in (FLUX.1-dev, Turbo, Lightning) make no pass without the prompt. FLUX and",
        "Qwen-Image make one if `true_cfg_scale` is above 1 and there is a negative prompt: `model.guidance_scale`",
        "sets the one, and mitune gives a blank for the other. The rest are refused with an error that says so.",
        "",
        "A family that is not listed works if it calls its network as Stable Diffusion does; one line in the table of",
        "`src/mitune/denoiser/network.py` says what is different. At the first step of each call, what the pipeline",
        "hands its scheduler is compared with what is scored: latents, time, sign, and the order of the two outputs. A",
        "model that is used in another way is refused, rather than scored wrongly.",
        "",
        "## Schedulers",
        "",
        "*right*: with an exact network of data that are one point, the sampler stays on z = α z₀ + σ ε at the λ that",
        "mitune names, to 0.0005. DDIM, PNDM and CogVideoX's go 1000 // steps timesteps down, whatever the next of",
        "their list is. With `linspace`, or with `trailing` and a number of steps that does not divide 1000, they take",
        "latents for those of another timestep than they made them for, and tell the network that. mitune warns of it,",
        "names the λ for which the step before made the latents, and reads the output as the scheduler does. There,",
        "*right* is said of each step alone: what it mistakes adds up along the run, by the data more or less, so that",
        "no λ of the path is quite that of the latents.",
        "",
        *table_of_schedulers(outcomes, refused),
        "",
    ]
    file.write_text("\n".join(text), encoding="utf-8")
