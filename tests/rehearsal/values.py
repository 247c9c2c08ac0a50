"""A pytest plugin for the rehearsal. Failed assertions in tests are ignored, since no kernel computes any values."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except AssertionError as error:
        where = error.__traceback__
        while where.tb_next is not None:
            where = where.tb_next
        if TESTS not in Path(where.tb_frame.f_code.co_filename).parents:
            raise
