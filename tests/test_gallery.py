"""Networks open as they were saved, and are shown pictures that have names and fit the patches."""

import argparse
import io
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from helpers import SHIPPED, config_of, model_of, read, resume, small_vit, start
from PIL import Image

import evaluate
import gallery
import observe
import runs
import views
import visualize
import vit
from data import Split
from gallery import Example, LookedAt
from vit import VisionTransformer, ViTShape

# ---------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("name", ["same", "different"])
def test_shipped_checkpoints_look_at_ink(name):
    model = model_of(SHIPPED / f"{name}.pth")
    assert model.config.views == name
    assert model.epoch == model.config.epochs
    images = views.evaluation_batches(model.config, model.splits["test"], 200)
    observation = observe.observe({"trained": model.backbone}, images)
    mean = evaluate.measure_attention(observation)["mean"]
    assert mean["digit_density"]["low"] > 3 * mean["background_density"]["high"]
    assert mean["selectivity"]["low"] > 1.2


def test_dinos_script_reads_our_checkpoints(tmp_path):
    """As visualize_attention.py of facebookresearch/dino: its torch.load, its key, its prefixes."""
    config = config_of("--preset paper --weights none --digits sklearn --device cpu")
    network = vit.build_network(config)
    content = {
        "config": asdict(config),
        "teacher": network.state_dict(),
        "epoch": 1,
        "metrics": [],
    }
    path = str(tmp_path / "ckpt.pth")
    runs.save_checkpoint(path, content)
    state = torch.load(path, map_location="cpu")["teacher"]
    state = {
        name.replace("module.", "").replace("backbone.", ""): value for name, value in state.items()
    }
    vit_small = VisionTransformer(ViTShape(patch_size=8, dim=384, depth=12, heads=6))
    missing, unexpected = vit_small.load_state_dict(state, strict=False)
    assert missing == []
    assert all(name.startswith("head.") for name in unexpected)

    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network.backbone.get_last_selfattention(noise)
        assert torch.equal(vit_small.get_last_selfattention(noise), expected)
        assert torch.equal(model_of(path).backbone.get_last_selfattention(noise), expected)


def test_a_network_may_expect_a_mean_and_deviation_of_one_half():
    backbone = small_vit()
    image = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = backbone((image - 0.5) / 0.5)
        gallery.expect_half(backbone)
        feature = backbone(views.normalize(image))
    torch.testing.assert_close(feature, expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------- kept epochs


@pytest.fixture
def kept(tmp_path, few_images):
    """The folder of a run of two epochs that kept both, and the network before."""
    assert start(tmp_path / "kept", "--keep-epochs 0,1,2") == 0
    return tmp_path / "kept"


def epochs_of(folder) -> list[str]:
    return list(gallery.kept_epochs(model_of(folder / "ckpt.pth")))


def test_the_epochs_of_a_run_are_found_wherever_its_folder_is(tmp_path, capsys, kept):
    """Also after it was resumed, and with a checkpoint of another name."""
    shutil.copytree(kept, tmp_path / "copy")
    shutil.move(tmp_path / "copy" / "ckpt.pth", tmp_path / "copy" / "best.pth")
    model = model_of(tmp_path / "copy" / "best.pth")
    backbones = gallery.kept_epochs(model)
    assert list(backbones) == ["epoch 0", "epoch 1", "epoch 2"]
    assert backbones["epoch 2"] is model.backbone
    expected = model_of(kept / "epoch-1.pth").backbone.state_dict()
    for name, value in backbones["epoch 1"].state_dict().items():
        assert torch.equal(value, expected[name])
    assert resume(kept, "--epochs 3") == 0
    capsys.readouterr()
    assert epochs_of(kept) == ["epoch 0", "epoch 1", "epoch 2", "epoch 3"]
    assert "left out" not in capsys.readouterr().err


def test_times_do_not_make_another_run(tmp_path, kept):
    """A run that is killed after it has kept an epoch repeats the epoch."""
    content = torch.load(kept / "epoch-1.pth", weights_only=True)
    content["metrics"][1]["seconds"] += 1
    torch.save(content, kept / "epoch-1.pth")
    assert epochs_of(kept) == ["epoch 0", "epoch 1", "epoch 2"]


@pytest.mark.parametrize("flags", ["--seed 1", "--lr 0.1", "--loss dino --depth 1"])
def test_the_epochs_of_another_run_are_left_out(tmp_path, capsys, kept, flags):
    other = tmp_path / "other"
    assert start(other, f"--keep-epochs 1 {flags}") == 0
    shutil.copy(other / "epoch-1.pth", kept)
    capsys.readouterr()
    assert epochs_of(kept) == ["epoch 0", "epoch 2"]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "kept epochs are left out, since they are of another run: epoch-1.pth" in error


@pytest.mark.parametrize("content", [b"", b"hello", "weights", "no log"])
def test_files_that_are_no_kept_epochs_are_left_out(capsys, kept, content):
    if content == "weights":
        torch.save(small_vit().state_dict(), kept / "epoch-1.pth")
    elif content == "no log":
        saved = torch.load(kept / "epoch-1.pth", weights_only=True)
        torch.save(saved | {"metrics": [1, 2]}, kept / "epoch-1.pth")
    else:
        (kept / "epoch-1.pth").write_bytes(content)
    assert epochs_of(kept) == ["epoch 0", "epoch 2"]
    error = capsys.readouterr().err.splitlines()[-1]
    reason = "they cannot be read" if isinstance(content, bytes) else "train.py did not write them"
    assert error.endswith(f"kept epochs are left out, since {reason}: epoch-1.pth")


def test_an_epoch_after_the_checkpoint_is_left_out(capsys, kept):
    checkpoint = read(kept)
    checkpoint |= {"epoch": 1, "step": 2, "metrics": checkpoint["metrics"][:2]}
    torch.save(checkpoint, kept / "ckpt.pth")
    assert epochs_of(kept) == ["epoch 0", "epoch 1"]
    assert "they are later than the checkpoint, which is of epoch 1" in capsys.readouterr().err


def flags_of(flags: str) -> argparse.Namespace:
    return visualize.parse_args([*flags.split(), "--device", "cpu"])


def test_flags_for_weights_of_others_are_refused_for_our_own(tmp_path):
    """Beside our own, weights of others may need them."""
    ours = SHIPPED / "same.pth"
    torch.save(small_vit().state_dict(), tmp_path / "w.pth")
    for flag, name in [
        ("--heads 4", "--heads"),
        ("--grid 4x4", "--grid"),
        ("--normalise half", "--normalise half"),
    ]:
        for command in (f"{ours}", f"{ours} --weights {ours}", f"{ours} --weights none"):
            with pytest.raises(ValueError, match=f"^{name}: leave it out; the weights say this"):
                gallery.open_models(flags_of(f"{command} {flag}"))
        own, others = gallery.open_models(flags_of(f"{ours} --weights {tmp_path}/w.pth {flag}"))
        assert own.backbone.shape.heads == 3
        assert own.backbone.grid == (8, 8)
        assert others.backbone.shape.heads == (4 if name == "--heads" else 2)


@pytest.mark.parametrize(
    "beside",
    [
        {"config": {"heads": 1}},
        {"config": None},
        {"epoch": 12, "metrics": {"accuracy": 0.9}},
        {"config": {"heads": 1}, "epoch": 12, "metrics": [{"validation": 0.9}]},
    ],
    ids=str,
)
def test_keys_of_ours_in_files_of_others(tmp_path, capsys, beside):
    """Flags are obeyed, and the file is not taken for a run."""
    state = small_vit().state_dict()
    path = tmp_path / "w.pth"
    torch.save({"teacher": state} | beside, path)
    (model,) = gallery.open_models(flags_of(f"{path} --heads 4 --normalise half"))
    assert model.backbone.shape.heads == 4
    assert model.epoch is None
    assert model.history is None
    assert not model.should_be_measured
    assert not torch.equal(model.backbone.patch_embed.proj.weight, state["patch_embed.proj.weight"])
    printed = capsys.readouterr().out
    assert "4 heads, grid 4×4 (assumed; override with --grid)" in printed
    assert "it is given pictures normalised with a mean and standard deviation of 0.5" in printed


# ---------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    "size, shape",
    [((100, 40), (3, 21, 56)), ((7, 900), (3, 56, 7))],  # 22.4 pixels are about three patches
)
def test_pictures_keep_their_proportions_and_fit_the_patches(tmp_path, size, shape):
    path = tmp_path / "a.png"
    Image.new("RGB", size, (255, 0, 0)).save(path)
    picture = gallery.open_image(str(path), image_size=56, patch_size=7)
    assert picture.shape == shape
    torch.testing.assert_close(picture.mean((1, 2)), torch.tensor([1.0, 0.0, 0.0]))


def test_pictures_have_the_names_of_their_files(tmp_path):
    """Each file is shown once, to every network at its own size."""
    (tmp_path / "deeper").mkdir()
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    Image.new("L", (64, 64)).save(tmp_path / "deeper" / "b.png")
    small = model_of(SHIPPED / "same.pth")
    small.config.image_size = 14
    large = model_of(SHIPPED / "different.pth")
    large.config.image_size = 28
    paths = gallery.list_images([str(tmp_path), str(tmp_path / "a.png")])
    examples = gallery.open_pictures([small, large], paths)
    for of_model, size in zip(examples, (14, 28)):
        assert [example.name for example in of_model] == ["a.png", "b.png"]
        assert [example.picture.shape for example in of_model] == [(3, size, size)] * 2
        assert not any(example.masks for example in of_model)


def test_a_picture_that_is_named_and_in_a_folder_counts_as_named(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("L", (64, 64)).save(tmp_path / name)
    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    expected = {paths[0]: False, paths[1]: True}
    assert gallery.list_images([str(tmp_path), paths[1]]) == expected
    assert gallery.list_images([paths[1], str(tmp_path)]) == expected


def test_how_pictures_were_resized_is_printed(tmp_path, capsys):
    """Once for networks of one size, with the picture that changes its proportions most."""
    for name, size in (("square.png", (64, 64)), ("strip.png", (2500, 7)), ("high.png", (40, 90))):
        Image.new("L", size).save(tmp_path / name)
    models = [model_of(SHIPPED / "same.pth"), model_of(SHIPPED / "different.pth")]
    paths = gallery.list_images([str(tmp_path)])
    capsys.readouterr()
    gallery.open_pictures(models, paths)
    line = "--images: the longer side is resized to 56 pixels, both to whole patches of 7"
    change = "; the proportions of strip.png change most, from 357:1 to 8:1"
    assert capsys.readouterr().out == f"{line}{change}\n"

    del paths[str(tmp_path / "strip.png")]
    gallery.open_pictures(models, paths)
    change = "; the proportions of high.png change most, from 1:2.25 to 1:2"
    assert capsys.readouterr().out.endswith(change + "\n")
    models[1].config.image_size = 28
    gallery.open_pictures(models, {str(tmp_path / "square.png"): True})
    printed = capsys.readouterr().out.splitlines()
    assert printed == [line, line.replace("56", "28")]


def test_test_images_are_numbered_from_one():
    model = model_of(SHIPPED / "same.pth")
    canvases = gallery.example_images(model, 2)
    assert [canvas.name for canvas in canvases] == ["test canvas 1", "test canvas 2"]
    assert [len(canvas.masks) for canvas in canvases] == [2, 2]

    photographs = torch.zeros(3, 3, 96, 96, dtype=torch.uint8)
    model.has_marks = True  # photographs never have any
    model.config.dataset = "stl10"
    model.splits = {"test": Split(photographs, torch.zeros(3, dtype=torch.int64))}
    examples = gallery.example_images(model, 2)
    assert [example.name for example in examples] == ["test photograph 1", "test photograph 2"]
    assert [example.masks for example in examples] == [(), ()]


def test_a_mark_lies_on_top_and_counts_as_clutter():
    model = model_of(SHIPPED / "same.pth")
    plain = gallery.example_images(model, 20)
    model.has_marks = True
    marked = gallery.example_images(model, 20)
    batch = next(views.marked_batches(model.config, model.splits["test"], 20))
    for number, (example, without) in enumerate(zip(marked, plain)):
        mark = batch.mark[number]
        digit, clutter = example.masks
        digit_without, clutter_without = without.masks
        assert torch.equal(example.picture, batch.images[number].clamp(0, 1))
        assert torch.equal(digit, digit_without & ~mark)
        assert torch.equal(clutter, clutter_without | mark)
        assert not torch.equal(example.picture, without.picture)
    assert any((without.masks[0] & mark).any() for without, mark in zip(plain, batch.mark))


# -------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_bar_counts_the_passes_that_a_measurement_takes(depth, monkeypatch):
    """It ends where it was said to end, for pictures of any shape."""
    bars = []

    class Bar(gallery.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr(gallery, "tqdm", Bar)
    monkeypatch.setattr(evaluate, "effect_images", lambda *args, **kwargs: 2)
    model = model_of(SHIPPED / "same.pth")
    model.backbone = small_vit(depth=depth)
    rng = torch.Generator().manual_seed(0)
    sizes = [(80, 96), (8, 40), (8, 8), (40, 32)]
    pictures = [Example(torch.rand(3, *size, generator=rng)) for size in sizes]
    names = [*evaluate.PHOTO_MAPS, "effect"]
    gallery.maps_of_pictures(model, pictures, names, with_srg=True)
    (bar,) = bars
    assert bar.desc == "measuring"
    assert bar.n == bar.total > 300
    assert not model.backbone.norm._forward_hooks


def test_maps_are_saved_as_arrays(tmp_path):
    model = model_of(SHIPPED / "same.pth")
    canvases = gallery.example_images(model, 2)
    rng = torch.Generator().manual_seed(0)
    photo = Example(torch.rand(3, 14, 21, generator=rng), name="猫.png")
    examples = [*canvases, photo]
    names = ["attention", "rollout", "effect", "heads"]
    maps = gallery.maps_of_examples(model.backbone, examples, names)
    other = replace(model, name="other", backbone=small_vit(patch_size=7, pos_size=28))
    other_maps = gallery.maps_of_examples(other.backbone, examples, ["attention"])
    networks = [LookedAt(model, examples, maps), LookedAt(other, examples, other_maps)]
    gallery.save_maps(networks, str(tmp_path / "maps.npz"))

    saved = np.load(tmp_path / "maps.npz")  # without pickled objects
    assert saved["networks"].tolist() == [model.name, "other"]
    assert saved["pictures"].tolist() == ["test canvas 1", "test canvas 2", "猫.png"]
    for number, (example, of_example) in enumerate(zip(examples, maps)):
        np.testing.assert_array_equal(saved[f"0/{number}/picture"], example.picture)
        for name, values in of_example.maps.items():
            np.testing.assert_array_equal(saved[f"0/{number}/{name.replace(' ', '_')}"], values)
    np.testing.assert_array_equal(saved["0/1/digit"], canvases[1].masks[0])
    np.testing.assert_array_equal(saved["0/1/clutter"], canvases[1].masks[1])
    assert "0/2/digit" not in saved
    assert saved["0/2/head_2"].shape == (2, 3)
    assert saved["0/2/attention_of_tokens"].shape == (2, 3, 5, 2, 3)
    of_tokens = saved["0/2/attention_of_tokens"]
    np.testing.assert_allclose(of_tokens[-1, :, 0].mean(0), maps[2].maps["attention"], atol=1e-6)
    assert saved["0/2/attention_of_patches"].shape == (3, 2, 3, 2, 3)
    np.testing.assert_allclose(saved["0/2/attention_of_patches"].sum((-2, -1)), 1, atol=1e-5)
    assert saved["1/2/attention"].shape == (2, 3)
    assert "1/2/rollout" not in saved


def test_a_query_names_a_block_and_a_patch():
    backbone = small_vit(registers=2, depth=3)
    assert gallery.Query().keywords(backbone, (4, 6), "a.png") == {}
    assert gallery.Query(block=1).keywords(backbone, (4, 6), "a.png") == {"block": 0}
    assert gallery.Query(block=-3).keywords(backbone, (4, 6), "a.png") == {"block": -3}
    keywords = gallery.Query(patch=(2, 5)).keywords(backbone, (4, 6), "a.png")
    assert keywords == {"token": 3 + 6 + 4}
    for block in (0, 4, -4):
        with pytest.raises(ValueError, match=f"--block {block}: use 1 to 3, or -1 to -3"):
            gallery.Query(block=block).keywords(backbone, (4, 6), "a.png")
    for patch in ((5, 1), (1, 7)):
        with pytest.raises(ValueError, match="a.png has 4 rows and 6 columns of patches"):
            gallery.Query(patch=patch).keywords(backbone, (4, 6), "a.png")
