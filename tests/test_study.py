"""The study's pages say what study.json says, and study.json what the commands in it give."""

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import data
import metrics
import train
import vit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "results"))

import study
import verdicts


@pytest.fixture(scope="module")
def committed():
    return study.read_study()


@pytest.mark.parametrize("page", ["results/README.md", "results/tables.md", "README.md"])
def test_the_pages_are_what_the_runs_give(committed, page):
    text = (ROOT / page).read_text()
    folder = "figures/" if page.startswith("results") else "results/figures/"
    blocks = verdicts.blocks(committed, folder)
    assert text == verdicts.fill(text, blocks)
    lines = [line for line in text.splitlines() if " [" in line and line.startswith("|")]
    assert len(lines) >= 5  # a changed number does not stay
    assert verdicts.fill(text.replace(lines[-1], lines[-1] + "9"), blocks) == text


def test_every_run_can_be_traced(committed):
    """Each line has the command that the grid gives it, and nothing of the machine's folders."""
    for preset, runs in committed.items():
        rows, args = study.grid(preset, runs), study.parse_args(["--preset", preset])
        for (name, seed), line in runs.items():
            assert study.is_done(args, runs, rows[name][0], name, seed), (name, seed)
            assert line["device"] and line["precision"] and line["versions"]["torch"]
            assert len(line["weights"]) == 64 and len(line["curve"]) > 10
            assert not any(word.startswith("/") for word in shlex.split(line["command"]))


def numpy_primaries(lines, seeds=range(10, 20)):
    """The sixteen primary quantities, by seed, straight from the lines of study.json."""
    at = lambda row, f: {l["seed"]: f(l) for l in lines if l["row"] == row and l["seed"] in seeds}
    of = lambda metric, row="mean": lambda l: l["matched"][row][metric]
    far = lambda l: np.mean([c["far_background_density"] > 1 for r, c in l["matched"].items()
                             if r[:5] == "head_"])  # fmt: skip
    sel, roc, rho = of("selectivity"), of("auroc"), of("patch_faithfulness")
    log = lambda x, y: {s: np.log(x[s] / y[s]) for s in x.keys() & y.keys()}
    less = lambda x, y: {s: x[s] - y[s] for s in x.keys() & y.keys()}
    spread = lambda k: lambda l: l["curve"][k]["mean"]["diversity"]
    best = lambda l: l["matched"][l["best_head"]]["selectivity"]
    probes = [log(at(row, lambda l: l["features"]["linear_probe"]),
                  at(row, lambda l: l["untrained_features"]["linear_probe"]))
              for row in ("same", "dino-same")]  # fmt: skip
    tuned = {}
    for base, name in (("same", "auroc"), ("dino-same", "auroc"), ("batch-32", "selectivity"),
                       ("batch-256", "selectivity")):  # fmt: skip
        found = {l["row"]: l["curve"][-1]["mean"][name] for l in lines
                 if l["seed"] == 0 and l["row"].split("-lr-")[0] == base}  # fmt: skip
        factor = lambda row: float(row.partition("-lr-")[2] or 1)
        best_of = max(found, key=found.get, default="none")
        edges = {min(found, key=factor), max(found, key=factor)} if found else {"none"}
        tuned[base] = at("none" if best_of in edges else best_of, of(name))
    different, same = at("different", sel), at("same", sel)
    return {
        "F1": less(at("different", rho), at("different", of("patch_faithfulness", "brightness"))),
        "F2": less(at("different", rho), at("same", rho)),
        "F3": less(at("different", of("patch_faithfulness", "rollout")), at("different", rho)),
        "F4": less(at("different", far), at("different-registers-0", far)),
        "C1": min(probes, key=lambda p: np.mean([*p.values()]) if p else -np.inf),
        "C2": log(tuned["same"], tuned["dino-same"]),
        "C3": log(same, at("same", of("selectivity", "brightness"))),
        "C4": {s: np.log(x) for s, x in at("texture", of("far_background_density")).items()},
        "C5": log(different, same),
        "C6": less(at("different-long", spread(-1)), at("different-long", spread(1))),
        "C7": log(at("same-4", sel), at("same-1", sel)),
        "C8": log(at("different", roc), at("size-28", roc)),
        "C9": log(different, at("supervised", sel)),
        "Q1": log(tuned["batch-256"], tuned["batch-32"]),
        "Q2": log(at("heads-6", best), at("different", best)),
        "Q3": log(at("pretrained", sel), same),
    }


def test_the_primaries_recomputed_in_numpy(committed):
    lines = json.loads(study.STUDY.read_text())
    expected, judged = numpy_primaries(lines), verdicts.judge(committed["laptop"])
    second = numpy_primaries(lines, range(30, 60))
    expected |= {
        claim: second[claim] for claim in ("F1", "F2", "C8", "Q2") if len(second[claim]) == 30
    }
    assert expected.keys() == judged.keys() == verdicts.CLAIMS.keys()
    for claim, values in expected.items():
        found = verdicts.primary(committed["laptop"], claim)
        assert found == pytest.approx(values, abs=1e-9), claim
        x, result = np.array([*values.values()]), judged[claim]
        assert result["seeds"] == len(x)
        if len(x) >= 5:
            low, high = stats.t.interval(0.95, len(x) - 1, x.mean(), max(stats.sem(x), 1e-300))
            assert (result["low"], result["high"]) == pytest.approx((low, high), abs=1e-9)


@pytest.mark.parametrize("name", ["same", "different"])
def test_small_checkpoints_attend_as_their_runs_do(name, committed):
    path = ROOT / "results" / "checkpoints" / f"{name}.pth"
    assert path.stat().st_size < 4e6
    checkpoint = vit.read_checkpoint(str(path))
    assert all(value.dtype == torch.float16 for value in checkpoint["teacher"].values())
    last = checkpoint["metrics"][-1]["validation"]["mean"]["selectivity"]
    found = verdicts.sample(committed["laptop"], name, verdicts.SELECTIVITY, range(10, 15))
    seed, (assumed, *_) = checkpoint["config"]["seed"], sorted(found, key=found.get)[2:]
    assert seed == assumed  # the median
    line = committed["laptop"][name, seed]
    assert checkpoint["epoch"] == 10
    assert last == pytest.approx(line["curve"][-1]["mean"]["selectivity"], rel=1e-5)
    network = vit.build_network(checkpoint["config"])
    network.load_state_dict({key: value.float() for key, value in checkpoint["teacher"].items()})
    digits = data.load_digits("sklearn")[0]["test"]  # which it never saw
    batches = data.evaluation_batches(checkpoint["config"], digits, 200)
    seen = metrics.observe({"trained": network.backbone}, batches)
    mean = metrics.measure_attention(seen, resamples=0)["mean"]
    assert mean["digit_density"]["value"] > 3 > mean["background_density"]["value"]


def settings(preset, name, rows):
    """The settings that train.py makes of the command of a row."""
    args = study.parse_args(["--preset", preset, "--device", "cpu"])
    command = study.command(args, rows[name][0], name, 0)[0]
    return train.make_config(train.parse_args(shlex.split(command.split("train.py ")[1])))


@pytest.mark.parametrize("preset", ["laptop", "paper"])
def test_rows_differ_from_the_preset_in_what_is_compared_alone(preset):
    rows = study.grid(preset, {})
    configs = {name: settings(preset, name, rows) for name in rows}  # train.py accepts them all
    default = train.make_config(train.parse_args(["--preset", preset]))
    may = {"loss", "views", "crops", "background", "registers", "heads", "image_size", "weights"}
    may |= {
        "batch_size",
        "micro_batch",
        "lr",
        "epochs",
        "depth",
        "digits",
        "pos_size",
        "device",
        "images_per_epoch",
    }
    for name, c in configs.items():
        assert {key for key in c if c[key] != default[key]} <= may, name
        dino = c["images_per_epoch"] == 12_800 and c["loss"] == "dino"
        assert dino or c["images_per_epoch"] == default["images_per_epoch"]
    fed = set()
    for name in ("different", "same", "supervised"):
        c = configs[name]
        fed.add(len(data.crop_plan(c["views"], c["crops"], c["symmetric"])[2]))
    assert len(fed) == (1 if preset == "laptop" else 2)
    claims = {claim for _, _, claims in rows.values() for claim in claims.split()}
    assert preset == "paper" or claims == set(verdicts.CLAIMS)


def test_no_run_starts_from_weights_that_are_not_there_yet():
    args = study.parse_args(["--only", "Q3"])
    first = {row for row, _ in study.wanted(args, {})}
    assert "pretraining" in first and "pretrained" not in first
    command = f" {study.command(args, study.GRID['pretraining'][0], 'pretraining', 0)[0]}"
    then = study.wanted(args, {("pretraining", 0): {"command": command}})
    assert ("pretrained", 10) in then and ("pretraining", 0) not in then


def search_lines(base, found):
    curve = lambda value: [{"mean": {"selectivity": value, "auroc": value}}]
    return {(verdicts.rate_row(base, k), 0): {"curve": curve(value)} for k, value in found.items()}


def test_a_search_goes_on_until_the_best_rate_is_not_at_an_edge():
    assert study.grid("laptop", {})["batch-32"][1] == [0]
    runs = search_lines("batch-32", {0.5: 1.1, 1: 1.2, 2: 1.3})
    rows = study.grid("laptop", runs)
    assert rows["batch-32-lr-4"][1] == [0] and verdicts.best_row(runs, "batch-32") is None
    assert "--batch-size 32 --lr 0.002" in rows["batch-32-lr-4"][0]
    runs |= search_lines("batch-32", {4: 1.25})
    rows = study.grid("laptop", runs)
    assert verdicts.best_row(runs, "batch-32") == "batch-32-lr-2" and "batch-32-lr-8" not in rows
    assert rows["batch-32-lr-2"][1] == [0, *range(10, 20)] and rows["batch-32"][1] == [0]


def test_a_rate_that_diverges_does_not_stop_a_search():
    runs = search_lines("batch-256", {0.5: 1.3, 1: 1.2})  # and 2 left no line
    assert study.grid("laptop", runs)["batch-256-lr-0.25"][1] == [0]
    rows = study.grid("laptop", runs | search_lines("batch-256", {0.25: 1.25}))
    assert "batch-256-lr-2" not in rows and "batch-256-lr-0.125" not in rows
    assert rows["batch-256-lr-0.5"][1] == [0, *range(10, 20)]


@pytest.mark.parametrize(
    "claim,low,high,says",
    [
        ("C5", 0.01, 0.5, "holds"),
        ("C5", -0.5, -0.01, "the contrary holds"),
        ("C5", -0.05, 0.09, "no relevant effect"),  # ln 1.1 is .095
        ("C5", -0.05, 0.2, "undecided"),
        ("C3", -0.09, 0.09, "holds"),
        ("C3", 0.1, 0.2, "the contrary holds"),
        ("C3", 0.05, 0.2, "undecided"),
        ("C4", -0.2, -0.1, "holds"),
        ("C4", 0.1, 0.2, "the contrary holds"),
        ("F3", -0.01, 0.3, "holds"),
        ("F3", -0.3, -0.03, "the contrary holds"),
        ("F3", -0.03, 0.3, "undecided"),
    ],
)
def test_one_interval_gives_one_word(claim, low, high, says):
    assert verdicts.word(claim, low, high) == says


def test_p_by_t_is_the_word_and_exact_p_counts_signs():
    noise = np.array([-0.05, 0.03, -0.02, 0.05, 0.01, -0.02])
    for claim in verdicts.CLAIMS:
        for mean in np.linspace(-0.3, 0.3, 61):
            p, _ = verdicts.p_values(claim, mean + noise)
            said = verdicts.word(claim, *verdicts.interval(mean + noise)[1:])
            equal = verdicts.CLAIMS[claim][3] == "="  # whose contrary has no p
            assert (p < 0.05) == (said == "holds" or (said == "the contrary holds" and not equal))
    assert verdicts.flips([1.0, 2.0, 3.0]) == 1 / 8
    assert verdicts.flips([1.0, 2.0, -1.5]) == 3 / 8  # 4.5, 2.5 and 1.5 are no less than 1.5
    for sign in (1, -1):
        values = sign * np.array([0.1, 0.2, 0.3, 0.2, 0.1])
        p, exact = verdicts.p_values("C5", values)
        assert p == pytest.approx(stats.ttest_1samp(values, 0).pvalue) and exact == 2 / 32
    assert verdicts.p_values("F4", [0.0] * 5) == [1, 1]


def test_holm_and_the_seeds_that_would_decide(monkeypatch):
    values = {"F1": [0.1, 0.2, 0.15, 0.12, 0.2], "C5": [0.1, -0.1, 0.12, 0.2, -0.05]}
    values |= {"F4": [0.0] * 5, "F2": [-0.1, -0.2, -0.3, -0.2, -0.1, 0.3]}
    found = lambda runs, claim: dict(enumerate(values.get(claim, [])))
    monkeypatch.setattr(verdicts, "primary", found)
    judged = verdicts.judge({})
    assert judged["F1"]["holm"] == pytest.approx(16 * judged["F1"]["p"])  # of all claims
    later = min(judged["C5"]["p"], judged["F2"]["p"])
    assert judged["F1"]["holm"] < min(1, 15 * later) == judged["C5"]["holm"]
    assert judged["Q1"] == {"seeds": 0, "word": "open"} and judged["C5"]["word"] == "undecided"
    (n, then), x = judged["C5"]["needed"], np.array(values["C5"])
    assert then == "holds" and judged["F2"]["needed"][1] == "the contrary holds"
    for seeds, decided in ((n, True), (n - 1, False)):
        half = stats.t.ppf(0.975, seeds - 1) * x.std(ddof=1) / seeds**0.5
        interval = x.mean() - half, x.mean() + half
        assert (verdicts.word("C5", *interval) != "undecided") == decided
    table = verdicts.verdict_table({}, "figures/")
    line = lambda claim: next(row for row in table.splitlines() if row.startswith(f"| {claim} "))
    assert "undecided** so far (all seeds alike)" in line("F4") and "**open**" in line("Q1")
    assert "**holds** so far ¹" in line("F1")  # five flips cannot give less than .06
    assert f"undecided** so far (as it is, {n} seeds: holds)" in line("C5")


def test_a_second_sample_counts_alone_once_it_is_complete(monkeypatch):
    first = {10: 0.1, 11: -0.1, 12: 0.12, 13: 0.2, 14: -0.05}
    second = {seed: 0.3 + 0.01 * (seed % 3) for seed in range(30, 59)}
    both = lambda runs, claim, seeds: second if seeds == verdicts.SECOND else first
    monkeypatch.setattr(verdicts, "primary_of", both)
    assert verdicts.primary({}, "F1") == first
    second[59] = 0.3
    assert verdicts.primary({}, "F1") == second and verdicts.primary({}, "C5") == first
    line = verdicts.verdict_table({}, "figures/").splitlines()[2]
    assert "**holds** |" in line and "+0.309 [" in line and "; first ten: +0.054 [" in line
    line = verdicts.sample_table({}).splitlines()[2]
    assert line.startswith("| F1, ") and "| +0.054 [" in line and "| +0.309 [" in line


def test_a_row_runs_once_and_again_the_same(tmp_path, monkeypatch, capsys):
    flags = "--loss nce --views same --crops 1 --image-size 28 --batch-size 32 --epochs 1"
    row = f"{flags} --images-per-epoch 64 --digits sklearn", range(1), "C3"
    monkeypatch.setattr(study, "STUDY", tmp_path / "study.json")
    monkeypatch.setattr(data, "load_digits", lambda *args: None)
    monkeypatch.setattr(study, "grid", lambda preset, runs: {"tiny": row})
    runs = str(tmp_path / "runs")
    args = study.parse_args(["--device", "cpu", "--runs", runs, "--only", "C3"])
    assert study.run_all(args)
    [line] = json.loads(study.STUDY.read_text())
    start = "OMP_NUM_THREADS=1 python train.py --preset laptop"
    assert f"{start} {row[0]} --seed 0 --device cpu" in line["command"]
    found = json.loads((tmp_path / "runs/laptop/tiny/seed-0/metrics.json").read_text())
    selectivity = found["matched"]["mean"]["selectivity"]["value"]
    assert line["matched"]["mean"]["selectivity"] == pytest.approx(selectivity, rel=1e-5)
    assert line["curve"][-1]["epoch"] == 1 and line["curve"][-1]["loss"] > 0
    assert verdicts.number(line, verdicts.SELECTIVITY) == pytest.approx(selectivity, rel=1e-5)

    def never(*job):
        raise AssertionError("a finished run was done again")

    with monkeypatch.context() as patched:
        patched.setattr(study, "run", never)
        assert study.run_all(args)
    assert study.again(args, "tiny", 0)
    assert "bit for bit" in capsys.readouterr().out
    monkeypatch.setattr(study, "run", lambda *job, **how: line | {"weights": "0" * 64})
    assert not study.again(args, "tiny", 0)
    assert "other weights" in capsys.readouterr().out


def test_a_failed_run_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "STUDY", tmp_path / "study.json")
    monkeypatch.setattr(data, "load_digits", lambda *args: None)
    rows = {name: ("--loss nce", range(1), "C3") for name in ("bad", "good")}
    monkeypatch.setattr(study, "grid", lambda preset, runs: rows)
    command = "python train.py --loss nce --seed 0 --device cpu --output x"
    done = {"preset": "laptop", "row": "good", "seed": 0, "command": command}
    others = done | {"row": "another study's"}

    def run(args, flags, row, *_):
        study.STUDY.write_text(json.dumps([others]))  # while this run went on
        return done if row == "good" else None

    monkeypatch.setattr(study, "run", run)
    assert not study.run_all(study.parse_args(["--only", "C3", "--jobs", "1"]))
    assert json.loads(study.STUDY.read_text()) == [others, done]


def test_a_run_from_weights_of_another_run_is_repeated_elsewhere_from_the_same(monkeypatch):
    monkeypatch.setattr(
        study, "grid", lambda preset, runs: {"pretrained": study.GRID["pretrained"]}
    )
    args = study.parse_args(["--device", "cpu"])
    flags = study.GRID["pretrained"][0]
    text, folder = study.command(args, flags, "pretrained", 10)
    line = {"weights": "a", "command": text, "device": "cpu"}
    study_of = lambda: {"laptop": {("pretrained", 10): line}}
    monkeypatch.setattr(study, "read_study", study_of)
    repeated = []

    def run(*job, anew):
        repeated.extend(study.command(*job))
        return line

    monkeypatch.setattr(study, "run", run)
    assert study.again(args, "pretrained", 10)
    assert repeated[1] != folder and repeated[0].replace(repeated[1], folder) == text
