"""Every figure is drawn, says in its title what the runs say, and names everything in words."""

import copy
import json
import sys
from pathlib import Path

import matplotlib.text
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "results"))

import figures
import map_claims
import study
import verdicts

FIGURES_OF_CLAIMS = set(verdicts.CLAIMS)
FIGURES_OF_ALL = {
    "claims",
    "selectivity-and-effect",
    "selectivity-and-faithfulness",
    "training",
    "maps",
    "direct-share",
}
FIGURES_OF_NEW_ROWS = {"map-claims", "shortcut"}


@pytest.fixture(scope="module")
def committed():
    return study.read_study()["laptop"]


@pytest.fixture(scope="module")
def all_runs(committed):
    """The committed lines, and made-up ones for all runs of the study of maps."""
    rng = np.random.default_rng(0)
    runs = {key: line for key, line in committed.items() if key[1] not in map_claims.SEEDS}
    for depth, row in figures.DEPTH_ROWS.items():
        seeds = map_claims.SEEDS if row == "different" else map_claims.TEN_SEEDS
        for seed in seeds:
            runs[row, seed] = made_up_line(committed, seed, depth, rng)
    for seed in map_claims.SEEDS:
        runs["same", seed] = made_up_line(committed, seed, 2, rng)
    for number, row in enumerate(map_claims.MARK_ROWS):
        for seed in map_claims.MARK_SEEDS:
            line = runs.get((row, seed), made_up_line(committed, seed, 2, rng))
            reliance = 0.08 + 0.15 * number + 0.02 * rng.random()
            density = {}
            for scatter, name in enumerate(map_claims.marks({})[1]):
                density[name] = 1 + 5 * reliance + 0.3 * (4 - scatter) * rng.random()
            line["marks"] = {"reliance": reliance, "density": density}
            runs[row, seed] = line
    return runs


def made_up_line(committed, seed, depth, rng):
    """A committed line whose equal ink and direct shares are made up."""
    line = copy.deepcopy(committed["different", 60 + seed % 5])
    for place, map_name in enumerate(figures.MAPS):
        center = (0.53, 0.75 - 0.03 * depth, 0.82, 0.83, 0.87)[place]
        line["matched"][map_name]["equal_ink"] = center + 0.01 * rng.normal()
    line["direct_share"] = [1.0]
    for block in range(1, depth):
        line["direct_share"].append((1 - block / depth) ** 2 + 0.03 * rng.random())
    return line


@pytest.fixture(scope="module")
def drawn(all_runs):
    return figures.all_figures(all_runs)


def texts_of(figure):
    """All texts of a figure, tick labels included."""
    figure.draw_without_rendering()
    texts = [text.get_text() for text in figure.findobj(matplotlib.text.Text)]
    return [text for text in texts if text]


# --------------------------------------------------------------------------------- which are drawn


def test_every_figure_is_drawn_once_its_runs_are_there(drawn, committed):
    assert drawn.keys() == FIGURES_OF_CLAIMS | FIGURES_OF_ALL | FIGURES_OF_NEW_ROWS
    missing = drawn.keys() - figures.all_figures(committed).keys()
    assert missing <= FIGURES_OF_NEW_ROWS
    assert figures.all_figures({}) == {}


def test_the_page_s_folder_has_what_is_drawn(committed, tmp_path, monkeypatch):
    few = {"training": figures.draw_training(committed)}
    monkeypatch.setattr(figures, "all_figures", lambda runs: few)
    figures.draw_all(committed, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["training.png"]


def test_the_committed_pictures_are_those_that_are_drawn(committed):
    names = {path.stem for path in (ROOT / "results" / "figures").glob("*.png")}
    # These two show maps of networks, so they cannot be drawn from study.json.
    names -= {"texture", "shortcut-maps"}
    assert names == figures.all_figures(committed).keys()


def test_a_collapsed_network_is_left_out(all_runs):
    runs = copy.deepcopy(all_runs)
    runs["different", 70]["direct_share"] = [None, None]
    runs["shortcut-50", 70]["marks"]["reliance"] = None
    assert figures.all_figures(runs).keys() == figures.all_figures(all_runs).keys()
    assert len(figures.values_by_depth(runs, "direct_share")[2]) == len(map_claims.SEEDS) - 1
    assert map_claims.direct_shares(runs, "different").startswith("1.00, ")


# ------------------------------------------------------------------------------------------- words


def test_no_code_names(drawn, all_runs):
    names = {row for row, _ in all_runs if "-" in row}
    names |= {"auroc", "squared_gradient", "equal_ink", "matched", "nan", "None"}
    for name, figure in drawn.items():
        for text in texts_of(figure):
            assert "_" not in text, (name, text)
            assert "matched/" not in text, (name, text)
            assert not any(code_name in text for code_name in names), (name, text)


def test_every_panel_says_what_its_axes_are(drawn):
    for name, figure in drawn.items():
        texts = texts_of(figure)
        assert figure.get_suptitle() or figure.axes[0].get_title(), name
        # Panels of one figure may share a label.
        assert any(axes.get_xlabel() for axes in figure.axes) or name == "maps", name
        assert len(texts) > 5, name


def test_no_text_is_cut(drawn):
    """All texts lie within the picture."""
    for name, figure in drawn.items():
        figure.draw_without_rendering()
        width, height = figure.bbox.size
        for text in figure.findobj(matplotlib.text.Text):
            # A tick outside the limits of its axis is not drawn, though it has a text.
            if text.get_text() and text.get_visible() and not is_tick(text, figure):
                box = text.get_window_extent()
                assert box.x0 > -1 and box.x1 < width + 1, (name, text.get_text())
                assert box.y0 > -1 and box.y1 < height + 1, (name, text.get_text())


def is_tick(text, figure):
    for axes in figure.axes:
        if text in axes.get_xticklabels() + axes.get_yticklabels():
            return True
    return False


def test_at_most_five_colours():
    assert len(figures.GROUP_STYLES) <= 5
    assert len(figures.ROWS_OVER_TRAINING) <= 5
    assert len(figures.DEPTH_ROWS) <= 5
    assert len(figures.MARK_STYLES) <= 5


# ------------------------------------------------------------- numbers, recomputed from the lines


def lines_of(runs, row, seeds):
    return [line for (name, seed), line in runs.items() if name == row and seed in seeds]


def test_the_title_of_a_claim_has_its_numbers(drawn):
    lines = json.loads(study.STUDY_FILE.read_text())
    of_row = {}
    for line in lines:
        if line["preset"] == "laptop" and 10 <= line["seed"] < 20:
            of_row[line["row"], line["seed"]] = line["matched"]["mean"]["selectivity"]
    ratios = [of_row["different", seed] / of_row["same", seed] for seed in range(10, 20)]
    mean = np.exp(np.mean(np.log(ratios)))
    title = drawn["C5"].get_suptitle()
    assert f"{mean:.2f} [" in title
    assert "10 seeds" in title
    assert ": holds" in title


def test_the_forest_counts_the_words(drawn, all_runs):
    words = [verdict.word for verdict in verdicts.judge(all_runs).values()]
    title = drawn["claims"].get_suptitle()
    assert f"{len(words)} claims" in title
    for word in set(words):
        assert f"{word}: {words.count(word)}" in title.replace("Holds", "holds")


def test_the_forest_has_what_is_to_be_kept_in_mind(drawn, all_runs):
    remarks = verdicts.claim_remarks(all_runs)
    texts = " ".join(" ".join(texts_of(drawn["claims"])).split())
    assert len(remarks) > 5
    for remark in remarks.values():
        assert figures.in_words(remark) in texts


def test_a_wrong_verdict_would_change_the_title(all_runs):
    """With the two rows exchanged, C5 says the contrary."""
    exchanged = dict(all_runs)
    for seed in verdicts.FRESH:
        exchanged["different", seed] = all_runs["same", seed]
        exchanged["same", seed] = all_runs["different", seed]
    verdict = verdicts.judge(exchanged)["C5"]
    title = figures.draw_claim(exchanged, "C5", verdict).get_suptitle()
    assert verdicts.CONTRARY in title


def test_the_title_of_maps_has_the_means_of_the_new_seeds(drawn, all_runs):
    title = drawn["maps"].get_suptitle()
    for depth, row in figures.DEPTH_ROWS.items():
        lines = lines_of(all_runs, row, range(70, 90))
        mean = np.mean([line["matched"]["mean"]["equal_ink"] for line in lines])
        assert f"{100 * mean:.0f}% with {depth} block" in title
    assert "squared gradient" in title
    assert "2 blocks (20 networks)" in texts_of(drawn["maps"])


def test_rows_without_new_seeds_are_drawn_by_the_first_ones(committed):
    old = {key: line for key, line in committed.items() if key[1] not in map_claims.SEEDS}
    figure = figures.draw_maps(old)
    assert "6 blocks (5 networks)" in texts_of(figure)
    lines = lines_of(old, "depth-6", range(60, 65))
    mean = np.mean([line["matched"]["mean"]["equal_ink"] for line in lines])
    assert f"{100 * mean:.0f}% with 6 blocks" in figure.get_suptitle()


def test_the_title_of_direct_shares(drawn, all_runs):
    lines = lines_of(all_runs, "depth-6", range(70, 90))
    mean = np.mean([line["direct_share"][-1] for line in lines])
    assert f"{100 * mean:.0f}% with 6 blocks" in drawn["direct-share"].get_suptitle()


def test_the_title_of_the_shortcut(drawn, all_runs):
    reliance, density = map_claims.marks(all_runs)
    for map_name in ("mean", "rollout"):
        auc = map_claims.auc(reliance, density[map_name])
        assert f"in {100 * auc:.0f}%" in drawn["shortcut"].get_suptitle()
    # Each network is in the panel of each map.
    for axes in drawn["shortcut"].axes:
        assert sum(len(line.get_xdata()) for line in axes.lines[:4]) == 24


def test_correlations_stand_in_the_titles(drawn, all_runs):
    means = {}
    for row in sorted({row for row, _ in all_runs}):
        lines = lines_of(all_runs, row, verdicts.BOTH)
        if lines and row.partition("-lr-")[0] in figures.GROUP_OF_ROW:
            selectivity = [line["matched"]["mean"]["selectivity"] for line in lines]
            effect = [line["causal_selectivity"] for line in lines]
            means[row] = (np.mean(selectivity), np.mean(effect))
    x, y = np.array(list(means.values())).T
    title = drawn["selectivity-and-effect"].axes[0].get_title()
    assert f"{map_claims.spearman(x, y):.2f} between {len(means)} ways" in title
    same_views = [
        means[row] for row in means if row.startswith("same") or row in ("dino-same", "pretrained")
    ]
    x, y = np.array(same_views).T
    correlation = map_claims.spearman(x, y)
    assert f"same views: {correlation:.2f} between {len(same_views)} ways" in title


@pytest.mark.parametrize(
    "slope,sentence", [(1, "more"), (-1, "less"), (0, "little")], ids=["up", "down", "flat"]
)
def test_the_sentence_follows_the_correlation(slope, sentence):
    x = np.arange(8.0)
    flat = np.array([3, 1, 4, 2, 2.5, 3.5, 1.5, 2.2])
    y = slope * x if slope else flat
    rows = list(figures.GROUP_OF_ROW)
    points = {rows[i]: (np.array([x[i]]), np.array([y[i]])) for i in range(8)}
    title = figures.correlation_title(points, more="more", little="little", less="less")
    assert title.startswith(sentence)
