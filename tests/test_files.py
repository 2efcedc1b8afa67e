"""No file can hurt us: bad ones are told in one line, run nothing, take no memory and no time."""

import io
import os
import pickle
import random
import resource
import time
import zipfile
from functools import partial, reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_vit import assert_same_weights, tiny

import data
import train
import visualize
import vit

TRAIN = ["--preset=laptop", "--digits=sklearn", "--device=cpu", "--epochs=1", "--batch-size=8"]
TRAIN += ["--images-per-epoch=16"]
LAUGHS = reduce(lambda nested, _: [nested, nested], range(60), 0)  # 2⁶⁰ numbers in lists
DRAW = ["--device=cpu", "--image-size=32", "--output=out", "--images"]


def told(main, command, capsys, case=None):
    """Runs a command line that must end with status 2 and one line on stderr, which is returned."""
    capsys.readouterr()
    assert main([str(part) for part in command]) == 2, case
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "error: " in error and len(error) < 500, (case, error)
    assert error.rstrip("\n").isprintable(), (case, error)
    return error


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path):
    path = str(tmp_path / "ckpt.pth")
    train.save_checkpoint(path, {"step": 1})
    with pytest.raises(TypeError):  # a generator: cannot be saved, found out midway
        train.save_checkpoint(path, {"step": 2, "x": torch.zeros(9999), "y": (x for x in "y")})
    assert vit.read_checkpoint(path) == {"step": 1} and os.listdir(tmp_path) == ["ckpt.pth"]


def test_a_full_disk(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("a.png")
    torch.save(tiny().state_dict(), "w.pth")
    train.save_checkpoint("old.pth", {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # files of at most 2,000 bytes
    try:
        told(visualize.main, ["w.pth", *DRAW, "a.png"], capsys)
        error = told(train.main, [*TRAIN, "--output", "run"], capsys)
        with pytest.raises(OSError, match="old.pth could not be written"):
            train.save_checkpoint("old.pth", {"step": 2, "x": torch.zeros(9999)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "ckpt.pth could not be written" in error and os.listdir("run") == []
    assert vit.read_checkpoint("old.pth") == {"step": 1}


def bytes_of(content, **how):
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


# the format of before 2020 is no zip archive
old_bytes_of = partial(bytes_of, _use_new_zipfile_serialization=False)


def test_a_flipped_bit_is_found_or_harmless(tmp_path):
    path, chance, found = tmp_path / "ckpt.pth", random.Random(0), 0
    config = train.make_config(train.parse_args(TRAIN))
    content = {"config": config, "step": 2, "teacher": tiny(dim=8).state_dict()}
    train.save_checkpoint(str(path), content)
    whole, saved = path.read_bytes(), bytes_of(vit.read_checkpoint(path))
    for _ in range(200):
        flipped = bytearray(whole)
        flipped[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        try:
            read = vit.read_checkpoint(path)
        except (ValueError, OSError) as error:
            found += 1
            assert "\n" not in str(error)
        else:
            assert bytes_of(read) == saved
    assert found > 50


def call(function, *arguments):
    """An object whose pickle calls a function with these arguments."""
    return type("Call", (), {"__reduce__": lambda self: (function, arguments)})()


def zip_bomb(content):
    source, buffer = zipfile.ZipFile(io.BytesIO(bytes_of(content))), io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for record in source.namelist():
            archive.writestr(record, source.read(record))
    return buffer.getvalue()


def hostile_weights(good, canary):
    """{name: what is saved, or bytes} of files that would run code, or take memory or time."""
    code, circle, storage = call(open, str(canary), "w"), {}, torch.zeros(1).storage()
    circle["circle"] = circle
    claimed = partial(call, torch._utils._rebuild_tensor_v2, storage, 0)
    same = torch.zeros(max(value.numel() for value in good.values()))
    return {
        "code": pickle.dumps(code),
        "code in a zip": code,
        "code among weights": good | {"x": code},
        "code in an old file": old_bytes_of(good | {"x": code}),
        "zip bomb": zip_bomb(good | {"x": [torch.zeros(10**7)]}),
        "empty zip": bytes_of(good)[:30] + b"PK\5\6" + bytes(18),
        "laughs": {"x": LAUGHS},
        "cycle": circle,
        "a lot of memory": good | {"x": call(bytearray, 10**18)},
        "claimed": good | {"pos_embed": claimed((1, 10**12, 64), (1, 1, 1), False, {})},
        "no steps": good | {"pos_embed": claimed((1, 10**12, 64), (0, 0, 0), False, {})},
        "expanded": {k: torch.zeros(()).expand(v.shape) for k, v in good.items()},
        "expanded elsewhere": good | {"x": torch.zeros(()).expand(10**12)},
        "shared": {k: same[: v.numel()].view(v.shape) for k, v in good.items()},
        "wide": good | {"cls_token": torch.zeros(1, 1, 10**6)},
        "of no size": good | {"pos_embed": torch.zeros(0, 5, 10**12)},
        "many blocks": good | {f"blocks.{k}.x": torch.zeros(0) for k in range(2000)},
        "deep": good | {f"blocks.{k}.norm1.bias": torch.zeros(1) for k in range(2, 2000)},
        "meta": good | {"norm.bias": good["norm.bias"].to("meta")},
    }


def misshapen_weights(good):
    """What is saved in files whose content is not the weights of a ViT, or not quite."""
    name = "blocks.0.attn.qkv.weight"
    x = good[name]
    contents = [[1, 2], None, {}, 3, {"teacher": 3}, {"config": 3, "teacher": good}]
    contents += [{f"x.{k}": v for k, v in good.items()}, dict(enumerate(good.values()))]
    for lost in (name, "blocks", "blocks.0", "pos_embed"):
        contents.append({k: v for k, v in good.items() if lost not in k})
    contents.append({k: torch.zeros([n % 64 for n in v.shape]) for k, v in good.items()})
    for heads in (-1, 7, "x", 10**9, 1.0, [1]):
        contents.append({"config": {"heads": heads}, "teacher": good})
    values = [torch.full_like(x, number) for number in (torch.nan, torch.inf, -torch.inf)]
    values += [x.to(dtype) for dtype in (torch.int64, torch.bool, torch.complex64)]
    values += [x.mT, x.to_sparse(), x.to_sparse_csr(), x.double() + 1e300]
    values += [torch.quantize_per_tensor(x, 1, 0, torch.qint8)]
    contents += [good | {name: value} for value in values]
    shapes = [("x", (3,)), ("x\ny\x1b[31m", (3,)), ("blocks.", (3,)), ("cls_token", ())]
    shapes += [("pos_embed", (1, tokens, 64)) for tokens in (0, 1, 11)]
    shapes += [("patch_embed.proj.weight", (64, 3, side, 9 - side)) for side in (9, 1)]
    return contents + [good | {key: torch.zeros(shape)} for key, shape in shapes]


def bad_weights(canary):
    """{name: bytes} of files that are not a ViT's weights."""
    good = tiny().state_dict()  # patch 8, width 64, two blocks
    cases = hostile_weights(good, canary) | dict(enumerate(misshapen_weights(good)))
    cases |= {"empty": b"", "text": b"these are no weights\n" * 99}
    for name, whole in ("cut", bytes_of(good)), ("old, cut", old_bytes_of(good)):
        places = [len(whole) * part // 8 for part in range(1, 8)] + [len(whole) - 9]
        cases |= {f"{name} at {place}": whole[:place] for place in places}
    return {k: v if isinstance(v, bytes) else bytes_of(v) for k, v in cases.items()}


@pytest.mark.filterwarnings("ignore")  # of making some of the odd tensors
def test_files_that_are_no_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "white").save("a.png")
    cases, before = bad_weights(tmp_path / "canary"), peak_mb()
    assert len(cases) > 70
    for case, content in cases.items():
        Path("w.pth").write_bytes(content)
        started = time.perf_counter()
        for main, command in (
            (train.main, [*TRAIN, "--weights", "w.pth"]),
            (train.main, ["--resume", "w.pth"]),
            (visualize.main, ["w.pth", *DRAW, "a.png"]),
            (visualize.main, ["--weights", "w.pth", "--device", "cpu", "--digits", "sklearn"]),
        ):
            assert "w.pth" in told(main, command, capsys, case), case
            assert sorted(os.listdir()) == ["a.png", "w.pth"], case  # no canary among them
        assert time.perf_counter() - started < 5, case
    assert peak_mb() - before < 200


@pytest.mark.parametrize("extra", [{1}, "no", LAUGHS, [torch.zeros(3)], b"x"])
def test_a_value_that_nobody_reads_does_no_harm(tmp_path, extra):
    good = tiny().state_dict()
    torch.save(good | {"x": extra}, tmp_path / "w.pth")
    assert_same_weights(vit.load_backbone(str(tmp_path / "w.pth"))[0], good)


def test_flags_that_do_not_fit_the_weights_or_the_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(tiny().state_dict(), "w.pth")
    for flag in ("--dim=128", "--depth=1", "--patch-size=7"):
        error = told(train.main, [*TRAIN, "--weights=w.pth", flag], capsys)
        assert f"{flag.split('=')[0]} " in error and "the weights'" in error
    command = ["w.pth", "--weights=none", "--device=cpu", "--digits=sklearn"]
    assert "memory" in told(visualize.main, [*command, "--image-size=8000000"], capsys)


def encoded(image, kind="PNG", **how):
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


RAMP = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
GRAY, DEEP = Image.fromarray(RAMP), Image.fromarray(RAMP.astype(np.uint16) * 257)


def odd_images():
    """{name: (bytes, whether it can be drawn)}."""
    color = Image.merge("RGB", [GRAY, GRAY.rotate(90), GRAY.rotate(180)])
    frames, exif, whole = [color, color.rotate(90)], Image.Exif(), encoded(color)
    exif[0x0112] = 6  # turned
    good = {
        "5000×5000": encoded(Image.new("L", (5000, 5000))),
        "64×20,000": encoded(Image.new("L", (64, 20_000))),
        **{mode: encoded(color.convert(mode)) for mode in ("1", "L", "P", "RGBA")},
        **{f"{mode} TIFF": encoded(color.convert(mode), "TIFF") for mode in ("YCbCr", "LAB")},
        "16 bit": encoded(DEEP),
        "32 bit TIFF": encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
        "half clear colors": encoded(color.quantize(16), transparency=bytes(range(16))),
        "LA": encoded(Image.merge("LA", [GRAY, GRAY])),
        "CMYK": encoded(color.convert("CMYK"), "JPEG"),
        "moving GIF": encoded(color, "GIF", save_all=True, append_images=frames),
        "turned": encoded(color, "JPEG", exif=exif),
        "bad EXIF": encoded(color, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"),
    }
    bad = {
        "20,000×20,000": encoded(Image.new("1", (20_000, 20_000))),
        "10,000×10,000": encoded(Image.new("1", (10_000, 10_000))),
        "huge claim": whole[:16] + b"\0\0\xff\xff" * 2 + whole[24:],
        "float TIFF": encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        **{kind: encoded(color, kind) for kind in ("PCX", "EPS", "PDF")},
        "text": b"no picture\n",
        **{f"{n} bytes": whole[:n] for n in (0, 9, 40, len(whole) // 2)},
        "JPEG cut off": encoded(color, "JPEG")[:700],
    }
    return {k: (v, True) for k, v in good.items()} | {k: (v, False) for k, v in bad.items()}


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")  # as of Pillow
def test_odd_images_are_drawn_or_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(tiny().state_dict(), "w.pth")
    Path("back").mkdir()
    for name, (content, drawn) in odd_images().items():
        for path in ("x.png", "back/x.png"):
            Path(path).write_bytes(content)
        data.read_folder.cache_clear()
        if drawn:
            assert visualize.main(["w.pth", *DRAW, "x.png"]) == 0, name
            assert capsys.readouterr().err == "", name
            assert data.read_folder("back", 64).shape == (1, 64, 64), name
        else:
            assert "x.png" in told(visualize.main, ["w.pth", *DRAW, "x.png"], capsys, name)
            assert "back/x.png" in told(train.main, [*TRAIN, "--background=back"], capsys, name)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_deep_gray_is_scaled_and_not_clipped(tmp_path, kind):
    DEEP.save(tmp_path / "x", kind)
    assert np.array_equal(np.asarray(data.read_image(tmp_path / "x"))[..., 0], RAMP)


@pytest.mark.parametrize("mode,color", [("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))])
def test_what_is_clear_lies_on_white(tmp_path, mode, color):
    Image.new(mode, (9, 9), color).save(tmp_path / "x.png")
    assert data.read_image(tmp_path / "x.png").getpixel((4, 4)) == (255, 255, 255)


def mutated(content, chance):
    """Some of the bytes set, cut out or doubled, as chance has it."""
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 10))):
        a, size = chance.randrange(len(content) + 1), chance.choice((1, 8, 1000, 10**9))
        old = content[a : a + size]
        new = chance.randbytes(len(old)), b"\0" * len(old), b"\xff" * len(old), b"", old * 2
        content[a : a + size] = chance.choice(new)
    return bytes(content)


@pytest.mark.parametrize("kind", ["weights", "pictures"])
def test_mutated_files_are_read_or_told(tmp_path, kind):
    good, path, chance = tiny(dim=8).state_dict(), str(tmp_path / "x"), random.Random(2)
    ours = {"config": {"heads": 1}, "teacher": good}
    sources, read = [f(x) for x in (good, ours) for f in (bytes_of, old_bytes_of)], 0
    if kind == "pictures":
        sources = [x for x, drawn in odd_images().values() if drawn and len(x) < 20_000]
    before = peak_mb()
    for k in range(400):
        Path(path).write_bytes(mutated(sources[k % len(sources)], chance))
        try:
            data.read_image(path) if kind == "pictures" else vit.load_backbone(path)
            read += 1
        except (ValueError, OSError) as error:
            assert path in str(error) and "\n" not in str(error), k
    assert 10 < read < 390 and peak_mb() - before < 300
