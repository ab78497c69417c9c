"""The GPU side on a real GPU, against the CPU's kernels; skipped where there is none."""

from pathlib import Path

import pytest
import torch

from hybrid import Engine, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and torch's CUDA build"),
]


def test_logits_and_greedy_text_agree_with_the_cpu(tiny_model: Path) -> None:
    prompt = list(range(3, 60))
    greedy = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    with Engine.load(tiny_model, device="cpu") as cpu, Engine.load(tiny_model, device="cuda") as gpu:
        assert gpu.stats()["device"].startswith("cuda")
        ours, theirs = gpu.logits(prompt).double(), cpu.logits(prompt).double()
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-4
        assert [s.token_id for s in gpu.generate(prompt, greedy)] == [
            s.token_id for s in cpu.generate(prompt, greedy)
        ]
