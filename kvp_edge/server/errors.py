"""What goes wrong, in the form that OpenAI's clients read."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from kvp_edge.errors import BudgetError, ContextLengthError, KVPError
from kvp_edge.files.json_values import shortened

#: What pydantic puts among the names of fields to tell of a type.
_TYPE = re.compile(r"^(str|constrained-str)$|\[")

#: Characters of a request that an answer repeats.
_LONGEST = 200


class Error(BaseModel):
    """What is told of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is no reply."""

    error: Error


class APIError(Exception):
    """An answer that is no reply.

    Args:
        status: of HTTP.
        message: a sentence for the person who reads it.
        code: that clients look for.
        param: the field of the request that is wrong.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


class Cancelled(APIError):
    """Nobody waits for this reply any more."""

    def __init__(self) -> None:
        super().__init__(499, "the client has gone")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, param=param, code=code)


def as_answer(error: Exception, worded: Callable[[str], str] = str) -> APIError:
    """What is told of an error, and with which status.

    Args:
        worded: see Settings.
    """
    if isinstance(error, APIError):
        return error
    if isinstance(error, ContextLengthError):
        return bad_request(worded(str(error)), "messages", "context_length_exceeded")
    if isinstance(error, BudgetError):
        return bad_request(worded(str(error)), "messages")
    if isinstance(error, (KVPError, MemoryError)):
        return APIError(500, worded(str(error)) or "out of memory")
    sys.excepthook(type(error), error, error.__traceback__)
    return unforeseen()


def unforeseen() -> APIError:
    return APIError(500, "the server could not answer this request; its own output says why")


def of_validation(error: RequestValidationError) -> APIError:
    """The first thing that is wrong, by the name of its field. Where a field may have several
    types, what is wrong with the one that it has."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        why, where = first["ctx"]["error"], first["loc"][-1]
        return bad_request(f"the body is not JSON: {why}, at character {where}")
    if first["loc"] == ("body",) and first["type"] in ("missing", "model_attributes_type"):
        return bad_request(
            "the body must be a JSON object, sent with the header 'Content-Type: application/json'"
        )
    problem = min(error.errors(), key=lambda one: str(one["type"]).endswith("_type"))
    names = [str(part) for part in problem["loc"][1:] if not _TYPE.search(str(part))]
    name = ".".join(names)[:_LONGEST] or None
    message = problem["msg"]
    if problem["type"] != "missing":
        message += _as_given(problem["input"], str(problem["type"]))
    return bad_request(f"{name}: {message}" if name else str(message), name)


def _as_given(value: Any, problem: str) -> str:
    """The value that is wrong; of what holds others the kind, if that is wrong."""
    if not isinstance(value, (dict, list)):
        return f" (it is {shortened(value)})"
    kind = "an object" if isinstance(value, dict) else "a list"
    return f" (it is {kind})" if problem == "literal_error" or problem.endswith("_type") else ""


def of_no_json(error: Exception) -> APIError:
    """Of a body that cannot be read."""
    if isinstance(error, RecursionError):
        return bad_request("the body is nested too deeply")
    return bad_request(f"the body is not JSON: {error}"[:_LONGEST])
