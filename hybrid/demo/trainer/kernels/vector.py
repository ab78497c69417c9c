"""exp and maximum over a row in LLVM vector IR, for what Numba's own vectoriser leaves to scalar code."""

from collections.abc import Callable
from math import log
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hybrid.demo.trainer.kernels.tile import LANES

_SINGLE, _INT, _WORD = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _INTS = ir.VectorType(_SINGLE, LANES), ir.VectorType(_INT, LANES)
_TAYLOR = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)


def _floats(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [value] * LANES)


def _call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _each_vector(builder: Any, address: Any, count: Any, body: Callable[[Any, Any], None]) -> None:
    """body(pointer, mask) for each vector of `count` floats; `mask` is off beyond the last."""
    lanes = ir.Constant(_WORD, LANES)
    total = builder.sdiv(builder.add(count, ir.Constant(_WORD, LANES - 1)), lanes)
    with cgutils.for_range(builder, total) as loop:
        done = builder.mul(loop.index, lanes)
        left = builder.trunc(builder.sub(count, done), _INT)
        spread = builder.insert_element(ir.Constant(_INTS, ir.Undefined), left, ir.Constant(_INT, 0))
        spread = builder.shuffle_vector(
            spread, ir.Constant(_INTS, ir.Undefined), ir.Constant(_INTS, [0] * LANES)
        )
        mask = builder.icmp_signed("<", ir.Constant(_INTS, list(range(LANES))), spread)
        at = builder.add(address, builder.mul(done, ir.Constant(_WORD, 4)))
        body(builder.inttoptr(at, _FLOATS.as_pointer()), mask)


def _load(builder: Any, pointer: Any, mask: Any, missing: float) -> Any:
    name = f"llvm.masked.load.v{LANES}f32.p0"
    return _call(builder, name, _FLOATS, pointer, ir.Constant(_INT, 4), mask, _floats(missing))


@intrinsic
def exp_at(typingctx: Any, address: Any, n: Any) -> Any:  # noqa: ARG001
    """Replace the n floats at an address by their exponentials, to 3 ulp from -87 to 88; below -87.7 it gives 0, above
    88 what 88 gives, and of a NaN a number.

    2^k * p(f), with p the degree-6 Taylor polynomial of e^f on |f| <= ln(2)/2.
    """
    return types.void(types.intp, types.intp), _exp_codegen


def _exp_codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
    def fma(a: Any, b: Any, c: Any) -> Any:
        return _call(builder, f"llvm.fmuladd.v{LANES}f32", _FLOATS, a, b, c)

    def body(pointer: Any, mask: Any) -> None:
        x = _load(builder, pointer, mask, 0.0)
        for order, bound in ((">", -88.0), ("<", 88.0)):
            x = builder.select(builder.fcmp_ordered(order, x, _floats(bound)), x, _floats(bound))
        k = _call(builder, f"llvm.floor.v{LANES}f32", _FLOATS, fma(x, _floats(1 / log(2)), _floats(0.5)))
        f = fma(k, _floats(2.12194440e-4), fma(k, _floats(-0.693359375), x))
        p = _floats(_TAYLOR[0])
        for factor in _TAYLOR[1:]:
            p = fma(p, f, _floats(factor))
        power = builder.add(builder.fptosi(k, _INTS), ir.Constant(_INTS, [127] * LANES))
        scale = builder.bitcast(builder.shl(power, ir.Constant(_INTS, [23] * LANES)), _FLOATS)
        name = f"llvm.masked.store.v{LANES}f32.p0"
        _call(builder, name, ir.VoidType(), builder.fmul(p, scale), pointer, ir.Constant(_INT, 4), mask)

    address, count = args
    _each_vector(builder, address, count, body)
    return context.get_dummy_value()


@intrinsic
def max_at(typingctx: Any, address: Any, n: Any) -> Any:  # noqa: ARG001
    """The largest of the n >= 1 floats at an address."""
    return types.float32(types.intp, types.intp), _max_codegen


def _max_codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
    lowest = float("-inf")
    highest = cgutils.alloca_once_value(builder, _floats(lowest))

    def body(pointer: Any, mask: Any) -> None:
        x, high = _load(builder, pointer, mask, lowest), builder.load(highest)
        builder.store(builder.select(builder.fcmp_ordered(">", x, high), x, high), highest)

    address, count = args
    _each_vector(builder, address, count, body)
    return _call(builder, f"llvm.vector.reduce.fmax.v{LANES}f32", _SINGLE, builder.load(highest))
