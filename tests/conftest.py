"""What holds for every test."""

import importlib.metadata
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the tests' networks are tiny: threads would only wait for each other

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
