"""A run can be stopped at any instant and goes on as if it had not been; nothing breaks it."""

import contextlib
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_train import FEW, TINY, assert_same, before_step, few_images, log_of, read, resume, start

import metrics
import train
import visualize
import vit

__all__ = ["few_images"]  # a fixture of every test
ROOT = Path(__file__).resolve().parent.parent
EPOCHS = "--images-per-epoch 32 --epochs 3"  # 3 epochs of 4 steps
OFTEN = "--checkpoint-minutes 1e-9"  # a checkpoint after every step


def counts(short, long):
    """A parameter `count`: a few in every run of the tests, many with -m long."""
    return pytest.mark.parametrize("count", [short, pytest.param(long, marks=pytest.mark.long)])


def send(*numbers):
    def kill(parts):
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.05)  # two signals at once are one

    return kill


def assert_same_end(run, whole):
    """Checkpoint bit for bit, the log but for its times, and no files too many."""
    one, other = read(run), read(whole)
    one["config"] |= {"checkpoint_minutes": other["config"]["checkpoint_minutes"]}
    assert_same(one, other)
    assert_same(log_of(run), log_of(whole))
    assert {path.name for path in run.iterdir()} <= {path.name for path in whole.iterdir()}


@pytest.mark.parametrize("flags", ["--loss nce", "--loss dino", "--micro-batch 4"])
def test_a_run_stopped_anywhere_ends_as_if_it_had_not_been(tmp_path, monkeypatch, capsys, flags):
    """Bit for bit: in the first step, in the last of an epoch, and in mid-epoch."""
    flags, whole, run = f"{flags} --images-per-epoch 32", tmp_path / "whole", tmp_path / "run"
    flags += " --keep-epochs 0,1"
    assert start(whole, flags) == 0
    for step, number in ((0, signal.SIGINT), (3, signal.SIGTERM), (5, signal.SIGTERM)):
        with monkeypatch.context() as patch:
            steps = before_step(patch, step, send(number))
            assert (resume(run) if step else start(run, flags)) == 128 + number
        assert f"stopped; python train.py --resume {run} goes on" in capsys.readouterr().err
        assert steps[-1] == step and read(run)["step"] == step + 1
    assert resume(run) == 0
    assert_same_end(run, whole)
    assert sorted(os.listdir(run)) == sorted(os.listdir(whole))
    for name in ("epoch-0.pth", "epoch-1.pth"):  # kept once, not again by the run that goes on
        one, other = (vit.read_checkpoint(folder / name)["teacher"] for folder in (run, whole))
        assert_same(one, other)


@pytest.mark.parametrize("last", range(4))
def test_a_run_that_ends_between_two_files_repeats_what_is_not_kept(tmp_path, monkeypatch, last):
    """Whatever rename is its last: the log has no line too many, the checkpoint is whole."""
    whole, run, replace, renamed = tmp_path / "whole", tmp_path / "run", os.replace, []

    def leave(*paths):
        if len(renamed) > last:
            raise KeyboardInterrupt
        renamed.append(paths)
        replace(*paths)

    assert start(whole) == 0
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", leave)
        assert start(run) == 130
    steps, lines = read(run)["step"], len(log_of(run)) if last else 0
    assert (steps, lines) == [(0, 0), (0, 1), (0, 2), (2, 2)][last]
    assert resume(run) == 0
    assert_same_end(run, whole)


def test_a_second_interrupt_leaves_at_once(tmp_path, monkeypatch, capsys):
    """In mid-step; the checkpoint from before the step is what goes on."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert start(tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        before_step(patch, 1, send(signal.SIGINT, signal.SIGINT))
        assert start(tmp_path / "left") == 130
    assert "interrupted; python train.py --resume RUN goes on" in capsys.readouterr().err
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert read(tmp_path / "left")["step"] == 0
    assert resume(tmp_path / "left") == 0
    assert_same_end(tmp_path / "left", tmp_path / "whole")


def test_a_checkpoint_of_an_older_version_goes_on(tmp_path, monkeypatch):
    """It has a digest, a count of skipped steps, and each rank's part of the epoch's loss."""
    shipped = vit.read_checkpoint(ROOT / "results" / "checkpoints" / "same.pth")
    changed = {"digits": "sklearn", "batch_size": 8, "images_per_epoch": 16, "epochs": 3}
    config = shipped["config"] | changed
    student = vit.build_network(config)
    student.load_state_dict(shipped["teacher"])
    parts = train.make_parts(vit.OLDER | config, student)
    content = {name: part.state_dict() for name, part in parts.items()}
    content |= {"config": config, "step": 3, "epoch": 1, "metrics": shipped["metrics"][:2]}
    content |= {"epoch_loss": [20.0, 30.0], "skipped": 0, "threads": 2, "digest": "0" * 64}
    torch.save(content, tmp_path / "ckpt.pth")
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert resume(tmp_path) == 0 and threads == [2]  # the last bits of a sum depend on them
    lines = log_of(tmp_path)
    assert lines[:2] == shipped["metrics"][:2] and [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert 25 < lines[2]["loss"] < 27 and lines[3]["loss"] < 4


@pytest.mark.parametrize(
    "flags,says",
    [
        ("", "has ended after 2 epochs"),
        ("--epochs 3 --loss dino", "--loss dino: the run has nce"),
        ("--epochs 3 --blur 0 1", "--blur"),
        ("--epochs 3 --output x", "without --output"),
        ("--epochs 3", None),
        ("--epochs 3 --lr 0.000125 --symmetric --global-crops-scale 0.5 1 --blur 0.5 1.5", None),
    ],
)
def test_a_run_that_has_ended_goes_on_with_more_epochs_alone(tmp_path, capsys, flags, says):
    """Flags that repeat what the run has are no conflict."""
    assert start(tmp_path, "--blur 0.5 1.5 --keep-epochs 1,2") == 0
    before, _ = read(tmp_path), capsys.readouterr()
    assert resume(tmp_path, flags) == (2 if says else 0)
    error, after = capsys.readouterr().err, read(tmp_path)
    if says:
        assert says in error and error.count("\n") == 1
        assert_same(before, after)
    else:
        assert [line["epoch"] for line in after["metrics"]] == [0, 1, 2, 3]
        assert after["config"] == before["config"] | {"epochs": 3}


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """Starts train.py in a folder, a process forked where torch is imported already."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        patch.setenv("OMP_NUM_THREADS", "1")  # a fork of a process that has used more may hang
        context.set_forkserver_preload(["test_reliability"])

        def begin(flags, folder, ranks=1):
            folder.mkdir(exist_ok=True)
            process = context.Process(target=in_process, args=(flags, str(folder), ranks))
            process.start()
            return process

        begin("--help", tmp_path_factory.mktemp("first")).join()  # the imports
        yield begin


def in_process(flags, folder, ranks):
    os.setsid()
    os.chdir(folder)
    if ranks > 1:
        torch.set_num_threads(1)  # as torchrun has it
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        found = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        os.environ |= found | {"RANK": str(int(os.fork() == 0))}
    with open("out.txt", "a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    vars(metrics).update(FEW)
    sys.exit(train.main(flags.split()))


def status(process):
    """The exit status of a process once it has ended; after two minutes it counts as stuck."""
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize(
    "flags,ranks,count",
    [
        ("", 1, 4),
        ("--micro-batch 4", 1, 1),
        ("--loss dino", 1, 1),
        ("", 2, 1),
        pytest.param("", 1, 30, marks=pytest.mark.long),
        pytest.param("--loss dino --micro-batch 2", 2, 10, marks=pytest.mark.long),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, fork, flags, ranks, count):
    """At any instant: before the first checkpoint, in a step, in mid-checkpoint, in mid-log.

    Half of the runs write a checkpoint after every step; every third is asked, not killed.
    """
    rng, met, whole = random.Random(count), [], tmp_path / "whole" / "run"
    new, began = f"{TINY} {EPOCHS} {flags} --output run ", time.monotonic()
    assert status(fork(new, whole.parent, ranks)) == 0
    seconds = time.monotonic() - began
    for trial in range(count):
        folder = tmp_path / str(trial)
        process, run = fork(new + OFTEN * (trial % 2), folder, ranks), folder / "run"
        time.sleep(seconds * (0.1 + rng.random()))
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(process.pid, signal.SIGTERM if trial % 3 == 2 else signal.SIGKILL)
        status(process)
        step = read(run)["step"] if (run / "ckpt.pth").exists() else None
        met.append((step, sorted(path.name for path in run.glob(".part-*"))))
        seconds *= 0.8 if step == 12 else 1  # the first run may have been slow
        code = status(fork(new if step is None else "--resume run", folder, ranks))
        text = (folder / "out.txt").read_text()[-2000:]
        # killed while the numbers at the end were computed there is nothing to go on with
        assert code == 0 or (step == 12 and "has ended after 3 epochs" in text), (step, text)
        assert_same_end(run, whole)
    print(f"killed after step, with these files half-written: {met}")


def test_two_runs_started_at_once_have_a_folder_each(tmp_path, fork):
    processes = [fork(f"{TINY} {EPOCHS}", tmp_path) for _ in range(2)]
    assert [status(process) for process in processes] == [0, 0]
    folders = sorted((tmp_path / "runs").iterdir())
    assert [f.name for f in folders] == ["clutter-nce-same", "clutter-nce-same-2"]
    assert_same_end(*folders)
    assert sorted(os.listdir(folders[0])) == sorted(os.listdir(folders[1]))


def damaged(raw, what, count):
    """Versions of a file: cut off anywhere, or one bit changed, anywhere or in its pickle."""
    rng = random.Random(0)
    if what == "cut":
        return [raw[: len(raw) * k // count] for k in range(count)]
    first, end = 0, len(raw)
    if what == "pickled":  # names and shapes: a small part, which a program acts on
        with zipfile.ZipFile(io.BytesIO(raw)) as file:
            pickled = file.read(next(name for name in file.namelist() if "data.pkl" in name))
        end = (first := raw.index(pickled)) + len(pickled)
    places = [rng.randrange(first, end) for _ in range(count)]
    flipped = [bytes([raw[at] ^ 1 << rng.randrange(8)]) for at in places]
    return [raw[:at] + byte + raw[at + 1 :] for at, byte in zip(places, flipped)]


@counts(10, 200)
@pytest.mark.parametrize("what", ["cut", "flipped", "pickled"])
def test_a_damaged_checkpoint_is_told(tmp_path, monkeypatch, capsys, what, count):
    """And never trained on, nor touched. A changed bit that no one reads may pass."""
    monkeypatch.chdir(tmp_path)
    assert start("whole") == 0
    with monkeypatch.context() as patch:
        before_step(patch, 2, send(signal.SIGTERM))
        assert start("stopped") == 143
    good, raw, passed = read(Path("stopped"))["teacher"], Path("stopped/ckpt.pth").read_bytes(), []
    good = {n.removeprefix("backbone."): v for n, v in good.items() if "head." not in n}
    for number, version in enumerate(damaged(raw, what, count)):
        shutil.copytree("stopped", "run")
        Path("run/ckpt.pth").write_bytes(version)
        before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
        loaded = None
        with contextlib.suppress(ValueError):
            loaded, _ = vit.load_backbone("run/ckpt.pth")
            assert_same(dict(loaded.state_dict()), good)
        capsys.readouterr()
        code, error = resume("run"), capsys.readouterr().err
        if loaded is None:
            assert code == 2 and error.count("\n") == 1 and "run/ckpt.pth" in error, (number, error)
            assert before == {path.name: path.read_bytes() for path in Path("run").iterdir()}
        else:
            passed.append(number)
            assert code == 0, (number, error)
            assert_same_end(Path("run"), Path("whole"))
        shutil.rmtree("run")
    assert len(passed) <= (count // 4 if what == "flipped" else 0)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, capsys, monkeypatch):
    """As on a full disk, in mid-epoch: here no file may grow beyond a thousand bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = resource.RLIMIT_FSIZE, (1000, before[1])
    with monkeypatch.context() as patch:
        before_step(patch, 2, lambda parts: resource.setrlimit(*full))
        try:
            assert start(tmp_path, f"--images-per-epoch 32 {OFTEN}") == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: error: ") and "ckpt.pth could not be written" in error
    assert read(tmp_path)["step"] == 2 and not list(tmp_path.glob(".part-*"))
    assert resume(tmp_path) == 0


@pytest.mark.long
def test_a_disk_that_is_full_in_mid_checkpoint(tmp_path, capsys):
    """Room for one checkpoint, not for a second: one line; it goes on once there is room."""
    whole, run = tmp_path / "whole", tmp_path / "disk" / "run"
    assert start(whole) == 0
    size = (whole / "ckpt.pth").stat().st_size
    run.parent.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", str(run.parent)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root alone, where the machine lets it")
    try:
        assert start(run) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("train.py: error:") and "could not be written" in line
        assert read(run)["step"] == 0 and not list(run.glob(".part-*"))
        mount[4:5] = [f"remount,size={10 * size}"]
        subprocess.run(mount, check=True)
        assert resume(run) == 0
        assert_same_end(run, whole)
    finally:
        subprocess.run(["umount", str(run.parent)], check=True)


@pytest.mark.long
def test_memory_does_not_grow(tmp_path, fork):
    """Over the laptop preset's 2,000 steps, from the second quarter to the last."""
    flags, log = "--preset laptop --digits sklearn --device cpu --output .", tmp_path / "log.jsonl"
    process, pages = fork(flags, tmp_path), []
    while process.is_alive() and not (log.exists() and len(log_of(tmp_path)) == 11):
        pages.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]))
        time.sleep(0.5)
        pages = pages if log.exists() else []
    assert status(process) == 0
    quarter = len(pages) // 4
    second, last = np.mean(pages[quarter : 2 * quarter]), np.mean(pages[-quarter:])
    assert len(pages) >= 40 and abs(last / second - 1) < 0.01


WORDS = """
- -- nan inf 1e400 1,5 , none ünï✓ ' %s {} nowhere text.pth empty.pth folder /proc/self/mem
/dev/null good.pth picture.png
"""
WORDS = [*WORDS.split(), "", " ", "\udcff", "a\nb", "x" * 300]
TRAIN_FLAGS = """
--loss nce dino | --views same different | --crops 1 2 4 3 | --symmetric | --no-head-norm
--dataset clutter stl10 | --split train unlabeled | --background black texture folder text.pth
--texture-pool 0 3 10 -1 | --digits auto mnist sklearn | --weights none good.pth text.pth dino
--canvas-size 28 40 27 -1 | --num-distractors 0 2 -1 | --distractor-size 5 28 0 29 -3
--image-size 7 14 28 63 1 50 0 -7 | --patch-size 7 14 28 5 0 -7 | --dim 24 12 0 -3 7
--depth 1 2 0 -1 | --heads 1 2 24 0 -3 5 | --init-std 0 0.02 -1 nan | --out-dim 1 64 0 -1
--head-hidden-dim 8 0 -1 | --head-layers 1 3 0 -1 | --bottleneck-dim 1 8 0 -1
--global-crops-scale 0.5:1 0:0 1:0.5 -1:1 nan:1 2:3 | --local-crops-scale 0.1:0.2 0:0 -1:-1
--rotation 0 15 -5 nan inf | --blur 0:0 0.1:2 2:1 -1:-1 nan:nan 0:inf | --clip-grad 0 1 -1 nan
--batch-size 2 4 16 1 0 -8 17 3 | --micro-batch 1 2 3 8 0 -1 | --checkpoint-blocks
--precision auto float32 bfloat16 float16 int8 | --epochs 1 2 0 -1 1.5 | --warmup 0 0.5 1 2 -1 nan
--images-per-epoch 16 17 7 0 -1 | --lr 0.1 1e-300 1e30 0 -1 nan inf | --weight-decay 0 -1 nan
--weight-decay-end 0 1e300 | --temperature 0.2 1e-30 1e30 0 -1 nan inf | --momentum-teacher 0 1 5 -1
--teacher-temp 0.1 0 -1 nan | --keep-epochs 0 1 0,1 2 1, -1 ,
--seed 1 0 -1 1.5 seven ٣ 1_0 2147483648 9223372036854775808 | --device cpu cpu:0 cuda:77 meta tpu
--checkpoint-minutes 1e-9 1e30 0 -1 nan inf | --data-root folder nowhere | --preset laptop desktop
--resume good.pth finished nowhere folder text.pth | --output new folder finished text.pth
"""
VISUALIZE_FLAGS = """
--weights good.pth none bare.pth text.pth dino | --images picture.png grey.png text.pth folder
--image-size 7 14 56 70 50 0 -7 | --digits sklearn auto mnist | --background black texture folder
--data-root folder | --device cpu cuda:77 meta | --output new folder text.pth
"""
CHECKS = list(HealthCheck)  # that are left out: a run takes its time


def command_lines(table):
    """Lines of up to four flags of a table; a value is one of its, or now and then any word."""
    rows = [row.split() for line in table.strip().splitlines() for row in line.split("|")]
    junk = st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Nd"]), max_size=5)

    def words(row):
        name, *values = row
        if not values:
            return st.just([name])
        if ":" in values[0]:
            return st.sampled_from(values).map(lambda value: [name, *value.split(":")])
        value = st.one_of(*[st.sampled_from(values)] * 5, junk)
        # a bare value that begins with - would be taken for a flag
        return value.map(lambda v: [f"{name}={v}"] if v.startswith("-") else [name, v])

    line = st.lists(st.sampled_from(rows).flatmap(words), max_size=4)
    return line.map(lambda found: [word for flag in found for word in flag])


@pytest.fixture(scope="module")
def place(tmp_path_factory, fork):
    """A folder with files of all kinds, that command lines may name."""
    folder = tmp_path_factory.mktemp("place")
    assert status(fork(f"{TINY} --epochs 1 --output finished", folder)) == 0
    shutil.copy(folder / "finished" / "ckpt.pth", folder / "good.pth")
    torch.save(vit.read_checkpoint(folder / "good.pth")["teacher"], folder / "bare.pth")
    (folder / "text.pth").write_text("hello")
    (folder / "empty.pth").write_text("")
    (folder / "folder").mkdir()
    Image.new("RGB", (60, 40), "red").save(folder / "picture.png")
    Image.new("L", (8, 8)).save(folder / "grey.png")
    return folder


@pytest.fixture
def fresh(place, tmp_path, monkeypatch):
    """Makes a new copy of `place`, where there is no network, and goes there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(torchvision.datasets.STL10, "url", "http://127.0.0.1:9/stl10")
    monkeypatch.setattr(vit, "DINO_URL", "http://127.0.0.1:9/{0}/{0}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))

    def copy():
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(place, tmp_path, dirs_exist_ok=True)

    return copy


def told(main, argv):
    out, error = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()  # strict as a terminal
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            return main(argv), error.getvalue()
        except SystemExit as left:  # argparse's, with its usage
            assert "usage:" in error.getvalue() or left.code == 0
            return left.code, "error: of the command line"


def try_command_lines(main, lines, fresh, count):
    codes = []

    @settings(max_examples=count, derandomize=True, deadline=None, suppress_health_check=CHECKS)
    @given(lines)
    def check(argv):
        fresh()
        code, error = told(main, argv)
        codes.append(code)
        assert code in (0, 2)
        if code == 2:
            *others, last = error.splitlines()
            assert "error: " in last, error
            assert all(line.startswith(("warning: ", "epoch ")) for line in others), error

    check()
    assert codes.count(0) > count // 20 and codes.count(2) > count // 20  # not too tame


@counts(20, 700)
def test_any_command_line_of_train(fresh, count):
    """Status 0, or 2 and one line of error, after a warning or the lines of epochs."""
    base = f"{TINY} --epochs 1".split()
    lines = command_lines(TRAIN_FLAGS).map(lambda flags: base + flags)
    try_command_lines(train.main, lines, fresh, count)


@counts(20, 300)
def test_any_command_line_of_visualize(fresh, count):
    names = ["good.pth"] * 2 + ["bare.pth", "finished/ckpt.pth", "text.pth", "nowhere", "", "ü"]
    files = st.lists(st.sampled_from(names), min_size=1, max_size=2)
    lines = st.tuples(files, command_lines(VISUALIZE_FLAGS)).map(lambda both: both[0] + both[1])
    try_command_lines(visualize.main, lines, fresh, count)
