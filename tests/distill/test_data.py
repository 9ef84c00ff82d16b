"""Sequences by index: packed texts, the tasks' own generators, and everything that a file can have wrong."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from topmass.distill.data import TaskSequences, TextSequences, check_data, open_data, read_texts
from topmass.errors import ConfigError, DataError

LETTERS = "abcdefghijklmnopqrstuvwxyz .,:?\n0123456789-ABCDEFGHIJKLMNOPQRSTUVWXYZ'"
EOS, BOS = 1, 0


class Letters:
    """A token for every character."""

    eos_token_id = EOS

    def __init__(self, *, bos: bool = False) -> None:
        self.bos_token_id = BOS if bos else None

    def __call__(self, text, add_special_tokens: bool = True):
        if isinstance(text, list):
            return {"input_ids": [self(t, add_special_tokens)["input_ids"] for t in text]}
        head = [BOS] if self.bos_token_id is not None and add_special_tokens else []
        return {"input_ids": head + [2 + LETTERS.index(c) for c in text]}

    def text(self, ids: list[int]) -> str:
        return "".join("|" if i == EOS else "^" if i == BOS else LETTERS[i - 2] for i in ids)


def texts(tokenizer, documents, *, length=8, wanted=10**6, held_out=2, seed=0) -> TextSequences:
    return TextSequences(
        documents, tokenizer, about="some texts", length=length, wanted=wanted, held_out=held_out, seed=seed
    )


def test_documents_are_packed_whole_in_some_order() -> None:
    tokenizer = Letters()
    documents = ["one two", "three", "", "four five six", "seven eight nine ten"]
    sequences = texts(tokenizer, documents)
    whole = tokenizer.text(sequences.tokens.tolist())
    assert sorted(whole.rstrip("|").split("|")) == sorted(d for d in documents if d)
    assert whole.count("|") == 4
    found = [tokenizer.text(sequences.sequence(i)) for i in range(sequences.trained)]
    held = [tokenizer.text(sequences.sequence(i, held_out=True)) for i in range(2)]
    cut = [whole[i * 8 : i * 8 + 8] for i in range(len(whole) // 8)]
    # five sequences, of which at most a quarter are held out
    assert sorted(found) == sorted(cut[:-1])
    assert held == [cut[-1]] * 2


def test_epochs_differ_in_order_only() -> None:
    sequences = texts(Letters(), ["abcdefghijklmnopqrstuvwxyz" * 8])
    n = sequences.trained
    first, second = ([sequences.sequence(e * n + i) for i in range(n)] for e in range(2))
    assert first != second
    assert sorted(first) == sorted(second)
    assert first == [sequences.sequence(i) for i in range(n)]


def test_every_sequence_begins_as_the_model_expects() -> None:
    sequences = texts(Letters(bos=True), ["abcdefgh " * 20])
    assert all(sequences.sequence(i)[0] == BOS and BOS not in sequences.sequence(i)[1:] for i in range(4))
    assert {len(sequences.sequence(i)) for i in range(4)} == {8}


def test_reads_no_more_than_wanted() -> None:
    told = []
    sequences = TextSequences(
        ["abcdefg"] * 1000, Letters(), about="x", length=8, wanted=100, held_out=1, told=lambda *a: told.append(a)
    )
    assert len(sequences.tokens) == 100
    assert told == [(100, 100)]


def test_fingerprint_tells_data_apart() -> None:
    one, same = texts(Letters(), ["abc" * 30]), texts(Letters(), ["abc" * 30])
    other = texts(Letters(), ["abd" * 30])
    assert one.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize(("documents", "pattern"), [
    ([], "holds no text"),
    (["", ""], "holds no text"),
    (["short"], "holds 6 tokens, too few for two sequences of 8"),
])  # fmt: skip
def test_too_little_text(documents: list[str], pattern: str) -> None:
    with pytest.raises(DataError, match=pattern):
        texts(Letters(), documents)


@pytest.mark.parametrize("length", [64, 1000, 3000])
def test_tasks_fill_the_length_and_depend_on_the_index_alone(length: int) -> None:
    tokenizer = Letters()
    sequences = TaskSequences(tokenizer, length=length, seed=3)
    first = [sequences.sequence(i) for i in range(4)]
    assert {len(ids) for ids in first} == {length}
    assert first == [TaskSequences(tokenizer, length=length, seed=3).sequence(i) for i in range(4)]
    others = [sequences.sequence(i, held_out=True) for i in range(4)]
    others += [TaskSequences(tokenizer, length=length, seed=4).sequence(i) for i in range(4)]
    if length > 64:
        assert not [ids for ids in others if ids in first]
        assert any("Answer:" in tokenizer.text(ids) for ids in first + others)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_text_jsonl_and_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = write(tmp_path / "a.txt", "one")
    lines = write(tmp_path / "b.jsonl", '{"text": "two", "more": 1}\n\n{"text": "three"}\n')
    pq.write_table(pa.table({"text": ["four", "five"], "other": [1, 2]}), tmp_path / "c.parquet")
    assert list(read_texts([plain, lines, tmp_path / "c.parquet"])) == ["one", "two", "three", "four", "five"]
    body = write(tmp_path / "d.jsonl", '{"body": "six"}\n')
    assert read_texts([body], field="body") == ["six"]


def test_several_files_become_one_stream(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.txt", "abc" * 10) for i in range(5)]
    sequences = open_data(files, Letters(), length=10, wanted=1000, held_out=1)
    assert len(sequences.sequence(0)) == 10
    assert sequences.about.endswith("and 2 more, seed 0")


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2, is not JSON"),
        ("a.jsonl", '{"body": "x"}\n', "line 1 has no 'text', but 'body'; choose one with --text-field"),
        ("a.jsonl", '["x"]\n', "line 1 has no 'text', but no named fields"),
        ("a.jsonl", '{"text": NaN}\n', "'text' is nan, not text"),
        ("a.jsonl", '{"text": null}\n', "'text' is None, not text"),
        ("a.parquet", "no such thing", "is not a readable Parquet file"),
        ("a.jsonl", "", "holds no text"),
        ("a.txt", "", "holds no text"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: str, pattern: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=pattern):
        open_data([str(path)], Letters(), length=8, wanted=100, held_out=1)


def test_parquet_without_the_column(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no 'text', but 'body'"):
        read_texts([tmp_path / "a.parquet"])


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="give UTF-8 text"):
        read_texts([tmp_path / "a.txt"])


@pytest.mark.parametrize(("names", "pattern"), [
    ([], "No data is named"),
    (["tasks", "a.txt"], "cannot be mixed"),
    (["missing.txt"], "There is no file missing.txt; check the path"),
    (["./missing"], "There is no file"),
    (["/"], "is a directory"),
])  # fmt: skip
def test_names_are_checked_first(names: list[str], pattern: str) -> None:
    with pytest.raises(DataError, match=pattern):
        check_data(names)


class Table(list):
    """What a data set looks like."""

    column_names = ("text",)


def test_data_set_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        if name == "none":
            raise OSError("no network")
        return Table([{"text": "abcdefgh"}] * 9)

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert list(read_texts(["some/set:en"])) == ["abcdefgh"] * 9
    assert asked == [("some/set", "en", "train")]
    with pytest.raises(DataError, match=r"no data set with a split `train` \(no network\)"):
        read_texts(["none"])
    with pytest.raises(DataError, match="has no 'body', but 'text'"):
        read_texts(["some/set"], field="body")


def test_data_set_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="install the package `datasets`"):
        read_texts(["some/set"])


def test_own_sequences_must_fit() -> None:
    sequences = texts(Letters(), ["abc" * 30])
    assert open_data(sequences, None, length=8, wanted=1, held_out=1) is sequences
    with pytest.raises(ConfigError, match="set length=8"):
        open_data(sequences, None, length=9, wanted=1, held_out=1)


def test_jsonl_line_of_any_json(tmp_path: Path) -> None:
    lines = [{"text": 'quoted "text" with \\ and ü'}, {"text": "b"}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    assert list(read_texts([path])) == [row["text"] for row in lines]
