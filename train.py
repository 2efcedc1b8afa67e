"""Train a student ViT to agree with its own moving average about views of the same digit.

    python train.py --loss nce --views same
    python train.py --loss nce --views different

Student and teacher are one network with two sets of weights, and nobody says what a digit is. The
paper asks where the attention of such a network goes (metrics.py, visualize.py). Section and
equation numbers are the paper's.
"""

import argparse
import contextlib
import copy
import itertools
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import metrics
import vit
from losses import DINOLoss, NCELoss, SupervisedLoss

# `paper` follows sections II.C and III, and DINO where the paper is silent. `laptop` is the least
# that still shows the effect from random weights within minutes on two CPU cores. Every row is a
# flag. A type in place of a value: `make_config` derives the value from the other settings.
SETTINGS = [  # name, value in `paper`, value in `laptop`, what it is (section of the paper)
    ("loss", "nce", "nce", "nce, eq. (3); dino, eqs. (1, 2); supervised, by labels (I)"),
    ("views", "same", "same", "crops of the same canvas, or of two different ones (III.B)"),
    ("crops", int, int, "crops a branch, 4, 2 or 1 (III.C): same 4 | 2, different 1"),
    ("symmetric", False, True, "with different views each branch also sees the other's crops"),
    ("dataset", "clutter", "clutter", "clutter: digits in clutter; stl10: photographs (II.C)"),
    ("split", "unlabeled", "unlabeled", "of stl10: unlabeled, 100,000 images, or train, 5,000"),
    ("background", "black", "black", "behind the digits: black, texture, or a folder (figure 5)"),
    ("texture_pool", 0, 0, "number of textures in all; 0: each canvas has its own"),
    ("digits", "auto", "auto", "mnist (II.C), sklearn: 1,797 digits; auto: mnist if it can be had"),
    ("canvas_size", 100, 64, "side of a canvas, pixels (II.C)"),
    ("num_distractors", 6, 3, "pieces of other digits on a canvas (II.C)"),
    ("distractor_size", 9, 9, "their side, pixels (II.C)"),
    ("image_size", 224, 56, "side of a crop fed to the network, pixels (III)"),
    ("global_crops_scale", (0.5, 1.0), (0.5, 1.0), "share of the canvas that a global crop covers"),
    ("local_crops_scale", (0.1, 0.4), (0.3, 0.6), "the same of a local crop"),
    ("rotation", 15.0, 15.0, "largest rotation, degrees either way (III.B)"),
    ("blur", (0.1, 2.0), (0.1, 2.0), "range of the blur's sigma, pixels at 224 (III.B)"),
    ("weights", "dino", "none", "dino: ViT-S/8 (III); none; a file; dino_vits16, _vitb8, _vitb16"),
    ("patch_size", 8, 7, "side of a patch, pixels (III)"),
    ("dim", 384, 96, "width of the network (III)"),
    ("depth", 12, 2, "number of blocks (III)"),
    ("heads", 6, 3, "attention heads a block (IV)"),
    ("mlp_ratio", 4, 1, "width of the blocks' MLPs ÷ that of the network"),
    ("registers", 0, 4, "learned tokens that stand for no patch (Darcet et al. 2024)"),
    ("init_std", 0.02, 0.0, "standard deviation of random weights; 0: 1/√inputs"),
    ("head_hidden_dim", 2048, 512, "projection head: width of its hidden layers"),
    ("head_layers", 3, 2, "projection head: layers of its MLP"),
    ("bottleneck_dim", 256, 128, "projection head: width of its output, which nce compares"),
    ("head_norm", False, True, "projection head: a LayerNorm after each hidden layer"),
    ("out_dim", 65_536, 1024, "K of eqs. (1, 2), the prototypes of --loss dino"),
    ("centering", "mean", "sinkhorn_knopp", "of dino's teacher: mean or sinkhorn_knopp (DINOv2)"),
    ("batch_size", 32, 64, "images a step (III)"),
    ("micro_batch", 0, 0, "images computed at a time, exactly (IV); 0: the whole batch"),
    ("checkpoint_blocks", False, False, "recompute activations: less memory, a third more time"),
    ("compile", False, False, "torch.compile the blocks; takes a minute and a C++ compiler"),
    ("precision", "auto", "auto", "of autocast: float32, bfloat16 or float16; auto: the best here"),
    ("epochs", int, 10, "length of the run: 20 | 10; 10 with stl10 (figures 2, 3)"),
    ("images_per_epoch", int, int, "50,000 | 6400, dino 12,800 (II.C); paper's stl10: 100,000"),
    ("lr", float, float, "AdamW's peak: .0005 | .001 × batch/64 (III), above 256 by the root"),
    ("warmup", 0.15, 0.15, "share of the run with a rising learning rate: 3 of 20 epochs (III)"),
    ("weight_decay", 0.04, 0.04, "of AdamW's matrices, at the start (III)"),
    ("weight_decay_end", 0.4, 0.4, "at the end (III)"),
    ("clip_grad", 3.0, 3.0, "largest norm of the gradient"),
    ("optimizer", "adamw", "muon", "adamw (III), or muon for the matrices of blocks and head"),
    ("temperature", 0.1, 0.1, "τ of eq. (3), τ_s of eq. (1) (III)"),
    ("teacher_temp", 0.04, 0.01, "τ_t of eq. (1)"),
    ("momentum_teacher", 0.996, 0.9, "of the EMA, rising to 1"),
    ("keep_epochs", [], [], "keep the teacher after these epochs too: 1,5,10"),
    ("checkpoint_minutes", 10.0, 10.0, "write the checkpoint so often, beside the end of an epoch"),
    ("seed", 0, 0, "decides the initial weights and every image"),
    ("device", str, str, "where to train: cuda if it is there, else mps, else cpu"),
    ("data_root", "data", "data", "folder that holds, or will hold, MNIST/raw/ or stl10_binary/"),
]
CHOICES = {"loss": ["nce", "dino", "supervised"], "views": ["same", "different"]}
CHOICES |= {"crops": [1, 2, 4], "dataset": ["clutter", "stl10"], "split": ["unlabeled", "train"]}
CHOICES |= {"digits": ["auto", "mnist", "sklearn"], "centering": ["mean", "sinkhorn_knopp"]}
CHOICES |= {"precision": ["auto", "float32", "bfloat16", "float16"], "optimizer": ["adamw", "muon"]}
RANGES = [  # settings, least, largest
    ("epochs images_per_epoch batch_size image_size patch_size dim depth heads mlp_ratio", 1, 1e9),
    ("head_hidden_dim head_layers bottleneck_dim", 1, 1e9),
    ("out_dim", 2, 1e9),
    ("lr temperature teacher_temp checkpoint_minutes clip_grad", 1e-99, 1e9),
    ("global_crops_scale local_crops_scale warmup", 1e-3, 1),
    ("momentum_teacher weight_decay weight_decay_end init_std", 0, 1),
    ("rotation blur", 0, 360),
    ("micro_batch texture_pool num_distractors registers", 0, 1e6),
    ("distractor_size", 1, 28),
    ("canvas_size", 28, 1e4),  # a digit has 28×28 pixels
]


def flag(name):
    return "--" + name.replace("_", "-")


def parse_args(argv):
    """The settings that were given as flags, and preset, resume and output."""
    parser = argparse.ArgumentParser("train.py", argument_default=argparse.SUPPRESS)
    parser.description = "Train a ViT on cluttered digits without labels. In brackets: the section"
    parser.description += " of the paper, and the defaults of the presets paper | laptop."
    kinds = {row[0]: row[2] if isinstance(row[2], type) else type(row[2]) for row in SETTINGS}
    for name, paper, laptop, text in SETTINGS:
        how = {"type": kinds[name], "choices": CHOICES.get(name)}
        if kinds[name] is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif kinds[name] is tuple:
            how = {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
        elif kinds[name] is list:
            how = {"type": lambda text: sorted(int(epoch) for epoch in text.split(","))}
        text += "" if type in (type(paper), type(laptop)) else f" [{paper} | {laptop}]"
        parser.add_argument(flag(name), help=text, **how)
    add = parser.add_argument
    add("--preset", choices=["paper", "laptop"], help="[paper with CUDA, else laptop]")
    add("--resume", metavar="RUN", help="go on with a stopped run: its folder or checkpoint")
    add("--output", help="new folder of the run [runs/<dataset>-<loss>-<views>]")
    args = parser.parse_args(argv, argparse.Namespace(preset=None, resume=None, output=None))
    if [] in vars(args).values():  # what some versions of Python make of --flag=--
        parser.error("-- is not a value of a flag")
    # argparse makes lists of pairs
    args.settings = {k: kind(getattr(args, k)) for k, kind in kinds.items() if hasattr(args, k)}
    return args


def make_config(args, shape=None):
    """All settings in one flat dict: preset, `shape` of given weights, flags, and what follows."""
    preset = args.preset or ("paper" if torch.cuda.is_available() else "laptop")
    column, laptop = (2, True) if preset == "laptop" else (1, False)
    defaults = {row[0]: row[column] for row in SETTINGS if not isinstance(row[column], type)}
    c = {**defaults, **(shape or {}), **args.settings, "preset": preset, "fallbacks": []}
    dino, stl10, batch = c["loss"] == "dino", c["dataset"] == "stl10", c["batch_size"]
    derived = {
        "crops": 1 if c["views"] == "different" else 2 if laptop else 4,
        "epochs": 10 if stl10 else 20,
        "images_per_epoch": (12_800 if dino else 6400) if laptop else 100_000 if stl10 else 50_000,
        "lr": (0.001 if laptop else 0.0005) * min(batch, 256) / 64 * max(1, batch / 256) ** 0.5,
        "device": vit.default_device(),
        "antialias": False,  # but with the weights of DINOv2 with registers
        # ViT-S/8 stores its positions on the grid of 224 px, as DINO's weights do
        "pos_size": 224 if not laptop and 224 % (c["patch_size"] or 1) == 0 else c["image_size"],
    }
    return {**derived, **c}


def check_config(config, shape):
    """Raise ValueError, in one line, for settings that cannot work, or not with that `shape`."""
    c, ranks = config, rank_and_world_size()[1]
    for names, least, largest in RANGES:
        for name in names.split():
            low, high = c[name] if isinstance(c[name], (tuple, list)) else (c[name] or 0,) * 2
            if not least <= low <= high <= largest:
                raise ValueError(f"{flag(name)} {c[name]}: use {least:g} to {largest:g}")
    batch, micro, pool = c["batch_size"], c["micro_batch"], c["texture_pool"]
    share, photos, patch = batch // ranks, c["dataset"] == "stl10", c["patch_size"]
    near, images = max(1, round(c["image_size"] / patch)) * patch, c["images_per_epoch"]
    rules = [  # what must not be, the flag, advice
        (batch % ranks, "batch_size", f"use a multiple of {ranks}, the number of ranks"),
        (batch > images, "batch_size", f"use no more than the epoch's {images} images"),
        (c["loss"] == "nce" and batch == 1, "batch_size", "use 2 or more, for negatives"),
        (micro and share % micro, "micro_batch", f"use a divisor of {share}, or 0"),
        (c["image_size"] % patch, "image_size", f"use a multiple of the patch size, as {near}"),
        (photos and c["loss"] == "supervised" and c["split"] == "unlabeled", "split", "use train"),
        (photos and c["views"] == "different", "views", "use same: a photo has no second canvas"),
        (photos and c["background"] != "black", "background", "use it with --dataset clutter"),
        (pool and c["background"] != "texture", "texture_pool", "use it with --background texture"),
        (max(c["keep_epochs"], default=0) > c["epochs"], "keep_epochs", "use epochs of the run"),
    ]
    rules += [(k != "heads" and c[k] != v, k, f"use {v}, the weights'") for k, v in shape.items()]
    for wrong, name, advice in rules:
        if wrong:
            raise ValueError(f"{flag(name)} {c[name]}: {advice}")


def cosine(start, end, progress):
    """From start to end along half a cosine as progress goes from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rate(config, progress):
    """A linear ramp over the first `warmup` of the run, then a cosine to zero (section III)."""
    if progress < config["warmup"]:
        return config["lr"] * progress / config["warmup"]
    return cosine(config["lr"], 0, (progress - config["warmup"]) / (1 - config["warmup"]))


def autocast_dtype(precision, device):
    """What the networks compute in; auto: bfloat16 where it is fast, float16 on older GPUs."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if ampere else torch.float16
    # on a CPU without these instructions bfloat16 is emulated, and slow
    fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


class Muon(torch.optim.Optimizer):
    """Momentum whose update moves every direction of a weight matrix alike (Jordan 2024).

    `torch.optim.Muon` computes in bfloat16, which a CPU without such instructions emulates: there
    it takes 15 times as long as this, more than the rest of the step.
    """

    def __init__(self, matrices, momentum=0.95):
        super().__init__(matrices, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for matrix in group["params"]:
            average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
            average.lerp_(matrix.grad, 1 - group["momentum"])
            update = orthogonalize(matrix.grad.lerp(average, group["momentum"]))  # Nesterov's
            rows, columns = matrix.shape
            matrix.sub_(update, alpha=group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalize(matrix):
    """U S Vᵀ to about U Vᵀ, singular values near 1: five Newton-Schulz steps, Jordan's numbers."""
    x = matrix / matrix.norm().clamp(min=1e-7)
    x = x.T if len(x) > len(x.T) else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x if x.shape == matrix.shape else x.T


def make_optimizers(config, student):
    """AdamW, and Muon for weight matrices if asked; these, norms and biases are not decayed."""
    matrices = []
    if config["optimizer"] == "muon":
        parts = (student.backbone.blocks, student.head.mlp)
        matrices = [p for part in parts for p in part.parameters() if p.ndim == 2]
    others = [p for p in student.parameters() if all(p is not m for m in matrices)]
    decayed = {"params": [p for p in others if p.ndim > 1]}
    spared = {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0}
    adamw = torch.optim.AdamW([decayed, spared], fused=True)
    return {"optimizer": adamw} | ({"muon": Muon(matrices)} if matrices else {})


@torch.no_grad()
def update_teacher(teacher, student, momentum):
    """Exponential moving average: teacher ← momentum · teacher + (1 − momentum) · student."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def project(config, network, crops, which):
    """The crops `which` of (C, B, 3, H, W) through a network in one pass: (len(which), B, …)."""
    dtype = autocast_dtype(config["precision"], crops.device)
    crops = crops[which[0] : which[-1] + 1]  # a slice: a list would be copied to the GPU first
    with torch.autocast(crops.device.type, dtype, enabled=dtype != torch.float32):
        out = network(crops.flatten(0, 1))
    out = out if out.dtype == torch.float64 else out.float()  # the losses divide by a small τ
    return out.unflatten(0, (len(which), -1))


def batch_loss(config, loss_fn, student, teacher, views, params, backward=None):
    """The loss of the batch that `params` describe, computed `micro_batch` images at a time.

    Pieces give exactly the loss and the gradient of the whole: images are compared with others only
    in what the teacher says of these, which has no gradient. So its outputs come first, and images
    are rendered again for the student rather than kept. In training `backward` takes the loss of
    each piece, and each rank computes its share of the batch. Returns the loss, detached (a rank's
    part of the sum); the teacher's outputs of the whole batch, (crops, images, bottleneck or K);
    and what the student is to match: these, with DINO's loss their distributions, or the labels.
    """
    rank, ranks = rank_and_world_size() if backward else (0, 1)
    images = len(params["centre"])
    share = images // ranks
    size, first = config["micro_batch"] or share, rank * share
    own = {name: value[first : first + share] for name, value in params.items()}
    pieces = [{k: v[i : i + size] for k, v in own.items()} for i in range(0, share, size)]
    outputs = []
    for piece in pieces:
        crops = views.render(piece)
        with torch.no_grad():
            outputs.append(project(config, teacher, crops, views.teacher))
    outputs = torch.cat(outputs, dim=1)  # (crops, share, …)
    if ranks > 1:
        parts = [torch.empty_like(outputs) for _ in range(ranks)]
        dist.all_gather(parts, outputs.contiguous())
        outputs = torch.cat(parts, dim=1)  # (crops, images, …), in the order of the ranks
    targets = outputs
    if config["loss"] == "dino":
        targets = loss_fn.teacher_probabilities(outputs)
    elif config["loss"] == "supervised":
        targets = views.labels(params)
    loss = 0.0
    for number, piece in enumerate(pieces):
        crops = crops if len(pieces) == 1 else views.render(piece)
        # only after the last piece do the ranks add up their gradients
        more = number + 1 < len(pieces) and ranks > 1
        with student.no_sync() if more else contextlib.nullcontext():
            student_out = project(config, student, crops, views.student)
        part = loss_fn(student_out, targets, views.pairs, first + number * size)
        part = part * (student_out.shape[1] / images)
        if backward:
            backward(part * ranks)  # DistributedDataParallel takes the mean over the ranks
        loss = loss + part.detach()
    return loss, outputs, targets


def training_step(config, parts, parallel, views, params, step, steps):
    """Step number `step` of `steps`, on the batch that `params` describe: changes all of `parts`.

    `parallel` is the student, or its DistributedDataParallel. Returns the loss of the batch and the
    norm of the gradient, both on the device: nothing here waits for it, but float16's scaler.
    """
    student, teacher, loss_fn, scaler, *optimizers = parts.values()
    progress = step / steps
    decay = cosine(config["weight_decay"], config["weight_decay_end"], progress)
    optimizers[0].param_groups[0]["weight_decay"] = decay
    # Muon's update has entries of 1/√width, and takes ten times AdamW's rate
    for optimizer, factor in zip(optimizers, (1, 10)):
        for group in optimizer.param_groups:
            group["lr"] = factor * learning_rate(config, progress)
        optimizer.zero_grad()
    networks, backward = (parallel, teacher), lambda part: scaler.scale(part).backward()
    loss, logits, _ = batch_loss(config, loss_fn, *networks, views, params, backward)
    if config["loss"] == "dino":
        loss_fn.update_center(logits)
        if step < steps // config["epochs"]:  # DINO freezes its last layer in the first epoch
            student.head.last_layer.weight_v.grad = None
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config["clip_grad"])
    # where float16 overflows in one gradient, clipping spoils those of both optimizers
    if not scaler.is_enabled() or norm.isfinite():
        for optimizer in optimizers:
            scaler.step(optimizer)
    scaler.update()
    update_teacher(teacher, student, cosine(config["momentum_teacher"], 1.0, progress))
    return all_reduce(loss), norm


def prefetch(views, steps):
    """The parameters of each of `steps`; with CUDA sampled ahead by a thread."""
    if views.device.type != "cuda":
        yield from map(views.sample, steps)  # a CPU's cores have enough to do
        return

    def sample(step):
        return {name: value.pin_memory() for name, value in views.sample(step).items()}

    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(sample, steps[0])
        for step in steps:
            params = pending.result()
            pending = thread.submit(sample, step + 1)
            yield params


def init_distributed():
    """Under torchrun: join the other ranks, each with a GPU of its own where there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        cuda = torch.cuda.is_available()
        if not os.environ.keys() >= {"RANK", "MASTER_ADDR", *["LOCAL_RANK"] * cuda}:
            raise ValueError("WORLD_SIZE is set; use torchrun, or unset it to train alone")
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")


def rank_and_world_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_any_rank(*flags):
    """On how many ranks each of these is true."""
    return all_reduce(torch.tensor(flags, dtype=torch.int32)).tolist()


def all_reduce(tensor):
    """The sum of the ranks' tensors, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def print_rank0(line):
    """To standard error, once for all ranks; above the progress bar."""
    if rank_and_world_size()[0] == 0:
        tqdm.write(line, file=sys.stderr)


@contextlib.contextmanager
def atomic_write(path):
    """A file that becomes `path` whole or not at all, even if the power fails. Raises OSError."""
    part = os.path.join(os.path.dirname(path), f".part-{os.path.basename(path)}")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch's writer makes a RuntimeError of a full disk
        raise OSError(f"{path} could not be written ({vit.one_line(error)[:150]})") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)


def save_checkpoint(path, content):
    with atomic_write(path) as file:
        torch.save(content, file)


def save_run(folder, config, parts, step, history, total):
    """Write all that the run needs to go on after `step` steps."""
    if rank_and_world_size()[0] == 0:
        content = {name: part.state_dict() for name, part in parts.items()}
        content |= {"config": config, "step": step, "metrics": history}
        content["epoch"] = step // (config["images_per_epoch"] // config["batch_size"])
        content["epoch_loss"] = [total.item()]  # over the steps of an epoch that is not over
        content["threads"] = torch.get_num_threads()  # on which the last bits of a sum depend
        save_checkpoint(os.path.join(folder, "ckpt.pth"), content)


def read_run(args):
    """The checkpoint that --resume names, its settings with the flags over them, and its folder."""
    path = vit.checkpoint_of(args.resume)
    checkpoint = vit.read_checkpoint(path)
    needed = {"config", "step", "epoch", "metrics", "epoch_loss", "threads", "optimizer"}
    if args.output or not isinstance(checkpoint, dict) or needed - checkpoint.keys():
        raise ValueError(f"--resume {path}: use a ckpt.pth of train.py, without --output")
    config = {**vit.OLDER, **checkpoint["config"]}
    may_change = ("epochs", "device", "data_root", "compile", "checkpoint_minutes")
    for name, value in args.settings.items():
        if name not in may_change and config[name] != value:
            raise ValueError(f"{flag(name)} {value}: the run has {config[name]}; leave it as it is")
        config[name] = value
    if config["epochs"] < len(checkpoint["metrics"]):  # the last epoch is measured
        ended = f"--resume {path}: the run has ended after {checkpoint['epoch']} epochs"
        raise ValueError(f"{ended}; use more --epochs, or python visualize.py {path}")
    return checkpoint, config, os.path.dirname(path) or "."


def make_folder(config, output):
    """The run's folder: --output, or the first of runs/NAME, runs/NAME-2, … not there yet."""
    if output:
        os.makedirs(output, exist_ok=True)
        return output
    texture = "" if config["background"] == "black" else "-texture"
    name = f"runs/{config['dataset']}-{config['loss']}-{config['views']}{texture}"
    for number in itertools.count(1):
        folder = name if number == 1 else f"{name}-{number}"
        with contextlib.suppress(FileExistsError):
            os.makedirs(folder)
            return folder


def make_parts(config, student):
    """All that changes in training, and that a checkpoint holds."""
    c, device = config, student.backbone.cls_token.device
    if c["loss"] == "dino":
        loss_fn = DINOLoss(c["out_dim"], c["temperature"], c["teacher_temp"], c["centering"])
    else:
        loss_fn = (NCELoss if c["loss"] == "nce" else SupervisedLoss)(c["temperature"])
    half = autocast_dtype(c["precision"], device) == torch.float16
    parts = {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)}
    parts |= {"loss": loss_fn.to(device), "scaler": torch.amp.GradScaler(device.type, enabled=half)}
    return parts | make_optimizers(c, student)


class Validation:
    """What a line of log.jsonl says of validation images that do not depend on the seed."""

    def __init__(self, config, splits, device):
        # kept, for rendering them anew each epoch would cost as much as measuring them
        images, bank = metrics.validation_images(config, splits)
        self.config, self.images, self.bank = config, list(images), list(bank)
        held_out, n = splits["validation"], metrics.VALIDATION_IMAGES
        # a few of the same canvases, for each takes a forward pass for every inky patch
        changed = data.evaluation_batches(config, held_out, n // 16, name="validation", parts=True)
        self.changed = [] if config["dataset"] == "stl10" else list(changed)
        batch = min(config["batch_size"], n, len(held_out))  # the loss depends on it
        fixed = config | {"batch_size": batch, "seed": 0}
        self.steps = range(max(1, n // 2 // batch))
        self.views = data.TrainingViews(fixed, held_out, "validation", device)

    @torch.no_grad()
    def __call__(self, parts):
        args = self.config, parts["loss"], parts["student"], parts["teacher"], self.views
        n, loss, entropy, mean = len(self.steps), 0.0, 0.0, 0.0
        for step in tqdm(self.steps, "validating", unit="batch", leave=False, disable=None):
            part, _, p = batch_loss(*args, self.views.sample(step))
            loss += part.item() / n
            if self.config["loss"] == "dino":  # p are distributions, (crops, images, K)
                entropy, mean = entropy + metrics.entropy(p).mean() / n, mean + p.mean((0, 1)) / n
        if not math.isfinite(loss):
            raise FloatingPointError("the validation loss is NaN or infinite; use a lower --lr")
        result = {"loss": loss}
        if self.config["loss"] == "dino":
            result["entropy_of_mean"] = metrics.entropy(mean).item()
            result["mean_entropy"] = entropy.item()
        networks = {"trained": parts["teacher"].backbone}
        bank = metrics.observe(networks, self.bank, maps=False)
        effects = self.changed and metrics.observe_effects(networks["trained"], self.changed)
        return result | metrics.validate(metrics.observe(networks, self.images), bank, effects)


def write_log(folder, history):
    if rank_and_world_size()[0] == 0:
        with atomic_write(os.path.join(folder, "log.jsonl")) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in history)


def end_epoch(folder, config, parts, history, step, total, began, validation, stop):
    """Measure, and add a line to the log; `began`: the epoch's first step, and when it was.

    A signal need not wait for it, since nothing changes meanwhile: the resumed run makes the line.
    """
    per_epoch, (first, when) = config["images_per_epoch"] // config["batch_size"], began
    line, seconds = {"epoch": step // per_epoch, "step": step}, time.monotonic() - when
    if step:
        line["loss"] = total.item() / per_epoch
        line["lr"] = learning_rate(config, (step - 1) / (per_epoch * config["epochs"]))
        images = (step - first) * config["batch_size"]
        line |= {"seconds": seconds, "images_per_second": images / max(seconds, 1e-9)}
    stop.measuring = True
    with contextlib.suppress(InterruptedError):
        if not stop.is_set():
            line["validation"] = validation(parts)
    stop.measuring = False
    if "validation" in line:
        history.append(line)
        total.zero_()
        log_epoch(folder, config, parts["teacher"], history)


def log_epoch(folder, config, teacher, history):
    """Write log.jsonl, and the teacher of one of --keep-epochs; say a line, and of collapse."""
    line, epochs = history[-1], config["epochs"]
    epoch, said = line["epoch"], line["validation"]
    write_log(folder, history)
    if epoch in config["keep_epochs"] and rank_and_world_size()[0] == 0:
        content = {"config": config, "epoch": epoch, "metrics": history}
        content["teacher"] = teacher.state_dict()
        save_checkpoint(os.path.join(folder, f"epoch-{epoch}.pth"), content)
    if epoch == 0:
        return
    text = f"epoch {epoch}/{epochs}: loss {line['loss']:.3f}, "
    if said["mean"].get("selectivity"):  # photographs have none
        text += f"selectivity {said['mean']['selectivity']:.2f}, "
    text += f"mean cosine {said['mean_cosine']:.2f}, "
    if config["loss"] == "dino":
        text += f"teacher's mean entropy {said['mean_entropy']:.2f} ln K, "
        text += f"of the mean {said['entropy_of_mean']:.2f} ln K, "
    minutes = (epochs - epoch) * line["seconds"] / 60
    print_rank0(f"{text}{line['images_per_second']:.0f} images/s, {minutes:.1f} minutes left")
    told = [metrics.collapse(config, history[: n + 1]) for n in range(len(history))]
    if told[-1] and not any(told[:-1]):
        print_rank0(f"warning: {told[-1]}")


def train(config, parts, splits, folder, checkpoint=None, stop=None):
    """Train parts["student"] on views of the training split; of several ranks each calls this.

    With a `checkpoint` the run goes on as if it had not stopped: all that chance decides follows
    from the seed and the step. `stop` is an Event that ends it after a step, or in mid-validation.
    Writes to `folder` ckpt.pth, before the first step, after each epoch, every `checkpoint_minutes`
    and at a stop, and a line an epoch of log.jsonl. Returns these lines.
    """
    c, batch, student = config, config["batch_size"], parts["student"]
    device, (rank, ranks) = student.backbone.cls_token.device, rank_and_world_size()
    views, stop = data.TrainingViews(c, splits["train"], device=device), stop or threading.Event()
    validation = Validation(c, splits, device)
    per_epoch, step, history = c["images_per_epoch"] // batch, 0, []
    steps, total = c["epochs"] * per_epoch, torch.zeros((), device=device)  # of an epoch's losses
    if checkpoint:
        step, history = checkpoint["step"], checkpoint["metrics"]
        total += sum(checkpoint["epoch_loss"])
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        write_log(folder, history)  # without what came after the checkpoint
    else:
        save_run(folder, c, parts, 0, history, total)
    parallel = torch.nn.parallel.DistributedDataParallel(student) if ranks > 1 else student
    finite = torch.ones((), dtype=torch.bool, device=device)
    bar = tqdm(total=steps * batch, initial=step * batch, unit=" images", disable=rank > 0 or None)
    batches, stopping, late = prefetch(views, range(step, steps)), False, False
    saved_at, began = time.monotonic(), (step, time.monotonic())
    while True:
        epoch_ends = step == per_epoch * len(history)  # and is not measured yet
        if epoch_ends:
            end_epoch(folder, c, parts, history, step, total, began, validation, stop)
            began, (stopping,) = (step, time.monotonic()), on_any_rank(stop.is_set())
        if (epoch_ends and step > 0) or stopping or late:
            save_run(folder, c, parts, step, history, total)
            saved_at = time.monotonic()
        if step == steps or stopping:
            return history
        loss, norm = training_step(c, parts, parallel, views, next(batches), step, steps)
        step += 1
        total += loss
        # float16's scaler skips a step whose gradient overflows, and scales less from then on
        finite &= loss.isfinite() & (norm.isfinite() | parts["scaler"].is_enabled())
        bar.update(batch)
        late = time.monotonic() - saved_at > 60 * c["checkpoint_minutes"]
        stopping, late = on_any_rank(stop.is_set(), late)
        # not after every step, for reading a number waits for the GPU
        if step % 20 == 0 or step % per_epoch == 0 or stopping or late:
            if not finite or parts["scaler"].get_scale() < 1:
                what = "the loss or its gradient is NaN or infinite, at step"
                raise FloatingPointError(f"{what} {step} or up to 19 before; use a lower --lr")
            bar.set_postfix(loss=f"{loss.item():.3f}")


def compile_blocks(*networks):
    """Compile all blocks, which share what is compiled; a warning where that cannot be done."""
    try:
        torch.compile(lambda x: x + 1)(networks[0].backbone.cls_token.detach())
    except RuntimeError as error:  # no compiler, or a Python that is too new
        print_rank0(f"warning: --compile does nothing here ({vit.one_line(error)[:150]})")
        return
    for network in networks:
        for block in network.backbone.blocks:
            block.compile()


@contextlib.contextmanager
def stop_on_signal():
    """An Event that SIGINT or SIGTERM sets, to end after a step; a second SIGINT acts at once."""
    stop = threading.Event()
    stop.measuring = False

    def handle(number, frame):
        stop.signal = number
        stop.set()
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        if stop.measuring:
            raise InterruptedError

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare(args, folder=None):
    """All that can fail for what the user gave; makes a new run's folder, if no rank has yet."""
    checkpoint, weights, shape = None, None, {}
    if not folder and args.output and os.path.exists(os.path.join(args.output, "ckpt.pth")):
        raise ValueError(f"--output {args.output}: it holds a run; use a new folder")
    if args.resume:
        checkpoint, config, folder = read_run(args)
        torch.set_num_threads(checkpoint["threads"])
    else:
        config = make_config(args)
        if config["weights"] != "none":
            weights, _ = vit.load_backbone(config["weights"])
            shape = {name: getattr(weights, name) for name in vit.SHAPE}
            config = make_config(args, shape)
    check_config(config, shape)
    device = vit.find_device(config["device"])
    student = vit.build_network(config)
    if weights:
        student.backbone.load_state_dict(weights.state_dict())
        if weights.heads != config["heads"]:
            text = f"--heads {config['heads']} cuts q, k and v of weights with {weights.heads} anew"
            config["fallbacks"].append(text)
    splits, warning = data.load_dataset(config, device)
    if warning and warning not in config["fallbacks"]:
        config["fallbacks"].append(warning)
    # raises if there are fewer images than a batch has
    data.sample_digits(config["seed"], 0, len(splits["train"]), config["batch_size"])
    folder = folder or make_folder(config, args.output)
    return config, student.to(device), splits, checkpoint, folder


def prepare_ranks(args):
    """`prepare` on every rank; the first goes ahead, for it fetches and makes what is missing."""
    (rank, ranks), folder = rank_and_world_size(), [None]
    try:
        if rank == 0:
            prepared = prepare(args)
            folder = [prepared[-1]]
    finally:  # after an error too: the others wait for it
        if ranks > 1:
            dist.broadcast_object_list(folder)
    if rank > 0:
        prepared = prepare(args, folder[0]) if folder[0] else sys.exit(2)
    return prepared


def run(args):
    """The whole run that the flags ask for; returns the exit status."""
    c, student, splits, checkpoint, folder = prepare_ranks(args)
    (rank, ranks), path = rank_and_world_size(), os.path.join(folder, "ckpt.pth")
    if rank == 0:
        why = "CUDA" if torch.cuda.is_available() else "no CUDA"
        why = "resumed" if checkpoint else "as asked" if args.preset else why
        print(f"preset {c['preset']} ({why}): {metrics.describe(c)}")
        length = f"{c['epochs']} epochs of {c['images_per_epoch']:,} images"
        print(f"{length} on {c['device']}, ranks: {ranks}, into {folder}", flush=True)
    for line in c["fallbacks"]:
        print_rank0(f"warning: {line}")
    parts = make_parts(c, student)
    if c["compile"]:
        compile_blocks(student, parts["teacher"])
    with stop_on_signal() as stop:
        history = train(c, parts, splits, folder, checkpoint, stop)
        if len(history) <= c["epochs"]:
            print_rank0(f"stopped; python train.py --resume {folder} goes on")
            return 128 + getattr(stop, "signal", signal.SIGTERM)  # another rank's
    if rank == 0:
        result, _ = metrics.evaluate(path, c, history, parts["teacher"].backbone, splits)
        print(metrics.report([result], os.path.join(folder, "metrics.json")))
        print(f"python visualize.py {path}")
    return 0


def main(argv=None):
    args = parse_args(argv)
    socket.setdefaulttimeout(15)  # a host without an answer by then counts as unreachable
    try:
        init_distributed()
        return run(args)
    except KeyboardInterrupt:
        print_rank0("interrupted; python train.py --resume RUN goes on from its last checkpoint")
        return 128 + signal.SIGINT
    except (OSError, ValueError, FloatingPointError, MemoryError, RuntimeError) as error:
        print_rank0(f"train.py: error: {vit.error_line(error)}")
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what its code page lacks, as Windows' often do τ
    sys.exit(main())
