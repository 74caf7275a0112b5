"""The text of an optimised HLO module as data: computations, instructions, how often loops run, what a product costs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9](?:fn)?)?)\[([0-9,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_OPERAND = re.compile(r"%([\w.-]+(?:#[0-9.]+)?)")


@dataclass(frozen=True)
class Shape:
    """One array of a result. `space` is the memory space of its layout, 0 the device's main memory."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        return math.ceil(BYTES[self.dtype] * math.prod(self.dims))


def shapes_of(text: str) -> list[Shape]:
    """The arrays of a result type, tuples flattened."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        if dtype in BYTES:
            space = re.search(r"S\((\d+)\)", layout)
            found.append(Shape(dtype, tuple(int(n) for n in dims.split(",") if n), int(space.group(1)) if space else 0))
    return found


@dataclass(frozen=True)
class Instruction:
    """name = type kind(operands), attributes: `rest` is everything after the operands' opening bracket."""

    name: str
    kind: str
    type: str
    rest: str
    root: bool

    @cached_property
    def shapes(self) -> list[Shape]:
        return shapes_of(self.type)

    @property
    def bytes(self) -> int:
        """Size of the result."""
        return sum(shape.bytes for shape in self.shapes)

    @cached_property
    def operands(self) -> list[str]:
        """Names of the operands; `name#i` is an element of a tuple."""
        depth = 1
        for at, letter in enumerate(self.rest):
            depth += {"(": 1, ")": -1}.get(letter, 0)
            if depth == 0:
                return _OPERAND.findall(self.rest[:at])
        return _OPERAND.findall(self.rest)

    @cached_property
    def op_name(self) -> str:
        """The Python operation it comes from, empty where the compiler made it."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else ""

    @property
    def calls_cublas(self) -> bool:
        """For a product, which is the first of its results; a second one is room to work in."""
        return self.kind == "custom-call" and '="__cublas$' in self.rest and '"lhs_contracting_dimensions"' in self.rest

    @property
    def cublas_sums_over(self) -> list[int]:
        """Axes of the left operand of a call of cuBLAS."""
        return [int(n) for n in re.findall(r"\d+", re.search(r'"lhs_contracting_dimensions":\[([^]]*)\]', self.rest).group(1))]

    def numbers(self, key: str) -> list[int]:
        found = re.search(key + r"=\{([0-9,]*)\}", self.rest)
        return [int(n) for n in found.group(1).split(",") if n] if found else []


class Program:
    """An HLO module. `entry` names the computation that runs; the others are called from it."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current = None
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header and not line.startswith(" "):
                current = self.computations.setdefault(header.group(2), {})
                self.entry = header.group(2) if header.group(1) else self.entry
            elif current is not None and (found := _INSTRUCTION.match(line)):
                root, name, body = found.groups()
                opened = re.search(r"(?:^|[\s)])([a-z][\w-]*)\(", body)
                kind, at = (opened.group(1), opened.start(1)) if opened else ("", len(body))
                current[name] = Instruction(name, kind, body[:at], body[at + len(kind) + 1 :], bool(root))

    def called(self, instruction: Instruction) -> list[str]:
        """Computations an instruction runs, in order; a loop's body without its condition."""
        if instruction.kind == "while":
            return re.findall(r"body=%?([\w.-]+)", instruction.rest)
        if branches := re.search(r"branch_computations=\{([^}]*)\}", instruction.rest):
            return [name.strip().lstrip("%") for name in branches.group(1).split(",")]
        return re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)", instruction.rest)

    def trips(self, loop: Instruction) -> int | None:
        """How often a loop's body runs: what the compiler notes, else the constant its counter is compared with."""
        if noted := re.search(r"known_trip_count[^0-9]*(\d+)", loop.rest):
            return int(noted.group(1))
        condition = self.computations.get(re.search(r"condition=%?([\w.-]+)", loop.rest).group(1), {})
        bounds = [
            found.group(1)
            for i in condition.values()
            if i.kind == "constant" and i.type.startswith("s32[]") and (found := re.match(r"(\d+)\)", i.rest))
        ]
        compares = [i for i in condition.values() if i.kind == "compare" and "direction=LT" in i.rest]
        return int(bounds[0]) if len(bounds) == len(compares) == 1 and len(condition) <= 4 else None

    def operand_shapes(self, computation: str, instruction: Instruction) -> list[list[Shape]]:
        """Shapes of each operand; those of one element where the operand is `name#i`."""
        scope, out = self.computations[computation], []
        for operand in instruction.operands:
            name, _, element = operand.partition("#")
            shapes = scope[name].shapes if name in scope else []
            out.append(shapes[int(element) : int(element) + 1] if element.isdigit() else shapes)
        return out

    def product_flops(self, computation: str, instruction: Instruction) -> int:
        """Multiplications and additions of a dot, of a convolution (which is what a TPU makes of a dot) or of a call of
        cuBLAS (what a GPU makes of one), else 0."""
        if instruction.kind == "dot" or instruction.calls_cublas:
            left = self.operand_shapes(computation, instruction)[0][0].dims
            over = instruction.cublas_sums_over if instruction.calls_cublas else instruction.numbers("lhs_contracting_dims")
            return 2 * math.prod(left[i] for i in over) * math.prod(instruction.shapes[0].dims)
        if instruction.kind == "convolution":
            left, kernel = (shapes[0].dims for shapes in self.operand_shapes(computation, instruction)[:2])
            return _convolution_flops(instruction, left, kernel)
        return 0


def _convolution_flops(instruction: Instruction, left: tuple[int, ...], kernel: tuple[int, ...]) -> int:
    """2 * output features and batch * input features * (output, kernel) positions that meet a real input element.

    Batch axes of a product become spatial axes with dilation and strides under which each output meets one input.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    left_labels, kernel_labels, out_labels = labels.groups()
    out = instruction.shapes[0].dims
    total = 2 * kernel[kernel_labels.index("i")] * out[out_labels.index("f")] * out[out_labels.index("b")]
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    fields = dict(field.split("=") for field in window.group(1).split()) if window else {}
    for axis, label in enumerate(sorted(set(out_labels) - {"b", "f"})):
        here = {name: values.split("x")[axis] for name, values in fields.items()}
        total *= _meetings(
            left[left_labels.index(label)],
            kernel[kernel_labels.index(label)],
            out[out_labels.index(label)],
            int(here.get("stride", 1)),
            int(here.get("pad", "0_0").split("_")[0]),
            int(here.get("lhs_dilate", 1)),
            int(here.get("rhs_dilate", 1)),
        )
    return total


def _meetings(size: int, kernel: int, out: int, stride: int, low: int, dilate: int, kernel_dilate: int) -> int:
    """(output, kernel) pairs whose input position exists."""
    if out * kernel > 1 << 24:  # one input per output: the only form in which large axes occur
        return max(out, kernel)
    reach = (size - 1) * dilate
    return sum(
        1
        for o in range(out)
        for k in range(kernel)
        if 0 <= (at := o * stride + k * kernel_dilate - low) <= reach and at % dilate == 0
    )
