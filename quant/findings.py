"""What a check found: one sentence, its severity, and the check it came from."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

SHOWN = 20
"""Findings of one kind that are printed; a report holds all."""

Severity = Literal["error", "warning", "note", "not checkable"]


@dataclass(frozen=True)
class Finding:
    """error: some reader gets wrong weights or none. warning: some engine refuses or differs. note: worth knowing."""

    severity: Severity
    check: str
    message: str


@dataclass
class Report:
    """All findings about a directory."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(f.severity == "error" for f in self.findings)

    def add(self, severity: Severity, check: str, message: str) -> None:
        self.findings.append(Finding(severity, check, message))

    def error(self, check: str, message: str) -> None:
        self.add("error", check, message)

    def warn(self, check: str, message: str) -> None:
        self.add("warning", check, message)

    def note(self, check: str, message: str) -> None:
        self.add("note", check, message)

    def of(self, severity: Severity) -> list[Finding]:
        return [f for f in self.findings if f.severity == severity]

    def __str__(self) -> str:
        """One line per finding; of many alike the first SHOWN."""
        lines, seen = [], Counter()
        for f in self.findings:
            seen[f.severity, f.check] += 1
            if seen[f.severity, f.check] <= SHOWN:
                lines.append(f"{f.severity}: [{f.check}] {f.message}")
        lines += [f"{severity}: [{check}] and {n - SHOWN} more" for (severity, check), n in seen.items() if n > SHOWN]
        return "\n".join(lines) or "no findings"
