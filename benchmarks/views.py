"""How fast training views come out of data.py, against torchvision on PIL images, and lightly.

    python benchmarks/views.py
    pip install -r benchmarks/requirements.txt && python benchmarks/views.py --dataset stl10

All sides make the same thing on one CPU thread: a crop of random scale out of a 100×100 canvas or a
photograph of 96×96, resized to 224 px, turned by up to 15 degrees, half of them blurred with sigma
U(0.1, 2), normalised, three channels; photographs also mirrored, their colours jittered and
turned grey as DINO does it. lightly's DINOTransform, without its local views, has its own
probabilities of blur. The sides alternate in one run; the medians and their ratios are printed.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
import torchvision.transforms as T
from PIL import Image
from sklearn.datasets import load_sample_images

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data

CANVAS = {"canvas_size": 100, "num_distractors": 6, "distractor_size": 9}
AUGMENTATION = {
    "global_crops_scale": (0.5, 1.0),
    "local_crops_scale": (0.1, 0.4),
    "rotation": 15.0,
    "blur": (0.1, 2.0),
}


def torchvision_views(pictures, image_size, photos):
    """As lists of transforms are commonly written: one PIL image at a time."""
    colours = [
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        T.RandomGrayscale(p=0.2),
    ]
    transform = T.Compose(
        [
            T.RandomResizedCrop(image_size, scale=(0.5, 1.0), ratio=(1.0, 1.0)),
            T.RandomRotation(15, interpolation=T.InterpolationMode.BILINEAR),
            *(colours if photos else []),
            T.RandomApply([T.GaussianBlur(23, sigma=(0.1, 2.0))], p=0.5),
            *([] if photos else [T.Grayscale(3)]),
            T.ToTensor(),
            T.Normalize(data.MEAN.flatten(), data.STD.flatten()),
        ]
    )
    return torch.stack([transform(picture) for picture in pictures])


def our_views(rng, canvases, position, image_size, photos):
    """One global crop of each of canvases (B, channels, S, S)."""
    size, config = canvases.shape[-1], AUGMENTATION | {"image_size": image_size}
    crops = data.sample_crops(rng, [(0, "global")], len(canvases), position, size, config)
    views, outside = canvases[:, None], "zeros"
    if photos:
        jitter = data.sample_color_jitter(rng, (len(canvases), 1))
        views, outside = data.color_jitter(views, jitter), "reflection"
    return data.normalize(data.render_crops(views, crops, image_size, outside=outside))


def lightly_views(image_size):
    """lightly's DINO transform of a list of pictures, two global views each; None without it."""
    try:
        from lightly.transforms import DINOTransform
    except ImportError:
        return None
    transform = DINOTransform(
        global_crop_size=image_size, global_crop_scale=(0.5, 1.0), n_local_views=0, rr_degrees=15
    )
    return lambda pictures: [transform(picture) for picture in pictures]


def canvas_inputs(n):
    """n canvases (n, 1, 100, 100) in [0, 1], where their digits lie, and the same as PIL images."""
    digits = data.load_digits("sklearn")[0]["train"]
    params = data.CanvasSampler(CANVAS, digits).sample(data.generator(0, "n"), torch.arange(n))
    canvases = data.render_canvases(params, CANVAS, digits.images)[0]
    pictures = [Image.fromarray((image[0].numpy() * 255).astype(np.uint8)) for image in canvases]
    return canvases, params["position"], pictures


def photo_inputs(n):
    """The same of photographs, (n, 3, 96, 96), which have no digit."""
    images = photographs(n)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    return images / 255, None, pictures


def photographs(n):
    """Crops of scikit-learn's two photographs, (n, 3, 96, 96) uint8, as large as STL-10's."""
    photos = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    return torch.stack(
        [
            photos[i % 2][:, 5 * i % 300 : 5 * i % 300 + 96, 7 * i % 500 : 7 * i % 500 + 96]
            for i in range(n)
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=32, help="the paper's batch by default")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--dataset",
        choices=["clutter", "stl10"],
        default="clutter",
        help="stl10: with colors and flips",
    )
    args = parser.parse_args()

    torch.set_num_threads(1)
    rng, photos = data.generator(0, "benchmark"), args.dataset == "stl10"
    inputs = photo_inputs if photos else canvas_inputs
    canvases, position, pictures = inputs(args.batch_size)
    lightly = lightly_views(args.image_size) if photos else None

    def milliseconds_a_view(function, *arguments):
        start = time.perf_counter()
        function(*arguments)
        return 1000 * (time.perf_counter() - start) / args.batch_size

    times = {"data.py": [], "torchvision": []} | ({"lightly": []} if lightly else {})
    for repeat in range(-5, args.repeats):  # the first ones are a warm-up
        runs = [
            milliseconds_a_view(our_views, rng, canvases, position, args.image_size, photos),
            milliseconds_a_view(torchvision_views, pictures, args.image_size, photos),
        ]
        if lightly:
            runs.append(milliseconds_a_view(lightly, pictures) / 2)  # it makes two views of each
        for name, run in zip(times, runs):
            times[name] += [run] if repeat >= 0 else []
    medians = {name: statistics.median(runs) for name, runs in times.items()}
    for name, median in medians.items():
        print(f"{name:12}{median:7.2f} ms a view, {median / medians['data.py']:5.1f} times ours")
    print(
        json.dumps(
            {
                "ms_a_view": {name: round(median, 3) for name, median in medians.items()},
                "ratio": {
                    name: round(median / medians["data.py"], 2)
                    for name, median in medians.items()
                    if name != "data.py"
                },
                "dataset": args.dataset,
                "batch_size": args.batch_size,
                "image_size": args.image_size,
                "threads": 1,
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
