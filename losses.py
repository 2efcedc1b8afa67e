"""The losses: the paper's two, and supervised learning as their rival.

The paper's are NCE, eq. (3), and DINO's cross-entropy, eqs. (1) and (2), both in section II.B. The
student is the network that is trained. The teacher is the moving average of its weights. Each
sees crops of every image of a batch, and the losses compare a crop that the student saw with a crop
of the same image that the teacher saw. `pairs` says which: (i, j) compares the student's i-th crop
with the teacher's j-th. Supervised learning compares the student with labels.

What the losses are called with, for b of the batch's B images:

    loss            student                              targets
    NCELoss         projections (crops, b, dim)          the teacher's projections (crops, B, dim)
    DINOLoss        logits (crops, b, K)                 the teacher's distributions (crops, B, K)
    SupervisedLoss  cosines (crops, b, classes)          labels (B,)

The b images are number `first_image` to `first_image` + b - 1 of the batch. A loss is the mean over
these b images, so a caller who computes a batch in pieces weights each piece by b / B.

A loss also says what it needs of the rest:

    num_prototypes            the width of the head's last layer, or None if it has none
    uses_labels               whether the targets are the labels
    targets(teacher_outputs)  the targets otherwise
    chance                    the loss of a network that knows nothing, drawn beside the curves
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from settings import Config

CENTER_MOMENTUM = 0.9  # of the moving average of the teacher's logits, as in DINO
CLASSES = 10  # MNIST's digits, and the object classes of STL-10


def make_loss(config: Config) -> nn.Module:
    """The loss that the settings ask for."""
    if config.loss == "nce":
        return NCELoss(config.temperature)
    if config.loss == "dino":
        return DINOLoss(config.out_dim, config.temperature, config.teacher_temp, config.centering)
    if config.loss == "supervised":
        return SupervisedLoss(config.temperature)
    raise ValueError(f"--loss {config.loss}: there is no such loss in losses.py")


class NCELoss(nn.Module):
    """Noise contrastive estimation, eq. (3): recognize an image among the teacher's.

        loss = -log( exp(sim(x, x+) / tau) / sum over x+ and all x- of exp(sim(x, ·) / tau) )

    x is the student's crop i of an image. The positive x+ is the teacher's crop j of the same
    image, the negatives x- are the teacher's crops j of the other B - 1 images of the batch. sim is
    the cosine, and `temperature` > 0 is tau. A network that gives all images one projection scores
    ln B.
    """

    num_prototypes = None
    uses_labels = False

    def __init__(self, temperature: float = 0.1):
        super().__init__()
        self.temperature = temperature

    def targets(self, teacher_outputs):
        """The teacher's projections (crops, B, dim) are the targets as they are."""
        return teacher_outputs

    def chance(self, batch_size: int) -> tuple[str, float]:
        """The loss of a network that knows nothing: its formula, and its value in nats."""
        return "ln(batch)", math.log(batch_size)

    def forward(self, student, targets, pairs: list[tuple[int, int]], first_image: int = 0):
        """Mean over `pairs` and the student's images: a scalar, in nats.

        `student` (student crops, b, dim) are projections of b images of the batch, from `first_image`
        on. `targets` (teacher crops, B, dim) are the teacher's of all images; no gradient goes there.
        All negatives come from the teacher, so the student's images may be computed a few at a time.
        """
        student = F.normalize(student, dim=-1)
        teacher = F.normalize(targets.detach(), dim=-1)
        own_image = first_image + torch.arange(student.shape[1], device=student.device)
        total = 0
        for i, j in pairs:
            logits = student[i] @ teacher[j].T / self.temperature  # (b, B)
            total = total + F.cross_entropy(logits, own_image)
        return total / len(pairs)


class DINOLoss(nn.Module):
    """Cross-entropy from teacher to student, eqs. (1) and (2), over K prototypes.

        p_student = softmax(logits / tau_s),  p_teacher = softmax(balanced logits / tau_t)
        loss = -sum over the prototypes of p_teacher · log p_student

    Prototypes are learned directions, the rows of the head's last layer. Two things keep the
    network from collapse. The teacher's logits are balanced, so that no prototype can win every
    image. And they are sharpened by a low temperature, so that the teacher's distribution cannot
    become uniform. A student whose distribution is uniform scores ln K.

    `out_dim` is K. `student_temp` and `teacher_temp`, > 0, are tau_s and tau_t of eq. (1).
    `centering` "mean" subtracts a moving average of the teacher's logits, as DINO does;
    "sinkhorn_knopp" gives every prototype nearly the same share of the batch, as DINOv2 does.
    """

    uses_labels = False

    def __init__(
        self,
        out_dim: int,
        student_temp: float = 0.1,
        teacher_temp: float = 0.04,
        centering: str = "mean",
    ):
        super().__init__()
        self.num_prototypes = out_dim
        self.student_temp = student_temp
        self.teacher_temp = teacher_temp
        self.centering = centering
        self.register_buffer("center", torch.zeros(1, out_dim))

    def chance(self, batch_size: int) -> tuple[str, float]:
        """The loss of a network that knows nothing: its formula, and its value in nats."""
        return "ln(K)", math.log(self.num_prototypes)

    @torch.no_grad()
    def targets(self, teacher_outputs):
        """The teacher's logits (crops, B, K) of a whole batch as distributions over prototypes."""
        if self.centering == "mean":
            return F.softmax((teacher_outputs - self.center) / self.teacher_temp, dim=-1)
        log_p = teacher_outputs.flatten(0, 1) / self.teacher_temp  # (crops · B, K)
        for _ in range(3):  # as in DINOv2
            log_p = F.log_softmax(log_p, dim=0)  # each prototype gets the same share of the crops
            log_p = F.log_softmax(log_p, dim=1)  # each crop has a distribution over prototypes
        return log_p.exp().view_as(teacher_outputs)

    def forward(self, student, targets, pairs: list[tuple[int, int]], first_image: int = 0):
        """Mean over `pairs` and the student's images: a scalar, in nats.

        `student` (student crops, b, K) are the logits of b images of the batch, from `first_image`
        on. `targets` (teacher crops, B, K) are the teacher's distributions of all images.
        """
        log_p_student = F.log_softmax(student / self.student_temp, dim=-1)
        p_teacher = targets[:, first_image : first_image + student.shape[1]]
        total = 0
        for i, j in pairs:
            total = total - (p_teacher[j] * log_p_student[i]).sum(dim=-1).mean()
        return total / len(pairs)

    @torch.no_grad()
    def update_center(self, logits):
        """Move `center` a tenth of the way to the mean of the teacher's logits (crops, B, K).

        Called after each batch. Only `centering` "mean" uses it.
        """
        self.center.lerp_(logits.mean(dim=(0, 1)), 1 - CENTER_MOMENTUM)


class SupervisedLoss(nn.Module):
    """Cross-entropy with the label, for comparison.

    Section I says, citing DINO, that supervised ViTs lack such attention maps. The logits are
    cosines with a prototype for each class, divided by `temperature` > 0. A network that finds all
    classes equally likely scores ln(classes).
    """

    num_prototypes = CLASSES
    uses_labels = True

    def __init__(self, temperature: float = 0.1):
        super().__init__()
        self.temperature = temperature

    def chance(self, batch_size: int) -> tuple[str, float]:
        """The loss of a network that knows nothing: its formula, and its value in nats."""
        return "ln(classes)", math.log(CLASSES)

    def forward(self, student, targets, pairs: list[tuple[int, int]], first_image: int = 0):
        """Mean over the student's crops and images: a scalar, in nats.

        `student` (student crops, b, classes) are the cosines of b images of the batch, from
        `first_image` on. `targets` (B,) int64 are the labels of all images. `pairs` are ignored: they
        are here so that all losses are called alike.
        """
        labels = targets[first_image : first_image + student.shape[1]].expand(len(student), -1)
        return F.cross_entropy(student.flatten(0, 1) / self.temperature, labels.flatten())
