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
DIGITS = "mnist"
sys.path[:0] = [HERE, ROOT]

import torch

import data
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
        row("same-long", f"{SAME} --crops 2", 12_800, 1, "")  # for the small checkpoint
        batches(6144, 0.001)
        # What does not hold as it is: would it with another learning rate, temperature or length?
        texture, dino = f"{SAME} --crops 2 --background texture", "--loss dino --views same --crops 2"
        row("look-texture-lr", f"{texture} --lr 0.003", 3200, 1, "C4")
        row("look-texture-temperature", f"{texture} --temperature 0.1", 3200, 1, "C4")
        row("look-texture-long", texture, 12_800, 1, "C4")
        row("look-texture-crops", f"{SAME} --crops 4 --background texture", 1600, 1, "C4")  # as in the paper
        row("look-dino-lr", f"{dino} --lr 0.003", 3200, 1, "C1 C2")
        row("look-dino-long", dino, 12_800, 1, "C1 C2")
        row("look-size-84-long", f"{DIFFERENT} --crops 1 --image-size 84", 6400, 1, "C8")
        row("look-different-lr", f"{DIFFERENT} --crops 1 --lr 0.003", 3200, 1, "C5")
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
        row("stl10-nce", "--dataset stl10 --loss nce", (10, 100_000), 1, "C1 C2")
        row("stl10-dino", "--dataset stl10 --loss dino", (10, 100_000), 1, "C1 C2")
        row("random-weights", f"{DIFFERENT} --crops 1 --weights none", 50_000, 1, "Q3")
        row("vit-small-16", f"{DIFFERENT} --crops 1 --weights dino_vits16", 50_000, 1, "Q3")
    return table


ABOUT_HEADS = {"selectivity", "auroc", "digit_density", "clutter_density", "digit_share", "clutter_share", "background_share"}
ABOUT_REFERENCES = {"selectivity", "auroc", "pointing", "jaccard60", "digit_density"}
PICTURES = {  # drawn by visualize.py: name → rows
    "attention-views": ("same-long", "different-long"),
    "attention-texture": ("texture",),
    "attention-size": ("size-28", "different-1", "size-84"),
}

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


def flags_of(args, row, seed):
    """The part of a run's command that says what is trained; where it ran may be another place."""
    flags = grid(args.preset)[row]["flags"]
    weights = f" --weights {shlex.quote(args.weights)}" if args.weights and "--weights" not in flags else ""
    return f"{flags}{weights} --seed {seed} --device"


def command(args, row, seed):
    """What a person would type for this run, and the folder that it makes."""
    folder = f"{args.runs}/{args.preset}/{row}/seed-{seed}"
    flags = flags_of(args, row, seed)
    digits = "" if "stl10" in flags else f" --digits {DIGITS}"
    where = "" if args.data_root == "data" else f" --data-root {shlex.quote(args.data_root)}"
    threads = "OMP_NUM_THREADS=1 " if args.device == "cpu" else ""  # sums depend on how many; and a run a core is faster
    line = f"{threads}python train.py --preset {args.preset}{digits} {flags} {args.device}{where}"
    return f"{line} --output {shlex.quote(folder)}", folder


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

    def values(row, cells):
        kept = set(cells) if row == "mean" else ABOUT_HEADS if row.startswith("head_") else ABOUT_REFERENCES
        return {metric: each["value"] for metric, each in cells.items() if metric in kept}

    def curve(line):
        found, rows = line["validation"], {}
        for row in found:
            kept = ("selectivity", "auroc", "pointing", "diversity") if row in ("mean", "brightness", "shuffled") else ("selectivity",)
            if row in ("mean", "brightness", "shuffled") or row.startswith("head_"):
                rows[row] = {name: found[row][name] for name in kept if name in found[row]}
        train_loss = {"loss": line["loss"]} if "loss" in line else {}
        return {"step": line["step"], **train_loss, "validation_loss": found["loss"], "knn": found["knn"], **rows}

    attention = metrics.get("matched") or {"mean": {}}  # photographs have no masks: nothing to measure by
    return rounded({
        "matched": {row: values(row, cells) for row, cells in attention.items() if row != "uniform"},
        "interval": {name: [cell["low"], cell["high"]] for name, cell in attention["mean"].items()},  # over images
        "best_head": metrics.get("best_head"),
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
    """Train and measure a row with a seed, going on with what was begun; returns its line, None if there is none."""
    text, folder = command(args, row, seed)
    started, path = time.time(), os.path.join(ROOT, folder)
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if args.device == "cpu" else {})
    os.makedirs(os.path.dirname(path), exist_ok=True)
    begun = os.path.exists(os.path.join(path, "ckpt.pth")) and os.path.exists(path + ".txt")
    if begun:
        with open(path + ".txt") as log:
            begun = log.readline().strip() == text  # else it is of another grid

    def call(words, mode):
        with open(path + ".txt", mode) as log:
            print(text, file=log, flush=True)
            return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=log).returncode

    status = call(["train.py", "--resume", folder], "a") if begun else None
    if status in (None, 2):  # there is nothing to go on with
        shutil.rmtree(path, ignore_errors=True)
        status = call(shlex.split(text.split("python ", 1)[1]), "w")
    if status:
        say(f"{row}, seed {seed}: ended with status {status}; {folder}.txt says why")
        return None
    say(f"{row}, seed {seed}: {time.time() - started:.0f} s")
    return {
        "preset": args.preset, "row": row, "seed": seed, "command": text, "device": device_name(args.device),
        "date": datetime.date.today().isoformat(), "seconds": round(time.time() - started),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "torchvision", "numpy")},
        **measured(path),
    }


def wanted(args, runs):
    """All runs that the flags ask for, the most telling first: [(row, seed)]."""
    jobs = []
    for name, row in grid(args.preset).items():
        if not args.only or set(args.only) & set(row["claims"]):
            jobs += [(name, seed) for seed in row["seeds"]]
    if args.preset == "laptop" and (not args.only or "Q1" in args.only):
        jobs += [(name, seed) for name in best_rates(runs).values() for seed in range(1, 5)]
    return jobs


def is_done(args, runs, job):
    """Whether study.json has the run, with the flags that the grid gives it now; on whatever device."""
    return f" {flags_of(args, *job)} " in runs.get(job, {}).get("command", "")


def run_all(args):
    """Everything that is still to do, some runs at a time; True if none failed."""
    study, lock, tried, failed = read_study(), threading.Lock(), set(), set()
    runs = study[args.preset]
    fresh = set(wanted(args, runs)) if args.fresh else set()  # their lines stay until there are new ones

    def one(job):
        if job in fresh:
            shutil.rmtree(os.path.join(ROOT, command(args, *job)[1]), ignore_errors=True)
        line = run(args, *job)
        with lock:
            fresh.discard(job)
            if line is None:
                failed.add(job)
                return
            runs[job] = line
            write_study(study)

    # in rounds, since the best learning rates are known, and run with more seeds, only after the first
    while jobs := [job for job in wanted(args, runs) if (job in fresh or not is_done(args, runs, job)) and job not in tried]:
        tried.update(jobs)
        say(f"{len(jobs)} runs to do, {args.jobs} at a time")
        with ThreadPoolExecutor(args.jobs) as pool:
            try:
                list(pool.map(one, jobs))
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return not failed


def again(args, row, seed):
    """Run a line of study.json once more, elsewhere, and compare; True if nothing is different."""
    old = read_study()[args.preset].get((row, seed))
    if old is None or row not in grid(args.preset):
        raise ValueError(f"--again {row} {seed}: study.json or the grid has no such run of the preset {args.preset}")
    if not is_done(args, {(row, seed): old}, (row, seed)):
        raise ValueError(f"--again {row} {seed}: the grid has other flags for it by now than study.json")
    args.runs += "-again"
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


def draw_attention(args):
    """Where the networks of seed 0 look, drawn by visualize.py, into results/figures/."""
    for name, rows in PICTURES.items():
        paths = [f"{args.runs}/{args.preset}/{row}/seed-0/ckpt.pth" for row in rows]
        if args.preset == "laptop" and all(os.path.exists(os.path.join(ROOT, path)) for path in paths):
            folder = f"{args.runs}/{args.preset}/{name}"
            words = ["visualize.py", *paths, "--device", args.device, "--data-root", args.data_root, "--output", folder]
            if subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0:
                drawn = "attention-compared.png" if len(rows) > 1 else "attention.png"
                shutil.copy(os.path.join(ROOT, folder, drawn), os.path.join(HERE, "figures", f"{name}.png"))


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
    add("--fresh", action="store_true", help="do the runs again that study.json has already")
    add("--again", nargs=2, metavar=("ROW", "SEED"), help="run a line of study.json again and compare")
    add("--jobs", type=int, help="runs at a time [cpu: one a core, of one thread; else 1]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train [cuda if there, else cpu]")
    add("--data-root", default="data", help="folder that holds, or will hold, MNIST/raw/, from the project's root [data]")
    add("--weights", help="what the networks start from, where it is not to be the preset's: none, or a file [the preset's]")
    add("--runs", default="runs/study", help="folder of the runs [runs/study]")
    args = parser.parse_args(argv)
    args.jobs = args.jobs or (os.cpu_count() if args.device == "cpu" else 1)
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.again:
            return 0 if again(args, args.again[0], int(args.again[1])) else 1
        if args.tables:
            write_pages()
            return 0
        data.load_digits(DIGITS, os.path.join(ROOT, args.data_root))  # fetched once, not by several runs at a time
        whole = run_all(args)
        small_checkpoints(args)
        write_pages()
        draw_attention(args)
        return 0 if whole else 1
    except (ValueError, OSError) as error:
        print(f"results/study.py: error: {data.one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("stopped; the same command, without --fresh, goes on")
        return 130


if __name__ == "__main__":
    sys.exit(main())
