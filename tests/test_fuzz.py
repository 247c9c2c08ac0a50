"""A sample of the random cases of `fuzz.py`, `fuzz_general.py` and `fuzz_losses.py`, another one after each commit."""

import pytest

from . import fuzz, fuzz_general, fuzz_losses

PARTS = range(0, 300, 30)


def test_random_inputs_survive(backend):
    assert fuzz.lost(range(300), backend) == []


def test_the_fuzz_can_fail(monkeypatch, backend):
    wrong = {dtype: (loss / 1e6, gradient / 1e6) for dtype, (loss, gradient) in fuzz.TOLERANCE.items()}
    monkeypatch.setattr(fuzz, "TOLERANCE", wrong)
    assert fuzz.lost(range(10), backend)


@pytest.mark.parametrize("first", PARTS)
def test_random_ranges_labels_and_extra_columns_survive(first, backend):
    assert fuzz.lost(range(first, first + 30), backend, fuzz_general.draw, fuzz_general.survives) == []


@pytest.mark.parametrize("first", PARTS)
def test_random_losses_survive(first, backend):
    assert fuzz.lost(range(first, first + 10), backend, fuzz_losses.draw, fuzz_losses.survives) == []
