"""The page shows what Python computed, and its own network computes the same.

Tests that open the page need a Chromium and are skipped without one.
"""

import base64
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, find_chromium
from helpers import DIGITS, SHIPPED, blacken, model_of

import clutter
import effects
import evaluate
import explain
import explorer
import gallery
import metrics
import report
import views
from gallery import Example, LookedAt
from vit import VisionTransformer, ViTShape

NAMES = [*explain.NETWORK_MAPS, "brightness", "effect", "heads"]
needs_browser = pytest.mark.skipif(not find_chromium(), reason="there is no Chromium to open it")


# ---------------------------------------------------------------------------------- what is shown


def small_model(
    background: str = "black", image_size: int = 28, has_marks: bool = False, **shape
) -> gallery.Model:
    """A network with random weights of a good size, and settings of its own."""
    usual = {"patch_size": 7, "dim": 24, "depth": 3, "heads": 2, "pos_size": image_size}
    torch.manual_seed(0)
    backbone = VisionTransformer(ViTShape(**usual | shape), init_std=0.3).eval()
    with torch.no_grad():
        for weight in backbone.parameters():  # so that a forgotten bias or scale is seen
            weight += 0.1 * torch.randn_like(weight)
    model = model_of(SHIPPED / "different.pth")
    model.backbone = backbone
    model.config.image_size = image_size
    model.config.background = background
    model.has_marks = has_marks
    return model


def content_of(model: gallery.Model, examples: list[Example], names=NAMES) -> dict:
    maps = gallery.maps_of_examples(model.backbone, examples, names)
    return explorer.network_content(model, {"": LookedAt(model, examples, maps)}, None)


def photographs(count: int = 2, size: tuple = (42, 28)) -> list[Example]:
    """Pictures of noise, as they come from files of 8 bits."""
    rng = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (count, 3, *size), generator=rng)
    return [Example(picture / 255, name=f"photo {i}") for i, picture in enumerate(pixels)]


def unpacked(entry: dict) -> np.ndarray:
    dtype = {"u8": np.uint8, "u16": np.uint16, "f32": np.float32}[entry["type"]]
    return np.frombuffer(zlib.decompress(base64.b64decode(entry["data"])), dtype)


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


@pytest.mark.parametrize("image_size, canvas_size", [(56, 64), (28, 100), (56, 40), (32, 32)])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_canvases_are_resized_by_one_matrix(image_size, canvas_size):
    model = model_of(SHIPPED / "different.pth")
    model.config.image_size = image_size
    model.config.canvas_size = canvas_size
    canvas = torch.rand(1, 1, canvas_size, canvas_size, generator=torch.Generator().manual_seed(0))
    matrix = explorer.resize_matrix(model)
    expected = views.resize(canvas, image_size)
    torch.testing.assert_close(matrix @ canvas @ matrix.T, expected, atol=1e-5, rtol=1e-5)


def test_the_page_holds_the_maps_and_their_correlations():
    model = small_model()
    examples = gallery.example_images(model, 2)
    maps = gallery.maps_of_examples(model.backbone, examples, NAMES)
    network = LookedAt(model, examples, maps)
    content = explorer.network_content(model, {"": network}, None)
    for of_picture, of_example in zip(content["epochs"][0]["pictures"], maps):
        names = [entry["name"] for entry in of_picture["maps"]]
        assert names == [*explain.NETWORK_MAPS, "brightness", "effect"]
        for entry in of_picture["maps"]:
            values = of_example.maps[entry["name"]].flatten()
            np.testing.assert_array_equal(unpacked(entry["values"]), values)
            assert entry.get("correlation") == of_example.correlations.get(entry["name"])


def test_a_map_that_cannot_be_ranked_has_no_correlation():
    example = Example(torch.zeros(1, 28, 28), (torch.zeros(28, 28, dtype=torch.bool),) * 2)
    model = small_model()
    maps = gallery.maps_of_examples(model.backbone, [example], ["attention", "effect"])
    entries = explorer.maps_content(maps[0])
    assert entries[0]["correlation"] is None
    assert "correlation" not in entries[1]


def test_a_network_whose_feature_is_not_a_number_is_named():
    model = small_model()
    model.name = "broken.pth"
    with torch.no_grad():
        model.backbone.norm.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match="broken.pth: the feature is NaN"):
        content_of(model, photographs(1, (28, 28)), ["brightness"])


def test_small_networks_run_in_the_page_and_large_ones_do_not(monkeypatch):
    model = small_model()
    examples = gallery.example_images(model, 1)
    weights = sum(weight.numel() for weight in model.backbone.parameters())
    monkeypatch.setattr(explorer, "MOST_WEIGHTS", 4 * weights)
    content = content_of(model, examples, ["attention"])
    assert content["epochs"][0]["net"]["dim"] == 24
    assert content["epochs"][0]["pictures"][0]["attention"] is None
    assert content["pictures"][0]["pixels"] is None  # the page renders the scene
    assert len(content["scenes"]) == 1

    monkeypatch.setattr(explorer, "MOST_WEIGHTS", 4 * weights - 1)
    content = content_of(model, examples, ["attention"])
    assert content["epochs"][0]["net"] is None
    assert content["scenes"] == content["digits"] == content["fragments"] == []
    assert unpacked(content["pictures"][0]["pixels"]).max() > 200


def test_networks_that_would_be_slow_do_not_run_in_the_page(monkeypatch):
    model = small_model()
    example = gallery.example_images(model, 1)
    # 17 tokens of width 24: 3 blocks, each 12 · 17 · 24² and 2 · 17² · 24
    monkeypatch.setattr(explorer, "MOST_MULTIPLICATIONS", 3 * (12 * 17 * 576 + 2 * 289 * 24))
    assert explorer.runs_in_page([model.backbone], example)
    assert not explorer.runs_in_page([model.backbone], [*example, *photographs(1, (35, 28))])


def test_networks_with_rotary_positions_do_not_run_in_the_page():
    """The page's own program does not know them, so it shows what was computed here."""
    model = small_model(rotary=True)
    examples = gallery.example_images(model, 1)
    assert not explorer.runs_in_page([small_model().backbone, model.backbone], examples)
    content = content_of(model, examples, ["attention"])
    assert content["epochs"][0]["net"] is None
    assert content["epochs"][0]["pictures"][0]["attention"] is not None


def test_the_epochs_of_a_run_share_the_room_for_weights(monkeypatch):
    model = small_model()
    examples = gallery.example_images(model, 1)
    maps = gallery.maps_of_examples(model.backbone, examples, ["attention"])
    weights = sum(weight.numel() for weight in model.backbone.parameters())
    monkeypatch.setattr(explorer, "MOST_WEIGHTS", 7 * weights)
    network = LookedAt(model, examples, maps)
    two = explorer.network_content(model, {"epoch 1": network, "epoch 2": network}, None)
    assert [epoch["label"] for epoch in two["epochs"]] == ["epoch 1", "epoch 2"]
    assert [epoch["net"] for epoch in two["epochs"]] == [None, None]


def test_attention_is_thinned_out_until_it_fits():
    model = small_model(image_size=56)
    picture = gallery.example_images(model, 1)[0].picture
    whole = explorer.packed_attention(model.backbone, picture, 10**9)
    assert whole["patches"]["mean"]["stride"] == whole["patches"]["heads"]["stride"] == 1
    budget = explorer.characters(whole["patches"]) // 2
    thinned = explorer.packed_attention(model.backbone, picture, budget)
    assert thinned["patches"]["mean"]["stride"] == 1
    assert thinned["patches"]["heads"]["stride"] > 1
    assert explorer.characters(thinned["patches"]) <= budget
    _, of_patches = explain.token_attention(model.backbone, picture[None])
    stack = thinned["patches"]["heads"]
    assert len(stack["rows"]) == len(stack["columns"]) < 8
    kept = of_patches[0].view(2, 8, 8, 64)[:, stack["rows"]][:, :, stack["columns"]].flatten(0, 2)
    values = unpacked(thinned["patches"]["heads"]["values"]).reshape(kept.shape) / 255
    maxima = unpacked(thinned["patches"]["heads"]["maxima"])[:, None]
    np.testing.assert_allclose(values * maxima, kept, atol=float(kept.max()) / 500)


def test_the_page_says_what_was_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(explorer, "MOST_WEIGHTS", 0)
    monkeypatch.setattr(explorer, "MOST_ATTENTION", 4000)
    model = small_model(image_size=56)
    content = content_of(model, gallery.example_images(model, 1), ["attention"])
    explorer.write_page([content], tmp_path / "a.html", ["One more thing."])
    notes = data_of((tmp_path / "a.html").read_text())["notes"]
    strides = content["epochs"][0]["pictures"][0]["attention"]["patches"]
    heads = strides["heads"]["stride"]
    assert f"(each head: one patch in {heads} × {heads})" in notes[0]
    assert notes[1] == "One more thing."


def test_every_map_and_every_column_is_explained():
    assert set(explain.MAPS) | {"effect"} == set(explorer.MAP_HELP)
    columns = [*report.CANVAS_COLUMNS, *report.PHOTO_COLUMNS]
    assert {column.metric for column in columns} == set(explorer.METRIC_HELP)


def test_the_table_has_the_rows_of_the_report_and_more(few_images):
    model = model_of(SHIPPED / "different.pth")
    result = evaluate.evaluate(
        model.name, model.config, model.history, model.backbone, model.splits
    ).result
    table = explorer.table_content(result)
    assert table["columns"][0]["text"] == "equal ink"
    assert all(len(row["cells"]) in (0, len(table["columns"])) for row in table["rows"])
    rows = {row["text"]: row["cells"] for row in table["rows"]}
    assert {"random", "before training:"} <= rows.keys()
    assert sum(title.startswith("head ") for title in rows) == 3
    lines = report.format_report([result], "metrics.json").splitlines()
    maps = ["attention", "rollout", "norm rollout", "squared gradient"]
    for title in [*maps, "brightness", "shuffled"]:
        (line,) = [line for line in lines if line.startswith(f"{title}  ")]
        assert line.split() == " ".join([title, *rows[title]]).split()
    (line,) = [line for line in lines if line.startswith("attention, untrained")]
    assert line.endswith("1 forward")  # the page leaves this out
    assert line.split()[2:-2] == " ".join(rows["  attention"]).split()
    explained = {row["text"]: row["help"] for row in table["rows"]}
    assert explained["squared gradient"] == explorer.MAP_HELP["squared_gradient"]
    of_first = "On 16 test canvases; the pictures above are the first of them"
    assert explorer.measured_on(result, model) == f"{of_first}."
    model.has_marks = True
    of_marked = f"{of_first}. Except for what is said about the shortcut, they had no marks."
    assert explorer.measured_on(result, model) == of_marked


def test_the_glossary_has_the_words_that_are_used():
    model = small_model()
    content = content_of(model, gallery.example_images(model, 1), ["rollout", "centre"])
    terms = {entry["term"]: entry["text"] for entry in explorer.glossary([content])}
    assert terms["rollout"] == explorer.MAP_HELP["rollout"]
    assert "centre" in terms
    assert "norm rollout" not in terms
    assert "SRG" not in terms
    assert "mark" not in terms
    content["table"] = {"columns": [{"text": "SRG", "help": "a gap"}]}
    (srg,) = [entry for entry in explorer.glossary([content]) if entry["term"] == "SRG"]
    assert srg["text"] == "a gap"
    model.has_marks = True
    content = content_of(model, gallery.example_images(model, 1), [])
    assert "mark" in {entry["term"] for entry in explorer.glossary([content])}


def test_networks_share_the_scenes_that_are_alike():
    model = small_model()
    other = small_model(depth=1)
    third = small_model(background="texture")
    contents = [
        content_of(one, gallery.example_images(one, 2), []) for one in (model, other, third)
    ]
    scenes, networks = explorer.shared_scenes(contents)
    assert len(scenes) == 4
    numbers = [[picture["scene"] for picture in network["pictures"]] for network in networks]
    assert numbers == [[0, 1], [0, 1], [2, 3]]


HOSTILE = [
    "</script><script>document.body.innerHTML='broken'</script>.png",
    "<img src=x onerror=alert(1)>\"'&amp;<!--.jpg",
    "猫 🐈 \u202egnp.png",
]


def test_hostile_names_do_not_end_the_script(tmp_path):
    model = small_model()
    examples = photographs(len(HOSTILE), (28, 28))
    for example, name in zip(examples, HOSTILE):
        example.name = name
    model.name = HOSTILE[0]
    explorer.write_page([content_of(model, examples, ["attention"])], tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    template = Path(explorer.TEMPLATE).read_text(encoding="utf-8")
    assert page.count("<script") == template.count("<script")
    assert page.count("<!--") == template.count("<!--")
    network = data_of(page)["networks"][0]
    assert network["name"] == HOSTILE[0]
    assert [picture["name"] for picture in network["pictures"]] == HOSTILE


# ------------------------------------------------------------------------------- in a real browser


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def open_page(browser: Browser, folder, contents: list[dict]):
    """Open the page, from its file; nothing may be printed, and nothing else asked for."""
    path = folder / "explorer.html"
    explorer.write_page(contents, path)
    browser.messages.clear()
    browser.requests.clear()
    browser.open(path.as_uri())
    assert browser.messages == []
    assert browser.requests == [path.as_uri()]


def in_page(browser: Browser, expression: str) -> np.ndarray:
    """A typed array, or a list of numbers, that the page computes."""
    return np.array(browser.evaluate(f"Array.from({expression})"))


def finished(browser: Browser, generator: str) -> np.ndarray:
    """What a generator of the page returns at its end."""
    loop = f"(() => {{ const job = {generator}; let step; do step = job.next(); while (!step.done);"
    return in_page(browser, f"{loop} return step.value; }})()")


@pytest.fixture(
    params=[
        {},
        {"registers": 3, "depth": 1, "heads": 3, "mlp_ratio": 1},
        {"background": "texture", "image_size": 42, "pos_size": 28},
        {"background": "texture", "image_size": 42, "pos_size": 28, "has_marks": True},
    ],
    ids=["plain", "registers", "texture", "marks"],
)
def any_model(request) -> gallery.Model:
    return small_model(**request.param)


@needs_browser
def test_the_networks_features_and_maps_are_torchs(browser, tmp_path, any_model):
    model = any_model
    backbone = model.backbone
    examples = gallery.example_images(model, 3)
    open_page(browser, tmp_path, [content_of(model, examples)])
    for number, example in enumerate(examples):
        browser.evaluate(f"openPicture({number})")
        images = example.picture[None]
        np.testing.assert_allclose(
            in_page(browser, "shown.image.pixels"), images.flatten(), atol=1e-5
        )
        with torch.no_grad():
            feature = effects.feature_of(backbone, images)[0]
            attention = backbone.get_last_selfattention(views.normalize(images))
        np.testing.assert_allclose(in_page(browser, "shown.run.feature"), feature, atol=1e-4)
        last = in_page(browser, "shown.run.blocks.at(-1).attention")
        np.testing.assert_allclose(last, attention.flatten(), atol=1e-5)

        live = {
            "attention": "attentionMap(weights(), shown.run.blocks.at(-1), 0)",
            "rollout": "followBack(weights(), shown.run, rolloutFactor)",
            "norm_rollout": "followBack(weights(), shown.run, normFactor)",
            "brightness": "brightnessMap(shown.image, weights().patch)",
        }
        for name, expression in live.items():
            expected = explain.MAPS[name](backbone, images)[0]
            np.testing.assert_allclose(in_page(browser, expression), expected, atol=1e-4)
        squared = finished(
            browser, "squaredGradientMap(weights(), shown.run, network().directions)"
        )
        expected = explain.squared_gradient(backbone, images)[0]
        np.testing.assert_allclose(squared, expected, atol=1e-4)

        ink = torch.stack(example.masks).any(0)[None]
        has_ink = metrics.patch_sums(ink, backbone.shape.patch_size) > 0
        np.testing.assert_array_equal(in_page(browser, "shown.hasInk"), has_ink[0])
        expected = effects.blackening_effects(backbone, images, has_ink, feature[None])[0]
        effect = finished(browser, "effectsOf(weights(), shown, null)")
        np.testing.assert_allclose(effect, expected, atol=1e-4)


def marks_on_the_digit(config, count, number, split_name) -> dict:
    """As `views.evaluation_marks`, but the mark hides a part of the digit."""
    params = next(views.evaluation_params(config, DIGITS[split_name], count, "matched", split_name))
    return {
        "has_mark": torch.ones(count, dtype=torch.bool),
        "mark_level": torch.full((count,), 0.3),
        "mark_corner": params["position"] + 10,
    }


@needs_browser
def test_a_mark_is_on_top_and_is_the_first_to_be_removed(browser, tmp_path, monkeypatch):
    model = small_model(has_marks=True)
    monkeypatch.setattr(views, "evaluation_marks", marks_on_the_digit)
    marked = gallery.example_images(model, 1)
    content = content_of(model, marked)
    model.has_marks = False
    (plain,) = gallery.example_images(model, 1)
    open_page(browser, tmp_path, [content])

    def image() -> np.ndarray:
        browser.wait_for("!lookIsDue")
        return in_page(browser, "shown.image.pixels")

    np.testing.assert_allclose(image(), marked[0].picture.flatten(), atol=1e-5)
    corner = browser.evaluate("scene.clutter.at(-1).at")
    top, left = corner
    masks = {}
    for name in ("digit", "clutter"):
        mask = in_page(browser, f"shown.masks.{name}").reshape(64, 64)
        masks[name] = mask[top : top + 9, left : left + 9]
    assert masks["clutter"].all()  # a mark counts as clutter, whatever it hides
    assert not masks["digit"].any()
    place = [(start + 4) / 64 for start in corner]
    assert browser.evaluate(f"partAt({place}) === scene.clutter.at(-1)")
    # A fragment that is added later lies under it, and what is drawn lies on top.
    browser.evaluate("addClutter()")
    browser.evaluate(f"scene.clutter.at(-1).at = {corner}; edited()")
    assert browser.evaluate(f"partAt({place}) === scene.clutter.at(-2)")
    browser.evaluate("undo()")
    before = image()
    browser.evaluate(f"brush({place}, {place})")
    assert image().max() > 0.6 > before.reshape(28, 28)[tuple(int(28 * at) for at in place)]
    browser.evaluate("Object.assign(scene, {drawn: scene.drawn.fill(0)}); edited()")
    browser.evaluate("$('remove').click()")
    np.testing.assert_allclose(image(), plain.picture.flatten(), atol=1e-5)
    browser.evaluate("$('add').click()")  # a fragment, which is no mark
    assert browser.evaluate("scene.clutter.at(-1).level === null")

    # Without fragments the mark can be removed, and nothing can be added.
    model.has_marks = True
    model.config.num_distractors = 0
    open_page(browser, tmp_path, [content_of(model, gallery.example_images(model, 1))])
    assert browser.evaluate("[$('add').hidden, $('remove').hidden]") == [True, False]
    browser.evaluate("$('remove').click()")
    assert browser.evaluate("[scene.clutter.length, $('remove').hidden]") == [0, True]


@needs_browser
def test_photographs_are_left_out_in_windows(browser, tmp_path):
    model = small_model(image_size=28, registers=1)
    examples = photographs(2, (84, 70))  # 12 × 10 patches in windows of 2 × 2
    open_page(browser, tmp_path, [content_of(model, examples)])
    for number, example in enumerate(examples):
        browser.evaluate(f"openPicture({number})")
        images = example.picture[None]
        np.testing.assert_array_equal(
            in_page(browser, "shown.image.pixels").astype(np.float32), images.flatten()
        )
        feature = effects.feature_of(model.backbone, images)[0].detach()
        np.testing.assert_allclose(in_page(browser, "shown.run.feature"), feature, atol=1e-4)
        expected = effects.window_effects(model.backbone, images, [0])[0, 0]
        expected = expected[effects.window_of_patches((12, 10))]
        effect = finished(browser, "effectsOf(weights(), shown, data.windows['12x10'])")
        np.testing.assert_allclose(effect, expected, atol=1e-4)
        # the page compares maps with effects window by window
        shares = in_page(
            browser,
            "unitsOfEffect().map((patches) => patches.reduce((a, k) => a + currentMap()[k], 0))",
        )
        attention = explain.attention(model.backbone, images)
        expected = effects.window_sums(attention, (12, 10))[0]
        np.testing.assert_allclose(shares, expected, atol=1e-5)
        assert "window of 4 patches" in browser.evaluate("$('scatter-hint').textContent")
        assert "of 30" in browser.evaluate("$('patch-numbers').textContent")
    assert browser.evaluate("$('scene-tools').hidden && !$('lab').hidden")


@needs_browser
def test_erasing_a_patch_moves_the_feature_as_explained(browser, tmp_path):
    model = model_of(SHIPPED / "different.pth")
    examples = gallery.example_images(model, 2)
    maps = gallery.maps_of_examples(model.backbone, examples, NAMES)
    open_page(browser, tmp_path, [content_of(model, examples)])
    effect = maps[0].maps["effect"].flatten()
    browser.evaluate("$('erase-effect').click()")
    browser.wait_for("isEdited && !lookIsDue")
    assert browser.evaluate("state.patch") == effect.argmax()
    cosine = browser.evaluate("dot(shown.run.feature, originalRun.feature)")
    assert cosine == pytest.approx(1 - effect.max().item(), abs=1e-3)
    assert f"{cosine:.4f}" in browser.evaluate("$('feature-numbers').textContent")
    # the others are recomputed once the reader pauses
    browser.wait_for("mapOf('effect') && mapOf('squared_gradient')")
    image = examples[0].picture[None].clone()
    image = blacken(image, effect.argmax()[None], model.backbone.shape.patch_size)
    expected = explain.squared_gradient(model.backbone, image)[0]
    np.testing.assert_allclose(in_page(browser, "mapOf('squared_gradient')"), expected, atol=1e-4)

    browser.evaluate("$('reset').click()")
    assert browser.evaluate("dot(shown.run.feature, originalRun.feature)") == pytest.approx(
        1, abs=1e-6
    )
    assert browser.evaluate("isEdited") is False


def point_on_view(browser: Browser, down: float, across: float) -> tuple[float, float]:
    """Pixels of the window, of a place in the view from (0, 0) to (1, 1)."""
    box = browser.evaluate("JSON.parse(JSON.stringify($('view').getBoundingClientRect()))")
    return box["x"] + across * box["width"], box["y"] + down * box["height"]


@needs_browser
def test_the_map_follows_the_digit_that_is_dragged(browser, tmp_path):
    model = model_of(SHIPPED / "different.pth")
    open_page(browser, tmp_path, [content_of(model, gallery.example_images(model, 2))])
    scene = browser.evaluate("({size: scene.size, at: scene.digit.at})")
    browser.evaluate("scene.clutter.length = 0; edited()")
    browser.wait_for("!lookIsDue")
    size = scene["size"]
    target = [size - 28 if corner < (size - 28) / 2 else 0 for corner in scene["at"]]
    before = in_page(browser, "currentMap()").reshape(8, 8)
    browser.mouse("mouseMoved", *point_on_view(browser, 0.01, 0.01))
    start = [(corner + 14) / size for corner in scene["at"]]
    end = [(corner + 14) / size for corner in target]
    browser.mouse("mousePressed", *point_on_view(browser, *start))
    for step in range(1, 6):
        place = [a + (b - a) * step / 5 for a, b in zip(start, end)]
        browser.mouse("mouseMoved", *point_on_view(browser, *place))
    browser.mouse("mouseReleased", *point_on_view(browser, *end))
    browser.wait_for("!lookIsDue")
    at = browser.evaluate("scene.digit.at")
    assert np.abs(np.subtract(at, target)).max() <= 1
    after = in_page(browser, "currentMap()").reshape(8, 8)
    places = np.indices((8, 8)).reshape(2, -1)
    moved = places @ after.flatten() - places @ before.flatten()  # of the map's centre, in patches
    expected = np.subtract(at, scene["at"]) / size * 8
    # the digit has most of the map, but not all of it
    assert moved @ expected > 0.5 * (expected @ expected)
    assert np.abs(expected).max() > 1.5


@needs_browser
def test_things_are_added_removed_drawn_and_swapped(browser, tmp_path):
    model = model_of(SHIPPED / "different.pth")
    open_page(browser, tmp_path, [content_of(model, gallery.example_images(model, 1))])
    assert browser.evaluate("$('gallery').hidden")  # a single picture

    def ink() -> int:
        browser.wait_for("!lookIsDue")
        return browser.evaluate("shown.masks.clutter.reduce((a, b) => a + b)")

    pieces = browser.evaluate("scene.clutter.length")
    before = ink()
    for _ in range(pieces):
        browser.evaluate("$('remove').click()")
    assert before > 0
    assert ink() == 0
    for _ in range(3):
        browser.evaluate("$('add').click()")
    assert browser.evaluate("scene.clutter.length") == 3
    added = ink()
    assert added > 0

    browser.evaluate("[...$('tools').children].find((tool) => tool.textContent === 'Draw').click()")
    browser.mouse("mousePressed", *point_on_view(browser, 0.95, 0.1))
    browser.mouse("mouseMoved", *point_on_view(browser, 0.95, 0.5))
    browser.mouse("mouseReleased", *point_on_view(browser, 0.95, 0.5))
    assert ink() > added

    label = browser.evaluate("scene.digit.label")
    other = next(digit for digit in range(10) if digit != label)
    browser.evaluate(f"$('digit').value = '{other}'; $('digit').onchange({{target: $('digit')}})")
    browser.wait_for("!lookIsDue")
    labels = model.splits["test"].labels
    digit = model.splits["test"].images[(labels == other).nonzero()[0, 0]]
    row, column = browser.evaluate("scene.digit.at")
    mask = in_page(browser, "shown.masks.digit").reshape(64, 64)
    np.testing.assert_array_equal(
        mask[row : row + 28, column : column + 28], digit > clutter.INK_LEVEL
    )


@needs_browser
def test_the_keyboard_moves_the_patch_and_chooses_head_and_block(browser, tmp_path):
    model = small_model()
    open_page(browser, tmp_path, [content_of(model, gallery.example_images(model, 1))])
    browser.evaluate("state.patch = 5; draw(); $('view').focus()")
    for key, patch in (("ArrowRight", 6), ("ArrowDown", 10), ("ArrowLeft", 9), ("ArrowUp", 5)):
        browser.key(key)
        assert browser.evaluate("state.patch") == patch
    assert "row 2, column 2" in browser.evaluate("$('patch-numbers').textContent")
    for _ in range(4):  # the rim is the end
        browser.key("ArrowUp")
    assert browser.evaluate("state.patch") == 1

    browser.key("2")
    browser.key("b")
    assert browser.evaluate("[state.head, state.block]") == [2, 1]
    expected = "headMap(weights(), shown.run.blocks[1], 0, 1)"
    np.testing.assert_array_equal(in_page(browser, "currentMap()"), in_page(browser, expected))
    browser.key("7")  # there is no such head
    browser.key("n")
    browser.key("n")
    browser.key("0")
    assert browser.evaluate("[state.head, state.block]") == [0, 2]
    browser.key("e")
    browser.wait_for("!lookIsDue")
    assert browser.evaluate("[...scene.erased]") == [1]
    assert browser.messages == []


@needs_browser
def test_any_token_may_be_asked_where_it_attends(browser, tmp_path):
    model = small_model(registers=2)
    example = gallery.example_images(model, 1)[0]
    open_page(browser, tmp_path, [content_of(model, [example])])
    of_tokens, of_patches = explain.token_attention(model.backbone, example.picture[None])
    browser.evaluate("$('queries').children[2].click()")  # [CLS], register 1, register 2, patch
    expected = of_tokens[0, -1, :, 2].mean(0)
    np.testing.assert_allclose(in_page(browser, "currentMap()"), expected, atol=1e-5)
    browser.evaluate("$('queries').children[3].click(); $('heads').children[2].click()")
    browser.mouse("mouseMoved", *point_on_view(browser, 0.6, 0.9))
    assert browser.evaluate("state.patch") == 2 * 4 + 3
    expected = of_patches[0, 1, 11]
    np.testing.assert_allclose(in_page(browser, "currentMap()"), expected, atol=1e-5)


@needs_browser
@pytest.mark.parametrize("has_masks", [True, False])
def test_a_large_networks_maps_are_stored(browser, tmp_path, monkeypatch, has_masks):
    monkeypatch.setattr(explorer, "MOST_WEIGHTS", 0)
    model = small_model(registers=1)
    examples = gallery.example_images(model, 2) if has_masks else photographs(2, (28, 42))
    maps = gallery.maps_of_examples(model.backbone, examples, NAMES)
    open_page(browser, tmp_path, [content_of(model, examples)])
    assert browser.evaluate("$('lab').hidden && $('meter').hidden")
    assert browser.evaluate("$('outlines-label').hidden") is not has_masks
    browser.evaluate("openPicture(1)")
    of_tokens, of_patches = explain.token_attention(model.backbone, examples[1].picture[None])

    def assert_shown(expected):
        # each head is rounded to a share of its own maximum
        tolerance = float(expected.max()) / 100
        np.testing.assert_allclose(in_page(browser, "currentMap()"), expected, atol=tolerance)

    for name in [*explain.NETWORK_MAPS, "brightness", "effect"]:
        browser.evaluate(f"state.map = '{name}'; draw()")
        assert_shown(maps[1].maps[name].flatten())
        correlation = maps[1].correlations.get(name)
        hint = browser.evaluate("$('scatter-hint').textContent")
        if correlation is not None:
            assert f"Rank correlation: {correlation:.2f}" in hint
    browser.evaluate("Object.assign(state, {map: 'attention', head: 2, block: 1, query: '1'})")
    assert_shown(of_tokens[0, 1, 1, 1])
    browser.evaluate("Object.assign(state, {head: 0, block: 2, query: 'patch', patch: 7}); draw()")
    assert_shown(of_patches[0, :, 7].mean(0))
    browser.evaluate("Object.assign(state, {head: 1}); draw()")
    assert_shown(of_patches[0, 0, 7])
    browser.evaluate("Object.assign(state, {block: 0}); draw()")
    assert browser.evaluate("currentMap()") is None
    assert "only the attention of [CLS]" in browser.evaluate("$('map-hint').textContent")
    assert browser.messages == []


@needs_browser
def test_a_slider_goes_through_the_epochs(browser, tmp_path):
    models = [small_model(), small_model()]
    with torch.no_grad():
        models[0].backbone.cls_token += 1
    examples = gallery.example_images(models[0], 2)
    epochs = {}
    for label, model in zip(("epoch 1", "epoch 2"), models):
        maps = gallery.maps_of_examples(model.backbone, examples, NAMES)
        epochs[label] = LookedAt(model, examples, maps)
    open_page(browser, tmp_path, [explorer.network_content(models[1], epochs, None)])
    assert browser.evaluate("$('epoch-label').textContent") == "epoch 2"
    images = examples[0].picture[None]
    for number in (0, 1):
        browser.evaluate(f"$('epoch').value = {number}; $('epoch').oninput({{target: $('epoch')}})")
        assert browser.evaluate("$('epoch-label').textContent") == f"epoch {number + 1}"
        expected = explain.attention(models[number].backbone, images)[0]
        np.testing.assert_allclose(in_page(browser, "currentMap()"), expected, atol=1e-5)


@needs_browser
def test_another_network_looks_at_what_the_reader_has_changed(browser, tmp_path):
    first = small_model()
    second = small_model(depth=1)
    examples = gallery.example_images(first, 2)
    open_page(browser, tmp_path, [content_of(one, examples) for one in (first, second)])
    browser.evaluate("openPicture(1); eraseTop(currentMap())")
    browser.wait_for("!lookIsDue")
    patch = browser.evaluate("state.patch")
    browser.evaluate("$('network').value = 1; $('network').onchange({target: $('network')})")
    browser.wait_for("!lookIsDue")
    assert browser.evaluate("isEdited && [...scene.erased][0]") == patch
    image = blacken(examples[1].picture[None], torch.tensor([patch]), 7)
    expected = explain.attention(second.backbone, image)[0]
    np.testing.assert_allclose(in_page(browser, "currentMap()"), expected, atol=1e-5)
    # it is compared with its own feature of the picture as it was
    features = [
        effects.feature_of(second.backbone, one)[0] for one in (image, examples[1].picture[None])
    ]
    cosine = (features[0] * features[1]).sum().item()
    assert browser.evaluate("dot(shown.run.feature, originalRun.feature)") == pytest.approx(
        cosine, abs=1e-5
    )


@needs_browser
def test_what_was_moved_stays_where_it_is_in_another_grid(browser, tmp_path):
    """Erased patches are numbers of one grid, so with them all begins anew."""
    first = small_model(image_size=56)
    second = small_model(image_size=56, patch_size=14)
    contents = [content_of(one, gallery.example_images(one, 1)) for one in (first, second)]
    open_page(browser, tmp_path, contents)
    before = browser.evaluate("scene.digit.at")
    browser.evaluate("scene.digit.at = [0, 36]; state.patch = 63; edited()")
    browser.wait_for("!lookIsDue")
    browser.evaluate("openNetwork(1)")
    assert browser.evaluate("[isEdited, ...scene.digit.at, state.patch]") == [True, 0, 36, 15]
    browser.evaluate("toggleErased(3)")
    browser.wait_for("!lookIsDue")
    browser.evaluate("openNetwork(0)")
    assert browser.evaluate("[isEdited, scene.erased.size, ...scene.digit.at]") == [
        False,
        0,
        *before,
    ]
    assert "Nothing is changed yet" in browser.evaluate("$('feature-numbers').textContent")
    assert browser.messages == []


@needs_browser
def test_changes_of_a_canvas_can_be_taken_back_at_another_epoch(browser, tmp_path):
    model = small_model()
    examples = gallery.example_images(model, 1)
    maps = gallery.maps_of_examples(model.backbone, examples, NAMES)
    network = LookedAt(model, examples, maps)
    content = explorer.network_content(model, {"epoch 1": network, "epoch 2": network}, None)
    open_page(browser, tmp_path, [content])
    pieces = browser.evaluate("scene.clutter.length")
    browser.evaluate("$('add').click(); openEpoch(0)")
    assert browser.evaluate("[scene.clutter.length, $('undo').disabled]") == [pieces + 1, False]
    browser.evaluate("$('undo').click()")
    browser.wait_for("!lookIsDue")
    assert browser.evaluate("scene.clutter.length") == pieces


@needs_browser
def test_a_finger_that_scrolls_erases_nothing(browser, tmp_path):
    model = small_model()
    open_page(browser, tmp_path, [content_of(model, gallery.example_images(model, 1))])
    browser.evaluate("state.tool = 'erase'; showControls()")
    event = "Object.assign(placeEvent, {button: 0, pointerId: 1})"
    browser.evaluate(
        "$('view').setPointerCapture = () => {};"
        "const box = $('view').getBoundingClientRect();"
        "const placeEvent = {clientX: box.left + 9, clientY: box.top + 9};"
        f"pointerDown({event})"
    )
    assert browser.evaluate("scene.erased.size") == 1
    browser.evaluate("$('view').onpointercancel()")
    assert browser.evaluate("[scene.erased.size, drag]") == [0, None]


@needs_browser
def test_a_click_that_moves_nothing_changes_nothing(browser, tmp_path):
    model = small_model()
    open_page(browser, tmp_path, [content_of(model, gallery.example_images(model, 1))])
    row, column = browser.evaluate("scene.digit.at")
    place = point_on_view(browser, (row + 14) / 64, (column + 14) / 64)
    browser.mouse("mousePressed", *place)
    browser.mouse("mouseReleased", *place)
    assert browser.evaluate("[isEdited, $('undo').disabled]") == [False, True]


@needs_browser
def test_a_feature_of_zero_has_no_effects(browser, tmp_path):
    model = small_model()
    with torch.no_grad():
        model.backbone.norm.weight.zero_()
        model.backbone.norm.bias.zero_()
    open_page(browser, tmp_path, [content_of(model, gallery.example_images(model, 1))])
    browser.evaluate("toggleErased(unitsOfEffect()[0][0])")
    browser.wait_for("!lookIsDue && mapOf('effect')")
    assert not np.isnan(in_page(browser, "mapOf('effect')").astype(float)).any()
    assert "NaN" not in browser.evaluate("document.body.innerText")
    assert browser.messages == []


@needs_browser
@pytest.mark.parametrize("size, side", [(40, 54), (64, 164), (100, 198), (64, 56)])
def test_ink_is_found_where_torch_finds_it(browser, tmp_path, size, side):
    model = small_model()
    open_page(browser, tmp_path, [content_of(model, gallery.example_images(model, 1))])
    for row in range(size):
        mask = torch.zeros(1, 1, size, size)
        mask[0, 0, row, row] = 1
        resized = views.resize_masks(mask, side)
        expected = metrics.patch_sums(resized[:, 0], 2)[0] > 0
        found = in_page(
            browser,
            f"(() => {{ const digit = new Uint8Array({size * size}); digit[{row * size + row}] = 1;"
            f"const masks = {{digit, clutter: new Uint8Array({size * size}), height: {size}}};"
            f"return findInk(masks, {{side: {side}, patch: 2}}); }})()",
        )
        np.testing.assert_array_equal(found, expected)


@needs_browser
def test_pictures_of_other_shapes_and_networks_follow_each_other(browser, tmp_path, monkeypatch):
    """Whatever was chosen, and while effects are still due, the next picture is shown whole."""
    live = small_model(heads=3, registers=1)
    examples = [*photographs(1, (70, 42)), *photographs(1, (28, 14))]
    contents = [content_of(live, examples)]
    monkeypatch.setattr(explorer, "MOST_WEIGHTS", 0)
    stored = small_model(heads=1, depth=1)
    contents.append(content_of(stored, examples))
    open_page(browser, tmp_path, contents)
    browser.evaluate("Object.assign(state, {query: 'patch', patch: 59, head: 3, block: 0}); draw()")
    browser.evaluate("toggleErased(59); openPicture(1)")
    browser.wait_for("!lookIsDue")
    assert browser.evaluate("[isEdited, currentMap().length, state.patch < 8]") == [False, 8, True]
    assert in_page(browser, "currentMap()").sum() == pytest.approx(1, abs=1e-5)
    browser.evaluate("toggleErased(1)")
    browser.wait_for("!lookIsDue")
    browser.evaluate("openNetwork(1)")
    assert "Erase" not in browser.evaluate("$('lead').textContent")
    assert browser.evaluate("[state.head, state.block, state.query]") == [0, 0, "cls"]
    browser.evaluate("new Promise((resume) => setTimeout(resume, 400))")  # the effects were due
    assert browser.messages == []


@needs_browser
def test_a_live_page_computes_the_maps_that_were_not_asked_for(browser, tmp_path):
    model = small_model()
    example = gallery.example_images(model, 1)[0]
    open_page(browser, tmp_path, [content_of(model, [example], ["attention", "effect"])])
    names = browser.evaluate("[...$('maps').children].map((button) => button.textContent)")
    assert names == [
        "attention",
        "rollout",
        "norm rollout",
        "squared gradient",
        "brightness",
        "effect",
    ]
    browser.wait_for("mapOf('effect') && mapOf('squared_gradient')")
    expected = explain.squared_gradient(model.backbone, example.picture[None])[0]
    np.testing.assert_allclose(in_page(browser, "mapOf('squared_gradient')"), expected, atol=1e-4)


@needs_browser
def test_without_clutter_none_is_offered(browser, tmp_path):
    model = small_model()
    model.config.num_distractors = 0
    open_page(browser, tmp_path, [content_of(model, gallery.example_images(model, 1))])
    assert browser.evaluate("$('add').hidden && $('remove').hidden && !$('digit').hidden")
    assert browser.evaluate("shown.masks.clutter.every((pixel) => pixel === 0)")


@needs_browser
def test_everything_may_be_erased(browser, tmp_path):
    model = small_model()
    open_page(browser, tmp_path, [content_of(model, gallery.example_images(model, 1))])
    browser.evaluate("for (let k = 0; k < 16; k++) scene.erased.add(k); edited()")
    browser.wait_for("!lookIsDue && mapOf('effect')")
    assert browser.evaluate("$('erase-map').disabled && $('erase-effect').disabled")
    assert "no ink" in browser.evaluate("$('patch-numbers').textContent")
    browser.evaluate("eraseTop(currentMap())")  # there is nothing left to erase
    assert browser.evaluate("scene.erased.size") == 16
    assert browser.messages == []


@needs_browser
def test_only_the_left_button_changes_the_scene(browser, tmp_path):
    model = small_model()
    open_page(browser, tmp_path, [content_of(model, gallery.example_images(model, 1))])
    browser.evaluate("state.tool = 'erase'; showControls()")
    x, y = point_on_view(browser, 0.1, 0.1)
    for button, count in (("right", 0), ("left", 1)):
        for kind in ("mousePressed", "mouseReleased"):
            browser.send(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1
            )
        assert browser.evaluate("scene.erased.size") == count


@needs_browser
def test_every_change_can_be_taken_back(browser, tmp_path):
    model = small_model()
    open_page(browser, tmp_path, [content_of(model, gallery.example_images(model, 1))])
    assert browser.evaluate("$('undo').disabled")
    pixels = [in_page(browser, "shown.image.pixels")]
    x, y = point_on_view(browser, 0.9, 0.1)
    drawing = "state.tool = 'draw'; showControls()"
    changes = ["$('add').click()", "$('remove').click()", "toggleErased(5)", drawing]
    changes.append("$('digit').value = 3; $('digit').onchange({target: $('digit')})")
    for change in changes:
        browser.evaluate(change)
        if change == drawing:
            for kind in ("mousePressed", "mouseReleased"):
                browser.mouse(kind, x, y)
        browser.wait_for("!lookIsDue")
        pixels.append(in_page(browser, "shown.image.pixels"))
        assert not np.array_equal(pixels[-1], pixels[-2]), change
    for expected in reversed(pixels[:-1]):
        browser.evaluate("$('undo').click()")
        browser.wait_for("!lookIsDue")
        np.testing.assert_array_equal(in_page(browser, "shown.image.pixels"), expected)
    assert browser.evaluate("$('undo').disabled")


@needs_browser
def test_patches_are_erased_by_rubbing_over_them(browser, tmp_path):
    model = small_model()
    open_page(browser, tmp_path, [content_of(model, gallery.example_images(model, 1))])
    browser.evaluate("state.tool = 'erase'; showControls()")
    for places, erased in (((0.1, 0.4, 0.6), [0, 1, 2]), ((0.4, 0.9), [0, 2])):
        browser.mouse("mousePressed", *point_on_view(browser, 0.1, places[0]))
        for place in places[1:]:
            browser.mouse("mouseMoved", *point_on_view(browser, 0.1, place))
        browser.mouse("mouseReleased", *point_on_view(browser, 0.1, places[-1]))
        assert browser.evaluate("[...scene.erased].sort()") == erased


@needs_browser
def test_a_dot_leads_to_its_patch(browser, tmp_path):
    model = small_model()
    open_page(browser, tmp_path, [content_of(model, gallery.example_images(model, 1))])
    inky = browser.evaluate("unitsOfEffect().map(([patch]) => patch)")
    for number, patch in enumerate(inky):
        dots = "document.querySelectorAll('#scatter circle')"
        browser.evaluate(f"{dots}[{number}].dispatchEvent(new MouseEvent('click'))")
        assert browser.evaluate("state.patch") == patch


@needs_browser
def test_a_quick_stroke_is_a_line(browser, tmp_path):
    model = small_model()
    open_page(browser, tmp_path, [content_of(model, gallery.example_images(model, 1))])
    browser.evaluate("brush([0.2, 0.1], [0.2, 0.9])")
    drawn = in_page(browser, "scene.drawn").reshape(64, 64)
    row = int(0.2 * 64)
    assert (drawn[row, 7:57] == 255).all()
    assert drawn[row + 4].max() == drawn[row - 4].max() == 0
    assert drawn[row, 62:].max() == 0


@needs_browser
def test_arrow_keys_scroll_once_the_view_is_out_of_sight(browser, tmp_path):
    model = small_model()
    open_page(browser, tmp_path, [content_of(model, gallery.example_images(model, 1))])
    browser.evaluate("document.body.style.paddingBottom = '3000px'; state.patch = 5; draw()")
    browser.evaluate("window.scrollTo(0, 2500)")
    browser.key("ArrowDown")
    assert browser.evaluate("state.patch") == 5
    browser.evaluate("window.scrollTo(0, 0)")
    browser.key("ArrowDown")
    assert browser.evaluate("state.patch") == 9


@needs_browser
def test_the_table_stands_under_its_groups(browser, tmp_path, few_images):
    model = model_of(SHIPPED / "different.pth")
    result = evaluate.evaluate(
        model.name, model.config, model.history, model.backbone, model.splits
    ).result
    examples = gallery.example_images(model, 1)
    maps = gallery.maps_of_examples(model.backbone, examples, NAMES)
    content = explorer.network_content(model, {"": LookedAt(model, examples, maps)}, result)
    open_page(browser, tmp_path, [content])
    groups = browser.evaluate(
        "[...$('table').rows[0].cells].map((c) => [c.textContent, c.colSpan])"
    )
    assert groups == [["", 1], ["", 1], ["rank correlation with", 3], ["on the digit", 2], ["", 1]]
    titles = browser.evaluate("[...$('table').rows[1].cells].map((cell) => cell.textContent)")
    assert titles[2:5] == ["patches", "objects", "direct"]
    first = browser.evaluate("[...$('table').rows[2].cells].map((cell) => cell.textContent)")
    row = content["table"]["rows"][0]
    assert first == [row["text"], *row["cells"]]


@needs_browser
def test_hostile_names_are_shown_as_text(browser, tmp_path):
    model = small_model()
    examples = photographs(len(HOSTILE), (28, 28))
    for example, name in zip(examples, HOSTILE):
        example.name = name
    model.name = HOSTILE[0]
    open_page(browser, tmp_path, [content_of(model, examples), content_of(model, examples)])
    titles = browser.evaluate("[...$('gallery').children].map((button) => button.title)")
    assert titles == HOSTILE
    assert browser.evaluate("$('network').options[1].textContent") == HOSTILE[0]
    assert browser.evaluate("document.images.length") == 0
    for number in range(len(HOSTILE)):
        browser.evaluate(f"openPicture({number})")
        assert HOSTILE[number] in browser.evaluate("$('view').getAttribute('aria-label')")
    assert browser.messages == []


@needs_browser
def test_rank_correlations_share_ties(browser, tmp_path):
    model = small_model()
    open_page(browser, tmp_path, [content_of(model, gallery.example_images(model, 1), [])])
    rng = torch.Generator().manual_seed(0)
    for values in ([10, 10], [3, 10], [2, 30]):
        a, b = (torch.randint(high, (12,), generator=rng).float() for high in values)
        expected = metrics.spearman(a, b, torch.ones(12, dtype=torch.bool)).item()
        found = browser.evaluate(f"rankCorrelation({a.tolist()}, {b.tolist()})")
        assert found == pytest.approx(expected, abs=1e-6)
    assert browser.evaluate("rankCorrelation([1], [2])") is None
    assert browser.evaluate("rankCorrelation([1, 1], [2, 3])") == 0
