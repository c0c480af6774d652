"""Runs the doctor and reads what it found."""

from __future__ import annotations

import contextlib
import io
import json

from albef_ds.__main__ import main
from albef_ds.doctor.finding import Finding


def doctor(*arguments: str) -> tuple[int, list[Finding]]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(["doctor", *arguments, "--json"])
    told = json.loads(out.getvalue().splitlines()[-1])
    assert told["status"] == code
    return code, [Finding(**finding) for finding in told["findings"]]


def of(findings: list[Finding], subject: str) -> list[Finding]:
    return [finding for finding in findings if finding.subject == subject]


def states(findings) -> list[str]:
    return [finding.state for finding in findings]
