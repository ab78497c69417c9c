"""offload/fp8.py against the float64 oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.fp8 import Weight, dequantize, quantize, scale_shape
from tests.reference import fp8 as oracle

SHAPES = [(1, 1), (128, 128), (129, 127), (576, 200), (3, 300), (257, 1)]


def test_torch_decodes_every_code_as_the_format_says() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    np.testing.assert_array_equal(codes.double().numpy(), oracle.decode_table())


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_multiplies_each_block_by_its_scale(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 255, shape, np.uint8)
    codes[codes == 0x7F] = 0
    scale = rng.uniform(1e-4, 1e-2, scale_shape(*shape)).astype(np.float32)
    ours = dequantize(torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scale))
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), oracle.dequantize(codes, scale), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_takes_the_nearest_code(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    codes, scale = quantize(weight)
    assert codes.dtype == torch.float8_e4m3fn
    assert scale.shape == scale_shape(*shape)
    rows, columns = np.indices(shape)
    each = scale.numpy()[rows // 128, columns // 128]
    # the division is float32, as quantize's is, so that both look at the same number
    wanted = oracle.nearest((weight.numpy() / each).clip(-448, 448).astype(np.float64))
    np.testing.assert_array_equal(codes.double().numpy(), wanted)


def test_each_block_has_its_own_scale_and_uses_the_whole_range() -> None:
    weight = torch.randn(300, 200)
    weight[128:256, 128:] *= 1e6
    codes, scale = quantize(weight)
    for i in range(3):
        for j in range(2):
            block = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            assert codes[block].float().abs().max() == 448
            assert scale[i, j] == weight[block].abs().max() / 448


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([0.0, 1e-45, 1e-38, 1e-30, 1.0, 1e30, 3.4e38]), st.integers(0, 2**32 - 1))
def test_scales_stay_usable_at_any_magnitude(magnitude: float, seed: int) -> None:
    weight = (torch.rand(130, 5, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * magnitude
    codes, scale = quantize(weight)
    assert (scale > 0).all()
    assert torch.isfinite(scale).all()
    error = (dequantize(codes, scale) - weight).abs().amax()
    assert torch.isfinite(codes.float()).all()
    assert error <= weight.abs().amax() * 2**-4 + 2**-126


def test_weight_counts_its_own_bytes() -> None:
    fp8 = Weight(*quantize(torch.randn(130, 129)))
    assert (fp8.shape, fp8.nbytes) == ((130, 129), 130 * 129 + 4 * 4)
    plain = Weight(torch.randn(3, 5).bfloat16())
    assert (plain.shape, plain.nbytes) == ((3, 5), 30)
    torch.testing.assert_close(plain.dequantize(), plain.data.float(), rtol=0, atol=0)
    torch.testing.assert_close(fp8.dequantize(), dequantize(fp8.data, fp8.scale), rtol=0, atol=0)  # type: ignore[arg-type]
