#!/usr/bin/env python3
"""Writes tests/data/quantised: 4-bit layers and tiny models, packed by the code of AutoGPTQ and AutoAWQ themselves, beside
what they stand for in float32.

  python3 -m venv venv && venv/bin/pip install --require-hashes -r scripts/fixture_requirements.txt
  venv/bin/pip install --no-deps --require-hashes -r scripts/quantised_fixture_requirements.txt
  venv/bin/python scripts/make_quantised_fixtures.py

The float32 is explicit: scale * (value - zero point) of the numbers that were given to the tools, which never unpacks
anything. That the tools read their own layers so is checked here: each must give that matrix for the unit matrix.
"""
import importlib
import json
import pathlib
import sys
import types

import numpy as np
import torch
from safetensors.numpy import save_file

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data" / "quantised"
GROUP_SIZES = (32, 64, 128, -1)
INPUTS, OUTPUTS = 256, 16
# AutoGPTQ packs outputs by 32. Those beyond OUTPUTS are cut off again, to keep the file small.
TOOL_OUTPUTS = 32


def without_init(package):
    """Makes the modules of an installed package importable without the package's own __init__, which wants all of
    its dependencies."""
    root = pathlib.Path(next(p for p in sys.path if (pathlib.Path(p) / package).is_dir())) / package
    for init in sorted(root.rglob("__init__.py")):
        name = ".".join((package, *init.parent.relative_to(root).parts))
        module = types.ModuleType(name)
        module.__path__ = [str(init.parent)]
        sys.modules[name] = module


without_init("auto_gptq")
without_init("awq")
autogptq = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda")
sys.modules["awq.utils.utils"] = types.SimpleNamespace(get_best_device=lambda: "cpu")  # all that is asked of it
autoawq = importlib.import_module("awq.modules.linear.gemm")


class Layer:
    """A layer by its numbers: value[output][input], scale and zero[group][output], group[input]."""

    def __init__(self, random, outputs, inputs, group_size, symmetric, act_order, least_zero):
        self.group_size = inputs if group_size == -1 else group_size
        groups = inputs // self.group_size
        self.value = random.integers(0, 16, (outputs, inputs))
        self.scale = (random.uniform(0.5, 1.5, (groups, outputs)) * 0.05).astype(np.float16)
        self.zero = np.full((groups, outputs), 8) if symmetric else random.integers(least_zero, 16, (groups, outputs))
        self.group = np.arange(inputs) // self.group_size
        if act_order:  # the k-th most important input is in group k // group_size
            self.group = self.group[random.permutation(inputs)]

    def weight(self):
        """float32 [output][input], exact."""
        scale, zero = self.scale.astype(np.float32), self.zero.astype(np.float32)
        return np.ascontiguousarray((scale[self.group] * (self.value.T - zero[self.group])).T, np.float32)

    def linear(self, bias=False):
        linear = torch.nn.Linear(self.value.shape[1], self.value.shape[0], bias=bias)
        linear.weight.data = torch.from_numpy(self.weight())
        return linear

    def check(self, tool):
        """The tool's own layer must stand for the same matrix."""
        read = tool(torch.eye(self.value.shape[1])).detach().reshape(self.value.shape[::-1]).T.numpy()
        error = np.linalg.norm(read - self.weight()) / np.linalg.norm(self.weight())
        if error > 5e-4:  # the tools multiply in float16
            raise ValueError(f"the tool reads its own layer otherwise: {error}")

    def gptq(self, v2):
        """Packed by AutoGPTQ."""
        outputs, inputs = self.value.shape
        tool = autogptq.QuantLinear(4, self.group_size, inputs, outputs, False)
        group = torch.from_numpy(self.group.astype(np.int32))
        zero = torch.from_numpy(self.zero.T.astype(np.float32))
        tool.pack(self.linear(), torch.from_numpy(self.scale.T.astype(np.float32)), zero, group)
        qzeros = tool.qzeros.numpy()
        if v2:  # that GPTQModel writes; AutoGPTQ knows v1 alone
            qzeros = packed_along_outputs(self.zero)
        else:
            self.check(tool)
        return {"qweight": tool.qweight.numpy(), "qzeros": qzeros, "scales": self.scale,
                "g_idx": self.group.astype(np.int32)}

    def awq(self):
        """Packed by AutoAWQ."""
        tool = autoawq.WQLinear_GEMM.from_linear(
            self.linear(), 4, self.group_size, scales=torch.from_numpy(self.scale.astype(np.float32)),
            zeros=torch.from_numpy(self.zero.astype(np.float32)))
        self.check(lambda x: x.float() @ autoawq.dequantize_gemm(tool.qweight, tool.qzeros, tool.scales, 4,
                                                                 self.group_size).float())
        return {"qweight": tool.qweight.numpy(), "qzeros": tool.qzeros.numpy(), "scales": tool.scales.numpy()}


def packed_along_outputs(values):
    """Eight neighbours of a row in an int32, the first in the lowest bits."""
    eight = values.astype(np.uint32).reshape(values.shape[0], -1, 8)
    return np.bitwise_or.reduce(eight << (4 * np.arange(8, dtype=np.uint32)), axis=2).astype(np.uint32).view(np.int32)


def cut(tensors, weight):
    """The first OUTPUTS of TOOL_OUTPUTS outputs."""
    part = lambda values: np.ascontiguousarray(values[:, : values.shape[1] * OUTPUTS // TOOL_OUTPUTS])
    out = {name: values if name == "g_idx" else part(values) for name, values in tensors.items()}
    return out | {"expected": np.ascontiguousarray(weight[:OUTPUTS])}


def write_layers(random):
    """layers/model.safetensors: every combination, by names that say which."""
    tensors = {}

    def add(name, packed, layer):
        tensors.update({f"{name}.{part}": values for part, values in cut(packed, layer.weight()).items()})

    for group_size in GROUP_SIZES:
        for symmetric in (True, False):
            for act_order in (True, False):
                for v2 in (True, False):
                    layer = Layer(random, TOOL_OUTPUTS, INPUTS, group_size, symmetric, act_order, 0 if v2 else 1)
                    name = "-".join(("gptq", "sym" if symmetric else "asym", str(group_size).replace("-1", "all"),
                                     "act" if act_order else "plain", "v2" if v2 else "v1"))
                    add(name, layer.gptq(v2), layer)
        layer = Layer(random, TOOL_OUTPUTS, INPUTS, group_size, False, False, 0)
        add(f"awq-asym-{str(group_size).replace('-1', 'all')}-plain-v2", layer.awq(), layer)
    # A zero point of 0 less one is 15; AutoGPTQ's packing spills it into its neighbours, its reading takes it so.
    layer = Layer(random, TOOL_OUTPUTS, INPUTS, 64, False, False, 0)
    packed = layer.gptq(True) | {"qzeros": packed_along_outputs((layer.zero - 1) & 15)}
    add("gptq-asym-64-wrapped-v1", packed, layer)
    (OUT / "layers").mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(OUT / "layers" / "model.safetensors"))


CONFIG = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 32,
          "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
          "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False,
          "vocab_size": 64, "torch_dtype": "float16", "eos_token_id": 63}


def write_model(name, random, quantised, config, files=None):
    """NAME: a model with quantised linear layers; NAME-plain: the same with what they stand for in float32."""
    hidden, inner, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    small = lambda *shape: random.normal(0, 0.3, shape).astype(np.float16)
    shared = {"model.embed_tokens.weight": small(vocab, hidden), "lm_head.weight": small(vocab, hidden),
              "model.norm.weight": small(hidden)}
    packed, plain = {}, {}
    for i in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        shared |= {prefix + norm + ".weight": small(hidden) for norm in ("input_layernorm", "post_attention_layernorm")}
        for part, outputs, inputs in (("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", hidden, hidden),
                                      ("self_attn.v_proj", hidden, hidden), ("self_attn.o_proj", hidden, hidden),
                                      ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden),
                                      ("mlp.down_proj", hidden, inner)):
            tensors, layer, empty_bias = quantised(part, outputs, inputs)
            plain[prefix + part + ".weight"] = layer.weight()
            packed |= {f"{prefix}{part}.{kind}": values for kind, values in tensors.items()}
            if part[-6] in "qkv":
                shared[prefix + part + ".bias"] = small(outputs)
            elif empty_bias:
                packed[prefix + part + ".bias"] = np.zeros(outputs, np.float16)
    for folder, tensors, written in ((name, packed | shared, CONFIG | config), (name + "-plain", plain | shared, CONFIG)):
        (OUT / folder).mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(OUT / folder / "model.safetensors"))
        (OUT / folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    for file, content in (files or {}).items():
        (OUT / name / file).write_text(json.dumps(content, indent=2) + "\n")


def write_models(random):
    def gptq(part, outputs, inputs):
        layer = Layer(random, outputs, inputs, 32, False, True, 1)
        return layer.gptq(v2=False), layer, True  # with biases of zeros, as AutoGPTQ writes them

    def awq(part, outputs, inputs):
        layer = Layer(random, outputs, inputs, 32, False, False, 0)
        return layer.awq(), layer, False

    write_model("gptq", random, gptq, {}, {"quantize_config.json": {
        "bits": 4, "group_size": 32, "damp_percent": 0.1, "desc_act": True, "sym": False, "true_sequential": True,
        "model_name_or_path": None, "model_file_base_name": None}})
    write_model("awq", random, awq, {"quantization_config": {
        "quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True,
        "modules_to_not_convert": None}})


def main():
    random = np.random.default_rng(9)
    write_layers(random)
    write_models(random)


if __name__ == "__main__":
    main()
