"""gRPC statuses as exceptions, with what Tandem says in their details.

The details are google.rpc messages. The few fields that Tandem sets are read here from the wire, so that this package needs no
googleapis-common-protos, and does not clash with one that is there.
"""
import dataclasses
from typing import List, Optional

import grpc

_DETAILS = "grpc-status-details-bin"
_BAD_REQUEST = "type.googleapis.com/google.rpc.BadRequest"
_RETRY_INFO = "type.googleapis.com/google.rpc.RetryInfo"


@dataclasses.dataclass(frozen=True)
class FieldViolation:
    """What is wrong with one field of the request."""
    field: str  # as in the .proto file, e.g. "sampling.top_p"
    description: str


class TandemError(Exception):
    """A request that failed. `code` is a grpc.StatusCode, `retry_after` seconds or None."""

    def __init__(self, code: grpc.StatusCode, message: str, violations: List[FieldViolation], retry_after: Optional[float]):
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.violations = violations
        self.retry_after = retry_after


class InvalidRequest(TandemError):
    """The request cannot be served as it is; `violations` name the fields."""


class NotAllowed(TandemError):
    """The API key is missing or wrong, or does not allow this."""


class Overloaded(TandemError):
    """The cluster is full, or the API key is over its limits; `retry_after` says when to try again."""


class Unavailable(TandemError):
    """The server cannot be reached, or lost what the request needed."""


class DeadlineExceeded(TandemError):
    """The answer was not complete within the timeout."""


class Cancelled(TandemError):
    """The stream was cancelled."""


_CLASSES = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: InvalidRequest,
    grpc.StatusCode.FAILED_PRECONDITION: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: NotAllowed,
    grpc.StatusCode.PERMISSION_DENIED: NotAllowed,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
}


def _varint(data: bytes, at: int):
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _fields(data: bytes):
    """(number, value) of every field of a message: ints, and bytes of strings and messages."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(key & 7)
            if size is None:
                size, at = _varint(data, at)
            value, at = data[at:at + size], at + size
        yield key >> 3, value


def _details(status: bytes):
    """(type URL, message) of every google.protobuf.Any in a google.rpc.Status."""
    for number, value in _fields(status):
        if number == 3:
            packed = dict(_fields(value))
            yield packed.get(1, b"").decode(), packed.get(2, b"")


def _seconds(retry_info: bytes) -> float:
    delay = dict(_fields(dict(_fields(retry_info)).get(1, b"")))
    return delay.get(1, 0) + delay.get(2, 0) / 1e9


def from_rpc_error(error: grpc.RpcError) -> TandemError:
    """The exception that says what a grpc.RpcError of a Tandem server means."""
    violations, retry_after = [], None
    for key, value in error.trailing_metadata() or ():
        if key != _DETAILS:
            continue
        for kind, message in _details(value):
            if kind == _RETRY_INFO:
                retry_after = _seconds(message)
            if kind == _BAD_REQUEST:
                for _, violation in _fields(message):
                    parts = dict(_fields(violation))
                    violations.append(FieldViolation(parts.get(1, b"").decode(), parts.get(2, b"").decode()))
    return _CLASSES.get(error.code(), TandemError)(error.code(), error.details() or "", violations, retry_after)
