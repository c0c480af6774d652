"""torch.compile for the regions where a chain of elementwise operations follows a matrix product.

The regions are small modules between attentions: no data-dependent shape and no foreign kernel is in them, so that one
graph serves all layers and all lengths (`python -m benchmarks.compile` counts graphs and times steps).
"""

from __future__ import annotations

from timm.layers import Mlp
from torch import nn

from albef_ds.model.text import Intermediate, ResidualOutput

REGIONS = (Mlp, Intermediate, ResidualOutput)  # GELU; bias, dropout, residual and LayerNorm


def compile_regions(model: nn.Module) -> None:
    """Has every region of `model` compiled when it is first called; parameters and their names stay.

    Call it on the whole task (student and teacher), after the teacher was copied and before the engine is built. The
    number of packed rows is symbolic from the start. Compiled dropout draws other random numbers than eager dropout,
    though the same ones again for the same seed.
    """
    for module in model.modules():
        if isinstance(module, REGIONS):
            module.compile(dynamic=True)
