"""Several processes on one run folder, and kills at any moment: whole sets in the end, and a sentence on the way."""

import random
import signal
import subprocess
import sys
import time

import pytest

from mitune.config.schema import ModelConfig, PoolConfig
from tests.test_pool import files_of

PROMPTS = ["a red circle", "a blue square", "three green crosses", "a yellow star"]
MODEL = ModelConfig(device="cpu", steps=3)
MAKE = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)  # sums in another number of parts end in other bits
from mitune.errors import MituneError
from mitune.denoiser.opening.identity import model_identity
from mitune.denoiser.opening.models import load_model
from mitune.pool.build import build_pool
from tests.test_meetings import CONFIG, MODEL, PROMPTS
folder, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
model = load_model(MODEL)
print("ready", flush=True)
sys.stdin.readline()
try:
    made = build_pool(model, PROMPTS, folder, CONFIG, shard=(first, count), identity=model_identity(MODEL))
    print("sets" if made.sets else "shard")
except MituneError as error:
    print(error)
    sys.exit(2)
"""
CONFIG = PoolConfig(candidates=4, batch_size=4, select=("self-confidence", "random"), race="off")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert ends(start(folder, (0, 1))) == [("sets", 0)]
    return files_of(folder)


def start(folder, *shards):
    """Processes with their models open, let go at once."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MAKE, str(folder / "pool"), *map(str, shard)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for shard in shards
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    return processes


def ends(processes):
    """What each said at last, and its status; never a traceback."""
    found = []
    for process in processes:
        said, errors = process.communicate(timeout=300)
        assert "Traceback" not in errors, errors
        found.append((said.strip(), process.returncode))
    return found


@pytest.mark.slow
def test_shards_that_end_together_leave_whole_sets(tmp_path, whole):
    found = ends(start(tmp_path, (0, 3), (1, 3), (2, 3)))
    assert {status for _, status in found} == {0} and ("sets", 0) in found
    assert files_of(tmp_path) == whole


@pytest.mark.slow
def test_the_same_command_twice_is_a_sentence(tmp_path, whole):
    found = ends(start(tmp_path, (0, 1), (0, 1)))
    assert sorted(status for _, status in found) == [0, 2]
    assert any(said.startswith("Another process works on") for said, _ in found)
    assert files_of(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_kills_at_any_moment_lose_nothing(tmp_path, whole, seed):
    lot = random.Random(seed)
    for _ in range(2):
        processes = start(tmp_path, (0, 2), (1, 2))
        time.sleep(lot.uniform(0, 4))
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    assert {status for _, status in ends(start(tmp_path, (0, 2), (1, 2)))} == {0}
    assert files_of(tmp_path) == whole
