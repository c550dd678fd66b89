"""Shared small things: one world, one vocabulary, one tiny policy. No test may open a socket."""
import socket
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import gog  # noqa: E402
import grpo  # noqa: E402
from model import PRESETS, ModelConfig, Policy, Vocabulary  # noqa: E402


@pytest.fixture(autouse=True)
def no_sockets(monkeypatch):
    """Everything is offline: a test that reaches for the network fails."""
    def refuse(*_, **__):
        raise AssertionError("a socket was opened")
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def vocabulary():
    return Vocabulary.learn(grpo.corpus())


@pytest.fixture(scope="session")
def world():
    return data.heraldry(0, 200)


@pytest.fixture(scope="session")
def policy(vocabulary):
    torch.manual_seed(0)
    return Policy(ModelConfig(**{**PRESETS["tiny"], "vocab": vocabulary.size}))


@pytest.fixture(scope="session")
def env(vocabulary, world, policy):
    return gog.Environment(vocabulary, gog.make_toolbox(world), policy.config)


@pytest.fixture(scope="session")
def questions(world):
    return data.questions(world, data.RL_MIX, 24, "test")
