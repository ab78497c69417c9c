"""`SlowBar`: a progress bar for what may take long. It shows up only when it does, and only on a terminal."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

APPEARS_AFTER_S = 0.5


class SlowBar:
    """On stderr, gone without a trace at the end. `update` may be called from any thread."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._bar: Progress | None = None
        self._enabled = sys.stderr.isatty()

    def update(self, what: str, fraction: float) -> None:
        """Say what is going on, and how much of it is done: 0 to 1."""
        if not self._enabled or (self._bar is None and time.monotonic() - self._begin < APPEARS_AFTER_S):
            return
        if self._bar is None:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.add_task(what, total=1.0)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], description=what, completed=fraction)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._enabled = False

    def __enter__(self) -> "SlowBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
