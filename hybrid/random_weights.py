"""Random tensors for `hybrid synth`: how each kind of weight is distributed, and a fast generator of bytes.

A weight is one of 65536 Gaussian quantiles, already encoded in its dtype, picked by 16 random bits; so fp8
codes and bf16 values cost one table look-up each and are made faster than a disk takes them.
"""

from functools import lru_cache
from math import log, sqrt
from typing import Any

import numba
import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from hybrid.config import ModelConfig
from hybrid.loader import Expected
from offload.fp8 import E4M3_MAX

QUANTILES = 1 << 16
SCALE_SPREAD = 0.2
"""Relative standard deviation of block scales, so that a wrong block shows. Largest quantile: 4.3 of it."""
STORAGE = {"F8_E4M3": np.uint8, "BF16": np.uint16, "F32": np.float32}


def distribution(config: ModelConfig, name: str, expected: Expected) -> tuple[float, float]:
    """(mean, standard deviation) of tensor `name`, such that nothing in the model is flat.

    Normed activations have standard deviation 1, so a matrix with 1/sqrt(in) keeps it. Attention logits get
    1.5, router logits 1.5, output logits 2, and every layer adds about as much to the residual stream.
    """
    if expected.kind == "norm":
        return 1.0, 0.1
    if expected.kind == "router_bias":
        return 0.0, 0.05
    if expected.kind == "embedding" and not config.tie_word_embeddings:
        return 0.0, 1.0
    unit = 1.0 / sqrt(expected.shape[-1])
    layer_share = 1.0 / sqrt(config.num_hidden_layers)
    gains = {
        "embed_tokens": 2.0,  # tied: it is the head
        "lm_head": 2.0,
        "gate": 1.5,
        "q_proj": 1.5 / _softmax_boost(config),
        "q_b_proj": 1.5 / _softmax_boost(config),
        "o_proj": 1.5 * layer_share,  # averaging over tokens shrinks its input
        "down_proj": layer_share / 0.6,  # silu(g) * u of two unit Gaussians has 0.6
    }
    return 0.0, unit * gains.get(name.split(".")[-2], 1.0)


def _softmax_boost(config: ModelConfig) -> float:
    """By how much YaRN's mscale multiplies attention logits (DeepSeek-V3's softmax scale)."""
    rope = config.rope_scaling
    if rope is None:
        return 1.0
    return (0.1 * rope.mscale_all_dim * log(rope.factor) + 1.0) ** 2


@lru_cache(maxsize=64)
def quantile_table(dtype: str, mean: float, std: float) -> NDArray[Any]:
    """65536 equally likely values of a Gaussian as `dtype` is stored (fp8: codes up to 448; mean and std
    are its scales' business)."""
    probabilities = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    normal = torch.special.ndtri(probabilities)
    if dtype == "F8_E4M3":
        values = (normal * (E4M3_MAX / normal.max())).to(torch.float8_e4m3fn).view(torch.uint8)
    elif dtype == "BF16":
        values = (normal * std + mean).to(torch.bfloat16).view(torch.uint16)
    else:
        values = (normal * std + mean).float()
    table: NDArray[Any] = values.numpy()
    return table


@lru_cache(maxsize=1)
def code_std() -> float:
    """Standard deviation of the decoded fp8 codes: a tensor's scales are its own over this."""
    codes = torch.from_numpy(quantile_table("F8_E4M3", 0.0, 1.0)).view(torch.float8_e4m3fn)
    return float(codes.double().std())


def scale_distribution(std: float) -> tuple[float, float]:
    """(mean, standard deviation) of the block scales that give fp8 codes standard deviation `std`."""
    mean = std / (code_std() * sqrt(1.0 + SCALE_SPREAD**2))
    return mean, mean * SCALE_SPREAD


def stream_key(seed: int, name: str) -> int:
    """The state that tensor `name`'s random bits start from: the same whatever else is written."""
    return xxhash.xxh3_64_intdigest(name.encode(), seed=seed)


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def fill(key: Any, first: int, table: Any, out: Any) -> None:
    """Set `out`, a multiple of 4 long, to random elements of `table` (65536 long), four to a 64-bit draw.

    SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014) from state
    `key`, a uint64; the `first` draws are skipped, so pieces of a stream can be filled one by one.
    """
    golden, mask = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xFFFF)
    for draw in range(out.size // 4):
        bits = key + np.uint64(first + draw + 1) * golden
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits ^= bits >> np.uint64(31)
        j = np.uint64(draw) * np.uint64(4)  # unsigned indices skip the test for negative ones: twice as fast
        out[j] = table[bits & mask]
        out[j + np.uint64(1)] = table[(bits >> np.uint64(16)) & mask]
        out[j + np.uint64(2)] = table[(bits >> np.uint64(32)) & mask]
        out[j + np.uint64(3)] = table[bits >> np.uint64(48)]
