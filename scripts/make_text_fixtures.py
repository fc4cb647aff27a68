#!/usr/bin/env python3
"""Makes the fixtures of the text tests (tests/data/text) with Hugging Face's own libraries.

    python3 -m venv venv && venv/bin/pip install --require-hashes -r scripts/fixture_requirements.txt
    venv/bin/python scripts/make_text_fixtures.py

Writes
  tokenizer.json        a byte-level BPE of a few hundred merges with the Qwen2 pipeline and added tokens of every kind
  tokenizer_cases.json  text -> ids -> decoded (with and without special tokens)
  decode_cases.json     random ids -> decoded
  llama3_tokenizer.json, llama3_cases.json  the same with Llama 3's pipeline (numbers in threes, ignore_merges, a token
                        before every text); `with_special`: the ids with that token
  gpt2_tokenizer.json, gpt2_cases.json      the same with single digits and GPT-2's pattern (SmolLM and others)
  chat_cases.json       messages and tools -> prompt, for each of chat_templates/*.jinja (which are not made here: the published
                        templates of Qwen models, Apache 2.0, and two written for the tests)
"""

import json
import pathlib
import random
import unicodedata

import jinja2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.utils.chat_template_utils import render_jinja_template

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data" / "text"

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

CORPUS = [
    "The tokenizer cuts a text into pieces, and merges the bytes of each piece into tokens, the most frequent pairs first.",
    "You are a helpful assistant. I'm here, we'll see, they've gone, it's 2024, don't worry; she'd say so.",
    "def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n    print(i, add(i, 1))\n",
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHello there!<|im_end|>\n",
    '{"name": "get_weather", "arguments": {"city": "Hefei", "days": 3}}',
    "请写一篇关于大模型训练的文章。今天天气很好,我们去公园散步吧。",
    "Привет, мир! Это просто текст для обучения.",
    "La café était fermé; naïve façade, déjà vu, élève, forêt.",
    "한국어 문장도 조금 있습니다. 日本語の文も少し。",
    "   indented     text\twith\ttabs  \n\n  and   spaces   \r\n\r\n",
]

ADDED = [
    AddedToken("<|endoftext|>", special=True, normalized=False),
    AddedToken("<|im_start|>", special=True, normalized=False),
    AddedToken("<|im_end|>", special=True, normalized=False),
    AddedToken("<tool_call>", special=False, normalized=False),
    AddedToken("</tool_call>", special=False, normalized=False),
    AddedToken("<|im_end|>!", special=True, normalized=False),  # a longer token with the same start
    AddedToken("<l>", special=False, normalized=False, lstrip=True),
    AddedToken("<r>", special=False, normalized=False, rstrip=True),
    AddedToken("<lr>", special=True, normalized=False, lstrip=True, rstrip=True),
    AddedToken("word", special=False, normalized=False, single_word=True),
    AddedToken("caf\u00e9", special=False, normalized=True),
    AddedToken("nor mal", special=False, normalized=True, single_word=True),
    AddedToken("<nl>", special=False, normalized=True, lstrip=True, rstrip=True),
    AddedToken("\u4e2d\u6587", special=True, normalized=True),
    AddedToken("na\u00efve", special=False, normalized=False),
]

PIECES = (
    "the and tokenizer He'LL it's I'M WE'VE don'T you'Re she'D 'S 's 'ſ 2024 3.14 x1 ١٢ Ⅷ ½ 𝟘 請 你好 мир 한국어 ไทย नमस्ते العربية "
    "e\u0301 é cafe\u0301 café na\u00efve nai\u0308ve 中文 word sword words word. _word \u24b6word nor\u00a0mal abnormal 😀 👩\u200d👩\u200d👧 \u212b \u0344 \u0958 \ufb1d "
    "\u1100\u1161\u11a8 \uac00\u11a8 \U00011935\U00011930 \U0002ebf0 \U00010d40 \ufffd \ue000 <| |> < > im_end <|im_ en d|> ! .. -- #define {} [ ] = == =>"
).split(" ") + ["nor mal", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u0085", "\u180e", "\u2028", "\u3000", "\u200b", "\ufeff", "\x00", "\x1c", "\x0b"]


def make_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
    ])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=640, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(ADDED)
    return tokenizer


def train(tokenizer, vocab_size):
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(CORPUS + ["1234567 89 2024 100,000 7"], trainer)
    return tokenizer


def make_llama3_tokenizer():
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
    ])
    train(tokenizer, 560)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
                                      special_tokens=[("<|begin_of_text|>", bos)]),
    ])
    # Words that no merge gives any more: only ignore_merges finds them.
    file = json.loads(tokenizer.to_str())
    file["model"]["merges"] = [m for i, m in enumerate(file["model"]["merges"]) if i % 7]
    kept = {"".join(m) for m in file["model"]["merges"]} | set(pre_tokenizers.ByteLevel.alphabet())
    file["model"]["merges"] = [m for m in file["model"]["merges"] if set(m) <= kept]
    return Tokenizer.from_str(json.dumps(file))


def make_gpt2_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
    ])
    train(tokenizer, 420)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def pipeline_cases(tokenizer, rnd):
    texts = CORPUS + PIECES + ["", "12345678", "a1b22c333d4444", "it's 1,234.5678!", "<|begin_of_text|>x<|eot_id|>", "x" * 90]
    texts += [random_text(rnd) for _ in range(120)]
    return [{"text": text, **both_ways(tokenizer, tokenizer.encode(text, add_special_tokens=False).ids),
             "with_special": tokenizer.encode(text, add_special_tokens=True).ids} for text in texts]


def random_text(rnd):
    parts = []
    for _ in range(rnd.randrange(1, 12)):
        kind = rnd.random()
        if kind < 0.5:
            parts.append(rnd.choice(PIECES))
        elif kind < 0.7:
            parts.append(rnd.choice(ADDED).content)
        elif kind < 0.8:
            parts.append(unicodedata.normalize(rnd.choice(["NFC", "NFD"]), rnd.choice("éàñçöåÅǖạ̈ḱ각갂ΐ")))
        elif kind < 0.9:
            parts.append(" ".join(rnd.choice(CORPUS).split(" ")[:rnd.randrange(1, 5)]))
        else:
            code = rnd.choice([rnd.randrange(0x80), rnd.randrange(0x3000), rnd.randrange(0x10000), rnd.randrange(0x110000)])
            parts.append("" if 0xD800 <= code < 0xE000 else chr(code))
    return "".join(parts)


def both_ways(tokenizer, ids):
    return {
        "ids": ids,
        "decoded": tokenizer.decode(ids, skip_special_tokens=False),
        "decoded_skip": tokenizer.decode(ids, skip_special_tokens=True),
    }


def tokenizer_cases(tokenizer, rnd):
    texts = CORPUS + PIECES + [a.content for a in ADDED] + ["", "a" * 300, " " * 300, "ab" * 200 + "\n" * 50, "e" + "\u0301\u0316" * 40]
    texts += [random_text(rnd) for _ in range(400)]
    cases = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        cases.append({"text": text, **both_ways(tokenizer, ids)})
    return cases


def decode_cases(tokenizer, rnd):
    size = tokenizer.get_vocab_size()
    return [both_ways(tokenizer, [rnd.randrange(rnd.choice([260, size])) for _ in range(rnd.randrange(1, 14))]) for _ in range(150)]


WEATHER = '{"type": "function", "function": {"name": "get_weather", "description": "Wetter für <Städte> & \\"mehr\\"", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}'
NUMBERS = '{"z":1,"a":[0.1,1.0,-0.0,1e22,1e16,123456789012345680.0,1e-4,1e-5,1.5e-7,5e-324,1.7976931348623157e308,100,-7,12345678901234567890123,true,null],"e":{},"l":[],"u":"\\u4e2d\\ud83d\\ude00\\u007f\\u0001\\n\\t\\/","a":"twice"}'


def call(name, arguments):
    return {"name": name, "arguments": arguments}


CONVERSATIONS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "hi"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": ""}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c\n"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"role": "user", "content": "a"}, {"role": "system", "content": "late"}, {"role": "user", "content": "<b>&\"'{{ x }}{% y %}"}],
    [{"role": "assistant", "content": "first"}],
    [{"role": "user", "content": " \u00a0wide\u3000\n"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}, {"role": "user", "content": "why?"},
     {"role": "assistant", "content": "<think>because</think>so"}],
]
TOOL_CONVERSATIONS = [
    [{"role": "user", "content": "w?"}, {"role": "assistant", "content": "", "tool_calls": [call("get_weather", '{"city":"Hefei"}')]},
     {"role": "tool", "content": '{"t": 21}'}, {"role": "user", "content": "thanks"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "w?"},
     {"role": "assistant", "content": "Let me see.", "tool_calls": [call("a", NUMBERS), call("b", "{}")]},
     {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}],
    [{"role": "tool", "content": "odd start"}, {"role": "assistant", "content": "x"}, {"role": "tool", "content": "again"}, {"role": "tool", "content": ""}],
]


def for_jinja(message):
    message = dict(message)
    if "tool_calls" in message:
        message["tool_calls"] = [{"type": "function", "function": {"name": c["name"], "arguments": json.loads(c["arguments"])}} for c in message["tool_calls"]]
    return message


def chat_cases():
    cases = []
    for path in sorted((OUT / "chat_templates").glob("*.jinja")):
        source = path.read_text()
        has_tools = "tools" in source
        for messages in CONVERSATIONS + (TOOL_CONVERSATIONS if has_tools else []):
            for tools in ([], [WEATHER, NUMBERS]) if has_tools else ([],):
                for prompt in (True, False):
                    case = {"template": path.name, "messages": messages, "tools": tools, "add_generation_prompt": prompt}
                    try:
                        rendered, _ = render_jinja_template(
                            conversations=[[for_jinja(m) for m in messages]], tools=[json.loads(t) for t in tools] or None,
                            chat_template=source, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>")
                        cases.append({**case, "prompt": rendered[0]})
                    except jinja2.exceptions.TemplateError as error:
                        cases.append({**case, "error": str(error)})
    return cases


def write(name, value):
    lines = ",\n".join(json.dumps(v, ensure_ascii=True) for v in value)
    (OUT / name).write_text("[\n" + lines + "\n]\n")


def main():
    rnd = random.Random(7)
    OUT.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(OUT / "tokenizer.json"), pretty=False)
    write("tokenizer_cases.json", tokenizer_cases(tokenizer, rnd))
    write("decode_cases.json", decode_cases(tokenizer, rnd))
    for name, make in (("llama3", make_llama3_tokenizer), ("gpt2", make_gpt2_tokenizer)):
        tokenizer = make()
        tokenizer.save(str(OUT / f"{name}_tokenizer.json"), pretty=False)
        write(f"{name}_cases.json", pipeline_cases(tokenizer, rnd))
    write("chat_cases.json", chat_cases())


if __name__ == "__main__":
    main()
