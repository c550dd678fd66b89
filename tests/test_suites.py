"""The held-out suites are frozen. `python tests/test_suites.py` writes results/suites.json anew; whoever does that must
also measure every row anew."""
import hashlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import gog  # noqa: E402

FROZEN = ROOT / "results" / "suites.json"
WORLDS = {"heraldry": "heraldry", "countries": str(ROOT / "worlds" / "countries")}


def fingerprint(world, name):
    """The number of questions in a suite, and a hash of all of them: texts, answers, walls, what hangs where, and the
    facts of the entities shown."""
    searched, qs = gog.suite(world, name)
    told = [(q.text, q.answers, q.scene.seed, q.scene.boxes, [e.name for e in q.scene.entities], [searched.entities[e.name].facts for e in q.scene.entities]) for q in qs]
    return {"questions": len(qs), "sha256": hashlib.sha256(json.dumps(told).encode()).hexdigest()}


@pytest.mark.parametrize("world", WORLDS)
def test_the_suites_are_those_that_were_measured(world):
    """Prevents one table from mixing results of different questions: any change to the questions of a suite, even of
    one word, is noticed."""
    frozen = json.loads(FROZEN.read_text(encoding="utf-8"))[world]
    opened = data.open_world(WORLDS[world])
    assert {name: fingerprint(opened, name) for name in gog.SUITES} == frozen


if __name__ == "__main__":
    FROZEN.write_text(json.dumps({world: {name: fingerprint(data.open_world(path), name) for name in gog.SUITES} for world, path in WORLDS.items()}, indent=1) + "\n", encoding="utf-8")
