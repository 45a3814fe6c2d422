"""Whole training steps against the references in float64: a MaxViT beside timm, and GA against its stored step.

MAP's six steps are in test_trajectory.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxmap.convert.torch import from_torch, to_torch
from maxmap.data.mix import mix_targets
from maxmap.losses import total_loss
from maxmap.models import create_model
from maxmap.optim import make_optimizer
from maxmap.schedule import make_schedule
from maxmap.train.state import TrainState
from maxmap.train.step import make_train_step
from tests.backbones.test_maxxvit import CLASSES, SIZE, exactly_randomised, shrunken, timm_config, timm_model
from tests.reference import fill_state_dict, import_timm, read_manifest
from tests.train.test_trajectory import worst
from tests.zoo import QUICK, quick


def batch(seed):
    """Normalised images, and targets as mixup with smoothing leaves them."""
    random = np.random.RandomState(seed)
    labels = jnp.asarray(random.randint(0, CLASSES, 4))
    targets = mix_targets(labels, 0.7, num_classes=CLASSES, smoothing=0.1)
    return {"image": jnp.asarray(random.standard_normal((4, *SIZE, 3))), "label": jnp.asarray(targets, jnp.float64)}


@pytest.mark.long
def test_five_steps_of_a_maxvit_are_timms(x64):
    """The step of the trainer against timm's model, loss, optimizer, scheduler, clipping and average, loss by loss."""
    import_timm()
    import torch
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV2

    cut = {"embed_dim": (32, 64), "depths": (1, 1)}
    model = shrunken("maxvit_tiny_tf", block_types=("M", "M"), strides=(2, 2), window_size=(2, 3), **cut)
    config = timm_config("maxvit_tiny_tf", block_type=("M", "M"), head_hidden_size=64, **cut)
    reference, weights = exactly_randomised(timm_model(config))
    variables = from_torch(weights, model)
    schedule = make_schedule(steps_per_epoch=2, epochs=5, lr=5e-4, warmup_epochs=1, warmup_lr=1e-4, min_lr=1e-6)
    optimizer = make_optimizer(schedule, name="lamb_timm", weight_decay=0.05, clip_norm=1.0)
    params = variables["params"]
    stats = {"batch_stats": variables["batch_stats"]}
    state = TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params), variables)
    step = make_train_step(model, optimizer, total_loss, lambda key, *given: given, dtype=jnp.float64, ema_decay=0.5)
    step = jax.jit(step, compiler_options=QUICK)

    reference = reference.train()
    torch_optimizer = create_optimizer_v2(reference, opt="lamb", lr=5e-4, weight_decay=0.05)
    scheduler = CosineLRScheduler(torch_optimizer, 5, lr_min=1e-6, warmup_t=1, warmup_lr_init=1e-4)
    average = ModelEmaV2(reference, decay=0.5)
    losses = []
    for number in range(5):
        state, metrics = step(state, batch(number), jax.random.key(0))
        scheduler.step(number // 2)
        torch_optimizer.zero_grad()
        images, targets = (torch.from_numpy(np.array(batch(number)[key])) for key in ("image", "label"))
        loss = SoftTargetCrossEntropy()(reference(images.permute(0, 3, 1, 2)), targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        torch_optimizer.step()
        average.update(reference)
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-7), number
        assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-6), number
        losses.append(loss.item())
    assert len(set(losses)) == 5
    for variables, torch_model in ((state.variables(), reference), (state.ema, average.module)):
        wanted = torch_model.state_dict()
        for key, value in to_torch(variables, model).items():
            if "num_batches_tracked" not in key:
                # The clip of torch adds 1e-6 to the norm, and Adam's first steps are nearly signs.
                np.testing.assert_allclose(value, wanted[key].numpy().reshape(value.shape), atol=2e-6, err_msg=key)


@pytest.mark.long
def test_a_step_of_ga_is_the_references(goldens, x64, plain_convolutions):
    """Loss, the gradient of every parameter and the running statistics of the released GA-ConvNeXt-T at 224 pixels."""
    weights = fill_state_dict(read_manifest(goldens, "ga_convnext_tiny_688")["state_dict"])
    model = create_model("ga_convnext_tiny_688")
    variables = from_torch({key: value.astype(np.float64) for key, value in weights.items()}, model)
    images = np.random.RandomState(11).standard_normal((2, 3, 224, 224)).astype(np.float32)
    images = images.transpose(0, 2, 3, 1).astype(np.float64)
    targets = jax.nn.softmax(3 * np.random.RandomState(12).standard_normal((2, 1000)))

    def objective(params):
        outputs, new = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return total_loss(outputs, targets, name="bce", decorrelation=-0.8)[0], new

    (loss, new), grads = quick(jax.value_and_grad(objective, has_aux=True), variables["params"], level=1)
    with np.load(goldens / "step_ga_convnext_tiny_688_224_b2.npz") as golden:
        total = golden["global_grad_norm"].item()
        assert float(loss) == pytest.approx(golden["loss"].item(), rel=1e-9)
        assert float(optax.tree.norm(grads)) == pytest.approx(total, rel=1e-9)
        # Biases in front of a norm or a softmax have rounding for a gradient.
        for prefix, named, floor in (
            ("grad", to_torch({"params": grads}, model), 1e-3 * total),
            ("bn", to_torch(new, model), 0.0),
        ):
            stored = (golden[f"{prefix}/{what}"] for what in ("keys", "l2", "dot_probe"))
            error, key = worst(named, *stored, floor=floor)
            assert error < 1e-9, key
