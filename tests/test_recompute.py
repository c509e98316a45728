"""`layer61 dump --check`: what it says of a right store, of a wrong one, and where it cannot say anything."""

import json
from pathlib import Path

import pytest
import torch

from configs.contract import norm_and_head_sha256, target_contract
from configs.errors import ContractError, InputError, StoreError
from configs.load import load_config
from configs.schema import RunConfig
from featurestore import StoreWriter, publish
from pipeline.__main__ import main
from pipeline.capture.engine import EngineSettings
from pipeline.capture.routers import choose_experts
from pipeline.capture.transformers_engine import Engine
from pipeline.prompts import Turns, load_prompts
from pipeline.recompute import check
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


@pytest.fixture(scope="module")
def store(tmp_path_factory, target, conversations_file) -> RunConfig:
    """A store of documents beyond `index_topk`, one of which has its states one place too far."""
    config = config_of(target, conversations_file, tmp_path_factory.mktemp("run"))
    contract = {
        "target": target_contract(target).model_dump(mode="json"),
        "norm_and_head_sha256": norm_and_head_sha256(target),
        "engine": {"name": "vllm"},
        "states": [{"site": "post_norm", "layer": 2}],
    }
    settings = EngineSettings(
        model=str(target),
        tensor_parallel_size=1,
        seed=0,
        turns=Turns(None, None, (), 512, 1),
        store=config.store_path,
        contract=contract,
        compression="none",
        writer_threads=1,
        queue_bytes=1,
        log="",
        vllm={},
    )
    engine = Engine(settings)
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
