"""Plans: what is written is read back, and what cannot be read is said."""

import dataclasses
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topmass.core.budget import Budget
from topmass.core.plan import Plan
from topmass.errors import ConfigError
from topmass.selection import OracleSelector

budgets = st.one_of(
    st.none(),
    st.builds(lambda n: Budget(tokens=n), st.integers(1, 10**6)),
    st.builds(lambda f: Budget(share=f), st.fractions(Fraction(1, 10**6), 1, max_denominator=10**6)),
    st.builds(
        lambda f, n: Budget(mass=f, tokens=n),
        st.fractions(Fraction(1, 10**6), 1, max_denominator=10**6),
        st.integers(1, 10**6),
    ),
)


@given(layers=st.dictionaries(st.integers(0, 200), budgets, max_size=5), default=budgets, note=st.text(max_size=20))
def test_round_trip(tmp_path_factory, layers, default, note):
    path = tmp_path_factory.getbasetemp() / "plan.toml"
    note = note.encode("utf-8", "ignore").decode()  # lone surrogates are not text

    Plan(layers=layers, default=default, note=note).save(path)

    assert Plan.load(path) == Plan(layers=layers, default=default, note=note)


def test_default_and_dense_layers():
    plan = Plan(layers={3: Budget(tokens=64), 5: None}, default=Budget(tokens=8))

    assert [plan.budget(i) for i in (3, 5, 7)] == [Budget(tokens=64), None, Budget(tokens=8)]
    assert str(plan) == "plan(3:64, 5:dense, default:8)"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version = [", "is not a plan"),
        ("version = 2", "version 2 of a plan; this topmass reads version 1"),
        ("", "version None"),
        ("version = 1\nlayer = 3", "unknown key 'layer'"),
        ("version = 1\nlayers = 3", "maps layer indices"),
        ("version = 1\n[layers]\nfirst = '64'", "maps layer indices"),
        ("version = 1\n[layers]\n-1 = '64'", "maps layer indices"),
        ("version = 1\n[layers]\n0 = 'much'", "Cannot read the budget 'much'"),
        ("version = 1\n[layers]\n0 = 0.5", "Cannot read the budget '0.5'"),
        ("version = 1\n[layers]\n0 = 0", "at least 1 token"),
        ("version = 1\ndefault = '0%'", "must lie in"),
    ],
)
def test_bad_plans_name_the_file_and_the_reason(tmp_path, text, words):
    path = tmp_path / "plan.toml"
    path.write_text(text)

    with pytest.raises(ConfigError) as caught:
        Plan.load(path)

    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_unreadable_and_unwritable_files(tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot read the plan .*No such file"):
        Plan.load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"Cannot read the plan .*directory"):
        Plan.load(tmp_path)
    with pytest.raises(ConfigError, match=r"Cannot write the plan .*No such file"):
        Plan(layers={}).save(tmp_path / "none" / "plan.toml")
    (tmp_path / "latin.toml").write_bytes(b"note = '\xe9'\n")
    with pytest.raises(ConfigError, match="is not a plan"):
        Plan.load(tmp_path / "latin.toml")


def test_selector_takes_each_layers_budget():
    selector = OracleSelector(budget=Plan(layers={0: Budget(tokens=4), 2: None}, default=Budget(share=Fraction(1, 2))))

    assert selector.rule(0).budget == Budget(tokens=4)
    assert selector.rule(2) is None
    assert selector.rule(1).budget == Budget(share=Fraction(1, 2))


@pytest.mark.parametrize("plan", [Plan(layers={1: Budget(tokens=8)}), Plan(layers={}, default=Budget(tokens=8))])
def test_selector_refuses_a_plan_that_no_layer_could_use(plan):
    with pytest.raises(ConfigError, match="the smallest that works is 13"):
        OracleSelector(budget=plan, sink=4, window=8)


def test_plans_that_differ_have_different_fingerprints():
    plan = Plan(layers={1: Budget(tokens=8)}, default=Budget(tokens=16))
    others = [dataclasses.replace(plan, default=None), dataclasses.replace(plan, layers={1: Budget(tokens=9)})]

    assert len({OracleSelector(budget=p).fingerprint for p in (plan, *others)}) == 3
