"""Every claim of the paper, tried: train each row of the grid below and write down what comes out.

    python results/study.py                      # all of it, at laptop scale; goes on where it stopped
    python results/study.py --only C5            # the rows that one claim needs
    python results/study.py --tables             # no run: README.md's tables and figures from study.json
    python results/study.py --again same-2 0     # one run again: is it the same, bit for bit?

A row is flags of train.py, run once with each of its seeds as a person would type them. What a run
measured goes to study.json, a line a run, with the whole command; a run that is there is not done
again. verdicts.py makes tables, figures and verdicts of the lines.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
STUDY = os.path.join(HERE, "study.json")
CHECKPOINTS = os.path.join(HERE, "checkpoints")
sys.path[:0] = [HERE, ROOT]

import torch

import figures
import train
import verdicts
import vit
from verdicts import BATCHES, HEADS, RATES, SIZES, best_rates

# ----------------------------------------------------------------------------------- the grid
#
# "same-2": same views, two crops of a canvas. Where rows are to tell views and crops apart, the
# student sees the same number of crops in each, so that none learns from more. (On a laptop
# different views feed the crops of both canvases to both branches, twice as many as flagged.)
# Rows named …-images have seen as many canvases as each other instead, as the paper's have.

SAME, DIFFERENT = "--loss nce --views same", "--loss nce --views different"


def grid(preset):
    """The rows in the order in which they run: {name: {"flags", "seeds", "claims"}}."""
    table = {}

    def row(name, flags, images, seeds, claims):
        epochs, images = images if isinstance(images, tuple) else (10 if preset == "laptop" else 1, images)
        table[name] = {
            "flags": f"{flags} --epochs {epochs} --images-per-epoch {images}",
            "seeds": range(seeds if preset == "laptop" else 1),
            "claims": claims.split(),
        }

    def batches(images, base_lr):
        for batch in BATCHES:
            for rate in RATES:
                lr = rate * base_lr / 64 * min(batch, 256) * max(1, batch / 256) ** 0.5
                pieces = " --micro-batch 32" if preset == "paper" and batch > 32 else ""
                flags = f"{DIFFERENT} --crops 1 --batch-size {batch} --lr {lr:.6g}{pieces}"
                row(f"batch-{batch}-lr-{rate}", flags, images, 1, "Q1")  # and more seeds of the best rate

    if preset == "laptop":
        row("different-1", f"{DIFFERENT} --crops 1", 3200, 10, "C1 C2 C3 C5 C8 Q2")
        row("same-2", f"{SAME} --crops 2", 3200, 10, "C1 C2 C3 C4")
        row("same-1", f"{SAME} --crops 1", 6400, 10, "C3")
        row("different-2", f"{DIFFERENT} --crops 2", 1600, 10, "C3 C7")
        row("same-4", f"{SAME} --crops 4", 1600, 10, "C3 C7")
        row("texture", f"{SAME} --crops 2 --background texture", 3200, 5, "C4")
        row("texture-pool", f"{SAME} --crops 2 --background texture --texture-pool 10", 3200, 5, "C4")
        row("dino-same", "--loss dino --views same --crops 2", 3200, 5, "C1 C2")
        row("dino-different", "--loss dino --views different --crops 1", 3200, 5, "C1 C2")
        row("same-2-images", f"{SAME} --crops 2", 1600, 10, "C7")
        row("same-1-images", f"{SAME} --crops 1", 1600, 10, "C7")
        row("different-1-images", f"{DIFFERENT} --crops 1", 1600, 10, "C7")
        row("different-4-images", f"{DIFFERENT} --crops 4", 1600, 10, "C7")
        for heads in HEADS:
            if heads != 3:  # which different-1 has
                row(f"heads-{heads}", f"{DIFFERENT} --crops 1 --heads {heads}", 3200, 5, "Q2")
        for size in SIZES:
            if size != 56:
                row(f"size-{size}", f"{DIFFERENT} --crops 1 --image-size {size}", 3200, 5, "C8")
        row("different-long", f"{DIFFERENT} --crops 1", 12_800, 5, "C6")  # the preset's own length
        row("same-long", f"{SAME} --crops 2", 12_800, 5, "C6")
        batches(6144, 0.001)
    else:
        row("different-long", f"{DIFFERENT} --crops 1", (10, 50_000), 1, "C5 C6")
        row("different-1", f"{DIFFERENT} --crops 1", 50_000, 1, "C1 C2 C3 C8 Q2")
        row("same-2", f"{SAME} --crops 2", 25_000, 1, "C1 C2 C3 C4")
        row("same-1", f"{SAME} --crops 1", 50_000, 1, "C3")
        row("different-2", f"{DIFFERENT} --crops 2", 25_000, 1, "C3")
        row("same-4", f"{SAME} --crops 4", 12_500, 1, "C3 C7")
        row("same-2-images", f"{SAME} --crops 2", 12_500, 1, "C7")
        row("same-1-images", f"{SAME} --crops 1", 12_500, 1, "C7")
        row("different-1-images", f"{DIFFERENT} --crops 1", 12_500, 1, "C7")
        row("different-2-images", f"{DIFFERENT} --crops 2", 12_500, 1, "C7")
        row("different-4", f"{DIFFERENT} --crops 4", 12_500, 1, "C7")
        for size in (112, 448):
            pieces = " --micro-batch 8" if size == 448 else ""
            row(f"size-{size}", f"{DIFFERENT} --crops 1 --image-size {size}{pieces}", 50_000, 1, "C8")
        batches(49_152, 0.0005)
        row("texture", f"{SAME} --crops 2 --background texture", 25_000, 1, "C4")
        row("texture-pool", f"{SAME} --crops 2 --background texture --texture-pool 10", 25_000, 1, "C4")
        row("dino-same", "--loss dino --views same --crops 2", 25_000, 1, "C1 C2")
        row("dino-different", "--loss dino --views different --crops 1", 50_000, 1, "C1 C2")
        row("random-weights", f"{DIFFERENT} --crops 1 --weights none", 50_000, 1, "Q3")
        row("vit-small-16", f"{DIFFERENT} --crops 1 --weights dino_vits16", 50_000, 1, "Q3")
    return table


# ----------------------------------------------------------------------------------- the runs


def read_study():
    """The lines of study.json: {preset: {(row, seed): line}}."""
    runs = {"laptop": {}, "paper": {}}
    if os.path.exists(STUDY):
        with open(STUDY) as file:
            for line in json.load(file):
                runs[line["preset"]][line["row"], line["seed"]] = line
    return runs


def write_study(runs):
    lines = [json.dumps(line) for table in runs.values() for _, line in sorted(table.items())]
    with vit.whole(STUDY) as part, open(part, "w") as file:
        file.write("[\n" + ",\n".join(lines) + "\n]\n")


def command(args, row, seed):
    """What a person would type for this run, and the folder that it makes."""
    folder = f"{args.runs}/{args.preset}/{row}/seed-{seed}"
    where = "" if args.data_root == "data" else f" --data-root {shlex.quote(args.data_root)}"
    flags = grid(args.preset)[row]["flags"]
    line = f"python train.py --preset {args.preset} --digits mnist {flags} --seed {seed} --device {args.device}{where}"
    threads = "OMP_NUM_THREADS=1 " if args.device == "cpu" else ""  # sums depend on how many; and a run a core is faster
    return f"{threads}{line} --output {shlex.quote(folder)}", folder


def rounded(value):
    """Numbers to six digits: enough for any table, and to tell one run from another."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def measured(folder):
    """What study.json keeps of a finished run: its measures on test canvases, its curve, a digest of its weights."""
    with open(os.path.join(folder, "metrics.json")) as file:
        metrics = json.load(file)
    with open(os.path.join(folder, "log.jsonl")) as file:
        history = [json.loads(line) for line in file]
    checkpoint = vit.read_checkpoint(os.path.join(folder, "ckpt.pth"))

    def values(table):
        return {row: {metric: each["value"] for metric, each in cells.items()} for row, cells in table.items()}

    def curve(line):
        found, rows = line["validation"], {}
        for row in found:
            if row in ("mean", "brightness", "shuffled"):
                rows[row] = {name: found[row][name] for name in ("selectivity", "auroc", "pointing")}
            elif row.startswith("head_"):
                rows[row] = {"selectivity": found[row]["selectivity"]}
        rows["mean"]["diversity"] = found["mean"]["diversity"]
        train_loss = {"loss": line["loss"]} if "loss" in line else {}
        return {"step": line["step"], **train_loss, "validation_loss": found["loss"], "knn": found["knn"], **rows}

    return rounded({
        "matched": values({row: cells for row, cells in metrics["matched"].items() if row != "uniform"}),
        "interval": {  # over images, of the mean map
            name: [metrics["matched"]["mean"][name][end] for end in ("low", "high")] for name in ("selectivity", "auroc")
        },
        "best_head": metrics["best_head"],
        **{name: {key: each["value"] for key, each in metrics[name].items()} for name in ("features", "untrained_features")},
        "curve": [curve(line) for line in history],
        "weights": vit.digest(checkpoint["teacher"]),
    })


def device_name(device):
    """A person's name for what the numbers were computed on; their last bits depend on it."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    model = ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    return f"cpu, {model or platform.machine()}"


def run(args, row, seed):
    """Train and measure a row with a seed, going on with what was begun; returns its line, None if it failed."""
    text, folder = command(args, row, seed)
    started, path = time.time(), os.path.join(ROOT, folder)
    words = [word for word in shlex.split(text) if not word.startswith("OMP_")]
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if args.device == "cpu" else {})
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".txt", "a") as log:
        def call(*words):
            return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=log).returncode

        begun = os.path.exists(os.path.join(path, "ckpt.pth"))
        if not (begun and call("train.py", "--resume", folder) == 0):
            shutil.rmtree(path, ignore_errors=True)
            if call(*words[1:]) != 0:
                say(f"{row}, seed {seed}: failed; {folder}.txt says why")
                return None
    say(f"{row}, seed {seed}: {time.time() - started:.0f} s")
    return {
        "preset": args.preset, "row": row, "seed": seed, "command": text, "device": device_name(args.device),
        "date": datetime.date.today().isoformat(), "seconds": round(time.time() - started),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "torchvision", "numpy")},
        **measured(path),
    }


def todo(args, runs):
    """The runs that are wanted and not there, the most telling first: [(row, seed)]."""
    jobs = []
    for name, row in grid(args.preset).items():
        if not args.only or set(args.only) & set(row["claims"]):
            jobs += [(name, seed) for seed in row["seeds"]]
    if args.preset == "laptop" and (not args.only or "Q1" in args.only):
        jobs += [(name, seed) for name in best_rates(runs).values() for seed in range(1, 5)]
    return [job for job in jobs if runs.get(job, {}).get("command") != command(args, *job)[0]]


def run_all(args):
    """Everything that is still to do, some runs at a time; True if none failed."""
    runs, lock, failed = read_study(), threading.Lock(), set()

    def one(job):
        line = run(args, *job)
        with lock:
            if line is None:
                failed.add(job)
                return
            runs[args.preset][job] = line
            write_study(runs)

    while jobs := [job for job in todo(args, runs[args.preset]) if job not in failed]:  # the best rates are known later
        say(f"{len(jobs)} runs to do, {args.jobs} at a time")
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(one, jobs))
    return not failed


def again(args, row, seed):
    """Run a line of study.json once more, elsewhere, and compare; True if nothing is different."""
    old = read_study()[args.preset].get((row, seed))
    if old is None:
        raise ValueError(f"--again {row} {seed}: study.json has no such run of the preset {args.preset}")
    args.runs = "runs/study-again"
    shutil.rmtree(os.path.join(ROOT, command(args, row, seed)[1]), ignore_errors=True)
    new = run(args, row, seed)
    if new is None:
        return False
    changing = ("command", "date", "seconds")
    different = [name for name in new if name not in changing and new[name] != old[name]]
    say(f"{row}, seed {seed}, run again: " + (f"other {', '.join(different)}" if different else "the same, bit for bit"))
    return not different


def small_checkpoints(args):
    """A float16 teacher of each of the long runs of seed 0, for a reader to look at with visualize.py."""
    os.makedirs(CHECKPOINTS, exist_ok=True)
    for name in ("same", "different"):
        path = os.path.join(ROOT, args.runs, "laptop", f"{name}-long", "seed-0", "ckpt.pth")
        if args.preset == "laptop" and os.path.exists(path):
            whole = vit.read_checkpoint(path)
            train.save_checkpoint(os.path.join(CHECKPOINTS, f"{name}.pth"), {
                "config": whole["config"] | {"digits": "auto", "data_root": "data"},
                "epoch": whole["epoch"],
                "teacher": {key: value.half() for key, value in whole["teacher"].items()},
                "metrics": whole["metrics"],
            })


def write_pages():
    """The computed blocks of both README files, and all figures, anew from study.json."""
    study = read_study()
    for path, folder in ((os.path.join(HERE, "README.md"), "figures/"), (os.path.join(ROOT, "README.md"), "results/figures/")):
        with open(path) as file:
            text = file.read()
        with open(path, "w") as file:
            file.write(verdicts.fill(text, verdicts.blocks(study, folder)))
    figures.draw(study["laptop"], os.path.join(HERE, "figures"))


def say(line):
    print(line, flush=True)


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="results/study.py", description="Try every claim of the paper.")
    add = parser.add_argument
    add("--preset", choices=["laptop", "paper"], default="laptop", help="of train.py; paper wants a GPU [laptop]")
    add("--only", nargs="+", metavar="CLAIM", choices=list(verdicts.CLAIMS), help="C1 to C8, Q1 to Q3 [all]")
    add("--tables", action="store_true", help="run nothing: write tables and figures from study.json")
    add("--again", nargs=2, metavar=("ROW", "SEED"), help="run a line of study.json again and compare")
    add("--jobs", type=int, help="runs at a time [cpu: one a core, of one thread; else 1]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train [cuda if there, else cpu]")
    add("--data-root", default="data", help="folder that holds, or will hold, MNIST/raw/ [data]")
    add("--runs", default="runs/study", help="folder of the runs [runs/study]")
    args = parser.parse_args(argv)
    args.jobs = args.jobs or (os.cpu_count() if args.device == "cpu" else 1)
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.again:
        return 0 if again(args, args.again[0], int(args.again[1])) else 1
    whole = args.tables or run_all(args)
    small_checkpoints(args)
    write_pages()
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
