"""What a rollout costs, how the cost grows, and how much training waits for its data. Run by hand: python tests/cost.py
[PART ...] -> results/cost.csv, growth.csv, growth.png, feeding.csv, processes.csv

- cost: a batch of RL rollouts by the policy that comes with the code: FLOPs of each part (counted by PyTorch), and its
  seconds.
- growth: seconds, and memory where it is known, as one thing at a time grows (batch, group, slots of the cache,
  pictures, entities and passages in the index, preset).
- feeding: the share of a training step spent waiting for its batch, and the share of the computed tokens that are not
  padding.
- processes: seconds of an update of RL by one process with two threads and by two with one each.
"""
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import gog  # noqa: E402
import grpo  # noqa: E402
import tools  # noqa: E402
import train  # noqa: E402
from bench import clock  # noqa: E402
from model import PRESETS, Cache, ModelConfig, Policy, autocast, load, optimisers, packed, stream  # noqa: E402


def median(work, rounds=3):
    """Median seconds of some work, after a warm-up run that is not counted."""
    return float(np.median([clock(work) for _ in range(rounds + 1)][1:]))


PARTS = ("vision", "read", "decode", "tools")


class Parts:
    """Wraps the parts of a rollout and measures the seconds of each or, with `count`, its FLOPs. (Seconds and FLOPs of
    the vision encoder are subtracted from those of the forward pass that calls it.) Counting takes time, so it is done
    in a run of its own."""

    def __init__(self, policy, env, count):
        self.count, self.wrapped = count, (policy, policy.vision, env)
        self.seconds, self.flops, self.tokens, self.pictures = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0), dict(read=0, decode=0), 0
        self.forward, self.vision, self.step = policy.forward, policy.vision.forward, env.step
        policy.forward, policy.vision.forward, env.step = self.timed_forward, self.timed_vision, self.timed_step

    def unwrap(self):
        policy, vision, env = self.wrapped
        del policy.forward, vision.forward, env.step  # the methods of their classes apply again

    def measured(self, part, work):
        counter, began = FlopCounterMode(display=False), time.perf_counter()
        with counter if self.count else contextlib.nullcontext():
            out = work()
        self.seconds[part] += time.perf_counter() - began
        self.flops[part] += counter.get_total_flops()
        return out

    def timed_forward(self, ids, *args, **options):
        part, before = "decode" if ids.shape[1] == 1 else "read", (self.seconds["vision"], self.flops["vision"])
        self.tokens[part] += int(options["valid"].sum()) if "valid" in options else ids.numel()
        out = self.measured(part, lambda: self.forward(ids, *args, **options))
        self.seconds[part] -= self.seconds["vision"] - before[0]
        self.flops[part] -= self.flops["vision"] - before[1]
        return out

    def timed_vision(self, pictures):
        self.pictures += len(pictures)
        return self.measured("vision", lambda: self.vision(pictures))

    def timed_step(self, *args):
        return self.measured("tools", lambda: self.step(*args))


def cost(policy, env, questions, group=8):
    """One row per part: its FLOPs and milliseconds per rollout, and how many tokens, pictures or calls that is."""
    play = lambda: gog.rollout(policy, env, questions, group, 0.8, generator=torch.Generator().manual_seed(0))

    def taken_apart(count):
        parts = Parts(policy, env, count)
        play()
        parts.unwrap()
        return parts

    n, rows = len(play()), []
    before = dict(env.toolbox.counts)
    whole, calls = clock(play), sum(env.toolbox.counts[k] - before[k] for k in ("search", "glance", "gaze"))
    flops, parts = taken_apart(True).flops, taken_apart(False)
    amounts = {"vision": (parts.pictures, "pictures"), "read": (parts.tokens["read"], "tokens"), "decode": (parts.tokens["decode"], "tokens"), "tools": (calls, "calls")}
    for part, (amount, unit) in amounts.items():
        rows.append(dict(part=part, amount=f"{amount / n:.1f}", unit=unit, mflop=f"{flops[part] / n / 1e6:.0f}", ms=f"{1000 * parts.seconds[part] / n:.2f}"))
    rows.append(dict(part="rest", amount="", unit="sampling, parsing, cache", mflop="0", ms=f"{1000 * (whole - sum(parts.seconds.values())) / n:.2f}"))
    rows.append(dict(part="all", amount="1", unit="rollout", mflop=f"{sum(flops.values()) / n / 1e6:.0f}", ms=f"{1000 * whole / n:.2f}"))
    return rows


def growth(shipped, v):
    """Rows (what grows, how large, milliseconds, MB); in each sweep only one thing grows."""
    rows, fresh = [], lambda preset: Policy(ModelConfig(**{**PRESETS[preset], "vocab": v.size})).freeze_eyes()
    policy = fresh("nano")

    def note(what, size, seconds, mb=0.0):
        rows.append(dict(what=what, size=size, ms=f"{1000 * seconds:.2f}", mb=f"{mb:.1f}"))
        print(f"{what:<24}{size:>9}{1000 * seconds:12.2f} ms{mb:12.1f} MB", flush=True)

    # one decode step of `batch` rows whose caches have `slots` slots
    def step(policy, batch, slots):
        with torch.no_grad(), autocast("cpu"):  # as in rollouts
            cache = Cache(policy.config, batch, slots + 8, policy.device)
            cache.grow(slots)
            cache.lengths += slots - 1

            def work():
                policy(torch.zeros(batch, 1, dtype=torch.long), cache=cache)
                cache.lengths -= 1

            return median(work, 7), cache.kv.nbytes / 1e6

    def read(policy, batch, length):  # reading `batch` prompts of `length` tokens
        def work():
            with torch.no_grad(), autocast("cpu"):
                policy(torch.zeros(batch, length, dtype=torch.long), cache=Cache(policy.config, batch, length + 8, policy.device))
        return median(work)

    for n in (16, 32, 64, 128, 256, 512):
        note("batch: decode step", n, *step(policy, n, 256))
    for n in (64, 128, 256, 512, 1000):
        note("tokens in the cache: decode step", n, *step(policy, 128, n))
    for n in (4, 16, 64, 144):
        note("image tokens: read", n, read(policy, 64, 40 + n))
    for n in (1, 4, 16, 64):
        pictures = torch.randint(0, 255, (n, 3, 128, 128), dtype=torch.uint8)
        note("pictures: vision", n, median(lambda: policy.vision(pictures)))
    for preset in PRESETS:
        other = fresh(preset)
        note("parameters: decode step", sum(p.numel() for p in other.parameters()), *step(other, 128, 256))
    world = data.heraldry(0, 1000)
    env = tools.Environment(v, tools.make_toolbox(world), policy.config)
    asked = data.questions(world, data.RL_MIX, 16, "growth")
    for n in (2, 4, 8, 16):
        note("group: 16 questions", n, median(lambda: gog.rollout(shipped, env, asked, n, 0.8, generator=torch.Generator().manual_seed(0)), 1))
    for n in (2, 4, 6, 8):
        note("turns: 16 questions", n, median(lambda: gog.rollout(shipped, env, asked, 8, 0.8, schedule=gog.FREE[:n], generator=torch.Generator().manual_seed(0)), 1))
    rng = np.random.default_rng(0)
    crops = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(64)]
    for n in (1000, 4000, 16000):
        index = tools.ImageIndex([(str(i), "", crops[i % 64]) for i in range(n)])
        note("entities: 64 searches", n, median(lambda: index.search(crops, 2)), sum(b.nbytes for b in index.blocks) / 1e6)
    towns = [data.town_name(data.random.Random(i)) for i in range(64)]
    for n in (10_000, 40_000, 160_000):
        index = tools.TextIndex((f"{towns[i % 64]} {i}", f"In {towns[i % 64]} {i} the ruler is {i}.") for i in range(n))
        note("passages: 64 searches", n, median(lambda: index.search([f"{t} ruler" for t in towns], 2)), (index.where.nbytes + index.weight.nbytes) / 1e6)
    return rows


def feeding(env, world, steps=60, warm=20):
    """Rows {stage, steps, seconds_a_step, waits, real} of the three stages that train on prepared batches, with default
    flags. (RL makes its own batches: `data_generation` in bench.csv.)"""
    a, policy, rows = train.Args(), load(ROOT / "policies" / "base.safetensors")[0], []
    # lessons need no tools, and whatever the environment holds is handed to the workers
    school = tools.Environment(env.v, None, policy.config)
    heads = torch.nn.ModuleList(torch.nn.Linear(w, 4 + sum(map(len, grpo.PARTS.values()))) for w in (policy.config.vit_width, policy.config.width))
    eyes = [*optimisers(policy.vision.named_parameters(), a.see_lr, a.see_adam_lr, newton_schulz=7), torch.optim.AdamW([*heads.parameters(), policy.embed_tokens.weight], a.see_adam_lr)]
    words = optimisers(((n, p) for n, p in policy.named_parameters() if "vision" not in n or "projector" in n), a.word_lr, a.word_lr)
    asked = data.questions(world, data.SFT_MIX, a.sft_batch * steps, "feeding")
    demos = gog.play_scripts(env, asked, [gog.expert(q, data.random.Random(0), a.wrong_gaze) for q in asked])

    learn = lambda batch: grpo.supervised_step(policy, env, batch, words, a.token_budget)
    see = lambda batch: grpo.see_step(policy, heads, [torch.from_numpy(x) for x in batch], env.v, eyes)
    stages = {"see": (stream(partial(grpo.labelled_pictures, policy.config, 0, a.see_batch), 0, steps), see),
              "words": (stream(partial(grpo.lessons, school, 0, a.word_batch), 0, steps), learn),
              "sft": ((demos[a.sft_batch * i:a.sft_batch * (i + 1)] + again for i, again in enumerate(stream(partial(grpo.replay, school, 0, round(a.replay * a.sft_batch)), 0, steps))), learn)}
    for stage, (batches, step) in stages.items():
        policy.freeze_eyes(stage != "see")
        at, waited, worked, real, computed = iter(batches), [], [], [], []

        def counted(batch, pad, device):
            out = packed(batch, pad, device)
            real.append(sum(len(t.ids) for t in batch)), computed.append(out[0].shape[1])
            return out

        with mock.patch.object(grpo, "packed", counted):
            for _ in range(steps):
                got = []
                waited.append(clock(lambda: got.append(next(at))))
                worked.append(clock(lambda: step(*got), True))  # rounded, as train.py does
        wait, work = sum(waited[warm:]), sum(worked[warm:])
        # real: empty for the vision encoder, which has no tokens
        rows.append(dict(stage=stage, steps=steps - warm, seconds_a_step=f"{(wait + work) / (steps - warm):.3f}", waits=f"{wait / (wait + work):.3f}", real=f"{sum(real) / sum(computed):.3f}" if real else ""))
        print("{stage:<8}{seconds_a_step:>8} s a step, waits {waits}, real tokens {real}".format(**rows[-1]), flush=True)
    return rows


def processes(rounds=2, updates=3):
    """Rows {processes, round, step, rollout_seconds, seconds} of the first updates of RL (--curriculum fresh, which
    needs no scoring), from the SFT policy that comes with the code: by one process and by two, which share two threads,
    in turns."""
    rows = []
    for turn, n in ((turn, n) for turn in range(rounds) for n in (1, 2)):
        with tempfile.TemporaryDirectory() as folder:
            for stage, policy in (("pretrain", "base"), ("sft", "sft")):
                shutil.copy(ROOT / "policies" / f"{policy}.safetensors", f"{folder}/{stage}.safetensors")
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else [sys.executable]
            flags = ["--stage", "rl", "--curriculum", "fresh", "--out", folder, "--results", folder, "--rl-steps", str(updates), "--rl-dev", "1", "--show-every", "1000"]
            subprocess.run([*launcher, str(ROOT / "train.py"), *flags], env={**os.environ, "OMP_NUM_THREADS": str(2 // n)}, check=True)
            told = [r for r in tools.read_rows(Path(folder) / "rl.csv") if r["seconds"]]
        rows += [dict(processes=n, round=turn, step=r["step"], rollout_seconds=r["rollout_seconds"], seconds=r["seconds"]) for r in told]
    return rows


def short(x):
    """A number as an axis shows it: 7.94, 42.3, 512, 1,590, 36.7 M."""
    return f"{x / 1e6:.3g} M" if x >= 1e6 else f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def plot(rows, across=3, w=330, h=230):
    """Every sweep as a panel with logarithmic axes, each scaled to its own range. A straight line is growth by a power;
    its exponent is printed (1: proportional)."""
    sweeps = {}
    for r in rows:
        sweeps.setdefault(r["what"], []).append((float(r["size"]), float(r["ms"])))
    sheet = Image.new("RGB", (across * w, -(-len(sweeps) // across) * h), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (what, points) in enumerate(sweeps.items()):
        left, top, right, bottom = i % across * w + 50, i // across * h + 28, i % across * w + w - 20, i // across * h + h - 34
        pen.text((left, top - 22), f"{what}, ms", fill="black", font_size=13)
        pen.rectangle((left, top, right, bottom), outline=(200, 200, 200))
        x, y = np.log(np.array(points)).T
        slope = np.polyfit(x, y, 1)[0]
        at = list(zip(left + 8 + (right - left - 16) * (x - x[0]) / (x[-1] - x[0]), bottom - 8 - (bottom - top - 16) * (y - y.min()) / max(1e-9, y.max() - y.min())))
        pen.line(at, fill=(200, 30, 50), width=2)
        for (px, py), (size, ms) in zip(at, points):
            pen.ellipse((px - 3, py - 3, px + 3, py + 3), fill=(200, 30, 50))
            pen.text((px, bottom + 4), short(size), fill=(90, 90, 90), font_size=11, anchor="ma")
        for ms, py in ((np.exp(y.max()), top + 8), (np.exp(y.min()), bottom - 8)):
            pen.text((left - 4, py), short(ms), fill=(90, 90, 90), font_size=11, anchor="rm")
        pen.text((right - 6, bottom - 18), f"grows as size^{slope:.2f}", fill=(90, 90, 90), font_size=11, anchor="ra")
    return sheet


def main():
    wanted = sys.argv[1:] or ["cost", "growth", "feeding", "processes"]
    torch.set_flush_denormal(True)
    policy, v = load(ROOT / "policies" / "rl.safetensors")
    world = data.open_world("heraldry")
    env = tools.Environment(v, tools.make_toolbox(world), policy.config)
    if "cost" in wanted:
        told = cost(policy, env, data.questions(world, data.RL_MIX, 32, "cost"))
        for r in told:
            print("{part:<8}{amount:>8} {unit:<26}{mflop:>8} MFLOP{ms:>9} ms".format(**r), flush=True)
        tools.write_rows(ROOT / "results" / "cost.csv", told, [*told[0]], ("part",))
    if "growth" in wanted:
        rows = growth(policy, v)
        tools.write_rows(ROOT / "results" / "growth.csv", rows, [*rows[0]], ("what", "size"))
        tools.atomic(ROOT / "results" / "growth.png", lambda p: plot(rows).save(p, format="PNG"))
    if "feeding" in wanted:
        fed = feeding(env, world)
        tools.write_rows(ROOT / "results" / "feeding.csv", fed, [*fed[0]], ("stage",))
    if "processes" in wanted:
        rows = processes()
        tools.write_rows(ROOT / "results" / "processes.csv", rows, [*rows[0]])


if __name__ == "__main__":
    main()
