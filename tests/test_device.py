import random
from copy import deepcopy

import pytest
import torch
from far import Factories, Far, moved

import gog
import grpo
import train
from model import optimisers


def learn(policy, env, questions, place=lambda module: module):
    """Run everything that computes: rollouts, pointing, the exam, and one step of every stage. Returns (ids of the
    rollouts, values that the steps return)."""
    heads = place(torch.nn.ModuleList(torch.nn.Linear(w, 4 + sum(map(len, grpo.PARTS.values()))) for w in (policy.config.vit_width, policy.config.width)))
    pictures = [torch.from_numpy(x).to(policy.device) for x in grpo.labelled_pictures(policy.config, 0, 3, 0)]
    demos = gog.play_scripts(env, questions, [gog.expert(q, random.Random(0)) for q in questions])
    batch = gog.rollout(policy, env, questions, 2, generator=torch.Generator().manual_seed(0))
    grpo.misses(policy, env, questions), grpo.exam(policy, env, 8)
    stats = grpo.grpo_step(policy, deepcopy(policy), env, batch, torch.linspace(-1, 1, len(batch)), [torch.optim.SGD(policy.parameters(), 0.1, momentum=0.9)], train.Args(group=2, beta=0.1))
    told = [*grpo.supervised_step(policy, env, demos, optimisers(policy.named_parameters(), 0.001, 0.001)),
            *grpo.see_step(policy, heads, pictures, env.v, optimisers(policy.vision.named_parameters(), 0.001, 0.001))]
    return [t.ids for t in batch], [*stats.values(), *told]


def test_every_tensor_goes_where_the_policy_is(policy, env, questions, monkeypatch):
    """Prevents a crash at the first step on a GPU: rollouts, pointing, the exam and every stage's step never mix
    devices, and rollouts and steps give the same results as on the CPU."""
    monkeypatch.setattr(gog, "TURN_TOKENS", 24)  # an untrained policy never stops by itself, and its tokens are all alike
    here, there, tensor = deepcopy(policy), moved(deepcopy(policy)), torch.tensor
    torch.manual_seed(1)
    ids, told = learn(here, env, questions[:2])
    # otherwise torch.tensor bypasses Factories
    monkeypatch.setattr(torch, "tensor", lambda x, device="cpu", **kwargs: tensor(x, **kwargs).to(device))
    torch.manual_seed(1)
    with Factories():
        ids_there, told_there = learn(there, env, questions[:2], moved)
    assert ids_there == ids and told_there == pytest.approx(told, rel=1e-2, abs=1e-4) and isinstance(there.norm.weight.data, Far)
    with pytest.raises(RuntimeError, match="another on the CPU"):
        there.norm.weight * torch.ones(64)
