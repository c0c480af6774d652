"""What `python -m tests.fuzz` starts: libFuzzer's loop over one target, the readers instrumented.

python -m tests.fuzz.driver TARGET SCRATCH [libFuzzer's options and folders]
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import atheris
from torch._weights_only_unpickler import Unpickler

INSTRUMENTED = ["albef_ds", "yaml"]  # whole packages only; all of PyTorch would be slow
MOST_VIRTUAL = 24 << 30  # bytes; an absurd allocation fails instead of taking the machine down

with atheris.instrument_imports(include=INSTRUMENTED):
    from tests.fuzz.seeds import seeds
    from tests.fuzz.targets import run


def main() -> None:
    target, scratch = sys.argv[1], Path(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (MOST_VIRTUAL, MOST_VIRTUAL))
    for method in ("load", "pop_mark"):
        setattr(Unpickler, method, atheris.instrument_func(getattr(Unpickler, method)))
    run(target, seeds(target)[0], scratch)  # what is imported late is imported now

    def one_input(data: bytes) -> None:
        run(target, data, scratch)

    atheris.Setup([sys.argv[0], *sys.argv[3:]], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
