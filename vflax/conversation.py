"""Conversations to token ids and labels: the only renderer in the project.

A conversation is made of typed parts, so what a person types can never become an image, the end of a turn or
the beginning of an answer. The ids and the mask of supervised tokens are built in one pass: nothing is
tokenised twice to find a length, and nothing is searched in a rendered string.

The templates and the tokenisation are those of LLaVA: text is cut into chunks at images and special tokens,
each chunk is encoded as a whole, BOS stands at the start. Supervised are an answer and its end token:
`</s>`, in chatml `<|im_end|>`, in plain a newline. The space that a template puts before an answer belongs
to the answer, since the generation prompt ends before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from vflax.constants import IGNORE_LABEL, IMAGE_TOKEN_ID
from vflax.errors import UserError
from vflax.templates import TEMPLATES, Position, Template, chat_template, check_position, get_template
from vflax.tokenizer import Tokenizer, replace_surrogates

__all__ = [
    "TEMPLATES", "Conversation", "ConversationError", "Image", "Part", "Position", "Rendered", "Text",
    "Turn", "chat_template", "expand", "get_template", "place_images", "read_llava", "render", "render_text",
    "stop_ids",
]  # fmt: skip

IMAGE_MARKER = "<image>"


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Image:
    """The place of an image; the k-th one in a conversation is the sample's k-th image."""


Part = Text | Image


@dataclass(frozen=True)
class Turn:
    role: Literal["user", "assistant"]
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def num_images(self) -> int:
        return sum(isinstance(part, Image) for part in self.parts)


@dataclass(frozen=True)
class Conversation:
    """User and assistant by turns, the user first; `system` replaces the template's own when not None."""

    turns: tuple[Turn, ...]
    system: str | None = None


class ConversationError(UserError):
    """A sample that cannot be read or rendered; `kind` is a short name for counting."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


# --------------------------------------------------------------------------------------------------
# Reading LLaVA JSON


def read_llava(
    conversations: Any, num_images: int, position: Position = "front", name: str = ""
) -> tuple[Conversation, list[str]]:
    """Reads the `conversations` list of a LLaVA sample.

    The first `num_images` occurrences of `<image>` in the human turns are image places; every other one is
    text. `position` then says where an image goes in its turn, see `place_images`.

    What LLaVA's own trainer does in silence, or dies of, becomes a finding (the sample is used) or an error:
        "first_turn_dropped"    the first turn is not human; it is left out, as in LLaVA
        "empty_answer"          an answer without text: the conversation ends before it, and its question
                                stays unanswered (LLaVA masks the whole sample)
        "empty_question"        a human turn with neither text nor image; kept
        "unanswered"            the last turn is human; kept, as in LLaVA, and nothing of it is supervised
        "marker_without_image"  `<image>` in a human turn of a sample without images: text, as in LLaVA
        "extra_image_marker"    more `<image>` in the human turns than images: the others are text (LLaVA drops or
                                breaks)
        "marker_in_answer"      `<image>` in an answer: text (LLaVA drops or breaks)
        "image_without_marker"  fewer `<image>` than images: the images left over follow the last one that has
                                a place, or open the first human turn (LLaVA ignores them)
        "lone_surrogate"        half a UTF-16 pair, replaced by U+FFFD

    Args:
        conversations: list of {"from": "human" | "gpt", "value": str}; "user" and "assistant" work too.
        num_images: how many images the sample has.
        name: what to call the sample in an error.

    Returns:
        the conversation, with exactly `num_images` images, and the findings, each at most once.

    Raises:
        ConversationError: kind "malformed" (not such a list, a value that is not text), "no_turns" (no human
            turn), "broken_roles" (one speaker twice in a row: nobody can tell which text was meant to be
            answered).
    """
    check_position(position)
    where = f"sample {name}: " if name else ""
    turns = _read_turns(conversations, where)
    findings: list[str] = []
    mended = [(role, replace_surrogates(value)) for role, value in turns]
    if mended != turns:
        findings.append("lone_surrogate")
    if mended[0][0] != "user":
        mended = mended[1:]
        findings.append("first_turn_dropped")
    _check_roles([role for role, _ in mended], where)
    kept = _before_empty_answer(mended)
    if len(kept) < len(mended):
        findings.append("empty_answer")
    elif kept[-1][0] == "user":
        findings.append("unanswered")
    placed = _place_markers(kept, num_images, findings)
    if any(turn.role == "user" and not turn.num_images and not turn.text.strip() for turn in placed):
        findings.append("empty_question")
    front = [Turn(t.role, place_images(t.parts, position)) if t.role == "user" else t for t in placed]
    return Conversation(tuple(front)), findings


def place_images(parts: Sequence[Part], position: Position) -> tuple[Part, ...]:
    """The parts of a human turn, with its images where `position` wants them.

    front: LLaVA's rule. All images first, each followed by a newline, then the turn's text, stripped; no
        newline after the last image where there is no text. (LLaVA keeps one image a turn; here all stay.)
    inline: where they are.
    auto: front, but inline in a turn of several images.
    A turn without images stays as it is.
    """
    turn = Turn("user", tuple(parts))
    if turn.num_images == 0 or position == "inline" or (position == "auto" and turn.num_images > 1):
        return turn.parts
    lines: list[Part] = [Image()]
    for _ in range(turn.num_images - 1):
        lines += [Text("\n"), Image()]
    text = turn.text.strip()
    return (*lines, Text("\n" + text)) if text else tuple(lines)


def _read_turns(conversations: Any, where: str) -> list[tuple[str, str]]:
    """[(role, value)] of a well-formed list."""
    if not isinstance(conversations, list):
        kind = type(conversations).__name__
        raise ConversationError(
            "malformed", f"{where}conversations is of type {kind}, expected a list of turns"
        )
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
    turns, wrong = [], []
    for i, turn in enumerate(conversations):
        if not isinstance(turn, dict):
            wrong.append(f"turn {i} is {turn!r}, expected an object with from and value")
        elif not isinstance(turn.get("from"), str) or (i > 0 and turn["from"] not in roles):
            wrong.append(f'turn {i} has from={turn.get("from")!r}, expected "human" or "gpt"')
        elif not isinstance(turn.get("value"), str):
            wrong.append(f"turn {i} has value={turn.get('value')!r}, expected text")
        else:
            # Any other first speaker (a system text) is dropped with the first turn.
            turns.append((roles.get(turn["from"], "other"), turn["value"]))
    if wrong:
        raise ConversationError("malformed", where + "; ".join(wrong))
    if not any(role == "user" for role, _ in turns):
        raise ConversationError("no_turns", f"{where}no human turn")
    return turns


def _check_roles(roles: list[str], where: str) -> None:
    for i, role in enumerate(roles):
        if role != ("user", "assistant")[i % 2]:
            raise ConversationError(
                "broken_roles",
                f"{where}the turns are by {', '.join(roles)}; expected user and assistant by turns, the user "
                "first. Join or remove doubled turns",
            )


def _before_empty_answer(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    empty = (i for i, (role, value) in enumerate(turns) if role == "assistant" and not value.strip())
    return turns[: next(empty, len(turns))]


def _place_markers(turns: list[tuple[str, str]], num_images: int, findings: list[str]) -> list[Turn]:
    """Splits the values at the markers that stand for images; images without a marker find a place."""
    left, last = num_images, 0
    placed: list[Turn] = []
    extra = in_answer = False
    for role, value in turns:
        if role != "user":
            in_answer |= IMAGE_MARKER in value
            placed.append(Turn("assistant", (Text(value),)))
            continue
        first, *others = value.split(IMAGE_MARKER, left)
        parts: list[Part] = [Text(first)]
        for text in others:
            parts += [Image(), Text(text)]
        if others:
            left, last = left - len(others), len(placed)
        extra |= IMAGE_MARKER in (others or [first])[-1]
        placed.append(Turn("user", tuple(part for part in parts if part != Text(""))))
    if extra:
        findings.append("extra_image_marker" if num_images else "marker_without_image")
    if in_answer:
        findings.append("marker_in_answer")
    if left:
        findings.append("image_without_marker")
        kept = placed[last].parts
        after = max((i + 1 for i, part in enumerate(kept) if isinstance(part, Image)), default=0)
        placed[last] = Turn("user", (*kept[:after], *[Image()] * left, *kept[after:]))
    return placed


# --------------------------------------------------------------------------------------------------
# Templates


class Special(NamedTuple):
    """A token placed by id: "bos", "eos", or a spelling such as "<|im_end|>"."""

    name: str


class Segment(NamedTuple):
    content: str | Special | Image
    supervised: bool = False


BOS, EOS, IM_START, IM_END = Special("bos"), Special("eos"), Special("<|im_start|>"), Special("<|im_end|>")


# What closes an answer, by family.
_ENDS: dict[str, Special | str] = {"vicuna": EOS, "inst": EOS, "plain": "\n", "chatml": IM_END}


def _content(turn: Turn) -> list[Segment]:
    return [Segment(part.text if isinstance(part, Text) else part) for part in turn.parts]


def _vicuna(template: Template, system: str, turns: Sequence[Turn]) -> list[Segment]:
    out = [Segment(system + " ")] if system else []
    for turn in turns:
        if turn.role == "user":
            out += [Segment("USER: "), *_content(turn), Segment(" ASSISTANT:")]
        else:
            out += [Segment(" " + turn.text, True), Segment(EOS, True)]
    return out


def _plain(template: Template, system: str, turns: Sequence[Turn]) -> list[Segment]:
    if len(turns) > 2:
        raise ConversationError("not_a_caption", f"template plain takes one caption, not {len(turns)} turns")
    out = [segment for segment in _content(turns[0]) if isinstance(segment.content, Image)]
    return out + [Segment(turn.text + "\n", True) for turn in turns[1:]]


def _inst(template: Template, system: str, turns: Sequence[Turn]) -> list[Segment]:
    out: list[Segment] = []
    for i, turn in enumerate(turns):
        if turn.role == "user":
            bos = [Segment(BOS)] if i > 0 and template.turns_begin_with_bos else []
            preamble = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if i == 0 and system else ""
            out += [*bos, Segment("[INST] " + preamble), *_content(turn), Segment(" [/INST]")]
        else:
            out += [Segment(f" {turn.text} ", True), Segment(EOS, True)]
    return out


def _chatml(template: Template, system: str, turns: Sequence[Turn]) -> list[Segment]:
    out = [Segment(IM_START), Segment("system\n" + system), Segment(IM_END)] if system else []
    for turn in turns:
        if turn.role == "user":
            out += [Segment(IM_START), Segment("user\n"), *_content(turn), Segment(IM_END)]
            out += [Segment(IM_START), Segment("assistant\n")]
        else:
            out += [Segment(turn.text, True), Segment(IM_END, True)]
    return out


_FAMILIES = {"vicuna": _vicuna, "plain": _plain, "inst": _inst, "chatml": _chatml}


def segments(conversation: Conversation, template: str, generation_prompt: bool = False) -> list[Segment]:
    """The conversation as texts, specials and images in order, without the BOS a tokenizer puts in front.

    Raises ConversationError when user and assistant do not take turns, or an answer holds an image.
    """
    rules, turns = get_template(template), conversation.turns
    _check_roles([turn.role for turn in turns], "")
    if not turns:
        raise ConversationError("no_turns", "a conversation without turns cannot be rendered")
    if any(turn.role == "assistant" and turn.num_images for turn in turns):
        raise ConversationError("image_in_answer", "an answer cannot hold an image")
    if generation_prompt and turns[-1].role == "assistant":
        turns = turns[:-1]
    system = rules.system if conversation.system is None else conversation.system
    return _FAMILIES[rules.family](rules, system, turns)


# --------------------------------------------------------------------------------------------------
# Rendering


@dataclass(frozen=True)
class Rendered:
    """ids: int32 [n], one IMAGE_TOKEN_ID for each image; supervised: bool [n], the tokens the loss counts."""

    ids: np.ndarray
    supervised: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """int32 [n]: the id where supervised, IGNORE_LABEL elsewhere; not shifted."""
        return np.where(self.supervised, self.ids, np.int32(IGNORE_LABEL))


def render(
    conversation: Conversation, template: str, tokenizer: Tokenizer, generation_prompt: bool = False
) -> Rendered:
    """Ids and supervised tokens of a conversation.

    Where the last turn is the user's, the ids end where the answer is to begin ("... ASSISTANT:"). With
    `generation_prompt` they always do: a last turn by the assistant is left out, so that a training sample
    becomes the question it was.

    Raises:
        UserError: no such template, or the tokenizer lacks a token it needs.
        ConversationError: see `segments`.
    """
    ids: list[int] = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    supervised = [False] * len(ids)
    chunk: list[Segment] = []

    def flush() -> None:
        if chunk:
            new, part_of = tokenizer.encode_parts([str(segment.content) for segment in chunk])
            ids.extend(new)
            supervised.extend(chunk[part].supervised for part in part_of)
            chunk.clear()

    for segment in segments(conversation, template, generation_prompt):
        if isinstance(segment.content, str):
            chunk.append(segment)
            continue
        flush()
        if isinstance(segment.content, Image):
            ids.append(IMAGE_TOKEN_ID)
        else:
            ids.append(_special_id(segment.content, template, tokenizer))
        supervised.append(segment.supervised)
    flush()
    return Rendered(np.array(ids, np.int32), np.array(supervised, bool))


def render_text(
    conversation: Conversation, template: str, bos: str, eos: str, generation_prompt: bool = False
) -> str:
    """The conversation as the string an exported chat template gives: for reading and comparing, not for ids.

    Images show as `<image>`, specials by their spelling; the BOS at the start is the tokenizer's, not shown.
    """
    spelled = {BOS: bos, EOS: eos}

    def show(content: str | Special | Image) -> str:
        if isinstance(content, Image):
            return IMAGE_MARKER
        return content if isinstance(content, str) else spelled.get(content, content.name)

    return "".join(show(segment.content) for segment in segments(conversation, template, generation_prompt))


def expand(rendered: Rendered, num_image_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, labels) with each image as `num_image_tokens` IMAGE_TOKEN_ID, which are never supervised.

    Both int32 [n + images * (num_image_tokens - 1)].
    """
    counts = np.where(rendered.ids == IMAGE_TOKEN_ID, num_image_tokens, 1)
    return np.repeat(rendered.ids, counts), np.repeat(rendered.labels, counts)


def stop_ids(template: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end an answer: the template's own end token, and EOS."""
    end = _ENDS[get_template(template).family]
    if isinstance(end, Special):
        first = _special_id(end, template, tokenizer)
    else:
        # The id of a newline that ends a caption: the last piece of a text that ends with one.
        first = tokenizer.encode("a" + end)[-1]
        if tokenizer.decode([first]) != end:
            raise UserError(
                f"template {template}: the tokenizer has no token for the newline that ends a caption"
            )
    return tuple(dict.fromkeys((first, tokenizer.eos_id)))


def _special_id(special: Special, template: str, tokenizer: Tokenizer) -> int:
    if special == EOS:
        return tokenizer.eos_id
    found = tokenizer.bos_id if special == BOS else tokenizer.special_id(special.name)
    if found is None:
        raise UserError(
            f"template {template} needs the special token {special.name}, which the tokenizer does not have. "
            "Take another template (vicuna_v1 needs only EOS), or weights whose tokenizer has this token. It "
            "is never spelled as text: then anyone could type it, and no single id would end an answer."
        )
    return found
