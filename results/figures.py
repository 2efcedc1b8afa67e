"""Draw the figures of the pages from the lines of study.json.

Every figure is meant to be understood without its page: axes and rows are named in words, and the
numbers in a title are computed from the runs. A function that draws returns a Figure, or None if
there are no runs for it yet; `draw_all` saves them.

Throughout, `runs` is {(row, seed): line of study.json} of one preset, as in verdicts.py.
"""

import re
import textwrap
from collections import Counter
from dataclasses import dataclass, replace

import map_claims
import numpy as np
import verdicts
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, MultipleLocator, NullLocator

DPI = 110
SMALL = 8.5  # the font size of notes, in points
NO_BREAK = "\N{NO-BREAK SPACE}"

# Colours that colour-blind readers can tell apart (Okabe and Ito 2008).
BLUE = "#0072B2"
VERMILLION = "#D55E00"
GREEN = "#009E73"
PURPLE = "#CC79A7"
ORANGE = "#E69F00"
GREY = "0.45"
NULL_COLOR = "0.3"
MARGIN_COLOR = "0.9"

# Colour and marker of a claim's interval, by verdict.
WORD_STYLES = {
    verdicts.HOLDS: (BLUE, "o"),
    verdicts.NO_EFFECT: (GREEN, "s"),
    verdicts.CONTRARY: (VERMILLION, "D"),
    verdicts.UNDECIDED: (GREY, "^"),
}
# The recipe was chosen with C3 and C5 among its goals (recipe.md), and the quantity of F1 and F2 was
# chosen when the results were known. So these four are no news.
NOT_FRESH = ("C3", "C5", "F1", "F2")

# Kinds of training. Colour and marker of each in the scatter plots.
DIFFERENT_VIEWS = "different views"
SAME_VIEWS = "same views"
SUPERVISED = "supervised"
DEEPER = "different views, deeper networks"
GROUP_STYLES = {
    DIFFERENT_VIEWS: (BLUE, "o"),
    SAME_VIEWS: (ORANGE, "s"),
    SUPERVISED: (GREEN, "^"),
    DEEPER: (PURPLE, "D"),
}
# The kind of each row of either sample whose images are those of the preset. The values of rows
# with other images (a texture, 28 or 84 px) cannot be compared with these.
GROUP_OF_ROW = {
    "different": DIFFERENT_VIEWS,
    "different-long": DIFFERENT_VIEWS,
    "different-registers-0": DIFFERENT_VIEWS,
    "dino-different": DIFFERENT_VIEWS,
    "heads-6": DIFFERENT_VIEWS,
    "batch-32": DIFFERENT_VIEWS,
    "batch-256": DIFFERENT_VIEWS,
    "same": SAME_VIEWS,
    "same-1": SAME_VIEWS,
    "same-4": SAME_VIEWS,
    "same-registers-0": SAME_VIEWS,
    "dino-same": SAME_VIEWS,
    "pretrained": SAME_VIEWS,
    "supervised": SUPERVISED,
    "supervised-same": SUPERVISED,
    "depth-4": DEEPER,
    "depth-6": DEEPER,
}

# Rows whose progress over training is shown, all of them for as many epochs: name, colour, marker.
ROWS_OVER_TRAINING = {
    "different": ("different views", BLUE, "o"),
    "dino-different": ("DINO's loss, different views", PURPLE, "D"),
    "supervised": ("supervised", GREEN, "^"),
    "same": ("same views", ORANGE, "s"),
    "dino-same": ("DINO's loss, same views", VERMILLION, "v"),
}

# The rows that differ in depth only: {number of blocks: row}.
DEPTH_ROWS = {1: "depth-1", 2: "different", 3: "depth-3", 4: "depth-4", 6: "depth-6"}
DEPTH_COLORS = dict(zip(DEPTH_ROWS, colormaps["viridis"]([0.0, 0.22, 0.42, 0.62, 0.82])))
DEPTH_MARKERS = dict(zip(DEPTH_ROWS, "os^Dv"))
# Names of the maps, {in study.json: in words}; the better ones stand to the right.
MAPS = {row: name for name, row in reversed(map_claims.MAPS.items())}
# How often training images got a mark, by row: in words, colour, marker.
MARK_STYLES = {
    "different": ("never", BLUE, "o"),
    "shortcut-25": ("in 25% of the images", GREEN, "s"),
    "shortcut-50": ("in 50% of the images", ORANGE, "^"),
    "shortcut-100": ("in every image", VERMILLION, "D"),
}

SELECTIVITY_LABEL = "selectivity: density of attention\non the digit ÷ on clutter"
AUROC_LABEL = "AUROC: how often a pixel of the digit\ngets more attention than one of clutter"
FAITHFULNESS_LABEL = "patch faithfulness: rank correlation\nwith the effect of blackening a patch"
OBJECT_LABEL = "object faithfulness: rank correlation\nwith the effect of leaving out a distractor"
DENSITY_LABEL = "density of attention far from ink\n(1: as much as a uniform map)"


@dataclass(frozen=True)
class Picture:
    """How the figure of one claim names its measure and its columns."""

    y_label: str
    columns: tuple[str, ...]  # the reference first


PICTURES = {
    "F1": Picture(OBJECT_LABEL, ("brightness", "attention")),
    "F2": Picture(OBJECT_LABEL, ("same views", "different views")),
    "F3": Picture(FAITHFULNESS_LABEL, ("attention", "rollout")),
    "F4": Picture(
        "density far from ink of the head\nthat has most of it (past the ink: above 1)",
        ("no registers", "4 registers"),
    ),
    "C1": Picture(
        "accuracy of a linear probe",
        ("NCE,\nuntrained", "NCE,\ntrained", "DINO's loss,\nuntrained", "DINO's loss,\ntrained"),
    ),
    "C2": Picture(AUROC_LABEL, ("DINO's loss", "NCE")),
    "C3": Picture("selectivity: density\non the digit ÷ on clutter", ("brightness", "attention")),
    "C4": Picture(DENSITY_LABEL, ("a texture behind",)),
    "C5": Picture(SELECTIVITY_LABEL, ("same views", "different views")),
    "C6": Picture("diversity of the heads, bits", ("epoch 1", "epoch 40")),
    "C7": Picture(SELECTIVITY_LABEL, ("1 crop", "4 crops")),
    "C8": Picture(AUROC_LABEL, ("28 px", "56 px")),
    "C9": Picture(SELECTIVITY_LABEL, ("supervised", "different views")),
    "Q1": Picture(SELECTIVITY_LABEL, ("batch 32", "batch 256")),
    "Q2": Picture(
        "selectivity of the best head:\non the digit ÷ on clutter", ("3 heads", "6 heads")
    ),
    "Q3": Picture(SELECTIVITY_LABEL, ("from random\nweights", "from supervised\nweights")),
}


def draw_all(runs, folder):
    """Draw every figure that there are runs for, and save it in a folder."""
    for name, figure in all_figures(runs).items():
        figure.savefig(folder / f"{name}.png", dpi=DPI)


def all_figures(runs):
    """Return {name of the file, without .png: Figure}."""
    figures = {
        "claims": draw_claims(runs),
        "map-claims": draw_map_claims(runs),
        "selectivity-and-effect": draw_selectivity_and_effect(runs),
        "selectivity-and-faithfulness": draw_selectivity_and_faithfulness(runs),
        "training": draw_training(runs),
        "maps": draw_maps(runs),
        "direct-share": draw_direct_share(runs),
        "shortcut": draw_shortcut(runs),
    }
    for name, verdict in verdicts.judge(runs).items():
        if verdict.interval:
            figures[name] = draw_claim(runs, name, verdict)
    return {name: figure for name, figure in figures.items() if figure}


# ------------------------------------------------------------------------------ words and numbers


def sentence_case(text):
    """Return a text with a capital as its first letter."""
    return text[0].upper() + text[1:]


def in_words(text):
    """Return a text with its abbreviation in capitals, and minus signs before numbers."""
    text = text.replace("auroc", "AUROC")
    return re.sub(r"-(?=\d)", "−", text)


def with_minus(text):
    """Return a text whose hyphens are minus signs."""
    return text.replace("-", "−")


def percent(share):
    return f"{100 * share:.0f}%"


def counted(count, noun):
    """Return "1 seed", "2 seeds"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def mean_and_band(curves):
    """Return the mean of curves (seeds, points) and both ends of its 95% interval: (points,) each.

    The interval is Student's t over seeds. That of a single curve has no width.
    """
    curves = np.array(curves)
    mean = curves.mean(axis=0)
    if len(curves) == 1:
        return mean, mean, mean
    half_width = verdicts.t_half_width(curves.std(axis=0, ddof=1), len(curves))
    return mean, mean - half_width, mean + half_width


# -------------------------------------------------------------------------- all claims at a glance


@dataclass(frozen=True, kw_only=True)
class ForestLine:
    """One line of a forest plot. All numbers are places on its axis."""

    name: str
    text: str  # the claim
    quantity: str  # the primary quantity in words
    claimed: str  # in words
    null: float
    margin: tuple[float, float] | None
    word: str
    count: str  # such as "10 seeds"
    # The primary quantity and its interval. A claim without runs has none of the three.
    value: float | None
    low: float | None
    high: float | None
    numbers: str  # those three as text
    remark: str = ""  # what has to be kept in mind beside the word


def draw_claims(runs):
    """Draw every claim of the paper's study: ratios in one panel, differences in another."""
    lines = {verdicts.RATIO: [], verdicts.DIFFERENCE: []}
    remarks = verdicts.claim_remarks(runs)
    for name, verdict in verdicts.judge(runs).items():
        claim = verdicts.CLAIMS[name]
        line = claim_line(name, claim, verdict)
        lines[claim.scale].append(replace(line, remark=remarks.get(name, "")))
    panels = [
        ("ratio, on a logarithmic axis: mean and 95% interval over seeds", lines[verdicts.RATIO]),
        ("difference: mean and 95% interval over seeds", lines[verdicts.DIFFERENCE]),
    ]
    figure = draw_forest("The paper's claims, and ours on faithfulness", panels)
    if figure:
        figure.axes[0].set_xscale("log")
        set_sane_ticks(figure.axes[0].xaxis)
    return figure


def claim_line(name, claim, verdict):
    """Return the line of a claim of the paper's study. Log ratios become ratios."""
    to_axis = np.exp if claim.scale == verdicts.RATIO else float
    null = to_axis(claim.null)
    claimed = {
        verdicts.MORE: f"above {null:g}",
        verdicts.LESS: f"below {null:g}",
        verdicts.NO_LESS: f"above {with_minus(f'{null:g}')}",
        verdicts.ALIKE: "inside the margin",
    }
    margin = None
    if claim.margin is not None:
        margin = (to_axis(-claim.scaled_margin), to_axis(claim.scaled_margin))
    value = low = high = None
    numbers = ""
    if verdict.interval:
        value = to_axis(verdict.interval.mean)
        low = to_axis(verdict.interval.low)
        high = to_axis(verdict.interval.high)
        numbers = with_minus(verdicts.format_interval(claim, verdict.interval))
    return ForestLine(
        name=name,
        text=claim.text,
        quantity=in_words(claim.quantity),
        claimed=claimed[claim.expected],
        null=null,
        margin=margin,
        word=verdict.word,
        count=counted(verdict.seeds, "seed"),
        value=value,
        low=low,
        high=high,
        numbers=numbers,
    )


def draw_map_claims(runs):
    """Draw the claims about maps that have a value: means, a correlation, and an AUC."""
    means = []
    by_bootstrap = []
    for name, verdict in map_claims.judge(runs).items():
        if verdict.value is None:
            continue
        line = map_claim_line(name, map_claims.CLAIMS[name], verdict)
        if name in ("M5", "M8"):
            by_bootstrap.append(line)
        else:
            means.append(line)
    panels = [
        ("difference: mean and 95% interval over seeds", means),
        ("correlation (M5), difference of two AUC (M8): 95% interval by bootstrap", by_bootstrap),
    ]
    return draw_forest("Which map can be believed?", panels)


def map_claim_line(name, claim, verdict):
    """Return the line of a claim about maps that has a value."""
    claimed = {
        verdicts.MORE: "above 0",
        verdicts.LESS: "below 0",
        verdicts.ALIKE: "inside the margin",
        map_claims.DIFFERENT: "other than 0",
    }
    numbers = f"{verdict.value:+.3f} [{verdict.low:+.3f}, {verdict.high:+.3f}]"
    return ForestLine(
        name=name,
        text=claim.text,
        quantity=in_words(claim.quantity),
        claimed=claimed[claim.expected],
        null=0,
        margin=(-claim.margin, claim.margin),
        word=verdict.word,
        count=counted(verdict.count, "network" if name == "M8" else "seed"),
        value=verdict.value,
        low=verdict.low,
        high=verdict.high,
        numbers=with_minus(numbers),
    )


def draw_forest(topic, panels):
    """Draw panels below each other. Return None if no line has a value.

    `panels` are pairs of the words at an axis and its lines. Panels without lines are left out.
    """
    panels = [(label, lines) for label, lines in panels if lines]
    all_lines = [line for _, lines in panels for line in lines]
    if all(line.value is None for line in all_lines):
        return None
    heights = [len(lines) for _, lines in panels]
    figure = Figure(figsize=(11, 2.4 + 0.74 * len(all_lines)), layout="constrained")
    axes_of_panels = figure.subplots(len(panels), height_ratios=heights, squeeze=False)[:, 0]
    for axes, (label, lines) in zip(axes_of_panels, panels):
        for y, line in enumerate(lines):
            draw_forest_line(axes, y, line)
        # Leave some room on both sides of the widest margin.
        axes.use_sticky_edges = False
        axes.margins(x=0.08)
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.set_yticks([])
        axes.set_xlabel(label)
        axes.spines[["left", "right", "top"]].set_visible(False)
    figure.suptitle(f"{topic}\n{count_words(all_lines)}", fontsize=12)
    handles = forest_legend(all_lines)
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=SMALL)
    return figure


def draw_forest_line(axes, y, line):
    """Draw margin, null, interval and mean. Left: the claim. Right: the result."""
    if line.margin:
        left, right = line.margin
        axes.barh(y, right - left, height=0.8, left=left, color=MARGIN_COLOR)
    axes.plot([line.null, line.null], [y - 0.4, y + 0.4], color=NULL_COLOR, linewidth=1)
    result = line.word
    color = GREY
    if line.value is not None:
        color, marker = WORD_STYLES[line.word]
        inside = "white" if line.name in NOT_FRESH else color
        axes.plot([line.low, line.high], [y, y], color=color, linewidth=2)
        axes.plot(line.value, y, marker, color=color, markerfacecolor=inside, markersize=7)
        result = f"{line.numbers}  {line.word}"
    # Texts stand beside the panel: x is in widths of the panel, y in lines.
    beside = {"transform": axes.get_yaxis_transform(), "fontsize": SMALL}
    claim = textwrap.fill(f"{line.name}  {sentence_case(line.text)}", 62)
    quantity = textwrap.fill(line.quantity, 66)
    axes.text(-0.02, y, claim, ha="right", va="bottom", **beside)
    axes.text(-0.02, y + 0.02, quantity, ha="right", va="top", color=GREY, **beside)
    axes.text(1.02, y, result, ha="left", va="bottom", color=color, **beside)
    notes = [f"claimed: {line.claimed}; {line.count}"]
    notes += textwrap.wrap(in_words(line.remark), 48)
    axes.text(1.02, y + 0.02, "\n".join(notes), ha="left", va="top", color=GREY, **beside)


def count_words(lines):
    """Return how many claims have which verdict."""
    counts = Counter(line.word for line in lines)
    words = [*WORD_STYLES, verdicts.OPEN]
    parts = [f"{word}: {counts[word]}" for word in words if counts[word]]
    count = f"{counted(len(lines), 'claim')}. {sentence_case(', '.join(parts))}"
    with_remarks = sum(line.word == verdicts.HOLDS and bool(line.remark) for line in lines)
    if with_remarks:
        count += f"\n({with_remarks} of those that hold carry a reservation, given beside them)"
    return count


def forest_legend(lines):
    """Return the entries of the legend: the words that occur, hollow points, null and margin."""
    handles = []
    for word, (color, marker) in WORD_STYLES.items():
        if any(line.word == word for line in lines):
            handles.append(Line2D([], [], color=color, marker=marker, label=word))
    if any(line.name in NOT_FRESH for line in lines):
        label = "hollow: tuned for, or chosen afterwards"
        hollow = {"marker": "o", "linestyle": "", "markerfacecolor": "white"}
        handles.append(Line2D([], [], color=BLUE, label=label, **hollow))
    handles.append(Line2D([], [], color=NULL_COLOR, linewidth=1, label="null"))
    handles.append(Patch(color=MARGIN_COLOR, label="margin: not a relevant effect"))
    return handles


def set_sane_ticks(axis, count=6):
    """Put round numbers at an axis, also at a logarithmic one, without minor ticks."""
    axis.set_major_locator(MaxNLocator(count, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(lambda value, _: with_minus(f"{value:g}"))
    axis.set_minor_locator(NullLocator())


# -------------------------------------------------- selectivity and what the feature depends on


def points_of_rows(runs, x_measure, y_measure):
    """Return {row: (x, y)} of both samples, with an array of one number a run for x and for y."""
    points = {}
    for row in sorted({row for row, _ in runs}):
        base, _, _ = row.partition("-lr-")
        x = verdicts.sample(runs, row, x_measure, verdicts.BOTH)
        y = verdicts.sample(runs, row, y_measure, verdicts.BOTH)
        seeds = sorted(x.keys() & y.keys())
        if base in GROUP_OF_ROW and seeds:
            x_values = np.array([x[seed] for seed in seeds])
            points[row] = (x_values, np.array([y[seed] for seed in seeds]))
    return points


def rank_correlations(points):
    """Return the rank correlation of the means of the rows, and that of all runs."""
    means = np.array([(x.mean(), y.mean()) for x, y in points.values()])
    all_x = np.concatenate([x for x, _ in points.values()])
    all_y = np.concatenate([y for _, y in points.values()])
    return map_claims.spearman(means[:, 0], means[:, 1]), map_claims.spearman(all_x, all_y)


def correlation_title(points, more, little, less):
    """Return a title that says how two quantities go together, by their rank correlations.

    Its first line is one of three sentences: `more` and `less` are for a correlation of the rows'
    means of at least .5 and of at most −.5, `little` is for anything between. The last lines have the
    correlations within each group of at least three rows: those between all rows may be nothing but
    the difference between two groups.
    """
    of_rows, of_runs = rank_correlations(points)
    finding = little
    if of_rows >= 0.5:
        finding = more
    if of_rows <= -0.5:
        finding = less
    title = [finding, correlation_line("rank correlation", (of_rows, of_runs), len(points))]
    for group, members in points_by_group(points).items():
        if len(members) >= 3:
            title.append(correlation_line(group, rank_correlations(members), len(members)))
    return "\n".join(title)


def correlation_line(label, correlations, count):
    """Return a line of a title: correlations between `count` ways of training and between runs."""
    of_rows, of_runs = (with_minus(f"{value:.2f}") for value in correlations)
    return f"{label}: {of_rows} between {count} ways of training, {of_runs} between networks"


def points_by_group(points):
    """Return {group: {row: (x, y)}} of points, {row: (x, y)}."""
    groups = {}
    for row, values in points.items():
        base, _, _ = row.partition("-lr-")
        groups.setdefault(GROUP_OF_ROW[base], {})[row] = values
    return groups


def scatter_groups(axes, points):
    """Draw a small dot for every run and a large one for the mean of a row, coloured by group."""
    for row, (x, y) in points.items():
        base, _, _ = row.partition("-lr-")
        color, marker = GROUP_STYLES[GROUP_OF_ROW[base]]
        axes.plot(x, y, marker, color=color, markersize=4, alpha=0.45, markeredgewidth=0)
        style = {"markersize": 9, "markeredgecolor": "black", "zorder": 3}
        axes.plot(x.mean(), y.mean(), marker, color=color, **style)


def group_legend():
    """Return the entries of the legend of the groups."""
    handles = []
    for group, (color, marker) in GROUP_STYLES.items():
        style = {"marker": marker, "linestyle": "", "markersize": 9, "markeredgecolor": "black"}
        handles.append(Line2D([], [], color=color, label=group, **style))
    small = {"marker": "o", "linestyle": "", "markersize": 4, "alpha": 0.5}
    label = "small: a network, large: mean of a way of training"
    handles.append(Line2D([], [], color=GREY, label=label, **small))
    return handles


def draw_selectivity_and_effect(runs):
    """Draw whether networks whose attention is denser on the digit also depend more on it."""
    points = points_of_rows(runs, verdicts.SELECTIVITY, verdicts.CAUSAL_SELECTIVITY)
    if len(points) < 2:
        return None
    figure = Figure(figsize=(8.4, 5.4), layout="constrained")
    axes = figure.subplots()
    scatter_groups(axes, points)
    axes.set_xlabel("selectivity of attention: density on the digit ÷ on clutter")
    axes.set_ylabel(
        "causal selectivity of the feature: effect of leaving out\n"
        "a pixel of the digit ÷ a pixel of a distractor"
    )
    title = correlation_title(
        points,
        more="Where attention is denser on the digit, the feature depends more on the digit",
        little="Attention's density on the digit says little about what the feature depends on",
        less="Where attention is denser on the digit, the feature depends less on the digit",
    )
    axes.set_title(title, fontsize=11)
    figure.legend(handles=group_legend(), loc="outside lower center", ncols=3, fontsize=SMALL)
    return figure


def draw_selectivity_and_faithfulness(runs):
    """Draw whether density on the digit tells which patches of one image matter: two maps."""
    attention = points_of_rows(runs, verdicts.SELECTIVITY, verdicts.FAITHFULNESS)
    rollout = points_of_rows(runs, verdicts.ROLLOUT_SELECTIVITY, verdicts.ROLLOUT_FAITHFULNESS)
    brightness = points_of_rows(
        runs, verdicts.BRIGHTNESS_SELECTIVITY, verdicts.BRIGHTNESS_FAITHFULNESS
    )
    if len(attention) < 2:
        return None
    figure = Figure(figsize=(9.2, 5.2), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    # Brightness does not depend on the network, but the effects that it is compared with do.
    star_x = np.mean([x.mean() for x, _ in brightness.values()])
    star_y = np.mean([y.mean() for _, y in brightness.values()])
    for axes, points, name in zip(panels, (attention, rollout), ("attention", "rollout")):
        scatter_groups(axes, points)
        axes.axhline(star_y, color="black", linestyle="--", linewidth=1)
        axes.plot(star_x, star_y, "*", color="black", markersize=14, zorder=4)
        mean = with_minus(f"{np.mean([y.mean() for _, y in points.values()]):.2f}")
        axes.set_title(f"{name}: faithfulness {mean} on average", fontsize=10)
        axes.set_xlabel("selectivity of the map: density\non the digit ÷ on clutter")
    panels[0].set_ylabel(FAITHFULNESS_LABEL)
    title = correlation_title(
        attention,
        more="Attention that is denser on the digit tells better which patches of an image matter",
        little="Attention's density on the digit says little about how well it ranks patches",
        less="Attention that is denser on the digit tells worse which patches of an image matter",
    )
    figure.suptitle(title, fontsize=11)
    star = {"marker": "*", "markersize": 12, "linestyle": "--", "linewidth": 1}
    label = f"brightness: faithfulness {star_y:.2f}"
    handles = [*group_legend(), Line2D([], [], color="black", label=label, **star)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=SMALL)
    return figure


# ------------------------------------------------------------------------------- over training


def curves_of(runs, row, metric):
    """Return a metric of the mean map on validation canvases: (seeds, epochs)."""
    curves = []
    for curve in verdicts.sample(runs, row, "curve").values():
        curves.append([epoch["mean"][metric] for epoch in curve])
    return np.array(curves)


def draw_training(runs):
    """Draw three measures of attention on validation canvases by epoch, with bands over seeds."""
    names = {}
    for row, (name, _, _) in ROWS_OVER_TRAINING.items():
        if len(curves_of(runs, row, "selectivity")):
            names[row] = name
    if not names:
        return None
    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    labels = {
        "selectivity": SELECTIVITY_LABEL,
        "auroc": AUROC_LABEL,
        "diversity": "diversity of the heads, bits",
    }
    for axes, (metric, label) in zip(panels, labels.items()):
        for row in names:
            name, color, marker = ROWS_OVER_TRAINING[row]
            curves = curves_of(runs, row, metric)
            mean, low, high = mean_and_band(curves)
            epochs = np.arange(len(mean))
            axes.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
            label_of_row = f"{name} ({counted(len(curves), 'seed')})"
            style = {"color": color, "marker": marker, "markersize": 4}
            axes.plot(epochs, mean, label=label_of_row, **style)
        axes.set_xlabel("epoch (0: before training)")
        axes.xaxis.set_major_locator(MultipleLocator(2))
        axes.set_ylabel(label, fontsize=SMALL)
    ends = []
    for row, name in names.items():
        end = f"{name}: {curves_of(runs, row, 'selectivity')[:, -1].mean():.2f}"
        ends.append(end.replace(" ", NO_BREAK))
    title = f"Selectivity at the end of training. {sentence_case('; '.join(ends))}"
    figure.suptitle(textwrap.fill(title, 100), fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    handles.append(Patch(color="0.8"))
    labels.append("band: 95% interval over seeds")
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=SMALL)
    return figure


# --------------------------------------------------------------------------- maps and their depth


def values_by_depth(runs, measure):
    """Return {number of blocks: array of a measure, one entry a network}."""
    values = {}
    for depth, row in DEPTH_ROWS.items():
        of_row = verdicts.sample(runs, row, measure, map_claims.seeds_of(runs, row))
        # A network that has collapsed has no direct shares.
        measured = [value for value in of_row.values() if None not in np.atleast_1d(value)]
        if measured:
            values[depth] = np.array(measured)
    return values


def depth_label(depth, count):
    """Return such as "2 blocks (20 networks)"."""
    return f"{counted(depth, 'block')} ({counted(count, 'network')})"


def draw_maps(runs):
    """Draw how often each map picks the patch that matters more, by depth: a dot a network."""
    equal_ink = {}
    for map_name in MAPS:
        equal_ink[map_name] = values_by_depth(runs, map_claims.EQUAL_INK.format(map_name))
    depths = equal_ink["mean"]
    if not depths:
        return None
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    # The dots of a depth stand in a column of their own, within the place of their map.
    step = 0.16
    for place, map_name in enumerate(MAPS):
        for number, (depth, values) in enumerate(equal_ink[map_name].items()):
            x = place + step * (number - (len(depths) - 1) / 2)
            style = {"color": DEPTH_COLORS[depth], "marker": DEPTH_MARKERS[depth]}
            axes.scatter([x] * len(values), values, s=20, alpha=0.7, linewidths=0, **style)
            axes.plot([x - 0.05, x + 0.05], [values.mean()] * 2, color="black", linewidth=1.5)
    axes.axhline(0.5, color=NULL_COLOR, linestyle="--", linewidth=1)
    axes.set_xticks(range(len(MAPS)), MAPS.values())
    axes.set_ylabel(
        "equal ink: how often, of two patches with equal ink,\n"
        "the one with more of the map matters more"
    )
    figure.suptitle(title_of_maps(equal_ink), fontsize=11)
    handles = []
    for depth, values in depths.items():
        style = {"marker": DEPTH_MARKERS[depth], "linestyle": "", "color": DEPTH_COLORS[depth]}
        handles.append(Line2D([], [], label=depth_label(depth, len(values)), **style))
    handles.append(Line2D([], [], color="black", linewidth=1.5, label="mean"))
    handles.append(Line2D([], [], color=NULL_COLOR, linestyle="--", linewidth=1, label="chance"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=SMALL)
    return figure


def title_of_maps(equal_ink):
    """Return which map is best over all depths, and what becomes of attention with depth."""
    means = {}
    for map_name, values in equal_ink.items():
        means[map_name] = np.mean([of_depth.mean() for of_depth in values.values()])
    best = max(means, key=means.get)
    attention = []
    for depth, values in equal_ink["mean"].items():
        attention.append(f"{percent(values.mean())} with {counted(depth, 'block')}")
    lines = [
        f"Of two patches with equal ink, the map “{MAPS[best]}” picks the one that matters more",
        f"in {percent(means[best])} of pairs (mean over depths). Attention does so",
        f"in {', '.join(attention)}",
    ]
    return "\n".join(lines)


def draw_direct_share(runs):
    """Draw what part of the effects still passes through a patch's own token, block by block."""
    shares = values_by_depth(runs, "direct_share")  # {depth: (seeds, blocks)}
    if not shares:
        return None
    figure = Figure(figsize=(8.4, 5), layout="constrained")
    axes = figure.subplots()
    for depth, values in shares.items():
        mean, low, high = mean_and_band(values)
        blocks = np.arange(1, depth + 1)
        color = DEPTH_COLORS[depth]
        axes.fill_between(blocks, low, high, color=color, alpha=0.2, linewidth=0)
        label = depth_label(depth, len(values))
        # All lines begin at 1: the shorter ones are drawn on top.
        style = {"color": color, "marker": DEPTH_MARKERS[depth], "zorder": 10 - depth}
        axes.plot(blocks, mean, label=label, **style)
        axes.annotate(
            percent(mean[-1]),
            (depth, mean[-1]),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=SMALL,
            color=color,
        )
    axes.set_xticks(range(1, max(shares) + 1))
    axes.set_ylim(0, 1.08)
    axes.margins(x=0.08)
    axes.set_xlabel("block, counted from the input; a line ends at its networks' last block")
    axes.set_ylabel(
        "direct share: part of a patch's effect that\npasses through its own token at this block"
    )
    ends = []
    for depth, values in shares.items():
        ends.append(f"{percent(values[:, -1].mean())} with {counted(depth, 'block')}")
    title = [
        "What remains of a patch's effect if the change reaches the last block",
        "only through the patch's own token, which is what attention can show:",
        ", ".join(ends),
    ]
    figure.suptitle("\n".join(title), fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    handles.append(Patch(color="0.8"))
    labels.append("band: 95% interval over seeds")
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=SMALL)
    return figure


# ---------------------------------------------------------------------------------- the shortcut


def draw_shortcut(runs):
    """Draw whether a map is denser on a mark the more a network relies on it: a panel a map."""
    if not map_claims.marks_are_complete(runs):
        return None
    reliance, density = map_claims.marks(runs)
    of_rows = {row: map_claims.marks(runs, [row]) for row in map_claims.MARK_ROWS}
    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    aucs = {}
    for axes, map_name in zip(panels.flat, density):
        for row, (x, densities) in of_rows.items():
            _, color, marker = MARK_STYLES[row]
            axes.plot(x, densities[map_name], marker, color=color, alpha=0.8)
        axes.axhline(1, color=NULL_COLOR, linestyle="--", linewidth=1)
        aucs[map_name] = map_claims.auc(reliance, density[map_name])
        title = f"{MAPS[map_name]}: right in {percent(aucs[map_name])} of pairs of networks"
        axes.set_title(title, fontsize=10)
    for axes in panels[:, 0]:
        axes.set_ylabel("density of the map on the mark")
    for axes in panels[-1]:
        axes.set_xlabel("reliance: effect of the mark on the feature\n÷ effect of another image")
    title = (
        "Of two networks, does the one whose map is denser on the mark rely more on it?\n"
        f"Rollout is right in {percent(aucs['rollout'])} of pairs, "
        f"attention in {percent(aucs['mean'])}"
    )
    verdict = map_claims.judge(runs)["M8"]
    if verdict.value is not None:
        title += f"; M8, rollout better than attention: {verdict.word}"
    figure.suptitle(title, fontsize=11)
    handles = []
    for row, (name, color, marker) in MARK_STYLES.items():
        count = len(of_rows[row][0])
        label = f"mark {name} ({counted(count, 'network')})"
        style = {"marker": marker, "linestyle": "", "color": color}
        handles.append(Line2D([], [], label=label, **style))
    uniform = {"color": NULL_COLOR, "linestyle": "--", "linewidth": 1}
    handles.append(Line2D([], [], label="a uniform map", **uniform))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=SMALL)
    return figure


# ------------------------------------------------------------------------------------ one claim


def draw_claim(runs, name, verdict):
    """Draw the two sides of a claim with a dot per run, and beside them what is tested."""
    claim = verdicts.CLAIMS[name]
    tested = verdicts.primary(runs, claim)
    pairs = sides_to_draw(name)
    count = sum(len(pair) for pair in pairs)
    figure = Figure(figsize=(5.4 + 1.1 * count, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5 + count, 2))
    if name == "C6":
        draw_heads_over_training(left, runs)
    else:
        draw_sides(left, runs, pairs, tested)
        left.set_xticks(range(count), PICTURES[name].columns)
        left.set_xlim(-0.5, count - 0.5)
    left.set_ylabel(PICTURES[name].y_label, fontsize=9)
    left.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    if name in ("F4", "C4"):
        left.axhline(1, color=NULL_COLOR, linewidth=1)
    draw_test(right, claim, tested, verdict)
    figure.suptitle(
        title_of_claim(name, verdict, width=int(11 * figure.get_figwidth())), fontsize=10
    )
    return figure


def title_of_claim(name, verdict, width):
    """Return the claim, its primary quantity, and the result: lines of at most `width` letters."""
    claim = verdicts.CLAIMS[name]
    numbers = with_minus(verdicts.format_interval(claim, verdict.interval))
    lines = [
        textwrap.fill(f"{name}. {sentence_case(claim.text)}: {verdict.word}", width),
        textwrap.fill(sentence_case(in_words(claim.quantity)), width),
        f"{numbers}, {counted(verdict.seeds, 'seed')}",
    ]
    return "\n".join(lines)


def sides_to_draw(name):
    """Return the sides of a claim in pairs, in each the reference first."""
    claim = verdicts.CLAIMS[name]
    if claim.reference is None:
        return [[claim.compared]]
    pairs = [[claim.reference, claim.compared]]
    if claim.alternative:
        compared, reference = claim.alternative
        pairs.append([reference, compared])
    # No head looks past the ink in either row of F4. Shares that are all zero show nothing, so
    # the density of the most stray head is drawn instead.
    if name == "F4":
        pairs = [[verdicts.Side(side.row, verdicts.MOST_STRAY_HEAD) for side in pairs[0]]]
    return pairs


def draw_sides(axes, runs, pairs, seeds):
    """Draw each side as a column of dots with its mean, and join the dots of a seed and a pair."""
    x = 0
    for pair in pairs:
        columns = [verdicts.sample(runs, side.row, side.measure, seeds) for side in pair]
        places = range(x, x + len(pair))
        for seed in seeds:
            values = [column.get(seed, np.nan) for column in columns]
            axes.plot(places, values, color="0.8", linewidth=1)
        for place, column in zip(places, columns):
            values = list(column.values())
            axes.plot([place] * len(values), values, "o", color=BLUE, alpha=0.5)
            mean = np.mean(values)
            axes.plot([place - 0.18, place + 0.18], [mean, mean], color="black", linewidth=2)
        x += len(pair)


def draw_heads_over_training(axes, runs):
    """Draw the diversity of the heads in the long runs: a thin line a seed, mean and band."""
    curves = curves_of(runs, "different-long", "diversity")
    mean, low, high = mean_and_band(curves)
    epochs = np.arange(len(mean))
    axes.fill_between(epochs, low, high, color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(epochs, curves.T, color="0.7", linewidth=1)
    axes.plot(epochs, mean, color=BLUE, linewidth=2)
    # The two epochs that the claim compares.
    axes.plot([1, epochs[-1]], [mean[1], mean[-1]], "o", color="black")
    axes.set_xlabel(
        f"epoch; grey: a seed, band: 95% interval\ndots: the epochs compared, 1 and {epochs[-1]}",
        fontsize=SMALL,
    )


def draw_test(axes, claim, tested, verdict):
    """Draw the primary quantity of each seed, its mean and interval, the null and the margin."""
    line = claim_line("", claim, verdict)
    values = np.array(list(tested.values()))
    if claim.scale == verdicts.RATIO:
        values = np.exp(values)
        axes.set_yscale("log")
    color, marker = WORD_STYLES[verdict.word]
    if line.margin:
        axes.axhspan(*line.margin, color=MARGIN_COLOR)
    axes.axhline(line.null, color=NULL_COLOR, linewidth=1)
    axes.plot([0] * len(values), values, "o", color=BLUE, alpha=0.5)
    axes.plot([0.5, 0.5], [line.low, line.high], color=color, linewidth=2)
    axes.plot(0.5, line.value, marker, color=color, markersize=7)
    axes.set_xticks([0, 0.5], ["each\nseed", "mean,\n95%"])
    axes.set_xlim(-0.3, 0.8)
    axes.set_xlabel(f"claimed: {line.claimed}\nline: null; grey: margin", fontsize=SMALL)
    axes.set_ylabel("ratio" if claim.scale == verdicts.RATIO else "difference")
    set_sane_ticks(axes.yaxis)
    # If all seeds are alike, other ticks would mark differences that nobody has seen.
    if np.ptp(values) == 0:
        axes.set_yticks([values[0]])
