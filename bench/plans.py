"""The shipped plans, compiled for their machines: what fits, how fast, what limits.

    python -m bench.plans [NAME ...]

Each plan is compiled in a process of its own and written to bench/results/plans/NAME.json; the table that docs/plan.md
shows is printed from those files. Needs the extras plan-tpu and plan-gpu, and no chip.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from configs.plans import MACHINES

RESULTS = Path(__file__).parent / "results" / "plans"


def table() -> str:
    """The results as markdown."""
    head = ["plan", "machine", "mesh", "peak GiB", "spare", "step s", "tokens/s/chip", "of peak", "bound", "compiled in s"]
    lines = [head, ["---"] * len(head)]
    for name in MACHINES:
        file = RESULTS / f"{name}.json"
        if file.exists():
            r = json.loads(file.read_text())
            mesh = " x ".join(f"{axis} {size}" for axis, size in r["mesh"].items() if size > 1)
            lines.append([name, r["topology"], mesh, f"{r['bytes_per_device']['peak'] / 2**30:.1f}",
                          f"{100 * r['spare']:.0f} %", f"{r['seconds']['seconds']:.1f}", f"{r['tokens_per_second_per_chip']:.0f}",
                          f"{100 * r['mfu']:.1f} %", r["bound"], f"{r['seconds_to_lower'] + r['seconds_to_compile']:.0f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(MACHINES))
    for name in parser.parse_args().names or MACHINES:
        print(f"compiling {name} for {MACHINES[name]}", flush=True)
        subprocess.run([sys.executable, "launch.py", "plan", "--preset", name, "--json", str(RESULTS / f"{name}.json")],
                       cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL)
    print(table())


if __name__ == "__main__":
    main()
