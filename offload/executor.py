"""`ExpertExecutor`: one layer's routed experts for a batch of tokens, wherever a store has them."""

from torch import Tensor

from offload.kernels.cpu import CpuKernels
from offload.store import MmapStore


class ExpertExecutor:
    """Groups tokens by expert and runs all chosen experts of a layer in one go.

    Attributes:
        bytes_read: expert weight bytes computed from so far; an expert that several tokens of a call share
            counts once.
    """

    def __init__(self, store: MmapStore, kernels: CpuKernels) -> None:
        self._store = store
        self._kernels = kernels
        self.bytes_read = 0

    def run(
        self,
        layer: int,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        decode: bool = True,
    ) -> Tensor:
        """The sum over k of topk_weights[t, k] * expert topk_ids[t, k] of x[t], added by ascending expert.

        Args:
            x: float32 [T, hidden].
            topk_ids: int64 [T, k], experts of this layer.
            topk_weights: float32 [T, k].
            decode: whether these are decode rows; prefill may take kernels that are faster for many.

        Returns:
            float32 [T, hidden].

        Raises:
            CheckpointError: an expert touched for the first time holds NaN.
            WorkerError: a kernel failed.
        """
        like = self._store.experts(layer)[0]
        self._store.touch(layer, topk_ids.numpy().reshape(-1), self._kernels)
        y, touched = self._kernels.experts(
            x, self._store.table(layer), like, topk_ids, topk_weights, decode=decode
        )
        self.bytes_read += touched * like.nbytes
        return y
