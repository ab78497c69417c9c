"""Training the embedded model on a real GPU, against the same steps on the CPU; skipped where there is none."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from hybrid.demo.data.encode import Encoder
from hybrid.demo.shape import config_fields
from hybrid.demo.trainer.feed import Batch, Feed, collate, document
from hybrid.demo.trainer.state import Run, Settings
from hybrid.synth import ASSETS
from offload.errors import UsageError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and torch's CUDA build"),
]


TOKENS = 2000


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    with Feed(ASSETS, seed=0, batch_tokens=TOKENS, start=0, workers=1) as feed:
        return list(islice(feed.batches(), 12))


def new_run(device: str) -> Run:
    fields = config_fields(Encoder(ASSETS).tokenizer, {"num_hidden_layers": 3, "n_routed_experts": 24})
    settings = Settings(tokens=40_000, warmup_steps=4, batch_tokens=TOKENS)
    return Run(settings, fields, torch.device(device))


def test_steps_agree_with_the_cpu(batches: list[Batch]) -> None:
    """Before the capture and after it: loss, load, largest logit."""
    seen = []
    for device in ("cpu", "cuda"):
        run = new_run(device)
        seen.append([run.train(batch) for batch in batches])
    for mine, theirs in zip(seen[1], seen[0], strict=True):
        assert mine["tokens"] == theirs["tokens"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
        assert mine["peak"] == pytest.approx(theirs["peak"], rel=5e-2)
        assert mine["load"] == pytest.approx(theirs["load"], rel=5e-2)
    assert seen[1][-1]["loss"] < seen[1][0]["loss"] - 0.5


@pytest.mark.parametrize(
    ("begins", "ends", "rel"), [("cuda", "cuda", 1e-3), ("cuda", "cpu", 1e-2), ("cpu", "cuda", 1e-2)]
)
def test_a_run_goes_on_from_its_save(
    batches: list[Batch], tmp_path: Path, begins: str, ends: str, rel: float
) -> None:
    """The GPU's is made after the capture, and so holds a rate on the GPU."""
    run, again = new_run(begins), new_run(ends)
    for batch in batches[:5]:
        run.train(batch)
    run.save(tmp_path / "run.pt")
    again.restore(tmp_path / "run.pt")
    for batch in batches[5:]:
        assert again.train(batch)["loss"] == pytest.approx(run.train(batch)["loss"], rel=rel)


def test_a_batch_of_another_size_is_refused(batches: list[Batch]) -> None:
    run = new_run("cuda")
    longer = collate([document(Encoder(ASSETS), "train", 0, i) for i in range(9)], 9)
    assert len(longer.tokens) != TOKENS
    with pytest.raises(UsageError, match=f"made for {TOKENS} tokens"):
        run.train(longer)
