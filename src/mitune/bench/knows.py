"""Can selection pay? What a model knows of its prompts, beside what it shows.

Selection can only use what a model knows beyond what it shows. It *knows* an image's prompt if that has a lower
denoising error than each of the prompt's hard negatives, with shared noise; it *shows* a prompt by samples that are
right. Selection pays where samples are often wrong, and the model recognizes as wrong what it got wrong itself. Both
need a judge; without one, only the share of own samples whose prompt wins can be told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mitune.config.schema import ModelConfig
from mitune.denoiser.opening.identity import model_identity
from mitune.denoiser.opening.models import Model, load_model
from mitune.denoiser.pictures import decode
from mitune.denoiser.sampling import Request, candidate_seed, generate_all
from mitune.errors import MituneError
from mitune.evaluation.metrics.base import ImageMetric
from mitune.evaluation.statistics import POOLED, Interval, kendall_tau, summarize
from mitune.pool.evidence import told_apart
from mitune.run.locks import sole_worker
from mitune.run.store import DAMAGED, claim, write_json
from mitune.worlds.base import Listed, Negative
from mitune.worlds.shapes.check import Share, knows

Progress = Callable[[int, int], None]
HEADER = """# Can selection pay?

Made by `{command}`.

A model *knows* an image's prompt if that has a lower denoising error than each of the prompt's hard negatives.
Shares, with 95 % intervals (Wilson):

- **rendered**: of rendered scenes, those whose prompt wins; does not hang on guidance.
- **shows**: own samples that are exactly right.
- **own right**: of these, those whose prompt wins.
- **own wrong recognized**: of the other samples, those whose prompt does *not* win.

Selection pays where *shows* is low and *own wrong recognized* is high: there is something to gain, and the model can
tell.

"""
PREDICTION = """
## Was it so?

*Promised*: the share of its own samples that a model gets wrong and recognizes as such. *Gained*, by fine-tuning on
what `{selection}` picked: exactly right, over the base, on held-out prompts (`mitune bench tune`), with 95 % intervals.
Kendall's τ between the two, over {rows} rows: {tau:.2f}.

"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """The shares of one category, model and guidance scale; None where there is no judge, or nothing rendered.

    Samples whose prompt has no hard negative count in `shows` alone.
    """

    model: str
    category: str
    guidance_scale: float
    rendered: Share | None  # rendered scenes whose prompt wins: does not hang on guidance
    shows: Share | None  # own samples that are exactly right
    right: Share | None  # of these: the prompt wins
    wrong: Share | None  # of the others: it does not, so the model recognizes its mistake
    wins: Share  # all own samples whose prompt wins

    @property
    def key(self) -> tuple[str, str, float]:
        return self.model, self.category, self.guidance_scale


def knowledge(
    models: Sequence[ModelConfig],
    prompts: Sequence[Listed],
    folder: Path,
    *,
    negatives: Callable[[str], Sequence[Negative]],
    metric: ImageMetric | None,
    scenes: int,
    images: int,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> list[Knowledge]:
    """The shares by category for each of the models, given with their guidance scales.

    `scenes` rendered scenes a category, 0 where prompts are not of the shapes world; `images` samples a prompt. What
    `folder` holds already is not made again. Raises MituneError for a folder of other settings, of another process, or
    a damaged one.
    """
    rivals = {listed.text: [negative.prompt for negative in negatives(listed.text)] for listed in prompts}
    with sole_worker(folder):
        claim(folder, {"negatives": rivals, "scenes": scenes, "images": images, "seed": seed}, "study")
        file = folder / "knowledge.json"
        known = {found.key: found for found in _read(file)}
        categories = list(dict.fromkeys(listed.category for listed in prompts))
        found: list[Knowledge] = []
        for settings in models:
            model = load_model(settings)
            part = folder / f"{Path(settings.name).name}-{model.guidance_scale:g}"
            claim(part, model_identity(settings), "study")
            for category in categories:
                if progress:
                    progress(len(found), len(models) * len(categories))
                key = (settings.name, category, model.guidance_scale)
                if key not in known:
                    texts = [listed.text for listed in prompts if listed.category == category]
                    won, exact = _samples(model, texts, rivals, metric, images, seed, batch_size)
                    pairs = [(win, right) for win, right in zip(won, exact, strict=True) if win is not None]
                    own_right, own_wrong = ([win for win, right in pairs if right is asked] for asked in (True, False))
                    rendered = next((k.rendered for k in known.values() if k.key[:2] == key[:2]), None)
                    if scenes and rendered is None:
                        rendered, _ = knows(model, category, scenes=scenes, seed=seed, batch_size=batch_size)
                    known[key] = Knowledge(
                        model=settings.name,
                        category=category,
                        guidance_scale=model.guidance_scale,
                        rendered=rendered,
                        shows=Share(hits=sum(map(bool, exact)), trials=len(exact)) if metric else None,
                        right=Share(hits=sum(own_right), trials=len(own_right)) if metric else None,
                        wrong=Share(hits=len(own_wrong) - sum(own_wrong), trials=len(own_wrong)) if metric else None,
                        wins=Share(hits=sum(win for win, _ in pairs), trials=len(pairs)),
                    )
                    write_json(file, [asdict(each) for each in known.values()])
                found.append(known[key])
        if progress:
            progress(len(found), len(found))
    return found


def _read(file: Path) -> list[Knowledge]:
    if not file.exists():
        return []
    try:
        return [Knowledge(**row) for row in json.loads(file.read_text("utf-8"), object_hook=_share_or_row)]
    except DAMAGED as error:
        raise MituneError(f"{file} is damaged; delete it and run the study again.") from error


def _share_or_row(found: dict[str, Any]) -> Share | dict[str, Any]:
    return Share(**found) if "hits" in found else found


def _samples(
    model: Model,
    prompts: Sequence[str],
    rivals: Mapping[str, Sequence[str]],
    metric: ImageMetric | None,
    images: int,
    seed: int,
    batch_size: int,
) -> tuple[list[bool | None], list[bool | None]]:
    """Of `images` samples a prompt, one by one: whether the prompt wins, and whether the image is right, if known."""
    requests = [Request(prompt=p, seed=candidate_seed(seed, p, j)) for p in prompts for j in range(images)]
    won: list[bool | None] = []
    exact: list[bool | None] = []
    for chunk, batch in generate_all(model, requests, batch_size):
        texts, latents = [request.prompt for request in chunk], batch.latents.nan_to_num()
        told = told_apart(model, latents, texts, rivals, seed=seed, batch_size=batch_size)
        won += [all(beaten) if beaten else None for beaten in told]
        if metric is None:
            exact += [None] * len(chunk)
        else:
            exact += [
                verdict.exact and not verdict.malformed for verdict in metric(list(decode(model, latents)), texts)
            ]
    return won, exact


def markdown(found: Sequence[Knowledge]) -> str:
    """A table of the shares with their 95 % intervals (Wilson)."""
    head = ["category", "model", "guidance", "knows: rendered", "knows: own right", "shows", "own wrong recognized"]
    lines = [[*head, "own samples whose prompt wins"], ["---"] * (len(head) + 1)]
    for known in found:
        shares = (known.rendered, known.right, known.shows, known.wrong, known.wins)
        lines.append([known.category, known.model, f"{known.guidance_scale:g}", *map(_cell, shares)])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def prediction(found: Sequence[Knowledge], studies: Sequence[pa.Table]) -> str:
    """What was promised beside what fine-tuning gained, by category, and Kendall's τ between them, as Markdown.

    `studies` are tables of judged images that `bench tune` left; of each model in them the guidance scale that its
    candidates were made at counts, and the first selection. Promised is the share of all own samples that are wrong and
    recognized as such. Raises MituneError where no category is in both.
    """
    gained: dict[tuple[str, str, float], Interval] = {}
    selections = []
    for study in studies:
        for name in dict.fromkeys(study["model"].to_pylist()):
            rows = study.filter(pc.equal(study["model"], name))
            scale = rows["guidance_scale"][0].as_py()
            compared = summarize(rows.filter(pc.equal(rows["guidance_scale"], scale)))
            first = next(c.variant for c in compared if c.difference is not None)
            selections.append(first)
            for c in compared:
                if (c.variant, c.split, c.metric) == (first, POOLED, "exact") and c.difference is not None:
                    gained[name, c.category, scale] = c.difference
    lines, promises, gains = [], [], []
    for known in found:
        gain = gained.get((Path(known.model).name, known.category, known.guidance_scale))
        if gain is None or known.wrong is None or known.shows is None:
            continue
        promises.append(known.wrong.value * (1 - known.shows.value))
        gains.append(gain.value)
        lines.append(f"| {known.category} | {known.model} | {known.guidance_scale:g} | {promises[-1]:.3f} | {gain} |\n")
    if not lines:
        raise MituneError("The study of fine-tuning shares no model, category and guidance scale; ask for its own.")
    tau = kendall_tau(np.array(promises), np.array(gains))
    text = PREDICTION.format(selection="`, `".join(dict.fromkeys(selections)), rows=len(lines), tau=tau)
    return f"{text}| category | model | guidance | promised | gained |\n|---|---|--:|--:|---|\n{''.join(lines)}"


def _cell(share: Share | None) -> str:
    return str(share) if share is not None and share.trials else "–"
