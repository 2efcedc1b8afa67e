"""What the pages say in words and numbers follows from the lines of study.json.

The tables are made from study.json, and tested with the study. Here are the sentences between them:
each is written anew from the runs, and must stand on its page. On the pages of results no other
number may stand, unless it belongs to the design.
"""

import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "results"))

import study

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md")])

FIRST_TEN = range(10, 20)
SECOND_SAMPLE = range(30, 60)
BOTH_SAMPLES = [*FIRST_TEN, *SECOND_SAMPLE]
OF_MAPS = range(70, 90)
TEN_OF_MAPS = range(70, 80)
MARK_SEEDS = range(70, 76)
EVERY_SEED = range(10, 90)

MARK_ROWS = ("different", "shortcut-25", "shortcut-50", "shortcut-100")
# Ways of training on the same images, by their views.
DIFFERENT_VIEWS = (
    "different",
    "different-long",
    "different-registers-0",
    "dino-different",
    "heads-6",
    "batch-32-lr-2",
    "batch-256-lr-0.5",
)
SAME_VIEWS = ("same", "same-1", "same-4", "same-registers-0", "dino-same", "pretrained")
OTHERS = ("supervised", "supervised-same", "depth-4", "depth-6")
NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

# Numbers of the design, which no run has to confirm.
DESIGN = {
    "results/README.md": [
        "1 − cosine",
        "fits its 95% interval",
        "the interval lies beyond 0 on the claimed side",
        "excludes 0 and does not lie within",
        "it lies beyond 0 on the other side",
        "whose summed brightness differs by at most 5%",
        "seeds 10 to 59",
        "can matter to [2] as well",
        "[1] was trained with a mark in every image, [2] without any",
        "what matters most to [1]",
        "[2021]",
        "784 in ViT-S/8 at 224 px",
        "28 or 56 pixels",
        "224 against 448 pixels",
        "six heads of width 64",
        "a batch of 8,192",
    ],
    "results/claims.md": [
        "the 95% interval over seeds",
        "cannot be below .002 with ten seeds, or below .06 with five",
        "cannot give an exact p below .06",
        "In seed 10 [1]",
        "In seed 11 [2]",
        "Crops of 56 pixels have four times as many patches as crops of 28",
        "84 pixels do not help",
        "A batch of 256",
        "a batch of 32",
    ],
}


def text_of(page: str) -> str:
    """A page in one line, without its tables and code."""
    text = (ROOT / page).read_text()
    text = re.sub(r"<!-- (?!end)[^>]*-->.*?<!-- end -->", " ", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith(("|", "    ", "#", "!["))]
    text = " ".join(" ".join(lines).split())
    return re.sub(r"\]\([^)]*\)", "]", text)  # the address of a link


@pytest.fixture(scope="module")
def lines():
    return [line for line in json.loads(study.STUDY_FILE.read_text()) if line["preset"] == "laptop"]


def values(lines: list[dict], row: str, path: str, seeds) -> np.ndarray:
    """A measure of a row's runs, in the order of their seeds; `path` is such as "features/knn"."""
    chosen = [line for line in lines if line["row"] == row and line["seed"] in seeds]
    assert len(chosen) >= min(5, len(seeds)), (row, path)
    found = []
    for line in sorted(chosen, key=lambda line: line["seed"]):
        value = line
        for key in path.split("/"):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found.append(value)
    return np.array(found)


def head_densities(lines: list[dict], row: str, seeds) -> np.ndarray:
    """How dense each head is far from ink: (runs, heads)."""
    runs = values(lines, row, "matched", seeds)
    return np.array(
        [
            [cells["far_background_density"] for name, cells in run.items() if "head_" in name]
            for run in runs
        ]
    )


def percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def points(value: float) -> str:
    """Two digits without the leading 0, as the pages write them: .53."""
    return f"{value:.2f}".removeprefix("0")


# --------------------------------------------------------------------- what each page has to say


def sentences_of_results(lines):
    yield from sentences_of_the_answer(lines)
    yield from sentences_of_verdicts()
    yield from sentences_of_first_claims(lines)
    yield from sentences_of_depth(lines)
    yield from sentences_of_the_shortcut(lines)
    yield from sentences_of_ways_to_train(lines)
    yield from sentences_of_advice(lines)
    yield from sentences_of_limits(lines)


def mean_of(lines, row, map_name, measure, seeds=OF_MAPS):
    return values(lines, row, f"matched/{map_name}/{measure}", seeds).mean()


def sentences_of_the_answer(lines):
    def pairs(row, map_name):
        return percent(mean_of(lines, row, map_name, "equal_ink"))

    def untrained(map_name):
        path = f"untrained/{map_name}/equal_ink"
        return percent(values(lines, "different", path, OF_MAPS).mean())

    attention = pairs("different", "mean")
    rollout = pairs("different", "rollout")
    gradient = pairs("different", "squared_gradient")
    yield f"attention picks the one that matters more in {attention} of pairs, rollout in {rollout}"
    yield f"and squared gradients in {gradient}"
    assert pairs("same", "squared_gradient") == pairs("same", "rollout")
    yield f"equally good, at {pairs('same', 'rollout')}, and attention is at {pairs('same', 'mean')}"
    yield f"squared gradients are right in {untrained('squared_gradient')} of pairs"
    yield f"and rollout in {untrained('rollout')}"


def sentences_of_verdicts():
    runs = study.read_study()["laptop"]
    words = {name: verdict.word for name, verdict in study.map_claims.judge(runs).items()}
    # The pages say so of these three in words.
    assert words["M2"] == words["M3"] == words["M7"] == "holds"
    yield f"Whether rollout shows it better than attention is {words['M8']} (M8)"
    yield f"**M4** {words['M4']}"
    yield f"**M9** is {words['M9']}"


def sentences_of_first_claims(lines):
    equal_ink = {
        name: mean_of(lines, "different", name, "equal_ink") for name in ("mean", "brightness")
    }
    yield f"which knows only the dose, is at {points(equal_ink['brightness'])} instead of .5"
    above_brightness = points(equal_ink["mean"] - equal_ink["brightness"])
    yield f"Attention is above that as well, by {above_brightness}"
    objects = {
        name: points(mean_of(lines, "different", name, "object_faithfulness"))
        for name in ("mean", "brightness", "rollout", "squared_gradient")
    }
    yield f"attention is {objects['mean']}, and with brightness {objects['brightness']}"
    yield f"rollout {objects['rollout']}, squared gradients {objects['squared_gradient']}"


def sentences_of_depth(lines):
    runs = study.read_study()["laptop"]
    last_shares = []
    for row in ("different", "depth-4", "depth-6"):
        shares = values(lines, row, "direct_share", study.map_claims.seeds_of(runs, row))
        last_shares.append(percent(shares[:, -1].mean()))
    two, four, six = last_shares
    deep = study.map_claims.seeds_of(runs, "depth-6")
    direct_in_two = points(mean_of(lines, "different", "mean", "direct_faithfulness"))
    direct_in_six = points(mean_of(lines, "depth-6", "mean", "direct_faithfulness", deep))
    yield f"with a rank correlation of {direct_in_two} in two blocks and {direct_in_six} in six"
    yield f"the *direct share* that remains is {two} in two blocks, {four} in four, and {six} in six"
    by_depth = {
        name: [
            mean_of(lines, row, name, "equal_ink", study.map_claims.seeds_of(runs, row))
            for row in ("depth-1", "different", "depth-3", "depth-4", "depth-6")
        ]
        for name in ("mean", "rollout", "squared_gradient")
    }
    in_two = percent(by_depth["mean"][1])
    in_six = percent(by_depth["mean"][-1])
    rollout_in_six = percent(by_depth["rollout"][-1])
    yield f"With six blocks, attention is right in {in_six} of pairs"
    yield f"and rollout still in {rollout_in_six}"
    yield f"Six blocks lower attention from {in_two} to {in_six} of pairs"
    of_attention = by_depth.pop("mean")
    assert of_attention == sorted(of_attention, reverse=True)
    assert all(np.ptp(of_map) < 0.05 for of_map in by_depth.values())
    yield "From one block to six, attention gets worse step by step"
    yield "while rollout and squared gradients stay about where they are"
    right = []
    shares = []
    for row, seeds in (
        ("dino-different", TEN_OF_MAPS),
        ("different", OF_MAPS),
        ("supervised", TEN_OF_MAPS),
    ):
        right.append(percent(mean_of(lines, row, "mean", "equal_ink", seeds)))
        shares.append(percent(values(lines, row, "direct_share", seeds)[:, -1].mean()))
    yield f"is right in {right[0]} of pairs with DINO's loss, {right[1]} with NCE and {right[2]}"
    yield f"Their direct shares are {shares[0]}, {shares[1]} and {shares[2]}"
    same = percent(mean_of(lines, "same", "mean", "equal_ink"))
    share_of_same = percent(values(lines, "same", "direct_share", OF_MAPS)[:, -1].mean())
    yield f"their direct share is {share_of_same}, and attention is right in {same} of pairs"
    tenths = NUMBERS[round(10 * float(four.rstrip("%")) ** 0.5 / 10)]
    yield f"a share of {four} is {tenths} tenths of the distance"


def sentences_of_the_shortcut(lines):
    marks = {row: values(lines, row, "marks", MARK_SEEDS) for row in MARK_ROWS}
    right = {}
    for name in ("squared_gradient", "mean"):
        shares = [share_ordered_right(networks, name) for networks in marks.values()]
        right[name] = percent(np.mean(shares))
    reliance = {
        row: np.mean([network["reliance"] for network in networks])
        for row, networks in marks.items()
    }
    assert reliance["shortcut-25"] - reliance["different"] < 0.05
    assert reliance["shortcut-50"] - reliance["different"] > 0.1
    yield "With marks in a quarter of the images, networks do not take the shortcut"
    for name in ("mean", "rollout", "norm_rollout", "squared_gradient"):
        never, always = (
            np.mean([network["density"][name] for network in marks[row]])
            for row in ("different", "shortcut-100")
        )
        assert always > 2 * never
    yield "all four maps show it"
    yield f"still tell in {right['squared_gradient']} of pairs which one relies more"
    yield f"and attention in {right['mean']}"


def sentences_of_ways_to_train(lines):
    everywhere = correlation_between_rows(lines, DIFFERENT_VIEWS + SAME_VIEWS + OTHERS)
    within_same_views = correlation_between_rows(lines, SAME_VIEWS)
    within_different_views = correlation_between_rows(lines, DIFFERENT_VIEWS)
    number_of_same = NUMBERS[len(SAME_VIEWS)]
    yield f"The rank correlation between the ways of training is {everywhere}"
    yield f"Within different views the rank correlation is {within_different_views}"
    yield f"within same views only {within_same_views}, over {number_of_same} ways"
    _, on_ink = heads_on_texture(lines)
    yield f"in {on_ink} of ten one head stays on the ink"


def sentences_of_advice(lines):
    maps = ("mean", "rollout", "norm_rollout", "squared_gradient")
    rows = ("different", "same", "dino-different", "supervised", "depth-3", "depth-4", "depth-6")
    behind = []
    for row in rows:
        seeds = OF_MAPS if row in ("different", "same") else TEN_OF_MAPS
        by_map = {name: mean_of(lines, row, name, "equal_ink", seeds) for name in maps}
        behind.append(max(by_map.values()) - by_map["rollout"])
    yield f"it was at most {NUMBERS[round(100 * max(behind))]} points behind the best map"


def sentences_of_limits(lines):
    path = "matched/mean/patch_faithfulness"
    in_bfloat16 = values(lines, "different", path, range(70, 75))
    in_float32 = values(lines, "different-float32", path, range(70, 75))
    lowest = points(in_bfloat16.min())
    yield f"lies between {lowest} and {points(in_bfloat16.max())} over five seeds"
    yield f"differ by up to {points(np.abs(in_bfloat16 - in_float32).max())}"


def share_ordered_right(networks: list[dict], map_name: str) -> float:
    """Of two networks, how often has the one that relies more on the mark more of a map on it?"""
    pairs = list(itertools.combinations(networks, 2))
    right = 0
    for one, other in pairs:
        difference = one["density"][map_name] - other["density"][map_name]
        right += difference * (one["reliance"] - other["reliance"]) > 0
    return right / len(pairs)


def correlation_between_rows(lines: list[dict], rows: tuple[str, ...]) -> str:
    """Rank correlation of selectivity and causal selectivity, the means of the rows."""
    selectivity = [values(lines, row, "matched/mean/selectivity", BOTH_SAMPLES) for row in rows]
    causal = [values(lines, row, "causal_selectivity", BOTH_SAMPLES) for row in rows]
    x = [row.mean() for row in selectivity]
    y = [row.mean() for row in causal]
    return points(stats.spearmanr(x, y).statistic)


def heads_on_texture(lines):
    """In how many of ten runs with textures all heads avoid the ink, and all but one: in words."""
    heads_past_ink = (head_densities(lines, "texture", FIRST_TEN) > 1).sum(1)
    return NUMBERS[(heads_past_ink == 3).sum()], NUMBERS[(heads_past_ink == 2).sum()]


def faithfulness_of_random_maps(lines):
    means = [
        values(lines, row, "matched/random/object_faithfulness", EVERY_SEED).mean()
        for row in ("different", "same")
    ]
    return f"{np.mean(means):.1f}".removeprefix("0")


def more_selective(different: float, same: float) -> str:
    words = {"a quarter": 1.25, "a third": 1.33, "half": 1.5}
    return min(words, key=lambda word: abs(words[word] - different / same))


def sentences_of_claims(lines):
    # F1
    random_maps = faithfulness_of_random_maps(lines)
    yield f"A random map has a rank correlation of about {random_maps} there"

    # F3 and F4
    wins = {}
    correlations = {}
    for row in ("dino-same", "pretrained"):
        attention = values(lines, row, "matched/mean/patch_faithfulness", FIRST_TEN)
        rollout = values(lines, row, "matched/rollout/patch_faithfulness", FIRST_TEN)
        wins[row] = f"{NUMBERS[(attention > rollout).sum()]} of {NUMBERS[len(attention)]} runs"
    yield f"{wins['dino-same']} with DINO's loss and same views"
    yield f"{wins['pretrained']} that started from supervised weights"
    for row in ("different", "same"):
        stray = head_densities(lines, row, SECOND_SAMPLE).max(1)
        faithfulness = values(lines, row, "matched/mean/patch_faithfulness", SECOND_SAMPLE)
        correlations[row] = points(-stats.spearmanr(stray, faithfulness).statistic)
    yield f"(rank correlation −{correlations['different']} with different views"
    yield f"−{correlations['same']} with same views)"

    # C4
    none_on_ink, one_on_ink = heads_on_texture(lines)
    losses = [curve[-1]["loss"] for curve in values(lines, "texture", "curve", FIRST_TEN)]
    yield f"In {none_on_ink}, all heads avoid the ink"
    yield f"In {one_on_ink}, one head stays on the ink and two avoid it"
    yield f"The loss falls to {points(min(losses))} to {points(max(losses))}"

    # C5
    causal = {}
    words = {"about as far": 1, "about one and a half times as far": 1.5, "over twice as far": 2.3}
    for row in ("same", "different"):
        ratio = values(lines, row, "causal_selectivity", FIRST_TEN).mean()
        causal[row] = min(words, key=lambda word: abs(words[word] - ratio))
    yield f"{causal['same']} as leaving out a pixel of a distractor with same views"
    yield f"and {causal['different']} with different views"

    selectivity = [
        values(lines, row, "matched/mean/selectivity", FIRST_TEN).mean()
        for row in ("different", "same")
    ]
    yield f"With different views it is {more_selective(*selectivity)} more selective (C5)"

    # C6 and C8
    curves = values(lines, "different-long", "curve", range(10, 15))
    furthest = [np.argmax([epoch["mean"]["diversity"] for epoch in curve]) for curve in curves]
    yield f"in epochs {min(furthest)} to {max(furthest)}"
    one, two, four = (
        f"{values(lines, row, 'matched/mean/selectivity', FIRST_TEN).mean():.2f}"
        for row in ("same-1", "same", "same-4")
    )
    yield f"With two crops selectivity is {two}, with one {one}, and with four {four}"
    large, small = (
        points(values(lines, row, "features/linear_probe", SECOND_SAMPLE).mean())
        for row in ("different", "size-28")
    )
    yield f"a linear probe of {large} instead of {small}, second sample"


def sentences_of_metrics(lines):
    both = ("different", "same")
    measure = "matched/brightness/patch_faithfulness"
    brightness = np.concatenate([values(lines, row, measure, EVERY_SEED) for row in both])
    lowest = points(brightness.min())
    highest = points(brightness.max())
    equal_ink = values(lines, "different", "matched/brightness/equal_ink", OF_MAPS).mean()
    yield f"its rank correlation with the effects is {lowest} to {highest}"
    yield f"even a random map scores about {faithfulness_of_random_maps(lines)} here"
    reliance = {}
    for row in ("different", "shortcut-100"):
        networks = values(lines, row, "marks", MARK_SEEDS)
        reliance[row] = points(np.mean([network["reliance"] for network in networks]))
    yield f"trained without marks are at {reliance['different']} on average"
    yield f"those that always saw one at {reliance['shortcut-100']}"
    yield f"With equal ink, brightness is right in {points(equal_ink)} of the cases"


def sentences_of_readme(lines):
    def pairs(map_name):
        path = f"matched/{map_name}/equal_ink"
        return percent(values(lines, "different", path, OF_MAPS).mean())

    selectivity = {
        row: values(lines, row, "matched/mean/selectivity", OF_MAPS)
        for row in ("different", "same")
    }
    brightness = values(lines, "same", "matched/brightness/selectivity", OF_MAPS)
    assert selectivity["same"].mean() == pytest.approx(brightness.mean(), rel=0.02)
    gain = more_selective(selectivity["different"].mean(), selectivity["same"].mean())
    yield f"With different views it is {gain} more selective"
    yield f"about {selectivity['different'].mean():.1f} times as dense"
    yield f"picks the one that matters more in {pairs('mean')} of pairs"
    yield f"rollout in {pairs('rollout')}, and squared gradients in {pairs('squared_gradient')}"
    six_blocks = values(lines, "depth-6", "matched/mean/equal_ink", range(70, 80)).mean()
    yield f"With six blocks attention is right in {percent(six_blocks)} of pairs"


SENTENCES = {
    "README.md": sentences_of_readme,
    "results/README.md": sentences_of_results,
    "results/claims.md": sentences_of_claims,
    "docs/metrics.md": sentences_of_metrics,
}


@pytest.mark.parametrize("page", SENTENCES)
def test_the_sentences_say_what_the_runs_give(page, lines):
    text = text_of(page)
    for sentence in SENTENCES[page](lines):
        assert sentence in text, f"{page} should say: {sentence}"


def test_what_a_map_gets_that_knows_nothing(lines):
    """The last column of the table at the top of docs/metrics.md."""
    text = (ROOT / "docs/metrics.md").read_text()
    last_cells = dict(re.findall(r"^\|[^|]*\| `(\w+)` \|.*\| ([^|]*) \|$", text, re.MULTILINE))
    assert last_cells["object_faithfulness"] == f"about {faithfulness_of_random_maps(lines)}"
    brightness = values(lines, "different", "matched/brightness/patch_faithfulness", EVERY_SEED)
    assert last_cells[
        "patch_faithfulness"
    ] == f"0; brightness about {brightness.mean():.1f}".replace("0.", ".")
    for map_name in ("random", "uniform"):
        of_map = values(lines, "different", f"matched/{map_name}/equal_ink", EVERY_SEED)
        assert of_map.mean() == pytest.approx(float(last_cells["equal_ink"]), abs=0.01)
    uniform = values(lines, "different", "matched/ink/auroc", EVERY_SEED)
    assert uniform.mean() == pytest.approx(float(last_cells["auroc"]), abs=0.01)


@pytest.mark.parametrize("page", DESIGN)
def test_every_other_number_belongs_to_the_design(page, lines):
    text = text_of(page)
    for phrase in DESIGN[page]:
        assert phrase in text, f"{page} no longer says: {phrase}"
    for phrase in sorted([*SENTENCES[page](lines), *DESIGN[page]], key=len, reverse=True):
        text = text.replace(phrase, "")
    text = re.sub(r"`[^`]*`", "", text)
    text = re.sub(r"\b[CFMQ]\d\b", "", text)  # the names of claims
    text = re.sub(r"\b(float|bfloat)\d\d\b|ViT-S/8|STL-10", "", text)
    left = re.findall(r".{,40}\d.{,20}", text)
    assert left == []


# ------------------------------------------------------------------------------------------ links


def anchor_of(heading: str) -> str:
    """What GitHub makes of a heading: the part of an address after #."""
    words = re.sub(r"[^\w\s-]", "", heading.lower())
    return words.strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in map(anchor_of, headings), link
