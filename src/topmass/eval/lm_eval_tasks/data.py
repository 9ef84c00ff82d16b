"""The tasks of `topmass.eval` as data sets of lm-evaluation-harness; its YAML files name these functions."""

from functools import partial
from typing import Any

from datasets import Dataset

from topmass.eval.tasks import Sample, make_samples, score

__all__ = ["process_results"]


def _build(
    task: str,
    *,
    pretrained: str | None = None,
    tokenizer: str | None = None,
    max_seq_lengths: int | list[int] = 4096,
    haystacks: int = 20,
    questions: int = 1,
    seed: int = 0,
    **_: Any,
) -> dict[str, Dataset]:
    """Samples of one task. The harness passes `--model_args` and `--metadata`."""
    from transformers import AutoTokenizer

    from topmass.integrations.transformers.reference import REFERENCE

    name = tokenizer or pretrained
    if name is None:
        raise ValueError("The tasks of topmass are sized in tokens; give pretrained= or tokenizer= in --model_args.")
    encode = AutoTokenizer.from_pretrained(REFERENCE if name == "reference" else name)
    lengths = [max_seq_lengths] if isinstance(max_seq_lengths, int) else max_seq_lengths
    samples = [
        s
        for length in lengths
        for s in make_samples(task, encode, length=length, n=haystacks, seed=seed, questions=questions)
    ]
    return {"test": Dataset.from_list([_doc(s) for s in samples])}


def _doc(sample: Sample) -> dict[str, Any]:
    doc = {name: getattr(sample, name) for name in Sample.__slots__}
    return doc | {"prompt": sample.prompt, "references": list(sample.references)}


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The share of the references that stand in the answer."""
    fields: dict[str, Any] = {name: doc[name] for name in Sample.__slots__}
    fields["references"] = tuple(fields["references"])
    return {"score": score(Sample(**fields), results[0])}


niah_single = partial(_build, "niah_single")
niah_distractor = partial(_build, "niah_distractor")
niah_uuid = partial(_build, "niah_uuid")
niah_multivalue = partial(_build, "niah_multivalue")
niah_multiquery = partial(_build, "niah_multiquery")
variable_tracking = partial(_build, "variable_tracking")
common_words = partial(_build, "common_words")
frequent_words = partial(_build, "frequent_words")
majority = partial(_build, "majority")
latent_association = partial(_build, "latent_association")
