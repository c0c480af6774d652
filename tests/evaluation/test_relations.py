"""What a phrase says of places, and which proposal is meant then."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.evaluation.boxes import heat_of_proposals, rank_proposals
from albef_ds.evaluation.relations import Chain, chain_of, rank_related

WORDINGS = {
    "left": ["left of", "to the left of", "on the left side of", "that is left of", "which is to the left of"],
    "right": ["right of", "at the right of", "on the right hand side of", "that's right of"],
    "above": ["above", "on top of", "that is above"],
    "below": ["below", "under", "underneath", "beneath", "which is below"],
}


@pytest.mark.parametrize(
    ("text", "things", "relations"),
    [
        ("the star left of the blue square", ("the star", "the blue square"), ("left",)),
        ("The star  To The\tLeft Of the square", ("The star", "the square"), ("left",)),
        ("man right of the bus under the bridge", ("man", "the bus", "the bridge"), ("right", "below")),
    ],
)
def test_things_and_their_relations(text, things, relations):
    assert chain_of(text) == Chain(things, relations)


@given(
    st.lists(st.sampled_from(["the star", "a man in red", "small cat"]), min_size=2, max_size=4),
    st.data(),
)
def test_every_wording_is_understood(things, data):
    relations = [data.draw(st.sampled_from(sorted(WORDINGS))) for _ in things[1:]]
    said = [data.draw(st.sampled_from(WORDINGS[relation])) for relation in relations]
    text = " ".join([things[0], *(f"{words} {thing}" for words, thing in zip(said, things[1:], strict=True))])
    assert chain_of(text) == Chain(tuple(things), tuple(relations))


@pytest.mark.parametrize(
    "text",
    [
        *["", "the star", "the large red circle", "left man", "the man on the right", "man with his left hand up"],
        *["left of the tree", "the star above", "the belowground station", "thunder over the sea", "leftover of bread"],
    ],
)
def test_phrases_without_a_relation_between_two_things(text):
    assert chain_of(text) is None


# Four boxes of 10 x 10 around the middle of 40 x 40 pixels, in a map of 4 x 4 places.
CROSS = {"left": (0, 15, 10, 10), "right": (30, 15, 10, 10), "above": (15, 0, 10, 10), "below": (15, 30, 10, 10)}
MIDDLE = (15, 15, 10, 10)


def heat_in(*boxes) -> torch.Tensor:
    heat = torch.zeros(40, 40)
    for x, y, w, h in boxes:
        heat[y : y + h, x : x + w] = 1
    return heat


@pytest.mark.parametrize("relation", CROSS)
@pytest.mark.parametrize("last", [False, True])
def test_the_thing_on_the_side_named_is_chosen(relation, last):
    proposals = [*CROSS.values()]
    proposals.insert(len(proposals) if last else 0, MIDDLE)
    things = heat_in(*CROSS.values()), heat_in(MIDDLE)
    assert proposals[rank_related([relation], things, proposals, 40, 40)] == CROSS[relation]


def test_of_a_chain_the_first_thing_is_meant():
    """The left one of two stars over each of two squares: the square is meant that is left of the circle."""
    corners = ((2, 2), (22, 2), (2, 22), (22, 22), (31, 31))
    star_a, star_b, square_a, square_b, circle = [(x, y, 8, 8) for x, y in corners]
    proposals = [star_b, star_a, square_b, square_a, circle]
    things = heat_in(star_a, star_b), heat_in(square_b) + 0.5 * heat_in(square_a), heat_in(circle)
    # Both stars are above both squares; the likelier of two equal ones comes first in the list.
    assert proposals[rank_related(["above", "left"], things, proposals, 40, 40)] == star_b
    only_left = heat_in(star_a), heat_in(square_a, square_b), heat_in(square_b)
    assert proposals[rank_related(["left", "left"], only_left, proposals, 40, 40)] == star_a


def by_enumeration(relations, likelihoods, centres) -> torch.Tensor:
    """[N] the sum over all ways to name the other things of the product of their likelihoods."""
    sides = {
        "left": lambda a, b: a[0] < b[0],
        "right": lambda a, b: a[0] > b[0],
        "above": lambda a, b: a[1] < b[1],
        "below": lambda a, b: a[1] > b[1],
    }
    total = torch.zeros(len(centres), dtype=torch.float64)
    for named in itertools.product(range(len(centres)), repeat=len(likelihoods)):
        if all(sides[r](centres[a], centres[b]) for r, a, b in zip(relations, named, named[1:], strict=False)):
            total[named[0]] += torch.stack([p[i] for p, i in zip(likelihoods, named, strict=True)]).prod()
    return total


box = st.tuples(*[st.integers(0, 30)] * 2, *[st.integers(1, 10)] * 2)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(box, min_size=1, max_size=5),
    st.lists(st.sampled_from(["left", "right", "above", "below"]), min_size=1, max_size=3),
    st.integers(0, 2**31),
)
def test_the_choice_is_the_likeliest_by_enumeration(proposals, relations, seed):
    generator = torch.Generator().manual_seed(seed)
    heatmaps = [torch.rand(3, 3, generator=generator) for _ in range(len(relations) + 1)]
    heats = [heat_of_proposals(h, proposals, 40, 40).clamp(min=0) for h in heatmaps]
    centres = [(x + w / 2, y + h / 2) for x, y, w, h in proposals]
    total = by_enumeration(relations, [h / h.sum() for h in heats], centres)
    chosen = rank_related(relations, heatmaps, proposals, 40, 40)
    if total.max() > 0:
        assert total[chosen] >= total.max() * (1 - 1e-9)


def test_a_relation_that_no_two_proposals_have_is_passed_over():
    proposals = [(2, 2, 10, 10), (2, 20, 10, 10)]  # nothing is left of anything
    things = heat_in(proposals[1]), heat_in(proposals[0])
    assert rank_related(["left"], things, proposals, 40, 40) == 1 == rank_proposals(things[0], proposals, 40, 40)


def test_a_thing_without_heat_may_be_anywhere_in_the_image():
    proposals = [(50, 2, 10, 10), (2, 2, 10, 10), (20, 2, 10, 10)]  # the first covers no pixel
    things = heat_in(*proposals[1:]), torch.zeros(4, 4)
    assert rank_related(["left"], things, proposals, 40, 40) == 1
    assert rank_related(["right"], things, proposals, 40, 40) == 2
