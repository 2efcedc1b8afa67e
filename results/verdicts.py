"""What the lines of study.json come to: a table and a verdict for every claim.

Numbers are means over seeds, each over the same 1,000 test canvases, with 95% intervals of
Student's t. Rows are compared by the ratios of their numbers with the same seed: mean, interval and
t-test are those of the logarithm. That a ratio is alike, within 10% of 1, has to be shown as well,
by two one-sided t-tests. All tests of the page together are corrected by Holm.
"""

import numpy as np
from scipy import stats

MARGIN = (0.9, 1.1)  # ratios that count as alike
LEVEL = 0.05  # of p, after the correction
BATCHES, RATES = (32, 96, 256, 1024), (0.5, 1, 2)  # rates: times the batch's default
CLAIMS = {  # what the paper says or asks, and which of its tests stands for it
    "C1": ("NCE and cross-entropy both classify well (figures 2, 3)", 0),
    "C2": ("NCE gives attention that people can read better than cross-entropy", 0),
    "C3": ("same views: all white pixels are attended, digit and distractors alike (figure 4)", 3),
    "C4": ("same views: a textured background is ignored (figure 5)", 0),
    "C5": ("different views: the digit is found and distractors ignored, early on (figure 6)", 0),
    "C6": ("after 10 epochs the loss still falls but heads part, some to distractors", 1),
    "C7": ("4, 2 or 1 crops make no significant difference", 0),
    "C8": ("higher resolution gives better maps", 0),
    "Q1": ("a larger batch helps (asked)", 2),
    "Q2": ("more heads help (asked)", 3),
    "Q3": ("other pre-training helps (asked)", 0),
}

# Rows of the grid by their titles in tables and figures
LOSSES = {"NCE, same": "same-2", "cross-entropy, same": "dino-same"}
LOSSES |= {"NCE, different": "different-1", "cross-entropy, different": "dino-different"}
VIEWS = {"same, 1 crop": "same-1", "same, 2 crops": "same-2", "same, 4 crops": "same-4"}
VIEWS |= {"different, 1 crop": "different-1", "different, 2 crops": "different-2"}
TEXTURES = {"a texture a canvas": "texture", "ten textures in all": "texture-pool"}
CROPS = {"same, 1": "same-1-images", "same, 2": "same-2-images", "same, 4": "same-4"}
CROPS |= {"different, 1": "different-1-images", "different, 2": "different-2"}
CROPS |= {"different, 4": "different-4-images"}  # all of the same number of canvases
SIZES = {"28 px": "size-28", "56 px": "different-1", "84 px": "size-84"}
HEADS = {"1": "heads-1", "2": "heads-2", "3": "different-1", "6": "heads-6", "12": "heads-12"}
LENGTHS = {"C5: 500 steps": "different-1", "C5: 2,000 steps": "different-long"}
LOOKS = {"C5: different views": "different-1", "C5: learning rate × 3": "look-different-lr"}
LOOKS |= {"C5: four times as long": "different-long"}
LOOKS |= {"C4: a texture a canvas": "texture", "C4: learning rate × 3": "look-texture-lr"}
LOOKS |= {"C4: temperature 0.1": "look-texture-temperature"}
LOOKS |= {"C4: four times as long": "look-texture-long"}
LOOKS |= {"C4: 4 crops, as the paper's": "look-texture-crops"}
LOOKS |= {"C8: 84 px": "size-84", "C8: twice as long": "look-size-84-long"}
LOOKS |= {"C1, C2: cross-entropy": "dino-same", "C1, C2: learning rate × 3": "look-dino-lr"}
LOOKS |= {"C1, C2: four times as long": "look-dino-long"}
LOOKS |= {"C1, C2: NCE four times as long": "same-long"}
REFERENCES, STAGES = {}, {}
for name in ("brightness", "shuffled", "ink", "untrained"):  # what a network has to beat
    REFERENCES[f"reference: {name}"] = f"same-2 of {name}"
NETWORK = {"network": "", "its maps shuffled": " of shuffled", "brightness": " of brightness"}
for steps, epoch in ((50, 1), (250, 5), (500, 10)):
    for name, of in NETWORK.items():
        STAGES[f"after {steps} steps: {name}"] = f"different-1{of} at epoch {epoch}"
EPOCHS = {str(epoch): f"different-long at epoch {epoch}" for epoch in (1, 2, 5, 10)}

# Numbers, as of `number`, by the titles that they have in tables and tests
TITLES = {"untrained": "k-NN of untrained", "jaccard60 ÷ best": "jaccard60 ÷ best_jaccard"}
TITLES |= {"clutter density": "clutter_density", "far from ink": "far_background_density"}
TITLES |= {"training loss": "loss", "mean map": "selectivity", "auroc of the mean map": "auroc"}
TITLES |= {"diversity, bits": "diversity", "diversity of the heads": "diversity"}
for name in ("digit", "clutter", "far_background"):
    for title in ("", "density on "):
        TITLES[f"{title}{name.replace('_', ' ')}"] = f"{name}_density"
for head in ("most selective head", "least selective head", "best head"):
    TITLES[head] = f"selectivity of the {head}"
SHARES = {}
for title, head in (("most selective head", "most"), ("least", "least")):
    for region in ("digit", "clutter", "background"):
        SHARES[f"{title}, on {region}"] = f"{region}_share of the {head} selective head"
TITLES |= SHARES
PERCENT = ["k-NN", "untrained", "linear probe", *SHARES, "heads past the ink"]
MAPS = ["selectivity", "auroc", "pointing"]
COURSE = ["training loss", "diversity, bits", "most selective head", "least selective head"]
TABLES = {  # of each claim: rows, columns
    "C1": (LOSSES, ["k-NN", "untrained", "linear probe"]),
    "C2": (LOSSES, ["selectivity", "auroc", "jaccard60 ÷ best"]),
    "C3": (VIEWS | REFERENCES, MAPS),
    "C4": ({"black": "same-2"} | TEXTURES, ["digit", "clutter", "far background", "selectivity"]),
    "C5": (STAGES, MAPS, "validation canvases"),
    "C6": (EPOCHS, COURSE, "after epoch"),
    "C7": (CROPS, MAPS),
    "C8": (SIZES, ["jaccard60 ÷ best", "jaccard60", "best_jaccard", "auroc", "selectivity"]),
    "Q2": (HEADS, ["best head", "mean map", "auroc of the mean map", "diversity, bits", "k-NN"]),
}

# The tests that decide: claim, number, case, what is claimed of the ratio, over ÷ under. A claim
# holds if all of its tests come out as claimed, in part if some do.
OTHERS = {"of brightness": "that of brightness", "of shuffled": "that of its maps shuffled"}
OTHERS |= {"of untrained": "that of the untrained network", "of an even map": "an even map's"}
OTHERS |= {"of one half": "50%", "same-2": "that of same views (2 crops)"}
EVEN = "different-long of an even map"
EARLY, LATE = "different-1 at epoch 1", "different-long at epoch 10"
TESTS = [
    ("C3", "clutter density", "same views, 2 crops", ">", "same-2", "of an even map"),
    ("C3", "clutter density", "same views, 4 crops", ">", "same-4", "of an even map"),
    ("C3", "selectivity", "same views, 1 crop", "≈", "same-1", "of brightness"),
    ("C3", "selectivity", "same views, 2 crops", "≈", "same-2", "of brightness"),
    ("C3", "selectivity", "same views, 4 crops", "≈", "same-4", "of brightness"),
    ("C3", "selectivity", "different ÷ same views: 1 crop", ">", "different-1", "same-1"),
    ("C3", "selectivity", "different ÷ same views: 2 crops", ">", "different-2", "same-2"),
    *[("C5", name, "at the end", ">", "different-1", "of brightness") for name in MAPS],
    *[("C5", name, "after the first 50 steps", ">", EARLY, "of brightness") for name in MAPS],
    ("C5", "selectivity", "at the end", ">", "different-1", "same-2"),
    ("C5", "selectivity", "at the end", ">", "different-1", "of shuffled"),
    ("C5", "clutter density", "at the end", "<", "different-1", "of an even map"),
    ("C6", "training loss", "tenth ÷ ninth epoch", "<", LATE, "different-long at epoch 9"),
    ("C6", "diversity of the heads", "tenth ÷ first epoch", ">", LATE, "different-long at epoch 1"),
    ("C6", "selectivity of the least selective head", "at the end", "<", "different-long", EVEN),
    ("C8", "jaccard60 ÷ best_jaccard", "56 ÷ 28 px", ">", "different-1", "size-28"),
    ("C8", "jaccard60 ÷ best_jaccard", "84 ÷ 56 px", ">", "size-84", "different-1"),
    ("C8", "auroc", "56 ÷ 28 px", ">", "different-1", "size-28"),
    ("C8", "auroc", "84 ÷ 56 px", ">", "size-84", "different-1"),
    ("Q2", "selectivity of the best head", "2 ÷ 1 head", ">", "heads-2", "heads-1"),
    ("Q2", "selectivity of the best head", "3 ÷ 2 heads", ">", "different-1", "heads-2"),
    ("Q2", "selectivity of the best head", "6 ÷ 3 heads", ">", "heads-6", "different-1"),
    ("Q2", "selectivity of the best head", "12 ÷ 6 heads", ">", "heads-12", "heads-6"),
]
for less, more in (("32", "96"), ("96", "256"), ("256", "1024")):
    case = f"batch {more} ÷ {less}, each at its best rate"
    TESTS.append(("Q1", "selectivity", case, ">", f"batch-{more}", f"batch-{less}"))
for name, other in (("k-NN", "of untrained"), ("linear probe", "of one half")):
    for title in sorted(LOSSES, key=lambda title: title.split(",")[0]):  # NCE first
        TESTS.append(("C1", name, title, ">", LOSSES[title], other))
for views in ("same", "different"):
    rows = LOSSES[f"NCE, {views}"], LOSSES[f"cross-entropy, {views}"]
    for name in ("selectivity", "auroc", "jaccard60 ÷ best_jaccard"):
        TESTS.append(("C2", name, f"NCE ÷ cross-entropy: {views} views", ">", *rows))
    for more, fewer in (("4", "2 crops"), ("4", "1 crop"), ("2", "1 crop")):
        rows = CROPS[f"{views}, {more}"], CROPS[f"{views}, {fewer[0]}"]
        TESTS.append(("C7", "selectivity", f"{more} ÷ {fewer}: {views} views", "≈", *rows))
for title, row in TEXTURES.items():
    for region, wanted in (("far background", "<"), ("digit", ">"), ("clutter", ">")):
        TESTS.append(("C4", f"density on {region}", title, wanted, row, "of an even map"))


def all_heads(maps):
    """Of the maps of a run, those of its heads, the most selective one first."""
    heads = [cells for name, cells in maps.items() if name.startswith("head_") and cells]
    return sorted(heads, key=lambda cells: -cells["selectivity"])


def number(line, name):
    """A number of a run, a line of study.json: "auroc" is of the mean map on test canvases,
    "auroc of brightness at epoch 1" of another on validation canvases; nan if there is none.
    """
    metric, _, epoch = name.partition(" at epoch ")
    metric, _, which = metric.partition(" of ")
    maps = line["curve"][int(epoch)] if epoch else line["matched"]
    heads = all_heads(maps) or [{}]
    if which.endswith("an even map") or which == "one half":
        return 0.5 if which == "one half" else 1
    if metric in ("k-NN", "linear probe"):
        features = line["untrained_features" if which else "features"]
        return features["knn" if metric == "k-NN" else "linear_probe"]
    if metric == "heads past the ink":
        return np.mean([head["digit_density"] < 1 for head in heads])
    if metric == "jaccard60 ÷ best_jaccard":
        return number(line, "jaccard60") / number(line, "best_jaccard")
    if metric in maps:  # a loss, which is of no map
        return maps[metric]
    maps = maps | {"": maps["mean"], "the best head": maps.get(line["best_head"], {})}
    maps |= {"the most selective head": heads[0], "the least selective head": heads[-1]}
    return maps.get(which, {}).get(metric, np.nan)


def best_rates(runs):
    """{title: row} of each batch with all rates tried: the most selective of its rows."""
    best = {}
    for batch in BATCHES:
        lines = [runs.get((f"batch-{batch}-lr-{rate}", 0)) for rate in RATES]
        if all(lines):  # by validation canvases, so that those of the test have no part in it
            row = max(lines, key=lambda line: line["curve"][-1]["mean"]["selectivity"])["row"]
            best[f"batch {batch}, rate × {row.split('-')[-1]}"] = row
    return best


def sample(runs, row, name):
    """{seed: number} of a row: "same-2", "same-2 of brightness", or "batch-32" at its best rate."""
    row, _, rest = row.partition(" ")
    best = {row.partition("-lr")[0]: row for row in best_rates(runs).values()}
    row, name = best.get(row, row), f"{TITLES.get(name, name)} {rest}".strip()
    return {seed: number(line, name) for (each, seed), line in sorted(runs.items()) if each == row}


def mean_and_interval(sample, log=False):
    """Mean and 95% interval by Student's t, with `log` of logarithms; nan if there are too few."""
    if not sample:
        return np.nan, np.nan, np.nan
    x = np.array(list(sample.values()), dtype=float)
    x = np.log(x) if log else x
    half = stats.t.ppf(0.975, len(x) - 1) * stats.sem(x) if len(x) > 1 else np.nan
    found = x.mean() + np.array([0, -half, half])
    return tuple((np.exp(found) if log else np.maximum(found, 0)).tolist())


def paired_ratio_test(wanted, over, under):
    """Is the ratio of two samples {seed: number} above 1 ">", below 1 "<", or in MARGIN "≈"?

    p, of the worse of two one-sided tests for "≈", is None with fewer than three pairs, or where
    there is no t-test, since a ratio is 0 or all are the same.
    """
    ratios = {seed: over[seed] / under[seed] for seed in over if seed in under}
    sides = [("greater", MARGIN[0]), ("less", MARGIN[1])] if wanted == "≈" else [("two-sided", 1)]
    p = np.nan
    if len(ratios) >= 3:
        x = np.log(list(ratios.values()))
        p = max(stats.ttest_1samp(x, np.log(at), alternative=side).pvalue for side, at in sides)
    test = {"wanted": wanted, "ratio": mean_and_interval(ratios, log=True), "seeds": len(ratios)}
    return test | {"p": float(p) if np.isfinite(p) else None}


def holm_correction(ps):
    """p values corrected for how many they are (Holm 1979)."""
    order = np.argsort(ps)
    steps = np.array(ps)[order] * np.arange(len(ps), 0, -1)
    corrected = np.minimum(1, np.maximum.accumulate(steps))  # a larger p stays the larger one
    return corrected[np.argsort(order)].tolist()


def outcome(test):
    """What a corrected test says of what was claimed: "yes", "no", "the contrary" or "open"."""
    if test["p"] is None or test["corrected"] >= LEVEL:
        return "open" if test["p"] is None else "no"
    as_claimed = test["wanted"] == "≈" or (test["ratio"][0] > 1) == (test["wanted"] == ">")
    return "yes" if as_claimed else "the contrary"


def verdict(tests):
    outcomes = {outcome(test) for test in tests}
    if "open" in outcomes or not outcomes:
        return "open"
    if outcomes == {"yes"}:
        return "holds"
    return "holds in part" if "yes" in outcomes else "does not hold"


def judge(runs):
    """{claim: its tests}, all of them corrected together."""
    judged = {claim: [] for claim in CLAIMS}
    for claim, name, case, wanted, over, under in TESTS:
        text = f"{name}, {case}"
        if under in OTHERS and "÷" not in case:
            text = f"{name} ÷ {OTHERS[under]}: {case}"
        if under.startswith("of "):  # of over's own row
            row, _, stage = over.partition(" ")
            under = f"{row} {under} {stage}".strip()
        test = paired_ratio_test(wanted, sample(runs, over, name), sample(runs, under, name))
        judged[claim].append({"text": text} | test)
    tests = [test for each in judged.values() for test in each if test["p"] is not None]
    for test, p in zip(tests, holm_correction([test["p"] for test in tests])):
        test["corrected"] = p
    return judged


def cell(found, percent=False):
    """A mean with its interval as text."""
    mean, low, high = (min(100 * x, 100) for x in found) if percent else found
    places, unit = (1, "%") if percent else (2, "")
    if np.isnan(mean):
        return "–"
    interval = "" if np.isnan(low) else f" [{low:.{places}f}, {high:.{places}f}]"
    return f"{mean:.{places}f}{unit}{interval}"


def markdown(header, *rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(runs, rows, columns, corner=""):
    """Means over seeds: a line for each of the rows, a column for each of the numbers."""
    lines = [[corner, "row", *columns, "seeds"]]
    for title, row in rows.items():
        samples = [sample(runs, row, column) for column in columns]
        cells = [cell(mean_and_interval(s), c in PERCENT) for s, c in zip(samples, columns)]
        lines.append([title, f"`{row.split()[0]}`", *cells, str(len(samples[0]))])
    if corner == "after epoch":  # all lines are of one row
        lines = [[first, *rest] for first, _, *rest in lines]
    return markdown(*lines)


def claim_tables(judged, folder):
    """The verdicts, the first thing that a reader sees, and all tests; `folder`: of the figures."""
    header = ["", "the paper says, or asks", "at laptop scale", "tests passed", "one of them", ""]
    rows = [["", "ratio", "claimed", "found, p corrected", "p before", "as claimed"]]
    claimed, verdicts = {"≈": "within 10% of 1", ">": "above 1", "<": "below 1"}, []
    for claim, tests in judged.items():
        results, outcomes = [], [outcome(test) for test in tests]
        for test in tests:
            result, before = "open", "–"
            if test["p"] is not None:
                p = "< 0.001" if test["corrected"] < 0.001 else f"= {test['corrected']:.3f}"
                result = f"{cell(test['ratio'])}, {test['seeds']} seeds, p {p}"
                before = f"{test['p']:.2g}"
            results.append(f"{test['text']}: {result}")
            words = [test["text"], claimed[test["wanted"]], result, before, outcome(test)]
            rows.append([claim, *words])
        (text, shown), how, rest = CLAIMS[claim], "", ["–", "–", "–"]
        if verdict(tests) == "does not hold":
            contrary = outcomes.count("the contrary")
            how = f" (the contrary in {contrary})" if contrary else " (not shown)"
        if tests:
            passed = f"{outcomes.count('yes')} of {len(tests)}"
            rest = [passed, results[shown], f"[figure]({folder}{claim}.png)"]
        verdicts.append([claim, text, f"**{verdict(tests)}**{how}", *rest])
    return {"verdicts": markdown(header, *verdicts), "tests": markdown(*rows)}


def looks_tables(runs):
    """The rows of LOOKS; and are rows of more and fewer crops alike, or different?"""
    first = {(row, seed): line for (row, seed), line in runs.items() if seed == 0}
    names = [*MAPS, "jaccard60 ÷ best", "density on digit", "far from ink", "k-NN", "linear probe"]
    header = ["C7: selectivity", "ratio", "seeds", "p of alike"]
    lines = [[*header, "p of different, neither corrected"]]
    pairs = [rows for claim, _, _, _, *rows in TESTS if claim == "C7"]  # of as many canvases
    pairs += [("same-2", "same-1"), ("same-4", "same-2"), ("same-4", "same-1")]  # as many crops
    for over, under in [*pairs, ("different-2", "different-1")]:
        samples = sample(runs, over, "selectivity"), sample(runs, under, "selectivity")
        alike, apart = paired_ratio_test("≈", *samples), paired_ratio_test(">", *samples)
        if alike["p"] is not None:
            line = [f"`{over}` ÷ `{under}`", cell(alike["ratio"]), str(alike["seeds"])]
            lines.append([*line, f"{alike['p']:.2g}", f"{apart['p']:.2g}"])
    tables = [table(runs, LENGTHS, names), "With seed 0 alone:", table(first, LOOKS, names)]
    return "\n\n".join([*tables, markdown(*lines)])


def blocks(study, folder="figures/"):
    """All that is computed in the two README files: {name of the block: its text}."""
    runs, paper = study["laptop"], study["paper"]
    pages = {claim: table(runs, *TABLES[claim]) for claim in TABLES}
    pages["Q1"] = table(runs, best_rates(runs), [*MAPS, "k-NN"])
    pages["Q2"] += "\n\n" + table(runs, HEADS, [*SHARES, "heads past the ink"])
    pages["looks"] = looks_tables(runs)
    pages["paper"] = "Open: no run at paper scale is in `study.json`."
    if paper:  # a run a row, so without verdicts
        columns = [*MAPS, "k-NN", "linear probe"]
        pages["paper"] = table(paper, {row: row for row, _ in paper}, columns)
    pages["settings"], lines = "Open: no run is in `study.json`.", list(runs.values())
    if lines:
        seconds = np.mean([line["seconds"] for line in lines])
        rows = [["runs", f"{len(lines)}, of {seconds:.0f} s on average"]]
        versions = [", ".join(f"{k} {v}" for k, v in line["versions"].items()) for line in lines]
        rows.append(["device", "; ".join(sorted({line["device"] for line in lines}))])
        rows.append(["versions", "; ".join(sorted(set(versions)))])
        rows.append(["days", "; ".join(sorted({line["date"] for line in lines}))])
        widths = [np.diff(line["interval"]["selectivity"]) for line in lines]
        widths = [width / 2 / number(line, "selectivity") for width, line in zip(widths, lines)]
        width = f"± {100 * np.median(widths):.1f}% (median over the runs)"
        rows.append(["interval of one run's selectivity over canvases", width])
        pages["settings"] = markdown(["", ""], *rows)
    return pages | claim_tables(judge(runs), folder)


def fill(text, blocks):
    """The text with what lies between marks such as <!-- C3 --> and <!-- end --> written anew."""
    for name, block in blocks.items():
        before, mark, after = text.partition(f"<!-- {name} -->\n")
        if mark:
            after = after.partition("<!-- end -->")[2]
            text = f"{before}{mark}{block}\n<!-- end -->{after}"
    return text
