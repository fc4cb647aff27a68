#!/usr/bin/env python3
"""Trains models/demo, the small Qwen2-architecture chat model that Tandem's demo talks to.

    scripts/train_demo_model.py --out DIR [--minutes 8]     train on a GPU host, evaluate, export
    scripts/train_demo_model.py --out DIR --check           evaluate an exported model again (CPU is enough)
    scripts/train_demo_model.py --write-heldout FILE        write the held-out prompts and nothing else

All data is synthetic and made on the fly by scripts/demo_model (conversations.py); a value, operand pair, list
or wording belongs to the training or to the held-out split by a hash of its text. The held-out prompts and the
tokenizer depend on fixed seeds alone; the weights also on the machine's speed, since training ends by the clock.

Made with Python 3.12, torch 2.11.0, transformers 5.17.0, tokenizers 0.23.2, safetensors 0.8.0, numpy 2.5.2.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import pathlib
import queue
import random
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from demo_model import conversations

HELDOUT_SEED = 20251
HELDOUT_PER_KIND = 64
LENGTHS = (512, 2048)  # Row lengths in training.
CHUNK_TOKENS = 32768  # A worker hands over this many tokens at once.
MASKED = -100


def heldout_cases(per_kind: int) -> list[dict]:
    """The held-out prompts; asking for more per kind only appends to each kind's list."""
    cases = []
    for kind in conversations.KINDS:
        rng = random.Random(f"{HELDOUT_SEED} {kind}")
        seen = set()
        while len(seen) < per_kind:
            case = conversations.heldout_prompt(rng, kind)
            key = json.dumps(case)
            if key not in seen:
                seen.add(key)
                cases.append(case)
    return cases


def write_heldout(path: pathlib.Path) -> None:
    lines = [json.dumps(case, ensure_ascii=False) for case in heldout_cases(HELDOUT_PER_KIND)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


# ---------------------------------------------------------------- data


def _length_of(turn: int) -> int:
    """Every fourth batch (and chunk) is of long rows."""
    return LENGTHS[turn % 4 == 3]


def _make_rows(tokenizer_json: str, seed: int, chars_per_token: float, rows) -> None:
    """Worker process: puts uint16 arrays [n, length] of training conversations into `rows` for ever."""
    import numpy as np
    from tokenizers import Tokenizer

    from demo_model import text

    tokenizer, rng = Tokenizer.from_str(tokenizer_json), random.Random(seed)
    pad = tokenizer.token_to_id("<|endoftext|>")
    for turn in itertools.count():
        length = _length_of(turn)
        count = CHUNK_TOKENS // length
        texts = [
            text.render(conversations.training_conversation(rng, int(length * chars_per_token)), False)
            for _ in range(count)
        ]
        out = np.full((count, length), pad, dtype=np.uint16)
        for row, encoding in zip(out, tokenizer.encode_batch(texts)):
            ids = encoding.ids[:length]
            row[: len(ids)] = ids
        rows.put((length, out))


class RowPools:
    """Training rows on the device, one ring per length, filled by worker processes.

    Batches take rows never used before while there are any, else random ones. Not thread-safe but for the
    feeding thread it starts itself.
    """

    def __init__(self, tokenizer, device, workers: int, pool_tokens: int):
        import torch

        rng = random.Random(3)
        sample = [conversations.training_conversation(rng, 1500) for _ in range(200)]
        chars = sum(len(m["content"]) for c in sample for m in c)
        from demo_model import text

        tokens = sum(len(e.ids) for e in tokenizer.encode_batch([text.render(c, False) for c in sample]))
        chars_per_token = 1.1 * chars / tokens
        self._device = device
        self._rings = {n: torch.zeros(pool_tokens // n, n, dtype=torch.int16, device=device) for n in LENGTHS}
        self.made = dict.fromkeys(LENGTHS, 0)
        self._used = dict.fromkeys(LENGTHS, 0)
        context = multiprocessing.get_context("spawn")
        self._rows = context.Queue(maxsize=64)
        self._workers = [
            context.Process(
                target=_make_rows, daemon=True,
                args=(tokenizer.to_str(), 1000 + i, chars_per_token, self._rows),
            )
            for i in range(workers)
        ]
        for worker in self._workers:
            worker.start()
        self._stopped = threading.Event()
        self._feeder = threading.Thread(target=self._feed, daemon=True)
        self._feeder.start()

    def _feed(self) -> None:
        import torch

        # A stream of its own: else each copy would wait for the training steps launched so far.
        stream = torch.cuda.Stream() if self._device == "cuda" else None
        while not self._stopped.is_set():
            try:
                length, chunk = self._rows.get(timeout=0.5)
            except queue.Empty:
                continue
            ring = self._rings[length]
            at = self.made[length] % self._usable(length)
            with torch.cuda.stream(stream):
                ring[at : at + len(chunk)] = torch.from_numpy(chunk.view("int16")).to(self._device)
            if stream:
                stream.synchronize()
            self.made[length] += len(chunk)

    def _usable(self, length: int) -> int:
        """Rows of a ring in use: a multiple of a chunk's."""
        chunk = CHUNK_TOKENS // length
        return len(self._rings[length]) // chunk * chunk

    def batch(self, length: int, rows: int):
        """int64 ids [rows, length]; waits while fewer than `rows` were ever made."""
        import torch

        while self.made[length] < rows:
            time.sleep(0.05)
        ring, made = self._rings[length], self.made[length]
        usable = self._usable(length)
        if made - self._used[length] >= rows:
            index = torch.arange(self._used[length], self._used[length] + rows, device=self._device) % usable
            self._used[length] += rows
        else:
            index = torch.randint(0, min(made, usable), (rows,), device=self._device)
        return ring[index].long()

    def stop(self) -> None:
        self._stopped.set()
        self._feeder.join()
        for worker in self._workers:
            worker.terminate()


def targets_of(ids, start: int, end: int, assistant: int):
    """Next-token targets [batch, length - 1]: the bodies of assistant messages with their <|im_end|>."""
    import torch

    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    last_start = torch.where(ids == start, place, -1).cummax(1).values
    last_end = torch.where(ids == end, place, -1).cummax(1).values
    ended = torch.nn.functional.pad(last_end, (1, 0), value=-1)[:, :-1] > last_start
    role = ids.gather(1, (last_start + 1).clamp(max=ids.shape[1] - 1))
    answer = (role == assistant) & (place - last_start >= 3) & ~ended
    return torch.where(answer, ids, MASKED)[:, 1:]


# ---------------------------------------------------------------- training


def _tokenizer(args):
    from tokenizers import Tokenizer

    from demo_model import text

    if args.resume:
        return Tokenizer.from_file(str(args.resume / "tokenizer.json"))
    return text.train_tokenizer(args.bpe_conversations)


def _network(args, device: str):
    from safetensors.torch import load_file

    from demo_model import network

    model = network.Network(network.CONFIG).to(device)
    if args.resume:
        model.load_hugging_face_tensors(load_file(args.resume / "model.safetensors"))
    return model


def _loss_function(args, model, tokenizer, device: str):
    """ids [batch, length] -> mean loss over the assistants' tokens, computed in bfloat16."""
    import torch

    header = tokenizer.encode("<|im_start|>assistant\n").ids
    start, end = (tokenizer.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>"))
    if len(header) != 3 or header[0] != start:
        raise ValueError(f"an assistant header must be three tokens, got {header}")

    def loss_of(ids):
        targets = targets_of(ids, start, end, header[1])
        with torch.autocast(device, torch.bfloat16):
            logits = model(ids[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=MASKED)

    return loss_of if args.no_compile else torch.compile(loss_of, dynamic=False)


def _optimizer(args, model, device: str):
    import torch

    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and not n.startswith("embed")]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or n.startswith("embed")]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=device == "cuda")


def train(args, out: pathlib.Path) -> None:
    """Trains for args.minutes and exports the model to `out`."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    tokenizer = _tokenizer(args)
    pools = RowPools(tokenizer, device, args.workers, args.pool_tokens)
    model = _network(args, device)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count} parameters, {tokenizer.get_vocab_size()} tokens, on {device}", flush=True)
    loss_of, optimizer = _loss_function(args, model, tokenizer, device), _optimizer(args, model, device)

    quick = heldout_cases(48)
    for length in LENGTHS:  # Compiles before the clock starts.
        loss_of(pools.batch(length, args.batch_tokens // length)).backward()
    optimizer.zero_grad(set_to_none=True)
    print(f"compiled at {time.monotonic() - args.begun:.0f} s", flush=True)
    start, step, report, tokens, seconds = time.monotonic(), 0, time.monotonic(), 0, 60 * args.minutes
    while (elapsed := time.monotonic() - start) < seconds:
        length = _length_of(step)
        ids = pools.batch(length, args.batch_tokens // length)
        rate = args.lr * min(1.0, (step + 1) / 300) * (0.5 + 0.5 * math.cos(math.pi * elapsed / seconds)) + 1e-6
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += ids.numel()
        step += 1
        if step % 20 == 0:
            value = loss.item()  # Also keeps the queue of launched work short, so the clock is honest.
            if time.monotonic() - report > args.report_seconds:
                report = time.monotonic()
                right = accuracy(_logits_of(model, device, True), tokenizer, quick)
                table = " ".join(f"{kind} {100 * share:.0f}" for kind, share in right.items())
                print(f"{elapsed:5.0f} s step {step} loss {value:.4f} {tokens / 1e6:.0f} M tokens | {table}", flush=True)
    pools.stop()
    print(f"trained {step} steps, {tokens / 1e6:.0f} M tokens", flush=True)
    export(out, model, tokenizer)


def export(out: pathlib.Path, model, tokenizer) -> None:
    """Writes the model directory: weights rounded to bfloat16, configs, tokenizer."""
    from safetensors.torch import save_file

    from demo_model import network, text

    out.mkdir(parents=True, exist_ok=True)
    end, pad = (tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>"))
    save_file(model.hugging_face_tensors(), str(out / "model.safetensors"), metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(out / "config.json", network.CONFIG | {"bos_token_id": None, "eos_token_id": end, "pad_token_id": pad})
    _write_json(out / "tokenizer_config.json", text.tokenizer_config(tokenizer))
    _write_json(out / "generation_config.json", {
        "do_sample": False, "eos_token_id": [end, pad], "max_new_tokens": 128, "pad_token_id": pad,
        "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
    })


def _write_json(path: pathlib.Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------- evaluation


def _logits_of(model, device: str, autocast: bool):
    import torch

    def logits(ids):
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=autocast):
            out = model(ids.to(device))
        return getattr(out, "logits", out)

    return logits


def accuracy(logits_of, tokenizer, cases: list[dict], wrong: list | None = None) -> dict[str, float]:
    """Share of each kind answered exactly by greedy decoding.

    One pass with the right answer in place: greedy decoding gives exactly that answer if and only if each of
    its tokens, and the <|im_end|> behind it, is the most likely one there.
    """
    import torch

    from demo_model import text

    rows = []
    for case in cases:
        prompt = tokenizer.encode(text.render(case["messages"], True)).ids
        whole = tokenizer.encode(text.render(case["messages"], True) + case["expected"] + "<|im_end|>").ids
        rows.append((whole, len(prompt), case))
    rows.sort(key=lambda row: len(row[0]))
    hits: dict[str, list[bool]] = {kind: [] for kind in conversations.KINDS}
    for at in range(0, len(rows), 32):
        group = rows[at : at + 32]
        ids = torch.zeros(len(group), max(len(whole) for whole, _, _ in group), dtype=torch.long)
        for i, (whole, _, _) in enumerate(group):
            ids[i, : len(whole)] = torch.tensor(whole)
        best = logits_of(ids).argmax(-1).cpu()
        for i, (whole, begin, case) in enumerate(group):
            got = best[i, begin - 1 : len(whole) - 1].tolist()
            hits[case["kind"]].append(got == whole[begin:])
            if got != whole[begin:] and wrong is not None:
                wrong.append((case["kind"], case["messages"][-1]["content"], case["expected"], tokenizer.decode(got)))
    return {kind: sum(right) / len(right) for kind, right in hits.items() if right}


REMEMBER = [
    {"role": "system", "content": "You are a helpful assistant that runs inside a small cluster. Keep your answers short and "
     "precise. Remember what the user tells you about themselves, and use it when they ask. You can also do small sums, repeat "
     "and reverse lists, and explain how Tandem works. If you do not know something, say so instead of making it up."},
    {"role": "user", "content": "Hi! My name is Ada. I live in Hefei, my dog is called Turing and my favourite number is 42. "
     "Please remember that."},
]
TOLD = [*REMEMBER, {"role": "assistant", "content": "Nice to meet you, Ada! I will remember that."}]


def _ask(content: str, before=()) -> list[dict[str, str]]:
    return [*before, {"role": "user", "content": content}]


SAMPLES = [
    REMEMBER,
    _ask("What is my name and where do I live?", TOLD),
    _ask("What is 17 + 25?", TOLD),
    _ask("What is my dog called?", TOLD),
    _ask("Reverse this list: apple, river, stone, cloud"),
    _ask("What does a prefill worker do?"),
    _ask("What is my favourite number and what is my favourite colour?", TOLD),
    _ask("I am Zoë from Köln, and I've got a cat named Mimi. What is 123 + 456?"),
    _ask("What is my cat called?", [*_ask("I am Zoë and I live in Köln. My cat is named Mimi."),
                                    {"role": "assistant", "content": "Nice to meet you, Zoë! I will remember that."}]),
    _ask("Who won the world cup in 1998?"),
]
REFERENCE_SAMPLES = 6


def greedy(model, prompt: list[int], limit: int, stops: set[int]) -> dict:
    """Greedy tokens with their logprobs and the smallest lead of a first choice over the second."""
    import torch

    ids, out = list(prompt), {"prompt_token_ids": prompt, "greedy": [], "greedy_logprobs": [], "min_margin": math.inf}
    while len(out["greedy"]) < limit and not (out["greedy"] and out["greedy"][-1] in stops):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].float()
        top = logits.topk(2).values
        token = int(logits.argmax())
        ids.append(token)
        out["greedy"].append(token)
        out["greedy_logprobs"].append(round(float(logits.log_softmax(-1)[token]), 6))
        out["min_margin"] = min(out["min_margin"], float(top[0] - top[1]))
    return out


def check(out: pathlib.Path, per_kind: int, reference: pathlib.Path | None) -> bool:
    """Evaluates the exported model with Hugging Face's own code; writes `reference` if given. True if good enough."""
    import torch
    import transformers
    from tokenizers import Tokenizer

    from demo_model import text

    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    cases = heldout_cases(per_kind)
    for case in cases[:: max(1, len(cases) // 64)]:
        rendered = theirs.apply_chat_template(case["messages"], tokenize=False, add_generation_prompt=True)
        if rendered != text.render(case["messages"], True):
            raise ValueError(f"chat template and render() differ:\n{rendered}")
        if theirs(rendered)["input_ids"] != tokenizer.encode(rendered).ids:
            raise ValueError(f"AutoTokenizer and tokenizer.json differ:\n{rendered}")

    device, tables, wrong = "cuda" if torch.cuda.is_available() else "cpu", {}, []
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = transformers.Qwen2ForCausalLM.from_pretrained(out, dtype=dtype, attn_implementation="eager").to(device)
        tables[name] = accuracy(_logits_of(model, device, False), tokenizer, cases, wrong if name == "float32" else None)

    model = transformers.Qwen2ForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    stops = {tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>")}
    found = [greedy(model, tokenizer.encode(text.render(m, True)).ids, 24, stops) for m in SAMPLES]
    for sample, case in zip(SAMPLES, found):
        print(f"{sample[-1]['content']!r} ({len(case['prompt_token_ids'])} prompt tokens) -> "
              f"{tokenizer.decode(case['greedy'])!r} margin {case['min_margin']:.2f}")
    if reference:
        source = f"HF transformers {transformers.__version__}, float32, eager"
        lines = ",\n".join(json.dumps(case) for case in found[:REFERENCE_SAMPLES])
        reference.write_text(f'{{"model": "demo", "source": {json.dumps(source)}, "cases": [\n{lines}\n]}}\n')

    for miss in sorted(set(wrong))[:60]:
        print("wrong:", *miss, sep=" | ")
    print(f"held-out accuracy, {per_kind} prompts of each kind, exact match\n{'kind':10}  float32  bfloat16")
    for kind in conversations.KINDS:
        print(f"{kind:10}  {100 * tables['float32'][kind]:6.1f}%  {100 * tables['bfloat16'][kind]:7.1f}%")
    return min(min(table.values()) for table in tables.values()) >= 0.95


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="model directory to write or check")
    parser.add_argument("--minutes", type=float, default=8.0, help="training time after compilation")
    parser.add_argument("--resume", type=pathlib.Path, help="model directory to go on from")
    parser.add_argument("--check", action="store_true", help="only evaluate --out")
    parser.add_argument("--write-heldout", type=pathlib.Path, metavar="FILE", help="only write the held-out prompts")
    parser.add_argument("--reference", type=pathlib.Path, metavar="FILE", help="write Hugging Face's greedy tokens there")
    parser.add_argument("--per-kind", type=int, default=500, help="held-out prompts per kind in the last evaluation")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch-tokens", type=int, default=131072)
    parser.add_argument("--workers", type=int, default=12, help="processes that make training rows")
    parser.add_argument("--pool-tokens", type=int, default=1 << 30, help="training tokens kept per row length")
    parser.add_argument("--bpe-conversations", type=int, default=8000)
    parser.add_argument("--report-seconds", type=float, default=30.0)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    args.begun = time.monotonic()
    if args.write_heldout:
        write_heldout(args.write_heldout)
        return 0
    if not args.out:
        parser.error("--out is required")
    if not args.check:
        train(args, args.out)
    good = check(args.out, args.per_kind, args.reference)
    print("good" if good else "NOT good enough: some kind is below 95 %", f"({time.monotonic() - args.begun:.0f} s)")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
