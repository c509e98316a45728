"""The sparse layer by transformers, run token by token as a server drafts."""

from dataclasses import replace

import torch
from transformers import AutoConfig
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf

from train.model import load_layer
from train.mtp import MTPLayer


def layer_of(checkpoint, topk):
    """The target's own layer, whose queries keep so many keys."""
    layer = load_layer(checkpoint)
    layer.dims = layer.self_attn.dims = replace(layer.dims, index_topk=topk)
    return layer


class Serial:
    """transformers' decoder layer between the layer's own projections, float32, one document at a time.

    Args:
        layer: whose weights it takes.
        checkpoint: directory of the target.
        topk: keys a query keeps.
    """

    def __init__(self, layer: MTPLayer, checkpoint, topk: int) -> None:
        config = AutoConfig.from_pretrained(checkpoint, attn_implementation="eager")
        config._experts_implementation, config.index_topk = "eager", topk
        self.layer, self.block = layer, hf.DeepseekV32DecoderLayer(config, config.num_hidden_layers - 1)
        self.rotary = hf.DeepseekV32RotaryEmbedding(config)
        own = ("enorm.", "hnorm.", "eh_proj.", "shared_head.")
        state = {name: x for name, x in layer.state_dict().items() if not name.startswith(own)}
        w1, w3, w2 = (state.pop(f"mlp.experts.{w}") for w in ("w1", "w3", "w2"))
        state |= {"mlp.experts.gate_up_proj": torch.cat((w1, w3), 1), "mlp.experts.down_proj": w2}
        self.block.load_state_dict(state)

    def run(self, x_TD):
        """The carried state of the last of these inputs, each at the place of its number."""
        T = len(x_TD)
        places = torch.arange(T)[None]
        mask = torch.full((T, T), torch.finfo(torch.float32).min).triu(1)[None, None]
        angles = self.rotary(x_TD[None], position_ids=places)
        out = self.block(x_TD[None], attention_mask=mask, position_embeddings=angles, position_ids=places)
        return self.layer.leave(out[0, -1:])[0][0]

    def draft_from(self, ids, hidden, place, num_steps):
        """Carried states [num_steps, D] of a place: step 0's entries up to it, then its own."""
        e_TD = self.layer.embed_tokens[ids[1 : place + 2]].clone()
        e_TD[0] = 0
        inputs = self.layer.combine(e_TD, hidden[: place + 1])
        states = [self.run(inputs)]
        for s in range(1, num_steps):
            e_1D = self.layer.embed_tokens[ids[place + s + 1]][None]
            inputs = torch.cat((inputs, self.layer.combine(e_1D, states[-1][None])))
            states.append(self.run(inputs))
        return torch.stack(states)
