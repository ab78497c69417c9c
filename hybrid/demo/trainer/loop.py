"""The training loop around `Run`: progress, evaluation on the development split, saves, the picture."""

import time
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from hybrid.demo.trainer.feed import Feed
from hybrid.demo.trainer.matching import Case, evaluate
from hybrid.demo.trainer.plot import draw
from hybrid.demo.trainer.state import Run

NOTE_STEPS = 20
"""Steps that one entry of the history is a mean over."""


class Loop:
    """Trains a run in a directory until its tokens are used up or its time is.

    Args:
        examined: conversations that exact match is measured on.
        evaluate_every: tokens between evaluations.
        save_seconds: time between saves of checkpoint.pt.
        stop_after: seconds after which to save and stop; None: at the end of the run.
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
    ) -> None:
        self._run, self._directory, self._examined = run, directory, examined
        self._evaluate_every, self._save_seconds, self._stop_after = evaluate_every, save_seconds, stop_after
        self._notes: list[dict[str, float]] = []
        self._stopping = False

    def stop(self) -> None:
        """Save and stop after the step that runs; for signal handlers."""
        self._stopping = True

    def train(self, feed: Feed) -> bool:
        """-> whether the run is complete."""
        run, total = self._run, self._run.settings.tokens
        began = saved = time.monotonic()
        first = run.tokens_seen
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns) as bar:
            task = bar.add_task("training", total=total, completed=first)
            for batch in feed.batches():
                before = run.tokens_seen
                if before >= total:
                    break
                seen = run.train(batch)
                self._note(seen)
                now = time.monotonic()
                rate = f"{(run.tokens_seen - first) / (now - began):,.0f} tokens/s"
                bar.update(task, completed=run.tokens_seen, description=f"loss {seen['loss']:.4f}  {rate}")
                crossed = run.tokens_seen // self._evaluate_every > before // self._evaluate_every
                if crossed or run.tokens_seen >= total:
                    bar.console.print(self._evaluate(seen), rate)
                if now - saved > self._save_seconds:
                    self.save()
                    saved = now
                if self._stopping or (self._stop_after is not None and now - began > self._stop_after):
                    break
        self.save()
        return run.tokens_seen >= total

    def save(self) -> None:
        self._run.save(self._directory / "checkpoint.pt")
        draw(self._run.history, self._directory / "loss.svg")

    def _note(self, seen: dict[str, float]) -> None:
        self._notes.append(seen)
        if len(self._notes) == NOTE_STEPS:
            means = {key: sum(note[key] for note in self._notes) / NOTE_STEPS for key in seen}
            self._run.history.append(means | {"tokens": seen["tokens"]})
            self._notes.clear()

    def _evaluate(self, seen: dict[str, float]) -> str:
        """Measure exact match. -> what to print."""
        tally, loss, loads = evaluate(self._run.model, self._examined)
        exact, spread = tally.mean(), float((loads.amax(1) / loads.mean(1)).amax())
        self._run.history.append({**seen, "exact": exact, "held_out": loss})
        kinds = "  ".join(f"{kind} {hits / trials:.0%}" for kind, (hits, trials) in tally.kinds().items())
        dead = int((loads == 0).sum())
        return (
            f"{self._run.tokens_seen / 1e6:.1f}M  loss {seen['loss']:.4f}  held-out {loss:.4f}  exact {exact:.1%}"
            f"  load {spread:.1f}  dead {dead}  peak {seen['peak']:.0f}\n  {kinds}\n "
        )
