"""Reading compiled programs: every notation of groups, loops, and products that a TPU writes as convolutions."""

import pytest

from tests.plan.test_topology import machine
from train.plan.census import census
from train.plan.hlo import Program
from train.plan.roofline import Roofline

LOOP = """HloModule m, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %d = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %t = (s32[], f32[8,16]{1,0}) tuple(%p#0, %x)
}

%inner_cond (p: (s32[], f32[8,16])) -> pred[] {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %n = s32[] custom-call(), custom_call_target="bound"
  ROOT %less = pred[] compare(%p#0, %n), direction=LT
}

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %w = (s32[], f32[8,16]{1,0}) while(%p), condition=%inner_cond, body=%inner_body, metadata={op_name="jit(f)/attend/while"}
  %o = (s32[], f32[8,16]{1,0}) while(%p), condition=%inner_cond, body=%inner_body, metadata={op_name="jit(f)/SCOPE/while"}
  %g = f32[16,16]{1,0} all-gather(%w#1), replica_groups=GROUPS, dimensions={0}
  ROOT %t = (s32[], f32[8,16]{1,0}) tuple(%p#0, %w#1)
}

%cond (p: (s32[], f32[8,16])) -> pred[] {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %n = s32[]{:T(128)} constant(6)
  ROOT %less = pred[] compare(%p#0, %n), direction=LT
}

ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %start = (s32[], f32[8,16]{1,0}) tuple(%x, %x)
  %loop = (s32[], f32[8,16]{1,0}) while(%start), condition=%cond, body=%body
  ROOT %r = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
    "groups, first",
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("[2,2]<=[4]", (0, 1)),
        ("[2,2]<=[2,2]T(1,0)", (0, 2)),
        ("mesh['data'=2,'fsdp'=2] {'data'}", (0, 2)),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_1'}", (0, 1)),
    ],
)
@pytest.mark.parametrize("scope", ["overflow", "jvp(overflow)"])
def test_groups_and_trips(groups, first, scope):
    """The loop's 6 trips are read from its condition. An inner loop bounded by data counts as causal attention,
    (6 + 1) / 2 trips, a transport's further rounds as none; without being told so both are an error."""
    text = LOOP.replace("GROUPS", groups).replace("SCOPE", scope)
    counted = census(text, 4, causal=True)
    assert counted.flops == 6 * 3.5 * 2 * 8 * 8 * 16
    (gather,) = counted.collectives
    assert gather.members == first and gather.times == 6 and gather.received == 16 * 16 * 4 // 2
    with pytest.raises(ValueError, match="trip count"):
        census(text, 4)


@pytest.mark.parametrize(
    "line, flops",
    [
        ("%c = bf16[512,256]{1,0} convolution(%a, %b), dim_labels=bf_io->bf", 2 * 512 * 256 * 128),
        (
            "%c = bf16[16,512,256]{2,1,0} convolution(%a3, %b3), window={size=16 stride=15 lhs_dilate=16}, "
            "dim_labels=0bf_0io->0bf",
            16 * 2 * 512 * 256 * 128,
        ),
        (
            "%c = bf16[1,512,256]{2,1,0} convolution(%a3, %b3), window={size=16}, dim_labels=0bf_0io->0bf",
            16 * 2 * 512 * 256 * 128,
        ),
    ],
)
def test_products_of_a_tpu(line, flops):
    """A plain product, a batched one (its batch a dilated window, of which every output meets one input), and one summed
    over the window."""
    text = f"""HloModule m
ENTRY %main (a: bf16[512,128]) -> bf16[512,256] {{
  %a = bf16[512,128]{{1,0}} parameter(0)
  %b = bf16[128,256]{{1,0}} parameter(1)
  %a3 = bf16[16,512,128]{{2,1,0}} parameter(2)
  %b3 = bf16[16,128,256]{{2,1,0:T(8,128)(2,1)S(1)}} parameter(3)
  ROOT {line}
}}
"""
    assert census(text).flops == flops


def test_memory_spaces():
    """S(1) in a layout is a core's own memory, not the device's."""
    program = Program("HloModule m\nENTRY %main (a: f32[8]) -> f32[8] {\n  ROOT %a = f32[8]{0:T(128)S(1)} parameter(0)\n}\n")
    assert program.computations["main"]["a"].shapes[0].space == 1


SUMS_OVER = '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_batch_dimensions":[],"lhs_contracting_dimensions":["1"]}}}'

CUBLAS = """HloModule m, is_scheduled=true

%sliced (w: bf16[4,32,16], n: s32[], x: bf16[8,32]) -> (f32[8,16], s8[999]) {
  %w = bf16[4,32,16]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,32,16]{2,1,0} dynamic-slice(%w, %n, %zero, %zero), dynamic_slice_sizes={1,32,16}
  %part = bf16[32,16]{1,0} bitcast(%slice)
  %x = bf16[8,32]{1,0} parameter(2)
  ROOT %c = (f32[8,16]{1,0}, s8[999]{0}) custom-call(%x, %part), custom_call_target="__cublas$lt$matmul", SUMS_OVER
}

ENTRY %main (w: bf16[4,32,16], n: s32[], x: bf16[8,32], y: bf16[32,16]) -> f32[8,16] {
  %w = bf16[4,32,16]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %x = bf16[8,32]{1,0} parameter(2)
  %y = bf16[32,16]{1,0} parameter(3)
  %f = (f32[8,16]{1,0}, s8[999]{0}) fusion(%w, %n, %x), kind=kCustom, calls=%sliced
  %d = (f32[8,16]{1,0}, s8[999]{0}) custom-call(%x, %y), custom_call_target="__cublas$gemm", SUMS_OVER
  %s = f32[8,8]{1,0} custom-call(%x, %x), custom_call_target="__cublas$triangularSolve"
  ROOT %r = f32[8,16]{1,0} get-tuple-element(%f), index=0
}
"""


def test_products_left_to_cublas():
    """A call of cuBLAS, by itself or in a fusion with the slice it reads, counts as the product it is: operations, operands
    and result, without the room it works in. Of its other calls nothing is known."""
    program = Program(CUBLAS.replace("SUMS_OVER", f"backend_config={SUMS_OVER}"))
    inside, alone, other = program.computations["sliced"]["c"], *(program.computations["main"][name] for name in "ds")
    assert program.product_flops("sliced", inside) == program.product_flops("main", alone) == 2 * 8 * 32 * 16
    assert program.product_flops("main", other) == 0
    roofline = Roofline(program, machine("h200-1", {"data": 1}))
    moved = 2 * (8 * 32 + 32 * 16) + 4 * 8 * 16
    assert roofline._traffic("main", alone) == moved
    assert roofline._traffic("main", program.computations["main"]["f"]) == moved + 4  # the number of the slice
