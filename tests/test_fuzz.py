"""A sample of `fuzz.py`."""

from . import fuzz, fuzz_general, fuzz_losses


def test_random_inputs_survive(backend):
    assert fuzz.lost(range(300), backend) == []


def test_the_fuzz_can_fail(monkeypatch, backend):
    wrong = {dtype: (loss / 1e6, gradient / 1e6) for dtype, (loss, gradient) in fuzz.TOLERANCE.items()}
    monkeypatch.setattr(fuzz, "TOLERANCE", wrong)
    assert fuzz.lost(range(10), backend)


def test_random_ranges_labels_and_extra_columns_survive(backend):
    assert fuzz.lost(range(300), backend, fuzz_general.draw, fuzz_general.survives) == []


def test_random_losses_survive(backend):
    assert fuzz.lost(range(100), backend, fuzz_losses.draw, fuzz_losses.survives) == []
