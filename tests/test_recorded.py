"""The structure of the code may change; the figures of a run may not."""

import json

import numpy as np
import pytest

from tests.recorded import FILE, MODELS, figures, small_run

ROUNDING = 1e-3  # of a column's largest value: what another processor's arithmetic may change in so short a run


@pytest.mark.parametrize("model", MODELS)
def test_the_figures_are_those_recorded(model, tmp_path):
    recorded, now = json.loads(FILE.read_text())[model], figures(small_run(model, tmp_path))
    assert set(recorded) - set(now) == set()
    for name, values in recorded.items():
        assert now[name] == pytest.approx(values, abs=ROUNDING * np.abs(values).max()), name
