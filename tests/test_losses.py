"""The losses, against the published code's numbers and by hand.

tests/goldens/map_loss.npz holds what the published MAP and GA losses give for logits drawn below: the values in
float64, the gradients (a float32 computation) cut to 24 classes, and their norms over all classes (`grad_norm`).
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxmap.errors import UserError
from maxmap.losses import binary_cross_entropy, earth_movers_distance, softmax_cross_entropy, total_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOLDENS = np.load(pathlib.Path(__file__).parent / "goldens" / "map_loss.npz")
KEPT_CLASSES = 24
WEIGHT = -0.8


def drawn_logits():
    random = np.random.RandomState(7)
    pair = (2 * random.standard_normal((4, 2, 8, 1000))).astype(np.float32)
    gramian = (2 * random.standard_normal((5, 8, 1000))).astype(np.float32)
    return pair.astype(np.float64), gramian.astype(np.float64)


PAIR, GRAMIAN = drawn_logits()


def outputs_of(case):
    """The logits of a case, as the model would return them."""
    if case == "ga":
        return {"logits": GRAMIAN}
    pair = PAIR[:1] if "single" in case else PAIR
    outputs = {"logits": pair[:, 0]}
    return {**outputs, "distill": pair[:, 1]} if case.endswith("pair") else outputs


def smoothed(labels, smoothing):
    return np.eye(1000)[labels] * (1 - smoothing) + smoothing / 1000


def loss_of(loss):
    """The name, threshold and dense targets that stand for one of the published loss functions."""
    labels = GOLDENS["target/labels"]
    mixup = GOLDENS["target/mixup"].astype(np.float64)
    return {
        "softce_soft": ("softmax", None, GOLDENS["target/soft"].astype(np.float64)),
        "bce_soft": ("bce", None, GOLDENS["target/soft"].astype(np.float64)),
        "bce_smooth_labels": ("bce", None, smoothed(labels, 0.1)),
        "softce_mixup": ("softmax", None, mixup),
        "bce_mixup": ("bce", None, mixup),
        "bce_thresh02_mixup": ("bce", 0.2, mixup),
        "bce_nosmooth_labels": ("bce", None, smoothed(labels, 0.0)),
        "lsce_smooth_labels": ("softmax", None, smoothed(labels, 0.1)),
        "ce_labels": ("softmax", None, smoothed(labels, 0.0)),
    }[loss]


CASES = sorted({tuple(key.split("/")[:2]) for key in GOLDENS.files if key.endswith("/loss")})


def test_logits_are_the_ones_of_the_goldens():
    for drawn, key in [(PAIR, "check/pair_logits"), (GRAMIAN, "check/ga_logits")]:
        wanted = [drawn.sum(), np.abs(drawn).sum(), drawn.flat[0], drawn.flat[-1]]
        np.testing.assert_allclose(wanted, GOLDENS[key], rtol=1e-12)


def test_every_published_case_is_there():
    assert len(CASES) == 5 * 9


@pytest.mark.parametrize(("case", "loss"), CASES)
def test_value_equals_the_published_loss(case, loss, x64):
    name, threshold, targets = loss_of(loss)
    for weight, key in [(WEIGHT, "loss"), (0.0, "loss_without_decorrelation")]:
        value, parts = total_loss(
            outputs_of(case), jnp.asarray(targets), name=name, decorrelation=weight, target_threshold=threshold
        )
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, GOLDENS[f"{case}/{loss}/{key}"], rtol=1e-14)
        np.testing.assert_allclose(
            parts["base"] + parts["distillation"] + parts["decorrelation"], parts["loss"], rtol=1e-14
        )


@pytest.mark.parametrize(("case", "loss"), CASES)
def test_value_in_float32(case, loss):
    name, threshold, targets = loss_of(loss)
    outputs = {key: jnp.asarray(value, jnp.float32) for key, value in outputs_of(case).items()}
    targets = jnp.asarray(targets, jnp.float32)
    value, _ = total_loss(outputs, targets, name=name, decorrelation=WEIGHT, target_threshold=threshold)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, GOLDENS[f"{case}/{loss}/loss"], rtol=2e-6)


def assert_gradient(gradient, key):
    """The published gradients were computed in float32: they err by up to 3e-7 of the norm over classes."""
    gradient = np.asarray(gradient)
    norm = np.linalg.norm(gradient, axis=-1, keepdims=True)
    assert np.max(np.abs(gradient[..., :KEPT_CLASSES] - GOLDENS[key]) / norm) < 1e-6
    np.testing.assert_allclose(norm[..., 0], GOLDENS[f"{key}_norm"], rtol=1e-6)


@pytest.mark.parametrize("key", [key for key in GOLDENS.files if key.endswith("/grad")])
def test_gradient_equals_the_published_one(key, x64):
    case, loss, _ = key.split("/")
    if case == "decorrelation":  # the gradient of that term alone, stored under its own name
        outputs = outputs_of("ga" if loss == "ga" else "map_plain")
        targets = jnp.zeros((8, 1000))
        gradient = jax.grad(lambda o: total_loss(o, targets, decorrelation=WEIGHT)[1]["decorrelation"])(outputs)
        assert_gradient(gradient["logits"], key)
        return
    name, threshold, targets = loss_of(loss)
    gradient = jax.grad(
        lambda o: total_loss(o, jnp.asarray(targets), name=name, decorrelation=WEIGHT, target_threshold=threshold)[0]
    )(outputs_of(case))
    if case == "map_pair":  # [G, 2, B, K]: main and self-distilled
        assert_gradient(np.stack([gradient["logits"], gradient["distill"]], axis=1), key)
    else:
        assert_gradient(gradient["logits"], key)


LOGITS = np.array([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])  # [B, K]
TARGETS = np.array([[1.0, 0.0, 0.0], [0.1, 0.6, 0.3]])


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl(teacher, student):
    """KL(softmax(teacher) || softmax(student)) for every example."""
    p = np.exp(log_softmax(teacher))
    return (p * (log_softmax(teacher) - log_softmax(student))).sum(-1)


def test_base_losses_by_hand(x64):
    softmax = -(TARGETS * log_softmax(LOGITS)).sum() / 2
    np.testing.assert_allclose(softmax_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(TARGETS)), softmax, rtol=1e-14)
    p = 1 / (1 + np.exp(-LOGITS))
    for threshold, targets in [(None, TARGETS), (0.3, np.array([[1, 0, 0], [0, 1, 0]]))]:  # 0.3 is not above 0.3
        binary = -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum() / 6
        value = binary_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(TARGETS), target_threshold=threshold)
        np.testing.assert_allclose(value, binary, rtol=1e-14)


@pytest.mark.parametrize(("reduction", "divisor"), [("batch_class_mean", 6), ("batch_mean", 2)])
def test_terms_by_hand_under_both_reductions(reduction, divisor, x64):
    branches = np.stack([LOGITS, LOGITS[::-1] * 0.5])
    students = np.stack([LOGITS * 2, LOGITS + np.array([[0.0, 1.0, 0.0]])])
    _, parts = total_loss(
        {"logits": branches, "distill": students},
        jnp.asarray(TARGETS),
        decorrelation=-0.8,
        distillation=0.7,
        term_reduction=reduction,
    )
    consensus = branches.mean(0)
    distillation = sum(kl(y, z).sum() for y, z in zip(branches, students, strict=True)) / divisor
    decorrelation = sum(kl(consensus, y).sum() for y in branches) / divisor
    np.testing.assert_allclose(parts["distillation"], 0.7 * distillation, rtol=1e-14)
    np.testing.assert_allclose(parts["decorrelation"], -0.8 * decorrelation, rtol=1e-14)


def test_gradients_by_hand(x64):
    """d/dy KL(p || softmax(y)) = softmax(y) - p, over B or B * K; in float64, which the published gradients are not."""
    branches = np.stack([LOGITS, LOGITS[::-1] * 0.5])
    students = np.stack([LOGITS * 2, LOGITS + np.array([[0.0, 1.0, 0.0]])])
    p, q = np.exp(log_softmax(branches)), np.exp(log_softmax(students))
    consensus = np.exp(log_softmax(branches.mean(0)))
    base = {
        "softmax": (p * TARGETS.sum(-1, keepdims=True) - TARGETS) / 2,
        "bce": (1 / (1 + np.exp(-branches)) - TARGETS) / 6,
    }
    for name, slope in base.items():
        gradient = jax.grad(
            lambda o, name=name: total_loss(o, jnp.asarray(TARGETS), name=name, decorrelation=-0.8, distillation=0.7)[0]
        )({"logits": branches, "distill": students})
        np.testing.assert_allclose(gradient["logits"], slope - 0.8 * (p - consensus) / 6, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(gradient["distill"], 0.7 * (q - p) / 6, rtol=1e-12, atol=1e-15)


def test_self_distillation_teaches_only_the_students(x64):
    outputs = {"logits": PAIR[:, 0], "distill": PAIR[:, 1]}
    targets = jnp.asarray(smoothed(GOLDENS["target/labels"], 0.1))
    with_term = jax.grad(lambda o: total_loss(o, targets)[0])(outputs)
    without = jax.grad(lambda o: total_loss(o, targets, distillation=0.0)[0])(outputs)
    np.testing.assert_array_equal(with_term["logits"], without["logits"])
    assert np.abs(with_term["distill"]).max() > 0
    np.testing.assert_array_equal(without["distill"], 0)


def test_one_branch_has_nothing_to_decorrelate_from(x64):
    outputs = {"logits": PAIR[:1, 0]}
    loss, parts = total_loss(outputs, jnp.asarray(smoothed(GOLDENS["target/labels"], 0.1)), decorrelation=-0.8)
    assert parts["decorrelation"] == 0
    assert loss == parts["base"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["softmax", "bce"])
def test_half_precision_logits_are_promoted_first(name, dtype):
    outputs = {key: jnp.asarray(value, dtype) for key, value in outputs_of("map_pair").items()}
    targets = jnp.asarray(smoothed(GOLDENS["target/labels"], 0.1), jnp.float32)
    value, parts = total_loss(outputs, targets, name=name, decorrelation=WEIGHT)
    promoted = {key: value.astype(jnp.float32) for key, value in outputs.items()}
    assert value == total_loss(promoted, targets, name=name, decorrelation=WEIGHT)[0]
    assert {part.dtype for part in parts.values()} == {jnp.dtype(jnp.float32)}


def test_bce_keeps_the_gradient_of_saturated_logits():
    """sigmoid(20) rounds to 1 in float32; the pull of a target of 1 is still -sigmoid(-20)."""
    logits, targets = jnp.array([[20.0, -20.0, 1e4, -1e4]]), jnp.array([[1.0, 0.0, 0.0, 1.0]])
    value, gradient = jax.value_and_grad(binary_cross_entropy)(logits, targets)
    tail = 1 / (1 + np.exp(20.0))
    np.testing.assert_allclose(4 * gradient, [[-tail, tail, 1, -1]], rtol=1e-6)
    np.testing.assert_allclose(value, 2e4 / 4, rtol=1e-6)


def test_jit_gives_the_same():
    outputs = {key: jnp.asarray(value, jnp.float32) for key, value in outputs_of("map_pair").items()}
    targets = jnp.asarray(GOLDENS["target/soft"])
    eager, _ = total_loss(outputs, targets, decorrelation=WEIGHT)
    jitted, _ = jax.jit(lambda o, t: total_loss(o, t, decorrelation=WEIGHT))(outputs, targets)
    np.testing.assert_allclose(jitted, eager, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "softmx"}, "softmax"),
        ({"name": "bce", "term_reduction": "mean"}, "batch_mean"),
        ({"name": "softmax", "target_threshold": 0.2}, "name='bce'"),
    ],
)
def test_wrong_options_are_named(options, words):
    with pytest.raises(UserError, match=words):
        total_loss({"logits": jnp.zeros((1, 2, 3))}, jnp.zeros((2, 3)), **options)


@pytest.mark.parametrize(("logits", "targets"), [((2, 3), (2, 3)), ((1, 2, 3), (2, 1)), ((1, 2, 3), (2,))])
def test_shapes_must_fit(logits, targets):
    with pytest.raises(ValueError, match="targets"):
        total_loss({"logits": jnp.zeros(logits)}, jnp.zeros(targets))


def test_class_weights_multiply_the_right_answers(x64):
    weights = np.array([2.0, 1.0, 0.5])
    softmax = -np.sum(weights * TARGETS * log_softmax(LOGITS), -1).mean()
    right, wrong = -np.log1p(np.exp(-LOGITS)), -np.log1p(np.exp(LOGITS))
    bce = -np.mean(weights * TARGETS * right + (1 - TARGETS) * wrong)
    for name, wanted in {"softmax": softmax, "bce": bce}.items():
        loss, _ = total_loss({"logits": LOGITS[None]}, jnp.asarray(TARGETS), name=name, weights=jnp.asarray(weights))
        np.testing.assert_allclose(loss, wanted, rtol=1e-14)
        ones, _ = total_loss({"logits": LOGITS[None]}, jnp.asarray(TARGETS), name=name, weights=jnp.ones(3))
        np.testing.assert_allclose(ones, total_loss({"logits": LOGITS[None]}, jnp.asarray(TARGETS), name=name)[0])
    with pytest.raises(UserError, match=r"data.class_weights belongs to"):
        total_loss({"logits": LOGITS[None]}, jnp.asarray(TARGETS), name="emd", weights=jnp.asarray(weights))


def test_the_earth_movers_distance_by_hand(x64):
    """Shares 1/2 1/4 1/4 beside 0 1/2 1/2: the cumulative shares differ by 1/2, 1/4 and 0."""
    shares, targets = np.array([[2, 1, 1], [1, 1, 2]]) / 4, np.array([[0, 2, 2], [1, 1, 2]]) / 4
    wanted = np.array([np.sqrt((1 / 4 + 1 / 16) / 3), 0])
    value, gradient = jax.value_and_grad(earth_movers_distance)(jnp.log(shares), jnp.asarray(targets))
    np.testing.assert_allclose(value, wanted.mean(), rtol=1e-14)
    assert np.isfinite(gradient).all() and np.abs(gradient[0]).max() > 0.01
    np.testing.assert_allclose(gradient[1], 0, atol=1e-8)
    branches = jnp.log(np.stack([shares, shares[::-1]]))
    both = total_loss({"logits": branches}, jnp.asarray(targets), name="emd")[0]
    np.testing.assert_allclose(both, sum(earth_movers_distance(branch, jnp.asarray(targets)) for branch in branches))


def test_losses_of_numbers_by_hand(x64):
    values, targets = np.array([[0.5, -1, 3], [0, 0, 1]]), np.array([[0, 1, 3], [0.2, 0, -1]])
    squares = [0.25, 4, 0, 0.04, 0, 4]
    outputs = {"logits": jnp.asarray(values)[None]}
    np.testing.assert_allclose(total_loss(outputs, jnp.asarray(targets), name="mse")[0], sum(squares) / 6)
    huber = [0.125, 1.5, 0, 0.02, 0, 1.5]
    np.testing.assert_allclose(total_loss(outputs, jnp.asarray(targets), name="huber")[0], sum(huber) / 6)


@pytest.mark.parametrize("name", ["binary", "normal"])
def test_divergences_of_labels_and_numbers_by_hand(name, x64):
    teacher, student = np.stack([LOGITS, LOGITS * 2]), np.stack([LOGITS + 1, -LOGITS])
    p, q = 1 / (1 + np.exp(-teacher)), 1 / (1 + np.exp(-student))
    terms = {
        "binary": p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)),
        "normal": (teacher - student) ** 2 / 2,
    }[name]
    outputs = {"logits": jnp.asarray(teacher), "distill": jnp.asarray(student)}
    for reduction, divisor in (("batch_mean", 2), ("batch_class_mean", 6)):
        _, parts = total_loss(outputs, jnp.asarray(TARGETS), divergence=name, term_reduction=reduction, name="bce")
        np.testing.assert_allclose(parts["distillation"], terms.sum() / divisor, rtol=1e-13)
