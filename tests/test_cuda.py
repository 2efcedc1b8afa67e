"""The GPU path on a machine without one: shapes and devices alone are computed, with fake tensors.

An operation across two devices raises, and so does reading a number from the GPU, for which a
program would wait. Forward passes only: the backward pass and autocast need a true GPU.
"""

import pytest
import torch
from PIL import Image
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.overrides import TorchFunctionMode

import data
import metrics
import train
import vit

DIGITS = data.load_digits("sklearn")[0]
CUDA = torch.device("cuda")


class FakeCUDA(TorchFunctionMode):
    """Makes every tensor that is asked for on "cuda" a fake one; CPU tensors stay real."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(str(x).startswith("cuda") for x in (*args, *kwargs.values()) if is_device(x)):
            with self.fake:
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def is_device(x):
    return isinstance(x, (str, torch.device))


@pytest.fixture(autouse=True)
def fake_cuda():
    with FakeCUDA(), torch.no_grad():
        yield


def photos(n=20):
    images = torch.randint(256, (n, 3, 96, 96), dtype=torch.uint8)
    return data.Split(images, torch.arange(n) % 10)


def on_cuda(module):
    """A module whose parameters and buffers are fake; `Module.to` would not take them."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                tensors[name] = tensor.to(CUDA)
    return module


def start(flags):
    """Settings, loss, student, teacher and views of a run on the GPU."""
    flags = f"--preset laptop --digits sklearn --batch-size 8 --precision float32 {flags}"
    config = train.make_config(train.parse_args(flags.split()))
    networks = [on_cuda(vit.build_network(config)) for _ in range(2)]
    split = photos() if config["dataset"] == "stl10" else DIGITS["train"].to(CUDA)
    views = data.TrainingViews(config, split, device=CUDA)
    loss = on_cuda(train.make_parts(config, vit.build_network(config))["loss"])
    return config, loss, *networks, views


RUNS = [
    "--loss nce --views same",
    "--loss nce --views different --micro-batch 4 --registers 2",
    "--loss dino --views same --crops 4 --centering mean --micro-batch 2",
    "--loss dino --views different --no-symmetric --image-size 84",
    "--loss nce --views same --background texture --texture-pool 5",
    "--loss dino --views different --background texture",
    "--loss supervised --views different --micro-batch 4",
    "--dataset stl10 --loss nce --views same --crops 1",
]


@pytest.mark.parametrize("flags", RUNS)
def test_a_step_stays_on_the_gpu(flags):
    config, loss_fn, student, teacher, views = start(flags)
    parts = loss_fn, student, teacher, views
    loss, outputs, _ = train.batch_loss(config, *parts, views.sample(0))
    assert loss.device.type == outputs.device.type == "cuda" and loss.shape == ()
    if config["loss"] == "dino":
        loss_fn.update_center(outputs)
    train.update_teacher(teacher, student, 0.9)
    assert train.orthogonalize(student.backbone.blocks[0].attn.qkv.weight).device.type == "cuda"


def test_a_folder_of_backgrounds(tmp_path):
    Image.new("L", (150, 150), 99).save(tmp_path / "a.png")
    config, *parts = start(f"--loss nce --views different --background {tmp_path}")
    loss, *_ = train.batch_loss(config, *parts, parts[-1].sample(0))
    assert loss.device.type == "cuda"


@pytest.mark.parametrize("flags", ["--background texture --registers 1", "--dataset stl10"])
def test_evaluation_stays_on_the_gpu(flags):
    config, _, student, *_ = start(flags)
    photos_or_digits = photos() if config["dataset"] == "stl10" else DIGITS["test"].to(CUDA)
    batch = next(data.evaluation_batches(config, photos_or_digits, 10, parts=True))
    images = data.normalize(batch["images"].to(CUDA))
    maps, features = metrics.cls_attention(student.backbone, images)
    assert maps.shape == (10, 3, 64) and features.shape == (10, 96)
    rollout = metrics.without_cls(student.backbone.rollout(images), student.backbone)
    maps, rng = [maps.mean(1), rollout], torch.Generator().manual_seed(0)
    effects = metrics.token_effects(student.backbone, images, maps, rng)
    assert effects.shape == (10, 3) and effects.device.type == features.device.type == "cuda"
    if "without" in batch:  # patches are blackened by index, which a fake tensor does not have
        ink = metrics.patch_sums(batch["own"][:, 0], 7)
        change = metrics.moved(student.backbone, batch["without"][:, 0], features)
        assert ink.device.type == change.device.type == "cuda"


FAULTS = [(lambda x: x + torch.ones(1), RuntimeError)]  # a tensor of the CPU
FAULTS += [(lambda x: x * x.mean().item(), DataDependentOutputException)]


@pytest.mark.parametrize("fault,error", FAULTS)
def test_a_fault_in_the_step_is_seen(monkeypatch, fault, error):
    config, *parts = start("--loss nce --views same")
    normalize = data.normalize
    monkeypatch.setattr(data, "normalize", lambda x: fault(normalize(x)))
    with pytest.raises(error):
        train.batch_loss(config, *parts, parts[-1].sample(0))
