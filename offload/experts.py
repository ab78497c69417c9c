"""What a routed expert is: its name, its shape, its three matrices. Not where it lives (offload/store.py)."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from offload.fp8 import BLOCK, Weight


class ExpertId(NamedTuple):
    """One routed expert: its layer's and its own index."""

    layer: int
    expert: int


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """gate and up are [intermediate, hidden], down is [hidden, intermediate]."""

    hidden: int
    intermediate: int

    @property
    def matrices(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Shapes of gate, up and down."""
        inner, outer = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        return inner, inner, outer


class ExpertWeights(NamedTuple):
    """One expert's matrices, possibly views of a read-only mapping."""

    gate: Weight
    up: Weight
    down: Weight

    @property
    def shape(self) -> ExpertShape:
        intermediate, hidden = self.gate.shape
        return ExpertShape(hidden, intermediate)

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return self.gate.nbytes + self.up.nbytes + self.down.nbytes


class ExpertFormat(Protocol):
    """How one expert's bytes are laid out; block-fp8 is the format of K2 as published."""

    def nbytes(self, shape: ExpertShape) -> int:
        """Bytes of one expert's data and scales."""
        ...


@dataclass(frozen=True, slots=True)
class BlockFp8:
    """e4m3 codes with a float32 scale per 128 x 128 block."""

    def nbytes(self, shape: ExpertShape) -> int:
        """Bytes of one expert's data and scales."""
        return sum(
            rows * columns + 4 * -(-rows // BLOCK) * -(-columns // BLOCK) for rows, columns in shape.matrices
        )
