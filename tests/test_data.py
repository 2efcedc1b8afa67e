"""The canvas is exactly its parts, and every view is a function of (seed, step)."""

import functools
import gzip
import hashlib
import http.server
import socket
import struct
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from scipy.stats import chisquare
from sklearn.metrics import roc_auc_score
from torch.testing import assert_close

import data
import train

DIGITS = data.load_digits("sklearn")[0]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def settings(preset="laptop", **changes):
    """All settings of a preset, small batches, `changes` over them."""
    config = train.make_config(train.parse_args(["--preset", preset, "--batch-size", "12"]))
    return config | changes


def closed_url():
    """An address of this machine where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}/"


def test_sklearn_splits():
    assert [len(DIGITS[name]) for name in ("train", "validation", "test")] == [1297, 250, 250]
    images = torch.cat([split.images for split in DIGITS.values()])
    assert images.shape == (1797, 28, 28) and images.dtype == torch.uint8 and images.max() == 255
    assert not images[:, :4].any() and not images[:, :, -4:].any()  # 20×20 in 28×28, as MNIST's
    # no digit of one split in another (scikit-learn's file has no two pictures alike)
    assert len(torch.unique(images.flatten(1), dim=0)) == 1797
    assert len(torch.unique(DIGITS["test"].labels)) == 10


def write_idx(path, array):
    magic = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(magic + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist_root(tmp_path):
    """A small MNIST in torchvision's layout: 120 training digits, 30 test digits."""
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.RandomState(0)
    for name, n in (("train", 120), ("t10k", 30)):
        write_idx(raw / f"{name}-images-idx3-ubyte", random.randint(0, 256, (n, 28, 28)))
        write_idx(raw / f"{name}-labels-idx1-ubyte", np.arange(n) % 10)
    return tmp_path / "root"


def test_mnist_splits(mnist_root):
    splits, source, warning = data.load_digits("auto", str(mnist_root))
    assert source == "mnist" and warning is None
    whole = torchvision.datasets.MNIST(str(mnist_root), train=True)
    assert torch.equal(splits["train"].images, whole.data[:100])  # the first 5/6: 50,000 of 60,000
    assert torch.equal(splits["validation"].images, whole.data[100:])
    assert torch.equal(splits["train"].labels, torch.arange(100) % 10)
    assert torch.equal(splits["test"].labels, torch.arange(30) % 10)


def test_without_mnist_auto_says_in_one_line_what_it_takes_instead(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [closed_url()])
    splits, source, warning = data.load_digits("auto", str(tmp_path))
    assert source == "sklearn" and torch.equal(splits["train"].images, DIGITS["train"].images)
    assert "scikit-learn's 1,797 digits instead of MNIST" in warning and "\n" not in warning
    with pytest.raises(OSError, match="MNIST/raw is missing .*download failed.*--digits sklearn"):
        data.load_digits("mnist", str(tmp_path))


def test_a_silent_mirror_counts_as_unreachable(tmp_path, monkeypatch, request):
    request.addfinalizer(functools.partial(socket.setdefaulttimeout, socket.getdefaulttimeout()))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url])
        socket.setdefaulttimeout(0.3)
        with pytest.raises(OSError, match="download failed .*timed out"):
            data.load_digits("mnist", str(tmp_path))


class FileServer(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.parametrize("refusal", ["no connection", "not found"])
def test_the_second_mirror_is_asked_when_the_first_refuses(mnist_root, monkeypatch, refusal):
    """The second is a loopback server with the four files, gzipped as the mirrors keep them."""
    served, resources = mnist_root.parent / "served", []
    served.mkdir()
    for file in (mnist_root / "MNIST" / "raw").iterdir():
        body = gzip.compress(file.read_bytes())
        (served / f"{file.name}.gz").write_bytes(body)
        resources.append((f"{file.name}.gz", hashlib.md5(body).hexdigest()))
    handler = functools.partial(FileServer, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        mirrors = [closed_url() if refusal == "no connection" else f"{url}elsewhere/", url]
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", mirrors)
        monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
        splits, source, warning = data.load_digits("auto", str(mnist_root.parent / "new"))
        server.shutdown()
    assert source == "mnist" and warning is None
    for name, split in data.load_digits("mnist", str(mnist_root))[0].items():
        assert torch.equal(splits[name].images, split.images)


@pytest.mark.parametrize("keep", [6, 16, 1000])  # half a header, the header alone, some of the data
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-images-idx3-ubyte"])
def test_damaged_mnist_is_told(mnist_root, monkeypatch, name, keep):
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [closed_url()])
    file = mnist_root / "MNIST" / "raw" / name
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(OSError, match=f"{mnist_root}/MNIST/raw is missing or damaged"):
        data.load_digits("mnist", str(mnist_root))
    assert data.load_digits("auto", str(mnist_root))[1] == "sklearn"


def test_canvas_is_rebuilt_from_its_parts():
    split, config = data.Split(DIGITS["train"].images[:12], DIGITS["train"].labels[:12]), settings()
    sampler = data.CanvasSampler(config | {"num_distractors": 6}, split)
    params = sampler.sample(rng(), torch.arange(40) % 12, canvases=2)
    canvas, digit_mask, clutter_mask = data.render_canvases(params, config, split.images)
    assert canvas.shape == digit_mask.shape == (40, 2, 64, 64)
    assert params["corner"].shape == (40, 2, 6, 2)
    assert torch.equal(canvas, data.render_canvases(params, config, split.images, masks=False)[0])
    images = split.images.numpy().astype(int)
    for b, v in np.ndindex(40, 2):
        digit, clutter = np.zeros((64, 64), int), np.zeros((64, 64), int)
        r, c = params["position"][b, v].tolist()
        digit[r : r + 28, c : c + 28] += images[params["digit"][b]]
        for m in range(6):
            sr, sc = params["window"][b, v, m].tolist()
            window = images[params["source"][b, v, m]][sr : sr + 9, sc : sc + 9]
            assert window.shape == (9, 9) and (window > 127).sum() >= 5
            assert params["source"][b, v, m] != params["digit"][b]
            r, c = params["corner"][b, v, m].tolist()
            clutter[r : r + 9, c : c + 9] += window
        expected = np.minimum(digit + clutter, 255)
        np.testing.assert_array_equal(canvas[b, v], expected.astype(np.float32) / np.float32(255))
        np.testing.assert_array_equal(digit_mask[b, v], digit > 127)
        np.testing.assert_array_equal(clutter_mask[b, v], (expected > 127) & ~(digit > 127))


def test_positions_are_uniform_and_inside():
    sampler = data.CanvasSampler(settings(), DIGITS["train"])
    params = sampler.sample(rng(1), torch.randint(1297, (20_000,), generator=rng(2)))
    for places, size in ((params["position"], 28), (params["corner"], 9)):
        for axis in (0, 1):
            counts = torch.bincount(places[..., axis].flatten(), minlength=64 - size + 1)
            assert len(counts) == 64 - size + 1  # never outside
            assert chisquare(counts.numpy()).pvalue > 0.001
    assert torch.bincount(params["source"].flatten(), minlength=1297).min() > 0  # from every digit


@pytest.mark.parametrize("preset", ["paper", "laptop"])
def test_matched_layout_hides_position_and_paper_layout_does_not(preset):
    """A centred Gaussian, blind to the image, cannot tell digit from clutter on `matched`."""
    config, result = settings(preset), {}
    coordinate = torch.arange(config["canvas_size"]) - (config["canvas_size"] - 1) / 2
    distance = (coordinate[:, None] ** 2 + coordinate**2).sqrt() / config["canvas_size"]
    gaussian = torch.exp(-0.5 * (distance / 0.15) ** 2).expand(2000, -1, -1)
    for layout in ("paper", "matched"):
        sampler = data.CanvasSampler(config, DIGITS["test"], layout)
        params = sampler.sample(rng(3), torch.arange(2000) % 250)
        assert params["corner"].min() >= 0
        assert params["corner"].max() <= config["canvas_size"] - 9
        _, digit, clutter = data.render_canvases(params, config, DIGITS["test"].images)
        digit, clutter = digit[:, 0], clutter[:, 0]
        ratio = gaussian[digit].mean() / gaussian[clutter].mean()
        ink = digit | clutter
        result[layout] = ratio.item(), roc_auc_score(digit[ink], gaussian[ink])
    assert 0.95 < result["matched"][0] < 1.05 and 0.48 < result["matched"][1] < 0.52
    assert result["paper"][0] > 1.3  # why `matched` is the layout that counts


def test_plan_of_the_crops():
    g, x = "global", "local"
    plan, teacher, student, pairs = data.crop_plan("same", 4)
    assert plan == [(0, g), (0, g), (0, x), (0, x)] and teacher == student == [0, 1, 2, 3]
    assert sorted(pairs) == [(i, j) for i in range(4) for j in range(4) if i != j]
    plan, teacher, student, pairs = data.crop_plan("same", 1)
    assert plan == [(0, g), (0, g)] and teacher == [0] and student == [1] and pairs == [(0, 0)]
    plan, teacher, student, pairs = data.crop_plan("different", 2)
    assert plan == [(0, g), (0, g), (1, g), (1, g)] and teacher == [0, 1] and student == [2, 3]
    assert sorted(pairs) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    plan, teacher, student, pairs = data.crop_plan("different", 1, symmetric=True)
    assert plan == [(0, g), (1, g)] and teacher == student == [0, 1]
    assert sorted(pairs) == [(0, 1), (1, 0)]
    _, _, _, pairs = data.crop_plan("different", 2, symmetric=True)
    across = [(i, j) for i in (0, 1) for j in (2, 3)]
    assert sorted(pairs) == sorted(across + [(j, i) for i, j in across])


CASES = [("same", 1), ("same", 2), ("same", 4), ("different", 1), ("different", 4)]


@pytest.mark.parametrize("background", ["black", "texture"])
@pytest.mark.parametrize("views,crops", CASES)
def test_a_slice_of_a_batch_is_those_rows_of_the_whole(views, crops, background):
    config, split = settings(views=views, crops=crops, background=background), DIGITS["train"]
    maker = data.TrainingViews(config, split)
    params = maker.sample(step=5)
    whole, rows = maker.render(params), {name: value[3:8] for name, value in params.items()}
    assert whole.shape == (len(maker.plan), 12, 3, 56, 56)
    # a convolution of fewer images may round otherwise
    assert_close(maker.render(rows), whole[:, 3:8], rtol=0, atol=1e-5)
    canvases = data.render_canvases(params, config, split.images)
    for part, canvas in zip(data.render_canvases(rows, config, split.images), canvases):
        assert torch.equal(part, canvas[3:8])
    again = data.TrainingViews(config, split)
    assert torch.equal(whole, again.render(again.sample(step=5)))
    other = data.TrainingViews(config | {"seed": 1}, split).sample(step=5)
    for name in ("digit", "position", "centre"):
        assert not torch.equal(params[name], other[name])
        assert not torch.equal(params[name], maker.sample(step=6)[name])


def test_different_views_share_the_digit_and_nothing_else():
    maker = data.TrainingViews(settings(views="different", crops=4), DIGITS["train"])
    params = maker.sample(step=0)
    assert params["digit"].shape == (12,)
    assert (params["position"][:, 0] != params["position"][:, 1]).any(-1).sum() > 8
    assert (params["corner"][:, 0] != params["corner"][:, 1]).any(-1).sum() > 30
    for crop, (canvas, kind) in enumerate(maker.plan):  # local ones on the digit of their canvas
        centred = (params["centre"][:, crop] == params["position"][:, canvas] + 14.0).all(-1)
        assert centred.all() == (kind == "local")


def test_an_epoch_shows_every_digit_once():
    seen = torch.cat([data.sample_digits(0, step, 100, 10) for step in range(10)])
    assert sorted(seen.tolist()) == list(range(100))
    second = torch.cat([data.sample_digits(0, step, 100, 10) for step in range(10, 20)])
    assert sorted(second.tolist()) == list(range(100)) and not torch.equal(seen, second)
    with pytest.raises(ValueError, match="--batch-size 101 is larger.*100"):
        data.sample_digits(0, 0, 100, 101)


def test_crops_are_sampled_from_their_ranges():
    config = settings(crops=4, batch_size=1000, canvas_size=100)
    params = data.TrainingViews(config, DIGITS["train"]).sample(0)
    area = (params["side"] / 100) ** 2
    assert 0.5 <= area[:, :2].min() < 0.52 and 0.98 < area[:, :2].max() <= 1
    assert 0.3 <= area[:, 2:].min() < 0.31 and 0.59 < area[:, 2:].max() <= 0.6
    inside = torch.minimum(params["centre"], 100 - params["centre"]).amin(-1) - params["side"] / 2
    assert inside[:, :2].min() > -1e-4  # global crops do not leave the canvas
    assert params["angle"].abs().max() <= np.radians(15) and params["angle"].min() < -0.2
    blurred = params["sigma"] > 0
    assert 0.45 < blurred.float().mean() < 0.55
    assert 0.1 * 56 / 224 <= params["sigma"][blurred].min() < 0.03
    assert 0.49 < params["sigma"].max() <= 2 * 56 / 224


def test_local_crops_show_the_digit_in_their_centre():
    """Rendered without clutter, the ink of a local crop balances around its centre."""
    config = settings(crops=4, num_distractors=0, batch_size=200)
    maker = data.TrainingViews(config, DIGITS["train"])
    crops = data.denormalize(maker.render(maker.sample(0)))[2:, :, 0].flatten(0, 1)
    place, mass = torch.arange(56) - 27.5, crops.sum((1, 2))
    for axis in (1, 2):
        offset = (crops.sum(3 - axis) * place).sum(1) / mass
        assert offset.mean().abs() < 1 and offset.abs().max() < 10


def test_beyond_a_black_canvas_lies_black():
    config = settings(crops=4, rotation=0.0, blur=(0.0, 0.0), batch_size=100)
    maker = data.TrainingViews(config, DIGITS["train"])
    params = maker.sample(0)
    local = data.denormalize(maker.render(params))[2:, :, 0].transpose(0, 1)  # (100, 2, 56, 56)
    pixel = (torch.arange(56) + 0.5) / 56 - 0.5
    place = params["centre"][:, 2:, :, None] + params["side"][:, 2:, None, None] * pixel
    row, column = ((place < -0.5) | (place > 64.5)).unbind(2)  # not even half a pixel inside
    beyond = row[..., :, None] | column[..., None, :]
    assert beyond.sum() > 10_000 and local[beyond].abs().max() < 1e-6


def full_crop(S, n=1, **changes):
    crops = {"centre": torch.full((n, 1, 2), S / 2), "side": torch.full((n, 1), float(S))}
    return crops | {"angle": torch.zeros(n, 1), "sigma": torch.zeros(n, 1)} | changes


def smooth_image(S=64):
    return data.gaussian_blur(torch.rand(1, 1, S, S, generator=rng(4)), torch.tensor([2.0]), 2.0)


def test_crop_and_resize_agree_with_torchvision():
    image = smooth_image()
    assert_close(data.render_crops(image[None], full_crop(64), 64)[0], image)  # whole: itself
    crops = full_crop(64, centre=torch.tensor([[[20.0, 40.0]]]), side=torch.tensor([[16.0]]))
    expected = TF.resize(image[..., 12:28, 32:48], [64, 64], antialias=False)
    # at the crop's border torchvision repeats the last pixel, ours sees the canvas go on
    ours = data.render_crops(image[None], crops, 64)[0]
    assert_close(ours[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2])


def test_rotation_agrees_with_torchvision():
    image, angle = smooth_image(), torch.tensor([[np.radians(15.0)]]).float()
    ours = data.render_crops(image[None], full_crop(64, angle=angle), 64)[0]
    expected = TF.rotate(image, 15.0, TF.InterpolationMode.BILINEAR)
    assert_close(ours, expected, rtol=0, atol=1e-4)
    assert ours[0, 0, 0, 0] == 0  # outside the canvas lies black


def test_blur_agrees_with_torchvision():
    images, sigma = torch.rand(3, 1, 40, 40, generator=rng(5)), torch.tensor([0.0, 0.7, 2.0])
    ours = data.gaussian_blur(images.clone(), sigma, 2.5)
    assert torch.equal(ours[0], images[0])
    for i in (1, 2):
        expected = TF.gaussian_blur(images[i], [23, 23], [sigma[i].item()] * 2)
        assert_close(ours[i], expected, rtol=0, atol=1e-5)
    crops = full_crop(40, 3, sigma=sigma[:, None])
    assert_close(data.render_crops(images[:, None], crops, 40, 14.0)[:, 0], ours)


def test_shrinking_does_not_alias():
    """Stripes finer than the small image's pixels become gray, not other stripes."""
    stripes = torch.zeros(1, 1, 128, 128)
    stripes[..., ::3] = 1
    small = data.render_crops(stripes[None], full_crop(128), 32)[0, ..., 2:-2, 2:-2]
    assert (small - 1 / 3).abs().max() < 0.05
    aliased = torch.nn.functional.interpolate(stripes, size=32, mode="bilinear")[..., 2:-2, 2:-2]
    assert (aliased - 1 / 3).abs().max() > 0.1  # what it guards against


@pytest.mark.parametrize("image_size", [56, 84, 112, 224])
def test_resized_images_have_no_rim(image_size):
    """Brought to another size, a white image is white to its last pixel."""
    white = torch.ones(1, 3, 96, 96)
    assert_close(data.resize(white, image_size), torch.ones(1, 3, image_size, image_size))


@pytest.mark.parametrize("channels", [1, 3])
def test_normalization_is_imagenets_and_invertible(channels):
    images = torch.rand(2, channels, 5, 5, generator=rng(6)).expand(-1, 3, -1, -1)
    expected = TF.normalize(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert_close(data.normalize(images[:, :channels]), expected)
    assert_close(data.denormalize(expected), images)


@pytest.mark.parametrize("background", ["black", "texture"])
def test_evaluation_set_is_the_same_whatever_the_batches(background):
    config, split = settings(background=background), DIGITS["test"]
    one = next(data.evaluation_batches(config, split, 30, batch_size=30))
    parts = list(data.evaluation_batches(config, split, 30, batch_size=7))
    assert [len(p["labels"]) for p in parts] == [7, 7, 7, 7, 2]
    more = next(data.evaluation_batches(config, split, 260, batch_size=260))
    other_seed = next(data.evaluation_batches(config | {"seed": 1}, split, 30))
    for name in one:
        assert_close(torch.cat([p[name] for p in parts]), one[name], rtol=0, atol=1e-5)
        assert_close(more[name][:30], one[name], rtol=0, atol=1e-5)  # the first of more
        assert_close(other_seed[name], one[name], rtol=0, atol=1e-5)
    index = more["index"].tolist()
    assert sorted(index[:250]) == [*range(250)] and index[250:] == index[:10]  # again if too few
    assert np.mean(index[:30]) > 60 and index[:30] != sorted(index[:30])  # not the first ones
    assert torch.equal(more["labels"], split.labels[more["index"]])
    again, first = more["images"][250:], more["images"][:10]  # but on canvases of their own
    assert not torch.equal(again, first)
    validation = next(data.evaluation_batches(config, split, 30, name="validation"))
    assert not torch.equal(validation["images"], one["images"])
    assert not (one["digit"] & one["clutter"]).any()
    # ink in the resized image lies under the resized masks
    ink = one["images"][:, 0] > 0.75
    assert (ink & (one["digit"] | one["clutter"])).sum() > 0.97 * ink.sum()


def test_a_part_left_out_is_as_if_it_had_never_been_there():
    """Against canvases rendered anew: without the distractor, or with a hole in the digit."""
    config, split, index = settings(), DIGITS["test"], torch.arange(20)
    sampler, size = data.CanvasSampler(config, split, "matched"), config["distractor_size"]
    params = sampler.sample(rng(1), index)
    params["piece"] = sampler.sample_pieces(rng(2), index)
    without, own = data.leave_out(params, config, split.images)
    assert without.shape == own.shape == (20, 6, 64, 64)
    for k in range(3):
        digits = split.images[index].clone()
        for digit, (row, column) in zip(digits, params["piece"][:, 0, k].tolist()):
            hole = digit[row : row + size, column : column + size]
            assert (hole > 127).sum() >= 5  # as of distractors
            hole[:] = 0
        images = torch.cat([split.images, digits])  # distractors are cut from whole digits
        holed = params | {"digit": index + len(split.images)}
        canvas, rest, _ = data.render_canvases(holed, config, images)
        assert torch.equal(without[:, k], canvas[:, 0])
        names, fewer, no_digit = ("source", "window", "corner"), dict(params), dict(params)
        fewer |= {name: params[name][:, :, [i for i in range(3) if i != k]] for name in names}
        canvas, digit, _ = data.render_canvases(fewer, config, split.images)
        assert torch.equal(without[:, 3 + k], canvas[:, 0])
        assert torch.equal(own[:, k], (digit & ~rest)[:, 0])
        no_digit |= {name: params[name][:, :, [k]] for name in names}
        no_digit["digit"] = torch.full_like(index, len(split.images))
        images = torch.cat([split.images, torch.zeros_like(digits[:1])])
        alone = data.render_canvases(no_digit, config, images)[2]
        assert torch.equal(own[:, 3 + k], alone[:, 0])


def test_parts_of_evaluation_canvases():
    """At the network's size, and over the same background as the whole canvas."""
    for background in ("black", "texture"):
        config = settings(background=background)
        (batch,) = data.evaluation_batches(config, DIGITS["test"], 40, parts=True)
        assert batch["without"].shape == (40, 6, 1, 56, 56) and batch["own_ink"].min() >= 5
        change = (batch["without"] - batch["images"][:, None]).abs()[:, :, 0]
        near = F.max_pool2d(batch["own"].float().flatten(0, 1), 9, 1, 4).view(change.shape) > 0
        assert change[near].sum() > 0.97 * change.sum() > 100  # nothing else has changed
    config = settings(num_distractors=0)
    (batch,) = data.evaluation_batches(config, DIGITS["test"], 5, parts=True)
    assert batch["without"].shape == (5, 1, 1, 56, 56)  # a piece of the digit
