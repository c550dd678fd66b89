"""Updates of each kind, by as many processes as torchrun has started: they must agree with a single one. Run by hand:

    torchrun --nproc_per_node=2 tests/together.py FILE [flags of train.py]

It first runs train.py, then writes to FILE what the updates have made of a policy."""
import atexit
import os
import random
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import gog  # noqa: E402
import grpo  # noqa: E402
import model  # noqa: E402
import tools  # noqa: E402
import train  # noqa: E402


def updates():
    """{name: tensor}: what one step of the vision encoder, two supervised steps (demonstrations, lessons) and one of
    GRPO log, the weights after them, and greedy answers to five questions."""
    world, v = data.heraldry(0, 60), model.Vocabulary.learn(model.corpus())
    torch.manual_seed(0)
    policy = model.Policy(model.ModelConfig(**{**model.PRESETS["tiny"], "vocab": v.size}))
    env = tools.Environment(v, tools.make_toolbox(world), policy.config)
    qs = data.questions(world, data.SFT_MIX, 5, "together")
    demos, opts = gog.play_scripts(env, qs, [gog.expert(q, random.Random(0)) for q in qs]), [torch.optim.SGD(policy.parameters(), 0.1, momentum=0.9)]
    heads = torch.nn.ModuleList(torch.nn.Linear(w, 4 + sum(map(len, grpo.PARTS.values()))) for w in (policy.config.vit_width, policy.config.width))
    told = [grpo.see_step(policy, heads, [torch.from_numpy(x) for x in grpo.labelled_pictures(policy.config, 0, 3, 0)], v, opts)]
    told += [grpo.supervised_step(policy, env, model.share(demos), opts, 500), grpo.supervised_step(policy, env, grpo.lessons(env, 0, 3, 0), opts)]
    for t in demos:
        # about what an untrained policy gives to each of 1024 tokens (log 1/1024 = -6.93), so that ratios are near 1
        t.logprobs = [-6.9] * len(t.ids)
    a = train.Args(group=1, token_budget=500)
    stats = grpo.grpo_step(policy, None, env, demos, torch.tensor([1.0, -1.0, 0.0, 0.5, -0.5]), opts, a)
    answers = gog.rollout(policy, env, qs, 2, 0.0, schedule=gog.FREE[:2])
    return {**{k: w.detach().clone() for k, w in policy.state_dict().items()}, "told": torch.tensor(told).double(), "stats": torch.tensor([stats[k] for k in ("loss", "entropy", "signal", "grad_norm")]),
            **{f"answer {i}": torch.tensor(t.ids) for i, t in enumerate(answers)}}


def all_threads_ended():
    """Exit with code 3 if a thread of gloo is still alive. Called last of all, after the process group has been
    destroyed: such a thread outlives the interpreter and sometimes aborts the process. (Reads /proc, so it finds
    threads on Linux only.)"""
    if any("gloo" in comm.read_text() for comm in Path("/proc/self/task").glob("*/comm")):
        os._exit(3)


if __name__ == "__main__":
    atexit.register(all_threads_ended)
    path, sys.argv[1:] = sys.argv[1], sys.argv[2:]
    train.main()
    torch.cpu.get_capabilities = dict  # from here on float32 (model.autocast), as the test computes, too
    made = updates()
    tools.atomic(path, lambda p: save_file(made, p))
    model.summed(0)  # no process leaves before the file is written
