"""The first random inputs of `fuzz.py`, `fuzz_general.py` and `fuzz_losses.py`."""

import pytest

from . import fuzz, fuzz_general, fuzz_losses

PARTS = range(0, 300, 30)


def test_nt_xent_of_random_inputs_is_within_the_tolerance(backend):
    assert fuzz.failing(range(300), backend) == []


def test_inputs_fail_with_a_tolerance_that_is_too_tight(monkeypatch, backend):
    wrong = {dtype: (loss / 1e6, gradient / 1e6) for dtype, (loss, gradient) in fuzz.TOLERANCE.items()}
    monkeypatch.setattr(fuzz, "TOLERANCE", wrong)
    assert fuzz.failing(range(10), backend)


@pytest.mark.parametrize("first", PARTS)
def test_random_ranges_labels_and_extra_columns_are_within_the_tolerance(first, backend):
    assert fuzz.failing(range(first, first + 30), backend, fuzz_general.draw, fuzz.agrees_with_reference) == []


@pytest.mark.parametrize("first", PARTS)
def test_random_losses_are_within_the_tolerance(first, backend):
    assert fuzz.failing(range(first, first + 10), backend, fuzz_losses.draw, fuzz.agrees_with_reference) == []
