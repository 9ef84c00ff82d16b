"""lm-evaluation-harness under a selector gives the answers that `topmass.evaluate` gives."""

import re
from pathlib import Path

import pytest
import torch

import topmass
from topmass.eval.tasks import TASKS

TASK_FILES = Path(topmass.__file__).parent / "eval" / "lm_eval_tasks"


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_a_file(name: str) -> None:
    text = (TASK_FILES / f"{name}.yaml").read_text()

    assert f"task: topmass_{name}\n" in text
    assert f"!function data.{name}\n" in text
    assert int(re.findall(r"max_gen_toks: (\d+)", text)[0]) == TASKS[name].max_new_tokens


def test_says_what_to_install() -> None:
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[lm-eval\]'"):
            import topmass.integrations.lm_eval  # noqa: F401
    else:
        pytest.skip("lm-evaluation-harness is installed")


@pytest.fixture
def harness():
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    import topmass.integrations.lm_eval as harness

    return harness


# what the harness and its data sets warn of is theirs
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("arguments", "selector"),
    [
        ("selector=dense", topmass.DenseSelector()),
        ("selector=streaming,sink=4,window=60", topmass.StreamingSelector(sink=4, window=60)),
        ("selector=oracle,budget=48,sink=4", topmass.OracleSelector(budget=48, sink=4)),
    ],
)
def test_answers_are_ours(harness, arguments: str, selector: topmass.selection.Selector) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    settings = {"max_seq_lengths": [384], "haystacks": 2, "seed": 5}
    manager = TaskManager(include_path=str(TASK_FILES), metadata=settings | {"pretrained": "reference"})
    found = simple_evaluate(
        model="topmass", model_args=f"pretrained=reference,dtype=float32,{arguments}", tasks=["topmass_niah_single"],
        task_manager=manager, device="cpu", batch_size=1, log_samples=True, bootstrap_iters=0,
    )  # fmt: skip

    model, tokenizer = topmass.load_reference(dtype=torch.float32)
    ours = topmass.evaluate(
        model, tokenizer, tasks=["niah_single"], lengths=[384], n=2, seed=5, selectors={"s": selector}
    ).to_records()
    theirs = sorted(found["samples"]["topmass_niah_single"], key=lambda s: s["doc"]["haystack"])
    assert [s["resps"][0][0] for s in theirs] == [r["prediction"] for r in ours]
    assert [s["score"] for s in theirs] == [r["score"] for r in ours]
    info = found["config"]
    assert info["topmass_fingerprint"] == selector.fingerprint
    if not isinstance(selector, topmass.DenseSelector):
        assert 1 < info["topmass_keys_read_mean"] < 65


@pytest.mark.filterwarnings("default")
def test_scores_continuations_sparsely(harness) -> None:
    from lm_eval.api.instance import Instance

    request = Instance(request_type="loglikelihood", doc={}, arguments=("The code of the red door is", " 4321."), idx=0)
    found = []
    for arguments in ({"selector": "dense"}, {"selector": "streaming", "sink": 0, "window": 1}):
        model = harness.TopmassLM("reference", dtype="float32", device="cpu", **arguments)
        found.append(model.loglikelihood([request], disable_tqdm=True)[0][0])

    assert found[0] != found[1]


@pytest.mark.filterwarnings("default")
def test_settings_that_cannot_be(harness, tmp_path: Path) -> None:
    with pytest.raises(topmass.errors.ConfigError, match="unknown key 'budget'"):
        harness.TopmassLM("reference", selector="streaming", budget=4)
    with pytest.raises(topmass.errors.ConfigError, match="leave budget out"):
        harness.TopmassLM("reference", selector="serve.toml", budget=4)
