#!/usr/bin/env python3
"""Makes a GPTQ checkpoint (4 bits, asymmetric) of a Qwen2 checkpoint. Embeddings, norms, biases and the output head stay as
they are.

  python3 -m venv venv && venv/bin/pip install --no-deps --require-hashes -r scripts/quantize_requirements.txt
  venv/bin/python scripts/quantize.py models/demo /tmp/demo-int4 --calibration TEXT_FILE

With a text file, a paragraph (what empty lines divide) a sample, weights are rounded one input after the other, and what a
rounding loses is made up for by the inputs still to come, in proportion to how they go together in the text (GPTQ: Frantar et
al., 2022, arXiv:2210.17323). Without one each is rounded to the nearest. It computes in float32 with numpy: seconds for
models/demo, hours for 7 billion parameters.
"""
import argparse
import json
import pathlib
import shutil

import numpy as np

DAMPING = 0.01  # of the mean of the Hessian's diagonal
BLOCK = 128  # inputs between two updates of all later ones
LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
          "mlp.down_proj")


def read_safetensors(path):
    """{name: (dtype, shape, bytes)}"""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    header.pop("__metadata__", None)
    out = {}
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        out[name] = (tensor["dtype"], tensor["shape"], data[8 + length + begin:8 + length + end])
    return out


def write_safetensors(path, tensors):
    header, offset = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, data in tensors.values():
            file.write(data)


def to_float32(tensor):
    dtype, shape, data = tensor
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(data, {"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32).reshape(shape)


class Model:
    """Qwen2's forward pass, a layer at a time."""

    def __init__(self, directory):
        self.config = json.loads((directory / "config.json").read_text())
        if self.config.get("model_type") != "qwen2" or self.config.get("rope_scaling"):
            raise SystemExit("only Qwen2 checkpoints without rope scaling can be quantised")
        self.tensors = {}
        for file in sorted(directory.glob("*.safetensors")):
            self.tensors.update(read_safetensors(file))

    def get(self, name):
        return to_float32(self.tensors[name])

    def norm(self, x, name):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.config["rms_norm_eps"]) * self.get(name)

    def layer(self, index, x, weights, inputs=None):
        """x: [tokens][hidden] of one sample. `inputs` is told what each linear layer is given."""
        c, prefix = self.config, f"model.layers.{index}."
        heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        dim = c["hidden_size"] // heads

        def linear(name, value):
            if inputs is not None:
                inputs(name, value)
            out = value @ weights[name].T
            bias = prefix + name + ".bias"
            return out + self.get(bias) if bias in self.tensors else out

        normed = self.norm(x, prefix + "input_layernorm.weight")
        q, k, v = (linear(f"self_attn.{p}_proj", normed).reshape(len(x), -1, dim).swapaxes(0, 1) for p in "qkv")
        frequency = c["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
        angle = np.outer(np.arange(len(x)), np.concatenate([frequency, frequency]))

        def rotate(value):
            low, high = np.split(value, 2, axis=-1)
            return value * np.cos(angle) + np.concatenate([-high, low], axis=-1) * np.sin(angle)

        k, v = (np.repeat(value, heads // kv_heads, axis=0) for value in (rotate(k), v))
        scores = rotate(q) @ k.swapaxes(1, 2) / np.sqrt(dim)
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        attended = (scores / scores.sum(axis=-1, keepdims=True)) @ v
        x = x + linear("self_attn.o_proj", attended.swapaxes(0, 1).reshape(len(x), -1))
        normed = self.norm(x, prefix + "post_attention_layernorm.weight")
        gate = linear("mlp.gate_proj", normed)
        return x + linear("mlp.down_proj", gate / (1 + np.exp(-gate)) * linear("mlp.up_proj", normed))


def scale_and_zero(weight):
    """Of groups [...][inputs]: as a 4-bit number 0..15 stands for scale * (number - zero)."""
    low, high = np.minimum(weight.min(-1), 0), np.maximum(weight.max(-1), 0)
    scale = np.maximum((high - low) / 15, 1e-5).astype(np.float16).astype(np.float32)
    return scale, np.clip(np.round(-low / scale), 1, 15)  # v1 cannot store 0


def quantise(weight, hessian, group_size):
    """Values, scales and zero points [outputs][inputs], [outputs][groups] of a weight [outputs][inputs]."""
    outputs, inputs = weight.shape
    values = np.zeros((outputs, inputs), np.int64)
    scales, zeros = (np.zeros((outputs, inputs // group_size), np.float32) for _ in range(2))
    if hessian is None:
        grouped = weight.reshape(outputs, -1, group_size)
        scales, zeros = scale_and_zero(grouped)
        numbers = np.round(grouped / scales[..., None]) + zeros[..., None]
        return np.clip(numbers, 0, 15).astype(np.int64).reshape(outputs, inputs), scales, zeros
    weight, hessian = weight.astype(np.float64), hessian.astype(np.float64)
    unused = np.diag(hessian) == 0
    hessian[unused, unused] = 1
    weight[:, unused] = 0
    hessian[np.diag_indices(inputs)] += DAMPING * np.mean(np.diag(hessian))
    inverse = np.linalg.cholesky(np.linalg.inv(hessian)).T
    for begin in range(0, inputs, BLOCK):
        end = min(begin + BLOCK, inputs)
        errors = np.zeros((outputs, end - begin))
        for k in range(begin, end):
            group = k // group_size
            if k % group_size == 0:
                # As they are by now, but for what later blocks still have to make up for.
                scales[:, group], zeros[:, group] = scale_and_zero(weight[:, k:k + group_size])
            values[:, k] = np.clip(np.round(weight[:, k] / scales[:, group]) + zeros[:, group], 0, 15)
            lost = (weight[:, k] - scales[:, group] * (values[:, k] - zeros[:, group])) / inverse[k, k]
            weight[:, k:end] -= np.outer(lost, inverse[k, k:end])
            errors[:, k - begin] = lost
        weight[:, end:] -= errors @ inverse[begin:end, end:]
    return values, scales, zeros


def pack(numbers, axis):
    """Eight neighbours along `axis` in an int32, the first in the lowest bits."""
    numbers = np.moveaxis(np.asarray(numbers, np.uint32), axis, -1)
    words = numbers.reshape(*numbers.shape[:-1], -1, 8) << (4 * np.arange(8, dtype=np.uint32))
    return np.moveaxis(np.bitwise_or.reduce(words, axis=-1), -1, axis).astype(np.uint32)


def packed_tensors(name, values, scales, zeros, group_size):
    def tensor(dtype, array):
        return dtype, array.shape, np.ascontiguousarray(array).tobytes()
    return {
        name + ".qweight": tensor("I32", pack(values.T, 0)),
        name + ".qzeros": tensor("I32", pack(zeros.T - 1, 1)),
        name + ".scales": tensor("F16", scales.T.astype(np.float16)),
        name + ".g_idx": tensor("I32", (np.arange(values.shape[1]) // group_size).astype(np.int32)),
    }


def samples_of(model, directory, path, tokens):
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    table = model.get("model.embed_tokens.weight")
    paragraphs = [p for p in pathlib.Path(path).read_text().split("\n\n") if p.strip()]
    return [table[tokenizer.encode(p).ids[:tokens]] for p in paragraphs]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--calibration", help="a text file; without it weights are rounded to the nearest")
    parser.add_argument("--group-size", type=int, default=128, choices=(32, 64, 128))
    parser.add_argument("--tokens", type=int, default=512, help="of a sample at most")
    arguments = parser.parse_args()
    model, group_size = Model(arguments.model), arguments.group_size
    samples = samples_of(model, arguments.model, arguments.calibration, arguments.tokens) if arguments.calibration else []
    written = dict(model.tensors)
    for index in range(model.config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        weights = {name: model.get(prefix + name + ".weight") for name in LINEAR}
        hessians = {}

        def add(name, x):
            hessians[name] = hessians.get(name, 0) + x.T @ x

        for x in samples:
            model.layer(index, x, weights, add)
        lost = {}
        for name, weight in weights.items():
            if weight.shape[1] % group_size != 0:
                raise SystemExit(f"{prefix}{name} has {weight.shape[1]} inputs, which groups of {group_size} do not divide")
            values, scales, zeros = quantise(weight.copy(), hessians.get(name), group_size)
            spread = [np.repeat(a, group_size, axis=1) for a in (scales, zeros)]
            weights[name] = (spread[0] * (values - spread[1])).astype(np.float32)
            lost[name] = np.linalg.norm(weights[name] - weight) / np.linalg.norm(weight)
            del written[prefix + name + ".weight"]
            written.update(packed_tensors(prefix + name, values, scales, zeros, group_size))
        # The layers to come are made for what this one gives them now.
        samples = [model.layer(index, x, weights) for x in samples]
        print(f"layer {index}: " + ", ".join(f"{name.split('.')[1]} {error:.3f}" for name, error in lost.items()), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for file in arguments.model.iterdir():
        if file.suffix == ".json" and file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copy(file, arguments.out)
    write_safetensors(arguments.out / "model.safetensors", written)
    model.config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": False,
                                           "desc_act": False, "checkpoint_format": "gptq"}
    (arguments.out / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")


if __name__ == "__main__":
    main()
