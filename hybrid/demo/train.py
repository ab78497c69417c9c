"""`python -m hybrid.demo.train DIR`: train the embedded model, from the start or from where DIR stopped; a run that is
complete goes on with more `--tokens`.

DIR gets checkpoint.pt (everything needed to go on), loss.svg and, when the run ends, the exported model in DIR/model.
"""

import argparse
import ctypes
import fcntl
import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from offload.errors import HybridError, UsageError

if TYPE_CHECKING:
    from hybrid.demo.trainer.state import Run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hybrid.demo.train", description="Train the embedded model."
    )
    parser.add_argument("directory", type=Path, help="where the run lives; one that is there goes on")
    parser.add_argument(
        "--tokens", type=_count, help="tokens in all (default 50e6, or what the run began with)"
    )
    parser.add_argument("--batch-tokens", type=_count, default=6000, help="tokens a step (default 6000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--muon-rate", type=_amount, default=5e-3)
    parser.add_argument("--adam-rate", type=_amount, default=3e-3)
    parser.add_argument(
        "--balance-rate", type=_amount, default=0.01, help="of the experts' biases (default 0.01)"
    )
    parser.add_argument(
        "--from",
        type=Path,
        dest="begin",
        metavar="MODEL",
        help="begin a run with an exported model's weights",
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--threads", type=_count, default=2, help="CPU threads (default 2)")
    parser.add_argument("--workers", type=_count, default=1, help="processes that write data (default 1)")
    parser.add_argument(
        "--evaluate-every", type=_count, default=1_000_000, help="tokens between evaluations (default 1e6)"
    )
    parser.add_argument("--save-minutes", type=_amount, default=5.0, help="between saves (default 5)")
    parser.add_argument(
        "--stop-minutes", type=_amount, help="save and stop then; the same command goes on later"
    )
    args = parser.parse_args(argv)
    _keep_pages()
    try:
        args.directory.mkdir(parents=True, exist_ok=True)
        with _alone(args.directory):
            train(args)
    except (HybridError, OSError) as error:
        parser.exit(getattr(error, "exit_code", 1), f"{parser.prog}: {error}\n")


def _count(text: str) -> int:
    """A whole number from 1 on; "50e6" is one."""
    number = float(text)
    if not 1 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: a number, at least 1")
    return int(number)


def _amount(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: a number, at least 0")
    return number


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Two trainers would write over each other's checkpoint."""
    held = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{directory}: another trainer is at work there") from None
        yield
    finally:
        os.close(held)


def train(args: argparse.Namespace) -> None:
    """Train until the run is complete, its time is up or SIGINT or SIGTERM asks to stop."""
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop.set()) for number in signals]
    try:
        _train(args, stop)
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _train(args: argparse.Namespace, stop: threading.Event) -> None:
    # Not at the top: each process that writes data imports this module anew.
    import torch

    from hybrid.demo.data.encode import Encoder
    from hybrid.demo.export import export
    from hybrid.demo.shape import config_fields
    from hybrid.demo.trainer.feed import Feed
    from hybrid.demo.trainer.loop import Loop
    from hybrid.demo.trainer.matching import cases
    from hybrid.demo.trainer.state import Run, Settings
    from hybrid.runtime import wants_gpu
    from hybrid.synth import ASSETS

    cuda = wants_gpu(args.device)
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    encoder = Encoder(ASSETS)
    settings = Settings(
        seed=args.seed,
        tokens=args.tokens or Settings().tokens,
        batch_tokens=args.batch_tokens,
        muon_rate=args.muon_rate,
        adam_rate=args.adam_rate,
        balance_rate=args.balance_rate,
        text=text_digest(ASSETS),
        begun_with=_digest(sorted(args.begin.glob("*.safetensors"))) if args.begin else "",
    )
    fields = config_fields(encoder.tokenizer)
    run = Run(settings, fields, torch.device("cuda" if cuda else "cpu"), None if cuda else args.threads)
    saved = args.directory / "checkpoint.pt"
    if saved.exists():
        run.restore(saved, args.tokens)
        print(f"going on from {run.tokens_seen / 1e6:.2f}M of {run.settings.tokens / 1e6:.2f}M tokens")
    elif args.begin:
        begin_with(args.begin, run)
    if not run.complete:
        loop = Loop(
            run,
            args.directory,
            cases(encoder, "dev", 300),
            evaluate_every=args.evaluate_every,
            save_seconds=60 * args.save_minutes,
            stop_after=None if args.stop_minutes is None else 60 * args.stop_minutes,
            stop=stop,
        )
        with Feed(ASSETS, settings.seed, settings.batch_tokens, run.next_document, args.workers) as feed:
            loop.train(feed)
    if not run.complete:
        print(f"stopped at {run.tokens_seen / 1e6:.2f}M tokens; the same command goes on")
        return
    out = export(run.model, run.config, ASSETS, args.directory / "model")
    print(f"exported to {out}: {sum(f.stat().st_size for f in out.iterdir()) / 2**20:.2f} MiB")


def begin_with(directory: Path, run: "Run") -> None:
    """Give the run an exported model's weights.

    Raises:
        UsageError: the model has another shape, tokenizer or chat template than the run.
        HybridError: its files are damaged.
        OSError: they cannot be read.
    """
    from hybrid.demo.export import config_of, read_back

    if config_of(directory) != run.model.config or text_digest(directory) != run.settings.text:
        raise UsageError(f"{directory}: a model of another shape, or with another tokenizer or chat template")
    read_back(directory, run.model)


def text_digest(directory: Path) -> str:
    """Of what turns conversations into tokens: a run that went on with another would unlearn all it knows."""
    return _digest(
        [directory / name for name in ("tiktoken.model", "tokenizer_config.json", "chat_template.jinja")]
    )


def _digest(files: list[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()


def _keep_pages() -> None:
    """Ask glibc to keep freed memory: giving a step's hundreds of megabytes back and taking them again costs
    more time than using them."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, value in ((-1, 2**31 - 1), (-3, 2**30)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(option, value)


if __name__ == "__main__":
    main()
