"""float64 oracle of block-fp8, from the format's definition (OCP 8-bit floating point, E4M3) and in plain numpy."""

import numpy as np
from numpy.typing import NDArray


def decode_table() -> NDArray[np.float64]:
    """The value of each of the 256 codes: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7F and 0xFF are NaN."""
    values = np.empty(256)
    for code in range(256):
        exponent, mantissa = (code >> 3) & 15, code & 7
        magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values[code] = np.nan if code & 0x7F == 0x7F else magnitude
        values[code] *= -1 if code & 0x80 else 1
    return values


def dequantize(codes: NDArray[np.uint8], scale: NDArray[np.float32]) -> NDArray[np.float64]:
    """[out, in]: one element after another, its block found by division."""
    rows, columns = np.indices(codes.shape)
    return decode_table()[codes] * scale.astype(np.float64)[rows // 128, columns // 128]


def nearest(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each of `values` (magnitude up to 448) rounded to the closest value of a code; ties to the even mantissa."""
    codes = np.arange(127)
    positive = decode_table()[codes]
    above = np.searchsorted(positive, np.abs(values)).clip(0, 126)
    below = (above - 1).clip(0)
    gap = (positive[above] - np.abs(values)) - (np.abs(values) - positive[below])
    take_above = (gap < 0) | ((gap == 0) & (codes[above] % 2 == 0))
    return np.copysign(np.where(take_above, positive[above], positive[below]), values)
