"""What a step costs, and whether that has changed: commands for `python -m benchmarks.NAME`.

Here is what they share that needs no torch: some must choose their device before it is imported.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the checkout's top folder
PRESETS = ("base", "small", "tiny")  # models; the first is the published one (workload.preset)
PHASES = ("teacher", "forward", "backward", "optimiser", "queue")  # of a step, in order
CAPTIONS = ("histogram", "mean14", "full")  # lengths of a batch's texts (workload.lengths_of)
