"""What the lines of study.json come to: one primary test and one word for every claim.

The plan, plan.md, was written before the first run. A primary quantity is a log ratio, or a
difference, of two numbers of runs with the same seed; its mean over seeds has a 95% interval of
Student's t, and the interval gives the word. Everything else on the pages describes.
"""

import itertools
import math

import numpy as np
from scipy import stats

FRESH = range(10, 20)  # seeds that nobody had seen
SECOND = range(30, 60)  # a second sample, for claims that the first left undecided (plan.md)
BOTH = (*FRESH, *SECOND)
AGAIN = ("F1", "F2", "C8", "Q2")
LEAST = 5  # seeds that a first word needs; it is "so far" until a claim has all of its seeds
PLANNED = {"C6": 5}  # of the other claims: all fresh seeds
BATCHES = {"batch-32": 32, "batch-256": 256}
SEARCHED = {"same": "auroc", "dino-same": "auroc"} | dict.fromkeys(BATCHES, "selectivity")
AUROC, SELECTIVITY = "matched/mean/auroc", "matched/mean/selectivity"
FAITHFUL = "matched/mean/patch_faithfulness"
BRIGHTNESS, ROLLOUT = FAITHFUL.replace("mean", "brightness"), FAITHFUL.replace("mean", "rollout")
PROBE = "features/linear_probe"
# What is claimed, and the primary quantity, in words.
SAYS = {
    "F1": (
        "attention points to what the feature depends on, better than brightness does",
        "patch faithfulness, attention − brightness, different views",
    ),
    "F2": (
        "with different views it does so better than with same views",
        "patch faithfulness of attention, different − same views",
    ),
    "F3": (
        "attention rollout does so at least as well",
        "patch faithfulness, rollout − attention, different views",
    ),
    "F4": (
        "registers mend heads that look past the ink",
        "share of heads past the ink, 4 registers − none, different views",
    ),
    "C1": (
        "both losses classify (figures 2, 3)",
        "linear probe ÷ that of the untrained network, the weaker loss",
    ),
    "C2": (
        "NCE's maps read better than cross-entropy's",
        "auroc, NCE ÷ DINO's loss, same views, each at its best learning rate",
    ),
    "C3": (
        "same views: all ink is attended alike, but for its brightness (figure 4)",
        "selectivity, same views ÷ brightness",
    ),
    "C4": (
        "same views: a textured background is ignored (figure 5)",
        "density of attention on far background, a texture a canvas",
    ),
    "C5": ("different views find the digit (figure 6)", "selectivity, different ÷ same views"),
    "C6": (
        "heads part with time (section III.B)",
        "diversity of the heads, bits, epoch 40 − epoch 1, different views",
    ),
    "C7": (
        "4, 2 or 1 crops make no difference (section III.C)",
        "selectivity, 4 ÷ 1 crop, same views, as many canvases",
    ),
    "C8": (
        "a higher resolution gives better maps (section III)",
        "auroc, 56 ÷ 28 px, different views",
    ),
    "C9": (
        "self-supervised maps beat supervised ones (section I)",
        "selectivity, different views ÷ supervised",
    ),
    "Q1": (
        "a larger batch helps (asked in section IV)",
        "selectivity, batch 256 ÷ 32, each at its best learning rate",
    ),
    "Q2": ("more heads help (asked in section IV)", "selectivity of the best head, 6 ÷ 3 heads"),
    "Q3": (
        "other pre-training helps (asked in section IV)",
        "selectivity, same views from supervised weights ÷ from random ones",
    ),
}
LONG = "different-long"
# Its two numbers, (row, number), None for 1; whether they are subtracted or divided; what is
# claimed of that, and with which margin. "best" rows are those of the learning rate that the search
# on seed 0 chose; of two rows, a|b, the one with the lower mean counts.
CLAIMS = {
    "F1": (("different", FAITHFUL), ("different", BRIGHTNESS), "difference", ">", 0.02),
    "F2": (("different", FAITHFUL), ("same", FAITHFUL), "difference", ">", 0.02),
    "F3": (("different", ROLLOUT), ("different", FAITHFUL), "difference", "> −margin", 0.02),
    "F4": (("different", "past"), ("different-registers-0", "past"), "difference", "<", None),
    "C1": (("same|dino-same", PROBE), ("", f"untrained_{PROBE}"), "ratio", ">", None),
    "C2": (("best same", AUROC), ("best dino-same", AUROC), "ratio", ">", 0.05),
    "C3": (("same", SELECTIVITY), ("same", "matched/brightness/selectivity"), "ratio", "=", 0.1),
    "C4": (("texture", "matched/mean/far_background_density"), None, "ratio", "<", None),
    "C5": (("different", SELECTIVITY), ("same", SELECTIVITY), "ratio", ">", 0.1),
    "C6": ((LONG, "diversity at the end"), (LONG, "diversity, epoch 1"), "difference", ">", 0.05),
    "C7": (("same-4", SELECTIVITY), ("same-1", SELECTIVITY), "ratio", "=", 0.2),
    "C8": (("different", AUROC), ("size-28", AUROC), "ratio", ">", 0.05),
    "C9": (("different", SELECTIVITY), ("supervised", SELECTIVITY), "ratio", ">", 0.1),
    "Q1": (("best batch-256", SELECTIVITY), ("best batch-32", SELECTIVITY), "ratio", ">", 0.1),
    "Q2": (("heads-6", "best head"), ("different", "best head"), "ratio", ">", 0.1),
    "Q3": (("pretrained", SELECTIVITY), ("same", SELECTIVITY), "ratio", ">", 0.1),
}


def number(line, name):
    """A number of a line of study.json, by its path or by one of these names."""
    matched = line["matched"]
    if name == "best head":  # on validation canvases
        return matched[line["best_head"]]["selectivity"]
    if name in ("past", "stray"):
        heads = [cells for row, cells in matched.items() if row.startswith("head_")]
        far = np.array([cells["far_background_density"] for cells in heads])
        return np.mean(far > 1) if name == "past" else far.max()
    if name.startswith("diversity"):
        return line["curve"][1 if name.endswith("1") else -1]["mean"]["diversity"]
    for key in name.split("/"):
        line = line[key]
    return line


def sample(runs, row, name, seeds=FRESH):
    """{seed: number} of a row's runs that there are."""
    row = best_row(runs, row[5:]) if row.startswith("best ") else row
    return {seed: number(runs[row, seed], name) for seed in seeds if (row, seed) in runs}


def rates(runs, row):
    """The search of a row's learning rate, on seed 0: {factor: number on validation canvases}."""
    found = {}
    for name, seed in runs:
        base, _, factor = name.partition("-lr-")
        if base == row and seed == 0:
            last = runs[name, 0]["curve"][-1]["mean"]
            found[float(factor or 1)] = last[SEARCHED[row]]
    return dict(sorted(found.items()))


def rate_row(row, factor):
    return row if factor == 1 else f"{row}-lr-{factor:g}"


def best_row(runs, row):
    """The row with the best rate, if it is between others that are worse; else None."""
    found = rates(runs, row)
    best = max(found, key=found.get, default=None)
    return rate_row(row, best) if found and min(found) < best < max(found) else None


def primary(runs, claim):
    """{seed: log ratio or difference} of a claim: of its second sample, once that is complete."""
    second = primary_of(runs, claim, SECOND) if claim in AGAIN else ()
    return second if len(second) == len(SECOND) else primary_of(runs, claim, FRESH)


def primary_of(runs, claim, seeds):
    """The same of these seeds alone."""
    (rows, name), base, kind, *_ = CLAIMS[claim]
    found = []
    for row in rows.split("|"):
        over = sample(runs, row, name, seeds)
        under = sample(runs, base[0] or row, base[1], seeds) if base else dict.fromkeys(over, 1)
        pairs = {seed: (over[seed], under[seed]) for seed in sorted(over.keys() & under.keys())}
        ratio = kind == "ratio"
        found.append({s: math.log(x / y) if ratio else x - y for s, (x, y) in pairs.items()})
    return min(found, key=lambda each: np.mean([*each.values()]) if each else -math.inf)


def interval(values):
    """Mean and 95% interval of Student's t."""
    values = np.array([*values])
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return values.mean(), values.mean() - half, values.mean() + half


def bounds(claim):
    """Null, and margin either side of no effect (None without one), on the scale of `primary`."""
    *_, kind, claimed, margin = CLAIMS[claim]
    margin = math.log(1 + margin) if margin and kind == "ratio" else margin
    return -margin if claimed == "> −margin" else 0, margin


def word(claim, low, high):
    """What an interval says of a claim."""
    claimed, (null, margin) = CLAIMS[claim][3], bounds(claim)
    if claimed == "=":
        inside, outside = -margin < low and high < margin, low > margin or high < -margin
        return "holds" if inside else "the contrary holds" if outside else "undecided"
    if low > null or high < null:
        return "holds" if (low > null) == (claimed[0] == ">") else "the contrary holds"
    return "no relevant effect" if margin and -margin < low and high < margin else "undecided"


def seeds_needed(claim, values):
    """How many seeds, up to 100, would decide if mean and scatter stayed, and to which word."""
    mean, std = np.mean(values), np.std(values, ddof=1)
    for n in range(len(values), 101):
        half = stats.t.ppf(0.975, n - 1) * std / n**0.5
        if (found := word(claim, mean - half, mean + half)) != "undecided":
            return n, found
    return None, None


def flips(values):
    """Exact p, one-sided, that the mean is above 0: the share of all signs that do as well.

    Of more than 16 values, that of 65,536 random signs.
    """
    signs = {"permutation_type": "samples", "n_resamples": 2**16, "rng": 0}
    return stats.permutation_test((values,), np.mean, alternative="greater", **signs).pvalue


def p_values(claim, values):
    """p by t, and by flipping all signs, one-sided and doubled: below .05 where the interval ends.

    That the mean is not the null, on either side; of a claim of no difference, that it is inside
    the margin, for which both sides have to be shown.
    """
    (null, margin), values = bounds(claim), np.array(values)
    if np.ptp(values) == 0:  # no scatter to hold a mean against
        return [1.0, 1.0]
    equal = CLAIMS[claim][3] == "="
    shifted = [values + margin, margin - values] if equal else [values - null, null - values]
    t = [stats.ttest_1samp(x, 0, alternative="greater").pvalue for x in shifted]
    both = max if equal else min
    return [min(1.0, 2 * both(p)) for p in (t, [flips(x) for x in shifted])]


def judge(runs):
    """{claim: its values, mean, interval, word, p by t (Holm over all claims) and by flips}."""
    found = {}
    for claim in CLAIMS:
        values = [*primary(runs, claim).values()]
        found[claim] = {"seeds": len(values), "word": "open"}
        if len(values) >= LEAST:
            mean, low, high = interval(values)
            found[claim] |= {"mean": mean, "low": low, "high": high, "word": word(claim, low, high)}
            if found[claim]["word"] == "undecided":
                found[claim]["needed"] = seeds_needed(claim, values)
            found[claim]["p"], found[claim]["exact"] = p_values(claim, values)
    ranked, least = sorted((c for c in found if "p" in found[c]), key=lambda c: found[c]["p"]), 0
    for rank, claim in enumerate(ranked):
        least = max(least, min(1, found[claim]["p"] * (len(CLAIMS) - rank)))
        found[claim]["holm"] = least
    return found


def shown(claim, x):
    """A value of `primary` as a page shows it: ratios as ratios."""
    return f"{math.exp(x):.2f}" if CLAIMS[claim][2] == "ratio" else f"{x:+.3f}"


def shown_interval(claim, mean, low, high):
    return f"{shown(claim, mean)} [{shown(claim, low)}, {shown(claim, high)}]"


def small(p):
    return "< .001" if p < 0.001 else f"{p:.3f}"


def verdict_table(runs, figures):
    """The table of both READMEs: a line a claim."""
    lines = ["| | claim | | primary quantity | mean [95%] | seeds | p (Holm), by flips | |"]
    lines.append("|" + "---|" * 8)
    for claim, r in judge(runs).items():
        says, what = SAYS[claim]
        verdict, cells = f"**{r['word']}**", ["–", str(r["seeds"]), "–", "–"]
        if "mean" in r:
            cells[0] = shown_interval(claim, r["mean"], r["low"], r["high"])
            if r["seeds"] == len(SECOND):
                first = interval(primary_of(runs, claim, FRESH).values())
                cells[0] += f"; first ten: {shown_interval(claim, *first)}"
            both = f"{small(r['holm'])}, {small(r['exact'])}"
            cells[2:] = both, f"[figure]({figures}{claim}.png)"
            verdict += " so far" * (r["seeds"] < PLANNED.get(claim, len(FRESH)))
            n, then = r.get("needed", (None, None))
            if r["word"] == "undecided":
                never = "100 seeds would not do" if r["low"] < r["high"] else "all seeds alike"
                verdict += f" (as it is, {n} seeds: {then})" if n else f" ({never})"
            shown_by = {r["word"] not in ("undecided", "no relevant effect"), r["holm"] < 0.05}
            verdict += " ¹" * (len(shown_by | {r["exact"] < 0.05}) > 1)
        lines.append(f"| {' | '.join([claim, says, verdict, what, *cells])} |")
    note = "¹ the word, p corrected by Holm for sixteen claims, and p by flips do not agree at 5%."
    return "\n".join([*lines, "", note])


# The descriptions: numbers of every row, as means with intervals.
COLUMNS = {
    "selectivity": SELECTIVITY,
    "of the oracle": "matched/mean/of_oracle",
    "auroc": AUROC,
    "pointing": "matched/mean/pointing",
    "best head": "best head",
    "past the ink": "past",
    "most stray head": "stray",
    "k-NN": "features/knn",
    "probe": PROBE,
}
FAITHFULNESS = {
    "attention": FAITHFUL,
    "brightness": BRIGHTNESS,
    "rollout": ROLLOUT,
    "untrained": FAITHFUL.replace("mean", "untrained"),
    "attention, objects": "matched/mean/object_faithfulness",
    "size, objects": "matched/ink/object_faithfulness",
    "causal selectivity": "causal_selectivity",
    "two canvases": "attention_matters/two_canvases",
    "even: cosine": "attention_matters/even/cosine",
    "swapped: cosine": "attention_matters/swapped/cosine",
    "even: k-NN": "attention_matters/even/knn",
}


# Both layouts: in the paper's, digits lie more in the middle, and position pays.
LAYOUTS = {
    f"{metric} of {row}, {layout}": f"{layout}/{row}/{metric}"
    for metric, row in itertools.product(("selectivity", "auroc"), ("mean", "shuffled"))
    for layout in ("matched", "paper")
}
METRICS = {
    f"{name} density": f"matched/mean/{name}_density"
    for name in ("digit", "clutter", "background", "far_background")
} | {name: f"matched/mean/{name}" for name in ("jaccard60", "entropy", "diversity")}


def row_table(runs, columns):
    """Means with 95% intervals over fresh seeds, a line a row."""
    lines = [f"| row | seeds | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 2)]
    for row in dict.fromkeys(name for name, seed in sorted(runs) if seed in FRESH):
        cells = [f"`{row}`", str(len(sample(runs, row, SELECTIVITY)))]
        for name in columns.values():
            values = [*sample(runs, row, name).values()]
            mean, low, high = interval(values) if len(values) > 1 else (values[0], None, None)
            cells.append(f"{mean:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low is not None else ""))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def paper_scale(runs):
    """The rows of the paper's preset, and the device of each."""
    if not runs:
        return "None has been run: `python results/study.py --preset paper`, with a GPU."
    devices = [f"`{row}`: {line['device']}" for (row, _), line in sorted(runs.items())]
    keys = ("selectivity", "auroc", "k-NN", "attention", "brightness", "rollout")
    columns = {key: (COLUMNS | FAITHFULNESS)[key] for key in keys}
    return f"{row_table(runs, columns)}\n\nDevices: {'; '.join(devices)}."


def reference_table(runs):
    """What maps that are no network's attention earn, on the same canvases."""
    names = ("selectivity", "auroc", "patch_faithfulness")
    lines = ["| map | selectivity | auroc | patch faithfulness |", "|---|---|---|---|"]
    for row in ("brightness", "ink", "oracle"):
        samples = [sample(runs, "different", f"matched/{row}/{name}").values() for name in names]
        cells = [f"{np.mean([*values]):.2f}" for values in samples]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sample_table(runs):
    """What both samples found of the claims of which the second has all runs."""
    lines = ["| claim | seeds 10 to 19 | seeds 30 to 59 |", "|---|---|---|"]
    for claim in CLAIMS:
        both = [primary_of(runs, claim, seeds).values() for seeds in (FRESH, SECOND)]
        if len(both[1]) == len(SECOND):
            cells = [shown_interval(claim, *interval(values)) for values in both]
            lines.append(f"| {claim}, {SAYS[claim][1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def search_table(runs):
    """The searches over learning rates, on seed 0."""
    lines = ["| row | by | learning rate × : value | best |", "|---|---|---|---|"]
    for row, by in SEARCHED.items():
        found = "; ".join(f"{factor:g}: {value:.3f}" for factor, value in rates(runs, row).items())
        lines.append(f"| `{row}` | {by} | {found} | {best_row(runs, row) or 'not bracketed yet'} |")
    return "\n".join(lines)


def blocks(study, figures):
    """{name: text} for the marked places of the pages."""
    runs = study["laptop"]
    tables = {"rows": row_table(runs, COLUMNS), "faithfulness": row_table(runs, FAITHFULNESS)}
    tables |= {"layouts": row_table(runs, LAYOUTS), "metrics": row_table(runs, METRICS)}
    tables |= {"searches": search_table(runs), "references": reference_table(runs)}
    tables |= {"samples": sample_table(runs), "paper scale": paper_scale(study["paper"])}
    return tables | {"verdicts": verdict_table(runs, figures)}


def fill(page, texts):
    """A page with the text between <!-- name --> and <!-- end --> made anew."""
    for name, text in texts.items():
        start, found, rest = page.partition(f"<!-- {name} -->\n")
        if found:
            page = f"{start}{found}{text}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return page
