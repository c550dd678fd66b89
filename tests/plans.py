"""What does RL teach? How many of its first plans a policy says right, with the picture and without. Run by hand:

    python tests/plans.py [SEED ...]    -> results/plans.csv, of out/heraldry-nano-SEED/{sft,rl}.safetensors

Every question is about one of several shields of the development split, and follows one to five relations. The expert
gazes at the right shield, the tools answer, and the policy goes on (greedy): it should say whether the hit is what it
wants, the name, and its plan, which is copied from the question. With eyes closed it reads the same words, without the
image tokens of wall and crop. short: the plan is right as far as it goes, but ends too early; other: any other
mistake."""
import random
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


def after_the_first_look(env, world, each):
    """`each` questions of every kind: (question, demonstration, number of its ids up to the end of the first look)."""
    for kind in KINDS:
        asked = data.questions(world, [(kind, "normal", 1)], each, "plans", ("dev",))
        for q, demo in zip(asked, gog.play_scripts(env, asked, [gog.expert(q, random.Random(0)) for q in asked])):
            yield q, demo, demo.ids.index(env.v.id["</obs>"]) + 1


def verdict(q, turn):
    """Is the plan of this turn right, short, or something else?"""
    said, wanted = turn.thought.partition(f"{q.scene.entities[q.targets[0]].name}, ")[2], gog.plan(q.chain)
    return "right" if said == wanted else "short" if said and wanted.startswith(said) else "other"


def main(*seeds, each=60):
    world, told = data.open_world("heraldry"), []
    box, begun = tools.make_toolbox(world), []
    for seed in tqdm(seeds or ("0", "1", "2")):
        for stage in ("sft", "rl"):
            policy, v = load(f"out/heraldry-nano-{seed}/{stage}.safetensors")
            env = tools.Environment(v, box, policy.config)
            begun = begun or [*after_the_first_look(env, world, each)]  # the same for all: there is one vocabulary
            for eyes in ("open", "closed"):
                prompts = [[i for i in demo.ids[:end] if eyes == "open" or i not in env.image_ids] for _, demo, end in begun]
                pictures = [p for _, demo, _ in begun for p in demo.pictures[:2]] if eyes == "open" else []
                found = Counter((q.kind, verdict(q, turn)) for (q, *_), turn in zip(begun, gog.respond(policy, env, prompts, pictures)))
                told += [dict(policy=stage, seed=seed, eyes=eyes, relations=kind[3:], **{k: found[kind, k] for k in ("right", "short", "other")}) for kind in KINDS]
    tools.write_rows(Path("results/plans.csv"), told, [*told[0]], ("policy", "seed", "eyes", "relations"))


if __name__ == "__main__":
    main(*sys.argv[1:])
