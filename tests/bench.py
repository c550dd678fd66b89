"""Speed compared with what a user would choose instead, and with what the machine can do. Run by hand: python
tests/bench.py [PART ...]

Every part does the same work with our code and with a peer, in one process and in turn (A B A B ...). It prints the
median seconds of each and their ratio (above 1: ours is faster). Ours computes as in training, with products in
bfloat16 where the processor has units for it (model.autocast); a peer is timed with and without, and the faster time
counts. Peers are optional (pip install transformers faiss-cpu scikit-learn); missing ones are listed.

The peer of the policy is Llama from transformers with our weights (same logits: tests/test_model.py). Both sides run
without `smear` and with a linear patch embedding, as Llama has neither `smear` nor a stem; both use the same vision
encoder. In rollouts, both are forced to sample the tokens of the expert, so that turns, tool calls and stops are the
same; all logits are still computed. --preset small: the larger policy, without this peer. Writes results/bench.csv."""
import argparse
import importlib.util
import os
import random
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import gog  # noqa: E402
import grpo  # noqa: E402
import tools  # noqa: E402
import train  # noqa: E402
from model import PRESETS, Cache, ModelConfig, Policy, Vocabulary, autocast, corpus, optimisers  # noqa: E402
from conftest import llama_twin  # noqa: E402
from tools import TextIndex, describe, write_rows  # noqa: E402


def peer(module):
    """Is this optional package installed?"""
    return importlib.util.find_spec(module) is not None


class Bench:
    """A small heraldry world, a policy, and its twin in transformers."""

    def __init__(self, preset):
        torch.manual_seed(0)
        torch.set_flush_denormal(True)
        self.world = data.heraldry(0, 1000)
        self.v = Vocabulary.learn(corpus())
        plain, self.preset = dict(smear=0, stem=False) if preset == "nano" else {}, preset  # as in the twin
        self.policy = Policy(ModelConfig(**{**PRESETS[preset], **plain, "vocab": self.v.size})).freeze_eyes()
        self.env = tools.Environment(self.v, tools.make_toolbox(self.world), self.policy.config)
        self.questions = data.questions(self.world, data.RL_MIX, 64, "bench")
        self.demos = gog.play_scripts(self.env, self.questions, [gog.expert(q, random.Random(0)) for q in self.questions])
        self.llama = self.twin() if peer("transformers") and plain else None

    def twin(self):
        import transformers
        transformers.logging.set_verbosity_error()
        return llama_twin(transformers, self.policy, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None, pad_token_id=None)

    # every part returns (what is counted, how many of them, our function, name of the peer, its function or None)

    def image_index(self):
        index, pictures = self.env.toolbox.image_index, [e.picture(80) for e in self.world.pictured()[:256]]
        other = None
        if peer("faiss"):
            import faiss
            flat = faiss.IndexFlatIP(tools.WIDTH)
            flat.add(np.concatenate(index.blocks))
            other = lambda: flat.search(describe(pictures), 5)
        return "queries", len(pictures), lambda: index.search(pictures, 5), "faiss IndexFlatIP on the same descriptors", other

    def image_index_million(self, rows=1_000_000):
        """The exact search alone, over a million rows (111,111 entities in nine framings each), with descriptors
        computed beforehand. Ours returns the best five entities, the peer the best five rows."""
        index, lots, dot = tools.ImageIndex(()), np.random.default_rng(0), Image.new("RGB", (1, 1))
        index.entries = [(i, i) for i in range(rows // len(tools.FRAMINGS))]
        index.blocks = [tools._unit(lots.standard_normal((len(part) * len(tools.FRAMINGS), tools.WIDTH), np.float32)) for part in (index.entries[at:at + tools.BLOCK] for at in range(0, len(index.entries), tools.BLOCK))]
        seen, other = tools._unit(lots.standard_normal((256, tools.WIDTH), np.float32)), None

        def ours():
            with mock.patch.multiple(tools, describe=lambda views: seen[:len(views)], salient=lambda picture: None):
                return index.search([dot] * len(seen), 5)

        if peer("faiss"):
            import faiss
            flat = faiss.IndexFlatIP(tools.WIDTH)
            for block in index.blocks:
                flat.add(block)
            other = lambda: flat.search(seen, 5)
        return "queries", len(seen), ours, "faiss IndexFlatIP", other

    def text_index(self):
        pages = tools.passages(self.world)
        index = TextIndex(pages)
        queries = [f"{e.name} ruler" for e in self.world.pictured()[:256]]
        other = None
        if peer("sklearn"):
            from sklearn.feature_extraction.text import TfidfVectorizer
            tfidf = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4))
            rows = tfidf.fit_transform([text for _, text in pages])
            other = lambda: [s.indices[np.argsort(-s.data)[:2]] for s in tfidf.transform(queries) @ rows.T]
        return "queries", len(queries), lambda: index.search(queries, 2), "scikit-learn TF-IDF", other

    def data_generation(self):
        asked = data.questions(self.world, data.RL_MIX, 64, "bench/pictures")
        return "questions with picture", 64, lambda: [data._drawn.cache_clear(), data.questions(self.world, data.RL_MIX, 64, "bench/data"), [tools.to_array(q.scene.picture(), 128) for q in asked]], "", None

    def prompts(self, rows, length=60):
        """Random ids (rows, length) with the placeholders of one picture near the start, and the pictures."""
        ids = torch.randint(120, self.v.size, (rows, length))
        ids[:, 1:1 + len(self.env.image_ids)] = self.env.image_ids[0]
        return ids, torch.randint(0, 255, (rows, 3, 128, 128), dtype=torch.uint8)

    def embed(self, ids, pictures):
        x = self.llama.model.embed_tokens(ids)
        return x.masked_scatter((ids == self.env.image_ids[0])[..., None], self.policy.vision(pictures)[1])

    def prefill(self):
        ids, pictures = self.prompts(128)

        def ours():
            with torch.no_grad():
                self.policy(ids, pictures, self.env.image_ids[0], Cache(self.policy.config, 128, 200, self.policy.device))

        def theirs():
            with torch.no_grad():
                self.llama.model(inputs_embeds=self.embed(ids, pictures), use_cache=True)

        return "tokens", ids.numel(), ours, "transformers", theirs if self.llama else None

    def decode(self, rows=128, new=32):
        ids, pictures = self.prompts(rows)

        def ours():
            with torch.no_grad():
                cache = Cache(self.policy.config, rows, 200, self.policy.device)
                hidden = self.policy(ids, pictures, self.env.image_ids[0], cache)[:, -1]
                for _ in range(new):
                    hidden = self.policy(self.policy.logits(hidden).argmax(-1)[:, None], cache=cache)[:, 0]

        theirs = lambda: self.llama.generate(inputs_embeds=self.embed(ids, pictures).detach(), attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                                             do_sample=False, pad_token_id=0)
        return "tokens", rows * new, ours, "transformers generate", theirs if self.llama else None

    def rollout(self):
        return "questions", len(self.questions), self.our_rollout, "transformers generate, the conversation read anew at every turn", self.their_rollout if self.llama else None

    def our_rollout(self):
        """gog.rollout, with logits changed so that it samples the tokens of the expert."""
        scripts = [t.ids + [0] for t in self.demos]

        class Tagged(Cache):  # knows which trajectory a row belongs to
            def __init__(self, *args):
                super().__init__(*args)
                self.tags = torch.arange(len(self.lengths))
                Tagged.current = self

            def take(self, rows):
                part = super().take(rows)
                part.tags, Tagged.current = self.tags[rows], part
                return part

            def put(self, rows, part):  # the smaller cache is written back: go on with the larger one
                super().put(rows, part)
                Tagged.current = self

        def forced(hidden):
            now = Tagged.current
            wanted = torch.tensor([scripts[t][min(n, len(scripts[t]) - 1)] for t, n in zip(now.tags.tolist(), now.lengths.tolist())])
            return logits(hidden).scatter(1, wanted[:, None], 1e4)

        logits, self.policy.logits, gog.Cache = self.policy.logits, forced, Tagged
        try:
            tries = gog.rollout(self.policy, self.env, self.questions, temperature=1.0, generator=torch.Generator().manual_seed(0))
        finally:
            del self.policy.logits
            gog.Cache = Cache
        assert [t.ids for t in tries] == [t.ids for t in self.demos]

    def their_rollout(self):
        """The loop that one would write with transformers: pad on the left, generate a turn, run the tools, start again
        with the longer conversation."""
        from transformers import LogitsProcessor
        v, env, stop = self.v, self.env, self.v.id["<stop>"]
        scenes = [q.scene.picture() for q in self.questions]
        done = [env.prompt(q, tools.to_array(s, env.side)) for q, s in zip(self.questions, scenes)]
        live = list(range(len(done)))

        class Forced(LogitsProcessor):
            def __call__(self, ids, scores):
                at = [self.scripts[row][min(ids.shape[1], len(self.scripts[row]) - 1)] for row in range(len(ids))]
                return scores.scatter(1, torch.tensor(at)[:, None], 1e4)

        for _ in range(gog.MAX_TURNS):
            longest, force = max(len(done[i].ids) for i in live), Forced()
            force.scripts = [self.demos[i].ids[len(done[i].ids):] + [0] for i in live]
            ids = torch.tensor([[v.id["<pad>"]] * (longest - len(done[i].ids)) + done[i].ids for i in live])
            pictures = torch.from_numpy(np.stack([p for i in live for p in done[i].pictures]))
            with torch.no_grad():
                out = self.llama.generate(inputs_embeds=self.embed(ids, pictures), attention_mask=(ids != v.id["<pad>"]).long(), max_new_tokens=gog.TURN_TOKENS,
                                          do_sample=True, top_k=0, eos_token_id=stop, pad_token_id=v.id["<pad>"], logits_processor=[force])
            said = [row[:row.index(stop) + 1] for row in out.tolist()]
            for i, turn in zip(live, said):
                done[i].act(turn)
            env.step([done[i] for i in live], [tools.parse(v.decode(turn[:-1])) for turn in said], [scenes[i] for i in live])
            live = [i for i in live if done[i].answer is None]
            if not live:
                break
        assert [t.ids for t in done] == [t.ids for t in self.demos]

    def see_step(self):
        policy = Policy(ModelConfig(**{**PRESETS[self.preset], "vocab": self.v.size}))  # with the convolutional stem
        c = policy.config
        heads = torch.nn.ModuleList(torch.nn.Linear(w, 4 + sum(map(len, grpo.PARTS.values()))) for w in (c.vit_width, c.width))
        batch = [torch.from_numpy(x) for x in grpo.labelled_pictures(c, 0, 12, 0)]
        opts = [*optimisers(policy.vision.named_parameters(), 1e-6, 1e-6, newton_schulz=7), torch.optim.AdamW([*heads.parameters(), policy.embed_tokens.weight], 1e-6)]
        return "pictures", 12, lambda: grpo.see_step(policy, heads, batch, self.v, opts), "", None

    def sft_step(self):
        batch = self.demos[:32]
        opt, their_opt = (torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-6) for m in (self.policy, self.llama or self.policy))
        ours = lambda: grpo.supervised_step(self.policy, self.env, batch, [opt])

        def theirs():
            ids, mask, trained, pictures = self.padded(batch)
            labels = ids.masked_fill(~trained, -100)
            self.llama(inputs_embeds=self.embed(ids, pictures), attention_mask=mask, labels=labels).loss.backward()
            grpo.update(self.llama, [their_opt])

        return "trained tokens", sum(sum(t.trained) for t in batch), ours, "transformers, one padded batch", theirs if self.llama else None

    def grpo_step(self):
        batch, advantages = self.demos[:32], torch.linspace(-1, 1, 32)
        for t in batch:
            t.logprobs = [-0.1 * m for m in t.trained]
        opt, their_opt = (torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-6) for m in (self.policy, self.llama or self.policy))
        flags = train.Args(temperature=1.0)
        ours = lambda: grpo.grpo_step(self.policy, None, self.env, batch, advantages, [opt], flags)

        def theirs():
            ids, mask, trained, pictures = self.padded(batch)
            logp = self.llama(inputs_embeds=self.embed(ids, pictures), attention_mask=mask).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
            ratio, a = (logp + 0.1).exp(), advantages[:, None]
            loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)[trained[:, 1:]].mean()
            loss.backward()
            grpo.update(self.llama, [their_opt])

        return "trained tokens", sum(sum(t.trained) for t in batch), ours, "transformers, one padded batch", theirs if self.llama else None

    def padded(self, batch):
        longest = max(len(t.ids) for t in batch)
        fill = lambda rows, value: torch.tensor([list(r) + [value] * (longest - len(r)) for r in rows])
        ids = fill([t.ids for t in batch], 0)
        return ids, fill([[1] * len(t.ids) for t in batch], 0), fill([t.trained for t in batch], False), torch.from_numpy(np.stack([p for t in batch for p in t.pictures]))


def clock(work, rounded=False):
    """Seconds that `work` takes; `rounded`: within model.autocast."""
    began = time.perf_counter()
    with autocast("cpu") if rounded else nullcontext():
        work()
    return time.perf_counter() - began


def limits():
    """The best that this machine reaches: float32 matrix products, and copies in memory."""
    a, b, c, d, big = torch.randn(2048, 2048), torch.randn(2048, 2048), torch.randn(1000, 192), torch.randn(192, 512), torch.randn(32 << 20)
    best = lambda work, n=7: min(clock(work) for _ in range(n))
    return [("matmul 2048 x 2048 x 2048", f"{2 * 2048**3 / best(lambda: a @ b) / 1e9:.0f} GFLOP/s"),
            ("matmul 1000 x 192 x 512, a hundred", f"{100 * 2 * 1000 * 192 * 512 / best(lambda: [c @ d for _ in range(100)]) / 1e9:.0f} GFLOP/s"),
            ("memory, read and written", f"{2 * big.numel() * 4 / best(lambda: big.clone()) / 1e9:.1f} GB/s")]


PARTS = ("image_index", "image_index_million", "text_index", "data_generation", "prefill", "decode", "rollout", "see_step", "sft_step", "grpo_step")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5), parser.add_argument("--out", default="results/bench.csv"), parser.add_argument("--preset", default="nano", choices=("nano", "small"))
    a = parser.parse_args()
    if unknown := set(a.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    print(f"{len(a.parts or PARTS)} parts, {a.rounds} rounds each, on {torch.get_num_threads()} threads of {os.cpu_count()} cores")
    for name, value in limits():
        print(f"{name:<38}{value}")
    missing = [m for m in ("transformers", "faiss", "sklearn") if not peer(m)]
    print(f"missing peers: {', '.join(missing) or 'none'}\n{'':<20}{'ours, s':>10}{'peer, s':>10}{'ratio':>8}")
    bench, rows = Bench(a.preset), []
    for part in a.parts or PARTS:
        unit, n, ours, name, theirs = getattr(bench, part)()
        clock(ours, True), theirs and (clock(theirs), clock(theirs, True))  # warm-up
        times = [(clock(ours, True), *(clock(theirs, rounded) if theirs else float("nan") for rounded in (False, True))) for _ in range(a.rounds)]
        mine, *others = np.median(times, 0)
        other = min(others)
        print(f"{part:<20}{mine:10.4f}{other:10.4f}{other / mine:8.2f}   {n / mine:,.0f} {unit} a second" + (f" (peer: {name})" if theirs else ""))
        rows.append(dict(what=part, ours=f"{mine:.5f}", peer=f"{other:.5f}" if theirs else "", peer_name=name if theirs else "", ratio=f"{other / mine:.3f}" if theirs else "",
                         unit=f"s for {n} {unit}", device=f"cpu, {torch.get_num_threads()} threads", preset=a.preset, rounds=a.rounds))
    write_rows(Path(a.out), rows, [*rows[0]], ("what", "preset", "device"))


if __name__ == "__main__":
    main()
