"""What is looked at: networks, the pictures they are shown, and the maps they make of these.

A network comes from a run of train.py, or from any file that weights.py can read. It is shown test
images of its data set, or picture files. visualize.py draws the maps and prints what was measured.
"""

import argparse
import glob
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import data
import effects
import evaluate
import explain
import metrics
import settings
import views
import vit
import weights
from observe import TokenEffects, measure_tokens, row_of
from settings import Config
from vit import VisionTransformer

# Settings that say which images a network is shown. Weights that do not come from train.py take
# them from the run beside them, or else are shown the paper's canvases.
DATA_SETTINGS = ("dataset", "split", "background", "digits", "data_root", "image_size")
DATA_SETTINGS += ("canvas_size", "num_distractors", "distractor_size")
# Flags of the command line that override the settings of a checkpoint.
OVERRIDES = ("image_size", "digits", "background", "data_root")


# ---------------------------------------------------------------------------------------- networks


@dataclass
class Model:
    """A network to look at, and the settings under which it is looked at."""

    name: str  # what it is called in figures and tables: its file, or the flag that named it
    path: str  # of its file, or "none"
    config: Config
    backbone: VisionTransformer
    epoch: int | None = None  # None: not from a run of train.py
    history: list | None = None  # the lines of its log.jsonl
    splits: dict | None = None  # the digits or photographs that it is shown
    is_measured: bool = False  # runs of train.py are measured, and what --weights names
    is_others: bool = False  # weights of another program, which flags may say how to read

    def describe(self) -> str:
        return evaluate.describe(self.config, self.epoch, is_run=self.history is not None)


def open_models(args: argparse.Namespace) -> list[Model]:
    """The networks of the command line, on the CPU; ValueError if there is none."""
    models = [open_model(path, args) for path in args.checkpoints]
    if args.weights is not None:
        trained = [model for model in models if model.history is not None]
        model = open_model(args.weights, args, trained[0] if trained else None)
        model.name = f"--weights {args.weights}"
        model.is_measured = True
        models.append(model)
    if not models:
        raise ValueError("nothing to look at; use a ckpt.pth, or --weights dino, none or a file")
    check_flags(models, args)
    return models


def check_flags(models: list[Model], args: argparse.Namespace):
    """Raise ValueError for a flag that says how to read others' weights, if there are none."""
    if any(model.is_others for model in models):
        return
    is_given = {
        "--heads": args.heads is not None,
        "--grid": args.grid is not None,
        "--normalise half": args.normalise == "half",
    }
    for flag, given in is_given.items():
        if given:
            raise ValueError(f"{flag}: leave it out; it is for weights that train.py did not write")


def open_model(source: str, args: argparse.Namespace, like: Model | None = None) -> Model:
    """The network in a file, or for "none" one with random weights.

    A run of train.py is shown images like those it was trained on. If `like` is given, or for other
    weights, the images are those of `like`, or else the paper's canvases. Raises ValueError or
    OSError for a file or an image size that does not fit.
    """
    content = {}
    is_ours = False
    is_others = False
    if source == "none":
        backbone = random_backbone(like)
    else:
        loaded = weights.load_backbone(source, args.heads, args.grid)
        backbone = loaded.backbone
        content = loaded.content
        is_ours = loaded.is_ours
        is_others = not is_ours
        normalisation = "ImageNet's mean and standard deviation"
        if args.normalise == "half" and is_others:
            expect_half(backbone)
            normalisation = "a mean and standard deviation of 0.5"
        print(f"{source}: {loaded.description}, pictures normalised with {normalisation}")

    is_run = is_ours and like is None
    if is_run:
        epoch = content["epoch"]
        history = content["metrics"]
        if not all("validation" in line for line in history):
            raise ValueError(f"{source}: its log is of a version that is too old to be drawn")
        try:
            config = settings.config_from_checkpoint(content["config"])
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    else:
        config = config_for_weights(backbone, like)
        config.weights = os.path.basename(source)
        epoch = None
        history = None

    for name in OVERRIDES:
        if getattr(args, name) is not None:
            setattr(config, name, getattr(args, name))
    patch_size = backbone.shape.patch_size
    if config.image_size < 1 or config.image_size % patch_size:
        raise ValueError(
            f"--image-size {config.image_size}: use a multiple of the patch size {patch_size}"
        )
    for name, value in asdict(backbone.shape).items():
        setattr(config, name, value)
    return Model(
        source,
        source,
        config,
        backbone.eval(),
        epoch,
        history,
        is_measured=is_run,
        is_others=is_others,
    )


@torch.no_grad()
def expect_half(backbone: VisionTransformer):
    """Make a network that expects pictures (x − 0.5) / 0.5 expect those of `views.normalize`.

    Both normalizations are affine maps, and so is the patch embedding, which takes the change.
    """
    proj = backbone.patch_embed.proj
    shift = (views.MEAN.flatten() - 0.5) / 0.5
    proj.bias += proj.weight.sum((2, 3)) @ shift
    proj.weight *= views.STD / 0.5


def random_backbone(like: Model | None) -> VisionTransformer:
    """A ViT with random weights, of the shape of the run beside it, or else ViT-S/8."""
    if like is not None:
        return vit.build_network(like.config).backbone
    torch.manual_seed(0)
    return VisionTransformer()


def config_for_weights(backbone: VisionTransformer, like: Model | None) -> Config:
    """Settings that say what weights are shown: what `like` is, or else the paper's canvases."""
    config = settings.make_config(preset="paper")
    if like is not None:
        for name in DATA_SETTINGS:
            setattr(config, name, getattr(like.config, name))
    patch_size = backbone.shape.patch_size
    config.image_size = max(1, round(config.image_size / patch_size)) * patch_size
    return config


def kept_epochs(model: Model) -> dict[str, VisionTransformer]:
    """{"epoch 1": backbone, …}: the epochs that a run kept beside its checkpoint, itself last."""
    backbones = {model.epoch: model.backbone}
    folder = glob.escape(os.path.dirname(model.path))
    for path in glob.glob(os.path.join(folder, "epoch-*.pth")):
        kept = weights.load_backbone(path)
        epoch = kept.content.get("epoch")
        is_ours = "config" in kept.content and isinstance(epoch, int)
        has_same_heads = kept.backbone.shape.heads == model.backbone.shape.heads
        if is_ours and has_same_heads and epoch < model.epoch:
            backbones[epoch] = kept.backbone.to(model.backbone.cls_token.device)
    return {f"epoch {epoch}": backbones[epoch] for epoch in sorted(backbones)}


# ---------------------------------------------------------------------------------------- pictures


@dataclass
class Example:
    """An image to draw maps of, in [0, 1], and its masks if there are any."""

    picture: Tensor  # (1 or 3, H, W)
    masks: tuple[Tensor, ...] = ()  # of digit and clutter, (H, W) bool
    name: str = ""  # what it is called: the name of its file, or the like


def list_images(names: list[str]) -> list[str]:
    """The pictures that --images names: files, and all those in a folder."""
    paths = []
    for name in names:
        pictures = data.image_files(name) if os.path.isdir(name) else [name]
        if not pictures:
            raise ValueError(f"--images {name}: no pictures there; use another folder, or files")
        paths += pictures
    return list({os.path.realpath(path): path for path in paths}.values())  # each file once


def open_pictures(models: list[Model], paths: list[str]) -> list[list[Example]]:
    """For each model, the pictures, resized for it."""
    examples = [[] for _ in models]
    for path in tqdm(paths, "reading", unit="picture", leave=False, disable=None):
        for of_model, model in zip(examples, models):
            shape = model.backbone.shape
            picture = open_image(path, model.config.image_size, shape.patch_size)
            of_model.append(Example(picture, name=os.path.basename(path)))
    return examples


def open_image(path: str, image_size: int, patch_size: int) -> Tensor:
    """A picture (3, H, W) in [0, 1], its longer side image_size, both multiples of the patch."""
    picture = data.read_image(path)
    if min(picture.size) < patch_size:
        size = f"{picture.width}×{picture.height}"
        raise ValueError(f"--images {path}: {size} pixels; use at least a patch of {patch_size}")
    scale = image_size / max(picture.size)
    size = [max(1, round(side * scale / patch_size)) * patch_size for side in picture.size]
    pixels = np.array(picture.resize(size, Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def example_images(model: Model, count: int) -> list[Example]:
    """The first test images, with their masks if any; canvases are in the matched layout."""
    batch = next(views.evaluation_batches(model.config, model.splits["test"], count))
    pictures = batch.images.clamp(0, 1)
    if batch.digit is None:
        return [
            Example(picture, name=f"test photograph {number}")
            for number, picture in enumerate(pictures, 1)
        ]
    masks = zip(batch.digit, batch.clutter)
    return [
        Example(picture, of_picture, f"test canvas {number}")
        for number, (picture, of_picture) in enumerate(zip(pictures, masks), 1)
    ]


# -------------------------------------------------------------------------------------------- maps


@dataclass
class MapsOfExample:
    """What one network makes of one example."""

    maps: dict[str, Tensor]  # {name: (rows, columns)}: maps, "effect", and "head 1" and so on
    # {name: rank correlation of a map with the effect}, if that was asked for; NaN if it has none
    correlations: dict[str, float]
    token_effects: TokenEffects | None = None  # of a picture


@dataclass
class LookedAt:
    """A network, the examples it was shown, and the maps it or its earlier epochs made of them.

    A figure has a row for each example.
    """

    model: Model
    examples: list[Example]
    maps: list[MapsOfExample]
    names: list[str] = field(default_factory=list)  # of the maps that are drawn
    best: dict[str, str] = field(default_factory=dict)  # {name of the map to believe: why}


@torch.no_grad()
def maps_of(
    backbone: VisionTransformer,
    example: Example,
    names: Sequence[str],
    index: int = 0,
    with_srg: bool = False,
) -> MapsOfExample:
    """The named maps of an example, and their rank correlation with the effect if that is named.

    The effect is that of blackening a patch with ink. Without masks it is that of leaving a window
    of patches out; then `token_effects` are measured as well, with the SRG of each map if
    `with_srg`. `index` is the picture's number.
    """
    images = example.picture[None].to(backbone.cls_token.device)
    patch_size = backbone.shape.patch_size
    grid = metrics.patch_grid(images, patch_size)
    maps = {name: explain.MAPS[name](backbone, images) for name in names if name in explain.MAPS}
    if "heads" in names:
        heads, _ = explain.cls_attention(backbone, images)
        for number, head in enumerate(heads.unbind(1), 1):
            maps[f"head {number}"] = head

    correlations = {}
    token_effects = None
    if "effect" in names and example.masks:
        ink = torch.stack(example.masks).any(0)[None]
        has_ink = metrics.patch_sums(ink.to(images.device), patch_size) > 0
        features = effects.feature_of(backbone, images)
        effect = effects.blackening_effects(backbone, images, has_ink, features)
        for name, values in maps.items():
            # on the CPU, since Apple's GPUs have no float64
            correlation = metrics.spearman(values.cpu(), effect.cpu(), has_ink.cpu())
            correlations[name] = correlation.item()
        maps["effect"] = effect
    elif "effect" in names:
        rows = {row_of(name): values for name, values in maps.items()}
        srg_rows = []
        if with_srg:
            srg_rows = [row_of(name) for name in evaluate.PHOTO_MAPS]
        number = torch.tensor([index])
        effect, token_effects = measure_tokens(backbone, images, rows, number, srg_rows)
        for name in maps:
            correlations[name] = token_effects.patch_faithfulness[row_of(name)].item()
        maps["effect"] = effect[:, effects.window_of_patches(grid)]
    maps = {name: values[0].unflatten(-1, grid).cpu() for name, values in maps.items()}
    return MapsOfExample(maps, correlations, token_effects)


def maps_of_examples(
    backbone: VisionTransformer, examples: list[Example], names: Sequence[str]
) -> list[MapsOfExample]:
    """The named maps of each example."""
    examples = tqdm(examples, "maps", unit="image", leave=False, disable=None)
    return [maps_of(backbone, example, names) for example in examples]


def maps_of_pictures(
    model: Model, examples: list[Example], names: Sequence[str], with_srg: bool
) -> list[MapsOfExample]:
    """The named maps of each picture. SRG takes long, so only the first pictures have it."""
    count = 0
    if with_srg:
        count = evaluate.effect_images(
            model.backbone, model.config.image_size, evaluate.PHOTO_PASSES, at_least=4
        )
    numbered = enumerate(tqdm(examples, "maps", unit="picture", leave=False, disable=None))
    return [
        maps_of(model.backbone, example, names, number, with_srg=number < count)
        for number, example in numbered
    ]


def check_finite(network: LookedAt):
    """Raise FloatingPointError, with the name of the network, if a map is not finite."""
    for of_example in network.maps:
        for name, values in of_example.maps.items():
            if not values.isfinite().all():
                title = name.replace("_", " ")
                raise FloatingPointError(f"{network.model.name}: the {title} is NaN or infinite")


def save_maps(networks: list[LookedAt], path: str):
    """Write all maps of all pictures as a file of numpy arrays; the README says what it holds."""
    arrays = {
        "networks": np.array([network.model.name for network in networks]),
        "pictures": np.array([example.name for example in networks[0].examples]),
    }
    for number, network in enumerate(networks):
        backbone = network.model.backbone
        for picture, (example, of_example) in enumerate(zip(network.examples, network.maps)):
            prefix = f"{number}/{picture}/"
            arrays[prefix + "picture"] = example.picture.cpu()
            for name, mask in zip(("digit", "clutter"), example.masks):
                arrays[prefix + name] = mask.cpu()
            for name, values in of_example.maps.items():
                arrays[prefix + name.replace(" ", "_")] = values

            images = example.picture[None].to(backbone.cls_token.device)
            grid = metrics.patch_grid(images, backbone.shape.patch_size)
            of_tokens, of_patches = explain.token_attention(backbone, images)
            arrays[prefix + "attention_of_tokens"] = of_tokens[0].unflatten(-1, grid)
            arrays[prefix + "attention_of_patches"] = (
                of_patches[0].unflatten(-1, grid).unflatten(1, grid)
            )
    np.savez_compressed(path, **arrays)
