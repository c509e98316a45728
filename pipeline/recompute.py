"""`layer61 dump --check`: documents of a store computed again by the other engine.

What one engine gets wrong, in a kernel, a scale or a mask, another one that shares no code with it does not.
Two right ones differ by rounding, and where rounding makes a router choose another expert, by more.

Legend: T tokens, S states of a token, D width of a state.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import cuda

from configs.contract import require_trained_for
from configs.errors import ConfigError, InputError, Layer61Error, StoreError
from configs.progress import count, log, task
from configs.provenance import engine_version
from configs.schema import RunConfig
from configs.target import target_config
from featurestore import FeatureStore, open_store
from pipeline.capture.engine import EngineSettings
from pipeline.capture.probe import row_errors
from pipeline.capture.process import Capture
from pipeline.capture.settings import choose_view, engine_settings
from pipeline.prompts import Turns

__all__ = ["check"]

ENGINES = ("transformers", "vllm")
# Two right engines round every product and sum to bf16, each in its own order. Two layers then give a median
# of 0.01, and states of the wrong tokens one of about 1; what sixty layers give has not been measured. Tokens
# whose routers choose other experts go further.
MEDIAN = 2**-5
FAR, FAR_SHARE = 0.25, 0.1


class Again(NamedTuple):
    """What an engine computes of each document: bf16 bits [T, S, D], and experts [L, T, K] or None."""

    states: list[np.ndarray]
    experts: list[np.ndarray | None]


def check(config: RunConfig, number: int) -> dict[str, Any]:
    """Compute documents of `config`'s store again and compare.

    The engine that did not capture them computes them, or where it cannot, the one that did. Where both can,
    both do, for what the routers choose is not stored.

    Args:
        config: names the store and the target; documents of up to `prompts.max_length` tokens are taken.
        number: how many documents, evenly spaced over the store.

    Returns:
        documents, tokens; captured_by, recomputed_by; of the relative differences of all tokens' states the
        median, the largest, and the share above 0.25; flipped_share: of tokens for which some router chose
        otherwise in the two engines, None where that is not known; median_of_the_rest, largest_of_the_rest:
        of the others; worst_uid, worst_median: the document with the largest median; store.

    Raises:
        ConfigError: no engine is at hand that could.
        InputError, ContractError: the store is not of this target, or holds no such document.
        StoreError: the states differ by more than rounding explains.
    """
    store = open_store(config.store_path)
    target_dir = config.require_target()
    target = target_config(target_dir)
    require_trained_for(store.contract, target_dir, f"store {config.store_path}")
    places = _places(store, config.prompts.max_length, number)
    longest = int(store.length[places].max())
    captured_by = store.contract["engine"]["name"]
    usable = [name for name in ENGINES if _usable(config, target, name, longest)]
    if not usable:
        raise ConfigError(
            f"no engine here can compute {longest:,} tokens of {target_dir}",
            "install the other engine, or take shorter documents with prompts.max_length",
        )
    usable.sort(key=lambda name: name == captured_by)
    recomputed_by = usable[0]
    if recomputed_by == captured_by:
        log("check", f"only {captured_by}, which captured the store, can compute these documents here")
    found = {name: _compute(config, target, store, places, name, longest) for name in usable}
    return _compare(config, store, places, found, captured_by, recomputed_by)


def _places(store: FeatureStore, most: int, number: int) -> np.ndarray:
    fitting = np.flatnonzero(store.length <= most)
    if not len(fitting):
        raise InputError(
            f"the store has no document of at most prompts.max_length = {most:,} tokens",
            "raise prompts.max_length",
        )
    spread = np.linspace(0, len(fitting) - 1, min(number, len(fitting)))
    return fitting[np.unique(spread.round().astype(np.int64))]


def _with_engine(config: RunConfig, name: str, longest: int) -> RunConfig:
    dump = {"engine": name, "view": "auto"} | ({"tensor_parallel_size": 1} if name == "transformers" else {})
    sections = {"dump": dump, "prompts": {"max_length": longest}}
    return config.model_copy(update={s: getattr(config, s).model_copy(update=v) for s, v in sections.items()})


def _usable(config: RunConfig, target: dict[str, Any], name: str, longest: int) -> bool:
    try:
        engine_version(name)
        choose_view(_with_engine(config, name, longest), target)
    except Layer61Error as error:
        log("check", f"{name} cannot do it here: {error.message}")
        return False
    return True


def _compute(
    config: RunConfig,
    target: dict[str, Any],
    store: FeatureStore,
    places: np.ndarray,
    name: str,
    longest: int,
) -> Again:
    config = _with_engine(config, name, longest)
    gpu = cuda.is_available()
    view = choose_view(config, target, gpu=gpu)
    turns = Turns(None, None, (), longest, 1)
    settings: EngineSettings = engine_settings(
        config, turns, store.contract, view, gpu=gpu, name=f"check-{name}"
    )
    vllm = settings.vllm | {"enforce_eager": True}  # the routers are asked as modules
    log("check", f"starting {name}, see {settings.log}")
    again = Again([], [])
    with (
        Capture(replace(settings, vllm=vllm, watch_routers=True)) as capture,
        task(f"check: {name}", len(places), "documents") as progress,
    ):
        for place in places:
            ids = store.read(int(place)).input_ids.numpy().astype(np.uint32)
            again.states.append(capture.probe(ids))
            again.experts.append(capture.experts())
            progress.advance(1)
    return again


def _compare(
    config: RunConfig,
    store: FeatureStore,
    places: np.ndarray,
    found: dict[str, Again],
    captured_by: str,
    recomputed_by: str,
) -> dict[str, Any]:
    errors: list[np.ndarray] = []
    flipped: list[np.ndarray] = []
    medians: list[float] = []
    known = True
    for i, place in enumerate(places):
        document = store.read(int(place))
        stored = document.hidden.view(torch.uint16).numpy()
        states = found[recomputed_by].states[i]
        if states.shape != stored.shape:
            raise StoreError(
                f"document {document.uid} has states {stored.shape} and is computed again as {states.shape}",
                "layer61 store verify checks the store itself",
            )
        error_T = row_errors(states, stored)
        errors.append(error_T)
        medians.append(float(np.median(error_T)))
        flipped_T = _flipped([again.experts[i] for again in found.values()])
        known = known and flipped_T is not None
        flipped.append(np.zeros(len(error_T), bool) if flipped_T is None else flipped_T)
    error = np.concatenate(errors)
    rest = error[~np.concatenate(flipped)] if known else np.zeros(0)
    worst = int(np.argmax(medians))
    result: dict[str, Any] = {
        "documents": len(places),
        "tokens": len(error),
        "captured_by": captured_by,
        "recomputed_by": recomputed_by,
        "median": float(np.median(error)),
        "largest": float(error.max()),
        "far_share": float((error > FAR).mean()),
        "flipped_share": float(np.concatenate(flipped).mean()) if known else None,
        "median_of_the_rest": float(np.median(rest)) if len(rest) else None,
        "largest_of_the_rest": float(rest.max()) if len(rest) else None,
        "worst_uid": int(store.uid[places[worst]]),
        "worst_median": medians[worst],
        "store": config.store_path,
    }
    for line in _lines(result):
        log("check", line)
    ok = result["median"] <= MEDIAN and result["far_share"] <= FAR_SHARE
    if not (ok and result["worst_median"] <= FAR):
        raise StoreError(
            f"{config.store_path} and {recomputed_by} differ by more than rounding: median"
            f" {result['median']:.3g} (at most {MEDIAN:.3g}), {result['far_share']:.1%} of the tokens"
            f" above {FAR:g} (at most {FAR_SHARE:.0%}), document {result['worst_uid']} by"
            f" {result['worst_median']:.3g} (at most {FAR:g})",
            "layer61 store verify says whether its bytes are whole; if they are, one of the engines is wrong",
        )
    return result


def _flipped(experts: list[np.ndarray | None]) -> np.ndarray | None:
    """Tokens [T] for which a router of two engines chose otherwise; None where either is not known."""
    if len(experts) < 2 or any(e is None for e in experts):
        return None
    first, second = experts
    assert first is not None
    assert second is not None
    return (first != second).any((0, 2))


def _lines(result: dict[str, Any]) -> list[str]:
    documents = f"{count(result['documents'], 'document')}, {count(result['tokens'], 'token')}"
    lines = [
        f"{documents}, captured by {result['captured_by']}, computed again by {result['recomputed_by']}",
        f"relative difference of a token's states: median {result['median']:.2g}, largest"
        f" {result['largest']:.2g}; {result['far_share']:.1%} of the tokens above {FAR:g}",
    ]
    if result["flipped_share"] is None:
        lines.append("which experts the routers chose is not known of two engines here")
    else:
        rest = ""
        if result["median_of_the_rest"] is not None:
            rest = (
                f"; the rest differ by {result['median_of_the_rest']:.2g} at the median and"
                f" {result['largest_of_the_rest']:.2g} at most"
            )
        lines.append(f"routing flipped for {result['flipped_share']:.1%} of the tokens{rest}")
    return lines
