"""Rotary position embedding with YaRN (arXiv:2309.00071), as DeepSeek-V3 applies it.

The checkpoint's rope dimensions are interleaved pairs (2i, 2i+1); we rotate them where they lie. Angles are
computed in float32 as the reference does: the model was trained on those.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hybrid.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each pair: float32 [qk_rope_head_dim / 2]."""
    dim = config.qk_rope_head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    freqs = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return freqs
    low = _pair_of(scaling.beta_fast, config, scaling, math.floor)
    high = _pair_of(scaling.beta_slow, config, scaling, math.ceil)
    low, high = max(low, 0), min(high, dim - 1)
    span = max(high - low, 0.001)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return freqs / scaling.factor * ramp + freqs * (1 - ramp)


def _pair_of(
    rotations: float, config: ModelConfig, scaling: RopeScaling, rounding: Callable[[float], int]
) -> int:
    """The pair that turns `rotations` times within the original context."""
    exact = (
        config.qk_rope_head_dim
        * math.log(scaling.original_max_position_embeddings / (rotations * 2 * math.pi))
        / (2 * math.log(config.rope_theta))
    )
    return rounding(exact)


def yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """qk_head_dim^-1/2, times YaRN's mscale_all_dim correction squared."""
    scale = 1 / math.sqrt(config.qk_head_dim)
    if config.rope_scaling is not None:
        scale *= yarn_mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale


class RotaryEmbedding:
    """cos and sin of every position used so far; the table grows with the longest sequence."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._freqs = inverse_frequencies(config).to(device)
        scaling = config.rope_scaling
        self._magnitude = (
            1.0
            if scaling is None
            else yarn_mscale(scaling.factor, scaling.mscale)
            / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
        )
        self._extend(1024)

    def _extend(self, positions: int) -> None:
        t = torch.arange(positions, dtype=torch.float32, device=self._freqs.device)
        angles = torch.outer(t, self._freqs)
        self._cos, self._sin = angles.cos() * self._magnitude, angles.sin() * self._magnitude

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin for int64 positions [T]: each [T, qk_rope_head_dim / 2]."""
        last = int(positions.max())
        if last >= len(self._cos):
            self._extend(max(last + 1, 2 * len(self._cos)))
        return self._cos[positions], self._sin[positions]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs of x [T, heads, d] or [T, d] by cos, sin [T, d/2]."""
    if x.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
