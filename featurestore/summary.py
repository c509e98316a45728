"""What a store holds, as plain data and for a person: totals, lengths, sources, contract, one document."""

import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from configs.errors import StoreError
from featurestore.reader import FeatureStore, open_store
from featurestore.writer import committed_parts

__all__ = ["exponent_entropy", "info", "render_info", "render_show", "show"]

SAMPLED_TOKENS = 4096


def _opened(store: FeatureStore | str | os.PathLike[str]) -> FeatureStore:
    return store if isinstance(store, FeatureStore) else open_store(store)


def _entropy(counts: torch.Tensor) -> float:
    p = counts[counts > 0].double() / counts.sum()
    return float(-(p * p.log2()).sum())


def exponent_entropy(store: FeatureStore, tokens: int = SAMPLED_TOKENS) -> dict[str, float]:
    """Entropy of the stored values in bits: of the exponent, and of sign and mantissa.

    No lossless codec that treats values one by one compresses bf16 by more than 16 over their sum. Sampled
    from documents spread over the store.

    Args:
        store: the store.
        tokens: tokens to read at most.
    """
    exponent, rest = torch.zeros(256, dtype=torch.int64), torch.zeros(256, dtype=torch.int64)
    count = min(len(store), 16)
    for i in np.linspace(0, len(store) - 1, count).astype(int).tolist() if count else ():
        stop = min(int(store.length[i]), max(1, tokens // count))
        bits = store.read(i, 0, stop).hidden.view(torch.int16).flatten().int() & 0xFFFF
        exponent += torch.bincount(bits >> 7 & 0xFF, minlength=256)
        rest += torch.bincount((bits >> 8 & 0x80) | (bits & 0x7F), minlength=256)
    if not count:
        return {"exponent_bits": 0.0, "sign_mantissa_bits": 0.0, "lossless_bound": 1.0}
    bits_e, bits_r = _entropy(exponent), _entropy(rest)
    bound = 16 / max(bits_e + bits_r, 1e-3)  # all values equal: no bound worth the name
    return {"exponent_bits": bits_e, "sign_mantissa_bits": bits_r, "lossless_bound": bound}


def info(store: FeatureStore | str | os.PathLike[str]) -> dict[str, Any]:
    """Totals of a store as plain data.

    Returns:
        url, version, created, totals {parts, documents, tokens, loss_tokens, bytes, duplicates}, states,
        hidden_size, compression {codec: parts}, lengths [{from, to, documents, tokens}] by powers of two,
        held_out {documents, tokens}, sources {name: {documents, tokens}}, unpublished and dropped part names,
        entropy (see `exponent_entropy`), contract.
    """
    store = _opened(store)
    manifest, length = store.manifest, store.length.astype(np.int64)
    codecs: dict[str, int] = {}
    for entry in manifest["parts"]:
        codecs[entry["compression"]] = codecs.get(entry["compression"], 0) + 1
    power = np.floor(np.log2(np.maximum(length, 1))).astype(int)
    histogram = [
        {
            "from": 2**p,
            "to": 2 ** (p + 1) - 1,
            "documents": int((power == p).sum()),
            "tokens": int(length[power == p].sum()),
        }
        for p in (range(int(power.min()), int(power.max()) + 1) if len(power) else ())
    ]
    code = store._index["source"]
    documents = np.bincount(code, minlength=len(manifest["sources"]))
    tokens = np.bincount(code, weights=length, minlength=len(manifest["sources"]))
    known = [e["name"] for e in manifest["parts"]] + manifest["dropped"]
    return {
        "url": store.url,
        "version": store.version,
        "created": manifest["created"],
        "totals": manifest["totals"],
        "states": store.states,
        "hidden_size": store.hidden_size,
        "compression": codecs,
        "lengths": histogram,
        "held_out": {
            "documents": int(store.held_out.sum()),
            "tokens": int(length[store.held_out].sum()),
        },
        "sources": {
            name: {"documents": int(documents[i]), "tokens": int(tokens[i])}
            for i, name in enumerate(manifest["sources"])
        },
        "unpublished": list(committed_parts(store.objects, known)),
        "dropped": manifest["dropped"],
        "entropy": exponent_entropy(store),
        "contract": store.contract,
    }


def render_info(found: dict[str, Any]) -> RenderableType:
    """What `info` returns, for a person."""
    totals, entropy = found["totals"], found["entropy"]
    # a long path is folded, never cut
    table = Table("", Column(overflow="fold"), box=None, show_header=False)
    table.add_row("store", found["url"])
    table.add_row("manifest", f"{found['version']}, {found['created']}")
    table.add_row("parts", f"{totals['parts']:,}, compression {_pairs(found['compression'])}")
    table.add_row(
        "documents", f"{totals['documents']:,}, {found['held_out']['documents']:,} of them held out"
    )
    table.add_row(
        "tokens", f"{totals['tokens']:,}, {totals['loss_tokens']:,} of them for the target to produce"
    )
    table.add_row("states", f"{found['states']} x {found['hidden_size']} bfloat16 a token")
    table.add_row("size", f"{totals['bytes'] / 2**30:.3f} GiB")
    table.add_row(
        "entropy",
        f"exponent {entropy['exponent_bits']:.2f} bits, sign and mantissa"
        f" {entropy['sign_mantissa_bits']:.2f}: lossless at most {entropy['lossless_bound']:.2f} x smaller",
    )
    if totals["duplicates"]:
        table.add_row("duplicates", f"{totals['duplicates']:,} documents lie in two parts; the first is used")
    for key in ("unpublished", "dropped"):
        if found[key]:
            table.add_row(key, ", ".join(found[key][:5]) + (" ..." if len(found[key]) > 5 else ""))
    lengths = Table("length", "documents", "tokens", "", box=None)
    most = max((row["documents"] for row in found["lengths"]), default=1)
    for row in found["lengths"]:
        bar = "█" * max(1, round(30 * row["documents"] / most)) if row["documents"] else ""
        lengths.add_row(
            f"{row['from']:,} to {row['to']:,}", f"{row['documents']:,}", f"{row['tokens']:,}", bar
        )
    sources = Table("source", "documents", "tokens", box=None)
    for name, row in sorted(found["sources"].items(), key=lambda item: -item[1]["tokens"]):
        sources.add_row(Text(name or "-"), f"{row['documents']:,}", f"{row['tokens']:,}")
    contract = Text("contract\n" + json.dumps(found["contract"], indent=2, ensure_ascii=False))
    return Group(table, Text(), lengths, Text(), sources, Text(), contract)


def _pairs(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} in {count:,}" for name, count in counts.items()) or "none"


def _texts(ids: list[int], decode: Callable[[list[int]], str]) -> list[str]:
    """Text of each token; a character cut over several stands with its last."""
    texts, waiting = [""] * len(ids), []
    for t, token in enumerate(ids):
        waiting.append(token)
        text = decode(waiting)
        # a replacement character at the end: bytes of it are still to come, four at most in UTF-8
        if not text.endswith("\ufffd") or len(waiting) > 4 or t + 1 == len(ids):
            texts[t], waiting = text, []
    return texts


def show(
    store: FeatureStore | str | os.PathLike[str],
    document: int,
    decode: Callable[[list[int]], str] | None = None,
) -> dict[str, Any]:
    """One document as plain data.

    Args:
        store: the store.
        document: its uid, or else its place in the index.
        decode: text of tokens, special ones included.

    Returns:
        uid, place, part, source, held_out, tokens, loss_tokens, norms [{state, min, mean, max}] over tokens,
        rows [{position, id, text (None without `decode`), loss, norms}].

    Raises:
        StoreError: no such document.
    """
    store = _opened(store)
    places = np.flatnonzero(store.uid == np.uint64(document)).tolist() if 0 <= document < 1 << 64 else []
    place = places[0] if places else document
    if not 0 <= place < len(store):
        raise StoreError(
            f"{store.url} has no document {document}", f"give a uid, or a place below {len(store)}"
        )
    found = store[place]
    norms = found.hidden.float().norm(dim=-1)  # [T, S]
    ids = found.input_ids.tolist()
    texts = _texts(ids, decode) if decode else [None] * len(ids)
    return {
        "uid": found.uid,
        "place": place,
        "part": store.manifest["parts"][int(store._index["part"][place])]["name"],
        "source": found.source,
        "held_out": found.held_out,
        "tokens": len(ids),
        "loss_tokens": int(found.loss_mask.sum()),
        "norms": [
            {"state": s, "min": float(n.min()), "mean": float(n.mean()), "max": float(n.max())}
            for s, n in enumerate(norms.T)
        ],
        "rows": [
            {
                "position": t,
                "id": token,
                "text": texts[t],
                "loss": bool(found.loss_mask[t]),
                "norms": norms[t].tolist(),
            }
            for t, token in enumerate(ids)
        ],
    }


def render_show(found: dict[str, Any], *, brackets: bool = False) -> RenderableType:
    """What `show` returns, for a person: the text with the target's own tokens marked, and the norms.

    Args:
        found: from `show`.
        brackets: mark them with brackets, where there are no colours.
    """
    head = Table("", Column(overflow="fold"), box=None, show_header=False)
    head.add_row("document", f"uid {found['uid']}, place {found['place']}, part {found['part']}")
    head.add_row("source", Text(found["source"] or "-"))
    head.add_row("split", "held out" if found["held_out"] else "train")
    head.add_row("tokens", f"{found['tokens']:,}, {found['loss_tokens']:,} of them for the target to produce")
    for norm in found["norms"]:
        head.add_row(
            f"norm, state {norm['state']}",
            f"{norm['min']:.2f} to {norm['max']:.2f}, mean {norm['mean']:.2f}",
        )
    text, marked = Text(), False
    for row in found["rows"]:
        if brackets and row["loss"] != marked:
            text.append("[" if row["loss"] else "]")
        marked = row["loss"]
        piece = row["text"] if row["text"] is not None else f"{row['id']} "
        text.append(piece, style="bold green" if row["loss"] else "dim")
    if brackets and marked:
        text.append("]")
    how = "in brackets" if brackets else "marked"
    return Group(head, Text(), Text(f"{how}: tokens the target has to produce"), text)
