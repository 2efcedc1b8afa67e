"""What is printed about networks: the sentences, a line of an epoch, and the table."""

from dataclasses import asdict, replace

import pytest
from helpers import DIGITS, TINY, config_of

import evaluate
import report
import vit
from observe import row_of

CONFIG = config_of("--preset laptop --digits sklearn")
SQUARED_GRADIENT = "squared_gradient"


def cell(value, low=None, high=None) -> dict:
    return {"value": value, "low": low, "high": high, "images": 1000}


def around(value: float | None) -> dict:
    """A cell whose interval reaches 0.02 to either side, or a cell without a value."""
    if value is None:
        return cell(None)
    return cell(value, value - 0.02, value + 0.02)


NOTHING = (None, None, None)
ABOVE_BRIGHTNESS = (1.9, 1.8, 2.0)  # a selectivity (value, low, high)
HIGH_AUROC = cell(0.7, 0.69, 0.71)  # above that of brightness in `SAME_IN_ALL_ROWS`
EQUAL_INK = {
    "mean": 0.55,
    "rollout": 0.6,
    "norm_rollout": 0.65,
    "squared_gradient": 0.75,
    "brightness": 0.51,
    "random": 0.49,
}
SRG = {
    "mean": 0.1,
    "rollout": 0.15,
    "norm_rollout": 0.2,
    "squared_gradient": 0.3,
    "contrast": 0.12,
    "centre": 0.05,
    "random": 0.0,
}
SAME_IN_ALL_ROWS = {
    "auroc": cell(0.25, 0.24, 0.26),
    "pointing": cell(0.25, 0.24, 0.26),
    "jaccard60": cell(0.25, 0.24, 0.26),
    "best_jaccard": cell(0.25, 0.24, 0.26),
    "entropy": cell(0.25, 0.24, 0.26),
    "diversity": cell(0.25, 0.24, 0.26),
    "of_oracle": cell(0.85, 0.84, 0.86),
    "patch_faithfulness": cell(0.85, 0.84, 0.86),
    "object_faithfulness": cell(0.45, 0.44, 0.46),
    "direct_faithfulness": cell(0.35, 0.34, 0.36),
    "digit_density": cell(12.345, 11.345, 13.345),
    "clutter_density": cell(12.345, 11.345, 13.345),
    "background_density": cell(12.345, 11.345, 13.345),
    "far_background_density": cell(1.234, 1.134, 1.334),
}


def result_of(
    mean=ABOVE_BRIGHTNESS, best=None, shuffled=(1.0, 0.9, 1.1), heads: int = 2, equal_ink=EQUAL_INK
) -> dict:
    """A result of `evaluate` with these selectivities (value, low, high); head 2 is the best.

    `equal_ink` is a value for rows, around which intervals reach 0.02; it is 0.4 for other rows.
    """
    selectivities = {"mean": mean}
    for number in range(1, heads + 1):
        selectivities[f"head_{number}"] = mean
    selectivities |= {
        "head_2": best or mean,
        "rollout": (1.3, 1.2, 1.4),
        "norm_rollout": (1.3, 1.2, 1.4),
        "squared_gradient": (1.3, 1.2, 1.4),
        "random": (1, 1, 1),
        "brightness": (1.3, 1.2, 1.4),
        "ink": (1, 1, 1),
        "oracle": (8, 7, 9),
        "shuffled": shuffled,
        "uniform": (1, 1, 1),
        "untrained": (1.1, 1, 1.2),
    }
    table = {
        row: SAME_IN_ALL_ROWS
        | {"selectivity": cell(*selectivity), "equal_ink": around(equal_ink.get(row, 0.4))}
        for row, selectivity in selectivities.items()
    }
    accuracies = {"knn": cell(0.434, 0.4, 0.5), "linear_probe": cell(0.434, 0.4, 0.5)}
    return {
        "checkpoint": "run/ckpt.pth",
        "description": evaluate.describe(CONFIG, epoch=2),
        "epoch": 2,
        "collapse": None,
        "settings": asdict(CONFIG),
        "fallbacks": [],
        "best_head": "head_2",
        "matched": table,
        "paper": {},  # nothing is said of this layout
        "untrained": {row_of(name): table[row_of(name)] for name in evaluate.CANVAS_MAPS},
        "features": accuracies,
        "untrained_features": accuracies,
        "causal_selectivity": cell(2.34, 2.2, 2.5),
        "direct_share": [around(1.0), around(0.5), around(0.2)],
        "mean_cosine": 0.3,
    }


def photographs_result(srg=SRG) -> dict:
    """The same of a network on photographs, with these values of SRG."""
    result = result_of()
    for name in ("matched", "paper", "best_head", "causal_selectivity"):
        del result[name]
    correlations = {
        "patch_faithfulness": cell(0.45, 0.44, 0.46),
        "direct_faithfulness": cell(0.35, 0.34, 0.36),
    }
    spread = {"entropy": cell(0.25, 0.24, 0.26)}
    table = {"mean": spread, "head_1": spread, "head_2": spread}
    for row, value in srg.items():
        table[row] = table.get(row, {}) | {"srg": around(value)} | correlations
    result["photographs"] = table | {"untrained": spread}
    result["untrained"] = {row: table[row] for row in srg}
    return result


def picture_result(srg=SRG) -> dict:
    """What is said of a network's maps of somebody's pictures, see `evaluate.measure_pictures`."""
    result = photographs_result(srg)
    names = ("checkpoint", "description", "collapse", "direct_share")
    table = {row: result["photographs"][row] for row in srg}
    return {name: result[name] for name in names} | {"photographs": table}


# ------------------------------------------------------------------------------ where does it look?


@pytest.mark.parametrize(
    "mean, answer",
    [
        (ABOVE_BRIGHTNESS, "At the digit: attention is 1.90 [1.80, 2.00]"),
        # its interval touches that of brightness
        ((1.5, 1.35, 1.6), "At anything bright: attention is 1.50 [1.35, 1.60]"),
        ((1.0, 0.95, 1.05), "Not clearly at the digit: attention is 1.00 [0.95, 1.05]"),
        ((0.8, 0.7, 0.9), "At the clutter more than at the digit: attention is 0.80 [0.70, 0.90]"),
    ],
)
def test_the_verdict_in_plain_words(mean, answer):
    result = result_of(mean)
    result["matched"]["mean"]["auroc"] = HIGH_AUROC
    numbers = "times as dense on the digit as on the clutter (brightness: 1.30)"
    end = "; position alone may explain this." if "Not clearly" in answer else "."
    assert report.verdict(result) == f"Where does it look? {answer} {numbers}{end}"


def test_the_verdict_without_canvases_that_have_both_a_digit_and_clutter():
    assert report.verdict(result_of(NOTHING)) == (
        "Where does it look? This cannot be told: no canvas has both a digit and clutter."
    )


def test_the_verdict_names_a_head_that_looks_at_the_digit_although_their_mean_does_not():
    text = report.verdict(result_of((1.2, 1.15, 1.25), best=(2.0, 1.9, 2.1)))
    assert text.endswith("Head 2 alone: 2.00 [1.90, 2.10].")
    text = report.verdict(result_of(ABOVE_BRIGHTNESS, best=(2.0, 1.9, 2.1)))
    assert "Head 2" not in text
    # above brightness, but not above the network's maps of other images
    result = result_of((1.2, 1.15, 1.25), best=(2.0, 1.9, 2.1), shuffled=(1.9, 1.8, 2.0))
    assert "Head 2" not in report.verdict(result)


@pytest.mark.parametrize("mean", [(0.8, 0.7, 0.9), ABOVE_BRIGHTNESS])
def test_the_verdict_on_attention_that_avoids_the_ink(mean):
    """However it divides what little it gives to the ink."""
    result = result_of(mean)
    result["matched"]["mean"]["digit_density"] = cell(0.3, 0.2, 0.4)
    result["matched"]["mean"]["clutter_density"] = cell(0.3, 0.2, 0.4)
    text = report.verdict(result)
    answer = "Neither at digit nor at clutter: attention avoids the ink; it is 0.30 times as dense"
    assert text.startswith(f"Where does it look? {answer} on the digit as on the whole image.")


def test_attention_to_the_clutter_alone_does_not_avoid_the_ink():
    result = result_of((0.4, 0.3, 0.5))
    result["matched"]["mean"]["digit_density"] = cell(0.8, 0.7, 0.9)
    result["matched"]["mean"]["clutter_density"] = cell(2.0, 1.9, 2.1)
    text = report.verdict(result)
    assert text.startswith("Where does it look? At the clutter more than at the digit:")


def test_the_verdict_requires_more_than_position_explains():
    # above brightness, but not above the maps of other images
    text = report.verdict(result_of(ABOVE_BRIGHTNESS, shuffled=(1.8, 1.7, 1.9)))
    assert text.startswith("Where does it look? Not clearly at the digit: attention is 1.90")
    assert text.endswith("position alone may explain this.")


def test_attention_above_brightness_by_selectivity_alone_looks_at_parts_of_the_digit():
    """Auroc, which compares ranks of pixels, does not agree."""
    result = result_of(ABOVE_BRIGHTNESS, best=(2.0, 1.9, 2.1))
    assert report.verdict(result) == (
        "Where does it look? At parts of the digit: attention is 1.90 [1.80, 2.00] times as dense "
        "on the digit as on the clutter (brightness: 1.30), but brightness ranks the digit's "
        "pixels as high."
    )
    result["matched"]["mean"]["auroc"] = HIGH_AUROC
    text = report.verdict(result)
    assert text.startswith("Where does it look? At the digit: attention is 1.90")
    assert "ranks" not in text


def test_intervals_are_compared_as_they_are_printed():
    table = result_of((1.004, 1.0041, 1.005), shuffled=(1.001, 0.999, 1.0039))["matched"]
    assert not report.is_above(table, "mean", "shuffled")  # both are printed as 1.00
    table = result_of((1.02, 1.01, 1.03), shuffled=(0.95, 0.9, 1.0))["matched"]
    assert report.is_above(table, "mean", "shuffled")
    table = result_of(NOTHING)["matched"]
    assert not report.is_above(table, "mean", "shuffled")


COLLAPSE = "the network has collapsed: all images look alike to it; use a lower --lr"


def test_the_verdict_on_a_network_that_has_collapsed():
    text = report.verdict(result_of() | {"collapse": COLLAPSE})
    assert text == (
        "Where does it look? Neither at digit nor at clutter. The network has collapsed: all "
        "images look alike to it; use a lower --lr."
    )


def test_the_verdict_on_photographs():
    result = photographs_result()
    text = "Where does it look? These are photographs: there are no masks to measure it against."
    assert report.verdict(result) == text
    result["collapse"] = "the network has collapsed"
    assert report.verdict(result) == f"{text} The network has collapsed."


# --------------------------------------------------------------------------- which map to believe?


def test_maps_are_in_the_order_of_what_they_know():
    table = result_of()["matched"]
    rows = ["squared_gradient", "norm_rollout", "rollout", "mean"]
    assert report.maps_in_order(table) == rows
    # Other rows may be asked for; those that are missing, or have no value, are left out.
    assert report.maps_in_order(table, ("random", "brightness")) == ["brightness", "random"]
    assert report.maps_in_order(table, ("mean", "no_such_row")) == ["mean"]
    table["norm_rollout"] = SAME_IN_ALL_ROWS | {"equal_ink": around(None)}
    assert report.maps_in_order(table) == ["squared_gradient", "rollout", "mean"]


def test_maps_of_photographs_are_compared_by_srg():
    table = photographs_result()["photographs"]
    assert report.maps_in_order(table) == ["squared_gradient", "norm_rollout", "rollout", "mean"]
    assert report.maps_in_order(table, report.PHOTO_CONTROLS) == ["contrast", "centre", "random"]
    # A head has no SRG.
    assert report.maps_in_order(table, ("head_1", "mean")) == ["mean"]


def test_the_best_map_is_a_map_of_the_network():
    """Not a head, nor what knows nothing of the network, however high it is."""
    result = result_of(equal_ink=EQUAL_INK | {"brightness": 0.9, "head_1": 0.95, "oracle": 1.0})
    assert report.best_map(result) == "squared_gradient"
    assert report.best_map(result_of(equal_ink=EQUAL_INK | {"mean": 0.8})) == "mean"
    assert report.best_map(photographs_result()) == "squared_gradient"
    assert report.best_map(photographs_result(SRG | {"centre": 0.9, "rollout": 0.4})) == "rollout"
    assert report.best_map(picture_result(SRG | {"norm_rollout": 0.4})) == "norm_rollout"


def test_there_is_no_best_map_if_no_map_has_a_value():
    assert report.best_map(result_of(equal_ink=dict.fromkeys(EQUAL_INK))) is None
    assert report.best_map(photographs_result(dict.fromkeys(SRG))) is None


QUESTION = "Which map should you believe?"
FINDING = "of two patches with equal ink it picks the one that matters more"
HARDLY = "hardly describes even what passes straight into the last block, 20% of the effects."
ATTENTION = f"Attention (55%) {HARDLY}"


def test_all_that_is_said_about_which_map_to_believe():
    assert report.belief(result_of()) == (
        f"{QUESTION} Squared gradient: {FINDING} 75% of the time. Norm rollout (65%) is next and "
        f"costs one forward pass. {ATTENTION}"
    )


@pytest.mark.parametrize(
    "equal_ink, best, advice",
    [
        ({"norm_rollout": 0.73}, "Squared gradient", "Norm rollout (73%) is nearly as good and"),
        ({"norm_rollout": 0.71}, "Squared gradient", "Norm rollout (71%) is next and"),
        ({"norm_rollout": 0.76}, "Norm rollout", "It"),
        ({"rollout": 0.76}, "Rollout", "It"),
    ],
)
def test_a_cheap_map_is_named_beside_the_best_one(equal_ink, best, advice):
    text = report.belief(result_of(equal_ink=EQUAL_INK | equal_ink))
    assert text.startswith(f"{QUESTION} {best}: {FINDING} 7")
    assert text.endswith(f"% of the time. {advice} costs one forward pass. {ATTENTION}")


def test_the_value_of_attention_is_said_once():
    """It may be the best map, or the cheap one beside the best."""
    text = report.belief(result_of(equal_ink=EQUAL_INK | {"mean": 0.76}))
    assert text == (
        f"{QUESTION} Attention: {FINDING} 76% of the time. It costs one forward pass. Attention "
        f"{HARDLY}"
    )
    text = report.belief(result_of(equal_ink=EQUAL_INK | {"mean": 0.735}))
    sentence = "Attention (74%) is nearly as good and costs one forward pass."
    assert text.endswith(f"{sentence} Attention {HARDLY}")


@pytest.mark.parametrize("low, is_better", [(0.51, True), (0.5, False), (0.45, False)])
def test_the_best_map_must_be_better_than_chance(low, is_better):
    result = result_of()
    result["matched"][SQUARED_GRADIENT]["equal_ink"] = cell(0.75, low, 0.95)
    result["matched"]["brightness"]["equal_ink"] = cell(0.4, 0.35, 0.45)
    text = report.belief(result)
    if is_better:
        assert text.startswith(f"{QUESTION} Squared gradient: {FINDING} 75% of the time.")
    else:
        assert text == (
            f"{QUESTION} None clearly: squared gradient is the best, and {FINDING} 75% of the "
            f"time, not clearly more than by chance. {ATTENTION}"
        )


def test_the_best_map_must_be_better_than_brightness():
    text = report.belief(result_of(equal_ink=EQUAL_INK | {"brightness": 0.72}))
    assert text == (
        f"{QUESTION} None clearly: squared gradient is the best, and {FINDING} 75% of the time, "
        f"but brightness (72%) is not clearly worse. {ATTENTION}"
    )
    text = report.belief(result_of(equal_ink=EQUAL_INK | {"brightness": 0.7}))
    assert "None clearly" not in text


def test_too_few_canvases_for_an_interval():
    result = result_of()
    result["matched"][SQUARED_GRADIENT]["equal_ink"] = cell(0.75)
    text = report.belief(result)
    assert text == f"{QUESTION} There are too few canvases to tell."


def test_without_pairs_of_patches_no_map_is_advised():
    result = result_of(equal_ink=dict.fromkeys([*EQUAL_INK, "head_1", "head_2"]))
    assert report.belief(result) == (
        "Which map should you believe? This cannot be told: there are no two patches to compare."
    )
    result = photographs_result(dict.fromkeys(SRG))
    assert "This cannot be told: there are no two patches" in report.belief(result)


@pytest.mark.parametrize("result", [result_of(), photographs_result(), result_of(NOTHING)])
def test_no_map_of_a_network_that_has_collapsed_is_advised(result):
    assert report.belief(result | {"collapse": COLLAPSE}) == (
        "Which map should you believe? None: the network gives all images nearly the same feature."
    )


def test_the_share_that_attention_can_see():
    """Of a single block it sees all; if nothing has an effect there is no share."""
    result = result_of()
    result["direct_share"] = [around(1.0)]
    text = report.belief(result)
    sentence = "The network has a single block, so all effects pass straight into it."
    assert text.endswith(f"forward pass. {sentence}")

    result["direct_share"] = [cell(None), cell(None)]
    assert report.belief(result) == f"{QUESTION} None: no patch has any effect."
    assert report.best_map(result) is None

    result["direct_share"] = [around(1.0), cell(0.876)]
    result["matched"]["mean"] = result["matched"]["mean"] | {"direct_faithfulness": cell(None)}
    text = report.belief(result)
    assert text.endswith(
        "Attention (55%) hardly describes even what passes straight into the last block, 88% of "
        "the effects."
    )
    result["matched"]["mean"] = result["matched"]["mean"] | {"direct_faithfulness": cell(0.95)}
    text = report.belief(result)
    assert text.endswith(
        "Attention (55%) describes only what passes straight into the last block, 88% of the "
        "effects."
    )


@pytest.mark.parametrize("result", [photographs_result(), picture_result()])
def test_maps_of_photographs_that_are_better_than_the_controls(result):
    assert report.belief(result) == (
        f"{QUESTION} Squared gradient: if patches are left out in its order, the feature moves "
        f"soonest (SRG 0.30), sooner than in that of contrast, which knows nothing of the network "
        f"(0.12). Norm rollout (0.20) is next and costs one forward pass. Attention (0.10) {HARDLY}"
    )


def test_maps_of_photographs_that_are_not_clearly_better_than_the_best_control():
    text = report.belief(photographs_result(SRG | {"centre": 0.27}))
    assert text == (
        f"{QUESTION} None clearly: squared gradient is the best (SRG 0.30), but not clearly better "
        f"than centre, which knows nothing of the network (0.27). Attention (0.10) {HARDLY}"
    )
    # of a single picture, without an interval
    result = picture_result()
    result["photographs"][SQUARED_GRADIENT]["srg"] = cell(0.9)
    text = report.belief(result)
    assert text == f"{QUESTION} These are too few pictures to tell."


def test_a_cheap_map_of_photographs_that_is_nearly_as_good():
    text = report.belief(photographs_result(SRG | {"rollout": 0.28}))
    assert "(0.12). Rollout (0.28) is nearly as good and costs one forward pass." in text
    text = report.belief(photographs_result(SRG | {"rollout": 0.4}))
    assert text.startswith(f"{QUESTION} Rollout: if patches")
    assert "(0.12). It costs one forward pass." in text


# ----------------------------------------------------------------------- does it take the shortcut?


def marks_of(reliance: dict) -> dict:
    """What is measured of a run with --shortcut, see `evaluate.measure_marks`."""
    densities = {"mean": 1.5, "rollout": 0.7, "norm_rollout": 2.0, "squared_gradient": 12.3}
    return {
        "reliance": reliance,
        "density": {row: around(value) for row, value in densities.items()},
    }


@pytest.mark.parametrize(
    "before, answer",
    [
        (0.1, "Yes:"),
        (0.45, "Not clearly:"),  # the intervals touch
        (0.7, "Not clearly:"),
    ],
)
def test_a_run_with_marks_has_a_sentence_on_them_second(before, answer):
    marks = {"marks": marks_of(around(0.48)), "untrained_marks": marks_of(around(before))}
    result = result_of() | marks
    first, second, *others = report.sentences(result)
    assert second == (
        f"Does it take the shortcut? {answer} without its mark, a canvas's feature moves by 0.48 "
        f"[0.46, 0.50] of the difference between two canvases (before training: {before:.2f}). "
        f"Density on the mark (uniform: 1): attention 1.50, rollout 0.70, norm rollout 2.00, "
        f"squared gradient 12.30."
    )
    assert [first, *others] == report.sentences(result_of())
    assert "Does it take the shortcut?" in "\n".join(lines_of([result]))


def test_without_its_untrained_network_it_is_not_said_whether_one_takes_the_shortcut():
    sentence = report.marks_sentence(result_of() | {"marks": marks_of(around(0.48))})
    start = "Does it take the shortcut? Without its mark, a canvas's feature moves by 0.48"
    assert sentence.startswith(start)
    assert "before training" not in sentence


def test_whether_a_network_takes_the_shortcut_cannot_be_told_if_all_features_are_alike():
    cannot_be_told = "Does it take the shortcut? This cannot be told: all canvases have nearly"
    result = result_of() | {"marks": marks_of(cell(None))}
    assert report.marks_sentence(result).startswith(cannot_be_told)
    result = result_of() | {"marks": marks_of(around(0.5)), "collapse": "it has collapsed"}
    assert report.marks_sentence(result).startswith(cannot_be_told)


# ---------------------------------------------------------------------------------- the epoch's line


def test_a_line_of_an_epoch_is_printed():
    validation = {
        "mean": {"selectivity": 1.234},
        "brightness": {"selectivity": 1.35},
        "mean_cosine": 0.5,
    }
    line = {
        "epoch": 2,
        "loss": 3.21,
        "seconds": 90,
        "images_per_second": 70.4,
        "validation": validation,
    }
    config = replace(CONFIG, epochs=10)
    assert report.epoch_text(config, line) == (
        "epoch 2/10: loss 3.210, selectivity 1.23 (brightness 1.35), cosine 0.50, 70 images/s, "
        "12.0 min left"
    )
    validation["mean"] = {}  # of photographs
    validation |= {"mean_entropy": 0.75, "entropy_of_mean": 1.0}
    assert report.epoch_text(replace(config, loss="dino"), line) == (
        "epoch 2/10: loss 3.210, cosine 0.50, teacher's mean entropy 0.75 ln K, "
        "entropy of its mean 1.00 ln K, 70 images/s, 12.0 min left"
    )


# ---------------------------------------------------------------------------------- the whole text


def lines_of(results: list[dict]) -> list[str]:
    """The lines of the report; none is wider than a page, except the one that names the file."""
    *lines, last = report.format_report(results, "folder/metrics.json").splitlines()
    assert max(map(len, lines)) <= 100
    assert "folder/metrics.json" in last
    return lines


def line_of(lines: list[str], title: str) -> list[str]:
    """The cells of the one line of a table that begins with this title."""
    (line,) = [line for line in lines if line.startswith(f"{title}  ")]  # of the table
    assert line[len(title) : report.ROW_WIDTH].isspace()
    return line[report.ROW_WIDTH :].split()


def headings_in(lines: list[str]) -> list[int]:
    """The numbers of the lines that stand right above the rows of a table."""
    return [number for number, line in enumerate(lines) if line.endswith("  the network")]


def titles_of(lines: list[str]) -> list[str]:
    """What the rows of the one table are called, from top to bottom; a line stands below them."""
    (heading,) = headings_in(lines)
    rows = lines[heading + 1 : -1]
    return [row[: report.ROW_WIDTH].rstrip() for row in rows]


@pytest.mark.parametrize("heads", [2, 12])  # DINO's largest network has 12
def test_the_report_begins_with_the_verdict(heads):
    lines = lines_of([result_of(heads=heads)])
    assert lines[0].startswith("run/ckpt.pth: NCE loss, same views")
    text = "\n".join(lines)
    verdict = text.index("Where does it look? At parts of the digit:")
    belief = text.index("Which map should you believe?")
    table = text.index("rank correlation with")
    images = text.index("1,000 canvases, 1,000 with pairs of equal ink; [95% over these images]")
    assert verdict < belief < table < images
    assert text.count("k-NN 43.4%, linear probe 43.4%") == 2  # of trained and untrained features


@pytest.mark.parametrize("auroc", [cell(0.25, 0.24, 0.26), HIGH_AUROC])
@pytest.mark.parametrize("correlation", [0.35, 0.95])
def test_a_usual_report_fits_twenty_lines(auroc, correlation):
    result = result_of() | {"checkpoint": "runs/clutter-nce-different/ckpt.pth"}
    of_attention = {"auroc": auroc, "direct_faithfulness": around(correlation)}
    result["matched"]["mean"] = result["matched"]["mean"] | of_attention
    lines = lines_of([result])
    assert "attention, untrained" in titles_of(lines)
    assert len(lines) + 1 <= 20  # the last line names the file


def test_a_report_on_photographs_fits_twenty_lines():
    lines = lines_of([photographs_result(SRG | {"brightness": 0.08})])
    assert "brightness" in titles_of(lines)
    assert len(lines) + 1 <= 20


MAPS = ["squared gradient", "norm rollout", "rollout", "attention"]  # from the best to the worst


def test_the_printed_rows_with_the_best_map_first():
    controls = ["brightness", "shuffled", "attention, untrained"]
    assert titles_of(lines_of([result_of(heads=12)])) == [*MAPS, *controls]
    # A map without a value is not in the order, but it has a row.
    result = result_of(equal_ink=EQUAL_INK | {"mean": 0.8, "rollout": None})
    maps = ["attention", "squared gradient", "norm rollout", "rollout"]
    assert titles_of(lines_of([result])) == [*maps, *controls]


def test_the_full_table_has_all_rows_with_the_best_map_first():
    rows = report.table_rows(report.CANVAS_COLUMNS, result_of())
    assert [row.title for row in rows] == [
        *MAPS,
        "head 1",
        "head 2 (selective)",
        "random",
        "brightness",
        "shuffled",
        "before training:",
        "  squared gradient",
        "  norm rollout",
        "  rollout",
        "  attention",
        "  brightness",
    ]
    assert [row.title for row in rows if row.is_heading] == ["before training:"]
    # A map without a value is not in the order, but it has a row.
    result = result_of(equal_ink=EQUAL_INK | {"mean": 0.8, "rollout": None})
    titles = [row.title for row in report.table_rows(report.CANVAS_COLUMNS, result)]
    assert titles[:3] == ["attention", "squared gradient", "norm rollout"]
    assert "rollout" in titles


def test_the_cells_of_the_full_table():
    rows = {row.title: row for row in report.table_rows(report.CANVAS_COLUMNS, result_of())}
    correlations = ["0.85", "0.45", "0.35"]
    gradient = rows["squared gradient"]
    assert gradient.cells == ["0.75 [0.73, 0.77]", *correlations, "1.30", "0.25"]
    assert gradient.name == "squared_gradient"
    assert gradient.passes == "16 backward"
    # A head comes with attention, and what a map costs is not said again.
    assert rows["head 1"].cells == ["0.40 [0.38, 0.42]", *correlations, "1.90", "0.25"]
    assert rows["head 1"].passes == ""
    assert rows["  rollout"].cells == rows["rollout"].cells
    assert rows["  rollout"].passes == ""


def test_the_cells_of_the_table():
    lines = lines_of([result_of()])
    cells = ["0.85", "0.45", "0.35"]
    attention = ["0.55", "[0.53,", "0.57]", *cells, "1.90", "0.25", "1", "forward"]
    assert line_of(lines, "attention") == attention
    gradient = ["0.75", "[0.73,", "0.77]", *cells, "1.30", "0.25", "16", "backward"]
    assert line_of(lines, "squared gradient") == gradient
    assert line_of(lines, "attention, untrained") == attention
    # The controls cost nothing.
    assert line_of(lines, "brightness") == ["0.51", "[0.49,", "0.53]", *cells, "1.30", "0.25"]


def test_cells_without_a_value_are_dashes():
    result = result_of()
    result["matched"]["rollout"] = {"equal_ink": around(None), "selectivity": cell(None)}
    assert line_of(lines_of([result]), "rollout") == ["–"] * 6 + ["1", "forward"]


def test_a_run_without_rows_from_before_training():
    result = result_of()
    del result["untrained"]
    titles = titles_of(lines_of([result]))
    assert titles[-1] == "shuffled"
    rows = report.table_rows(report.CANVAS_COLUMNS, result)
    assert rows[-1].title == "shuffled"


def test_the_line_below_the_table_counts_the_images():
    result = result_of()
    result["matched"]["mean"]["equal_ink"] = around(0.55) | {"images": 17}
    assert lines_of([result])[-1] == (
        "1,000 canvases, 17 with pairs of equal ink; [95% over these images]: other seeds differ "
        "by more."
    )
    result["matched"]["mean"]["equal_ink"] = cell(0.55)  # too few for an interval
    assert lines_of([result])[-1] == "1,000 canvases, 1,000 with pairs of equal ink."


@pytest.mark.parametrize("result", [result_of(), photographs_result()])
def test_headings_stand_above_their_columns(result):
    """A title above several columns begins where the first of them begins."""
    lines = lines_of([result])
    (number,) = headings_in(lines)
    groups, titles = lines[number - 1], lines[number]
    assert groups.index("rank correlation with") == titles.index("patches")
    assert groups.index("passes of") == titles.index("the network")
    if "selectivity" in titles:
        assert groups.index("on the digit") == titles.index("selectivity")
        first_title = "equal ink"
    else:
        first_title = "SRG"
    (gradient,) = [line for line in lines if line.startswith("squared gradient")]
    assert titles.index(first_title) == report.ROW_WIDTH
    assert gradient.index("0.35") == titles.index("direct")
    assert gradient.index("16 backward") == titles.index("the network")


NEGATIVE = cell(-0.85, -0.86, -0.84)  # such a correlation or SRG is as wide as it can be
WIDEST_ON_CANVASES = {
    "equal_ink": cell(0.85, 0.84, 0.86),
    "patch_faithfulness": NEGATIVE,
    "object_faithfulness": NEGATIVE,
    "direct_faithfulness": NEGATIVE,
    "selectivity": cell(123.45, 120.0, 130.0),
    "auroc": cell(0.85, 0.84, 0.86),
}
WIDEST_ON_PHOTOGRAPHS = {
    "srg": NEGATIVE,
    "patch_faithfulness": NEGATIVE,
    "direct_faithfulness": NEGATIVE,
}


def test_the_widest_cells_do_not_touch_each_other_nor_the_names_of_rows():
    """`lines_of` makes sure that no line is wider than a page."""
    on_canvases = result_of()
    on_photographs = photographs_result()
    for name in ("matched", "untrained"):
        on_canvases[name] = dict.fromkeys(on_canvases[name], WIDEST_ON_CANVASES)
    on_canvases["matched"]["mean"] = SAME_IN_ALL_ROWS | WIDEST_ON_CANVASES
    for name in ("photographs", "untrained"):
        on_photographs[name] = dict.fromkeys(on_photographs[name], WIDEST_ON_PHOTOGRAPHS)
    canvas_cells = ["0.85", "[0.84,", "0.86]", "-0.85", "-0.85", "-0.85", "123.45", "0.85"]
    photo_cells = ["-0.85", "[-0.86,", "-0.84]", "-0.85", "-0.85"]
    lines = lines_of([on_canvases])
    assert line_of(lines, "squared gradient") == [*canvas_cells, "16", "backward"]
    assert line_of(lines, "attention, untrained") == [*canvas_cells, "1", "forward"]
    lines = lines_of([on_photographs])
    assert line_of(lines, "squared gradient") == [*photo_cells, "16", "backward"]
    assert line_of(lines, "attention, untrained") == [*photo_cells, "1", "forward"]
    lines = lines_of([on_canvases, on_photographs])
    assert line_of(lines, "[1] attention, untrained") == [*canvas_cells, "1", "forward"]
    assert line_of(lines, "[1] squared gradient") == [*canvas_cells, "16", "backward"]
    assert line_of(lines, "[2] squared gradient") == [*photo_cells, "16", "backward"]


def test_the_report_on_photographs():
    lines = lines_of([photographs_result()])
    assert lines[-1].startswith("1,000 photographs, SRG of 1,000; [95% over these images]")
    assert titles_of(lines) == [*MAPS, "contrast", "centre", "attention, untrained"]
    attention = ["0.10", "[0.08,", "0.12]", "0.45", "0.35", "1", "forward"]
    assert line_of(lines, "attention") == attention
    assert line_of(lines, "centre") == ["0.05", "[0.03,", "0.07]", "0.45", "0.35"]


def test_the_full_table_of_photographs():
    rows = report.table_rows(report.PHOTO_COLUMNS, photographs_result())
    assert [row.title for row in rows] == [
        *MAPS,
        "head 1",
        "head 2",
        "contrast",
        "centre",
        "random",
        "before training:",
        "  squared gradient",
        "  norm rollout",
        "  rollout",
        "  attention",
    ]
    (head,) = [row for row in rows if row.title == "head 1"]
    assert head.cells == ["–", "–", "–"]


def test_an_accuracy_that_cannot_be_had_is_a_dash():
    result = photographs_result()
    result["features"] = {"knn": cell(0.5, 0.4, 0.6), "linear_probe": cell(None)}
    assert any("Accuracy: k-NN 50.0%, linear probe –" in line for line in lines_of([result]))


def test_several_networks_share_a_table():
    first = result_of((1.9, 1.8, 2.0))
    first["matched"]["other_network"] = first["matched"]["untrained"]
    second = result_of((1.2, 1.1, 1.3), equal_ink=EQUAL_INK | {"mean": 0.8})
    lines = lines_of([first, second])
    maps = ["squared gradient", "norm rollout", "rollout"]
    controls = ["brightness", "shuffled"]
    untrained = "attention, untrained"
    assert titles_of(lines) == [
        *[f"[1] {name}" for name in [*maps, "attention", *controls, "other network", untrained]],
        *[f"[2] {name}" for name in ["attention", *maps, *controls, untrained]],
    ]
    text = "\n".join(lines)
    assert len(headings_in(lines)) == 1
    assert text.count("Where does it look?") == 2
    assert text.count("Which map should you believe?") == 2
    assert "[1] run/ckpt.pth: " in text
    assert "[2] run/ckpt.pth: " in text
    assert "The networks differ" not in text
    second["settings"] = first["settings"] | {"image_size": 28, "digits": "mnist"}
    text = "\n".join(lines_of([first, second]))
    assert "The networks differ in image_size, digits; each is measured on its own images." in text


def test_canvases_and_photographs_have_a_table_each():
    """With the number that each network has in the whole report."""
    lines = lines_of([photographs_result(), result_of(), photographs_result()])
    of_canvases, of_photographs = [lines[number + 1 :] for number in headings_in(lines)]
    assert [line[:3] for line in of_canvases[:7]] == ["[2]"] * 7
    assert of_canvases[7].startswith("1,000 canvases, 1,000 with pairs of equal ink;")
    assert [line[:3] for line in of_photographs[:-1]] == ["[1]"] * 7 + ["[3]"] * 7
    # Two networks may differ in how many have an SRG.
    assert of_photographs[-1].startswith("1,000 photographs; [95% over these images]")
    assert line_of(lines, "[2] attention")[0] == "0.55"
    assert line_of(lines, "[3] attention")[0] == "0.10"


def test_the_report_on_pictures():
    """It has the sentences about maps and a table, but no verdict and no file of metrics."""
    text = report.format_picture_report([picture_result()])
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("run/ckpt.pth: NCE loss")
    assert "Which map should you believe? Squared gradient:" in text
    assert "Where does it look?" not in text
    assert "Accuracy" not in text
    assert "metrics.json" not in text
    controls = ["contrast", "centre"]
    assert titles_of(lines) == [*MAPS, *controls]
    worst_first = picture_result({row: -value for row, value in SRG.items()})
    lines = report.format_picture_report([picture_result(), worst_first]).splitlines()
    assert max(map(len, lines)) <= 100
    in_turn = [f"[1] {name}" for name in [*MAPS, *controls]]
    in_turn += [f"[2] {name}" for name in [*reversed(MAPS), *controls]]
    assert titles_of(lines) == in_turn


@pytest.mark.parametrize("flags", ["", "--num-distractors 0", "--depth 1 --heads 1"])
def test_whatever_is_measured_can_be_printed(few_images, flags):
    config = config_of(f"{TINY} {flags}")
    backbone = vit.build_network(config).backbone
    result = evaluate.evaluate("a.pth", config, None, backbone, DIGITS).result
    lines = lines_of([result])
    text = " ".join(lines)
    assert "nan" not in text
    cannot_be_told = "This cannot be told: no canvas has both a digit and clutter." in text
    assert cannot_be_told == ("--num-distractors" in flags)
    assert ("a single block, so all effects" in text) == ("--depth 1" in flags)
    cells = line_of(lines, "attention")
    assert ("–" in cells) == ("--num-distractors" in flags)
