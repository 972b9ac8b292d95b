"""An s-t minimum cut of non-negative real capacities, by `scipy.sparse.csgraph.maximum_flow`.

scipy takes 32-bit integers and wraps silently beyond them, so capacities are scaled such that even their sum fits.
Among the minimum cuts, the one with the largest source side is returned: it is unique, so the answer does not depend
on the order of vertices or edges.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

SOURCE, SINK = 0, 1
INFINITE = float("inf")
# The sum of all finite capacities after scaling; an infinite edge is one more. Both fit in 32 bits.
_TOTAL = 2**30


@dataclass
class CutProblem:
    """Vertices are ints from 2 on (0 is the source, 1 the sink); edges may repeat, their capacities add up."""

    size: int = 2
    # Arrays, not lists: numpy reads them as they are.
    heads: array[int] = field(default_factory=lambda: array("i"))
    tails: array[int] = field(default_factory=lambda: array("i"))
    capacities: array[float] = field(default_factory=lambda: array("d"))

    def vertex(self) -> int:
        self.size += 1
        return self.size - 1

    def edge(self, start: int, end: int, capacity: float) -> None:
        """Pay `capacity` when `start` is on the source's side and `end` on the sink's."""
        if capacity <= 0 or start in (end, SINK) or end == SOURCE:
            return
        if start != SOURCE or end != SINK:  # that one is paid in every cut: it would only cost digits
            self.heads.append(start)
            self.tails.append(end)
            self.capacities.append(capacity)

    def scaled(self) -> NDArray[np.int64]:
        """Capacities as integers; a positive one never becomes 0."""
        real = np.asarray(self.capacities, dtype=np.float64)
        finite = np.isfinite(real)
        # fsum: exactly rounded, so that the scale does not depend on the order of the edges.
        total = math.fsum(real[finite].tolist()) or 1.0
        room = max(_TOTAL - int(finite.sum()), 1)
        whole = np.where(finite, np.ceil(np.where(finite, real, 0.0) * (room / total)), _TOTAL + 1)
        return whole.astype(np.int64)

    def solve(self) -> NDArray[np.bool_]:
        """For each vertex, whether it is on the source's side of the largest minimum cut."""
        if not self.heads:
            alone = np.ones(self.size, dtype=np.bool_)
            alone[SINK] = False
            return alone
        whole = self.scaled()
        graph = csr_array((whole, (self.heads, self.tails)), shape=(self.size, self.size))
        graph.sum_duplicates()
        # Repeated infinite edges add up; any of them alone is infinite.
        graph.data = np.minimum(graph.data, _TOTAL + 1).astype(np.int32)
        flow = maximum_flow(graph, SOURCE, SINK).flow
        # Compared, not subtracted: a difference may leave 32 bits.
        residual = (graph > flow).astype(np.int32).T.tocsr()
        reaches_sink = breadth_first_order(residual, SINK, return_predecessors=False)
        side = np.ones(self.size, dtype=np.bool_)
        side[reaches_sink] = False
        return side
