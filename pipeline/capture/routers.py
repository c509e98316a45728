"""Which experts the routers choose: written down while an engine computes one document.

A router whose best experts are nearly tied chooses by rounding, and then two right engines go apart.

Legend: T tokens, E experts, K experts a token, L layers with a router.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Routers", "choose_experts"]


def choose_experts(logits_TE: Tensor, bias_E: Tensor, n_group: int, topk_group: int, k: int) -> Tensor:
    """Experts [T, K] of a sigmoid router with group limits (`noaux_tc`; arXiv 2412.19437, section 2.1.2)."""
    scores_TE = logits_TE.float().sigmoid() + bias_E.float()
    groups_TGE = scores_TE.unflatten(-1, (n_group, -1))
    best_TG = groups_TGE.topk(2, -1).values.sum(-1)
    dropped_TG = torch.ones_like(best_TG, dtype=torch.bool)
    dropped_TG.scatter_(1, best_TG.topk(topk_group, -1).indices, False)
    return groups_TGE.masked_fill(dropped_TG[..., None], -torch.inf).flatten(1).topk(k, -1).indices


class Routers:
    """Hooks on the routers (`mlp.gate`) of a model whose configuration names groups as DeepSeek-V3's does."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        self._sizes = config.n_group, config.topk_group, config.num_experts_per_tok
        self._chosen: dict[str, list[Tensor]] = {}
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(
                    lambda gate, _, out, name=name: self._chosen.setdefault(name, []).append(
                        choose_experts(
                            out[0] if isinstance(out, tuple) else out,
                            gate.e_score_correction_bias,
                            *self._sizes,
                        )
                    )
                )

    def take(self, tokens: int) -> np.ndarray | None:
        """What was chosen since the last call for the first `tokens` rows, ascending, int32 [L, T, K].

        None where an engine computes without its modules, as compiled ones do: then nobody is asked.
        """
        # layers may lie on several GPUs
        chosen = [torch.cat(pieces)[:tokens].cpu() for pieces in self._chosen.values()]
        self._chosen.clear()
        if not chosen or any(len(rows) < tokens for rows in chosen):
            return None
        return torch.stack(chosen).sort(-1).values.int().numpy()
