"""What the compiled update does on eight simulated devices: its values, its collectives, its FLOPs, its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from optim_table import arrays, k2_table, matrix, mesh_of, shardings, spec, statistics

from configs.schema import ConfigError, OptimConfig
from optim import plan as plan_file
from optim.build import build_optimizer, plan_of, state_shardings
from optim.plan import Strategy, device_bytes, device_flops, exchanges, total_flops
from train.plan.census import census

CFG = OptimConfig(warmup_steps=1, lr=0.1, qk_clip_tau=2.0, newton_schulz_steps=3)  # fewer steps compile faster


def abstract(specs, opt, mesh, places, dtype=jnp.float32):
    """Shapes with shardings of the parameters and of the optimizer state: enough to compile, nothing is allocated."""
    params = {path: jax.ShapeDtypeStruct(s.shape, dtype, sharding=places[path]) for path, s in specs.items()}
    state = jax.eval_shape(opt.init, params)
    state = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, state_shardings(state, mesh, places)
    )
    return params, state


def compile_step(specs, cfg, mesh, places, stats=None):
    """The program of one optimizer step, weights and state donated, and its plan."""
    opt = build_optimizer(specs, cfg, 10, mesh=mesh, shardings=places)
    params, state = abstract(specs, opt, mesh, places)

    def step(grads, state, params, stats):
        updates, state = opt.update(grads, state, params, **stats)
        return {path: params[path] + updates[path] for path in params}, updates, state

    with jax.set_mesh(mesh):
        compiled = jax.jit(step, donate_argnums=(1, 2)).lower(params, state, params, stats or {}).compile()
    return compiled, plan_of(specs, cfg, "cpu", mesh=mesh, shardings=places), opt


@pytest.fixture(scope="module")
def alone():
    """Two steps of the whole table on one device."""
    specs = k2_table()
    opt = build_optimizer(specs, CFG, 10)
    params, stats = arrays(specs, 0, 0.02), statistics()
    state = opt.init(params)
    update = jax.jit(lambda g, s, p: opt.update(g, s, p, **stats))
    steps = []
    for seed in (1, 2):
        updates, state = update(arrays(specs, seed), state, params)
        steps.append(updates)
    return specs, jax.device_get(params), jax.device_get(stats), steps


MESHES = {
    "fsdp8": dict(fsdp=8),
    "data2-fsdp2-expert2-explicit": dict(data=2, fsdp=2, expert=2, explicit=True),
    "fsdp2-expert2-tensor2": dict(fsdp=2, expert=2, tensor=2),
}


@pytest.mark.parametrize("name", MESHES)
def test_whole_table(alone, name):
    """Sharded equals unsharded, on three layers and other odd counts; repeated runs are bit-equal; and the program
    holds exactly two all-to-alls per exchange, whatever it packs together, no all-gather, nothing inside loops."""
    specs, params, stats, expected = alone
    mesh = mesh_of(**MESHES[name])
    places = shardings(specs, mesh)
    compiled, plan, opt = compile_step(specs, CFG, mesh, places, stats)

    counted = census(compiled.as_text(), mesh.size)
    assert exchanges(plan) and all(g.strategy is not Strategy.GATHER for g in plan)
    assert counted.kinds() == {"all-to-all": 2 * len(exchanges(plan))} | {
        kind: n for kind, n in counted.kinds().items() if kind != "all-to-all"
    }
    assert set(counted.kinds(over_bytes=1024)) <= {"all-to-all"}
    assert not any(c.in_loop for c in counted.collectives)
    assert sum(c.received for c in counted.collectives if c.kind == "all-to-all") == device_bytes(plan, 4)
    assert counted.flops <= 1.01 * device_flops(plan)  # the plan prints what is compiled

    def run():
        with jax.set_mesh(mesh):
            p = jax.device_put(params, places)
            state = jax.jit(opt.init)(p)
            state = jax.device_put(state, state_shardings(state, mesh, places))
            out = []
            for seed in (1, 2):
                grads = jax.device_put(jax.device_get(arrays(specs, seed)), places)
                _, updates, state = compiled(grads, state, jax.device_put(params, places), stats)
                out.append(jax.device_get(updates))
        return out

    first, second = run(), run()
    for mine, again, theirs in zip(first, second, expected):
        for path in specs:
            np.testing.assert_array_equal(mine[path], again[path])
            # a device that holds one matrix sums in another order, and the iteration amplifies that by its slope at
            # small singular values; the updates here are 500 times those of a run at Kimi K2's learning rate
            np.testing.assert_allclose(mine[path], theirs[path], rtol=0, atol=1e-6, err_msg=path)


def experts(layers=4, count=16, width=256, hidden=128):
    return {
        "gate_up": spec(
            (layers, count, width, 2, hidden),
            "layers experts embed gate_up expert_hidden",
            matrix=matrix("embed", "expert_hidden"),
        ),
        "down": spec(
            (layers, count, hidden, width), "layers experts expert_hidden embed", matrix=matrix("expert_hidden", "embed")
        ),
    }


PLAIN = OptimConfig(qk_clip_tau=None)


@pytest.mark.parametrize("axes", [dict(expert=8), dict(data=2, fsdp=2, expert=2), dict(fsdp=4, expert=2, explicit=True)])
def test_experts_move_nothing(axes):
    """Split over E, the update of the experts has no collective at all, and every device works on its share only."""
    specs, mesh = experts(), mesh_of(**axes)
    places = shardings(specs, mesh)
    compiled, plan, _ = compile_step(specs, PLAIN, mesh, places)
    counted = census(compiled.as_text(), mesh.size)
    assert counted.collectives == ()
    ideal = total_flops(plan) / (mesh.shape["fsdp"] * mesh.shape["expert"])  # data holds copies
    assert counted.flops <= 1.05 * ideal


def test_matrix_axes_are_exchanged_once_each_way():
    """Stacked and separate arrays of equal matrices share one exchange; FLOPs per device stay at an eighth."""
    mesh = mesh_of(fsdp=8)
    specs = {
        "wide": spec((12, 256, 128), "layers embed hidden", matrix=matrix("embed", "hidden")),
        "tall": spec((2, 128, 256), "layers hidden embed", matrix=matrix("hidden", "embed")),
        "one": spec((256, 128), "embed hidden", matrix=matrix("embed", "hidden")),
        "two": spec((256, 128), "embed hidden", matrix=matrix("embed", "hidden")),
    }
    places = shardings(specs, mesh)
    compiled, plan, _ = compile_step(specs, PLAIN, mesh, places)
    assert [(g.count, g.strategy) for g in plan] == [(16, Strategy.ALL_TO_ALL)]
    counted = census(compiled.as_text(), 8)
    assert counted.kinds() == {"all-to-all": 2}
    assert counted.flops <= 1.05 * total_flops(plan) / 8


def test_both_matrix_axes_cut():
    """Rows over one mesh axis and columns over another are still one exchange each way, over both."""
    mesh = mesh_of(fsdp=4, tensor=2)
    specs = {"w": spec((8, 64, 32), "layers embed hidden", matrix=matrix("embed", "hidden"))}
    places = {"w": NamedSharding(mesh, P(None, "fsdp", "tensor"))}
    compiled, plan, _ = compile_step(specs, PLAIN, mesh, places)
    counted = census(compiled.as_text(), 8)
    assert counted.kinds() == {"all-to-all": 2} and {c.group for c in counted.collectives} == {8}
    assert counted.flops <= 1.05 * total_flops(plan) / 8


@pytest.mark.parametrize("cut", [P(None, "fsdp"), P(None, None, "fsdp"), P(None, "tensor", "fsdp")])
def test_few_long_matrices_stay_cut(cut):
    """Fewer matrices than devices, one side much longer: the long side stays divided. An exchange each way only where
    the short side was cut, one small sum per step, work divided by eight; and the values are those of one device."""
    mesh = mesh_of(fsdp=8) if "tensor" not in cut else mesh_of(fsdp=4, tensor=2)
    specs = {"w": spec((2, 16, 2048), "layers short long", matrix=matrix("short", "long"))}
    places = {"w": NamedSharding(mesh, cut)}
    compiled, plan, opt = compile_step(specs, PLAIN, mesh, places)
    assert [g.strategy for g in plan] == [Strategy.TWO_DIMENSIONAL]
    counted = census(compiled.as_text(), 8)
    kinds = counted.kinds()
    assert kinds.get("all-to-all", 0) == (2 if plan[0].row_axes else 0) and "all-gather" not in kinds
    assert max(c.bytes for c in counted.collectives if c.kind == "all-reduce") == 2 * 16 * 16 * 4
    assert counted.flops == plan[0].flops_per_device
    grads, params = jax.device_get(arrays(specs, 1)), jax.device_get(arrays(specs, 0))
    with jax.set_mesh(mesh):
        state = jax.device_put(jax.device_get(opt.init(params)), state_shardings(opt.init(params), mesh, places))
        _, updates, _ = compiled(jax.device_put(grads, places), state, jax.device_put(params, places), {})
    single = build_optimizer(specs, PLAIN, 10)
    expected, _ = single.update(grads, single.init(params), params)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=0, atol=1e-8)  # updates are about 2e-6


def test_a_single_matrix_is_gathered():
    """The last resort: one gather, half of what two exchanges padded with zeros would move."""
    mesh = mesh_of(fsdp=8)
    specs = {"w": spec((64, 32), "embed hidden", matrix=matrix("embed", "hidden"))}
    places = shardings(specs, mesh)
    compiled, plan, _ = compile_step(specs, PLAIN, mesh, places)
    assert [g.strategy for g in plan] == [Strategy.GATHER]
    assert census(compiled.as_text(), 8).kinds() == {"all-gather": 1}


def test_temporary_memory_is_bounded(monkeypatch):
    """Large stacks are overwritten in place, a chunk at a time: the plan's bound holds for the compiled program, and
    the loop's FLOPs are those of the plan."""
    monkeypatch.setitem(plan_file.CHUNK_BYTES, "cpu", 2**20)
    mesh = mesh_of(expert=8)
    specs = experts(layers=16, count=8, width=512, hidden=256)
    places = shardings(specs, mesh)
    compiled, plan, _ = compile_step(specs, PLAIN, mesh, places)
    counted = census(compiled.as_text(), 8)
    assert "while" in compiled.as_text() and counted.collectives == ()
    assert counted.flops == sum(g.flops_per_device for g in plan)
    memory = compiled.memory_analysis()
    updates = sum(s.size for s in specs.values()) * 4 // 8  # returned here besides the weights
    bound = sum(g.memory_per_device(4) for g in plan)
    assert memory.temp_size_in_bytes <= bound
    assert memory.alias_size_in_bytes >= memory.output_size_in_bytes - updates - 4096  # donation took effect
    assert bound <= updates + 6 * 2**20  # one copy of the matrices and the workspace of a chunk


def test_plans_fail_with_a_sentence():
    mesh = mesh_of(fsdp=8)
    specs = {"w": spec((3, 36, 32), "layers embed hidden", matrix=matrix("embed", "hidden"))}
    with pytest.raises(ConfigError, match="cannot be cut into 8 equal parts"):
        plan_of(specs, PLAIN, "cpu", mesh=mesh, shardings={"w": NamedSharding(mesh, P(None, "fsdp"))})
    with pytest.raises(ConfigError, match="has no sharding"):
        plan_of(specs, PLAIN, "cpu", mesh=mesh, shardings={})
    with pytest.raises(ConfigError, match="together"):
        build_optimizer(specs, PLAIN, 10, mesh=mesh)
