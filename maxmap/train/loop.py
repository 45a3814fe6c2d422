"""A training run: mesh, data, model, optimizer, state, then the loop. The config is read here and nowhere below."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.errors import FlaxError
from jax.sharding import Mesh

from maxmap import allocator, checkpoint, evaluate
from maxmap.checkpoint import Checkpoints
from maxmap.convert.adapt import adapt
from maxmap.convert.load import read_model
from maxmap.data import augment, mix
from maxmap.data.pipeline import Data, open_data
from maxmap.errors import UserError, call
from maxmap.losses import total_loss
from maxmap.models import Classifier, block_paths, create_model
from maxmap.optim import make_optimizer
from maxmap.schedule import Schedule, make_schedule
from maxmap.sharding import check_batch, make_mesh, replicated, split_batch, to_devices
from maxmap.train.report import Report
from maxmap.train.resume import check_changes, only_run
from maxmap.train.state import TrainState, abstract, create
from maxmap.train.step import BATCH_NORMS, Loss, Prepare, make_diagnosis, make_train_step
from maxmap.train.watch import Interrupts, Watch, Watchdog

Array = jax.Array
Config = Mapping[str, Any]


class Numbers(NamedTuple):
    """What the sections `evaluate`, `checkpoint` and `log` say, looked through."""

    eval_batch: int
    eval_epochs: int
    save_every: int
    keep: int
    log_every: int
    max_skips: int
    hang_minutes: float


@dataclasses.dataclass(frozen=True)
class Parts:
    """All that a config describes, built; nothing of it changes while the run goes on.

    Attributes:
      create_state: function of a key that makes a fresh state.
      like: the shapes and shardings of a state.
      train_step: jitted function of state, batch and key.
      diagnose: the same arguments; see `maxmap.train.step.make_diagnosis`.
      info: what a checkpoint says of itself.
    """

    numbers: Numbers
    batch_size: int
    seed: int
    mesh: Mesh
    data: Data
    model: Classifier
    schedule: Schedule
    steps_per_epoch: int
    total_steps: int
    create_state: Callable[[Array], TrainState]
    like: TrainState
    train_step: Callable[..., tuple[TrainState, dict[str, Array]]]
    diagnose: Callable[..., Any]
    eval_step: evaluate.EvalStep
    info: dict[str, Any]

    def keys(self) -> tuple[Array, Array]:
        """Returns the keys of the fresh state and of the steps."""
        init, train = jax.random.split(jax.random.key(self.seed))
        return init, train


def run(config: Config, workdir: str | Path, *, allow_changes: bool = False) -> dict[str, Any]:
    """Trains, or goes on where the newest checkpoint of `workdir` stands.

    Args:
      config: as the files in `configs/` make it; each section is the keyword arguments of one function.
      workdir: folder of the run, perhaps in a bucket: `checkpoints/`, `config.json`, `metrics.jsonl`, `tensorboard/`,
        `curves.png` and `eval.json`.
      allow_changes: go on with a run although the config changed in what it computes.

    Returns:
      The content of `eval.json`, of the last evaluation.

    Raises:
      UserError: something in the config, the data or the workdir does not fit; nothing has been overwritten.
      SystemExit: after Ctrl-C (130) or SIGTERM (`RESTART`), when the state is saved.
    """
    evaluate.check_config(config)
    numbers = _numbers(config)
    mesh, data = _open(config)
    kwargs = evaluate.model_kwargs(config, len(data.classes))
    found, changes = _own_checkpoint(config, workdir, kwargs, mesh, allow_changes)
    parts = _build(config, numbers, kwargs, mesh, data)
    state, fitted = _first_state(parts, workdir, found, config["init_from"])
    start = 0 if found is None else found["step"]
    if not checkpoint.in_bucket(workdir):  # which has no folders, only names
        try:
            Path(workdir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {workdir} ({error.strerror}): give another --workdir.") from error

    with contextlib.ExitStack() as stack:
        stack.enter_context(checkpoint.disk_errors(workdir, "be written to"))
        look = stack.enter_context(only_run(workdir))
        if jax.process_index() == 0:
            text = json.dumps(parts.info["config"], indent=2) + "\n"
            checkpoint.write_text(checkpoint.place(workdir) / "config.json", text)
        report = Report(workdir, step=start, total_steps=parts.total_steps, batch_size=parts.batch_size, look=look)
        stack.enter_context(contextlib.closing(report))
        report.tell(
            f"{kwargs['name']}: {evaluate.count_parameters(state.params):,} parameters, {data.num_train} training and "
            f"{data.num_eval} evaluation images, {mesh.devices.size} {jax.default_backend()} device(s), steps {start} "
            f"to {parts.total_steps}; writing to {workdir}"
        )
        for change in changes:
            report.tell(f"changed since the checkpoint: {change}")
        if fitted:
            report.tell(f"from {config['init_from']}: {fitted}")
        loop = Loop(parts, workdir, report, look, state, start)
        return loop.train() if start < parts.total_steps else loop.evaluate()


class Loop:
    """The steps of a run, with what happens between them.

    Args:
      parts: of the run.
      workdir: of the run.
      report: where it is told.
      look: is called before anything is written; see `maxmap.train.resume.only_run`.
      state: to go on from.
      step: that it stands at.
    """

    def __init__(
        self,
        parts: Parts,
        workdir: str | Path,
        report: Report,
        look: Callable[[], None],
        state: TrainState,
        step: int,
    ):
        self._parts, self._workdir, self._report, self._look = parts, workdir, report, look
        self._state, self._step, self._first = state, step, step
        self._watch = Watch(workdir, report, step=step, max_skips=parts.numbers.max_skips)
        hang = checkpoint.place(workdir) / f"hang{jax.process_index() or ''}.txt"
        self._dog = Watchdog(hang, 60 * parts.numbers.hang_minutes)
        self._key = parts.keys()[1]
        self._last: tuple[Mapping[str, Any], Mapping[str, Array]] | None = None  # batch and metrics, not yet looked at
        self._result: dict[str, Any] = {}
        self._undecoded = 0
        # On a CPU a step takes memory of its own as it is sent, and what is done meanwhile needs the same cores.
        self._ahead = jax.default_backend() != "cpu"

    def train(self) -> dict[str, Any]:
        """Takes all steps that are left; returns the last evaluation."""
        parts, report = self._parts, self._report
        total, batch_size = parts.total_steps, parts.batch_size
        with contextlib.ExitStack() as stack:
            batches = stack.enter_context(
                contextlib.closing(
                    parts.data.train_batches(
                        batch_size,
                        seed=parts.seed,
                        start_step=self._step,
                        num_steps=total - self._step,
                        process_index=jax.process_index(),
                        process_count=jax.process_count(),
                    )
                )
            )
            checkpoints = Checkpoints(self._workdir, keep=parts.numbers.keep)
            stack.enter_context(contextlib.closing(checkpoints))
            interrupts = stack.enter_context(Interrupts())
            stack.enter_context(self._dog)
            while True:
                stop = interrupts.reached(self._step)
                self._between(checkpoints, stop)
                if self._step == total:
                    return self._result
                if stop:
                    checkpoints.wait()
                    report.tell(f"stopped after step {self._step}, which is saved: the same command goes on from there")
                    raise SystemExit(interrupts.exit_code())
                checkpoints.check()
                self._advance(batches)

    def evaluate(self) -> dict[str, Any]:
        """Evaluates the averaged weights where there are any, and writes `eval.json`; returns its content."""
        parts, state, step = self._parts, self._state, self._step
        variables, weights = (state.variables(), "raw") if state.ema is None else (state.ema, "ema")
        result = evaluate.evaluate(parts.eval_step, variables, parts.data, parts.numbers.eval_batch, parts.mesh)
        self._report.evaluation(step, step / parts.steps_per_epoch, result)
        for name in result["skipped"]:
            self._report.tell(f"skipped, cannot be decoded: {name}")
        result = evaluate.report(result, state.params, {**parts.info, "step": step, "weights": weights})
        evaluate.write(result, self._workdir)
        return result

    def _between(self, checkpoints: Checkpoints, stop: bool) -> None:
        """Evaluates and saves, where it is time for that."""
        step, numbers, end = self._step, self._parts.numbers, self._step == self._parts.total_steps
        moved = step > self._first
        evaluating = moved and (step % (numbers.eval_epochs * self._parts.steps_per_epoch) == 0 or end)
        saving = stop or (moved and (step % numbers.save_every == 0 or end))
        if not evaluating and not saving:
            return
        self._settle()  # what a checkpoint follows has to be in the log: a resumed run does not take the step again
        began = time.perf_counter()
        self._look()
        if evaluating:
            self._dog.enter(f"step {step} is evaluated")
            self._result = self.evaluate()
        self._report.keep()
        if saving:
            self._dog.enter(f"step {step} is saved")
            score = self._result["top1"] if evaluating else None
            checkpoints.save(step, self._state.items(), self._parts.info, score)
        self._report.left_out(time.perf_counter() - began)

    def _advance(self, batches: Iterator[dict[str, Any]]) -> None:
        """Sends a step on its way; an accelerator computes it while the numbers of the one before are looked at."""
        began = time.perf_counter()
        self._dog.enter(f"step {self._step + 1} waits for its data")
        batch = next(batches)
        self._report.waited(time.perf_counter() - began)
        for index in batch["skipped"][batch["skipped"] >= 0]:
            self._undecoded += 1
            name = self._train_name(int(index))
            self._report.warn(f"skipped ({self._undecoded} so far), cannot be decoded: {name}")
        self._dog.enter(f"step {self._step + 1} computes")  # or compiles, or is only sent
        on_devices = to_devices({"image": batch["image"], "label": batch["label"]}, self._parts.mesh)
        self._state, metrics = self._parts.train_step(self._state, on_devices, self._key)
        self._report.advanced()
        self._settle()
        self._step, self._last = self._step + 1, (batch, metrics)
        if self._watch.skips or not self._ahead:
            self._settle()  # at once; after a skip, because the state still is what that step saw
        allocator.relieve()

    def _settle(self) -> None:
        """Looks at the numbers of the newest step that was not looked at yet, if there is one."""
        if self._last is None:
            return
        parts, step = self._parts, self._step
        (batch, metrics), self._last = self._last, None
        self._dog.enter(f"step {step} computes")
        stopping = self._watch.look(step, metrics, batch["index"])
        if not self._watch.skips and (step % parts.numbers.log_every == 0 or step in (1, parts.total_steps)):
            numbers = _fetch({**metrics, "learning_rate": parts.schedule(step - 1)})
            self._report.train(step, step / parts.steps_per_epoch, numbers)
        if stopping:
            on_devices = to_devices({"image": batch["image"], "label": batch["label"]}, parts.mesh)
            layers = parts.diagnose(self._state, on_devices, jax.random.fold_in(self._key, step - 1))
            raise self._watch.stop(step, metrics, batch["index"], self._train_name, layers)

    def _train_name(self, index: int) -> str:
        assert self._parts.data.train is not None
        return self._parts.data.train.name(index)


def _numbers(config: Config) -> Numbers:
    """Looks through all numbers that the loop itself needs."""
    _check_numbers(config)
    eval_batch, eval_epochs = call(evaluate.settings, "evaluate", config["evaluate"])
    save_every, keep = call(_saving, "checkpoint", config["checkpoint"])
    log_every, max_skips, hang_minutes = call(_logging, "log", config["log"])
    return Numbers(eval_batch, eval_epochs, save_every, keep, log_every, max_skips, hang_minutes)


def _open(config: Config) -> tuple[Mesh, Data]:
    """Makes the mesh, and opens the data."""
    mesh = call(make_mesh, "mesh", config["mesh"])
    data = call(open_data, "data", config["data"])
    if data.train is None:
        raise UserError("there is no training data: set --config.data.train_split.")
    if data.val is None:
        raise UserError("there is no evaluation data: set --config.data.val_split.")
    return mesh, data


def _own_checkpoint(
    config: Config, workdir: str | Path, kwargs: Mapping[str, Any], mesh: Mesh, allow: bool
) -> tuple[dict[str, Any] | None, list[str]]:
    """Returns the info of the checkpoint to go on from, if there is one, and the changes of the config since then."""
    found = checkpoint.read_info(workdir)
    if found is None:
        return None, []
    evaluate.check_same_model(kwargs, found["model"], workdir)
    before, now = found.get("config", config), {**config}
    if config["batch_norm"] != "sync":  # which counts over the devices
        before, now = {**before, "devices": found.get("devices", mesh.size)}, {**now, "devices": mesh.size}
    return found, check_changes(before, now, workdir, allow=allow)


def _build(config: Config, numbers: Numbers, kwargs: dict[str, Any], mesh: Mesh, data: Data) -> Parts:
    """Builds model, optimizer and steps, and tries out what can be traced before anything is written."""
    model: Classifier = call(create_model, "model", kwargs)
    batch_size, accumulate = config["batch_size"], config["accumulate"]
    if batch_size % accumulate:
        raise UserError(f"config.accumulate is {accumulate}, which does not divide config.batch_size {batch_size}.")
    check_batch(batch_size // accumulate, mesh, "config.batch_size / config.accumulate =")
    steps_per_epoch = data.steps_per_epoch(batch_size)
    schedule = call(
        make_schedule, "schedule", config["schedule"], steps_per_epoch=steps_per_epoch, epochs=config["epochs"]
    )
    blocks = block_paths(model) if config["optim"].get("layer_decay") is not None else ()
    optimizer = call(make_optimizer, "optim", config["optim"], schedule, blocks=blocks)
    prepare, loss = make_prepare(config, data), _make_loss(config)
    images = jax.ShapeDtypeStruct((batch_size, data.image_size, data.image_size, 3), jnp.uint8)
    _try_out(prepare, loss, images, len(data.classes))
    ema_decay = config["ema_decay"]

    def create_state(key: Array) -> TrainState:
        one = jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32)
        return create(model, optimizer, key, one, ema=ema_decay is not None)

    try:
        like = abstract(jax.eval_shape(create_state, jax.random.key(0)), mesh)
    except (ValueError, TypeError, FlaxError) as error:
        raise UserError(f"{kwargs['name']} with images of {data.image_size} pixels: {error}.") from None
    if data.preprocessing["image_size"] != data.image_size:
        evaluate.check_image_size(model, like.variables(), data.preprocessing["image_size"])

    dtype = jnp.dtype(config["dtype"])
    same, split = replicated(mesh), split_batch(mesh)
    state_sharding = jax.tree.map(lambda leaf: leaf.sharding, like)
    train_step = make_train_step(
        model,
        optimizer,
        loss,
        prepare,
        mesh=mesh,
        dtype=dtype,
        ema_decay=ema_decay,
        accumulate=accumulate,
        batch_norm=config["batch_norm"],
    )
    return Parts(
        numbers=numbers,
        batch_size=batch_size,
        seed=config["seed"],
        mesh=mesh,
        data=data,
        model=model,
        schedule=schedule,
        steps_per_epoch=steps_per_epoch,
        total_steps=min(schedule.total_steps, config["steps"] or schedule.total_steps),
        create_state=create_state,
        like=like,
        train_step=jax.jit(
            train_step,
            in_shardings=(state_sharding, {"image": split, "label": split}, same),
            out_shardings=(state_sharding, same),
            donate_argnums=0,
        ),
        diagnose=jax.jit(make_diagnosis(model, loss, prepare, mesh=mesh, dtype=dtype)),
        eval_step=evaluate.make_eval_step(model, data.preprocessing, mesh, dtype),
        info={
            "model": kwargs,
            "classes": list(data.classes),
            "preprocessing": data.preprocessing,
            "devices": mesh.size,
            "config": json.loads(json.dumps(config)),
        },
    )


def _first_state(
    parts: Parts, workdir: str | Path, found: Mapping[str, Any] | None, init_from: str | None
) -> tuple[TrainState, str]:
    """Reads the run's own checkpoint, else starts from the model that `init_from` names, else from scratch.

    Returns:
      The state, and what had to be done to the model of `init_from`.
    """
    if found is not None:
        return _restore(workdir, found["step"], parts.like), ""
    given, fitted = None, ""
    if init_from:
        given, fitted = _read_variables(init_from, parts.model, parts.like, parts.seed)
    sharding = jax.tree.map(lambda leaf: leaf.sharding, parts.like)
    state = jax.jit(parts.create_state, out_shardings=sharding)(parts.keys()[0])
    return (state if given is None else jax.device_put(_with_variables(state, given), sharding)), fitted


def _fetch(metrics: Mapping[str, Array]) -> dict[str, float]:
    return {key: float(value) for key, value in jax.device_get(dict(metrics)).items() if key != "skipped"}


def _check_numbers(config: Config) -> None:
    """Raises UserError for numbers of the config's top level that mean nothing."""
    seed, steps, accumulate, decay = (config[key] for key in ("seed", "steps", "accumulate", "ema_decay"))
    if not 0 <= seed < 2**32:
        raise UserError(f"config.seed is {seed}: give one from 0 to {2**32 - 1}.")
    if steps is not None and steps < 1:
        raise UserError(f"config.steps is {steps}: give 1 or more, or leave it out to train for config.epochs.")
    if accumulate < 1:
        raise UserError(f"config.accumulate is {accumulate}: give 1, or the number of micro-batches in a batch.")
    if config["batch_norm"] not in BATCH_NORMS:
        raise UserError(f"config.batch_norm is {config['batch_norm']!r}: give one of {', '.join(BATCH_NORMS)}.")
    if decay is not None and not 0 <= decay < 1:
        raise UserError(f"config.ema_decay is {decay}: give the share that is kept, such as 0.9999, or leave it out.")


def _saving(*, every: int, keep: int) -> tuple[int, int]:
    """Returns the section `checkpoint`, looked through.

    Args:
      every: steps between two checkpoints.
      keep: newest ones that are kept, beside the one with the best top-1 of those that were evaluated.
    """
    for key, value in {"every": every, "keep": keep}.items():
        if value < 1:
            raise UserError(f"config.checkpoint.{key} is {value}: give 1 or more.")
    return every, keep


def _logging(*, every: int, max_skips: int = 10, hang_minutes: float = 30.0) -> tuple[int, int, float]:
    """Returns the section `log`, looked through.

    Args:
      every: steps between two lines of the log.
      max_skips: steps in a row that are left out because loss or gradients are not finite; one more ends the run.
      hang_minutes: after which a step, an evaluation or a save that does not end is reported, with its stack.
    """
    if every < 1:
        raise UserError(f"config.log.every is {every}: give 1 or more.")
    if max_skips < 0:
        raise UserError(f"config.log.max_skips is {max_skips}: give 0 or more.")
    if hang_minutes <= 0:
        raise UserError(f"config.log.hang_minutes is {hang_minutes}: give minutes, such as 30.")
    return every, max_skips, hang_minutes


def make_prepare(config: Config, data: Data) -> Prepare:
    """What happens to a batch on the device: flips and RandAugment, mixing, normalisation, erasing."""
    if config["data"].get("rand_augment") and config["augment"].get("rand_augment"):
        raise UserError("config.data.rand_augment and config.augment.rand_augment are both set: leave one out.")
    mean, std, num_classes = data.preprocessing["mean"], data.preprocessing["std"], len(data.classes)

    def prepare(key: Array, images: Array, labels: Array) -> tuple[Array, Array]:
        augment_key, mix_key, erase_key = jax.random.split(key, 3)
        images = call(augment.augment, "augment", config["augment"], augment_key, images, mean=mean)
        images, targets = call(mix.mix, "mix", config["mix"], mix_key, images, labels, num_classes=num_classes)
        images = augment.normalize(images, mean, std)
        return call(augment.erase, "erase", config["erase"], erase_key, images), targets

    return prepare


def _make_loss(config: Config) -> Loss:
    def loss(outputs: Mapping[str, Array], targets: Array) -> tuple[Array, dict[str, Array]]:
        return call(total_loss, "loss", config["loss"], outputs, targets)

    return loss


def _try_out(prepare: Prepare, loss: Loss, images: jax.ShapeDtypeStruct, num_classes: int) -> None:
    """Traces augmentation and loss once, so that a mistake in their sections shows before anything is built."""
    labels = jax.ShapeDtypeStruct(images.shape[:1], jnp.int32)
    _, targets = jax.eval_shape(prepare, jax.random.key(0), images, labels)
    logits = jax.ShapeDtypeStruct((1, images.shape[0], num_classes), jnp.float32)
    jax.eval_shape(loss, {"logits": logits}, targets)


def _restore(workdir: str | Path, step: int, like: TrainState) -> TrainState:
    """Reads the state of a run whose model is known to be the same."""
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        try:
            return TrainState.from_items(checkpoints.restore(step, like.items()))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the checkpoint in {workdir} was trained with another optimizer or averaging, which config.json there "
                "names: give that config, or another folder and this one as --config.init_from."
            ) from error


def _read_variables(path: str, model: Classifier, like: TrainState, seed: int) -> tuple[dict[str, Any], str]:
    """Reads a model to start from, and fits it to the one of the run; returns what was changed, too."""
    variables, _ = read_model(path)
    wanted = like.variables()
    if jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, wanted):
        return variables, f"loaded {len(jax.tree.leaves(variables))} entries as they were"
    try:
        flat = traverse_util.flatten_dict(variables)
        leaves, changes = adapt(flat, model, in_channels=3, other_head=True, seed=seed)
    except UserError as error:
        raise UserError(f"the checkpoint in {path} cannot be started from: {error}") from None
    return traverse_util.unflatten_dict(leaves), str(changes)


def _with_variables(state: TrainState, variables: Mapping[str, Any]) -> TrainState:
    """Replaces the model of a fresh state; the average starts from it too, as a copy: a step donates both."""
    ema = None if state.ema is None else jax.tree.map(np.copy, dict(variables))
    model_state = {name: values for name, values in variables.items() if name != "params"}
    return dataclasses.replace(state, params=variables["params"], model_state=model_state, ema=ema)
