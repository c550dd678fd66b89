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
    """Everything that computes: rollouts, pointing, and a step of every stage. (ids of the rollouts, what the steps tell)."""
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
    """Prevents a run on a GPU that ends at its first step: rollouts, every stage's step and the exam never mix devices, and do what they do on the CPU."""
    here, there, tensor = deepcopy(policy), moved(deepcopy(policy)), torch.tensor
    torch.manual_seed(1)
    ids, told = learn(here, env, questions[:2])
    monkeypatch.setattr(torch, "tensor", lambda x, device="cpu", **kwargs: tensor(x, **kwargs).to(device))  # else it passes by Factories
    torch.manual_seed(1)
    with Factories():
        ids_there, told_there = learn(there, env, questions[:2], moved)
    assert ids_there == ids and told_there == pytest.approx(told, rel=1e-2, abs=1e-4) and isinstance(there.norm.weight.data, Far)
    with pytest.raises(RuntimeError, match="another on the CPU"):
        there.norm.weight * torch.ones(64)
