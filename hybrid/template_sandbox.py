"""The Jinja environment that published chat templates are written for, within bounds.

A template comes with the checkpoint and is not trusted: Jinja's sandbox keeps it away from Python, and what is here
keeps it from running for ever. It knows nothing of messages or tokens (hybrid/chat.py).
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 1_000_000  # loop turns and calls of one rendering: seconds at most
MAX_CHARS = 64_000_000  # of one rendering, far above any context
MAX_OPERAND = 1_000_000  # size of what `*` and `**` may make at a time

_steps: ContextVar[Iterator[int]] = ContextVar("steps")


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Jinja with the filters, functions and whitespace rules of the usual chat template environment."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        self.filters["tojson"] = _tojson
        self.filters[_METERED] = _metered
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def render(self, source: Callable[..., Iterable[str]], **values: Any) -> str:
        """The text of a template's `generate`. SecurityError: it ran too long or wrote too much."""
        _steps.set(iter(range(MAX_STEPS)))
        pieces, size = [], 0
        for piece in source(**values):
            _step()
            pieces.append(piece)
            size += len(piece)
            if size > MAX_CHARS:
                raise SecurityError(f"it writes more than {MAX_CHARS} characters")
        return "".join(pieces)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Every loop goes over a metered iterable."""
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, _METERED, [], [], None, None, lineno=loop.lineno)
        return tree

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _step()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right)]
        if (sizes[0] * sizes[1] if operator == "*" else sizes[0] ** min(sizes[1], 64)) > MAX_OPERAND:
            raise SecurityError(f"an operand of {operator} is too large")
        return super().call_binop(context, operator, left, right)


_METERED = "metered "  # a name no template can spell


def _metered(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _step()
        yield item


def _step() -> None:
    if next(_steps.get(), None) is None:
        raise SecurityError(f"it takes more than {MAX_STEPS} steps")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in the environment that published templates are written for: plain json.dumps, nothing escaped for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
