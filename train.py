"""Train a student ViT to agree with its own moving average about views of the same digit.

    python train.py --loss nce --views same
    python train.py --loss nce --views different

Student and teacher are one network with two sets of weights. Both look at crops of an image;
the student learns to match the teacher (losses.py), and the teacher is the exponential moving
average of the student. Nobody says what a digit is. The question of the paper is where the
attention of such a network goes (visualize.py).

Section and equation numbers are those of the paper; see the README.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import visualize
import vit
from losses import DINOLoss, NCELoss

# A preset is a row of defaults; flags override it. "paper" follows sections II.C and III, and
# DINO where the paper is silent. "laptop" is as small as still shows the effect from random
# weights within minutes on two CPU cores.
PRESETS = {
    "paper": {
        "image_size": 224,
        "patch_size": 8,
        "dim": 384,
        "depth": 12,
        "heads": 6,
        "weights": "dino",
        "init_std": 0.02,
        "canvas_size": 100,
        "num_distractors": 6,
        "distractor_size": 9,
        "batch_size": 32,
        "epochs": 20,
        "images_per_epoch": 50_000,
        "base_lr": 0.0005,  # for a batch of 64
        "temperature": 0.1,
        "same_crops": 4,
        "symmetric": False,
        "local_crops_scale": (0.1, 0.4),
        "momentum_teacher": 0.996,
        "warmup_teacher_temp": 0.04,
        "head_hidden_dim": 2048,
        "head_layers": 3,
        "bottleneck_dim": 256,
        "head_norm": False,
        "out_dim": 65_536,
        "dino": {},  # what is different with --loss dino
        "stl10": {"images_per_epoch": 100_000, "epochs": 10},  # and with --dataset stl10; figures 2 and 3
    },
    "laptop": {
        "image_size": 56,
        "patch_size": 7,
        "dim": 96,
        "depth": 2,
        "heads": 3,
        "weights": "none",
        "init_std": None,
        "canvas_size": 64,
        "num_distractors": 3,
        "distractor_size": 9,
        "batch_size": 64,
        "epochs": 10,
        "images_per_epoch": 12_800,
        "base_lr": 0.001,
        "temperature": 0.2,
        "same_crops": 2,  # with `symmetric`, as many as different views compare: the canvas is all that differs
        "symmetric": True,
        "local_crops_scale": (0.3, 0.6),
        "momentum_teacher": 0.9,
        "warmup_teacher_temp": 0.02,
        "head_hidden_dim": 512,
        "head_layers": 2,
        "bottleneck_dim": 128,
        "head_norm": True,
        "out_dim": 1024,
        # DINO's τ_s; and a teacher as fast as above collapses: it has no negatives to keep it up
        "dino": {"temperature": 0.1, "momentum_teacher": 0.99},
        "stl10": {},
    },
}
# What both presets share. The first ones have flags.
COMMON = {
    "loss": "nce",
    "views": "same",
    "dataset": "clutter",
    "split": "unlabeled",
    "background": "black",
    "texture_pool": 0,
    "digits": "auto",
    "micro_batch": 0,  # the whole batch at once
    "checkpoint_blocks": False,
    "compile": False,
    "checkpoint_minutes": 10.0,
    "seed": 0,
    "precision": "auto",
    "keep_epochs": "",
    "data_root": "data",
    "global_crops_scale": (0.5, 1.0),  # share of the canvas's area
    "rotation": 15.0,  # degrees either way
    "blur": (0.1, 2.0),  # sigma in pixels at 224
    "teacher_temp": 0.04,
    "warmup": 0.15,  # of the run: 3 of the paper's 20 epochs
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "clip_grad": 3.0,
}

KNN_BANK = 512  # training canvases that the k-NN of each epoch classifies by


# ---------------------------------------------------------------------------------- settings


def parse_args(argv):
    def default(key):  # a preset's value in the help text
        return f"[paper {PRESETS['paper'][key]}, laptop {PRESETS['laptop'][key]}]"

    parser = argparse.ArgumentParser(
        prog="train.py", description="Train a ViT on cluttered digits without labels. Sections are the paper's."
    )
    add = parser.add_argument
    add("--loss", choices=["nce", "dino"], help="eq. (3), or DINO's cross-entropy, eqs. (1, 2) [nce]")
    add("--views", choices=["same", "different"],
        help="both branches see crops of one canvas, or of two with the same digit; section III.B [same]")
    add("--crops", type=int, choices=[1, 2, 4], help="crops a branch, section III.C [same: paper 4, laptop 2; different: 1]")
    add("--dataset", choices=["clutter", "stl10"],
        help="digits in clutter, or photographs without labels; section II.C [clutter]")
    add("--split", choices=["unlabeled", "train"],
        help="of STL-10: the 100,000 unlabelled images or the 5,000 labelled ones; section II.C [unlabeled]")
    add("--background", metavar="{black,texture,DIR}",
        help="what lies behind digit and clutter: nothing, textures that are drawn, or a folder's images; figure 5 [black]")
    add("--texture-pool", type=int, metavar="N",
        help="so many textures in all; 0: every canvas has one of its own [0]")
    add("--digits", choices=["auto", "mnist", "sklearn"],
        help="MNIST (section II.C), or the 1,797 digits of scikit-learn; auto: MNIST if it can be had [auto]")
    add("--weights", metavar="{dino,none,FILE}",
        help="what the backbone starts from: DINO's ViT-S/8 (section III), random, a file, or another of DINO's: "
        f"{', '.join(name for name in vit.DINO_FILES if name not in ('dino', 'dino_vits8'))} {default('weights')}")
    add("--preset", choices=list(PRESETS),
        help="the defaults of the flags in [ ], and the model's size [paper where CUDA is, else laptop]")
    add("--image-size", type=int, help=f"side of a crop fed to the network, pixels; section III {default('image_size')}")
    add("--patch-size", type=int, help=f"side of a patch, pixels; section III {default('patch_size')}")
    add("--heads", type=int, help=f"attention heads a block; section IV {default('heads')}")
    add("--batch-size", type=int, help=f"images a step; section III {default('batch_size')}")
    add("--micro-batch", type=int,
        help="images computed at a time: the gradient of the whole batch in the memory of so many; section IV [all]")
    add("--checkpoint-blocks", action="store_true", default=None,
        help="keep no activations inside the blocks but compute them again: less memory, a third more time")
    add("--compile", action="store_true", default=None,
        help="compile the blocks by torch.compile before the first step; takes a minute and a C++ compiler [off]")
    add("--epochs", type=int, help=f"length of the run; figure 4 {default('epochs')[:-1]}; with stl10 paper 10, figures 2, 3]")
    add("--images-per-epoch", type=int, help=f"section II.C {default('images_per_epoch')[:-1]}; with stl10 paper 100000]")
    add("--lr", type=float, help="peak learning rate; section III [paper 0.0005 × batch/64, laptop "
        f"{PRESETS['laptop']['base_lr']} × batch/64; above batch 256 by the square root from there]")
    add("--temperature", type=float, help="τ of eq. (3), τ_s of eq. (1); section III [0.1; laptop with nce "
        f"{PRESETS['laptop']['temperature']}]")
    add("--seed", type=int, help="decides the initial weights and every image [0]")
    add("--device", help="where to train [cuda if there, else cpu]")
    add("--precision", choices=["auto", "float32", "bfloat16", "float16"],
        help="of autocast; auto: bfloat16 where the device has it, else float16 on CUDA, else float32 [auto]")
    add("--keep-epochs", metavar="1,5,10",
        help="keep the teacher after these epochs too, so that visualize.py shows its attention over training [none]")
    add("--data-root", help="folder that holds, or will hold, MNIST/raw/ or stl10_binary/ [data]")
    add("--checkpoint-minutes", type=float, help="write the checkpoint so often, beside the end of every epoch [10]")
    add("--resume", metavar="RUN",
        help="go on with a run that was stopped, from its folder or checkpoint, with its settings; --epochs, --device, "
        "--data-root, --compile and --checkpoint-minutes may be others")
    add("--output", help="folder of the run, new [runs/<dataset>-<loss>-<views>, of textures …-texture; then -2, -3]")
    args = parser.parse_args(argv)
    if [] in vars(args).values():  # what argparse makes of --flag=-- in some versions of Python
        parser.error("-- is no value of a flag")
    return args


def make_config(args, shape=None):
    """All settings of the run in one flat dict: the preset, the flags over it, and what follows.

    `shape` is what the weights to start from prescribe (patch_size, dim, depth, pos_size, heads);
    None before they are read, when what depends on it is not checked yet.

    Raises ValueError for values that cannot work, before anything is read or written.
    """
    flags = given(args)
    preset = args.preset or ("paper" if torch.cuda.is_available() else "laptop")
    defaults = COMMON | {"device": "cuda" if torch.cuda.is_available() else "cpu"} | PRESETS[preset]
    with_dino, with_stl10 = defaults.pop("dino"), defaults.pop("stl10")
    if args.loss == "dino":
        defaults |= with_dino
    if args.dataset == "stl10":
        defaults |= with_stl10
    config = c = {**defaults, **(shape or {}), **flags, "preset": preset, "fallbacks": []}
    if args.crops is None:
        c["crops"] = c["same_crops"] if c["views"] == "same" else 1
    if args.lr is None:
        c["lr"] = c["base_lr"] * min(c["batch_size"], 256) / 64 * math.sqrt(max(1, c["batch_size"] / 256))
    if args.micro_batch is not None and args.micro_batch < 1:
        raise ValueError(f"--micro-batch {args.micro_batch} must be above 0")
    try:
        c["keep_epochs"] = sorted({int(epoch) for epoch in c["keep_epochs"].split(",") if c["keep_epochs"]})
    except ValueError:
        raise ValueError(f"--keep-epochs {c['keep_epochs']} is no list of epochs such as 1,5,10") from None
    if not set(c["keep_epochs"]) <= set(range(c["epochs"] + 1)):
        raise ValueError(f"--keep-epochs {args.keep_epochs}: epochs go from 0, before the first step, to {c['epochs']}")
    check_settings(c, weights_to_be_read=shape is None and c["weights"] != "none")
    # ViT-S/8 keeps its positions on the grid of 224 px, as DINO's weights do, whatever the input.
    if shape is None:
        c["pos_size"] = 224 if preset == "paper" and 224 % c["patch_size"] == 0 else c["image_size"]
    elif c["patch_size"] != shape["patch_size"]:
        raise ValueError(f"--patch-size {c['patch_size']}: the weights have patches of {shape['patch_size']}")
    return config


def check_settings(config, weights_to_be_read=False):
    """Raise ValueError, in one line, for settings that cannot work."""
    c = config
    positive = ("image_size", "patch_size", "heads", "batch_size", "epochs", "images_per_epoch", "lr", "temperature",
                "checkpoint_minutes")
    for name in positive:
        if not (c[name] > 0 and math.isfinite(c[name])):
            raise ValueError(f"{flag(name)} {c[name]} must be above 0")
    if not -(2**63) <= c["seed"] < 2**63:
        raise ValueError(f"--seed {c['seed']} is no whole number of 64 bits")
    ranks = place()[1]
    if c["batch_size"] % ranks:
        raise ValueError(f"--batch-size {c['batch_size']} cannot be shared by {ranks} ranks: a multiple of {ranks} can")
    share = c["batch_size"] // ranks
    if c["micro_batch"] and share % c["micro_batch"]:
        whose = f"the share of a rank, {share}" if ranks > 1 else f"--batch-size {share}"
        raise ValueError(f"--micro-batch {c['micro_batch']} does not divide {whose}: {vit.divisors(share)} do")
    if c["image_size"] % c["patch_size"] and not weights_to_be_read:
        near = max(1, round(c["image_size"] / c["patch_size"])) * c["patch_size"]
        raise ValueError(f"--image-size {c['image_size']} is not divisible by --patch-size {c['patch_size']}: {near} is")
    if c["dataset"] == "stl10" and c["views"] == "different":
        raise ValueError("--views different shows a digit on two canvases; stl10 has one photograph of a thing: --views same")
    if c["dataset"] == "stl10" and c["background"] != "black":
        raise ValueError("--background is for --dataset clutter: photographs have their own")
    if c["texture_pool"] < 0 or (c["texture_pool"] and c["background"] != "texture"):
        raise ValueError(f"--texture-pool {c['texture_pool']}: a number of textures, with --background texture, is wanted")
    if c["dim"] % c["heads"] and not weights_to_be_read:
        raise ValueError(f"--heads {c['heads']} does not divide the width {c['dim']}: {vit.divisors(c['dim'])} do")
    if c["loss"] == "nce" and c["batch_size"] < 2:
        raise ValueError("--batch-size 1 leaves --loss nce without negatives: 2 is the least")
    if c["batch_size"] > c["images_per_epoch"]:
        raise ValueError(f"--batch-size {c['batch_size']} is larger than --images-per-epoch {c['images_per_epoch']}")


def given(args):
    """The flags that were given, by their names in the settings."""
    return {name: v for name, v in vars(args).items() if v is not None and name not in ("output", "resume")}


def flag(name):
    return "--" + name.replace("_", "-")


def autocast_dtype(precision, device):
    """What the networks compute in: bfloat16 where it is fast, float16 on older GPUs, or float32."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():  # elsewhere it is emulated, and slow
        return torch.bfloat16
    return torch.float32


# --------------------------------------------------------------------------------- schedules


def cosine(start, end, progress):
    """From start to end along half a cosine as progress goes from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rate(config, progress):
    """A linear ramp over the first `warmup` of the run, then a cosine to zero (section III)."""
    if progress < config["warmup"]:
        return config["lr"] * progress / config["warmup"]
    return cosine(config["lr"], 0, (progress - config["warmup"]) / (1 - config["warmup"]))


def teacher_temperature(config, progress):
    """τ_t: from a lower, safer value up to its own while the learning rate ramps up."""
    share = min(1, progress / config["warmup"])
    return config["warmup_teacher_temp"] + share * (config["teacher_temp"] - config["warmup_teacher_temp"])


# ------------------------------------------------------------------------------- the training


def make_optimizer(student):
    """AdamW; biases and norms are spared the weight decay, as in DINO."""
    decayed = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    return torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], fused=True)


@torch.no_grad()
def update_teacher(teacher, student, momentum):
    """Exponential moving average: teacher ← momentum · teacher + (1 − momentum) · student."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def embed(config, network, crops, numbers):
    """The crops of these numbers, each (B, 3, H, W), through a network in one pass: (len(numbers), B, dim)."""
    dtype = autocast_dtype(config["precision"], crops.device)
    with torch.autocast(crops.device.type, dtype, enabled=dtype != torch.float32):
        out = network(crops.flatten(0, 1) if len(numbers) == len(crops) else torch.cat([crops[i] for i in numbers]))
    out = out if out.dtype == torch.float64 else out.float()  # the losses divide by small temperatures
    return out.unflatten(0, (len(numbers), -1))


def loss_of(config, loss_fn, student, teacher, views, params, progress, backward=None):
    """The loss of the batch that `params` describe, computed `micro_batch` images at a time.

    The pieces give exactly the loss and the gradient of the whole. NCE compares each image with
    all others, but those come from the teacher, which has no gradient: its projections of the
    whole batch come first, a few numbers an image. The images are rendered again for the student
    rather than kept. `progress`, from 0 to 1, is how much of the run is done.

    In training, `backward` is called with the loss of each piece, and where there are several
    ranks each computes its share of the batch; `student` is then a DistributedDataParallel.

    Returns the loss, detached, and with DINO the mean of the teacher's logits (K,), else None;
    of several ranks, each one's part of the sum over all.
    """
    rank, ranks = place() if backward else (0, 1)
    images = len(params["centre"])
    share = images // ranks
    size = min(config["micro_batch"] or share, share)
    starts = range(rank * share, (rank + 1) * share, size)
    pieces = [{name: value[i : min(i + size, (rank + 1) * share)] for name, value in params.items()} for i in starts]
    keys, loss, logits = None, 0.0, 0.0
    if config["loss"] == "nce" and len(pieces) > 1:
        with torch.no_grad():
            keys = torch.cat([embed(config, teacher, views.render(piece), views.teacher) for piece in pieces], dim=1)
            keys = gather(keys, ranks)
    for start, piece in zip(starts, pieces):
        crops = views.render(piece)
        with torch.no_grad():
            targets = embed(config, teacher, crops, views.teacher) if keys is None else keys
        more = piece is not pieces[-1]  # only after the last piece do the ranks add up their gradients
        with student.no_sync() if more and ranks > 1 else contextlib.nullcontext():
            outputs = embed(config, student, crops, views.student)
        if config["loss"] == "nce":
            targets = gather(targets, ranks) if keys is None else keys
            part = loss_fn(outputs, targets, views.pairs, first=start)
        else:
            part = loss_fn(outputs, targets, views.pairs, teacher_temperature(config, progress))
            logits = logits + targets.sum(dim=(0, 1)) / (len(targets) * images)
        part = part * (len(piece["centre"]) / images)
        if backward:
            backward(part * ranks)  # DistributedDataParallel takes the mean over the ranks
        loss = loss + part.detach()
    return loss, logits if config["loss"] == "dino" else None


def training_step(config, loss_fn, student, teacher, optimizer, scaler, views, params, step, steps):
    """Step number `step` of `steps`, on the batch that `params` describe: changes student, teacher and centre.

    Returns the loss (of several ranks, this one's part of the sum) and the norm of the gradient, both
    on the device: nothing here waits for it.
    """
    progress = step / steps
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, progress)
    optimizer.param_groups[0]["weight_decay"] = cosine(config["weight_decay"], config["weight_decay_end"], progress)
    optimizer.zero_grad()
    loss, logits = loss_of(
        config, loss_fn, student, teacher, views, params, progress, lambda part: scaler.scale(part).backward()
    )
    if config["loss"] == "dino":
        if place()[1] > 1:
            dist.all_reduce(logits)
        loss_fn.update_center(logits)
        if step < steps // config["epochs"]:  # DINO holds its last layer still in the first epoch
            getattr(student, "module", student).head.last_layer.weight_v.grad = None
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(student.parameters(), config["clip_grad"])
    scaler.step(optimizer)
    scaler.update()
    update_teacher(teacher, student, cosine(config["momentum_teacher"], 1.0, progress))
    return loss, norm


def drawn_ahead(views, steps):
    """The parameters of each of `steps`; on a GPU drawn by a thread while it computes the step before."""
    if views.device.type == "cpu":
        yield from map(views.draw, steps)  # its cores have enough to do
        return

    def draw(step):
        return {name: value.pin_memory() for name, value in views.draw(step).items()}

    with ThreadPoolExecutor(1) as thread:
        drawn = thread.submit(draw, steps[0])
        for step in steps:
            params = drawn.result()
            drawn = thread.submit(draw, step + 1)
            yield params


# --------------------------------------------------------------------------------- many ranks


def meet():
    """Under torchrun: join the other ranks, each with a GPU of its own where there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def place():
    """The number of this rank, from 0, and how many there are: 0 and 1 but under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(keys, ranks):
    """The projections (crops, b, dim) of all ranks' images, in the order of the ranks: (crops, ranks · b, dim)."""
    if ranks == 1:
        return keys
    parts = [torch.empty_like(keys) for _ in range(ranks)]
    dist.all_gather(parts, keys.contiguous())
    return torch.cat(parts, dim=1)


def any_rank(number):
    """The largest of the ranks' numbers. They meet on the CPU: no GPU is waited for."""
    if place()[1] == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


# ----------------------------------------------------------------------------------- the loop


class Validation:
    """A fixed set of validation canvases or photographs, and what is measured on it again and again.

    They are the same for every run of a preset. Attention to digits is measured on the layout
    `matched`; k-NN classifies the same canvases by KNN_BANK training canvases.
    """

    def __init__(self, config, splits, device):
        self.config, held_out, bank = config, splits["validation"], splits.get("bank", splits["train"])
        n = visualize.VALIDATION_IMAGES
        # kept, for drawing them anew each epoch would cost as much as looking at them
        self.canvases = list(data.evaluation_batches(config, held_out, n, "matched", "validation", device=device))
        self.bank = list(data.evaluation_batches(config, bank, KNN_BANK, "matched", "train", device=device))
        batch = min(config["batch_size"], n, len(held_out))  # as in training: the loss depends on it
        self.views = data.TrainingViews(config | {"batch_size": batch, "seed": 0}, held_out, "validation", device)
        self.drawn = [self.views.draw(step) for step in range(n // batch)]

    @torch.no_grad()
    def __call__(self, student, teacher, loss_fn, progress):
        """The validation loss, the teacher's attention in numbers, and its k-NN accuracy, for log.jsonl."""
        losses = [
            loss_of(self.config, loss_fn, student, teacher, self.views, params, progress)[0].item()
            for params in self.drawn
        ]
        table = visualize.measure(teacher.backbone, self.canvases, resamples=0)
        bank, bank_labels, _ = visualize.features(teacher.backbone, self.bank)
        queries, labels, _ = visualize.features(teacher.backbone, self.canvases)
        found = visualize.knn_classify(bank, bank_labels, queries)
        shown = ("selectivity", "auroc", "pointing", "entropy", "diversity")
        return {
            "images": len(labels),
            "loss": sum(losses) / len(losses),
            "knn": (found == labels).double().mean().item(),
            **{row: {m: values[m]["value"] for m in shown if m in values} for row, values in table.items()},
        }


def train(config, student, splits, folder, checkpoint=None, stop=None):
    """Train `student` on views of the training split, on one device, or each rank on its own.

    With a `checkpoint` of the run it goes on from there, as if it had not stopped: all that chance
    decides is a function of the seed and the step. `stop` is a Stopper, or None.

    Before the first epoch and after each, a line goes to log.jsonl in `folder`; the checkpoint is
    written before the first step, after each epoch, every `checkpoint_minutes`, and when the run is
    told to stop; of several ranks the first one writes. Returns the teacher and the lines of
    log.jsonl. Raises FloatingPointError if the loss or the gradient is no number, OSError if
    the checkpoint is of no use or nothing can be written, and Stopped once it has stopped.
    """
    c, device = config, student.backbone.cls_token.device
    rank, ranks = place()
    views = data.TrainingViews(c, splits["train"], device=device)
    validate = Validation(c, splits, device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    student.backbone.checkpoint_blocks = c["checkpoint_blocks"]
    if c["compile"]:
        compile_blocks(student, teacher)
    optimizer = make_optimizer(student)
    loss_fn = (NCELoss(c["temperature"]) if c["loss"] == "nce" else DINOLoss(c["out_dim"], c["temperature"])).to(device)
    dtype = autocast_dtype(c["precision"], device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    steps_per_epoch = c["images_per_epoch"] // c["batch_size"]
    steps = c["epochs"] * steps_per_epoch
    parts = {"student": student, "teacher": teacher, "optimizer": optimizer, "loss": loss_fn, "scaler": scaler}
    history, start = [], 0
    total = torch.zeros((), device=device)  # the loss, summed over the steps of the epoch
    skipped = torch.zeros((), device=device, dtype=torch.int64)  # steps of the run whose gradient left float16's range
    broken = torch.full((), -1, device=device)  # the first step whose loss or gradient was no number
    if checkpoint:
        history, start = checkpoint["metrics"], checkpoint["step"]
        sums = checkpoint["epoch_loss"]
        total += sums[rank] if len(sums) == ranks else sum(sums) / ranks
        skipped += checkpoint["skipped"]
        try:
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OSError(f"{folder}: the checkpoint does not fit its own settings ({data.one_line(error)[:200]})") from error
        if rank == 0:
            write_log(folder, history)  # cut back to the checkpoint
    parallel = DistributedDataParallel(student) if ranks > 1 else student
    stop = stop or Stopper()
    saved, saved_at = start, time.monotonic()

    def check():
        """Raise FloatingPointError if a step so far went wrong. Waits for the device."""
        step = broken.item()
        if step >= 0:
            raise FloatingPointError(
                f"step {step + 1}: the loss or its gradient is no number, at learning rate "
                f"{learning_rate(c, step / steps):.2g}; the checkpoint in {folder}, of step {saved}, is from before; "
                f"try a lower --lr than {c['lr']:g}"
            )

    def save(step):
        """Write all that the run needs to go on after `step` steps."""
        nonlocal saved, saved_at
        check()
        epoch_loss = of_all_ranks(total)
        if rank == 0:
            save_checkpoint(os.path.join(folder, "ckpt.pth"), {
                "config": c,
                "step": step,
                "epoch": step // steps_per_epoch,
                **{name: part.state_dict() for name, part in parts.items()},
                "metrics": history,
                "epoch_loss": epoch_loss,  # each rank's sum over the steps of an epoch that is not over
                "skipped": skipped.item(),
                "threads": torch.get_num_threads(),  # on which the last bits of a sum depend
            })
        saved, saved_at = step, time.monotonic()

    def log(line, progress):
        """Add the validation to a line, and the line to the history and to log.jsonl."""
        started = time.perf_counter()
        line["validation"] = validate(student, teacher, loss_fn, progress)
        line["validation_seconds"] = time.perf_counter() - started
        if not math.isfinite(line["validation"]["loss"]):
            raise FloatingPointError(f"the validation loss after epoch {line['epoch']} is {line['validation']['loss']}; "
                                     f"try a lower --lr than {c['lr']:g}")
        history.append(line)
        if rank == 0:
            write_log(folder, history)
            if line["epoch"] in c["keep_epochs"]:
                kept = {"config": c, "epoch": line["epoch"], "teacher": teacher.state_dict(), "metrics": history}
                path = os.path.join(folder, f"epoch-{line['epoch']}.pth")
                save_checkpoint(path, kept)

    if not checkpoint:
        save(0)
    if not history:
        log({"epoch": 0, "step": 0}, progress=0)
    bar = tqdm(total=steps * c["batch_size"], initial=start * c["batch_size"], unit="image", unit_scale=True,
               smoothing=0.05, disable=rank > 0)
    with bar:
        for epoch in range(start // steps_per_epoch, c["epochs"]):
            started, first = time.perf_counter(), max(start, epoch * steps_per_epoch)
            todo = range(first, (epoch + 1) * steps_per_epoch)
            for step, params in zip(todo, drawn_ahead(views, todo)):
                loss, norm = training_step(c, loss_fn, parallel, teacher, optimizer, scaler, views, params, step, steps)
                total += loss
                skipped += scaler.is_enabled() & ~norm.isfinite()
                # float16's scaler skips a step whose gradient is too large for it, and scales less from then on
                healthy = loss.isfinite() & (norm.isfinite() | (scaler.get_scale() > 1))
                broken = torch.where((broken < 0) & ~healthy, step, broken)
                bar.update(c["batch_size"])
                if step % 20 == 0:  # reading a number waits for the device
                    check()
                    bar.set_postfix(epoch=epoch + 1, loss=f"{loss.item() * ranks:.3f}")
                minutes = (time.monotonic() - saved_at) / 60
                why = any_rank(stop.signal or int(minutes > c["checkpoint_minutes"]))  # a signal's number is above 1
                if why and step + 1 < todo.stop:
                    save(step + 1)
                    if why > 1:
                        raise Stopped(why)
            mean_loss = sum(of_all_ranks(total)) / steps_per_epoch
            seconds = time.perf_counter() - started
            check()
            log({
                "epoch": epoch + 1,
                "step": step + 1,
                "loss": mean_loss,
                "lr": optimizer.param_groups[0]["lr"],
                "weight_decay": optimizer.param_groups[0]["weight_decay"],
                "momentum_teacher": cosine(c["momentum_teacher"], 1.0, step / steps),
                **({"skipped_steps": skipped.item()} if scaler.is_enabled() else {}),
                "images_per_second": len(todo) * c["batch_size"] / seconds,
                "seconds": seconds,
            }, step / steps)
            total = torch.zeros((), device=device)
            save(step + 1)
            why = any_rank(stop.signal or 0)
            if why and epoch + 1 < c["epochs"]:
                raise Stopped(why)
    return teacher, history


def of_all_ranks(value):
    """The ranks' tensors of no dimension as a list of numbers. Waits for the device."""
    parts = [torch.empty_like(value) for _ in range(place()[1])]
    if len(parts) == 1:
        return [value.item()]
    dist.all_gather(parts, value)
    return [part.item() for part in parts]


def compile_blocks(*networks):
    """Compile all blocks, which share what is compiled; a line of warning and no more where that cannot be done."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=networks[0].backbone.cls_token.device))
    except Exception as error:  # of many kinds, by what is missing
        say(f"warning: --compile does nothing here ({data.one_line(error)[:150]})")
        return
    for network in networks:
        for block in network.backbone.blocks:
            block.compile()


class Stopped(Exception):
    """The run was told to stop by a signal, its argument, and has written its checkpoint."""


class Stopper:
    """Notes, in a `with` block, that SIGINT or SIGTERM came, so that a step can end; a second SIGINT stops at once."""

    signal = None

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def save_checkpoint(path, content):
    """Write whole or not at all, with a digest: to a temporary file, then renamed.

    The one that was there stays as ….prev.pth. Raises OSError if it cannot be written.
    """
    try:
        with vit.whole(path) as part:
            with open(part, "wb") as file:
                torch.save(content | {"digest": vit.digest(content)}, file)
                file.flush()
                os.fsync(file.fileno())
            if os.path.exists(path):
                os.replace(path, previous(path))
    except (OSError, RuntimeError) as error:  # torch's writer makes a RuntimeError of a full disk
        raise OSError(f"{path} could not be written ({data.one_line(error)[:150]}); the one before it is whole") from error


def write_log(folder, history):
    with vit.whole(os.path.join(folder, "log.jsonl")) as part, open(part, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in history)


def previous(path):
    return path.removesuffix(".pth") + ".prev.pth"


def new_folder(config, output):
    """Make the run's folder: --output, or the first of runs/NAME, runs/NAME-2, … not there yet."""
    visualize.make_folder(output or "runs")
    if output:
        return output
    texture = "" if config["background"] == "black" else "-texture"
    name = os.path.join("runs", f"{config['dataset']}-{config['loss']}-{config['views']}{texture}")
    number = 1
    while True:
        folder = name if number == 1 else f"{name}-{number}"
        try:
            os.mkdir(folder)
            return folder
        except FileExistsError:
            number += 1


def read_whole(path):
    """A checkpoint with all that a run needs to go on; OSError or ValueError if it is none."""
    checkpoint = vit.read_checkpoint(path)
    needed = ("config", "step", "student", "teacher", "optimizer", "loss", "scaler", "metrics", "epoch_loss", "skipped",
              "threads", "digest")
    lost = [name for name in needed if not (isinstance(checkpoint, dict) and name in checkpoint)]
    if lost:
        raise ValueError(f"--resume {path} lacks {', '.join(lost)}: a checkpoint of a run of train.py is wanted")
    return checkpoint


def read_run(args):
    """The checkpoint that --resume names, its settings with the flags over them; the one before it if it is damaged."""
    path = os.path.join(args.resume, "ckpt.pth") if os.path.isdir(args.resume) else args.resume
    folder = os.path.dirname(path) or "."
    if args.output:
        raise ValueError(f"--output {args.output}: a resumed run goes on in its own folder, {folder}")
    try:
        checkpoint = read_whole(path)
    except (OSError, ValueError) as error:
        if not os.path.exists(previous(path)):
            raise
        checkpoint = read_whole(previous(path))
        say(f"warning: {error}; going on from {previous(path)}")
        os.replace(previous(path), path)  # else the next save would let the damaged one push out the whole one
    config = checkpoint["config"]
    torch.set_num_threads(checkpoint["threads"])
    planned = config["epochs"]
    for name, value in given(args).items():
        if name in ("epochs", "device", "data_root", "compile", "checkpoint_minutes"):
            config[name] = value
        elif config[name] != value:
            raise ValueError(f"--resume {folder} has {flag(name)} {config[name]}, not {value}: leave the flag out")
    steps_per_epoch = config["images_per_epoch"] // config["batch_size"]
    if config["epochs"] * steps_per_epoch <= checkpoint["step"]:
        raise ValueError(f"--resume {folder} has had its {config['epochs']} epochs: more --epochs go on with it, and python "
                         f"visualize.py {path} measures it")
    if config["epochs"] != planned:
        say(f"{config['epochs']} epochs instead of {planned}: the schedules are planned anew from here on")
    return checkpoint, config, folder


def prepare(args, folder=None):
    """Everything that can fail for what the user gave: settings, device, weights, digits, folder.

    Makes the folder of a new run, unless another rank has made `folder` already.
    """
    if args.resume:
        checkpoint, config, folder = read_run(args)
        check_settings(config)
        device = vit.find_device(config["device"])
        student = vit.build_network(config).to(device)
        return config, student, data.load_dataset(config, device)[0], folder, checkpoint
    config = make_config(args)
    if args.output and not folder and os.path.exists(os.path.join(args.output, "ckpt.pth")):
        raise ValueError(f"--output {args.output} already holds a run: name a new folder")
    device = vit.find_device(config["device"])
    weights = None
    if config["weights"] != "none":
        weights, heads = vit.read_weights(config["weights"])
        config = make_config(args, vit.shape_of(weights) | {"heads": heads})  # its width and depth are theirs
        if heads != config["heads"]:
            config["fallbacks"].append(
                f"--heads {config['heads']}: the q, k and v of --weights {config['weights']} count as {heads}"
            )
    student = vit.build_network(config)
    if weights:
        vit.load_backbone(student.backbone, weights, f"--weights {config['weights']}")
    splits, warning = data.load_dataset(config, device)
    if warning:
        config["fallbacks"].append(warning)
    data.draw_digits(config["seed"], 0, len(splits["train"]), config["batch_size"])  # raises if there are too few
    return config, student.to(device), splits, folder or new_folder(config, args.output), None


def prepare_all(args):
    """`prepare` on every rank; the first one goes ahead, for it fetches and makes what is missing.

    Returns None, once it has been told, if something was wrong.
    """
    prepared, folder = None, [None]
    if place()[0] == 0:
        try:
            prepared = prepare(args)
            folder = [prepared[3]]
        except (ValueError, OSError) as error:
            print(f"train.py: error: {data.one_line(error)}", file=sys.stderr)
    if place()[1] > 1:
        dist.broadcast_object_list(folder)
    return prepared or (folder[0] and prepare(args, folder[0]))


def run(args):
    """The whole run that the flags ask for; returns the exit status."""
    prepared = prepare_all(args)
    if prepared is None:
        return 2
    config, student, splits, folder, checkpoint = prepared
    rank, ranks = place()
    if rank == 0:
        why = "resumed" if checkpoint else "asked for" if args.preset else "CUDA is there" if config["preset"] == "paper" else "no CUDA here"
        print(
            f"preset {config['preset']} ({why}): ViT of width {config['dim']}, {config['depth']} blocks, {config['heads']} "
            f"heads, {config['image_size']} px, patch {config['patch_size']}; {config['epochs']} epochs of "
            f"{config['images_per_epoch']:,} images on {config['device']}{f', {ranks} ranks' if ranks > 1 else ''}, into {folder}"
        )
        for line in config["fallbacks"]:
            print(f"warning: {line}", file=sys.stderr)

    untrained = None if checkpoint else copy.deepcopy(student.backbone)
    trained = False
    try:
        with Stopper() as stop:
            teacher, history = train(config, student, splits, folder, checkpoint, stop)
        trained = True
        if rank > 0:
            return 0
        path = os.path.join(folder, "ckpt.pth")
        visualize.draw_curves(history, config, os.path.join(folder, "curves.png"))
        untrained = untrained or visualize.untrained_backbone(config)
        subject = visualize.Subject(path, config, teacher.backbone, config["epochs"], history, splits=splits)
        visualize.report(subject, untrained, folder)
    except Stopped as stopped:
        say(f"stopped; python train.py --resume {folder} goes on")
        return 128 + stopped.args[0]
    except KeyboardInterrupt:
        if trained:
            say(f"left; the run has ended: python visualize.py {path} measures and draws it")
        else:
            say(f"left at once; python train.py --resume {folder} goes on from its last checkpoint")
        return 128 + signal.SIGINT
    except (FloatingPointError, OSError) as error:
        say(f"train.py: error: {data.one_line(error)}")
        return 1
    print(f"python visualize.py {path}")
    return 0


def say(line):
    """To standard error, once for all ranks."""
    if place()[0] == 0:
        print(line, file=sys.stderr)


def main(argv=None):
    args = parse_args(argv)
    try:
        meet()
        return run(args)
    except (RuntimeError, MemoryError) as error:  # on a CPU having no memory left is a RuntimeError like others
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(error):
            raise
        say("train.py: error: out of memory; a smaller --micro-batch, --checkpoint-blocks or a smaller --image-size need less")
        return 1
    except KeyboardInterrupt:  # before the first step
        say("left before there was anything to keep")
        return 128 + signal.SIGINT
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
