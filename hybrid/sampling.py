"""Logits -> one token: greedy, or temperature and nucleus (top-p, arXiv:1904.09751) sampling."""

import secrets

import numpy as np
from numpy.typing import NDArray

from hybrid.request import SamplingParams
from offload.errors import HybridError


class Sampler:
    """One request's choice of tokens, with its own random stream; float64, so that a seed means one text."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        seed = secrets.randbits(64) if params.seed is None else params.seed % 2**64
        self._random = np.random.default_rng(seed)

    def choose(self, logits: NDArray[np.float32]) -> tuple[int, float | None]:
        """float32 [vocab_size] -> token id and, if asked for, its log-probability before temperature and top-p.

        Ties at temperature 0 go to the lowest id.

        Raises:
            HybridError: the logits hold NaN or no finite value.
        """
        top = int(np.argmax(logits))
        if not np.isfinite(logits[top]):
            raise HybridError(
                "the model's output is not finite; its weights may be damaged: run `hybrid inspect MODEL --full`"
            )
        token = top if self.params.temperature == 0 else self._draw(logits, logits[top])
        return token, _logprob(logits, token) if self.params.logprobs else None

    def _draw(self, logits: NDArray[np.float32], peak: np.float32) -> int:
        temperature, top_p = self.params.temperature, self.params.top_p
        # What lies this far below the peak has, all together, less than float64's last bit of the mass. The peak
        # itself is always in, also where the temperature is too small to move a float32.
        ids = np.flatnonzero(logits >= peak - np.float32(50 * temperature))
        weights = np.exp((logits[ids].astype(np.float64) - np.float64(peak)) / temperature)
        if top_p < 1:
            # Tokens under this weight cannot hold more than 1 - top_p between them: sort only the others.
            total = weights.sum()
            kept = np.flatnonzero(weights >= total * (1 - top_p) / len(weights))
            kept = kept[np.argsort(-weights[kept], kind="stable")]
            enough = int(np.searchsorted(np.cumsum(weights[kept]), top_p * total)) + 1
            ids, weights = ids[kept[:enough]], weights[kept[:enough]]
        mass = np.cumsum(weights)
        drawn = int(np.searchsorted(mass, self._random.random() * mass[-1], side="right"))
        return int(ids[min(drawn, len(ids) - 1)])


def _logprob(logits: NDArray[np.float32], token: int) -> float:
    shifted = logits.astype(np.float64) - np.float64(logits.max())
    return float(shifted[token] - np.log(np.exp(shifted).sum()))
