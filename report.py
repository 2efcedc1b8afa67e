"""The text that is printed about networks: an epoch's line, the sentences, and the table.

Two questions are answered. Where does the network look? And which map should you believe, if you
want to know what its feature depends on?
"""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, replace

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
    """Where the network looks, in a sentence or two."""
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
    numbers = (
        f"attention is {format_cell(selectivity)} times as dense on the digit as on the clutter "
        f"(brightness: {brightness:.2f})"
    )
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
        answer = f"At the digit: {numbers}."
        if not is_above(table, "mean", "brightness", "auroc"):
            disagreement = "but brightness ranks the digit's pixels as high"
            answer = f"At parts of the digit: {numbers}, {disagreement}."
    elif is_below_one(selectivity):
        answer = f"At the clutter more than at the digit: {numbers}."
    elif beats_position:
        answer = f"At anything bright: {numbers}."
    else:
        answer = f"Not clearly at the digit: {numbers}; position alone may explain this."

    head = result["best_head"]
    head_does = is_above(table, head, "brightness") and is_above(table, head, "shuffled")
    if head_does and not looks_at_digit:
        cell = format_cell(table[head]["selectivity"])
        answer += f" {as_title(head)} alone: {cell}."
    return f"{question} {answer}"


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
        answer = answer_by_equal_ink(table, rows)
    else:
        answer = answer_by_srg(table, rows)
    has_interval = table[rows[0]][headline(table)]["low"] is not None
    if not has_interval:  # too few images to say anything about attention either
        return f"{question} {answer}"
    return f"{question} {answer} {attention_sentence(result, rows)}"


def answer_by_equal_ink(table: dict, rows: list[str]) -> str:
    """The best map by what maps know about patches with equal ink; `rows` are in order."""
    best = rows[0]
    cell = table[best]["equal_ink"]
    share = f"{cell['value']:.0%} of the time"
    if cell["low"] is None:
        return "There are too few canvases to tell."
    finding = f"of two patches with equal ink it picks the one that matters more {share}"
    if cell["low"] <= 0.5:
        return (
            f"None clearly: {title_of(best)} is the best, and {finding}, not clearly more than by "
            f"chance."
        )
    if not is_above(table, best, "brightness", "equal_ink"):
        return (
            f"None clearly: {title_of(best)} is the best, and {finding}, but brightness "
            f"({headline_value(table, 'brightness')}) is not clearly worse."
        )
    return f"{as_title(best)}: {finding}. {cheaper_map(table, rows)}"


def answer_by_srg(table: dict, rows: list[str]) -> str:
    """The best map by how it stands up when patches are left out in its order; `rows` in order."""
    best = rows[0]
    cell = table[best]["srg"]
    if cell["low"] is None:
        return "These are too few pictures to tell."
    control = maps_in_order(table, PHOTO_CONTROLS)[0]
    of_control = f"{title_of(control)}, which knows nothing of the network"
    of_control += f" ({decimal(table[control]['srg']['value'])})"
    if not is_above(table, best, control, "srg"):
        return (
            f"None clearly: {title_of(best)} is the best (SRG {decimal(cell['value'])}), but not "
            f"clearly better than {of_control}."
        )
    return (
        f"{as_title(best)}: if patches are left out in its order, the feature moves soonest (SRG "
        f"{decimal(cell['value'])}), sooner than in that of {of_control}. "
        f"{cheaper_map(table, rows)}"
    )


def as_title(row: str) -> str:
    """The title of a row, at the beginning of a sentence."""
    title = title_of(row)
    return title[0].upper() + title[1:]


def headline_value(table: dict, row: str) -> str:
    """The value by which maps are compared, as text."""
    metric = headline(table)
    value = table[row][metric]["value"]
    return f"{value:.0%}" if metric == "equal_ink" else decimal(value)


def cheapest_of(rows: list[str]) -> str:
    """The best map that costs one forward pass; `rows` are in order."""
    return next(row for row in rows if PASSES[row] == ONE_PASS)


def cheaper_map(table: dict, rows: list[str]) -> str:
    """A sentence on the best map that costs one forward pass; `rows` are in order."""
    metric = headline(table)
    best = rows[0]
    cheapest = cheapest_of(rows)
    if best == cheapest:
        return "It costs one forward pass."
    gap = table[best][metric]["value"] - table[cheapest][metric]["value"]
    quality = "nearly as good" if gap < NEARLY else "next"
    value = headline_value(table, cheapest)
    return f"{as_title(cheapest)} ({value}) is {quality} and costs one forward pass."


def attention_sentence(result: dict, rows: list[str]) -> str:
    """What share of the effects attention of the last block can see; `rows` are in order."""
    if len(result["direct_share"]) == 1:
        return "The network has a single block, so all effects pass straight into it."
    table = measured_table(result)
    value = ""
    if "mean" in rows and cheapest_of(rows) != "mean":  # else the answer names it, if any map
        value = f" ({headline_value(table, 'mean')})"
    share = f"{result['direct_share'][-1]['value']:.0%} of the effects"
    correlation = table["mean"]["direct_faithfulness"]["value"]
    if (correlation or 0) < DESCRIBES:
        return (
            f"Attention{value} hardly describes even what passes straight into the last block, "
            f"{share}."
        )
    return f"Attention{value} describes only what passes straight into the last block, {share}."


def epoch_text(config: Config, line: dict) -> str:
    """The printed line of an epoch."""
    validation = line["validation"]
    parts = [f"loss {line['loss']:.3f}"]
    selectivity = validation["mean"].get("selectivity")
    if selectivity:  # photographs have none
        brightness = validation["brightness"]["selectivity"]
        parts.append(f"selectivity {selectivity:.2f} (brightness {brightness:.2f})")
    parts.append(f"cosine {validation['mean_cosine']:.2f}")
    if config.loss == "dino":
        parts.append(f"teacher's mean entropy {validation['mean_entropy']:.2f} ln K")
        parts.append(f"entropy of its mean {validation['entropy_of_mean']:.2f} ln K")
    minutes_left = (config.epochs - line["epoch"]) * line["seconds"] / 60
    parts.append(f"{line['images_per_second']:.0f} images/s")
    parts.append(f"{minutes_left:.1f} min left")
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
# The controls that are printed below the maps; metrics.json and the explorer have more.
PRINTED_CONTROLS = ("brightness", "shuffled", "contrast", "centre", "other_network")
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
    lines.append(f"Every metric is in {path}; docs/metrics.md says what they mean.")
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
        lines += textwrap.wrap(text, LINE_WIDTH, break_on_hyphens=False)
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
        texts.insert(1, marks_sentence(result))
    return texts


def marks_sentence(result: dict) -> str:
    """Whether the network relies on the marks of --shortcut, and how much its maps say so.

    A mark hides what lies under it, so no network is at 0. The measure is the network before
    training.
    """
    question = "Does it take the shortcut?"
    marks = result["marks"]
    if result["collapse"] or marks["reliance"]["value"] is None:
        return f"{question} This cannot be told: all canvases have nearly the same feature."
    answer = " Without"
    before = ""
    if "untrained_marks" in result:
        table = {"mean": marks, "untrained": result["untrained_marks"]}
        is_relied_on = is_above(table, "mean", "untrained", "reliance")
        answer = " Yes: without" if is_relied_on else " Not clearly: without"
        untrained = format_cell(table["untrained"]["reliance"], with_interval=False)
        before = f" (before training: {untrained})"
    densities = [
        f"{title_of(row)} {format_cell(cell, with_interval=False)}"
        for row, cell in marks["density"].items()
    ]
    return (
        f"{question}{answer} its mark, a canvas's feature moves by "
        f"{format_cell(marks['reliance'])} of the difference between two canvases{before}. Density "
        f"on the mark (uniform: 1): {', '.join(densities)}."
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
        if not numbered:
            continue
        if lines:
            lines.append("")
        lines += heading_lines(columns)
        for number, result in numbered:
            label = f"[{number}] " if len(results) > 1 else ""
            for row in printed_rows(columns, result):
                lines.append(row_line(columns, row, label))
        lines.append(images_line(columns, [result[key] for _, result in numbered]))
    return lines


def heading_lines(columns: list[Column]) -> list[str]:
    """What stands above the rows of a table."""
    titles = " " * ROW_WIDTH
    groups = titles
    for column in columns:
        if column.group:
            groups = f"{groups:{len(titles)}}{column.group}"  # where its first column begins
        titles += f"{column.title:{column.width}}"
    groups = f"{groups:{len(titles)}}passes of"
    return [groups, f"{titles}the network"]


@dataclass
class Row:
    """A row of a table, as text."""

    title: str
    cells: list[str]  # one for each column; none in a heading
    passes: str = ""  # what the map costs
    name: str = ""  # of the map; a heading has none

    @property
    def is_heading(self) -> bool:
        return not self.cells


def row_line(columns: list[Column], row: Row, label: str = "") -> str:
    """A row of the table, as a line of text."""
    cells = [f"{cell:{column.width}}" for cell, column in zip(row.cells, columns)]
    return f"{label + row.title:{ROW_WIDTH}}{''.join(cells)}{row.passes}".rstrip()


def images_line(columns: list[Column], tables: list[dict]) -> str:
    """What the numbers of one or several tables are of."""
    cells = tables[0]["mean"]
    count = max(cell["images"] for cell in cells.values())
    measured = cells[headline(tables[0])]["images"]
    if columns is CANVAS_COLUMNS:
        images = f"{count:,} canvases"
        detail = f", {measured:,} with pairs of equal ink"
    else:
        images = "1 photograph" if count == 1 else f"{count:,} photographs"
        detail = f", SRG of {measured:,}"
    if len(tables) > 1:  # they may differ in this
        detail = ""
    if all(table["mean"][headline(table)]["low"] is None for table in tables):
        return f"{images}{detail}."
    return f"{images}{detail}; [95% over these images]: other seeds differ by more."


def make_row(columns: list[Column], table: dict, row: str, title: str | None = None) -> Row:
    """A row of a network's table as text; `title` is another one than usual."""
    cells = [format_cell(table[row].get(column.metric), column.with_interval) for column in columns]
    return Row(title or title_of(row), cells, PASSES.get(row, ""), name_of(row))


def printed_rows(columns: list[Column], result: dict) -> list[Row]:
    """The rows that are printed: the maps, the best first, controls, attention before training."""
    table = measured_table(result)
    in_order = maps_in_order(table)
    others = [row for row in (*NETWORK_ROWS, *PRINTED_CONTROLS) if row in table]
    others = [row for row in others if row not in in_order]
    rows = [make_row(columns, table, row) for row in [*in_order, *others]]
    if "untrained" in result:
        rows.append(make_row(columns, result["untrained"], "mean", "attention, untrained"))
    return rows


def table_rows(columns: list[Column], result: dict) -> list[Row]:
    """All rows: the maps, the best first, heads, controls, and the maps before training."""
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
        rows.append(make_row(columns, table, row, title))
    if "untrained" in result:
        rows.append(Row("before training:", []))
        untrained = result["untrained"]
        for row in [*maps_in_order(untrained), "brightness"]:
            if row in untrained:
                of_untrained = make_row(columns, untrained, row, f"  {title_of(row)}")
                rows.append(replace(of_untrained, passes=""))
    return rows


def columns_of(result: dict) -> list[Column]:
    """The columns of the table that a network's numbers stand in."""
    return CANVAS_COLUMNS if "matched" in result else PHOTO_COLUMNS
