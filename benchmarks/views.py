"""Compare the speed of our training views with torchvision on PIL images and with lightly.

    python benchmarks/views.py
    pip install -r benchmarks/requirements.txt && python benchmarks/views.py --dataset stl10

Ours and torchvision's pipeline make the same kind of view on one CPU thread. They crop a random
part of a 100×100 canvas or a 96×96 photograph, resize it to 224 px, rotate it by up to 15 degrees,
and normalize it to three channels. Half of the views are blurred with a sigma of 0.1 to 2 pixels.
Photographs are also flipped, their colours are jittered, and some are turned grey, as in DINO.

For photographs, lightly's DINOTransform is timed too if lightly is installed. It makes two global
views of each picture, with its own probabilities: it blurs more often, solarizes some views, and
does not rotate them.

The pipelines take turns within one run. The script prints the median time of each, and then the
same numbers as one line of JSON.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
import torchvision.transforms as T
from PIL import Image
from sklearn.datasets import load_sample_images

# the project's folder, whose views.py is not this file
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clutter
import data
import settings
import views

WARM_UP_REPEATS = 5
PHOTO_SIZE = 96  # pixels, as in STL-10


@dataclass
class Pictures:
    """The pictures that views are made of, in the form that each pipeline takes."""

    tensors: torch.Tensor  # (B, 1 or 3, S, S), float32 in [0, 1]
    digit_position: torch.Tensor | None  # (B, 1, 2), in pixels; photographs have no digit
    pil_images: list[Image.Image]


@dataclass
class Pipeline:
    """A way to make views: `make_views()` makes `views_per_picture` views of each picture."""

    make_views: Callable
    views_per_picture: int = 1


# ----------------------------------------------------------------------------------------- pictures


def draw_canvases(count: int, config: settings.Config) -> Pictures:
    """Canvases with scikit-learn's digits, whose tensors are (count, 1, 100, 100)."""
    splits, _, _ = data.load_digits("sklearn")
    digits = splits["train"]
    sampler = clutter.CanvasSampler(config, digits)
    params = sampler.sample(data.generator(0, "n"), torch.arange(count))
    canvases, _, _ = clutter.render_canvases(params, config, digits.images, masks=False)
    levels = (canvases[:, 0].numpy() * 255).astype(np.uint8)
    pil_images = [Image.fromarray(image) for image in levels]
    return Pictures(canvases, params["position"], pil_images)


def cut_photographs(count: int) -> Pictures:
    """Parts of scikit-learn's two photographs, whose tensors are (count, 3, 96, 96)."""
    photographs = load_sample_images().images  # two arrays (427, 640, 3), uint8
    parts = []
    for number in range(count):
        photograph = photographs[number % 2]
        row = 5 * number % 300
        column = 7 * number % 500
        parts.append(photograph[row : row + PHOTO_SIZE, column : column + PHOTO_SIZE])
    levels = torch.from_numpy(np.stack(parts)).movedim(-1, 1).contiguous()  # channels first
    pil_images = [Image.fromarray(part) for part in parts]
    return Pictures(levels / 255, None, pil_images)


# ---------------------------------------------------------------------------------------- pipelines


def make_our_views(rng: torch.Generator, pictures: Pictures, config: settings.Config):
    """One global crop of each picture, (B, 1, 3, image_size, image_size), all in one batch."""
    batch = pictures.tensors[:, None]  # (B, 1 crop, channels, S, S)

    # sample where the crops lie, their rotation and their blur
    crops = [(0, "global")]
    batch_size = len(batch)
    picture_size = batch.shape[-1]
    params = views.sample_crops(
        rng, crops, batch_size, pictures.digit_position, picture_size, config
    )

    # change the colours of photographs before they are enlarged
    outside = "zeros"
    if config.dataset == "stl10":
        jitter = views.sample_color_jitter(rng, (batch_size, len(crops)))
        batch = views.color_jitter(batch, jitter)
        outside = "reflection"

    # crop, rotate, resize, blur, normalize
    rendered = views.render_crops(batch, params, config.image_size, outside=outside)
    return views.normalize(rendered)


def torchvision_transform(config: settings.Config) -> T.Compose:
    """The same kind of view as a list of torchvision's transforms, as it is commonly written."""
    blur = T.GaussianBlur(23, sigma=(0.1, 2.0))
    steps = [
        T.RandomResizedCrop(config.image_size, scale=(0.5, 1.0), ratio=(1.0, 1.0)),
        T.RandomRotation(15, interpolation=T.InterpolationMode.BILINEAR),
    ]
    if config.dataset == "stl10":
        steps.append(T.RandomHorizontalFlip())
        steps.append(T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8))
        steps.append(T.RandomGrayscale(p=0.2))
    steps.append(T.RandomApply([blur], p=0.5))
    if config.dataset == "clutter":
        steps.append(T.Grayscale(3))
    steps.append(T.ToTensor())
    steps.append(T.Normalize(views.MEAN.flatten(), views.STD.flatten()))
    return T.Compose(steps)


def make_torchvision_views(transform: T.Compose, pil_images: list[Image.Image]):
    """One view of each image, one image at a time: (B, 3, image_size, image_size)."""
    return torch.stack([transform(image) for image in pil_images])


def lightly_transform(image_size: int) -> Callable | None:
    """lightly's DINO transform without its local views, or None if lightly is not installed."""
    try:
        from lightly.transforms import DINOTransform
    except ImportError:
        return None
    return DINOTransform(
        global_crop_size=image_size,
        global_crop_scale=(0.5, 1.0),
        n_local_views=0,
    )


def make_lightly_views(transform: Callable, pil_images: list[Image.Image]):
    """Two views of each image, as a list of lists of tensors (3, image_size, image_size)."""
    return [transform(image) for image in pil_images]


def make_pipelines(config: settings.Config) -> dict[str, Pipeline]:
    """The pipelines that are compared, by name."""
    if config.dataset == "stl10":
        pictures = cut_photographs(config.batch_size)
    else:
        pictures = draw_canvases(config.batch_size, config)

    rng = data.generator(0, "benchmark")
    our_views = functools.partial(make_our_views, rng, pictures, config)
    pipelines = {"ours": Pipeline(our_views)}

    transform = torchvision_transform(config)
    torchvision_views = functools.partial(make_torchvision_views, transform, pictures.pil_images)
    pipelines["torchvision"] = Pipeline(torchvision_views)

    dino_transform = lightly_transform(config.image_size) if config.dataset == "stl10" else None
    if dino_transform:
        lightly_views = functools.partial(make_lightly_views, dino_transform, pictures.pil_images)
        pipelines["lightly"] = Pipeline(lightly_views, views_per_picture=2)
    return pipelines


# -------------------------------------------------------------------------------------- measurement


def milliseconds_per_view(pipeline: Pipeline, batch_size: int) -> float:
    start = time.perf_counter()
    pipeline.make_views()
    seconds = time.perf_counter() - start
    return 1000 * seconds / (batch_size * pipeline.views_per_picture)


def median_times(pipelines: dict[str, Pipeline], repeats: int, batch_size: int) -> dict[str, float]:
    """The median milliseconds per view of each pipeline. They take turns, after a warm-up."""
    times = {name: [] for name in pipelines}  # milliseconds
    for repeat in range(WARM_UP_REPEATS + repeats):
        for name, pipeline in pipelines.items():
            milliseconds = milliseconds_per_view(pipeline, batch_size)
            if repeat >= WARM_UP_REPEATS:
                times[name].append(milliseconds)
    return {name: statistics.median(values) for name, values in times.items()}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--batch-size", type=int, default=32, help="Pictures in a batch. [32, as in the paper]"
    )
    parser.add_argument(
        "--image-size", type=int, default=224, help="Side of a view in pixels. [224]"
    )
    parser.add_argument(
        "--repeats", type=int, default=9, help="Timed batches of each pipeline. [9]"
    )
    parser.add_argument(
        "--dataset",
        choices=["clutter", "stl10"],
        default="clutter",
        help="Use canvases, or photographs with flips and colour jitter. [clutter]",
    )
    return parser.parse_args()


def main():
    args = parse_args()
    torch.set_num_threads(1)
    flags = {
        "dataset": args.dataset,
        "image_size": args.image_size,
        "batch_size": args.batch_size,
    }
    config = settings.make_config(flags, preset="paper")

    pipelines = make_pipelines(config)
    medians = median_times(pipelines, args.repeats, args.batch_size)
    milliseconds = {name: round(median, 3) for name, median in medians.items()}
    ratios = {name: round(median / medians["ours"], 2) for name, median in medians.items()}
    for name in pipelines:
        print(f"{name:12}{milliseconds[name]:7.2f} ms per view, {ratios[name]:5.1f} × ours")

    # In the JSON line ours is called data.py, so that its keys stay those of earlier records.
    milliseconds["data.py"] = milliseconds.pop("ours")
    ratios.pop("ours")
    record = {
        "ms_a_view": milliseconds,
        "ratio": ratios,
        "dataset": args.dataset,
        "batch_size": args.batch_size,
        "image_size": args.image_size,
        "threads": 1,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
