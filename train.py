"""Train a student ViT to agree with its own moving average about views of the same digit.

    python train.py --loss nce --views same
    python train.py --loss nce --views different

Student and teacher are one network with two sets of weights, and nobody tells them what a digit is.
The paper asks where the attention of such a network goes; evaluate.py measures that.
Section and equation numbers are the paper's.
"""

import contextlib
import copy
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import evaluate
import metrics
import observe
import report
import runs
import settings
import vit
import weights
from losses import make_loss
from runs import FolderLock, StopRequest, any_rank, print_rank0
from settings import Config
from views import TrainingViews, left_out_batches

# Muon's learning rate divided by AdamW's. Entries of AdamW's update are about 1, those of Muon's
# update of a matrix with n columns about 1/√n, which is a tenth for the laptop preset's width.
MUON_RATE = 10
FINITE_CHECK_STEPS = 20  # steps between two looks at the loss, each of which waits for the GPU


# --------------------------------------------------------------------------------------- schedules


def cosine(start: float, end: float, progress: float) -> float:
    """From start to end along half a cosine as progress goes from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rate(config: Config, progress: float) -> float:
    """A linear ramp over the first fraction `warmup` of the run, then a cosine to zero (III)."""
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    return cosine(config.lr, 0, (progress - config.warmup) / (1 - config.warmup))


# -------------------------------------------------------------------------------------- optimisers


class Muon(torch.optim.Optimizer):
    """Momentum whose update moves every direction of a weight matrix alike (Jordan 2024).

    `torch.optim.Muon` computes in bfloat16, which CPUs without such instructions emulate. There it
    takes 15 times as long as this, which is more than the rest of the step.
    """

    def __init__(self, matrices: list[nn.Parameter], momentum: float = 0.95):
        # `training_step` sets the learning rate.
        super().__init__(matrices, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        momentum = group["momentum"]
        # Matrices of one shape are moved together, which takes fewer and larger operations.
        # For each matrix alone this is
        #     average.lerp_(gradient, 1 - momentum)
        #     update = orthogonalize(gradient.lerp(average, momentum))  # Nesterov's momentum
        #     matrix.sub_(update, alpha=rate)
        matrices_of_shape = {}
        for matrix in group["params"]:
            matrices_of_shape.setdefault(matrix.shape, []).append(matrix)
        for (rows, columns), matrices in matrices_of_shape.items():
            gradients = [matrix.grad for matrix in matrices]
            for matrix in matrices:
                state = self.state[matrix]
                if "average" not in state:
                    state["average"] = torch.zeros_like(matrix)
            averages = [self.state[matrix]["average"] for matrix in matrices]
            torch._foreach_lerp_(averages, gradients, 1 - momentum)
            updates = torch.stack(gradients).lerp(torch.stack(averages), momentum)
            # Entries of the orthogonalized update of a tall matrix are about 1/√rows in size; this
            # makes them 1/√columns, as they are in a wide one.
            rate = group["lr"] * max(1, rows / columns) ** 0.5
            torch._foreach_add_(matrices, orthogonalize(updates).unbind(), alpha=-rate)


def orthogonalize(matrices):
    """Bring all singular values of matrices U S Vᵀ near 1, so that they become about U Vᵀ.

    Five Newton–Schulz steps with Jordan's coefficients, on matrices (n, rows, columns).
    """
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:  # x xᵀ is then the smaller product
        x = x.mT
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315)  # -4.775 a + 2.0315 a a
        x = torch.baddbmm(x, b, x, beta=3.4445)  # 3.4445 x + b x
    return x.mT if is_tall else x


def make_optimizers(config: Config, student: nn.Module) -> tuple[torch.optim.AdamW, Muon | None]:
    """AdamW, and Muon for the weight matrices of the blocks and of the head's MLP, if asked for.

    AdamW has two groups: the first, with weight decay, of what has two dimensions or more; the
    second, without, of norms and biases. Muon has no decay. `training_step` sets learning rates and
    decay before each step.
    """
    matrices = []
    if config.optimizer == "muon":
        for part in (student.backbone.blocks, student.head.mlp):
            matrices += [p for p in part.parameters() if p.ndim == 2]
    muon_ids = {id(matrix) for matrix in matrices}
    for_adamw = [p for p in student.parameters() if id(p) not in muon_ids]
    decayed = {"params": [p for p in for_adamw if p.ndim > 1]}
    not_decayed = {"params": [p for p in for_adamw if p.ndim <= 1], "weight_decay": 0.0}
    adamw = torch.optim.AdamW([decayed, not_decayed], fused=True)
    return adamw, Muon(matrices) if matrices else None


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float):
    """Exponential moving average: teacher ← momentum · teacher + (1 − momentum) · student."""
    teacher_parameters = list(teacher.parameters())
    torch._foreach_lerp_(teacher_parameters, list(student.parameters()), 1 - momentum)


# ------------------------------------------------------------------------------------------- state


@dataclass
class TrainingState:
    """All that changes in training."""

    student: nn.Module
    teacher: nn.Module
    loss_fn: nn.Module
    scaler: torch.amp.GradScaler  # scales float16's gradients; does nothing in other formats
    optimizer: torch.optim.AdamW  # of all parameters that Muon does not move
    muon: Muon | None
    parallel_student: nn.Module  # the student, in DistributedDataParallel if there are ranks

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer] if self.muon is None else [self.optimizer, self.muon]

    def parts(self) -> dict:
        """What a checkpoint holds, by the names that it has there."""
        parts = {
            "student": self.student,
            "teacher": self.teacher,
            "loss": self.loss_fn,
            "scaler": self.scaler,
            "optimizer": self.optimizer,
        }
        if self.muon is not None:
            parts["muon"] = self.muon
        return parts

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts().items()}

    def load_state_dict(self, checkpoint: dict):
        """Raises ValueError if a part is missing or of another shape."""
        for name, part in self.parts().items():
            try:
                part.load_state_dict(checkpoint[name])
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"the checkpoint's {name} does not fit its settings; use another copy of it"
                ) from error


def make_state(config: Config, student: nn.Module) -> TrainingState:
    """The state before the first step; the teacher begins as a copy of the student."""
    device = student.backbone.cls_token.device
    is_half = autocast_dtype(config.precision, device) == torch.float16
    optimizer, muon = make_optimizers(config, student)
    return TrainingState(
        student=student,
        teacher=copy.deepcopy(student).requires_grad_(False),
        loss_fn=make_loss(config).to(device),
        scaler=torch.amp.GradScaler(device.type, enabled=is_half),
        optimizer=optimizer,
        muon=muon,
        parallel_student=student,
    )


def compile_blocks(*networks: nn.Module):
    """Compile the blocks of all networks, or print a warning where that cannot be done."""
    try:
        torch.compile(lambda x: x + 1)(networks[0].backbone.cls_token.detach())
    except RuntimeError as error:  # no compiler, or a Python that is too new
        reason = weights.one_line(error)[:150]
        print_rank0(f"warning: --compile has no effect here ({reason})")
        return
    for network in networks:
        for block in network.backbone.blocks:
            block.compile()


# --------------------------------------------------------------- the step, in pieces if need be


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The number format that the networks compute in (config.precision).

    "auto" is bfloat16 where that is fast, float16 on older GPUs, else float32.
    """
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        is_ampere_or_newer = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if is_ampere_or_newer else torch.float16
    # On a CPU without bfloat16 instructions it is emulated, and slow.
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def project(config: Config, network: nn.Module, crops, numbers: list[int]):
    """Some of the crops (C, B, 3, H, W) through a network, in one pass: (len(numbers), B, …).

    `numbers` lists the crops that this network sees; they must be consecutive.
    """
    dtype = autocast_dtype(config.precision, crops.device)
    crops = crops[numbers[0] : numbers[-1] + 1]  # indexing by a list would copy it to the GPU first
    with torch.autocast(crops.device.type, dtype, enabled=dtype != torch.float32):
        outputs = network(crops.flatten(0, 1))
    if outputs.dtype != torch.float64:  # in which only the tests compute
        outputs = outputs.float()  # the losses divide by a small temperature
    return outputs.unflatten(0, (len(numbers), -1))


def batch_loss(
    config: Config,
    state: TrainingState,
    views: TrainingViews,
    params: dict,
    backward: Callable | None = None,
):
    """The loss of a batch, computed `micro_batch` images at a time.

    `params` are the random numbers of the batch, tensors with a row for each of its B images, from
    `views.sample`; `views.render` makes the same crops of the same rows each time. `views.plan`
    lists which crops the teacher and the student see, and the pairs that are compared. The plain
    version, for a batch that fits in memory on one device, is

        crops = views.render(params)
        with torch.no_grad():
            teacher_outputs = project(config, state.teacher, crops, views.plan.teacher)
        targets = state.loss_fn.targets(teacher_outputs)
        student_outputs = project(config, state.student, crops, views.plan.student)
        loss = state.loss_fn(student_outputs, targets, views.plan.pairs)
        loss.backward()

    Pieces of the batch give the loss and the gradient of the whole, up to rounding: an image meets
    the other images only through their teacher outputs, which carry no gradient. So the teacher
    sees all pieces first, and then the student sees one piece after another. A piece is rendered a
    second time rather than kept.

    In training, `backward` takes the loss of each piece, each of several ranks computes its share
    of the batch, and the loss that is returned is this rank's part of the sum. In validation there
    is no `backward`, and every rank computes the whole batch. Returns the loss, detached; the
    teacher's outputs for the whole batch, (crops, B, …); and the targets, which are labels (B,) in
    supervised learning.
    """
    # this rank's share of the batch, in pieces
    batch_size = len(params["centre"])
    ranks = runs.world_size() if backward else 1
    share = batch_size // ranks
    first_image = runs.rank() * share if backward else 0
    piece_size = config.micro_batch or share
    pieces = []
    for start in range(first_image, first_image + share, piece_size):
        end = min(start + piece_size, first_image + share)
        pieces.append({name: value[start:end] for name, value in params.items()})

    # the teacher's outputs for the whole batch
    teacher_outputs = []
    for piece in pieces:
        crops = views.render(piece)
        with torch.no_grad():
            teacher_outputs.append(project(config, state.teacher, crops, views.plan.teacher))
    only_crops = crops if len(pieces) == 1 else None  # they need not be rendered again
    teacher_outputs = torch.cat(teacher_outputs, dim=1)  # (crops, share, …)
    if ranks > 1:
        teacher_outputs = gather_images(teacher_outputs)  # (crops, B, …)
    if state.loss_fn.uses_labels:
        targets = views.labels(params)
    else:
        targets = state.loss_fn.targets(teacher_outputs)

    # the student, one piece after another
    student = state.parallel_student if backward else state.student
    loss = 0.0
    for number, piece in enumerate(pieces):
        crops = views.render(piece) if only_crops is None else only_crops
        # The ranks add up their gradients once, after the last piece. DistributedDataParallel
        # decides in the forward pass whether the backward pass will do so, so only the former is
        # inside.
        is_last = number == len(pieces) - 1
        if ranks == 1 or is_last:
            gradient_sync = contextlib.nullcontext()
        else:
            gradient_sync = student.no_sync()
        with gradient_sync:
            student_outputs = project(config, student, crops, views.plan.student)
        # Targets are those of the whole batch, so the loss is told where in it the piece begins.
        first_of_piece = first_image + number * piece_size
        piece_loss = state.loss_fn(student_outputs, targets, views.plan.pairs, first_of_piece)
        piece_loss = piece_loss * (student_outputs.shape[1] / batch_size)
        if backward:
            # DistributedDataParallel takes the mean over the ranks; this makes it their sum.
            backward(piece_loss * ranks)
        loss = loss + piece_loss.detach()
    return loss, teacher_outputs, targets


def gather_images(outputs):
    """The outputs (crops, share, …) of all ranks, in their order: (crops, B, …)."""
    parts = [torch.empty_like(outputs) for _ in range(runs.world_size())]
    dist.all_gather(parts, outputs.contiguous())
    return torch.cat(parts, dim=1)


def training_step(
    config: Config,
    state: TrainingState,
    views: TrainingViews,
    params: dict,
    step: int,
    total_steps: int,
):
    """Take step number `step`, counted from 0, of `total_steps`, on the batch of `params`.

    Returns the loss of the batch and the norm of the gradient before it is clipped, both on the
    device: nothing here waits for the GPU, except float16's scaler.
    """
    # schedules
    progress = step / total_steps
    rate = learning_rate(config, progress)
    decayed_group, _ = state.optimizer.param_groups
    decayed_group["weight_decay"] = cosine(config.weight_decay, config.weight_decay_end, progress)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    if state.muon is not None:
        state.muon.param_groups[0]["lr"] = MUON_RATE * rate

    # loss and gradient
    for optimizer in state.optimizers:
        optimizer.zero_grad()

    def backward(piece_loss):
        state.scaler.scale(piece_loss).backward()

    loss, teacher_outputs, _ = batch_loss(config, state, views, params, backward)
    if config.loss == "dino":
        state.loss_fn.update_center(teacher_outputs)
        steps_per_epoch = total_steps // config.epochs
        if step < steps_per_epoch:  # DINO does not train its last layer yet
            state.student.head.last_layer.weight_v.grad = None

    # clip the gradient
    for optimizer in state.optimizers:
        state.scaler.unscale_(optimizer)
    gradient_norm = nn.utils.clip_grad_norm_(state.student.parameters(), config.clip_grad)

    # If a gradient overflowed in float16, the norm is infinite, and clipping has made all gradients
    # 0 or NaN. The scaler checks each optimizer separately, and would still step the other one.
    if not state.scaler.is_enabled() or gradient_norm.isfinite():
        for optimizer in state.optimizers:
            state.scaler.step(optimizer)
    state.scaler.update()

    momentum = cosine(config.momentum_teacher, 1.0, progress)
    update_teacher(state.teacher, state.student, momentum)
    return runs.all_reduce(loss), gradient_norm


def prefetch(views: TrainingViews, steps: range) -> Iterator[dict]:
    """The parameters of the batch of each step; with CUDA a thread samples them ahead."""
    if views.device.type != "cuda":
        for step in steps:
            yield views.sample(step)  # a CPU's cores have enough to do
        return

    def sample(step):
        return {name: value.pin_memory() for name, value in views.sample(step).items()}

    with ThreadPoolExecutor(max_workers=1) as thread:
        pending = thread.submit(sample, steps[0])
        for step in steps:
            params = pending.result()
            if step + 1 in steps:
                pending = thread.submit(sample, step + 1)
            yield params


# -------------------------------------------------------------------------------------- validation


class Validation:
    """Measures a state on validation images, which are the same for every seed.

    The images, and the training images from which k-NN learns, are rendered once and kept:
    rendering them takes as long as measuring on them.
    """

    def __init__(self, config: Config, splits: dict, device: torch.device):
        held_out = splits["validation"]
        count = evaluate.VALIDATION_IMAGES
        self.config = config
        images, bank = evaluate.validation_batches(config, splits)
        self.images = list(images)
        self.bank = list(bank)
        self.left_out = []
        if config.dataset != "stl10":
            # Fewer canvases, since each takes a forward pass for every patch with ink. Photographs
            # have no parts that could be left out.
            self.left_out = list(left_out_batches(config, held_out, count // 16, "validation"))

        # The loss depends on the size of the batch, so it is that of training if there are enough
        # images. Half as many images as above are enough.
        batch_size = min(config.batch_size, count, len(held_out))
        self.steps = range(max(1, count // 2 // batch_size))
        view_config = replace(config, batch_size=batch_size, seed=0)
        self.views = TrainingViews(view_config, held_out, "validation", device)

    @torch.no_grad()
    def __call__(self, state: TrainingState) -> dict:
        """What a line of the log says under "validation"."""
        result = self.losses(state)
        teacher = {"trained": state.teacher.backbone}
        bank = observe.observe(teacher, self.bank, maps=False)
        observation = observe.observe(teacher, self.images)
        effects = None
        if self.left_out:
            effects = observe.observe_effects(state.teacher.backbone, self.left_out)
        return result | evaluate.validate(observation, bank, effects)

    def losses(self, state: TrainingState) -> dict:
        """The loss; for DINO also how spread out the teacher's distributions are.

        `mean_entropy` is the mean of their entropies, `entropy_of_mean` the entropy of their mean,
        both as fractions of ln K. Raises FloatingPointError if the loss is not finite.
        """
        batches = len(self.steps)
        loss = 0.0
        mean_entropy = 0.0
        mean_distribution = 0.0
        for step in tqdm(self.steps, "validating", unit="batch", leave=False, disable=None):
            params = self.views.sample(step)
            part, _, targets = batch_loss(self.config, state, self.views, params)
            loss += part.item() / batches
            if self.config.loss == "dino":  # targets are distributions, (crops, images, K)
                mean_entropy = mean_entropy + metrics.entropy(targets).mean() / batches
                mean_distribution = mean_distribution + targets.mean((0, 1)) / batches
        if not math.isfinite(loss):
            raise FloatingPointError("the validation loss is NaN or infinite; use a lower --lr")
        result = {"loss": loss}
        if self.config.loss == "dino":
            result["entropy_of_mean"] = metrics.entropy(mean_distribution).item()
            result["mean_entropy"] = mean_entropy.item()
        return result


# ---------------------------------------------------------------------------------------- the loop


@dataclass
class Run:
    """A run that is ready to start."""

    config: Config
    student: nn.Module
    splits: dict
    views: TrainingViews
    folder: str
    checkpoint: dict | None  # what a resumed run goes on from
    start_description: str = "random weights"  # what it starts from

    @property
    def steps_per_epoch(self) -> int:
        return self.config.images_per_epoch // self.config.batch_size


@dataclass
class Progress:
    """How far a run has come, beside its state."""

    history: list[dict]  # the lines of log.jsonl
    epoch_loss: torch.Tensor  # summed over the steps of the epoch so far, a scalar
    is_finite: torch.Tensor  # whether all losses and gradients were so far, a scalar bool
    # When the epoch began, or what this process does of it, in seconds of time.monotonic()
    epoch_started: float
    epoch_first_step: int
    saved_at: float  # when a checkpoint was last written, in the same seconds


def train(run: Run, state: TrainingState, stop: StopRequest | None = None) -> list[dict]:
    """Train the student on views of the training split; each of several ranks calls this.

    A run with a checkpoint goes on as if it had not stopped, because all randomness is derived from
    the seed and the step. `stop` ends it after a step, or in the middle of a validation.

    Writes ckpt.pth to the run's folder before the first step, after each epoch, every
    `checkpoint_minutes` and when it is stopped, and log.jsonl with a line for each epoch. Returns
    these lines.
    """
    config = run.config
    stop = stop or StopRequest()
    total_steps = config.epochs * run.steps_per_epoch
    validation = Validation(config, run.splits, run.views.device)
    start_step = run.checkpoint["step"] if run.checkpoint else 0
    progress = start_or_resume(run, state, start_step)
    if runs.world_size() > 1:
        state.parallel_student = DistributedDataParallel(state.student)

    bar = tqdm(
        total=total_steps * config.batch_size,
        initial=start_step * config.batch_size,
        unit=" images",
        disable=True if runs.rank() > 0 else None,  # None: where there is no terminal
    )
    batches = prefetch(run.views, range(start_step, total_steps))
    # Epoch 0 is measured before the first step. A resumed run may have been stopped in a validation.
    must_stop = after_step(run, state, progress, validation, stop, start_step)
    for step in range(start_step, total_steps):
        if must_stop:
            break
        loss, gradient_norm = training_step(
            config, state, run.views, next(batches), step, total_steps
        )
        progress.epoch_loss += loss
        progress.is_finite &= loss.isfinite()
        # float16's scaler skips a step whose gradient overflows, and scales less from then on.
        if not state.scaler.is_enabled():
            progress.is_finite &= gradient_norm.isfinite()
        bar.update(config.batch_size)
        if (step + 1) % FINITE_CHECK_STEPS == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")  # rarely, since it waits for the GPU
        must_stop = after_step(run, state, progress, validation, stop, step + 1)
    bar.close()
    return progress.history


def start_or_resume(run: Run, state: TrainingState, start_step: int) -> Progress:
    """The progress of a run that begins, or goes on; its checkpoint is loaded into `state`."""
    device = run.views.device
    progress = Progress(
        history=[],
        epoch_loss=torch.zeros((), device=device),
        is_finite=torch.ones((), dtype=torch.bool, device=device),
        epoch_started=time.monotonic(),
        epoch_first_step=start_step,
        saved_at=time.monotonic(),
    )
    if run.checkpoint:
        progress.history = list(run.checkpoint["metrics"])
        # Earlier versions kept a part of it for each rank.
        progress.epoch_loss += sum(run.checkpoint["epoch_loss"])
        state.load_state_dict(run.checkpoint)
        # without what came after the checkpoint
        runs.write_log(run.folder, progress.history)
    else:
        # A run that is killed in its first validation can be resumed.
        save_run(run, state, 0, progress)
    return progress


def after_step(
    run: Run,
    state: TrainingState,
    progress: Progress,
    validation: Validation,
    stop: StopRequest,
    steps: int,
) -> bool:
    """Check, measure and save whatever is due once this number of steps has been taken.

    All ranks call this together. Returns whether the run must stop, because a signal asked for it.
    """
    # The log has a line for epoch 0, before the first step. So with n lines, the epoch to be
    # measured next is number n.
    measurement_is_due = steps == len(progress.history) * run.steps_per_epoch
    minutes_since_save = (time.monotonic() - progress.saved_at) / 60
    must_stop, checkpoint_is_due = any_rank(
        stop.requested, minutes_since_save > run.config.checkpoint_minutes
    )
    save_is_due = measurement_is_due or must_stop or checkpoint_is_due
    if save_is_due or steps % FINITE_CHECK_STEPS == 0:
        check_finite(progress.is_finite, state.scaler, steps)

    if measurement_is_due:
        line = epoch_line(run, steps, progress)
        line = measure_epoch(line, state, validation, stop)
        if line is not None:
            line["collapse"] = evaluate.collapse_warning(run.config, [*progress.history, line])
            progress.history.append(line)
            publish_epoch(run, state, progress.history)
            progress.epoch_loss.zero_()
        progress.epoch_started = time.monotonic()
        progress.epoch_first_step = steps
        (must_stop,) = any_rank(stop.requested)

    if save_is_due:
        save_run(run, state, steps, progress)
        progress.saved_at = time.monotonic()
    return must_stop


def epoch_line(run: Run, steps: int, progress: Progress) -> dict:
    """What a line of the log says about training, once this number of steps has been taken.

    The loss is the mean over the epoch. Seconds and images per second are of what this process did
    of the epoch, which is less than all of it if the run was resumed.
    """
    line = {"epoch": steps // run.steps_per_epoch, "step": steps}
    if steps == 0:
        return line
    total_steps = run.config.epochs * run.steps_per_epoch
    seconds = time.monotonic() - progress.epoch_started
    images = (steps - progress.epoch_first_step) * run.config.batch_size
    line["loss"] = progress.epoch_loss.item() / run.steps_per_epoch
    line["lr"] = learning_rate(run.config, (steps - 1) / total_steps)
    line["seconds"] = seconds
    line["images_per_second"] = images / max(seconds, 1e-9)
    return line


def measure_epoch(
    line: dict, state: TrainingState, validation: Validation, stop: StopRequest
) -> dict | None:
    """The line of the log with its "validation"; None if a stop was requested meanwhile.

    A signal ends the validation at once: nothing changes in it, and the resumed run does it again.
    """
    if stop.requested:
        return None
    try:
        with stop.raising_at_once():
            return line | {"validation": validation(state)}
    except InterruptedError:
        return None


def check_finite(is_finite, scaler: torch.amp.GradScaler, step: int):
    """Raise FloatingPointError if a step was not finite.

    float16's scaler halves its scale with every step whose gradient is not finite. A scale below 1
    says that this is not mere overflow.
    """
    if not is_finite or scaler.get_scale() < 1:
        raise FloatingPointError(
            f"the loss or its gradient is NaN or infinite, at step {step} or up to "
            f"{FINITE_CHECK_STEPS - 1} before; use a lower --lr"
        )


def publish_epoch(run: Run, state: TrainingState, history: list[dict]):
    """Write the log, keep the teacher if --keep-epochs says so, and print the epoch's line.

    Epoch 0 is not printed. If the network has collapsed, a warning is printed once.
    """
    line = history[-1]
    runs.write_log(run.folder, history)
    if line["epoch"] in run.config.keep_epochs and runs.rank() == 0:
        content = {
            "config": asdict(run.config),
            "epoch": line["epoch"],
            "metrics": history,
            "teacher": state.teacher.state_dict(),
        }
        runs.save_checkpoint(os.path.join(run.folder, f"epoch-{line['epoch']}.pth"), content)
    if line["epoch"] > 0:
        print_rank0(report.epoch_text(run.config, line))
    has_warned = any(earlier.get("collapse") for earlier in history[:-1])
    if line["collapse"] and not has_warned:
        print_rank0(f"warning: {line['collapse']}")


def save_run(run: Run, state: TrainingState, steps: int, progress: Progress):
    """Write ckpt.pth, with all that the run needs to go on after this number of steps."""
    if runs.rank() > 0:
        return
    content = state.state_dict()
    content["config"] = asdict(run.config)
    content["step"] = steps
    content["metrics"] = progress.history
    content["epoch"] = steps // run.steps_per_epoch
    # of an epoch that is not over; a list, as in earlier versions
    content["epoch_loss"] = [progress.epoch_loss.item()]
    content["threads"] = torch.get_num_threads()  # the last bits of a sum depend on it
    runs.save_checkpoint(os.path.join(run.folder, "ckpt.pth"), content)


# -------------------------------------------------------------------------------- the command line


def claim_folder(args, lock: FolderLock):
    """Lock the folder that the run is to write into, if it is there already.

    A run is resumed from what is read after this, so no other process is about to write it anew.
    Raises ValueError for a folder that another run writes into or has written into.
    """
    if args.resume:
        if args.output:
            raise ValueError("--output: a resumed run goes on in its own folder; leave it out")
        lock.take(os.path.dirname(runs.checkpoint_path(args.resume)) or ".")
    elif args.output:
        lock.take(args.output)
        runs.check_output(args.output)


def prepare(args) -> Run:
    """Build the Run: its settings, its data, and its first weights.

    Everything that can fail because of what the user gave fails here, before a new run has a folder.
    Raises ValueError or OSError.
    """
    checkpoint = None
    initial_backbone = None  # what a new run starts from, if not random weights
    start_description = "random weights"
    weights_shape = {}
    folder = ""
    if args.resume:
        path = runs.checkpoint_path(args.resume)
        checkpoint, config = runs.read_run(path, args.flags)
        start_description = f"step {checkpoint['step']} of {path}"
        folder = os.path.dirname(path) or "."
        runs.use_threads(checkpoint["threads"])
    else:
        config = settings.make_config(args.flags, args.preset)
        if config.weights != "none":
            loaded = weights.load_backbone(config.weights)
            start_description = f"{config.weights}: {loaded.description}"
            for remark in loaded.remarks:
                print_rank0(f"{config.weights}: {remark}")
            initial_backbone = loaded.backbone
            weights_shape = asdict(initial_backbone.shape)  # comes before the preset's values
            config = settings.make_config(args.flags, args.preset, weights_shape)
    settings.check_config(config, weights_shape, runs.world_size())
    device = runs.find_device(config.device)

    student = vit.build_network(config)
    if initial_backbone is not None:
        student.backbone.load_state_dict(initial_backbone.state_dict())
        trained_heads = initial_backbone.shape.heads
        if trained_heads != config.heads:
            config.fallbacks.append(
                f"--heads {config.heads} cuts q, k and v of weights that were trained with "
                f"{trained_heads} heads"
            )
    splits, config = data.load_dataset(config, device)
    views = TrainingViews(config, splits["train"], device=device)
    return Run(config, student.to(device), splits, views, folder, checkpoint, start_description)


def prepare_ranks(args, lock: FolderLock) -> Run:
    """`prepare` on every rank, and the run's folder, which the first rank makes.

    The first rank goes ahead, since it downloads what is missing. An error of one rank ends all.
    """
    run = None
    with runs.together():
        if runs.rank() == 0:
            claim_folder(args, lock)
            run = prepare(args)
    with runs.together():
        if runs.rank() > 0:
            run = prepare(args)
    if runs.world_size() > 1:
        runs.compare_ranks(what_ranks_share(run))
    with runs.together():
        if runs.rank() == 0 and not args.resume:
            run.folder = runs.make_folder(run.config, args.output)
            # Another process may have done the same meanwhile.
            lock.take(run.folder)
            runs.check_output(run.folder)
    return run


def what_ranks_share(run: Run) -> dict:
    """What must be the same on all ranks, {what it is: value}: settings, data, first weights.

    The folder of the data may be another on another machine. Random first weights are not compared,
    since other processors may round them otherwise.
    """
    values = {}
    for name, value in asdict(run.config).items():
        if name not in ("data_root", "fallbacks"):
            values[settings.flag(name)] = value
    for name, split in run.splits.items():
        values[f"number of {name} images"] = len(split)
        values[f"digest of {name} images"] = data.digest(split.images, split.labels)
    if run.config.background not in ("black", "texture"):
        values["digest of background images"] = data.digest(run.views.background.images)
    values["start from"] = run.start_description
    if run.checkpoint:
        values["digest of weights"] = data.digest(*run.checkpoint["teacher"].values())
    elif run.config.weights != "none":
        values["digest of weights"] = data.digest(*run.student.backbone.parameters())
    return values


def print_start(run: Run, args):
    """Say what is about to be trained, and what had to be replaced."""
    config = run.config
    if run.checkpoint:
        reason = "resumed"
    elif args.preset:
        reason = "as asked"
    else:
        reason = "CUDA is available" if torch.cuda.is_available() else "there is no CUDA"
    if runs.rank() == 0:
        print(f"preset {config.preset} ({reason}): {evaluate.describe(config)}")
        print(
            f"epochs: {config.epochs}, of {config.images_per_epoch:,} images, on {config.device}, "
            f"ranks: {runs.world_size()}, into {run.folder}"
        )
        print(f"starting from {run.start_description}", flush=True)
    for line in config.fallbacks:
        print_rank0(f"warning: {line}")


def train_and_report(args, lock: FolderLock) -> int:
    """The whole run that the command line asks for; returns the exit status."""
    run = prepare_ranks(args, lock)
    config = run.config
    print_start(run, args)
    state = make_state(config, run.student)
    if config.compile:
        compile_blocks(state.student, state.teacher)

    with StopRequest().listening() as stop:
        history = train(run, state, stop)
        was_stopped = len(history) <= config.epochs  # epoch 0 has a line too
        if was_stopped:
            print_rank0(f"stopped; python train.py --resume {run.folder} goes on")
            return 128 + stop.signal_number

    if runs.rank() == 0:
        checkpoint = os.path.join(run.folder, "ckpt.pth")
        metrics_path = os.path.join(run.folder, "metrics.json")
        backbone = state.teacher.backbone
        evaluation = evaluate.evaluate(checkpoint, config, history, backbone, run.splits)
        evaluate.write_metrics([evaluation.result], metrics_path)
        print(report.format_report([evaluation.result], metrics_path))
        print(f"Next: python visualize.py {checkpoint}")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = settings.parse_args(argv)
    socket.setdefaulttimeout(15)  # seconds; a host that has not answered by then is unreachable
    try:
        runs.init_distributed()
        with FolderLock() as lock:
            return train_and_report(args, lock)
    except KeyboardInterrupt:
        print_rank0("interrupted; python train.py --resume RUN goes on from its last checkpoint")
        return 128 + signal.SIGINT
    except (FloatingPointError, runs.RanksError) as error:  # all ranks have the same
        print_rank0(f"train.py: error: {error}")
        return 2
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        runs.print_error(runs.error_line(error))
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    runs.prepare_output()
    sys.exit(main())
