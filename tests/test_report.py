"""Tests of the page report.html."""
import json
import random
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

import data
import gog
import train

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "</script><script>document.title = 'broken'</script><img src='http://example.invalid/x.png'>"


@pytest.fixture(scope="module")
def report(tmp_path_factory, env, world, policy):
    """(path of the page, its entries, their trajectories): two questions, each answered by the expert and by a policy.
    The text of the second question and one caption in an observation are hostile."""
    qs = [replace(q, text=HOSTILE) if n else q for n, q in enumerate(data.questions(world, [("hop1", "normal", 1)], 2, "report"))]
    tries = [gog.play_scripts(env, qs, [gog.expert(q, random.Random(0)) for q in qs]), gog.rollout(policy, env, qs, temperature=0.0)]
    tries[0][0].turns[0].observation = f"97 {qs[0].scene.entities[0].name}: {HOSTILE} | 80 nobody: nothing"
    pictures, told = {}, []
    for who, of_policy in zip(("expert", "policy"), tries):
        told += [dict(key=f"{n}", suite="facts", policy=who, reward=1.0, advantage=None, **gog.record(t, world, env.v, pictures)) for n, t in enumerate(of_policy)]
    path = tmp_path_factory.mktemp("report") / "report.html"
    table = gog.accuracy_table([dict(row="rl", suite="facts", metric="accuracy", value="0.5")])
    gog.write_report(path, "a title", "about it", told, pictures, table, gog.curve_values([{c: str(n) for c in train.CURVES} for n in range(5)], train.CURVES))
    return path, told, [t for of_policy in tries for t in of_policy]


def test_a_report_says_what_was_done(report):
    """Prevents a page that shows other tokens, turns or results than the trajectory had, and a jsonl that differs from
    the page."""
    path, told, tries = report
    page = path.read_text(encoding="utf-8")
    inside = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert inside["trajectories"] == json.loads(json.dumps(told)) == [json.loads(line) for line in path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
    assert inside["table"] == {"columns": ["facts", "mean"], "rows": [["rl", 50.0, 50.0]]} and len(inside["curves"]) == len(train.CURVES)
    for t, r in zip(tries, told):
        assert sum(own for _, own in r["tokens"]) == sum(t.trained)
        assert sum(text == "[picture]" for text, _ in r["tokens"]) == len(t.pictures)
        assert [turn["kind"] for turn in r["turns"]] == [turn.kind for turn in t.turns] and r["r_acc"] == t.correct and r["scene"] < len(inside["pictures"])
        assert all((turn["iou"] is not None) == (turn["kind"] == "gaze") for turn in r["turns"])
    hit, other = told[0]["turns"][0]["found"]
    assert hit["picture"] is not None and other["picture"] is None


def test_no_text_becomes_markup(report):
    """Prevents a report in which a fact or an answer runs as a script, and a page that loads anything from the
    network."""
    page = report[0].read_text(encoding="utf-8")
    assert page.count("</script>") == page.count("<script") == 2 and "<img src" not in page and HOSTILE not in page
    assert "innerHTML" not in page and "default-src 'none'" in page
    # the one that is left out is the name of a format and is never opened
    assert not re.findall(r"https?://", re.sub(r'id="data">.*?</script>', "", page, flags=re.S).replace("http://www.w3.org/2000/svg", ""))


def test_a_long_report_stays_small(tmp_path, env, world):
    """Prevents a page that is too large for a phone: 200 trajectories about 66 questions stay under 10 MB."""
    qs, pictures = data.questions(world, gog.DEV_MIX, 66, "large"), {}
    tries = gog.play_scripts(env, qs, [gog.expert(q, random.Random(0)) for q in qs])
    told = [dict(key=f"{n}", suite="facts", policy=who, reward=1.0, advantage=None, **gog.record(t, world, env.v, pictures)) for who in ("base", "sft", "rl", "again") for n, t in enumerate(tries)][:200]
    gog.write_report(tmp_path / "report.html", "large", "", told, pictures)
    assert len(told) == 200 and (tmp_path / "report.html").stat().st_size < 10e6


def browse(page, folder, *flags):
    """The page's DOM after its scripts have run in Chromium."""
    return subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--virtual-time-budget=3000", *flags, "--dump-dom", page.as_uri()],
                          capture_output=True, text=True, timeout=100).stdout


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_it_fits_a_phone_and_heeds_keys(report, tmp_path):
    """Prevents a page that must be scrolled sideways: in a frame as wide as a phone, the page as a whole is no wider
    than the frame. Also prevents keys and buttons that do nothing."""
    wrapper, text = tmp_path / "wrapper.html", json.dumps(report[0].read_text(encoding="utf-8")).replace("<", "\\u003c")
    wrapper.write_text("""<iframe width=375 height=800 style="border: 0"></iframe><script>
        const frame = document.querySelector("iframe");
        frame.onload = () => {
          const page = frame.contentDocument, press = (key, at = page.body) => at.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
          const told = () => page.getElementById("count").textContent, out = [page.documentElement.scrollWidth - page.documentElement.clientWidth, told()];
          press("ArrowRight", page.getElementById("list")), out.push(told());  // also where a list of choices has the focus
          press("j"), out.push(told());
          page.getElementById("before").click(), out.push(told());
          const outcome = page.querySelector("select[aria-label=outcome]");
          if (outcome) outcome.selectedIndex = 1, outcome.onchange(), out.push(told());
          document.title = out.join("; ");
        };
        frame.srcdoc = TEXT</script>""".replace("TEXT", text), encoding="utf-8")
    wide, *told = re.search("<title>(.*?)</title>", browse(wrapper, tmp_path / "user"))[1].split("; ")
    assert wide == "0" and [re.findall(r"\d+", t)[:3] for t in told[:4]] == [["1", "2", "1"], ["1", "2", "2"], ["2", "2", "1"], ["1", "2", "1"]]


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_a_browser_opens_it(report, tmp_path):
    """Prevents a page that is blank, or broken by its content: a browser draws two cards and the curves, shows hostile
    text as text, and never asks for the address in it."""
    dom = browse(report[0], tmp_path / "user", f"--log-net-log={tmp_path / 'net.json'}").split('id="data"')[0]
    assert "example.invalid" not in (tmp_path / "net.json").read_text(encoding="utf-8")
    assert dom.count('<article class="card">') == 2 and '<h1 id="title">a title</h1>' in dom and "<title>Glance or Gaze: report</title>" in dom
    assert dom.count("<polyline") == 2 * len(train.CURVES) and dom.count('class="box now"') >= 1 and "&lt;/script&gt;&lt;script&gt;" in dom


def test_intervals_are_those_of_a_textbook():
    """Prevents error bars that are too short: three seeds of 50, 60 and 70 % have a mean of 60 +- 4.30 * 10 / sqrt(3);
    one seed with 150 of 300 right has 50 +- 5.66, and the mean of six such suites 50 +- 2.31. Also prevents a gain that
    is not computed seed by seed: over SFT's 40, 45 and 65 % it is 10, 15 and 5, so 10 +- 4.30 * 5 / sqrt(3)."""
    row = lambda name, seed, value: [dict(row=name, seed=str(seed), suite=suite, metric="accuracy", value=str(value), n="300") for suite in gog.SUITES]
    # seed 0: 25 of 40 right, seed 1: 1 of 8
    sizes = [dict(row="one", seed=seed, suite="facts", metric="accuracy_small", value=value, n=n) for seed, value, n in (("0", "0.5", "30"), ("0", "1.0", "10"), ("1", "0.125", "8"))]
    told = gog.grid_tables({"main": ["three", "one", "none"]}, [*row("three", 0, .5), *row("three", 1, .6), *row("three", 2, .7), *row("one", 0, .5), *row("none", 0, .5)[1:], *row("sft", 0, .4), *row("sft", 1, .45), *row("sft", 2, .65), *sizes], {"one": 53.2})
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in told.splitlines() if line.startswith("|")}
    assert cells["three"] == ["", *["60.0 +- 24.8"] * 7, "10.0 +- 12.4", "", "", "", "3"] and cells["one"] == ["53.2", *["50.0 +- 5.7"] * 6, "50.0 +- 2.3", "10.0 +- 3.2", "37.5", "", "", "1"]
    assert "none" not in cells and "Not measured yet: none.\n" in told  # a suite is missing
