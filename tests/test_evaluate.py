"""Tables of networks whose attention or whose effects are known, and what metrics.json holds."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DIGITS, TINY, PretendedGPU, config_of, on_pretended_gpu

import data
import evaluate
import explain
import metrics
import observe
import views
import vit
from evaluate import CANVAS_MAPS, PHOTO_MAPS
from observe import CanvasEffects, Observation, TokenEffects
from settings import Config
from views import EvaluationBatch, LeftOut, evaluation_batches, left_out_batches
from vit import VisionTransformer, ViTShape

PATCHES = 64  # of a canvas in the laptop preset
PATCH_SIZE = 7
PATCH_AREA = 49
CONFIG = config_of("--preset laptop --digits sklearn")
TINY_CONFIG = config_of(TINY)
TINY_PHOTOS = config_of(f"{TINY} --dataset stl10 --depth 4")
CANVAS_ROWS = {observe.row_of(name) for name in CANVAS_MAPS}
PHOTO_ROWS = {observe.row_of(name) for name in PHOTO_MAPS}
MASK_BASELINES = {"brightness", "ink", "oracle", "shuffled", "uniform"}
THREE_HEADS = {"head_1", "head_2", "head_3"}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def backbone_of(seed: int = 0, config: Config = CONFIG) -> VisionTransformer:
    return vit.build_network(replace(config, seed=seed)).backbone


def photographs(count: int = 16) -> dict:
    """The splits of a data set of photographs, which show noise."""
    images = torch.randint(256, (count, 3, 96, 96), dtype=torch.uint8, generator=generator(0))
    split = data.Split(images, torch.arange(count) % 2)
    return {"train": split, "test": split}


def map_on(*patches):
    """A map with equal attention on these of 64 patches, and none on the others: (64,)."""
    row = torch.zeros(PATCHES)
    row[list(patches)] = 1 / len(patches)
    return row


def observe_known_heads(
    heads_of_batch, count: int = 1000, layout: str = "matched", config: Config = CONFIG
) -> Observation:
    """What is observed of canvases by a network whose heads are known.

    `heads_of_batch` is a function from a batch of b canvases to attention (b, heads, 64).
    """
    batches = list(evaluation_batches(config, DIGITS["test"], count, layout))
    images = torch.cat([batch.images for batch in batches])
    digit = torch.cat([batch.digit for batch in batches])
    clutter = torch.cat([batch.clutter for batch in batches])
    return Observation(
        labels=torch.cat([batch.labels for batch in batches]),
        index=torch.cat([batch.index for batch in batches]),
        features={},
        attention={"trained": torch.cat([heads_of_batch(batch) for batch in batches])},
        patch_area=PATCH_AREA,
        digit=metrics.patch_sums(digit, PATCH_SIZE),
        clutter=metrics.patch_sums(clutter, PATCH_SIZE),
        intensity=metrics.patch_sums(images[:, 0], PATCH_SIZE),
    )


def table_of(heads_of_batch, count: int = 1000, layout: str = "matched") -> dict:
    observation = observe_known_heads(heads_of_batch, count, layout)
    return evaluate.measure_attention(observation, resamples=200)


def look_at_the_digit(batch):
    """Three heads that all look at the pixels of the digit."""
    pixels = metrics.patch_sums(batch.digit, PATCH_SIZE) + 1e-6
    maps = pixels / pixels.sum(-1, keepdim=True)
    return maps[:, None].expand(-1, 3, -1)


def observe_backbones(
    networks: dict, config: Config = CONFIG, count: int = 20, effect_count: int = 10
) -> tuple[Observation, CanvasEffects]:
    """What is observed of real networks, and the effects of changes on the one called "trained"."""
    batches = evaluation_batches(config, DIGITS["test"], count)
    observation = observe.observe(networks, batches)
    batches = left_out_batches(config, DIGITS["test"], effect_count)
    effects = observe.observe_effects(networks["trained"], batches, CANVAS_MAPS, effect_count)
    return observation, effects


def observation_with_ink(maps, digit, clutter) -> Observation:
    """What is observed of canvases if their masks (n, patches) are known, and the maps of a
    network with one head; each shows a digit of its own."""
    return Observation(
        labels=torch.zeros(len(maps), dtype=torch.int64),
        index=torch.arange(len(maps)),
        features={},
        attention={"trained": maps[:, None]},
        patch_area=PATCH_AREA,
        digit=digit,
        clutter=clutter,
        intensity=digit + clutter,
    )


def effects_with_ink(blackening, ink) -> CanvasEffects:
    """Known effects of blackening the patches (n, patches), which all have ink, of a network with
    one block.

    Canvases have one piece of the digit and one distractor. Each shows a digit of its own.
    """
    count, patches = blackening.shape
    return CanvasEffects(
        index=torch.arange(count),
        maps={},
        intensity=ink,
        has_ink=torch.ones(count, patches, dtype=torch.bool),
        blackening=blackening,
        direct=blackening[:, None],
        distances=torch.ones(count, 2),
        part_ink=torch.ones(count, 2, patches),
        canvas_ink=torch.full((count, 2), 10),
    )


# ----------------------------------------------------------------------------- maps against masks


@pytest.mark.parametrize("layout", ["matched", "paper"])
def test_baselines_have_the_values_that_theory_gives(layout):
    table = table_of(lambda batch: torch.full((100, 2, PATCHES), 1 / PATCHES), layout=layout)
    for row in ("mean", "head_1", "head_2", "uniform", "ink", "shuffled"):
        assert table[row]["selectivity"]["value"] == pytest.approx(1, abs=1e-5)
        assert table[row]["auroc"]["value"] == pytest.approx(0.5, abs=1e-6)
    for region in ("digit", "clutter", "background", "far_background"):
        assert table["uniform"][f"{region}_density"]["value"] == pytest.approx(1, abs=1e-5)
    assert table["ink"]["far_background_density"]["value"] == 0
    assert table["oracle"]["of_oracle"]["value"] == pytest.approx(1)
    assert table["oracle"]["auroc"]["value"] > 0.9
    # Brightness is no null: strokes of a digit are denser than clutter.
    assert table["brightness"]["selectivity"]["low"] > 1.2
    assert table["brightness"]["auroc"]["low"] > 0.6
    assert table["mean"]["diversity"]["value"] == pytest.approx(0, abs=1e-6)
    assert "diversity" not in table["head_1"]
    # Without effects there are no other maps of the network, and no control for them.
    assert table.keys() == {"mean", "head_1", "head_2"} | MASK_BASELINES


def test_brightness_also_lies_on_a_texture():
    config = replace(CONFIG, background="texture")
    observation = observe_known_heads(look_at_the_digit, count=100, config=config)
    table = evaluate.measure_attention(observation, resamples=0)
    assert table["brightness"]["far_background_density"]["value"] > 0.1


def test_a_map_that_does_not_depend_on_the_image_earns_nothing_on_layout_matched():
    """In the middle, at a corner, or random. On layout `paper` the middle does score."""
    offset = torch.arange(8) - 3.5
    row, column = torch.meshgrid(offset, offset, indexing="ij")
    middle = torch.exp(-(row**2 + column**2) / 4.5)
    corner = torch.exp(-(row + column) / 4)
    anywhere = torch.rand(8, 8, generator=generator(1))
    heads = torch.stack([middle, corner, anywhere]).flatten(1)
    heads = (heads / heads.sum(-1, keepdim=True)).expand(100, -1, -1)
    matched = table_of(lambda batch: heads, count=4000)
    for name in ("head_1", "head_2", "head_3", "shuffled"):
        assert 0.47 < matched[name]["auroc"]["value"] < 0.53, name
    paper = table_of(lambda batch: heads, layout="paper")
    assert paper["head_1"]["auroc"]["value"] > 0.6


def test_a_network_that_looks_at_the_digit():
    """Its maps are selective on their own canvases, and not on those of other images."""
    observation = observe_known_heads(look_at_the_digit)
    table = evaluate.measure_attention(observation, resamples=200)
    assert table["mean"]["selectivity"]["low"] > 3
    assert table["mean"]["auroc"]["value"] > 0.9
    shuffled = table["shuffled"]
    assert shuffled["selectivity"]["low"] < 1 < shuffled["selectivity"]["high"]
    assert 0.47 < shuffled["auroc"]["value"] < 0.53
    assert all(900 < cell["images"] <= 1000 for cell in table["mean"].values())

    entropy = metrics.entropy(observation.attention["trained"].mean(1).double())
    weights = metrics.bootstrap_weights(observation.index, resamples=200)
    expected = metrics.interval_cell(metrics.weighted_means(entropy, weights), entropy)
    assert table["mean"]["entropy"] == pytest.approx(expected, abs=1e-5)


def densities_on_single_patches(observation: Observation):
    """The digit density of a map that lies on one patch, for each canvas and patch: (n, 64)."""
    return PATCHES * observation.digit / observation.digit.sum(-1, keepdim=True)


def test_heads_their_mean_and_another_network_have_rows_of_their_own():
    observation = observe_known_heads(
        lambda batch: torch.stack([map_on(0), map_on(9)]).expand(100, -1, -1), count=100
    )
    observation.attention["untrained"] = map_on(20).expand(100, 1, -1)
    other_heads = torch.stack([map_on(20), map_on(40), map_on(40)])
    observation.attention["other_network"] = other_heads.expand(100, -1, -1)
    table = evaluate.measure_attention(observation, resamples=0)
    density = densities_on_single_patches(observation).mean(0)
    expected = {
        "head_1": density[0],
        "head_2": density[9],
        "mean": (density[0] + density[9]) / 2,
        "untrained": density[20],
        "other_network": (density[20] + 2 * density[40]) / 3,
    }
    for row, value in expected.items():
        assert table[row]["digit_density"]["value"] == pytest.approx(value.item(), abs=1e-5)
        assert table[row]["digit_density"]["low"] is None  # nothing was resampled
    assert table["mean"]["diversity"]["value"] == pytest.approx(1)
    assert table["untrained"]["diversity"]["value"] is None  # it has one head
    assert table["other_network"]["diversity"]["value"] == pytest.approx(2 / 3)  # of three pairs


def test_maps_that_come_with_the_effects_may_be_of_the_first_canvases_only():
    """Attention and brightness, which are known of all canvases, stay those of all canvases."""
    observation = observe_known_heads(lambda batch: map_on(0).expand(100, 1, -1), count=100)
    effects = effects_with_ink(torch.ones(10, PATCHES), torch.ones(10, PATCHES))
    effects.maps = {
        "mean": map_on(50).expand(10, -1),
        "rollout": map_on(30).expand(10, -1),
        "brightness": map_on(50).expand(10, -1),
        "random": map_on(9).expand(10, -1),
    }
    table = evaluate.measure_attention(observation, effects, resamples=10)
    density = densities_on_single_patches(observation)
    expected = {
        "mean": density[:, 0].mean(),
        "rollout": density[:10, 30].mean(),
        "random": density[:10, 9].mean(),
    }
    for row, value in expected.items():
        assert table[row]["digit_density"]["value"] == pytest.approx(value.item(), abs=1e-5), row
    for row, images in {"mean": 100, "brightness": 100, "rollout": 10, "random": 10}.items():
        assert table[row]["entropy"]["images"] == images, row
        assert table[row]["patch_faithfulness"]["images"] == 10, row
    without_effects = evaluate.measure_attention(observation, resamples=10)
    for name, cell in without_effects["brightness"].items():
        assert table["brightness"][name] == cell, name
    assert "diversity" not in table["rollout"]


def test_selectivity_is_over_images_with_clutter():
    """Where the network looks on a canvas without clutter does not count."""
    digit = torch.zeros(2, PATCHES)
    digit[:, 0] = 49
    clutter = torch.zeros(2, PATCHES)
    clutter[0, 8] = 49
    maps = torch.stack([torch.full((PATCHES,), 1 / PATCHES), map_on(0)])
    observation = observation_with_ink(maps, digit, clutter)
    cells = evaluate.measure_attention(observation, resamples=10)["mean"]
    assert cells["selectivity"]["value"] == pytest.approx(1)
    assert cells["digit_density"]["value"] == pytest.approx((1 + 64) / 2)
    assert cells["selectivity"]["images"] == 1
    assert cells["auroc"]["images"] == 1
    assert cells["pointing"]["images"] == 2


def test_a_metric_compares_a_row_with_the_oracle():
    observation = observe_known_heads(lambda batch: (look_at_the_digit(batch) + 1 / PATCHES) / 2)
    table = evaluate.measure_attention(observation, resamples=50)
    log_oracle = math.log(table["oracle"]["selectivity"]["value"])
    share = math.log(table["mean"]["selectivity"]["value"]) / log_oracle
    assert 0.3 < share < 0.95
    assert table["mean"]["of_oracle"]["value"] == pytest.approx(share)
    assert table["mean"]["of_oracle"]["images"] == table["mean"]["selectivity"]["images"]


def five_photographs() -> Observation:
    """What a network with two heads makes of them."""
    return Observation(
        labels=torch.arange(5),
        index=torch.arange(5),
        features={},
        attention={"trained": torch.rand(5, 2, PATCHES, generator=generator(0)).softmax(-1)},
        patch_area=PATCH_AREA,
    )


def test_photographs_have_neither_masks_nor_baselines():
    observation = five_photographs()
    table = evaluate.measure_attention(observation, resamples=10)
    assert table.keys() == {"mean", "head_1", "head_2"}
    assert table["mean"].keys() == {"entropy", "diversity"}
    assert table["head_1"].keys() == {"entropy"}


# ---------------------------------------------------------------------------- maps against effects


def test_equal_ink_is_the_share_of_all_pairs_of_the_resampled_canvases():
    """Canvases with more pairs count more.

    Three canvases have three pairs, which attention orders as the effects are, and two have one
    pair, which it orders the other way. The last one has none.
    """
    rising = torch.tensor([1.0, 2.0, 3.0]) / 6
    falling = rising.flip(0)
    maps = torch.stack([rising, rising, rising, falling, falling, rising])
    ink = [[10, 10, 10]] * 3 + [[10, 10, 50]] * 2 + [[10, 20, 50]]
    effects = effects_with_ink(rising.expand(6, 3), torch.tensor(ink).float())
    effects.maps = {"rollout": maps.flip(-1)}
    observation = observation_with_ink(maps, torch.ones(6, 3), torch.ones(6, 3))
    table = evaluate.measure_attention(observation, effects, resamples=300)

    assert table["mean"]["equal_ink"]["value"] == pytest.approx(9 / 11)
    assert table["rollout"]["equal_ink"]["value"] == pytest.approx(2 / 11)
    assert table["uniform"]["equal_ink"]["value"] == pytest.approx(1 / 2)
    assert table["mean"]["equal_ink"]["images"] == 5
    assert not set(evaluate.ONLY_IN_RATIOS) & table["mean"].keys()

    times_drawn = metrics.bootstrap_weights(observation.index, 300)[1:]  # (300, 6)
    won = 3 * times_drawn[:, :3].sum(1)
    lost = times_drawn[:, 3:5].sum(1)
    interval = np.percentile(won / (won + lost), [2.5, 97.5])
    cell = table["mean"]["equal_ink"]
    assert [cell["low"], cell["high"]] == pytest.approx(list(interval))


def test_effects_may_be_of_the_first_canvases_only():
    observation, effects = observe_backbones({"trained": backbone_of()}, count=20, effect_count=10)
    table = evaluate.measure_attention(observation, effects, resamples=0)
    assert table["mean"]["patch_faithfulness"]["images"] == 10
    assert table["mean"]["entropy"]["images"] == 20
    maps = observation.attention["trained"].mean(1)[:10]
    faithfulness = metrics.faithfulness(maps, effects)
    for name in ("patch_faithfulness", "object_faithfulness", "direct_faithfulness"):
        expected = faithfulness[name].nanmean().item()
        assert table["mean"][name]["value"] == pytest.approx(expected, abs=1e-6), name
    share = faithfulness["equal_ink_wins"].nansum() / faithfulness["equal_ink_pairs"].nansum()
    assert table["mean"]["equal_ink"]["value"] == pytest.approx(share.item())
    assert table.keys() == CANVAS_ROWS | THREE_HEADS | MASK_BASELINES


def test_tables_of_photographs_hold_what_was_measured_of_each_map():
    observation = five_photographs()
    effects = known_token_effects()
    table = evaluate.measure_attention(observation, effects, resamples=50)
    assert table.keys() == {"mean", "head_1", "head_2", "contrast"}
    assert table["mean"]["entropy"]["images"] == 5
    names = {"srg", "patch_faithfulness", "direct_faithfulness"}
    assert table["mean"].keys() == {"entropy", "diversity"} | names
    assert table["contrast"].keys() == names
    assert table["mean"]["srg"]["value"] == pytest.approx((0.5 + 0.3) / 2)
    assert table["mean"]["srg"]["images"] == 2
    assert table["mean"]["patch_faithfulness"]["value"] == pytest.approx(0.2)
    assert table["contrast"]["srg"]["value"] == pytest.approx(0.1)
    assert table["contrast"]["direct_faithfulness"]["value"] == pytest.approx(-0.4)


def known_token_effects() -> TokenEffects:
    """Of three photographs and two maps; SRG, and the block in the middle, of the first two."""
    return TokenEffects(
        index=torch.arange(3),
        srg={
            "mean": torch.tensor([0.5, 0.3, torch.nan]),
            "contrast": torch.tensor([0.0, 0.2, torch.nan]),
        },
        patch_faithfulness={
            "mean": torch.tensor([0.1, 0.2, 0.3]),
            "contrast": torch.tensor([0.1, 0.0, -0.1]),
        },
        direct_faithfulness={
            "mean": torch.tensor([0.6, 0.7, 0.8]),
            "contrast": torch.tensor([-0.4, -0.4, -0.4]),
        },
        direct_sums=torch.tensor([[4.0, 3.0, 2.0], [2.0, 1.0, 0.4], [4.0, torch.nan, 1.0]]),
    )


def test_measures_of_pictures():
    """They are the table that the printed report needs."""
    effects = known_token_effects()
    result = evaluate.measure_pictures("a.pth", "a network", effects)
    assert result["checkpoint"] == "a.pth"
    assert result["description"] == "a network"
    assert result["collapse"] is None
    assert result["direct_share"] == evaluate.direct_share(effects)
    table = result["photographs"]
    assert table.keys() == {"mean", "contrast"}
    assert table["mean"].keys() == {"srg", "patch_faithfulness", "direct_faithfulness"}
    # There is no interval of so few pictures.
    expected = {"value": pytest.approx(0.4), "low": None, "high": None, "images": 2}
    assert table["mean"]["srg"] == expected
    assert table["mean"]["patch_faithfulness"]["value"] == pytest.approx(0.2)
    assert table["mean"]["patch_faithfulness"]["images"] == 3
    assert table["contrast"]["direct_faithfulness"]["value"] == pytest.approx(-0.4)
    json.dumps(result, allow_nan=False)


def test_five_pictures_have_an_interval():
    ones = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    effects = TokenEffects(
        index=torch.arange(5),
        srg={"mean": ones},
        patch_faithfulness={"mean": ones},
        direct_faithfulness={"mean": ones},
        direct_sums=torch.ones(5, 2),
    )
    result = evaluate.measure_pictures("a.pth", "a network", effects, "it has collapsed")
    srg = result["photographs"]["mean"]["srg"]
    assert 0.1 < srg["low"] < srg["value"] < srg["high"] < 0.5
    assert result["collapse"] == "it has collapsed"


def test_a_single_picture_has_no_interval():
    effects = known_token_effects()
    effects.index = effects.index[:1]
    effects.direct_sums = effects.direct_sums[:1]
    for values in (effects.srg, effects.patch_faithfulness, effects.direct_faithfulness):
        values["mean"] = values["mean"][:1]
        values["contrast"] = values["contrast"][:1]
    result = evaluate.measure_pictures("a.pth", "a network", effects)
    one_picture = {"low": None, "high": None, "images": 1}
    assert result["photographs"]["mean"]["srg"] == {"value": 0.5} | one_picture
    assert result["direct_share"][-1] == {"value": 0.5} | one_picture
    json.dumps(result, allow_nan=False)


# ------------------------------------------------------------------------- what cannot be measured


def test_a_table_of_canvases_without_distractors_holds_no_nan():
    config = replace(CONFIG, num_distractors=0)
    observation, effects = observe_backbones({"trained": backbone_of()}, config, effect_count=20)
    table = evaluate.measure_attention(observation, effects, resamples=20)
    assert table["mean"]["object_faithfulness"]["value"] is None
    assert table["mean"]["selectivity"]["value"] is None
    assert table["mean"]["of_oracle"]["value"] is None
    assert table["uniform"]["patch_faithfulness"]["value"] == 0
    assert table["mean"]["patch_faithfulness"]["images"] == 20
    assert 0 < table["mean"]["equal_ink"]["images"] <= 20
    assert evaluate.causal_selectivity(effects)["value"] is None
    assert evaluate.direct_share(effects)[0]["value"] == pytest.approx(1)
    json.dumps(table, allow_nan=False)


def test_a_table_without_two_patches_of_equal_ink_holds_no_nan():
    ink = torch.tensor([[10.0, 20.0, 40.0], [7.0, 9.0, 30.0]])
    effects = effects_with_ink(torch.rand(2, 3, generator=generator(0)), ink)
    maps = torch.rand(2, 3, generator=generator(1)).softmax(-1)
    observation = observation_with_ink(maps, torch.ones(2, 3), torch.ones(2, 3))
    table = evaluate.measure_attention(observation, effects, resamples=20)
    nothing = {"value": None, "low": None, "high": None, "images": 0}
    assert all(cells["equal_ink"] == nothing for cells in table.values())
    assert table["mean"]["patch_faithfulness"]["images"] == 2
    json.dumps(table, allow_nan=False)


def test_blank_canvases_are_measured_without_nan():
    """They have no ink, and nothing can be changed about them."""
    size = 28
    no_ink = torch.zeros(3, size, size, dtype=torch.bool)
    batch = EvaluationBatch(
        images=torch.zeros(3, 1, size, size),
        labels=torch.arange(3),
        index=torch.arange(3),
        digit=no_ink,
        clutter=no_ink,
        left_out=LeftOut(
            images=torch.zeros(3, 2, 1, size, size),
            masks=torch.zeros(3, 2, size, size, dtype=torch.bool),
            ink=torch.zeros(3, 2, dtype=torch.int64),
        ),
    )
    backbone = backbone_of(config=TINY_CONFIG)
    observation = observe.observe({"trained": backbone}, [batch])
    effects = observe.observe_effects(backbone, [batch], CANVAS_MAPS, direct_images=2)
    table = evaluate.measure_attention(observation, effects, resamples=20)
    assert 0.9 < table["mean"]["entropy"]["value"] <= 1
    assert table["mean"]["background_density"]["value"] == pytest.approx(1)
    for name in ("selectivity", "equal_ink", "patch_faithfulness", "direct_faithfulness"):
        assert table["mean"][name]["value"] is None, name
    causal_selectivity = evaluate.causal_selectivity(effects)
    direct_share = evaluate.direct_share(effects)
    assert causal_selectivity["value"] is None
    assert [cell["value"] for cell in direct_share] == [None] * TINY_CONFIG.depth
    json.dumps([table, causal_selectivity, direct_share], allow_nan=False)


# ----------------------------------------------------------------------------- features and effects


def unit_vectors(angles):
    """Features (n, 2) at these angles."""
    angles = torch.tensor(angles)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def observation_of(features, labels) -> Observation:
    """What is observed of images if only their features count; each image is a digit of its own."""
    return Observation(
        labels=torch.tensor(labels),
        index=torch.arange(len(labels)),
        features={"trained": features},
        attention={},
        patch_area=PATCH_AREA,
    )


def test_accuracy_is_the_share_of_right_answers(monkeypatch):
    monkeypatch.setattr(metrics, "NEIGHBOURS", 1)
    bank = observation_of(unit_vectors([0.0, 1.0, 2.0]), [0, 1, 2])
    images = observation_of(unit_vectors([0.1, 1.1, 2.1, 0.2]), [0, 1, 2, 2])
    cell = evaluate.accuracy(bank, images.features["trained"], images)
    assert cell["value"] == pytest.approx(3 / 4)
    assert 0 <= cell["low"] < 3 / 4 < cell["high"] <= 1
    assert cell["images"] == 4


def test_accuracy_of_a_classifier_without_an_answer_is_none():
    bank = observation_of(unit_vectors([0.0, 1.0]), [3, 3])
    cell = evaluate.accuracy(bank, bank.features["trained"], bank, classify=metrics.linear_probe)
    assert cell == {"value": None, "low": None, "high": None, "images": 0}


def test_accuracy_is_that_of_the_network_that_is_asked_for():
    bank = observation_of(unit_vectors([0.0, 1.0]), [0, 1])
    bank.features["untrained"] = bank.features["trained"].flip(0)
    queries = bank.features["trained"]
    assert evaluate.accuracy(bank, queries, bank)["value"] == 1
    assert evaluate.accuracy(bank, queries, bank, "untrained")["value"] == 0


def test_causal_selectivity_by_hand():
    """Two canvases, of each of which two pieces of the digit and two distractors are left out."""
    effects = effects_with_ink(torch.ones(2, 4), torch.ones(2, 4))
    effects.distances = torch.tensor([[0.2, 0.4, 0.1, 0.1], [0.3, 0.3, 0.2, 0.0]])
    effects.canvas_ink = torch.tensor([[10, 20, 10, 5], [10, 30, 20, 40]])
    cell = evaluate.causal_selectivity(effects)
    # distance for each pixel of ink, summed over the two canvases
    of_digit = (0.02 + 0.02) + (0.03 + 0.01)
    of_distractors = (0.01 + 0.02) + (0.01 + 0)
    assert cell["value"] == pytest.approx(of_digit / of_distractors)
    assert cell["low"] == pytest.approx(0.04 / 0.03)  # the first canvas twice
    assert cell["high"] == pytest.approx(0.04 / 0.01)
    assert cell["images"] == 2


def test_the_direct_share_by_hand_on_canvases():
    """A ratio of sums over patches and canvases. Of the last canvas it was not measured."""
    effects = effects_with_ink(torch.ones(3, 2), torch.ones(3, 2))
    of_first = [[3.0, 1.0], [1.0, 1.0], [1.0, 0.0]]  # for each of three blocks, of two patches
    of_second = [[1.0, 1.0], [1.0, 0.0], [0.25, 0.25]]
    not_measured = [[torch.nan] * 2] * 3
    effects.direct = torch.tensor([of_first, of_second, not_measured])
    cells = evaluate.direct_share(effects)
    assert [cell["value"] for cell in cells] == pytest.approx([1, 3 / 6, 1.5 / 6])
    assert [cell["low"] for cell in cells] == pytest.approx([1, 1 / 2, 1 / 4])
    assert [cell["high"] for cell in cells] == pytest.approx([1, 1 / 2, 1 / 4])
    assert [cell["images"] for cell in cells] == [2, 2, 2]


def test_the_direct_share_by_hand_on_photographs():
    """Of a block that was measured on the first photographs only, it is a share of their effects.

    All photographs count at the first block and at the last.
    """
    cells = evaluate.direct_share(known_token_effects())
    assert [cell["value"] for cell in cells] == pytest.approx([1, 4 / 6, 3.4 / 10])
    assert [cell["images"] for cell in cells] == [3, 2, 3]
    assert cells[1]["low"] == pytest.approx(1 / 2)  # the second photograph alone
    assert cells[1]["high"] == pytest.approx(3 / 4)


def test_patches_without_any_effect_have_no_direct_share():
    effects = effects_with_ink(torch.ones(2, 4), torch.ones(2, 4))
    effects.direct = torch.zeros(2, 3, 4)
    cells = evaluate.direct_share(effects)
    assert cells == [{"value": None, "low": None, "high": None, "images": 2}] * 3
    token_effects = known_token_effects()
    token_effects.direct_sums = torch.zeros(3, 2)
    cells = evaluate.direct_share(token_effects)
    assert cells == [{"value": None, "low": None, "high": None, "images": 3}] * 2
    json.dumps(cells, allow_nan=False)


def test_the_untrained_network_is_measured_by_its_own_effects_on_canvases():
    """Its table is the one that it would have if it were the trained network."""
    networks = {"trained": backbone_of(seed=1), "untrained": backbone_of()}
    observation, own_effects = observe_backbones(networks)
    alone, effects = observe_backbones({"trained": backbone_of()})
    table = evaluate.measure_untrained(observation, effects, CANVAS_MAPS)
    expected = evaluate.measure_attention(alone, effects)
    assert table == {row: expected[row] for row in CANVAS_ROWS}
    # what it guards against
    of_trained = evaluate.measure_attention(observation, own_effects)
    for name in ("entropy", "patch_faithfulness"):
        assert table["mean"][name] != of_trained["mean"][name], name
        assert table["rollout"][name] != of_trained["rollout"][name], name


def observe_photographs(networks: dict, of_effects: str) -> tuple[Observation, TokenEffects]:
    """What is observed of photographs, and how maps of the network `of_effects` stand up there."""
    split = photographs()["test"]
    observation = observe.observe(networks, evaluation_batches(TINY_PHOTOS, split, 6))
    batches = evaluation_batches(TINY_PHOTOS, split, 4)
    effects = observe.observe_token_effects(networks[of_effects], batches, PHOTO_MAPS)
    return observation, effects


def test_the_untrained_network_is_measured_by_its_own_effects_on_photographs():
    untrained = backbone_of(config=TINY_PHOTOS)
    networks = {"trained": backbone_of(seed=1, config=TINY_PHOTOS), "untrained": untrained}
    observation, effects = observe_photographs(networks, "untrained")
    alone, _ = observe_photographs({"trained": untrained}, "trained")
    table = evaluate.measure_untrained(observation, effects, PHOTO_MAPS)
    expected = evaluate.measure_attention(alone, effects)
    assert table == {row: expected[row] for row in PHOTO_ROWS}
    of_trained = evaluate.measure_attention(observation)
    assert table["mean"]["entropy"] != of_trained["mean"]["entropy"]


# ---------------------------------------------------------------------------------- the evaluation


@pytest.fixture
def sixty_images(monkeypatch):
    for name in ("TEST_IMAGES", "BANK_IMAGES", "VALIDATION_IMAGES", "VALIDATION_BANK"):
        monkeypatch.setattr(evaluate, name, 60)


HISTORY = [
    {"epoch": 0, "validation": {"mean_cosine": 0.5}},
    {"epoch": 2, "validation": {"mean_cosine": 0.4}},
]
MASK_METRICS = {"entropy", "selectivity", "auroc", "pointing", "jaccard60", "best_jaccard"}
MASK_METRICS |= {"digit_density", "clutter_density", "background_density"}
MASK_METRICS |= {"far_background_density", "of_oracle"}
EFFECT_METRICS = {"equal_ink", "patch_faithfulness", "direct_faithfulness", "object_faithfulness"}
RESULT_KEYS = {"checkpoint", "description", "epoch", "collapse", "settings", "fallbacks"}
RESULT_KEYS |= {"direct_share", "features", "mean_cosine", "fingerprint"}


def test_what_metrics_json_holds_of_a_run_on_canvases(few_images):
    """A network that was trained is measured beside itself before the first step."""
    other = backbone_of(seed=2, config=TINY_CONFIG)
    backbone = backbone_of(seed=1, config=TINY_CONFIG)
    arguments = ("a.pth", TINY_CONFIG, HISTORY, backbone, DIGITS, other)
    evaluation = evaluate.evaluate(*arguments)
    result = evaluation.result
    of_canvases = {"best_head", "causal_selectivity", "matched", "paper"}
    of_runs = {"untrained", "untrained_features"}
    assert result.keys() == (RESULT_KEYS - {"fingerprint"}) | of_canvases | of_runs
    assert result["checkpoint"] == "a.pth"
    assert result["epoch"] == 2
    assert result["description"].endswith("epoch 2 of 2")
    images = evaluate.direct_images(backbone, 16)
    assert [cell["images"] for cell in result["direct_share"]] == [images] * TINY_CONFIG.depth
    assert result["settings"].keys() == asdict(TINY_CONFIG).keys() - {"fallbacks"}

    in_all_tables = THREE_HEADS | MASK_BASELINES | {"mean", "untrained", "other_network"}
    assert result["matched"].keys() == in_all_tables | CANVAS_ROWS
    assert result["paper"].keys() == in_all_tables
    assert result["untrained"].keys() == CANVAS_ROWS
    assert result["matched"]["mean"].keys() == MASK_METRICS | EFFECT_METRICS | {"diversity"}
    assert result["matched"]["rollout"].keys() == MASK_METRICS | EFFECT_METRICS
    assert result["paper"]["mean"].keys() == MASK_METRICS | {"diversity"}
    assert result["untrained"]["rollout"].keys() == MASK_METRICS | EFFECT_METRICS
    json.dumps(result, allow_nan=False)

    # The test features are those of layout "paper", in which the features were classified.
    batches = evaluation_batches(TINY_CONFIG, DIGITS["test"], 16, "paper")
    observation = observe.observe({"trained": backbone}, batches)
    assert torch.equal(evaluation.features, observation.features["trained"])
    assert torch.equal(evaluation.labels, observation.labels)
    assert result["mean_cosine"] == metrics.mean_cosine(evaluation.features)


def test_the_rows_before_training_are_those_of_the_network_at_the_first_step(few_images):
    """Of a run that learned nothing they are those after training.

    Direct effects of the network before training are not measured.
    """
    untrained = backbone_of(config=TINY_CONFIG)
    result = evaluate.evaluate("a.pth", TINY_CONFIG, HISTORY, untrained, DIGITS).result
    for row in CANVAS_ROWS:
        cells = dict(result["matched"][row])
        of_untrained = dict(result["untrained"][row])
        assert cells.pop("direct_faithfulness")["value"] is not None
        assert of_untrained.pop("direct_faithfulness")["value"] is None
        assert of_untrained == cells, row
    assert result["untrained_features"] == result["features"]

    learned = backbone_of(seed=1, config=TINY_CONFIG)
    other_result = evaluate.evaluate("a.pth", TINY_CONFIG, HISTORY, learned, DIGITS).result
    assert other_result["untrained"] == result["untrained"]
    assert other_result["untrained_features"] == result["untrained_features"]
    assert other_result["matched"]["mean"] != result["matched"]["mean"]


def test_the_reliance_on_marks_by_hand(few_images):
    """A run with marks is measured on canvases with a mark each, and on the same without."""
    config = replace(TINY_CONFIG, shortcut=0.5)
    backbone = backbone_of(seed=1, config=config)
    result = evaluate.evaluate("a.pth", config, HISTORY, backbone, DIGITS).result
    marks = result["marks"]
    json.dumps(marks, allow_nan=False)
    assert marks == evaluate.measure_marks(TINY_CONFIG, backbone, DIGITS)
    untrained = evaluate.measure_marks(config, backbone_of(config=config), DIGITS)
    assert result["untrained_marks"] == untrained != marks
    assert result["description"].endswith(", shortcut 0.5, epoch 2 of 2")

    count = marks["reliance"]["images"]
    assert count == 16
    batches = list(views.marked_batches(config, DIGITS["test"], count))
    images = torch.cat([batch.images for batch in batches])
    with torch.no_grad():
        features = backbone(views.normalize(images))
        changed = backbone(views.normalize(torch.cat([batch.without_mark for batch in batches])))
    features = F.normalize(features, dim=-1).double().numpy()
    changed = F.normalize(changed, dim=-1).double().numpy()
    cosines = features @ features.T
    of_pairs = 1 - cosines[~np.eye(count, dtype=bool)].mean()
    effect = 1 - (features * changed).sum(1)
    assert marks["reliance"]["value"] == pytest.approx(effect.mean() / of_pairs, rel=1e-4)
    assert marks["reliance"]["low"] < marks["reliance"]["value"] < marks["reliance"]["high"]

    # the share of the attention on the mark, pixel by pixel, compared with its share of the area
    attention, _ = explain.cls_attention(backbone, images)
    pixels = attention.mean(1).view(count, 4, 4).repeat_interleave(7, 1).repeat_interleave(7, 2)
    mask = torch.cat([batch.mark for batch in batches])
    on_mark = (pixels * mask / 49).sum((1, 2)) / (mask.sum((1, 2)) / 28**2)
    assert marks["density"]["mean"]["value"] == pytest.approx(on_mark.mean().item(), rel=1e-4)
    assert marks["density"].keys() == {observe.row_of(name) for name in explain.NETWORK_MAPS}


def test_a_network_that_marks_do_not_move_does_not_rely_on_them(few_images):
    backbone = backbone_of(seed=1, config=TINY_CONFIG)
    with torch.no_grad():
        backbone.patch_embed.proj.weight.zero_()
    marks = evaluate.measure_marks(TINY_CONFIG, backbone, DIGITS)
    # All images have the same feature, so there is no scale either.
    assert marks["reliance"] == {"value": None, "low": None, "high": None, "images": 0}


@pytest.mark.parametrize("flags", ["", "--num-distractors 0", "--depth 1 --heads 1"])
def test_what_metrics_json_holds_of_weights_on_canvases(few_images, flags):
    """Nothing is known of how they were trained, so only settings of the images are given."""
    config = config_of(f"{TINY} {flags}")
    backbone = backbone_of(config=config)
    result = evaluate.evaluate("dino", config, None, backbone, DIGITS).result
    of_canvases = {"best_head", "causal_selectivity", "matched", "paper"}
    assert result.keys() == RESULT_KEYS | of_canvases
    assert result["epoch"] is None
    assert result["settings"].keys() == set(evaluate.SHOWN)
    assert "untrained" not in result["matched"]
    assert len(result["direct_share"]) == config.depth
    json.dumps(result, allow_nan=False)


def test_what_metrics_json_holds_of_a_run_on_photographs(few_images):
    backbone = backbone_of(seed=1, config=TINY_PHOTOS)
    arguments = ("a.pth", TINY_PHOTOS, HISTORY, backbone, photographs())
    result = evaluate.evaluate(*arguments).result
    assert result.keys() == RESULT_KEYS | {"photographs", "untrained", "untrained_features"}
    images = evaluate.direct_images(backbone, 16)
    in_between = [images] * (TINY_PHOTOS.depth - 2)
    assert [cell["images"] for cell in result["direct_share"]] == [16, *in_between, 16]
    assert result["photographs"].keys() == PHOTO_ROWS | THREE_HEADS | {"untrained"}
    assert result["untrained"].keys() == PHOTO_ROWS
    from_leaving_out = {"srg", "patch_faithfulness", "direct_faithfulness"}
    assert result["photographs"]["mean"].keys() == {"entropy", "diversity"} | from_leaving_out
    assert result["photographs"]["rollout"].keys() == from_leaving_out
    assert result["photographs"]["head_1"].keys() == {"entropy"}
    assert result["untrained"]["rollout"].keys() == from_leaving_out
    json.dumps(result, allow_nan=False)

    untrained = backbone_of(config=TINY_PHOTOS)
    arguments = ("a.pth", TINY_PHOTOS, None, untrained, photographs())
    of_untrained = evaluate.evaluate(*arguments).result
    for row in PHOTO_ROWS:
        assert result["untrained"][row] == of_untrained["photographs"][row], row
    assert result["untrained_features"] == of_untrained["features"]


def test_the_best_head_is_chosen_on_validation_canvases(sixty_images, monkeypatch):
    """Head 2 looks at the digits of the validation split, head 1 at those of the test split."""
    current = {}

    def remember_batches(config, split, *args, **kwargs):
        for batch in evaluation_batches(config, split, *args, **kwargs):
            current["batch"] = batch
            current["looking_head"] = 1 if split is DIGITS["validation"] else 0
            yield batch

    cls_attention = observe.cls_attention

    def attend(backbone, images):
        _, features = cls_attention(backbone, images)
        maps = torch.full((len(images), 3, PATCHES), 1 / PATCHES)
        maps[:, current["looking_head"]] = look_at_the_digit(current["batch"])[:, 0]
        return maps, features

    monkeypatch.setattr(evaluate, "evaluation_batches", remember_batches)
    monkeypatch.setattr(observe, "cls_attention", attend)
    evaluation = evaluate.evaluate("a.pth", CONFIG, None, backbone_of(), DIGITS)
    result = evaluation.result
    assert result["best_head"] == "head_2"
    for layout in ("matched", "paper"):
        assert result[layout]["head_1"]["selectivity"]["low"] > 2
        assert result[layout]["head_2"]["selectivity"]["value"] == pytest.approx(1, abs=1e-5)


def test_the_untrained_backbone_is_that_of_the_first_step(tmp_path, capsys):
    """With the weights that the run started from, if it started from any."""
    random = evaluate.untrained_backbone(CONFIG)
    assert torch.equal(random.pos_embed, backbone_of().pos_embed)
    path = tmp_path / "w.pth"
    torch.save(backbone_of(seed=1).state_dict(), path)
    config = replace(CONFIG, weights=str(path))
    start = evaluate.untrained_backbone(config).state_dict()
    for name, value in backbone_of(seed=1).state_dict().items():
        assert torch.equal(start[name], value), name

    path.unlink()
    assert evaluate.untrained_backbone(config) is None
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: the untrained network cannot be shown: {path}: no such")
    assert warning.count("\n") == 1


# ------------------------------------------------------------------ how many images there is time for


def network_of_depth(depth: int) -> VisionTransformer:
    return VisionTransformer(ViTShape(depth=depth, dim=96, heads=2, patch_size=7))


def test_trying_changes_on_canvases_takes_a_bearable_time():
    assert evaluate.effect_images(backbone_of(), 56) == 1000
    one_block = VisionTransformer(ViTShape(depth=1))
    assert evaluate.effect_images(one_block, 224) == 20
    assert evaluate.effect_images(one_block, 224, at_least=3) == 3
    # A deeper network has fewer, in proportion.
    counts = [evaluate.effect_images(network_of_depth(depth), 112) for depth in (1, 2, 4, 8)]
    assert counts[0] < 1000
    assert counts[1:] == pytest.approx([counts[0] / 2, counts[0] / 4, counts[0] / 8], abs=1)
    assert evaluate.effect_images(network_of_depth(100), 112) == 20


def test_canvases_take_a_pass_for_each_patch_and_other_images_what_is_said():
    network = network_of_depth(8)
    count = evaluate.effect_images(network, 112)
    assert 20 < count < 1000
    assert evaluate.effect_images(network, 112, passes=16 * 16) == count
    half_the_passes = evaluate.effect_images(network, 112, passes=16 * 16 // 2)
    assert half_the_passes == pytest.approx(2 * count, abs=1)


def test_a_gpu_has_time_for_more_canvases():
    paper_network = VisionTransformer(ViTShape())
    assert evaluate.effect_images(paper_network, 224) == 20
    with PretendedGPU():
        count = evaluate.effect_images(on_pretended_gpu(paper_network), 224)
    assert 100 < count < 300


def test_direct_effects_are_measured_on_fewer_images_of_deeper_networks():
    counts = [evaluate.direct_images(network_of_depth(depth), 100) for depth in range(1, 13)]
    assert counts[:2] == [100, 100]
    assert counts[2] < 100
    assert counts == sorted(counts, reverse=True)
    # With d blocks an image takes (d + 1) / 2 times as long; all images of two blocks take 150 times.
    for depth, count in enumerate(counts[1:], 2):
        passes = (depth + 1) / 2
        assert 150 - passes < count * passes <= 150, depth
    assert evaluate.direct_images(network_of_depth(12), 20) > 0
    assert evaluate.direct_images(network_of_depth(1), 7) == 7
    assert evaluate.direct_images(network_of_depth(2), 0) == 0


# -------------------------------------------------------------------------------------- validation


def observe_validation(backbone: VisionTransformer, seed: int):
    """What is observed in the validation of a run with this seed: of its images, of its bank."""
    networks = {"trained": backbone}
    images, bank_images = evaluate.validation_batches(replace(CONFIG, seed=seed), DIGITS)
    return observe.observe(networks, images), observe.observe(networks, bank_images)


def test_validation_measures_the_same_images_for_every_run(sixty_images):
    backbone = backbone_of()
    observation, bank = observe_validation(backbone, seed=0)
    line = evaluate.validate(observation, bank)
    assert line == evaluate.validate(*observe_validation(backbone, seed=1))

    table = evaluate.measure_attention(observation, resamples=0)
    assert line.keys() - {"images", "knn", "mean_cosine"} == table.keys()
    assert line["mean"].keys() == {"selectivity", "auroc", "pointing", "entropy", "diversity"}
    for row, cells in table.items():
        for name, value in line[row].items():
            assert value == cells[name]["value"], (row, name)

    assert line["images"] == 60
    assert torch.equal(observation.labels, DIGITS["validation"].labels[observation.index])
    assert torch.equal(bank.labels, DIGITS["train"].labels[bank.index])
    queries = observation.features["trained"]
    bank_features = bank.features["trained"]
    torch.testing.assert_close(bank_features.norm(dim=-1), torch.ones(60))
    predicted = metrics.knn_classify(bank_features, bank.labels, queries)
    accuracy = (predicted == observation.labels).double().mean().item()
    assert line["knn"] == pytest.approx(accuracy)
    assert line["mean_cosine"] == pytest.approx(metrics.mean_cosine(queries))


def test_validation_with_effects_says_which_maps_to_believe(sixty_images):
    backbone = backbone_of()
    observation, bank = observe_validation(backbone, seed=0)
    batches = left_out_batches(CONFIG, DIGITS["validation"], 3, "validation")
    effects = observe.observe_effects(backbone, batches)
    line = evaluate.validate(observation, bank, effects)
    assert line["mean"].keys() == set(evaluate.CURVES)
    table = evaluate.measure_attention(observation, effects, resamples=0)
    assert line["head_1"]["equal_ink"] == table["head_1"]["equal_ink"]["value"]
    assert line["head_1"]["equal_ink"] is not None
    assert line["uniform"]["patch_faithfulness"] == 0


def test_a_run_that_was_measured_is_not_measured_again(tmp_path, few_images):
    backbone = backbone_of(config=TINY_CONFIG)
    history = [{"epoch": 0, "step": 0, "validation": {"mean_cosine": 0.5}}]
    arguments = (TINY_CONFIG, history, backbone, DIGITS)
    path = str(tmp_path / "metrics.json")
    assert evaluate.measured_before(path, "a.pth", *arguments) is None  # no such file
    measured = evaluate.evaluate("a.pth", *arguments)
    evaluate.write_metrics([measured.result], path)
    again = evaluate.measured_before(path, "b.pth", *arguments)
    assert again.result == measured.result | {"checkpoint": "b.pth"}
    torch.testing.assert_close(again.features, measured.features)
    assert torch.equal(again.labels, measured.labels)

    # settings of other images, other weights, other digits, another version of the code
    other = replace(TINY_CONFIG, num_distractors=1)
    assert evaluate.measured_before(path, "a.pth", other, *arguments[1:]) is None
    fewer_digits = DIGITS | {"test": DIGITS["test"][torch.arange(100)]}
    assert evaluate.measured_before(path, "a.pth", *arguments[:3], fewer_digits) is None
    with torch.no_grad():
        backbone.norm.bias[0] += 1e-6
    assert evaluate.measured_before(path, "a.pth", *arguments) is None
    for content in ("", "[]", '{"fingerprint": 3}'):
        Path(path).write_text(content)
        assert evaluate.measured_before(path, "a.pth", *arguments) is None


def test_the_code_that_measures_is_part_of_the_fingerprint(monkeypatch):
    backbone = backbone_of(config=TINY_CONFIG)
    before = evaluate.fingerprint(TINY_CONFIG, backbone, DIGITS)
    assert evaluate.fingerprint(TINY_CONFIG, backbone, DIGITS) == before
    monkeypatch.setattr(evaluate, "MEASURING_MODULES", evaluate.MEASURING_MODULES[:-1])
    assert evaluate.fingerprint(TINY_CONFIG, backbone, DIGITS) != before


# ------------------------------------------------------------------------------ collapse, and words


def warning_after(epoch: int, validation: dict, loss: str = "nce", steps: int = 1000) -> str | None:
    """The collapse warning of a run whose log has epoch 0 and this line."""
    config = replace(CONFIG, loss=loss)
    assert config.warmup * config.epochs == 1.5
    untrained = {"epoch": 0, "validation": {"mean_cosine": 0.985}}
    last = {"epoch": epoch, "step": steps, "validation": validation}
    return evaluate.collapse_warning(config, [untrained, last])


def test_a_network_has_collapsed_if_its_features_point_one_way():
    direction = torch.randn(1, 9, generator=generator(0)).expand(50, 9)
    mean_cosine = metrics.mean_cosine(F.normalize(direction, dim=-1))
    assert "the network has collapsed" in warning_after(3, {"mean_cosine": mean_cosine})
    different = torch.randn(50, 9, generator=generator(1))
    mean_cosine = metrics.mean_cosine(F.normalize(different, dim=-1))
    assert warning_after(3, {"mean_cosine": mean_cosine}) is None
    # less than before training: it has begun to learn
    assert warning_after(3, {"mean_cosine": 0.984}) is None
    # the learning rate still rises
    assert warning_after(1, {"mean_cosine": 0.999}) is None
    # a few steps change little
    assert warning_after(3, {"mean_cosine": 0.999}, steps=49) is None
    assert warning_after(3, {"mean_cosine": 0.999}, steps=50) is not None
    # of a log of an earlier version
    assert warning_after(3, {}) is None


@pytest.mark.parametrize(
    "entropy_of_mean, mean_entropy, has_collapsed",
    [(1, 0.999, True), (0.001, 0, True), (0.95, 0.9, False), (1, 0, False)],
)
def test_a_teacher_has_collapsed_if_it_says_the_same_of_every_image(
    entropy_of_mean, mean_entropy, has_collapsed
):
    validation = {
        "mean_cosine": 0.5,
        "entropy_of_mean": entropy_of_mean,
        "mean_entropy": mean_entropy,
    }
    warning = warning_after(3, validation, loss="dino")
    if has_collapsed:
        assert "--centering sinkhorn_knopp" in warning
    else:
        assert warning is None


def test_a_line_describes_the_network():
    text = evaluate.describe(config_of("--preset laptop --digits mnist --epochs 9"), epoch=3)
    assert text == "NCE loss, same views, 2 crops, 56 px, patch 7, MNIST, epoch 3 of 9"
    flags = "--preset laptop --views different --loss dino --background texture"
    text = evaluate.describe(config_of(flags))
    assert text == "DINO loss, different views, 1 crop, 56 px, patch 7, background texture"
    config = config_of("--preset paper --dataset stl10 --weights dino")
    assert evaluate.describe(config, is_run=False) == "weights dino, 224 px, patch 8, STL-10"
    config = replace(config, weights="none")
    assert evaluate.describe(config, is_run=False) == "random weights, 224 px, patch 8, STL-10"


def test_metrics_json_holds_one_result_or_a_list_of_several(tmp_path):
    results = [{"checkpoint": "a.pth", "epoch": None}, {"checkpoint": "b.pth", "epoch": 2}]
    path = tmp_path / "metrics.json"
    for content, expected in ((results[:1], results[0]), (results, results)):
        evaluate.write_metrics(content, str(path))
        assert json.loads(path.read_text()) == expected
