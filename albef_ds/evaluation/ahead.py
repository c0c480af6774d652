"""Loads a test set's samples in threads, one block ahead of who asks, and refuses a set with holes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from albef_ds.data.images import ImageError
from albef_ds.evaluation.sharding import Ranks

NAMED = 5  # bad images that an error names


class EvaluationError(ValueError):
    """A test set that cannot be evaluated as a whole, or a model that gives no numbers."""


def loaded_ahead(
    load: Callable[[int], object], blocks: Sequence[range], workers: int
) -> Iterator[tuple[list, list[str]]]:
    """The samples of each block of rows, and the faults in it. `load` may raise ImageError, which is a fault."""

    def attempt(row: int):
        try:
            return load(row)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(max(1, workers)) as pool:
        pending = [pool.submit(attempt, row) for row in blocks[0]] if blocks else []
        for i in range(len(blocks)):
            following = [pool.submit(attempt, row) for row in blocks[i + 1]] if i + 1 < len(blocks) else []
            results = [future.result() for future in pending]
            faults = [str(r) for r in results if isinstance(r, ImageError)]
            yield [r for r in results if not isinstance(r, ImageError)], faults
            pending = following


def refuse_holes(ranks: Ranks, faults: list[str]) -> None:
    """Raises EvaluationError on all ranks together where any of them met an image that cannot be used."""
    bad = [fault for faults in ranks.all_objects(faults) for fault in faults]
    if bad:
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise EvaluationError(
            f"test images that cannot be used: {'; '.join(bad[:NAMED])}{more}. Numbers from a part of the set "
            "cannot be compared with anything: repair the files, or remove their entries from the annotation file"
        )
