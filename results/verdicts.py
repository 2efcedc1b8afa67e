"""Turn the lines of study.json into one verdict per claim, and into the tables of the pages.

The plan (plan.md) was written before the first run. Each claim has one primary quantity: the log
ratio, or the difference, of two measures of runs that have the same seed. The mean of this quantity
over the seeds has a 95% interval of Student's t, and the interval decides the verdict. All other
numbers on the pages are descriptions.

Throughout, `runs` is {(row, seed): line of study.json} of one preset.
"""

import math
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from scipy import stats

# Seeds that had not been used for anything before the study.
FRESH = range(10, 20)
# A second sample, for the claims that the first sample left undecided (plan.md).
SECOND = range(30, 60)
BOTH = (*FRESH, *SECOND)
# Seeds of the first answer on which map to believe, which tests no claim.
MAP_SEEDS = range(60, 65)
# A verdict needs this many seeds. It is marked "so far" until all planned seeds are there.
MINIMUM_SEEDS = 5
# The number of seeds that would decide a claim is looked for up to here.
MAXIMUM_SEEDS = 100

# Measures are paths into a line of study.json ...
AUROC = "matched/mean/auroc"
SELECTIVITY = "matched/mean/selectivity"
BRIGHTNESS_SELECTIVITY = "matched/brightness/selectivity"
ROLLOUT_SELECTIVITY = "matched/rollout/selectivity"
FAITHFULNESS = "matched/mean/patch_faithfulness"
BRIGHTNESS_FAITHFULNESS = "matched/brightness/patch_faithfulness"
ROLLOUT_FAITHFULNESS = "matched/rollout/patch_faithfulness"
UNTRAINED_FAITHFULNESS = "matched/untrained/patch_faithfulness"
OBJECT_FAITHFULNESS = "matched/mean/object_faithfulness"
BRIGHTNESS_OBJECT_FAITHFULNESS = "matched/brightness/object_faithfulness"
FAR_BACKGROUND = "matched/mean/far_background_density"
CAUSAL_SELECTIVITY = "causal_selectivity"
PROBE = "features/linear_probe"
UNTRAINED_PROBE = "untrained_features/linear_probe"
# ... or one of these names, which `read_measure` explains.
BEST_HEAD = "best head"
HEADS_PAST_INK = "past"
MOST_STRAY_HEAD = "stray"
FIRST_DIVERSITY = "diversity, epoch 1"
LAST_DIVERSITY = "diversity at the end"

# How the two sides of a claim are compared.
RATIO = "ratio"
DIFFERENCE = "difference"

# What a claim expects of the first side, compared with the second.
MORE = "more"
LESS = "less"
ALIKE = "alike"
NO_LESS = "no less"

# The verdicts.
HOLDS = "holds"
CONTRARY = "the contrary holds"
NO_EFFECT = "no relevant effect"
UNDECIDED = "undecided"
OPEN = "open"  # too few runs


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a measure of every run of a row."""

    row: str  # "best X": the row with the best learning rate in the search on X
    measure: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim and how it is tested."""

    text: str
    quantity: str  # the primary quantity in words
    compared: Side
    reference: Side | None  # None: `compared` is tested as it is, as a ratio to 1
    # A second (compared, reference): the pair with the lower mean is tested.
    alternative: tuple[Side, Side] | None = None
    scale: str  # RATIO or DIFFERENCE
    expected: str  # MORE, LESS, ALIKE or NO_LESS
    margin: float | None = None  # effects below it are not relevant: 0.1 is 10% of a ratio
    planned_seeds: int = len(FRESH)
    has_second_sample: bool = False

    @property
    def scaled_margin(self):
        """The margin on the scale of the primary quantity: for ratios, its logarithm."""
        if self.margin is not None and self.scale == RATIO:
            return math.log(1 + self.margin)
        return self.margin

    @property
    def null(self):
        """The value of the primary quantity that the interval has to exclude."""
        if self.expected == NO_LESS:
            return -self.scaled_margin
        return 0


CLAIMS = {
    "F1": Claim(
        text="attention points to what the feature depends on, better than brightness does",
        quantity="object faithfulness, attention − brightness, different views",
        compared=Side("different", OBJECT_FAITHFULNESS),
        reference=Side("different", BRIGHTNESS_OBJECT_FAITHFULNESS),
        scale=DIFFERENCE,
        expected=MORE,
        margin=0.02,
        has_second_sample=True,
    ),
    "F2": Claim(
        text="with different views it does so better than with same views",
        quantity="object faithfulness of attention, different − same views",
        compared=Side("different", OBJECT_FAITHFULNESS),
        reference=Side("same", OBJECT_FAITHFULNESS),
        scale=DIFFERENCE,
        expected=MORE,
        margin=0.02,
        has_second_sample=True,
    ),
    "F3": Claim(
        text="attention rollout does so at least as well",
        quantity="patch faithfulness, rollout − attention, different views",
        compared=Side("different", ROLLOUT_FAITHFULNESS),
        reference=Side("different", FAITHFULNESS),
        scale=DIFFERENCE,
        expected=NO_LESS,
        margin=0.02,
    ),
    "F4": Claim(
        text="registers mend heads that look past the ink",
        quantity="share of heads past the ink, 4 registers − none, different views",
        compared=Side("different", HEADS_PAST_INK),
        reference=Side("different-registers-0", HEADS_PAST_INK),
        scale=DIFFERENCE,
        expected=LESS,
    ),
    "C1": Claim(
        text="both losses classify (figures 2, 3)",
        quantity="linear probe ÷ that of the untrained network, the weaker loss",
        compared=Side("same", PROBE),
        reference=Side("same", UNTRAINED_PROBE),
        alternative=(Side("dino-same", PROBE), Side("dino-same", UNTRAINED_PROBE)),
        scale=RATIO,
        expected=MORE,
    ),
    "C2": Claim(
        text="NCE's maps read better than cross-entropy's",
        quantity="auroc, NCE ÷ DINO's loss, same views, each at its best learning rate",
        compared=Side("best same", AUROC),
        reference=Side("best dino-same", AUROC),
        scale=RATIO,
        expected=MORE,
        margin=0.05,
    ),
    "C3": Claim(
        text="same views: digit and clutter get the attention that their brightness explains (figure 4)",
        quantity="selectivity, same views ÷ brightness",
        compared=Side("same", SELECTIVITY),
        reference=Side("same", BRIGHTNESS_SELECTIVITY),
        scale=RATIO,
        expected=ALIKE,
        margin=0.1,
    ),
    "C4": Claim(
        text="same views: a textured background is ignored (figure 5)",
        quantity="density of attention on far background, a texture a canvas",
        compared=Side("texture", FAR_BACKGROUND),
        reference=None,
        scale=RATIO,
        expected=LESS,
    ),
    "C5": Claim(
        text="different views find the digit (figure 6)",
        quantity="selectivity, different ÷ same views",
        compared=Side("different", SELECTIVITY),
        reference=Side("same", SELECTIVITY),
        scale=RATIO,
        expected=MORE,
        margin=0.1,
    ),
    "C6": Claim(
        text="heads part with time (section III.B)",
        quantity="diversity of the heads, bits, epoch 40 − epoch 1, different views",
        compared=Side("different-long", LAST_DIVERSITY),
        reference=Side("different-long", FIRST_DIVERSITY),
        scale=DIFFERENCE,
        expected=MORE,
        margin=0.05,
        planned_seeds=5,
    ),
    "C7": Claim(
        text="4, 2 or 1 crops make no difference (section III.C)",
        quantity="selectivity, 4 ÷ 1 crop, same views, as many canvases",
        compared=Side("same-4", SELECTIVITY),
        reference=Side("same-1", SELECTIVITY),
        scale=RATIO,
        expected=ALIKE,
        margin=0.2,
    ),
    "C8": Claim(
        text="a higher resolution gives better maps (section III)",
        quantity="auroc, 56 ÷ 28 px, different views",
        compared=Side("different", AUROC),
        reference=Side("size-28", AUROC),
        scale=RATIO,
        expected=MORE,
        margin=0.05,
        has_second_sample=True,
    ),
    "C9": Claim(
        text="self-supervised maps beat supervised ones (section I)",
        quantity="selectivity, different views ÷ supervised",
        compared=Side("different", SELECTIVITY),
        reference=Side("supervised", SELECTIVITY),
        scale=RATIO,
        expected=MORE,
        margin=0.1,
    ),
    "Q1": Claim(
        text="a larger batch helps (asked in section IV)",
        quantity="selectivity, batch 256 ÷ 32, each at its best learning rate",
        compared=Side("best batch-256", SELECTIVITY),
        reference=Side("best batch-32", SELECTIVITY),
        scale=RATIO,
        expected=MORE,
        margin=0.1,
    ),
    "Q2": Claim(
        text="more heads help (asked in section IV)",
        quantity="selectivity of the best head, 6 ÷ 3 heads",
        compared=Side("heads-6", BEST_HEAD),
        reference=Side("different", BEST_HEAD),
        scale=RATIO,
        expected=MORE,
        margin=0.1,
        has_second_sample=True,
    ),
    "Q3": Claim(
        text="other pre-training helps (asked in section IV)",
        quantity="selectivity, same views from supervised weights ÷ from random ones",
        compared=Side("pretrained", SELECTIVITY),
        reference=Side("same", SELECTIVITY),
        scale=RATIO,
        expected=MORE,
        margin=0.1,
    ),
}


# What F1 and F2 were planned to test: with the amount of ink, the dose, left in (see plan.md).
OLD_CLAIMS = {
    "F1": replace(
        CLAIMS["F1"],
        quantity="patch faithfulness, attention − brightness, different views",
        compared=Side("different", FAITHFULNESS),
        reference=Side("different", BRIGHTNESS_FAITHFULNESS),
    ),
    "F2": replace(
        CLAIMS["F2"],
        quantity="patch faithfulness of attention, different − same views",
        compared=Side("different", FAITHFULNESS),
        reference=Side("same", FAITHFULNESS),
    ),
}


@dataclass(frozen=True)
class Search:
    """The search for a row's best learning rate, on seed 0."""

    claim: str  # the claim that needs it
    measure: str  # of the mean map on the last validation canvases
    batch_size: int = 64  # the preset's


SEARCHES = {
    "same": Search("C2", "auroc"),
    "dino-same": Search("C2", "auroc"),
    "batch-32": Search("Q1", "selectivity", batch_size=32),
    "batch-256": Search("Q1", "selectivity", batch_size=256),
}


# ---------------------------------------------------------------- numbers from lines of study.json


def read_measure(line, measure):
    """Return a measure of one run: by its name below, else by its path in the line.

    None if the version that made the run did not measure it.
    """
    # The selectivity of the head that was best on the validation canvases.
    if measure == BEST_HEAD:
        return line["matched"][line["best_head"]]["selectivity"]
    # A head looks past the ink if it is denser on far background than a uniform map.
    if measure == HEADS_PAST_INK:
        return np.mean(far_background_of_heads(line) > 1)
    if measure == MOST_STRAY_HEAD:
        return far_background_of_heads(line).max()
    # The diversity of the heads on validation canvases. The curve begins with epoch 0.
    if measure == FIRST_DIVERSITY:
        return line["curve"][1]["mean"]["diversity"]
    if measure == LAST_DIVERSITY:
        return line["curve"][-1]["mean"]["diversity"]
    value = line
    for key in measure.split("/"):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def far_background_of_heads(line):
    """Return the density of each head on far background: (heads,)."""
    densities = []
    for row, metrics in line["matched"].items():
        if row.startswith("head_"):
            densities.append(metrics["far_background_density"])
    return np.array(densities)


def sample(runs, row, measure, seeds=FRESH):
    """Return {seed: value} of a measure, for those runs of a row that have been done and have it."""
    if row.startswith("best "):
        row = best_row(runs, row.removeprefix("best "))
    values = {}
    for seed in seeds:
        if (row, seed) in runs:
            values[seed] = read_measure(runs[row, seed], measure)
    return {seed: value for seed, value in values.items() if value is not None}


# --------------------------------------------------------------- the searches for learning rates


def rate_row(base, factor):
    """Return the name of the row `base` at its learning rate times `factor`."""
    if factor == 1:
        return base
    return f"{base}-lr-{factor:g}"


def searched_rates(runs, base):
    """Return {factor: value on validation canvases} of the runs of a search, by rising factor."""
    values = {}
    for row, seed in runs:
        name, _, factor = row.partition("-lr-")
        if name == base and seed == 0:
            last_epoch = runs[row, seed]["curve"][-1]
            values[float(factor or 1)] = last_epoch["mean"][SEARCHES[base].measure]
    return dict(sorted(values.items()))


def best_row(runs, base):
    """Return the row with the best learning rate, or None while that is at an edge."""
    values = searched_rates(runs, base)
    if not values:
        return None
    best_factor = max(values, key=values.get)
    if min(values) < best_factor < max(values):
        return rate_row(base, best_factor)
    return None


# ------------------------------------------------------------------------------------- the tests


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95% interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Forecast:
    """The number of seeds that would decide a claim if mean and scatter stayed, and its verdict."""

    seeds: int
    word: str


@dataclass
class Verdict:
    """The result of a claim's test. With too few seeds, the interval and the p values are None."""

    seeds: int
    word: str = OPEN
    interval: Interval | None = None
    forecast: Forecast | None = None  # of an undecided claim, if 100 seeds would do
    p: float | None = None  # of the t test
    flip_p: float | None = None  # of flipping signs, which is exact
    holm_p: float | None = None  # `p` corrected for all claims


def primary(runs, claim):
    """Return {seed: primary quantity}: of the second sample alone once that is complete."""
    if claim.has_second_sample:
        second = primary_of_seeds(runs, claim, SECOND)
        if len(second) == len(SECOND):
            return second
    return primary_of_seeds(runs, claim, FRESH)


def primary_of_seeds(runs, claim, seeds):
    """Return {seed: log ratio or difference} of a claim, for the seeds that both sides have."""
    quantity = compare(runs, claim, claim.compared, claim.reference, seeds)
    if claim.alternative:
        alternative = compare(runs, claim, *claim.alternative, seeds)
        quantity = min(quantity, alternative, key=mean_or_minus_infinity)
    return quantity


def compare(runs, claim, compared, reference, seeds):
    """Return {seed: log ratio or difference} of two sides."""
    over = sample(runs, compared.row, compared.measure, seeds)
    if reference:
        under = sample(runs, reference.row, reference.measure, seeds)
    else:
        under = dict.fromkeys(over, 1)
    quantity = {}
    for seed in sorted(over.keys() & under.keys()):
        if claim.scale == RATIO:
            quantity[seed] = math.log(over[seed] / under[seed])
        else:
            quantity[seed] = over[seed] - under[seed]
    return quantity


def mean_or_minus_infinity(quantity):
    """Return the mean over seeds. A row without runs counts as the lowest: its claim stays open."""
    if not quantity:
        return -math.inf
    return np.mean(list(quantity.values()))


def t_half_width(std, count):
    """Return half the width of the 95% interval of Student's t for a mean of `count` values."""
    return stats.t.ppf(0.975, count - 1) * std / count**0.5


def t_interval(values):
    """Return the mean of the values with its 95% interval of Student's t."""
    values = np.array(values)
    mean = values.mean()
    half_width = t_half_width(values.std(ddof=1), len(values))
    return Interval(mean, mean - half_width, mean + half_width)


def verdict_word(claim, low, high):
    """Return the verdict that a 95% interval from `low` to `high` gives on a claim."""
    margin = claim.scaled_margin
    is_inside_margin = margin is not None and -margin < low and high < margin
    if claim.expected == ALIKE:
        if is_inside_margin:
            return HOLDS
        if low > margin or high < -margin:
            return CONTRARY
        return UNDECIDED
    is_as_claimed = high < claim.null if claim.expected == LESS else low > claim.null
    is_contrary = low > claim.null if claim.expected == LESS else high < claim.null
    if is_as_claimed:
        return HOLDS
    if is_inside_margin:
        return NO_EFFECT
    return CONTRARY if is_contrary else UNDECIDED


def forecast(claim, values):
    """Return the number of seeds that would decide the claim, or None if 100 would not."""
    mean = np.mean(values)
    std = np.std(values, ddof=1)
    for count in range(len(values), MAXIMUM_SEEDS + 1):
        half_width = t_half_width(std, count)
        word = verdict_word(claim, mean - half_width, mean + half_width)
        if word != UNDECIDED:
            return Forecast(count, word)
    return None


def p_by_t(values):
    """Return the one-sided p of Student's t that the mean is above 0."""
    return stats.ttest_1samp(values, 0, alternative="greater").pvalue


def p_by_flips(values):
    """Return the exact one-sided p that the mean is above 0.

    It is the share of all choices of signs whose mean is no lower. For more than 16 values, 65,536
    random choices stand for all.
    """
    test = stats.permutation_test(
        (values,),
        np.mean,
        alternative="greater",
        permutation_type="samples",
        n_resamples=2**16,
        rng=0,
    )
    return test.pvalue


def p_values(claim, values):
    """Return p by t and p by flipping signs.

    Both are one-sided and doubled, so that p is below .05 where the 95% interval ends. They are
    for a mean other than the null, on either side. For a claim of no difference they are for a
    mean inside the margin, so both sides have to be shown and the larger p counts.
    """
    values = np.array(values)
    # Without scatter there is nothing to compare the mean with.
    if np.ptp(values) == 0:
        return 1.0, 1.0
    if claim.expected == ALIKE:
        sides = [values + claim.scaled_margin, claim.scaled_margin - values]
        choose = max
    else:
        sides = [values - claim.null, claim.null - values]
        choose = min
    t_p = choose(p_by_t(side) for side in sides)
    flip_p = choose(p_by_flips(side) for side in sides)
    return min(1.0, 2 * t_p), min(1.0, 2 * flip_p)


def judge(runs):
    """Return {name of the claim: Verdict} for all claims."""
    verdicts = {}
    for name, claim in CLAIMS.items():
        values = list(primary(runs, claim).values())
        verdicts[name] = judge_claim(claim, values)
    set_holm_p(verdicts, len(CLAIMS))
    return verdicts


def judge_claim(claim, values):
    """Return the verdict on a claim from the values of its primary quantity, one a seed."""
    verdict = Verdict(seeds=len(values))
    if len(values) < MINIMUM_SEEDS:
        return verdict
    verdict.interval = t_interval(values)
    verdict.word = verdict_word(claim, verdict.interval.low, verdict.interval.high)
    if verdict.word == UNDECIDED:
        verdict.forecast = forecast(claim, values)
    verdict.p, verdict.flip_p = p_values(claim, values)
    return verdict


def set_holm_p(verdicts, claims):
    """Set `holm_p`: p corrected by Holm for this many claims, those without runs included."""
    tested = [verdict for verdict in verdicts.values() if verdict.p is not None]
    corrected = 0
    for rank, verdict in enumerate(sorted(tested, key=lambda verdict: verdict.p)):
        corrected = max(corrected, min(1, verdict.p * (claims - rank)))
        verdict.holm_p = corrected


# ------------------------------------------------------------------------- the table of verdicts


def format_value(claim, value):
    """Format a value of the primary quantity: log ratios as ratios, differences with a sign."""
    if claim.scale == RATIO:
        return f"{math.exp(value):.2f}"
    return f"{value:+.3f}"


def format_interval(claim, interval):
    mean = format_value(claim, interval.mean)
    low = format_value(claim, interval.low)
    high = format_value(claim, interval.high)
    return f"{mean} [{low}, {high}]"


def format_p(p):
    if p < 0.001:
        return "< .001"
    return f"{p:.3f}"


def table_row(cells):
    return f"| {' | '.join(cells)} |"


def table_rule(columns):
    """Return the line between the head of a table and its body."""
    return "|" + "---|" * columns


def verdict_table(runs):
    """Return the table of the claims, with one line each."""
    lines = [
        "| | claim | | primary quantity | mean [95%] | seeds | p (Holm), by flips | |",
        table_rule(8),
    ]
    judged = judge(runs)
    remarks = claim_remarks(runs)
    for name, verdict in judged.items():
        claim = CLAIMS[name]
        interval = "–"
        p = "–"
        figure = "–"
        word = word_cell(claim, verdict)
        if verdict.interval:
            interval = interval_cell(runs, claim, verdict)
            p = f"{format_p(verdict.holm_p)}, {format_p(verdict.flip_p)}"
            figure = f"[figure](figures/{name}.png)"
            if name in remarks:
                word += f": {remarks[name]}"
        cells = [name, claim.text, word, claim.quantity]
        cells += [interval, str(verdict.seeds), p, figure]
        lines.append(table_row(cells))
    with_interval = [verdict for verdict in judged.values() if verdict.interval]
    if any(tests_disagree(verdict) for verdict in with_interval):
        note = "¹ the interval and the two p values, by Holm and by flips, do not agree at 5%."
        lines += ["", note]
    return "\n".join(lines)


def claim_remarks(runs):
    """Return {name of the claim: what has to be kept in mind beside its word}."""
    as_planned = {
        name: judge_claim(claim, list(primary(runs, claim).values())).word
        for name, claim in OLD_CLAIMS.items()
    }
    remarks = {
        "F1": f"chosen after the fact; see M2 (as planned: {as_planned['F1']})",
        "F2": f"chosen after the fact (as planned: {as_planned['F2']})",
        "C2": "if anything, slightly worse",
        "C3": "a goal of the recipe",
        "C5": "its size was a goal of the recipe",
        "C6": remark_on_epochs(runs),
        "C7": remark_on_crops(runs),
        "F3": "with the dose left in; see M3",
        "F4": remark_on_stray_heads(runs),
        "Q2": remark_on_six_heads(runs),
    }
    return {name: remark for name, remark in remarks.items() if remark}


def remark_on_epochs(runs):
    """Return when the heads of C6 are furthest apart, in the mean of the runs; None without runs."""
    curves = list(sample(runs, "different-long", "curve").values())
    if len(curves) < MINIMUM_SEEDS:
        return None
    diversity = [[epoch["mean"]["diversity"] for epoch in curve] for curve in curves]
    epoch = np.mean(diversity, axis=0).argmax()
    return (
        f"the first epoch lies in the ramp of the learning rate; heads part until epoch {epoch} and "
        f"converge after"
    )


def remark_on_crops(runs):
    """Return what four crops change beside selectivity (C7); None without runs."""
    probes = [list(sample(runs, row, PROBE).values()) for row in ("same-4", "same-1")]
    auroc = replace(CLAIMS["C7"], compared=Side("same-4", AUROC), reference=Side("same-1", AUROC))
    log_ratios = list(primary_of_seeds(runs, auroc, FRESH).values())
    if min(len(values) for values in (*probes, log_ratios)) < MINIMUM_SEEDS:
        return None
    of_four, of_one = (np.mean(values) for values in probes)
    return (
        f"in selectivity; but the probe is {of_four:.2f} instead of {of_one:.2f}, and auroc is "
        f"{math.exp(np.mean(log_ratios)):.2f} times as high"
    )


def remark_on_stray_heads(runs):
    """Return the continuous version of F4, whose shares are all 0; None without runs."""
    stray = replace(
        CLAIMS["F4"],
        compared=Side("different", MOST_STRAY_HEAD),
        reference=Side("different-registers-0", MOST_STRAY_HEAD),
    )
    differences = list(primary_of_seeds(runs, stray, FRESH).values())
    if len(differences) < MINIMUM_SEEDS:
        return None
    cell = format_interval(stray, t_interval(differences))
    return f"no head of either row is past the ink; the most stray head: {cell}"


def remark_on_six_heads(runs):
    """Return Q2 if only three of the six heads could be chosen from; None without runs.

    The best head is that of the test canvases here, on both sides. Of six heads it is the mean over
    all choices of three.
    """
    log_ratios = []
    for seed in SECOND:
        if ("heads-6", seed) in runs and ("different", seed) in runs:
            of_three = heads_selectivity(runs["different", seed]).max()
            of_six = heads_selectivity(runs["heads-6", seed])
            best = [max(chosen) for chosen in combinations(of_six, 3)]
            log_ratios.append(math.log(np.mean(best) / of_three))
    if len(log_ratios) < MINIMUM_SEEDS:
        return None
    cell = format_interval(CLAIMS["Q2"], t_interval(log_ratios))
    return f"the best of six; the best of any three of the six: {cell}"


def heads_selectivity(line):
    """Return the selectivity of each head: (heads,)."""
    rows = [row for row in line["matched"] if row.startswith("head_")]
    return np.array([line["matched"][row]["selectivity"] for row in rows])


def word_cell(claim, verdict):
    """Return the verdict, and what to keep in mind about it."""
    cell = f"**{verdict.word}**"
    if not verdict.interval:
        return cell
    if verdict.seeds < claim.planned_seeds:
        cell += " so far"
    if verdict.word == UNDECIDED:
        cell += f" ({forecast_note(verdict)})"
    if tests_disagree(verdict):
        cell += " ¹"
    return cell


def forecast_note(verdict):
    """Return how many seeds would decide an undecided claim, or why none would."""
    if verdict.forecast:
        return f"as it is, {verdict.forecast.seeds} seeds: {verdict.forecast.word}"
    if verdict.interval.low < verdict.interval.high:
        return "100 seeds would not do"
    return "all seeds alike"


def tests_disagree(verdict):
    """Whether the word, the corrected p and p by flips differ about an effect at 5%.

    An effect that is inside the margin may well be significant.
    """
    if verdict.word == NO_EFFECT:
        return False
    is_effect = verdict.word in (HOLDS, CONTRARY)
    is_significant = verdict.holm_p < 0.05
    is_significant_by_flips = verdict.flip_p < 0.05
    return is_significant != is_effect or is_significant_by_flips != is_effect


def interval_cell(runs, claim, verdict):
    """Return mean and interval, and those of the first sample beside those of the second."""
    cell = format_interval(claim, verdict.interval)
    if verdict.seeds == len(SECOND):
        first_sample = primary_of_seeds(runs, claim, FRESH)
        first_interval = t_interval(list(first_sample.values()))
        cell += f"; first ten: {format_interval(claim, first_interval)}"
    return cell


# ------------------------------------------------------------- the descriptions: tables of measures

# Columns of tables: {heading: measure}.
COLUMNS = {
    "selectivity": SELECTIVITY,
    "of the oracle": "matched/mean/of_oracle",
    "auroc": AUROC,
    "pointing": "matched/mean/pointing",
    "best head": BEST_HEAD,
    "past the ink": HEADS_PAST_INK,
    "most stray head": MOST_STRAY_HEAD,
    "k-NN": "features/knn",
    "probe": PROBE,
}
FAITHFULNESS_COLUMNS = {
    "attention": FAITHFULNESS,
    "brightness": BRIGHTNESS_FAITHFULNESS,
    "rollout": ROLLOUT_FAITHFULNESS,
    "untrained": UNTRAINED_FAITHFULNESS,
    "attention, objects": "matched/mean/object_faithfulness",
    "size, objects": "matched/ink/object_faithfulness",
    "causal selectivity": CAUSAL_SELECTIVITY,
}
# In the paper's layout the digits are more central, so a map that ignores the image can score.
LAYOUT_COLUMNS = {
    "selectivity of mean, matched": "matched/mean/selectivity",
    "selectivity of mean, paper": "paper/mean/selectivity",
    "selectivity of shuffled, matched": "matched/shuffled/selectivity",
    "selectivity of shuffled, paper": "paper/shuffled/selectivity",
    "auroc of mean, matched": "matched/mean/auroc",
    "auroc of mean, paper": "paper/mean/auroc",
    "auroc of shuffled, matched": "matched/shuffled/auroc",
    "auroc of shuffled, paper": "paper/shuffled/auroc",
}
METRIC_COLUMNS = {
    "digit density": "matched/mean/digit_density",
    "clutter density": "matched/mean/clutter_density",
    "background density": "matched/mean/background_density",
    "far_background density": FAR_BACKGROUND,
    "jaccard60": "matched/mean/jaccard60",
    "entropy": "matched/mean/entropy",
    "diversity": "matched/mean/diversity",
}
PAPER_SCALE_COLUMNS = {
    "selectivity": SELECTIVITY,
    "auroc": AUROC,
    "k-NN": "features/knn",
    "attention": FAITHFULNESS,
    "brightness": BRIGHTNESS_FAITHFULNESS,
    "rollout": ROLLOUT_FAITHFULNESS,
}


def mean_cells(runs, row, columns, seeds=FRESH):
    """Return the cells of a row of a table: means with 95% intervals over the seeds."""
    return [mean_cell(list(sample(runs, row, measure, seeds).values())) for measure in columns]


def row_table(runs, columns):
    """Return a table of means with 95% intervals over the fresh seeds, one line per row."""
    rows = dict.fromkeys(row for row, seed in sorted(runs) if seed in FRESH)
    lines = [table_row(["row", "seeds", *columns]), table_rule(len(columns) + 2)]
    for row in rows:
        seed_count = len(sample(runs, row, SELECTIVITY))
        cells = mean_cells(runs, row, columns.values())
        lines.append(table_row([f"`{row}`", str(seed_count), *cells]))
    return "\n".join(lines)


def mean_cell(values):
    """Return a mean with its 95% interval. One value has no interval."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    interval = t_interval(values)
    return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def paper_scale_section(runs):
    """Return the table of the paper preset's rows, and the device that each ran on."""
    if not runs:
        return "None has been run: `python results/study.py --preset paper`, with a GPU."
    devices = [f"`{row}`: {line['device']}" for (row, _), line in sorted(runs.items())]
    table = row_table(runs, PAPER_SCALE_COLUMNS)
    return f"{table}\n\nDevices: {'; '.join(devices)}."


def dose_table(runs):
    """Return a table of what F1 and F2 were planned to test, with the dose left in."""
    lines = [
        "| | primary quantity of the plan | seeds 10 to 19 | seeds 30 to 59 | |",
        table_rule(5),
    ]
    for name, claim in OLD_CLAIMS.items():
        cells = [name, claim.quantity]
        for seeds in (FRESH, SECOND):
            differences = list(primary_of_seeds(runs, claim, seeds).values())
            cells.append(difference_cell(differences))
        verdict = judge_claim(claim, list(primary(runs, claim).values()))
        lines.append(table_row([*cells, f"**{verdict.word}**"]))
    return "\n".join(lines)


def difference_cell(values):
    """Return the mean of differences with its 95% interval, if there are at least two."""
    if len(values) < 2:
        return "–"
    interval = t_interval(values)
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def reference_table(runs):
    """Return a table of how maps that are not attention score on the same canvases."""
    lines = ["| map | selectivity | auroc | patch faithfulness |", "|---|---|---|---|"]
    for reference in ("brightness", "ink", "oracle"):
        cells = [reference]
        for metric in ("selectivity", "auroc", "patch_faithfulness"):
            values = sample(runs, "different", f"matched/{reference}/{metric}").values()
            cells.append(f"{np.mean(list(values)):.2f}")
        lines.append(table_row(cells))
    return "\n".join(lines)


def sample_table(runs):
    """Return a table of both samples, for the claims whose second sample is complete."""
    lines = ["| claim | seeds 10 to 19 | seeds 30 to 59 |", "|---|---|---|"]
    for name, claim in CLAIMS.items():
        first = primary_of_seeds(runs, claim, FRESH)
        second = primary_of_seeds(runs, claim, SECOND)
        if len(second) == len(SECOND):
            cells = [f"{name}, {claim.quantity}"]
            for quantity in (first, second):
                interval = t_interval(list(quantity.values()))
                cells.append(format_interval(claim, interval))
            lines.append(table_row(cells))
    return "\n".join(lines)


def search_table(runs):
    """Return a table of the searches for learning rates, on seed 0."""
    lines = ["| row | by | learning rate × : value | best |", "|---|---|---|---|"]
    for base, search in SEARCHES.items():
        rates = searched_rates(runs, base)
        values = "; ".join(f"{factor:g}: {value:.3f}" for factor, value in rates.items())
        best = best_row(runs, base) or "not bracketed yet"
        lines.append(table_row([f"`{base}`", search.measure, values, best]))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------- the pages


def page_blocks(study):
    """Return {name: text} of the marked places of the pages; `study` is {preset: runs}."""
    runs = study["laptop"]
    return {
        "rows": row_table(runs, COLUMNS),
        "faithfulness": row_table(runs, FAITHFULNESS_COLUMNS),
        "layouts": row_table(runs, LAYOUT_COLUMNS),
        "metrics": row_table(runs, METRIC_COLUMNS),
        "searches": search_table(runs),
        "references": reference_table(runs),
        "samples": sample_table(runs),
        "paper scale": paper_scale_section(study["paper"]),
        "verdicts": verdict_table(runs),
        "dose": dose_table(runs),
    }


def fill_page(page, blocks):
    """Return a page with each text between <!-- name --> and <!-- end --> replaced by its block."""
    for name, block in blocks.items():
        mark = f"<!-- {name} -->\n"
        if mark in page:
            before, _, after = page.partition(mark)
            _, _, after = after.partition("<!-- end -->")
            page = f"{before}{mark}{block}\n<!-- end -->{after}"
    return page
