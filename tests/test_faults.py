"""What can go wrong, and what happens then: hostile text, hostile files, kills, failing tools, a full disk."""
import ast
import contextlib
import csv
import io
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from alive import liven
from PIL import Image
from safetensors.torch import load_file
from test_data import good, write_world
from test_train import ALIVE, ROOT, TINY, run

import data
import gog
import grpo
import train
import tools
from model import TAGS

# ----------------------------------------------------------------------------------------------------------------- text

TURNS = ("<think> look at red round, for the river</think><gaze> 3 36 30 63</gaze>", "<think> want red round, see red round: yes, Brenna</think><answer> Brenna</answer>",
         "<search> Karvel Ost river</search>", "<glance></glance>")
SHARDS = (*TAGS, "<", ">", "/", "-1", "100", "9" * 400, "1e9", "²", "\0", "\ufffd", "‹", "\n", " ", "<gaze>", "</gaze> 1 2 3 4", "é", "🙂", "3.5", "nan")


def mutant(rng):
    """A turn with some of its parts cut, doubled, swapped or replaced."""
    parts = re.split(r"(</?\w+>| )", rng.choice(TURNS))
    for _ in range(rng.randint(0, 4)):
        i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
        parts[i:i + rng.randint(0, 2)] = rng.choice(([""], [parts[j]] * 2, [rng.choice(SHARDS)], parts[j:j + 3]))
    return "".join(parts)


def test_no_text_breaks_the_parser():
    """Prevents a crash, a regular expression that takes forever, or a half-read action: 100,000 mutated turns each give
    one of five kinds, and the boxes of gazes stay in range."""
    rng, kinds = random.Random(0), {}
    for _ in range(100_000):
        turn = tools.parse(mutant(rng))
        kinds[turn.kind] = kinds.get(turn.kind, 0) + 1
        if turn.kind == "gaze":
            assert len(turn.argument) == 4 and all(type(x) is int and 0 <= x <= 99 for x in turn.argument)
        elif turn.kind != "malformed":
            assert isinstance(turn.argument, str) and not set(turn.argument) & set("<>")
    assert min(kinds[k] for k in (*tools.ACTIONS, "malformed")) > 500
    began = time.time()
    tools.parse("<think>" * 20_000 + "<answer>" + " x" * 100_000)
    assert time.time() - began < 2


def test_no_rollout_breaks(env, policy, questions, monkeypatch):
    """Prevents an endless turn, an observation that the policy has written itself, or a mask that is off by one. What
    an untrained policy samples, at a low and at a high temperature, goes through the whole rollout: first parsed as it
    is (nearly all malformed), then mapped to actions (alive.py)."""
    for livened in (False, True):
        if livened:
            liven(monkeypatch.setattr)
        for temperature in (0.5, 5.0):
            for t in gog.rollout(policy, env, questions, 2, temperature, generator=torch.Generator().manual_seed(0)):
                said, told = ([i for i, own in zip(t.ids, t.trained) if own == who] for who in (True, False))
                assert len(t.ids) == len(t.trained) == len(t.logprobs) <= 832 and 1 <= len(t.turns) <= gog.MAX_TURNS
                assert all(env.sampleable[i] for i in said) and told.count(env.image_ids[0]) == len(env.image_ids) * len(t.pictures)
                assert all(len(list(turn)) <= gog.TURN_TOKENS for own, turn in itertools.groupby(t.trained) if own) and all(p <= 0 for p in t.logprobs)
                assert all(p == 0 for p, own in zip(t.logprobs, t.trained) if not own)


@pytest.mark.parametrize("answer", ["", " ", "...", "the a an", "Brenna or Old Vosk", "What is the name of the red round shield?", "Brenna</answer>", "<answer> Brenna", "Brenn", "Brenna Brenna"])
def test_rewards_cannot_be_talked_into(answer):
    """Prevents reward hacking: an empty answer, several answers joined, the question, tags, a part of the answer and
    the answer repeated are all wrong."""
    assert not tools.exact_match(answer, ["Brenna"])


@pytest.mark.parametrize("tags", ["<search> Brenna</search>", "<think> Brenna</think>", "<answer> Brenna</answer><answer> Brenna</answer>", "<answer> Brenna</answer> and more", "Brenna"])
def test_the_right_answer_in_the_wrong_tags_is_none(tags, env, questions):
    """Prevents a reward for an answer that was never given: the right word in a search or a thought, in two answers,
    before more text, or without tags gets 0."""
    q = replace(questions[0], answers=("Brenna",))
    t = gog.play_scripts(env, [q], [script(tags)])[0]
    assert t.answer is None and not t.correct and not t.well_formed and grpo.reward(t.correct, t.well_formed) == 0


def script(*turns):
    for turn in turns:  # not `yield from turns`: a tuple cannot receive the observations that are sent
        yield turn


# questions that the expert and the random baseline play, each. By hand: PLAYED=5000 python -m pytest
# tests/test_faults.py -k often_fail
PLAYED = int(os.environ.get("PLAYED", 250))


def test_tools_that_often_fail_stop_nobody(vocabulary, world, policy):
    """Prevents a run that dies because tools fail. At 20 % failures, every trajectory of the expert and of the random
    baseline ends within its turns, each failure is shown as "search failed", and the expert still answers three
    quarters right."""
    env = tools.Environment(vocabulary, tools.make_toolbox(world, 0.2, seed=1), policy.config)
    qs = data.questions(world, data.RL_MIX, PLAYED, "faults")
    tries = gog.play_scripts(env, qs, [gog.expert(q, random.Random(0)) for q in qs]) + gog.evaluate(None, env, qs, "random")
    told = [turn for t in tries for turn in t.turns if turn.kind in ("search", "glance", "gaze")]
    failed = [turn for turn in told if turn.observation == "search failed"]
    assert 0.15 < len(failed) / len(told) < 0.25 and not any(turn.ok for turn in failed) and max(len(t.turns) for t in tries) <= gog.MAX_TURNS
    assert sum(t.correct for t in tries[:PLAYED]) > 0.75 * PLAYED  # the expert tries again


def test_tools_may_be_slow_empty_or_renewed(env, world, policy, questions):
    """Prevents an environment that relies on tools that are fast, reachable, not empty and never updated. A slow index
    gives the same results; an empty or unreachable one says so; after an update, the expert finds the new facts."""
    play = lambda toolbox, ask=questions[:12]: gog.play_scripts(tools.Environment(env.v, toolbox, policy.config), ask, [gog.expert(q, random.Random(0)) for q in ask])
    images, texts = env.toolbox.image_index, env.toolbox.text_index

    class Slow(tools.TextIndex):
        def search(self, queries, k):
            time.sleep(0.01)
            return texts.search(queries, k)

    class Down(tools.TextIndex):
        def search(self, queries, k):
            raise TimeoutError("no route to the index")

    told = lambda tries: [[turn.observation for turn in t.turns] for t in tries]
    assert told(play(tools.Toolbox(images, Slow([])))) == told(play(tools.Toolbox(images, texts)))
    nothing = play(tools.Toolbox(tools.ImageIndex([]), tools.TextIndex([])))
    assert {"nothing found"} == {line for turns in told(nothing) for line in turns if line} and not any(t.correct for t in nothing if not t.question.search_free)
    down = tools.Toolbox(images, Down([]))
    lost = [turn for t in play(down) for turn in t.turns if turn.kind == "search"]
    assert lost and not any(turn.ok for turn in lost) and {turn.observation for turn in lost} == {"search failed"} and down.counts["failed"] == len(lost)
    (e, *_) = world.pictured()
    alone = play(tools.Toolbox(tools.ImageIndex([(e.name, e.blazon, e.picture(64))]), tools.TextIndex([(e.name, "!")])))
    # one entity in the image index, and a passage without words in the text index
    assert any(e.name in turn.observation for t in alone for turn in t.turns) and not any(t.correct for t in alone if not t.question.search_free)
    searched, asked = gog.suite(world, "live", 12)
    renewed = tools.Toolbox(images, texts)
    play(renewed, asked)
    fresh = tools.make_toolbox(searched, late=True)
    renewed.image_index, renewed.text_index = fresh.image_index, fresh.text_index
    assert all(t.correct for t in play(renewed, asked))


# ---------------------------------------------------------------------------------------------------------------- files

def pictures(folder):
    """Write odd but valid pictures, then some files that are no (whole) pictures: {name: is it valid?}."""
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    saved = {"cmyk.jpg": (rgb.convert("CMYK"), {}), "palette.png": (rgb.convert("P"), {"transparency": 0}), "grey16.png": (Image.new("I;16", (30, 20), 40000), {}),
             "one.png": (rgb.resize((1, 1)), {}), "wide.png": (rgb.resize((20_000, 2)), {}), "turned.jpg": (rgb, {"exif": exif}), "grey.png": (rgb.convert("LA"), {}),
             "moving.gif": (rgb, {"save_all": True, "append_images": [rgb.rotate(90)]})}
    for name, (picture, options) in saved.items():
        picture.save(folder / name, **options)
    Image.new("RGBA", (30, 20), (255, 0, 0, 0)).save(folder / "hidden.png")
    saved |= {"hidden.png": 0}
    whole = (folder / "turned.jpg").read_bytes()
    (folder / "torn.jpg").write_bytes(whole[:len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    return dict.fromkeys(saved, True) | dict.fromkeys(("torn.jpg", "empty.png", "text.png"), False)


def test_odd_pictures_are_read_or_refused(tmp_path):
    """Prevents a traceback, a black picture or a photo on its side: every odd format is read as RGB as a viewer shows
    it, and a broken file is refused by name."""
    for name, is_good in pictures(tmp_path).items():
        if is_good:
            scene = data.Scene((), (), "picture", 0, data.Path(data.check_image(tmp_path / name) and tmp_path / name))
            assert scene.picture().mode == "RGB" and tools.to_array(scene.picture(), 64).shape == (3, 64, 64), name
        else:
            with pytest.raises(data.WorldError, match=name):
                data.check_image(tmp_path / name)
    assert data.check_image(tmp_path / "turned.jpg").size == (40, 60)  # 60 x 40 on disk
    shown = lambda name: data.Scene((), (), "picture", 0, tmp_path / name).picture().getpixel((1, 1))
    # 40,000 of 65,535 is 155 of 255; transparent pixels show as grey
    assert shown("grey16.png") == (155, 155, 155) and shown("hidden.png") == tools.GREY


def test_large_pictures_do_not_fill_the_memory(tmp_path):
    """Prevents photos from being kept at full size, and a very wide, flat picture from becoming huge when it is drawn
    96 pixels high."""
    Image.new("RGB", (5000, 4000), "red").save(tmp_path / "large.jpg")
    Image.new("RGB", (20_000, 1), "red").save(tmp_path / "0.png")
    assert max(data.check_image(tmp_path / "large.jpg").size) == data.LONGEST_SIDE
    world = data.folder_world(write_world(tmp_path, [{"name": f"n{i}", "image": "0.png"} for i in range(8)]))
    assert world.entities["n0"].picture(96).size[0] <= 20 * 96


@pytest.mark.parametrize("name", ["eps", "png", "jpg", "webp", "gif"])
def test_broken_pictures_are_refused_by_name(tmp_path, name):
    """Prevents a traceback on a damaged picture, and an EPS file from being read by an outside program: mutated
    pictures are read or refused with WorldError, and EPS is always refused."""
    picture, rng = io.BytesIO(), random.Random(0)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 9, 3), np.uint8)).save(picture, {"jpg": "jpeg"}.get(name, name))
    for i in range(300):
        broken = bytearray(picture.getvalue())
        for _ in range(rng.randint(0 if name == "eps" else 1, 6)):
            broken[rng.randrange(min(len(broken), 200))] = rng.randrange(256)
        (tmp_path / f"{i}.{name}").write_bytes(broken)
        with contextlib.suppress(data.WorldError):
            assert data.check_image(tmp_path / f"{i}.{name}").mode == "RGBA" and name != "eps"


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    """Prevents a small file that unpacks to a huge picture from filling the memory."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (50, 50)).save(tmp_path / "bomb.png")
    with pytest.raises(data.WorldError, match="bomb.png"):
        data.check_image(tmp_path / "bomb.png")


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    """Prevents a shared world from reading its user's files through a link."""
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    folder = write_world(tmp_path / "w", [*good(8), {"name": "x", "image": "link.png"}])
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(data.WorldError, match="lies outside"):
        data.folder_world(folder)
    write_world(folder, good(8))
    (folder / "questions.jsonl").symlink_to(tmp_path / "secret.png")
    with pytest.raises(data.WorldError, match="links to a file outside"):
        data.folder_world(folder)


SIZE = int(os.environ.get("SIZE", 2**22))  # by hand: SIZE=1073741824, a gigabyte


@pytest.mark.parametrize("line", [b"x", b'{"name": 1}\n'])
def test_a_giant_file_is_read_line_by_line(tmp_path, line):
    """Prevents a giant file from filling the memory: one endless line is refused, of very many bad lines only the first
    hundred are reported, and less than 5 MB are allocated."""
    with open(tmp_path / "entities.jsonl", "wb") as f:
        for _ in range(SIZE // 2**20):
            f.write(line * (2**20 // len(line)))
    tracemalloc.start()
    try:
        with pytest.raises(data.WorldError, match="longer than 100,000") if line == b"x" else contextlib.nullcontext():
            assert len(data.check(tmp_path)[0]) == 100
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text, says", [
    (b"step,value\n1,2,3\n", ":2: more or fewer"), (b"step,value\n1,2\n3\n", ":3: more or fewer"), (b'step,value\n1,"2,5"\n', ":2: .*decimal comma"), ("step,value\n1,\u00e9".encode("latin-1"), "cannot be read"), (b"step;value\n1;2\n", "its columns are step;value")])
def test_tables_mended_by_hand_are_read_or_refused(tmp_path, text, says):
    """Prevents a traceback after an hour's stage, or further damage to a table, because a spreadsheet has saved it in
    its own format: it is refused with a clear message and left as it is."""
    (tmp_path / "results.csv").write_bytes(text)
    with pytest.raises(data.WorldError, match=says):
        tools.write_rows(tmp_path / "results.csv", [{"step": 1, "value": 5}], ["step", "value"], ["step"])
    assert (tmp_path / "results.csv").read_bytes() == text


@pytest.mark.parametrize("path", [".", "", "/", "taken"])
def test_a_file_that_is_a_folder_is_refused(tmp_path, monkeypatch, path):
    """Prevents a traceback after the work is done, for --save . and the like: OSError, which every program tells in one
    line."""
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    with pytest.raises(OSError, match="could not be written"):
        tools.atomic(path, lambda p: p.write_text("x"))
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_results_that_cannot_be_written_are_told_first(tmp_path):
    """Prevents a stage whose results are lost at its end because they cannot be written: it is refused before it
    begins."""
    (tmp_path / "taken").write_text("a file")
    done = run("--stage", "pretrain", *TINY, "--out", "run", "--results", "taken", cwd=tmp_path)
    assert done.returncode == 2 and "taken" in done.stderr.strip().splitlines()[-1] and not (tmp_path / "run").exists()


def test_nothing_is_unpickled_or_evaluated():
    """Prevents a checkpoint, a world or an answer from running code of its own: no product file imports or calls what
    could unpickle, evaluate, start a program or reach a network."""
    banned = {"pickle", "marshal", "shelve", "socket", "urllib", "http", "requests", "eval", "exec", "torch.load", "np.load", "os.system", "subprocess"}
    for file in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else [ast.unparse(node.func)] if isinstance(node, ast.Call) else []
            assert not {n.partition(".")[0] if isinstance(node, (ast.Import, ast.ImportFrom)) else n for n in names} & banned, (file.name, names)


def test_encodings(tmp_path):
    """Prevents a byte-order mark (which Windows editors write) from spoiling the first line, and a traceback for a file
    in another encoding."""
    folder = write_world(tmp_path / "w", good(8))
    text = (folder / "entities.jsonl").read_text()
    (folder / "entities.jsonl").write_text(text, encoding="utf-8-sig")
    assert len(data.folder_world(folder).entities) == 8
    (folder / "entities.jsonl").write_text(text, encoding="utf-16")
    with pytest.raises(data.WorldError, match="UTF-8"):
        data.folder_world(folder)


# ---------------------------------------------------------------------------------------------------- kills, full disks

# by hand, half an hour: KILLS=200 python -m pytest -s tests/test_faults.py -k at_any_moment
KILLS = int(os.environ.get("KILLS", 1))


def test_kill_at_any_moment(tmp_path, begun):
    """Prevents half-written checkpoints: an RL run that is killed without warning (kill -9, KILLS times) resumes each
    time, and ends with the weights and metrics of an unbroken run. Its policy acts (alive.py)."""
    stage = ["--stage", "rl", *TINY, "--eval-every", "1", "--failure-rate", "0.3", "--rl-lr", "0.1", "--curriculum", "fresh", "--rl-steps", str(2 + 4 * KILLS), "--out", "run"]
    begun(tmp_path / "run"), begun(whole := tmp_path / "whole")
    assert run(*stage, "--out", "whole", cwd=tmp_path, timeout=100 + 10 * KILLS, program=ALIVE).returncode == 0
    rng, kills = random.Random(time.time()), 0
    while kills < KILLS and not (tmp_path / "run" / "rl.safetensors").is_file():
        process = subprocess.Popen([sys.executable, str(ALIVE), *stage, "--resume"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not re.match(r"step \d+:", process.stderr.readline()):
            pass
        time.sleep(rng.random() / 2)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode in (0, -signal.SIGKILL), "it did not resume"
    print(f"killed {kills} times")
    (tmp_path / "run" / ".rl.state.safetensors.1.tmp").write_bytes(b"half")  # as a kill during writing leaves it
    assert run(*stage, "--resume", cwd=tmp_path, timeout=100 + 10 * KILLS, program=ALIVE).returncode == 0
    tell = lambda d: [{k: v for k, v in r.items() if "seconds" not in k} for r in csv.DictReader(open(tmp_path / d / "rl.csv"))]
    assert kills and tell("run") == tell("whole") and [int(r["step"]) for r in tell("run")] == list(range(4 * KILLS + 3))
    ended, unbroken, before = (load_file(f) for f in (tmp_path / "run" / "rl.safetensors", whole / "rl.safetensors", whole / "sft.safetensors"))
    same = lambda a, b: all(torch.equal(a[k], b[k]) for k in a)
    assert same(ended, unbroken) and not same(ended, before) and not list((tmp_path / "run").glob(".rl.*.tmp"))


@pytest.mark.skipif("STEPS" not in os.environ or not Path("/proc/self/statm").exists(), reason="by hand, three minutes: STEPS=4000 python -m pytest -s tests/test_faults.py -k memory")
def test_memory_stays_flat(tmp_path, begun):
    """Prevents a memory leak that ends a long run: resident memory, sampled once a second, rises by less than 2 % in
    the second half of a run."""
    steps, used = int(os.environ["STEPS"]), []
    begun(tmp_path / "run")
    process = subprocess.Popen([sys.executable, str(ALIVE), *TINY, "--out", "run", "--rl-steps", str(steps), "--eval-every", "100"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        used.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
        time.sleep(1)
    late = np.array(used[len(used) // 2:-2])
    assert len(late) > 20, "too short a run: more STEPS"
    slope = np.polyfit(np.linspace(0, steps / 2, len(late)), late, 1)[0]
    print(f"{steps} steps, {len(used)} s: {late[0]:.0f} to {late[-1]:.0f} MB in the second half, {1000 * slope:.1f} MB in a thousand steps")
    assert process.returncode == 0 and slope * steps / 2 < 0.02 * late.mean()


# by hand, most of an hour and 20 GB: ENTITIES=1000000 python -m pytest -s tests/test_faults.py -k holds_no_more
ENTITIES = int(os.environ.get("ENTITIES", 2000))


@contextlib.contextmanager
def held(most):
    """Fails if more than `most` bytes are newly allocated at any moment inside the block."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
        print(f"{peak / 1e6:,.0f} MB")
        assert peak < most
    finally:
        tracemalloc.stop()


def test_an_index_holds_no_more_than_it_says():
    """Prevents an index that needs several times the memory of its vectors while it is built or searched. Limits: for
    pictures 19.1 kB per entity, plus a tenth for names and 50 MB for the work; for text 3 kB per passage and 15 MB. The
    arrays of the finished text index stay below 0.7 kB per passage."""
    picture = lambda i: Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 5, 3), np.uint8))
    asked, rng = [0, ENTITIES // 2, ENTITIES - 1], random.Random(0)
    with held(1.1 * 19.1e3 * ENTITIES + 50e6):
        index = tools.ImageIndex((str(i), "", picture(i)) for i in range(ENTITIES))
        assert [hits[0][1] for hits in index.search([picture(i) for i in asked], 2)] == [str(i) for i in asked]
    del index
    names = [f"{data.word(rng, 3)} {data.word(rng)}" for _ in range(ENTITIES)]
    tools._word.cache_clear()
    with held(3e3 * ENTITIES + 15e6):
        index = tools.TextIndex((name, f"In {name} the ruler is {data.word(rng)}.") for name in names)
        assert all(names[i] in hits[0][1] for i, hits in zip(asked, index.search([f"{names[i]} ruler" for i in asked], 2)))
    assert sum(x.nbytes for x in (index.where, index.weight, index.keys, index.bounds, index.rarity)) < 700 * ENTITIES


def test_runs_that_write_to_one_table_take_turns(tmp_path):
    """Prevents lost rows when several runs write to one table: one could read it before another writes, and write it
    after. Twelve threads add a row each, and all rows must be there."""
    table = tmp_path / "results.csv"
    with ThreadPoolExecutor(12) as runs:
        for done in [runs.submit(tools.write_rows, table, [{"seed": seed, "value": 0.5}], ["seed", "value"], ["seed"]) for seed in range(12)]:
            done.result()
    assert sorted(int(r["seed"]) for r in tools.read_rows(table)) == [*range(12)]


def test_two_runs_in_one_folder(tmp_path, monkeypatch, capsys):
    """Prevents two runs of a stage from overwriting each other's checkpoints: the second one is refused, with the
    advice to use --out. The lock ends with its process, even if that is killed."""
    stage = ["--stage", "pretrain", *TINY, "--out", "run"]
    first = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *stage, "--word-steps", "100000"], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while first.poll() is None and "part=words" not in first.stderr.readline():
        pass
    monkeypatch.chdir(tmp_path), monkeypatch.setattr(sys, "argv", ["train.py", *stage])
    with pytest.raises(SystemExit) as refused:
        train.main()
    told = capsys.readouterr().err
    assert refused.value.code == 2 and "pretrain.lock: database is locked" in told and "--out" in told and first.poll() is None
    first.kill()
    first.wait()
    train.main()
    assert not (tmp_path / "run" / "pretrain.lock").exists()
    # the process that made batches for the first run survives the kill, stuck with a batch that nobody takes
    with contextlib.suppress(ProcessLookupError):
        os.killpg(first.pid, signal.SIGKILL)


def test_a_folder_without_a_lock_is_refused(tmp_path):
    """Prevents an unclear error where the lock file cannot even be opened, as in a read-only folder: the message names
    the file and advises --out."""
    (tmp_path / "rl.lock").mkdir()
    with pytest.raises(OSError, match="rl.lock: unable to open.*--out"):
        train.Run(train.Args(out=str(tmp_path)), "rl")


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot limit a process's files")
def test_a_full_disk_is_said_in_one_line(tmp_path):
    """Prevents a traceback, and the loss of the last checkpoint, when the disk is full. (Simulated: no file of this
    process may grow beyond 700 kB, and the weights alone have more.)"""
    import resource
    stage = [sys.executable, str(ROOT / "train.py"), "--stage", "pretrain", *TINY, "--out", "run", "--save-every", "1"]
    (tmp_path / "run").mkdir()
    state = tmp_path / "run" / "pretrain.state.safetensors"
    state.write_bytes(b"the checkpoint before")  # the run starts anew and would replace it
    stopped = subprocess.run(stage, cwd=tmp_path, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000)))
    last = stopped.stderr.strip().splitlines()[-1]
    assert stopped.returncode == 2 and last.startswith("error: ") and "pretrain.state.safetensors could not be written" in last and "Traceback" not in stopped.stderr
    assert state.read_bytes() == b"the checkpoint before" and not list((tmp_path / "run").glob(".*.tmp"))
