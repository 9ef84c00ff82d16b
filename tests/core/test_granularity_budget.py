"""Granularity and budget: what users may write, and what they are told when they may not."""

import dataclasses
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import topmass
from topmass.core.budget import Budget
from topmass.core.granularity import Granularity, split_queries
from topmass.errors import ConfigError


@pytest.mark.parametrize("field", ["q_block", "kv_block"])
@pytest.mark.parametrize("size", [0, -1, 3, 6, 48])
def test_blocks_are_powers_of_two(field, size):
    with pytest.raises(ConfigError, match=f"{field} must be a power of two"):
        Granularity(**{field: size})


def test_wrong_types_are_configuration_errors():
    # in a fresh interpreter: here the type checker of the tests would answer first
    script = """
from topmass import Budget, Granularity
from topmass.errors import ConfigError

for make, fields, words in (
    (Granularity, {"share": "head"}, "layer, kv_head, q_head, got 'head'"),
    (Granularity, {"q_block": 1.0}, "power of two"),
    (Granularity, {"kv_block": "4"}, "power of two"),
    (Granularity, {"kv_block": True}, "power of two"),
    (Budget, {"share": 0.05}, "Budget.parse"),
    (Budget, {"mass": 0.9, "tokens": 4}, "Budget.parse"),
    (Budget, {"tokens": 4.5}, "whole number"),
    (Budget.parse, {"value": None}, "write tokens"),
    (Budget.parse, {"value": 2.5}, "write tokens"),
    (Budget.parse, {"value": True}, "write tokens"),
):
    try:
        made = make(**fields)
    except ConfigError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"{made} from {fields}")
"""
    env = {**os.environ, "PYTHONPATH": str(Path(topmass.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("share", "heads"), [("layer", 1), ("kv_head", 2), ("q_head", 8)])
def test_share_heads(share, heads):
    assert Granularity(share=share).share_heads(8, 2) == heads


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        (2048, Budget(tokens=2048)),
        (" 2048 ", Budget(tokens=2048)),
        ("5%", Budget(share=Fraction(1, 20))),
        ("12.5 %", Budget(share=Fraction(1, 8))),
        ("100%", Budget(share=Fraction(1))),
        ("1/3%", Budget(share=Fraction(1, 300))),
        ("mass:0.95<=4096", Budget(mass=Fraction(19, 20), tokens=4096)),
        ("mass:0.95 <= 4096", Budget(mass=Fraction(19, 20), tokens=4096)),
        ("mass:1<=7", Budget(mass=Fraction(1), tokens=7)),
    ],
)
def test_budget_is_read(text, budget):
    assert Budget.parse(text) == budget
    assert Budget.parse(str(budget)) == budget
    assert Budget.parse(budget) is budget


@pytest.mark.parametrize(
    "text",
    ["", "many", "5 tokens", "2.5", "1e3", "%", "nan%", "inf%", "1/0%", "mass:0.9", "mass:<=4", "mass:0.9<=", "1e400%", "1e-999999999%", "-5%"],
)  # fmt: skip
def test_unreadable_budget_says_what_to_write(text):
    with pytest.raises(ConfigError, match=r"Cannot read the budget .*write tokens \(2048\).*'5%'.*'mass:0.95<=4096'"):
        Budget.parse(text)


@pytest.mark.parametrize("text", [0, -3, "0", "0%", "100.1%", "mass:0<=8", "mass:1.01<=8", "mass:0.5<=0"])
def test_budget_out_of_range(text):
    with pytest.raises(ConfigError, match=r"at least 1 token|must lie in \(0, 1\]"):
        Budget.parse(text)


@pytest.mark.parametrize(
    "fields", [{}, {"tokens": 4, "share": Fraction(1, 2)}, {"mass": Fraction(1, 2)}, {"share": Fraction(1, 2), "mass": Fraction(1, 2)}]
)  # fmt: skip
def test_budget_has_one_form(fields):
    with pytest.raises(ConfigError, match="one form"):
        Budget(**fields)


def test_budget_with_too_many_digits():
    with pytest.raises(ConfigError, match="ten decimals"):
        Budget.parse("33.333333333333333%")


@pytest.mark.parametrize(
    ("a", "b"), [("33.3333%", "33.33333%"), ("mass:0.9999999<=8", "mass:1<=8"), ("1/3%", "0.333333%")]
)
def test_different_budgets_print_differently(a, b):
    assert str(Budget.parse(a)) != str(Budget.parse(b))


@given(st.fractions(min_value=Fraction(1, 10**6), max_value=1, max_denominator=10**6), st.integers(1, 2**40))
def test_budget_text_round_trip(fraction, tokens):
    for budget in (Budget(tokens=tokens), Budget(share=fraction), Budget(mass=fraction, tokens=tokens)):
        assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize("value", [Granularity(), Budget(tokens=4)])
def test_values_are_frozen(value):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(value)[0].name, 2)


@pytest.mark.parametrize(
    ("q_start", "q_len", "step"), [(0, 20, 8), (5, 10, 8), (7, 1, 8), (16, 3, 8), (3, 0, 8), (2, 9, 1)]
)
def test_queries_are_cut_at_absolute_positions(q_start, q_len, step):
    parts = list(split_queries(q_start, q_len, step))
    assert [t for lo, hi in parts for t in range(lo, hi)] == list(range(q_len))
    assert parts[0][0] == 0
    assert all((q_start + lo) % step == 0 for lo, _ in parts[1:])
    assert all(hi - lo <= step for lo, hi in parts)
