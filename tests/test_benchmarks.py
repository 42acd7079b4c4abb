"""Every benchmark runs, at sizes at which its figures say nothing, and prints its tables."""

import importlib
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent.parent / "benchmarks"
SMALLEST = {
    "probe_overhead": "--batch 1 --steps 2 --pairs 1",
    "pool_throughput": "--prompts 1 --candidates 2 --batch 2 --steps 2 --pairs 1",
    "pool_parts": "--prompts 1 --candidates 2",
    "training": "--batch 2 --rank 2 --iterations 1",
    "memory": "--prompts 1 --candidates 2 --one 1 2",
    "scaling": "--repeats 1 --points 2",
    "full_size": "--tiny --models SD-2.1-base SD-3.5-Medium --candidates 2 --steps 3 --batch 2 --micro-batch 1 "
    "--iterations 1",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_runs(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(HERE)
    importlib.import_module(name).main(SMALLEST[name].split())
    printed = capsys.readouterr().out
    assert int(printed) > 2**20 if name == "memory" else "| --- |" in printed
    assert "nan" not in printed


@pytest.mark.slow
def test_forward_runs(monkeypatch, capsys):
    monkeypatch.syspath_prepend(HERE)
    forward = importlib.import_module("forward")
    monkeypatch.setattr(forward, "REPEATS", 1)
    monkeypatch.setattr(forward, "BATCH", 2)
    forward.main()
    torch.set_num_threads(1)  # it takes two
    assert capsys.readouterr().out.count("ms a sample") == 2


def test_every_benchmark_asks_a_question(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    performance = importlib.import_module("performance")
    assert set(performance.NAMES) == set(SMALLEST)
    for name in performance.NAMES:
        assert performance.question(HERE / f"{name}.py").endswith("?")
