"""Every setting once: what it is, its value in both presets, and what it may be.

The preset `paper` follows sections II.C and III, and DINO where the paper is silent. The preset
`laptop` is the least that still shows the effect from random weights, within minutes on two CPU
cores. Every field of `Config` that has a help text is also a flag of train.py.
"""

import argparse
from dataclasses import MISSING, dataclass, field, fields

import torch

LARGEST = 1e9  # the largest number that any setting may have


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have: from `least`, or above it if `is_open`, to `most`."""

    least: float
    most: float = LARGEST
    is_open: bool = False

    def contains(self, low: float, high: float) -> bool:
        """Whether two numbers are in the range and in order; NaN is in no range."""
        if self.is_open:
            return self.least < low <= high <= self.most
        return self.least <= low <= high <= self.most

    def advice(self) -> str:
        if self.is_open:
            return f"use a finite number above {self.least:g}, at most {self.most:g}"
        if self.most == LARGEST:
            return f"use {self.least:g} or more, at most {self.most:g}"
        return f"use {self.least:g} to {self.most:g}"


def at_least(least: float) -> Range:
    return Range(least)


def between(least: float, most: float) -> Range:
    return Range(least, most)


def above(least: float) -> Range:
    return Range(least, is_open=True)


def setting(
    *,
    paper,
    laptop,
    help: str,
    allowed: list | Range | None = None,
    earlier=MISSING,
    may_change: bool = False,
):
    """A field of `Config` that is a flag of train.py.

    `paper` and `laptop` are its values in the two presets; None stands for a value that
    `fill_in_derived` computes from the other settings. Section numbers in `help` are the paper's.
    `allowed` are the choices, or the range of a number or of both numbers of a pair. `earlier` is
    for a setting that was added later: the value that runs had before. Without it a checkpoint that
    lacks the setting is refused. `may_change` says whether a resumed run may have another value.
    """
    return field(
        metadata={
            "paper": paper,
            "laptop": laptop,
            "help": help,
            "allowed": allowed,
            "earlier": earlier,
            "may_change": may_change,
        }
    )


@dataclass(kw_only=True)
class Config:
    """All settings of a run."""

    # What is compared with what
    loss: str = setting(
        paper="nce",
        laptop="nce",
        help="nce is eq. (3), dino is eqs. (1) and (2), supervised learns from labels (section I)",
        allowed=["nce", "dino", "supervised"],
    )
    views: str = setting(
        paper="same",
        laptop="same",
        help="the two branches see crops of the same canvas, or of two different ones (III.B)",
        allowed=["same", "different"],
    )
    crops: int = setting(
        paper=None,
        laptop=None,
        help="crops for each branch: 4 are two global and two local ones, 2 or 1 are global "
        "(III.C) [same views: 4 in paper, 2 in laptop; different views: 1]",
        allowed=[1, 2, 4],
    )
    symmetric: bool = setting(
        paper=False, laptop=True, help="with different views, show both canvases to both branches"
    )

    # What is shown
    dataset: str = setting(
        paper="clutter",
        laptop="clutter",
        help="clutter: digits among fragments of others; stl10: photographs (II.C)",
        allowed=["clutter", "stl10"],
        earlier="clutter",
    )
    split: str = setting(
        paper="unlabeled",
        laptop="unlabeled",
        help="the part of STL-10 to train on: unlabeled has 100,000 images, train has 5,000",
        allowed=["unlabeled", "train"],
        earlier="unlabeled",
    )
    background: str = setting(
        paper="black",
        laptop="black",
        help="what lies behind the digits: black, texture, or a folder of images (figure 5)",
        earlier="black",
    )
    shortcut: float = setting(
        paper=0.0,
        laptop=0.0,
        help="probability that an image gets a mark, a small square whose grey level is the same on "
        "all of its canvases: views can be matched by it without knowing the digit",
        allowed=between(0, 1),
        earlier=0.0,
    )
    digits: str = setting(
        paper="auto",
        laptop="auto",
        help="mnist (II.C); sklearn: scikit-learn's 1,797 digits; auto: mnist if it can be had",
        allowed=["auto", "mnist", "sklearn"],
    )
    canvas_size: int = setting(
        paper=100,
        laptop=64,
        help="side of a canvas in pixels (II.C)",
        allowed=between(28, 1e4),  # a digit has 28×28 pixels
    )
    num_distractors: int = setting(
        paper=6,
        laptop=3,
        help="number of fragments of other digits on a canvas (II.C)",
        allowed=between(0, 1e6),
    )
    distractor_size: int = setting(
        paper=9,
        laptop=9,
        help="side of such a fragment in pixels (II.C)",
        allowed=between(3, 28),  # it must have room for clutter.MIN_WINDOW_INK pixels
    )

    # How it is cropped
    image_size: int = setting(
        paper=224,
        laptop=56,
        help="side of a crop as it is fed to the network, in pixels (III)",
        allowed=at_least(1),
    )
    global_crops_scale: tuple[float, float] = setting(
        paper=(0.5, 1.0),
        laptop=(0.5, 1.0),
        help="range of the share of the canvas that a global crop covers",
        allowed=between(1e-3, 1),
    )
    local_crops_scale: tuple[float, float] = setting(
        paper=(0.1, 0.4),
        laptop=(0.3, 0.6),
        help="the same for a local crop",
        allowed=between(1e-3, 1),
    )
    rotation: float = setting(
        paper=15.0,
        laptop=15.0,
        help="largest rotation in degrees, either way (III.B)",
        allowed=between(0, 360),
    )
    blur: tuple[float, float] = setting(
        paper=(0.1, 2.0),
        laptop=(0.1, 2.0),
        help="range of the blur's sigma, in pixels of a crop of 224 (III.B)",
        allowed=between(0, 1000),
    )

    # The network
    weights: str = setting(
        paper="dino",
        laptop="none",
        help="what the network starts from: dino is DINO's ViT-S/8 (III), none is random weights; "
        "also dino_vits16, dino_vitb8, dino_vitb16, or a file",
    )
    patch_size: int = setting(
        paper=8, laptop=7, help="side of a patch in pixels (III)", allowed=at_least(1)
    )
    dim: int = setting(paper=384, laptop=96, help="width of the network (III)", allowed=at_least(1))
    depth: int = setting(paper=12, laptop=2, help="number of blocks (III)", allowed=at_least(1))
    heads: int = setting(
        paper=6, laptop=3, help="attention heads in each block (IV)", allowed=at_least(1)
    )
    mlp_ratio: int = setting(
        paper=4,
        laptop=1,
        help="width of the blocks' MLPs divided by dim",
        allowed=at_least(1),
        earlier=4,
    )
    registers: int = setting(
        paper=0,
        laptop=4,
        help="number of learned tokens that stand for no patch (Darcet et al. 2024)",
        allowed=between(0, 1e6),
        earlier=0,
    )
    init_std: float = setting(
        paper=0.02,
        laptop=0.0,
        help="standard deviation of random initial weights; 0 stands for 1/√inputs",
        allowed=between(0, 1),
        earlier=0.02,
    )
    head_hidden_dim: int = setting(
        paper=2048,
        laptop=512,
        help="width of the hidden layers of the projection head",
        allowed=at_least(1),
    )
    head_layers: int = setting(
        paper=3, laptop=2, help="number of layers of the projection head's MLP", allowed=at_least(1)
    )
    bottleneck_dim: int = setting(
        paper=256,
        laptop=128,
        help="width of the projection head's output, which the NCE loss compares",
        allowed=at_least(1),
    )
    head_norm: bool = setting(
        paper=False,
        laptop=True,
        help="put a LayerNorm after each hidden layer of the projection head",
    )
    out_dim: int = setting(
        paper=65_536,
        laptop=1024,
        help="number of prototypes of --loss dino, K of eqs. (1) and (2)",
        allowed=at_least(2),
    )
    centering: str = setting(
        paper="mean",
        laptop="sinkhorn_knopp",
        help="how --loss dino balances the teacher: mean is DINO's, sinkhorn_knopp is DINOv2's",
        allowed=["mean", "sinkhorn_knopp"],
        earlier="mean",
    )

    # The step
    batch_size: int = setting(
        paper=32, laptop=64, help="images in a step (III)", allowed=at_least(1)
    )
    micro_batch: int = setting(
        paper=0,
        laptop=0,
        help="images to compute at a time, with the gradient of the whole batch (IV); 0: all",
        allowed=between(0, 1e6),
        earlier=0,
    )
    checkpoint_blocks: bool = setting(
        paper=False,
        laptop=False,
        help="recompute activations, which takes less memory and a third more time",
        earlier=False,
    )
    compile: bool = setting(
        paper=False,
        laptop=False,
        help="compile the blocks, which takes a minute and a C++ compiler",
        earlier=False,
        may_change=True,
    )
    precision: str = setting(
        paper="auto",
        laptop="auto",
        help="number format of autocast; auto takes the best one that is fast on the device",
        allowed=["auto", "float32", "bfloat16", "float16"],
        earlier="auto",
    )

    # The length of the run, and the optimiser
    epochs: int = setting(
        paper=None,
        laptop=10,
        help="length of the run [paper: 20, 10 with stl10 (figures 2, 3); laptop: 10]",
        allowed=at_least(1),
        may_change=True,
    )
    images_per_epoch: int = setting(
        paper=None,
        laptop=None,
        help="images in an epoch (II.C) [paper: 50,000, 100,000 with stl10; laptop: 6,400, 12,800 "
        "with dino]",
        allowed=at_least(1),
    )
    lr: float = setting(
        paper=None,
        laptop=None,
        help="AdamW's peak learning rate (III) [batch/64 × .0005 in paper, × .001 in laptop; above "
        "a batch of 256 it grows with the square root]",
        allowed=above(0),
    )
    warmup: float = setting(
        paper=0.15,
        laptop=0.15,
        help="share of the run in which the learning rate rises: 3 of 20 epochs (III)",
        allowed=between(1e-3, 1),
    )
    weight_decay: float = setting(
        paper=0.04,
        laptop=0.04,
        help="AdamW's weight decay at the start; norms, biases and what Muon moves have none (III)",
        allowed=between(0, 1),
    )
    weight_decay_end: float = setting(
        paper=0.4, laptop=0.4, help="the same at the end (III)", allowed=between(0, 1)
    )
    clip_grad: float = setting(
        paper=3.0, laptop=3.0, help="largest norm of the gradient", allowed=above(0)
    )
    optimizer: str = setting(
        paper="adamw",
        laptop="muon",
        help="adamw for all parameters (III), or muon for the matrices of the blocks and the head",
        allowed=["adamw", "muon"],
        earlier="adamw",
    )
    temperature: float = setting(
        paper=0.1, laptop=0.1, help="τ of eq. (3), and τ_s of eq. (1) (III)", allowed=above(0)
    )
    teacher_temp: float = setting(paper=0.04, laptop=0.01, help="τ_t of eq. (1)", allowed=above(0))
    momentum_teacher: float = setting(
        paper=0.996,
        laptop=0.9,
        help="momentum of the moving average at the start; it rises to 1",
        allowed=between(0, 1),
    )

    # What is kept, and where things are
    keep_epochs: list[int] = setting(
        paper=[],
        laptop=[],
        help="keep the teacher after these epochs too, such as 1,5,10",
        earlier=[],
    )
    checkpoint_minutes: float = setting(
        paper=10.0,
        laptop=10.0,
        help="write the checkpoint this often, besides after every epoch",
        allowed=above(0),
        earlier=10.0,
        may_change=True,
    )
    seed: int = setting(paper=0, laptop=0, help="decides the initial weights and every image")
    device: str = setting(
        paper=None,
        laptop=None,
        help="where to train [cuda if there is one, else mps, else cpu]",
        may_change=True,
        earlier="cpu",
    )
    data_root: str = setting(
        paper="data",
        laptop="data",
        help="folder that holds, or will hold, MNIST/raw/ or stl10_binary/",
        may_change=True,
        earlier="data",
    )

    # These have no flag.
    preset: str
    # These four are of vit.ViTShape.
    pos_size: int | tuple[int, int]
    antialias: bool
    norm_eps: float
    rotary: bool
    fallbacks: list[str]  # what had to be replaced by something else, a line each


FLAGS = [entry for entry in fields(Config) if entry.metadata]
# What a resumed run may change. More epochs stretch the schedules of what is still to come; the
# others do not change what is computed.
MAY_CHANGE = [entry.name for entry in FLAGS if entry.metadata["may_change"]]
# What checkpoints of earlier versions did not record, and what it was then.
EARLIER = {entry.name: entry.metadata["earlier"] for entry in FLAGS}
EARLIER = {name: value for name, value in EARLIER.items() if value is not MISSING}
EARLIER |= {"preset": "laptop", "antialias": False, "fallbacks": []}
EARLIER |= {"norm_eps": 1e-6, "rotary": False}


def flag(name: str) -> str:
    """The flag of a setting: --batch-size for "batch_size"."""
    return "--" + name.replace("_", "-")


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


# --------------------------------------------------------------------------------- the command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line of train.py.

    The result has `preset`, `resume` and `output`, None where they were not given, and `flags`:
    {name: value} of the settings that were given.
    """
    parser = argparse.ArgumentParser(
        "train.py",
        usage="train.py [FLAGS]; --help lists them",
        description="Train a ViT on cluttered digits without labels. Numbers in parentheses are "
        "the paper's sections, square brackets hold the defaults.",
        argument_default=argparse.SUPPRESS,
    )
    for entry in FLAGS:
        add_flag(parser, entry)
    parser.add_argument(
        "--preset", choices=["paper", "laptop"], help="[paper with CUDA, else laptop]"
    )
    parser.add_argument(
        "--resume", metavar="RUN", help="go on with a stopped run: its folder or its checkpoint"
    )
    parser.add_argument("--output", help="new folder for the run [runs/<dataset>-<loss>-<views>]")
    defaults = argparse.Namespace(preset=None, resume=None, output=None)
    args = parser.parse_args(argv, defaults)
    if [] in vars(args).values():  # some versions of Python make this of --flag=--
        parser.error("-- is not a value of a flag")
    args.flags = {entry.name: getattr(args, entry.name) for entry in FLAGS if entry.name in args}
    for entry in FLAGS:
        if entry.name in args.flags and entry.type == tuple[float, float]:
            args.flags[entry.name] = tuple(args.flags[entry.name])  # argparse makes it a list
    return args


def add_flag(parser: argparse.ArgumentParser, entry):
    """Add the flag of one setting; `entry` is its dataclasses.Field."""
    default = describe_default(entry)
    help_text = f"{entry.metadata['help']}{default}".replace("%", "%%")
    if entry.type is bool:
        parser.add_argument(flag(entry.name), action=argparse.BooleanOptionalAction, help=help_text)
    elif entry.type == tuple[float, float]:
        parser.add_argument(
            flag(entry.name), type=float, nargs=2, metavar=("LOW", "HIGH"), help=help_text
        )
    elif entry.type == list[int]:
        parser.add_argument(
            flag(entry.name), type=numbers_with_commas, metavar="N,N", help=help_text
        )
    else:
        allowed = entry.metadata["allowed"]
        choices = allowed if isinstance(allowed, list) else None
        parser.add_argument(flag(entry.name), type=entry.type, choices=choices, help=help_text)


def describe_default(entry) -> str:
    """The default of a setting in brackets; nothing if its help text already says it."""
    paper = entry.metadata["paper"]
    laptop = entry.metadata["laptop"]
    if paper is None or laptop is None or paper == []:
        return ""
    if paper == laptop:
        return f" [{paper}]"
    return f" [paper: {paper}, laptop: {laptop}]"


def numbers_with_commas(text: str) -> list[int]:
    """[1, 5, 10] for "10,1,5"; argparse prints the error for anything else."""
    try:
        return sorted(int(number) for number in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: use whole numbers, such as 1,5,10") from error


# ----------------------------------------------------------------------------- making and checking


def make_config(
    flags: dict | None = None, preset: str | None = None, weights_shape: dict | None = None
) -> Config:
    """The settings of a run, not checked yet.

    `flags` {name: value}, which the user gave, override `weights_shape`, what the given weights
    need, which overrides the preset. If no preset is given, it is `paper` where there is CUDA, else
    `laptop`.
    """
    if preset is None:
        preset = "paper" if torch.cuda.is_available() else "laptop"
    values = {entry.name: entry.metadata[preset] for entry in FLAGS}
    values |= {"pos_size": None, "antialias": False, "norm_eps": 1e-6, "rotary": False}
    values |= weights_shape or {}
    values |= flags or {}
    config = Config(**values, preset=preset, fallbacks=[])
    fill_in_derived(config)
    return config


def fill_in_derived(config: Config):
    """Fill in the settings that are None, which follow from the others."""
    is_laptop = config.preset == "laptop"
    if config.crops is None:
        if config.views == "different":
            config.crops = 1
        else:
            config.crops = 2 if is_laptop else 4

    if config.epochs is None:
        config.epochs = 10 if config.dataset == "stl10" else 20

    if config.images_per_epoch is None:
        if is_laptop:
            config.images_per_epoch = 12_800 if config.loss == "dino" else 6400
        else:
            config.images_per_epoch = 100_000 if config.dataset == "stl10" else 50_000

    if config.lr is None:
        # proportional to the batch up to 256, then to its square root
        for_batch_64 = 0.001 if is_laptop else 0.0005
        beyond_256 = max(1, config.batch_size / 256)
        config.lr = for_batch_64 * min(config.batch_size, 256) / 64 * beyond_256**0.5

    if config.device is None:
        config.device = default_device()

    if config.pos_size is None:
        # ViT-S/8 stores its positions on the grid of 224 px, as DINO's weights do.
        fits_224 = config.patch_size > 0 and 224 % config.patch_size == 0
        config.pos_size = 224 if fits_224 and not is_laptop else config.image_size


def check_config(config: Config, weights_shape: dict, ranks: int = 1):
    """Raise ValueError, with one line, for settings that cannot work, or not with these weights."""
    for entry in FLAGS:
        check_range(entry, getattr(config, entry.name))
    check_batch(config, ranks)
    check_images(config)

    # Given weights decide all shapes. Only the number of heads may be chosen, since it merely says
    # how q, k and v are cut; rotary positions belong to heads of one width.
    for name, value in weights_shape.items():
        is_free = name == "heads" and not config.rotary
        if not is_free and getattr(config, name) != value:
            raise ValueError(
                f"{flag(name)} {getattr(config, name)}: use {value}, the value in the checkpoint"
            )


def check_range(entry, value):
    """Raise ValueError if a number, or a number of a pair, is out of the setting's range."""
    allowed = entry.metadata["allowed"]
    if not isinstance(allowed, Range):
        return
    low, high = value if isinstance(value, tuple) else (value, value)
    text = f"{low:g} {high:g}" if isinstance(value, tuple) else value
    if low > high:
        raise ValueError(f"{flag(entry.name)} {text}: the first number must not exceed the second")
    if not allowed.contains(low, high):
        raise ValueError(f"{flag(entry.name)} {text}: {allowed.advice()}")


def check_batch(config: Config, ranks: int):
    """Raise ValueError for a batch that cannot be divided, filled, or learned from."""
    batch_size = config.batch_size
    if batch_size % ranks:
        raise ValueError(
            f"--batch-size {batch_size}: use a multiple of {ranks}, the number of ranks"
        )
    if batch_size > config.images_per_epoch:
        raise ValueError(
            f"--batch-size {batch_size}: use no more than the epoch's {config.images_per_epoch} "
            f"images"
        )
    if config.loss == "nce" and batch_size == 1:
        raise ValueError("--batch-size 1: use 2 or more, since NCE needs negatives")
    images_per_rank = batch_size // ranks
    if config.micro_batch and images_per_rank % config.micro_batch:
        raise ValueError(
            f"--micro-batch {config.micro_batch}: use a divisor of {images_per_rank}, or 0"
        )
    if any(not 0 <= epoch <= config.epochs for epoch in config.keep_epochs):
        numbers = ",".join(map(str, config.keep_epochs))
        raise ValueError(f"--keep-epochs {numbers}: use epochs from 0 to {config.epochs}")


def check_images(config: Config):
    """Raise ValueError for images that the network cannot take, or that cannot be made."""
    if config.image_size % config.patch_size:
        patches = max(1, round(config.image_size / config.patch_size))
        raise ValueError(
            f"--image-size {config.image_size}: use a multiple of the patch size "
            f"{config.patch_size}, such as {patches * config.patch_size}"
        )
    if config.dataset == "stl10":
        if config.loss == "supervised" and config.split == "unlabeled":
            raise ValueError("--split unlabeled: use train, since --loss supervised needs labels")
        if config.views == "different":
            raise ValueError("--views different: use same, since a photo has no second canvas")
        if config.background != "black":
            raise ValueError(f"--background {config.background}: use it with --dataset clutter")
        if config.shortcut:
            raise ValueError(f"--shortcut {config.shortcut}: use it with --dataset clutter")


# ------------------------------------------------------------------------------------- checkpoints


def config_from_checkpoint(saved: dict) -> Config:
    """The settings that a checkpoint of train.py holds; keys that are unknown here are ignored.

    Raises ValueError if settings are missing, or are not of their kind.
    """
    values = {}
    missing = []
    for entry in fields(Config):
        if entry.name in saved:
            values[entry.name] = saved[entry.name]
        elif entry.name in EARLIER:
            values[entry.name] = EARLIER[entry.name]
        else:
            missing.append(entry.name)
    if missing:
        raise ValueError(f"it lacks these settings: {', '.join(missing)}; use another copy of it")
    if values["init_std"] is None:  # what earlier versions wrote for 1/√inputs
        values["init_std"] = 0.0
    for entry in fields(Config):
        allowed = entry.metadata.get("allowed")
        value = values[entry.name]
        is_choice = not isinstance(allowed, list) or value in allowed
        if not is_choice or not is_of_type(value, entry.type):
            text = repr(value)[:50]
            raise ValueError(f"its setting {entry.name} cannot be {text}; use another copy of it")
        if entry.type == tuple[float, float]:
            values[entry.name] = tuple(value)
    if saved.get("texture_pool"):
        line = f"its run had {saved['texture_pool']} textures in all; now every canvas has its own"
        values["fallbacks"] = [*values["fallbacks"], line]
    return Config(**values)


def is_of_type(value, kind) -> bool:
    """Whether a value is of the type of a field of Config; whole numbers are floats too."""
    is_sequence = isinstance(value, (list, tuple))
    if kind is float:
        return isinstance(value, (int, float))
    if kind == tuple[float, float]:
        return is_sequence and len(value) == 2 and all(is_of_type(side, float) for side in value)
    if kind == int | tuple[int, int]:
        return isinstance(value, int) or (is_sequence and all(isinstance(n, int) for n in value))
    if kind == list[int]:
        return is_sequence and all(isinstance(item, int) for item in value)
    if kind == list[str]:
        return is_sequence and all(isinstance(item, str) for item in value)
    return isinstance(value, kind)
