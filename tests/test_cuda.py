"""The GPU gives the same results as the CPU: python -m pytest -m cuda.

These are skipped where there is no GPU. The tests of the modules run on the CPU.
"""

import contextlib
import math

import pytest
import torch
from helpers import DIGITS, SHIPPED, config_of, model_of, resume, start

import data
import effects
import explain
import metrics
import observe
import train
import views
import visualize
import vit
import weights
from views import TrainingViews

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
CPU = torch.device("cpu")
GPU = torch.device("cuda")
LAPTOP = "--preset laptop --digits sklearn --batch-size 8 --precision float32 "


@pytest.fixture(autouse=True)
def exact_products():
    """Products of float32 are not rounded to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def photographs(device: torch.device) -> data.Split:
    images = torch.randint(256, (20, 3, 96, 96), dtype=torch.uint8)
    return data.Split(images.to(device), (torch.arange(20) % 10).to(device))


def split_on(device: torch.device, config) -> data.Split:
    """Digits, or photographs that are the same in every call."""
    if config.dataset == "stl10":
        torch.manual_seed(0)
        return photographs(device)
    return DIGITS["train"].to(device)


def crops_on(device: torch.device, config):
    training_views = TrainingViews(config, split_on(device, config), device=device)
    return training_views.render(training_views.sample(3))


def steps_on(device: torch.device, flags: str, count: int = 3):
    """The losses of a few training steps, and the state after them."""
    config = config_of(f"{LAPTOP} --device {device} {flags}")
    torch.manual_seed(0)
    student = vit.build_network(config).to(device)
    state = train.make_state(config, student)
    training_views = TrainingViews(config, split_on(device, config), device=device)
    losses = []
    for step in range(10, 10 + count):
        params = training_views.sample(step)
        loss, _ = train.training_step(config, state, training_views, params, step, 100)
        losses.append(loss.item())
    return losses, state


def shipped(device: torch.device) -> tuple:
    """A trained network and canvases, on a device."""
    model = model_of(SHIPPED / "different.pth")
    batch = next(views.left_out_batches(model.config, DIGITS["test"].to(device), 6))
    return model.backbone.to(device), batch


# ------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize(
    "flags",
    [
        "--views same",
        "--views different --crops 4",
        "--views different --background texture",
        "--image-size 112 --crops 2",
        "--dataset stl10 --crops 2",
        "--dataset stl10 --image-size 112",
    ],
)
def test_crops(flags):
    config = config_of(LAPTOP + flags)
    torch.testing.assert_close(
        crops_on(GPU, config).cpu(), crops_on(CPU, config), atol=2e-4, rtol=1e-4
    )


def test_evaluation_canvases_and_left_out_parts():
    config = config_of(LAPTOP)
    on_gpu = next(views.left_out_batches(config, DIGITS["test"].to(GPU), 8))
    on_cpu = next(views.left_out_batches(config, DIGITS["test"], 8))
    torch.testing.assert_close(on_gpu.images.cpu(), on_cpu.images, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(
        on_gpu.left_out.images.cpu(), on_cpu.left_out.images, atol=2e-5, rtol=1e-4
    )
    assert torch.equal(on_gpu.left_out.ink.cpu(), on_cpu.left_out.ink)


# ----------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("size", [56, 84])
@pytest.mark.parametrize(
    "shape", [{}, {"registers": 4}, {"rotary": True, "registers": 1}, {"antialias": True}], ids=str
)
def test_feature_and_attention(shape, size):
    torch.manual_seed(0)
    backbone = vit.VisionTransformer(
        vit.ViTShape(patch_size=7, dim=96, depth=3, heads=3, pos_size=56, **shape)
    )
    images = torch.randn(2, 3, 56, size)
    with torch.no_grad():
        feature = backbone(images)
        attention = backbone.get_last_selfattention(images)
        backbone.to(GPU)
        torch.testing.assert_close(backbone(images.to(GPU)).cpu(), feature, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            backbone.get_last_selfattention(images.to(GPU)).cpu(), attention, atol=1e-5, rtol=1e-4
        )


# `random` hashes sums of pixels, whose last bits differ.
@pytest.mark.parametrize("name", [name for name in explain.MAPS if name != "random"])
def test_maps(name):
    backbone, batch = shipped(CPU)
    expected = explain.MAPS[name](backbone, batch.images)
    maps = explain.MAPS[name](backbone.to(GPU), batch.images.to(GPU))
    assert maps.device.type == "cuda"
    torch.testing.assert_close(maps.cpu(), expected, atol=1e-4, rtol=1e-3)


def all_effects(backbone, batch):
    patch_size = backbone.shape.patch_size
    ink = (batch.digit | batch.clutter).to(batch.images.device)
    has_ink = metrics.patch_sums(ink, patch_size) > 0
    with torch.no_grad():
        features = effects.feature_of(backbone, batch.images)
        yield effects.blackening_effects(backbone, batch.images, has_ink, features)
        yield effects.direct_effects(backbone, batch.images, has_ink)
        yield effects.window_effects(backbone, batch.images, [0, 1])
        yield effects.feature_distance(backbone, batch.left_out.images[:, 0], features)


def test_effects():
    expected = list(all_effects(*shipped(CPU)))
    found = list(all_effects(*shipped(GPU)))
    for on_gpu, on_cpu in zip(found, expected, strict=True):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-4, rtol=1e-3, equal_nan=True)


def test_observed_effects_and_their_faithfulness():
    rows = []
    for device in (CPU, GPU):
        backbone, batch = shipped(device)
        found = observe.observe_effects(backbone, [batch], explain.NETWORK_MAPS)
        faithfulness = metrics.faithfulness(found.maps["mean"], found)
        rows.append(faithfulness["patch_faithfulness"])
    torch.testing.assert_close(rows[1], rows[0], atol=0.02, rtol=0)


# ---------------------------------------------------------------------------------------- training


def flat(network):
    """All parameters of a network in one row, on the CPU."""
    return torch.cat([parameter.detach().cpu().flatten() for parameter in network.parameters()])


@pytest.mark.parametrize(
    "flags",
    [
        "--loss nce --views same",
        "--loss nce --views different --optimizer muon",
        "--loss nce --views different --optimizer adamw --registers 0",
        "--loss nce --views different --micro-batch 4",
        "--loss nce --views same --checkpoint-blocks",
        "--loss dino --views same --crops 2",
        "--loss dino --views different --centering mean",
        "--loss supervised --views different",
        "--dataset stl10 --loss nce --views same --crops 1",
    ],
)
def test_steps(flags):
    losses, state = steps_on(GPU, flags)
    expected_losses, expected_state = steps_on(CPU, flags)
    assert losses == pytest.approx(expected_losses, abs=2e-3)
    # how far all weights have moved, and how far apart they are now
    torch.manual_seed(0)
    start = flat(vit.build_network(config_of(f"{LAPTOP} {flags}")))
    moved = flat(expected_state.student) - start
    apart = flat(state.student) - flat(expected_state.student)
    assert moved.norm() > 1e-3
    assert apart.norm() < 0.2 * moved.norm()


def test_pieces_of_a_batch_give_its_gradient():
    """In float64: 1e-10. Crops are rendered one by one, as their last bits depend on how many."""
    gradients = []
    for micro_batch in (0, 2):
        config = config_of(f"{LAPTOP} --loss nce --views different --micro-batch {micro_batch}")
        torch.manual_seed(0)
        student = vit.build_network(config).to(GPU).double()
        state = train.make_state(config, student)
        training_views = TrainingViews(config, split_on(GPU, config), device=GPU)
        params = training_views.sample(0)
        crops = []
        for row in range(config.batch_size):
            one_image = {name: value[row : row + 1] for name, value in params.items()}
            crops.append(training_views.render(one_image).double())
        crops = torch.cat(crops, dim=1)
        params["row"] = torch.arange(config.batch_size)
        training_views.render = lambda params, crops=crops: crops[:, params["row"]]
        train.batch_loss(config, state, training_views, params, torch.Tensor.backward)
        gradients.append([p.grad for p in student.parameters() if p.grad is not None])
    for whole, in_pieces in zip(*gradients, strict=True):
        torch.testing.assert_close(in_pieces, whole, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("loss", ["nce", "dino"])
def test_half_precision_is_near_float32(precision, loss):
    if precision == "bfloat16" and not torch.cuda.is_bf16_supported():
        pytest.skip("this GPU has no bfloat16")
    losses, _ = steps_on(GPU, f"--loss {loss} --views same --crops 2 --precision {precision}")
    expected, _ = steps_on(GPU, f"--loss {loss} --views same --crops 2")
    assert all(math.isfinite(value) for value in losses)
    assert losses == pytest.approx(expected, rel=0.05)


def test_compiled_blocks_compute_the_same():
    config = config_of(f"{LAPTOP} --loss nce --device cuda")
    torch.manual_seed(0)
    network = vit.build_network(config).to(GPU)
    images = torch.randn(4, 3, 56, 56, device=GPU)
    with torch.no_grad():
        expected = network(images)
        train.compile_blocks(network)
        assert network.backbone.blocks[0]._compiled_call_impl is not None
        torch.testing.assert_close(network(images), expected, atol=1e-3, rtol=1e-3)


def test_a_step_waits_for_nothing_on_the_gpu():
    """Reading a number from the GPU in a step would make the GPU idle."""
    config = config_of(f"{LAPTOP} --loss nce --views different --device cuda")
    state = train.make_state(config, vit.build_network(config).to(GPU))
    training_views = TrainingViews(config, split_on(GPU, config), device=GPU)
    batches = train.prefetch(training_views, range(10, 14))
    for step, params in zip(range(10, 14), batches):
        torch.cuda.set_sync_debug_mode("error" if step > 11 else "default")
        with contextlib.ExitStack() as stack:
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
            train.training_step(config, state, training_views, params, step, 100)


@pytest.mark.parametrize("rows,columns", [(64, 64), (96, 24), (24, 96)])
def test_orthogonalize(rows, columns):
    torch.manual_seed(0)
    matrices = torch.randn(3, rows, columns)
    expected = train.orthogonalize(matrices)
    torch.testing.assert_close(
        train.orthogonalize(matrices.to(GPU)).cpu(), expected, atol=1e-4, rtol=1e-3
    )


# ------------------------------------------------------------------------------------ the programs


@pytest.fixture
def run_on_gpu(tmp_path, few_images):
    assert start(tmp_path / "run", "--device cuda") == 0
    return tmp_path / "run"


def test_a_run_and_its_figures(run_on_gpu, tmp_path):
    assert visualize.main([str(run_on_gpu), "--output", str(tmp_path / "figures")]) == 0
    assert (tmp_path / "figures" / "attention.png").exists()
    assert (tmp_path / "figures" / "explorer.html").exists()


def test_a_resumed_run_goes_on(tmp_path, few_images):
    """Not bit for bit as on a CPU: some sums on a GPU have no order."""
    assert start(tmp_path / "run", "--device cuda --epochs 1") == 0
    assert resume(tmp_path / "run", "--epochs 2") == 0
    checkpoint = weights.read_checkpoint(str(tmp_path / "run" / "ckpt.pth"))
    assert checkpoint["epoch"] == 2
    assert len(checkpoint["metrics"]) == 3


def test_a_run_of_the_gpu_is_read_on_a_cpu(run_on_gpu):
    model = model_of(run_on_gpu / "ckpt.pth")
    assert {parameter.device.type for parameter in model.backbone.parameters()} == {"cpu"}
