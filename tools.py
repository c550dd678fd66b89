"""The environment: crop, image index, text index, the `Toolbox` that runs actions, the turn protocol, the trajectory;
and, at the end, file helpers shared by all modules.

One turn of the policy:   [<think> text</think>]  exactly one action  <stop>
    <answer> text</answer>            ends the trajectory
    <search> query</search>           text search
    <glance></glance>                 image search with the whole picture
    <gaze> x0 y0 x1 y1</gaze>         crop the picture, look at the crop, and search with it
The environment replies <obs> [crop] text</obs>, and so on, until an answer or the last turn (gog.py shows a whole
trajectory).

From the paper: four actions, one per turn. Text search and image search query the live web; *gaze* crops a region of
    the picture and searches with the crop. A tool fails 1 to 5 % of the time.
Here instead: two exact, offline indices over one small world. Pictures are compared by a hand-made descriptor (colour
    layout and edge directions), passages by shared words. Failures are drawn from a seeded generator. An answer is
    judged by exact match (the paper: an LLM judge).
Why: the same call gives the same result, without an account, a network, or a learnt component that could know more
    than the policy. What the method needs is kept: a clean crop finds its entity, a sloppy one may find another, a
    crowded picture finds noise, and the score of a hit hints at which of these happened. A hit carries a caption
    (`score name: blazon`), so that reflection is a comparison that a small model can make.

Each token's provenance is recorded when it is appended: `Trajectory.act` adds what the policy sampled or should learn
(trained); `Trajectory.observe` adds what the environment wrote, and the expert's slips (never trained). Token ids are
never decoded and re-encoded, so training sees exactly what was sampled. (Text within tags begins with a blank, so that
a word has the same tokens everywhere.)

Reading order: crop -> descriptor -> the two indices -> toolbox -> turns -> trajectory and environment -> files. At
first, skip descriptor and indices: all that matters is that an image search compares colours and edges, place by place,
and a text search shared words.
Boxes are (x0, y0, x1, y1), integers 0..99, in percent of the picture's width and height.
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

GREY = (128, 128, 128)  # background behind the transparent parts of a picture


class ToolError(ValueError):
    """A call that a tool cannot answer. The message is shown to the policy."""


# ----------------------------------------------------------------------------------------------------------------- crop

def to_pixels(box, size):
    """Percent box -> pixel box (x0, y0, x1, y1) inside a picture of `size` (width, height)."""
    return tuple(round(v * s / 100) for v, s in zip(box, 2 * tuple(size)))


def crop(picture, box):
    """Cut a percent box out of a picture, at full resolution, as RGB. ToolError if the box leaves 0..99, is empty or
    inverted, or has a side under 3 %."""
    x0, y0, x1, y1 = box
    if min(box) < 0 or max(box) > 99:
        raise ToolError("outside 0 to 99")
    if x1 <= x0 or y1 <= y0:
        raise ToolError("empty or inverted")
    left, top, right, bottom = pixels = to_pixels(box, picture.size)
    if min(x1 - x0, y1 - y0) < 3 or right <= left or bottom <= top:  # 3 % of a tiny picture may be less than one pixel
        raise ToolError("too small")
    return picture.crop(pixels).convert("RGB")


# ----------------------------------------------------------------------------------------------------------- descriptor

# every picture is shrunk to 36 x 36 pixels; its descriptor has 9 x 9 cells of colour and 6 x 6 cells of 8 edge
# directions
SIDE, COLOUR_CELLS, EDGE_CELLS, ANGLES = 36, 9, 6, 8
COLOUR_SHARE = 0.4  # share of the cosine that comes from colour; the rest comes from edges
# RGB -> lightness, red-green, yellow-blue
OPPONENT = np.array([[1 / 3, 1 / 3, 1 / 3], [1, -1, 0], [.5, .5, -1]], np.float32).T
WIDTH = 3 * COLOUR_CELLS ** 2 + ANGLES * EDGE_CELLS ** 2  # D = 531


def on_grey(picture, margin=0.0):
    """RGB version of a picture: transparent parts become grey, with a grey margin (share of each side) around it. An
    RGB picture without a margin is returned itself: draw on a copy."""
    if picture.mode == "RGB" and not margin:
        return picture
    if picture.mode not in ("RGB", "RGBA"):
        picture = picture.convert("RGBA")
    x, y = (round(side * margin) for side in picture.size)
    out = Image.new("RGB", (picture.width + 2 * x, picture.height + 2 * y), GREY)
    out.paste(picture, (x, y), picture if picture.mode == "RGBA" else None)
    return out


def shrink(picture, box=None):
    """Shrink an RGB picture (or its pixel `box`, fractions allowed) to uint8 (SIDE, SIDE, 3)."""
    return np.asarray(picture.resize((SIDE, SIDE), Image.BILINEAR, box=box, reducing_gap=2.0))


def describe(pictures):
    """List of N pictures (RGB or RGBA) -> float32 (N, D), rows of length 1: their dot product is the similarity
    (cosine)."""
    return describe_small([shrink(on_grey(p)) for p in pictures])


def describe_small(small):
    """N arrays (SIDE, SIDE, 3) -> float32 (N, D). Works on 64 at a time, which fit the processor's cache."""
    parts = (np.stack(small[i:i + 64]).astype(np.float32) / 255 for i in range(0, len(small), 64))
    both = [np.hstack([_colours(x) * COLOUR_SHARE ** 0.5, _edges(x) * (1 - COLOUR_SHARE) ** 0.5]) for x in parts]
    return np.concatenate(both) if both else np.zeros((0, WIDTH), np.float32)


def _unit(x):
    x = x + 1e-6  # a picture without edges would have length 0
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _colours(x):
    """(n, SIDE, SIDE, 3) in 0..1 -> (n, 243): mean colour of each cell, minus middle grey, in opponent channels."""
    c, step = COLOUR_CELLS, SIDE // COLOUR_CELLS
    cells = x.reshape(-1, c, step, c, step, 3).mean(2).mean(3) - 0.5  # (n, 9, 9, 3)
    return _unit((cells @ OPPONENT).reshape(len(x), -1))


def _edges(x):
    """(n, SIDE, SIDE, 3) in 0..1 -> (n, 288): per cell, a histogram of edge strength over 8 directions (of 180
    degrees).

    Directions come from the structure tensor of all three channels, so a red-green edge counts even if both have the
    same grey value."""
    n, x = len(x), np.ascontiguousarray(x.transpose(3, 0, 1, 2))  # (3, n, SIDE, SIDE): faster sums over channels
    dx, dy = np.zeros_like(x), np.zeros_like(x)
    dx[..., 1:-1] = x[..., 2:] - x[..., :-2]
    dy[..., 1:-1, :] = x[..., 2:, :] - x[..., :-2, :]
    xx, yy, xy = (dx * dx).sum(0), (dy * dy).sum(0), (dx * dy).sum(0)  # (n, SIDE, SIDE)
    angle = np.arctan2(2 * xy, xx - yy) * (ANGLES / (2 * np.pi))  # doubled: opposite gradients are one direction
    below, strength = np.floor(angle), np.sqrt(xx + yy)
    fraction, below = angle - below, below.astype(np.int64)
    cell = np.arange(SIDE) * EDGE_CELLS // SIDE
    first = (np.arange(n)[:, None, None] * EDGE_CELLS ** 2 + cell[:, None] * EDGE_CELLS + cell) * ANGLES
    # sum of the weights that vote for direction k, per cell: (n * 36 * 8,)
    vote = lambda k, weight: np.bincount((first + k % ANGLES).ravel(), weight.ravel(), first.max() + ANGLES)
    # each edge votes for its two nearest directions
    histogram = vote(below, strength * (1 - fraction)) + vote(below + 1, strength * fraction)
    return _unit(np.sqrt(histogram).reshape(n, -1).astype(np.float32))


def salient(picture):
    """Crop an RGB picture to what stands out from a plain border; None if nothing does. Finds a single subject on its
    wall."""
    side = 96
    x = np.asarray(picture.resize((side, side), Image.BILINEAR, reducing_gap=1.0), np.int16)
    border = np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]])
    wall = np.median(border, axis=0).astype(np.int16)
    if (np.abs(border - wall).max(-1) < 40).mean() < 0.8:
        return None  # the border is not one plain wall
    far = np.abs(x - wall) > 40
    columns, rows = np.flatnonzero(far.any((0, 2))), np.flatnonzero(far.any((1, 2)))
    if not 5 < min(len(columns), len(rows)) < side - 5:
        return None  # only a speck, or (nearly) the whole picture
    sx, sy = (length / side for length in picture.size)
    return picture.crop((round(columns[0] * sx), round(rows[0] * sy), round((columns[-1] + 1) * sx), round((rows[-1] + 1) * sy)))


# -------------------------------------------------------------------------------------------------------------- indices

SHIFT = 0.07  # the sides of a sloppy box are off by about this share of its width or height
# Each picture is indexed in 9 framings, to tolerate inexact gaze boxes: as it is, and with its sides moved by SHIFT
# (left, top, right, bottom; positive: outwards). Of the 16 sign patterns only the 8 with an even number of inward moves
# are used: they suffice, and halve the memory
FRAMINGS = [(0, 0, 0, 0)] + [tuple(SHIFT * s for s in signs) for signs in itertools.product((-1, 1), repeat=4) if np.prod(signs) > 0]
BLOCK = 512  # entities per block of rows: the product of a batch with one block fits the processor's cache


def framed(w, h, wide, moved):
    """What a box with displaced sides shows of a picture of w x h pixels. `wide`: the picture with a grey margin;
    `moved`: from FRAMINGS."""
    x, y = (wide.width - w) / 2, (wide.height - h) / 2  # margins
    left, up, right, down = moved
    return shrink(wide, (x - left * w, y - up * h, x + w + right * w, y + h + down * h))


class ImageIndex:
    """Exact nearest-neighbour search over pictures, each stored in 9 framings. Memory: 19.1 kB per entity (9 rows of
    531 float32), plus at most 2 kB per entity during a search; a million entities take 21 GB."""

    def __init__(self, items):
        """`items`: iterable of (name, caption, picture). Only one block of them is held at a time."""
        self.entries, self.blocks, items = [], [], iter(items)
        while block := list(itertools.islice(items, BLOCK)):
            self.entries += [(name, caption) for name, caption, _ in block]
            padded = [(*picture.size, on_grey(picture, 0.15)) for *_, picture in block]
            # all framings of a block of n entities: rows (9 * n, D), one framing after the other
            self.blocks.append(describe_small([framed(*p, moved) for moved in FRAMINGS for p in padded]))

    def search(self, pictures, k):
        """N pictures -> N lists of at most k hits (score 0..1, name, caption), best first, each entity once.

        A picture is compared as it is and, if its border is plain wall, as its salient part; the better score counts.
        """
        return [hits for at in range(0, len(pictures), 256) for hits in self._search([on_grey(p) for p in pictures[at:at + 256]], k)]

    def _search(self, pictures, k):
        parts = {i: part for i, p in enumerate(pictures) if (part := salient(p))}
        views = describe([*pictures, *parts.values()])
        scores = np.empty((len(views), len(self.entries)), np.float32)
        for at, rows in zip(range(0, len(self.entries), BLOCK), self.blocks):
            # (views, 9 * entities of the block) -> (views, entities): the best framing counts
            scores[:, at:at + BLOCK] = (views @ rows.T).reshape(len(views), len(FRAMINGS), -1).max(1)
        for i, part_scores in zip(parts, scores[len(pictures):]):
            np.maximum(scores[i], part_scores, out=scores[i])
        return [[(min(1.0, max(0.0, float(s[j]))), *self.entries[j]) for j in top(s, k)] for s in scores[:len(pictures)]]


def top(scores, k):
    """Indices of the k largest of (n,) scores, largest first; ties: the lower index first."""
    # The k-th largest of the maxima of blocks of 256 is a lower bound for the k-th best score; what reaches it is a
    # candidate
    peaks = np.maximum.reduceat(scores, np.arange(0, len(scores), 256)) if len(scores) else scores
    candidates = np.flatnonzero(scores >= (np.partition(peaks, -k)[-k] if len(peaks) > k else -np.inf))
    return candidates[np.argsort(-scores[candidates], kind="stable")[:k]].tolist()


# Function words that a query leaves out: "Brenna river" is also searched as "of Brenna", "in Brenna", .. "Brenna has",
# "of river", ..
LITTLE = [f"{w} {{}}" for w in ("of", "in", "the", "as", "its")] + ["{} has"]


def unaccented(text):
    """'Dröse' -> 'Drose'."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


class TextIndex:
    """Ranks passages by the weight of the features that they share with a query: words, word pairs and letter trigrams.
    Rare features weigh more, and features of a passage's title half as much again: "The largest neighbour of Peru is
    Brazil" is about Peru, not Brazil.

    Scores are not divided by length, as a cosine would be: passages are single sentences, and a long value must not
    push its fact down.

    It is an inverted index (feature -> passages that contain it): exact, and a query touches only passages that share a
    feature with it."""
    # weights of a word's trigrams (all together) and of a word pair; the cap on rarity, without which names alone would
    # decide; the factor for features of the title
    TRIGRAMS, PAIRS, RAREST, TITLE = 0.5, 0.3, 3.0, 1.5

    def __init__(self, passages):
        """`passages`: iterable of (title, text)."""
        self.passages, keys, weight, count = [], array("I"), array("f"), array("I")
        for title, text in passages:
            features = self._features(text) | {key: self.TITLE * w for key, w in self._features(title).items()}
            self.passages.append(text)
            keys.extend(features), weight.extend(features.values()), count.append(len(features))
        order, where = np.argsort(keys, kind="stable"), np.repeat(np.arange(len(count), dtype=np.int32), count)
        self.where, self.weight = where[order], np.array(weight, np.float32)[order]  # postings, sorted by feature
        # the features, sorted, and where the postings of each begin
        self.keys, begin = np.unique(np.array(keys, np.uint32)[order], return_index=True)
        self.bounds = np.append(begin, len(order))  # postings of feature i: bounds[i] .. bounds[i + 1]
        self.rarity = np.minimum(self.RAREST, np.log(1 + len(count) / np.diff(self.bounds))) ** 2

    def _features(self, text, query=False):
        """Text -> {crc32 of a feature: its weight}. A query also gets pairs of its words with the LITTLE words."""
        words, out = re.findall(r"[^\W_]+", unaccented(text.lower())), {}  # "Dröse" and "DROSE" are the same word
        for word in words:
            out |= _word(word, self.TRIGRAMS)
        pairs = [f"{a} {b}" for a, b in zip(words, words[1:])] + [f.format(w) for w in words for f in LITTLE if query]
        return out | {checksum(p): self.PAIRS for p in pairs}

    def search(self, queries, k):
        """N strings -> N lists of at most k (score, passage), best first. The score, 0..1, is the share of the query's
        weight that the passage covers; query features that occur in no passage do not count."""
        # each query once: rollouts of a group often ask the same
        found = {q: self._search(self._features(q, query=True), k) for q in set(queries)}
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
        postings, rarity = [slice(*self.bounds[i:i + 2]) for i in at], self.rarity[at]
        parts = [self.weight[p] * w for p, w in zip(postings, weights * rarity)]
        scores = np.bincount(np.concatenate([self.where[p] for p in postings]), np.concatenate(parts), len(self.passages))
        scores /= (weights * weights * rarity).sum()
        return [(min(1.0, float(scores[j])), self.passages[j]) for j in top(scores, k) if scores[j] > 0]


@lru_cache(maxsize=1 << 15)
def _word(word, share):
    """A word -> {key: weight}: the word itself, and its letter trigrams ('^re', 'red', 'ed$'), whose weights have
    length `share`."""
    trigrams = [f"^{word}$"[i:i + 3] for i in range(len(word))]
    # "~" marks trigrams: the trigram 'red' is not the word 'red'
    return {checksum(word): 1.0, **{checksum(f"{t}~"): share / len(trigrams) ** 0.5 for t in trigrams}}


def checksum(feature):
    return zlib.crc32(feature.encode(errors="replace"))  # unlike hash(), the same in every run


# -------------------------------------------------------------------------------------------------------------- toolbox

HITS = 2  # hits that a search shows

# What the environment replies. `picture`: the crop of a gaze, else None. `ok`: False after a malformed turn, a bad box
# or a failed tool
Observation = namedtuple("Observation", "text picture ok", defaults=(None, True))


class Toolbox:
    """Runs batches of actions. `counts`: calls of each action, and how many of all failed (bad boxes included). `rng`
    draws the failures."""

    def __init__(self, image_index, text_index, failure_rate=0.0, seed=0):
        self.image_index, self.text_index = image_index, text_index
        self.failure_rate, self.rng = failure_rate, random.Random(seed)
        self.counts = dict.fromkeys(("search", "glance", "gaze", "failed"), 0)

    def run(self, calls):
        """Run calls (action, argument, picture) and return their Observations, in order. One image search and one text
        search serve the whole batch.

        Calls are ("search", "words", _), ("glance", _, picture) or ("gaze", box, picture). Each draws once from `rng`.
        """
        out, views, queries = [Observation("search failed", ok=False) for _ in calls], {}, {}
        for i, (action, argument, picture) in enumerate(calls):
            self.counts[action] += 1
            works = self.rng.random() >= self.failure_rate
            try:
                view = crop(picture, argument) if action == "gaze" else picture
            except ToolError as reason:
                out[i] = Observation(f"bad box: {reason}", ok=False)
                continue
            if works and action == "search":
                queries[i] = argument
            elif works:
                views[i] = view
        for i, hits in zip(views, self._ask(self.image_index, views)):
            text = " | ".join(f"{min(99, int(100 * score))} {name}: {caption}" for score, name, caption in hits)
            out[i] = Observation(text or "nothing found", views[i] if calls[i][0] == "gaze" else None)
        for i, hits in zip(queries, self._ask(self.text_index, queries)):
            out[i] = Observation(" | ".join(passage for _, passage in hits) or "nothing found")
        self.counts["failed"] += sum(not o.ok for o in out)
        return out

    def _ask(self, index, wanted):
        """The hits for each value of a dict; no hits if the index cannot be reached (OSError, from a network or a
        disk). The calls then stay "search failed"."""
        try:
            return index.search(list(wanted.values()), HITS)
        except OSError as e:
            # tell the user: what is measured now is not the policy alone
            tqdm.write(f"{len(wanted)} searches failed: {e}", file=sys.stderr)
            return []


PASSAGES = (  # templates of facts, value last. They vary, so that the policy has to find the value in what it reads
    "In {n} the {r} is {v}.", "{n} has one {r}: {v}.", "As for {n}, its {r} is {v}.", "People of {n} say of their {r}: {v}.",
    "Chronicles of {n} tell that the {r} is {v}.")
CHATTER = ("Travellers praise the bridges of {n}.", "The market of {n} opens at dawn.", "{n} was rebuilt after a great fire.",
           "Maps often misplace {n}.", "Nobody agrees how to pronounce {n}.")


def worded(rng, *facts):
    """Facts (name, relation, value) as the text index lists its passages: sentences, each in a random wording."""
    return " | ".join(rng.choice(PASSAGES).format(n=name, r=relation, v=value) for name, relation, value in facts)


def passages(world, late=False):
    """Every fact of a data.World as one sentence in a random wording, and one sentence of chatter per entity: list of
    (entity's name, sentence). Entities of the split `late` are left out, unless `late`."""
    hidden, out = set() if late else set(world.splits["late"]), []
    for e in (e for name, e in world.entities.items() if name not in hidden):
        rng = random.Random(f"{world.seed}/{e.name}")
        sentences = [worded(rng, (e.name, *fact)) for fact in e.facts.items()] + [rng.choice(CHATTER).format(n=e.name)]
        out += [(e.name, sentence) for sentence in sentences]
    return out


def make_toolbox(world, failure_rate=0.0, seed=0, late=False):
    """Tools over everything that a data.World knows at training time (`late`: and what was added after it)."""
    pictured = tqdm(world.pictured(*world.splits if late else ()), desc="image index", leave=False)
    images = ImageIndex((e.name, e.blazon, e.picture(96)) for e in pictured)
    return Toolbox(images, TextIndex(tqdm(passages(world, late), desc="text index", leave=False)), failure_rate, seed)


# ---------------------------------------------------------------------------------------------------------------- turns

ACTIONS = ("answer", "search", "glance", "gaze")


@dataclass
class Turn:
    """One action and its result. kind: one of ACTIONS, or "malformed"."""
    kind: str
    argument: object = None  # the answer, the query, the box, or the reason why the turn is malformed
    thought: str = ""
    observation: str = ""
    ok: bool = True  # False if the turn was malformed, the box bad, or the tool failed


TURN = re.compile(r"(?:<think>([^<>]*)</think>)?\s*<(answer|search|glance|gaze)>([^<>]*)</\2>\s*")


def parse(text):
    """Parse the text of one turn, without its stop token. Never raises: anything that is not exactly one action becomes
    a malformed Turn with the reason. (Text between the tags of a glance is ignored.)"""
    if not (match := TURN.fullmatch(text)):
        return Turn("malformed", "one optional thought, then exactly one action")
    thought, kind, argument = (part.strip() if part else "" for part in match.groups())
    if kind == "gaze":
        if not re.fullmatch(r"[0-9]{1,2}(\s+[0-9]{1,2}){3}", argument):
            return Turn("malformed", "a gaze needs four whole numbers 0 to 99", thought)
        argument = tuple(map(int, argument.split()))
    return Turn(kind, argument, thought)


# ------------------------------------------------------------------------------------------- trajectory and environment

def normalise(text):
    """Reduce a text to what counts in an answer: not case, accents, punctuation, articles and extra blanks."""
    # Mc, Mn: vowel signs, as of Hindi, are no accents; but the selectors behind an emoji are nothing
    text = "".join(c if c.isalnum() or unicodedata.category(c) in ("Mc", "Mn") else " " for c in re.sub("[\ufe00-\ufe0f]", "", unaccented(text.casefold())))
    return " ".join(w for w in text.split() if w not in ("the", "a", "an"))


def exact_match(answer, gold):
    """True if the normalised answer equals a normalised gold answer. Never a substring: an empty answer or 'A or B or
    C' is wrong. (Signs do not count: "5" matches "-5".)"""
    answer = normalise(answer)
    return bool(answer) and answer in map(normalise, gold)


@dataclass
class Trajectory:
    """One episode: parallel lists over its tokens, and the pictures that fill the image placeholders, in order."""
    question: object  # data.Question
    ids: list = field(default_factory=list)
    # per token: True if it is to be learnt (the policy's own), False if written by the environment or only shown
    trained: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)  # of sampled tokens under the sampling policy; 0 elsewhere
    pictures: list = field(default_factory=list)  # uint8 (3, S, S)
    turns: list = field(default_factory=list)
    lesson: list = field(default_factory=list)  # only in lessons of the base model: (topic, response) of each question

    def observe(self, ids, *pictures):
        """Append tokens that are not trained, and the pictures of their image placeholders."""
        self.ids += ids
        self.trained += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.pictures += pictures

    def act(self, ids, logprobs=None):
        """Append tokens that are trained."""
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
    """Picture -> uint8 (3, S, S): all that the model sees of it."""
    return np.asarray(picture.convert("RGB").resize((side, side), Image.BOX if min(picture.size) > side else Image.BILINEAR)).transpose(2, 0, 1)


class Environment:
    """Builds prompts, runs tools and appends observations. vocabulary: model.Vocabulary. config: model.ModelConfig, for
    the size of pictures. withhold: tool results are hidden (a control). gaze=False: <gaze> cannot be sampled."""

    def __init__(self, vocabulary, toolbox, config, withhold=False, gaze=True):
        self.v, self.toolbox, self.side, self.withhold, self.may_gaze = vocabulary, toolbox, config.picture, withhold, gaze
        self.image_ids = [vocabulary.id["<image>"]] * config.image_tokens
        # per token id: may the policy sample it? Those before <stop> are written by the environment only (model.TAGS)
        self.sampleable = [i >= vocabulary.id["<stop>"] and (gaze or i != vocabulary.id["<gaze>"]) for i in range(vocabulary.size)]

    def prompt(self, question, picture=None):
        """A new trajectory: <bos> picture (if there is one) question <sep>."""
        t, pictures = Trajectory(question), [] if picture is None else [picture]
        t.observe([self.v.id["<bos>"], *self.image_ids * len(pictures), *self.v.encode(question.text), self.v.id["<sep>"]], *pictures)
        return t

    def step(self, trajectories, turns, pictures):
        """Append each parsed turn to `turns` (its tokens are in `ids` already) and, unless it is an answer, its
        observation. Tools are called in one batch. `pictures`: the whole pictures, at full size."""
        calls = {i: (turn.kind, turn.argument, pictures[i]) for i, turn in enumerate(turns) if turn.kind in ("search", "glance", "gaze")}
        results = dict(zip(calls, self.toolbox.run([*calls.values()])))
        for i, (t, turn) in enumerate(zip(trajectories, turns)):
            t.turns.append(turn)
            if turn.kind == "answer":
                continue
            result = results.get(i, Observation(f"malformed: {turn.argument}", ok=False))
            if self.withhold:  # control: the action runs, but its result is not shown
                result = Observation("", ok=result.ok)
            turn.observation, turn.ok = result.text, result.ok
            self.reply(t, result.text, result.picture)

    def reply(self, t, text, picture=None):
        """Append an observation: <obs> crop (if there is a picture) text </obs>."""
        crops = [to_array(picture, self.side)] if picture else []
        t.observe([self.v.id["<obs>"], *self.image_ids * len(crops), *self.v.encode(text), self.v.id["</obs>"]], *crops)


# --------------------------------------------------------------------------------------- files: the user's and our own

class WorldError(ValueError):
    """A world that cannot be used. The message names file, line and remedy."""


LONGEST = 100_000  # characters per line. A file may be of any size, as only one line is held at a time


def lines(path, optional=False):
    """Yield ("file:line", text) for every line that is not blank, reading one at a time. WorldError if the file cannot
    be read; an `optional` file may be missing."""
    if optional and not path.is_file():
        return
    try:
        if not path.resolve().is_relative_to(path.parent.resolve()):
            raise WorldError(f"{path}: links to a file outside its folder. Copy the file into it")
        with open(path, encoding="utf-8-sig") as f:
            for n, line in enumerate(iter(lambda: f.readline(LONGEST + 1), ""), 1):
                if len(line) > LONGEST:
                    raise WorldError(f"{path}:{n}: longer than {LONGEST:,} characters. Write one JSON object per line")
                if line.strip():
                    yield f"{path}:{n}", line
    except (OSError, UnicodeDecodeError, RuntimeError) as e:  # RuntimeError: a link to itself
        raise WorldError(f"{path}: cannot be read ({e}). A folder world needs this file, in UTF-8") from None


def as_row(where, line):
    """Parse a line as a JSON object. WorldError if it is not one."""
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:  # also half a character ("\\ud800"), or thousands of brackets
        raise WorldError(f"{where}: not valid JSON ({e}). Correct or remove that line") from None
    if not isinstance(row, dict):
        raise WorldError(f"{where}: expected a JSON object, e.g. {{\"name\": ..., \"image\": ...}}")
    return row


def image_path(root, image, where):
    """Resolve the path of an image. WorldError if there is no such file, or if it lies outside the world's folder."""
    if not isinstance(image, str) or not image:
        raise WorldError(f"{where}: no 'image'. Every entity needs a picture, as a path inside {root}")
    try:
        path = (root / image).resolve()
        inside, there = path.is_relative_to(root.resolve()), path.is_file()
    except (OSError, ValueError, RuntimeError) as e:  # too long, a zero byte, a link to itself
        raise WorldError(f"{where}: image {image[:80]!r} is not a valid path ({e}). Name a file inside {root}") from None
    if not inside:
        raise WorldError(f"{where}: image {image!r} lies outside {root}. Copy it into the folder")
    if not there:
        raise WorldError(f"{where}: image {image!r} does not exist in {root}. Add the file or remove the line")
    return path


def folder_name(path):
    """The name of a folder, also of "." and of a link (then of what it leads to)."""
    return os.path.basename(os.path.realpath(path))  # Path.resolve would raise on a link to itself


# Rank of this process, number of processes, and of those on this machine, if torchrun has started them (model.share);
# else the first and only one
RANK, PROCESSES, PROCESSES_HERE = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")) if "TORCHELASTIC_RUN_ID" in os.environ else (0, 1, 1)


def atomic(path, write):
    """Call write(temporary path), flush it to disk, then rename it to `path`: a reader sees the old file or the new
    one, never half. Only rank 0 writes."""
    if RANK:
        return
    temporary = Path(path).parent / f".{Path(path).name}.{os.getpid()}.tmp"
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
    """Lock a file for this process, until the returned connection is closed or the process ends. Uses SQLite's lock,
    which is portable. Creates the folder if it is missing; only rank 0 locks. BlockingIOError (an OSError) if the file
    is still locked after `wait` seconds, or not writable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = sqlite3.connect(":memory:" if RANK else path, timeout=wait, isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
        return lock
    except sqlite3.Error as e:
        raise BlockingIOError(f"{path}: {e}. Another run of this stage is at work in this folder, or it cannot be written to: wait, or give this run folders of its own with --out and --results") from None


def read_rows(path, columns=()):
    """Rows of a csv file as dicts; [] if there is no such file. WorldError if it cannot be read, has other `columns`, a
    row of another length, or a decimal comma."""
    if not path.is_file():
        return []
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
    except (UnicodeDecodeError, csv.Error) as e:
        raise WorldError(f"{path}: cannot be read ({e}). Correct it, or move it away") from None
    if bad := next((n for n, r in enumerate(rows, 2) if None in r or None in r.values() or any(re.fullmatch(r"-?\d+,\d+([eE]-?\d+)?", x) for k, x in r.items() if k != "world")), 0):
        raise WorldError(f"{path}:{bad}: more or fewer values than the first line has names, or a number with a decimal comma. Correct it, or move the file away")
    if rows and columns and [*rows[0]] != [*columns]:
        raise WorldError(f"{path}: its columns are {','.join(rows[0])}, not {','.join(columns)}. Correct it, or move it away")
    return rows


def write_rows(path, rows, columns, key=()):
    """Write rows (dicts) as a csv with these columns. With key columns, existing rows whose key is not among the new
    ones are kept; without, the file is replaced. With a key, concurrent writers take turns."""
    key_of = lambda r: tuple(str(r[k]) for k in key)
    with closing(locked(path.with_suffix(".lock"), wait=60)) if key else nullcontext():
        old, new_keys, text = read_rows(path, columns) if key else [], {key_of(r) for r in rows}, io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([r for r in old if key_of(r) not in new_keys] + rows)
        atomic(path, lambda p: p.write_text(text.getvalue(), encoding="utf-8"))


def flags(kind, choices, ranges, about, argv=None):
    """Parse a command line into the dataclass `kind`: every field is a flag, its comment is the help. Strings that
    have `choices` must be among them, numbers within `ranges` (default: 1 to a million, or 0.0 to 1.0). A mistake is
    answered in one line, with exit code 2; for an unknown flag it names the nearest one."""
    # no usage line: it would bury an error under 25 lines
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
    """Peak memory of this process in MB; "" on systems that do not report it (Windows)."""
    try:
        import resource
    except ImportError:
        return ""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)
