"""TensorBoard's event file."""

import os
import socket
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from maxmap.checksums import masked_crc32c

# tensorboardX imports torch where it is installed, which takes two seconds. Its messages do without.
_torch = sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
try:
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
finally:
    if _torch is None:
        del sys.modules["torch"]


class Board:
    """Writes TensorBoard's file, every value at once.

    tensorboardX's own writer queues values for a thread. When the disk is full, this thread dies and the queue blocks
    the run.

    Args:
      folder: where the file goes.
      step: TensorBoard discards the values of earlier runs from this step on.
    """

    def __init__(self, folder: Path, step: int):
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab", buffering=0)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._write(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Writes the values of curves at a step, each under its kind: "train/loss"."""
        for key, value in values.items():
            summary = Summary(value=[Summary.Value(tag=f"{kind}/{key}", simple_value=value)])
            self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Event) -> None:
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        self._file.write(length + sums[0] + data + sums[1])

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
