"""train.py with a policy that acts. A tiny policy that has learnt nothing says nothing that parses: no tool is called, no answer is right, no gradient flows, and a test of RL would prove
little. Here the ids that it samples decide what it does and whether that was right; everything else is as it is. By hand: python tests/alive.py FLAGS"""
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
    """Any text -> an answer, a search, a glance, a gaze or a bad box."""
    lot = zlib.crc32(text.encode())
    return (tools.Turn("answer", "x"), tools.Turn("search", f"w{lot % 50} ruler"), tools.Turn("glance", ""), tools.Turn("gaze", (5, 5, 60 + lot % 30, 70)), tools.Turn("gaze", (40, 30, 5, 70)))[lot % 5]


def liven(put=setattr):
    """`put`: setattr, or that of pytest's monkeypatch, which takes it back."""
    put(tools.Trajectory, "correct", property(lambda t: zlib.crc32(str(t.ids).encode()) % 2 == 0))
    put(gog, "parse", acts)
    be_brief(put)


def be_brief(put=setattr):
    """Turns end soon, which one who has learnt nothing hardly ever does."""
    logits = model.Policy.logits
    put(model.Policy, "logits", lambda self, hidden: logits(self, hidden) + 4.0 * (torch.arange(self.config.vocab) == model.TAGS.index("<stop>")))


if __name__ == "__main__":
    liven()
    train.main()
