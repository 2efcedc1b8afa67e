"""Measure on a GPU what cannot be measured without one, in one run of at most nine minutes.

    sh benchmarks/gpu.sh                    # all parts, into runs/gpu
    python benchmarks/gpu.py step FOLDER    # one part: tests, step, large or depth

Each part writes FOLDER/<part>.json anew after each result, so that a part that is ended early leaves
what it had. `--tiny` tries the program itself: sizes that any CPU can compute.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import evaluate
import observe
import settings
import train
import views
import vit
import weights

STARTED = time.monotonic()  # as early as this program can tell
ATTENTION_KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
# Bytes for tensors on a card of 16 GB: CUDA itself takes about half a gigabyte.
SMALLER_CARD = 15.3e9
STEPS_OF_EPOCH = 200  # of the network that is looked at in depth


class Report:
    """The JSON file of a part, written anew whenever something is added."""

    def __init__(self, args: argparse.Namespace):
        self.path = Path(args.folder, f"{args.part}.json")
        self.path.unlink(missing_ok=True)
        self.content = {"part": args.part, "tiny": args.tiny, "torch": torch.__version__}
        if torch.cuda.is_available():
            self.content["device"] = torch.cuda.get_device_name()
        self.add("date", str(datetime.datetime.now()))

    def add(self, name: str, value):
        self.content[name] = value
        self.path.write_text(json.dumps(self.content, indent=1))
        print(f"{name}: {value}", flush=True)


# ------------------------------------------------------------------------------------ (a) the tests


def tests(args: argparse.Namespace, report: Report):
    """The tests of the marker `cuda`, which compare the GPU with the CPU."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-n", "4", "-q", "tests/test_cuda.py"]
    with open(report.path.with_suffix(".log"), "w+") as log:
        # in a group of its own, so that its workers can be ended with it
        tests = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = tests.wait(args.seconds - (time.monotonic() - STARTED))
        except subprocess.TimeoutExpired:
            status = "timed out"
            os.killpg(tests.pid, signal.SIGKILL)
            tests.wait()
        log.seek(0)
        output = log.read()
    report.add("status", status)
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)", output)
    report.add("counts", {kind: int(number) for number, kind in counts})
    report.add("failures", re.findall(r"^(?:FAILED|ERROR) (.*)", output, re.MULTILINE))
    report.add("end of the output", output[-500:])


# --------------------------------------------------------------------------------------- (b) a step


def step(args: argparse.Namespace, report: Report):
    """A training step of ViT-S/8 beside the peer's, as it comes and compiled."""
    import throughput  # needs timm and lightly

    if args.tiny:
        sizes = ["--image-size", "56", "--batch-size", "2"]
    else:
        sizes = ["--image-size", "224", "--batch-size", "32"]
    bench = throughput.parse_args(["--device", str(args.device), *sizes])
    bench.steps = 2 if args.tiny else 12
    device = bench.device
    config = throughput.comparison_config(bench)
    precision = throughput.auto_precision(device)
    report.add("flops of a step", throughput.step_flops(config))
    side = 1024 if args.tiny else 8192
    best_product = throughput.matmul_flops_per_second((side, side, side), precision, device)
    report.add("best product, FLOP/s", best_product)
    generator = torch.Generator().manual_seed(0)
    crops = torch.randn(
        (2, bench.batch_size, 3, bench.image_size, bench.image_size), generator=generator
    ).to(device)

    def share(seconds: float) -> dict:
        utilisation = throughput.step_flops(config) / seconds / best_product
        return {"ms": round(1000 * seconds, 2), "of best product": round(utilisation, 3)}

    # as they come, in turn
    ours = throughput.OurTrainer(throughput.comparison_config(bench, precision=precision), crops)
    peer = throughput.PeerTrainer(bench, precision, crops)
    medians = throughput.median_step_seconds({"ours": ours, "peer": peer}, bench.steps, device)
    report.add("as it comes", {name: share(seconds) for name, seconds in medians.items()})
    report.add("peer ÷ ours, as they come", round(medians["peer"] / medians["ours"], 3))

    # the kernel of attention
    if throughput.uses_cuda(device):
        for name, backend in ATTENTION_KERNELS.items():
            try:
                with sdpa_kernel(backend):
                    medians = throughput.median_step_seconds({name: ours}, bench.steps, device)
                report.add(f"attention by {name}", share(medians[name]))
            except RuntimeError as error:  # it does not take every shape
                report.add(f"attention by {name}", weights.one_line(error)[:300])

    # input, with views of its own
    rendering = throughput.OurTrainer(throughput.comparison_config(bench, precision=precision))
    input_share = throughput.input_share(rendering, bench.steps, device)
    report.add("share of input, paper", round(input_share, 4))
    laptop_share = throughput.laptop_input_share("different", device)
    report.add("share of input, laptop", round(laptop_share, 4))
    del rendering

    # memory
    if throughput.uses_cuda(device):
        for name, make in throughput.memory_trainers(bench).items():
            report.add(f"MiB, {name}", round(throughput.peak_bytes(make, device) / 2**20))

    # compiled: how long until the first step, and the steps that follow
    trainers = {}
    for name in ("ours", "peer"):
        start = time.monotonic()
        if name == "ours":
            compiled_config = throughput.comparison_config(bench, precision=precision, compile=True)
            trainers[name] = throughput.OurTrainer(compiled_config, crops)
        else:
            trainers[name] = throughput.PeerTrainer(bench, precision, crops, compiled=True)
        trainers[name].step()
        throughput.synchronize(device)
        report.add(f"start compiled, s, {name}", round(time.monotonic() - start, 1))
    block = trainers["ours"].state.student.backbone.blocks[0]
    report.add("ours is compiled", block._compiled_call_impl is not None)
    medians = throughput.median_step_seconds(trainers, bench.steps, device)
    report.add("compiled", {name: share(seconds) for name, seconds in medians.items()})
    report.add("peer ÷ ours, both compiled", round(medians["peer"] / medians["ours"], 3))


# ---------------------------------------------------------------------------------- (c) large images


def large(args: argparse.Namespace, report: Report):
    """Different views at 448 px and batch 32, in the memory of a smaller card."""
    if args.device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, SMALLER_CARD / total))
        report.add("allowed, GB", SMALLER_CARD / 1e9)
    size = "56" if args.tiny else "448"
    batch_size = "4" if args.tiny else "32"
    flags = "--preset paper --weights none --digits sklearn --loss nce --views different --crops 1 "
    flags += f"--image-size {size} --batch-size {batch_size} --checkpoint-blocks "
    flags += f"--device {args.device}"
    parsed = settings.parse_args(flags.split())
    config = settings.make_config(parsed.flags, parsed.preset)
    splits, config = data.load_dataset(config, args.device)
    state = train.make_state(config, vit.build_network(config).to(args.device))
    training_views = views.TrainingViews(config, splits["train"], device=args.device)
    seconds = []
    try:
        for number in range(2 if args.tiny else 6):
            params = training_views.sample(number)
            start = time.monotonic()
            loss, _ = train.training_step(config, state, training_views, params, 500 + number, 1000)
            report.add("loss", loss.item())  # waits for the GPU
            seconds.append(time.monotonic() - start)
    except RuntimeError as error:  # out of memory
        report.add("error", weights.one_line(error)[:300])
    else:
        report.add("ms a step", round(1000 * sorted(seconds)[len(seconds) // 2], 1))
    if args.device.type == "cuda":
        report.add("peak, GB", round(torch.cuda.max_memory_reserved() / 1e9, 2))


# ------------------------------------------------------------------------- (d) one network, in depth


def depth(args: argparse.Namespace, report: Report):
    """A ViT-S/8 from random weights, and what its maps show after several epochs.

    It trains for as many epochs as there is time for; the last third is for the maps. Descriptive:
    one network.
    """
    run_folder = Path(args.folder, "depth-run")
    shutil.rmtree(run_folder, ignore_errors=True)
    if args.tiny:
        flags = "--preset laptop --digits sklearn --loss nce --views different --image-size 28 "
        flags += f"--batch-size 8 --images-per-epoch 32 --depth 3 --device {args.device} "
    else:
        flags = "--preset paper --weights none --loss nce --views different --image-size 112 "
        flags += f"--precision bfloat16 --data-root {args.data_root} --device {args.device} "
        flags += f"--batch-size 64 --images-per-epoch {64 * STEPS_OF_EPOCH} "

    # A trial epoch tells how many epochs fit.
    trial_log = train_without_report([*flags.split(), "--epochs", "1"], run_folder / "trial")
    epoch_seconds = trial_log[1]["seconds"] + 5  # for its validation
    report.add("seconds of an epoch", round(epoch_seconds, 1))
    seconds_left = args.seconds - (time.monotonic() - STARTED)
    epochs = max(2, min(40, int(0.65 * seconds_left / epoch_seconds)))
    if args.tiny:
        epochs = 2
    report.add("epochs", epochs)

    kept = sorted({1, max(1, epochs // 4), max(1, epochs // 2), epochs})
    keep = ",".join(map(str, kept))
    command = [*flags.split(), "--epochs", str(epochs), "--keep-epochs", keep]
    log = train_without_report(command, run_folder / "run")
    report.add("k-NN after each epoch", [line["validation"].get("knn") for line in log])
    report.add("seconds until the end of training", round(time.monotonic() - STARTED, 1))

    # the last epoch first, since time may be up
    for epoch in reversed(kept):
        path = run_folder / "run" / f"epoch-{epoch}.pth"
        if path.exists():
            report.add(f"epoch {epoch}", describe_maps(path, args))


def train_without_report(flags: list[str], folder: Path) -> list[dict]:
    """Train as train.py does, but do not measure at the end; returns the lines of the log."""
    args = settings.parse_args([*flags, "--output", str(folder)])
    with train.FolderLock() as lock:
        run = train.prepare_ranks(args, lock)
        return train.train(run, train.make_state(run.config, run.student))


def describe_maps(path: Path, args: argparse.Namespace) -> dict:
    """Equal ink and patch faithfulness of each map, and the direct share at each block."""
    loaded = weights.load_backbone(str(path))
    config = settings.config_from_checkpoint(loaded.content["config"])
    splits, config = data.load_dataset(config, args.device)
    backbone = loaded.backbone.to(args.device).eval()
    count = 20 if args.tiny else 60
    batches = list(views.left_out_batches(config, splits["test"], count))
    effects = observe.observe_effects(backbone, batches, evaluate.CANVAS_MAPS, count)
    observation = observe.observe(
        {"trained": backbone}, views.evaluation_batches(config, splits["test"], count)
    )
    table = evaluate.measure_attention(observation, effects)
    result = {"digits": config.digits}
    result["direct share"] = [cell["value"] for cell in evaluate.direct_share(effects)]
    names = ("selectivity", "equal_ink", "patch_faithfulness", "object_faithfulness")
    for row, cells in table.items():
        result[row] = {name: cells[name] for name in names if name in cells}
    return result


# ------------------------------------------------------------------------------------- command line

PARTS = {"tests": tests, "step": step, "large": large, "depth": depth}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("folder")
    parser.add_argument(
        "--seconds", type=float, default=120, help="What tests and depth may take. [120]"
    )
    parser.add_argument("--data-root", default="data", help="The folder of MNIST/raw. [data]")
    parser.add_argument("--tiny", action="store_true", help="Try this program on a CPU.")
    args = parser.parse_args()
    args.device = torch.device("cpu" if args.tiny else "cuda")
    os.makedirs(args.folder, exist_ok=True)
    PARTS[args.part](args, Report(args))


if __name__ == "__main__":
    main()
