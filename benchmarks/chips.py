"""What the cards can do, by which benchmarks.roofline calculates the least time that counted work takes."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Rates of one card.

    Args:
        flops: FLOP/s in dense products of bf16.
        bandwidth: bytes/s between the card and its memory.
        source: where both are from.
    """

    flops: float
    bandwidth: float
    source: str

    def milliseconds(self, flops: float, moved: float) -> float:
        """The larger of the two limits.

        Args:
            flops: in bf16; slower products count as so many more.
            moved: bytes read and written.
        """
        return 1e3 * max(flops / self.flops, moved / self.bandwidth)


# A100: both from the data sheet (80 GB SXM: 312 TFLOP/s, 2,039 GB/s). From Hopper on no product comes near the data
# sheet's FLOP/s (989; 2,250): the best that were measured are 794.5 and 1,745.0 (S. Bekman, Machine Learning
# Engineering, "Maximum Achievable Matmul FLOPS"). Bytes/s: the data sheet's for H100 SXM (3.35 TB/s), nine tenths of it
# for HBM3e (H200: 4.8 TB/s, B200: 8.0 TB/s), so that from H100 to H200 less is gained here than on the data sheets.
CHIPS = {
    "A100": Chip(312e12, 2.0e12, "data sheet"),
    "H100": Chip(790e12, 3.35e12, "best measured product, data sheet's bandwidth"),
    "H200": Chip(790e12, 4.3e12, "best measured product, nine tenths of the data sheet's bandwidth"),
    "B200": Chip(1745e12, 7.2e12, "best measured product, nine tenths of the data sheet's bandwidth"),
}
# A product of fp32 numbers runs in TF32 at half of bf16's rate on all of them; three of these make one in about fp32.
TF32, TF32X3 = 2, 6


def chip_of(device_name: str) -> str | None:
    """The name here of a card as its driver calls it; None for one that is not in the table: a slice of a card, and the
    slower ones of the same name."""
    if re.search(r"\b(MIG|PCIe|NVL|40GB)\b", device_name, re.IGNORECASE):
        return None
    return next((name for name in CHIPS if re.search(rf"\b{name}\b", device_name)), None)
