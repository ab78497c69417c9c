"""What every training kernel is made of: a small matrix product, exp and maximum of rows, and threads.

Kernels are plain loops compiled by Numba; they release the GIL, and `Crew.run` gives each thread its own
part of the work. Parts are fixed by the data alone, so sums come out in the same order on every run.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from hybrid.demo.trainer.kernels.tile import COLUMNS, MANY, tile_1, tile_4, tile_many, tile_single
from hybrid.demo.trainer.kernels.vector import exp_at, max_at

Array = NDArray[Any]

OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": True, "error_model": "numpy", "boundscheck": False}
jit = njit(**OPTIONS)


@njit("void(" + ", ".join(["intp"] * 10) + ")", **OPTIONS)
def _product(
    rows: int, depth: int, n: int, a: int, a_row: int, a_col: int, b: int, b_row: int, c: int, c_row: int
) -> None:
    """`gemm` on addresses and strides in bytes, so that it is compiled once for all layouts."""
    whole = n - n % COLUMNS
    for j in range(0, 4 * whole, 4 * COLUMNS):
        i = 0
        while i + MANY <= rows:
            tile_many(a + i * a_row, a_row, a_col, b + j, b_row, c + i * c_row + j, c_row, depth)
            i += MANY
        while i + 4 <= rows:
            tile_4(a + i * a_row, a_row, a_col, b + j, b_row, c + i * c_row + j, c_row, depth)
            i += 4
        while i < rows:
            tile_1(a + i * a_row, a_row, a_col, b + j, b_row, c + i * c_row + j, c_row, depth)
            i += 1
    for j in range(4 * whole, 4 * n, 4):
        for i in range(rows):
            tile_single(a + i * a_row, a_row, a_col, b + j, b_row, c + i * c_row + j, c_row, depth)


@jit
def gemm(a: Array, b: Array, c: Array, n: int) -> None:
    """c[:, :n] += a @ b[:, :n], float32. a [M,K] has any strides; rows of b [K,>=n] and c [M,>=n] are contiguous.

    Columns beyond the last whole tile of COLUMNS go one by one: pad n where speed matters.
    """
    (a_row, a_col), b_row, c_row = a.strides, b.strides[0], c.strides[0]
    _product(
        a.shape[0], a.shape[1], n, a.ctypes.data, a_row, a_col, b.ctypes.data, b_row, c.ctypes.data, c_row
    )


@jit
def rounded_up(n: int, step: int) -> int:
    """The least multiple of step that is not below n."""
    return (n + step - 1) // step * step


@jit
def whole_tiles(n: int) -> int:
    """n rounded up to whole tiles of columns."""
    return rounded_up(n, COLUMNS)


@jit
def clear(x: Array) -> None:
    """x [M,N] = 0. A loop: Numba takes seconds to compile an assignment to a slice."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            x[i, j] = 0


@jit
def copy(source: Array, target: Array) -> None:
    """target[:M, :N] = source [M,N]."""
    for i in range(source.shape[0]):
        for j in range(source.shape[1]):
            target[i, j] = source[i, j]


@jit
def transpose(source: Array, target: Array) -> None:
    """target[j, i] = source[i, j] for all of source [M,N]; target is [N,>=M]."""
    for i in range(source.shape[0]):
        row = source[i]
        for j in range(source.shape[1]):
            target[j, i] = row[j]


@jit
def exp_row(x: Array, n: int) -> None:
    """x[:n] = exp(x[:n]) as `exp_at` does it; x is contiguous float32."""
    exp_at(x.ctypes.data, n)


@jit
def max_row(x: Array, n: int) -> float:
    """The largest of x[:n], n >= 1; x is contiguous float32."""
    return max_at(x.ctypes.data, n)


class Crew:
    """A few threads that run the parts of one kernel side by side; the caller takes part 0."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._pool = ThreadPoolExecutor(size, thread_name_prefix="trainer")

    def run(self, kernel: Callable[..., None], bounds: Array, *args: Any) -> None:
        """kernel(part, bounds[part], bounds[part + 1], *args) for each part."""
        parts = [
            self._pool.submit(kernel, part, int(bounds[part]), int(bounds[part + 1]), *args)
            for part in range(1, len(bounds) - 1)
        ]
        kernel(0, int(bounds[0]), int(bounds[1]), *args)
        for part in parts:
            part.result()

    def each(self, kernel: Callable[..., None], tasks: Iterable[tuple[Any, ...]]) -> None:
        """kernel(*task) for each task, any order, as threads come free."""
        for task in [self._pool.submit(kernel, *task) for task in tasks]:
            task.result()

    def split(self, costs: Array) -> Array:
        """Bounds [size + 1] of contiguous parts of about equal total cost."""
        total = np.concatenate([[0], np.cumsum(costs)])
        cuts = np.searchsorted(total, total[-1] * np.arange(1, self.size) / self.size)
        return np.concatenate([[0], cuts, [len(costs)]]).astype(np.int64)
