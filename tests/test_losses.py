"""The losses are the paper's equations, and DINO's loss gives the numbers of facebookresearch/dino."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from helpers import config_of
from torch.testing import assert_close

from losses import DINOLoss, NCELoss, SupervisedLoss, make_loss

TWO_CROPS = [(0, 1), (1, 0)]


def random_outputs(seed: int, crops: int, images: int, dim: int):
    """What a network might make of the crops of a batch: (crops, images, dim), float64."""
    rng = np.random.RandomState(seed)
    return torch.from_numpy(rng.standard_normal((crops, images, dim)))


def all_pairs_but_equal_ones(student_crops: int, teacher_crops: int) -> list[tuple[int, int]]:
    """The pairs of DINO, in its order: the student's crop i and the teacher's crop j ≠ i."""
    return [(i, j) for j in range(teacher_crops) for i in range(student_crops) if i != j]


def softmax(logits):
    """Of a vector, in numpy."""
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


# student's crops, teacher's crops, and the pairs that are compared
PAIRINGS = {
    "different views, one crop": (1, 1, [(0, 0)]),
    "different views, two crops": (2, 2, [(0, 0), (0, 1), (1, 0), (1, 1)]),
    "different views, both canvases to both branches": (
        4,
        4,
        [(i, j) for i in range(4) for j in range(4) if i // 2 != j // 2],
    ),
    "same views, two crops": (2, 2, TWO_CROPS),
    "same views, four crops": (4, 4, all_pairs_but_equal_ones(4, 4)),
}
every_pairing = pytest.mark.parametrize(
    "student_crops,teacher_crops,pairs", PAIRINGS.values(), ids=PAIRINGS.keys()
)


# --------------------------------------------------------------------------------------- DINO


@dataclass
class DinoSteps:
    """What DINOLoss of facebookresearch/dino's main_dino.py gives in five steps; recorded once."""

    student_crops: int
    losses: list[float]
    center: list[float]  # the first numbers of its center after these steps


DINO_STEPS = [
    DinoSteps(
        student_crops=2,
        losses=[14.990488, 20.648911, 20.437973, 21.553246, 16.171452],
        center=[0.162837, 0.109869, 0.212708],
    ),
    DinoSteps(
        student_crops=4,
        losses=[19.638929, 17.598282, 17.854872, 19.752232, 21.199955],
        center=[0.1855369, 0.0008328, 0.1197227],
    ),
    DinoSteps(
        student_crops=6,
        losses=[18.332567, 19.629772, 18.140083, 17.033739, 19.390751],
        center=[0.1719498, 0.1326292, 0.138124],
    ),
]


@pytest.mark.parametrize("expected", DINO_STEPS, ids=lambda steps: f"{steps.student_crops} crops")
def test_dino_loss_and_center_are_those_of_dino_over_several_steps(expected):
    """K is 16, the batch has 4 images, and teacher_temp rises in the first steps."""
    student_crops = expected.student_crops
    loss_fn = DINOLoss(16).double()
    losses = []
    for step, teacher_temp in enumerate([0.03, 0.04, 0.05, 0.05, 0.05]):
        rng = np.random.RandomState(10 * student_crops + step)
        student = rng.standard_normal((student_crops, 4, 16)).astype(np.float32)
        teacher = (rng.standard_normal((2, 4, 16)) + 0.3).astype(np.float32)
        student = torch.from_numpy(student).double()
        teacher = torch.from_numpy(teacher).double()

        loss_fn.teacher_temp = teacher_temp
        probabilities = loss_fn.targets(teacher)
        loss = loss_fn(student, probabilities, all_pairs_but_equal_ones(student_crops, 2))
        losses.append(loss.item())
        loss_fn.update_center(teacher)
    np.testing.assert_allclose(losses, expected.losses, rtol=1e-6)
    np.testing.assert_allclose(loss_fn.center[0, :3], expected.center, atol=1e-6)


@every_pairing
def test_dino_loss_is_equations_1_and_2_in_plain_loops(student_crops, teacher_crops, pairs):
    student = random_outputs(1, student_crops, 5, 7)
    teacher = random_outputs(2, teacher_crops, 5, 7)
    loss_fn = DINOLoss(7, student_temp=0.2, teacher_temp=0.07).double()
    loss_fn.center += torch.linspace(-1, 1, 7)
    center = loss_fn.center[0].numpy()

    expected = 0.0
    for i, j in pairs:
        for image in range(5):
            p_teacher = softmax((teacher[j, image].numpy() - center) / 0.07)
            p_student = softmax(student[i, image].numpy() / 0.2)
            cross_entropy = -sum(p_teacher[k] * math.log(p_student[k]) for k in range(7))
            expected += cross_entropy / 5 / len(pairs)
    loss = loss_fn(student, loss_fn.targets(teacher), pairs)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def logits_with_a_favourite():
    """Logits (2, 40, 6) in which the second prototype wins every image."""
    logits = random_outputs(3, 2, 40, 6)
    logits[:, :, 1] += 9
    return logits


def test_sinkhorn_knopp_scales_rows_and_columns_in_turn_as_dinov2_does():
    logits = logits_with_a_favourite()
    loss_fn = DINOLoss(6, student_temp=0.1, teacher_temp=0.5, centering="sinkhorn_knopp")
    probabilities = loss_fn.targets(logits)

    matrix = np.exp(logits.flatten(0, 1).numpy() / 0.5)  # (80 crops of images, 6 prototypes)
    for _ in range(3):
        matrix = matrix / matrix.sum(axis=0) / 6
        matrix = matrix / matrix.sum(axis=1, keepdims=True) / 80
    np.testing.assert_allclose(probabilities.flatten(0, 1), matrix * 80, rtol=1e-9)


def test_sinkhorn_knopp_uses_every_prototype():
    logits = logits_with_a_favourite()
    balanced = DINOLoss(6, teacher_temp=0.5, centering="sinkhorn_knopp")
    shares = balanced.targets(logits).mean((0, 1))
    assert shares.sum().item() == pytest.approx(1)
    assert shares.min() > 0.1

    not_yet_centered = DINOLoss(6, teacher_temp=0.5, centering="mean")
    assert not_yet_centered.targets(logits).mean((0, 1)).max() > 0.99


def test_center_moves_only_by_its_update():
    loss_fn = DINOLoss(6)
    teacher = random_outputs(2, 2, 4, 6).float() + 1
    loss_fn(teacher, loss_fn.targets(teacher), [(0, 1)])
    assert loss_fn.center.abs().sum() == 0
    loss_fn.update_center(teacher)
    assert_close(loss_fn.center[0], 0.1 * teacher.mean((0, 1)))
    assert "center" in loss_fn.state_dict()


# ---------------------------------------------------------------------------------------- NCE


def cosine(a, b) -> float:
    return (a @ b / math.sqrt(a @ a) / math.sqrt(b @ b)).item()


@every_pairing
def test_nce_loss_is_equation_3_in_plain_loops(student_crops, teacher_crops, pairs):
    student = random_outputs(1, student_crops, 5, 7)
    teacher = random_outputs(2, teacher_crops, 5, 7)
    expected = 0.0
    for i, j in pairs:
        for image in range(5):
            x = student[i, image]
            similarities = [cosine(x, teacher_x) for teacher_x in teacher[j]]
            exponentials = [math.exp(similarity / 0.1) for similarity in similarities]
            positive = exponentials.pop(image)
            negatives = sum(exponentials)
            expected -= math.log(positive / (positive + negatives)) / 5 / len(pairs)
    loss = NCELoss(temperature=0.1)(student, teacher, pairs)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


# ----------------------------------------------------------------------------------- supervised


def test_supervised_loss_is_cross_entropy_with_the_label_in_plain_loops():
    cosines = random_outputs(3, 2, 5, 4)
    labels = torch.tensor([3, 0, 1, 1, 2])
    expected = 0.0
    for crop in cosines.numpy():
        for image, label in zip(crop, labels):
            expected -= math.log(softmax(image / 0.2)[label]) / 10
    loss = SupervisedLoss(temperature=0.2)(cosines, labels, pairs=[])
    assert loss.item() == pytest.approx(expected, abs=1e-12)


# ------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize(
    "loss_fn",
    [NCELoss(), DINOLoss(7), SupervisedLoss()],
    ids=lambda loss_fn: type(loss_fn).__name__,
)
def test_pieces_of_a_batch_give_the_loss_of_the_whole(loss_fn):
    student = random_outputs(1, 2, 6, 7)
    targets = random_outputs(2, 2, 6, 7)
    if isinstance(loss_fn, SupervisedLoss):
        targets = torch.tensor([3, 0, 1, 1, 2, 6])
    loss_of_the_batch = loss_fn(student, targets, TWO_CROPS)
    pieces = []
    for first in (0, 2, 4):
        piece = student[:, first : first + 2]
        pieces.append(loss_fn(piece, targets, TWO_CROPS, first))
    assert_close(sum(pieces) / 3, loss_of_the_batch)
    assert pieces[0].item() != pytest.approx(loss_of_the_batch.item(), rel=1e-3)


def test_chance_is_the_loss_of_a_network_that_finds_everything_alike():
    alike = torch.ones(1, 8, 10)  # all 8 images, and all 10 prototypes or classes
    nce = NCELoss()
    assert nce.chance(batch_size=8) == ("ln(batch)", math.log(8))
    assert nce(alike, nce.targets(alike), [(0, 0)]).item() == pytest.approx(math.log(8))
    for centering in ("mean", "sinkhorn_knopp"):
        dino = DINOLoss(10, centering=centering)
        assert dino.chance(batch_size=8) == ("ln(K)", math.log(10))
        assert dino(alike, dino.targets(alike), [(0, 0)]).item() == pytest.approx(math.log(10))
    supervised = SupervisedLoss()
    assert supervised.chance(batch_size=8) == ("ln(classes)", math.log(10))
    assert supervised(alike, torch.arange(8), []).item() == pytest.approx(math.log(10))


@pytest.mark.parametrize(
    "loss_fn",
    [NCELoss(), DINOLoss(6), DINOLoss(6, centering="sinkhorn_knopp")],
    ids=["nce", "dino, mean", "dino, sinkhorn_knopp"],
)
def test_gradient_flows_through_the_student_alone(loss_fn):
    student = random_outputs(1, 2, 4, 6).requires_grad_()
    teacher = random_outputs(2, 2, 4, 6).requires_grad_()
    targets = loss_fn.double().targets(teacher)
    loss_fn(student, targets, TWO_CROPS).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


# ------------------------------------------------------------------------------ from the settings


def test_settings_decide_the_loss():
    nce = make_loss(config_of("--preset laptop --loss nce --temperature 0.2"))
    assert isinstance(nce, NCELoss)
    assert nce.temperature == 0.2
    assert nce.num_prototypes is None
    assert not nce.uses_labels

    flags = "--out-dim 7 --temperature 0.2 --teacher-temp 0.3 --centering mean"
    dino = make_loss(config_of(f"--preset laptop --loss dino {flags}"))
    assert isinstance(dino, DINOLoss)
    assert dino.student_temp == 0.2
    assert dino.teacher_temp == 0.3
    assert dino.centering == "mean"
    assert dino.num_prototypes == 7
    assert not dino.uses_labels

    supervised = make_loss(config_of("--preset laptop --loss supervised --temperature 0.2"))
    assert isinstance(supervised, SupervisedLoss)
    assert supervised.temperature == 0.2
    assert supervised.num_prototypes == 10
    assert supervised.uses_labels


def test_a_loss_that_does_not_exist_is_named():
    config = replace(config_of("--preset laptop"), loss="none")
    with pytest.raises(ValueError, match="--loss none"):
        make_loss(config)
