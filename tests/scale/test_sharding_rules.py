"""The sharding rules: where parameters lie on real meshes, and one sentence for what cannot be laid out."""

import math

import pytest

from configs.presets import preset
from configs.schema import ConfigError, MeshConfig
from configs.sharding import AXES, check_model, check_positions, partition
from model.shards import Shards
from model.transformer import param_specs
from tests.scale.networks import RUN
from train.mesh import make_mesh

K2 = preset("kimi_k2")


def sizes(**axes: int) -> dict[str, int]:
    return {axis: axes.get(axis, 1) for axis in AXES}


@pytest.mark.parametrize(
    "axes",
    [
        dict(fsdp=16, expert=32),
        dict(data=4, fsdp=8, expert=16),
        dict(expert=8, context=16, fsdp=4),
        dict(fsdp=8, expert=8, tensor=8),
        dict(fsdp=512),
    ],
)
def test_kimi_k2_fits_every_mesh_evenly(axes):
    """No mesh axis twice in an array, every dimension divides, all but the vectors split over all axes that hold storage."""
    mesh = sizes(**axes)
    for spec in param_specs(K2.model).values():
        found = partition(spec, mesh)
        used = [axis for dim in found for axis in dim]
        assert len(used) == len(set(used))
        assert all(n % math.prod(mesh[a] for a in dim) == 0 for n, dim in zip(spec.shape, found, strict=True))
        if spec.on_grid:
            assert {"fsdp", "expert", "context"} & {a for a in mesh if mesh[a] > 1} <= set(used)


def test_storage_leaves_groups_of_the_grid_whole():
    """DeepSeek-V3 over 64: parts of 112 inputs would cut groups of 32, so the hidden width is stored in parts instead."""
    specs, mesh = param_specs(preset("deepseek_v3").model), sizes(fsdp=64, expert=8)
    gate_up, down = specs["moe.mlp.experts_gate_up"], specs["moe.mlp.experts_down"]
    assert partition(gate_up, mesh)[gate_up.axis("embed")] == ()
    assert partition(gate_up, mesh)[gate_up.axis("expert_hidden")] == ("fsdp",)
    assert partition(down, mesh)[down.axis("embed")] == ("fsdp",)  # not the inputs of this one


def test_what_a_device_works_with():
    """Experts stay split over expert, widths and heads over tensor; all else is gathered whole."""
    specs, shards = param_specs(K2.model), Shards(tuple(sizes(fsdp=4, expert=8, tensor=2, context=2).items()))
    experts, router = specs["moe.mlp.experts_gate_up"], specs["moe.mlp.router"]
    assert shards.kept(experts)[experts.axis("experts")] == ("expert",)
    assert shards.kept(experts)[experts.axis("expert_hidden")] == ("tensor",)
    assert shards.kept(router) == ((),) * 3
    assert shards.kept(specs["moe.attn.o"])[1] == ("tensor",)
    assert shards.stored(specs["moe.input_norm"]) == ((), ())


@pytest.mark.parametrize(
    "rules, sentence",
    [
        ({"heads": (("tensor", "tensor"),)}, "uses a mesh axis twice on one tensor"),
        ({"heads": (("pipeline",),)}, "names an axis that no mesh has"),
        ({"v_dim": (("tensor",),)}, "would be replicated over mesh.fsdp"),
    ],
)
def test_rules_that_cannot_be(rules, sentence):
    with pytest.raises(ConfigError, match=sentence):
        partition(param_specs(K2.model)["moe.attn.o"], sizes(fsdp=8, tensor=2), rules)


@pytest.mark.parametrize(
    "axes, sentence",
    [
        (dict(expert=7), r"mesh.expert=7 does not divide model.n_routed_experts=384; the sizes that can: 2, 3, 4, 6, 8"),
        (dict(tensor=3), r"mesh.tensor=3 does not divide model.num_attention_heads=64; the sizes that can: 2, 4, 8"),
    ],
)
def test_what_an_axis_cannot_split(axes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_model(K2.model, sizes(**axes))


def test_positions_and_devices():
    with pytest.raises(ConfigError, match="train.seq_len=4100 cannot be cut into the 16 chunks of mesh.context=8"):
        check_positions(4100, sizes(context=8))
    with pytest.raises(ConfigError, match="choose axes whose product is 8"):
        make_mesh(MeshConfig(data=1, fsdp=3))
    check_positions(RUN.train.seq_len, sizes())
