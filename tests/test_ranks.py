"""Several ranks, as torchrun starts them, compute what one process computes. On a CPU, over gloo."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import train
import vit

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--preset", "laptop", "--digits", "sklearn", "--device", "cpu"]


def five_steps(rank, ranks, flags, folder):
    """Five steps in float64 as one of the ranks; the first one saves what came of them."""
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    config = train.make_config(train.parse_args([*SMALL, *flags, "--batch-size", "8", "--precision", "float32"]))
    student = vit.build_network(config).double()
    teacher = copy.deepcopy(student).requires_grad_(False)
    views = data.TrainingViews(config, data.load_digits("sklearn")[0]["train"])
    render = views.render
    views.render = lambda params: render(params).double()
    loss_fn = train.NCELoss(0.2) if config["loss"] == "nce" else train.DINOLoss(config["out_dim"]).double()
    optimizer, scaler = train.make_optimizer(student), torch.amp.GradScaler("cpu", enabled=False)
    parallel = DistributedDataParallel(student) if ranks > 1 else student
    losses = []
    for step in range(10, 15):  # of 30: after the first epoch, when DINO's last layer moves, and the ramp
        loss, _ = train.training_step(
            config, loss_fn, parallel, teacher, optimizer, scaler, views, views.draw(step), step, steps=30
        )
        losses.append(sum(train.of_all_ranks(loss)))
    if rank == 0:
        networks = {"student": student.state_dict(), "teacher": teacher.state_dict(), "loss": loss_fn.state_dict()}
        torch.save(networks | {"losses": losses}, f"{folder}/{ranks}.pth")
    if ranks > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("flags", [
    ["--loss", "nce", "--views", "different"],
    ["--loss", "nce", "--views", "same", "--crops", "4", "--micro-batch", "2"],
    ["--loss", "dino", "--views", "different", "--micro-batch", "2"],
    ["--loss", "dino", "--views", "same"],
])
def test_two_ranks_take_the_steps_of_one_process(tmp_path, flags):
    """Loss, weights and centre after five steps, to 1e-10 in float64: two ranks of 4 images, one process of 8."""
    five_steps(0, 1, flags, tmp_path)
    torch.multiprocessing.spawn(five_steps, (2, flags, tmp_path), nprocs=2)
    one, two = (torch.load(tmp_path / f"{ranks}.pth", weights_only=True) for ranks in (1, 2))
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-10)
    start = vit.build_network(train.make_config(train.parse_args([*SMALL, *flags, "--batch-size", "8"]))).state_dict()
    for part in ("student", "teacher", "loss"):
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, atol=1e-10, rtol=0)
    assert (one["student"]["backbone.cls_token"] - start["backbone.cls_token"]).abs().max() > 1e-4


def torchrun(*flags, ranks=2):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", str(ROOT / "train.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *SMALL, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_torchrun_trains_stops_and_goes_on(tmp_path):
    """One writer; SIGTERM ends the step on all ranks; what is resumed by one process has the same log."""
    folder = tmp_path / "run"
    flags = ["--batch-size", "8", "--images-per-epoch", "64", "--epochs", "500", "--output", str(folder)]
    process = torchrun(*flags)
    for _ in range(600):
        time.sleep(0.1)
        lines = (folder / "log.jsonl").read_text().splitlines() if (folder / "log.jsonl").exists() else []
        if len(lines) > 2:
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert out.count("preset laptop") == 1 and ", 2 ranks, into" in out
    assert err.count(f"stopped; python train.py --resume {folder} goes on") == 1
    checkpoint = vit.read_checkpoint(folder / "ckpt.pth")
    assert checkpoint["step"] > 8 and len(checkpoint["metrics"]) > 2
    for line in checkpoint["metrics"][1:]:
        assert line["loss"] == pytest.approx(2.08, abs=0.3)  # of the whole batch of 8: not the half, not twice of it
    assert [json.loads(line)["epoch"] for line in (folder / "log.jsonl").read_text().splitlines()] == [
        line["epoch"] for line in checkpoint["metrics"]
    ]


def test_a_batch_that_the_ranks_cannot_share_is_told_once():
    process = torchrun("--batch-size", "9")
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert err.count("train.py: error: --batch-size 9 cannot be shared by 2 ranks: a multiple of 2 can") == 1
