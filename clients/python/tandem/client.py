"""Clients for threads and for asyncio, and the streams that they return."""
import dataclasses
import os
from typing import Any, AsyncIterator, Dict, Iterator, List, Optional, Sequence, Union

import grpc

from tandem import errors
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc as rpc

DEFAULT_SERVER = "127.0.0.1:8000"
_OPTIONS = {field.name for field in pb.RequestOptions.DESCRIPTOR.fields}
_SAMPLING = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}

# A question, or a conversation: {"role": "user", "content": "..."} each, or pb.ChatMessage.
Messages = Union[str, Sequence[Union[Dict[str, Any], pb.ChatMessage]]]
# Text, or token ids.
Prompt = Union[str, Sequence[int]]


@dataclasses.dataclass
class Answer:
    """A whole answer. `usage` and `timing` (milliseconds) are the messages of the .proto file."""
    request_id: str = ""
    text: str = ""
    token_ids: List[int] = dataclasses.field(default_factory=list)
    logprobs: List[pb.TokenLogprob] = dataclasses.field(default_factory=list)
    prompt_logprobs: List[pb.TokenLogprob] = dataclasses.field(default_factory=list)
    finish_reason: str = ""  # "stop", "length"
    usage: pb.Usage = dataclasses.field(default_factory=pb.Usage)
    timing: pb.Timing = dataclasses.field(default_factory=pb.Timing)

    def _add(self, chunk: pb.GenerateResponse) -> None:
        self.request_id = chunk.request_id or self.request_id
        self.text += chunk.text
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        self.prompt_logprobs += chunk.prompt_logprobs
        self.usage = chunk.usage
        if chunk.finish_reason:
            self.finish_reason = pb.FinishReason.Name(chunk.finish_reason)[len("FINISH_REASON_"):].lower()
            self.timing = chunk.timing


class Stream:
    """An answer as it comes: iterate over its messages (`text`, `token_ids`, ...), or take the whole."""

    def __init__(self, call):
        self._call = call

    def __iter__(self) -> Iterator[pb.GenerateResponse]:
        try:
            yield from self._call
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error) from None

    def answer(self) -> Answer:
        """Waits for the end."""
        whole = Answer()
        for chunk in self:
            whole._add(chunk)
        return whole

    def cancel(self) -> None:
        """Stops the answer; who iterates gets tandem.Cancelled."""
        self._call.cancel()


class AsyncStream:
    """The same for asyncio: `async for chunk in stream`, `await stream.answer()`."""

    def __init__(self, call):
        self._call = call

    async def __aiter__(self) -> AsyncIterator[pb.GenerateResponse]:
        try:
            async for chunk in self._call:
                yield chunk
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error) from None

    async def answer(self) -> Answer:
        whole = Answer()
        async for chunk in self:
            whole._add(chunk)
        return whole

    def cancel(self) -> None:
        self._call.cancel()


def _server(server: Optional[str]) -> str:
    return server or os.environ.get("TANDEM_SERVER") or DEFAULT_SERVER


def _credentials(tls: bool, tls_ca: Optional[str], tls_cert: Optional[str], tls_key: Optional[str]):
    """None for a channel without TLS."""
    def read(path):
        if not path:
            return None
        with open(path, "rb") as file:
            return file.read()

    tls_ca = tls_ca or os.environ.get("TANDEM_TLS_CA")
    tls_cert = tls_cert or os.environ.get("TANDEM_TLS_CLIENT_CERT")
    tls_key = tls_key or os.environ.get("TANDEM_TLS_CLIENT_KEY")
    if not (tls or tls_ca or tls_cert or os.environ.get("TANDEM_TLS") in ("true", "1", "yes", "on")):
        return None
    return grpc.ssl_channel_credentials(read(tls_ca), read(tls_key), read(tls_cert))


def _metadata(api_key: Optional[str]):
    key = api_key or os.environ.get("TANDEM_API_KEY")
    return (("authorization", f"Bearer {key}"),) if key else ()


def _fill(request, model: str, parameters: Dict[str, Any]):
    """Sampling parameters and options by their names in the .proto file; what is None or missing is left to the server."""
    request.model = model
    for name, value in parameters.items():
        if name not in _SAMPLING and name not in _OPTIONS:
            raise TypeError(f"'{name}' is no sampling parameter and no option; there are "
                            f"{', '.join(sorted(_SAMPLING | _OPTIONS))}")
        target = request.sampling if name in _SAMPLING else request.options
        if value is None:
            continue
        if isinstance(value, (list, tuple)):
            getattr(target, name).extend(value)
        else:
            setattr(target, name, value)
    return request


def _chat_request(messages: Messages, tools, model: str, parameters: Dict[str, Any]) -> pb.ChatRequest:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    as_messages = [m if isinstance(m, pb.ChatMessage) else pb.ChatMessage(**m) for m in messages]
    as_tools = [pb.Tool(json=t) if isinstance(t, str) else t for t in tools]
    return _fill(pb.ChatRequest(messages=as_messages, tools=as_tools), model, parameters)


def _generate_request(prompt: Prompt, model: str, parameters: Dict[str, Any]) -> pb.GenerateRequest:
    if isinstance(prompt, str):
        return _fill(pb.GenerateRequest(text=prompt), model, parameters)
    return _fill(pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt)), model, parameters)


class Client:
    """A connection to a cluster. Threads may share it. `server` is HOST:PORT; default: $TANDEM_SERVER, else 127.0.0.1:8000.
    `api_key`: for a router that wants one; default: $TANDEM_API_KEY. `tls`: the router speaks TLS ($TANDEM_TLS=true). Paths of PEM
    files, the first two of which make it so: `tls_ca`, of the router's CA where this system does not trust it; `tls_cert` and
    `tls_key`, what the client shows ($TANDEM_TLS_CA, $TANDEM_TLS_CLIENT_CERT, $TANDEM_TLS_CLIENT_KEY)."""

    def __init__(self, server: Optional[str] = None, *, api_key: Optional[str] = None, tls: bool = False,
                 tls_ca: Optional[str] = None, tls_cert: Optional[str] = None, tls_key: Optional[str] = None):
        self._metadata = _metadata(api_key)
        credentials = _credentials(tls, tls_ca, tls_cert, tls_key)
        self._channel = (grpc.secure_channel(_server(server), credentials) if credentials
                         else grpc.insecure_channel(_server(server)))
        self._stub = rpc.InferenceStub(self._channel)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def chat(self, messages: Messages, *, tools: Sequence[Union[str, pb.Tool]] = (), model: str = "",
             timeout: Optional[float] = None, **parameters) -> Stream:
        """Answers a conversation. `tools` are JSON objects as text; `timeout` is in seconds; `parameters` are the fields of
        SamplingParams and RequestOptions: temperature=0, max_tokens=64, stop=["\\n"], request_id="..."."""
        return Stream(self._stub.Chat(_chat_request(messages, tools, model, parameters), timeout=timeout,
                                     metadata=self._metadata))

    def generate(self, prompt: Prompt, *, model: str = "", timeout: Optional[float] = None, **parameters) -> Stream:
        """Continues a text or token ids."""
        return Stream(self._stub.Generate(_generate_request(prompt, model, parameters), timeout=timeout,
                                     metadata=self._metadata))

    def models(self, timeout: Optional[float] = 10) -> List[pb.Model]:
        """What the cluster serves: id, max_model_len, vocab_size, dtype."""
        return list(self._unary(self._stub.ListModels, pb.ListModelsRequest(), timeout).models)

    def tokenize(self, text: str, timeout: Optional[float] = 10) -> List[int]:
        return list(self._unary(self._stub.Tokenize, pb.TokenizeRequest(text=text), timeout).ids)

    def detokenize(self, ids: Sequence[int], timeout: Optional[float] = 10) -> str:
        return self._unary(self._stub.Detokenize, pb.DetokenizeRequest(ids=ids), timeout).text

    def _unary(self, method, request, timeout):
        try:
            return method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error) from None


class AsyncClient:
    """Client for asyncio; made and used within one event loop."""

    def __init__(self, server: Optional[str] = None, *, api_key: Optional[str] = None, tls: bool = False,
                 tls_ca: Optional[str] = None, tls_cert: Optional[str] = None, tls_key: Optional[str] = None):
        self._metadata = _metadata(api_key)
        credentials = _credentials(tls, tls_ca, tls_cert, tls_key)
        self._channel = (grpc.aio.secure_channel(_server(server), credentials) if credentials
                         else grpc.aio.insecure_channel(_server(server)))
        self._stub = rpc.InferenceStub(self._channel)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    def chat(self, messages: Messages, *, tools: Sequence[Union[str, pb.Tool]] = (), model: str = "",
             timeout: Optional[float] = None, **parameters) -> AsyncStream:
        return AsyncStream(self._stub.Chat(_chat_request(messages, tools, model, parameters), timeout=timeout,
                                     metadata=self._metadata))

    def generate(self, prompt: Prompt, *, model: str = "", timeout: Optional[float] = None, **parameters) -> AsyncStream:
        return AsyncStream(self._stub.Generate(_generate_request(prompt, model, parameters), timeout=timeout,
                                     metadata=self._metadata))

    async def models(self, timeout: Optional[float] = 10) -> List[pb.Model]:
        try:
            return list((await self._stub.ListModels(pb.ListModelsRequest(), timeout=timeout,
                                                    metadata=self._metadata)).models)
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error) from None
