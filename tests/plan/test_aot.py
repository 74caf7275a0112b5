"""What a compiler's reports say about memory, told apart."""

from train.plan.aot import Array, _at_peak
from train.plan.hlo import Program

PROGRAM = """HloModule m, is_scheduled=true

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %x = f32[8,16]{1,0} add(%p#1, %p#1), metadata={op_name="jit(f)/more"}
  ROOT %t = (s32[], f32[8,16]{1,0}) tuple(%n, %x)
}

%cond (p: (s32[], f32[8,16])) -> pred[] {
  %q = (s32[], f32[8,16]{1,0}) parameter(0)
  %most = s32[] constant(6)
  ROOT %less = pred[] compare(%q#0, %most), direction=LT
}

ENTRY %main (w: f32[8,16]) -> f32[8,16] {
  %w = f32[8,16]{1,0} parameter(0)
  %sum.1 = f32[8,16]{1,0} broadcast(), metadata={op_name="jit(f)/zeros"}
  %other = f32[8,16]{1,0} multiply(%w, %w), metadata={op_name="jit(f)/square"}
  %start = (s32[], f32[8,16]{1,0}) tuple(%w, %sum.1)
  %loop = (s32[], f32[8,16]{1,0}) while(%start), condition=%cond, body=%body
  ROOT %r = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""
LIVE = """HloLiveRange (max 9):
  Live ranges at 4 (peak):
    p{1}: 512 bytes (cumulative: 512 bytes)
    sum.1{}: 512 bytes (cumulative: 1024 bytes)
    other{}: 512 bytes (cumulative: 1536 bytes)
    w{}: 512 bytes (cumulative: 2048 bytes)
"""
PLACES = """BufferAssignment:
allocation 0: size 512, parameter 0, shape |f32[8,16]| at ShapeIndex {}:
 value: <1 w @0> (size=512,offset=0): f32[8,16]{1,0}
allocation 1: size 1024, preallocated-temp:
 value: <2 sum.1 @0> (size=512,offset=0): f32[8,16]{1,0}
 value: <3 p{1} (phi) @0> (size=512,offset=0): f32[8,16]{1,0}
 value: <4 other @0> (size=512,offset=512): f32[8,16]{1,0}
"""


def test_the_sum_of_a_loop_is_held_once(tmp_path):
    """By the operation that made it, though it has one name before the loop and another inside. What the step is given is
    counted elsewhere."""
    (tmp_path / "m.train_step.after_optimizations-live-range.txt").write_text(LIVE)
    zeros, square = Array(512, "f32[8,16]", "jit(f)/zeros"), Array(512, "f32[8,16]", "jit(f)/square")
    assert sorted(_at_peak(Program(PROGRAM), tmp_path), key=str) == sorted(
        [Array(512, "f32[8,16]", "p"), zeros, square], key=str
    ), "without the compiler's places every name counts"
    (tmp_path / "m.train_step.after_optimizations-buffer-assignment.txt").write_text(PLACES)
    assert _at_peak(Program(PROGRAM), tmp_path) == [zeros, square]
