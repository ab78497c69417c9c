"""The inner tile of `gemm` in LLVM vector IR: a few rows and columns of the result held in registers over all of k.

Plain Numba loops keep the tile in memory and reach half of this.
"""

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8
"""Floats of one vector register of this CPU."""

COLUMNS = 2 * LANES
"""Columns of the wide tiles: two vectors."""


def _make_tile(rows: int, vectors: int, lanes: int) -> Any:
    """An intrinsic for tiles of `rows` rows and `vectors` vectors of `lanes` columns."""

    @intrinsic
    def tile(typingctx: Any, a: Any, a_row: Any, a_col: Any, b: Any, b_row: Any, c: Any, c_row: Any, depth: Any) -> Any:  # noqa: ARG001  # fmt: skip
        """c[rows,columns] += a[rows,depth] @ b[depth,columns]: addresses, and strides in bytes, as intp."""
        return types.void(*[types.intp] * 8), _codegen

    def _codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        a, a_row, a_col, b, b_row, c, c_row, depth = args
        word, single = ir.IntType(64), ir.FloatType()
        vector = ir.VectorType(single, lanes)
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{lanes}f32"
        )
        zero, one = ir.Constant(word, 0), ir.Constant(word, 1)

        def vector_at(address: Any, v: int) -> Any:
            return builder.inttoptr(
                builder.add(address, ir.Constant(word, v * lanes * 4)), vector.as_pointer()
            )

        def splat(value: Any) -> Any:
            lane0 = builder.insert_element(
                ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0)
            )
            mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
            return builder.shuffle_vector(lane0, ir.Constant(vector, ir.Undefined), mask)

        entry = builder.block
        loop, done = builder.append_basic_block("k"), builder.append_basic_block("store")
        builder.cbranch(builder.icmp_signed(">", depth, zero), loop, done)

        builder.position_at_end(loop)
        k, a_k, b_k = (builder.phi(word) for _ in range(3))
        sums = [[builder.phi(vector) for _ in range(vectors)] for _ in range(rows)]
        b_vectors = [builder.load(vector_at(b_k, v), align=4) for v in range(vectors)]
        updated = []
        for r in range(rows):
            address = builder.add(a_k, builder.mul(a_row, ir.Constant(word, r)))
            scalar = splat(builder.load(builder.inttoptr(address, single.as_pointer()), align=4))
            updated.append([builder.call(fma, [scalar, b_vectors[v], sums[r][v]]) for v in range(vectors)])
        nexts = builder.add(k, one), builder.add(a_k, a_col), builder.add(b_k, b_row)
        for phi, start, following in zip((k, a_k, b_k), (zero, a, b), nexts, strict=True):
            phi.add_incoming(start, entry)
            phi.add_incoming(following, loop)
        for r in range(rows):
            for v in range(vectors):
                sums[r][v].add_incoming(ir.Constant(vector, [0.0] * lanes), entry)
                sums[r][v].add_incoming(updated[r][v], loop)
        builder.cbranch(builder.icmp_signed("<", nexts[0], depth), loop, done)

        builder.position_at_end(done)
        totals = []  # phis come first in a block
        for row_sums in updated:
            for total in row_sums:
                phi = builder.phi(vector)
                phi.add_incoming(ir.Constant(vector, [0.0] * lanes), entry)
                phi.add_incoming(total, loop)
                totals.append(phi)
        for i, total in enumerate(totals):
            row = builder.add(c, builder.mul(c_row, ir.Constant(word, i // vectors)))
            pointer = vector_at(row, i % vectors)
            builder.store(builder.fadd(builder.load(pointer, align=4), total), pointer, align=4)
        return context.get_dummy_value()

    return tile


MANY = 8 if LANES == 16 else 4
"""Rows of the large tile: enough sums for two multipliers to be busy, and all in registers (AVX2 has 16)."""

tile_many = _make_tile(MANY, 2, LANES)
tile_4 = _make_tile(4, 2, LANES)
tile_1 = _make_tile(1, 2, LANES)
tile_single = _make_tile(1, 1, 1)
