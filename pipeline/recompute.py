"""`layer61 dump --check`: documents of a store computed again by the other engine.

What one engine gets wrong, in a kernel, a scale or a mask, another one that shares no code with it does not.
Two right ones differ by rounding, and where rounding makes a router or an indexer choose otherwise, by more.

How far rounding carries depends on the target: on its depth, since each layer rounds again and hands on what
the earlier ones did, on how nearly its routers are tied, on what it was trained to. So it is measured and not
assumed: transformers computes each document a second time with the output of every layer moved at random by
up to 2^-8 of itself, a rounding to bf16, and the distance between its two computations is the yardstick. It
was tried on what rounding does in full, bf16 beside float32 (medians): 0.013 and 0.014 with the four trained
layers of the demo's target; of random ones 0.010 and 0.016 with two, 0.27 and 0.37 with eight, whose routers
are all but tied, 0.93 and 0.96 with 32. Two engines round each in its own way, a half more. Unrelated states
are 1.4 apart, so in such a target nothing can be told, and it is said. Where transformers cannot compute the
target there is no yardstick, and only what no rounding explains is an error.

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

__all__ = ["Again", "bounds", "check", "compare"]

ENGINES = ("transformers", "vllm")
# how many times the yardstick the median may be, and what it may be in any case; beyond which difference a
# token is far off in any case, and how many may be, for their routers chose otherwise
TIMES, MEDIAN, FAR, FAR_SHARE = 4.0, 2**-5, 0.25, 0.1
# half of what unrelated states differ by
UNLIKE = 0.7


class Again(NamedTuple):
    """What an engine computes of each document: bf16 bits [T, S, D], and experts [L, T, K] or None.

    Attributes:
        rounding: of each document how far rounding moves its states, relative [T]; None where not known.
    """

    states: list[np.ndarray]
    experts: list[np.ndarray | None]
    rounding: list[np.ndarray | None]


def check(config: RunConfig, number: int) -> dict[str, Any]:
    """Compute documents of `config`'s store again and compare.

    The engine that did not capture them computes them, or where it cannot, the one that did. Where both can,
    both do, for what the routers choose is not stored.

    Args:
        config: names the store and the target; documents of up to `prompts.max_length` tokens are taken.
        number: how many documents, evenly spaced over the store.

    Returns:
        documents, tokens; captured_by, recomputed_by; of the relative differences of all tokens' states the
        median, the same of tokens beyond `index_topk` alone (None where there are none), the largest, and
        far_share above `far`; rounding_median: the yardstick, None without one; most_median, most_far_share:
        the bounds that follow from it; flipped_share: of tokens for which some router chose otherwise in the
        two engines, None where that is not known; median_of_the_rest, largest_of_the_rest: of the others;
        worst_uid, worst_median: the document with the largest median; store.

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
    found: dict[str, Again] = {}
    for name in sorted(ENGINES, key=lambda name: name == captured_by):
        if _usable(config, target, name, longest):
            try:
                found[name] = _compute(config, target, store, places, name, longest)
            except InputError as error:
                log("check", f"{name} cannot do it here: {error.message}")
    if not found:
        raise ConfigError(
            f"no engine here can compute {longest:,} tokens of {target_dir}",
            "install the other engine, or take shorter documents with prompts.max_length",
        )
    if next(iter(found)) == captured_by:
        log("check", f"only {captured_by}, which captured the store, can compute these documents here")
    topk = target.get("index_topk") or 0
    return compare(config, store, places, found, captured_by, topk)


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
    again = Again([], [], [])
    with (
        Capture(replace(settings, vllm=vllm, watch_routers=True)) as capture,
        task(f"check: {name}", len(places), "documents") as progress,
    ):
        for place in places:
            ids = store.read(int(place)).input_ids.numpy().astype(np.uint32)
            states = capture.probe(ids)
            again.states.append(states)
            again.experts.append(capture.experts())
            moved = capture.probe_rounded(ids)
            again.rounding.append(None if moved is None else row_errors(moved, states))
            progress.advance(1)
    return again


def compare(
    config: RunConfig,
    store: FeatureStore,
    places: np.ndarray,
    found: dict[str, Again],
    captured_by: str,
    topk: int,
) -> dict[str, Any]:
    """Compare documents of a store with what engines compute of them.

    Args:
        config: names the store.
        store: the store.
        places: which documents.
        found: by engine what it computed of them; the first one's states are compared.
        captured_by: the engine of the store.
        topk: the target's `index_topk`; 0 where its attention is dense.

    Returns, raises:
        As `check`.
    """
    recomputed_by = next(iter(found))
    errors: list[np.ndarray] = []
    beyond: list[np.ndarray] = []
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
        beyond.append(np.arange(len(error_T)) >= (topk or len(error_T)))
        medians.append(float(np.median(error_T)))
        flipped_T = _flipped([again.experts[i] for again in found.values()])
        known = known and flipped_T is not None
        flipped.append(np.zeros(len(error_T), bool) if flipped_T is None else flipped_T)
    error, late = np.concatenate(errors), np.concatenate(beyond)
    rest = error[~np.concatenate(flipped)] if known else np.zeros(0)
    worst = int(np.argmax(medians))
    moved = [x for again in found.values() for x in again.rounding if x is not None]
    yardstick = np.concatenate(moved) if moved else None
    most_median, far, most_share = bounds(yardstick)
    result: dict[str, Any] = {
        "documents": len(places),
        "tokens": len(error),
        "captured_by": captured_by,
        "recomputed_by": recomputed_by,
        "median": float(np.median(error)),
        "median_beyond_index_topk": float(np.median(error[late])) if late.any() else None,
        "largest": float(error.max()),
        "far": far,
        "far_share": float((error > far).mean()),
        "rounding_median": None if yardstick is None else float(np.median(yardstick)),
        "most_median": most_median,
        "most_far_share": most_share,
        "flipped_share": float(np.concatenate(flipped).mean()) if known else None,
        "median_of_the_rest": float(np.median(rest)) if len(rest) else None,
        "largest_of_the_rest": float(rest.max()) if len(rest) else None,
        "worst_uid": int(store.uid[places[worst]]),
        "worst_median": medians[worst],
        "store": config.store_path,
    }
    for line in _lines(result):
        log("check", line)
    # a wrong mask moves nothing but the tokens for which it leaves something out
    median = max(result["median"], result["median_beyond_index_topk"] or 0)
    if not (median <= most_median and result["far_share"] <= most_share and result["worst_median"] <= far):
        raise StoreError(
            f"{config.store_path} and {recomputed_by} differ by more than rounding: median {median:.3g} (at"
            f" most {most_median:.3g}), {result['far_share']:.1%} of the tokens above {far:.3g} (at most"
            f" {most_share:.0%}), document {result['worst_uid']} by {result['worst_median']:.3g} (at most"
            f" {far:.3g})",
            "layer61 store verify says whether its bytes are whole; if they are, one of the engines is wrong",
        )
    return result


def bounds(rounding: np.ndarray | None) -> tuple[float, float, float]:
    """What two right engines keep to.

    Args:
        rounding: how far rounding moves each token's states, relative; None where that is not known.

    Returns:
        the largest median of the tokens' relative differences; from where on a token is far off, which is
        also the largest median of a document; the largest share of such tokens.
    """
    if rounding is None:
        return UNLIKE, UNLIKE, FAR_SHARE
    most = TIMES * float(np.median(rounding))
    far = max(FAR, most)
    return max(MEDIAN, most), far, FAR_SHARE + 2 * float((rounding > far).mean())


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
        f" {result['largest']:.2g}; {result['far_share']:.1%} of the tokens above {result['far']:.2g}",
    ]
    if result["median_beyond_index_topk"] is not None:
        lines.append(f"median beyond index_topk tokens: {result['median_beyond_index_topk']:.2g}")
    if result["rounding_median"] is None:
        lines.append(
            "how far rounding carries in this target is known where transformers can compute it, and here it"
            f" cannot: a median up to {result['most_median']:.2g} passes"
        )
    else:
        lines.append(
            f"one more rounding in each layer moves them by {result['rounding_median']:.2g} at the median; a"
            f" median up to {result['most_median']:.2g} passes"
        )
        if result["most_median"] > 1:
            lines.append("rounding alone carries so far in this target that wrong states would pass as well")
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
