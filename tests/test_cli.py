"""The command line as a user meets it: help that teaches, errors in a sentence, and a whole small run."""

import contextlib
import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.test_cli_errors import invoke

COMMANDS = ["demo", "tune", "pool", "train", "merge", "generate", "score", "eval", "report"]


def mitune(*arguments, cwd, status=0):
    """What the command prints, given in the folder `cwd` and in this process."""
    with contextlib.chdir(cwd):
        ended, shown = invoke(*arguments)
    assert ended == status, shown
    assert "Traceback" not in shown
    return shown


def test_help_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-c", "from mitune.cli import main; main()", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stderr == ""
    assert all(command in done.stdout for command in COMMANDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "one.txt").write_text("a red circle\n")
    (folder / "two.txt").write_text("a red circle\n\na blue square\n")
    (folder / "long.txt").write_text("a red circle, " * 20 + "\n")
    (folder / "empty.txt").write_text("")
    (folder / "list.csv").write_text("Prompts,Category\na red circle,x\n,y\n")
    (folder / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    (folder / "dragon.txt").write_text("a red dragon\n")
    (folder / "no-model").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    return folder


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["pool", "-m", "no-model"], "no-model is a folder without model_index.json"),
        (["pool", "-m", "nobody/nothing-here"], "nobody/nothing-here"),
        (["pool", "-p", "absent.txt"], "There is no prompt file absent.txt"),
        (["pool", "-p", "empty.txt"], "empty.txt holds no prompt"),
        (["pool", "-p", "two.txt"], "two.txt:2: the line is blank"),
        (["pool", "-p", "long.txt"], "long.txt:1:"),
        (["pool", "-p", "list.csv"], "list.csv:3: the line is blank"),
        (["pool", "-p", "list.csv", "--prompt-field", "text"], "list.csv:1: no field or column 'text'"),
        (["generate", "a red circle", ""], "prompt 2: the line is blank"),
        (["generate", "a red circle, " * 20], "a call of this model reads 16"),
        (["score", "list.csv", "a red circle"], "list.csv cannot be read as a picture"),
        (["score", "cut.png", "a red circle"], "cut.png cannot be read as a picture"),
        (["score", "dot.png", "a red circle"], "1 × 1 pixels; the smallest that this model takes has 8 × 8"),
        (["score", "dot.png", "a red circle, " * 20], "a call of this model reads 16"),
        (["bench", "knows", "-p", "long.txt"], "long.txt:1:"),
        (["pool", "-p", "dragon.txt"], "does not know 'dragon'"),
        (["pool", "-p", "shapes:train/colour"], "categories: color"),
        (["pool", "-p", "one.txt", "-M", "2", "-k", "3"], "pool.keep = 3 must lie between 1 and pool.candidates = 2"),
        (["pool", "-p", "one.txt", "-s", "magic"], "Unknown score 'magic'"),
        (["pool", "-p", "one.txt", "--shard", "3/2"], "--shard '3/2'"),
        (["tune", "--preset", "sd99"], "Unknown preset 'sd99'"),
        (["tune", "-p", "one.txt", "--run", "full"], "full is not empty and holds no run"),
        (["tune", "-p", "one.txt", "--guidance-scale", "1"], "model.guidance_scale = 1.0 must be a number, above 1"),
        (["shapes", "check", "--category", "colour"], "categories: color"),
        (["report", "full"], "config.yaml"),
    ],
)
def test_bad_input_is_one_sentence(folder, monkeypatch, arguments, sentence):
    monkeypatch.chdir(folder)
    status, shown = invoke(*arguments)
    assert (status, sentence in shown) == (2, True), shown


@pytest.mark.slow
@pytest.mark.parametrize("model", ["shapes-sd", "shapes-sd3"])
def test_a_whole_small_run(tmp_path, model):
    """Two rounds, judged; run again it changes nothing, and with other settings it is refused."""
    (tmp_path / "prompts.txt").write_text("a red circle and a blue square\nthree green crosses\n")
    arguments = ["tune", "-m", model, "-p", "prompts.txt", "--eval-prompts", "prompts.txt", "-M", 4, "--rounds", 2]
    arguments += ["--run", "run", "--set", "pool.batch_size=8", "--set", "eval.images=2", "--set", "model.steps=4"]
    tiny = {"adapter": "lora", "rank": 4, "batch_size": 4, "iterations": 3, "timesteps": [0.0, 1.0]}
    arguments += [part for key, value in tiny.items() for part in ("--set", f"finetune.{key}={json.dumps(value)}")]
    shown = mitune(*arguments, cwd=tmp_path)
    assert "report.html" in shown
    run = tmp_path / "run"
    assert (run / "round-2" / "adapters" / "contrast" / "pytorch_lora_weights.safetensors").is_file()
    rows = pq.read_table(run / "eval" / "images.parquet").to_pydict()
    assert sorted(set(rows["variant"])) == ["base", "contrast"]
    assert len(rows["variant"]) == 2 * 2 * 2
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file() and f.name != "cost.json"}
    mitune(*arguments, cwd=tmp_path)
    after = {f: f.read_bytes() for f in run.rglob("*") if f.is_file() and f.name != "cost.json"}
    assert {f for f in before if before[f] != after[f]} <= {run / "report.html"}
    shown = mitune(*arguments, "-M", 5, cwd=tmp_path, status=2)
    assert "holds a run of other settings (pool.candidates: 4 there, 5 now)" in shown
    mitune("eval", "run", "--guidance", 1.5, cwd=tmp_path)
    judged = pq.read_table(run / "eval" / "images.parquet").to_pydict()
    assert sorted(set(judged["variant"])) == ["base", "base, guidance 1.5", "contrast"]
    (run / "report.html").unlink()
    mitune("report", "run", cwd=tmp_path)
    assert "guidance 1.5" in (run / "report.html").read_text()


@pytest.mark.slow
def test_the_steps_alone(tmp_path):
    """A set is made and trained on, and the model with the adapter merged is an ordinary folder again."""
    (tmp_path / "prompts.txt").write_text("a red circle and a blue square\n")
    mitune("pool", "-p", "prompts.txt", "-M", 2, "--set", "model.steps=3", "-r", "run", cwd=tmp_path)
    (made,) = (tmp_path / "run" / "sets").iterdir()
    tiny = ["finetune.rank=4", "finetune.batch_size=2", "finetune.iterations=2", "finetune.warmup=0"]
    options = [part for setting in tiny for part in ("--set", setting)]
    mitune("train", made, "-o", "adapter", "--fused", "whole", *options, cwd=tmp_path)
    shown = mitune("generate", "a red circle", "-m", "whole", "-n", 1, "-o", "images", cwd=tmp_path)
    assert "self-confidence" in shown


@pytest.mark.slow
def test_generate_and_score(tmp_path):
    mitune("generate", "a red circle and a blue square", "-n", 2, "-o", "images", cwd=tmp_path)
    picture = tmp_path / "images" / "001-002.png"
    right = mitune("score", picture, "a red circle and a blue square", "--heat-map", "map.png", cwd=tmp_path)
    assert "nats" in right
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_train_takes_the_model_that_made_the_set(tmp_path):
    """shapes-sd3, though the default is another; which is refused, as is a picture that was changed."""
    small = ["--set", "finetune.rank=2", "--set", "finetune.batch_size=2", "--set", "finetune.iterations=1"]
    (tmp_path / "one.txt").write_text("a red circle\n")
    few = ["-M", "2", "-s", "random", "--set", "model.steps=2", "--run", "run"]
    mitune("pool", "-m", "shapes-sd3", "-p", "one.txt", *few, cwd=tmp_path)
    shown = mitune("train", "run/sets/random", "-o", "adapter", *small, cwd=tmp_path)
    assert "The set was made by shapes-sd3; the adapter will be one for it." in shown
    assert 'base_model: "shapes-sd3"' in (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    shown = mitune("train", "run/sets/random", "-m", "shapes-sd", "-o", "other", *small, cwd=tmp_path, status=2)
    assert "The set was made by shapes-sd3 and cannot train shapes-sd; name its own model with --model." in shown
    picture = next((tmp_path / "run" / "sets" / "random").glob("*.png"))
    picture.write_bytes(picture.read_bytes()[:-9])
    shown = mitune("train", "run/sets/random", "-o", "adapter", *small, cwd=tmp_path, status=2)
    assert f"{picture.name} of this fine-tuning set are missing or damaged" in shown
    mitune("pool", "-m", "shapes-sd3", "-p", "one.txt", *few, cwd=tmp_path)
    mitune("train", "run/sets/random", "-o", "adapter", *small, cwd=tmp_path)
