import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from albef_ds.evaluation.boxes import (
    GroundingHits,
    GroundingScore,
    box_from_heatmap,
    iou,
    judge_grounding,
    pointing_hit,
    rank_proposals,
    reference_iou,
    score_grounding,
    upsampled,
)

coordinates = st.tuples(*[st.integers(-3, 12)] * 2, *[st.integers(0, 9)] * 2)


def pixels(box):
    x, y, w, h = box
    return {(i, j) for i in range(x, x + w) for j in range(y, y + h)}


@given(coordinates, coordinates)
def test_iou_counts_pixels(a, b):
    union = len(pixels(a) | pixels(b))
    both = len(pixels(a) & pixels(b))
    assert iou(a, b).item() == pytest.approx(both / union if union else 0)
    columns, rows = ({p[k] for p in pixels(a) & pixels(b)} for k in (0, 1))
    # The reference compares the first shared pixel with the last: one alone is no overlap.
    both = both if len(columns) > 1 and len(rows) > 1 else 0
    assert reference_iou(a, b).item() == pytest.approx(both / union if both else 0)


def test_iou_of_many_boxes_at_once():
    a, b = torch.rand(3, 4), torch.rand(5, 4)
    pairs = iou(a[:, None], b)
    assert pairs.shape == (3, 5) and pairs.dtype == torch.float64
    assert pairs[2, 4] == iou(a[2], b[4]) == iou(a[2].tolist(), b[4].tolist())
    assert iou([0, 0, 2, 1], [[0, 0, 2, 2], [0, 0, 2, 1]]).tolist() == [0.5, 1]
    # fp32 would put this half, 0.1 of 0.2, on the wrong side
    assert iou([0.3, 0, 0.1, 1], [0.3, 0, 0.2, 1]).item() == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("bad", [[0, 0, 0, 5], [0, 0, -5, 5], [0, 0, -5, -5], [0, 0, math.nan, 5], [math.nan, 0, 5, 5]])
def test_boxes_without_area_overlap_nothing(bad):
    for function in (iou, reference_iou):
        assert function(bad, [0, 0, 5, 5]).item() == 0
        assert function(bad, bad).item() == 0


def test_what_is_no_box():
    with pytest.raises(ValueError, match=r"boxes of shape \[3\]: expected"):
        iou([1, 2, 3], [1, 2, 3, 4])


def slow_ranking(heatmap, proposals, width, height, alpha):
    heat = upsampled(heatmap, width, height).double()
    scores = []
    for x, y, w, h in proposals:
        inside = heat[max(int(y), 0) : max(int(y + h), 0), max(int(x), 0) : max(int(x + w), 0)]
        scores.append(inside.sum().item() / (w * h) ** alpha if inside.numel() else -math.inf)
    return scores


@settings(deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.floats(-2, 1),
    st.lists(st.tuples(*[st.floats(-9, 45)] * 2, *[st.floats(0.5, 30)] * 2), min_size=1, max_size=9),
)
def test_ranks_as_summing_box_by_box(seed, width, height, alpha, shift, proposals):
    heatmap = torch.rand(3, 5, generator=torch.Generator().manual_seed(seed)) + shift
    scores = slow_ranking(heatmap, proposals, width, height, alpha)
    if max(scores) == -math.inf:
        with pytest.raises(ValueError, match="none of the .* covers a pixel"):
            rank_proposals(heatmap, proposals, width, height, alpha)
    else:
        best = rank_proposals(heatmap, proposals, width, height, alpha)
        assert scores[best] == pytest.approx(max(scores), rel=1e-6, abs=1e-6)


def test_ranking_takes_the_best_where_none_is_positive():
    assert rank_proposals(-torch.ones(4, 4), [[0, 0, 8, 8], [0, 0, 2, 2], [0, 0, 4, 4]], 8, 8) == 1
    assert rank_proposals(torch.zeros(4, 4), [[9, 9, 2, 2], [1, 1, 2, 2], [0, 0, 2, 2]], 8, 8) == 1  # the first in it
    # no area, or no pixel of the image: worse than any other
    assert rank_proposals(-torch.ones(4, 4), [[0, 0, 0, 4], [3.2, 3, 0.5, 4], [-9, 0, 9, 9], [0, 0, 8, 8]], 8, 8) == 3


@pytest.mark.parametrize(
    "proposals, message",
    [
        ([], "expected .* with at least one"),
        (torch.zeros(0, 4), "expected .* with at least one"),
        ([0, 0, 4, 4], r"shape \[4\]"),
        ([[0, 0, 4]], r"shape \[1, 3\]"),
        ([[0, 0, 4, 4], [0, 0, math.nan, 4]], "proposal 1 is .*finite"),
        ([[0, 0, 0, 0], [20, 0, 4, 4]], "none of the 2 proposals covers a pixel of the 8 x 8 image"),
    ],
)
def test_proposals_that_cannot_be_ranked(proposals, message):
    with pytest.raises(ValueError, match=message):
        rank_proposals(torch.ones(2, 2), proposals, 8, 8)


def one_hot(size, row, column):
    heatmap = torch.zeros(size, size)
    heatmap[row, column] = 1
    return heatmap


def test_pointing_at_a_cell_of_the_squeezed_image():
    heatmap = one_hot(4, 1, 3)  # of 80 x 20 pixels: around column 70, row 7.5
    assert pointing_hit(heatmap, [60, 5, 20, 5], 80, 20)
    assert not pointing_hit(heatmap, [0, 5, 60, 5], 80, 20)
    assert not pointing_hit(heatmap, [60, 10, 20, 5], 80, 20)
    assert not pointing_hit(heatmap, [70, 7, 0, 5], 80, 20)
    assert not pointing_hit(heatmap.T, [60, 5, 20, 5], 80, 20)
    assert not pointing_hit(torch.ones(4, 4), [0, 0, 80, 20], 80, 20)  # flat: points nowhere


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 70), st.integers(1, 70), st.sampled_from([0.2, 0.5, 1.0])
)
def test_box_surrounds_the_connected_region(seed, size, width, height, share):
    heatmap = torch.rand(size, size + 1, generator=torch.Generator().manual_seed(seed)) ** 3
    heat = upsampled(heatmap, width, height)
    regions, _ = ndimage.label((heat >= share * heat.max()).numpy())
    rows, columns = np.nonzero(regions == regions.flat[int(heat.numpy().argmax())])
    expected = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    assert box_from_heatmap(heatmap, width, height, share).tolist() == expected


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 30), st.integers(2, 30), st.floats(0.3, 0.8))
def test_pixels_that_touch_by_a_corner_are_not_connected(seed, width, height, density):
    heatmap = (torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < density).float()
    heatmap[height // 2, width // 2] = 1.5  # a map as large as the image is not resampled
    regions, _ = ndimage.label(heatmap.numpy() > 0)
    rows, columns = np.nonzero(regions == regions[height // 2, width // 2])
    expected = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    assert box_from_heatmap(heatmap, width, height, share=0.5).tolist() == expected


def test_box_leaves_out_another_hot_region_and_follows_bends():
    heatmap = torch.zeros(9, 9)
    heatmap[1, 1:8] = heatmap[1:8, 7] = heatmap[7, 3:8] = 1.0  # a hook, back to column 3
    heatmap[4, 0] = 0.9  # apart
    heatmap[1, 1] = 1.1
    assert box_from_heatmap(heatmap, 9, 9, share=0.7).tolist() == [1, 1, 7, 7]


@pytest.mark.parametrize("heatmap", [torch.zeros(3, 3), torch.ones(3, 3), torch.ones(1, 1), -torch.rand(3, 3) - 1])
def test_where_nothing_stands_out_the_box_is_the_image(heatmap):
    assert box_from_heatmap(heatmap, 7, 5).tolist() == [0, 0, 7, 5]


@pytest.mark.parametrize(
    "heatmap, message",
    [
        (torch.tensor([[0.0, math.nan]]), "NaN or infinity"),
        (torch.tensor([[0.0, math.inf]]), "NaN or infinity"),
        (torch.ones(1, 2, 2), r"shape \[1, 2, 2\]"),
        (torch.ones(0, 2), r"shape \[0, 2\]"),
    ],
)
def test_maps_that_cannot_be_judged(heatmap, message):
    for judge in (
        lambda: rank_proposals(heatmap, [[0, 0, 2, 2]], 4, 4),
        lambda: pointing_hit(heatmap, [0, 0, 2, 2], 4, 4),
        lambda: box_from_heatmap(heatmap, 4, 4),
        lambda: judge_grounding(heatmap, [0, 0, 2, 2], 4, 4),
    ):
        with pytest.raises(ValueError, match=message):
            judge()


def test_settings_without_sense():
    with pytest.raises(ValueError, match="share is 0"):
        box_from_heatmap(torch.rand(2, 2), 4, 4, share=0)
    with pytest.raises(ValueError, match="image of 0 x 4"):
        upsampled(torch.rand(2, 2), 0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_judges_one_text(dtype):
    heatmap = one_hot(8, 2, 5).to(dtype).requires_grad_()  # 80 x 40 pixels: columns 50 to 60, rows 10 to 15
    box, far = [48, 9, 14, 7], [0, 20, 20, 20]
    best = [far, [50, 10, 10, 5]][rank_proposals(heatmap, [far, [50, 10, 10, 5]], 80, 40)]
    assert judge_grounding(heatmap, box, 80, 40, best) == GroundingHits(True, True, True, True)
    assert judge_grounding(heatmap, far, 80, 40, best) == GroundingHits(False, False, False, False)
    assert judge_grounding(heatmap, box, 80, 40, far) == GroundingHits(False, True, True, True)
    assert judge_grounding(heatmap, box, 80, 40) == GroundingHits(None, True, True, True)
    whole = judge_grounding(heatmap, [0, 0, 80, 40], 80, 40)
    assert (whole.pointing, whole.centre, whole.region) == (True, True, False)


def test_scores_by_split():
    hits = [
        ("val", GroundingHits(True, True, False, False)),
        ("testA", GroundingHits(None, False, True, False)),
        ("val", GroundingHits(None, True, True, False)),  # the detector found nothing: missed
        ("val", GroundingHits(False, False, True, True)),
        ("val", GroundingHits(True, True, True, False)),
    ]
    assert score_grounding(hits) == {
        "val": GroundingScore(ranked=50, pointing=75, centre=75, region=25, texts=4),
        "testA": GroundingScore(ranked=None, pointing=0, centre=100, region=0, texts=1),
    }
    assert score_grounding([]) == {}
