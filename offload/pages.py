"""Advice to the operating system about mapped weights."""

import ctypes
import mmap

from offload.fp8 import Weight

_libc = ctypes.CDLL(None)


def will_need(weight: Weight) -> None:
    """Have a mapped weight read ahead of its use, all of it at once. Only advice: it may be ignored."""
    start = weight.data.data_ptr()
    page = start & ~(mmap.PAGESIZE - 1)
    length = start + weight.data.nbytes - page
    _libc.madvise(ctypes.c_void_p(page), ctypes.c_size_t(length), mmap.MADV_WILLNEED)
