"""The study's pages say what study.json says, and study.json what the commands in it give."""

import json
import math
import os
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

import data
import train
import visualize
import vit

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
sys.path.insert(0, os.path.join(ROOT, "results"))

import study
import verdicts

# ----------------------------------------------------------------------------- what is committed


@pytest.fixture(scope="module")
def committed():
    return study.read_study()


@pytest.mark.parametrize("page, folder", [("results/README.md", "figures/"), ("README.md", "results/figures/")])
def test_the_pages_are_what_the_runs_give(committed, page, folder):
    with open(os.path.join(ROOT, page)) as file:
        text = file.read()
    blocks = verdicts.blocks(committed, folder)
    filled = verdicts.fill(text, blocks)
    assert "<!-- verdicts -->\n" + blocks["verdicts"] + "\n<!-- end -->" in filled
    assert text == filled
    if page.startswith("results"):
        assert all(f"<!-- {name} -->" in text for name in blocks)


def test_a_page_with_another_figure_is_noticed(committed):
    blocks = verdicts.blocks(committed)
    with open(os.path.join(ROOT, "results", "README.md")) as file:
        text = file.read()
    line = next(line for line in text.splitlines() if line.startswith("| same, 2 crops | `same-2` |"))
    assert verdicts.fill(text.replace(line, line.replace(" [", "1 [", 1)), blocks) == text


def test_every_run_is_traceable_and_complete(committed):
    """The whole grid is there at laptop scale, and each line has the command that the grid gives for it."""
    runs, rows = committed["laptop"], study.grid("laptop")
    for name, row in rows.items():
        seeds = {seed for other, seed in runs if other == name}
        assert seeds >= set(row["seeds"])
        if not name.startswith(("look-", "batch-", "same-long")):
            assert len(seeds) >= (10 if {"C3", "C5", "C7"} & set(row["claims"]) else 5)
    assert len(verdicts.best_rates(runs)) == 4
    for name in verdicts.best_rates(runs).values():
        assert {seed for other, seed in runs if other == name} == set(range(5))
    for (name, seed), line in runs.items():
        flags = rows[name]["flags"]
        assert f" --preset laptop --digits mnist {flags} --seed {seed} " in line["command"]
        assert line["device"] and line["versions"]["torch"] and len(line["weights"]) == 64


def test_nothing_of_a_machine_is_in_the_runs(committed):
    for line in [*committed["laptop"].values(), *committed["paper"].values()]:
        assert not any(word.startswith("/") for word in shlex.split(line["command"]))


@pytest.mark.parametrize("name", ["same", "different"])
def test_the_small_checkpoints(name, committed):
    """Small, of float16, and what they look at is what study.json says of their run."""
    path = os.path.join(study.CHECKPOINTS, f"{name}.pth")
    assert os.path.getsize(path) < 4e6
    assert all(value.dtype == torch.float16 for value in vit.read_checkpoint(path)["teacher"].values())
    arguments = SimpleNamespace(image_size=None, digits="sklearn", background=None, data_root=None)
    subject = visualize.open_checkpoint(path, arguments)
    assert subject.epoch == 10
    last, line = subject.history[-1]["validation"]["mean"], committed["laptop"][f"{name}-long", 0]["curve"][-1]["mean"]
    assert last["selectivity"] == pytest.approx(line["selectivity"], rel=1e-5)
    splits = data.load_digits("sklearn")[0]
    batches = data.evaluation_batches(subject.config, splits["test"], 200)
    found = visualize.measure(subject.backbone, batches, resamples=0)  # digits that it never saw
    assert found["mean"]["digit_density"]["value"] > 3 > found["mean"]["background_density"]["value"]


# ------------------------------------------------------------------------------------- the grid


@pytest.mark.parametrize("preset", ["laptop", "paper"])
def test_train_accepts_every_row(preset):
    args = SimpleNamespace(preset=preset, device="cpu", data_root="data", runs="runs/study", weights=None)
    claims = set()
    for name, row in study.grid(preset).items():
        claims |= set(row["claims"])
        words = shlex.split(study.command(args, name, 0)[0].split("train.py ")[1])
        config = train.make_config(train.parse_args(words))
        assert config["preset"] == preset and config["seed"] == 0
    assert claims >= set(verdicts.CLAIMS) - ({"Q3"} if preset == "laptop" else set())


def test_other_weights_are_another_run():
    """Rows take them but those that say their own, and a run from random weights is not taken for one from DINO's."""
    args = study.parse_args(["--preset", "paper", "--weights", "none", "--device", "cpu"])
    lines = {name: study.command(args, name, 0)[0] for name in study.grid("paper")}
    assert all(line.count("--weights") == 1 for line in lines.values())
    assert "--weights none --seed 0" in lines["same-2"] and "--weights dino_vits16" in lines["vit-small-16"]
    runs = {("same-2", 0): {"command": lines["same-2"]}}
    assert study.is_done(args, runs, ("same-2", 0))
    args.weights = None
    assert not study.is_done(args, runs, ("same-2", 0))


@pytest.mark.parametrize("preset", ["laptop", "paper"])
def test_rows_that_are_compared_differ_in_what_is_said_alone(preset):
    """2×2: as many crops through the student; C7: as many canvases; Q1: as many images."""
    args = SimpleNamespace(preset=preset, device="cpu", data_root="data", runs="runs/study", weights=None)

    def settings(name):
        return train.make_config(train.parse_args(shlex.split(study.command(args, name, 0)[0].split("train.py ")[1])))

    def fed(name):  # crops through the student in an epoch
        c = settings(name)
        return c["images_per_epoch"] * len(data.crop_plan(c["views"], c["crops"], c["symmetric"])[2])

    assert len({fed(name) for name in ("same-1", "same-2", "same-4", "different-1", "different-2")}) == 1
    crops = [name for name, row in study.grid(preset).items() if "C7" in row["claims"]]
    assert len({settings(name)["images_per_epoch"] for name in crops}) == 1 and len(crops) == 6
    batches = [settings(name) for name in study.grid(preset) if name.startswith("batch-")]
    assert len({c["images_per_epoch"] // c["batch_size"] * c["batch_size"] for c in batches}) == 1
    default = train.make_config(train.parse_args(["--preset", preset, "--batch-size", "1024"]))["lr"]
    assert settings("batch-1024-lr-1")["lr"] == pytest.approx(default, rel=1e-5)


# ---------------------------------------------------------------------------------- statistics


def test_a_ratio_is_that_of_pairs():
    """Rows that move together over seeds: the paired test sees the difference that an unpaired one would not."""
    under = {seed: value for seed, value in enumerate((1.0, 2.0, 3.0, 4.0, 5.0))}
    over = {seed: value * 1.1 * (1 + 0.01 * (-1) ** seed) for seed, value in under.items()}
    found = verdicts.part("", "above", over, under)
    logs = [math.log(over[seed]) - math.log(under[seed]) for seed in under]
    assert found["p"] == pytest.approx(stats.ttest_rel([math.log(x) for x in over.values()], [math.log(x) for x in under.values()]).pvalue)
    low, high = stats.t.interval(0.95, 4, np.mean(logs), stats.sem(logs))
    assert (found["value"], found["low"], found["high"]) == pytest.approx((math.exp(np.mean(logs)), math.exp(low), math.exp(high)))
    assert found["seeds"] == 5 and found["p"] < 0.001
    assert verdicts.part("", "above", over | {9: 1.0}, under)["seeds"] == 5  # what has no partner is left out


def test_alike_has_to_be_shown():
    close = {seed: 1 + 0.01 * (-1) ** seed for seed in range(10)}
    apart = {seed: 1.2 + 0.01 * (-1) ** seed for seed in range(10)}
    noisy = {seed: 1 + 0.5 * (-1) ** seed for seed in range(10)}  # no difference to be seen, but none ruled out
    ps = [verdicts.part("", "alike", over, 1.0)["p"] for over in (close, apart, noisy)]
    assert ps[0] < 1e-6 and ps[1] > 0.99 and ps[2] > 0.3
    assert verdicts.part("", "alike", {0: 1.0, 1: 1.0}, 1.0)["p"] is None


def test_holm():
    assert verdicts.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert verdicts.holm([0.6, 0.9]) == [1.0, 1.0]


def test_verdicts():
    def test(value, p, wanted="above"):
        return {"value": value, "corrected": p, "p": p, "wanted": wanted}

    yes, no, contrary = test(1.5, 0.01), test(1.5, 0.2), test(0.5, 0.01)
    assert [verdicts.outcome(each) for each in (yes, no, contrary)] == ["yes", "no", "the contrary"]
    assert verdicts.outcome(test(0.5, 0.01, "below")) == "yes" and verdicts.outcome(test(1.01, 0.01, "alike")) == "yes"
    assert verdicts.verdict([yes, yes]) == "holds" and verdicts.verdict([yes, contrary]) == "holds in part"
    assert verdicts.verdict([no, contrary]) == "does not hold"
    assert verdicts.verdict([]) == verdicts.verdict([yes, {"p": None}]) == "open"


def test_all_tests_are_corrected_together(committed):
    tests = [test for each in verdicts.judge(committed["laptop"]).values() for test in each if test["p"] is not None]
    assert min(test["corrected"] / test["p"] for test in tests) >= 1
    least = min(tests, key=lambda test: test["p"])
    assert least["corrected"] == pytest.approx(min(1, least["p"] * len(tests)))


# ------------------------------------------------------------------------------------- the runs


def test_a_row_runs_once_and_again_the_same(tmp_path, monkeypatch, capsys):
    flags = "--loss nce --views same --crops 1 --image-size 28 --batch-size 32 --epochs 1 --images-per-epoch 64"
    monkeypatch.setattr(study, "DIGITS", "sklearn")
    monkeypatch.setattr(study, "STUDY", str(tmp_path / "study.json"))
    monkeypatch.setattr(study, "grid", lambda preset: {"tiny": {"flags": flags, "seeds": range(1), "claims": ["C3"]}})
    args = study.parse_args(["--device", "cpu", "--runs", str(tmp_path / "runs"), "--only", "C3"])
    assert study.run_all(args)
    [line] = json.loads((tmp_path / "study.json").read_text())
    assert f"OMP_NUM_THREADS=1 python train.py --preset laptop --digits sklearn {flags} --seed 0 --device cpu" in line["command"]
    with open(tmp_path / "runs" / "laptop" / "tiny" / "seed-0" / "metrics.json") as file:
        selectivity = json.load(file)["matched"]["mean"]["selectivity"]
    assert line["matched"]["mean"]["selectivity"] == pytest.approx(selectivity["value"], rel=1e-5)
    assert line["curve"][-1]["step"] == 2 and {"head_1", "brightness"} <= set(line["curve"][-1])

    def never(*arguments):
        raise AssertionError("a finished run was done again")

    with monkeypatch.context() as patched:
        patched.setattr(study, "run", never)
        assert study.run_all(args)
    again = study.parse_args(["--device", "cpu", "--runs", str(tmp_path / "again")])
    assert study.again(again, "tiny", 0)
    assert "bit for bit" in capsys.readouterr().out
    line["matched"]["mean"]["selectivity"] *= 1.0001
    study.write_study({"laptop": {("tiny", 0): line}, "paper": {}})
    monkeypatch.setattr(study, "run", lambda *arguments: line | {"weights": "0" * 64})
    assert not study.again(again, "tiny", 0)
    assert "other weights" in capsys.readouterr().out


def test_a_failed_run_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "STUDY", str(tmp_path / "study.json"))
    rows = {name: {"flags": "--loss nce", "seeds": range(1), "claims": ["C3"]} for name in ("bad", "good")}
    monkeypatch.setattr(study, "grid", lambda preset: rows)
    done = {"preset": "laptop", "row": "good", "seed": 0, "command": "python train.py --loss nce --seed 0 --device cpu --output x"}
    monkeypatch.setattr(study, "run", lambda args, row, seed: done if row == "good" else None)
    assert not study.run_all(study.parse_args(["--only", "C3"]))
    assert json.loads((tmp_path / "study.json").read_text()) == [done]
