"""The policy: a small vision-language model of the SmolVLM family, with its tokenizer, optimiser and checkpoints.

    picture (3, S, S) -> ViT -> P patches -> pixel shuffle -> linear -> N image tokens, put in place of <image>
    token ids (T)     -> embeddings, smear ---------------------------^ -> Llama decoder -> logits

From the paper: only the role of the model. The authors fine-tune Qwen2.5-VL-7B and Qwen3-VL-8B.
Here instead: 3 M parameters (`nano`) or 37 M (`small`). The architecture is that of the public Llama and SigLIP models
    (RMSNorm, RoPE, grouped-query attention, SwiGLU, tied embeddings), with the same shapes and nearly the same
    parameter names, so that an independent implementation can check our logits (tests/test_model.py).
Departures from Llama and SigLIP that help a small model on a small budget (ModelConfig can switch off 1 and 2):
  1. Convolutional stem. Convolutions find edges more cheaply than a linear patch embedding learns to. Measured with an
     early version (two convolutions instead of four), after two minutes of training every patch to predict the box
     that covers it: IoU 0.66 with the stem, 0.61 without.
  2. `smear`, a short causal convolution over text tokens: every position also sees the three embeddings before it.
     This is half of a copying circuit, and lets <gaze> see both words of "red round". Measured on grounding alone, 70 s
     from a fresh decoder: the right shield in 97 % of cases with three embeddings, in 65 % with one, in 43 % with three
     if image tokens are mixed with their neighbours, too.
  3. Smooth initialisation. Patch positions and the embeddings of the numbers 0..99 start as waves, so that nearby
     places and nearby numbers start with similar vectors.
  4. Image tokens start with a larger norm: the RMSNorm weight after the projector starts at 4.5, not 1 (why: Vision).
  5. Attention starts with output weights that copy what a head reads (`Attention.echo`).

Reading order: configuration -> vocabulary -> layers and cache -> vision -> policy -> training batches -> sampling ->
several processes -> optimiser -> save and load.

Alphabet: B batch, T tokens, P patches, N image tokens per picture, D width of the decoder, W width of the ViT, S side
of a picture in pixels, H query heads, K key/value heads, C head width.
"""
import atexit
import itertools
import json
import math
import os
import random
import signal
import sys
from copy import copy
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import nn
from torch.utils.data import DataLoader

import data
from tools import PROCESSES, PROCESSES_HERE, RANK, atomic, checksum, passages


@dataclass
class ModelConfig:
    vocab: int = 1024
    width: int = 192  # D
    layers: int = 4
    heads: int = 6  # H
    kv_heads: int = 3  # K
    mlp: int = 512
    picture: int = 128  # S, pixels: every picture is resized to S x S for the ViT
    patch: int = 16
    vit_width: int = 128
    vit_layers: int = 4
    vit_heads: int = 4
    shuffle: int = 2  # pixel shuffle: shuffle x shuffle patches become one image token
    smear: int = 3  # every text token also sees the embeddings of this many tokens before it (0: plain Llama)
    stem: bool = True  # convolutions before the ViT (False: one linear patch embedding, as in SigLIP)

    @property
    def image_tokens(self):
        return (self.picture // self.patch // self.shuffle) ** 2


# "tiny" is for tests only
PRESETS = {"tiny": dict(width=64, layers=2, heads=4, kv_heads=2, mlp=128, vit_width=32, vit_layers=1, picture=64),
           "nano": {},
           "small": dict(width=512, layers=10, heads=8, kv_heads=4, mlp=1408, vit_width=256, vit_layers=6, vit_heads=8)}


# ----------------------------------------------------------------------------------------------------------- vocabulary

TAGS = ("<pad>", "<bos>", "<image>", "<sep>", "<obs>", "</obs>",  # only the environment writes these: never sampled
        "<stop>", "<think>", "</think>", "<answer>", "</answer>", "<search>", "</search>", "<glance>", "</glance>", "<gaze>", "</gaze>")


def corpus(seed=0):
    """Training texts for the tokenizer: passages, captions, questions, numbers and frequent words. They come from a
    separate toy world; no names are taken from a training world."""
    toy, rng = data.heraldry(f"{seed}/vocabulary", 300), random.Random(f"vocabulary/{seed}")
    mix = [(kind, setting, 1) for kind in (*data.VISUAL, "name", "hop1", "hop2", "compare") for setting in ("normal", "alike")]
    texts = [text for _, text in passages(toy, late=True)] + [e.blazon for e in toy.pictured()] + [q.text for q in data.questions(toy, mix, 1500, "vocabulary")]
    texts += [" " + " ".join(str(rng.randint(0, 99)) for _ in range(8)) for _ in range(3000)]
    texts += [f" {w}" for w in (*data.TINCTURES, *data.OUTLINES, *data.ORDINARIES, *data.CHARGES, *data.ACROSS, *data.DOWN, *data.SIZE)] * 50 + ["point to the each see look at all want : no not is for yes what this list repeat shows nothing found search failed again bad box more"] * 50
    return texts


class Vocabulary:
    """Byte-level BPE tokenizer: it can encode any string, including unknown names. Each number 0..99 is a single
    token, so a box is four tokens."""

    def __init__(self, text):
        """`text`: the serialised tokenizer (JSON), as a checkpoint stores it."""
        self.tokenizer, self.text = Tokenizer.from_str(text), text
        self.size, self.id = self.tokenizer.get_vocab_size(), {t: self.tokenizer.token_to_id(t) for t in TAGS}
        assert self.id["<pad>"] != self.id["<stop>"]  # fails, too, if both are None: the tokenizer lacks our tags

    @classmethod
    def learn(cls, texts, size=1024):
        """Train the BPE on texts. `size`: the number of ids, tags included."""
        # add_prefix_space: a name has the same tokens at the start of a text as after a space
        tokenizer = ByteLevelBPETokenizer(add_prefix_space=True)
        tokenizer.train_from_iterator(texts, size, min_frequency=0, show_progress=False, special_tokens=list(TAGS))
        return cls(tokenizer.to_str())

    @cached_property
    def pieces(self):
        """Printable tokens that may occur in names and facts: list of str."""
        texts = [self.decode([i]) for i in range(len(TAGS), self.size)]
        return [p for p in texts if p.isprintable() and p.strip() and not set(p) & set("<>|:,\ufffd")]

    def word(self, word):
        """The id of a word that is a single token after a space (numbers 0..99, tinctures, ...). Of any other word,
        the id of its first token."""
        return self.encode(f" {word}")[0]

    def encode(self, text):
        """Encode plain text of a world or a user: list of ids. "<" and ">" become "‹" and "›", so that a tag written
        in the text never becomes a control token. A lone surrogate, as a shell may pass on, becomes "?"."""
        return self.tokenizer.encode(text.replace("<", "‹").replace(">", "›").encode(errors="replace").decode()).ids if text else []

    def encode_turn(self, text):
        """Encode text written by the expert, in which tags become control tokens."""
        return self.tokenizer.encode(text).ids

    def decode(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


# --------------------------------------------------------------------------------------------------------------- layers

RMSNorm = partial(nn.RMSNorm, eps=1e-6)


def rope_table(positions, head_width, base=10000.0):
    """Cosine and sine of the rotation angles, the sine negated in the first half of the channels, as `rotate` needs it:
    positions (B, T) -> two tensors (B, 1, T, C)."""
    frequencies = base ** (-torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width)
    angles = (positions[..., None].float() * frequencies)[:, None]  # (B, 1, T, C/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, rope):
    """Apply the rotary position embedding to x (B, heads, T, C), in the half-split convention of Llama: channels c and
    c + C/2 are the two coordinates (a, b) of a point, which becomes (a cos - b sin, b cos + a sin)."""
    cos, sin = rope
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)  # roll swaps the halves: (b, a)


class Cache:
    """Key/value cache of B rows: `kv` (layers, 2, B, K, slots, C). Token t of row b is in slot t; `lengths` (B,) is
    the number of tokens of each row. Later slots hold garbage that no query attends to, so rows may differ in length
    and need no padding mask. Slots are added as rows grow, up to `room`: allocating all of them at once is slower.
    Within `autocast` it holds bfloat16, half of what a decode step must read."""

    def __init__(self, config, rows, room, device):
        c, self.room = config, room
        dtype = torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32
        self.kv = torch.zeros(c.layers, 2, rows, c.kv_heads, 0, c.width // c.heads, device=device, dtype=dtype)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        # the last embeddings of every row, for `smear`
        self.last = torch.zeros(rows, c.smear, c.width, device=device)

    def grow(self, upto, ahead=64):
        """Make sure that slots 0..upto-1 exist; allocate `ahead` more where room allows."""
        if upto > self.kv.shape[4]:
            self.kv = F.pad(self.kv, (0, 0, 0, min(self.room, upto + ahead) - self.kv.shape[4]))

    def append(self, layer, k, v, positions, upto):
        """Write k, v (B, K, T, C) at `positions` (B, T). Returns all keys and values of slots 0..upto-1."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        for store, new in zip(self.kv[layer], (k, v)):
            store[rows, :, positions] = new.transpose(1, 2).to(store.dtype)  # (B, T, K, C)
        return self.kv[layer, 0, :, :, :upto], self.kv[layer, 1, :, :, :upto]

    def take(self, rows):
        """A new cache with a copy of these rows (LongTensor). Rows may repeat: a prompt becomes a group."""
        taken = copy(self)
        taken.kv = self.kv[:, :, rows, :, :int(self.lengths[rows].max())]  # later slots are garbage
        taken.lengths, taken.last = self.lengths[rows], self.last[rows]
        return taken

    def put(self, rows, other):
        """Overwrite these rows (LongTensor) with the rows of another cache."""
        used = int(other.lengths.max())
        self.grow(used)
        self.kv[:, :, rows, :, :used] = other.kv[:, :, :, :, :used]
        self.lengths[rows], self.last[rows] = other.lengths, other.last


class Attention(nn.Module):
    """Llama's: grouped-query self-attention with rotary positions."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head = c.heads, c.kv_heads, c.width // c.heads
        self.q_proj = nn.Linear(c.width, c.heads * self.head, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(c.width, c.kv_heads * self.head, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(c.heads * self.head, c.width, bias=False)

    @torch.no_grad()
    def echo(self):
        """Initialise the output projection so that about half of a head's output is the value it has read: o_proj
        v_proj is near the identity, as in trained models (mimetic initialisation, Trockman & Kolter 2023)."""
        # (K, H/K, C, D): each value projection once for every query head that shares it
        v = self.v_proj.weight.unflatten(0, (self.kv_heads, 1, self.head)).expand(-1, self.heads // self.kv_heads, -1, -1)
        self.o_proj.weight.copy_((self.o_proj.weight + v.flatten(0, 2).T) / 2**0.5)

    def forward(self, x, rope, mask, cache=None, layer=0, positions=None, lengths=None):
        """x (B, T, D) -> (B, T, D), in one of three modes:
        - neither `lengths` nor `cache`: causal attention;
        - `lengths` (list of int): packed sequences, causal attention within each;
        - `cache`: also attends to the keys of earlier calls. `mask` (B, 1, H/K*T, slots) is added to the scores."""
        B, T, _ = x.shape
        split = lambda y, n: y.view(B, T, n, self.head).transpose(1, 2)  # (B, T, n*C) -> (B, n, T, C)
        q = rotate(split(self.q_proj(x), self.heads), rope)
        k = rotate(split(self.k_proj(x), self.kv_heads), rope)
        v = split(self.v_proj(x), self.kv_heads)
        if cache is not None:
            k, v = cache.append(layer, k, v, positions, mask.shape[-1])
            # (B, H, T, C) -> (B, K, H/K*T, C): stacks the query heads that share a key/value head, to read keys once
            q = q.reshape(B, self.kv_heads, -1, self.head)
        elif x.device.type == "cpu":  # on CPUs the backward pass of attention is half as fast in bfloat16 as in float32
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast(x.device.type, enabled=False):
            attend = partial(F.scaled_dot_product_attention, attn_mask=mask, is_causal=mask is None, enable_gqa=cache is None)
            # packed: each sequence attends only to itself
            sequences = zip(*(y.split(lengths, 2) for y in (q, k, v))) if lengths else [(q, k, v)]
            out = torch.cat([attend(*qkv) for qkv in sequences], 2)
        out = out.reshape(B, self.heads, T, self.head)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, H, T, C) -> (B, T, D)


class Block(nn.Module):
    """Llama's: x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, c):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(c.width), Attention(c)
        self.post_attention_layernorm = RMSNorm(c.width)
        self.gate_proj, self.up_proj = (nn.Linear(c.width, c.mlp, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(c.mlp, c.width, bias=False)

    def forward(self, x, *attention_args):
        x = x + self.self_attn(self.input_layernorm(x), *attention_args)
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class VisionBlock(nn.Module):
    """SigLIP's: LayerNorm, full attention, GELU MLP. x (B, P, W) -> (B, P, W)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        B, P, W = x.shape
        # each (B, heads, P, C)
        q, k, v = self.qkv(self.layer_norm1(x)).view(B, P, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, P, W))
        return x + self.fc2(F.gelu(self.fc1(self.layer_norm2(x)), approximate="tanh"))


def position_map(grid, width):
    """Initial position embeddings of the patches, (grid * grid, width): half the channels are sine and cosine waves
    along x, half along y. They are trained from there."""
    x, f = (torch.arange(grid)[:, None] + 0.5) / grid, torch.arange(1, width // 4 + 1)[None]
    waves = torch.cat([(torch.pi * x * f).sin() / f, (torch.pi * x * f).cos() / f], 1)  # (grid, width / 2)
    both = torch.cat([waves[None].expand(grid, -1, -1), waves[:, None].expand(-1, grid, -1)], -1)  # (grid, grid, width)
    return both.reshape(grid**2, width) / both.std()


class Vision(nn.Module):
    """The vision encoder ("the eyes") and its projector: pictures (B, 3, S, S), uint8 -> patch features (B, P, W) and
    image tokens (B, N, D)."""

    def __init__(self, c):
        super().__init__()
        self.grid, self.shuffle, w = c.picture // c.patch, c.shuffle, c.vit_width
        # the stem: three convolutions of stride 2 and one of stride patch / 8 give one position per patch
        stem = [(3, w // 4, 3, 2, 1), (w // 4, w // 2, 3, 2, 1), (w // 2, w, 3, 2, 1), (w, w, c.patch // 8, c.patch // 8)]
        convolutions = [f for sizes in stem for f in (nn.GELU(), nn.Conv2d(*sizes))][1:] if c.stem else None
        self.embed = nn.Sequential(*convolutions) if c.stem else nn.Conv2d(3, w, c.patch, c.patch)
        self.position = nn.Parameter(position_map(self.grid, w))
        self.blocks = nn.ModuleList(VisionBlock(w, c.vit_heads) for _ in range(c.vit_layers))
        self.norm = nn.LayerNorm(w)
        self.projector = nn.Linear(w * c.shuffle**2, c.width, bias=False)
        self.projector_norm = RMSNorm(c.width)  # fixes the norm of image tokens, which would otherwise keep growing
        # a large norm: otherwise the residual updates of text-trained layers would drown the image content
        # (results/trials.md: pointing right in 55 % -> 92 %)
        nn.init.constant_(self.projector_norm.weight, 4.5)

    def forward(self, pictures):
        x = self.embed(pictures.to(self.position.dtype) / 127.5 - 1)  # (B, W, grid, grid)
        x = x.flatten(2).transpose(1, 2) + self.position  # (B, P, W)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        B, P, W = x.shape
        s, g = self.shuffle, self.grid // self.shuffle
        shuffled = x.view(B, g, s, g, s, W).transpose(2, 3).reshape(B, g * g, s * s * W)  # pixel shuffle: N = P / s^2
        return x, self.projector_norm(self.projector(shuffled).float())


class Policy(nn.Module):
    """The vision-language model. `forward` returns final hidden states; `logits` turns selected ones into scores
    (most positions never need any)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = Vision(config)
        self.embed_tokens = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        # config.smear: the number of embeddings mixed in; self.smear: the layer that mixes them, or None
        self.smear = nn.Linear(config.smear * config.width, config.width, bias=False) if config.smear else None
        self.apply(self._init)
        for block in self.layers:
            block.self_attn.echo()
            for last in (block.self_attn.o_proj, block.down_proj):  # residual branches start small (GPT-2)
                last.weight.data /= (2 * config.layers) ** 0.5

    @staticmethod
    def _init(module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Conv2d):  # PyTorch's default: patch features 180 times smaller than positions
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)

    @property
    def device(self):
        return self.embed_tokens.weight.device

    def freeze_eyes(self, frozen=True):
        """Freeze the vision encoder, or unfreeze it with frozen=False; its projector stays trainable. Returns the
        policy. A frozen encoder needs no backward pass (two thirds of its cost), and the gradient of the language
        model cannot undo what it has learnt."""
        self.vision.requires_grad_(not frozen)
        self.vision.projector.requires_grad_(), self.vision.projector_norm.requires_grad_()
        return self

    def forward(self, ids, pictures=None, image_id=None, cache=None, valid=None, lengths=None):
        """Hidden states (B, T, D) of token ids (B, T).

        pictures: uint8 (any number, 3, S, S). Their image tokens fill, in order, the positions where ids == image_id.
        cache: a Cache whose rows the ids continue; None: whole sequences, causal.
        valid: (B,), with a cache: how many tokens of each row are real (default: all T); the rest is padding.
        lengths: list of int, without a cache: ids are one row of concatenated sequences of these lengths (`packed`)."""
        B, T = ids.shape
        # from 0 in every sequence; with a cache, from the end of its rows
        positions = torch.cat([torch.arange(n) for n in lengths or [T]]).to(ids.device).expand(B, T) + (0 if cache is None else cache.lengths[:, None])
        x = self.embed_tokens(ids)
        if self.smear:  # before image tokens are put in, which therefore stay unmixed
            x = x + self.smear(self._previous_embeddings(x, positions, cache, valid))
        if pictures is not None:
            x = x.masked_scatter((ids == image_id)[..., None], self.vision(pictures)[1].to(x.dtype))
        mask = None
        if cache is not None:  # a query at position p sees slots 0..p; this alone hides all garbage slots
            # positions of padding, and of rows that have stopped, may exceed the room; those of real tokens never do
            # (data.fits limits prompts, gog.rollout limits turns)
            positions = positions.clamp(max=cache.room - 1)
            upto = int(positions.max()) + 1
            cache.grow(upto)
            unseen = torch.arange(upto, device=ids.device) > positions[..., None]
            # (B, 1, H/K*T, upto), added to the scores; shared by all layers
            mask = torch.where(unseen, float("-inf"), 0.0).repeat(1, self.config.heads // self.config.kv_heads, 1)[:, None].to(cache.kv.dtype)
        rope = rope_table(positions, self.config.width // self.config.heads)
        for i, block in enumerate(self.layers):
            x = block(x, rope, mask, cache, i, positions, lengths)
        if cache is not None:
            cache.lengths += T if valid is None else valid
        return self.norm(x)

    def _previous_embeddings(self, x, positions, cache, valid):
        """The `smear` embeddings before each position of x (B, T, D), nearest last: (B, T, smear * D); zeros before
        the start of a sequence. The cache keeps the last `smear` embeddings of every row for the next call."""
        (B, T, D), n = x.shape, self.config.smear
        # (B, n + T, D): position t at index n + t
        extended = torch.cat([x.new_zeros(B, n, D) if cache is None else cache.last, x], 1)
        if cache is not None:
            real = torch.full_like(cache.lengths, T) if valid is None else valid  # new tokens of each row
            cache.last = extended[torch.arange(B, device=x.device)[:, None], real[:, None] + torch.arange(n, device=x.device)]
        # zero where the sequence has not begun yet (packed: that would be the previous sequence)
        return torch.cat([extended[:, k:k + T] * (positions >= n - k)[..., None] for k in range(n)], -1)

    def logits(self, hidden):
        """Scores over the vocabulary: (..., D) -> float32 (..., vocab)."""
        with torch.autocast(hidden.device.type, enabled=False):  # in bfloat16, scores near 16 have steps of 1/8
            return hidden.float() @ self.embed_tokens.weight.float().T  # tied: (..., D) -> (..., vocab)


@torch.no_grad()
def number_line(embedding, ids, waves=12):
    """Initialise the embeddings (vocab, D) of the numbers 0..99 (their `ids`) along a smooth curve, so that what is
    learnt about 37 helps with 36 and 38. Measured: loss of a coordinate after 120 steps 3.8 without, 3.2 with."""
    x, f = torch.arange(len(ids))[:, None] / len(ids), torch.arange(1, waves + 1)[None]
    curve = torch.cat([(torch.pi * x * f).sin() / f**0.5, (torch.pi * x * f).cos() / f**0.5], 1)  # (100, 2 * waves)
    curve = curve @ torch.linalg.qr(torch.randn(embedding.shape[1], 2 * waves))[0].T
    embedding[ids] = 0.9 * embedding.std() * (curve / curve.std()).to(embedding.device) + 0.3 * embedding[ids]


# ----------------------------------------------------------------------------------------------------- training batches

def ignore_ctrl_c(_):
    """Start-up of a worker: ignore Ctrl-C, which the terminal sends to it as well. The main process handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def stream(make, start, steps, ahead=16):
    """Iterate over the batches make(start) .. make(steps - 1).

    All cores make `ahead` batches, then all cores train on them. One process that makes batches *while* the model
    trains slows training more than it helps: the model's threads wait for each other, so who takes a core from one
    stops all. Measured: 0.24 -> 0.22 s a step of lessons, 0.15 -> 0.12 s a step of the eyes."""
    numbers = []  # the next steps; `collate_fn` turns a number into its batch
    loader = DataLoader(range(steps), batch_size=None, sampler=numbers, num_workers=min(ahead, torch.get_num_threads()), persistent_workers=True, collate_fn=make, worker_init_fn=ignore_ctrl_c)
    for first in range(start, steps, ahead):
        numbers[:] = range(first, min(first + ahead, steps))
        yield from [*loader]


def micro_batches(items, lengths, budget):
    """Split items into lists of about `budget` tokens each; `lengths`: tokens of each item. Items whose running token
    total ends between the same two multiples of `budget` share a list."""
    ends = list(itertools.accumulate(lengths))
    return [[items[i] for i in indices] for _, indices in itertools.groupby(range(len(ends)), lambda i: ends[i] // budget)]


def packed(trajectories, pad, device, step=128):
    """Concatenate trajectories to one row. Returns ids (1, T), the mask of trained tokens (1, T), the lengths of the
    sequences, and the pictures (n, 3, S, S), or None if there are none. The only padding is one more sequence at the
    end, which fills the row to a multiple of `step`: bfloat16 kernels are compiled for every new shape."""
    ids, trained = [i for t in trajectories for i in t.ids], [x for t in trajectories for x in t.trained]
    pictures = [p for t in trajectories for p in t.pictures]
    padding = -len(ids) % step
    lengths = [len(t.ids) for t in trajectories] + [padding] * (padding > 0)
    stacked = torch.from_numpy(np.stack(pictures)).to(device) if pictures else None
    return torch.tensor([ids + [pad] * padding], device=device), torch.tensor([trained + [False] * padding], device=device), lengths, stacked


def autocast(device):
    """A context that computes matrix products in bfloat16 if the processor supports it in hardware (training is then
    up to 1.3 times as fast, rollouts are up to 1.4 times); otherwise it changes nothing. Enter a new one for every
    step: it caches converted weights until it is left."""
    supported = {"cpu": torch.cpu.get_capabilities().get("avx512_bf16", False), "cuda": torch.cuda.is_available() and torch.cuda.is_bf16_supported()}
    return torch.autocast(device, torch.bfloat16, enabled=supported.get(device, False))


# ------------------------------------------------------------------------------------------------------------- sampling

def pick(logits, temperature, allowed, generator=None):
    """Sample one id per row from logits (B, vocab). Returns ids (B,) and their log-probabilities (B,) under the
    sampled distribution.

    temperature: 0 is greedy (the log-probability is then that at temperature 1). There is no top-k or top-p: GRPO
    must score exactly the distribution that was sampled from, so that its ratio begins at 1 (but for rounding).
    allowed: bool (B or 1, vocab), the ids that may be sampled."""
    logits = logits.masked_fill(~allowed, float("-inf"))
    logp = F.log_softmax(logits.float() / (temperature or 1.0), -1)
    if temperature:  # inverse transform sampling (torch.multinomial draws one random number per id, which is slower)
        cumulative = logp.exp().cumsum(-1)
        height = torch.rand(len(logp), 1, device=logp.device, generator=generator) * cumulative[:, -1:]
        ids = torch.searchsorted(cumulative, height.clamp(max=cumulative[:, -1:] * (1 - 1e-6)), right=True)[:, 0]
    else:
        ids = logp.argmax(-1)
    return ids, logp.gather(1, ids[:, None])[:, 0]


# ---------------------------------------------------------------------------- several processes (torchrun), or just one
# Every process runs all of train.py. They split each batch (`share`) and take the same optimiser steps (`update`); only
# the first process prints and writes files. Whatever calls `summed` or `gathered` (rollouts, steps, checkpoints) must
# be called by every process, equally often and in the same order.

def work_together(device):
    """Join the process group that torchrun has started. Each process has its own GPU or its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # those that we may use
    torch.set_num_threads(max(1, cores // PROCESSES_HERE))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # imported before there is a group: it would keep a reference to it, and the threads of the group would outlive the
    # interpreter and sometimes abort it
    import torch.distributed.nn as _
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    atexit.register(torch.distributed.destroy_process_group)
    if RANK:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8", errors="replace")


def share(items):
    """This process's share of the items: every PROCESSES-th one, starting at RANK."""
    return items[RANK::PROCESSES]


def summed(x):
    """Sum a tensor (in place) or a number over all processes; returns a tensor. Waits for all processes."""
    x = torch.as_tensor(x)
    if PROCESSES > 1:
        torch.distributed.all_reduce(x)
    return x


def gathered(mine):
    """Undo `share`: the items of all processes in their original order. `mine`: this process's, none of them None."""
    shares = [mine] * PROCESSES
    if PROCESSES > 1:
        torch.distributed.all_gather_object(shares, mine)
    return [x for row in itertools.zip_longest(*shares) for x in row if x is not None]


def torch_rng(device, *seed):
    """A generator seeded by any words and numbers and by the rank of the process, so that no generator state must be
    saved for --resume."""
    return torch.Generator(device).manual_seed(checksum("/".join(map(str, (*seed, RANK)))))


# ------------------------------------------------------------------------------------------------------------ optimiser

def orthogonalise(g, steps=5):
    """Newton-Schulz iteration: push the singular values of each matrix of a stack (N, rows, cols) towards 1, while
    keeping its singular vectors. More steps reach smaller singular values: the vision encoder ends at a loss of 7.8,
    5.0, 4.4 with 3, 5, 7 of them (at a rate of 0.004); lessons in words learn no better with 7 (results/trials.md)."""
    a, b, c = 3.4445, -4.7750, 2.0315  # coefficients of a x + b x^3 + c x^5 (Jordan et al. 2024)
    x = (g.transpose(1, 2) if g.shape[1] > g.shape[2] else g) / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    with autocast(g.device.type):  # the method is designed for bfloat16
        for _ in range(steps):
            s = x @ x.transpose(1, 2)
            x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)  # a x + (b s + c s^2) x
    return (x.transpose(1, 2) if g.shape[1] > g.shape[2] else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Muon: momentum whose update is orthogonalised (Jordan et al. 2024) and scaled to the size of AdamW's. For
    hidden matrices and convolutions; a kernel (out, in, k, k) is treated as a matrix (out, in * k * k).

    torch.optim.Muon is the same rule, but always in bfloat16 and one matrix at a time: 4.7 s a step for `nano` on a
    CPU without bfloat16 units, against 0.06 s here, where matrices of the same shape are stacked."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                # Nesterov momentum
                shapes.setdefault(p.flatten(1).shape, []).append((p, p.grad.lerp(m, group["momentum"]).flatten(1)))
            for shape, pairs in shapes.items():
                params, updates = zip(*pairs)
                scale = 0.2 * max(shape) ** 0.5
                for p, u in zip(params, orthogonalise(torch.stack(updates), group["newton_schulz"])):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u.view_as(p), alpha=-group["lr"] * scale)


def optimisers(named, muon_lr, adam_lr, newton_schulz=5):
    """Two optimisers for (name, parameter) pairs: Muon for matrices and convolutions, AdamW for the rest (embeddings,
    positions, norms, biases). newton_schulz: Muon's steps of `orthogonalise`."""
    matrices, rest = [], []
    for name, p in named:
        (matrices if p.dim() in (2, 4) and "embed_tokens" not in name and "position" not in name else rest).append(p)
    return [Muon(matrices, dict(lr=muon_lr, momentum=0.95, weight_decay=0.01, newton_schulz=newton_schulz)), torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0)]


def lr_factor(step, steps, warmup=30, decay=0.9):
    """Learning-rate factor in 0..1: linear warm-up, constant, then linear decay to 0 over the `decay` share at the end.
    Short runs have no constant part: SFT's 60 steps peak at 0.72. The base model learns most while the rate decays."""
    return min(1.0, (step + 1) / warmup, (steps - step) / max(1, decay * steps))


def set_lr(opts, factor):
    """Set every learning rate to `factor` times its initial value. Returns the first optimiser's rate."""
    for group in (group for opt in opts for group in opt.param_groups):
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return opts[0].param_groups[0]["lr"]


class NotFinite(ArithmeticError):
    """A loss, gradient or weight is not finite (NaN or infinite). Raised before anything is changed or written, with
    the batch of trajectories that caused it, if there is one."""


def parameters(opts):
    """All parameters of these optimisers: list of tensors."""
    return [p for opt in opts for group in opt.param_groups for p in group["params"]]


def flat_gradient(opts):
    """The gradient of all parameters of these optimisers as one vector, summed over the processes (0 where None)."""
    return summed(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters(opts)]))


def update(module, opts, batch=(), loss=0.0, clip=1.0):
    """One optimiser step on the gradients that `batch` (only for the report if this fails) has left in the parameters.
    The gradient of `module` is clipped to norm `clip`; returns its norm before clipping. Raises NotFinite if this norm
    or `loss` is not finite. With several processes, each holds the gradient of its share of the batch; they are summed,
    and all processes take the same step."""
    if PROCESSES > 1:
        for p, g in zip(parameters(opts), flat_gradient(opts).split([p.numel() for p in parameters(opts)])):
            p.grad = g.view_as(p) if g.any() else None  # None: no loss depends on p, so momentum must not move it
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), clip).item()
    if not math.isfinite(norm + loss):
        raise NotFinite(gathered(batch))
    for opt in opts:
        opt.step()
        opt.zero_grad(set_to_none=True)
    return norm


# -------------------------------------------------------------------------------------------------------- save and load

class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message names the file and what to do."""


def write(path, tensors, meta):
    """Write tensors and `meta` (strings) to one safetensors file. Raises OSError if the disk is full, NotFinite if a
    number is not finite; the previous file then stays as it was."""
    if not all(t.isfinite().all() for t in tensors.values()):
        raise NotFinite(())
    atomic(path, lambda p: p.write_bytes(to_bytes({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, meta)))


def save(model, path, **meta):
    """Write the weights, the configuration and `meta` (strings) to one safetensors file."""
    write(path, model.state_dict(), {"config": json.dumps(asdict(model.config)), **meta})


def read(path):
    """Read a safetensors file: (its strings, its tensors), two dicts."""
    with safe_open(path, "pt") as f:
        # clone: Windows cannot replace a file that is still memory-mapped
        return f.metadata() or {}, {k: f.get_tensor(k).clone() for k in f.keys()}


def load(path, device="cpu"):
    """Read what `save` wrote: the policy, with a frozen vision encoder, and its vocabulary. Raises CheckpointError if
    the file is missing, damaged, or of another shape."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such checkpoint. Train one first: python train.py --stage sft")
    try:
        meta, weights = read(path)
        config, v = json.loads(meta["config"]), Vocabulary(meta["tokenizer"])
        model = Policy(ModelConfig(**{f.name: config[f.name] for f in fields(ModelConfig)}))
        model.load_state_dict(weights)
        if v.size != model.config.vocab:
            raise ValueError("a tokenizer of another size")
    except Exception as e:  # a header may hold anything, and `tokenizers` raises plain Exception
        raise CheckpointError(f"{path}: not a readable safetensors file, or weights of another shape or version ({repr(e).splitlines()[0][:200]}). Delete it and train again") from None
    return model.to(device).freeze_eyes(), v


def save_state(path, modules, opts, **meta):
    """Write all that training resumes from (modules, optimisers, `meta` strings) to a safetensors file; no pickle."""
    tensors = {f"module.{i}.{k}": v for i, m in enumerate(modules) for k, v in m.state_dict().items()}
    states = [(f"optimiser.{o}.{i}", state) for o, opt in enumerate(opts) for i, state in opt.state_dict()["state"].items()]
    tensors |= {f"{prefix}.{k}": v for prefix, state in states for k, v in state.items()}
    write(path, tensors, meta)


def load_state(path, modules, opts):
    """Restore modules and optimisers from `save_state`; returns its `meta`. CheckpointError if it does not fit."""
    try:
        meta, tensors = read(path)
        for i, m in enumerate(modules):
            m.load_state_dict({k.split(".", 2)[2]: v for k, v in tensors.items() if k.startswith(f"module.{i}.")})
        for o, opt in enumerate(opts):
            state = {}
            for (_, _, i, name), v in ((k.split(".", 3), v) for k, v in tensors.items() if k.startswith(f"optimiser.{o}.")):
                state.setdefault(int(i), {})[name] = v
            opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})
    except (SafetensorError, OSError, RuntimeError, KeyError, ValueError) as e:
        raise CheckpointError(f"{path}: cannot be resumed ({str(e).splitlines()[0]}). Delete it to restart this stage") from None
    return meta
