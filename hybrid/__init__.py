"""hybrid: Kimi K2 on one machine you own.

The public face is `Engine` and `SamplingParams`; everything heavy is imported when first asked for.
"""

import os
from typing import TYPE_CHECKING, Any

# libgomp's threads spin after every torch operation and would take the cores from our own workers
# (a dispatch then costs 57-364 us instead of 6). It reads this once, when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

if TYPE_CHECKING:
    from hybrid.engine import Engine
    from hybrid.request import Delta, SamplingParams

__all__ = ["Delta", "Engine", "SamplingParams", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from hybrid.engine import Engine

        return Engine
    if name in ("SamplingParams", "Delta"):
        from hybrid import request

        return getattr(request, name)
    raise AttributeError(f"module 'hybrid' has no attribute {name!r}")
