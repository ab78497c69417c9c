"""The kernels against float64, at every level this machine runs; and that a row's bits are its own."""

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from offload.errors import CheckpointError, WorkerError
from offload.executor import ExpertExecutor
from offload.experts import ExpertWeights
from offload.fp8 import BLOCK, Weight
from offload.kernels import cpu
from offload.kernels.cpu import CpuKernels
from offload.kernels.levels import LEVELS, missing_features
from offload.store import MmapStore

FINITE = [code for code in range(256) if code & 0x7F != 0x7F]
SUBNORMAL = [code for code in range(256) if code & 0x78 == 0]
NORMAL = [code for code in FINITE if code & 0x78]


@pytest.fixture(scope="module", params=LEVELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[CpuKernels]:
    missing = missing_features(LEVELS[request.param])
    if missing:
        pytest.skip(f"this CPU lacks {', '.join(missing)}")
    made = CpuKernels(2, request.param)
    yield made
    made.close()


def fp8(rows: int, columns: int, codes: list[int], seed: int) -> Weight:
    rng = np.random.default_rng(seed)
    data = torch.from_numpy(rng.choice(np.array(codes, np.uint8), (rows, columns)))
    shape = -(-rows // BLOCK), -(-columns // BLOCK)
    scale = torch.from_numpy(rng.uniform(0.5, 2.0, shape).astype(np.float32)) / 64
    return Weight(data.view(torch.float8_e4m3fn), scale)


def with_few_rare(weight: Weight) -> Weight:
    """The same, with a code of zero exponent in a thousand."""
    rng = np.random.default_rng(7)
    data = weight.data.view(torch.uint8).clone()
    places = rng.choice(data.numel(), max(1, data.numel() // 1000), replace=False)
    data.view(-1)[places] = torch.from_numpy(rng.choice(np.array(SUBNORMAL, np.uint8), len(places)))
    return Weight(data.view(torch.float8_e4m3fn), weight.scale)


def float64(weight: Weight) -> Tensor:
    """Independent of Weight.dequantize: float64 codes times float64 scales."""
    if weight.scale is None:
        return weight.data.double()
    rows, columns = weight.shape
    scale = weight.scale.double().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return weight.data.double() * scale


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


SHAPES = [(1, 1), (5, 7), (128, 128), (130, 257), (33, 1500), (300, 2049)]


@pytest.mark.parametrize(
    "codes", [FINITE, NORMAL, SUBNORMAL], ids=["all finite", "normal", "subnormal and zero"]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("decode", [True, False])
def test_linear_fp8(kernels: CpuKernels, shape: tuple[int, int], codes: list[int], decode: bool) -> None:
    weight = fp8(*shape, codes, seed=shape[0])
    x = torch.randn(20, shape[1], generator=torch.Generator().manual_seed(1))
    wanted = x.double() @ float64(weight).T
    got = kernels.linear(x, weight, decode=decode)
    assert error(got, wanted) < 2e-6 if wanted.any() else not got.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_of_other_dtypes(kernels: CpuKernels, shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = Weight(torch.randn(shape, generator=generator).to(dtype))
    x = torch.randn(20, shape[1], generator=generator)
    wanted = x.double() @ float64(weight).T
    assert error(kernels.linear(x, weight, decode=False), wanted) < 2e-6


def test_every_finite_code_is_exact(kernels: CpuKernels) -> None:
    data = torch.tensor(FINITE, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None].contiguous()
    weight = Weight(data, torch.full((2, 1), 0.5))
    got = kernels.linear(torch.ones(1, 1), weight, decode=True)[0]
    assert torch.equal(got.double(), data[:, 0].double() * 0.5)


def experts(count: int, hidden: int, intermediate: int, codes: list[int] = FINITE) -> list[ExpertWeights]:
    return [
        ExpertWeights(
            fp8(intermediate, hidden, codes, 3 * e),
            fp8(intermediate, hidden, codes, 3 * e + 1),
            fp8(hidden, intermediate, codes, 3 * e + 2),
        )
        for e in range(count)
    ]


@pytest.mark.parametrize("decode", [True, False])
def test_swiglu_of_any_gate(kernels: CpuKernels, decode: bool) -> None:
    """From gates that vanish to those whose exponential is none, and what is not finite."""
    one = torch.ones(16, 16).to(torch.float8_e4m3fn)
    weight = Weight(one, torch.full((1, 1), 1 / 16))
    gates = torch.tensor([0.0, 1e-30, 0.1, 5, 30, 88, 100, 1e4, 2e6, 1e8, 1e15, float("nan")])
    x = torch.cat([gates, -gates])[:, None].expand(24, 16).contiguous()
    got = kernels.swiglu_mlp(x, weight, weight, weight, decode=decode).double()
    wide = x[:, :1].double().expand(24, 16)
    wanted = torch.nn.functional.silu(wide) * wide
    assert torch.allclose(got, wanted, rtol=2e-6, atol=1e-33, equal_nan=True)


@pytest.mark.parametrize("decode", [True, False])
def test_an_id_out_of_range_is_named(kernels: CpuKernels, decode: bool) -> None:
    weights = experts(2, 64, 64)
    x, ids, gates = routed(40, 64, 2, 1, seed=2)
    table = np.array([[v for w in expert for v in cpu.addresses(w)] for expert in weights], np.int64)
    ids[7] = 5
    with pytest.raises(WorkerError, match="none of the 2 experts"):
        kernels.experts(
            x, table, (weights[0].gate, weights[0].up, weights[0].down), ids, gates, decode=decode
        )
    ids[7] = 1
    assert kernels.experts(x, table, weights[0], ids, gates, decode=decode)[0].isfinite().all()


def test_many_tokens_on_tiles() -> None:
    """More rows, columns and tokens than one chunk, packing and batch of theirs take."""
    if missing := missing_features(LEVELS["amx"]):
        pytest.skip(f"this CPU lacks {', '.join(missing)}")
    owner = CpuKernels(2, "amx")
    try:
        weights = experts(2, 2100, 1100, NORMAL)
        x, ids, gates = routed(300, 2100, 2, 1, seed=9)
        got = ExpertExecutor(MmapStore({0: weights}), owner).run(0, x, ids, gates, decode=False)
        some = [0, 140, 299]
        assert error(got[some], layer64(weights, x[some], ids[some], gates[some])) < 2e-6
        wanted = x.double() @ float64(weights[0].gate).T
        assert error(owner.linear(x, weights[0].gate, decode=False), wanted) < 2e-6
    finally:
        owner.close()


def layer64(weights: list[ExpertWeights], x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    wide = [[float64(w) for w in expert] for expert in weights]
    for t in range(len(x)):
        for e, gate in zip(ids[t].tolist(), gates[t].double(), strict=True):
            g, u, d = wide[e]
            inner = torch.nn.functional.silu(g @ x[t].double()) * (u @ x[t].double())
            out[t] += gate * (d @ inner)
    return out


def routed(tokens: int, hidden: int, count: int, top_k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(count, generator=generator)[:top_k] for _ in range(tokens)])
    return (
        torch.randn(tokens, hidden, generator=generator) / 8,
        ids,
        torch.rand(tokens, top_k, generator=generator),
    )


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
@pytest.mark.parametrize(("hidden", "intermediate"), [(256, 128), (200, 150), (37, 1030)])
def test_experts_against_float64(
    kernels: CpuKernels,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    hidden: int,
    intermediate: int,
    decode: bool,
) -> None:
    monkeypatch.setattr(cpu, "WORTHWHILE", 0)
    weights = experts(6, hidden, intermediate)
    x, ids, gates = routed(tokens, hidden, 6, 3, seed=tokens)
    executor = ExpertExecutor(MmapStore({4: weights}), kernels)
    got = executor.run(4, x, ids, gates, decode=decode)
    assert error(got, layer64(weights, x, ids, gates)) < 2e-6
    assert executor.bytes_read == len(ids.unique()) * weights[0].nbytes


@pytest.mark.parametrize("size", [1, 24])
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(
    kernels: CpuKernels, size: int
) -> None:
    """Alone as a decode row; in prefill among as many others as tiles are for."""
    weights = [ExpertWeights(*map(with_few_rare, expert)) for expert in experts(6, 200, 150, NORMAL)]
    x, ids, gates = routed(43, 200, 6, 3, seed=5)
    decode = size == 1
    together = ExpertExecutor(MmapStore({0: weights}), kernels).run(0, x, ids, gates, decode=decode)
    linear = kernels.linear(x, weights[0].gate, decode=decode)
    single = CpuKernels(1, kernels.level)
    try:
        for owner in (kernels, single):
            executor = ExpertExecutor(MmapStore({0: weights}), owner)
            for t in range(44 - size):
                some = slice(t, t + size)
                alone = executor.run(0, x[some], ids[some], gates[some], decode=decode)
                assert torch.equal(alone, together[some])
                assert torch.equal(owner.linear(x[some], weights[0].gate, decode=decode), linear[some])
    finally:
        single.close()


@pytest.mark.parametrize("decode", [True, False])
def test_an_expert_of_zeros_gives_exactly_zero(
    kernels: CpuKernels, monkeypatch: pytest.MonkeyPatch, decode: bool
) -> None:
    monkeypatch.setattr(cpu, "WORTHWHILE", 0)
    weights = experts(2, 130, 40, codes=[0x00, 0x80])
    x, ids, gates = routed(3, 130, 2, 2, seed=1)
    out = ExpertExecutor(MmapStore({0: weights}), kernels).run(0, x, ids, gates, decode=decode)
    assert not out.any()


@pytest.mark.parametrize(
    ("heads", "nope", "value", "latent"), [(1, 8, 8, 16), (3, 24, 40, 72), (4, 128, 128, 512)]
)
def test_absorbed_products(kernels: CpuKernels, heads: int, nope: int, value: int, latent: int) -> None:
    kv_b = fp8(heads * (nope + value), latent, FINITE, seed=heads)
    dense = float64(kv_b).view(heads, nope + value, latent)
    generator = torch.Generator().manual_seed(heads)
    q = torch.randn(5, heads, nope, generator=generator)
    got = kernels.absorb_query(q, kv_b, value)
    assert error(got, torch.einsum("thd,hdl->thl", q.double(), dense[:, :nope])) < 2e-6
    assert torch.equal(kernels.absorb_query(q[3:4], kv_b, value)[0], got[3])
    o = torch.randn(5, heads, latent, generator=generator)
    assert (
        error(kernels.expand_value(o, kv_b, nope), torch.einsum("thl,hvl->thv", o.double(), dense[:, nope:]))
        < 2e-6
    )


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("at", [0, 1, 4999, 37 * 200 - 1])
def test_a_nan_code_is_found_on_first_touch(kernels: CpuKernels, code: int, at: int) -> None:
    weights = experts(3, 200, 37)
    weights[1].down.data.view(torch.uint8).view(-1)[at] = code
    store = MmapStore({0: weights})
    store.touch(0, np.array([0, 2]), kernels)
    with pytest.raises(CheckpointError, match="layer 0, expert 1, down"):
        store.touch(0, np.array([0, 1]), kernels)


GUARDED = """
import ctypes, mmap, sys
import torch
from offload.fp8 import Weight
from offload.kernels.cpu import CpuKernels

def at_the_end_of_a_page(tensor):
    size = tensor.nbytes
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, room + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + room), mmap.PAGESIZE, 0) == 0
    buffer = (ctypes.c_uint8 * size).from_address(start + room - size)
    moved = torch.frombuffer(buffer, dtype=torch.uint8)
    moved.copy_(tensor.contiguous().view(torch.uint8).view(-1))
    kept.append(area)
    return moved.view(tensor.dtype).view(tensor.shape)

kept, kernels = [], CpuKernels(2, sys.argv[1])
for rows, columns in ((1, 1), (3, 5), (5, 127), (4, 128), (7, 130), (9, 1500), (130, 257)):
    codes = torch.randint(8, 0x7F, (rows, columns), dtype=torch.uint8)
    codes[0, 0] = 1
    scale = at_the_end_of_a_page(torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5)
    fp8 = Weight(at_the_end_of_a_page(codes.view(torch.float8_e4m3fn)), scale)
    others = [Weight(at_the_end_of_a_page(torch.randn(rows, columns).to(d))) for d in (torch.bfloat16, torch.float32)]
    assert kernels.hold_nan([fp8]) == [False]
    for weight in (fp8, *others):
        for tokens in (1, 2, 3, 9, 17):
            x = at_the_end_of_a_page(torch.randn(tokens, columns))
            for decode in (True, False):
                assert kernels.linear(x, weight, decode=decode).isfinite().all()
print("read nothing beyond")
"""


def test_nothing_beyond_a_matrix_is_read(kernels: CpuKernels) -> None:
    """Every buffer ends where the next page must not be touched: what reads on is killed."""
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, kernels.level], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "read nothing beyond\n", done
