"""The peer on a CPU: transformers' `deepseek_v3` with torch, trained by torch.optim.Muon, a batched Newton-Schulz for the
3-D experts that torch.optim.Muon refuses, and AdamW for the rest. It has no quantizer, no QK-Clip, no balance loss.

    python -m bench.torch_peer SHAPE DTYPE EXPERTS PRECISION uncompiled|compiled      a contender of bench/train_cpu.py
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import cache

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not spin beside another library's

import numpy as np
import torch
import transformers
from torch.nn import functional
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from bench.shapes import MATMUL, config, limit, random_batch
from bench.turns import serve
from configs.schema import ModelConfig, QuantConfig
from quant.hf_config import write_config
from train.compat import keep_freed_memory

KELLER = (3.4445, -4.7750, 2.0315)


class ExpertMuon(torch.optim.Optimizer):
    """torch.optim.Muon's rule over stacks of matrices [E, rows, columns], in bfloat16 like it or in float32, whichever this
    machine multiplies faster. Gate and up, fused along rows, count as two matrices."""

    def __init__(self, params, fused: set[torch.Tensor], lr: float, weight_decay=0.1, momentum=0.95, steps=5):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, steps=steps))
        self.fused = fused
        self.dtype = faster_dtype()

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(momentum, group["momentum"])
                rows, columns = x.shape[1] // (2 if p in self.fused else 1), x.shape[2]
                update = newton_schulz(x.reshape(-1, rows, columns), group["steps"], self.dtype).reshape(p.shape)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)


@cache
def faster_dtype() -> torch.dtype:
    """bfloat16 or float32, by a batched product of this size: a CPU without bfloat16 instructions emulates them."""

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(64, 128, 128, dtype=dtype)
        times = []
        for _ in range(20):
            start = time.perf_counter()
            torch.bmm(x, x)
            times.append(time.perf_counter() - start)
        return min(times)

    return min((torch.bfloat16, torch.float32), key=seconds)


def newton_schulz(x: torch.Tensor, steps: int, dtype: torch.dtype) -> torch.Tensor:
    """Keller Jordan's quintic on a stack of matrices."""
    a, b, c = KELLER
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def build(cfg: ModelConfig, experts: str, precision: str, optimizer: str) -> torch.nn.Module:
    """A model with its optimizers; precision: float32, autocast (bfloat16 over float32 weights), bfloat16 (weights too)."""
    torch.manual_seed(0)
    fields = write_config(cfg, QuantConfig(grid="none"))
    twin = DeepseekV3ForCausalLM._from_config(
        DeepseekV3Config(**fields),
        attn_implementation="sdpa",
        experts_implementation=experts,
        dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32,
    ).train()
    flat, stacked, fused, rest = [], [], set(), []
    for name, p in twin.named_parameters():
        if p.ndim == 3 and optimizer == "muon":
            stacked.append(p)
            fused |= {p} if "gate_up" in name else set()
        elif p.ndim == 2 and not any(part in name for part in ("embed", "lm_head", "gate.weight")) and optimizer == "muon":
            flat.append(p)
        else:
            rest.append(p)
    optimizers = [torch.optim.AdamW(rest, lr=2e-4, weight_decay=0.1, fused=True)]
    if flat:
        optimizers.append(torch.optim.Muon(flat, lr=2e-4, adjust_lr_fn="match_rms_adamw"))
        optimizers.append(ExpertMuon(stacked, fused, lr=2e-4))
    return twin, optimizers


def programs(
    cfg: ModelConfig, batch: dict[str, np.ndarray], experts: str, precision: str, optimizer: str = "muon", compiled: bool = False
) -> tuple[Callable[[], float], Callable[[], float]]:
    """(a whole training step, forward and backward alone) on one batch; each returns the loss. Unpadded rows of one
    document each, so no mask: torch's fastest case."""
    twin, optimizers = build(cfg, experts, precision, optimizer)
    if compiled:
        twin.compile()
    tokens, targets = (torch.tensor(batch[name], dtype=torch.long) for name in ("tokens", "targets"))

    def pull() -> float:
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            logits = twin(tokens, use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        return loss.item()

    def step() -> float:
        loss = pull()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        for opt in optimizers:
            opt.step()
        return loss

    return step, pull


def matmul(a: np.ndarray, b: np.ndarray, dtype: str) -> Callable[[], torch.Tensor]:
    """One product of this library."""
    x, y = (torch.tensor(m).to(getattr(torch, dtype)) for m in (a, b))
    return lambda: x @ y


def main() -> None:
    shape, dtype, experts, precision, how = sys.argv[1:]
    keep_freed_memory()  # what our own process does, so that both have it
    cfg = config(shape, dtype)
    step, pull = programs(cfg.model, random_batch(cfg), experts, precision, compiled=how == "compiled")
    product = matmul(*MATMUL, dtype)
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "newton_schulz_of_experts": str(faster_dtype()),
    }
    serve(versions, {"step": step, "pull": pull, "matmul": limit(cfg, product)})


if __name__ == "__main__":
    main()
