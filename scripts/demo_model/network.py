"""The Qwen2 network for training, and its tensors under Hugging Face's names.

Same function as transformers' Qwen2ForCausalLM (tied embeddings); q, k, v and gate, up are fused here,
because few large matrix products train faster than many small ones, and taken apart on export.
"""

import torch
import torch.nn.functional as F
from torch import nn

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "vocab_size": 2048,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "max_window_layers": 8,
    "sliding_window": None,
    "use_sliding_window": False,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}


class _RmsNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


class _Layer(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        self.heads, self.kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        hidden, inner = c["hidden_size"], c["intermediate_size"]
        self.dim = hidden // self.heads
        self.input_norm = _RmsNorm(hidden, c["rms_norm_eps"])
        self.qkv = nn.Linear(hidden, (self.heads + 2 * self.kv_heads) * self.dim, bias=True)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.post_norm = _RmsNorm(hidden, c["rms_norm_eps"])
        self.gate_up = nn.Linear(hidden, 2 * inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x, cos, sin):
        b, n, hidden = x.shape
        qkv = self.qkv(self.input_norm(x)).view(b, n, -1, self.dim).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        repeat = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, hidden))
        gate, up = self.gate_up(self.post_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def _rotate(x, cos, sin):
    low, high = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-high, low), dim=-1) * sin.to(x.dtype)


class Network(nn.Module):
    """Token ids [batch, length] -> logits [batch, length, vocab]."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = _RmsNorm(config["hidden_size"], config["rms_norm_eps"])
        dim = config["hidden_size"] // config["num_attention_heads"]
        rates = config["rope_theta"] ** -(torch.arange(0, dim, 2).float() / dim)
        angles = torch.outer(torch.arange(config["max_position_embeddings"]).float(), torch.cat((rates, rates)))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        std = config["initializer_range"]
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=std / (2 * len(self.layers)) ** 0.5 if last else std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids):
        x = self.embed(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed.weight)

    def hugging_face_tensors(self) -> dict[str, torch.Tensor]:
        """bfloat16 copies of the weights under Hugging Face's names, on the CPU."""
        c, out = self.config, {"model.embed_tokens.weight": self.embed.weight, "model.norm.weight": self.norm.weight}
        dim = c["hidden_size"] // c["num_attention_heads"]
        sizes = [c["num_attention_heads"] * dim] + [c["num_key_value_heads"] * dim] * 2
        for i, layer in enumerate(self.layers):
            at = f"model.layers.{i}."
            out[at + "input_layernorm.weight"] = layer.input_norm.weight
            out[at + "post_attention_layernorm.weight"] = layer.post_norm.weight
            for part, name in (("weight", ".weight"), ("bias", ".bias")):
                for letter, tensor in zip("qkv", getattr(layer.qkv, part).split(sizes)):
                    out[f"{at}self_attn.{letter}_proj{name}"] = tensor
            out[at + "self_attn.o_proj.weight"] = layer.out.weight
            gate, up = layer.gate_up.weight.chunk(2)
            out[at + "mlp.gate_proj.weight"], out[at + "mlp.up_proj.weight"] = gate, up
            out[at + "mlp.down_proj.weight"] = layer.down.weight
        return {k: v.detach().to("cpu", torch.bfloat16).contiguous().clone() for k, v in out.items()}

    def load_hugging_face_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """The reverse of hugging_face_tensors()."""
        with torch.no_grad():
            self.embed.weight.copy_(tensors["model.embed_tokens.weight"])
            self.norm.weight.copy_(tensors["model.norm.weight"])
            for i, layer in enumerate(self.layers):
                at = f"model.layers.{i}."
                layer.input_norm.weight.copy_(tensors[at + "input_layernorm.weight"])
                layer.post_norm.weight.copy_(tensors[at + "post_attention_layernorm.weight"])
                for part in ("weight", "bias"):
                    whole = torch.cat([tensors[f"{at}self_attn.{x}_proj.{part}"] for x in "qkv"])
                    getattr(layer.qkv, part).copy_(whole)
                layer.out.weight.copy_(tensors[at + "self_attn.o_proj.weight"])
                layer.gate_up.weight.copy_(torch.cat([tensors[f"{at}mlp.{x}_proj.weight"] for x in ("gate", "up")]))
                layer.down.weight.copy_(tensors[at + "mlp.down_proj.weight"])
