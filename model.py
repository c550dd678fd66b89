"""The policy: a compact vision-language model of the SmolVLM family, with its vocabulary, its optimiser and its checkpoints.

    picture (3, S, S) -> ViT -> P patches -> pixel shuffle -> N image tokens -> linear -> they replace the <image> placeholders
    token ids         -> embedding ----------------------------------------------------^  -> Llama decoder -> logits

From the paper: nothing but the role. The authors fine-tune Qwen2.5-VL-7B and Qwen3-VL-8B.
Here instead: 3 M parameters (`nano`) or 37 M (`small`), same shapes and nearly the same parameter names as the public Llama/SigLIP family
    (RMSNorm, RoPE, grouped-query attention, SwiGLU, tied embeddings), so that an independent implementation can check our logits.
Additions that a small model on a small budget is glad of; the first two can be switched off in the configuration:
  1. A convolutional stem: edges are cheaper to convolve than to discover (an early version, two convolutions instead of four, after two
     minutes of telling for every patch which box covers it: IoU 0.66 with, 0.61 without).
  2. `smear`, a short causal convolution over words: every position also sees the three embeddings before it, which is half of what a
     copying circuit needs, and lets <gaze> see both words of "red round" (grounding alone, 70 s from a fresh decoder: the right shield
     97 % of the time with three; 65 % with one; 43 % with three when image tokens, too, were mixed with their neighbours).
  3. Smooth starts: patch positions and the embeddings of 0..99 begin on waves, so that nearby places and numbers begin alike.
  4. Loud image tokens: the norm after the projector begins at 4.5 instead of 1 (why: Vision, below).

Reading order: configuration -> vocabulary -> layers -> cache -> vision -> policy -> batches to train on -> sampling -> several processes ->
optimiser -> save and load.

Alphabet: B batch, T tokens, P patches, N image tokens a picture, D width of the decoder, W of the ViT, S side of a picture in pixels, H
query heads, K key/value heads, C head width.
"""
import atexit
import importlib
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
from tools import PROCESSES, RANK, atomic, checksum, passages


@dataclass
class ModelConfig:
    vocab: int = 1024
    width: int = 192  # D
    layers: int = 4
    heads: int = 6  # H
    kv_heads: int = 3  # K
    mlp: int = 512
    picture: int = 128  # S, pixels: every picture is shrunk to S x S before it is seen
    patch: int = 16
    vit_width: int = 128
    vit_layers: int = 4
    vit_heads: int = 4
    shuffle: int = 2  # pixel shuffle: shuffle^2 patches become one image token
    smear: int = 3  # every position also sees so many embeddings before it (0: pure Llama)
    stem: bool = True  # convolutions before the ViT (False: one linear patch embedding, as SigLIP has)

    @property
    def image_tokens(self):
        return (self.picture // self.patch // self.shuffle) ** 2


PRESETS = {"tiny": dict(width=64, layers=2, heads=4, kv_heads=2, mlp=128, vit_width=32, vit_layers=1, picture=64),  # tests only
           "nano": {},
           "small": dict(width=512, layers=10, heads=8, kv_heads=4, mlp=1408, vit_width=256, vit_layers=6, vit_heads=8)}


# ------------------------------------------------------------------------------------------------------------ vocabulary

TAGS = ("<pad>", "<bos>", "<image>", "<sep>", "<obs>", "</obs>",  # written by the environment only: these cannot be sampled
        "<stop>", "<think>", "</think>", "<answer>", "</answer>", "<search>", "</search>", "<glance>", "</glance>", "<gaze>", "</gaze>")


def corpus(seed=0):
    """Texts that the tokenizer learns to spell from: invented names, questions, passages and numbers. No world's own names are in it."""
    toy, rng = data.heraldry(f"{seed}/vocabulary", 300), random.Random(f"vocabulary/{seed}")
    asked = [(kind, setting, 1) for kind in (*data.VISUAL, "name", "hop1", "hop2", "compare") for setting in ("normal", "alike")]
    texts = [text for _, text in passages(toy, late=True)] + [e.blazon for e in toy.pictured()] + [q.text for q in data.questions(toy, asked, 1500, "vocabulary")]
    texts += [" " + " ".join(str(rng.randint(0, 99)) for _ in range(8)) for _ in range(3000)]
    texts += [f" {w}" for w in (*data.TINCTURES, *data.OUTLINES, *data.ORDINARIES, *data.CHARGES, *data.ACROSS, *data.DOWN, *data.SIZE)] * 50 + ["point to the each see look at all want : no not is for yes what this list repeat shows nothing found search failed again bad box more"] * 50
    return texts


class Vocabulary:
    """Byte-level BPE: any string can be spelt, unknown names included. 0..99 are single tokens, so a box is four tokens."""

    def __init__(self, text):
        """`text`: as `tokenizers` writes it down, and a checkpoint keeps it."""
        self.tokenizer, self.text = Tokenizer.from_str(text), text
        self.size, self.id = self.tokenizer.get_vocab_size(), {t: self.tokenizer.token_to_id(t) for t in TAGS}
        assert self.id["<pad>"] != self.id["<stop>"]  # both None: a tokenizer without our tags

    @classmethod
    def learn(cls, texts, size=1024):
        """Train the BPE on texts; `size` ids in all."""
        tokenizer = ByteLevelBPETokenizer(add_prefix_space=True)  # ' Ost' is one spelling wherever a name begins
        tokenizer.train_from_iterator(texts, size, min_frequency=0, show_progress=False, special_tokens=list(TAGS))
        return cls(tokenizer.to_str())

    @cached_property
    def pieces(self):
        """What the tokens spell, those that a name or a fact may hold: list of str."""
        spelt = [self.decode([i]) for i in range(len(TAGS), self.size)]
        return [p for p in spelt if p.isprintable() and p.strip() and not set(p) & set("<>|:,\ufffd")]

    def word(self, word):
        """The id of a word that is one token (numbers 0..99, tinctures, ...), as it stands behind a blank; of its first token otherwise."""
        return self.encode(f" {word}")[0]

    def encode(self, text):
        """Plain text, from a world or a user: < and > become ‹ and ›, so that a tag spelt in it can never become a control token; half a
        character, as a shell may hand over, becomes "?"."""
        return self.tokenizer.encode(text.replace("<", "‹").replace(">", "›").encode(errors="replace").decode()).ids if text else []

    def encode_turn(self, text):
        """Text written by the expert, in which tags are tags."""
        return self.tokenizer.encode(text).ids

    def decode(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


# ---------------------------------------------------------------------------------------------------------------- layers

RMSNorm = partial(nn.RMSNorm, eps=1e-6)


def rope_table(positions, head_width, base=10000.0):
    """cos and sin of the rotation angles: positions (B, T) -> two tensors (B, 1, T, C)."""
    inverse = base ** (-torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width)
    angles = (positions[..., None].float() * inverse)[:, None]  # (B, 1, T, C/2)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rotate(x, rope):
    """Rotary position embedding in the half-split convention of Llama: x (B, heads, T, C)."""
    cos, sin = rope
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


class Cache:
    """Keys and values of B growing rows, (layers, 2, B, K, slots, C). Token t of row b lives at slot t: `lengths` (B,) says how far a row
    has come. Slots beyond are garbage that nobody attends to, so rows may differ in length and need no padding mask. Slots are added as
    rows grow, up to `room`: to allot all at once is slower."""

    def __init__(self, config, rows, room, device, dtype):
        c, self.room = config, room
        self.kv = torch.zeros(c.layers, 2, rows, c.kv_heads, 0, c.width // c.heads, device=device, dtype=dtype)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.last = torch.zeros(rows, c.smear, c.width, device=device, dtype=dtype)  # embeddings of each row's last tokens, for `smear`

    def grow(self, upto, ahead=64):
        """Make sure of slots 0..upto-1."""
        if upto > self.kv.shape[4]:
            self.kv = F.pad(self.kv, (0, 0, 0, min(self.room, upto + ahead) - self.kv.shape[4]))

    def append(self, layer, k, v, positions, upto):
        """Write k, v (B, K, T, C) at `positions` (B, T); return all keys and values of slots 0..upto-1."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        for store, new in zip(self.kv[layer], (k, v)):
            store[rows, :, positions] = new.transpose(1, 2).to(store.dtype)  # (B, T, K, C)
        return self.kv[layer, 0, :, :, :upto], self.kv[layer, 1, :, :, :upto]

    def take(self, rows):
        """A copy of these rows (LongTensor; a row may occur several times: a prompt becomes a group)."""
        part = copy(self)
        part.kv = self.kv[:, :, rows, :, :int(self.lengths[rows].max())]  # the rest is garbage: not worth copying
        part.lengths, part.last = self.lengths[rows], self.last[rows]
        return part

    def put(self, rows, part):
        """Write the rows of another cache over these."""
        used = int(part.lengths.max())
        self.grow(used)
        self.kv[:, :, rows, :, :used] = part.kv[:, :, :, :, :used]
        self.lengths[rows], self.last[rows] = part.lengths, part.last


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head = c.heads, c.kv_heads, c.width // c.heads
        self.q_proj = nn.Linear(c.width, c.heads * self.head, bias=False)
        self.k_proj = nn.Linear(c.width, c.kv_heads * self.head, bias=False)
        self.v_proj = nn.Linear(c.width, c.kv_heads * self.head, bias=False)
        self.o_proj = nn.Linear(c.heads * self.head, c.width, bias=False)

    @torch.no_grad()
    def echo(self):
        """Half of what a head puts out is, to begin with, what it has read there (o_proj v_proj near the identity, as in trained models:
        Trockman & Kolter 2023, mimetic initialisation)."""
        v = self.v_proj.weight.unflatten(0, (self.kv_heads, 1, self.head)).expand(-1, self.heads // self.kv_heads, -1, -1)  # (K, H/K, C, D)
        self.o_proj.weight.copy_((self.o_proj.weight + v.flatten(0, 2).T) / 2**0.5)

    def forward(self, x, rope, mask, cache=None, layer=0, positions=None, lengths=None):
        """x (B, T, D) -> (B, T, D). Three ways. Neither `lengths` nor `cache`: causal. `lengths` (a list): packed, causal within each
        sequence. `cache`: the keys of earlier calls, too, as `mask` (B, 1, H/K*T, slots) allows, which is added to the scores."""
        B, T, _ = x.shape
        split = lambda y, n: y.view(B, T, n, self.head).transpose(1, 2)  # (B, T, n*C) -> (B, n, T, C)
        q = rotate(split(self.q_proj(x), self.heads), rope)
        k = rotate(split(self.k_proj(x), self.kv_heads), rope)
        v = split(self.v_proj(x), self.kv_heads)
        if cache is not None:
            k, v = cache.append(layer, k, v, positions, mask.shape[-1])
            q = q.reshape(B, self.kv_heads, -1, self.head)  # (B, H, T, C) -> (B, K, H/K*T, C): heads that share keys read them once
        if x.device.type == "cpu":  # there the backward pass of attention is half as fast in bfloat16 as in float32
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast(x.device.type, enabled=False):
            attend = partial(F.scaled_dot_product_attention, attn_mask=mask, is_causal=mask is None, enable_gqa=cache is None)
            parts = zip(*(y.split(lengths, 2) for y in (q, k, v))) if lengths else [(q, k, v)]  # packed: each sequence sees itself only
            out = torch.cat([attend(*part) for part in parts], 2)
        out = out.reshape(B, self.heads, T, self.head)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, H, T, C) -> (B, T, D)


class Block(nn.Module):
    """Llama's: x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, c):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(c.width), Attention(c)
        self.post_attention_layernorm = RMSNorm(c.width)
        self.gate_proj = nn.Linear(c.width, c.mlp, bias=False)
        self.up_proj = nn.Linear(c.width, c.mlp, bias=False)
        self.down_proj = nn.Linear(c.mlp, c.width, bias=False)

    def forward(self, x, *attention_args):
        x = x + self.self_attn(self.input_layernorm(x), *attention_args)
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class VisionBlock(nn.Module):
    """SigLIP's: LayerNorm, full attention, GELU MLP."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        B, P, W = x.shape
        q, k, v = self.qkv(self.layer_norm1(x)).view(B, P, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # 3 x (B, heads, P, C)
        x = x + self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, P, W))
        return x + self.fc2(F.gelu(self.fc1(self.layer_norm2(x)), approximate="tanh"))


def position_map(grid, width):
    """Where each patch is, (grid * grid, width): waves along x, then along y. Only a start: it is learnt on from there."""
    x, f = (torch.arange(grid)[:, None] + 0.5) / grid, torch.arange(1, width // 4 + 1)[None]
    waves = torch.cat([(torch.pi * x * f).sin() / f, (torch.pi * x * f).cos() / f], 1)  # (grid, width / 2)
    both = torch.cat([waves[None].expand(grid, -1, -1), waves[:, None].expand(-1, grid, -1)], -1)  # (grid, grid, width)
    return both.reshape(grid**2, width) / both.std()


class Vision(nn.Module):
    """The eyes. Pictures (B, 3, S, S), uint8 -> features (B, P, W) of every patch, and image tokens (B, N, D)."""

    def __init__(self, c):
        super().__init__()
        self.grid, self.shuffle = c.picture // c.patch, c.shuffle
        w = c.vit_width
        # the stem: three strided convolutions and a last one reach the same grid as one patch embedding
        stem = [(3, w // 4, 3, 2, 1), (w // 4, w // 2, 3, 2, 1), (w // 2, w, 3, 2, 1), (w, w, c.patch // 8, c.patch // 8)]
        convolutions = [f for sizes in stem for f in (nn.GELU(), nn.Conv2d(*sizes))][1:] if c.stem else None
        self.embed = nn.Sequential(*convolutions) if c.stem else nn.Conv2d(3, w, c.patch, c.patch)
        self.position = nn.Parameter(position_map(self.grid, w))
        self.blocks = nn.ModuleList(VisionBlock(w, c.vit_heads) for _ in range(c.vit_layers))
        self.norm = nn.LayerNorm(w)
        self.projector = nn.Linear(w * c.shuffle**2, c.width, bias=False)
        self.projector_norm = RMSNorm(c.width)  # fixes their length, which otherwise grows without end
        # loud, or what text-trained layers add to them would drown what they show (results/trials.md: pointing right in 55 % -> 92 %)
        nn.init.constant_(self.projector_norm.weight, 4.5)

    def forward(self, pictures):
        """Features of every patch (B, P, W), and the image tokens (B, N, D)."""
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
    """The VLM. `forward` gives final hidden states; `logits` turns those wanted into scores (most positions never need any)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = Vision(config)
        self.embed_tokens = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        # config.smear: how many words before; self.smear: the layer that mixes them in, or None
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
        elif isinstance(module, nn.Conv2d):  # PyTorch's own start made what a patch shows 180 times quieter than where it is
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)

    @property
    def device(self):
        return self.embed_tokens.weight.device

    def freeze_eyes(self, frozen=True):
        """Hold the vision encoder still, or (frozen=False) let it learn again; its projector always learns. Returns the policy. A still
        encoder needs no backward pass (two thirds of its cost), and what it has learnt cannot be unlearnt under the language model's
        gradient."""
        self.vision.requires_grad_(not frozen)
        self.vision.projector.requires_grad_(), self.vision.projector_norm.requires_grad_()
        return self

    def forward(self, ids, pictures=None, image_id=None, cache=None, valid=None, lengths=None):
        """Hidden states (B, T, D) of token ids (B, T).
        pictures: uint8 (as many as there are, 3, S, S); their tokens fill, in order, the positions where ids == image_id. cache: None (whole
        sequences, causal) or a Cache (ids continue its rows). valid: (B,) how many of T are real, default all. lengths: None, or a list:
        ids are one row in which sequences of these lengths stand one behind the other (`packed`); not with a cache.
        """
        B, T = ids.shape
        positions = torch.cat([torch.arange(n) for n in lengths or [T]]).to(ids.device).expand(B, T)  # from 0 in every sequence
        if cache is not None:
            positions = positions + cache.lengths[:, None]
        x = self.embed_tokens(ids)
        if self.smear:  # among words only: image tokens are put in afterwards, unmixed
            x = x + self.smear(self._before(x, positions, cache, valid))
        if pictures is not None and len(pictures):
            x = x.masked_scatter((ids == image_id)[..., None], self.vision(pictures)[1].to(x.dtype))
        mask = None
        if cache is not None:  # a query at position p sees slots 0..p: this alone hides every garbage slot
            # padding of a shorter row, or a row that has stopped, may point past the room; no real token does (prompts are short:
            # data.fits; turns: gog.rollout)
            positions = positions.clamp(max=cache.room - 1)
            upto = int(positions.max()) + 1
            cache.grow(upto)
            unseen = torch.arange(upto, device=ids.device) > positions[..., None]
            # (B, 1, H/K*T, upto): added to scores; made once for all layers
            mask = torch.where(unseen, float("-inf"), 0.0).repeat(1, self.config.heads // self.config.kv_heads, 1)[:, None]
        rope = rope_table(positions, self.config.width // self.config.heads)
        for i, block in enumerate(self.layers):
            x = block(x, rope, mask, cache, i, positions, lengths)
        if cache is not None:
            cache.lengths += T if valid is None else valid
        return self.norm(x)

    def _before(self, x, positions, cache, valid):
        """The embeddings before each position of x (B, T, D), nearest last: (B, T, smear * D); 0 before a sequence's first. The cache keeps
        the last `smear` embeddings of every row for the next call."""
        (B, T, D), n = x.shape, self.config.smear
        row = torch.cat([x.new_zeros(B, n, D) if cache is None else cache.last, x], 1)  # (B, n + T, D): position t stands at n + t
        if cache is not None:
            count = torch.full_like(cache.lengths, T) if valid is None else valid
            cache.last = row[torch.arange(B, device=x.device)[:, None], count[:, None] + torch.arange(n, device=x.device)]
        # packed: not those of the sequence in front
        return torch.cat([row[:, k:k + T] * (positions >= n - k)[..., None] for k in range(n)], -1)

    def logits(self, hidden):
        with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 would round a score of 16 to steps of 1/8
            return hidden.float() @ self.embed_tokens.weight.float().T  # tied: (..., D) -> (..., vocab)


@torch.no_grad()
def number_line(embedding, ids, waves=12):
    """Begin the embeddings (vocab, D) of the numbers 0..99 (their `ids`) on a smooth curve, so that what is learnt about 37 helps with
    36 and 38 (measured: loss of a coordinate 3.8 without, 3.2 with, after 120 steps)."""
    x, f = torch.arange(len(ids))[:, None] / len(ids), torch.arange(1, waves + 1)[None]
    curve = torch.cat([(torch.pi * x * f).sin() / f**0.5, (torch.pi * x * f).cos() / f**0.5], 1)  # (100, 2 * waves)
    curve = curve @ torch.linalg.qr(torch.randn(embedding.shape[1], 2 * waves))[0].T
    embedding[ids] = 0.9 * embedding.std() * (curve / curve.std()).to(embedding.device) + 0.3 * embedding[ids]


# -------------------------------------------------------------------------------------------------- batches to train on

def ignore_ctrl_c(_):
    """Ctrl-C reaches the drawing process, too: not its business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def stream(make, start, steps):
    """Batches make(start) .. make(steps - 1), made by one background process while the model trains. The data set is the range of step
    numbers; `collate_fn` makes each into its batch."""
    return DataLoader(range(start, steps), batch_size=None, num_workers=1, prefetch_factor=4, collate_fn=make, worker_init_fn=ignore_ctrl_c)


def micro_batches(items, lengths, budget):
    """Items (`lengths`: tokens of each), cut into lists of about `budget` tokens: those that end between the same two multiples of `budget`
    go together."""
    ends = list(itertools.accumulate(lengths))
    return [[items[i] for i in part] for _, part in itertools.groupby(range(len(ends)), lambda i: ends[i] // budget)]


def packed(trajectories, pad, device, step=128):
    """All trajectories in one row, one behind the other: ids (1, T), which of them are trained (1, T), the lengths, the pictures. Nothing
    is padding but a last sequence that fills the row up to a multiple of `step`: bfloat16 kernels are compiled for every new shape."""
    ids, trained = [i for t in trajectories for i in t.ids], [x for t in trajectories for x in t.trained]
    rest, pictures = -len(ids) % step, [p for t in trajectories for p in t.pictures]
    lengths = [len(t.ids) for t in trajectories] + [rest] * (rest > 0)
    shown = torch.from_numpy(np.stack(pictures)).to(device) if pictures else None
    return torch.tensor([ids + [pad] * rest], device=device), torch.tensor([trained + [False] * rest], device=device), lengths, shown


def autocast(device):
    """A context in which matrix products are taken in bfloat16, if the processor has units for that (then training is up to 1.3 times as
    fast); else it changes nothing. Enter it anew for every step: it remembers weights until it is left."""
    units = {"cpu": torch.cpu.get_capabilities().get("avx512_bf16", False), "cuda": torch.cuda.is_available() and torch.cuda.is_bf16_supported()}
    return torch.autocast(device, torch.bfloat16, enabled=units.get(device, False))


# -------------------------------------------------------------------------------------------------------------- sampling

def pick(logits, temperature, allowed, generator=None):
    """Sample one id a row from logits (B, vocab), and its log-probability under that same distribution.

    temperature 0 is greedy (log-probability at temperature 1). No top-k, no top-p: GRPO must score what was sampled (its ratio is 1
    before the first update). allowed: bool (B or 1, vocab), ids that may be sampled at all.
    """
    logits = logits.masked_fill(~allowed, float("-inf"))
    logp = F.log_softmax(logits.float() / (temperature or 1.0), -1)
    if temperature:  # where the running sum passes a random height (torch.multinomial draws a number for every id, which is slower)
        heights = logp.exp().cumsum(-1)
        drawn = torch.rand(len(logp), 1, device=logp.device, generator=generator) * heights[:, -1:]
        ids = torch.searchsorted(heights, drawn.clamp(max=heights[:, -1:] * (1 - 1e-6)), right=True)[:, 0]
    else:
        ids = logp.argmax(-1)
    return ids, logp.gather(1, ids[:, None])[:, 0]


# ------------------------------------------------------------------------------ several processes (torchrun), or just one
# Every process runs all of train.py; they divide what is in a batch (share), agree on every step (update), and only the first one speaks
# and writes.
# What calls `summed` or `gathered` (rollouts, steps, checkpoints) must be called by every process, equally often and in the same order.

def work_together(device):
    """Join the processes that torchrun has started: each has a GPU of its own, or its part of the cores."""
    torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    importlib.import_module("torch.distributed.nn")  # first: it keeps the group that it finds, whose threads would outlive the interpreter and, now and then, abort it
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    atexit.register(torch.distributed.destroy_process_group)
    if RANK:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8", errors="replace")


def share(items):
    """This process's part of what all do together: every PROCESSES-th of some items."""
    return items[RANK::PROCESSES]


def summed(x):
    """A tensor (summed in place) or a number, summed over all processes; none goes on before all have come here."""
    x = torch.as_tensor(x)
    if PROCESSES > 1:
        torch.distributed.all_reduce(x)
    return x


def gathered(mine):
    """The items whose shares the processes hold, in their order."""
    shares = [mine] * PROCESSES
    if PROCESSES > 1:
        torch.distributed.all_gather_object(shares, mine)
    return [x for row in itertools.zip_longest(*shares, fillvalue=None) for x in row if x is not None]


def torch_rng(device, *seed):
    """Random numbers that depend on a seed (any words and numbers) and the process: nothing of them needs to be kept for --resume."""
    return torch.Generator(device).manual_seed(checksum("/".join(map(str, (*seed, RANK)))))


# ------------------------------------------------------------------------------------------------------------ optimiser

def orthogonalise(g, steps=5):
    """Newton-Schulz: push the singular values of a stack of matrices (N, rows, cols) towards 1, keeping the singular vectors."""
    a, b, c = 3.4445, -4.7750, 2.0315  # of the quintic a x + b x^3 + c x^5 (Jordan et al. 2024)
    x = (g.transpose(1, 2) if g.shape[1] > g.shape[2] else g) / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    with autocast(g.device.type):  # the method was made for bfloat16
        for _ in range(steps):
            s = x @ x.transpose(1, 2)
            x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)  # a x + (b s + c s^2) x
    return (x.transpose(1, 2) if g.shape[1] > g.shape[2] else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024); update scaled to AdamW's size. Hidden matrices only, and convolutions, whose kernels
    (out, in, k, k) are taken as matrices (out, in * k * k).

    torch.optim.Muon is the same rule, but works in bfloat16 everywhere and one matrix at a time: 4.7 s a step for `nano` on a CPU without
    bf16 units, against 0.06 s for this one, which stacks matrices of one shape.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                shapes.setdefault(p.flatten(1).shape, []).append((p, p.grad.lerp(m, group["momentum"]).flatten(1)))  # Nesterov
            for shape, pairs in shapes.items():
                params, updates = zip(*pairs)
                scale = 0.2 * max(shape) ** 0.5
                for p, u in zip(params, orthogonalise(torch.stack(updates))):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u.view_as(p), alpha=-group["lr"] * scale)


def optimisers(named, muon_lr, adam_lr):
    """Muon for the matrices and convolutions among (name, parameter) pairs, AdamW for the rest: two optimisers."""
    matrices, rest = [], []
    for name, p in named:
        (matrices if p.dim() in (2, 4) and "embed_tokens" not in name and "position" not in name else rest).append(p)
    return [Muon(matrices, dict(lr=muon_lr, momentum=0.95, weight_decay=0.01)), torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0)]


def lr_factor(step, steps, warmup=30, decay=0.9):
    """Learning-rate factor in 0..1: linear warm-up, linear decay to 0 over the last `decay` of the run, flat in between (only where the run
    is long: SFT's 180 steps peak at 0.94). Most of what the base model learns, it learns while the rate falls."""
    return min(1.0, (step + 1) / warmup, (steps - step) / max(1, decay * steps))


def set_lr(opts, factor):
    """Every optimiser's learning rate: `factor` times the one it was made with. Returns the first."""
    for group in (group for opt in opts for group in opt.param_groups):
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return opts[0].param_groups[0]["lr"]


class NotFinite(ArithmeticError):
    """A loss, a gradient or a weight that is no number: nothing has been changed by it. Raised with the batch of trajectories that gave it,
    where there is one."""


def parameters(opts):
    return [p for opt in opts for group in opt.param_groups for p in group["params"]]


def flat_gradient(opts):
    """The gradient of all parameters of these optimisers, summed over the processes, as one vector; 0 where there is none."""
    return summed(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters(opts)]))


def update(module, opts, batch=(), loss=0.0, clip=1.0):
    """One step of the optimisers on the gradients of `batch`, those of `module` clipped to norm `clip`; returns the norm before that.
    NotFinite if that, or the loss, is no number. Of several processes each has the gradient of its share of a batch: their sum is that of
    the batch, and all take the same step."""
    if PROCESSES > 1:
        for p, g in zip(parameters(opts), flat_gradient(opts).split([p.numel() for p in parameters(opts)])):
            p.grad = g.view_as(p) if g.any() else None  # None: no loss depends on it, so momentum must not move it
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), clip).item()
    if not math.isfinite(norm + loss):
        raise NotFinite(gathered(batch))
    for o in opts:
        o.step()
        o.zero_grad(set_to_none=True)
    return norm


# ---------------------------------------------------------------------------------------------------------- save and load

class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the way out."""


def write(path, tensors, meta):
    """Tensors and `meta` (strings) in one safetensors file. OSError where the disk is full; NotFinite, with the file before left as it was,
    where a number has become none."""
    if not all(t.isfinite().all() for t in tensors.values()):
        raise NotFinite(())
    atomic(path, lambda p: p.write_bytes(to_bytes({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, meta)))


def save(model, path, **meta):
    """Weights, config and `meta` (strings) in one safetensors file."""
    write(path, model.state_dict(), {"config": json.dumps(asdict(model.config)), **meta})


def read(path):
    """The strings and the tensors of a safetensors file."""
    with safe_open(path, "pt") as f:
        return f.metadata() or {}, {k: f.get_tensor(k).clone() for k in f.keys()}  # copies: Windows replaces no file that is still mapped


def load(path, device="cpu"):
    """The policy that `save` wrote, its eyes held still, and the vocabulary that it was trained with. Raises CheckpointError if the file is
    missing, broken, or of another shape."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such checkpoint. Train one first: python train.py --stage sft")
    try:
        meta, weights = read(path)
        given, v = json.loads(meta["config"]), Vocabulary(meta["tokenizer"])
        model = Policy(ModelConfig(**{f.name: given[f.name] for f in fields(ModelConfig)}))
        model.load_state_dict(weights)
        if v.size != model.config.vocab:
            raise ValueError("a tokenizer of another size")
    except Exception as e:  # a header may hold anything, and `tokenizers` knows no error of its own
        raise CheckpointError(f"{path}: not a readable safetensors file, or weights of another shape or version ({repr(e).splitlines()[0][:200]}). Delete it and train again") from None
    return model.to(device).freeze_eyes(), v


def save_state(path, modules, opts, **meta):
    """All that training goes on from: modules, optimisers and `meta` (strings), in one safetensors file, without pickle."""
    tensors = {f"module.{i}.{k}": v for i, m in enumerate(modules) for k, v in m.state_dict().items()}
    states = [(f"optimiser.{o}.{i}", state) for o, opt in enumerate(opts) for i, state in opt.state_dict()["state"].items()]
    tensors |= {f"{of}.{k}": v for of, state in states for k, v in state.items()}
    write(path, tensors, meta)


def load_state(path, modules, opts):
    """Bring modules and optimisers to the state of `save_state`; returns its `meta`."""
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
        raise CheckpointError(f"{path}: cannot be resumed ({str(e).splitlines()[0]}). Delete it to start this stage anew") from None
    return meta
