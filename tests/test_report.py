"""Tables of networks whose attention is known, and the sentences that are printed about them."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from helpers import DIGITS, config_of

import explain
import metrics
import report
import vit
from explain import Effects, Observation
from settings import Config
from views import evaluation_batches, left_out_batches
from vit import VisionTransformer, ViTShape

PATCHES = 64  # of a canvas in the laptop preset
PATCH_SIZE = 7
PATCH_AREA = 49
CONFIG = config_of("--preset laptop --digits sklearn")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def backbone_of(seed: int = 0) -> VisionTransformer:
    return vit.build_network(replace(CONFIG, seed=seed)).backbone


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
    return report.measure_attention(
        observe_known_heads(heads_of_batch, count, layout), resamples=200
    )


def look_at_the_digit(batch):
    """Three heads that all look at the pixels of the digit."""
    pixels = metrics.patch_sums(batch.digit, PATCH_SIZE) + 1e-6
    maps = pixels / pixels.sum(-1, keepdim=True)
    return maps[:, None].expand(-1, 3, -1)


def observe_backbones(networks: dict, config=CONFIG, count: int = 20, effect_count: int = 10):
    """The Observation and the Effects of real networks."""
    batches = evaluation_batches(config, DIGITS["test"], count)
    observation = explain.observe(networks, batches, with_rollout=True)
    batches = left_out_batches(config, DIGITS["test"], effect_count)
    return observation, explain.observe_effects(networks["trained"], batches)


# --------------------------------------------------------------------------------------- the table


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
    assert "untrained" not in table
    assert "rollout" not in table


def test_brightness_also_lies_on_a_texture():
    config = replace(CONFIG, background="texture")
    observation = observe_known_heads(look_at_the_digit, count=100, config=config)
    table = report.measure_attention(observation, resamples=0)
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
    table = report.measure_attention(observation, resamples=200)
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


def test_heads_their_mean_and_another_network_have_rows_of_their_own():
    observation = observe_known_heads(
        lambda batch: torch.stack([map_on(0), map_on(9)]).expand(100, -1, -1), count=100
    )
    observation.attention["untrained"] = map_on(20).expand(100, 1, -1)
    observation.rollout = map_on(30).expand(100, -1)
    table = report.measure_attention(observation, resamples=0)

    # the digit density of a map that lies on a single patch, for each patch
    digit_share = observation.digit / observation.digit.sum(-1, keepdim=True)
    density = PATCHES * digit_share.mean(0)
    expected = {
        "head_1": density[0],
        "head_2": density[9],
        "mean": (density[0] + density[9]) / 2,
        "untrained": density[20],
        "rollout": density[30],
    }
    for row, value in expected.items():
        assert table[row]["digit_density"]["value"] == pytest.approx(value.item(), abs=1e-5)
        assert table[row]["digit_density"]["low"] is None  # nothing was resampled
    assert table["mean"]["diversity"]["value"] == pytest.approx(1)
    assert table["untrained"]["diversity"]["value"] is None  # it has one head


def test_selectivity_is_over_images_with_clutter():
    """Where the network looks on a canvas without clutter does not count."""
    digit = torch.zeros(2, PATCHES)
    digit[:, 0] = 49
    clutter = torch.zeros(2, PATCHES)
    clutter[0, 8] = 49
    observation = Observation(
        labels=torch.tensor([1, 1]),
        index=torch.tensor([0, 1]),
        features={},
        attention={"trained": torch.stack([torch.full((64,), 1 / 64), map_on(0)])[:, None]},
        patch_area=PATCH_AREA,
        digit=digit,
        clutter=clutter,
        intensity=digit + clutter,
    )
    cells = report.measure_attention(observation, resamples=10)["mean"]
    assert cells["selectivity"]["value"] == pytest.approx(1)
    assert cells["digit_density"]["value"] == pytest.approx((1 + 64) / 2)
    assert cells["selectivity"]["images"] == 1
    assert cells["auroc"]["images"] == 1
    assert cells["pointing"]["images"] == 2


def test_photographs_have_neither_masks_nor_baselines():
    observation = Observation(
        labels=torch.arange(5),
        index=torch.arange(5),
        features={},
        attention={"trained": torch.rand(5, 2, PATCHES, generator=generator(0)).softmax(-1)},
        patch_area=PATCH_AREA,
    )
    table = report.measure_attention(observation, resamples=10)
    assert table.keys() == {"mean", "head_1", "head_2"}
    assert table["mean"].keys() == {"entropy", "diversity"}
    assert table["head_1"].keys() == {"entropy"}


def test_two_metrics_compare_a_row_with_another_row():
    observation, effects = observe_backbones({"trained": backbone_of()}, count=100)
    table = report.measure_attention(observation, effects, resamples=50)
    mean = table["mean"]
    log_oracle = math.log(table["oracle"]["selectivity"]["value"])
    share = math.log(mean["selectivity"]["value"]) / log_oracle
    assert mean["of_oracle"]["value"] == pytest.approx(share)
    assert mean["of_oracle"]["images"] == mean["selectivity"]["images"]

    brightness = table["brightness"]
    difference = mean["patch_faithfulness"]["value"] - brightness["patch_faithfulness"]["value"]
    assert mean["patch_faithfulness_less_brightness"]["value"] == pytest.approx(difference)
    # The same resampled canvases are compared, so brightness is never above itself.
    assert brightness["patch_faithfulness_less_brightness"]["low"] == 0
    assert brightness["patch_faithfulness_less_brightness"]["high"] == 0


def test_effects_may_be_of_the_first_canvases_only():
    observation, effects = observe_backbones({"trained": backbone_of()}, count=20, effect_count=10)
    table = report.measure_attention(observation, effects, resamples=0)
    assert table["mean"]["patch_faithfulness"]["images"] == 10
    assert table["mean"]["entropy"]["images"] == 20
    maps = observation.attention["trained"].mean(1)[:10]
    expected = metrics.faithfulness(maps, effects)["patch_faithfulness"].mean().item()
    assert table["mean"]["patch_faithfulness"]["value"] == pytest.approx(expected, abs=1e-6)


def test_a_table_of_canvases_without_distractors_holds_no_nan():
    config = replace(CONFIG, num_distractors=0)
    observation, effects = observe_backbones({"trained": backbone_of()}, config, effect_count=20)
    table = report.measure_attention(observation, effects, resamples=20)
    assert table["mean"]["object_faithfulness"]["value"] is None
    assert table["mean"]["selectivity"]["value"] is None
    assert table["uniform"]["patch_faithfulness"]["value"] == 0
    assert table["mean"]["patch_faithfulness"]["images"] == 20
    json.dumps(table, allow_nan=False)


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
    cell = report.accuracy(bank, images.features["trained"], images)
    assert cell["value"] == pytest.approx(3 / 4)
    assert 0 <= cell["low"] < 3 / 4 < cell["high"] <= 1
    assert cell["images"] == 4


def test_accuracy_of_a_classifier_without_an_answer_is_none():
    bank = observation_of(unit_vectors([0.0, 1.0]), [3, 3])
    cell = report.accuracy(bank, bank.features["trained"], bank, classify=metrics.linear_probe)
    assert cell == {"value": None, "low": None, "high": None, "images": 0}


def test_what_effects_say_about_a_network():
    """Two canvases of one digit each, with two pieces of the digit and two distractors."""
    features = unit_vectors([0.0, 1.0])
    distances = torch.tensor([[0.2, 0.4, 0.1, 0.1], [0.3, 0.3, 0.2, 0.0]])
    canvas_ink = torch.tensor([[10, 20, 10, 5], [10, 30, 20, 40]])
    effects = Effects(
        labels=torch.tensor([0, 1]),
        index=torch.tensor([0, 1]),
        features=features,
        even_features=unit_vectors([0.5, 1.2]),
        swapped_features=features.flip(0),
        has_ink=torch.ones(2, 4, dtype=torch.bool),
        blackening=torch.zeros(2, 4),
        distances=distances,
        part_ink=torch.zeros(2, 4, 4),
        canvas_ink=canvas_ink,
    )
    result = report.measure_effects(effects, observation_of(features, [0, 1]))
    # distance for each pixel of ink, summed over the two canvases
    of_digit = (0.02 + 0.02) + (0.03 + 0.01)
    of_distractors = (0.01 + 0.02) + (0.01 + 0)
    assert result["causal_selectivity"]["value"] == pytest.approx(of_digit / of_distractors)

    matters = result["attention_matters"]
    assert matters["two_canvases"] == pytest.approx(math.cos(1), abs=1e-6)
    assert matters["features"]["cosine"]["value"] == pytest.approx(1)
    even_cosine = (math.cos(0.5) + math.cos(0.2)) / 2
    assert matters["even"]["cosine"]["value"] == pytest.approx(even_cosine)
    assert matters["swapped"]["cosine"]["value"] == pytest.approx(math.cos(1), abs=1e-6)
    assert matters["features"]["knn"]["value"] == 1
    assert matters["swapped"]["knn"]["value"] == 0


def test_token_effects_are_ratios_of_mean_effects():
    observation = observation_of(torch.zeros(2, 2), [0, 1])
    observation.token_effects = torch.tensor([[0.4, 0.2, 0.1], [0.2, 0.4, 0.3]])
    result = report.measure_token_effects(observation)
    assert result["mean"]["value"] == pytest.approx(0.6 / 0.4)
    assert result["rollout"]["value"] == pytest.approx(0.6 / 0.4)
    assert result["mean"]["low"] == pytest.approx(0.2 / 0.3)  # the second photograph twice
    assert result["mean"]["high"] == pytest.approx(4)
    assert result["rollout"]["high"] == pytest.approx(2)


# ---------------------------------------------------------------------------------- the evaluation


@pytest.fixture
def sixty_images(monkeypatch):
    for name in ("TEST_IMAGES", "BANK_IMAGES", "VALIDATION_IMAGES", "VALIDATION_BANK"):
        monkeypatch.setattr(report, name, 60)


def test_the_best_head_is_chosen_on_validation_canvases(sixty_images, monkeypatch):
    """Head 2 looks at the digits of the validation split, head 1 at those of the test split."""
    current = {}

    def remember_batches(config, split, *args, **kwargs):
        for batch in evaluation_batches(config, split, *args, **kwargs):
            current["batch"] = batch
            current["looking_head"] = 1 if split is DIGITS["validation"] else 0
            yield batch

    cls_attention = explain.cls_attention

    def attend(backbone, images):
        _, features = cls_attention(backbone, images)
        maps = torch.full((len(images), 3, PATCHES), 1 / PATCHES)
        maps[:, current["looking_head"]] = look_at_the_digit(current["batch"])[:, 0]
        return maps, features

    monkeypatch.setattr(report, "evaluation_batches", remember_batches)
    monkeypatch.setattr(explain, "cls_attention", attend)
    evaluation = report.evaluate("a.pth", CONFIG, None, backbone_of(), DIGITS)
    result = evaluation.result
    assert result["best_head"] == "head_2"
    for layout in ("matched", "paper"):
        assert result[layout]["head_1"]["selectivity"]["low"] > 2
        assert result[layout]["head_2"]["selectivity"]["value"] == pytest.approx(1, abs=1e-5)


def test_the_untrained_backbone_is_that_of_the_first_step(tmp_path, capsys):
    """With the weights that the run started from, if it started from any."""
    random = report.untrained_backbone(CONFIG)
    assert torch.equal(random.pos_embed, backbone_of().pos_embed)
    path = tmp_path / "w.pth"
    torch.save(backbone_of(seed=1).state_dict(), path)
    config = replace(CONFIG, weights=str(path))
    start = report.untrained_backbone(config).state_dict()
    for name, value in backbone_of(seed=1).state_dict().items():
        assert torch.equal(start[name], value), name

    path.unlink()
    assert report.untrained_backbone(config) is None
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: the untrained network cannot be shown: {path}: no such")
    assert warning.count("\n") == 1


def test_trying_changes_on_canvases_takes_a_bearable_time():
    assert report.effect_images(backbone_of(), 56) == 1000
    one_block = VisionTransformer(ViTShape(depth=1))
    assert report.effect_images(one_block, 224) == 20


def observe_validation(backbone: VisionTransformer, seed: int):
    """What is observed in the validation of a run with this seed: of its images, of its bank."""
    networks = {"trained": backbone}
    images, bank_images = report.validation_batches(replace(CONFIG, seed=seed), DIGITS)
    return explain.observe(networks, images), explain.observe(networks, bank_images)


def test_validation_measures_the_same_images_for_every_run(sixty_images):
    backbone = backbone_of()
    observation, bank = observe_validation(backbone, seed=0)
    line = report.validate(observation, bank)
    assert line == report.validate(*observe_validation(backbone, seed=1))

    table = report.measure_attention(observation, resamples=0)
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


def warning_after(epoch: int, validation: dict, loss: str = "nce") -> str | None:
    """The collapse warning of a run whose log has epoch 0 and this line."""
    config = replace(CONFIG, loss=loss)
    assert config.warmup * config.epochs == 1.5
    untrained = {"epoch": 0, "validation": {"mean_cosine": 0.985}}
    return report.collapse_warning(config, [untrained, {"epoch": epoch, "validation": validation}])


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


# ----------------------------------------------------------------------------------- the sentences


def cell(value, low, high) -> dict:
    return {"value": value, "low": low, "high": high, "images": 1000}


ABOVE_BRIGHTNESS = (1.9, 1.8, 2.0)  # a selectivity (value, low, high)
SAME_IN_ALL_ROWS = {
    "auroc": cell(0.25, 0.24, 0.26),
    "pointing": cell(0.25, 0.24, 0.26),
    "jaccard60": cell(0.25, 0.24, 0.26),
    "best_jaccard": cell(0.25, 0.24, 0.26),
    "entropy": cell(0.25, 0.24, 0.26),
    "diversity": cell(0.25, 0.24, 0.26),
    "of_oracle": cell(0.85, 0.84, 0.86),
    "patch_faithfulness": cell(0.85, 0.84, 0.86),
    "object_faithfulness": cell(0.85, 0.84, 0.86),
    "patch_faithfulness_less_brightness": cell(0.1, 0.05, 0.15),
    "digit_density": cell(12.345, 11.345, 13.345),
    "clutter_density": cell(12.345, 11.345, 13.345),
    "background_density": cell(12.345, 11.345, 13.345),
    "far_background_density": cell(1.234, 1.134, 1.334),
}


def result_of(mean, best=None, shuffled=(1.0, 0.9, 1.1), heads: int = 2) -> dict:
    """A result of `evaluate` with these selectivities (value, low, high); head 2 is the best."""
    selectivities = {"mean": mean}
    for number in range(1, heads + 1):
        selectivities[f"head_{number}"] = mean
    selectivities |= {
        "head_2": best or mean,
        "rollout": (1.3, 1.2, 1.4),
        "brightness": (1.3, 1.2, 1.4),
        "ink": (1, 1, 1),
        "oracle": (8, 7, 9),
        "shuffled": shuffled,
        "uniform": (1, 1, 1),
        "untrained": (1.1, 1, 1.2),
    }
    table = {
        row: {"selectivity": cell(*selectivity)} | SAME_IN_ALL_ROWS
        for row, selectivity in selectivities.items()
    }
    accuracies = {"knn": cell(0.434, 0.4, 0.5), "linear_probe": cell(0.434, 0.4, 0.5)}
    even = {"cosine": cell(0.123, 0.1, 0.2), "knn": cell(0.1, 0.0, 0.2)}
    return {
        "checkpoint": "run/ckpt.pth",
        "description": report.describe(CONFIG, epoch=2),
        "epoch": 2,
        "collapse": None,
        "settings": asdict(CONFIG),
        "fallbacks": [],
        "best_head": "head_2",
        "matched": table,
        "paper": table,
        "features": accuracies,
        "untrained_features": accuracies,
        "causal_selectivity": cell(2.34, 2.2, 2.5),
        "attention_matters": {"two_canvases": 0.456, "even": even},
        "mean_cosine": 0.3,
    }


def photographs_result() -> dict:
    result = result_of(ABOVE_BRIGHTNESS)
    for name in ("matched", "paper", "best_head", "causal_selectivity", "attention_matters"):
        del result[name]
    entropy = {"entropy": cell(0.25, 0.24, 0.26)}
    result["photographs"] = {"mean": entropy, "head_1": entropy}
    result["token_effect"] = {"mean": cell(1.5, 1.4, 1.6), "rollout": cell(2.5, 2.4, 2.6)}
    return result


@pytest.mark.parametrize(
    "mean, answer",
    [
        (ABOVE_BRIGHTNESS, "At the digit. Attention is 1.90 times as dense on the digit"),
        # its interval touches that of brightness
        ((1.5, 1.35, 1.6), "At anything bright: attention is not clearly more selective than"),
        (
            (1.0, 0.95, 1.05),
            "Attention is not clearly more selective than position alone explains.",
        ),
        ((0.8, 0.7, 0.9), "At the clutter more than at the digit. Attention is 0.80 times"),
        ((None, None, None), "This cannot be told: no canvas has both a digit and clutter."),
    ],
)
def test_the_verdict_in_plain_words(mean, answer):
    text = report.verdict(result_of(mean))
    assert text.startswith(f"Does it look at the digit, or just at anything bright? {answer}")
    assert "But head" not in text
    if mean[0] is not None:
        assert "as dense on the digit as on the clutter; brightness alone would give 1.30." in text


def test_the_verdict_names_a_head_that_looks_at_the_digit_although_their_mean_does_not():
    text = report.verdict(result_of((1.2, 1.15, 1.25), best=(2.0, 1.9, 2.1)))
    assert text.endswith("But head 2 on its own does look at the digit: 2.00 [1.90, 2.10].")
    text = report.verdict(result_of(ABOVE_BRIGHTNESS, best=(2.0, 1.9, 2.1)))
    assert "But head" not in text


@pytest.mark.parametrize("mean", [(0.8, 0.7, 0.9), ABOVE_BRIGHTNESS])
def test_the_verdict_on_attention_that_avoids_the_ink(mean):
    """However it divides what little it gives to the ink."""
    result = result_of(mean)
    result["matched"]["mean"]["digit_density"] = cell(0.3, 0.2, 0.4)
    text = report.verdict(result)
    assert "At neither: attention avoids the ink; it is 0.30 times as dense on the digit" in text


def test_the_verdict_requires_more_than_position_explains():
    # above brightness, but not above the maps of other images
    text = report.verdict(result_of(ABOVE_BRIGHTNESS, shuffled=(1.8, 1.7, 1.9)))
    assert "Attention is not clearly more selective than position alone explains." in text


def test_the_verdict_says_if_auroc_does_not_agree():
    result = result_of(ABOVE_BRIGHTNESS)
    disagreement = "By auroc, which compares ranks only, it is not above brightness."
    assert disagreement in report.verdict(result)
    result["matched"]["mean"]["auroc"] = cell(0.7, 0.69, 0.71)
    assert disagreement not in report.verdict(result)


def test_intervals_are_compared_as_they_are_printed():
    table = result_of((1.004, 1.0041, 1.005), shuffled=(1.001, 0.999, 1.0039))["matched"]
    assert not report.is_above(table, "mean", "shuffled")  # both are printed as 1.00
    table = result_of((1.02, 1.01, 1.03), shuffled=(0.95, 0.9, 1.0))["matched"]
    assert report.is_above(table, "mean", "shuffled")
    table = result_of((None, None, None))["matched"]
    assert not report.is_above(table, "mean", "shuffled")


def test_the_verdict_on_a_network_that_has_collapsed():
    collapse = warning_after(3, {"mean_cosine": 0.999})
    text = report.verdict(result_of(ABOVE_BRIGHTNESS) | {"collapse": collapse})
    assert "At neither. The network has collapsed" in text
    assert "At the digit" not in text


def test_the_verdict_on_photographs():
    result = photographs_result()
    text = "These are photographs: there are no masks to measure attention against."
    assert report.verdict(result) == text
    result["collapse"] = "the network has collapsed"
    assert report.verdict(result) == f"{text} The network has collapsed."


@pytest.mark.parametrize(
    "difference, comparison",
    [
        (cell(0.1, 0.05, 0.15), "better than"),
        (cell(-0.1, -0.15, -0.05), "less well than"),
        (cell(0.01, -0.05, 0.05), "about as well as"),
        (cell(None, None, None), "about as well as"),
    ],
)
def test_attention_is_compared_with_brightness_on_the_same_canvases(difference, comparison):
    result = result_of(ABOVE_BRIGHTNESS)
    result["matched"]["mean"]["patch_faithfulness_less_brightness"] = difference
    text = report.explanation(result)
    assert f"attention predicts which patches matter {comparison} brightness does" in text
    assert "is 0.85 [0.84, 0.86] for attention, 0.85 [0.84, 0.86] for brightness" in text
    assert "(1,000 canvases)" in text
    assert "moves the feature 2.34 [2.20, 2.50] times as far" in text
    assert "is 0.12 (two different canvases: 0.46), and k-NN accuracy is 10.0%." in text


def test_the_explanation_of_photographs():
    text = report.explanation(photographs_result())
    assert "changes the feature 1.50 [1.40, 1.60] times as much as removing a random 20%" in text
    assert "with rollout in place of attention it is 2.50 [2.40, 2.60] times." in text


def test_a_line_describes_the_network():
    text = report.describe(config_of("--preset laptop --digits mnist --epochs 9"), epoch=3)
    assert text == "NCE loss, same views, 2 crops, 56 px, patch 7, MNIST, epoch 3 of 9"
    flags = "--preset laptop --views different --loss dino --background texture"
    text = report.describe(config_of(flags))
    assert text == (
        "DINO loss, different views, 1 crop, 56 px, patch 7, digits, background texture"
    )
    config = config_of("--preset paper --dataset stl10 --weights dino")
    assert report.describe(config, is_run=False) == "weights dino, 224 px, patch 8, STL-10"
    config = replace(config, weights="none")
    assert report.describe(config, is_run=False) == "random weights, 224 px, patch 8, STL-10"


def test_a_line_of_an_epoch_is_printed():
    validation = {"mean": {"selectivity": 1.234}, "mean_cosine": 0.5}
    line = {
        "epoch": 2,
        "loss": 3.21,
        "seconds": 90,
        "images_per_second": 70.4,
        "validation": validation,
    }
    config = replace(CONFIG, epochs=10)
    assert report.epoch_text(config, line) == (
        "epoch 2/10: loss 3.210, selectivity 1.23, mean cosine 0.50, 70 images/s, 12.0 minutes left"
    )
    validation["mean"] = {}  # of photographs
    validation |= {"mean_entropy": 0.75, "entropy_of_mean": 1.0}
    assert report.epoch_text(replace(config, loss="dino"), line) == (
        "epoch 2/10: loss 3.210, mean cosine 0.50, teacher's mean entropy 0.75 ln K, "
        "entropy of its mean 1.00 ln K, 70 images/s, 12.0 minutes left"
    )


# ---------------------------------------------------------------------------------- the whole text


def lines_of(results: list[dict]) -> list[str]:
    """The lines of the report; none is wider than a page, except the one that names the file."""
    *lines, last = report.format_report(results, "folder/metrics.json").splitlines()
    assert max(map(len, lines)) <= 100
    assert "folder/metrics.json" in last
    return lines


@pytest.mark.parametrize("heads", [2, 12])  # DINO's largest network has 12
def test_the_report_is_short_and_begins_with_the_verdict(heads):
    result = result_of(ABOVE_BRIGHTNESS, heads=heads)
    # the widest cell that can be
    result["matched"]["head_1"]["patch_faithfulness"] = cell(-0.4, -0.41, -0.38)
    lines = lines_of([result])
    text = "\n".join(lines)
    assert len(lines) <= 27 + heads
    assert text.index("or just at anything bright? At the digit.") < text.index("selectivity  ")
    assert "-0.40 [-0.41, -0.38] " in text
    assert text.count("k-NN 43.4%, linear probe 43.4%") == 2  # of trained and untrained features
    assert "attention to 1,000 test images, canvases in the matched layout" in text

    (mean,) = [line.split() for line in lines if line.startswith("mean ")]
    expected = "mean 1.90 [1.80, 2.00] 0.85 0.25 0.85 [0.84, 0.86] 0.85 12.35 12.35 1.23"
    assert mean == expected.split()
    for row in ("head 2 (best)", "brightness", "shuffled", "untrained"):
        assert any(line.startswith(row) for line in lines), row
    for row in ("oracle", "uniform"):
        assert not any(line.startswith(row) for line in lines), row


def test_the_report_on_photographs():
    lines = lines_of([photographs_result()])
    assert "attention to 1,000 test images, photographs [95% interval]" in lines
    (mean,) = [line.split() for line in lines if line.startswith("mean ")]
    assert mean == ["mean", *"––––––––"]


def test_an_accuracy_that_cannot_be_had_is_a_dash():
    result = photographs_result()
    result["features"] = {"knn": cell(0.5, 0.4, 0.6), "linear_probe": cell(None, None, None)}
    assert "accuracy of features: k-NN 50.0%, linear probe –" in lines_of([result])


def test_several_networks_share_a_table():
    first = result_of((1.9, 1.8, 2.0))
    second = result_of((1.2, 1.1, 1.3))
    lines = lines_of([first, second])
    for row in ("[1] mean", "[1] head 2 (best)", "[1] brightness", "[2] mean", "[2] brightness"):
        assert sum(line.startswith(row) for line in lines) == 1, row
    text = "\n".join(lines)
    assert "[1] shuffled" not in text
    assert text.count("selectivity  ") == 1
    assert text.count("Does it look at the digit") == 2
    assert "The networks differ" not in text
    second["settings"] = first["settings"] | {"image_size": 28, "digits": "mnist"}
    text = "\n".join(lines_of([first, second]))
    assert "The networks differ in image_size, digits; each is measured on its own images." in text


def test_the_name_of_the_best_of_many_heads_does_not_touch_its_numbers():
    results = [result_of(ABOVE_BRIGHTNESS, heads=12) | {"best_head": "head_12"}] * 2
    assert any(line.startswith("[2] head 12 (best) 1.90 [") for line in lines_of(results))


def test_metrics_json_holds_one_result_or_a_list_of_several(tmp_path):
    results = [result_of((1.9, 1.8, 2.0)), result_of((1.2, 1.1, 1.3))]
    path = tmp_path / "metrics.json"
    for content, expected in ((results[:1], results[0]), (results, results)):
        report.write_metrics(content, str(path))
        assert json.loads(path.read_text()) == json.loads(json.dumps(expected))
