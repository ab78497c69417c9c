"""The model that is used when none is named: a small random one in K2's format, made once and kept in the
cache directory."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from offload.errors import UsageError

NOTICE = (
    "No MODEL was given: this is a small random model in Kimi K2's format. "
    "It shows the machinery and talks nonsense."
)
NAME = "tiny-2"
"""Changes whenever `hybrid synth --preset tiny` writes something else."""


def cache_directory() -> Path:
    """hybrid's own folder under the XDG cache directory; not created."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "hybrid"


def _limit_replies(model: Path) -> None:
    """A random model hardly ever ends by itself."""
    file = model / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_new_tokens": 200}) + "\n")


def default_model(progress: Callable[[str, float], None]) -> tuple[Path, str]:
    """-> (model directory, what to tell the user about it). Written to a temporary name first, so that an
    interruption leaves no half of a model behind."""
    home = cache_directory() / "models" / NAME
    if not home.is_dir():
        from hybrid.synth import synthesize

        progress("making a small random model", 0.0)
        try:
            home.parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=home.parent))
            try:
                synthesize(work / NAME, "tiny")
                _limit_replies(work / NAME)
                try:
                    os.replace(work / NAME, home)
                except OSError:
                    if not home.is_dir():  # else another process was first
                        raise
            finally:
                shutil.rmtree(work, ignore_errors=True)
        except OSError as error:
            raise UsageError(f"{home.parent}: the built-in model cannot be written there ({error})") from None
    return home, NOTICE
