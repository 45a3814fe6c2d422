"""Going on with a run: one process of it at a time, and with the config that it was made with."""

import contextlib
import fcntl
import json
import os
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from maxmap import storage
from maxmap.errors import UserError

LOCK = "lock"

# Keys, and sections by their dot, that leave what is computed as it is, but for the rounding of sums on other devices.
HARMLESS = (
    *("log.", "checkpoint.", "evaluate.", "mesh.", "steps", "init_from", "model.remat"),
    *("data.path", "data.threads", "data.workers", "data.prefetch", "data.check"),
)


@contextlib.contextmanager
def only_run(workdir: str | Path) -> Iterator[Callable[[], None]]:
    """Keeps a second run out of a run's folder.

    A folder has a lock, which the operating system drops when the process ends, however it ends: the second run is
    refused. A bucket has none, and what a killed run leaves there must not stop the next one. So there the second run
    takes over: it writes itself into the object `lock`, and the first one ends when it looks there the next time, which
    it does before it evaluates, saves or copies its logs. What it is writing at that moment, it still writes.

    Yields:
      What to call before anything is written; it raises UserError where another run has taken over.

    Raises:
      UserError: another run holds the lock.
    """
    if jax.process_index() > 0:
        yield lambda: None
        return
    if storage.in_bucket(workdir):
        lock, own = (
            storage.resolve(workdir) / LOCK,
            f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4()}\n",
        )
        lock.write_text(own)

        def look() -> None:
            if (holder := lock.read_text()) != own:
                raise UserError(f"another run ({holder.strip()}) has taken over {workdir}: this one ends.")

        yield look
        return
    path = Path(workdir) / LOCK
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write into {workdir} ({error.strerror}): give another --workdir.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"another run ({file.read().strip() or 'just started'}) is writing to {workdir}: wait for its end, or "
                "give another --workdir."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield lambda: None


def check_changes(there: Mapping[str, Any], here: Mapping[str, Any], workdir: str | Path, *, allow: bool) -> list[str]:
    """Compares the config that a checkpoint was made with and the one that is to go on.

    Args:
      there: as the checkpoint has it.
      here: as it is now.
      workdir: for the message.
      allow: go on with any change.

    Returns:
      The changes, "section.key: before -> now".

    Raises:
      UserError: a value changed that changes what is computed, and `allow` is not set.
    """
    there, here = _flat(json.loads(json.dumps(there))), _flat(json.loads(json.dumps(here)))
    changes = {
        key: f"{key}: {there.get(key, 'not set')} -> {here.get(key, 'not set')}"
        for key in sorted(there.keys() | here.keys())
        # A key that is not set and one that is None are the same to every section.
        if there.get(key) != here.get(key)
    }
    serious = [text for key, text in changes.items() if not key.startswith(HARMLESS)]
    if serious and not allow:
        raise UserError(
            f"the run in {workdir} was made with another config ({'; '.join(serious)}): give the values that it has, "
            "another --workdir, or --continue_with_changes to go on all the same."
        )
    return list(changes.values())


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
