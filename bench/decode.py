"""`hybrid bench decode` and `hybrid bench prefill`: whole tokens through a model on disk, teacher-forced.

Decode is bound by the bytes of the weights that a token is multiplied with, so its yardstick is a plain read of as
many bytes on the same threads, taken between the tokens of the same run.
"""

import json
import random
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hybrid.runtime import Runtime

PARTS = ("attention", "router", "experts", "dense", "head", "wait", "other")

Model = Annotated[
    Path | None, typer.Argument(help="Model directory. Left out: the built-in one.", show_default=False)
]
PromptTokens = Annotated[int, typer.Option(min=1, help="Random tokens that come before.")]
Threads = Annotated[int | None, typer.Option("--threads", "-t", min=1, help="Default: one a physical core.")]
Level = Annotated[str | None, typer.Option(help="amx, avx512, avx2 or portable; default: the best.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


def _load(model: Path | None, threads: int | None, level: str | None) -> "Runtime":
    from hybrid.config import RuntimeConfig
    from hybrid.runtime import load_runtime

    return load_runtime(model, RuntimeConfig(threads=threads, level=level), lambda *_: None)


def _random_tokens(runtime: "Runtime", count: int) -> list[int]:
    draw = random.Random(0)
    return [draw.randrange(runtime.files.config.vocab_size) for _ in range(count)]


def _prefill(runtime: "Runtime", tokens: list[int]) -> Any:
    from hybrid.generation import PREFILL_CHUNK

    cache = runtime.model.new_cache()
    for begin in range(0, len(tokens), PREFILL_CHUNK):
        hidden = runtime.model.prefill(tokens[begin : begin + PREFILL_CHUNK], cache)
    runtime.model.logits(hidden[-1:], decode=True)
    return cache


def _sample_weights(runtime: "Runtime") -> list[Any]:
    """As many weights as a token is multiplied with: the resident ones, and one choice of experts a layer."""
    config = runtime.files.config
    draw = random.Random(1)
    chosen = [
        expert
        for layer in config.moe_layers
        for expert in draw.sample(runtime.store.experts(layer), config.num_experts_per_tok)
    ]
    return [runtime.model.resident, *chosen]


def _breakdown(parts: dict[str, float], count: int) -> dict[str, float]:
    """Milliseconds a token (or pass) by part."""
    return {part: round(1e3 * parts.get(part, 0.0) / count, 4) for part in PARTS}


def measure_decode(runtime: "Runtime", prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Decode `new_tokens` after a prompt; the same tokens once before, so that what they need is in memory."""
    from bench.kernels import stream_reader

    model, experts = runtime.model, runtime.experts
    tokens = _random_tokens(runtime, prompt_tokens + new_tokens)
    read = stream_reader(runtime.kernels)
    sample = _sample_weights(runtime)
    sample_bytes = sum(weight.data.nbytes for part in sample for weight in part)
    read(sample)
    for rehearsal in (True, False):
        cache = _prefill(runtime, tokens[:prompt_tokens])
        parts, before = model.watch.start(), experts.bytes_read
        seconds, rates = [], []
        for token in tokens[prompt_tokens:]:
            model.watch.mark()
            begin = time.perf_counter()
            model.logits(model.decode([token], [cache]), decode=True)
            seconds.append(time.perf_counter() - begin)
            if not rehearsal:
                rates.append(sample_bytes / read(sample))
    per_token = sum(weight.nbytes for weight in model.resident) + (experts.bytes_read - before) / new_tokens
    median, rate = statistics.median(seconds), statistics.median(rates)
    experts_s = parts.get("experts", 0.0)
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "threads": runtime.kernels.threads,
        "level": runtime.kernels.level,
        "tokens_per_s": 1 / median,
        "ms_per_token": 1e3 * median,
        "bytes_per_token": round(per_token),
        "expert_gb_per_s": (experts.bytes_read - before) / experts_s / 1e9 if experts_s else 0.0,
        "stream_read_gb_per_s": rate / 1e9,
        "fraction_of_stream": per_token / median / rate,
        "breakdown": _breakdown(parts, new_tokens),
    }


def measure_prefill(runtime: "Runtime", prompt_tokens: int) -> dict[str, Any]:
    """Prefill a prompt; once before with the same tokens, so that what they need is in memory."""
    from hybrid.generation import PREFILL_CHUNK

    model, experts = runtime.model, runtime.experts
    tokens = _random_tokens(runtime, prompt_tokens)
    _prefill(runtime, tokens)
    parts, before = model.watch.start(), experts.bytes_read
    begin = time.perf_counter()
    _prefill(runtime, tokens)
    seconds = time.perf_counter() - begin
    passes = -(-prompt_tokens // PREFILL_CHUNK)
    config = runtime.files.config
    routed = 3 * config.hidden_size * config.moe_intermediate_size * config.num_experts_per_tok
    resident = sum(weight.data.numel() for weight in model.resident if weight is not model.head)
    multiplied = prompt_tokens * (resident + routed * len(config.moe_layers)) + model.head.data.numel()
    pairs = prompt_tokens * (prompt_tokens + 1) // 2
    width = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    attended = pairs * width * config.num_hidden_layers
    return {
        "prompt_tokens": prompt_tokens,
        "threads": runtime.kernels.threads,
        "level": runtime.kernels.level,
        "tokens_per_s": prompt_tokens / seconds,
        "seconds": seconds,
        "gflop_per_s": 2 * (multiplied + attended) / seconds / 1e9,
        "bytes_read": experts.bytes_read - before + passes * sum(weight.nbytes for weight in model.resident),
        "breakdown": _breakdown(parts, 1),
    }


def decode(
    model: Model = None,
    prompt_tokens: PromptTokens = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode and time.")] = 32,
    threads: Threads = None,
    level: Level = None,
    as_json: AsJson = False,
) -> None:
    """Measure decoding, one token at a time."""
    _run(model, threads, level, as_json, lambda runtime: measure_decode(runtime, prompt_tokens, new_tokens))


def prefill(
    model: Model = None,
    prompt_tokens: PromptTokens = 512,
    threads: Threads = None,
    level: Level = None,
    as_json: AsJson = False,
) -> None:
    """Measure the computation of a prompt."""
    _run(model, threads, level, as_json, lambda runtime: measure_prefill(runtime, prompt_tokens))


def _run(model: Path | None, threads: int | None, level: str | None, as_json: bool, measure: Any) -> None:
    import torch

    runtime = _load(model, threads, level)
    try:
        with torch.inference_mode():
            result = measure(runtime)
    finally:
        runtime.close()
    if as_json:
        typer.echo(json.dumps(result))
        return
    for key, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{part} {ms:.2f} ms" for part, ms in value.items() if ms)
        typer.echo(f"{key:22s} {value:.4g}" if isinstance(value, float) else f"{key:22s} {value}")
