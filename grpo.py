"""How the policy learns: rewards, losses, the curriculum, and the pretraining tasks of the base model.

RL in four steps: every rollout of a question gets a reward; its advantage is that reward relative to the other rollouts
of the same question (its group); the policy loss makes tokens of rollouts with a positive advantage more likely; the
curriculum chooses what is asked next.

From the paper: GRPO with r = (1 - lambda) r_acc + lambda r_fmt. Questions are sorted by the SFT model's pass rate
    (share of its rollouts that are right): Level 1 is about 50 %, Level 2 below 50 %. The final model trains on Level 2
    only.
Here instead, and why:
  1. r_acc is an exact match (the paper: an LLM judge). lambda = 0.1, as in related work; the paper prints no value.
  2. A group is dead if all its rollouts have the same r_acc (all right, or all wrong). It has no advantage, and counts
     neither in the loss nor in its denominator. The test uses r_acc, not the reward: with division by the standard
     deviation, differences in format alone would get advantages of about +-1, in spite of lambda = 0.1.
  3. One update per batch of rollouts. So the ratio is close to 1, and the clip hardly ever binds (the code is the
     general loss). In bfloat16 the worst token of a step is typically off by 0.15 in log-probability (at most by 1.3
     in the published runs), because a rollout and a training step round differently.
  4. The value of the loss is no measure of progress. The advantages of a group sum to 0, so it stays between about
     -0.05 and 0.15 (mostly above 0, as wrong trajectories have more tokens than right ones). Watch accuracy and entropy
     instead.
  5. data.RL_MIX, from which the questions are drawn, was chosen by how well their gradients agree (class Curriculum).
  6. By default the curriculum asks new questions only, of kinds that are chosen by running pass rates: Level 2, chosen
     once, lets RL forget what the SFT policy could do. Others to compare with, the paper's too (class Curriculum).
  7. The base model is our own (the paper takes Qwen-VL): dense labels for the vision encoder ("the eyes"), lessons in
     words, an exam.

Reading order: reward and advantage -> policy loss -> one step of each stage -> training data: GoG-Instruct (SFT),
    levels and curriculum (RL) -> the base model: labels for the eyes -> lessons in words -> exam, replay.

Alphabet: Q questions, G rollouts per question (the group), M trained tokens; `a`: the flags (train.Args); `env.v`: the
vocabulary.
"""
import random
import sys
import time
from copy import copy
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import gog
from model import autocast, flat_gradient, gathered, micro_batches, packed, share, summed, torch_rng, update
from tools import PROCESSES, Trajectory, crop, parse, to_array, worded


def accuracy_reward(t, search_penalty=0.0):
    """r_acc of a trajectory, in [0, 1]: 1 if the answer is an exact match, else 0; times 1 - search_penalty if it used
    a tool. (The paper has no penalty, MMSearch-R1 has 0.1.)"""
    return t.correct * (1 - search_penalty * any(turn.kind in ("search", "glance", "gaze") for turn in t.turns))


def reward(r_acc, well_formed, lam=0.1):
    """The paper's reward, r = (1 - lambda) r_acc + lambda r_fmt, in [0, 1]. r_fmt is 1 if every turn is well-formed and
    the last one is an answer, else 0."""
    return (1 - lam) * float(r_acc) + lam * float(well_formed)


def group_advantages(rewards, r_acc, divide_by="std"):
    """Advantages (Q, G) of rewards (Q, G); and which groups are alive, bool (Q,): those whose r_acc (Q, G) differ.

    A = (r - mean) / std over the group ("std", the paper), or r - mean ("mean": very easy and very hard questions get
    no extra weight). Dead groups get exactly 0. The test compares r_acc, so that form alone gives no advantage (item 2
    at the top).
    """
    alive = r_acc.amax(1) > r_acc.amin(1)
    scale = rewards.std(1, keepdim=True).clamp_min(1e-6) if divide_by == "std" else 1.0
    return torch.where(alive[:, None], (rewards - rewards.mean(1, keepdim=True)) / scale, 0.0), alive


def policy_loss(logp, old_logp, advantage, low=0.2, high=0.2, reference=None, beta=0.0):
    """The clipped loss, summed over tokens (M,): -min(ratio A, clip(ratio, 1 - low, 1 + high) A) + beta KL.

    Tensors are (M,). ratio = exp(logp - old_logp). KL to a reference policy, whose log-probabilities are
    `reference`, by the k3 estimator: exp(d) - d - 1 >= 0 with d = reference - logp. The caller divides by the token
    count of the whole update. Also returns the number of tokens outside the clip range, and the summed KL.
    """
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage).sum()
    d = reference - logp if reference is not None else torch.zeros_like(logp)
    kl = (d.exp() - d - 1).sum()
    return loss + beta * kl, (ratio != clipped).sum().item(), kl.item()


# ----------------------------------------------------------------------------------------------- one step of each stage

def token_logprobs(policy, env, trajectories, temperature=1.0):
    """Log-probability of every trained token, flat (M,), and of all ids at these positions, (M, vocab).

    SFT and RL share this one mask rule: only tokens marked `trained` are scored, and ids that may not be sampled get
    probability 0.
    """
    ids, trained, lengths, pictures = packed(trajectories, env.v.id["<pad>"], policy.device)
    hidden = policy(ids, pictures, env.image_ids[0], lengths=lengths)
    # Token t is predicted at position t - 1. Each packed trajectory begins with <bos>, which is never trained, so no
    # token is predicted from the trajectory before it
    is_target = trained[:, 1:]
    logits = policy.logits(hidden[:, :-1][is_target]).masked_fill(~torch.tensor(env.sampleable, device=policy.device), float("-inf"))
    all_logp = F.log_softmax(logits.float() / temperature, -1)
    return all_logp.gather(1, ids[:, 1:][is_target][:, None])[:, 0], all_logp


def supervised_step(policy, env, batch, opts, budget=4000):
    """One optimiser step of the causal LM loss on `trained` tokens (the expert's turns, or the answers of a lesson).
    Returns loss and gradient norm.

    `batch` is this process's share. The loss is divided by the token count of the whole batch, over all processes, so
    the gradient does not depend on the size of the micro-batches.
    """
    total, loss = summed(sum(sum(t.trained) for t in batch)).item(), 0.0
    for part in micro_batches(batch, [len(t.ids) for t in batch], budget):
        logp, _ = token_logprobs(policy, env, part)
        (-logp.sum() / total).backward()
        loss -= logp.sum().item() / total
    loss = summed(loss).item()
    return loss, update(policy, opts, batch, loss)


def grpo_step(policy, reference, env, batch, advantages, opts, a):
    """One GRPO update from rollouts (list of Q*G) and their advantages (Q*G,). Returns the metrics of the step.

    Rollouts with advantage 0 are left out, of the KL penalty, too (`used`: indices of the others); the loss is divided
    by the number of trained tokens of the others. The gradient is computed in two halves, of the questions with even
    and with odd index. The metric `signal` is the cosine of these two gradients, -1 to 1: 1 if both halves ask for the
    same change, about 0 if they have nothing in common (noise).
    """
    used = advantages.nonzero()[:, 0].tolist()
    # ablation: every token but <bos> is trained, also questions, image placeholders and tool results. These have no
    # old_logp, so the ratio of all tokens is set to 1
    if not a.mask:
        env, batch = copy(env), [replace(t, trained=[False] + [True] * (len(t.ids) - 1)) for t in batch]
        env.sampleable = [True] * env.v.size
    token_count = max(1, sum(sum(batch[i].trained) for i in used))
    totals, gradients, ratio_gap = dict(loss=0.0, kl=0.0, clipped=0.0, entropy=0.0), [], 0.0
    for half in (0, 1):
        mine = share([i for i in used if i // a.group % 2 == half])  # rollout i answers question i // group
        for part in micro_batches(mine, [len(batch[i].ids) for i in mine], a.token_budget):
            trajectories = [batch[i] for i in part]
            logp, all_logp = token_logprobs(policy, env, trajectories, a.temperature)
            old_logp = torch.cat([torch.tensor(t.logprobs)[torch.tensor(t.trained)] for t in trajectories]).to(logp.device) if a.mask else logp.detach()
            token_advantages = torch.cat([advantages[i].expand(sum(batch[i].trained)) for i in part]).to(logp.device)
            with torch.no_grad():
                ref_logp = token_logprobs(reference, env, trajectories, a.temperature)[0] if reference is not None else None
                entropy = -(all_logp.exp() * all_logp.clamp_min(-1e4)).sum().item()  # 0 * -inf would be nan
                ratio_gap = max(ratio_gap, (logp - old_logp).abs().max().item())
            loss, clipped, kl = policy_loss(logp, old_logp, token_advantages, a.clip_low, a.clip_high, ref_logp, a.beta)
            (loss / token_count).backward()
            for name, value in dict(loss=loss.item(), kl=kl, clipped=clipped, entropy=entropy).items():
                totals[name] += value / token_count
        gradients.append(flat_gradient(opts))  # gradients accumulate: the second is the sum of both halves
    totals, signal = {name: summed(x).item() for name, x in totals.items()}, F.cosine_similarity(gradients[0], gradients[1] - gradients[0], 0).item()
    norm = update(policy, opts, share([batch[i] for i in used]), totals["loss"])  # all groups dead: no gradient, nothing moves
    return totals | dict(ratio_gap=max(gathered([ratio_gap])), signal=signal, grad_norm=norm)


LOGGED = "accuracy mixed_search answer_share search_share glance_share gaze_share gaze_correct reflection turns tool_calls tokens truncated".split()


def iteration(policy, reference, env, questions, opts, a, generator):
    """One RL iteration on Q questions: rollouts, rewards, advantages, update. Returns the Q*G trajectories, their
    advantages (Q*G,), the pass rates of the Q questions, and the metrics to log."""
    began = time.time()
    batch = gog.rollout(policy, env, questions, a.group, a.temperature, generator=generator)
    rollout_seconds = time.time() - began
    by_group = lambda values: torch.tensor(values).view(len(questions), a.group)  # (Q*G,) -> (Q, G)
    r_acc = [accuracy_reward(t, a.search_penalty) for t in batch]
    rewards = by_group([reward(r, t.well_formed, a.lam) for r, t in zip(r_acc, batch)])
    advantages, alive = group_advantages(rewards, by_group(r_acc), a.advantage)
    with autocast(policy.device.type):
        stats = grpo_step(policy, reference, env, batch, advantages.flatten(), opts, a)
    behaviour = gog.behaviour(batch)
    stats |= dict(reward=rewards.mean().item(), dead=1 - alive.float().mean().item(), **{k: behaviour[k] for k in LOGGED}, rollout_seconds=rollout_seconds, seconds=time.time() - began)
    return batch, advantages.flatten(), by_group([float(t.correct) for t in batch]).mean(1).tolist(), stats


# --------------------------------------------------- training data: demonstrations (SFT), levels and curriculum (RL)

def level(p):
    """Complexity level of a pass rate p in [0, 1]: 2 is hard (p < 1/2; the paper trains on these), 1 is about a half
    (1/2 to 5/8, i.e. two of four tries, or four or five of eight), 0 is easy."""
    return 2 if p < 0.5 else 1 if p <= 0.625 else 0


def pass_rates(policy, env, pool, n=4, temperature=1.0, seed=0):
    """The pass rate of every question in `pool`: the share of n sampled trajectories that are right. Prints how many
    questions each level has, and a hint if level 2 is hopeless."""
    trajectories = gog.rollout(policy, env, pool, n, temperature, generator=torch_rng(policy.device, "pass rates", seed), progress=f"pass rates, {n} tries")
    rates = [sum(t.correct for t in trajectories[n * i:n * i + n]) / n for i in range(len(pool))]
    counts, hint = [sum(level(p) == k for p in rates) for k in range(3)], ". Hardly any of level 2 was ever solved, so that most of its groups will be dead: --curriculum fresh may do better than level2"
    print("levels: {} easy, {} of level 1, {} of level 2 ({} never solved)".format(*counts, rates.count(0)) + hint * (rates.count(0) > 0.9 * counts[2]), file=sys.stderr)
    return rates


def uncertain(policy, env, pool, n=4, seed=0):
    """The paper's uncertainty filter: drop a question if n sampled answers without tools (temperature 1) are all right.
    Returns the questions that stay. If the first answer is wrong, the others are not sampled."""
    # all_right: indices of the questions whose answers so far are all right
    generator, all_right = torch_rng(policy.device, "filter", seed), list(range(len(pool)))
    for tries in (1, n - 1):  # the n - 1 others as one group, whose prompt is read only once
        trajectories = gog.rollout(policy, env, [pool[i] for i in all_right], tries, schedule=gog.SCHEDULES["direct"], generator=generator, rows=1024, progress="uncertainty filter")
        all_right = [i for k, i in enumerate(all_right) if all(t.correct for t in trajectories[tries * k:tries * k + tries])]
    return [pool[i] for i in sorted({*range(len(pool))} - {*all_right})]


def instruct(policy, env, world, n=5750, seed=0, wrong_gaze=0.2):
    """GoG-Instruct: `n` expert trajectories about questions that pass the uncertainty filter, 43.5 % of them
    search-free (the paper's share). Each is checked: the answer is right, no turn is malformed, and the last gaze, if
    any, has IoU > 0.9 with a target. WorldError if too few questions pass."""
    quota = {True: round(0.435 * n), False: n - round(0.435 * n)}  # is a question search-free? -> how many
    # with --no-gaze: only questions that can be answered without one
    mix = [(kind, setting, w) for kind, setting, w in data.SFT_MIX if env.may_gaze or setting == "single" or kind in data.VISUAL]
    chosen, rng, bar = {True: [], False: []}, random.Random(f"expert/{seed}"), tqdm(total=n, desc="demonstrations")
    asked, dropped, batch = 0, 0, 0
    while any(len(chosen[free]) < quota[free] for free in quota):
        pool = [q for q in data.questions(world, mix, min(512, n // 2 + 8), f"sft/{seed}/{batch}") if len(chosen[q.search_free]) < quota[q.search_free]]
        kept = uncertain(policy, env, pool, seed=seed)
        asked, dropped, batch = asked + len(pool), dropped + len(pool) - len(kept), batch + 1
        scripts = [gog.expert(q, rng, wrong_gaze, missed) for q, missed in zip(kept, gathered(misses(policy, env, share(kept))))]
        for t in gog.play_scripts(env, kept, scripts, progress="expert"):
            if t.correct and t.well_formed and (not gog.gazes(t) or gog.gazes(t)[-1][1] > 0.9):
                chosen[t.question.search_free].append(t)
        bar.update(sum(min(len(chosen[free]), quota[free]) for free in quota) - bar.n)
        if batch > 80 + n // 100:
            raise data.WorldError(f"too few demonstrations are left: the base model answers nearly all questions of one kind without tools, or names and facts are too long for a turn of {gog.TURN_TOKENS} tokens. Lower --demos, or shorten the texts")
    bar.close()
    demos = chosen[True][:quota[True]] + chosen[False][:quota[False]]
    random.Random(f"shuffle/{seed}").shuffle(demos)
    print(f"GoG-Instruct: {len(demos)} trajectories of {asked} questions asked, {dropped} dropped by the uncertainty filter; "
          f"{sum(any(gog.looked_elsewhere(t)) for t in demos)} with reflection", file=sys.stderr)
    return demos


def misses(policy, env, questions, rows=256):
    """Wrong gazes of the base model (IoU < 0.5) at targets without look-alikes: for every question {target: (look named
    in its thought, box chosen)}. The expert begins with these mistakes, to show how to recover."""
    missed = [{} for _ in questions]
    to_point = [(i, target, data.references(q.scene)[target][kind]) for i, q in enumerate(questions) if len(q.scene.boxes) > 1 and not q.search_free
                for target, kind in zip(q.targets, q.pointed_by) if kind != "detail"]  # of look-alikes the expert tries every box anyway
    for start in range(0, len(to_point), rows):
        batch = to_point[start:start + rows]
        pictures = [to_array(questions[i].scene.picture(), env.side) for i, *_ in batch]
        prompts = [env.prompt(replace(questions[i], text=f"point to the {expression}"), p).ids for (i, _, expression), p in zip(batch, pictures)]
        for (i, target, _), turn in zip(batch, gog.respond(policy, env, prompts, pictures)):
            x0, y0, x1, y1 = box = turn.argument if turn.kind == "gaze" else (0, 0, 0, 0)
            # the thought ends in "look at LOOK" or, if a neighbour is named, in "left of it LOOK" (gog.look_thought)
            named_look = " ".join(turn.thought.split()[-2:])
            if named_look and min(x1 - x0, y1 - y0) >= 3 and data.iou(box, questions[i].scene.boxes[target]) < 0.5:
                missed[i][target] = named_look, box
    return missed


class Curriculum:
    """Chooses what is asked next, by pass rate, among entries (a list that the caller keeps): questions that have been
    scored once beforehand, or kinds of questions:

        level2 (the paper's), level1, learnable (0 < p < 1/2), all: questions with such a first pass rate p, equally
            often.
        adaptive: all questions, with weights that follow their pass rates (`draw`).
        fresh (default): as adaptive, for kinds of questions (four hops, counting ...); each draw asks a new question.

    `pass_rates`: one per entry; `draw` returns indices of entries. `worth`: weight of each entry, default 1 (fresh:
    data.RL_MIX). `pool`: the indices that may be drawn, default: what the mode allows.

    `fresh` needs no scoring beforehand, no question can be learnt by heart, and what is being forgotten is asked again.
    The questions of level2, some 500 of 800, come three or four times each; what RL forgets of the others, nothing
    brings back. After an SFT of three times as many steps, which RL has less to add to, the two were equal (README).

    What a pass rate cannot tell: whether a kind is half learnt or half luck. Look-alikes and comparisons succeed half
    of the time, too, but their gradients have nothing in common (`signal`, grpo_step). So data.RL_MIX has few
    look-alikes (two parts of 23, against forgetting) and no comparisons: two batches of 256 rollouts of chains and
    counting had a cosine of 0.16, with many look-alikes 0.03. (`signal` compares the halves of one batch, of a policy
    that has begun to learn: 0.02 to 0.05 on average in the published runs of fresh, 0.03 to 0.07 in those of level2,
    below 0.02 on flags.)
    """

    def __init__(self, pass_rates, mode="fresh", seed=0, pool=None, worth=None):
        self.pass_rates, self.mode, self.seed, self.worth = pass_rates, mode, seed, worth or [1] * len(pass_rates)
        wanted = {"level1": lambda p: level(p) == 1, "level2": lambda p: level(p) == 2, "learnable": lambda p: 0 < p < 0.5}
        self.pool = pool or [i for i, p in enumerate(pass_rates) if wanted.get(mode, lambda p: True)(p)]
        if not self.pool:
            raise data.WorldError(f"no question passes the filter of --curriculum {mode}. Use --curriculum all")

    def draw(self, n, step):
        """Random indices of n entries for a step. adaptive, fresh: with replacement, by weight worth * (0.02 + p(1-p)).
        p(1-p) is the variance of one try (0 if always or never right); 0.02 keeps every entry in play. Other modes:
        without replacement if the pool is large enough."""
        rng = random.Random(f"curriculum/{self.seed}/{step}")
        if self.mode not in ("adaptive", "fresh"):
            return rng.sample(self.pool * -(-n // len(self.pool)), n)
        return rng.choices(self.pool, [self.worth[i] * (0.02 + self.pass_rates[i] * (1 - self.pass_rates[i])) for i in self.pool], k=n)

    def seen(self, indices, rates):
        """Update pass rates with an exponential moving average (slow for kinds, as their questions differ)."""
        for i, p in zip(indices, rates):
            self.pass_rates[i] += (0.1 if self.mode == "fresh" else 0.5) * (p - self.pass_rates[i])


def askable(world):
    """The entries of mode `fresh`: half of the user's own questions, and every (kind, setting, weight) of data.RL_MIX
    that this world can ask."""
    can_be_asked = lambda kind, setting: any(data.ask(world, kind, setting, ("train",), random.Random(i)) for i in range(200))
    return [*world.own[::2], *((kind, setting, weight) for kind, setting, weight in data.RL_MIX if can_be_asked(kind, setting))]


def ask_each(world, entries, seed):
    """One question per drawn entry: a new one for a kind (it depends on `seed`), a user's question as it is."""
    return [entry if isinstance(entry, data.Question) else data.questions(world, [entry], 1, f"{seed}/{i}")[0] for i, entry in enumerate(entries)]


# ========== From here on: how the base model is pretrained. For GRPO alone, stop here and go on to train.py ==========
# ---------------------------------------------------------------------------------- base model: labels for the eyes

# The labels of a grid cell, part -> its possible values. A label is an index into that list; -1 is ignored by the loss.
# They describe the shield that covers most of the cell: its arms, its position among the others (across, down, size),
# and the two words of its neighbour's look on each side. None: bare wall, or no neighbour there. Tincture and outline
# must come first: lay_on_grid labels bare wall for these two.
PARTS = {"tincture": [None, *data.TINCTURES], "outline": [None, *data.OUTLINES], "ordinary": list(data.ORDINARIES), "ordinary_tincture": list(data.TINCTURES),
         "charge": [None, *data.CHARGES], "charge_tincture": list(data.TINCTURES), "count": [1, 2, 3], "across": data.ACROSS, "down": data.DOWN, "size": data.SIZE,
         **{(side, k): [None, *kinds] for side in data.SIDES for k, kinds in enumerate((data.TINCTURES, data.OUTLINES))}}
FINE = ("ordinary", "ordinary_tincture", "charge", "charge_tincture", "count")  # legible only close up
# Parts whose labels 1, 2, ... are words. see_step draws image tokens towards the embeddings of these words
TIED = ("tincture", "outline", "across", "down", "size", "charge")


def labelled_pictures(config, seed, size, i):
    """Batch i of pictures with dense labels: for each of the P patches and N image tokens, the box and the PARTS of the
    shield that covers most of it. Depends on (seed, i) only; of several processes, each makes its share.

    Returns numpy arrays, as tensors would travel between processes through a socket: pictures uint8 (B, 3, S, S), boxes
    float (B, P + N, 4) in 0..1, labels int (B, P + N, parts), -1 where nothing can be said.
    """
    return [np.stack(x) for x in zip(*(labelled_picture(config, random.Random(f"sights/{seed}/{i}/{k}")) for k in share(range(max(size, PROCESSES)))))]


def labelled_picture(config, rng):
    """One picture, and the boxes and labels of its cells: patches first, then image tokens."""
    least, most, cells, sizes, _ = data.SETTINGS[rng.choices(list(data.LESSON_WALLS), data.LESSON_WALLS.values())[0]]
    px = 2 * config.picture  # drawn large, then shrunk to half: edges also fall between pixels
    if rng.random() < 0.35:  # like a crop: one shield that nearly fills the picture, more or less blurred
        least, most, cells, sizes, px = 1, 1, 1, (0.8, 1.0), rng.randint(config.picture // 3, config.picture)
    towns = [fresh_town(rng) for _ in range(rng.randint(least, most))]
    scene = data.hang(towns, "shield", rng, cells, sizes)
    labels = np.array([part_labels(town, position, towns, box) for town, position, box in zip(towns, data.layout(scene), scene.boxes)])
    grids = [lay_on_grid(scene.boxes, labels, config.picture // config.patch // n) for n in (1, config.shuffle)]  # of patches, of image tokens
    return to_array(scene.picture(px), config.picture), *map(np.concatenate, zip(*grids))


def part_labels(town, position, towns, box):
    """The label of every part of one shield; -1 for FINE parts unless it fills 35 % of the picture's height."""
    description = {**vars(town.arms), **position, **{(side, k): towns[position[side]].look.split()[k] if side in position else None for side in data.SIDES for k in (0, 1)}}
    return [-1 if part in FINE and box[3] - box[1] < 35 else values.index(description[part]) for part, values in PARTS.items()]


def lay_on_grid(boxes, labels, grid):
    """Give every cell of a grid the box and the labels of the shield that covers most of it; a cell covered by less
    than 2 % is bare wall. boxes (n, 4) in percent, labels (n, parts) -> (grid^2, 4) in 0..1, (grid^2, parts)."""
    edge, fractions = np.arange(grid + 1) / grid, np.array(boxes, np.float32) / 100
    overlap = lambda low, high: (np.minimum(high[:, None], edge[1:]) - np.maximum(low[:, None], edge[:-1])).clip(0)  # (n, grid): overlap with each row or column of cells
    cover = overlap(fractions[:, 1], fractions[:, 3])[:, :, None] * overlap(fractions[:, 0], fractions[:, 2])[:, None]  # (n, grid, grid)
    best, is_bare = cover.argmax(0).ravel(), (cover.max(0) * grid**2 < 0.02).ravel()
    # bare wall: no tincture and no outline (label 0 of the first two parts); the other parts are left out of the loss
    return np.where(is_bare[:, None], 0, fractions[best]).astype(np.float32), np.where(is_bare[:, None], [0, 0] + [-1] * (len(PARTS) - 2), labels[best])


def fresh_town(rng, relations=0, pieces=(), noun="shield", **arms):
    """A town invented for one lesson, so that nothing about it can be memorised. `relations`: its number of facts;
    `pieces`: see `strange_text`; `arms`: fixed parts of its arms. A "flag": arms on a rectangle, always with an
    ordinary, captioned by their colours as pictures of folder worlds are (data.look_of): "red banner, white and
    gold"."""
    facts = {fresh_relation(rng, r, pieces): strange_text(rng, pieces) or data.VALUES[r](rng) for r in rng.sample(list(data.VALUES), relations)}
    arms = data.Arms.draw(rng, **(dict(outline=rng.choice(("banner", "banner", "square")), ordinary=rng.choice([*data.ORDINARIES][1:])) if noun == "flag" else {}) | arms)
    town = data.Entity.with_arms(strange_text(rng, pieces) or data.town_name(rng), facts, arms)
    return replace(town, **data.look_of(town.picture(24))) if noun == "flag" else town


def fresh_relation(rng, known, pieces):
    """The name of a relation: the `known` one, an invented word, or a strange text."""
    return strange_text(rng, pieces) or (known if rng.random() < 0.5 else data.word(rng).lower())


# Lower case is three times as likely as anything else
LETTERS = 3 * "abcdefghijklmnopqrstuvwxyz" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789áàâãåäæçčéèêëíîïñóòôõøöőúûüýžšß'-.²"


def strange_text(rng, pieces, probability=0.5):
    """With `probability` a string of one to five random tokens (`pieces`: Vocabulary.pieces), or one or two words of
    random letters; else "". Without pieces always "".

    Why: a token that no lesson shows can never be copied, and names of real countries are spelt in many short tokens,
    each of which stands elsewhere in a passage, too. (Real facts copied: 33 % without words of letters, 75 % with.)
    """
    if not pieces or rng.random() >= probability:
        return ""
    words = ["".join(rng.choices(LETTERS, k=rng.randint(2, 9))) for _ in range(rng.randint(1, 2))]
    return " ".join(words) if rng.random() < 0.25 else "".join(rng.choices(pieces, k=rng.randint(1, 5))).strip()


def draw_pieces(env, rng):
    """The pieces for strange texts of a lesson; none for half of the lessons."""
    return env.v.pieces if rng.random() < 0.5 else ()


def see_step(policy, heads, batch, v, opts):
    """One optimiser step of the vision encoder on dense labels (`batch`: as from labelled_pictures). Returns loss and
    gradient norm.

    The loss has three terms. Boxes: 50 times the L1 distance of the edges, relative to the sides of the box (as IoU
    measures it). Parts: cross-entropy of each; charges count twice. Both are taken at patches and at image tokens.
    Words: the image token that shows the leftmost red round shield shall resemble the decoder's embeddings of "red",
    "round" and "leftmost", so that the decoder finds what it reads about. `heads`: linear layers, one for patches and
    one for image tokens. Only the gradient of the vision encoder is clipped.
    """
    pictures, boxes, labels = batch
    patches, tokens = policy.vision(pictures)
    outputs, edges, cell_labels = torch.cat([heads[0](patches), heads[1](tokens)], 1).flatten(0, 1), boxes.flatten(0, 1), labels.flatten(0, 1)
    inside = edges[:, 2] > 0
    sides = (edges[inside, 2:] - edges[inside, :2]).repeat(1, 2)  # (n, 4): width, height, width, height
    # with 15 instead of 50, the boxes of image tokens were a third worse (results/trials.md)
    loss = 50 * ((outputs[inside, :4] - edges[inside]).abs() / sides).sum() / summed(4 * inside.sum())
    for k, (part, logits) in enumerate(zip(PARTS, outputs[:, 4:].split([*map(len, PARTS.values())], 1))):
        loss = loss + (1 + (part == "charge")) * cell_loss(logits, cell_labels[:, k])  # charges count twice, as they are learnt last
    token_labels, tokens = labels[:, patches.shape[1]:].flatten(0, 1), tokens.flatten(0, 1)  # (B*N, parts), (B*N, D)
    for part in TIED:
        # (B*N, words). Without the factor 4, the embeddings of these words grew to four times the length of others
        word_scores = 4 * tokens @ policy.embed_tokens.weight[[v.word(w) for w in PARTS[part][1:]]].T / tokens.shape[-1]**0.5
        loss = loss + (1 + (part == "charge")) * cell_loss(F.pad(word_scores, (1, 0)), token_labels[:, list(PARTS).index(part)])  # label 0, none of these words: score 0
    loss.backward()
    loss = summed(loss.detach()).item()
    return loss, update(policy.vision, opts, loss=loss)


def cell_loss(logits, label):
    """Mean cross-entropy over the cells with a label (>= 0). It is 0, not nan, if a small batch has no such cell."""
    return F.cross_entropy(logits, label, ignore_index=-1, reduction="sum") / summed((label >= 0).sum()).clamp_min(1)


# ------------------------------------------------------------------------------------ base model: lessons in words

def new_lesson(env):
    """A new lesson, which consists of <bos> only."""
    return Trajectory(None, [env.v.id["<bos>"]], [False], [0.0])


def teach(env, t, question, response, topic=""):
    """Append a question (if any; not trained) and the response to be learnt. `topic`: the exam's heading for it."""
    t.observe(env.v.encode(question) + [env.v.id["<sep>"]] if question else [])
    t.act(env.v.encode_turn(response) + [env.v.id["<stop>"]])
    t.lesson.append((topic, response))


def draw_wall(env, rng, px=None):
    """A random wall, some of its objects look-alikes: (new lesson that shows it, scene). `px`: the width at which
    the wall is drawn, before it is brought to the size that the model sees (default: twice that size; a small one gives
    a blurred picture). A badge is a shield by another name; flags are few, because their colours are harder, and took
    practice from everything else (results/trials.md)."""
    least, most, cells, sizes, look_alikes = data.SETTINGS[rng.choices(list(data.LESSON_WALLS), data.LESSON_WALLS.values())[0]]
    noun = rng.choice((*12 * ("shield",), *7 * ("badge",), "flag"))
    towns = [fresh_town(rng, noun=noun) for _ in range(rng.randint(least, most))]
    for i in range(1, min(len(towns), 1 + rng.randint(0, look_alikes))):
        towns[i] = fresh_town(rng, noun=noun, outline=towns[0].arms.outline, tincture=towns[0].arms.tincture)
    scene, t = data.hang(rng.sample(towns, len(towns)), noun, rng, cells, sizes), new_lesson(env)
    t.observe(env.image_ids, to_array(scene.picture(px or 2 * env.side), env.side))
    return t, scene


def point_lesson(env, rng):
    """Dense grounding: for every object on a wall its look is given, and its box is the response. For look-alikes, the
    response begins with the places where the remaining ones hang; half of the time a detail is given, too, as in a
    search among them."""
    t, scene = draw_wall(env, rng)
    looks = [e.look for e in scene.entities]
    for look in rng.sample(sorted(set(looks)), len(set(looks))):
        boxes = gog.left_to_right([b for b, l in zip(scene.boxes, looks) if l == look])
        detail = rng.choice([e.detail for e in scene.entities if e.look == look]) if boxes[1:] and rng.random() < 0.5 else ""
        for k, box in enumerate(boxes):
            t.observe(env.v.encode(gog.with_commas(detail, f"look at {look}")))
            t.act(env.v.encode_turn((gog.spots(boxes[k:]) if boxes[1:] else "") + gog.gaze(box)))
    return t


# Kinds of expressions that apply to few objects of a wall, and how much more likely they are chosen than others
RARE = {"shape": 2, "order": 2, "neighbour": 3, "size": 12}


def wall_lesson(env, rng, questions=9):
    """Questions about objects on a wall, each object once. (If it were asked for twice, its box could be copied from
    the first answer without looking.) A tenth of the walls is blurred, so that the first gaze can only be a guess:
    there, if some object is similar, a question comes after one or two wrong gazes (`ask_about`). In brackets: trained.

        <bos> <image> x 16 point to the leftmost shield<sep>
        [<think> look at red round</think><gaze> 3 36 30 63</gaze><stop>] What is the colour ...
    """
    # blurred: never in the exam, which asks one question
    t, scene = draw_wall(env, rng, rng.randint(16, 40) if (blurred := questions > 1 and rng.random() < 0.1) else None)
    expressions = data.references(scene)
    remaining = rng.sample(range(len(expressions)), len(expressions))[:questions]
    while remaining:
        i = remaining.pop()
        if kinds := [k for k in expressions[i] if k != "detail"]:
            ask_about(env, rng, t, scene, i, rng.choices(kinds, [RARE.get(k, 1) for k in kinds])[0], expressions[i], remaining, blurred)
    return t


def count_lesson(env, rng, questions=9):
    """How many are red? On a wall without other questions: boxes from earlier answers would be copied, and counting
    would not be learnt."""
    t, scene = draw_wall(env, rng)
    colours = [c for e in rng.sample(scene.entities, len(scene.entities)) for c in data.colours(e)]
    for colour in [c for c in dict.fromkeys(colours) if colours.count(c) > 1 or rng.random() < 0.5][:questions] or colours[:1]:
        teach(env, t, f"How many {scene.noun}s are {colour}?", gog.count_aloud(scene, colour), "count one" if colours.count(colour) == 1 else "count more")
    return t


def ask_about(env, rng, t, scene, i, kind, expressions, remaining, blurred):
    """Append one question about object i, by one kind of expression (`expressions`: {kind: expression}).

    With probability 15 % (`blurred`: always), if there are similar objects: show a wrong gaze (`blurred`: one or two),
    at an object of the same colour or shape that would be refused, with crop and hits; the response looks elsewhere.
    65 %: point to the object. 20 %: ask for its colour or shape, unless the expression gives it away.
    `remaining`: the objects still to be asked for; the wrong ones are removed, as their boxes are now visible.
    """
    e, u, coin = scene.entities[i], rng.random(), rng.randrange(2)  # coin: 0 colour, 1 shape; or one wrong gaze, or two
    look = rng.choice([e.look, *gog.also_looks(e)]) if kind not in ("look", "colour") and u < 0.8 else e.look  # as gog.expert names it
    thought, wanted = gog.look_thought(scene, i, kind, look), gog.must_match(kind, look)
    found = [gog.best_hit(f"{x.name}: {x.blazon}", wanted, kind) for x in scene.entities]  # (name if it fits, what it shows)
    similar = [j for j, x in enumerate(scene.entities) if not found[j][0] and {*x.look.split()} & {*look.split()}]
    if similar and (blurred or u < 0.15):
        said, missed = thought, rng.sample(similar, min(len(similar), 1 + (blurred and coin)))
        remaining[:] = [x for x in remaining if x not in missed]
        t.observe([*env.v.encode(f"point to the {expressions[kind]}"), env.v.id["<sep>"]])
        for j in missed:
            t.observe([*env.v.encode_turn(f"<think> {said}</think>{gog.gaze(scene.boxes[j])}"), env.v.id["<stop>"]])
            show(env, t, "", hit_list(rng, (scene.entities[j], fresh_town(rng, noun=scene.noun))), crop(scene.picture(), scene.boxes[j]))
            said = f"{gog.compare_aloud(wanted, found[j][1])}, {thought}"
        teach(env, t, "", f"<think> {said}</think>{gog.gaze(scene.boxes[i])}", "iou after a miss")
    elif u < 0.8 or kind in ("look", ("colour", "shape")[coin]):
        teach(env, t, f"point to the {expressions[kind]}", f"<think> {thought}</think>{gog.gaze(scene.boxes[i])}", f"iou {kind}")
    else:
        teach(env, t, f"What is the {('colour', 'shape')[coin]} of the {expressions[kind]}?", f"<think> {thought}</think><answer> {look.split()[coin]}</answer>", "visual")


def crop_lesson(env, rng, crops=3):
    """Crops as a gaze would give them: write the caption, or decide whether the crop shows what is wanted."""
    t = new_lesson(env)
    for town in (fresh_town(rng) for _ in range(crops)):
        t.observe(env.image_ids, to_array(crop(*sloppy_crop(town, rng)), env.side))
        wanted, seen, verdict = compared(rng, town, "detail")
        decide = f"look at {wanted}", f"<think> {gog.compare_aloud(wanted, seen)}</think><answer> {verdict}</answer>", "verify"
        teach(env, t, *(("what is this", f"<answer> {town.blazon}</answer>", "caption") if rng.random() < 0.5 else decide))
    return t


# What is compared at each depth -> the parts of the arms that decide it
COMPARED = {"colour": ("tincture",), "shape": ("outline",), "look": ("tincture", "outline"), "detail": ("tincture", "outline", "charge", "charge_tincture", "count")}


def compared(rng, town, depth, noun="shield"):
    """A comparison: (what is wanted, what is seen of `town`, "yes" or "no"). 50 %: `town` itself is wanted. 35 %: the
    same arms with one part drawn anew. 15 %: other arms. `depth`: a key of COMPARED; `noun`: what `town` is."""
    other, u = town, rng.random()
    if u > 0.5:
        part = rng.choice(COMPARED[depth])
        other = fresh_town(rng, noun=noun) if u > 0.85 else fresh_town(rng, noun=noun, **vars(town.arms) | {part: getattr(data.Arms.draw(rng), part)})
    look = f"{rng.choice(data.colours(other))} {other.look.split()[1]}"  # any colour of a flag
    wanted = f"{other.look}, {other.detail}" if depth == "detail" else gog.must_match(depth, look)
    _, seen = gog.best_hit(f"{town.name}: {town.blazon}", wanted, depth)
    return wanted, seen, "yes" if wanted == seen else "no"


def sloppy_crop(town, rng):
    """(picture of a wall with one town's arms, box around them that is about as inexact as a policy's)."""
    scene = data.hang([town], "shield", rng, rng.choice((2, 3, 4)), (0.5, 0.95))
    x0, y0, x1, y1 = box = scene.boxes[0]
    return scene.picture(), tuple(min(99, max(0, edge + round(rng.gauss(0, 0.04) * side))) for edge, side in zip(box, (x1 - x0, y1 - y0) * 2))


def text_lesson(env, rng, searches=2):
    """Reading and copying without a picture: results of text searches (passages) or of image searches (hits), in the
    formats of the tools."""
    t, search = new_lesson(env), ask_passages if rng.random() < 0.5 else ask_hits
    for _ in range(searches):
        search(env, rng, t, draw_pieces(env, rng))
    return t


def ask_passages(env, rng, t, pieces, asked=3):
    """A text search: two passages, then questions about them.

    The first question, which is the query, is about the first passage in 9 of 10 cases (in 3,997 of 4,000 real
    searches). Follow-up questions ask for either value at random, or the policy would always copy the first passage
    without reading the question. (Base models answer less than a tenth right if the query is about the second passage:
    `copy second` in results.csv; one of 2026-11-29 had 92 % of the follow-ups right.)
    """
    facts = [(e.name, r, v) for e in (fresh_town(rng, 2, pieces), fresh_town(rng, 2, pieces)) for r, v in e.facts.items()]
    shown = rng.sample(facts, 2)
    wanted = [shown[rng.random() < 0.1], *rng.choices(shown, k=asked - 1)]
    if rng.random() < 0.2:  # the same relation of two towns: the index ranks the town in the query first (in 162 of 162 searches)
        shown = [facts[0], (facts[-1][0], facts[0][1], facts[-1][2])]
        wanted = shown[:1]
    text = worded(rng, *shown)
    show(env, t, "{} {}".format(*wanted[0]), text)
    if rng.random() < 0.3:  # pure copying, and much of it: this is what forms the copying circuit
        teach(env, t, "repeat", f"<answer> {text}</answer>")
        return
    for i, (n, r, v) in enumerate(wanted):
        topic = "copy second" if (n, r, v) == shown[1] else "copy any text" if pieces else "copy"
        teach(env, t, f"{n} {r}" if i else "", f"<think> {r} is {v}</think><answer> {v}</answer>", topic)


def ask_hits(env, rng, t, pieces):
    """An image search: two hits. Does the first one match what is wanted, and if so, what is its name? A fifth of the
    hits are flags."""
    noun, depth = rng.choice(("flag", *4 * ("shield",))), rng.choices(list(COMPARED), (1, 1, 3, 3))[0]
    towns = [fresh_town(rng, 0, pieces, noun), fresh_town(rng, 0, pieces, noun)]
    wanted, seen, verdict = compared(rng, towns[0], depth, noun)
    show(env, t, f"look at {wanted}", hit_list(rng, towns))
    found, answer = (f", {towns[0].name}", towns[0].name) if verdict == "yes" else ("", "no")
    teach(env, t, "", f"<think> {gog.compare_aloud(wanted, seen)}{found}</think><answer> {answer}</answer>", "reflect")


def hit_list(rng, towns):
    """Towns as the image index lists its hits, best first."""
    return " | ".join(f"{s} {e.name}: {e.blazon}" for s, e in zip(sorted((rng.randint(30, 99) for _ in towns), reverse=True), towns))


def plan_lesson(env, rng, plans=5):
    """Plans only: which relations of the question are still to be looked up, after the shield is identified and after
    each search. (An `errand_lesson` has one question only.) In brackets: trained.

        <bos>What is the river of the twin of the red round shield?<sep>
        <think> Brenna, [for the river of the twin of the one</think>]
        <think> twin is Ost, [for the river of the one</think>] What is ...
    """
    t, world = new_lesson(env), little_world(rng, draw_pieces(env, rng))
    for q in (errand(world, rng) for _ in range(plans)):
        t.observe(env.v.encode(q.text) + [env.v.id["<sep>"]])
        for k in range(len(q.chain)):
            t.observe(env.v.encode_turn(f"<think> {f'{q.chain[k - 1]} is ' if k else ''}{rng.choice(list(world.entities))},"))
            t.act(env.v.encode_turn(f"{gog.plan(q.chain[k:])}</think>"))
    return t


def errand(world, rng, hops=5):
    """A question about a little world: one to `hops` relations or, in 30 %, a comparison of two towns. Drawn again
    until there is one."""
    kind = "compare" if rng.random() < 0.3 else f"hop{rng.randint(1, hops)}"
    return data.ask(world, kind, rng.choice(("normal", "normal", "single")), ("train",), rng) or errand(world, rng, hops)


def errand_lesson(env, rng, hops=5, sighted=False):
    """An errand: a whole trajectory of the expert with simulated tools (`tools_answer`), without the picture.

    Towns and relations are invented for the lesson, so it teaches to plan and to remember, not facts. Glances and gazes
    are shown, but not trained, as there is no picture to find the box in; nor are the thoughts before them, unless the
    question says the look. Other thoughts, searches and answers are trained (in brackets), but for those of slips. (If
    a slip happens to show the wanted colour, the errand goes on with that town: nobody could tell without a picture.)

        <bos>What is the river of the twin of the red round shield?<sep>
        [<think> look at red round</think>] <gaze> 3 36 30 63</gaze><stop>
        <obs>97 Brenna: red round, gold bend, 2 white crowns | ...</obs>
        [<think> want red round, see red round: yes, Brenna, for the river of the twin of the one</think>
         <search> Brenna twin</search><stop>] <obs> ...

    sighted: a search among look-alikes instead, with the picture (`find_lesson`); its gazes are trained, too.
    """
    q = None
    while not q:  # sighted: the town that was drawn is none of the five look-alikes, or nothing tells it from another
        world = little_world(rng, draw_pieces(env, rng), alike=5 if sighted else 1)
        q = data.ask(world, rng.choice(("name", "hop1")), rng.choice(("alike", "small")), ("train",), rng) if sighted else errand(world, rng, hops)
    t = env.prompt(q, to_array(q.scene.picture(), env.side) if sighted else None)
    text = next(script := gog.expert(q, rng, wrong_gaze=0.2))
    while text:
        turn, (thought, _, action) = parse(text), text.partition("</think>")
        looking, slip = turn.kind in ("glance", "gaze"), isinstance(text, gog.Slip)
        # not trained: slips; and without a picture, glances and gazes, and thoughts before them that name a look which
        # the question does not say
        (t.observe if slip or (looking and not sighted and {*q.pointed_by} != {"look"}) else t.act)(env.v.encode_turn(f"{thought}</think>"))
        (t.observe if slip or (looking and not sighted) else t.act)(env.v.encode_turn(action) + [env.v.id["<stop>"]])
        if observation := tools_answer(world, q.scene, turn, rng):
            show(env, t, "", observation, crop(q.scene.picture(), turn.argument) if sighted and turn.kind == "gaze" else None)
        text = gog.next_turn(script, observation)
    return t


find_lesson = partial(errand_lesson, sighted=True)


def little_world(rng, pieces=(), towns=8, links=5, alike=1):
    """A world of a few towns, invented for one lesson. Each town is linked to others by `links` relations, whose names
    may be invented, too. The first `alike` towns share colour and shape."""
    known, noun = ["region", *data.TOWN_LINKS, *data.REGION_LINKS, *(r for r in data.VALUES if r != "towers")], rng.choice(("shield", "shield", "flag", "badge"))
    relations = [fresh_relation(rng, r, pieces) for r in rng.sample(known, links + 2)]
    first = fresh_town(rng, noun=noun).arms
    world = {e.name: e for e in (fresh_town(rng, 0, pieces, noun, **dict(outline=first.outline, tincture=first.tincture) if k < alike else {}) for k in range(towns))}
    for e in world.values():
        linked = {r: rng.choice([n for n in world if n != e.name]) for r in relations[:links]}
        e.facts.update(linked | {r: strange_text(rng, pieces) or rng.choice(list(data.VALUES.values()))(rng) for r in relations[links:]} | {"towers": data.VALUES["towers"](rng)})
    return data.World("little", noun, world, {"train": list(world)})


def tools_answer(world, scene, turn, rng):
    """The simulated observation of a turn. A search: two passages, first the fact in the query. A gaze, or a glance at
    a single object: two hits, first that object. A gaze at bare wall, or a glance at several objects: two hits, first a
    random entity that is not on the wall."""
    if turn.kind == "answer":
        return ""
    if turn.kind == "search":
        facts = [(e.name, r, v) for e in world.entities.values() for r, v in e.facts.items()]
        asked = next(f for f in facts if f"{f[0]} {f[1]}" == turn.argument)
        # the second passage names the same town
        return worded(rng, asked, rng.choice([f for f in facts if f != asked and asked[0] in (f[0], f[2])]))
    under = [len(scene.boxes) == 1 if turn.kind == "glance" else data.iou(turn.argument, box) > 0.1 for box in scene.boxes]
    hit = scene.entities[under.index(True)] if True in under else rng.choice([e for e in world.entities.values() if e not in scene.entities])
    return hit_list(rng, (hit, rng.choice([e for e in world.entities.values() if e is not hit])))


def decide_lesson(env, rng, decisions=9):
    """Verdicts only: do two descriptions match, is one number larger? Each teaches one bit, so there must be many."""
    t = new_lesson(env)
    for _ in range(decisions):
        (a, b), (wanted, seen, _) = rng.sample(range(100), 2), compared(rng, fresh_town(rng), rng.choice(list(COMPARED)))
        text = f"{a} more than {b}: {'yes' if a > b else 'no'}" if rng.random() < 0.3 else gog.compare_aloud(wanted.split(", ")[-1], seen.split(", ")[-1])
        question, _, verdict = text.rpartition(" ")
        t.observe(env.v.encode(question)), t.act(env.v.encode_turn(f" {verdict}"))
    return t


def show(env, t, query, text, seen=None):
    """Append a query and its observation, neither of them trained. `seen`: the crop of a gaze."""
    t.observe(env.v.encode(query))
    env.reply(t, text, seen)


# How often each lesson is drawn, relative to the others. LATER replaces some of these weights after 40 % of the batches
# (`schooling`)
LESSONS = {point_lesson: 0.17, wall_lesson: 0.31, find_lesson: 0.04, count_lesson: 0.05, crop_lesson: 0.17, text_lesson: 0.18, errand_lesson: 0.12, plan_lesson: 0.15, decide_lesson: 0.08}
LATER = {wall_lesson: 0.55, find_lesson: 0.07, count_lesson: 0.3, crop_lesson: 0.28, text_lesson: 0.14, errand_lesson: 0.1, decide_lesson: 0.03}


def exam(policy, env, n, seed="exam"):
    """Examine the base model on about n held-out lessons, one greedy answer each (lessons that have no topic are left
    out): {topic: (score, count)}. `iou KIND`: mean IoU of pointing by that kind of expression. Every other topic: share
    of exact answers."""
    rng, scores, makers = random.Random(seed), {}, (wall_lesson, count_lesson, crop_lesson, text_lesson)
    for done in tqdm(range(0, n, 256), desc="exam", leave=False):
        examined = [t for make in rng.choices(makers, (5, 1, 2, 3), k=min(n - done, 256)) if (t := make(env, rng, 1)).lesson and t.lesson[0][0]]
        for t, turn in zip(examined, examined and gog.respond(policy, env, [t.ids[:t.trained.index(True)] for t in examined], [p for t in examined for p in t.pictures])):
            topic, wanted = t.lesson[0][0], parse(t.lesson[0][1])
            scores.setdefault(topic, []).append(data.iou(turn.argument, wanted.argument) if topic[:3] == "iou" and turn.kind == "gaze" else float((turn.kind, turn.argument) == (wanted.kind, wanted.argument)))
    return {k: (sum(v) / len(v), len(v)) for k, v in sorted(scores.items())}


def replay(env, seed, size, i):
    """Lessons mixed into SFT batch i, of skills that demonstrations alone would make the policy forget: gazing on
    crowded walls (demonstrations only count there), lists of look-alikes, errands, strange texts. Most errands have at
    most three relations, so that SFT leaves something to RL. With errands of at most two relations, no longer chain was
    ever answered, and RL had nothing to reinforce; a few of up to five give it its start (results/trials.md)."""
    sighted = {wall_lesson: 1.5, find_lesson: 0.5} if env.may_gaze else {}
    return lessons(env, seed, size, i, sighted | {partial(errand_lesson, hops=2): 1, partial(errand_lesson, hops=3): 1, errand_lesson: 0.2, text_lesson: 2}, "replay")


def schooling(env, seed, size, steps, i):
    """Batch i of the base model's `steps` batches of lessons. The first 40 % use LESSONS. By then reading, planning and
    deciding are learnt, and LATER shifts the weight to walls, crops and counting. Counting comes late, because it is
    learnt only by a model that can point, and pointing at several objects takes much practice (results/trials.md)."""
    return lessons(env, seed, size, i, LESSONS | (LATER if i >= 0.4 * steps else {}))


def lessons(env, seed, size, i, weights=LESSONS, stream="lessons"):
    """Batch i of a stream of lessons. Depends on (seed, i) only, so a resumed run sees what an unbroken one would have
    seen. Each lesson has its own random generator; of several processes, each makes its share."""
    makers = random.Random(f"{stream}/{seed}/{i}").choices(list(weights), weights.values(), k=size)
    return [make(env, random.Random(f"{stream}/{seed}/{i}/{k}")) for k, make in share([*enumerate(makers)])]
