"""Where the time of forward passes goes: wall-clock seconds split into named parts."""

import time


class Stopwatch:
    """Adds the time since the last mark to a part."""

    def __init__(self) -> None:
        self._parts: dict[str, float] = {}
        self._last = time.perf_counter()

    def start(self) -> dict[str, float]:
        """Begin anew. -> part -> seconds, which fills as time goes on."""
        self._parts = {}
        self.mark()
        return self._parts

    def mark(self) -> None:
        """Time since the last mark belongs to no part."""
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now
