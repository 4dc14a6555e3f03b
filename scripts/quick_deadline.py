"""A plugin of pytest that skips every test that would start after a deadline: ``make quick`` keeps its time.

    PYTHONPATH=scripts python -m pytest -p quick_deadline -rs ...

The recorded seconds of ``quick_tests.py`` are those of another machine, and this one may be busy. Each worker
counts from its own start. A skipped test says so: ``make test`` runs it.
"""

from __future__ import annotations

import time

import pytest

LIMIT_S = 75.0
"""The time, in seconds from the start of a worker, after which no further test starts."""

START = time.monotonic()
"""When this process loaded the plugin, in seconds of the monotonic clock."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Skip a test before its fixtures are made."""
    if time.monotonic() - START > LIMIT_S:
        pytest.skip("make quick has no time left; make test runs this test")
