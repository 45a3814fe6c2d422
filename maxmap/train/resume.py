"""What a run needs to go on: nobody else writes to its folder, and its config computes the same as before."""

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
from maxmap.config import flatten
from maxmap.errors import UserError

LOCK = "lock"

# Keys and (with a dot) sections that may change when a run goes on: it computes the same, apart from rounding, because
# other devices add numbers in another order. Only configs of older versions have data.prefetch.
CHANGEABLE = (
    *("log.", "checkpoint.", "evaluate.", "mesh.", "steps", "init_from", "model.remat", "kernels"),
    *("data.path", "data.threads", "data.workers", "data.prefetch", "data.check", "data.thresholds"),
)


@contextlib.contextmanager
def only_run(workdir: str | Path) -> Iterator[Callable[[], None]]:
    """Makes sure that only one run writes to a workdir.

    In a folder, the second run is refused. The first one holds a lock, which the operating system releases when the
    process ends in any way.

    A bucket has no locks, and what a killed run leaves there must not stop the next run. So the second run takes over:
    it writes its name into the object `lock`. The first run reads that object before it evaluates, saves or copies its
    logs, and ends when the name is not its own. It still finishes what it is writing when the other run takes over.

    Args:
      workdir: folder of the run, perhaps in a bucket.

    Yields:
      A function to call before anything is written; it raises UserError if another run has taken over.

    Raises:
      UserError: another run holds the lock, or the folder cannot be written to.
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

        def check_ownership() -> None:
            if (holder := lock.read_text()) != own:
                raise UserError(f"another run ({holder.strip()}) has taken over {workdir}: this one ends.")

        yield check_ownership
        return
    path = Path(workdir) / LOCK
    try:
        file = path.open("a+", encoding="utf-8", errors="replace")
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
    """Compares the config of a checkpoint with the config that is to go on from it.

    Args:
      there: the config of the checkpoint.
      here: the config of this run.
      workdir: folder of the run, for the message.
      allow: accept every change.

    Returns:
      The changes, each as "section.key: before -> now".

    Raises:
      UserError: a changed value changes what is computed, and `allow` is False.
    """
    there, here = flatten(json.loads(json.dumps(there))), flatten(json.loads(json.dumps(here)))
    changes = {
        key: f"{key}: {there.get(key, 'not set')} -> {here.get(key, 'not set')}"
        for key in sorted(there.keys() | here.keys())
        # For every section, a key that is missing means the same as None.
        if there.get(key) != here.get(key)
    }
    serious = [text for key, text in changes.items() if not key.startswith(CHANGEABLE)]
    if serious and not allow:
        raise UserError(
            f"the run in {workdir} was made with another config ({'; '.join(serious)}): give the values that it has, "
            "another --workdir, or --continue_with_changes to go on with these."
        )
    return list(changes.values())
