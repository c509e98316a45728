"""What the served mask is worth in training: `python -m benchmarks.sparse STORE TARGET [--seeds 0 1 2]`.

`RUN` instead of both takes the store and the target of a run, and adds the figures to its `summary.json` as
`attention`: `make demo-sparse` ends so, with one seed and `--only dense sparse`.

Trains the target's released MTP layer on a store of documents beyond `index_topk`, from the same start, on
the same batches, for equally many steps: with dense attention, with the indexer's mask and a frozen indexer,
and with the indexer trained along (`joint`). Each is then measured as it is served, with the mask, by offline
acceptance on the held-out documents; beside it stand the indexer's choice (mass over best) and its overlap
with the released layer's. A seed decides the order of the documents; every way of training sees the same
seeds.

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

from benchmarks.objectives import SETTINGS, trained
from configs.files import read_json, write_json
from configs.load import load_config
from configs.progress import count
from configs.provenance import versions
from configs.run_dir import SUMMARY, settings
from configs.schema import TrainConfig
from featurestore import FeatureStore, open_store
from train.batch import pack
from train.draft import Draft
from train.evaluate import SELECTION_DOCUMENTS, measure, read_documents
from train.model import load_layer
from train.mtp import MTPLayer
from train.selection import selection_drift
from train.sparse import DENSE, Sparse

SERVED = Sparse(True, None)
# name -> (attention while training, train.indexer)
WAYS = {"dense": (DENSE, "frozen"), "sparse": (SERVED, "frozen"), "joint": (SERVED, "joint")}
# key -> heading
FIGURES = {
    "acceptance_length": "acceptance length",
    "overlap_acceptance_length": "sampled",
    "mass_over_best": "mass over best",
    "overlap": "overlap",
}


def served(layer: MTPLayer, released: MTPLayer, store: FeatureStore, train: TrainConfig) -> dict[str, Any]:
    """A layer as it is served, on all held-out documents, and its indexer's choice on some."""
    documents = np.flatnonzero(store.held_out)
    settings = {"dtype": torch.float32, "device": torch.device("cpu")}
    draft = Draft(layer, train, SERVED).eval()
    budget = train.tokens_per_rank
    found = measure(draft, store, documents, train.num_steps, tokens_per_batch=budget, **settings)
    long = [i for i in documents if store.length[i] > layer.dims.index_topk + 2][:SELECTION_DOCUMENTS]
    packed = (pack(read_documents(store, np.array([i]), [0]), **settings) for i in long)
    return found | selection_drift(layer, released, packed, train.num_steps)


def places(given: list[Path]) -> tuple[str, Path]:
    """Store and target, of a run where there is but one place."""
    if len(given) == 2:
        return str(given[0]), given[1]
    (run,) = given
    files = [str(path) for verb in ("dump", "train") if (path := settings(run, verb)).exists()]
    config = load_config(files, [f"run.dir={json.dumps(str(run))}"])
    return config.train_store_path, config.require_target()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("places", type=Path, nargs="+", help="STORE TARGET, or RUN", metavar="PLACE")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", nargs="*", default=list(WAYS), choices=list(WAYS))
    args = parser.parse_args()
    if len(args.places) > 2:
        parser.error("name a store and a target, or a run directory")
    where, target = places(args.places)
    store, released = open_store(where), load_layer(target)
    assert isinstance(released, MTPLayer)
    console = Console(stderr=True)
    found: dict[str, dict[str, list[float]]] = {}

    def note(name: str, layer: MTPLayer, train: TrainConfig, said: str) -> None:
        figures = served(layer, released, store, train)
        for key in FIGURES:
            found.setdefault(name, {}).setdefault(key, []).append(figures[key])
        console.print(f"{name}: {said}, " + ", ".join(f"{v} {figures[k]:.3f}" for k, v in FIGURES.items()))

    note("released", released, TrainConfig.model_validate(SETTINGS), "not trained")
    for seed in args.seeds:
        for name in args.only:
            attention, indexer = WAYS[name]
            train = TrainConfig.model_validate(SETTINGS | {"indexer": indexer})
            layer = load_layer(target)
            assert isinstance(layer, MTPLayer)
            began = time.perf_counter()
            first, last = trained(Draft(layer, train, attention), store, train, seed, args.steps)
            said = f"seed {seed}, loss {first:.3f} to {last:.3f}, {time.perf_counter() - began:.0f} s"
            note(name, layer, train, said)
    topk, longest = released.dims.index_topk, int(store.length.max())
    table = Table("trained", *FIGURES.values())
    table.title = (
        f"{args.steps} steps, {count(len(args.seeds), 'seed')}, documents to {longest:,} tokens,"
        f" {topk:,} keys kept; all measured under the mask"
    )
    for name, figures in found.items():
        spread = [f" ± {(max(x) - min(x)) / 2:.3f}" if len(x) > 1 else "" for x in figures.values()]
        means = (f"{statistics.mean(x):.3f}" for x in figures.values())
        table.add_row(name, *(a + b for a, b in zip(means, spread, strict=True)))
    Console().print(table)
    result = {"steps": args.steps, "seeds": args.seeds, "index_topk": topk, **versions(), **found}
    if len(args.places) == 1 and (summary := args.places[0] / SUMMARY).exists():
        write_json(summary, read_json(summary) | {"attention": result})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
