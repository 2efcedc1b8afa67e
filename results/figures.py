"""Draw the figures of results/README.md from the lines of study.json.

Throughout, `runs` is {(row, seed): line of study.json} of one preset, as in verdicts.py.
"""

import numpy as np
import verdicts
from matplotlib import colormaps
from matplotlib.figure import Figure

# Colors of the intervals, by verdict.
COLORS = {
    verdicts.HOLDS: "tab:green",
    verdicts.CONTRARY: "tab:red",
    verdicts.NO_EFFECT: "tab:blue",
}
OTHER_COLOR = "0.4"
NULL_COLOR = "0.3"
MARGIN_COLOR = "0.9"
DPI = 110

# Rows whose images differ from those of the others, so that their values cannot be compared.
ROWS_WITH_OTHER_IMAGES = ("texture", "size-28", "size-84")
# Rows whose progress over training is shown.
ROWS_OVER_TRAINING = (
    "different",
    "same",
    "supervised",
    "supervised-same",
    "dino-same",
    "dino-different",
    "different-long",
)


def draw_all(runs, folder):
    """Draw every figure, and one figure per claim that has enough runs."""
    draw_forest(runs, folder / "claims.png")
    draw_scatter(runs, folder / "faithfulness.png")
    draw_training(runs, folder / "training.png")
    for name, verdict in verdicts.judge(runs).items():
        if verdict.interval:
            draw_claim(runs, name, verdict, folder / f"{name}.png")


def values_of(runs, row, measure, seeds=verdicts.FRESH):
    """Return the values of a measure as a list, by rising seed."""
    return list(verdicts.sample(runs, row, measure, seeds).values())


# -------------------------------------------------------------------------- all claims at a glance


def draw_forest(runs, path):
    """Draw the interval of every claim: ratios in one panel, differences in another below it."""
    judged = verdicts.judge(runs)
    figure = Figure(figsize=(10, 1.6 + 0.42 * len(judged)), layout="constrained")
    ratios = [name for name in judged if verdicts.CLAIMS[name].scale == verdicts.RATIO]
    differences = [name for name in judged if verdicts.CLAIMS[name].scale == verdicts.DIFFERENCE]
    heights = [len(ratios) + 1, len(differences) + 1]
    upper, lower = figure.subplots(2, height_ratios=heights)

    draw_intervals(upper, judged, ratios, to_axis=np.exp)
    upper.set_xscale("log")
    ticks = (0.5, 0.75, 1, 1.25, 1.5, 2)
    upper.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    upper.minorticks_off()
    upper.set_xlabel("ratio: mean, 95% interval over seeds; line: the null; grey: the margin")

    draw_intervals(lower, judged, differences, to_axis=np.asarray)
    lower.set_xlabel("difference: mean, 95% interval over seeds; line: the null; grey: the margin")
    figure.savefig(path, dpi=DPI)


def draw_intervals(axes, judged, names, to_axis):
    """Draw claims below each other: margin, null, interval, mean, and what was claimed and found.

    `to_axis` turns values of the primary quantity into places on the axis.
    """
    from_below = list(reversed(names))
    for y, name in enumerate(from_below):
        claim = verdicts.CLAIMS[name]
        verdict = judged[name]
        margin = claim.scaled_margin
        if margin:
            left = to_axis(-margin)
            axes.barh(y, to_axis(margin) - left, height=0.8, left=left, color=MARGIN_COLOR)
        null = to_axis(claim.null)
        axes.plot([null, null], [y - 0.4, y + 0.4], color=NULL_COLOR, linewidth=1)
        result = "open"
        if verdict.interval:
            interval = verdict.interval
            color = COLORS.get(verdict.word, OTHER_COLOR)
            ends = to_axis(np.array([interval.low, interval.high]))
            axes.plot(ends, [y, y], color=color, linewidth=2)
            axes.plot(to_axis(interval.mean), y, "o", color=color)
            result = f"{verdict.word}, {verdict.seeds} seeds"
        # The result stands to the right of the panel, on the line of its claim.
        axes.text(
            1.01,
            y,
            f"claimed {claim.expected}: {result}",
            transform=axes.get_yaxis_transform(),
            verticalalignment="center",
            fontsize=8,
        )
    labels = [f"{name}  {verdicts.CLAIMS[name].quantity}" for name in from_below]
    axes.set_yticks(range(len(names)), labels, fontsize=8)


# ----------------------------------------------------- selectivity and faithfulness, run by run


def draw_scatter(runs, path):
    """Draw what goes with selectivity, and what goes with faithfulness: one dot per run."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    seeds = verdicts.BOTH
    rows = dict.fromkeys(row for row, seed in sorted(runs) if seed in seeds)
    rows = [row for row in rows if row not in ROWS_WITH_OTHER_IMAGES]
    for row, color in zip(rows, colormaps["tab20"].colors, strict=False):
        selectivity = values_of(runs, row, verdicts.SELECTIVITY, seeds)
        faithfulness = values_of(runs, row, verdicts.FAITHFULNESS, seeds)
        causal_selectivity = values_of(runs, row, verdicts.CAUSAL_SELECTIVITY, seeds)
        rollout_selectivity = values_of(runs, row, verdicts.ROLLOUT_SELECTIVITY, seeds)
        rollout_faithfulness = values_of(runs, row, verdicts.ROLLOUT_FAITHFULNESS, seeds)
        # An intervention that only the first runs have: [CLS] attends to all patches alike.
        even_cosine = verdicts.sample(runs, row, verdicts.EVEN_COSINE, seeds)
        faithfulness_there = verdicts.sample(runs, row, verdicts.FAITHFULNESS, even_cosine)
        left.plot(selectivity, causal_selectivity, "o", color=color, label=row)
        middle.plot(selectivity, faithfulness, "o", color=color)
        middle.plot(rollout_selectivity, rollout_faithfulness, "x", color=color, alpha=0.6)
        right.plot(list(even_cosine.values()), list(faithfulness_there.values()), "o", color=color)

    # Brightness in the row `different`: a star in the middle, a dashed line on the right.
    selectivity = np.mean(values_of(runs, "different", verdicts.BRIGHTNESS_SELECTIVITY))
    faithfulness = np.mean(values_of(runs, "different", verdicts.BRIGHTNESS_FAITHFULNESS))
    middle.plot(selectivity, faithfulness, "*", color="black", markersize=14, label="brightness")
    right.axhline(faithfulness, color="black", linestyle="--", linewidth=1)
    # An empty plot, for its entry in the legend.
    middle.plot([], [], "x", color=OTHER_COLOR, label="rollout instead of attention")

    left.set_xlabel("selectivity: how much denser on the digit than on clutter")
    left.set_ylabel("causal selectivity of the feature: digit ÷ distractor")
    middle.set_xlabel("selectivity: how much denser on the digit than on clutter")
    middle.set_ylabel("patch faithfulness: rank correlation with effect")
    right.set_xlabel("cosine of the feature with even attention")
    right.set_ylabel("patch faithfulness")
    figure.legend(fontsize=7, loc="outside right center")
    figure.savefig(path, dpi=DPI)


# ------------------------------------------------------------------------------- over training


def draw_training(runs, path):
    """Draw three measures of the mean map on validation canvases by epoch: means over seeds."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    titles = {"selectivity": "selectivity", "auroc": "auroc", "diversity": "diversity, bits"}
    panels = figure.subplots(1, 3)
    for axes, (metric, title) in zip(panels, titles.items()):
        for row in ROWS_OVER_TRAINING:
            if (row, verdicts.FRESH[0]) not in runs:
                continue
            curves = []  # (seeds, epochs)
            for curve in values_of(runs, row, "curve"):
                curves.append([epoch["mean"][metric] for epoch in curve])
            axes.plot(np.mean(curves, axis=0), label=row)
        axes.set_xlabel("epoch")
        axes.set_title(title, fontsize=10)
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=DPI)


# ------------------------------------------------------------------------------------ one claim


def draw_claim(runs, name, verdict, path):
    """Draw the two sides of a claim with a dot per run, and beside them what is tested."""
    claim = verdicts.CLAIMS[name]
    tested = verdicts.primary(runs, claim)
    sides = sides_to_draw(name)
    figure = Figure(figsize=(4.6 + 1.2 * len(sides), 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1 + len(sides), 2))
    draw_sides(left, runs, sides, seeds=tested)
    draw_test(right, claim, tested, verdict)
    title = f"{name}: {claim.quantity}"
    if name == "F4":
        title += "\nleft: far background density of a run's most stray head; past the ink: above 1"
        left.axhline(1, color=NULL_COLOR, linewidth=1)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=DPI)


def sides_to_draw(name):
    """Return the sides of a claim, the reference first."""
    claim = verdicts.CLAIMS[name]
    sides = [claim.compared]
    if claim.reference:
        sides.insert(0, claim.reference)
    if claim.alternative:
        alternative_compared, _ = claim.alternative
        sides.append(alternative_compared)
    # No head looks past the ink in either row of F4. Shares that are all zero show nothing, so
    # the density of the most stray head is drawn instead.
    if name == "F4":
        sides = [verdicts.Side(side.row, verdicts.MOST_STRAY_HEAD) for side in sides]
    return sides


def draw_sides(axes, runs, sides, seeds):
    """Draw each side as a column of dots with its mean, and join the dots of a seed."""
    columns = [verdicts.sample(runs, side.row, side.measure, seeds) for side in sides]
    for seed in seeds:
        axes.plot([column[seed] for column in columns], color="0.85", linewidth=1)
    for x, column in enumerate(columns):
        values = list(column.values())
        mean = np.mean(values)
        axes.plot([x] * len(values), values, "o", color="tab:blue", alpha=0.6)
        axes.plot([x - 0.15, x + 0.15], [mean, mean], color="black")
    labels = [f"{side.row}\n{side.measure.removeprefix('matched/')}" for side in sides]
    axes.set_xticks(range(len(sides)), labels, fontsize=7)
    axes.set_xlim(-0.5, len(sides) - 0.5)


def draw_test(axes, claim, tested, verdict):
    """Draw the primary quantity of each seed, its mean and interval, the null and the margin."""
    margin = claim.scaled_margin
    interval = verdict.interval
    color = COLORS.get(verdict.word, OTHER_COLOR)
    axes.axhline(claim.null, color=NULL_COLOR, linewidth=1)
    if margin:
        axes.axhspan(-margin, margin, color=MARGIN_COLOR)
    axes.plot([0] * len(tested), list(tested.values()), "o", color="tab:blue", alpha=0.6)
    axes.plot([0.5, 0.5], [interval.low, interval.high], color=color, linewidth=2)
    axes.plot(0.5, interval.mean, "o", color=color)
    axes.set_xticks([0, 0.5], ["a seed", "mean, 95%"], fontsize=7)
    axes.set_xlim(-0.3, 0.8)
    axes.set_xlabel("line: the null; grey: the margin", fontsize=7)
    axes.yaxis.set_major_formatter(lambda value, _: verdicts.format_value(claim, value))
    seeds = f"seeds {min(tested)} to {max(tested)}"
    axes.set_title(f"{claim.scale}, {seeds}:\n{verdict.word}", fontsize=8)
