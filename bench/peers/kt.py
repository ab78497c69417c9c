"""kt-kernel (KTransformers' CPU experts, block-fp8) against ours, on the same weights.

    pip install --no-deps kt-kernel gguf pyyaml
    python -m bench.peers.kt --threads 2

Its activations are bfloat16, which its error shows.
"""

from typing import TYPE_CHECKING

from bench.peers.harness import Setting, run_command

if TYPE_CHECKING:
    import torch

    from offload.experts import ExpertWeights


class KtExperts:
    """One layer's experts in kt-kernel, which copies the weights into memory of its own."""

    same_weights = True

    def __init__(self, weights: "list[ExpertWeights]", setting: Setting) -> None:
        import torch
        from kt_kernel import kt_kernel_ext

        pool = kt_kernel_ext.WorkerPoolConfig()
        pool.subpool_count = 1
        pool.subpool_numa_map = [0]
        pool.subpool_thread_count = [setting.threads]
        self._queue = kt_kernel_ext.CPUInfer(pool)
        on_gpu = torch.zeros(len(weights), dtype=torch.bool)
        shape = weights[0].shape
        config = kt_kernel_ext.moe.MOEConfig(
            len(weights), setting.top_k, shape.hidden, shape.intermediate, on_gpu.data_ptr()
        )
        config.layer_idx = 0
        config.pool = self._queue.backend_
        config.max_len = setting.most_tokens
        config.quant_config.bits = 8
        config.quant_config.group_size = 128
        config.quant_config.zero_point = False
        scales: list[torch.Tensor] = []
        for name in ("gate", "up", "down"):
            parts = [getattr(expert, name) for expert in weights]
            scales += [part.scale for part in parts]
            setattr(config, f"{name}_projs", [[part.data.data_ptr() for part in parts]])
            setattr(config, f"{name}_scales", [[part.scale.data_ptr() for part in parts]])
        moe = kt_kernel_ext.moe
        self._layer = getattr(moe, "AMXFP8_MOE", moe.AVX2FP8_MOE)(config)
        order = torch.arange(len(weights))
        self._queue.submit(self._layer.load_weights_task(order.data_ptr()))
        self._queue.sync()
        self._keep = on_gpu
        self.expert_bytes = weights[0].nbytes

    def __call__(self, x: "torch.Tensor", ids: "torch.Tensor", gates: "torch.Tensor") -> "torch.Tensor":
        import torch

        x = x.bfloat16()
        out = torch.empty_like(x)
        count = torch.tensor([len(x)], dtype=torch.int32)
        self._queue.submit(
            self._layer.forward_task(
                count.data_ptr(),
                ids.shape[1],
                ids.data_ptr(),
                gates.data_ptr(),
                x.data_ptr(),
                out.data_ptr(),
                False,
            )
        )
        self._queue.sync()
        return out.float()


if __name__ == "__main__":
    run_command("kt-kernel", KtExperts)
