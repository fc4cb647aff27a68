"""Client of a Tandem cluster.

    import tandem

    client = tandem.Client("127.0.0.1:8000")
    for chunk in client.chat("What is 17 + 25?"):
        print(chunk.text, end="", flush=True)

    answer = client.generate("1 + 1 =", max_tokens=8).answer()
    print(answer.text, answer.usage.completion_tokens, answer.timing.ttft)
"""
from tandem.client import Answer, AsyncClient, AsyncStream, Client, Stream
from tandem.errors import (Cancelled, DeadlineExceeded, FieldViolation, InvalidRequest, NotAllowed, Overloaded,
                           TandemError, Unavailable)

__all__ = ["Answer", "AsyncClient", "AsyncStream", "Cancelled", "Client", "DeadlineExceeded", "FieldViolation",
           "InvalidRequest", "NotAllowed", "Overloaded", "Stream", "TandemError", "Unavailable"]
