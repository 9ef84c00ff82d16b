"""The support rule of docs/concepts/support-rule.md, written a second time: float64, plain loops, nothing from `topmass`.

Only tests use it. Sizes up to about a hundred positions are comfortable.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch

# scores nearer than this are one tie: two float64 implementations sum in different orders
TIE = 1e-13


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What is selected; `budget` as users write it (`48`, `"25%"`, `"mass:0.9<=40"`)."""

    budget: int | str
    q_block: int = 1
    kv_block: int = 1
    share: str = "layer"
    pool: str = "sum"
    sink: int = 0
    window: int = 1
    dense_below: int = 0

    @property
    def forced_sink(self) -> int:
        return math.ceil(self.sink / self.kv_block) * self.kv_block

    def groups_taken(self, budget: int) -> int:
        near = max(self.window + self.q_block - 1, 0)
        return (budget - self.forced_sink - near - (self.kv_block - 1)) // self.kv_block

    def smallest_budget(self) -> int:
        budget = 1
        while self.groups_taken(budget) < 1:
            budget += 1
        return budget

    def tokens(self, t0: int) -> int:
        """Budget of the block that starts at `t0`; the cap of a mass budget."""
        if isinstance(self.budget, int):
            return self.budget
        if self.budget.startswith("mass:"):
            return int(self.budget.split("<=")[1])
        percent = Fraction(self.budget.rstrip("%"))
        return max(self.smallest_budget(), math.ceil(percent / 100 * (t0 + self.q_block)))

    def mass(self) -> float | None:
        if isinstance(self.budget, str) and self.budget.startswith("mass:"):
            return float(self.budget.removeprefix("mass:").split("<=")[0])
        return None


def probabilities(q, k, *, scale=None, softcap=None, sinks=None):
    """The model's own attention, `[batch, q_heads, q_len, kv_len]`; rows lack the mass of a learned sink."""
    b, q_len, h, d = q.shape
    kv_len, hk = k.shape[1:3]
    p = torch.zeros(b, h, q_len, kv_len, dtype=torch.float64)
    for i in range(b):
        for head in range(h):
            for row in range(q_len):
                visible = kv_len - q_len + row + 1
                logits = k[i, :visible, head // (h // hk)].double() @ q[i, row, head].double()
                logits = logits * (d**-0.5 if scale is None else scale)
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                if sinks is not None:
                    logits = torch.cat([logits, sinks[head : head + 1].double()])
                p[i, head, row, :visible] = torch.softmax(logits, 0)[:visible]
    return p


def support(q, k, rule: Rule, *, scale=None, softcap=None, sinks=None, p=None):
    """Keys read, true or false, `[batch, q_heads, q_len, kv_len]`; queries are the last of the keys' positions."""
    b, q_len, h, _ = q.shape
    kv_len, hk = k.shape[1:3]
    p = probabilities(q, k, scale=scale, softcap=softcap, sinks=sinks) if p is None else p
    start = kv_len - q_len
    teams = {
        "layer": [list(range(h))],
        "kv_head": [list(range(n * (h // hk), (n + 1) * (h // hk))) for n in range(hk)],
        "q_head": [[n] for n in range(h)],
    }[rule.share]
    out = torch.zeros(b, h, q_len, kv_len, dtype=torch.bool)
    for i in range(b):
        for team in teams:
            shared = torch.stack([p[i, head] for head in team]).mean(0)
            for t0 in range(start // rule.q_block * rule.q_block, kv_len, rule.q_block):
                block = [t for t in range(t0, t0 + rule.q_block) if start <= t < kv_len]
                scores = torch.stack([shared[t - start] for t in block]).mean(0)
                groups = _choose(scores.tolist(), rule, t0)
                for t in block:
                    keys = [s for s in range(t + 1) if _reads(s, t, t0, groups, rule)]
                    for head in team:
                        out[i, head, t - start, keys] = True
    return out


def _window_start(rule: Rule, t: int, t0: int) -> int:
    return t + 1 if rule.window == 0 else rule.kv_block * (max(t0 - rule.window + 1, 0) // rule.kv_block)


def _reads(key: int, t: int, t0: int, groups: set[int], rule: Rule) -> bool:
    dense = rule.dense_below if rule.mass() is not None else max(rule.tokens(t0), rule.dense_below)
    if t + 1 <= dense:
        return True
    return key < rule.forced_sink or key >= _window_start(rule, t, t0) or key // rule.kv_block in groups


def _choose(scores: list[float], rule: Rule, t0: int) -> set[int]:
    r = rule.kv_block
    stop = _window_start(rule, t0, t0)
    candidates = [j for j in range(len(scores) // r) if rule.forced_sink <= j * r and (j + 1) * r <= stop]
    total = {j: sum(scores[j * r : (j + 1) * r]) for j in candidates}
    score = total if rule.pool == "sum" else {j: max(scores[j * r : (j + 1) * r]) for j in candidates}
    wanted = min(rule.groups_taken(rule.tokens(t0)), len(candidates))
    chosen: list[int] = []
    held = 1.0 - sum(total.values())
    while len(chosen) < wanted and (rule.mass() is None or held < rule.mass()):
        left = [j for j in candidates if j not in chosen]
        best = max(score[j] for j in left)
        taken = min(j for j in left if score[j] >= best - TIE)
        chosen.append(taken)
        held += total[taken]
    return set(chosen)


def attend(q, k, v, mask, *, scale=None, softcap=None, sinks=None):
    """Softmax attention over the keys that `mask` allows, `[batch, q_len, q_heads, v_dim]`."""
    b, q_len, h, d = q.shape
    hk = k.shape[2]
    out = torch.zeros(b, q_len, h, v.shape[-1], dtype=torch.float64)
    for i in range(b):
        for head in range(h):
            kv_head = head // (h // hk)
            for row in range(q_len):
                keys = mask[i, head, row].nonzero().flatten()
                logits = k[i, keys, kv_head].double() @ q[i, row, head].double() * (d**-0.5 if scale is None else scale)
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                if sinks is not None:
                    logits = torch.cat([logits, sinks[head : head + 1].double()])
                weights = torch.softmax(logits, 0)[: len(keys)]
                out[i, row, head] = weights @ v[i, keys, kv_head].double()
    return out
