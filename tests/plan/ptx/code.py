"""The text of a kernel to functions of a warp, one for each instruction."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np

from tests.plan.ptx.machine import ARRAYS, DESCRIPTORS, SHARED_AT, SPOILED, Barrier, check, known, swizzled

LANES = np.arange(32, dtype=np.uint32)
TYPES = {
    "f32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "pred": np.bool_,
    **{f"{sign}{8 * size}": np.dtype(f"{kind}{size}").type for sign, kind in ("bu", "uu", "si") for size in (2, 4, 8)},
}


def parse(text: str, plain: list[int]) -> list[tuple[str, Callable]]:
    """The instructions of a kernel whose parameters are pointers to the `plain` arguments and, of Mosaic's, the descriptors."""
    text = re.sub(r"//[^\n]*", "", text)
    head, body = text.split("{", 1)
    parameters = re.findall(r"\w+_param_\d+", head)
    known(len(parameters) - len(plain) in (0, 1), f"parameters {parameters} for arguments {plain}")
    symbols = dict(zip(parameters, [(n + 1) * ARRAYS for n in plain] + [DESCRIPTORS]))
    symbols |= dict.fromkeys(("__dynamic_shmem__0", "global_smem"), SHARED_AT)
    body = re.sub(r"^\s*\.(loc|file|section|reg|shared|pragma).*$", "", body.split("$L__func_end0")[0], flags=re.M)
    # A product, and the loop around try_wait, come as a block of their own: what is left is the instruction in it.
    body = re.sub(r"\{\s*\.reg \.pred p; setp\.ne\.b32 p, 1, 0;(.*?;)\s*\}", r"\1", body)
    body = re.sub(r"\{\s*LAB_WAIT:\s*(mbarrier.try_wait[^;]*;).*?DONE:\s*\}", r"\1", body, flags=re.S)
    body = re.sub(r"^\s*[{}]\s*$", "", body, flags=re.M)
    statements, labels = [], {}
    for label, statement in re.findall(r"(\$\w+):|([^;:]+(?:::[^;:]+)*);", body):
        if label:
            labels[label] = len(statements)
        elif statement.strip():
            statements.append(" ".join(statement.split()))
    return [decode(statement, number + 1, labels, symbols) for number, statement in enumerate(statements)]


def decode(statement: str, after: int, labels: dict[str, int], symbols: dict[str, int]) -> tuple[str, Callable]:
    """(operation, function of a warp). The function may return a condition to wait for, a branch where to go on."""
    guard, operation, rest = re.fullmatch(r"(?:@(!?%p\d+) )?([\w.:]+) ?(.*)", statement).groups()
    holds = guard and (lambda warp: ~warp.registers[guard[1:]] if guard[0] == "!" else warp.registers[guard])
    if operation in ("bra", "bra.uni"):

        def jump(warp):
            taken = holds(warp) if guard else np.ones(32, bool)
            known(taken.all() or not taken.any(), f"lanes disagree at {statement}")
            return labels[rest] if taken.all() else after

        return "bra", jump
    operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,{\[\s]+", rest)
    if operation == "ret" or operation.startswith(NOTHING):
        return operation, lambda warp: None
    if operation.startswith("ld.param"):
        operation, operands = "mov.b64", [operands[0], operands[1].strip("[]")]
    for beginning, build in ENGINES.items():
        if operation.startswith(beginning):
            return operation, build(operation, operands, holds or (lambda warp: np.ones(32, bool)), symbols)
    known(not guard, f"a guard on {statement}")
    return operation, arithmetic(operation, operands, symbols)


NOTHING = "prefetch", "setmaxnreg", "fence.mbarrier_init", "griddepcontrol", "bar.warp.sync"
"""Without effect here: a warp's lanes go together."""


def names(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{} ").split(",")]


def source(operand: str, kind, symbols: dict[str, int]) -> Callable:
    """What reads an operand as [32] of a type."""
    bits = np.dtype(f"u{np.dtype(kind).itemsize}")
    if operand == "%tid.x":
        return lambda warp: LANES + np.uint32(32 * warp.number)
    if operand.startswith("%ctaid"):
        return lambda warp: np.full(32, warp.block.place["xyz".index(operand[-1])], np.uint32)
    if operand.startswith("%"):
        return lambda warp: warp.registers[operand].view(kind)
    if kind == np.bool_:
        constant = np.full(32, int(operand) != 0)
    else:
        number = (
            symbols[operand]
            if operand in symbols
            else int(operand[2:].rstrip("U"), 16)
            if operand[:2] in ("0f", "0x")
            else int(operand)
        )
        constant = np.full(32, number % (1 << 8 * bits.itemsize), bits).view(kind)
    return lambda warp: constant


def address(operand: str, symbols: dict[str, int]) -> Callable:
    """[32] byte addresses: [register], [register+offset]."""
    name, offset = re.fullmatch(r"\[?([^]+]+)(?:\+(-?\d+))?\]?", operand.replace(" ", "")).groups()
    if name in symbols:
        return lambda warp: np.full(32, symbols[name] + int(offset or 0), np.int64)
    return lambda warp: warp.registers[name].astype(np.int64) + int(offset or 0)


# Instructions on registers


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


# Memory, barriers and the engines: each builder gives the function of a warp


def load(operation, operands, holds, symbols):
    targets, at, kind = names(operands[0]), address(operands[1], symbols), TYPES[operation.split(".")[-1]]
    size = kind().itemsize

    def step(warp):
        lanes, where = holds(warp), at(warp)
        memory = warp.block.seen if "shared" in operation else warp.block.array(int(where[0]))
        for i, target in enumerate(targets):
            value = np.zeros(32, kind) if lanes.all() else warp.registers[target].view(kind).copy()
            value[lanes] = memory.view(kind)[where[lanes] % ARRAYS // size + i]
            warp.set(target, value)

    return step


def store(operation, operands, holds, symbols):
    at, values = address(operands[0], symbols), names(operands[1])
    size = TYPES[operation.split(".")[-1]]().itemsize

    def step(warp):
        lanes, write = holds(warp), warp.write if "shared" in operation else warp.block.store
        for i, value in enumerate(values):
            write(at(warp)[lanes] + size * i, warp.registers[value][lanes].astype(f"u{size}"))  # of a wider one the last bits

    return step


def store_matrices(operation, operands, holds, symbols):
    """8 x 8 of 16 bits each: lane 8 i + r has the address of row r of matrix i, and each lane two elements of every one."""
    at, values = address(operands[0], symbols), names(operands[1])
    known(".trans" not in operation, operation)

    def step(warp):
        for i, value in enumerate(values):
            rows = at(warp)[8 * i : 8 * i + 8]
            check(not (rows % 16).any(), "stmatrix to a misaligned row")
            warp.write((rows[:, None] + 4 * np.arange(4)).reshape(-1), warp.registers[value])

    return step


def load_matrices(operation, operands, holds, symbols):
    """The reverse of `store_matrices`; transposed, a lane's two elements are of a column."""
    targets, at = names(operands[0]), address(operands[1], symbols)

    def step(warp):
        for i, target in enumerate(targets):
            rows = at(warp)[8 * i : 8 * i + 8]
            check(not (rows % 16).any(), "ldmatrix from a misaligned row")
            found = warp.block.seen.view(np.uint16)[rows[:, None] // 2 + np.arange(8)]
            warp.set(target, np.ascontiguousarray(found.T if ".trans" in operation else found).view(np.uint32).reshape(-1))

    return step


def copy_of_thread(operation, operands, holds, symbols):
    """cp.async: sixteen bytes for each lane, or zeros where the last operand says none, or, a predicate, not to read."""
    to, source_at = (address(operand, symbols) for operand in operands[:2])
    unread = operands[3].startswith("%p")
    last = source(operands[3], np.bool_ if unread else np.uint32, symbols)
    known(operands[2] == "0x10", operation)

    def step(warp):
        lanes, (where, there) = holds(warp), (to(warp), source_at(warp))
        counts = np.where(last(warp), 0, 16) if unread else last(warp)
        known(np.isin(counts, (0, 16)).all(), "cp.async of a part")
        check(not ((where | np.where(counts > 0, there, 0))[lanes] % 16).any(), "cp.async of misaligned bytes")
        places = where[:, None] + np.arange(16)
        warp.block.seen[places[lanes]] = SPOILED

        def arrive():
            for lane in np.flatnonzero(lanes):
                first = int(there[lane])
                mine = warp.block.array(first)[first % ARRAYS :][:16] if counts[lane] else np.zeros(16, np.uint8)
                warp.block.seen[places[lane]] = mine

        warp.loads.open.append(arrive)

    return step


def load_groups(operation, operands, holds, symbols):
    return lambda warp: warp.loads.commit() if "commit" in operation else warp.loads.wait(int(operands[0]))


def small_product(operation, operands, holds, symbols):
    """mma.sync of a warp: 16 x 16 by 16 x 8, added."""
    known(operation == "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", operation)
    out, left, right, total = map(names, operands)
    row, column = (LANES // 4).astype(int), (2 * (LANES % 4)).astype(int)

    def pairs(warp, registers):
        return [warp.registers[name].view(ml_dtypes.bfloat16).reshape(32, 2) for name in registers]

    def step(warp):
        x, y, z = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32), np.zeros((16, 8), np.float32)
        for pair, (down, across) in zip(pairs(warp, left), ((0, 0), (8, 0), (0, 8), (8, 8))):
            x[row + down, column + across], x[row + down, column + across + 1] = pair.T
        for pair, down in zip(pairs(warp, right), (0, 8)):
            y[column + down, row], y[column + down + 1, row] = pair.T
        at = [(row + 8 * (i // 2), column + i % 2) for i in range(4)]
        for name, place in zip(total, at):
            z[place] = source(name, np.float32, symbols)(warp)
        z += x @ y
        for name, place in zip(out, at):
            warp.set(name, z[place])

    return step


def fence(operation, operands, holds, symbols):
    def step(warp):
        for where in warp.unfenced:
            warp.block.engines.view(np.uint32)[where] = warp.block.seen.view(np.uint32)[where]
        warp.unfenced.clear()

    return step


def barrier(operation, operands, holds, symbols):
    """mbarrier.init, .arrive (with bytes that are to come or without), .try_wait together with the loop around it."""
    at = address(next(operand for operand in operands if "[" in operand), symbols)
    number = source(operands[2 if "try_wait" in operation else -1], np.uint32, symbols)

    def step(warp):
        lanes, where, value = holds(warp), int(at(warp)[0]), number(warp)
        if "init" in operation and lanes.any():
            warp.block.barriers[where] = Barrier(int(value[0]))
        elif "arrive" in operation:
            warp.block.barriers[where].arrive(int(lanes.sum()), int(value[lanes].sum()) if "expect_tx" in operation else 0)
        elif "try_wait" in operation:
            mine = warp.block.barriers[where]
            return lambda: mine.phase % 2 != value[0]

    return step


def meet(operation, operands, holds, symbols):
    """bar.sync: of the whole block or of so many threads."""
    which, threads = source(operands[0], np.uint32, symbols), int(operands[1]) if len(operands) > 1 else 0

    def step(warp):
        meeting = warp.block.meetings.setdefault(int(which(warp)[0]), Barrier(threads // 32 or warp.block.warps))
        mine = meeting.phase
        meeting.arrive(1)
        return lambda: meeting.phase > mine

    return step


def copy_groups(operation, operands, holds, symbols):
    return lambda warp: warp.copies.commit() if "commit" in operation else warp.copies.wait(int(operands[0]))


def one_lane(holds: Callable) -> Callable:
    """(warp) -> the lane that issues a copy, or None."""

    def lane(warp):
        check(holds(warp).sum() <= 1, "several lanes issue a copy")
        return int(np.argmax(holds(warp))) if holds(warp).any() else None

    return lane


def copy_box(operation, operands, holds, symbols):
    """cp.async.bulk.tensor, in either direction."""
    loads, lane = "mbarrier" in operation, one_lane(holds)
    shared, box = operands[:2] if loads else operands[1::-1]
    which, coordinates = box.strip("[]").split(",", 1)
    shared, full = address(shared, symbols), loads and address(operands[2], symbols)
    which, coordinates = source(which, np.uint64, symbols), [source(c, np.int32, symbols) for c in names(coordinates)]

    def step(warp):
        mine = lane(warp)
        if mine is None:
            return
        what = (
            warp.block.descriptors[(int(which(warp)[mine]) - DESCRIPTORS) // 128],
            [int(c(warp)[mine]) for c in reversed(coordinates)],
            int(shared(warp)[mine]),
        )
        if loads:
            warp.block.load_box(*what, int(full(warp)[mine]))
        else:
            warp.copies.open.append(partial(warp.block.store_box, *what))

    return step


def copy_bytes(operation, operands, holds, symbols):
    """cp.async.bulk out of shared memory."""
    known(".global.shared::cta" in operation, operation)
    lane, ends, size = one_lane(holds), [address(end, symbols) for end in operands[:2]], source(operands[2], np.uint32, symbols)

    def step(warp):
        mine = lane(warp)
        if mine is not None:
            warp.copies.open.append(partial(warp.block.store_bytes, *(int(x(warp)[mine]) for x in (*ends, size))))

    return step


def product_groups(operation, operands, holds, symbols):
    if "fence" in operation:
        return lambda warp: warp.unready.clear()
    return lambda warp: warp.products.commit() if "commit" in operation else warp.products.wait(int(operands[0]))


def product(operation, operands, holds, symbols):
    """wgmma: a warp has 16 of the 64 rows. A from shared memory or from registers, B from shared memory."""
    columns, dtype = int(re.search(r"m64n(\d+)k16", operation).group(1)), TYPES[operation.split(".")[-1]]
    totals, left, right = names(operands[0]), operands[1], source(operands[2], np.uint64, symbols)
    in_registers, flags = left.startswith("{"), operands[3:]
    known(flags[:3] == ["p", "1", "1"] and len(totals) == columns // 2, f"unknown form of {operation}")
    parts = names(left) if in_registers else []
    left = None if in_registers else source(left, np.uint64, symbols)
    transposed = [flag == "1" for flag in flags[3:]]
    row, column = (LANES // 4).astype(int), (2 * (LANES % 4)).astype(int)

    def step(warp):
        check(not warp.unready & {*totals, *parts}, "registers go to a product without wgmma.fence")
        values = [warp.registers[part] for part in parts]
        places = None if in_registers else matrix(int(left(warp)[0]), 16 * (warp.number % 4) + np.arange(16), transposed[0])
        right_places = matrix(int(right(warp)[0]), np.arange(columns), transposed[-1])

        def add():
            memory = warp.block.engines.view(dtype)
            if in_registers:
                x = np.zeros((16, 16), dtype)
                for value, (down, across) in zip(values, ((0, 0), (8, 0), (0, 8), (8, 8))):
                    x[row + down, column + across], x[row + down, column + across + 1] = value.view(dtype).reshape(32, 2).T
            else:
                x = memory[places]
            total = x.astype(np.float32) @ memory[right_places].astype(np.float32).T
            for i, name in enumerate(totals):
                added = total[row + 8 * (i // 2 % 2), 8 * (i // 4) + column + i % 2]
                warp.registers[name] = (warp.registers[name].view(np.float32) + added).view(np.uint32)

        warp.products.open.append(add) if warp.block.late else add()

    return step


def matrix(descriptor: int, lines: np.ndarray, transposed: bool) -> np.ndarray:
    """Where the elements [lines, 16] of an operand lie, in elements: rows of 128 bytes, swizzled. The 16 of the contraction
    run along a row, or transposed down the rows."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    known(descriptor >> 49 & 7 == 0 and descriptor >> 62 == 1, "a matrix that is not swizzled by 128 bytes")
    line, along = lines[:, None], np.arange(16)
    if transposed:
        places = line // 64 * leading + line % 64 * 2 + along // 8 * stride + along % 8 * 128
    else:
        places = line // 8 * stride + line % 8 * 128 + along * 2
    return swizzled(places + start) // 2


ENGINES = {
    "ld.": load,
    "st.": store,
    "stmatrix": store_matrices,
    "ldmatrix": load_matrices,
    "fence.proxy.async": fence,
    "mbarrier": barrier,
    "bar.sync": meet,
    "cp.async.cg": copy_of_thread,
    "cp.async.commit_group": load_groups,
    "cp.async.wait_group": load_groups,
    "mma.sync": small_product,
    "cp.async.bulk.tensor": copy_box,
    "cp.async.bulk.global": copy_bytes,
    "cp.async.bulk": copy_groups,
    "wgmma.mma_async": product,
    "wgmma": product_groups,
}
