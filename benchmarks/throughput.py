"""How fast a training step is, and what memory it takes, against timm and lightly.

    pip install -r benchmarks/requirements.txt
    python benchmarks/throughput.py                                  # on a CPU within three minutes
    python benchmarks/throughput.py --image-size 224 --batch-size 2
    python benchmarks/throughput.py --memory --large-batch 1024      # also 1024 by pieces of 16
    python benchmarks/throughput.py --preset laptop --loss nce --steps 30   # the laptop's network

Both sides train the same network on the same shapes: ViT-S/8, two crops of each image that student
and teacher both see, DINO's head with K = 65,536 (or with --loss nce its bottleneck alone). The
peer is put together as lightly's own example does it: its projection head, loss and momentum
update, one forward a view, AdamW as it comes; the backbone is timm's `VisionTransformer`.

First both are fed crops from memory, taking turns step by step. Then each makes its own input,
taking turns in blocks of steps: ours renders canvases on the device, the peer crops and blurs
ready-made PIL canvases by torchvision's transforms in a DataLoader. A step's model FLOPs, (3 ×
student + teacher) forward, are set against a square matrix product of the same run. Medians are
printed, then a line of JSON.
"""

import argparse
import copy
import datetime
import functools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train
import vit

warnings.filterwarnings("ignore", message=".*weight_norm.*")


# ----------------------------------------------------------------------------------- the sides


def digits(least=0):
    """scikit-learn's training digits, again and again if there are not as many as that."""
    split = data.load_digits("sklearn")[0]["train"]
    times = 1 + least // len(split)
    return data.Split(split.images.repeat(times, 1, 1), split.labels.repeat(times))


def our_config(args, *flags):
    given = f"--preset {args.preset} --weights none --digits sklearn --views same --crops 2"
    given += f" --loss {args.loss} --device {args.device} --image-size {args.image_size}"
    given = [*given.split(), "--batch-size", str(args.batch_size), *flags]
    return train.make_config(train.parse_args(given))


def ours(config, crops=None):
    """A function that takes our training step, fed from `crops` or rendering its own input."""
    device = torch.device(config["device"])
    student = vit.build_network(config).to(device)
    student.backbone.checkpoint_blocks = config["checkpoint_blocks"]
    parts = train.make_parts(config, student)
    if config["compile"]:
        train.compile_blocks(student, parts["teacher"])
    views = data.TrainingViews(config, digits(config["batch_size"]).to(device), device=device)
    steps = 1_000_000
    ahead = train.prefetch(views, range(steps // 2, steps))
    params = next(ahead)
    if crops is not None:
        views.render = lambda params: crops[:, : len(params["centre"])]

    def step():
        drawn = params if crops is not None else next(ahead)
        train.training_step(config, parts, student, views, drawn, steps // 2, steps)

    step.views = views
    return step


def peer(args, precision, crops=None, compiled=False):
    """The same for the peer. `precision` is of its autocast, float32 for none."""
    c = our_config(args)
    sizes = {"img_size": c["image_size"], "patch_size": c["patch_size"], "embed_dim": c["dim"]}
    sizes |= {"depth": c["depth"], "num_heads": c["heads"], "mlp_ratio": c["mlp_ratio"]}
    student = timm.models.VisionTransformer(**sizes, num_classes=0).to(args.device)
    sizes = c["head_hidden_dim"], c["bottleneck_dim"]
    heads = [DINOProjectionHead(c["dim"], *sizes, c["out_dim"]) for _ in range(2)]
    if args.loss == "nce":
        (hidden, bottleneck), heads = sizes, []
        for _ in range(2):
            widths, layers = [c["dim"], *[hidden] * (c["head_layers"] - 1)], []
            for width in widths[:-1]:
                norm = torch.nn.LayerNorm(hidden) if c["head_norm"] else None
                layers.append((width, hidden, norm, torch.nn.GELU()))
            heads.append(ProjectionHead([*layers, (widths[-1], bottleneck, None, None)]))
    student_head, teacher_head = (head.to(args.device) for head in heads)
    teacher = copy.deepcopy(student)
    deactivate_requires_grad(teacher)
    deactivate_requires_grad(teacher_head)
    optimizer = torch.optim.AdamW([*student.parameters(), *student_head.parameters()], lr=1e-4)
    criterion = (
        DINOLoss(c["out_dim"]) if args.loss == "dino" else NTXentLoss(c["temperature"])
    ).to(args.device)
    look, teach = (
        torch.compile(network) if compiled else network for network in (student, teacher)
    )
    loader = None if crops is not None else iter(peer_loader(args))
    waited = []

    def step():
        started = time.perf_counter()
        views = [
            view.to(args.device, non_blocking=True) for view in (next(loader) if loader else crops)
        ]
        waited.append(time.perf_counter() - started)
        update_momentum(student, teacher, 0.996)
        update_momentum(student_head, teacher_head, 0.996)
        with torch.autocast(
            torch.device(args.device).type,
            getattr(torch, precision),
            enabled=precision != "float32",
        ):
            teacher_out = [teacher_head(teach(view)) for view in views]
            student_out = [student_head(look(view)) for view in views]
            if args.loss == "dino":
                loss = criterion(teacher_out, student_out)
            else:
                loss = (
                    criterion(student_out[0], teacher_out[1])
                    + criterion(student_out[1], teacher_out[0])
                ) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step.waited = waited
    return step


class Canvases(torch.utils.data.Dataset):
    """Cluttered digits as PIL images, ready-made, and two views of each by torchvision."""

    def __init__(self, args):
        split = digits()
        config = our_config(args)
        sampler, rng = data.CanvasSampler(config, split), data.generator(0, "benchmark")
        params = sampler.sample(rng, torch.arange(len(split)))
        canvases = data.render_canvases(params, config, split.images)[0]
        self.pictures = [
            Image.fromarray((canvas[0].numpy() * 255).astype(np.uint8)) for canvas in canvases
        ]
        self.transform = T.Compose(
            [
                T.RandomResizedCrop(args.image_size, scale=(0.5, 1.0), ratio=(1.0, 1.0)),
                T.RandomRotation(15, interpolation=T.InterpolationMode.BILINEAR),
                T.RandomApply(
                    [T.GaussianBlur(1 + 2 * max(1, args.image_size // 20), sigma=(0.1, 2.0))], p=0.5
                ),
                T.Grayscale(3),
                T.ToTensor(),
                T.Normalize(data.MEAN.flatten(), data.STD.flatten()),
            ]
        )

    def __len__(self):
        return 1_000_000

    def __getitem__(self, index):
        picture = self.pictures[index % len(self.pictures)]
        return self.transform(picture), self.transform(picture)


def peer_loader(args):
    pin = torch.device(args.device).type == "cuda"
    return torch.utils.data.DataLoader(
        Canvases(args),
        args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        pin_memory=pin,
    )


# -------------------------------------------------------------------------------- measurements


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds(function, device):
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def take_turns(sides, steps, device):
    """Median seconds of a step of each side; one step each in turn, the first one not counted."""
    times = {name: [] for name in sides}
    for turn in range(-1, steps):
        for name, step in sides.items():
            took = seconds(step, device)
            times[name] += [took] if turn >= 0 else []
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(make, device):
    """Most memory in tensors while `make()` is built and its step is taken twice."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step = make()
        step()
        step()
        return torch.cuda.max_memory_allocated() - before
    with tempfile.TemporaryDirectory() as folder:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            step = make()
            step()
            step()
        profile.export_chrome_trace(os.path.join(folder, "trace.json"))
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return int(np.cumsum([change for _, change in changes]).max())


def forward_flops(config):
    """FLOPs of backbone and head for one crop; of the last block only what [CLS] needs."""
    d, n = config["dim"], 1 + (config["image_size"] // config["patch_size"]) ** 2
    mlp = 4 * config["mlp_ratio"] * d * d
    block = n * (8 * d * d + mlp) + 4 * n * n * d  # qkv 6, proj 2; q kᵀ and the weighted v
    last = 4 * n * d * d + 4 * d * d + mlp + 4 * n * d  # k, v of all tokens, the rest of [CLS]
    patches = 2 * (n - 1) * 3 * config["patch_size"] ** 2 * d
    h, b, hidden = config["head_hidden_dim"], config["bottleneck_dim"], config["head_layers"] - 2
    head = 2 * (d * h + hidden * h * h + h * b)
    head += 2 * b * config["out_dim"] if config["loss"] == "dino" else 0
    return patches + (config["depth"] - 1) * block + last + head


def matmul_rate(m, k, n, dtype, device):
    """FLOP/s of a product of matrices, the best of some."""
    a, b = (
        torch.randn(m, k, device=device, dtype=dtype),
        torch.randn(k, n, device=device, dtype=dtype),
    )
    return 2 * m * k * n / min(seconds(lambda: a @ b, device) for _ in range(6))


def input_share(step, steps, device):
    """Share of our step that makes its input; a GPU's parameters are sampled ahead."""
    views, on_gpu, parts = step.views, torch.device(device).type == "cuda", []
    for number in range(steps + 1):
        params = views.sample(number)
        make = (
            functools.partial(views.render, params)
            if on_gpu
            else functools.partial(sample_and_render, views, number)
        )
        parts.append(seconds(make, device) / seconds(step, device))
    return statistics.median(parts[1:])


def sample_and_render(views, number):
    return views.render(views.sample(number))


# ----------------------------------------------------------------------------------- the report


def fed_from_memory(args):
    """Steps of both sides in both precisions, in turn: seconds by name."""
    config = our_config(args)
    views = data.TrainingViews(config, digits().to(args.device), device=torch.device(args.device))
    crops = views.render(views.sample(0))
    fast = str(train.autocast_dtype("auto", torch.device(args.device))).removeprefix("torch.")
    sides = {}
    for precision in dict.fromkeys((fast, "float32")):
        sides[f"ours {precision}"] = ours(our_config(args, "--precision", precision), crops)
        sides[f"peer {precision}"] = peer(args, precision, crops)
    if torch.device(args.device).type == "cuda":
        sides[f"ours compiled {fast}"] = ours(
            our_config(args, "--precision", fast, "--compile"), crops
        )
        sides[f"peer compiled {fast}"] = peer(args, fast, crops, compiled=True)
    return take_turns(sides, args.steps, args.device), config, fast


def end_to_end(args, fast):
    """Seconds a step when each side makes its own input; the share that the peer waits for it."""
    theirs = (
        fast if torch.device(args.device).type == "cuda" else "float32"
    )  # on a CPU as its example is
    mine, times, waits = ours(our_config(args, "--precision", fast)), {"ours": [], "peer": []}, []

    def block(step):
        step()
        return seconds(lambda: [step() for _ in range(args.steps)], args.device) / args.steps

    for _ in range(2):
        times["ours"].append(block(mine))
        step = peer(
            args, theirs
        )  # the workers of its loader begin and end with it, so that ours are not disturbed
        times["peer"].append(block(step))
        waits.append(sum(step.waited[1:]) / args.steps / times["peer"][-1])
        del step
    share = input_share(mine, args.steps, args.device)
    whole = {
        f"ours {fast}": statistics.mean(times["ours"]),
        f"peer {theirs}": statistics.mean(times["peer"]),
    }
    return whole, share, statistics.mean(waits)


def laptop_input_share(args):
    shares = {}
    for views in ("different", "same"):
        flags = [
            "--preset",
            "laptop",
            "--digits",
            "sklearn",
            "--views",
            views,
            "--device",
            args.device,
        ]
        shares[views] = input_share(
            ours(train.make_config(train.parse_args(flags))), 30, args.device
        )
    return shares


def report_memory(args):
    fast = str(train.autocast_dtype("auto", torch.device(args.device))).removeprefix("torch.")
    crops = torch.randn(2, args.batch_size, 3, args.image_size, args.image_size, device=args.device)
    makers = {
        "ours": lambda: ours(our_config(args)),
        "ours, --checkpoint-blocks": lambda: ours(our_config(args, "--checkpoint-blocks")),
        f"peer {fast}": lambda: peer(args, fast, crops),  # its own input is made by other processes
        "peer float32": lambda: peer(args, "float32", crops),
    }
    if args.large_batch:
        large = argparse.Namespace(**vars(args) | {"batch_size": args.large_batch})
        config = our_config(large, "--micro-batch", str(args.batch_size))
        makers[f"ours, {args.large_batch} by {args.batch_size}"] = lambda: ours(config)
    peaks = {name: peak_bytes(make, args.device) for name, make in makers.items()}
    print(
        f"most memory in two steps, with weights and optimizer; preset {args.preset}, "
        f"{args.image_size} px, batch {args.batch_size}, "
        f"loss {args.loss}"
    )
    for name, peak in peaks.items():
        print(f"{name:28}{peak / 2**20:10.0f} MiB{peak / peaks['ours']:8.2f} of ours")
    return {"peak_bytes": peaks}


def report_speed(args):
    times, config, fast = fed_from_memory(args)
    tokens, d = (
        2 * args.batch_size * (1 + (args.image_size // config["patch_size"]) ** 2),
        config["dim"],
    )
    side = 8192 if torch.device(args.device).type == "cuda" else 2048
    # a backward pass is two forward passes; the teacher's one; two crops
    flops = 4 * 2 * args.batch_size * forward_flops(config)
    rates = {
        p: matmul_rate(side, side, side, getattr(torch, p), args.device)
        for p in dict.fromkeys((fast, "float32"))
    }
    own = {
        p: matmul_rate(tokens, d, config["mlp_ratio"] * d, getattr(torch, p), args.device)
        for p in rates
    }
    print(
        f"a step fed from memory, preset {args.preset}, {args.image_size} px, "
        f"batch {args.batch_size} × 2 crops, loss {args.loss}\n"
    )
    print(
        f"{'':24}{'images/s':>10}{'ms a step':>11}"
        f"{'of a ' + str(side) + '³ product':>19}{'of the MLP’s product':>22}"
    )
    utilisation = {}
    for name, took in times.items():
        p = name.split()[-1]
        utilisation[name] = flops / took / rates[p]
        print(
            f"{name:24}{args.batch_size / took:10.2f}{1000 * took:11.0f}"
            f"{utilisation[name]:19.0%}{flops / took / own[p]:22.0%}"
        )
    example = "peer float32" if torch.device(args.device).type == "cpu" else f"peer {fast}"
    pairs = [(f"ours {fast}", example)] + [(f"ours {p}", f"peer {p}") for p in rates]
    if f"peer compiled {fast}" in times:
        pairs += [
            (f"ours {fast}", f"peer compiled {fast}"),
            (f"ours compiled {fast}", f"peer compiled {fast}"),
        ]
    ratios = {f"{a} over {b}": times[b] / times[a] for a, b in dict.fromkeys(pairs)}
    result = report_end_to_end(args, fast, ratios)
    for name, ratio in ratios.items():
        print(f"{ratio:6.2f} × {name}")
    return result | {
        "ms_a_step": {name: round(1000 * took, 1) for name, took in times.items()},
        "ratio": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "model_flops_a_step": flops,
        "flop_utilisation": utilisation,
        "matmul_flops_per_s": rates,
        "own_shape_flops_per_s": own,
    }


def report_end_to_end(args, fast, ratios):
    """Each side with its own input; adds to the ratios."""
    whole, share, waited = end_to_end(args, fast)
    mine, theirs = whole
    name = f"end to end: {mine} over {theirs}, {args.workers} workers"
    ratios[name] = whole[theirs] / whole[mine]
    shares = laptop_input_share(args)
    print("\neach with its own input")
    notes = {mine: f"input {share:.1%} of it", theirs: f"waiting for its loader {waited:.1%}"}
    for name, note in notes.items():
        print(f"{name:24}{args.batch_size / whole[name]:10.2f}{1000 * whole[name]:11.0f}    {note}")
    different, same = shares["different"], shares["same"]
    print(f"input of the laptop preset: {different:.1%} (different views), {same:.1%} (same)\n")
    return {
        "end_to_end_ms_a_step": {name: round(1000 * took, 1) for name, took in whole.items()},
        "input_share": {"ours": share, "laptop different": different, "laptop same": same},
        "peer_waits_for_input": waited,
    }


def main():
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--preset", choices=["paper", "laptop"], default="paper")
    parser.add_argument(
        "--image-size", type=int, help="[paper: 224 with CUDA, else 96; laptop: 56]"
    )
    parser.add_argument("--batch-size", type=int, help="[paper: 32 with CUDA, else 16; laptop: 64]")
    parser.add_argument("--loss", choices=["dino", "nce"], default="dino")
    parser.add_argument(
        "--steps", type=int, default=30 if cuda else 4, help="that count, after one that does not"
    )
    parser.add_argument("--workers", type=int, default=2, help="of the peer's DataLoader")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of speed")
    parser.add_argument(
        "--large-batch",
        type=int,
        default=0,
        metavar="N",
        help="with --memory: N by pieces of --batch-size",
    )
    args = parser.parse_args()
    size, batch = (56, 64) if args.preset == "laptop" else (224, 32) if cuda else (96, 16)
    args.image_size, args.batch_size = args.image_size or size, args.batch_size or batch
    started = time.perf_counter()
    result = report_memory(args) if args.memory else report_speed(args)
    name = (
        torch.cuda.get_device_name()
        if torch.device(args.device).type == "cuda"
        else f"{platform.machine()} CPU"
    )
    print(f"\n{name}, {torch.get_num_threads()} threads, in {time.perf_counter() - started:.0f} s")
    print(
        json.dumps(
            vars(args)
            | result
            | {
                "device": name,
                "threads": torch.get_num_threads(),
                "date": str(datetime.date.today()),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "timm": timm.__version__,
                "lightly": lightly.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
