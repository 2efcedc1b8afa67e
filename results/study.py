"""The claims of the paper, and our own on faithfulness, tried: runs, tables and figures.

    python results/study.py                      # all runs that are not in study.json yet
    python results/study.py --only F1 C5         # the rows that these claims need
    python results/study.py --tables             # no run: pages and figures from study.json
    python results/study.py --again same 10      # one run again: is it the same, bit for bit?

A row is flags of train.py, run once with each of its seeds as a person would type them (plan.md).
What a run measured goes to study.json, a line a run; a run that is there is not done again.
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
ROOT, STUDY = HERE.parent, HERE / "study.json"
sys.path[:0] = [str(HERE), str(ROOT)]

import figures
import torch
import verdicts

import data
import train
import vit

SAME, DIFFERENT = "--loss nce --views same", "--loss nce --views different"
FRESH, FIVE, BOTH = verdicts.FRESH, verdicts.FRESH[:5], verdicts.BOTH
PRETRAINING = "{runs}/{preset}/pretraining/seed-0/ckpt.pth"
# Rows in the order in which they run: flags beside the preset's, seeds, claims. In same and
# different views the student is fed two crops an image, so that none learns from more.
GRID = {
    "different": (DIFFERENT, BOTH, "F1 F2 F3 F4 C5 C8 C9 Q2"),
    "same": (SAME, BOTH, "F2 C1 C2 C3 C5 Q3"),
    "supervised": ("--loss supervised --views different", FRESH, "C9"),
    "dino-same": ("--loss dino --views same", FRESH, "C1 C2"),
    "texture": (f"{SAME} --background texture", FRESH, "C4"),
    "same-4": (f"{SAME} --crops 4", FRESH, "C7"),
    "same-1": (f"{SAME} --crops 1", FRESH, "C7"),
    "different-registers-0": (f"{DIFFERENT} --registers 0", FRESH, "F4"),
    "heads-6": (f"{DIFFERENT} --heads 6", BOTH, "Q2"),
    "size-28": (f"{DIFFERENT} --image-size 28", BOTH, "C8"),
    "pretraining": ("--loss supervised --views same --digits sklearn", [0], "Q3"),
    "pretrained": (f"{SAME} --weights {PRETRAINING}", FRESH, "Q3"),
    "different-long": (f"{DIFFERENT} --epochs 40", FIVE, "C6"),
    "same-registers-0": (f"{SAME} --registers 0", FIVE, ""),
    "supervised-same": ("--loss supervised --views same", FIVE, ""),
    "dino-different": ("--loss dino --views different", FIVE, ""),
    "size-84": (f"{DIFFERENT} --image-size 84", FIVE, ""),
    "depth-4": (f"{DIFFERENT} --depth 4", FIVE, ""),
    "depth-6": (f"{DIFFERENT} --depth 6", FIVE, ""),
}
# one GPU, ViT-S/8 from DINO's weights, seed 10 alone: in order of value
PAPER = {name: GRID[name][0] for name in ("different", "same", "supervised")}
PAPER |= {"size-112": f"{DIFFERENT} --image-size 112"}
PAPER["batch-256"] = f"{DIFFERENT} --batch-size 256 --micro-batch 32"


def grid(preset, runs):
    """{row: (flags, seeds, claims)}, with those of the searches that `runs` ask for."""
    if preset == "paper":
        return {name: (flags, [10], GRID.get(name, ("",) * 3)[2]) for name, flags in PAPER.items()}
    rows = dict(GRID)
    for base in verdicts.SEARCHED:
        claim = "Q1" if base in verdicts.BATCHES else "C2"
        batch = verdicts.BATCHES.get(base, 64)
        flags = f"{DIFFERENT} --batch-size {batch}" if base in verdicts.BATCHES else GRID[base][0]
        found, best = verdicts.rates(runs, base), verdicts.best_row(runs, base)
        factors = set(found) if best else {0.5, 1, 2, *found}
        if len(found) > 1 and not best:  # the best is at an edge: go on there; a run that
            edge = max(found, key=found.get)  # diverged, and has no line, is beyond it
            factors.add(edge * 2 if edge == max(found) else edge / 2)
        for factor in sorted(factors):
            name, lr = verdicts.rate_row(base, factor), factor * 0.001 * batch / 64
            at = "" if name in GRID else f" --lr {lr:.6g}"
            seeds = {0, *(GRID[name][1] if name in GRID else FRESH if name == best else ())}
            claims = f"{claim} {GRID[name][2]}" if name in GRID else claim
            rows[name] = (flags + at, sorted(seeds), claims)
    return rows


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


def command(args, flags, row, seed):
    """What a person would type for a run, and its folder."""
    folder = f"{args.runs}/{args.preset}/{row}/seed-{seed}"
    flags = flags.format(runs=args.runs, preset=args.preset)
    threads = "OMP_NUM_THREADS=1 " if args.device == "cpu" else ""  # sums depend on how many
    digits = "" if "--digits" in flags else "--digits mnist "
    weights = "" if not args.weights else f" --weights {shlex.quote(args.weights)}"
    where = "" if args.data_root == "data" else f" --data-root {shlex.quote(args.data_root)}"
    text = f"{threads}python train.py --preset {args.preset} {digits}{flags}{weights} --seed {seed}"
    return f"{text} --device {args.device}{where} --output {shlex.quote(folder)}", folder


def run(args, flags, row, seed, anew=False):
    """Train and measure a row with a seed: its line of study.json, or None if that failed."""
    text, folder = command(args, flags, row, seed)
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
    return None if status else line_of(args, text, row, seed, seconds, path)


def line_of(args, text, row, seed, seconds, folder):
    """The line of study.json of a finished run: where it ran, and what it measured."""
    cpu = Path("/proc/cpuinfo")  # the last bits of the numbers depend on its model
    model = cpu.read_text().partition("model name\t: ")[2] if cpu.exists() else ""
    device = f"cpu, {[*model.splitlines(), os.uname().machine][0]}"
    if args.device != "cpu":
        device = torch.cuda.get_device_name(args.device)
    precision = str(train.autocast_dtype("auto", torch.device(args.device))).removeprefix("torch.")
    versions = {name: version(name) for name in ("torch", "torchvision", "numpy")}
    line = {"preset": args.preset, "row": row, "seed": seed, "command": text, "device": device}
    line |= {"precision": precision, "date": time.strftime("%Y-%m-%d"), "seconds": seconds}
    line["versions"] = {"python": sys.version.split()[0]} | versions
    return line | measured(folder)


def measured(folder):
    """What study.json keeps of a finished run: measures, curve, a digest of its weights."""
    # six digits are enough for any table, and to tell one run from another
    rounded = {"parse_float": lambda number: float(f"{float(number):.6g}")}
    metrics = json.loads((folder / "metrics.json").read_text(), **rounded)
    value = lambda cells: {key: cell["value"] for key, cell in cells.items()}
    line = {"matched": {row: value(cells) for row, cells in metrics["matched"].items()}}
    kept = ("mean", "brightness", "shuffled", "untrained")
    line["paper"] = {row: value(metrics["paper"][row]) for row in kept}
    line |= {"best_head": metrics["best_head"], "mean_cosine": metrics["mean_cosine"]}
    line["causal_selectivity"] = metrics["causal_selectivity"]["value"]
    matters = metrics["attention_matters"]
    line["attention_matters"] = {k: value(matters[k]) for k in ("features", "even", "swapped")}
    line["attention_matters"]["two_canvases"] = matters["two_canvases"]
    line |= {name: value(metrics[name]) for name in ("features", "untrained_features")}
    line["curve"] = []
    for text in (folder / "log.jsonl").read_text().splitlines():
        epoch = json.loads(text, **rounded)
        said = epoch["validation"]
        point = {"epoch": epoch["epoch"], "loss": epoch.get("loss"), "knn": said["knn"]}
        line["curve"].append(point | {"validation_loss": said["loss"], "mean": said["mean"]})
    teacher = vit.read_checkpoint(str(folder / "ckpt.pth"))["teacher"]
    return line | {"weights": weights_digest(teacher)}


def weights_digest(state_dict):
    """SHA-256, in hex, of all weights: their names, types, shapes and numbers."""
    sha = hashlib.sha256(f"dict {len(state_dict)};".encode())
    for name, weights in state_dict.items():
        sha.update(f"{len(repr(name))} {name!r}{weights.dtype} {tuple(weights.shape)};".encode())
        sha.update(weights.contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def wanted(args, runs):
    """The runs that are still to do, the most telling first: [(row, seed)]."""
    jobs = []
    for name, (flags, seeds, claims) in grid(args.preset, runs).items():
        ready = "{" not in flags or ("pretraining", 0) in runs  # whose weights it starts from
        if ready and (not args.only or set(args.only) & set(claims.split())):
            jobs += [(name, seed) for seed in seeds if not is_done(args, runs, flags, name, seed)]
    return jobs


def is_done(args, runs, flags, row, seed):
    """Whether study.json has the run, with the flags that the grid has now; on any device."""
    text = command(args, flags, row, seed)[0].partition(" --preset ")[2].partition(" --device")[0]
    return f" {text} " in runs.get((row, seed), {}).get("command", "")


def run_all(args):
    """Everything that is still to do, some runs at a time; True if none failed."""
    runs, tried, failed = read_study()[args.preset], set(), False
    while jobs := [job for job in wanted(args, runs) if job not in tried]:
        rows = grid(args.preset, runs)  # anew after each round, for what the searches found
        tried.update(jobs)
        data.load_digits("mnist", str(ROOT / args.data_root))  # fetched once, not by several runs
        print(f"{len(jobs)} runs to do, {args.jobs} at a time", flush=True)
        with ThreadPool(args.jobs) as pool:
            todo = [(args, rows[row][0], row, seed) for row, seed in jobs]
            results = pool.imap_unordered(lambda each: (each[2:], run(*each)), todo)
            for job, line in results:
                failed = failed or line is None
                if line:
                    study = read_study()  # anew, for what another study.py has added
                    study[args.preset][job] = runs[job] = line
                    write_study(study)
    return not failed


def again(args, row, seed):
    """Run a line of study.json once more, elsewhere; True if it ends with the same weights."""
    runs = read_study()[args.preset]
    flags, *_ = grid(args.preset, runs).get(row, ("",))
    if not flags or not is_done(args, runs, flags, row, seed):
        raise ValueError(f"--again {row} {seed}: study.json has no such run of today's grid")
    # the weights that it starts from, if of another run, stay where they are
    flags = flags.format(runs=args.runs, preset=args.preset)
    args.runs += "-again"
    new, old = run(args, flags, row, seed, anew=True), runs[row, seed]
    if new is None:
        return False
    same = new["weights"] == old["weights"]
    found = "the same weights, bit for bit" if same else f"other weights; it ran on {old['device']}"
    print(f"{row}, seed {seed}, run again: {found}", flush=True)
    return same


def save_small_checkpoints(args, runs):
    """Teachers of the median runs, by selectivity, of the first five seeds, in float16."""
    for name in ("same", "different"):
        found = verdicts.sample(runs, name, verdicts.SELECTIVITY, FIVE)
        seed = sorted(found, key=found.get)[len(found) // 2] if found else None
        path = ROOT / f"{args.runs}/laptop/{name}/seed-{seed}/ckpt.pth"
        if path.exists():
            content = vit.read_checkpoint(str(path))
            content["config"] |= {"digits": "auto", "data_root": "data"}
            content["teacher"] = {key: value.half() for key, value in content["teacher"].items()}
            small = {key: content[key] for key in ("config", "epoch", "teacher", "metrics")}
            torch.save(small, HERE / "checkpoints" / f"{name}.pth")


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="results/study.py", description="Try the paper's claims.")
    device, add = "cuda" if torch.cuda.is_available() else "cpu", parser.add_argument
    add("--preset", choices=["laptop", "paper"], default="laptop", help="paper: a GPU [laptop]")
    add("--only", nargs="+", metavar="CLAIM", choices=list(verdicts.CLAIMS), help="F1 to Q3 [all]")
    add("--tables", action="store_true", help="run nothing: pages and figures from study.json")
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
        for page in (HERE / "README.md", HERE / "tables.md", ROOT / "README.md"):
            figures_at = "results/figures/" if page.parent == ROOT else "figures/"
            page.write_text(verdicts.fill(page.read_text(), verdicts.blocks(study, figures_at)))
        figures.draw(study["laptop"], HERE / "figures")
        if not args.tables and args.preset == "laptop":
            save_small_checkpoints(args, study["laptop"])
        return 0 if complete else 1
    except (ValueError, OSError) as error:
        print(f"results/study.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
        return 130


if __name__ == "__main__":
    sys.exit(main())
