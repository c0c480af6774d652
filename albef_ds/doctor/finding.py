"""What a check has found, and how it is told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """ok: as it should be; warning: runs, but slower or less safely than it could; problem: will not run.

    `advice` says what to do; empty where all is well.
    """

    state: Literal["ok", "warning", "problem"]
    subject: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        line = f"{self.state:<8} {self.subject:<14} {self.text}"
        return f"{line}\n{'':<23} -> {self.advice}" if self.advice else line


def ok(subject: str, text: str) -> Finding:
    return Finding("ok", subject, text)


def warning(subject: str, text: str, advice: str) -> Finding:
    return Finding("warning", subject, text, advice)


def problem(subject: str, text: str, advice: str) -> Finding:
    return Finding("problem", subject, text, advice)


def judged(*cases: tuple[bool, Finding]) -> Finding:
    """The first finding whose condition holds."""
    return next(finding for holds, finding in cases if holds)


def status(findings: Iterable[Finding]) -> int:
    """The exit status: 1 where there is a problem, else 0."""
    return int(any(finding.state == "problem" for finding in findings))
