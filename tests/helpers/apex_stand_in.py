"""Stand-ins with the signatures of NVIDIA's Apex, for what Megatron-Core uses of it without Transformer Engine."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import torch


class FusedAdam(torch.optim.Optimizer):
    """apex.optimizers.FusedAdam: AdamW in kernels over many tensors; counts steps in the group, not in each state."""

    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
        capturable=False,
        master_weights=False,
    ) -> None:
        assert bias_correction and adam_w_mode and not amsgrad and not capturable and not master_weights
        super().__init__(params, dict(lr=lr, bias_correction=True, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p, dtype=torch.float)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                root = (state["exp_avg_sq"] / (1 - beta2 ** group["step"])).sqrt_().add_(group["eps"])
                p.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta1 ** group["step"]))


FusedAdam.__module__ = "apex.optimizers.fused_adam"


@contextlib.contextmanager
def apex(monkeypatch) -> Iterator[list[torch.Size]]:
    """Inside it Megatron finds Apex: its Adam, and kernels that add gradients; gives the shapes of what they add to."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.tensor_parallel import layers

    shapes = []

    def wgrad_gemm_accum_fp32(input, grad_output, main_grad) -> None:
        assert main_grad.dtype is torch.float32 and input.ndim == grad_output.ndim == 2
        shapes.append(main_grad.shape)
        main_grad += (grad_output.t() @ input).float()

    kernels = SimpleNamespace(wgrad_gemm_accum_fp32=wgrad_gemm_accum_fp32)
    with monkeypatch.context() as patch:
        patch.setattr(layers, "fused_weight_gradient_mlp_cuda", kernels, raising=False)
        patch.setattr(layers, "_grad_accum_fusion_available", True)
        patch.setattr(optimizer, "Adam", FusedAdam)
        patch.setattr(distrib_optimizer, "Adam", FusedAdam)
        patch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
        yield shapes
