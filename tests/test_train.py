"""Settings, schedules, one step, and whole small runs through the command line."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import data
import train
import visualize
import vit

ROOT = Path(__file__).resolve().parent.parent


def config_of(*flags):
    return train.make_config(train.parse_args(list(flags)))


# --------------------------------------------------------------------------------- settings


def test_paper_preset_is_the_papers():
    c = config_of("--preset", "paper")
    assert (c["dim"], c["depth"], c["heads"], c["patch_size"], c["image_size"]) == (384, 12, 6, 8, 224)
    assert (c["canvas_size"], c["num_distractors"], c["distractor_size"]) == (100, 6, 9)
    assert (c["batch_size"], c["epochs"], c["images_per_epoch"], c["temperature"]) == (32, 20, 50_000, 0.1)
    assert c["lr"] == pytest.approx(0.0005 * 32 / 64)
    assert c["warmup"] * c["epochs"] == pytest.approx(3)
    assert (c["weight_decay"], c["weight_decay_end"], c["weights"]) == (0.04, 0.4, "dino")
    assert (c["views"], c["crops"]) == ("same", 4)
    assert config_of("--preset", "paper", "--views", "different")["crops"] == 1
    assert config_of("--preset", "laptop", "--views", "same")["crops"] == 2
    assert c["pos_size"] == config_of("--preset", "paper", "--image-size", "112")["pos_size"] == 224


def test_dino_has_a_temperature_and_a_teacher_of_its_own():
    nce, dino = (config_of("--preset", "laptop", "--loss", loss) for loss in ("nce", "dino"))
    assert dino["temperature"] == 0.1 and dino["momentum_teacher"] > nce["momentum_teacher"]
    assert config_of("--preset", "laptop", "--loss", "dino", "--temperature", "0.3")["temperature"] == 0.3


def test_flags_override_presets():
    c = config_of("--preset", "laptop", "--image-size", "84", "--heads", "2", "--crops", "2", "--lr", "0.5")
    assert (c["image_size"], c["heads"], c["crops"], c["lr"]) == (84, 2, 2, 0.5)
    assert c["preset"] == "laptop" and c["dim"] == train.PRESETS["laptop"]["dim"]


def test_learning_rate_follows_the_batch():
    lr = {b: config_of("--preset", "paper", "--batch-size", str(b))["lr"] for b in (64, 256, 1024)}
    assert lr[64] == pytest.approx(0.0005) and lr[256] == pytest.approx(0.002)
    assert lr[1024] == pytest.approx(0.004)  # by the square root from 256


def test_every_flag_has_a_line_of_help(capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in ("loss", "views", "crops", "digits", "weights", "preset", "image-size", "patch-size", "heads",
                 "batch-size", "epochs", "lr", "temperature", "seed", "device", "data-root", "output"):
        assert f"--{name}" in text


# -------------------------------------------------------------------------------- schedules


def test_schedules_start_and_end_where_they_should():
    c = {"lr": 2.0, "warmup": 0.15, "warmup_teacher_temp": 0.02, "teacher_temp": 0.04}
    assert train.learning_rate(c, 0) == 0
    assert train.learning_rate(c, 0.075) == pytest.approx(1.0)  # half way up the ramp
    assert train.learning_rate(c, 0.15) == pytest.approx(2.0)
    assert train.learning_rate(c, 0.575) == pytest.approx(1.0)  # half way down the cosine
    assert train.learning_rate(c, 1) == pytest.approx(0)
    assert [train.cosine(0.04, 0.4, p) for p in (0, 0.5, 1)] == pytest.approx([0.04, 0.22, 0.4])
    assert train.teacher_temperature(c, 0) == 0.02
    assert train.teacher_temperature(c, 0.075) == pytest.approx(0.03)
    assert train.teacher_temperature(c, 0.5) == pytest.approx(0.04)


def test_teacher_is_the_moving_average():
    teacher, student = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = [0.9 * t + 0.1 * s for t, s in zip(teacher.parameters(), student.parameters())]
    train.update_teacher(teacher, student, 0.9)
    for value, parameter in zip(expected, teacher.parameters()):
        torch.testing.assert_close(value, parameter)


def test_weight_decay_spares_biases_norms_and_nothing_else():
    network = vit.build_network(config_of("--preset", "laptop"))
    groups = train.make_optimizer(network).param_groups
    assert groups[1]["weight_decay"] == 0
    spared = {id(p) for p in groups[1]["params"]}
    for name, parameter in network.named_parameters():
        assert (id(parameter) in spared) == (name.endswith("bias") or "norm" in name or parameter.ndim == 1), name
    assert sum(len(g["params"]) for g in groups) == len(list(network.parameters()))


# --------------------------------------------------------------------------------- the runs

SMALL = ["--preset", "laptop", "--digits", "sklearn", "--device", "cpu", "--batch-size", "8"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The figures at the end of a run on a few images."""
    monkeypatch.setattr(visualize, "TEST_IMAGES", 50)
    monkeypatch.setattr(visualize, "BANK_IMAGES", 60)
    monkeypatch.setattr(visualize, "VALIDATION_IMAGES", 40)
    monkeypatch.setattr(train, "KNN_BANK", 40)


@pytest.mark.parametrize("loss", ["nce", "dino"])
@pytest.mark.parametrize("views,crops", [("same", 4), ("same", 1), ("different", 1), ("different", 2)])
def test_every_kind_of_run(tmp_path, monkeypatch, capsys, loss, views, crops):
    monkeypatch.chdir(tmp_path)
    command = ["--loss", loss, "--views", views, "--crops", str(crops), "--epochs", "2", "--images-per-epoch", "16"]
    assert train.main([*SMALL, *command]) == 0
    folder = tmp_path / "runs" / f"clutter-{loss}-{views}"
    checkpoint = vit.read_checkpoint(folder / "ckpt.pth")
    assert set(checkpoint) == {
        "config", "step", "epoch", "student", "teacher", "optimizer", "loss", "scaler", "metrics", "epoch_loss", "skipped",
        "threads", "digest",
    }
    assert (checkpoint["step"], checkpoint["epoch"]) == (4, 2)
    assert checkpoint["config"]["crops"] == crops and checkpoint["config"]["digits"] == "sklearn"
    start = vit.build_network(checkpoint["config"]).state_dict()
    moved = {name: (checkpoint["student"][name] - start[name]).abs().max() for name in start}
    assert all(moved[name] > 0 for name in moved if name.startswith("backbone.") and "weight" in name)
    if loss == "dino":
        assert checkpoint["loss"]["center"].abs().sum() > 0
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    printed = capsys.readouterr().out
    assert printed.startswith("preset laptop (asked for)")
    assert "Does it look at the digit" in printed and "linear probe" in printed
    assert printed.splitlines()[-1] == f"python visualize.py {folder.relative_to(tmp_path) / 'ckpt.pth'}"


def test_dino_holds_its_last_layer_still_in_the_first_epoch(tmp_path):
    folder = tmp_path / "run"
    flags = [*SMALL, "--loss", "dino", "--views", "different", "--images-per-epoch", "16", "--epochs", "1"]
    assert train.main([*flags, "--output", str(folder)]) == 0
    checkpoint = vit.read_checkpoint(folder / "ckpt.pth")
    start = vit.build_network(checkpoint["config"]).state_dict()
    name = "head.last_layer.weight_v"
    assert torch.equal(checkpoint["student"][name], start[name])
    assert torch.equal(checkpoint["teacher"][name], start[name])


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    flags = [*SMALL, "--views", "different", "--epochs", "1", "--images-per-epoch", "24"]
    runs = {}
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert train.main([*flags, "--seed", seed, "--output", str(tmp_path / name)]) == 0
        runs[name] = vit.read_checkpoint(tmp_path / name / "ckpt.pth")
    assert runs["a"]["metrics"][-1]["loss"] == runs["b"]["metrics"][-1]["loss"] != runs["c"]["metrics"][-1]["loss"]
    for key, value in runs["a"]["teacher"].items():
        assert torch.equal(value, runs["b"]["teacher"][key])


def test_a_run_never_lands_on_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of("--preset", "laptop")
    assert [train.new_folder(config, None) for _ in range(3)] == [
        str(Path("runs") / f"clutter-nce-same{end}") for end in ("", "-2", "-3")
    ]


@pytest.mark.parametrize("views,crops", [("different", 1), ("same", 2)])
def test_training_learns(tmp_path, views, crops):
    """Two hundred small steps on easy canvases bring the loss well below chance."""
    flags = ["--views", views, "--crops", str(crops), "--batch-size", "16", "--epochs", "10", "--images-per-epoch", "320"]
    config = config_of(*SMALL, *flags, "--lr", "0.001") | {"num_distractors": 0}
    student = vit.build_network(config)
    train.train(config, student, data.load_digits("sklearn")[0], str(tmp_path))
    losses = [line["loss"] for line in vit.read_checkpoint(tmp_path / "ckpt.pth")["metrics"][1:]]
    chance = math.log(16)
    assert losses[0] == pytest.approx(chance, abs=0.15)
    assert losses[-1] < chance - 0.2


def test_each_epoch_is_measured_on_the_same_validation_canvases(tmp_path):
    """Before the first step and after each epoch: what the log holds is what `measure` says of that epoch."""
    folder = tmp_path / "run"
    flags = ["--views", "different", "--epochs", "2", "--images-per-epoch", "16", "--keep-epochs", "0,2"]
    assert train.main([*SMALL, *flags, "--output", str(folder)]) == 0
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(0, 0), (1, 2), (2, 4)]
    assert sorted(p.name for p in folder.iterdir()) == [
        "ckpt.prev.pth", "ckpt.pth", "curves.png", "epoch-0.pth", "epoch-2.pth", "log.jsonl", "metrics.json",
    ]
    for line in (lines[0], lines[2]):
        kept = vit.read_checkpoint(folder / f"epoch-{line['epoch']}.pth")
        assert kept["epoch"] == line["epoch"]
        network = vit.build_network(kept["config"])
        network.load_state_dict(kept["teacher"])
        splits = data.load_digits("sklearn")[0]
        batches = list(data.evaluation_batches(kept["config"], splits["validation"], 40, "matched", "validation"))
        table = visualize.measure(network.backbone, batches, resamples=0)
        said = line["validation"]
        assert said["images"] == 40 and 0 <= said["knn"] <= 1
        assert {row for row in said if row.startswith("head_")} == {"head_1", "head_2", "head_3"}
        for row in ("mean", "head_1", "head_3", "brightness", "shuffled"):
            for name in ("selectivity", "auroc", "pointing", "entropy"):
                assert said[row][name] == pytest.approx(table[row][name]["value"], abs=1e-6)
        assert said["mean"]["diversity"] == pytest.approx(table["mean"]["diversity"]["value"], abs=1e-6)
        assert said["loss"] == pytest.approx(math.log(8), abs=0.2)
    assert lines[0]["validation"]["mean"] != lines[2]["validation"]["mean"]
    assert lines[0]["validation"]["brightness"] == lines[2]["validation"]["brightness"]


def test_validation_canvases_are_the_same_for_every_seed():
    splits = data.load_digits("sklearn")[0]
    device = torch.device("cpu")
    one, other = (train.Validation(config_of(*SMALL, "--seed", seed), splits, device) for seed in ("0", "1"))
    assert torch.equal(one.canvases[0]["images"], other.canvases[0]["images"])
    crops = [v.views.render(v.drawn[0]) for v in (one, other)]
    assert torch.equal(*crops)
    training = data.TrainingViews(one.config, splits["train"])
    assert not torch.equal(crops[0], training.render(training.draw(0)))


def test_measuring_changes_nothing_of_the_run(tmp_path, monkeypatch):
    flags = [*SMALL, "--loss", "dino", "--epochs", "2", "--images-per-epoch", "16"]
    assert train.main([*flags, "--output", str(tmp_path / "measured")]) == 0
    monkeypatch.setattr(train.Validation, "__call__", lambda *args: {"loss": 0.0})
    config = config_of(*flags)
    train.train(config, vit.build_network(config), data.load_digits("sklearn")[0], str(tmp_path))
    one, other = (vit.read_checkpoint(tmp_path / path)["teacher"] for path in ("measured/ckpt.pth", "ckpt.pth"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def loss_and_gradient(config, micro_batch):
    """Of the first step of a run, in float64, computed so many images at a time; and what moves DINO's centre."""
    config = config | {"micro_batch": micro_batch, "precision": "float32"}
    student = vit.build_network(config).double()
    teacher = vit.build_network(config | {"seed": 1}).double()
    views = data.TrainingViews(config, data.load_digits("sklearn")[0]["train"])
    render = views.render
    views.render = lambda params: render(params).double()
    loss_fn = train.NCELoss(0.1) if config["loss"] == "nce" else train.DINOLoss(config["out_dim"]).double()
    if config["loss"] == "dino":
        loss_fn.center += torch.randn(loss_fn.center.shape, generator=torch.Generator().manual_seed(0)) / 100
    loss, logits = train.loss_of(
        config, loss_fn, student, teacher, views, views.draw(3), 0.5, lambda part: part.backward()
    )
    return loss, torch.cat([p.grad.flatten() for p in student.parameters()]), logits


@pytest.mark.parametrize("loss", ["nce", "dino"])
@pytest.mark.parametrize("views,crops", [("same", 4), ("different", 1)])
def test_pieces_give_the_gradient_of_the_whole_batch(loss, views, crops):
    """To 1e-10 in float64, for pieces that do not divide the batch too, as if nothing had been cut."""
    flags = ["--preset", "laptop", "--loss", loss, "--views", views, "--crops", str(crops), "--batch-size", "12"]
    config = config_of(*flags)
    whole, gradient, logits = loss_and_gradient(config, 0)
    assert gradient.norm() > 1e-3
    for size in (1, 5, 6, 100):
        piecewise, same, same_logits = loss_and_gradient(config, size)
        assert piecewise.item() == pytest.approx(whole.item(), abs=1e-10)
        torch.testing.assert_close(same, gradient, atol=1e-10, rtol=0)
        if loss == "dino":
            torch.testing.assert_close(same_logits, logits, atol=1e-10, rtol=0)


@pytest.mark.parametrize("loss", ["nce", "dino"])
def test_a_run_in_pieces_is_the_run(tmp_path, loss):
    flags = [*SMALL, "--loss", loss, "--epochs", "2", "--images-per-epoch", "24", "--precision", "float32"]
    weights = []
    for extra in ([], ["--micro-batch", "4"], ["--checkpoint-blocks"]):
        folder = str(tmp_path / "-".join(["run", *extra]))
        assert train.main([*flags, *extra, "--output", folder]) == 0
        weights.append(vit.read_checkpoint(folder + "/ckpt.pth")["teacher"])
    for other in weights[1:]:
        for name, value in weights[0].items():
            torch.testing.assert_close(other[name], value, atol=2e-4, rtol=0)


def test_compile_compiles_every_block_or_says_in_one_line_that_it_cannot(tmp_path, monkeypatch, capsys):
    flags = [*SMALL, "--epochs", "1", "--images-per-epoch", "16"]
    compiled = []
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda function: function)
        patch.setattr(vit.Block, "compile", lambda block: compiled.append(block))
        assert train.main([*flags, "--compile", "--output", str(tmp_path / "compiled")]) == 0
    assert len({id(block) for block in compiled}) == 4  # two of the student, two of the teacher

    def no_compiler(function):
        raise RuntimeError("no compiler\nwas found")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", no_compiler)
        patch.setattr(vit.Block, "compile", lambda block: compiled.clear())
        capsys.readouterr()
        assert train.main([*flags, "--compile", "--output", str(tmp_path / "not")]) == 0
    assert "warning: --compile does nothing here (no compiler was found)\n" in capsys.readouterr().err
    assert len(compiled) == 4


def test_checkpointed_blocks_keep_less_and_give_the_same_gradient():
    backbone = vit.VisionTransformer(7, 48, 6, 3, 56)
    images, kept, gradients = torch.randn(2, 3, 56, 56), [], []
    for on in (False, True):
        backbone.checkpoint_blocks, sizes = on, []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        backbone.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = backbone(images).square().sum()
        kept.append(sum(sizes))
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0])
    assert kept[1] < 0.35 * kept[0]


@pytest.mark.parametrize("loss", ["nce", "dino"])
def test_a_large_batch_in_pieces_keeps_what_one_piece_keeps(loss):
    """Numbers kept for the way back: 512 images by pieces of 8 against a batch of 8."""
    kept = {}
    for batch, micro in ((8, 0), (512, 8), (64, 0)):
        flags = ["--loss", loss, "--batch-size", str(batch), *(["--micro-batch", str(micro)] if micro else [])]
        config = config_of("--preset", "laptop", *flags)
        student = vit.build_network(config)
        views = data.TrainingViews(config, data.load_digits("sklearn")[0]["train"])
        loss_fn = train.NCELoss(0.2) if loss == "nce" else train.DINOLoss(config["out_dim"])
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        def backward(part, sizes=sizes, key=(batch, micro)):
            kept[key] = max(kept.get(key, 0), sum(sizes))
            sizes.clear()
            part.backward()

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            train.loss_of(config, loss_fn, student, student, views, views.draw(0), 0.5, backward)
    assert kept[512, 8] < 1.1 * kept[8, 0] < 0.2 * kept[64, 0]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_of_the_papers_network(tmp_path, monkeypatch, precision):
    """ViT-S/8 at 224 px with DINO's head, in full precision and in autocast."""
    monkeypatch.setattr(visualize, "VALIDATION_IMAGES", 2)
    monkeypatch.setattr(train, "KNN_BANK", 2)
    config = config_of("--preset", "paper", "--weights", "none", "--views", "different", "--device", "cpu",
                       "--batch-size", "2", "--images-per-epoch", "4", "--epochs", "1", "--precision", precision)
    network = vit.build_network(config)
    start = {name: value.clone() for name, value in network.state_dict().items()}
    train.train(config, network, data.load_digits("sklearn")[0], str(tmp_path))
    checkpoint = vit.read_checkpoint(tmp_path / "ckpt.pth")
    assert checkpoint["metrics"][1]["loss"] == pytest.approx(math.log(2), abs=0.05)
    for name, value in checkpoint["student"].items():
        assert value.dtype == torch.float32 and value.isfinite().all()
        assert not torch.equal(value, start[name]) or value.numel() == 1, name


def test_float16_scales_its_gradients_and_scales_them_back(tmp_path):
    """AdamW's steps hide a wrong scale, its running mean of the gradients does not: it is float32's."""
    size = {}
    for precision in ("float32", "float16"):
        folder = tmp_path / precision
        flags = ["--precision", precision, "--epochs", "1", "--images-per-epoch", "24", "--output", str(folder)]
        assert train.main([*SMALL, *flags]) == 0
        checkpoint = vit.read_checkpoint(folder / "ckpt.pth")
        size[precision] = sum(s["exp_avg"].square().sum() for s in checkpoint["optimizer"]["state"].values()).sqrt()
    assert checkpoint["scaler"]["scale"] > 1
    torch.testing.assert_close(size["float16"], size["float32"], rtol=0.1, atol=0)


def test_weights_of_another_run_and_another_number_of_heads(tmp_path, capsys):
    """They start the next run; heads that cut q, k and v otherwise are told and recorded."""
    flags = [*SMALL, "--epochs", "1", "--images-per-epoch", "8"]
    first = str(tmp_path / "first")
    assert train.main([*flags, "--output", first]) == 0
    weights = ["--weights", first + "/ckpt.pth"]  # in a run of one step, whose learning rate is still 0
    capsys.readouterr()
    for heads, warnings in (("3", 0), ("2", 1)):
        folder = str(tmp_path / heads)
        assert train.main([*flags, *weights, "--heads", heads, "--output", folder]) == 0
        assert capsys.readouterr().err.count("warning: --heads 2: the q, k and v of") == warnings
        start, end = (vit.read_checkpoint(f"{f}/ckpt.pth") for f in (first, folder))
        torch.testing.assert_close(end["student"]["backbone.cls_token"], start["teacher"]["backbone.cls_token"])
        assert len(end["config"]["fallbacks"]) == warnings


# ------------------------------------------------------------------------------ stop and go on


def stop_after(monkeypatch, steps, number=signal.SIGTERM):
    """Send this process a signal during that step of training; validation is not counted."""
    loss_of, calls = train.loss_of, []

    def counting(*args, **kwargs):
        if len(args) > 7:  # with `backward`
            calls.append(1)
            if len(calls) == steps:
                os.kill(os.getpid(), number)
        return loss_of(*args, **kwargs)

    monkeypatch.setattr(train, "loss_of", counting)


def without_times(lines):
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


@pytest.mark.parametrize("flags", [["--loss", "nce"], ["--loss", "dino"], ["--micro-batch", "4"]])
def test_a_run_that_was_stopped_anywhere_ends_as_if_it_had_not_been(tmp_path, monkeypatch, capsys, flags):
    """Bit for bit: in the first step, in mid-epoch, at the end of an epoch, and twice."""
    flags = [*SMALL, *flags, "--epochs", "2", "--images-per-epoch", "32"]  # 2 epochs of 4 steps
    assert train.main([*flags, "--output", str(tmp_path / "whole")]) == 0
    whole = vit.read_checkpoint(tmp_path / "whole" / "ckpt.pth")
    for stops in ([1], [4], [6], [2, 3]):
        folder = str(tmp_path / f"stopped-{stops}")
        start = [*flags, "--output", folder]
        for steps in stops:
            with monkeypatch.context() as patch:
                stop_after(patch, steps)
                assert train.main(start) == 128 + signal.SIGTERM
            assert f"python train.py --resume {folder} goes on" in capsys.readouterr().err
            start = ["--resume", folder]
        assert vit.read_checkpoint(folder + "/ckpt.pth")["step"] == sum(stops)
        assert train.main(start) == 0
        resumed = vit.read_checkpoint(folder + "/ckpt.pth")
        for part in ("student", "teacher", "loss"):
            for name, value in whole[part].items():
                assert torch.equal(resumed[part][name], value), (stops, name)
        assert without_times(resumed["metrics"]) == without_times(whole["metrics"])
        lines = [json.loads(line) for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]
        assert lines == resumed["metrics"]
        assert (tmp_path / folder / "metrics.json").exists()


def test_a_second_interrupt_leaves_at_once(tmp_path, monkeypatch, capsys):
    """In the midst of a step; the checkpoint from before the step is what goes on."""
    flags = [*SMALL, "--epochs", "1", "--images-per-epoch", "32"]
    assert train.main([*flags, "--output", str(tmp_path / "whole")]) == 0
    folder = str(tmp_path / "left")
    with monkeypatch.context() as patch:
        stop_after(patch, 3, signal.SIGINT)
        stop_after(patch, 3, signal.SIGINT)
        assert train.main([*flags, "--output", folder]) == 130
    assert f"left at once; python train.py --resume {folder} goes on from its last" in capsys.readouterr().err
    assert vit.read_checkpoint(folder + "/ckpt.pth")["step"] == 0
    assert train.main(["--resume", folder]) == 0
    whole, resumed = (vit.read_checkpoint(f"{f}/ckpt.pth")["student"] for f in (tmp_path / "whole", folder))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_checkpoints_are_written_in_mid_epoch_too(tmp_path, monkeypatch):
    steps, save = [], train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda path, content: (steps.append(content["step"]), save(path, content)))
    flags = [*SMALL, "--epochs", "1", "--images-per-epoch", "32", "--output", str(tmp_path / "run")]
    assert train.main([*flags, "--checkpoint-minutes", "1e-9"]) == 0
    assert steps == [0, 1, 2, 3, 4]


def test_signals_are_ours_during_training_alone():
    before = signal.getsignal(signal.SIGINT)
    with train.Stopper() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT and signal.getsignal(signal.SIGINT) == before  # a second one stops at once
    assert signal.getsignal(signal.SIGINT) == before


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        flags = [*SMALL, "--epochs", "2", "--images-per-epoch", "16", "--output", str(folder)]
        assert train.main(flags) == 128 + signal.SIGTERM
    assert vit.read_checkpoint(folder / "ckpt.prev.pth")["step"] == 2
    raw = (folder / "ckpt.pth").read_bytes()
    (folder / "ckpt.pth").write_bytes(raw[: len(raw) // 2])
    with monkeypatch.context() as patch:  # killed before its first checkpoint, it leaves the whole one, in its place
        patch.setattr(train, "train", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train.main(["--resume", str(folder)]) == 130
    assert "going on from" in capsys.readouterr().err
    assert vit.read_checkpoint(folder / "ckpt.pth")["step"] == 2 and not (folder / "ckpt.prev.pth").exists()
    assert train.main(["--resume", str(folder)]) == 0
    assert vit.read_checkpoint(folder / "ckpt.pth")["step"] == 4


def test_more_epochs_go_on_with_a_run_that_has_ended(tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert train.main([*SMALL, "--epochs", "1", "--images-per-epoch", "16", "--output", folder]) == 0
    assert train.main(["--resume", folder, "--epochs", "2"]) == 0
    assert "2 epochs instead of 1: the schedules are planned anew" in capsys.readouterr().err
    assert [line["epoch"] for line in vit.read_checkpoint(folder + "/ckpt.pth")["metrics"]] == [0, 1, 2]


@pytest.mark.parametrize("flags,says", [
    (["--resume", "RUN"], "has had its 1 epochs: more --epochs go on with it"),
    (["--resume", "RUN", "--epochs", "2", "--loss", "dino"], "has --loss nce, not dino: leave the flag out"),
    (["--resume", "RUN", "--epochs", "2", "--output", "x"], "--output x: a resumed run goes on in its own folder"),
    (["--resume", "nowhere"], "no such file"),
    (["--resume", "foreign"], "lacks config, step"),
])
def test_what_cannot_be_resumed_is_told(tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    if "RUN" in flags:
        assert train.main([*SMALL, "--epochs", "1", "--images-per-epoch", "8", "--output", "RUN"]) == 0
    (tmp_path / "foreign").mkdir()
    torch.save({"student": {}, "metrics": []}, tmp_path / "foreign" / "ckpt.pth")
    capsys.readouterr()
    assert train.main(flags) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags,says", [
    (["--image-size", "50"], "--image-size 50 is not divisible by --patch-size 7: 49 is"),
    (["--heads", "7"], "--heads 7 does not divide the width"),
    (["--batch-size", "1"], "--batch-size 1 leaves --loss nce without negatives"),
    (["--batch-size", "1298", "--images-per-epoch", "2000"], "--batch-size 1298 is larger than the data set of 1,297"),
    (["--batch-size", "64", "--images-per-epoch", "32"], "--batch-size 64 is larger than --images-per-epoch 32"),
    (["--epochs", "0"], "--epochs 0 must be above 0"),
    (["--lr", "nan"], "--lr nan must be above 0"),
    (["--micro-batch", "0"], "--micro-batch 0 must be above 0"),
    (["--micro-batch", "-1"], "--micro-batch -1 must be above 0"),
    (["--micro-batch", "5"], "--micro-batch 5 does not divide --batch-size 64: 1, 2, 4, 8, 16, 32, 64 do"),
    (["--seed", str(2**63)], "--seed 9223372036854775808 is no whole number of 64 bits"),
    (["--background", "a\rb"], "--background a b: there is no such folder"),
    (["--checkpoint-minutes", "0"], "--checkpoint-minutes 0.0 must be above 0"),
    (["--keep-epochs", "1,x"], "--keep-epochs 1,x is no list of epochs such as 1,5,10"),
    (["--keep-epochs", "1,99"], "--keep-epochs 1,99: epochs go from 0, before the first step, to 10"),
    (["--weights", "missing.pth"], "missing.pth: no such file"),
    (["--weights", "text.pth"], "text.pth is not a PyTorch checkpoint"),
    (["--weights", "other.pth", "--patch-size", "8"], "--patch-size 8: the weights have patches of 7"),
    (["--digits", "mnist", "--data-root", "nowhere"], "no MNIST in nowhere/MNIST/raw"),
    (["--device", "cuda:77"], "--device cuda:77 is not to be had here"),
    (["--output", "taken"], "--output taken already holds a run"),
    (["--output", "text.pth"], "text.pth cannot be written to (File exists): --output names another folder"),
    (["--output", "/proc"], "/proc cannot be written to"),
    (["--weights", "taken"], "taken: is a folder"),
])
def test_bad_input_is_told_in_one_line(tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    (tmp_path / "text.pth").write_text("hello")
    torch.save(vit.VisionTransformer(7, 64, 1, 1, 56).state_dict(), tmp_path / "other.pth")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "ckpt.pth").write_text("")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    base = ["--preset", "laptop", "--device", "cpu"] + (["--digits", "sklearn"] if "--digits" not in flags else [])
    assert train.main([*base, *flags]) == 2
    captured = capsys.readouterr()
    assert says in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_none_stops_the_run(tmp_path, capsys, monkeypatch, what):
    """With the step, the learning rate and the last good checkpoint, which holds numbers alone."""
    folder, calls = tmp_path / "run", []
    loss_of = train.loss_of

    def breaking(*args):
        calls.extend([1] * (len(args) > 7))  # with `backward`, that is in training
        loss, logits = loss_of(*args)
        if len(calls) == 7 and len(args) > 7:
            if what == "loss":
                return loss * math.nan, logits
            next(args[2].parameters()).grad.fill_(math.inf)
        return loss, logits

    monkeypatch.setattr(train, "loss_of", breaking)
    assert train.main([*SMALL, "--epochs", "3", "--images-per-epoch", "32", "--output", str(folder)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    rate = train.learning_rate(config_of(*SMALL), 6 / 12)
    assert error.startswith(f"train.py: error: step 7: the loss or its gradient is no number, at learning rate {rate:.2g};")
    assert f"the checkpoint in {folder}, of step 4, is from before; try a lower --lr" in error
    checkpoint = vit.read_checkpoint(folder / "ckpt.pth")
    assert checkpoint["step"] == 4 and all(value.isfinite().all() for value in checkpoint["student"].values())


def test_a_validation_loss_that_is_no_number_stops_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.NCELoss, "forward", lambda *args, **kwargs: torch.tensor(math.nan, requires_grad=True))
    assert train.main([*SMALL, "--epochs", "1", "--images-per-epoch", "8", "--output", str(tmp_path / "run")]) == 1
    assert "train.py: error: the validation loss after epoch 0 is nan; try a lower --lr" in capsys.readouterr().err


def test_steps_that_float16_skips_are_counted_and_not_mistaken(tmp_path):
    """A scale so large that the first gradients overflow: it is halved, step by step, until they do not."""
    folder = tmp_path / "run"
    config = config_of(*SMALL, "--precision", "float16", "--epochs", "2", "--images-per-epoch", "64")
    with pytest.MonkeyPatch.context() as patch:
        scaler = torch.amp.GradScaler
        patch.setattr(torch.amp, "GradScaler", lambda *args, **kwargs: scaler(*args, init_scale=2.0**22, **kwargs))
        folder.mkdir()
        train.train(config, vit.build_network(config), data.load_digits("sklearn")[0], str(folder))
    lines = vit.read_checkpoint(folder / "ckpt.pth")["metrics"]
    assert 0 < lines[1]["skipped_steps"] <= lines[2]["skipped_steps"] < 16
    assert math.isfinite(lines[2]["loss"])


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, capsys, monkeypatch):
    """As on a full disk: here no file may grow beyond what the first checkpoint needs."""
    folder = tmp_path / "run"
    config = [*SMALL, "--epochs", "2", "--images-per-epoch", "16", "--output", str(folder)]
    save = torch.save

    def full_disk(content, file):
        if content["step"] > 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        save(content, file)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(torch, "save", full_disk)
    try:
        assert train.main(config) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "ckpt.pth could not be written" in capsys.readouterr().err.splitlines()[-1]
    assert vit.read_checkpoint(folder / "ckpt.pth")["step"] == 2 and not (folder / ".part-ckpt.pth").exists()
    monkeypatch.setattr(torch, "save", save)
    assert train.main(["--resume", str(folder)]) == 0


def test_running_out_of_memory_names_the_flags_that_help(tmp_path, capsys, monkeypatch):
    def greedy(*args):
        if len(args) > 7:
            torch.empty(1 << 60, dtype=torch.uint8)
        return loss_of(*args)

    loss_of = train.loss_of
    monkeypatch.setattr(train, "loss_of", greedy)
    assert train.main([*SMALL, "--epochs", "1", "--images-per-epoch", "8", "--output", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: error: out of memory") and "--micro-batch" in error and "--image-size" in error
    assert vit.read_checkpoint(tmp_path / "run" / "ckpt.pth")["step"] == 0


def test_nothing_is_fetched_for_a_run_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load_digits", lambda *args: pytest.fail("digits were asked for"))
    (tmp_path / "ckpt.pth").write_text("")
    base = ["--preset", "laptop", "--device", "cpu"]
    assert train.main([*base, "--output", str(tmp_path)]) == 2
    assert train.main([*base, "--weights", str(tmp_path / "missing.pth")]) == 2


def test_two_dashes_are_no_value():
    with pytest.raises(SystemExit) as stop:
        train.parse_args(["--seed=--"])
    assert stop.value.code == 2


def test_bad_input_at_the_shell():
    command = [sys.executable, str(ROOT / "train.py"), "--preset", "laptop", "--image-size", "50"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_digits_that_stand_in_for_mnist_are_told_and_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    flags = ["--preset", "laptop", "--device", "cpu", "--batch-size", "8", "--images-per-epoch", "8", "--epochs", "1"]
    flags += ["--data-root", str(tmp_path / "none"), "--output", str(tmp_path / "run")]
    assert train.main(flags) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1 and "scikit-learn's 1,797 digits instead of MNIST" in warnings[0]
    config = vit.read_checkpoint(tmp_path / "run" / "ckpt.pth")["config"]
    assert config["digits"] == "sklearn" and "instead of MNIST" in config["fallbacks"][0]
    assert "instead of MNIST" in visualize.caption(config)
