"""Tensor parallelism: every rank selects the same keys, so the tokens are those of one device."""

from vllm_tiny import make, prompt

PROMPTS = [prompt(n, seed) for seed, n in enumerate((300, 129, 40))]
SPARSE = {"budget": 48, "sink": 2, "window": 4, "decode": "sparse"}


def test_two_ranks_give_the_tokens_of_one(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    model = make(tmp_path, "qwen3")
    receipts = tmp_path / "receipts.jsonl"
    expected = [model.generate(p, **SPARSE) for p in PROMPTS]
    two = engine(
        model,
        {**SPARSE, "receipts": str(receipts)},
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        max_num_batched_tokens=128,
        max_num_seqs=8,
    )
    assert two.run(*PROMPTS) == expected
    two.run(PROMPTS[2], tokens=1)
    # one rank of two writes them
    assert len(receipts.read_text().splitlines()) == len(PROMPTS)
