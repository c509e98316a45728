"""The EAGLE-3 draft written a second time: plain tensors by checkpoint name, one document, nothing packed."""

import torch

from export.checkpoint import Checkpoint
from tests.reference import Reference


class Eagle3Reference(Reference):
    """Serial recursion of the server in float32 over one document; the shared maths is the MTP reference's.

    Args:
        target: the target, for the embedding and the head.
        tensors: the draft's tensors by checkpoint name, in float32.
        config: the draft's config.json.
    """

    def __init__(self, target, tensors, config) -> None:
        tables = Checkpoint(target)
        self.embedding = tables.get("model.embed_tokens.weight", dtype=torch.float32)
        self.head = tensors.get("lm_head.weight", tables.get("lm_head.weight", dtype=torch.float32))
        self.w, self.c, self.layer = tensors, config, "layers.0."
        self.rope = config["rope_scaling"]
        self.theta = config["rope_theta"]

    def rms(self, x, weight):
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.c["rms_norm_eps"])

    def combine(self, aux):
        """[T, K, D] to [T, D]."""
        if self.c.get("fc_norm"):
            parts = [self.rms(aux[:, k], self.w[f"fc_norm.{k}.weight"]) for k in range(aux.shape[1])]
            aux = torch.stack(parts, 1)
        return aux.reshape(len(aux), -1) @ self.w["fc.weight"].T

    def rows(self, ids, h, positions, keys, values):
        """Run the layer on rows; appends their keys. Returns the head's states and what is carried."""
        e = self.embedding[ids]
        a = torch.cat([self.norm(e, "input_layernorm.weight"), self.norm(h, "hidden_norm.weight")], -1)
        q, k, v = self.qkv(a, positions)
        out = []
        for t in range(len(h)):
            keys.append(k[t])
            values.append(v[t])
            K, V = torch.stack(keys), torch.stack(values)
            p = torch.softmax(torch.einsum("hd,jhd->hj", q[t], K) * self.softmax_scale(), -1)
            out.append(torch.einsum("hj,jhd->hd", p, V).flatten())
        x = h + self.linear(torch.stack(out), "self_attn.o_proj.weight")
        x = x + self.mlp(self.norm(x, "post_attention_layernorm.weight"), "mlp")
        state = self.rms(x, self.w["norm.weight"])
        return state, state if self.c.get("norm_output") else x

    def start(self, ids, aux):  # type: ignore[override]
        """Step 0 over a document; returns states and carried of places 0..T-2."""
        self.keys, self.values = [], []
        n = len(ids) - 1
        return self.rows(ids[1:], self.combine(aux[:n]), torch.arange(n), self.keys, self.values)

    def draft_from(self, ids, first, place, num_steps):  # type: ignore[override]
        """Teacher-forced states of all steps of one place, after `start`, whose result is `first`."""
        keys, values = self.keys[: place + 1], self.values[: place + 1]
        states, carried = [first[0][place]], first[1][place]
        for s in range(1, num_steps):
            joined = ids[place + s + 1 : place + s + 2]
            state, carried = self.rows(joined, carried[None], torch.tensor([place + s]), keys, values)
            states.append(state[0])
            carried = carried[0]
        return torch.stack(states)

    def propose(self, ids, aux, num_steps):
        """What a server drafts after `ids`, whose last token has no states yet: (tokens, gaps).

        Gaps are those between the two largest logits, below which a choice is a tie.
        """
        state, carried = self.start(ids, aux)
        state, carried = state[-1], carried[-1]
        tokens, gaps = [], []
        for s in range(num_steps):
            top = (state @ self.head.T).topk(2)
            token = int(top.indices[0])
            if "d2t" in self.w:
                token += int(self.w["d2t"][token])
            tokens.append(token)
            gaps.append(float(top.values[0] - top.values[1]))
            place = torch.tensor([len(ids) - 1 + s])
            states, carry = self.rows(torch.tensor([token]), carried[None], place, self.keys, self.values)
            state, carried = states[0], carry[0]
        return tokens, gaps
