"""What fine-tuning gains: the figures of a table written by hand, and the command on the smallest study."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mitune.bench.tune import choices_of
from mitune.bench.tune_tables import gains, markdown
from mitune.cli import app
from mitune.denoiser.opening.adapter_file import adapter_checksum
from tests.test_statistics import cells


def table(**right):
    """Two seeds × ten prompts × two images; `right` has each variant's number of right prompts, by seed."""
    rows = []
    for variant, counts in right.items():
        for seed, count in enumerate(counts):
            for prompt in range(10):
                for image in range(2):
                    rows.append(
                        {
                            "model": "m", "guidance_scale": 1.2, "variant": variant, "tuning_seed": seed,
                            "prompt": f"prompt {prompt}", "category": "color", "split": "seen", "image": image,
                            "seed": 2 * seed + image, "exact": prompt < count, "graded": 1.0, "malformed": False,
                            "drawn": "a scene" if variant == "oracle" else f"scene {image}",
                            "way": "", "selection": "" if variant == "base" else variant,
                            "rounds": int(variant != "base"), "calls": 1000.0,
                            "information": 8.0 if variant == "oracle" else 2.0, "picked_right": 0.25 * (1 + seed),
                        }
                    )  # fmt: skip
    return pa.Table.from_pylist(rows)


def test_gains_are_paired_and_held_against_the_oracle():
    base, score, oracle = gains(table(base=(4, 4), score=(6, 8), oracle=(8, 10)))
    assert (base.over_base, base.by_seed, base.response, base.distinct) == (None, (), 1, 1)
    assert base.over_best is None and math.isnan(base.of_oracle)
    assert score.exact.value == pytest.approx(0.7)
    assert score.over_base.value == pytest.approx(0.3)
    assert score.by_seed == pytest.approx((0.2, 0.4))
    assert score.of_oracle == pytest.approx(0.6)  # 0.3 of 0.5
    assert (oracle.response, oracle.distinct) == (2, 0.5)  # ‖Δε‖ doubles where its square is four times as large
    assert score.over_base.low > 0
    assert score.picked_right == pytest.approx(0.375)  # the mean over seeds


def test_without_a_clear_gain_of_the_oracle_there_is_no_share_of_it():
    *_, score, oracle = gains(table(base=(5, 5), score=(6, 6), oracle=(5, 5)))
    assert math.isnan(score.of_oracle)
    rows = cells(markdown(table(base=(5, 5), score=(6, 6), oracle=(5, 5))).split("\n\n")[0])
    assert [row[10] for row in rows[2:]] == ["–"] * 3


def test_there_is_no_share_of_the_gain_for_a_loss():
    *_, loss, oracle = gains(table(base=(5, 5), score=(3, 4), oracle=(9, 9)))
    assert math.isnan(loss.of_oracle) and oracle.of_oracle == 1


def test_the_base_is_not_held_against_itself():
    """Its differences are dashes, but for that to the base at its best, where it is another."""
    weaker = table(base=(4, 4)).to_pylist()
    better = [row | {"guidance_scale": 4.0} for row in table(base=(8, 8)).to_pylist()]
    first, second = gains(pa.Table.from_pylist(weaker + better))
    assert first.over_base is second.over_base is second.over_best is None
    assert first.over_best.value == pytest.approx(-0.4)


@pytest.mark.slow
def test_command_runs_and_goes_on(tmp_path):
    """Two rounds: the second has a pool for each selection, made with its own adapter."""
    command = [
        "bench", "tune", "-m", "shapes-sd", "-s", "self-confidence", "--guidance-scale", "1.2", "-r",
        str(tmp_path / "run"), "-o", str(tmp_path / "gains.md"), "--set", "prompts=shapes:train/shape", "--set",
        "eval_prompts=shapes:heldout/shape", "--set", "pool.candidates=2", "--set", "eval.images=1", "--set",
        "finetune.iterations=1", "--set", "finetune.batch_size=4", "--set", "model.steps=2", "-s", "random",
        "--set", "rounds=2",
    ]  # fmt: skip
    app(command, standalone_mode=False)
    rows = pq.read_table(tmp_path / "run" / "images.parquet")
    assert rows.num_rows == 40 * 5 * 2  # prompts × variants × guidance scales
    assert set(rows["guidance_scale"].to_pylist()) == {1.2, 2.0}
    assert set(rows["variant"].to_pylist()) == {
        "base", "self-confidence", "random", "self-confidence, 2 rounds", "random, 2 rounds"
    }  # fmt: skip
    run = tmp_path / "run" / "shapes-sd-0" / "shapes-study"
    made = {json.loads(f.read_text())["model"]["adapter"] for f in run.glob("round-2/pool-*/settings.json")}
    assert made == {adapter_checksum(run / "round-1" / "adapters" / slug) for slug in ("self-confidence", "random")}
    assert "Round 2, random: candidates" in (run / "report.html").read_text(encoding="utf-8")
    pool = pq.read_table(run / "round-1" / "pool" / "candidates.parquet").to_pylist()
    right = {False: [], True: []}
    for row in pool:
        right[row["kept.self-confidence"]].append(row["exact"] and not row["malformed"])
    shares = {row["variant"]: row["picked_right"] for row in rows.to_pylist()}
    assert shares["self-confidence"] == pytest.approx(np.mean(right[True]))
    assert shares["base"] == pytest.approx(np.mean(right[False] + right[True]))
    written = (tmp_path / "gains.md").read_text(encoding="utf-8")
    assert "](gains.png)" in written
    with Image.open(tmp_path / "gains.png") as picture:
        assert picture.width > 400
    assert "Made by `mitune bench tune --model shapes-sd --select self-confidence --select random" in written
    assert "--guidance-scale 1.2" in written and "--set rounds=2" in written
    assert ["shapes-sd, 2", "self-confidence"] in [row[:2] for row in cells(written)]
    own = np.array([row["exact"] and not row["malformed"] for row in pool], float).reshape(-1, 2)
    kept = np.array([row["kept.self-confidence"] for row in pool]).reshape(-1, 2)
    closed = ((own * kept).sum() - own.mean(axis=1).sum()) / (own.max(axis=1) - own.mean(axis=1)).sum()
    shown = f"{closed:.2f}".replace("-", "−")
    (row,) = [row for row in cells(written) if row[:2] == ["shapes-sd", "self-confidence"]]
    assert row[2] == shown and row[3].startswith(f"{shown} [")  # its one category, and all
    app(command, standalone_mode=False)
    assert (tmp_path / "gains.md").read_text(encoding="utf-8") == written


def test_ways_are_presets_times_objectives():
    assert choices_of(["a", "b"], []) == {"a": ("a", {}), "b": ("b", {})}
    one = choices_of(["a"], ["dpo", "mine:Half"])
    assert one == {aim: ("a", {"finetune.objective": aim}) for aim in ("dpo", "mine:Half")}
    assert list(choices_of(["a", "b"], ["dpo"])) == ["a dpo", "b dpo"]
