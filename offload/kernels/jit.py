"""Numba as the kernels use it: values known when compiling, compiled jobs, and the on-disk cache.

A *job* is what worker threads run: a C function `status(args, lane, lanes, control)` of four int64, called
by address. `args` and `control` are addresses; offload/workers.py says what they hold. A job returns
`DONE`; anything else, and an exception escaping it, is reported as a WorkerError.
"""

import hashlib
import importlib.metadata
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, NullCache, _CacheLocator
from numba.core.ccallback import CFunc
from numba.core.imputils import lower_constant
from numba.extending import models, register_model, typeof_impl

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}
JOB_SIGNATURE = types.int64(types.int64, types.int64, types.int64, types.int64)
DONE = 1  # not zero: a job that raised returns zero
FAILED = 2

_PRIVATE = {**OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # called by compiled code only
jit = numba.njit(**_PRIVATE)


class Static:
    """A value that compiled code knows as a constant: functions are specialised by it, as by a type.

    Args:
        value: any hashable with a stable repr.
    """

    def __init__(self, value: Any) -> None:
        self.value = value


class StaticType(types.Opaque):
    """Numba's type of one `Static`; its `value` is there for intrinsics and overloads."""

    def __init__(self, value: Any) -> None:
        self.value = value
        super().__init__(name=f"Static({value!r})")


register_model(StaticType)(models.OpaqueModel)


@typeof_impl.register(Static)
def _typeof_static(static: Static, _context: Any) -> StaticType:
    return StaticType(static.value)


@lower_constant(StaticType)
def _lower_static(context: Any, _builder: Any, _type: Any, _value: Any) -> Any:
    return context.get_dummy_value()


def cache_directory() -> Path:
    """Where compiled kernels are kept: hybrid/kernels under the XDG cache directory."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "hybrid" / "kernels"


def _source_hash() -> str:
    """A hash of everything that compiled code depends on, apart from the CPU (Numba's own key has that).

    Numba looks only at the file a job is in; a job here also holds code of the modules beside it.
    """
    digest = hashlib.sha256(sys.version.encode())
    for package in ("numba", "llvmlite"):
        digest.update(importlib.metadata.version(package).encode())
    here = Path(__file__).parent
    for source in (*sorted(here.glob("*.py")), here.parent / "workers.py"):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


SOURCE_HASH = _source_hash()


class _Locator(_CacheLocator):
    """Tells Numba to cache under `cache_directory()`, in one folder for each state of the sources."""

    def __init__(self, function: Any, source: str) -> None:
        self._function, self._source = function, source

    def get_cache_path(self) -> str:
        return str(cache_directory() / SOURCE_HASH)

    def get_source_stamp(self) -> str:
        return hashlib.sha256(Path(self._source).read_bytes()).hexdigest()

    def get_disambiguator(self) -> str:
        return str(self._function.__code__.co_firstlineno)

    @classmethod
    def from_function(cls, function: Any, source: str) -> "_Locator":
        locator = cls(function, source)
        locator.ensure_cache_path()
        return locator


class _CacheImpl(CompileResultCacheImpl):
    _locator_classes = (_Locator,)


class KernelCache(FunctionCache):
    """Numba's function cache, except that a damaged entry or a full disk costs only time."""

    _impl_class = _CacheImpl

    def load_overload(self, signature: Any, context: Any) -> Any:
        try:
            return super().load_overload(signature, context)
        except Exception:  # a truncated or foreign file can raise anything while unpickling
            try:
                self.flush()
            except OSError:
                self.disable()
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        try:
            super().save_overload(signature, data)
        except OSError:
            self.disable()


def _cache(function: Callable[..., Any]) -> Any:
    try:
        return KernelCache(function)
    except (OSError, RuntimeError):  # the directory cannot be made or written, or nobody has a home
        return NullCache()


def compile_job(function: Callable[[int, int, int, int], int]) -> Any:
    """Compile a job, or load it from the cache. The result's `.address` is what workers are given.

    Args:
        function: undecorated; may call `jit` functions and intrinsics, and close over `Static`s.
    """
    return compile_c(function, JOB_SIGNATURE)


def compile_c(function: Callable[..., Any], signature: Any) -> Any:
    """As `compile_job`, for a C function of another signature."""
    compiled: Any = CFunc(
        function, numba.core.sigutils.normalize_signature(signature), locals={}, options=OPTIONS
    )
    compiled._cache = _cache(function)
    compiled.compile()
    return compiled


def compile_python(function: Callable[..., Any], signature: Any) -> Any:
    """Compile a function for callers in Python, releasing the GIL while it runs; cached likewise."""
    dispatcher = numba.njit(**OPTIONS)(function)
    dispatcher._cache = _cache(function)
    dispatcher.compile(signature)
    dispatcher.disable_compile()
    return dispatcher
