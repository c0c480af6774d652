"""The public reference's pre-training step, implemented plainly and independently: the rival that we measure against.

It computes what models/model_pretrain.py, models/vit.py and models/xbert.py of salesforce/ALBEF compute, in the same
order and with the same waste, and passes the same recorded cases as our own step (tests/benchmarks/test_reference.py).
"""

from benchmarks.reference.batch import PaddedBatch
from benchmarks.reference.model import ReferenceALBEF

__all__ = ["PaddedBatch", "ReferenceALBEF"]
