"""Our recall against torchmetrics' on the same scores.

In retrieval of images and texts, "recall at k" is the share of queries with *some* right answer among the first k. That
is torchmetrics' RetrievalHitRate. Its RetrievalRecall is the share of all right answers that are among the first k: the
same number where a query has one right answer, as a caption has one image ("ir"), and a smaller one where it has
several, as an image has five captions in COCO and Flickr30k ("tr"). So "ir" equals both, "tr" the hit rate only.
"""

import pytest
import torch
from torchmetrics.retrieval import RetrievalHitRate, RetrievalRecall

from albef_ds.evaluation.recall import RECALL_AT, first_right, ordered, recall, reranked


def random_case(images, captions, seed):
    """Scores [images, texts], all different, and which text belongs to which image; every image has one at least."""
    generator = torch.Generator().manual_seed(seed)
    more = torch.randint(images, (images * (captions - 1),), generator=generator)  # unequal numbers of captions
    owner = torch.cat([torch.arange(images), more])[torch.randperm(images * captions, generator=generator)]
    right = owner == torch.arange(images)[:, None]  # [images, texts]
    ranks = torch.randperm(right.numel(), generator=generator).view(right.shape).float()
    # Right ones move up by half the range, and by half a rank so that none equals a wrong one.
    return ranks + right * (right.numel() // 2 + 0.5), right


def places(scores, right):
    return first_right(right.gather(1, ordered(scores)))


def percent(metric, scores, right, k):
    queries = torch.arange(len(scores))[:, None].expand_as(scores)
    return 100 * metric(top_k=k)(scores.flatten(), right.flatten(), indexes=queries.flatten()).item()


@pytest.mark.parametrize("images, captions, seed", [(23, 1, 0), (40, 3, 1), (30, 5, 2), (11, 2, 3)])
def test_recall_is_the_hit_rate_of_torchmetrics(images, captions, seed):
    scores, right = random_case(images, captions, seed)
    ours = recall(places(scores, right), places(scores.T, right.T))
    for k in RECALL_AT:
        assert ours[f"tr@{k}"] == pytest.approx(percent(RetrievalHitRate, scores, right, k), abs=1e-4)
        assert ours[f"ir@{k}"] == pytest.approx(percent(RetrievalHitRate, scores.T, right.T, k), abs=1e-4)
        # one image a caption: all right answers are found as soon as one is
        assert ours[f"ir@{k}"] == pytest.approx(percent(RetrievalRecall, scores.T, right.T, k), abs=1e-4)
        share_found = percent(RetrievalRecall, scores, right, k)
        if captions == 1:
            assert ours[f"tr@{k}"] == pytest.approx(share_found, abs=1e-4)
        else:
            assert ours[f"tr@{k}"] >= share_found - 1e-4
    assert 0 < ours["tr@1"] < 100 and 0 < ours["ir@1"] < 100  # else the case would compare nothing
    if captions > 1:
        assert ours["tr@1"] > percent(RetrievalRecall, scores, right, 1) + 1


@pytest.mark.parametrize("k", [1, 4, 16])
def test_reranking_is_a_second_sort_of_the_first_k(k):
    scores, right = random_case(30, 3, seed=5)
    order = ordered(scores)
    new = torch.rand(30, k, generator=torch.Generator().manual_seed(6))
    # For torchmetrics: the first k by their new scores, above all others by their old ones.
    combined = scores.scatter(1, order[:, :k], new + scores.max() + 1)
    moved = reranked(right.gather(1, order)[:, :k], places(scores, right), new)
    ours = recall(moved, moved)
    for at in RECALL_AT:
        assert ours[f"tr@{at}"] == pytest.approx(percent(RetrievalHitRate, combined, right, at), abs=1e-4)
