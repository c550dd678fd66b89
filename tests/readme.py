"""The tables and numbers of README, made from results/, the source and the policy in policies/. Run by hand after a change: python tests/readme.py    -> README.md

A table stands between <!-- NAME --> and <!-- end --> (TABLES), a number between <!-- =NAME --> and <!-- --> (NUMBERS). test_readme.py fails where one is not what it should be.
"""
import ast
import csv
import html
import io
import itertools
import re
import subprocess
import sys
import tokenize
from functools import lru_cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import gog  # noqa: E402
import tools  # noqa: E402
import train  # noqa: E402
from model import PRESETS, ModelConfig, Policy, load  # noqa: E402

LABELS = {  # rows of results.csv, as README calls them
    "random": "random actions", "base": "base model, before SFT", "direct": "direct answer, no tools", "full-search": "full search (always whole picture, then text)",
    "no-gaze": "no gaze (glance and text only)", "sft": "**SFT**", "rl": "**SFT + RL**", "rl-level2": "SFT + RL, `--curriculum level2`", "withheld": "observations withheld", "oracle": "oracle (the expert)"}
PAPER = {  # metric: what the paper reports
    "no_search": "after RL below 3 %", "mixed_search": "28.7 -> 76.7", "gaze_correct": "46.7 -> 51.3 (read by hand: 59 -> 75)", "reflection": "30 -> 70 (read by hand)"}
BEHAVIOUR = ("no_search", "single_search", "mixed_search", "answer_share", "search_share", "glance_share", "gaze_share", "malformed_share", "gaze_correct", "target_found",
             "reflection", "turns", "tool_calls")
OF_GAZES = ("gaze_correct", "target_found", "reflection")  # mostly one shield in `plain`: nothing to choose there
EXAM = {"pointing: by look": "iou look", **{f"by {k}": f"iou {k}" for k in ("colour", "shape", "order", "size", "position", "neighbour")}, "after a miss": "iou after a miss",
        "does this crop show it?": "verify", "does this hit fit?": "reflect", "read and copy": "copy", "copy any text": "copy any text", "caption a crop": "caption", "colour, shape": "visual",
        "count: one": "count one", "count: more": "count more"}  # topics, as README calls them
GOALS = {**{k: 0.85 for k in EXAM.values() if k.startswith("iou") and "miss" not in k}, "verify": 0.95, "copy": 0.97}
# of the recipe of 2026-11-29, whose demonstrations had chains of two
WITH_TWO, RUNS_WITH_TWO = (f"earlier/with-chains-of-two/{x}" for x in ("results.csv", "runs"))
# of the recipe of 2026-11-30, whose SFT took three times as many steps, each on a third as many demonstrations
SMALL_STEPS = "earlier/small-sft-steps/results.csv"
TIMED = "3"  # the seed whose run was timed: pretrain and sft by one process, rl and eval by two
COMMITTED = __name__ != "__main__" and (ROOT / ".git").exists()


@lru_cache
def published(name):
    """Rows of a table in results/; for the tests as it was committed, as a reader's own runs add theirs to the file, and the README tells of ours."""
    shown = subprocess.run(["git", "show", f"HEAD:results/{name}"], cwd=ROOT, capture_output=True, text=True, encoding="utf-8") if COMMITTED else None
    return list(csv.DictReader(io.StringIO(shown.stdout))) if shown and not shown.returncode else tools.read_rows(ROOT / "results" / name)


@lru_cache
def measured(file):
    """{(world, row, suite, metric): {seed: value}}, of `nano`."""
    table = {}
    for r in published(file):
        if r["preset"] == "nano":
            table.setdefault(tuple(r[k] for k in ("world", "row", "suite", "metric")), {})[r["seed"]] = float(r["value"])
    return table


def values(world, row, suite, metric, file="results.csv"):
    """What was measured, of every seed: array (seeds,)."""
    return np.array([x for _, x in sorted(measured(file)[world, row, suite, metric].items())])


def means(world, row, metric="accuracy", suites=tuple(gog.SUITES), file="results.csv"):
    """The mean of the suites, of every seed: array (seeds,)."""
    return np.mean([values(world, row, s, metric, file) for s in suites], 0)


def earlier(row, file="earlier/results.csv"):
    """Accuracy in percent by an earlier recipe, seed 0; by default that of 2026-11-23."""
    return 100 * means("heraldry", row, file=file)[0]


def half(x):
    """Half of the 95 % interval of the mean over seeds (Student)."""
    return gog.STUDENT[len(x)] * x.std(ddof=1) / len(x)**0.5


def spread(x, digits=1):
    """Mean ± half of its interval, where there are several seeds."""
    return f"{x.mean():.{digits}f}" + (f" ± {half(x):.{digits}f}" if len(x) > 1 else "")


def listed(numbers):
    """Numbers as text: "5.1, 9.7 and 4.7"."""
    *most, last = [f"{x:.1f}" for x in numbers]
    return f"{', '.join(most)} and {last}" if most else last


def table(head, rows):
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *rows))


def accuracy(world, rows=tuple(LABELS)):
    """Accuracy in percent, suite by suite."""
    shown = [[LABELS[row], *(f"{100 * values(world, row, s, 'accuracy').mean():.1f}" for s in gog.SUITES), spread(100 * means(world, row))] for row in rows]
    return table(["", *gog.SUITES, "mean"], shown)


def behaviour():
    """What the policies do: percent, but for turns and calls."""
    def cell(row, metric):
        scale, digits = (1, 2) if metric in ("turns", "tool_calls") else (100, 1)
        return spread(scale * means("heraldry", row, metric, [s for s in gog.SUITES if s != "plain" or metric not in OF_GAZES]), digits)
    return table(["", "the paper, SFT -> RL", "SFT", "SFT + RL"], [[m, PAPER.get(m, ""), cell("sft", m), cell("rl", m)] for m in BEHAVIOUR])


def plans():
    """First and second plans that are right, by the number of relations: percent, all seeds together."""
    def share(policy, plan, relations):
        mine = [[int(r[k]) for k in ("right", "short", "other")] for r in published("plans.csv") if (r["policy"], r["plan"], r["relations"]) == (policy, plan, relations)]
        return f"{100 * sum(right for right, *_ in mine) / total:.0f}" if (total := sum(map(sum, mine))) else ""
    return table(["relations of the question", *"12345"], [[f"{LABELS[policy]}, {plan} plan", *(share(policy, plan, n) for n in "12345")] for policy in ("base", "sft", "rl") for plan in ("first", "second")])


def exam():
    """The base model's exam, of every seed."""
    found = {name: values("lessons", "base", "held-out", topic) for name, topic in EXAM.items()}
    return table(["", "goal", *(f"seed {n}" for n in range(len(found["read and copy"])))], [[name, GOALS.get(EXAM[name], ""), *(f"{x:.2f}" for x in found[name])] for name in found])


def main_stages():
    """The rows of stages.csv that tell of the main job, timed while nothing else ran, {stage: row}."""
    return {r["stage"]: r for r in published("stages.csv") if (r["world"], r["preset"], r["seed"]) == ("heraldry", "nano", TIMED)}


def stages():
    """Minutes and memory of every stage."""
    rows = main_stages()
    leaves = {"pretrain": "vision-encoder loss, then lesson loss; the exam of the base model",
              "sft": "questions drawn for demonstrations and questions dropped (half of the time goes into making them); loss; three trajectories; development accuracy",
              "rl": "accuracy, share of dead groups (all right or all wrong: they teach nothing) and entropy of every update, a trajectory every 8 updates, development accuracy every 20; `rl-report.html`",
              "eval": "a progress bar per suite and row; the table; `report.html`"}
    return table(["stage", "minutes", "memory of a process, GB", "what it prints, and leaves in `out/`"], [[s + (", two processes" if rows[s]["device"] == "2 x cpu" else ""), rows[s]["minutes"], f"{int(rows[s]['peak_memory_mb']) / 1000:.1f}", text] for s, text in leaves.items()])


def cost():
    return table(["part", "per rollout", "", "MFLOP", "ms"], [[r[c] for c in ("part", "amount", "unit", "mflop", "ms")] for r in published("cost.csv")])


def bench():
    rows = [r for r in published("bench.csv") if r["preset"] == "nano" and r["peer"]]
    return table(["part", "ours, s", "peer, s", "ratio", "peer"], [[r["what"].replace("_", " "), *(f"{float(r[c]):.{n}f}" for c, n in (("ours", 3), ("peer", 3), ("ratio", 2))), r["peer_name"]] for r in rows])


def feeding():
    return table(["training", "s per step", "waiting for a batch", "tokens that are not padding"],
                 [[r["stage"], r["seconds_a_step"], *(f"{100 * float(r[c]):.1f} %" if r[c] else "" for c in ("waits", "real"))] for r in published("feeding.csv")])


def presets():
    """Minutes of a whole run; of `small`, which nobody has run to its end, as much longer as its steps (eyes, words, updates) and its rollouts are in bench.csv."""
    timed = {(r["what"], r["preset"]): float(r["ours"]) for r in published("bench.csv")}
    longer = {part: timed[part, "small"] / timed[part, "nano"] for part in ("see_step", "sft_step", "grpo_step", "rollout")}
    minutes = {stage: float(r["minutes"]) for stage, r in main_stages().items()}
    updates = [r for r in published(f"{RUNS_WITH_TWO}/heraldry-nano-{TIMED}-rl.csv") if r["loss"]]
    eyes = max(float(r["seconds"]) for r in published(f"{RUNS_WITH_TWO}/base-nano-{TIMED}-pretrain.csv") if r["part"] == "see") / 60
    rolls = minutes["rl"] * sum(float(r["rollout_seconds"]) for r in updates) / sum(float(r["seconds"]) for r in updates)
    nano = [minutes[s] for s in ("pretrain", "sft", "rl")]
    small = [eyes * longer["see_step"] + (nano[0] - eyes) * longer["sft_step"], nano[1] * longer["sft_step"], rolls * longer["rollout"] + (nano[2] - rolls) * longer["grpo_step"]]
    untried = ["both", "", "cuda, mps", "not measured: none was available (`tests/test_device.py` tries every step on a device that refuses to be mixed with the CPU)", "", "", ""]
    return table(["preset", "parameters", "device", "pretrain", "sft", "rl", "all three"],
                 [["`nano`", f"{parameters('nano'):.1f} M", "two CPU cores", *(f"{x:.1f} min" for x in (*nano, sum(nano)))],
                  ["`small`", f"{parameters('small'):.0f} M", "two CPU cores", *(f"{x / 60:.1f} h" for x in (*small, sum(small)))], untried])


@lru_cache
def sampled():
    """What the policy in policies/ does with 8 questions about a colour, and with 8 about look-alikes: two lists of trajectories, and its vocabulary."""
    policy, v = load(ROOT / "policies" / "rl.safetensors")
    world = data.open_world("heraldry")
    env = tools.Environment(v, tools.make_toolbox(world), policy.config)
    ask = lambda kind, setting: gog.rollout(policy, env, data.questions(world, [(kind, setting, 1)], 8, "sample", ("test",)), temperature=0.0)
    return ask("colour", "normal"), ask("hop1", "alike"), v


def quoted(t, v):
    """A trajectory as markdown, token by token; its own in bold, observations in paragraphs of their own."""
    paragraphs = [""]
    for own, run in itertools.groupby(zip(t.ids, t.trained), lambda x: x[1]):
        ids = [i for i, _ in run]
        spelt = ("[picture]" if picture else v.decode(part) for picture, part in itertools.groupby(ids, v.id["<image>"].__eq__))
        text = html.escape("".join(spelt), quote=False).strip()
        if v.id["<obs>"] in ids:
            paragraphs += [text, ""]
        else:
            paragraphs[-1] += f"**{text}**" if own else text
    return "\n>\n".join(f"> {p}" for p in paragraphs)


def sample(suite, wanted=lambda t: True):
    """The first of the sampled trajectories (0: about a colour, 1: about look-alikes) that is right and as wanted."""
    *tries, v = sampled()
    return quoted(next(t for t in tries[suite] if t.correct and wanted(t)), v)


@lru_cache
def parameters(preset):
    """Millions of parameters."""
    return sum(p.numel() for p in Policy(ModelConfig(**PRESETS[preset])).parameters()) / 1e6


def update_of(processes):
    """Median seconds of an update of RL."""
    return np.median([float(r["seconds"]) for r in published("processes.csv") if r["processes"] == str(processes)])


def code_lines():
    """{file: lines that are neither blank, comment nor docstring} of the six files."""
    lines = {}
    for name in ("data", "tools", "model", "gog", "grpo", "train"):
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        strings = [n.body[0] for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(n)]
        told = {line for s in strings for line in range(s.lineno, s.end_lineno + 1)}
        silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in silent]
        lines[name] = len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - told)
    return lines


def gain(after="rl", before="sft", suites=tuple(gog.SUITES), file="results.csv"):
    """How many points one row is above another on heraldry, seed by seed (the first ones, which both have): array (seeds,)."""
    a, b = (means("heraldry", row, suites=suites, file=file) for row in (after, before))
    return 100 * (a[:len(b)] - b[:len(a)])


def curve(world, seed, column, run="rl"):
    """A column of the csv of a published run of RL: array, without the rows that lack it."""
    return np.array([x for x in gog.curve_values(published(f"runs/{world}-nano-{seed}-{run}.csv"), [column])[column] if x is not None])


ON_FLAGS = ("base", "direct", "full-search", "sft", "rl")  # rows of the two tables about countries
TABLES = {
    "main table": lambda: accuracy("heraldry"), "countries": lambda: accuracy("countries", (*ON_FLAGS, "oracle")), "zero-shot": lambda: accuracy("countries-zero-shot", (*ON_FLAGS, "oracle")),
    "behaviour": behaviour, "plans": plans, "exam": exam, "stages": stages, "presets": presets, "cost": cost, "bench": bench, "feeding": feeding,
    "sample colour": lambda: sample(0), "sample alike": lambda: sample(1, lambda t: any(gog.looked_elsewhere(t)))}  # after a wrong gaze
DETAILS = ("group-4", "group-16", "lambda-0", "lambda-0.2", "kl-0.001", "mean-only", "lr-0.01", "lr-0.1")  # of GRPO
UNMASKED = lambda: published("earlier/runs/heraldry-nano-0-rl-no-mask.csv")
AFTER = {"more": ("sft", "rl", "rl-fresh"), "less": ("sft-demos-2000", "rl-demos-2000", "rl-demos-2000-fresh")}  # SFT, then Level 2, then fresh, in SMALL_STEPS
ONE = {  # number: (row of seed 0, suites)
    "sft one": ("sft",), "rl one": ("rl",), "plain one": ("rl", "plain"), "no-gaze sft": ("no-gaze-sft",), "no-gaze rl": ("no-gaze-rl",), "no-gaze plain": ("no-gaze-rl", "plain"),
    "fail 5": ("rl-tools-fail-0.05",), "fail 20": ("rl-tools-fail-0.2",), "stale": ("rl-stale", "live"), **{f"turns {n}": (f"rl-turns-{n}",) for n in (2, 4, 6, 10)},
    **{f"strangers {n}": (f"rl-strangers-{n}000",) for n in (10, 100)}}
NUMBERS = {
    **{f"details {name}": lambda of=of: f"{of(map(earlier, DETAILS)):.1f}" for name, of in (("low", min), ("high", max))},
    **{name: lambda row=row, suites=suites: f"{100 * means('heraldry', row, suites=suites or tuple(gog.SUITES))[0]:.1f}" for name, (row, *suites) in ONE.items()},
    "gains": lambda: listed(gain()), **{f"{suite} gain": lambda suite=suite: f"{gain(suites=(suite,)).mean():.1f}" for suite in gog.SUITES},
    **{f"{row} gazes": lambda row=row, suites=suites: f"{100 * means('heraldry', row, 'gaze_correct', suites).mean():.0f}"
       for row, suites in (("oracle", ("fine",)), ("sft", ("facts", "crowd", "live", "hops")), ("rl", ("facts", "crowd", "live", "hops")))},
    "rl reflection": lambda: f"{100 * values('heraldry', 'rl', 'fine', 'reflection').mean():.0f}",
    "zero found": lambda: f"{100 * values('countries-zero-shot', 'rl', 'facts', 'target_found').mean():.0f}",
    "rl gain": lambda: spread(gain()), "over full search": lambda: f"{gain(before='full-search').mean():.1f}",
    **{f"{name} {suite}": lambda row=row, suite=suite: f"{100 * values('heraldry', row, suite, 'accuracy').mean():.1f}" for name, row, *suites in (
        ("sft", "sft", "crowd", "fine", "hops"), ("rl", "rl", "crowd", "fine", "hops"), ("level2", "rl-level2", "crowd", "fine")) for suite in suites},
    **{f"{mode} gain": lambda mode=mode: listed(gain(f"rl-{mode}")) for mode in ("level2", "all")}, **{f"ahead of {mode}": lambda mode=mode: spread(gain(before=f"rl-{mode}")) for mode in ("level2", "all")},
    **{f"{name} sft": lambda sft=sft: spread(100 * means("heraldry", sft, file=SMALL_STEPS)) for name, (sft, *_) in AFTER.items()},
    **{f"{name} {mode} gain": lambda sft=sft, row=row: listed(gain(row, sft, file=SMALL_STEPS)) for name, (sft, *rows) in AFTER.items() for mode, row in zip(("level2", "fresh"), rows)},
    **{f"{name} fresh ahead": lambda level2=level2, fresh=fresh: spread(gain(fresh, level2, file=SMALL_STEPS)) for name, (_, level2, fresh) in AFTER.items()},
    **{f"more fail {n}": lambda row=row: f"{earlier(row, SMALL_STEPS):.1f}" for n, row in ((5, "rl-tools-fail-0.05"), (20, "rl-tools-fail-0.2"))},
    "two level2 gain": lambda: listed(gain("rl-level2", file=WITH_TWO)),
    "two fresh gain": lambda: listed(gain(file=WITH_TWO)[:3]), "rate gain": lambda: listed(gain("rl-lr-0.16", file=WITH_TWO)),
    **{f"countries {row}": lambda row=row: f"{100 * means('countries', row).mean():.1f}" for row in ("sft", "rl")},
    "found after sft": lambda: f"{100 * values('countries', 'sft', 'facts', 'target_found').mean():.0f}",
    **{name: lambda world=world, run=run: listed(100 * curve(world, "0", "development", run)) for name, world, run in (("flags development", "countries", "rl"), ("level2 zero development", "heraldry", "rl-level2"))},
    **{name: lambda world=world, run=run: f"{100 * curve(world, '0', 'dead', run).mean():.0f}" for name, world, run in (("flags dead", "countries", "rl"), ("dead", "heraldry", "rl"), ("no-gaze dead", "heraldry-no-gaze", "no-gaze-rl"))},
    "flags signal": lambda: f"{curve('countries', '0', 'signal').mean():.2f}",
    **{f"{when} {metric}": lambda part=part, metric=metric: f"{np.mean([curve('heraldry', seed, metric)[part] for seed in '012']):.2f}"
       for when, part in (("first", slice(10)), ("last", slice(-10, None))) for metric in ("accuracy", "dead")},
    "development gains": lambda: listed([100 * (x.max() - x[0]) for x in (curve("heraldry", seed, "development") for seed in "012")]),
    "copy second": lambda: "{:.0f} to {:.0f}".format(*(100 * f(values("lessons", "base", "held-out", "copy second")) for f in (min, max))),
    "all lines": lambda: f"{sum(len((ROOT / f'{name}.py').read_text(encoding='utf-8').splitlines()) for name in code_lines()):,}",
    "zero rl": lambda: f"{100 * means('countries-zero-shot', 'rl').mean():.1f}",
    "seeds": lambda: len(means("heraldry", "rl")), "whole": lambda: f"{sum(float(r['minutes']) for r in main_stages().values()):.0f}",
    "nano": lambda: f"{parameters('nano'):.1f} M", "small": lambda: f"{parameters('small'):.0f} M",
    "image tokens": lambda: ModelConfig().image_tokens, "picture": lambda: f"{ModelConfig().picture} x {ModelConfig().picture}", "lines": lambda: f"{sum(code_lines().values()):,}",
    "lambda": lambda: train.Args.lam, "replay": lambda: train.Args.replay, "deep": lambda: f"{train.Args.rl_deep:.0f}", "group": lambda: train.Args.group, "dev": lambda: train.Args.rl_dev, "temperature": lambda: train.Args.temperature, "known": lambda: gog.KNOWN, "longest side": lambda: f"{data.LONGEST_SIDE:,}", "longest": lambda: f"{tools.LONGEST:,}",
    "kilobytes": lambda: f"{len(tools.FRAMINGS) * 4 * tools.WIDTH / 1000:.1f}",
    "rl batch": lambda: train.Args.rl_batch, "updates": lambda: train.Args.rl_steps, "eval every": lambda: train.Args.eval_every, "flags": lambda: len(data.open_world(str(ROOT / "worlds" / "countries")).entities),
    "update of one": lambda: f"{update_of(1):.1f}", "update of two": lambda: f"{update_of(2):.1f}",
    "unmasked signal": lambda: f"{np.mean([float(r['signal']) for r in UNMASKED()[:10]]):.2f}",
    "masked": lambda: f"{100 * float(UNMASKED()[0]['development']):.1f}", "unmasked": lambda: f"{100 * float(UNMASKED()[20]['development']):.1f}",
    "animals": lambda: f"{100 * np.mean([float(r['value']) for r in published('earlier/runs/animals-nano-0-eval.csv') if (r['world'], r['row'], r['metric']) == ('animals', 'rl', 'accuracy')]):.1f}"}
NUMBER = re.compile(r"<!-- =([\w -]+) -->(.*?)<!-- -->")
BLOCK = re.compile(r"<!-- ([\w -]+) -->\n.*?<!-- end -->", re.S)


def filled(text):
    """README with every table and number made anew."""
    text = BLOCK.sub(lambda found: f"<!-- {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->", text)
    return NUMBER.sub(lambda found: f"<!-- ={found[1]} -->{NUMBERS[found[1]]()}<!-- -->", text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    tools.atomic(readme, lambda p: p.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8"))
