"""What a check found: one sentence, its severity, and the check it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

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

    def of(self, severity: Severity) -> list[Finding]:
        return [f for f in self.findings if f.severity == severity]

    def __str__(self) -> str:
        return "\n".join(f"{f.severity}: [{f.check}] {f.message}" for f in self.findings) or "no findings"
