#!/usr/bin/env python3
"""Writes tests/data/engine: tiny random checkpoints of every family with results from Hugging Face
transformers in float64, so that the engine's tests need no large files.

  python3 -m venv venv && venv/bin/pip install --require-hashes -r scripts/fixture_requirements.txt
  venv/bin/python scripts/make_engine_fixtures.py [NAME...]
"""
import json
import math
import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import (LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config,
                          Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data" / "engine"
GREEDY_TOKENS = 16

FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}

LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

# `config` goes to transformers and into config.json; `written` only into config.json (None
# removes `architectures` and `torch_dtype`), to try the forms that checkpoints come in; `prefix` replaces the "model." of tensor names.
#
# qwen2-gqa: three query heads on one KV head, one file, bfloat16.
# qwen2-yarn-tied: YaRN, tied embeddings, two shards, float16.
# qwen3-gqa: head_dim larger than hidden_size / heads, four query heads on two KV heads.
# qwen3-bias-yarn-tied: attention_bias, YaRN in the form of transformers 5, tied, head_dim left to the default of 128.
# llama-rope3: llama3 scaling, most positions beyond the original length, {"rope_type": ...}, two shards.
# llama-biases: attention_bias and mlp_bias, as many KV heads as heads, llama3 scaling in the form of transformers 5,
#   names without "model.", float32, tied, no architectures.
# mistral-nowindow: head_dim given and smaller than hidden_size / heads.
MODELS = {
    "qwen2-gqa": dict(
        family="qwen2",
        dtype=torch.bfloat16,
        shards=1,
        lengths=(1, 20, 75),
        config=dict(vocab_size=160, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=1024,
                    rope_theta=1e6, tie_word_embeddings=False, eos_token_id=159)),
    "qwen2-yarn-tied": dict(
        family="qwen2",
        dtype=torch.float16,
        shards=2,
        lengths=(2, 33, 150),
        config=dict(vocab_size=128, hidden_size=64, intermediate_size=56, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
                    rope_theta=1e4, tie_word_embeddings=True, eos_token_id=[127, 126],
                    rope_scaling={"rope_type": "yarn", "factor": 4.0,
                                  "original_max_position_embeddings": 64})),
    "qwen3-gqa": dict(
        family="qwen3",
        dtype=torch.bfloat16,
        shards=1,
        lengths=(1, 31, 90),
        config=dict(vocab_size=152, hidden_size=48, intermediate_size=72, num_hidden_layers=3,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
                    rope_theta=1e6, rms_norm_eps=1e-5, tie_word_embeddings=False, attention_bias=False,
                    sliding_window=None, max_window_layers=3, eos_token_id=151)),
    "qwen3-bias-yarn-tied": dict(
        family="qwen3",
        dtype=torch.bfloat16,
        shards=1,
        lengths=(3, 40, 130),
        config=dict(vocab_size=120, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
                    tie_word_embeddings=True, attention_bias=True, eos_token_id=[119],
                    rope_parameters={"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0,
                                     "original_max_position_embeddings": 64, "attention_factor": 1.1}),
        written=dict(torch_dtype=None, dtype="bfloat16", layer_types=["full_attention"] * 2)),
    "llama-rope3": dict(
        family="llama",
        dtype=torch.float16,
        shards=2,
        lengths=(1, 30, 200),
        config=dict(vocab_size=144, hidden_size=64, intermediate_size=88, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=512, rope_theta=5e5,
                    rms_norm_eps=1e-5, tie_word_embeddings=False, eos_token_id=[143, 142],
                    rope_scaling={"rope_type": "llama3", **LLAMA3_ROPE}),
        written=dict(head_dim=None, pretraining_tp=1, mlp_bias=False)),
    "llama-biases": dict(
        family="llama",
        dtype=torch.float32,
        shards=1,
        prefix="",
        lengths=(2, 50, 110),
        config=dict(vocab_size=100, hidden_size=48, intermediate_size=52, num_hidden_layers=2,
                    num_attention_heads=3, max_position_embeddings=256, tie_word_embeddings=True,
                    attention_bias=True, mlp_bias=True, eos_token_id=2,
                    rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, **LLAMA3_ROPE}),
        written=dict(architectures=None, torch_dtype=None, dtype="float32")),
    "mistral-nowindow": dict(
        family="mistral",
        dtype=torch.bfloat16,
        shards=1,
        lengths=(1, 60),
        config=dict(vocab_size=112, hidden_size=64, intermediate_size=80, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
                    rope_theta=1e6, sliding_window=None, tie_word_embeddings=False, eos_token_id=2)),
}


def randomise(model, generator):
    """Weights of a size that makes every part of the model matter."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith("norm.weight"):
            value = 1 + 0.2 * noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        elif "embed_tokens" in name:
            value = 0.7 * noise
        else:
            value = 1.2 * noise / math.sqrt(parameter.shape[1])
        # Values that bfloat16 and float16 both hold, so that no mode of the engine rounds weights.
        value = value.to(torch.bfloat16).double()
        parameter.data.copy_(torch.where(value.abs() < 1e-3, torch.zeros_like(value), value))


def reference(model, prompt):
    """What the engine must reproduce for one prompt, every step computed from scratch."""
    tokens, greedy, greedy_logprobs, margin = list(prompt), [], [], math.inf
    first_logits = prompt_logprobs = None
    for _ in range(GREEDY_TOKENS):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0].double()
        logprobs = torch.log_softmax(logits, dim=-1)
        if first_logits is None:
            first_logits = logits[-1].tolist()
            prompt_logprobs = [logprobs[i, t].item() for i, t in enumerate(prompt[1:])]
        best = torch.topk(logits[-1], 2)
        margin = min(margin, (best.values[0] - best.values[1]).item())
        token = best.indices[0].item()
        greedy.append(token)
        greedy_logprobs.append(logprobs[-1, token].item())
        tokens.append(token)
    short = lambda values: [float(f"{v:.7g}") for v in values]
    return dict(prompt_token_ids=prompt, first_logits=short(first_logits), greedy=greedy,
                greedy_logprobs=short(greedy_logprobs), min_margin=margin,
                prompt_logprobs=short(prompt_logprobs))


def save_weights(folder, tensors, shards):
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update({name: file for name in part})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def config_json(spec):
    architecture = FAMILIES[spec["family"]][1].__name__
    written = dict(architectures=[architecture], model_type=spec["family"], hidden_act="silu",
                   torch_dtype=str(spec["dtype"]).removeprefix("torch."), rms_norm_eps=1e-6)
    if spec["family"].startswith("qwen"):
        written["use_sliding_window"] = False
    written |= spec["config"]
    for key, value in spec.get("written", {}).items():
        written[key] = value
        if key in ("architectures", "torch_dtype") and value is None:
            del written[key]
    return written


def make(name, spec):
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    make_config, make_model = FAMILIES[spec["family"]]
    config = make_config(**json.loads(json.dumps(spec["config"])), attn_implementation="eager")
    model = make_model(config).double().eval()
    generator = torch.Generator().manual_seed(sum(name.encode()))
    randomise(model, generator)
    tensors = {key: value.to(spec["dtype"]).contiguous() for key, value in
               model.state_dict().items()
               if not (spec["config"]["tie_word_embeddings"] and key == "lm_head.weight")}
    model.load_state_dict({key: value.double() for key, value in tensors.items()}, strict=False)
    model.tie_weights()
    prefix = spec.get("prefix", "model.")
    save_weights(folder, {prefix + key.removeprefix("model.") if key.startswith("model.") else key: value
                          for key, value in tensors.items()}, spec["shards"])
    (folder / "config.json").write_text(json.dumps(config_json(spec), indent=1) + "\n")
    vocab = spec["config"]["vocab_size"]
    cases = []
    for length in spec["lengths"]:
        prompt = torch.randint(vocab, (length,), generator=generator).tolist()
        cases.append(reference(model, prompt))
    for file in folder.iterdir():
        file.chmod(0o644)
    (folder / "reference.json").write_text(json.dumps({"model": name, "cases": cases}) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        for name in sys.argv[1:] or MODELS:
            make(name, MODELS[name])
