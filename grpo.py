"""Complexity-adaptive reinforcement learning: reward, group advantage, clipped loss, pass-rate levels.

From the paper: GRPO with r = (1 - lambda) r_acc + lambda r_fmt; the SFT model's pass rate sorts the questions; Level 1 is about
    50 %, Level 2 below 50 %; the final model trains on Level 2 only.
Here instead, numbered:
  1. Exact match for r_acc (the paper: LLM judge). lambda = 0.1, as its peers use; the paper prints no value.
  2. A group whose answers are all right or all wrong has no advantage and leaves loss and denominator; it is counted as dead.
     Groups are judged on accuracy, not reward: with division by the standard deviation a group that differs only in format would
     turn lambda = 0.1 into a full +-1.
  3. One update a batch, so the ratio is 1 and the clip never binds, unless `epochs` > 1 (the loss is the general one).
  4. The loss hovers at 0 however well it goes: advantages of a group sum to 0. Watch accuracy and entropy instead.
  5. `adaptive`: questions are drawn by their current pass rate p, with weight p(1-p): re-scored while the policy changes.

Alphabet: Q questions, G rollouts a question (the group), M trained tokens.
"""
import random
from dataclasses import dataclass, field

import torch


def reward(correct, well_formed, lam=0.1):
    """r = (1 - lambda) r_acc + lambda r_fmt, in [0, 1]. r_acc: exact match; r_fmt: every turn well-formed, and it ends in an answer."""
    return (1 - lam) * float(correct) + lam * float(well_formed)


def group_advantages(rewards, correct, normalise="std"):
    """Advantages (Q, G) of rewards (Q, G), and which groups are alive (Q,): those with both right and wrong answers.

    A = (r - mean) / std over the group ("std", the paper) or r - mean ("mean": an easy or hard question weighs no more than another).
    Dead groups get exactly 0; they are found by max == min, since a standard deviation of equal floats need not be 0.
    """
    alive = correct.any(1) & ~correct.all(1)
    centred = rewards - rewards.mean(1, keepdim=True)
    if normalise == "std":
        centred = centred / rewards.std(1, keepdim=True).clamp_min(1e-6)
    return torch.where(alive[:, None], centred, torch.zeros_like(centred)), alive


def policy_loss(logp, old_logp, advantage, low=0.2, high=0.2, reference=None, beta=0.0):
    """Sum over tokens (M,) of -min(ratio A, clip(ratio, 1 - low, 1 + high) A) + beta KL; divide by the update's token count outside.

    ratio = exp(logp - old_logp); KL to a reference policy by the k3 estimator, exp(d) - d - 1 >= 0 with d = reference - logp.
    Also returns how many tokens were clipped and the summed KL.
    """
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage).sum()
    kl = torch.zeros((), device=logp.device)
    if reference is not None:
        d = reference - logp
        kl = (d.exp() - d - 1).sum()
    return loss + beta * kl, ((ratio - clipped).abs() > 0).sum().item(), kl.item()


# ----------------------------------------------------------------------------------------------------------- curriculum

def level(p):
    """Complexity level of a pass rate p in [0, 1]: 0 easy (above 1/2), 1 about a half, 2 hard (below 1/2, the paper trains on these)."""
    return 2 if p < 0.5 else 1 if p <= 0.625 else 0


@dataclass
class Curriculum:
    """Which question comes next. mode: "level1", "level2", "all", "learnable" (0 < p < 1/2) or "adaptive"."""
    pass_rates: list
    mode: str = "level2"
    seed: int = 0
    rng: random.Random = None
    queue: list = field(default_factory=list)

    def __post_init__(self):
        self.rng = self.rng or random.Random(self.seed)
        wanted = {"level1": lambda p: level(p) == 1, "level2": lambda p: level(p) == 2, "learnable": lambda p: 0 < p < 0.5}
        keep = wanted.get(self.mode, lambda p: True)
        self.pool = [i for i, p in enumerate(self.pass_rates) if keep(p)]
        if not self.pool:
            raise ValueError(f"no question is left for curriculum {self.mode!r}: use --curriculum all")

    def draw(self, n):
        """Indices of the next n questions: reshuffled passes over the pool, or by lot with weight p(1-p) when adaptive."""
        if self.mode == "adaptive":
            return self.rng.choices(self.pool, [0.02 + self.pass_rates[i] * (1 - self.pass_rates[i]) for i in self.pool], k=n)
        while len(self.queue) < n:
            self.queue += self.rng.sample(self.pool, len(self.pool))
        taken, self.queue = self.queue[:n], self.queue[n:]
        return taken

    def seen(self, indices, rates, momentum=0.5):
        """Re-score questions by the rollouts just made: an exponential mean of the pass rate."""
        for i, p in zip(indices, rates):
            self.pass_rates[i] += (1 - momentum) * (p - self.pass_rates[i])
