"""What the README claims, held against the committed results and the source."""
import ast
import csv
import html
import io
import re
import shlex
import subprocess
import tokenize
from dataclasses import fields
from functools import lru_cache

import numpy as np
import pytest
from test_train import ROOT

import data
import gog
import tools
import train
from model import PRESETS, ModelConfig, Policy, load

README = (ROOT / "README.md").read_text(encoding="utf-8")


@lru_cache
def published(name):
    """Rows of a table in results/ as it was committed: a reader's own runs add theirs to the file, and the README tells of ours. Without git: of the file."""
    shown = subprocess.run(["git", "show", f"HEAD:results/{name}"], cwd=ROOT, capture_output=True, text=True, encoding="utf-8") if (ROOT / ".git").exists() else None
    return list(csv.DictReader(io.StringIO(shown.stdout))) if shown and not shown.returncode else tools.read_rows(ROOT / "results" / name)


def of_seed(seed, name="results.csv"):
    """{(world, row, suite, metric): row of the table}, of `nano`."""
    return {(r["world"], r["row"], r["suite"], r["metric"]): r for r in published(name) if (r["seed"], r["preset"]) == (seed, "nano")}


MEASURED = of_seed("0")
RESULTS, *OTHERS, ANIMALS = ({key: float(r["value"]) for key, r in rows.items()} for rows in (MEASURED, of_seed("1"), of_seed("2"), of_seed("0", "runs/animals-nano-0-eval.csv")))
ROW = {"random": "random", "base": "base", "direct": "direct", "full": "full-search", "no": "no-gaze", "**SFT**": "sft", "**SFT": "rl", "observations": "withheld", "oracle": "oracle"}  # by its first word
LONGER = {"SFT, as above": "sft", "SFT + RL, as above": "rl", "SFT, `--word-steps 6400`": "longer-sft", "SFT + RL, `--word-steps 6400 --rl-steps 80`": "longer-rl"}
EXAM = {"by look": "iou look", "does this crop show it?": "verify", "compare a hit with what is wanted": "reflect", "read and copy": "copy", "copy any text": "copy any text",
        "caption a crop": "caption", "colour, shape": "visual", **{k: f"iou {k}" for k in ("colour", "shape", "order", "size", "position", "neighbour")}}


def tables(text):
    """Every table of a markdown text: (cells of the head, list of rows)."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        head, _, *rows = [[cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")] for line in block.splitlines()]
        yield head, rows


def test_accuracy_tables_are_those_of_the_csv():
    """Prevents a table that was typed, rounded twice, or left behind by a new run."""
    found = [(rows, (RESULTS, *OTHERS) if "three seeds" in head[0] else (RESULTS,)) for head, rows in tables(README) if head[-1] == "mean"]
    assert len(found) == 4
    for world, (rows, seeds) in zip(("heraldry", "heraldry", "countries", "countries-zero-shot"), found):
        for name, *values in rows:
            row = LONGER.get(name) or ROW["**SFT**" if name == "**SFT**" else name.split()[0]]
            wanted = [100 * np.mean([r[world, row, suite, "accuracy"] for r in seeds]) for suite in gog.SUITES]
            assert values == [f"{x:.1f}" for x in (*wanted, sum(wanted) / len(wanted))], (world, name)


def test_what_rl_adds_is_that_of_the_csv():
    """Prevents a sentence that the table below it contradicts."""
    gain = {suite: 100 * (RESULTS["heraldry", "rl", suite, "accuracy"] - RESULTS["heraldry", "sft", suite, "accuracy"]) for suite in gog.SUITES}
    told = re.search(r"RL adds ([\d.]+) points.*?from ([\d.]+) to ([\d.]+) %; no other suite changes by more than ([\d.]+) points", README, re.S).groups()
    hops = [100 * RESULTS["heraldry", row, "hops", "accuracy"] for row in ("sft", "rl")]
    assert told == tuple(f"{x:.1f}" for x in (sum(gain.values()) / len(gain), *hops, max(abs(x) for suite, x in gain.items() if suite != "hops")))


def test_the_exam_is_that_of_the_csv():
    """Prevents a base model that is told to be better than it was measured."""
    for n, row in enumerate(("base", "base-word-steps-6400")):
        told = {name: rows[n][i] for head, rows in tables(README) for i, name in enumerate(head) if name in EXAM}
        assert len(told) == len(EXAM)
        for name, value in told.items():
            measured = [seed[key] for seed in (RESULTS, *OTHERS) if (key := ("lessons", row, "held-out", EXAM[name])) in seed]
            assert value.split()[0] == f"{np.mean(measured):.2f}", (row, name)


def value(world, row, suite, metric):
    return lambda: RESULTS[world, row, suite, metric]


def parameters(preset):
    """Millions of parameters."""
    return sum(p.numel() for p in Policy(ModelConfig(**PRESETS[preset])).parameters()) / 1e6


def mean(world, row, results=RESULTS):
    """Mean accuracy over the suites, in percent."""
    return sum(100 * results[world, row, s, "accuracy"] for s in gog.SUITES) / len(gog.SUITES)


def half(x):
    """Half of the 95 % interval of the mean over seeds."""
    return gog.STUDENT[len(x)] * x.std(ddof=1) / len(x)**0.5


def signal(world):
    """Mean cosine of the two halves of RL's batches."""
    told = [float(r["signal"]) for r in published(f"runs/{world}-nano-0-rl.csv") if r["signal"]]
    return sum(told) / len(told)


def update_of(processes):
    """Median seconds of an update of RL."""
    return float(np.median([float(r["seconds"]) for r in published("processes.csv") if r["processes"] == str(processes)]))


def minutes(stage, world):
    return next(float(r["minutes"]) for r in published("stages.csv") if (r["stage"], r["preset"], r["world"], r["device"], r["seed"]) == (stage, "nano", world, "cpu", "1" if world == "heraldry" else "0"))


STAGES_OF_TWO = {r["stage"]: r for r in published("stages.csv") if r["device"] == "2 x cpu"}
VALIDATED = {int(r["step"]): r for r in published("runs/countries-nano-0-rl.csv")}
UPDATES = [r for r in published("runs/heraldry-nano-0-rl.csv") if r["loss"]]
POINTING = [int(r["n"]) for (_, row, suite, metric), r in MEASURED.items() if (row, suite) == ("base", "held-out") and metric.startswith("iou")]
LONG_RUN, POINTS = published("runs/heraldry-nano-0-rl-updates-160.csv"), ("look", "colour", "shape", "order", "size", "position", "neighbour")
UNMASKED = published("runs/heraldry-nano-0-rl-no-mask.csv")
first_ten = lambda rows, column: np.mean([float(r[column]) for r in rows[:10]])
TRIALS = (ROOT / "results" / "trials.md").read_text(encoding="utf-8")
COUNTRIES = data.open_world(str(ROOT / "worlds" / "countries"))
TOLD = [  # what the text says outside its tables, and where it comes from
    (r"\*\*SFT\*\* \(supervised fine-tuning\) on ([\d,]+) expert", lambda: train.Args.demos), (r"below\), (\d+) questions a suite", lambda: train.Args.suite_size), (r"with `--replay ([\d.]+)` \(now the default", lambda: train.Args.replay),
    (r"\| `small` \| (\d+) M", lambda: parameters("small")), (r"\| `nano` \| ([\d.]+) M", lambda: parameters("nano")), (r"(\d+) M parameters in all", lambda: parameters("nano")), (r"`nano`, ([\d.]+) M", lambda: parameters("nano")), (r"`small`: (\d+) M", lambda: parameters("small")),
    *((told, lambda rows=rows: first_ten(rows, "grad_norm")) for told, rows in ((r"half as long \(([\d.]+) instead", published("runs/heraldry-nano-0-rl-mean-only.csv")), (r"half as long \([\d.]+ instead of ([\d.]+)", UPDATES))),
    *((told, lambda row=row: mean("heraldry", row)) for told, row in ((r"smaller steps, and ([\d.]+) instead", "mean-only"), (r"smaller steps, and [\d.]+ instead of ([\d.]+)", "rl"))),
    (r"gradient is ([\d.]+) times as long", lambda: first_ten(UNMASKED, "grad_norm") / first_ten(UPDATES, "grad_norm")),
    (r"`signal` ([\d.]+) instead", lambda: first_ten(UNMASKED, "signal")), (r"`signal` [\d.]+ instead of ([\d.]+)", lambda: first_ten(UPDATES, "signal")),
    (r"After 20 updates ([\d.]+) % of", lambda: 100 * float(UNMASKED[20]["development"])), (r"are right instead of ([\d.]+), and", lambda: 100 * float(UNMASKED[0]["development"])),
    *((told, lambda row=row: np.mean([mean("heraldry", row, r) for r in (RESULTS, *OTHERS)])) for told, row in ((r"and SFT from ([\d.]+) to", "sft"), (r"and SFT from [\d.]+ to ([\d.]+) %", "longer-sft"))),
    *((told, lambda step=step: 100 * float(LONG_RUN[step]["development"])) for told, step in ((r"seed 0, development: ([\d.]+) ->", 0), (r"-> ([\d.]+) % after 60", 60), (r"after 60, ([\d.]+) at the end", 160))),
    *((told, lambda pick=pick, row=row: pick(np.mean([r["lessons", row, "held-out", f"iou {kind}"] for r in (RESULTS, *OTHERS)]) for kind in POINTS)) for told, pick, row in (
        (r"an IoU of ([\d.]+) to [\d.]+ to one", min, "base"), (r"an IoU of [\d.]+ to ([\d.]+) to one", max, "base"), (r"to one of ([\d.]+) to", min, "base-word-steps-6400"), (r"to one of [\d.]+ to ([\d.]+), whatever", max, "base-word-steps-6400"))),
    *((told, lambda row=row: mean("heraldry", row)) for told, row in ((r"towns instead of 2,790 the policy of seed 0 answers ([\d.]+)", "rl-strangers-10000"), (r"answers [\d.]+ and ([\d.]+) % instead", "rl-strangers-100000"),
                                                                      (r"same accuracy: ([\d.]+) and", "group-4"), (r"same accuracy: [\d.]+ and ([\d.]+) instead", "group-16"), (r"Level 1 only \(([\d.]+) %", "level1"), (r"mostly wrong \(([\d.]+)\)", "learnable"), (r"while training \(([\d.]+);", "adaptive"), (r"where Level 2 gets ([\d.]+)", "level2"), (r"Level 2 gets [\d.]+ and `fresh` ([\d.]+)", "rl"),
                                                                      (r"KL 0\.001 gets ([\d.]+) %", "kl-0.001"), (r"0 and 0\.2 ([\d.]+) and", "lambda-0"), (r"0 and 0\.2 [\d.]+ and ([\d.]+),", "lambda-0.2"), (r"instead of 0\.04 ([\d.]+) and", "lr-0.01"), (r"instead of 0\.04 [\d.]+ and ([\d.]+),", "lr-0.1"), (r"same accuracy: [\d. and]+ instead of ([\d.]+) %", "rl"))),
    *((told, lambda rows=rows: 100 * np.mean([float(r["dead"]) for r in rows])) for told, rows in ((r"rollouts, (\d+) and \d+ % of the groups", published("runs/heraldry-nano-0-rl-group-4.csv")[:-1]), (r"rollouts, \d+ and (\d+) % of the groups", published("runs/heraldry-nano-0-rl-group-16.csv")[:-1]), (r"of the groups dead instead of (\d+)", UPDATES))),
    *((told, lambda row=row: mean("heraldry", row)) for told, row in ((r"after SFT ([\d.]+) and [\d.]+ % right instead", "demos-500"), (r"after SFT [\d.]+ and ([\d.]+) % right instead", "demos-2000"), (r"and [\d.]+ % right instead of ([\d.]+) \(measured", "sft"))),
    (r"the standard error of each is about ([\d.]+)", lambda: sum(100 * (p * (1 - p) / 300) ** 0.5 for p in (RESULTS["heraldry", "rl", s, "accuracy"] for s in gog.SUITES)) / 6),
    (r"has an IoU of ([\d.]+);", value("lessons", "base", "held-out", "iou after a miss")), (r"counting is right in (\d+) %", lambda: 100 * RESULTS["lessons", "base", "held-out", "count more"]),
    (r"in (\d+) % where there is one", lambda: 100 * RESULTS["lessons", "base", "held-out", "count one"]),
    (r"where it stands second (\d+) %", lambda: 100 * RESULTS["lessons", "base", "held-out", "copy second"]),
    (r"some gaze finds the target in (\d+) % of `facts`", lambda: 100 * RESULTS["countries-zero-shot", "rl", "facts", "target_found"]),
    (r"bounded memory: ([\d.]+) kB an entity", lambda: len(tools.FRAMINGS) * 4 * tools.WIDTH / 1000),
    (r"gets ([\d.]+) % of its suites right", lambda: mean("countries", "sft")), (r"a cosine of ([\d.]+) \(on heraldry", lambda: signal("countries")), (r"\(on heraldry ([\d.]+)\);", lambda: signal("heraldry")),
    (r"([\d.]+) % right after SFT and", lambda: mean("animals", "sft", ANIMALS)), (r"% right after SFT and ([\d.]+) after RL", lambda: mean("animals", "rl", ANIMALS)),
    (r"what was meant in (\d+) % of `facts`", lambda: 100 * ANIMALS["animals", "rl", "facts", "target_found"]), (r"but among look-alikes \(`fine`\) in (\d+) %", lambda: 100 * ANIMALS["animals", "rl", "fine", "target_found"]),
    (r"\. SFT took ([\d.]+) minutes", lambda: minutes("sft", "animals")), (r"minutes, RL ([\d.]+), the exam", lambda: minutes("rl", "animals")), (r"the examination ([\d.]+);", lambda: minutes("eval", "animals")),
    (r"\(SFT ([\d.]+) minutes, RL", lambda: minutes("sft", "countries")), (r"minutes, RL ([\d.]+); curves", lambda: minutes("rl", "countries")),
    (r"the SFT policy finds (\d+) %", lambda: 100 * RESULTS["countries", "sft", "facts", "target_found"]), (r"and answers (\d+) %", lambda: 100 * RESULTS["countries", "sft", "facts", "accuracy"]),
    *((told, lambda step=step: 100 * float(VALIDATED[step]["development"])) for step, told in ((0, r"it goes from ([\d.]+) to"), (20, r"to ([\d.]+) and [\d.]+ % after 20"), (40, r"and ([\d.]+) % after 20 and 40"))),
    (r"RL takes ([\d.]+) s instead", lambda: update_of(2)), (r"RL takes [\d.]+ s instead of ([\d.]+)", lambda: update_of(1)),
    *((told, lambda stage=stage, column=column, per=per: float(STAGES_OF_TWO[stage][column]) / per) for told, stage, column, per in (
        (r"seed 2 took ([\d.]+) minutes", "eval", "minutes", 1), (r"They hold ([\d.]+) and", "rl", "peak_memory_mb", 1000), (r"and ([\d.]+) GB each", "eval", "peak_memory_mb", 1000))),
    (r"\(of seed 1, by one process: ([\d.]+)\)", lambda: minutes("eval", "heraldry")),
    (r"is such a world: (\d+) flags", lambda: len(COUNTRIES.entities)), (r"demonstrations show (\d+) flags", lambda: len(COUNTRIES.splits["train"])),
    (r"no KL by default, `(\w+)`", lambda: train.Args.curriculum), (r"judge \| the same with exact match, λ = ([\d.]+)", lambda: train.Args.lam), (r"Here λ is ([\d.]+)", lambda: train.Args.lam),
    (r"GRPO, G=(\d+)", lambda: train.Args.group), (r"of rollouts at temperature ([\d.]+)", lambda: train.Args.temperature), (r"greedy accuracy on (\d+) questions of the dev", lambda: train.Args.rl_dev),
    (r"is noisy \((\d+) questions", lambda: train.Args.rl_batch), (r"printed every (\d+) updates", lambda: train.Args.eval_every), (r"a trajectory every (\d+) updates", lambda: train.Args.show_every),
    (r"up to some ([\d.]+) for a rare", lambda: max(float(r["ratio_gap"]) for r in UPDATES)), (r"more tokens; ([\d.]+) to", lambda: min(float(r["loss"]) for r in UPDATES)),
    (r"to ([\d.]+) in the published run", lambda: max(float(r["loss"]) for r in UPDATES)), (r"at most 99; below (\d+)", lambda: gog.KNOWN), (r"at most ([\d,]+) pixels a side", lambda: data.LONGEST_SIDE),
    (r"larger than ([\d,]+) pixels", lambda: data.LONGEST_SIDE), (r"\((\d+) to \d+ questions a kind of pointing", lambda: min(POINTING)), (r"\(\d+ to (\d+) questions a kind of pointing", lambda: max(POINTING)),
    (r"the paper: ([\d.]+) with one", lambda: train.PAPER["rl"] - train.PAPER["sft"]), (r"zero-shot: (\d+) real flags", lambda: len(COUNTRIES.entities)),
    (r"`\[picture\]` stands for (\d+) image", lambda: ModelConfig().image_tokens), (r"shrunk to (\d+) x", lambda: ModelConfig().picture), (r"a line has at most ([\d,]+) characters", lambda: tools.LONGEST)]


@pytest.mark.parametrize("told, source", TOLD, ids=[told for told, _ in TOLD])
def test_numbers_in_the_text_are_those_of_their_source(told, source):
    """Prevents a number that was true once: those of TOLD, between the tables, come from a csv or from the source, rounded as they are written."""
    (written,) = {found.replace(",", "") for found in re.findall(told, README)}
    real = source()
    assert written == (real if isinstance(real, str) else f"{real:.{len(written.partition('.')[2])}f}")


@pytest.mark.parametrize("told, tried", [
    (r"crowds (\d+) instead of (\d+) %", r"crowded walls (\d+) -> (\d+) %"), (r"\+([\d.]+) points on themselves, \+([\d.]+) on others", r"\(\+([\d.]+)\), on 400 others.*?\(together \+([\d.]+)\)"),
    (r"the right shield (\d+) instead of (\d+) %", r"(?=the right shield .*? (\d+) % with one)the right shield (\d+) % of the time"), (r"\(trials, (\w+)\)", r"\| (8e1446f) \|"), (r"in (\d+) of (\d+) wrong answers the right flag", r"(\d+) of (\d+) wrong answers about flags"), (r"first colour counted, ([\d.]+) % were right", r"suites ([\d.]+) -> 48.1")])
def test_what_was_tried_is_in_the_trials(told, tried):
    """Prevents an expected effect that nobody has measured: numbers of exercises and answers stand in results/trials.md."""
    assert re.search(told, README).groups() == re.search(tried, TRIALS).groups()


def test_three_seeds_are_those_of_the_csv():
    """Prevents a gain that only one seed had, and an interval that was guessed."""
    seeds, three = [RESULTS, *OTHERS], lambda values, digits=1: "{:.{d}f}, {:.{d}f} and {:.{d}f}".format(*values, d=digits)
    after = {row: [mean("heraldry", row, r) for r in seeds if ("heraldry", row, "facts", "accuracy") in r] for row in ("sft", "rl", "level2")}
    n, gains = len(after["level2"]), np.array(after["rl"]) - after["sft"]
    ahead = np.array(after["rl"][:n]) - after["level2"]
    longer = {row: np.array([mean("heraldry", f"longer-{row}", r) for r in seeds]) for row in ("sft", "rl")}
    more = longer["rl"] - longer["sft"]
    whole = [mean("heraldry", "all", r) for r in seeds if ("heraldry", "all", "facts", "accuracy") in r]
    assert f"{' and '.join(f'{x:.1f}' for x in whole)} % (seeds 0 and 1)" in README or len(whole) == 3 and three(whole) in README
    for told in (f"get {three(after['sft'])} % right after SFT, and {three(after['rl'])} after RL, chains", f"adds {np.mean(after['level2']) - np.mean(after['sft'][:n]):.1f} to the {'first two' if n == 2 else 'same three'}; `fresh` is ahead by {ahead.mean():.1f} +- {half(ahead):.1f}",
                 f"the three seeds get {three(longer['sft'])} %", f"take these to {three(longer['rl'])}:", f"RL adds {more.mean():.1f} points (95 % interval: +- {half(more):.1f})",
                 f"RL adds {gains.mean():.1f} points (95 % interval over three seeds: +- {half(gains):.1f})", "chains {}, and {}".format(*(three([100 * r["heraldry", row, "hops", "accuracy"] for r in seeds]) for row in ("sft", "rl"))),
                 f"with an IoU of {three([r['lessons', 'base', 'held-out', 'iou neighbour'] for r in seeds], 2)}"):
        assert told in README


def test_what_gazes_are_worth_is_that_of_the_csv():
    """Prevents a gap between the policies with and without gazes that no table shows."""
    with_, without = ([[mean("heraldry", prefix + row, r) for r in (RESULTS, OTHERS[0])] for row in ("sft", "rl")] for prefix in ("", "no-gaze-"))
    behind = [[a - b for a, b in zip(*rows)] for rows in zip(with_, without)]
    two = lambda pair: "{:.1f} and {:.1f}".format(*pair)
    for told in (f"{two(without[0])} % are right after SFT, {two(without[1])} after RL: {two(behind[0])} points behind with gazes after SFT, {two(behind[1])} after RL",
                 f"{two([100 * r['heraldry', 'no-gaze-rl', 'plain', 'accuracy'] for r in (RESULTS, OTHERS[0])])} % are right without a gaze"):
        assert told in README, told


def test_dead_groups_are_those_of_the_runs():
    """Prevents a curriculum that is praised for groups that it did not have."""
    (rows,) = [rows for head, rows in tables(README) if head[0].startswith("share of dead groups")]
    for (_, *told, n), end in zip(rows, ("", "-level2", "-all")):
        runs = [[r for r in published(f"runs/heraldry-nano-{seed}-rl{end}.csv") if r["dead"]] for seed in range(int(n))]
        assert told == [f"{np.mean([float(r[c]) for rows in runs for r in rows[part]]):.2f}" for c in ("dead", "accuracy") for part in (slice(10), slice(-10, None))], end


def test_behaviour_is_that_of_the_csv():
    """Prevents a claim about what RL teaches that rests on one seed, or on the suites where it holds."""
    (rows,) = [rows for head, rows in tables(README) if head[1:] == ["the paper, SFT -> RL", "SFT", "SFT + RL", "both longer"]]
    for metric, _, *told in rows:
        suites = [s for s in gog.SUITES if s != "plain" or metric not in ("gaze_correct", "target_found", "reflection")]
        scale, digits = (1, 2) if metric in ("turns", "tool_calls") else (100, 1)
        for row, text in zip(("sft", "rl", "longer-rl"), told):
            seeds = np.array([scale * np.mean([results["heraldry", row, s, metric] for s in suites]) for results in (RESULTS, *OTHERS)])
            assert text == f"{seeds.mean():.{digits}f} ± {half(seeds):.{digits}f}", (metric, row)


def test_minutes_are_those_of_the_csv():
    """Prevents a promise about time or memory that nobody has measured."""
    measured = {r["stage"]: r for r in published("stages.csv") if (r["world"], r["preset"], r["device"], r["seed"]) == ("heraldry", "nano", "cpu", "1")}
    (rows,) = [rows for head, rows in tables(README) if head[1] == "minutes"]
    assert len(rows) == 4
    for stage, minutes, memory, _ in rows:
        assert minutes == measured[stage]["minutes"] and memory == f"{int(measured[stage]['peak_memory_mb']) / 1000:.1f}", stage


def test_costs_are_those_of_the_csv():
    """Prevents a speed that was true on another day, or a ratio that leaves a slow part out."""
    cost, bench = [rows for head, rows in tables(README) if head[0] == "part"]
    assert cost == [[r[c] for c in ("part", "amount", "unit", "mflop", "ms")] for r in published("cost.csv")]
    measured = [r for r in published("bench.csv") if r["preset"] == "nano" and r["peer"]]
    assert bench == [[r["part"].replace("_", " "), *(f"{float(r[c]):.{n}f}" for c, n in (("ours_s", 3), ("peer_s", 3), ("ratio", 2))), r["peer"]] for r in measured]


def test_training_is_fed_as_the_csv_says():
    """Prevents a step that waits for its batch, or computes padding, while the README says that none does."""
    (rows,) = [rows for head, rows in tables(README) if head[0] == "training"]
    assert rows == [[r["stage"], r["seconds_a_step"], *(f"{100 * float(r[c]):.1f} %" if r[c] else "" for c in ("waits", "real"))] for r in published("feeding.csv")]


def test_presets_take_as_long_as_the_csv_says():
    """Prevents hours that nobody has reckoned: of `nano` those of stages.csv; of `small` the same times how much longer its steps (eyes, words, updates) and its rollouts take."""
    timed = {(r["part"], r["preset"]): float(r["ours_s"]) for r in published("bench.csv")}
    longer = {part: timed[part, "small"] / timed[part, "nano"] for part in ("see_step", "sft_step", "grpo_step", "rollout")}
    eyes = max(float(r["seconds"]) for r in published("runs/base-nano-0-pretrain.csv") if r["part"] == "see") / 60
    rolls = sum(float(r["rollout_seconds"]) for r in UPDATES) / 60
    nano = [minutes(stage, "heraldry") for stage in ("pretrain", "sft", "rl")]
    small = [eyes * longer["see_step"] + (nano[0] - eyes) * longer["sft_step"], nano[1] * longer["sft_step"], rolls * longer["rollout"] + (nano[2] - rolls) * longer["grpo_step"]]
    (rows,) = [rows for head, rows in tables(README) if head[0] == "preset"]
    assert rows[0][3:] == [f"{x:.1f} min" for x in (*nano, sum(nano))] and rows[1][3:] == [f"{x / 60:.1f} h" for x in (*small, sum(small))]


@pytest.mark.parametrize("command", re.findall(r"python train\.py[^\n`&#|]*", README))
def test_commands_are_understood(command):
    """Prevents a command in the README that the program refuses."""
    train.arguments(shlex.split(command)[2:])


def test_code_that_it_quotes_is_in_the_source():
    """Prevents a walk through lines that are no longer there."""
    quoted = re.findall(r"```python\n# (\w+\.py), ([\w.]+)\n(.*?)```", README, re.S)
    assert len(quoted) > 5
    for file, name, code in quoted:
        source = (ROOT / file).read_text(encoding="utf-8")
        body = source[source.index(f"def {name.split('.')[-1]}("):] if "." not in name else source[source.index(f"class {name.split('.')[0]}"):].partition(f"def {name.split('.')[1]}(")[2]
        assert all(f"\n{line}\n" in body for line in code.splitlines()), (file, name)


def test_the_samples_are_what_the_policy_does():
    """Prevents samples that somebody has polished: the policy in policies/ says exactly the two trajectories, and what is bold in them are its own tokens."""
    policy, v = load(ROOT / "policies" / "rl.safetensors")
    world = data.open_world("heraldry")
    squeeze = lambda text: re.sub(r"\s", "", text)
    samples = [html.unescape(block.replace("> ", "").replace(">\n", "\n")) for block in re.findall(r"(?:^>.*\n)+", README.split("## What the policy reads")[1], re.M)]
    asked = [q for kind, setting in (("colour", "normal"), ("hop1", "alike")) for q in data.questions(world, [(kind, setting, 1)], 60, "sample", ("test",)) if any(q.text in s for s in samples)]
    shown = {e.name for q in asked for e in q.scene.entities}  # the nearest of all towns are the nearest of these, too
    images = tools.ImageIndex((e.name, e.blazon, e.picture(96)) for e in world.pictured() if e.name in shown or e.name in README)
    env = tools.Environment(v, tools.Toolbox(images, tools.TextIndex(tools.passages(world))), policy.config)
    told = {squeeze(v.decode(t.ids).replace("<image>" * len(env.image_ids), "[picture]")): squeeze(v.decode([i for i, own in zip(t.ids, t.trained) if own])) for t in gog.rollout(policy, env, asked, temperature=0.0)}
    assert [told.get(squeeze(s.replace("**", ""))) for s in samples] == [squeeze("".join(s.split("**")[1::2])) for s in samples] and len(samples) == 2


def test_every_column_is_explained():
    """Prevents a table whose columns nobody explains: all metrics of results.csv and all columns of the csv that a run leaves stand in the glossary."""
    (rows,) = [rows for head, rows in tables(README) if head == ["metric", "where", "what it is"]]
    told = " ".join(name for name, *_ in rows).replace("no / single / mixed_search", "no_search single_search mixed_search").replace("answer / search / glance / gaze / malformed_share", "answer_share search_share glance_share gaze_share malformed_share")
    names = set(re.findall(r"[\w /]+", told.replace(",", " ").replace("`", " "))) | set(re.findall(r"\w+", told)) | {"iou"}
    columns = {c for run in ("base-nano-0-pretrain", "heraldry-nano-0-sft", "heraldry-nano-0-rl") for c in published(f"runs/{run}.csv")[0]} - {"step"}
    metrics = {metric.split()[0] if metric[:3] == "iou" else metric for *_, metric in MEASURED}
    assert not {c for c in columns | metrics if not set(c.split()) <= names}


def test_line_counts():
    """Prevents "small enough to read in an evening" from growing in silence: lines that are neither blank, comment nor docstring; none of the six files over 400."""
    told = re.search(r"([\d,]+) lines of code", README)[1].replace(",", "")
    lines = {name: code_lines(ROOT / f"{name}.py") for name in ("data", "tools", "model", "gog", "grpo", "train")}
    assert sum(lines.values()) == int(told) and max(lines.values()) <= 400, lines


def code_lines(path):
    """Lines of a Python file that hold code."""
    source = path.read_text(encoding="utf-8")
    strings = [n.body[0] for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(n)]
    told = {line for s in strings for line in range(s.lineno, s.end_lineno + 1)}
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in silent]
    return len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - told)


def test_what_it_names_is_there():
    """Prevents pointing at a test, a flag, a picture or a file that has been renamed or removed, and a text that was never finished."""
    assert not re.search("TODO|SAMPLES|RESULTTEXT", README)
    flags = {"--" + f.name.replace("_", "-") for f in fields(train.Args)} | {f"--no-{f.name}" for f in fields(train.Args) if f.type is bool} | {"--checkpoint", "--html", "--save"} | {"--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--shutdown-timeout"}  # gog.py's, data.py's; torchrun's
    assert set(re.findall(r"`(--[\w-]+)", README)) <= flags
    tests = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", README))
    assert len(named) > 10 and all(f"def {name}(" in tests for name in named)
    assert all((ROOT / path).exists() for path in re.findall(r"\]\(((?!http|#)[^)]+)\)", README))
