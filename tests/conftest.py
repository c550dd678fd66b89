"""Shared fixtures: one world, one vocabulary, one tiny policy. No test may connect to the network."""
import functools
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: tiny models are faster so, in processes that tests start, too

import far  # noqa: E402, F401 (registers its device, which must happen before the first backward pass)
import pytest  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
import model  # noqa: E402

model.corpus = functools.cache(model.corpus)  # the same texts every time, and they take seconds. (Before train imports it)
import data  # noqa: E402
import tools  # noqa: E402
import train  # noqa: E402
from model import PRESETS, ModelConfig, Policy, Vocabulary, corpus  # noqa: E402


def llama_twin(hf, policy, **options):
    """Llama from transformers (the package `hf`) with the decoder weights of a policy without `smear`."""
    c = policy.config
    llama = hf.LlamaForCausalLM(hf.LlamaConfig(
        vocab_size=c.vocab, hidden_size=c.width, intermediate_size=c.mlp, num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
        rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=True, **options))
    renamed = {"model." + (k if "_proj" not in k or "self_attn" in k else ".mlp.".join(k.rsplit(".", 2)[0:1] + [k.split(".", 2)[2]])): w
               for k, w in policy.state_dict().items() if not k.startswith("vision")}
    missing = llama.load_state_dict(renamed, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}
    return llama


def still(policy):
    """Optimisers that change neither weights nor gradients, so that a test can look at the gradient of an update."""
    return [SimpleNamespace(param_groups=[{"params": [*policy.parameters()]}], step=lambda: None, zero_grad=lambda **_: None)]


@pytest.fixture(autouse=True)
def no_sockets(monkeypatch):
    """Everything is offline: a test that connects a socket fails."""
    def refuse(*_, **__):
        raise AssertionError("a socket was opened")
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Everything is computed in float32, on processors with bfloat16 units, too (`model.autocast`), so that results can
    be compared closely. (Not in a process that a test starts; tests of bfloat16 switch it on themselves.)"""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)


@pytest.fixture(scope="session")
def vocabulary():
    return Vocabulary.learn(corpus())


@pytest.fixture(scope="session")
def world():
    return data.heraldry(0, 200)


@pytest.fixture(scope="session")
def policy(vocabulary):
    torch.manual_seed(0)
    return Policy(ModelConfig(**{**PRESETS["tiny"], "vocab": vocabulary.size}))


@pytest.fixture(scope="session")
def env(vocabulary, world, policy):
    return tools.Environment(vocabulary, tools.make_toolbox(world), policy.config)


@pytest.fixture(scope="session")
def questions(world):
    return data.questions(world, data.RL_MIX, 24, "test")


@pytest.fixture(scope="session")
def begun(tmp_path_factory):
    """A function that copies the base model and the SFT policy of a tiny run (test_train.TINY) into a folder. They are
    trained once per test session."""
    from test_train import TINY
    made = tmp_path_factory.mktemp("begun")
    a = train.arguments([*TINY, "--out", str(made), "--results", str(made)])
    train.pretrain(a), train.sft(a)

    def copied(folder):
        folder.mkdir(exist_ok=True)
        for stage in ("pretrain", "sft"):
            (folder / f"{stage}.safetensors").write_bytes((made / f"{stage}.safetensors").read_bytes())

    return copied
