"""Kernel levels: which vector instructions the kernels may use, chosen by CPU features."""

import dataclasses
from dataclasses import dataclass

from offload.errors import UsageError
from offload.hardware import cpu_features, cpu_vendor, may_use_tiles


@dataclass(frozen=True, slots=True)
class Level:
    """One way to compile the kernels.

    Attributes:
        name: what `--level` style options and benchmarks call it.
        width: float32 lanes of a vector; 1 is plain loops with no vector code of ours.
        features: CPU flags (as in /proc/cpuinfo) without which it must not be compiled or run.
        codes: the form (forms.py) in which fp8 codes are read.
        tiles: whether prefill runs on AMX tiles (tiles.py).
    """

    name: str
    width: int
    features: tuple[str, ...]
    codes: str = "offset"
    tiles: bool = False


_BASE = ("avx2", "fma", "f16c")
_WIDE = (*_BASE, "avx512f", "avx512bw", "avx512vl", "avx512dq")
LEVELS = {
    level.name: level
    for level in (  # best first
        Level("amx", 16, (*_WIDE, "amx_tile", "amx_bf16"), tiles=True),
        Level("avx512", 16, _WIDE),
        Level("avx2", 8, _BASE),
        Level("portable", 1, (), "half"),
    )
}


def missing_features(level: Level) -> list[str]:
    """The features that `level` needs and this CPU lacks, or that Linux refuses."""
    missing = [name for name in level.features if name not in cpu_features()]
    return ["amx_tile"] if level.tiles and not missing and not may_use_tiles() else missing


def _for_this_cpu(level: Level) -> Level:
    """AMD's cores multiply subnormal floats at full speed, which makes codes cheaper to read."""
    fast = level.width > 1 and cpu_vendor() == "AuthenticAMD"
    return dataclasses.replace(level, codes="shift") if fast else level


def choose_level(name: str | None = None) -> Level:
    """The best level this CPU runs, or the one asked for by name.

    Raises:
        UsageError: no level has this name, or this CPU cannot run it.
    """
    if name is None:
        return _for_this_cpu(next(level for level in LEVELS.values() if not missing_features(level)))
    if name not in LEVELS:
        raise UsageError(f"There is no kernel level {name!r}; choose one of {', '.join(LEVELS)}.")
    if missing := missing_features(LEVELS[name]):
        raise UsageError(f"This CPU cannot run kernel level {name!r}: it lacks {', '.join(missing)}.")
    return _for_this_cpu(LEVELS[name])
