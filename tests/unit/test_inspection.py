"""hybrid/inspection.py beyond what tests/integration/test_bad_checkpoints.py shows: sizes that no word divides."""

from pathlib import Path

import pytest

from hybrid.inspection import inspect_model
from hybrid.synth import synthesize
from offload.checkpoint import Checkpoint

NAME = "model.layers.1.mlp.experts.1.up_proj.weight"
ROWS, COLUMNS = 45, 161


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": COLUMNS, "moe_intermediate_size": ROWS, "num_hidden_layers": 2}
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1}
    return synthesize(tmp_path_factory.mktemp("odd") / "model", "tiny", {**sizes, **experts})


@pytest.mark.parametrize("element", [*range(9), *range(ROWS * COLUMNS - 9, ROWS * COLUMNS)])
def test_nan_is_found_in_the_bytes_past_the_last_word(model: Path, element: int) -> None:
    info = Checkpoint.open(model).info(NAME)
    with info.file.open("r+b") as stream:
        stream.seek(info.start + element)
        before = stream.read(1)
        stream.seek(info.start + element)
        stream.write(b"\xff")
    found = inspect_model(model, full=True).problems
    with info.file.open("r+b") as stream:
        stream.seek(info.start + element)
        stream.write(before)
    assert len(found) == 1
    assert f"{NAME}: NaN weights: 1, the first at [{element // COLUMNS}, {element % COLUMNS}]" in found[0]
    assert inspect_model(model, full=True).problems == []


def test_progress_reaches_the_end(model: Path) -> None:
    seen: list[float] = []
    inspect_model(model, full=True, progress=lambda _, fraction: seen.append(fraction))
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1.0)
