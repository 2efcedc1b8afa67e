"""Metrics whose values are known: by hand, from scikit-learn and SciPy, or by trying everything."""

import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

import metrics

PATCHES = 64  # of an image of 8 × 8 patches
PATCH_SIZE = 7
PATCH_AREA = 49


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixel_counts(*counts):
    """Pixels of a region in the 64 patches of one image, (1, 64); zero after the given ones."""
    row = torch.zeros(1, PATCHES)
    row[0, : len(counts)] = torch.tensor(counts)
    return row


def map_on(*patches):
    """A map with equal attention on these of 64 patches, and none on the others: (1, 64)."""
    row = torch.zeros(1, PATCHES)
    row[0, list(patches)] = 1 / len(patches)
    return row


def enlarge(patches):
    """A value for each of 64 patches, (…, 64), as pixels, (…, 56, 56)."""
    grid = patches.unflatten(-1, (8, 8))
    return grid.repeat_interleave(PATCH_SIZE, -1).repeat_interleave(PATCH_SIZE, -2)


def random_masks():
    """Masks (40, 56, 56) of digit and clutter that do not overlap, each on some patches only."""
    has_ink = enlarge(torch.rand(2, 40, PATCHES, generator=generator(0)) < 0.3)
    digit, clutter = (torch.rand(2, 40, 56, 56, generator=generator(1)) < 0.4) & has_ink
    return digit, clutter & ~digit


def random_maps(with_ties: bool):
    """Maps (40, 64); `with_ties` they have five different values only, before they sum to 1."""
    maps = torch.rand(40, PATCHES, generator=generator(2))
    if with_ties:
        maps = (maps * 4).round() + 1
    return maps / maps.sum(-1, keepdim=True)


def test_patch_sums_go_row_by_row():
    image = torch.arange(24).view(1, 4, 6)
    sums = metrics.patch_sums(image, 2)
    assert sums.tolist() == [[0 + 1 + 6 + 7, 22, 30, 12 + 13 + 18 + 19, 70, 78]]


# ------------------------------------------------------------------------------- maps against masks


def test_uniform_attention_prefers_nothing():
    digit = pixel_counts(40, 30, 0, 0, 5)
    clutter = pixel_counts(0, 2, 9, 30, 5)
    uniform = torch.full((1, PATCHES), 1 / PATCHES)
    values = metrics.attention_metrics(uniform, digit, clutter, PATCH_AREA)
    for region in ("digit", "clutter", "background", "far_background"):
        assert values[f"{region}_density"].item() == pytest.approx(1)
    assert values["auroc"].item() == 0.5
    assert metrics.entropy(uniform).item() == pytest.approx(1)
    # all patches are top patches, and two of them hold more digit than clutter
    assert values["pointing"].item() == pytest.approx(2 / PATCHES)
    # all patches are taken
    assert values["jaccard60"].item() == pytest.approx(75 / (PATCHES * PATCH_AREA))


def test_attention_on_the_digit_alone():
    digit = pixel_counts(49, 40, 30)
    clutter = pixel_counts(0, 0, 0, 20, 9)
    values = metrics.attention_metrics(map_on(0, 1, 2), digit, clutter, PATCH_AREA)
    assert values["auroc"].item() == 1
    assert values["pointing"].item() == 1
    assert values["clutter_density"].item() == 0
    assert values["far_background_density"].item() == 0
    assert values["digit_density"].item() == pytest.approx((119 / 147) / (119 / (64 * 49)))
    # 28 of the 147 pixels that get attention are background, and so are 64 · 49 − 148 of all
    background_share = (64 * 49 - 148) / (64 * 49)
    assert values["background_density"].item() == pytest.approx((28 / 147) / background_share)
    # The digit has 119 pixels in three patches; two would give 89 / (98 + 30), four no more digit.
    assert values["jaccard60"].item() == pytest.approx(119 / 147)
    assert values["best_jaccard"].item() == pytest.approx(119 / 147)
    assert metrics.entropy(map_on(0, 1, 2)).item() == pytest.approx(math.log(3) / math.log(64))


def test_attention_on_the_clutter_alone():
    digit = pixel_counts(49, 40, 30)
    clutter = pixel_counts(0, 0, 0, 20, 9)
    values = metrics.attention_metrics(map_on(3, 4), digit, clutter, PATCH_AREA)
    assert values["auroc"].item() == 0
    assert values["pointing"].item() == 0
    assert values["jaccard60"].item() == 0
    assert values["digit_density"].item() == 0
    assert values["clutter_density"].item() == pytest.approx(32)


def test_regions_that_an_image_lacks_have_no_value():
    digit = pixel_counts(49, 40, 30)
    values = metrics.attention_metrics(map_on(0, 9), digit, pixel_counts(), PATCH_AREA)
    assert values["digit_density_with_clutter"].isnan().all()
    assert values["clutter_density"].isnan().all()
    assert values["auroc"].isnan().all()
    assert values["digit_density"].item() == pytest.approx(0.5 * 64 / (119 / 49))


@pytest.mark.parametrize(
    "top_patches, share",
    [((0,), 1), ((1,), 0), ((2,), 0), ((0, 1), 0.5), ((0, 1, 2, 50), 0.25)],
)
def test_pointing_is_the_mean_over_tied_patches(top_patches, share):
    digit = pixel_counts(10, 10, 10)
    clutter = pixel_counts(9, 10, 11)
    values = metrics.attention_metrics(map_on(*top_patches), digit, clutter, PATCH_AREA)
    assert values["pointing"].item() == pytest.approx(share)


def test_jaccard60_takes_tied_patches_together():
    digit = pixel_counts(49, 49, 49, 49)
    steep = torch.zeros(1, PATCHES)
    steep[0, :4] = torch.tensor([0.35, 0.25, 0.22, 0.18])  # the first two hold just 60%
    values = metrics.attention_metrics(steep, digit, pixel_counts(), PATCH_AREA)
    assert values["jaccard60"].item() == pytest.approx(2 / 4)
    even = map_on(0, 1, 2, 3, 4)  # three patches would do, but two more are tied with them
    values = metrics.attention_metrics(even, digit, pixel_counts(), PATCH_AREA)
    assert values["jaccard60"].item() == pytest.approx(4 / 5)


@pytest.mark.parametrize("with_ties", [False, True])
def test_auroc_agrees_with_scikit_learn_on_the_pixels(with_ties):
    digit, clutter = random_masks()
    maps = random_maps(with_ties)
    values = metrics.attention_metrics(
        maps,
        metrics.patch_sums(digit, PATCH_SIZE),
        metrics.patch_sums(clutter, PATCH_SIZE),
        PATCH_AREA,
    )
    for image, pixels in enumerate(enlarge(maps)):
        ink = digit[image] | clutter[image]
        expected = roc_auc_score(digit[image][ink], pixels[ink])
        assert values["auroc"][image].item() == pytest.approx(expected, abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0.01, 1)), min_size=1, max_size=9))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_best_jaccard_is_the_best_of_all_sets_of_patches(patches):
    """Patches of four pixels, 0 to 4 of which belong to the digit, with any attention on them."""
    digit = torch.tensor([[float(pixels) for pixels, _ in patches]])
    maps = torch.tensor([[attention for _, attention in patches]], dtype=torch.float64)
    no_clutter = torch.zeros_like(digit)
    values = metrics.attention_metrics(maps / maps.sum(), digit, no_clutter, patch_area=4)
    best = values["best_jaccard"].item()
    assert values["jaccard60"].item() <= best + 1e-9

    all_sets = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(patches))))
    overlap = (all_sets * digit).sum(1)
    jaccard = overlap / (digit.sum() + 4 * all_sets.sum(1) - overlap)
    assert best == pytest.approx(jaccard.nan_to_num().max().item())


@pytest.mark.parametrize("with_ties", [False, True])
def test_metrics_depend_neither_on_the_batch_nor_on_the_order_of_patches(with_ties):
    """Which of several tied patches a sort puts first must not show."""
    maps = random_maps(with_ties)
    digit, clutter = (metrics.patch_sums(mask, PATCH_SIZE) for mask in random_masks())
    order = torch.randperm(PATCHES, generator=generator(5))
    values = metrics.attention_metrics(maps, digit, clutter, PATCH_AREA)
    of_batch = metrics.attention_metrics(maps[3:8], digit[3:8], clutter[3:8], PATCH_AREA)
    reordered = metrics.attention_metrics(
        maps[:, order], digit[:, order], clutter[:, order], PATCH_AREA
    )
    for name, value in values.items():
        assert torch.equal(value[3:8], of_batch[name]), name
        torch.testing.assert_close(value, reordered[name], atol=1e-12, rtol=0, equal_nan=True)


# -------------------------------------------------------------------------------------- maps alone


def diversity_of(*heads) -> float:
    return metrics.diversity(torch.stack(heads, dim=1)).item()


def test_diversity_of_known_heads():
    same = random_maps(with_ties=False)[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(metrics.diversity(same), torch.zeros(40), atol=1e-6, rtol=0)
    assert diversity_of(map_on(0, 1), map_on(5)) == pytest.approx(1)
    # of (1, 0) and (½, ½): H(¾, ¼) − ½ · H(½, ½)
    assert diversity_of(map_on(0), map_on(0, 1)) == pytest.approx(0.8113 - 0.5, abs=1e-4)
    # Two of three heads agree, so two of the three pairs are disjoint.
    assert diversity_of(map_on(0), map_on(0), map_on(9)) == pytest.approx(2 / 3)
    assert math.isnan(diversity_of(map_on(0)))


# ---------------------------------------------------------------------------- maps against effects


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 2, st.booleans()), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_spearman_agrees_with_scipy_with_ties_and_absent_entries(entries):
    a, b, among = (torch.tensor(column) for column in zip(*entries))
    rho = metrics.spearman(a.float(), b.float(), among).item()
    a = a[among].numpy()
    b = b[among].numpy()
    if len(a) < 2:
        assert math.isnan(rho)
    elif len(set(a.tolist())) == 1 or len(set(b.tolist())) == 1:
        assert rho == 0
    else:
        assert rho == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-9)


def effects_on_two_canvases():
    """What `faithfulness` reads of CanvasEffects, of two canvases with four patches each.

    There are two pieces of the digit and two distractors. The first distractor lies on patch 2. The
    second lies on patch 3, and on the second canvas it has no ink. The ink of patches 0 and 1 is
    equal, that of patch 3 is nearly equal to it; on the second canvas patch 3 is black.
    """
    part_ink = 49 * torch.eye(4).repeat(2, 1, 1)
    part_ink[1, 3] = 0
    blackening = torch.tensor([[0.4, 0.1, 0.3, 0.1], [0.3, 0.2, 0.1, 0.0]])
    at_last_block = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.01, 0.03, 0.02, 0.0]])
    return SimpleNamespace(
        pieces=2,
        intensity=torch.tensor([[40.0, 40.0, 20.0, 39.0], [40.0, 40.0, 20.0, 0.0]]),
        blackening=blackening,
        direct=torch.stack([blackening, at_last_block], 1),
        has_ink=torch.tensor([[True, True, True, True], [True, True, True, False]]),
        distances=torch.tensor([[0.1, 0.9, 0.8, 0.3], [0.9, 0.1, 0.5, 0.0]]),
        part_ink=part_ink,
    )


def two_maps(*attention):
    """The same map of each of the two canvases."""
    return torch.tensor([attention, attention])


@dataclass
class Faithfulness:
    """A map of the two canvases, and its values on the first and the second one."""

    attention: list[float]
    of_patches: list[float]
    direct: list[float]
    equal_ink: list[float]
    of_first_objects: float


# The ranks of the effects are 4, 1½, 3, 1½ on the first canvas, and 3, 2, 1 on the second; those of
# the direct effects are 1, 2, 3, 4, and 1, 3, 2. Pairs of equal ink are (0, 1), (0, 3), (1, 3), the
# last with tied effects, and (0, 1).
FAITHFULNESS = [
    Faithfulness([0.4, 0.1, 0.3, 0.2], [4.5 / (5 * 4.5) ** 0.5, 0.5], [-0.4, -1], [2.5, 1], 1),
    Faithfulness([0.1, 0.2, 0.3, 0.4], [-3 / (5 * 4.5) ** 0.5, -1], [1, 0.5], [0.5, 0], -1),
    Faithfulness([0.25, 0.25, 0.25, 0.25], [0, 0], [0, 0], [1.5, 0.5], 0),
]


@pytest.mark.parametrize("expected", FAITHFULNESS, ids=lambda expected: str(expected.attention))
def test_faithfulness_by_hand(expected):
    values = metrics.faithfulness(two_maps(*expected.attention), effects_on_two_canvases())
    assert values["patch_faithfulness"].tolist() == pytest.approx(expected.of_patches)
    assert values["direct_faithfulness"].tolist() == pytest.approx(expected.direct)
    assert values["equal_ink_wins"].tolist() == pytest.approx(expected.equal_ink)
    assert values["equal_ink_pairs"].tolist() == [3, 1]
    first, second = values["object_faithfulness"].tolist()
    assert first == pytest.approx(expected.of_first_objects)
    assert math.isnan(second)  # only one of its distractors has ink


def test_images_without_pairs_of_equal_ink_do_not_count():
    """Two black patches of the second canvas are no pair."""
    effects = effects_on_two_canvases()
    effects.intensity[1] = torch.tensor([40.0, 30.0, 0.0, 0.0])
    effects.has_ink[1] = torch.tensor([True, True, False, False])
    values = metrics.faithfulness(two_maps(0.4, 0.1, 0.3, 0.2), effects)
    for name, of_first in {"equal_ink_wins": 2.5, "equal_ink_pairs": 3}.items():
        first, second = values[name].tolist()
        assert first == of_first
        assert math.isnan(second)


def test_direct_effects_that_are_not_measured_have_no_faithfulness():
    effects = effects_on_two_canvases()
    effects.direct[0] = torch.nan
    values = metrics.faithfulness(two_maps(0.4, 0.1, 0.3, 0.2), effects)
    first, second = values["direct_faithfulness"].tolist()
    assert math.isnan(first)
    assert second == pytest.approx(-1)
    assert values["patch_faithfulness"].isfinite().all()


def test_uniform_attention_is_the_same_on_distractors_of_equal_ink():
    """However their ink is spread: rounding would make a rank of nothing."""
    spread = torch.rand(50, 3, 49, generator=generator(6)).argsort(-1)
    part_ink = torch.cat([torch.zeros(50, 3, 49), (spread % 7).float()], dim=1)  # 147 pixels each
    blackening = torch.rand(50, 49, generator=generator(7))
    effects = SimpleNamespace(
        pieces=3,
        intensity=torch.ones(50, 49),
        blackening=blackening,
        direct=blackening[:, None],
        has_ink=torch.ones(50, 49, dtype=torch.bool),
        distances=torch.rand(50, 6, generator=generator(8)),
        part_ink=part_ink,
    )
    values = metrics.faithfulness(torch.full((50, 49), 1 / 49), effects)
    assert (values["object_faithfulness"] == 0).all()
    assert (values["patch_faithfulness"] == 0).all()
    assert (values["equal_ink_wins"] == values["equal_ink_pairs"] / 2).all()


def test_canvases_without_distractors_have_no_object_faithfulness():
    effects = effects_on_two_canvases()
    effects.pieces = 1  # the only part
    effects.distances = effects.distances[:, :1]
    effects.part_ink = effects.part_ink[:, :1]
    values = metrics.faithfulness(torch.full((2, 4), 0.25), effects)
    assert values["object_faithfulness"].isnan().all()


def ordered_pairs(maps, effects, ink, among=None) -> tuple[float, float]:
    """The sum over the pairs of one image, and their number."""
    maps, effects, ink = (torch.tensor([values]) for values in (maps, effects, ink))
    among = torch.ones_like(ink, dtype=torch.bool) if among is None else torch.tensor([among])
    wins, pairs = metrics.equal_ink(maps, effects, ink, among)
    return wins.item(), pairs.item()


def test_pairs_of_equal_ink_by_hand():
    """Of four patches, the first three have ink within 5% of each other: three pairs."""
    ink = [100.0, 96.0, 95.0, 50.0]
    effects = [0.3, 0.2, 0.1, 0.9]
    assert ordered_pairs([0.5, 0.3, 0.2, 0.0], effects, ink) == (3, 3)
    assert ordered_pairs([0.2, 0.3, 0.5, 0.0], effects, ink) == (0, 3)
    assert ordered_pairs([0.5, 0.2, 0.3, 0.0], effects, ink) == (2, 3)
    assert ordered_pairs([0.2, 0.2, 0.2, 0.4], effects, ink) == (1.5, 3)  # ties count ½
    assert ordered_pairs([0.5, 0.3, 0.2, 0.0], [0.3, 0.3, 0.1, 0.9], ink) == (2.5, 3)
    among = [True, True, False, True]
    assert ordered_pairs([0.5, 0.3, 0.2, 0.0], effects, ink, among) == (1, 1)


def test_without_two_patches_of_equal_ink_there_is_no_pair():
    assert ordered_pairs([0.5, 0.5], [0.1, 0.2], [100.0, 94.9]) == (0, 0)
    assert ordered_pairs([1.0], [0.1], [100.0]) == (0, 0)
    assert ordered_pairs([0.5, 0.5], [0.1, 0.2], [10.0, 10.0], [False, True]) == (0, 0)


def test_a_map_of_the_dose_orders_pairs_of_equal_ink_by_chance():
    """If effects are ink times something else, ink itself says nothing within a pair."""
    ink = 1 + torch.rand(400, 30, generator=generator(11))
    importance = torch.rand(400, 30, generator=generator(12))
    effects = ink * importance
    among = torch.ones(400, 30, dtype=torch.bool)
    wins, pairs = metrics.equal_ink(ink, effects, ink, among)
    assert (wins.sum() / pairs.sum()).item() == pytest.approx(0.5, abs=0.03)
    assert metrics.spearman(ink, effects, among).mean() > 0.2  # over all pairs it seems to
    wins, pairs = metrics.equal_ink(importance, effects, ink, among)
    assert (wins.sum() / pairs.sum()).item() > 0.95


# The cosines of two curves, and the area between them: each is 1 where nothing is left out.
FALLING = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]  # a straight line
CURVES = [
    ([1.0] * 10, [1.0] * 10, 0),
    (FALLING, FALLING, 0),
    (FALLING, [1.0] * 10, 0.5),  # a triangle
    ([0.0] * 10, [1.0] * 10, 0.95),  # a square that lacks half of the first step
    ([1.0] * 9 + [0.0], [1.0] * 10, 0.05),  # half of the last step
    ([1.0] * 4 + [0.5] + [1.0] * 5, [1.0] * 10, 0.05),
    ([-1.0] * 10, [1.0] * 10, 1.9),
]


def test_relevance_gain_is_the_area_between_the_curves():
    most_first = torch.tensor([curves[0] for curves in CURVES])
    least_first = torch.tensor([curves[1] for curves in CURVES])
    areas = [curves[2] for curves in CURVES]
    assert metrics.relevance_gain(most_first, least_first).tolist() == pytest.approx(areas)
    swapped = metrics.relevance_gain(least_first, most_first).tolist()
    assert swapped == pytest.approx([-area for area in areas])


# --------------------------------------------------------------------------------------- intervals


def interval_of(values, index, resamples: int = 1000) -> list[float]:
    """The mean of the values, and its interval."""
    means = metrics.weighted_means(values, metrics.bootstrap_weights(index, resamples))
    cell = metrics.interval_cell(means, values)
    return [cell["value"], cell["low"], cell["high"]]


def test_intervals_resample_digits_and_not_images():
    """Ten canvases of one digit are not ten observations: they add nothing to one of them."""
    values = torch.randn(100, generator=generator(3))
    digits = torch.arange(100)
    value, low, high = interval_of(values, digits)
    assert [value, low, high] == pytest.approx(interval_of(values.repeat(10), digits.repeat(10)))
    assert value == pytest.approx(values.mean().item(), abs=1e-6)
    standard_error = values.std().item() / 10
    assert high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.15)


def test_a_cell_holds_percentiles_and_what_is_not_finite_is_none():
    means = torch.cat([torch.tensor([7.0]), torch.arange(101.0), torch.tensor([torch.nan])])
    values = torch.tensor([7.0, torch.nan, 7.0])
    cell = metrics.interval_cell(means, values)
    assert cell == {"value": 7.0, "low": 2.5, "high": 97.5, "images": 2}
    nothing = torch.tensor([torch.nan, torch.nan])
    cell = metrics.interval_cell(nothing, nothing)
    assert cell == {"value": None, "low": None, "high": None, "images": 0}


def test_a_single_image_has_no_interval():
    """All its resamples are alike, which would look like certainty."""
    for values in (torch.tensor([7.0]), torch.tensor([torch.nan, 7.0, torch.nan])):
        means = metrics.weighted_means(values, metrics.bootstrap_weights(torch.arange(len(values))))
        cell = metrics.interval_cell(means, values)
        assert cell == {"value": 7.0, "low": None, "high": None, "images": 1}


def test_without_resamples_there_is_no_interval():
    values = torch.tensor([1.0, 3.0])
    means = metrics.weighted_means(values, metrics.bootstrap_weights(torch.arange(2), resamples=0))
    cell = metrics.interval_cell(means, values)
    assert cell == {"value": 2.0, "low": None, "high": None, "images": 2}


def test_missing_values_are_left_out_of_a_mean():
    values = torch.tensor([1.0, 2.0, torch.nan, 3.0])
    once = metrics.bootstrap_weights(torch.arange(4), resamples=0)
    assert metrics.weighted_means(values, once).tolist() == [2.0]
    weights = torch.tensor([[1.0, 0.0, 5.0, 3.0]], dtype=torch.float64)
    assert metrics.weighted_means(values, weights).tolist() == [(1 + 3 * 3) / 4]
    # values of the first images only
    assert metrics.weighted_means(values[:2], weights).tolist() == [1.0]


# ---------------------------------------------------------------------------------------- features


def unit_features(count: int, dim: int, seed: int):
    return F.normalize(torch.randn(count, dim, generator=generator(seed)), dim=-1)


def test_mean_cosine_is_the_mean_over_all_pairs():
    features = unit_features(12, 5, seed=0)
    cosines = [(a @ b).item() for a, b in itertools.permutations(features, 2)]
    assert metrics.mean_cosine(features) == pytest.approx(sum(cosines) / len(cosines))
    assert metrics.mean_cosine(features[:1].expand(12, -1)) == pytest.approx(1)


def test_knn_agrees_with_a_loop_over_the_queries():
    """As in DINO: 20 neighbours vote, each with the weight exp(cosine / 0.07)."""
    bank = unit_features(300, 8, seed=1)
    queries = unit_features(400, 8, seed=2)
    labels = torch.randint(10, (300,), generator=generator(3))
    predicted = metrics.knn_classify(bank, labels, queries).tolist()
    for query, prediction in zip(queries, predicted):
        cosines = (bank @ query).tolist()
        nearest = sorted(range(300), key=lambda number: -cosines[number])[:20]
        votes = [0.0] * 10
        for number in nearest:
            votes[labels[number]] += math.exp(cosines[number] / 0.07)
        assert prediction == votes.index(max(votes))


def test_a_small_bank_votes_as_a_whole():
    bank = torch.eye(3)
    labels = torch.tensor([4, 0, 2])
    assert metrics.knn_classify(bank, labels, bank).tolist() == [4, 0, 2]


def probe_accuracy(points, labels) -> float:
    """How often the probe that learned from the first 400 points is right about the others."""
    predicted = metrics.linear_probe(points[:400], labels[:400], points[400:])
    return (predicted == labels[400:]).double().mean().item()


def test_the_probe_is_linear():
    """It separates what a line can separate, at any scale, but not a ring from its middle."""
    points = torch.randn(600, 2, generator=generator(4)) * torch.tensor([1.0, 1e-3])
    halves = 7 * (points[:, 1] > 0).long()
    assert probe_accuracy(points, halves) > 0.97
    ring = (points[:, 0].abs() > 0.7).long()
    assert 0.3 < probe_accuracy(points, ring) < 0.7


def test_the_probe_has_no_answer_if_there_is_one_class():
    labels = torch.zeros(3, dtype=torch.int64)
    predicted = metrics.linear_probe(torch.zeros(3, 4), labels, torch.zeros(2, 4))
    assert predicted.isnan().tolist() == [True, True]
