"""Offline acceptance against a server played out token by token, and what evaluation refuses."""

import itertools
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
from train.batch import held_out, open_split, pack
from train.draft import Draft
from train.loss import HeadLoss
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
    documents = evaluate.read_documents(store, np.flatnonzero(~store.held_out), [0])
    batch = pack(documents, torch.float32, torch.device("cpu"))
    scored = batch.scored(DRAFTS)
    optimizer = torch.optim.Adam([p for n, p in layer.named_parameters() if "indexer" not in n], lr=3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        draft(batch, scored, scored.valid / len(scored.tokens)).loss.backward()
        optimizer.step()
    return layer


def serve(reference, document, drafts=DRAFTS):
    """Play the server: draft with its own tokens, keep what the document says, go on behind the next token.

    Returns the number accepted and the number of known targets of every draft.
    """
    ids, hidden = document.input_ids, document.hidden[:, 0].float()
    carried = reference.start(ids, hidden)
    rounds = []
    place = int(document.loss_mask.nonzero()[0])
    while place + 1 < len(ids):
        known = min(drafts, len(ids) - 1 - place)
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
    played = {}
    for drafts in range(1, DRAFTS + 1):
        with torch.no_grad():
            rounds = [pair for i in documents for pair in serve(reference, store[i], drafts)]
        at_risk, accepted = np.zeros(drafts), np.zeros(drafts)
        for taken, known in rounds:
            at_risk[: min(taken + 1, known)] += 1
            accepted[:taken] += 1
        played[drafts] = np.cumprod(accepted / at_risk)
    # drafts must be taken to the end and some refused, or nothing is compared
    assert (accepted > 0).all()
    assert (accepted < at_risk).any()

    arguments = {"tokens_per_batch": 64, "dtype": torch.float32, "device": torch.device("cpu")}
    draft = Draft(layer, TrainConfig(dtype="float32"))
    found = evaluate.measure(draft, store, documents, DRAFTS, **arguments)
    assert found["acceptance_per_position"] == pytest.approx(played[DRAFTS].tolist())
    assert found["acceptance_length"] == pytest.approx(1 + played[DRAFTS].sum())
    # these texts are what the target says, so that it is the same at both temperatures
    sampled = evaluate.measure(draft, store, documents, 1, num_steps_max=2, text_temperature=1, **arguments)
    expected = [(k, t, 1 + played[k].sum()) for t in (0, 1) for k in (1, 2)]
    rows = [(r["num_steps"], r["temperature"], r["acceptance_length"]) for r in sampled["by_num_steps"]]
    assert np.array(rows) == pytest.approx(np.array(expected))
    assert sampled["acceptance_length"] == pytest.approx(1 + played[1].sum())
    assert found["documents"] == len(documents)
    assert found["tokens"] == int(store.n_loss[documents].sum())
    assert found["drafts"] == at_risk[0]
    assert 1 < found["overlap_acceptance_length"] <= 1 + DRAFTS
    assert found["all_anchors_acceptance_length"] != found["acceptance_length"]
    assert found["low"] < found["acceptance_length"] < found["high"]

    # one rank or three: the same counts
    shares = []
    for rank in (2, 1):
        ranks = {"rank": rank, "world_size": 3, "add_up": lambda x: shares.append(x) or x}
        evaluate.measure(draft, store, documents, DRAFTS, **arguments, **ranks)
    ranks = {"rank": 0, "world_size": 3, "add_up": lambda x: sum(shares, x)}
    together = evaluate.measure(draft, store, documents, DRAFTS, **arguments, **ranks)
    overlap = found["overlap_acceptance_length"]
    assert together == found | {"overlap_acceptance_length": pytest.approx(overlap)}


def walked(taken, mask, bounds, num_steps):
    """Counts of a server's walk, one document after the other, one draft after the other."""
    counts = np.zeros((len(bounds) - 1, 2, num_steps))
    for document, (start, end) in enumerate(itertools.pairwise(bounds)):
        place = start + 1
        while place < end:
            stop = place
            while stop < end and mask[stop]:
                stop += 1
            while place + 1 < stop:
                accepted = 0
                for step in range(min(num_steps, stop - 1 - place)):
                    counts[document, 0, step] += 1
                    if not taken[step, place + 1 + step]:
                        break
                    counts[document, 1, step] += 1
                    accepted += 1
                place += accepted + 1
            place = stop + 1
    return counts


def test_every_number_of_drafts_and_either_temperature_has_a_walk_of_its_own():
    generator = torch.Generator().manual_seed(0)
    lengths, num_steps = [40, 2, 3, 57, 1, 90], 5
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    mask = torch.rand(sum(lengths), generator=generator) < 0.9
    mask[bounds[3] :] = True
    ids = torch.zeros(sum(lengths), dtype=torch.int64)
    batch = evaluate.Packed(ids, mask, bounds, ids, ids)
    scored = batch.scored(num_steps)
    shape = (num_steps, len(scored.tokens))
    agree, hit = (torch.rand(shape, generator=generator) < share for share in (0.8, 0.5))
    overlap = torch.rand(shape, generator=generator)
    found = evaluate.tally(HeadLoss(ids, agree, overlap, overlap, hit), scored, batch)
    for at, said in enumerate((agree, hit)):
        taken = np.zeros((num_steps, len(ids)), bool)
        taken[:, scored.tokens] = said & scored.valid
        for drafts in range(1, num_steps + 1):
            expected = walked(taken, mask.numpy(), bounds.tolist(), drafts)
            assert found.served[:, at, drafts - 1, :, :drafts].tolist() == expected.tolist()
            assert not found.served[:, at, drafts - 1, :, drafts:].any()
    assert found.tokens.tolist() == [int(mask[a:b].sum()) for a, b in itertools.pairwise(bounds.tolist())]
    assert (found.alike[:, 0, 0] >= found.served[:, 0, 0, 0, 0]).all()


def test_acceptance_is_told_by_source_and_by_length(tmp_path, tiny_checkpoint, layer):
    lengths = [140 if n % 4 == 0 else n for n in LENGTHS]
    store = open_store(
        write_store(
            tmp_path / "store", tiny_checkpoint, lengths=lengths, held_out_every=1, sources=("a", "b")
        )
    )
    draft = Draft(layer, TrainConfig(dtype="float32"))

    def measure(documents):
        arguments = {"tokens_per_batch": 64, "dtype": torch.float32, "device": torch.device("cpu")}
        return evaluate.measure(draft, store, np.asarray(documents), DRAFTS, **arguments)

    everything = np.arange(len(store))
    found = measure(everything)
    assert [row["source"] for row in found["by_source"]] == ["a"] * DRAFTS + ["b"] * DRAFTS
    assert [row["length"] for row in found["by_length"]] == ["1-128"] * DRAFTS + ["129-256"] * DRAFTS
    groups = {"source": store.source, "length": np.where(store.length > 128, "129-256", "1-128")}
    for key, kinds in groups.items():
        for kind in set(kinds):
            alone = measure(everything[kinds == kind])["by_num_steps"]
            assert [row | {key: kind} for row in alone] == [r for r in found[f"by_{key}"] if r[key] == kind]


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
    assert written == {"format": 2, **found}
    assert [row["num_steps"] for row in found["by_num_steps"]] == 2 * [1, 2, 3, 4, 5, 6]


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
