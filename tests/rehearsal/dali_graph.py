"""What a serialised DALI pipeline says: its operators in order, where each runs, what it reads, its arguments.

`Pipeline.serialize()` gives a protobuf message and DALI comes with no description of it, so the fields are read by
their numbers, as DALI 2.4 writes them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

OPERATOR = 5  # of a pipeline; repeated
NAME, INPUT, OUTPUT, ARGUMENT = 1, 2, 3, 4  # of an operator; all but the first repeated
FLOAT, INT, STRING, BOOL, ELEMENT = 3, 4, 5, 6, 7  # values of an argument, of which it has one kind


@dataclass(frozen=True)
class Operator:
    name: str
    reads: dict[str, str]  # "0", "1" and so on, or the name of the argument that is an input -> whose output it is
    writes: str
    on: str  # where its output lies: "cpu" or "gpu"
    arguments: dict[str, object]


def read(serialised: bytes) -> list[Operator]:
    """The operators, each after those that it reads from. Raises ValueError where the message is none."""
    return [_operator(value) for number, value in _fields(serialised) if number == OPERATOR]


def _operator(message: bytes) -> Operator:
    parts = [(number, value) for number, value in _fields(message)]
    outputs = [dict(_fields(value)) for number, value in parts if number == OUTPUT]
    if len(outputs) != 1:
        raise ValueError(f"{len(outputs)} outputs: expected one")
    reads = {}
    for place, field in enumerate(dict(_fields(value)) for number, value in parts if number == INPUT):
        reads[field[4].decode() if field.get(3) else str(place)] = field[1].decode()
    arguments = dict(_argument(value) for number, value in parts if number == ARGUMENT)
    return Operator(dict(parts)[NAME].decode(), reads, outputs[0][1].decode(), outputs[0][2].decode(), arguments)


def _argument(message: bytes) -> tuple[str, object]:
    found = list(_fields(message))
    values = [_value(number, value) for number, value in found if FLOAT <= number <= ELEMENT]
    many = any(number == ELEMENT for number, _ in found)
    return dict(found)[NAME].decode(), values if many else values[0]


def _value(number: int, value: int | bytes) -> object:
    if number == FLOAT:
        return round(struct.unpack("<f", value)[0], 6)
    if number == ELEMENT:
        return _argument(value)[1]
    return {INT: int, STRING: bytes.decode, BOOL: bool}[number](value)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field: protobuf's wire format."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(message, at)
        elif kind in (1, 2, 5):
            length, at = _varint(message, at) if kind == 2 else (8 if kind == 1 else 4, at)
            value, at = message[at : at + length], at + length
        else:
            raise ValueError(f"wire type {kind} at byte {at}: this is no protobuf message")
        yield number, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while message[at] & 0x80:
        value |= (message[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
    return value | message[at] << shift, at + 1
