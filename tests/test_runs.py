"""A run can be stopped at any instant, and then ends as if it had not been; nothing breaks it."""

import contextlib
import errno
import io
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
from helpers import (
    FEW_IMAGES,
    ROOT,
    SHIPPED,
    TINY,
    assert_same,
    assert_same_end,
    before_step,
    config_of,
    forking_context,
    log_of,
    read,
    resume,
    start,
)
from PIL import Image

import data
import evaluate
import picture_files
import runs
import settings
import train
import visualize
import vit
import weights
from vit import VisionTransformer, ViTShape

pytestmark = pytest.mark.usefixtures("few_images")
THREE_EPOCHS = "--images-per-epoch 32 --epochs 3"  # of 4 steps each
SAVE_EVERY_STEP = "--checkpoint-minutes 1e-9"
SECONDS_UNTIL_STUCK = 120  # a process that takes longer counts as stuck


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing stopped: 2 epochs of 2 steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, count in FEW_IMAGES.items():
            patch.setattr(evaluate, name, count)
        assert start(folder) == 0
    return folder


def send(*signals):
    """A function for `before_step` that sends these signals to this process."""

    def act(state):
        for number in signals:
            os.kill(os.getpid(), number)
            time.sleep(0.05)  # two signals at once would be one

    return act


def contents_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def last_error(capsys) -> str:
    """The last line that was printed to standard error."""
    return capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------------- files and folders


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path):
    path = str(tmp_path / "ckpt.pth")
    runs.save_checkpoint(path, {"step": 1})
    generator = (number for number in range(3))  # it cannot be saved, which shows midway
    with pytest.raises(TypeError):
        runs.save_checkpoint(path, {"step": 2, "x": torch.zeros(9999), "y": generator})
    assert weights.read_checkpoint(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["ckpt.pth"]


@contextlib.contextmanager
def files_of_at_most(size: int):
    """Within this context no file can grow beyond `size` bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_no_file_that_was_there(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("a.png")
    shape = ViTShape(patch_size=8, dim=64, depth=2, heads=1, pos_size=32)
    torch.save(VisionTransformer(shape).state_dict(), "w.pth")
    runs.save_checkpoint("old.pth", {"step": 1})
    figures = "w.pth --device cpu --image-size 32 --output out --images a.png"
    with files_of_at_most(2000):
        assert visualize.main(figures.split()) == 2
        assert last_error(capsys).startswith("visualize.py: error: ")
        assert start("run") == 2
        assert "run/ckpt.pth could not be written" in last_error(capsys)
        with pytest.raises(OSError, match="old.pth could not be written"):
            runs.save_checkpoint("old.pth", {"step": 2, "x": torch.zeros(9999)})
    assert os.listdir("run") == []
    assert weights.read_checkpoint("old.pth") == {"step": 1}


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, capsys, monkeypatch):
    """In the middle of an epoch."""
    with contextlib.ExitStack() as until_here, monkeypatch.context() as patch:
        before_step(patch, 2, lambda state: until_here.enter_context(files_of_at_most(1000)))
        assert start(tmp_path, f"--images-per-epoch 32 {SAVE_EVERY_STEP}") == 2
    error = last_error(capsys)
    assert error.startswith("train.py: error: ")
    assert "ckpt.pth could not be written" in error
    assert read(tmp_path)["step"] == 2
    assert not list(tmp_path.glob(".part-*"))
    assert resume(tmp_path) == 0


@pytest.mark.long
def test_a_disk_that_fills_up_in_the_middle_of_a_checkpoint(tmp_path, capsys, whole):
    """It has room for one checkpoint, not for a second. With more room the run goes on."""
    disk = tmp_path / "disk"
    run = disk / "run"
    disk.mkdir()
    size = (whole / "ckpt.pth").stat().st_size
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a file system, and not on every machine")
    try:
        assert start(run) == 2
        error = last_error(capsys)
        assert error.startswith("train.py: error:")
        assert "could not be written" in error
        assert read(run)["step"] == 0
        assert not list(run.glob(".part-*"))
        subprocess.run(["mount", "-o", f"remount,size={10 * size}", str(disk)], check=True)
        assert resume(run) == 0
        assert_same_end(run, whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_run_never_lands_on_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of("--preset laptop")
    assert runs.make_folder(config, None) == "runs/clutter-nce-same"
    assert runs.make_folder(config, None) == "runs/clutter-nce-same-2"
    assert runs.make_folder(config, None) == "runs/clutter-nce-same-3"
    texture = config_of("--preset laptop --loss dino --views different --background texture")
    assert runs.make_folder(texture, None) == "runs/clutter-dino-different-texture"
    assert runs.make_folder(texture, "a/b") == "a/b"
    assert os.path.isdir("a/b")


@pytest.mark.parametrize(
    "output, message",
    [
        ("taken", "--output taken: it holds a run; use a new folder"),
        ("text.pth", "text.pth"),
        ("/proc", "/proc/ckpt.pth could not be written"),
    ],
)
def test_an_output_folder_that_cannot_be_used(tmp_path, monkeypatch, capsys, output, message):
    monkeypatch.chdir(tmp_path)
    Path("text.pth").write_text("hello")
    Path("taken").mkdir()
    runs.save_checkpoint("taken/ckpt.pth", {"step": 1})
    assert start(output) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("train.py: error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert printed.out == "" or output == "/proc"
    assert sorted(os.listdir()) == ["taken", "text.pth"]
    assert os.listdir("taken") == ["ckpt.pth"]


@pytest.mark.parametrize("name", ["epoch-1.pth", "log.jsonl", "metrics.json"])
def test_a_run_does_not_start_beside_files_of_an_earlier_one(tmp_path, capsys, whole, name):
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("these may stay")
    assert start(run) == 0
    (run / "ckpt.pth").rename(run / "epoch-1.pth")
    for path in run.iterdir():
        if path.name not in (name, "notes.txt"):
            path.unlink()
    before = contents_of(run)
    capsys.readouterr()
    assert start(run, "--loss dino") == 2
    message = f"--output {run}: it holds {name} of an earlier run; use a new folder"
    assert capsys.readouterr().err == f"train.py: error: {message}\n"
    assert contents_of(run) == before


# ------------------------------------------------------------------------------------- two writers


@pytest.mark.parametrize("command", ["--output", "--resume"])
def test_a_folder_in_which_a_run_writes_is_refused(tmp_path, monkeypatch, capsys, whole, command):
    """At once: before data are read, and so before anything else that takes time."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    if command == "--output":
        (run / "ckpt.pth").unlink()
    with runs.FolderLock() as lock:
        lock.take(str(run))
        before = contents_of(run)
        with monkeypatch.context() as patch:
            patch.setattr(data, "load_dataset", lambda *args: pytest.fail("data are read"))
            assert train.main([*TINY.split(), command, str(run)]) == 2
        message = f"{run}: another train.py is writing there; wait for it or stop it, or use"
        assert capsys.readouterr().err.startswith(f"train.py: error: {message}")
        assert contents_of(run) == before
    assert contents_of(run).keys() == before.keys() - {".lock"}


def test_a_run_holds_its_folder_until_it_ends(tmp_path, monkeypatch, whole):
    run = tmp_path / "run"
    statuses = []

    def start_another(state):
        before = contents_of(run)
        statuses.append(start(run))
        statuses.append(resume(run))
        assert contents_of(run) == before

    with monkeypatch.context() as patch:
        before_step(patch, 1, start_another)
        assert start(run) == 0
    assert statuses == [2, 2]
    assert_same_end(run, whole)
    assert not (run / ".lock").exists()
    assert resume(run, "--epochs 3") == 0


def test_a_killed_run_gives_its_folder_up(tmp_path):
    program = f"import runs, time; lock = runs.FolderLock(); lock.take({str(tmp_path)!r}); print(flush=True); "
    process = subprocess.Popen(
        [sys.executable, "-c", program + "time.sleep(100)"], cwd=ROOT, stdout=subprocess.PIPE
    )
    process.stdout.read(1)
    with runs.FolderLock() as lock, pytest.raises(ValueError, match="another train.py is writing"):
        lock.take(str(tmp_path))
    process.kill()
    process.wait()
    assert os.listdir(tmp_path) == [".lock"]
    with runs.FolderLock() as lock:
        lock.take(str(tmp_path))
        assert lock.file is not None
    assert os.listdir(tmp_path) == []


def test_a_lock_file_that_is_removed_while_it_is_opened(tmp_path, monkeypatch):
    """The run that held it ends just then. A lock on a file that is gone would keep nobody out."""
    lock_file = runs.lock_file
    calls = []

    def lock_a_removed_file(file):
        calls.append(file)
        if len(calls) == 1:
            os.remove(tmp_path / ".lock")
        lock_file(file)

    monkeypatch.setattr(runs, "lock_file", lock_a_removed_file)
    with runs.FolderLock() as first, runs.FolderLock() as second:
        first.take(str(tmp_path))
        assert len(calls) == 2
        with pytest.raises(ValueError, match="another train.py is writing"):
            second.take(str(tmp_path))


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch, capsys, whole):
    def no_locks(file):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs, "lock_file", no_locks)
    assert start(tmp_path / "run") == 0
    assert "lock" not in capsys.readouterr().err
    assert_same_end(tmp_path / "run", whole)
    with runs.FolderLock() as lock:
        lock.take(str(tmp_path / "no such folder"))
        assert lock.file is None


# ------------------------------------------------------------------------------- stopping, resuming


@pytest.mark.parametrize("flags", ["--loss nce", "--loss dino", "--micro-batch 4"])
def test_a_run_stopped_anywhere_ends_as_if_it_had_not_been(tmp_path, monkeypatch, capsys, flags):
    """Bit for bit: in the first step, in the last step of an epoch, and in the middle of one."""
    whole = tmp_path / "whole"
    run = tmp_path / "run"
    flags += " --images-per-epoch 32 --keep-epochs 0,1"
    assert start(whole, flags) == 0

    for step, number in ((0, signal.SIGINT), (3, signal.SIGTERM), (5, signal.SIGTERM)):
        with monkeypatch.context() as patch:
            steps = before_step(patch, step, send(number))
            status = start(run, flags) if step == 0 else resume(run)
        assert status == 128 + number
        assert last_error(capsys) == f"stopped; python train.py --resume {run} goes on"
        assert steps[-1] == step  # it was finished, and no other one begun
        assert read(run)["step"] == step + 1
    assert resume(run) == 0
    assert "preset laptop (resumed): " in capsys.readouterr().out

    assert_same_end(run, whole)
    assert sorted(os.listdir(run)) == sorted(os.listdir(whole))
    for name in ("epoch-0.pth", "epoch-1.pth"):  # kept in their epoch, not again later
        kept = weights.read_checkpoint(run / name)
        expected = weights.read_checkpoint(whole / name)
        assert_same(kept["teacher"], expected["teacher"])


@pytest.mark.parametrize("renames", range(1, 6))
def test_a_run_that_ends_between_two_files_repeats_what_was_not_kept(
    tmp_path, monkeypatch, whole, renames
):
    """It ends after so many renames of files, each of which makes a new file the valid one."""
    run = tmp_path / "run"
    replace = os.replace
    renamed = []

    def replace_or_leave(*paths):
        if len(renamed) == renames:
            raise KeyboardInterrupt
        renamed.append(paths)
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_or_leave)
        assert start(run) == 130
    # The log may be one epoch ahead of the checkpoint, and never behind it.
    checkpoint = read(run)
    lines = log_of(run) if (run / "log.jsonl").exists() else []
    epochs_kept = len(checkpoint["metrics"])
    assert lines[:epochs_kept] == checkpoint["metrics"]
    assert len(lines) - epochs_kept in (0, 1)
    assert checkpoint["step"] == 2 * max(0, epochs_kept - 1)

    # The resumed run removes from the log what the checkpoint does not have.
    lines_at_first_step = []
    with monkeypatch.context() as patch:
        first_step = checkpoint["step"]
        before_step(patch, first_step, lambda state: lines_at_first_step.extend(log_of(run)))
        assert resume(run) == 0
    assert len(lines_at_first_step) == max(1, epochs_kept)  # epoch 0 was measured
    assert_same_end(run, whole)


@pytest.fixture(params=["as usual", "ignored"])
def interrupt_handler(request):
    """How SIGINT is handled when the run begins.

    A job in the background of a shell script, or one that cron starts, ignores it from the start.
    """
    before = signal.getsignal(signal.SIGINT)
    ignored = request.param == "ignored"
    handler = signal.SIG_IGN if ignored else signal.default_int_handler
    signal.signal(signal.SIGINT, handler)
    yield handler
    signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_leaves_at_once(tmp_path, monkeypatch, capsys, whole, interrupt_handler):
    """In the middle of a step; the run goes on from the checkpoint before that step."""
    terminate_handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        steps = before_step(patch, 1, send(signal.SIGINT, signal.SIGINT))
        assert start(tmp_path / "run") == 130
    assert steps == [0, 1]
    assert "interrupted; python train.py --resume RUN goes on" in last_error(capsys)
    assert signal.getsignal(signal.SIGINT) == interrupt_handler
    assert signal.getsignal(signal.SIGTERM) == terminate_handler
    assert read(tmp_path / "run")["step"] == 0
    assert resume(tmp_path / "run") == 0
    assert_same_end(tmp_path / "run", whole)


def test_one_interrupt_ends_the_step(tmp_path, monkeypatch, whole, interrupt_handler):
    with monkeypatch.context() as patch:
        before_step(patch, 1, send(signal.SIGINT))
        assert start(tmp_path / "run") == 130
    assert signal.getsignal(signal.SIGINT) == interrupt_handler
    assert read(tmp_path / "run")["step"] == 2
    assert resume(tmp_path / "run") == 0
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_signal_ends_a_validation_at_once(tmp_path, monkeypatch, capsys, whole, epoch):
    """The one before training, that of an epoch, the last: the resumed run adds the log's line."""
    run = tmp_path / "run"
    validate = evaluate.validate
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == epoch + 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            pytest.fail("the validation went on")
        return validate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "validate", interrupted)
        assert start(run) == 128 + signal.SIGTERM
    assert last_error(capsys) == f"stopped; python train.py --resume {run} goes on"
    assert read(run)["step"] == 2 * epoch
    assert len(read(run)["metrics"]) == epoch

    # the stopped run can be looked at
    figures = ["--device", "cpu", "--output", str(tmp_path / "out")]
    assert visualize.main([str(run), *figures]) == 0
    assert resume(run) == 0
    assert len(log_of(run)) == 3
    assert_same_end(run, whole)


def test_a_checkpoint_of_an_earlier_version_goes_on(tmp_path, monkeypatch):
    """It has a digest, a count of skipped steps, and each rank's part of the epoch's loss.

    Some of today's settings and measures are missing, and it has a setting that is gone.
    """
    shipped = weights.read_checkpoint(SHIPPED / "same.pth")
    for name in ("antialias", "norm_eps", "rotary", "shortcut"):
        del shipped["config"][name]
    for line in shipped["metrics"]:
        del line["collapse"]
        for row in line["validation"].values():
            if isinstance(row, dict):
                row.pop("equal_ink", None)
                row.pop("patch_faithfulness", None)
    saved_config = shipped["config"] | {
        "texture_pool": 0,
        "digits": "sklearn",
        "batch_size": 8,
        "images_per_epoch": 16,
        "epochs": 3,
    }
    config = settings.config_from_checkpoint(saved_config)
    student = vit.build_network(config)
    student.load_state_dict(shipped["teacher"])
    content = train.make_state(config, student).state_dict()
    content |= {"config": saved_config, "step": 3, "epoch": 1, "metrics": shipped["metrics"][:2]}
    content |= {"epoch_loss": [20.0, 30.0], "skipped": 0, "threads": 2, "digest": "0" * 64}
    torch.save(content, tmp_path / "ckpt.pth")

    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert resume(tmp_path) == 0
    assert threads == [2]  # the last bits of a sum depend on their number
    lines = log_of(tmp_path)
    assert lines[:2] == shipped["metrics"][:2]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    # epoch 2 has two steps: those before add up to 50, and the last one is as of epoch 3
    assert 25 < lines[2]["loss"] < 27
    assert lines[3]["loss"] < 4


def test_the_users_number_of_threads_comes_first(monkeypatch, capsys):
    """torchrun sets it too."""
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runs.use_threads(1)
    assert capsys.readouterr().err == ""
    runs.use_threads(5)
    error = capsys.readouterr().err
    assert error.startswith("warning: OMP_NUM_THREADS is 1, and the run had 5 threads: ")
    assert error.count("\n") == 1
    assert threads == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    runs.use_threads(5)
    assert threads == [5]


@pytest.mark.parametrize(
    "flags",
    [
        "",
        # these repeat what the run has
        "--lr 0.000125 --symmetric --global-crops-scale 0.5 1 --blur 0.1 2 --keep-epochs 1,2",
    ],
)
def test_a_run_that_has_ended_goes_on_with_more_epochs(tmp_path, flags):
    assert start(tmp_path, "--keep-epochs 1,2") == 0
    before = read(tmp_path)
    assert resume(tmp_path, f"--epochs 3 {flags}") == 0
    after = read(tmp_path)
    assert [line["epoch"] for line in after["metrics"]] == [0, 1, 2, 3]
    assert after["config"] == before["config"] | {"epochs": 3}


@pytest.mark.parametrize(
    "path, flags, message",
    [
        ("run", "", "--resume run/ckpt.pth: the run has ended after 2 epochs; use more --epochs"),
        ("run", "--epochs 1", "the run has ended after 2 epochs"),
        ("run", "--epochs 3 --loss dino", "--loss dino: the run has nce; leave it as it is"),
        ("run", "--epochs 3 --blur 0 1", "--blur (0.0, 1.0): the run has (0.1, 2.0)"),
        ("run", "--epochs 3 --temperature nan", "--temperature nan: the run has 0.1"),
        ("run", "--epochs 3 --output x", "--output: a resumed run goes on in its own folder"),
        ("run", "--epochs 3 --checkpoint-minutes 0", "--checkpoint-minutes 0.0: use a finite"),
        ("nowhere", "", "nowhere: no such file"),
        ("list.pth", "", "--resume list.pth: use a ckpt.pth of train.py"),
        ("weights.pth", "", "--resume weights.pth: use a ckpt.pth of train.py"),
        ("lacking.pth", "", "--resume lacking.pth: use a ckpt.pth of train.py"),
        ("texture_pool.pth", "", "--resume texture_pool.pth: its --texture-pool no longer exists"),
        ("no_crops.pth", "", "--resume no_crops.pth: it lacks these settings: crops"),
    ],
)
def test_a_run_that_cannot_go_on_is_left_as_it_is(
    tmp_path, monkeypatch, capsys, whole, path, flags, message
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, "run")
    checkpoint = read("run")
    torch.save([1, 2], "list.pth")
    torch.save(checkpoint["teacher"], "weights.pth")
    torch.save({"optimizer": {}}, "lacking.pth")
    with_pool = checkpoint["config"] | {"texture_pool": 10}
    torch.save(checkpoint | {"config": with_pool}, "texture_pool.pth")
    no_crops = {name: value for name, value in checkpoint["config"].items() if name != "crops"}
    torch.save(checkpoint | {"config": no_crops}, "no_crops.pth")
    before = contents_of("run")

    assert resume(path, flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert contents_of("run") == before


NOT_OF_ITS_KIND = [
    ({"threads": 0}, "use a ckpt.pth of train.py"),
    ({"threads": "two"}, "use a ckpt.pth of train.py"),
    ({"step": 2.5}, "use a ckpt.pth of train.py"),
    ({"epoch_loss": 3.0}, "use a ckpt.pth of train.py"),
    ({"metrics": [1]}, "use a ckpt.pth of train.py"),
    ({"metrics": [{}, {}]}, "use a ckpt.pth of train.py"),
    ({"metrics": []}, "its log is not of its step"),
    ({"step": 10**9}, "its log is not of its step"),
    ({"config": {"lr": "high"}}, "its setting lr cannot be 'high'; use another copy of it"),
    ({"config": {"blur": [1.0]}}, "its setting blur cannot be [1.0]"),
    ({"config": {"loss": "clip"}}, "its setting loss cannot be 'clip'"),
    ({"config": {"fallbacks": None}}, "its setting fallbacks cannot be None"),
    ({"config": {"dim": 48}}, "the checkpoint's student does not fit its settings"),
    ({"student": {}}, "the checkpoint's student does not fit its settings"),
    ({"teacher": None}, "the checkpoint's teacher does not fit its settings"),
    ({"optimizer": {}}, "the checkpoint's optimizer does not fit its settings"),
]


@pytest.mark.parametrize("changes, message", NOT_OF_ITS_KIND)
def test_a_checkpoint_whose_content_was_changed(tmp_path, capsys, whole, changes, message):
    shutil.copytree(whole, tmp_path / "run")
    checkpoint = read(tmp_path / "run")
    config = checkpoint["config"] | {"epochs": 3} | changes.get("config", {})
    torch.save(checkpoint | changes | {"config": config}, tmp_path / "run" / "ckpt.pth")
    before = contents_of(tmp_path / "run")
    assert resume(tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("train.py: error: ")
    assert message in error
    assert contents_of(tmp_path / "run") == before


def test_a_background_folder_that_has_vanished(tmp_path, capsys):
    """This shows before anything is written; the run's network can be looked at without it."""
    backgrounds = tmp_path / "backgrounds"
    backgrounds.mkdir()
    Image.new("L", (90, 90), 200).save(backgrounds / "a.png")
    run = tmp_path / "run"
    assert start(run, f"--background {backgrounds}") == 0
    picture_files.read_folder.cache_clear()
    (backgrounds / "a.png").unlink()
    before = contents_of(run)
    capsys.readouterr()

    assert resume(run, "--epochs 3") == 2
    message = f"--background {backgrounds}: no images there"
    assert capsys.readouterr().err.startswith(f"train.py: error: {message}")
    figures = [str(run), "--device", "cpu", "--output", str(tmp_path / "out")]
    assert visualize.main(figures) == 2
    assert capsys.readouterr().err.startswith(f"visualize.py: error: {message}")
    assert not (tmp_path / "out").exists()
    assert contents_of(run) == before
    assert visualize.main([*figures, "--background", "black"]) == 0


# ----------------------------------------------------------------------------------- killed at once


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """A function that starts train.py in a folder and returns its processes, one for each rank.

    The last rank may have more flags. What they print is appended to out.txt.
    """
    context = forking_context()

    def start_ranks(flags: str, folder: Path, ranks: int = 1, last_rank: str = "") -> list:
        folder.mkdir(exist_ok=True)
        port = free_port()
        processes = []
        for rank in range(ranks):
            flags_of_rank = f"{flags} {last_rank}" if rank == ranks - 1 else flags
            args = (flags_of_rank, folder, rank, ranks, port)
            processes.append(context.Process(target=train_in_folder, args=args))
        for process in processes:
            process.start()
        return processes

    # The first one waits until the libraries are imported.
    statuses_of(start_ranks("--help", tmp_path_factory.mktemp("first")))
    return start_ranks


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def train_in_folder(flags: str, folder: Path, rank: int, ranks: int, port: int):
    """What a launched process does."""
    os.chdir(folder)
    if ranks > 1:
        os.environ["WORLD_SIZE"] = str(ranks)
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ["MASTER_PORT"] = str(port)
    with open("out.txt", "a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    vars(evaluate).update(FEW_IMAGES)
    sys.exit(train.main(flags.split()))


def statuses_of(processes) -> list[int]:
    """The exit statuses of processes once they have ended; one that is stuck is killed."""
    for process in processes:
        process.join(SECONDS_UNTIL_STUCK)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


@pytest.mark.parametrize(
    "flags, ranks, count",
    [
        ("", 1, 4),
        ("--micro-batch 4", 1, 1),
        ("--loss dino", 1, 1),
        ("", 2, 1),
        pytest.param("", 1, 30, marks=pytest.mark.long),
        pytest.param("--loss dino --micro-batch 2", 2, 10, marks=pytest.mark.long),
    ],
)
def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path, launch, flags, ranks, count):
    """It is killed at any instant: before the first checkpoint, in a step, while a file is written.

    Half of the runs write a checkpoint after every step; every third is asked to stop, not killed.
    """
    chance = random.Random(9)
    new_run = f"{TINY} {THREE_EPOCHS} {flags} --output run"
    started = time.monotonic()
    assert statuses_of(launch(new_run, tmp_path / "whole", ranks)) == [0] * ranks
    seconds = time.monotonic() - started
    instants = []  # how far the killed runs were, for whoever reads the output

    for number in range(count):
        folder = tmp_path / str(number)
        run = folder / "run"
        processes = launch(f"{new_run} {SAVE_EVERY_STEP if number % 2 else ''}", folder, ranks)
        # One in each of `count` equal parts of the run, which ends with an evaluation.
        time.sleep(seconds * (0.1 + 0.7 * (number + chance.random()) / count))
        for process in processes:
            if number % 3 == 2:
                process.terminate()
            else:
                process.kill()
        statuses_of(processes)

        has_checkpoint = (run / "ckpt.pth").exists()
        assert has_checkpoint or not (run / "log.jsonl").exists()
        step = read(run)["step"] if has_checkpoint else None
        instants.append((step, sorted(path.name for path in run.glob(".part-*"))))
        if step == 12:  # the whole run may have been slower than later ones
            seconds *= 0.8
        statuses = statuses_of(launch("--resume run" if has_checkpoint else new_run, folder, ranks))
        printed = (folder / "out.txt").read_text()[-2000:]
        if step == 12 and "the run has ended after 3 epochs" in printed:
            # It was killed in the evaluation at its end, so there is nothing to go on with.
            assert statuses[0] == 2
        else:
            assert statuses == [0] * ranks, (step, printed)
        assert_same_end(run, tmp_path / "whole" / "run")
    print(f"killed after these steps, with these files half written: {instants}")


def test_two_runs_started_at_once_have_a_folder_each(tmp_path, launch):
    flags = f"{TINY} {THREE_EPOCHS}"
    processes = launch(flags, tmp_path) + launch(flags, tmp_path)
    assert statuses_of(processes) == [0, 0]
    first, second = sorted((tmp_path / "runs").iterdir())
    assert (first.name, second.name) == ("clutter-nce-same", "clutter-nce-same-2")
    assert_same_end(first, second)
    assert sorted(os.listdir(first)) == sorted(os.listdir(second))


def test_two_runs_started_at_once_with_one_folder(tmp_path, launch, whole):
    flags = f"{TINY} --output run"
    processes = launch(flags, tmp_path) + launch(flags, tmp_path)
    assert sorted(statuses_of(processes)) == [0, 2]
    printed = (tmp_path / "out.txt").read_text()
    assert printed.count("epoch 1/2: ") == 1  # the other one was refused before it took a step
    assert printed.count("train.py: error: ") == 1
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.long
def test_memory_does_not_grow(tmp_path, launch):
    """From the second quarter of the laptop preset's 1,000 steps to the last one."""
    (process,) = launch("--preset laptop --digits sklearn --device cpu --output .", tmp_path)
    log = tmp_path / "log.jsonl"
    pages = []  # of memory, twice a second
    while process.is_alive() and not (log.exists() and len(log_of(tmp_path)) == 11):
        if log.exists():
            pages.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]))
        time.sleep(0.5)
    assert statuses_of([process]) == [0]
    quarter = len(pages) // 4
    assert quarter >= 10
    second_quarter = np.mean(pages[quarter : 2 * quarter])
    last_quarter = np.mean(pages[-quarter:])
    assert last_quarter == pytest.approx(second_quarter, rel=0.03)


# ---------------------------------------------------------------------------- damaged checkpoints


def cut_off(content: bytes, count: int) -> list[bytes]:
    """Versions of a file that end after 0, 1, … of `count` parts."""
    return [content[: len(content) * part // count] for part in range(count)]


def with_one_bit_flipped(content: bytes, first: int, end: int, count: int) -> list[bytes]:
    """Versions of a file that differ in one bit of the bytes from `first` to `end`."""
    chance = random.Random(0)
    versions = []
    for place in [chance.randrange(first, end) for _ in range(count)]:
        version = bytearray(content)
        version[place] ^= 1 << chance.randrange(8)
        versions.append(bytes(version))
    return versions


def damaged_versions(content: bytes, damage: str, count: int) -> list[bytes]:
    if damage == "cut off":
        return cut_off(content, count)
    if damage == "a bit flipped":
        return with_one_bit_flipped(content, 0, len(content), count)
    # The pickle with names and shapes is a small part of the file, and a program acts on it.
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        pickled = archive.read(name)
    first = content.index(pickled)
    return with_one_bit_flipped(content, first, first + len(pickled), count)


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """The folder of a run that was stopped after 3 of its 4 steps."""
    with monkeypatch.context() as patch:
        before_step(patch, 2, send(signal.SIGTERM))
        assert start(tmp_path / "stopped") == 143
    return tmp_path / "stopped"


@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.long)])
@pytest.mark.parametrize("damage", ["cut off", "a bit flipped", "a bit of the pickle flipped"])
def test_a_damaged_checkpoint_is_refused(
    tmp_path, monkeypatch, capsys, whole, stopped, damage, count
):
    """It is neither trained on nor touched. A flipped bit that nobody reads does no harm."""
    monkeypatch.chdir(tmp_path)
    run = Path("run")
    original = weights.load_backbone(str(stopped / "ckpt.pth")).backbone.state_dict()
    content = (stopped / "ckpt.pth").read_bytes()
    harmless = []
    for number, version in enumerate(damaged_versions(content, damage, count)):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(stopped, run)
        (run / "ckpt.pth").write_bytes(version)
        before = contents_of(run)
        loaded = None
        with contextlib.suppress(ValueError):
            loaded = weights.load_backbone("run/ckpt.pth").backbone
        capsys.readouterr()
        status = resume("run")
        error = capsys.readouterr().err
        if loaded is None:
            assert status == 2, number
            assert error.count("\n") == 1, error
            assert "run/ckpt.pth" in error
            assert contents_of(run) == before, number
        else:
            harmless.append(number)
            assert_same(dict(loaded.state_dict()), dict(original))
            assert status == 0, error
            assert_same_end(run, whole)
    assert len(harmless) <= (count // 4 if damage == "a bit flipped" else 0)


# ------------------------------------------------------------------------------------------- ranks

TORCHRUN_SCRIPT = """
import sys

import evaluate
import helpers
import train

vars(evaluate).update(helpers.FEW_IMAGES)
sys.exit(train.main(sys.argv[1:]))
"""


def stop_after_the_first_epoch(process: subprocess.Popen, run: Path):
    """Send SIGTERM to a process that trains once the log has a line for epoch 1."""
    stuck_at = time.monotonic() + SECONDS_UNTIL_STUCK
    try:
        while not (run / "log.jsonl").exists() or len(log_of(run)) < 2:
            assert process.poll() is None
            assert time.monotonic() < stuck_at
            time.sleep(0.02)
        process.terminate()
        assert process.wait(SECONDS_UNTIL_STUCK) != 0
    finally:
        process.kill()


def test_a_run_of_torchrun_stops_and_goes_on(tmp_path, launch):
    """One rank writes and prints, and a signal ends the step on all of them.

    The resumed run ends as that of one process does.
    """
    flags = "--images-per-epoch 64 --epochs 12"
    run = tmp_path / "run"
    (tmp_path / "script.py").write_text(TORCHRUN_SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "script.py", *f"{TINY} {flags} --output run".split()]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    with open(tmp_path / "out.txt", "w") as out, open(tmp_path / "err.txt", "w") as err:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=err, env=environment)
    stop_after_the_first_epoch(process, run)
    printed = (tmp_path / "out.txt").read_text()
    errors = (tmp_path / "err.txt").read_text()
    assert printed.count("preset laptop") == 1
    assert errors.count("epoch 1/12: loss") == 1
    assert errors.count("stopped; python train.py --resume run goes on") == 1
    assert 8 <= read(run)["step"] < 96

    assert statuses_of(launch("--resume run", tmp_path, ranks=2)) == [0, 0]
    one_process = tmp_path / "one_process"
    assert start(one_process, flags) == 0
    lines = log_of(run)
    expected_lines = log_of(one_process)
    assert len(lines) == len(expected_lines) == 13
    for line, expected in zip(lines[1:], expected_lines[1:]):
        assert line["step"] == expected["step"]
        assert line["loss"] == pytest.approx(expected["loss"], abs=0.02)
    assert sorted(os.listdir(run)) == sorted(os.listdir(one_process))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--output run --batch-size 9", "--batch-size 9: use a multiple of 2"),
        ("--output run --temperature 1e-40", "the validation loss is NaN or infinite"),
        # only the first rank notices
        ("--output taken", "--output taken: it holds a run; use a new folder"),
    ],
)
def test_an_error_of_several_ranks_is_printed_once(tmp_path, launch, flags, message):
    (tmp_path / "taken").mkdir()
    runs.save_checkpoint(str(tmp_path / "taken" / "ckpt.pth"), {"step": 1})
    assert statuses_of(launch(f"{TINY} {flags}", tmp_path, ranks=2)) == [2, 2]
    printed = (tmp_path / "out.txt").read_text()
    assert printed.count("train.py: error: ") == 1
    number = "" if "NaN" in message else "rank 0: "  # all ranks get the same NaN
    assert printed.splitlines()[-1].startswith(f"train.py: error: {number}{message}")
    assert (tmp_path / "run").exists() == ("NaN" in message)


def write_mnist(root: Path, last_label: int):
    """MNIST's four files with 24 digits each, of which the last may have another label."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    labels = bytes([number % 10 for number in range(23)] + [last_label])
    for name in ("train", "t10k"):
        images = (
            bytes([0, 0, 8, 3, 0, 0, 0, 24, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes([200]) * 24 * 784
        )
        (folder / f"{name}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(
            bytes([0, 0, 8, 1, 0, 0, 0, 24]) + labels
        )


@pytest.mark.parametrize(
    "first_rank, last_rank, message",
    [
        (
            "--digits mnist --data-root a",
            "--digits sklearn",
            "--digits sklearn, rank 0 has mnist (",
        ),
        ("--digits mnist --data-root a", "--data-root b", "digest of validation images "),
        ("", "--lr 0.5", "--lr 0.5, rank 0 has 0.000125; give all ranks the same data and flags"),
    ],
)
def test_ranks_that_differ_do_not_start(tmp_path, launch, first_rank, last_rank, message):
    write_mnist(tmp_path / "a", last_label=1)
    write_mnist(tmp_path / "b", last_label=2)
    flags = f"{TINY} --output run {first_rank}"
    assert statuses_of(launch(flags, tmp_path, 2, last_rank)) == [2, 2]
    (line,) = (tmp_path / "out.txt").read_text().splitlines()
    assert line.startswith(f"train.py: error: rank 1 has {message}")
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_rank_is_printed_by_that_rank(tmp_path, launch):
    processes = launch(f"{TINY} --output run", tmp_path, 2, "--weights missing.pth")
    assert statuses_of(processes) == [2, 2]
    lines = sorted((tmp_path / "out.txt").read_text().splitlines())
    assert len(lines) == 2
    assert lines[1].startswith("train.py: error: rank 1: missing.pth: no such file")
    assert lines[0] in (
        "train.py: error: rank 1 cannot go on; its own line says why",
        # if rank 1 was gone before rank 0 had read all of its message
        "train.py: error: rank 0: another rank has ended; what it printed says why",
    )
    assert not (tmp_path / "run").exists()


def test_an_error_is_not_lost_if_the_other_ranks_are(monkeypatch):
    def lose_connection(*args):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(runs, "world_size", lambda: 2)
    monkeypatch.setattr(runs.dist, "all_gather_object", lose_connection)
    with pytest.raises(ValueError, match="no such file"), runs.together():
        raise ValueError("no such file")
    with pytest.raises(RuntimeError, match="closed by peer"), runs.together():
        pass


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_ends_the_others(tmp_path, launch, killed):
    run = tmp_path / "run"
    processes = launch(f"{TINY} --epochs 500 --output run", tmp_path, ranks=2)
    stuck_at = time.monotonic() + SECONDS_UNTIL_STUCK
    while not (run / "log.jsonl").exists() or len(log_of(run)) < 2:
        assert time.monotonic() < stuck_at
        time.sleep(0.02)
    processes[killed].kill()
    assert sorted(statuses_of(processes)) == [-signal.SIGKILL, 2]
    last_line = (tmp_path / "out.txt").read_text().splitlines()[-1]
    message = "another rank has ended; what it printed says why"
    assert last_line == f"train.py: error: rank {1 - killed}: {message}"


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_of_another_launcher(monkeypatch, capsys, name):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, "2")
    assert train.main([*TINY.split(), "--output", "/nowhere"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train.py: error: {name} is 2, but without torchrun's WORLD_SIZE and ")
    assert error.endswith(f"use torchrun, or {name}=1 to train alone\n")
    monkeypatch.setenv(name, "1")
    runs.init_distributed()
    monkeypatch.setenv(name, "2")
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun with one rank, in a task of Slurm's
    runs.init_distributed()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number"),
        ({"RANK": "2"}, "RANK is 2: use torchrun, which counts from 0"),
        ({"RANK": ""}, "RANK is '', not a number"),
        ({"MASTER_PORT": "http"}, "the 2 ranks did not meet at 127.0.0.1:http ("),
    ],
)
def test_an_environment_that_is_not_torchruns(monkeypatch, capsys, changes, message):
    environment = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (environment | {"MASTER_PORT": "1"} | changes).items():
        monkeypatch.setenv(name, value)
    assert train.main(TINY.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train.py: error: {message}")
    assert error.count("\n") == 1


def test_ranks_without_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert train.main(TINY.split()) == 2
    error = capsys.readouterr().err
    assert "WORLD_SIZE is set; use torchrun, or unset it" in error
    assert error.count("\n") == 1


# --------------------------------------------------------------------------------- devices, errors


def test_the_line_that_is_printed_for_an_error():
    assert runs.error_line(ValueError("first\n  second\x1b[31m")) == "first second[31m"
    missing = NotImplementedError(
        "The operator 'aten::x' is not currently implemented for the MPS device. If you\nwant"
    )
    line = runs.error_line(missing)
    assert line.endswith("use PYTORCH_ENABLE_MPS_FALLBACK=1 or --device cpu")
    assert "\n" not in line


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("MPS backend out of memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"),
    ],
)
def test_the_ways_out_of_too_little_memory(error):
    line = runs.error_line(error)
    assert line.startswith("out of memory; use ")
    for name in ("--image-size", "--micro-batch", "--checkpoint-blocks"):
        assert name in line


def test_an_error_that_is_a_bug_keeps_its_traceback():
    bug = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as raised:
        runs.error_line(bug)
    assert raised.value is bug
