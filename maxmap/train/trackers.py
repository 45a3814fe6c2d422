"""Trackers of experiments beside TensorBoard: Weights & Biases, MLflow and trackio.

Each works in a thread of its own, so a service that is slow or gone neither slows nor ends a run. Their usual variables
say where they log to, and whether at all: WANDB_MODE=offline, MLFLOW_TRACKING_URI, TRACKIO_DIR and so on.

A run that goes on goes on in the same run of the tracker. It repeats the steps since its checkpoint with the same
numbers, so a tracker gets only what is newer than all that it got before.
"""

import importlib.util
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from maxmap.errors import UserError, reason

EVENT = "trackers"  # kind of the line in `events.jsonl` that keeps what a run is called there
PROJECT = "maxmap"  # or experiment, where the tracker's own variable names no other
PATIENCE = 20  # seconds that the end of a run waits for a tracker; schedulers kill 30 after SIGTERM
_QUEUE = 10_000  # rows that may wait for a tracker
_PARAMETERS = 100  # that MLflow takes at a time


class About(NamedTuple):
    """What a tracker is told of a run.

    Attributes:
      name: Of the workdir.
      id: Of the run, in every tracker.
      config: Values by their paths.
      folder: Where a tracker may put its own files.
      logged: The newest step of each kind of row that the run has logged before.
    """

    name: str
    id: str
    config: Mapping[str, Any]
    folder: Path
    logged: Mapping[str, int]


def known_before(events: Iterable[Mapping[str, Any]], metrics: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns `id` and `logged` of the run whose logs these are; a new id where no start of it had a tracker."""
    starts = [row for row in events if row.get("kind") == EVENT and {"id", "logged"} <= row.keys()]
    if not starts:
        return {"id": uuid.uuid4().hex[:12], "logged": {}}
    logged = dict(starts[-1]["logged"])
    for row in metrics:
        kind = str(row.get("kind"))  # of a line that somebody has edited, None
        logged[kind] = max(logged.get(kind, 0), row["step"])
    return {"id": starts[-1]["id"], "logged": logged}


class Service(Protocol):
    """A run in a tracker; `where` says where to look at it."""

    where: str

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """A run of Weights & Biases; its files lie in `wandb/` of the workdir."""

    def __init__(self, about: About):
        import wandb

        # Silent, it does not ask for a key, and it leaves stdout and stderr alone.
        settings = wandb.Settings(silent=True, console="off")
        wandb.setup(settings)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=about.name,
            id=about.id,
            resume="allow",
            config=dict(about.config),
            dir=str(about.folder),
            settings=settings,
        )
        self.where = self._run.url or str(about.folder / "wandb")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow; it is found again by its tag `maxmap.id`."""

    def __init__(self, about: About):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        at = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        found = self._client.search_runs([at], f"tags.`maxmap.id` = '{about.id}'")
        run = found[0] if found else self._client.create_run(at, tags={"maxmap.id": about.id}, run_name=about.name)
        self._id = run.info.run_id
        self.where = f"{self._client.tracking_uri}, experiment {name}, run {self._id}"
        if found:
            self._client.update_run(self._id, status="RUNNING")
        else:  # what a run was begun with cannot be changed
            parameters = [Param(key, str(value)) for key, value in about.config.items()]
            for i in range(0, len(parameters), _PARAMETERS):
                self._client.log_batch(self._id, params=parameters[i : i + _PARAMETERS])

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self._id, metrics=[self._metric(key, x, now, step) for key, x in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Trackio:
    """A run of trackio; it is found again by its name, which ends with the id."""

    def __init__(self, about: About):
        import trackio

        name = f"{about.name}-{about.id}"
        self._run = trackio.init(project=PROJECT, name=name, config=dict(about.config), resume="allow", embed=False)
        self.where = f"trackio show --project={PROJECT}, run {name}"

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


SERVICES: dict[str, Callable[[About], Service]] = {"wandb": Wandb, "mlflow": MLflow, "trackio": Trackio}


def check_installed(names: Sequence[str]) -> None:
    """Raises UserError for a tracker that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"config.log.to has '{name}', which is not installed: pip install 'maxmap[{name}]'.")


class Tracker:
    """Hands rows to a tracker in a thread; what goes wrong there is told once, and then the run goes on without it.

    Args:
      name: a key of `SERVICES`.
      about: the run.
      tell: prints a line.
    """

    def __init__(self, name: str, about: About, tell: Callable[[str], None]):
        self._name, self._about, self._tell = name, about, tell
        self._rows: queue.Queue[tuple[Mapping[str, float], int] | None] = queue.Queue(_QUEUE)
        self._gone = False
        self._thread = threading.Thread(target=self._work, daemon=True, name=name)
        self._thread.start()

    def scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Hands over a row, unless the tracker has it from an earlier start."""
        if step > self._about.logged.get(kind, -1):
            self._put(({f"{kind}/{key}": value for key, value in values.items()}, step))

    def end(self) -> None:
        """Says that no row follows."""
        self._put(None)

    def wait(self, seconds: float) -> None:
        """Waits until all is handed over, or gives up."""
        self._thread.join(max(seconds, 0))
        if self._thread.is_alive():
            self._give_up(f"it did not take the last rows in {PATIENCE} s")

    def _put(self, row: tuple[Mapping[str, float], int] | None) -> None:
        if self._gone:
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._give_up(f"{_QUEUE:,} rows wait for it")

    def _give_up(self, why: str) -> None:
        if not self._gone:
            self._gone = True
            self._tell(f"{self._name} gets no more of this run ({why}): the other logs go on")

    def _work(self) -> None:
        try:
            service = SERVICES[self._name](self._about)
            self._tell(f"{self._name}: {service.where}")
            while not self._gone and (row := self._rows.get()) is not None:
                service.scalars(*row)
            service.close()
        except Exception as error:
            self._give_up(reason(error))


def close(trackers: Sequence[Tracker]) -> None:
    """Waits until all is handed over, for `PATIENCE` seconds at most, whatever the number of trackers."""
    for tracker in trackers:
        tracker.end()
    until = time.monotonic() + PATIENCE
    for tracker in trackers:
        tracker.wait(until - time.monotonic())
