"""Compare the speed and the memory of our training step with those of timm and lightly.

    pip install -r benchmarks/requirements.txt
    python benchmarks/throughput.py                                        # 3 minutes on a CPU
    python benchmarks/throughput.py --image-size 224 --batch-size 2
    python benchmarks/throughput.py --memory --large-batch 1024            # memory, not speed
    python benchmarks/throughput.py --preset laptop --loss nce --steps 30  # the laptop's network
    python benchmarks/throughput.py --command  # the laptop's whole run, as a share of the machine

Both sides train the same network on inputs of the same shape. By default this is ViT-S/8 with
DINO's head and its K = 65,536 prototypes; with --loss nce the head ends at its bottleneck. Each
image gives two crops, and student and teacher both see both of them.

"Ours" is the training step of train.py. "Peer" is what one would put together instead, following
lightly's own DINO example: timm's VisionTransformer with lightly's projection head, loss and
momentum update, one forward pass for each view, and AdamW with its default settings.

Speed is measured in two ways. First, both sides are fed crops from memory. They take turns step by
step, and the median time of a step is reported. Then each side makes its own input, and they take
turns in blocks of steps. Ours renders its canvases on the device. The peer reads finished canvases
as PIL images, and a DataLoader crops and blurs them with torchvision's transforms.

The arithmetic of the model is (3 × student + teacher) forward passes for each crop. Divided by the
time of a step, it is compared with the speed of a large matrix product that is measured in the
same run. The last line of the output holds all results as JSON.
"""

import argparse
import copy
import dataclasses
import datetime
import functools
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightly
import numpy as np
import timm
import torch
import torchvision
import torchvision.transforms as T
from lightly.loss import DINOLoss, NTXentLoss
from lightly.models.modules.heads import DINOProjectionHead, ProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from PIL import Image

# the project's folder, whose views.py is not the one beside this file
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import clutter
import data
import settings
import train
import vit
from views import MEAN, STD, TrainingViews

warnings.filterwarnings("ignore", message=".*weight_norm.*")

# Every measured step is taken halfway through an imaginary run. There the learning rate is not
# zero, and the last layer of DINO's head is trained, unlike in the first epoch.
TOTAL_STEPS = 1_000_000
STEP = TOTAL_STEPS // 2
PEER_DATASET_SIZE = 1_000_000  # so that the peer's DataLoader does not reach the end of an epoch
LAPTOP_INPUT_STEPS = 30


# ------------------------------------------------------------------- what both sides have in common


def comparison_config(args: argparse.Namespace, **flags) -> settings.Config:
    """The settings of train.py that are compared, with further `flags` for ours.

    The peer takes the shape of the network and of its input from them.
    """
    common = {
        "weights": "none",
        "digits": "sklearn",
        "views": "same",
        "crops": 2,
        "loss": args.loss,
        "device": str(args.device),
        "image_size": args.image_size,
        "batch_size": args.batch_size,
    }
    return settings.make_config({**common, **flags}, args.preset)


def training_digits(batch_size: int) -> data.Split:
    """scikit-learn's training digits, repeated until there are enough for a batch."""
    splits, _, _ = data.load_digits("sklearn")
    digits = splits["train"]
    repeats = 1 + batch_size // len(digits)
    return data.Split(digits.images.repeat(repeats, 1, 1), digits.labels.repeat(repeats))


def uses_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def auto_precision(device: torch.device) -> str:
    """The name of the type that --precision auto stands for on this device."""
    dtype = train.autocast_dtype("auto", device)
    return str(dtype).removeprefix("torch.")


def peer_precision(device: torch.device) -> str:
    """The precision of the peer as one would run it: lightly's example is in float32 on a CPU."""
    return auto_precision(device) if uses_cuda(device) else "float32"


def our_precision(args: argparse.Namespace) -> str:
    """The precision of ours, as it comes or as --precision says."""
    return auto_precision(args.device) if args.precision == "auto" else args.precision


def compared_precisions(args: argparse.Namespace) -> list[str]:
    """The precisions that both sides are timed in, without repetition."""
    if args.precision != "auto":
        return [args.precision]
    return list(dict.fromkeys([auto_precision(args.device), "float32"]))


# --------------------------------------------------------------------------------------------- ours


class ViewsInMemory(TrainingViews):
    """Training views that return the same crops in every step, instead of rendering them."""

    def __init__(self, config, split, crops):
        super().__init__(config, split, device=crops.device)
        self.crops = crops  # (2, B, 3, image_size, image_size)

    def render(self, params):
        return self.crops


class OurTrainer:
    """Takes the training step of train.py, fed with `crops` if given, else with its own views."""

    def __init__(self, config: settings.Config, crops=None):
        device = torch.device(config.device)
        split = training_digits(config.batch_size).to(device)
        student = vit.build_network(config).to(device)
        self.config = config
        self.precision = config.precision
        self.state = train.make_state(config, student)
        if config.compile:
            train.compile_blocks(student, self.state.teacher)
        # parameters of views for every step, or, where they have no effect, the same ones again
        if crops is None:
            self.views = TrainingViews(config, split, device=device)
            self.batches = train.prefetch(self.views, range(STEP, TOTAL_STEPS))
        else:
            self.views = ViewsInMemory(config, split, crops)
            self.batches = itertools.repeat(self.views.sample(STEP))

    def step(self):
        params = next(self.batches)
        train.training_step(self.config, self.state, self.views, params, STEP, TOTAL_STEPS)


# --------------------------------------------------------------------------------------------- peer


class PeerTrainer:
    """Takes a training step put together from timm and lightly.

    It is fed with `crops` if given, else by a DataLoader. `precision` is that of autocast; float32
    turns autocast off. `load_seconds` holds how long each step has waited for its input.
    """

    def __init__(
        self, args: argparse.Namespace, precision: str, crops=None, compiled: bool = False
    ):
        config = comparison_config(args)
        self.device = args.device
        self.precision = precision
        self.loss = config.loss
        self.crops = crops
        self.load_seconds = []

        self.student = timm_vit(config).to(self.device)
        self.student_head = lightly_head(config).to(self.device)
        self.teacher = copy.deepcopy(self.student)
        self.teacher_head = lightly_head(config).to(self.device)
        deactivate_requires_grad(self.teacher)
        deactivate_requires_grad(self.teacher_head)
        # the networks as they are called; compiled, they share the weights of those above
        self.run_student = torch.compile(self.student) if compiled else self.student
        self.run_teacher = torch.compile(self.teacher) if compiled else self.teacher

        parameters = [*self.student.parameters(), *self.student_head.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4)
        self.loss_fn = lightly_loss(config).to(self.device)
        self.loader = iter(peer_loader(args)) if crops is None else None

    def step(self):
        # load the two views, (B, 3, image_size, image_size) each
        start = time.perf_counter()
        views = next(self.loader) if self.crops is None else self.crops
        views = [view.to(self.device, non_blocking=True) for view in views]
        self.load_seconds.append(time.perf_counter() - start)

        # update the teacher
        update_momentum(self.student, self.teacher, 0.996)
        update_momentum(self.student_head, self.teacher_head, 0.996)

        # update the student
        dtype = getattr(torch, self.precision)
        with torch.autocast(self.device.type, dtype, enabled=self.precision != "float32"):
            teacher_out = [self.teacher_head(self.run_teacher(view)) for view in views]
            student_out = [self.student_head(self.run_student(view)) for view in views]
            loss = self.compare(teacher_out, student_out)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def compare(self, teacher_out, student_out):
        """The loss of each view's student against the other view's teacher."""
        if self.loss == "dino":
            return self.loss_fn(teacher_out, student_out)
        first_loss = self.loss_fn(student_out[0], teacher_out[1])
        second_loss = self.loss_fn(student_out[1], teacher_out[0])
        return (first_loss + second_loss) / 2


def timm_vit(config: settings.Config):
    """timm's network of the same shape, without the registers of the laptop preset."""
    return timm.models.VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        num_classes=0,
    )


def lightly_head(config: settings.Config):
    """lightly's projection head, with layers as wide as those of ours."""
    hidden_dim = config.head_hidden_dim
    if config.loss == "dino":
        return DINOProjectionHead(config.dim, hidden_dim, config.bottleneck_dim, config.out_dim)
    layers = []  # (inputs, outputs, norm, activation)
    width = config.dim
    for _ in range(config.head_layers - 1):
        norm = torch.nn.LayerNorm(hidden_dim) if config.head_norm else None
        layers.append((width, hidden_dim, norm, torch.nn.GELU()))
        width = hidden_dim
    layers.append((width, config.bottleneck_dim, None, None))
    return ProjectionHead(layers)


def lightly_loss(config: settings.Config):
    if config.loss == "dino":
        return DINOLoss(config.out_dim)
    return NTXentLoss(config.temperature)


class PeerDataset(torch.utils.data.Dataset):
    """Pairs of views of finished canvases, made by torchvision's transforms from PIL images."""

    def __init__(self, config: settings.Config):
        digits = training_digits(config.batch_size)
        sampler = clutter.CanvasSampler(config, digits)
        params = sampler.sample(data.generator(0, "benchmark"), torch.arange(len(digits)))
        canvases, _, _ = clutter.render_canvases(params, config, digits.images, masks=False)
        levels = (canvases[:, 0].numpy() * 255).astype(np.uint8)
        self.canvases = [Image.fromarray(canvas) for canvas in levels]

        blur_width = 1 + 2 * max(1, config.image_size // 20)
        blur = T.GaussianBlur(blur_width, sigma=(0.1, 2.0))
        steps = [
            T.RandomResizedCrop(config.image_size, scale=(0.5, 1.0), ratio=(1.0, 1.0)),
            T.RandomRotation(15, interpolation=T.InterpolationMode.BILINEAR),
            T.RandomApply([blur], p=0.5),
            T.Grayscale(3),
            T.ToTensor(),
            T.Normalize(MEAN.flatten(), STD.flatten()),
        ]
        self.transform = T.Compose(steps)

    def __len__(self):
        return PEER_DATASET_SIZE

    def __getitem__(self, index):
        canvas = self.canvases[index % len(self.canvases)]
        return self.transform(canvas), self.transform(canvas)


def peer_loader(args: argparse.Namespace) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(
        PeerDataset(comparison_config(args)),
        args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        pin_memory=uses_cuda(args.device),
    )


# ------------------------------------------------------------------------------------- measurements


def synchronize(device: torch.device):
    """Wait until a GPU has finished what it was asked to do."""
    if uses_cuda(device):
        torch.cuda.synchronize()


def call_seconds(device: torch.device, function: Callable, *arguments) -> float:
    """The seconds that a call of the function takes."""
    synchronize(device)
    start = time.perf_counter()
    function(*arguments)
    synchronize(device)
    return time.perf_counter() - start


def median_step_seconds(trainers: dict, steps: int, device: torch.device) -> dict[str, float]:
    """The median seconds of a step of each trainer. They take turns, after a warm-up step each."""
    for trainer in trainers.values():
        trainer.step()
    times = {name: [] for name in trainers}
    for _ in range(steps):
        for name, trainer in trainers.items():
            times[name].append(call_seconds(device, trainer.step))
    return {name: statistics.median(values) for name, values in times.items()}


def block_seconds(trainer, steps: int, device: torch.device) -> float:
    """The mean seconds of a step in an uninterrupted block of steps, after one warm-up step."""

    def take_steps():
        for _ in range(steps):
            trainer.step()

    trainer.step()
    return call_seconds(device, take_steps) / steps


def peak_bytes(make_trainer: Callable, device: torch.device) -> int:
    """The most bytes that tensors take up while a trainer is made and takes two steps."""
    return cuda_peak_bytes(make_trainer) if uses_cuda(device) else cpu_peak_bytes(make_trainer)


def cuda_peak_bytes(make_trainer: Callable) -> int:
    bytes_before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    take_two_steps(make_trainer)
    return torch.cuda.max_memory_allocated() - bytes_before


def cpu_peak_bytes(make_trainer: Callable) -> int:
    # PyTorch keeps no such count for a CPU, but its profiler records every change
    cpu = torch.profiler.ProfilerActivity.CPU
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
            take_two_steps(make_trainer)
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = []  # (time, bytes allocated or, if negative, freed)
    for event in events:
        if event.get("name") == "[memory]":
            changes.append((event["ts"], event["args"]["Bytes"]))
    # the sum of all changes up to each moment
    changes.sort()
    bytes_in_use = np.cumsum([change for _, change in changes])
    return int(bytes_in_use.max())


def take_two_steps(make_trainer: Callable):
    trainer = make_trainer()
    trainer.step()
    trainer.step()


def forward_flops(config: settings.Config, registers: int = 0) -> int:
    """The FLOPs of backbone and head for one crop, of which only matrix products count.

    In the last block, only [CLS] asks, which needs no keys and values of all tokens (see
    `Attention.mix_for_first`). Registers do not count beside the peer, whose network has none.
    """
    dim = config.dim
    patches = (config.image_size // config.patch_size) ** 2
    tokens = 1 + registers + patches
    patch_embedding = 2 * patches * 3 * config.patch_size**2 * dim

    # in a block, for one token: queries, keys, values and output; the MLP; and attention, which is
    # q kᵀ and the weighted sum of the values
    projections = 8 * dim**2
    mlp = 4 * config.mlp_ratio * dim**2
    attention = 4 * tokens * dim
    block = tokens * (projections + mlp + attention)
    # in the last block each head has a product with every token, and a weighted sum of them
    last_block = projections + mlp + 4 * config.heads * tokens * dim
    backbone = patch_embedding + (config.depth - 1) * block + last_block

    # the head uses each of its weights once
    hidden_dim = config.head_hidden_dim
    head_weights = dim * hidden_dim
    head_weights += (config.head_layers - 2) * hidden_dim**2
    head_weights += hidden_dim * config.bottleneck_dim
    if config.loss == "dino":
        head_weights += config.bottleneck_dim * config.out_dim
    return backbone + 2 * head_weights


def step_flops(config: settings.Config, registers: int = 0) -> int:
    """The FLOPs of a training step, with two crops of each image.

    The student's backward pass takes as much as two forward passes. The teacher has only a forward
    pass.
    """
    crops = 2 * config.batch_size
    return (3 + 1) * crops * forward_flops(config, registers)


def matmul_flops_per_second(
    shape: tuple[int, int, int], precision: str, device: torch.device
) -> float:
    """The best speed of six products of matrices (rows, inner) and (inner, columns)."""
    rows, inner, columns = shape
    dtype = getattr(torch, precision)
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(inner, columns, device=device, dtype=dtype)
    best_seconds = min(call_seconds(device, torch.matmul, left, right) for _ in range(6))
    return 2 * rows * inner * columns / best_seconds


def matmul_speeds(shape: tuple[int, int, int], args: argparse.Namespace) -> dict[str, float]:
    """`matmul_flops_per_second` in each of the compared precisions."""
    speeds = {}
    for precision in compared_precisions(args):
        speeds[precision] = matmul_flops_per_second(shape, precision, args.device)
    return speeds


def input_share(trainer: OurTrainer, steps: int, device: torch.device) -> float:
    """The median share of our step that is spent on making its input.

    Rendering always counts. Sampling the parameters counts on a CPU only, since with CUDA a thread
    samples them ahead of the step.
    """
    views = trainer.views
    shares = []
    for step in range(steps + 1):
        params = views.sample(step)
        input_seconds = call_seconds(device, views.render, params)
        if not uses_cuda(device):
            input_seconds += call_seconds(device, views.sample, step)
        shares.append(input_seconds / call_seconds(device, trainer.step))
    return statistics.median(shares[1:])  # the first is a warm-up


# -------------------------------------------------------------------------------------------- speed


@dataclass
class StepTime:
    """How long a step takes that is fed with crops from memory."""

    precision: str
    seconds: float  # the median


@dataclass
class EndToEndTime:
    """How long a step takes for which each side makes its own input."""

    our_name: str
    our_seconds: float
    our_input_share: float  # of the step, spent on making its input
    peer_name: str
    peer_seconds: float
    peer_waiting_share: float  # of the step, spent on waiting for its DataLoader


def time_steps_from_memory(args: argparse.Namespace) -> dict[str, StepTime]:
    """Time the steps of both sides in each precision, and with CUDA also compiled."""
    device = args.device
    config = comparison_config(args)
    split = training_digits(config.batch_size).to(device)
    training_views = TrainingViews(config, split, device=device)
    crops = training_views.render(training_views.sample(0))

    trainers = {}
    for precision in compared_precisions(args):
        precise_config = comparison_config(args, precision=precision)
        trainers[f"ours {precision}"] = OurTrainer(precise_config, crops)
        trainers[f"peer {precision}"] = PeerTrainer(args, precision, crops)
    if uses_cuda(device):
        precision = auto_precision(device)
        compiled_config = comparison_config(args, precision=precision, compile=True)
        trainers[f"ours compiled {precision}"] = OurTrainer(compiled_config, crops)
        trainers[f"peer compiled {precision}"] = PeerTrainer(args, precision, crops, compiled=True)

    medians = median_step_seconds(trainers, args.steps, device)
    return {name: StepTime(trainers[name].precision, medians[name]) for name in trainers}


def time_end_to_end(args: argparse.Namespace) -> EndToEndTime:
    """Time two blocks of steps of each side, in turn."""
    precision = our_precision(args)
    our_trainer = OurTrainer(comparison_config(args, precision=precision))
    our_blocks = []
    peer_blocks = []
    waiting_shares = []
    for _ in range(2):
        our_blocks.append(block_seconds(our_trainer, args.steps, args.device))
        peer_seconds, waiting_share = time_peer_block(args)
        peer_blocks.append(peer_seconds)
        waiting_shares.append(waiting_share)
    our_input_share = input_share(our_trainer, args.steps, args.device)
    return EndToEndTime(
        our_name=f"ours {precision}",
        our_seconds=statistics.mean(our_blocks),
        our_input_share=our_input_share,
        peer_name=f"peer {peer_precision(args.device)}",
        peer_seconds=statistics.mean(peer_blocks),
        peer_waiting_share=statistics.mean(waiting_shares),
    )


def time_peer_block(args: argparse.Namespace) -> tuple[float, float]:
    """The peer's mean seconds of a step, and the share of them that it waits for its DataLoader.

    The loader's workers start and end in here, so that they do not disturb the steps of ours.
    """
    trainer = PeerTrainer(args, peer_precision(args.device))
    step_seconds = block_seconds(trainer, args.steps, args.device)
    waiting_seconds = sum(trainer.load_seconds[1:]) / args.steps  # without the warm-up step
    return step_seconds, waiting_seconds / step_seconds


def laptop_input_share(views: str, device: torch.device, precision: str = "auto") -> float:
    """The share of a step of the laptop preset that is spent on making its input."""
    flags = {"digits": "sklearn", "views": views, "device": str(device), "precision": precision}
    trainer = OurTrainer(settings.make_config(flags, "laptop"))
    return input_share(trainer, LAPTOP_INPUT_STEPS, device)


def speed_ratios(step_times: dict[str, StepTime], args: argparse.Namespace) -> dict[str, float]:
    """How many times as fast as the peer ours is when fed from memory, for each fair pair."""
    device = args.device
    auto = auto_precision(device)
    # both as they come, if --precision has not chosen for them
    pairs = [(f"ours {auto}", f"peer {peer_precision(device)}")] if args.precision == "auto" else []
    # both in the same precision
    for precision in compared_precisions(args):
        pairs.append((f"ours {precision}", f"peer {precision}"))
    # the peer compiled, which is its best
    if uses_cuda(device):
        pairs.append((f"ours {auto}", f"peer compiled {auto}"))
        pairs.append((f"ours compiled {auto}", f"peer compiled {auto}"))
    ratios = {}
    for ours, peer in pairs:
        ratio = step_times[peer].seconds / step_times[ours].seconds
        ratios[f"{ours} over {peer}"] = round(ratio, 3)
    return ratios


def rounded_milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 1)


def speed_columns(name: str, step_seconds: float, batch_size: int) -> str:
    """The first three columns of the tables below."""
    return f"{name:24}{batch_size / step_seconds:10.2f}{1000 * step_seconds:13.0f}"


def report_speed(args: argparse.Namespace) -> dict:
    """Measure and print the speed of both sides. Returns what the JSON line says of it."""
    from_memory = report_steps_from_memory(args)
    end_to_end = report_end_to_end(args)
    ratios = from_memory["ratio"] | end_to_end["ratio"]
    print("\nThe speed of ours divided by that of the peer:")
    for name, ratio in ratios.items():
        print(f"{ratio:6.2f}  {name}")
    return from_memory | end_to_end | {"ratio": ratios}


def report_steps_from_memory(args: argparse.Namespace) -> dict:
    device = args.device
    config = comparison_config(args)
    step_times = time_steps_from_memory(args)

    # the speed of matrix products: a large one, and one of the shape that the MLP has
    side = 8192 if uses_cuda(device) else 2048
    tokens = 1 + (config.image_size // config.patch_size) ** 2
    mlp_shape = (2 * config.batch_size * tokens, config.dim, config.mlp_ratio * config.dim)
    large_speeds = matmul_speeds((side, side, side), args)
    mlp_speeds = matmul_speeds(mlp_shape, args)

    # the table
    print(
        f"Training steps that are fed from memory: preset {args.preset}, {args.image_size} px, "
        f"batch {args.batch_size} × 2 crops, loss {args.loss}."
    )
    print(
        "The last columns give the FLOPs of the model per second as shares of what a matrix "
        f"product\nreaches: one of {side}³, and one of the MLP's shape.\n"
    )
    print(f"{'':24}{'images/s':>10}{'ms per step':>13}{f'of {side}³':>10}{'of MLP':>9}")
    flops = step_flops(config)
    utilisation = {}
    for name, step_time in step_times.items():
        model_speed = flops / step_time.seconds
        utilisation[name] = model_speed / large_speeds[step_time.precision]
        mlp_utilisation = model_speed / mlp_speeds[step_time.precision]
        columns = speed_columns(name, step_time.seconds, args.batch_size)
        print(f"{columns}{utilisation[name]:10.0%}{mlp_utilisation:9.0%}")

    step_milliseconds = {}
    for name, step_time in step_times.items():
        step_milliseconds[name] = rounded_milliseconds(step_time.seconds)
    return {
        "ms_a_step": step_milliseconds,
        "ratio": speed_ratios(step_times, args),
        "model_flops_a_step": flops,
        "flop_utilisation": utilisation,
        "matmul_flops_per_s": large_speeds,
        "own_shape_flops_per_s": mlp_speeds,
    }


def report_end_to_end(args: argparse.Namespace) -> dict:
    result = time_end_to_end(args)
    laptop_different = laptop_input_share("different", args.device, args.precision)
    laptop_same = laptop_input_share("same", args.device, args.precision)

    print("\nTraining steps for which each side makes its own input:\n")
    our_columns = speed_columns(result.our_name, result.our_seconds, args.batch_size)
    print(f"{our_columns}    {result.our_input_share:.1%} of the step is spent on input.")
    peer_columns = speed_columns(result.peer_name, result.peer_seconds, args.batch_size)
    waiting_share = f"{result.peer_waiting_share:.1%} of the step"
    print(f"{peer_columns}    {waiting_share} is spent waiting for the DataLoader.")
    print(
        f"\nThe laptop preset spends {laptop_different:.1%} of a step on its input with "
        f"--views different,\nand {laptop_same:.1%} with --views same."
    )

    workers = f"{args.workers} workers"
    ratio_name = f"end to end: {result.our_name} over {result.peer_name}, {workers}"
    ratio = result.peer_seconds / result.our_seconds
    step_milliseconds = {
        result.our_name: rounded_milliseconds(result.our_seconds),
        result.peer_name: rounded_milliseconds(result.peer_seconds),
    }
    input_shares = {
        "ours": result.our_input_share,
        "laptop different": laptop_different,
        "laptop same": laptop_same,
    }
    return {
        "ratio": {ratio_name: round(ratio, 3)},
        "end_to_end_ms_a_step": step_milliseconds,
        "input_share": input_shares,
        "peer_waits_for_input": result.peer_waiting_share,
    }


# ------------------------------------------------------------------------------- the whole command


def report_command(args: argparse.Namespace) -> dict:
    """Time the README's first command, and print which share of the machine it reaches.

    The share is that of the products of all its training steps, in the time from the start of the
    command to its last line, beside the best product of the same minute. Steps alone are timed in
    between, with their own input.
    """
    flags = ["--loss", "nce", "--views", "same", "--precision", args.precision]
    flags += ["--digits", args.digits, "--data-root", args.data_root]
    parsed = settings.parse_args(flags)
    config = settings.make_config(parsed.flags, "laptop")
    config = dataclasses.replace(config, digits="sklearn")  # for the steps that are timed alone
    flops = step_flops(config, config.registers)
    best_product = matmul_flops_per_second((2048, 2048, 2048), "float32", args.device)
    step_seconds = block_seconds(OurTrainer(config), 60, args.device)

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--preset", "laptop", *flags]
        start = time.perf_counter()
        subprocess.run([*command, "--output", f"{folder}/run"], cwd=ROOT, check=True)
        seconds = time.perf_counter() - start
    total_steps = config.epochs * (config.images_per_epoch // config.batch_size)
    result = {
        "model_flops_a_step": flops,
        "best_float32_product_flops_per_s": best_product,
        "ms_a_step": rounded_milliseconds(step_seconds),
        "step_share": flops / step_seconds / best_product,
        "command_seconds": seconds,
        "command_share": total_steps * flops / seconds / best_product,
    }
    print(f"\nA step has {flops / 1e9:.1f} GFLOP. The best product of 2048³, in float32, reaches")
    print(
        f"{best_product / 1e9:.0f} GFLOP/s. A step takes {1000 * step_seconds:.0f} ms, a share of"
    )
    print(
        f"{result['step_share']:.0%}; the command {seconds:.0f} s, {result['command_share']:.0%}."
    )
    return result


# ------------------------------------------------------------------------------------------- memory


def memory_trainers(args: argparse.Namespace) -> dict[str, Callable]:
    """For each case that is measured, a function that makes its trainer."""
    crops_shape = (2, args.batch_size, 3, args.image_size, args.image_size)
    crops = torch.randn(crops_shape, device=args.device)
    checkpoint_config = comparison_config(args, checkpoint_blocks=True)
    auto = auto_precision(args.device)
    makers = {}
    makers["ours"] = functools.partial(OurTrainer, comparison_config(args))
    makers["ours, --checkpoint-blocks"] = functools.partial(OurTrainer, checkpoint_config)
    # the peer is fed from memory, since other processes make its input
    makers[f"peer {auto}"] = functools.partial(PeerTrainer, args, auto, crops)
    makers["peer float32"] = functools.partial(PeerTrainer, args, "float32", crops)
    if args.large_batch:
        config = comparison_config(args, batch_size=args.large_batch, micro_batch=args.batch_size)
        name = f"ours, {args.large_batch} by {args.batch_size}"
        makers[name] = functools.partial(OurTrainer, config)
    return makers


def report_memory(args: argparse.Namespace) -> dict:
    """Measure and print the memory of both sides. Returns what the JSON line says of it."""
    peaks = {}
    for name, make_trainer in memory_trainers(args).items():
        peaks[name] = peak_bytes(make_trainer, args.device)
    print(
        "The most memory that tensors take up during two steps, weights and optimizer included: "
        f"preset\n{args.preset}, {args.image_size} px, batch {args.batch_size}, loss {args.loss}.\n"
    )
    for name, peak in peaks.items():
        print(f"{name:28}{peak / 2**20:10.0f} MiB{peak / peaks['ours']:8.2f} × ours")
    return {"peak_bytes": peaks}


# ------------------------------------------------------------------------------------- command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    has_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device",
        type=torch.device,
        default="cuda" if has_cuda else "cpu",
        help="Where both sides train. [cuda if there is a GPU, else cpu]",
    )
    parser.add_argument(
        "--preset",
        choices=["paper", "laptop"],
        default="paper",
        help="The preset of train.py whose network is trained. [paper]",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        help="Side of a crop in pixels. [paper: 224 with CUDA, else 96; laptop: 56]",
    )
    parser.add_argument(
        "--batch-size", type=int, help="Images per step. [paper: 32 with CUDA, else 16; laptop: 64]"
    )
    parser.add_argument(
        "--loss", choices=["dino", "nce"], default="dino", help="The loss of both sides. [dino]"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=30 if has_cuda else 4,
        help="Timed steps, after one for warm-up. [30 with CUDA, else 4]",
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="Worker processes of the peer's DataLoader. [2]"
    )
    parser.add_argument("--memory", action="store_true", help="Measure memory instead of speed.")
    parser.add_argument(
        "--command", action="store_true", help="Time the laptop's whole run instead, on a CPU."
    )
    parser.add_argument(
        "--precision",
        default="auto",
        help="The only precision to measure in. [as it comes, and float32]",
    )
    parser.add_argument(
        "--digits", default="auto", help="Those of the run that --command times. [auto]"
    )
    parser.add_argument(
        "--data-root", default="data", help="That of the run that --command times. [data]"
    )
    parser.add_argument(
        "--large-batch",
        type=int,
        default=0,
        metavar="N",
        help="With --memory, also measure a batch of N images in pieces of --batch-size.",
    )
    args = parser.parse_args(argv)

    # sizes that the machine can compute in a minute or two
    if args.preset == "laptop" or args.command:
        args.preset = "laptop"
        image_size = 56
        batch_size = 64
    elif has_cuda:
        image_size = 224
        batch_size = 32
    else:
        image_size = 96
        batch_size = 16
    args.image_size = args.image_size or image_size
    args.batch_size = args.batch_size or batch_size
    return args


def main():
    args = parse_args()
    start = time.perf_counter()
    if args.command:
        results = report_command(args)
    elif args.memory:
        results = report_memory(args)
    else:
        results = report_speed(args)
    duration = time.perf_counter() - start

    if uses_cuda(args.device):
        device_name = torch.cuda.get_device_name()
    else:
        device_name = f"{platform.machine()} CPU"
    threads = torch.get_num_threads()
    print(f"\nThis took {duration:.0f} s on {device_name} with {threads} threads.")
    environment = {
        "device": device_name,
        "threads": threads,
        "date": str(datetime.date.today()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "lightly": lightly.__version__,
    }
    print(json.dumps(vars(args) | results | environment))


if __name__ == "__main__":
    main()
