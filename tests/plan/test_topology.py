"""Machines by name, and how long their wires take; nothing here needs a chip or its compiler."""

import importlib.util
import types

import numpy as np
import pytest

from configs.schema import ConfigError
from train.plan.census import Collective
from train.plan.hlo import Program
from train.plan.interconnect import LATENCY, Interconnect
from train.plan.roofline import Roofline
from train.plan.topology import CHIPS, topology


@pytest.mark.parametrize(
    "name, shape, devices",
    [
        ("v5p:8x8x8", (8, 8, 8), 512),
        ("v5p-512", (8, 8, 8), 512),
        ("v6e-16", (4, 4), 16),
        ("v6e:16x16", (16, 16), 256),
        ("tpu7x-256", (4, 8, 8), 512),
        ("tpu7x:4x4x4", (4, 4, 4), 128),
        ("2xv5p:4x4x4", (4, 4, 4), 128),
        ("h100-512", (64, 8), 512),
        ("H100:2x8", (2, 8), 16),
        ("b200-4", (1, 4), 4),
        ("v5p-4", (2, 2, 1), 4),
    ],
)
def test_names(name, shape, devices):
    found = topology(name)
    assert found.shape == shape and found.device_count == devices


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("v9p-16", "did you mean v5p"),
        ("v6e-17", "no v6e slice has 17 chips"),
        ("v6e:4x4x4", "has 2 sizes"),
        ("h100:2x2x2", "nodes x GPUs per node"),
        ("2xh100:4x8", "several slices of GPUs"),
        ("v5p", "write CHIP:SHAPE"),
        ("0xv5p:2x2x2", "no topology"),
        ("v5p:2xx2x2", "no topology"),
        ("h100:0x8", "no topology"),
        ("", "no topology"),
        ("v5p:1000x1000x1000", "9216 at most"),
        ("h100-12", "no whole nodes of 8"),
    ],
)
def test_wrong_names_are_one_sentence(name, sentence):
    with pytest.raises(ConfigError, match=sentence) as error:
        topology(name)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_absent_compiler_is_one_sentence():
    with pytest.raises(ConfigError, match=r"needs libtpu.*pip install -e '.\[plan-tpu\]'"):
        topology("v6e-16").devices()


def machine(name: str, axes: dict[str, int]) -> Interconnect:
    """Wires of a machine whose mesh is laid over it in row-major order."""
    found = topology(name)
    places = np.stack(np.unravel_index(np.arange(found.chips), found.shape), axis=-1)
    if found.chip.dimensions:
        devices = [types.SimpleNamespace(coords=[*map(int, p), 0][:3], core_on_chip=0, slice_index=0) for p in places]
    else:
        devices = [types.SimpleNamespace(process_index=int(p[0])) for p in places]
    grid = np.array(devices, object).reshape(list(axes.values()))
    return Interconnect(found, types.SimpleNamespace(devices=grid, size=found.chips, axis_names=tuple(axes)))


def members(wires: Interconnect, *axes: str) -> tuple[int, ...]:
    shape = wires.mesh.devices.shape
    ids = np.arange(wires.mesh.size).reshape(shape)
    return tuple(int(i) for i in ids[tuple(slice(None) if a in axes else 0 for a in wires.mesh.axis_names)].reshape(-1))


def seconds(wires, kind, bytes_, *axes):
    ids = members(wires, *axes)
    return wires.seconds(Collective(kind, bytes_, len(ids), False, ids)) - LATENCY


def test_a_closed_ring_sends_both_ways():
    """v5p closes axes of 4 and more: an all-gather over 8 chips receives 7/8 at twice a link's rate, over a plane of 64
    at four times. Half an axis is an open line, at one link's rate."""
    wires = machine("v5p:8x8x8", {"data": 2, "fsdp": 4, "expert": 64})
    link = CHIPS["v5p"].link * CHIPS["v5p"].wire
    assert seconds(wires, "all-gather", 8e9, "expert") == pytest.approx(8e9 * 63 / 64 / (4 * link))
    assert seconds(wires, "all-gather", 8e9, "fsdp") == pytest.approx(8e9 * 3 / 4 / link)
    assert seconds(wires, "all-reduce", 8e9, "fsdp") == pytest.approx(2 * seconds(wires, "all-gather", 8e9, "fsdp"))
    assert wires.axes(members(wires, "fsdp", "expert")) == ("fsdp", "expert")


@pytest.mark.parametrize(
    "name, axes", [("v5p:8x8x8", {"data": 4, "fsdp": 2, "expert": 64}), ("h100:64x8", {"fsdp": 64, "expert": 8})]
)
def test_a_neighbour_is_sent_to_over_one_link(name, axes):
    """One direction of it: a permute's group is the pair of its first source and target."""
    wires, chip = machine(name, axes), topology(name).chip
    took = wires.seconds(Collective("collective-permute", 1e9, 2, False, (0, 1))) - LATENCY
    assert took == pytest.approx(1e9 / (chip.link * chip.wire))


def test_a_permute_waits_for_its_slowest_pair():
    """Inside a node for the first pair, over the network for the second; one that sends to itself sends nothing."""
    wires, chip = machine("h100:64x8", {"fsdp": 64, "expert": 8}), CHIPS["h100"]
    permute = Collective("collective-permute", 1e9, 2, False, (0, 1, 7, 8, 3, 3))
    assert wires.seconds(permute) - LATENCY == pytest.approx(1e9 / (chip.outside * chip.wire))
    assert wires.spanned(permute) == ("fsdp", "expert")
    inside = Collective("collective-permute", 1e9, 2, False, (0, 1, 1, 2))
    assert wires.seconds(inside) - LATENCY == pytest.approx(1e9 / (chip.link * chip.wire)) and wires.spanned(inside) == (
        "expert",
    )
    assert wires.seconds(Collective("collective-permute", 1e9, 2, False, (4, 4))) == 0


def test_interleaved_groups_share_links():
    """The outer half of an axis of 8 joins chips 4 apart: four groups go through each link."""
    wires = machine("v5p:8x8x8", {"data": 2, "fsdp": 4, "expert": 64})
    link = CHIPS["v5p"].link * CHIPS["v5p"].wire
    assert seconds(wires, "all-gather", 8e9, "data") == pytest.approx(4e9 / (2 * link / 4))


def test_all_to_all_crosses_the_middle():
    """n chips on a closed ring: n/2 of them send half of B across two links each way, B * n / 8 per link."""
    wires = machine("v5p:8x8x8", {"expert": 8, "fsdp": 64})
    link = CHIPS["v5p"].link * CHIPS["v5p"].wire
    assert seconds(wires, "all-to-all", 8e9, "expert") == pytest.approx(8e9 * 7 / 8 / (4 * 2 * link / 8), rel=0.01)


def test_between_nodes_only_the_network_is_left():
    wires = machine("h100:64x8", {"fsdp": 64, "expert": 8})
    chip = CHIPS["h100"]
    assert seconds(wires, "all-gather", 8e9, "expert") == pytest.approx(7e9 / (chip.link * chip.wire))
    assert seconds(wires, "all-gather", 8e9, "fsdp") == pytest.approx(8e9 * 63 / 64 / (chip.outside * chip.wire))
    assert seconds(wires, "all-to-all", 8e9, "fsdp") > 8 * seconds(wires, "all-to-all", 8e9, "expert")


def test_what_comes_along_an_axis_has_to_come_through_it():
    """A line of two chips across and a ring of eight along: the ring's share of an all-gather's bytes is 7/8 of them, which
    enter a pair of chips by the links of both."""
    wires = machine("v5p:2x8x8", {"fsdp": 8, "expert": 16})
    link = CHIPS["v5p"].link * CHIPS["v5p"].wire
    whole = 8e9 * 15 / 16 / (2 * link + link)
    assert seconds(wires, "all-gather", 8e9, "expert") == pytest.approx(max(whole, 8e9 * 7 / 8 / 2 / (2 * link)))
    slow = machine("h100:64x8", {"fsdp": 64, "expert": 8})
    outside = CHIPS["h100"].outside * CHIPS["h100"].wire
    assert seconds(slow, "all-gather", 8e9, "fsdp", "expert") == pytest.approx(8e9 * 63 / 64 / 8 / outside)


def test_devices_of_a_chip_share_its_way_to_other_slices():
    found = topology("2xtpu7x:2x2x1")
    devices = [
        types.SimpleNamespace(coords=[x, y, 0], core_on_chip=core, slice_index=slice_)
        for slice_ in range(2)
        for x in range(2)
        for y in range(2)
        for core in range(2)
    ]
    grid = np.array(devices, object).reshape(2, 8)
    wires = Interconnect(found, types.SimpleNamespace(devices=grid, size=16, axis_names=("data", "fsdp")))
    both = 2 * 4e9 / seconds(wires, "all-gather", 8e9, "data")
    assert both == pytest.approx(found.chip.outside * found.chip.wire)


KERNELS = """HloModule m, is_scheduled=true

%all-reduce-scatter.1 (a: bf16[64,128]) -> bf16[8,128] {
  %a = bf16[64,128]{1,0} parameter(0)
  %r = bf16[64,128]{1,0} all-reduce(%a), replica_groups=[8,8]<=[64], to_apply=%add
  %n = s32[] constant(0)
  ROOT %s = bf16[8,128]{1,0} dynamic-slice(%r, %n, %n), dynamic_slice_sizes={8,128}
}

ENTRY %main (a: bf16[64,128]) -> bf16[8,128] {
  %a = bf16[64,128]{1,0} parameter(0)
  %k = bf16[64,128]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", NOTES
  ROOT %f = bf16[8,128]{1,0} fusion(%k), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


NOTES = (
    'metadata={op_name="jit(f)/transpose(jvp(even_load_0.7500))/pallas_call"}, '
    'backend_config={"cost_estimate":{"flops":"4000","bytes_accessed":"800"}}'
)


def test_what_a_program_says_is_read_as_what_it_is():
    """Of an expert kernel the share that even experts fill; of a fused all-reduce and slice a reduce-scatter, waited for."""
    wires = machine("v5p:4x4x4", {"fsdp": 8, "expert": 8})
    work = Roofline(Program(KERNELS.replace("NOTES", NOTES)), wires).step()
    (scatter,) = work.collectives
    assert (scatter.kind, scatter.bytes, scatter.received) == ("reduce-scatter", 8 * 128 * 2, 7 * 8 * 128 * 2)
    assert work.exposed == wires.seconds(scatter) > 0 and work.hidden == 0
    assert work.flops == 3000 and not work.silent


BESIDE = """HloModule m, is_scheduled=true

%gathering (a: bf16[8,1024]) -> bf16[64,1024] {
  %a = bf16[8,1024]{1,0} parameter(0)
  ROOT %g = bf16[64,1024]{1,0} all-gather(%a), replica_groups=[8,8]<=[64], dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (a: bf16[8,1024], b: bf16[4096,4096]) -> bf16[64,1024] {
  %a = bf16[8,1024]{1,0} parameter(0)
  %b = bf16[4096,4096]{1,0} parameter(1)
  FIRST
  %c = bf16[4096,4096]{1,0} copy(%b)
  THEN
  ROOT %d = bf16[64,1024]{1,0} async-done(%LAST), calls=%gathering
}
"""

STARTED = "%s = ((bf16[8,1024]{1,0}), bf16[64,1024]{1,0}) async-start(%a), calls=%gathering"


def test_what_is_started_runs_beside_what_follows_until_it_is_waited_for():
    wires = machine("v5p:4x4x4", {"fsdp": 8, "expert": 8})

    def work(first, then, last):
        text = BESIDE.replace("FIRST", first).replace("THEN", then).replace("LAST", last)
        return Roofline(Program(text), wires).step()

    late, early = work("", STARTED, "s"), work(STARTED, "", "s")
    unfed = STARTED.replace("(%a)", "()").replace("async-start", "call-start")
    fed = "%u = ((bf16[8,1024]{1,0}), bf16[64,1024]{1,0}) call-update(%s, %a)"
    (gather,) = early.collectives
    seconds = wires.seconds(gather)
    assert gather.overlaps and 0 < seconds < early.memory
    assert late.exposed == pytest.approx(seconds) and late.hidden == 0
    assert early.exposed == 0 and early.hidden == pytest.approx(seconds)
    assert work(unfed, fed, "u").exposed == pytest.approx(seconds)  # it begins when it gets its operands
    assert work(unfed + "\n  " + fed, "", "u").exposed == 0
    two = work(STARTED + "\n  " + STARTED.replace("%s", "%s2", 1), "%e = bf16[64,1024]{1,0} async-done(%s)", "s2")
    assert two.exposed + two.hidden == pytest.approx(2 * seconds)  # over the same wires, one after the other


COPIES = """HloModule m, is_scheduled=true

%cutting (b: bf16[4096,4096]) -> bf16[4096,4096] {
  %b = bf16[4096,4096]{1,0} parameter(0)
  ROOT %c = bf16[4096,4096]{1,0} copy(%b)
}

ENTRY %main (b: bf16[4096,4096]) -> bf16[4096,4096] {
  %b = bf16[4096,4096]{1,0} parameter(0)
  %f = (bf16[4096,4096]{1,0:S(1)}, bf16[4096,4096]{1,0}, u32[]{:S(2)}) copy-start(%b)
  %g = bf16[4096,4096]{1,0:S(1)} copy-done(%f)
  %s = ((bf16[4096,4096]{1,0}), bf16[4096,4096]{1,0}, u32[]{:S(2)}) async-start(%b), calls=%cutting
  %d = bf16[4096,4096]{1,0} copy(%b)
  ROOT %e = bf16[4096,4096]{1,0} async-done(%s), calls=%cutting
}
"""


def test_copies_beside_other_work_still_take_the_memory_their_bytes():
    """One into a core's own memory, one by another core, one that the device waits for: none hides another."""
    wires = machine("v5p:4x4x4", {"fsdp": 8, "expert": 8})
    roofline = Roofline(Program(COPIES), wires)
    work, plain = roofline.step(), 2 * 2 * 4096 * 4096 / roofline.memory_rate
    assert work.memory == pytest.approx(2.5 * plain) and work.hidden == work.exposed == 0


FETCHED = """HloModule m, is_scheduled=true

%cutting (b: s8[7,4096]) -> s8[1,4096] {
  %b = s8[7,4096]{1,0} parameter(0)
  ROOT %c = s8[1,4096]{1,0:S(1)} slice(%b), slice={[0:1], [0:4096]}
}

ENTRY %main (b: s8[7,4096]) -> s8[1,4096] {
  %b = s8[7,4096]{1,0} parameter(0)
  START
  ROOT %d = s8[1,4096]{1,0:S(1)} slice-done(%s)
}
"""


@pytest.mark.parametrize("start", ["slice-start(%b), slice={[0:1], [0:4096]}", "async-start(%b), calls=%cutting"])
@pytest.mark.parametrize("into, times", [(":S(1)", 1), ("", 2)])
def test_a_slice_fetched_early_takes_the_memory_its_own_bytes(start, into, times):
    """In both of the compiler's spellings, of which each names the whole array in its result. Read once, and written where
    it does not stay in a core's own memory."""
    text = FETCHED.replace("START", "%s = ((s8[7,4096]{1,0}), s8[1,4096]{1,0:S(1)}, s32[]{:S(2)}) " + start)
    roofline = Roofline(Program(text.replace(":S(1)", into)), machine("v6e:2x2", {"fsdp": 4}))
    assert roofline.step().bytes == times * 4096


SLICES = """HloModule m, is_scheduled=true

%reading (a: bf16[64,32,16], n: s32[]) -> (bf16[4,32,16], f32[4,512]) {
  %a = bf16[64,32,16]{1,2,0} parameter(0)
  %n = s32[] parameter(1)
  %z = s32[] constant(0)
  %seen = bf16[64,16,32]{2,1,0} bitcast(%a)
  %part = bf16[4,16,32]{2,1,0} dynamic-slice(%seen, %n, %z, %z), dynamic_slice_sizes={4,16,32}
  %wide = f32[4,512]{1,0} convert(%part)
  ROOT %t = (bf16[4,32,16]{1,2,0}, f32[4,512]{1,0}) tuple(%part, %wide)
}

%writing (a: bf16[64,32,16], u: bf16[4,32,16], n: s32[]) -> bf16[64,32,16] {
  %a = bf16[64,32,16]{1,2,0} parameter(0)
  %u = bf16[4,32,16]{1,2,0} parameter(1)
  %n = s32[] parameter(2)
  %z = s32[] constant(0)
  %seen = bf16[64,16,32]{2,1,0} bitcast(%a)
  %new = bf16[4,16,32]{2,1,0} bitcast(%u)
  %put = bf16[64,16,32]{2,1,0} dynamic-update-slice(%seen, %new, %n, %z, %z)
  ROOT %back = bf16[64,32,16]{1,2,0} bitcast(%put)
}

ENTRY %main (a: bf16[64,32,16], n: s32[]) -> bf16[64,32,16] {
  %a = bf16[64,32,16]{1,2,0} parameter(0)
  %n = s32[] parameter(1)
  %r = (bf16[4,32,16]{1,2,0}, f32[4,512]{1,0}) fusion(%a, %n), kind=kLoop, calls=%reading
  ROOT %w = bf16[64,32,16]{1,2,0} fusion(%a, %r#0, %n), kind=kLoop, calls=%writing
}
"""


@pytest.mark.parametrize(
    "view", ["bitcast(%a)", "fusion(%a), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%tiles"]
)
def test_a_slice_is_a_slice_in_any_layout(view):
    """Fusions that read four of 64 matrices, and write over four of them, seen through bitcasts and in other tiles."""
    program = Program(SLICES.replace("bitcast(%a)", view))
    roofline, four = Roofline(program, machine("v5p:4x4x4", {"fsdp": 8, "expert": 8})), 4 * 32 * 16
    indices = 2 * 4
    assert roofline.step().bytes == (2 + 2 + 4) * four + (2 + 2) * four + indices
