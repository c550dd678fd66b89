"""The synthetic world: entities (towns with coats of arms), scenes (1 to 10 of them on a wall), questions about scenes.

From the paper: questions about a picture that need zero or more searches.
Here instead: an invented world of *heraldry* (the coats of arms are drawn by code), or any *folder world* (a user's
    pictures and facts).
Why: the invented world is unlimited, offline and long-tail by construction, and every box, fact and necessary search is
    known exactly. A question carries what is known about it (targets, phrases, chain); the scripted expert in gog.py
    relies on it.

Glossary
    look      colour and outline: visible in the shrunken picture ("red round")
    detail    visible only in a crop ("2 gold crowns")
    tincture  a heraldic colour. Charge: the figures on a shield. Ordinary: a stripe across it
    blazon    look, ordinary and detail in words: the caption of an image hit
    target    an object that a question refers to
    chain     the relations to follow from the target; questions of kind hopN have N
    kind      of a question (hop2), of a referring expression (order), or of a turn (gaze)
    setting   the kind of wall: how many objects, how large, with look-alikes or not (SETTINGS)
    mix       a list of (kind, setting, weight) from which questions are drawn
    slip      a deliberate mistake of the expert: shown to the policy, but not trained
    trajectory, rollout   all turns about one question; the same, sampled from a policy
    hit       one result of an image search: "score name: blazon"
    lesson    a text, mostly with a picture, that the base model learns from (grpo.py, second half); an errand is one
              that follows a chain, without a picture

Reading order: names -> arms -> entities and worlds -> scenes -> referring expressions -> questions -> folder worlds
(skip at first). The helpers imported from tools.py, the next file, need not be read first. Files: `lines`, `as_row`,
`image_path`, `folder_name`, `atomic`. Pictures: `describe` (one vector per picture; dot product = similarity),
`on_grey` (transparent parts become grey), `to_pixels`. Text: `normalise`, `unaccented`.

Boxes are (x0, y0, x1, y1), integers 0..99, in percent of the picture's width and height. Policy, expert and scenes use
no other format. (Pixels appear only in crops, the image index and drawing; fractions 0..1 only in the labels that train
the vision encoder, "the eyes".)
"""
import argparse
import colorsys
import math
import random
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from tools import WorldError, as_row, atomic, describe, folder_name, image_path, lines, normalise, on_grey, to_pixels, unaccented

ALIKE = 0.98  # from this cosine of their descriptors on, an image search cannot tell two pictures apart
LONGEST_SIDE = 1024  # pixels; a larger user picture is shrunk when it is read
SCENE_PX = 384  # side of a scene in pixels. The model sees it much smaller; a gaze crops from these pixels

# ---------------------------------------------------------------------------------------------------------------- names

ONSETS = "b br c d dr f g gl h k l m n p r s st t th tr v w z".split()
VOWELS = "a e i o u a e i o u ei au é ö".split()
CODAS = "l n r s nd rn th x lm sk".split() + [""] * 8
CRAFTS_A, CRAFTS_B = "blue red fine old salt river winter silk iron amber stone smoked".split(), "glass bells cloth lace wine boats clocks honey paper knives cheese pots".split()


def word(rng, syllables=2):
    """An invented capitalised word, e.g. 'Draulen'."""
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables)).capitalize()


def town_name(rng):
    form = rng.random()
    return word(rng) if form < 0.5 else f"{word(rng)} {word(rng, 1)}" if form < 0.85 else f"{rng.choice(['New', 'Old', 'Saint', 'Upper'])} {word(rng)}"


def person_name(rng):
    return f"{word(rng, 1)} {word(rng)}" + (f" {rng.choice(['II', 'III', 'IV', 'V'])}" if rng.random() < 0.3 else "")


# relation -> how to draw an invented value. With few relations a policy would choose among them instead of reading the
# question
VALUES = {**dict.fromkeys("ruler patron governor mayor bishop founder poet painter champion judge".split() + ["first queen", "last duke", "town crier"], person_name),
          **dict.fromkeys("river harbour lake hill forest bridge valley".split() + ["old gate", "main square", "sacred well"], word),
          **dict.fromkeys(("craft", "chief export", "rarest import"), lambda r: f"{r.choice(CRAFTS_A)} {r.choice(CRAFTS_B)}"),
          **dict.fromkeys(("founding year", "year of fire", "last siege"), lambda r: str(r.randint(800, 1899))),
          **dict.fromkeys(("towers", "number of wells", "number of mills"), lambda r: str(r.randint(2, 98))),
          **dict.fromkeys(("anthem", "dance"), lambda r: f"{r.choice(['Song', 'March', 'Hymn'])} of {word(r)}")}
# Facts of every town. It also has a region, four more of VALUES and two of TOWN_LINKS, drawn at random
EVERY_TOWN_HAS = ("ruler", "towers")
# Relations that lead to another town, and from a region back to a town. One word each: thoughts copy "river of the
# twin" from the question word by word, and a longer name would make it harder to see which relation comes next
TOWN_LINKS, REGION_LINKS = ("twin", "rival", "ally", "neighbour"), ("capital", "stronghold")

# ----------------------------------------------------------------------------------------------------------------- arms

TINCTURES = {"red": (204, 32, 44), "blue": (36, 74, 190), "green": (32, 138, 66), "purple": (132, 52, 150), "black": (28, 28, 34), "gold": (238, 190, 40), "white": (244, 244, 240)}
METALS = ("gold", "white")  # the rule of tincture: metal on colour or colour on metal, so that charges are legible


def arc(x, y, rx, ry, start=0, end=360, n=36):
    """n + 1 points on an ellipse around (x, y), from angle `start` to `end` (degrees, clockwise because y points
    down)."""
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in (math.radians(start + (end - start) * i / n) for i in range(n + 1))]


# polygons in the unit square
OUTLINES = {"heater": [(0, 0), (1, 0), (1, .5), (.86, .76), (.5, 1), (.14, .76), (0, .5)], "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
            "diamond": [(.5, 0), (1, .5), (.5, 1), (0, .5)], "banner": [(0, 0), (1, 0), (1, 1), (0, 1)], "round": arc(.5, .5, .5, .5)}
ASPECT = {"heater": 0.86, "diamond": 0.9, "banner": 1.5}  # width / height; 1 if not listed
# stripes as polygons in the unit square, narrow so that the tincture stays visible in the shrunken picture
ORDINARIES = {"": None, "chief": [(0, 0), (1, 0), (1, .17), (0, .17)], "base": [(0, .83), (1, .83), (1, 1), (0, 1)], "bordure": None,
              "pale": [(.42, 0), (.58, 0), (.58, 1), (.42, 1)], "fess": [(0, .42), (1, .42), (1, .58), (0, .58)], "bend": [(0, 0), (.16, 0), (1, .84), (1, 1), (.84, 1), (0, .16)]}
# polygons in [-1, 1]^2, y down
CHARGES = {"star": [(0, -1), (.25, -.32), (.95, -.3), (.4, .13), (.6, .85), (0, .43), (-.6, .85), (-.4, .13), (-.95, -.3), (-.25, -.32)],
           "cross": [(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3), (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)],
           "tower": [(-.7, -1), (-.35, -1), (-.35, -.6), (-.17, -.6), (-.17, -1), (.17, -1), (.17, -.6), (.35, -.6), (.35, -1), (.7, -1), (.7, 1), (.25, 1), (.25, .3), (-.25, .3), (-.25, 1), (-.7, 1)],
           "tree": [(0, -1), (.8, .4), (.2, .4), (.2, 1), (-.2, 1), (-.2, .4), (-.8, .4)], "fish": [(-1, -.6), (-.5, -.1), (.1, -.55), (.7, -.35), (1, 0), (.7, .35), (.1, .55), (-.5, .1), (-1, .6)],
           "crown": [(-1, -.7), (-.5, 0), (0, -.9), (.5, 0), (1, -.7), (.85, .8), (-.85, .8)], "ring": arc(0, 0, 1, 1) + arc(0, 0, .5, .5, 360, 0), "crescent": arc(0, 0, 1, 1, -35, 215) + arc(0, -.4, .82, .7, 190, -10)}
# number of charges -> (x, y, radius) of each, in the unit square
PLACES = {1: [(.5, .5, .28)], 2: [(.28, .5, .18), (.72, .5, .18)], 3: [(.29, .32, .16), (.71, .32, .16), (.5, .72, .16)]}


@dataclass(frozen=True)
class Arms:
    """A coat of arms. Outline and tincture are visible in the shrunken picture; the rest needs a closer look."""
    outline: str
    tincture: str
    ordinary: str
    ordinary_tincture: str
    charge: str
    charge_tincture: str
    count: int

    @classmethod
    def draw(cls, rng, **fixed):
        """Draw random arms. `fixed` presets any part (e.g. outline and tincture, to make a look-alike)."""
        tincture = fixed.get("tincture") or rng.choice(list(TINCTURES))
        contrast = [t for t in TINCTURES if (t in METALS) != (tincture in METALS)]
        charge_tincture = rng.choice(contrast)
        ordinary, other = fixed.get("ordinary", rng.choice(list(ORDINARIES))), rng.choice([t for t in contrast if t != charge_tincture])
        ground = dict(outline=rng.choice(list(OUTLINES)), tincture=tincture, ordinary=ordinary, ordinary_tincture=other if ordinary else tincture)
        return cls(**ground | dict(charge=rng.choice(list(CHARGES)), charge_tincture=charge_tincture, count=rng.choice((1, 2, 3))) | fixed)

    def in_words(self):
        """In words: (look, ordinary or "", detail), e.g. ("red round", "white bend", "2 gold crowns")."""
        return (f"{self.tincture} {self.outline}", f"{self.ordinary_tincture} {self.ordinary}" if self.ordinary else "",
                f"{self.count} {self.charge_tincture} {self.charge}" + {"fish": "", "cross": "es"}.get(self.charge, "s") * (self.count > 1))

    def picture(self, height):
        """RGBA picture, `height` pixels high, transparent outside the outline (drawn at twice the size, then
        shrunk)."""
        h, w = 2 * height, round(2 * height * ASPECT.get(self.outline, 1))
        outline = [(x * (w - 1), y * (h - 1)) for x, y in OUTLINES[self.outline]]
        art, mask = Image.new("RGB", (w, h), TINCTURES[self.tincture]), Image.new("L", (w, h))
        ImageDraw.Draw(mask).polygon(outline, fill=255)
        pen = ImageDraw.Draw(art)
        if self.ordinary == "bordure":
            pen.line(outline + outline[:2], fill=TINCTURES[self.ordinary_tincture], width=round(.14 * min(w, h)), joint="curve")
        elif self.ordinary:
            pen.polygon([(x * w, y * h) for x, y in ORDINARIES[self.ordinary]], fill=TINCTURES[self.ordinary_tincture])
        squeeze = 0.72 if self.outline in ("diamond", "heater") else 0.9
        for x, y, r in PLACES[self.count]:
            x, y, r = w * (.5 + (x - .5) * squeeze), h * (.5 + (y - .5) * squeeze), r * squeeze * min(w, h) * 1.15
            pen.polygon([(x + r * px, y + r * py) for px, py in CHARGES[self.charge]], fill=TINCTURES[self.charge_tincture], outline=(20, 20, 20))
        pen.line(outline + outline[:1], fill=(20, 20, 20), width=max(2, h // 40))
        art.putalpha(mask)
        return art.resize((max(1, w // 2), height), Image.BOX)


# -------------------------------------------------------------------------------------------------- entities and worlds

@dataclass(frozen=True)
class Entity:
    """Something with a name, facts {relation: value} and, unless it is a region, a picture: drawn from `arms`, or the
    file at `path`."""
    name: str
    facts: dict = field(hash=False)
    arms: Arms | None = None
    path: Path | None = None
    look: str = ""  # visible in the shrunken picture, e.g. 'red round'
    detail: str = ""  # visible only in a crop, e.g. '2 gold crowns'
    blazon: str = ""  # the caption that the image index returns; contains look and detail
    aspect: float = 1.0  # width / height

    @classmethod
    def with_arms(cls, name, facts, arms):
        look, ordinary, detail = arms.in_words()
        return cls(name, facts, arms, None, look, detail, ", ".join(filter(None, (look, ordinary, detail))), ASPECT.get(arms.outline, 1.0))

    def picture(self, height):
        return self.arms.picture(height) if self.arms else _load(self.path).resize((max(1, round(height * self.aspect)), height), Image.BILINEAR)


@dataclass
class World:
    """`entities`: {name: Entity}. `splits`: {split: names of entities with a picture}; they are disjoint. The split
    "late" (added after training) is used by the suite `live` only."""
    name: str
    noun: str
    entities: dict
    splits: dict
    seed: int = 0
    # a user's questions about pictures of their own: every other one joins RL's pool, the rest are the suite "own"
    own: tuple = ()

    def pictured(self, *splits):
        """The entities of some splits (default: train, dev, test)."""
        return [self.entities[n] for s in splits or ("train", "dev", "test") for n in self.splits[s]]


def split_names(names, rng):
    """Shuffle names and split them: 55 % train, 10 % dev, 28 % test, 7 % late."""
    names = list(names)
    rng.shuffle(names)
    a, b, c = (round(len(names) * f) for f in (0.55, 0.65, 0.93))
    b = max(b, a + 1)  # with ten names both would round to 6
    return {"train": names[:a], "dev": names[a:b], "test": names[b:c], "late": names[c:]}


def heraldry(seed=0, towns=3000):
    """The default world: `towns` invented towns with distinct names and arms, in `towns / 25` regions."""
    rng = random.Random(f"heraldry/{seed}")
    distinct = lambda make, n: list(dict.fromkeys(make(rng) for _ in range(4 * n)))[:n]
    names, shields = distinct(town_name, towns), distinct(Arms.draw, towns)
    regions = [r for r in distinct(lambda g: f"{word(g)} {g.choice(['Vale', 'March', 'Coast', 'Heath'])}", max(2, towns // 25)) if r not in names]
    draw_facts = lambda *keys: {k: VALUES[k](rng) for k in (*keys, *rng.sample([k for k in VALUES if k not in keys], 4))}
    entities = {n: Entity.with_arms(n, {**draw_facts(*EVERY_TOWN_HAS), "region": rng.choice(regions)}, a) for n, a in zip(names, shields)}
    splits = split_names(names, rng)
    # Links stay within a split. A region's capital may be in any split but `late`: in training, a passage may show the
    # name and facts of a test town, but no question is about its arms
    for n, group in ((n, group) for group in splits.values() for n in group):
        entities[n].facts.update({link: rng.choice([t for t in group if t != n] or [n]) for link in rng.sample(TOWN_LINKS, 2)})
    capitals = splits["train"] + splits["dev"] + splits["test"]
    entities |= {r: Entity(r, draw_facts() | {link: rng.choice(capitals) for link in REGION_LINKS}) for r in regions}
    return World("heraldry", "shield", entities, splits, seed)


def with_strangers(world, n):
    """The same world with more towns in the index, as distractors: they join the training split, so no held-out
    question is about them. Of `n` towns drawn, those with a name and arms of their own are added: some 6,200 of 10,000
    and 23,000 of 100,000, because only 38,400 different arms exist."""
    rng, taken_arms = random.Random(f"strangers/{world.seed}"), {e.arms for e in world.pictured(*world.splits)}
    # values are taken, too: a town named like a river would turn that river into a link
    taken_names = {*world.entities, *(value for e in world.entities.values() for value in e.facts.values())}
    drawn = {arms: name for arms, name in ((Arms.draw(rng), town_name(rng)) for _ in range(n)) if arms not in taken_arms and name not in taken_names}
    added = {name: Entity.with_arms(name, {k: VALUES[k](rng) for k in rng.sample(list(VALUES), 6)}, arms) for arms, name in drawn.items()}
    return replace(world, entities=world.entities | added, splits=world.splits | {"train": [*world.splits["train"], *added]})


# --------------------------------------------------------------------------------------------------------------- scenes

PLASTERS = ((14, 4, -14), (0, 0, 0), (-8, 0, 10), (8, -2, -8), (-6, 6, -4))


@dataclass(frozen=True)
class Scene:
    """Entities on a wall. `boxes[i]` frames `entities[i]`. (A user's photo has no entities, and at most one box.) The
    picture is drawn from `seed` on demand (same seed, same bytes); the last 512 pictures are cached."""
    entities: tuple
    boxes: tuple
    noun: str
    seed: int
    photo: Path | None = None  # a user's own picture instead of a drawn wall

    def picture(self, px=SCENE_PX):
        """RGB, px square (a photo keeps its own size, up to LONGEST_SIDE). The picture is shared: draw on a copy."""
        return on_grey(_load(self.photo)) if self.photo else _drawn(self, px)


@lru_cache(maxsize=512)  # demonstrations and suites use the same scenes again and again
def _drawn(scene, px):
    """Draw the wall of a scene and the objects on it."""
    rng = random.Random(scene.seed)
    light = rng.randint(110, 200)
    plaster = tuple(light + shift for shift in rng.choice(PLASTERS))
    wall = Image.new("RGB", (px, px), plaster)
    pen = ImageDraw.Draw(wall)
    course, mortar = px // rng.randint(6, 14), tuple(c - 16 for c in plaster)
    for y in range(0, px, course):  # courses of stones, each stone in a tone of its own
        for x in range(-rng.randint(0, course), px, 2 * course):
            tone = rng.randint(-9, 9)
            pen.rectangle((x, y, x + 2 * course, y + course), fill=tuple(c + tone for c in plaster), outline=mortar)
    for e, box in zip(scene.entities, scene.boxes):
        x0, y0, x1, y1 = to_pixels(box, wall.size)
        art = e.picture(y1 - y0).resize((x1 - x0, y1 - y0), Image.BILINEAR)
        wall.paste(art, (x0, y0), art)
    return wall


def iou(a, b):
    """Intersection over union of two percent boxes, 0..1."""
    area = lambda box: max(0, box[2] - box[0]) * max(0, box[3] - box[1])
    both = area((*map(max, a[:2], b[:2]), *map(min, a[2:], b[2:])))
    return both / max(1, area(a) + area(b) - both)


def hang(entities, noun, rng, cells=3, sizes=(0.62, 0.95)):
    """Place entities on a wall: a random cell each of a `cells` x `cells` grid, with a little jitter. `sizes`: the
    smallest and largest of three sizes, as the longer side's share of the cell."""
    pitch, boxes = 99 / cells, []
    for e, cell in zip(entities, rng.sample(range(cells * cells), len(entities))):
        long = pitch * rng.choice((sizes[0], sum(sizes) / 2, sizes[1]))
        w, h = (long, long / e.aspect) if e.aspect > 1 else (long * e.aspect, long)
        w, h = max(3, w), max(3, h)  # percent: `crop` refuses a narrower box
        slack = lambda side: (pitch - side) * rng.uniform(0.35, 0.65)
        x, y = cell % cells * pitch + slack(w), cell // cells * pitch + slack(h)
        boxes.append((round(x), round(y), round(x + w), round(y + h)))
    return Scene(tuple(entities), tuple(boxes), noun, rng.getrandbits(48))


# ------------------------------------------------------------------------------------------------ referring expressions

# How an object hangs among all others: from left to right ("across"), from top to bottom ("down"), and by size. "":
# nothing unambiguous to say
ACROSS, DOWN, SIZE = ("", "leftmost", "rightmost"), ("", "topmost", "lowest"), ("", "largest", "smallest")
ZONES = ("top left", "top middle", "top right", "middle left", "centre", "middle right", "bottom left", "bottom middle", "bottom right")
SIDES = {"left of": -1, "right of": 1, "above": -1j, "below": 1j}  # directions x + iy, y points down


def layout(scene):
    """Describe how each object hangs among the others: one dict per object. "across", "down", "size": one of the words
    above. "zone": index into ZONES. "left of" and the other SIDES, if they apply: index of the object beside it.

    i is "left of" j if it is the only object at most 45 left of j and at most 45 out of line, and if it is more than 18
    left of j and at most 14 out of line (percent of the picture, between centres)."""
    n, boxes = len(scene.boxes), scene.boxes
    centre = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in boxes]
    entries = [dict(across="", down="", size="", zone=min(2, int(y / 33.4)) * 3 + min(2, int(x / 33.4))) for x, y in centre]
    area = [-math.log((b[2] - b[0]) * (b[3] - b[1])) for b in boxes]  # ascending order: largest first
    for dimension, words, values, gap in zip(("across", "down", "size"), (ACROSS, DOWN, SIZE), (*zip(*centre), area), (7, 7, 0.4)):
        order = sorted(range(n), key=values.__getitem__)
        # the first and the last in this order, if the next one is far enough away (7 %, or 0.4 in log area)
        for word, (i, *rest) in zip(words[1:], (order, order[::-1])):
            if rest and abs(values[i] - values[rest[0]]) > gap:
                entries[i][dimension] = word
    for j in range(n):
        for side, toward in SIDES.items():
            # offsets from j; dividing by the direction rotates that side onto the positive real axis: real = distance,
            # imag = out of line
            offsets = [(complex(*c) - complex(*centre[j])) / toward for c in centre]
            nearby = [i for i, d in enumerate(offsets) if 0 < d.real <= 45 and abs(d.imag) <= 45]
            if len(nearby) == 1 and offsets[nearby[0]].real > 18 and abs(offsets[nearby[0]].imag) <= 14:
                entries[nearby[0]][side] = j
    return entries


def colours(e):
    """The colours of an entity, largest area first. A shield has one, its tincture; a flag has all that its caption
    names."""
    return [e.look.split()[0], *(c for c in e.detail.split(" and ") if c in TINCTURES)]


def single_out(scene):
    """Return a function of words (colour, shape, or both): do they fit exactly one object of the scene?"""
    features = [{*colours(e), e.look.split()[1]} for e in scene.entities]
    return lambda words: sum(set(words.split()) <= f for f in features) == 1


def references(scene):
    """Unambiguous expressions for each object, at most one of each kind: list over objects of {kind: expression}.
    Expressions come without an article ("red round shield")."""
    noun, looks, entries = scene.noun, [e.look for e in scene.entities], layout(scene)
    expressions, is_unique = [{} for _ in looks], single_out(scene)
    for mine, e, entry in zip(expressions, scene.entities, entries):
        if is_unique(e.look):
            mine["look"] = f"{e.look} {noun}"
        elif looks.count(e.look) > 1 and sum((o.look, o.detail) == (e.look, e.detail) for o in scene.entities) == 1:
            mine["detail"] = f"{e.look} {noun} with {e.detail}"
        mine |= {kind: f"{part} {noun}" for kind, part in zip(("colour", "shape"), e.look.split()) if is_unique(part)}
        mine |= {kind: f"{entry[side]} {noun}" for kind, side in (("order", "down"), ("order", "across"), ("size", "size")) if entry[side]}
        if len(looks) > 1 and sum(o["zone"] == entry["zone"] for o in entries) == 1:
            mine["position"] = f"{noun} at the {ZONES[entry['zone']]}"
        if neighbour := beside(looks, entry, is_unique):
            mine["neighbour"] = f"{noun} {neighbour[0]} the {looks[neighbour[1]]} {noun}"
    return expressions


def beside(looks, entry, is_unique):
    """(side, j) if an object hangs on this side of object j, whose look is unique; None if there is no such j. `entry`:
    of the object, from `layout`; `is_unique`: from `single_out`."""
    return next(((side, entry[side]) for side in SIDES if side in entry and is_unique(looks[entry[side]])), None)


# ------------------------------------------------------------------------------------------------------------ questions

@dataclass(frozen=True)
class Question:
    """A question and what the expert needs to answer it; the policy sees only scene and text.

    `targets`: indices of the scene's objects to be found. `phrases`: what to look for, one per target, in the words of
    a blazon. `chain`: the relations to follow, first one first. `pointed_by`: the kind of referring expression, one per
    target."""
    text: str
    answers: tuple
    scene: Scene
    kind: str  # colour, shape, count | name, hop1 .. hop5, compare | own
    setting: str = "own"
    targets: tuple = ()
    phrases: tuple = ()
    chain: tuple = ()
    pointed_by: tuple = ()

    @property
    def search_free(self):
        return self.kind in VISUAL


VISUAL = ("colour", "shape", "count")  # kinds that need no search
# The training mixes are below; the evaluation mixes are in gog.py (SUITES, DEV_MIX)
# SETTINGS, setting: (least, most objects, cells per side of the grid, sizes as in `hang`, look-alikes of the target)
SETTINGS = {"single": (1, 1, 1, (0.45, 0.8), 0), "normal": (2, 6, 3, (0.66, 0.98), 0), "alike": (3, 6, 3, (0.66, 0.98), 2),
            "small": (4, 6, 3, (0.52, 0.72), 2), "crowd": (7, 10, 4, (0.7, 0.98), 0)}
# Weights of the settings in the base model's lessons, and in the labelled pictures of its eyes. Small shields, and one
# alone (which is the only one to point at), come more often: the more freely a shield hangs, the worse its box was
# (results/trials.md)
LESSON_WALLS = {"single": 2, "normal": 4, "alike": 3, "small": 4, "crowd": 2}
# For SFT: one relation at most; errands among the lessons replayed beside them (grpo.replay) show RL where to begin
SFT_MIX = [("colour", "normal", 3), ("shape", "normal", 2), ("count", "normal", 2), ("count", "crowd", 4), ("colour", "single", 1), ("shape", "single", 1), ("name", "single", 1), ("hop1", "single", 1),
           ("name", "normal", 2), ("hop1", "normal", 4), ("name", "alike", 1), ("hop1", "alike", 2), ("compare", "normal", 1)]
# For RL: mostly long chains, which SFT lacks; few look-alikes (why: grpo.py, Curriculum). Counting, colours, shapes and
# the last three keep the policy looking: chains about a single shield are solved by a glance, which is lost in a crowd
RL_MIX = [("count", "normal", 1), ("colour", "single", 0.5), ("shape", "single", 0.5), ("shape", "normal", 0.5), ("hop2", "normal", 3), ("hop3", "single", 1), ("hop3", "normal", 3), ("hop4", "single", 3),
          ("hop4", "normal", 4), ("hop5", "single", 2), ("hop5", "normal", 0.5), ("hop1", "crowd", 1), ("hop2", "crowd", 1), ("hop1", "small", 2)]


def fits(text):
    """Does a question leave room for turns? 600 bytes are at most 600 tokens, and a trajectory has up to 832
    (gog.rollout)."""
    return len(text.encode(errors="replace")) <= 600


def ask(world, kind, setting, split, rng):
    """Draw one question of this kind about entities of these splits, or None if the draw fails: no unambiguous
    expression for a target, an expression that contains the answer, no second number to compare (or a tie), no chain
    that long, or too long a text."""
    # scene: the target, look-alikes of it (if the setting has any) and other entities
    pool = world.pictured(*split)
    least, most, cells, sizes, look_alikes = SETTINGS[setting]
    target = rng.choice(pool)
    alike = [e for e in pool if e.look == target.look and e.detail != target.detail]
    candidates = {e.name: e for e in [target, *rng.sample(alike, min(look_alikes, len(alike))), *rng.sample(pool, min(most, len(pool)))]}
    # the target comes first, then its look-alikes: this cut never drops them
    shown = list(candidates.values())[:max(rng.randint(least, most), min(len(candidates), look_alikes + 1))]
    scene = hang(rng.sample(shown, len(shown)), world.noun, rng, cells, sizes)

    # count (needs no target)
    if kind == "count":
        colour = rng.choice(shown).look.split()[0]
        return Question(f"How many {scene.noun}s are {colour}?", (str(sum(colour in colours(e) for e in shown)),), scene, kind, setting)

    # targets: one, or two to compare
    targets = [scene.entities.index(target)]
    if kind == "compare":
        # below 100: the lessons compare no larger numbers
        number = lambda e, r: (v := e.facts.get(r, "")).isdecimal() and len(v) < 3
        relation = next((r for r in ("towers", *target.facts) if number(target, r)), "")
        others = [i for i in range(len(shown)) if i != targets[0] and number(scene.entities[i], relation)]
        targets += rng.sample(others, min(1, len(others)))

    # expressions: a random (kind, text) for each target, None if it has none. On walls with look-alikes always the
    # detail, even if "the leftmost" would do, so that a closer look is needed; on other walls never
    expressions = references(scene)
    usable = lambda i: sorted((k, text) for k, text in expressions[i].items() if (k == "detail") == bool(look_alikes))
    chosen = [rng.choice(usable(i) or [None]) for i in targets]
    if None in chosen or kind == "compare" and len(targets) < 2:
        return None
    pointed_by, texts = zip(*chosen)
    found = [scene.entities[i] for i in targets]
    phrases = tuple(f"{e.look}, {e.detail}" if k == "detail" else e.look for e, k in zip(found, pointed_by))
    question = lambda text, answers, chain=(): Question(text, answers, scene, kind, setting, tuple(targets), phrases, chain, pointed_by) if fits(text) else None

    # colour, shape
    if kind in VISUAL:
        # the expression would contain the answer; or the shape of a flag is asked for, and nearly all have the same
        if pointed_by[0] in ("look", "detail", kind) or kind == "shape" and world.noun != "shield":
            return None
        return question(f"What is the {kind} of the {texts[0]}?", tuple(colours(target)) if kind == "colour" else (target.look.split()[1],))

    # compare
    if kind == "compare":
        a, b = (int(e.facts[relation]) for e in found)
        text = f"Which has more {relation}, the {texts[0]} or the {texts[1]}?"
        return question(text, (found[0 if a > b else 1].name,), (relation,)) if a != b else None

    # name, hop1 .. hop5: follow a chain. All relations but the last must lead to another entity, which the index
    # has (one that is added after training: only in the suite `live`)
    chain, path = [], [target.name]
    unknown = set() if "late" in split else world.splits.get("late", ())
    for remaining in range(int(kind[3:]) if kind != "name" else 0, 0, -1):
        facts = world.entities[path[-1]].facts
        options = [r for r, v in facts.items() if v not in path and (remaining == 1 or v in world.entities and v not in unknown)]
        if not options:
            return None
        # repeat a relation ("twin of the twin") only if there is no other
        chain.append(rng.choice([r for r in options if r not in chain] or options))
        path.append(facts[chain[-1]])
    return question(f"What is the {' of the '.join(reversed(chain)) or 'name'} of the {texts[0]}?", (path[-1],), tuple(chain))


def questions(world, mix, n, seed, split=("train",)):
    """Draw `n` questions from a mix of (kind, setting, weight). Same arguments, same questions.

    A kind that this world cannot ask (e.g. the shape of a flag) is silently dropped, and the others take its place.
    WorldError if none of them can be asked."""
    rng, out, draws = random.Random(f"{world.name}/{world.seed}/{seed}"), [], 0
    while len(out) < n:
        if (draws := draws + 1) > 60 and not out:
            raise WorldError(f"{world.name}: no question of {', '.join(sorted({f'{k} ({s})' for k, s, _ in mix}))} can be asked. Add entities, or facts that lead from one to another")
        kind, setting, _ = rng.choices(mix, [w for *_, w in mix])[0]
        # retry the same kind, so that kinds that often fail keep their weight in the mix
        out += islice(filter(None, (ask(world, kind, setting, split, rng) for _ in range(50))), 1)
    return out


# -------------------------------------------------------------------------------------------------------- folder worlds

def folder_world(path, seed=0):
    """Read a user's world: `entities.jsonl`, one {"name", "image", "facts": {relation: value}} per line, and the
    images.

    A value that is another entity's name can be followed (a hop). The look (main colour and shape) is computed from the
    picture. An optional `questions.jsonl` holds the user's own questions. WorldError if a line is invalid, or for fewer
    than 8 entities."""
    root, name, entities = Path(path), folder_name(path), {}
    for where, line in lines(root / "entities.jsonl"):
        folder_entity(entities, root, where, line)
    if len(entities) < 8:
        raise WorldError(f"{root / 'entities.jsonl'}: {len(entities)} entities, and splits need at least 8. Add more")
    own = tuple(own_question(root, *line) for line in lines(root / "questions.jsonl", optional=True))
    # "flag" or "picture": the noun in questions; the world that comes with the code has flags
    return World(name, "flag" if name == "countries" else "picture", entities, split_names(entities, random.Random(f"folder/{seed}")), seed, own)


def folder_entity(known, root, where, line):
    """Read one line of entities.jsonl and add its entity to `known`, {name: Entity}."""
    row = as_row(where, line)
    name, facts = row.get("name"), row.get("facts", {})
    if not plain(name) or name in known or ": " in name:
        raise WorldError(f"{where}: 'name' is missing, given twice, over 200 characters, holds ': ', ' | ', <, > or a line break, or has no letters or digits ({str(name)[:80]!r}). Give every entity a unique name")
    if not isinstance(facts, dict) or not all(plain(x) for fact in facts.items() for x in fact) or {*map(normalise, facts)} & {"name", *VISUAL}:
        raise WorldError(f"{where}: a fact of {name!r} is not a text of 1 to 200 characters, holds ' | ', <, > or a line break, has no letters or digits, or is called name, {', '.join(VISUAL)} (which are asked of the picture). Write facts as {{\"relation\": \"value\"}}")
    art = check_image(image := image_path(root, row.get("image"), where), where)
    known[name] = Entity(name, {k.replace("_", " "): v for k, v in facts.items()}, None, image, **look_of(art), aspect=min(20, max(0.05, art.width / art.height)))


def plain(text):
    """Can this text be shown, copied and compared? A string of 1 to 200 characters without tags, line breaks and " | "
    (nor one that arises from a "|" at its edge, or from "_", which relations show as a blank), of which something is
    left after `normalise`."""
    return isinstance(text, str) and len(text) <= 200 and normalise(text) and not any(mark in f" {text} ".replace("_", " ") for mark in ("<", ">", "\n", "\r", " | "))


def own_question(root, where, line):
    """Read one line of the optional `questions.jsonl`: {"image", "question", "answers": [..], "box": [x0, y0, x1, y1]
    of the target, optional}."""
    row = as_row(where, line)
    text, answers, box = row.get("question"), row.get("answers"), row.get("box", [])
    if not plain(text) or not fits(text) or not isinstance(answers, list) or not answers or not all(map(plain, answers)):
        raise WorldError(f"{where}: 'question' must be text and 'answers' a list of texts, e.g. [\"Paris\"], each of 1 to 200 characters (a question: at most 600 bytes), without ' | ', < and >")
    if box and not (isinstance(box, list) and len(box) == 4 and all(type(x) is int and 0 <= x <= 99 for x in box) and box[0] < box[2] and box[1] < box[3]):
        raise WorldError(f"{where}: 'box' must be four whole numbers 0 to 99, left < right and top < bottom (percent of the picture), not {box!r}")
    check_image(path := image_path(root, row.get("image"), where), where)
    return Question(text, tuple(answers), Scene((), (tuple(box),) if box else (), "picture", 0, path), "own", targets=(0,) if box else ())


@lru_cache(maxsize=4)
def open_world(where, seed=0, towns=3000):
    """The built-in world ("heraldry", with this many towns), or the folder world at the path `where`."""
    if where != "heraldry" and folder_name(where).casefold() == "heraldry":
        raise WorldError(f"{where}: a folder of this name would share its results with the built-in world. Rename it")
    return heraldry(seed, towns) if where == "heraldry" else folder_world(where, seed)


@lru_cache(maxsize=256)
def _load(path):
    picture = ImageOps.exif_transpose(Image.open(path, formats=("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")))
    if picture.mode[0] == "I":  # 16-bit grey, which Pillow would clip at 255
        picture = Image.fromarray((np.asarray(picture, np.float32) / 257).clip(0, 255).astype(np.uint8))
    picture = picture.convert("RGBA")
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return picture


def check_image(path, where="command line"):
    """Read the picture at `path` as RGBA. WorldError if it cannot be read."""
    try:
        return _load(Path(path))
    except Exception as e:  # a broken file may make Pillow raise nearly anything
        raise WorldError(f"{where}: image {path} cannot be read ({e}). Replace it with a PNG or JPEG") from None


# place of each hue on the colour circle, 0..1
HUES = {t: colorsys.rgb_to_hsv(*rgb)[0] for t, rgb in TINCTURES.items() if t not in ("white", "black")}


def _tincture(rgb):
    """The tincture that a person would call a colour (r, g, b, each 0..255): black or white if it is greyish or very
    dark, else the nearest hue. Navy is blue, not black."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in rgb))
    if saturation < 0.25 or value < 0.2:
        return "white" if value > 0.5 else "black"
    return min(HUES, key=lambda t: abs((hue - HUES[t] + 0.5) % 1 - 0.5))


def look_of(art):
    """Look, detail and blazon of an RGBA picture, in words: the tinctures that cover at least an eighth of it, largest
    first, and whether it is wide: "red banner", "white and gold", "red banner, white and gold"."""
    count = sum((Counter({_tincture(rgba[:3]): n}) for n, rgba in art.resize((24, 24), Image.BOX).getcolors(24 * 24) if rgba[3] > 127), Counter())
    first, *others = [t for t in sorted(TINCTURES, key=lambda t: -count[t]) if count[t] >= max(1, count.total() / 8)] or ["white"]
    look, detail = f"{first} {'banner' if art.width > 1.2 * art.height else 'square'}", " and ".join(others) or "plain"
    return dict(look=look, detail=detail, blazon=f"{look}, {detail}")


# ------------------------------------------------------------------------------- python data.py check | preview FOLDER

def check(path):
    """Check a folder world: two lists of messages, the errors (line by line, at most 100) and what makes it a poor
    world."""
    root, errors, known, warnings = Path(path), [], {}, []
    for read, file in ((partial(folder_entity, known), lines(root / "entities.jsonl")), (own_question, lines(root / "questions.jsonl", optional=True))):
        for where, line in takewhile(lambda _: len(errors) < 100, file):  # enough to correct at once
            try:
                read(root, where, line)
            except WorldError as e:
                errors.append(str(e))
    if without := [name for name, e in known.items() if not e.facts]:
        warnings.append(f"{len(without)} of {len(known)} entities have no facts, {without[0]!r} for one, so there is nothing to search for. Is the key spelled \"facts\"?")
    vectors, names = describe([on_grey(e.picture(96)) for e in known.values()]), list(known)
    for i, name in enumerate(names):
        if len(alike := np.flatnonzero(vectors[:i] @ vectors[i] > ALIKE)):
            warnings.append(f"{name!r} is nearly identical to {names[alike[0]]!r}, and a search may confuse them. Remove one")
    for relation in dict.fromkeys(r for e in known.values() for r in e.facts):
        if holders := [e for e in known.values() if e.name.casefold() in e.facts.get(relation, "").casefold()]:
            warnings.append(f"fact {relation!r} contains the entity's name for {len(holders)} of {len(known)} entities (e.g. {holders[0].facts[relation]!r} of {holders[0].name!r}), which gives away part of the answer")
    return errors, warnings


def preview(world, n=9, side=384):
    """`n` sample questions with their pictures and answers as one picture; up to three of the user's own questions come
    first."""
    mix = [(kind, setting, 1) for kind in ("colour", "count", "name", "hop1", "hop2", "compare") for setting in ("single", "normal", "alike", "crowd")]
    sheet = Image.new("RGB", (3 * (side + 16), -(-n // 3) * (side + 70)), "white")
    for i, q in enumerate([*world.own[:3], *questions(world, mix, n, "preview", ("train", "dev", "test"))][:n]):
        x, y = i % 3 * (side + 16) + 8, i // 3 * (side + 70) + 8
        sheet.paste(ImageOps.contain(q.scene.picture(side), (side, side)), (x, y))
        ImageDraw.Draw(sheet).text((x, y + side + 4), textwrap.fill(unaccented(f"{q.text} {q.answers[0]}"), 58), fill="black", font_size=13)
    return sheet


def main():
    parser = argparse.ArgumentParser(description="Check or preview a folder world before training.")
    sys.stdout.reconfigure(errors="replace")  # a terminal or a file may lack the letters of a name
    parser.add_argument("what", choices=("check", "preview"), help="check: what is wrong with it, line by line; preview: sample questions as one picture"), parser.add_argument("path", help="the folder")
    parser.add_argument("--save", default="preview.png", help="output file of the preview (default: %(default)s)")
    a = parser.parse_args()
    try:
        errors, warnings = check(a.path) if a.what == "check" else ([], [])
        print(*(f"wrong: {x}\n" for x in errors), *(f"warning: {x}\n" for x in warnings), sep="", end="")
        if errors:
            raise WorldError(f"{a.path}: {len(errors)} lines are wrong{' (the check ends here)' if len(errors) == 100 else ''}, see above")
        world = open_world(a.path)
        print(f"{a.path}: {len(world.entities)} entities, {sum(len(e.facts) for e in world.entities.values())} facts, {len(world.own)} own questions. Next: python train.py --world {a.path}")
        if a.what == "preview":
            atomic(a.save, lambda p: preview(world).save(p, format="PNG")), print(f"sample questions: {a.save}")
    except (WorldError, OSError) as e:
        parser.exit(2, f"error: {e}\n")


if __name__ == "__main__":
    main()
