"""The rows of a linear program, gathered one by one and handed to scipy as one sparse matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import LinearConstraint
from scipy.sparse import coo_array

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Part = tuple[int, Ints, Floats]
"""Some entries of a row: its number, their columns and their weights."""


class Rows:
    """Rows of `A x <= b`, gathered in parts. Load rows keep their work apart, so that headroom can scale it."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._most: list[float] = []
        self._scaled: list[Part] = []

    def at_most(self, columns: Sequence[int] | Ints, weights: Sequence[float] | Floats, most: float) -> None:
        self._parts.append(self._part(columns, weights))
        self._most.append(most)

    def load(self, columns: Sequence[int] | Ints, asked: Floats, given: Floats) -> None:
        """`headroom * asked x + given z <= 0`."""
        self._scaled.append(self._part(columns[: len(asked)], asked))
        self._parts.append(self._part(columns[len(asked) :], given))
        self._most.append(0.0)

    def _part(self, columns: Sequence[int] | Ints, weights: Sequence[float] | Floats) -> Part:
        return len(self._most), np.asarray(columns, dtype=np.int64), np.asarray(weights, dtype=np.float64)

    def with_headroom(self, headroom: float) -> Rows:
        """A copy whose loads are multiplied, to which more rows may be added."""
        rows = Rows()
        rows._parts = [*self._parts, *((row, columns, weights * headroom) for row, columns, weights in self._scaled)]
        rows._most = list(self._most)
        return rows

    def constraint(self, size: int) -> LinearConstraint:
        rows = np.repeat([row for row, _, _ in self._parts], [len(columns) for _, columns, _ in self._parts])
        columns = np.concatenate([columns for _, columns, _ in self._parts])
        weights = np.concatenate([weights for _, _, weights in self._parts])
        matrix = coo_array((weights, (rows, columns)), shape=(len(self._most), size)).tocsr()
        return LinearConstraint(matrix, ub=np.array(self._most))
