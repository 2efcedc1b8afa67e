"""The nine claims about maps: their primary quantities, tests and words, recomputed another way."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "results"))

import map_claims
import study
from map_claims import CLAIMS
from verdicts import ALIKE, CONTRARY, HOLDS, LESS, MORE, NO_EFFECT, OPEN, UNDECIDED


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def claim_of(expected, margin=0.03, planned=20):
    return map_claims.MapClaim(
        text="", quantity="", expected=expected, margin=margin, planned=planned
    )


# ------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    "expected,low,high,word",
    [
        (MORE, 0.001, 0.2, HOLDS),
        (MORE, 0.001, 0.02, HOLDS),
        (MORE, -0.02, 0.02, NO_EFFECT),
        (MORE, -0.02, -0.001, NO_EFFECT),  # inside the margin takes precedence
        (MORE, -0.04, -0.001, CONTRARY),
        (MORE, -0.02, 0.04, UNDECIDED),
        (LESS, -0.2, -0.001, HOLDS),
        (LESS, 0.001, 0.02, NO_EFFECT),
        (LESS, 0.001, 0.04, CONTRARY),
        (LESS, -0.04, 0.04, UNDECIDED),
        (ALIKE, -0.02, 0.02, HOLDS),
        (ALIKE, 0.031, 0.2, CONTRARY),
        (ALIKE, -0.2, -0.031, CONTRARY),
        (ALIKE, 0.001, 0.031, UNDECIDED),
        (map_claims.DIFFERENT, 0.001, 0.04, HOLDS),
        (map_claims.DIFFERENT, -0.04, -0.001, HOLDS),
        (map_claims.DIFFERENT, 0.001, 0.02, NO_EFFECT),
        (map_claims.DIFFERENT, -0.02, 0.04, UNDECIDED),
    ],
)
def test_an_interval_gives_a_word(expected, low, high, word):
    assert map_claims.word_of(claim_of(expected), low, high) == word


# ------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("mean", [-0.1, -0.02, 0, 0.01, 0.1])
@pytest.mark.parametrize("expected", [MORE, ALIKE])
def test_a_mean_is_judged_as_scipy_does(mean, expected, rng):
    values = rng.normal(mean, 0.02, 20)
    verdict = map_claims.judge_mean(claim_of(expected), values)
    interval = stats.t.interval(0.95, 19, values.mean(), stats.sem(values))
    assert (verdict.low, verdict.high) == pytest.approx(interval, abs=1e-9)
    # p is below 5% exactly where the interval ends
    is_inside = -0.03 < verdict.low and verdict.high < 0.03
    assert (verdict.equivalence_p < 0.05) == is_inside
    if expected == MORE:
        assert verdict.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    else:
        assert verdict.p == verdict.equivalence_p
        assert (verdict.word == HOLDS) == (verdict.p < 0.05)


def test_there_is_no_verdict_before_all_seeds_are_there():
    verdict = map_claims.judge_mean(claim_of(MORE), np.ones(19))
    assert (verdict.count, verdict.word, verdict.p) == (19, OPEN, None)


def test_a_correlation_is_that_of_scipy_and_its_p_nearly(rng):
    x = rng.normal(size=20)
    y = x + rng.normal(size=20)
    claim = claim_of(MORE, margin=0.2)
    verdict = map_claims.judge_correlation(claim, x, y)
    assert verdict.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert verdict.low < verdict.value < verdict.high
    p = stats.spearmanr(x, y, alternative="greater").pvalue
    assert verdict.p == pytest.approx(2 * p, abs=0.01)
    # one of the variables turned round
    assert map_claims.judge_correlation(claim, x, -y).word == CONTRARY


def test_auc_by_hand():
    """Truth orders five of six pairs; one pair of networks has the same truth."""
    truth = np.array([0.1, 0.3, 0.3, 0.9])
    score = np.array([2.0, 1.0, 3.0, 3.0])
    # pairs (1, 2): wrong; (1, 3): right; (1, 4): right; (2, 4): right; (3, 4): a tie
    assert map_claims.auc(truth, score) == pytest.approx(3.5 / 5)
    assert map_claims.auc(truth, truth) == 1
    assert map_claims.auc(truth, -truth) == 0
    both = map_claims.auc(np.stack([truth, truth]), np.stack([score, -score]))
    assert both == pytest.approx([3.5 / 5, 1.5 / 5])


def test_without_scatter_there_is_no_effect(rng):
    """And p is not the smallest of all, which Holm would take for the best evidence."""
    claim = claim_of(MORE, margin=0.05, planned=24)
    constant = np.full(24, 0.3)
    noise = rng.random(24)
    verdict = map_claims.judge_auc(claim, constant, noise, -noise)
    assert (verdict.value, verdict.p) == (0, 1)
    verdict = map_claims.judge_correlation(claim_of(MORE, margin=0.2), noise, constant)
    assert (verdict.value, verdict.p) == (0, 1)
    verdict = map_claims.judge_mean(claim_of(MORE), np.full(20, 0.1))
    assert (verdict.p, verdict.equivalence_p) == (1, 1)


def test_a_shortcut_claim_of_few_networks_stays_open():
    few = np.arange(19.0)
    verdict = map_claims.judge_auc(claim_of(MORE, margin=0.05), few, few, -few)
    assert (verdict.count, verdict.word, verdict.value) == (19, OPEN, None)


def test_equal_differences_count_as_equal_whatever_their_rounding():
    permuted = np.array([0.1 + 0.2, 0.3, -0.3])  # the first is 0.30000000000000004
    assert map_claims.permutation_p(0.1 + 0.2, permuted) == 1
    assert map_claims.permutation_p(0.3, permuted) == map_claims.permutation_p(0.1 + 0.2, permuted)


def test_a_collapsed_network_is_left_out_of_the_shortcut_claim():
    density = dict.fromkeys(("mean", "rollout", "norm_rollout", "squared_gradient"), 1.0)
    runs = {("different", 70): {"matched": {}, "marks": {"reliance": None, "density": density}}}
    reliance, _ = map_claims.marks(runs)
    assert len(reliance) == 0

    # The claim is judged without it, once all others are there.
    for number, row in enumerate(map_claims.MARK_ROWS):
        for seed in map_claims.MARK_SEEDS:
            line = {"reliance": 0.1 * number + 0.001 * seed, "density": density}
            runs.setdefault((row, seed), {"matched": {}, "marks": line})
    assert map_claims.judge(runs)["M8"].count == 23
    assert map_claims.judge(runs)["M8"].value == 0
    assert "| `different` | 5 | 0.07 |" in map_claims.mark_table(runs)
    del runs["shortcut-100", 75]
    assert map_claims.judge(runs)["M8"].word == "open"
    assert map_claims.mark_table(runs) == "Its runs are not complete."


def test_a_map_that_tells_networks_apart_beats_one_that_does_not(rng):
    claim = claim_of(MORE, margin=0.05, planned=24)
    truth = rng.random(24)
    noise = rng.random(24)
    good = truth + 0.1 * rng.normal(size=24)
    verdict = map_claims.judge_auc(claim, truth, good, noise)
    assert verdict.value == map_claims.auc(truth, good) - map_claims.auc(truth, noise)
    assert verdict.word == HOLDS
    assert verdict.p < 0.01
    assert map_claims.judge_auc(claim, truth, noise, good).word == CONTRARY
    # the same map twice
    verdict = map_claims.judge_auc(claim, truth, noise, noise)
    assert (verdict.value, verdict.p, verdict.word) == (0, 1, NO_EFFECT)
    assert verdict.equivalence_p == 0


def test_p_of_exchanged_ranks_is_rarely_small_if_maps_say_equally_much():
    claim = claim_of(MORE, margin=0.05, planned=24)
    small = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        truth = rng.random(24)
        first = truth + 0.3 * rng.normal(size=24)
        second = truth + 0.3 * rng.normal(size=24)
        small += map_claims.judge_auc(claim, truth, first, second).p < 0.05
    assert small <= 6  # 2 are expected


def test_holm_corrects_for_all_nine_claims():
    verdicts = {name: map_claims.Verdict(20, p=0.01 * (i + 1)) for i, name in enumerate("abc")}
    verdicts["d"] = map_claims.Verdict(3)
    map_claims.set_holm_p(verdicts, claims=9)
    assert [verdicts[name].holm_p for name in "abc"] == pytest.approx([0.09, 0.16, 0.21])
    assert verdicts["d"].holm_p is None


# ------------------------------------------------------------------------- from lines of study.json


def line_of(seed, equal_ink, rollout, share=0.4, faithfulness=0.5):
    """What the claims read of a line of study.json."""
    return {
        "direct_share": [1.0, share],
        "matched": {
            "mean": {
                "equal_ink": equal_ink,
                "object_faithfulness": equal_ink - 0.1,
                "patch_faithfulness": faithfulness,
            },
            "brightness": {"object_faithfulness": 0.5 + 0.001 * (seed % 2)},
            "rollout": {"equal_ink": rollout},
            "squared_gradient": {"equal_ink": rollout + 0.05 + 0.001 * (seed % 3)},
        },
    }


def test_each_claim_reads_its_own_rows_and_maps():
    rng = np.random.default_rng(3)
    runs = {}
    attention = dict(zip(map_claims.SEEDS, 0.7 + 0.02 * rng.normal(size=20)))
    rollout = dict(zip(map_claims.SEEDS, 0.8 + 0.02 * rng.normal(size=20)))
    for seed in map_claims.SEEDS:
        shared = {"share": attention[seed], "faithfulness": attention[seed] ** 2}
        runs["different", seed] = line_of(seed, attention[seed], rollout[seed], **shared)
        runs["same", seed] = line_of(seed, attention[seed] - 0.1 - 0.01 * rng.random(), 0.7)
    for seed in map_claims.TEN_SEEDS:
        rollout_of_six = rollout[seed] + 0.004 * rng.normal()
        runs["depth-6", seed] = line_of(seed, 0.55, rollout_of_six)
    verdicts = map_claims.judge(runs)
    values = {name: verdict.value for name, verdict in verdicts.items()}
    mean_attention = np.mean(list(attention.values()))
    mean_rollout = np.mean(list(rollout.values()))
    assert values["M1"] == pytest.approx(mean_attention - 0.5)
    assert values["M2"] == pytest.approx(mean_attention - 0.1 - 0.5005)
    assert values["M3"] == pytest.approx(mean_rollout - mean_attention)
    assert values["M4"] == pytest.approx(0.05 + 0.001 * np.mean([seed % 3 for seed in attention]))
    assert values["M5"] == pytest.approx(1)
    ten = np.mean([attention[seed] for seed in map_claims.TEN_SEEDS])
    assert values["M6"] == pytest.approx(0.55 - ten)
    assert abs(values["M7"]) < 0.01
    assert verdicts["M8"].count == 0 and values["M8"] is None
    assert 0.1 < values["M9"] < 0.11
    words = {name: verdict.word for name, verdict in verdicts.items()}
    assert words == dict.fromkeys(CLAIMS, HOLDS) | {"M8": OPEN}
    table = map_claims.claim_table(runs)
    assert len(table.splitlines()) == 2 + len(CLAIMS)
    assert "0 of 24" in table


def test_networks_with_marks_are_found_in_all_four_rows():
    runs = {}
    for number, row in enumerate(map_claims.MARK_ROWS):
        for seed in map_claims.MARK_SEEDS:
            reliance = number + 0.01 * seed
            density = dict.fromkeys(("mean", "norm_rollout", "squared_gradient"), 1.0)
            marks = {"reliance": reliance, "density": density | {"rollout": reliance}}
            runs[row, seed] = {"matched": {}, "marks": marks}
    runs["different", 80] = {"matched": {}}
    reliance, density = map_claims.marks(runs)
    assert len(reliance) == 24
    assert density["rollout"] == pytest.approx(reliance)
    verdict = map_claims.judge(runs)["M8"]
    assert (verdict.count, verdict.value, verdict.word) == (24, 0.5, HOLDS)


def test_the_table_of_maps_has_the_means_over_its_seeds():
    runs = {}
    for seed in (60, 61, 62, 63, 64):
        maps = {"mean": {"selectivity": 1.5}, "rollout": {"equal_ink": 0.8 + 0.01 * (seed - 62)}}
        line = {"matched": maps, "untrained": {"rollout": {"equal_ink": 0.6}}}
        runs["different", seed] = line | {"direct_share": [1.0, 0.4 + 0.1 * (seed - 62)]}
    runs["different", 10] = {"matched": {"mean": {}, "rollout": {"equal_ink": 0.1}}}

    def cells_of(row):
        (line,) = [
            line
            for line in map_claims.map_table(runs).splitlines()
            if line.startswith(f"| {row} |")
        ]
        return [cell.strip() for cell in line.strip("|").split("|")]

    cells = cells_of("`different`")
    assert cells[1] == "60 to 64"
    half_width = stats.t.ppf(0.975, 4) * np.std([-0.02, -0.01, 0, 0.01, 0.02], ddof=1) / 5**0.5
    assert cells[4] == f"0.80 [{0.8 - half_width:.2f}, {0.8 + half_width:.2f}]"
    assert cells[-1] == "1.00, 0.40"
    untrained = map_claims.untrained_table(runs).splitlines()[-1]
    assert untrained.startswith("| `different` | 60 to 64 | – | – | 0.60 [")
    # Once all of the study's own seeds have been run, they count alone.
    for seed in map_claims.SEEDS:
        assert cells_of("`different`")[1] == "60 to 64"
        runs["different", seed] = runs["different", 62]
    assert cells_of("`different`")[1] == "70 to 89"
    assert cells_of("`different`")[4].startswith("0.80 [")


def test_the_table_of_marks_has_means_of_rows_and_the_auc_of_all():
    runs = {}
    for number, row in enumerate(map_claims.MARK_ROWS):
        for seed in map_claims.MARK_SEEDS:
            density = dict.fromkeys(("mean", "norm_rollout", "squared_gradient"), 2.0)
            reliance = 0.1 * number + 0.001 * seed - 0.07
            marks = {"reliance": reliance, "density": density | {"rollout": 1.0 + number}}
            runs[row, seed] = {"matched": {}, "marks": marks}
    lines = map_claims.mark_table(runs).splitlines()
    assert lines[0] == (
        "| row | networks | reliance | squared gradient | norm rollout | rollout | attention |"
    )
    assert lines[3] == "| `shortcut-25` | 6 | 0.10 | 2.00 | 2.00 | 2.00 | 2.00 |"
    # Rollout tells the 216 pairs between rows; in the 60 within rows it ties.
    share = (216 + 60 / 2) / 276
    assert (
        lines[-3]
        == f"| pairs in the right order (AUC) | 24 |  | 0.50 | 0.50 | {share:.2f} | 0.50 |"
    )
    cells = lines[-2].split(" | ")
    assert cells[0] == "| the same − that of attention"
    assert cells[3:5] == ["+0.00 [+0.00, +0.00]"] * 2
    value, low, high = re.findall(r"[+−-]0\.\d\d", cells[5])
    assert value == f"{share - 0.5:+.2f}"
    assert 0.3 < float(low) <= float(value) <= float(high) <= 0.5
    assert cells[6] == "– |"
    assert lines[-1] == "| pairs within a row | 24 |  | 0.50 | 0.50 | 0.50 | 0.50 |"
    del runs["shortcut-50", 75]
    assert map_claims.mark_table(runs) == "Its runs are not complete."


def test_c3_and_c5_are_shown_again_on_these_seeds():
    runs = {}
    for seed in map_claims.SEEDS:
        brightness = {"selectivity": 1.4}
        same = {"mean": {"selectivity": 1.4 + 0.001 * (seed % 2)}, "brightness": brightness}
        runs["same", seed] = {"matched": same}
        runs["different", seed] = {"matched": {"mean": {"selectivity": 2.1}}}
    first, second = map_claims.confirmation_table(runs).splitlines()[2:]
    assert first.startswith("| C3 | selectivity, same views ÷ brightness | 20 | 1.00 [1.00, 1.00]")
    assert second.startswith("| C5 | selectivity, different ÷ same views | 20 | 1.50 [")
    assert map_claims.confirmation_table({}).count("| 0 | – |") == 2


def test_the_committed_primaries_recomputed_in_numpy():
    """In a dozen lines, straight from study.json, for the claims whose runs are complete."""
    lines = json.loads(study.STUDY_FILE.read_text())

    def values(row, map_name, metric, seeds):
        chosen = {line["seed"]: line for line in lines if line["row"] == row}
        found = [chosen[seed] for seed in seeds if seed in chosen]
        return np.array([line["matched"][map_name][metric] for line in found])

    def ink(row, map_name, seeds=range(70, 90)):
        return values(row, map_name, "equal_ink", seeds)

    ten = range(70, 80)
    objects = [
        values("different", map_name, "object_faithfulness", range(70, 90))
        for map_name in ("mean", "brightness")
    ]
    expected = {
        "M1": lambda: ink("different", "mean") - 0.5,
        "M2": lambda: objects[0] - objects[1],
        "M3": lambda: ink("different", "rollout") - ink("different", "mean"),
        "M4": lambda: ink("different", "squared_gradient") - ink("different", "rollout"),
        "M6": lambda: ink("depth-6", "mean", ten) - ink("different", "mean", ten),
        "M7": lambda: ink("depth-6", "rollout", ten) - ink("different", "rollout", ten),
        "M9": lambda: ink("different", "mean") - ink("same", "mean"),
    }
    verdicts = map_claims.judge(study.read_study()["laptop"])
    for name, quantity in expected.items():
        assert verdicts[name].count == len(quantity()) == CLAIMS[name].planned
        assert verdicts[name].value == pytest.approx(quantity().mean(), abs=1e-9)


def test_claims_and_margins_are_those_of_the_plan():
    plan = (ROOT / "results" / "plan-maps.md").read_text()
    rows = [line.split(" | ") for line in plan.splitlines() if line.startswith("| M")]
    margins = {row[0].removeprefix("| "): float(row[-1].removesuffix(" |")) for row in rows}
    assert margins == {name: claim.margin for name, claim in CLAIMS.items()}
    texts = [row[1] for row in rows]
    assert texts == [claim.text for claim in CLAIMS.values()]
