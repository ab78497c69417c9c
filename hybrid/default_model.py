"""The model that is used when none is named: the small trained one that comes with hybrid (hybrid/demo)."""

from pathlib import Path

from offload.errors import UsageError

DIRECTORY = Path(__file__).parent / "demo" / "kimi-k2-demo"
NOTICE = (
    "No MODEL was given: this is hybrid's own demonstration model, Kimi K2's architecture at a fifty-thousandth of "
    "its size. It makes small talk, adds small numbers, tells stories and, over the API, calls tools."
)


def default_model() -> tuple[Path, str]:
    """-> (model directory, what to tell the user about it).

    Raises:
        UsageError: this installation lacks the files.
    """
    if not (DIRECTORY / "config.json").is_file():
        raise UsageError(
            f"{DIRECTORY}: the built-in model is not there; install hybrid again, or name a MODEL"
        )
    return DIRECTORY, NOTICE
