"""The engine that needs no vLLM: its states beside the model's own, its answers, and a dump without vLLM.

Legend: T tokens of a document, S states of a token, D width of a state.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV32ForCausalLM

from configs import provenance
from configs.errors import ConfigError, InputError
from configs.load import load_config
from configs.schema import PromptsConfig
from featurestore import open_store, publish
from pipeline.capture.engine import EngineSettings, PartResult
from pipeline.capture.settings import choose_view
from pipeline.capture.transformers_engine import Engine
from pipeline.dump import run
from pipeline.prompts import Turns, load_prompts
from pipeline.tiny.backbone import load_backbone
from pipeline.tiny.write import random_checkpoint
from tests.test_export import quantized_copy

TOPK, ANSWER = 16, 12
STATES = [{"site": "layer_input", "layer": 1}, {"site": "post_norm", "layer": 2}]


@pytest.fixture(scope="module")
def target(tmp_path_factory, tiny_config) -> Path:
    """The untrained target with sparse attention over 16 of a document's tokens."""
    sparse = tiny_config.model_copy(update={"index_topk": TOPK, "index_n_heads": 16})
    return random_checkpoint(tmp_path_factory.mktemp("target") / "sparse", sparse)


@pytest.fixture(scope="module")
def model(target) -> DeepseekV32ForCausalLM:
    return DeepseekV32ForCausalLM.from_pretrained(
        target, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


@pytest.fixture
def settings(target, tmp_path) -> EngineSettings:
    return EngineSettings(
        model=str(target),
        tensor_parallel_size=1,
        seed=0,
        turns=Turns(None, None, (1,), 512, ANSWER),
        store=str(tmp_path / "store"),
        contract={"states": STATES},
        compression="none",
        writer_threads=1,
        queue_bytes=1,
        log=str(tmp_path / "engine.log"),
        vllm={},
        engine="transformers",
        transformers={"dtype": "float32"},
    )


def documents_of(target: Path, file: Path, **values) -> list:
    config = PromptsConfig(path=file, max_length=512, max_answer_tokens=ANSWER, **values)
    return list(load_prompts(config, target).documents)


def capture(engine: Engine, name: str, documents: list) -> dict[int, object]:
    """Let the engine take a part; its stored documents by uid."""
    assert engine.open(name, documents, {}) is None
    found: list = []
    while not found:
        found = engine.step()[1]
    assert isinstance(found[0], PartResult)
    assert found[0].rejected == {}
    publish(engine.settings.store)
    store = open_store(engine.settings.store)
    return {store[i].uid: store[i] for i in range(len(store))}


def expected_states(model: DeepseekV32ForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """What enters the second layer and what leaves the final norm, float32 [T, 2, D], of a document alone."""
    with torch.no_grad():
        output = model.model(ids[None].long(), output_hidden_states=True)
    return torch.stack([output.hidden_states[1][0], output.last_hidden_state[0]], 1)


def assert_rounded(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.bfloat16
    # to the nearest of eight bits
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [512, 40])
def test_given_documents_get_the_models_own_states_however_they_are_read(
    settings, model, target, conversations_file, batch_tokens
):
    """Together, filled up to the longest of a batch; alone; and in pieces beside a cache."""
    documents = documents_of(target, conversations_file, answers="given")
    lengths = [len(d.input_ids) for d in documents]
    assert min(lengths) > TOPK
    assert max(lengths) > 2 * 40
    engine = Engine(replace(settings, batch_tokens=batch_tokens))
    stored = capture(engine, "given", documents)
    assert len(stored) == len(documents)
    for document in documents:
        found = stored[document.uid]
        assert np.array_equal(found.input_ids, document.input_ids.astype(np.int64))
        assert_rounded(found.hidden, expected_states(model, found.input_ids))
        mask = np.zeros(len(document.input_ids), bool)
        for start, stop in document.spans:
            mask[start:stop] = True
        assert found.loss_mask.tolist() == mask.tolist()


def test_greedy_answers_are_what_generate_writes(settings, model, target, conversations_file):
    documents = documents_of(target, conversations_file, answers="target", temperature=0)
    first = documents[0]
    with torch.no_grad():
        ids = torch.from_numpy(first.input_ids.astype(np.int64))[None]
        free = model.generate(ids, max_new_tokens=ANSWER, do_sample=False, eos_token_id=-1)[0]
    # an answer that ends in the middle, beside others that go on
    stop = int(free[len(first.input_ids) + ANSWER // 2])
    engine = Engine(replace(settings, turns=replace(settings.turns, stop_ids=(stop,))))
    stored = capture(engine, "answers", documents)
    for document in documents:
        found, prompt = stored[document.uid], len(document.input_ids)
        ids = torch.from_numpy(document.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            wanted = model.generate(ids, max_new_tokens=ANSWER, do_sample=False, eos_token_id=stop)[0]
        assert found.input_ids.tolist() == wanted.tolist()
        assert found.loss_mask.tolist() == [i >= prompt for i in range(len(wanted))]
        assert_rounded(found.hidden, expected_states(model, wanted))
    assert len(stored[first.uid].input_ids) < len(first.input_ids) + ANSWER


def test_a_sampled_answer_follows_from_its_document_and_not_from_those_beside_it(
    settings, target, conversations_file, tmp_path
):
    documents = documents_of(target, conversations_file, answers="target")
    sampling = replace(settings, temperature=1.0, top_p=0.9)
    together = capture(Engine(sampling), "together", documents)
    alone = Engine(replace(sampling, store=str(tmp_path / "alone"), batch_tokens=1))
    for i, document in enumerate(documents[:3]):
        found = capture(alone, f"alone-{i}", [document])[document.uid]
        assert torch.equal(found.input_ids, together[document.uid].input_ids)
    greedy = capture(Engine(replace(settings, store=str(tmp_path / "greedy"))), "greedy", documents)
    assert any(not torch.equal(greedy[u].input_ids, together[u].input_ids) for u in greedy)
    # of a nucleus that holds one token alone the most likely one is all there is
    narrow = replace(sampling, top_p=1e-6, store=str(tmp_path / "narrow"))
    narrow_stored = capture(Engine(narrow), "narrow", documents)
    assert all(torch.equal(greedy[u].input_ids, narrow_stored[u].input_ids) for u in greedy)


def test_every_answer_of_a_conversation_is_written_behind_the_earlier_ones(
    settings, target, conversations_file, model
):
    documents = [
        d for d in documents_of(target, conversations_file, answers="every", thinking="off") if d.turns
    ]
    assert documents
    # any token ends an answer, so that each conversation goes on to its last turn
    engine = Engine(replace(settings, turns=replace(settings.turns, stop_ids=tuple(range(512)))))
    stored = capture(engine, "turns", documents)
    for document in documents:
        found = stored[document.uid]
        ids, turns = found.input_ids.tolist(), [document.input_ids, *document.turns]
        mask = []
        for k, turn in enumerate(turns):
            begin = sum(map(len, turns[:k])) + k
            assert ids[begin : begin + len(turn)] == turn.tolist()
            mask += [False] * len(turn) + [True]
        assert found.loss_mask.tolist() == mask
        assert_rounded(found.hidden, expected_states(model, found.input_ids))


def test_a_target_without_one_of_its_tensors_is_refused(settings, target, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in target.iterdir():
        if path.name == "model-00001-of-000002.safetensors":
            tensors = load_file(path)
            del tensors["model.layers.1.self_attn.o_proj.weight"]
            save_file(tensors, broken / path.name, metadata={"format": "pt"})
        else:
            (broken / path.name).symlink_to(path)
    with pytest.raises(InputError, match=r"no tensor model\.layers\.1\.self_attn\.o_proj\.weight"):
        Engine(replace(settings, model=str(broken)))
    with pytest.raises(InputError, match=r"transformers cannot load .*float33"):
        Engine(replace(settings, transformers={"dtype": "float33"}))
    (broken / "config.json").unlink()
    (broken / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(InputError, match=r"transformers cannot load .*unheard_of"):
        Engine(replace(settings, model=str(broken)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it could run")
def test_an_fp8_target_is_refused_before_it_is_read_where_it_could_not_run(settings, target, tmp_path):
    quantized = quantized_copy(target, tmp_path / "fp8")
    # nothing of it is read
    for file in quantized.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(InputError, match=r"is fp8, which transformers runs on GPUs of .*8\.9"):
        Engine(replace(settings, model=str(quantized)))


def test_what_it_captures_is_what_the_backbone_computes_beyond_index_topk(
    settings, tiny_config, tmp_path_factory
):
    """Two programs for sparse attention, float32, where one place, many, and most are left out."""
    sparse = tiny_config.model_copy(update={"index_topk": 64, "index_n_heads": 16})
    target = random_checkpoint(tmp_path_factory.mktemp("target") / "topk64", sparse)
    engine, backbone = Engine(replace(settings, model=str(target))), load_backbone(target)
    dense = load_backbone(target)
    for layer in dense.layers:
        layer.self_attn.dims = replace(layer.self_attn.dims, index_topk=2048)
    generator = torch.Generator().manual_seed(2)
    for length in (65, 300, 512):
        ids = torch.randint(6, sparse.vocab_size, (length,), generator=generator)
        with torch.no_grad():
            theirs = engine.model.model(ids[None]).last_hidden_state[0]
            packed = ids, torch.arange(length), torch.tensor([0, length], dtype=torch.int32)
            ours, other = backbone.states(*packed), dense.states(*packed)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        (captured,) = engine.states([ids.numpy()])
        assert_rounded(captured[:, -1], ours)
        # row 64 is the first that cannot keep every place, and a dense backbone computes another state there
        torch.testing.assert_close(other[:64], ours[:64], atol=1e-5, rtol=1e-5)
        assert (other[64] - ours[64]).norm() > 1e-3 * ours[64].norm()


def config_words(target: Path, file: Path, run_dir: Path) -> list[str]:
    values = {"run.dir": run_dir, "target.path": target, "prompts.path": file, "dump.engine": "transformers"}
    values |= {"prompts.max_length": 512, "prompts.max_answer_tokens": ANSWER, "prompts.answers": "given"}
    values |= {"dump.block_documents": 4}
    return [f"{key}={value}" for key, value in values.items()] + ["dump.transformers.dtype='float32'"]


def test_a_dump_by_transformers_needs_no_vllm_and_is_done_once(target, conversations_file, model, tmp_path):
    fake = tmp_path / "fake" / "vllm"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise ImportError('this machine has no vLLM')")
    words = config_words(target, conversations_file, tmp_path / "run")
    command = [sys.executable, "-m", "pipeline", "dump", "--json", *words]
    path = os.pathsep.join([str(fake.parent), *filter(None, [os.environ.get("PYTHONPATH")])])

    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    assert (first["documents"], first["captured_documents"]) == (6, 6)
    assert 0 < first["occupancy"] <= 1
    store = open_store(first["store"])
    assert store.verify() == []
    assert store.contract["engine"] | {"version": ""} == {
        "name": "transformers",
        "version": "",
        "tp": 1,
        "view": "native",
        "kv_cache_dtype": "auto",
        "settings": {"dtype": "float32"},
    }
    for document in store:
        assert_rounded(document.hidden, expected_states(model, document.input_ids)[:, 1:])
    again = run(load_config([], words))
    assert (again["captured_documents"], again["manifest"]) == (0, first["manifest"])


def test_long_documents_need_the_engine_that_has_sparse_attention_everywhere(target, tmp_path):
    words = config_words(target, tmp_path / "c.jsonl", tmp_path)
    config = load_config([], words)
    sizes = {"model_type": "deepseek_v32", "index_topk": TOPK}
    assert choose_view(config, sizes, gpu=False) == "native"
    with pytest.raises(ConfigError, match="index_topk"):
        choose_view(load_config([], [*words, "dump.engine=vllm"]), sizes, gpu=False)
    with pytest.raises(ConfigError, match="tensor_parallel_size = 2 is vLLM's"):
        load_config([], [*words, "dump.tensor_parallel_size=2"])


def test_an_engine_that_is_not_installed_is_refused_before_conversations_are_read(
    target, tmp_path, monkeypatch
):
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    words = config_words(target, tmp_path / "none.jsonl", tmp_path / "run")
    monkeypatch.setattr(provenance, "version", absent)
    for engine in ("vllm", "transformers"):
        with pytest.raises(InputError, match=f"(?i){engine} is not installed"):
            run(load_config([], [*words, f"dump.engine={engine}", "dump.view=native"]))
