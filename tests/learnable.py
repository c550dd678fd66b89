"""Which kinds of questions have gradients with something in common? A pass rate of a half may be half learnt or half
luck; this tells which. Run by hand:

    python tests/learnable.py [QUESTIONS PER KIND, default 16] [POLICY, default out/heraldry-nano-0/sft.safetensors]
        -> results/signal.csv

Every kind of question that a stage or a suite asks is drawn equally often, with 8 rollouts per question. For every
group that is alive (both right and wrong answers), the gradient of the GRPO loss is computed. What two groups have in
common is what can be learnt. signal: mean dot product of two groups of a kind; noise: mean square of one; ratio =
signal / noise (about 1 / ratio groups are needed to see anything). others: mean dot product with groups of other kinds,
divided by noise."""
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import gog
import grpo
import train
import tools
from conftest import still
from model import autocast, load


def group_gradient(policy, env, group, advantages, a):
    """Gradient of the summed loss of one group, flat. The advantages are divided by 100 before and the gradient is
    multiplied by 100 after, so that it is not clipped."""
    policy.zero_grad()
    with autocast(policy.device.type):
        grpo.grpo_step(policy, None, env, group, advantages / 100, still(policy), a)
    flat = torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
    return (100 * sum(sum(t.trained) for t in group) * flat).bfloat16()


def main(each=16, path="out/heraldry-nano-0/sft.safetensors"):
    world, a = data.open_world("heraldry"), train.Args()
    policy, v = load(path)
    env = tools.Environment(v, tools.make_toolbox(world), policy.config)
    kinds = sorted({(kind, setting) for kind, setting, _ in data.SFT_MIX + data.RL_MIX + gog.DEV_MIX})
    # told: one row of the table per kind; found: (index of the kind, gradient) of every group that is alive
    told, found = [], []
    for k, (kind, setting) in enumerate(tqdm(kinds)):
        asked = data.questions(world, [(kind, setting, 1)], int(each), "signal")
        tries = gog.rollout(policy, env, asked, a.group, a.temperature, generator=torch.Generator().manual_seed(k))
        right = torch.tensor([t.correct for t in tries]).view(-1, a.group)
        reward = torch.tensor([grpo.reward(t.correct, t.well_formed, a.lam) for t in tries]).view(-1, a.group)
        advantages, alive = grpo.group_advantages(reward, right)
        found += [(k, group_gradient(policy, env, tries[a.group * i:a.group * (i + 1)], advantages[i], a)) for i in alive.nonzero()[:, 0].tolist()]
        told.append(dict(kind=kind, setting=setting, questions=len(asked), alive=int(alive.sum()), pass_rate=f"{right.float().mean():.3f}"))
    # (groups,), (groups, parameters)
    of, stack = torch.tensor([k for k, _ in found]), torch.stack([g for _, g in found])
    dots = sum(part.float() @ part.float().T for part in stack.split(100_000, 1))  # (groups, groups)
    for k, row in enumerate(told):
        mine, n = of == k, int((of == k).sum())
        own, noise = dots[mine][:, mine], dots.diagonal()[mine].mean()
        ratio = (own.sum() - own.trace()) / max(1, n * (n - 1)) / noise if n > 1 else float("nan")
        row.update(ratio=f"{ratio:.4f}", others=f"{dots[mine][:, ~mine].mean() / noise:.4f}" if n else "nan")
        print(*(f"{v:>10}" for v in row.values()))
    tools.write_rows(Path("results/signal.csv"), told, [*told[0]], ("kind", "setting"))


if __name__ == "__main__":
    main(*sys.argv[1:])
