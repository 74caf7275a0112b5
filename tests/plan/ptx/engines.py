"""Memory, barriers, copies and products of matrices: each builder gives the function of a warp."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np

from tests.plan.ptx.machine import ARRAYS, DESCRIPTORS, SPOILED, Barrier, check, known, swizzled
from tests.plan.ptx.operands import LANES, TYPES, address, names, source


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
