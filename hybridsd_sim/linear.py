"""The rows of a linear program, gathered one by one and handed to scipy as one sparse matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import LinearConstraint
from scipy.sparse import coo_array


class Rows:
    """Rows of `A x <= b`, gathered as triplets. Load rows keep their work apart, so that headroom can scale it."""

    def __init__(self) -> None:
        self._triplets: list[tuple[int, int, float]] = []
        self._most: list[float] = []
        self._scaled: list[tuple[int, int, float]] = []

    def at_most(self, columns: Sequence[int] | np.ndarray, weights: Sequence[float] | np.ndarray, most: float) -> None:
        row = len(self._most)
        self._triplets += [(row, int(c), float(w)) for c, w in zip(columns, weights, strict=True)]
        self._most.append(most)

    def load(self, columns: Sequence[int], asked: np.ndarray, given: np.ndarray) -> None:
        """`headroom * asked x + given z <= 0`."""
        row, count = len(self._most), len(asked)
        self._scaled += [(row, int(c), float(w)) for c, w in zip(columns[:count], asked, strict=True)]
        self._triplets += [(row, int(c), float(w)) for c, w in zip(columns[count:], given, strict=True)]
        self._most.append(0.0)

    def with_headroom(self, headroom: float) -> Rows:
        """A copy whose loads are multiplied, to which more rows may be added."""
        rows = Rows()
        rows._triplets = [*self._triplets, *((r, c, w * headroom) for r, c, w in self._scaled)]
        rows._most = list(self._most)
        return rows

    def constraint(self, size: int) -> LinearConstraint:
        rows, columns, weights = zip(*self._triplets, strict=True)
        matrix = coo_array((weights, (rows, columns)), shape=(len(self._most), size)).tocsr()
        return LinearConstraint(matrix, ub=np.array(self._most))
