"""offload/checkpoint.py and offload/shard.py: what the safetensors library reads, they read; damage is named."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from offload.checkpoint import INDEX_NAME, Checkpoint
from offload.errors import CheckpointError
from offload.fp8 import quantize
from offload.shard import TensorInfo, open_shard
from tests.reference.safetensors_bytes import entry, join, split


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes, scale = quantize(torch.randn(130, 200, generator=generator))
    return {
        "a.weight": codes,
        "a.weight_scale_inv": scale,
        "b.weight": torch.randn(3, 5, generator=generator).bfloat16(),
        "c.bias": torch.randn(7, generator=generator),
        "ids": torch.arange(5),
        "empty": torch.empty(0, 4),
        "number": torch.tensor(3.0),
        "flags": torch.tensor([True, False, True]),
    }


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    everything = tensors()
    names = list(everything)
    index = {name: f"model-{1 + i % 2}-of-2.safetensors" for i, name in enumerate(names)}
    for file in set(index.values()):
        save_file({name: everything[name] for name in names if index[name] == file}, tmp_path / file)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return tmp_path


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_reads_what_the_safetensors_library_wrote(layout: str, request: pytest.FixtureRequest) -> None:
    checkpoint = Checkpoint.open(request.getfixturevalue(layout))
    assert checkpoint.names == tuple(sorted(tensors()))
    for name, wanted in tensors().items():
        ours = checkpoint.tensor(name)
        assert (ours.dtype, ours.shape) == (wanted.dtype, wanted.shape)
        assert ours.flatten().view(torch.uint8).tolist() == wanted.flatten().view(torch.uint8).tolist()
    weight = checkpoint.weight("a")
    torch.testing.assert_close(weight.scale, tensors()["a.weight_scale_inv"], rtol=0, atol=0)
    assert checkpoint.weight("b").scale is None
    assert "a.weight" in checkpoint
    assert "z.weight" not in checkpoint


def test_info_gives_the_bytes_in_the_file(single: Path) -> None:
    info = Checkpoint.open(single).info("c.bias")
    assert (info.dtype, info.shape) == ("F32", (7,))
    raw = info.file.read_bytes()[info.start : info.end]
    np.testing.assert_array_equal(np.frombuffer(raw, np.float32), tensors()["c.bias"].numpy())


def test_tensors_are_views_that_outlive_the_checkpoint(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    tensor = checkpoint.tensor("a.weight")
    assert tensor.data_ptr() == checkpoint.tensor("a.weight").data_ptr()
    before = Path("/proc/self/maps").read_text().count(str(single))
    checkpoint.close()
    del checkpoint
    assert before == Path("/proc/self/maps").read_text().count(str(single)) == 1
    assert torch.equal(tensor.view(torch.uint8), tensors()["a.weight"].view(torch.uint8))
    del tensor
    assert str(single) not in Path("/proc/self/maps").read_text()


def test_the_mapping_cannot_be_written(single: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from offload.checkpoint import Checkpoint\n"
        "Checkpoint.open(Path(sys.argv[1])).tensor('c.bias').fill_(1.0)"
    )
    before = (single / "model.safetensors").read_bytes()
    done = subprocess.run([sys.executable, "-c", code, single], capture_output=True, check=False, timeout=120)
    assert done.returncode == -11  # SIGSEGV
    assert (single / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("padding", range(4))
def test_data_off_its_alignment_is_read_all_the_same(tmp_path: Path, padding: int) -> None:
    values = np.arange(6, dtype=np.float32)
    header = json.dumps({"x": entry("F32", [2, 3], 0, 24)}).encode()
    (tmp_path / "model.safetensors").write_bytes(join(header + b" " * padding, values.tobytes()))
    np.testing.assert_array_equal(Checkpoint.open(tmp_path).tensor("x").numpy(), values.reshape(2, 3))


def test_shards_may_be_links(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As Hugging Face's cache lays out a snapshot."""
    snapshot = tmp_path_factory.mktemp("snapshot")
    for file in sharded.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert Checkpoint.open(snapshot).names == Checkpoint.open(sharded).names


# -- damage

X = {"x": entry("F32", [2], 0, 8)}
DATA = bytes(8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\x08\0\0", "length is given as 8 bytes, but the file holds 3"),
        (join(X, DATA, length=10**6), "length is given as 1000000 bytes, but the file holds"),
        (join(b"x" * 64, length=2**63), "length is given as 9223372036854775808 bytes"),
        (join(b"{nonsense}", DATA), "header is not readable as JSON"),
        (join(b'{"x": "\xff"}', DATA), "header is not readable as JSON"),
        (join(b"[" * 200_000, DATA), "nested too deeply"),
        (join(b"[1, 2]", DATA), "header is not a JSON object"),
        (join(b'{"x": {}, "x": {}}', DATA), "key 'x' appears twice"),
        (join({"x": 3}, DATA), "x: dtype None is unknown"),
        (join({"x": entry("F7", [2], 0, 8)}, DATA), "x: dtype 'F7' is unknown"),
        (join({"x": entry("F32", [-2], 0, 8)}, DATA), "x: shape [-2] is not a list of up to 8 sizes"),
        (join({"x": entry("F32", [2.0], 0, 8)}, DATA), "x: shape [2.0] is not a list"),
        (join({"x": entry("F32", [True, 2], 0, 8)}, DATA), "x: shape [True, 2] is not a list"),
        (join({"x": entry("F32", [2**70], 0, 8)}, DATA), "x: shape [1180591620717411303424] is not a list"),
        (join({"x": entry("F32", [1] * 9, 0, 4)}, bytes(4)), "is not a list of up to 8 sizes"),
        (join({"x": entry("F32", [2], 0, -8)}, DATA), "x: data_offsets [0, -8] is not a pair"),
        (join({"x": {**X["x"], "data_offsets": [0]}}, DATA), "x: data_offsets [0] is not a pair"),
        (join({"x": entry("F32", [2], 8, 0)}, DATA), "span -8 bytes, but F32 [2] takes 8"),
        (join({"x": entry("F32", [3], 0, 8)}, DATA), "span 8 bytes, but F32 [3] takes 12"),
        (join({"x": entry("BF16", [2], 0, 8)}, DATA), "span 8 bytes, but BF16 [2] takes 4"),
        (join(X, DATA[:5]), "x: its data ends at byte"),
        (join(X, DATA + b"more"), "the last tensor ends at byte"),
        (join({**X, "y": entry("F32", [1], 4, 8)}, DATA), "y: its data starts at byte"),
        (join({"x": entry("F32", [1], 4, 8)}, DATA), "leaves a hole"),
        (
            join({"a\x1b[2J": entry("F32", [2], 0, 8)}, DATA),
            "'a\\x1b[2J': the tensor's name is empty, too long or",
        ),
        (join({"": entry("F32", [2], 0, 8)}, DATA), "'': the tensor's name is empty"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)
    assert str(caught.value).endswith("The file is damaged or incomplete: download it again.")


def test_a_header_above_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 200_000_000))
        stream.truncate(300_000_000)
    with pytest.raises(CheckpointError, match="given as 200000000 bytes; at most 100000000 are allowed"):
        Checkpoint.open(tmp_path)


def test_overlapping_tensors_are_named(tmp_path: Path) -> None:
    header = {"x": entry("F32", [2], 0, 8), "y": entry("F32", [2], 4, 12)}
    (tmp_path / "model.safetensors").write_bytes(join(header, bytes(12)))
    with pytest.raises(
        CheckpointError, match=r"y: its data starts at byte \d+, which overlaps the tensor before it"
    ):
        Checkpoint.open(tmp_path)


def _edit_index(directory: Path, edit: Any) -> None:
    index = json.loads((directory / INDEX_NAME).read_text())
    edit(index["weight_map"])
    (directory / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard",
    [
        "../model-1-of-2.safetensors",
        "/etc/passwd",
        "a/../model-1-of-2.safetensors",
        "..",
        "",
        "x.bin",
        3,
        None,
        "a\0b",
    ],
)
def test_the_index_cannot_point_outside_its_directory(sharded: Path, shard: Any) -> None:
    _edit_index(sharded, lambda weights: weights.update(ids=shard))
    with pytest.raises(
        CheckpointError, match=r"expected a tensor's name|not the name of a safetensors file"
    ) as caught:
        Checkpoint.open(sharded)
    assert str(sharded / INDEX_NAME) in str(caught.value)


def test_a_tensor_that_its_shard_lacks(sharded: Path) -> None:
    _edit_index(sharded, lambda weights: weights.update({"new.weight": "model-1-of-2.safetensors"}))
    with pytest.raises(CheckpointError, match=r"model-1-of-2.safetensors: new.weight: .* does not hold it"):
        Checkpoint.open(sharded)


def test_a_tensor_missing_from_the_index(sharded: Path) -> None:
    _edit_index(sharded, lambda weights: weights.pop("ids"))
    with pytest.raises(CheckpointError, match=r"ids: the shard holds this tensor, but .* does not list it"):
        Checkpoint.open(sharded)


def test_a_tensor_in_another_shard_than_the_index_says(sharded: Path) -> None:
    _edit_index(sharded, lambda weights: weights.update({"a.weight": weights["a.weight_scale_inv"]}))
    with pytest.raises(CheckpointError, match=r"a.weight: .* places it in model-2-of-2.safetensors"):
        Checkpoint.open(sharded)


def test_missing_shards_are_counted(sharded: Path) -> None:
    (sharded / "model-2-of-2.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"model-2-of-2.safetensors: the shard is missing \(1 of 2 shards are\)"
    ):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"weight_map": []}', b'{"weight_map": {}}', b"\xff", b"[" * 10**5]
)
def test_an_index_that_is_not_one(sharded: Path, content: bytes) -> None:
    (sharded / INDEX_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not readable as JSON|no weight_map") as caught:
        Checkpoint.open(sharded)
    assert str(sharded / INDEX_NAME) in str(caught.value)


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / INDEX_NAME).unlink()
    with pytest.raises(CheckpointError, match=f"no {INDEX_NAME} and no model.safetensors, but 2 other"):
        Checkpoint.open(sharded)


def test_an_unknown_tensor(single: Path) -> None:
    with pytest.raises(CheckpointError, match=r"z\.weight: no file holds this tensor"):
        Checkpoint.open(single).info("z.weight")


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_scales_must_be_finite_and_positive(
    layout: str, value: float, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(layout)
    checkpoint = Checkpoint.open(directory)
    checkpoint.check_scales()
    info = checkpoint.info("a.weight_scale_inv")
    with info.file.open("r+b") as stream:
        stream.seek(info.start + 4 * 3)
        stream.write(struct.pack("<f", value))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory).check_scales()
    wanted = (
        f"{info.file}: a.weight_scale_inv: the scale at [1, 1] is {value}; scales must be finite and above 0"
    )
    assert str(caught.value).startswith(wanted)


@pytest.mark.parametrize("bad", range(6))
def test_the_bad_one_among_neighbouring_scales_is_named(tmp_path: Path, bad: int) -> None:
    scales = {f"{i}.weight_scale_inv": torch.full((2, 1 + i % 3), 0.5) for i in range(6)}
    scales[f"{bad}.weight_scale_inv"][1, -1] = 0.0
    save_file({**scales, "3.weight": torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=rf": {bad}\.weight_scale_inv: the scale at \[1, {bad % 3}\] is 0.0"
    ):
        Checkpoint.open(tmp_path).check_scales()


def opened_or_refused(file: Path) -> tuple[torch.Tensor, list[TensorInfo]] | None:
    """None if the file is refused; the refusal must be one printable line that names the file."""
    refusal = None
    try:
        return open_shard(file)
    except CheckpointError as error:
        refusal = str(error)
    assert refusal.startswith(str(file))
    assert refusal.isprintable()
    return None


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.one_of(st.none(), st.integers(0, 2000)),
)
def test_any_damage_to_a_header_opens_or_is_refused(
    single: Path, edits: list[tuple[int, int]], cut: int | None
) -> None:
    raw = bytearray((single / "model.safetensors").read_bytes())
    header_end = 8 + int.from_bytes(raw[:8], "little")
    for position, value in edits:
        raw[position % header_end] = value
    damaged = single / "damaged.safetensors"
    damaged.write_bytes(raw[:cut])
    opened = opened_or_refused(damaged)
    if opened is None:
        return
    mapping, infos = opened
    for info in infos:
        assert 0 <= info.start <= info.end <= len(mapping)
    with safe_open(damaged, "pt") as reference:  # what we accept, the format's own library accepts
        assert set(reference.keys()) == {info.name for info in infos}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELD = st.sampled_from(["dtype", "shape", "data_offsets"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(FIELD, JSON, max_size=3), st.text(max_size=5))
def test_any_json_in_a_header_opens_or_is_refused(single: Path, fields: dict[str, Any], name: str) -> None:
    header, data = split(single / "model.safetensors")
    header[name] = {**entry("F32", [0], len(data), len(data)), **fields}
    damaged = single / "damaged.safetensors"
    damaged.write_bytes(join(header, data))
    opened_or_refused(damaged)
