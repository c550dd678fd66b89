"""The command line: python train.py --stage pretrain | sft | rl | eval | reproduce. Each of the four stages is one loop (of eval: suites
and rows), top to bottom; reproduce is a grid of them.

From the paper: SFT on reflective trajectories, then GRPO on the questions that the SFT model mostly fails.
Here instead: one stage more. `pretrain` makes the base model that the paper takes from the shelf: first the eyes alone, with labels on
    every patch and image token; then, with the eyes held still, lessons in words. A stage whose input is missing runs the one before it
    first.

Reading order: the four stages -> the grid -> run folder -> tables -> flags. `a` is the flags everywhere (Args, below); `v` the vocabulary;
`run` the run folder of a stage (Run, below).
"""
import json
import signal
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import data
import gog
import grpo
from model import (PRESETS, CheckpointError, ModelConfig, NotFinite, Policy, Vocabulary, autocast, corpus, load, load_state, lr_factor, number_line,
                   optimisers, save, save_state, set_lr, share, stream, summed, torch_rng, work_together)
from tools import PROCESSES, RANK, Environment, Toolbox, atomic, flags, locked, make_toolbox, peak_memory, read_rows, write_rows

# --------------------------------------------------------------------------------------------------------------- stages

def pretrain(a):
    """Base model, in two parts: see (what does each patch show?), then words (all lessons mixed). Stands in for Qwen-VL."""
    run = Run(a, "pretrain")
    torch.manual_seed(a.seed)
    v = Vocabulary.learn(corpus())
    config = ModelConfig(**{**PRESETS[a.preset], "vocab": v.size})
    policy = Policy(config).to(a.device)
    number_line(policy.embed_tokens.weight, [v.word(n) for n in range(100)])
    # outputs of a head: four edges of a box, and labels of what is in it. One head for patches, one for image tokens
    told = 4 + sum(map(len, grpo.PARTS.values()))
    heads = torch.nn.ModuleList(torch.nn.Linear(w, told) for w in (config.vit_width, config.width)).to(a.device)
    seen = [*heads.parameters(), policy.embed_tokens.weight]  # words, too: see_step draws them towards image tokens
    eye_opts = [*optimisers(policy.vision.named_parameters(), a.see_lr, a.see_adam_lr), torch.optim.AdamW(seen, a.see_adam_lr, weight_decay=0.0)]
    word_opts = optimisers(((n, p) for n, p in policy.named_parameters() if "vision" not in n or "projector" in n), a.word_lr, a.word_lr)
    env = Environment(v, None, config)
    parts = (("see", 0, a.see_steps, eye_opts, partial(grpo.labelled_pictures, config, a.seed, a.see_batch)),
             ("words", a.see_steps, a.word_steps, word_opts, partial(grpo.schooling, env, a.seed, a.word_batch, a.word_steps)))
    start = run.begin(a.see_steps + a.word_steps, [policy, heads], eye_opts + word_opts)["step"]
    for part, before, steps, opts, make in parts:  # before: steps of the parts in front
        first = min(max(0, start - before), steps)
        policy.freeze_eyes(part != "see")
        for at, batch in enumerate(stream(make, first, steps), first):
            lr = set_lr(opts, lr_factor(at, steps))
            if part == "see":
                loss, norm = grpo.see_step(policy, heads, [torch.from_numpy(x).to(a.device) for x in batch], v, opts)
            else:
                with autocast(a.device):  # the part before is in float32: in bfloat16 an earlier loss of the eyes ended 5 % higher
                    loss, norm = grpo.supervised_step(policy, env, batch, opts, a.token_budget)
            run.log(step=before + at, part=part, loss=loss, grad_norm=norm, lr=lr, seconds=run.bar.format_dict["elapsed"])
            run.checkpoint([policy, heads], eye_opts + word_opts, a.save_every if at + 1 < steps else 1, step=before + at + 1)
    # before the stage counts as done: if it is stopped here, --resume begins with the exam
    began, scores = time.time(), grpo.exam(policy, env, a.exam)
    write_results(a, result_rows(a, "exam", "base" + a.variant("pretrain"), "lessons", "held-out", scores, began))
    save(policy, run.weights, tokenizer=v.text)
    run.close(("loss", "lr"))
    print("base model, held-out: " + ", ".join(f"{k} {value:.3f} ({n})" for k, (value, n) in scores.items()), file=sys.stderr)


def sft(a):
    """Stage 1, reflective behaviour alignment: causal LM loss on the expert's own tokens, with some lessons of the base model in
    between."""
    (policy, v), run = load(a.weights("pretrain"), a.device), Run(a, "sft")
    world = data.open_world(a.world, a.seed_world, a.towns)
    env = Environment(v, make_toolbox(world, a.failure_rate, a.seed), policy.config, gaze=a.gaze)
    demos = grpo.instruct(policy, env, world, a.demos, a.seed, a.wrong_gaze)
    total = -(-len(demos) // a.sft_batch)  # each is seen once
    opts = optimisers(((n, p) for n, p in policy.named_parameters() if p.requires_grad), a.sft_lr, a.sft_adam_lr)
    start = run.begin(total, [policy], opts)["step"]
    lessons = partial(grpo.replay, Environment(v, None, policy.config, gaze=a.gaze), a.seed, round(a.replay * a.sft_batch))
    for step, replayed in enumerate(stream(lessons, start, total), start):
        lr = set_lr(opts, lr_factor(step, total))
        with autocast(a.device):
            batch = share(demos[step * a.sft_batch:][:a.sft_batch]) + replayed
            loss, norm = grpo.supervised_step(policy, env, batch, opts, a.token_budget)
        run.log(step=step, loss=loss, grad_norm=norm, lr=lr, seconds=run.bar.format_dict["elapsed"])
        run.checkpoint([policy], opts, a.save_every if step + 1 < total else 1, step=step + 1)
    score, tries = development(policy, env, world, a)
    save(policy, run.weights, tokenizer=v.text)
    run.close(("loss", "grad_norm", "lr"))
    print("\n".join([*map(gog.tell, tries[:3]), f"sft: development accuracy {score:.3f}"]), file=sys.stderr)


def development(policy, env, world, a):
    """Greedy accuracy on the development split, asked as the suites ask, and the trajectories. What is tuned is tuned here."""
    asked = data.questions(world, gog.DEV_MIX, a.rl_dev, f"dev/{a.seed}", ("dev",))
    reliable = Toolbox(env.toolbox.image_index, env.toolbox.text_index)  # tools that do not fail
    tries = gog.evaluate(policy, Environment(env.v, reliable, policy.config, gaze=a.gaze), asked, progress="development")
    return gog.behaviour(tries)["accuracy"], tries


def rl(a):
    """Stage 2, complexity-adaptive reinforcement learning: GRPO on kinds of questions (or on questions, scored by the SFT model first)
    drawn by pass rate."""
    (policy, v), run = load(a.weights("sft"), a.device), Run(a, a.name)
    world = data.open_world(a.world, a.seed_world, a.towns)
    env = Environment(v, make_toolbox(world, a.failure_rate, a.seed), policy.config, gaze=a.gaze)
    fresh = a.curriculum == "fresh"  # then the pool holds kinds of questions, and each is asked anew; else questions, scored once first
    askable = grpo.kinds(world) if fresh else [*data.questions(world, data.RL_MIX, a.rl_questions, f"rl/{a.seed}"), *world.own[::2]]
    reference = load(a.weights("sft"), a.device)[0].requires_grad_(False) if a.beta else None
    # SGD: the gradients of two batches had a cosine of 0.16, those that AdamW would have made of them 0.06, and Muon's 0.02
    # (results/trials.md)
    opts = [torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], a.rl_lr, momentum=0.9)]
    saved = run.begin(a.rl_steps, [policy], opts)
    rates = saved.get("pass_rates") or ([0.5] * len(askable) if fresh else grpo.pass_rates(policy, env, askable, 4, a.temperature, a.seed))
    worth = [w[2] if isinstance(w, tuple) else 1 for w in askable]
    curriculum = grpo.Curriculum(rates, a.curriculum, a.seed, pool=saved.get("pool"), worth=worth)
    # for the report, and the step at which each alarm was told; empty whenever the run is started
    shown, pictures, alarmed = [], {}, {}
    # [development accuracy, step] of the best policy so far, and its file: it becomes the result only when the stage is done
    best, champion = saved.get("best", [-1.0, 0]), run.weights.with_suffix(".best.safetensors")
    for step in range(saved["step"], a.rl_steps + 1):  # one pass more than updates: the last only validates
        score = ""
        if step % a.eval_every == 0 or step == a.rl_steps:  # keep the best by validation, not the last
            score, _ = development(policy, env, world, a)
            print(f"\nstep {step}: development accuracy {score:.3f}", file=sys.stderr)
            if score >= best[0]:  # of equals the later: the lower the learning rate, the less of a policy is noise
                best = [score, step]
                save(policy, champion, tokenizer=v.text)
        if step == a.rl_steps:
            run.log(step=step, development=score)
            group_report(a, run, shown, pictures)
            break
        lr = set_lr(opts, lr_factor(step, a.rl_steps, warmup=3, decay=1.0))
        chosen = curriculum.draw(a.rl_batch, step)
        env.toolbox.rng.seed(f"tools/{a.seed}/{step}/{RANK}")  # all that falls by lot depends on the step: that is why --resume is exact
        asked = grpo.ask_each(world, [askable[i] for i in chosen], f"rl/{a.seed}/{step}")
        batch, advantages, solved, stats = grpo.iteration(policy, reference, env, asked, opts, a, torch_rng(policy.device, "rl", a.seed, step))
        curriculum.seen(chosen, solved)
        run.log(step=step, **stats, lr=lr, development=score)  # that of the policy before this update
        first = next((r for r in run.rows if float(r["dead"]) < 1), run.rows[0])  # if all groups are dead there is no entropy to fall from
        for metric, alarm in alarms({k: float(v) for k, v in first.items() if v}, stats).items():
            if alarmed.setdefault(metric, step) == step:  # each is told once
                tqdm.write(f"step {step}: {alarm}", file=sys.stderr)
        if step % a.show_every == 0:
            print("\n" + gog.tell(batch[int(advantages.argmax())]), file=sys.stderr)
            shown, pictures = ([], {}) if len(shown) > 200 else (shown, pictures)  # or the report of a long run would grow without end
            for i, (t, advantage) in enumerate(zip(batch[:3 * a.group], advantages.tolist())):
                shown.append(report_entry(a, t, world, v, pictures, f"{step} {i // a.group}", f"step {step}", f"rollout {i % a.group + 1}", advantage))
            group_report(a, run, shown, pictures)
        run.checkpoint([policy], opts, a.eval_every, step=step + 1, pass_rates=curriculum.pass_rates, pool=curriculum.pool, best=best)
    atomic(run.weights, lambda p: p.write_bytes(champion.read_bytes()))
    run.close(CURVES)
    RANK or champion.unlink()  # only the first process (rank 0); last, so that a kill in between loses nothing
    print(f"best: step {best[1]}, development accuracy {best[0]:.3f}, kept as {run.weights}", file=sys.stderr)


def group_report(a, run, shown, pictures):
    """rl-report.html: groups of rollouts side by side, and the curves so far."""
    title = f"{a.label(a.world)}: groups of rollouts while RL trains"
    about = f"Preset {a.preset}, seed {a.seed}, on {a.place()}; three questions of every {a.show_every}th step since training was last started."
    gog.write_report(run.folder / f"{a.name}-report.html", title, about, shown, pictures, curves=gog.curve_values(run.rows, CURVES))


def alarms(first, now):
    """What looks like collapse, {metric: in words}: the metrics of an iteration beside those of the first."""
    # no less than this part of the first; entropy is that of live groups
    least = {k: 0.2 for k in grpo.LOGGED if k.endswith("_share") and first[k] > 0.05} | ({"entropy": 0.2, "reward": 0.7} if now["dead"] < 1 else {})
    told = {k: f"{k} fell from {first[k]:.2f} to {now[k]:.2f}" for k, part in least.items() if now[k] < part * first[k]}
    rose = {"tokens": f"tokens a trajectory rose from {first['tokens']:.0f} to {now['tokens']:.0f}"}
    return told | (rose if now["tokens"] > 2 * first["tokens"] else {})


def evaluate(a):
    """Six held-out suites (and a folder world's own questions), every baseline: results/results.csv, one measurement a row; rows of other
    worlds and seeds in that file stay. Baselines that are schedules (gog.SCHEDULES) and `withheld` play the RL policy."""
    world = data.with_strangers(data.open_world(a.world, a.seed_world, a.towns), a.strangers)
    policies = {row: load(a.weights(stage), a.device) for row, stage in (("base", "pretrain"), ("sft", "sft"), ("rl", "rl"))}
    label = a.label(a.world) + "-zero-shot" * bool(a.trained_on)  # the world, in the tables
    named = a.row()  # the row of the policy under examination. "rl" brings all baselines with it; any other leaves theirs as they are
    known = make_toolbox(world, a.tools_fail, a.seed)  # tools that know what was known at training time
    table, shown, pictures = [], [], {}
    for name in (*(["own"] if world.own[1:] else []), *gog.SUITES):
        try:
            searched, qs = (world, world.own[1::2]) if name == "own" else gog.suite(world, name, a.suite_size)
        except data.WorldError as e:  # a small world may know no deep chains, or no look-alikes
            print(f"suite {name} is left out: {e}", file=sys.stderr)
            write_results(a, result_rows(a, "main", named, label, name, {"left_out": (1, 0)}, time.time()))
            continue
        toolbox = make_toolbox(searched, a.tools_fail, a.seed, late=True) if name == "live" and not a.stale else known
        for row in (r for r in (ROWS if named == "rl" else ["rl"]) if (name, r) != ("own", "oracle")):  # nobody knows where to look there
            policy, v = policies.get(row, policies["rl"])
            began, env = time.time(), Environment(v, toolbox, policy.config, withhold=row == "withheld", gaze=a.gaze)
            tries = gog.evaluate(policy, env, qs, row, a.seed, a.turns, progress=f"{name}, {row}")
            metrics = {k: (x, len(qs)) for k, x in gog.behaviour(tries).items()} | gog.by_size(tries)
            called = named if row == "rl" else row
            table += result_rows(a, "main", called, label, name, metrics, began)
            if called == "rl" and not a.seed:
                outcome = lambda t: "failure" if not t.correct else "recovery" if any(gog.looked_elsewhere(t)) else "success"
                for what, t in {outcome(t): t for t in reversed(tries)}.items():  # the first of each
                    atomic(Path(a.results) / f"{label}-{name}-{what}.png", lambda p: gog.poster(t).save(p, format="PNG"))
            for i, t in enumerate(tries[:a.shown] if row in policies else ()):
                shown.append(report_entry(a, t, searched, v, pictures, f"{name} {i}", name, called))
        write_results(a, table)  # suite by suite: what is measured is kept
    accuracy = gog.accuracy_table(table)
    print("\n".join(["", f"{'accuracy %':<12}" + "".join(f"{c:>8}" for c in accuracy["columns"]),
                     *(f"{row:<12}" + "".join(f"{'' if x is None else format(x, '.1f'):>8}" for x in values) for row, *values in accuracy["rows"])]))
    asked = "the policies before SFT (base), after it (sft) and after RL (rl)" if named == "rl" else named
    about = f"Preset {a.preset}, seed {a.seed}, on {a.place()}; the first {a.shown} questions of each suite, asked of {asked}."
    page = "-".join(["report", *([label] if a.trained_on else []), *([named] if named != "rl" else [])])  # of another world or row: a page of its own
    curves = gog.curve_values(read_rows(a.weights("rl").with_suffix(".csv")), CURVES)
    gog.write_report(a.folder() / f"{page}.html", f"{label}: what the policies do", about, shown, pictures, accuracy, curves)


def report_entry(a, t, world, v, pictures, key, suite, policy, advantage=None):
    """What a report tells of a trajectory: which question (`key`) of which suite, who answered, with what reward, and all that happened."""
    r_acc = grpo.accuracy_reward(t, a.search_penalty)
    judged = dict(r_acc=r_acc, reward=grpo.reward(r_acc, t.well_formed, a.lam), advantage=advantage)
    return dict(key=key, suite=suite, policy=policy) | gog.record(t, world, v, pictures) | judged


# ------------------------------------------------------------------------------------------------------------- the grid

# of the main table; all are examined with "rl"
ROWS = ("random", "base", "direct", "full-search", "no-gaze", "sft", "rl", "withheld", "oracle")
EVAL_FLAGS = ("tools_fail", "turns", "stale", "strangers")  # flags of eval that ask another thing of the same policy
# the flags of every row of the paper's tables, and of questions that it leaves open; a policy with a name of its own is trained first, by
# RL on as many rollouts (but where rl_steps is told; 0: by SFT only)
GRID = {
    "main": [{}],
    # the second: as MMSearch-R1
    "Selective Gaze": [dict(name="no-gaze-sft", gaze=False, rl_steps=0), dict(name="no-gaze-rl", gaze=False, search_penalty=0.1)],
    "robustness": [dict(tools_fail=0.05), dict(tools_fail=0.2), dict(stale=True), *(dict(turns=n) for n in (2, 4, 6, 10)),
                   *(dict(strangers=n) for n in (10_000, 100_000))],
    "curriculum": [dict(name=mode, curriculum=mode) for mode in ("level1", "level2", "all", "learnable", "adaptive")],
    "GRPO": [dict(name="group-4", group=4, rl_batch=64), dict(name="group-16", group=16, rl_batch=16), dict(name="mean-only", advantage="mean"),
             dict(name="lambda-0", lam=0.0), dict(name="lambda-0.2", lam=0.2), dict(name="kl-0.001", beta=0.001), dict(name="no-mask", mask=False),
             dict(name="lr-0.01", rl_lr=0.01), dict(name="lr-0.1", rl_lr=0.1), dict(name="updates-160", rl_steps=160)],
    "longer": [dict(name="longer-sft", word_steps=6400, rl_steps=0), dict(name="longer-rl", word_steps=6400, rl_steps=80)],
    "scale": [dict(name=f"demos-{n}", demos=n, rl_steps=0) for n in (500, 2000, 20000)]}
# rows that a table shows first, to compare with; of the others "rl"
BESIDE = {"main": ROWS, "Selective Gaze": ["sft", "rl"], "longer": ["sft", "rl"], "scale": ["sft"]}
# means of Qwen2.5-VL-7B; no-gaze-rl: MMSearch-R1; no-gaze-sft: SFT without Selective Gaze; level1: the mean of its row (printed: 47.28)
PAPER = {"direct": 20.3, "full-search": 44.4, "no-gaze-rl": 36.9, "sft": 43.3, "rl": 53.2, "no-gaze-sft": 41.8, "level1": 50.5, "level2": 53.2}


def reproduce(a):
    """Every row of GRID for seeds 0 .. a.seeds - 1 that results.csv or the run folder lacks, training what must be; after each, all that is
    known goes to grid.md beside it. Stopped at any time, it goes on where it was. A row that cannot be (no question of level 1, say) is
    left out, and said at the end."""
    if a.row() != "rl" or a.out or a.trained_on or PROCESSES > 1:
        raise CheckpointError("--stage reproduce chooses --name, --no-gaze, --out, --trained-on and the flags of eval itself, row by row, and is one process. Leave them out; without torchrun")
    path, failed = Path(a.results) / "results.csv", []
    todo = [replace(a, stage="eval", seed=seed, **changed) for seed in range(a.seeds) for rows in GRID.values() for changed in rows]
    tables = {name: [*BESIDE.get(name, ["rl"]), *(replace(a, **changed).row() for changed in rows if changed)] for name, rows in GRID.items()}
    measured = lambda: [r for r in read_rows(path) if (r["world"], r["preset"]) == (a.label(a.world), a.preset)]
    for n, b in enumerate(todo, 1):
        # n is 0 where a suite was left out
        examined = {r["suite"] for r in measured() if (r["row"], r["seed"]) == (b.row(), str(b.seed)) and r["n"] in ("0", str(b.suite_size))}
        skip = b.weights("rl").is_file() and examined >= {*gog.SUITES}
        print(f"grid, {n} of {len(todo)}: {b.row()}, seed {b.seed}{', is there' if skip else ''}", file=sys.stderr)
        try:
            skip or run_stages(b)
        except (data.WorldError, CheckpointError, BlockingIOError) as e:
            failed.append(f"{b.row()}, seed {b.seed}: {e}")
        atomic(path.with_name("grid.md"), lambda p: p.write_text(gog.grid_tables(tables, measured(), PAPER), encoding="utf-8"))
    print(f"to look at: {path.with_name('grid.md')}", file=sys.stderr)
    if failed:
        raise CheckpointError("\n".join(["these rows are left out:", *failed]))


# ------------------------------------------------------------------------------------------------------------ run folder

# flags that may not change when a stage goes on, or its second half would be of another experiment (learning rates may, and steps but those
# of the eyes)
MATTERS = {
    "pretrain": "seed see_steps see_batch word_batch", "sft": "seed world seed_world towns gaze demos wrong_gaze failure_rate sft_batch replay",
    "rl": "seed world seed_world towns gaze device failure_rate rl_questions rl_dev rl_batch group lam search_penalty beta clip_low clip_high advantage mask curriculum temperature"}


class Run:
    """A run folder: the training state (exact resume), one metrics row a step, and the finished weights."""

    def __init__(self, a, stage):
        self.folder, self.stage = a.folder(stage), stage
        self.flags = {"nproc_per_node": PROCESSES} | {k: getattr(a, k) for k in MATTERS.get(stage, MATTERS["rl"]).split()}
        self.weights, self.state, self.csv, self.lock_file = (self.folder / f"{stage}.{end}" for end in ("safetensors", "state.safetensors", "csv", "lock"))
        self.rows, self.stopping, self.going_on = [], False, a.resume
        self.lock = locked(self.lock_file)
        for left in () if RANK else self.folder.glob(f".{stage}.[a-z]*.tmp"):
            left.unlink(missing_ok=True)  # of a process that was killed while it wrote
        signal.signal(signal.SIGINT, self.interrupt)

    def interrupt(self, *_):
        """Ctrl-C: finish the step, then save. A second one stops at once."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not self.rows:  # nothing to save yet
            raise KeyboardInterrupt
        self.stopping = True
        print("\nCtrl-C: saving after this step (once more: stop at once, and lose what came after the last checkpoint)", file=sys.stderr)

    def log(self, **row):
        if "loss" in row:  # a step has been taken
            self.bar.update()
            self.bar.set_postfix({k: row[k] for k in ("part", "loss", "accuracy", "dead", "entropy") if k in row})
        self.rows.append({k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in row.items()})

    def checkpoint(self, modules, opts, every, step, **extra):
        """If it is time: everything that the next step depends on, in one file without pickle: weights, optimisers, counters, metrics."""
        stop = bool(summed(int(self.stopping)))  # all processes, or none
        if step % every and not stop:
            return
        save_state(self.state, modules, opts, extra=json.dumps({"step": step, "flags": self.flags, **extra}), rows=json.dumps(self.rows))
        write_rows(self.csv, self.rows, [*self.rows[0]])
        if stop:
            self.lock.close()
            raise KeyboardInterrupt(f"{step} steps of {self.stage} are in {self.state}")

    def begin(self, steps, modules, opts):
        """With --resume: load the state saved by `checkpoint` into modules and optimisers. Its `extra`, or just step 0 where there is
        none."""
        meta = load_state(self.state, modules, opts) if self.going_on and self.state.is_file() else dict(rows="[]", extra='{"step": 0}')
        self.rows, extra = json.loads(meta["rows"]), json.loads(meta["extra"])
        self.bar = tqdm(total=steps, initial=extra["step"], desc=self.stage, unit="step")
        if changed := [f"--{k.replace('_', '-')} {was}" for k, was in extra.get("flags", {}).items() if was != self.flags.get(k)]:
            raise CheckpointError(f"{self.state}: begun with {', '.join(changed)}. Go on with the same, or delete it to begin this stage anew")
        return extra

    def close(self, columns):
        """The stage is done: its metrics stay, with the curves of some columns, and its training state goes."""
        # the first process has saved its weights: all may go on with them, and delete what nobody needs any more
        stop = bool(summed(int(self.stopping)))
        self.bar.close()
        write_rows(self.csv, self.rows, [*self.rows[0]] if self.rows else [])
        sheet = gog.curve_sheet(self.stage, gog.curve_values(self.rows, columns))
        atomic(self.csv.with_suffix(".png"), lambda p: sheet.save(p, format="PNG"))
        RANK or self.state.unlink(missing_ok=True)
        self.lock.close()
        RANK or self.lock_file.unlink(missing_ok=True)
        if stop:  # Ctrl-C came too late to save a step: the stage is done, and the next is not begun
            raise KeyboardInterrupt


# ---------------------------------------------------------------------------------------------------------------- tables

COLUMNS = "table row world suite seed metric value n preset device minutes".split()
STAGE_COLUMNS = "stage preset world device minutes peak_memory_mb seed".split()
# columns of rl.csv that are drawn
CURVES = ("development", "accuracy", "reward", "dead", "entropy", "gaze_correct", "reflection", "turns", "signal", "loss")


def result_rows(a, table, row, world, suite, metrics, began):
    """Rows of results.csv from {metric: (value, number of questions)}."""
    fixed = dict(table=table, row=row, world=world, suite=suite, seed=a.seed, preset=a.preset, device=a.place(), minutes=f"{(time.time() - began) / 60:.2f}")
    return [fixed | dict(metric=metric, value=f"{value:.4f}", n=n) for metric, (value, n) in metrics.items()]


def write_results(a, rows):
    write_rows(Path(a.results) / "results.csv", rows, COLUMNS, COLUMNS[:6] + ["preset"])


# ----------------------------------------------------------------------------------------------------------------- flags

@dataclass
class Args:
    """Every field is a flag, and its comment is the help."""
    stage: str = "rl"  # pretrain, sft, rl or eval; a missing input stage runs first. reproduce: every row of GRID, some 7 hours a seed
    preset: str = "nano"  # tiny, nano or small
    device: str = "auto"  # auto, cuda, mps or cpu
    world: str = "heraldry"  # heraldry, or the path of a folder world
    seed: int = 0  # of weights, training questions and sampling, of the base model too; the suites are the same for all
    seed_world: int = 0  # of the invented world; of a folder world: which entities are trained on, and how facts are worded
    towns: int = 3000  # of the invented world
    results: str = "results"  # folder of the tables
    out: str = ""  # run folder; default out/WORLD-PRESET-SEED
    resume: bool = False  # go on from the last checkpoint
    save_every: int = 50  # steps between checkpoints of pretrain and sft
    see_steps: int = 3000  # of pretraining: the eyes alone
    see_batch: int = 12  # pictures a step
    word_steps: int = 3200  # lessons in words
    word_batch: int = 12  # lessons a step: at equal time, many small ones teach more than few large ones
    exam: int = 3072  # held-out questions, about so many, that the base model is examined with
    see_lr: float = 0.004  # learning rate of Muon: the eyes' matrices
    see_adam_lr: float = 0.002  # .. of AdamW: everything else while the eyes learn
    word_lr: float = 0.002  # .. of both, while words are learnt
    gaze: bool = True  # may the policy gaze? --no-gaze: neither in demonstrations nor in rollouts (the whole picture and texts only, as MMSearch-R1)
    demos: int = 5750  # trajectories of GoG-Instruct
    wrong_gaze: float = 0.2  # chance, for every object looked for that the base model itself does not miss, that the expert also looks where it is not (and a quarter of that, for every object among others, that it first glances in vain)
    failure_rate: float = 0.03  # of tools while training
    sft_batch: int = 32  # trajectories a step
    replay: float = 0.6  # lessons of the base model on top, for each demonstration, so that pointing and long plans are not forgotten
    sft_lr: float = 0.002  # of Muon: hidden matrices
    sft_adam_lr: float = 0.001  # .. of AdamW: embeddings and norms
    rl_questions: int = 800  # questions that the SFT model is scored on first, where the curriculum is not fresh
    rl_dev: int = 300  # questions of the development split, for keeping the best policy
    rl_steps: int = 40  # updates
    rl_batch: int = 32  # questions a step
    group: int = 8  # rollouts a question
    rl_lr: float = 0.04  # of SGD; it rises for three steps, nearly to this, and falls to 0
    lam: float = 0.1  # weight of the format reward
    search_penalty: float = 0.0  # share of r_acc that a trajectory loses if it used a tool
    beta: float = 0.0  # weight of the KL to the SFT policy
    clip_low: float = 0.2  # the ratio is clipped to 1 - clip_low
    clip_high: float = 0.28  # .. 1 + clip_high
    advantage: str = "std"  # std or mean
    mask: bool = True  # of RL's loss: the policy's own tokens only. --no-mask: what tools have answered, too (to see why the mask is there)
    curriculum: str = "fresh"  # level1, level2, all, learnable, adaptive (all of questions that are scored first) or fresh (new questions of every kind, by pass rates that follow the rollouts)
    temperature: float = 0.8  # of rollouts
    eval_every: int = 20  # RL steps between validations (development split), and between checkpoints
    show_every: int = 8  # RL steps between printed trajectories
    token_budget: int = 4000  # tokens a micro-batch: changes speed and memory, not the update
    name: str = "rl"  # of the policy that rl writes, and of its row in the results; of another than "rl" eval adds the row only. Give one with --demos or --word-steps, or their results replace the usual
    suite_size: int = 300  # questions a held-out suite
    shown: int = 11  # questions of each suite that report.html shows, for each of base, sft and rl
    tools_fail: float = 0.0  # eval only: how often tools fail (--failure-rate: while training)
    turns: int = gog.MAX_TURNS  # eval only: turns that a trajectory may have
    stale: bool = False  # eval only: what changed after training is not in the index
    strangers: int = 0  # eval only: so many more towns in the index, that no question is about
    seeds: int = 3  # reproduce only: how many, from 0 on
    trained_on: str = ""  # eval only: examine the policies of another world (zero-shot); default --world

    def apart(self, *names):
        """What sets these flags apart from the usual ones: "-demos-500", "-no-gaze"; of the usual ones "". Names of folders and rows end with
        it."""
        values = {k.replace("_", "-"): getattr(self, k) for k in names if getattr(self, k) != getattr(Args, k)}
        return "".join(f"-{k}" if x is True else f"-no-{k}" if x is False else f"-{k}-{x}" for k, x in values.items())

    def label(self, world):
        """What runs and results call a world (heraldry or a path), so that those of different worlds never mix."""
        return Path(world).resolve().name + self.apart("seed_world", "towns")

    def variant(self, stage):
        """What sets the model that a stage begins with, or makes, apart from the usual one of its world."""
        return self.apart("word_steps", *["demos", "gaze"] * (stage != "pretrain"))

    def folder(self, stage=""):
        """The run folder of the policies of a world; of the base model, which knows no world, one for all."""
        which = "base" if stage == "pretrain" else self.label(self.trained_on or self.world)
        return Path(self.out or f"out/{which}{self.variant(stage)}-{self.preset}-{self.seed}")

    def place(self):
        """On what it runs: the device, and by how many processes."""
        return f"{PROCESSES} x {self.device}" if PROCESSES > 1 else self.device

    def row(self):
        """The row of the results: the policy's name, and what sets this examination apart from the usual one."""
        return self.name + self.apart(*["gaze"] * (self.name == "rl"), *EVAL_FLAGS)

    def weights(self, stage):
        """What a stage leaves behind."""
        return self.folder(stage) / f"{self.name if stage == 'rl' else stage}.safetensors"


STAGES = {"pretrain": pretrain, "sft": sft, "rl": rl, "eval": evaluate}
CHOICES = {"stage": [*STAGES, "reproduce"], "preset": list(PRESETS), "device": ["auto", "cuda", "mps", "cpu"], "advantage": ["std", "mean"],
           "curriculum": ["level1", "level2", "all", "learnable", "adaptive", "fresh"]}

RANGES = {"seed": (0, 2**32 - 1), "towns": (40, 20_000), "group": (2, 10_000), "temperature": (0.01, 10.0), "replay": (0.0, 100.0), "beta": (0.0, 100.0),
          # of the others: 1 to a million, or 0 to 1
          **dict.fromkeys(("seed_world", "see_steps", "word_steps", "rl_steps", "shown", "strangers"), (0, 10**6))}


arguments = partial(flags, Args, CHOICES, RANGES, __doc__.partition("\n\n")[0])  # of a command line: Args


def timed_as(a, stage):
    """What stages.csv calls the world: with what sets this row of the grid apart, as its minutes leave those of the main job alone."""
    which = {"rl": a.name, "eval": a.row()}.get(stage, "rl")
    return a.label(a.world) + a.variant(stage) + (f", {which}" if which != "rl" else "")


def expected(a, stages):
    """In words: how many minutes these stages took when they last ran with this preset on such a device (best: in this world)."""
    rows = [r for r in read_rows(Path(a.results) / "stages.csv", STAGE_COLUMNS) if (r["preset"], r["device"]) == (a.preset, a.place())]
    # of each stage its runs, the best to tell (of this world, then the latest) last
    known = [sorted((r for r in rows if r["stage"] == s), key=lambda r: r["world"] == timed_as(a, s)) for s in stages]
    minutes = sum(float(k[-1]["minutes"]) for k in known if k)
    return f": about {minutes:.0f} minutes (as noted in {a.results}/stages.csv)" if all(known) else ": how long, nobody has measured yet"


def timed(a, stage):
    """Run a stage; its minutes and the peak memory of the process so far go to results/stages.csv, where the next run finds what to
    expect."""
    path, began = Path(a.results) / "stages.csv", time.time()
    read_rows(path.with_name("results.csv"), COLUMNS)
    write_rows(path, [], STAGE_COLUMNS, STAGE_COLUMNS)  # can the tables be read and written? Else it is said now, not after the stage
    print(f"{stage}: preset {a.preset}, world {a.world}, seed {a.seed}, on {a.place()}{expected(a, [stage])}", file=sys.stderr)
    try:
        STAGES[stage](a)
    except NotFinite as e:
        bad, text = a.weights(stage).with_suffix(".bad.json"), json.dumps([{k: getattr(x, k) for k in ("ids", "trained", "logprobs")} for x in e.args[0]])
        atomic(bad, lambda p: p.write_text(text))
        raise CheckpointError(f"{stage}: a loss, a gradient or a weight is not finite. Nothing of it is saved; its batch is in {bad} (empty for the eyes, whose pictures are drawn anew from seed and step). Go on from the last checkpoint with --resume and a lower learning rate") from None
    finally:
        # else Ctrl-C would still call the failed Run's `interrupt`, and that handler would keep the Run alive, and its lock
        signal.signal(signal.SIGINT, signal.default_int_handler)
    row = dict(stage=stage, preset=a.preset, world=timed_as(a, stage), device=a.place(), seed=a.seed)
    row |= dict(minutes=f"{(time.time() - began) / 60:.1f}", peak_memory_mb=peak_memory())
    write_rows(path, [row], STAGE_COLUMNS, ("stage", "preset", "world", "device", "seed"))
    print(f"{stage}: {row['minutes']} minutes, peak memory {row['peak_memory_mb']} MB", file=sys.stderr)


def run_stages(a):
    """The stage that is asked for, and before it those that it needs and that are not done."""
    # the stage that is asked for is done anew, unless --resume finds it finished
    finished = lambda stage: not a.weights(stage).with_suffix(".state.safetensors").is_file()
    done = lambda stage: a.weights(stage).is_file() and (stage != a.stage or a.resume and finished(stage))
    todo = [stage for stage in list(STAGES)[:list(STAGES).index(a.stage) + 1] if not done(stage)]
    if a.trained_on and todo not in ([], ["eval"]):
        raise CheckpointError(f"{a.weights(todo[0])} is missing. Run python train.py --stage rl --world {a.trained_on} first, then --stage eval --trained-on")
    if todo != [a.stage]:
        print(f"{', then '.join(todo)} will run, as {a.weights(todo[0])} is missing{expected(a, todo)}" if todo else f"{a.stage} is done: {a.weights(a.stage)}", file=sys.stderr)
    for stage in todo:
        timed(replace(a, resume=a.resume or stage != a.stage), stage)  # what is not asked for goes on where it was interrupted


def main():
    a = arguments()
    there = [d for d, found in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available() and PROCESSES == 1), ("cpu", True)) if found]
    a.device = there[0] if a.device == "auto" else a.device
    torch.set_flush_denormal(True)  # a decayed momentum of denormal numbers would slow a CPU down tenfold
    try:
        if a.name != "rl" and a.name in (*STAGES, *ROWS) or not a.name.replace("-", "").replace(".", "").isalnum():
            raise CheckpointError(f"--name {a.name}: no name of a stage or of a row of the results, and of letters, digits, - and . only. Choose another")
        if a.device not in there:
            raise CheckpointError(f"--device {a.device}: this machine has {' and '.join(there)} only. Leave the flag out")
        data.open_world(a.world, a.seed_world, a.towns)  # a bad world is refused before anything is trained
        if PROCESSES > 1:
            work_together(a.device)
        return reproduce(a) if a.stage == "reproduce" else run_stages(a)
    except (data.WorldError, CheckpointError, OSError) as e:
        message, code = f"error: {e}", 2
    except KeyboardInterrupt as e:
        message, code = f"stopped. {str(e) or 'Finished stages, finished suites of eval and the last checkpoint are kept'}. The same command with --resume goes on.", 130
    print(f"\n{message}", file=sys.__stderr__ if RANK else sys.stderr)  # the last line: a progress bar ends with the error that held it
    sys.exit(code)


if __name__ == "__main__":
    main()
