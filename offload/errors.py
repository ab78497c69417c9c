"""Every error a user can cause or meet, as types that say what was wrong, where, and what to do.

    HybridError                 a failure while running (exit code 1)
    |-- WorkerError             a kernel job or worker thread failed
    |-- EngineClosed            the engine was closed while the request waited
    |-- Overloaded              the queue is full: try again later (HTTP 429)
    `-- UsageError              bad input or usage (exit code 2)
        |-- CheckpointError     files that are not what the config or safetensors say
        |-- ConfigError         config.json lacks a field or contradicts itself
        |-- TokenizerError      tokenizer files that cannot be used
        |-- TemplateError       a chat template that is absent or cannot render these messages
        |-- RequestError        a request out of bounds (HTTP 400)
        `-- UnsupportedMachine  not Linux on x86-64 with AVX2

Invariants of our own are `assert`s, never these.
"""

from pathlib import Path


class HybridError(Exception):
    """Base of everything hybrid raises on purpose. The message is meant to be read by a user."""

    exit_code = 1


class WorkerError(HybridError):
    """A kernel job reported a failure or a worker thread died."""


class EngineClosed(HybridError):
    """The engine was closed while a request was waiting or running."""


class Overloaded(HybridError):
    """The bounded queue is full; the caller may retry later."""


class UsageError(HybridError):
    """The input, not the program, is at fault."""

    exit_code = 2


class CheckpointError(UsageError):
    """A checkpoint's files are damaged, incomplete or at odds with its config.

    Args:
        problem: what is wrong, in a few words with the numbers seen and expected.
        file: the file at fault.
        tensor: the tensor at fault, if one is.
        remedy: what the user can do about it.
    """

    def __init__(
        self, problem: str, *, file: Path | str | None = None, tensor: str | None = None, remedy: str
    ) -> None:
        self.problem, self.file, self.tensor, self.remedy = problem, file, tensor, remedy
        where = "".join(f"{part}: " for part in (file, tensor) if part is not None)
        super().__init__(f"{where}{problem}. {remedy}")


class ConfigError(UsageError):
    """config.json or generation_config.json is missing a field or contradicts itself."""


class TokenizerError(UsageError):
    """The tokenizer's files are missing, truncated or inconsistent."""


class TemplateError(UsageError):
    """The model has no chat template, or it refuses these messages."""


class RequestError(UsageError):
    """A request asks for something out of bounds.

    Args:
        message: what is wrong and what would be accepted.
        param: the request's field at fault, as the caller spelt it.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnsupportedMachine(UsageError):
    """This machine cannot run hybrid: it is not Linux on x86-64 with AVX2, FMA and F16C."""
