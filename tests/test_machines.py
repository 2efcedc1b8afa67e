"""What people bring: other machines, their pictures by the hundred, data as it lies about."""

import gzip
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from test_data import closed_url, mnist_root
from test_reliability import assert_same_end, send
from test_train import TINY, few_images, log_of, read, resume, start

import data
import metrics
import train
import visualize
import vit

__all__ = ["few_images", "mnist_root"]  # fixtures
ROOT = Path(__file__).resolve().parent.parent
SHIPPED = str(ROOT / "results" / "checkpoints" / "same.pth")


def python(*command, **environment):
    command = [sys.executable, *map(str, command)]
    how = {"cwd": ROOT, "env": os.environ | environment, "capture_output": True}
    return subprocess.run(command, check=False, **how)


def gradient(size=(64, 48)):
    return Image.linear_gradient("L").resize(size)


def test_a_folder_of_pictures_is_drawn_in_pages(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(visualize, "ROWS", 2)
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    for name in ("a.png", "b.tif", "deeper/c.JPG"):
        gradient().save(tmp_path / "in" / name, "PNG")
    for name in ("._a.png", "notes.txt"):
        (tmp_path / "in" / name).write_bytes(b"\0\5\26\7")
    command = [SHIPPED, "--device", "cpu", "--output", str(tmp_path / "out"), "--images"]
    assert visualize.main([*command, str(tmp_path / "in")]) == 0
    assert sorted(os.listdir(tmp_path / "out")) == [
        "attention-images-1.png",
        "attention-images-2.png",
    ]
    lines = capsys.readouterr().out.splitlines()
    said = [os.path.relpath(x.split(": ")[0], tmp_path / "in") for x in lines if "left out" in x]
    assert said == ["a.png", "b.tif", "deeper/c.JPG"]
    (tmp_path / "empty").mkdir()
    assert visualize.main([*command, str(tmp_path / "empty")]) == 2
    assert "empty: no pictures there" in capsys.readouterr().err


def test_effects_of_tokens_do_not_depend_on_how_many_go_together(monkeypatch):
    network = vit.VisionTransformer(patch_size=8, dim=32, depth=2, heads=2).double().eval()
    images, maps = torch.randn(20, 3, 32, 32).double(), [torch.rand(20, 16)]
    together = metrics.token_effects(network, images, maps, torch.Generator(), draws=3)
    first = [map_[:1] for map_ in maps]
    alone = metrics.token_effects(network, images[:1], first, torch.Generator(), draws=3)
    torch.testing.assert_close(alone[:, 0], together[:1, 0])
    assert together.shape == (20, 4) and alone.shape == (1, 4) and (alone > 0).all()


def test_names_that_the_font_lacks_cost_no_warning(tmp_path):
    folder = tmp_path / "猫の絵"
    folder.mkdir()
    gradient().save(folder / "猫.png")
    (folder / "重み.pth").write_bytes(Path(SHIPPED).read_bytes())
    two = [folder / "重み.pth", folder / "重み.pth"]  # their names stand in the figure
    done = python("visualize.py", *two, "--device", "cpu", "--images", folder / "猫.png")
    assert done.returncode == 0 and done.stderr == b""


@pytest.mark.parametrize("most,white", [(255, 255), (1000, 1023), (4095, 4095), (4096, 65535)])
def test_fewer_than_16_bits_of_grey_in_16(tmp_path, most, white):
    levels = np.linspace(0, most, 64).astype(np.uint16)[None].repeat(2, 0)
    Image.fromarray(levels).save(tmp_path / "x.png")
    found = np.asarray(data.read_image(tmp_path / "x.png"))[..., 0]
    np.testing.assert_allclose(found, levels * (255 / white), atol=0.51)


def test_what_a_mac_leaves_in_a_folder_is_no_background(tmp_path):
    gradient().save(tmp_path / "IMG.PNG")
    (tmp_path / "._IMG.PNG").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X")
    assert data.read_folder(str(tmp_path), 32).shape == (1, 32, 32)


def test_mnist_as_it_is_fetched(mnist_root, monkeypatch):
    """Gzipped by hand, so of other bits than the mirrors'; the folder may be read-only."""
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [closed_url()])
    unpacked, raw = data.load_digits("mnist", str(mnist_root))[0], mnist_root / "MNIST" / "raw"
    for file in raw.iterdir():
        Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes(), 1))
        file.unlink()
    before = sorted(os.listdir(raw))
    for name, split in data.load_digits("mnist", str(mnist_root))[0].items():
        assert torch.equal(split.images, unpacked[name].images)
        assert torch.equal(split.labels, unpacked[name].labels)
    assert sorted(os.listdir(raw)) == before
    cut = raw / "t10k-images-idx3-ubyte.gz"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(OSError, match="MNIST/raw is missing or damaged"):
        data.load_digits("mnist", str(mnist_root))


def test_every_mirror_is_asked_whatever_the_first_does(tmp_path, monkeypatch):
    asked, mirrors = [], ["http://one/", "http://two/"]

    def download(url, folder, md5):
        asked.append(url)
        Path(folder, url.rpartition("/")[2]).write_text("<html>Please log in</html>")
        raise TimeoutError("timed out") if "one" in url else RuntimeError("corrupted")

    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", mirrors)
    monkeypatch.setattr(torchvision.datasets.utils, "download_url", download)
    with pytest.raises(OSError, match="http://one/: timed out; http://two/: corrupted"):
        data.load_digits("mnist", str(tmp_path))
    assert len(asked) == 2 and os.listdir(tmp_path / "MNIST" / "raw") == []


def write_stl10(root, classes, **counts):
    (root / "stl10_binary").mkdir(parents=True)
    random = np.random.RandomState(0)
    for name, n in counts.items():
        images = random.randint(0, 256, (n, 3, 96, 96)).astype(np.uint8)
        images.tofile(root / "stl10_binary" / f"{name}_X.bin")
        if name != "unlabeled":
            (1 + np.arange(n) % classes).astype(np.uint8).tofile(
                root / "stl10_binary" / f"{name}_y.bin"
            )


def test_stl10_as_an_archive_and_without_what_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.STL10, "url", closed_url())
    write_stl10(tmp_path / "a", 10, train=20, test=16)
    (tmp_path / "b").mkdir()
    archive = tmp_path / "b" / "stl10_binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "a" / "stl10_binary", "stl10_binary")
    splits, (there, _) = [data.load_stl10(str(tmp_path / x), "train") for x in "ba"], (0, 0)
    for name in splits[0][there]:
        assert torch.equal(splits[0][there][name].images, splits[1][there][name].images)
    with pytest.raises(OSError, match="cannot be fetched"):
        data.load_stl10(str(tmp_path / "a"), "unlabeled")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / archive.name).write_bytes(archive.read_bytes()[:50_000])
    with pytest.raises(OSError, match="cannot be fetched"):
        data.load_stl10(str(tmp_path / "c"), "train")


@pytest.mark.parametrize("classes,images", [(1, 40), (10, 12), (10, 2)])
def test_little_data_is_measured_as_far_as_can_be(tmp_path, monkeypatch, capsys, classes, images):
    """One class, which no classifier can learn; fewer test images than t-SNE's perplexity."""
    write_stl10(tmp_path, classes, unlabeled=16, train=20, test=images)
    assert start(tmp_path / "run", f"--dataset stl10 --data-root {tmp_path}") == 0
    said = capsys.readouterr().out
    assert ("linear probe –" in said) == (classes == 1)
    probe = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 4)
    assert metrics.linear_probe(*probe).isnan().all()
    # a run's folder stands for its checkpoint
    monkeypatch.setattr(metrics, "TEST_IMAGES", 60)
    assert visualize.main([str(tmp_path / "run"), "--device", "cpu"]) == 0
    drawn = "tsne.png" in os.listdir(tmp_path / "run")
    assert drawn == (images == 40) and drawn != ("no tsne.png: " in capsys.readouterr().out)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_signal_ends_a_validation_at_once(tmp_path, monkeypatch, capsys, epoch):
    """The first, that of an epoch, that of the last: the resumed run makes the line."""
    whole, run, validate, count = tmp_path / "whole", tmp_path / "run", metrics.validate, []
    assert start(whole) == 0

    def interrupted(*args):
        count.append(1)
        if len(count) == epoch + 1:
            send(signal.SIGTERM)(None)
            pytest.fail("the validation went on")
        return validate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "validate", interrupted)
        assert start(run) == 128 + signal.SIGTERM
    assert f"stopped; python train.py --resume {run} goes on" in capsys.readouterr().err
    assert read(run)["step"] == 2 * epoch and len(read(run)["metrics"]) == epoch
    assert visualize.main([str(run), "--device", "cpu", "--output", str(tmp_path / "out")]) == 0
    assert resume(run) == 0 and len(log_of(run)) == 3
    assert_same_end(run, whole)


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "inline"])
def test_a_notebooks_backend_that_is_not_installed(backend):
    assert python("visualize.py", "--help", MPLBACKEND=backend).returncode == 0


def test_output_in_any_code_page(tmp_path):
    gradient().save(tmp_path / "Größe × τ.png")
    images = ["--device", "cpu", "--output", tmp_path, "--images", tmp_path / "Größe × τ.png"]
    for command in (["train.py", "--help"], ["visualize.py", SHIPPED, *images]):
        done = python(*command, PYTHONIOENCODING="cp1252")
        assert done.returncode == 0 and done.stderr == b"" and done.stdout, done.stderr


def test_ranks_without_torchrun_are_told(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert train.main(TINY.split()) == 2
    error = capsys.readouterr().err
    assert "WORLD_SIZE is set; use torchrun, or unset it" in error and error.count("\n") == 1


def test_an_apple_gpu_is_used_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for there, device in ((True, "mps"), (False, "cpu")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=there: there)
        assert train.make_config(train.parse_args([]))["device"] == device
        assert visualize.parse_args([]).device == device
    missing = "The operator 'aten::x' is not currently implemented for the MPS device. If you\nwant"
    line = vit.error_line(NotImplementedError(missing))
    assert "PYTORCH_ENABLE_MPS_FALLBACK=1 or --device cpu" in line and "\n" not in line
    assert "--image-size" in vit.error_line(RuntimeError("MPS backend out of memory"))


@pytest.mark.parametrize("size", [28, 40, 64, 96, 97, 100])
@pytest.mark.parametrize("image_size", [28, 56, 96, 112, 224])
def test_resizing_is_that_of_grid_samples_border(size, image_size, monkeypatch):
    """To 1e-6, without asking for it, which MPS refuses before torch 2.13."""
    images = torch.rand(3, 2, size, size, generator=torch.Generator().manual_seed(0))
    found, sample = data.resize(images, image_size), F.grid_sample

    def border(x, grid, padding_mode, **how):
        assert padding_mode == "zeros"
        return sample(x, grid, padding_mode="border", **how)

    monkeypatch.setattr(F, "grid_sample", border)
    torch.testing.assert_close(found, data.resize(images, image_size), atol=1e-6, rtol=0)
