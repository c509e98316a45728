"""The model card of an exported draft: what it is for, how it is served, what it was measured at."""

from collections.abc import Mapping
from typing import Any

from configs.progress import count
from configs.provenance import collect

__all__ = ["model_card"]

TEXT = """\
# {title}

A draft for speculative decoding of one target. It proposes tokens; the target checks them and keeps its own,
so answers do not change but for rounding. It is of no use beside any other target.

{use}
vLLM 0.32:

    vllm serve TARGET --speculative-config \\
      '{{"method": "{method}", "model": "THIS", "num_speculative_tokens": 3}}'

sglang 0.5.23:

    python -m sglang.launch_server --model-path TARGET --speculative-algorithm {algorithm} \\
      --speculative-draft-model-path THIS --speculative-num-steps 3 --speculative-eagle-topk 1 \\
      --speculative-num-draft-tokens 4

| | |
|---|---|
{rows}
"""

# in servers of these versions
WARNING = """\
On more than one GPU, vLLM 0.32.0 hands a draft of DeepSeek-V3.2 layer inputs that are not summed over
the GPUs: acceptance falls. There, serve it in sglang, or wait for a version that sums them.

"""


def model_card(manifest: Mapping[str, Any], metrics: Mapping[str, Any], target: Mapping[str, Any]) -> str:
    """The text of README.md.

    Args:
        manifest: `kind`, `contract`, `step`, `bytes`, `servers` of the export, and of an EAGLE-3 draft
            `aux_layers` and `draft_vocab_size`.
        metrics: what was measured of these tensors: `acceptance_length` and `acceptance_per_position` on
            held-out documents, offline; empty where nothing was.
        target: config.json of the target.
    """
    eagle3 = manifest["kind"] == "eagle3"
    contract = manifest.get("contract") or {}
    rows = {
        "kind": "EAGLE-3, one dense layer with multi-head latent attention" if eagle3 else "MTP layer",
        "target": f"{', '.join(target.get('architectures') or [])}, {target['num_hidden_layers']} layers,"
        f" config.json {(contract.get('target') or {}).get('config_sha256', 'unknown')[:16]}",
        "bytes": f"{manifest['bytes']:,}",
        "loads in": ", ".join(manifest["servers"]),
        "acceptance length, offline, held-out answers": _acceptance(metrics),
        "trained for": "as released" if manifest["step"] is None else f"{manifest['step']:,} steps",
        "data": f"states of the target's own answers, documents of at most {contract['max_length']:,} tokens"
        if "max_length" in contract
        else "unknown",
    }
    if eagle3:
        rows |= {
            "starts from the inputs of layers": ", ".join(map(str, manifest["aux_layers"])),
            "tokens it can say": f"{manifest['draft_vocab_size']:,} of {target['vocab_size']:,}",
        }
    rows |= {"versions": ", ".join(f"{k} {v}" for k, v in collect()["versions"].items())}
    sparse = eagle3 and bool(target.get("index_topk"))
    return TEXT.format(
        title="EAGLE-3 draft" if eagle3 else "MTP draft",
        use=WARNING if sparse else "",
        method="eagle3" if eagle3 else "mtp",
        algorithm="EAGLE3" if eagle3 else "NEXTN",
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
    )


def _acceptance(metrics: Mapping[str, Any]) -> str:
    if metrics.get("acceptance_length") is None:
        return "not measured"
    said = f"{metrics['acceptance_length']:.3f}"
    # checkpoints of earlier versions do not say with how many
    drafts = len(metrics.get("acceptance_per_position") or [])
    return f"{said} with {count(drafts, 'draft token')} a step" if drafts else said
