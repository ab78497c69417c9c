"""Block-fp8 as data: e4m3 codes with one float32 scale per 128 x 128 block, ragged last blocks included.

Quantising, dequantising and `Weight`, a matrix in the checkpoint's own bytes, live here. Computing with
them does not (offload/kernels).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0


def scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of the scales of a [rows, columns] matrix: blocks down, blocks across."""
    return -(-rows // BLOCK), -(-columns // BLOCK)


def _expand(scale: Tensor, rows: int, columns: int) -> Tensor:
    """Each block's scale repeated over its elements: [rows, columns]."""
    return scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a finite float32 matrix so that each block's largest magnitude becomes 448.

    Args:
        weight: float32 [out, in].

    Returns:
        float8_e4m3fn codes [out, in] and float32 scales [ceil(out/128), ceil(in/128)], all scales normal
        and above 0 (a block of zeros has scale 1).
    """
    rows, columns = weight.shape
    down, across = scale_shape(rows, columns)
    padded = weight.new_zeros(down * BLOCK, across * BLOCK)
    padded[:rows, :columns] = weight
    amax = padded.view(down, BLOCK, across, BLOCK).abs().amax(dim=(1, 3))
    scale = torch.where(amax > 0, amax / E4M3_MAX, 1.0).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (weight / _expand(scale, rows, columns)).clamp(-E4M3_MAX, E4M3_MAX)
    return scaled.to(torch.float8_e4m3fn), scale


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """float32 [out, in]: each code of `weight` (float8_e4m3fn [out, in]) times its block's `scale`."""
    rows, columns = weight.shape
    assert tuple(scale.shape) == scale_shape(rows, columns), (scale.shape, weight.shape)
    return weight.float() * _expand(scale, rows, columns)


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix in the checkpoint's own bytes, possibly a view of a read-only mapping: never write to it.

    Args:
        data: [out, in], contiguous; float8_e4m3fn, bfloat16 or float32.
        scale: float32 [ceil(out/128), ceil(in/128)] if `data` is fp8, else None.
    """

    data: Tensor
    scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.data.shape
        return rows, columns

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.nbytes + (self.scale.nbytes if self.scale is not None else 0)

    def dequantize(self) -> Tensor:
        """float32 [out, in]."""
        return self.data.float() if self.scale is None else dequantize(self.data, self.scale)
