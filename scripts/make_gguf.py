#!/usr/bin/env python3
"""Writes a Qwen2 checkpoint (config.json, model.safetensors in bfloat16, tokenizer.json) as one GGUF file for llama.cpp. Weights are
not quantised: matrices get the type that is asked for, everything else float32, as llama.cpp wants it.

    scripts/make_gguf.py MODEL_DIR FILE [--type bf16|f16|f32]
"""
import argparse
import array
import json
import pathlib
import struct
import sys

ALIGNMENT = 32
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
# As ggml numbers types of tensors, and what a whole file of them is called there.
TYPES = {"f32": (0, 0), "f16": (1, 1), "bf16": (30, 32)}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
TENSORS = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
LAYER_TENSORS = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
                 "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
                 "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def encoded(kind, value):
    if kind == STRING:
        return text(value)
    return struct.pack({UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}[kind], value)


def entry(key, kind, value):
    """A list becomes an array of `kind`."""
    if not isinstance(value, list):
        return text(key) + struct.pack("<I", kind) + encoded(kind, value)
    return text(key) + struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(encoded(kind, item) for item in value)


def name_of(tensor):
    stem, _, kind = tensor.removeprefix("model.").rpartition(".")
    if not stem.startswith("layers."):
        return f"{TENSORS[stem]}.{kind}"
    _, layer, inner = stem.split(".", 2)
    return f"blk.{layer}.{LAYER_TENSORS[inner]}.{kind}"


def converted(bfloat16, kind):
    if kind == "bf16":
        return bfloat16
    # A bfloat16 is the upper half of a float32.
    float32 = bytearray(2 * len(bfloat16))
    float32[2::4], float32[3::4] = bfloat16[0::2], bfloat16[1::2]
    if kind == "f32":
        return bytes(float32)
    values = array.array("f", bytes(float32))
    return struct.pack(f"<{len(values)}e", *values)


def read_tensors(path):
    """Name to (shape, bytes)."""
    data = path.read_bytes()
    length, = struct.unpack_from("<Q", data)
    begin = 8 + length
    tensors = {}
    for name, facts in json.loads(data[8:begin]).items():
        if name == "__metadata__":
            continue
        if facts["dtype"] != "BF16":
            raise ValueError(f"{path}: {name} is {facts['dtype']}; only BF16 is written")
        first, last = facts["data_offsets"]
        tensors[name] = facts["shape"], data[begin + first:begin + last]
    return tensors


def vocabulary(tokenizer, size):
    """Texts and kinds of all ids."""
    texts, kinds = [f"[unused{i}]" for i in range(size)], [UNUSED] * size
    for token, number in tokenizer["model"]["vocab"].items():
        texts[number], kinds[number] = token, NORMAL
    for token in tokenizer["added_tokens"]:
        texts[token["id"]], kinds[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    return texts, kinds


def metadata(folder, kind):
    config, tokenizer, chat = (json.loads((folder / name).read_text())
                               for name in ("config.json", "tokenizer.json", "tokenizer_config.json"))
    if config["architectures"] != ["Qwen2ForCausalLM"]:
        raise ValueError(f"{folder}: {config['architectures']} is not Qwen2ForCausalLM, the one that is written")
    texts, kinds = vocabulary(tokenizer, config["vocab_size"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    return [("general.architecture", STRING, "qwen2"),
            ("general.name", STRING, folder.name),
            ("general.file_type", UINT32, TYPES[kind][1]),
            ("qwen2.block_count", UINT32, config["num_hidden_layers"]),
            ("qwen2.context_length", UINT32, config["max_position_embeddings"]),
            ("qwen2.embedding_length", UINT32, config["hidden_size"]),
            ("qwen2.feed_forward_length", UINT32, config["intermediate_size"]),
            ("qwen2.attention.head_count", UINT32, config["num_attention_heads"]),
            ("qwen2.attention.head_count_kv", UINT32, config["num_key_value_heads"]),
            ("qwen2.attention.layer_norm_rms_epsilon", FLOAT32, config["rms_norm_eps"]),
            ("qwen2.rope.freq_base", FLOAT32, config["rope_theta"]),
            ("tokenizer.ggml.model", STRING, "gpt2"),
            ("tokenizer.ggml.pre", STRING, "qwen2"),
            ("tokenizer.ggml.tokens", STRING, texts),
            ("tokenizer.ggml.token_type", INT32, kinds),
            ("tokenizer.ggml.merges", STRING, merges),
            ("tokenizer.ggml.eos_token_id", UINT32, config["eos_token_id"]),
            ("tokenizer.ggml.padding_token_id", UINT32, config["pad_token_id"]),
            ("tokenizer.ggml.add_bos_token", BOOL, False),
            ("tokenizer.chat_template", STRING, chat["chat_template"])]


def write(folder, path, kind):
    entries = metadata(folder, kind)
    head, data = [], bytearray()
    for name, (shape, bfloat16) in read_tensors(folder / "model.safetensors").items():
        own = kind if len(shape) > 1 else "f32"
        # The innermost dimension comes first there.
        head.append(text(name_of(name)) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), TYPES[own][0], len(data)))
        data += converted(bfloat16, own)
        data += bytes(-len(data) % ALIGNMENT)
    begin = struct.pack("<4sIQQ", b"GGUF", 3, len(head), len(entries)) + b"".join(entry(*item) for item in entries) + b"".join(head)
    path.write_bytes(begin + bytes(-len(begin) % ALIGNMENT) + data)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="MODEL_DIR", type=pathlib.Path)
    parser.add_argument("file", metavar="FILE", type=pathlib.Path)
    parser.add_argument("--type", choices=TYPES, default="bf16", help="of matrices")
    arguments = parser.parse_args()
    try:
        write(arguments.folder, arguments.file, arguments.type)
    except (OSError, ValueError) as error:
        sys.exit(f"make_gguf: {error}")


if __name__ == "__main__":
    main()
