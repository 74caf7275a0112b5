"""From a compiled step to what a person wants to know: does it fit, how fast should it be, what limits it, what would help."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from train.compat import interpreter
from train.counts import train_flops_per_token
from train.plan.aot import Compiled
from train.plan.interconnect import Interconnect
from train.plan.roofline import Roofline, Work
from train.plan.topology import GIB
from train.run_dir import config_hash

MARGIN = 0.05
"""Share of the memory that a plan should leave: fragmentation, the runtime, an evaluation between two steps."""


@dataclass(frozen=True)
class Traffic:
    """Equal collectives of one step. bytes: received by one device; seconds: of them all, exposed or not."""

    kind: str
    axes: tuple[str, ...]
    times: int
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """seconds: of a step, every operation at the rate of its scarcest resource and waiting for what does not overlap.
    bound: the resource that takes most of them. useful_flops: per device, by the formula of our MFU; counted_flops: what
    the compiled program does, recomputation, padding and Newton-Schulz included. spare: share of memory left."""

    compiled: Compiled
    work: Work
    traffic: tuple[Traffic, ...]
    useful_flops: float

    @property
    def spare(self) -> float:
        return 1 - self.compiled.memory.peak / self.compiled.topology.chip.hbm

    @property
    def seconds(self) -> float:
        return self.work.seconds

    @property
    def tokens_per_second_per_chip(self) -> float:
        train = self.compiled.cfg.train
        return train.batch_size * train.seq_len / self.seconds / self.compiled.topology.chips

    @property
    def mfu(self) -> float:
        """Useful FLOPs over what the chips could do at their peak in a step's time."""
        return self.mfu_at(self.seconds)

    def mfu_at(self, seconds: float) -> float:
        chip = self.compiled.topology.chip
        return self.useful_flops / (seconds * chip.flops / chip.devices)

    @property
    def bound(self) -> str:
        times = {"compute": self.work.compute, "memory bandwidth": self.work.memory, "interconnect": self.work.exposed}
        return max(times, key=times.get)

    def summary(self) -> dict[str, Any]:
        """Everything that is printed, as JSON values; the same on every machine but for the times of compiling."""
        c = self.compiled
        memory = {k: v for k, v in dataclasses.asdict(c.memory).items() if k != "largest"}
        return {
            "config_hash": config_hash(c.cfg),
            "topology": c.topology.name,
            "slices": c.topology.slices,
            "chips": c.topology.chips,
            "mesh": dict(c.mesh.shape),
            "versions": interpreter(),
            "fits": c.fits,
            "bytes_per_device": memory | {"peak": c.memory.peak, "available": int(c.topology.chip.hbm)},
            "spare": round(self.spare, 4),
            "largest": [f"{a.bytes / GIB:.2f} GiB {a.shape} {a.made_by}" for a in c.memory.largest],
            "collectives": [
                {
                    "kind": t.kind,
                    "axes": "*".join(t.axes),
                    "times": t.times,
                    "bytes": float(f"{t.bytes:.4g}"),
                    "seconds": float(f"{t.seconds:.4g}"),
                }
                for t in self.traffic
            ],
            "flops_per_device": {"useful": float(f"{self.useful_flops:.5g}"), "counted": float(f"{self.work.flops:.5g}")},
            "hbm_bytes_per_device": float(f"{self.work.bytes:.4g}"),
            "seconds": {
                name: float(f"{getattr(self.work, name):.4g}") for name in ("compute", "memory", "exposed", "hidden", "seconds")
            },
            "bound": self.bound,
            "tokens_per_second_per_chip": round(self.tokens_per_second_per_chip, 1),
            "mfu": round(self.mfu, 4),
            "kernels_without_cost": sorted(self.work.silent),
            "seconds_to_lower": round(c.seconds_to_lower, 1),
            "seconds_to_compile": round(c.seconds_to_compile, 1),
            "has_code": c.has_code,
        }


def forecast(compiled: Compiled) -> Forecast:
    """Time a compiled step."""
    wires = Interconnect(compiled.topology, compiled.mesh)
    work = Roofline(compiled.program, wires).step()
    groups: dict[tuple, list[float]] = {}
    for c in work.collectives:
        entry = groups.setdefault((c.kind, wires.spanned(c)), [0, 0.0, 0.0])
        entry[0] += c.times
        entry[1] += c.times * c.received
        entry[2] += c.times * wires.seconds(c)
    traffic = tuple(sorted((Traffic(*key, round(n), b, s) for key, (n, b, s) in groups.items()), key=lambda t: -t.seconds))
    train = compiled.cfg.train
    flops = train_flops_per_token(compiled.cfg.model, compiled.specs, train.seq_len) * train.batch_size * train.seq_len
    return Forecast(compiled, work, traffic, flops / compiled.mesh.size)


def advice(f: Forecast) -> list[str]:
    """What would help, largest effect first; each sentence says by how much at most."""
    c, out = f.compiled, []
    if f.spare < MARGIN:
        out.append(_memory_advice(c))
    without = f.seconds - f.work.exposed
    if f.work.exposed > 0.1 * f.seconds:
        worst = f.traffic[0]
        out.append(
            f"collectives are waited for {f.work.exposed:.3g} s; without that the step takes {without:.3g} s "
            f"(MFU {100 * f.mfu_at(without):.0f} %). The longest: {worst.kind} over {'*'.join(worst.axes)}, "
            f"{worst.seconds:.3g} s: make that axis smaller, or let a microbatch hold more rows (train.accumulate)"
        )
    if f.work.memory > 0.15 * f.seconds:
        slow = max((n for n in f.work.by_operation if " over " not in n), key=f.work.by_operation.get)
        out.append(
            f"operations bound by memory bandwidth take {f.work.memory:.3g} s; more rows per microbatch read the "
            f"weights less often, and the longest operation is {slow} ({f.work.by_operation[slow]:.3g} s)"
        )
    extra = f.work.flops / f.useful_flops - 1
    if extra > 0.1:
        out.append(
            f"{100 * extra:.0f} % more arithmetic is done than is useful: recomputation "
            f"(train.remat={c.cfg.train.remat}), padded experts and Newton-Schulz; keeping more (remat names, hidden or none) "
            f"or more tokens per step make it less"
        )
    if f.work.silent:
        out.append(f"kernels that state no cost are not in these numbers: {', '.join(sorted(f.work.silent))}")
    return out


def _memory_advice(c: Compiled) -> str:
    m, cfg = c.memory, c.cfg
    parts = {
        "activations": m.activations,
        "optimizer state": m.optimizer,
        "gradients": m.gradients,
        "parameters": m.parameters,
        "temporaries": m.temporaries,
    }
    worst = max(parts, key=parts.get)
    help_ = {
        "activations": f"raise train.accumulate (now {cfg.train.accumulate}) or recompute more (train.remat is "
        f"{cfg.train.remat})",
        "optimizer state": f"optim.momentum_dtype bfloat16 halves it (now {cfg.optim.momentum_dtype}); a larger mesh.fsdp "
        f"or mesh.expert divides it",
        "gradients": "a larger mesh.fsdp or mesh.expert divides them",
        "parameters": f"optim.master_dtype bfloat16 halves them (now {cfg.optim.master_dtype}); a larger mesh.fsdp or "
        f"mesh.expert divides them",
        "temporaries": f"raise train.accumulate (now {cfg.train.accumulate}), so that a microbatch has fewer tokens",
    }
    return f"memory is mostly {worst} ({parts[worst] / GIB:.1f} of {m.peak / GIB:.1f} GiB): {help_[worst]}"
