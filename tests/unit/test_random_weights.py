"""hybrid/random_weights.py: the quantile tables and the stream of random bits."""

import numpy as np
import pytest
import torch

from hybrid.random_weights import fill, quantile_table, stream_key


def test_fp8_codes_are_gaussian_without_nan() -> None:
    codes = torch.from_numpy(quantile_table("F8_E4M3", 0.0, 1.0)).view(torch.float8_e4m3fn).double()
    assert float(codes.max()) == 448
    assert not codes.isnan().any()
    normed = codes / codes.std()
    assert float((normed.abs() < 1).double().mean()) == pytest.approx(0.6827, abs=0.02)
    assert float(normed.pow(4).mean()) == pytest.approx(3.0, abs=0.1)


def test_pieces_of_a_stream_join_into_the_stream() -> None:
    table, key = quantile_table("F32", 0.0, 1.0), np.uint64(stream_key(1, "x"))
    whole, parts = np.empty(4000, np.float32), np.empty(4000, np.float32)
    fill(key, 0, table, whole)
    for begin in range(0, 4000, 400):
        fill(key, begin // 4, table, parts[begin : begin + 400])
    np.testing.assert_array_equal(whole, parts)
    assert whole.std() == pytest.approx(1.0, abs=0.05)


def splitmix64(state: int, count: int) -> list[int]:
    """Plain integers; the first outputs from state 0 are 0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, ..."""
    mask, outputs = 2**64 - 1, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        outputs.append(z ^ (z >> 31))
    return outputs


def test_fill_is_splitmix64() -> None:
    assert splitmix64(0, 2) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    table, out = np.arange(65536, dtype=np.uint16), np.empty(40, np.uint16)
    for key in (0, 12345, 2**64 - 1):
        fill(np.uint64(key), 0, table, out)
        assert out.view(np.uint64).tolist() == splitmix64(key, 10)
