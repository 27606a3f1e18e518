"""OpenAI's requests: their fields, and what becomes of fields that this server does not know."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from vflax.errors import UserError
from vflax.generate.request import Sampling
from vflax.serve.errors import bad
from vflax.serve.settings import Settings

# A request of more values than this is no conversation: parsing it would take more memory than its bytes do.
MAX_VALUES = 100_000
MAX_MESSAGES = 1024
MAX_PARTS = 1024
_SEEDS = 2**63
# A share of the probability that any likeliest token has: what top_p=0 means, which OpenAI allows and harnesses send.
_LEAST_TOP_P = 1e-9

# What would change the answer, and cannot be done here: {field: values that ask for nothing}. All else that is not
# known is ignored, as other servers do, and named in the log.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "guided_json": ({}, ""),
    "guided_regex": ("",),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"], []),
    "prediction": (),
    "prompt_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "stop_token_ids": ([],),
    "structured_outputs": ({},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "web_search_options": (),
}


class _Fields(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


def _tagged(**kinds: str) -> Any:
    """Tells the kinds of a union apart. Tags are in angle brackets, so that `_where` can leave them out."""

    def tag(value: Any) -> str | None:
        if isinstance(value, str):
            return kinds.get("str")
        if isinstance(value, list):
            return kinds.get("list")
        name = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        return kinds.get(name) if isinstance(name, str) else None

    expected = "expected " + " or ".join(tag.strip("<>") for tag in kinds.values())
    return Discriminator(tag, custom_error_type="kind", custom_error_message=expected)


class ImageUrl(_Fields):
    url: str


class TextPart(_Fields):
    type: Literal["text"]
    text: str


class ImagePart(_Fields):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[
    Annotated[TextPart, Tag("<a part of type text>")]
    | Annotated[ImagePart, Tag("<a part of type image_url>")],
    _tagged(text="<a part of type text>", image_url="<a part of type image_url>"),
]
Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[Part], Field(max_length=MAX_PARTS), Tag("<a list of parts>")],
    _tagged(str="<text>", list="<a list of parts>"),
]
Strings = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[str], Tag("<a list of texts>")],
    _tagged(str="<text>", list="<a list of texts>"),
]


class Message(_Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None


class StreamOptions(_Fields):
    include_usage: bool | None = None


class Asked(_Fields):
    """The fields that chat and text completions share; None is a field that is absent."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Strings | None = None
    max_tokens: int | None = None
    n: int | None = Field(None, ge=1)
    ignore_eos: bool | None = None
    deadline: float | None = Field(None, gt=0)

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def most_tokens(self) -> int | None:
        return self.max_tokens

    def num_logprobs(self) -> int | None:
        """How many likeliest tokens each token of the answer comes with; None: no probabilities at all."""
        raise NotImplementedError


class ChatAsked(Asked):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def num_logprobs(self) -> int | None:
        if not self.logprobs:
            if self.top_logprobs:
                raise bad("top_logprobs: needs logprobs=true", "top_logprobs")
            return None
        return self.top_logprobs or 0


class TextAsked(Asked):
    prompt: Strings
    logprobs: int | None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    def num_logprobs(self) -> int | None:
        return self.logprobs


A = TypeVar("A", bound=Asked)


def parse(kind: type[A], data: bytes) -> A:
    """A request from its JSON.

    Raises:
        ApiError: 400, naming what is wrong: not JSON, a field of a wrong type, a field that asks for what the server
            cannot do.
    """
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise bad(f"the request holds more than {MAX_VALUES} values")
    try:
        asked = kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = _where(first["loc"])
        raise bad(f"{where}: {first['msg']}" if where else first["msg"], where) from None
    for name, value in _extra(asked).items():
        if name in _REFUSED and value is not None and not _asks_nothing(value, _REFUSED[name]):
            raise bad(
                f"{name}: this server cannot do that; leave the field out", name, "unsupported_parameter"
            )
    return asked


def ignored(asked: Asked) -> list[str]:
    """Names of the fields that were not looked at, for the log."""
    return sorted(name[:40] for name in _extra(asked) if name not in _REFUSED)[:16]


def sampling(asked: Asked, settings: Settings, room: int, seed: int) -> Sampling:
    """How the answer is chosen.

    Args:
        room: tokens that an answer can have at most.
        seed: where the request says none.

    Raises:
        ApiError: 400, naming a value that is out of its range.
    """
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    most = asked.most_tokens()
    if most is None:
        most = max(1, min(settings.default_max_tokens, room))
    top_k = asked.top_k or 0
    try:
        return Sampling(
            max_tokens=most,
            temperature=_or(asked.temperature, settings.default_temperature),
            top_k=0 if top_k == -1 else top_k,  # vLLM's way of saying "all"
            top_p=_or(asked.top_p, settings.default_top_p) or _LEAST_TOP_P,
            repetition_penalty=_or(asked.repetition_penalty, 1.0),
            presence_penalty=_or(asked.presence_penalty, 0.0),
            frequency_penalty=_or(asked.frequency_penalty, 0.0),
            seed=seed if asked.seed is None else asked.seed,
            stop=tuple(stop),
            logprobs=asked.num_logprobs(),
            ignore_eos=bool(asked.ignore_eos),
        )
    except UserError as error:
        named = re.match(r"\w+", str(error))
        raise bad(str(error), named[0] if named else None) from None


def next_seed(seed: int, step: int) -> int:
    """The seed of the choice `step` places on: numbers of 64 bits go round."""
    return (seed + step + _SEEDS) % (2 * _SEEDS) - _SEEDS


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _extra(asked: Asked) -> dict[str, Any]:
    return asked.model_extra or {}


def _asks_nothing(value: Any, trivial: tuple[Any, ...]) -> bool:
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in trivial)


def _where(loc: tuple[int | str, ...]) -> str | None:
    """As "messages[0].content[1].text"."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<"):
            path += f".{part}" if path else part
    return path or None
