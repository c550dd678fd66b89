"""Glance-or-Gaze, the method: the batched rollout of a policy, the expert that writes demonstrations, the metrics and
suites, reports, and the command line that answers a question about a picture: python gog.py IMAGE QUESTION.

A whole trajectory (indented: observations; the format of turns is defined in tools.py):
    What is the river of the twin of the leftmost shield?
    <think> look at red round</think><gaze> 3 36 30 63</gaze>
        [crop] 97 Brenna: red round, gold bend, 2 white crowns | 84 Old Vosk: red round, gold bend, 2 white rings
    <think> want red, see red: yes, Brenna, for the river of the twin of the one</think><search> Brenna twin</search>
        In Brenna the twin is Karvel Ost. | Dröse has one twin: Brenna.
    <think> twin is Karvel Ost, for the river of the one</think><search> Karvel Ost river</search>
        As for Karvel Ost, its river is Ilm. | In Karvel Ost the ruler is Te Gal IV.
    <think> river is Ilm</think><answer> Ilm</answer>
The thought before a glance or gaze names the look of the target, even if the question only says where it hangs; then
only the colour of the hit is compared with it (why: `must_match`). If the crop had shown a blue square, the next turn
would look elsewhere:
    <think> want red, see blue: no, look at red round</think><gaze> ...

From the paper: Selective Gaze (in every turn the policy chooses between the whole picture and a part of it); reflection
    after a wrong gaze; six benchmarks, two in-domain and four out-of-domain; full-search, direct and no-gaze baselines.
Here instead: the expert is a program, because it knows every box and fact of the world. The paper filters trajectories
    of a strong model.

Reading order: rollout -> scripts: the expert and the random baseline -> evaluation -> tables and curves -> reports and
the command line.
"""
import argparse
import base64
import io
import itertools
import json
import random
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
from model import Cache, CheckpointError, autocast, gathered, load, pick, share
from tools import ACTIONS, PASSAGES, Environment, Turn, atomic, on_grey, make_toolbox, normalise, parse, to_array, to_pixels, unaccented

# the longest questions (hop5) take seven turns: a gaze, five searches and the answer. One is left for a missed gaze
MAX_TURNS, TURN_TOKENS = 8, 90
# If no hit reaches this score, the picture probably shows nothing that is in the index. The reverse does not hold, as
# look-alikes score high as well. Measured: careful crops of what is in the index score 82 or more in 99 of 100 cases;
# crops of flags that are not in it stay below 75 in half of the cases
KNOWN = 75
FREE = [ACTIONS] * MAX_TURNS  # the schedule without restrictions: every action in every turn

# -------------------------------------------------------------------------------------------------------------- rollout

def rollout(policy, env, questions, group=1, temperature=1.0, schedule=FREE, generator=None, rows=256, room=832, progress=None):
    """Let the policy answer questions. Returns Q * group trajectories; those of one question are adjacent.

    schedule: the actions allowed in each turn; a trajectory ends at the latest with the schedule. rows: batch size.
    room: the most tokens of a trajectory that are read (the longest demonstrations have some 600); it ends if another
    turn might not fit.
    generator: a torch.Generator on the policy's device. progress: the label of a progress bar."""
    mine, trajectories, per_batch = share(questions), [], max(1, rows // group)
    with torch.no_grad(), autocast(policy.device.type):  # rounded as in training, so that GRPO's ratio begins near 1
        for start in tqdm(range(0, len(mine), per_batch), desc=progress, unit="batch", leave=False, disable=progress is None):
            trajectories += _rollout_batch(policy, env, mine[start:start + per_batch], group, temperature, schedule, generator, room)
    return [t for one_group in gathered([trajectories[i:i + group] for i in range(0, len(trajectories), group)]) for t in one_group]


def _rollout_batch(policy, env, questions, group, temperature, schedule, generator, room):
    """One batch of `rollout`. Reads each prompt once and copies its cache for every rollout of the group. Then, turn by
    turn: sample, run the tools, read the observations.

    A trajectory leaves the batch at an answer, at a turn of TURN_TOKENS tokens without <stop>, or when another turn
    might not fit into `room`."""
    pictures = [q.scene.picture() for q in questions]
    shrunk = [to_array(picture, env.side) for picture in pictures]
    cache = Cache(policy.config, len(questions), room, policy.device)
    trajectories = [env.prompt(q, array) for q, array in zip(questions, shrunk) for _ in range(group)]
    hidden = _feed(policy, env, cache, [t.ids for t in trajectories[::group]], shrunk)
    repeat = torch.arange(len(questions), device=policy.device).repeat_interleave(group)  # one row per rollout
    cache, hidden = (cache.take(repeat) if group > 1 else cache), hidden[repeat]
    live, pictures = list(trajectories), [picture for picture in pictures for _ in range(group)]
    for turn, actions in enumerate(schedule, 1):
        allowed = _allowed(env, actions, policy.device)
        sampled = _sample_turn(policy, env.v, cache, hidden, temperature, allowed, generator)
        for t, (ids, logprobs) in zip(live, sampled):
            t.act(ids, logprobs)
        # each row's next chunk begins with <stop>, which has been sampled but not yet read into the cache
        stop, unread = env.v.id["<stop>"], [len(t.ids) - 1 for t in live]
        env.step(live, [_read_turn(env.v, ids) for ids, _ in sampled], pictures)
        keep = [i for i, (t, (ids, _)) in enumerate(zip(live, sampled)) if t.answer is None and ids[-1] == stop and len(t.ids) + TURN_TOKENS < room]
        if not keep or turn == len(schedule):
            break
        if len(keep) < len(live):
            cache = cache.take(torch.tensor(keep, device=policy.device))
        chunks = [live[i].ids[unread[i]:] for i in keep]
        live, pictures = [live[i] for i in keep], [pictures[i] for i in keep]
        # new pictures: the crops of gazes
        hidden = _feed(policy, env, cache, chunks, [t.pictures[-1] for t, ids in zip(live, chunks) if env.image_ids[0] in ids])
    return trajectories


def _feed(policy, env, cache, chunks, pictures):
    """Read one chunk of ids per row (chunks may differ in length) into the cache. Returns the hidden state of each
    row's last token, (B, D). `pictures`: the arrays that fill the chunks' image placeholders, in order."""
    lengths = torch.tensor([len(c) for c in chunks], device=policy.device)
    ids = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, chunks)), batch_first=True, padding_value=env.v.id["<pad>"]).to(policy.device)
    pictures = torch.from_numpy(np.stack(pictures)).to(policy.device) if pictures else None
    hidden = policy(ids, pictures, env.image_ids[0], cache, valid=lengths)  # valid: the rest is padding
    return hidden[torch.arange(len(chunks), device=policy.device), lengths - 1]


def _allowed(env, actions, device):
    """Mask (1, vocab) of the ids that may be sampled: no observation, image or padding ids, only tags of `actions`."""
    forbidden = {env.v.id[f"<{a}>"] for a in ACTIONS if a not in actions}
    return torch.tensor([[sampleable and i not in forbidden for i, sampleable in enumerate(env.sampleable)]], device=device)


def _sample_turn(policy, v, cache, hidden, temperature, allowed, generator):
    """Sample one turn for every row: list of (ids, logprobs), <stop> included. A row that has stopped is still fed,
    but its cache length does not grow, so its next real token overwrites that slot. When more than half of the rows
    have stopped, the others continue in a smaller cache."""
    out, rows, active = [([], []) for _ in hidden], torch.arange(len(hidden), device=hidden.device), cache
    live = torch.ones_like(rows, dtype=torch.bool)
    for step in range(1, TURN_TOKENS + 1):
        token, logp = pick(policy.logits(hidden), temperature, allowed, generator)
        for row, i, p in zip(rows[live].tolist(), token[live].tolist(), logp[live].tolist()):
            out[row][0].append(i), out[row][1].append(p)
        live = live & (token != v.id["<stop>"])
        if step == TURN_TOKENS or not live.any():
            break
        hidden = policy(token[:, None], cache=active, valid=live.long())[:, 0]
        if 2 * live.sum() < len(live):  # go on in a smaller cache, which is written back at the end
            if active is not cache: cache.put(rows, active)
            rows, hidden, live = rows[live], hidden[live], live[live]
            active = cache.take(rows)
    if active is not cache: cache.put(rows, active)  # write the smaller cache back
    return out


def _read_turn(v, ids):
    """The Turn that sampled ids spell; malformed if it does not end in <stop>."""
    return parse(v.decode(ids[:-1])) if ids[-1] == v.id["<stop>"] else Turn("malformed", "the turn is too long")


def respond(policy, env, prompts, pictures):
    """One greedy turn for each prompt (list of ids) in a single batch: list of Turn. `pictures`: the arrays of all
    prompts, in order."""
    with torch.no_grad(), autocast(policy.device.type):
        cache = Cache(policy.config, len(prompts), max(map(len, prompts)) + TURN_TOKENS, policy.device)
        hidden = _feed(policy, env, cache, prompts, pictures)
        return [_read_turn(env.v, ids) for ids, _ in _sample_turn(policy, env.v, cache, hidden, 0.0, _allowed(env, ACTIONS, policy.device), None)]


# -------------------------------------------------------------------------- scripts: the expert and the random baseline

class Slip(str):
    """A turn with a deliberate mistake. It is acted out, to show how to recover, but its tokens are not trained."""


def expert(q, rng, wrong_gaze=0.0, missed=None):
    """The demonstrator, a generator: it yields the text of a turn and is sent the observation. It knows boxes, looks
    and the chain of relations, but reads every name and fact from the tools. Its thoughts serve as memory: they hold
    the plan (`plan`: the relations still to be looked up) and, in comparisons, what was found of the first target.
    Parts of a thought, below: `look_thought` (before a glance or gaze), `spots` (places left), `compare_aloud` (after
    it). After each glance or gaze it states what it wants and what it sees, and looks elsewhere if they differ.

    Three kinds of mistakes are shown as slips:
    - missed: {target: (look that the base model named, box that it chose)} where the base model's own gaze missed
      (grpo.misses). The expert first repeats this mistake.
    - wrong_gaze: if the base model did not miss, the probability of an invented wrong gaze, at another object or bare
      wall; among look-alikes, that the target is overlooked at first, and the others are looked at in vain.
    - If the scene has several objects, a useless glance comes first with probability wrong_gaze / 4."""
    if q.search_free:
        yield (count_aloud(q.scene, q.text.split()[-1].strip("?")) if q.kind == "count" else
               f"<think> {look_thought(q.scene, q.targets[0], q.pointed_by[0], q.phrases[0])}</think><answer> {q.answers[0]}</answer>")
        return
    names, values, thought, memory = [], [], "", ""
    for target, phrase, pointed_by in zip(q.targets, q.phrases, q.pointed_by):
        name, thought = yield from _find(q, target, phrase, pointed_by, rng, (missed or {}).get(target), wrong_gaze, thought, memory)
        if not name:
            return  # nothing found, or a hit for the base model's wrong look: grpo.instruct drops this demonstration
        value = name
        for k, relation in enumerate(q.chain):
            # the name comes first: copying starts more reliably right behind <search> (results/trials.md)
            query = f"<search> {value} {relation}</search>"
            obs = yield from _try(f"<think> {thought}</think>{query}", query)
            value = _read(obs, value, relation)
            # nothing found; or, of another entity than the target, a value that cannot be compared
            if not value or q.kind == "compare" and not value.isdecimal():
                return
            thought = with_commas(f"{relation} is {value}", plan(q.chain[k + 1:]), memory)
        names.append(name), values.append(value)
        memory = f"{names[0]} {values[0]}"
    if q.kind == "compare":
        first_has_more = int(values[0]) > int(values[1])
        thought = with_commas(thought, f"{values[0]} more than {values[1]}: {'yes' if first_has_more else 'no'}")
        values = names[:1] if first_has_more else names[1:]
    yield f"<think> {thought}</think><answer> {values[-1]}</answer>"


def _find(q, target, phrase, pointed_by, rng, base_miss, wrong_gaze, thought, memory):
    """Look for one target until a hit matches. Returns (its name or None, the next thought). If the target has
    look-alikes (pointed_by "detail"), their boxes are tried in turn; those misses are trained, unless the target is
    overlooked at first: then they are slips.

    phrase: the true look of the target, with its detail if it has look-alikes. pointed_by: the kind of referring
    expression. base_miss: (look, box) of the base model's own mistake, or None. thought: how the next thought begins
    (what the last search showed; at first ""). memory: what was found of the first of two targets."""
    looks, boxes = [e.look for e in q.scene.entities], q.scene.boxes
    if pointed_by not in ("look", "colour", "detail") and (also := also_looks(q.scene.entities[target])):
        phrase = rng.choice([phrase, *also])  # the question names no colour, so any of a flag's colours will do
    alike, other_boxes = ([b for b, look in zip(boxes, looks) if (look == looks[target]) == same] for same in (True, False))
    places = ["glance"] if len(looks) == 1 else left_to_right(alike) if pointed_by == "detail" else [boxes[target]]
    # attempts: (look named in the thought, where to look, is it a slip?). The named look is wrong only when an attempt
    # repeats the base model's own mistake
    attempts, slips = [(phrase, place, False) for place in places], rng.random() < wrong_gaze
    wrong_places = [b for b in (rng.choice(other_boxes or [None]), _bare_wall(boxes, rng)) if b]
    if base_miss:
        attempts = [(*base_miss, True), *attempts]
    elif slips and pointed_by == "detail":  # the target is overlooked at first
        attempts = [(phrase, place, True) for place in places if place != boxes[target]] + [(phrase, boxes[target], False)]
    elif slips and wrong_places:
        attempts = [(phrase, rng.choice(wrong_places), True), *attempts]
    if len(looks) > 1 and rng.random() < wrong_gaze / 4:
        attempts = [(phrase, "glance", True), *attempts]
    for k, (named, place, is_slip) in enumerate(attempts):
        action = "<glance></glance>" if place == "glance" else gaze(place)
        # of look-alikes, the thought lists the places that are left; while the target is overlooked (slips), without it
        untried = [p for _, p, slip in attempts[k:] if slip == is_slip] if pointed_by == "detail" and place != "glance" else []
        turn = f"<think> {with_commas(thought, memory, look_thought(q.scene, target, pointed_by, named))}{spots(untried)}</think>{action}"
        obs = yield from _try(Slip(turn) if is_slip else turn, action)
        wanted = must_match(pointed_by, phrase if pointed_by in ("colour", "shape") else named)  # what the question says, or the thought
        name, seen = best_hit(obs, wanted, pointed_by)
        thought = compare_aloud(wanted, seen)
        if name:
            break
    # `named` differs from `phrase` only in the base model's own mistake: a hit that matches it is another entity, so
    # there is no name. (A wrong gaze at something of the wanted colour gives a wrong answer. grpo.instruct drops both.)
    return (name if named == phrase else None), with_commas(thought, name, plan(q.chain), memory)


def _bare_wall(boxes, rng):
    """A box at bare wall, as someone would choose who mixes up two objects: the columns of one, the rows of the
    other. None if the two drawn objects give a box that overlaps an object (IoU 0.2 or more)."""
    (x0, _, x1, _), (_, y0, _, y1) = rng.choice(boxes), rng.choice(boxes)
    return (x0, y0, x1, y1) if all(data.iou((x0, y0, x1, y1), b) < 0.2 for b in boxes) else None


def plan(chain):
    """What is still to be looked up, in the words of the question: the relations, the next one last, and "the one",
    which stands for what has been found: "for the river of the twin of the one"; "" if nothing is left. Stated when the
    target is found, and after every search with one relation less.

    Why this order: copying is easier than reversing. Why "the one": behind "of the" the question goes on with a
    relation or with the target, and a plan that ends before "of the" must know beforehand which. It often ended too
    early (results/trials.md)."""
    return f"for the {' of the '.join([*reversed(chain), 'one'])}" if chain else ""


def with_commas(*parts):
    """Join the parts of a thought with commas, leaving out empty ones."""
    return ", ".join(filter(None, parts))


def gaze(box):
    """The gaze action at a box, as text."""
    return "<gaze> {} {} {} {}</gaze>".format(*box)


def left_to_right(boxes):
    """Sort boxes column by column, each column from top to bottom. Sorting by left edges alone would order a column
    by its jitter, which cannot be learnt."""
    ordered = sorted(boxes, key=lambda b: b[0] + b[2])
    # a new column begins where centres are more than 8 apart (x0 + x1 is twice the centre)
    columns = itertools.accumulate(b[0] + b[2] - a[0] - a[2] > 16 for a, b in zip(ordered[:1] + ordered, ordered))
    return [b for _, _, b in sorted((column, b[1], b) for column, b in zip(columns, ordered))]


def spots(boxes):
    """The centres of boxes as text, the next one first: " at X Y, more at X Y, X Y", or "" for no boxes. Used for
    look-alikes still to be looked at (each list begins with what was "more" in the one before, so that no place is
    visited twice), for objects to count, and for the neighbour of a target."""
    # without boxes `first` is "", and so is the result
    first, *more = [f"{(x0 + x1) // 2} {(y0 + y1) // 2}" for x0, y0, x1, y1 in boxes] or [""]
    return first and f" at {with_commas(first, more and 'more at ' + ', '.join(more))}"


def must_match(kind, phrase):
    """The words that a hit must match: the whole phrase if the question says the look, "round" if it asks for "the
    round shield" (the colour in the thought is a guess), otherwise the colour only. (A policy that also compared shapes
    refused 21 of 121 right shields, whose shape it had misread from afar: results/trials.md.)"""
    return phrase if kind in ("look", "detail") else phrase.split()[-1 if kind == "shape" else 0]


def also_looks(e):
    """Alternative looks of a flag, one per secondary colour: which colour dominates is ambiguous. [] for a shield."""
    return [f"{colour} {e.look.split()[1]}" for colour in data.colours(e)[1:]]


def look_thought(scene, i, kind, phrase):
    """The thought before a glance or gaze at object i. Its look comes last, right before the gaze: gazes missed when
    even a plan stood between the two (results/trials.md). If the question points by shape, the shape comes first;
    otherwise the colour would be named before the shape has been read. If it points by a neighbour, the thought has two
    steps: where the neighbour is, and what is beside it."""
    look, _, detail = phrase.partition(", ")
    if kind != "neighbour":
        return with_commas(detail, look.split()[-1] if kind == "shape" else "", f"look at {look}")
    looks = [e.look for e in scene.entities]
    side, j = data.beside(looks, data.layout(scene)[i], data.single_out(scene))
    return f"{looks[j]}{spots([scene.boxes[j]])}, {side} it {look}"


def compare_aloud(wanted, seen):
    """The thought after a glance or gaze: compares wanted and seen part by part (look, then detail), up to the first
    difference. Comparing five words at once is too hard for a small model: differences in some kind of word, a
    different kind in every run, went unnoticed nearly always (results/trials.md)."""
    pairs = list(zip(wanted.split(", "), seen.split(", ")))
    differ = next((i for i, (w, s) in enumerate(pairs) if w != s), len(pairs) - 1)
    return ", ".join(f"want {w}, see {s}: {'yes' if w == s else 'no'}" for w, s in pairs[:differ + 1])


def count_aloud(scene, colour):
    """The turn that answers a counting question: list the positions of the objects to count, then their number. A
    small model counts what it has written."""
    boxes = left_to_right([box for box, e in zip(scene.boxes, scene.entities) if colour in data.colours(e)])
    return f"<think> {colour}{spots(boxes)}</think><answer> {len(boxes)}</answer>"


def _try(turn, action, patience=3):
    """Take a turn and return its observation. If the tool fails, repeat the action, up to `patience` tries in all."""
    obs = yield turn
    while obs == "search failed" and (patience := patience - 1):
        obs = yield type(turn)(f"<think> failed, again</think>{action}")  # a slip is repeated as a slip
    return obs


def best_hit(obs, phrase, kind):
    """(name, what the best hit shows); name is None if the hit does not match the phrase. What it shows is cut to the
    kind of words that the phrase has: colour, shape, look, or look and detail. A flag matches by any of its colours."""
    name, _, blazon = (obs or "").split(" | ")[0].partition(": ")
    look, *_, detail = blazon.split(", ") if ", " in blazon else (blazon, "")
    # "gold banner, red and green" is also a red banner
    if phrase.split()[0] in detail.split(" and ") and "," not in phrase:
        look = " ".join([phrase.split()[0], *look.split()[1:]])
    seen = f"{look}, {detail}" if "," in phrase else must_match(kind, look) if look else ""
    return (name.split(" ", 1)[-1] if seen == phrase else None), seen


def _read(obs, name, relation):
    """The value that a passage gives for (name, relation), by the wordings of PASSAGES; None if there is none."""
    frames = [form.format(n=name, r=relation, v="\n").split("\n") for form in PASSAGES]  # before and behind the value
    return next((p[len(a):-len(b)] for p in obs.split(" | ") for a, b in frames if p.startswith(a) and p.endswith(b) and len(p) > len(a + b)), None)


def chance(rng, words):
    """The random baseline: random actions with random arguments; `words` are possible answers."""
    while True:
        action, word, x0, y0 = rng.choice(ACTIONS), rng.choice(words), rng.randint(0, 80), rng.randint(0, 80)
        argument = {"answer": word, "search": word, "glance": "", "gaze": f"{x0} {y0} {rng.randint(x0 + 5, 99)} {rng.randint(y0 + 5, 99)}"}[action]
        yield f"<{action}> {argument}</{action}>"


def play_scripts(env, questions, scripts, rows=256, progress=None):
    """Run scripts (generators of turn texts) in the same environment as a policy: one trajectory per question."""
    out = []
    for start in tqdm(range(0, len(questions), rows), desc=progress, leave=False, disable=progress is None):
        pictures = [q.scene.picture() for q in questions[start:start + rows]]
        out += (batch := [env.prompt(q, to_array(picture, env.side)) for q, picture in zip(questions[start:start + rows], pictures)])
        live = [(t, script, picture, next(script)) for t, script, picture in zip(batch, scripts[start:start + rows], pictures)]
        for _ in range(MAX_TURNS):
            turns = [env.v.encode_turn(text) + [env.v.id["<stop>"]] for *_, text in live]
            for (t, *_, text), ids in zip(live, turns):
                (t.observe if isinstance(text, Slip) else t.act)(ids)
            # read as if a policy had said it, so not beyond TURN_TOKENS
            env.step([t for t, *_ in live], [_read_turn(env.v, ids[:TURN_TOKENS]) for ids in turns], [picture for *_, picture, _ in live])
            live = [(t, script, picture, text) for t, script, picture, _ in live if t.answer is None and (text := next_turn(script, t.turns[-1].observation))]
    return out


def next_turn(script, observation):
    """Send the observation to a script; returns its next turn, or None if the script has ended."""
    with suppress(StopIteration):
        return script.send(observation)


# ----------------------------------------------------------------------------------------------------------- evaluation

# The six held-out suites, as mixes of (kind, setting, weight). Comments: the benchmark of the paper that a suite stands
# for, and what it isolates
SUITES = {
    # FVQA: questions with and without a need to search
    "facts": [("hop1", "normal", 5), ("name", "normal", 2), ("colour", "normal", 1), ("shape", "normal", 1), ("count", "normal", 1)],
    "fine": [("name", "small", 1), ("hop1", "small", 1)],  # InfoSeek: a small target among look-alikes
    # SimpleVQA: a single object, or no need to search
    "plain": [("name", "single", 2), ("hop1", "single", 3), ("colour", "single", 1), ("shape", "normal", 2), ("count", "normal", 2)],
    # MMSearch: more and smaller objects than in any demonstration with a search (pointing lessons and counting
    # demonstrations have such scenes; so do 2 of 23 parts of RL's mix, with entities of the training split)
    "crowd": [("name", "crowd", 1), ("hop1", "crowd", 2)],
    "live": [("hop1", "normal", 3), ("hop2", "normal", 1)],  # LiveVQA: facts changed and entities added after training
    # DynVQA: more hops than in any demonstration (lessons without pictures have as many; RL asks such questions about
    # the training split: data.RL_MIX)
    "hops": [("hop4", "normal", 3), ("hop5", "normal", 1)]}
# the mixes of all suites, with equal total weights
DEV_MIX = [(kind, setting, weight / sum(w for *_, w in mix)) for mix in SUITES.values() for kind, setting, weight in mix]


def suite(world, name, n=300):
    """A held-out suite of n questions: (world to search in, questions)."""
    searched = aged(world) if name == "live" else world
    return searched, data.questions(searched, SUITES[name], n, f"suite/{name}", ("test", "late") if name == "live" else ("test",))


def aged(world):
    """The same world some time after training: the values of each relation are shuffled among test and late
    entities."""
    rng, entities = random.Random(f"{world.seed}/aged"), dict(world.entities)
    names = world.splits["test"] + world.splits["late"]
    for relation in sorted({r for n in names for r in entities[n].facts}):
        holders = [n for n in names if relation in entities[n].facts]
        values = rng.sample([world.entities[n].facts[relation] for n in holders], len(holders))
        entities |= {n: replace(entities[n], facts={**entities[n].facts, relation: v}) for n, v in zip(holders, values) if v != n}
    return replace(world, entities=entities)


# baselines that only restrict the policy: the actions allowed in each turn
SCHEDULES = {"direct": [("answer",)], "full-search": [("glance",), ("search",), ("answer",)], "no-gaze": [("answer", "search", "glance")] * MAX_TURNS}


def overlap(t, box):
    """Best IoU of a box with a target of the trajectory's question, 0..1."""
    return max((data.iou(box, t.question.scene.boxes[i]) for i in t.question.targets), default=0.0)


def gazes(t):
    """(box, best IoU with a target) of every gaze of a trajectory."""
    return [(turn.argument, overlap(t, turn.argument)) for turn in t.turns if turn.kind == "gaze"]


def looked_elsewhere(t):
    """For every gaze that missed (best IoU with a target < 0.5): is the next action a gaze elsewhere (IoU with the
    missed box < 0.5)? List of bool; [] if the question has no targets."""
    return [after.kind == "gaze" and data.iou(after.argument, turn.argument) < 0.5 for turn, after in zip(t.turns, [*t.turns[1:], Turn("answer")])
            if turn.kind == "gaze" and t.question.targets and overlap(t, turn.argument) < 0.5]


def behaviour(trajectories):
    """Metrics of a list of trajectories: {metric: value}, nan where there is nothing to average. Shares are 0..1: of
    trajectories, but *_share of all turns.

    - no_search, single_search, mixed_search: the trajectory uses no tool, one kind of tool, or several kinds.
    - gaze_correct: share of gazes with IoU >= 0.5 with a target; gaze_iou: mean IoU of gazes.
    - target_found: share of trajectories with a correct gaze, of questions on several objects that need a tool.
    - reflection: share of missed gazes (IoU < 0.5) that are followed by a gaze elsewhere.
    - turns, tool_calls, tokens (trained ones): mean per trajectory. truncated: ended without an answer."""
    mean = lambda values: float(np.mean(values)) if len(values) else float("nan")
    tools_used = [{t.kind for t in x.turns} & {"search", "glance", "gaze"} for x in trajectories]
    all_gazes = [g for x in trajectories if x.question.targets for g in gazes(x)]
    reflected = [again for x in trajectories for again in looked_elsewhere(x)]
    counts = Counter(t.kind for x in trajectories for t in x.turns)
    found = [any(iou >= 0.5 for _, iou in gazes(x)) for x in trajectories if x.question.targets and not x.question.search_free and len(x.question.scene.boxes) > 1]
    return {"accuracy": mean([x.correct for x in trajectories]), "well_formed": mean([x.well_formed for x in trajectories]),
            "no_search": mean([not kinds for kinds in tools_used]), "single_search": mean([len(kinds) == 1 for kinds in tools_used]),
            "mixed_search": mean([len(kinds) > 1 for kinds in tools_used]), **{f"{a}_share": counts[a] / max(1, sum(counts.values())) for a in (*ACTIONS, "malformed")},
            "gaze_correct": mean([iou >= 0.5 for _, iou in all_gazes]), "gaze_iou": mean([iou for _, iou in all_gazes]), "target_found": mean(found),
            "reflection": mean(reflected), "turns": mean([len(x.turns) for x in trajectories]), "tool_calls": sum(counts[a] for a in ACTIONS[1:]) / max(1, len(trajectories)),
            "tokens": mean([sum(x.trained) for x in trajectories]), "truncated": mean([x.answer is None for x in trajectories])}


SIZES = {"small": (0, 4), "medium": (4, 9), "large": (9, 100)}  # of a target: (above, up to) percent of the picture


def by_size(trajectories):
    """Accuracy by the size of the (first) target, if a tool is needed: {metric: (value, number of questions)}."""
    areas = [((x1 - x0) * (y1 - y0) / 100, t.correct) for t in trajectories if t.question.targets and not t.question.search_free
             for x0, y0, x1, y1 in [t.question.scene.boxes[t.question.targets[0]]]]
    sized = {size: [right for area, right in areas if low < area <= high] for size, (low, high) in SIZES.items()}
    return {f"accuracy_{size}": (float(np.mean(right)), len(right)) for size, right in sized.items() if right}


def evaluate(policy, env, questions, row="", seed=0, turns=MAX_TURNS, progress=None):
    """Greedy trajectories for one row of the main table (the default "": the policy without restrictions). turns: the
    most turns of a trajectory, for rows without a schedule. `policy` may be None for the rows oracle and random."""
    if row in ("oracle", "random"):
        rng, words = random.Random(f"{row}/{seed}"), sorted({a for q in questions for a in q.answers})  # words: the random baseline's answers
        return play_scripts(env, questions, [expert(q, rng) if row == "oracle" else chance(rng, words) for q in questions], progress=progress)
    # up to 320 questions per batch: a whole suite of the default size
    return rollout(policy, env, questions, 1, 0.0, schedule=SCHEDULES.get(row, [ACTIONS] * turns), rows=320, progress=progress)


# ---------------------------------------------------------------------------------------------------- tables and curves

def accuracy_table(table):
    """Accuracy in percent from rows of results.csv: {columns, rows}. The columns are the suites, their mean and, if
    measured, the user's own questions; each row starts with its name."""
    accuracy = {(r["row"], r["suite"]): 100 * float(r["value"]) for r in table if r["metric"] == "accuracy"}
    suites = [s for s in SUITES if any(s == suite for _, suite in accuracy)]
    rows, own = [[row, *(accuracy[row, s] for s in suites)] for row in dict.fromkeys(r["row"] for r in table)], ["own"] * any(s == "own" for _, s in accuracy)
    return dict(columns=[*suites, "mean", *own], rows=[[*row, sum(row[1:]) / max(1, len(suites)), *(accuracy.get((row[0], s)) for s in own)] for row in rows])


# 97.5 % quantile of Student's t distribution
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # by number of seeds


def pooled(measured, row, size):
    """Accuracy in percent for targets of one of SIZES, all suites together: mean over the seeds in `measured` (rows
    of results.csv), as text; "" if there are none."""
    seeds = {}
    for r in (r for r in measured if (r["row"], r["metric"]) == (row, f"accuracy_{size}") and r["suite"] in SUITES):
        seeds.setdefault(r["seed"], []).append((float(r["value"]), int(r["n"])))
    return f"{100 * np.mean([np.average(values, weights=n) for values, n in (zip(*pairs) for pairs in seeds.values())]):.1f}" if seeds else ""


def grid_tables(tables, measured, paper):
    """Markdown of {table: its rows}. Each cell is accuracy in percent, mean over the seeds in `measured` (rows of
    results.csv) +- half of its 95 % interval; `paper`: {row: the paper's mean}. The column "over SFT" compares with the
    SFT policy of the same seed, because base models differ more between seeds than most rows from each other."""
    accuracy = {(r["row"], r["seed"], r["suite"]): (float(r["value"]), int(r["n"])) for r in measured if r["metric"] == "accuracy"}
    suites = [s for s in SUITES if any(s == suite for *_, suite in accuracy)]
    text = ("Accuracy in percent, mean of the seeds +- half of the 95 % interval: over seeds (Student), or, where there is one seed, over questions (binomial). Over SFT: the mean less that of the usual SFT policy of the same seed. "
            "Small, medium, large: questions that need a tool and whose target fills up to 4 %, up to 9 %, or more of the picture, all suites together.\n")
    # accuracies and numbers of questions, two arrays (seeds, suites)
    cells = lambda row, seeds: np.array([[accuracy[row, s, suite] for suite in suites] for s in seeds]).transpose(2, 0, 1)
    for name, rows in tables.items():
        text += f"\n## {name}\n\n| row | paper, mean | {' | '.join(suites)} | mean | over SFT | {' | '.join(SIZES)} | seeds |\n" + "|---" * (len(suites) + 8) + "|\n"
        # the seeds that have measured a row, and SFT beside it
        seeds_of = {row: [s for s in sorted({s for r, s, _ in accuracy if r == row}) if suites and all((x, s, suite) in accuracy for x in (row, "sft") for suite in suites)] for row in rows}
        for row, seeds in ((row, seeds) for row, seeds in seeds_of.items() if seeds):
            (p, n), (sft, _) = cells(row, seeds), cells("sft", seeds)
            columns = np.column_stack([p, p.mean(1), (p - sft).mean(1)])  # (seeds, suites + 2)
            v, w = ((x * (1 - x) / n)[0] for x in (p, sft))  # binomial variances of a single seed, each (suites,)
            half = STUDENT.get(len(seeds), 2.26) * columns.std(0, ddof=1) / len(seeds) ** 0.5 if seeds[1:] else 1.96 * np.array([*v, v.mean() / len(v), (v + w).mean() / len(v)]) ** 0.5
            shown = [f"{100 * m:.1f} +- {100 * h:.1f}" if row != "sft" or k <= len(suites) else "" for k, (m, h) in enumerate(zip(columns.mean(0), half))]
            text += f"| {row} | {paper.get(row, '')} | {' | '.join(shown)} | {' | '.join(pooled(measured, row, size) for size in SIZES)} | {len(seeds)} |\n"
        text += "".join(f"\nNot measured yet: {missing}.\n" for missing in [", ".join(row for row in rows if not seeds_of[row])] if missing)
    return text


def curve_values(rows, columns):
    """Columns of a csv as numbers: {name: values}; None where a row has no value."""
    return {c: [float(r[c]) if r.get(c) not in (None, "", "nan") else None for r in rows] for c in columns}


def curve_sheet(title, curves, across=3, w=330, h=190):
    """A picture with one panel per curve ({name: value of every row}, see `curve_values`), over the number of the row,
    which is the step: values in grey, running mean in red. Without curves that have fewer than two values."""
    curves = {name: values for name, values in curves.items() if len(values) - values.count(None) > 1}
    pen = ImageDraw.Draw(sheet := Image.new("RGB", (across * w, max(1, -(-len(curves) // across)) * h), "white"))
    for i, (name, values) in enumerate(curves.items()):
        left, top, steps = i % across * w + 46, i // across * h + 26, [k for k, x in enumerate(values) if x is not None]
        last, values = len(values) - 1, np.array(values, float)[steps]
        pen.text((left, top - 20), f"{title}: {name}", fill="black", font_size=13)
        pen.rectangle((left, top, left + w - 60, top + h - 50), outline=(200, 200, 200))
        low, high = values.min(), max(values.max(), values.min() + 1e-9)
        kernel = np.ones(max(1, min(5, len(values) // 8), len(values) // 25))
        smooth = np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
        points = lambda y: list(zip(left + (w - 60) * np.array(steps) / last, top + (h - 50) * (1 - (y - low) / (high - low))))
        pen.line(points(values), fill=(205, 205, 210))
        pen.line(points(smooth), fill=(200, 30, 50), width=2)
        for number, x, y, anchor in ((high, left - 4, top, "rt"), (low, left - 4, top + h - 50, "rb"), (0, left, top + h - 47, "lt"), (last, left + w - 60, top + h - 47, "rt")):
            pen.text((x, y), f"{number:.3g}" if number < 1000 else f"{number:,.0f}", fill=(90, 90, 90), font_size=11, anchor=anchor)
    return sheet


# ----------------------------------------------------------------------------------------- reports and the command line

def poster(t, line=19):
    """A trajectory as one image: the picture with every gaze framed and numbered, beside the turns in words."""
    picture, numbers = t.question.scene.picture().copy(), {}  # numbers: of the gazes at each box
    for n, box in enumerate((turn.argument for turn in t.turns if turn.kind == "gaze"), 1):
        numbers[box] = f"{numbers[box]}, {n}" if box in numbers else str(n)
    pen, thick = ImageDraw.Draw(picture), max(2, picture.width // 150)
    for box, number in ((to_pixels(box, picture.size), number) for box, number in numbers.items() if box[0] < box[2] and box[1] < box[3]):
        pen.rectangle(box, outline=(230, 40, 60), width=thick)
        pen.rectangle((*box[:2], box[0] + 4 * thick + pen.textlength(number, font_size=8 * thick), box[1] + 9 * thick), fill=(230, 40, 60))
        pen.text((box[0] + 2 * thick, box[1]), number, fill=(255, 255, 255), font_size=8 * thick)
    picture.thumbnail((420, 420))
    # Pillow's default font has no accents. Grey: observations, which `tell` indents by 12
    lines = [(part, (120, 120, 125) if text.startswith(" " * 12) else (20, 20, 25)) for text in unaccented(tell(t)).split("\n")
             for part in textwrap.wrap(text, 96, subsequent_indent=" " * 14, drop_whitespace=False)]
    width = picture.width + 20 + round(max(pen.textlength(text, font_size=14) for text, _ in lines))
    sheet = Image.new("RGB", (width, max(picture.height, line * len(lines) + 20)), "white")
    sheet.paste(picture, (0, 0))
    for i, (text, colour) in enumerate(lines):
        ImageDraw.Draw(sheet).text((picture.width + 8, 10 + line * i), text, fill=colour, font_size=14)
    return sheet


def record(t, world, v, pictures):
    """A trajectory as a dict, as report.html shows it and report.jsonl stores it. train.report_entry adds the rest: who
    acted, reward, advantage, and r_acc less the search penalty.

    pictures: {scene or name: (number, size, data URI)}. The scene and the entities of hits are added here."""
    def add_picture(key, subject, px):  # subject: a scene or an entity; px: size of its picture
        if key not in pictures:
            picture = on_grey(subject.picture(px)).copy()
            picture.thumbnail((640, 640))
            picture.save(file := io.BytesIO(), "WEBP", quality=60)
            pictures[key] = len(pictures), picture.size, "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
        return pictures[key]

    def hit_picture(line):  # number of the picture of an image hit, "97 Brenna: red round, gold bend, 2 white crowns"
        entity = world.entities.get(line.split(" ", 1)[-1].partition(": ")[0])
        return add_picture(entity.name, entity, 48)[0] if entity and entity.look and line[0].isdigit() else None

    q, image = t.question, v.id["<image>"]
    # the many image tokens of a picture are shown as one
    tokens = [("[picture]" if i == image else v.decode([i]), int(own)) for i, own, before in zip(t.ids, t.trained, [None, *t.ids]) if not i == before == image]
    turns = [dict(kind=x.kind, argument=x.argument, thought=x.thought, ok=x.ok, iou=overlap(t, x.argument) if x.kind == "gaze" and t.question.targets else None,
                  found=[dict(text=line, picture=hit_picture(line) if x.kind in ("glance", "gaze") else None) for line in x.observation.split(" | ") if line]) for x in t.turns]
    scene, size, _ = add_picture(q.scene, q.scene, data.SCENE_PX)
    return dict(question=q.text, answers=q.answers, kind=q.kind, setting=q.setting, scene=scene, size=size, targets=[q.scene.boxes[i] for i in q.targets],
                turns=turns, tokens=tokens, r_acc=int(t.correct), r_fmt=int(t.well_formed))


def write_report(path, title, about, entries, pictures, table=None, curves=None):
    """Write a self-contained page (viewer.html with the data filled in), and beside it the trajectories as jsonl.

    entries: list of `record`, with what train.report_entry adds; table: {columns, rows}; curves: {name: values}."""
    content = dict(title=title, about=about, table=table or dict(columns=[], rows=[]), curves=[dict(name=c, values=y) for c, y in (curves or {}).items() if y],
                pictures=[uri for *_, uri in pictures.values()], trajectories=entries)
    # "<" is escaped, so that no text can end the script element that contains it
    page, encoded = (data.Path(__file__).parent / "viewer.html").read_text(encoding="utf-8"), json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    atomic(path, lambda p: p.write_text(page.replace(">DATA<", f">{encoded}<"), encoding="utf-8"))
    atomic(data.Path(path).with_suffix(".jsonl"), lambda p: p.write_text("".join(json.dumps(t) + "\n" for t in entries), encoding="utf-8"))
    print(f"report: {path}", file=sys.stderr)


def tell(t):
    """A trajectory in words: the question, then each turn with its observations below it."""
    lines = [f"  {t.question.text}" + (f"   (right answer: {t.question.answers[0]})" if t.question.answers else "")]
    for turn in t.turns:
        argument = ", ".join(map(str, turn.argument)) if isinstance(turn.argument, tuple) else turn.argument
        lines.append(f"    {turn.kind:<10}{argument}" + (f"      ({turn.thought})" if turn.thought else ""))
        lines += [f"            {line}" for line in turn.observation.split(" | ") if line]
    lines += [f"    not reliable: {why}" for why in [doubts(t)] if why and not t.question.answers]
    return "\n".join(lines + ([] if t.answer is not None else ["    no answer: out of turns or tokens"]))


def doubts(t):
    """Reasons not to trust the answer of a trajectory, as text; "" if there are none. A policy never says that it does
    not know: it has seen no question without an answer."""
    # the score of the best hit of every glance and gaze
    scores = [turn.observation.split(" ")[0] for turn in t.turns if turn.kind in ("glance", "gaze") and turn.ok]
    found = normalise(" ".join(turn.observation for turn in t.turns if turn.kind != "malformed"))
    # answers that need no search
    needs_no_search = t.answer is None or normalise(t.answer) in (*data.TINCTURES, *data.OUTLINES, *map(str, range(20)))
    reasons = {"it ended without an answer": t.answer is None, "no tool was used": not found and not needs_no_search,
               "the answer does not occur in any result": found and not needs_no_search and f" {normalise(t.answer)} " not in f" {found} ",
               "nothing in the index resembles the picture": scores and not any(s.isdecimal() and int(s) >= KNOWN for s in scores)}
    return ", ".join(reason for reason, holds in reasons.items() if holds)


def main():
    parser = argparse.ArgumentParser(description="Ask a trained policy about one picture.")
    sys.stdout.reconfigure(errors="replace")  # a terminal or a file may lack the letters of a name
    parser.add_argument("image", help="picture file"), parser.add_argument("question", nargs="?", type=lambda text: text.encode(errors="replace").decode(), help="without it, questions are read from the terminal")
    parser.add_argument("--checkpoint", help="policy (default: out/WORLD-nano-0/rl.safetensors, or, until you have trained it, the shipped one)")
    parser.add_argument("--world", default="heraldry", help="world to search: heraldry or a folder (default: %(default)s)")
    parser.add_argument("--html", help="also write the turns as an html page to this path"), parser.add_argument("--save", default="gaze.png", help="output file for the picture with gazes (default: %(default)s)")
    a = parser.parse_args()
    try:
        data.check_image(a.image)
        world, entries, pictures = data.open_world(a.world), [], {}
        own, ours = data.Path(f"out/{world.name}-nano-0/rl.safetensors"), data.Path(__file__).parent / "policies" / "rl.safetensors"
        a.checkpoint = a.checkpoint or (own if own.is_file() else ours)
        print(f"policy {a.checkpoint}, world {a.world}" + (" (the policy was not trained on this world)" if data.Path(a.checkpoint).resolve() == ours.resolve() and world.name != "heraldry" else ""), file=sys.stderr)
        policy, v = load(a.checkpoint)
        env = Environment(v, make_toolbox(world), policy.config)
        for question in [a.question] if a.question else iter(lambda: input("question (empty: quit) > ").strip(), ""):
            if (tokens := len(env.v.encode(question))) > 300:
                raise data.WorldError(f"the question has {tokens} tokens, and at most 300 leave room for turns. Ask a shorter question")
            t = rollout(policy, env, [data.Question(question, (), data.Scene((), (), "picture", 0, data.Path(a.image)), "own")], temperature=0.0)[0]
            print(tell(t))
            atomic(a.save, lambda path: poster(t).save(path, format="PNG"))
            print(f"  picture with gazes: {a.save}")
            entries.append(dict(key=str(len(entries)), suite="own", policy=str(a.checkpoint), reward=float(t.correct), advantage=None, doubts=doubts(t), **record(t, world, env.v, pictures)))
            if a.html:
                write_report(a.html, "Questions about one picture", f"{a.image}, policy {a.checkpoint}, world {a.world}", entries, pictures)
    except (EOFError, KeyboardInterrupt):
        print()
    except (CheckpointError, data.WorldError, OSError) as e:
        parser.exit(2, f"error: {e}\n")


if __name__ == "__main__":
    main()
