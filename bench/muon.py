"""Muon against optax.contrib.muon, and what it costs at Kimi K2's scale.

    python -m bench.muon compare     both on the same tree, mesh and process, in turns: time, memory, bytes, FLOPs
    python -m bench.muon scale       K2 from the plan alone: FLOPs, bytes and memory per device
    python -m bench.muon forms       K2's expert in three forms, compiled for a TPU v5p: time by plan's rates
    python -m bench.muon share       part of a training step that the optimizer takes, on this machine

Each prints a table and, with --write, keeps it under bench/results/ with hardware and versions.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bench import measure
from configs.param_spec import HFTensor, Matrix, ParamSpec
from configs.platforms import platform_of
from configs.presets import preset
from configs.schema import MeshConfig, OptimConfig
from configs.sharding import AXES
from model.transformer import param_specs
from optim.build import build_optimizer, plan_of, state_shardings
from optim.form import Form
from optim.gram import segments_for
from optim.matrices import is_expert
from optim.newton_schulz import coefficients, standard_flops
from optim.plan import COLUMNS, Strategy, device_bytes, device_flops, plan_rows, total_flops
from optim.routing import routing_table
from train.mesh import make_mesh, param_shardings
from train.plan.census import census
from train.plan.hlo import Program
from train.plan.interconnect import Interconnect
from train.plan.roofline import Roofline
from train.plan.topology import topology
from train.step import StepConfig, gradients

RESULTS = Path(__file__).parent / "results"
PRESETS = (("keller", 5), ("quintic", 5), ("polar_express", 6), ("deepseek_v4", 10))
MESHES = ((1, 1), (2, 4))
ROUNDS = 7


def versions() -> dict[str, str]:
    chip = jax.devices()[0].device_kind
    return {
        "jax": jax.__version__,
        "optax": optax.__version__,
        "python": platform.python_version(),
        "device": f"{chip}, {len(jax.devices())} devices"
        if jax.default_backend() != "cpu"
        else f"{os.cpu_count()} CPU cores ({platform.machine()}) as {len(jax.devices())} simulated devices",
    }


def table(columns, rows) -> str:
    rows = [tuple(map(str, row)) for row in rows]
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]

    def line(row):
        return "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"

    return "\n".join([line(columns), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


# --- compare ---------------------------------------------------------------------------------------------------------


def block(layers=3, experts=8, width=448, hidden=128, heads=4):
    """K2's proportions (width 3.5 times an expert's hidden size), arrays that optax can express: no column splits."""

    def spec(shape, axes, rows, cols):
        return ParamSpec(shape, tuple(axes.split()), 0.02, "muon", (HFTensor("-"),), matrix=Matrix(tuple(rows.split()), (cols,)))

    L, E, D, F, H = layers, experts, width, hidden, heads
    return {
        "experts_gate_up": spec((L, E, D, 2, F), "layers experts embed gate_up hidden", "embed", "hidden"),
        "experts_down": spec((L, E, F, D), "layers experts hidden embed", "hidden", "embed"),
        "shared_gate_up": spec((L, D, 2, F), "layers embed gate_up hidden", "embed", "hidden"),
        "shared_down": spec((L, F, D), "layers hidden embed", "hidden", "embed"),
        "q_a": spec((L, D, 96), "layers embed q_latent", "embed", "q_latent"),
        "q_b": spec((L, 96, H, 48), "layers q_latent heads qk", "q_latent", "qk"),
        "o": spec((L, H, 32, D), "layers heads v embed", "heads v", "embed"),
        "dense_down": spec((512, D), "hidden embed", "hidden", "embed"),
        "dense_gate_up": spec((D, 2, 512), "embed gate_up hidden", "embed", "hidden"),
    }


def placed(specs, mesh):
    """Experts over expert * fsdp, everything else over fsdp * expert along the model width."""

    def cut(spec):
        if is_expert(spec):
            return P(None, ("expert", "fsdp"))
        return P(*(("fsdp", "expert") if axis == "embed" else None for axis in spec.axes))

    return {path: NamedSharding(mesh, cut(spec)) for path, spec in specs.items()}


def peer(specs, coeffs) -> optax.GradientTransformation:
    """optax.contrib.muon with the same matrices, scale, decay and coefficients."""
    numbers = {
        path: optax.contrib.MuonDimensionNumbers(tuple(map(s.axis, s.matrix.rows)), tuple(map(s.axis, s.matrix.cols)))
        for path, s in specs.items()
    }
    return optax.contrib.muon(
        2e-4,
        ns_coeffs=coeffs,
        ns_steps=len(coeffs),
        weight_decay=0.1,
        nesterov=True,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=numbers,
    )


def program(optimizer, specs, mesh, places):
    """(compiled step with donated state and weights, seconds to compile, a call that goes on from where the last one ended)."""
    make = jax.jit(
        lambda: {path: jax.random.normal(jax.random.key(i), s.shape) for i, (path, s) in enumerate(specs.items())},
        out_shardings=places,
    )

    def step(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return state, jax.tree.map(jnp.add, params, updates)

    shapes = jax.eval_shape(optimizer.init, jax.eval_shape(make))
    by_path = state_shardings(shapes, mesh, places)
    grads, held = make(), (jax.jit(optimizer.init, out_shardings=by_path)(make()), make())
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(1, 2), out_shardings=(by_path, places)).lower(grads, *held).compile()
    seconds = time.perf_counter() - start

    def call():
        nonlocal held
        held = compiled(grads, *held)
        return held

    return compiled, seconds, call


def compare() -> dict:
    """Wall and processor time are the fastest of ROUNDS rounds in turns (other work on the machine can only add);
    memory is the compiler's temporary size per device; bytes received and FLOPs per device are counted in the compiled
    program, loops included. Meshes of more devices than there are here are left out."""
    specs, out = block(), []
    for shape in MESHES:
        devices = math.prod(shape)
        if devices > jax.device_count():
            print(f"{devices} devices: left out, there are {jax.device_count()}", file=sys.stderr)
            continue
        mesh = jax.make_mesh(shape, ("fsdp", "expert"), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,) * 2)
        places = placed(specs, mesh)
        for name, steps in PRESETS:
            coeffs = coefficients(name, steps)
            cfg = OptimConfig(
                newton_schulz=name, newton_schulz_steps=steps, qk_clip_tau=None, schedule="constant", warmup_steps=0
            )
            sides = {"ours": build_optimizer(specs, cfg, 1000, mesh=mesh, shardings=places), "optax": peer(specs, coeffs)}
            built = {side: program(opt, specs, mesh, places) for side, opt in sides.items()}
            times = measure.in_turns({side: call for side, (_, _, call) in built.items()}, ROUNDS)
            row = {"devices": devices, "preset": f"{name} x{steps}"}
            for side, (compiled, seconds, _) in built.items():
                counted = census(compiled.as_text(), devices)
                row[side] = times[side] | {
                    "compile": seconds,
                    "temp": compiled.memory_analysis().temp_size_in_bytes,
                    "received": counted.received,
                    "collectives": counted.kinds(),
                    "flops": counted.flops,
                }
            out.append(row)
            print(f"{devices} devices, {row['preset']}: done", file=sys.stderr)

    def ratio(row, key):
        return f"{row['optax'][key] / row['ours'][key]:.2f}"

    rows = [
        (
            r["devices"],
            r["preset"],
            f"{r['ours']['wall_ms']:.4g} / {r['optax']['wall_ms']:.4g}",
            ratio(r, "wall_ms"),
            f"{r['ours']['cpu_ms']:.4g} / {r['optax']['cpu_ms']:.4g}",
            ratio(r, "cpu_ms"),
            f"{r['ours']['temp'] / 2**20:.1f} / {r['optax']['temp'] / 2**20:.1f}",
            ratio(r, "temp"),
            f"{r['ours']['received'] / 2**20:.2f} / {r['optax']['received'] / 2**20:.2f}",
            f"{r['ours']['flops'] / 1e9:.2f} / {r['optax']['flops'] / 1e9:.2f}",
            ratio(r, "flops"),
        )
        for r in out
    ]
    columns = (
        "devices",
        "preset",
        "ms ours / optax",
        "ratio",
        "CPU ms",
        "ratio",
        "temp MiB",
        "ratio",
        "MiB received",
        "GFLOP/device",
        "ratio",
    )
    return {"rows": out, "table": table(columns, rows)}


# --- scale -----------------------------------------------------------------------------------------------------------

SCALES = (
    ("tpu", dict(fsdp=16, expert=8)),
    ("tpu", dict(data=2, fsdp=16, expert=8)),
    ("tpu", dict(fsdp=16, expert=8, context=2)),
    ("tpu", dict(fsdp=32, expert=16)),
    ("tpu", dict(data=8, fsdp=16, expert=8)),
    ("hopper", dict(data=2, fsdp=16, expert=8)),
    ("gpu", dict(data=2, fsdp=16, expert=8)),
)


def useful_bytes(plan, itemsize: int) -> float:
    """Received by a device on average: each piece of an exchanged matrix leaves once and returns once."""
    alone = [g for g in plan if g.strategy is not Strategy.ALL_TO_ALL]
    exchanged = sum(2 * g.held * g.elements * itemsize * (g.shards - 1) / g.shards**2 for g in plan if g not in alone)
    return exchanged + sum(g.bytes_per_device(itemsize) for g in alone)


def scale() -> dict:
    """K2's own preset, shapes and sharding rules; nothing is compiled. Moved, full: what every device receives, with the
    zeros that fill an exchange up to its fullest owner. Moved, useful: without them."""
    run = preset("kimi_k2")
    specs = param_specs(run.model)
    out, detail = [], ""
    for chip, sizes in SCALES:
        mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)
        plan = plan_of(specs, run.optim, chip, mesh=mesh, shardings=param_shardings(specs, mesh))
        device, copies = device_flops(plan), sizes.get("data", 1)
        out.append(
            {
                "chip": chip,
                "chips": mesh.size,
                "mesh": sizes,
                "total_flops": total_flops(plan),
                "flops_per_device": device,
                "over_ideal": device * mesh.size / copies / total_flops(plan),
                "bytes_per_device": device_bytes(plan, 2),
                "useful_bytes_per_device": useful_bytes(plan, 2),
                "largest_memory": max(g.memory_per_device(2) for g in plan),
            }
        )
        if chip == "tpu" and sizes == dict(data=2, fsdp=16, expert=8):
            detail = table(COLUMNS, plan_rows(plan, 2))
    plain = sum(
        count * standard_flops(m, n, run.optim.newton_schulz_steps)
        for row in routing_table(specs, run.optim)
        for count, m, n in row.matrices
    )
    rows = [
        (
            r["chip"],
            r["chips"],
            " x ".join(f"{k} {v}" for k, v in r["mesh"].items()),
            f"{r['total_flops'] / 1e15:.1f}",
            f"{r['flops_per_device'] / 1e12:.0f}",
            f"{r['over_ideal']:.2f}",
            f"{r['bytes_per_device'] / 1e9:.2f}",
            f"{r['useful_bytes_per_device'] / 1e9:.2f}",
            f"{r['largest_memory'] / 2**30:.1f}",
        )
        for r in out
    ]
    columns = ("chip", "chips", "mesh", "PFLOP/step", "TFLOP/device", "over ideal", "GB moved, full", "GB useful", "GiB temp")
    text = f"{table(columns, rows)}\n\nplain form: {plain / 1e15:.1f} PFLOP per step\n\n256 TPU chips in detail:\n{detail}"
    return {"rows": out, "plain_flops": plain, "table": text}


# --- forms -----------------------------------------------------------------------------------------------------------


def forms() -> dict:
    """Four 2048 x 7168 matrices on one TPU v5p, keller x5 in bfloat16, compiled by libtpu (extra plan-tpu) and timed as
    launch.py plan times a step: every operation at the rate of its scarcest resource."""
    coeffs = coefficients("keller", 5)
    ways = {"plain": Form(coeffs, None, "bfloat16", "full")} | {
        f"gram, {name}": Form(coeffs, segments_for(coeffs, "bfloat16"), "bfloat16", name) for name in ("full", "tpu")
    }
    out = []
    machine = topology("v5p:2x2x1")
    mesh = Mesh(np.array(machine.devices()[:1]), ("x",))
    x = jax.ShapeDtypeStruct((4, 2048, 7168), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    for way, form in ways.items():
        with jax.set_mesh(mesh):
            compiled = jax.jit(form).lower(x).compile()
        work = Roofline(Program(compiled.as_text()), Interconnect(machine, mesh)).step()
        out.append(
            {
                "chip": "v5p",
                "form": way,
                "seconds": work.seconds,
                "memory_seconds": work.memory,
                "flops": work.flops,
                "bytes": work.bytes,
                "temp": compiled.memory_analysis().temp_size_in_bytes,
            }
        )
        print(f"{way}: done", file=sys.stderr, flush=True)
    rows = [
        (
            r["chip"],
            r["form"],
            f"{1e3 * r['seconds']:.2f}",
            f"{1e3 * r['memory_seconds']:.2f}",
            f"{r['flops'] / 1e12:.2f}",
            f"{r['bytes'] / 1e9:.1f}",
            f"{r['temp'] / 2**20:.0f}",
        )
        for r in out
    ]
    columns = ("chip", "form", "ms", "ms at memory", "TFLOP", "GB", "temp MiB")
    return {"rows": out, "table": table(columns, rows)}


# --- share -----------------------------------------------------------------------------------------------------------


def share_of(name: str, matrices: str, rows: int, rounds: int) -> dict:
    """Fastest rounds of gradients and update, in turns, compiled apart, on one device, with `rows` rows a step."""
    run = preset(name)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, batch_size=rows))
    specs, device = param_specs(run.model), jax.devices()[0]
    mesh = make_mesh(MeshConfig(data=1), [device])
    opt = build_optimizer(
        specs,
        dataclasses.replace(run.optim, matrices=matrices),
        run.train.steps,
        mesh=mesh,
        shardings=param_shardings(specs, mesh),
    )
    step_cfg = StepConfig(run, "float32" if device.platform == "cpu" else "bfloat16", platform_of(device), mesh)
    params = {p: 0.02 * jax.random.normal(jax.random.key(i), s.shape) for i, (p, s) in enumerate(specs.items())}
    shape = (run.train.batch_size, run.train.seq_len)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, 256)
    batch = {
        "tokens": tokens,
        "targets": tokens,
        "segments": jnp.ones(shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(shape[1]), shape),
        "weights": jnp.ones(shape),
    }
    backward = jax.jit(lambda p: gradients(p, batch, jnp.ones(()), step_cfg)[1:])
    grads, aux = backward(params)
    state = opt.init(params)
    update = jax.jit(lambda g, s, p: opt.update(g, s, p, max_logits=aux.attention.max_logit, expert_counts=aux.moe.expert_counts))
    times = measure.in_turns({"gradient": lambda: backward(params), "update": lambda: update(grads, state, params)}, rounds)
    gradient, step = (times[part]["wall_ms"] for part in ("gradient", "update"))
    return {
        "preset": name,
        "matrices": matrices,
        "tokens": tokens.size,
        "gradient_ms": gradient,
        "update_ms": step,
        "share": step / (gradient + step),
    }


def share() -> dict:
    """The optimizer's part of a step, with Muon and with AdamW on every matrix: tiny as it is trained, and laptop (25 M
    parameters, 32 experts) at a quarter of its rows, so that a round takes seconds. More rows make the share smaller."""
    out = []
    for name, rows, rounds in (("tiny", 24, 5), ("laptop", 8, 3)):
        for matrices in ("muon", "adamw"):
            out.append(share_of(name, matrices, rows, rounds))
            print(f"{name}, {matrices}: done", file=sys.stderr)
    rows = [
        (r["preset"], r["matrices"], r["tokens"], f"{r['gradient_ms']:.4g}", f"{r['update_ms']:.4g}", f"{100 * r['share']:.1f} %")
        for r in out
    ]
    columns = ("preset", "matrices", "tokens/step", "gradient ms", "update ms", "share")
    return {"rows": out, "table": table(columns, rows)}


def main() -> None:
    verbs = {"compare": compare, "scale": scale, "forms": forms, "share": share}
    chosen = [arg for arg in sys.argv[1:] if arg != "--write"]
    if len(chosen) != 1 or chosen[0] not in verbs:
        sys.exit(f"usage: python -m bench.muon {{{','.join(verbs)}}} [--write]")
    jax.config.update("jax_num_cpu_devices", 8)
    result = {"date": time.strftime("%Y-%m-%d"), **versions(), **verbs[chosen[0]]()}
    print(", ".join(f"{k} {result[k]}" for k in ("date", "device", "jax", "optax")))
    print(result["table"])
    if "--write" in sys.argv:
        RESULTS.mkdir(exist_ok=True)
        machine = "" if jax.default_backend() == "cpu" else f"-{jax.default_backend()}"
        (RESULTS / f"muon_{chosen[0]}{machine}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
