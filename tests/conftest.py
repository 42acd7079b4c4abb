"""What holds for every test."""

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the tests' networks are tiny: threads would only wait for each other


@pytest.fixture(autouse=True)
def nothing_stays_changed():
    """A test may seed torch's generator and import a user's file `mine.py`, which are put back; whatever else is global
    it must leave as it was."""
    before, path = _global_state(), list(sys.path)
    with torch.random.fork_rng():
        yield
    sys.path[:] = path
    sys.modules.pop("mine", None)
    after = _global_state()
    # Libraries set further variables for themselves, when they are first used.
    assert {name: after.get(name) for name in before if before[name] != after.get(name)} == {}


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    """A saved Stable Diffusion, to be read alone."""
    from tests.tiny import tiny_sd

    folder = tmp_path_factory.mktemp("sd")
    tiny_sd().save_pretrained(folder)
    return folder


def _global_state() -> dict[str, object]:
    environment = {f"${name}": value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return environment | {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "folder": os.getcwd(),
    }


_OUTCOMES: dict[tuple[str, str], str] = {}  # passed, failed or skipped, by test function and parameters
_REFUSED: list[str] = []


def pytest_addoption(parser):
    parser.addoption("--support-table", type=Path, help="Write what the families' tests gave into this file.")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if hasattr(item, "callspec") and (call.when == "call" or report.outcome != "passed"):
        _OUTCOMES[item.originalname, item.callspec.id] = report.outcome
        if ("refused", True) in item.user_properties:
            _REFUSED.append(item.callspec.id)
    return report


def pytest_sessionfinish(session):
    file = session.config.getoption("--support-table")
    if file is not None:
        from tests.support import write

        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("diffusers", "torch", "peft"))
        write(file, _OUTCOMES, _REFUSED, versions)
