"""Capture against transformers; the end of an answer, little memory, and states that are not finite.

One process per engine; every assertion about it stands in this one. Legend: T tokens, D hidden_size.
"""

import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import BadStatesError, CaptureError
from configs.files import read_json, write_json
from configs.schema import PromptsConfig
from featurestore import held_documents, open_store, part_exists, publish
from pipeline.capture import driver
from pipeline.capture.engine import EngineSettings, PartResult, Refused
from pipeline.capture.plugin import CAPTURE_VARIABLE
from pipeline.capture.probe import check_states
from pipeline.capture.process import ENVIRONMENT, Capture
from pipeline.capture.vllm_engine import Engine
from pipeline.capture.writers import digest
from pipeline.prompts import Document, Turns, load_prompts
from pipeline.view import make_view

pytestmark = pytest.mark.engine

LENGTH = 256
ANSWER = 24
# beside the state after the final norm, what enters the second of the two layers
STATES = [{"site": "layer_input", "layer": 1}, {"site": "post_norm", "layer": 2}]
# what follows an answer, up to where the next one begins
QUESTION = np.arange(20, 32, dtype=np.uint32)
# relative error of a row: one rounding to bf16 moves each value by at most 2**-8 of itself
ROUNDING = 2**-8


def spread_router(source: Path, out: Path) -> Path:
    """A view of the untrained target whose experts differ enough for a router to choose clearly."""
    view = make_view(source, out)
    generator = torch.Generator().manual_seed(3)
    for path in sorted(view.glob("*.safetensors")):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("mlp.gate.weight"):
                tensor += (
                    torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * tensor.shape[1] ** -0.5
                )
        path.unlink()
        save_file(tensors, path, metadata={"format": "pt"})
    return view


def turns(stop_ids: tuple[int, ...]) -> Turns:
    return Turns(None, None, stop_ids, LENGTH, ANSWER)


def settings(view: Path, folder: Path, dtype: str) -> EngineSettings:
    """One document a step, room for two in the cache, and writers that take one document at a time."""
    return EngineSettings(
        model=str(view),
        tensor_parallel_size=1,
        seed=0,
        turns=turns(()),
        store=str(folder / "store"),
        contract={"test": dtype, "states": STATES},
        compression="none",
        writer_threads=3,
        queue_bytes=1,
        log=str(folder / "engine.log"),
        vllm={"dtype": dtype, "max_num_seqs": 8, "kv_cache_memory_bytes": 3 << 20},
    )


def drive(
    view: Path,
    folder: Path,
    dtype: str,
    given: list[Document],
    asked: list[Document] = (),
    reasoned: list[Document] = (),
) -> None:
    """Body of a process: capture given and written answers, and save what the routers chose for the given."""
    output = os.open(folder / "engine.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    engine = Engine(settings(view, folder, dtype))
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    model = engine.engine.model_executor.driver_worker.model_runner.model
    logits: dict[str, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_hook(
            lambda _, inputs, out, name=name: logits.setdefault(name, []).append(
                (out[0] if isinstance(out, tuple) else out).float()
            )
        )
        for name, module in model.named_modules()
        if name.endswith("mlp.gate")
    ]
    for i, document in enumerate(given):
        capture(engine, f"given-{i}", [document])
    torch.save(logits, folder / "logits.pt")
    for hook in hooks:
        hook.remove()
    if not asked:
        return
    first = capture(engine, "free", asked)
    assert isinstance(first, PartResult)
    assert (first.documents, first.rejected) == (len(asked), {})
    publish(engine.settings.store)
    store = open_store(engine.settings.store)
    prompt = len(asked[0].input_ids)
    free = next(store[i] for i in range(len(store)) if store[i].uid == asked[0].uid)
    # an end token in the middle of the first answer
    stop = int(free.input_ids[prompt + ANSWER // 2])
    engine.settings = replace(engine.settings, turns=turns((stop,)), store=str(folder / "stopped"))
    engine._stop = frozenset((stop,))
    capture(engine, "stopped", asked)
    publish(engine.settings.store)
    engine.settings = replace(engine.settings, store=str(folder / "turns"))
    result = capture(engine, "turns", [replace(d, turns=(QUESTION,)) for d in asked])
    assert isinstance(result, PartResult)
    assert (result.documents, result.rejected) == (len(asked), {})
    publish(engine.settings.store)
    np.savez(folder / "probe.npz", states=engine.probe(given[0].input_ids), stop=stop)
    reason(engine, folder, reasoned)

    engine.settings = replace(engine.settings, store=str(folder / "broken"))
    # one document comes back as another one than was sent, and one with a state that is not finite
    expected, swapped = driver.digest, digest(given[1].input_ids.tolist())
    driver.digest = lambda ids: expected(ids) ^ (expected(ids) == swapped)
    writers = get_kv_transfer_group().writers
    check = writers._check
    writers._check = lambda job: spoil(check, job, given[3].uid)
    result = capture(engine, "some", given)
    assert isinstance(result, PartResult)
    publish(engine.settings.store)
    write_json(folder / "some.json", {str(k): v for k, v in result.rejected.items()})
    driver.digest, writers._check = expected, check
    # and an engine all of whose states are bad
    model.model.norm.weight.data[0] = float("nan")
    try:
        capture(engine, "broken", given)
    except BadStatesError as error:
        (folder / "broken.txt").write_text(str(error))


def reason(engine: Engine, folder: Path, documents: list[Document]) -> None:
    """Capture conversations with reasoning turn by turn, then all of each document as if it were given."""
    think = int(documents[0].input_ids[-1])
    engine.settings = replace(engine.settings, store=str(folder / "long"), turns=turns(()))
    engine._stop = frozenset()
    capture(engine, "long", documents)
    publish(engine.settings.store)
    longer = next(d for d in documents if d.turns)
    answer = by_uid(folder / "long")[longer.uid].input_ids[len(longer.input_ids) :].tolist()
    # the untrained target writes no marks: two tokens of its answer pass for them, where it has so many
    end_think, stop = answer[0], next(t for t in reversed(answer) if t != answer[0])
    marks = Turns(think, end_think, (stop,), LENGTH, ANSWER)
    engine.settings = replace(engine.settings, store=str(folder / "reasoned"), turns=marks)
    engine._stop = frozenset((stop,))
    result = capture(engine, "reasoned", documents)
    assert isinstance(result, PartResult)
    publish(engine.settings.store)
    stored = by_uid(folder / "reasoned")
    assert (result.documents, result.rejected) == (len(stored), {})
    whole = [
        Document(uid, np.asarray(d.input_ids, np.uint32), ((0, None),), 0, "", 0, "", "")
        for uid, d in stored.items()
    ]
    engine.settings = replace(engine.settings, store=str(folder / "again"))
    capture(engine, "again", whole)
    publish(engine.settings.store)
    np.savez(folder / "marks.npz", end_think=end_think, stop=stop)


def capture(engine: Engine, name: str, documents: list[Document]) -> PartResult | Refused:
    """Let the engine take a part and step until it is done."""
    ended = engine.open(name, documents, {})
    found = [ended] if ended is not None else []
    while not found:
        found = engine.step()[1]
    return found[0]


def spoil(check, job, uid: int):
    if job.document["uid"] == uid:
        job.hidden_TSD = job.hidden_TSD.clone()
        job.hidden_TSD[2] = float("inf")
    return check(job)


@pytest.fixture(scope="module")
def view(tmp_path_factory, tiny_checkpoint) -> Path:
    return spread_router(tiny_checkpoint, tmp_path_factory.mktemp("view") / "v3")


@pytest.fixture(scope="module")
def documents(conversations_file, tiny_checkpoint) -> dict[str, list[Document]]:
    def load(**values) -> list[Document]:
        config = PromptsConfig(path=conversations_file, max_length=LENGTH, max_answer_tokens=ANSWER, **values)
        return sorted(load_prompts(config, tiny_checkpoint).documents, key=lambda d: len(d.input_ids))

    every = load(answers="every", thinking="on")
    return {"given": load(answers="given"), "asked": load(answers="target"), "reasoned": every}


def captured(view: Path, folder: Path, dtype: str, **documents: list[Document]) -> Path:
    os.environ |= {k: v for k, v in ENVIRONMENT.items() if k not in os.environ}
    try:
        process = multiprocessing.get_context("spawn").Process(
            target=drive, args=(view, folder, dtype), kwargs=documents
        )
        process.start()
        process.join()
    finally:
        for name in ENVIRONMENT:
            if name != "OMP_NUM_THREADS":
                os.environ.pop(name, None)
    assert process.exitcode == 0, (folder / "engine.log").read_text()[-3000:]
    return folder


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory, view, documents) -> Path:
    return captured(view, tmp_path_factory.mktemp("bf16"), "bfloat16", **documents)


@pytest.fixture(scope="module")
def float32(tmp_path_factory, view, documents) -> Path:
    return captured(view, tmp_path_factory.mktemp("fp32"), "float32", given=documents["given"])


def by_uid(path: Path) -> dict[int, object]:
    store = open_store(path)
    return {store[i].uid: store[i] for i in range(len(store))}


def choose(logits: torch.Tensor, bias: torch.Tensor, config) -> torch.Tensor:
    """Experts [T, K] in ascending order, by noaux_tc: first the best groups, then the best in them."""
    scores = logits.sigmoid() + bias
    grouped = scores.view(len(scores), config.n_group, -1)
    groups = grouped.topk(2, -1).values.sum(-1).topk(config.topk_group, -1).indices
    allowed = torch.zeros(len(scores), config.n_group, 1, dtype=torch.bool).scatter_(
        1, groups[..., None], True
    )
    kept = grouped.masked_fill(~allowed, -torch.inf).flatten(1)
    return kept.topk(config.num_experts_per_tok, -1).indices.sort(-1).values


class Comparison:
    """Stored states of the given answers beside those of transformers in float32, token by token."""

    def __init__(self, view: Path, documents: list[Document], folder: Path) -> None:
        from transformers import DeepseekV3ForCausalLM

        model = DeepseekV3ForCausalLM.from_pretrained(view, dtype=torch.float32).eval()
        gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
        wanted: list[torch.Tensor] = []
        for gate in gates:
            gate.register_forward_hook(lambda _, inputs, out: wanted.append(out[-1].sort(-1).values))
        for i in range(len(documents)):
            assert part_exists(folder / "store", f"given-{i}")
        publish(folder / "store")
        stored = by_uid(folder / "store")
        logits = list(torch.load(folder / "logits.pt").values())
        error, same = [], []
        for i, document in enumerate(documents):
            found = stored[document.uid]
            ids = torch.from_numpy(document.input_ids.astype(np.int64))
            assert torch.equal(found.input_ids, ids)
            assert found.hidden.dtype == torch.bfloat16
            wanted.clear()
            with torch.no_grad():
                output = model.model(ids[None], output_hidden_states=True)
                expected_TSD = torch.stack([output.hidden_states[1][0], output.last_hidden_state[0]], 1)
            chosen = [
                choose(per_gate[i][: len(ids)], gate.e_score_correction_bias, model.config)
                for per_gate, gate in zip(logits, gates, strict=True)
            ]
            same.append(torch.stack([(a == b).all(-1) for a, b in zip(chosen, wanted, strict=True)]).all(0))
            difference_TSD = found.hidden.float() - expected_TSD
            error.append(difference_TSD.norm(dim=-1) / expected_TSD.norm(dim=-1))
        self.error_TS, self.same_T = torch.cat(error), torch.cat(same)
        self.flipped = 1 - self.same_T.float().mean().item()

    def report(self, name: str) -> None:
        agreeing = self.error_TS[self.same_T]
        print(
            f"{name}: routers choose differently on {self.flipped:.2%} of {len(self.same_T)} tokens; error of"
            f" the rest: median {agreeing.median():.2e}, largest {agreeing.max():.2e}"
        )


def test_states_of_a_float32_engine_are_the_reference_rounded_to_bf16(view, documents, float32):
    found = Comparison(view, documents["given"], float32)
    found.report("float32 engine")
    assert found.flipped < 0.01
    assert found.error_TS[found.same_T].max() < ROUNDING


def test_states_of_the_bf16_engine_are_the_reference_where_the_routers_agree(view, documents, bfloat16):
    found = Comparison(view, documents["given"], bfloat16)
    found.report("bfloat16 engine")
    # every product and sum on the way is rounded, not only the state; a wrong state is off by about one
    assert found.flipped < 0.1
    assert found.error_TS[found.same_T].max() < 12 * ROUNDING


def test_an_answer_is_stored_with_its_end_token_and_a_state_for_it(documents, bfloat16):
    stop = int(np.load(bfloat16 / "probe.npz")["stop"])
    free, stopped = by_uid(bfloat16 / "store"), by_uid(bfloat16 / "stopped")
    ended = 0
    for asked in documents["asked"]:
        prompt = len(asked.input_ids)
        long, short = free[asked.uid], stopped[asked.uid]
        answer = long.input_ids[prompt:]
        assert torch.equal(long.input_ids[:prompt], torch.from_numpy(asked.input_ids.astype(np.int64)))
        assert len(answer) == asked.answer_tokens
        places = (answer == stop).nonzero()
        length = prompt + (int(places[0]) + 1 if len(places) else len(answer))
        ended += bool(len(places))
        # tokens and rows up to the end token and no further, each row the one of the longer answer
        assert torch.equal(short.input_ids, long.input_ids[:length])
        assert len(short.hidden) == length
        error = (short.hidden.float() - long.hidden[:length].float()).norm(dim=-1)
        assert (error / long.hidden[:length].float().norm(dim=-1)).max() < 0.1
        # only what the target wrote counts, its end token included
        assert short.loss_mask.tolist() == [i >= prompt for i in range(length)]
    assert ended > 0


def test_each_answer_of_a_conversation_is_written_in_the_context_of_earlier_ones(documents, bfloat16):
    """An answer without an end is the last; all that the target wrote counts, with the context's states."""
    stop = int(np.load(bfloat16 / "probe.npz")["stop"])
    stopped, turned = by_uid(bfloat16 / "stopped"), by_uid(bfloat16 / "turns")
    went_on = 0
    for asked in documents["asked"]:
        first, whole = stopped[asked.uid].input_ids, turned[asked.uid]
        assert torch.equal(whole.input_ids[: len(first)], first)
        mask = [i >= len(asked.input_ids) for i in range(len(first))]
        if first[-1] == stop:
            went_on += 1
            behind = whole.input_ids[len(first) :]
            assert behind[: len(QUESTION)].tolist() == QUESTION.tolist()
            answer = behind[len(QUESTION) :]
            assert 0 < len(answer) <= ANSWER
            assert stop not in answer[:-1].tolist()
            mask += [False] * len(QUESTION) + [True] * len(answer)
        assert whole.loss_mask.tolist() == mask
        assert len(whole.hidden) == len(whole.input_ids) == len(mask)
        # computed at once here and token by token there: a router may choose otherwise now and then
        again, before = whole.hidden[: len(first)], stopped[asked.uid].hidden
        check_states(again.view(torch.uint16).numpy(), before.view(torch.uint16).numpy(), "the engine's log")
    assert went_on > 0


def test_each_turn_with_reasoning_is_a_document_whose_context_holds_no_earlier_reasoning(documents, bfloat16):
    """As a server shows earlier answers to the target: from the end of their reasoning on."""
    marks = np.load(bfloat16 / "marks.npz")
    end_think, stop = int(marks["end_think"]), int(marks["stop"])
    stored, again = by_uid(bfloat16 / "reasoned"), by_uid(bfloat16 / "again")
    went_on, expected = 0, set()
    for asked in documents["reasoned"]:
        prompt, later = asked.input_ids.tolist(), zip(asked.turns, asked.turn_uids, strict=True)
        uid = asked.uid
        while True:
            expected.add(uid)
            found = stored[uid]
            assert found.input_ids[: len(prompt)].tolist() == prompt
            answer = found.input_ids[len(prompt) :].tolist()
            assert 0 < len(answer) <= ANSWER
            assert stop not in answer[:-1]
            assert found.loss_mask.tolist() == [False] * len(prompt) + [True] * len(answer)
            states, once = (d.hidden.view(torch.uint16).numpy() for d in (found, again[uid]))
            check_states(states, once, "the engine's log")
            following = next(later, None)
            if following is None or answer[-1] != stop or end_think not in answer:
                break
            went_on += 1
            prompt = [*prompt[:-1], *answer[answer.index(end_think) :], *following[0].tolist()]
            uid = following[1]
    assert stored.keys() == expected
    assert went_on > 0


def test_greedy_answers_follow_from_the_stored_states(view, documents, bfloat16):
    """The state of a token predicts the next one through the head: rows are not shifted."""
    from export.checkpoint import Checkpoint

    head = Checkpoint(view).get("lm_head.weight", dtype=torch.float32)
    agree = []
    for asked in documents["asked"]:
        found = by_uid(bfloat16 / "store")[asked.uid]
        prompt = len(asked.input_ids)
        predicted = (found.hidden[prompt - 1 : -1, -1].float() @ head.T).argmax(-1)
        agree.append(predicted == found.input_ids[prompt:])
    assert torch.cat(agree).float().mean() > 0.95


def test_the_probe_is_the_stored_document(documents, bfloat16):
    probe = np.load(bfloat16 / "probe.npz")["states"]
    found = by_uid(bfloat16 / "store")[documents["given"][0].uid]
    assert np.array_equal(probe, found.hidden.view(torch.uint16).numpy())


def test_a_bad_document_is_left_out_and_the_others_are_kept(documents, bfloat16):
    """Also one whose ids differ, which is noticed when it stands in the part already."""
    given = documents["given"]
    rejected = {int(uid): reason for uid, reason in read_json(bfloat16 / "some.json").items()}
    assert set(rejected) == {given[1].uid, given[3].uid}
    assert "ids differ" in rejected[given[1].uid]
    assert rejected[given[3].uid] == "the state of token 2 is not finite"
    stored = by_uid(bfloat16 / "broken")
    assert set(stored) == {d.uid for d in given} - set(rejected)
    whole = by_uid(bfloat16 / "store")
    for uid, document in stored.items():
        assert torch.equal(document.input_ids, whole[uid].input_ids)
        error = (document.hidden.float() - whole[uid].hidden.float()).norm(dim=-1)
        assert (error / whole[uid].hidden.float().norm(dim=-1)).median() < ROUNDING
    assert open_store(bfloat16 / "broken").verify() == []
    # they are known to be bad, and so done
    uids, known = held_documents(bfloat16 / "broken")
    assert (set(uids.tolist()), known) == (set(stored), rejected)


def test_an_engine_whose_states_are_all_bad_commits_nothing(bfloat16):
    text = (bfloat16 / "broken.txt").read_text()
    assert "documents came back wrong, more than dump.max_bad_share = 0.01" in text
    assert "the state of token 0 is not finite" in text
    assert not part_exists(bfloat16 / "broken", "broken")


def test_the_plugin_is_found_and_leaves_the_models_alone_unless_a_capture_asks():
    (entry,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "layer61"]
    assert entry.value == "pipeline.capture.plugin:register"
    code = (
        "from pipeline.capture import plugin; plugin.register(); from vllm import ModelRegistry;"
        "print(ModelRegistry.models['DeepseekV3ForCausalLM'].module_name)"
    )
    for asked in ("0", "1"):
        environment = os.environ | {CAPTURE_VARIABLE: asked}
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True
        )
        assert (done.stdout.split()[-1] == "pipeline.capture.model") == (asked == "1"), done.stdout


def test_an_engine_that_does_not_start_names_its_log(tmp_path, tiny_checkpoint):
    with pytest.raises(CaptureError) as caught:
        Capture(replace(settings(tmp_path / "absent", tmp_path, "auto"), model=str(tmp_path / "absent")))
    assert str(tmp_path / "engine.log") in str(caught.value)
