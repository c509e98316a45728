"""What a draft costs a server: parameters read for a draft token, and the bytes it adds to the target's.

A mixture of experts is read as far as a token is sent to it: `num_experts_per_tok` of its routed experts. The
head counts as read whether it is the draft's or the target's; of an embedding a token reads one row, which
counts as nothing. `fc` of an EAGLE-3 draft, read for the first draft token of a step alone, counts in full.
"""

import math
from collections.abc import Mapping
from typing import Any

from configs.eagle3 import recognise
from export.checkpoint import Checkpoint
from export.keymap import DROPPED

__all__ = ["draft_cost", "parameters_read"]

EXPERTS = ".mlp.experts."
MAPS = ("d2t", "t2d")
HEAD = "lm_head.weight"


def parameters_read(shapes: Mapping[str, tuple[int, ...]], target: Mapping[str, Any]) -> int:
    """Parameters that a token goes through, the head left out.

    Args:
        shapes: of the draft's tensors by checkpoint name; heads, embeddings, maps and scales count nothing.
        target: config.json of the target, whose routing an MTP layer shares.
    """
    total = routed = 0
    for name, shape in shapes.items():
        if name.endswith(DROPPED) or name in (HEAD, *MAPS) or "weight_scale" in name:
            continue
        if EXPERTS in name:
            routed += math.prod(shape)
        else:
            total += math.prod(shape)
    if routed:
        total += routed * target["num_experts_per_tok"] // target["n_routed_experts"]
    return total


def draft_cost(draft: Checkpoint | None, target: Checkpoint) -> dict[str, int]:
    """What a draft costs, by the headers of its tensors.

    Args:
        draft: its directory; None for the target's own MTP layer.
        target: the target.

    Returns:
        `parameters_read` for each draft token, `head_parameters_read` among them; `bytes` of the draft's own
        tensors as they are stored, copies of the target's embedding and head left out.

    Raises:
        InputError: a checkpoint is incomplete, or the target has no MTP layer.
    """
    source = target if draft is None else draft
    eagle3 = draft is not None and recognise(draft.directory, target.config) is not None
    # a stitched directory holds the target as well
    names = [n for n in (source.names if eagle3 else source.mtp_names()) if not n.endswith(DROPPED)]
    shapes = {name: source.shape(name) for name in names}
    head = math.prod(shapes.get(HEAD) or target.shape(HEAD))
    return {
        "parameters_read": parameters_read(shapes, target.config) + head,
        "head_parameters_read": head,
        "bytes": sum(math.prod(shape) * source.dtype(name).itemsize for name, shape in shapes.items()),
    }
