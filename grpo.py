"""How it learns: complexity-adaptive reinforcement learning, one step of each stage's loss, and the school of the base model.

From the paper: GRPO with r = (1 - lambda) r_acc + lambda r_fmt; the SFT model's pass rate sorts the questions; Level 1 is about
    50 %, Level 2 below 50 %; the final model trains on Level 2 only.
Here instead, numbered:
  1. Exact match for r_acc (the paper: LLM judge). lambda = 0.1, as its peers use; the paper prints no value.
  2. A group whose r_acc are all equal (all right, or all wrong) has no advantage and leaves loss and denominator; it is counted as dead.
     Groups are judged on r_acc, not reward: with division by the standard deviation a group that differs only in format would
     turn lambda = 0.1 into a full +-1.
  3. One update a batch, so the ratio is 1 (up to the rounding of bfloat16, where that is used) and the clip hardly ever binds (the loss is
     the general one).
  4. The value of the loss tells nothing about progress: the advantages of a group sum to 0, so it stays near 0.1 whatever happens (not at
     0, as wrong trajectories have more tokens than right ones). Watch accuracy and entropy instead.
  5. `fresh`, the default curriculum: a pass rate p is kept for each kind of question (four hops, counting ..), not for each question. A
     kind is drawn with its weight in data.RL_MIX times 0.02 + p(1-p), a new question of it is asked, and p follows the rollouts: what is
     too easy or too hard now teaches nothing now. In an early trial (AdamW, another mix: results/trials.md) 800 questions that were scored
     first gained 9.5 points on themselves and 3.9 on others; `fresh` gained 4.1 on others, and nothing must be scored first. `level2` is
     the paper's curriculum, `adaptive` draws as `fresh` does, from questions that were scored first.
  6. A pass rate cannot tell what is half learnt from what is half luck: look-alikes and comparisons succeed half of the time, too, and
     their gradients have nothing in common (`signal`, grpo_step). So data.RL_MIX has few look-alikes (two parts of 18, against forgetting)
     and no comparisons: two batches of 256 rollouts of chains and counting had a cosine of 0.16, with many look-alikes among them 0.03.
     (`signal` compares the two halves of one batch, of a policy that has begun to learn: 0.03 on average in the published run.)
  7. A base model of our own, where the paper takes one from the shelf: labels for the eyes, lessons in words, an exam.

Reading order: reward and advantage -> policy loss -> one step of each stage -> what they learn from: GoG-Instruct (SFT), levels and
    curriculum (RL) -> the base model: labels for the eyes -> lessons in words -> exam, replay.

Alphabet: Q questions, G rollouts a question (the group), M trained tokens; `a`: the flags (train.Args), `env.v`: the vocabulary.
"""
import random
import re
import sys
import time
from copy import copy
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import gog
import tools
from model import autocast, flat_gradient, gathered, micro_batches, packed, share, summed, torch_rng, update
from tools import PROCESSES, Trajectory, crop, parse, to_array


def accuracy_reward(t, search_penalty=0.0):
    """r_acc of a trajectory, in [0, 1]: exact match, 0 or 1, times 1 - search_penalty if it used a tool (no penalty in the paper; 0.1 in
    MMSearch-R1)."""
    return t.correct * (1 - search_penalty * any(turn.kind in ("search", "glance", "gaze") for turn in t.turns))


def reward(r_acc, well_formed, lam=0.1):
    """r = (1 - lambda) r_acc + lambda r_fmt, in [0, 1]. r_fmt: every turn well-formed, and it ends in an answer."""
    return (1 - lam) * float(r_acc) + lam * float(well_formed)


def group_advantages(rewards, r_acc, divide_by="std"):
    """Advantages (Q, G) of rewards (Q, G), and which groups are alive (Q,): those whose r_acc (Q, G) differ.

    A = (r - mean) / std over the group ("std", the paper) or r - mean ("mean": an easy or hard question weighs no more than another).
    Dead groups get exactly 0; they are found by r_acc, since a standard deviation of equal floats need not be 0.
    """
    alive = r_acc.amax(1) > r_acc.amin(1)
    scale = rewards.std(1, keepdim=True).clamp_min(1e-6) if divide_by == "std" else 1.0
    return torch.where(alive[:, None], (rewards - rewards.mean(1, keepdim=True)) / scale, 0.0), alive


def policy_loss(logp, old_logp, advantage, low=0.2, high=0.2, reference=None, beta=0.0):
    """Sum over tokens (M,) of -min(ratio A, clip(ratio, 1 - low, 1 + high) A) + beta KL; divide by the update's token count outside.

    ratio = exp(logp - old_logp); KL to a reference policy by the k3 estimator, exp(d) - d - 1 >= 0 with d = reference - logp.
    Also returns how many tokens lie outside the clip range and the summed KL.
    """
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage).sum()
    d = reference - logp if reference is not None else torch.zeros_like(logp)
    kl = (d.exp() - d - 1).sum()
    return loss + beta * kl, ((ratio - clipped).abs() > 0).sum().item(), kl.item()


# ------------------------------------------------------------------------------------------------ one step of each stage

def token_logprobs(policy, env, trajectories, temperature=1.0):
    """Log-probability of every trained token, flat (M,), and of every id that could stand there, (M, vocab). Only tokens with `trained`
    count, and only ids that may be sampled compete: the same for SFT and RL."""
    ids, trained, lengths, pictures = packed(trajectories, env.v.id["<pad>"], policy.device)
    hidden = policy(ids, pictures, env.image_ids[0], lengths=lengths)
    # token t is predicted at position t - 1; a trajectory's first is <bos>, never trained, so none is predicted from its neighbour
    wanted = trained[:, 1:]
    logits = policy.logits(hidden[:, :-1][wanted]).masked_fill(~torch.tensor(env.sampleable, device=policy.device), float("-inf"))
    all_logp = F.log_softmax(logits.float() / temperature, -1)
    return all_logp.gather(1, ids[:, 1:][wanted][:, None])[:, 0], all_logp


def supervised_step(policy, env, batch, opts, budget=4000):
    """One optimiser step of the causal LM loss on the tokens to be learnt (`trained`: the expert's own, or the answers of a lesson); the
    denominator is the whole batch's (of all processes: `batch` is this one's share), so the size of micro-batches does not change the
    gradient."""
    total, loss = summed(sum(sum(t.trained) for t in batch)).item(), 0.0
    for part in micro_batches(batch, [len(t.ids) for t in batch], budget):
        logp, _ = token_logprobs(policy, env, part)
        (-logp.sum() / total).backward()
        loss -= logp.sum().item() / total
    return (loss := summed(loss).item()), update(policy, opts, batch, loss)


def grpo_step(policy, reference, env, batch, advantages, opts, a):
    """One update from rollouts (list of Q*G) and their advantages (Q*G,). Rollouts whose advantage is 0 are left out; the loss is divided
    by the trained tokens of the rest. `signal`: cosine of the gradients of the even and of the odd questions; 1: both halves ask for the
    same change, 0: they have nothing in common, all is luck."""
    alive = advantages.nonzero()[:, 0].tolist()
    if not a.mask:  # to see why the mask is there: every token counts as the policy's own, what tools have answered, too
        env, batch = copy(env), [replace(t, trained=[False] + [True] * (len(t.ids) - 1)) for t in batch]
        env.sampleable = [True] * env.v.size
    tokens = max(1, sum(sum(batch[i].trained) for i in alive))
    totals, grads, gap = dict(loss=0.0, kl=0.0, clipped=0.0, entropy=0.0), [], 0.0
    for half in (0, 1):
        mine = share([i for i in alive if i // a.group % 2 == half])  # question i // group: the even, then the odd ones
        for part in micro_batches(mine, [len(batch[i].ids) for i in mine], a.token_budget):
            trajectories = [batch[i] for i in part]
            logp, all_logp = token_logprobs(policy, env, trajectories, a.temperature)
            old = torch.cat([torch.tensor(t.logprobs)[torch.tensor(t.trained)] for t in trajectories]).to(logp.device) if a.mask else logp.detach()
            weight = torch.cat([advantages[i].expand(sum(batch[i].trained)) for i in part]).to(logp.device)
            with torch.no_grad():
                ref = token_logprobs(reference, env, trajectories, a.temperature)[0] if reference is not None else None
                entropy = -(all_logp.exp() * all_logp.clamp_min(-1e4)).sum().item()  # 0 * -inf would be nan
                gap = max(gap, (logp - old).abs().max().item())
            loss, clipped, kl = policy_loss(logp, old, weight, a.clip_low, a.clip_high, ref, a.beta)
            (loss / tokens).backward()
            for name, value in dict(loss=loss.item(), kl=kl, clipped=clipped, entropy=entropy).items():
                totals[name] += value / tokens
        grads.append(flat_gradient(opts))  # they add up: the second is that of both
    totals, signal = {name: summed(x).item() for name, x in totals.items()}, F.cosine_similarity(grads[0], grads[1] - grads[0], 0).item()
    norm = update(policy, opts, share([batch[i] for i in alive]), totals["loss"])  # nobody alive, no gradient: nothing moves
    return totals | dict(ratio_gap=gap, signal=signal, grad_norm=norm)


LOGGED = "turns tool_calls tokens truncated gaze_correct reflection mixed_search answer_share search_share glance_share gaze_share".split()


def iteration(policy, reference, env, questions, opts, a, generator):
    """One iteration on Q questions: rollouts, rewards, advantages, update. Returns the Q*G trajectories, their advantages, the pass rate
    of each question, and what to log."""
    began = time.time()
    batch = gog.rollout(policy, env, questions, a.group, a.temperature, generator=generator)
    rollout_seconds = time.time() - began
    by_group = lambda values: torch.tensor(values).view(len(questions), a.group)  # (Q*G,) -> (Q, G)
    r_acc = [accuracy_reward(t, a.search_penalty) for t in batch]
    rewards = by_group([reward(r, t.well_formed, a.lam) for r, t in zip(r_acc, batch)])
    advantages, alive = group_advantages(rewards, by_group(r_acc), a.advantage)
    with autocast(policy.device.type):
        stats = grpo_step(policy, reference, env, batch, advantages.flatten(), opts, a)
    did = gog.behaviour(batch)
    stats |= dict(reward=rewards.mean().item(), accuracy=did["accuracy"], dead=1 - alive.float().mean().item(), **{k: did[k] for k in LOGGED},
                  rollout_seconds=rollout_seconds, seconds=time.time() - began)
    return batch, advantages.flatten(), by_group([float(t.correct) for t in batch]).mean(1).tolist(), stats


# ------------------------------------------------------------------------------- what they learn from: demonstrations, levels

def level(p):
    """Complexity level of a pass rate p in [0, 1]: 0 easy, 1 about a half (1/2 to 5/8: of four tries two, of eight four or five), 2 hard
    (below 1/2, the paper trains on these)."""
    return 2 if p < 0.5 else 1 if p <= 0.625 else 0


def pass_rates(policy, env, pool, n=4, temperature=1.0, seed=0):
    """Share of n sampled trajectories that are right, for every question; says how many are of which level."""
    tries = gog.rollout(policy, env, pool, n, temperature, generator=torch_rng(policy.device, "pass rates", seed), progress=f"pass rates, {n} tries")
    rates = [sum(t.correct for t in tries[n * i:n * i + n]) / n for i in range(len(pool))]
    print("levels: {} easy, {} of level 1, {} of level 2 ({} never right)".format(*(sum(level(p) == k for p in rates) for k in range(3)), rates.count(0)), file=sys.stderr)
    return rates


def uncertain(policy, env, pool, n=4, seed=0):
    """The uncertainty filter: keeps a question unless n sampled answers (temperature 1) without any tool are all right. Where the first is
    wrong, no more are drawn."""
    generator, sure = torch_rng(policy.device, "filter", seed), list(range(len(pool)))
    for tries in (1, n - 1):  # the others side by side: they share the reading of their prompt
        answered = gog.rollout(policy, env, [pool[i] for i in sure], tries, schedule=gog.SCHEDULES["direct"], generator=generator, rows=1024, progress="uncertainty filter")
        sure = [i for k, i in enumerate(sure) if all(t.correct for t in answered[tries * k:tries * k + tries])]
    return [pool[i] for i in sorted({*range(len(pool))} - {*sure})]


def instruct(policy, env, world, n=5750, seed=0, wrong_gaze=0.2):
    """GoG-Instruct: `n` expert trajectories, 43.5 % of them search-free, of questions that survive the filter; every one is
    checked: the answer is right, and the last gaze lies on a target."""
    quota = {True: round(0.435 * n), False: n - round(0.435 * n)}
    # what can be told without a gaze
    mix = [(kind, setting, w) for kind, setting, w in data.SFT_MIX if env.may_gaze or setting == "single" or kind in (*data.VISUAL, "count")]
    chosen, asked, dropped, rng, part = {True: [], False: []}, 0, 0, random.Random(f"expert/{seed}"), 0
    bar = tqdm(total=n, desc="demonstrations")
    while any(len(chosen[free]) < quota[free] for free in quota):
        pool = [q for q in data.questions(world, mix, min(512, n // 2 + 8), f"sft/{seed}/{part}") if len(chosen[q.search_free]) < quota[q.search_free]]
        kept = uncertain(policy, env, pool, seed=seed)
        asked, dropped, part = asked + len(pool), dropped + len(pool) - len(kept), part + 1
        demos = gog.play_scripts(env, kept, [gog.expert(q, rng, wrong_gaze, m) for q, m in zip(kept, gathered(misses(policy, env, share(kept))))], progress="expert")
        for t in demos:
            if t.correct and (not gog.gazes(t) or gog.gazes(t)[-1][1] > 0.9):
                chosen[t.question.search_free].append(t)
        bar.update(sum(min(len(chosen[free]), quota[free]) for free in quota) - bar.n)
        if part > 80 + n // 100:
            raise data.WorldError("the base model answers nearly every question of one kind without tools: no demonstrations are left. Ask for fewer --demos")
    bar.close()
    demos = chosen[True][:quota[True]] + chosen[False][:quota[False]]
    random.Random(f"shuffle/{seed}").shuffle(demos)
    print(f"GoG-Instruct: {len(demos)} trajectories of {asked} questions asked, {dropped} dropped by the uncertainty filter; "
          f"{sum(any(gog.looked_elsewhere(t)) for t in demos)} reflective", file=sys.stderr)
    return demos


def misses(policy, env, questions, rows=256):
    """Where the base model points in vain (IoU < 0.5), for every question: {target: (the look that it named, the box that it chose)}. With
    these mistakes the expert begins, to show how to recover."""
    out = [{} for _ in questions]
    asked = [(i, target, data.references(q.scene)[target][kind]) for i, q in enumerate(questions) if len(q.scene.boxes) > 1 and not q.search_free
             for target, kind in zip(q.targets, q.pointed_by) if kind != "detail"]  # look-alikes must all be looked at, anyway
    for start in range(0, len(asked), rows):
        batch = asked[start:start + rows]
        prompts = [[env.v.id["<bos>"], *env.image_ids, *env.v.encode(f"point to the {expression}"), env.v.id["<sep>"]] for *_, expression in batch]
        pictures = [to_array(questions[i].scene.picture(), env.side) for i, *_ in batch]
        for (i, target, _), turn in zip(batch, gog.respond(policy, env, prompts, pictures)):
            x0, y0, x1, y1 = box = turn.argument if turn.kind == "gaze" else (0, 0, 0, 0)
            # thoughts end in "look at LOOK" or, by a neighbour, in "left of it LOOK" (gog.look_thought)
            taken_for = re.split("look at |it ", turn.thought)[-1]
            if taken_for and min(x1 - x0, y1 - y0) >= 3 and data.iou(box, questions[i].scene.boxes[target]) < 0.5:
                out[i][target] = taken_for, box
    return out


class Curriculum:
    """Decides what is asked next. `pass_rates` holds one rate a question (modes "level1", "level2", "all", "learnable": 0 < p < 1/2,
    "adaptive") or one a kind of question ("fresh"). `draw` gives indices into it. `worth`: weight of each entry, default 1; `pool`: the
    indices that may be drawn, default: what the mode allows."""

    def __init__(self, pass_rates, mode="fresh", seed=0, pool=None, worth=None):
        self.pass_rates, self.mode, self.seed, self.worth = pass_rates, mode, seed, worth or [1] * len(pass_rates)
        wanted = {"level1": lambda p: level(p) == 1, "level2": lambda p: level(p) == 2, "learnable": lambda p: 0 < p < 0.5}
        self.pool = pool or [i for i, p in enumerate(pass_rates) if wanted.get(mode, lambda p: True)(p)]
        if not self.pool:
            raise data.WorldError(f"no question is left for --curriculum {mode}: use --curriculum all")

    def draw(self, n, step):
        """Indices of the n entries of a step, by lot: all different where the pool is large enough. adaptive, fresh: with replacement, by
        weight times 0.02 + p(1-p); p(1-p) is the variance of one try, and 0.02 is left so that nothing is given up for good."""
        rng = random.Random(f"curriculum/{self.seed}/{step}")
        if self.mode not in ("adaptive", "fresh"):
            return rng.sample(self.pool * -(-n // len(self.pool)), n)
        return rng.choices(self.pool, [self.worth[i] * (0.02 + self.pass_rates[i] * (1 - self.pass_rates[i])) for i in self.pool], k=n)

    def seen(self, indices, rates):
        """Re-score what the rollouts just made belong to, by an exponential mean of the pass rate: long for a kind, as its questions
        differ."""
        for i, p in zip(indices, rates):
            self.pass_rates[i] += (0.1 if self.mode == "fresh" else 0.5) * (p - self.pass_rates[i])


def kinds(world):
    """What `fresh` draws from: every kind of RL_MIX that can be asked of this world, as (kind, setting, weight), and the user's own
    questions."""
    can_be_asked = lambda kind, setting: any(data.ask(world, kind, setting, ("train",), random.Random(i)) for i in range(200))
    return [*world.own[::2], *((kind, setting, weight) for kind, setting, weight in data.RL_MIX if can_be_asked(kind, setting))]


def ask_each(world, wanted, seed):
    """The questions themselves: of a kind a new one, which no other seed gives."""
    return [w if isinstance(w, data.Question) else data.questions(world, [w], 1, f"{seed}/{i}")[0] for i, w in enumerate(wanted)]


# ================================ from here on: how the base model is made. For GRPO alone, stop here and go on to train.py.
# ----------------------------------------------------------------------- base model: labels for the eyes

# Label k of a part is its k-th value here (None: there is nothing of the kind); label -1 is left out of the loss.
# (tincture and outline first: `lay_on_grid`) what can be told about the shield that a cell shows (None: bare wall, or nobody on that side),
# how it hangs, and what is beside it
PARTS = {
    "tincture": [None, *data.TINCTURES], "outline": [None, *data.OUTLINES], "ordinary": list(data.ORDINARIES), "ordinary_tincture": list(data.TINCTURES),
    "charge": [None, *data.CHARGES], "charge_tincture": list(data.TINCTURES), "count": [1, 2, 3], "across": data.ACROSS, "down": data.DOWN, "size": data.SIZE,
    **{(side, k): [None, *kinds] for side in data.SIDES for k, kinds in enumerate((data.TINCTURES, data.OUTLINES))}}
FINE = ("ordinary", "ordinary_tincture", "charge", "charge_tincture", "count")  # not to be told from afar
# parts whose labels 1, 2, .. are words; image tokens are drawn towards the embeddings of these words (see_step)
TIED = ("tincture", "outline", "across", "down", "size", "charge")


def labelled_pictures(config, seed, size, i):
    """Batch i of pictures with dense labels, on every patch and on every image token: where are the edges of the shield that covers most of
    it, what is it, how does it hang. Depends on (seed, i) only; of several processes this one's share. In numpy (tensors would travel
    between processes through a socket): pictures uint8 (B, 3, S, S), boxes float (B, P + N, 4) in 0..1, labels int (B, P + N, parts), -1
    where nothing can be told."""
    return [np.stack(x) for x in zip(*(labelled_picture(config, random.Random(f"sights/{seed}/{i}/{k}")) for k in share(range(max(size, PROCESSES)))))]


def labelled_picture(config, rng):
    """One picture and its labels."""
    least, most, cells, sizes, _ = data.SETTINGS[rng.choices(list(data.LESSON_WALLS), data.LESSON_WALLS.values())[0]]
    px = 2 * config.picture  # shrunk to half, edges lie between pixels, too
    if rng.random() < 0.35:  # as a crop shows it: one shield, nearly as large as the picture, and more or less blurred
        least, most, cells, sizes, px = 1, 1, 1, (0.8, 1.0), rng.randint(config.picture // 3, config.picture)
    towns = [fresh_town(rng) for _ in range(rng.randint(least, most))]
    scene = data.hang(towns, "shield", rng, cells, sizes)
    labels = np.array([part_labels(town, place, towns, box) for town, place, box in zip(towns, data.layout(scene), scene.boxes)])
    grids = [config.picture // config.patch // n for n in (1, config.shuffle)]  # of patches, of image tokens
    return to_array(scene.picture(px), config.picture), *map(np.concatenate, zip(*(lay_on_grid(scene.boxes, labels, g) for g in grids)))


def part_labels(town, place, towns, box):
    """The label of every part of one shield."""
    shown = {**vars(town.arms), **place, **{(side, k): towns[place[side]].look.split()[k] if side in place else None for side in data.SIDES for k in (0, 1)}}
    # 35 % of the wall's height
    return [-1 if part in FINE and box[3] - box[1] < 35 else values.index(shown[part]) for part, values in PARTS.items()]


def lay_on_grid(boxes, labels, grid):
    """Lay boxes (n, 4) in percent and labels (n, parts) on a grid: every cell gets those of the box that covers most of it, cells without
    any are bare wall. Returns (grid^2, 4) in 0..1 and (grid^2, parts)."""
    edge, b = np.arange(grid + 1) / grid, np.array(boxes, np.float32) / 100
    along = lambda low, high: (np.minimum(high[:, None], edge[1:]) - np.maximum(low[:, None], edge[:-1])).clip(0)  # (n, grid)
    cover = along(b[:, 1], b[:, 3])[:, :, None] * along(b[:, 0], b[:, 2])[:, None]  # (n, grid, grid)
    best, none = cover.argmax(0).ravel(), (cover.max(0) * grid**2 < 0.02).ravel()
    # a bare wall has no tincture and no outline (label 0 of the first two parts); of all others nothing can be told
    bare = [0, 0] + [-1] * (len(PARTS) - 2)
    return np.where(none[:, None], 0, b[best]).astype(np.float32), np.where(none[:, None], bare, labels[best])


def fresh_town(rng, relations=0, pieces=()):
    """A town that exists for one lesson only, so that nothing about it can be learnt by heart. `pieces`: see `strange_text`."""
    facts = {fresh_relation(rng, r, pieces): strange_text(rng, pieces) or data.VALUES[r](rng) for r in rng.sample(list(data.VALUES), relations)}
    return data.Entity.with_arms(strange_text(rng, pieces) or data.town_name(rng), facts, data.Arms.draw(rng))


def fresh_relation(rng, known, pieces):
    """The name of a relation: a known, an invented, or a strange one."""
    return strange_text(rng, pieces) or (known if rng.random() < 0.5 else data.word(rng).lower())


def strange_text(rng, pieces, share=0.5):
    """In a `share` of cases a string of any tokens at all (Vocabulary.pieces), else "". A token that no lesson shows can never be copied:
    names of real countries are full of letters that no town of heraldry has. Without pieces always ""."""
    return "".join(rng.choices(pieces, k=rng.randint(1, 5))).strip() if pieces and rng.random() < share else ""


def pieces_by_lot(env, rng):
    """What strange strings of a lesson are made of; in two thirds of the lessons there are none."""
    return env.v.pieces if rng.random() < 0.35 else ()


def see_step(policy, heads, batch, v, opts):
    """One step of the eyes' dense loss: 50 times the L1 of the edges, relative to the sides of the box (as IoU counts it), plus
    cross-entropy of each part, that of charges twice, on patches and on image tokens. And the token that shows the leftmost red round shall
    look like the words "red", "round" and "leftmost" in the decoder's own embedding, so that the decoder finds what it reads about. `v`:
    the vocabulary. Only the gradient of the vision encoder is clipped, and told as the norm."""
    pictures, boxes, labels = batch
    patches, tokens = policy.vision(pictures)
    out, where, label = torch.cat([heads[0](patches), heads[1](tokens)], 1).flatten(0, 1), boxes.flatten(0, 1), labels.flatten(0, 1)
    inside = where[:, 2] > 0
    sides = (where[inside, 2:] - where[inside, :2]).repeat(1, 2)  # (n, 4): width, height, width, height
    # with 15 instead of 50 the boxes of image tokens were a third worse (results/trials.md)
    loss = 50 * ((out[inside, :4] - where[inside]).abs() / sides).sum() / summed(4 * inside.sum())
    for k, (part, logits) in enumerate(zip(PARTS, out[:, 4:].split([*map(len, PARTS.values())], 1))):
        loss = loss + (1 + (part == "charge")) * cell_loss(logits, label[:, k])  # charges are learnt last: they count twice
    shown, tokens = labels[:, patches.shape[1]:].flatten(0, 1), tokens.flatten(0, 1)  # (B*N, parts), (B*N, D)
    for part in TIED:
        # (B*N, words); without the 4 these words grew to four times the length of others
        alike = 4 * tokens @ policy.embed_tokens.weight[[v.word(w) for w in PARTS[part][1:]]].T / tokens.shape[-1]**0.5
        alike = torch.cat([torch.zeros_like(alike[:, :1]), alike], 1)  # label 0, none of the words (bare wall, in the middle), scores 0
        loss = loss + (1 + (part == "charge")) * cell_loss(alike, shown[:, list(PARTS).index(part)])
    loss.backward()
    return (total := summed(loss.detach()).item()), update(policy.vision, opts, loss=total)


def cell_loss(logits, label):
    """Mean cross-entropy over the cells where something can be told (label >= 0); 0, not nan, where a small batch shows nothing of the
    kind."""
    return F.cross_entropy(logits, label, ignore_index=-1, reduction="sum") / summed((label >= 0).sum()).clamp_min(1)


# ---------------------------------------------------------------------------------------- base model: lessons in words


COMPARED = {"colour": ("tincture",), "shape": ("outline",), "look": ("tincture", "outline"), "detail": ("tincture", "outline", "charge", "charge_tincture", "count")}


def begin(env):
    """A lesson that says nothing but <bos> yet."""
    return Trajectory(None, [env.v.id["<bos>"]], [False], [0.0])


def say(env, t, question, response, topic=""):
    """A question of the environment and the response to be learnt; `topic` is what the exam files it under."""
    t.observe(env.v.encode(question) + [env.v.id["<sep>"]] if question else [])
    t.act(env.v.encode_turn(response) + [env.v.id["<stop>"]])
    t.lesson.append((topic, response))


def wall(env, rng):
    """A wall to look at, some of its arms look-alikes: (trajectory that shows it, scene)."""
    least, most, cells, sizes, look_alikes = data.SETTINGS[rng.choices(list(data.LESSON_WALLS), data.LESSON_WALLS.values())[0]]
    towns = [fresh_town(rng) for _ in range(rng.randint(least, most))]
    for i in range(1, min(len(towns), 1 + rng.randint(0, look_alikes))):
        towns[i] = data.Entity.with_arms(data.town_name(rng), {}, data.Arms.draw(rng, outline=towns[0].arms.outline, tincture=towns[0].arms.tincture))
    scene, t = data.hang(rng.sample(towns, len(towns)), rng.choice(("shield", "shield", "flag", "badge")), rng, cells, sizes), begin(env)
    t.observe(env.image_ids, to_array(scene.picture(2 * env.side), env.side))
    return t, scene


def point_lesson(env, rng):
    """Densely, every object on a wall: its look is said, its box is to be found; of look-alikes first where they all hang."""
    t, scene = wall(env, rng)
    looks = [e.look for e in scene.entities]
    for look in rng.sample(sorted(set(looks)), len(set(looks))):
        boxes = gog.left_to_right([b for b, l in zip(scene.boxes, looks) if l == look])
        for k, box in enumerate(boxes):
            t.observe(env.v.encode(f"look at {look}"))
            t.act(env.v.encode_turn((gog.spots(boxes[k:]) if boxes[1:] else "") + gog.gaze(box)))
    return t


# expressions that few objects of a wall have, and how much likelier they are taken
RARE = {"shape": 2, "order": 2, "neighbour": 3, "size": 6}


def wall_lesson(env, rng, questions=9):
    """Objects on a wall, each asked for once, by an expression (if one were asked for twice, its box would be copied with closed eyes from
    the first answer):

        <bos> <image> x 16 point to the leftmost shield<sep> [<think> look at red round</think><gaze> 3 36 30 63</gaze><stop>] What is the colour ..   (in brackets: trained)"""
    t, scene = wall(env, rng)
    names = data.references(scene)
    left = rng.sample(range(len(names)), len(names))[:questions]
    while left:
        i = left.pop()
        if kinds := [k for k in names[i] if k != "detail"]:
            ask_about(env, rng, t, scene, i, rng.choices(kinds, [RARE.get(k, 1) for k in kinds])[0], names[i], left)
    return t


def count_lesson(env, rng, questions=9):
    """How many are red? On a wall of its own: what has been pointed at would be copied, and nobody would learn to count."""
    t, scene = wall(env, rng)
    colours = [e.look.split()[0] for e in rng.sample(scene.entities, len(scene.entities))]
    for colour in [c for c in dict.fromkeys(colours) if colours.count(c) > 1 or rng.random() < 0.5][:questions] or colours[:1]:
        say(env, t, f"How many {scene.noun}s are {colour}?", gog.count_aloud(scene, colour), "count one" if colours.count(colour) == 1 else "count more")
    return t


def ask_about(env, rng, t, scene, i, kind, names, left):
    """Point to object i, or tell its colour or shape, by one kind of expression. `left`: who is asked for next; loses the one that is
    looked at in vain."""
    look = scene.entities[i].look
    lot, thought, k = rng.random(), f"<think> {gog.look_thought(scene, i, kind, look)}</think>", rng.randrange(2)
    alike = [j for j, e in enumerate(scene.entities) if e.look != look and set(e.look.split()) & set(look.split())]
    if lot < 0.1 and alike:  # somebody has looked at another that is a little like it, in vain: look elsewhere
        other = scene.entities[j := rng.choice(alike)]
        left[:] = [x for x in left if x != j]  # its box is shown now
        t.observe([*env.v.encode(f"point to the {names[kind]}"), env.v.id["<sep>"], *env.v.encode_turn(thought + gog.gaze(scene.boxes[j])), env.v.id["<stop>"]])
        show(env, t, "", hit_list(rng, (other, fresh_town(rng))))
        verdict = gog.compare_aloud(gog.must_match(kind, look), gog.must_match(kind, other.look))
        say(env, t, "", thought.replace("<think>", f"<think> {verdict},") + gog.gaze(scene.boxes[i]), "iou after a miss")
    elif lot < 0.8 or kind in ("look", ("colour", "shape")[k]):
        say(env, t, f"point to the {names[kind]}", thought + gog.gaze(scene.boxes[i]), f"iou {kind}")
    else:
        say(env, t, f"What is the {('colour', 'shape')[k]} of the {names[kind]}?", f"{thought}<answer> {look.split()[k]}</answer>", "visual")


def crop_lesson(env, rng, crops=3):
    """A crop as a gaze would give it: say what it shows, or whether it shows what is wanted."""
    t = begin(env)
    for _ in range(crops):
        town = fresh_town(rng)
        t.observe(env.image_ids, to_array(crop(*framed(town, rng)), env.side))
        if rng.random() < 0.5:
            say(env, t, "what is this", f"<answer> {town.blazon}</answer>", "caption")
        else:
            wanted, seen, verdict = compared(rng, town, "detail")
            say(env, t, f"look at {wanted}", f"<think> {gog.compare_aloud(wanted, seen)}</think><answer> {verdict}</answer>", "verify")
    return t


def compared(rng, town, depth):
    """(what is wanted, what is seen of `town`, "yes" or "no"): the same in half of the cases, else all or just one part of it another."""
    other, lot = town, rng.random()
    if lot > 0.5:
        arms = data.Arms.draw(rng)
        arms = arms if lot > 0.85 else replace(town.arms, **{(part := rng.choice(COMPARED[depth])): getattr(arms, part)})
        other = data.Entity.with_arms("", {}, arms)
    wanted, seen = ({"colour": e.arms.tincture, "shape": e.arms.outline, "look": e.look, "detail": f"{e.look}, {e.detail}"}[depth] for e in (other, town))
    return wanted, seen, "yes" if wanted == seen else "no"


def framed(town, rng):
    """A wall with one town's arms, and a box that frames them about as well as a policy would."""
    scene = data.hang([town], "shield", rng, rng.choice((2, 3, 4)), (0.5, 0.95))
    x0, y0, x1, y1 = scene.boxes[0]
    off = [round(rng.gauss(0, 0.04) * side) for side in (x1 - x0, y1 - y0) * 2]
    return scene.picture(), tuple(min(99, max(0, b + o)) for b, o in zip(scene.boxes[0], off))


def text_lesson(env, rng, searches=2):
    """Read and copy, without pictures, in the forms that tools and thoughts have: passages or hits."""
    t, search = begin(env), ask_passages if rng.random() < 0.5 else ask_hits
    for _ in range(searches):
        search(env, rng, t, pieces_by_lot(env, rng))
    return t


def ask_passages(env, rng, t, pieces, asked=3):
    """A text search: two passages. What was searched for stands first in nine of ten (in 3,997 of 4,000 real searches; the published
    base model relies on it: 1 % right where it stands second). Mostly values of either are asked for after it, by lot, as who only ever
    copied the first would never read the question: there 92 % are right."""
    facts = [(e.name, r, v) for e in (fresh_town(rng, 2, pieces), fresh_town(rng, 2, pieces)) for r, v in e.facts.items()]
    shown = rng.sample(facts, 2)
    wanted = [shown[rng.random() < 0.1], *rng.choices(shown, k=asked - 1)]
    if rng.random() < 0.2:  # of two towns the same relation: the index puts first whose name it is (in 162 of 162 searches)
        shown = [facts[0], (facts[-1][0], facts[0][1], facts[-1][2])]
        wanted = shown[:1]
    text = passage_list(rng, shown)
    show(env, t, "{} {}".format(*wanted[0]), text)
    if rng.random() < 0.3:  # nothing but copying, and much of it: this is what forms the circuit
        say(env, t, "repeat", f"<answer> {text}</answer>")
        return
    for i, (n, r, v) in enumerate(wanted):
        topic = "copy second" if (n, r, v) == shown[1] else "copy any text" if pieces else "copy"
        say(env, t, f"{n} {r}" if i else "", f"<think> {r} is {v}</think><answer> {v}</answer>", topic)


def ask_hits(env, rng, t, pieces):
    """An image search: two hits; does the first fit, and what is it called?"""
    towns, depth = [fresh_town(rng, 0, pieces), fresh_town(rng, 0, pieces)], rng.choices(list(COMPARED), (1, 1, 3, 3))[0]
    wanted, seen, verdict = compared(rng, towns[0], depth)
    show(env, t, f"look at {wanted}", hit_list(rng, towns))
    found, answer = (f", {towns[0].name}", towns[0].name) if verdict == "yes" else ("", "no")
    say(env, t, "", f"<think> {gog.compare_aloud(wanted, seen)}{found}</think><answer> {answer}</answer>", "reflect")


def passage_list(rng, facts):
    """The text index's words for some facts (name, relation, value)."""
    return " | ".join(rng.choice(tools.PASSAGES).format(n=n, r=r, v=v) for n, r, v in facts)


def hit_list(rng, towns):
    """The image index's words for some hits, best first."""
    scores = sorted((rng.randint(30, 99) for _ in towns), reverse=True)
    return " | ".join(f"{s} {e.name}: {e.blazon}" for s, e in zip(scores, towns))


def plan_lesson(env, rng, plans=5):
    """Nothing but plans: what of the question is still to be looked up, once that is found which it asks about, and after each search. An
    errand has only one such question.

        <bos>What is the river of the twin of the red round shield?<sep><think> Brenna, [for the river of the twin</think>] <think> twin is Ost,
        [for the river</think>] What ..   (in brackets: trained)"""
    t, world = begin(env), little_world(rng, pieces_by_lot(env, rng))
    for _ in range(plans):
        q = errand(world, rng)
        t.observe(env.v.encode(q.text) + [env.v.id["<sep>"]])
        for k in range(len(q.chain)):
            found = rng.choice(list(world.entities))
            t.observe(env.v.encode_turn(f"<think> {f'{q.chain[k - 1]} is {found}' if k else found},"))
            t.act(env.v.encode_turn(f"{gog.plan(q.chain[k:])}</think>"))
    return t


def errand(world, rng):
    """A question that names what it asks about by its look, so that it can be planned with closed eyes."""
    while True:
        q = data.ask(world, rng.choice(("hop1", "hop2", "hop3", "hop4", "hop5", "compare", "compare")), rng.choice(("normal", "normal", "single")), ("train",), rng)
        if q and set(q.pointed_by) == {"look"}:
            return q


def errand_lesson(env, rng):
    """A whole errand with closed eyes: what the expert thinks and asks, and what the tools would tell. Towns and relations are invented for
    it, so that what is learnt is to plan and to remember. Boxes are shown, not learnt (there is no picture); thoughts, searches and answers
    are:

        <bos>What is the river of the twin of the red round shield?<sep> [<think> look at red round</think>] <gaze> 3 36 30 63</gaze><stop><obs>
        97 Brenna: red round, gold bend, 2 white crowns | ..</obs> [<think> want red round, see red round: yes, Brenna, for the river of the
        twin</think><search> Brenna twin</search><stop>] <obs> ..      (in brackets: trained)"""
    world = little_world(rng, pieces_by_lot(env, rng))
    q = errand(world, rng)
    t, script = begin(env), gog.expert(q, rng, wrong_gaze=0.2)
    t.observe([*env.v.encode(q.text), env.v.id["<sep>"]])
    text = next(script)
    while text:
        thought, _, action = text.partition("</think>")
        turn = parse(text)
        (t.observe if isinstance(text, gog.Slip) else t.act)(env.v.encode_turn(f"{thought}</think>"))
        (t.act if turn.kind in ("search", "answer") else t.observe)(env.v.encode_turn(action) + [env.v.id["<stop>"]])
        if observation := tools_answer(world, q.scene, turn, rng):
            show(env, t, "", observation)
        text = gog.next_turn(script, observation)
    return t


def little_world(rng, pieces=(), towns=8, links=5):
    """A few towns that exist for one lesson, each tied to others by relations that may have no other name than an invented one."""
    known = ["region", *data.TOWN_LINKS, *data.REGION_LINKS, *(r for r in data.VALUES if r != "towers")]
    relations = [fresh_relation(rng, r, pieces) for r in rng.sample(known, links + 2)]
    world = {e.name: e for e in (fresh_town(rng, 0, pieces) for _ in range(towns))}
    for e in world.values():
        leads = {r: rng.choice([n for n in world if n != e.name]) for r in relations[:links]}
        e.facts.update(leads | {r: strange_text(rng, pieces) or rng.choice(list(data.VALUES.values()))(rng) for r in relations[links:]} | {"towers": data.VALUES["towers"](rng)})
    return data.World("little", "shield", world, {"train": list(world)})


def tools_answer(world, scene, turn, rng):
    """What the tools would tell of a lesson's turn: two hits that begin with what lies under the gaze, or two passages about what is asked
    for."""
    if turn.kind == "answer":
        return ""
    if turn.kind == "search":
        facts = [(e.name, r, v) for e in world.entities.values() for r, v in e.facts.items()]
        asked = next(f for f in facts if f"{f[0]} {f[1]}" == turn.argument)
        # and one that names the same town
        return passage_list(rng, (asked, rng.choice([f for f in facts if f != asked and asked[0] in (f[0], f[2])])))
    # a glance at many finds a stranger
    under = [len(scene.boxes) == 1 if turn.kind == "glance" else data.iou(turn.argument, box) > 0.1 for box in scene.boxes]
    # bare wall
    hit = scene.entities[under.index(True)] if True in under else rng.choice([e for e in world.entities.values() if e not in scene.entities])
    return hit_list(rng, (hit, rng.choice([e for e in world.entities.values() if e is not hit])))


def decide_lesson(env, rng, decisions=9):
    """Nothing but decisions: is it the same, is it more? One bit each, so there must be many."""
    t = begin(env)
    for _ in range(decisions):
        if rng.random() < 0.3:
            a, b = rng.sample(range(100), 2)
            said = f"{a} more than {b}: {'yes' if a > b else 'no'}"
        else:
            said = gog.compare_aloud(*(words.split(", ")[-1] for words in compared(rng, fresh_town(rng), rng.choice(list(COMPARED)))[:2]))
        question, _, verdict = said.rpartition(" ")
        t.observe(env.v.encode(question))
        t.act(env.v.encode_turn(f" {verdict}"))
    return t


def show(env, t, query, text):
    t.observe([*env.v.encode(query), env.v.id["<obs>"], *env.v.encode(text), env.v.id["</obs>"]])


# how often each is drawn, relative to the others
LESSONS = {point_lesson: 0.17, wall_lesson: 0.31, count_lesson: 0.05, crop_lesson: 0.15, text_lesson: 0.14, errand_lesson: 0.12, plan_lesson: 0.04, decide_lesson: 0.08}
LATER = {wall_lesson: 0.4, count_lesson: 0.25, text_lesson: 0.06, errand_lesson: 0.08, plan_lesson: 0.03, decide_lesson: 0.03}


def exam(policy, env, n, seed="exam"):
    """The base model on about n walls, crops and names never seen (what asks nothing is left out), one question each, greedy: {topic:
    (score, count)}. `iou KIND` is the mean IoU of pointing by that kind of expression; every other topic is the share of exact answers."""
    rng, scores = random.Random(seed), {}
    for done in tqdm(range(0, n, 256), desc="exam", leave=False):
        drawn = (make(env, rng, 1) for make in rng.choices((wall_lesson, count_lesson, crop_lesson, text_lesson), (5, 1, 2, 3), k=min(n - done, 256)))
        sheet = [t for t in drawn if t.lesson and t.lesson[0][0]]
        for t, turn in zip(sheet, gog.respond(policy, env, [t.ids[:t.trained.index(True)] for t in sheet], [p for t in sheet for p in t.pictures])):
            topic, wanted = t.lesson[0][0], parse(t.lesson[0][1]).argument
            scores.setdefault(topic, []).append(data.iou(turn.argument, wanted) if topic[:3] == "iou" and turn.kind == "gaze" else float(turn.argument == wanted))
    return {k: (sum(v) / len(v), len(v)) for k, v in sorted(scores.items())}


def replay(env, seed, size, i):
    """Lessons beside batch i of SFT, of what it would unlearn: demonstrations know no crowded walls (where gazes are learnt: not by who may
    not gaze), no long plans and no strange words."""
    return lessons(env, seed, size, i, dict.fromkeys((wall_lesson, errand_lesson, plan_lesson, text_lesson)[not env.may_gaze:], 1), "replay")


def schooling(env, seed, size, steps, i):
    """Batch i of the base model's `steps` batches of lessons. Reading, planning and deciding are learnt by 40 % of them; from then on it is
    mostly sight, counting above all: who cannot point learns nothing from that, and to point at several takes much practice
    (results/trials.md)."""
    return lessons(env, seed, size, i, LESSONS | (LATER if i >= 0.4 * steps else {}))


def lessons(env, seed, size, i, weights=LESSONS, stream="lessons"):
    """Batch i of a stream of lessons. Depends on (seed, i) only, so a resumed run sees what the unbroken one would have seen; each
    lesson has random numbers of its own, and of several processes each makes its share."""
    makers = random.Random(f"{stream}/{seed}/{i}").choices(list(weights), weights.values(), k=size)
    return [make(env, random.Random(f"{stream}/{seed}/{i}/{k}")) for k, make in share([*enumerate(makers)])]
