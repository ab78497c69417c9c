"""Single operations that plain Numba lacks: raw addresses, atomics, prefetch, system calls.

All addresses are int64. Nothing here allocates or raises.
"""

from typing import Any

from llvmlite import ir
from llvmlite.binding import initialize_native_asmparser
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

initialize_native_asmparser()  # for `opaque`

I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


def pointer(builder: Any, address: Any, pointee: Any) -> Any:
    """`address` (an i64 value) as an LLVM pointer to `pointee`."""
    return builder.inttoptr(address, pointee.as_pointer())


def declare(builder: Any, name: str, result: Any, arguments: list[Any], var_arg: bool = False) -> Any:
    """The external function `name`, declared in the module being built."""
    return cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, arguments, var_arg=var_arg), name
    )


@intrinsic
def as_pointer(_context: Any, address: Any, dtype: Any) -> Any:
    """as_pointer(address, numba dtype): a pointer that `numba.carray` makes an array of."""

    def generate(_context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return pointer(builder, args[0], _context.get_data_type(signature.return_type.dtype))

    pointee = dtype.instance_type if isinstance(dtype, types.TypeRef) else dtype.dtype
    return types.CPointer(pointee)(types.int64, dtype), generate


@intrinsic
def atomic_add(_context: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at `address`, sequentially consistent; returns the value before."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", pointer(builder, args[0], I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def atomic_load(_context: Any, address: Any) -> Any:
    """The int64 at `address`, sequentially consistent."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load_atomic(pointer(builder, args[0], I64), "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def atomic_store(_context: Any, address: Any, value: Any) -> Any:
    """Write the int64 at `address`, sequentially consistent."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], pointer(builder, args[0], I64), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def pause(_context: Any) -> Any:
    """Tell the core that this is a waiting loop."""

    def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        builder.call(declare(builder, "llvm.x86.sse2.pause", ir.VoidType(), []), [])
        return context.get_dummy_value()

    return types.void(), generate


def opaque(builder: Any, value: Any) -> Any:
    """The same i64, of which the optimiser knows nothing: it cannot share loads made through it."""
    return builder.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [value], side_effect=False)


def emit_prefetch(builder: Any, address: Any, locality: int) -> None:
    """Prefetch the line at `address` (i64) for reading; locality 3 is every cache, 2 from L2 on."""
    function = declare(builder, "llvm.prefetch.p0", ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    builder.call(function, [pointer(builder, address, I8), I32(0), I32(locality), I32(1)])


@intrinsic
def system_call(_context: Any, number: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Linux system call `number` with up to four arguments; -1 on failure."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        function = declare(builder, "syscall", I64, [I64], var_arg=True)
        return builder.call(function, [*args, I64(0), I64(0)])

    return types.int64(*[types.int64] * 5), generate


@intrinsic
def current_cpu(_context: Any) -> Any:
    """The CPU that the calling thread runs on; -1 when unknown."""

    def generate(_context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        return builder.sext(builder.call(declare(builder, "sched_getcpu", I32, []), []), I64)

    return types.int64(), generate


@intrinsic
def call_address(_context: Any, function: Any, arguments: Any) -> Any:
    """Call the C function at an address with a tuple of int64; it returns an int64."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        values = cgutils.unpack_tuple(builder, args[1])
        return builder.call(pointer(builder, args[0], ir.FunctionType(I64, [I64] * len(values))), values)

    return types.int64(types.int64, arguments), generate
