#!/usr/bin/env python3
"""A checkpoint of random weights in the widths of Qwen2.5-7B, with reference results computed on this machine's GPU.

usage: make_gpu_reference.py FOLDER [--layers N]

Writes FOLDER/reference/qwen7b-widths: bf16 safetensors, config.json, and reference.json in the form of tests/data/engine,
by Hugging Face transformers in float32 from the bf16 weights, and how far its own bf16 model is from them. Then
TANDEM_SHARED_DIR=FOLDER cuda_engine_test --gtest_filter=*SharedModels
holds the engine against it. Needs torch with CUDA and transformers; 8 layers are 4.1 GB, Qwen2.5-7B's 28 are 13 GB.
"""
import argparse
import json
import pathlib
import time

import torch
import transformers

VOCAB = 8192
GREEDY = 16  # tokens


def make_model(layers):
    config = transformers.Qwen2Config(
        vocab_size=VOCAB, hidden_size=3584, intermediate_size=18944, num_hidden_layers=layers, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=4096, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=False,
        use_sliding_window=False, bos_token_id=None, eos_token_id=VOCAB - 1)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.Qwen2ForCausalLM(config)
    # What a checkpoint has and an initialisation has not: norm weights other than one, biases other than zero.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
    return model.to(torch.bfloat16)


@torch.no_grad()
def make_case(model, prompt):
    ids = torch.tensor([prompt], device="cuda")
    output = model(ids, use_cache=True)
    logits = output.logits[0].float()
    logprobs = torch.log_softmax(logits, -1)
    case = {"prompt_token_ids": prompt, "first_logits": logits[-1].tolist(),
            "prompt_logprobs": logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist(), "greedy": [],
            "greedy_logprobs": [], "min_margin": 1e9}
    row, past = logits[-1], output.past_key_values
    for _ in range(GREEDY):
        best = torch.topk(row, 2)
        case["min_margin"] = min(case["min_margin"], (best.values[0] - best.values[1]).item())
        case["greedy"].append(best.indices[0].item())
        case["greedy_logprobs"].append(torch.log_softmax(row, -1)[best.indices[0]].item())
        output = model(best.indices[:1][None], past_key_values=past, use_cache=True)
        row, past = output.logits[0, -1].float(), output.past_key_values
    return case


@torch.no_grad()
def rounding_of(folder, cases):
    """Relative L2 of the logits of transformers' own bfloat16 model to those of the cases, over all of them."""
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to("cuda").eval()
    apart = length = 0.0
    for case in cases:
        ids = torch.tensor([case["prompt_token_ids"]], device="cuda")
        want = torch.tensor(case["first_logits"], dtype=torch.float64)
        got = model(ids).logits[0, -1].double().cpu()
        apart += (got - want).square().sum().item()
        length += want.square().sum().item()
    return (apart / length) ** 0.5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    begin = time.time()
    folder = options.folder / "reference" / "qwen7b-widths"
    model = make_model(options.layers)
    model.save_pretrained(folder)
    del model
    # Read back, so that what is no weight, the rotation's frequencies, was never rounded.
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).to("cuda").eval()
    generator = torch.Generator().manual_seed(1)
    cases = [make_case(model, torch.randint(VOCAB, (length,), generator=generator).tolist())
             for length in (1, 17, 300, 900)]
    del model
    rounding = rounding_of(folder, cases)
    (folder / "reference.json").write_text(
        json.dumps({"model": "qwen7b-widths", "bfloat16_relative_l2": rounding, "cases": cases}) + "\n")
    print(f"{folder}: {options.layers} layers, bf16 is {rounding:.2e} from float32, "
          f"margins {[round(case['min_margin'], 3) for case in cases]}, {time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
