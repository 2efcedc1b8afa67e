"""What the lines of study.json come to: a table, a figure and a verdict for every claim.

A number is a mean over seeds with a 95% interval of Student's t over them; each seed's own value
is a mean over 1,000 test canvases, the same for all. Two rows are compared by the ratio of their
values with the same seed: its mean and interval are those of the logarithm, its p is that of a
paired t-test over the seeds. "Alike" is an equivalence test (two one-sided t-tests): that a ratio
lies within 10% of 1 has to be shown, too. All tests of the page together are corrected by Holm.
"""

import math
import re

import numpy as np
from scipy import stats

MARGIN = (0.9, 1.1)  # what counts as alike
LEVEL = 0.05
BATCHES, RATES = (32, 96, 256, 1024), (0.5, 1, 2)  # rates: times the one that the batch has by default
HEADS = (1, 2, 3, 6, 12)
SIZES = (28, 56, 84)
CROPS = {  # of the same number of canvases: views → crops a branch → row
    "same": {1: "same-1-images", 2: "same-2-images", 4: "same-4"},
    "different": {1: "different-1-images", 2: "different-2", 4: "different-4-images"},
}

# ----------------------------------------------------------------------------------- reading


def values(runs, row, read):
    """{seed: number} of a row."""
    return {seed: read(line) for (name, seed), line in sorted(runs.items()) if name == row}


def of(metric, which="mean"):
    """Reads a metric of the mean map, or of another row of the table, on test canvases of the layout matched."""
    return lambda line: line["matched"][line["best_head"] if which == "best" else which].get(metric, math.nan)


def after(epoch, metric, which="mean"):
    """Reads the same on validation canvases after an epoch; -1: the last."""
    return lambda line: line["curve"][epoch][which][metric]


def over_ceiling(line):
    """jaccard60 as a share of the highest that any set of patches has."""
    return line["matched"]["mean"]["jaccard60"] / line["matched"]["mean"]["best_jaccard"]


def accuracy(name, features="features"):
    return lambda line: line[features][name]


def heads(line, metric="selectivity"):
    """A metric of every head on test canvases, the most selective head first."""
    rows = [row for name, row in line["matched"].items() if name.startswith("head_")]
    return [row[metric] for row in sorted(rows, key=lambda row: -row["selectivity"])]


def best_rates(runs):
    """Of each batch whose rates are all tried, the row whose attention was the most selective: {batch: row}.

    By the validation canvases of seed 0, so that the test canvases have no part in the choice.
    """
    found = {}
    for batch in BATCHES:
        lines = [runs.get((f"batch-{batch}-lr-{rate}", 0)) for rate in RATES]
        if all(lines):
            found[batch] = max(lines, key=lambda line: line["curve"][-1]["mean"]["selectivity"])["row"]
    return found


# -------------------------------------------------------------------------------- statistics


def interval(numbers, log=False):
    """Mean and its 95% interval by Student's t: (mean, low, high); nan where there are too few numbers, or None.

    The interval ends at 0, since nothing here can be below; with `log` it is that of the logarithm.
    """
    x = np.array(list(numbers), dtype=float)
    if len(x) == 0:
        return math.nan, math.nan, math.nan
    x = np.log(x) if log else x
    mean, half = x.mean(), math.nan
    if len(x) > 1:
        half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    found = np.array([mean, mean - half, mean + half])
    return tuple((np.exp(found) if log else np.maximum(found, 0)).tolist())


def part(text, wanted, over, under=1.0):
    """A test: is the ratio of two rows "above" 1, "below" 1, or "alike" (within MARGIN)?

    Args:
        over, under: {seed: number}, paired by the seed; `under` may be one number for all.

    Returns {"text", "wanted", "value", "low", "high", "seeds", "p"}; p is two-sided for above and
    below, of the worse of two one-sided tests for alike; None with fewer than three seeds.
    """
    pairs = [(over[seed], under[seed] if isinstance(under, dict) else under)
             for seed in over if not isinstance(under, dict) or seed in under]
    found = {"text": text, "wanted": wanted, "seeds": len(pairs), "p": None}
    if not pairs:
        return found
    ratios = [a / b for a, b in pairs]
    found |= dict(zip(("value", "low", "high"), interval(ratios, log=True)))
    if len(ratios) >= 3:
        x = np.log(ratios)
        if wanted == "alike":
            found["p"] = max(stats.ttest_1samp(x, math.log(MARGIN[0]), alternative="greater").pvalue,
                             stats.ttest_1samp(x, math.log(MARGIN[1]), alternative="less").pvalue)
        else:
            found["p"] = stats.ttest_1samp(x, 0).pvalue
        found["p"] = float(found["p"]) if math.isfinite(found["p"]) else None  # ratios of 0, or all the same
    return found


def holm(ps):
    """p values corrected for how many they are (Holm 1979)."""
    order, worst, corrected = sorted(range(len(ps)), key=ps.__getitem__), 0.0, [0.0] * len(ps)
    for rank, k in enumerate(order):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[k]))
        corrected[k] = worst
    return corrected


def outcome(test):
    """What a corrected test says of what was claimed: "yes", "no", "the contrary" or "open"."""
    if test["p"] is None:
        return "open"
    if test["corrected"] >= LEVEL:
        return "no"
    if test["wanted"] == "alike" or (test["value"] > 1) == (test["wanted"] == "above"):
        return "yes"
    return "the contrary"


def verdict(tests):
    said = [outcome(test) for test in tests]
    if "open" in said or not said:
        return "open"
    return "holds" if set(said) == {"yes"} else "holds in part" if "yes" in said else "does not hold"


# -------------------------------------------------------------------------------- the claims
#
# Each function returns the tests of a claim. It holds if all of them come out as claimed, in part if some do.

SELECTIVITY, AUROC, POINTING = of("selectivity"), of("auroc"), of("pointing")


def c1(runs):
    rows = {"NCE, same": "same-2", "NCE, different": "different-1",
            "cross-entropy, same": "dino-same", "cross-entropy, different": "dino-different"}
    tests = [part(f"k-NN ÷ that of the untrained network: {title}", "above", values(runs, row, accuracy("knn")),
                  values(runs, row, accuracy("knn", "untrained_features"))) for title, row in rows.items()]
    return tests + [part(f"linear probe ÷ 50%: {title}", "above", values(runs, row, accuracy("linear_probe")), 0.5)
                    for title, row in rows.items()]


def c2(runs):
    tests = []
    for views, nce, dino in (("same", "same-2", "dino-same"), ("different", "different-1", "dino-different")):
        for name, read in (("selectivity", SELECTIVITY), ("auroc", AUROC), ("jaccard60 ÷ best_jaccard", over_ceiling)):
            tests.append(part(f"{name}, NCE ÷ cross-entropy: {views} views", "above", values(runs, nce, read), values(runs, dino, read)))
    return tests


def c3(runs):
    tests = [part(f"clutter density ÷ an even map's: same views, {crops} crops", "above",
                  values(runs, f"same-{crops}", of("clutter_density"))) for crops in (2, 4)]
    tests += [part(f"selectivity ÷ that of brightness: same views, {crops} crop{'s' * (crops > 1)}", "alike",
                   values(runs, f"same-{crops}", SELECTIVITY),
                   values(runs, f"same-{crops}", of("selectivity", "brightness"))) for crops in (1, 2, 4)]
    return tests + [part(f"selectivity, different ÷ same views: {crops} crop{'s' * (crops > 1)}", "above",
                         values(runs, f"different-{crops}", SELECTIVITY), values(runs, f"same-{crops}", SELECTIVITY))
                    for crops in (1, 2)]


def c4(runs):
    tests = []
    for title, row in (("a texture a canvas", "texture"), ("ten textures in all", "texture-pool")):
        for region, wanted in (("far_background", "below"), ("digit", "above"), ("clutter", "above")):
            name = region.replace("_", " ")
            tests.append(part(f"density on {name} ÷ an even map's: {title}", wanted, values(runs, row, of(f"{region}_density"))))
    return tests


def c5(runs):
    def against(metric, when, read):
        return part(f"{metric} ÷ that of brightness: {when}", "above", values(runs, "different-1", read(metric)),
                    values(runs, "different-1", read(metric, "brightness")))

    metrics = ("selectivity", "auroc", "pointing")
    tests = [against(metric, "at the end", of) for metric in metrics]
    tests += [against(metric, "after the first 50 steps", lambda *what: after(1, *what)) for metric in metrics]
    tests += [
        part("selectivity ÷ that of same views (2 crops): at the end", "above",
             values(runs, "different-1", SELECTIVITY), values(runs, "same-2", SELECTIVITY)),
        part("selectivity ÷ that of its maps shuffled: at the end", "above",
             values(runs, "different-1", SELECTIVITY), values(runs, "different-1", of("selectivity", "shuffled"))),
        part("clutter density ÷ an even map's: at the end", "below", values(runs, "different-1", of("clutter_density"))),
    ]
    return tests


def c6(runs):
    def change(read, since):
        return values(runs, "different-long", lambda line: read(line["curve"][-1]) / read(line["curve"][since]))

    return [
        part("training loss, tenth ÷ ninth epoch", "below", change(lambda epoch: epoch["loss"], -2)),
        part("diversity of the heads, tenth ÷ first epoch", "above", change(lambda epoch: epoch["mean"]["diversity"], 1)),
        part("selectivity of the least selective head, at the end", "below",
             values(runs, "different-long", lambda line: heads(line)[-1])),
    ]


def c7(runs):
    tests = []
    for views, rows in CROPS.items():
        for more, fewer in ((4, 2), (4, 1), (2, 1)):
            tests.append(part(f"selectivity, {more} ÷ {fewer} crop{'s' * (fewer > 1)}: {views} views", "alike",
                              values(runs, rows[more], SELECTIVITY), values(runs, rows[fewer], SELECTIVITY)))
    return tests


def size_row(size):
    return "different-1" if size == 56 else f"size-{size}"


def c8(runs):
    tests = []
    for name, read in (("jaccard60 ÷ best_jaccard", over_ceiling), ("auroc", AUROC)):
        for small, large in zip(SIZES, SIZES[1:]):
            tests.append(part(f"{name}, {large} ÷ {small} px", "above",
                              values(runs, size_row(large), read), values(runs, size_row(small), read)))
    return tests


def q1(runs):
    best = best_rates(runs)
    return [part(f"selectivity, batch {large} ÷ {small}, each at its best rate", "above",
                 values(runs, best.get(large), SELECTIVITY), values(runs, best.get(small), SELECTIVITY))
            for small, large in zip(BATCHES, BATCHES[1:])]


def head_row(number):
    return "different-1" if number == 3 else f"heads-{number}"


def q2(runs):
    return [part(f"selectivity of the best head, {more} ÷ {fewer} head{'s' * (fewer > 1)}", "above",
                 values(runs, head_row(more), of("selectivity", "best")), values(runs, head_row(fewer), of("selectivity", "best")))
            for fewer, more in zip(HEADS, HEADS[1:])]


def q3(runs):
    return []


CLAIMS = {  # what the paper says or asks, and the tests that decide
    "C1": ("NCE and cross-entropy both classify well (figures 2, 3)", c1),
    "C2": ("NCE gives attention that people can read better than cross-entropy", c2),
    "C3": ("same views: all white pixels are attended, digit and distractors alike (figure 4)", c3),
    "C4": ("same views: a textured background is ignored (figure 5)", c4),
    "C5": ("different views: the digit is found and distractors ignored, early on (figure 6)", c5),
    "C6": ("after 10 epochs the loss still falls but heads part, some to distractors", c6),
    "C7": ("4, 2 or 1 crops make no significant difference", c7),
    "C8": ("higher resolution gives better maps", c8),
    "Q1": ("a larger batch helps (asked)", q1),
    "Q2": ("more heads help (asked)", q2),
    "Q3": ("other pre-training helps (asked)", q3),
}


def judge(runs):
    """{claim: its tests}, all of them corrected together."""
    judged = {claim: tests(runs) for claim, (_, tests) in CLAIMS.items()}
    tests = [test for each in judged.values() for test in each if test["p"] is not None]
    for test, p in zip(tests, holm([test["p"] for test in tests])):
        test["corrected"] = p
    return judged


# ----------------------------------------------------------------------------------- tables


def number(found, places=2):
    """A mean with its interval as text."""
    mean, low, high = found
    if math.isnan(mean):
        return "–"
    text = f"{mean:.{places}f}"
    return text if math.isnan(low) else f"{text} [{low:.{places}f}, {high:.{places}f}]"


def percent(found):
    mean, low, high = (min(100 * x, 100) for x in found)
    if math.isnan(mean):
        return "–"
    return f"{mean:.1f}%" + ("" if math.isnan(low) else f" [{low:.1f}, {high:.1f}]")


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(runs, rows, columns):
    """Means over seeds: a line for each {title: row of study.json}, a column for each {title: what to read}."""
    lines = []
    for title, row in rows.items():
        cells = []
        for read in columns.values():
            found = interval(values(runs, row, read).values())
            cells.append(percent(found) if getattr(read, "share", False) else number(found))
        lines.append([title, f"`{row}`", *cells, str(len(values(runs, row, SELECTIVITY)))])
    return markdown(["", "row", *columns, "seeds"], lines)


def as_percent(read):
    read.share = True
    return read


KNN, PROBE = as_percent(accuracy("knn")), as_percent(accuracy("linear_probe"))
UNTRAINED_KNN = as_percent(accuracy("knn", "untrained_features"))
MAP_COLUMNS = {"selectivity": SELECTIVITY, "auroc": AUROC, "pointing": POINTING}
REFERENCES = {name: {metric: of(metric, name) for metric in MAP_COLUMNS} for name in ("brightness", "shuffled", "ink", "untrained")}


def references(runs, row, names):
    """Lines below a table: the maps that a network has to beat, which `row` was measured beside."""
    lines = []
    for name in names:
        cells = [number(interval(values(runs, row, read).values())) for read in REFERENCES[name].values()]
        lines.append(f"| reference: {name} | `{row}` | " + " | ".join([*cells, str(len(values(runs, row, SELECTIVITY)))]) + " |")
    return "\n".join(lines)


LOSSES = {"NCE, same": "same-2", "cross-entropy, same": "dino-same",
          "NCE, different": "different-1", "cross-entropy, different": "dino-different"}
VIEWS = {
    "same, 1 crop": "same-1", "same, 2 crops": "same-2", "same, 4 crops": "same-4",
    "different, 1 crop": "different-1", "different, 2 crops": "different-2",
}
BACKGROUNDS = {"black": "same-2", "a texture a canvas": "texture", "ten textures in all": "texture-pool"}


PAST_THE_INK = as_percent(lambda line: float(np.mean([density < 1 for density in heads(line, "digit_density")])))


def share_of(region, head):
    return as_percent(lambda line: heads(line, f"{region}_share")[head])


LOOKS = {  # what could make a claim hold: title → row, each below what it was tried on
    "C5: different views": "different-1",
    "C5: learning rate × 3": "look-different-lr",
    "C5: four times as long": "different-long",
    "C4: a texture a canvas": "texture",
    "C4: learning rate × 3": "look-texture-lr",
    "C4: temperature 0.1": "look-texture-temperature",
    "C4: four times as long": "look-texture-long",
    "C4: 4 crops, as the paper's": "look-texture-crops",
    "C8: 84 px": "size-84",
    "C8: twice as long": "look-size-84-long",
    "C1, C2: cross-entropy": "dino-same",
    "C1, C2: learning rate × 3": "look-dino-lr",
    "C1, C2: four times as long": "look-dino-long",
    "C1, C2: NCE four times as long": "same-long",
}


def claim_tables(runs):
    """The table of each claim, as Markdown."""
    best = best_rates(runs)
    densities = {name.replace("_", " "): of(f"{name}_density") for name in ("digit", "clutter", "far_background")}
    stages = {}
    for title, epoch in (("after 50 steps", 1), ("after 250 steps", 5), ("after 500 steps", 10)):
        for name, which in (("network", "mean"), ("its maps shuffled", "shuffled"), ("brightness", "brightness")):
            stages[f"{title}: {name}"] = {metric: after(epoch, metric, which) for metric in MAP_COLUMNS}
    found = {
        "C1": table(runs, LOSSES, {"k-NN": KNN, "untrained": UNTRAINED_KNN, "linear probe": PROBE}),
        "C2": table(runs, LOSSES, {"selectivity": SELECTIVITY, "auroc": AUROC, "jaccard60 ÷ best": over_ceiling}),
        "C3": table(runs, VIEWS, MAP_COLUMNS) + "\n" + references(runs, "same-2", ("brightness", "shuffled", "ink", "untrained")),
        "C4": table(runs, BACKGROUNDS, densities | {"selectivity": SELECTIVITY}),
        "C5": markdown(["validation canvases", "row", *MAP_COLUMNS, "seeds"], [
            [title, "`different-1`", *(number(interval(values(runs, "different-1", read).values())) for read in columns.values()),
             str(len(values(runs, "different-1", SELECTIVITY)))] for title, columns in stages.items()
        ]),
        "C6": markdown(["after epoch", "training loss", "diversity, bits", "most selective head", "least selective head", "seeds"], [
            [str(epoch)] + [number(interval(values(runs, "different-long", read).values())) for read in (
                lambda line: line["curve"][epoch]["loss"], after(epoch, "diversity"),
                lambda line: max(each_head(line["curve"][epoch])), lambda line: min(each_head(line["curve"][epoch])),
            )] + [str(len(values(runs, "different-long", SELECTIVITY)))] for epoch in (1, 2, 5, 10)
        ]),
        "C7": table(runs, {f"{views}, {crops}": row for views, rows in CROPS.items() for crops, row in rows.items()}, MAP_COLUMNS),
        "C8": table(runs, {f"{size} px": size_row(size) for size in SIZES}, {
            "jaccard60 ÷ best": over_ceiling, "jaccard60": of("jaccard60"), "best_jaccard": of("best_jaccard"),
            "auroc": AUROC, "selectivity": SELECTIVITY}),
        "Q1": table(runs, {f"batch {batch}, rate × {row.split('-')[-1]}": row for batch, row in best.items()},
                    MAP_COLUMNS | {"k-NN": KNN}),
        "Q2": table(runs, {str(number): head_row(number) for number in HEADS}, {
            "best head": of("selectivity", "best"), "mean map": SELECTIVITY, "auroc of the mean map": AUROC,
            "diversity, bits": of("diversity"), "k-NN": KNN}) + "\n\n" + table(runs, {str(number): head_row(number) for number in HEADS}, {
            f"{title}, on {region}": share_of(region, head) for title, head in (("most selective head", 0), ("least", -1))
            for region in ("digit", "clutter", "background")} | {"heads past the ink": PAST_THE_INK}),
    }
    return found


def each_head(epoch):
    """The heads' selectivities in a line of a curve."""
    return [row["selectivity"] for name, row in epoch.items() if name.startswith("head_")]


def said(test):
    """A test's ratio, seeds and corrected p as text."""
    if test["p"] is None:
        return "open"
    return f"{number((test['value'], test['low'], test['high']))}, {test['seeds']} seeds, p {p_text(test['corrected'])}"


def p_text(p):
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def how(tests):
    """Of a claim that does not hold: is the contrary shown by some test, or is it not shown?"""
    if verdict(tests) != "does not hold":
        return ""
    contrary = sum(outcome(test) == "the contrary" for test in tests)
    return f" (the contrary in {contrary})" if contrary else " (not shown)"


HEADLINE = {"C1": 0, "C2": 0, "C3": 3, "C4": 0, "C5": 0, "C6": 1, "C7": 0, "C8": 0, "Q1": 2, "Q2": 3}


def verdict_table(judged, folder):
    """The first thing that a reader sees. `folder`: where the figures are, seen from the file that it goes to."""
    lines = []
    for claim, tests in judged.items():
        yes = sum(outcome(test) == "yes" for test in tests)
        test = tests[HEADLINE[claim]] if tests else None
        lines.append([
            claim, CLAIMS[claim][0], f"**{verdict(tests)}**{how(tests)}", f"{yes} of {len(tests)}" if tests else "–",
            f"{test['text']}: {said(test)}" if test else "–", f"[figure]({folder}{claim}.png)" if tests else "–",
        ])
    return markdown(["", "the paper says, or asks", "at laptop scale", "tests passed", "one of them", ""], lines)


WANTED = {"alike": "within 10% of 1", "above": "above 1", "below": "below 1"}


def test_table(judged):
    lines = [[claim, test["text"], WANTED[test["wanted"]], said(test), "–" if test["p"] is None else f"{test['p']:.2g}",
              outcome(test)] for claim, tests in judged.items() for test in tests]
    return markdown(["", "ratio", "claimed", "found, p corrected", "p before", "as claimed"], lines)


def looks_table(runs):
    """The rows of LOOKS; and pairs of crops, those of C7 and those that were fed as many crops, alike or different?"""
    pairs = [(rows[more], rows[fewer]) for rows in CROPS.values() for more, fewer in ((4, 2), (4, 1), (2, 1))]
    pairs += [("same-2", "same-1"), ("same-4", "same-2"), ("same-4", "same-1"), ("different-2", "different-1")]
    lines = []
    for over, under in pairs:
        alike, apart = (part("", wanted, values(runs, over, SELECTIVITY), values(runs, under, SELECTIVITY)) for wanted in ("alike", "above"))
        if alike["p"] is not None:
            ratio = number((alike["value"], alike["low"], alike["high"]))
            lines.append([f"`{over}` ÷ `{under}`", ratio, str(alike["seeds"]), f"{alike['p']:.2g}", f"{apart['p']:.2g}"])
    columns = MAP_COLUMNS | {"jaccard60 ÷ best": over_ceiling, "density on digit": of("digit_density"),
                             "far from ink": of("far_background_density"), "k-NN": KNN, "linear probe": PROBE}
    first = {(row, seed): line for (row, seed), line in runs.items() if seed == 0}
    longer = {"C5: 500 steps": "different-1", "C5: 2,000 steps": "different-long"}
    pages = [table(runs, longer, columns), "With seed 0 alone:", table(first, LOOKS, columns),
             markdown(["C7: selectivity", "ratio", "seeds", "p of alike", "p of different, neither corrected"], lines)]
    return "\n\n".join(pages)


def settings_table(runs):
    """What the runs were made with, and how much of a number the choice of test canvases makes."""
    lines = list(runs.values())
    if not lines:
        return "Open: no run is in `study.json`."

    def all_of(read):
        return "; ".join(sorted({read(line) for line in lines}))

    wide = [(line["interval"]["selectivity"][1] - line["interval"]["selectivity"][0]) / 2 / SELECTIVITY(line) for line in lines]
    return markdown(["", ""], [
        ["runs", f"{len(lines)}, of {sum(line['seconds'] for line in lines) / len(lines):.0f} s on average"],
        ["device", all_of(lambda line: line["device"])],
        ["versions", all_of(lambda line: ", ".join(f"{k} {v}" for k, v in line["versions"].items()))],
        ["days", all_of(lambda line: line["date"])],
        ["interval of one run's selectivity over canvases", f"± {100 * np.median(wide):.1f}% (median over the runs)"],
    ])


def paper_table(runs):
    """What was measured at paper scale: a run a row, so without verdicts."""
    if not runs:
        return "Open: no run at paper scale is in `study.json`."
    return table(runs, {row: row for row in dict.fromkeys(row for row, _ in runs)}, MAP_COLUMNS | {"k-NN": KNN, "linear probe": PROBE})


def blocks(study, folder="figures/"):
    """All that is computed in the two README files: {name of the block: its text}."""
    runs = study["laptop"]
    judged = judge(runs)
    return {"verdicts": verdict_table(judged, folder), "tests": test_table(judged), "settings": settings_table(runs),
            "looks": looks_table(runs), "paper": paper_table(study["paper"])} | claim_tables(runs)


def fill(text, found):
    """The text with each block between its two marks, such as <!-- C3 --> and <!-- end -->, written anew."""
    def anew(match):
        return f"{match[1]}\n{found[match[2]]}\n{match[4]}" if match[2] in found else match[0]

    return re.sub(r"(<!-- (\w+) -->)\n(.*?)\n?(<!-- end -->)", anew, text, flags=re.DOTALL)
