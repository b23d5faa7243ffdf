"""Who goes with whom at the least cost."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def cheapest_assignment(costs: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The column of each row of a square table (N, N), all different, whose costs have the least sum; N^3 operations.

    Rows join one by one. Each takes the cheapest chain of "I take your column, you take another" that ends at a free column, by
    Dijkstra's search over costs that are kept non-negative by a price on every row and column (Jonker and Volgenant 1987, "A Shortest
    Augmenting Path Algorithm for Dense and Sparse Linear Assignment Problems"). Raises ValueError for costs that are not finite.
    """
    if costs.ndim != 2 or costs.shape[0] != costs.shape[1] or not np.isfinite(costs).all():
        raise ValueError(f"an assignment needs a square table of finite costs, got shape {costs.shape}")
    size = len(costs)
    row_prices, column_prices = np.zeros(size), np.zeros(size)
    row_of, column_of = np.full(size, -1), np.full(size, -1)
    for row in range(size):
        end, came_from = _shortest_chain(costs, row, row_prices, column_prices, row_of, column_of)
        while True:  # along the chain, backwards: each row gives its column to the one before it
            giver = came_from[end]
            row_of[end] = giver
            column_of[giver], end = end, column_of[giver]
            if giver == row:
                break
    return column_of.astype(np.int64)


def _shortest_chain(
    costs: npt.NDArray[np.float64],
    row: int,
    row_prices: npt.NDArray[np.float64],
    column_prices: npt.NDArray[np.float64],
    row_of: npt.NDArray[np.int64],
    column_of: npt.NDArray[np.int64],
) -> tuple[int, npt.NDArray[np.int64]]:
    """The free column that the chain from a new row ends at, and the row that each column was reached from. Moves the prices."""
    size = len(costs)
    distance, came_from = np.full(size, np.inf), np.full(size, -1)
    open_columns = np.ones(size, dtype=bool)
    reached, rows = 0.0, [row]
    while True:
        current = rows[-1]
        through = reached + costs[current] - row_prices[current] - column_prices
        better = open_columns & (through < distance)
        distance[better], came_from[better] = through[better], current
        end = int(np.where(open_columns, distance, np.inf).argmin())
        reached = float(distance[end])
        open_columns[end] = False
        if row_of[end] < 0:
            break
        rows.append(int(row_of[end]))
    row_prices[row] += reached
    others = np.array(rows[1:], dtype=np.int64)
    row_prices[others] += reached - distance[column_of[others]]
    closed = ~open_columns
    column_prices[closed] -= reached - distance[closed]
    return end, came_from
