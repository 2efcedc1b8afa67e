"""What the tests of several modules share: a tiny run, and ways to look at what it left."""

import argparse
import json
import multiprocessing.forkserver
import os
import socket
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

import data
import gallery
import metrics
import settings
import train
import weights
from gallery import Model
from settings import Config
from vit import VisionTransformer, ViTShape

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "results" / "checkpoints"  # two small trained networks, same.pth and different.pth
DIGITS = data.load_digits("sklearn")[0]
# A network that trains in a second: 2 epochs of 2 steps.
TINY = (
    "--preset laptop --digits sklearn --device cpu --batch-size 8 --image-size 28 --dim 24 "
    "--head-hidden-dim 32 --bottleneck-dim 16 --out-dim 64 --images-per-epoch 16 --epochs 2 "
    "--precision float32 "
)
# Constants of evaluate.py that make its numbers from a few images.
FEW_IMAGES = {
    "TEST_IMAGES": 16,
    "BANK_IMAGES": 16,
    "VALIDATION_IMAGES": 16,
    "VALIDATION_BANK": 16,
}


def config_of(flags: str) -> Config:
    """The settings of a command line of train.py."""
    args = settings.parse_args(flags.split())
    return settings.make_config(args.flags, args.preset)


def start(folder, flags: str = "") -> int:
    """The exit status of a new run of a tiny network."""
    return train.main([*TINY.split(), *flags.split(), "--output", str(folder)])


def resume(folder, flags: str = "") -> int:
    return train.main(["--resume", str(folder), *flags.split()])


def read(folder) -> dict:
    """The checkpoint in a run's folder."""
    return weights.read_checkpoint(os.path.join(folder, "ckpt.pth"))


def log_of(folder) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def small_vit(seed: int = 0, **shape) -> VisionTransformer:
    """A ViT that was not trained here."""
    torch.manual_seed(seed)
    usual = {"patch_size": 8, "dim": 128, "depth": 2, "heads": 2, "pos_size": 32}
    return VisionTransformer(ViTShape(**usual | shape))


def model_of(path) -> Model:
    """The Model of a checkpoint, with its digits."""
    flags = dict.fromkeys([*gallery.OVERRIDES, "heads", "grid"])
    flags |= {"digits": "sklearn", "normalise": "imagenet"}
    model = gallery.open_model(str(path), argparse.Namespace(**flags))
    model.splits = DIGITS
    return model


def assert_same(one, other, at: str = ""):
    """Two checkpoints hold the same, bit for bit except for times."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key in one:
            if "second" not in str(key):
                assert_same(one[key], other[key], f"{at}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), at
        for number, (item, other_item) in enumerate(zip(one, other)):
            assert_same(item, other_item, f"{at}[{number}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), at
    else:
        assert one == other, at


def assert_same_end(run, whole):
    """Two runs ended alike: checkpoints bit for bit, logs except for times, no file too many."""
    checkpoint = read(run)
    expected = read(whole)
    checkpoint["config"]["checkpoint_minutes"] = expected["config"]["checkpoint_minutes"]
    assert_same(checkpoint, expected)
    assert_same(log_of(run), log_of(whole))
    assert set(os.listdir(run)) <= set(os.listdir(whole))


class PretendedGPU(TorchFunctionMode):
    """While this is entered, a tensor that is asked for on "cuda" has a shape but no numbers.

    An operation across two devices raises, and so does reading a number from the GPU, for which a
    program would wait. Tensors on the CPU stay real. Forward passes only.
    """

    def __init__(self):
        super().__init__()
        self.without_numbers = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        values = [*args, *kwargs.values()]
        devices = [value for value in values if isinstance(value, (str, torch.device))]
        if any(str(device).startswith("cuda") for device in devices):
            with self.without_numbers:
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def on_pretended_gpu(module: torch.nn.Module) -> torch.nn.Module:
    """The module, whose parameters and buffers are now on the GPU; `Module.to` cannot do that."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                tensors[name] = tensor.to("cuda")
    return module


def before_step(monkeypatch, number: int, act) -> list[int]:
    """Have `act(state)` called as the training step of that number begins.

    Returns a list of the steps that runs have begun, which grows as they go on.
    """
    training_step = train.training_step
    steps = []

    def step_of_a_run(config, state, views, params, step, total_steps):
        steps.append(step)
        if step == number:
            act(state)
        return training_step(config, state, views, params, step, total_steps)

    monkeypatch.setattr(train, "training_step", step_of_a_run)
    return steps


def closed_url() -> str:
    """An address of this machine where nothing listens, for downloads that must fail."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}/"


def forking_context():
    """A multiprocessing context whose processes fork from one that has imported our modules.

    Importing them, with the libraries that they need, takes each new process several seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers", "visualize"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        multiprocessing.forkserver.ensure_running()
    return context


def blacken(images, patch, patch_size: int):
    """Images (n, channels, H, W), each with one patch blackened, whose number is in `patch` (n,)."""
    rows, columns = metrics.patch_grid(images, patch_size)
    # the number of the patch that each pixel belongs to, (H, W)
    patch_of_pixel = torch.arange(rows * columns, device=images.device).view(rows, columns)
    patch_of_pixel = patch_of_pixel.repeat_interleave(patch_size, 0)
    patch_of_pixel = patch_of_pixel.repeat_interleave(patch_size, 1)
    return images.masked_fill(patch_of_pixel == patch.view(-1, 1, 1, 1), 0)
