"""Tasks: exact lengths, true answers, determinism."""

import random
import re
from collections import Counter
from importlib.resources import files

import pytest
from transformers import AutoTokenizer

from topmass.errors import ConfigError, DataError
from topmass.eval.tasks import TASKS, list_tasks, make_samples, score
from topmass.eval.tasks import words as W
from topmass.eval.tasks.base import bundled_filler
from topmass.eval.tasks.marks import LEAST, counts

COUNTING = ("common_words", "frequent_words", "majority")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(files("topmass") / "assets" / "reference"))


def words_only(text: str) -> dict[str, list[str]]:
    """A foreign tokenizer that splits otherwise."""
    return {"input_ids": re.findall(r"\s*\w{1,3}|\W", text)}


@pytest.mark.parametrize("task", list_tasks())
@pytest.mark.parametrize("length", [777, 2048])
def test_lengths_are_exact_and_contexts_shared(task, length, tokenizer):
    questions = TASKS[task].max_questions
    samples = make_samples(task, tokenizer, length=length, n=2, seed=3, questions=questions)
    assert len(samples) == 2 * questions
    for haystack in (0, 1):
        mine = [s for s in samples if s.haystack == haystack]
        used = [len(tokenizer(s.prompt)["input_ids"]) + s.max_new_tokens for s in mine]
        assert max(used) == length
        assert len({s.context for s in mine}) == 1
        assert len({s.question for s in mine}) == questions
        assert [s.question_id for s in mine] == list(range(questions))


@pytest.mark.parametrize("task", list_tasks())
def test_deterministic_and_prefix_stable(task, tokenizer):
    one = make_samples(task, tokenizer, length=1024, n=1, seed=5)
    more = make_samples(task, tokenizer, length=1024, n=2, seed=5, questions=2)
    assert more[0] == one[0]
    assert make_samples(task, tokenizer, length=1024, n=1, seed=6)[0].context != one[0].context
    assert more[2].context != more[0].context
    assert make_samples(task, tokenizer, length=1024, n=1, seed=5, questions=2, first=1) == more[2:]


@pytest.mark.parametrize("task", list_tasks())
def test_question_tokens_follow_context_tokens(task, tokenizer):
    sample = make_samples(task, tokenizer, length=1024, n=1)[0]
    apart = tokenizer(sample.context)["input_ids"] + tokenizer(sample.question)["input_ids"]
    assert tokenizer(sample.prompt)["input_ids"] == apart


@pytest.mark.parametrize("task", list_tasks())
def test_answers_are_in_the_context_and_not_in_the_question(task, tokenizer):
    for sample in make_samples(task, tokenizer, length=1500, n=3, questions=TASKS[task].max_questions):
        for reference in sample.references:
            assert re.search(rf"\b{reference}\b", sample.context)
            assert not re.search(rf"\b{reference}\b", sample.question)
        assert len(set(sample.references)) == len(sample.references) or task.startswith("niah")


@pytest.mark.parametrize("task", list_tasks())
def test_foreign_tokenizers_never_exceed(task):
    samples = make_samples(task, words_only, length=3000, n=2, questions=2)
    used = [len(words_only(s.prompt)["input_ids"]) + s.max_new_tokens for s in samples]
    assert max(used) <= 3000
    assert max(used) >= 2990


@pytest.mark.parametrize("task", COUNTING)
@pytest.mark.parametrize("length", [1024, 8192])
def test_counts_agree_with_the_references(task, length, tokenizer):
    for sample in make_samples(task, tokenizer, length=length, n=2, questions=2):
        label, options = _tallied(sample)
        tally = {o: len(re.findall(rf"{label}: {o}\.", sample.context)) for o in options}
        top = sorted(tally, key=tally.get, reverse=True)
        assert tuple(top[: len(sample.references)]) == sample.references
        assert tally[top[len(sample.references) - 1]] >= tally[top[len(sample.references)]] + 2
        density = sum(tally.values()) / length
        assert 1 / 24 < density < 1 / 9


def _tallied(sample):
    if sample.task == "majority":
        return "Vote", W.KINDS[re.search(r"Which (\w+)", sample.question)[1]]
    names = W.NAMES if sample.task == "common_words" else W.PLACES
    return next(n for n in names if re.search(rf"\b{n}\b", sample.question)), W.NOUNS


def _tally(rng, task, total):
    """Counts of one question, and how many of them are wanted."""
    winners, options = (3, 16) if task == "frequent_words" else (1, 8)
    return counts(rng, total, options, winners=winners, lead=TASKS[task].lead), winners


def _errors_of_a_tenth(task, total, trials=300):
    """Share of the questions that whoever sees a tenth of the marks gets wrong."""
    rng, wrong = random.Random(0), 0
    for _ in range(trials):
        tally, winners = _tally(rng, task, total)
        seen = Counter(rng.sample(range(len(tally)), total // 10, counts=tally))
        best = sorted(range(len(tally)), key=lambda o: (-seen[o], rng.random()))[:winners]
        wrong += max(best) >= winners
    return wrong / trials


@pytest.mark.parametrize("task", COUNTING)
@pytest.mark.parametrize("total", [61, 128, 512])
def test_a_tenth_of_the_marks_errs_up_to_8000_tokens(task, total):
    assert _errors_of_a_tenth(task, total) > 0.25


@pytest.mark.parametrize("task", COUNTING)
def test_a_tenth_of_the_marks_suffices_at_64000_tokens(task):
    assert _errors_of_a_tenth(task, 4096, trials=100) < 0.05


@pytest.mark.parametrize("task", COUNTING)
@pytest.mark.parametrize("total", [24, 61, 128, 512, 4096])
def test_winners_lead_by_their_floor(task, total):
    tally, winners = _tally(random.Random(1), task, total)
    assert abs(sum(tally) - total) < len(tally)
    assert tally[winners - 1] - max(tally[winners:]) >= max(2, int(LEAST * total / len(tally)))


def test_chains_follow_the_assignments(tokenizer):
    for sample in make_samples("variable_tracking", tokenizer, length=1500, n=2, questions=6):
        value = re.search(r"\d{5}", sample.question)[0]
        held = []
        for name, source in re.findall(r"Let (\w+) be (\w+)\.", sample.context):
            if source == value or source in held:
                held.append(name)
        assert tuple(held) == sample.references


def test_latent_questions_share_no_content_word_with_their_needle(tokenizer):
    for sample in make_samples("latent_association", tokenizer, length=1024, n=4, questions=8):
        needle = re.search(rf"The code of the (\w+) is {sample.references[0]}\.", sample.context)
        field = re.search(r"Question: Which number belongs to (\w+)\?", sample.question)[1]
        assert needle[1] in W.INSTRUMENTS[field]
        assert field not in sample.context


def test_distractors_differ_from_the_key(tokenizer):
    sample = make_samples("niah_distractor", tokenizer, length=2048, n=1)[0]
    keys = re.findall(r"The code of the (\w+ \w+) is", sample.context)
    assert len(keys) == len(set(keys)) > 100


@pytest.mark.parametrize(
    ("prediction", "expected"), [(" Wren FINCH\n", 1.0), ("finch", 0.5), ("wrench finches", 0.0), ("", 0.0)]
)
def test_score(prediction, expected, tokenizer):
    sample = make_samples("niah_multivalue", tokenizer, length=1024, n=1)[0]
    sample = type(sample)(
        **{f: getattr(sample, f) for f in sample.__slots__ if f != "references"}, references=("wren", "finch")
    )
    assert score(sample, prediction) == expected


def test_the_answer_itself_scores_one(tokenizer):
    for task in list_tasks():
        sample = make_samples(task, tokenizer, length=1024, n=1)[0]
        assert score(sample, " ".join(sample.references)) == 1.0
        assert len(tokenizer(" " + ", ".join(sample.references))["input_ids"]) < sample.max_new_tokens


def test_word_lists_are_disjoint_and_absent_from_filler():
    lists = [W.ADJECTIVES, W.NOUNS, W.NAMES, W.PLACES, W.FIELDS, *W.KINDS.values(), *W.INSTRUMENTS.values()]
    listed = [w.lower() for words in lists for w in words]
    assert len(listed) == len(set(listed))
    prose = bundled_filler("prose")(random.Random(0))
    rng = random.Random(1)
    text = " ".join([*(prose(rng) for _ in range(5000)), *W.NOISE]).lower()
    assert not set(listed) & set(re.findall(r"\w+", text))


def test_own_haystack(tmp_path, tokenizer):
    file = tmp_path / "own.txt"
    file.write_text("Zebras hum. Do they? They certainly do!\n\nAlways.")
    sample = make_samples("niah_single", tokenizer, length=700, n=1, haystack=file)[0]
    assert "Zebras hum. Do they?" in sample.context
    assert "miller" not in sample.context


def test_errors_name_the_remedy(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="Did you mean 'niah_single'"):
        make_samples("niah_singel", tokenizer, length=1024, n=1)
    with pytest.raises(ConfigError, match="1 to 2"):
        make_samples("majority", tokenizer, length=1024, n=1, questions=3)
    with pytest.raises(ConfigError, match="at least 1"):
        make_samples("majority", tokenizer, length=1024, n=0)
    with pytest.raises(ConfigError, match="first at least 0"):
        make_samples("majority", tokenizer, length=1024, n=1, first=-1)
    with pytest.raises(ConfigError, match="no filler"):
        make_samples("niah_distractor", tokenizer, length=1024, n=1, haystack=tmp_path)
    with pytest.raises(DataError, match="cannot read"):
        make_samples("niah_single", tokenizer, length=1024, n=1, haystack=tmp_path / "absent")
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(DataError, match="empty"):
        make_samples("niah_single", tokenizer, length=1024, n=1, haystack=tmp_path / "empty")


@pytest.mark.parametrize("task", list_tasks())
def test_the_smallest_length_that_is_named_works(task, tokenizer):
    with pytest.raises(DataError, match="take a length of at least") as e:
        make_samples(task, tokenizer, length=64, n=4)
    least = int(re.findall(r"at least (\d+)", str(e.value))[0])
    samples = make_samples(task, tokenizer, length=least, n=4, questions=1)
    assert all(len(tokenizer(s.prompt)["input_ids"]) + s.max_new_tokens <= least for s in samples)
