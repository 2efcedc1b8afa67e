"""What is looked at: networks, the pictures they are shown, and the maps they make of these.

A network comes from a run of train.py, or from any file that weights.py can read. It is shown test
images of its data set, or picture files. visualize.py draws the maps and prints what was measured.
"""

import argparse
import contextlib
import glob
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import effects
import evaluate
import explain
import metrics
import picture_files
import settings
import views
import vit
import weights
from observe import TokenEffects, measure_tokens, row_of
from settings import Config
from vit import VisionTransformer
from weights import LoadedWeights

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
    should_be_measured: bool = False  # runs of train.py are measured, and what --weights names
    has_marks: bool = False  # a mark (--shortcut) lies on each canvas that is drawn
    # The flags that say how to read the file: of --heads, --grid and --normalise half
    open_flags: set[str] = field(default_factory=set)

    def describe(self) -> str:
        return evaluate.describe(self.config, self.epoch, is_run=self.history is not None)


def open_models(args: argparse.Namespace) -> list[Model]:
    """The networks of the command line, on the CPU; ValueError if there is none."""
    models = [open_model(path, args) for path in args.checkpoints]
    if args.weights is not None:
        trained = [model for model in models if model.history is not None]
        model = open_model(args.weights, args, trained[0] if trained else None)
        model.name = f"--weights {args.weights}"
        model.should_be_measured = True
        models.append(model)
    if not models:
        raise ValueError("nothing to look at; use a ckpt.pth, or --weights dino, none or a file")
    check_flags(models, args)
    return models


def check_flags(models: list[Model], args: argparse.Namespace):
    """Raise ValueError for a flag that says how to read weights, if all files state that."""
    open_flags = set().union(*(model.open_flags for model in models))
    is_given = {
        "--heads": args.heads is not None,
        "--grid": args.grid is not None,
        "--normalise half": args.normalise == "half",
    }
    for flag, given in is_given.items():
        if given and flag not in open_flags:
            raise ValueError(f"{flag}: leave it out; the weights say this themselves")


def open_model(source: str, args: argparse.Namespace, like: Model | None = None) -> Model:
    """The network in a file, or for "none" one with random weights.

    A run of train.py is shown images like those it was trained on. If `like` is given, or for other
    weights, the images are those of `like`, or else the paper's canvases. Raises ValueError or
    OSError for a file or an image size that does not fit.
    """
    content = {}
    is_ours = False
    open_flags = set()
    if source == "none":
        backbone = random_backbone(like)
    else:
        loaded = weights.load_backbone(source, args.heads, args.grid)
        backbone = loaded.backbone
        content = loaded.content
        is_ours = loaded.is_ours
        open_flags = {f"--{name}" for name in loaded.unstated}
        if not is_ours and source not in weights.DINO_FILES:
            open_flags.add("--normalise half")
        normalisation = "ImageNet's mean and standard deviation"
        if args.normalise == "half" and "--normalise half" in open_flags:
            expect_half(backbone)
            normalisation = "a mean and standard deviation of 0.5"
        print(f"{source}: {loaded.description}")
        for remark in [*loaded.remarks, f"it is given pictures normalised with {normalisation}"]:
            print(f"{source}: {remark}")

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
        config.weights = os.path.basename(os.path.normpath(source))
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
        should_be_measured=is_run,
        has_marks=config.shortcut > 0,
        open_flags=open_flags,
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
    """Data settings for weights from elsewhere: those of `like`, or else the paper's canvases."""
    config = settings.make_config(preset="paper")
    if like is not None:
        for name in DATA_SETTINGS:
            setattr(config, name, getattr(like.config, name))
    patch_size = backbone.shape.patch_size
    config.image_size = max(1, round(config.image_size / patch_size)) * patch_size
    return config


def kept_epochs(model: Model) -> dict[str, VisionTransformer]:
    """{"epoch 1": backbone, …}: the epochs that a run kept beside its checkpoint, itself last.

    Files of another run, and epochs later than the checkpoint, are left out; a line says which
    and why.
    """
    backbones = {model.epoch: model.backbone}
    left_out = {}  # {reason: names of files}
    folder = os.path.dirname(model.path)
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "epoch-*.pth"))):
        try:
            kept = weights.load_backbone(path)
            reason = why_not_of_run(model, kept)
        except (OSError, ValueError):
            reason = "they cannot be read"
        if reason:
            left_out.setdefault(reason, []).append(os.path.basename(path))
        elif kept.content["epoch"] < model.epoch:
            backbones[kept.content["epoch"]] = kept.backbone.to(model.backbone.cls_token.device)
    for reason, names in left_out.items():
        shown = ", ".join(names[:3])
        if len(names) > 3:
            shown += f" and {len(names) - 3} more"
        line = f"{model.name}: kept epochs are left out, since {reason}: {shown}"
        print(f"warning: {line}", file=sys.stderr)
    return {f"epoch {epoch}": backbones[epoch] for epoch in sorted(backbones)}


def why_not_of_run(model: Model, kept: LoadedWeights) -> str | None:
    """Why a file cannot be a kept epoch of the run that the model is from; None if it can be.

    A kept epoch holds the log up to that epoch. If that log agrees with the checkpoint's, the file
    belongs to this run. Times are not compared, since a resumed run may have repeated an epoch.
    """
    epoch = kept.content.get("epoch")
    history = kept.content.get("metrics")
    is_log = isinstance(history, list) and all(isinstance(line, dict) for line in history)
    if not is_log or not history or epoch != len(history) - 1:
        return "train.py did not write them"
    length = min(len(history), len(model.history))
    if without_times(history[:length]) != without_times(model.history[:length]):
        return "they are of another run"
    if kept.backbone.shape != model.backbone.shape:
        return "they are of another run"
    if epoch > model.epoch:
        return f"they are later than the checkpoint, which is of epoch {model.epoch}"
    return None


def without_times(history: list[dict]) -> str:
    """The lines of a log without seconds, as text, in which NaN equals NaN."""
    lines = []
    for line in history:
        names = [name for name in line if "second" not in str(name)]
        lines.append({name: line[name] for name in names})
    return repr(lines)


# ---------------------------------------------------------------------------------------- pictures


@dataclass
class Example:
    """An image to draw maps of, in [0, 1], and its masks if there are any."""

    picture: Tensor  # (1 or 3, H, W)
    masks: tuple[Tensor, ...] = ()  # of digit and clutter, a mark included, (H, W) bool
    name: str = ""  # what it is called: the name of its file, or the like


def list_images(names: list[str]) -> dict[str, bool]:
    """The pictures that --images names, each file once, {path: whether it was named itself}.

    The others lie in a folder that was named.
    """
    paths = {}  # {where it really is: path}
    named = set()  # where those really are that were named themselves
    for name in names:
        is_folder = os.path.isdir(name)
        pictures = picture_files.image_files(name) if is_folder else [name]
        if not pictures:
            raise ValueError(f"--images {name}: no pictures there; use another folder, or files")
        for path in pictures:
            paths.setdefault(os.path.realpath(path), path)
        if not is_folder:
            named.add(os.path.realpath(name))
    return {path: real_path in named for real_path, path in paths.items()}


def open_pictures(
    models: list[Model], paths: dict[str, bool], levels: tuple[float, float] | None = None
) -> list[list[Example]]:
    """For each model, the pictures of `list_images`, resized for it.

    `levels` is what is black and white in pictures of more than 8 bits, if that was given. What was
    assumed of the pictures is printed, and how they were resized. A picture of a folder that cannot
    be shown is skipped; ValueError or OSError for one that was named, or if none is left.
    """
    largest_patch = max(model.backbone.shape.patch_size for model in models)
    survey = picture_files.survey_pictures(paths, levels, least_side=largest_patch)
    examples = [[] for _ in models]
    sizes = {}  # {path: (width, height)}
    errors = []
    for path, is_named in tqdm(paths.items(), "reading", unit="picture", leave=False, disable=None):
        try:
            image = picture_files.read_image(path, survey.levels)
            pictures = [resize_image(image, path, *sizes_of(model)) for model in models]
        except (OSError, ValueError) as error:
            if is_named:
                raise
            errors.append(error)
            continue
        sizes[path] = image.size
        for of_model, picture in zip(examples, pictures):
            of_model.append(Example(picture, name=os.path.basename(path)))
    if not sizes:
        raise errors[0]
    if levels is not None and not survey.levels:
        raise ValueError(
            "--levels: leave it out; files of 8 bits and PGM files say themselves what is white"
        )

    picture_files.print_skipped(errors)
    lines = survey.notes("" if levels else "; override with --levels")
    lines += [resizing_note(sizes, *size) for size in dict.fromkeys(map(sizes_of, models))]
    for line in lines:
        print(f"--images: {line}")
    return examples


def sizes_of(model: Model) -> tuple[int, int]:
    """The sides of a network's input and of its patches, in pixels."""
    return model.config.image_size, model.backbone.shape.patch_size


def open_image(path: str, image_size: int, patch_size: int) -> Tensor:
    """A picture (3, H, W) in [0, 1], its longer side image_size, both multiples of the patch."""
    return resize_image(picture_files.read_image(path), path, image_size, patch_size)


def resize_image(image: Image.Image, path: str, image_size: int, patch_size: int) -> Tensor:
    """A picture (3, H, W) in [0, 1], its longer side image_size, both multiples of the patch."""
    if min(image.size) < patch_size:
        size = f"{image.width}×{image.height}"
        raise ValueError(f"--images {path}: {size} pixels; use at least a patch of {patch_size}")
    pixels = np.array(
        image.resize(resized(image.size, image_size, patch_size), Image.Resampling.BICUBIC)
    )
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def resized(size: tuple[int, int], image_size: int, patch_size: int) -> list[int]:
    """Width and height of a picture of this size as a network is shown it."""
    scale = image_size / max(size)
    return [max(1, round(side * scale / patch_size)) * patch_size for side in size]


def resizing_note(sizes: dict[str, tuple[int, int]], image_size: int, patch_size: int) -> str:
    """How pictures, {path: (width, height)}, are resized, and which changes its proportions most."""
    changes = {}  # {path: by which factor its proportions change, at least 1}
    for path, (width, height) in sizes.items():
        new_width, new_height = resized((width, height), image_size, patch_size)
        factor = (width * new_height) / (height * new_width)
        changes[path] = max(factor, 1 / factor)
    path = max(changes, key=changes.get)
    before = proportions(*sizes[path])
    after = proportions(*resized(sizes[path], image_size, patch_size))
    line = (
        f"the longer side is resized to {image_size} pixels, both to whole patches of {patch_size}"
    )
    if after != before:
        name = picture_files.shortened(os.path.basename(path), 30)
        line += f"; the proportions of {name} change most, from {before} to {after}"
    return line


def proportions(width: int, height: int) -> str:
    """Such as 1.5:1 for a wide picture, and 1:1.5 for a high one."""
    ratio = max(width, height) / min(width, height)
    text = f"{ratio:.3g}" if ratio < 100 else f"{ratio:,.0f}"
    return f"{text}:1" if width >= height else f"1:{text}"


def example_images(model: Model, count: int) -> list[Example]:
    """The first test images, with their masks if any; canvases are in the matched layout.

    If the model has marks, each canvas has one on top, which counts as clutter.
    """
    split = model.splits["test"]
    batch = next(views.evaluation_batches(model.config, split, count))
    images = batch.images
    if batch.digit is None:
        return [
            Example(picture, name=f"test photograph {number}")
            for number, picture in enumerate(images.clamp(0, 1), 1)
        ]
    digit_masks = batch.digit
    clutter_masks = batch.clutter
    if model.has_marks:
        marked = next(views.marked_batches(model.config, split, count))
        images = marked.images
        digit_masks = digit_masks & ~marked.mark
        clutter_masks = clutter_masks | marked.mark
    masks = zip(digit_masks, clutter_masks)
    return [
        Example(picture, picture_masks, f"test canvas {number}")
        for number, (picture, picture_masks) in enumerate(zip(images.clamp(0, 1), masks), 1)
    ]


# -------------------------------------------------------------------------------------------- maps


@dataclass(frozen=True)
class Query:
    """Whose attention is shown, and in which block; by default that of [CLS] in the last one."""

    block: int | None = None  # from 1, or from the end: -1 is the last
    patch: tuple[int, int] | None = None  # row and column, from 1

    @property
    def is_chosen(self) -> bool:
        return self != Query()

    def describe(self) -> str:
        """What is said above a figure, or nothing if nothing was chosen."""
        parts = []
        if self.block is not None:
            parts.append(f"block {self.block}")
        if self.patch is not None:
            parts.append("the patch in row {}, column {}".format(*self.patch))
        return ", ".join(parts)

    def keywords(self, backbone: VisionTransformer, grid: tuple[int, int], name: str) -> dict:
        """{block, token} of `explain.TOKEN_MAPS`; ValueError if the network or picture has none.

        `name` is the picture's.
        """
        keywords = {}
        depth = backbone.shape.depth
        if self.block is not None:
            if not 1 <= abs(self.block) <= depth:
                raise ValueError(
                    f"--block {self.block}: use 1 to {depth}, or -1 to -{depth} from the end"
                )
            keywords["block"] = self.block - 1 if self.block > 0 else self.block
        if self.patch is not None:
            row, column = self.patch
            rows, columns = grid
            if row > rows or column > columns:
                raise ValueError(
                    f"--query {row},{column}: {name} has {rows} rows and {columns} columns of patches"
                )
            patch = (row - 1) * columns + column - 1
            keywords["token"] = 1 + backbone.shape.registers + patch
        return keywords


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
    query: Query = Query()  # whose attention the maps show
    names: list[str] = field(default_factory=list)  # of the maps that are drawn
    best: dict[str, str] = field(default_factory=dict)  # {name of the map to believe: why}


@torch.no_grad()
def maps_of(
    backbone: VisionTransformer,
    example: Example,
    names: Sequence[str],
    index: int = 0,
    with_srg: bool = False,
    bar: tqdm | None = None,
    query: Query = Query(),
) -> MapsOfExample:
    """The named maps of an example, and their rank correlation with the effect if that is named.

    The effect is that of blackening a patch with ink. Without masks it is that of leaving a window
    of patches out; then `token_effects` are measured as well, with the SRG of each map if
    `with_srg`. `index` is the picture's number. `bar` advances with the passes that this takes.
    `query` chooses the attention of the heads, and of the maps in `explain.TOKEN_MAPS`.
    """
    images = example.picture[None].to(backbone.cls_token.device)
    patch_size = backbone.shape.patch_size
    grid = metrics.patch_grid(images, patch_size)
    keywords = query.keywords(backbone, grid, example.name)
    maps = {}
    for name in names:
        if name in explain.TOKEN_MAPS:
            maps[name] = explain.TOKEN_MAPS[name](backbone, images, **keywords)
        elif name in explain.MAPS:
            maps[name] = explain.MAPS[name](backbone, images)
    if "heads" in names:
        heads = explain.head_attention(backbone, images, **keywords)
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
        with counting_passes(backbone, bar):
            effect, token_effects = measure_tokens(backbone, images, rows, number, srg_rows)
        for name in maps:
            correlations[name] = token_effects.patch_faithfulness[row_of(name)].item()
        maps["effect"] = effect[:, effects.window_of_patches(grid)]
    maps = {name: values[0].unflatten(-1, grid).cpu() for name, values in maps.items()}
    return MapsOfExample(maps, correlations, token_effects)


def maps_of_examples(
    backbone: VisionTransformer,
    examples: list[Example],
    names: Sequence[str],
    query: Query = Query(),
) -> list[MapsOfExample]:
    """The named maps of each example."""
    examples = tqdm(examples, "maps", unit="image", leave=False, disable=None)
    return [maps_of(backbone, example, names, query=query) for example in examples]


def maps_of_pictures(
    model: Model,
    examples: list[Example],
    names: Sequence[str],
    with_srg: bool,
    query: Query = Query(),
) -> list[MapsOfExample]:
    """The named maps of each picture. SRG takes long, so only the first pictures have it."""
    count = 0
    if with_srg:
        count = evaluate.effect_images(
            model.backbone, model.config.image_size, evaluate.PHOTO_PASSES, at_least=4
        )
    if "effect" not in names:
        return maps_of_examples(model.backbone, examples, names, query)
    # Measuring a picture takes so long that the bar counts the passes through the network.
    passes = sum(
        passes_to_measure(model.backbone, example, with_srg=number < count)
        for number, example in enumerate(examples)
    )
    with tqdm(total=passes, desc="measuring", unit="pass", leave=False, disable=None) as bar:
        return [
            maps_of(model.backbone, example, names, number, number < count, bar, query)
            for number, example in enumerate(examples)
        ]


def passes_to_measure(backbone: VisionTransformer, example: Example, with_srg: bool) -> int:
    """How many images go through the network's last layer for the effects of a picture's patches."""
    grid = metrics.patch_grid(example.picture, backbone.shape.patch_size)
    windows = int(effects.window_of_patches(grid).max()) + 1
    blocks = min(2, backbone.shape.depth)  # the whole effect, and the direct one at the last block
    passes = 1 + windows * blocks
    if with_srg and max(grid) > 1:
        passes += len(evaluate.PHOTO_MAPS) * (1 + 2 * effects.SRG_STEPS)
    return passes


@contextlib.contextmanager
def counting_passes(backbone: VisionTransformer, bar: tqdm | None):
    """Within this context the bar advances by an image whenever one leaves the network."""
    if bar is None:
        yield
        return

    def count(norm, inputs, outputs):
        bar.update(len(outputs))

    hook = backbone.norm.register_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()


def check_finite(network: LookedAt):
    """Raise FloatingPointError, with the name of the network, if a map is not finite."""
    for of_example in network.maps:
        for name, values in of_example.maps.items():
            if not values.isfinite().all():
                title = name.replace("_", " ")
                raise FloatingPointError(f"{network.model.name}: the {title} is NaN or infinite")


def save_maps(networks: list[LookedAt], path: str):
    """Write all maps of all pictures as numpy arrays; docs/pictures.md says what the file holds."""
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
