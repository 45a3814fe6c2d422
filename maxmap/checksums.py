"""The checksum of TensorFlow's files: TFRecord and checkpoints."""

import google_crc32c


def masked_crc32c(data: bytes) -> int:
    """Returns the masked CRC-32C of bytes.

    TensorFlow rotates and shifts a CRC that is stored beside its data, because the CRC of data that hold their own CRC
    is weak; see `crc32c::Mask` in tensorflow/core/lib/hash/crc32c.h.
    """
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
