"""Settings: presets, flags, settings that follow from others, and settings that are refused."""

import contextlib
import io
import os
import shutil
from dataclasses import asdict

import hypothesis
import pytest
import torch
import torchvision
from helpers import TINY, closed_url, config_of, read, start
from hypothesis import strategies
from PIL import Image

import settings
import train
import vit
import weights
from settings import FLAGS, flag

# The paper's values (sections II.C, III and IV), and those of the laptop preset.
PAPER = {
    "preset": "paper",
    "image_size": 224,
    "patch_size": 8,
    "dim": 384,
    "depth": 12,
    "heads": 6,
    "weights": "dino",
    "canvas_size": 100,
    "num_distractors": 6,
    "batch_size": 32,
    "epochs": 20,
    "crops": 4,
    "images_per_epoch": 50_000,
    "momentum_teacher": 0.996,
}
LAPTOP = {
    "preset": "laptop",
    "image_size": 56,
    "patch_size": 7,
    "dim": 96,
    "depth": 2,
    "heads": 3,
    "weights": "none",
    "canvas_size": 64,
    "num_distractors": 3,
    "batch_size": 64,
    "epochs": 10,
    "crops": 2,
    "images_per_epoch": 6400,
    "momentum_teacher": 0.9,
    "lr": 0.001,
}
BOTH_PRESETS = {
    "loss": "nce",
    "views": "same",
    "dataset": "clutter",
    "rotation": 15,
    "warmup": 0.15,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "temperature": 0.1,
    "distractor_size": 9,
    "fallbacks": [],
}
# The shape of the weights in other.pth.
OTHER_SHAPE = vit.ViTShape(patch_size=7, dim=24, depth=1, heads=3, pos_size=56)


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Every download is refused."""
    url = closed_url()
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url])
    monkeypatch.setattr(torchvision.datasets.STL10, "url", f"{url}stl10")
    monkeypatch.setattr(weights, "DINO_URL", f"{url}{{0}}/{{0}}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))


# ------------------------------------------------------------------------------ presets and flags


@pytest.mark.parametrize("values", [PAPER, LAPTOP], ids=["paper", "laptop"])
def test_presets(values):
    config = config_of(f"--preset {values['preset']}")
    for name, value in (BOTH_PRESETS | values).items():
        assert getattr(config, name) == value, name
    assert config.device == settings.default_device()


@pytest.mark.parametrize("has_cuda, preset", [(True, "paper"), (False, "laptop")])
def test_the_preset_is_paper_where_there_is_cuda(monkeypatch, has_cuda, preset):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    assert config_of("--weights none").preset == preset


@pytest.mark.parametrize(
    "has_cuda, has_mps, device",
    [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_a_gpu_is_used_where_there_is_one(monkeypatch, has_cuda, has_mps, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    assert config_of("").device == device
    assert config_of("--device meta").device == "meta"


@pytest.mark.parametrize(
    "flags, values",
    [
        ("paper --image-size 112", {"lr": 0.00025, "pos_size": 224}),
        ("paper --views different --batch-size 64", {"crops": 1, "lr": 0.0005}),
        # above a batch of 256 the learning rate grows with its square root
        ("paper --batch-size 1024", {"lr": 0.004}),
        ("paper --dataset stl10", {"epochs": 10, "images_per_epoch": 100_000}),
        ("paper --loss dino", {"temperature": 0.1, "momentum_teacher": 0.996}),
        ("paper --image-size 99 --patch-size 9", {"pos_size": 99}),
        ("laptop --image-size 84 --batch-size 128", {"pos_size": 84, "dim": 96, "lr": 0.002}),
        ("laptop --views different --lr 0.5", {"crops": 1, "lr": 0.5}),
        ("laptop --views different --crops 2", {"crops": 2}),
        ("laptop --dataset stl10", {"epochs": 10, "images_per_epoch": 6400}),
        ("laptop --loss dino", {"temperature": 0.1, "images_per_epoch": 12_800}),
        ("laptop --loss dino --temperature 0.3", {"temperature": 0.3}),
    ],
)
def test_settings_that_follow_from_others(flags, values):
    config = config_of(f"--preset {flags}")
    assert {name: getattr(config, name) for name in values} == pytest.approx(values)


def test_flags_come_before_the_weights_shape_and_this_before_the_preset():
    weights_shape = {"dim": 48, "heads": 2, "patch_size": 16}
    config = settings.make_config({"heads": 4}, "laptop", weights_shape)
    assert (config.dim, config.patch_size) == (48, 16)
    assert config.heads == 4
    assert config.depth == 2


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        settings.parse_args(["--help"])
    assert stop.value.code == 0
    text = without_blanks(capsys.readouterr().out)
    for entry in FLAGS:
        assert flag(entry.name) in text
        assert without_blanks(entry.metadata["help"]) in text, entry.name


def without_blanks(text: str) -> str:
    """The text without its line breaks, which argparse chooses."""
    return "".join(text.split())


def test_only_these_settings_have_no_flag():
    all_settings = asdict(config_of("--preset laptop")).keys()
    with_flag = {entry.name for entry in FLAGS}
    of_weights = {"pos_size", "antialias", "norm_eps", "rotary"}
    assert all_settings - with_flag == {"preset", "fallbacks"} | of_weights


@pytest.mark.parametrize("entry", FLAGS, ids=lambda entry: entry.name)
def test_every_flag_sets_its_setting(entry):
    """Each preset is given the value of the other one; without the flag it has its own."""
    configs = {preset: config_of(f"--preset {preset}") for preset in ("paper", "laptop")}
    for preset, config in configs.items():
        default = entry.metadata[preset]
        if default is not None:
            assert getattr(config, entry.name) == default

    for preset, other_preset in (("paper", "laptop"), ("laptop", "paper")):
        value = getattr(configs[other_preset], entry.name)
        words = words_of(entry.name, value)
        if value == []:  # no flag says this
            value = [2, 3]
            words = [flag(entry.name), "3,2"]
        args = settings.parse_args(["--preset", preset, *words])
        assert args.flags == {entry.name: value}
        config = settings.make_config(args.flags, args.preset)
        assert getattr(config, entry.name) == value
        assert type(getattr(config, entry.name)) is type(value)


def words_of(name: str, value) -> list[str]:
    """The words of a command line that give a setting this value."""
    if isinstance(value, bool):
        return [flag(name) if value else flag(name).replace("--", "--no-")]
    if isinstance(value, tuple):
        return [flag(name), *(str(number) for number in value)]
    return [flag(name), str(value)]


def test_what_is_no_setting_is_kept_apart():
    args = settings.parse_args(["--output", "new", "--resume", "run", "--epochs", "3"])
    assert (args.output, args.resume, args.preset) == ("new", "run", None)
    assert args.flags == {"epochs": 3}


@pytest.mark.parametrize(
    "flags", ["--keep-epochs 1,x", "--seed=--", "--blur 1", "--crops 3", "--seed seven", "--rank 1"]
)
def test_a_word_that_is_no_value_of_its_flag_is_refused_with_the_usage(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        settings.parse_args(flags.split())
    assert stop.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == "usage: train.py [FLAGS]; --help lists them"
    assert error.startswith("train.py: error: ")


# ----------------------------------------------------------------------------------- bad settings


def refusal(argv: list[str], capsys) -> str:
    """The line that train.py prints for a command line that it must refuse."""
    capsys.readouterr()
    assert train.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    error = printed.err.rstrip("\n")
    assert error.isprintable()
    assert len(error) < 500
    assert error.startswith("train.py: error: ")
    return error.removeprefix("train.py: error: ")


BAD_SETTINGS = [
    # numbers out of their range
    ("--image-size 0", "--image-size 0: use 1 or more"),
    ("--patch-size 0", "--patch-size 0: use 1 or more"),
    ("--preset paper --weights none --patch-size 0", "--patch-size 0: use 1 or more"),
    ("--dim 0", "--dim 0: use 1 or more"),
    ("--depth 0", "--depth 0: use 1 or more"),
    ("--head-hidden-dim 0", "--head-hidden-dim 0: use 1 or more"),
    ("--bottleneck-dim -1", "--bottleneck-dim -1: use 1 or more"),
    ("--canvas-size 27", "--canvas-size 27: use 28 to"),
    ("--loss dino --out-dim 0", "--out-dim 0: use 2 or more"),
    ("--loss dino --warmup 0", "--warmup 0.0: use 0.001 to 1"),
    ("--num-distractors -1", "--num-distractors -1: use 0 to"),
    ("--distractor-size 0", "--distractor-size 0: use 3 to 28"),
    ("--distractor-size 29", "--distractor-size 29: use 3 to 28"),
    ("--epochs 0", "--epochs 0: use 1 or more"),
    ("--micro-batch -1", "--micro-batch -1: use 0 to"),
    ("--lr nan", "--lr nan: use a finite number above 0"),
    ("--lr 0", "--lr 0.0: use a finite number above 0"),
    ("--checkpoint-minutes inf", "--checkpoint-minutes inf: use a finite number above 0"),
    ("--blur 0 inf", "--blur 0 inf: use 0 to"),
    ("--blur 2 1", "--blur 2 1: the first number must not exceed the second"),
    ("--global-crops-scale nan 1", "--global-crops-scale nan 1: use 0.001 to 1"),
    # settings that do not fit each other
    ("--image-size 50", "--image-size 50: use a multiple of the patch size 7, such as 49"),
    ("--heads 7", "--heads 7: use a divisor of the width 24"),
    ("--batch-size 1", "--batch-size 1: use 2 or more, since NCE needs negatives"),
    (
        "--images-per-epoch 32 --batch-size 64",
        "--batch-size 64: use no more than the epoch's 32 images",
    ),
    (
        "--images-per-epoch 2000 --batch-size 1298",
        "--batch-size 1298: use no more than the 1,297 images of the data set",
    ),
    ("--micro-batch 5", "--micro-batch 5: use a divisor of 8, or 0"),
    ("--keep-epochs 1,99", "--keep-epochs 1,99: use"),
    ("--dataset stl10 --views different", "--views different: use same"),
    ("--dataset stl10 --loss supervised", "--split unlabeled: use train"),
    (
        "--dataset stl10 --background texture",
        "--background texture: use it with --dataset clutter",
    ),
    (
        "--dataset stl10 --shortcut 0.5",
        "--shortcut 0.5: use it with --dataset clutter",
    ),
    # settings that do not fit the weights in other.pth
    ("--weights other.pth --patch-size 14", "--patch-size 14: use 7, the value in the checkpoint"),
    ("--weights other.pth --depth 3", "--depth 3: use 1, the value in the checkpoint"),
    ("--weights other.pth --dim 128", "--dim 128: use 24, the value in the checkpoint"),
    ("--weights other.pth --dim 24 --heads 7", "--heads 7: use a divisor of the width 24"),
    (
        "--weights other.pth --image-size 48",
        "--image-size 48: use a multiple of the patch size 7, such as 49",
    ),
    # files, folders and devices that are not there
    ("--weights missing.pth", "missing.pth: no such file"),
    ("--weights in-memory.pth", "in-memory.pth: no such file"),
    ("--weights text.pth", "text.pth is no PyTorch checkpoint"),
    ("--weights dino", "--weights dino: download from http"),
    ("--digits mnist --data-root nowhere", "nowhere/MNIST/raw is missing or damaged (download fa"),
    ("--dataset stl10 --data-root nowhere", "nowhere/stl10_binary is missing or damaged"),
    ("--dataset stl10 --data-root damaged", "damaged/stl10_binary is missing or damaged"),
    ("--background nowhere", "--background nowhere: no images there"),
    ("--background a\rb", "--background a b: no images there"),
    ("--background pictures", "pictures/a.png cannot be read as a picture"),
    ("--device cuda:77", "--device cuda:77 cannot be used"),
    pytest.param(
        "--device mps",
        "--device mps cannot be used",
        marks=pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is one here"),
    ),
]


@pytest.mark.parametrize("flags, message", BAD_SETTINGS)
def test_bad_settings_are_refused_in_one_line(tmp_path, monkeypatch, capsys, flags, message):
    """And before anything is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("hello")
    torch.save(vit.VisionTransformer(OTHER_SHAPE).state_dict(), tmp_path / "other.pth")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_text("no picture")
    (tmp_path / "damaged" / "stl10_binary").mkdir(parents=True)
    for name in ("unlabeled", "train", "test"):
        (tmp_path / "damaged" / "stl10_binary" / f"{name}_X.bin").write_text("no")
    before = files_below(tmp_path)
    assert refusal([*TINY.split(), *flags.split(" ")], capsys).startswith(message)
    assert files_below(tmp_path) == before
    assert not (tmp_path / "runs").exists()


def files_below(folder) -> list:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--batch-size 9", "--batch-size 9: use a multiple of 2, the number of ranks"),
        ("--batch-size 8 --micro-batch 8", "--micro-batch 8: use a divisor of 4, or 0"),
    ],
)
def test_a_batch_that_two_ranks_cannot_share(flags, message):
    config = config_of(f"--preset laptop {flags}")
    with pytest.raises(ValueError, match=message):
        settings.check_config(config, {}, ranks=2)


def test_what_may_be_chosen_beside_given_weights():
    """The heads, because they merely say how q, k and v are cut; and what shapes do not depend on."""
    config = settings.make_config({"heads": 4, "lr": 0.5}, "laptop", {"dim": 96, "heads": 3})
    settings.check_config(config, {"dim": 96, "heads": 3})


# -------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_gives_its_settings_back():
    config = config_of("--preset laptop --keep-epochs 1,5 --blur 0.5 1")
    saved = asdict(config) | {"a_later_setting": 3}
    assert settings.config_from_checkpoint(saved) == config


def test_settings_that_an_earlier_version_did_not_record():
    saved = asdict(config_of("--preset paper"))
    for name in settings.EARLIER:
        del saved[name]
    config = settings.config_from_checkpoint(saved)
    assert (config.mlp_ratio, config.registers, config.init_std) == (4, 0, 0.02)
    assert (config.centering, config.optimizer) == ("mean", "adamw")
    assert (config.background, config.micro_batch) == ("black", 0)


@pytest.mark.parametrize("earlier", [0, None])
def test_a_texture_pool_that_was_not_used_does_not_matter(earlier):
    saved = asdict(config_of("--preset laptop")) | {"texture_pool": earlier}
    assert settings.config_from_checkpoint(saved) == config_of("--preset laptop")


def test_a_texture_pool_that_was_used_is_recorded_as_replaced():
    saved = asdict(config_of("--preset laptop")) | {"texture_pool": 3}
    (line,) = settings.config_from_checkpoint(saved).fallbacks
    assert line.startswith("its run had 3 textures in all")


def test_initial_weights_of_an_earlier_version():
    """It wrote None for 1/√inputs."""
    saved = asdict(config_of("--preset laptop")) | {"init_std": None}
    settings.check_config(settings.config_from_checkpoint(saved), weights_shape={})


def test_settings_of_a_checkpoint_that_cannot_be_used():
    saved = asdict(config_of("--preset laptop"))
    del saved["lr"], saved["crops"]
    with pytest.raises(ValueError, match="it lacks these settings: crops, lr"):
        settings.config_from_checkpoint(saved)


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", "0.1"),
        ("lr", None),
        ("dim", 24.0),
        ("head_norm", "yes"),
        ("blur", 2.0),
        ("blur", (0.1, "2")),
        ("keep_epochs", "1,2"),
        ("keep_epochs", [1.5]),
        ("pos_size", "56"),
        ("fallbacks", [1]),
        ("digits", "emnist"),
        ("crops", 3),
        ("crops", [2]),
    ],
)
def test_a_setting_of_a_checkpoint_that_is_not_of_its_kind(name, value):
    saved = asdict(config_of("--preset laptop")) | {name: value}
    with pytest.raises(ValueError, match=f"its setting {name} cannot be .*; use another copy"):
        settings.config_from_checkpoint(saved)


def test_numbers_of_a_checkpoint_may_be_whole_and_pairs_may_be_lists():
    saved = asdict(config_of("--preset laptop")) | {"lr": 1, "blur": [0, 2], "pos_size": (4, 8)}
    config = settings.config_from_checkpoint(saved)
    assert (config.lr, config.blur, config.pos_size) == (1, (0, 2), (4, 8))


# -------------------------------------------------------------------------------- any command line

# Words that are hardly ever a good value, for any flag.
STRANGE_WORDS = [
    "-",
    "--",
    "nan",
    "inf",
    "1e400",
    "1,5",
    ",",
    "none",
    "ünï✓",
    "'",
    "%s",
    "{}",
    "nowhere",
    "text.pth",
    "empty.pth",
    "folder",
    "/proc/self/mem",
    "/dev/null",
    "good.pth",
    "picture.png",
    "",
    " ",
    "\udcff",
    "a\nb",
    "x" * 300,
]
# A flag, and values that it is given: good ones and bad ones.
TRAIN_FLAGS = [
    "--loss nce dino",
    "--views same different",
    "--crops 1 2 4 3",
    "--symmetric",
    "--no-head-norm",
    "--dataset clutter stl10",
    "--split train unlabeled",
    "--background black texture folder text.pth",
    "--digits auto mnist sklearn",
    "--weights none good.pth text.pth dino",
    "--canvas-size 28 40 27 -1",
    "--num-distractors 0 2 -1",
    "--distractor-size 5 28 0 29 -3",
    "--image-size 7 14 28 63 1 50 0 -7",
    "--patch-size 7 14 28 5 0 -7",
    "--dim 24 12 0 -3 7",
    "--depth 1 2 0 -1",
    "--heads 1 2 24 0 -3 5",
    "--mlp-ratio 1 2 0 -1",
    "--registers 0 2 -1",
    "--init-std 0 0.02 -1 nan",
    "--out-dim 1 64 0 -1",
    "--centering mean sinkhorn_knopp",
    "--optimizer adamw muon",
    "--head-hidden-dim 8 0 -1",
    "--head-layers 1 3 0 -1",
    "--bottleneck-dim 1 8 0 -1",
    "--global-crops-scale 0.5:1 0:0 1:0.5 -1:1 nan:1 2:3",
    "--local-crops-scale 0.1:0.2 0:0 -1:-1",
    "--rotation 0 15 -5 nan inf",
    "--blur 0:0 0.1:2 2:1 -1:-1 nan:nan 0:inf",
    "--clip-grad 0 1 -1 nan",
    "--batch-size 2 4 16 1 0 -8 17 3",
    "--micro-batch 1 2 3 8 0 -1",
    "--checkpoint-blocks",
    "--precision auto float32 bfloat16 float16 int8",
    "--epochs 1 2 0 -1 1.5",
    "--warmup 0 0.5 1 2 -1 nan",
    "--images-per-epoch 16 17 7 0 -1",
    "--lr 0.1 1e-300 1e30 0 -1 nan inf",
    "--weight-decay 0 -1 nan",
    "--weight-decay-end 0 1e300",
    "--temperature 0.2 1e-30 1e30 0 -1 nan inf",
    "--momentum-teacher 0 1 5 -1",
    "--teacher-temp 0.1 0 -1 nan",
    "--keep-epochs 0 1 0,1 2 1, -1 ,",
    "--seed 1 0 -1 1.5 seven ٣ 1_0 2147483648 9223372036854775808",
    "--device cpu cpu:0 cuda:77 meta tpu",
    "--checkpoint-minutes 1e-9 1e30 0 -1 nan inf",
    "--data-root folder nowhere letters",
    "--preset laptop desktop",
    "--resume good.pth finished nowhere folder text.pth strange used",
    "--output new folder finished text.pth used",
]


def command_lines(flags: list[str]):
    """A strategy of up to four flags, each with one of its values or, now and then, any word."""
    # no digits, so that no number makes a run that takes hours
    any_text = strategies.text(strategies.characters(exclude_categories=["Nd"]), max_size=5)
    any_word = strategies.sampled_from(STRANGE_WORDS) | any_text

    def words_of_flag(line):
        name, *values = line.split(" ")
        if not values:
            return strategies.just([name])
        if ":" in values[0]:
            pairs = strategies.sampled_from(values)
            return pairs.map(lambda pair: [name, *pair.split(":")])
        good_or_bad = strategies.sampled_from(values)
        value = strategies.one_of(*[good_or_bad] * 5, any_word)
        # a value that begins with - would be taken for a flag
        return value.map(lambda v: [f"{name}={v}"] if v.startswith("-") else [name, v])

    some_flags = strategies.lists(strategies.sampled_from(flags).flatmap(words_of_flag), max_size=4)
    return some_flags.map(lambda lists: [word for words in lists for word in words])


def make_files(folder):
    """Fill a folder with files of all kinds, which command lines may name."""
    assert start(folder / "finished", "--epochs 1") == 0
    shutil.copy(folder / "finished" / "ckpt.pth", folder / "good.pth")
    (folder / "text.pth").write_text("hello")
    (folder / "empty.pth").write_text("")
    (folder / "folder").mkdir()
    (folder / "used").mkdir()
    (folder / "used" / "epoch-1.pth").write_text("of an earlier run")
    checkpoint = read(folder / "finished")
    checkpoint["config"]["lr"] = "high"
    (folder / "strange").mkdir()
    torch.save(checkpoint, folder / "strange" / "ckpt.pth")
    raw = folder / "letters" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train", "t10k"):  # 26 labels of 26 white images
        sizes = bytes([0, 0, 0, 26, 0, 0, 0, 28, 0, 0, 0, 28])
        images = bytes([0, 0, 8, 3]) + sizes + bytes([255]) * 26 * 28 * 28
        (raw / f"{name}-images-idx3-ubyte").write_bytes(images)
        labels = bytes([0, 0, 8, 1]) + sizes[:4] + bytes(range(26))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(labels)
    Image.new("RGB", (60, 40), "red").save(folder / "picture.png")


def run_main(argv: list[str]) -> tuple[int, str]:
    """The exit status of train.py, and what it printed to standard error."""
    output = io.TextIOWrapper(io.BytesIO(), "utf-8")  # strict, as that of a terminal is
    error = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        try:
            status = train.main(argv)
        except SystemExit as stop:  # raised by argparse
            assert "usage:" in error.getvalue()
            return stop.code, "train.py: error: of argparse"
    return status, error.getvalue()


@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("count", [20, pytest.param(700, marks=pytest.mark.long)])
def test_any_command_line(tmp_path, monkeypatch, count):
    """Status 0; or status 2 and, after warnings and the lines of epochs, one line of error."""
    originals = tmp_path / "originals"
    originals.mkdir()
    make_files(originals)
    copy = tmp_path / "copy"
    statuses = []

    @hypothesis.settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),  # of speed: a run takes its time
    )
    @hypothesis.given(command_lines(TRAIN_FLAGS))
    def check(flags):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(originals, copy)
        os.chdir(copy)
        status, error = run_main([*TINY.split(), "--epochs", "1", *flags])
        statuses.append(status)
        assert status in (0, 2)
        if status == 2:
            *earlier_lines, last_line = error.splitlines()
            assert last_line.startswith("train.py: error: "), error
            for line in earlier_lines:
                assert line.startswith(("warning: ", "epoch ")), error

    monkeypatch.chdir(tmp_path)  # and back at the end
    check()
    assert statuses.count(0) > count // 20
    assert statuses.count(2) > count // 20
