"""LLaVA's conversation templates: their texts, and the same as Jinja for Hugging Face.

vflax/conversation.py renders them to ids; this file knows nothing of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from vflax.errors import UserError

# Where an image goes in its turn; what the words mean: conversation.place_images.
Position = Literal["front", "inline", "auto"]


def check_position(position: str) -> None:
    """Raises UserError unless it is one of Position's words."""
    if position not in get_args(Position):
        raise UserError(f"image.position is {position!r}, expected one of {', '.join(get_args(Position))}")


@dataclass(frozen=True)
class Template:
    """One of LLaVA's conversation templates: a family of separators and a system prompt."""

    family: Literal["vicuna", "plain", "inst", "chatml"]
    system: str = ""
    turns_begin_with_bos: bool = False


_VICUNA = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
TEMPLATES: dict[str, Template] = {
    # What LLaVA-1.5 and Vision-Flan were trained and evaluated with.
    "vicuna_v1": Template("vicuna", _VICUNA.format("user")),
    # What LLaVA's command line picks for models with "v1" in their name: "human" in place of "user".
    "llava_v1": Template("vicuna", _VICUNA.format("human")),
    # Stage 0: image, caption, newline; what the human says is not read.
    "plain": Template("plain"),
    "llava_llama_2": Template("inst", _LLAMA_2, turns_begin_with_bos=True),
    "mistral": Template("inst"),
    "chatml": Template("chatml", "Answer the questions."),
}


def get_template(name: str) -> Template:
    if name not in TEMPLATES:
        raise UserError(f"template is {name!r}, expected one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def chat_template(template: str, position: Position = "front") -> str:
    """A Jinja chat template for an exported processor; its string equals `conversation.render_text`.

    It takes messages whose content is a string or a list of {"type": "image"} and {"type": "text", "text":
    ...}, a leading system message, and add_generation_prompt; `position` is the model's own
    (`place_images`). It does not write the first BOS: the tokenizer of a Hugging Face processor puts that in
    front. A server that encodes the string without special tokens must add BOS itself.
    """
    rules = get_template(template)
    check_position(position)
    system = rules.system.replace("\\", "\\\\").replace("'", "\\'")
    body = _JINJA_FAMILIES[rules.family].replace("BOS", "bos_token" if rules.turns_begin_with_bos else "''")
    lines = (_JINJA_BEGIN + body + _JINJA_END).replace("SYSTEM", f"'{system}'")
    # On one line, for whitespace between tags would depend on the options of whoever renders it.
    return "".join(line.strip() for line in lines.replace("CONTENT", _JINJA_POSITIONS[position]).splitlines())


# The words in capitals are filled in by chat_template.
_JINJA_BEGIN = """
{%- if messages[0]['role'] == 'system' -%}{%- set turns = messages[1:] -%}
{%- if messages[0]['content'] is string -%}{%- set system = messages[0]['content'] -%}
{%- else -%}{%- set system = messages[0]['content'] | map(attribute='text') | join -%}{%- endif -%}
{%- else -%}{%- set turns = messages -%}{%- set system = SYSTEM -%}{%- endif -%}
{%- for message in turns -%}
{%- set ns = namespace(images=0, front='', text='', inline='') -%}
{%- if message['content'] is string -%}{%- set ns.text = message['content'] -%}{%- set ns.inline = ns.text -%}
{%- else -%}{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{%- set ns.images = ns.images + 1 -%}
{%- set ns.front = ns.front + '<image>\\n' -%}{%- set ns.inline = ns.inline + '<image>' -%}
{%- elif part['type'] == 'text' -%}{%- set ns.text = ns.text + part['text'] -%}
{%- set ns.inline = ns.inline + part['text'] -%}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- set asks = not loop.last or add_generation_prompt -%}
"""
_JINJA_END = "{%- endfor -%}"
_JINJA_POSITIONS = {
    "front": "((ns.front + (ns.text | trim)) | trim if ns.images else ns.text)",
    "inline": "ns.inline",
    "auto": "((ns.front + (ns.text | trim)) | trim if ns.images == 1 else ns.inline)",
}
_JINJA_FAMILIES = {
    "vicuna": """
{%- if loop.first and system -%}{{ system + ' ' }}{%- endif -%}
{%- if message['role'] == 'user' -%}{{ 'USER: ' + CONTENT }}{%- if asks -%}{{ ' ASSISTANT:' }}{%- endif -%}
{%- else -%}{{ ' ' + ns.text + eos_token }}{%- endif -%}
""",
    "plain": """
{%- if message['role'] == 'user' -%}{{ ns.front | replace('\\n', '') }}
{%- else -%}{{ ns.text + '\\n' }}{%- endif -%}
""",
    "inst": """
{%- if message['role'] == 'user' -%}{%- if not loop.first -%}{{ BOS }}{%- endif -%}
{{ '[INST] ' }}
{%- if loop.first and system -%}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{%- endif -%}
{{ CONTENT + ' [/INST]' }}
{%- else -%}{{ ' ' + ns.text + ' ' + eos_token }}{%- endif -%}
""",
    "chatml": """
{%- if loop.first and system -%}{{ '<|im_start|>system\\n' + system + '<|im_end|>' }}{%- endif -%}
{%- if message['role'] == 'user' -%}{{ '<|im_start|>user\\n' + CONTENT + '<|im_end|>' }}
{%- if asks -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
{%- else -%}{{ ns.text + '<|im_end|>' }}{%- endif -%}
""",
}
