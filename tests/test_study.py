"""The study's pages say what study.json says, and study.json what the commands in it give."""

import json
import math
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


@pytest.mark.parametrize("page, folder", [("results", "figures/"), (".", "results/figures/")])
def test_the_pages_are_what_the_runs_give(committed, page, folder):
    text = (ROOT / page / "README.md").read_text()
    blocks = verdicts.blocks(committed, folder)
    filled = verdicts.fill(text, blocks)
    assert "<!-- verdicts -->\n" + blocks["verdicts"] + "\n<!-- end -->" in filled
    assert text == filled
    assert page == "." or all(f"<!-- {name} -->" in text for name in blocks)
    line = next(line for line in text.splitlines() if " [" in line and line.startswith("| C"))
    assert verdicts.fill(text.replace(line, line.replace(" [", "1 [", 1)), blocks) == text


def test_every_run_is_complete_and_can_be_traced(committed):
    """All of the laptop's grid is there, and each line has the command that the grid gives it."""
    runs, rows = committed["laptop"], study.grid("laptop")
    best = verdicts.best_rates(runs).values()
    assert len(best) == 4
    for name, row in rows.items():
        seeds = {seed for other, seed in runs if other == name}
        assert seeds >= set(range(5) if name in best else row["seeds"])
        if not name.startswith(("look-", "batch-", "same-long")):
            assert len(seeds) >= (10 if {"C3", "C5", "C7"} & set(row["claims"]) else 5)
    for (name, seed), line in runs.items():
        flags = f" --preset laptop --digits mnist {rows[name]['flags']} --seed {seed} "
        assert flags in line["command"]
        assert line["device"] and line["versions"]["torch"] and len(line["weights"]) == 64
    for line in [*runs.values(), *committed["paper"].values()]:  # nothing of a machine
        assert not any(word.startswith("/") for word in shlex.split(line["command"]))


@pytest.mark.parametrize("name", ["same", "different"])
def test_small_checkpoints_attend_as_their_runs_do(name, committed):
    path = study.CHECKPOINTS / f"{name}.pth"
    assert path.stat().st_size < 4e6
    checkpoint = vit.read_checkpoint(str(path))
    assert all(value.dtype == torch.float16 for value in checkpoint["teacher"].values())
    last = checkpoint["metrics"][-1]["validation"]["mean"]["selectivity"]
    line = committed["laptop"][f"{name}-long", 0]
    assert checkpoint["epoch"] == 10
    assert last == pytest.approx(line["curve"][-1]["mean"]["selectivity"], rel=1e-5)
    network = vit.build_network(checkpoint["config"])
    network.load_state_dict({key: value.float() for key, value in checkpoint["teacher"].items()})
    digits = data.load_digits("sklearn")[0]["test"]  # which it never saw
    batches = data.evaluation_batches(checkpoint["config"], digits, 200)
    seen = metrics.observe({"trained": network.backbone}, batches)
    mean = metrics.measure_attention(seen, resamples=0)["mean"]
    assert mean["digit_density"]["value"] > 3 > mean["background_density"]["value"]


def settings(preset, name):
    """The settings that train.py makes of the command of a row."""
    args = study.parse_args(["--preset", preset, "--device", "cpu"])
    command = study.command(args, name, 0)[0]
    return train.make_config(train.parse_args(shlex.split(command.split("train.py ")[1])))


@pytest.mark.parametrize("preset", ["laptop", "paper"])
def test_rows_train_and_differ_in_what_is_compared_alone(preset):
    """Views: as many crops through the student; C7: as many canvases; Q1: as many images."""
    grid = study.grid(preset)
    configs = {name: settings(preset, name) for name in grid}  # train.py accepts them all
    assert all(c["preset"] == preset and c["seed"] == 0 for c in configs.values())
    claims = {claim for row in grid.values() for claim in row["claims"]}
    assert claims >= set(verdicts.CLAIMS) - ({"Q3"} if preset == "laptop" else set())
    fed = set()
    for name in ("same-1", "same-2", "same-4", "different-1", "different-2"):
        c = configs[name]
        crops = data.crop_plan(c["views"], c["crops"], c["symmetric"])[2]
        fed.add(c["images_per_epoch"] * len(crops))
    assert len(fed) == 1
    crops = [configs[name] for name, row in grid.items() if "C7" in row["claims"]]
    assert len(crops) == 6 and len({c["images_per_epoch"] for c in crops}) == 1
    batches = [c for name, c in configs.items() if name.startswith("batch-")]
    whole = {c["images_per_epoch"] // c["batch_size"] * c["batch_size"] for c in batches}
    assert len(batches) == 12 and len(whole) == 1
    default = train.make_config(train.parse_args(["--preset", preset, "--batch-size", "1024"]))
    assert configs["batch-1024-lr-1"]["lr"] == pytest.approx(default["lr"], rel=1e-5)


def test_a_run_with_other_weights_is_another_run():
    """Rows take them but those that say their own; random weights are not taken for DINO's."""
    args = study.parse_args(["--preset", "paper", "--weights", "none", "--device", "cpu"])
    lines = {name: study.command(args, name, 0)[0] for name in study.grid("paper")}
    assert all(line.count("--weights") == 1 for line in lines.values())
    assert "--weights none --seed 0" in lines["same-2"]
    assert "--weights dino_vits16" in lines["vit-small-16"]
    runs = {("same-2", 0): {"command": lines["same-2"]}}
    assert study.is_done(args, runs, ("same-2", 0))
    args.weights = None
    assert not study.is_done(args, runs, ("same-2", 0))


def test_a_ratio_is_that_of_pairs():
    """Rows that move together over seeds: a paired test sees what an unpaired one would not."""
    under = {seed: seed + 1.0 for seed in range(5)}
    over = {seed: value * 1.1 * (1 + 0.01 * (-1) ** seed) for seed, value in under.items()}
    test = verdicts.paired_ratio_test(">", over, under)
    logs = np.log(list(over.values())), np.log(list(under.values()))
    assert test["p"] == pytest.approx(stats.ttest_rel(*logs).pvalue) and test["p"] < 0.001
    mean, error = np.mean(logs[0] - logs[1]), stats.sem(logs[0] - logs[1])
    expected = np.exp([mean, *stats.t.interval(0.95, 4, mean, error)])
    assert test["ratio"] == pytest.approx(expected) and test["seeds"] == 5
    alone = verdicts.paired_ratio_test(">", over | {9: 1.0}, under)  # seed 9 has no partner
    assert alone == test


def test_alike_has_to_be_shown():
    """Where no difference is seen in noise, none is ruled out."""
    ps = []
    for middle, noise in ((1, 0.01), (1.2, 0.01), (1, 0.5)):
        over = {seed: middle + noise * (-1) ** seed for seed in range(10)}
        ps.append(verdicts.paired_ratio_test("≈", over, dict.fromkeys(over, 1.0))["p"])
    assert ps[0] < 1e-6 and ps[1] > 0.99 and ps[2] > 0.3
    assert verdicts.paired_ratio_test("≈", {0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0})["p"] is None


def test_holm_and_that_all_tests_are_corrected_together(committed):
    corrected = verdicts.holm_correction([0.01, 0.04, 0.03, 0.005])
    assert corrected == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert verdicts.holm_correction([0.6, 0.9]) == [1.0, 1.0]
    judged = verdicts.judge(committed["laptop"]).values()
    tests = [test for tests in judged for test in tests if test["p"] is not None]
    assert min(test["corrected"] / test["p"] for test in tests) >= 1
    least = min(tests, key=lambda test: test["p"])
    assert least["corrected"] == pytest.approx(min(1, least["p"] * len(tests)))


def test_verdicts():
    def test(value, p, wanted=">"):
        return {"ratio": (value, math.nan, math.nan), "corrected": p, "p": p, "wanted": wanted}

    yes, no, contrary = test(1.5, 0.01), test(1.5, 0.2), test(0.5, 0.01)
    outcomes = [verdicts.outcome(each) for each in (yes, no, contrary)]
    assert outcomes == ["yes", "no", "the contrary"]
    assert verdicts.outcome(test(0.5, 0.01, "<")) == "yes"
    assert verdicts.outcome(test(1.01, 0.01, "≈")) == "yes"
    assert verdicts.verdict([yes, yes]) == "holds"
    assert verdicts.verdict([yes, contrary]) == "holds in part"
    assert verdicts.verdict([no, contrary]) == "does not hold"
    assert verdicts.verdict([]) == verdicts.verdict([yes, {"p": None}]) == "open"


def test_a_row_runs_once_and_again_the_same(tmp_path, monkeypatch, capsys):
    flags = "--loss nce --views same --crops 1 --image-size 28 --batch-size 32 --epochs 1"
    row = {"flags": f"{flags} --images-per-epoch 64", "seeds": range(1), "claims": ["C3"]}
    monkeypatch.setattr(study, "DIGITS", "sklearn")
    monkeypatch.setattr(study, "STUDY", tmp_path / "study.json")
    monkeypatch.setattr(study, "grid", lambda preset: {"tiny": row})
    runs = str(tmp_path / "runs")
    args = study.parse_args(["--device", "cpu", "--runs", runs, "--only", "C3"])
    assert study.run_all(args)
    [line] = json.loads(study.STUDY.read_text())
    start = "OMP_NUM_THREADS=1 python train.py --preset laptop --digits sklearn"
    assert f"{start} {row['flags']} --seed 0 --device cpu" in line["command"]
    found = json.loads((tmp_path / "runs/laptop/tiny/seed-0/metrics.json").read_text())
    selectivity = found["matched"]["mean"]["selectivity"]["value"]
    assert line["matched"]["mean"]["selectivity"] == pytest.approx(selectivity, rel=1e-5)
    assert line["curve"][-1]["step"] == 2
    assert {"head_1", "brightness"} <= set(line["curve"][-1])

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
    monkeypatch.setattr(study, "DIGITS", "sklearn")
    monkeypatch.setattr(study, "STUDY", tmp_path / "study.json")
    row = {"flags": "--loss nce", "seeds": range(1), "claims": ["C3"]}
    monkeypatch.setattr(study, "grid", lambda preset: {"bad": row, "good": row})
    command = "python train.py --loss nce --seed 0 --device cpu --output x"
    done = {"preset": "laptop", "row": "good", "seed": 0, "command": command}
    monkeypatch.setattr(study, "run", lambda args, row, *_: done if row == "good" else None)
    assert not study.run_all(study.parse_args(["--only", "C3"]))
    assert json.loads(study.STUDY.read_text()) == [done]
