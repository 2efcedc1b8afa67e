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
import copy
import json
import math
import os
import signal
import sys
import time

import torch
from torch import nn
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
    add("--resume", metavar="RUN",
        help="go on with a run that was stopped, from its folder, with its settings; --epochs, --device and --data-root may "
        "be others")
    add("--output", help="folder of the run, new [runs/<dataset>-<loss>-<views>, of textures …-texture; then -2, -3]")
    return parser.parse_args(argv)


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
    for name in ("image_size", "patch_size", "heads", "batch_size", "epochs", "images_per_epoch", "lr", "temperature"):
        if not (c[name] > 0 and math.isfinite(c[name])):
            raise ValueError(f"{flag(name)} {c[name]} must be above 0")
    if args.micro_batch is not None and args.micro_batch < 1:
        raise ValueError(f"--micro-batch {args.micro_batch} must be above 0")
    to_be_read = shape is None and args.weights not in (None, "none")
    if c["image_size"] % c["patch_size"] and not to_be_read:
        near = max(1, round(c["image_size"] / c["patch_size"])) * c["patch_size"]
        raise ValueError(f"--image-size {c['image_size']} is not divisible by --patch-size {c['patch_size']}: {near} is")
    try:
        c["keep_epochs"] = sorted({int(epoch) for epoch in c["keep_epochs"].split(",") if c["keep_epochs"]})
    except ValueError:
        raise ValueError(f"--keep-epochs {c['keep_epochs']} is no list of epochs such as 1,5,10") from None
    if not set(c["keep_epochs"]) <= set(range(c["epochs"] + 1)):
        raise ValueError(f"--keep-epochs {args.keep_epochs}: epochs go from 0, before the first step, to {c['epochs']}")
    if c["dataset"] == "stl10" and c["views"] == "different":
        raise ValueError("--views different shows a digit on two canvases; stl10 has one photograph of a thing: --views same")
    if c["dataset"] == "stl10" and c["background"] != "black":
        raise ValueError("--background is for --dataset clutter: photographs have their own")
    if c["texture_pool"] < 0 or (c["texture_pool"] and c["background"] != "texture"):
        raise ValueError(f"--texture-pool {c['texture_pool']}: a number of textures, with --background texture, is wanted")
    if c["dim"] % c["heads"] and not to_be_read:
        raise ValueError(f"--heads {c['heads']} does not divide the width {c['dim']}: {vit.divisors(c['dim'])} do")
    if c["loss"] == "nce" and c["batch_size"] < 2:
        raise ValueError("--batch-size 1 leaves --loss nce without negatives: 2 is the least")
    if c["batch_size"] > c["images_per_epoch"]:
        raise ValueError(f"--batch-size {c['batch_size']} is larger than --images-per-epoch {c['images_per_epoch']}")
    # ViT-S/8 keeps its positions on the grid of 224 px, as DINO's weights do, whatever the input.
    if shape is None:
        c["pos_size"] = 224 if preset == "paper" and 224 % c["patch_size"] == 0 else c["image_size"]
    elif c["patch_size"] != shape["patch_size"]:
        raise ValueError(f"--patch-size {c['patch_size']}: the weights have patches of {shape['patch_size']}")
    return config


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
        out = network(torch.cat([crops[i] for i in numbers]))
    out = out if out.dtype == torch.float64 else out.float()  # the losses divide by small temperatures
    return out.unflatten(0, (len(numbers), -1))


def loss_of(config, loss_fn, student, teacher, views, params, progress, backward=None):
    """The loss of the batch that `params` describe, computed `micro_batch` images at a time.

    The pieces give exactly the loss and the gradient of the whole. NCE compares each image with
    all others, but those come from the teacher, which has no gradient: its projections of the
    whole batch come first, a few numbers an image. The images are rendered again for the student
    rather than kept. `progress`, from 0 to 1, is how much of the run is done; `backward` is called
    with the loss of each piece.

    Returns the loss, detached, and with DINO the mean of the teacher's logits (K,), else None.
    """
    images = len(params["centre"])
    size = min(config["micro_batch"] or images, images)
    pieces = [{name: value[i : i + size] for name, value in params.items()} for i in range(0, images, size)]
    keys, loss, logits = None, 0.0, 0.0
    if config["loss"] == "nce" and len(pieces) > 1:
        with torch.no_grad():
            keys = torch.cat([embed(config, teacher, views.render(piece), views.teacher) for piece in pieces], dim=1)
    for k, piece in enumerate(pieces):
        crops = views.render(piece)
        with torch.no_grad():
            targets = embed(config, teacher, crops, views.teacher) if keys is None else keys
        outputs = embed(config, student, crops, views.student)
        if config["loss"] == "nce":
            part = loss_fn(outputs, targets, views.pairs, first=k * size)
        else:
            part = loss_fn(outputs, targets, views.pairs, teacher_temperature(config, progress))
            logits = logits + targets.sum(dim=(0, 1)) / (len(targets) * images)
        part = part * (len(piece["centre"]) / images)
        if backward:
            backward(part)
        loss = loss + part.detach()
    return loss, logits if config["loss"] == "dino" else None


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
    """Train `student` on views of the training split, all on one device.

    With a `checkpoint` of the run it goes on from there, as if it had not stopped: all that chance
    decides is a function of the seed and the step. `stop` is a Stopper, or None.

    Before the first epoch and after each, a line goes to log.jsonl in `folder`; after each, the
    checkpoint is written there, and also when the run is told to stop. Returns the teacher and the
    lines of log.jsonl. Raises FloatingPointError if the loss or the attention is no number, and
    Stopped once it has stopped.
    """
    c, device = config, student.backbone.cls_token.device
    views = data.TrainingViews(c, splits["train"], device=device)
    validate = Validation(c, splits, device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    student.backbone.checkpoint_blocks = c["checkpoint_blocks"]
    optimizer = make_optimizer(student)
    loss_fn = (NCELoss(c["temperature"]) if c["loss"] == "nce" else DINOLoss(c["out_dim"], c["temperature"])).to(device)
    dtype = autocast_dtype(c["precision"], device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    steps_per_epoch = c["images_per_epoch"] // c["batch_size"]
    steps = c["epochs"] * steps_per_epoch
    history, start, total = [], 0, torch.zeros((), device=device)
    if checkpoint:
        parts = {"student": student, "teacher": teacher, "optimizer": optimizer, "loss": loss_fn, "scaler": scaler}
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        history, start = checkpoint["metrics"], checkpoint["step"]
        total += checkpoint["epoch_loss"]
        with open(os.path.join(folder, "log.jsonl"), "w") as file:  # cut back to the checkpoint
            file.writelines(json.dumps(line) + "\n" for line in history)
    stop = stop or Stopper()

    def check(loss, epoch):
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of epoch {epoch} is {loss}; try a lower --lr than {c['lr']:g}")

    def log(line, progress):
        """Add the validation to a line, and the line to the history and to log.jsonl."""
        started = time.perf_counter()
        line["validation"] = validate(student, teacher, loss_fn, progress)
        line["validation_seconds"] = time.perf_counter() - started
        check(line["validation"]["loss"], line["epoch"])
        history.append(line)
        with open(os.path.join(folder, "log.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")
        if line["epoch"] in c["keep_epochs"]:
            kept = {"config": c, "epoch": line["epoch"], "teacher": teacher.state_dict(), "metrics": history}
            save_checkpoint(os.path.join(folder, f"epoch-{line['epoch']}.pth"), kept)

    def save(step):
        """Write all that the run needs to go on after `step` steps."""
        save_checkpoint(os.path.join(folder, "ckpt.pth"), {
            "config": c,
            "step": step,
            "epoch": step // steps_per_epoch,
            "student": student.state_dict(),
            "teacher": teacher.state_dict(),
            "optimizer": optimizer.state_dict(),
            "loss": loss_fn.state_dict(),
            "scaler": scaler.state_dict(),
            "metrics": history,
            "epoch_loss": total.item(),  # the sum over the steps of an epoch that is not over
            "threads": torch.get_num_threads(),  # on which the last bits of a sum depend
        })

    if not checkpoint:
        log({"epoch": 0, "step": 0}, progress=0)
    bar = tqdm(total=steps * c["batch_size"], initial=start * c["batch_size"], unit="image", unit_scale=True, smoothing=0.05)
    for epoch in range(start // steps_per_epoch, c["epochs"]):
        started, first = time.perf_counter(), max(start, epoch * steps_per_epoch)
        for step in range(first, (epoch + 1) * steps_per_epoch):
            progress = step / steps
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(c, progress)
            optimizer.param_groups[0]["weight_decay"] = cosine(c["weight_decay"], c["weight_decay_end"], progress)
            momentum = cosine(c["momentum_teacher"], 1.0, progress)

            optimizer.zero_grad()
            loss, logits = loss_of(
                c, loss_fn, student, teacher, views, views.draw(step), progress, lambda part: scaler.scale(part).backward()
            )
            if c["loss"] == "dino":
                loss_fn.update_center(logits)
            if c["loss"] == "dino" and epoch == 0:  # DINO holds its last layer still at first
                student.head.last_layer.weight_v.grad = None
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(student.parameters(), c["clip_grad"])
            scaler.step(optimizer)
            scaler.update()
            update_teacher(teacher, student, momentum)

            total += loss
            bar.update(c["batch_size"])
            if step % 20 == 0:  # reading the loss waits for the device
                bar.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.3f}")
            if stop.signal and step + 1 < (epoch + 1) * steps_per_epoch:
                save(step + 1)
                raise Stopped(stop.signal)
        mean_loss = total.item() / steps_per_epoch  # waits for the device
        seconds = time.perf_counter() - started
        check(mean_loss, epoch + 1)
        log({
            "epoch": epoch + 1,
            "step": step + 1,
            "loss": mean_loss,
            "lr": optimizer.param_groups[0]["lr"],
            "weight_decay": optimizer.param_groups[0]["weight_decay"],
            "momentum_teacher": momentum,
            "images_per_second": (step + 1 - first) * c["batch_size"] / seconds,
            "seconds": seconds,
        }, progress)
        total = torch.zeros((), device=device)
        save(step + 1)
        if stop.signal and epoch + 1 < c["epochs"]:
            raise Stopped(stop.signal)
    bar.close()
    return teacher, history


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
    """Write whole or not at all: to a temporary file, then renamed; the old one stays as ….prev.pth."""
    with open(path + ".tmp", "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    if os.path.exists(path):
        os.replace(path, previous(path))
    os.replace(path + ".tmp", path)


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


def read_run(args):
    """The checkpoint that --resume names, its settings with the flags over them; the one before it if it is damaged."""
    folder = args.resume if os.path.isdir(args.resume) else os.path.dirname(args.resume) or "."
    path = os.path.join(folder, "ckpt.pth")
    if args.output:
        raise ValueError(f"--output {args.output}: a resumed run goes on in its own folder, {folder}")
    try:
        checkpoint = vit.read_checkpoint(path)
    except (OSError, ValueError) as error:
        if not os.path.exists(previous(path)):
            raise
        checkpoint = vit.read_checkpoint(previous(path))
        print(f"warning: {error}; going on from {previous(path)}", file=sys.stderr)
    needed = ("config", "step", "student", "optimizer", "metrics", "epoch_loss", "threads")
    lost = [name for name in needed if name not in checkpoint]
    if lost:
        raise ValueError(f"--resume {path} lacks {', '.join(lost)}: a checkpoint of a run of train.py is wanted")
    config = checkpoint["config"]
    torch.set_num_threads(checkpoint["threads"])
    if args.epochs and args.epochs != config["epochs"]:
        print(f"{args.epochs} epochs instead of {config['epochs']}: the schedules are planned anew from here on")
    for name, value in given(args).items():
        if name in ("epochs", "device", "data_root"):
            config[name] = value
        elif config[name] != value:
            raise ValueError(f"--resume {folder} has {flag(name)} {config[name]}, not {value}: leave the flag out")
    steps_per_epoch = config["images_per_epoch"] // config["batch_size"]
    if config["epochs"] * steps_per_epoch <= checkpoint["step"]:
        raise ValueError(f"--resume {folder} has had its {config['epochs']} epochs: more --epochs go on with it")
    return checkpoint, config, folder


def prepare(args):
    """Everything that can fail for what the user gave: settings, device, weights, digits, folder."""
    if args.resume:
        checkpoint, config, folder = read_run(args)
        device = vit.find_device(config["device"])
        student = vit.build_network(config).to(device)
        return config, student, data.load_dataset(config, device)[0], folder, checkpoint
    config = make_config(args)
    if args.output and os.path.exists(os.path.join(args.output, "ckpt.pth")):
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
    return config, student.to(device), splits, new_folder(config, args.output), None


def main(argv=None):
    args = parse_args(argv)
    try:
        config, student, splits, folder, checkpoint = prepare(args)
    except (ValueError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    why = "resumed" if checkpoint else "asked for" if args.preset else "CUDA is there" if config["preset"] == "paper" else "no CUDA here"
    print(
        f"preset {config['preset']} ({why}): ViT of width {config['dim']}, {config['depth']} blocks, {config['heads']} "
        f"heads, {config['image_size']} px, patch {config['patch_size']}; {config['epochs']} epochs of "
        f"{config['images_per_epoch']:,} images on {config['device']}, into {folder}"
    )
    for line in config["fallbacks"]:
        print(f"warning: {line}", file=sys.stderr)

    untrained = None if checkpoint else copy.deepcopy(student.backbone)
    try:
        with Stopper() as stop:
            teacher, history = train(config, student, splits, folder, checkpoint, stop)
    except Stopped as stopped:
        print(f"\nstopped; python train.py --resume {folder} goes on", file=sys.stderr)
        return 128 + stopped.args[0]
    except FloatingPointError as error:
        print(f"\ntrain.py: error: {error}", file=sys.stderr)
        return 1
    path = os.path.join(folder, "ckpt.pth")
    visualize.draw_curves(history, config, os.path.join(folder, "curves.png"))
    untrained = untrained or visualize.untrained_backbone(config)
    trained = visualize.Subject(path, config, teacher.backbone, config["epochs"], history, splits=splits)
    visualize.report(trained, untrained, folder)
    print(f"python visualize.py {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
