"""train.py with a policy that acts. An untrained tiny policy writes nothing that parses: no tool is called, no answer
is right and no gradient flows, so a test of RL with it would prove little. Here the ids that it samples decide what it
does and whether that was right, and <stop> is made likelier; everything else is unchanged. Run by hand: python
tests/alive.py FLAGS"""
import sys
import zlib
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import gog  # noqa: E402
import model  # noqa: E402
import tools  # noqa: E402
import train  # noqa: E402


def acts(text):
    """Map any text, by its checksum, to an answer, a search, a glance, a gaze, or a gaze at a bad box."""
    lot = zlib.crc32(text.encode())
    return (tools.Turn("answer", "x"), tools.Turn("search", f"w{lot % 50} ruler"), tools.Turn("glance", ""), tools.Turn("gaze", (5, 5, 60 + lot % 30, 70)), tools.Turn("gaze", (40, 30, 5, 70)))[lot % 5]


def liven(put=setattr):
    """Make the policy act. `put`: setattr, or monkeypatch.setattr of pytest, which undoes it after the test."""
    put(tools.Trajectory, "correct", property(lambda t: zlib.crc32(str(t.ids).encode()) % 2 == 0))
    put(gog, "parse", acts)
    be_brief(put)


def be_brief(put=setattr):
    """Make <stop> likelier, so that turns end early: an untrained policy hardly ever samples it."""
    logits = model.Policy.logits
    put(model.Policy, "logits", lambda self, hidden: logits(self, hidden) + 5.0 * (torch.arange(self.config.vocab) == model.TAGS.index("<stop>")))


if __name__ == "__main__":
    liven()
    train.main()
