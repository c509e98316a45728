"""What vLLM drafts with an exported EAGLE-3 layer is what our layer drafts, token by token.

One process an engine. Legend: T tokens, D hidden_size, K layer inputs.
"""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from export.checkpoint import Checkpoint
from export.eagle3 import export
from pipeline.tiny.write import random_checkpoint
from tests.test_capture import spread_router
from tests.test_eagle3_export import AUX, KEEP, write_draft
from train.model import load_layer
from train.unroll import unroll

DRAFTS, ANSWER, PROMPTS = 3, 24, 10
# a gap between the two best logits below which rounding may decide
TIE = 1e-3


def serve(view: str, draft: str, prompts: list[list[int]], out: str, log: str) -> None:
    """Body of a process: answer one prompt after the other and save every proposal."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model=view,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=1,
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        skip_tokenizer_init=True,
        async_scheduling=False,
        enable_prefix_caching=False,
        speculative_config={"method": "eagle3", "model": draft, "num_speculative_tokens": DRAFTS},
    )
    runner = llm.llm_engine.model_executor.driver_worker.model_runner
    propose, said = runner.propose_draft_token_ids, []

    def record(*args, **kwargs):
        found = propose(*args, **kwargs)
        said.append(torch.as_tensor(found).reshape(-1).tolist())
        return found

    runner.propose_draft_token_ids = record
    sampling = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, detokenize=False)
    results = []
    for ids in prompts:
        said.clear()
        (answer,) = llm.generate([TokensPrompt(prompt_token_ids=ids)], sampling, use_tqdm=False)
        results.append((ids, list(answer.outputs[0].token_ids), [list(x) for x in said]))
    torch.save(results, out)


def draft_with(layer, ids: list[int], aux_TKD: torch.Tensor) -> tuple[list[int], list[float]]:
    """Greedy drafts after `ids` by our layer, and the gaps between the two best logits of each."""
    head = layer.lm_head if layer.own_head is None else layer.own_head.weight
    tokens, gaps = list(ids), []
    for s in range(DRAFTS):
        T = len(tokens)
        padded = torch.zeros(T, *aux_TKD.shape[1:])
        padded[: len(ids) - 1] = aux_TKD[: len(ids) - 1]
        cu = torch.tensor([0, T], dtype=torch.int32)
        anchors = torch.tensor([len(ids) - 2])
        state = unroll(layer, torch.tensor(tokens), padded, cu, s + 1, False, anchors=anchors)[s, 0]
        best = (head @ state).topk(2)
        token = int(best.indices[0])
        tokens.append(token if layer.keep is None else int(layer.keep[token]))
        gaps.append(float(best.values[0] - best.values[1]))
    return tokens[len(ids) :], gaps


@pytest.fixture(scope="module")
def view(tmp_path_factory, tiny_config) -> Path:
    """A V3-shaped target: the generic class, no indexer."""
    folder = tmp_path_factory.mktemp("target")
    config = tiny_config.model_copy(update={"num_hidden_layers": 4})
    return spread_router(random_checkpoint(folder / "tiny", config), folder / "v3")


@pytest.mark.engine
@pytest.mark.parametrize("form", ["frozen head", "pruned head", "fc_norm and post_norm"])
def test_vllm_drafts_what_our_layer_drafts(tmp_path, view, form):
    settings = {
        "frozen head": {},
        "pruned head": {"draft_vocab_size": len(KEEP)},
        "fc_norm and post_norm": {"fc_norm": True, "carry": "post_norm"},
    }[form]
    draft = tmp_path / "draft"
    export(write_draft(tmp_path / "weights", view, **settings), view, draft)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, 512, (12 + n,), generator=generator).tolist() for n in range(PROMPTS)]
    variables = {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    os.environ |= variables
    try:
        process = multiprocessing.get_context("spawn").Process(
            target=serve,
            args=(str(view), str(draft), prompts, str(tmp_path / "out.pt"), str(tmp_path / "log")),
        )
        process.start()
        process.join()
    finally:
        for name in variables:
            os.environ.pop(name)
    assert process.exitcode == 0, (tmp_path / "log").read_text()[-3000:]

    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(view, dtype=torch.float32).eval()
    layer = load_layer(view, weights=draft)
    steps = differ = ties = 0
    with torch.no_grad():
        for ids, answer, said in torch.load(tmp_path / "out.pt"):
            states = model.model(torch.tensor([ids + answer]), output_hidden_states=True).hidden_states
            aux_TKD = torch.stack([states[k][0] for k in AUX], 1)
            known = 1
            for proposal in said:
                if known >= len(answer):
                    break
                ours, gaps = draft_with(layer, ids + answer[:known], aux_TKD)
                for token, wanted, gap in zip(proposal, ours, gaps, strict=True):
                    if token != wanted and gap < TIE:
                        ties += 1
                        break
                    steps += 1
                    differ += token != wanted
                accepted = 0
                while accepted < DRAFTS and answer[known : known + accepted + 1][accepted:] == [
                    proposal[accepted]
                ]:
                    accepted += 1
                known += accepted + 1
    print(f"{form}: {steps} draft steps compared, {differ} differ, {ties} parted at a tie")
    assert steps >= 500
    assert differ == 0
    assert ties < steps / 50
    assert Checkpoint(draft).config["architectures"] == ["Eagle3DeepseekV2ForCausalLM"]
