import csv
import json
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from alive import be_brief, liven
from safetensors.torch import load_file

import data
import gog
import grpo
import tools
import train
from model import Muon
from together import updates

ROOT = Path(__file__).parent.parent
ALIVE = ROOT / "tests" / "alive.py"
TINY = ("--preset tiny --device cpu --towns 80 --see-steps 2 --see-batch 2 --word-steps 5 --word-batch 3 --exam 8 --demos 24 "
        "--sft-batch 6 --results run --rl-questions 8 --rl-dev 4 --rl-steps 3 --rl-batch 4 --group 2 --curriculum all --eval-every 2 --show-every 2").split()


def run(*flags, cwd=ROOT, timeout=150, program=ROOT / "train.py"):
    return subprocess.run([sys.executable, str(program), *flags], cwd=cwd, capture_output=True, text=True, timeout=timeout)


def test_both_stages_from_nothing(tmp_path):
    """Prevents a quick start that does not start: --stage rl alone trains the base model, SFT and RL, and says so. Only
    the run folder is written, no socket is opened (offline.py), and --resume leaves a finished stage alone."""
    done = run("--stage", "rl", *TINY, "--curriculum", "fresh", "--out", "run", cwd=tmp_path, program=ROOT / "tests" / "offline.py")
    assert done.returncode == 0, done.stderr
    assert "pretrain, then sft, then rl will run" in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"run"}
    assert {f"{s}.{e}" for s in ("pretrain", "sft", "rl") for e in ("safetensors", "csv")} <= {p.name for p in (tmp_path / "run").iterdir()}
    rows = list(csv.DictReader(open(tmp_path / "run" / "rl.csv")))
    assert [int(r["step"]) for r in rows] == [0, 1, 2, 3] and all(0 <= float(r["reward"]) <= 1 for r in rows[:3])
    # the last row is a validation without an update
    assert [bool(r["development"]) for r in rows] == [True, False, True, True] and not rows[3]["reward"]
    # one update per batch: the policy that is trained is the one that has sampled
    assert all(float(r["ratio_gap"]) < 1e-3 for r in rows[:3])
    before, again = (tmp_path / "run" / "rl.safetensors").read_bytes(), run("--stage", "rl", *TINY, "--out", "run", "--resume", cwd=tmp_path)
    assert again.returncode == 0 and "rl is already done" in again.stderr and before == (tmp_path / "run" / "rl.safetensors").read_bytes()


def test_only_missing_inputs_are_made(tmp_path, monkeypatch):
    """Prevents half an hour of pretraining for a base model that nothing needs: RL reads the SFT policy only."""
    ran = []
    monkeypatch.setattr(train, "timed", lambda a, stage: ran.append(stage))
    (tmp_path / "sft.safetensors").touch()
    for stage, runs in (("rl", ["rl"]), ("sft", ["pretrain", "sft"]), ("eval", ["pretrain", "rl", "eval"])):
        ran.clear()
        train.run_stages(train.Args(stage=stage, out=str(tmp_path), results=str(tmp_path)))
        assert ran == runs


@pytest.mark.parametrize("flags, says", [
    (["--sead", "1"], "did you mean --seed"), (["--stage", "rl", "--world", "nowhere"], "nowhere"), (["--preset", "huge"], "huge"),
    (["--stage", "dance"], "dance"), (["--device", "abacus"], "abacus"), (["--device", "mps" if torch.cuda.is_available() else "cuda"], "this machine only has"),
    (["--towns", "5"], "--towns 5"), (["--group", "0"], "--group 0"), (["--suite-size", "-1"], "--suite-size -1"), (["--rl-lr", "nan"], "--rl-lr nan"), (["--temperature", "0"], "--temperature 0.0"),
    (["--name", "SFT"], "--name SFT"), (["--name", "rl.best"], "--name rl.best"), (["--stage", "rl", "--trained-on", "heraldry"], "evaluates only"), (["--stage", "reproduce", "--out", "x"], "--stage reproduce sets")])
def test_mistakes_are_answered_in_one_line(tmp_path, monkeypatch, capsys, flags, says):
    """Prevents a traceback for a user's mistake, or a message that is buried under a list of flags: exit code 2, one
    line that says what is wrong, and no file is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and says in line
    assert not list(tmp_path.iterdir())


def test_a_broken_checkpoint_is_not_overwritten(tmp_path, begun):
    """Prevents overwriting a file that might still be repaired: --stage rl with a torn SFT file stops with a clear line
    and leaves the file alone."""
    begun(tmp_path / "run")
    torn = tmp_path / "run" / "sft.safetensors"
    torn.write_bytes(b"not a checkpoint")
    done = run("--stage", "rl", *TINY, "--out", "run", cwd=tmp_path)
    assert done.returncode == 2 and "sft.safetensors: not a readable" in done.stderr and torn.read_bytes() == b"not a checkpoint"


def press_ctrl_c(monkeypatch, when):
    """From now on, press Ctrl-C whenever a run logs a row for which when(run, row) is true. Returns the original
    Run.log."""
    real = train.Run.log

    def interrupted(self, **row):
        real(self, **row)
        if when(self, row):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train.Run, "log", interrupted)
    return real


def test_ctrl_c_saves_and_resume_is_exact(tmp_path, monkeypatch, capsys):
    """Prevents a resume that loads weights only: for every stage, two steps + Ctrl-C + resume + the remaining steps
    give the unbroken run, bit for bit, and the same training state at its end. (In RL the policy acts, tools fail, and
    everything random is included.) Also prevents lost work: the step during which Ctrl-C is pressed is finished and
    saved, in SFT even though no checkpoint is due. And a resume with another --group, or from another SFT
    policy, is refused."""
    monkeypatch.chdir(tmp_path)
    args = lambda *more: train.arguments([*TINY, "--sft-batch", "3", "--rl-steps", "3", "--failure-rate", "0.3", "--group", "4", "--rl-lr", "0.1", "--show-every", "9", "--rl-batch", "3", "--demos", "12", *more])
    whole, broken = args("--out", "whole"), args("--out", "broken")
    torch.set_flush_denormal(True)
    states, keep = {}, train.Run.close

    def close(self, *columns_and_leftovers):
        train.save_state(self.state, self.modules, self.opts)
        states[str(self.folder)] = load_file(self.state)
        keep(self, *columns_and_leftovers)

    def remember(self, modules, opts, *rest, **extra):
        self.modules, self.opts = modules, opts
        checkpoint(self, modules, opts, *rest, **extra)

    checkpoint = train.Run.checkpoint
    monkeypatch.setattr(train.Run, "checkpoint", remember), monkeypatch.setattr(train.Run, "close", close)
    for stage, steps, curriculum in ((train.pretrain, "pretrain", ""), (train.sft, "sft", ""), (train.rl, "rl", "fresh"), (train.rl, "rl", "adaptive")):
        whole.curriculum = broken.curriculum = curriculum
        if curriculum == "fresh":
            liven(monkeypatch.setattr)
        stage(whole)

        real = press_ctrl_c(monkeypatch, lambda _, row: row["step"] == 1)
        with pytest.raises(KeyboardInterrupt):
            stage(broken)
        monkeypatch.setattr(train.Run, "log", real)
        assert "Ctrl-C: saving after this step" in capsys.readouterr().err and len(list(csv.DictReader(open(f"broken/{steps}.csv")))) == 2
        broken.resume = True
        stage(broken)
        broken.resume = False
        a, b = ({**states[d], **load_file(tmp_path / d / f"{steps}.safetensors")} for d in ("whole", "broken"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), steps
        rows = [[{k: v for k, v in r.items() if "seconds" not in k} for r in csv.DictReader(open(tmp_path / d / f"{steps}.csv"))] for d in ("whole", "broken")]
        assert rows[0] == rows[1], steps
        # otherwise the comparison would prove nothing
        assert not curriculum or all(float(r["dead"]) < 1 and float(r["grad_norm"]) > 0 and float(r["gaze_share"]) > 0 for r in rows[0][:3])
    with pytest.raises(train.CheckpointError, match="started with --group 4"):
        run = train.Run(replace(whole, out="other"), "rl")
        train.save_state(run.state, [], [], extra=json.dumps({"step": 1, "flags": run.flags}), rows="[]")
        run.lock.close()
        train.Run(replace(whole, out="other", group=8, resume=True), "rl").begin(1, [], [])
    (tmp_path / "broken" / "sft.safetensors").write_bytes(b"replaced")
    state = train.Run(replace(whole, out="whole"), "rl")
    train.save_state(tmp_path / "broken" / "rl.state.safetensors", [], [], extra=json.dumps({"step": 1, "flags": state.flags}), rows="[]")
    with pytest.raises(train.CheckpointError, match="started with another sft.safetensors"):
        train.Run(replace(broken, resume=True), "rl").begin(1, [], [])


def test_the_best_policy_is_kept_and_alarms_are_told_once(tmp_path, monkeypatch, capsys, begun):
    """Prevents a run that ends with its last policy although an earlier one was better, also if the run was stopped and
    resumed since; a file left behind if it is stopped when all is done; and an alarm that is printed never, or at every
    step."""
    monkeypatch.chdir(tmp_path)
    a, told = train.arguments([*TINY, "--out", "run", "--eval-every", "1", "--rl-lr", "0.3", "--group", "4"]), []
    begun(Path("run")), liven(monkeypatch.setattr)

    def validate(policy):
        told.append({k: w.clone() for k, w in policy.state_dict().items()})
        return [0.2, 0.6, 0.1, 0.3][len(told) - 1], []

    monkeypatch.setattr(train, "development", lambda policy, *_: validate(policy))
    monkeypatch.setattr(train, "alarms", lambda first, now: {"entropy": f"entropy fell from 1 to {now['entropy']}"})
    real = press_ctrl_c(monkeypatch, lambda _, row: row["step"] == 2)
    with pytest.raises(KeyboardInterrupt):
        train.rl(a)
    monkeypatch.setattr(train.Run, "log", real)
    press_ctrl_c(monkeypatch, lambda _, row: row["step"] == 3)  # once more, after the last update
    with pytest.raises(KeyboardInterrupt):
        train.rl(replace(a, resume=True))
    assert {p.name for p in Path("run").glob("rl*safetensors")} == {"rl.safetensors"}
    kept = load_file("run/rl.safetensors")
    same = [all(torch.equal(kept[k], w[k]) for k in kept) for w in told]
    assert same == [False, True, False, False] and capsys.readouterr().err.count("entropy fell") == 1


def test_the_deeper_half_has_a_rate_of_its_own(tmp_path, monkeypatch, begun):
    """Prevents a factor --rl-deep on the wrong layers, and weights that RL leaves out: at 0 the deeper half (of tiny's
    two layers the second) and the vision encoder stay as SFT left them, and all else moves."""
    monkeypatch.chdir(tmp_path)
    begun(Path("run")), liven(monkeypatch.setattr)
    scores = iter(range(9))
    monkeypatch.setattr(train, "development", lambda *_: (next(scores), []))  # so the last policy is kept
    train.rl(train.arguments([*TINY, "--out", "run", "--rl-lr", "0.3", "--group", "4", "--rl-deep", "0"]))
    before, after = load_file("run/sft.safetensors"), load_file("run/rl.safetensors")
    stayed = {k for k in after if torch.equal(before[k], after[k])}
    assert stayed == {k for k in after if k.startswith("layers.1.") or "vision" in k and "projector" not in k}


def test_the_grid_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys, begun):
    """Prevents a grid that leaves holes, measures a finished row twice, or gives other results after a stop. After
    Ctrl-C during the RL of its second policy, the same command ends with the rows of an unbroken grid, and one more
    call trains only the row that fails. A row that only changes the evaluation trains no policy, one with other
    demonstrations has its own SFT, and one that fails does not stop the others."""
    rows = [dict(name="lambda-0", lam=0.0), dict(name="demos-9", demos=9, rl_steps=0), dict(name="nothing", curriculum="level1")]
    monkeypatch.setattr(train, "GRID", {"main": [{}], "GRPO": rows, "robustness": [dict(turns=2)]})
    monkeypatch.setattr(train, "ROWS", ("sft", "rl")), monkeypatch.setattr(gog, "SUITES", {name: gog.SUITES[name] for name in ("facts", "live")})
    monkeypatch.setattr(grpo, "pass_rates", lambda policy, env, pool, *_: [0.0] * len(pool))  # so there is no level 1
    be_brief(monkeypatch.setattr)
    told = {}

    def grid(folder, code):
        (tmp_path / folder / "out").mkdir(parents=True, exist_ok=True)
        begun(tmp_path / folder / "out" / "base-word-steps-5-tiny-0")
        monkeypatch.chdir(tmp_path / folder)
        monkeypatch.setattr(sys, "argv", ["train.py", "--stage", "reproduce", "--seeds", "1", "--suite-size", "2", "--shown", "1", *TINY, "--demos", "12", "--rl-steps", "2"])
        with pytest.raises(SystemExit) as stopped:
            train.main()
        assert stopped.value.code == code
        measured = [{k: v for k, v in r.items() if k != "minutes"} for r in csv.DictReader(open("run/results.csv"))]
        told[folder] = sorted(map(str, measured)), capsys.readouterr().err
        return {r["row"] for r in measured if r["table"] == "main"}

    assert grid("whole", 2) == {"sft", "rl", "lambda-0", "demos-9", "rl-turns-2"} and "nothing, seed 0: no question passes the filter" in told["whole"][1]
    # the row that fails is tried, too
    assert told["whole"][1].count("rl: preset") == 4 and told["whole"][1].count("sft: preset") == 2
    real = press_ctrl_c(monkeypatch, lambda run, row: run.stage == "lambda-0" and row["step"] == 1)
    assert grid("broken", 130) == {"sft", "rl"}
    monkeypatch.setattr(train.Run, "log", real)
    grid("broken", 2)
    assert told["broken"][0] == told["whole"][0]
    grid("broken", 2)
    # and not: it is still locked by the call before
    assert "nothing, seed 0: no question passes the filter" in told["broken"][1]
    assert told["broken"][0] == told["whole"][0] and told["broken"][1].count("already measured") == 4 and told["broken"][1].count("rl: preset") == 1
    assert "## GRPO" in (tmp_path / "broken/run/grid.md").read_text()


def test_what_is_not_asked_for_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    """Prevents an interrupted earlier stage from starting anew, over its own checkpoint, when the user asks for a later
    stage: earlier stages are resumed. The requested stage starts anew unless --resume is given."""
    ran = []

    def stage(name):
        def run(a):
            ran.append((name, a.resume))
            a.weights(name).parent.mkdir(parents=True, exist_ok=True)
            a.weights(name).touch()
        return run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "STAGES", {name: stage(name) for name in train.STAGES})
    monkeypatch.setattr(sys, "argv", ["train.py", "--stage", "rl", *TINY])
    train.main()
    assert ran == [("pretrain", True), ("sft", True), ("rl", False)]


# in the second case the loss is infinite, but the gradient is finite
@pytest.mark.parametrize("spoil", [lambda logp: logp * float("nan"), lambda logp: logp - float("inf")], ids=["gradient", "loss"])
def test_a_gradient_that_is_no_number_changes_nothing(tmp_path, monkeypatch, begun, spoil):
    """Prevents one bad batch from destroying weights and optimiser: the step is refused, its batch is written to a
    file, and the last checkpoint stays finite."""
    monkeypatch.chdir(tmp_path)
    a, real = train.arguments([*TINY, "--out", "run", "--save-every", "1"]), grpo.token_logprobs
    begun(tmp_path / "run")
    calls = []

    def poisoned(*args):
        calls.append(args)
        logp, rest = real(*args)
        return spoil(logp) if len(calls) > 2 else logp, rest

    monkeypatch.setattr(grpo, "token_logprobs", poisoned)
    with pytest.raises(train.CheckpointError, match="sft.bad.json"):
        train.timed(a, "sft")
    assert all(len(t["ids"]) == len(t["trained"]) for t in json.loads(Path("run/sft.bad.json").read_text()))
    saved = load_file("run/sft.state.safetensors")
    assert saved and all(torch.isfinite(w).all() for w in saved.values())


def test_alarms_tell_collapse_from_a_quiet_run():
    """Prevents silence while a policy stops using a tool or collapses otherwise (entropy, reward, length), and alarms
    in a healthy run."""
    calm = dict(answer_share=0.3, search_share=0.3, glance_share=0.02, gaze_share=0.4, entropy=0.1, reward=0.6, tokens=90.0, dead=0.3)
    # entropy is measured on live groups only, so if all groups are dead it is 0 and no alarm
    assert not train.alarms(calm, calm | dict(glance_share=0.0, reward=0.5, entropy=0.05)) and not train.alarms(calm, calm | dict(entropy=0.0, dead=1.0))
    for metric, value in (("gaze_share", 0.01), ("entropy", 0.01), ("reward", 0.3), ("tokens", 400.0)):
        assert [*train.alarms(calm, calm | {metric: value})] == [metric]


def test_labels_lie_where_the_shields_are():
    """Prevents labels that are shifted by a cell or transposed: every cell carries the box and labels of the shield
    that covers most of it, counted pixel by pixel."""
    rng = random.Random(0)
    for grid in (4, 8) * 4:
        scene = data.hang([grpo.fresh_town(rng) for _ in range(5)], "shield", rng)
        told = np.array([[i] + [0] * (len(grpo.PARTS) - 1) for i in range(5)])
        boxes, labels = grpo.lay_on_grid(scene.boxes, told, grid)
        owner = np.full((400, 400), -1)
        for i, (x0, y0, x1, y1) in enumerate(scene.boxes):
            owner[4 * y0:4 * y1, 4 * x0:4 * x1] = i
        step = 400 // grid
        for cell in range(grid**2):
            seen = owner[cell // grid * step:, cell % grid * step:][:step, :step]
            count = [(seen == i).sum() for i in range(5)]
            if max(count) > 0.02 * step**2:
                assert count[labels[cell, 0]] == max(count) and np.allclose(boxes[cell], np.array(scene.boxes[labels[cell, 0]]) / 100)
            else:
                assert not labels[cell, :2].any() and not boxes[cell].any()


def test_no_shield_is_asked_for_twice(env):
    """Prevents lessons that can be learnt without looking: if a shield were asked for twice, its box could be copied
    from the first answer."""
    rng = random.Random(0)
    for _ in range(60):
        t = rng.choice((grpo.wall_lesson, grpo.point_lesson))(env, rng)
        seen = set()
        for i in (i for i, token in enumerate(t.ids) if token == env.v.id["<gaze>"]):
            box = tuple(t.ids[i + 1:i + 5])
            assert not t.trained[i] or box not in seen  # a miss that is shown also gives a box away
            seen.add(box)


def test_errands_can_be_run_with_closed_eyes(env):
    """Prevents errands that teach to make things up: there is no picture, so no box is trained, and every trained name
    and value also stands in the text that is only shown."""
    rng, hops = random.Random(0), set()
    for _ in range(60):
        t = grpo.errand_lesson(env, rng)
        read, taught = "", ""
        for token, trained in zip(t.ids, t.trained):
            read, taught = (read, taught + env.v.decode([token])) if trained else (read + env.v.decode([token]), taught)
        assert "<gaze>" not in taught and taught.count("<stop>") == 1 + taught.count("<search>")
        for said in re.findall(r"<search>(.*?)</search>|yes, (.*?), for the|<answer>(.*?)</answer>| is (.*?)(?:,|</think>)", taught):
            said = next(filter(None, said)).strip()
            # a query joins a name and a relation, which stand in different places
            assert said in read or all(part in read for part in (said.split()[0], said.split()[-1]))
        hops.add(taught.count("<search>"))
    assert hops == {1, 2, 3, 4, 5}


def test_a_search_among_look_alikes_shows_what_it_looks_at(env):
    """Prevents lessons that train a gaze at the wrong shield, or whose crops are not the ones that a gaze shows: every
    trained gaze but the last is at a look-alike, and every gaze is followed by its crop."""
    rng, gazes = random.Random(0), 0
    for _ in range(20):
        t = grpo.find_lesson(env, rng)
        told = env.v.decode([i for i, before in zip(t.ids, [None, *t.ids]) if not i == before == env.image_ids[0]])
        looks = re.search(r"of the (\w+ \w+) \w+ with", told)[1]
        assert told.count("<gaze>") == len(t.pictures) - 1 == len(re.findall("</gaze><stop><obs><image>", told))
        taught = "".join(env.v.decode([i]) if own else "|" for i, own in zip(t.ids, t.trained))
        gazes += taught.count("<gaze>")
        assert taught.count("<gaze>") == taught.count(f"look at {looks} at") >= 1
    assert gazes > 25


def test_a_miss_shown_on_a_wall_does_not_fit(env):
    """Prevents teaching to give up the right shield: the hit that is shown after a miss is refused, and it is, as on the
    wall, not what the question asks for; its crop is shown as in a rollout."""
    rng, misses = random.Random(0), 0
    for _ in range(150):
        t = grpo.wall_lesson(env, rng)
        told = env.v.decode([i for i, before in zip(t.ids, [None, *t.ids]) if not i == before == env.image_ids[0]])
        verdicts = re.findall(r"</obs><think> want ([^,]*), see ([^:]*): (\w+)", told)
        assert all(wanted != seen and verdict == "no" for wanted, seen, verdict in verdicts)
        assert told.count("<obs><image>") == told.count("<obs>") == len(verdicts) == len(t.pictures) - 1
        misses += len(verdicts)
    assert misses > 30


def test_a_flag_is_captioned_as_in_a_folder_world():
    """Prevents lessons whose flags are told by colours that hardly show: the caption names what covers an eighth of the
    picture, as for a user's pictures, and colours that it names are the flag's."""
    rng, several = random.Random(0), 0
    for _ in range(100):
        e = grpo.fresh_town(rng, noun="flag")
        assert {*data.colours(e)} <= {e.arms.tincture, e.arms.ordinary_tincture, e.arms.charge_tincture} and e.blazon == f"{e.look}, {e.detail}"
        assert len(data.colours(e)) == len({*data.colours(e)}) and e.look.split()[1] == e.arms.outline
        several += len(data.colours(e)) > 1
    assert several > 50


def test_few_lessons_of_sft_have_long_chains(env, monkeypatch):
    """Prevents SFT that leaves nothing to RL, or nothing to begin with: of its lessons a few follow four or five
    relations."""
    hops = [sum(i == env.v.id["<search>"] for i in t.ids) for t in grpo.replay(env, 0, 400, 0)]
    assert 0 < sum(n > 3 for n in hops) < 20 and sum(n == 3 for n in hops) > 10 and not any(t.trained == [False] * len(t.ids) for t in grpo.replay(env, 0, 40, 1))


def test_a_plan_is_the_questions_own_words(env):
    """Prevents plans that leave out a relation or run on into the words for the shield, and lessons that train anything
    but plans."""
    rng, hops = random.Random(0), set()
    for _ in range(40):
        t = grpo.plan_lesson(env, rng)
        for question, plan in re.findall(r"What is the ([^?]*)\?<sep><think> [^,]*, for the (.*?)</think>", env.v.decode(t.ids)):
            relations = plan.removesuffix(" of the one")
            # behind them the question goes on with its target, "of the flag (right of the ..)"
            assert relations != plan and question.startswith(relations) and re.sub("(left|right) of", "", question[len(relations):]).count(" of the ") == 1
            hops.add(plan.count(" of the "))
        taught = env.v.decode([token for token, trained in zip(t.ids, t.trained) if trained])
        assert taught.count("for the") == taught.count("</think>") >= 5 and "?" not in taught and "<think>" not in taught
    assert hops == {1, 2, 3, 4, 5}


def test_nothing_is_counted_that_was_named_before(env):
    """Prevents counting by copying: when counting came after pointing in the same lesson, the boxes were in the
    context, and the policy always said 1."""
    rng, counted = random.Random(0), 0
    for _ in range(30):
        t = grpo.count_lesson(env, rng)
        assert {topic[:5] for topic, _ in t.lesson} == {"count"}
        colours = re.findall(r"How many \w+ are (\w+)", env.v.decode(t.ids))
        assert len(colours) == len(set(colours))
        counted += len(colours)
    assert counted > 30


def test_verdicts_are_true(env):
    """Prevents lessons with false verdicts: "want X, see Y: yes" only if X equals Y, "A more than B: yes" only if A is
    larger; and both verdicts occur."""
    rng, seen = random.Random(0), set()
    for make in (grpo.text_lesson, grpo.crop_lesson, grpo.decide_lesson, grpo.errand_lesson) * 60:
        told = env.v.decode(make(env, rng).ids)
        for wanted, found, verdict in re.findall(r"want ([a-z0-9, ]+?), see ([a-z0-9, ]+?): (yes|no)", told):
            assert (wanted == found) == (verdict == "yes")
            seen.add(verdict)
        for a, b, verdict in re.findall(r"(\d+) more than (\d+): (yes|no)", told):
            assert (int(a) > int(b)) == (verdict == "yes")
    assert seen == {"yes", "no"}


def test_a_strange_relation_may_have_a_known_name(env, monkeypatch):
    """Prevents a crash in the middle of pretraining, once in some ten thousand lessons: a string of random tokens may
    spell "towers", a relation that every town has."""
    monkeypatch.setattr(grpo, "fresh_relation", lambda rng, known, pieces: "towers")
    towns = grpo.little_world(random.Random(0), env.v.pieces).entities.values()
    assert all(e.facts["towers"].isdecimal() for e in towns)


def test_every_flag_is_read():
    """Prevents a flag that does nothing: each field of Args appears in the code as a.NAME (or self.NAME)."""
    source = (ROOT / "train.py").read_text() + (ROOT / "grpo.py").read_text()
    for f in fields(train.Args):
        assert re.search(rf"\b(a|self)\.{f.name}\b", source), f.name


def test_muon_orthogonalises():
    """Prevents an optimiser that is Muon in name only: the singular values of an update are about 1 (times its scale),
    for matrices of both orientations, for several of one shape, and for a convolution, whose kernel is one matrix."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((16, 48), (48, 16), (48, 16), (16, 5, 3, 3))]
    for p in params:
        p.grad = torch.randn_like(p)
    Muon(params, dict(lr=1.0, momentum=0.95, weight_decay=0.0, newton_schulz=5)).step()
    for p in params:
        values = torch.linalg.svdvals(p.detach().flatten(1)) / (0.2 * max(p.flatten(1).shape) ** 0.5)
        assert 0.6 < values.min() and values.max() < 1.3
    assert not torch.equal(params[1], params[2])


def test_a_users_own_questions_are_a_suite_of_their_own(tmp_path, monkeypatch, capsys, begun):
    """Prevents an evaluation that crashes on a user's own questions, forgets them, or counts them in the mean. Every
    other one is asked, in every row but the oracle's, as the oracle does not know where to look; their accuracy stands
    beside the mean."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "worlds" / "countries", "flags")
    Path("flags/questions.jsonl").write_text("".join(json.dumps({"image": "images/fr.png", "question": f"What is the capital of flag {n}?", "answers": ["Paris"]}) + "\n" for n in range(4)))
    Path("flags/entities.jsonl").write_text("".join(open(ROOT / "worlds" / "countries" / "entities.jsonl", encoding="utf-8").readlines()[:60]), encoding="utf-8")
    begun(Path("run")), shutil.copy("run/sft.safetensors", "run/rl.safetensors")
    monkeypatch.setattr(gog, "SUITES", {"plain": gog.SUITES["plain"]}), monkeypatch.setattr(train, "ROWS", ("rl", "oracle"))
    train.evaluate(train.arguments([*TINY, "--stage", "eval", "--world", "flags", "--out", "run", "--suite-size", "3", "--shown", "1"]))
    head, rl, oracle = capsys.readouterr().out.strip().splitlines()
    assert head.split()[2:] == ["plain", "mean", "own"] and len(rl.split()) == 4 and oracle.split() == ["oracle", "100.0", "100.0"]
    table = tools.read_rows(Path("run/results.csv"))
    assert {(r["row"], r["n"]) for r in table if r["suite"] == "own"} == {("rl", "2")}
    assert {p.stem for p in Path("run").glob("*.png")} <= {f"flags-towns-80-{suite}-{what}" for suite in ("own", "plain") for what in ("success", "recovery", "failure")} | {"sft", "pretrain"}
    assert Path("run/flags-towns-80-own-failure.png").is_file()  # an untrained policy fails


def test_other_worlds_have_their_own_folders_and_rows():
    """Prevents a policy from being taken for that of another world, seed or set of flags: each has its own run folder.
    All worlds share a base model, unless a flag changes it."""
    folders = [str(train.Args(**flags).folder()) for flags in ({}, dict(seed_world=1), dict(towns=500), dict(seed=1), dict(demos=500), dict(word_steps=6400), dict(world="worlds/countries"), dict(world="."))]
    assert len(set(folders)) == len(folders) and folders[0] == "out/heraldry-nano-0" and not folders[-1].startswith("out/-")
    bases = [str(train.Args(**flags).folder("pretrain")) for flags in ({}, dict(demos=500), dict(word_steps=6400), dict(seed=1))]
    assert bases[0] == bases[1] == "out/base-nano-0" and len(set(bases)) == 3


def test_two_processes_take_the_steps_of_one(tmp_path, begun):
    """Prevents torchrun from training something else: two processes, each with its share of a batch, log the same
    losses, take the same steps and give the same greedy answers as a single one. Also, RL under torchrun runs to its
    end, and only one process writes."""
    begun(tmp_path / "run")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "tests" / "together.py"), "made", "--stage", "rl", *TINY, "--curriculum", "fresh", "--rl-steps", "1", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("kept as run/rl.safetensors") == 1 and not list((tmp_path / "run").glob(".*")) and len(list(csv.DictReader(open(tmp_path / "run" / "rl.csv")))) == 2
    alone, both = updates(), load_file(tmp_path / "made")
    assert alone.keys() == both.keys()
    for name, x in alone.items():
        torch.testing.assert_close(both[name], x, rtol=1e-3, atol=1e-5, msg=lambda told: f"{name}: {told}")
