"""The report of a run folder that is made up of real shapes scenes, drawn, judged and scored."""

import json
import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from mitune.errors import MituneError
from mitune.report import build_report
from mitune.report.build import context
from mitune.report.words import duration
from mitune.worlds.shapes.grammar import COLORS, SHAPES, Prompt, forms
from mitune.worlds.shapes.scene import fits, parts, render, sample_scene

VARIANTS = {"base": 0.45, "self-confidence": 0.62, "random": 0.46, "oracle": 0.7, "base, guidance 2.0": 0.5}
SCORES = {"self-confidence": 1.0, "mi-tune": -0.6, "rfmi": 0.4, "early": 0.0}  # how much a score knows


def draw(prompt: Prompt, success: float, rng: random.Random):
    """A picture and its verdict; a failure is a wrong color, a missing object or one too many, rarely a mere blur."""
    scene = list(sample_scene(prompt, rng))
    malformed = False
    if rng.random() > success:
        at = rng.randrange(len(scene))
        kind = rng.choice(["color", "color", "missing", "other", "blur"])
        malformed = kind == "blur" and rng.random() < 0.6
        if kind == "color":
            scene[at] = replace(scene[at], color=rng.choice([c for c in COLORS if c != scene[at].color]))
        elif kind == "missing" and len(scene) > 1:
            del scene[at]
        else:
            scene[at] = replace(scene[at], shape=rng.choice([s for s in SHAPES if s != scene[at].shape]))
    picture = render(tuple(scene))
    if malformed:
        noise = np.random.default_rng(rng.randrange(2**32)).normal(0, 45, picture.shape)
        picture = (0.5 * picture + 0.5 * np.roll(picture, 6, axis=0) + noise).clip(0, 255).astype(np.uint8)
    met = parts(scene, prompt)
    missed = [name for name, ok in met if not ok]
    return picture, {
        "exact": fits(tuple(scene), prompt),
        "graded": 1 - len(missed) / len(met),
        "malformed": malformed,
        "missed": "; ".join(missed),
    }


def save(picture, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def make_run(
    folder: Path, *, categories=("color", "numeracy"), prompts=4, images=2, candidates=8, iterations=20
) -> Path:
    """A run folder as `mitune tune` leaves it, in the settings of Config."""
    rng = random.Random(0)
    numbers = np.random.default_rng(0)
    config = {
        "model": {"name": "shapes-sd", "guidance_scale": None, "steps": 30},
        "pool": {"candidates": candidates, "keep": 1, "select": ["self-confidence", "random", "oracle"], "seed": 0},
        "finetune": {"adapter": "lora", "rank": 16, "learning_rate": 5e-4, "batch_size": 64, "seed": 0}
        | {"iterations": iterations},
        "eval": {"images": images, "seed": 1000, "guidance_scales": [2.0]},
        "prompts": "shapes:train",
        "eval_prompts": "shapes:heldout",
        "rounds": 1,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")

    asked = []
    for category in categories:
        known = [prompt for form in forms() if form.category == category for prompt in form.prompts]
        chosen = rng.sample(known, 2 * prompts)
        asked += [(category, "unseen" if at >= prompts else "seen", prompt) for at, prompt in enumerate(chosen)]
    rows = []
    for variant, level in VARIANTS.items():
        for index, (category, split, prompt) in enumerate(asked):
            level_here = level - 0.12 * (split == "unseen") + 0.25 * math.sin(7 * index)
            for image in range(images):
                picture, verdict = draw(prompt, level_here, rng)
                name = ""
                if index % prompts < 2:
                    name = f"pictures/{variant.replace(', ', '-').replace(' ', '-')}/{index:05d}-{image}.png"
                    save(picture, folder / "eval" / name)
                row = {"variant": variant, "prompt": str(prompt), "category": category, "split": split}
                rows.append({**row, "image": image, "seed": 7919 * index + image, **verdict, "picture": name})
    pq.write_table(pa.Table.from_pylist(rows), folder / "eval" / "images.parquet")

    pool = folder / "round-1" / "pool"
    rows = []
    for index, (_, _, prompt) in enumerate(asked):
        made = [draw(prompt, 0.45 + 0.3 * math.sin(5 * index), rng) for _ in range(candidates)]
        own = []
        for candidate, (_, verdict) in enumerate(made):
            right = verdict["graded"] - verdict["malformed"]
            scores = {
                f"score.{name}": 0.05 * (knows * right + numbers.normal(0, 0.35) - index % 5)
                for name, knows in SCORES.items()
            }
            row = {"prompt_index": index, "prompt": str(prompt), "candidate": candidate, "seed": candidate}
            own.append({**row, "status": "ok", **verdict, **scores, "score.oracle": right, "difference": [0.0] * 3})
        if index == 0:  # a candidate that came out as NaN
            own[0].update({"status": "nan", **{f"score.{name}": math.nan for name in (*SCORES, "oracle")}})
        order = sorted(own, key=lambda row: -math.inf if row["status"] == "nan" else -row["score.self-confidence"])
        if index < 6:
            for row in [*order[1:5], *order[-4:]]:
                save(made[row["candidate"]][0], pool / "extremes" / f"{index:05d}-{row['candidate']:03d}.png")
        rows += own
    pool.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), pool / "candidates.parquet")

    for selection, floor in (("self-confidence", 0.16), ("random", 0.19), ("oracle", 0.15)):
        steps = np.arange(1, iterations + 1)
        loss = floor + 0.12 * np.exp(-4 * steps / iterations) + 0.02 * numbers.normal(size=iterations)
        norm = 0.3 + 1.2 * np.exp(-6 * steps / iterations) + 0.08 * np.abs(numbers.normal(size=iterations))
        lines = [
            json.dumps({"iteration": int(i) - 1, "loss": float(a), "gradient_norm": float(b), "seconds": 0.8})
            for i, a, b in zip(steps, loss, norm, strict=True)
        ]
        file = folder / "round-1" / "adapters" / selection / "training.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("\n".join(lines) + "\n", "utf-8")
    total = len(asked) * candidates
    cost = [
        {"stage": "pool, round 1", "seconds": 1460.2, "candidates": total, "denoiser_calls": 30 * total},
        {"stage": "fine-tuning on self-confidence, round 1", "seconds": 0.8 * iterations},
        {"stage": "evaluation", "seconds": 610.0, "candidates": 5 * len(asked) * images, "denoiser_calls": 9000},
    ]
    (folder / "cost.json").write_text(json.dumps(cost), "utf-8")
    return folder


class Page(HTMLParser):
    """What a test asks of the page: its text, its pictures, its ids and links, and that its tags are closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.open, self.tags, self.style = "", [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.text = " ".join([*self.text.split(), *data.split()])

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(run) -> Page:
    return Page(build_report(run).read_text("utf-8"))


def test_page_is_whole_and_needs_nothing_else(run, page):
    """Every tag is closed, and nothing is fetched: no script, no link, no address but data and the page's own."""
    assert page.open == []
    assert not page.of("script") and not page.of("link") and not page.of("iframe")
    sources = [attrs["src"] for attrs in page.of("img")]
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(attrs["href"].startswith("#") for attrs in page.of("a"))
    assert "@import" not in page.style and "url(" not in page.style
    assert "prefers-color-scheme: dark" in page.style
    assert not list(run.glob(".report*"))


def test_links_lead_somewhere_and_ids_are_unique(page):
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    wanted = [attrs.get("href") or attrs.get("xlink:href") for tag, attrs in page.tags if tag in ("a", "use")]
    assert {target.removeprefix("#") for target in wanted} <= set(ids)


def test_same_run_gives_the_same_bytes(run):
    assert build_report(run).read_bytes() == build_report(run).read_bytes()


def test_headline_agrees_with_the_rows(run, page):
    """The shares are counted by hand; the variant is the run's first selection although the oracle does better."""
    rows = pq.read_table(run / "eval" / "images.parquet").to_pylist()
    shares = {}
    for variant in ("base", "self-confidence"):
        own = [row["exact"] and not row["malformed"] for row in rows if row["variant"] == variant]
        shares[variant] = 100 * sum(own) / len(own)
    headline = context(run)["headline"]
    assert headline["variant"] == "self-confidence"
    assert (headline["base"], headline["tuned"]) == tuple(f"{share:.1f}\u00a0%" for share in shares.values())
    assert f"{headline['verdict']} Fine-tuned on the candidates kept by self-confidence" in page.text
    assert headline["basis"] == "16 × 2 × 1"


@pytest.mark.parametrize(
    ("tuned", "verdict", "tone"),
    [
        ((1, 1), "Better by 50.0 points", "better"),
        ((0, 0), "Worse by 50.0 points", "worse"),
        ((1, 0), "No clear difference", "unclear"),
    ],
)
def test_verdict_follows_the_interval(tmp_path, tuned, verdict, tone):
    """Twenty prompts of two images, base right on one of them; the interval of a constant ±0.5 excludes zero."""
    (tmp_path / "config.yaml").write_text("pool: {select: [random]}", "utf-8")
    (tmp_path / "eval").mkdir()
    row = {"category": "color", "split": "", "seed": 0, "graded": 1.0, "malformed": False, "missed": "", "picture": ""}
    rows = [
        {**row, "variant": variant, "prompt": str(prompt), "image": image, "exact": bool(right)}
        for variant, verdicts in (("base", (1, 0)), ("random", tuned))
        for prompt in range(20)
        for image, right in enumerate(verdicts)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "eval" / "images.parquet")
    headline = context(tmp_path)["headline"]
    assert (headline["verdict"], headline["difference"]["tone"]) == (verdict, tone)
    assert f'<h1 class="{tone}">{verdict}' in build_report(tmp_path).read_text("utf-8")


def test_table_has_every_category_split_and_variant(run, page):
    exact, graded = context(run)["tables"]
    names = [(row["name"], row["sub"]) for row in exact["rows"]]
    assert names[:3] == [("color", False), ("color, seen", True), ("color, unseen", True)]
    assert [name for name, sub in names if not sub] == ["color", "numeracy", "all"]
    assert exact["variants"] == graded["variants"] == list(VARIANTS)
    assert [row["basis"] for row in exact["rows"] if not row["sub"]] == ["8 × 2 × 1", "8 × 2 × 1", "16 × 2 × 1"]
    assert "By split: seen, unseen" in page.text


def test_pictures_carry_verdict_and_missed_parts(run):
    """Two prompts of each category and split; base and first selection in front, by the same seeds, the rest folded."""
    cards = context(run)["cards"]
    assert len(cards) == 8
    assert [card.tags for card in cards[:4]] == [
        (category, split) for category in ("color", "numeracy") for split in ("seen", "unseen")
    ]
    rows = pq.read_table(run / "eval" / "images.parquet").to_pylist()
    for card in cards:
        assert [strip.name for strip in card.strips] == ["base", "self-confidence"]
        assert [strip.name for strip in card.more] == ["random", "oracle", "base, guidance 2.0"]
        for strip in card.strips:
            own = [
                row for row in rows if (row["variant"], row["prompt"]) == (strip.name, card.prompt) and row["picture"]
            ]
            for picture, row in zip(strip.pictures, own, strict=True):
                expected = "malformed" if row["malformed"] else "exact" if row["exact"] else "wrong"
                assert picture.verdict == expected
                assert picture.pixelated
                assert "; ".join(picture.lines) == ("malformed" if row["malformed"] else row["missed"])


def test_extremes_are_ordered_by_the_selecting_score(run):
    """Four best and four worst; prompt 0 has a candidate without a score, which is never shown."""
    pool = context(run)["rounds"][0]["pools"][0]
    assert (pool["by"], pool["broken"], len(pool["cards"])) == ("self-confidence", 1, 6)
    for card in pool["cards"]:
        best, worst = card.strips
        assert (best.name, worst.name) == ("best", "worst")
        scores = [float(p.lines[0].replace("−", "-")) for p in (*best.pictures, *worst.pictures)]
        assert scores == sorted(scores, reverse=True)


def test_scores_are_held_against_the_judge(run):
    """Those made to know the verdict agree with it, the reversed one disagrees; the oracle is no score of its own."""
    scores = {score["name"]: score for score in context(run)["rounds"][0]["pools"][0]["scores"]}
    assert list(scores) == list(SCORES)
    assert scores["self-confidence"]["selects"] and not scores["rfmi"]["selects"]
    assert scores["self-confidence"]["judged"]["agreement"]["sign"] == 1
    assert scores["mi-tune"]["judged"]["agreement"]["sign"] == -1
    assert scores["mi-tune"]["unit"] == "nats"


def test_training_counts_iterations_and_skipped_ones(tmp_path):
    """A skipped iteration has no loss: it is counted, and neither it nor its neighbors break the curve."""
    (tmp_path / "config.yaml").write_text("rounds: 1", "utf-8")
    file = tmp_path / "round-1" / "adapters" / "mi-tune" / "training.jsonl"
    file.parent.mkdir(parents=True)
    rows = [{"iteration": i, "loss": 0.1, "gradient_norm": 1.0, "skipped": False, "seconds": 2.0} for i in range(40)]
    rows[7].update({"loss": None, "gradient_norm": None, "skipped": True})
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    training = context(tmp_path)["rounds"][0]["training"]
    (run,) = training["legend"]
    assert (run["iterations"], run["skipped"], run["seconds"]) == (40, 1, "1 min 20 s")
    assert "nan" not in training["plots"][0].lower()
    assert "1 skipped as not finite" in Page(build_report(tmp_path).read_text("utf-8")).text


def test_cost_adds_up(run):
    *stages, total = context(run)["cost"]
    assert [row["stage"] for row in stages] == [
        "pool, round 1",
        "fine-tuning on self-confidence, round 1",
        "evaluation",
    ]
    assert stages[1]["candidates"] == "–"
    assert total["seconds"] == duration(1460.2 + 0.8 * 20 + 610)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (42.4, "42 s"),
        (59.7, "1 min 00 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (86399, "24 h 00 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_every_section_may_be_absent(tmp_path):
    """With settings alone the page says, a line each, what is left out and which file it needs."""
    (tmp_path / "config.yaml").write_text("model: {name: shapes-sd}", "utf-8")
    page = Page(build_report(tmp_path).read_text("utf-8"))
    assert "No verdict" in page.text
    for file in ("eval/images.parquet", "eval/", "round-1/", "cost.json"):
        assert re.search(rf"Left out: no [^.]*{file}", page.text), file
    (tmp_path / "round-1").mkdir()
    page = Page(build_report(tmp_path).read_text("utf-8"))
    for file in ("candidates.parquet", "training.jsonl"):
        assert re.search(rf"Left out: no round-1/\S*{file}", page.text), file


def test_a_pool_without_judge(tmp_path):
    """Scores alone, as of a real model: distributions, and no word on what is right."""
    (tmp_path / "config.yaml").write_text("pool: {select: [mi-tune]}", "utf-8")
    pool = tmp_path / "round-1" / "pool"
    pool.mkdir(parents=True)
    rows = [
        {"prompt_index": i, "prompt": "a cat", "candidate": j, "seed": j, "status": "ok", "score.mi-tune": float(i + j)}
        for i in range(3)
        for j in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), pool / "candidates.parquet")
    save(np.zeros((600, 400, 3), np.uint8), pool / "extremes" / "00000-003.png")
    (score,) = context(tmp_path)["rounds"][0]["pools"][0]["scores"]
    assert score["judged"] is None
    page = Page(build_report(tmp_path).read_text("utf-8"))
    assert "No verdicts in this pool" in page.text
    (picture,) = page.of("img")
    assert picture["src"].startswith("data:image/webp") and "class" not in picture


def test_base_alone_gives_tables_and_no_verdict(tmp_path, run):
    rows = [row for row in pq.read_table(run / "eval" / "images.parquet").to_pylist() if row["variant"] == "base"]
    (tmp_path / "config.yaml").write_text("pool: {select: [self-confidence]}", "utf-8")
    (tmp_path / "eval").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "eval" / "images.parquet")
    found = context(tmp_path)
    assert (found["headline"], found["forest"], found["cards"]) == (None, None, [])
    assert [table["variants"] for table in found["tables"]] == [["base"], ["base"]]
    assert "No verdict" in Page(build_report(tmp_path).read_text("utf-8")).text


def test_what_users_write_is_text(tmp_path):
    (tmp_path / "config.yaml").write_text('model: {name: "<script>alert(1)</script>"}', "utf-8")
    assert "<script>" not in build_report(tmp_path).read_text("utf-8")


def test_refusals(tmp_path, run):
    with pytest.raises(MituneError, match="holds no config.yaml"):
        build_report(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [", "utf-8")
    with pytest.raises(MituneError, match="config.yaml is no YAML"):
        build_report(tmp_path)
    (tmp_path / "config.yaml").write_text("rounds: 1", "utf-8")
    (tmp_path / "cost.json").write_text("[{", "utf-8")
    with pytest.raises(MituneError, match="cost.json is damaged"):
        build_report(tmp_path)
    (tmp_path / "cost.json").unlink()
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "images.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(MituneError, match="images.parquet is no Parquet file"):
        build_report(tmp_path)
    rows = pq.read_table(run / "eval" / "images.parquet").to_pylist()
    pq.write_table(
        pa.Table.from_pylist([{**row, "picture": "../config.yaml"} for row in rows]),
        tmp_path / "eval" / "images.parquet",
    )
    with pytest.raises(MituneError, match="lies outside"):
        build_report(tmp_path)
    assert not list(tmp_path.glob("*report.html*"))
