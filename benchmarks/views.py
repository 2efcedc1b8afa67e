"""How fast training views come out of data.py, against torchvision on PIL images.

    python benchmarks/views.py

Both sides make the same thing on one CPU thread: a crop of random scale out of a 100×100
canvas, resized to 224 px, turned by up to 15 degrees, half of them blurred with sigma U(0.1, 2),
normalised, three channels. They alternate in one run; the medians and their ratio are printed.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data


def torchvision_views(canvases, image_size):
    """As lists of transforms are commonly written: one PIL image at a time."""
    transform = T.Compose([
        T.RandomResizedCrop(image_size, scale=(0.5, 1.0), ratio=(1.0, 1.0)),
        T.RandomRotation(15, interpolation=T.InterpolationMode.BILINEAR),
        T.RandomApply([T.GaussianBlur(23, sigma=(0.1, 2.0))], p=0.5),
        T.Grayscale(3),
        T.ToTensor(),
        T.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD),
    ])
    return torch.stack([transform(canvas) for canvas in canvases])


def our_views(rng, canvases, plan, position, image_size):
    crops = data.draw_crops(rng, plan, position, canvases.shape[-1], image_size)
    return data.normalise(data.render_crops(canvases, crops, image_size))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=32, help="the paper's batch by default")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()

    torch.set_num_threads(1)
    digits = data.load_digits("sklearn")[0]["train"]
    rng = data.generator(0, "benchmark")
    params = data.CanvasSampler(digits).draw(rng, torch.arange(args.batch_size))
    canvases, _, _ = data.render_canvases(params, digits.images, 100)  # (B, 1, 100, 100)
    pictures = [Image.fromarray((canvas[0].numpy() * 255).astype(np.uint8)) for canvas in canvases]
    plan = [(0, "global")]

    def milliseconds_a_view(function, *arguments):
        start = time.perf_counter()
        function(*arguments)
        return 1000 * (time.perf_counter() - start) / args.batch_size

    ours, theirs = [], []
    for repeat in range(-1, args.repeats):  # the first is a warm-up
        a = milliseconds_a_view(our_views, rng, canvases, plan, params["position"], args.image_size)
        b = milliseconds_a_view(torchvision_views, pictures, args.image_size)
        if repeat >= 0:
            ours.append(a)
            theirs.append(b)
    ours, theirs = statistics.median(ours), statistics.median(theirs)
    print(f"data.py      {ours:7.2f} ms a view")
    print(f"torchvision  {theirs:7.2f} ms a view")
    print(f"ratio        {theirs / ours:7.1f}")
    print(json.dumps({
        "ours_ms": round(ours, 3), "torchvision_ms": round(theirs, 3), "ratio": round(theirs / ours, 2),
        "batch_size": args.batch_size, "image_size": args.image_size, "threads": 1,
        "torch": torch.__version__, "torchvision": torchvision.__version__,
    }))


if __name__ == "__main__":
    main()
