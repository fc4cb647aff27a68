#!/usr/bin/env python3
"""Writes the first inputs of each fuzzer to tests/fuzz/corpus: small valid files from which it can start.

Fuzzing from nothing takes hours to find a brace. scripts/fuzz_corpus later adds what a run has found.
"""
import json
import pathlib
import struct

ROOT = pathlib.Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests/fuzz/corpus"
TEXT = ROOT / "tests/data/text"


def write(fuzzer, name, content):
    (CORPUS / fuzzer).mkdir(parents=True, exist_ok=True)
    (CORPUS / fuzzer / f"seed-{name}").write_bytes(content)


def small_tokenizer():
    """The fixture with byte tokens and a few merges only."""
    tokenizer = json.loads((TEXT / "tokenizer.json").read_text())
    model = tokenizer["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < 262}
    joined = lambda merge: "".join(merge) if isinstance(merge, list) else merge.replace(" ", "")
    model["merges"] = [merge for merge in model["merges"] if joined(merge) in model["vocab"]]
    return json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")).encode()


def tokenizer_seeds():
    """The first byte says which reader gets the rest: see tokenizer_fuzz.cc."""
    write("tokenizer_fuzz", "tokenizer", b"\0" + small_tokenizer())
    for i, text in enumerate(["The café <|im_end|> 12\n", "ＡＢ e\u0301 가 \U0001F600\r\n\t  don't we'll",
                              "<|im_start|>user\n\u0000\u2028"]):
        write("tokenizer_fuzz", f"text-{i}", b"\1" + text.encode())
    for path in sorted((TEXT / "chat_templates").glob("*.jinja")):
        write("tokenizer_fuzz", path.name, b"\2" + path.read_bytes())
        config = {"chat_template": path.read_text(), "eos_token": "<|im_end|>"}
        write("tokenizer_fuzz", f"{path.name}.json", b"\2" + json.dumps(config).encode())
    write("tokenizer_fuzz", "generation-config", b"\3" + (ROOT / "models/demo/generation_config.json").read_bytes())
    write("tokenizer_fuzz", "json", b'\4{"z":1,"a":[0.1,1e22,-0.0,5e-324,true,null],"u":"\\ud83d\\ude00\\n"}')


def safetensors(header, data):
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def safetensors_seeds():
    tensor = lambda dtype, shape, begin, end: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    write("safetensors_fuzz", "one", safetensors({"a": tensor("F32", [2, 2], 0, 16)}, bytes(16)))
    write("safetensors_fuzz", "two", safetensors({"__metadata__": {"format": "pt"}, "a": tensor("BF16", [3], 0, 6),
                                                  "b": tensor("F16", [], 6, 8)}, bytes(8)))
    write("safetensors_fuzz", "hole", safetensors({"a": tensor("U8", [1], 4, 5)}, bytes(8)))
    write("safetensors_fuzz", "empty", safetensors({}, b""))


def kv_frame_seeds():
    """The bytes steer a conversation, frame by frame: see Conversation in kv_frame_fuzz.cc."""
    write("kv_frame_fuzz", "zeros", bytes(64))
    write("kv_frame_fuzz", "all-bytes", bytes(range(256)))
    frames = [[0, kind, 0, 2, 0, 2, 0x5A] for kind in range(24)]
    write("kv_frame_fuzz", "each-type", bytes([0] + [byte for frame in frames for byte in frame]))


if __name__ == "__main__":
    tokenizer_seeds()
    safetensors_seeds()
    kv_frame_seeds()
