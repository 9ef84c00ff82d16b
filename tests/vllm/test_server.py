"""The OpenAI-compatible server: answers, counters at /metrics, a kill in the middle of a load, and starts that must fail."""

import json
import shutil
import threading
from pathlib import Path

import pytest
from vllm_tiny import make, prompt

import topmass
from topmass.bench.serve_engines import Launch, Server
from topmass.errors import ConfigError

SPARSE = {"budget": 48, "sink": 2, "window": 4}
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "block_size": 32,
    "num_gpu_blocks_override": 256,
    "enable_prefix_caching": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With a tokenizer, which a server cannot do without."""
    made = make(tmp_path_factory.mktemp("served"), "qwen3")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(topmass.__file__).parent / "assets" / "reference" / name, made.path / name)
    return made


def serve(model, indexer=None, patience=400, **options):
    table = {"indexer": str(indexer or model.indexer), **SPARSE}
    launch = Launch(model=str(model.path), vocabulary=97, options=ENGINE, patience=patience)
    extra = {"additional_config": {"topmass": table}, "attention_config": {"backend": "CUSTOM"}}
    return Server(launch, {**extra, **options})


def test_answers_counters_a_kill_in_the_middle_and_a_new_start(model, tmp_path, monkeypatch):
    """One test, since a start takes long."""
    # as from a program that has an engine of its own
    monkeypatch.setenv("TOPMASS_METRICS_DIR", str(tmp_path))
    p = prompt(300, 1)
    expected = model.generate(p, tokens=8, **SPARSE)
    with serve(model) as server:
        assert server.generate(p, 8) == expected
        server.generate(prompt(40), 2)
        found = server.metrics()
        # two layers
        assert found["topmass:sparse_queries_total"] == 2 * (300 - 48)
        assert found["topmass:dense_queries_total"] == 2 * (48 + 40)
        assert found["topmass:generated_queries_total"] == 7 + 1
        assert found["topmass:keys_read_total"] == 2 * (252 * 48 + 48 * 49 // 2 + 40 * 41 // 2)
        assert found["topmass:kernel_calls_total"] >= 2
        assert found["topmass:requests_total"] in (1, 2)
        assert found["vllm:request_success_total"] == 2
        assert 'model_name="model"' in server._get("/metrics")[1].split("topmass:keys_read_total{")[1].split("}")[0]

        broken = []

        def load():
            try:
                server.ask([prompt(700, i) for i in range(8)], [0.0] * 8, 200)
            except (OSError, ValueError, ZeroDivisionError) as error:
                broken.append(error)

        thread = threading.Thread(target=load)
        thread.start()
        while not server.metrics().get("vllm:num_requests_running"):
            pass
        server.kill()
        thread.join()
        assert not server.healthy()
    with serve(model) as server:
        assert server.generate(p, 8) == expected
        # counts begin anew
        assert server.metrics()["topmass:sparse_queries_total"] == 2 * (300 - 48)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_server_with_a_bad_indexer_stops_in_one_line(model, tmp_path, damage, monkeypatch):
    seen = []
    original = Server.words

    def words_of(self):
        self._log.seek(0)
        seen.append(self._log.read().decode())
        return original(self)

    monkeypatch.setattr(Server, "words", words_of)
    folder = tmp_path / "indexer"
    words = "There is no indexer at"
    if damage == "cut":
        shutil.copytree(model.indexer, folder)
        weights = folder / "indexer.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4])
        words = "damaged"
    with pytest.raises(ConfigError) as caught:
        serve(model, folder)
    assert words in str(caught.value)
    assert "exit code 1" in str(caught.value)
    assert "Traceback" not in seen[0]
    assert seen[0].count("topmass: error: ") == 1


def test_a_frontier_s_file_is_served(model, tmp_path):
    from topmass.selection.indexer import Indexer

    digest = Indexer.load(model.indexer).digest
    file = tmp_path / "frontier.toml"
    lines = ["version = 1", "[selector]", 'name = "indexer"', 'budget = "48"', "q_block = 1", "kv_block = 1"]
    lines += ['share = "layer"', "sink = 2", "window = 4", f"indexer = {json.dumps(str(model.indexer))}"]
    file.write_text("\n".join([*lines, f'indexer_digest = "{digest}"', "[measured]", 'model = "m"', ""]))
    p = prompt(300, 2)
    with serve(model, additional_config={"topmass": {"config": str(file)}}) as server:
        assert server.generate(p, 8) == model.generate(p, tokens=8, **SPARSE)
