"""How fast the explorer's page is: its own network in a browser, writing it, and its size.

    python benchmarks/explorer.py
    python benchmarks/explorer.py --screenshot explorer.png runs/…/explorer.html  # the README's picture

Needs a Chromium. The page is that of results/checkpoints/different.pth, a network of the laptop
preset. In the browser a forward pass, what a drag costs (rendering the canvas, a forward pass, the
maps, drawing), and the maps that take many passes are timed, each a hundred times or ten.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]
import torch
from browser import Browser
from helpers import SHIPPED, model_of

import explain
import explorer
import gallery

# JavaScript: {what is timed: (how often, an expression)}
TIMED = {
    "forward pass": (100, "forward(weights(), shown.image)"),
    "a step of a drag": (100, "isEdited = true; look(); draw()"),
    "effects of all patches with ink": (10, "finish(effectsOf(weights(), shown, null))"),
    "squared gradients": (
        10,
        "finish(squaredGradientMap(weights(), shown.run, network().directions))",
    ),
}


def write_page(path: Path) -> float:
    """Write the page; returns the seconds that this adds to visualize.py."""
    model = model_of(SHIPPED / "different.pth")
    examples = gallery.example_images(model, 8)
    names = [*explain.NETWORK_MAPS, "brightness", "effect", "heads"]
    maps = gallery.maps_of_examples(model.backbone, examples, names)
    network = gallery.LookedAt(model, examples, maps)
    start = time.perf_counter()
    content = explorer.network_content(model, {"": network}, None)
    explorer.write_page([content], str(path))
    return time.perf_counter() - start


def milliseconds(browser: Browser, count: int, expression: str) -> list[float]:
    """The shortest, median and longest time of an expression."""
    times = browser.evaluate(
        f"""(() => {{
            const finish = (job) => {{ while (!job.next().done); }};
            const times = [];
            for (let i = 0; i < {count}; i++) {{
                const start = performance.now();
                {expression};
                times.push(performance.now() - start);
            }}
            return times.sort((a, b) => a - b);
        }})()"""
    )
    return [times[0], times[count // 2], times[-1]]


def main():
    parser = argparse.ArgumentParser(description="Time the explorer's page in a browser.")
    parser.add_argument(
        "--screenshot", nargs=2, metavar=("PNG", "PAGE"), help="draw a page instead"
    )
    args = parser.parse_args()
    if args.screenshot:
        picture, page = args.screenshot
        with Browser(1280, 1000) as browser:
            browser.open(Path(page).resolve().as_uri())
            browser.screenshot(picture)
        return
    measure()


def measure():
    """Print all times, and the same as one line of JSON."""
    result = {"threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        path = Path(folder) / "explorer.html"
        result["writing, s"] = write_page(path)
        result["size, MB"] = path.stat().st_size / 1e6
        print(f"writing the page: {result['writing, s']:.2f} s, {result['size, MB']:.2f} MB")
        browser.open(path.as_uri())
        for name, (count, expression) in TIMED.items():
            result[f"{name}, ms"] = milliseconds(browser, count, expression)
            least, median, most = result[f"{name}, ms"]
            print(f"{name}: {median:.1f} ms ({least:.1f} to {most:.1f})")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
