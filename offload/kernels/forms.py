"""How weights become float32 vectors, by form.

    "shift"  e4m3 codes, for CPUs that multiply subnormal floats at full speed. With the sign shifted to the
             top of a 32-bit lane, exponent and mantissa 4 bits below, and the rest masked, a code is the
             float32 of value x 2^-120, exactly, subnormals and zeros included. 16-bit shifts bring two
             codes there at once; a vector then holds every fourth column.
    "offset" e4m3 codes, for the others. As "shift", but with 0x38000000 set in the mask's place: a code
             whose exponent is not zero becomes value x 2^-8, a normal float. A code whose exponent is
             zero is rare (0.01 % of Gaussian weights): `rare_codes` finds them, and blocks that hold one
             are converted by `load_exact`.
    "half"   e4m3 codes in their natural order. Sign-extended to 16 bits, shifted left by 7 and masked, a
             code is the float16 of value x 2^-8, exactly; F16C widens that to float32 without stalls.
    "tile"   float32 that `widen` (dot.py) made of codes: scaled and ordered as that form's, same bits.
    "bf16", "f32"

A *step* is four vectors' worth of columns. Activations are prepared to match (arrange.py).
"""

from typing import Any

from llvmlite import ir

from offload.kernels.intrinsics import I8, I32, I64, pointer
from offload.kernels.jit import Static

F32, HALF, I16 = ir.FloatType(), ir.HalfType(), ir.IntType(16)
ITEMSIZE = {"shift": 1, "offset": 1, "half": 1, "tile": 4, "bf16": 2, "f32": 4}
CODES = ("shift", "offset", "half")
INTERLEAVED = ("shift", "offset")  # a vector holds every fourth column
SCALED = (*CODES, "tile")  # have block scales
FORMS = {form: Static(form) for form in ITEMSIZE}
HALVES, TILED, BF16, PLAIN = (FORMS[form] for form in ("half", "tile", "bf16", "f32"))
_PLACED = 0x87F00000  # sign, exponent and mantissa bits of a shifted code
_OFFSET = 0x38000000  # raises the exponent by 112


def step_columns(width: int) -> int:
    """Columns of a step with vectors of `width`."""
    return 4 * width


def vector(element: Any, count: int) -> Any:
    """The LLVM type of `count` elements."""
    return ir.VectorType(element, count)


def constant(element: Any, count: int, value: float) -> Any:
    """A vector of `count` times `value`."""
    return ir.Constant(vector(element, count), [value] * count)


def pick(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """The elements `lanes` of the vectors a and b, numbered through."""
    return builder.shuffle_vector(a, b, ir.Constant(vector(I32, len(lanes)), lanes))


def load(builder: Any, address: Any, element: Any, count: int) -> Any:
    """`count` elements from an address of any alignment."""
    return builder.load(pointer(builder, address, vector(element, count)), align=1)


def load_floats(builder: Any, address: Any, width: int) -> list[Any]:
    """A step of float32 at `address`."""
    return [load(builder, builder.add(address, I64(4 * width * i)), F32, width) for i in range(4)]


def load_weights(builder: Any, form: str, address: Any, width: int) -> list[Any]:
    """A step of weights at `address`, as four float32 vectors. "offset": of no rare code."""
    if form in INTERLEAVED:
        offset = _OFFSET if form == "offset" else 0
        return [
            builder.bitcast(bits, vector(F32, width)) for bits in _shifted(builder, address, width, offset)
        ]
    if form == "half":
        codes = [load(builder, builder.add(address, I64(i)), I8, 16) for i in range(0, 4 * width, 16)]
        return [part for group in codes for part in _half_codes(builder, group, width)]
    return [load_part(builder, form, address, width, i) for i in range(4)]


def load_part(builder: Any, form: str, address: Any, width: int, part: int) -> Any:
    """Vector `part` of the step of "tile", "bf16" or "f32" weights at `address`."""
    at = builder.add(address, I64(ITEMSIZE[form] * width * part))
    if form != "bf16":
        return load(builder, at, F32, width)
    bits = builder.zext(load(builder, at, I16, width), vector(I32, width))
    return builder.bitcast(builder.shl(bits, constant(I32, width, 16)), vector(F32, width))


def load_exact(builder: Any, form: str, address: Any, width: int) -> list[Any]:
    """As `load_weights`, for any codes."""
    if form != "offset":
        return load_weights(builder, form, address, width)
    return [_mend_rare(builder, bits, width) for bits in _shifted(builder, address, width, _OFFSET)]


def rare_codes(builder: Any, address: Any, width: int) -> Any:
    """Which of a step's codes have a zero exponent: <i1>."""
    codes = load(builder, address, I8, 4 * width)
    exponents = builder.and_(codes, constant(I8, 4 * width, 0x78))
    return builder.icmp_unsigned("==", exponents, constant(I8, 4 * width, 0))


def _mend_rare(builder: Any, bits: Any, width: int) -> Any:
    """An "offset" vector with the lanes of zero exponent put right. Such a code, mantissa m, reads
    2^-15 (1 + m / 8) and means 2^-14 m / 8."""
    wide, single = vector(I32, width), vector(F32, width)
    leading = builder.bitcast(builder.and_(bits, constant(I32, width, 0xFF800000)), single)
    value = builder.bitcast(bits, single)
    rest = builder.fsub(value, leading)
    exponents = builder.and_(bits, constant(I32, width, 0x07800000))
    rare = builder.icmp_unsigned("==", exponents, ir.Constant(wide, [0] * width))
    return builder.select(rare, builder.fadd(rest, rest), value)


def _shifted(builder: Any, address: Any, width: int, offset: int) -> list[Any]:
    """Codes 4i, 4i + 1, 4i + 2 and 4i + 3 of a step, as the bits of float32."""
    wide = vector(I32, width)
    even, odd = (builder.bitcast(bits, wide) for bits in shifted_codes(builder, address, width))
    up, mask = constant(I32, width, 16), constant(I32, width, _PLACED)
    placed = [builder.and_(bits, mask) for bits in (builder.shl(even, up), builder.shl(odd, up), even, odd)]
    return [builder.or_(bits, constant(I32, width, offset)) for bits in placed] if offset else placed


def shifted_codes(builder: Any, address: Any, width: int) -> list[Any]:
    """A step's even and odd codes in 16-bit lanes: the sign on top, exponent and mantissa 4 bits below, and
    other bits where they leave room."""
    count = 2 * width
    codes = builder.bitcast(load(builder, address, I8, 4 * width), vector(I16, count))
    up, down = constant(I16, count, 8), constant(I16, count, 4)
    return [builder.ashr(builder.shl(codes, up), down), builder.ashr(codes, down)]


def _half_codes(builder: Any, codes: Any, width: int) -> list[Any]:
    """16 codes as float32 vectors of value x 2^-8."""
    short = vector(I16, 16)
    bits = builder.shl(builder.sext(codes, short), constant(I16, 16, 7))
    halves = builder.bitcast(builder.and_(bits, constant(I16, 16, 0xBF80)), vector(HALF, 16))
    parts = [list(range(i, i + width)) for i in range(0, 16, width)]
    return [builder.fpext(pick(builder, halves, halves, p), vector(F32, width)) for p in parts]
