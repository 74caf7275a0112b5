"""The shipped plans, compiled for their machines: what fits, how fast, what limits.

    python -m bench.plans [NAME ...]

Each plan is compiled in a process of its own and written to bench/results/plans/NAME.json, whether it fits or not; the table
that docs/plan.md shows is printed from those files, without the plans that could not be compiled just now: they are named.
Needs the extras plan-tpu and plan-gpu, and no chip.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from configs.plans import MACHINES

RESULTS = Path(__file__).parent / "results" / "plans"


def table(names: Collection[str]) -> str:
    """The results as markdown, in the order of MACHINES."""
    head = ["plan", "machine", "mesh", "peak GiB", "spare", "step s", "tokens/s/chip", "of peak", "bound", "compiled in s"]
    lines = [head, ["---"] * len(head)]
    for name in MACHINES:
        file = RESULTS / f"{name}.json"
        if name in names and file.exists():
            r = json.loads(file.read_text())
            mesh = " x ".join(f"{axis} {size}" for axis, size in r["mesh"].items() if size > 1)
            lines.append(
                [
                    name,
                    r["topology"],
                    mesh,
                    f"{r['bytes_per_device']['peak'] / 2**30:.1f}",
                    f"{100 * r['spare']:.0f} %",
                    f"{r['seconds']['seconds']:.1f}",
                    f"{r['tokens_per_second_per_chip']:.0f}",
                    f"{100 * r['mfu']:.1f} %",
                    r["bound"],
                    f"{r['seconds_to_lower'] + r['seconds_to_compile']:.0f}",
                ]
            )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def compile_plan(name: str) -> bool:
    """Write a plan's result; False where there is none, and the old one, if any, stays."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "plan.json")
        ran = subprocess.run(
            [sys.executable, "launch.py", "plan", "--preset", name, "--json", str(file)],
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.DEVNULL,
        )
        if ran.returncode not in (0, 1) or not file.exists():  # 1: it does not fit, or a traceback, which writes no file
            return False
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.json").write_text(file.read_text())
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    names, failed = parser.parse_args().names or list(MACHINES), []
    if unknown := set(names) - set(MACHINES):
        parser.error(f"there is no plan {', '.join(sorted(unknown))}; there are {', '.join(MACHINES)}")
    for name in names:
        print(f"compiling {name} for {MACHINES[name]}", flush=True)
        if not compile_plan(name):
            failed.append(name)
    print(table(set(MACHINES) - set(failed)))
    if failed:
        sys.exit(f"not compiled, for the reasons above, and left out of the table: {', '.join(failed)}")


if __name__ == "__main__":
    main()
