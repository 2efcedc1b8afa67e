"""Several ranks, as torchrun starts them, compute what one process computes; here over gloo."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_train import TINY, config_of, few_images, log_of, read, start, step_in_float64
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import train
import vit

__all__ = ["few_images"]  # a fixture of every test
ROOT = Path(__file__).resolve().parent.parent
# train.py with the numbers of an epoch from a few images
DRIVER = "import sys, metrics, train, test_train; vars(metrics).update(test_train.FEW); "
DRIVER += "sys.exit(train.main(sys.argv[1:]))"
KINDS = [
    "--loss nce --views different",
    "--loss nce --views same --crops 4 --micro-batch 2",
    "--loss dino --views different --micro-batch 2",
    "--loss dino --views same",
]
FAILURES = {
    "--batch-size 9": "--batch-size 9: use a multiple of 2",
    "--temperature 1e-40": "the validation loss is NaN or infinite",
}


def five_steps(rank, ranks, folder):
    """Five steps in float64 of every kind of run; the first rank saves what came of them."""
    torch.set_num_threads(1)
    if ranks > 1:
        meet = f"file://{folder}/meet"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
    for number, flags in enumerate(KINDS):
        config = config_of(f"{TINY} {flags} --precision float32 --lr 0.001")
        parts, views, _ = step_in_float64(config)
        parallel, losses, sums = parts["student"], [], []

        def count(group, bucket, sums=sums):
            sums.append(1)
            return allreduce_hook(group, bucket)

        if ranks > 1:
            parallel = DistributedDataParallel(parts["student"])
            parallel.register_comm_hook(dist.group.WORLD, count)
        for step in range(15, 20):  # of 30: after the first epoch, when DINO's last layer moves
            step = parts, parallel, views, views.sample(step), step
            losses.append(train.training_step(config, *step, steps=30)[0].item())
        if rank == 0:
            content = {name: parts[name].state_dict() for name in ("student", "teacher", "loss")}
            content |= {"losses": losses, "sums": len(sums)}
            torch.save(content, f"{folder}/{number}-of-{ranks}.pth")
    if ranks > 1:
        dist.destroy_process_group()


def two_ranks(rank, port, folder):
    """What the processes of `folder_of_ranks` do: the steps, and runs that fail."""
    five_steps(rank, 2, folder)
    found = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= found | {"RANK": str(rank)}
    for number, flags in enumerate(FAILURES):
        with open(f"{folder}/{number}-{rank}.txt", "w") as file, contextlib.redirect_stderr(file):
            try:
                status = start(f"{folder}/failed-{number}", flags)
            except SystemExit as left:
                status = left.code
            assert status == 2


@pytest.fixture(scope="module")
def folder_of_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    five_steps(0, 1, folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(two_ranks, (port, folder), nprocs=2)
    return folder


@pytest.mark.parametrize("number", range(len(KINDS)), ids=KINDS)
def test_two_ranks_take_the_steps_of_one_process(folder_of_ranks, number):
    """Loss, weights, centre after five steps, to 1e-10: 2 ranks of 4 images, 1 process of 8."""
    paths = [folder_of_ranks / f"{number}-of-{ranks}.pth" for ranks in (1, 2)]
    one, two = (torch.load(path, weights_only=True) for path in paths)
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-10)
    untrained = vit.build_network(config_of(f"{TINY} {KINDS[number]}")).state_dict()
    for part in ("student", "teacher", "loss"):
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, atol=1e-10, rtol=0)
    name = "backbone.cls_token"
    assert (one["student"][name] - untrained[name]).abs().max() > 1e-4
    assert two["sums"] == 5  # of the ranks' gradients: one a step, however many pieces it has


def torchrun(flags, folder):
    """train.py with 2 ranks, as a process that writes to out.txt and err.txt."""
    ranks = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
    command = [sys.executable, "-m", *ranks, sys.executable, "-c", DRIVER, *flags.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with open(folder / "out.txt", "w") as out, open(folder / "err.txt", "w") as err:
        return subprocess.Popen(command, cwd=folder, stdout=out, stderr=err, env=environment)


def test_torchrun_trains_stops_and_goes_on(tmp_path):
    """One writer; a signal ends the step on all ranks; a resumed run is that of one process."""
    flags, run = "--images-per-epoch 64 --epochs 12", tmp_path / "run"
    process = torchrun(f"{TINY} {flags} --output run", tmp_path)
    end = time.monotonic() + 120
    while not (run / "log.jsonl").exists() or len(log_of(run)) < 2:
        assert process.poll() is None and time.monotonic() < end, (tmp_path / "err.txt").read_text()
        time.sleep(0.02)
    process.terminate()
    assert process.wait(60) != 0
    out, err = ((tmp_path / name).read_text() for name in ("out.txt", "err.txt"))
    assert out.count("preset laptop") == 1 and err.count("epoch 1/12: loss") == 1
    assert err.count("stopped; python train.py --resume run goes on") == 1
    assert 8 <= read(run)["step"] < 96
    assert torchrun("--resume run", tmp_path).wait(120) == 0
    assert start(tmp_path / "one", flags) == 0
    for one, two in zip(log_of(tmp_path / "one")[1:], log_of(run)[1:], strict=True):
        assert one["step"] == two["step"] and one["loss"] == pytest.approx(two["loss"], abs=0.02)
    assert sorted(os.listdir(run)) == sorted(os.listdir(tmp_path / "one"))


@pytest.mark.parametrize("number,error", list(enumerate(FAILURES.values())))
def test_an_error_is_told_once(folder_of_ranks, number, error):
    first, second = ((folder_of_ranks / f"{number}-{rank}.txt").read_text() for rank in (0, 1))
    assert first.startswith(f"train.py: error: {error}") and first.count("\n") == 1 and not second
    assert (folder_of_ranks / f"failed-{number}").exists() == ("NaN" in error)
