"""What the pages say in words and numbers follows from the lines of study.json.

The tables are made from study.json, and tested with the study. Here are the sentences between them:
each is written anew from the runs, and must stand on its page. On the pages of results no other
number may stand, unless it belongs to the design.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "results"))

import study

FIRST_TEN = range(10, 20)
SECOND_SAMPLE = range(30, 60)
OF_MAPS = range(70, 90)
EVERY_SEED = range(10, 90)

# Numbers of the design, which no run has to confirm.
DESIGN = {
    "results/README.md": [
        "1 − cosine",
        "is about chance, .5",
        ".5 is chance",
        "seeds 60 to 64",
        "784 in ViT-S/8 at 224 px",
        "28 or 56 pixels",
        "224 against 448 pixels",
        "six heads of width 64",
        "a batch of 8,192",
    ],
    "results/claims.md": [
        "the 95% interval over seeds",
        "cannot be below .002 with ten seeds, or below .06 with five",
        "cannot give an exact p below .06",
        "Seed 10 [1] and seed 11 [2]",
        "Crops of 56 pixels have four times as many patches as crops of 28",
        "84 pixels do not help",
        "A batch of 256",
        "a batch of 32",
    ],
}


def text_of(page: str) -> str:
    """A page in one line, without its tables and code."""
    text = (ROOT / page).read_text()
    text = re.sub(r"<!-- (?!end)[^>]*-->.*?<!-- end -->", " ", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith(("|", "    ", "#", "!["))]
    text = " ".join(" ".join(lines).split())
    return re.sub(r"\]\([^)]*\)", "]", text)  # the address of a link


@pytest.fixture(scope="module")
def lines():
    return [line for line in json.loads(study.STUDY_FILE.read_text()) if line["preset"] == "laptop"]


def values(lines: list[dict], row: str, path: str, seeds) -> np.ndarray:
    """A measure of a row's runs, in the order of their seeds; `path` is such as "features/knn"."""
    chosen = [line for line in lines if line["row"] == row and line["seed"] in seeds]
    assert len(chosen) >= min(5, len(seeds)), (row, path)
    found = []
    for line in sorted(chosen, key=lambda line: line["seed"]):
        value = line
        for key in path.split("/"):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found.append(value)
    return np.array(found)


def head_densities(lines: list[dict], row: str, seeds) -> np.ndarray:
    """How dense each head is far from ink: (runs, heads)."""
    runs = values(lines, row, "matched", seeds)
    return np.array(
        [
            [cells["far_background_density"] for name, cells in run.items() if "head_" in name]
            for run in runs
        ]
    )


def percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def points(value: float) -> str:
    """Two digits without the leading 0, as the pages write them: .53."""
    return f"{value:.2f}".replace("0.", ".")


def nearest(value: float, words: dict[str, float]) -> str:
    return min(words, key=lambda word: abs(words[word] - value))


# --------------------------------------------------------------------- what each page has to say


def sentences_of_results(lines):
    def equal_ink(name):
        return values(lines, "different", f"matched/{name}/equal_ink", OF_MAPS).mean()

    attention, rollout, gradient = (
        percent(equal_ink(name)) for name in ("mean", "rollout", "squared_gradient")
    )
    brightness = points(equal_ink("brightness"))
    return [
        f"attention picks the one that matters more in {attention} of pairs, rollout in {rollout}, "
        f"and squared gradients in {gradient}",
        f"brightness, which knows only the dose, is at {brightness}",
        f"brightness gets {brightness}",
        *sentences_on_texture(lines, "in {avoiding} of ten one head stays on the digit"),
    ]


def sentences_on_texture(lines, *templates):
    words = dict(enumerate("none one two three four five six seven eight nine ten".split()))
    densities = head_densities(lines, "texture", FIRST_TEN)
    on_ink = (densities < 1).sum(1)  # heads that are not past the ink
    counts = {"all": words[(on_ink == 0).sum()], "avoiding": words[(on_ink == 1).sum()]}
    return [template.format(**counts) for template in templates]


def sentences_of_claims(lines):
    words = dict(enumerate("none one two three four five six seven eight nine ten".split()))
    random_maps = [
        values(lines, row, "matched/random/object_faithfulness", EVERY_SEED).mean()
        for row in ("different", "same")
    ]
    attention_wins = {}
    for row in ("dino-same", "pretrained"):
        attention = values(lines, row, "matched/mean/patch_faithfulness", FIRST_TEN)
        rollout = values(lines, row, "matched/rollout/patch_faithfulness", FIRST_TEN)
        attention_wins[row] = f"{words[(attention > rollout).sum()]} of {words[len(attention)]} runs"
    stray = {}
    for row in ("different", "same"):
        most = head_densities(lines, row, SECOND_SAMPLE).max(1)
        faithfulness = values(lines, row, "matched/mean/patch_faithfulness", SECOND_SAMPLE)
        correlation = stats.spearmanr(most, faithfulness).statistic
        stray[row] = f"−{points(-correlation)}"
    curves = values(lines, "texture", "curve", FIRST_TEN)
    losses = [curve[-1]["loss"] for curve in curves]
    curves = values(lines, "different-long", "curve", range(10, 15))
    furthest = [np.argmax([epoch["mean"]["diversity"] for epoch in curve]) for curve in curves]
    probes = [
        points(values(lines, row, "features/linear_probe", SECOND_SAMPLE).mean())
        for row in ("different", "size-28")
    ]
    causal = [
        nearest(
            values(lines, row, "causal_selectivity", FIRST_TEN).mean(),
            {"as far": 1, "about one and a half times as far": 1.5, "over twice as far": 2.3},
        )
        for row in ("same", "different")
    ]
    return [
        f"A random map has a rank correlation of about {np.mean(random_maps):.1f} there".replace(
            "0.", "."
        ),
        f"{attention_wins['dino-same']} with DINO's loss and same views, and in "
        f"{attention_wins['pretrained']} that started from supervised weights",
        f"(rank correlation {stray['different']} with different views, {stray['same']} with same "
        f"views)",
        *sentences_on_texture(
            lines,
            "In {all}, all heads avoid the ink. In {avoiding}, one head stays on the ink and two "
            "avoid it",
        ),
        f"The loss falls to {points(min(losses))} to {points(max(losses))}",
        f"in epochs {min(furthest)} to {max(furthest)}",
        f"a linear probe of {probes[0]} instead of {probes[1]}, second sample",
        f"{causal[0]} as leaving out a pixel of a distractor with same views, and {causal[1]} with "
        f"different views",
    ]


def sentences_of_metrics(lines):
    brightness = np.concatenate(
        [
            values(lines, row, "matched/brightness/patch_faithfulness", EVERY_SEED)
            for row in ("different", "same")
        ]
    )
    random_maps = [
        values(lines, row, "matched/random/object_faithfulness", EVERY_SEED).mean()
        for row in ("different", "same")
    ]
    equal_ink = values(lines, "different", "matched/brightness/equal_ink", OF_MAPS).mean()
    about = f"{np.mean(random_maps):.1f}".replace("0.", ".")
    return [
        f"its rank correlation with the effects is {points(brightness.min())} to "
        f"{points(brightness.max())}",
        f"even a random map scores about {about} here",
        f"With equal ink, brightness is right in {points(equal_ink)} of the cases",
    ]


SENTENCES = {
    "results/README.md": sentences_of_results,
    "results/claims.md": sentences_of_claims,
    "docs/metrics.md": sentences_of_metrics,
}


@pytest.mark.parametrize("page", SENTENCES)
def test_the_sentences_say_what_the_runs_give(page, lines):
    text = text_of(page)
    for sentence in SENTENCES[page](lines):
        assert sentence in text, f"{page} should say: {sentence}"


@pytest.mark.parametrize("page", DESIGN)
def test_every_other_number_belongs_to_the_design(page, lines):
    text = text_of(page)
    for phrase in DESIGN[page]:
        assert phrase in text, f"{page} no longer says: {phrase}"
    for phrase in sorted([*SENTENCES[page](lines), *DESIGN[page]], key=len, reverse=True):
        text = text.replace(phrase, "")
    text = re.sub(r"`[^`]*`", "", text)
    text = re.sub(r"\b[CFMQ]\d\b", "", text)  # the names of claims
    text = re.sub(r"\b(float|bfloat)\d\d\b|ViT-S/8|STL-10", "", text)
    left = re.findall(r".{,40}\d.{,20}", text)
    assert left == []
