"""Offline acceptance against a server played out token by token, and what evaluation refuses."""

import json

import numpy as np
import pytest
import torch

from configs import run_dir as runs
from configs.errors import ConfigError, ContractError, InputError
from configs.held_out import is_held_out, uid_group
from configs.load import load_config
from configs.schema import TrainConfig
from export.checkpoint import Checkpoint
from export.keymap import keymap
from featurestore import open_store
from pipeline.tiny.write import random_checkpoint
from tests.reference import Reference, to_checkpoint
from tests.stores import write_store
from train import evaluate, launch
from train.batch import check_lengths, held_out, open_split, pack
from train.draft import Draft
from train.model import load_layer

DRAFTS = 3
LENGTHS = [31, 24, 40, 17, 28, 35, 22, 8, 26, 33, 19, 30, 12, 3, 2, 21]


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_checkpoint):
    path = tmp_path_factory.mktemp("store") / "store"
    return open_store(write_store(path, tiny_checkpoint, lengths=LENGTHS, held_out_every=3))


@pytest.fixture(scope="module")
def layer(tiny_checkpoint, store):
    """A layer trained for a moment on the other documents, so that some drafts are accepted."""
    layer = load_layer(tiny_checkpoint)
    draft = Draft(layer, TrainConfig(dtype="float32"))
    documents = evaluate._read(store, np.flatnonzero(~store.held_out), [0])
    batch = pack(documents, torch.float32, torch.device("cpu"))
    scored = batch.scored(DRAFTS)
    optimizer = torch.optim.Adam([p for n, p in layer.named_parameters() if "indexer" not in n], lr=3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        draft(batch, scored, scored.valid / len(scored.tokens)).loss.backward()
        optimizer.step()
    return layer


def serve(reference, document):
    """Play the server: draft with its own tokens, keep what the document says, go on behind the next token.

    Returns the number accepted and the number of known targets of every draft.
    """
    ids, hidden = document.input_ids, document.hidden[:, 0].float()
    carried = reference.start(ids, hidden)
    rounds = []
    place = int(document.loss_mask.nonzero()[0])
    while place + 1 < len(ids):
        known = min(DRAFTS, len(ids) - 1 - place)
        anchor = place - 1
        keys, values = reference.keys[: anchor + 1], reference.values[: anchor + 1]
        state, accepted = carried[anchor], 0
        for s in range(known):
            token = int((reference.w["lm_head.weight"] @ state).argmax())
            if token != int(ids[place + 1 + s]):
                break
            accepted += 1
            e = reference.embed(torch.tensor([token]), anchor + s + 1, False)
            state = reference.block(e, state[None], torch.tensor([anchor + s + 1]), keys, values)[0]
        rounds.append((accepted, known))
        place += accepted + 1
    return rounds


def test_acceptance_is_that_of_a_server_played_out_serially(tiny_checkpoint, store, layer):
    reference = Reference(tiny_checkpoint)
    state = layer.state_dict()
    reference.w |= to_checkpoint(keymap(Checkpoint(tiny_checkpoint).config), state)
    documents = held_out(store, None)
    with torch.no_grad():
        rounds = [pair for i in documents for pair in serve(reference, store[i])]
    at_risk, accepted = np.zeros(DRAFTS), np.zeros(DRAFTS)
    for taken, known in rounds:
        at_risk[: min(taken + 1, known)] += 1
        accepted[:taken] += 1
    through = np.cumprod(accepted / at_risk)
    # drafts must be taken to the end and some refused, or nothing is compared
    assert (accepted > 0).all()
    assert (accepted < at_risk).any()

    arguments = {"tokens_per_batch": 64, "dtype": torch.float32, "device": torch.device("cpu")}
    draft = Draft(layer, TrainConfig(dtype="float32"))
    found = evaluate.measure(draft, store, documents, DRAFTS, **arguments)
    assert found["acceptance_per_position"] == pytest.approx(through.tolist())
    assert found["acceptance_length"] == pytest.approx(1 + through.sum())
    assert found["documents"] == len(documents)
    assert found["tokens"] == int(store.n_loss[documents].sum())
    assert found["drafts"] == at_risk[0]
    assert 1 < found["overlap_acceptance_length"] <= 1 + DRAFTS
    assert found["all_anchors_acceptance_length"] != found["acceptance_length"]

    # one rank or three: the same counts
    shares = []
    for rank in (2, 1):
        ranks = {"rank": rank, "world_size": 3, "add_up": lambda x: shares.append(x) or x}
        evaluate.measure(draft, store, documents, DRAFTS, **arguments, **ranks)
    ranks = {"rank": 0, "world_size": 3, "add_up": lambda x: sum(shares, x)}
    together = evaluate.measure(draft, store, documents, DRAFTS, **arguments, **ranks)
    assert together.keys() == found.keys()
    for key, value in found.items():
        assert together[key] == pytest.approx(value), key


def test_acceptance_is_told_by_source_too(tmp_path, tiny_checkpoint, layer):
    store = open_store(
        write_store(
            tmp_path / "store", tiny_checkpoint, lengths=LENGTHS, held_out_every=1, sources=("a", "b")
        )
    )
    draft = Draft(layer, TrainConfig(dtype="float32"))

    def measure(documents, **ranks):
        return evaluate.measure(
            draft,
            store,
            np.asarray(documents),
            DRAFTS,
            tokens_per_batch=64,
            dtype=torch.float32,
            device=torch.device("cpu"),
            **ranks,
        )

    everything = np.arange(len(store))
    found = measure(everything)
    assert sorted(found["by_source"]) == ["a", "b"]
    for name, one in found["by_source"].items():
        alone = measure(everything[store.source == name])
        assert "by_source" not in alone
        assert one.keys() == alone.keys()
        assert all(one[key] == pytest.approx(value) for key, value in alone.items())
    shares = []
    measure(everything, rank=1, world_size=2, add_up=lambda x: shares.append(x.clone()) or x)
    together = measure(everything, rank=0, world_size=2, add_up=lambda x: x + shares[0])
    for name, one in found["by_source"].items():
        assert all(together["by_source"][name][key] == pytest.approx(value) for key, value in one.items())


RELEASED = "evaluate.checkpoint=released"


@pytest.fixture
def config(tmp_path, tiny_checkpoint, store):
    def make(*overrides):
        given = [f"target.path={tiny_checkpoint}", f"train.store={store.url}", f"run.dir={tmp_path}"]
        return load_config([], [*given, "train.dtype=float32", "train.tokens_per_rank=128", *overrides])

    return make


def test_released_layer_is_measured_and_written_down(tmp_path, config):
    assert "held-out documents" in evaluate.plan(config(RELEASED))
    found = evaluate.run(config("evaluate.max_documents=5", RELEASED))
    assert found["documents"] == 5
    assert len(found["acceptance_per_position"]) == 3
    written = json.loads((tmp_path / "evaluate.released.json").read_text())
    assert written == {"format": 1, **found}


def test_what_does_not_fit_is_refused(tmp_path, tiny_checkpoint, tiny_config, config):
    with pytest.raises(InputError, match="no whole checkpoint"):
        evaluate.run(config())
    with pytest.raises(InputError, match="checkpoint"):
        evaluate.run(config(f"evaluate.checkpoint={tmp_path / 'nowhere'}"))
    with pytest.raises(InputError, match="no checkpoint"):
        evaluate.run(config("target.path=/nowhere", RELEASED))
    other = random_checkpoint(tmp_path / "other", tiny_config, seed=1)
    with pytest.raises(ContractError, match="norm_and_head_sha256"):
        evaluate.run(config(f"target.path={other}", RELEASED))
    trained_on = write_store(tmp_path / "trained", tiny_checkpoint, lengths=[9, 9], held_out_every=100)
    only = open_store(trained_on)
    with pytest.raises(ConfigError, match="no held-out documents"):
        held_out(only, None)
    with pytest.raises(ConfigError, match="index_topk"):
        check_lengths(only, 8)


def test_a_run_keeps_the_held_out_set_it_began_with_and_refuses_another_one(tmp_path, tiny_checkpoint):
    store = write_store(tmp_path / "store", tiny_checkpoint, lengths=[24] * 40)
    words = [f"target.path={tiny_checkpoint}", f"train.store={store}", f"run.dir={tmp_path / 'run'}"]
    words += ["train.dtype=float32", "train.tokens_per_rank=48", "train.max_steps=1", "prompts.held_out=0.2"]
    config = load_config([], words)
    # what the store's writer held out plays no part
    chosen = is_held_out(uid_group(open_store(store).uid), 0.2, 0)
    assert 0 < chosen.sum() != 5
    launch.run(config)
    record = json.loads((tmp_path / "run" / runs.HELD_OUT).read_text())
    assert (record["held_out_documents"], record["training_documents"]) == (chosen.sum(), 40 - chosen.sum())
    assert runs.read_meta(runs.locate(config.run.dir, "last"))["held_out"] == record
    assert evaluate.run(config)["documents"] == chosen.sum()
    assert launch.plan(config).documents == 40 - chosen.sum()

    for other in ("prompts.held_out=0.5", "run.seed=7"):
        changed = load_config([], [*words, other])
        both = is_held_out(uid_group(open_store(store).uid), changed.prompts.held_out, changed.run.seed)
        for verb in (launch.plan, evaluate.plan, evaluate.run):
            with pytest.raises(ConfigError) as caught:
                verb(changed)
            assert f"hold out {both.sum()} of 40 documents" in caught.value.message
            assert f"held out {chosen.sum()}, with 0.2 and 0" in caught.value.message
            assert "prompts.held_out=0.2 run.seed=0" in caught.value.hint

    # the checkpoints know it too
    (tmp_path / "run" / runs.HELD_OUT).unlink()
    with pytest.raises(ConfigError, match="hold out"):
        launch.plan(changed)
    assert open_split(config).held_out.tolist() == chosen.tolist()


def test_a_run_from_before_there_was_a_record_keeps_its_stores_own_split(tmp_path, tiny_checkpoint):
    store = write_store(tmp_path / "store", tiny_checkpoint, lengths=[24] * 16)
    checkpoint = runs.directory(tmp_path / "run") / runs.tag(1)
    checkpoint.mkdir(parents=True)
    (checkpoint / runs.META).write_text(json.dumps({"format": 1, "step": 1, "contract": {}}))
    files = {runs.META: (checkpoint / runs.META).stat().st_size}
    (checkpoint / runs.COMMIT).write_text(json.dumps({"format": 1, "files": files}))
    words = [f"train.store={store}", f"run.dir={tmp_path / 'run'}", "prompts.held_out=0.9"]
    found = open_split(load_config([], words))
    assert found.held_out.tolist() == open_store(store).held_out.tolist()
