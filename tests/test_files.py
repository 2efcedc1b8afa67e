"""No file can hurt us: damaged, hostile or absurd ones are told in one line, run nothing and take no memory."""

import io
import os
import pickle
import random
import resource
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_vit import hub, tiny  # noqa: F401  (a fixture)

import data
import train
import visualize
import vit

TRAIN = "--preset laptop --digits sklearn --device cpu --epochs 1 --images-per-epoch 16 --batch-size 8".split()
MB = 2**20


def told(main, command, capsys, case=None):
    """Runs a command line that must end with status 2 and one line on stderr, which is returned."""
    capsys.readouterr()
    assert main([str(part) for part in command]) == 2, case
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "error: " in printed.err, (case, printed.err)
    return printed.err


# ----------------------------------------------------------------------------------- writing


def test_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), vit.whole(str(path)) as part:
        Path(part).write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with vit.whole(str(path)) as part:
        Path(part).write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk(tmp_path, capsys, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    torch.save(tiny().state_dict(), tmp_path / "w.pth")
    out = tmp_path / "out"
    out.mkdir()
    (out / "attention-images.png").write_text("of before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # files of at most 2,000 bytes
    try:
        command = [tmp_path / "w.pth", "--device", "cpu", "--image-size", "32", "--output", out, "--images", tmp_path / "a.png"]
        told(visualize.main, command, capsys)
        with pytest.raises(OSError):
            visualize.write_json(str(out / "metrics.json"), ["x"] * 9999)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [f.read_text() for f in out.iterdir()] == ["of before"]


# ---------------------------------------------------------------------------------- downloads


def test_two_downloads_at_once(hub):  # noqa: F811
    errors = []

    def run():
        try:
            vit.load_pretrained(tiny(), "dino")
        except Exception as error:  # a thread's would be lost
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and [f.name for f in hub.folder.iterdir()] == ["dino_deitsmall8_pretrain.pth"]


def test_a_download_of_unknown_size_that_is_cut_off_is_begun_again(hub):  # noqa: F811
    hub.cut = len(hub.body) - 100
    with pytest.raises(OSError, match="could not be fetched"):
        vit.dino_file("dino_vits16")
    assert list(hub.folder.iterdir()) == []
    hub.cut = len(hub.body)
    assert os.path.getsize(vit.dino_file("dino_vits16")) == len(hub.body)


def test_a_download_gets_its_place_when_all_of_it_has_come(tmp_path):
    def cut_off(root):
        os.makedirs(os.path.join(root, "MNIST", "raw"))
        Path(root, "MNIST", "raw", "train").write_text("half")
        raise OSError("connection lost")

    def come(root):
        assert list((tmp_path / "MNIST" / "raw").glob("[!.]*")) == []
        os.makedirs(os.path.join(root, "MNIST", "raw"))
        Path(root, "MNIST", "raw", "train").write_text("whole")

    import http.server

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        server.RequestHandlerClass.log_message = lambda *args: None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"http://127.0.0.1:{server.server_port}/", str(tmp_path), os.path.join("MNIST", "raw")
        with pytest.raises(OSError, match="no MNIST, and its download failed .connection lost.; advice"):
            data.download("no MNIST", "advice", where[0], cut_off, *where[1:])
        assert list((tmp_path / "MNIST" / "raw").iterdir()) == []
        data.download("no MNIST", "advice", where[0], come, *where[1:])
        server.shutdown()
    assert [f.read_text() for f in (tmp_path / "MNIST" / "raw").iterdir()] == ["whole"]


# --------------------------------------------------------------------------------- the digest


def checkpoint_of_a_run():
    config = train.make_config(train.parse_args(TRAIN)) | {"dim": 24, "head_hidden_dim": 16}
    network = vit.build_network(config)
    content = {"config": config, "epoch": 1, "step": 2, "teacher": network.state_dict(), "metrics": [{"epoch": 0}]}
    content |= {"optimizer": {"state": {0: {"step": torch.tensor(2.0)}}, "betas": (0.9, 0.95)}, "half": torch.ones(3).bfloat16()}
    return content | {"digest": vit.digest(content)}


def test_the_digest_sees_every_change():
    whole = {"a": torch.arange(6.0).view(2, 3), "b": [1, (2.0, None)], "c": {"d": "e"}}
    assert vit.digest(whole) == vit.digest(whole | {"digest": "x"}) == vit.digest(whole | {"a": whole["a"].mT.clone().mT})
    others = [
        {"a": whole["a"].view(3, 2)}, {"a": whole["a"].double()}, {"a": whole["a"] + torch.eye(2, 3)}, {"b": [1, [2.0, None]]},
        {"b": [1, 2.0, None]}, {"b": [True, (2.0, None)]}, {"c": {"d": "f"}}, {"c": {"e": "d"}}, {"f": None},
    ]
    assert len({vit.digest(whole | other) for other in others} | {vit.digest(whole)}) == 1 + len(others)


@pytest.mark.parametrize("count", [40, pytest.param(400, marks=pytest.mark.long)])
def test_a_flipped_byte_is_found_or_harmless(tmp_path, count):
    saved = checkpoint_of_a_run()
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    chance, path, found = random.Random(0), tmp_path / "ckpt.pth", 0
    for _ in range(count):
        content = bytearray(buffer.getvalue())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            read = vit.read_checkpoint(path)
        except (ValueError, OSError) as error:
            found += 1
            assert "\n" not in str(error)
        else:  # what was saved is there; the name of the digest itself may have been hit
            assert vit.digest({name: read[name] for name in saved if name != "digest"}) == saved["digest"]
    assert found > count / 2


# -------------------------------------------------------------------------------- the weights


class Code:
    """A pickle that would make a file if it were believed."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


class Call:
    """A pickle that calls a function which is allowed."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


def bytes_of(content, **how):
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def zip_bomb():
    buffer, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(bytes_of(tiny().state_dict())))
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in source.infolist():
            archive.writestr(part.filename, source.read(part))
        archive.writestr("archive/data/99", bytes(100 * MB))
    return buffer.getvalue()


def laughs():
    nested = [0, 0]
    for _ in range(60):
        nested = [nested, nested]
    return nested


def cycle():
    circle = {}
    circle["circle"] = circle
    return circle


def bad_weights(canary):
    """{name: bytes, or what is to be saved} of files that are not a ViT's weights."""
    good = tiny().state_dict()  # patch 8, width 64, two blocks
    legacy = {"_use_new_zipfile_serialization": False}
    whole, old = bytes_of(good), bytes_of(good, **legacy)
    name, storage = "blocks.0.attn.qkv.weight", torch.zeros(1).storage()
    same = torch.zeros(max(value.numel() for value in good.values()))
    cases = {
        "empty": b"", "text": b"these are no weights\n" * 99, "list": [1, 2], "none": None, "nothing": {}, "number": 3,
        "code": pickle.dumps(Code(canary)), "code in a zip": Code(canary), "code among weights": good | {"x": Code(canary)},
        "code in an old file": bytes_of(good | {"x": Code(canary)}, **legacy),
        "zip bomb": zip_bomb(), "zip": whole[:30] + b"PK\5\6" + bytes(18), "laughs": {"x": laughs(), **good}, "cycle": cycle(),
        "set": good | {"x": {1}}, "a lot of memory": good | {"x": Call(bytearray, 10**12)}, "digest": good | {"digest": "no"},
        "expanded elsewhere": good | {"x": torch.zeros(()).expand(10**12), "digest": "no"},
        "tensor as digest": good | {"digest": torch.zeros(3)},
        "lost": {k: v for k, v in good.items() if k != name}, "surplus": good | {"x": torch.zeros(3)},
        "a name of two lines": good | {"x\ny\x1b[31m": torch.zeros(3)}, "no blocks": {k: v for k, v in good.items() if "bl" not in k},
        "names": {f"x.{k}": v for k, v in good.items()}, "numbers as names": dict(enumerate(good.values())),
        "block gone": {k: v for k, v in good.items() if "blocks.0" not in k},
        "odd block": good | {"blocks.": torch.zeros(3)},
        "wide": good | {"cls_token": torch.zeros(1, 1, 10**6)},
        "wide and without blocks": {
            "cls_token": torch.zeros(1, 1, 10**6), "pos_embed": torch.zeros(1, 2, 10**6).half(),
            "patch_embed.proj.weight": torch.zeros(10**6, 3, 1, 1).half(),
        },
        "claimed": good | {"pos_embed": Call(torch._utils._rebuild_tensor_v2, storage, 0, (1, 10**12, 64), (1, 1, 1), False, {})},
        "claimed without steps": good | {
            "pos_embed": Call(torch._utils._rebuild_tensor_v2, storage, 0, (1, 10**12 + 1, 64), (0, 0, 0), False, {})
        },
        "expanded": {k: torch.zeros(()).expand(v.shape) for k, v in good.items()},
        "shared": {k: same[: v.numel()].view(v.shape) for k, v in good.items()},
        "positions": good | {"pos_embed": torch.zeros(1, 11, 64)}, "no positions": good | {"pos_embed": torch.zeros(1, 1, 64)},
        "no shape": good | {"cls_token": torch.tensor(1.0)}, "nothing in it": good | {"pos_embed": torch.zeros(1, 0, 64)},
        "patch": good | {"patch_embed.proj.weight": torch.zeros(64, 3, 8, 9)}, "turned": good | {name: good[name].mT},
        **{str(dtype): good | {name: good[name].to(dtype)} for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)},
        "sparse": good | {name: good[name].to_sparse()}, "csr": good | {name: good[name].to_sparse_csr()},
        "meta": good | {name: good[name].to("meta")},
        "quantised": good | {name: torch.quantize_per_tensor(good[name], 0.1, 0, torch.qint8)},
        **{str(x): good | {name: torch.full_like(good[name], x)} for x in (torch.nan, torch.inf, -torch.inf)},
        "too large": good | {name: torch.full_like(good[name], 1e300, dtype=torch.float64)},
        **{f"{heads} heads": {"config": {"heads": heads}, "teacher": good} for heads in (0, -1, 7, "x", 10**9, 1.0, None, [1])},
        **{f"cut at {part}/8": whole[: len(whole) * part // 8] for part in range(1, 8)}, "cut at the end": whole[:-1],
        **{f"old, cut at {part}/8": old[: len(old) * part // 8] for part in range(1, 8)}, "old, cut at the end": old[:-9],
    }
    return {case: content if isinstance(content, bytes) else bytes_of(content) for case, content in cases.items()}


@pytest.mark.filterwarnings("ignore")  # of making some of the odd tensors
def test_files_that_are_no_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "white").save("a.png")
    canary, path = tmp_path / "canary", tmp_path / "w.pth"
    started = time.perf_counter()
    cases = bad_weights(canary)
    assert len(cases) > 60
    for case, content in cases.items():
        path.write_bytes(content)
        for main, command in (
            (train.main, [*TRAIN, "--weights", "w.pth"]),
            (visualize.main, ["w.pth", "--device", "cpu", "--images", "a.png", "--output", "out"]),
            (visualize.main, ["--weights", "w.pth", "--device", "cpu", "--digits", "sklearn", "--output", "out"]),
        ):
            error = told(main, command, capsys, case)
            assert not canary.exists(), case
            assert "w.pth" in error or "heads" in error, (case, error)
            assert len(error) < 500 and error.rstrip("\n").isprintable(), case
    assert sorted(os.listdir(tmp_path)) == ["a.png", "w.pth"]
    assert time.perf_counter() - started < 60


def test_weights_of_every_kind_that_are_good(tmp_path):
    for how in ({}, {"_use_new_zipfile_serialization": False}):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            torch.save(tiny().to(dtype).state_dict(), tmp_path / "w.pth", **how)
            weights, heads = vit.read_weights(str(tmp_path / "w.pth"))
            assert heads == 1 and vit.shape_of(weights) == {"patch_size": 8, "dim": 64, "depth": 2, "pos_size": 32}


def mutated(content, chance):
    """Bytes changed as chance has it: some of them flipped or set, a piece cut out, doubled or moved, or the end cut off."""
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 10))):
        a, b = sorted(chance.randrange(len(content) + 1) for _ in range(2))
        b = min(b, a + chance.choice((1, 8, 1000)))
        kind = chance.randrange(5)
        if kind == 0:
            content[a:b] = chance.randbytes(b - a)
        elif kind == 1:
            content[a:b] = bytes([chance.choice((0, 1, 0x7F, 0xFF))]) * (b - a)
        elif kind == 2:
            del content[a:b]
        elif kind == 3:
            content[a:a] = content[a:b]
        elif chance.random() < 0.3:
            del content[a:]
    return bytes(content)


def many_weights(folder, count):
    """Reads and looks through so many mutated files; returns how often it was refused, and the peak of memory in MB."""
    chance, path = random.Random(1), os.path.join(folder, "w.pth")
    Image.new("RGB", (64, 64), "white").save(os.path.join(folder, "a.png"))
    good = tiny(depth=1).state_dict()
    # half of them with a short pickle before little data, so that it is the pickle that is hit
    sources = [bytes_of(content, _use_new_zipfile_serialization=new) for new in (True, False)
               for content in (good, {"config": {"heads": 1}, "teacher": good}, {k: v[:1] for k, v in good.items()})]
    refused, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for k in range(count):
        Path(path).write_bytes(mutated(sources[k % len(sources)], chance))
        command = [path, "--images", os.path.join(folder, "a.png"), "--device", "cpu", "--image-size", "64", "--output", folder]
        status = visualize.main(command)
        assert status in (0, 2)
        refused += status == 2
        try:
            vit.read_weights(path)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)
    return refused, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


@pytest.mark.long
def test_mutated_weights_take_no_memory(tmp_path):
    here = Path(__file__).resolve().parent
    code = f"import sys; sys.path[:0] = {[str(here), str(here.parent)]}; import test_files as t; print(*t.many_weights({str(tmp_path)!r}, 200))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, peak = map(int, done.stdout.splitlines()[-1].split())
    print(f"{refused} of 200 refused, {peak} MB more than at the start at most")
    assert done.stderr.count("\n") == refused and "Traceback" not in done.stderr
    assert refused > 50 and peak < 300


# ------------------------------------------------------------------------------- the settings

ABSURD = (None, "x", "", -1, 0, 1, 10**9, 10**400, 1.5, float("nan"), float("inf"), True, [], [1], ["x"], [9, 1], {}, {"x": 1},
          torch.zeros(2), "\n", "$\\frac{$")


def absurd_checkpoints(path):
    """Writes a checkpoint for each setting that is lost or absurd; yields its name and value."""
    good = checkpoint_of_a_run()
    del good["digest"]
    for name in (*visualize.SETTINGS, *visualize.MORE_SETTINGS):
        for value in ABSURD:
            torch.save(good | {"config": good["config"] | {name: value}}, path)
            yield name, value
    for name in ("config", "metrics", "epoch"):
        for value in ABSURD:
            torch.save(good | {name: value}, path)
            yield name, value
    validation = {"images": 9, "loss": 1.0, "knn": 0.5}
    table = dict.fromkeys((*visualize.CURVES, "diversity"), 0.5)
    validation |= dict.fromkeys(("mean", "head_1", "head_2", "head_3", "brightness", "shuffled"), table)
    for name in validation:
        for value in (*ABSURD, {"entropy": 1}, {"entropy": "x"}):
            log = [{"epoch": 0, "validation": validation}, {"epoch": 1, "loss": 1.0, "validation": validation | {name: value}}]
            torch.save(good | {"metrics": log}, path)
            yield name, value


def test_settings_that_are_absurd(tmp_path, capsys):
    """Each is refused in one line or is one that can be lived with."""
    path, refused = tmp_path / "ckpt.pth", set()
    args = visualize.parse_args([str(path)])
    for name, value in absurd_checkpoints(path):
        try:
            visualize.open_checkpoint(str(path), args)
        except ValueError as error:
            assert str(error).startswith(str(path)) or "heads" in str(error) or "--image-size" in str(error)
            assert "\n" not in str(error)
            refused.add(name)
    assert refused >= {"metrics", "config", "epoch", "images", "loss", "knn", "mean", "head_1", "brightness", "shuffled"}
    assert refused >= set(visualize.SETTINGS) - {"patch_size", "dim", "depth", "pos_size", "weights"} - {
        name for name in visualize.SETTINGS if name.startswith(("head_", "out_dim", "bottleneck"))}
    content = checkpoint_of_a_run()
    content["config"]["canvas_size"] = 10**9
    content["digest"] = vit.digest(content)
    torch.save(content, path)
    assert "says of canvas_size" in told(visualize.main, [path, "--output", tmp_path / "out"], capsys)
    torch.save(tiny().state_dict(), path)
    assert "--image-size 8000000 is too large" in told(visualize.main, [path, "--image-size", "8000000"], capsys)


@pytest.mark.long
def test_settings_that_are_accepted_can_be_lived_with(tmp_path, capsys, monkeypatch):
    for name, number in (("TEST_IMAGES", 30), ("VALIDATION_IMAGES", 30), ("BANK_IMAGES", 30)):
        monkeypatch.setattr(visualize, name, number)
    monkeypatch.setattr(visualize, "draw_tsne", lambda *args: None)
    monkeypatch.chdir(tmp_path)
    path, accepted = tmp_path / "ckpt.pth", 0
    for name, value in absurd_checkpoints(path):
        capsys.readouterr()
        status = visualize.main([str(path), "--device", "cpu", "--digits", "sklearn", "--output", str(tmp_path / "out")])
        printed = capsys.readouterr().err
        assert (status, printed.count("\n")) in ((2, 1), (0, 0), (0, 1)), (name, value, printed)
        accepted += status == 0
    print(f"{accepted} accepted")
    assert accepted > 10


# --------------------------------------------------------------------------------- the images


def png(image, **how):
    buffer = io.BytesIO()
    image.save(buffer, how.pop("format", "PNG"), **how)
    return buffer.getvalue()


def odd_images():
    """{name: (bytes, whether it must be drawn)}."""
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    grey, deep = Image.fromarray(ramp), Image.fromarray(ramp.astype(np.uint16) * 257)
    colour = Image.merge("RGB", [grey, grey.rotate(90), grey.rotate(180)])
    palette = colour.quantize(16)
    frames = [colour, colour.rotate(90)]
    whole = png(colour)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "1×1": (png(Image.new("RGB", (1, 1))), False), "20,000×20,000": (png(Image.new("1", (20_000, 20_000))), False),
        "10,000×10,000": (png(Image.new("1", (10_000, 10_000))), False), "5000×5000": (png(Image.new("L", (5000, 5000))), True),
        "64×20,000": (png(Image.new("L", (64, 20_000))), True), "1×64": (png(Image.new("L", (1, 64))), False),
        "1 bit": (png(colour.convert("1")), True), "grey": (png(grey), True), "16 bit": (png(deep), True),
        "16 bit TIFF": (png(deep, format="TIFF"), True), "32 bit TIFF": (png(Image.fromarray(ramp.astype(np.int32)), format="TIFF"), True),
        "float TIFF": (png(Image.fromarray(ramp.astype(np.float32)), format="TIFF"), False),
        "palette": (png(palette), True), "palette and one clear colour": (png(palette, transparency=0), True),
        "palette and half clear colours": (png(palette, transparency=bytes(range(16))), True),
        "clear grey": (png(grey, transparency=4), True), "LA": (png(Image.merge("LA", [grey, grey])), True),
        "RGBA": (png(Image.merge("RGBA", [*colour.split(), grey])), True), "CMYK": (png(colour.convert("CMYK"), format="JPEG"), True),
        "YCbCr TIFF": (png(colour.convert("YCbCr"), format="TIFF"), True), "LAB TIFF": (png(colour.convert("LAB"), format="TIFF"), True),
        "moving GIF": (png(colour, format="GIF", save_all=True, append_images=frames), True),
        "moving PNG": (png(colour, save_all=True, append_images=frames), True), "turned": (png(colour, format="JPEG", exif=exif), True),
        "WEBP": (png(colour, format="WEBP"), True), "a rare format": (png(colour, format="PCX"), False), "EPS": (png(colour, format="EPS"), False), "PDF": (png(colour, format="PDF"), False),
        "text": (b"no picture\n", False), "empty": (b"", False), "header": (whole[:40], False), "half": (whole[: len(whole) // 2], False),
        "JPEG cut off": (png(colour, format="JPEG")[:700], False), "huge claim": (whole[:16] + b"\0\0\xff\xff" * 2 + whole[24:], False),
        "bad EXIF": (png(colour, format="JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"), True),
    }


@pytest.mark.filterwarnings("error")  # pytest would keep them from stderr
def test_odd_images_are_drawn_or_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(tiny().state_dict(), "w.pth")
    for name, (content, drawn) in odd_images().items():
        Path("x.png").write_bytes(content)
        command = ["w.pth", "--device", "cpu", "--image-size", "32", "--output", "out", "--images", "x.png"]
        if drawn:
            assert visualize.main(command) == 0, (name, capsys.readouterr().err)
            assert capsys.readouterr().err == "", name
        else:
            assert "--images x.png" in told(visualize.main, command, capsys, name)
        folder = tmp_path / "backgrounds"
        folder.mkdir(exist_ok=True)
        (folder / "x.png").write_bytes(content)
        data.read_folder.cache_clear()
        if drawn:
            assert data.read_folder(str(folder), 64).shape == (1, 64, 64)
        else:
            assert "--background backgrounds" in told(train.main, [*TRAIN, "--background", "backgrounds"], capsys, name)


def test_deep_grey_is_scaled_and_not_clipped(tmp_path):
    images = odd_images()
    for name in ("16 bit", "16 bit TIFF", "grey"):
        (tmp_path / "x.png").write_bytes(images[name][0])
        assert np.array_equal(np.asarray(data.read_image(tmp_path / "x.png"))[0, :, 0], np.arange(64) * 4), name


def test_what_is_clear_lies_on_white(tmp_path):
    for mode, colour in (("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))):
        Image.new(mode, (9, 9), colour).save(tmp_path / "x.png")
        assert data.read_image(tmp_path / "x.png").getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.long
def test_mutated_images_are_drawn_or_told(tmp_path, capfd):
    small = {"1 bit", "grey", "16 bit", "16 bit TIFF", "palette and half clear colours", "CMYK", "RGBA", "moving GIF", "moving PNG",
             "WEBP", "turned", "bad EXIF", "YCbCr TIFF"}
    sources = [content for name, (content, _) in odd_images().items() if name in small]
    torch.save(tiny().state_dict(), tmp_path / "w.pth")
    chance, drawn = random.Random(2), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for k in range(200):
        (tmp_path / "x.png").write_bytes(mutated(sources[k % len(sources)], chance))
        command = ["w.pth", "--device", "cpu", "--image-size", "32", "--output", "out", "--images", "x.png"]
        command = [str(tmp_path / part) if "." in part or part == "out" else part for part in command]
        capfd.readouterr()
        status = visualize.main(command)
        assert (status, capfd.readouterr().err.count("\n")) in ((0, 0), (2, 1)), k
        drawn += status == 0
    print(f"{drawn} of 200 drawn, {(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024} MB more at most")
    assert 20 < drawn < 180
