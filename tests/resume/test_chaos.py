"""A short version of ``tests/chaos.py``, which kills 50 times."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import Chaos


@pytest.mark.slow
def test_killed_ranks_cost_a_run_nothing_but_time(tmp_path: Path) -> None:
    """Two kills, one of them while something is being written."""
    assert Chaos(tmp_path, kills=2, ranks=2, seed=0, steps=6).run()
