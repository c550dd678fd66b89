import random
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from alive import be_brief
from conftest import still

import data
import gog
import grpo
import train
import tools


@pytest.mark.parametrize("correct, formed, value", [(True, True, 1.0), (True, False, 0.9), (False, True, 0.1), (False, False, 0.0)])
def test_reward_table(correct, formed, value):
    """Prevents a reward other than r = (1 - lambda) r_acc + lambda r_fmt."""
    assert grpo.reward(correct, formed) == pytest.approx(value)


def test_a_search_costs_its_penalty_and_tells_a_group_of_right_answers_apart():
    """Prevents a search penalty that is also charged for wrong answers, for answers without a tool, or for malformed
    turns. Also prevents a group from counting as dead if all its answers are right, but only some used a tool."""
    asked = data.Question("?", ("Ilm",), None, "hop1", "normal")
    tried = [tools.Trajectory(asked, turns=[*(tools.Turn(kind, "x") for kind in kinds), tools.Turn("answer", said)])
             for kinds, said in (((), "Ilm"), (("search",), "Ilm"), (("gaze", "search"), "Ilm"), (("glance",), "Ost"), (("malformed",), "Ilm"))]
    assert [grpo.accuracy_reward(t, 0.1) for t in tried] == pytest.approx([1, 0.9, 0.9, 0, 1])
    assert [grpo.accuracy_reward(t) for t in tried] == [1, 1, 1, 0, 1]
    r_acc = torch.tensor([[grpo.accuracy_reward(t, penalty) for t in tried[:2]] for penalty in (0.0, 0.1)])
    assert grpo.group_advantages(r_acc, r_acc)[1].tolist() == [False, True]


@pytest.mark.parametrize("answer, right", [("Ilda Voss", True), ("  the ilda  VOSS.", True), ("Ílda Voss", True), ("", False), ("Ilda", False),
                                           ("Ilda Voss or Mirna", False), ("the", False)])
def test_exact_match_is_no_substring(answer, right):
    """Prevents reward hacking: an empty answer, a part of the answer, or several candidates joined are wrong; case,
    accents, articles, blanks and punctuation do not matter."""
    assert tools.exact_match(answer, ["Ilda Voss"]) is right
    # vowel signs are no accents, and the selector behind an emoji is nothing
    assert not tools.exact_match("की", ["को"]) and not tools.exact_match("❤\ufe0f", ["☀\ufe0f"])


def test_group_advantages():
    """Prevents a mean or standard deviation over the whole batch instead of each group, and dead groups (all right or
    all wrong) with an advantage other than 0."""
    correct = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    rewards = torch.tensor([[1, .1, .1, .1], [.97, .97, .97, .97], [.1, 0, .1, .1]])
    adv, alive = grpo.group_advantages(rewards, correct)
    assert alive.tolist() == [True, False, False]
    assert adv[0].tolist() == pytest.approx([1.5, -.5, -.5, -.5], abs=1e-4)
    # the third group differs in format only: divided by its small std, this would count as much as a right answer
    assert (adv[1:] == 0).all()
    mean_only, _ = grpo.group_advantages(rewards, correct, "mean")
    assert mean_only[0].tolist() == pytest.approx([.675, -.225, -.225, -.225])


def test_policy_loss_gradient_by_finite_differences():
    """Prevents a gradient that is not that of the loss, e.g. because the ratio or the KL term is detached: autograd
    agrees with finite differences."""
    torch.manual_seed(0)
    logp, old, ref = (torch.randn(64, dtype=torch.double) * 0.3 for _ in range(3))
    adv = torch.randn(64, dtype=torch.double)
    f = lambda x: grpo.policy_loss(x, old, adv, 0.2, 0.28, ref, 0.01)[0]
    x = logp.clone().requires_grad_()
    f(x).backward()
    for i in range(0, 64, 7):
        step = torch.zeros(64, dtype=torch.double)
        step[i] = 1e-6
        assert x.grad[i].item() == pytest.approx(((f(logp + step) - f(logp - step)) / 2e-6).item(), abs=1e-5)


def test_clip_stops_the_gradient_on_the_right_side():
    """Prevents a clip on the wrong side, which would also stop corrections: the gradient is 0 if A > 0 and the ratio is
    above 1 + eps, or if A < 0 and it is below 1 - eps, and nowhere else. Also prevents a wrong sign: where there is a
    gradient, descent makes tokens with A > 0 more likely, and tokens with A < 0 less likely."""
    old = torch.zeros(4)
    logp = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    grpo.policy_loss(logp, old, torch.tensor([1.0, 1.0, -1.0, -1.0]))[0].backward()
    assert logp.grad.sign().tolist() == [0, -1, 1, 0]


def rollouts(policy, env, questions, seed=0):
    return gog.rollout(policy, env, questions, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bfloat16, gap", ((False, 1e-4), (True, 0.06)))
def test_ratio_is_one_before_the_first_update(policy, env, questions, monkeypatch, bfloat16, gap):
    """Prevents training on log-probabilities that are not the sampler's: sampling with a cache, in batches of rows of
    different length, gives the same ones as a forward pass without a cache; in bfloat16 but for rounding. <stop> is
    made likelier here, so that some turns end early and the others go on without them."""
    be_brief(monkeypatch.setattr)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bfloat16})
    batch = rollouts(policy, env, questions[:6])
    assert len({len(t.ids) for t in batch}) > 12 and sum(len(t.turns) > 2 for t in batch) > 6
    worst = 0.0
    for part in grpo.micro_batches(batch, [len(t.ids) for t in batch], 4000):
        with torch.no_grad(), grpo.autocast("cpu"):
            logp, _ = grpo.token_logprobs(policy, env, part)
        old = torch.cat([torch.tensor([p for p, m in zip(t.logprobs, t.trained) if m]) for t in part])
        worst = max(worst, (logp - old).abs().max().item())
    assert worst < gap and (worst > 1e-4) == bfloat16  # rounding shows, so bfloat16 was used


def test_micro_batches_do_not_change_the_gradient(policy, env, questions):
    """Prevents a denominator per micro-batch: the update must not depend on how many tokens fit into memory."""
    batch = rollouts(policy, env, questions[:4])
    advantages = torch.linspace(-1, 1, len(batch))
    gradients = []
    for budget in (300, 100000):
        a = train.Args(token_budget=budget)
        policy.zero_grad()
        grpo.grpo_step(policy, None, env, batch, advantages, still(policy), a)
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-3)


def test_bfloat16_gradient_points_the_same_way(policy, env, questions):
    """Prevents bfloat16 products that round the gradient away (scores and attention stay float32): two SFT steps move
    the weights in nearly the same direction as in float32."""
    demos = gog.play_scripts(env, questions[:8], [gog.expert(q, random.Random(0)) for q in questions[:8]])

    def step(bfloat16):
        copy = deepcopy(policy)
        # a new context for every step: one that is kept open would reuse the converted weights of the first step
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss, _ = grpo.supervised_step(copy, env, demos, [torch.optim.SGD(copy.parameters(), 0.3)])
        return loss, torch.cat([(new - old).flatten() for new, old in zip(copy.parameters(), policy.parameters())])

    (loss, moved), (rough_loss, rough_moved) = step(False), step(True)
    assert rough_loss == pytest.approx(loss, rel=0.01)
    assert torch.cosine_similarity(moved, rough_moved, 0) > 0.99


def test_dead_groups_leave_loss_and_denominator(policy, env, questions):
    """Prevents dead groups from diluting the update: adding one must not change the gradient."""
    batch = rollouts(policy, env, questions[:3])
    advantages = torch.tensor([1.0, -1, 1, -1, .5, -.5, .5, -.5, 0, 0, 0, 0])
    gradients = []
    for n in (8, 12):
        policy.zero_grad()
        grpo.grpo_step(policy, None, env, batch[:n], advantages[:n], still(policy), train.Args())
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("mask", [True, False])
def test_the_mask_decides_which_tokens_are_learnt_from(policy, env, questions, monkeypatch, mask):
    """Prevents a --no-mask run that is masked after all, and a mask that lets tokens of tool results through."""
    batch, seen, loss = rollouts(policy, env, questions[:2]), [], grpo.policy_loss
    monkeypatch.setattr(grpo, "policy_loss", lambda logp, *rest: seen.append(len(logp)) or loss(logp, *rest))
    stats = grpo.grpo_step(policy, None, env, batch, torch.ones(len(batch)), still(policy), train.Args(mask=mask, temperature=1.0))
    assert sum(seen) == (sum(sum(t.trained) for t in batch) if mask else sum(len(t.ids) - 1 for t in batch)) and stats["ratio_gap"] < 1e-4
    # grpo_step has changed neither the batch nor the environment
    assert all(any(t.trained) and not all(t.trained[1:]) for t in batch) and not env.sampleable[env.v.id["<obs>"]]


def test_signal_is_what_two_halves_share(policy, env, questions):
    """Prevents a `signal` that compares one half of the batch with the whole: two equal halves give 1, and the same
    halves with opposite advantages give -1."""
    batch, advantages = rollouts(policy, env, questions[:1]), torch.tensor([1.5, -0.5, -0.5, -0.5])
    for sign in (1.0, -1.0):
        policy.zero_grad()
        told = grpo.grpo_step(policy, None, env, batch * 2, torch.cat([advantages, sign * advantages]), still(policy), train.Args(group=4, temperature=1.0))
        assert told["signal"] == pytest.approx(sign, abs=1e-3)


def test_levels_and_curriculum():
    """Prevents a curriculum that draws the wrong questions: level 2 is p < 1/2, a batch as large as the pool asks
    each of its questions once, one twice as large each of them twice, `adaptive` prefers pass rates near 1/2 and
    follows new ones, and an empty pool is an error."""
    rates = [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [grpo.level(p) for p in rates] == [2, 2, 1, 0, 0]
    c = grpo.Curriculum(list(rates), "level2")
    assert sorted(c.draw(2, 0)) == [0, 1] and sorted(c.draw(4, 0)) == [0, 0, 1, 1]
    assert grpo.Curriculum(list(rates), "learnable").pool == [1]
    c = grpo.Curriculum(list(rates), "adaptive", seed=1)
    drawn = c.draw(2000, 0)
    assert drawn.count(2) > drawn.count(1) > drawn.count(4) > 0
    c.seen([4], [0.0])
    assert c.pass_rates[4] == 0.5
    with pytest.raises(ValueError, match="curriculum"):
        grpo.Curriculum([1.0, 1.0], "level2")


@pytest.mark.parametrize("right, hint", [((), True), ((0, 4, 8), False)])
def test_questions_that_are_never_solved_are_told(policy, env, questions, monkeypatch, capsys, right, hint):
    """Prevents an hour of RL on questions that nobody can answer, and a pass rate that belongs to another question: of
    four tries each, the tries `right` are right; if none is, the user is told of another curriculum."""
    tries = [tools.Trajectory(q, turns=[tools.Turn("answer", q.answers[0] if 4 * i + k in right else "?")]) for i, q in enumerate(questions[:3]) for k in range(4)]
    monkeypatch.setattr(gog, "rollout", lambda *_, **__: tries)
    assert grpo.pass_rates(policy, env, questions[:3]) == ([0.25] * 3 if right else [0.0] * 3)
    assert ("--curriculum fresh" in capsys.readouterr().err) == hint


def test_fresh_questions_are_never_asked_twice(world):
    """Prevents learning questions by heart (when 800 came again and again, the policy gained 9.5 points on them and 3.9
    on others), and a resumed run that asks other questions than an unbroken one."""
    own = data.Question("What is it?", ("it",), None, "own")
    kinds = grpo.askable(replace(world, own=(own,)))
    assert kinds[0] is own and kinds[1:] == data.RL_MIX
    steps = [grpo.ask_each(world, kinds[:1] + kinds[-3:] * 6, f"rl/0/{step}") for step in range(3)]
    assert all(asked[0] is own for asked in steps) and [(q.kind, q.setting) for q in steps[1][1:4]] == [k[:2] for k in kinds[-3:]]
    scenes = [(q.text, q.scene.seed) for asked in steps for q in asked[1:]]
    assert len(set(scenes)) == len(scenes)
    assert grpo.ask_each(world, kinds[:1] + kinds[-3:] * 6, "rl/0/2") == steps[2]
    c = grpo.Curriculum([0.5, 0.5, 0.0], "fresh", worth=[1, 3, 3])
    drawn = c.draw(3000, 0)
    assert drawn.count(1) > 2 * drawn.count(0) and drawn.count(0) > drawn.count(2) > 0
    c.seen([2, 2], [1.0, 1.0])
    assert c.pass_rates[2] == pytest.approx(0.19)


def test_a_policy_that_may_not_gaze_neither_sees_nor_samples_one(policy, env, world, questions, monkeypatch):
    """Prevents gazes in the comparison without gazes (--no-gaze): neither demonstrations nor replayed lessons show one,
    and no rollout samples one."""
    be_brief(monkeypatch.setattr)
    blind = tools.Environment(env.v, env.toolbox, policy.config, gaze=False)
    demos = {may: grpo.instruct(policy, e, world, 12, wrong_gaze=1.0) for may, e in ((True, env), (False, blind))}
    kinds = {may: {turn.kind for t in found for turn in t.turns} for may, found in demos.items()}
    assert kinds == {True: {"answer", "search", "glance", "gaze"}, False: {"answer", "search", "glance"}}
    assert all(t.correct for t in demos[False]) and sum(t.question.search_free for t in demos[False]) == 5
    lessons = [grpo.replay(e, 0, 12, 0) for e in (env, blind)]
    tag, logits = env.v.id["<gaze>"], policy.logits
    monkeypatch.setattr(policy, "logits", lambda hidden: logits(hidden) + 9.0 * torch.nn.functional.one_hot(torch.tensor(tag), env.v.size))
    assert [any(i == tag and own for t in part for i, own in zip(t.ids, t.trained)) for part in lessons] == [True, False]
    may, never = (gog.rollout(policy, e, questions[:4], schedule=gog.FREE[:1]) for e in (env, blind))
    assert any(tag in t.ids for t in may) and not any(tag in t.ids for t in never)
    # ids that cannot be sampled have probability 0 in training, too, so the ratio is 1
    with torch.no_grad():
        assert grpo.token_logprobs(policy, blind, never)[0].tolist() == pytest.approx([p for t in never for p, own in zip(t.logprobs, t.trained) if own], abs=1e-4)


def test_the_uncertainty_filter_drops_only_what_is_right_every_time(monkeypatch, policy, env):
    """Prevents an uncertainty filter that drops a question answered right three times of four, mixes up the tries of
    different questions, allows a tool or a second turn, or goes on trying after the first try was wrong."""
    answers = {"sure": [1, 1, 1, 1], "nearly": [1, 1, 1, 0], "once": [0, 1, 1, 1], "never": [0, 0, 0, 0]}

    def rollout(policy, env, questions, group, schedule, **_):
        assert schedule == [("answer",)]
        return [SimpleNamespace(correct=bool(answers[q].pop(0))) for q in questions for _ in range(group)]

    monkeypatch.setattr(gog, "rollout", rollout)
    assert grpo.uncertain(policy, env, list(answers)) == ["nearly", "once", "never"]
    assert [len(left) for left in answers.values()] == [0, 0, 3, 3]
