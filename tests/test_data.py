"""The canvas is exactly its parts, and every view is a function of (seed, step)."""

import http.server
import socket
import struct
import threading

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from scipy.stats import chisquare
from sklearn.metrics import roc_auc_score

import data


@pytest.fixture(scope="module")
def digits():
    return data.load_digits("sklearn")[0]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# -------------------------------------------------------------------------------- the digits


def test_sklearn_splits(digits):
    assert {name: len(split) for name, split in digits.items()} == {"train": 1297, "validation": 250, "test": 250}
    images = torch.cat([split.images for split in digits.values()])
    assert images.shape == (1797, 28, 28) and images.dtype == torch.uint8 and images.max() == 255
    assert not images[:, :4].any() and not images[:, :, -4:].any()  # 20×20 in 28×28, as MNIST's
    # no digit of one split in another (scikit-learn's file has no two pictures alike)
    assert len(torch.unique(images.flatten(1), dim=0)) == 1797
    assert len(torch.unique(digits["test"].labels)) == 10


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
    assert {name: len(split) for name, split in splits.items()} == {"train": 100, "validation": 20, "test": 30}
    whole = torchvision.datasets.MNIST(str(mnist_root), train=True)
    assert torch.equal(splits["train"].images, whole.data[:100])  # the first 5/6: 50,000 of 60,000
    assert torch.equal(splits["validation"].images, whole.data[100:])
    assert torch.equal(splits["test"].labels, torch.arange(30) % 10)


@pytest.fixture
def no_network(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{port}/"])


def test_without_mnist_auto_says_what_it_takes_instead(tmp_path, no_network):
    splits, source, warning = data.load_digits("auto", str(tmp_path / "none"))
    assert source == "sklearn" and len(splits["train"]) == 1297
    assert "scikit-learn's 1,797 digits instead of MNIST" in warning and "\n" not in warning
    with pytest.raises(OSError, match="no MNIST in .*none/MNIST/raw.*download failed"):
        data.load_digits("mnist", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()  # nothing is written


def test_a_silent_mirror_counts_as_unreachable(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{silent.getsockname()[1]}/"])
        monkeypatch.setattr(data, "NO_ANSWER_SECONDS", 0.3)
        with pytest.raises(OSError, match="timed out"):
            data.load_digits("mnist", str(tmp_path))


def test_mnist_is_downloaded(mnist_root, tmp_path, monkeypatch):
    """From a loopback server that has the four files, gzipped as the mirrors keep them."""
    import gzip
    import hashlib

    raw = mnist_root / "MNIST" / "raw"
    files = {f.name + ".gz": gzip.compress(f.read_bytes()) for f in raw.iterdir()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = files[self.path.strip("/")]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    resources = [(name, hashlib.md5(body).hexdigest()) for name, body in files.items()]
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    splits, source, _ = data.load_digits("auto", str(tmp_path / "new"))
    server.shutdown()
    server.server_close()
    assert source == "mnist" and len(splits["train"]) == 100
    assert (tmp_path / "new" / "MNIST" / "raw" / "t10k-images-idx3-ubyte").exists()


@pytest.mark.parametrize("keep", [6, 16, 1000])  # half a header, the header alone, some of the pixels
def test_damaged_mnist_is_told(mnist_root, keep):
    file = mnist_root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(OSError, match="raw is damaged: delete it"):
        data.load_digits("mnist", str(mnist_root))


# -------------------------------------------------------------------------------- the canvas


def test_canvas_is_rebuilt_from_its_parts(digits):
    train = digits["train"]
    sampler = data.CanvasSampler(train)
    params = sampler.draw(rng(), torch.arange(40), canvases=2)
    canvas, digit_mask, clutter_mask = data.render_canvases(params, train.images, 100)
    assert canvas.shape == digit_mask.shape == (40, 2, 100, 100)
    assert params["corner"].shape == (40, 2, 6, 2)  # six distractors
    images = train.images.numpy().astype(int)
    for b in range(40):
        for v in range(2):
            digit, clutter = np.zeros((100, 100), int), np.zeros((100, 100), int)
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
            np.testing.assert_array_equal(canvas[b, v], (expected / np.float32(255)).astype(np.float32))
            np.testing.assert_array_equal(digit_mask[b, v], digit > 127)
            np.testing.assert_array_equal(clutter_mask[b, v], (expected > 127) & ~(digit > 127))


def test_positions_are_uniform_and_inside(digits):
    sampler = data.CanvasSampler(digits["train"], canvas_size=64, num_distractors=3)
    params = sampler.draw(rng(1), torch.randint(1297, (20_000,), generator=rng(2)))
    for places, size in ((params["position"], 28), (params["corner"], 9)):
        for axis in (0, 1):
            counts = torch.bincount(places[..., axis].flatten(), minlength=64 - size + 1)
            assert len(counts) == 64 - size + 1  # never outside
            assert chisquare(counts.numpy()).pvalue > 0.001
    assert torch.bincount(params["source"].flatten(), minlength=1297).min() > 0  # cut from every digit


@pytest.mark.parametrize("S,distractors", [(100, 6), (64, 3)])  # paper, laptop
def test_matched_layout_hides_position_and_paper_layout_does_not(digits, S, distractors):
    """A centred Gaussian, blind to the image, cannot tell digit from clutter on `matched`."""
    n = 4000
    coordinate = torch.arange(S) - (S - 1) / 2
    gaussian = torch.exp(-0.5 * (coordinate[:, None] ** 2 + coordinate**2) / (0.15 * S) ** 2)
    result = {}
    for layout in ("paper", "matched"):
        sampler = data.CanvasSampler(digits["test"], S, distractors, layout=layout)
        params = sampler.draw(rng(3), torch.arange(n) % 250)
        assert params["corner"].min() >= 0 and params["corner"].max() <= S - 9
        _, digit, clutter = (x[:, 0] for x in data.render_canvases(params, digits["test"].images, S))
        some = (clutter.sum((1, 2)) > 0) & (digit.sum((1, 2)) > 0)
        mean = [(gaussian * mask).sum((1, 2))[some] / mask.sum((1, 2))[some] for mask in (digit, clutter)]
        aucs = [
            roc_auc_score(digit[b][digit[b] | clutter[b]], gaussian[digit[b] | clutter[b]]) for b in range(1000) if some[b]
        ]
        result[layout] = (mean[0].mean() / mean[1].mean()).item(), np.mean(aucs)
    assert 0.95 < result["matched"][0] < 1.05 and 0.48 < result["matched"][1] < 0.52
    assert result["paper"][0] > 1.3  # why `matched` is the layout that counts


@pytest.mark.parametrize("arguments,says", [
    (dict(canvas_size=27), "canvas size 27"), (dict(layout="round"), "layout 'round'")
])
def test_impossible_canvases_are_named(digits, arguments, says):
    with pytest.raises(ValueError, match=says):
        data.CanvasSampler(digits["test"], **arguments)


# --------------------------------------------------------------------------------- the views


def settings(**changes):
    return {
        "seed": 0, "views": "different", "crops": 2, "symmetric": True, "batch_size": 12, "image_size": 56,
        "canvas_size": 64, "num_distractors": 3, "distractor_size": 9, "global_crops_scale": (0.5, 1.0),
        "local_crops_scale": (0.3, 0.6), "rotation": 15.0, "blur": (0.1, 2.0), **changes,
    }


def test_plan_of_the_crops():
    g, l = "global", "local"
    plan, teacher, student, pairs = data.crop_plan("same", 4)
    assert plan == [(0, g), (0, g), (0, l), (0, l)] and teacher == student == [0, 1, 2, 3]
    assert sorted(pairs) == [(i, j) for i in range(4) for j in range(4) if i != j]
    plan, teacher, student, pairs = data.crop_plan("same", 1)
    assert plan == [(0, g), (0, g)] and teacher == [0] and student == [1] and pairs == [(0, 0)]
    plan, teacher, student, pairs = data.crop_plan("different", 2)
    assert plan == [(0, g), (0, g), (1, g), (1, g)] and teacher == [0, 1] and student == [2, 3]
    assert sorted(pairs) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    plan, teacher, student, pairs = data.crop_plan("different", 1, symmetric=True)
    assert plan == [(0, g), (1, g)] and teacher == student == [0, 1] and sorted(pairs) == [(0, 1), (1, 0)]
    _, _, _, pairs = data.crop_plan("different", 2, symmetric=True)
    assert sorted(pairs) == sorted([(i, j) for i in (0, 1) for j in (2, 3)] + [(j, i) for i in (0, 1) for j in (2, 3)])


@pytest.mark.parametrize("views,crops", [("same", 1), ("same", 2), ("same", 4), ("different", 1), ("different", 4)])
def test_a_slice_of_a_batch_is_those_rows_of_the_whole(digits, views, crops):
    maker = data.TrainingViews(settings(views=views, crops=crops), digits["train"])
    params = maker.draw(step=5)
    whole = maker.render(params)
    assert whole.shape == (len(maker.plan), 12, 3, 56, 56)
    part = maker.render({name: value[3:8] for name, value in params.items()})
    assert torch.equal(part, whole[:, 3:8])
    canvases = data.render_canvases(params, digits["train"].images, 64)
    for a, b in zip(data.render_canvases({k: v[3:8] for k, v in params.items()}, digits["train"].images, 64), canvases):
        assert torch.equal(a, b[3:8])
    again = data.TrainingViews(settings(views=views, crops=crops), digits["train"]).render(maker.draw(step=5))
    assert torch.equal(whole, again)
    assert not torch.equal(whole, maker.render(maker.draw(step=6)))


def test_different_views_share_the_digit_and_nothing_else(digits):
    params = data.TrainingViews(settings(), digits["train"]).draw(step=0)
    assert params["digit"].shape == (12,)
    assert (params["position"][:, 0] != params["position"][:, 1]).any(-1).sum() > 8
    assert (params["corner"][:, 0] != params["corner"][:, 1]).any(-1).sum() > 30


def test_an_epoch_shows_every_digit_once():
    seen = torch.cat([data.draw_digits(0, step, 100, 10) for step in range(10)])
    assert sorted(seen.tolist()) == list(range(100))
    second = torch.cat([data.draw_digits(0, step, 100, 10) for step in range(10, 20)])
    assert sorted(second.tolist()) == list(range(100)) and not torch.equal(seen, second)
    with pytest.raises(ValueError, match="--batch-size 101 is larger.*100"):
        data.draw_digits(0, 0, 100, 101)


def test_crops_are_drawn_from_their_ranges(digits):
    maker = data.TrainingViews(settings(views="same", crops=4, batch_size=1000, canvas_size=100), digits["train"])
    params = maker.draw(0)
    area = (params["side"] / 100) ** 2
    assert 0.5 <= area[:, :2].min() < 0.52 and 0.98 < area[:, :2].max() <= 1
    assert 0.3 <= area[:, 2:].min() < 0.31 and 0.59 < area[:, 2:].max() <= 0.6
    inside = torch.minimum(params["centre"], 100 - params["centre"]).amin(-1) - params["side"] / 2
    assert inside[:, :2].min() > -1e-4  # global crops do not leave the canvas
    assert torch.equal(params["centre"][:, 2:], (params["position"] + 14.0).expand(-1, 2, -1))  # on the digit
    assert params["angle"].abs().max() <= np.radians(15) and params["angle"].min() < -0.2
    blurred = params["sigma"] > 0
    assert 0.45 < blurred.float().mean() < 0.55
    assert 0.1 * 56 / 224 <= params["sigma"][blurred].min() and params["sigma"].max() <= 2 * 56 / 224


def test_local_crops_show_the_digit_in_their_centre(digits):
    """Rendered without clutter, the ink of a local crop balances around its centre."""
    maker = data.TrainingViews(settings(views="same", crops=4, num_distractors=0, batch_size=200), digits["train"])
    crops = data.denormalise(maker.render(maker.draw(0)))[2:, :, 0].flatten(0, 1)  # (400, 56, 56)
    place = torch.arange(56) - 27.5
    mass = crops.sum((1, 2))
    for axis in (1, 2):
        offset = (crops.sum(3 - axis) * place).sum(1) / mass
        assert offset.mean().abs() < 1 and offset.abs().max() < 10


def full_crop(S, n=1, **changes):
    crops = {
        "centre": torch.full((n, 1, 2), S / 2), "side": torch.full((n, 1), float(S)),
        "angle": torch.zeros(n, 1), "sigma": torch.zeros(n, 1),
    }
    return crops | changes


def smooth_image(S=64):
    return data.gaussian_blur(torch.rand(1, 1, S, S, generator=rng(4)), torch.tensor([2.0]), 2.0)


def test_whole_canvas_at_its_own_size_is_itself():
    image = smooth_image()
    torch.testing.assert_close(data.render_crops(image[None], full_crop(64), 64)[0], image)


def test_crop_and_resize_agree_with_torchvision():
    image = smooth_image()
    crops = full_crop(64, centre=torch.tensor([[[20.0, 40.0]]]), side=torch.tensor([[16.0]]))
    expected = TF.resize(image[..., 12:28, 32:48], [64, 64], antialias=False)
    # at the crop's border torchvision repeats the last pixel, ours sees the canvas go on
    torch.testing.assert_close(data.render_crops(image[None], crops, 64)[0, ..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2])


def test_rotation_agrees_with_torchvision():
    image = smooth_image()
    ours = data.render_crops(image[None], full_crop(64, angle=torch.tensor([[np.radians(15.0)]], dtype=torch.float32)), 64)[0]
    expected = TF.rotate(image, 15.0, TF.InterpolationMode.BILINEAR)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    assert ours[0, 0, 0, 0] == 0  # outside the canvas lies black


def test_blur_agrees_with_torchvision():
    images, sigma = torch.rand(3, 1, 40, 40, generator=rng(5)), torch.tensor([0.0, 0.7, 2.0])
    ours = data.gaussian_blur(images.clone(), sigma, 2.5)
    assert torch.equal(ours[0], images[0])
    for i in (1, 2):
        expected = TF.gaussian_blur(images[i], [23, 23], [sigma[i].item()] * 2)
        torch.testing.assert_close(ours[i], expected, rtol=0, atol=1e-5)


def test_shrinking_does_not_alias():
    """Stripes finer than the small image's pixels become grey, not other stripes."""
    stripes = torch.zeros(1, 1, 128, 128)
    stripes[..., ::3] = 1
    small = data.render_crops(stripes[None], full_crop(128), 32)[0, ..., 2:-2, 2:-2]
    assert (small - 1 / 3).abs().max() < 0.05
    aliased = torch.nn.functional.interpolate(stripes, size=32, mode="bilinear")[..., 2:-2, 2:-2]
    assert (aliased - 1 / 3).abs().max() > 0.1  # what it guards against


def test_normalisation_is_imagenets_and_invertible():
    for channels in (1, 3):
        images = torch.rand(2, channels, 5, 5, generator=rng(6))
        expected = TF.normalize(images.expand(-1, 3, -1, -1), data.IMAGENET_MEAN, data.IMAGENET_STD)
        torch.testing.assert_close(data.normalise(images), expected)
        torch.testing.assert_close(data.denormalise(expected), images.expand(-1, 3, -1, -1))


def test_evaluation_set_is_the_same_whatever_the_batches(digits):
    config = settings(image_size=56)
    one = list(data.evaluation_batches(config, digits["test"], 30, batch_size=30))[0]
    parts = list(data.evaluation_batches(config, digits["test"], 30, batch_size=7))
    assert [len(p["labels"]) for p in parts] == [7, 7, 7, 7, 2]
    more = next(data.evaluation_batches(config, digits["test"], 260, batch_size=120))
    for name in one:
        torch.testing.assert_close(torch.cat([p[name] for p in parts]), one[name], rtol=0, atol=1e-5)
        torch.testing.assert_close(more[name][:30], one[name], rtol=0, atol=1e-5)  # the first of more
    assert not (one["digit"] & one["clutter"]).any()
    # ink in the resized image lies under the resized masks
    ink = one["images"][:, 0] > 0.75
    assert (ink & (one["digit"] | one["clutter"])).sum() > 0.97 * ink.sum()
