import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import data
import gog
import tools


def test_same_seed_same_bytes(world):
    """Prevents hidden randomness, such as an unseeded generator: the same seed gives the same world, passages,
    questions and scenes."""
    again = data.heraldry(0, 200)
    assert tools.passages(again) == tools.passages(world) and again.splits == world.splits
    a, b = (data.questions(w, data.SFT_MIX, 30, 5) for w in (world, again))
    assert [(q.text, q.answers, q.scene.boxes) for q in a] == [(q.text, q.answers, q.scene.boxes) for q in b]
    picture = a[0].scene.picture().tobytes()
    data._drawn.cache_clear()  # else the second picture would be the first one, not drawn again
    assert picture == b[0].scene.picture().tobytes()


def test_splits_and_suites_never_share_entities(world):
    """Prevents leakage: no town that hangs on a training wall may hang on a wall of a suite."""
    groups = [set(g) for g in world.splits.values()]
    assert sum(map(len, groups)) == len(set().union(*groups))
    train = set(world.splits["train"])
    shown = lambda qs: {e.name for q in qs for e in q.scene.entities}
    assert shown(data.questions(world, data.RL_MIX, 100, 0)) <= train
    for name in gog.SUITES:
        assert not shown(gog.suite(world, name, 40)[1]) & train


def test_late_entities_are_unknown_before(world):
    """Prevents an index of training time that already knows what comes later: no passage of it is about a town of the
    split `late`, or mentions one."""
    mentioned = lambda passages: sum(re.search(rf"(?<!\w){re.escape(n)}(?!\w)", f"{title} | {text}") is not None for title, text in passages for n in world.splits["late"][:5])
    assert not mentioned(tools.passages(world)) and mentioned(tools.passages(world, late=True)) >= 5


def test_live_rewrites_facts(world):
    """Prevents a `live` suite that old knowledge can answer: most test towns have another ruler, and facts of training
    towns are unchanged."""
    aged = gog.aged(world)
    towns = world.splits["test"]
    changed = [aged.entities[n].facts["ruler"] != world.entities[n].facts["ruler"] for n in towns]
    assert sum(changed) > 0.8 * len(towns)
    assert all(aged.entities[n].facts == world.entities[n].facts for n in world.splits["train"])


def test_boxes_frame_what_is_drawn(world):
    """Prevents boxes that miss their object: a box lies within the picture, overlaps no other box, and contains the
    colour of its shield."""
    rng = random.Random(0)
    scene = data.hang(rng.sample(world.pictured("train"), 6), "shield", rng)
    for i, a in enumerate(scene.boxes):
        assert 0 <= a[0] < a[2] <= 99 and 0 <= a[1] < a[3] <= 99
        assert all(data.iou(a, b) == 0 for b in scene.boxes[i + 1:])
    plain = next(e for e in world.pictured() if not e.arms.ordinary and e.arms.outline == "square")
    scene = data.hang([plain], "shield", rng, 1, (0.5, 0.6))
    x0, y0, x1, y1 = tools.to_pixels(scene.boxes[0], (data.SCENE_PX,) * 2)
    pixel = scene.picture().getpixel((x0 + 8, y0 + 8))
    assert max(abs(a - b) for a, b in zip(pixel, data.TINCTURES[plain.arms.tincture])) < 25


def test_iou_against_counting():
    """Prevents a wrong overlap formula: the closed form equals counting unit cells."""
    rng = random.Random(0)
    for _ in range(50):
        a, b = (tuple(sorted(rng.sample(range(12), 2)) + sorted(rng.sample(range(12), 2))) for _ in "ab")
        a, b = ((x[0], x[2], x[1], x[3]) for x in (a, b))
        cells = lambda q: {(x, y) for x in range(q[0], q[2]) for y in range(q[1], q[3])}
        assert data.iou(a, b) == pytest.approx(len(cells(a) & cells(b)) / len(cells(a) | cells(b)))


def test_references_are_unambiguous(world):
    """Prevents questions with two right answers: an expression may fit only one object of a scene."""
    rng = random.Random(1)
    for n, cells in ((1, 1), (3, 3), (6, 3), (10, 4)) * 10:
        scene = data.hang(rng.sample(world.pictured(), n), "shield", rng, cells)
        said = [t for names in data.references(scene) for t in names.values()]
        assert len(said) == len(set(said))


def test_a_flag_is_of_all_its_colours():
    """Prevents questions about flags with several right answers: "the flag left of the red flag" where two flags have
    red in them, a colour question that accepts only one of three colours, and a count that leaves out a flag whose
    largest colour is another."""
    flags, rng = data.open_world(str(Path(__file__).parent.parent / "worlds" / "countries")), random.Random(2)
    has = lambda e, colour: colour in e.blazon.replace(",", "").split()
    anchors = 0
    for _ in range(150):
        scene = data.hang(rng.sample(flags.pictured(), 4), "flag", rng, 3)
        for expression in (names["neighbour"] for names in data.references(scene) if "neighbour" in names):
            colour, shape = expression.split(" the ")[1].split()[:2]
            anchors += 1
            assert sum(has(e, colour) and e.look.split()[1] == shape for e in scene.entities) == 1, expression
    assert anchors > 20
    for q in data.questions(flags, [("colour", "normal", 1), ("count", "normal", 1)], 60, "colours"):
        if q.kind == "count":
            assert q.answers == (str(sum(has(e, q.text.split()[-1].strip("?")) for e in q.scene.entities)),)
        else:
            assert set(q.answers) == {c for c in data.TINCTURES if has(q.scene.entities[q.targets[0]], c)}


def test_strangers_change_no_question():
    """Prevents a larger index from being measured on other questions: a new town named like, say, a river of the world
    would turn that river into a link and open new chains."""
    small = data.heraldry(0, 120)
    crowded = data.with_strangers(small, 3000)
    asked = lambda world: [(q.text, q.answers) for q in data.questions(world, [("hop2", "normal", 1), ("hop4", "normal", 1)], 60, "strangers", ("test",))]
    assert len(crowded.entities) > 1000 and asked(small) == asked(crowded)


def test_relations_say_what_the_picture_shows(world):
    """Prevents a 'left of' that means right of, and a 'leftmost' counted from the wrong side: checked on a wall laid
    out by hand."""
    towns = world.pictured()[:4]
    boxes = ((0, 0, 20, 20), (30, 2, 52, 22), (70, 1, 90, 21), (35, 42, 65, 72))
    first, second, third, low = data.layout(data.Scene(tuple(towns), boxes, "shield", 0))
    assert [p["across"] for p in (first, second, third, low)] == ["leftmost", "", "rightmost", ""]
    assert [p["down"] for p in (first, second, third, low)] == ["", "", "", "lowest"] and [p["size"] for p in (first, third, low)] == ["", "", "largest"]
    assert [p["zone"] for p in (first, third, low)] == [0, 2, 4]
    assert first["left of"] == 1 and second["right of"] == 0 and "left of" not in third
    assert low.get("below") == 1 and second.get("above") == 3


def test_answers_follow_the_chain(world):
    """Prevents questions whose gold answer is not what their own words ask for."""
    for q in data.questions(world, data.RL_MIX, 150, "chain"):
        if q.chain and q.kind != "compare":
            value = q.scene.entities[q.targets[0]].name
            for relation in q.chain:
                value = world.entities[value].facts[relation]
            assert q.answers == (value,) and q.text.index(q.chain[-1]) <= q.text.index(q.chain[0])


def test_vocabulary_spells_anything(vocabulary):
    """Prevents lost letters and split numbers: any text survives encoding and decoding, and a box is four tokens."""
    for text in (" Ünïcode Ørsted 漢字 🙂", " 12.5 km²", "  two  blanks"):
        assert vocabulary.decode(vocabulary.encode(text)).strip() == text.strip()
    assert all(len(vocabulary.encode(f" {n}")) == 1 for n in range(100))
    assert len(vocabulary.encode_turn("<gaze> 1 22 33 99</gaze>")) == 6


def write_world(folder, rows, images=("a.png",)):
    folder.mkdir(exist_ok=True)
    for name in images:
        Image.new("RGB", (30, 20), (200, 30, 40)).save(folder / name)
    (folder / "entities.jsonl").write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return folder


def good(n):
    return [{"name": f"n{i}", "image": "a.png", "facts": {"capital": f"c{i}"}} for i in range(n)]


@pytest.mark.parametrize("bad, says", [
    ('{"name": ', ":9: not valid JSON"), ("[1]", ":9: expected a JSON object"), ({"name": "x"}, ":9: no 'image'"), ({"name": "n1", "image": "a.png"}, "given twice"),
    ({"name": "x", "image": "../../etc/passwd"}, "lies outside"), ({"name": "x", "image": "b.png"}, "does not exist"),
    ({"name": "x", "image": "entities.jsonl"}, "cannot be read"), ({"name": "x", "image": "a.png", "facts": {"r": None}}, "fact"),
    ({"name": "x", "image": "a.png", "facts": {"r": float("nan")}}, "fact"), ({"name": "x: y", "image": "a.png"}, "holds"),
    ({"name": "x", "image": "a.png", "facts": {"r": "a | b"}}, "holds"), ({"name": "x", "image": "a.png", "facts": {"r": "<5 %"}}, "holds"), ({"name": "x", "image": "a.png", "facts": {"r": "€"}}, "no letters or digits"), ({"name": "❤\ufe0f", "image": "a.png"}, "no letters or digits"),
    ({"name": "x", "image": "a.png", "facts": {"Colour": "brown"}}, "asked of the picture"), *(({"name": name, "image": "a.png"}, "holds") for name in ("| x", "x |", "x_|_y")),
    ({"name": "x" * 201, "image": "a.png"}, "over 200"), ({"name": "x\ud800", "image": "a.png"}, ":9: not valid JSON"), ("[" * 20000, ":9: not valid JSON"), ({"name": "x", "image": "a\0.png"}, "is not a valid path|does not exist"),
    ({"name": "x", "image": "a" * 5000}, "is not a valid path|does not exist"), ({"name": "x", "image": "loop.png"}, "is not a valid path|does not exist")])
def test_bad_folder_worlds_are_refused(tmp_path, bad, says):
    """Prevents a traceback or a silently wrong world: every kind of bad line raises WorldError, with a message that
    says what is wrong."""
    with pytest.raises(data.WorldError, match=says):
        folder = write_world(tmp_path / "w", [*good(8), bad])
        if "loop.png" in str(bad):
            (folder / "loop.png").symlink_to("loop.png")
        data.folder_world(folder)


def test_a_world_that_links_to_itself_is_refused(tmp_path):
    """Prevents a traceback for a link that leads nowhere."""
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", tmp_path / "loop" / "x"):
        with pytest.raises(data.WorldError, match="entities.jsonl: cannot be read"):
            data.open_world(str(path))
    assert data.folder_name(".") == Path.cwd().name


@pytest.mark.parametrize("bad, says", [
    ({"image": "a.png", "question": "why " * 60, "answers": ["x"]}, ":2: 'question'"), ({"image": "a.png", "question": "What?", "answers": ["..."]}, ":2: 'question'"),
    ({"image": "a.png", "question": "What?", "answers": "Paris"}, ":2: 'question'"), ({"image": "../a.png", "question": "What?", "answers": ["x"]}, ":2: .*outside"),
    ({"image": "a.png", "question": "What?", "answers": ["x"], "box": [9, 9, 5, 20]}, ":2: 'box'"), ({"image": "a.png", "question": "What?", "answers": ["x"], "box": [0, 0, 5, True]}, ":2: 'box'"),
    ({"image": "a.png", "question": "What?", "answers": ["x"], "box": 5}, ":2: 'box'"),
    ({"image": "a.png", "question": "\U00020000" * 190, "answers": ["x"]}, ":2: .*600 bytes")])
def test_own_questions(tmp_path, bad, says):
    """Prevents a user's own questions from being dropped silently, or a bad one from reaching training."""
    folder = write_world(tmp_path / "w", good(8))
    rows = [{"image": "a.png", "question": "What is it?", "answers": ["x", "y"], "box": [1, 2, 30, 40]}]
    (folder / "questions.jsonl").write_text(json.dumps(rows[0]))
    (own,) = data.folder_world(folder).own
    assert own.answers == ("x", "y") and own.scene.boxes[own.targets[0]] == (1, 2, 30, 40) and own.scene.picture().size == (30, 20)
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(r) for r in [*rows, bad]))
    with pytest.raises(data.WorldError, match=says):
        data.folder_world(folder)


def test_questions_leave_room_for_turns(tmp_path, vocabulary):
    """Prevents a prompt that overflows the cache, whose last keys would then overwrite each other. With relation names
    of 180 letters, chains of one and three relations are asked about, but not of four."""
    chained = [{"name": f"n{i}", "image": f"{i}.png", "facts": {"r" * 180: f"n{(i + 1) % 12}", "s" * 180: f"n{(i + 5) % 12}"}} for i in range(12)]
    folder = write_world(tmp_path / "w", chained, [])
    for i in range(12):
        Image.new("RGB", (20 + i, 20), (20 * i, 200 - 15 * i, 40)).save(folder / f"{i}.png")
    asked = data.questions(data.folder_world(folder), [("hop1", "single", 1), ("hop3", "single", 1), ("hop4", "single", 1)], 40, "long")
    assert {q.kind for q in asked} == {"hop1", "hop3"} and max(len(vocabulary.encode(q.text)) for q in asked) <= 600


def test_ribbons_and_counts_in_words(tmp_path):
    """Prevents a traceback, an hour into a run, for a very long and thin picture, or for a value like "about 6" where
    numbers are compared."""
    rows = [{"name": f"n{i}", "image": f"{i % 3}.png", "facts": {"number of neighbours": ("6", "about 6", "4")[i % 3]}} for i in range(12)]
    folder = write_world(tmp_path / "countries", rows, [])
    for i, size in enumerate([(30, 20), (900, 5), (4, 900)]):
        Image.new("RGB", size, (200, 30, 40)).save(folder / f"{i}.png")
    world = data.folder_world(folder)
    for q in data.questions(world, [("name", "normal", 1), ("compare", "normal", 1), ("hop1", "single", 1)], 40, "ribbons"):
        assert min(min(b[2] - b[0], b[3] - b[1]) for b in q.scene.boxes) >= 3 and q.scene.picture().size == (384, 384)


@pytest.mark.parametrize("rgb, name", [((8, 44, 94), "blue"), ((0, 180, 200), "blue"), ((255, 150, 50), "gold"), ((120, 10, 30), "red"), ((0, 60, 20), "green"), ((250, 240, 230), "white"),
                                       ((25, 20, 30), "black"), ((90, 90, 90), "black"), *((rgb, name) for name, rgb in data.TINCTURES.items())])
def test_colours_are_called_what_people_call_them(rgb, name):
    """Prevents asking for "the black flag" where everybody sees a navy one: the nearest tincture in RGB is not the one
    that a person would name."""
    assert data._tincture(rgb) == name


def test_empty_and_missing_worlds(tmp_path):
    """Prevents a world that is missing or has too few entities from reaching training."""
    with pytest.raises(data.WorldError, match="at least"):
        data.folder_world(write_world(tmp_path / "w", good(2)))
    with pytest.raises(data.WorldError, match="cannot be read"):
        data.folder_world(tmp_path / "nowhere")


def test_check_tells_everything_at_once(tmp_path, world, monkeypatch, capsys):
    """Prevents a check that reports one error per run: it names every bad line, and warns of entities without facts,
    pictures that look alike and facts that contain their entity's name."""
    shields = world.pictured()[:10]
    rows = [{"name": f"Town{i}", "image": f"{i}.png", "facts": {"river": f"r{i}", "anthem": f"Song of Town{i}" if i == 4 else "Song"}} for i in range(10)]
    rows[9]["fact"] = rows[9].pop("facts")  # a mistyped key
    folder = write_world(tmp_path / "w", [*rows[:3], "{", *rows[3:], {"name": "Town1", "image": "1.png"}], [])
    for i, e in enumerate(shields):
        (shields[6] if i == 8 else e).picture(80).save(folder / f"{i}.png")
    (folder / "questions.jsonl").write_text(json.dumps({"image": "0.png", "question": "What?", "answers": []}))
    wrong, poor = data.check(folder)
    assert [w.split(": ")[0][len(str(folder)) + 1:] for w in wrong] == ["entities.jsonl:4", "entities.jsonl:12", "questions.jsonl:1"]
    assert len(poor) == 3 and "1 of 10 entities have no facts, 'Town9'" in poor[0] and "'Town8' is nearly identical to 'Town6'" in poor[1] and "'Song of Town4'" in poor[2]
    monkeypatch.setattr("sys.argv", ["data.py", "check", str(folder)])
    with pytest.raises(SystemExit) as stop:
        data.main()
    printed = capsys.readouterr()
    assert stop.value.code == 2 and "3 lines are wrong" in printed.err and printed.out.count("wrong: ") == 3


def test_preview_shows_a_world(tmp_path, monkeypatch, capsys):
    """Prevents training for an hour on a world that nobody has looked at: `preview` draws sample questions as one
    picture, the user's own first."""
    monkeypatch.setattr("sys.argv", ["data.py", "preview", "worlds/countries", "--save", str(tmp_path / "preview.png")])
    data.main()
    assert Image.open(tmp_path / "preview.png").width == 1200 and "232 entities" in capsys.readouterr().out
    Image.new("RGB", (2000, 100), (200, 30, 40)).save(tmp_path / "wide.png")
    own = data.own_question(tmp_path, "line 1", '{"image": "wide.png", "question": "What?", "answers": ["this"]}')
    sheet = data.preview(replace(data.open_world("worlds/countries"), own=(own,)))
    assert sheet.getpixel((200, 15)) == (200, 30, 40) != sheet.getpixel((600, 15))


def test_the_shipped_world_loads():
    """Prevents shipping a broken example: countries loads, `check` finds no errors, and every suite can be asked."""
    world = data.folder_world("worlds/countries")
    assert not data.check("worlds/countries")[0]
    assert len(world.pictured()) > 200 and world.entities["France"].facts["capital"] == "Paris"
    for name in gog.SUITES:
        gog.suite(world, name, 20)  # WorldError if there are none
