"""Metrics by hand, where the answer is known; intervals, references, features; what is reported."""

import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

import data
import metrics
import train
import vit

AREA = 49  # pixels of a patch
YES = (1.9, 1.8, 2.0)  # a selectivity above brightness, with its interval
SPLITS = data.load_digits("sklearn")[0]
LAPTOP = train.make_config(train.parse_args(["--preset", "laptop"]))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def enlarge(patches):
    """A value for each of 64 patches, (…, 64), as pixels (…, 56, 56)."""
    return patches.unflatten(-1, (8, 8)).repeat_interleave(7, -1).repeat_interleave(7, -2)


def random_masks():
    """Masks (40, 56, 56) of digit and clutter, each on some patches only; pixels of each patch."""
    inked = enlarge(torch.rand(2, 40, 64, generator=rng()) < 0.3)
    digit, clutter = (torch.rand(2, 40, 56, 56, generator=rng(1)) < 0.4) & inked
    clutter &= ~digit
    return digit, clutter, metrics.patch_sums(digit, 7), metrics.patch_sums(clutter, 7)


def random_maps(ties=False):
    """Any maps of 40 images; with `ties`, of few different values."""
    maps = torch.rand(40, 64, generator=rng(2))
    maps = (maps * 4).round() + 1 if ties else maps
    return maps / maps.sum(-1, keepdim=True)


def counts(*values):
    """Pixels in each of 64 patches of one image: the values, then nothing."""
    return torch.tensor([[*values, *[0] * (64 - len(values))]], dtype=torch.float32)


def on(*patches):
    """A map with the same attention on each of these patches of 64: (1, 64)."""
    row = torch.zeros(1, 64)
    row[:, list(patches)] = 1 / len(patches)
    return row


def network_of(seed=0):
    return vit.build_network(LAPTOP | {"seed": seed}).backbone


def test_uniform_attention_tells_nothing():
    digit, clutter = counts(40, 30, 0, 0, 5), counts(0, 2, 9, 30, 5)
    uniform = torch.full((1, 64), 1 / 64)
    values = metrics.attention_metrics(uniform, digit, clutter, AREA)
    for region in ("digit", "clutter", "background", "far_background"):
        assert values[f"{region}_density"].item() == pytest.approx(1)
    assert values["auroc"].item() == 0.5
    assert metrics.entropy(uniform).item() == pytest.approx(1)
    assert values["pointing"].item() == pytest.approx(2 / 64)  # all are top; two hold more digit
    assert values["jaccard60"].item() == pytest.approx(75 / (64 * AREA))  # all are taken


def test_attention_on_the_digit_alone_and_on_the_clutter_alone():
    digit, clutter = counts(49, 40, 30), counts(0, 0, 0, 20, 9)
    values = metrics.attention_metrics(on(0, 1, 2), digit, clutter, AREA)
    assert values["auroc"].item() == values["pointing"].item() == 1
    assert values["clutter_density"].item() == values["far_background_density"].item() == 0
    assert values["digit_density"].item() == pytest.approx(64 / 3)
    assert values["background_density"].item() == pytest.approx(
        28 / 147 * 64 * 49 / (64 * 49 - 148)
    )
    # 119 pixels of digit in three patches; two would give 89 / (98 + 30), four no more digit
    assert values["jaccard60"].item() == pytest.approx(119 / 147)
    assert values["best_jaccard"].item() == pytest.approx(119 / 147)
    assert metrics.entropy(on(0, 1, 2)).item() == pytest.approx(math.log(3) / math.log(64))
    values = metrics.attention_metrics(on(3, 4), digit, clutter, AREA)
    assert values["auroc"].item() == values["pointing"].item() == values["jaccard60"].item() == 0
    assert values["clutter_density"].item() == pytest.approx(32)


def test_pointing_and_jaccard60_by_hand():
    """Ties are averaged by the one, and taken together by the other."""
    digit, clutter = counts(10, 10, 10), counts(9, 10, 11)
    for patches, share in (((0,), 1), ((1,), 0), ((2,), 0), ((0, 1), 0.5), ((0, 1, 2, 50), 0.25)):
        values = metrics.attention_metrics(on(*patches), digit, clutter, AREA)
        assert values["pointing"].item() == pytest.approx(share)
    digit, steep, even = counts(49, 49, 49, 49), torch.zeros(1, 64), torch.zeros(1, 64)
    steep[0, :4] = torch.tensor([0.35, 0.25, 0.22, 0.18])  # the first two hold just 60%
    even[0, :5] = 0.2  # the three that would do bring the other two along
    for maps, overlap in ((steep, 2 / 4), (even, 4 / 5)):
        values = metrics.attention_metrics(maps, digit, counts(), AREA)
        assert values["jaccard60"].item() == pytest.approx(overlap)


def test_diversity_by_hand():
    same = metrics.diversity(random_maps()[:, None].expand(-1, 3, -1))
    torch.testing.assert_close(same, torch.zeros(40), atol=1e-6, rtol=0)
    of = lambda *maps: metrics.diversity(torch.stack(maps, 1))
    assert of(on(0, 1), on(5)).item() == pytest.approx(1)
    # (1, 0) and (½, ½): H(¾, ¼) − ½ H(½, ½)
    assert of(on(0), on(0, 1)).item() == pytest.approx(0.8113 - 0.5, abs=1e-4)
    # of three heads, two agree: two of the three pairs are disjoint
    assert of(on(0), on(0), on(9)).item() == pytest.approx(2 / 3)
    assert of(on(0)).isnan().all()


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_scikit_learns_on_the_pixels(ties):
    digit, clutter, *counted = random_masks()
    ours = metrics.attention_metrics(random_maps(ties), *counted, AREA)["auroc"]
    for image, pixels in enumerate(enlarge(random_maps(ties))):
        ink = digit[image] | clutter[image]
        expected = roc_auc_score(digit[image][ink], pixels[ink])
        assert ours[image].item() == pytest.approx(expected, abs=1e-6)


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0.01, 1)), min_size=1, max_size=9))
@settings(max_examples=200, deadline=None)
def test_no_map_exceeds_the_best_jaccard_and_some_set_reaches_it(patches):
    """Patches of four pixels with 0 to 4 of digit, and any attention on them."""
    digit = torch.tensor([[float(n) for n, _ in patches]])
    maps = torch.tensor([[a for _, a in patches]], dtype=torch.float64)
    values = metrics.attention_metrics(maps / maps.sum(), digit, torch.zeros_like(digit), 4)
    best = values["best_jaccard"].item()
    assert values["jaccard60"].item() <= best + 1e-9
    sets = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(patches))))  # all of them
    inside = (sets * digit).sum(1)
    found = (inside / (digit.sum() + 4 * sets.sum(1) - inside)).nan_to_num().max().item()
    assert best == pytest.approx(found)


def test_neither_the_batch_nor_the_order_of_patches_changes_a_number():
    """Of tied patches above all: what a sort puts first among equals must not show."""
    _, _, d, c = random_masks()
    order = torch.randperm(64, generator=rng(5))
    for ties in (False, True):
        maps = random_maps(ties=ties)
        whole = metrics.attention_metrics(maps, d, c, AREA)
        other = metrics.attention_metrics(maps[..., order], d[:, order], c[:, order], AREA)
        part = metrics.attention_metrics(maps[3:8], d[3:8], c[3:8], AREA)
        for name, value in whole.items():
            assert torch.equal(value[3:8], part[name]), name
            torch.testing.assert_close(value, other[name], atol=1e-12, rtol=0, equal_nan=True)


def interval_of(values, index, **kwargs):
    """Mean, and the 2.5th and 97.5th percentile of the resampled means."""
    means = metrics.weighted_means(values, metrics.resample(index, **kwargs)).numpy()
    return [means[0], *np.percentile(means[1:], [2.5, 97.5])]


def test_interval_resamples_digits_not_images():
    """Ten canvases of one digit are no ten observations: the interval is that of one each."""
    values = torch.randn(100, generator=rng(3))
    once = interval_of(values, torch.arange(100))
    assert once == pytest.approx(interval_of(values.repeat(10), torch.arange(100).repeat(10)))
    assert once[0] == pytest.approx(values.mean().item(), abs=1e-6)
    assert once[2] - once[1] == pytest.approx(2 * 1.96 * values.std().item() / 10, rel=0.15)
    missing = torch.tensor([1.0, 2.0, torch.nan, 3.0])
    once = metrics.resample(torch.arange(4), resamples=0)
    assert metrics.weighted_means(missing, once).tolist() == [2.0]


def table_of(attention, monkeypatch, n=1000, layout="matched"):
    """`measure_attention` of a network whose maps are what a function says of each batch."""
    batches = list(data.evaluation_batches(LAPTOP, SPLITS["test"], n, layout))
    now, feature = iter(batches), torch.zeros(100, 1)
    says = lambda network, images: (attention(next(now)), feature)
    monkeypatch.setattr(metrics, "cls_attention", says)
    seen = metrics.observe({"trained": network_of()}, batches)
    return metrics.measure_attention(seen, resamples=200)


def on_the_digit(batch):
    held = metrics.patch_sums(batch["digit"], 7) + 1e-6
    return (held / held.sum(-1, keepdim=True))[:, None].expand(-1, 3, -1)


@pytest.mark.parametrize("layout", ["matched", "paper"])
def test_references_come_out_as_theory_says(monkeypatch, layout):
    table = table_of(lambda batch: torch.full((100, 2, 64), 1 / 64), monkeypatch, layout=layout)
    for row in ("mean", "head_1", "head_2", "uniform", "ink", "shuffled"):
        assert table[row]["selectivity"]["value"] == pytest.approx(1, abs=1e-5)
        assert table[row]["auroc"]["value"] == pytest.approx(0.5, abs=1e-6)
    for region in ("digit", "clutter", "background", "far_background"):
        assert table["uniform"][f"{region}_density"]["value"] == pytest.approx(1, abs=1e-5)
    assert table["ink"]["far_background_density"]["value"] == 0
    brightness = table["brightness"]  # dense strokes win: it is no null
    assert brightness["selectivity"]["low"] > 1.2 and brightness["auroc"]["low"] > 0.6
    assert table["mean"]["diversity"]["value"] == pytest.approx(0, abs=1e-6)
    assert "diversity" not in table["head_1"] and "untrained" not in table


def test_a_map_that_does_not_see_the_image_earns_nothing_on_matched(monkeypatch):
    """In the middle, at a corner, or anywhere at random. On `paper` the middle pays."""
    y, x = torch.meshgrid(torch.arange(8) - 3.5, torch.arange(8) - 3.5, indexing="ij")
    middle, corner = torch.exp(-(x**2 + y**2) / 4.5), torch.exp(-(x + y) / 4)
    maps = torch.stack([middle, corner, torch.rand(8, 8, generator=rng(1))]).flatten(1)
    maps = (maps / maps.sum(-1, keepdim=True)).expand(100, -1, -1)  # for each batch
    matched = table_of(lambda batch: maps, monkeypatch, 4000)
    paper = table_of(lambda batch: maps, monkeypatch, layout="paper")
    for row in ("head_1", "head_2", "head_3", "shuffled"):
        assert 0.47 < matched[row]["auroc"]["value"] < 0.53, row
    assert paper["head_1"]["auroc"]["value"] > 0.6


def test_a_network_that_looks_at_the_digit_and_its_maps_laid_on_other_images(monkeypatch):
    table = table_of(on_the_digit, monkeypatch)
    assert table["mean"]["selectivity"]["low"] > 3 and table["mean"]["auroc"]["value"] > 0.9
    selectivity = table["shuffled"]["selectivity"]
    assert selectivity["low"] < 1 < selectivity["high"]
    assert 0.47 < table["shuffled"]["auroc"]["value"] < 0.53
    assert all(900 < each["images"] <= 1000 for each in table["mean"].values())
    batches = data.evaluation_batches(LAPTOP, SPLITS["test"], 1000)
    entropies = torch.cat([metrics.entropy(on_the_digit(batch)[:, 0]) for batch in batches])
    batches = data.evaluation_batches(LAPTOP, SPLITS["test"], 1000)
    index = torch.cat([batch["index"] for batch in batches])
    expected = interval_of(entropies, index, resamples=200)
    entropy = table["mean"]["entropy"]
    assert [entropy[k] for k in ("value", "low", "high")] == pytest.approx(expected, abs=1e-5)


def test_a_table_does_not_depend_on_the_batch_size():
    networks, tables = {"trained": network_of(), "untrained": network_of(seed=1)}, []
    for size in (60, 7):
        shown = LAPTOP, SPLITS["test"], 60, "matched", "test", size
        seen = metrics.observe(networks, data.evaluation_batches(*shown), rollout=True)
        batches = data.evaluation_batches(*shown, parts=True)
        effects = metrics.observe_effects(networks["trained"], batches)
        tables.append(metrics.measure_attention(seen, effects, 50))
    for row, cells in tables[0].items():
        for name, found in cells.items():
            assert found == pytest.approx(tables[1][row][name], abs=2e-3), (row, name)


def test_heads_mean_and_untrained_are_rows_of_their_own(monkeypatch):
    """Two heads with known maps, their mean, and the untrained network's: none is another's."""
    network, untrained = network_of(), network_of()

    def attention(which, images):
        patches = (0, 9) if which is network else (20,)
        maps = torch.stack([on(p) for p in patches], 1).expand(len(images), -1, -1)
        return maps, torch.zeros(len(images), 1)

    monkeypatch.setattr(metrics, "cls_attention", attention)
    batches = list(data.evaluation_batches(LAPTOP, SPLITS["test"], 100))
    networks = {"trained": network, "untrained": untrained}
    table = metrics.measure_attention(metrics.observe(networks, batches), resamples=0)
    held = metrics.patch_sums(batches[0]["digit"], 7)
    share = (held / held.sum(-1, keepdim=True)).mean(0) * 64  # density of a map on one patch
    expected = {"head_1": share[0], "head_2": share[9], "untrained": share[20]}
    expected["mean"] = (share[0] + share[9]) / 2
    for row, value in expected.items():
        assert table[row]["digit_density"]["value"] == pytest.approx(value.item(), abs=1e-5)
        assert table[row]["digit_density"]["low"] is None  # nothing was resampled
    assert table["mean"]["diversity"]["value"] == pytest.approx(1)
    assert table["untrained"]["diversity"]["value"] is None  # one head


def test_selectivity_is_over_images_that_have_clutter(monkeypatch):
    """A canvas without any, looked at wherever, does not count."""
    digit, clutter = torch.zeros(2, 2, 56, 56, dtype=torch.bool)
    digit[:, :7, :7] = clutter[0, 7:14, :7] = True
    maps = torch.stack([torch.full((3, 64), 1 / 64), on(0).expand(3, -1)])
    monkeypatch.setattr(metrics, "cls_attention", lambda *args: (maps, torch.zeros(2, 1)))
    batch = {"images": torch.zeros(2, 1, 56, 56), "index": torch.arange(2), "labels": torch.ones(2)}
    batch |= {"digit": digit, "clutter": clutter}
    seen = metrics.observe({"trained": network_of()}, [batch])
    row = metrics.measure_attention(seen, resamples=10)["mean"]
    assert row["selectivity"]["value"] == pytest.approx(1)
    assert row["digit_density"]["value"] == pytest.approx((1 + 64) / 2)
    assert [row[name]["images"] for name in ("selectivity", "auroc", "pointing")] == [1, 1, 2]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 2, st.booleans()), min_size=1, max_size=12))
def test_spearman_is_scipys_with_ties_and_absent_entries(entries):
    a, b, among = (torch.tensor(column) for column in zip(*entries))
    found = metrics.spearman(a.float(), b.float(), among).item()
    a, b = a[among].numpy(), b[among].numpy()
    if len(a) < 2:
        assert math.isnan(found)
    elif len({*a.tolist()}) == 1 or len({*b.tolist()}) == 1:
        assert found == 0  # constant: it says nothing
    else:
        assert found == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-9)


# of two canvases' [CLS] to itself and to four patches
ATTENTION = torch.tensor([[0.3, 0.4, 0.1, 0.1, 0.1], [0.4, 0.1, 0.3, 0.1, 0.1]])


class Weighing(torch.nn.Module):
    """Its feature is (1, Σ w x) over four patches of 7×7 pixels, x the mean of each in [0, 1]."""

    patch_size, registers = 7, 0

    def __init__(self, *weights):
        super().__init__()
        self.weights, self.cls_token = torch.tensor(weights), torch.zeros(1)

    def forward(self, images, keep=None):
        x = metrics.patch_sums(data.denormalize(images).mean(1), 7) / AREA * self.weights
        x = x.sum(-1) if keep is None else x.take_along_dim(keep, 1).sum(-1)
        return torch.stack([torch.ones_like(x), x], dim=-1)

    before_last_block = lambda self, images: self(images)
    last_attention = lambda self, x, queries: ATTENTION.view(2, 1, 1, 5)
    last_feature = lambda self, x, attention: x if attention is None else x * attention[:, 0, 0, :2]


def canvas_of(*patches):
    """An image (1, 14, 14) whose four patches have these values; masks are cut the same way."""
    return torch.tensor(patches).view(1, 2, 2).repeat_interleave(7, 1).repeat_interleave(7, 2)


def effects_by_hand():
    """Two canvases: digit on patches 0 and 1, a distractor on 2, another on 3 of the first only."""
    images = torch.stack([canvas_of(1.0, 0.5, 1.0, 1.0), canvas_of(1.0, 1.0, 0.5, 0.0)])
    yes, no = canvas_of(True, True, False, False), canvas_of(False, False, True, True)
    parts = [[0, 1], [2, 3]]  # pieces of the digit; distractors
    without, own = images[:, None].repeat(1, 4, 1, 1, 1), torch.zeros(2, 4, 14, 14).bool()
    for k, patch in enumerate([p for part in parts for p in part]):
        only = canvas_of(*(p == patch for p in range(4)))
        without[:, k] *= ~only
        own[:, k] = (images * only > 0.4)[:, 0]
    batch = {"images": images, "without": without, "own": own, "index": torch.arange(2)}
    batch |= {"labels": torch.tensor([0, 1]), "own_ink": torch.tensor([[49, 25, 49, 49]] * 2)}
    return batch | {"digit": yes.expand(2, -1, -1), "clutter": (images > 0.4)[:, 0] & no[0]}


def test_effects_of_a_network_that_weighs_patches():
    """By hand: features are (1, a), their angles atan a; of the first canvas a = 4 + 1 + 2 + 1."""
    network = Weighing(4.0, 2.0, 2.0, 1.0)
    effects = metrics.observe_effects(network, [effects_by_hand()])
    angle = lambda a: math.atan(a)
    sums = [[8, 4, 7, 6, 7], [7, 3, 5, 6, 7]]  # whole, then without each patch in turn
    for image, (whole, *rest) in enumerate(sums):
        for patch, a in enumerate(rest):
            turned = angle(whole) - angle(a)
            effect, moved = effects["effect"][image, patch], effects["moved"][image, patch]
            assert effect.item() == pytest.approx(1 - math.cos(turned), abs=1e-6)
            assert moved.item() == pytest.approx(2 * math.sin(turned / 2), abs=1e-5)
    assert effects["ink"].tolist() == [[True] * 4, [True, True, True, False]]
    assert (
        effects["own"][1].argmax(-1).tolist()[:3] == [0, 1, 2] and effects["own"][1, 3].sum() == 0
    )
    # effects rank the first canvas's patches 4, 1½, 3, 1½, the second's 3, 2, 1
    maps = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4], [0.25] * 4])
    by_hand = (4.5 / (5 * 4.5) ** 0.5, 0.5, 1), (-3 / (5 * 4.5) ** 0.5, -1, -1), (0, 0, 0)
    for map_, (first, second, objects) in zip(maps, by_hand):
        scores = metrics.faithfulness(map_.expand(2, -1), effects)
        assert scores["patch_faithfulness"].tolist() == pytest.approx([first, second])
        # patch 2 matters more than 3; on the second canvas only one distractor has ink
        found = scores["object_faithfulness"]
        assert found[0].item() == pytest.approx(objects) and found[1].isnan()
    bank = {("features", "trained"): effects["features"], "labels": torch.tensor([0, 1])}
    said, moved = metrics.measure_effects(effects, bank), effects["moved"].double()
    pieces = (moved[:, 0] / 49 + moved[:, 1] / 25).sum() / (moved[:, 2:] / 49).sum()
    assert said["causal_selectivity"]["value"] == pytest.approx(pieces.item(), rel=1e-5)
    matters = said["attention_matters"]
    ratios = {"even": (0.175 / 0.3, 0.15 / 0.4), "swapped": (0.1 / 0.4, 0.4 / 0.3)}
    for name, stretched in ratios.items():  # of (1, a), by the attention to [CLS] and patch 0
        turned = [math.atan(a * r) - math.atan(a) for a, r in zip((8, 7), stretched)]
        cosine = np.mean([math.cos(angle) for angle in turned])
        assert matters[name]["cosine"]["value"] == pytest.approx(cosine, abs=1e-6)
    assert matters["features"]["knn"]["value"] == 1
    assert matters["two_canvases"] == pytest.approx(math.cos(angle(8) - angle(7)), abs=1e-6)


def test_nothing_is_nan_in_a_table_of_blank_and_constant_maps():
    """Canvases without any distractor, and a network to which nothing matters."""
    config = LAPTOP | {"num_distractors": 0}
    for network in (network_of(), Weighing(0.0, 0.0, 0.0, 0.0)):
        if isinstance(network, Weighing):
            batches = [effects_by_hand()]
            effects = metrics.observe_effects(network, batches)
            scores = metrics.faithfulness(torch.rand(2, 4, generator=rng()), effects)
            assert (scores["patch_faithfulness"] == 0).all()
            continue
        shown = config, SPLITS["test"], 20
        seen = metrics.observe({"trained": network}, data.evaluation_batches(*shown), rollout=True)
        batches = data.evaluation_batches(*shown, parts=True)
        effects = metrics.observe_effects(network, batches)
        table = metrics.measure_attention(seen, effects, resamples=20)
        assert table["mean"]["object_faithfulness"]["value"] is None
        assert table["uniform"]["patch_faithfulness"]["value"] == 0
        assert table["mean"]["patch_faithfulness"]["images"] == 20
        assert "nan" not in json.dumps(table, allow_nan=False).lower()


def test_a_share_of_the_oracle_and_fewer_canvases_for_effects(monkeypatch):
    network, shown = network_of(), (LAPTOP, SPLITS["test"], 100)
    seen = metrics.observe({"trained": network}, data.evaluation_batches(*shown), rollout=True)
    few = data.evaluation_batches(LAPTOP, SPLITS["test"], 10, parts=True)
    table = metrics.measure_attention(seen, metrics.observe_effects(network, few), resamples=50)
    oracle, mean = table["oracle"], table["mean"]
    assert oracle["of_oracle"]["value"] == pytest.approx(1) and oracle["auroc"]["value"] > 0.9
    share = math.log(mean["selectivity"]["value"]) / math.log(oracle["selectivity"]["value"])
    assert mean["of_oracle"]["value"] == pytest.approx(share)
    less = mean["patch_faithfulness_less_brightness"]
    rho = [table[row]["patch_faithfulness"]["value"] for row in ("mean", "brightness")]
    assert less["value"] == pytest.approx(rho[0] - rho[1])
    # narrower than either's: it is the same canvases that are compared
    assert table["brightness"]["patch_faithfulness_less_brightness"]["high"] == 0
    assert mean["patch_faithfulness"]["images"] == 10 and mean["selectivity"]["images"] > 90
    large = vit.VisionTransformer(depth=1)
    assert metrics.effect_images(network, 56) == 1000 and metrics.effect_images(large, 224) == 20


def test_leaving_out_the_tokens_that_matter():
    """Of ten patches a fifth is two: the two that weigh most, or the two that weigh nothing."""
    network = Weighing(*[0.0] * 10)
    network.weights[:2] = torch.tensor([1.0, 2.0])
    network.forward = lambda images, keep=None: Weighing.forward(network, images, keep)
    images = data.normalize(torch.ones(3, 1, 14, 35))  # 2 × 5 patches
    pointing, missing = torch.zeros(2, 3, 10)
    pointing[:, :2], missing[:, 5:7] = 0.5, 0.5
    effects = metrics.token_effects(network, images, [pointing, missing], rng(), draws=200)
    whole = 1 - math.cos(math.atan(3))  # (1, 3) becomes (1, 0)
    torch.testing.assert_close(effects[:, :2], torch.tensor([[whole, 0]] * 3), atol=1e-5, rtol=0)
    assert effects.shape == (3, 202)
    one = [1 - math.cos(math.atan(3) - math.atan(a)) for a in (2, 1)]
    expected = whole / 45 + 8 / 45 * sum(one)  # of 45 pairs one has both, 8 the one, 8 the other
    assert effects[:, 2:].mean().item() == pytest.approx(expected, rel=0.1)


@pytest.fixture
def few_images(monkeypatch):
    for name in ("TEST_IMAGES", "BANK_IMAGES", "VALIDATION_IMAGES", "VALIDATION_BANK"):
        monkeypatch.setattr(metrics, name, 60)


def test_the_best_head_is_the_most_selective_on_validation(few_images, monkeypatch):
    """Head 2 looks at the digits of the validation split, head 1 at those of the test split."""
    seen, batches = {}, data.evaluation_batches

    def remembered(config, split, *args, **kwargs):
        for batch in batches(config, split, *args, **kwargs):
            seen.update(batch=batch, validation=split is SPLITS["validation"])
            yield batch

    def attention(backbone, images):
        maps = torch.full((len(images), 3, 64), 1 / 64)
        if "digit" in seen["batch"]:
            maps[:, 1 if seen["validation"] else 0] = on_the_digit(seen["batch"])[:, 0]
        return maps, torch.randn(len(images), 2, generator=rng(0))

    monkeypatch.setattr(data, "evaluation_batches", remembered)
    monkeypatch.setattr(metrics, "cls_attention", attention)
    monkeypatch.setattr(metrics, "measure_effects", lambda *args: {})
    result, _ = metrics.evaluate("a.pth", LAPTOP, None, network_of(), SPLITS)
    assert result["best_head"] == "head_2"
    for layout in ("matched", "paper"):
        assert result[layout]["head_1"]["selectivity"]["low"] > 2
        assert result[layout]["head_2"]["selectivity"]["value"] == pytest.approx(1, abs=1e-5)


def test_cls_attention_leaves_cls_out_and_sums_to_one():
    torch.manual_seed(0)
    images, batches = torch.randn(2, 3, 56, 56), data.evaluation_batches(LAPTOP, SPLITS["test"], 5)
    for registers in (0, 2):
        backbone = vit.VisionTransformer(7, 24, 2, 3, 56, registers=registers)
        maps, features = metrics.cls_attention(backbone, images)
        whole, others = backbone.get_last_selfattention(images)[:, :, 0], 1 + registers
        assert maps.shape == (2, 3, 64) and whole.shape == (2, 3, others + 64)
        torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3))
        torch.testing.assert_close(maps * whole[..., others:].sum(-1, True), whole[..., others:])
        torch.testing.assert_close(features, F.normalize(backbone(images), dim=-1))
    with torch.no_grad():
        backbone.blocks[1].attn.qkv.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        metrics.observe({"trained": backbone}, batches)


def test_knn_is_dinos_query_by_query():
    bank, queries = (torch.randn(n, 8, generator=rng(n)) for n in (300, 50))
    bank, queries = (x / x.norm(dim=1, keepdim=True) for x in (bank, queries))
    classes = torch.randint(10, (300,), generator=rng(3))
    for query, ours in zip(queries, metrics.knn_classify(bank, classes, queries).tolist()):
        cosine, votes = (bank @ query).tolist(), [0.0] * 10
        for i in sorted(range(300), key=lambda i: -cosine[i])[:20]:
            votes[classes[i]] += math.exp(cosine[i] / 0.07)
        assert ours == votes.index(max(votes))


def test_the_probe_is_linear():
    """It separates what a line can, whatever the scale, but not a ring from its middle."""
    points = torch.randn(600, 2, generator=rng(4)) * torch.tensor([1.0, 1e-3])
    halves, ring = (points[:, 1] > 0).long() * 7, (points[:, 0].abs() > 0.7).long()
    for labels, low, high in ((halves, 0.97, 1.0), (ring, 0.3, 0.7)):
        found = metrics.linear_probe(points[:400], labels[:400], points[400:])
        assert low <= (found == labels[400:]).double().mean() <= high


def test_validation_measures_the_same_images_for_every_run(few_images):
    backbone = network_of()
    configs = [LAPTOP | {"seed": seed} for seed in (0, 1)]
    sets = [metrics.validation_images(config, SPLITS) for config in configs]
    sets = [[metrics.observe({"trained": backbone}, batches) for batches in pair] for pair in sets]
    one, other = (metrics.validate(*pair) for pair in sets)
    assert one == other and one["images"] == 60
    seen, bank = sets[0]
    table = metrics.measure_attention(seen, resamples=0)
    assert one.keys() - {"images", "knn", "mean_cosine"} == table.keys()
    assert one["mean"].keys() == {"selectivity", "auroc", "pointing", "entropy", "diversity"}
    for row, cells in table.items():
        assert all(value == cells[name]["value"] for name, value in one[row].items()), row
    assert torch.equal(seen["labels"], SPLITS["validation"].labels[seen["index"]])
    assert torch.equal(bank["labels"], SPLITS["train"].labels[bank["index"]])
    points, queries = (each["features", "trained"] for each in (bank, seen))
    torch.testing.assert_close(points.norm(dim=-1), torch.ones(60))
    correct = metrics.knn_classify(points, bank["labels"], queries) == seen["labels"]
    assert one["knn"] == pytest.approx(correct.double().mean().item())
    cosines = queries @ queries.T
    assert one["mean_cosine"] == pytest.approx((cosines.sum().item() - 60) / 60 / 59, abs=1e-5)


def test_collapse_is_told_of_both_kinds():
    untrained = {"epoch": 0, "validation": {"mean_cosine": 0.985}}

    def told(epoch, cosine, entropies=(1, 0), **config):
        line = dict(zip(("entropy_of_mean", "mean_entropy"), entropies), mean_cosine=cosine)
        return metrics.collapse(LAPTOP | config, [untrained, {"epoch": epoch, "validation": line}])

    alike, apart = torch.randn(1, 9, generator=rng(0)), torch.randn(50, 9, generator=rng(1))
    for features, is_collapsed in ((alike.expand(50, 9), True), (apart, False)):
        assert bool(told(3, metrics.mean_cosine(F.normalize(features, dim=-1)))) == is_collapsed
    assert told(1, 0.999) is None  # in the ramp of two epochs
    assert told(3, 0.984) is None  # less than before training: it has begun to learn
    for entropies, is_collapsed in (((1, 0.999), True), ((0.001, 0), True), ((0.95, 0.9), False)):
        text = told(3, 0.5, entropies, loss="dino")
        assert bool(text) == is_collapsed and (not text or "--centering" in text)
    assert metrics.collapse(LAPTOP, [{"epoch": 9, "validation": {}}]) is None  # of an older log
    text = metrics.verdict(result_of(YES) | {"collapse": told(3, 0.999)})
    assert "No: the network has collapsed" in text and "Yes" not in text


def cell(value, low, high):
    return {"value": value, "low": low, "high": high, "images": 1000}


def result_of(mean, best=None, shuffled=(1.0, 0.9, 1.1), heads=2):
    """As of `evaluate`, with these selectivities (value, low, high); head 2 is the best."""
    rows = {"mean": mean} | {f"head_{h + 1}": mean for h in range(heads)} | {"head_2": best or mean}
    rows |= {"uniform": (1, 1, 1), "ink": (1, 1, 1), "brightness": (1.3, 1.2, 1.4)}
    rows |= {"shuffled": shuffled, "untrained": (1.1, 1, 1.2)}
    rows |= {"rollout": (1.3, 1.2, 1.4), "oracle": (8, 7, 9)}
    table = {row: {"selectivity": cell(*selectivity)} for row, selectivity in rows.items()}
    for cells in table.values():
        for name in ("auroc", "pointing", "jaccard60", "best_jaccard", "entropy", "diversity"):
            cells[name] = cell(0.25, 0.24, 0.26)
        for name in ("of_oracle", "patch_faithfulness", "object_faithfulness"):
            cells[name] = cell(0.85, 0.84, 0.86)
        cells["patch_faithfulness_less_brightness"] = cell(0.1, 0.05, 0.15)
        for region in ("digit", "clutter", "background", "far_background"):
            cells[f"{region}_density"] = cell(12.345, 11.345, 13.345)
    accuracies = {name: cell(0.434, 0.4, 0.5) for name in ("knn", "linear_probe")}
    result = {"checkpoint": "run/ckpt.pth", "epoch": 2, "fallbacks": [], "settings": LAPTOP}
    result |= {"best_head": "head_2", "collapse": None, "matched": table, "paper": table}
    even = {"cosine": cell(0.123, 0.1, 0.2), "knn": cell(0.1, 0.0, 0.2)}
    result["attention_matters"] = {"two_canvases": 0.456, "even": even}
    result["causal_selectivity"] = cell(2.34, 2.2, 2.5)
    return result | {"features": accuracies, "untrained_features": accuracies}


def test_the_verdict_is_in_plain_words():
    for mean, best, says in (
        (YES, None, "Yes: attention is 1.90 times as dense on the digit"),
        ((1.5, 1.35, 1.6), None, "Not more than brightness explains: attention is 1.50"),  # touch
        ((1.0, 0.95, 1.05), None, "Not more than position explains: attention is 1.00"),
        ((0.8, 0.7, 0.9), None, "No, it prefers the clutter: attention is 0.80"),
        ((1.2, 1.15, 1.25), (2.0, 1.9, 2.1), "But head 2, by itself, does: 2.00 [1.90, 2.10]"),
        ((None, None, None), None, "Cannot be told"),
    ):
        text = metrics.verdict(result_of(mean, best))
        assert says in text and ("But head" in text) == (best is not None)
    for selectivity in ((0.8, 0.7, 0.9), YES):  # however it divides what little it gives
        result = result_of(selectivity)
        result["matched"]["mean"]["digit_density"] = cell(0.3, 0.2, 0.4)
        text = metrics.verdict(result)
        assert "No, it looks past the ink" in text and "0.30 times" in text


def test_attention_is_compared_with_brightness_on_the_same_canvases():
    result, metric = result_of(YES), "patch_faithfulness_less_brightness"
    for less, says in (
        (cell(0.1, 0.05, 0.15), "Better than brightness"),
        (cell(-0.1, -0.15, -0.05), "Less than brightness"),
        (cell(0.01, -0.05, 0.05), "No better than brightness"),
        (cell(None, None, None), "No better than brightness"),
    ):
        result["matched"]["mean"][metric] = less
        text = " ".join(metrics.explanation(result).split())
        assert f"Does it point to what the feature depends on? {says}: within" in text
        assert "correlation 0.85 [0.84, 0.86], brightness 0.85" in text
        assert "moves the feature 2.34 [2.20, 2.50] times as far" in text
        assert "is 0.12 (two canvases: 0.46), and k-NN accuracy 10.0%." in text


def test_the_verdict_says_what_does_not_agree():
    text = metrics.verdict(result_of(YES, shuffled=(1.8, 1.7, 1.9)))  # above brightness alone
    assert "Not more than position explains: attention is 1.90" in text
    result, ranks = result_of(YES), "By auroc, ranks alone, it is not above brightness"
    assert ranks in metrics.verdict(result)
    result["matched"]["mean"]["auroc"] = cell(0.7, 0.69, 0.71)
    assert "By auroc" not in metrics.verdict(result)
    table = result_of((1.004, 1.0041, 1.005), shuffled=(1.001, 0.999, 1.0039))["matched"]
    assert not metrics.is_above(table, "mean", "shuffled")  # 1.00 and 1.00, as printed


@pytest.mark.parametrize("heads", [2, 12])  # DINO's largest network has 12
def test_the_report_is_short_and_leads_with_the_verdict(tmp_path, heads):
    result, path = result_of(YES, heads=heads), tmp_path / "metrics.json"
    result["matched"]["head_1"]["patch_faithfulness"] = cell(-0.4, -0.41, -0.38)  # the widest
    text = metrics.report([result], str(path))
    lines = [line for line in text.splitlines() if "/" not in line]
    assert (
        len(text.splitlines()) <= 28 + heads and max(map(len, lines)) <= 100 and str(path) in text
    )
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert text.index("at all that is white? Yes:") < text.index("selectivity  ")
    (mean,) = [" ".join(line.split()) for line in lines if line.startswith("mean ")]
    assert mean == "mean 1.90 [1.80, 2.00] 0.85 0.25 0.85 [0.84, 0.86] 0.85 12.35 12.35 12.35"
    for row in ("head 2 (best)", "brightness", "shuffled", "untrained"):
        assert any(line.startswith(row) for line in lines), row
    assert "-0.40 [-0.41, -0.38] " in text
    assert "0.43" in text or "43.4%" in text  # what the features tell


def test_several_networks_are_in_one_table(tmp_path):
    results = [result_of((value, value - 0.1, value + 0.1)) for value in (1.9, 1.2)]
    text = metrics.report(results, str(tmp_path / "metrics.json"))
    lines = [line for line in text.splitlines() if "/" not in line]
    for start in ("[1] mean", "[1] head 2 (best)", "[1] brightness", "[2] mean", "[2] brightness"):
        assert sum(line.startswith(start) for line in lines) == 1, start
    assert text.count("selectivity  ") == 1 and text.count("Does it look at the digit") == 2
    assert len(json.loads((tmp_path / "metrics.json").read_text())) == 2
    assert max(map(len, lines)) <= 100
