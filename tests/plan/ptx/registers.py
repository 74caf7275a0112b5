"""Instructions that turn registers into registers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np

from tests.plan.ptx.machine import known
from tests.plan.ptx.operands import LANES, TYPES, names, source


def wide_product(x, y, shift: int, kind):
    return np.array([int(a) * int(b) >> shift for a, b in zip(x, y)], kind)


def shifted(x, places, left: bool):
    bits = 8 * x.itemsize
    inside = np.minimum(places, bits - 1).astype(x.dtype)
    if left or x.dtype.kind == "u":
        return np.where(places < bits, x << inside if left else x >> inside, x.dtype.type(0))
    return x >> inside


def permuted_bytes(x, y, selector):
    pool = np.stack([x, y], 1).view(np.uint8)
    which = selector[:, None] >> np.uint32([0, 4, 8, 12]) & np.uint32(15)
    known((which < 8).all(), "prmt that copies signs")
    return np.take_along_axis(pool, which.astype(int), 1).reshape(-1).view(np.uint32)


def chosen_bits(x, y, z, table):
    """lop3: bit 4 x + 2 y + z of the table, for each bit."""
    places = [np.where(bit, which, ~which) for which in (x, y, z) for bit in (False, True)]
    cases = (a & b & c for a in places[:2] for b in places[2:4] for c in places[4:])
    return np.bitwise_or.reduce([case for i, case in enumerate(cases) if int(table[0]) >> i & 1])


def of_halves(x, y, operator: Callable):
    """On both bfloat16 numbers of a register."""
    return operator(x.view(ml_dtypes.bfloat16), y.view(ml_dtypes.bfloat16)).view(np.uint32)


def fused(x, y, z):
    return (x.astype(np.float64) * y + z).astype(np.float32)


def compared(x, y, *other, how: str, then: str = ""):
    holds = COMPARE[how](x, y)
    return COMBINE[then](holds, *other) if other else holds


def quotient(x, y):
    """div.full may be wrong by two units in the last place, and is."""
    return np.nextafter(np.nextafter(x / y, np.float32(np.inf)), np.float32(np.inf))


def converted(*values, to, pair: bool, rounded: str):
    """Of a pair the second is the lower half. An integer is the nearest there is, zero for what is no number."""
    values = [WHOLE[rounded](value) if rounded in WHOLE else value for value in values]
    if rounded == "rzi":
        limits = np.iinfo(to)
        values = [np.nan_to_num(value, nan=0.0).astype(np.float64).clip(limits.min, limits.max) for value in values]
    low = values[-1].astype(to)
    return np.stack([low, values[0].astype(to)], 1).reshape(-1).view(np.uint32) if pair else low


def exchanged(x, which, *_, butterfly: bool):
    return x[(LANES ^ which if butterfly else which).astype(int) & 31]


PLAIN = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "abs": np.abs,
    "neg": np.negative,
    "min": np.minimum,
    "max": np.maximum,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "div": np.divide,
    "fma": fused,
    "mul": np.multiply,
    "mad": lambda x, y, z: x * y + z,
    "mov": lambda x: x,
    "cvta": lambda x: x,
    "prmt": permuted_bytes,
    "lop3": chosen_bits,
    "selp": lambda x, y, which: np.where(which, x, y),
    "elect": lambda *_: LANES == 0,
}
WHOLE = {"rmi": np.floor, "rzi": np.trunc}
COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
COMPARE["num"] = lambda x, y: (x == x) & (y == y)
COMBINE = {"and": np.logical_and, "or": np.logical_or}


def function_of(name: str, modifiers: list[str], kind) -> tuple[Callable, type]:
    """What an instruction computes, and the type of its operands from the second on."""
    bits = 8 * np.dtype(kind).itemsize
    if name in ("shl", "shr"):
        return partial(shifted, left=name == "shl"), np.uint32
    if name == "bfe" and kind == np.int32:  # the field's own sign
        return lambda x, first, count: shifted(shifted(x, 32 - first - count, left=True), 32 - count, left=False), np.uint32
    if name == "bfe":
        return lambda x, first, count: shifted(x, first, left=False) & ((kind(1) << count.astype(kind)) - kind(1)), np.uint32
    if name == "div" and "full" in modifiers:
        return quotient, kind
    if name == "mul" and "wide" in modifiers:
        return partial(wide_product, shift=0, kind=np.dtype(f"{np.dtype(kind).kind}{bits // 4}")), kind
    if name == "mul" and "hi" in modifiers:
        return partial(wide_product, shift=bits, kind=kind), kind
    if name == "setp":
        return partial(compared, how=modifiers[0], then=modifiers[-1]), kind
    if name == "cvt":
        *how, to = modifiers
        known(how in ([], ["rn"], ["rmi"], ["rzi"]), f"a conversion by {modifiers}")
        return partial(converted, to=TYPES[to.removesuffix("x2")], pair=to.endswith("x2"), rounded="".join(how)), kind
    if name == "shfl":
        return partial(exchanged, butterfly="bfly" in modifiers), np.uint32
    known(name in PLAIN and (name not in ("min", "max") or kind != np.float32 or "NaN" in modifiers), f"operation {name}")
    return PLAIN[name], kind


def arithmetic(operation: str, operands: list[str], symbols) -> Callable:
    """An instruction that turns registers into one register."""
    name, *modifiers, last = operation.split(".")
    target, *given = operands
    known(last in TYPES or name in ("elect", "cvt", "mov") or last == "bf16x2", operation)
    kind = TYPES.get(last, np.uint32)
    if name == "mov" and target.startswith("{"):
        return cut(names(target), source(given[0], kind, symbols))
    if name == "mov" and given[0].startswith("{"):
        given = names(given[0])
        kinds = [np.dtype(f"u{kind().itemsize // len(given)}")] * len(given)
        function = lambda *parts: np.stack(parts, 1).reshape(-1).view(kind)  # noqa: E731
    else:
        function, other = function_of(name, modifiers, kind)
        if last == "bf16x2" and name != "cvt":
            known(name in ("add", "sub", "mul"), operation)
            function = partial(of_halves, operator=function)
        kinds = [kind, other, np.bool_ if name in ("setp", "selp") else other, other][: len(given)]
    known("|" not in target or name == "elect", f"two results of {operation}")
    target = target.split("|")[-1]  # of elect only the predicate is used
    sources = [source(operand, kind, symbols) for operand, kind in zip(given, kinds, strict=True)]
    return lambda warp: warp.set(target, function(*(read(warp) for read in sources)))


def cut(targets: list[str], read: Callable) -> Callable:
    """A register's parts, the lowest first; `_` for one that nobody wants."""

    def step(warp):
        whole = read(warp)
        for target, part in zip(targets, whole.view(f"u{whole.itemsize // len(targets)}").reshape(32, -1).T):
            if target != "_":
                warp.set(target, part)

    return step
