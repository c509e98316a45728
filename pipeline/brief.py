"""What a verb did, in a line or two; `--json` prints the whole instead."""

from collections.abc import Callable, Mapping
from typing import Any

from configs.progress import count

__all__ = ["brief"]


def _positions(found: Mapping[str, Any]) -> str:
    return " ".join(f"{share:.1%}" for share in found["acceptance_per_position"])


def _dump(found: Mapping[str, Any]) -> str:
    documents = count(found["documents"], "document")
    left_out = count(found["rejects"], "conversation") + " rejected"
    return (
        f"{documents} ({found['held_out']:,} held out), {count(found['tokens'], 'token')},"
        f" {found['bytes'] / 1e6:,.1f} MB in {found['store']};"
        f" {count(found['captured_documents'], 'document')} captured now, {found['kept_documents']:,} kept;"
        f" {left_out}, {count(found['duplicates'], 'duplicate')}"
    )


def _train(found: Mapping[str, Any]) -> str:
    length = found["acceptance_length"]
    acceptance = "" if length is None else f", acceptance length {length:.3f} on held-out documents"
    return f"{count(found['steps'], 'step')} done{acceptance}; checkpoints in {found['checkpoints']}"


def _evaluate(found: Mapping[str, Any]) -> str:
    bounds = "" if found["low"] is None else f" ({found['low']:.3f} to {found['high']:.3f})"
    return (
        f"{found['checkpoint']}: acceptance length {found['acceptance_length']:.3f}{bounds}, by position"
        f" {_positions(found)}, on {count(found['documents'], 'held-out document')}"
    )


def _export(found: Mapping[str, Any]) -> str:
    step = "" if found.get("step") is None else f" of step {found['step']:,}"
    form = found["identity"].get("layout", found["identity"].get("kind"))
    return f"{found['directory']}: the layer{step} as {form}, {found['bytes'] / 1e9:,.3f} GB"


def _verify(found: Mapping[str, Any]) -> str:
    drafts = found["drafts"].items()
    lengths = "; ".join(f"{name} {x['acceptance_length']:.3f} ({_positions(x)})" for name, x in drafts)
    return f"acceptance length, by position: {lengths}"


BRIEFS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "dump": _dump,
    "train": _train,
    "evaluate": _evaluate,
    "export": _export,
    "verify": _verify,
}


def brief(verb: str, found: Mapping[str, Any]) -> str:
    """The result of a verb for a person; empty where the verb has said it already."""
    return BRIEFS[verb](found) if verb in BRIEFS else ""
