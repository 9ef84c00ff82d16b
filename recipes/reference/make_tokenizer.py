"""Make the reference checkpoint's tokenizer: byte-level BPE on the tasks' own text, 2048 entries, digits one by one.

The pre-tokenizer cuts at every word, digit and mark, so encoding piece by piece is exact: training workers look pieces up.

    PYTHONPATH=src python recipes/reference/make_tokenizer.py src/topmass/assets/reference
"""

import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from topmass.eval.tasks import TASKS
from topmass.eval.tasks import words as W
from topmass.eval.tasks.base import bundled_filler, render

VOCAB, PIECES = 2048, r" ?[A-Za-z]+| ?[0-9]| ?[^A-Za-z0-9\s]|\s"
EOS, PAD = "<|end|>", "<|pad|>"
COMMON = 20  # a piece seen this often is one token


def corpus() -> Iterator[str]:
    """Haystacks and questions of every task, then every listed word often enough to count as common."""
    for seed, task in itertools.product(range(10**9, 10**9 + 60), TASKS.values()):
        rng = random.Random(seed)
        hay = task.build(rng, 200, bundled_filler(task.filler)(rng))
        yield render(hay.units) + "\n".join(f"{q.text} {q.answer}" for q in hay.questions)
    things = itertools.chain(W.FIELDS, *W.INSTRUMENTS.values(), *W.KINDS.values(), W.KINDS)
    words = (*W.ADJECTIVES, *W.NOUNS, *W.NAMES, *W.PLACES, *things)
    yield (" " + " ".join(words)) * COMMON


def train() -> Tokenizer:
    """Bytes, every common word whole (whatever the merges say), and as many merges as there is room for."""
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    levels = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, levels])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    texts = list(corpus())
    bpe.train_from_iterator(texts, trainer)
    learned = json.loads(bpe.to_str())["model"]
    seen = Counter(p for text in texts for p, _ in bpe.pre_tokenizer.pre_tokenize_str(text))
    words = sorted(p for p, n in seen.items() if n >= COMMON and len(p) > 1)
    order = [EOS, PAD, *sorted(alphabet)]
    entries = dict.fromkeys([*order, *words])
    merges = []
    for a, b in learned["merges"]:
        if a in entries and b in entries and len(entries) < VOCAB:
            entries[a + b] = None
            merges.append((a, b))
    tokenizer = Tokenizer(models.BPE(vocab={e: i for i, e in enumerate(entries)}, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = bpe.pre_tokenizer, decoders.ByteLevel()
    return tokenizer


def main() -> None:
    tokenizer = train()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=65536,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(sys.argv[1])
    things = itertools.chain(
        W.FIELDS, *W.INSTRUMENTS.values(), *W.KINDS.values(), W.ADJECTIVES, W.NOUNS, W.NAMES, W.PLACES
    )
    split = [w for w in things if len(tokenizer.encode(" " + w).ids) != 1]
    print(f"{tokenizer.get_vocab_size()} entries in {sys.argv[1]}; listed words of more than one token: {split}")


if __name__ == "__main__":
    main()
