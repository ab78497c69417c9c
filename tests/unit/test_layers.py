"""Rotary, routing and attention against float64 and against each other's form."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.config import ModelConfig
from hybrid.kv_cache import LatentCache
from hybrid.layers.attention import AttentionWeights, LatentAttention
from hybrid.layers.cpu import CpuOps
from hybrid.layers.norm import RMSNorm
from hybrid.layers.ops import RoutingRule
from hybrid.layers.plain import PlainOps
from hybrid.layers.rotary import RotaryEmbedding, inverse_frequencies, rotate, softmax_scale
from offload.fp8 import Weight
from offload.kernels.cpu import CpuKernels

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ops() -> Iterator[CpuOps]:
    kernels = CpuKernels(2)
    yield CpuOps(kernels)
    kernels.close()


@pytest.fixture
def k2(k2_files: Path) -> ModelConfig:
    return ModelConfig.from_file(k2_files / "config.json")


def k2_with(k2_files: Path, **changes: Any) -> ModelConfig:
    return ModelConfig.from_dict({**json.loads((k2_files / "config.json").read_text()), **changes})


def test_yarn_of_k2(k2: ModelConfig) -> None:
    """Betas of 1 and 1: pairs 0 to 19 unscaled, 20 to 31 divided by the factor (K2's published config)."""
    plain = 50000.0 ** -(np.arange(0, 64, 2) / 64)
    expected = np.where(np.arange(32) < 20, plain, plain / 32)
    np.testing.assert_allclose(inverse_frequencies(k2).numpy(), expected, rtol=1e-6)
    assert softmax_scale(k2) == pytest.approx(0.130861, abs=1e-6)


def test_softmax_scale_at_factor_64(k2_files: Path) -> None:
    rope = json.loads((k2_files / "config.json").read_text())["rope_scaling"]
    assert softmax_scale(k2_with(k2_files, rope_scaling={**rope, "factor": 64.0})) == pytest.approx(
        0.144680, abs=1e-6
    )


def test_rotation_is_of_interleaved_pairs(k2_files: Path) -> None:
    config = k2_with(k2_files, rope_scaling=None, qk_rope_head_dim=4, rope_theta=100.0)
    cos, sin = RotaryEmbedding(config, CPU).at(torch.tensor([3]))
    turned = rotate(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), cos, sin)[0]
    expected = [math.cos(3), math.sin(3), -math.sin(0.3), math.cos(0.3)]
    torch.testing.assert_close(turned, torch.tensor(expected))


def test_the_table_grows_with_the_longest_sequence(k2: ModelConfig) -> None:
    rotary = RotaryEmbedding(k2, CPU)
    cos, _ = rotary.at(torch.tensor([5, 70_000]))
    angle = np.float32(70_000) * inverse_frequencies(k2).numpy()
    np.testing.assert_allclose(cos[1].numpy(), np.cos(angle), atol=1e-6)


def route_float64(logits: np.ndarray, bias: np.ndarray, rule: RoutingRule) -> tuple[np.ndarray, np.ndarray]:
    """noaux_tc for one row, written from the paper's definition. -> ids by falling choice, weights."""
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    choice = scores + bias
    groups = choice.reshape(rule.n_group, -1)
    if rule.n_group > 1:
        best = np.sort(groups, axis=1)[:, -2:].sum(1)
        kept = np.argsort(-best, kind="stable")[: rule.topk_group]
        groups = np.where(np.isin(np.arange(rule.n_group), kept)[:, None], groups, -np.inf)
    ids = np.argsort(-groups.ravel(), kind="stable")[: rule.top_k]
    weights = scores[ids]
    if rule.norm_topk_prob:
        weights = weights / weights.sum()
    return ids, weights * rule.routed_scaling_factor


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([(1, 1), (4, 2), (8, 4), (6, 6)]),
    st.integers(1, 8),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_routing_against_float64(
    ops: CpuOps, groups: tuple[int, int], top_k: int, normalise: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(5, 48)).astype(np.float32)
    bias = rng.normal(scale=0.3, size=48).astype(np.float32)
    rule = RoutingRule(top_k, *groups, normalise, 2.827)
    for device in (ops, PlainOps(CPU)):
        ids, weights = device.route(torch.from_numpy(logits), torch.from_numpy(bias), rule)
        for row in range(len(logits)):
            expected_ids, expected_weights = route_float64(logits[row], bias, rule)
            assert ids[row].tolist() == expected_ids.tolist()
            np.testing.assert_allclose(weights[row].numpy(), expected_weights, rtol=1e-5)


def test_the_bias_selects_but_does_not_weigh(ops: CpuOps) -> None:
    rule = RoutingRule(1, 1, 1, False, 1.0)
    ids, weights = ops.route(torch.tensor([[2.0, 0.0]]), torch.tensor([0.0, 5.0]), rule)
    assert ids.tolist() == [[1]]
    assert weights.item() == pytest.approx(0.5)


def attention(k2_files: Path, heads: int, seed: int) -> tuple[ModelConfig, LatentAttention]:
    config = k2_with(
        k2_files,
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=heads,
        q_lora_rank=None,
        kv_lora_rank=20,
        qk_nope_head_dim=12,
        qk_rope_head_dim=6,
        v_head_dim=10,
    )
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Weight:
        return Weight(torch.randn(shape, generator=generator) * 2 / shape[1] ** 0.5, None)

    weights = AttentionWeights(
        None,
        None,
        weight(heads * 18, 48),
        weight(26, 48),
        RMSNorm(torch.rand(20, generator=generator) + 0.5, 1e-6),
        weight(heads * 22, 20),
        weight(48, heads * 10),
    )
    return config, LatentAttention(config, 0, weights, PlainOps(CPU))


@pytest.mark.parametrize("heads", [3, 8])
def test_plain_and_absorbed_forms_agree(k2_files: Path, heads: int) -> None:
    config, layer = attention(k2_files, heads, seed=heads)
    n = 1100  # more than two context blocks
    x = torch.randn((n, 48), generator=torch.Generator().manual_seed(1))
    cos, sin = RotaryEmbedding(config, CPU).at(torch.arange(n))
    whole, stepwise = LatentCache(config, CPU), LatentCache(config, CPU)
    whole.reserve(n)
    plain = layer.prefill(x, cos, sin, whole)
    stepwise.reserve(n)
    stepwise.layer(0)[:n] = whole.layer(0)[:n]
    stepwise.advance(list(range(n - 3)))
    for t in range(n - 3, n):
        absorbed = layer.decode(x[t : t + 1], cos[t : t + 1], sin[t : t + 1], [stepwise])
        torch.testing.assert_close(absorbed[0], plain[t], rtol=1e-4, atol=1e-5)
        stepwise.advance([t])


@pytest.mark.parametrize(("heads", "context"), [(1, 1), (3, 31), (8, 33), (6, 1000)])
def test_decode_attention_against_float64(ops: CpuOps, k2_files: Path, heads: int, context: int) -> None:
    config, _ = attention(k2_files, heads, seed=0)
    generator = torch.Generator().manual_seed(context)
    caches = []
    for n in (context, max(1, context // 2)):
        cache = LatentCache(config, CPU)
        cache.reserve(n)
        cache.layer(0)[:n] = torch.randn((n, 26), generator=generator) * 3
        cache.advance(list(range(n - 1)))
        caches.append(cache)
    queries = torch.randn((2, heads, 26), generator=generator)
    out = ops.attend(queries, caches, 0, 0.3, 20)
    for row, cache in enumerate(caches):
        latents = cache.layer(0)[: cache.length + 1].double()
        expected = torch.softmax(queries[row].double() @ latents.T * 0.3, -1) @ latents[:, :20]
        torch.testing.assert_close(out[row].double(), expected, rtol=2e-5, atol=2e-6)
        alone = ops.attend(queries[row : row + 1], [cache], 0, 0.3, 20)
        assert torch.equal(alone[0], out[row])


@pytest.mark.parametrize("hidden", [1, 7, 48, 129, 7168])
def test_norm_rows_do_not_depend_on_the_batch(hidden: int) -> None:
    generator = torch.Generator().manual_seed(hidden)
    x = torch.randn((9, hidden), generator=generator)
    norm = RMSNorm(torch.randn(hidden, generator=generator), 1e-6)
    together = norm(x)
    for row in range(9):
        assert torch.equal(norm(x[row : row + 1])[0], together[row])
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(together.double(), expected, rtol=1e-5, atol=1e-6)
