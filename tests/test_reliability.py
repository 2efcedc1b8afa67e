"""A run can be stopped at any instant and goes on as if it had not been; whatever comes in, nothing breaks."""

import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import train
import visualize
import vit

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--preset", "laptop", "--digits", "sklearn", "--device", "cpu", "--batch-size", "8"]
RUN = [*SMALL, "--images-per-epoch", "32", "--epochs", "3"]  # 3 epochs of 4 steps
# train.py with the figures at its end on a few images
DRIVER = """import sys, train, visualize
visualize.TEST_IMAGES = visualize.BANK_IMAGES = visualize.VALIDATION_IMAGES = train.KNN_BANK = 40
sys.exit(train.main(sys.argv[1:]))
"""
SECONDS = 120  # after which a process counts as stuck


def counts(short, long):
    """A parameter `count`: a few in every run of the tests, many with -m long."""
    return pytest.mark.parametrize("count", [short, pytest.param(long, marks=pytest.mark.long)])


@pytest.fixture
def quick(monkeypatch):
    for module, name in ((visualize, "TEST_IMAGES"), (visualize, "BANK_IMAGES"), (visualize, "VALIDATION_IMAGES"),
                         (train, "KNN_BANK")):
        monkeypatch.setattr(module, name, 40)


# ------------------------------------------------------------------------ processes, and what they leave


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """Starts `python train.py argv` in a folder: a process of its own, forked where torch is imported already."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        context.set_forkserver_preload(["train", "visualize"])

        def start(argv, folder, ranks=1):
            process = context.Process(target=command, args=(argv, str(folder), ranks))
            process.start()
            return process

        start(["--help"], tmp_path_factory.mktemp("first")).join()  # now the imports are done, and times mean something
        yield start


@pytest.fixture(scope="module")
def fork_ranks(fork):
    """The same with 2 ranks, which find each other as torchrun's do."""
    return partial(fork, ranks=2)


def command(argv, folder, ranks):
    """What a forked process does."""
    os.chdir(folder)
    if ranks > 1:
        torch.set_num_threads(1)  # as torchrun has it
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        rank = int(os.fork() == 0)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    with open("out.txt", "a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.argv = ["train.py", *argv]
    exec(DRIVER, {})


def torchrun(argv, folder):
    """`python train.py argv` under torchrun with 2 ranks."""
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
    return shell([*ranks, sys.executable, "-c", DRIVER, *argv], folder)


def shell(arguments, folder):
    with open(Path(folder) / "out.txt", "a") as out:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, stdout=out, stderr=out, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )


def status(process):
    """The exit status of a process once it has ended."""
    if isinstance(process, subprocess.Popen):
        return process.wait(SECONDS)
    process.join(SECONDS)
    return process.exitcode


def wait_for(done, process):
    """Until `done()` holds. Returns the time."""
    end = time.monotonic() + SECONDS
    while not done():
        alive = process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()
        assert alive and time.monotonic() < end
        time.sleep(0.002)
    return time.monotonic()


def family(pid):
    """A process and all that it started; each of torchrun's workers has a session of its own."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found


def kill(process):
    for pid in family(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert status(process) == -signal.SIGKILL


def wait_until_gone(pids):
    end = time.monotonic() + SECONDS
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.01)


def log_of(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def assert_same_end(run, whole):
    """Weights and what else a checkpoint holds bit for bit, the log but for its times, and no files too many."""
    one, other = (vit.read_checkpoint(folder / "ckpt.pth") for folder in (run, whole))
    for part in ("student", "teacher", "loss"):
        assert one[part].keys() == other[part].keys()
        for name, value in other[part].items():
            assert torch.equal(one[part][name], value), (part, name)
    assert one["step"] == other["step"] and one["epoch_loss"] == other["epoch_loss"]
    assert log_of(run) == log_of(whole) and len(log_of(run)) == 1 + other["config"]["epochs"]
    assert {path.name for path in run.iterdir()} <= {path.name for path in whole.iterdir()}


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory, fork):
    """The folder of the run with these flags that nobody stops, the seconds to its first checkpoint and from there on."""
    known = {}

    def run(flags, start):
        if (*flags, start) not in known:
            folder, began = tmp_path_factory.mktemp("whole"), time.monotonic()
            process, run = start([*RUN, *flags, "--output", "run"], folder), folder / "run"
            first = wait_for((run / "ckpt.pth").exists, process)
            last = wait_for(lambda: (run / "log.jsonl").exists() and len(log_of(run)) == 4, process)
            assert status(process) == 0, (folder / "out.txt").read_text()[-2000:]
            known[(*flags, start)] = run, first - began, last - first
        return known[(*flags, start)]

    return run


# ------------------------------------------------------------------------------------- killed


def killed_and_resumed(tmp_path, unstopped, start, flags, count, seed):
    """`count` runs, each killed at a random instant and resumed. Half of them write a checkpoint after every step."""
    rng, met = random.Random(seed), []
    whole, first, last = unstopped(flags, start)
    for trial in range(count):
        folder = tmp_path / f"killed-{trial}"
        folder.mkdir()
        run, often = folder / "run", ["--checkpoint-minutes", "1e-9"] * (trial % 2 == 0)
        begin = [*RUN, *flags, *often, "--output", "run"]
        process = start(begin, folder)
        if trial % 5 < 4:
            wait_for((run / "ckpt.pth").exists, process)
            time.sleep(rng.uniform(0, last))
        else:
            time.sleep(rng.uniform(0.5, 1) * first)  # before there is anything
        kill(process)
        written = (run / "ckpt.pth").exists() or (run / "ckpt.prev.pth").exists()
        step = max((vit.read_checkpoint(path)["step"] for path in run.glob("ckpt*.pth")), default=None)
        met.append((step, sorted(path.name for path in run.glob(".part-*"))))
        process = start(["--resume", "run"] if written else begin, folder)
        ended = step == 12  # killed while the figures were drawn: there is nothing to go on with
        text = f"after step {step}\n" + (folder / "out.txt").read_text()[-2000:] if status(process) else "well"
        assert text == "well" or (ended and "has had its 3 epochs" in text), text
        assert_same_end(run, whole)
    print(f"killed after step, with these files half-written: {met}")


@counts(3, 20)
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, unstopped, fork, count):
    """SIGKILL at any instant: before the first checkpoint, in a step, in mid-checkpoint, in mid-log."""
    killed_and_resumed(tmp_path, unstopped, fork, [], count, seed=0)


@counts(1, 3)
@pytest.mark.parametrize("flags", [["--micro-batch", "4"], ["--loss", "dino"]])
def test_killed_in_pieces_and_with_dinos_loss(tmp_path, unstopped, fork, flags, count):
    killed_and_resumed(tmp_path, unstopped, fork, flags, count, seed=1)


@counts(1, 3)
def test_two_ranks_killed(tmp_path, unstopped, fork_ranks, count):
    killed_and_resumed(tmp_path, unstopped, fork_ranks, [], count, seed=2)


@pytest.mark.long
def test_torchrun_killed(tmp_path, unstopped):
    """With both of its workers: they would go on without it."""
    killed_and_resumed(tmp_path, unstopped, torchrun, [], count=3, seed=3)


@pytest.mark.parametrize("harm", [False, True])
def test_a_kill_between_two_renames_leaves_a_checkpoint(tmp_path, monkeypatch, quick, harm):
    """Each rename of the first save of a resumed run may be the last thing that it does, after `harm` to the last
    checkpoint too: that must not push out the whole one that the run went on from."""
    folder, path, replace = tmp_path / "run", tmp_path / "run" / "ckpt.pth", os.replace
    flags = [*SMALL, "--images-per-epoch", "16", "--epochs", "2", "--checkpoint-minutes", "1e-9", "--output", str(folder)]
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_log", lambda folder, history: os.kill(os.getpid(), signal.SIGTERM) if history[-1]["epoch"] else None)
        assert train.main(flags) == 143  # after step 2 of 4
    if harm:
        path.write_bytes(path.read_bytes()[:-1000])
    shutil.copytree(folder, tmp_path / "kept")
    for last in range(5):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "kept", folder)

        def dying(*args, left=[None] * last):  # a list for each `last`
            if not left:
                raise KeyboardInterrupt
            left.pop()
            replace(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            assert train.main(["--resume", str(folder)]) == 130
        assert train.main(["--resume", str(folder)]) == 0, last
        assert vit.read_checkpoint(path)["step"] == 4


def test_two_runs_started_at_once_have_a_folder_each(tmp_path, unstopped, fork):
    whole = unstopped([], fork)[0]
    processes = [fork(RUN, tmp_path) for _ in range(2)]
    assert [status(process) for process in processes] == [0, 0]
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert folders == ["clutter-nce-same", "clutter-nce-same-2"]
    for name in folders:
        assert_same_end(tmp_path / "runs" / name, whole)
        assert {p.name for p in (tmp_path / "runs" / name).iterdir()} == {p.name for p in whole.iterdir()}


# ------------------------------------------------------------------------------------ signals

LONGER = [*SMALL, "--images-per-epoch", "800", "--epochs", "50", "--checkpoint-minutes", "1e-9", "--output", "run"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_tells_how_to_go_on(tmp_path, number):
    process = shell(["-c", DRIVER, *LONGER], tmp_path)
    wait_for((tmp_path / "run" / "ckpt.prev.pth").exists, process)  # the first step is done
    process.send_signal(number)
    assert status(process) == 128 + number
    text = (tmp_path / "out.txt").read_text()
    assert text.endswith("\nstopped; python train.py --resume run goes on\n") and "Traceback" not in text
    assert vit.read_checkpoint(tmp_path / "run" / "ckpt.pth")["step"] > 0


def test_a_second_interrupt_leaves_at_once_from_outside_too(tmp_path):
    """In a step that takes seconds; the checkpoint stays the one from before it."""
    slow = [*LONGER, "--batch-size", "800"]
    process = shell(["-c", DRIVER, *slow], tmp_path)
    wait_for((tmp_path / "run" / "log.jsonl").exists, process)
    time.sleep(0.5)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert status(process) == 130
    text = (tmp_path / "out.txt").read_text()
    assert text.endswith("\nleft at once; python train.py --resume run goes on from its last checkpoint\n")
    assert vit.read_checkpoint(tmp_path / "run" / "ckpt.pth")["step"] == 0


@pytest.mark.parametrize("numbers", [
    [signal.SIGTERM],
    pytest.param([signal.SIGINT], marks=pytest.mark.long),
    pytest.param([signal.SIGINT] * 2, marks=pytest.mark.long),
    pytest.param([signal.SIGTERM] * 2, marks=pytest.mark.long),
])
def test_a_signal_to_torchrun_reaches_the_ranks(tmp_path, numbers, unstopped, fork_ranks):
    """The ranks end their step and write the checkpoint; the run goes on from there, with as many ranks."""
    whole = unstopped([], fork_ranks)[0]
    process = torchrun([*RUN, "--output", "run"], tmp_path)
    wait_for((tmp_path / "run" / "log.jsonl").exists, process)
    time.sleep(0.1)
    workers = family(process.pid)[1:]
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.02)
    assert status(process) != 0  # torchrun's own
    wait_until_gone(workers)  # torchrun, told twice, does not wait for them
    text = (tmp_path / "out.txt").read_text()
    print(process.returncode, text)
    assert "stopped; python train.py --resume run goes on" in text
    assert 0 < vit.read_checkpoint(tmp_path / "run" / "ckpt.pth")["step"] < 12
    assert status(torchrun(["--resume", "run"], tmp_path)) == 0
    assert_same_end(tmp_path / "run", whole)


# ------------------------------------------------------------------------------ damaged checkpoints


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, fork):
    """A run that a signal stopped in its second epoch, beside the same run that none did."""
    folder = tmp_path_factory.mktemp("stopped")
    flags = [*SMALL, "--images-per-epoch", "32", "--epochs", "2", "--output"]
    assert status(fork([*flags, "whole"], folder)) == 0
    process = fork([*flags, "run", "--checkpoint-minutes", "1e-9"], folder)
    wait_for(lambda: (folder / "run" / "log.jsonl").exists() and len(log_of(folder / "run")) == 2, process)
    os.kill(process.pid, signal.SIGTERM)
    assert status(process) == 143
    assert vit.read_checkpoint(folder / "run" / "ckpt.prev.pth")["step"] >= 3
    return folder


def damaged(raw, what, count):
    """So many versions of a file: cut off at each percent, or with one byte changed, anywhere or in its pickle."""
    rng = random.Random(0)
    if what == "cut":
        return [raw[: len(raw) * k // count] for k in range(count)]
    first, end = 0, len(raw)
    if what == "pickled":  # names, numbers and shapes: a hundredth of the file, and the part that a program acts on
        with zipfile.ZipFile(io.BytesIO(raw)) as file:
            pickled = file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))
        first = raw.index(pickled)
        end = first + len(pickled)
    versions = []
    for _ in range(count):
        at = rng.randrange(first, end)
        versions.append(raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :])
    return versions


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("previous", [True, False])
@pytest.mark.parametrize("what,count", [
    ("cut", 8), ("flipped", 15), ("pickled", 5),
    *[pytest.param(what, n, marks=pytest.mark.long) for what, n in (("cut", 100), ("flipped", 200), ("pickled", 200))],
])
def test_a_damaged_checkpoint_is_told_and_never_trained_on(tmp_path, monkeypatch, capsys, quick, stopped, what, count, previous):
    """A run goes on from the one before it, with a warning; without that there is one line, and nothing is touched.

    A changed byte that no one reads may pass, with the right weights: a few between the records of the file, and in
    its pickle many, since pickle numbers all that it has read and seldom refers to a number.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(visualize, "report", lambda *args: None)  # what is drawn is not the question here
    monkeypatch.setattr(visualize, "draw_curves", lambda *args: None)
    seen, passed = [], []
    monkeypatch.setattr(visualize, "look", lambda subject, folder: seen.append(subject.backbone.state_dict()))
    good = vit.read_checkpoint(stopped / "run" / "ckpt.pth")
    end = vit.read_checkpoint(stopped / "whole" / "ckpt.pth")
    for k, version in enumerate(damaged((stopped / "run" / "ckpt.pth").read_bytes(), what, count)):
        shutil.copytree(stopped / "run", "run")
        Path("run/ckpt.pth").write_bytes(version)
        if not previous:
            os.remove("run/ckpt.prev.pth")
        capsys.readouterr()
        drawn, error = visualize.main(["run/ckpt.pth"]), capsys.readouterr().err
        passed += [k] * (drawn == 0)
        if drawn == 0:
            assert same_weights({"backbone." + n: v for n, v in seen.pop().items()}, {
                n: v for n, v in good["teacher"].items() if n.startswith("backbone.")}), k
        else:
            assert drawn == 2 and error.count("\n") == 1 and "run/ckpt.pth" in error, (k, error)
        resumed, error = train.main(["--resume", "run"]), capsys.readouterr().err
        if previous or resumed == 0:
            assert resumed == 0, (k, error)
            assert "going on from run/ckpt.prev.pth" in error or drawn == 0, (k, error)
            ended = vit.read_checkpoint("run/ckpt.pth")
            assert same_weights(ended["student"], end["student"]) and same_weights(ended["teacher"], end["teacher"]), k
            assert log_of(Path("run")) == log_of(stopped / "whole")
        else:
            assert resumed == 2 and error.count("\n") == 1 and "run/ckpt.pth" in error, (k, error)
            assert Path("run/ckpt.pth").read_bytes() == version
            with pytest.raises((OSError, ValueError)):
                vit.read_checkpoint("run/ckpt.pth")
        shutil.rmtree("run")
    print(f"{count - len(passed)} of {count} were told, {len(passed)} harmless")
    assert len(passed) <= (count // 10 if what != "pickled" else 0.8 * count)


# ----------------------------------------------------------------------------------- full disk


@pytest.mark.long
def test_a_disk_that_is_full_in_mid_checkpoint(tmp_path, fork, unstopped):
    """Room for two checkpoints, not for a third: the run ends in one line, and goes on once there is room."""
    whole = unstopped([], fork)[0]
    size, folder = (whole / "ckpt.pth").stat().st_size, tmp_path / "disk"
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * size)}", "tmpfs", str(folder)]
    if subprocess.run(options, check=False, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root alone, where the machine lets it")
    try:
        assert status(fork([*RUN, "--output", str(folder / "run")], tmp_path)) == 1
        line = (tmp_path / "out.txt").read_text().splitlines()[-1]
        assert line.startswith("train.py: error:") and "ckpt.pth could not be written" in line
        assert vit.read_checkpoint(folder / "run" / "ckpt.pth")["step"] == 4
        assert not (folder / "run" / ".part-ckpt.pth").exists()
        subprocess.run(["mount", "-o", f"remount,size={10 * size}", str(folder)], check=True)
        assert status(fork(["--resume", str(folder / "run")], tmp_path)) == 0
        assert_same_end(folder / "run", whole)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# ------------------------------------------------------------------------------------- memory


def resident(pid):
    """Bytes in memory of a process; None once it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024


@pytest.mark.long
def test_memory_does_not_grow(tmp_path):
    """Over the 2,000 steps of the laptop preset, from the second quarter to the last. STEPS=400 tries it in a fifth."""
    steps = int(os.environ.get("STEPS", "2000"))
    flags = ["--preset", "laptop", "--digits", "sklearn", "--device", "cpu", "--images-per-epoch", str(64 * steps // 10)]
    process = shell(["-c", DRIVER, *flags, "--output", "run"], tmp_path)
    wait_for((tmp_path / "run" / "log.jsonl").exists, process)
    sizes = []
    while len(log_of(tmp_path / "run")) < 11 and (size := resident(process.pid)):
        sizes.append(size)
        time.sleep(0.5)
    process.kill()
    process.wait()
    quarter = len(sizes) // 4
    second, last = np.mean(sizes[quarter : 2 * quarter]), np.mean(sizes[-quarter:])
    print(f"{steps} steps: {second / 2**20:.1f} MiB in the second quarter, {last / 2**20:.1f} in the last, "
          f"{max(sizes) / 2**20:.1f} at most")
    assert len(sizes) >= 40 and abs(last / second - 1) < 0.01


# ------------------------------------------------------------------------------ any command line

WORDS = ["", " ", "-", "--", "nan", "inf", "-inf", "1e400", "-1", "0", "0.5", "1,5", ",", "none", "ünï✓", "\udcff", "a\nb", "'", "%s",
         "{}", "nowhere", "text.pth", "empty.pth", "folder", "/proc/self/mem", "/dev/null", "x" * 300, "9" * 30, "good.pth", "picture.png"]


def flags_of(choices, words=WORDS):
    """Command lines of up to four flags; a value is one that may be right, or any word."""
    def one(name):
        values = choices[name]
        if values is None:
            return st.just([name])
        # `name=value` reaches the program where a bare value that begins with - would be taken for a flag
        return st.one_of(*[st.sampled_from(values)] * 3, st.sampled_from(words), st.text(max_size=5)).map(
            lambda value: [name, value] if not value.startswith("-") else [f"{name}={value}"])
    return st.lists(st.sampled_from(sorted(choices)).flatmap(one), max_size=4).map(lambda found: [part for pair in found for part in pair])


NUMBERS = ["1", "2", "0", "-1", "1.5", "nan", "1e999", "", "seven", "٣", "1_0", str(2**31), str(2**63), str(-(2**63) - 1)]
TRAIN_FLAGS = {
    "--loss": ["nce", "dino"], "--views": ["same", "different"], "--crops": ["1", "2", "4", "3"],
    "--dataset": ["clutter", "stl10"], "--split": ["train", "unlabeled"],
    "--background": ["black", "texture", "folder", "text.pth", ""], "--texture-pool": ["0", "3", "10", "-1", "x"],
    "--digits": ["auto", "mnist", "sklearn"], "--weights": ["none", "good.pth", "text.pth", "dino", "dino_vitb8"],
    "--image-size": ["7", "14", "28", "56", "63", "70", "1", "50", "0", "-7"], "--patch-size": ["7", "14", "28", "5", "0", "-7"],
    "--heads": ["1", "2", "96", "0", "-3", "5"], "--batch-size": ["2", "4", "16", "1", "0", "-8", "17", "3"],
    "--micro-batch": ["1", "2", "3", "8", "0", "-1"], "--checkpoint-blocks": None, "--epochs": ["1", "2", "0", "-1", "1.5", "", "nan"],
    "--lr": ["0.1", "1e-300", "1e30", "0", "-1", "nan", "inf", ""], "--temperature": ["0.2", "1e-30", "1e30", "0", "-1", "nan", "inf"],
    "--seed": NUMBERS, "--device": ["cpu", "cpu:0", "cpu:1", "cuda:77", "meta", "mps", "tpu", ""],
    "--precision": ["auto", "float32", "bfloat16", "float16", "int8"], "--keep-epochs": ["0", "1", "0,1", "2", "1,", "-1", ",", "1.5"],
    "--data-root": ["folder", "nowhere", ""], "--checkpoint-minutes": ["1e-9", "1e30", "0", "-1", "nan", "inf"],
    "--resume": ["good.pth", "finished", "nowhere", "folder", "text.pth", ""], "--output": ["new", "folder", "finished", "text.pth", ""],
    "--preset": ["laptop", "desktop"],
}
VISUALIZE_FLAGS = {
    "--weights": ["good.pth", "none", "bare.pth", "text.pth", "dino"], "--images": ["picture.png", "grey.png", "text.pth", "folder"],
    "--image-size": ["7", "14", "56", "70", "50", "0", "-7"], "--digits": ["sklearn", "auto", "mnist"],
    "--background": ["black", "texture", "folder", ""], "--data-root": ["folder", ""],
    "--device": ["cpu", "cpu:1", "cuda:77", "meta", ""], "--output": ["new", "folder", "text.pth", ""],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, fork):
    """A folder with files of all kinds, that command lines may name."""
    folder = tmp_path_factory.mktemp("place")
    assert status(fork([*SMALL, "--images-per-epoch", "16", "--epochs", "1", "--output", "finished"], folder)) == 0
    shutil.copy(folder / "finished" / "ckpt.pth", folder / "good.pth")
    torch.save(vit.read_checkpoint(folder / "good.pth")["teacher"], folder / "bare.pth")
    (folder / "text.pth").write_text("hello")
    (folder / "empty.pth").write_text("")
    (folder / "folder").mkdir()
    Image.new("RGB", (60, 40), "red").save(folder / "picture.png")
    Image.new("L", (8, 8)).save(folder / "grey.png")
    return folder


def told(main, argv):
    """The status of a command line and what it wrote to standard error; an exception is nobody's answer."""
    out, error = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()  # as strict as a terminal
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            code = main(argv)
        except SystemExit as left:  # argparse's, with its usage
            assert "usage:" in error.getvalue() or left.code == 0
            return left.code, None
    return code, error.getvalue()


@pytest.fixture
def in_place(place, tmp_path, monkeypatch, quick):
    """In a copy of `place`, with no network, and with the smallest figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(torchvision.datasets.STL10, "url", "http://127.0.0.1:9/stl10")
    monkeypatch.setattr(vit, "DINO_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))

    def fresh():
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(place, tmp_path, dirs_exist_ok=True)

    return fresh


def try_command_lines(main, lines, fresh, count):
    codes = []

    @settings(max_examples=count, derandomize=True, deadline=None, database=None, print_blob=False,
              suppress_health_check=list(HealthCheck))
    @given(lines)
    def check(argv):
        fresh()
        code, error = told(main, argv)
        codes.append(code)
        assert code in (0, 1, 2)
        if code and error is not None:
            assert "error: " in error.splitlines()[-1] and "Traceback" not in error
        if code == 2 and error is not None:
            assert error.count("\n") == 1, error

    check()
    print({code: codes.count(code) for code in sorted(set(codes))})
    assert codes.count(0) > count // 20 and codes.count(2) > count // 20  # else the lines were too tame, or too wild


@counts(20, 700)
def test_any_command_line_of_train(in_place, count):
    """Status 0, or 2 and one line; or 1 and one line of a run whose numbers left those that there are."""
    base = [*SMALL, "--images-per-epoch", "16", "--epochs", "1"]
    try_command_lines(train.main, flags_of(TRAIN_FLAGS).map(lambda flags: base + flags), in_place, count)


@counts(10, 300)
def test_any_command_line_of_visualize(in_place, count):
    files = st.lists(st.sampled_from(["good.pth", "good.pth", "bare.pth", "finished/ckpt.pth", "text.pth", "nowhere", "folder", "", "ü"]),
                     min_size=1, max_size=2)
    lines = st.tuples(files, flags_of(VISUALIZE_FLAGS)).map(lambda both: both[0] + both[1])
    try_command_lines(visualize.main, lines, in_place, count)
