"""Which objective serves best: `python -m benchmarks.objectives STORE TARGET [--seeds 0 1 2] [--steps 40]`.

Trains the target's released MTP layer from the same start, on the same batches, for equally many steps: under
each loss of `train.loss` with the unroll as served, and under `kl` and `ce` with FastMTP's unroll, in which a
step attends to the states of its own step at all places: another function than the served one.
The offline evaluator then measures each as a server would. A seed decides the order of the documents; every
objective sees the same seeds.

Prints a table of means and spreads over the seeds and, as its last line, one JSON object.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from configs.provenance import versions
from configs.schema import TrainConfig
from featurestore import FeatureStore, Loader, open_store
from train.attention import per_row
from train.batch import Packed, pack
from train.draft import Draft
from train.evaluate import measure
from train.loss import HeadLoss, head_loss
from train.model import load_layer
from train.mtp import MTPLayer
from train.plan import is_frozen
from train.trainer import learning_rate
from train.unroll import Scored

# of every training that is compared, here and in `benchmarks.sparse`
SETTINGS = {
    "dtype": "float32",
    "num_steps": 3,
    "step_decay": 1.0,
    "tokens_per_rank": 2048,
    "learning_rate": 2e-3,
    "warmup_steps": 5,
}
# name -> (loss, unroll)
OBJECTIVES = {
    **{loss: (loss, "served") for loss in ("kl", "ce", "lk_alpha", "lk_lambda", "tv")},
    "kl, FastMTP's unroll": ("kl", "fastmtp"),
    "ce, FastMTP's unroll": ("ce", "fastmtp"),
}


def fastmtp_unroll(
    layer: MTPLayer, input_ids: Tensor, hidden: Tensor, cu_seqlens: Tensor, num_steps: int
) -> Tensor:
    """Each step over all places, attending to its own step's keys; states [S, T, D] (arXiv 2509.18362)."""
    T = len(input_ids)
    every = torch.arange(T)
    positions = every - per_row(cu_seqlens[:-1], cu_seqlens, T)
    carried = layer.start(hidden)
    states = []
    for s in range(num_steps):
        masked = positions == 0 if s == 0 else None
        x_TD, attended_TD = layer.enter(input_ids[(every + s + 1).clamp(max=T - 1)], carried, masked)
        x_TD = x_TD + layer.self_attn(attended_TD, positions + s, cu_seqlens)
        x_TD = x_TD + layer.mlp(layer.post_attention_layernorm(x_TD))
        state, carried = layer.leave(x_TD)
        states.append(state)
    return torch.stack(states)


class FastMTP(Draft):
    """`Draft` with the other unroll."""

    def forward(self, batch: Packed, scored: Scored, weights_SM: Tensor) -> HeadLoss:
        states = fastmtp_unroll(
            self.layer, batch.input_ids, batch.hidden, batch.cu_seqlens, len(scored.place)
        )
        return head_loss(
            scored.students(states[:, scored.anchors]),
            batch.hidden[scored.teacher],
            self.layer.lm_head,
            loss=self.train_config.loss,
            weights=weights_SM,
            targets=batch.input_ids[scored.tokens],
        )


def trained(
    draft: Draft, store: FeatureStore, train: TrainConfig, seed: int, steps: int
) -> tuple[float, float]:
    """Train a draft in place; returns the first and the last step's loss."""
    for name, parameter in draft.layer.named_parameters():
        parameter.requires_grad_(not is_frozen(name, train))
    parameters = [p for p in draft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(train.beta1, train.beta2), weight_decay=0.0, fused=True)
    losses: list[float] = []
    with Loader(store, train.tokens_per_rank, seed=seed) as loader:
        for step in range(steps):
            batch = pack(next(loader), torch.float32, torch.device("cpu"))
            scored = batch.scored(train.num_steps)
            counts = scored.valid.sum(1, keepdim=True).clamp(min=1)
            found = draft(batch, scored, (scored.valid / (counts * train.num_steps)).float())
            loss = found.loss
            (loss if found.indexer is None else loss + train.indexer_loss_weight * found.indexer).backward()
            torch.nn.utils.clip_grad_norm_(parameters, train.gradient_clipping)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(train, step, steps)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return losses[0], losses[-1]


def acceptance(draft: Draft, store: FeatureStore, train: TrainConfig) -> dict[str, Any]:
    """The layer as it is served, on all held-out documents."""
    served = Draft(draft.layer, train)
    return measure(
        served,
        store,
        np.flatnonzero(store.held_out),
        train.num_steps,
        tokens_per_batch=train.tokens_per_rank,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", nargs="*", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    args = parser.parse_args()
    store = open_store(args.store)
    greedy: dict[str, list[float]] = {}
    sampled: dict[str, list[float]] = {}
    console = Console(stderr=True)

    def note(name: str, found: dict[str, Any], said: str) -> None:
        greedy.setdefault(name, []).append(found["acceptance_length"])
        sampled.setdefault(name, []).append(found["overlap_acceptance_length"])
        console.print(
            f"{name}: {said}, acceptance length {greedy[name][-1]:.3f}, sampled {sampled[name][-1]:.3f}"
        )

    base = TrainConfig.model_validate(SETTINGS)
    note("released", acceptance(Draft(load_layer(args.target), base), store, base), "not trained")
    for seed in args.seeds:
        for name in args.only:
            loss, form = OBJECTIVES[name]
            train = TrainConfig.model_validate({**SETTINGS, "loss": loss})
            draft = (Draft if form == "served" else FastMTP)(load_layer(args.target), train)
            began = time.perf_counter()
            first, last = trained(draft, store, train, seed, args.steps)
            said = f"seed {seed}, loss {first:.3f} to {last:.3f}, {time.perf_counter() - began:.0f} s"
            note(name, acceptance(draft, store, train), said)
    title = (
        f"{args.steps} steps of 2,048 tokens, {len(args.seeds)} seeds, 3 draft tokens, held-out conversations"
    )
    table = Table("objective", "acceptance length", "spread", "sampled", "spread", title=title)
    result: dict[str, Any] = {"steps": args.steps, "seeds": args.seeds, **versions()}
    for name in greedy:
        row = [(statistics.mean(x), max(x) - min(x)) for x in (greedy[name], sampled[name])]
        table.add_row(name, *(f"{x:.3f}" for pair in row for x in pair))
        result[name] = {"acceptance_length": greedy[name], "overlap_acceptance_length": sampled[name]}
    Console().print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
