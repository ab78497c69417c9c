"""`CpuKernels`: the compiled kernels of one level and the worker threads they run on."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload.errors import WorkerError
from offload.fp8 import Weight
from offload.kernels.arrange import padded_columns
from offload.kernels.experts import EXPERTS, TABLE_COLUMNS, down_rows, experts_job, space_offsets
from offload.kernels.jit import Static
from offload.kernels.levels import choose_level
from offload.kernels.linear import LINEAR, MAX_ABSORBED_COLUMNS, SCRATCH_BYTES, absorb_job, linear_job
from offload.kernels.prefill import PREFILL, prefill_job, prefill_offsets
from offload.kernels.project import BF16_NUMBER, F32_NUMBER, FP8_NUMBER, compile_project
from offload.kernels.scan import CHUNK, SCAN, scan_job
from offload.kernels.tile_linear import TILE_LINEAR, tile_linear_job
from offload.kernels.tile_product import TILES_BYTES, WORTHWHILE, chunk_rows
from offload.workers import Workers

_NUMBERS = {
    torch.float8_e4m3fn: FP8_NUMBER,
    torch.bfloat16: BF16_NUMBER,
    torch.float32: F32_NUMBER,
}
_KERNELS: dict[str, Callable[[Static], Any]] = {
    "project": compile_project,
    "experts": experts_job,
    "linear": linear_job,
    "absorb": absorb_job,
    "scan": lambda _: scan_job(),
}
_TILE_KERNELS: dict[str, Callable[[Static], Any]] = {"prefill": prefill_job, "tile_linear": tile_linear_job}
CHUNK_BYTES = 256 << 10  # of weights, a chunk of a linear layer
KEPT_SPACE = 16 << 20  # a decode step of some dozens of sequences at K2's sizes


def format_number(weight: Weight) -> int:
    """The number by which compiled code knows `weight`'s format."""
    return _NUMBERS[weight.data.dtype]


def addresses(weight: Weight) -> tuple[int, int]:
    """Addresses of a weight's data and scales (any readable address where it has none)."""
    assert weight.data.is_contiguous()
    data = weight.data.data_ptr()
    return data, data if weight.scale is None else weight.scale.data_ptr()


def _record(dtype: Any, **fields: int) -> "np.ndarray[Any, Any]":
    """One record of `dtype` with all its fields given."""
    return np.array([tuple(fields[name] for name in dtype.names)], dtype)


def _strided(x: Tensor) -> Tensor:
    """`x` in float32 with unit stride in its last dimension, without a copy where it already is."""
    assert x.dtype == torch.float32, x.dtype
    return x if x.stride(-1) == 1 else x.contiguous()


class CpuKernels:
    """Products with weights in the checkpoint's own bytes, on worker threads.

    A decode row's result has the same bits whatever other rows share the call, a prefill row's also depends on
    whether the call runs on tiles; neither on the number of threads.
    `decode` says which rows a call is of: prefill's take AMX tiles, which sum in another order, where there are and
    a matrix meets enough of them. One call at a time runs; further callers wait.

    Args:
        threads: lanes, the calling thread included; None: one for each physical core allowed.
        level: a name of levels.LEVELS; None: the best this CPU runs.

    Raises:
        UsageError: the level does not exist or needs features this CPU lacks.
        WorkerError: the threads cannot be started.
    """

    def __init__(self, threads: int | None = None, level: str | None = None) -> None:
        chosen = choose_level(level)
        self.level = chosen.name
        self._level = Static(chosen)
        self._kernels = _KERNELS | (_TILE_KERNELS if chosen.tiles else {})
        self._addresses: dict[str, int] = {}
        self.workers = Workers(threads)
        self.threads = self.workers.threads
        self._scratch = np.zeros(self.threads * SCRATCH_BYTES + 64, np.uint8)
        self._scratch_address = (self._scratch.ctypes.data + 63) // 64 * 64
        self._space = torch.empty(0, dtype=torch.uint8)
        self._tile_scratch = torch.empty(self.threads * TILES_BYTES if chosen.tiles else 0, dtype=torch.uint8)

    def warm_up(self) -> None:
        """Compile every kernel, or load it from the cache, so that no later call has to."""
        for name in self._kernels:
            self._address(name)

    @property
    def warmed(self) -> float:
        """How much of `warm_up` is done, 0 to 1; may be asked from another thread."""
        return len(self._addresses) / len(self._kernels)

    def _address(self, name: str) -> int:
        """A compiled kernel's address, compiled on first use."""
        if name not in self._addresses:
            self._addresses[name] = self._kernels[name](self._level).address
        return self._addresses[name]

    def run(self, job_address: int, args_address: int) -> None:
        """Run another compiled job on the same workers (offload/workers.py shows how to write one)."""
        self.workers.run(job_address, args_address)

    def _grouped(
        self,
        job: str,
        x: Tensor,
        weight: Weight,
        y: Tensor,
        *,
        groups: int,
        group_rows: int,
        first: int,
        rows: int,
    ) -> Tensor:
        """Run a job over LINEAR: x and y are [T, groups, any]."""
        columns = weight.shape[1]
        row_bytes = columns * weight.data.element_size()
        share = -(-rows // (4 * self.threads))  # at least four chunks a lane
        chunk = min(128, max(4, min(CHUNK_BYTES // row_bytes, share) // 4 * 4))
        tokens = x.shape[0]
        arranged, factors = (
            torch.empty(tokens * groups, padded_columns(columns)),
            torch.empty(tokens * groups),
        )
        data, scale = addresses(weight)
        args = _record(
            LINEAR,
            number=format_number(weight), data=data, scale=scale, rows=rows, columns=columns,
            groups=groups, group_rows=group_rows, first=first, chunk=chunk, tokens=tokens,
            x=x.data_ptr(), x_stride=4 * x.stride(0), x_group=4 * x.stride(1),
            y=y.data_ptr(), y_stride=4 * y.stride(0), y_group=4 * y.stride(1),
            arranged=arranged.data_ptr(), factors=factors.data_ptr(),
            scratch=self._scratch_address, project=self._address("project"),
        )  # fmt: skip
        self.workers.run(self._address(job), args.ctypes.data)
        return y

    def linear(self, x: Tensor, weight: Weight, *, decode: bool = True) -> Tensor:
        """x W^T: float32 [T, in] times [out, in] -> float32 [T, out]."""
        rows, columns = weight.shape
        assert x.ndim == 2 and x.shape[1] == columns, (x.shape, weight.shape)
        x = _strided(x)
        y = torch.empty(x.shape[0], rows)
        if not decode and self._on_tiles(len(x), weight):
            self._linear_on_tiles(x, weight, y)
            return y
        self._grouped("linear", x[:, None], weight, y[:, None], groups=1, group_rows=rows, first=0, rows=rows)
        return y

    def _on_tiles(self, rows: int, *weights: Weight, matrices: Tensor | None = None) -> bool:
        """Whether prefill's products of so many rows with weights like these run on AMX tiles: each matrix (of the
        ids `matrices`; None: the only one) meets enough of them."""
        fp8 = all(weight.data.dtype == torch.float8_e4m3fn for weight in weights)
        if not self._level.value.tiles or not fp8:
            return False
        touched = 1 if matrices is None else len(matrices.unique())
        return rows >= max(1, WORTHWHILE * touched)

    def _linear_on_tiles(self, x: Tensor, weight: Weight, y: Tensor) -> None:
        (rows, columns), (data, scale) = weight.shape, addresses(weight)
        scales, order = torch.empty(len(x)), torch.arange(len(x))
        args = _record(
            TILE_LINEAR,
            data=data, scale=scale, rows=rows, columns=columns, chunk=chunk_rows(rows, self.threads),
            tokens=len(x), x=x.data_ptr(), x_stride=4 * x.stride(0), y=y.data_ptr(), y_stride=4 * rows,
            scales=scales.data_ptr(), order=order.data_ptr(), scratch=self._tile_scratch.data_ptr(),
        )  # fmt: skip
        self.workers.run(self._address("tile_linear"), args.ctypes.data)

    def absorb_query(self, q_nope: Tensor, kv_b: Weight, v_head_dim: int) -> Tensor:
        """q_nope W_UK, head by head.

        Args:
            q_nope: float32 [T, heads, nope].
            kv_b: [heads * (nope + v_head_dim), latent]; each head's first `nope` rows are its W_UK.

        Returns:
            float32 [T, heads, latent].
        """
        tokens, heads, nope = q_nope.shape
        assert kv_b.shape[0] == heads * (nope + v_head_dim), (q_nope.shape, kv_b.shape)
        assert kv_b.shape[1] <= MAX_ABSORBED_COLUMNS, kv_b.shape
        y = torch.empty(tokens, heads, kv_b.shape[1])
        return self._grouped(
            "absorb",
            _strided(q_nope),
            kv_b,
            y,
            groups=heads,
            group_rows=nope + v_head_dim,
            first=0,
            rows=nope,
        )

    def expand_value(self, o_latent: Tensor, kv_b: Weight, nope_head_dim: int) -> Tensor:
        """W_UV o_latent, head by head.

        Args:
            o_latent: float32 [T, heads, latent].
            kv_b: [heads * (nope_head_dim + v), latent]; each head's last `v` rows are its W_UV.

        Returns:
            float32 [T, heads, v].
        """
        tokens, heads, latent = o_latent.shape
        group_rows = kv_b.shape[0] // heads
        assert kv_b.shape == (heads * group_rows, latent) and group_rows > nope_head_dim, (
            o_latent.shape,
            kv_b.shape,
        )
        values = group_rows - nope_head_dim
        y = torch.empty(tokens, heads, values)
        return self._grouped(
            "linear",
            _strided(o_latent),
            kv_b,
            y,
            groups=heads,
            group_rows=group_rows,
            first=nope_head_dim,
            rows=values,
        )

    def swiglu_mlp(self, x: Tensor, gate: Weight, up: Weight, down: Weight, *, decode: bool = True) -> Tensor:
        """down (silu(gate x) * up x): float32 [T, hidden] -> float32 [T, hidden]."""
        table = np.array([[*addresses(gate), *addresses(up), *addresses(down)]], np.int64)
        only = torch.zeros(x.shape[0], 1, dtype=torch.int64)
        return self.experts(x, table, (gate, up, down), only, torch.ones(x.shape[0], 1), decode=decode)[0]

    def experts(
        self,
        x: Tensor,
        table: np.ndarray[Any, np.dtype[np.int64]],
        like: tuple[Weight, Weight, Weight],
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        decode: bool = True,
    ) -> tuple[Tensor, int]:
        """The weighted sum of each token's experts, added by ascending expert.

        Args:
            x: float32 [T, hidden].
            table: int64 [experts, 6], addresses of each expert's gate, up and down, data and scale.
            like: gate, up and down of one expert: all have its shapes and formats.
            topk_ids, topk_weights: int64 and float32 [T, k]: rows of `table`, and what their results are times.

        Returns:
            float32 [T, hidden], and how many experts were touched.

        Raises:
            WorkerError: an id is no row of `table`, or a worker failed.
        """
        gate, up, down = like
        intermediate, hidden = gate.shape
        assert up.data.dtype == gate.data.dtype, (up.data.dtype, gate.data.dtype)
        assert up.shape == gate.shape and down.shape == (hidden, intermediate), (
            gate.shape,
            up.shape,
            down.shape,
        )
        tokens, top_k = topk_ids.shape
        assert x.shape == (tokens, hidden) and topk_weights.shape == (tokens, top_k), (
            x.shape,
            topk_ids.shape,
        )
        assert table.shape[1] == TABLE_COLUMNS and topk_ids.dtype == torch.int64, (
            table.shape,
            topk_ids.dtype,
        )
        if tokens == 0:
            return torch.zeros(0, hidden), 0
        x, ids, weights = _strided(x), topk_ids.contiguous(), _strided(topk_weights).contiguous()
        y = torch.empty(tokens, hidden)
        sizes = len(table), top_k, tokens, hidden, intermediate
        given = {
            "table": table.ctypes.data, "count": len(table), "hidden": hidden, "intermediate": intermediate,
            "ids": ids.data_ptr(), "weights": weights.data_ptr(), "top_k": top_k, "tokens": tokens,
            "x": x.data_ptr(), "x_stride": 4 * x.stride(0), "y": y.data_ptr(), "y_stride": 4 * hidden,
        }  # fmt: skip
        if not decode and self._on_tiles(topk_ids.numel(), *like, matrices=topk_ids):
            return y, self._run_with_space(
                "prefill", PREFILL, prefill_offsets(*sizes), **given, scratch=self._tile_scratch.data_ptr(),
                up_rows=chunk_rows(intermediate, self.threads), down_rows=chunk_rows(hidden, self.threads),
            )  # fmt: skip
        return y, self._run_with_space(
            "experts", EXPERTS, space_offsets(*sizes), **given, scratch=self._scratch_address,
            up_number=format_number(up), down_number=format_number(down), project=self._address("project"),
            down_rows=down_rows(hidden, self.threads),
        )  # fmt: skip

    def _run_with_space(self, job: str, dtype: Any, offsets: tuple[int, ...], **given: int) -> int:
        """Run a job whose record ends in its own space, at these offsets; -> experts touched."""
        *begins, size = offsets
        space = self._space_of(size)
        base = space.data_ptr()
        own = {name: base + begin for name, begin in zip(dtype.names[-len(begins) :], begins, strict=True)}
        args = _record(dtype, touched=0, **given, **own)
        try:
            self.workers.run(self._address(job), args.ctypes.data)
        except WorkerError:
            if args["touched"][0] < 0:
                raise WorkerError(
                    f"topk_ids hold an id that is none of the {given['count']} experts"
                ) from None
            raise
        return int(args["touched"][0])

    def _space_of(self, size: int) -> Tensor:
        """At least `size` bytes for a job's own use, kept from call to call as long as it is small."""
        if len(self._space) >= size:
            return self._space
        space = torch.empty(size, dtype=torch.uint8)
        if size <= KEPT_SPACE:
            self._space = space
        return space

    def hold_nan(self, weights: Sequence[Weight]) -> list[bool]:
        """For each fp8 weight, whether a code is NaN (0x7F or 0xFF); reads them all."""
        ranges: list[tuple[int, int]] = []
        owners: list[int] = []
        for i, weight in enumerate(weights):
            assert weight.data.dtype == torch.float8_e4m3fn, weight.data.dtype
            start, nbytes = weight.data.data_ptr(), weight.data.nbytes
            ranges += [(start + at, min(CHUNK, nbytes - at)) for at in range(0, nbytes, CHUNK)]
            owners += [i] * (len(ranges) - len(owners))
        table, found = np.array(ranges, np.int64), np.zeros(len(ranges), np.uint8)
        args = np.array([(len(ranges), table.ctypes.data, found.ctypes.data)], SCAN)
        self.workers.run(self._address("scan"), args.ctypes.data)
        counts = np.bincount(owners, found, minlength=len(weights))
        return [bool(count) for count in counts]

    def close(self) -> None:
        """Stop the worker threads."""
        self.workers.close()
