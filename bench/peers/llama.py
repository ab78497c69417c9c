"""llama.cpp's MoE layer (ggml's mul_mat_id on Q8_0) against ours.

    pip install --no-deps ggml-py
    python -m bench.peers.llama --threads 2

pip compiles ggml for the machine at hand. Its weights are random Q8_0, 1.0625 bytes a weight to our 1.0001, and it
rounds activations to 8 bits before each product.
"""

import ctypes
from typing import TYPE_CHECKING, Any

from bench.peers.harness import HIDDEN, INTERMEDIATE, Setting, run_command

if TYPE_CHECKING:
    import torch

    from offload.experts import ExpertWeights

BLOCK, BLOCK_BYTES = 32, 34  # of Q8_0: a float16 scale and 32 signed bytes


class GgmlExperts:
    """One layer's experts with random Q8_0 weights."""

    same_weights = False
    expert_bytes = 3 * HIDDEN * INTERMEDIATE // BLOCK * BLOCK_BYTES

    def __init__(self, _: "list[ExpertWeights]", setting: Setting) -> None:
        import ggml

        self._ggml, self._setting = ggml, setting
        self._weights = self._context(setting.experts * self.expert_bytes + (1 << 20))
        self._gate = self._matrix(HIDDEN, INTERMEDIATE)
        self._up = self._matrix(HIDDEN, INTERMEDIATE)
        self._down = self._matrix(INTERMEDIATE, HIDDEN)
        self._graphs: dict[int, Any] = {}

    def _context(self, size: int) -> Any:
        params = self._ggml.ggml_init_params(mem_size=size, mem_buffer=None, no_alloc=False)
        return self._ggml.ggml_init(params)

    def _matrix(self, columns: int, rows: int) -> Any:
        import numpy as np

        rng = np.random.default_rng(rows)
        pool = rng.integers(-127, 128, (1 << 16, BLOCK_BYTES), dtype=np.int8)
        pool[:, :2] = np.full(1 << 16, 2e-4, np.float16).view(np.int8).reshape(-1, 2)
        tensor = self._ggml.ggml_new_tensor_3d(
            self._weights, self._ggml.GGML_TYPE_Q8_0, columns, rows, self._setting.experts
        )
        data = self._ggml.ggml_get_data(tensor)
        left = columns * rows * self._setting.experts // BLOCK * BLOCK_BYTES
        while left:
            size = min(left, pool.nbytes)
            ctypes.memmove(data, pool.ctypes.data, size)
            data, left = data + size, left - size
        return tensor

    def _graph(self, tokens: int) -> Any:
        """(graph, plan, its work memory, and tensors: x, ids, gates in, out) for a count of tokens."""
        g, top_k = self._ggml, self._setting.top_k
        context = self._context(4 * tokens * top_k * (4 * INTERMEDIATE + 4 * HIDDEN) + (64 << 20))
        x = g.ggml_new_tensor_3d(context, g.GGML_TYPE_F32, HIDDEN, 1, tokens)
        ids = g.ggml_new_tensor_3d(context, g.GGML_TYPE_I32, top_k, tokens, 1)
        gates = g.ggml_new_tensor_3d(context, g.GGML_TYPE_F32, 1, top_k, tokens)
        gate, up = (g.ggml_mul_mat_id(context, matrix, x, ids) for matrix in (self._gate, self._up))
        inner = g.ggml_mul(context, g.ggml_silu(context, gate), up)
        out = g.ggml_mul(context, g.ggml_mul_mat_id(context, self._down, inner, ids), gates)
        graph = g.ggml_new_graph(context)
        g.ggml_build_forward_expand(graph, out)
        plan = g.ggml_graph_plan(graph, self._setting.threads, None)
        work = (ctypes.c_uint8 * max(plan.work_size, 1))()
        plan.work_data = ctypes.cast(work, type(plan.work_data))
        return graph, plan, work, (x, ids, gates), out

    def __call__(self, x: "torch.Tensor", ids: "torch.Tensor", gates: "torch.Tensor") -> "torch.Tensor":
        import torch

        tokens = len(x)
        if tokens not in self._graphs:
            self._graphs[tokens] = self._graph(tokens)
        graph, plan, _, given, out = self._graphs[tokens]
        for tensor, value in zip(given, (x, ids.int(), gates), strict=True):
            ctypes.memmove(self._ggml.ggml_get_data(tensor), value.contiguous().data_ptr(), value.nbytes)
        failed = self._ggml.ggml_graph_compute(graph, ctypes.byref(plan))
        assert failed == 0, failed
        count = tokens * ids.shape[1] * HIDDEN
        result = (ctypes.c_float * count).from_address(self._ggml.ggml_get_data(out))
        return torch.frombuffer(result, dtype=torch.float32).view(tokens, -1, HIDDEN).sum(1)


if __name__ == "__main__":
    run_command("llama.cpp Q8_0", GgmlExperts)
