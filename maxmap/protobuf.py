"""Reads protocol buffers without their schema: TensorFlow's checkpoints and TFRecord files consist of them.

A message is a sequence of fields. Each field is a tag, which holds the field's number and its wire type, and a value.
The format is described in https://protobuf.dev/programming-guides/encoding.
"""

import struct
from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types; the groups of the first version, 3 and 4, are not read


class MalformedMessage(ValueError):
    """The bytes are no protocol buffer, or a field holds another type than its reader expects."""


class Message:
    """The integers, byte strings and messages in one message, by the number of their field.

    The caller knows the schema and asks for the right type. Numbers of 64 bits of fixed size are skipped.

    Args:
      data: the encoded message.

    Raises:
      MalformedMessage: the bytes are cut off or no message.
    """

    def __init__(self, data: bytes):
        self._fields: dict[int, list[int | bytes]] = {}
        self._fixed: dict[int, bytes] = {}
        for number, value, fixed in _read_fields(data):
            if fixed:
                self._fixed[number] = _expect_bytes(value)
            else:
                self._fields.setdefault(number, []).append(value)

    def __contains__(self, number: int) -> bool:
        return number in self._fields

    def integer(self, number: int, default: int = 0) -> int:
        """Returns an integer field; where it is repeated the last value counts, as the format demands."""
        values = self.integers(number)
        return values[-1] if values else default

    def integers(self, number: int) -> list[int]:
        """Returns a repeated integer field, packed or not; the integers are unsigned.

        Raises:
          MalformedMessage: a packed list is cut off.
        """
        integers: list[int] = []
        for value in self._fields.get(number, []):
            if isinstance(value, int):
                integers.append(value)
                continue
            position = 0
            while position < len(value):
                integer, position = read_varint(value, position)
                integers.append(integer)
        return integers

    def fixed32(self, number: int) -> int | None:
        """Returns an unsigned integer field of 32 bits of fixed size, None if there is none."""
        value = self._fixed.get(number, b"")
        return struct.unpack("<I", value)[0] if len(value) == 4 else None

    def strings(self, number: int) -> list[bytes]:
        """Returns a repeated field of bytes.

        Raises:
          MalformedMessage: the field holds integers.
        """
        return [_expect_bytes(value) for value in self._fields.get(number, [])]

    def messages(self, number: int) -> list["Message"]:
        """Returns a repeated field of messages.

        Raises:
          MalformedMessage: the field holds something else.
        """
        return [Message(value) for value in self.strings(number)]


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Reads an unsigned integer of up to 64 bits: 7 bits a byte, the lowest first, until a byte is below 128.

    Returns:
      The integer and the position after it.

    Raises:
      MalformedMessage: the data end within the integer, or it has more than 64 bits.
    """
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise MalformedMessage("the data are cut off")
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1, position
    raise MalformedMessage("an integer has more than 64 bits")


def read_bytes(data: bytes, position: int, size: int) -> tuple[bytes, int]:
    """Reads `size` bytes.

    Returns:
      The bytes and the position after them.

    Raises:
      MalformedMessage: the data are shorter.
    """
    if position + size > len(data):
        raise MalformedMessage("the data are cut off")
    return data[position : position + size], position + size


def _read_fields(data: bytes) -> Iterator[tuple[int, int | bytes, bool]]:
    """Yields number and value of each field, and whether the value has a fixed size and is given as its bytes."""
    position = 0
    value: int | bytes
    while position < len(data):
        tag, position = read_varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        if number >= 1 << 29:
            raise MalformedMessage(f"a field has the number {number}, more than 29 bits")
        if wire_type == VARINT:
            value, position = read_varint(data, position)
        elif wire_type == BYTES:
            size, position = read_varint(data, position)
            value, position = read_bytes(data, position, size)
        elif wire_type in (FIXED64, FIXED32):
            value, position = read_bytes(data, position, 8 if wire_type == FIXED64 else 4)
        else:
            raise MalformedMessage(f"a field has the unknown wire type {wire_type}")
        yield number, value, wire_type in (FIXED64, FIXED32)


def _expect_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise MalformedMessage("a field holds an integer where bytes are expected")
    return value
