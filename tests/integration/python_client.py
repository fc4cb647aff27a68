"""Uses the installed package as its README says, with key and CA from the environment. usage: python_client.py HOST:PORT; prints ok."""
import asyncio
import sys

import grpc

import tandem

SERVER = sys.argv[1]


def check(condition, what):
    if not condition:
        sys.exit(f"python_client.py: {what}")


def expect(kind, call):
    try:
        call()
    except kind as error:
        return error
    sys.exit(f"python_client.py: no {kind.__name__}")


def streams(client):
    chunks = list(client.chat("What is 17 + 25?", temperature=0))
    check("42" in "".join(chunk.text for chunk in chunks), f"17 + 25 is {chunks}")
    check(chunks[-1].finish_reason and chunks[-1].timing.total > 0, f"the last message: {chunks[-1]}")


def progress(client):
    for n in range(20):  # the first token may overtake it
        question = f"{n} " + "What is 17 + 25? " * 60
        chunks = list(client.chat(question, temperature=0, max_tokens=3, progress=True))
        told = [chunk.progress for chunk in chunks if chunk.HasField("progress")]
        answered = [bool(chunk.token_ids) for chunk in chunks]
        check(answered == sorted(answered), f"progress after a token: {chunks}")
        for step in told:
            check(step.computed_tokens < step.total_tokens == chunks[-1].usage.prompt_tokens, f"progress: {step}")
        check(len(client.chat("Hello", max_tokens=3, progress=True).answer().token_ids) > 0, "an answer with progress")
        if told:
            return
    check(False, "nobody told of progress")


def whole_answers(client):
    conversation = [{"role": "user", "content": "My name is Ada and I live in Hefei."}]
    first = client.chat(conversation, temperature=0).answer()
    check(first.finish_reason == "stop" and first.request_id, f"first turn: {first}")
    conversation += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "What is my name?"}]
    second = client.chat(conversation, temperature=0, request_id="turn-2").answer()
    check("Ada" in second.text and second.request_id == "turn-2", f"second turn: {second}")
    check(second.usage.completion_tokens == len(second.token_ids), f"usage: {second}")
    check(0 < second.timing.ttft <= second.timing.total, f"timing: {second.timing}")


def tokens(client):
    ids = client.tokenize("hello")
    check(client.detokenize(ids) == "hello", f"tokens {ids}")
    answer = client.generate(ids, max_tokens=3, ignore_eos=True, logprobs=1).answer()
    check(len(answer.token_ids) == len(answer.logprobs) == 3 and answer.finish_reason == "length", f"ids: {answer}")
    check([model.id for model in client.models()] == ["demo"], "models")


def failures(client):
    bad = expect(tandem.InvalidRequest, lambda: client.generate("x", top_p=3).answer())
    check([v.field for v in bad.violations] == ["sampling.top_p"] and "top_p" in bad.violations[0].description,
          f"violations: {bad.violations}")
    expect(TypeError, lambda: client.generate("x", top_q=1))
    check(bad.code == grpc.StatusCode.INVALID_ARGUMENT, f"code: {bad.code}")
    late = client.generate("x", max_tokens=1000, ignore_eos=True, timeout=0.000001)
    expect(tandem.DeadlineExceeded, late.answer)
    stream = client.generate("x", max_tokens=1900, ignore_eos=True)  # some ten seconds
    next(iter(stream))
    stream.cancel()
    expect(tandem.Cancelled, stream.answer)
    with tandem.Client("127.0.0.1:1") as nobody:
        expect(tandem.Unavailable, lambda: nobody.models(timeout=10))


def keys():
    with tandem.Client(SERVER, api_key="tdm-wrong") as stranger:
        error = expect(tandem.NotAllowed, lambda: stranger.chat("Hello").answer())
        check(error.code == grpc.StatusCode.UNAUTHENTICATED, f"a wrong key: {error}")
        expect(tandem.NotAllowed, stranger.models)


def retry_time():
    """What a full cluster says: google.rpc.RetryInfo of 1.5 s in the details."""
    class Full(grpc.RpcError):
        def code(self): return grpc.StatusCode.RESOURCE_EXHAUSTED
        def details(self): return "the queue is full"
        def trailing_metadata(self):
            kind, delay = b"type.googleapis.com/google.rpc.RetryInfo", b"\x0a\x08\x08\x01\x10\x80\xca\xb5\xee\x01"
            packed = b"\x0a" + bytes([len(kind)]) + kind + b"\x12" + bytes([len(delay)]) + delay
            return [("x", "y"), ("grpc-status-details-bin", b"\x08\x08\x1a" + bytes([len(packed)]) + packed)]

    from tandem import errors
    error = errors.from_rpc_error(Full())
    check(isinstance(error, tandem.Overloaded) and error.retry_after == 1.5, f"retry: {error!r} {error.retry_after}")


async def with_asyncio():
    async with tandem.AsyncClient(SERVER) as client:
        answers = await asyncio.gather(*(client.chat(f"What is {n} + 1?", temperature=0).answer() for n in (3, 5, 8)))
        check([n in a.text for n, a in zip("469", answers)] == [True] * 3, f"asyncio: {answers}")
        text = ""
        async for chunk in client.chat("What is 17 + 25?", temperature=0):
            text += chunk.text
        check("42" in text, f"asyncio: {text}")
        try:
            await client.generate("x", temperature=-1).answer()
            check(False, "a temperature of -1 was taken")
        except tandem.InvalidRequest as error:
            check(error.violations[0].field == "sampling.temperature", f"asyncio: {error.violations}")


with tandem.Client(SERVER) as client:
    for part in (streams, progress, whole_answers, tokens, failures):
        part(client)
keys()
retry_time()
asyncio.run(with_asyncio())
print("ok")
