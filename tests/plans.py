"""Where do chains break? How many of its first and second plans a policy says right. Run by hand:

    python tests/plans.py [SEED ...]    -> results/plans.csv, of base model, SFT and RL policy of every SEED in out/

Every question is about one of several shields of the development split, and follows one to five relations. The expert
gazes at the right shield, the tools answer, and the policy goes on (greedy): it should say whether the hit is what it
wants, the name, and its first plan, which is copied from the question. Or the expert also makes the first search, and
the policy goes on there: its second plan is the first, less one relation. short: the plan is right as far as it goes,
but lacks the last relations; other: any other mistake."""
import random
import re
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import gog
import tools
from model import load

KINDS = ("hop1", "hop2", "hop3", "hop4", "hop5")


def demonstrations(env, world, each):
    """`each` questions of every kind, and their demonstrations: list of trajectories."""
    asked = [q for kind in KINDS for q in data.questions(world, [(kind, "normal", 1)], each, "plans", ("dev",))]
    return gog.play_scripts(env, asked, [gog.expert(q, random.Random(0)) for q in asked])


def verdict(chain, turn):
    """Is the plan of this turn right, short, or something else?"""
    said, wanted = re.search("(?:for the .*)?$", turn.thought)[0], gog.plan(chain)
    return "right" if said == wanted else "short" if said and wanted.startswith(said.removesuffix(" of the one")) else "other"


def main(*seeds, each=60):
    world, told = data.open_world("heraldry"), []
    box, demos = tools.make_toolbox(world), []
    for seed in tqdm(seeds or ("0", "1", "2")):
        for stage, weights in (("base", f"base-nano-{seed}/pretrain"), ("sft", f"heraldry-nano-{seed}/sft"), ("rl", f"heraldry-nano-{seed}/rl")):
            policy, v = load(f"out/{weights}.safetensors")
            env = tools.Environment(v, box, policy.config)
            demos = demos or demonstrations(env, world, each)  # the same for all: there is one vocabulary
            for k, name in enumerate(("first", "second")):  # behind the first or second observation: the look, the first search
                planned = [t for t in demos if len(t.question.chain) > k]
                ends = [[i for i, token in enumerate(t.ids) if token == v.id["</obs>"]][k] + 1 for t in planned]
                turns = gog.respond(policy, env, [t.ids[:end] for t, end in zip(planned, ends)], [p for t in planned for p in t.pictures[:2]])
                found = Counter((t.question.kind, verdict(t.question.chain[k:], turn)) for t, turn in zip(planned, turns))
                told += [dict(policy=stage, seed=seed, plan=name, relations=kind[3:], **{x: found[kind, x] for x in ("right", "short", "other")}) for kind in KINDS]
    tools.write_rows(Path("results/plans.csv"), told, [*told[0]], ("policy", "seed", "plan", "relations"))


if __name__ == "__main__":
    main(*sys.argv[1:])
