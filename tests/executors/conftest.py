"""Executors are tested on one thread: the same rounding everywhere, and small tensors gain nothing from more."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Keep torch from waking a second core for a few microseconds of work."""
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
