"""Time and peak memory of an audit of 32K tokens on this CPU: a random 4-layer Qwen3.5 of the 0.8B model's width.

python recipes/audit_memory.py [tokens]
"""

import json
import resource
import sys
import time

import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

import topmass


def main() -> None:
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 32768
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=248320,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_value_heads=16,
        tie_word_embeddings=True,
    )
    model = Qwen3_5ForCausalLM(config).eval()
    ids = torch.randint(0, config.vocab_size, (1, tokens))
    start = time.perf_counter()
    result = topmass.audit(model, ids, budgets=(256, 2048), progress=lambda *p: print(*p, file=sys.stderr, flush=True))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    mass = {b: result.mean("retained_mass_mean", layer=3, config=f"oracle b={b} q1 k1 layer") for b in (256, 2048)}
    print(json.dumps({"tokens": tokens, "seconds": round(seconds), "peak_gib": round(peak, 2), "retained_mass": mass}))


if __name__ == "__main__":
    main()
