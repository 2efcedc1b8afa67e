"""Settings, schedules, one step, and whole small runs through the command line."""

import copy
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision

import data
import metrics
import train
import vit

ROOT = Path(__file__).resolve().parent.parent
DIGITS = data.load_digits("sklearn")[0]
TINY = (
    "--preset laptop --digits sklearn --device cpu --batch-size 8 --image-size 28 --dim 24 "
    "--head-hidden-dim 32 --bottleneck-dim 16 --out-dim 64 --images-per-epoch 16 --epochs 2 "
    "--precision float32 "
)
FEW = {"TEST_IMAGES": 16, "BANK_IMAGES": 16, "VALIDATION_IMAGES": 16, "VALIDATION_BANK": 16}


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """The numbers of an epoch, and those at the end of a run, from a few images."""
    for name, images in FEW.items():
        monkeypatch.setattr(metrics, name, images)


def config_of(flags):
    return train.make_config(train.parse_args(flags.split()))


def start(folder, flags=""):
    """The exit status of a new run of a tiny network: 2 epochs of 2 steps."""
    return train.main([*TINY.split(), *flags.split(), "--output", str(folder)])


def resume(folder, flags=""):
    return train.main(["--resume", str(folder), *flags.split()])


def read(folder):
    return vit.read_checkpoint(folder / "ckpt.pth")


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same(one, other, at=""):
    """What two checkpoints hold, bit for bit but for times."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key in one:
            if "second" not in str(key):
                assert_same(one[key], other[key], f"{at}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), at
        for number, pair in enumerate(zip(one, other)):
            assert_same(*pair, f"{at}[{number}]")
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, at


def before_step(monkeypatch, number, act):
    """Have `act(parts)` happen as the training step of that number begins; lists the steps."""
    training_step, steps = train.training_step, []

    def step_of_a_run(config, parts, parallel, views, params, step, total):
        steps.append(step)
        if step == number:
            act(parts)
        return training_step(config, parts, parallel, views, params, step, total)

    monkeypatch.setattr(train, "training_step", step_of_a_run)
    return steps


PAPER = {"image_size": 224, "patch_size": 8, "dim": 384, "depth": 12, "heads": 6, "weights": "dino"}
PAPER |= {"canvas_size": 100, "num_distractors": 6, "batch_size": 32, "epochs": 20, "crops": 4}
PAPER |= {"images_per_epoch": 50_000, "temperature": 0.1, "momentum_teacher": 0.996}
LAPTOP = {"image_size": 56, "patch_size": 7, "dim": 96, "depth": 2, "heads": 3, "weights": "none"}
LAPTOP |= {"canvas_size": 64, "num_distractors": 3, "batch_size": 64, "epochs": 10, "crops": 2}
LAPTOP |= {"images_per_epoch": 6400, "temperature": 0.1, "momentum_teacher": 0.9, "lr": 0.001}
SHARED = {"loss": "nce", "views": "same", "dataset": "clutter", "rotation": 15, "warmup": 0.15}
SHARED |= {"weight_decay": 0.04, "weight_decay_end": 0.4, "distractor_size": 9, "fallbacks": []}


@pytest.mark.parametrize("preset,values", [("paper", PAPER), ("laptop", LAPTOP)])
def test_presets(preset, values):
    config, wanted = config_of(f"--preset {preset}"), SHARED | values | {"preset": preset}
    assert {name: config[name] for name in wanted} == wanted
    assert config["device"] == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "flags,values",
    [
        ("paper --image-size 112", {"lr": 0.00025, "pos_size": 224}),
        ("paper --views different --batch-size 64", {"crops": 1, "lr": 0.0005}),
        ("paper --batch-size 1024", {"lr": 0.004}),  # above 256 by the square root
        ("paper --dataset stl10", {"epochs": 10, "images_per_epoch": 100_000}),
        ("paper --loss dino", {"temperature": 0.1, "momentum_teacher": 0.996}),
        ("paper --image-size 99 --patch-size 9", {"pos_size": 99}),
        ("laptop --image-size 84 --batch-size 128", {"pos_size": 84, "dim": 96, "lr": 0.002}),
        ("laptop --views different --lr 0.5", {"crops": 1, "lr": 0.5}),
        ("laptop --views different --crops 2", {"crops": 2}),
        ("laptop --dataset stl10", {"epochs": 10, "images_per_epoch": 6400}),
        ("laptop --loss dino", {"temperature": 0.1, "images_per_epoch": 12_800}),
        ("laptop --loss dino --temperature 0.3", {"temperature": 0.3}),
    ],
)
def test_settings_that_follow_from_others(flags, values):
    config = config_of(f"--preset {flags}")
    assert {name: config[name] for name in values} == pytest.approx(values)


def test_every_setting_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(["--help"])
    assert stop.value.code == 0
    text = "".join(capsys.readouterr().out.split())
    for name, paper, laptop, about in train.SETTINGS:
        flag = "--" + name.replace("_", "-")
        assert flag in text and "".join(about.split()) in text, name
        values = {preset: config_of(f"--preset {preset}")[name] for preset in ("paper", "laptop")}
        for default, value in zip((paper, laptop), values.values()):
            assert isinstance(default, type) or default == value, name
        for preset, value in zip(("laptop", "paper"), values.values()):  # the other one's value
            words = [flag, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
            if isinstance(value, bool):
                words = [flag if value else flag.replace("--", "--no-")]
            words, value = ([flag, "3,2"], [2, 3]) if isinstance(value, list) else (words, value)
            config = train.make_config(train.parse_args(["--preset", preset, *words]))
            assert config[name] == pytest.approx(value), name


def test_schedules_start_and_end_where_they_should():
    c = {"lr": 2.0, "warmup": 0.15}
    rates = [train.learning_rate(c, progress) for progress in (0, 0.075, 0.15, 0.575, 1)]
    assert rates == pytest.approx([0, 1, 2, 1, 0])  # up a ramp, down a cosine
    assert [train.cosine(0.04, 0.4, p) for p in (0, 0.5, 1)] == pytest.approx([0.04, 0.22, 0.4])


@pytest.mark.parametrize("flags", ["--optimizer adamw", "--optimizer muon --loss dino"])
def test_each_parameter_has_its_optimizer_and_its_decay(flags):
    """Biases and norms have no decay; Muon moves the matrices of blocks and head, if asked."""
    config = config_of(f"--preset laptop {flags}")
    network = vit.build_network(config)
    optimizers = train.make_optimizers(config, network)
    groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
    assert groups[1]["weight_decay"] == 0  # the step gives the first one its decay
    where = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
    for name, parameter in network.named_parameters():
        inner = name.startswith(("backbone.blocks", "head.mlp")) and "muon" in flags
        kind = 1 if name.endswith("bias") or "norm" in name or parameter.ndim == 1 else 0
        kind = 2 if kind == 0 and inner else kind
        assert where.pop(id(parameter)) == kind, name
    assert not where


def test_muon_is_torchs():
    """Steps of matrices of each shape, up to the rounding of bfloat16, in which torch's is."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch before 2.9 has no Muon")
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((30, 10), (10, 10), (10, 40))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    optimizers = train.Muon(ours), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0)
    optimizers[0].param_groups[0]["lr"] = 0.1
    for _ in range(3):
        for one, other in zip(ours, theirs):
            one.grad = other.grad = torch.randn_like(one)
        for optimizer in optimizers:
            optimizer.step()
    for one, other, before in zip(ours, theirs, start):
        moved = (one - before).norm()
        assert moved > 0.1 and (one - other).norm() < 0.03 * moved
    values = torch.linalg.svdvals(train.orthogonalize(torch.randn(30, 10)))
    assert 0.6 < values.min() and values.max() < 1.3


def step_in_float64(config):
    """Parts, views and parameters of a step in float64, student and teacher different.

    Images are rendered one by one: in float32 the last bits depend on how many there are.
    """
    parts = train.make_parts(config, vit.build_network(config).double())
    parts["teacher"].load_state_dict(vit.build_network(config | {"seed": 1}).state_dict())
    if config["loss"] == "dino":
        noise = torch.randn(1, config["out_dim"], generator=torch.Generator().manual_seed(0))
        parts["loss"].double().center += noise / 100
    views = data.TrainingViews(config, DIGITS["train"])
    render = views.render

    def one_by_one(params):
        rows = [{k: v[i : i + 1] for k, v in params.items()} for i in range(len(params["centre"]))]
        return torch.cat([render(row).double() for row in rows], dim=1)

    views.render = one_by_one
    return parts, views, views.sample(3)


@pytest.mark.parametrize("loss", ["nce", "dino", "supervised"])
@pytest.mark.parametrize("views", ["same --crops 4", "different"])
def test_a_step_in_pieces_is_that_of_the_whole_batch(loss, views):
    """Loss, gradient, centre, teacher, to 1e-10, against the losses on the networks' outputs."""
    flags = f"{TINY} --loss {loss} --views {views} --batch-size 12 --clip-grad 1e9"
    config = config_of(flags)
    parts, views, params = step_in_float64(config)
    crops = views.render(params)
    outputs = torch.stack([parts["student"](crops[i]) for i in views.student])
    targets = torch.stack([parts["teacher"](crops[i]) for i in views.teacher]).detach()
    loss_fn, teacher = parts["loss"], targets
    if loss == "dino":
        teacher = loss_fn.teacher_probabilities(targets)
    elif loss == "supervised":
        teacher = views.split.labels[params["digit"]]
    whole = loss_fn(outputs, teacher, views.pairs)
    whole.backward()
    gradient = torch.cat([p.grad.flatten() for p in parts["student"].parameters()])
    old_teacher = torch.cat([p.flatten() for p in parts["teacher"].parameters()])
    center = loss == "dino" and 0.9 * loss_fn.center[0] + 0.1 * targets.mean(dim=(0, 1))
    assert gradient.norm() > 1e-3
    for size in (0, 1, 5, 6, 100):  # 5 does not divide 12
        parts, *_ = step_in_float64(config)
        small, (student, teacher) = config | {"micro_batch": size}, list(parts.values())[:2]
        # not in the first epoch
        got, norm = train.training_step(small, parts, student, views, params, step=15, steps=30)
        assert got.item() == pytest.approx(whole.item(), abs=1e-10)
        assert norm.item() == pytest.approx(gradient.norm().item(), abs=1e-9)
        got = torch.cat([p.grad.flatten() for p in student.parameters()])
        torch.testing.assert_close(got, gradient, atol=1e-10, rtol=0)
        if loss == "dino":
            torch.testing.assert_close(parts["loss"].center[0], center, atol=1e-10, rtol=0)
        momentum = (1 + config["momentum_teacher"]) / 2  # half way to 1
        new_student = torch.cat([p.detach().flatten() for p in student.parameters()])
        expected = momentum * old_teacher + (1 - momentum) * new_student
        got = torch.cat([p.flatten() for p in teacher.parameters()])
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)
        for group, decay in zip(parts["optimizer"].param_groups, (0.22, 0)):
            assert group["lr"] == train.learning_rate(config, 0.5)
            assert group["weight_decay"] == pytest.approx(decay)


def test_a_large_gradient_is_clipped():
    config = config_of(TINY + "--clip-grad 0.01")
    parts, views, params = step_in_float64(config)
    _, norm = train.training_step(config, parts, parts["student"], views, params, 15, 30)
    clipped = torch.cat([p.grad.flatten() for p in parts["student"].parameters()]).norm()
    assert norm > 0.02 and clipped.item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("loss", ["nce", "dino"])
def test_a_run_in_pieces_is_the_run(tmp_path, loss):
    weights = []
    recomputing = config_of("--checkpoint-blocks")
    assert vit.build_network(recomputing).backbone.checkpoint_blocks
    for extra in ("", "--micro-batch 4", "--checkpoint-blocks"):
        assert start(tmp_path / extra, f"--loss {loss} {extra}") == 0
        weights.append(read(tmp_path / extra)["teacher"])
    for other in weights[1:]:
        for name, value in weights[0].items():
            torch.testing.assert_close(other[name], value, atol=2e-4, rtol=0)


def saved_numbers(sizes):
    """Appends to `sizes` how many numbers autograd keeps for the way back, tensor by tensor."""

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)


def test_checkpointed_blocks_keep_less_and_give_the_same_gradient():
    backbone = vit.VisionTransformer(7, 48, 6, 3, 56)
    images, kept, gradients = torch.randn(2, 3, 56, 56), [], []
    for backbone.checkpoint_blocks in (False, True):
        sizes, _ = [], backbone.zero_grad()
        with saved_numbers(sizes):
            loss = backbone(images).square().sum()
        kept.append(sum(sizes))
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0])
    assert kept[1] < 0.35 * kept[0]


@pytest.mark.parametrize("loss", ["nce", "dino"])
def test_a_large_batch_in_pieces_keeps_what_one_piece_keeps(loss):
    """Numbers kept for the way back: 128 images by pieces of 8 against a batch of 8."""
    kept = {}
    for batch, micro in ((8, 0), (128, 8), (64, 0)):
        flags = f"--preset laptop --image-size 28 --batch-size {batch} --micro-batch {micro}"
        config = config_of(f"{flags} --loss {loss}")
        parts = train.make_parts(config, vit.build_network(config))
        networks = parts["loss"], parts["student"], parts["teacher"]
        views, sizes = data.TrainingViews(config, DIGITS["train"]), []

        def backward(part, sizes=sizes, key=(batch, micro)):
            kept[key] = max(kept.get(key, 0), sum(sizes))
            sizes.clear()
            part.backward()

        with saved_numbers(sizes):
            train.batch_loss(config, *networks, views, views.sample(0), backward)
    assert kept[128, 8] < 1.1 * kept[8, 0] < 0.3 * kept[64, 0]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_of_the_papers_network(precision):
    """ViT-S/8 at 224 px with its head, in full precision and in autocast."""
    flags = "--preset paper --weights none --views different --device cpu --batch-size 2"
    config = config_of(f"{flags} --precision {precision}")
    parts = train.make_parts(config, vit.build_network(config))
    start = {name: value.clone() for name, value in parts["student"].state_dict().items()}
    views = data.TrainingViews(config, DIGITS["train"])
    step = parts["student"], views, views.sample(0), 250
    loss, norm = train.training_step(config, parts, *step, steps=1000)
    assert loss.item() == pytest.approx(math.log(2), abs=0.05) and norm > 0
    for name, value in parts["student"].state_dict().items():
        assert value.dtype == torch.float32 and value.isfinite().all()
        assert not torch.equal(value, start[name]), name


def test_float16_scales_its_gradients_and_scales_them_back(tmp_path):
    """AdamW's steps hide a wrong scale, its running mean of the gradients does not."""
    size = {}
    for precision in ("float32", "float16"):
        assert start(tmp_path / precision, f"--precision {precision}") == 0
        checkpoint = read(tmp_path / precision)
        states = checkpoint["optimizer"]["state"].values()
        size[precision] = sum(state["exp_avg"].square().sum() for state in states).sqrt()
    assert checkpoint["scaler"]["scale"] > 1
    torch.testing.assert_close(size["float16"], size["float32"], rtol=0.1, atol=0)


def scale_gradients_by(monkeypatch, scale):
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=scale))


@pytest.mark.parametrize("spoiled", [math.nan, math.inf])
def test_an_overflow_in_one_gradient_skips_both_optimizers(spoiled):
    """The patches' projection is AdamW's; clipping would spoil the gradients of Muon too."""
    config = config_of(f"{TINY} --precision float16 --optimizer muon")
    parts = train.make_parts(config, vit.build_network(config))
    views = data.TrainingViews(config, DIGITS["train"])
    student, before = parts["student"], copy.deepcopy(parts["student"].state_dict())
    student.backbone.patch_embed.proj.weight.register_hook(lambda grad: grad * spoiled)
    for step in (5, 6):
        train.training_step(config, parts, student, views, views.sample(step), step, steps=10)
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert parts["scaler"].get_scale() < 2.0**16 and not parts["muon"].state


def test_float16_skips_steps_that_overflow_which_is_no_failure(tmp_path, monkeypatch):
    """The scale is halved, step by step, until the gradients do not overflow."""
    scale_gradients_by(monkeypatch, 2.0**22)
    assert start(tmp_path, "--precision float16 --images-per-epoch 80") == 0
    checkpoint = read(tmp_path)
    steps = {state["step"].item() for state in checkpoint["optimizer"]["state"].values()}
    assert len(steps) == 1 and 0 < steps.pop() < 20 and checkpoint["scaler"]["scale"] < 2**22
    assert math.isfinite(checkpoint["metrics"][2]["loss"])


@pytest.mark.parametrize(
    "loss,views,crops,extra",
    [
        ("nce", "same", 4, ""),
        ("nce", "same", 1, "--background texture --texture-pool 3"),
        ("nce", "different", 2, "--no-symmetric"),
        ("dino", "same", 2, ""),
        ("dino", "different", 1, "--no-head-norm --head-layers 3"),
        ("dino", "different", 4, ""),
    ],
)
def test_every_kind_of_run(tmp_path, monkeypatch, capsys, loss, views, crops, extra):
    monkeypatch.chdir(tmp_path)
    flags = f"--loss {loss} --views {views} --crops {crops} {extra} --keep-epochs 1"
    assert train.main(f"{TINY} {flags}".split()) == 0
    folder = Path("runs") / f"clutter-{loss}-{views}{'-texture' * ('texture' in extra)}"
    checkpoint, lines = read(folder), log_of(folder)
    assert (checkpoint["step"], checkpoint["epoch"], checkpoint["epoch_loss"]) == (4, 2, [0.0])
    assert checkpoint["config"]["crops"] == crops
    untrained = vit.build_network(checkpoint["config"]).state_dict()
    for name, value in checkpoint["teacher"].items():
        still = "bias" in name or name.endswith("weight_g") or "norm" in name
        assert still or not torch.equal(value, untrained[name]), name
    if loss == "dino":
        name, first = "head.last_layer.weight_v", vit.read_checkpoint(folder / "epoch-1.pth")
        assert torch.equal(first["teacher"][name], untrained[name])  # frozen in the first epoch
        assert checkpoint["loss"]["center"].abs().sum() > 0
    assert lines == checkpoint["metrics"] and [line["epoch"] for line in lines] == [0, 1, 2]
    names = {"epoch", "step", "loss", "lr", "images_per_second", "seconds", "validation"}
    assert set(lines[2]) == names and [line["step"] for line in lines] == [0, 2, 4]
    assert sorted(os.listdir(folder)) == ["ckpt.pth", "epoch-1.pth", "log.jsonl", "metrics.json"]

    out, err = capsys.readouterr()
    assert out.startswith("preset laptop (as asked)") and len(out.splitlines()) <= 31
    assert "Does it look at the digit" in out and "probe" in out
    assert out.splitlines()[-1] == f"python visualize.py {folder / 'ckpt.pth'}"
    assert "\r" not in err and err.count("\n") == 2  # no terminal: a line an epoch, no bar
    assert [line.startswith("epoch") and "/2: loss " in line for line in err.splitlines()] == [1, 1]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert start(tmp_path / name, f"--views different --seed {seed}") == 0
    assert_same(read(tmp_path / "a"), read(tmp_path / "b"))
    assert log_of(tmp_path / "a")[1]["loss"] != log_of(tmp_path / "c")[1]["loss"]


def test_a_run_never_lands_on_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [train.make_folder(config_of("--preset laptop"), None) for _ in range(3)]
    assert names == [f"runs/clutter-nce-same{end}" for end in ("", "-2", "-3")]
    texture = config_of("--preset laptop --loss dino --views different --background texture")
    assert train.make_folder(texture, None) == "runs/clutter-dino-different-texture"
    assert train.make_folder(texture, "a/b") == "a/b" and os.path.isdir("a/b")


@pytest.mark.parametrize("views", ["different", "same"])
def test_training_learns(tmp_path, views):
    """120 small steps on easy canvases bring the loss well below chance."""
    flags = "--batch-size 16 --epochs 4 --images-per-epoch 480 --lr 0.003 --dim 48 --canvas-size 32"
    heads = "--num-distractors 0 --head-hidden-dim 128 --bottleneck-dim 32"
    config, chance = config_of(f"{TINY} --views {views} {flags} {heads}"), math.log(16)
    parts = train.make_parts(config, vit.build_network(config))
    assert train.train(config, parts, DIGITS, str(tmp_path)) == log_of(tmp_path)
    losses = [line["loss"] for line in log_of(tmp_path)[1:]]
    assert losses[0] == pytest.approx(chance, abs=0.15) and losses[-1] < chance - 0.2


def test_each_epoch_is_measured_on_the_same_validation_canvases(tmp_path):
    """Before the first step and after each epoch the log holds what `measure_attention` says."""
    assert start(tmp_path, "--views different --keep-epochs 0,2") == 0
    lines = log_of(tmp_path)
    for line in (lines[0], lines[2]):
        said = line["validation"]
        backbone, kept = vit.load_backbone(tmp_path / f"epoch-{line['epoch']}.pth")
        held_out = kept["config"], DIGITS["validation"], 16, "matched", "validation"
        seen = metrics.observe({"trained": backbone}, data.evaluation_batches(*held_out))
        changed = next(data.evaluation_batches(*held_out, batch_size=1, parts=True))
        effects = metrics.observe_effects(backbone, [changed])
        table = metrics.measure_attention(seen, effects, resamples=0)
        rows = {"mean", "head_1", "head_2", "head_3", "uniform", "ink", "brightness", "shuffled"}
        rows.add("oracle")
        assert rows == set(said) - {"images", "knn", "loss", "mean_cosine"}
        assert said["images"] == 16 and 0 <= said["knn"] <= 1
        for row in rows:
            for name, value in said[row].items():
                assert value == pytest.approx(table[row][name]["value"], abs=1e-6)
        names = {"selectivity", "auroc", "pointing", "entropy", "diversity", "patch_faithfulness"}
        assert set(said["mean"]) == names
        assert said["loss"] == pytest.approx(math.log(8), abs=0.4)
    assert lines[0]["validation"]["mean"] != lines[2]["validation"]["mean"]
    assert lines[0]["validation"]["brightness"] == lines[2]["validation"]["brightness"]


def test_validation_is_the_same_for_every_seed():
    configs = [config_of(f"{TINY} --seed {seed}") for seed in (0, 1)]
    parts, cpu = train.make_parts(configs[0], vit.build_network(configs[0])), torch.device("cpu")
    one, other = (train.Validation(config, DIGITS, cpu)(parts) for config in configs)
    assert one == other


def test_measuring_changes_nothing_of_the_run(tmp_path, monkeypatch):
    assert start(tmp_path / "measured", "--loss dino") == 0
    nothing = {"mean": {}, "mean_cosine": 0.0, "entropy_of_mean": 1.0, "mean_entropy": 0.0}
    monkeypatch.setattr(train.Validation, "__call__", lambda *args: nothing)
    assert start(tmp_path / "not", "--loss dino") == 0
    one, other = read(tmp_path / "measured"), read(tmp_path / "not")
    assert_same(one | {"metrics": []}, other | {"metrics": []})


def test_collapse_is_told_once_and_beside_the_verdict(tmp_path, monkeypatch, capsys):
    """Each epoch's line has what it is told by; at first here the teacher tells images apart."""
    measure, entropies = train.Validation.__call__, iter([0.2, 0.5, 0.999, 0.999])

    def measured(self, parts):
        line = measure(self, parts)
        assert 0 <= line["mean_entropy"] <= line["entropy_of_mean"] + 1e-6 <= 1 + 1e-5
        return line | {"entropy_of_mean": 1.0, "mean_entropy": next(entropies)}

    monkeypatch.setattr(train.Validation, "__call__", measured)
    assert start(tmp_path, "--loss dino --epochs 3") == 0
    out, said = capsys.readouterr()
    assert (
        said.count("mean cosine 0.") == 3
        and "mean entropy 0.50 ln K, of the mean 1.00 ln K" in said
    )
    assert said.count("warning: the network has collapsed") == 1
    assert said.index("epoch 2/3") < said.index("warning: the network") < said.index("epoch 3/3")
    assert "No: the network has collapsed" in " ".join(out.split()) and "Yes" not in out


def test_compile_compiles_every_block_or_says_that_it_cannot(tmp_path, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(vit.Block, "compile", lambda block: compiled.append(id(block)))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda function: function)
        assert start(tmp_path / "compiled", "--compile") == 0
    assert len(set(compiled)) == 4  # two of the student, two of the teacher

    def no_compiler(function):
        raise RuntimeError("no compiler\nwas found")

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert start(tmp_path / "not", "--compile") == 0
    assert "warning: --compile does nothing here (no compiler was found)" in capsys.readouterr().err
    assert len(compiled) == 4


def test_weights_of_another_run_and_another_number_of_heads(tmp_path, capsys):
    """They start the next run; heads that cut q, k and v otherwise are told and recorded."""
    assert start(tmp_path / "first", "--seed 5") == 0
    weights = f"--weights {tmp_path / 'first' / 'ckpt.pth'} --keep-epochs 0"
    for heads, warnings in ((3, 0), (2, 1)):
        capsys.readouterr()
        assert start(tmp_path / str(heads), f"{weights} --heads {heads}") == 0
        assert capsys.readouterr().err.count("warning: --heads 2 cuts q, k and v") == warnings
        begun = vit.read_checkpoint(tmp_path / str(heads) / "epoch-0.pth")
        for name, value in read(tmp_path / "first")["teacher"].items():
            if name.startswith("backbone."):
                assert torch.equal(begun["teacher"][name], value), name
        assert len(begun["config"]["fallbacks"]) == warnings


def test_digits_that_stand_in_for_mnist_are_told_and_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    assert start(tmp_path / "run", f"--digits auto --data-root {tmp_path / 'none'}") == 0
    lines = capsys.readouterr().err.splitlines()
    config, says = read(tmp_path / "run")["config"], "scikit-learn's 1,797 digits instead of MNIST"
    assert sum("warning: " in line for line in lines) == sum(says in line for line in lines) == 1
    assert config["digits"] == "sklearn" and says in config["fallbacks"][0]
    assert says in (tmp_path / "run" / "metrics.json").read_text()


BAD = (
    "--image-size 50, --image-size 0, --patch-size 0, "
    "--preset paper --weights none --patch-size 0, "
    "--heads 7, --dim 0, --depth 0, --head-hidden-dim 0, --bottleneck-dim -1, --canvas-size 27, "
    "--loss dino --out-dim 0, --loss dino --warmup 0, --num-distractors -1, --distractor-size 0, "
    "--distractor-size 29, --batch-size 1, --images-per-epoch 32 --batch-size 64, --epochs 0, "
    "--lr nan, --checkpoint-minutes inf, --micro-batch -1, --micro-batch 5, --texture-pool 3, "
    "--dataset stl10 --views different, --dataset stl10 --background texture, --device cuda:77, "
    "--device mps, --weights other.pth --patch-size 14, --weights other.pth --depth 3, "
    "--output taken, --images-per-epoch 2000 --batch-size 1298"
)
BAD = [(flags, "--" + flags.split("--")[-1]) for flags in BAD.split(", ")] + [
    ("--keep-epochs 1,99", "--keep-epochs "),
    ("--blur 0 inf", "--blur "),
    ("--background a\rb", "--background a b: no images there"),
    ("--weights missing.pth", "missing.pth: no such file"),
    ("--weights in-memory.pth", "in-memory.pth: no such file"),
    ("--weights text.pth", "text.pth is not a PyTorch checkpoint"),
    ("--digits mnist --data-root nowhere", "nowhere/MNIST/raw is missing or damaged"),
    ("--output text.pth", "text.pth"),
    ("--resume nowhere", "nowhere: no such file"),
    ("--resume list.pth", "list.pth: use a ckpt.pth of train.py"),
    ("--resume other.pth", "other.pth: use a ckpt.pth of train.py"),
    ("--resume lacking.pth", "lacking.pth"),
    ("--output /proc", "/proc"),
]


@pytest.mark.parametrize("flags,says", BAD)
def test_bad_input_is_told_in_one_line(tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    (tmp_path / "text.pth").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"optimizer": {}}, tmp_path / "lacking.pth")
    torch.save(vit.VisionTransformer(7, 24, 1, 3, 56).state_dict(), tmp_path / "other.pth")
    (tmp_path / "taken").mkdir()
    torch.save({}, tmp_path / "taken" / "ckpt.pth")
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert train.main([*TINY.split(), *flags.split(" ")]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("train.py: error: ") and says in err and err.count("\n") == 1
    assert out == "" or "/proc" in flags
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before


@pytest.mark.parametrize("flags", ["--keep-epochs 1,x", "--seed=--", "--blur 1", "--crops 3"])
def test_what_is_no_value_of_a_flag_is_told_with_the_usage(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        train.parse_args(flags.split())
    assert stop.value.code == 2 and "train.py: error: " in capsys.readouterr().err


def test_bad_input_at_the_shell():
    command = [sys.executable, str(ROOT / "train.py"), "--preset", "laptop", "--image-size", "50"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_nothing_is_fetched_for_a_run_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load_digits", lambda *args: pytest.fail("digits were asked for"))
    (tmp_path / "ckpt.pth").write_text("")
    assert start(tmp_path) == start(tmp_path / "new", f"--weights {tmp_path / 'none.pth'}") == 2


def spoil_weights(parts):
    parts["student"].backbone.cls_token.data.fill_(math.nan)


def spoil_gradient(parts):
    parts["student"].backbone.cls_token.register_hook(lambda gradient: gradient * math.nan)


@pytest.mark.parametrize(
    "spoil,flags,at,steps,kept",
    [
        (spoil_weights, "--epochs 3 --images-per-epoch 32", 6, 8, 4),
        (spoil_gradient, "--epochs 3 --images-per-epoch 32", 6, 8, 4),
        (spoil_gradient, "--epochs 1 --images-per-epoch 320", 3, 20, 0),
        (spoil_gradient, "--epochs 1 --images-per-epoch 80 --checkpoint-minutes 1e-9", 3, 4, 3),
        (spoil_gradient, "--epochs 1 --images-per-epoch 320 --precision float16", 0, 20, 0),
    ],
)
def test_a_nan_stops_the_run(tmp_path, capsys, monkeypatch, spoil, flags, at, steps, kept):
    """Within 20 steps, and before a checkpoint is written; the last one is finite."""
    scale_gradients_by(monkeypatch, 2.0**4)
    done = before_step(monkeypatch, at, spoil)
    assert start(tmp_path, flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: error: the loss or its gradient is NaN or infinite, at step")
    assert f" step {steps} or up to 19 before" in error and "use a lower --lr" in error
    checkpoint = read(tmp_path)
    assert len(done) == steps and checkpoint["step"] == kept
    assert all(value.isfinite().all() for value in checkpoint["student"].values())


@pytest.mark.parametrize(
    "flags,says",
    [
        ("", ("out of memory", "--micro-batch", "--image-size", "--checkpoint-blocks")),
        ("--temperature 1e-40", ("the validation loss is NaN or infinite", "--lr")),
    ],
)
def test_a_failure_in_training_is_told(tmp_path, capsys, monkeypatch, flags, says):
    before_step(monkeypatch, 0, lambda parts: torch.empty(1 << 60, dtype=torch.uint8))
    assert start(tmp_path, flags) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train.py: error: {says[0]}") and error.count("\n") == 1
    assert all(text in error for text in says) and read(tmp_path)["step"] == 0
