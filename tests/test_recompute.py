"""`layer61 dump --check`: what it says of a right store, of a wrong one, and where it cannot say anything."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.contract import norm_and_head_sha256, target_contract
from configs.errors import ContractError, InputError, StoreError
from configs.load import load_config
from configs.schema import RunConfig
from featurestore import StoreWriter, open_store, publish
from pipeline.__main__ import main
from pipeline.capture.engine import EngineSettings
from pipeline.capture.probe import row_errors
from pipeline.capture.routers import choose_experts
from pipeline.capture.transformers_engine import Engine
from pipeline.prompts import Turns, load_prompts
from pipeline.recompute import FAR, MEDIAN, Again, bounds, check, compare
from pipeline.tiny.backbone import load_backbone
from pipeline.tiny.write import random_checkpoint
from tests.test_capture import spread_router

TOPK = 16


@pytest.fixture(scope="module")
def target(tmp_path_factory, tiny_config) -> Path:
    sparse = tiny_config.model_copy(update={"index_topk": TOPK, "index_n_heads": 16})
    return random_checkpoint(tmp_path_factory.mktemp("target") / "sparse", sparse)


def config_of(target: Path, file: Path, run_dir: Path, *more: str) -> RunConfig:
    values = {"run.dir": run_dir, "target.path": target, "prompts.path": file, "prompts.max_length": 512}
    values |= {"prompts.max_answer_tokens": 8, "prompts.answers": "given", "dump.probe": "false"}
    return load_config([], [*(f"{key}={value}" for key, value in values.items()), *more])


def contract_of(target: Path, layers: int) -> dict:
    return {
        "target": target_contract(target).model_dump(mode="json"),
        "norm_and_head_sha256": norm_and_head_sha256(target),
        "engine": {"name": "vllm"},
        "states": [{"site": "post_norm", "layer": layers}],
    }


def engine_of(target: Path, contract: dict, **passed) -> Engine:
    return Engine(
        EngineSettings(
            model=str(target),
            tensor_parallel_size=1,
            seed=0,
            turns=Turns(None, None, (), 512, 1),
            store="",
            contract=contract,
            compression="none",
            writer_threads=1,
            queue_bytes=1,
            log="",
            vllm={},
            transformers=passed,
        )
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory, target, conversations_file) -> RunConfig:
    """A store of documents beyond `index_topk`, one of which has its states one place too far."""
    config = config_of(target, conversations_file, tmp_path_factory.mktemp("run"))
    contract = contract_of(target, 2)
    engine = engine_of(target, contract)
    documents = load_prompts(config.prompts, target).documents
    writer = StoreWriter(config.store_path, contract)
    for i, document in enumerate(documents):
        (hidden,) = engine.states([document.input_ids])
        writer.append(
            document.uid, document.input_ids, [1] * len(hidden), hidden.roll(1, 0) if i == 2 else hidden
        )
    writer.commit()
    publish(config.store_path)
    return config


def test_states_at_the_wrong_tokens_are_found_and_named(store, capsys):
    uid = load_prompts(store.prompts, store.target.path).documents[2].uid
    with pytest.raises(StoreError, match=f"more than rounding: .*document {uid}") as raised:
        check(store, 100)
    assert raised.value.exit_code == 3
    said = " ".join(capsys.readouterr().err.split())
    # without a GPU vLLM has no sparse attention, and these documents need it
    assert "vllm cannot do it here: prompts.max_length" in said
    assert "6 documents" in said
    assert "computed again by transformers" in said
    assert "one more rounding in each layer moves them by" in said


@pytest.mark.parametrize(("wrong", "layers"), [("", 4), ("mask", 4), ("mask", 2)])
def test_right_states_pass_however_far_rounding_carries_and_those_under_another_mask_do_not(
    tmp_path, tiny_config, wrong, layers
):
    """Captured in float32, computed again in bfloat16; routers of random weights are all but tied."""
    sizes = {"index_topk": 64, "index_n_heads": 16, "num_hidden_layers": layers}
    target = random_checkpoint(tmp_path / "target", tiny_config.model_copy(update=sizes))
    contract, config = contract_of(target, layers), config_of(target, tmp_path, tmp_path / "run")
    captured = engine_of(target, contract, dtype="float32")
    if wrong:
        for layer in captured.model.model.layers:
            layer.self_attn.indexer.index_topk = 4096
    generator = torch.Generator().manual_seed(3)
    again, engine = Again([], [], []), engine_of(target, contract)
    with StoreWriter(config.store_path, contract) as writer:
        for uid in range(2):
            ids = torch.randint(6, 512, (200,), generator=generator).numpy().astype(np.uint32)
            writer.append(uid, ids, [1] * 200, captured.states([ids])[0])
            again.states.append(engine.probe(ids))
            again.experts.append(None)
            again.rounding.append(row_errors(engine.probe_rounded(ids), again.states[-1]))
            # what was moved stays as it was for the next document
            assert np.array_equal(engine.probe(ids), again.states[-1])
    publish(config.store_path)
    given = config, open_store(config.store_path), np.arange(2), {"transformers": again}, "vllm", 64
    if wrong:
        with pytest.raises(StoreError, match="more than rounding"):
            compare(*given)
        return
    result = compare(*given)
    # more than two layers of a target whose routers know what they want would give
    assert MEDIAN < result["median"] < 3 * result["rounding_median"]
    assert result["median_beyond_index_topk"] < result["most_median"]


def test_bounds_follow_how_far_rounding_carries():
    assert bounds(np.full(100, 1e-4)) == (MEDIAN, FAR, 0.1)
    assert bounds(np.full(100, 0.1)) == (0.4, 0.4, 0.1)
    # a tenth of the tokens go far by rounding alone
    assert bounds(np.r_[np.full(90, 0.02), np.full(10, 0.5)]) == (0.08, FAR, pytest.approx(0.3))
    # nothing is known: states that are more unlike than like
    assert bounds(None) == (0.7, 0.7, 0.1)


def test_a_store_of_another_target_and_one_without_short_documents_are_refused(
    store, tiny_checkpoint, conversations_file
):
    other = store.model_copy(update={"target": store.target.model_copy(update={"path": tiny_checkpoint})})
    with pytest.raises(ContractError, match=r"target\.config_sha256"):
        check(other, 1)
    short = store.prompts.model_copy(update={"max_length": 9})
    with pytest.raises(InputError, match=r"no document of at most prompts\.max_length = 9 tokens"):
        check(store.model_copy(update={"prompts": short}), 1)


def test_chosen_experts_are_those_of_the_layers_own_router(tiny_checkpoint):
    backbone = load_backbone(tiny_checkpoint)
    gate = backbone.gates()[0]
    x_TD = torch.randn(50, gate.weight.shape[1], generator=torch.Generator().manual_seed(4))
    dims = backbone.dims
    sizes = dims.n_group, dims.topk_group, dims.num_experts_per_tok
    with torch.no_grad():
        expected, _ = gate(x_TD)
        found = choose_experts(x_TD @ gate.weight.T, gate.e_score_correction_bias, *sizes)
    assert torch.equal(found.sort(-1).values, expected.sort(-1).values)
    assert found.unique().numel() > dims.num_experts_per_tok


@pytest.mark.parametrize("word", ["0", "-3", "some"])
def test_a_number_of_documents_that_is_none_is_refused(word, capsys):
    assert main(["dump", "configs/tiny.toml", "--check", word]) == 2
    assert "expected a number of documents" in capsys.readouterr().err


@pytest.mark.engine
def test_the_two_engines_agree_on_short_documents_to_rounding(
    tiny_checkpoint, conversations_file, tmp_path, capfd
):
    target = spread_router(tiny_checkpoint, tmp_path / "target")
    config = config_of(target, conversations_file, tmp_path / "run")
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config.model_dump(mode="json", exclude_defaults=True)))
    assert main(["dump", str(file)]) == 0
    capfd.readouterr()
    assert main(["dump", str(file), "--check", "4", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["documents"], found["captured_by"]) == (4, "vllm")
    assert found["recomputed_by"] == "transformers"
    # each is within twelve roundings of the same states in float32; a wrong state is off by about one
    assert found["flipped_share"] < 0.1
    assert found["median_of_the_rest"] < 4 * 2**-8
    assert found["largest_of_the_rest"] < 2 * 12 * 2**-8
    assert found["median"] < 3 * found["rounding_median"]
