"""Run the study: train the networks behind every claim, then write the tables and figures.

There are two parts: the paper's claims (plan.md, verdicts.py) and the study of maps (plan-maps.md,
map_claims.py).

    python results/study.py                      # all runs that are not in study.json yet
    python results/study.py --only F1 C5         # only the rows that these claims need
    python results/study.py --tables             # no runs: pages and figures from study.json
    python results/study.py --again same 10      # repeat one run: are its weights the same?

A row of the study is a set of flags of train.py. It is run once with each of its seeds, by the
command that a person would type (plan.md says why these rows). The measures of a finished run
become one line of study.json, and a run that has its line there is not repeated.
"""

import argparse
import copy
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing.pool import ThreadPool
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
STUDY_FILE = RESULTS / "study.json"
sys.path[:0] = [str(RESULTS), str(ROOT)]

import figures
import map_claims
import torch
import verdicts
from verdicts import BOTH, FRESH, MAP_SEEDS

import data
import evaluate
import settings
import train
import weights

# ------------------------------------------------------------------------- the rows of the study

SAME = "--loss nce --views same"
DIFFERENT = "--loss nce --views different"
FIRST_FIVE = FRESH[:5]
TEN_SEEDS = map_claims.TEN_SEEDS
ALL_CLAIMS = (*verdicts.CLAIMS, *map_claims.CLAIMS)
# The network that the row `pretrained` starts from; `train_command` fills in the folders.
PRETRAINING = "{runs}/{preset}/pretraining/seed-0/ckpt.pth"


@dataclass(frozen=True)
class Row:
    """A row of the study: one way of training, run with several seeds."""

    flags: str  # of train.py, beside the preset's settings
    seeds: Sequence[int]
    claims: Sequence[str] = ()  # those that the row is needed for; without any it is described only

    @property
    def needs_pretraining(self):
        return PRETRAINING in self.flags


# Rows in the order in which they are run. With same and with different views the student is fed two
# crops of each image, so that neither learns from more.
GRID = {
    "different": Row(
        DIFFERENT,
        (*BOTH, *MAP_SEEDS, *map_claims.SEEDS),
        ["F1", "F2", "F3", "F4", "C5", "C8", "C9", "Q2", *map_claims.CLAIMS],
    ),
    "same": Row(
        SAME, (*BOTH, *MAP_SEEDS, *map_claims.SEEDS), ["F2", "C1", "C2", "C3", "C5", "Q3", "M9"]
    ),
    "shortcut-25": Row(f"{DIFFERENT} --shortcut 0.25", map_claims.MARK_SEEDS, ["M8"]),
    "shortcut-50": Row(f"{DIFFERENT} --shortcut 0.5", map_claims.MARK_SEEDS, ["M8"]),
    "shortcut-100": Row(f"{DIFFERENT} --shortcut 1", map_claims.MARK_SEEDS, ["M8"]),
    "supervised": Row("--loss supervised --views different", (*FRESH, *TEN_SEEDS), ["C9"]),
    "dino-same": Row("--loss dino --views same", FRESH, ["C1", "C2"]),
    "texture": Row(f"{SAME} --background texture", FRESH, ["C4"]),
    "same-4": Row(f"{SAME} --crops 4", FRESH, ["C7"]),
    "same-1": Row(f"{SAME} --crops 1", FRESH, ["C7"]),
    "different-registers-0": Row(f"{DIFFERENT} --registers 0", FRESH, ["F4"]),
    "heads-6": Row(f"{DIFFERENT} --heads 6", BOTH, ["Q2"]),
    "size-28": Row(f"{DIFFERENT} --image-size 28", BOTH, ["C8"]),
    "pretraining": Row("--loss supervised --views same --digits sklearn", [0], ["Q3"]),
    "pretrained": Row(f"{SAME} --weights {PRETRAINING}", FRESH, ["Q3"]),
    "different-long": Row(f"{DIFFERENT} --epochs 40", FIRST_FIVE, ["C6"]),
    "same-registers-0": Row(f"{SAME} --registers 0", FIRST_FIVE),
    "supervised-same": Row("--loss supervised --views same", FIRST_FIVE),
    "dino-different": Row("--loss dino --views different", (*FIRST_FIVE, *TEN_SEEDS)),
    "size-84": Row(f"{DIFFERENT} --image-size 84", FIRST_FIVE),
    "depth-1": Row(f"{DIFFERENT} --depth 1", TEN_SEEDS),
    "depth-3": Row(f"{DIFFERENT} --depth 3", TEN_SEEDS),
    "depth-4": Row(f"{DIFFERENT} --depth 4", (*FIRST_FIVE, *MAP_SEEDS, *TEN_SEEDS)),
    "depth-6": Row(f"{DIFFERENT} --depth 6", (*FIRST_FIVE, *MAP_SEEDS, *TEN_SEEDS), ["M6", "M7"]),
    "different-float32": Row(f"{DIFFERENT} --precision float32", TEN_SEEDS[:5]),
}
# At the paper's scale: ViT-S/8 from DINO's weights on one GPU, one seed, the most useful row first.
PAPER_GRID = {
    "different": replace(GRID["different"], seeds=[10]),
    "same": replace(GRID["same"], seeds=[10]),
    "supervised": replace(GRID["supervised"], seeds=[10]),
    "size-112": Row(f"{DIFFERENT} --image-size 112", [10]),
    "batch-256": Row(f"{DIFFERENT} --batch-size 256 --micro-batch 32", [10]),
}


def grid(preset, runs):
    """Return {name: Row} of a preset, in the order in which the rows are run.

    The searches for learning rates add rows, which depend on the runs in study.json so far.
    """
    if preset == "paper":
        return PAPER_GRID
    rows = dict(GRID)
    for base in verdicts.SEARCHES:
        for factor in search_factors(base, runs):
            name = verdicts.rate_row(base, factor)
            rows[name] = search_row(base, factor, runs)
    return rows


def search_factors(base, runs):
    """Return the factors of the learning rate that a search has tried, and those to try next."""
    values = verdicts.searched_rates(runs, base)
    if verdicts.best_row(runs, base):
        return sorted(values)
    factors = {0.5, 1, 2, *values}
    # The best rate so far is at an edge: go on in that direction. A run that diverged has no line
    # in study.json, so its rate is beyond the edge.
    if len(values) > 1:
        best_factor = max(values, key=values.get)
        if best_factor == max(values):
            factors.add(best_factor * 2)
        else:
            factors.add(best_factor / 2)
    return sorted(factors)


def search_row(base, factor, runs):
    """Return one row of a search: seed 0, and the fresh seeds if its rate is the best."""
    search = verdicts.SEARCHES[base]
    name = verdicts.rate_row(base, factor)
    # At the preset's rate a row of the grid needs no more flags, only seed 0.
    if name in GRID:
        row = GRID[name]
        return replace(row, seeds=sorted({0, *row.seeds}))
    if base in GRID:
        flags = GRID[base].flags
    else:
        flags = f"{DIFFERENT} --batch-size {search.batch_size}"
    # The preset's rate is .001 for a batch of 64, and grows in proportion to the batch.
    rate = factor * 0.001 * search.batch_size / 64
    seeds = [0]
    if name == verdicts.best_row(runs, base):
        seeds = [0, *FRESH]
    return Row(f"{flags} --lr {rate:.6g}", seeds, [search.claim])


# ------------------------------------------------------------------------------------ study.json


def read_study():
    """Read study.json: {preset: {(row, seed): line}}."""
    study = {"laptop": {}, "paper": {}}
    if STUDY_FILE.exists():
        for line in json.loads(STUDY_FILE.read_text()):
            study[line["preset"]][line["row"], line["seed"]] = line
    return study


def write_study(study):
    """Write study.json, one line per run. An interrupted write leaves the old file as it was."""
    lines = []
    for runs in study.values():
        lines += [json.dumps(runs[row, seed]) for row, seed in sorted(runs)]
    part = STUDY_FILE.with_name(".part-study.json")
    part.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    part.replace(STUDY_FILE)


def add_to_study(line):
    """Add the line of a finished run to study.json."""
    # Read the file again: another study.py may have added lines since.
    study = read_study()
    study[line["preset"]][line["row"], line["seed"]] = line
    write_study(study)


# -------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Job:
    """One run: a row with one of its seeds."""

    row: str
    seed: int
    flags: str  # those of the row


def run_folder(args, job):
    """Return the folder of a run, from the project's root."""
    return f"{args.runs}/{args.preset}/{job.row}/seed-{job.seed}"


def train_command(args, job):
    """Return the command that a person would type for a run."""
    flags = job.flags.format(runs=args.runs, preset=args.preset)
    words = [f"python train.py --preset {args.preset}"]
    # The order in which a CPU adds numbers, and so the result, depends on the number of threads.
    if args.device == "cpu":
        words.insert(0, "OMP_NUM_THREADS=1")
    if "--digits" not in flags:
        words.append("--digits mnist")
    words.append(flags)
    if args.weights:
        words.append(f"--weights {shlex.quote(args.weights)}")
    words.append(f"--seed {job.seed}")
    words.append(f"--device {args.device}")
    if args.data_root != "data":
        words.append(f"--data-root {shlex.quote(args.data_root)}")
    words.append(f"--output {shlex.quote(run_folder(args, job))}")
    return " ".join(words)


def without_machine(command):
    """Return the part of a command, from preset to seed, that does not depend on the machine."""
    _, _, settings = command.partition(" --preset ")
    settings, _, _ = settings.partition(" --device")
    return settings


def needs_marks(job):
    """Whether M8 asks how much the run relies on marks."""
    return job.row in map_claims.MARK_ROWS and job.seed in map_claims.MARK_SEEDS


def is_done(args, job, runs):
    """Whether study.json has the run, made on any device with the flags that its row has now."""
    if (job.row, job.seed) not in runs:
        return False
    line = runs[job.row, job.seed]
    if needs_marks(job) and "marks" not in line:
        return False
    old_command = line["command"]
    return without_machine(old_command) == without_machine(train_command(args, job))


def run(args, job, anew=False):
    """Train and measure one run. Return its line of study.json, or None if train.py failed.

    A run that was interrupted is resumed, unless `anew`.
    """
    folder = run_folder(args, job)
    (ROOT / folder).parent.mkdir(parents=True, exist_ok=True)
    started = time.time()
    status = None
    if not anew and can_be_resumed(args, job):
        status = run_train(args, job, ["--resume", folder], log_mode="a")
    # Start from scratch: nothing can be resumed, or train.py could not use it (status 2).
    if status in (None, 2):
        shutil.rmtree(ROOT / folder, ignore_errors=True)
        _, _, flags = train_command(args, job).partition("train.py ")
        status = run_train(args, job, shlex.split(flags), log_mode="w")
    seconds = round(time.time() - started)
    if status != 0:
        reason = f"train.py ended with status {status}. Its output is in {folder}.txt."
        print(f"{job.row}, seed {job.seed}: {reason}", flush=True)
        return None
    print(f"{job.row}, seed {job.seed}: finished in {seconds} s.", flush=True)
    return study_line(args, job, seconds)


def log_file(args, job):
    """Return the file that takes the output of train.py. Its first line is the command."""
    return ROOT / f"{run_folder(args, job)}.txt"


def can_be_resumed(args, job):
    """Whether the folder of a run has a checkpoint that was made by the same command."""
    log = log_file(args, job)
    checkpoint = ROOT / run_folder(args, job) / "ckpt.pth"
    if not checkpoint.exists() or not log.exists():
        return False
    return log.read_text(errors="replace").startswith(train_command(args, job) + "\n")


def run_train(args, job, flags, log_mode):
    """Run train.py with a list of flags, write its output to the log, return its exit status."""
    environment = dict(os.environ)
    if args.device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"
    with open(log_file(args, job), log_mode) as log:
        print(train_command(args, job), file=log, flush=True)
        process = subprocess.run(
            [sys.executable, "train.py", *flags],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            check=False,
        )
    return process.returncode


# ----------------------------------------------------------------- what study.json keeps of a run


def study_line(args, job, seconds):
    """Return the line of study.json of a finished run: where it ran, and what was measured."""
    folder = ROOT / run_folder(args, job)
    config = weights.read_checkpoint(str(folder / "ckpt.pth"))["config"]
    line = {
        "preset": args.preset,
        "row": job.row,
        "seed": job.seed,
        "command": train_command(args, job),
        "device": device_name(args.device),
        "precision": precision_name(config["precision"], args.device),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": seconds,
        "versions": {
            "python": sys.version.split()[0],
            "torch": version("torch"),
            "torchvision": version("torchvision"),
            "numpy": version("numpy"),
        },
    }
    line |= measures_of_run(folder)
    if needs_marks(job):
        line["marks"] = marks_of_run(folder, args.data_root)
    return line


def device_name(device):
    """Return the name of the GPU or of the CPU: the last bits of all numbers depend on it."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        for line in cpu_info.read_text().splitlines():
            name, _, value = line.partition("\t: ")
            if name == "model name":
                return f"cpu, {value}"
    return f"cpu, {os.uname().machine}"


def precision_name(precision, device):
    """Return the number format of training with this --precision, such as "bfloat16"."""
    dtype = train.autocast_dtype(precision, torch.device(device))
    return str(dtype).removeprefix("torch.")


def six_digits(text):
    """Read a number to six digits: enough for any table, and to tell two runs apart.

    None, which stands for a measure that could not be had, stays None.
    """
    return None if text is None else float(f"{float(text):.6g}")


def values_of(cells):
    """Return {metric: value} from cells that also hold intervals."""
    return {metric: cell["value"] for metric, cell in cells.items()}


def measures_of_run(folder):
    """Return what study.json keeps of a finished run: measures, curve, digest of the weights."""
    text = (folder / "metrics.json").read_text()
    metrics = json.loads(text, parse_float=six_digits)
    paper_rows = ("mean", "brightness", "shuffled", "untrained")
    teacher = weights.read_checkpoint(str(folder / "ckpt.pth"))["teacher"]
    return {
        "matched": {row: values_of(cells) for row, cells in metrics["matched"].items()},
        "paper": {row: values_of(metrics["paper"][row]) for row in paper_rows},
        "best_head": metrics["best_head"],
        "mean_cosine": metrics["mean_cosine"],
        "causal_selectivity": metrics["causal_selectivity"]["value"],
        "untrained": {row: values_of(cells) for row, cells in metrics["untrained"].items()},
        "direct_share": [cell["value"] for cell in metrics["direct_share"]],
        "features": values_of(metrics["features"]),
        "untrained_features": values_of(metrics["untrained_features"]),
        "curve": training_curve(folder / "log.jsonl"),
        "weights": weights_digest(teacher),
    }


def marks_of_run(folder, data_root):
    """Return how much a run relies on marks: its reliance, and the density of its maps on them.

    They are measured here, since the report of a run without --shortcut lacks them.
    """
    loaded = weights.load_backbone(str(folder / "ckpt.pth"))
    config = settings.config_from_checkpoint(loaded.content["config"])
    config.data_root = str(ROOT / data_root)
    splits, _ = data.load_dataset(config, torch.device("cpu"))
    measured = evaluate.measure_marks(config, loaded.backbone.eval(), splits)
    return {
        "reliance": six_digits(measured["reliance"]["value"]),
        "density": {name: six_digits(cell["value"]) for name, cell in measured["density"].items()},
    }


def training_curve(log):
    """Return what study.json keeps of each epoch, from the lines of log.jsonl."""
    curve = []
    for text in log.read_text().splitlines():
        epoch = json.loads(text, parse_float=six_digits)
        validation = epoch["validation"]
        point = {
            "epoch": epoch["epoch"],
            "loss": epoch.get("loss"),  # None before training
            "knn": validation["knn"],
            "validation_loss": validation["loss"],
            "mean": validation["mean"],
        }
        curve.append(point)
    return curve


def weights_digest(state_dict):
    """Return SHA-256, in hex, of all weights: their names, types, shapes and numbers."""
    digest = hashlib.sha256(f"dict {len(state_dict)};".encode())
    for name, tensor in state_dict.items():
        shape = tuple(tensor.shape)
        digest.update(f"{len(repr(name))} {name!r}{tensor.dtype} {shape};".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- all runs


def jobs_to_do(args, runs):
    """Return the jobs that study.json has no run of yet, the most informative first."""
    jobs = []
    for name, row in grid(args.preset, runs).items():
        if args.only and not set(args.only) & set(row.claims):
            continue
        # Its turn comes in the next round, once there are weights to start from.
        if row.needs_pretraining and ("pretraining", 0) not in runs:
            continue
        for seed in row.seeds:
            job = Job(name, seed, row.flags)
            if not is_done(args, job, runs):
                jobs.append(job)
    return jobs


def run_all(args):
    """Do all jobs, several at a time. Return True if no run failed.

    Jobs come in rounds: a search for a learning rate needs the results of one round to know the
    jobs of the next. A job that failed is not tried again.
    """
    runs = read_study()[args.preset]
    tried = set()
    is_complete = True
    while True:
        jobs = [job for job in jobs_to_do(args, runs) if job not in tried]
        if not jobs:
            return is_complete
        tried.update(jobs)
        # MNIST is downloaded here once, rather than by several runs at the same time.
        data.load_digits("mnist", str(ROOT / args.data_root))
        print(f"{len(jobs)} runs to do, {args.jobs} at a time.", flush=True)
        with ThreadPool(args.jobs) as pool:
            for line in pool.imap_unordered(lambda job: run(args, job), jobs):
                if line is None:
                    is_complete = False
                else:
                    runs[line["row"], line["seed"]] = line
                    add_to_study(line)


def run_again(args, row, seed):
    """Repeat a run of study.json in another folder. Return True if its weights are the same."""
    runs = read_study()[args.preset]
    rows = grid(args.preset, runs)
    if row not in rows or not is_done(args, Job(row, seed, rows[row].flags), runs):
        raise ValueError(
            f"--again {row} {seed}: study.json has no such run with the flags that the row has now; "
            "use a row and a seed of study.json"
        )
    # The weights of another run that it starts from stay where they are: only its own folder moves.
    flags = rows[row].flags.format(runs=args.runs, preset=args.preset)
    args_again = copy.copy(args)
    args_again.runs = f"{args.runs}-again"
    new_line = run(args_again, Job(row, seed, flags), anew=True)
    if new_line is None:
        return False
    old_line = runs[row, seed]
    if new_line["weights"] == old_line["weights"]:
        print(f"{row}, seed {seed}: the second run has the same weights, bit for bit.", flush=True)
        return True
    print(
        f"{row}, seed {seed}: the second run has other weights. "
        f"The first one ran on {old_line['device']}.",
        flush=True,
    )
    return False


# ------------------------------------------------------------------- pages and small checkpoints


def page_blocks(study):
    """Return {name: text} of the marked places of all pages."""
    return verdicts.page_blocks(study) | map_claims.page_blocks(study["laptop"])


def write_pages(study):
    """Write the tables into the pages, and draw the figures."""
    blocks = page_blocks(study)
    for name in ("README.md", "claims.md", "tables.md"):
        page = RESULTS / name
        page.write_text(verdicts.fill_page(page.read_text(), blocks))
    figures.draw_all(study["laptop"], RESULTS / "figures")


def save_small_checkpoints(args, runs):
    """Save the teachers of `same` and `different` that are the median of their row in selectivity.

    The row is that of the study of maps; of an even number of seeds, the upper median counts. The
    weights are in float16, so that the files stay small. Rows without runs are left out.
    """
    for row in ("same", "different"):
        selectivity = verdicts.sample(runs, row, verdicts.SELECTIVITY, map_claims.SEEDS)
        if not selectivity:
            continue
        seeds = sorted(selectivity, key=selectivity.get)
        median_seed = seeds[len(seeds) // 2]
        path = ROOT / f"{args.runs}/laptop/{row}/seed-{median_seed}/ckpt.pth"
        if path.exists():
            checkpoint = weights.read_checkpoint(str(path))
            teacher = {name: tensor.half() for name, tensor in checkpoint["teacher"].items()}
            small = {
                "config": checkpoint["config"] | {"digits": "auto", "data_root": "data"},
                "epoch": checkpoint["epoch"],
                "teacher": teacher,
                "metrics": checkpoint["metrics"],
            }
            torch.save(small, RESULTS / "checkpoints" / f"{row}.pth")


# -------------------------------------------------------------------------------- command line


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="results/study.py",
        description="Run the studies of the paper's claims and of maps, and write their pages and figures.",
    )
    parser.add_argument(
        "--preset",
        choices=["laptop", "paper"],
        default="laptop",
        help="train with the settings of this preset; paper needs a GPU [laptop]",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="CLAIM",
        choices=ALL_CLAIMS,
        help="run only the rows that these claims need, such as F1 or M8 [all rows]",
    )
    parser.add_argument(
        "--tables",
        action="store_true",
        help="run nothing, but write the pages and figures from study.json",
    )
    parser.add_argument(
        "--again",
        nargs=2,
        metavar=("ROW", "SEED"),
        help="repeat a run of study.json, and compare the weights",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        help="train this many networks at a time [on a CPU one per core, with one thread; else 1]",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="train on this device [cuda if there is one, else cpu]",
    )
    parser.add_argument(
        "--data-root",
        default="data",
        help="read MNIST from the folder MNIST/raw/ in this one [data, in the project's root]",
    )
    parser.add_argument(
        "--weights",
        help="start from these weights: none, or a file [those of the preset]",
    )
    parser.add_argument(
        "--runs",
        default="runs/study",
        help="write the runs into this folder [runs/study, in the project's root]",
    )
    args = parser.parse_args(argv)
    if not args.jobs:
        args.jobs = os.cpu_count() if args.device == "cpu" else 1
    return args


def run_command(args):
    """Do what the command line asks for. Return the exit status."""
    if args.again:
        row, seed = args.again
        if not seed.isdecimal():
            raise ValueError(
                f"--again {row} {seed}: use a row and a number, such as --again same 10"
            )
        return 0 if run_again(args, row, int(seed)) else 1
    if args.tables:
        study = read_study()
        if not study["laptop"]:
            raise ValueError("study.json has no runs; the pages stay as they are")
        write_pages(study)
        return 0
    is_complete = run_all(args)
    study = read_study()
    write_pages(study)
    if args.preset == "laptop":
        save_small_checkpoints(args, study["laptop"])
    return 0 if is_complete else 1


def main(argv=None):
    args = parse_args(argv)
    try:
        return run_command(args)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"results/study.py: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command continues from here.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
