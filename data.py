"""The world: who hangs on the wall, and what is asked about it.

From the paper: questions about a picture that need 0..n searches.
Here instead: an invented world of *heraldry* (towns with coats of arms drawn by code), because it is unlimited, long-tail by
    construction, offline, and because every box, fact and search need is known exactly; or any *folder world* (real pictures
    and facts). What can be known about a question (its targets, phrases and chain) is kept with it: the expert in gog.py lives on that.

Words: look: what can be told from afar ("red round"); detail: what cannot ("2 gold crowns"); tincture: a colour; charge: the figures on a
shield; ordinary: a stripe across it; blazon: look, ordinary and detail in words, the caption of a hit. kind: of a question (hop2), of an
expression that points at something (order), of a turn (gaze). setting: which sort of wall (SETTINGS). mix: a list of (kind, setting,
weight). target: what must be found. slip: a mistake that the expert makes on purpose.

Reading order: names -> arms -> entities and worlds -> scenes -> referring expressions -> questions -> folder worlds (skip at first). From
tools.py comes what these need: a user's files (`lines`, `as_row`, `image_path`, `atomic`), pictures (`describe`: rows whose dot product is
the similarity; `on_grey`: transparent parts grey; `to_pixels`), texts (`normalise`, `unaccented`).
Boxes are (x0, y0, x1, y1), integers 0..99: percent of the picture's width and height. The policy, the expert and the scenes know no other
format. (Pixels: only inside the crop, the image index and drawing. 0..1: only the labels from which the vision encoder, "the eyes",
learns.)
"""
import argparse
import colorsys
import math
import random
import textwrap
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from tools import WorldError, as_row, atomic, describe, on_grey, image_path, lines, normalise, to_pixels, unaccented

ALIKE = 0.98  # two pictures whose descriptors have such a cosine are one to a search
LONGEST_SIDE = 1024  # of a user's picture, in pixels: a larger one is shrunk when it is read
SCENE_PX = 384  # side of a scene in pixels; the model is given it much smaller, a gaze goes back to these pixels

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


VALUES = {  # relation -> how an invented value is drawn. Many, or a policy would choose among them instead of reading the question
    **dict.fromkeys("ruler patron governor mayor bishop founder poet painter champion judge".split() + ["first queen", "last duke", "town crier"], person_name),
    **dict.fromkeys("river harbour lake hill forest bridge valley".split() + ["old gate", "main square", "sacred well"], word),
    **dict.fromkeys(("craft", "chief export", "rarest import"), lambda r: f"{r.choice(CRAFTS_A)} {r.choice(CRAFTS_B)}"),
    **dict.fromkeys(("founding year", "year of fire", "last siege"), lambda r: str(r.randint(800, 1899))),
    **dict.fromkeys(("towers", "number of wells", "number of mills"), lambda r: str(r.randint(2, 98))),
    **dict.fromkeys(("anthem", "dance"), lambda r: f"{r.choice(['Song', 'March', 'Hymn'])} of {word(r)}")}
ALL_TOWNS = ("ruler", "towers")  # facts of every town; four others of VALUES and two of TOWN_LINKS, by lot, and its region
# values that lead on to another town. One word each: thoughts copy "river of the twin" from the question word by word, and behind a longer
# name it is harder to tell where to go on
TOWN_LINKS = ("twin", "rival", "ally", "neighbour")
REGION_LINKS = ("capital", "stronghold")  # .. and from a region back to a town

# ----------------------------------------------------------------------------------------------------------------- arms

TINCTURES = {"red": (204, 32, 44), "blue": (36, 74, 190), "green": (32, 138, 66), "purple": (132, 52, 150), "black": (28, 28, 34), "gold": (238, 190, 40), "white": (244, 244, 240)}
METALS = ("gold", "white")  # the heralds' rule of tincture: metal on colour or colour on metal, so that it can be seen


def arc(x, y, rx, ry, start=0, end=360, n=36):
    """Points on an ellipse around (x, y), from one angle to another (degrees, clockwise as y points down)."""
    angles = [math.radians(start + (end - start) * i / n) for i in range(n + 1)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


OUTLINES = {  # polygons in the unit square
    "heater": [(0, 0), (1, 0), (1, .5), (.86, .76), (.5, 1), (.14, .76), (0, .5)], "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "diamond": [(.5, 0), (1, .5), (.5, 1), (0, .5)], "banner": [(0, 0), (1, 0), (1, 1), (0, 1)], "round": arc(.5, .5, .5, .5)}
ASPECT = {"heater": 0.86, "diamond": 0.9, "banner": 1.5}  # width / height, 1 where not named
ORDINARIES = {"": None, "chief": [(0, 0), (1, 0), (1, .17), (0, .17)], "base": [(0, .83), (1, .83), (1, 1), (0, 1)], "bordure": None,
              "pale": [(.42, 0), (.58, 0), (.58, 1), (.42, 1)], "fess": [(0, .42), (1, .42), (1, .58), (0, .58)],
              "bend": [(0, 0), (.16, 0), (1, .84), (1, 1), (.84, 1), (0, .16)]}  # narrow, so that the tincture can be told from afar
CHARGES = {  # polygons in [-1, 1]^2, y down
    "star": [(0, -1), (.25, -.32), (.95, -.3), (.4, .13), (.6, .85), (0, .43), (-.6, .85), (-.4, .13), (-.95, -.3), (-.25, -.32)],
    "cross": [(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3), (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)],
    "tower": [(-.7, -1), (-.35, -1), (-.35, -.6), (-.17, -.6), (-.17, -1), (.17, -1), (.17, -.6), (.35, -.6), (.35, -1), (.7, -1), (.7, 1), (.25, 1), (.25, .3), (-.25, .3), (-.25, 1), (-.7, 1)],
    "tree": [(0, -1), (.8, .4), (.2, .4), (.2, 1), (-.2, 1), (-.2, .4), (-.8, .4)],
    "fish": [(-1, -.6), (-.5, -.1), (.1, -.55), (.7, -.35), (1, 0), (.7, .35), (.1, .55), (-.5, .1), (-1, .6)],
    "crown": [(-1, -.7), (-.5, 0), (0, -.9), (.5, 0), (1, -.7), (.85, .8), (-.85, .8)],
    "ring": arc(0, 0, 1, 1) + arc(0, 0, .5, .5, 360, 0), "crescent": arc(0, 0, 1, 1, -35, 215) + arc(0, -.4, .82, .7, 190, -10)}
PLACES = {1: [(.5, .5, .28)], 2: [(.28, .5, .18), (.72, .5, .18)], 3: [(.29, .32, .16), (.71, .32, .16), (.5, .72, .16)]}


@dataclass(frozen=True)
class Arms:
    """A coat of arms: outline and tincture can be told from afar, the rest takes a closer look."""
    outline: str
    tincture: str
    ordinary: str
    ordinary_tincture: str
    charge: str
    charge_tincture: str
    count: int

    @classmethod
    def draw(cls, rng, **fixed):
        """Draw arms by lot; `fixed` presets any part (e.g. outline and tincture, to make a look-alike)."""
        tincture = fixed.get("tincture") or rng.choice(list(TINCTURES))
        contrast = [t for t in TINCTURES if (t in METALS) != (tincture in METALS)]
        charge_tincture = rng.choice(contrast)
        ordinary, other = rng.choice(list(ORDINARIES)), rng.choice([t for t in contrast if t != charge_tincture])
        parts = dict(outline=rng.choice(list(OUTLINES)), tincture=tincture, ordinary=ordinary, charge=rng.choice(list(CHARGES)), count=rng.choice((1, 2, 3)),
                     ordinary_tincture=other if ordinary else tincture, charge_tincture=charge_tincture)
        return cls(**{**parts, **fixed})

    def in_words(self):
        """In words: (look, ordinary or "", detail), e.g. ("red round", "white bend", "2 gold crowns")."""
        return (f"{self.tincture} {self.outline}", f"{self.ordinary_tincture} {self.ordinary}" if self.ordinary else "",
                f"{self.count} {self.charge_tincture} {self.charge}" + {"fish": "", "cross": "es"}.get(self.charge, "s") * (self.count > 1))

    def picture(self, height):
        """RGBA picture of the given height in pixels, transparent outside the outline (drawn at 2x, then shrunk)."""
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
    """Something with a name and facts, and (unless it is a region) a picture: drawn `arms`, or a file."""
    name: str
    facts: dict = field(hash=False)
    arms: Arms | None = None
    path: Path | None = None
    look: str = ""  # what can be told from afar, e.g. 'red round'
    detail: str = ""  # what only a closer look tells, e.g. '2 gold crowns'
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
    """`entities`: everything by name. `splits`: pictured names; they never share one. `late` ones exist only for suite `live`."""
    name: str
    noun: str
    entities: dict
    splits: dict
    seed: int = 0
    own: tuple = ()  # a user's questions about pictures of their own: every other one joins RL's pool, the rest are suite "own"

    def pictured(self, *splits):
        return [self.entities[n] for s in splits or ("train", "dev", "test") for n in self.splits[s]]


def split_names(names, rng):
    names = list(names)
    rng.shuffle(names)
    a, b, c = (round(len(names) * f) for f in (0.55, 0.65, 0.93))
    b = max(b, a + 1)  # of ten names both would be 6
    return {"train": names[:a], "dev": names[a:b], "test": names[b:c], "late": names[c:]}


def heraldry(seed=0, towns=3000):
    """The default world: `towns` invented towns with distinct names and arms, in `towns / 25` regions."""
    rng = random.Random(f"heraldry/{seed}")
    distinct = lambda make, n: list(dict.fromkeys(make(rng) for _ in range(4 * n)))[:n]
    names, shields = distinct(town_name, towns), distinct(Arms.draw, towns)
    regions = [r for r in distinct(lambda g: f"{word(g)} {g.choice(['Vale', 'March', 'Coast', 'Heath'])}", max(2, towns // 25)) if r not in names]
    facts = lambda keys, more: {k: VALUES[k](rng) for k in (*keys, *rng.sample([k for k in VALUES if k not in keys], more))}
    entities = {n: Entity.with_arms(n, {**facts(ALL_TOWNS, 4), "region": rng.choice(regions)}, a) for n, a in zip(names, shields)}
    splits = split_names(names, rng)
    # links stay within a split; a region's capital may be of any but `late`: so a name and facts of another split may be read in training,
    # but its arms are never asked about there
    for group in splits.values():
        for n in group:
            entities[n].facts.update({link: rng.choice([t for t in group if t != n] or [n]) for link in rng.sample(TOWN_LINKS, 2)})
    for r in regions:
        entities[r] = Entity(r, facts((), 4) | {link: rng.choice(splits["train"] + splits["dev"] + splits["test"]) for link in REGION_LINKS})
    return World("heraldry", "shield", entities, splits, seed)


def with_strangers(world, n):
    """The same world with more towns to be found by a search, that no question is about (they join the training split): of `n` drawn by lot
    those whose names and arms nobody else has."""
    rng, taken = random.Random(f"strangers/{world.seed}"), {e.arms for e in world.pictured(*world.splits)}
    drawn = {arms: name for arms, name in ((Arms.draw(rng), town_name(rng)) for _ in range(n)) if arms not in taken and name not in world.entities}
    more = {name: Entity.with_arms(name, {k: VALUES[k](rng) for k in rng.sample(list(VALUES), 6)}, arms) for arms, name in drawn.items()}
    return replace(world, entities=world.entities | more, splits=world.splits | {"train": [*world.splits["train"], *more]})


# --------------------------------------------------------------------------------------------------------------- scenes

PLASTERS = ((14, 4, -14), (0, 0, 0), (-8, 0, 10), (8, -2, -8), (-6, 6, -4))


@dataclass(frozen=True)
class Scene:
    """Entities hung on a wall. `boxes[i]` frames `entities[i]`. Drawn anew from `seed` whenever asked for: same seed, same bytes."""
    entities: tuple
    boxes: tuple
    noun: str
    seed: int
    photo: Path | None = None  # a user's own picture instead of a drawn wall

    def picture(self, px=SCENE_PX):
        """RGB, px square (a photo keeps its own size, up to LONGEST_SIDE). Shared: draw on a copy."""
        return on_grey(_load(self.photo)) if self.photo else _drawn(self, px)


@lru_cache(maxsize=512)  # demonstrations and suites come back to a wall again and again
def _drawn(scene, px):
    """The wall of a scene, and what hangs on it."""
    rng = random.Random(scene.seed)
    light, hue = rng.randint(110, 200), rng.choice(PLASTERS)
    plaster = tuple(light + h for h in hue)
    wall = Image.new("RGB", (px, px), plaster)
    pen = ImageDraw.Draw(wall)
    course, mortar = px // rng.randint(6, 14), tuple(c - 16 for c in plaster)
    for y in range(0, px, course):  # stone courses, each stone in a tone of its own
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
    """Hang entities in rows: a `cells` x `cells` grid with a little jitter. `sizes`: smallest and largest of the three sizes that
    shields are made in, longer side as a share of the cell."""
    pitch, boxes = 99 / cells, []
    for e, cell in zip(entities, rng.sample(range(cells * cells), len(entities))):
        long = pitch * rng.choice((sizes[0], sum(sizes) / 2, sizes[1]))
        # at least 3: less of a ribbon could not be gazed at
        w, h = (max(3, side) for side in ((long, long / e.aspect) if e.aspect > 1 else (long * e.aspect, long)))
        slack = lambda side: (pitch - side) * rng.uniform(0.35, 0.65)
        x, y = cell % cells * pitch + slack(w), cell // cells * pitch + slack(h)
        boxes.append((round(x), round(y), round(x + w), round(y + h)))
    return Scene(tuple(entities), tuple(boxes), noun, rng.getrandbits(48))


# ------------------------------------------------------------------------------------------------- referring expressions

# Where an object hangs among all, from left to right ("across") and from the top ("down"), and how large it is. The first word of each:
# nothing clear to say
ACROSS, DOWN, SIZE = ("", "leftmost", "rightmost"), ("", "topmost", "lowest"), ("", "largest", "smallest")
ZONES = ("top left", "top middle", "top right", "middle left", "centre", "middle right", "bottom left", "bottom middle", "bottom right")
SIDES = {"left of": -1, "right of": 1, "above": -1j, "below": 1j}  # x + yj, as all of `layout` counts


def layout(scene):
    """How each object hangs among the others, list over objects of {"across", "down", "size": one of the words above, "" where there is
    nothing clear to say; "zone": index into ZONES; a key of SIDES: the object that it stands left of, right of, ...}."""
    n, boxes = len(scene.boxes), scene.boxes
    centre = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in boxes]
    out = [dict(across="", down="", size="", zone=min(2, int(y / 33.4)) * 3 + min(2, int(x / 33.4))) for x, y in centre]
    area = [-math.log((b[2] - b[0]) * (b[3] - b[1])) for b in boxes]  # the largest first
    for relation, words, values, gap in zip(("across", "down", "size"), (ACROSS, DOWN, SIZE), (*zip(*centre), area), (7, 7, 0.4)):
        order = sorted(range(n), key=values.__getitem__)
        for word, (i, *rest) in zip(words[1:], (order, order[::-1])):  # the first and the last, where the next one is far enough
            if rest and abs(values[i] - values[rest[0]]) > gap:
                out[i][relation] = word
    # who stands beside j? The only one within 45 on that side, if it is more than 18 away and at most 14 out of line (percent, between
    # middles)
    for j in range(n):
        for side, toward in SIDES.items():
            # of every object: how far it is on that side (real), and out of line
            away = [(complex(*c) - complex(*centre[j])) / toward for c in centre]
            near = [i for i, d in enumerate(away) if 0 < d.real <= 45 and abs(d.imag) <= 45]
            if len(near) == 1 and away[near[0]].real > 18 and abs(away[near[0]].imag) <= 14:
                out[near[0]][side] = j
    return out


def references(scene):
    """Unambiguous ways to point at each object, at most one of a kind: list over objects of {kind: expression without 'the'}."""
    noun, looks, places = scene.noun, [e.look for e in scene.entities], layout(scene)
    # a flag is of all its colours, a shield of one
    seen = [set((e.look if e.arms else e.blazon.replace(",", "")).split()) for e in scene.entities]
    out, tells = [{} for _ in looks], lambda words: sum(set(words.split()) <= s for s in seen) == 1
    for i, (look, place) in enumerate(zip(looks, places)):
        if tells(look):
            out[i]["look"] = f"{look} {noun}"
        elif looks.count(look) > 1 and sum(e.look == look and e.detail == scene.entities[i].detail for e in scene.entities) == 1:
            out[i]["detail"] = f"{look} {noun} with {scene.entities[i].detail}"
        out[i] |= {kind: f"{part} {noun}" for kind, part in zip(("colour", "shape"), look.split()) if tells(part)}
        out[i] |= {kind: f"{place[side]} {noun}" for kind, side in (("order", "down"), ("order", "across"), ("size", "size")) if place[side]}
        if len(looks) > 1 and sum(p["zone"] == place["zone"] for p in places) == 1:
            out[i]["position"] = f"{noun} at the {ZONES[place['zone']]}"
        if near := beside(looks, place):
            out[i]["neighbour"] = f"{noun} {near[0]} the {looks[near[1]]} {noun}"
    return out


def beside(looks, place):
    """(side, j): an object stands on that side of object j, whose look tells it apart; None if there is no such j."""
    return next(((side, place[side]) for side in SIDES if side in place and looks.count(looks[place[side]]) == 1), None)


# ------------------------------------------------------------------------------------------------------------ questions

@dataclass(frozen=True)
class Question:
    """`targets`: indices of the scene's objects that must be found; `phrases`: what to look for, in the words of a blazon;
    `chain`: relations from the picture outwards. These and `pointed_by` are the expert's knowledge; the policy sees scene and text only."""
    text: str
    answers: tuple
    scene: Scene
    kind: str  # colour, shape, count | name, hop1 .. hop5, compare | own
    setting: str = "own"
    targets: tuple = ()
    phrases: tuple = ()
    chain: tuple = ()
    pointed_by: tuple = ()  # the kind of referring expression, one a target

    @property
    def search_free(self):
        return self.kind in VISUAL


VISUAL = ("colour", "shape", "count")
# What is trained on is mixed here; what is examined, in gog.py (SUITES, DEV_MIX)
SETTINGS = {  # name: (least, most objects, cells, sizes, look-alikes of the target)
    "single": (1, 1, 1, (0.45, 0.8), 0), "normal": (2, 6, 3, (0.66, 0.98), 0), "alike": (3, 6, 3, (0.66, 0.98), 2),
    "small": (4, 6, 3, (0.52, 0.72), 2), "crowd": (7, 10, 4, (0.7, 0.98), 0)}
# how often the base model's lessons draw each: where shields hang freely (one alone, small ones) takes more practice than a full wall
LESSON_WALLS = {"single": 2, "normal": 4, "alike": 3, "small": 4, "crowd": 2}
SFT_MIX = [("colour", "normal", 3), ("shape", "normal", 2), ("count", "normal", 2), ("count", "crowd", 4), ("colour", "single", 1), ("shape", "single", 1), ("name", "single", 1), ("hop1", "single", 1),
           ("name", "normal", 2), ("hop1", "normal", 4), ("name", "alike", 1), ("hop1", "alike", 2), ("hop2", "normal", 0.9), ("hop3", "normal", 0.3), ("hop2", "single", 0.3), ("hop3", "single", 0.2), ("compare", "normal", 1)]
# Of RL: mostly long chains (why: grpo.py, 6). The last three keep up gazing: chains about a single shield are solved by a glance, and a
# policy that only glances finds nothing on a crowded wall
RL_MIX = [("count", "normal", 1), ("hop2", "normal", 1), ("hop3", "single", 1), ("hop3", "normal", 2), ("hop4", "single", 3), ("hop4", "normal", 4), ("hop5", "single", 2),
          ("hop1", "crowd", 1), ("hop2", "crowd", 1), ("hop1", "small", 2)]


def fits(text):
    """Is a question short enough to leave room for turns? A token is a byte or more, and a trajectory has 832 (gog.rollout)."""
    return len(text.encode(errors="replace")) <= 600


def ask(world, kind, setting, split, rng):
    """One question of this kind, or None if the draw fails (no unambiguous expression, no chain that long, or too long a text)."""
    pool = world.pictured(*split)
    least, most, cells, sizes, look_alikes = SETTINGS[setting]
    target = rng.choice(pool)
    alike = [e for e in pool if e.look == target.look and e.detail != target.detail]
    chosen = {e.name: e for e in [target, *rng.sample(alike, min(look_alikes, len(alike))), *rng.sample(pool, min(most, len(pool)))]}
    # the target first, then its look-alikes: this cut never drops them
    shown = list(chosen.values())[:max(rng.randint(least, most), min(len(chosen), look_alikes + 1))]
    scene = hang(rng.sample(shown, len(shown)), world.noun, rng, cells, sizes)
    ways, targets = references(scene), [scene.entities.index(target)]  # ways: of each object {kind: expression}
    if kind == "count":
        colour = rng.choice(shown).look.split()[0]
        return Question(f"How many {scene.noun}s are {colour}?", (str(sum(e.look.split()[0] == colour for e in shown)),), scene, kind, setting)
    if kind == "compare":
        # whole numbers: 2 to 98; a folder's may be larger, and no lesson compares such
        relation = "towers" if world.noun == "shield" else "number of neighbours"
        other = [i for i in range(len(shown)) if i != targets[0] and scene.entities[i].facts.get(relation, "").isdecimal()]
        targets += rng.sample(other, min(1, len(other)))
    # of every target a (kind, expression) by lot, None where nothing is unambiguous. Where look-alikes hang, always by the detail (though
    # "the leftmost" would do, too), so that a closer look is needed; elsewhere never
    usable = lambda i: sorted((k, t) for k, t in ways[i].items() if (k == "detail") == bool(look_alikes))
    pointed = [rng.choice(usable(i) or [None]) for i in targets]
    if None in pointed or kind == "compare" and len(targets) < 2:
        return None
    pointed_by, expressions = zip(*pointed)  # kinds of expressions, and their words
    found = [scene.entities[i] for i in targets]
    phrases = tuple(f"{e.look}, {e.detail}" if k == "detail" else e.look for e, k in zip(found, pointed_by))
    made = lambda text, answer, chain=(): Question(text, (answer,), scene, kind, setting, tuple(targets), phrases, chain, pointed_by) if fits(text) else None
    if kind in VISUAL:
        # it would contain its answer; and nearly all flags have one shape
        useless = pointed_by[0] in ("look", "detail", kind) or kind == "shape" and world.noun != "shield"
        return None if useless else made(f"What is the {kind} of the {expressions[0]}?", target.look.split()[VISUAL.index(kind)])
    if kind == "compare":
        a, b = (e.facts.get(relation, "") for e in found)  # b is a number: `other` holds only such
        text = f"Which has more {relation}, the {expressions[0]} or the {expressions[1]}?"
        return made(text, found[int(a) < int(b)].name, (relation,)) if a.isdecimal() and int(a) != int(b) else None
    chain, values, unknown = [], [target.name], set() if "late" in split else world.splits.get("late", ())  # no passage tells of these
    for left in range(int(kind[3:]) if kind != "name" else 0, 0, -1):  # all but the last relation must lead to another entity
        facts = world.entities[values[-1]].facts
        options = [r for r, v in facts.items() if v not in values and (left == 1 or v in world.entities and v not in unknown)]
        if not options:
            return None
        chain.append(rng.choice([r for r in options if r not in chain] or options))  # "twin of the twin" only where nothing else leads on
        values.append(facts[chain[-1]])
    return made(f"What is the {' of the '.join(reversed(chain)) or 'name'} of the {expressions[0]}?", values[-1], tuple(chain))


def questions(world, mix, n, seed, split=("train",)):
    """`n` questions drawn from a mix of (kind, setting, weight). Same arguments, same questions. WorldError if the world has none of these
    kinds."""
    rng, out, lots = random.Random(f"{world.name}/{world.seed}/{seed}"), [], 0
    while len(out) < n:
        if (lots := lots + 1) > 60 and not out:
            raise WorldError(f"{world.name}: no question of {', '.join(sorted({f'{k} ({s})' for k, s, _ in mix}))} can be asked. Add entities, or facts that lead from one to another")
        kind, setting, _ = rng.choices(mix, [w for *_, w in mix])[0]
        # of the same kind, or rare luck would bend the mix
        out += islice(filter(None, (ask(world, kind, setting, split, rng) for _ in range(50))), 1)
    return out


# --------------------------------------------------------------------------------------------------------- folder worlds

def folder_world(path, seed=0):
    """A world of the user's own: `entities.jsonl`, one {"name", "image", "facts": {relation: value}} a line, and the images.

    A value that is another entity's name leads on (a hop). Its look (main colour and shape) is read off the picture.
    """
    root, entities = Path(path), {}
    for where, line in lines(root / "entities.jsonl"):
        folder_entity(entities, root, where, line)
    if len(entities) < 8:
        raise WorldError(f"{root / 'entities.jsonl'}: {len(entities)} entities, and splits need at least 8. Add more")
    # what questions call them: the world that comes with the code has flags
    return World(root.resolve().name, "flag" if root.resolve().name == "countries" else "picture", entities,
                 split_names(entities, random.Random(f"folder/{seed}")), seed, tuple(own_question(root, *line) for line in lines(root / "questions.jsonl", optional=True)))


def folder_entity(known, root, where, line):
    """One line of entities.jsonl joins those `known` before, {name: Entity}."""
    row = as_row(where, line)
    name, facts = row.get("name"), row.get("facts", {})
    if not plain(name) or name in known or ": " in name:
        raise WorldError(f"{where}: 'name' is missing, given twice, over 200 characters, holds ': ', ' | ', <, > or a line break, or nothing that counts in an answer ({str(name)[:80]!r}). Give every entity one name of its own")
    if not isinstance(facts, dict) or not all(plain(x) for fact in facts.items() for x in fact):
        raise WorldError(f"{where}: a fact of {name!r} is no text of 1 to 200 characters, holds ' | ', <, > or a line break, or nothing that counts in an answer. Write facts as {{\"relation\": \"value\"}}")
    colours, aspect = _tinctures(image := image_path(root, row.get("image"), where), where)
    look, detail = f"{colours[0]} {'banner' if aspect > 1.2 else 'square'}", " and ".join(colours[1:]) or "plain"
    known[name] = Entity(name, {k.replace("_", " "): v for k, v in facts.items()}, None, image, look, detail, f"{look}, {detail}", aspect)


def plain(text):
    """Can it be told, copied and compared? A text of 1 to 200 characters without tags, line breaks and " | ", of which something counts in
    an answer."""
    return isinstance(text, str) and len(text) <= 200 and normalise(text) and not any(mark in text for mark in ("<", ">", "\n", "\r", " | "))


def own_question(root, where, line):
    """One line of the optional `questions.jsonl`: {"image", "question", "answers": [..], "box": [x0, y0, x1, y1] of the target or left
    out}."""
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
    """"heraldry", or the folder of a world."""
    if where != "heraldry" and Path(where).resolve().name.casefold() == "heraldry":
        raise WorldError(f"{where}: a folder of this name would share its results with the built-in world. Rename it")
    return heraldry(seed, towns) if where == "heraldry" else folder_world(where, seed)


@lru_cache(maxsize=256)
def _load(path):
    picture = ImageOps.exif_transpose(Image.open(path, formats=("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")))
    if picture.mode[0] == "I":  # grey of 16 bits, which Pillow would cut off at 255
        picture = Image.fromarray((np.asarray(picture, np.float32) / 257).clip(0, 255).astype(np.uint8))
    picture = picture.convert("RGBA")
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return picture


def check_image(path, where="command line"):
    """The picture at `path`, RGBA; WorldError if it cannot be read."""
    try:
        return _load(Path(path))
    except Exception as e:  # a broken file may make Pillow raise nearly anything
        raise WorldError(f"{where}: image {path} cannot be read ({e}). Replace it with a PNG or JPEG") from None


HUES = {t: colorsys.rgb_to_hsv(*rgb)[0] for t, rgb in TINCTURES.items() if t not in ("white", "black")}  # round a circle, 0..1


def _tincture(rgb):
    """The tincture that a person would call a colour (0..255 each): black or white where it is dark or pale, else that of the nearest hue.
    Navy is blue, not black."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in rgb))
    if saturation < 0.25 or value < 0.2:
        return "white" if value > 0.5 else "black"
    return min(HUES, key=lambda t: abs((hue - HUES[t] + 0.5) % 1 - 0.5))


def _tinctures(path, where):
    """The tincture names that cover at least an eighth of a picture, largest first, and its aspect (width / height)."""
    art = check_image(path, where)
    count = Counter(_tincture(rgba[:3]) for rgba in art.resize((24, 24), Image.BOX).get_flattened_data() if rgba[3] > 127)
    return [t for t in sorted(TINCTURES, key=lambda t: -count[t]) if count[t] >= max(1, count.total() / 8)] or ["white"], min(20, max(0.05, art.width / art.height))


# ------------------------------------------------------------------------------- python data.py check | preview FOLDER

def check(path):
    """(what is wrong with a folder world, line by line; what makes it a poor one), two lists of texts."""
    root, wrong, known, poor = Path(path), [], {}, []
    for read, file in ((partial(folder_entity, known), lines(root / "entities.jsonl")), (own_question, lines(root / "questions.jsonl", optional=True))):
        for where, line in takewhile(lambda _: len(wrong) < 100, file):  # enough to mend at once
            try:
                read(root, where, line)
            except WorldError as e:
                wrong.append(str(e))
    if bare := [name for name, e in known.items() if not e.facts]:
        poor.append(f"{len(bare)} of {len(known)} entities have no facts, {bare[0]!r} for one: there is nothing to search for. Is \"facts\" spelt so?")
    seen, names = describe([on_grey(e.picture(96)) for e in known.values()]), list(known)
    for i, name in enumerate(names):
        if len(alike := np.flatnonzero(seen[:i] @ seen[i] > ALIKE)):
            poor.append(f"{name!r} looks nearly like {names[alike[0]]!r}: a search takes one for the other. Leave one out")
    for relation in dict.fromkeys(r for e in known.values() for r in e.facts):
        if told := [e for e in known.values() if e.name.casefold() in e.facts.get(relation, "").casefold()]:
            poor.append(f"fact {relation!r} holds the entity's own name in {len(told)} of {len(known)}, as in {told[0].facts[relation]!r} of {told[0].name!r}: half of the answer is known before the search")
    return wrong, poor


def preview(world, n=9, side=384):
    """`n` questions about a world with their pictures and answers, the first of the user's own among them, as one picture."""
    mix = [(kind, setting, 1) for kind in ("colour", "count", "name", "hop1", "hop2", "compare") for setting in ("single", "normal", "alike", "crowd")]
    sheet = Image.new("RGB", (3 * (side + 16), -(-n // 3) * (side + 70)), "white")
    for i, q in enumerate([*world.own[:3], *questions(world, mix, n, "preview", ("train", "dev", "test"))][:n]):
        x, y = i % 3 * (side + 16) + 8, i // 3 * (side + 70) + 8
        sheet.paste(ImageOps.contain(q.scene.picture(side), (side, side)), (x, y))
        ImageDraw.Draw(sheet).text((x, y + side + 4), textwrap.fill(unaccented(f"{q.text} {q.answers[0]}"), 58), fill="black", font_size=13)
    return sheet


def main():
    parser = argparse.ArgumentParser(description="Look at a folder world before you train on it.")
    parser.add_argument("what", choices=("check", "preview"), help="check: what is wrong with it, line by line; preview: sample questions as one picture"), parser.add_argument("path", help="the folder")
    parser.add_argument("--save", default="preview.png", help="where the preview goes (default: %(default)s)")
    a = parser.parse_args()
    try:
        wrong, poor = check(a.path) if a.what == "check" else ([], [])
        print(*(f"wrong: {x}\n" for x in wrong), *(f"look at this: {x}\n" for x in poor), sep="", end="")
        if wrong:
            raise WorldError(f"{a.path}: {len(wrong)} lines are wrong{' (the check ends here)' if len(wrong) == 100 else ''}, see above")
        world = open_world(a.path)
        print(f"{a.path}: {len(world.entities)} entities, {sum(len(e.facts) for e in world.entities.values())} facts, {len(world.own)} questions of your own. Next: python train.py --world {a.path}")
        if a.what == "preview":
            atomic(a.save, lambda p: preview(world).save(p, format="PNG")), print(f"sample questions: {a.save}")
    except (WorldError, OSError) as e:
        parser.exit(2, f"error: {e}\n")


if __name__ == "__main__":
    main()
