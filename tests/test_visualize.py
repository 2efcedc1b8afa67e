"""Metrics on attention made by hand, where the answer is known; figures that show what they say."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import roc_auc_score

import data
import train
import vit
import visualize

# ---------------------------------------------------------------------------------- metrics

AREA = 49  # pixels a patch


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def masks_of(n=40, image_size=56, seed=0):
    """Masks on which digit and clutter lie anywhere, and their pixels in each patch of 7."""
    grid = (2, n, 1, image_size // 7, image_size // 7)  # ink on some patches only, seldom both kinds
    inked = (torch.rand(grid, generator=rng(seed)) < 0.3).repeat_interleave(7, -1).repeat_interleave(7, -2)[:, :, 0]
    digit = (torch.rand(n, image_size, image_size, generator=rng(seed + 1)) < 0.5) & inked[0]
    clutter = (torch.rand(n, image_size, image_size, generator=rng(seed + 2)) < 0.3) & inked[1] & ~digit
    return digit, clutter, visualize.patch_sums(digit, 7), visualize.patch_sums(clutter, 7)


def maps_of(n=40, m=3, patches=64, ties=False, seed=2):
    """Any maps; with `ties`, of few different values."""
    maps = torch.rand(n, m, patches, generator=rng(seed))
    maps = (maps * 4).round() + 1 if ties else maps
    return maps / maps.sum(-1, keepdim=True)


def counts(*values):
    """Pixels in each of 64 patches of one image: the values, then nothing."""
    row = torch.zeros(1, 64)
    row[0, : len(values)] = torch.tensor(values, dtype=torch.float32)
    return row


def on(*patches):
    """A map with the same attention on each of these patches of 64: (1, 1, 64)."""
    row = torch.zeros(1, 1, 64)
    row[..., list(patches)] = 1 / len(patches)
    return row


def test_patch_sums_count_pixels():
    mask = torch.zeros(1, 14, 21, dtype=torch.bool)
    mask[0, 6:8, 13:15] = True  # one pixel in each of four patches around a corner
    assert visualize.patch_sums(mask, 7).tolist() == [[0, 1, 1, 0, 1, 1]]


def test_uniform_attention_tells_nothing():
    digit, clutter = counts(40, 30, 0, 0, 5), counts(0, 2, 9, 30, 5)
    values = visualize.attention_metrics(torch.full((1, 1, 64), 1 / 64), digit, clutter, AREA)
    for region in ("digit", "clutter", "background", "far_background"):
        assert values[f"{region}_density"].item() == pytest.approx(1)
    assert values["auroc"].item() == 0.5
    assert values["entropy"].item() == pytest.approx(1)
    assert values["pointing"].item() == pytest.approx(2 / 64)  # all are on top; two hold more digit
    assert values["jaccard60"].item() == pytest.approx(75 / (64 * AREA))  # all are taken


def test_attention_on_the_digits_patches_alone():
    """No patch has both: auroc and pointing 1, and the best set of patches has the best Jaccard."""
    digit, clutter = counts(49, 40, 30), counts(0, 0, 0, 20, 9)
    values = visualize.attention_metrics(on(0, 1, 2), digit, clutter, AREA)
    assert values["auroc"].item() == values["pointing"].item() == 1
    assert values["clutter_density"].item() == values["far_background_density"].item() == 0
    assert values["digit_density"].item() == pytest.approx(64 / 3)
    assert values["digit_share"].item() == pytest.approx(119 / 147)
    assert values["clutter_share"].item() == 0 and values["background_share"].item() == pytest.approx(28 / 147)
    # 119 pixels of digit in three patches; two would give 89 / (98 + 30), four no more digit
    assert values["jaccard60"].item() == values["best_jaccard"].item() == pytest.approx(119 / 147)
    assert values["entropy"].item() == pytest.approx(math.log(3) / math.log(64))


def test_attention_on_the_clutter_alone():
    values = visualize.attention_metrics(on(3, 4), counts(49, 40, 30), counts(0, 0, 0, 20, 9), AREA)
    assert values["auroc"].item() == values["pointing"].item() == values["jaccard60"].item() == 0
    assert values["clutter_density"].item() == pytest.approx(32)


def test_pointing_averages_ties_and_needs_more_digit_than_clutter():
    digit, clutter = counts(10, 10, 10), counts(9, 10, 11)
    for patches, share in (((0,), 1), ((1,), 0), ((2,), 0), ((0, 1), 0.5), ((0, 1, 2, 50), 0.25)):
        assert visualize.pointing(on(*patches), digit, clutter).item() == pytest.approx(share)


def test_jaccard60_takes_what_holds_60_percent_and_no_more():
    digit = counts(49, 49, 49, 49)
    steep, even = torch.zeros(1, 1, 64), torch.zeros(1, 1, 64)
    steep[0, 0, :4] = torch.tensor([0.35, 0.25, 0.22, 0.18])  # the first two hold just 60%
    even[0, 0, :5] = 0.2  # tied: the three that would do bring the other two along
    assert visualize.jaccard(steep, digit, AREA).item() == pytest.approx(2 / 4)
    assert visualize.jaccard(even, digit, AREA).item() == pytest.approx(4 / 5)


def test_diversity_by_hand():
    identical = maps_of(m=1).expand(-1, 3, -1)
    torch.testing.assert_close(visualize.diversity(identical), torch.zeros(40), atol=1e-6, rtol=0)
    assert visualize.diversity(torch.cat([on(0, 1), on(5)], 1)).item() == pytest.approx(1)
    # (1, 0) and (½, ½): H(¾, ¼) − ½ H(½, ½)
    assert visualize.diversity(torch.cat([on(0), on(0, 1)], 1)).item() == pytest.approx(0.8113 - 0.5, abs=1e-4)
    # of three heads, two agree: two of the three pairs are disjoint
    assert visualize.diversity(torch.cat([on(0), on(0), on(9)], 1)).item() == pytest.approx(2 / 3)
    assert visualize.diversity(on(0)).isnan().all()


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_scikit_learns_on_the_pixels(ties):
    digit, clutter, d, c = masks_of()
    maps = maps_of(ties=ties)
    ours = visualize.attention_metrics(maps, d, c, AREA)["auroc"]
    for image in range(40):
        either = digit[image] | clutter[image]
        for m in range(3):
            pixels = maps[image, m].view(8, 8).repeat_interleave(7, 0).repeat_interleave(7, 1)
            assert ours[image, m].item() == pytest.approx(roc_auc_score(digit[image][either], pixels[either]), abs=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_jaccard60_is_a_direct_sort_and_threshold(ties):
    digit, _, d, _ = masks_of()
    maps = maps_of(ties=ties).double()
    ours = visualize.jaccard(maps, d, AREA)
    for image in range(40):
        for m in range(3):
            held, least = 0, None
            for value in sorted(maps[image, m].tolist(), reverse=True):
                held, least = held + value, value
                if held >= 0.6 - 1e-6:
                    break
            taken = (maps[image, m] >= least).view(8, 8).repeat_interleave(7, 0).repeat_interleave(7, 1)
            direct = (taken & digit[image]).sum() / (taken | digit[image]).sum()
            assert ours[image, m].item() == pytest.approx(direct.item(), abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0.01, 1)), min_size=1, max_size=9))
@settings(max_examples=200, deadline=None)
def test_no_map_exceeds_the_best_jaccard_and_some_set_reaches_it(patches):
    """Patches of four pixels with 0 to 4 of digit, and any attention on them."""
    digit = torch.tensor([[float(n) for n, _ in patches]])
    maps = torch.tensor([[[a for _, a in patches]]], dtype=torch.float64)
    best = visualize.best_jaccard(digit, 4).item()
    assert visualize.jaccard(maps / maps.sum(), digit, 4).item() <= best + 1e-9
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * len(patches)).view(-1, len(patches))  # all sets
    inside = (every * digit).sum(1)
    assert best == pytest.approx((inside / (digit.sum() + 4 * every.sum(1) - inside)).nan_to_num().max().item())


def test_numbers_of_an_image_do_not_depend_on_its_batch():
    _, _, d, c = masks_of()
    for ties in (False, True):
        maps = maps_of(ties=ties)
        whole = visualize.attention_metrics(maps, d, c, AREA)
        for start, stop in ((0, 1), (1, 8), (8, 40)):
            part = visualize.attention_metrics(maps[start:stop], d[start:stop], c[start:stop], AREA)
            for name, value in whole.items():
                assert torch.equal(value[start:stop], part[name]), name


def test_the_order_of_patches_changes_nothing():
    """Tied ones above all: what a sort puts first among equals must not show."""
    _, _, d, c = masks_of()
    maps, order = maps_of(ties=True), torch.randperm(64, generator=rng(5))
    one = visualize.attention_metrics(maps, d, c, AREA)
    other = visualize.attention_metrics(maps[..., order], d[:, order], c[:, order], AREA)
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-12, rtol=0, equal_nan=True)


def test_images_without_clutter_are_left_out_of_what_needs_it_alone():
    digit, clutter = torch.cat([counts(49, 49)] * 2), torch.cat([counts(0, 0, 5), counts()])
    values = visualize.attention_metrics(on(0, 1).expand(2, -1, -1), digit, clutter, AREA)
    missing = {name for name, value in values.items() if value[1].isnan()}
    assert missing == {"clutter_density", "auroc"}
    assert not any(value[0].isnan() for value in values.values())


# -------------------------------------------------------------------------------- intervals


def interval_of(values, index, **kwargs):
    found = visualize.with_interval(visualize.bootstrap(values, index, **kwargs), len(values))
    return found["value"], found["low"], found["high"]


def test_interval_resamples_digits_not_images():
    """Ten canvases of one digit are no ten observations: the interval is as wide as with one each."""
    values = torch.randn(100, generator=rng(3))
    once = interval_of(values, torch.arange(100))
    tenfold = interval_of(values.repeat(10), torch.arange(100).repeat(10))
    assert once == pytest.approx(tenfold, abs=1e-6)
    value, low, high = once
    assert value == pytest.approx(values.mean().item(), abs=1e-6)
    assert high - low == pytest.approx(2 * 1.96 * values.std().item() / 10, rel=0.15)


def test_interval_leaves_out_images_without_the_region():
    values = torch.tensor([1.0, 2.0, torch.nan, 3.0])
    assert interval_of(values, torch.arange(4))[0] == pytest.approx(2.0)
    assert interval_of(torch.full((4,), torch.nan), torch.arange(4)) == (None, None, None)
    assert interval_of(values, torch.arange(4), resamples=0) == (2.0, None, None)


def coverage(repetitions, digits=250):
    """How often the interval of a ratio of means holds the true ratio, 2.

    Synthetic attention, skewed as densities are: of each digit ten canvases, which share a
    factor of the digit and have one each of their own.
    """
    inside = 0
    for seed in range(repetitions):
        g = rng(seed)
        shared = torch.rand(2, digits, 1, generator=g) * 2
        own = -torch.rand(2, digits, 10, generator=g).log()  # exponential, mean 1
        values = (shared * own).flatten(1) * torch.tensor([[4.0], [2.0]])
        index = torch.arange(digits).repeat_interleave(10)
        means = visualize.bootstrap(values.T, index, seed=seed)
        found = visualize.with_interval(means[:, 0] / means[:, 1], 10 * digits)
        inside += found["low"] <= 2 <= found["high"]
    return inside / repetitions


def test_interval_holds_the_truth_as_often_as_it_says():
    """Over 1,000 repetitions 95% intervals held the truth in 93.1% of them, over 3,000 others in
    94.6% (seeds 0 to 999, and 1,000 to 3,999)."""
    assert 0.9 <= coverage(150) <= 0.99


def laptop(**flags):
    args = train.parse_args(["--preset", "laptop", *(str(x) for k, v in flags.items() for x in (f"--{k}", v))])
    return train.make_config(args)


@pytest.fixture(scope="module")
def splits():
    return data.load_digits("sklearn")[0]


def table_of(maps_of_batch, splits, monkeypatch, n=1000, layout="matched", **kwargs):
    """`measure` of a network whose attention (b, heads, 64) is what a function says of the batch."""
    config = laptop()
    backbone = vit.build_network(config).backbone
    batches = list(data.evaluation_batches(config, splits["test"], n, layout, **kwargs))
    now = iter(batches)
    monkeypatch.setattr(visualize, "cls_maps", lambda network, images: maps_of_batch(next(now)))
    return visualize.measure(backbone, batches, resamples=200)


def same_everywhere(batch):
    return torch.full((len(batch["images"]), 2, 64), 1 / 64)


def on_the_digit(batch):
    held = visualize.patch_sums(batch["digit"], 7) + 1e-6
    return (held / held.sum(-1, keepdim=True))[:, None].expand(-1, 3, -1)


@pytest.mark.parametrize("layout", ["matched", "paper"])
def test_references_come_out_as_theory_says(splits, monkeypatch, layout):
    table = table_of(same_everywhere, splits, monkeypatch, layout=layout)
    for row in ("mean", "head_1", "head_2", "uniform", "ink", "shuffled"):
        assert table[row]["selectivity"]["value"] == pytest.approx(1, abs=1e-5)
        assert table[row]["auroc"]["value"] == pytest.approx(0.5, abs=1e-6)
    for region in ("digit", "clutter", "background", "far_background"):
        assert table["uniform"][f"{region}_density"]["value"] == pytest.approx(1, abs=1e-5)
    assert table["ink"]["far_background_density"]["value"] == 0
    # dense strokes win: brightness is no null
    assert table["brightness"]["selectivity"]["low"] > 1.2 and table["brightness"]["auroc"]["low"] > 0.6
    assert table["mean"]["diversity"]["value"] == pytest.approx(0, abs=1e-6)
    assert "diversity" not in table["head_1"] and "untrained" not in table


def test_a_map_that_does_not_see_the_image_earns_nothing_on_matched(splits, monkeypatch):
    """Wherever it looks: in the middle, at a corner, or anywhere at random. On `paper` the middle pays."""
    y, x = torch.meshgrid(torch.arange(8) - 3.5, torch.arange(8) - 3.5, indexing="ij")
    centred = torch.exp(-(x**2 + y**2) / 4.5).flatten()
    fixed = torch.stack([centred, torch.exp(-(x + y) / 4).flatten(), torch.rand(64, generator=rng(1))])

    def image_blind(batch):
        return (fixed / fixed.sum(-1, keepdim=True)).expand(len(batch["images"]), -1, -1)

    matched = table_of(image_blind, splits, monkeypatch, n=4000)
    for row in ("head_1", "head_2", "head_3", "shuffled"):
        assert 0.47 < matched[row]["auroc"]["value"] < 0.53, row
    paper = table_of(image_blind, splits, monkeypatch, n=1000, layout="paper")
    assert paper["head_1"]["auroc"]["value"] > 0.6


def test_a_network_that_looks_at_the_digit_and_one_whose_maps_are_laid_on_other_images(splits, monkeypatch):
    table = table_of(on_the_digit, splits, monkeypatch)
    assert table["mean"]["selectivity"]["low"] > 3 and table["mean"]["auroc"]["value"] > 0.9
    assert 0.47 < table["shuffled"]["auroc"]["value"] < 0.53
    assert table["shuffled"]["selectivity"]["low"] < 1 < table["shuffled"]["selectivity"]["high"]
    for metric in table["mean"].values():
        assert metric["low"] <= metric["value"] <= metric["high"] and 900 < metric["images"] <= 1000


def test_measure_does_not_depend_on_the_batch_size(splits):
    config = laptop()
    network, untrained = vit.build_network(config).backbone, vit.build_network(config | {"seed": 1}).backbone
    one, other = (
        visualize.measure(network, data.evaluation_batches(config, splits["test"], 60, batch_size=size), untrained, 50)
        for size in (60, 7)
    )
    for row in one:
        for name in one[row]:
            assert one[row][name] == pytest.approx(other[row][name], abs=2e-3), (row, name)


def test_heads_mean_and_untrained_are_rows_of_their_own(splits, monkeypatch):
    """Two heads with known maps, their mean, and the untrained network's: none is taken for another."""
    config = laptop()
    network, untrained = vit.build_network(config).backbone, vit.build_network(config).backbone

    def attention(which, images):
        patches = (0, 9) if which is network else (20,)
        return torch.cat([on(p) for p in patches], 1).expand(len(images), -1, -1)

    monkeypatch.setattr(visualize, "cls_maps", attention)
    batches = list(data.evaluation_batches(config, splits["test"], 100))
    table = visualize.measure(network, batches, untrained, 10)
    held = sum((visualize.patch_sums(batch["digit"], 7) for batch in batches), 0)
    share = (held / held.sum(-1, keepdim=True)).mean(0) * 64  # density of attention on one patch alone
    expected = {"head_1": share[0], "head_2": share[9], "mean": (share[0] + share[9]) / 2, "untrained": share[20]}
    for row, value in expected.items():
        assert table[row]["digit_density"]["value"] == pytest.approx(value.item(), abs=1e-5)
    assert table["mean"]["diversity"]["value"] == pytest.approx(1) and table["untrained"]["diversity"]["value"] is None


def test_selectivity_is_over_images_that_have_clutter(monkeypatch):
    """A canvas without any, looked at wherever, does not count."""
    image = torch.zeros(2, 1, 56, 56)
    digit, clutter = torch.zeros(2, 2, 56, 56, dtype=torch.bool)
    digit[:, :7, :7] = clutter[0, 7:14, :7] = True
    maps = torch.stack([torch.full((3, 64), 1 / 64), on(0)[0].expand(3, -1)])
    monkeypatch.setattr(visualize, "cls_maps", lambda network, images: maps)
    batch = {"images": image, "digit": digit, "clutter": clutter, "index": torch.arange(2)}
    row = visualize.measure(vit.build_network(laptop()).backbone, [batch], resamples=10)["mean"]
    assert row["selectivity"]["value"] == pytest.approx(1) and row["selectivity"]["images"] == 1
    assert row["digit_density"]["value"] == pytest.approx((1 + 64) / 2) and row["digit_density"]["images"] == 2


def test_the_best_head_is_the_most_selective_on_validation(monkeypatch):
    selectivity = {"validation split": (1.0, 3.0, 2.0), "test split": (5.0, 1.0, 0.5)}

    def measure(backbone, split, *args, **kwargs):
        return {f"head_{h}": {"selectivity": {"value": s}} for h, s in enumerate(selectivity[split], 1)}

    monkeypatch.setattr(visualize, "canvases", lambda config, backbone, split, *args: split)
    monkeypatch.setattr(visualize, "measure", measure)
    splits = {name: f"{name} split" for name in ("validation", "test")}
    result = visualize.attention_in_numbers(laptop(), vit.build_network(laptop()).backbone, splits)
    assert result["best_head"] == "head_2" and result["matched"]["head_1"]["selectivity"]["value"] == 5


def test_attention_that_is_not_finite_is_refused():
    backbone = vit.VisionTransformer(7, 24, 2, 3, 56)
    with torch.no_grad():
        backbone.blocks[1].attn.qkv.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        visualize.cls_maps(backbone, torch.zeros(1, 3, 56, 56))


# -------------------------------------------------------------------------------- the table


def result_of(mean, best=None, brightness=(1.3, 1.2, 1.4), shuffled=(1.0, 0.9, 1.1)):
    """What `attention_in_numbers` returns, with these selectivities (value, low, high)."""

    def row(selectivity):
        value, low, high = selectivity
        names = ("auroc", "digit_density", "clutter_density", "background_density", "far_background_density",
                 "pointing", "jaccard60", "best_jaccard", "entropy", "diversity")
        other = {"value": 12.345, "low": 11.345, "high": 13.345, "images": 1000}
        small = {"value": 0.25, "low": 0.24, "high": 0.26, "images": 1000}
        table = {"selectivity": {"value": value, "low": low, "high": high, "images": 990}}
        return table | {name: other if "density" in name else small for name in names}

    rows = {"mean": mean, "head_1": mean, "head_2": best or mean, "uniform": (1, 1, 1), "ink": (1, 1, 1),
            "brightness": brightness, "shuffled": shuffled, "untrained": (1.1, 1, 1.2)}
    table = {name: row(selectivity) for name, selectivity in rows.items()}
    return {"best_head": "head_2", "matched": table, "paper": table}


@pytest.mark.parametrize("mean,best,says", [
    ((1.9, 1.8, 2.0), None, "Yes: attention 1.90 times as dense on the digit as on the clutter"),
    ((1.5, 1.35, 1.6), None, "Not more than brightness explains: attention 1.50"),  # intervals touch
    ((1.0, 0.95, 1.05), None, "No: attention 1.00"),
    ((0.8, 0.7, 0.9), None, "No, it prefers the clutter: attention 0.80"),
    ((1.2, 1.15, 1.25), (2.0, 1.9, 2.1), "But head 2, by itself, does: 2.00 [1.90, 2.10]"),
])
def test_the_verdict_is_in_plain_words(mean, best, says):
    text = visualize.verdict(result_of(mean, best))
    assert says in text
    assert ("But head" in text) == (best is not None)


def test_attention_on_the_background_is_told():
    for selectivity in ((0.8, 0.7, 0.9), (1.9, 1.8, 2.0)):  # however it divides what little it gives
        result = result_of(selectivity)
        result["matched"]["mean"]["digit_density"] = {"value": 0.3, "low": 0.2, "high": 0.4, "images": 9}
        assert visualize.verdict(result).startswith("No, it looks past the ink: attention on the digit is 0.30 times")


def test_the_verdict_says_when_ranks_do_not_agree():
    result = result_of((1.9, 1.8, 2.0))
    assert "By auroc, ranks alone, it is not above brightness (0.25, 0.25)." in visualize.verdict(result)
    result["matched"]["mean"]["auroc"] = {"value": 0.7, "low": 0.69, "high": 0.71, "images": 9}
    assert "By auroc" not in visualize.verdict(result)


def test_above_is_what_the_printed_intervals_say():
    result = result_of((1.004, 1.0041, 1.005), shuffled=(1.001, 0.999, 1.0039))
    assert not visualize.above(result["matched"], "mean", "shuffled")


def test_above_brightness_but_not_above_shuffled_is_no_yes():
    assert visualize.verdict(result_of((1.9, 1.8, 2.0), shuffled=(1.8, 1.7, 1.9))).startswith("No: attention 1.90")


def test_tables_lead_with_selectivity_and_fit_a_terminal():
    result = result_of((1.9, 1.8, 2.0))
    lines = visualize.format_table(result).splitlines()
    assert lines[1].startswith("Yes") and max(map(len, lines)) <= 100
    mean = next(line for line in lines if line.startswith("mean of heads"))
    assert mean.split() == "mean of heads 1.90 [1.80, 2.00] yes yes 0.25 [0.24, 0.26] 0.25 [0.24, 0.26]".split()
    assert any(line.startswith("head 2 (best)") for line in lines)
    features = {name: {"value": 0.5, "low": 0.4, "high": 0.6, "images": 9} for name in ("knn", "linear_probe")}
    circumstances = [{"input": "224 px, patch 16"}] * 6
    text = visualize.format_comparison(list("ABCDEF"), [result | {"features": features}] * 6, circumstances)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert text.count("1.90 [1.80, 2.00]") == 6 * 3  # mean, best head, layout paper
    heads = [line.split() for line in text.splitlines() if line.startswith(" " * 24)]
    assert heads == [list("ABCD"), list("EF")]
    assert max(len(line) for line in visualize.LEGEND.splitlines()) <= 100


def test_cls_maps_leave_cls_out_and_sum_to_one():
    torch.manual_seed(0)
    backbone = vit.VisionTransformer(7, 24, 2, 3, 56)
    images = torch.randn(2, 3, 56, 56)
    maps = visualize.cls_maps(backbone, images)
    whole = backbone.last_attention(images)[:, :, 0]
    assert maps.shape == (2, 3, 64)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(maps, whole[..., 1:] / (1 - whole[..., :1]))


# --------------------------------------------------------------------------------- features


def test_knn_by_hand():
    """Two near votes beat three far ones, as exp(cosine / 0.07) weighs them."""
    angle = torch.tensor([0.1, -0.1, 0.9, -0.9, 1.0, 3.0])
    bank, classes = torch.stack([angle.cos(), angle.sin()], 1), torch.tensor([1, 1, 0, 0, 0, 2])
    query = torch.tensor([[1.0, 0.0]])
    assert visualize.knn_classify(bank, classes, query, k=5).tolist() == [1]
    assert visualize.knn_classify(bank, classes, query, k=5, temperature=100.0).tolist() == [0]


def test_knn_is_dinos_query_by_query():
    unit = torch.nn.functional.normalize
    bank, queries = unit(torch.randn(300, 8, generator=rng(1)), dim=1), unit(torch.randn(50, 8, generator=rng(2)), dim=1)
    classes = torch.randint(10, (300,), generator=rng(3))
    found = visualize.knn_classify(bank, classes, queries).tolist()
    for query, ours in zip(queries, found):
        cosine = [(row @ query).item() for row in bank]
        near = sorted(range(300), key=lambda i: -cosine[i])[:20]
        votes = [sum(math.exp(cosine[i] / 0.07) for i in near if classes[i] == c) for c in range(10)]
        assert ours == max(range(10), key=votes.__getitem__)


def test_the_probe_is_linear():
    """It separates what a line can, whatever the scale, and cannot separate a ring from its middle."""
    points = torch.randn(600, 2, generator=rng(4)) * torch.tensor([1.0, 1e-3])
    halves = (points[:, 1] > 0).long() * 7
    ring = (points[:, 0].abs() > 0.7).long()
    for labels, low, high in ((halves, 0.97, 1.0), (ring, 0.3, 0.7)):
        right = visualize.probe_classify(points[:400], labels[:400], points[400:]) == labels[400:]
        assert low <= right.double().mean() <= high


def test_features_are_normalised_and_labelled(splits):
    config = laptop()
    batches = data.evaluation_batches(config, splits["test"], 300)
    points, labels, index = visualize.features(vit.build_network(config).backbone, batches)
    torch.testing.assert_close(points.norm(dim=-1), torch.ones(300))
    assert torch.equal(labels, torch.cat([splits["test"].labels, splits["test"].labels[:50]]))
    assert index.tolist() == [*range(250), *range(50)]


# ---------------------------------------------------------------------------------- figures


def test_a_bright_patch_is_drawn_where_it_was_put(monkeypatch):
    """Upright and aligned: the map's hot patch covers the image's bright patch."""
    figures = []
    monkeypatch.setattr(visualize, "save_figure", lambda figure, path: figures.append(figure))
    image, hot = torch.zeros(56, 56), torch.zeros(1, 8, 8)
    image[7:14, 42:49] = 1  # row 1, column 6 of the patch grid: not symmetric in any way
    hot[0, 1, 6] = 1
    visualize.draw_attention([{"name": "", "images": [image], "maps": [hot], "masks": None}], "a.png", "title")
    figures[0].canvas.draw()
    pixels = np.asarray(figures[0].canvas.buffer_rgba())[..., :3].mean(-1)
    assert len(figures[0].axes) == 2
    for axis in figures[0].axes:
        box = axis.get_window_extent()
        bottom, top = pixels.shape[0] - int(box.y0), pixels.shape[0] - int(box.y1)
        panel = pixels[top + 2 : bottom - 2, int(box.x0) + 2 : int(box.x1) - 2]
        bright = np.argwhere(panel > 150).mean(0) / panel.shape
        np.testing.assert_allclose(bright, [1.5 / 8, 6.5 / 8], atol=0.02)


def test_pictures_keep_their_shape_and_fit_the_patches(tmp_path):
    Image.new("RGB", (100, 40), (255, 0, 0)).save(tmp_path / "wide.png")
    image = visualize.open_image(tmp_path / "wide.png", 56, 7)
    assert image.shape == (3, 21, 56)  # 22.4 is nearest to three patches
    torch.testing.assert_close(image.mean((1, 2)), torch.tensor([1.0, 0.0, 0.0]))
    Image.new("L", (7, 900)).save(tmp_path / "thin.png")
    assert visualize.open_image(tmp_path / "thin.png", 56, 7).shape == (3, 56, 7)
    Image.new("L", (6, 900)).save(tmp_path / "thinner.png")
    with pytest.raises(ValueError, match="thinner.png: 6×900 pixels are less than a patch of 7"):
        visualize.open_image(tmp_path / "thinner.png", 56, 7)


# ------------------------------------------------------------------------------ command line


@pytest.fixture(autouse=True, scope="module")
def few_images():
    """Numbers of few canvases; they are the same code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualize, "TEST_IMAGES", 100)
        patch.setattr(visualize, "BANK_IMAGES", 100)
        patch.setattr(visualize, "VALIDATION_IMAGES", 60)
        yield


QUICK = "--preset laptop --digits sklearn --device cpu --batch-size 8 --images-per-epoch 16".split()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of four steps that kept its epochs, which is enough to be looked at."""
    folder = tmp_path_factory.mktemp("run") / "run"
    kept = ["--epochs", "2", "--keep-epochs", "0,1,2", "--views", "different", "--output", str(folder)]
    assert train.main([*QUICK, *kept]) == 0
    return folder


@pytest.fixture(scope="module")
def other_run(tmp_path_factory):
    """Of another image size and patch size."""
    folder = tmp_path_factory.mktemp("other") / "run"
    size = ["--epochs", "1", "--image-size", "32", "--patch-size", "8", "--heads", "1", "--output", str(folder)]
    assert train.main([*QUICK, *size]) == 0
    return folder


@pytest.fixture
def look_at(tmp_path, capsys):
    """Runs the command line into a folder `out` of its own; returns status, what was printed, the folder."""

    def run(*flags):
        capsys.readouterr()
        status = visualize.main([*map(str, flags), "--output", str(tmp_path / "out"), "--device", "cpu"])
        return status, capsys.readouterr(), tmp_path / "out"

    return run


def strict_json(path):
    """JSON as the standard has it, without NaN and Infinity."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{path} holds {name}"))


def test_all_of_a_run(run_folder, look_at):
    status, printed, out = look_at(run_folder / "ckpt.pth")
    assert status == 0
    for name in ("views.png", "attention.png", "tsne.png", "curves.png"):
        assert min(Image.open(out / name).size) > 300
    for word in ("mean of heads", "brightness", "untrained", "layout paper", "k-NN", "linear probe"):
        assert word in printed.out
    assert max(len(line) for line in printed.out.splitlines() if "/" not in line) <= 100
    result = strict_json(out / "metrics.json")
    assert result["epoch"] == 2 and result["settings"]["patch_size"] == 7 and result["fallbacks"] == []
    assert result["best_head"] in ("head_1", "head_2", "head_3")
    for layout in ("matched", "paper"):
        assert set(result[layout]) == {
            "mean", "head_1", "head_2", "head_3", "uniform", "ink", "brightness", "shuffled", "untrained",
        }
        assert set(result[layout]["mean"]) == {
            "digit_density", "clutter_density", "background_density", "far_background_density", "selectivity", "auroc",
            "digit_share", "clutter_share", "background_share", "pointing", "jaccard60", "best_jaccard", "entropy", "diversity",
        }
        assert result[layout]["mean"]["entropy"]["images"] == 100
    for accuracy in (*result["features"].values(), *result["untrained_features"].values()):
        assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1


def test_attention_over_training_has_a_row_an_epoch(run_folder, tmp_path):
    """The same image at each kept epoch, through the network of that epoch."""
    args = visualize.parse_args([str(run_folder / "ckpt.pth")])
    subject = visualize.open_checkpoint(str(run_folder / "ckpt.pth"), args)
    visualize.load_splits([subject], "cpu")
    group, names = visualize.attention_over_epochs(subject)
    assert names == ["epoch 0", "epoch 1", "epoch 2"] * 4
    assert all(torch.equal(group["images"][0], image) for image in group["images"][:3])
    assert not torch.equal(group["images"][0], group["images"][3])
    untrained = vit.build_network(subject.config).backbone
    for row, network in ((0, untrained), (2, subject.backbone), (3, untrained)):
        maps = visualize.cls_maps(network, data.normalise(group["images"][row].movedim(-1, 0))[None])[0]
        torch.testing.assert_close(group["maps"][row].flatten(1), maps, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(group["maps"][0], group["maps"][2], atol=1e-6)
    (tmp_path / "ckpt.pth").write_bytes((run_folder / "ckpt.pth").read_bytes())  # carried off alone
    alone = visualize.open_checkpoint(str(tmp_path / "ckpt.pth"), args)
    alone.splits = subject.splits
    assert visualize.attention_over_epochs(alone)[1] is None


def test_kept_epochs_are_checkpoints_too(run_folder, look_at):
    status, _, out = look_at(run_folder / "epoch-1.pth")
    assert status == 0 and strict_json(out / "metrics.json")["epoch"] == 1


def test_several_checkpoints_side_by_side_each_at_its_own_size(run_folder, other_run, look_at):
    status, printed, out = look_at(run_folder / "ckpt.pth", other_run / "ckpt.pth")
    assert status == 0
    assert "They differ in input: each is measured at its own" in printed.out
    table = printed.out[printed.out.index("canvas  ") :]
    assert max(len(line) for line in table.splitlines()) <= 100
    assert "56 px, patch 7" in table and "32 px, patch 8" in table
    first, second = strict_json(out / "metrics-compared.json")
    assert first["settings"]["image_size"] == 56 and second["settings"]["image_size"] == 32
    assert second["matched"]["mean"]["diversity"]["value"] is None  # one head
    assert second["matched"]["mean"]["selectivity"] == second["matched"]["head_1"]["selectivity"]
    assert {p.name for p in out.iterdir()} == {"attention-compared.png", "metrics-compared.json"}
    _, printed, _ = look_at(run_folder / "ckpt.pth", run_folder / "epoch-1.pth")
    assert "They differ" not in printed.out


def test_side_by_side_is_the_same_as_one_by_one(run_folder, look_at):
    _, _, out = look_at(run_folder / "ckpt.pth")
    alone = strict_json(out / "metrics.json")
    _, _, out = look_at(run_folder / "epoch-0.pth", run_folder / "ckpt.pth")
    before, after = strict_json(out / "metrics-compared.json")
    assert after["matched"] == alone["matched"] and after["features"] == alone["features"]
    assert before["matched"]["mean"] == alone["matched"]["untrained"] != after["matched"]["mean"]


def test_weights_that_were_never_fine_tuned(run_folder, look_at):
    """What fine-tuning changed: the run beside its own network at random weights, which is its step 0."""
    status, printed, out = look_at(run_folder / "ckpt.pth", "--weights", "none")
    assert status == 0 and "--weights none" in printed.out
    run, never = strict_json(out / "metrics-compared.json")
    assert never["settings"]["weights"] == "none" and never["epoch"] is None
    for name, value in run["matched"]["untrained"].items():
        assert value == never["matched"]["mean"][name], name


def test_weights_of_a_file_are_measured_on_the_papers_canvas(look_at, tmp_path):
    from test_vit import tiny

    torch.save(tiny().state_dict(), tmp_path / "bare.pth")
    status, printed, out = look_at("--weights", tmp_path / "bare.pth", "--image-size", "64", "--digits", "sklearn")
    assert status == 0 and "above" in printed.out
    settings = strict_json(out / "metrics.json")["settings"]
    assert (settings["canvas_size"], settings["num_distractors"], settings["image_size"]) == (100, 6, 64)


def test_a_checkpoint_without_a_canvas_is_drawn_and_not_measured(look_at, tmp_path):
    from test_vit import tiny

    torch.save(tiny().state_dict(), tmp_path / "bare.pth")
    status, printed, out = look_at(tmp_path / "bare.pth", "--image-size", "64", "--digits", "sklearn")
    assert status == 0 and "there are no masks of its own to measure against" in printed.out
    assert [p.name for p in out.iterdir()] == ["attention.png"]


@pytest.mark.parametrize("lost", ["canvas_size", "loss", "dim", "epoch"])
def test_a_checkpoint_that_lost_a_setting_is_told(run_folder, look_at, tmp_path, lost):
    checkpoint = vit.read_checkpoint(run_folder / "ckpt.pth")
    del (checkpoint if lost == "epoch" else checkpoint["config"])[lost], checkpoint["digest"]
    torch.save(checkpoint, tmp_path / "lost.pth")
    status, printed, out = look_at(tmp_path / "lost.pth")
    assert status == 2 and f"lost.pth lacks {lost}" in printed.err and printed.err.count("\n") == 1
    assert not out.exists()


def test_a_network_that_collapsed_to_one_point_is_drawn(tmp_path):
    visualize.draw_tsne(torch.ones(30, 8), torch.arange(30) % 10, 0.1, str(tmp_path / "tsne.png"), "collapsed")
    assert (tmp_path / "tsne.png").stat().st_size > 1000


def test_attention_that_is_not_finite_names_its_checkpoint(run_folder, look_at, tmp_path):
    checkpoint = vit.read_checkpoint(run_folder / "ckpt.pth")
    checkpoint["teacher"]["backbone.blocks.1.attn.qkv.weight"][0] = 3e38  # finite, but not what comes of it
    del checkpoint["digest"]
    torch.save(checkpoint, tmp_path / "diverged.pth")
    for flags in ([], [run_folder / "ckpt.pth"]):
        status, printed, _ = look_at(*flags, tmp_path / "diverged.pth")
        assert status == 2 and f"{tmp_path / 'diverged.pth'}: the attention of its last block is not finite" in printed.err
        assert printed.err.count("\n") == 1


def test_own_pictures(run_folder, tmp_path):
    files = [tmp_path / "a.png", tmp_path / "b.jpg"]
    Image.new("RGBA", (80, 60), (9, 200, 30, 128)).save(files[0])
    Image.new("RGB", (64, 64), "white").save(files[1])
    command = [str(run_folder / "ckpt.pth"), "--images", *map(str, files), "--output", str(tmp_path), "--device", "cpu"]
    assert visualize.main(command) == 0
    assert (tmp_path / "attention-images.png").exists()
    assert not (tmp_path / "views.png").exists()


def test_own_pictures_through_two_networks(run_folder, other_run, look_at, tmp_path):
    Image.new("RGB", (64, 40), "white").save(tmp_path / "a.png")
    status, _, out = look_at(run_folder / "ckpt.pth", other_run / "ckpt.pth", "--images", tmp_path / "a.png")
    assert status == 0 and [p.name for p in out.iterdir()] == ["attention-images.png"]


def test_weights_of_others_are_read(tmp_path):
    """A bare DINO state dict and a full checkpoint of theirs, neither with settings of ours."""
    from test_vit import full_dino_checkpoint, tiny

    Image.new("RGB", (64, 64), "white").save(tmp_path / "x.png")
    torch.save(tiny().state_dict(), tmp_path / "bare.pth")
    torch.save(full_dino_checkpoint(tiny()), tmp_path / "full.pth")
    for name in ("bare.pth", "full.pth"):
        folder = tmp_path / name.removesuffix(".pth")
        command = [str(tmp_path / name), "--output", str(folder), "--device", "cpu", "--image-size", "64"]
        assert visualize.main([*command, "--images", str(tmp_path / "x.png")]) == 0
        assert (folder / "attention-images.png").exists()


def test_round_trip_as_dinos_script_reads(tmp_path):
    """The paper's ViT-S/8 in our checkpoint, read as visualize_attention.py of facebookresearch/dino
    does: its call of torch.load, its key, its prefixes, its names. The attention is what its class gives."""
    from test_vit import DINO_SAYS, probe, seeded_weights

    config = train.make_config(train.parse_args(["--preset", "paper", "--weights", "none", "--device", "cpu"]))
    network = vit.build_network(config)
    network.backbone.load_state_dict(seeded_weights(network.backbone))
    path = str(tmp_path / "ckpt.pth")
    train.save_checkpoint(path, {"config": config, "teacher": network.state_dict(), "epoch": 1, "metrics": []})
    state = {k.replace("module.", "").replace("backbone.", ""): v for k, v in torch.load(path)["teacher"].items()}
    as_dino = vit.VisionTransformer()
    missing, surplus = as_dino.load_state_dict(state, strict=False)
    assert not missing and all(name.startswith("head.") for name in surplus)
    ours = visualize.open_checkpoint(path, visualize.parse_args([path])).backbone
    image = torch.from_numpy(np.random.RandomState(1).standard_normal((1, 3, 112, 112)).astype(np.float32))
    for model in (as_dino, ours):
        with torch.no_grad():
            cls_row = model.last_attention(image)[0, :, 0].double()
        np.testing.assert_allclose(cls_row @ probe(109, 197), DINO_SAYS[112, 112][1], atol=1e-6)


@pytest.mark.parametrize("flags,says", [
    ([], "nothing to look at: name a ckpt.pth"),
    (["missing.pth"], "missing.pth: no such file"),
    (["--weights", "missing.pth"], "missing.pth: no such file"),
    (["CKPT", "missing.pth"], "missing.pth: no such file"),
    (["text.pth"], "text.pth is not a PyTorch checkpoint"),
    (["CKPT", "--images", "text.pth"], "--images text.pth is not a picture"),
    (["CKPT", "--images", "missing.png"], "--images missing.png"),
    (["CKPT", "--image-size", "50"], "--image-size 50 is no positive multiple of the patch size 7: 49 is"),
    (["CKPT", "--digits", "mnist", "--data-root", "nowhere"], "no MNIST in nowhere"),
    (["CKPT", "--device", "cuda:77"], "--device cuda:77"),
    (["."], ".: is a folder"),
])
def test_bad_input_is_told_in_one_line(run_folder, tmp_path, monkeypatch, capsys, flags, says):
    import torchvision

    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("hello")
    command = [str(run_folder / "ckpt.pth") if flag == "CKPT" else flag for flag in flags]
    if "--device" not in command:
        command += ["--device", "cpu"]
    assert visualize.main([*command, "--output", "out"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_figures_that_cannot_be_written(run_folder, capsys):
    assert visualize.main([str(run_folder / "ckpt.pth"), "--output", "/proc", "--digits", "sklearn", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "/proc cannot be written to" in error and "--output names another folder" in error and error.count("\n") == 1


def test_log_and_checkpoint_agree(run_folder):
    checkpoint = vit.read_checkpoint(run_folder / "ckpt.pth")
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert lines == checkpoint["metrics"] and lines[-1]["step"] == checkpoint["step"] == 4
