"""The whole model against transformers' DeepseekV3 on the same files, over the shapes a config can take."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid import Engine, SamplingParams
from hybrid.layers.plain import PlainOps
from hybrid.model import Model
from hybrid.synth import synthesize
from tests.reference import transformers_oracle as oracle

SMALL = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "moe_intermediate_size": 96,
    "n_routed_experts": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 80,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "k2-like": {"n_routed_experts": 384, "hidden_size": 128, "moe_intermediate_size": 32},
    "deepseek-v3-like groups": {
        "n_group": 8,
        "topk_group": 4,
        "n_routed_experts": 64,
        "routed_scaling_factor": 2.5,
        "rope_theta": 10000.0,
        "rope_scaling.factor": 40.0,
        "rope_scaling.beta_fast": 32.0,
    },
    "no q lora": {"q_lora_rank": None},
    "beyond the original context": {
        "rope_scaling.original_max_position_embeddings": 64,
        "rope_scaling.beta_fast": 32.0,
        "rope_scaling.factor": 16.0,
    },
    "mscales that differ": {"rope_scaling.mscale": 1.0, "rope_scaling.mscale_all_dim": 0.707},
    "several shared experts and dense layers": {
        "n_shared_experts": 3,
        "first_k_dense_replace": 2,
        "num_hidden_layers": 4,
        "norm_topk_prob": False,
    },
    "ragged blocks": {
        "hidden_size": 200,
        "intermediate_size": 333,
        "moe_intermediate_size": 150,
        "kv_lora_rank": 72,
        "q_lora_rank": 129,
        "qk_nope_head_dim": 24,
        "v_head_dim": 40,
        "num_attention_heads": 3,
    },
    "every other layer sparse, tied head, no yarn": {
        "moe_layer_freq": 2,
        "num_hidden_layers": 5,
        "tie_word_embeddings": True,
        "rope_scaling": None,
    },
}

LENGTH = {"beyond the original context": 700}


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    name: str = request.param
    return name, synthesize(
        tmp_path_factory.mktemp("parity") / "model", "tiny", {**SMALL, **CONFIGS[name]}, seed=7
    )


def relative_l2(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def tokens(name: str, vocab_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(len(name))
    return torch.randint(0, vocab_size, (LENGTH.get(name, 90),), generator=generator).tolist()


def test_agrees_with_transformers(case: tuple[str, Path], record_property: Any) -> None:
    name, directory = case
    theirs = oracle.load(directory)
    with Engine.load(directory, device="cpu") as engine:
        ids = tokens(name, engine.config.vocab_size)
        ours = engine.logits(ids)
        expected = oracle.logits(theirs, ids)
        error = relative_l2(ours, expected)
        record_property("relative_l2", error)
        print(f"{name}: relative L2 {error:.2e}, logits std {float(expected.std()):.2f}")
        assert error < 1e-4
        assert (ours.argmax(-1) == expected.argmax(-1)).all()

        prompt = ids[:40]
        steps = engine.generate(prompt, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
        assert [step.token_id for step in steps] == oracle.greedy(theirs, prompt, 12)


def test_prefill_chunks_and_decode_agree(case: tuple[str, Path]) -> None:
    name, directory = case
    with Engine.load(directory, device="cpu") as engine:
        ids = tokens(name, engine.config.vocab_size)[:200]
        model = engine._runtime.model
        whole = engine.logits(ids)
        with torch.inference_mode():
            cache = model.new_cache()
            chunks = [
                model.logits(model.prefill(ids[begin : begin + 37], cache), decode=False)
                for begin in range(0, len(ids), 37)
            ]
            cache = model.new_cache()
            singly = [model.logits(model.decode([token], [cache]), decode=True) for token in ids]
        assert relative_l2(torch.cat(chunks), whole) < 1e-4
        assert relative_l2(torch.cat(singly), whole) < 1e-4


def test_the_plain_torch_side_agrees_with_the_kernels(case: tuple[str, Path]) -> None:
    """What runs on a GPU, here on the CPU: prefill and decode, routed experts through the same executor."""
    name, directory = case
    with Engine.load(directory, device="cpu") as engine:
        runtime = engine._runtime
        ids = tokens(name, engine.config.vocab_size)[:60]
        ops = PlainOps(torch.device("cpu"))
        with torch.inference_mode():
            plain = Model(engine.config, runtime.files.checkpoint, ops, runtime.experts)
            cache = plain.new_cache()
            prefilled = plain.logits(plain.prefill(ids[:50], cache), decode=False)
            decoded = [plain.logits(plain.decode([token], [cache]), decode=True) for token in ids[50:]]
        assert relative_l2(torch.cat((prefilled, *decoded)), engine.logits(ids)) < 1e-4
