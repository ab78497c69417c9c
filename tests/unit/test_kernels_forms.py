"""Every way of reading codes at both vector widths, whichever this CPU prefers, and values at float32's edges.

The 512-bit kernels use no instruction by name, so they also run, in halves, where vectors have 256 bits; the tiles'
need their own.
"""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload.fp8 import Weight
from offload.kernels import cpu
from offload.kernels.cpu import CpuKernels
from offload.kernels.forms import CODES
from offload.kernels.levels import LEVELS, Level, missing_features
from tests.unit.test_kernels_exact import FINITE, NORMAL, SUBNORMAL, error, float64, fp8, with_few_rare

FORMS = [
    *(
        Level(f"{codes}{width}", width, LEVELS["avx2"].features, codes)
        for codes in CODES
        for width in (8, 16)
    ),
    LEVELS["amx"],  # as prefill
]
Linear = Callable[[Tensor, Weight], Tensor]


@pytest.fixture(scope="module", params=FORMS, ids=lambda level: level.name)
def linear(request: pytest.FixtureRequest) -> Iterator[Linear]:
    if missing := missing_features(request.param):
        pytest.skip(f"this CPU lacks {', '.join(missing)}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "choose_level", lambda _: request.param)
        patch.setattr(cpu, "WORTHWHILE", 0)
        made = CpuKernels(2)
        yield functools.partial(made.linear, decode=not request.param.tiles)
        made.close()


def activations(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 2200),
    tokens=st.integers(1, 40),
    offset=st.integers(0, 63),
    codes=st.sampled_from([FINITE, NORMAL, SUBNORMAL, [0x80, 0x00, 0x01]]),
)
def test_any_shape_at_any_address(
    linear: Linear, rows: int, columns: int, tokens: int, offset: int, codes: list[int]
) -> None:
    weight = fp8(rows, columns, codes, seed=rows)
    room = torch.zeros(rows * columns + 64, dtype=torch.uint8)
    moved = room[offset : offset + rows * columns].copy_(weight.data.view(torch.uint8).view(-1))
    weight = Weight(moved.view(torch.float8_e4m3fn).view(rows, columns), weight.scale)
    x = activations(tokens, columns, seed=columns)
    got = linear(x, weight)
    wanted = x.double() @ float64(weight).T
    # Against the products' own size: a sum may cancel to nothing.
    size = x.double().abs() @ float64(weight).abs().T
    assert ((got - wanted).abs() <= 2e-6 * size + 1e-45).all()
    for row in (0, tokens - 1):
        assert torch.equal(linear(x[row : row + 1], weight)[0], got[row])


def test_every_finite_code_is_exact(linear: Linear) -> None:
    data = torch.tensor(FINITE, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None].contiguous()
    weight = Weight(data, torch.full((2, 1), 0.5))
    for x in (1.0, -1.0, 2.0**-60, 2.0**60):
        got = linear(torch.full((1, 1), x), weight)[0]
        assert torch.equal(got.double(), data[:, 0].double() * 0.5 * x)


@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
def test_blocks_with_and_without_rare_codes(linear: Linear, tokens: int) -> None:
    """A code of zero exponent in a thousand: some blocks go the short way, some the long one."""
    weight = with_few_rare(fp8(70, 3000, NORMAL, seed=4))
    x = activations(tokens, 3000)
    got = linear(x, weight)
    assert error(got, x.double() @ float64(weight).T) < 2e-6
    assert torch.equal(linear(x[-1:], weight)[0], got[-1])


@pytest.mark.parametrize(
    ("x_exponent", "scale_exponent"),
    [
        (0, -100),
        (0, -60),
        (0, 60),
        (0, 90),
        (40, -115),
        (60, -118),
        (-40, 105),
        (-60, 112),
        (-30, -60),
        (60, 40),
    ],
)
@pytest.mark.parametrize(
    "codes", [FINITE, NORMAL, SUBNORMAL], ids=["all finite", "normal", "subnormal and zero"]
)
def test_extremes_with_finite_products(
    linear: Linear, codes: list[int], x_exponent: int, scale_exponent: int
) -> None:
    weight = fp8(130, 300, codes, seed=1)
    assert weight.scale is not None
    weight = Weight(weight.data, weight.scale * 2.0**scale_exponent)
    for tokens in (2, 5):
        x = activations(tokens, 300) * 2.0**x_exponent
        assert error(linear(x, weight), x.double() @ float64(weight).T) < 2e-6


def test_a_row_of_largest_codes_does_not_overflow_before_its_time(linear: Linear) -> None:
    weight = Weight(torch.full((8, 512), 448.0).to(torch.float8_e4m3fn), torch.full((1, 4), 2.0**115))
    x = torch.full((1, 512), 2.0**-38)
    assert torch.equal(linear(x, weight), torch.full((1, 8), 448.0 * 512 * 2.0**77))


@pytest.mark.parametrize("exponent", [-100, -30, 30, 90])
def test_extreme_activations(linear: Linear, exponent: int) -> None:
    weight = fp8(20, 300, FINITE, seed=2)
    x = activations(5, 300) * 2.0**exponent
    assert error(linear(x, weight), x.double() @ float64(weight).T) < 2e-6


def test_large_activations_and_small_scales(linear: Linear) -> None:
    weight = fp8(20, 300, NORMAL, seed=5)
    assert weight.scale is not None
    weight = Weight(weight.data, weight.scale * 2.0**-90)
    x = activations(5, 300) * 2.0**115
    assert error(linear(x, weight), x.double() @ float64(weight).T) < 2e-6


def test_a_row_of_zeros_gives_zeros_and_a_nan_stays_in_its_row(linear: Linear) -> None:
    weight = fp8(20, 300, [0x38, 0xB8], seed=3)
    x = activations(5, 300)
    x[1] = 0
    clean = linear(x, weight)
    assert not clean[1].any()
    x[3, 7] = float("nan")
    x[4, 7] = float("inf")
    got = linear(x, weight)
    assert torch.equal(got[:3], clean[:3])
    assert got[3].isnan().all()
    assert not got[4].isfinite().any()
