"""Matrix products in two ways: float32 vectors, or bfloat16 on AMX tiles with float32 sums.

A matrix is laid out once as a left or a right factor and then multiplied, whole or in parts, several times. On
tiles, rows, columns and the places where factors are cut are multiples of STEP.
"""

from typing import Any, NamedTuple

import numpy as np

from hybrid.demo.trainer.kernels.amx import LANES, STEP, round_pair, round_row, tile_product
from hybrid.demo.trainer.kernels.gemm import Array, clear, gemm, jit, transpose, whole_tiles
from offload.kernels.tiles import configure_tiles, release_tiles


class Products(NamedTuple):
    """One way to multiply, as compiled functions.

    left(x [M,K]), right(x [K,N]): float32 matrices as factors, perhaps without copying them; left_turned(x [K,M]),
    right_turned(x [N,K]): their transposes. columns(left, i, j) and rows(right, i, j): the part for i <= k < j; rows
    of a left factor and columns of a right one are cut as any array's.
    multiply(left, right, out, add): out [M,N] = (or, `add`, +=) the product. begin(), end(): around a thread's work.
    `step`: what sizes must be a multiple of.
    """

    step: int

    begin: Any
    end: Any
    left: Any
    right: Any
    left_turned: Any
    right_turned: Any
    columns: Any
    rows: Any
    multiply: Any


@jit
def _nothing() -> None:
    pass


@jit
def _same(x: Array) -> Array:
    return x


@jit
def _view_turned(x: Array) -> Array:
    return x.T


@jit
def _turned(x: Array) -> Array:
    """A copy: `gemm` wants the rows of a right factor contiguous, and columns in whole tiles."""
    out = np.zeros((x.shape[1], whole_tiles(x.shape[0])), x.dtype)
    transpose(x, out)
    return out[:, : x.shape[0]]


@jit
def _columns(x: Array, first: int, last: int) -> Array:
    return x[:, first:last]


@jit
def _rows(x: Array, first: int, last: int) -> Array:
    return x[first:last]


@jit
def _multiply(a: Array, b: Array, out: Array, add: bool) -> None:
    if not add:
        clear(out)
    gemm(a, b, out, out.shape[1])


VECTORS = Products(1, _nothing, _nothing, _same, _same, _view_turned, _turned, _columns, _rows, _multiply)


@jit
def _begin_tiles() -> None:
    configure_tiles()


@jit
def _end_tiles() -> None:
    release_tiles()


@jit
def _left_tiles(x: Array) -> Array:
    """Each row's bfloat16, two in an element."""
    out = np.empty((x.shape[0], x.shape[1] // 2), np.uint32)
    for i in range(x.shape[0]):
        round_row(x.ctypes.data + i * x.strides[0], x.shape[1], out.ctypes.data + i * out.strides[0])
    return out


@jit
def _right_tiles(x: Array) -> Array:
    """Pairs of rows as one row of elements. Rows are a little apart, so as not to share a cache set each."""
    out = np.empty((x.shape[0] // 2, x.shape[1] + LANES), np.uint32)
    for i in range(out.shape[0]):
        row = x.ctypes.data + 2 * i * x.strides[0]
        round_pair(row, row + x.strides[0], x.shape[1], out.ctypes.data + i * out.strides[0])
    return out[:, : x.shape[1]]


@jit
def _turned_elements(x: Array) -> Array:
    out = np.empty((x.shape[1], x.shape[0] + LANES), np.uint32)
    transpose(x, out)
    return out[:, : x.shape[0]]


@jit
def _left_turned_tiles(x: Array) -> Array:
    return _turned_elements(_right_tiles(x))


@jit
def _right_turned_tiles(x: Array) -> Array:
    return _turned_elements(_left_tiles(x))


@jit
def _columns_tiles(x: Array, first: int, last: int) -> Array:
    return x[:, first // 2 : last // 2]


@jit
def _rows_tiles(x: Array, first: int, last: int) -> Array:
    return x[first // 2 : last // 2]


@jit
def _multiply_tiles(a: Array, b: Array, out: Array, add: bool) -> None:
    (m, n), k = out.shape, 2 * a.shape[1]
    places = a.ctypes.data, b.ctypes.data, out.ctypes.data
    tile_product(m, n, k, places[0], a.strides[0], places[1], b.strides[0], places[2], out.strides[0], add)


TILES = Products(
    STEP, _begin_tiles, _end_tiles, _left_tiles, _right_tiles, _left_turned_tiles, _right_turned_tiles,
    _columns_tiles, _rows_tiles, _multiply_tiles,
)  # fmt: skip
