"""The study of maps: nine claims on which map can be believed, and the verdict on each.

The plan (plan-maps.md) was written before the first run. Seven claims are about the mean of a
difference over seeds, one about a correlation over seeds, and one about how well maps tell
networks apart. Each has an interval, a word, and a p value.

Throughout, `runs` is {(row, seed): line of study.json} of one preset.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats
from verdicts import (
    ALIKE,
    CONTRARY,
    HOLDS,
    LESS,
    MAP_SEEDS,
    MORE,
    NO_EFFECT,
    OPEN,
    UNDECIDED,
    format_interval,
    format_p,
    mean_cells,
    primary_of_seeds,
    sample,
    set_holm_p,
    t_interval,
    table_row,
    table_rule,
)
from verdicts import CLAIMS as PAPER_CLAIMS

SEEDS = range(70, 90)
TEN_SEEDS = range(70, 80)
MARK_SEEDS = range(70, 76)
# The rows of M8, whose networks saw marks with a probability of 0, .25, .5 and 1.
MARK_ROWS = ("different", "shortcut-25", "shortcut-50", "shortcut-100")
FEWEST_NETWORKS = 20  # of M8, some of which may have collapsed
RESAMPLES = 10_000  # of a bootstrap or a permutation test
DIFFERENT = "different from 0"  # what M9 expects

# The rows of the table of maps, in its order.
ROWS = (
    "different",
    "same",
    "dino-different",
    "supervised",
    "depth-1",
    "depth-3",
    "depth-4",
    "depth-6",
)
# Maps by what the tables call them: {name: row of metrics.json}.
MAPS = {
    "squared gradient": "squared_gradient",
    "norm rollout": "norm_rollout",
    "rollout": "rollout",
    "attention": "mean",
    "brightness": "brightness",
}

EQUAL_INK = "matched/{}/equal_ink"
OBJECTS = "matched/{}/object_faithfulness"


@dataclass(frozen=True, kw_only=True)
class MapClaim:
    """A claim, and what is expected of its primary quantity."""

    text: str
    quantity: str  # the primary quantity in words
    expected: str  # MORE or LESS than 0, ALIKE (within the margin), or DIFFERENT from 0
    margin: float  # the smallest size that is relevant; `word_of` says when it counts
    planned: int  # seeds or networks


CLAIMS = {
    "M1": MapClaim(
        text="attention knows more than the dose",
        quantity="equal ink of attention − .5, different views",
        expected=MORE,
        margin=0.03,
        planned=20,
    ),
    "M2": MapClaim(
        text="attention tells which object matters, better than brightness does",
        quantity="object faithfulness, attention − brightness, different views",
        expected=MORE,
        margin=0.02,
        planned=20,
    ),
    "M3": MapClaim(
        text="rollout is the better map",
        quantity="equal ink, rollout − attention, different views",
        expected=MORE,
        margin=0.03,
        planned=20,
    ),
    "M4": MapClaim(
        text="squared gradients are better still",
        quantity="equal ink, squared gradient − rollout, different views",
        expected=MORE,
        margin=0.03,
        planned=20,
    ),
    "M5": MapClaim(
        text="attention of the last block is a map of the last block",
        quantity="rank correlation over seeds: direct share with patch faithfulness of attention",
        expected=MORE,
        margin=0.2,
        planned=20,
    ),
    "M6": MapClaim(
        text="so depth undoes it",
        quantity="equal ink of attention, six blocks − two",
        expected=LESS,
        margin=0.03,
        planned=10,
    ),
    "M7": MapClaim(
        text="and rollout outlives depth",
        quantity="equal ink of rollout, six blocks − two",
        expected=ALIKE,
        margin=0.03,
        planned=10,
    ),
    "M8": MapClaim(
        text="a map can expose a shortcut, and rollout does so better than attention",
        quantity="AUC over networks of the density on the mark, rollout − attention",
        expected=MORE,
        margin=0.05,
        planned=24,
    ),
    "M9": MapClaim(
        text="different views make attention fairer, not only more selective",
        quantity="equal ink of attention, different − same views",
        expected=DIFFERENT,
        margin=0.03,
        planned=20,
    ),
}


@dataclass
class Verdict:
    """The result of a claim's test. With too few runs only `count` is known."""

    count: int  # seeds or networks
    word: str = OPEN
    value: float | None = None  # the primary quantity
    low: float | None = None  # its 95% interval
    high: float | None = None
    # p of the null hypothesis of no effect; for ALIKE, of a relevant one
    p: float | None = None
    # p of the null hypothesis that the primary quantity is not within the margin
    equivalence_p: float | None = None
    holm_p: float | None = None  # `p` corrected for all nine claims


# ----------------------------------------------------------------------------- primary quantities


def difference(runs, over, under, seeds):
    """Return {seed: difference} of two (row, measure), for the seeds that have both."""
    first = sample(runs, *over, seeds)
    second = sample(runs, *under, seeds)
    return {seed: first[seed] - second[seed] for seed in seeds if seed in first and seed in second}


def differences(runs):
    """Return {claim: {seed: primary quantity}} of the claims about a mean."""

    def attention(row):
        return row, EQUAL_INK.format("mean")

    def rollout(row):
        return row, EQUAL_INK.format("rollout")

    squared_gradient = ("different", EQUAL_INK.format("squared_gradient"))
    objects_of_attention = ("different", OBJECTS.format("mean"))
    objects_of_brightness = ("different", OBJECTS.format("brightness"))
    equal_ink = sample(runs, *attention("different"), SEEDS)
    return {
        "M1": {seed: value - 0.5 for seed, value in equal_ink.items()},
        "M2": difference(runs, objects_of_attention, objects_of_brightness, SEEDS),
        "M3": difference(runs, rollout("different"), attention("different"), SEEDS),
        "M4": difference(runs, squared_gradient, rollout("different"), SEEDS),
        "M6": difference(runs, attention("depth-6"), attention("different"), TEN_SEEDS),
        "M7": difference(runs, rollout("depth-6"), rollout("different"), TEN_SEEDS),
        "M9": difference(runs, attention("different"), attention("same"), SEEDS),
    }


def share_and_faithfulness(runs):
    """Return the direct share at the last block and attention's patch faithfulness, by seed: M5."""
    shares = sample(runs, "different", "direct_share", SEEDS)
    faithfulness = sample(runs, "different", "matched/mean/patch_faithfulness", SEEDS)
    seeds = [seed for seed in SEEDS if seed in shares and seed in faithfulness]
    seeds = [seed for seed in seeds if shares[seed][-1] is not None]
    last_share = np.array([shares[seed][-1] for seed in seeds])
    return last_share, np.array([faithfulness[seed] for seed in seeds])


def marks(runs, rows=MARK_ROWS):
    """Return the networks of M8 in some rows: reliance (n,), and {map: density on the mark (n,)}.

    A network that has collapsed has no reliance, and is left out.
    """
    measured = [runs.get((row, seed), {}).get("marks") for row in rows for seed in MARK_SEEDS]
    measured = [network for network in measured if network and network["reliance"] is not None]
    reliance = np.array([network["reliance"] for network in measured])
    names = [row for row in MAPS.values() if row != "brightness"]
    density = {name: np.array([network["density"][name] for network in measured]) for name in names}
    return reliance, density


def marks_are_complete(runs):
    """Return whether all networks of M8 were measured, those included that have collapsed."""
    return all("marks" in runs.get((row, seed), {}) for row in MARK_ROWS for seed in MARK_SEEDS)


def auc(truth, score):
    """Return how often, of two networks, the one with more of `score` has more of `truth`.

    Both are (…, n). Pairs with the same truth are left out; ties of the score count one half.
    """
    true_sign = np.sign(truth[..., :, None] - truth[..., None, :])
    sign = np.sign(score[..., :, None] - score[..., None, :])
    wins = (true_sign * sign).sum((-2, -1))
    pairs = np.abs(true_sign).sum((-2, -1))
    return 0.5 + 0.5 * wins / np.maximum(pairs, 1)  # without pairs: .5


def spearman(x, y):
    """Return the rank correlation of x and y along their last axis."""
    return pearson(stats.rankdata(x, axis=-1), stats.rankdata(y, axis=-1))


def pearson(x, y):
    """Return the correlation of x and y along their last axis; 0 if one of them is constant."""
    x = x - x.mean(-1, keepdims=True)
    y = y - y.mean(-1, keepdims=True)
    scale = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return (x * y).sum(-1) / np.where(scale > 0, scale, 1)


# -------------------------------------------------------------------------------------- the tests


def judge(runs):
    """Return {name of the claim: Verdict} for all nine claims."""
    of_means = differences(runs)
    verdicts = {}
    for name, claim in CLAIMS.items():
        if name == "M5":
            verdicts[name] = judge_correlation(claim, *share_and_faithfulness(runs))
        elif name == "M8":
            reliance, density = marks(runs)
            verdict = Verdict(len(reliance))
            if marks_are_complete(runs):
                verdict = judge_auc(claim, reliance, density["rollout"], density["mean"])
            verdicts[name] = verdict
        else:
            verdicts[name] = judge_mean(claim, np.array(list(of_means[name].values())))
    set_holm_p(verdicts, len(CLAIMS))
    return verdicts


def judge_mean(claim, values):
    """Return the verdict on the mean of `values`, one a seed: by Student's t."""
    verdict = Verdict(len(values))
    if len(values) < claim.planned:
        return verdict
    interval = t_interval(values)
    verdict.value, verdict.low, verdict.high = interval.mean, interval.low, interval.high
    # Without scatter there is nothing to compare the mean with.
    if np.ptp(values) == 0:
        verdict.equivalence_p = 1.0
        return finish(claim, verdict, 1.0)

    def p_above(limit):
        return stats.ttest_1samp(values, limit, alternative="greater").pvalue

    def p_below(limit):
        return stats.ttest_1samp(values, limit, alternative="less").pvalue

    verdict.equivalence_p = doubled(max(p_above(-claim.margin), p_below(claim.margin)))
    effect_p = doubled(min(p_above(0), p_below(0)))
    return finish(claim, verdict, effect_p)


def judge_correlation(claim, x, y):
    """Return the verdict on the rank correlation of x and y, one each a seed."""
    verdict = Verdict(len(x))
    if len(x) < claim.planned:
        return verdict
    rng = np.random.default_rng(0)
    verdict.value = spearman(x, y)
    chosen = rng.integers(len(x), size=(RESAMPLES, len(x)))
    set_bootstrap(claim, verdict, spearman(x[chosen], y[chosen]))
    shuffled = rng.permuted(np.tile(y, (RESAMPLES, 1)), axis=1)
    return finish(claim, verdict, permutation_p(verdict.value, spearman(x, shuffled)))


def judge_auc(claim, truth, score, reference):
    """Return the verdict on AUC of `score` − AUC of `reference` over networks, (n,) each."""
    verdict = Verdict(len(truth))
    if len(truth) < FEWEST_NETWORKS:
        return verdict
    rng = np.random.default_rng(0)
    verdict.value = auc(truth, score) - auc(truth, reference)
    set_bootstrap(claim, verdict, resampled_auc_difference(rng, truth, score, reference))
    # The null hypothesis: the ranks of both maps can be exchanged in any network.
    ranks = stats.rankdata(score)
    reference_ranks = stats.rankdata(reference)
    exchanged = rng.random((RESAMPLES, len(truth))) < 0.5
    first = np.where(exchanged, reference_ranks, ranks)
    second = np.where(exchanged, ranks, reference_ranks)
    permuted = auc(truth, first) - auc(truth, second)
    return finish(claim, verdict, permutation_p(verdict.value, permuted))


def resampled_auc_difference(rng, truth, score, reference):
    """Return AUC of `score` − AUC of `reference` in random samples of the networks: (RESAMPLES,)."""
    chosen = rng.integers(len(truth), size=(RESAMPLES, len(truth)))
    return auc(truth[chosen], score[chosen]) - auc(truth[chosen], reference[chosen])


def set_bootstrap(claim, verdict, resampled):
    """Set the interval, and p of equivalence, from the resampled primary quantity."""
    verdict.low, verdict.high = np.percentile(resampled, [2.5, 97.5])
    beyond = max(np.mean(resampled <= -claim.margin), np.mean(resampled >= claim.margin))
    verdict.equivalence_p = doubled(beyond)


def permutation_p(value, permuted):
    """Return the one-sided p, doubled, of a value among those of random permutations."""
    count = len(permuted) + 1  # the data are one of the permutations
    rounding = 1e-9  # equal values may differ by this
    above = (np.sum(permuted >= value - rounding) + 1) / count
    below = (np.sum(permuted <= value + rounding) + 1) / count
    return doubled(min(above, below))


def doubled(p):
    return min(1.0, 2 * float(p))


def finish(claim, verdict, effect_p):
    """Set word and p of a verdict that has an interval, and return it."""
    verdict.word = word_of(claim, verdict.low, verdict.high)
    verdict.p = verdict.equivalence_p if claim.expected == ALIKE else effect_p
    return verdict


def word_of(claim, low, high):
    """Return the word that a 95% interval from `low` to `high` gives.

    A claim of MORE or LESS holds if the interval is beyond 0 on the claimed side, even inside the
    margin. Otherwise, and for a claim of DIFFERENT, the margin comes first: an interval inside it
    means that there is no relevant effect, even if the interval excludes 0.
    """
    is_inside_margin = -claim.margin < low and high < claim.margin
    is_above = low > 0
    is_below = high < 0
    if claim.expected == ALIKE:
        if is_inside_margin:
            return HOLDS
        is_outside_margin = low > claim.margin or high < -claim.margin
        return CONTRARY if is_outside_margin else UNDECIDED
    if claim.expected == DIFFERENT:
        if is_inside_margin:
            return NO_EFFECT
        return HOLDS if is_above or is_below else UNDECIDED
    is_as_claimed = is_below if claim.expected == LESS else is_above
    is_contrary = is_above if claim.expected == LESS else is_below
    if is_as_claimed:
        return HOLDS
    if is_inside_margin:
        return NO_EFFECT
    return CONTRARY if is_contrary else UNDECIDED


# ------------------------------------------------------------------------------------- the tables


def claim_table(runs):
    """Return the table of the nine claims."""
    titles = [
        "",
        "claim",
        "",
        "primary quantity",
        "value [95%]",
        "margin",
        "n",
        "p (Holm)",
        "p (equivalence)",
    ]
    lines = [table_row(titles), table_rule(len(titles))]
    for name, verdict in judge(runs).items():
        claim = CLAIMS[name]
        interval = p = equivalence = "–"
        if verdict.value is not None:
            interval = f"{verdict.value:+.3f} [{verdict.low:+.3f}, {verdict.high:+.3f}]"
            p = format_p(verdict.holm_p)
            if verdict.word == NO_EFFECT or claim.expected == ALIKE:
                equivalence = format_p(verdict.equivalence_p)
        count = f"{verdict.count} of {claim.planned}"
        if verdict.count == claim.planned:
            count = str(claim.planned)
        margin = f"±{claim.margin:g}"
        cells = [name, claim.text, f"**{verdict.word}**", claim.quantity, interval, margin]
        lines.append(table_row([*cells, count, p, equivalence]))
    return "\n".join(lines)


def seeds_of(runs, row):
    """Return the seeds of a row that the tables and figures show.

    They are those of this study once all of them have been run, so that nobody reads half a result;
    before that, those of a first look, 60 to 64.
    """
    planned = SEEDS if row in ("different", "same") else TEN_SEEDS
    if all((row, seed) in runs for seed in planned):
        return list(planned)
    return [seed for seed in MAP_SEEDS if (row, seed) in runs]


def map_table(runs):
    """Return a table of how often each map orders two patches with equal ink rightly."""
    titles = ["row", "seeds", *MAPS, "direct share"]
    lines = [table_row(titles), table_rule(len(titles))]
    for row in ROWS:
        if seeds_of(runs, row):
            measures = [EQUAL_INK.format(name) for name in MAPS.values()]
            cells = mean_cells(runs, row, measures, seeds_of(runs, row))
            lines.append(map_row(runs, row, [*cells, direct_shares(runs, row)]))
    return "\n".join(lines)


def untrained_table(runs):
    """Return a table like `map_table`, of networks before training.

    Rows of one depth that differ in loss or views are the same before training.
    """
    titles = ["row", "seeds", *MAPS]
    lines = [table_row(titles), table_rule(len(titles))]
    for row in ROWS:
        is_shown = row == "different" or row.startswith("depth")
        if is_shown and seeds_of(runs, row):
            measures = [f"untrained/{name}/equal_ink" for name in MAPS.values()]
            cells = mean_cells(runs, row, measures, seeds_of(runs, row))
            lines.append(map_row(runs, row, cells))
    return "\n".join(lines)


def measure_table(runs):
    """Return a table of every map by every measure of whether it can be believed."""
    measures = {
        "equal ink": "equal_ink",
        "patches": "patch_faithfulness",
        "objects": "object_faithfulness",
        "direct": "direct_faithfulness",
    }
    titles = ["row", "seeds", "map", *measures]
    lines = [table_row(titles), table_rule(len(titles))]
    for row in ROWS:
        seeds = seeds_of(runs, row)
        for name, map_name in MAPS.items():
            paths = [f"matched/{map_name}/{measure}" for measure in measures.values()]
            if seeds:
                cells = [name, *mean_cells(runs, row, paths, seeds)]
                lines.append(map_row(runs, row, cells))
    return "\n".join(lines)


def map_row(runs, row, cells):
    """Return a table row that begins with the name and the seeds of a row of the study."""
    seeds = seeds_of(runs, row)
    return table_row([f"`{row}`", f"{min(seeds)} to {max(seeds)}", *cells])


def direct_shares(runs, row):
    """Return the mean over seeds of the direct share at each block, as text."""
    shares = list(sample(runs, row, "direct_share", seeds_of(runs, row)).values())
    shares = [of_run for of_run in shares if None not in of_run]  # as a collapsed network has
    if not shares:
        return "–"
    return ", ".join(f"{share:.2f}" for share in np.mean(shares, axis=0))


def confirmation_table(runs):
    """Return a table of C3 and C5, goals of the recipe, on the seeds of this study."""
    lines = ["| | primary quantity | seeds | mean [95%] |", table_rule(4)]
    for name in ("C3", "C5"):
        claim = PAPER_CLAIMS[name]
        values = list(primary_of_seeds(runs, claim, SEEDS).values())
        is_complete = len(values) == len(SEEDS)
        cell = format_interval(claim, t_interval(values)) if is_complete else "–"
        lines.append(table_row([name, claim.quantity, str(len(values)), cell]))
    return "\n".join(lines)


def initial_weights_sentence(runs):
    """Return how attention's patch faithfulness of `same` and `different` correlates over seeds."""
    measure = "matched/mean/patch_faithfulness"
    same = sample(runs, "same", measure, SEEDS)
    different = sample(runs, "different", measure, SEEDS)
    seeds = [seed for seed in SEEDS if seed in same and seed in different]
    if len(seeds) < len(SEEDS):
        return "Its runs are not complete."
    x = np.array([same[seed] for seed in seeds])
    y = np.array([different[seed] for seed in seeds])
    chosen = np.random.default_rng(0).integers(len(seeds), size=(RESAMPLES, len(seeds)))
    low, high = np.percentile(spearman(x[chosen], y[chosen]), [2.5, 97.5])
    return (
        f"Between `same` and `different`, attention's patch faithfulness has a rank correlation of "
        f"{spearman(x, y):.2f} [{low:.2f}, {high:.2f}] over {len(seeds)} seeds."
    )


def mark_table(runs):
    """Return a table of M8: reliance, densities and AUC of each map, once all runs are there."""
    if not marks_are_complete(runs):
        return "Its runs are not complete."
    reliance, density = marks(runs)
    titles = ["row", "networks", "reliance"]
    names = [name for name, row in MAPS.items() if row in density]
    lines = [table_row([*titles, *names]), table_rule(len(titles) + len(names))]
    for row in MARK_ROWS:
        row_reliance, row_density = marks(runs, [row])
        cells = [f"`{row}`", str(len(row_reliance))]
        of_row = [row_reliance, *(row_density[MAPS[name]] for name in names)]
        cells += [f"{values.mean():.2f}" if len(values) else "–" for values in of_row]
        lines.append(table_row(cells))
    aucs = [f"{auc(reliance, density[MAPS[name]]):.2f}" for name in names]
    lines.append(table_row(["pairs in the right order (AUC)", str(len(reliance)), "", *aucs]))
    difference_cells = []
    for name in names:
        if name == "attention":
            difference_cells.append("–")
        else:
            cell = auc_difference_cell(reliance, density[MAPS[name]], density["mean"])
            difference_cells.append(cell)
    lines.append(
        table_row(["the same − that of attention", str(len(reliance)), "", *difference_cells])
    )
    aucs = [f"{auc_within_rows(runs, MAPS[name]):.2f}" for name in names]
    lines.append(table_row(["pairs within a row", str(len(reliance)), "", *aucs]))
    return "\n".join(lines)


def auc_difference_cell(truth, score, reference):
    """Return AUC of `score` − AUC of `reference`, with its interval over networks."""
    resampled = resampled_auc_difference(np.random.default_rng(0), truth, score, reference)
    low, high = np.percentile(resampled, [2.5, 97.5])
    value = auc(truth, score) - auc(truth, reference)
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def auc_within_rows(runs, map_row_name):
    """Return the mean over MARK_ROWS of a map's AUC among the networks of one row."""
    aucs = []
    for row in MARK_ROWS:
        reliance, density = marks(runs, [row])
        if len(reliance) > 1:
            aucs.append(auc(reliance, density[map_row_name]))
    return np.mean(aucs)


def page_blocks(runs):
    """Return {name: text} of the marked places of the pages, as `verdicts.page_blocks` does."""
    return {
        "map claims": claim_table(runs),
        "maps": map_table(runs),
        "maps before training": untrained_table(runs),
        "maps by measure": measure_table(runs),
        "confirmation": confirmation_table(runs),
        "initial weights": initial_weights_sentence(runs),
        "marks": mark_table(runs),
    }
