"""What clients may ask, field by field, and how much of it. The names are OpenAI's; some of
llama.cpp's sampling is there, too. Fields that are not known are ignored, as other servers do."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

#: Bounds of one request. A body is bounded in bytes before it is looked at (access.py).
MOST_MESSAGES, MOST_PARTS, MOST_STOPS, MOST_BIASES = 4096, 256, 16, 300
MOST_CHOICES, MOST_LOGPROBS, MOST_TOKENS_GIVEN = 8, 20, 2**20


def _writable(value: Any) -> Any:
    """JSON can name half of a surrogate pair, of which no text consists."""
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{error.object[error.start]!a} is no character") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


_Text = Annotated[str, AfterValidator(_writable)]
_JSON = Annotated[Any, AfterValidator(_writable)]
_Name = Annotated[str, StringConstraints(max_length=256)]
_Token = Annotated[int, Field(ge=0, lt=2**31)]
_Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_as_if_not_given(cls, data: Any) -> Any:
        """As in OpenAI's protocol; clients write it for whatever their users leave alone."""
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if value is not None}
        return data


class TextPart(_Model):
    type: Literal["text"]
    text: _Text


class FunctionCall(_Model):
    name: _Name
    arguments: _Text = ""


class ToolCall(_Model):
    id: _Name = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Model):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Text | Annotated[list[TextPart], Field(max_length=MOST_PARTS)] | None = None
    name: _Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: _Name | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def plain(self) -> dict[str, Any]:
        """As chat templates read it: with a text, and nothing that was not given."""
        given = self.model_dump(exclude_none=True, exclude={"content", "role"})
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.text, **given}


class StreamOptions(_Model):
    include_usage: bool = False


class Sampling(_Model):
    """How a reply is written; what is not given is as ``Llama`` has it."""

    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=10)] | None = None

    def sampling(self) -> dict[str, Any]:
        """Keyword arguments of Llama.create_completion."""
        return self.model_dump(include=set(Sampling.model_fields), exclude_none=True)


class _Completion(Sampling):
    model: _Name | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=MOST_BIASES),
        ]
        | None
    ) = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Completion):
    """Of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    # what these hold is checked in kvp_edge.server.tools
    tools: _JSON = None
    tool_choice: _JSON = None
    parallel_tool_calls: _JSON = None
    response_format: _JSON = None

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextRequest(_Completion):
    """Of POST /v1/completions."""

    prompt: (
        _Text
        | Annotated[
            list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MOST_TOKENS_GIVEN)
        ]
        | Annotated[list[_Text], Field(min_length=1, max_length=1)]
    )
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] = 16
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool = False
    suffix: None = None
    best_of: Literal[1] | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> TextRequest:
        if isinstance(self.prompt, list) and self.prompt and isinstance(self.prompt[0], str):
            self.prompt = self.prompt[0]
        if not self.prompt:
            raise ValueError("prompt is empty")
        return self


class TokenizeRequest(_Model):
    """Of POST /tokenize."""

    content: _Text
    add_special: bool = False
