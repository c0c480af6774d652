"""Which operations on two streams are ordered, and which are a race."""

from __future__ import annotations

import pytest
import torch

from benchmarks.fake_streams import MAIN, Event, Order, Race, Stream, current_stream, on_stream, synchronize

aten = torch.ops.aten


@pytest.fixture
def order() -> Order:
    return Order()


def write(order: Order, tensor: torch.Tensor, stream: Stream) -> None:
    with on_stream(stream):
        order.add(aten.zero_.default, (tensor,), {}, tensor)


def read(order: Order, tensor: torch.Tensor, stream: Stream) -> None:
    with on_stream(stream):
        order.add(aten.exp.default, (tensor,), {}, torch.empty(3))


@pytest.mark.parametrize("first, then", [(write, read), (read, write), (write, write)])
def test_what_does_not_wait_is_a_race(order: Order, first, then):
    tensor, side = torch.empty(3), Stream()
    write(order, tensor, MAIN)
    side.wait_stream(MAIN)
    first(order, tensor, MAIN)
    with pytest.raises(Race, match="on stream side does not wait for stream main"):
        then(order, tensor, side)


@pytest.mark.parametrize("first, then", [(write, read), (read, write), (write, write)])
@pytest.mark.parametrize("wait", ["stream", "event", "host"])
def test_what_waits_is_none(order: Order, first, then, wait: str):
    tensor, side = torch.empty(3), Stream()
    write(order, tensor, MAIN)
    first(order, tensor, MAIN)
    if wait == "stream":
        side.wait_stream(MAIN)
    elif wait == "event":
        side.wait_event(MAIN.record_event())
    else:
        synchronize()
    then(order, tensor, side)


def test_two_may_read_at_once(order: Order):
    tensor, side = torch.empty(3), Stream()
    write(order, tensor, MAIN)
    side.wait_stream(MAIN)
    read(order, tensor, MAIN)
    read(order, tensor, side)


def test_an_event_does_not_stand_for_what_comes_after_it(order: Order):
    tensor, side, event = torch.empty(3), Stream(), Event()
    write(order, tensor, MAIN)
    event.record(MAIN)
    write(order, tensor, MAIN)
    side.wait_event(event)
    with pytest.raises(Race):
        read(order, tensor, side)


def test_waiting_is_passed_on(order: Order):
    tensor, second, third = torch.empty(3), Stream(), Stream()
    write(order, tensor, MAIN)
    second.wait_stream(MAIN)
    third.wait_stream(second)
    read(order, tensor, third)


def test_views_share_memory_and_looking_at_a_shape_uses_none(order: Order):
    tensor, side = torch.empty(3), Stream()
    write(order, tensor, MAIN)
    with on_stream(side):
        assert current_stream() is side
        order.add(aten.view.default, (tensor, [3, 1]), {}, tensor.view(3, 1))
    with pytest.raises(Race):
        read(order, tensor[:2], side)
