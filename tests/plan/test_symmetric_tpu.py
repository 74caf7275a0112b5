"""Muon's half products compiled for TPUs that are not here. Needs the extra plan-tpu; without it these are skipped."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from configs.param_spec import HFTensor, Matrix, ParamSpec
from configs.schema import OptimConfig
from optim.build import build_optimizer, plan_of, state_shardings
from optim.plan import device_flops
from train.plan.hlo import Program
from train.plan.interconnect import Interconnect
from train.plan.roofline import Roofline
from train.plan.topology import topology

pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra plan-tpu")]

CFG = OptimConfig(qk_clip_tau=None)


def matrices(count: int, m: int, n: int) -> ParamSpec:
    return ParamSpec(
        (count, m, n), ("experts", "embed", "hidden"), 0.02, "muon", (HFTensor("x"),), matrix=Matrix(("embed",), ("hidden",))
    )


@pytest.mark.parametrize("name", ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("m, n", [(2048, 7168), (7168, 18432)])
def test_compiles(name, m, n):
    """The update of Kimi K2's experts and of its largest matrices on four devices: the compiler accepts the kernel's
    tiles and its memory, the program multiplies what the plan says, and little time goes to anything but products."""
    machine = topology(name)
    mesh = Mesh(np.array(machine.devices()[:4]), ("expert",))
    specs = {"w": matrices(4, m, n)}
    places = {"w": NamedSharding(mesh, P("expert"))}
    opt = build_optimizer(specs, CFG, 10, mesh=mesh, shardings=places)
    params = {"w": jax.ShapeDtypeStruct((4, m, n), jnp.float32, sharding=places["w"])}
    state = jax.eval_shape(opt.init, params)
    state = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, state_shardings(state, mesh, places)
    )
    with jax.set_mesh(mesh):
        text = jax.jit(lambda g, s, p: opt.update(g, s, p)).lower(params, state, params).compile().as_text()
    assert text.count("tpu_custom_call") >= 14, "two Gram matrices, five squares, seven products"
    work = Roofline(Program(text), Interconnect(machine, mesh)).step()
    plan = plan_of(specs, CFG, "tpu", mesh=mesh, shardings=places)
    assert plan[0].forms[0].product == "tpu" and not work.silent and not work.collectives
    assert work.flops == pytest.approx(device_flops(plan), rel=0.01)
    chip = machine.chip
    # Weights, gradients, momenta and their successors in float32, once each. Beyond that, squares of a Gram matrix wait for
    # memory on chips that multiply much faster than they read.
    once = 6 * 4 * m * n / (chip.bandwidth / chip.devices * chip.memory)
    assert work.seconds < 1.6 * (work.flops / (chip.flops / chip.devices * chip.matmul) + once)
