"""`hybrid bench`: every line has the keys that are promised, and figures that can be."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.bench import app

KERNELS = {
    "tokens", "threads", "level", "experts_touched", "ms_median", "ms_min", "weight_gb_per_s", "gflop_per_s",
    "blas_gflop_per_s", "stream_read_gb_per_s", "fraction_of_stream", "rel_error",
}  # fmt: skip
PARTS = {"attention", "router", "experts", "dense", "head", "wait", "other"}


def lines(*arguments: str) -> list[dict[str, Any]]:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_print_a_line_for_each_count_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.kernels.SECONDS", 0.1)
    sizes = ("--hidden", "256", "--intermediate", "130", "--experts", "6", "--top-k", "2")
    found = lines("kernels", *sizes, "--tokens", "1,5", "--threads", "2")
    assert [line["tokens"] for line in found] == [1, 5]
    for line in found:
        assert set(line) == KERNELS
        assert line["rel_error"] < 2e-6
        assert line["experts_touched"] >= 2
        assert 0 < line["ms_min"] <= line["ms_median"]
        assert line["weight_gb_per_s"] == pytest.approx(
            line["fraction_of_stream"] * line["stream_read_gb_per_s"], rel=1e-6
        )


def test_decode_accounts_for_all_of_a_token(tiny_model: Path) -> None:
    (line,) = lines("decode", str(tiny_model), "--prompt-tokens", "5", "--new-tokens", "4", "--threads", "2")
    assert set(line["breakdown"]) == PARTS
    assert line["tokens_per_s"] == pytest.approx(1000 / line["ms_per_token"])
    assert 0 < line["fraction_of_stream"] < 2
    assert line["expert_gb_per_s"] > 0


def test_prefill(tiny_model: Path) -> None:
    (line,) = lines("prefill", str(tiny_model), "--prompt-tokens", "40", "--threads", "2")
    assert line["prompt_tokens"] == 40
    assert line["tokens_per_s"] == pytest.approx(40 / line["seconds"])
    assert line["bytes_read"] > 0
    assert line["gflop_per_s"] > 0


def test_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.dispatch.QUIET_SECONDS", 0.1)
    monkeypatch.setattr("bench.dispatch.CALLS", 200)
    monkeypatch.setattr("bench.dispatch.CALLS_WITH_TORCH", 50)
    (line,) = lines("dispatch", "--threads", "2")
    assert 0 < line["empty"]["median_us"] <= line["empty"]["p99_us"]
    assert line["after_torch"]["median_us"] > 0
    assert 0 <= line["idle_cpu_share"] < 1


@pytest.mark.parametrize("wrong", ["0", "x", "1,,2"])
def test_bad_counts_of_tokens_are_refused(wrong: str) -> None:
    done = CliRunner().invoke(app, ["kernels", "--tokens", wrong])
    assert done.exit_code != 0
    assert "token" in str(done.exception)
