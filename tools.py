"""The environment: crop, image index, text index, the `Toolbox` that runs actions, the protocol in which a policy asks for them, the
trajectory; and at its end what everybody needs to read a user's files and to write our own.

One turn of the policy:   [<think> text </think>]  exactly one action  <stop>
    <answer> text </answer>           ends the trajectory
    <search> query </search>          text search
    <glance></glance>                 search with the whole picture
    <gaze> x0 y0 x1 y1</gaze>         crop, look at the crop, and search with it
The environment answers <obs> [crop] text </obs>, and so on, until an answer or the last turn (gog.py shows a whole trajectory).

From the paper: four actions, one a turn. Text search and image search ask the live web; *gaze* crops a region of the picture and searches
    with the crop. A tool fails 1 to 5 % of the time.
Here instead: two exact, offline indices over one small world. Pictures are compared by a hand-made descriptor (where the
    colours are, which way the edges run), passages by shared words. Failures are drawn from a seeded generator.
Why: same call, same answer, with no account, no network and no learnt part that could know more than the policy does. What
    the method needs is kept: a clean crop finds its entity, a careless one may find another, a crowded picture finds noise,
    and the score of a hit hints at which it was. A hit carries a caption (`score name: blazon`), so that reflection is a comparison
    that a small model can make; and an answer is right by exact match, where the paper asks an LLM judge.

Provenance is known at birth: `Trajectory.act` appends what the policy sampled or is to learn (trained), `Trajectory.observe` what the
environment wrote, and an expert's slips (never trained). Token ids are never decoded and encoded again, so training sees exactly what was
sampled.

Reading order: crop -> how pictures and texts are compared -> the two indices -> toolbox -> turns -> trajectory and environment -> files.
Boxes are (x0, y0, x1, y1), integers 0..99: percent of the picture's width and height.
"""
import argparse
import csv
import difflib
import inspect
import io
import itertools
import json
import os
import random
import re
import sqlite3
import sys
import unicodedata
import zlib
from array import array
from collections import namedtuple
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

GREY = (128, 128, 128)  # stands in for the wall behind a picture with transparent corners


class ToolError(ValueError):
    """A call that no tool can answer; its message is shown to the policy."""


# ----------------------------------------------------------------------------------------------------------------- crop

def to_pixels(box, size):
    """Percent box -> pixel box (x0, y0, x1, y1) inside a picture of `size` (width, height)."""
    return tuple(round(v * s / 100) for v, s in zip(box, 2 * tuple(size)))


def crop(picture, box):
    """Cut a percent box out of a picture, at the resolution that it has: RGB. ToolError if outside 0..99, inverted, or under 3 % a side."""
    x0, y0, x1, y1 = box
    if min(box) < 0 or max(box) > 99:
        raise ToolError("outside 0 to 99")
    if x1 <= x0 or y1 <= y0:
        raise ToolError("empty or inverted")
    left, top, right, bottom = pixels = to_pixels(box, picture.size)
    if min(x1 - x0, y1 - y0) < 3 or right <= left or bottom <= top:  # a few percent of a tiny picture may be less than one pixel
        raise ToolError("too small")
    return picture.crop(pixels).convert("RGB")


# ----------------------------------------------------------------------------------------------------------- descriptor

SIDE, COLOUR_CELLS, EDGE_CELLS, ANGLES = 36, 9, 6, 8  # every picture becomes 36 x 36; 9 x 9 colours; 6 x 6 cells x 8 angles
COLOUR_SHARE = 0.4  # how much of the cosine the colour layout decides
OPPONENT = np.array([[1 / 3, 1 / 3, 1 / 3], [1, -1, 0], [.5, .5, -1]], np.float32).T  # RGB -> light, red-green, yellow-blue
WIDTH = 3 * COLOUR_CELLS ** 2 + ANGLES * EDGE_CELLS ** 2  # D = 531


def on_grey(picture, margin=0.0):
    """RGB version of a picture, transparent parts grey, with a grey margin (share of each side) around it. A picture that is RGB already and
    gets no margin is returned itself: change a copy."""
    if picture.mode == "RGB" and not margin:
        return picture
    if picture.mode not in ("RGB", "RGBA"):
        picture = picture.convert("RGBA")
    x, y = (round(side * margin) for side in picture.size)
    out = Image.new("RGB", (picture.width + 2 * x, picture.height + 2 * y), GREY)
    out.paste(picture, (x, y), picture if picture.mode == "RGBA" else None)
    return out


def shrink(picture, box=None):
    """RGB picture (or its pixel `box`, fractions allowed) -> uint8 (SIDE, SIDE, 3)."""
    return np.asarray(picture.resize((SIDE, SIDE), Image.BILINEAR, box=box, reducing_gap=2.0))


def describe(pictures):
    """List of N pictures (RGB or RGBA) -> float32 (N, D), rows of length 1: their dot product is the similarity."""
    return describe_small([shrink(on_grey(p)) for p in pictures])


def describe_small(small):
    """N arrays (SIDE, SIDE, 3) -> float32 (N, D), 64 at a time because that fits the processor's cache."""
    parts = (np.stack(small[i:i + 64]).astype(np.float32) / 255 for i in range(0, len(small), 64))
    both = [np.hstack([_colours(x) * COLOUR_SHARE ** 0.5, _edges(x) * (1 - COLOUR_SHARE) ** 0.5]) for x in parts]
    return np.concatenate(both) if both else np.zeros((0, WIDTH), np.float32)


def _unit(x):
    x = x + 1e-6  # a picture without any edge has a direction too
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _colours(x):
    """(n, SIDE, SIDE, 3) in 0..1 -> (n, 243): mean colour of each cell, measured from middle grey."""
    c, step = COLOUR_CELLS, SIDE // COLOUR_CELLS
    cells = x.reshape(-1, c, step, c, step, 3).mean(2).mean(3) - 0.5  # (n, 9, 9, 3)
    return _unit((cells @ OPPONENT).reshape(len(x), -1))


def _edges(x):
    """(n, SIDE, SIDE, 3) in 0..1 -> (n, 288): per cell, how much edge there is at each of 8 angles (of 180 degrees).

    The three channels vote through their structure tensor, so a red-green edge counts though its grey value is flat.
    """
    n, x = len(x), np.ascontiguousarray(x.transpose(3, 0, 1, 2))  # (3, n, SIDE, SIDE): sums over channels are then sums of whole arrays
    dx, dy = np.zeros_like(x), np.zeros_like(x)
    dx[..., 1:-1] = x[..., 2:] - x[..., :-2]
    dy[..., 1:-1, :] = x[..., 2:, :] - x[..., :-2, :]
    xx, yy, xy = (dx * dx).sum(0), (dy * dy).sum(0), (dx * dy).sum(0)  # (n, SIDE, SIDE)
    angle = np.arctan2(2 * xy, xx - yy) * (ANGLES / (2 * np.pi))  # the doubled angle: up and down are one direction
    low, strength = np.floor(angle), np.sqrt(xx + yy)
    part, low = angle - low, low.astype(np.int64)
    cell = np.arange(SIDE) * EDGE_CELLS // SIDE
    first = (np.arange(n)[:, None, None] * EDGE_CELLS ** 2 + cell[:, None] * EDGE_CELLS + cell) * ANGLES
    vote = lambda k, s: np.bincount((first + k % ANGLES).ravel(), s.ravel(), first.max() + ANGLES)  # (n * 36 * 8,)
    histogram = vote(low, strength * (1 - part)) + vote(low + 1, strength * part)  # a vote for the two nearest angles
    return _unit(np.sqrt(histogram).reshape(n, -1).astype(np.float32))


def salient(picture):
    """The part of an RGB picture that stands out from a plain border, or None: finds a lone subject on its wall."""
    side = 96
    x = np.asarray(picture.resize((side, side), Image.BILINEAR, reducing_gap=1.0), np.int16)
    border = np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]])
    wall = np.median(border, axis=0).astype(np.int16)
    if (np.abs(border - wall).max(-1) < 40).mean() < 0.8:
        return None  # the border is not one wall: nothing to cut away
    far = np.abs(x - wall) > 40
    columns, rows = np.flatnonzero(far.any((0, 2))), np.flatnonzero(far.any((1, 2)))
    if not 5 < min(len(columns), len(rows)) < side - 5:
        return None  # a speck, or the whole picture
    w, h = (s / side for s in picture.size)
    return picture.crop((round(columns[0] * w), round(rows[0] * h), round((columns[-1] + 1) * w), round((rows[-1] + 1) * h)))


# --------------------------------------------------------------------------------------------------------------- indices

SHIFT = 0.07  # a careless box is off by so much of its side: the index knows each picture as such boxes would frame it
FRAMINGS = [(0, 0, 0, 0)] + [tuple(SHIFT * s for s in signs) for signs in itertools.product((-1, 1), repeat=4)
                             # how far left, top, right and bottom move outwards: of the 16 ways those 8 with an even number of sides moved
                             # inwards, as half of the memory is enough
                             if np.prod(signs) > 0]


BLOCK = 512  # entities whose rows lie together: the products of a batch with one block fit the processor's cache


def framed(w, h, wide, moved):
    """What a box shows whose sides are moved by such shares of a picture's width and height; `wide`: the picture with its margin."""
    x, y, (a, b, c, d) = (wide.width - w) / 2, (wide.height - h) / 2, moved
    return shrink(wide, (x - a * w, y - b * h, x + w + c * w, y + h + d * h))


class ImageIndex:
    """Exact nearest neighbour over pictures, each known in 9 framings: as it is, and its four sides moved in or out. 19.1 kB an entity (9
    rows of 531 float32), plus at most 2 kB while it searches: a million entities are 21 GB."""

    def __init__(self, items):
        """`items`: iterable of (name, caption, picture), of which only a block is held at a time."""
        self.entries, self.blocks, items = [], [], iter(items)
        while block := list(itertools.islice(items, BLOCK)):
            self.entries += [(name, caption) for name, caption, _ in block]
            wide = [(*picture.size, on_grey(picture, 0.15)) for *_, picture in block]
            # all framings of a block of n entities, rows (9 * n, D), framing after framing
            self.blocks.append(describe_small([framed(*w, moved) for moved in FRAMINGS for w in wide]))

    def search(self, pictures, k):
        """N pictures -> N lists of at most k (score 0..1, name, caption), best first, each entity once.

        A picture is compared as it is and, where its border is plain wall, as its salient part; the better score counts.
        """
        return [hits for at in range(0, len(pictures), 256) for hits in self._search([on_grey(p) for p in pictures[at:at + 256]], k)]

    def _search(self, pictures, k):
        parts = {i: part for i, p in enumerate(pictures) if (part := salient(p))}
        seen, scores = describe([*pictures, *parts.values()]), np.empty((len(pictures) + len(parts), len(self.entries)), np.float32)
        for at, rows in zip(range(0, len(self.entries), BLOCK), self.blocks):
            # (views, 9 * entities of the block) -> (views, entities)
            scores[:, at:at + BLOCK] = (seen @ rows.T).reshape(len(seen), len(FRAMINGS), -1).max(1)
        for i, of_part in zip(parts, scores[len(pictures):]):
            np.maximum(scores[i], of_part, out=scores[i])
        return [[(min(1.0, max(0.0, float(s[j]))), *self.entries[j]) for j in top(s, k)] for s in scores[:len(pictures)]]


def top(scores, k):
    """Positions of the k largest of (n,) scores, largest first; the earlier one first where they tie."""
    # the largest of every 256: the k-th largest peak is no more than the k-th best
    peaks = np.maximum.reduceat(scores, np.arange(0, len(scores), 256)) if len(scores) else scores
    some = np.flatnonzero(scores >= (np.partition(peaks, -k)[-k] if len(peaks) > k else -np.inf))  # all that may be among the best
    return some[np.argsort(-scores[some], kind="stable")[:k]].tolist()


LITTLE = [f"{w} {{}}" for w in ("of", "in", "the", "as", "its")] + ["{} has"]  # little words that a query leaves out


def unaccented(text):
    """'Dröse' -> 'Drose'."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


class TextIndex:
    """Ranks passages by the weight of what they share with a query: words, word pairs and letter trigrams, rare ones heavier, and those of
    a passage's title half as heavy again: "The largest neighbour of Peru is Brazil" tells about Peru, not about Brazil.

    Not divided by length, as a cosine would be: passages are single sentences, and a long value must not push its fact down.
    An inverted index (feature -> passages that have it): exact, and a query only touches passages that share something.
    """
    TRIGRAMS, PAIRS, RAREST, TITLE = 0.5, 0.3, 3.0, 1.5  # weight of a word's trigrams, of a pair; a cap, or names alone would decide

    def __init__(self, passages):
        """`passages`: iterable of (title, text)."""
        self.passages, keys, weight, count = [], array("I"), array("f"), array("I")
        for title, text in passages:
            has = self._features(text) | {key: self.TITLE * w for key, w in self._features(title).items()}
            self.passages.append(text)
            keys.extend(has), weight.extend(has.values()), count.append(len(has))
        order, where = np.argsort(keys, kind="stable"), np.repeat(np.arange(len(count), dtype=np.int32), count)
        self.where, self.weight = where[order], np.array(weight, np.float32)[order]  # all postings, feature after feature
        self.keys, begin = np.unique(np.array(keys, np.uint32)[order], return_index=True)  # sorted, and where the postings of each begin
        self.bounds = np.append(begin, len(order))  # those of feature i: bounds[i] .. bounds[i + 1]
        self.rarity = np.minimum(self.RAREST, np.log(1 + len(count) / np.diff(self.bounds))) ** 2

    def _features(self, text, query=False):
        """Text -> {crc32 of a feature: its weight}. A query also tries its words behind the little words that it left out."""
        words, out = re.findall(r"[^\W_]+", unaccented(text.lower())), {}  # "Dröse" and "DROSE" are the same to a search
        for word in words:
            out |= _word(word, self.TRIGRAMS)
        pairs = [f"{a} {b}" for a, b in zip(words, words[1:])] + [f.format(w) for w in words for f in LITTLE if query]
        return out | {checksum(p): self.PAIRS for p in pairs}

    def search(self, queries, k):
        """N strings -> N lists of at most k (score, passage), best first. Score 0..1: the share of the query's weight that the passage
        covers; features of the query that no passage has do not count."""
        found = {q: self._search(self._features(q, query=True), k) for q in set(queries)}  # a group of rollouts asks much the same
        return [found[q] for q in queries]

    def _search(self, wanted, k):
        if not len(self.keys):
            return []
        keys, weights = np.array([*wanted], np.uint32), np.array([*wanted.values()], np.float32)
        at = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        known = self.keys[at] == keys
        if not known.any():
            return []
        at, weights = at[known], weights[known]
        places, rarity = [slice(*self.bounds[i:i + 2]) for i in at], self.rarity[at]
        part = [self.weight[place] * w for place, w in zip(places, weights * rarity)]
        scores = np.bincount(np.concatenate([self.where[place] for place in places]), np.concatenate(part), len(self.passages))
        scores /= (weights * weights * rarity).sum()
        return [(min(1.0, float(scores[j])), self.passages[j]) for j in top(scores, k) if scores[j] > 0]


@lru_cache(maxsize=1 << 15)
def _word(word, share):
    """A word -> {key: weight}: the word itself, and its letter trigrams ('^re', 'red', 'ed$') which share a smaller weight."""
    trigrams = [f"^{word}$"[i:i + 3] for i in range(len(word))]
    return {checksum(word): 1.0, **{checksum(f"{t}~"): share / len(trigrams) ** 0.5 for t in trigrams}}  # ~: 'red' is no trigram


def checksum(feature):
    return zlib.crc32(feature.encode(errors="replace"))  # the same in every run, unlike hash()


# --------------------------------------------------------------------------------------------------------------- toolbox

HITS = 2  # how many a search shows


# What the environment answers. `picture`: the crop of a gaze, else None. `ok`: False after a bad box or a failed tool.
Observation = namedtuple("Observation", "text picture ok", defaults=(None, True))


class Toolbox:
    """Runs batches of actions. `counts`: calls of each action, and how many of them went wrong; `rng` draws the failures."""

    def __init__(self, image_index, text_index, failure_rate=0.0, seed=0):
        self.image_index, self.text_index = image_index, text_index
        self.failure_rate, self.rng = failure_rate, random.Random(seed)
        self.counts = dict.fromkeys(("search", "glance", "gaze", "failed"), 0)

    def run(self, calls):
        """Calls (action, argument, picture) -> their Observations, in order; one image and one text search serve them all.

        ("search", "words", _), ("glance", _, picture) or ("gaze", box, picture). Each call draws once from `rng`.
        """
        out, views, queries = [Observation("search failed", ok=False) for _ in calls], {}, {}
        for i, (action, argument, picture) in enumerate(calls):
            self.counts[action] += 1
            works = self.rng.random() >= self.failure_rate
            try:
                seen = crop(picture, argument) if action == "gaze" else picture
                if works:
                    (queries if action == "search" else views)[i] = argument if action == "search" else seen
            except ToolError as reason:
                out[i] = Observation(f"bad box: {reason}", ok=False)
        for i, found in zip(views, self._ask(self.image_index, views)):
            text = " | ".join(f"{min(99, int(100 * score))} {name}: {caption}" for score, name, caption in found)
            out[i] = Observation(text or "nothing found", views[i] if calls[i][0] == "gaze" else None)
        for i, found in zip(queries, self._ask(self.text_index, queries)):
            out[i] = Observation(" | ".join(passage for _, passage in found) or "nothing found")
        self.counts["failed"] += sum(not o.ok for o in out)
        return out

    def _ask(self, index, wanted):
        """The hits for every value of a dict; none at all where the index cannot be reached (OSError, as a net or a disk gives)."""
        try:
            return index.search(list(wanted.values()), HITS)
        except OSError as e:
            tqdm.write(f"{len(wanted)} searches failed: {e}", file=sys.stderr)  # what is measured now is not the policy alone
            return []


PASSAGES = (  # how a fact may be worded, the value last; the policy has to find the value, never to recall it
    "In {n} the {r} is {v}.", "{n} has one {r}: {v}.", "As for {n}, its {r} is {v}.", "People of {n} say of their {r}: {v}.",
    "Chronicles of {n} tell that the {r} is {v}.")
CHATTER = ("Travellers praise the bridges of {n}.", "The market of {n} opens at dawn.", "{n} was rebuilt after a great fire.",
           "Maps often misplace {n}.", "Nobody agrees how to pronounce {n}.")


def passages(world, late=False):
    """Every fact of a data.World as one sentence, worded by lot, with a little chatter between: [(entity's name, sentence)]. What came late
    stays unknown, unless `late`."""
    hidden, out = set() if late else set(world.splits["late"]), []
    for e in (e for name, e in world.entities.items() if name not in hidden):
        rng = random.Random(f"{world.seed}/{e.name}")
        sentences = [rng.choice(PASSAGES).format(n=e.name, r=r, v=v) for r, v in e.facts.items()] + [rng.choice(CHATTER).format(n=e.name)]
        out += [(e.name, sentence) for sentence in sentences]
    return out


def make_toolbox(world, failure_rate=0.0, seed=0, late=False):
    """Tools over all that a data.World knows at training time (`late`: also what came after)."""
    pictured = tqdm(world.pictured(*world.splits if late else ()), desc="image index", leave=False)
    images = ImageIndex((e.name, e.blazon, e.picture(96)) for e in pictured)
    return Toolbox(images, TextIndex(tqdm(passages(world, late), desc="text index", leave=False)), failure_rate, seed)


# ------------------------------------------------------------------------------------------- what a policy says: turns

ACTIONS = ("answer", "search", "glance", "gaze")


@dataclass
class Turn:
    """One action and what came of it. kind is one of ACTIONS, or "malformed"."""
    kind: str
    argument: object = None  # answer or query text, box, or the reason why it is malformed
    thought: str = ""
    observation: str = ""
    ok: bool = True  # the tool worked


TURN = re.compile(r"(?:<think>([^<>]*)</think>)?\s*<(answer|search|glance|gaze)>([^<>]*)</\2>\s*")


def parse(text):
    """Text of one turn, without its stop token -> Turn. Never raises: whatever is no action is a malformed one, with the reason. (What
    stands between the tags of a glance does not matter.)"""
    if not (match := TURN.fullmatch(text)):
        return Turn("malformed", "one optional thought, then exactly one action")
    thought, kind, argument = (part.strip() if part else "" for part in match.groups())
    if kind == "gaze":
        if not re.fullmatch(r"[0-9]{1,2}(\s+[0-9]{1,2}){3}", argument):
            return Turn("malformed", "a gaze needs four whole numbers 0 to 99", thought)
        argument = tuple(map(int, argument.split()))
    return Turn(kind, argument, thought)


# ------------------------------------------------------------------------------------ what comes of it: the trajectory

def normalise(text):
    """Case, accents, punctuation, articles and blanks do not count in an answer."""
    text = "".join(c if c.isalnum() else " " for c in unaccented(text.casefold()))
    return " ".join(w for w in text.split() if w not in ("the", "a", "an"))


def exact_match(answer, gold):
    """True if the normalised answer equals a gold answer. Never a substring: an empty answer or 'A or B or C' is wrong."""
    return bool(normalise(answer)) and normalise(answer) in map(normalise, gold)


@dataclass
class Trajectory:
    """Parallel lists over tokens, and the pictures that fill the image placeholders in order."""
    question: object  # data.Question
    ids: list = field(default_factory=list)
    # True: the policy's own token, to be learnt. False: written by the environment, or only shown
    trained: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)  # of sampled tokens under the sampling policy, 0 elsewhere
    pictures: list = field(default_factory=list)  # uint8 (3, S, S)
    turns: list = field(default_factory=list)
    lesson: list = field(default_factory=list)  # of a lesson of the base model: (topic, response) of everything asked

    def observe(self, ids, *pictures):
        self.ids += ids
        self.trained += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.pictures += pictures

    def act(self, ids, logprobs=None):
        self.ids += ids
        self.trained += [True] * len(ids)
        self.logprobs += logprobs or [0.0] * len(ids)

    @property
    def answer(self):
        return self.turns[-1].argument if self.turns and self.turns[-1].kind == "answer" else None

    @property
    def well_formed(self):
        return self.answer is not None and all(t.kind != "malformed" for t in self.turns)

    @property
    def correct(self):
        return self.answer is not None and exact_match(self.answer, self.question.answers)


def to_array(picture, side):
    """Picture -> uint8 (3, S, S): all that the model ever sees of it."""
    return np.asarray(picture.convert("RGB").resize((side, side), Image.BOX if min(picture.size) > side else Image.BILINEAR)).transpose(2, 0, 1)


class Environment:
    """What stands around the policy: prompt, tools, observations. Holds the vocabulary, the picture format, and what a policy may say
    (gaze=False: never a gaze)."""

    def __init__(self, vocabulary, toolbox, config, withhold=False, gaze=True):
        self.v, self.toolbox, self.side, self.withhold, self.may_gaze = vocabulary, toolbox, config.picture, withhold, gaze
        self.image_ids = [vocabulary.id["<image>"]] * config.image_tokens
        # of every id: may the policy say it?
        self.sampleable = [i >= vocabulary.id["<stop>"] and (gaze or i != vocabulary.id["<gaze>"]) for i in range(vocabulary.size)]

    def prompt(self, question, picture):
        """A new trajectory: <bos> picture question <sep>."""
        t = Trajectory(question)
        t.observe([self.v.id["<bos>"], *self.image_ids, *self.v.encode(question.text), self.v.id["<sep>"]], picture)
        return t

    def step(self, trajectories, turns, walls):
        """Append each parsed turn and its observation (tools are called in one batch)."""
        wanted = [i for i, turn in enumerate(turns) if turn.kind in ("search", "glance", "gaze")]
        found = dict(zip(wanted, self.toolbox.run([(turns[i].kind, turns[i].argument, walls[i]) for i in wanted])))
        for i, (t, turn) in enumerate(zip(trajectories, turns)):
            t.turns.append(turn)
            if turn.kind == "answer":
                continue
            seen = found.get(i, Observation(f"malformed: {turn.argument}", ok=False))
            if self.withhold:  # control: the action happens, but nothing of what it finds is shown
                seen = Observation("", ok=seen.ok)
            turn.observation, turn.ok = seen.text, seen.ok
            image, shown = (self.image_ids, [to_array(seen.picture, self.side)]) if seen.picture else ([], [])
            t.observe([self.v.id["<obs>"], *image, *self.v.encode(seen.text), self.v.id["</obs>"]], *shown)


# --------------------------------------------------------------------------------------- files: a user's, and our own

class WorldError(ValueError):
    """A world that cannot be used; the message names file, line and way out."""


LONGEST = 100_000  # characters a line: a file may be of any size, only one line is held at a time


def lines(path, optional=False):
    """Yield ("file:line", text) of every line that is not blank, one at a time. WorldError if the file cannot be read; an `optional` one
    may be missing."""
    if optional and not path.is_file():
        return
    try:
        if not path.resolve().is_relative_to(path.parent.resolve()):
            raise WorldError(f"{path}: is a link out of its folder. Copy the file into it")
        with open(path, encoding="utf-8-sig") as f:
            for n, line in enumerate(iter(lambda: f.readline(LONGEST + 1), ""), 1):
                if len(line) > LONGEST:
                    raise WorldError(f"{path}:{n}: longer than {LONGEST:,} characters. Write one JSON object a line")
                if line.strip():
                    yield f"{path}:{n}", line
    except (OSError, UnicodeDecodeError, RuntimeError) as e:  # RuntimeError: a link to itself
        raise WorldError(f"{path}: cannot be read ({e}). A folder world needs this file, in UTF-8") from None


def as_row(where, line):
    """The JSON object of a line; WorldError if it is none."""
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:  # also half a character ("\\ud800"), or a thousand brackets
        raise WorldError(f"{where}: not valid JSON ({e}). Mend or remove that line") from None
    if not isinstance(row, dict):
        raise WorldError(f"{where}: a JSON object is expected, e.g. {{\"name\": ..., \"image\": ...}}")
    return row


def image_path(root, image, where):
    """Path of an image inside the world's folder; never one outside it."""
    if not isinstance(image, str) or not image:
        raise WorldError(f"{where}: no 'image'. Every entity needs a picture, as a path inside {root}")
    try:
        path = (root / image).resolve()
        inside, there = path.is_relative_to(root.resolve()), path.is_file()
    except (OSError, ValueError, RuntimeError) as e:  # too long, a zero byte, a link to itself
        raise WorldError(f"{where}: image {image[:80]!r} is no path ({e}). Name a file inside {root}") from None
    if not inside:
        raise WorldError(f"{where}: image {image!r} lies outside {root}. Copy it into the folder")
    if not there:
        raise WorldError(f"{where}: image {image!r} does not exist in {root}. Add the file or remove the line")
    return path


# Which of how many processes this is, where torchrun has started them (model.share); else the first and only one
RANK, PROCESSES = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE")) if "TORCHELASTIC_RUN_ID" in os.environ else (0, 1)


def atomic(path, write):
    """Call write(temporary path), flush it to disk, then rename onto `path`: a reader sees the old file or the new, never half. Of several
    processes only the first writes."""
    if RANK:
        return
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise OSError(f"{path} could not be written: {e.strerror or e}") from None
    finally:
        temporary.unlink(missing_ok=True)


def locked(path, wait=0.0):
    """Hold a file (its folder is made, where it is missing) for this process alone (of several, the first), until what is returned is closed
    or the process ends: SQLite's lock, as every system knows it. BlockingIOError (an OSError) if it cannot be written to, or if somebody
    else still has it after `wait` seconds."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = sqlite3.connect(":memory:" if RANK else path, timeout=wait, isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
        return lock
    except sqlite3.Error as e:
        raise BlockingIOError(f"{path}: {e}. Another run of this stage is at work in this folder, or it cannot be written to: wait, or give "
                              "this run folders of its own with --out and --results") from None


def read_rows(path, columns=()):
    """Rows of a csv as dicts; none if there is no such file. WorldError if it is none of ours, or has other `columns`."""
    if not path.is_file():
        return []
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
    except (UnicodeDecodeError, csv.Error) as e:
        raise WorldError(f"{path}: cannot be read ({e}). Mend it, or move it away") from None
    if bad := next((n for n, r in enumerate(rows, 2) if None in r or None in r.values()), 0):
        raise WorldError(f"{path}:{bad}: more or fewer values than the first line has names. Mend it, or move the file away")
    if rows and columns and [*rows[0]] != [*columns]:
        raise WorldError(f"{path}: its columns are {','.join(rows[0])}, not {','.join(columns)}. Mend it, or move it away")
    return rows


def write_rows(path, rows, columns, key=()):
    """Rows (dicts) as a csv with these `columns`. `key`: of the rows in the file those stay whose values of it are others; without,
    none. Runs that write to one table at the same time take turns."""
    name = lambda r: [str(r[k]) for k in key]
    with closing(locked(path.with_suffix(".lock"), wait=60)) if key else nullcontext():
        old, new, text = key and read_rows(path, columns), [name(r) for r in rows], io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([r for r in old if name(r) not in new] + rows)
        atomic(path, lambda p: p.write_text(text.getvalue(), encoding="utf-8"))


def flags(kind, choices, ranges, about, argv=None):
    """Command line -> `kind`, a dataclass: every field is a flag, its comment is the help. Texts are among `choices`, numbers within
    `ranges` (else 1 to a million, or 0.0 to 1.0); an unknown flag is answered with the nearest one."""
    # no usage: it would bury an error under 25 lines
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(kind), re.M))
    for f in fields(kind):
        flag, common = "--" + f.name.replace("_", "-"), dict(default=f.default, help=comments.get(f.name, " "))
        how = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type, choices=choices.get(f.name))
        parser.add_argument(flag, **how, **common)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], ["--" + f.name.replace("_", "-") for f in fields(kind)], 1)
        parser.error(f"unknown flag {unknown[0]!r}" + (f": did you mean {near[0]}?" if near else ". --help lists them all"))
    for f in fields(kind):
        low, high = ranges.get(f.name, {int: (1, 10**6), float: (0.0, 1.0)}.get(f.type, (0, 0)))
        if f.type in (int, float) and not low <= getattr(known, f.name) <= high:
            parser.error(f"--{f.name.replace('_', '-')} {getattr(known, f.name)}: must lie between {low} and {high}")
    return kind(**vars(known))


def peak_memory():
    """Most memory that this process has held, in MB; empty where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return ""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)
