"""Every claim of the paper, tried: train each row of the grid below and write down what it gives.

    python results/study.py                      # all at laptop scale; goes on where it stopped
    python results/study.py --only C5            # the rows that one claim needs
    python results/study.py --tables             # no run: tables and figures from study.json
    python results/study.py --again same-2 0     # one run again: is it the same, bit for bit?

A row is flags of train.py, run once with each of its seeds as a person would type them. What a run
measured goes to study.json, a line a run, with its command; a run that is there is not done again.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from multiprocessing.pool import ThreadPool
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT, STUDY, CHECKPOINTS, DIGITS = HERE.parent, HERE / "study.json", HERE / "checkpoints", "mnist"
sys.path[:0] = [str(HERE), str(ROOT)]

import figures
import torch
import verdicts

import data
import vit

# "same-2": same views, two crops of a canvas. Where rows are to tell views and crops apart, the
# student sees the same number of crops in each, so that none learns from more. (On a laptop
# different views feed the crops of both canvases to both branches, twice as many as flagged.)
# Rows named …-images have seen as many canvases as each other instead, as the paper's have.
SAME, DIFF = "--loss nce --views same --crops", "--loss nce --views different --crops"
DINO, DINO_DIFF = "--loss dino --views same --crops 2", "--loss dino --views different --crops 1"
TEXTURE = f"{SAME} 2 --background texture"
GRID = [  # row, flags; images an epoch, seeds, claims on a laptop; images, epochs, claims on a GPU
    ("different-long", f"{DIFF} 1", (12_800, 5, "C6"), (50_000, 10, "C5 C6")),
    ("different-1", f"{DIFF} 1", (3200, 10, "C1 C2 C3 C5 C8 Q2"), (50_000, 1, "C1 C2 C3 C8 Q2")),
    ("same-2", f"{SAME} 2", (3200, 10, "C1 C2 C3 C4"), (25_000, 1, "C1 C2 C3 C4")),
    ("same-1", f"{SAME} 1", (6400, 10, "C3"), (50_000, 1, "C3")),
    ("different-2", f"{DIFF} 2", (1600, 10, "C3 C7"), (25_000, 1, "C3")),
    ("same-4", f"{SAME} 4", (1600, 10, "C3 C7"), (12_500, 1, "C3 C7")),
    ("texture", TEXTURE, (3200, 5, "C4"), (25_000, 1, "C4")),
    ("texture-pool", f"{TEXTURE} --texture-pool 10", (3200, 5, "C4"), (25_000, 1, "C4")),
    ("dino-same", DINO, (3200, 5, "C1 C2"), (25_000, 1, "C1 C2")),
    ("dino-different", DINO_DIFF, (3200, 5, "C1 C2"), (50_000, 1, "C1 C2")),
    *[(f"same-{n}-images", f"{SAME} {n}", (1600, 10, "C7"), (12_500, 1, "C7")) for n in (2, 1)],
    ("different-1-images", f"{DIFF} 1", (1600, 10, "C7"), (12_500, 1, "C7")),
    ("different-2-images", f"{DIFF} 2", None, (12_500, 1, "C7")),
    ("different-4-images", f"{DIFF} 4", (1600, 10, "C7"), None),
    ("different-4", f"{DIFF} 4", None, (12_500, 1, "C7")),
    *[(f"heads-{n}", f"{DIFF} 1 --heads {n}", (3200, 5, "Q2"), None) for n in (1, 2, 6, 12)],
    *[(f"size-{n}", f"{DIFF} 1 --image-size {n}", (3200, 5, "C8"), None) for n in (28, 84)],
    ("size-112", f"{DIFF} 1 --image-size 112", None, (50_000, 1, "C8")),
    ("size-448", f"{DIFF} 1 --image-size 448 --micro-batch 8", None, (50_000, 1, "C8")),
    ("same-long", f"{SAME} 2", (12_800, 1, ""), None),  # for the small checkpoint
    ("stl10-nce", "--dataset stl10 --loss nce", None, (100_000, 10, "C1 C2")),
    ("stl10-dino", "--dataset stl10 --loss dino", None, (100_000, 10, "C1 C2")),
    ("random-weights", f"{DIFF} 1 --weights none", None, (50_000, 1, "Q3")),
    ("vit-small-16", f"{DIFF} 1 --weights dino_vits16", None, (50_000, 1, "Q3")),
    # What does not hold as it is: would it with another learning rate, temperature or length?
    ("look-texture-lr", f"{TEXTURE} --lr 0.003", (3200, 1, "C4"), None),
    ("look-texture-temperature", f"{TEXTURE} --temperature 0.1", (3200, 1, "C4"), None),
    ("look-texture-long", TEXTURE, (12_800, 1, "C4"), None),
    ("look-texture-crops", f"{SAME} 4 --background texture", (1600, 1, "C4"), None),  # the paper's
    ("look-dino-lr", f"{DINO} --lr 0.003", (3200, 1, "C1 C2"), None),
    ("look-dino-long", DINO, (12_800, 1, "C1 C2"), None),
    ("look-size-84-long", f"{DIFF} 1 --image-size 84", (6400, 1, "C8"), None),
    ("look-different-lr", f"{DIFF} 1 --lr 0.003", (3200, 1, "C5"), None),
]
OF_HEADS = ["selectivity", "auroc", "digit_density", "clutter_density"]  # what study.json keeps
OF_HEADS += ["digit_share", "clutter_share", "background_share"]
OF_MAPS = ["selectivity", "auroc", "pointing", "jaccard60", "digit_density"]


def grid(preset):
    """The rows in the order in which they run: {name: {"flags", "seeds", "claims"}}."""
    paper, found = preset == "paper", {}
    rows = [(name, flags, *scales[paper]) for name, flags, *scales in GRID if scales[paper]]
    base_lr, images = (0.0005, 49_152) if paper else (0.001, 6144)
    for batch in verdicts.BATCHES:
        for rate in verdicts.RATES:
            lr = rate * base_lr / 64 * min(batch, 256) * max(1, batch / 256) ** 0.5
            pieces = " --micro-batch 32" if paper and batch > 32 else ""
            flags = f"{DIFF} 1 --batch-size {batch} --lr {lr:.6g}{pieces}"
            rows.append((f"batch-{batch}-lr-{rate}", flags, images, 1, "Q1"))
    for name, flags, images, count, claims in rows:
        epochs, seeds = (count, 1) if paper else (10, count)
        flags = f"{flags} --epochs {epochs} --images-per-epoch {images}"
        found[name] = {"flags": flags, "seeds": range(seeds), "claims": claims.split()}
    return found


def read_study():
    """The lines of study.json: {preset: {(row, seed): line}}."""
    study = {"laptop": {}, "paper": {}}
    for line in json.loads(STUDY.read_text()) if STUDY.exists() else []:
        study[line["preset"]][line["row"], line["seed"]] = line
    return study


def write_study(study):
    lines = [json.dumps(line) for runs in study.values() for _, line in sorted(runs.items())]
    part = STUDY.with_name(".part-study.json")  # so that study.json is never half written
    part.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    part.replace(STUDY)


def command(args, row, seed):
    """What a person would type for a run, the part of it that says what is trained, its folder."""
    flags = grid(args.preset)[row]["flags"]
    if args.weights and "--weights" not in flags:
        flags += f" --weights {shlex.quote(args.weights)}"
    flags += f" --seed {seed} --device"
    folder = f"{args.runs}/{args.preset}/{row}/seed-{seed}"
    threads = "OMP_NUM_THREADS=1 " if args.device == "cpu" else ""  # sums depend on how many
    digits = "" if "stl10" in flags else f" --digits {DIGITS}"
    where = "" if args.data_root == "data" else f" --data-root {shlex.quote(args.data_root)}"
    text = f"{threads}python train.py --preset {args.preset}{digits} {flags} {args.device}{where}"
    return f"{text} --output {shlex.quote(folder)}", flags, folder


def run(args, row, seed, anew=False):
    """Train and measure a row with a seed: its line of study.json, or None if that failed."""
    text, _, folder = command(args, row, seed)
    started, path, log = time.time(), ROOT / folder, ROOT / f"{folder}.txt"
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if args.device == "cpu" else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = (path / "ckpt.pth").exists() and log.exists() and not anew
    begun = begun and log.read_text(errors="replace").startswith(text + "\n")  # else another grid's
    fresh = shlex.split(text.split("train.py ")[1])
    for words in [["--resume", folder], fresh] if begun else [fresh]:
        if words is fresh:
            shutil.rmtree(path, ignore_errors=True)
        with open(log, "w" if words is fresh else "a") as file:
            print(text, file=file, flush=True)
            where = {"cwd": ROOT, "env": environment, "stdout": file, "stderr": file}
            words = [sys.executable, "train.py", *words]
            status = subprocess.run(words, check=False, **where).returncode
        if status != 2:  # else there was nothing to go on with
            break
    seconds = round(time.time() - started)
    end = f"ended with status {status}; {folder}.txt says why" if status else f"{seconds} s"
    print(f"{row}, seed {seed}: {end}", flush=True)
    if status:
        return None
    cpu = Path("/proc/cpuinfo")  # the last bits of the numbers depend on its model
    model = cpu.read_text().partition("model name\t: ")[2] if cpu.exists() else ""
    device = f"cpu, {[*model.splitlines(), os.uname().machine][0]}"
    if args.device != "cpu":
        device = torch.cuda.get_device_name(args.device)
    versions = {name: version(name) for name in ("torch", "torchvision", "numpy")}
    line = {"preset": args.preset, "row": row, "seed": seed, "command": text, "device": device}
    line |= {"date": time.strftime("%Y-%m-%d"), "seconds": seconds}
    line["versions"] = {"python": sys.version.split()[0]} | versions
    return line | measured(path)


def measured(folder):
    """What study.json keeps of a finished run: measures, curve, a digest of its weights."""
    # six digits are enough for any table, and to tell one run from another
    rounded = {"parse_float": lambda number: float(f"{float(number):.6g}")}
    metrics = json.loads((folder / "metrics.json").read_text(), **rounded)
    attention = metrics.get("matched") or {"mean": {}}  # photographs have no masks to measure by
    matched, curve = {}, []
    for name, cells in attention.items():
        kept = cells if name == "mean" else OF_HEADS if name.startswith("head_") else OF_MAPS
        if name != "uniform":
            matched[name] = {key: cells[key]["value"] for key in cells if key in kept}
    for text in (folder / "log.jsonl").read_text().splitlines():
        line = json.loads(text, **rounded)
        maps = line["validation"]
        point = {"step": line["step"]} | ({"loss": line["loss"]} if "loss" in line else {})
        point |= {"validation_loss": maps["loss"], "knn": maps["knn"]}
        for name, cells in maps.items():
            if name in ("mean", "brightness", "shuffled"):
                point[name] = {key: cells[key] for key in cells if key != "entropy"}
            elif name.startswith("head_"):
                point[name] = {key: cells[key] for key in cells if key == "selectivity"}
        curve.append(point)
    interval = {key: [cell["low"], cell["high"]] for key, cell in attention["mean"].items()}
    line = {"matched": matched, "interval": interval, "best_head": metrics.get("best_head")}
    for name in ("features", "untrained_features"):
        line[name] = {key: cell["value"] for key, cell in metrics[name].items()}
    teacher = vit.read_checkpoint(str(folder / "ckpt.pth"))["teacher"]
    return line | {"curve": curve, "weights": weights_digest(teacher)}


def weights_digest(state_dict):
    """SHA-256, in hex, of all weights: their names, types, shapes and numbers."""
    sha = hashlib.sha256(f"dict {len(state_dict)};".encode())
    for name, weights in state_dict.items():
        sha.update(f"{len(repr(name))} {name!r}{weights.dtype} {tuple(weights.shape)};".encode())
        sha.update(weights.contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def wanted(args, runs):
    """All runs that the flags ask for, the most telling first: [(row, seed)]."""
    jobs = []
    for name, row in grid(args.preset).items():
        if not args.only or set(args.only) & set(row["claims"]):
            jobs += [(name, seed) for seed in row["seeds"]]
    if args.preset == "laptop" and (not args.only or "Q1" in args.only):
        best = verdicts.best_rates(runs).values()
        jobs += [(name, seed) for name in best for seed in range(1, 5)]
    return jobs


def is_done(args, runs, job):
    """Whether study.json has the run, with the flags that the grid has now; on any device."""
    return f" {command(args, *job)[1]} " in runs.get(job, {}).get("command", "")


def run_all(args):
    """Everything that is still to do, some runs at a time; True if none failed."""
    study, tried, failed = read_study(), set(), False
    runs = study[args.preset]
    fresh = wanted(args, runs) if args.fresh else []  # their lines stay until there are new ones
    while True:  # again after the first round, which tells the rates that get more seeds
        jobs = [job for job in wanted(args, runs) if job not in tried]
        jobs = [job for job in jobs if job in fresh or not is_done(args, runs, job)]
        if not jobs:
            return not failed
        tried.update(jobs)
        data.load_digits(DIGITS, str(ROOT / args.data_root))  # fetched once, not by several runs
        print(f"{len(jobs)} runs to do, {args.jobs} at a time", flush=True)
        with ThreadPool(args.jobs) as pool:
            results = pool.imap_unordered(lambda job: (job, run(args, *job, job in fresh)), jobs)
            for job, line in results:
                failed = failed or line is None
                if line:
                    runs[job] = line
                    write_study(study)


def again(args, row, seed):
    """Run a line of study.json once more, elsewhere, and compare; True if nothing is different."""
    old = read_study()[args.preset].get((row, seed))
    if row not in grid(args.preset) or not is_done(args, {(row, seed): old or {}}, (row, seed)):
        raise ValueError(f"--again {row} {seed}: study.json has no such run of today's grid")
    args.runs += "-again"
    new = run(args, row, seed, anew=True)
    if new is None:
        return False
    changing = ("command", "date", "seconds")
    other = [name for name in new if name not in changing and new[name] != old[name]]
    found = f"other {', '.join(other)}" if other else "the same, bit for bit"
    print(f"{row}, seed {seed}, run again: {found}", flush=True)
    return not other


def save_small_checkpoints(args):
    """Teachers of the long runs of seed 0 in float16, for a reader to look at."""
    for name in ("same", "different"):
        path = ROOT / f"{args.runs}/laptop/{name}-long/seed-0/ckpt.pth"
        if path.exists():
            content = vit.read_checkpoint(str(path))
            content["config"] |= {"digits": "auto", "data_root": "data"}
            content["teacher"] = {key: value.half() for key, value in content["teacher"].items()}
            small = {key: content[key] for key in ("config", "epoch", "teacher", "metrics")}
            torch.save(small, CHECKPOINTS / f"{name}.pth")


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="results/study.py", description="Try the paper's claims.")
    device, add = "cuda" if torch.cuda.is_available() else "cpu", parser.add_argument
    add("--preset", choices=["laptop", "paper"], default="laptop", help="paper: a GPU [laptop]")
    add("--only", nargs="+", metavar="CLAIM", choices=list(verdicts.CLAIMS), help="C1 to Q3 [all]")
    add("--tables", action="store_true", help="run nothing: tables and figures from study.json")
    add("--fresh", action="store_true", help="do the runs again that study.json has already")
    add("--again", nargs=2, metavar=("ROW", "SEED"), help="run a line again and compare")
    add("--jobs", type=int, help="runs at a time [cpu: one a core, of one thread; else 1]")
    add("--device", default=device, help="where to train [cuda if there, else cpu]")
    add("--data-root", default="data", help="folder of MNIST/raw/, from the project's root [data]")
    add("--weights", help="what networks start from: none, or a file [the preset's]")
    add("--runs", default="runs/study", help="folder of the runs [runs/study]")
    args = parser.parse_args(argv)
    args.jobs = args.jobs or (os.cpu_count() if args.device == "cpu" else 1)
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.again:
            return 0 if again(args, args.again[0], int(args.again[1])) else 1
        complete = args.tables or run_all(args)
        study = read_study()
        for folder, to_figures in ((HERE, "figures/"), (ROOT, "results/figures/")):
            page, blocks = folder / "README.md", verdicts.blocks(study, to_figures)
            page.write_text(verdicts.fill(page.read_text(), blocks))
        figures.draw(study["laptop"], HERE / "figures")
        if not args.tables and args.preset == "laptop":
            save_small_checkpoints(args)
        return 0 if complete else 1
    except (ValueError, OSError) as error:
        print(f"results/study.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command, without --fresh, goes on")
        return 130


if __name__ == "__main__":
    sys.exit(main())
