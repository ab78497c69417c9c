"""Advice to the operating system about mapped weights: what will be needed, and on which NUMA node."""

import ctypes
import mmap
from collections.abc import Sequence

from offload.fp8 import Weight

_libc = ctypes.CDLL(None)
_SET_MEMPOLICY, _DEFAULT, _PREFERRED = 238, 0, 1
_MASK_BITS = 1024
_PART = 512 << 10


def will_need(weight: Weight, nodes: Sequence[int] = (0,)) -> None:
    """Have a mapped weight read ahead of its use, all of it at once. Only advice: it may be ignored.

    Args:
        nodes: NUMA nodes: the n-th Nth of its rows is best put into the n-th's memory (offload/workers.py).
            What the page cache holds already stays where it is.
    """
    rows = weight.shape[0]
    row_bytes = weight.data.nbytes // rows
    for number, node in enumerate(nodes):
        first, last = rows * number // len(nodes), rows * (number + 1) // len(nodes)
        if len(nodes) > 1:
            _prefer(node)
        _advise(weight.data.data_ptr() + first * row_bytes, (last - first) * row_bytes)
    if len(nodes) > 1:
        _libc.syscall(_SET_MEMPOLICY, _DEFAULT, None, 0)


def _advise(start: int, size: int) -> None:
    """In small parts: of a longer one Linux reads no more than the larger of its readahead window and the disk's
    longest request."""
    first = start & ~(mmap.PAGESIZE - 1)
    for page in range(first, start + size, _PART):
        _libc.madvise(
            ctypes.c_void_p(page), ctypes.c_size_t(min(_PART, start + size - page)), mmap.MADV_WILLNEED
        )


def _prefer(node: int) -> None:
    """The calling thread's new pages, those it reads from files among them, come from this node if it has any."""
    mask = (ctypes.c_ulong * (_MASK_BITS // 64))()
    mask[node // 64] = 1 << (node % 64)
    _libc.syscall(_SET_MEMPOLICY, _PREFERRED, ctypes.byref(mask), ctypes.c_ulong(_MASK_BITS + 1))
