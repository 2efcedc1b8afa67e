"""Schedules, optimisers, the exact step, and whole small runs through the command line."""

import copy
import io
import json
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
from helpers import (
    DIGITS,
    FEW_IMAGES,
    ROOT,
    TINY,
    PretendedGPU,
    assert_same,
    before_step,
    closed_url,
    config_of,
    forking_context,
    log_of,
    on_pretended_gpu,
    read,
    start,
)
from PIL import Image
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
import observe
import train
import views
import visualize
import vit
import weights
from settings import Config
from train import TrainingState
from views import TrainingViews
from vit import VisionTransformer, ViTShape

pytestmark = pytest.mark.usefixtures("few_images")


@pytest.fixture(scope="module")
def nce_run(tmp_path_factory):
    """The folder of a run with the NCE loss, the teacher kept before and after training."""
    return trained(tmp_path_factory.mktemp("nce"), "--loss nce --keep-epochs 0,2")


@pytest.fixture(scope="module")
def dino_run(tmp_path_factory):
    """The folder of a run with the DINO loss."""
    return trained(tmp_path_factory.mktemp("dino"), "--loss dino")


def trained(folder: Path, flags: str) -> Path:
    """The folder of a run that other tests look at, too."""
    with pytest.MonkeyPatch.context() as patch:
        for name, count in FEW_IMAGES.items():
            patch.setattr(evaluate, name, count)
        assert start(folder, flags) == 0
    return folder


def flat(tensors) -> torch.Tensor:
    """All numbers of the tensors in one row."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def gradient_of(network: torch.nn.Module) -> torch.Tensor:
    return flat(parameter.grad for parameter in network.parameters())


def make_training(config: Config) -> tuple[TrainingState, TrainingViews]:
    """The state and the views of a run before its first step."""
    state = train.make_state(config, vit.build_network(config))
    return state, TrainingViews(config, DIGITS["train"])


# ------------------------------------------------------------------------ schedules and optimisers


def test_the_learning_rate_rises_and_falls_to_zero():
    config = config_of("--preset laptop --lr 2 --warmup 0.15")
    rates = [train.learning_rate(config, progress) for progress in (0, 0.075, 0.15, 0.575, 1)]
    assert rates == pytest.approx([0, 1, 2, 1, 0])  # up a ramp, down a cosine


def test_cosine_goes_from_start_to_end():
    values = [train.cosine(0.04, 0.4, progress) for progress in (0, 0.5, 1)]
    assert values == pytest.approx([0.04, 0.22, 0.4])


@pytest.mark.parametrize("flags", ["--optimizer adamw", "--optimizer muon --loss dino"])
def test_every_parameter_has_its_optimizer_and_its_decay(flags):
    """Biases and norms have no decay. Muon, if asked for, has the matrices of blocks and head."""
    config = config_of(f"--preset laptop {flags}")
    network = vit.build_network(config)
    adamw, muon = train.make_optimizers(config, network)
    decayed, not_decayed = adamw.param_groups
    assert not_decayed["weight_decay"] == 0  # the step gives the first one its decay
    groups = {"decayed": decayed, "not decayed": not_decayed}
    if config.optimizer == "muon":
        (groups["muon"],) = muon.param_groups
    else:
        assert muon is None

    group_of = {id(p): name for name, group in groups.items() for p in group["params"]}
    for name, parameter in network.named_parameters():
        if name.endswith("bias") or "norm" in name or parameter.ndim == 1:
            expected = "not decayed"
        elif muon and name.startswith(("backbone.blocks", "head.mlp")):
            expected = "muon"
        else:
            expected = "decayed"
        assert group_of.pop(id(parameter)) == expected, name
    assert not group_of


def test_muon_is_torchs():
    """Up to the rounding of bfloat16, in which torch's computes; matrices of all proportions."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has it since 2.9")
    torch.manual_seed(0)
    shapes = ((30, 10), (10, 10), (10, 40), (10, 10))  # two of one shape are moved together
    before = [torch.randn(shape) for shape in shapes]
    ours = [torch.nn.Parameter(matrix.clone()) for matrix in before]
    theirs = [torch.nn.Parameter(matrix.clone()) for matrix in before]
    our_muon = train.Muon(ours)
    our_muon.param_groups[0]["lr"] = 0.1
    their_muon = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0)
    for _ in range(3):
        for our_matrix, their_matrix in zip(ours, theirs):
            our_matrix.grad = torch.randn_like(our_matrix)
            their_matrix.grad = our_matrix.grad.clone()
        our_muon.step()
        their_muon.step()
    for our_matrix, their_matrix, start_matrix in zip(ours, theirs, before):
        distance = (our_matrix - start_matrix).norm()
        assert distance > 0.1
        assert (our_matrix - their_matrix).norm() < 0.03 * distance


def test_an_orthogonalized_matrix_has_singular_values_near_1():
    matrices = torch.randn(2, 30, 10, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(train.orthogonalize(matrices))
    assert 0.6 < values.min()
    assert values.max() < 1.3


# ---------------------------------------------------------------------------------- the exact step


def step_in_float64(config: Config) -> tuple[TrainingState, TrainingViews, dict]:
    """State, views and parameters of a step in float64, in which the teacher is not the student.

    Images are rendered one by one: in float32 their last bits depend on how many there are.
    """
    state = train.make_state(config, vit.build_network(config).double())
    other_network = vit.build_network(replace(config, seed=1))
    state.teacher.load_state_dict(other_network.state_dict())
    if config.loss == "dino":
        noise = torch.randn(1, config.out_dim, generator=torch.Generator().manual_seed(0))
        state.loss_fn.double().center += noise / 100
    training_views = TrainingViews(config, DIGITS["train"])
    render = training_views.render

    def render_one_by_one(params):
        images = []
        for row in range(len(params["centre"])):
            one_image = {name: value[row : row + 1] for name, value in params.items()}
            images.append(render(one_image).double())
        return torch.cat(images, dim=1)

    training_views.render = render_one_by_one
    return state, training_views, training_views.sample(3)


@pytest.mark.parametrize("loss", ["nce", "dino", "supervised"])
@pytest.mark.parametrize("views_flags", ["same --crops 4", "different"])
def test_a_step_in_pieces_is_that_of_the_whole_batch(loss, views_flags):
    """To 1e-10: the loss, the gradient, the centre, and what becomes of the teacher."""
    flags = f"{TINY} --loss {loss} --views {views_flags} --batch-size 12 --clip-grad 1e9"
    config = config_of(flags)

    # the plain version, without any piece
    state, training_views, params = step_in_float64(config)
    plan = training_views.plan
    crops = training_views.render(params)
    outputs = torch.stack([state.student(crops[number]) for number in plan.student])
    teacher_outputs = torch.stack([state.teacher(crops[number]) for number in plan.teacher])
    teacher_outputs = teacher_outputs.detach()
    targets = teacher_outputs
    if loss == "dino":
        targets = state.loss_fn.targets(teacher_outputs)
        mean_output = teacher_outputs.mean(dim=(0, 1))
        expected_center = 0.9 * state.loss_fn.center[0] + 0.1 * mean_output
    elif loss == "supervised":
        targets = training_views.split.labels[params["digit"]]
    expected_loss = state.loss_fn(outputs, targets, plan.pairs)
    expected_loss.backward()
    expected_gradient = gradient_of(state.student)
    assert expected_gradient.norm() > 1e-3
    old_teacher = flat(state.teacher.parameters())

    for micro_batch in (0, 1, 5, 6, 100):  # 5 does not divide 12
        state, training_views, params = step_in_float64(config)
        for parameter in state.student.parameters():
            parameter.grad = torch.ones_like(parameter)  # of the step before
        pieces_config = replace(config, micro_batch=micro_batch)
        # step 15 of 30 is not in the first epoch, in which DINO's last layer rests
        loss_value, norm = train.training_step(
            pieces_config, state, training_views, params, step=15, total_steps=30
        )
        assert loss_value.item() == pytest.approx(expected_loss.item(), abs=1e-10)
        assert norm.item() == pytest.approx(expected_gradient.norm().item(), abs=1e-9)
        gradient = gradient_of(state.student)
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-10, rtol=0)
        if loss == "dino":
            center = state.loss_fn.center[0]
            torch.testing.assert_close(center, expected_center, atol=1e-10, rtol=0)
        momentum = (1 + config.momentum_teacher) / 2  # half way to 1
        new_student = flat(state.student.parameters())
        expected_teacher = momentum * old_teacher + (1 - momentum) * new_student
        teacher = flat(state.teacher.parameters())
        torch.testing.assert_close(teacher, expected_teacher, atol=1e-10, rtol=0)


def test_the_optimizers_follow_the_schedules():
    config = config_of(TINY)
    state, training_views = make_training(config)
    train.training_step(config, state, training_views, training_views.sample(0), 15, 30)
    rate = train.learning_rate(config, 0.5)
    decayed, not_decayed = state.optimizer.param_groups
    assert decayed["lr"] == not_decayed["lr"] == rate
    assert decayed["weight_decay"] == pytest.approx(0.22)
    assert not_decayed["weight_decay"] == 0
    assert state.muon.param_groups[0]["lr"] == 10 * rate


def test_a_large_gradient_is_clipped():
    config = config_of(f"{TINY} --clip-grad 0.01")
    state, training_views, params = step_in_float64(config)
    _, norm = train.training_step(config, state, training_views, params, 15, 30)
    assert norm > 0.02
    assert gradient_of(state.student).norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("flags", ["--micro-batch 4", "--checkpoint-blocks"])
@pytest.mark.parametrize("loss", ["nce", "dino"])
def test_a_run_that_needs_less_memory_is_the_same_run(tmp_path, request, loss, flags):
    plain_run = request.getfixturevalue(f"{loss}_run")
    config = config_of(flags)
    backbone = vit.build_network(config).backbone
    assert backbone.checkpoint_blocks == ("--checkpoint-blocks" in flags)
    assert start(tmp_path, f"--loss {loss} {flags}") == 0
    teacher = read(tmp_path)["teacher"]
    for name, value in read(plain_run)["teacher"].items():
        torch.testing.assert_close(teacher[name], value, atol=2e-4, rtol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_of_the_papers_network(precision):
    """ViT-S/8 at 224 px with its head: a step changes every weight, and all stay finite."""
    flags = "--preset paper --weights none --views different --device cpu --batch-size 2"
    config = config_of(f"{flags} --precision {precision}")
    state, training_views = make_training(config)
    before = copy.deepcopy(state.student.state_dict())
    params = training_views.sample(0)
    loss, norm = train.training_step(config, state, training_views, params, 250, 1000)
    assert loss.item() == pytest.approx(math.log(2), abs=0.05)
    assert norm > 0
    for name, value in state.student.state_dict().items():
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        assert not torch.equal(value, before[name]), name


# ------------------------------------------------------------------------------------------ memory


def saved_for_backward(sizes: list[int]):
    """A context in which autograd appends the size of each tensor that it keeps to `sizes`."""

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)


def test_checkpointed_blocks_keep_less_and_give_the_same_gradient():
    torch.manual_seed(0)
    backbone = VisionTransformer(ViTShape(patch_size=7, dim=48, depth=6, heads=3, pos_size=56))
    images = torch.randn(2, 3, 56, 56)
    kept = {}
    gradients = {}
    for checkpoint_blocks in (False, True):
        backbone.checkpoint_blocks = checkpoint_blocks
        backbone.zero_grad()
        sizes = []
        with saved_for_backward(sizes):
            loss = backbone(images).square().sum()
        loss.backward()
        kept[checkpoint_blocks] = sum(sizes)
        gradients[checkpoint_blocks] = gradient_of(backbone)
    torch.testing.assert_close(gradients[True], gradients[False])
    assert kept[True] < 0.35 * kept[False]


def most_kept_at_a_time(loss: str, batch_size: int, micro_batch: int) -> int:
    """How many numbers a training step keeps for the backward pass, at most."""
    flags = f"--image-size 28 --batch-size {batch_size} --micro-batch {micro_batch} --loss {loss}"
    config = config_of(f"--preset laptop {flags}")
    state, training_views = make_training(config)
    sizes = []
    kept = []

    def backward(piece_loss):
        kept.append(sum(sizes))
        sizes.clear()
        piece_loss.backward()

    with saved_for_backward(sizes):
        train.batch_loss(config, state, training_views, training_views.sample(0), backward)
    return max(kept)


@pytest.mark.parametrize("loss", ["nce", "dino"])
def test_a_large_batch_in_pieces_keeps_what_one_piece_keeps(loss):
    in_pieces = most_kept_at_a_time(loss, batch_size=128, micro_batch=8)
    one_piece = most_kept_at_a_time(loss, batch_size=8, micro_batch=0)
    half_a_batch = most_kept_at_a_time(loss, batch_size=64, micro_batch=0)
    assert in_pieces < 1.1 * one_piece
    assert 1.1 * one_piece < 0.3 * half_a_batch


# ----------------------------------------------------------------------------------------- float16


def scale_gradients_by(monkeypatch, scale: float):
    """Let the scale of float16's gradients begin at `scale`."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=scale))


def test_float16_scales_its_gradients_and_scales_them_back(tmp_path, nce_run):
    """AdamW's steps would hide a wrong scale, its running mean of the gradients does not."""
    assert start(tmp_path, "--precision float16") == 0
    assert read(tmp_path)["scaler"]["scale"] > 1
    norms = {}
    for run in (tmp_path, nce_run):
        moments = read(run)["optimizer"]["state"].values()
        norms[run] = flat(moment["exp_avg"] for moment in moments).norm()
    torch.testing.assert_close(norms[tmp_path], norms[nce_run], rtol=0.1, atol=0)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_an_overflow_in_one_gradient_skips_both_optimizers(factor):
    """The projection of patches is AdamW's; clipping would spoil the gradients of Muon too."""
    config = config_of(f"{TINY} --precision float16 --optimizer muon")
    state, training_views = make_training(config)
    before = copy.deepcopy(state.student.state_dict())
    projection = state.student.backbone.patch_embed.proj.weight
    projection.register_hook(lambda gradient: gradient * factor)
    for step in (5, 6):
        params = training_views.sample(step)
        train.training_step(config, state, training_views, params, step, 10)
    for name, value in state.student.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert state.scaler.get_scale() < 2.0**16
    assert not state.muon.state


def test_steps_of_float16_that_overflow_are_skipped_and_are_no_failure(tmp_path, monkeypatch):
    """The scale is halved, step by step, until the gradients do not overflow."""
    scale_gradients_by(monkeypatch, 2.0**22)
    assert start(tmp_path, "--precision float16 --images-per-epoch 80") == 0
    checkpoint = read(tmp_path)
    steps = {moment["step"].item() for moment in checkpoint["optimizer"]["state"].values()}
    assert len(steps) == 1
    assert 0 < steps.pop() < 20
    assert checkpoint["scaler"]["scale"] < 2**22
    assert math.isfinite(checkpoint["metrics"][2]["loss"])


# -------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    "loss, views_of_run, crops, flags",
    [
        ("nce", "same", 4, ""),
        ("nce", "same", 1, "--background texture"),
        ("nce", "different", 2, "--no-symmetric"),
        ("dino", "same", 2, ""),
        ("dino", "different", 1, "--no-head-norm --head-layers 3"),
        ("dino", "different", 4, ""),
        ("supervised", "same", 2, ""),
    ],
)
def test_every_kind_of_run(tmp_path, monkeypatch, capsys, loss, views_of_run, crops, flags):
    monkeypatch.chdir(tmp_path)
    flags = f"--loss {loss} --views {views_of_run} --crops {crops} {flags} --keep-epochs 1"
    assert train.main(f"{TINY} {flags}".split()) == 0
    ending = "-texture" if "texture" in flags else ""
    folder = Path("runs") / f"clutter-{loss}-{views_of_run}{ending}"

    # the checkpoint
    assert sorted(os.listdir(folder)) == ["ckpt.pth", "epoch-1.pth", "log.jsonl", "metrics.json"]
    checkpoint = read(folder)
    assert (checkpoint["step"], checkpoint["epoch"]) == (4, 2)
    assert checkpoint["epoch_loss"] == [0.0]
    config = config_of(f"{TINY} {flags}")
    assert checkpoint["config"] == asdict(config)
    untrained = vit.build_network(config).state_dict()
    for name, value in checkpoint["teacher"].items():
        may_rest = "bias" in name or name.endswith("weight_g") or "norm" in name
        assert may_rest or not torch.equal(value, untrained[name]), name
    if loss == "dino":
        name = "head.last_layer.weight_v"
        after_one_epoch = weights.read_checkpoint(folder / "epoch-1.pth")["teacher"]
        assert torch.equal(after_one_epoch[name], untrained[name])  # DINO does not train it yet
        assert checkpoint["loss"]["center"].abs().sum() > 0

    # the log
    lines = log_of(folder)
    assert lines == checkpoint["metrics"]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert [line["step"] for line in lines] == [0, 2, 4]
    names = {"epoch", "step", "loss", "lr", "images_per_second", "seconds"}
    assert lines[2].keys() == names | {"validation", "collapse"}

    # what is printed
    output, errors = capsys.readouterr()
    output_lines = output.splitlines()
    assert output_lines[0].startswith("preset laptop (as asked): ")
    assert output_lines[-1] == f"Next: python visualize.py {folder / 'ckpt.pth'}"
    assert len(output_lines) <= 45  # a tall screen
    assert "Where does it look?" in output
    assert "Which map should you believe?" in output
    assert "linear probe" in output
    error_lines = errors.splitlines()
    assert len(error_lines) == 2  # without a terminal there is a line an epoch, and no bar
    for epoch, line in enumerate(error_lines, 1):
        assert line.startswith(f"epoch {epoch}/2: loss ")


def test_the_seed_decides_the_whole_run(tmp_path, nce_run):
    assert start(tmp_path / "again", "--loss nce --keep-epochs 0,2") == 0
    assert_same(read(tmp_path / "again"), read(nce_run))
    assert start(tmp_path / "other", "--loss nce --keep-epochs 0,2 --seed 1") == 0
    assert log_of(tmp_path / "other")[1]["loss"] != log_of(nce_run)[1]["loss"]


@pytest.mark.parametrize("views_of_run", ["different", "same"])
def test_training_learns(tmp_path, views_of_run):
    """120 small steps on easy canvases bring the loss well below that of chance."""
    flags = "--batch-size 16 --epochs 4 --images-per-epoch 480 --lr 0.003 --dim 48 --canvas-size 32"
    flags += " --num-distractors 0 --head-hidden-dim 128 --bottleneck-dim 32"
    config = config_of(f"{TINY} --views {views_of_run} {flags}")
    state, training_views = make_training(config)
    run = train.Run(config, state.student, DIGITS, training_views, str(tmp_path), None)
    history = train.train(run, state)
    assert history == log_of(tmp_path)
    losses = [line["loss"] for line in history[1:]]
    chance = math.log(16)
    assert losses[0] == pytest.approx(chance, abs=0.2)
    assert losses[-1] < chance - 0.2


def test_compile_compiles_the_blocks_of_student_and_teacher(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(vit.Block, "compile", lambda block: compiled.append(id(block)))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert start(tmp_path, "--compile") == 0
    assert len(compiled) == len(set(compiled)) == 4  # two blocks each


def test_without_a_compiler_nothing_is_compiled(monkeypatch, capsys):
    def no_compiler(function):
        raise RuntimeError("no compiler\nwas found")

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(vit.Block, "compile", lambda block: pytest.fail("it was compiled"))
    train.compile_blocks(vit.build_network(config_of(TINY)))
    error = capsys.readouterr().err
    assert error == "warning: --compile has no effect here (no compiler was found)\n"


def test_a_run_starts_from_the_weights_of_another(tmp_path, capsys, nce_run):
    """Heads that cut q, k and v differently than in training are warned of and recorded."""
    flags = f"--weights {nce_run / 'ckpt.pth'} --seed 5 --keep-epochs 0"
    for heads, warnings in ((3, 0), (2, 1)):
        run = tmp_path / str(heads)
        capsys.readouterr()
        assert start(run, f"{flags} --heads {heads}") == 0
        output, errors = capsys.readouterr()
        assert f"starting from {nce_run / 'ckpt.pth'}: teacher" in output
        assert errors.count("warning: --heads 2 cuts q, k and v") == warnings
        begun = weights.read_checkpoint(run / "epoch-0.pth")
        for name, value in read(nce_run)["teacher"].items():
            if name.startswith("backbone."):
                assert torch.equal(begun["teacher"][name], value), name
        assert len(begun["config"]["fallbacks"]) == warnings


def test_weights_decide_width_depth_and_patch(tmp_path):
    """They come before the preset's values, which need not fit each other any more."""
    shape = ViTShape(patch_size=8, dim=48, depth=3, heads=2, pos_size=32)
    published = VisionTransformer(shape).state_dict()
    torch.save(published, tmp_path / "w.pth")
    flags = "--preset laptop --device cpu --digits sklearn --batch-size 8 --epochs 1"
    flags += " --images-per-epoch 16 --head-hidden-dim 32 --bottleneck-dim 16"
    flags += f" --weights {tmp_path / 'w.pth'}"
    run = tmp_path / "run"
    first_flags = f"{flags} --image-size 32 --heads 4 --lr 1e-30 --output {run}"
    assert train.main(first_flags.split()) == 0
    checkpoint = read(run)
    for name, value in asdict(replace(shape, heads=4)).items():
        assert checkpoint["config"][name] == value, name
    for name, value in published.items():
        torch.testing.assert_close(checkpoint["teacher"][f"backbone.{name}"], value)
    assert visualize.main([str(run), "--device", "cpu"]) == 0

    flags += f" --image-size 64 --heads 16 --output {tmp_path / 'other'}"  # 7 does not divide 64
    assert train.main(flags.split()) == 0


def test_digits_that_stand_in_for_mnist_are_warned_of_and_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [closed_url()])
    assert start(tmp_path / "run", f"--digits auto --data-root {tmp_path / 'none'}") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    replaced = "scikit-learn's 1,797 digits instead of MNIST"
    assert len(warnings) == 1
    assert replaced in warnings[0]
    config = read(tmp_path / "run")["config"]
    assert config["digits"] == "sklearn"
    assert replaced in config["fallbacks"][0]
    assert replaced in (tmp_path / "run" / "metrics.json").read_text()


# -------------------------------------------------------------------------------------- validation


def test_every_epoch_is_measured_on_the_same_validation_canvases(nce_run):
    """The log holds what `measure_attention` says of the teacher, before and after training."""
    lines = log_of(nce_run)
    baselines = {"uniform", "ink", "brightness", "shuffled", "oracle"}
    rows = {"mean", "head_1", "head_2", "head_3"} | baselines
    for line in (lines[0], lines[2]):
        validation = line["validation"]
        assert validation.keys() == rows | {"images", "knn", "loss", "mean_cosine"}
        assert validation["images"] == 16
        assert 0 <= validation["knn"] <= 1
        assert validation["loss"] == pytest.approx(math.log(8), abs=0.4)
        assert validation["mean"].keys() == set(evaluate.CURVES)

        kept = weights.load_backbone(str(nce_run / f"epoch-{line['epoch']}.pth"))
        config = config_of(f"{TINY} --keep-epochs 0,2")
        held_out = DIGITS["validation"]
        canvases = views.evaluation_batches(config, held_out, 16, "matched", "validation")
        observation = observe.observe({"trained": kept.backbone}, canvases)
        one_canvas = views.left_out_batches(config, held_out, 1, "validation")
        effects = observe.observe_effects(kept.backbone, one_canvas)
        table = evaluate.measure_attention(observation, effects, resamples=0)
        for row in rows:
            for name, value in validation[row].items():
                assert value == pytest.approx(table[row][name]["value"], abs=1e-6), (row, name)
    assert lines[0]["validation"]["mean"] != lines[2]["validation"]["mean"]
    assert lines[0]["validation"]["brightness"] == lines[2]["validation"]["brightness"]


def test_validation_is_the_same_for_every_seed():
    config = config_of(TINY)
    state, _ = make_training(config)
    cpu = torch.device("cpu")
    validation = train.Validation(config, DIGITS, cpu)(state)
    assert train.Validation(replace(config, seed=1), DIGITS, cpu)(state) == validation


def test_measuring_changes_nothing_of_the_run(tmp_path, monkeypatch, dino_run):
    nothing = {"mean": {}, "mean_cosine": 0.0, "entropy_of_mean": 1.0, "mean_entropy": 0.0}
    monkeypatch.setattr(train.Validation, "__call__", lambda validation, state: nothing)
    assert start(tmp_path, "--loss dino") == 0
    not_measured = read(tmp_path)
    measured = read(dino_run)
    assert not_measured.pop("metrics") != measured.pop("metrics")
    assert_same(not_measured, measured)


def test_a_collapse_is_warned_of_once_and_is_in_the_log_and_in_the_verdict(
    tmp_path, monkeypatch, capsys
):
    """The teacher tells images apart in epoch 1, and no longer in epochs 2 and 3."""
    measure = train.Validation.__call__
    mean_entropies = iter([0.2, 0.5, 0.999, 0.999])

    def measured(validation, state):
        result = measure(validation, state)
        assert 0 <= result["mean_entropy"] <= result["entropy_of_mean"] + 1e-6 <= 1 + 1e-5
        return result | {"entropy_of_mean": 1.0, "mean_entropy": next(mean_entropies)}

    monkeypatch.setattr(train.Validation, "__call__", measured)
    monkeypatch.setattr(evaluate, "STEPS_TO_COLLAPSE", 0)
    assert start(tmp_path, "--loss dino --epochs 3") == 0
    output, errors = capsys.readouterr()
    assert errors.count(", cosine 0.") == 3
    assert "teacher's mean entropy 0.50 ln K, entropy of its mean 1.00 ln K" in errors
    assert errors.count("warning: the network has collapsed") == 1
    assert errors.index("epoch 2/3") < errors.index("warning: the network")
    assert errors.index("warning: the network") < errors.index("epoch 3/3")
    assert "Neither at digit nor at clutter. The network has collapsed" in " ".join(output.split())
    collapses = [line["collapse"] for line in log_of(tmp_path)]
    assert collapses[:2] == [None, None]
    assert all(collapse.startswith("the network has collapsed") for collapse in collapses[2:])


# ---------------------------------------------------------------------------------------- failures


def test_nothing_is_downloaded_for_a_run_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load_digits", lambda *args: pytest.fail("digits were asked for"))
    (tmp_path / "ckpt.pth").write_text("")
    assert start(tmp_path) == 2
    assert start(tmp_path / "new", f"--weights {tmp_path / 'none.pth'}") == 2
    assert start(tmp_path / "new", "--image-size 50") == 2


def spoil_weights(state: TrainingState):
    state.student.backbone.cls_token.data.fill_(math.nan)


def spoil_gradient(state: TrainingState):
    state.student.backbone.cls_token.register_hook(lambda gradient: gradient * math.nan)


@pytest.mark.parametrize(
    "spoil, flags, at_step, steps, kept",
    [
        # at the end of the epoch
        (spoil_weights, "--epochs 3 --images-per-epoch 32", 6, 8, 4),
        (spoil_gradient, "--epochs 3 --images-per-epoch 32", 6, 8, 4),
        # after 20 steps
        (spoil_gradient, "--epochs 1 --images-per-epoch 320", 3, 20, 0),
        (spoil_gradient, "--epochs 1 --images-per-epoch 320 --precision float16", 0, 20, 0),
        # before the next checkpoint
        (spoil_gradient, "--epochs 1 --images-per-epoch 80 --checkpoint-minutes 1e-9", 3, 4, 3),
    ],
)
def test_a_nan_stops_the_run(tmp_path, capsys, monkeypatch, spoil, flags, at_step, steps, kept):
    """Before it is written to a checkpoint, and within 20 steps; the last checkpoint is finite."""
    scale_gradients_by(monkeypatch, 2.0**4)
    begun_steps = before_step(monkeypatch, at_step, spoil)
    assert start(tmp_path, flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        f"train.py: error: the loss or its gradient is NaN or infinite, at step {steps} or up to "
        f"19 before; use a lower --lr"
    )
    assert len(begun_steps) == steps
    checkpoint = read(tmp_path)
    assert checkpoint["step"] == kept
    assert all(value.isfinite().all() for value in checkpoint["student"].values())


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "out of memory; use a smaller --image-size"),
        ("--temperature 1e-40", "the validation loss is NaN or infinite; use a lower --lr"),
    ],
)
def test_a_failure_in_training_is_one_line(tmp_path, capsys, monkeypatch, flags, message):
    before_step(monkeypatch, 0, lambda state: torch.empty(1 << 60, dtype=torch.uint8))
    assert start(tmp_path, flags) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train.py: error: {message}")
    assert error.count("\n") == 1
    assert read(tmp_path)["step"] == 0


def test_bad_input_at_the_shell():
    command = [sys.executable, str(ROOT / "train.py"), "--preset", "laptop", "--image-size", "50"]
    process = subprocess.run(command, check=False, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.startswith("train.py: error: --image-size 50")
    assert process.stderr.count("\n") == 1


def test_a_closed_output_is_no_bug(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY.split(), "--output", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert stop.value.code == 0
    assert read(tmp_path / "run")["step"] == 4


def test_an_output_of_a_notebook_is_no_bug(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "laptop", "--epochs", "0"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("train.py: error: --epochs 0: use 1 or more")


def test_help_in_a_code_page_that_lacks_greek(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert stop.value.code == 0
    output.flush()
    assert b"? of eq. (3)" in output.buffer.getvalue()  # τ


# ------------------------------------------------------------------- from training to pictures


def write_stl10(root: Path, classes: list[int], counts: dict[str, int]):
    """Files in STL-10's layout: `counts` images of noise, with `classes` (1 to 10) in turn."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    chance = np.random.RandomState(0)
    for name, count in counts.items():
        images = chance.randint(0, 256, (count, 3, 96, 96)).astype(np.uint8)
        images.tofile(folder / f"{name}_X.bin")
        if name != "unlabeled":
            labels = np.resize(classes, count).astype(np.uint8)
            labels.tofile(folder / f"{name}_y.bin")


@pytest.fixture(scope="module")
def stl10(tmp_path_factory):
    """A folder with a small STL-10."""
    root = tmp_path_factory.mktemp("stl10")
    write_stl10(root, [1, 6], {"unlabeled": 40, "train": 40, "test": 80})
    return root


@pytest.mark.parametrize("loss", ["dino", "nce"])
def test_figures_2_and_3_from_training_to_pictures(stl10, tmp_path, monkeypatch, capsys, loss):
    monkeypatch.setattr(evaluate, "TEST_IMAGES", 60)  # enough for t-SNE
    monkeypatch.chdir(tmp_path)
    flags = f"--dataset stl10 --loss {loss} --data-root {stl10} --epochs 1 --keep-epochs 0"
    assert train.main([*TINY.split(), *flags.split()]) == 0
    assert capsys.readouterr().err.count("this is not the whole of STL-10") == 1
    folder = tmp_path / "runs" / f"stl10-{loss}-same"
    validation = log_of(folder)[1]["validation"]
    assert validation["mean"].keys() == {"entropy", "diversity"}
    assert 0 <= validation["knn"] <= 1

    finer = ["--image-size", "56"]
    assert visualize.main([str(folder / "ckpt.pth"), "--device", "cpu", *finer]) == 0
    output = capsys.readouterr().out
    assert "These are photographs: there are no masks" in output
    assert " photographs, SRG of " in output
    assert "linear probe" in output
    for name in ("views.png", "attention.png", "tsne.png", "curves.png"):
        assert min(Image.open(folder / name).size) > 300, name
    result = json.loads((folder / "metrics.json").read_text())
    heads = {"head_1", "head_2", "head_3"}
    maps = {observe.row_of(name) for name in evaluate.PHOTO_MAPS}
    assert result["photographs"].keys() == heads | maps | {"untrained"}
    assert result["untrained"].keys() == maps
    assert len(result["direct_share"]) == config_of(TINY).depth
    assert result["settings"]["image_size"] == 56
    assert "not the whole of STL-10" in result["fallbacks"][0]


def test_photographs_and_digits_side_by_side(stl10, tmp_path, capsys, nce_run):
    flags = f"--dataset stl10 --data-root {stl10} --epochs 1"
    assert start(tmp_path / "photographs", flags) == 0
    capsys.readouterr()
    networks = [str(tmp_path / "photographs"), str(nce_run), "--weights", "none"]
    output = ["--device", "cpu", "--output", str(tmp_path / "out")]
    assert visualize.main([*networks, *output]) == 0
    # of three networks one is shown digits
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("These are photographs: there are no masks") == 2
    measured = printed.count("times as dense on the digit as on the")
    assert measured + printed.count("This cannot be told") == 1
    assert printed.count("with pairs of equal ink") == 1
    results = json.loads((tmp_path / "out" / "metrics-compared.json").read_text())
    assert ["matched" in result for result in results] == [False, True, False]
    assert (tmp_path / "out" / "attention-compared.png").exists()


def test_figure_5_from_training_to_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([*TINY.split(), "--epochs", "1", "--background", "texture"]) == 0
    folder = tmp_path / "runs" / "clutter-nce-same-texture"
    assert visualize.main([str(folder / "ckpt.pth"), "--device", "cpu"]) == 0
    result = json.loads((folder / "metrics.json").read_text())
    assert result["settings"]["background"] == "texture"
    assert "background texture" in result["description"]
    # the texture is bright, too
    assert result["matched"]["brightness"]["far_background_density"]["value"] > 0


@pytest.mark.parametrize("classes, images", [([1], 40), (list(range(1, 11)), 12), ([1, 2], 2)])
def test_little_data_is_measured_as_far_as_can_be(tmp_path, capsys, classes, images):
    """A single class, which no classifier can learn; and hardly any test images."""
    write_stl10(tmp_path, classes, {"unlabeled": 16, "train": 20, "test": images})
    assert start(tmp_path / "run", f"--dataset stl10 --data-root {tmp_path} --epochs 1") == 0
    output = capsys.readouterr().out
    assert "k-NN" in output
    assert ("linear probe –" in output) == (len(classes) == 1)


# ------------------------------------------------------------------------------- a pretended GPU


@pytest.fixture
def pretended_gpu():
    with PretendedGPU(), torch.no_grad():
        yield


def make_training_on_gpu(flags: str) -> tuple[Config, TrainingState, TrainingViews]:
    flags = f"--preset laptop --digits sklearn --batch-size 8 --precision float32 {flags}"
    config = config_of(flags)
    state = train.make_state(config, vit.build_network(config))
    for module in (state.student, state.teacher, state.loss_fn):
        on_pretended_gpu(module)
    if config.dataset == "stl10":
        images = torch.randint(256, (20, 3, 96, 96), dtype=torch.uint8)
        split = data.Split(images, torch.arange(20) % 10)
    else:
        split = DIGITS["train"].to(torch.device("cuda"))
    return config, state, TrainingViews(config, split, device=torch.device("cuda"))


@pytest.mark.parametrize(
    "flags",
    [
        "--loss nce --views same",
        "--loss nce --views different --micro-batch 4 --registers 2",
        "--loss dino --views same --crops 4 --centering mean --micro-batch 2",
        "--loss dino --views different --no-symmetric --image-size 84",
        "--loss nce --views same --background texture",
        "--loss dino --views different --background texture",
        "--loss nce --views different --background pictures",
        "--loss supervised --views different --micro-batch 4",
        "--dataset stl10 --loss nce --views same --crops 1",
    ],
)
def test_a_step_stays_on_the_gpu(tmp_path, monkeypatch, pretended_gpu, flags):
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    Image.new("L", (150, 150), 99).save("pictures/a.png")
    config, state, training_views = make_training_on_gpu(flags)
    params = training_views.sample(0)
    loss, teacher_outputs, _ = train.batch_loss(config, state, training_views, params)
    assert loss.device.type == teacher_outputs.device.type == "cuda"
    assert loss.shape == ()
    if config.loss == "dino":
        state.loss_fn.update_center(teacher_outputs)
    train.update_teacher(state.teacher, state.student, 0.9)
    matrix = state.student.backbone.blocks[0].attn.qkv.weight
    assert train.orthogonalize(matrix[None]).device.type == "cuda"


def add_a_tensor_of_the_cpu(images):
    return images + torch.ones(1)


def wait_for_a_number(images):
    return images * images.mean().item()


@pytest.mark.parametrize(
    "fault, error",
    [
        (add_a_tensor_of_the_cpu, RuntimeError),
        (wait_for_a_number, DataDependentOutputException),
    ],
)
def test_a_step_that_leaves_the_gpu_would_be_noticed(
    monkeypatch, pretended_gpu, fault: Callable, error
):
    normalize = views.normalize
    monkeypatch.setattr(views, "normalize", lambda images: fault(normalize(images)))
    config, state, training_views = make_training_on_gpu("--loss nce --views same")
    with pytest.raises(error):
        train.batch_loss(config, state, training_views, training_views.sample(0))


# ------------------------------------------------------------------------------------------- ranks

KINDS_OF_RUN = [
    "--loss nce --views different",
    "--loss nce --views same --crops 4 --micro-batch 2",
    "--loss dino --views different --micro-batch 2",
    "--loss dino --views same",
]
STEPS = range(15, 20)  # of 30, after the first epoch, in which DINO's last layer rests


def take_steps(rank: int, ranks: int, folder: Path):
    """Steps in float64 of every kind of run; the first rank saves what came of them."""
    torch.set_num_threads(1)
    if ranks > 1:
        meeting_point = f"file://{folder}/meeting_point"
        dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=ranks)
    for number, flags in enumerate(KINDS_OF_RUN):
        config = config_of(f"{TINY} {flags} --lr 0.001")
        state, training_views, _ = step_in_float64(config)
        gradient_sums = []

        def count_sum(group, bucket, gradient_sums=gradient_sums):
            gradient_sums.append(bucket.index())
            return allreduce_hook(group, bucket)

        if ranks > 1:
            state.parallel_student = DistributedDataParallel(state.student)
            state.parallel_student.register_comm_hook(dist.group.WORLD, count_sum)
        losses = []
        for step in STEPS:
            params = training_views.sample(step)
            loss, _ = train.training_step(config, state, training_views, params, step, 30)
            losses.append(loss.item())
        if rank == 0:
            content = state.state_dict()
            content["losses"] = losses
            content["gradient_sums"] = len(gradient_sums)
            torch.save(content, folder / f"{number}-of-{ranks}.pth")
    if ranks > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder_of_steps(tmp_path_factory):
    """What came of the steps of one process, and of two ranks."""
    folder = tmp_path_factory.mktemp("steps")
    take_steps(0, 1, folder)
    context = forking_context()
    processes = [context.Process(target=take_steps, args=(rank, 2, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return folder


@pytest.mark.parametrize("number", range(len(KINDS_OF_RUN)), ids=KINDS_OF_RUN)
def test_two_ranks_take_the_steps_of_one_process(folder_of_steps, number):
    """To 1e-10 after five steps, over gloo: two ranks of 4 images, one process of 8."""
    one = torch.load(folder_of_steps / f"{number}-of-1.pth", weights_only=True)
    two = torch.load(folder_of_steps / f"{number}-of-2.pth", weights_only=True)
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-10)
    for part in ("student", "teacher", "loss"):
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, atol=1e-10, rtol=0)
    untrained = vit.build_network(config_of(f"{TINY} {KINDS_OF_RUN[number]}")).state_dict()
    name = "backbone.cls_token"
    assert (one["student"][name] - untrained[name]).abs().max() > 1e-4
    # The ranks sum their gradients once a step, however many pieces it has.
    assert two["gradient_sums"] == len(STEPS)
