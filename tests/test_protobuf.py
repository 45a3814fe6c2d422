"""Our reader of protocol buffers agrees with Google's on what a message holds and on which bytes are none."""

import numpy as np
import pytest
from google.protobuf import any_pb2, descriptor_pb2, empty_pb2, message, struct_pb2, timestamp_pb2

from maxmap.protobuf import MalformedMessage, Message, read_varint


def test_integers_strings_and_messages_are_read():
    location = descriptor_pb2.SourceCodeInfo.Location(path=[5, 150, 2**31 - 1], leading_comments="é")
    parsed = Message(descriptor_pb2.SourceCodeInfo(location=[location, location]).SerializeToString())
    assert len(parsed.messages(1)) == 2
    for each in parsed.messages(1):
        assert each.integers(1) == [5, 150, 2**31 - 1] and each.strings(3) == ["é".encode()]
        assert 3 in each and 4 not in each and each.strings(4) == [] and each.integer(4, default=7) == 7


def test_integers_that_are_not_packed_are_read():
    assert Message(bytes([1 << 3, 7, 1 << 3, 0x96, 0x01])).integers(1) == [7, 150]


def test_64_bits_are_unsigned():
    parsed = Message(timestamp_pb2.Timestamp(seconds=2**62, nanos=-1).SerializeToString())
    assert parsed.integer(1) == 2**62 and parsed.integer(2) == 2**64 - 1


def test_numbers_of_fixed_size_are_set_apart():
    parsed = Message(
        struct_pb2.Value(number_value=1.5).SerializeToString() + bytes([4 << 3, 1, 6 << 3 | 5, 1, 2, 0, 0])
    )
    assert 2 not in parsed and parsed.integer(4) == 1 and 6 not in parsed
    assert parsed.fixed32(6) == 513 and parsed.fixed32(2) is None and parsed.fixed32(4) is None


def test_another_type_than_expected_is_malformed():
    parsed = Message(bytes([1 << 3, 7]))
    for read in (parsed.strings, parsed.messages):
        with pytest.raises(MalformedMessage, match="integer where bytes"):
            read(1)
    with pytest.raises(MalformedMessage, match="cut off"):
        Message(any_pb2.Any(value=b"\x80").SerializeToString()).integers(2)


def test_an_integer_without_end_is_malformed():
    assert read_varint(b"\xff" * 9 + b"\x01", 0) == (2**64 - 1, 10)
    for data, reason in ((b"\x80" * 9, "cut off"), (b"\x80" * 10_000, "more than 64 bits"), (b"", "cut off")):
        with pytest.raises(MalformedMessage, match=reason):
            read_varint(data, 0)


def test_the_same_bytes_are_malformed_as_for_google():
    """Short random messages, most of them malformed; only groups, which we do not read, are another matter."""
    rng = np.random.default_rng(0)
    malformed, compared = 0, 0
    for _ in range(20_000):
        data = bytes(rng.integers(0, rng.choice([32, 256]), rng.integers(1, 24)).tolist())
        try:
            Message(data)
            ours = None
        except MalformedMessage as error:
            ours = str(error)
        if ours is not None and "wire type" in ours:
            continue
        try:
            empty_pb2.Empty.FromString(data)
            theirs = False
        except message.DecodeError:
            theirs = True
        assert (ours is not None) == theirs, (data, ours)
        malformed, compared = malformed + theirs, compared + 1
    assert malformed > 500 and compared - malformed > 500
