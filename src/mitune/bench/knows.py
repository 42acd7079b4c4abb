"""Can selection pay? What a model knows of its prompts, beside what it shows.

Selection can only use what a model knows beyond what it shows. It *knows* an image's prompt if that has a lower
denoising error than each of the prompt's hard negatives, with shared noise; it *shows* a prompt by samples that are
right. Selection pays where samples are often wrong, and the model recognizes as wrong what it got wrong itself. Both
need a judge; without one, only how often the prompt of a sample wins can be said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mitune.bench.pages import page
from mitune.config.schema import ModelConfig
from mitune.denoiser.opening.identity import model_identity
from mitune.denoiser.opening.models import Model, load_model
from mitune.denoiser.pictures import decode, encode_images
from mitune.denoiser.sampling import generate_all, requests_of
from mitune.errors import MituneError
from mitune.evaluation.comparison import POOLED, summarize
from mitune.evaluation.metrics.base import ImageMetric, Judgment
from mitune.evaluation.statistics import Interval, Share, kendall_tau
from mitune.evaluation.tables import interval, number, table
from mitune.pool.evidence import told_apart
from mitune.run.locks import sole_worker
from mitune.run.stages import Step
from mitune.run.store import DAMAGED, claim, write_json
from mitune.worlds.base import Listed, Negative, WorldOfScenes, world_of_prompt

Negatives = Mapping[str, Sequence[Negative]]  # by prompt
DRAWS = 12  # log-SNRs at which a rendered scene is noised; with fewer, counts that are known seem not to be


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """The shares of one category, model and guidance scale; None where there is no judge, or nothing rendered.

    Samples whose prompt has no hard negative count in `shows` and `semantic` alone.
    """

    model: str
    category: str
    guidance_scale: float
    rendered: Share | None  # rendered scenes whose prompt wins: does not depend on guidance
    kinds: Mapping[str, Share] = field(default_factory=dict)  # of the same, by kind of hard negative
    shows: Share | None  # own samples that are right
    right: Share | None  # of these: the prompt wins
    wrong: Share | None  # of the others: it does not, so the model recognizes its mistake
    semantic: Share | None  # of the others: well drawn
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
    progress: Step | None = None,
) -> list[Knowledge]:
    """The shares by category for each of the models, given with their guidance scales.

    `scenes` rendered scenes a category, none where prompts are of no world of scenes; `images` samples a prompt. What
    `folder` holds already is not made again. Raises MituneError for a folder of other settings, of another process, or
    a damaged one.
    """
    of_prompt = {listed.text: list(negatives(listed.text)) for listed in prompts}
    rivals = {text: [negative.prompt for negative in listed] for text, listed in of_prompt.items()}
    categories = list(dict.fromkeys(listed.category for listed in prompts))
    with sole_worker(folder):
        claim(folder, {"negatives": rivals, "scenes": scenes, "images": images, "seed": seed}, "study")
        file = folder / "knowledge.json"
        known = {each.key: each for each in _read(file)}
        rows: list[Knowledge] = []
        for settings in models:
            model = load_model(settings)
            part = folder / f"{Path(settings.name).name}-{model.guidance_scale:g}"
            claim(part, model_identity(settings), "study")
            for category in categories:
                if progress:
                    progress(len(rows), len(models) * len(categories))
                key = (settings.name, category, model.guidance_scale)
                if key not in known:
                    texts = [listed.text for listed in prompts if listed.category == category]
                    of_samples = _samples(model, texts, rivals, metric, images, seed, batch_size)
                    of_scenes = next((_of_scenes(k) for k in known.values() if k.key[:2] == key[:2]), None)
                    world = world_of_prompt(texts[0])
                    if scenes and of_scenes is None and isinstance(world, WorldOfScenes):
                        of_scenes = _rendered(model, world, category, negatives, scenes, seed, batch_size)
                    known[key] = Knowledge(
                        model=settings.name,
                        category=category,
                        guidance_scale=model.guidance_scale,
                        **(of_scenes or {"rendered": None}),
                        **of_samples,
                    )
                    write_json(file, [asdict(each) for each in known.values()])
                rows.append(known[key])
        if progress:
            progress(len(rows), len(rows))
    return rows


def _read(file: Path) -> list[Knowledge]:
    if not file.exists():
        return []
    try:
        return [Knowledge(**row) for row in json.loads(file.read_text("utf-8"), object_hook=_share_or_row)]
    except DAMAGED as error:
        raise MituneError(f"{file} is damaged; delete it and run the study again.") from error


def _share_or_row(content: dict[str, Any]) -> Share | dict[str, Any]:
    return Share(**content) if "hits" in content else content


def _of_scenes(known: Knowledge) -> dict[str, Any]:
    return {"rendered": known.rendered, "kinds": known.kinds}


def _rendered(
    model: Model,
    world: WorldOfScenes,
    category: str,
    negatives: Callable[[str], Sequence[Negative]],
    scenes: int,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """Of rendered scenes, those whose prompt beats all its hard negatives, and the same by kind of these."""
    prompts, pictures = world.rendered(category, scenes, seed)
    latents = encode_images(model.pipe, pictures, model.call)
    of_prompt = {prompt: list(negatives(prompt)) for prompt in prompts}
    rivals = {prompt: [negative.prompt for negative in listed] for prompt, listed in of_prompt.items()}
    beaten = told_apart(model, latents, prompts, rivals, draws=DRAWS, seed=seed, batch_size=batch_size)
    by_kind: dict[str, list[bool]] = {}
    for prompt, outcomes in zip(prompts, beaten, strict=True):
        for negative, outcome in zip(of_prompt[prompt], outcomes, strict=True):
            by_kind.setdefault(negative.kind, []).append(outcome)
    return {
        "rendered": _share(map(all, beaten)),
        "kinds": {kind: _share(by_kind[kind]) for kind in sorted(by_kind)},
    }


def _samples(
    model: Model,
    prompts: Sequence[str],
    rivals: Mapping[str, Sequence[str]],
    metric: ImageMetric | None,
    images: int,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """The shares of `images` samples a prompt."""
    requests = requests_of(prompts, images, seed)
    won: list[bool | None] = []  # whether the prompt wins; None without a rival
    judgments: list[Judgment] = []
    for chunk, batch in generate_all(model, requests, batch_size):
        texts, latents = [request.prompt for request in chunk], batch.latents.nan_to_num()
        beaten = told_apart(model, latents, texts, rivals, seed=seed, batch_size=batch_size)
        won += [all(outcomes) if outcomes else None for outcomes in beaten]
        if metric is not None:
            judgments += metric(list(decode(model, latents)), texts)
    wins = _share(win for win in won if win is not None)
    if metric is None:
        return {"wins": wins} | dict.fromkeys(("shows", "right", "wrong", "semantic"))
    both = [(win, judgment.right) for win, judgment in zip(won, judgments, strict=True) if win is not None]
    return {
        "wins": wins,
        "shows": _share(judgment.right for judgment in judgments),
        "right": _share(win for win, is_right in both if is_right),
        "wrong": _share(not win for win, is_right in both if not is_right),
        "semantic": _share(not judgment.malformed for judgment in judgments if not judgment.right),
    }


def _share(outcomes: Iterable[bool]) -> Share:
    listed = list(outcomes)
    return Share(hits=sum(listed), trials=len(listed))


def markdown(rows: Sequence[Knowledge]) -> str:
    """The shares with their 95 % intervals (Wilson); below, what is known of rendered scenes by kind of negative."""
    head = ["category", "model", "guidance", "knows: rendered", "knows: own right", "shows", "own wrong recognized"]
    head += ["failures that are semantic", "own samples whose prompt wins"]
    lines = [
        [row.category, row.model, f"{row.guidance_scale:g}"]
        + [*map(interval, (row.rendered, row.right, row.shows, row.wrong, row.semantic, row.wins))]
        for row in rows
    ]
    kinds = {(row.model, row.category, kind): share for row in rows for kind, share in row.kinds.items()}
    by_kind = table(
        ["category", "model", "kind of hard negative", "told apart"],
        [[category, model, kind, interval(share)] for (model, category, kind), share in kinds.items()],
    )
    return table(head, lines) + (f"\n{by_kind}" if kinds else "")


def prediction(known: Sequence[Knowledge], studies: Sequence[pa.Table]) -> str:
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
    for row in known:
        gain = gained.get((Path(row.model).name, row.category, row.guidance_scale))
        if gain is None or row.wrong is None or row.shows is None:
            continue
        promises.append(row.wrong.value * (1 - row.shows.value) if row.wrong.trials else 0.0)
        gains.append(gain.value)
        scale = f"{row.guidance_scale:g}"
        lines.append([row.category, row.model, scale, number(promises[-1]), interval(gain, sign=True)])
    if not lines:
        raise MituneError("The study of fine-tuning shares no model, category and guidance scale; ask for its own.")
    return page(
        "knows-prediction",
        selection="`, `".join(dict.fromkeys(selections)),
        rows=len(lines),
        tau=number(kendall_tau(np.array(promises), np.array(gains)), 2),
        table=table(["category", "model", "guidance", "promised", "gained"], lines),
    )
