"""Contracts: what is compared, and those written before the draft had one of its own."""

import json

import pytest

from configs.contract import Draft, require_same
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
    with pytest.raises(ContractError, match="max_length"):
        StoreWriter(str(first), {**contract, "max_length": 1})


def test_a_checkpoint_of_the_old_form_has_the_draft_among_the_stores(tiny_checkpoint, tmp_path):
    contract = contract_of(tiny_checkpoint)
    for mask in (True, False):
        old = {**contract, **OLD, "mask_position_0": mask}
        (tmp_path / "layer61.json").write_text(json.dumps({"format": 1, "step": 3, "contract": old}))
        meta = read_meta(tmp_path)
        assert meta["contract"] == contract
        assert meta["draft"] == Draft(mask_position_0=mask).model_dump(mode="json")
        assert meta["step"] == 3
