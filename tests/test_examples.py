"""The examples of docstrings and of the README say what the code does."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from structure import ROOT, sources

MODULES = [name for name, path in sources("hybridsd_sim").items() if ">>> " in path.read_text(encoding="utf-8")]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def output_of(word: str, folder: Path) -> str:
    """What the README's block with this word prints, run as a user would."""
    (block,) = [block for block in BLOCKS if word in block]
    return subprocess.run([sys.executable, "-c", block], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_a_module_come_out_as_written(module: str) -> None:
    """Each `>>>` of a docstring."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        failed, tried = doctest.testmod(importlib.import_module(module))
    assert tried > 0
    assert failed == 0, printed.getvalue()


def test_the_example_of_the_scheduler_decides() -> None:
    """It reads the shipped example plan."""
    action, worker, *_ = output_of("Scheduler", ROOT).split()
    assert action == "run"
    assert worker


@pytest.mark.slow
def test_the_example_of_a_plan_writes_its_report(tmp_path: Path) -> None:
    """It plans the quickstart whole."""
    assert "Rent 3 x a100" in output_of("optimize(", tmp_path)
    assert (tmp_path / "reports/quickstart/index.html").exists()
