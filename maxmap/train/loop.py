"""A training run: mesh, data, model, optimizer, state, then the loop. The config is read here and nowhere below."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.errors import FlaxError

from maxmap import allocator, checkpoint, evaluate
from maxmap.checkpoint import Checkpoints
from maxmap.convert.adapt import adapt
from maxmap.convert.load import read_model
from maxmap.data import augment, mix
from maxmap.data.pipeline import Data, open_data
from maxmap.errors import UserError, call
from maxmap.models import Classifier, create_model
from maxmap.sharding import check_batch, make_mesh, replicated, split_batch, to_devices
from maxmap.train.losses import total_loss
from maxmap.train.optim import make_optimizer
from maxmap.train.report import Report
from maxmap.train.resume import check_changes, only_run
from maxmap.train.schedule import make_schedule
from maxmap.train.state import TrainState, abstract, create
from maxmap.train.step import BATCH_NORMS, Loss, Prepare, make_diagnosis, make_train_step
from maxmap.train.watch import Interrupts, Watch, Watchdog

Array = jax.Array
Config = Mapping[str, Any]


def run(config: Config, workdir: str | Path, *, allow_changes: bool = False) -> dict[str, Any]:
    """Trains, or goes on where the newest checkpoint of `workdir` stands.

    Args:
      config: as the files in `configs/` make it; each section is the keyword arguments of one function.
      workdir: folder of the run: `checkpoints/`, `config.json`, `metrics.jsonl`, `tensorboard/`, `curves.png` and
        `eval.json`.
      allow_changes: go on with a run although the config changed in what it computes.

    Returns:
      The content of `eval.json`, of the last evaluation.

    Raises:
      UserError: something in the config, the data or the workdir does not fit; nothing has been overwritten.
      SystemExit: after Ctrl-C (130) or SIGTERM (`RESTART`), when the state is saved.
    """
    evaluate.check_config(config)
    _check_numbers(config)
    eval_batch, eval_every = call(evaluate.settings, "evaluate", config["evaluate"])
    save_every, keep = call(_saving, "checkpoint", config["checkpoint"])
    log_every, max_skips, hang_minutes = call(_logging, "log", config["log"])
    mesh = call(make_mesh, "mesh", config["mesh"])
    data = call(open_data, "data", config["data"])
    if data.train is None:
        raise UserError("there is no training data: set --config.data.train_split.")
    if data.val is None:
        raise UserError("there is no evaluation data: set --config.data.val_split.")
    kwargs = evaluate.model_kwargs(config, len(data.classes))
    found, changes = checkpoint.read_info(workdir), []
    if found is not None:
        evaluate.check_same_model(kwargs, found["model"], workdir)
        before, now = found.get("config", config), {**config}
        if config["batch_norm"] != "sync":  # which counts over the devices
            before, now = {**before, "devices": found.get("devices", mesh.size)}, {**now, "devices": mesh.size}
        changes = check_changes(before, now, workdir, allow=allow_changes)
    model = call(create_model, "model", kwargs)

    batch_size, accumulate = config["batch_size"], config["accumulate"]
    if batch_size % accumulate:
        raise UserError(f"config.accumulate is {accumulate}, which does not divide config.batch_size {batch_size}.")
    check_batch(batch_size // accumulate, mesh, "config.batch_size / config.accumulate =")
    steps_per_epoch = data.steps_per_epoch(batch_size)
    schedule = call(
        make_schedule, "schedule", config["schedule"], steps_per_epoch=steps_per_epoch, epochs=config["epochs"]
    )
    total_steps = min(schedule.total_steps, config["steps"] or schedule.total_steps)
    optimizer = call(make_optimizer, "optim", config["optim"], schedule)
    prepare, loss = make_prepare(config, data), _make_loss(config)
    images = jax.ShapeDtypeStruct((batch_size, data.image_size, data.image_size, 3), jnp.uint8)
    _try_out(prepare, loss, images, len(data.classes))

    init_key, train_key = jax.random.split(jax.random.key(config["seed"]))
    ema_decay = config["ema_decay"]

    def create_state(key: Array) -> TrainState:
        one = jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32)
        return create(model, optimizer, key, one, ema=ema_decay is not None)

    try:
        like = abstract(jax.eval_shape(create_state, init_key), mesh)
    except (ValueError, TypeError, FlaxError) as error:
        raise UserError(f"{kwargs['name']} with images of {data.image_size} pixels: {error}.") from None
    if data.preprocessing["image_size"] != data.image_size:
        evaluate.check_image_size(model, like.variables(), data.preprocessing["image_size"])
    state_sharding = jax.tree.map(lambda leaf: leaf.sharding, like)

    given, fitted = None, ""
    if found is not None:
        start = found["step"]
        state = _restore(workdir, start, like)
    else:
        start = 0
        if config["init_from"]:
            given, fitted = _read_variables(config["init_from"], model, like, config["seed"])
        state = jax.jit(create_state, out_shardings=state_sharding)(init_key)
        if given is not None:
            state = jax.device_put(_with_variables(state, given), state_sharding)
    info = {
        "model": kwargs,
        "classes": list(data.classes),
        "preprocessing": data.preprocessing,
        "devices": mesh.size,
        "config": json.loads(json.dumps(config)),
    }
    if not checkpoint.in_bucket(workdir):  # which has no folders, only names
        try:
            Path(workdir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {workdir} ({error.strerror}): give another --workdir.") from error
    dtype = jnp.dtype(config["dtype"])
    same, split = replicated(mesh), split_batch(mesh)
    train_step = jax.jit(
        make_train_step(
            model,
            optimizer,
            loss,
            prepare,
            mesh=mesh,
            dtype=dtype,
            ema_decay=ema_decay,
            accumulate=accumulate,
            batch_norm=config["batch_norm"],
        ),
        in_shardings=(state_sharding, {"image": split, "label": split}, same),
        out_shardings=(state_sharding, same),
        donate_argnums=0,
    )
    eval_step = evaluate.make_eval_step(model, data.preprocessing, mesh, dtype)

    def evaluate_now(step: int) -> dict[str, Any]:
        variables = state.variables() if state.ema is None else state.ema
        result = evaluate.evaluate(eval_step, variables, data, eval_batch, mesh)
        report.evaluation(step, step / steps_per_epoch, result)
        for name in result["skipped"]:
            report.tell(f"skipped, cannot be decoded: {name}")
        weights = "raw" if state.ema is None else "ema"
        result = evaluate.report(result, state.params, {**info, "step": step, "weights": weights})
        evaluate.write(result, workdir)
        return result

    with contextlib.ExitStack() as stack:
        stack.enter_context(checkpoint.disk_errors(workdir, "be written to"))
        look = stack.enter_context(only_run(workdir))
        if jax.process_index() == 0:
            checkpoint.write_text(
                checkpoint.place(workdir) / "config.json", json.dumps(info["config"], indent=2) + "\n"
            )
        report = stack.enter_context(
            contextlib.closing(Report(workdir, step=start, total_steps=total_steps, batch_size=batch_size, look=look))
        )
        report.tell(
            f"{kwargs['name']}: {evaluate.count_parameters(state.params):,} parameters, {data.num_train} training and "
            f"{data.num_eval} evaluation images, {mesh.devices.size} {jax.default_backend()} device(s), steps {start} "
            f"to {total_steps}; writing to {workdir}"
        )
        for change in changes:
            report.tell(f"changed since the checkpoint: {change}")
        if fitted:
            report.tell(f"from {config['init_from']}: {fitted}")
        if start >= total_steps:  # nothing is left to train
            return evaluate_now(start)
        batches = stack.enter_context(
            contextlib.closing(
                data.train_batches(
                    batch_size,
                    seed=config["seed"],
                    start_step=start,
                    num_steps=total_steps - start,
                    process_index=jax.process_index(),
                    process_count=jax.process_count(),
                )
            )
        )
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, keep=keep)))
        interrupts = stack.enter_context(Interrupts())
        watch = Watch(workdir, report, step=start, max_skips=max_skips)
        process = jax.process_index()
        dog = stack.enter_context(Watchdog(checkpoint.place(workdir) / f"hang{process or ''}.txt", 60 * hang_minutes))
        last, skipped = None, 0

        def settle() -> None:
            """Looks at the step before, when the next one is on its way, so that the device does not wait for it."""
            nonlocal last
            if last is None:
                return
            (done, batch, metrics), last = last, None
            dog.enter(f"step {done} computes")
            stopping = watch.look(done, metrics, batch["index"])
            if not watch.skips and (done % log_every == 0 or done in (1, total_steps)):
                report.train(done, done / steps_per_epoch, _fetch({**metrics, "learning_rate": schedule(done - 1)}))
                allocator.trim()
            if stopping:
                diagnose = jax.jit(make_diagnosis(model, loss, prepare, mesh=mesh, dtype=dtype))
                key = jax.random.fold_in(train_key, done - 1)
                layers = diagnose(state, to_devices({"image": batch["image"], "label": batch["label"]}, mesh), key)
                raise watch.stop(done, metrics, batch["index"], data.train.name, layers)

        for step in range(start, total_steps + 1):
            stop, end = interrupts.reached(step), step == total_steps
            evaluating = step > start and (step % (eval_every * steps_per_epoch) == 0 or end)
            saving = stop or (step > start and (step % save_every == 0 or end))
            if evaluating or saving:
                settle()  # what a checkpoint follows has to be in the log: a resumed run does not take the step again
                look()
            began = time.perf_counter()
            if evaluating:
                dog.enter(f"step {step} is evaluated")
                result = evaluate_now(step)
            if evaluating or saving:
                report.keep()
            if saving:
                dog.enter(f"step {step} is saved")
                checkpoints.save(step, state.items(), info, result["top1"] if evaluating else None)
            report.left_out(time.perf_counter() - began)
            if end:
                break
            if stop:
                checkpoints.wait()
                report.tell(f"stopped after step {step}, which is saved: the same command goes on from there")
                raise SystemExit(interrupts.exit_code())
            began = time.perf_counter()
            checkpoints.check()
            dog.enter(f"step {step + 1} waits for its data")
            batch = next(batches)
            report.waited(time.perf_counter() - began)
            for index in batch["skipped"][batch["skipped"] >= 0]:
                skipped += 1
                report.warn(f"skipped ({skipped} so far), cannot be decoded: {data.train.name(int(index))}")
            on_devices = to_devices({"image": batch["image"], "label": batch["label"]}, mesh)
            state, metrics = train_step(state, on_devices, train_key)
            report.advanced()
            settle()
            last = (step + 1, batch, metrics)
            if watch.skips:
                settle()  # at once, while the state is what that step saw
    return result


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
