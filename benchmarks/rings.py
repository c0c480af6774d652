"""What crosses a rank's link when it asks for a collective, by what it hands in and gets back.

Rings of w ranks are assumed, in which every rank receives as much as it sends. N is the whole: what an all-reduce sums,
a reduce-scatter takes from each rank, an all-gather brings together. NCCL may do otherwise, by trees among many nodes
or in the switch itself; what is handed in and got back stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """How many times (w - 1) / w of the whole a rank sends."""

    name: str
    passes: int
    because: str

    @property
    def formula(self) -> str:
        return {0: "0", 1: "(w - 1) / w N"}.get(self.passes, f"{self.passes} (w - 1) / w N")


_REDUCE_SCATTER = Rule("reduce-scatter", 1, "N is handed in: the sums of the other ranks' parts pass through this one")
_ALL_GATHER = Rule("all-gather", 1, "N comes back: w - 1 of its w parts pass through every rank")
_PASSED_ON = "N goes from rank to rank, and the last of them sends nothing: the mean over all ranks"
RULES = {
    "allreduce_": Rule("all-reduce", 2, "a reduce-scatter of N and an all-gather of the sums"),
    "_reduce_scatter_base_": _REDUCE_SCATTER,
    "reduce_scatter_": _REDUCE_SCATTER,
    "_allgather_base_": _ALL_GATHER,
    "allgather_": _ALL_GATHER,
    "reduce_": Rule("reduce to one rank", 1, _PASSED_ON),
    "broadcast_": Rule("broadcast", 1, _PASSED_ON),
    "barrier": Rule("barrier", 0, "it waits, and moves nothing"),
}


@dataclass(frozen=True)
class Asked:
    """One collective that a rank asks for: the fields of fake_ranks.Collective."""

    kind: str  # the operator of c10d
    sent: int  # bytes handed in
    received: int  # bytes got back, of a reduce to one rank by that one
    dtype: str
    root: int | None
    device: str
    stream: str

    @property
    def rule(self) -> Rule:
        """Raises ValueError for a kind that has none."""
        if self.kind not in RULES:
            raise ValueError(f"benchmarks/rings.py has no rule for the collective {self.kind}: add one to RULES")
        return RULES[self.kind]

    @property
    def gathers(self) -> bool:
        return self.rule is _ALL_GATHER

    def got_by(self, rank: int) -> int:
        """Bytes."""
        nothing = {"reduce_": rank != self.root, "broadcast_": rank == self.root}
        return 0 if nothing.get(self.kind) else self.received

    def over_link(self, world: int) -> float:
        """Bytes from each of `world` ranks."""
        return self.rule.passes * (world - 1) / world * max(self.sent, self.received)

    def __str__(self) -> str:
        root = "" if self.root is None else f", root {self.root}"
        kind = f"{self.dtype.removeprefix('torch.')}{root}, on the {self.device}'s stream {self.stream}"
        return f"{self.rule.name} of {self.sent} bytes ({kind})"
