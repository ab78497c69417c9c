"""Training the embedded model on a real GPU, against the same steps on the CPU; skipped where there is none."""

from pathlib import Path

import pytest
import torch

from hybrid.demo.data.encode import Encoder
from hybrid.demo.shape import config_fields
from hybrid.demo.trainer.feed import Batch, collate, document
from hybrid.demo.trainer.state import Run, Settings
from hybrid.synth import ASSETS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and torch's CUDA build"),
]


@pytest.fixture(scope="module")
def batch() -> Batch:
    encoder = Encoder(ASSETS)
    return collate([document(encoder, "train", 0, i) for i in range(3)], 3)


def new_run(device: str) -> Run:
    fields = config_fields(Encoder(ASSETS).tokenizer, {"num_hidden_layers": 3, "n_routed_experts": 24})
    return Run(Settings(tokens=40_000, warmup_steps=4), fields, torch.device(device))


def test_steps_agree_with_the_cpu(batch: Batch) -> None:
    losses = []
    for device in ("cpu", "cuda"):
        run = new_run(device)
        losses.append([run.train(batch)["loss"] for _ in range(4)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[1][-1] < losses[1][0]


def test_a_run_goes_on_from_its_save(batch: Batch, tmp_path: Path) -> None:
    run, again = new_run("cuda"), new_run("cuda")
    for _ in range(3):
        run.train(batch)
    run.save(tmp_path / "run.pt")
    again.restore(tmp_path / "run.pt")
    for _ in range(2):
        assert again.train(batch)["loss"] == pytest.approx(run.train(batch)["loss"], rel=1e-3)
