"""The README's example of the scheduler in a serving system runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_embed_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From the shipped example plan to a decision that it prints, in no more than ten lines of code."""
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (example,) = [block for block in blocks if re.match(r"from hybridsd_sim import .*\bScheduler\b", block)]
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)  # noqa: S102 -- the project's own text

    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    assert names["decision"].reason == "planned"  # type: ignore[attr-defined]
    assert names["scheduler"].open_decisions == 0  # type: ignore[attr-defined]
    assert capsys.readouterr().out.startswith("run a100/0 ")
