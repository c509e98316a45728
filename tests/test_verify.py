"""Serving: what vLLM drafts with the layer, what `verify` measures, and how it compares greedy outputs."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from configs.errors import ConfigError, ContractError, InputError, Layer61Error
from configs.run_dir import META
from configs.schema import RunConfig
from export import nextn
from export.checkpoint import Checkpoint
from export.keymap import DROPPED
from pipeline.cpu_sampling import expand_batch_to_tokens
from pipeline.greedy import compare, noise
from pipeline.measure import read_logits, save_logits
from pipeline.verify import plan, run, verify
from pipeline.view import make_view

NUM_SPECULATIVE_TOKENS = 3


def simple_target(tiny: Path, out: Path, *, rest: float, noise: float) -> Path:
    """A target whose next token depends mostly on the last one, so that drafts are accepted.

    Args:
        tiny: the untrained target to change.
        out: directory to write.
        rest: factor of what attention and feed-forward add; at 0 the next token depends on the last one only,
            and an MTP layer that passes the embedding on is right every time.
        noise: size of the random part of the MTP layer's eh_proj beside that identity.
    """
    shutil.copytree(tiny, out)
    checkpoint = Checkpoint(tiny)
    generator = torch.Generator().manual_seed(5)
    for file in sorted({checkpoint.file(name) for name in checkpoint.names}):
        tensors = {}
        for name in (n for n in checkpoint.names if checkpoint.file(n) == file):
            w = checkpoint.get(name)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                w = w * rest
            elif name.endswith("eh_proj.weight"):
                D = w.shape[0]
                eye = torch.cat([torch.eye(D), torch.zeros(D, D)], 1)
                w = (eye + noise * torch.randn(D, 2 * D, generator=generator) * D**-0.5).to(w.dtype)
            elif rest == 0 and name.endswith("norm.weight"):
                w = torch.ones_like(w)
            tensors[name] = w
        save_file(tensors, out / file)
    return out


def layer_of(source: Path, out: Path) -> Path:
    """The MTP layer of a checkpoint as the trainer would write it."""
    checkpoint = Checkpoint(source)
    out.mkdir()
    tensors = {n: checkpoint.get(n) for n in checkpoint.mtp_names() if not n.endswith(DROPPED)}
    save_file(tensors, out / "model.safetensors")
    return out


def with_working_experts(weights: Path, scaling: float) -> Path:
    """Let the experts of a layer add much that cancels: routed ones take back what the shared one adds."""
    file = weights / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(7)
    # [out, in] matrices whose results are about as large as what they read
    shared = {
        part: torch.randn(shape, generator=generator) * (2 / shape[1]) ** 0.5
        for name, w in tensors.items()
        if ".shared_experts." in name
        for part, shape in ((name.split(".")[-2], w.shape),)
    }
    for name, w in tensors.items():
        if (part := name.split(".")[-2]) in shared:
            routed = ".experts." in name and part == "down_proj"
            tensors[name] = (shared[part] * (-1 / scaling if routed else 1)).to(w.dtype)
    save_file(tensors, file)
    return weights


def random_prompts(number: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    return [draw(2, 512, (int(draw(1, 20, ())),)).tolist() for _ in range(number)]


def record_drafts(target: Path, draft: Path, prompts: list[list[int]], out: Path) -> None:
    """Serve the prompts one by one in fp32 and save everything vLLM's proposer was given and returned."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": ""}
    from vllm import LLM, SamplingParams
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    calls: list[dict[str, torch.Tensor]] = []
    original = SpecDecodeBaseProposer.propose

    def propose(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = {
            "positions": kwargs["target_positions"].clone(),
            "hidden": kwargs["target_hidden_states"].clone(),
            "next": kwargs["next_token_ids"].clone(),
        }
        at = kwargs["token_indices_to_sample"]
        # rows after this one belong to tokens the target refused
        given["last"] = torch.tensor(len(given["positions"]) - 1) if at is None else at[0].clone()
        drafts = original(self, *args, **kwargs)
        calls.append({**given, "drafts": drafts[0].clone()})
        return drafts

    SpecDecodeBaseProposer.propose = propose  # type: ignore[method-assign]
    llm = LLM(
        str(target),
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        kv_cache_memory_bytes=1 << 26,
        speculative_config={
            "method": "mtp",
            "model": str(draft),
            "num_speculative_tokens": NUM_SPECULATIVE_TOKENS,
        },
    )
    served = []
    for prompt in prompts:
        calls.clear()
        sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
        (answer,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        served.append({"tokens": [*prompt, *answer.outputs[0].token_ids], "calls": list(calls)})
    torch.save(served, out)


@pytest.fixture(scope="module")
def served(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Any]]:
    """A target, an exported draft that is not its released layer, and vLLM's drafts with them."""
    folder = tmp_path_factory.mktemp("served")
    target = simple_target(tiny_checkpoint, folder / "target", rest=0.1, noise=0.6)
    other = simple_target(tiny_checkpoint, folder / "other", rest=0.1, noise=0.2)
    draft = folder / "nextn"
    nextn.export(layer_of(other, folder / "weights"), target, draft)
    views = make_view(target, folder / "target-view"), make_view(draft, folder / "draft-view")
    process = multiprocessing.get_context("spawn").Process(
        target=record_drafts, args=(*views, random_prompts(12, seed=1), folder / "served.pt")
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    return target, draft, torch.load(folder / "served.pt")


@pytest.mark.engine
def test_our_layer_drafts_the_tokens_that_vllm_drafts(served):
    from train.model import load_layer
    from train.unroll import unroll

    target, draft, requests = served
    layer = load_layer(target, weights=draft, dtype=torch.float32)
    compared = accepted = 0
    for request in requests:
        tokens = torch.tensor(request["tokens"])
        hidden = torch.zeros(64, layer.dims.hidden_size)
        for call in request["calls"]:
            last = int(call["last"])
            hidden[call["positions"][: last + 1]] = call["hidden"][: last + 1].float()
            n = int(call["positions"][last]) + 1  # states 0..n-1 are the target's, token n was sampled
            if n >= len(tokens):
                continue
            assert tokens[n] == call["next"][0]
            ids = tokens[: n + 1]
            for step, drafted in enumerate(call["drafts"].tolist()):
                padded = torch.cat([ids, ids.new_zeros(1)])  # the predicted token is not read
                states = unroll(
                    layer,
                    padded,
                    hidden[: len(padded)],
                    torch.tensor([0, len(padded)], dtype=torch.int32),
                    num_steps=step + 1,
                )
                logits = states[step, n - 1].detach() @ layer.lm_head.T
                # ties aside: an equally good token
                assert logits.max() - logits[drafted] < 1e-3, (n, step)
                compared += 1
                accepted += n + 1 + step < len(tokens) and bool(tokens[n + 1 + step] == drafted)
                ids = torch.cat([ids, torch.tensor([drafted])])
    # the comparison covers accepted drafts and refused ones
    assert compared > 200
    assert 0.1 < accepted / compared < 0.9


@pytest.fixture(scope="module")
def verified(
    tiny_checkpoint: Path, conversations_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], RunConfig]:
    """`layer61 verify` with a flawless draft beside a mediocre released layer."""
    folder = tmp_path_factory.mktemp("verified")
    target = simple_target(tiny_checkpoint, folder / "target", rest=0, noise=0.5)
    perfect = simple_target(tiny_checkpoint, folder / "perfect", rest=0, noise=0)
    weights = layer_of(perfect, folder / "weights")
    with_working_experts(weights, Checkpoint(target).config["routed_scaling_factor"])
    nextn.export(weights, target, folder / "nextn")
    config = RunConfig.model_validate(
        {
            "run": {"dir": folder / "run"},
            "target": {"path": target},
            "prompts": {"path": conversations_file, "held_out": 0.99},
            "export": {"dir": folder / "nextn"},
            "verify": {
                "max_tokens": 40,
                "temperature": 0.7,
                "num_steps_max": 4,
                "vllm": {"max_num_seqs": 4},
            },
        }
    )
    return run(config), config


@pytest.mark.engine
def test_verify_measures_acceptance_of_the_released_layer_and_the_trained_draft(verified):
    result, config = verified
    after, before = result["after"], result["before"]
    assert after["acceptance_length"] == 1 + NUM_SPECULATIVE_TOKENS
    assert after["acceptance_per_position"] == [1.0] * NUM_SPECULATIVE_TOKENS
    assert 1 < before["acceptance_length"] < 3.5
    assert before["acceptance_length"] == pytest.approx(1 + sum(before["acceptance_per_position"]))
    assert before["num_drafts"] > after["num_drafts"]
    assert result["num_prompts"] == 6
    for figures in (after, before):
        counts = {k: figures["greedy"][k] for k in ("requests", "equal", "ties", "different")}
        assert counts == {"requests": 6, "equal": 6, "ties": 0, "different": 0}
        # what is sampled is not what is most likely: the same draft is right less often
        assert figures["sampled"]["temperature"] == 0.7
        assert 1 <= figures["sampled"]["acceptance_length"] < figures["acceptance_length"]
        # three draft tokens were counted and so were four; one and two are estimated from the three
        rows = {(row["num_steps"], row["temperature"]): row for row in figures["by_num_steps"]}
        assert list(rows) == [(k, t) for t in (0, 0.7) for k in (1, 2, 3, 4)]
        assert rows[3, 0]["acceptance_length"] == pytest.approx(figures["acceptance_length"])
        assert rows[3, 0.7]["acceptance_length"] == pytest.approx(figures["sampled"]["acceptance_length"])
        assert all(row["documents"] == 6 and row["low"] <= row["high"] for row in rows.values())
        assert {row["source"] for row in figures["by_source"]} == {config.prompts.path.name}
        timed = {(row["num_steps"], row["concurrency"]) for row in figures["speedup"]}
        assert timed == {(k, c) for k in (1, 2, 3, 4) for c in (1, 4)}
    assert [row["acceptance_length"] for row in after["by_num_steps"][2:4]] == [4, 5]
    estimated = [row["acceptance_length"] for row in after["by_num_steps"][:2]]
    assert estimated == pytest.approx([2, 3], abs=0.2)
    assert result["recommendation"] == after["recommendation"]
    assert "trained" in result["recommendation"]
    assert result["plain"]["noise"]["tokens"] > 50
    assert json.loads((config.run.dir / "verify.json").read_text()) == result
    assert "serve 6 (" in plan(config)


@pytest.mark.engine
def test_answers_are_shown_with_what_was_drafted_and_taken(verified):
    result, config = verified
    assert len(result["samples"]) == 4
    outputs = json.loads((config.run.dir / "verify/plain.json").read_text())["result"]["rounds"][0]["greedy"]
    tokenizer = AutoTokenizer.from_pretrained(config.target.path)
    for sample, tokens in zip(result["samples"], outputs["outputs"], strict=False):
        for name, pieces in sample["drafts"].items():
            # without the refused drafts it is the answer, whoever drafted
            taken = "".join(piece["text"] for piece in pieces if piece["kind"] != "rejected")
            # half a letter at its end is left out
            assert taken == tokenizer.decode(tokens).rstrip("\ufffd")
            assert ("rejected" in {piece["kind"] for piece in pieces}) == (name == "released")
        assert sample["prompt"]
        assert sample["uid"].isdigit()


@pytest.mark.engine
def test_verify_resumes_from_finished_measurements(verified):
    result, config = verified
    folder = config.run.dir / "verify"
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert run(config) == result
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    # a measurement of other settings does not count: this one has to start an engine, which fails
    settings = config.verify.model_copy(update={"vllm": {"no_such_argument": 1}})
    with pytest.raises(Layer61Error, match="no_such_argument"):
        run(config.model_copy(update={"verify": settings}))
    assert json.loads((folder / "plain.json").read_text())["result"]["rounds"]


def test_values_of_requests_are_repeated_for_their_drafted_tokens():
    ends = torch.tensor([2, 5, 6], dtype=torch.int32)
    found = expand_batch_to_tokens(torch.tensor([0.7, 0.0, 2.0]), ends, 6, replace_from=0, replace_to=1)
    assert found.tolist() == torch.tensor([0.7, 0.7, 1, 1, 1, 2]).tolist()
    assert expand_batch_to_tokens(torch.tensor([5, 50, 500]), ends, 6).tolist() == [5, 5, 50, 50, 50, 500]


def damaged_draft(draft: Path, target: Path, folder: Path, damage: str) -> Path:
    """The export of a layer with one expert exchanged (`expert`) or half of the last norm scaled (`norm`)."""
    out = folder / f"weights-{damage}"
    shutil.copytree(draft, out, ignore=shutil.ignore_patterns(META))
    checkpoint = Checkpoint(out)
    for file in sorted({checkpoint.file(name) for name in checkpoint.names}):
        names = [name for name in checkpoint.names if checkpoint.file(name) == file]
        tensors = {name: checkpoint.get(name, raw=True).clone() for name in names}
        for name in names:
            if damage == "norm" and name.endswith("shared_head.norm.weight"):
                tensors[name][: len(tensors[name]) // 2] *= 8
            if damage == "expert" and ".experts.0." in name:
                other = name.replace(".experts.0.", ".shared_experts.")
                tensors[name], tensors[other] = tensors[other], tensors[name]
        save_file(tensors, out / file, metadata={"format": "pt"})
    nextn.export(out, target, folder / f"nextn-{damage}")
    return folder / f"nextn-{damage}"


@pytest.mark.engine
def test_a_damaged_draft_is_seen_and_costs_one_engine(verified, tmp_path):
    result, config = verified
    folder = config.run.dir / "verify"
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    # an engine for the target alone, one for each of two drafts; each writes a log as it starts
    assert len([p for p in before if p.suffix == ".log"]) == 3
    damaged = [
        str(damaged_draft(config.export_dir, config.target.path, tmp_path, kind))
        for kind in ("expert", "norm")
    ]
    drafts = {"drafts": ("trained", *damaged, "released")}
    again = run(config.model_copy(update={"verify": config.verify.model_copy(update=drafts)}))
    assert {name: again["drafts"][name] for name in result["drafts"]} == result["drafts"]
    # one more log and one more measurement each, all others as they were
    after = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert {p: after[p] for p in before} == before
    assert len(after) == len(before) + 4
    for name in damaged:
        figures = again["drafts"][name]
        assert figures["acceptance_length"] < 0.8 * result["after"]["acceptance_length"]
        assert figures["high"] < result["after"]["low"]
        assert (figures["greedy"]["equal"], figures["greedy"]["different"]) == (6, 0)


@pytest.mark.engine
def test_verify_refuses_what_cannot_be_served(verified, tiny_checkpoint, tmp_path):
    _, config = verified
    target, draft, prompts = config.target.path, config.export_dir, [[5, 6, 7]]
    nextn.export(draft, target, tmp_path / "legacy", layout="sglang-legacy")
    with pytest.raises(InputError, match="is not a vLLM draft"):
        verify(target, {"a": tmp_path / "legacy"}, prompts)
    shutil.copytree(draft, tmp_path / "eagle3/nextn")
    with pytest.raises(ConfigError, match="eagle"):
        verify(target, {"a": tmp_path / "eagle3/nextn"}, prompts)
    with pytest.raises(InputError, match="no held-out conversation"):
        verify(target, {"a": draft}, [])
    with pytest.raises(InputError, match="prompt 0 is empty"):
        verify(target, {"a": draft}, [[]])
    with pytest.raises(InputError, match="V3 view"):
        verify(target, {"a": draft}, [[5] * Checkpoint(target).config["index_topk"]], view="v3")
    other = simple_target(tiny_checkpoint, tmp_path / "other", rest=0, noise=0)
    (other / "config.json").write_text(json.dumps({**Checkpoint(target).config, "rope_theta": 20000}))
    with pytest.raises(ContractError, match=r"target\.config_sha256"):
        verify(other, {"a": draft}, prompts)
    missing = config.model_copy(
        update={"export": config.export.model_copy(update={"dir": tmp_path / "none"})}
    )
    assert "not yet: there is no" in plan(missing)
    with pytest.raises(InputError, match="no export"):
        run(missing)


def test_kept_logits_are_found_where_outputs_diverge(tmp_path):
    plain, draft = [[1, 2, 3], [4], [5, 6]], [[1, 2, 3], [4, 9], [5, 7]]
    steps = [
        {token: float(token), token + 10: 0.5, **dict.fromkeys(range(100, 130), -1.0)}
        for token in range(1, 7)
    ]
    save_logits(tmp_path / "kept.npz", steps)
    # the second request goes on where the target had ended: it has no logit there
    found = read_logits(tmp_path / "kept.npz", plain, draft)
    assert list(found) == [(2, 1)]
    assert {token: found[2, 1][token] for token in (6, 16)} == {6: 6.0, 16: 0.5}
    assert len(found[2, 1]) == 20


def test_divergences_are_ties_up_to_the_dtype_and_the_targets_own_noise():
    plain = [[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2], [4, 4]]
    draft = [[1, 2, 3], [1, 9, 9], [1, 9, 3], [1, 2, 3], [4, 8]]
    # at 4.0 a bfloat16 step is 4 * 2**-7
    logits = {
        (1, 1): {2: 4.0, 9: 4.0 - 2 * 4 * 2**-7},
        (2, 1): {2: 4.0, 9: 4.0 - 3 * 4 * 2**-7},
        (4, 1): {4: 2.0, 5: 1.0},
    }

    def found(largest_noise: float) -> dict[str, Any]:
        return compare(plain, draft, logits, eps=torch.finfo(torch.bfloat16).eps, largest_noise=largest_noise)

    exact = found(0.0)
    assert (exact["requests"], exact["equal"], exact["ties"], exact["different"]) == (5, 1, 1, 3)
    assert [e["steps"] for e in exact["diverged"]] == [2.0, 3.0, None, None]
    assert [e["position"] for e in exact["diverged"]] == [1, 1, 2, 1]
    assert (found(0.1)["ties"], found(0.1)["different"]) == (2, 2)


def test_noise_is_the_largest_change_of_a_distance():
    written = {1: 5.0, 2: 4.5, 3: 1.0}
    pairs = [(written, {1: 5.1, 2: 4.6}), (written, {1: 4.0, 2: 4.25, 7: 1.0}), (written, {9: 3.0, 1: 2.0})]
    measured = noise(pairs)
    assert measured["largest"] == 0.75
    assert (measured["tokens"], measured["flipped"]) == (2, 2)
    assert noise([])["largest"] == 0
