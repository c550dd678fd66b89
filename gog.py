"""Glance-or-Gaze: a policy's batched rollout, the expert that shows how it is done, scoring and evaluation, one question about one picture.

One whole trajectory (the protocol of its turns is tools.py's):
    What is the river of the twin of the leftmost shield?
    <think> look at red round</think><gaze> 3 36 30 63</gaze>
        [crop] 97 Brenna: red round, gold bend, 2 white crowns | 84 Old Vosk: red round, gold bend, 2 white rings
    <think> want red round, see red round: yes, Brenna, for the river of the twin</think><search> Brenna twin</search>
        In Brenna the twin is Karvel Ost. | Dröse has one twin: Brenna.
    <think> twin is Karvel Ost, for the river</think><search> Karvel Ost river</search>
        As for Karvel Ost, its river is Ilm. | In Karvel Ost the ruler is Te Gal IV.
    <think> river is Ilm</think><answer> Ilm</answer>
The first thought always names the look of the shield that is meant, also where the question only says where it hangs: a hit is compared
with that. Had the crop shown a blue square: <think> want red round, see blue square: no, look at red round</think><gaze> ...

From the paper: Selective Gaze (the policy chooses at each turn: the whole picture, or a part of it); reflection after a wrong gaze; six
benchmarks, two in-domain and four out of it; full-search, direct and no-gaze baselines.
Here instead: a program as the expert, where the paper filters a strong model's trajectories.

Reading order: rollout -> the expert, and chance -> evaluation -> tables and curves -> what there is to look at: pictures, reports, one
question.
"""
import argparse
import base64
import io
import itertools
import json
import random
import re
import sys
import textwrap
from collections import Counter
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
from model import Cache, CheckpointError, gathered, load, pick, share
from tools import ACTIONS, PASSAGES, Environment, Turn, atomic, on_grey, make_toolbox, normalise, parse, to_array, to_pixels, unaccented

MAX_TURNS, TURN_TOKENS = 8, 90  # a gaze, five searches and the answer are seven turns: one is left for a look in vain
# where no hit scores so much, the picture probably shows nothing that the index knows. Look-alikes score more, too (careful crops of what
# the index knows: 82 or more in 99 of 100; of flags that it lacks: below 75 in half)
KNOWN = 75
FREE = [ACTIONS] * MAX_TURNS  # the schedule of a policy that may do what it wants

# -------------------------------------------------------------------------------------------------------------- rollout

@torch.no_grad()
def rollout(policy, env, questions, group=1, temperature=1.0, schedule=FREE, generator=None, rows=256, room=832, progress=None):
    """Let the policy answer questions: list of Q * group trajectories, a question's group side by side.
    schedule: the actions allowed, turn by turn; at its end a trajectory ends, too. rows: batch size. room: tokens a trajectory may have (the
    longest demonstrations have some 600); the next turn must fit in, or it ends. generator: torch.Generator on the policy's device.
    """
    mine, out, per_batch = share(questions), [], max(1, rows // group)
    for start in tqdm(range(0, len(mine), per_batch), desc=progress, unit="batch", leave=False, disable=progress is None):
        out += _rollout_batch(policy, env, mine[start:start + per_batch], group, temperature, schedule, generator, room)
    return [t for side_by_side in gathered([out[i:i + group] for i in range(0, len(out), group)]) for t in side_by_side]


def _rollout_batch(policy, env, questions, group, temperature, schedule, generator, room):
    """Read the prompts once, copy the cache for every rollout of a group, then turn by turn: sample, run the tools, read what they answer.
    A trajectory leaves the batch at an answer, at a turn of TURN_TOKENS tokens without <stop>, or where another turn would not fit into
    `room`."""
    walls = [q.scene.picture() for q in questions]
    shrunk = [to_array(w, env.side) for w in walls]
    cache = Cache(policy.config, len(questions), room, policy.device, policy.embed_tokens.weight.dtype)
    trajectories = [env.prompt(q, g) for q, g in zip(questions, shrunk) for _ in range(group)]
    hidden = _feed(policy, env, cache, [t.ids for t in trajectories[::group]], shrunk)
    repeat = torch.arange(len(questions), device=policy.device).repeat_interleave(group)  # the prompt is read once for the whole group
    cache, hidden = (cache.take(repeat) if group > 1 else cache), hidden[repeat]
    live, walls = list(trajectories), [w for w in walls for _ in range(group)]
    for turn, actions in enumerate(schedule, 1):
        allowed = _allowed(env, actions, policy.device)
        sampled = _sample_turn(policy, env.v, cache, hidden, temperature, allowed, generator)
        for t, (ids, logprobs) in zip(live, sampled):
            t.act(ids, logprobs)
        # where the next chunk begins: <stop> has been sampled, but not yet read into the cache
        stop, unread = env.v.id["<stop>"], [len(t.ids) - 1 for t in live]
        turns = [parse(env.v.decode(ids[:-1])) if ids[-1] == stop else Turn("malformed", "the turn is too long") for ids, _ in sampled]
        env.step(live, turns, walls)
        keep = [i for i, (t, (ids, _)) in enumerate(zip(live, sampled)) if t.answer is None and ids[-1] == stop and len(t.ids) + TURN_TOKENS < room]
        if not keep or turn == len(schedule):
            break
        if len(keep) < len(live):
            cache = cache.take(torch.tensor(keep, device=policy.device))
        new = [live[i].ids[unread[i]:] for i in keep]
        live, walls = [live[i] for i in keep], [walls[i] for i in keep]
        hidden = _feed(policy, env, cache, new, [t.pictures[-1] for t, ids in zip(live, new) if env.image_ids[0] in ids])  # crops of gazes
    return trajectories


def _feed(policy, env, cache, chunks, pictures):
    """Read one ragged chunk of ids a row into the cache; hidden state of each row's last token, (B, D)."""
    lengths = torch.tensor([len(c) for c in chunks], device=policy.device)
    ids = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, chunks)), batch_first=True, padding_value=env.v.id["<pad>"]).to(policy.device)
    pictures = torch.from_numpy(np.stack(pictures)).to(policy.device) if pictures else None
    hidden = policy(ids, pictures, env.image_ids[0], cache, valid=lengths)  # so many of each row are real, the rest is padding
    return hidden[torch.arange(len(chunks), device=policy.device), lengths - 1]


def _allowed(env, actions, device):
    """(1, vocab) mask of what may be sampled: never observation, image or padding ids; only these actions' tags."""
    barred = {env.v.id[f"<{a}>"] for a in ACTIONS if a not in actions}
    return torch.tensor([[may and i not in barred for i, may in enumerate(env.sampleable)]], device=device)


def _sample_turn(policy, v, cache, hidden, temperature, allowed, generator):
    """Sample one turn for every row: list of (ids, logprobs), stop token included. A row that has stopped is still fed, but its length
    stays, so its next real token overwrites that slot; when more than half have stopped, the others go on in a smaller cache."""
    out, rows, part = [([], []) for _ in hidden], torch.arange(len(hidden), device=hidden.device), cache
    live = torch.ones_like(rows, dtype=torch.bool)
    for step in range(1, TURN_TOKENS + 1):
        token, logp = pick(policy.logits(hidden), temperature, allowed, generator)
        for row, i, p in zip(rows[live].tolist(), token[live].tolist(), logp[live].tolist()):
            out[row][0].append(i), out[row][1].append(p)
        live = live & (token != v.id["<stop>"])
        if step == TURN_TOKENS or not live.any():
            break
        hidden = policy(token[:, None], cache=part, valid=live.long())[:, 0]
        if 2 * live.sum() < len(live):  # in a smaller cache, which is written back when they are done
            part is cache or cache.put(rows, part)
            rows, hidden, live = rows[live], hidden[live], live[live]
            part = cache.take(rows)
    part is cache or cache.put(rows, part)
    return out


@torch.no_grad()
def respond(policy, env, prompts, pictures):
    """One greedy turn to each prompt (list of ids), all at once: parsed turns. `pictures`: of all prompts, in order."""
    cache = Cache(policy.config, len(prompts), max(map(len, prompts)) + TURN_TOKENS, policy.device, policy.embed_tokens.weight.dtype)
    sampled = _sample_turn(policy, env.v, cache, _feed(policy, env, cache, prompts, pictures), 0.0, _allowed(env, ACTIONS, policy.device), None)
    return [parse(env.v.decode(ids[:-1])) for ids, _ in sampled]


# ------------------------------------------------------------------------------------------ scripts: the expert and chance

class Slip(str):
    """A turn with a mistake in it: it is acted out, to show how one recovers from it, but its tokens are not trained."""


def expert(q, rng, wrong_gaze=0.0, missed=None):
    """The demonstrator, a generator: yields the text of a turn, is sent the observation. It knows boxes, looks and plan, but reads every
    name and fact from the tools. Its thoughts are its memory: what is still to be looked up (in the question's own order, the next step
    last), and what was found of the first of two. After each look it states what it wants and what it sees, and goes on where they differ.
    missed: {target: (look that the base model named, box that it chose)}, where its own gaze missed (grpo.misses): the expert begins with this
    very mistake, then recovers. wrong_gaze: if there is none, the chance of an invented one, at another object or at bare wall. Where
    several hang, a useless glance comes first with a quarter of that chance. All three are slips.
    """
    if q.search_free:
        yield (count_aloud(q.scene, q.text.split()[-1].strip("?")) if q.kind == "count" else
               f"<think> {look_thought(q.scene, q.targets[0], q.pointed_by[0], q.phrases[0])}</think><answer> {q.answers[0]}</answer>")
        return
    names, values, thought, memory = [], [], "", ""
    for target, phrase, kind in zip(q.targets, q.phrases, q.pointed_by):
        name, thought = yield from _find(q, target, phrase, kind, rng, (missed or {}).get(target), wrong_gaze, thought, memory)
        if not name:
            return  # the tools did not find it, or found what the base model's mistake looks like: grpo.instruct drops this demonstration
        value = name
        for k, relation in enumerate(q.chain):
            # the name first: it is copied from its first token on, and that is found more surely right behind <search> (results/trials.md)
            query = f"<search> {value} {relation}</search>"
            obs = yield from _try(f"<think> {thought}</think>{query}", query)
            value = _read(obs, value, relation)
            if not value:
                return
            thought = with_commas(f"{relation} is {value}", plan(q.chain[k + 1:]), memory)
        names.append(name), values.append(value)
        memory = f"{names[0]} {values[0]}"
    if q.kind == "compare":
        first = int(values[0]) > int(values[1])
        thought = with_commas(thought, f"{values[0]} more than {values[1]}: {'yes' if first else 'no'}")
        values = [names[not first]]
    yield f"<think> {thought}</think><answer> {values[-1]}</answer>"


def _find(q, target, phrase, kind, rng, missed_here, wrong_gaze, thought, memory):
    """The expert's looks at one target, slips among them, until a hit fits what is wanted: returns (its name or None, what to think next).
    phrase: the true look, of a look-alike (kind "detail") its detail, too; kind: how the question points; missed_here: (look, box) of the base
    model's own mistake, or None; thought: the end of the last thought; memory: what was found of the first of two. Of look-alikes every box
    is tried in turn: looks in vain, but no slips."""
    looks, boxes = [e.look for e in q.scene.entities], q.scene.boxes
    if kind not in ("look", "colour", "detail") and (also := also_looks(q.scene.entities[target])):
        phrase = rng.choice([phrase, *also])  # the question names no colour, so any will do
    alike, others = ([b for b, l in zip(boxes, looks) if (l == looks[target]) == same] for same in (True, False))
    places = ["glance"] if len(looks) == 1 else left_to_right(alike) if kind == "detail" else [boxes[target]]
    # (the look that the thought names, where to look, is it a slip?); it is the true look but in the base model's own mistake
    tries = [(phrase, place, False) for place in places]
    elsewhere = [b for b in (rng.choice(others or [None]), _bare_wall(boxes, rng)) if b]
    if missed_here:
        tries = [(*missed_here, True), *tries]
    elif elsewhere and rng.random() < wrong_gaze:
        tries.insert(rng.randrange(len(tries)), (phrase, rng.choice(elsewhere), True))
    if len(looks) > 1 and rng.random() < wrong_gaze / 4:
        tries = [(phrase, "glance", True), *tries]
    for k, (named, place, slipped) in enumerate(tries):
        sentence, action = look_thought(q.scene, target, kind, named), "<glance></glance>" if place == "glance" else gaze(place)
        left = [place] + [p for _, p, slip in tries[k + 1:] if not slip] if kind == "detail" and place != "glance" else []
        turn = f"<think> {with_commas(thought, memory, sentence)}{spots(left)}</think>{action}"
        obs = yield from _try(Slip(turn) if slipped else turn, action)
        # a hit is compared with one word where the question gives only that ("the round shield"), else with the look that was named
        wanted = must_match(kind, phrase) if kind in ("colour", "shape") else named
        name, seen = _best_hit(obs, wanted, kind)
        thought = compare_aloud(wanted, seen)
        if name:
            break
    # `named` is not `phrase` only in the base model's own mistake: a hit that fits it is a stranger, so no name. (A stranger that fits
    # `phrase` leads to a wrong answer. grpo.instruct drops both.)
    return (name if named == phrase else None), with_commas(thought, name, plan(q.chain), memory)


def _bare_wall(boxes, rng):
    """A box where nothing hangs, as one who mixes up two objects sees it: the columns of one, the rows of another. None if the lot fell
    badly."""
    (x0, _, x1, _), (_, y0, _, y1) = rng.choice(boxes), rng.choice(boxes)
    return (x0, y0, x1, y1) if all(data.iou((x0, y0, x1, y1), b) < 0.2 for b in boxes) else None


def plan(chain):
    """What is still to be looked up, in the question's own words, the next step last. It is said once the thing is found, and after every
    search again, less what has been found: to copy a list and stop one earlier is easier than to turn it round (results/trials.md)."""
    return f"for the {' of the '.join(reversed(chain))}" if chain else ""


def with_commas(*parts):
    """Parts of a thought, those that there are, with commas between."""
    return ", ".join(filter(None, parts))


def gaze(box):
    return "<gaze> {} {} {} {}</gaze>".format(*box)


def left_to_right(boxes):
    """Boxes column by column, each from top to bottom: their left edges alone would order a column by its jitter, which nobody can
    learn."""
    ordered = sorted(boxes, key=lambda b: b[0] + b[2])
    # a new one where centres are 8 apart
    columns = itertools.accumulate(b[0] + b[2] - a[0] - a[2] > 16 for a, b in zip(ordered[:1] + ordered, ordered))
    return [b for _, _, b in sorted((column, b[1], b) for column, b in zip(columns, ordered))]


def spots(boxes):
    """Where look-alikes hang that are still to be looked at, the next last, as in `plan`: every thought drops one, so that nobody looks
    there twice."""
    return " at " + ", ".join(f"{(x0 + x1) // 2} {(y0 + y1) // 2}" for x0, y0, x1, y1 in reversed(boxes)) if boxes else ""


def must_match(kind, phrase):
    """The words that a hit must match: asked for "the round shield" only "round", as the colour in the thought is a guess; asked for "the
    red shield" only "red"; else the whole phrase."""
    return phrase.split()[0] if kind == "colour" else phrase.split()[-1] if kind == "shape" else phrase


def also_looks(e):
    """A flag has several colours, and nobody can say which of them strikes the eye from afar: its look by those that its caption does not
    begin with."""
    return [f"{colour} {e.look.split()[1]}" for colour in e.detail.split(" and ") if colour in data.TINCTURES]


def look_thought(scene, i, kind, phrase):
    """What to think before a look at object i. Its look comes last, right before the gaze: with as little as a plan between the two, gazes went
    astray (results/trials.md). By its shape: that shape first, or its colour would be named before the shape has been read. By its
    neighbour it is found in two steps: where does that one hang, and what is beside it?"""
    look, _, detail = phrase.partition(", ")
    if kind != "neighbour":
        return with_commas(detail, look.split()[-1] if kind == "shape" else "", f"look at {look}")
    looks = [e.look for e in scene.entities]
    side, j = data.beside(looks, data.layout(scene)[i])
    return f"{looks[j]}{spots([scene.boxes[j]])}, {side} it {look}"


def compare_aloud(wanted, seen):
    """What to think about what was found: part by part (look, then detail), up to the first that differs. Five words at once are too much
    for a small model: of look-alikes that differ in one of them some kind, by luck of the run, went unnoticed nearly always
    (results/trials.md)."""
    pairs = list(zip(wanted.split(", "), seen.split(", ")))
    differ = next((i for i, (w, s) in enumerate(pairs) if w != s), len(pairs) - 1)
    return ", ".join(f"want {w}, see {s}: {'yes' if w == s else 'no'}" for w, s in pairs[:differ + 1])


def count_aloud(scene, colour):
    """Tell where what is to be counted hangs, then say how many: a small model counts what it has written."""
    boxes = left_to_right([box for box, e in zip(scene.boxes, scene.entities) if e.look.split()[0] == colour])
    return f"<think> {colour}{spots(boxes)}</think><answer> {len(boxes)}</answer>"


def _try(turn, action, patience=3):
    """Take a turn; while the tool fails, take the action again."""
    obs = yield turn
    while obs == "search failed" and (patience := patience - 1):
        obs = yield type(turn)(f"<think> failed, again</think>{action}")
    return obs


def _best_hit(obs, phrase, kind):
    """(name, what the best hit shows): name is None if the hit does not fit the phrase. What it shows is cut to what the phrase tells:
    colour, shape, look (of a flag: by any of its colours), or look and detail."""
    name, _, blazon = (obs or "").split(" | ")[0].partition(": ")
    look, *_, detail = blazon.split(", ") if ", " in blazon else (blazon, "")
    if phrase.split()[0] in detail.split(" and ") and "," not in phrase:  # "gold banner, red and green" is a red banner, too
        look = " ".join([phrase.split()[0], *look.split()[1:]])
    seen = f"{look}, {detail}" if "," in phrase else must_match(kind, look) if look else ""
    return (name.split(" ", 1)[-1] if seen == phrase else None), seen


def _read(obs, name, relation):
    """The value that one of the passages gives for (name, relation), by the wordings in PASSAGES; None if there is none."""
    patterns = [re.escape(form).replace(r"\{v\}", "(.+)").replace(r"\{n\}", re.escape(name)).replace(r"\{r\}", re.escape(relation)) for form in PASSAGES]
    return next((match[1] for passage in (obs or "").split(" | ") for pattern in patterns if (match := re.fullmatch(pattern, passage))), None)


def chance(q, rng, words):
    """The random baseline: actions by lot, with arguments by lot; `words` are possible answers."""
    while True:
        action, word, x0, y0 = rng.choice(ACTIONS), rng.choice(words), rng.randint(0, 80), rng.randint(0, 80)
        argument = {"answer": word, "search": word, "glance": "", "gaze": f"{x0} {y0} {rng.randint(x0 + 5, 99)} {rng.randint(y0 + 5, 99)}"}[action]
        yield f"<{action}> {argument}</{action}>"


def play_scripts(env, questions, scripts, rows=256, progress=None):
    """Run scripts (generators of turn texts) through the same environment as a policy: one trajectory a question."""
    out = []
    for start in tqdm(range(0, len(questions), rows), desc=progress, leave=False, disable=progress is None):
        walls = [q.scene.picture() for q in questions[start:start + rows]]
        batch = [env.prompt(q, to_array(w, env.side)) for q, w in zip(questions[start:start + rows], walls)]
        out += batch
        live = [(t, script, wall, next(script)) for t, script, wall in zip(batch, scripts[start:start + rows], walls)]
        for _ in range(MAX_TURNS):
            for t, _, _, text in live:
                (t.observe if isinstance(text, Slip) else t.act)(env.v.encode_turn(text) + [env.v.id["<stop>"]])
            env.step([t for t, *_ in live], [parse(text) for *_, text in live], [wall for *_, wall, _ in live])
            live = [(t, script, wall, text) for t, script, wall, _ in live if t.answer is None and (text := next_turn(script, t.turns[-1].observation))]
    return out


def next_turn(script, observation):
    """The script's next turn, or None when it has no more."""
    with suppress(StopIteration):
        return script.send(observation)


# ------------------------------------------------------------------------------------------------------------ evaluation

SUITES = {  # the six held-out suites, as (kind, setting, weight): what each isolates (the paper's benchmark that it stands for)
    # FVQA
    "facts": [("hop1", "normal", 5), ("name", "normal", 2), ("colour", "normal", 1), ("shape", "normal", 1), ("count", "normal", 1)],
    "fine": [("name", "small", 1), ("hop1", "small", 1)],  # InfoSeek: small target among look-alikes
    # SimpleVQA
    "plain": [("name", "single", 2), ("hop1", "single", 3), ("colour", "single", 1), ("shape", "normal", 2), ("count", "normal", 2)],
    # MMSearch: more and smaller objects than any demonstration searches among (lessons in pointing know them, demonstrations count them; RL
    # asks two parts of 18, of the training split)
    "crowd": [("name", "crowd", 1), ("hop1", "crowd", 2)],
    "live": [("hop1", "normal", 3), ("hop2", "normal", 1)],  # LiveVQA: facts rewritten, entities added after training
    # DynVQA: more hops than any demonstration shows (lessons without pictures do; RL asks such, of the training split: data.RL_MIX)
    "hops": [("hop4", "normal", 3), ("hop5", "normal", 1)]}
# the mixes of all suites, each as heavy as the others
DEV_MIX = [(kind, setting, weight / sum(w for *_, w in mix)) for mix in SUITES.values() for kind, setting, weight in mix]


def suite(world, name, n=300):
    """A held-out suite: (world to search in, questions)."""
    searched = aged(world) if name == "live" else world
    return searched, data.questions(searched, SUITES[name], n, f"suite/{name}", ("test", "late") if name == "live" else ("test",))


def aged(world):
    """The same world some time after training: among test and late entities the values of every fact have been dealt anew."""
    rng, entities = random.Random(f"{world.seed}/aged"), dict(world.entities)
    names = world.splits["test"] + world.splits["late"]
    for relation in sorted({r for n in names for r in entities[n].facts}):
        holders = [n for n in names if relation in entities[n].facts]
        values = rng.sample([world.entities[n].facts[relation] for n in holders], len(holders))
        entities |= {n: replace(entities[n], facts={**entities[n].facts, relation: v}) for n, v in zip(holders, values) if v != n}
    return replace(world, entities=entities)


SCHEDULES = {  # baselines that need no other model: which actions a turn allows
    "direct": [("answer",)], "full-search": [("glance",), ("search",), ("answer",)], "no-gaze": [("answer", "search", "glance")] * MAX_TURNS}


def overlap(t, box):
    """Best IoU of a box with a target of a trajectory's question."""
    return max((data.iou(box, t.question.scene.boxes[i]) for i in t.question.targets), default=0.0)


def gazes(t):
    """(box, best IoU with a target) of every gaze of a trajectory."""
    return [(turn.argument, overlap(t, turn.argument)) for turn in t.turns if turn.kind == "gaze"]


def looked_elsewhere(t):
    """For every gaze that missed (IoU < 0.5): True if the next action is a gaze elsewhere (IoU with the missed box < 0.5)."""
    return [after.kind == "gaze" and data.iou(after.argument, turn.argument) < 0.5 for turn, after in zip(t.turns, [*t.turns[1:], Turn("answer")])
            if turn.kind == "gaze" and overlap(t, turn.argument) < 0.5]


def behaviour(trajectories):
    """What a policy does: {metric: value}, over a list of trajectories. Shares are 0..1, of trajectories or (action_share) of turns.
    no / single / mixed_search: none, one kind or several kinds of tool; gaze_correct: gazes with IoU >= 0.5 with a target; target_found: some
    gaze of the trajectory had (of questions that need a tool, about more than one object); reflection: vain gazes that a gaze elsewhere
    follows; truncated: ended without an answer.
    """
    mean = lambda values: float(np.mean(values)) if len(values) else float("nan")
    kinds = [{t.kind for t in x.turns} & {"search", "glance", "gaze"} for x in trajectories]
    looked = [g for x in trajectories if x.question.targets for g in gazes(x)]
    vain = [again for x in trajectories if x.question.targets for again in looked_elsewhere(x)]
    acts = Counter(t.kind for x in trajectories for t in x.turns)
    found = [any(u >= 0.5 for _, u in gazes(x)) for x in trajectories if x.question.targets and not x.question.search_free and len(x.question.scene.boxes) > 1]
    return {"accuracy": mean([x.correct for x in trajectories]), "well_formed": mean([x.well_formed for x in trajectories]),
            "no_search": mean([not k for k in kinds]), "single_search": mean([len(k) == 1 for k in kinds]),
            "mixed_search": mean([len(k) > 1 for k in kinds]), **{f"{a}_share": acts[a] / max(1, sum(acts.values())) for a in (*ACTIONS, "malformed")},
            "gaze_correct": mean([u >= 0.5 for _, u in looked]), "gaze_iou": mean([u for _, u in looked]), "target_found": mean(found),
            "reflection": mean(vain), "turns": mean([len(x.turns) for x in trajectories]), "tool_calls": sum(acts[a] for a in ACTIONS[1:]) / max(1, len(trajectories)),
            "tokens": mean([sum(x.trained) for x in trajectories]), "truncated": mean([x.answer is None for x in trajectories])}


SIZES = {"small": (0, 4), "medium": (4, 9), "large": (9, 100)}  # of a target: percent of the picture's area, above and up to


def by_size(trajectories):
    """Accuracy by the size of the (first) target, of questions that need a tool: {metric: (value, number of questions)}."""
    tries = [(t.question.scene.boxes[t.question.targets[0]], t.correct) for t in trajectories if t.question.targets and not t.question.search_free]
    areas = [((x1 - x0) * (y1 - y0) / 100, right) for (x0, y0, x1, y1), right in tries]
    sized = {size: [right for area, right in areas if low < area <= high] for size, (low, high) in SIZES.items()}
    return {f"accuracy_{size}": (float(np.mean(right)), len(right)) for size, right in sized.items() if right}


def evaluate(policy, env, questions, row="", seed=0, turns=MAX_TURNS, progress=None):
    """Greedy trajectories of one row of the main table (default: no baseline), at most so many turns (of a row without a schedule);
    `policy` may be None for oracle and random."""
    rng = random.Random(f"{row}/{seed}")
    if row in ("oracle", "random"):
        words = sorted({a for q in questions for a in q.answers})  # possible answers
        return play_scripts(env, questions, [expert(q, rng) if row == "oracle" else chance(q, rng, words) for q in questions], progress=progress)
    # a whole suite at once
    return rollout(policy, env, questions, 1, 0.0, schedule=SCHEDULES.get(row, [ACTIONS] * turns), rows=320, progress=progress)


# ----------------------------------------------------------------------------------------------------- tables and curves

def accuracy_table(table):
    """Accuracy in percent: the suites, their mean and, where there are such, a user's own questions; of each row its name and values."""
    accuracy = {(r["row"], r["suite"]): 100 * float(r["value"]) for r in table if r["metric"] == "accuracy"}
    suites = [s for s in SUITES if any(s == suite for _, suite in accuracy)]
    rows, own = [[row, *(accuracy[row, s] for s in suites)] for row in dict.fromkeys(r["row"] for r in table)], ["own"] * any(s == "own" for _, s in accuracy)
    return dict(columns=[*suites, "mean", *own], rows=[[*row, sum(row[1:]) / max(1, len(suites)), *(accuracy.get((row[0], s)) for s in own)] for row in rows])


STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # 97.5 % quantile, by number of seeds


def pooled(measured, row, size):
    """Accuracy in percent where the target has one of SIZES, of all suites together: mean of the seeds in `measured` (rows of results.csv);
    "" where there is none."""
    seeds = {}
    for r in (r for r in measured if (r["row"], r["metric"]) == (row, f"accuracy_{size}")):
        seeds.setdefault(r["seed"], []).append((float(r["value"]), int(r["n"])))
    return f"{100 * np.mean([np.average(values, weights=n) for values, n in (zip(*of) for of in seeds.values())]):.1f}" if seeds else ""


def grid_tables(tables, measured, paper):
    """Markdown of {table: its rows}: accuracy in percent, the mean of the seeds in `measured` (rows of results.csv) +- half of its 95 %
    interval, beside the paper's mean. The last column compares with the SFT policy of the same seed: base models differ more from seed to
    seed than most rows from each other."""
    accuracy = {(r["row"], r["seed"], r["suite"]): (float(r["value"]), int(r["n"])) for r in measured if r["metric"] == "accuracy"}
    suites = [s for s in SUITES if any(s == suite for *_, suite in accuracy)]
    text = ("Accuracy in percent, mean of the seeds +- half of the 95 % interval: over seeds (Student), or, where there is one seed, over questions (binomial). Over SFT: the mean "
            "less that of the SFT policy of the same seed. Small, medium, large: questions that need a tool and whose target fills up to 4 %, up to 9 %, or more of the picture, all "
            "suites together. Empty: not measured yet.\n")
    # (seeds, suites, 2) -> two of (seeds, suites)
    cells = lambda row, seeds: np.array([[accuracy[row, s, suite] for suite in suites] for s in seeds]).transpose(2, 0, 1)
    for name, rows in tables.items():
        text += f"\n## {name}\n\n| row | paper, mean | {' | '.join(suites)} | mean | over SFT | {' | '.join(SIZES)} | seeds |\n" + "|---" * (len(suites) + 8) + "|\n"
        for row in rows:
            seeds = [s for s in sorted({s for r, s, _ in accuracy if r == row}) if all((x, s, suite) in accuracy for x in (row, "sft") for suite in suites)]
            shown = [""] * (len(suites) + 2)
            if seeds:
                (p, n), (q, _) = cells(row, seeds), cells("sft", seeds)
                # (seeds, suites + 2), two of (suites,)
                every, v, w = np.column_stack([p, p.mean(1), (p - q).mean(1)]), *((x * (1 - x) / n)[0] for x in (p, q))
                half = STUDENT.get(len(seeds), 2.26) * every.std(0, ddof=1) / len(seeds) ** 0.5 if seeds[1:] else 1.96 * np.array([*v, v.mean() / len(v), (v + w).mean() / len(v)]) ** 0.5
                shown = [f"{100 * m:.1f} +- {100 * h:.1f}" for m, h in zip(every.mean(0), half)]
            text += f"| {row} | {paper.get(row, '')} | {' | '.join(shown)} | {' | '.join(pooled(measured, row, size) for size in SIZES)} | {len(seeds)} |\n"
    return text


def curve_values(rows, columns):
    """Columns of a csv as numbers, {name: values}; None where a row has none."""
    return {c: [float(r[c]) if r.get(c) not in (None, "", "nan") else None for r in rows] for c in columns}


def curve_sheet(title, curves, across=3, w=330, h=190):
    """One panel a curve ({name: values}, `curve_values`), value by value (grey) and as a running mean (red): a picture."""
    sheet = Image.new("RGB", (across * w, -(-len(curves) // across) * h), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (name, values) in enumerate(curves.items()):
        left, top, values = i % across * w + 46, i // across * h + 26, np.array([x for x in values if x is not None])
        pen.text((left, top - 20), f"{title}: {name}", fill="black", font_size=13)
        pen.rectangle((left, top, left + w - 60, top + h - 50), outline=(200, 200, 200))
        if len(values) < 2:
            continue
        low, high = values.min(), max(values.max(), values.min() + 1e-9)
        kernel = np.ones(max(1, min(5, len(values) // 8), len(values) // 25))
        smooth = np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
        at = lambda y: list(zip(left + np.linspace(0, w - 60, len(y)), top + (h - 50) * (1 - (y - low) / (high - low))))
        pen.line(at(values), fill=(205, 205, 210))
        pen.line(at(smooth), fill=(200, 30, 50), width=2)
        for value, y in ((high, top - 4), (low, top + h - 62)):
            pen.text((left - 44, y), f"{value:.3g}", fill=(90, 90, 90), font_size=11)
        pen.text((left + w - 100, top + h - 48), f"{len(values)} values", fill=(90, 90, 90), font_size=11)
    return sheet


# -------------------------------------------------------------------- what there is to look at: pictures, reports, one question

def poster(t, width=760, line=19):
    """The picture, every gaze framed and numbered, beside the turns in words: one image to look at."""
    picture = t.question.scene.picture().copy()
    pen, thick = ImageDraw.Draw(picture), max(2, picture.width // 150)
    for n, where in enumerate((turn.argument for turn in t.turns if turn.kind == "gaze"), 1):
        x0, y0, x1, y1 = box = to_pixels(where, picture.size)
        if x1 > x0 and y1 > y0:
            pen.rectangle(box, outline=(230, 40, 60), width=thick)
            pen.rectangle((x0, y0, x0 + 9 * thick, y0 + 9 * thick), fill=(230, 40, 60))
            pen.text((x0 + 2 * thick, y0), str(n), fill=(255, 255, 255), font_size=8 * thick)
    picture.thumbnail((420, 420))
    lines = [part for text in unaccented(tell(t)).split("\n")  # Pillow's own font has no accents
             for part in textwrap.wrap(text, 96, subsequent_indent=" " * 14, drop_whitespace=False)]
    sheet = Image.new("RGB", (picture.width + width, max(picture.height, line * len(lines) + 20)), "white")
    sheet.paste(picture, (0, 0))
    for i, text in enumerate(lines):
        ImageDraw.Draw(sheet).text((picture.width + 8, 10 + line * i), text, fill=(120, 120, 125) if text.startswith(" " * 12) else (20, 20, 25), font_size=14)
    return sheet


def record(t, world, v, pictures):
    """A trajectory as report.html shows it and report.jsonl keeps it: all of it but who did it, what it was rewarded with and its advantage
    (train.report_entry adds those, r_acc less the search penalty). `pictures`: {scene or name: (its number, its size, data URI)}, to which
    those of the scene and of the hits are added; each is drawn once."""
    def add(key, what, px):  # what: a scene or an entity, px: how large
        if key not in pictures:
            picture = on_grey(what.picture(px)).copy()
            picture.thumbnail((640, 640))
            picture.save(file := io.BytesIO(), "WEBP", quality=60)
            pictures[key] = len(pictures), picture.size, "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
        return pictures[key]

    def shown(line):  # the picture of an image hit, "97 Brenna: red round, gold bend, 2 white crowns"
        entity = world.entities.get(line.split(" ", 1)[-1].partition(": ")[0])
        return add(entity.name, entity, 48)[0] if entity and entity.look and line[0].isdigit() else None

    image = v.id["<image>"]
    # a picture is many tokens
    tokens = [("[picture]" if i == image else v.decode([i]), int(own)) for i, own, before in zip(t.ids, t.trained, [None, *t.ids]) if not i == before == image]
    turns = [dict(kind=x.kind, argument=x.argument, thought=x.thought, ok=x.ok, iou=overlap(t, x.argument) if x.kind == "gaze" and t.question.targets else None,
                  found=[dict(text=line, picture=shown(line) if x.kind in ("glance", "gaze") else None) for line in x.observation.split(" | ") if line]) for x in t.turns]
    q = t.question
    scene, size, _ = add(q.scene, q.scene, data.SCENE_PX)
    return dict(question=q.text, answers=q.answers, kind=q.kind, setting=q.setting, scene=scene, size=size, targets=[q.scene.boxes[i] for i in q.targets],
                turns=turns, tokens=tokens, r_acc=int(t.correct), r_fmt=int(t.well_formed))


def write_report(path, title, about, tries, pictures, table=None, curves=None):
    """One page that needs nothing else (viewer.html, filled), and beside it the tries as jsonl. tries: `record` and what sets each apart;
    table: {columns, rows}; curves: {name: values}."""
    content = dict(title=title, about=about, table=table or dict(columns=[], rows=[]), curves=[dict(name=c, values=y) for c, y in (curves or {}).items() if y],
                pictures=[uri for *_, uri in pictures.values()], trajectories=tries)
    # no text can end the script that it stands in
    page, text = (data.Path(__file__).parent / "viewer.html").read_text(encoding="utf-8"), json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    atomic(path, lambda p: p.write_text(page.replace(">DATA<", f">{text}<"), encoding="utf-8"))
    atomic(data.Path(path).with_suffix(".jsonl"), lambda p: p.write_text("".join(json.dumps(t) + "\n" for t in tries), encoding="utf-8"))
    print(f"to look at: {path}", file=sys.stderr)


def tell(t):
    """A trajectory in words, one line a step."""
    lines = [f"  {t.question.text}" + (f"   (gold: {t.question.answers[0]})" if t.question.answers else "")]
    for turn in t.turns:
        argument = " ".join(map(str, turn.argument)) if isinstance(turn.argument, tuple) else turn.argument
        lines.append(f"    {turn.kind:<10}{argument}" + (f"      ({turn.thought})" if turn.thought else ""))
        lines += [f"            {line}" for line in turn.observation.split(" | ") if line]
    lines += [f"    do not trust this: {why}" for why in [doubts(t)] if why and not t.question.answers]
    return "\n".join(lines + ([] if t.answer is not None else ["    no answer: it ran out of turns or tokens"]))


def doubts(t):
    """What speaks against the answer of a trajectory, in words; "" where nothing does. A policy answers anyway: it has never seen a
    question without an answer."""
    # of the best hit of every look
    scores = [turn.observation.split(" ")[0] for turn in t.turns if turn.kind in ("glance", "gaze") and turn.ok]
    found = normalise(" ".join(turn.observation for turn in t.turns if turn.kind != "malformed"))
    # what can be told without a search
    seen = t.answer is None or normalise(t.answer) in (*data.TINCTURES, *data.OUTLINES, *map(str, range(20)))
    reasons = {"it ended without an answer": t.answer is None, "nothing was looked up": not found and not seen,
               "the answer stands in nothing that was found": found and f" {normalise(t.answer or '')} " not in f" {found} ",
               "the picture is like nothing that is known": scores and not any(s.isdecimal() and int(s) >= KNOWN for s in scores)}
    return ", ".join(reason for reason, holds in reasons.items() if holds)


def main():
    parser = argparse.ArgumentParser(description="Ask a trained policy about one picture.")
    parser.add_argument("image"), parser.add_argument("question", nargs="?", type=lambda text: text.encode(errors="replace").decode(), help="without it, questions are read one by one")
    parser.add_argument("--checkpoint", help="policy (default: out/WORLD-nano-0/rl.safetensors, or, until you have trained it, the one that comes with the code)")
    parser.add_argument("--world", default="heraldry", help="what to search in: heraldry, or a folder world (default: %(default)s)")
    parser.add_argument("--html", help="also write the turns as a page to look at, here"), parser.add_argument("--save", default="gaze.png", help="where the picture with the gazes goes (default: %(default)s)")
    a = parser.parse_args()
    try:
        data.check_image(a.image)
        world, asked, pictures = data.open_world(a.world), [], {}
        own, ours = data.Path(f"out/{world.name}-nano-0/rl.safetensors"), data.Path(__file__).parent / "policies" / "rl.safetensors"
        a.checkpoint = a.checkpoint or (own if own.is_file() else ours)
        print(f"policy {a.checkpoint}, world {a.world}" + (", of which it has learnt nothing" if a.checkpoint == ours and world.name != "heraldry" else ""), file=sys.stderr)
        policy, v = load(a.checkpoint)
        env = Environment(v, make_toolbox(world), policy.config)
        for question in [a.question] if a.question else iter(lambda: input("question (Enter alone: end) > ").strip(), ""):
            if (long := len(env.v.encode(question))) > 300:
                raise data.WorldError(f"the question has {long} tokens, and at most 300 leave room for turns. Ask more briefly")
            t = rollout(policy, env, [data.Question(question, (), data.Scene((), (), "picture", 0, data.Path(a.image)), "own")], temperature=0.0)[0]
            print(tell(t))
            atomic(a.save, lambda path: poster(t).save(path, format="PNG"))
            print(f"  picture with the gazes: {a.save}")
            asked.append(dict(key=str(len(asked)), suite="own", policy=str(a.checkpoint), reward=float(t.correct), advantage=None, doubts=doubts(t), **record(t, world, env.v, pictures)))
            if a.html:
                write_report(a.html, "Questions about one picture", f"{a.image}, policy {a.checkpoint}, world {a.world}", asked, pictures)
    except (EOFError, KeyboardInterrupt):
        print()
    except (CheckpointError, data.WorldError, OSError) as e:
        parser.exit(2, f"error: {e}\n")


if __name__ == "__main__":
    main()
