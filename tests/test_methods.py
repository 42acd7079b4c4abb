"""Methods: one from a user's own file, and what a run says of the variants that it was given."""

import json
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mitune.errors import MituneError
from mitune.evaluation.variant import VARIANTS, Variant, check_names, read_variants, write_variants
from mitune.methods.base import METHODS
from mitune.methods.mi_tune import prompts_of_round
from tests.test_cli_errors import invoke

DOCS = Path(__file__).parents[1] / "docs"
MINE = """

from mitune import MituneError

class Nothing:
    def check(self, config, prompts, base):
        pass
    def prepare(self, config, prompts, run):
        with run.stages("Doing nothing") as step, run.cost("nothing") as cost:
            (run.folder / "nothing.txt").write_text(" and ".join(listed.text for listed in prompts))
            cost["candidates"] = 0
            step(1, 1)
        return [Variant(name="nothing"), Variant(name="more guidance", guidance_scale=4.0)]

class Ranks:
    needs = "ranked"
    def __call__(self, batch, network):
        return batch.advantages * network(batch).flatten(1).mean(dim=1)

class Unwilling(Nothing):
    def check(self, config, prompts, base):
        raise MituneError(f"{len(prompts)} prompts are too few for {base.name}; give more.")

class Doubled(Nothing):
    def prepare(self, config, prompts, run):
        return [Variant(name="Base")]

class Narrow(Nothing):
    def prepare(self, config, prompts):
        return []

class Unprepared:
    def check(self, config, prompts, base):
        pass
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with two prompts and a user's own file: that of the docs, and further methods."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    page = (DOCS / "own-method.md").read_text(encoding="utf-8")
    (tmp_path / "mine.py").write_text(page.split("```")[1].removeprefix("python") + MINE, encoding="utf-8")
    (tmp_path / "two.txt").write_text("a red circle\nthree green crosses\n")
    yield tmp_path
    sys.modules.pop("mine", None)


def tune(method, *more):
    few = ["--set", "model.steps=3", "--set", "eval.images=1", "--device", "cpu", "--run", "run"]
    return invoke("tune", "--method", method, "-p", "two.txt", *few, *more)


def test_method_of_a_users_own_file(here):
    status, shown = tune("mine:Nothing", "--eval-prompts", "two.txt")
    assert status == 0, shown
    run = here / "run"
    assert (run / "nothing.txt").read_text() == "a red circle and three green crosses"
    table = pq.read_table(run / "eval" / "images.parquet").to_pydict()
    rows = list(zip(table["variant"], table["prompt"], table["information"], strict=True))
    judged = {name: [row[1:] for row in rows if row[0] == name] for name in table["variant"]}
    assert judged["nothing"] == judged["base"]
    assert judged["more guidance"] != judged["base"]
    assert "more guidance" in (run / "report.html").read_text(encoding="utf-8")
    status, shown = invoke("eval", "run", "--guidance", 3, "-n", 1)
    assert status == 0, shown
    variants = set(pq.read_table(run / "eval" / "images.parquet")["variant"].to_pylist())
    assert variants == {"base", "nothing", "more guidance", "base, guidance 3"}
    status, shown = tune("mi-tune", "--eval-prompts", "two.txt")
    assert (status, 'method: "mine:Nothing" there, "mi-tune" now' in shown) == (2, True), shown


def test_method_of_the_docs(here):
    status, shown = tune("mine:MoreGuidance", "--eval-prompts", "two.txt")
    assert status == 0, shown
    variants = pq.read_table(here / "run" / "eval" / "images.parquet")["variant"].to_pylist()
    assert list(dict.fromkeys(variants)) == ["base", "guidance 4", "guidance 6"]


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("mine:Unwilling", "2 prompts are too few for shapes-sd; give more."),
        ("mine:Unprepared", "lacks prepare"),
        ("mine:Narrow", "which is called with (config, prompts, run); let it take these."),
        ("mi-tuned", "Unknown method 'mi-tuned' (did you mean mi-tune?)"),
    ],
)
def test_method_that_cannot_be_is_refused_before_anything_is_made(method, sentence, here):
    status, shown = tune(method)
    assert (status, sentence in shown) == (2, True), shown
    assert not (here / "run").exists()


def test_objective_that_a_ranked_set_misleads_is_refused_before_anything_is_made(here):
    status, shown = tune("mi-tune", "--set", "pool.ranked=2")
    assert (status, "learn from the worst images of a ranked set as from the best" in shown) == (2, True), shown
    assert not (here / "run").exists()


def test_rounds_with_a_ranked_objective_of_a_users_own(here):
    """Each round takes one prompt, ranks all candidates, and goes on from the adapter of the round before; later ones
    may be asked for when the first is over."""
    training = ["objective=mine:Ranks", "rank=4", "batch_size=2", "iterations=1", "learning_rate=0.01"]
    settings = ["round_prompts=1", "eval.each_round=true", *(f"finetune.{each}" for each in training)]
    told = [part for setting in settings for part in ("--set", setting)]
    command = ["mi-tune", "-M", 3, "-s", "self-confidence", *told]
    status, shown = tune(*command)
    assert status == 0, shown
    first = here / "run" / "round-1"
    shutil.rmtree(first / "pool")  # of a round that is over nothing is needed but its adapters
    status, shown = tune(*command, "--rounds", 3, "--eval-prompts", "two.txt")  # two more
    assert (status, "Round 1" in shown, "Round 3" in shown) == (0, False, True), shown
    assert not (first / "pool").exists()
    prompts = []
    for number in (1, 2, 3):
        lines = (here / "run" / f"round-{number}" / "sets" / "self-confidence" / "metadata.jsonl").read_text()
        rows = [json.loads(line) for line in lines.splitlines()]
        assert len(rows) == 3 and sum(row["advantage"] for row in rows) == pytest.approx(0)
        prompts += {row["prompt"] for row in rows}
    assert sorted(prompts[:2]) == sorted({*prompts})
    judged = pq.read_table(here / "run" / "eval" / "images.parquet")["variant"].to_pylist()
    names = ["base", "self-confidence", "self-confidence, round 1", "self-confidence, round 2"]
    assert list(dict.fromkeys(judged)) == names
    assert "Over the rounds" in (here / "run" / "report.html").read_text(encoding="utf-8")


def test_every_prompt_has_its_turn():
    prompts = [f"prompt {number}" for number in range(10)]
    rounds = [prompts_of_round(prompts, 3, number, seed=0) for number in range(1, 7)]
    for turn in (rounds[:3], rounds[3:]):
        taken = [prompt for chosen in turn for prompt in chosen]
        assert len(set(taken)) == 9
    assert rounds[:3] != rounds[3:]
    assert all(chosen == [prompt for prompt in prompts if prompt in chosen] for chosen in rounds)
    assert prompts_of_round(prompts, 10, 5, seed=1) == prompts_of_round(prompts, 48, 2, seed=1) == prompts


def test_variant_that_is_called_like_the_base_is_refused(here):
    status, shown = tune("mine:Doubled")
    assert (status, "Two variants are called 'Base'" in shown) == (2, True), shown
    with pytest.raises(MituneError, match="Two variants are called 'a b'"):
        check_names([Variant(name="a b"), Variant(name="A-B")])
    assert not (here / "run" / VARIANTS).exists()


def test_variants_of_a_run_may_be_moved_with_it(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with pytest.raises(MituneError, match="no variants to judge yet"):
        read_variants(run)
    variants = [Variant(name="inside", adapter=run / "round-1" / "x"), Variant(name="outside", adapter=elsewhere)]
    write_variants(run, [*variants, Variant(name="plain", guidance_scale=3.0)])
    run.rename(tmp_path / "moved")
    inside, outside, plain = read_variants(tmp_path / "moved")
    assert (inside.adapter, outside.adapter) == (tmp_path / "moved" / "round-1" / "x", elsewhere)
    assert plain == Variant(name="plain", guidance_scale=3.0)
    (tmp_path / "moved" / VARIANTS).write_text("[{}]")
    with pytest.raises(MituneError, match=r"variants\.json is damaged"):
        read_variants(tmp_path / "moved")


def test_table_holds_methods():
    for name in METHODS.rows:
        assert callable(METHODS.resolve(name).prepare)
