"""The text that is printed about networks: an epoch's line, the sentences, and the table.

Two questions are answered. Where does the network look? And which map should you believe, if you
want to know what its feature depends on?
"""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from explain import PASSES as PASSES_OF_MAPS
from explain import PHOTO_CONTROLS
from observe import name_of, row_of
from settings import Config

LINE_WIDTH = 100  # of the printed text, characters
# What the map of each row costs. The row of attention is "mean", the mean of its heads.
PASSES = {row_of(name): passes for name, passes in PASSES_OF_MAPS.items()}
ONE_PASS = "1 forward"
NETWORK_ROWS = tuple(PASSES)
NEARLY = 0.03  # a map that is less than this behind the best one is nearly as good
DESCRIBES = 0.5  # a map with a lower rank correlation hardly describes the effects
NO_CELL = {"value": None}
HEADLINES = {"equal_ink": "equal ink", "srg": "SRG"}  # the metrics by which maps are compared
CAVEAT = "Intervals are over the images of this one network; other seeds differ by more."


# ----------------------------------------------------------------------------------- the sentences


def format_cell(cell: dict | None, with_interval: bool = True) -> str:
    """A cell as text, such as "1.91 [1.85, 1.97]"."""
    if cell is None or cell["value"] is None:
        return "–"
    if with_interval and cell["low"] is not None:
        return f"{decimal(cell['value'])} [{decimal(cell['low'])}, {decimal(cell['high'])}]"
    return decimal(cell["value"])


def decimal(value: float) -> str:
    """A number with two decimals, and without the sign of a zero."""
    return f"{round(value, 2) + 0:.2f}"


def is_above(table: dict, row: str, reference: str, metric: str = "selectivity") -> bool:
    """Whether a row's metric is above another's: their intervals, as printed, do not touch."""
    low = table[row][metric]["low"]
    high = table[reference][metric]["high"]
    return low is not None and high is not None and round(low, 2) > round(high, 2)


def is_below_one(cell: dict) -> bool:
    """Whether the whole interval of a cell is below 1."""
    return cell["high"] is not None and cell["high"] < 1


def verdict(result: dict) -> str:
    """Where the network looks, in a few sentences."""
    question = "Where does it look?"
    if "matched" not in result:
        text = f"{question} These are photographs: there are no masks to measure it against."
        return f"{text} {as_sentence(result['collapse'])}" if result["collapse"] else text
    if result["collapse"]:
        return f"{question} Neither at digit nor at clutter. {as_sentence(result['collapse'])}"
    table = result["matched"]
    selectivity = table["mean"]["selectivity"]
    if selectivity["value"] is None:
        return f"{question} This cannot be told: no canvas has both a digit and clutter."

    brightness = table["brightness"]["selectivity"]["value"]
    density = table["mean"]["digit_density"]
    beats_brightness = is_above(table, "mean", "brightness")
    beats_position = is_above(table, "mean", "shuffled")  # the network's maps of other images
    looks_at_digit = False
    if is_below_one(density) and is_below_one(table["mean"]["clutter_density"]):
        answer = (
            f"Neither at digit nor at clutter: attention avoids the ink; it is "
            f"{density['value']:.2f} times as dense on the digit as on the whole image."
        )
    elif beats_brightness and beats_position:
        looks_at_digit = True
        answer = "At the digit."
    elif is_below_one(selectivity):
        answer = "At the clutter more than at the digit."
    elif beats_position:
        answer = (
            "At anything bright: attention is not clearly more selective than brightness alone."
        )
    else:
        answer = "Attention is not clearly more selective than position alone explains."
    text = (
        f"{question} {answer} Attention is {format_cell(selectivity)} times as dense on the digit "
        f"as on the clutter; brightness alone would give {brightness:.2f}."
    )
    if looks_at_digit and not is_above(table, "mean", "brightness", "auroc"):
        text += " By auroc, which compares ranks only, it is not above brightness."

    head = result["best_head"]
    head_does = is_above(table, head, "brightness") and is_above(table, head, "shuffled")
    if head_does and not looks_at_digit:
        cell = format_cell(table[head]["selectivity"])
        text += f" But {title_of(head)} on its own does look at the digit: {cell}."
    if result["causal_selectivity"]["value"] is None:
        return text
    return (
        f"{text} Leaving out a piece of the digit moves the feature, per ink pixel, "
        f"{format_cell(result['causal_selectivity'])} times as far as leaving out a distractor."
    )


def as_sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def title_of(row: str) -> str:
    """What a row of the tables is called in print."""
    return "attention" if row == "mean" else row.replace("_", " ")


def measured_table(result: dict) -> dict:
    """The table of a result that counts: canvases in layout "matched", or photographs."""
    return result["matched"] if "matched" in result else result["photographs"]


def headline(table: dict) -> str:
    """The metric by which maps are compared; for photographs, which have no ink, it is "srg"."""
    return "equal_ink" if "equal_ink" in table["mean"] else "srg"


def maps_in_order(table: dict, rows: Iterable[str] = NETWORK_ROWS) -> list[str]:
    """Those of the rows that have a value of the headline metric, the highest first."""
    metric = headline(table)
    rows = [row for row in rows if table.get(row, {}).get(metric, NO_CELL)["value"] is not None]
    return sorted(rows, key=lambda row: table[row][metric]["value"], reverse=True)


def best_map(result: dict) -> str | None:
    """The row of the network's map with the highest value; None if no map is worth a look."""
    if result["collapse"] or not has_effects(result):
        return None
    rows = maps_in_order(measured_table(result))
    return rows[0] if rows else None


def has_effects(result: dict) -> bool:
    """Whether the feature changes at all if something is done to a patch."""
    return result["direct_share"][0]["value"] is not None


def belief(result: dict) -> str:
    """Which map to believe, in a few sentences."""
    question = "Which map should you believe?"
    table = measured_table(result)
    rows = maps_in_order(table)
    if result["collapse"]:
        return f"{question} None: the network gives all images nearly the same feature."
    if not has_effects(result):
        return f"{question} None: no patch has any effect."
    if not rows:
        return f"{question} This cannot be told: there are no two patches to compare."
    if headline(table) == "equal_ink":
        text = equal_ink_sentences(table, rows)
    else:
        text = srg_sentences(table, rows)
    caveat = ""
    if table[rows[0]][headline(table)]["low"] is not None:
        caveat = f" {CAVEAT}"
    return f"{question} {text} {direct_sentence(result)}{caveat}"


def equal_ink_sentences(table: dict, rows: list[str]) -> str:
    """What the maps know about patches of one canvas with equal ink, and the advice."""
    first, *other_rows = rows
    shares = [f"{table[first]['equal_ink']['value']:.0%} of the time for {title_of(first)}"]
    for row in other_rows:
        shares.append(f"{table[row]['equal_ink']['value']:.0%} for {title_of(row)}")
    brightness = table["brightness"]["equal_ink"]["value"]
    best = table[first]["equal_ink"]
    text = (
        f"Of two patches with equal ink, the one with more of the map matters more: "
        f"{', '.join(shares)} (brightness {brightness:.0%}, chance 50%)."
    )
    if best["low"] is None:
        return f"{text} There are too few canvases for an interval."
    if best["low"] <= 0.5:
        return f"{text} So none of them is clearly better than chance."
    if not is_above(table, first, "brightness", "equal_ink"):
        return f"{text} So none of them is clearly better than brightness."
    return f"{text} {advice(table, rows)}"


def srg_sentences(table: dict, rows: list[str]) -> str:
    """How maps stand up when patches are left out in their order, and the advice."""
    gains = [f"{title_of(row)} {decimal(table[row]['srg']['value'])}" for row in rows]
    controls = maps_in_order(table, PHOTO_CONTROLS)
    control_gains = [f"{title_of(row)} {decimal(table[row]['srg']['value'])}" for row in controls]
    text = (
        f"Leave patches out, those with most of the map first or those with least first: the gap "
        f"between the two curves of the feature's cosine (SRG) is {', '.join(gains)}; for maps "
        f"that know nothing of the network, {', '.join(control_gains)}."
    )
    if table[rows[0]]["srg"]["low"] is None:
        return f"{text} These are too few pictures for an interval, and so for advice."
    if is_above(table, rows[0], controls[0], "srg"):
        return f"{text} {advice(table, rows)}"
    return f"{text} So none is clearly better than {title_of(controls[0])}."


def advice(table: dict, rows: list[str]) -> str:
    """Which map to look at, and one that is nearly as good if that is cheaper."""
    metric = headline(table)
    best = rows[0]
    text = f"Look at {title_of(best)}"
    cheapest = next(row for row in rows if PASSES[row] == ONE_PASS)
    if best == cheapest:
        return f"{text}, which costs one forward pass."
    gap = table[best][metric]["value"] - table[cheapest][metric]["value"]
    quality = "nearly as good" if gap < NEARLY else "next"
    return f"{text}; {title_of(cheapest)} is {quality} and costs one forward pass."


def direct_sentence(result: dict) -> str:
    """What share of the effects attention of the last block can see."""
    if len(result["direct_share"]) == 1:
        return "The network has a single block, so attention sees all that its feature depends on."
    last = result["direct_share"][-1]
    change = "changes its own token alone, at the input of the last block"
    if "photographs" in result:
        change = "is left out for the last block alone"
    correlation = measured_table(result)["mean"]["direct_faithfulness"]
    describes = "attention describes"
    if (correlation["value"] or 0) < DESCRIBES:
        describes = "attention could describe, but hardly does"
    return (
        f"If a patch {change}, {last['value']:.0%} of its effect is left. This is the part that "
        f"{describes} (rank correlation {format_cell(correlation, with_interval=False)}); "
        f"the rest is due to what earlier blocks mix into other tokens."
    )


def epoch_text(config: Config, line: dict) -> str:
    """The printed line of an epoch."""
    validation = line["validation"]
    parts = [f"loss {line['loss']:.3f}"]
    selectivity = validation["mean"].get("selectivity")
    if selectivity:  # photographs have none
        parts.append(f"selectivity {selectivity:.2f}")
    parts.append(f"mean cosine {validation['mean_cosine']:.2f}")
    if config.loss == "dino":
        parts.append(f"teacher's mean entropy {validation['mean_entropy']:.2f} ln K")
        parts.append(f"entropy of its mean {validation['entropy_of_mean']:.2f} ln K")
    minutes_left = (config.epochs - line["epoch"]) * line["seconds"] / 60
    parts.append(f"{line['images_per_second']:.0f} images/s")
    parts.append(f"{minutes_left:.1f} minutes left")
    return f"epoch {line['epoch']}/{config.epochs}: {', '.join(parts)}"


# ------------------------------------------------------------------------------- the printed table


@dataclass(frozen=True)
class Column:
    """A column of the printed table."""

    group: str  # what stands above the title, over this column and those after it
    title: str
    metric: str
    width: int
    with_interval: bool = False


# With the names of the rows, and PASSES, they are 100 characters wide: a new column takes the place
# of another.
CANVAS_COLUMNS = [
    Column("", "equal ink", "equal_ink", 19, with_interval=True),
    Column("rank correlation with", "patches", "patch_faithfulness", 8),
    Column("", "objects", "object_faithfulness", 8),
    Column("", "direct", "direct_faithfulness", 8),
    Column("on the digit", "selectivity", "selectivity", 12),
    Column("", "auroc", "auroc", 7),
]
PHOTO_COLUMNS = [
    Column("", "SRG", "srg", 21, with_interval=True),
    Column("rank correlation with", "patches", "patch_faithfulness", 8),
    Column("", "direct", "direct_faithfulness", 15),
]
ROW_WIDTH = 27  # of the first column, with the names of the rows
# Rows of the table when several networks are compared.
COMPARED_ROWS = (*NETWORK_ROWS, "brightness", "contrast", "centre", "other_network")
# Rows whose numbers follow from their definition, or that are not about the network's own effects.
HIDDEN_ROWS = ("ink", "uniform", "oracle", "untrained")
# Settings that decide which images a network sees; they may differ when networks are compared.
IMAGE_SETTINGS = ("dataset", "image_size", "patch_size", "canvas_size", "num_distractors")
IMAGE_SETTINGS += ("background", "digits")


def format_report(results: list[dict], path: str) -> str:
    """The printed text: for each network the sentences, then one table; `path` is metrics.json."""
    lines = []
    for number, result in enumerate(results, 1):
        label = f"[{number}] " if len(results) > 1 else ""
        lines += network_lines(result, label)
    different = [
        name
        for name in IMAGE_SETTINGS
        if len({str(result["settings"].get(name)) for result in results}) > 1
    ]
    if different:
        lines.append(
            f"The networks differ in {', '.join(different)}; each is measured on its own images."
        )
    lines.append("")
    lines += table_lines(results)
    lines.append("")
    lines.append(f"All metrics are in {path}; the README says what each of them means.")
    return "\n".join(lines)


def format_picture_report(results: list[dict]) -> str:
    """The printed text on networks' maps of somebody's pictures, see `evaluate.measure_pictures`."""
    lines = []
    for number, result in enumerate(results, 1):
        label = f"[{number}] " if len(results) > 1 else ""
        lines += network_lines(result, label)
    return "\n".join([*lines, "", *table_lines(results)])


def network_lines(result: dict, label: str) -> list[str]:
    """What is said about one network."""
    heading = f"{label}{result['checkpoint']}: {result['description']}"
    lines = []
    for text in (heading, *sentences(result)):
        lines += textwrap.wrap(text, LINE_WIDTH)
    return lines


def sentences(result: dict) -> list[str]:
    """Where the network looks, which map to believe, and how well its feature classifies.

    On somebody's pictures only the second is known.
    """
    if "features" not in result:
        return [belief(result)]
    accuracy = f"Accuracy: {accuracies(result['features'])}"
    if "untrained_features" in result:
        accuracy += f"; before training: {accuracies(result['untrained_features'])}"
    texts = [verdict(result), belief(result), accuracy]
    if "marks" in result:
        texts.insert(1, marks_sentence(result["marks"]))
    return texts


def marks_sentence(marks: dict) -> str:
    """How much the network relies on the marks of --shortcut, and how much its maps say so."""
    densities = [
        f"{title_of(row)} {format_cell(cell, with_interval=False)}"
        for row, cell in marks["density"].items()
    ]
    return (
        f"Does it take the shortcut? Without its mark, the feature of a canvas moves by "
        f"{format_cell(marks['reliance'])} of the mean difference between two canvases (1 − cosine). "
        f"How dense the maps are on the mark, compared with the whole image: {', '.join(densities)}."
    )


def accuracies(cells: dict) -> str:
    """The accuracy of both classifiers, as text."""
    knn = format_percent(cells["knn"])
    return f"k-NN {knn}, linear probe {format_percent(cells['linear_probe'])}"


def format_percent(cell: dict) -> str:
    return "–" if cell["value"] is None else f"{cell['value']:.1%}"


def table_lines(results: list[dict]) -> list[str]:
    """The table of all networks' rows; networks on photographs have one of their own."""
    lines = []
    for columns, key in ((CANVAS_COLUMNS, "matched"), (PHOTO_COLUMNS, "photographs")):
        numbered = [(number, result) for number, result in enumerate(results, 1) if key in result]
        if numbered:
            if lines:
                lines.append("")
            lines += heading_lines(columns, [result[key] for _, result in numbered])
        for number, result in numbered:
            label = f"[{number}] " if len(results) > 1 else ""
            lines += row_lines(columns, result, label)
    return lines


def heading_lines(columns: list[Column], tables: list[dict]) -> list[str]:
    """What stands above the rows of one or several tables."""
    cells = tables[0]["mean"]
    count = max(cell["images"] for cell in cells.values())
    measured = cells[headline(tables[0])]["images"]
    if columns is CANVAS_COLUMNS:
        images = f"{count:,} canvases in the matched layout"
        detail = f", {measured:,} with pairs of equal ink"
    else:
        images = "1 photograph" if count == 1 else f"{count:,} photographs"
        detail = f", SRG of {measured:,}"
    if len(tables) > 1:  # they may differ in this
        detail = ""
    titles = " " * ROW_WIDTH
    groups = titles
    for column in columns:
        if column.group:
            groups = f"{groups:{len(titles)}}{column.group}"  # where its first column begins
        titles += f"{column.title:{column.width}}"
    groups = f"{groups:{len(titles)}}passes of"
    return [
        f"{images}{detail} [95% interval]",
        groups,
        f"{titles}the network",
    ]


def row_lines(columns: list[Column], result: dict, label: str) -> list[str]:
    """The lines of a network in the printed table; with a `label` networks are compared."""
    lines = []
    for row in table_rows(columns, result, is_compared=bool(label)):
        cells = [f"{cell:{column.width}}" for cell, column in zip(row.cells, columns)]
        title = row.title if row.is_heading else f"{label}{row.title}"
        lines.append(f"{title:{ROW_WIDTH}}{''.join(cells)}{row.passes}".rstrip())
    return lines


@dataclass
class Row:
    """A row of the table, as text."""

    title: str
    cells: list[str]  # one for each column; none in a heading
    passes: str = ""  # what the map costs
    name: str = ""  # of the map; a heading has none

    @property
    def is_heading(self) -> bool:
        return not self.cells


def table_rows(columns: list[Column], result: dict, is_compared: bool = False) -> list[Row]:
    """The rows of a network: its maps, the best first, its heads, the controls, and its maps before
    training.

    If networks are compared, each has fewer rows.
    """
    table = measured_table(result)
    best_head = result.get("best_head")
    has_best_head = "head_2" in table and best_head is not None
    if has_best_head:
        has_best_head = table[best_head]["selectivity"]["value"] is not None
    in_order = maps_in_order(table)
    other_rows = [row for row in table if row not in in_order and row not in HIDDEN_ROWS]
    rows = []
    for row in [*in_order, *other_rows]:
        title = title_of(row)
        if row == best_head and has_best_head:
            title += " (selective)"
        if not is_compared or row in COMPARED_ROWS or row == best_head:
            cells = cell_texts(columns, table[row])
            rows.append(Row(title, cells, PASSES.get(row, ""), name_of(row)))
    if "untrained" in result and not is_compared:
        rows.append(Row("before training:", []))
        untrained = result["untrained"]
        for row in [*maps_in_order(untrained), "brightness"]:
            if row in untrained:
                cells = cell_texts(columns, untrained[row])
                rows.append(Row(f"  {title_of(row)}", cells, name=name_of(row)))
    return rows


def cell_texts(columns: list[Column], cells: dict) -> list[str]:
    """The cells of a row, as text."""
    return [format_cell(cells.get(column.metric), column.with_interval) for column in columns]


def columns_of(result: dict) -> list[Column]:
    """The columns of the table that a network's numbers stand in."""
    return CANVAS_COLUMNS if "matched" in result else PHOTO_COLUMNS
