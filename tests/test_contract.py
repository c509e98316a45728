"""Contracts: what is compared, and those written before the draft had one of its own."""

import json

import pytest

from configs.contract import Draft, other_provenance, require_same
from configs.errors import ContractError
from configs.run_dir import read_meta
from featurestore import StoreWriter, merge, open_store, publish
from tests.stores import contract_of, write_store

# as dumps wrote it before
OLD = {"carry": "post_norm", "mask_position_0": True, "concat": "embed,hidden"}


def test_a_difference_names_the_fields_and_where_the_target_lies_is_none(tiny_checkpoint):
    contract = contract_of(tiny_checkpoint)
    elsewhere = {**contract, "target": {**contract["target"], "path": "elsewhere"}}
    require_same(elsewhere, contract, "this and that", hint="-")
    other = {**contract, "shift": 2, "target": {**contract["target"], "vocab_size": 7}}
    with pytest.raises(ContractError, match=r"shift: 2, not 1; target\.vocab_size: 7, not 512"):
        require_same(other, contract, "this and that", hint="-")


def test_how_states_were_made_may_differ_and_is_named(tiny_checkpoint, tmp_path):
    contract = contract_of(tiny_checkpoint)
    engine = {
        **contract["engine"],
        "version": "9",
        "tp": 8,
        "kv_cache_dtype": "fp8",
        "settings": {"dtype": "half"},
    }
    template = {**contract["template"], "sha256": "1" * 64}
    later = {**contract, "engine": engine, "template": template, "max_length": 8192}
    require_same(later, contract, "this and that", hint="-")
    assert other_provenance(later, contract) == [
        "engine.kv_cache_dtype: 'fp8', not 'auto'",
        "engine.settings.dtype: 'half', not None",
        "engine.tp: 8, not 1",
        "engine.version: '9', not '0'",
        f"max_length: 8192, not {contract['max_length']}",
        f"template.sha256: '{'1' * 64}', not '{'0' * 64}'",
    ]
    assert other_provenance(contract, contract) == []
    # an older program wrote less down: what it did not say is no difference
    old = {**contract, "engine": {k: contract["engine"][k] for k in ("name", "version", "tp", "view")}}
    assert other_provenance(later, old)[0] == "engine.tp: 8, not 1"
    # each part keeps its own, and the store is one
    store = write_store(tmp_path / "s", tiny_checkpoint, lengths=[12, 9], contract=old)
    document = open_store(store)[0]
    with StoreWriter(str(store), later, part="later") as writer:
        ids, mask = document.input_ids.numpy().astype("uint32"), document.loss_mask.numpy().astype("uint8")
        writer.append(77, ids, mask, document.hidden, source="test")
    publish(str(store))
    assert (len(open_store(store)), 77 in open_store(store).uid) == (3, True)
    record = json.loads((store / "parts" / "later" / "zarr.json").read_text())["attributes"]["hidden_store"]
    assert record["contract"] == later
    other = {**contract, "tokenizer_sha256": "2" * 64}
    with pytest.raises(ContractError, match="tokenizer_sha256"):
        StoreWriter(str(store), other)


def test_a_store_of_the_old_form_is_read_added_to_and_merged(tiny_checkpoint, tmp_path):
    contract, old = contract_of(tiny_checkpoint), contract_of(tiny_checkpoint, **OLD)
    first = write_store(tmp_path / "old", tiny_checkpoint, lengths=[12, 9], contract=old)
    assert json.loads((first / "zarr.json").read_text())["attributes"]["hidden_store"]["contract"] == old
    assert open_store(first).contract == contract
    document = open_store(first)[0]
    with StoreWriter(str(first), contract) as writer:
        ids, mask = document.input_ids.numpy().astype("uint32"), document.loss_mask.numpy().astype("uint8")
        writer.append(77, ids, mask, document.hidden, source="test")
    publish(str(first))
    second = write_store(tmp_path / "new", tiny_checkpoint, lengths=[7], contract=contract, first_uid=100)
    uids = sorted([*open_store(first).uid, *open_store(second).uid])
    assert len(uids) == 4
    assert 77 in uids
    merge(str(first), [str(second)])
    merge(str(second), [str(first)])
    for path in (first, second):
        store = open_store(path)
        assert sorted(store.uid) == uids
        assert store.contract == contract
        assert store.verify() == []
    with pytest.raises(ContractError, match="dtype"):
        StoreWriter(str(first), {**contract, "dtype": "float8"})


def test_a_checkpoint_of_the_old_form_has_the_draft_among_the_stores(tiny_checkpoint, tmp_path):
    contract = contract_of(tiny_checkpoint)
    for mask in (True, False):
        old = {**contract, **OLD, "mask_position_0": mask}
        (tmp_path / "layer61.json").write_text(json.dumps({"format": 1, "step": 3, "contract": old}))
        meta = read_meta(tmp_path)
        assert meta["contract"] == contract
        assert meta["draft"] == Draft(mask_position_0=mask).model_dump(mode="json")
        assert meta["step"] == 3
