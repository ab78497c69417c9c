"""Damaged checkpoints through the command line: the message a user reads, exit code 2, no traceback."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cli.main
from hybrid.synth import synthesize
from offload.checkpoint import INDEX_NAME, Checkpoint
from tests.reference.safetensors_bytes import entry as entry_of
from tests.reference.safetensors_bytes import join, split

SHARD_1, SHARD_2 = "model-1-of-2.safetensors", "model-2-of-2.safetensors"
EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"
LINEAR = "model.layers.0.self_attn.o_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
PUBLISHED = "Use the config.json and the safetensors files published together."
AGAIN = "The file is damaged or incomplete: download it again."
SAME_REVISION = f"Download {INDEX_NAME} and all its shards again, from one revision."
GIVE = f"Give the directory that holds config.json, {INDEX_NAME} and the safetensors files."
NOT_ASSUMED = "Use the config.json published with the checkpoint; no value is assumed."


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = {"num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 120}
    return synthesize(tmp_path_factory.mktemp("sound") / "model", "tiny", small)


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def hybrid(*arguments: str | Path) -> tuple[int, str, str]:
        """-> (exit code, stdout, stderr) of the command line."""
        monkeypatch.setattr("sys.argv", ["hybrid", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return hybrid


def patch(model: Path, tensor: str, element: int, value: bytes) -> Path:
    """Overwrite an element of `tensor` in its file, which is returned."""
    info = Checkpoint.open(model).info(tensor)
    with info.file.open("r+b") as stream:
        stream.seek(info.start + element * len(value))
        stream.write(value)
    return info.file


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(file.read_text())
    edit(values)
    file.write_text(json.dumps(values))


def edit_config(model: Path, **fields: Any) -> None:
    edit_json(model / "config.json", lambda values: values.update(fields))


def edit_header(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    header, data = split(file)
    edit(header)
    file.write_bytes(join(header, data))


def edit_index(model: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    edit_json(model / INDEX_NAME, lambda index: edit(index["weight_map"]))


def truncate(file: Path, size: int) -> None:
    with file.open("r+b") as stream:
        stream.truncate(size)


def set_length(file: Path, length: int) -> None:
    with file.open("r+b") as stream:
        stream.write(struct.pack("<Q", length))


def rename(entries: dict[str, Any], old: str, new: str) -> None:
    entries[new] = entries.pop(old)


def rename_everywhere(model: Path, old: str, new: str) -> None:
    edit_header(model / SHARD_1, lambda header: rename(header, old, new))
    edit_index(model, lambda weights: rename(weights, old, new))


def add_tensor(model: Path, name: str) -> None:
    def add(header: dict[str, Any]) -> None:
        end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
        header[name] = entry_of("F32", [0], end, end)

    edit_header(model / SHARD_1, add)
    edit_index(model, lambda weights: weights.update({name: SHARD_1}))


def swap_shape(header: dict[str, Any], name: str) -> None:
    header[name]["shape"] = header[name]["shape"][::-1]


def shift(header: dict[str, Any], name: str, by: int) -> None:
    header[name]["data_offsets"] = [offset + by for offset in header[name]["data_offsets"]]


def retype(header: dict[str, Any], name: str, dtype: str) -> None:
    header[name]["dtype"] = dtype


def drop(fields: dict[str, Any], *names: str) -> None:
    for name in names:
        del fields[name]


def test_the_sound_model_is_sound(sound: Path, run: Any) -> None:
    code, out, err = run("inspect", "--full", sound)
    assert (code, err) == (0, "")
    assert "no problems: every weight was read" in out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(
            lambda m: (m / SHARD_2).unlink(),
            f"{{model}}/{SHARD_2}: the shard is missing (1 of 2 shards are). "
            f"{INDEX_NAME} names it: download it into {{model}}.",
            id="missing shard",
        ),
        pytest.param(
            lambda m: (m / INDEX_NAME).unlink(),
            f"{{model}}: there is no {INDEX_NAME} and no model.safetensors, but 2 other safetensors files. "
            f"Download {INDEX_NAME}: it says which tensor is where.",
            id="missing index",
        ),
        pytest.param(
            lambda m: truncate(m / SHARD_1, (m / SHARD_1).stat().st_size - 100),
            f"{{model}}/{SHARD_1}: * its data ends at byte *, but the file holds only *: it is truncated. {AGAIN}",
            id="truncated data",
        ),
        pytest.param(
            lambda m: truncate(m / SHARD_1, 500),
            f"{{model}}/{SHARD_1}: the header's length is given as * bytes, but the file holds 500. {AGAIN}",
            id="truncated header",
        ),
        pytest.param(
            lambda m: truncate(m / SHARD_1, 0),
            f"{{model}}/{SHARD_1}: the file is empty. {AGAIN}",
            id="empty shard",
        ),
        pytest.param(
            lambda m: set_length(m / SHARD_1, 2**60),
            f"{{model}}/{SHARD_1}: the header's length is given as {2**60} bytes, but the file holds *. {AGAIN}",
            id="header length lies",
        ),
        pytest.param(
            lambda m: set_length(m / SHARD_1, 50),
            f"{{model}}/{SHARD_1}: the header is not readable as JSON (*). {AGAIN}",
            id="header cut short",
        ),
        pytest.param(
            lambda m: edit_header(m / SHARD_1, lambda header: shift(header, LINEAR, 1000)),
            f"{{model}}/{SHARD_1}: * its data starts at byte *, which * (that ends at *). {AGAIN}",
            id="offsets lie",
        ),
        pytest.param(
            lambda m: edit_header(m / SHARD_1, lambda header: shift(header, LINEAR, 2**40)),
            f"{{model}}/{SHARD_1}: * its data starts at byte *, which leaves a hole * (that ends at *). {AGAIN}",
            id="offsets outside the file",
        ),
        pytest.param(
            lambda m: edit_header(m / SHARD_1, lambda header: header[LINEAR].update(shape=[-160, 96])),
            f"{{model}}/{SHARD_1}: {LINEAR}: shape [-160, 96] is not a list of up to 8 sizes. {AGAIN}",
            id="negative dimension",
        ),
        pytest.param(
            lambda m: edit_header(m / SHARD_1, lambda header: retype(header, LINEAR, "F4")),
            f"{{model}}/{SHARD_1}: {LINEAR}: dtype 'F4' is unknown. {AGAIN}",
            id="unknown dtype",
        ),
        pytest.param(
            lambda m: edit_header(m / SHARD_1, lambda header: retype(header, LINEAR, "BF16")),
            f"{{model}}/{SHARD_1}: {LINEAR}: data_offsets [*] span 15360 bytes, but BF16 [160, 96] takes 30720. "
            + AGAIN,
            id="dtype at odds with the offsets",
        ),
        pytest.param(
            lambda m: edit_header(m / SHARD_1, lambda header: retype(header, LINEAR, "U8")),
            f"{{model}}/{SHARD_1}: {LINEAR}: dtype is U8; a tensor of kind attention must be F8_E4M3 or BF16 or F32. "
            + PUBLISHED,
            id="wrong dtype",
        ),
        pytest.param(
            lambda m: edit_header(m / SHARD_2, lambda header: retype(header, EXPERT, "F8_E5M2")),
            f"{{model}}/{SHARD_2}: {EXPERT}: dtype is F8_E5M2; a tensor of kind routed must be F8_E4M3. {PUBLISHED}",
            id="experts in another fp8",
        ),
        pytest.param(
            lambda m: edit_header(m / SHARD_1, lambda header: swap_shape(header, LINEAR)),
            f"{{model}}/{SHARD_1}: {LINEAR}: shape is [96, 160], but config.json implies [160, 96]. {PUBLISHED}",
            id="wrong shape",
        ),
        pytest.param(
            lambda m: edit_header(m / SHARD_1, lambda header: swap_shape(header, f"{LINEAR}_scale_inv")),
            f"{{model}}/{SHARD_1}: {LINEAR}_scale_inv: scales are F32 [1, 2], expected F32 [2, 1]. {PUBLISHED}",
            id="wrong shape of scales",
        ),
        pytest.param(
            lambda m: edit_header(m / SHARD_1, lambda header: retype(header, f"{LINEAR}_scale_inv", "I32")),
            f"{{model}}/{SHARD_1}: {LINEAR}_scale_inv: scales are I32 [2, 1], expected F32 [2, 1]. {PUBLISHED}",
            id="wrong dtype of scales",
        ),
        pytest.param(
            lambda m: add_tensor(m, "model.layers.0.self_attn.o_proj.bias"),
            f"{{model}}/{SHARD_1}: model.layers.0.self_attn.o_proj.bias: "
            f"the model that config.json describes has no such tensor. {PUBLISHED}",
            id="unknown tensor",
        ),
        pytest.param(
            lambda m: rename_everywhere(
                m, f"{LINEAR}_scale_inv", "model.layers.0.self_attn.rotary_emb.inv_freq"
            ),
            f"{{model}}/{SHARD_1}: {LINEAR}_scale_inv: the block scales of this fp8 tensor are missing. {PUBLISHED}",
            id="missing scales",
        ),
        pytest.param(
            lambda m: rename_everywhere(m, LINEAR, "model.layers.0.self_attn.o_project.weight"),
            f"{{model}}: {LINEAR}: the tensor is missing (1 of * are); config.json implies it. {PUBLISHED}",
            id="missing tensor",
        ),
        pytest.param(
            lambda m: edit_index(m, lambda weights: drop(weights, LINEAR)),
            f"{{model}}/{SHARD_1}: {LINEAR}: the shard holds this tensor, but {INDEX_NAME} does not list it. "
            + SAME_REVISION,
            id="tensor missing from the index",
        ),
        pytest.param(
            lambda m: edit_index(m, lambda weights: weights.update({"new.weight": SHARD_1})),
            f"{{model}}/{SHARD_1}: new.weight: {INDEX_NAME} places this tensor in the shard, which does not hold it. "
            + SAME_REVISION,
            id="tensor missing from its shard",
        ),
        pytest.param(
            lambda m: edit_index(m, lambda weights: weights.update({LINEAR: "../../elsewhere.safetensors"})),
            f"{{model}}/{INDEX_NAME}: shard '../../elsewhere.safetensors' is not the name of a safetensors file in "
            "the same directory. Use the index published with the checkpoint.",
            id="shard outside the directory",
        ),
        pytest.param(
            lambda m: (m / INDEX_NAME).write_text("{"),
            f"{{model}}/{INDEX_NAME}: not readable as JSON (*). {AGAIN}",
            id="damaged index",
        ),
        pytest.param(
            lambda m: patch(m, BIAS, 1, struct.pack("<f", float("nan"))),
            f"{{model}}/{SHARD_2}: {BIAS}: holds NaN or infinite values. {AGAIN}",
            id="router's bias is NaN",
        ),
        pytest.param(
            lambda m: edit_config(m, hidden_size=161),
            f"{{model}}/{SHARD_1}: model.embed_tokens.weight: shape is [*, 160], but config.json implies [*, 161]. "
            + PUBLISHED,
            id="config at odds: hidden_size",
        ),
        pytest.param(
            lambda m: edit_config(m, n_routed_experts=5),
            "{model}: model.layers.1.mlp.experts.4.gate_proj.weight: the tensor is missing (3 of * are); "
            f"config.json implies it. {PUBLISHED}",
            id="config at odds: too many experts",
        ),
        pytest.param(
            lambda m: edit_config(m, n_routed_experts=3),
            f"{{model}}/{SHARD_2}: model.layers.1.mlp.gate.weight: shape is [4, 160], "
            f"but config.json implies [3, 160]. {PUBLISHED}",
            id="config at odds: too few experts",
        ),
        pytest.param(
            lambda m: edit_config(m, num_hidden_layers=3),
            "{model}: model.layers.2.input_layernorm.weight: the tensor is missing (* of * are); "
            f"config.json implies it. {PUBLISHED}",
            id="config at odds: layers",
        ),
        pytest.param(
            lambda m: edit_config(m, tie_word_embeddings=True),
            f"{{model}}/{SHARD_2}: lm_head.weight: the model that config.json describes has no such tensor. "
            + PUBLISHED,
            id="config at odds: a tied head",
        ),
        pytest.param(
            lambda m: edit_config(m, quantization_config=None),
            f"{{model}}/{SHARD_1}: *: dtype is F8_E4M3, but config.json has no quantization_config. {PUBLISHED}",
            id="config at odds: not quantised",
        ),
        pytest.param(
            lambda m: edit_config(m, model_type="llama", architectures=["LlamaForCausalLM"]),
            "config.json: model_type 'llama' with architectures ['LlamaForCausalLM'] is not known; hybrid runs "
            "DeepseekV3ForCausalLM with model_type kimi_k2 or deepseek_v3",
            id="unknown architecture",
        ),
        pytest.param(
            lambda m: edit_json(m / "config.json", lambda values: drop(values, "kv_lora_rank")),
            f"config.json: field 'kv_lora_rank' is missing. {NOT_ASSUMED}",
            id="config field missing",
        ),
        pytest.param(
            lambda m: (m / "config.json").write_text('{"hidden'),
            "{model}/config.json: not readable as JSON (*). Download the file again.",
            id="config is not JSON",
        ),
        pytest.param(
            lambda m: (m / "generation_config.json").write_text("[]"),
            "{model}/generation_config.json: holds a JSON list, expected an object",
            id="generation config is not an object",
        ),
        pytest.param(
            lambda m: edit_json(
                m / "generation_config.json", lambda values: values.update(eos_token_id="end")
            ),
            "{model}/generation_config.json: eos_token_id is 'end', expected one or several token ids below *. "
            "Use the generation_config.json published with the checkpoint.",
            id="eos is not an id",
        ),
        pytest.param(shutil.rmtree, f"{{model}}: no such directory. {GIVE}", id="no directory"),
        pytest.param(
            lambda m: (shutil.rmtree(m), m.write_text("x")),
            f"{{model}}: this is a file, not a model's directory. {GIVE}",
            id="a file",
        ),
        pytest.param(
            lambda m: (shutil.rmtree(m), m.mkdir()),
            f"{{model}}: the directory is empty. {GIVE}",
            id="an empty directory",
        ),
        pytest.param(
            lambda m: (shutil.rmtree(m), m.mkdir(), (m / "k2.gguf").write_text("GGUF")),
            f"{{model}}: the directory holds GGUF files, not a safetensors checkpoint. {GIVE}",
            id="GGUF",
        ),
        pytest.param(
            lambda m: (m / "config.json").unlink(),
            f"{{model}}: the directory holds no config.json. {GIVE}",
            id="no config",
        ),
    ],
)
def test_one_message_says_what_is_wrong_where_and_what_to_do(
    model: Path, run: Any, damage: Callable[[Path], object], message: str
) -> None:
    damage(model)
    code, out, err = run("inspect", model)
    assert (code, out) == (2, "")
    assert_reads(err, f"hybrid: {message.format(model=model)}\n")


def assert_reads(text: str, wanted: str) -> None:
    """`text` is `wanted`, in which * stands for anything within the line (numbers, other tensors)."""
    assert re.fullmatch(".*".join(map(re.escape, wanted.split("*"))), text), text


ROPE_FIELDS = [
    "type",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
]


@pytest.mark.parametrize(
    "field",
    [
        "type",
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
    ],
)
def test_no_rope_field_is_ever_assumed(model: Path, run: Any, field: str) -> None:
    edit_json(model / "config.json", lambda values: drop(values["rope_scaling"], field))
    code, _, err = run("inspect", model)
    assert (code, err) == (
        2,
        f"hybrid: config.json: field 'rope_scaling.{field}' is missing. {NOT_ASSUMED}\n",
    )


def test_rope_scaling_itself_is_not_assumed(model: Path, run: Any) -> None:
    edit_json(model / "config.json", lambda values: drop(values, "rope_scaling"))
    code, _, err = run("inspect", model)
    assert (code, err) == (2, "hybrid: config.json: field 'rope_scaling' is missing. No value is assumed.\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -0.5])
@pytest.mark.parametrize("weight", [EXPERT, LINEAR])
def test_every_scale_is_checked_at_load(model: Path, run: Any, weight: str, value: float) -> None:
    file = patch(model, f"{weight}_scale_inv", 1, struct.pack("<f", value))
    position = [1, 0]
    code, out, err = run("inspect", model)
    assert (code, out) == (2, "")
    assert err == (
        f"hybrid: {file}: {weight}_scale_inv: the scale at {position} is {value}; scales must be finite and above 0. "
        f"{AGAIN}\n"
    )


def test_nan_codes_are_all_listed_by_a_full_inspection(model: Path, run: Any) -> None:
    patch(model, LINEAR, 97, b"\x7f")
    patch(model, EXPERT, 5, b"\xff")
    patch(model, EXPERT, 159 * 48 + 47, b"\x7f")
    assert run("inspect", model)[0] == 0  # weights are not read
    code, out, _ = run("inspect", "--full", model)
    assert code == 2
    assert f"{model}/{SHARD_1}: {LINEAR}: NaN weights: 1, the first at [1, 1]. {AGAIN}" in out
    assert f"{model}/{SHARD_2}: {EXPERT}: NaN weights: 2, the first at [0, 5]. {AGAIN}" in out


@pytest.mark.parametrize("element", [0, 7, 8, 1000, 159 * 48 + 47])
@pytest.mark.parametrize("nan", [0x7F, 0xFF])
def test_a_nan_code_is_found_wherever_it_is(model: Path, run: Any, element: int, nan: int) -> None:
    patch(model, EXPERT, element, bytes([nan]))
    code, out, _ = run("inspect", "--full", "--json", model)
    assert code == 2
    at = [element // 48, element % 48]
    assert json.loads(out)["problems"] == [
        f"{model}/{SHARD_2}: {EXPERT}: NaN weights: 1, the first at {at}. {AGAIN}"
    ]


def test_codes_next_to_nan_are_numbers(model: Path, run: Any) -> None:
    for element, code in enumerate((0x7E, 0xFE, 0x00, 0x80)):
        patch(model, EXPERT, element, bytes([code]))
    assert run("inspect", "--full", model)[0] == 0


def test_inspect_counts_every_byte(sound: Path, run: Any) -> None:
    code, out, _ = run("inspect", "--json", sound)
    assert code == 0
    found = json.loads(out)
    data = sum(len(split(file)[1]) for file in sound.glob("*.safetensors"))
    assert found["total_bytes"] == sum(part["bytes"] for part in found["parts"].values()) == data
    assert sum(found["dtypes"].values()) == data
    assert found["parts"]["routed"]["tensors"] == 4 * 3 * 2
    assert found["architecture"]["n_routed_experts"] == 4
    assert found["problems"] == []
    code, out, _ = run("inspect", sound)
    assert f"{len(Checkpoint.open(sound).names):,} tensors" in out


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize(
    "tensor",
    [
        LINEAR,
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.shared_experts.down_proj.weight",
    ],
)
def test_a_nan_weight_that_every_token_needs_is_found_at_load(
    model: Path, run: Any, tensor: str, code: int
) -> None:
    file = patch(model, tensor, 5, bytes([code]))
    status, out, err = run("complete", model, "Hello", "--max-tokens", "1")
    assert (status, out) == (2, "")
    assert err == f"hybrid: {file}: {tensor}: a weight is NaN. {AGAIN}\n"


def test_a_nan_weight_of_an_expert_is_found_when_it_is_first_used(model: Path, run: Any) -> None:
    for expert in range(4):  # whichever the router picks
        patch(model, EXPERT.replace("experts.2", f"experts.{expert}"), 7, b"\x7f")
    status, _, err = run("complete", model, "Hello", "--max-tokens", "1")
    assert status == 2
    assert re.search(
        r"model-2-of-2.safetensors: model.layers.1.mlp.experts.\d.down_proj.weight: a weight is NaN", err
    )


def test_inspect_reads_the_tokenizer_too_and_says_so_in_json(model: Path, run: Any) -> None:
    truncate(model / "tiktoken.model", 3000)
    status, out, err = run("inspect", "--json", model)
    assert status == 2
    assert "tiktoken.model" in err
    assert json.loads(out)["problems"][0] in err


def test_a_directory_alone_is_no_prompt(model: Path, run: Any) -> None:
    status, _, err = run("complete", model)
    assert status == 2
    assert "is a model's directory" in err
