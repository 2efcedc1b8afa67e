"""The pages show what study.json holds, and study.json holds what its commands produce."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import data
import evaluate
import observe
import settings
import views
import vit
import weights

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "results"))

import study
import verdicts

CLAIMS = verdicts.CLAIMS


@pytest.fixture(scope="module")
def committed():
    return study.read_study()


# ------------------------------------------------------------------ the committed pages and lines


@pytest.mark.parametrize("page", ["README.md", "claims.md", "tables.md"])
def test_the_pages_show_what_the_runs_give(committed, page):
    text = (ROOT / "results" / page).read_text()
    blocks = study.page_blocks(committed)
    assert verdicts.fill_page(text, blocks) == text
    # A number that somebody changes by hand is restored.
    written = "\n".join(blocks.values())
    lines = [line for line in text.splitlines() if line.startswith("|") and " [" in line]
    lines = [line for line in lines if line in written]
    assert len(lines) >= 5
    changed = text.replace(lines[-1], lines[-1] + "9")
    assert verdicts.fill_page(changed, blocks) == text


def test_every_block_has_its_place_on_a_page(committed):
    pages = [
        (ROOT / "results" / name).read_text() for name in ("README.md", "claims.md", "tables.md")
    ]
    for name in study.page_blocks(committed):
        assert sum(f"<!-- {name} -->" in page for page in pages) == 1, name


def test_every_run_can_be_traced(committed):
    """Each line has the command that the grid gives it, without any folder of the machine."""
    for preset, runs in committed.items():
        args = study.parse_args(["--preset", preset])
        rows = study.grid(preset, runs)
        for (row, seed), line in runs.items():
            job = study.Job(row, seed, rows[row].flags)
            assert study.is_done(args, job, runs), job
            assert line["device"]
            assert line["precision"]
            assert line["versions"]["torch"]
            assert len(line["weights"]) == 64
            assert len(line["curve"]) > 10
            for word in shlex.split(line["command"]):
                assert not word.startswith("/")


def best_searched_row(lines, base, metric):
    """The row with the best learning rate of a search, which must not be at an edge."""
    rows = {}
    values = {}
    for line in lines:
        name, _, factor = line["row"].partition("-lr-")
        if name == base and line["seed"] == 0:
            rows[float(factor or 1)] = line["row"]
            values[float(factor or 1)] = line["curve"][-1]["mean"][metric]
    best_factor = max(values, key=values.get)
    assert min(values) < best_factor < max(values)
    return rows[best_factor]


def recomputed_primaries(lines, seeds):
    """The sixteen primary quantities by seed, straight from the lines of study.json."""

    def values(row, measure):
        chosen = [line for line in lines if line["row"] == row and line["seed"] in seeds]
        return {line["seed"]: measure(line) for line in chosen}

    def map_values(row, metric, map_name="mean"):
        return values(row, lambda line: line["matched"][map_name][metric])

    def log_ratio(over, under):
        return {seed: np.log(over[seed] / under[seed]) for seed in over.keys() & under.keys()}

    def difference(over, under):
        return {seed: over[seed] - under[seed] for seed in over.keys() & under.keys()}

    def share_of_heads_past_ink(line):
        heads = [cells for name, cells in line["matched"].items() if name.startswith("head_")]
        return np.mean([head["far_background_density"] > 1 for head in heads])

    def selectivity_of_best_head(line):
        return line["matched"][line["best_head"]]["selectivity"]

    def probe_over_untrained(row):
        trained = values(row, lambda line: line["features"]["linear_probe"])
        untrained = values(row, lambda line: line["untrained_features"]["linear_probe"])
        return log_ratio(trained, untrained)

    def diversity(epoch):
        return values("different-long", lambda line: line["curve"][epoch]["mean"]["diversity"])

    def mean(quantity):
        return np.mean(list(quantity.values())) if quantity else -np.inf

    selectivity_different = map_values("different", "selectivity")
    selectivity_same = map_values("same", "selectivity")
    brightness_selectivity = map_values("same", "selectivity", "brightness")
    faithfulness_different = map_values("different", "patch_faithfulness")
    objects_different = map_values("different", "object_faithfulness")
    objects_same = map_values("same", "object_faithfulness")
    objects_brightness = map_values("different", "object_faithfulness", "brightness")
    rollout_faithfulness = map_values("different", "patch_faithfulness", "rollout")
    past_ink = values("different", share_of_heads_past_ink)
    past_ink_without_registers = values("different-registers-0", share_of_heads_past_ink)
    probe_nce = probe_over_untrained("same")
    probe_dino = probe_over_untrained("dino-same")
    auroc_nce = map_values(best_searched_row(lines, "same", "auroc"), "auroc")
    auroc_dino = map_values(best_searched_row(lines, "dino-same", "auroc"), "auroc")
    best_batch_32 = best_searched_row(lines, "batch-32", "selectivity")
    best_batch_256 = best_searched_row(lines, "batch-256", "selectivity")
    selectivity_batch_32 = map_values(best_batch_32, "selectivity")
    selectivity_batch_256 = map_values(best_batch_256, "selectivity")
    texture = map_values("texture", "far_background_density")
    best_of_3_heads = values("different", selectivity_of_best_head)
    best_of_6_heads = values("heads-6", selectivity_of_best_head)
    return {
        "F1": difference(objects_different, objects_brightness),
        "F2": difference(objects_different, objects_same),
        "F3": difference(rollout_faithfulness, faithfulness_different),
        "F4": difference(past_ink, past_ink_without_registers),
        "C1": min(probe_nce, probe_dino, key=mean),
        "C2": log_ratio(auroc_nce, auroc_dino),
        "C3": log_ratio(selectivity_same, brightness_selectivity),
        "C4": {seed: np.log(density) for seed, density in texture.items()},
        "C5": log_ratio(selectivity_different, selectivity_same),
        "C6": difference(diversity(epoch=-1), diversity(epoch=1)),
        "C7": log_ratio(map_values("same-4", "selectivity"), map_values("same-1", "selectivity")),
        "C8": log_ratio(map_values("different", "auroc"), map_values("size-28", "auroc")),
        "C9": log_ratio(selectivity_different, map_values("supervised", "selectivity")),
        "Q1": log_ratio(selectivity_batch_256, selectivity_batch_32),
        "Q2": log_ratio(best_of_6_heads, best_of_3_heads),
        "Q3": log_ratio(map_values("pretrained", "selectivity"), selectivity_same),
    }


def test_the_primaries_recomputed_in_numpy(committed):
    lines = json.loads(study.STUDY_FILE.read_text())
    expected = recomputed_primaries(lines, seeds=range(10, 20))
    second_sample = recomputed_primaries(lines, seeds=range(30, 60))
    for name in ("F1", "F2", "C8", "Q2"):
        if len(second_sample[name]) == 30:
            expected[name] = second_sample[name]
    judged = verdicts.judge(committed["laptop"])
    assert expected.keys() == judged.keys() == CLAIMS.keys()
    for name, quantity in expected.items():
        primary = verdicts.primary(committed["laptop"], CLAIMS[name])
        assert primary == pytest.approx(quantity, abs=1e-9), name
        values = np.array(list(quantity.values()))
        assert judged[name].seeds == len(values)
        if len(values) >= 5:
            interval = judged[name].interval
            # scipy returns nan for a standard error of 0, which F4 has.
            standard_error = max(stats.sem(values), 1e-300)
            ends = stats.t.interval(0.95, len(values) - 1, values.mean(), standard_error)
            assert (interval.low, interval.high) == pytest.approx(ends, abs=1e-9)


@pytest.mark.parametrize("row", ["same", "different"])
def test_the_small_checkpoints_attend_as_their_runs_do(row, committed):
    path = ROOT / "results" / "checkpoints" / f"{row}.pth"
    assert path.stat().st_size < 4e6
    checkpoint = weights.read_checkpoint(str(path))
    assert all(tensor.dtype == torch.float16 for tensor in checkpoint["teacher"].values())

    # It is the run of median selectivity among the twenty of the study of maps.
    runs = committed["laptop"]
    selectivity = verdicts.sample(runs, row, verdicts.SELECTIVITY, range(70, 90))
    seed = checkpoint["config"]["seed"]
    assert len(selectivity) == 20
    assert sum(value > selectivity[seed] for value in selectivity.values()) == 9

    # Its history is the one in study.json.
    assert checkpoint["epoch"] == 10
    last_validation = checkpoint["metrics"][-1]["validation"]["mean"]["selectivity"]
    last_point = runs[row, seed]["curve"][-1]["mean"]["selectivity"]
    assert last_validation == pytest.approx(last_point, rel=1e-5)

    # Its network looks at digits that it has not been trained on.
    config = settings.config_from_checkpoint(checkpoint["config"])
    network = vit.build_network(config)
    teacher = {name: tensor.float() for name, tensor in checkpoint["teacher"].items()}
    network.load_state_dict(teacher)
    splits, _, _ = data.load_digits("sklearn")
    batches = views.evaluation_batches(config, splits["test"], 200)
    observation = observe.observe({"trained": network.backbone}, batches)
    mean_map = evaluate.measure_attention(observation, resamples=0)["mean"]
    assert mean_map["digit_density"]["value"] > 3
    assert mean_map["background_density"]["value"] < 3


def test_pages_are_not_emptied_if_there_are_no_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "STUDY_FILE", tmp_path / "study.json")
    monkeypatch.setattr(study, "write_pages", lambda runs: pytest.fail("the pages were written"))
    assert study.main(["--tables"]) == 2
    assert "study.json has no runs; the pages stay as they are" in capsys.readouterr().err


def test_the_small_checkpoints_are_those_of_the_median_seeds(tmp_path, monkeypatch):
    runs = {}
    for row, best_seed in (("same", 70), ("different", 89)):
        for seed in (*range(10, 20), *range(70, 90)):
            selectivity = 2 - 0.01 * abs(seed - best_seed)
            runs[row, seed] = {"matched": {"mean": {"selectivity": selectivity}}}
    checkpoint = {"config": {"digits": "mnist"}, "epoch": 1, "metrics": [], "teacher": {}}
    for row, seed in (("same", 79), ("different", 80)):  # the tenth best of each
        folder = tmp_path / f"laptop/{row}/seed-{seed}"
        folder.mkdir(parents=True)
        torch.save(checkpoint | {"epoch": seed}, folder / "ckpt.pth")
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    study.save_small_checkpoints(study.parse_args(["--runs", str(tmp_path)]), runs)
    for row, seed in (("same", 79), ("different", 80)):
        small = torch.load(tmp_path / f"checkpoints/{row}.pth")
        assert small["epoch"] == seed
        assert small["config"] == {"digits": "auto", "data_root": "data"}


# ----------------------------------------------------------------------------------- the grid


def config_of_row(preset, name, row):
    """The settings that train.py makes of the command of a row."""
    args = study.parse_args(["--preset", preset, "--device", "cpu"])
    command = study.train_command(args, study.Job(name, 0, row.flags))
    _, _, flags = command.partition("train.py ")
    train_args = settings.parse_args(shlex.split(flags))
    return settings.make_config(train_args.flags, train_args.preset)


def crops_fed_to_student(config):
    plan = views.crop_plan(config.views, config.crops, config.symmetric)
    return len(plan.student)


@pytest.mark.parametrize("preset", ["laptop", "paper"])
def test_rows_differ_from_the_preset_only_in_what_they_compare(preset):
    rows = study.grid(preset, {})
    # train.py accepts the flags of every row.
    configs = {name: config_of_row(preset, name, row) for name, row in rows.items()}
    default = settings.make_config(preset=preset)
    may_differ = {
        "loss",
        "views",
        "crops",
        "background",
        "shortcut",
        "registers",
        "heads",
        "depth",
        "image_size",
        "weights",
        "batch_size",
        "micro_batch",
        "lr",
        "epochs",
        "images_per_epoch",
        "digits",
        "pos_size",
        "precision",
        "device",
    }
    for name, config in configs.items():
        default_values = dataclasses.asdict(default)
        for setting, value in dataclasses.asdict(config).items():
            assert value == default_values[setting] or setting in may_differ, (name, setting)
        # Only DINO's loss sees more images an epoch.
        if config.images_per_epoch != default.images_per_epoch:
            assert (config.loss, config.images_per_epoch) == ("dino", 12_800), name

    main_rows = ("different", "same", "supervised")
    crop_counts = {crops_fed_to_student(configs[name]) for name in main_rows}
    if preset == "laptop":
        assert crop_counts == {2}
        assert {claim for row in rows.values() for claim in row.claims} == set(study.ALL_CLAIMS)
    else:
        assert len(crop_counts) == 2


def test_no_run_starts_from_weights_that_are_not_there_yet():
    args = study.parse_args(["--only", "Q3"])
    rows = [job.row for job in study.jobs_to_do(args, runs={})]
    assert "pretraining" in rows
    assert "pretrained" not in rows
    pretraining = study.Job("pretraining", 0, study.GRID["pretraining"].flags)
    runs = {("pretraining", 0): {"command": study.train_command(args, pretraining)}}
    jobs = [(job.row, job.seed) for job in study.jobs_to_do(args, runs)]
    assert ("pretraining", 0) not in jobs
    assert ("pretrained", 10) in jobs


def test_a_run_whose_marks_were_not_measured_is_done_again(committed):
    args = study.parse_args(["--only", "M8"])
    runs = dict(committed["laptop"])
    key = ("shortcut-50", 70)
    assert key not in [(job.row, job.seed) for job in study.jobs_to_do(args, runs)]
    runs[key] = {name: value for name, value in runs[key].items() if name != "marks"}
    assert key in [(job.row, job.seed) for job in study.jobs_to_do(args, runs)]


def search_runs(base, values):
    """The runs of a search, from {factor of the learning rate: value on validation canvases}."""
    runs = {}
    for factor, value in values.items():
        last_epoch = {"mean": {"selectivity": value, "auroc": value}}
        runs[verdicts.rate_row(base, factor), 0] = {"curve": [last_epoch]}
    return runs


def test_a_search_goes_on_until_the_best_rate_is_not_at_an_edge():
    assert study.grid("laptop", {})["batch-32"].seeds == [0]
    runs = search_runs("batch-32", {0.5: 1.1, 1: 1.2, 2: 1.3})
    rows = study.grid("laptop", runs)
    assert verdicts.best_row(runs, "batch-32") is None
    assert rows["batch-32-lr-4"].seeds == [0]
    assert "--batch-size 32 --lr 0.002" in rows["batch-32-lr-4"].flags

    runs |= search_runs("batch-32", {4: 1.25})
    rows = study.grid("laptop", runs)
    assert verdicts.best_row(runs, "batch-32") == "batch-32-lr-2"
    assert "batch-32-lr-8" not in rows
    assert rows["batch-32-lr-2"].seeds == [0, *range(10, 20)]
    assert rows["batch-32"].seeds == [0]


def test_a_rate_that_diverges_does_not_stop_a_search():
    # Twice the rate diverged, so it has no line.
    runs = search_runs("batch-256", {0.5: 1.3, 1: 1.2})
    assert study.grid("laptop", runs)["batch-256-lr-0.25"].seeds == [0]
    runs |= search_runs("batch-256", {0.25: 1.25})
    rows = study.grid("laptop", runs)
    assert "batch-256-lr-2" not in rows
    assert "batch-256-lr-0.125" not in rows
    assert rows["batch-256-lr-0.5"].seeds == [0, *range(10, 20)]


# --------------------------------------------------------------------------------- the verdicts


@pytest.mark.parametrize(
    "name,low,high,word",
    [
        # more
        ("C5", 0.01, 0.5, "holds"),
        ("C5", -0.5, -0.01, "the contrary holds"),
        ("C5", -0.05, 0.09, "no relevant effect"),  # ln 1.1 is .095
        ("C5", -0.05, 0.2, "undecided"),
        # alike
        ("C3", -0.09, 0.09, "holds"),
        ("C3", 0.1, 0.2, "the contrary holds"),
        ("C3", -0.2, -0.1, "the contrary holds"),
        ("C3", 0.05, 0.2, "undecided"),
        # less
        ("C4", -0.2, -0.1, "holds"),
        ("C4", 0.1, 0.2, "the contrary holds"),
        # no less
        ("F3", -0.01, 0.3, "holds"),
        ("F3", -0.3, -0.03, "the contrary holds"),
        ("F3", -0.03, 0.3, "undecided"),
    ],
)
def test_an_interval_decides_the_verdict(name, low, high, word):
    assert verdicts.verdict_word(CLAIMS[name], low, high) == word


@pytest.mark.parametrize("name", CLAIMS)
def test_p_is_below_5_percent_where_the_interval_decides(name):
    claim = CLAIMS[name]
    noise = np.array([-0.05, 0.03, -0.02, 0.05, 0.01, -0.02])
    for mean in np.linspace(-0.3, 0.3, 61):
        p, _ = verdicts.p_values(claim, mean + noise)
        interval = verdicts.t_interval(mean + noise)
        word = verdicts.verdict_word(claim, interval.low, interval.high)
        if claim.expected == "alike":  # the contrary of "no difference" has no p
            assert (p < 0.05) == (word == "holds")
        elif word != "no relevant effect":  # which may be significant all the same
            assert (p < 0.05) == (word in ("holds", "the contrary holds"))


def test_exact_p_counts_the_signs_that_do_as_well():
    assert verdicts.p_by_flips([1.0, 2.0, 3.0]) == 1 / 8
    # The sums 4.5, 2.5 and 1.5 are no less than the 1.5 of the data.
    assert verdicts.p_by_flips([1.0, 2.0, -1.5]) == 3 / 8
    for sign in (1, -1):
        values = sign * np.array([0.1, 0.2, 0.3, 0.2, 0.1])
        p, flip_p = verdicts.p_values(CLAIMS["C5"], values)
        assert p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
        assert flip_p == 2 / 32
    assert verdicts.p_values(CLAIMS["F4"], [0.0] * 5) == (1, 1)


def test_holm_corrects_for_all_sixteen_claims():
    p_values = {"F1": 0.004, "F2": 0.001, "C5": 0.0041, "Q1": None, "Q3": 0.9}
    judged = {name: verdicts.Verdict(seeds=5, p=p) for name, p in p_values.items()}
    verdicts.set_holm_p(judged, claims=16)
    assert judged["F2"].holm_p == pytest.approx(16 * 0.001)
    assert judged["F1"].holm_p == pytest.approx(15 * 0.004)
    # 14 × .0041 would be less than the corrected p of a smaller p.
    assert judged["C5"].holm_p == pytest.approx(15 * 0.004)
    assert judged["Q3"].holm_p == 1
    assert judged["Q1"].holm_p is None


def test_the_forecast_is_the_first_number_of_seeds_that_decides():
    values = [0.1, -0.1, 0.12, 0.2, -0.05]
    claim = CLAIMS["C5"]
    forecast = verdicts.forecast(claim, values)
    assert forecast.word == "holds"

    def word_with(seeds):
        half_width = stats.t.ppf(0.975, seeds - 1) * np.std(values, ddof=1) / seeds**0.5
        mean = np.mean(values)
        return verdicts.verdict_word(claim, mean - half_width, mean + half_width)

    assert word_with(forecast.seeds) == "holds"
    assert word_with(forecast.seeds - 1) == "undecided"
    contrary = verdicts.forecast(CLAIMS["F2"], [-0.1, -0.2, -0.3, -0.2, -0.1, 0.3])
    assert contrary.word == "the contrary holds"


def test_the_table_of_verdicts_says_how_sure_they_are(monkeypatch):
    values = {
        "F1": [0.1, 0.2, 0.15, 0.12, 0.2],
        "F4": [0.0] * 5,
        "C5": [0.1, -0.1, 0.12, 0.2, -0.05],
    }
    values = {CLAIMS[name]: dict(enumerate(numbers)) for name, numbers in values.items()}
    monkeypatch.setattr(verdicts, "primary", lambda runs, claim: values.get(claim, {}))
    judged = verdicts.judge({})
    assert judged["Q1"] == verdicts.Verdict(seeds=0, word="open")
    assert judged["C5"].word == "undecided"
    assert judged["F1"].holm_p == pytest.approx(16 * judged["F1"].p)
    lines = {line.split(" | ")[0]: line for line in verdicts.verdict_table({}).splitlines()}
    assert "**open** |" in lines["| Q1"]
    assert "**undecided** so far (all seeds alike) |" in lines["| F4"]
    seeds = judged["C5"].forecast.seeds
    assert f"**undecided** so far (as it is, {seeds} seeds: holds): its size" in lines["| C5"]
    # Flipping the signs of five values cannot give a p below .06, so the tests disagree.
    assert "**holds** so far ¹: chosen after the fact" in lines["| F1"]
    assert "[figure](figures/F1.png)" in lines["| F1"]


def test_a_second_sample_counts_alone_once_it_is_complete(monkeypatch):
    first = {10: 0.1, 11: -0.1, 12: 0.12, 13: 0.2, 14: -0.05}
    second = {seed: 0.3 + 0.01 * (seed % 3) for seed in range(30, 59)}

    def primary_of_seeds(runs, claim, seeds):
        return second if seeds == verdicts.SECOND else first

    monkeypatch.setattr(verdicts, "primary_of_seeds", primary_of_seeds)
    assert verdicts.primary({}, CLAIMS["F1"]) == first
    second[59] = 0.3
    assert verdicts.primary({}, CLAIMS["F1"]) == second
    assert verdicts.primary({}, CLAIMS["C5"]) == first
    line = verdicts.verdict_table({}).splitlines()[2]
    assert "**holds**: chosen after the fact" in line
    assert "+0.309 [" in line
    assert "; first ten: +0.054 [" in line
    line = verdicts.sample_table({}).splitlines()[2]
    assert line.startswith("| F1, ")
    assert "| +0.054 [" in line
    assert "| +0.309 [" in line


def line_with(matched: dict, **others) -> dict:
    """A line of study.json with these metrics, {map: {metric: value}}."""
    return {"matched": {"mean": {"selectivity": 1.5}} | matched, **others}


def cells_of_row(table: str, start: str) -> list[str]:
    """The cells of the row of a table that begins with this one."""
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_measure_that_old_runs_lack_is_left_out():
    runs = {
        ("different", 10): line_with({"rollout": {"equal_ink": 0.8}}),
        ("different", 11): line_with({}),
    }
    assert verdicts.sample(runs, "different", "matched/rollout/equal_ink") == {10: 0.8}
    assert verdicts.sample(runs, "different", "direct_share") == {}
    assert verdicts.mean_cells(runs, "different", ["matched/rollout/equal_ink"]) == ["0.80"]
    assert verdicts.mean_cells(runs, "different", ["direct_share"]) == ["–"]


def test_what_f1_and_f2_were_planned_to_test_is_recomputed(committed):
    """From the lines of study.json: patch faithfulness, with the dose left in."""
    lines = json.loads(study.STUDY_FILE.read_text())

    def values(row, map_name, seeds):
        return {
            line["seed"]: line["matched"][map_name]["patch_faithfulness"]
            for line in lines
            if line["row"] == row and line["seed"] in seeds
        }

    table = verdicts.dose_table(committed["laptop"]).splitlines()
    for line, other in ((table[2], ("different", "brightness")), (table[3], ("same", "mean"))):
        for cell, seeds in zip(line.split("|")[3:5], (range(10, 20), range(30, 60))):
            attention = values("different", "mean", seeds)
            reference = values(*other, seeds)
            differences = np.array([attention[seed] - reference[seed] for seed in attention])
            half_width = stats.t.ppf(0.975, len(seeds) - 1) * stats.sem(differences)
            low = differences.mean() - half_width
            high = differences.mean() + half_width
            assert cell.strip() == f"{differences.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        assert "**the contrary holds**" in line
    remarks = verdicts.claim_remarks(committed["laptop"])
    assert all("(as planned: the contrary holds)" in remarks[name] for name in ("F1", "F2"))
    assert verdicts.dose_table({}).splitlines()[2].endswith("| – | – | **open** |")


def test_the_remarks_are_recomputed(committed):
    lines = json.loads(study.STUDY_FILE.read_text())
    remarks = verdicts.claim_remarks(committed["laptop"])

    def of_row(row, seeds=range(10, 20)):
        chosen = [line for line in lines if line["row"] == row and line["seed"] in seeds]
        return sorted(chosen, key=lambda line: line["seed"])

    def heads(line, metric):
        rows = [cells for name, cells in line["matched"].items() if name.startswith("head_")]
        return [cells[metric] for cells in rows]

    # C7
    four, one = of_row("same-4"), of_row("same-1")
    probes = [np.mean([line["features"]["linear_probe"] for line in row]) for row in (four, one)]
    assert f"the probe is {probes[0]:.2f} instead of {probes[1]:.2f}" in remarks["C7"]
    aurocs = [[line["matched"]["mean"]["auroc"] for line in row] for row in (four, one)]
    ratio = np.exp(np.mean(np.log(aurocs[0]) - np.log(aurocs[1])))
    assert f"auroc is {ratio:.2f} times as high" in remarks["C7"]

    # F4
    stray = {
        row: np.array([max(heads(line, "far_background_density")) for line in of_row(row)])
        for row in ("different", "different-registers-0")
    }
    difference = (stray["different"] - stray["different-registers-0"]).mean()
    assert f"the most stray head: {difference:+.3f} [" in remarks["F4"]

    # C6: the epoch in which the heads are furthest apart, in the mean of the runs
    diversity = [
        [point["mean"]["diversity"] for point in line["curve"]] for line in of_row("different-long")
    ]
    epoch = np.mean(diversity, axis=0).argmax()
    assert f"until epoch {epoch} and" in remarks["C6"]
    assert 1 < epoch < 40

    # Q2: all choices of three heads out of six
    ratios = []
    for six, three in zip(of_row("heads-6", range(30, 60)), of_row("different", range(30, 60))):
        selectivity = np.array(heads(six, "selectivity"))
        chosen = np.array(np.meshgrid(*[range(6)] * 3)).reshape(3, -1).T
        chosen = chosen[(chosen[:, 0] < chosen[:, 1]) & (chosen[:, 1] < chosen[:, 2])]
        assert len(chosen) == 20
        best = selectivity[chosen].max(1).mean()
        ratios.append(np.log(best / max(heads(three, "selectivity"))))
    assert f"any three of the six: {np.exp(np.mean(ratios)):.2f} [" in remarks["Q2"]


def test_an_effect_inside_the_margin_is_not_relevant_on_either_side():
    claim = CLAIMS["C2"]
    assert verdicts.verdict_word(claim, -0.04, -0.01) == "no relevant effect"
    assert verdicts.verdict_word(claim, -0.06, -0.01) == "the contrary holds"
    assert verdicts.verdict_word(claim, 0.01, 0.04) == "holds"


# -------------------------------------------------------------------------------------- the runs


@pytest.fixture
def empty_study(tmp_path, monkeypatch):
    """A study.json of its own, not there yet, and no download of MNIST."""
    monkeypatch.setattr(study, "STUDY_FILE", tmp_path / "study.json")
    monkeypatch.setattr(data, "load_digits", lambda *args: None)


def test_a_row_is_run_once_and_a_repetition_is_compared(empty_study, tmp_path, monkeypatch, capsys):
    flags = "--loss nce --views same --crops 1 --image-size 28 --batch-size 32 --epochs 1"
    flags += " --images-per-epoch 64 --digits sklearn --precision float32"
    rows = {"tiny": study.Row(flags, [0], ["C3"])}
    monkeypatch.setattr(study, "grid", lambda preset, runs: rows)
    folder = tmp_path / "runs"
    args = study.parse_args(["--device", "cpu", "--runs", str(folder), "--only", "C3"])
    assert study.run_all(args)

    # study.json has the command and the measures of the run.
    [line] = json.loads(study.STUDY_FILE.read_text())
    start = "OMP_NUM_THREADS=1 python train.py --preset laptop"
    assert line["command"].startswith(f"{start} {flags} --seed 0 --device cpu")
    metrics = json.loads((folder / "laptop/tiny/seed-0/metrics.json").read_text())
    selectivity = metrics["matched"]["mean"]["selectivity"]["value"]
    measure = verdicts.read_measure(line, verdicts.SELECTIVITY)
    assert measure == pytest.approx(selectivity, rel=1e-5)
    equal_ink = metrics["untrained"]["rollout"]["equal_ink"]["value"]
    assert line["untrained"]["rollout"]["equal_ink"] == pytest.approx(equal_ink, rel=1e-5)
    assert line["precision"] == "float32"
    assert line["direct_share"][0] == 1
    assert line["curve"][-1]["epoch"] == 1
    assert line["curve"][-1]["loss"] > 0

    # A finished run is not done again, unless its repetition is asked for.
    with monkeypatch.context() as patched:
        patched.setattr(study, "run", lambda *job: pytest.fail("a finished run was repeated"))
        assert study.run_all(args)
    assert study.run_again(args, "tiny", 0)
    assert "the same weights, bit for bit" in capsys.readouterr().out
    other_line = line | {"weights": "0" * 64}
    monkeypatch.setattr(study, "run", lambda args, job, anew: other_line)
    assert not study.run_again(args, "tiny", 0)
    assert "other weights" in capsys.readouterr().out
    with pytest.raises(ValueError, match="tiny 1"):
        study.run_again(args, "tiny", 1)


def test_a_failed_run_does_not_stop_the_others_and_no_line_is_lost(empty_study, monkeypatch):
    row = study.Row("--loss nce", [0], ["C3"])
    monkeypatch.setattr(study, "grid", lambda preset, runs: {"bad": row, "good": row})
    good_line = {"preset": "laptop", "row": "good", "seed": 0, "command": "python train.py"}
    line_of_another_study = good_line | {"row": "another study's"}

    def run(args, job):
        # Another study.py writes its line while this run goes on.
        study.STUDY_FILE.write_text(json.dumps([line_of_another_study]))
        return good_line if job.row == "good" else None

    monkeypatch.setattr(study, "run", run)
    args = study.parse_args(["--only", "C3", "--jobs", "1"])
    assert not study.run_all(args)
    assert json.loads(study.STUDY_FILE.read_text()) == [line_of_another_study, good_line]


def test_an_interrupted_run_is_resumed_if_its_command_is_the_same(tmp_path, monkeypatch):
    args = study.parse_args(["--device", "cpu", "--runs", str(tmp_path)])
    job = study.Job("same", 10, "--loss nce")
    command = study.train_command(args, job)
    folder = Path(study.run_folder(args, job))
    exit_status = {"--resume": 0, "--preset": 0}
    first_flags = []

    def run_train(args, job, flags, log_mode):
        first_flags.append(flags[0])
        return exit_status[flags[0]]

    monkeypatch.setattr(study, "run_train", run_train)
    monkeypatch.setattr(study, "study_line", lambda args, job, seconds: "line")

    def run_after(interrupted_command, anew=False):
        """Return the line of a run whose folder holds another one, interrupted."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ckpt.pth").touch()
        study.log_file(args, job).write_text(f"{interrupted_command}\nepoch 1\n")
        first_flags.clear()
        return study.run(args, job, anew)

    assert run_after(command) == "line"
    assert first_flags == ["--resume"]
    assert folder.exists()

    run_after(f"{command} --crops 4")
    assert first_flags == ["--preset"]
    assert not folder.exists()

    run_after(command, anew=True)
    assert first_flags == ["--preset"]

    # Status 2: train.py cannot use the checkpoint, so the run starts from nothing.
    exit_status["--resume"] = 2
    assert run_after(command) == "line"
    assert first_flags == ["--resume", "--preset"]

    # Any other status: the run failed, and its folder is kept.
    exit_status["--resume"] = 1
    assert run_after(command) is None
    assert first_flags == ["--resume"]
    assert folder.exists()


def test_a_repetition_starts_from_the_same_pretrained_weights(monkeypatch):
    row = study.GRID["pretrained"]
    args = study.parse_args(["--device", "cpu"])
    job = study.Job("pretrained", 10, row.flags)
    command = study.train_command(args, job)
    line = {"weights": "a", "command": command, "device": "cpu"}
    monkeypatch.setattr(study, "grid", lambda preset, runs: {"pretrained": row})
    monkeypatch.setattr(study, "read_study", lambda: {"laptop": {("pretrained", 10): line}})
    repeated = {}

    def run(args, job, anew):
        repeated["command"] = study.train_command(args, job)
        repeated["folder"] = study.run_folder(args, job)
        return line

    monkeypatch.setattr(study, "run", run)
    assert study.run_again(args, "pretrained", 10)
    # Only the folder of the run itself is another one.
    folder = study.run_folder(args, job)
    assert repeated["folder"] != folder
    assert repeated["command"].replace(repeated["folder"], folder) == command
