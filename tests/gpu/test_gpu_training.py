"""Training the embedded model on a real GPU, against the same steps on the CPU; skipped where there is none."""

import pytest
import torch

from hybrid.demo.data.encode import Encoder
from hybrid.demo.shape import config_fields
from hybrid.demo.trainer.feed import collate, document
from hybrid.demo.trainer.state import Run, Settings
from hybrid.synth import ASSETS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and torch's CUDA build"),
]


def test_steps_agree_with_the_cpu() -> None:
    encoder = Encoder(ASSETS)
    fields = config_fields(encoder.tokenizer, {"num_hidden_layers": 3, "n_routed_experts": 24})
    batch = collate([document(encoder, "train", 0, i) for i in range(3)], 3)
    settings = Settings(tokens=40_000, warmup_steps=4)
    losses = []
    for device in ("cpu", "cuda"):
        run = Run(settings, fields, torch.device(device))
        losses.append([run.train(batch)["loss"] for _ in range(4)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[1][-1] < losses[1][0]
