"""The command line: python train.py --stage pretrain | sft | rl | eval | reproduce. Each of the four stages is one
loop, read from top to bottom (eval: over suites and rows of the table); reproduce runs a grid of experiments.

From the paper: SFT on reflective trajectories, then GRPO on the questions that the SFT model mostly fails.
Here instead: one more stage at the beginning. `pretrain` makes the base model, where the paper takes Qwen-VL: first the
    vision encoder alone ("the eyes"), with labels for every patch and image token; then, with the vision encoder
    frozen, lessons in words. A stage whose input is missing runs the stage that makes it first.

Reading order: flags -> the four stages -> the grid -> run folder -> tables -> command line.
`a`: the flags (Args); `v`: the vocabulary; `run`: the run folder of a stage (Run): `begin` loads a checkpoint if it
should resume, `log` adds a row to the csv, `checkpoint` saves now and then, `close` finishes.
"""
import json
import signal
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from zlib import crc32

import torch
from tqdm import tqdm

import data
import gog
import grpo
from model import (PRESETS, CheckpointError, ModelConfig, NotFinite, Policy, Vocabulary, autocast, corpus, load, load_state, lr_factor, number_line,
                   optimisers, save, save_state, set_lr, share, stream, summed, torch_rng, work_together)
from tools import PROCESSES, PROCESSES_HERE, RANK, Environment, Toolbox, atomic, flags, folder_name, locked, make_toolbox, peak_memory, read_rows, write_rows

# ---------------------------------------------------------------------------------------------------------------- flags

@dataclass
class Args:
    """Every field is a flag, and its comment is the flag's help text."""
    stage: str = "rl"  # pretrain, sft, rl or eval (stages that make a missing input run first), or reproduce: every row of GRID, about 8 hours per seed
    preset: str = "nano"  # size of the model: tiny (for tests), nano or small
    device: str = "auto"  # auto, cuda, mps or cpu
    world: str = "heraldry"  # heraldry, or the path of a folder world
    seed: int = 0  # for weights, sampling and training questions, also of the base model; the held-out suites do not depend on it
    seed_world: int = 0  # seed of the invented world; for a folder world: of its splits and of the wording of facts
    towns: int = 3000  # number of towns in the invented world
    results: str = "results"  # folder of the result tables
    out: str = ""  # run folder; default out/WORLD-PRESET-SEED
    resume: bool = False  # continue from the last checkpoint
    save_every: int = 50  # pretrain and sft: steps between checkpoints
    see_steps: int = 2500  # pretrain, first part: steps of the vision encoder alone
    see_batch: int = 12  # pictures per step of the first part
    word_steps: int = 5000  # pretrain, second part: steps on lessons in words
    word_batch: int = 13  # lessons per step; in equal time, many small steps teach more than few large ones
    exam: int = 3072  # approximate number of held-out questions in the exam of the base model
    see_lr: float = 0.0028  # pretrain, first part: learning rate of Muon (matrices of the vision encoder)
    see_adam_lr: float = 0.002  # pretrain, first part: learning rate of AdamW (everything else)
    word_lr: float = 0.002  # pretrain, second part: learning rate of Muon and AdamW
    gaze: bool = True  # may the policy gaze? --no-gaze: neither in demonstrations nor in rollouts (only whole-picture and text search, as MMSearch-R1)
    demos: int = 5750  # number of trajectories in GoG-Instruct
    wrong_gaze: float = 0.2  # probability that the expert first gazes at a wrong place (if the base model found the target by itself), or overlooks the target among look-alikes; a useless glance comes first with a quarter of it
    failure_rate: float = 0.03  # probability that a tool fails during training
    sft_batch: int = 96  # trajectories per step. Few large steps take less time than many small ones (32), and leave RL more to learn (README)
    replay: float = 0.6  # lessons of the base model per demonstration, mixed into SFT so that pointing, lists of look-alikes and copying are not forgotten, and RL has some longer chains to begin with
    sft_lr: float = 0.002  # learning rate of Muon (hidden matrices)
    sft_adam_lr: float = 0.001  # learning rate of AdamW (embeddings and norms)
    rl_questions: int = 800  # questions that the SFT policy is scored on before RL (not used by the curriculum fresh)
    rl_dev: int = 300  # questions of the development split, used to select the best policy
    rl_steps: int = 50  # number of RL updates
    rl_batch: int = 32  # questions per update
    group: int = 8  # rollouts per question
    rl_lr: float = 0.08  # peak learning rate of SGD (three steps of warm-up; over the second half, linear decay to 0)
    rl_deep: float = 3.0  # the learning rate of the deeper half of the layers is this many times as high
    lam: float = 0.1  # lambda, the weight of the format reward
    search_penalty: float = 0.0  # fraction of r_acc that a trajectory loses if it used a tool
    beta: float = 0.0  # weight of the KL penalty, relative to the SFT policy
    clip_low: float = 0.2  # the ratio is clipped to at least 1 - clip_low
    clip_high: float = 0.28  # the ratio is clipped to at most 1 + clip_high
    advantage: str = "std"  # std (divide by the standard deviation of the group) or mean (do not)
    mask: bool = True  # train on the policy's own tokens only. --no-mask: on every token, also of questions and tool results (shows why the mask is needed)
    curriculum: str = "fresh"  # fresh (new questions; their kinds are drawn by running pass rates), or of questions scored beforehand: level2 (the paper's: those that the SFT policy mostly fails), level1, all, learnable, adaptive
    temperature: float = 0.8  # sampling temperature of rollouts
    eval_every: int = 20  # RL steps between validations on the development split, and between checkpoints
    show_every: int = 8  # RL steps between printed trajectories
    token_budget: int = 4000  # tokens per micro-batch: changes speed and memory, not the update
    name: str = "rl"  # name of the RL policy and of its row in the results. Other than "rl": eval adds only that row. Set it with flags of earlier stages (--demos, --word-steps ...), or eval overwrites the default rows
    suite_size: int = 300  # questions per held-out suite
    shown: int = 11  # questions per suite that report.html shows, for each of base, sft and rl
    tools_fail: float = 0.0  # eval only: probability that a tool fails (during training: --failure-rate)
    turns: int = gog.MAX_TURNS  # eval only: maximum number of turns of a trajectory
    stale: bool = False  # eval only: the index lacks what changed after training
    strangers: int = 0  # eval only: distractor towns drawn for the index, about which no question asks; only those with new names and arms are added
    seeds: int = 3  # reproduce only: number of seeds, beginning with 0
    trained_on: str = ""  # eval only: evaluate the policies that were trained on this world (zero-shot); default --world

    def suffix(self, *names):
        """Suffix of folder and row names: those of these flags that differ from their defaults, e.g.
        "-demos-500-no-gaze"; else ""."""
        values = {k.replace("_", "-"): getattr(self, k) for k in names if getattr(self, k) != getattr(Args, k)}
        return "".join(f"-{k}" if x is True else f"-no-{k}" if x is False else f"-{k}-{x}" for k, x in values.items())

    def label(self, world):
        """Name of a world (heraldry or a path) in run folders and results; differs for worlds made with other flags."""
        return folder_name(world) + self.suffix("seed_world", "towns")

    def variant(self, stage):
        """Suffix for --word-steps and, for all stages after pretrain, four flags of SFT. (With other flags of these
        stages, --see-steps or --sft-lr, choose a folder of its own: --out.)"""
        return self.suffix("word_steps", *(["demos", "gaze", "replay", "wrong_gaze"] if stage != "pretrain" else []))

    def folder(self, stage=""):
        """Run folder of a stage. The base model is trained on no world, so all worlds share its folder."""
        which = "base" if stage == "pretrain" else self.label(self.trained_on or self.world)
        return Path(self.out or f"out/{which}{self.variant(stage)}-{self.preset}-{self.seed}")

    def hardware(self):
        """The hardware, as tables name it: the device, and the number of processes if there are several."""
        return f"{PROCESSES} x {self.device}" if PROCESSES > 1 else self.device

    def row(self):
        """Row name in the results: the policy's name, and the flags that make this evaluation differ from the usual."""
        return self.name + self.suffix(*(["gaze"] if self.name == "rl" else []), *EVAL_FLAGS)

    def weights(self, stage):
        """The file of weights that a stage writes."""
        return self.folder(stage) / f"{self.name if stage == 'rl' else stage}.safetensors"


# --------------------------------------------------------------------------------------------------------------- stages

def pretrain(a):
    """Train the base model (the paper takes Qwen-VL) in two parts: "see", dense labels for the vision encoder; then
    "words", all lessons mixed."""
    run = Run(a, "pretrain")
    torch.manual_seed(a.seed)
    v = Vocabulary.learn(corpus())
    config = ModelConfig(**{**PRESETS[a.preset], "vocab": v.size})
    policy = Policy(config).to(a.device)
    number_line(policy.embed_tokens.weight, [v.word(n) for n in range(100)])
    # outputs per cell: 4 box edges and the logits of all parts. One head for patches, one for image tokens
    outputs = 4 + sum(map(len, grpo.PARTS.values()))
    heads = torch.nn.ModuleList(torch.nn.Linear(w, outputs) for w in (config.vit_width, config.width)).to(a.device)
    other_params = [*heads.parameters(), policy.embed_tokens.weight]  # also word embeddings: see_step aligns them with image tokens
    eye_opts = [*optimisers(policy.vision.named_parameters(), a.see_lr, a.see_adam_lr, newton_schulz=7), torch.optim.AdamW(other_params, a.see_adam_lr, weight_decay=0.0)]
    word_opts = optimisers(((n, p) for n, p in policy.freeze_eyes().named_parameters() if p.requires_grad), a.word_lr, a.word_lr)
    env = Environment(v, None, config)
    parts = (("see", 0, a.see_steps, eye_opts, partial(grpo.labelled_pictures, config, a.seed, a.see_batch)),
             ("words", a.see_steps, a.word_steps, word_opts, partial(grpo.schooling, env, a.seed, a.word_batch, a.word_steps)))
    start = run.begin(a.see_steps + a.word_steps, [policy, heads], eye_opts + word_opts)["step"]
    for part, earlier, steps, opts, make in parts:  # earlier: number of steps of the earlier parts
        first = min(max(0, start - earlier), steps)
        policy.freeze_eyes(part != "see")
        for step, batch in enumerate(stream(make, first, steps), first):
            lr = set_lr(opts, lr_factor(step, steps))
            with autocast(a.device):
                if part == "see":
                    loss, norm = grpo.see_step(policy, heads, [torch.from_numpy(x).to(a.device) for x in batch], v, opts)
                else:
                    loss, norm = grpo.supervised_step(policy, env, batch, opts, a.token_budget)
            run.log(step=earlier + step, part=part, loss=loss, grad_norm=norm, lr=lr, seconds=run.bar.format_dict["elapsed"])
            run.checkpoint([policy, heads], eye_opts + word_opts, a.save_every if step + 1 < steps else 1, step=earlier + step + 1)
    # The exam comes before the weights are saved: a run that is stopped during the exam repeats it with --resume
    began, scores = time.time(), grpo.exam(policy, env, a.exam)
    write_results(a, result_rows(a, "exam", "base" + a.variant("pretrain"), "lessons", "held-out", scores, began))
    save(policy, run.weights, tokenizer=v.text)
    run.close(("loss", "lr"))
    print("base model, held-out: " + ", ".join(f"{k} {value:.3f} ({n})" for k, (value, n) in scores.items()), file=sys.stderr)


def sft(a):
    """The paper's first stage: causal LM loss on the expert's own tokens and on some lessons of the base model."""
    (policy, v), run = load(a.weights("pretrain"), a.device), Run(a, "sft")
    world = data.open_world(a.world, a.seed_world, a.towns)
    env = Environment(v, make_toolbox(world, a.failure_rate, a.seed), policy.config, gaze=a.gaze)
    demos = grpo.instruct(policy, env, world, a.demos, a.seed, a.wrong_gaze)
    total = -(-len(demos) // a.sft_batch)  # one epoch
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
    score, trajectories = development(policy, env, world, a)
    save(policy, run.weights, tokenizer=v.text)
    run.close(("loss", "grad_norm", "lr"))
    print("\n".join([*map(gog.tell, trajectories[:3]), f"sft: development accuracy {score:.3f}"]), file=sys.stderr)


def development(policy, env, world, a):
    """Greedy accuracy on the development split, with questions as in the suites; and the trajectories. Within a run,
    nothing else selects."""
    questions = data.questions(world, gog.DEV_MIX, a.rl_dev, f"dev/{a.seed}", ("dev",))
    reliable = Toolbox(env.toolbox.image_index, env.toolbox.text_index)  # tools that do not fail
    trajectories = gog.evaluate(policy, Environment(env.v, reliable, policy.config, gaze=a.gaze), questions, progress="development")
    return gog.behaviour(trajectories)["accuracy"], trajectories


def rl(a):
    """The paper's second stage: GRPO on questions drawn by how often the policy succeeds (grpo.Curriculum)."""
    (policy, v), run = load(a.weights("sft"), a.device), Run(a, a.name)
    world = data.open_world(a.world, a.seed_world, a.towns)
    env = Environment(v, make_toolbox(world, a.failure_rate, a.seed), policy.config, gaze=a.gaze)
    fresh = a.curriculum == "fresh"  # entries are kinds of questions; else single questions, scored beforehand
    entries = grpo.askable(world) if fresh else [*data.questions(world, data.RL_MIX, a.rl_questions, f"rl/{a.seed}"), *world.own[::2]]
    reference = load(a.weights("sft"), a.device)[0].requires_grad_(False) if a.beta else None
    # Why SGD: the gradients of two batches had a cosine of 0.16; the steps that AdamW would have made of them 0.06,
    # Muon's 0.02. Why the deeper half learns faster: its gradients agree best (where to attend, so what to copy next:
    # 0.45; input and first layer: 0.2), but are the smallest, so at one rate the others' noise drowns them (trials.md)
    deep = {*map(id, policy.layers[len(policy.layers) // 2:].parameters())}
    opts = [torch.optim.SGD([dict(params=[p], lr=a.rl_lr * (a.rl_deep if id(p) in deep else 1)) for p in policy.parameters() if p.requires_grad], momentum=0.9)]
    saved = run.begin(a.rl_steps, [policy], opts)
    rates = saved.get("pass_rates") or ([0.5] * len(entries) if fresh else grpo.pass_rates(policy, env, entries, 4, a.temperature, a.seed))
    worth = [entry[2] if isinstance(entry, tuple) else 1 for entry in entries]
    curriculum = grpo.Curriculum(rates, a.curriculum, a.seed, pool=saved.get("pool"), worth=worth)
    # Trajectories and pictures of the report, and the step at which each alarm was printed. Not saved: empty after
    # --resume
    shown, pictures, alarmed = [], {}, {}
    # [development accuracy, step] of the best policy so far, and its file, which becomes the result at the end
    best, best_file = saved.get("best", [-1.0, 0]), run.weights.with_suffix(".best.safetensors")
    for step in range(saved["step"], a.rl_steps + 1):  # one pass more than updates: the last one only validates
        score = ""
        if step % a.eval_every == 0 or step == a.rl_steps:  # the best policy by validation is kept, not the last
            score, _ = development(policy, env, world, a)
            print(f"\nstep {step}: development accuracy {score:.3f}", file=sys.stderr)
            if score >= best[0]:  # if equal, the later one, which was trained with a lower learning rate: less noise
                best = [score, step]
                save(policy, best_file, tokenizer=v.text)
        if step == a.rl_steps:
            run.log(step=step, development=score)
            group_report(a, run, shown, pictures)
            break
        # one update: draw questions, roll out, step (grpo.iteration). What follows it: log, alarms, report, checkpoint
        lr = set_lr(opts, lr_factor(step, a.rl_steps, warmup=3, decay=0.5))
        chosen = curriculum.draw(a.rl_batch, step)
        env.toolbox.rng.seed(f"tools/{a.seed}/{step}/{RANK}")  # all randomness depends on seed and step only: exact --resume
        questions = grpo.ask_each(world, [entries[i] for i in chosen], f"rl/{a.seed}/{step}")
        batch, advantages, batch_rates, stats = grpo.iteration(policy, reference, env, questions, opts, a, torch_rng(policy.device, "rl", a.seed, step))
        curriculum.seen(chosen, batch_rates)
        run.log(step=step, **stats, lr=lr, development=score)  # development: of the policy before this update
        first = next((r for r in run.rows if float(r["dead"]) < 1), run.rows[0])  # with live groups: entropy is theirs
        for metric, alarm in alarms({k: float(v) for k, v in first.items() if v}, stats).items():
            if alarmed.setdefault(metric, step) == step:  # print each alarm once
                tqdm.write(f"step {step}: {alarm}", file=sys.stderr)
        if step % a.show_every == 0:
            print("\n" + gog.tell(batch[int(advantages.argmax())]), file=sys.stderr)
            shown, pictures = ([], {}) if len(shown) > 200 else (shown, pictures)  # limits the size of the report
            for i, (t, advantage) in enumerate(zip(batch[:3 * a.group], advantages.tolist())):
                shown.append(report_entry(a, t, world, v, pictures, f"{step} {i // a.group}", f"step {step}", f"rollout {i % a.group + 1}", advantage))
            group_report(a, run, shown, pictures)
        run.checkpoint([policy], opts, a.eval_every, step=step + 1, pass_rates=curriculum.pass_rates, pool=curriculum.pool, best=best)
    atomic(run.weights, lambda p: p.write_bytes(best_file.read_bytes()))
    run.close(CURVES, best_file)
    print(f"best: step {best[1]}, development accuracy {best[0]:.3f}, kept as {run.weights}", file=sys.stderr)


def group_report(a, run, entries, pictures):
    """Write rl-report.html: groups of rollouts side by side, and the curves so far."""
    about = f"Preset {a.preset}, seed {a.seed}, on {a.hardware()}; three questions of every {a.show_every}th step since training was last started."
    gog.write_report(run.folder / f"{a.name}-report.html", f"{a.label(a.world)}: groups of rollouts while RL trains", about, entries, pictures, curves=gog.curve_values(run.rows, CURVES))


def alarms(first, now):
    """Signs of a collapse, {metric: text}: compares the metrics of this iteration (`now`) with those of the first."""
    # alarm if a metric falls below this fraction of its first value; entropy and reward only if some groups are alive
    least = {k: 0.2 for k in grpo.LOGGED if k.endswith("_share") and first[k] > 0.05} | ({"entropy": 0.2, "reward": 0.7} if now["dead"] < 1 else {})
    fell = {k: f"{k} fell from {first[k]:.2f} to {now[k]:.2f}" for k, fraction in least.items() if now[k] < fraction * first[k]}
    return fell | ({"tokens": f"tokens per trajectory rose from {first['tokens']:.0f} to {now['tokens']:.0f}"} if now["tokens"] > 2 * first["tokens"] else {})


def evaluate(a):
    """Evaluate the policies and all baselines (if a.row() is not "rl": only that row) on six held-out suites (and on a
    folder world's own questions).

    Writes results/results.csv, one measurement per row; rows of other worlds and seeds stay. Also writes report.html
    and sample pictures. Baselines that are schedules (gog.SCHEDULES) and `withheld` use the RL policy.
    """
    world = data.with_strangers(data.open_world(a.world, a.seed_world, a.towns), a.strangers)
    policies = {row: load(a.weights(stage), a.device) for row, stage in (("base", "pretrain"), ("sft", "sft"), ("rl", "rl"))}
    world_name = a.label(a.world) + "-zero-shot" * bool(a.trained_on)  # in the tables
    policy_row = a.row()  # if "rl", all baselines are evaluated, too; else this row only
    usual_toolbox = make_toolbox(world, a.tools_fail, a.seed)  # the index as it was at training time
    table, entries, pictures = [], [], {}
    for suite in (*(["own"] if world.own[1:] else []), *gog.SUITES):
        try:
            search_world, questions = (world, world.own[1::2]) if suite == "own" else gog.suite(world, suite, a.suite_size)
        except data.WorldError as e:  # a small world may have no deep chains, or no look-alikes
            print(f"suite {suite} is skipped: {e}", file=sys.stderr)
            write_results(a, result_rows(a, "main", policy_row, world_name, suite, {"left_out": (1, 0)}, time.time()))
            continue
        toolbox = make_toolbox(search_world, a.tools_fail, a.seed, late=True) if suite == "live" and not a.stale else usual_toolbox
        for row in (r for r in (ROWS if policy_row == "rl" else ["rl"]) if (suite, r) != ("own", "oracle")):  # the oracle has no plan for a user's own questions
            policy, v = policies.get(row, policies["rl"])
            began, env = time.time(), Environment(v, toolbox, policy.config, withhold=row == "withheld", gaze=a.gaze)
            trajectories = gog.evaluate(policy, env, questions, row, a.seed, a.turns, progress=f"{suite}, {row}")
            metrics = {k: (x, len(questions)) for k, x in gog.behaviour(trajectories).items()} | gog.by_size(trajectories)
            row_name = policy_row if row == "rl" else row
            table += result_rows(a, "main", row_name, world_name, suite, metrics, began)
            if row_name == "rl" and not a.seed:
                ending_of = lambda t: "failure" if not t.correct else "recovery" if any(gog.looked_elsewhere(t)) else "success"
                for ending, t in {ending_of(t): t for t in reversed(trajectories)}.items():  # the first of each
                    atomic(Path(a.results) / f"{world_name}-{suite}-{ending}.png", lambda p: gog.poster(t).save(p, format="PNG"))
            for i, t in enumerate(trajectories[:a.shown] if row in policies else ()):
                entries.append(report_entry(a, t, search_world, v, pictures, f"{suite} {i}", suite, row_name))
        write_results(a, table)  # after every suite, so that nothing measured is lost
    accuracy = gog.accuracy_table(table)
    print("\n".join(["", f"{'accuracy %':<12}" + "".join(f"{c:>8}" for c in accuracy["columns"]),
                     *(f"{row:<12}" + "".join(f"{'' if x is None else format(x, '.1f'):>8}" for x in values) for row, *values in accuracy["rows"])]))
    asked_of = "the policies before SFT (base), after it (sft) and after RL (rl)" if policy_row == "rl" else policy_row
    about = f"Preset {a.preset}, seed {a.seed}, on {a.hardware()}; the first {a.shown} questions of each suite, asked of {asked_of}."
    page = "-".join(["report", *([world_name] if a.trained_on else []), *([policy_row] if policy_row != "rl" else [])])  # other worlds and rows get their own page
    curves = gog.curve_values(read_rows(a.weights("rl").with_suffix(".csv")), CURVES)
    gog.write_report(a.folder() / f"{page}.html", f"{world_name}: what the policies do", about, entries, pictures, accuracy, curves)


def report_entry(a, t, world, v, pictures, key, suite, policy, advantage=None):
    """One trajectory as an entry of the report: `key` of its question, suite, policy, rewards, advantage, and its turns
    (gog.record)."""
    r_acc = grpo.accuracy_reward(t, a.search_penalty)
    judged = dict(r_acc=r_acc, reward=grpo.reward(r_acc, t.well_formed, a.lam), advantage=advantage)
    return dict(key=key, suite=suite, policy=policy) | gog.record(t, world, v, pictures) | judged


# ------------------------------------------------------------------------------------------------------------- the grid

# rows of the main table, all evaluated together with "rl"
ROWS = ("random", "base", "direct", "full-search", "no-gaze", "sft", "rl", "withheld", "oracle")
EVAL_FLAGS = ("tools_fail", "turns", "stale", "strangers")  # flags that change the evaluation, but not the policy
# Tables of the paper, and of questions that it leaves open: for each row, the flags that differ from the default. A row
# with its own name is trained first, on the same number of rollouts unless rl_steps is given (0: SFT only)
GRID = {
    "main": [{}],
    # the second row is trained as MMSearch-R1 is
    "Selective Gaze": [dict(name="no-gaze-sft", gaze=False, rl_steps=0), dict(name="no-gaze-rl", gaze=False, search_penalty=0.1)],
    "robustness": [dict(tools_fail=0.05), dict(tools_fail=0.2), dict(stale=True), *(dict(turns=n) for n in (2, 4, 6, 10)), *(dict(strangers=n) for n in (10_000, 100_000))],
    "curriculum": [dict(name=f"rl-{mode}", curriculum=mode) for mode in ("level1", "level2", "all", "learnable", "adaptive")],
    "GRPO": [dict(name="rl-group-4", group=4, rl_batch=64), dict(name="rl-group-16", group=16, rl_batch=16), dict(name="rl-mean-only", advantage="mean"),
             dict(name="rl-lambda-0", lam=0.0), dict(name="rl-lambda-0.2", lam=0.2), dict(name="rl-kl-0.001", beta=0.001), dict(name="rl-no-mask", mask=False),
             *(dict(name=f"rl-lr-{lr}", rl_lr=lr) for lr in (0.02, 0.04, 0.16)), dict(name="rl-deep-1", rl_deep=1.0)],
    "scale": [*(dict(name=f"sft-demos-{n}", demos=n, rl_steps=0) for n in (500, 2000, 20000)), *(dict(name=f"sft-words-{n}", word_steps=n, rl_steps=0) for n in (2500, 10000)), dict(name="rl-updates-120", rl_steps=120)]}
# reference rows at the top of a table (default: rl)
BESIDE = {"main": ROWS, "Selective Gaze": ["sft", "rl"], "scale": ["sft", "rl"]}
# The paper's mean accuracies of Qwen2.5-VL-7B, in percent. no-gaze-rl: MMSearch-R1. no-gaze-sft: SFT without Selective
# Gaze. rl-level1: the mean of the row in the paper's table (printed as its average: 47.28)
PAPER = {"direct": 20.3, "full-search": 44.4, "no-gaze-rl": 36.9, "sft": 43.3, "rl": 53.2, "no-gaze-sft": 41.8, "rl-level1": 50.5, "rl-level2": 53.2}


def reproduce(a):
    """Run every row of GRID for seeds 0 .. a.seeds - 1 that results.csv or the run folder lacks, training policies as
    needed.

    After each row, all results so far are written to grid.md beside results.csv. The run can be stopped at any time and
    goes on where it was. Rows that are impossible (e.g. there is no question of level 1) are left out and listed at the
    end in a CheckpointError.
    """
    if a.row() != "rl" or a.seed or a.out or a.trained_on or PROCESSES > 1:
        raise CheckpointError("--stage reproduce sets --seed, --name, --no-gaze, --out, --trained-on and the flags of eval itself, row by row, in one process. Omit these flags, and do not use torchrun")
    path, failed = Path(a.results) / "results.csv", []
    jobs = [replace(a, stage="eval", seed=seed, **overrides) for seed in range(a.seeds) for rows in GRID.values() for overrides in rows]
    tables = {name: [*BESIDE.get(name, ["rl"]), *(replace(a, **overrides).row() for overrides in rows if overrides)] for name, rows in GRID.items()}
    measured = lambda: [r for r in read_rows(path) if (r["world"], r["preset"]) == (a.label(a.world), a.preset)]
    for n, job in enumerate(jobs, 1):
        # n is 0 for a suite that was left out
        measured_suites = {r["suite"] for r in measured() if (r["row"], r["seed"]) == (job.row(), str(job.seed)) and r["n"] in ("0", str(job.suite_size))}
        finished = job.weights("rl").is_file() and measured_suites >= {*gog.SUITES}
        print(f"grid, {n} of {len(jobs)}: {job.row()}, seed {job.seed}{', already measured' if finished else ''}", file=sys.stderr)
        try:
            if not finished: run_stages(job)
        except (data.WorldError, CheckpointError, BlockingIOError) as e:
            failed.append(f"{job.row()}, seed {job.seed}: {e}")
        atomic(path.with_name("grid.md"), lambda p: p.write_text(gog.grid_tables(tables, measured(), PAPER), encoding="utf-8"))
    print(f"tables: {path.with_name('grid.md')}", file=sys.stderr)
    if failed:
        raise CheckpointError("\n".join(["these rows failed:", *failed]))


# ----------------------------------------------------------------------------------------------------------- run folder

# Flags that must not change on --resume, or the second half of a stage would belong to another experiment. Learning
# rates and RL steps may change; word steps, too, but they name the folder (`variant`), unless --out does
MATTERS = {
    "pretrain": "seed see_steps see_batch word_batch", "sft": "seed world seed_world towns gaze device demos wrong_gaze failure_rate sft_batch replay",
    "rl": "seed world seed_world towns gaze device failure_rate rl_questions rl_dev rl_batch group lam search_penalty beta clip_low clip_high advantage mask curriculum temperature"}


class Run:
    """The run folder of one stage: training state (for exact resume), metrics (one csv row per step), finished weights,
    and a lock."""

    def __init__(self, a, stage):
        self.folder, self.stage = a.folder(stage), stage
        # what --resume compares: also the weights that the stage begins with, which may have been replaced
        inputs = {f.name: crc32(f.read_bytes()) for f in [a.weights("pretrain" if stage == "sft" else "sft")] if stage != "pretrain" and f.is_file()}
        self.flags = {"nproc_per_node": PROCESSES} | {k: getattr(a, k) for k in MATTERS.get(stage, MATTERS["rl"]).split()} | inputs
        self.weights, self.state, self.csv, self.lock_file = (self.folder / f"{stage}.{end}" for end in ("safetensors", "state.safetensors", "csv", "lock"))
        self.rows, self.stopping, self.resume = [], False, a.resume
        self.lock = locked(self.lock_file)
        for leftover in () if RANK else self.folder.glob(f".{stage}.[a-z]*.tmp"):
            leftover.unlink(missing_ok=True)  # of a process that was killed while writing
        signal.signal(signal.SIGINT, self.interrupt)

    def interrupt(self, *_):
        """Handler of Ctrl-C: finish the step, then save. A second Ctrl-C stops at once."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not self.rows:  # nothing to save yet
            raise KeyboardInterrupt
        self.stopping = True
        print("\nCtrl-C: saving after this step (press again to stop at once and lose the steps since the last checkpoint)", file=sys.stderr)

    def log(self, **row):
        if "loss" in row:  # else a validation without a step
            self.bar.update()
            self.bar.set_postfix({k: row[k] for k in ("part", "loss", "accuracy", "dead", "entropy") if k in row})
        self.rows.append({k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in row.items()})

    def checkpoint(self, modules, opts, every, step, **extra):
        """Every `every` steps, or after Ctrl-C: save all that the next step depends on (weights, optimisers, counters,
        metrics) in one safetensors file. After Ctrl-C, then raises KeyboardInterrupt."""
        stop = bool(summed(int(self.stopping)))  # the same in all processes
        if step % every and not stop:
            return
        save_state(self.state, modules, opts, extra=json.dumps({"step": step, "flags": self.flags, **extra}), rows=json.dumps(self.rows))
        write_rows(self.csv, self.rows, [*self.rows[0]])
        if stop:
            self.lock.close()
            raise KeyboardInterrupt(f"{step} steps of {self.stage} are in {self.state}")

    def begin(self, steps, modules, opts):
        """With --resume, load the state saved by `checkpoint` into modules and optimisers. Returns its step and `extra`
        values, or {"step": 0} if there is no state. CheckpointError if a flag of MATTERS, or the policy that the stage
        began with, has changed."""
        meta = load_state(self.state, modules, opts) if self.resume and self.state.is_file() else dict(rows="[]", extra='{"step": 0}')
        self.rows, extra = json.loads(meta["rows"]), json.loads(meta["extra"])
        self.bar = tqdm(total=steps, initial=extra["step"], desc=self.stage, unit="step")
        if changed := [f"another {k}" if "." in k else f"--{k.replace('_', '-')} {was}" for k, was in extra.get("flags", {}).items() if was != self.flags.get(k)]:
            raise CheckpointError(f"{self.state}: this run was started with {', '.join(changed)}. Resume with the same, or delete the file to restart this stage")
        return extra

    def close(self, columns, *leftovers):
        """Finish the stage: write metrics and the curves of `columns`, delete the training state and `leftovers` (last,
        so that a kill before that loses nothing), release the lock."""
        # also a barrier: from here on, all processes know that rank 0 has saved the weights
        stop = bool(summed(int(self.stopping)))
        self.bar.close()
        write_rows(self.csv, self.rows, [*self.rows[0]] if self.rows else [])
        sheet = gog.curve_sheet(self.stage, gog.curve_values(self.rows, columns))
        atomic(self.csv.with_suffix(".png"), lambda p: sheet.save(p, format="PNG"))
        for file in () if RANK else (self.state, *leftovers):
            file.unlink(missing_ok=True)
        self.lock.close()
        if not RANK: self.lock_file.unlink(missing_ok=True)
        if stop:  # Ctrl-C after the last step: the stage is done, but the next one is not begun
            raise KeyboardInterrupt


# --------------------------------------------------------------------------------------------------------------- tables

COLUMNS = "table row world suite seed metric value n preset device minutes".split()
STAGE_COLUMNS = "stage preset world device minutes peak_memory_mb seed".split()
# columns of rl.csv that are plotted
CURVES = ("development", "accuracy", "reward", "dead", "entropy", "gaze_correct", "reflection", "turns", "signal", "loss")


def result_rows(a, table, row, world, suite, metrics, began):
    """{metric: (value, number of questions)} as rows of results.csv. `began`: start time, for the column minutes."""
    fixed = dict(table=table, row=row, world=world, suite=suite, seed=a.seed, preset=a.preset, device=a.hardware(), minutes=f"{(time.time() - began) / 60:.2f}")
    return [fixed | dict(metric=metric, value=f"{value:.4f}", n=n) for metric, (value, n) in metrics.items()]


def write_results(a, rows):
    write_rows(Path(a.results) / "results.csv", rows, COLUMNS, COLUMNS[:6] + ["preset"])


# --------------------------------------------------------------------------------------------------------- command line

STAGES = {"pretrain": pretrain, "sft": sft, "rl": rl, "eval": evaluate}
CHOICES = {"stage": [*STAGES, "reproduce"], "preset": list(PRESETS), "device": ["auto", "cuda", "mps", "cpu"], "advantage": ["std", "mean"],
           "curriculum": ["level1", "level2", "all", "learnable", "adaptive", "fresh"]}

RANGES = {"seed": (0, 2**32 - 1), "towns": (40, 20_000), "group": (2, 10_000), "temperature": (0.01, 10.0), "replay": (0.0, 100.0), "beta": (0.0, 100.0), "rl_deep": (0.0, 100.0),
          # other flags: 1 to a million (int), 0 to 1 (float)
          **dict.fromkeys(("seed_world", "see_steps", "word_steps", "rl_steps", "shown", "strangers"), (0, 10**6))}


arguments = partial(flags, Args, CHOICES, RANGES, __doc__.partition("\n\n")[0])  # parses a command line into Args


def timed_as(a, stage):
    """World column of stages.csv. The row's name in it keeps grid runs from overwriting timings of the main run."""
    which = {"rl": a.name, "eval": a.row()}.get(stage, "rl")
    return a.label(a.world) + a.variant(stage) + (f", {which}" if which != "rl" else "")


def expected(a, stages):
    """Text on the expected duration: minutes of the latest runs with this preset and device, best in this world."""
    rows = [r for r in read_rows(Path(a.results) / "stages.csv", STAGE_COLUMNS) if (r["preset"], r["device"]) == (a.preset, a.hardware())]
    # the runs of each stage; the most informative one comes last (of this world, then the latest)
    runs = [sorted((r for r in rows if r["stage"] == s), key=lambda r: r["world"] == timed_as(a, s)) for s in stages]
    minutes = sum(float(of_stage[-1]["minutes"]) for of_stage in runs if of_stage)
    return f": about {minutes:.0f} minutes (from {a.results}/stages.csv)" if all(runs) else ": duration not measured yet"


def unfinished(a, stage):
    """Is there a training state to resume from?"""
    return a.weights(stage).with_suffix(".state.safetensors").is_file()


def timed(a, stage):
    """Run a stage. Its minutes, and the peak memory of the process so far, are added to results/stages.csv, for the
    estimates of later runs, unless it was resumed. CheckpointError if a loss, a gradient or a weight is not finite."""
    path, began, resumed = Path(a.results) / "stages.csv", time.time(), a.resume and unfinished(a, stage)
    read_rows(path.with_name("results.csv"), COLUMNS)
    write_rows(path, [], STAGE_COLUMNS, STAGE_COLUMNS)  # fails now, not after the stage, if the tables cannot be read or written
    print(f"{stage}: preset {a.preset}, world {a.world}, seed {a.seed}, on {a.hardware()}{expected(a, [stage])}", file=sys.stderr)
    try:
        STAGES[stage](a)
    except NotFinite as e:
        bad, text = a.weights(stage).with_suffix(".bad.json"), json.dumps([{k: getattr(x, k) for k in ("ids", "trained", "logprobs")} for x in e.args[0]])
        atomic(bad, lambda p: p.write_text(text))
        raise CheckpointError(f"{stage}: a loss, a gradient or a weight is not finite. Nothing was saved; the batch is in {bad} (empty if a weight was found not finite on saving, and for the vision encoder, whose pictures depend on seed and step only). Resume from the last checkpoint with --resume and a lower learning rate") from None
    finally:
        # else Ctrl-C would still call `interrupt` of the failed Run, and this handler would keep the Run's lock alive
        signal.signal(signal.SIGINT, signal.default_int_handler)
    row = dict(stage=stage, preset=a.preset, world=timed_as(a, stage), device=a.hardware(), seed=a.seed)
    row |= dict(minutes=f"{(time.time() - began) / 60:.1f}", peak_memory_mb=peak_memory())
    # the minutes of a resumed stage are those of a part only
    if not resumed: write_rows(path, [row], STAGE_COLUMNS, ("stage", "preset", "world", "device", "seed"))
    print(f"{stage}: {row['minutes']} minutes, peak memory {row['peak_memory_mb']} MB", file=sys.stderr)


def run_stages(a):
    """Run the requested stage, and before it the stages that make its missing inputs (rl needs no base model, if there
    is an SFT policy)."""
    # the requested stage runs again even if it is done, unless --resume finds it finished
    is_done = lambda stage: a.weights(stage).is_file() and (stage != a.stage or a.resume and not unfinished(a, stage)) or (stage, a.stage) == ("pretrain", "rl") and a.weights("sft").is_file()
    todo = [stage for stage in list(STAGES)[:list(STAGES).index(a.stage) + 1] if not is_done(stage)]
    if a.trained_on and todo not in ([], ["eval"]):
        raise CheckpointError(f"--trained-on evaluates only, and needs trained policies. Run python train.py --stage rl --world {a.trained_on} first, then --stage eval --trained-on {a.trained_on}")
    if todo != [a.stage]:
        print(f"{', then '.join(todo)} will run, as {a.weights(todo[0])} is missing{expected(a, todo)}" if todo else f"{a.stage} is already done: {a.weights(a.stage)}", file=sys.stderr)
    for stage in todo:
        timed(replace(a, resume=a.resume or stage != a.stage), stage)  # earlier stages always continue where they were interrupted


def main():
    a = arguments()
    available = [d for d, found in (("cuda", torch.cuda.device_count() >= PROCESSES_HERE), ("mps", torch.backends.mps.is_available() and PROCESSES == 1), ("cpu", True)) if found]
    a.device = available[0] if a.device == "auto" else a.device
    torch.set_flush_denormal(True)  # denormal numbers, e.g. of a decayed momentum, would slow a CPU down tenfold
    try:
        if a.name != "rl" and a.name.casefold() in (*STAGES, *ROWS) or a.name.casefold().endswith((".best", ".state")) or not a.name.replace("-", "").replace(".", "").isalnum():
            raise CheckpointError(f"--name {a.name}: must not be the name of a stage or of a row of the results nor end in .best or .state, and may contain letters, digits, - and . only")
        if a.device not in available:
            raise CheckpointError(f"--device {a.device}: this machine only has {' and '.join(available)}{f' for {PROCESSES_HERE} processes' if PROCESSES > 1 else ''}. Omit the flag")
        data.open_world(a.world, a.seed_world, a.towns)  # refuse a bad world before anything is trained
        if PROCESSES > 1:
            work_together(a.device)
        return reproduce(a) if a.stage == "reproduce" else run_stages(a)
    except (data.WorldError, CheckpointError, OSError) as e:
        message, code = f"error: {e}", 2
    except KeyboardInterrupt as e:
        message, code = f"stopped. {str(e) or 'Finished stages, finished suites of eval and the last checkpoint are kept'}. The same command with --resume continues{' (eval, once begun, starts over)' * (a.stage == 'eval')}.", 130
    print(f"\n{message}", file=sys.__stderr__ if RANK else sys.stderr)  # printed last, as a progress bar ends with the error that stopped it
    sys.exit(code)


if __name__ == "__main__":
    main()
