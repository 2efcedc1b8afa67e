"""The figures of results/README.md, one for each claim, from the lines of study.json.

A dot is a run with a seed of its own; bars are their means, shaded bands 95% intervals over them.
"""

import math
import os

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from verdicts import (
    AUROC, BACKGROUNDS, BATCHES, CROPS, HEADS, KNN, LOSSES, MARGIN, PROBE, RATES, SELECTIVITY, SIZES, UNTRAINED_KNN, VIEWS,
    after, best_rates, c7, each_head, head_row, heads, interval, of, over_ceiling, size_row, values,
)

REGIONS = {"digit": "tab:green", "clutter": "tab:red", "background": "tab:gray"}



def dots(axes, runs, rows, read, title, lines=()):
    """A dot a seed for each {title: row}, their mean as a bar; dashed lines {name: height} to compare with."""
    for x, row in enumerate(rows.values()):
        found = list(values(runs, row, read).values())
        spread = np.linspace(-0.12, 0.12, len(found)) if len(found) > 1 else 0
        axes.plot(x + spread * np.ones(len(found)), found, "o", color="tab:blue", alpha=0.5, ms=4)
        axes.plot([x - 0.3, x + 0.3], [interval(found)[0]] * 2, color="black")
    for name, height in dict(lines).items():
        axes.axhline(height, color="tab:gray", linestyle="--", linewidth=1)
        axes.text(1.01, height, name, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color="tab:gray")
    axes.set_xticks(range(len(rows)), [name.replace(", ", ",\n") for name in rows], fontsize=8)
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_title(title, fontsize=10)


def course(axes, runs, row, reads, title):
    """Curves over the steps: mean over seeds of each {name: (what to read of a line of the curve, style)}, with its interval."""
    lines = [line for (each, _), line in sorted(runs.items()) if each == row]
    for name, (read, style) in reads.items() if lines else ():
        epochs = [epoch for epoch in range(11) if all(read(line["curve"][epoch]) is not None for line in lines)]
        steps = [lines[0]["curve"][epoch]["step"] for epoch in epochs]
        mean, low, high = np.transpose([interval([read(line["curve"][epoch]) for line in lines]) for epoch in epochs])
        axes.plot(steps, mean, style, label=name)
        axes.fill_between(steps, low, high, color=axes.lines[-1].get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel("steps")
    axes.set_title(title, fontsize=10)
    if lines:
        axes.legend(fontsize=8)


def reference(runs, row, name, metric):
    return interval(values(runs, row, of(metric, name)).values())[0]


def figure_1(axes, runs):
    untrained = interval(values(runs, "same-2", UNTRAINED_KNN).values())[0]
    dots(axes[0], runs, LOSSES, KNN, "k-NN accuracy", {"untrained": untrained, "chance": 0.1})
    dots(axes[1], runs, LOSSES, PROBE, "linear probe", {"one half": 0.5, "chance": 0.1})


def figure_2(axes, runs):
    for panel, (name, read) in zip(axes, (("selectivity", SELECTIVITY), ("auroc", AUROC), ("jaccard60 ÷ best_jaccard", over_ceiling))):
        lines = {} if read is over_ceiling else {"brightness": reference(runs, "same-2", "brightness", name)}
        dots(panel, runs, LOSSES, read, name, lines)


def figure_3(axes, runs):
    for panel, name in zip(axes, ("selectivity", "auroc")):
        lines = {each: reference(runs, "same-2", each, name) for each in ("brightness", "ink", "untrained")}
        dots(panel, runs, VIEWS, of(name), name, lines)


def figure_4(axes, runs):
    for panel, (region, title) in zip(axes, (("digit", "on the digit"), ("clutter", "on the clutter"), ("far_background", "far from ink"))):
        dots(panel, runs, BACKGROUNDS, of(f"{region}_density"), f"density of the attention {title}", {"even map": 1})


def figure_5(axes, runs):
    for panel, metric in zip(axes, ("selectivity", "auroc", "pointing")):
        course(panel, runs, "different-1", {
            "different views": (lambda epoch, m=metric: epoch["mean"][m], "-"),
            "brightness": (lambda epoch, m=metric: epoch["brightness"][m], "--"),
            "its maps shuffled": (lambda epoch, m=metric: epoch["shuffled"][m], ":"),
        }, metric)


def figure_6(axes, runs):
    row = "different-long"
    course(axes[0], runs, row, {"training": (lambda epoch: epoch.get("loss"), "-"),
                                "validation": (lambda epoch: epoch["validation_loss"], "--")}, "loss")
    course(axes[1], runs, row, {
        "most selective head": (lambda epoch: max(each_head(epoch)), "-"),
        "mean map": (lambda epoch: epoch["mean"]["selectivity"], "k-"),
        "least selective head": (lambda epoch: min(each_head(epoch)), "-"),
        "brightness": (lambda epoch: epoch["brightness"]["selectivity"], "--"),
    }, "selectivity")
    course(axes[2], runs, row, {"different views": (lambda epoch: epoch["mean"]["diversity"], "-")}, "diversity of the heads, bits")


def figure_7(axes, runs):
    tests = c7(runs)[::-1]
    for y, test in enumerate(tests):
        if "value" in test:
            axes[0].plot([test["low"], test["high"]], [y, y], color="tab:blue")
            axes[0].plot(test["value"], y, "o", color="tab:blue")
    axes[0].axvspan(*MARGIN, color="tab:green", alpha=0.15)
    axes[0].axvline(1, color="tab:gray", linewidth=1)
    axes[0].set_yticks(range(len(tests)), [test["text"].removeprefix("selectivity, ") for test in tests], fontsize=8)
    axes[0].set_title("ratios, 95%, not corrected; green: within 10%", fontsize=10)
    dots(axes[1], runs, {f"{views[:4]}, {crops}": row for views, rows in CROPS.items() for crops, row in rows.items()},
         SELECTIVITY, "selectivity", {"brightness": reference(runs, "same-4", "brightness", "selectivity")})


def figure_8(axes, runs):
    rows = {f"{size} px": size_row(size) for size in SIZES}
    for panel, (name, read) in zip(axes, (("jaccard60 ÷ best_jaccard", over_ceiling), ("jaccard60", of("jaccard60")), ("auroc", AUROC))):
        dots(panel, runs, rows, read, name)


def figure_9(axes, runs):
    for batch in BATCHES:
        found = [values(runs, f"batch-{batch}-lr-{rate}", after(-1, "selectivity")).get(0, math.nan) for rate in RATES]
        axes[0].plot(RATES, found, "o-", label=f"batch {batch}")
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks(RATES, [f"× {rate}" for rate in RATES])
    axes[0].set_title("the search: selectivity by learning rate, seed 0", fontsize=10)
    axes[0].legend(fontsize=8)
    rows = {f"batch {batch}": row for batch, row in best_rates(runs).items()}
    dots(axes[1], runs, rows, SELECTIVITY, "selectivity at the best rate")
    untrained = interval(values(runs, "different-1", UNTRAINED_KNN).values())[0]
    dots(axes[2], runs, rows, KNN, "k-NN accuracy at the best rate", {"untrained": untrained})


def figure_10(axes, runs):
    rows = {str(number): head_row(number) for number in HEADS}
    dots(axes[0], runs, rows, of("selectivity", "best"), "selectivity of the best head")
    dots(axes[1], runs, rows, SELECTIVITY, "selectivity of the mean map")
    at, middles = 0, []
    for count in HEADS:
        line = runs.get((head_row(count), 0))
        if line is None:
            continue
        bottom = np.zeros(count)
        for region, colour in REGIONS.items():
            found = np.array(heads(line, f"{region}_share"))
            axes[2].bar(at + np.arange(count), found, bottom=bottom, color=colour, label=region if at == 0 else None)
            bottom += found
        middles.append(at + (count - 1) / 2)
        at += count + 1
    axes[2].set_xticks(middles, HEADS[: len(middles)], fontsize=8)
    axes[2].set_ylim(0, 1.2)
    axes[2].set_title("a bar a head: share of its attention (seed 0)", fontsize=10)
    axes[2].legend(fontsize=8, ncols=3, loc="upper center")
    for panel in axes:
        panel.set_xlabel("heads", fontsize=8)


PANELS = {"C1": (figure_1, 2), "C2": (figure_2, 3), "C3": (figure_3, 2), "C4": (figure_4, 3), "C5": (figure_5, 3),
          "C6": (figure_6, 3), "C7": (figure_7, 2), "C8": (figure_8, 3), "Q1": (figure_9, 3), "Q2": (figure_10, 3)}


def draw(runs, folder):
    """A figure a claim, into the folder."""
    os.makedirs(folder, exist_ok=True)
    for claim, (figure, panels) in PANELS.items():
        canvas, axes = plt.subplots(1, panels, figsize=(4.2 * panels, 3.2), layout="constrained")
        figure(axes, runs)
        canvas.savefig(os.path.join(folder, f"{claim}.png"), dpi=90)
        plt.close(canvas)
