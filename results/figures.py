"""The figures of results/README.md, from the lines of study.json."""

import numpy as np
import verdicts as v
from matplotlib import colormaps
from matplotlib.figure import Figure

COLORS = {"holds": "tab:green", "the contrary holds": "tab:red", "no relevant effect": "tab:blue"}


def forest(runs, path):
    """Every claim's primary quantity: interval, null, margin shaded; ratios, then differences."""
    found = {claim: r for claim, r in v.judge(runs).items() if "mean" in r}
    figure = Figure(figsize=(10, 1.6 + 0.42 * len(v.CLAIMS)), layout="constrained")
    kinds = {k: [c for c in v.CLAIMS if v.CLAIMS[c][2] == k] for k in ("ratio", "difference")}
    heights = [len(claims) + 1 for claims in kinds.values()]
    for axes, (kind, claims) in zip(figure.subplots(2, height_ratios=heights), kinds.items()):
        scale = np.exp if kind == "ratio" else lambda x: x
        for y, claim in enumerate(reversed(claims)):
            null, margin = v.bounds(claim)
            if margin:
                axes.barh(y, scale(margin) - scale(-margin), 0.8, scale(-margin), color="0.9")
            axes.plot([scale(null)] * 2, [y - 0.4, y + 0.4], color="0.3", linewidth=1)
            if claim in found:
                r, color = found[claim], COLORS.get(found[claim]["word"], "0.4")
                axes.plot(scale(np.array([r["low"], r["high"]])), [y, y], color=color, linewidth=2)
                axes.plot(scale(r["mean"]), y, "o", color=color)
            says = "{word}, {seeds} seeds".format(**found[claim]) if claim in found else "open"
            place = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 8}
            claimed = {">": "more", "<": "less", "=": "alike"}.get(v.CLAIMS[claim][3], "no less")
            axes.text(1.01, y, f"claimed {claimed}: {says}", **place)
        names = [f"{claim}  {v.SAYS[claim][1]}" for claim in reversed(claims)]
        axes.set_yticks(range(len(claims)), names, fontsize=8)
        if kind == "ratio":
            axes.set_xscale("log")
            ticks = (0.5, 0.75, 1, 1.25, 1.5, 2)
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axes.minorticks_off()
        axes.set_xlabel(f"{kind}: mean, 95% interval over seeds; line: the null; grey: the margin")
    figure.savefig(path, dpi=110)


def scatter(runs, path):
    """What selectivity goes with, and what faithfulness, a dot a run."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    rows = dict.fromkeys(row for row, seed in sorted(runs) if seed in v.BOTH)
    rows = [r for r in rows if r not in ("texture", "size-28", "size-84")]  # other images
    for row, color in zip(rows, colormaps["tab20"].colors, strict=False):
        numbers = lambda name, row=row: [*v.sample(runs, row, name, v.BOTH).values()]
        x, faithful = numbers(v.SELECTIVITY), numbers(v.FAITHFUL)
        left.plot(x, numbers("causal_selectivity"), "o", color=color, label=row)
        middle.plot(x, faithful, "o", color=color)
        crosses = numbers(v.SELECTIVITY.replace("mean", "rollout"))
        middle.plot(crosses, numbers(v.ROLLOUT), "x", color=color, alpha=0.6)
        right.plot(numbers("attention_matters/even/cosine"), faithful, "o", color=color)
    bright = ("matched/brightness/selectivity", v.BRIGHTNESS)
    bright = [np.mean([*v.sample(runs, "different", name).values()]) for name in bright]
    middle.plot(*bright, "*", color="black", markersize=14, label="brightness")
    right.axhline(bright[1], color="black", linestyle="--", linewidth=1)
    middle.plot([], [], "x", color="0.4", label="rollout instead of attention")
    denser = "selectivity: how much denser on the digit than on clutter"
    left.set(xlabel=denser, ylabel="causal selectivity of the feature: digit ÷ distractor")
    middle.set(xlabel=denser, ylabel="patch faithfulness: rank correlation with effect")
    right.set(xlabel="cosine of the feature with even attention", ylabel="patch faithfulness")
    figure.legend(fontsize=7, loc="outside right center")
    figure.savefig(path, dpi=110)


TRAINED = ("different", "same", "supervised", "supervised-same", "dino-same", "dino-different")


def training(runs, path):
    """What validation canvases say of the mean map after each epoch: means over seeds."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), ("selectivity", "auroc", "diversity")):
        for row in [row for row in (*TRAINED, v.LONG) if (row, v.FRESH[0]) in runs]:
            curves = v.sample(runs, row, "curve").values()
            curves = [[point["mean"][name] for point in curve] for curve in curves]
            axes.plot(np.mean(curves, 0), label=row)
        axes.set_xlabel("epoch")
        axes.set_title(name + (", bits" if name == "diversity" else ""), fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=110)


def dots(runs, claim, result, path):
    """The two numbers of a claim, a dot a run, those of a seed joined; and what is tested."""
    (row, name), under, kind, *_ = v.CLAIMS[claim]
    title, rows = f"{claim}: {v.SAYS[claim][1]}", row.split("|")
    pairs = [(under[0] or rows[0], under[1])] if under else []
    pairs += [(each, name) for each in rows]
    if claim == "F4":  # shares of nil show nothing
        title += "\nleft: far background density of a run's most stray head; past the ink: above 1"
        pairs = [(each, "stray") for each, _ in pairs]
    sides, tested = {}, v.primary(runs, claim)
    for row, name in pairs:
        sides[f"{row}\n{name.rpartition('matched/')[2]}"] = v.sample(runs, row, name, tested)
    figure = Figure(figsize=(4.6 + 1.2 * len(sides), 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1 + len(sides), 2))
    for seed in tested:
        left.plot([side[seed] for side in sides.values()], color="0.85", linewidth=1)
    for x, side in enumerate(sides.values()):
        left.plot([x] * len(side), [*side.values()], "o", color="tab:blue", alpha=0.6)
        left.plot([x - 0.15, x + 0.15], [np.mean([*side.values()])] * 2, color="black")
    if claim == "F4":
        left.axhline(1, color="0.3", linewidth=1)
    left.set_xticks(range(len(sides)), sides, fontsize=7)
    left.set_xlim(-0.5, len(sides) - 0.5)
    null, margin = v.bounds(claim)
    right.axhline(null, color="0.3", linewidth=1)
    if margin:
        right.axhspan(-margin, margin, color="0.9")
    mean, color = result["mean"], COLORS.get(result["word"], "0.4")
    right.plot([0] * len(tested), [*tested.values()], "o", color="tab:blue", alpha=0.6)
    right.plot([0.5] * 2, [result["low"], result["high"]], color=color, linewidth=2)
    right.plot(0.5, mean, "o", color=color)
    right.set_xticks([0, 0.5], ["a seed", "mean, 95%"], fontsize=7)
    right.set_xlim(-0.3, 0.8)
    right.set_xlabel("line: the null; grey: the margin", fontsize=7)
    right.yaxis.set_major_formatter(lambda x, _: v.shown(claim, x))
    seeds = f"seeds {min(tested)} to {max(tested)}"
    right.set_title(f"{kind}, {seeds}:\n{result['word']}", fontsize=8)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=110)


def draw(runs, folder):
    """All figures that there are runs for."""
    forest(runs, folder / "claims.png")
    scatter(runs, folder / "faithfulness.png")
    training(runs, folder / "training.png")
    for claim, found in v.judge(runs).items():
        if "mean" in found:
            dots(runs, claim, found, folder / f"{claim}.png")
