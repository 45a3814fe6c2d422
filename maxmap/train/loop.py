"""A training run: where it starts, then the loop of steps with what happens between them."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from maxmap import checkpoint, evaluate, storage
from maxmap.checkpoint import Checkpoints
from maxmap.config import flatten
from maxmap.cost import count_parameters
from maxmap.errors import UserError, printable
from maxmap.operations import Array, kernels_of, platform
from maxmap.recipe import Recipe
from maxmap.runtime import freed_memory
from maxmap.sharding import to_devices
from maxmap.train.build import Parts, build, open_data
from maxmap.train.goodput import Goodput, Phase
from maxmap.train.profiler import Profiler, check_steps
from maxmap.train.report import Report
from maxmap.train.resume import only_run
from maxmap.train.start import find_checkpoint, first_state
from maxmap.train.state import TrainState
from maxmap.train.teacher import matched, read_teacher
from maxmap.train.trackers import check_installed
from maxmap.train.watch import Interrupts, Watch, Watchdog


def run(recipe: Recipe, workdir: str | Path, *, allow_changes: bool = False) -> dict[str, Any]:
    """Trains, or goes on from the newest checkpoint in `workdir`.

    Args:
      recipe: What to train; see `maxmap.config.bind`.
      workdir: Folder of the run, perhaps in a bucket: `checkpoints/`, `config.json`, `metrics.jsonl`, `tensorboard/`,
        `curves.png` and `eval.json`.
      allow_changes: Go on with a run although its config changed in what it computes.

    Returns:
      The content of `eval.json`, of the last evaluation.

    Raises:
      UserError: Something in the recipe, the data or the workdir does not fit; nothing has been overwritten.
      SystemExit: After Ctrl-C (130) or SIGTERM (`RESTART`), when the state is saved.
    """
    goodput, workdir = Goodput(), storage.expand(workdir)
    check_installed(recipe.log.trackers)
    mesh = recipe.mesh()
    data = open_data(recipe)
    teacher = read_teacher(recipe)
    found, changes, data = find_checkpoint(recipe, workdir, data, mesh, teacher, allow_changes=allow_changes)
    if teacher is not None:
        teacher, taught = matched(teacher, data)
    parts = build(recipe, mesh, data, found, teacher)
    check_steps(recipe.log.profile, parts.total_steps)
    state, adapted = first_state(parts, workdir, found)
    start = 0 if found is None else found["step"]
    _make_folder(workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(checkpoint.write_errors(workdir, "be written to"))
        check_ownership = stack.enter_context(only_run(workdir))
        if jax.process_index() == 0:
            text = json.dumps(parts.info["config"], indent=2) + "\n"
            storage.write_text(storage.resolve(workdir) / "config.json", text)
        report = Report(
            workdir,
            step=start,
            total_steps=parts.total_steps,
            batch_size=recipe.batch_size,
            goodput=goodput,
            trackers=recipe.log.trackers,
            config=flatten(recipe.values),
            check_ownership=check_ownership,
        )
        stack.enter_context(contextlib.closing(report))
        report.tell(
            f"{parts.info['model']['name']}: {count_parameters(state.params):,} parameters, {data.num_train} training "
            f"and {data.num_eval} evaluation images, {mesh.devices.size} {jax.default_backend()} device(s), steps "
            f"{start} to {parts.total_steps}; writing to {workdir}"
        )
        for change in changes:
            report.tell(f"changed since the checkpoint: {change}")
        if adapted:
            report.tell(f"from {recipe.init_from}: {adapted}")
        if teacher is not None:
            report.tell(f"taught by {teacher.path}: {taught}")
        best = Best.of(found)
        loop = Loop(parts, workdir, report, check_ownership, state, start, best)
        over = start == parts.total_steps or best.out_of_patience(recipe.evaluate.patience)
        return loop.evaluate() if over else loop.train()


def _make_folder(workdir: str | Path) -> None:
    if storage.in_bucket(workdir):  # a bucket has no folders, only names
        return
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {workdir} ({error.strerror}): give another --workdir.") from error


@dataclasses.dataclass(frozen=True)
class Best:
    """The best evaluation of a run, which its checkpoints keep, so that an ended run stays ended.

    Attributes:
      score: Its figure that `Task.score` names; None before any evaluation.
      step: At which it was.
      since: Evaluations since then.
    """

    score: float | None = None
    step: int = 0
    since: int = 0

    @classmethod
    def of(cls, info: Mapping[str, Any] | None) -> "Best":
        """Returns the best evaluation up to a checkpoint; older ones call the score 'top1', and -1 is none."""
        kept = dict((info or {}).get("best", {}))
        if "top1" in kept:
            top1 = kept.pop("top1")
            kept["score"] = top1 if top1 >= 0 else None
        return cls(**kept)

    def after(self, score: float, step: int) -> "Best":
        """Returns the best evaluation after one more."""
        better = self.score is None or score > self.score
        return Best(score, step) if better else dataclasses.replace(self, since=self.since + 1)

    def out_of_patience(self, patience: int | None) -> bool:
        """Tells whether training ends now; see `maxmap.recipe.Evaluation`."""
        return patience is not None and self.since >= patience


class Loop:
    """The steps of a run, with the evaluations and checkpoints between them.

    Args:
      parts: Of the run.
      workdir: Of the run.
      report: Prints and logs.
      check_ownership: Function to call before anything is written; see `maxmap.train.resume.only_run`.
      state: State to start from.
      step: Number of steps that this state has taken.
      best: Of the evaluations before.
    """

    def __init__(
        self,
        parts: Parts,
        workdir: str | Path,
        report: Report,
        check_ownership: Callable[[], None],
        state: TrainState,
        step: int,
        best: Best,
    ):
        self._parts, self._workdir, self._report, self._check_ownership = parts, workdir, report, check_ownership
        self._state, self._step, self._first = state, step, step
        self._watch = Watch(workdir, report, max_skips=parts.recipe.log.max_skips)
        hang = storage.resolve(workdir) / f"hang{jax.process_index() or ''}.txt"
        self._dog = Watchdog(hang, 60 * parts.recipe.log.hang_minutes)
        self._profiler = Profiler(workdir, report, parts.recipe.log.profile)
        self._constant = (parts.keys()[1], *parts.teacher)
        self._last: tuple[Mapping[str, Any], Mapping[str, Array]] | None = (
            None  # batch and metrics of a step, to be checked
        )
        self._train_step: Callable[..., tuple[TrainState, dict[str, Array]]] | None = None  # compiled at the first step
        self._result: dict[str, Any] = {}
        self._best = best
        self._undecoded = 0
        # An accelerator computes a step while the host checks the one before. On a CPU both would share the cores, and
        # a second step in flight would need its memory a second time.
        self._ahead = jax.default_backend() != "cpu"

    def train(self) -> dict[str, Any]:
        """Takes the remaining steps, and returns the last evaluation."""
        parts, report = self._parts, self._report
        total, batch_size = parts.total_steps, parts.recipe.batch_size
        with contextlib.ExitStack() as stack:
            batches = stack.enter_context(
                contextlib.closing(
                    parts.data.train_batches(
                        batch_size,
                        seed=parts.recipe.seed,
                        start_step=self._step,
                        num_steps=total - self._step,
                        process_index=jax.process_index(),
                        process_count=jax.process_count(),
                    )
                )
            )
            checkpoints = Checkpoints(self._workdir, keep=parts.recipe.checkpoint.keep)
            stack.enter_context(contextlib.closing(checkpoints))
            interrupts = stack.enter_context(Interrupts())
            stack.enter_context(self._dog)
            stack.enter_context(contextlib.closing(self._profiler))
            while True:
                stop = interrupts.reached(self._step)
                self._between(checkpoints, stop)
                over = self._step == total or self._best.out_of_patience(parts.recipe.evaluate.patience)
                if over or stop:
                    checkpoints.wait()
                    report.ended(self._step)
                if over:
                    return self._result
                if stop:
                    report.tell(f"stopped after step {self._step}, which is saved: the same command goes on from there")
                    raise SystemExit(interrupts.exit_code())
                checkpoints.check()
                with self._profiler.step(self._step + 1, self._check_last_step):
                    self._advance(batches)

    def evaluate(self) -> dict[str, Any]:
        """Evaluates the averaged weights where there are any, and writes `eval.json`; returns its content."""
        parts, state, step = self._parts, self._state, self._step
        variables, weights = (state.variables(), "raw") if state.ema is None else (state.ema, "ema")
        batch_size = parts.recipe.evaluate.batch_size
        result = evaluate.evaluate(parts.eval_step, variables, parts.data, batch_size, parts.mesh, task=parts.task)
        self._report.evaluation(step, step / parts.steps_per_epoch, result, parts.task)
        for name in result["skipped"]:
            self._report.tell(f"skipped, cannot be decoded: {name}")
        result = evaluate.report(
            result, count_parameters(state.params), {**parts.info, "step": step, "weights": weights}
        )
        evaluate.write(result, self._workdir)
        return result

    def _enter(self, phase: Phase, step: int) -> None:
        """Begins a phase, for the count of the time and for the watchdog."""
        self._report.goodput.enter(phase)
        self._dog.enter(f"{phase} at step {step}")

    def _between(self, checkpoints: Checkpoints, stop: bool) -> None:
        """Evaluates and saves if an evaluation or a checkpoint is due."""
        step, recipe, epoch = self._step, self._parts.recipe, self._parts.steps_per_epoch
        moved, end = step > self._first, step == self._parts.total_steps
        evaluating = moved and (step % (recipe.evaluate.every_epochs * epoch) == 0 or end)
        saving = stop or (moved and (step % (recipe.checkpoint.every or epoch) == 0 or end))
        if not evaluating and not saving:
            return
        self._check_last_step()  # a resumed run does not repeat this step, so its line must be in the log by now
        self._check_ownership()
        if evaluating:
            self._enter("evaluating", step)
            self._result = self.evaluate()
            self._best = self._best.after(self._result[self._parts.task.score], step)
            if self._best.out_of_patience(recipe.evaluate.patience) and not end:
                saving = True
                task = self._parts.task
                self._report.tell(
                    f"training ends early: no better {task.curves[0][task.score]} in {self._best.since} evaluation(s) "
                    f"since step {self._best.step}, which had {self._best.score:.4g}"
                )
        self._enter("saving", step)
        self._report.upload()
        if saving:
            score = self._result[self._parts.task.score] if evaluating else None
            info = {**self._parts.info, "best": dataclasses.asdict(self._best)}
            checkpoints.save(step, self._state.items(), info, score)

    def _advance(self, batches: Iterator[dict[str, Any]]) -> None:
        """Starts the next step, and checks the metrics of the step before it while the accelerator computes."""
        step = self._step + 1
        self._enter("waiting for data", step)
        batch = next(batches)
        self._enter("computing", step)
        for index in batch["skipped"][batch["skipped"] >= 0]:
            self._undecoded += 1
            name = self._train_name(int(index))
            self._report.warn(f"skipped ({self._undecoded} so far), cannot be decoded: {printable(name)}")
        on_devices = to_devices({"image": batch["image"], "label": batch["label"]}, self._parts.mesh)
        if self._train_step is None:
            self._enter("compiling", step)
            traced = self._parts.train_step.trace(self._state, on_devices, *self._constant)
            self._train_step = traced.lower().compile()
            self._report.compiled()
            if platform() != "cpu":
                self._report.tell(f"kernels written by hand: {kernels_of(traced)}")
            self._enter("computing", step)
        self._state, metrics = self._train_step(self._state, on_devices, *self._constant)
        self._report.advanced()
        self._check_last_step()
        self._step, self._last = step, (batch, metrics)
        if self._watch.skips or not self._ahead:
            self._check_last_step()  # at once after a skip: the state is still the one that the step got
        freed_memory.trim_if_grown()

    def _check_last_step(self) -> None:
        """Checks and logs the metrics of the newest step, unless that is done already."""
        if self._last is None:
            return
        parts, step = self._parts, self._step
        (batch, metrics), self._last = self._last, None
        self._enter("computing", step)
        stopping = self._watch.check(step, metrics, batch["index"])
        if not self._watch.skips and (step % parts.recipe.log.every == 0 or step in (1, parts.total_steps)):
            numbers = _fetch({**metrics, "learning_rate": parts.schedule(step - 1)})
            self._report.train(step, step / parts.steps_per_epoch, numbers)
        elif step == self._first + 2:
            self._report.time_left(step)
        if stopping:
            on_devices = to_devices({"image": batch["image"], "label": batch["label"]}, parts.mesh)
            key, *teacher = self._constant
            layers = parts.diagnose(self._state, on_devices, jax.random.fold_in(key, step - 1), *teacher)
            raise self._watch.stop(step, metrics, batch["index"], self._train_name, layers)

    def _train_name(self, index: int) -> str:
        assert self._parts.data.train is not None
        return self._parts.data.train.name(index)


def _fetch(metrics: Mapping[str, Array]) -> dict[str, float]:
    """Copies metrics to the host."""
    return {key: float(value) for key, value in jax.device_get(dict(metrics)).items() if key != "skipped"}
