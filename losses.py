"""The paper's two losses, section II.B: NCE, eq. (3), and DINO's cross-entropy, eqs. (1, 2).

Both compare a crop that the student saw with a crop that the teacher saw. Which crop with
which is for the caller to say: `pairs` is a list of (student crop, teacher crop). Their rival
compares what the student makes of a crop with its label.
"""

import torch
import torch.nn.functional as F
from torch import nn


class NCELoss(nn.Module):
    """Noise contrastive estimation, eq. (3): find the own image among the teacher's.

    For the student's crop i and the teacher's crop j of one image, that pair is the positive,
    x+; the teacher's crops j of the other B - 1 images of the batch are the negatives, x-.
    sim is the cosine, `temperature` is tau, > 0. A network that knows nothing scores ln B.
    """

    def __init__(self, temperature=0.1):
        super().__init__()
        self.temperature = temperature

    def forward(self, student, teacher, pairs, first=0):
        """Mean over `pairs` and the student's images: a scalar, in nats.

        `student` (student crops, b, dim): projections of b of the B images, from number `first`
        on; `teacher` (teacher crops, B, dim): of all, without a gradient. All negatives come from
        the teacher, so the student's images may be computed a few at a time.
        """
        student = F.normalize(student, dim=-1)
        teacher = F.normalize(teacher.detach(), dim=-1)
        own_image = first + torch.arange(student.shape[1], device=student.device)
        total = 0
        for i, j in pairs:
            similarity = student[i] @ teacher[j].T / self.temperature  # (b, B)
            total = total + F.cross_entropy(similarity, own_image)
        return total / len(pairs)


class DINOLoss(nn.Module):
    """Cross-entropy from teacher to student, eqs. (1, 2), over K prototypes.

    The teacher's logits are balanced, so that no prototype can win every image, and sharpened
    by a low temperature, so that not all win alike; together they are to keep it from collapse.
    A network that knows nothing scores ln K.

    `out_dim` is K; `student_temp` and `teacher_temp`, > 0, are tau_s and tau_t of eq. (1).
    `centering` "mean" subtracts a moving average of the teacher's logits, as DINO does;
    "sinkhorn_knopp" gives every prototype the same share of the batch, as DINOv2 does.
    """

    def __init__(self, out_dim, student_temp=0.1, teacher_temp=0.04, centering="mean"):
        super().__init__()
        self.student_temp, self.teacher_temp = student_temp, teacher_temp
        self.centering = centering
        self.register_buffer("center", torch.zeros(1, out_dim))

    @torch.no_grad()
    def teacher_probabilities(self, logits):
        """The teacher's logits (crops, B, K) of a whole batch as distributions over prototypes."""
        if self.centering == "mean":
            return F.softmax((logits - self.center) / self.teacher_temp, dim=-1)
        log_p = logits.flatten(0, 1) / self.teacher_temp  # (crops · B, K)
        for _ in range(3):  # as in DINOv2
            log_p = F.log_softmax(log_p, dim=0)  # prototypes: the same share of the images
            log_p = F.log_softmax(log_p, dim=1)  # images: a distribution over prototypes
        return log_p.exp().view_as(logits)

    def forward(self, student, teacher, pairs, first=0):
        """Mean over `pairs` and the student's images: a scalar, in nats.

        `student` (student crops, b, K): logits of b of the B images, from number `first` on;
        `teacher` (teacher crops, B, K): of all, from `teacher_probabilities`.
        """
        log_p_student = F.log_softmax(student / self.student_temp, dim=-1)
        p_teacher = teacher[:, first : first + student.shape[1]]
        total = 0
        for i, j in pairs:
            total = total - (p_teacher[j] * log_p_student[i]).sum(dim=-1).mean()
        return total / len(pairs)

    @torch.no_grad()
    def update_center(self, logits):
        """Move the centre a tenth of the way to the mean of the teacher's logits (crops, B, K)."""
        self.center.lerp_(logits.mean(dim=(0, 1)), 1 - 0.9)  # DINO's momentum


class SupervisedLoss(nn.Module):
    """Cross-entropy with the label: does attention need self-supervision (section I, after DINO)?

    The logits are cosines with a prototype for each class, divided by `temperature`, > 0. A
    network that knows nothing scores ln(classes).
    """

    def __init__(self, temperature=0.1):
        super().__init__()
        self.temperature = temperature

    def forward(self, student, labels, pairs, first=0):
        """Mean over the student's crops and images: a scalar, in nats; `pairs` do not matter.

        `student` (student crops, b, classes): cosines of b of the B images, from number `first`
        on; `labels` (B,) int64: of all.
        """
        labels = labels[first : first + student.shape[1]].expand(len(student), -1)
        return F.cross_entropy(student.flatten(0, 1) / self.temperature, labels.flatten())
