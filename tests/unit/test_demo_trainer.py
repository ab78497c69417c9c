"""The trainer: compiled operations against torch's, MuonClip against its definition, and whole runs in little."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from hybrid.config import ModelConfig
from hybrid.demo.data.encode import Encoder
from hybrid.demo.data.generator import conversation
from hybrid.demo.export import export
from hybrid.demo.shape import config_fields
from hybrid.demo.train import begin_with, text_digest
from hybrid.demo.trainer.cuda import CudaOps, Packed, peak_logits, require_support
from hybrid.demo.trainer.feed import LONGEST, Batch, Feed, collate, document
from hybrid.demo.trainer.kernels.amx import STEP
from hybrid.demo.trainer.kernels.gemm import Array, Crew, exp_row, gemm, max_row
from hybrid.demo.trainer.kernels.products import TILES, VECTORS, Products
from hybrid.demo.trainer.loop import Loop
from hybrid.demo.trainer.matching import Case, cases, evaluate, exact_matches
from hybrid.demo.trainer.model import DemoModel
from hybrid.demo.trainer.muon import Muon, balance, orthogonalize, qk_clip
from hybrid.demo.trainer.native import NativeOps
from hybrid.demo.trainer.ops import Documents, TorchOps
from hybrid.demo.trainer.plot import draw
from hybrid.demo.trainer.state import Run, Settings
from hybrid.synth import ASSETS
from offload.errors import HybridError, UsageError
from offload.kernels.levels import choose_level
from tests.reference.turns import prompt_of, reply_of

CPU = torch.device("cpu")
SMALL = {
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "n_routed_experts": 24,
    "moe_intermediate_size": 12,
    "intermediate_size": 48,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(ASSETS)


@pytest.fixture(scope="module")
def fields(encoder: Encoder) -> dict[str, Any]:
    return config_fields(encoder.tokenizer, SMALL)


@pytest.fixture(scope="module")
def batches(encoder: Encoder) -> list[Batch]:
    """Batches of three short documents."""
    short = [d for i in range(150) if len((d := document(encoder, "train", 0, i)).tokens) < 350]
    return [collate(short[i : i + 3], i + 3) for i in range(0, 24, 3)]


def small_run(fields: dict[str, Any], threads: int | None = 2, **settings: Any) -> Run:
    return Run(replace(Settings(tokens=40_000, warmup_steps=4), **settings), fields, CPU, threads)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (4, 4, 16), (37, 65, 71), (8, 3, 32), (130, 32, 128)])
@pytest.mark.parametrize("transposed", [False, True])
def test_gemm_matches_numpy(m: int, k: int, n: int, transposed: bool) -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((k, m) if transposed else (m, k)).astype(np.float32)
    a = a.T if transposed else a
    b, c = rng.standard_normal((k, n)).astype(np.float32), rng.standard_normal((m, n)).astype(np.float32)
    wanted = c + a.astype(np.float64) @ b
    gemm(a, b, c, n)
    np.testing.assert_allclose(c, wanted, rtol=1e-5, atol=1e-5)


def test_exp_matches_numpy_and_underflows_to_zero() -> None:
    x = np.concatenate([np.linspace(-87, 88, 1001), [-200.0, -100.0, -87.8]]).astype(np.float32)
    y = np.append(x, np.float32(7))
    exp_row(y, len(x))
    np.testing.assert_allclose(y[:1001], np.exp(x[:1001].astype(np.float64)), rtol=4e-7)
    assert (y[1001:-1] == 0).all()
    assert y[-1] == 7  # beyond the row


@pytest.mark.parametrize("n", [1, 7, 16, 33])
def test_maximum_of_a_row_sees_all_of_it_and_nothing_else(n: int) -> None:
    x = -np.arange(1, 41, dtype=np.float32)
    x[n:] = 5
    for at in range(n):
        y = x.copy()
        y[at] = -0.5
        assert max_row(y, n) == -0.5


tiles_wanted = pytest.mark.skipif(not choose_level().tiles, reason="this CPU has no AMX tiles")
WAYS = [(VECTORS, 1e-6), pytest.param(TILES, 5e-3, marks=tiles_wanted)]


@pytest.mark.parametrize(("products", "tolerance"), WAYS)
def test_products_in_parts_and_of_transposed_factors(products: Products, tolerance: float) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((64, 96)).astype(np.float32), rng.standard_normal((96, 160)).astype(np.float32)
    exact = a.astype(np.float64)

    def near(got: Array, wanted: Array) -> bool:
        return bool(np.linalg.norm(got - wanted) < tolerance * np.linalg.norm(wanted))

    factors = [
        (products.left(a), products.right(b)),
        (products.left_turned(a.T.copy()), products.right_turned(b.T.copy())),
    ]
    products.begin()
    for left, right in factors:
        out = np.full((64, 160), 7, np.float32)
        products.multiply(left, right, out, False)
        assert near(out, exact @ b)
        products.multiply(products.columns(left, 32, 96), products.rows(right, 32, 96), out, True)
        assert near(out, exact @ b + exact[:, 32:] @ b[32:])
        kept = out.copy()
        products.multiply(left[32:64], right[:, 32:96], out[:32, 64:128], False)
        assert near(out[:32, 64:128], exact[32:] @ b[:, 32:96])
        kept[:32, 64:128] = out[:32, 64:128]
        assert np.array_equal(out, kept)  # nothing else was touched
    products.end()


def test_crew_splits_by_cost() -> None:
    crew = Crew(3)
    assert crew.split(np.ones(9)).tolist() == [0, 3, 6, 9]
    assert crew.split(np.array([9.0, 1, 1, 1])).tolist()[1] <= 1


def two_models(fields: dict[str, Any]) -> tuple[DemoModel, DemoModel]:
    """The same weights on torch's operations and on the compiled ones."""
    config = ModelConfig.from_dict(fields)
    torch.manual_seed(1)
    plain, native = DemoModel(config, TorchOps()), DemoModel(config, NativeOps(2, exact=True))
    torch.nn.init.normal_(plain.lm_head, std=0.1)
    for moe in plain.moe_layers():
        torch.nn.init.normal_(moe.bias, std=0.02)
    native.load_state_dict(plain.state_dict())
    return plain, native


def test_compiled_operations_match_torch(fields: dict[str, Any], batches: list[Batch]) -> None:
    plain, native = two_models(fields)
    lengths = torch.tensor([37, 1, 90, 64, 5])
    tokens = torch.cat([b.tokens for b in batches])[: int(lengths.sum())]
    targets = torch.randint(-50, 200, tokens.shape, generator=torch.Generator().manual_seed(0))
    docs = Documents.of(lengths, CPU)
    results = [model.loss(tokens, targets, docs) for model in (plain, native)]
    for loss, _ in results:
        loss.backward()
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[1][1].peaks, results[0][1].peaks, rtol=1e-5, atol=1e-5)
    assert torch.equal(results[1][1].loads, results[0][1].loads)
    for (name, mine), theirs in zip(native.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        error = (mine.grad - theirs.grad).norm() / theirs.grad.norm()
        assert error < 2e-5, name


def test_hidden_states_of_some_rows_are_those_of_all(fields: dict[str, Any]) -> None:
    """And so are the gradients and what was observed, loads at all rows."""
    docs = Documents.of(torch.tensor([37, 1, 60]), CPU)
    tokens, rows = torch.arange(98) % 90, torch.tensor([0, 5, 36, 37, 40, 96])
    for model in two_models(fields):
        whole, seen_whole = model.hidden_states(tokens, docs)
        some, seen_some = model.hidden_states(tokens, docs, rows)
        torch.testing.assert_close(some, whole[rows], rtol=1e-5, atol=1e-6)
        assert torch.equal(seen_some.loads, seen_whole.loads)
        assert torch.equal(seen_some.peaks, seen_whole.peaks)
        whole[rows].sin().sum().backward()
        wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        some.sin().sum().backward()
        got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert got.keys() == wanted.keys()
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


@tiles_wanted
def test_operations_on_tiles_match_torch_within_bfloat16(encoder: Encoder) -> None:
    """Sizes that tiles take; documents that end within a tile and a block, experts with many tokens, few and none.

    Few experts are wanted, so that their scores are seldom so close that rounding decides.
    """
    fields = config_fields(encoder.tokenizer, {"num_hidden_layers": 3})
    config = ModelConfig.from_dict(fields)
    torch.manual_seed(1)
    models = [
        DemoModel(config, TorchOps()),
        DemoModel(config, NativeOps(2)),
        DemoModel(config, NativeOps(2, exact=True)),
    ]
    for moe in models[0].moe_layers():
        moe.bias[torch.randperm(len(moe.bias))[:16]] = torch.linspace(9.5, 10.0, 16)
    tokens = torch.randint(config.vocab_size, (197,))
    docs = Documents.of(torch.tensor([37, 1, 90, 64, 5]), CPU)
    hidden, gradients = [], []
    for model in models:
        model.load_state_dict(models[0].state_dict())
        states, seen = model.hidden_states(tokens, docs)
        assert bool((seen.loads[0] == 0).any())
        assert ((seen.loads > 0) & (seen.loads < STEP)).any()
        states.sin().sum().backward()
        hidden.append(states.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, tiles, exact = ((h - hidden[0]).norm() / hidden[0].norm() for h in hidden)
    assert plain == 0
    assert exact < 1e-5
    assert 1e-4 < tiles < 0.05
    assert ((hidden[1] - hidden[0]).norm(dim=1) / hidden[0].norm(dim=1)).median() < 5e-3  # routed alike
    for name in ("layers.0.self_attn.q_b_proj", "layers.2.mlp.gate_up", "layers.2.mlp.down_t"):
        wanted, got = gradients[0][name], gradients[1][name]
        assert (got - wanted).norm() / wanted.norm() < 0.1, name


def test_a_gpu_too_old_to_train_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(UsageError, match=r"Tesla T4 and torch 2\.11\.0"):
        require_support(CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    require_support(CPU)
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(UsageError, match="Use --device cpu"):
        require_support(CPU)


def test_tiled_experts_match_padded_ones() -> None:
    """Of a GPU's step, with experts that get nothing, one row, and several tiles."""
    torch.manual_seed(3)
    experts, hidden, width, tokens = 7, 24, 12, 200
    ids = torch.stack([torch.randperm(experts - 2)[:3] for _ in range(tokens)])
    ids[5, 0] = experts - 2
    inputs = [
        torch.randn(tokens, hidden),
        torch.rand(tokens, 3),
        torch.randn(experts, 2 * width, hidden),
        torch.randn(experts, width, hidden),
    ]
    found = []
    for ops in (TorchOps(), CudaOps()):
        x, weights, gate_up, down_t = (t.clone().requires_grad_() for t in inputs)
        out = ops.experts(x, ids, weights, gate_up, down_t)
        out.sin().sum().backward()  # type: ignore[no-untyped-call]
        found.append([out.detach(), *(t.grad for t in (x, weights, gate_up, down_t))])
    for mine, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_packed_peaks_are_those_of_each_document() -> None:
    torch.manual_seed(4)
    lengths = torch.tensor([1, 130, 57, LONGEST, 12])
    docs = Documents.of(lengths, CPU)
    packed = Packed.over(docs.starts.int(), docs.row, docs.position)
    assert int((packed.barred == 0).sum()) == sum(n * (n + 1) // 2 for n in lengths.tolist())
    q, k = torch.randn(2, int(lengths.sum()), 3, 8).bfloat16()
    wanted = torch.full((3,), -torch.inf)
    for a, b in pairwise(docs.starts.tolist()):
        scores = torch.einsum("qhd,khd->hqk", q[a:b].float(), k[a:b].float())
        hidden = torch.ones(b - a, b - a, dtype=torch.bool).triu(1)
        wanted = torch.maximum(wanted, scores.masked_fill(hidden, -torch.inf).amax((1, 2)))
    torch.testing.assert_close(peak_logits(q, k, packed.barred).float(), wanted, rtol=1e-2, atol=0)


def test_documents_do_not_see_each_other(fields: dict[str, Any]) -> None:
    model = two_models(fields)[1]
    tokens = torch.randint(0, 300, (60,), generator=torch.Generator().manual_seed(0))
    together, _ = model.logits(tokens, Documents.of(torch.tensor([25, 35]), CPU))
    alone, _ = model.logits(tokens[25:], Documents.of(torch.tensor([35]), CPU))
    torch.testing.assert_close(together[25:], alone, rtol=1e-4, atol=1e-5)


def test_matches_transformers(fields: dict[str, Any]) -> None:
    """The training model is DeepSeek-V3: logits of the exported weights agree (see test_demo_export for fp8)."""
    transformers = pytest.importorskip("transformers")
    from hybrid.demo.export import published

    model = two_models(fields)[1]
    values = {**fields, "model_type": "deepseek_v3"}
    values.pop("quantization_config")
    config = transformers.DeepseekV3Config.from_dict(values)
    config._attn_implementation = "eager"
    theirs = transformers.DeepseekV3ForCausalLM(config).float().eval()
    state = theirs.state_dict()
    for name, tensor in published(model):
        if ".experts." not in name:
            state[name].copy_(tensor.detach())
    for i, layer in enumerate(model.decoder_layers()):
        if hasattr(layer.mlp, "gate"):
            state[f"model.layers.{i}.mlp.experts.gate_up_proj"].copy_(layer.mlp.gate_up.detach())
            state[f"model.layers.{i}.mlp.experts.down_proj"].copy_(layer.mlp.down_t.detach().transpose(1, 2))
    tokens = torch.randint(0, 300, (50,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = theirs(tokens[None]).logits[0]
        got, _ = model.logits(tokens, Documents.of(torch.tensor([50]), CPU))
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("shape", [(5, 12, 40), (3, 40, 12), (1, 16, 16)])
def test_orthogonalize_against_svd(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    got = orthogonalize(x)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    assert torch.linalg.svdvals(got).min() > 0.3
    assert torch.linalg.svdvals(got).max() < 1.3
    rotated = u.transpose(1, 2) @ got @ v.transpose(1, 2)  # diagonal: the same singular vectors
    off = rotated - torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 1e-3


def test_compiled_muon_matches_torch(fields: dict[str, Any]) -> None:
    plain, native = two_models(fields)
    optimisers = Muon(plain), Muon(native, threads=2)
    for _ in range(3):
        for mine, theirs in zip(native.parameters(), plain.parameters(), strict=True):
            theirs.grad = torch.randn_like(theirs)
            mine.grad = theirs.grad.clone()
        for optimiser in optimisers:
            optimiser.step(5e-3)
    for (name, mine), theirs in zip(native.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(mine, theirs[1], rtol=1e-4, atol=1e-5, msg=name)


def test_muon_takes_its_rate_as_a_tensor_too(fields: dict[str, Any]) -> None:
    """As a captured step does, whose rates change from replay to replay."""
    stepped = []
    for rate in (0.01, torch.tensor(0.01)):
        model = two_models(fields)[0]
        muon = Muon(model)
        muon.step(rate)  # of nothing, as no gradient is there
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, 0.1 * i).cumsum(0)
        muon.step(rate)
        stepped.append([p.detach() for p in model.parameters()])
    for one, other in zip(*stepped, strict=True):
        torch.testing.assert_close(one, other)


def test_muon_step_is_its_definition() -> None:
    """W <- W (1 - rate * decay) - rate * 0.2 sqrt(max(n, m)) * orthogonal(gradient + beta * momentum)."""
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.randn(6, 10, generator=torch.Generator().manual_seed(0)))
    start = model.weight.detach().clone()
    gradients = [torch.randn(6, 10, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    optimiser = Muon(model, beta=0.9, weight_decay=0.1)  # type: ignore[arg-type]
    for gradient in gradients:
        model.weight.grad = gradient.clone()
        optimiser.step(0.01)
    momentum, weight = torch.zeros(6, 10), start
    for gradient in gradients:
        momentum = 0.9 * momentum + gradient
        update = orthogonalize((gradient + 0.9 * momentum)[None])[0]
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 10**0.5 * update
    torch.testing.assert_close(model.weight.detach(), weight)


def test_qk_clip_brings_logits_under_tau(fields: dict[str, Any], batches: list[Batch]) -> None:
    model = two_models(fields)[1]
    batch, tau = batches[0], 1.5
    docs = Documents.of(batch.lengths, CPU)
    before = model.hidden_states(batch.tokens, docs)[1].peaks
    assert 0 < qk_clip(model, before, tau) == int((before > tau).sum())
    # Exact in the first layer, whose input the clipping does not change.
    after = model.hidden_states(batch.tokens, docs)[1].peaks
    over = before[0] > tau
    torch.testing.assert_close(after[0][over], torch.full_like(after[0][over], tau), rtol=1e-4, atol=0)
    torch.testing.assert_close(after[0][~over], before[0][~over])


def test_qk_clip_is_its_definition(fields: dict[str, Any]) -> None:
    """Of a head whose logits peak at 2 tau, gamma = 1/2: both nope parts shrink by sqrt(gamma), the rope query by
    gamma; values, the shared rope key, other heads and other weights stay."""
    model = two_models(fields)[1]
    config = model.config
    nope, heads = config.qk_nope_head_dim, config.num_attention_heads
    layers = len(list(model.decoder_layers()))
    clipped = (torch.arange(layers * heads).view(layers, heads) % 3) == 1
    assert (clipped.any(dim=1)).all()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert qk_clip(model, torch.where(clipped, 30.0, 12.0), 15.0) == int(clipped.sum())
    for i in range(layers):
        for name, plain, sizes, shrunk in (
            ("q_b_proj", nope, config.qk_head_dim, (0.5**0.5, 0.5)),
            ("kv_b_proj", nope, nope + config.v_head_dim, (0.5**0.5, 1.0)),
        ):
            was = before.pop(f"layers.{i}.self_attn.{name}").view(heads, sizes, -1)
            factors = torch.ones(heads, sizes, 1)
            factors[clipped[i], :plain], factors[clipped[i], plain:] = shrunk
            now = dict(model.named_parameters())[f"layers.{i}.self_attn.{name}"].detach()
            torch.testing.assert_close(now.view(was.shape), was * factors, rtol=1e-6, atol=0)
    assert before
    for name, was in before.items():
        assert torch.equal(dict(model.named_parameters())[name], was), name


def test_training_with_a_low_tau_keeps_logits_low(fields: dict[str, Any], batches: list[Batch]) -> None:
    free, held = small_run(fields), small_run(fields, qk_clip=2.0)
    seen = [(free.train(b), held.train(b)) for b in batches[:8]]
    assert sum(clip["clipped"] for _, clip in seen) > 0
    assert seen[-1][0]["peak"] > 2.5
    assert seen[-1][1]["peak"] < 2.5


def test_balance_moves_towards_even_loads(fields: dict[str, Any]) -> None:
    model = two_models(fields)[0]
    before = [moe.bias.clone() for moe in model.moe_layers()]
    loads = torch.ones(2, 24) * 10
    loads[0, :2], loads[1, :2] = torch.tensor([40.0, 0.0]), torch.tensor([4.0, 12.0])
    balance(model, loads, 0.01)
    for moe, bias, load in zip(model.moe_layers(), before, loads, strict=True):
        mean = float(load.mean())
        wanted = torch.tensor([0.01 * max(-1.0, min(1.0, 1 - float(x) / mean)) for x in load])
        assert wanted[2] != 0
        torch.testing.assert_close(moe.bias, bias + wanted - (bias + wanted).mean(), rtol=0, atol=1e-7)
        assert abs(float(moe.bias.mean())) < 1e-6


@pytest.mark.parametrize("threads", [2, None])
def test_a_few_steps_reduce_the_loss(
    fields: dict[str, Any], batches: list[Batch], threads: int | None
) -> None:
    run = small_run(fields, threads)
    losses = [run.train(batches[0])["loss"] for _ in range(12)]
    assert losses[-1] < losses[0] - 0.5


def test_resumed_run_equals_uninterrupted_one(
    fields: dict[str, Any], batches: list[Batch], tmp_path: Path
) -> None:
    whole, first = small_run(fields), small_run(fields)
    for batch in batches[:5]:
        whole.train(batch)
    for batch in batches[:3]:
        first.train(batch)
    first.save(tmp_path / "run.pt")
    second = small_run(fields)
    second.restore(tmp_path / "run.pt")
    assert second.next_document == batches[2].next_document
    for batch in batches[3:5]:
        second.train(batch)
    assert (whole.step, whole.tokens_seen) == (second.step, second.tokens_seen)
    for (name, mine), theirs in zip(
        second.model.state_dict().items(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name


def test_a_complete_run_goes_on_with_more_tokens(
    fields: dict[str, Any], batches: list[Batch], tmp_path: Path
) -> None:
    tokens = len(batches[0].tokens)
    first = small_run(fields, tokens=tokens)
    first.train(batches[0])
    assert first.settings.schedule(first.tokens_seen, 1000) == 0
    first.save(tmp_path / "run.pt")
    same, longer = small_run(fields), small_run(fields)
    same.restore(tmp_path / "run.pt")
    assert same.settings.tokens == tokens
    longer.restore(tmp_path / "run.pt", 4 * tokens)
    assert longer.settings.schedule(longer.tokens_seen, 1000) == 0.75**longer.settings.decay_power
    before = {name: tensor.clone() for name, tensor in longer.model.state_dict().items()}
    longer.train(batches[1])
    assert any(not torch.equal(tensor, before[name]) for name, tensor in longer.model.state_dict().items())


def test_a_run_begins_with_an_exported_model(fields: dict[str, Any], tmp_path: Path) -> None:
    text = text_digest(ASSETS)
    learnt, run = small_run(fields, seed=1), small_run(fields, text=text)
    with torch.no_grad():  # what bfloat16 and fp8 leave as it is
        for parameter in learnt.model.parameters():
            parameter.copy_(parameter.sign())
        for moe in learnt.model.moe_layers():
            moe.bias.normal_()
    out = export(learnt.model, fields, ASSETS, tmp_path / "model")
    begin_with(out, run)
    for (name, mine), theirs in zip(
        run.model.state_dict().items(), learnt.model.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    wider = small_run(config_fields(Encoder(ASSETS).tokenizer, SMALL | {"intermediate_size": 64}), text=text)
    with pytest.raises(UsageError, match="another shape"):
        begin_with(out, wider)
    with (out / "chat_template.jinja").open("a", encoding="utf-8") as template:
        template.write(" ")
    with pytest.raises(UsageError, match="chat template"):
        begin_with(out, run)


def test_restore_refuses_other_runs_and_damage(fields: dict[str, Any], tmp_path: Path) -> None:
    run = small_run(fields)
    run.save(tmp_path / "run.pt")
    with pytest.raises(UsageError, match="other settings"):
        small_run(fields, seed=9).restore(tmp_path / "run.pt")
    run.tokens_seen = 900
    run.save(tmp_path / "run.pt")
    with pytest.raises(UsageError, match="has seen 900 tokens; a length of 800 is less"):
        small_run(fields).restore(tmp_path / "run.pt", 800)
    with pytest.raises(FileNotFoundError):
        run.restore(tmp_path / "none.pt")
    data = (tmp_path / "run.pt").read_bytes()
    (tmp_path / "run.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(UsageError, match="not a training checkpoint"):
        run.restore(tmp_path / "run.pt")
    (tmp_path / "run.pt").write_bytes(b"rubbish")
    with pytest.raises(UsageError, match="not a training checkpoint"):
        run.restore(tmp_path / "run.pt")


def test_schedule_warms_up_and_falls_to_nought() -> None:
    settings = Settings(tokens=400, warmup_steps=10, decay_power=1.5)
    assert settings.schedule(0, 0) == pytest.approx(0.1)
    assert settings.schedule(0, 9) == 1.0
    assert settings.schedule(300, 90) == pytest.approx(0.125)
    assert settings.schedule(400, 99) == 0.0
    assert settings.schedule(500, 120) == 0.0


def test_feed_goes_on_from_any_document(encoder: Encoder) -> None:
    with Feed(ASSETS, seed=3, batch_tokens=2000, start=0, workers=1) as feed:
        straight = list(islice(feed.batches(), 5))
    with Feed(ASSETS, seed=3, batch_tokens=2000, start=straight[1].next_document, workers=2) as feed:
        resumed = list(islice(feed.batches(), 3))
    assert all(len(batch.tokens) == int(batch.lengths.sum()) == 2000 for batch in straight)
    for mine, theirs in zip(resumed, straight[2:], strict=True):
        assert torch.equal(mine.tokens, theirs.tokens)
        assert torch.equal(mine.targets, theirs.targets)
        assert mine.next_document == theirs.next_document
    first = document(encoder, "train", 3, 0)
    assert torch.equal(
        straight[0].tokens[: len(first.tokens)], torch.from_numpy(first.tokens.astype(np.int64))
    )


def test_feed_cuts_long_documents_and_refuses_small_batches(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrid.demo.trainer.feed.LONGEST", 100)
    with Feed(ASSETS, seed=3, batch_tokens=1500, start=0, workers=1) as feed:
        batch = next(feed.batches())
    assert int(batch.lengths.max()) == 100
    assert int(batch.lengths.sum()) == len(batch.tokens) == 1500
    for i, first in enumerate(np.cumsum(batch.lengths.numpy())[:-2] - 100):
        whole = document(encoder, "train", 3, i).tokens.astype(np.int64)
        if len(whole) > 100:
            assert torch.equal(batch.tokens[first : first + 100], torch.from_numpy(whole[:100]))
    with pytest.raises(UsageError, match="1024 at least"):
        Feed(ASSETS, seed=3, batch_tokens=1000, start=0, workers=1)


def test_targets_are_the_next_produced_tokens(encoder: Encoder) -> None:
    documents = [document(encoder, "train", 0, i) for i in range(4)]
    batch = collate(documents, 4)
    at = 0
    for one in documents:
        for i in range(len(one.tokens)):
            produced = i + 1 < len(one.tokens) and one.produced[i + 1]
            assert batch.targets[at + i] == (int(one.tokens[i + 1]) if produced else -1)
        at += len(one.tokens)


def test_exact_match_agrees_with_greedy_decoding(fields: dict[str, Any], encoder: Encoder) -> None:
    """A model overfitted on two short conversations gets some turns right and others wrong; teacher forcing must
    say the same of each as really decoding it."""
    config = ModelConfig.from_dict(fields)
    torch.manual_seed(0)
    model = DemoModel(config, NativeOps(2, exact=True))
    some = sorted(cases(encoder, "train", 60), key=lambda case: len(case.encoded.tokens))
    learnt, unseen = some[:3], some[3:5]
    batch = collate([case.encoded for case in learnt], 0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model.loss(batch.tokens, batch.targets, Documents.of(batch.lengths, CPU))[0]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    checked = []
    for case in learnt + unseen:
        tally, _, _ = evaluate(model, [case])
        probes = [p for p in case.conversation.probes if p.exact]
        right = 0
        for probe in probes:
            tokens, wanted = (
                prompt_of(encoder, case.conversation, probe.index),
                reply_of(encoder, case.conversation, probe.index),
            )
            right += decodes_to(model, tokens, wanted)
        if probes:
            checked.append((right, sum(hits for hits, _ in tally.kinds().values())))
    assert all(decoded == forced for decoded, forced in checked)
    assert checked[0][0] > 0
    assert any(decoded == 0 for decoded, _ in checked)


@torch.no_grad()
def decodes_to(model: DemoModel, prompt: list[int], wanted: list[int]) -> bool:
    """Whether greedy decoding, token by token, gives `wanted`."""
    tokens = list(prompt)
    for token in wanted:
        logits, _ = model.logits(torch.tensor(tokens), Documents.of(torch.tensor([len(tokens)]), CPU))
        tokens.append(int(logits[-1].argmax()))
        if tokens[-1] != token:
            return False
    return True


def test_spans_are_the_probed_turns(encoder: Encoder) -> None:
    talk = conversation("train", Random(5))
    case = Case.of(encoder, talk)
    for probe, (first, last) in zip(talk.probes, case.spans, strict=True):
        assert case.encoded.tokens[first:last].tolist() == reply_of(encoder, talk, probe.index)
    everything = exact_matches([case], [np.append(case.encoded.tokens[1:], 0).astype(np.int64)])
    assert all(hits == trials for hits, trials in everything.kinds().values())


def test_loop_trains_saves_evaluates_and_goes_on(
    fields: dict[str, Any], encoder: Encoder, tmp_path: Path
) -> None:
    examined = cases(encoder, "dev", 3)
    options: dict[str, Any] = {"evaluate_every": 3000, "save_seconds": 0.0}
    run = small_run(fields, tokens=5_000, batch_tokens=1500)
    with Feed(ASSETS, 0, 1500, 0, 1) as feed:
        Loop(run, tmp_path, examined, **options, stop_after=0.0).train(feed)
    assert not run.complete
    again = small_run(fields, tokens=5_000, batch_tokens=1500)
    again.restore(tmp_path / "checkpoint.pt")
    assert again.step == run.step == 1
    with Feed(ASSETS, 0, 1500, again.next_document, 1) as feed:
        Loop(again, tmp_path, examined, **options, stop_after=None).train(feed)
    assert again.complete
    assert again.history[-1]["tokens"] == again.tokens_seen
    assert {"exact", "loss"} <= again.history[-1].keys()
    saved = small_run(fields, tokens=5_000, batch_tokens=1500)
    saved.restore(tmp_path / "checkpoint.pt")
    assert saved.history == again.history


def test_what_was_learnt_survives_the_death_of_a_process_that_writes_data(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    class Fragile(Feed):
        """Loses one of its two processes after the first batch, as when memory runs out."""

        def batches(self) -> Iterator[Batch]:
            for i, batch in enumerate(super().batches()):
                yield batch
                if i == 0:
                    os.kill(next(iter(self._pool._processes)), signal.SIGKILL)

    run = small_run(fields, tokens=10_000_000, batch_tokens=1500)
    loop = Loop(run, tmp_path, [], evaluate_every=1e9, save_seconds=1e9, stop_after=100)
    with Fragile(ASSETS, 0, 1500, 0, 2) as feed, pytest.raises(HybridError, match="ended from outside"):
        loop.train(feed)
    again = small_run(fields, tokens=10_000_000, batch_tokens=1500)
    again.restore(tmp_path / "checkpoint.pt")
    assert again.step == run.step >= 1


def test_a_full_disk_costs_neither_the_run_nor_the_last_save(
    fields: dict[str, Any],
    encoder: Encoder,
    batches: list[Batch],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, draft = small_run(fields, tokens=2 * len(batches[0].tokens)), tmp_path / "checkpoint.part"
    run.save(tmp_path / "checkpoint.pt")

    class Filling(Feed):
        """The disk is full while the first batch is learnt from."""

        def batches(self) -> Iterator[Batch]:
            draft.symlink_to("/dev/full")
            yield batches[0]
            assert not draft.exists()
            again = small_run(fields)
            again.restore(tmp_path / "checkpoint.pt")
            assert again.step == 0
            yield batches[0]

    loop = Loop(
        run, tmp_path, cases(encoder, "dev", 3), evaluate_every=1e9, save_seconds=0.0, stop_after=None
    )
    with Filling(ASSETS, 0, 1500, 0, 1) as feed:
        loop.train(feed)
    assert "No space left" in " ".join(capsys.readouterr().out.split())
    again = small_run(fields)
    again.restore(tmp_path / "checkpoint.pt")
    assert again.step == 2


def test_a_run_that_diverged_is_not_saved(
    fields: dict[str, Any], batches: list[Batch], tmp_path: Path
) -> None:
    run, file = small_run(fields), tmp_path / "checkpoint.pt"
    run.train(batches[0])
    run.save(file)
    with torch.no_grad():
        run.model.norm[3] = torch.nan
    with pytest.raises(HybridError, match="not finite"):
        run.save(file)
    run.restore(file)
    assert run.model.norm.isfinite().all()


def test_plot_is_well_formed(tmp_path: Path) -> None:
    from xml.etree import ElementTree

    history = [{"tokens": 1000.0 * i, "loss": 5.0 / i, "exact": i / 20} for i in range(1, 11)]
    draw(history, tmp_path / "loss.svg")
    root = ElementTree.parse(tmp_path / "loss.svg").getroot()
    lines = [e for e in root if e.tag.endswith("polyline")]
    assert [len(line.attrib["points"].split()) for line in lines] == [10, 10]
