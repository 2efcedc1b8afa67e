"""The figures of results/README.md, one for each claim, from the lines of study.json."""

import numpy as np
import verdicts as v
from matplotlib.figure import Figure
from verdicts import mean_and_interval, sample


def dots(axes, runs, rows, name, lines=None):
    """A dot a seed for each {title: row}, their mean a bar; dashed lines {title: row or height}."""
    for x, row in enumerate(rows.values()):
        found = sample(runs, row, name)
        spread = np.linspace(-0.12, 0.12, len(found)) if len(found) > 1 else np.zeros(len(found))
        axes.plot(x + spread, list(found.values()), "o", color="tab:blue", alpha=0.5, ms=4)
        axes.plot([x - 0.3, x + 0.3], [mean_and_interval(found)[0]] * 2, color="black")
    place = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 8}
    for title, height in (lines or {}).items():
        if isinstance(height, str):
            height = mean_and_interval(sample(runs, height, name))[0]
        axes.axhline(height, color="tab:gray", linestyle="--", linewidth=1)
        axes.text(1.01, height, title, color="tab:gray", **place)
    axes.set_xticks(range(len(rows)), [title.replace(", ", ",\n") for title in rows], fontsize=8)
    axes.set_xlim(-0.5, len(rows) - 0.5)


def curves(axes, runs, row, name, lines):
    """Means over seeds against steps, with intervals: lines {title: (how `name` ends, style)}."""
    epochs = [f"{row} at epoch {epoch}" for epoch in range(11)]
    steps = [mean_and_interval(sample(runs, epoch, "step"))[0] for epoch in epochs]
    for title, (end, style) in lines.items():
        found = [mean_and_interval(sample(runs, epoch, name + end)) for epoch in epochs]
        mean, low, high = np.transpose(found)
        [line] = axes.plot(steps, mean, style, label=title)
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel("steps")
    axes.legend(fontsize=8)


def ratios(axes, runs):
    """The tests of C7, and the margin within which rows count as alike."""
    tests = v.judge(runs)["C7"][::-1]
    for y, test in enumerate(tests):
        mean, *interval = test["ratio"]
        axes.plot(interval, [y, y], color="tab:blue")
        axes.plot(mean, y, "o", color="tab:blue")
    axes.axvspan(*v.MARGIN, color="tab:green", alpha=0.15)
    axes.axvline(1, color="tab:gray", linewidth=1)
    titles = [test["text"].removeprefix("selectivity, ") for test in tests]
    axes.set_yticks(range(len(tests)), titles, fontsize=8)


def search(axes, runs):
    """Seed 0 of each batch with each learning rate, on validation canvases."""
    for batch in v.BATCHES:
        rows = [f"batch-{batch}-lr-{rate} at epoch 10" for rate in v.RATES]
        found = [sample(runs, row, "selectivity").get(0, np.nan) for row in rows]
        axes.plot(v.RATES, found, "o-", label=f"batch {batch}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(v.RATES, [f"× {rate}" for rate in v.RATES])
    axes.legend(fontsize=8)


def head_bars(axes, runs):
    """What each head of seed 0 attends to, networks of 1 to 12 heads side by side."""
    left, middles = 0, {}
    for count, row in v.HEADS.items():
        heads = v.all_heads(runs[row, 0]["matched"]) if (row, 0) in runs else []
        x, bottom = left + np.arange(len(heads)), np.zeros(len(heads))
        for region, color in (("digit", "green"), ("clutter", "red"), ("background", "gray")):
            share = np.array([head[f"{region}_share"] for head in heads])
            label = None if left else region
            axes.bar(x, share, bottom=bottom, color=f"tab:{color}", label=label)
            bottom += share
        if heads:
            middles[count], left = x.mean(), x[-1] + 2
    axes.set_xticks(list(middles.values()), list(middles), fontsize=8)
    axes.set_ylim(0, 1.2)
    axes.legend(fontsize=8, ncols=3, loc="upper center")


NETWORK = {"different views": ("", "-"), "brightness": (" of brightness", "--")}
NETWORK |= {"its maps shuffled": (" of shuffled", ":")}
LONG, LOSS = "different-long", {"training": ("loss", "-"), "validation": ("validation_loss", "--")}
HEADS = {"most selective head": (" of the most selective head", "-"), "mean map": ("", "k-")}
HEADS |= {"least selective head": (" of the least selective head", "-")}
HEADS |= {"brightness": (" of brightness", "--")}
UNTRAINED, BRIGHTNESS = {"untrained": "same-2 of untrained"}, {"brightness": "same-2 of brightness"}
IMAGES = BRIGHTNESS | {"ink": "same-2 of ink"} | UNTRAINED
CROPS = {title.replace("different", "diff"): row for title, row in v.CROPS.items()}
BATCH = {f"batch {batch}": f"batch-{batch}" for batch in v.BATCHES}
EVEN, OVERLAP = {"even map": 1}, "jaccard60 ÷ best_jaccard"
BLACK = {"black": "same-2"} | v.TEXTURES
PANELS = [  # claim, title, how it is drawn, of what
    ("C1", "k-NN accuracy", dots, v.LOSSES, "k-NN", UNTRAINED | {"chance": 0.1}),
    ("C1", "linear probe", dots, v.LOSSES, "linear probe", {"one half": 0.5, "chance": 0.1}),
    *[("C2", name, dots, v.LOSSES, name, BRIGHTNESS) for name in ("selectivity", "auroc")],
    ("C2", OVERLAP, dots, v.LOSSES, OVERLAP),
    *[("C3", name, dots, v.VIEWS, name, IMAGES) for name in ("selectivity", "auroc")],
    ("C4", "density of the attention on the digit", dots, BLACK, "digit", EVEN),
    ("C4", "density of the attention on the clutter", dots, BLACK, "clutter", EVEN),
    ("C4", "density of the attention far from ink", dots, BLACK, "far from ink", EVEN),
    *[("C5", metric, curves, "different-1", metric, NETWORK) for metric in v.MAPS],
    ("C6", "loss", curves, LONG, "", LOSS),
    ("C6", "selectivity", curves, LONG, "selectivity", HEADS),
    (
        "C6",
        "diversity of the heads, bits",
        curves,
        LONG,
        "diversity",
        {"different views": ("", "-")},
    ),
    ("C7", "ratios, 95%, not corrected; green: within 10%", ratios),
    ("C7", "selectivity", dots, CROPS, "selectivity", {"brightness": "same-4 of brightness"}),
    *[("C8", name, dots, v.SIZES, name) for name in (OVERLAP, "jaccard60", "auroc")],
    ("Q1", "the search: selectivity by learning rate, seed 0", search),
    ("Q1", "selectivity at the best rate", dots, BATCH, "selectivity"),
    ("Q1", "k-NN accuracy at the best rate", dots, BATCH, "k-NN", UNTRAINED),
    ("Q2", "selectivity of the best head", dots, v.HEADS, "best head"),
    ("Q2", "selectivity of the mean map", dots, v.HEADS, "selectivity"),
    ("Q2", "a bar a head: share of its attention (seed 0)", head_bars),
]


def draw(runs, folder):
    """A figure a claim, into the folder."""
    for claim in sorted({panel[0] for panel in PANELS}):
        panels = [panel[1:] for panel in PANELS if panel[0] == claim]
        figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
        axes = figure.subplots(1, len(panels))
        for panel, (title, draw_panel, *what) in zip(axes, panels):
            draw_panel(panel, runs, *what)
            panel.set_title(title, fontsize=10)
            if claim == "Q2":
                panel.set_xlabel("heads", fontsize=8)
        figure.savefig(f"{folder}/{claim}.png", dpi=90)
