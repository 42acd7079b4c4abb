"""Libraries' warnings that nobody can act on are left out; others pass."""

import logging

import pytest

from mitune.denoiser.quiet import quiet_libraries


@pytest.mark.parametrize(
    ("logger", "message", "passes"),
    [
        ("transformers.utils.import_utils", "`X` requires torchvision (not installed); falling back to `Y`", False),
        ("transformers.utils.import_utils", "`X` requires sentencepiece", True),
        ("transformers.tokenization_utils_base", "(19 > 16). This will result in indexing errors", False),
        ("transformers.tokenization_utils_base", "Keyword arguments {} not recognized.", True),
    ],
)
def test_what_is_left_out(logger, message, passes):
    quiet_libraries()
    quiet_libraries()
    record = logging.LogRecord(logger, logging.WARNING, __file__, 1, message, None, None)
    assert bool(logging.getLogger(logger).filter(record)) == passes
    assert len(logging.getLogger(logger).filters) == len(set(logging.getLogger(logger).filters))
