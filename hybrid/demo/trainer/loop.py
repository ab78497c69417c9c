"""The training loop around `Run`: progress, evaluation on the development split, saves, the picture."""

import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from threading import Event

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from hybrid.demo.trainer.feed import Batch, Feed
from hybrid.demo.trainer.matching import Case, evaluate
from hybrid.demo.trainer.plot import draw
from hybrid.demo.trainer.state import Run
from offload.errors import HybridError

NOTE_STEPS = 20
"""Steps that one entry of the history is a mean over, at most."""


class Loop:
    """Trains a run in a directory until its tokens are used up or its time is.

    Args:
        examined: conversations that exact match is measured on.
        evaluate_every: tokens between evaluations.
        save_seconds: time between saves of checkpoint.pt.
        stop_after: seconds after which to save and stop; None: at the end of the run.
        stop: once set, save and stop after the step that runs.
    """

    def __init__(
        self,
        run: Run,
        directory: Path,
        examined: list[Case],
        *,
        evaluate_every: float,
        save_seconds: float,
        stop_after: float | None,
        stop: Event | None = None,
    ) -> None:
        self._run, self._directory, self._examined = run, directory, examined
        self._evaluate_every, self._save_seconds, self._stop_after = evaluate_every, save_seconds, stop_after
        self._stop = stop or Event()
        self._notes: list[dict[str, float]] = []
        self._began = self._saved = time.monotonic()
        self._first = run.tokens_seen

    def train(self, feed: Feed) -> None:
        """Until the run is complete, its time is up or `stop` is set.

        Raises:
            OSError: what was learnt last cannot be saved.
            HybridError: the run has diverged; or a process that writes data has died, and what was learnt is saved.
        """
        run, columns = self._run, (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        try:
            with Progress(*columns) as bar:
                task = bar.add_task("training", total=run.settings.tokens, completed=run.tokens_seen)
                for batch in feed.batches():
                    told, stopping = self._step(batch, bar.console)
                    bar.update(task, completed=run.tokens_seen, description=told)
                    if stopping or run.complete:
                        break
        except BrokenProcessPool:  # a signal to stop may have gone to the whole group
            if not self._stop.is_set():
                self._save()
                raise HybridError(
                    "a process that writes training data was ended from outside; the same command goes on"
                ) from None
        self._save()

    def _step(self, batch: Batch, console: Console) -> tuple[str, bool]:
        """Learn from a batch, save and examine when it is time. -> loss and speed; whether to stop."""
        run, before = self._run, self._run.tokens_seen
        seen = run.train(batch)
        self._note(seen)
        took = time.monotonic() - self._began
        rate = f"{(run.tokens_seen - self._first) / took:,.0f} tokens/s"
        stopping = self._stop.is_set() or (self._stop_after is not None and took > self._stop_after)
        crossed = run.tokens_seen // self._evaluate_every > before // self._evaluate_every
        examined = not stopping and (crossed or run.complete)
        if examined or time.monotonic() - self._saved > self._save_seconds:
            self._save_if_possible(console)
        if examined:
            console.print(self._examine(seen), rate)
        return f"loss {seen['loss']:.4f}  {rate}", stopping

    def _save(self) -> None:
        self._flush()
        self._run.save(self._directory / "checkpoint.pt")
        with suppress(OSError):  # a run is worth more than its picture
            draw(self._run.history, self._directory / "loss.svg")

    def _save_if_possible(self, console: Console) -> None:
        """In the middle of a run a full disk is no reason to lose what is in memory."""
        try:
            self._save()
        except OSError as error:
            console.print(f"{error}; going on, and trying again later", style="bold red", markup=False)
        self._saved = time.monotonic()

    def _note(self, seen: dict[str, float]) -> None:
        self._notes.append(seen)
        if len(self._notes) == NOTE_STEPS:
            self._flush()

    def _flush(self) -> None:
        if self._notes:
            means = {key: sum(note[key] for note in self._notes) / len(self._notes) for key in self._notes[0]}
            self._run.history.append(means | {"tokens": self._notes[-1]["tokens"]})
            self._notes.clear()

    def _examine(self, seen: dict[str, float]) -> str:
        """Measure exact match, just after a save. -> what to print."""
        tally, loss, loads = evaluate(self._run.model, self._examined)
        exact, spread = tally.mean(), float((loads.amax(1) / loads.mean(1)).amax())
        self._run.history[-1] |= {"exact": exact, "held_out": loss}
        kinds = "  ".join(f"{kind} {hits / trials:.0%}" for kind, (hits, trials) in tally.kinds().items())
        dead = int((loads == 0).sum())
        return (
            f"{self._run.tokens_seen / 1e6:.1f}M  loss {seen['loss']:.4f}  held-out {loss:.4f}  exact {exact:.1%}"
            f"  load {spread:.1f}  dead {dead}  peak {seen['peak']:.0f}\n  {kinds}\n "
        )
