"""hybrid/inspection.py beyond what tests/integration/test_bad_checkpoints.py shows: sizes that no word divides."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hybrid import inspection
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


@contextmanager
def damaged(model: Path, tensor: str, element: int, value: bytes) -> Iterator[None]:
    """One value of a tensor replaced for a while."""
    info = Checkpoint.open(model).info(tensor)

    def swap(new: bytes) -> bytes:
        with info.file.open("r+b") as stream:
            stream.seek(info.start + element * len(value))
            before = stream.read(len(value))
            stream.seek(info.start + element * len(value))
            stream.write(new)
        return before

    sound = swap(value)
    try:
        yield
    finally:
        swap(sound)


@pytest.mark.parametrize("element", [*range(9), *range(ROWS * COLUMNS - 9, ROWS * COLUMNS)])
def test_nan_is_found_in_the_bytes_past_the_last_word(model: Path, element: int) -> None:
    with damaged(model, NAME, element, b"\xff"):
        found = inspect_model(model, full=True)
    assert len(found.problems) == 1
    assert (
        f"{NAME}: NaN weights: 1, the first at [{element // COLUMNS}, {element % COLUMNS}]"
        in found.problems[0]
    )
    assert found.verdict == "damaged tensors: 1"
    assert inspect_model(model, full=True).problems == []


BF16 = [b"\x80\x7f", b"\x80\xff", b"\xc0\x7f", b"\x81\xff"]  # the infinities, a quiet and a loud NaN
F32 = [struct.pack("<I", code) for code in (0x7F800000, 0xFF800000, 0x7FC00000, 0xFF800001)]


@pytest.mark.parametrize("element", [0, 3, 4, COLUMNS - 1])
@pytest.mark.parametrize("value", BF16)
@pytest.mark.parametrize(
    "tensor",
    [
        "model.norm.weight",
        "model.layers.0.self_attn.q_a_layernorm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.1.mlp.gate.weight",
    ],
)
def test_nan_and_infinity_are_found_in_bf16(model: Path, tensor: str, value: bytes, element: int) -> None:
    shape = Checkpoint.open(model).info(tensor).shape
    element = min(element, shape[-1] - 1)
    at = [element] if len(shape) == 1 else [0, element]
    with damaged(model, tensor, element, value):
        (found,) = inspect_model(model, full=True).problems
    assert f"{tensor}: NaN or infinite weights: 1, the first at {at}" in found


@pytest.mark.parametrize("value", F32)
@pytest.mark.parametrize("element", range(5))
def test_nan_and_infinity_are_found_in_f32(tmp_path: Path, value: bytes, element: int) -> None:
    tensor = "model.norm.weight"
    save_file({tensor: torch.ones(5)}, tmp_path / "model.safetensors")
    with damaged(tmp_path, tensor, element, value):
        (found,) = inspection._damaged(Checkpoint.open(tmp_path), lambda *_: None)
    assert f"{tensor}: NaN or infinite weights: 1, the first at [{element}]" in found


def test_the_largest_numbers_are_no_problem(tmp_path: Path) -> None:
    ends = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.bfloat16)}
    tensors = {str(dtype): torch.tensor([end, -end] * 5, dtype=dtype) for dtype, end in ends.items()}
    tensors["fp8"] = torch.tensor([448.0, -448.0] * 5).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    assert inspection._damaged(Checkpoint.open(tmp_path), lambda *_: None) == []


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "SCAN_BYTES", 64)
    weights = torch.ones(10, 11)
    weights[5, 3] = float("nan")
    weights[9, 10] = float("inf")
    save_file({"a": weights}, tmp_path / "model.safetensors")
    (found,) = inspection._damaged(Checkpoint.open(tmp_path), lambda *_: None)
    assert "NaN or infinite weights: 2, the first at [5, 3]" in found


def test_progress_reaches_the_end(model: Path) -> None:
    seen: list[float] = []
    inspect_model(model, full=True, progress=lambda _, fraction: seen.append(fraction))
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1.0)
