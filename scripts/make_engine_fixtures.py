#!/usr/bin/env python3
"""Writes tests/data/engine: tiny random Qwen2 checkpoints with results from Hugging Face
transformers in float64, so that the engine's tests need no large files.

  python3 -m venv venv && venv/bin/pip install torch==2.11.0 transformers==5.17.0 safetensors==0.8.0
  venv/bin/python scripts/make_engine_fixtures.py
"""
import json
import math
import pathlib

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data" / "engine"
GREEDY_TOKENS = 16

# qwen2-gqa: three query heads on one KV head, one file, bfloat16.
# qwen2-yarn-tied: YaRN, tied embeddings, two shards, float16.
MODELS = {
    "qwen2-gqa": dict(
        dtype=torch.bfloat16,
        shards=1,
        lengths=(1, 20, 75),
        config=dict(vocab_size=160, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=1024,
                    rope_theta=1e6, tie_word_embeddings=False, eos_token_id=159)),
    "qwen2-yarn-tied": dict(
        dtype=torch.float16,
        shards=2,
        lengths=(2, 33, 150),
        config=dict(vocab_size=128, hidden_size=64, intermediate_size=56, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
                    rope_theta=1e4, tie_word_embeddings=True, eos_token_id=[127, 126],
                    rope_scaling={"rope_type": "yarn", "factor": 4.0,
                                  "original_max_position_embeddings": 64})),
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


def make(name, spec):
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    config = Qwen2Config(**spec["config"], attn_implementation="eager")
    model = Qwen2ForCausalLM(config).double().eval()
    generator = torch.Generator().manual_seed(sum(name.encode()))
    randomise(model, generator)
    tensors = {key: value.to(spec["dtype"]).contiguous() for key, value in
               model.state_dict().items()
               if not (spec["config"]["tie_word_embeddings"] and key == "lm_head.weight")}
    model.load_state_dict({key: value.double() for key, value in tensors.items()}, strict=False)
    model.tie_weights()
    save_weights(folder, tensors, spec["shards"])
    written = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_act="silu",
                   torch_dtype=str(spec["dtype"]).removeprefix("torch."), rms_norm_eps=1e-6,
                   use_sliding_window=False, **spec["config"])
    (folder / "config.json").write_text(json.dumps(written, indent=1) + "\n")
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
        for name, spec in MODELS.items():
            make(name, spec)
