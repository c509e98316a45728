"""The draft layer written a second time: plain tensors by checkpoint name, one document, nothing packed."""

import math

import torch
import torch.nn.functional as F

from export.checkpoint import Checkpoint


class Reference:
    """Serial recursion of the server in float32: `start` runs a document, `draft_from` goes on."""

    def __init__(self, directory) -> None:
        checkpoint = Checkpoint(directory)
        self.c = checkpoint.config
        self.layer = f"model.layers.{self.c['num_hidden_layers']}."
        self.w = {name: checkpoint.get(name, dtype=torch.float32) for name in checkpoint.names}
        rope = self.c.get("rope_scaling") or self.c["rope_parameters"]
        self.theta = self.c.get("rope_theta") or rope["rope_theta"]
        self.rope = rope

    def get(self, name):
        return self.w[self.layer + name]

    def norm(self, x, name):
        return self.get(name) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.c["rms_norm_eps"])

    def linear(self, x, name):
        return x @ self.get(name).T

    def frequencies(self):
        d, r = self.c["qk_rope_head_dim"], self.rope
        plain = 1 / self.theta ** (torch.arange(0, d, 2).float() / d)

        def dim(n):
            return (
                d
                * math.log(r["original_max_position_embeddings"] / (n * 2 * math.pi))
                / (2 * math.log(self.theta))
            )

        low, high = max(math.floor(dim(r["beta_fast"])), 0), min(math.ceil(dim(r["beta_slow"])), d - 1)
        keep = 1 - ((torch.arange(d // 2).float() - low) / max(high - low, 1e-3)).clamp(0, 1)
        return plain / r["factor"] * (1 - keep) + plain * keep

    def rotate(self, x, positions):
        # as complex numbers: pair (2j, 2j+1) times e^(i p f_j)
        angle = positions[:, None].double() * self.frequencies().double()
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        z = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(z * turn).flatten(-2).float()

    def qkv(self, x, positions):
        c, n = self.c, self.c["num_attention_heads"]
        P, R, L = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["kv_lora_rank"]
        compressed = self.norm(self.linear(x, "self_attn.q_a_proj.weight"), "self_attn.q_a_layernorm.weight")
        q = self.linear(compressed, "self_attn.q_b_proj.weight").view(-1, n, P + R)
        kv = self.linear(x, "self_attn.kv_a_proj_with_mqa.weight")
        up = self.linear(
            self.norm(kv[:, :L], "self_attn.kv_a_layernorm.weight"), "self_attn.kv_b_proj.weight"
        )
        up = up.view(-1, n, P + c["v_head_dim"])
        q = torch.cat([q[..., :P], self.rotate(q[..., P:], positions)], -1)
        k_pe = self.rotate(kv[:, None, L:], positions).expand(-1, n, -1)
        return q, torch.cat([up[..., :P], k_pe], -1), up[..., P:]

    def softmax_scale(self):
        m = 0.1 * self.rope["mscale_all_dim"] * math.log(self.rope["factor"]) + 1
        return (self.c["qk_nope_head_dim"] + self.c["qk_rope_head_dim"]) ** -0.5 * m * m

    def mlp(self, x, name):
        gate, up = self.linear(x, f"{name}.gate_proj.weight"), self.linear(x, f"{name}.up_proj.weight")
        return self.linear(F.silu(gate) * up, f"{name}.down_proj.weight")

    def moe(self, x):
        c = self.c
        scores = torch.sigmoid(self.linear(x, "mlp.gate.weight"))
        out = self.mlp(x, "mlp.shared_experts")
        size = c["n_routed_experts"] // c["n_group"]
        for t in range(len(x)):
            choice = scores[t] + self.get("mlp.gate.e_score_correction_bias")
            groups = choice.view(c["n_group"], size)
            kept = groups.topk(2, -1).values.sum(-1).topk(c["topk_group"]).indices.tolist()
            allowed = [e for e in range(c["n_routed_experts"]) if e // size in kept]
            best = sorted(allowed, key=lambda e: -float(choice[e]))[: c["num_experts_per_tok"]]
            total = sum(float(scores[t, e]) for e in best) + 1e-20
            for e in best:
                weight = float(scores[t, e]) / total * c["routed_scaling_factor"]
                out[t] += weight * self.mlp(x[t], f"mlp.experts.{e}")
        return out

    def block(self, e, h, positions, keys, values):
        """The layer on rows of input; `keys` and `values` get the rows' own appended, one list item a row."""
        x = (
            torch.cat([self.norm(e, "enorm.weight"), self.norm(h, "hnorm.weight")], -1)
            @ self.get("eh_proj.weight").T
        )
        q, k, v = self.qkv(self.norm(x, "input_layernorm.weight"), positions)
        rows = []
        for t in range(len(x)):
            keys.append(k[t])
            values.append(v[t])
            K, V = torch.stack(keys), torch.stack(values)
            p = torch.softmax(torch.einsum("hd,jhd->hj", q[t], K) * self.softmax_scale(), -1)
            rows.append(torch.einsum("hj,jhd->hd", p, V).flatten())
        x = x + self.linear(torch.stack(rows), "self_attn.o_proj.weight")
        x = x + self.moe(self.norm(x, "post_attention_layernorm.weight"))
        return self.norm(x, "shared_head.norm.weight")

    def embed(self, ids, first_position, mask_position_0):
        e = self.w["model.embed_tokens.weight"][ids].clone()
        if mask_position_0 and first_position == 0:
            e[0] = 0
        return e

    def start(self, ids, hidden, mask_position_0=True):
        """Step 0 over a document: ids [T] and target states [T, D]; returns carried places 0..T-2."""
        T = len(ids)
        self.keys, self.values = [], []
        e = self.embed(ids[1:], 0, mask_position_0)
        return self.block(e, hidden[: T - 1], torch.arange(T - 1), self.keys, self.values)

    def draft_from(self, ids, carried, place, num_steps):
        """Teacher-forced steps of one place, after `start`; returns the carried states of all steps."""
        keys, values = self.keys[: place + 1], self.values[: place + 1]
        states = [carried[place]]
        for s in range(1, num_steps):
            e = self.embed(ids[place + s + 1 : place + s + 2], place + s, False)
            states.append(self.block(e, states[-1][None], torch.tensor([place + s]), keys, values)[0])
        return torch.stack(states)


def to_checkpoint(ops, module):
    """The checkpoint's tensors by name from the module's: the inverse of `to_training`."""
    return {
        name: tensor
        for op in ops
        for name, tensor in zip(op.checkpoint, op.to_checkpoint(module[op.training]), strict=True)
    }
