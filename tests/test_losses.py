"""The losses are the paper's equations, and where facebookresearch/dino has them, its numbers."""

import math

import numpy as np
import pytest
import torch

from losses import DINOLoss, NCELoss, SupervisedLoss


def random_outputs(seed, crops, batch, dim, shift=0.0):
    rng = np.random.RandomState(seed)
    return torch.from_numpy(rng.standard_normal((crops, batch, dim)) + shift)


def all_but_same(student_crops, teacher_crops):
    return [(i, j) for j in range(teacher_crops) for i in range(student_crops) if i != j]


# What main_dino.py's DINOLoss gives in five steps (K = 16, batch 4, teacher_temp warmed from
# 0.03 to 0.05 in three), and the first entries of its centre afterwards.
DINO_SAYS = {
    2: ([14.990488, 20.648911, 20.437973, 21.553246, 16.171452], [0.162837, 0.109869, 0.212708]),
    4: ([19.638929, 17.598282, 17.854872, 19.752232, 21.199955], [0.1855369, 0.0008328, 0.1197227]),
    6: ([18.332567, 19.629772, 18.140083, 17.033739, 19.390751], [0.1719498, 0.1326292, 0.138124]),
}


@pytest.mark.parametrize("student_crops", DINO_SAYS)
def test_dino_loss_and_centre_are_dinos_over_several_steps(student_crops):
    loss_fn, losses = DINOLoss(16).double(), []
    for step, teacher_temp in enumerate([0.03, 0.04, 0.05, 0.05, 0.05]):
        rng = np.random.RandomState(10 * student_crops + step)
        student = rng.standard_normal((student_crops, 4, 16)).astype(np.float32)
        teacher = (rng.standard_normal((2, 4, 16)) + 0.3).astype(np.float32)
        student, teacher = (torch.from_numpy(x).double() for x in (student, teacher))
        pairs = all_but_same(student_crops, 2)
        loss_fn.teacher_temp = teacher_temp
        p_teacher = loss_fn.teacher_probabilities(teacher)
        losses.append(loss_fn(student, p_teacher, pairs).item())
        loss_fn.update_center(teacher)
    expected, centre = DINO_SAYS[student_crops]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    np.testing.assert_allclose(loss_fn.center[0, :3], centre, atol=1e-6)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


PAIRINGS = [
    (1, 1, [(0, 0)]),  # different views, one crop
    (2, 2, [(0, 0), (0, 1), (1, 0), (1, 1)]),  # different views, two crops
    (2, 2, [(0, 1), (1, 0)]),  # same views, two crops
    (4, 4, all_but_same(4, 4)),  # same views, four crops
    # different views, swapped too
    (4, 4, [(i, j) for i in range(4) for j in range(4) if i // 2 != j // 2]),
]


@pytest.mark.parametrize("student_crops,teacher_crops,pairs", PAIRINGS)
def test_dino_loss_is_equations_1_and_2_in_plain_loops(student_crops, teacher_crops, pairs):
    student = random_outputs(1, student_crops, 5, 7)
    teacher = random_outputs(2, teacher_crops, 5, 7)
    loss_fn = DINOLoss(7, student_temp=0.2, teacher_temp=0.07).double()
    loss_fn.center += torch.linspace(-1, 1, 7)
    expected = 0
    for i, j in pairs:
        for b in range(5):
            p_teacher = softmax((teacher[j, b].numpy() - loss_fn.center[0].numpy()) / 0.07)
            p_student = softmax(student[i, b].numpy() / 0.2)
            cross_entropy = -sum(p_teacher[k] * math.log(p_student[k]) for k in range(7))
            expected += cross_entropy / 5 / len(pairs)
    p_teacher = loss_fn.teacher_probabilities(teacher)
    assert abs(loss_fn(student, p_teacher, pairs).item() - expected) < 1e-6


def test_sinkhorn_knopp_is_dinov2s():
    """Alternate scaling of rows and columns of exp(logits / τ), and every prototype is used."""
    logits = random_outputs(3, 2, 40, 6, shift=np.array([0.0, 9, 0, 0, 0, 0]))
    p = DINOLoss(6, 0.1, 0.5, "sinkhorn_knopp").teacher_probabilities(logits)
    q = np.exp(logits.flatten(0, 1).numpy() / 0.5)  # (80, 6)
    for _ in range(3):
        q = q / q.sum(axis=0) / 6
        q = q / q.sum(axis=1, keepdims=True) / 80
    np.testing.assert_allclose(p.flatten(0, 1).numpy(), q * 80, rtol=1e-9)
    shares = p.mean((0, 1))
    assert shares.sum().item() == pytest.approx(1) and shares.min() > 0.1
    collapsed = DINOLoss(6, 0.1, 0.5).teacher_probabilities(logits).mean((0, 1))
    assert collapsed.max() > 0.99  # the second prototype wins every image


@pytest.mark.parametrize("student_crops,teacher_crops,pairs", PAIRINGS)
def test_nce_is_equation_3_in_plain_loops(student_crops, teacher_crops, pairs):
    student = random_outputs(1, student_crops, 5, 7)
    teacher = random_outputs(2, teacher_crops, 5, 7)

    def sim(a, b):
        a, b = a.numpy(), b.numpy()
        return (a @ b) / math.sqrt(a @ a) / math.sqrt(b @ b)

    expected = 0
    for i, j in pairs:
        for b in range(5):
            positive = math.exp(sim(student[i, b], teacher[j, b]) / 0.1)
            others = [k for k in range(5) if k != b]
            negatives = sum(math.exp(sim(student[i, b], teacher[j, k]) / 0.1) for k in others)
            expected -= math.log(positive / (positive + negatives)) / 5 / len(pairs)
    assert abs(NCELoss(0.1)(student, teacher, pairs).item() - expected) < 1e-6


@pytest.mark.parametrize("loss_fn", [NCELoss(), DINOLoss(7)])
def test_pieces_of_the_batch_give_the_loss_of_the_whole(loss_fn):
    student, teacher, pairs = random_outputs(1, 2, 6, 7), random_outputs(2, 2, 6, 7), [(0, 1)]
    pieces = [loss_fn(student[:, k : k + 2], teacher, pairs, first=k) for k in (0, 2, 4)]
    torch.testing.assert_close(sum(pieces) / 3, loss_fn(student, teacher, pairs))


def test_chance_levels():
    alike = torch.ones(1, 8, 5)
    assert NCELoss()(alike, alike, [(0, 0)]).item() == pytest.approx(math.log(8))
    for centering in ("mean", "sinkhorn_knopp"):
        loss_fn = DINOLoss(5, centering=centering)
        p_teacher = loss_fn.teacher_probabilities(alike)
        assert loss_fn(alike, p_teacher, [(0, 0)]).item() == pytest.approx(math.log(5))


@pytest.mark.parametrize(
    "loss_fn", [NCELoss(), DINOLoss(6), DINOLoss(6, centering="sinkhorn_knopp")]
)
def test_gradient_flows_through_the_student_alone(loss_fn):
    student = random_outputs(1, 2, 4, 6).requires_grad_()
    teacher = random_outputs(2, 2, 4, 6).requires_grad_()
    targets = teacher
    if isinstance(loss_fn, DINOLoss):
        targets = loss_fn.double().teacher_probabilities(teacher)
    loss_fn(student, targets, [(0, 1), (1, 0)]).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_centre_moves_only_when_told():
    loss_fn, teacher = DINOLoss(6), random_outputs(2, 2, 4, 6, shift=1.0).float()
    loss_fn(teacher, loss_fn.teacher_probabilities(teacher), [(0, 1)])
    assert loss_fn.center.abs().sum() == 0
    loss_fn.update_center(teacher)
    torch.testing.assert_close(loss_fn.center[0], 0.1 * teacher.mean((0, 1)))
    assert "center" in loss_fn.state_dict()


def test_supervised_loss_is_cross_entropy_with_the_label_in_plain_loops():
    cosines, labels = random_outputs(3, 2, 5, 4), torch.tensor([3, 0, 1, 1, 2])
    total = 0.0
    for crop in cosines.numpy():
        for image, label in zip(crop, labels):
            total -= math.log(softmax(image / 0.2)[label]) / 10
    loss_fn = SupervisedLoss(temperature=0.2)
    assert loss_fn(cosines, labels, None).item() == pytest.approx(total, abs=1e-12)
    pieces = [loss_fn(cosines[:, i : i + 1], labels, None, i).item() for i in range(5)]
    assert np.mean(pieces) == pytest.approx(total, abs=1e-12)
    alike = loss_fn(torch.ones(2, 5, 4), labels, None).item()
    assert alike == pytest.approx(math.log(4), abs=1e-6)
