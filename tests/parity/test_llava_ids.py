"""Ids and labels against the original LLaVA algorithm, written here from its description.

The original renders a conversation to one string, cuts it at `<image>`, tokenises every chunk with a legacy slow
LlamaTokenizer (which cuts at special tokens and encodes what lies between with SentencePiece), and finds the labels
by tokenising pieces of the string again and counting.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from vflax.constants import IGNORE_LABEL, IMAGE_TOKEN_ID
from vflax.conversation import TEMPLATES, Conversation, read_llava, render, render_text
from vflax.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.real_data

SYSTEM = {
    "vicuna_v1": "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions.",
    "llava_v1": "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions.",
    "llava_llama_2": "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural language.",
    "chatml": "<|im_start|>system\nAnswer the questions.",
}


class OriginalTokenizer:
    """Legacy slow LlamaTokenizer: BOS, then the text between special tokens, each stretch encoded alone."""

    def __init__(self, model: Path, added: dict[str, int]):
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self.special = {"<unk>": 0, "<s>": 1, "</s>": 2, **added}

    def __call__(self, text: str) -> list[int]:
        ids = [1]
        for piece in re.split("(" + "|".join(map(re.escape, self.special)) + ")", text):
            ids += [self.special[piece]] if piece in self.special else self.sp.encode(piece)
        return ids

    def with_images(self, text: str) -> list[int]:
        first, *others = [self(chunk) for chunk in text.split("<image>")]
        for chunk in others:
            first += [IMAGE_TOKEN_ID, *chunk[1:]]
        return first


def original_turns(sample: dict[str, Any]) -> list[str]:
    """The turns' texts after the original's image rule."""
    texts = [turn["value"] for turn in sample["conversations"]]
    if "image" in sample:
        texts = [
            ("<image>\n" + text.replace("<image>", "").strip()).strip() if "<image>" in text else text
            for text in texts
        ]
    return texts


def original_string(texts: list[str], template: str) -> str:
    if template == "plain":
        return "<image>" + texts[1] + "\n"
    out = {"vicuna_v1": " ", "llava_v1": " ", "chatml": "<|im_end|>"}.get(template, "")
    out = SYSTEM[template] + out if template in ("vicuna_v1", "llava_v1", "chatml") else out
    for i, text in enumerate(texts):
        human = i % 2 == 0
        if template in ("vicuna_v1", "llava_v1"):
            out += f"USER: {text} " if human else f"ASSISTANT: {text}</s>"
        elif template == "chatml":
            out += f"<|im_start|>{'user' if human else 'assistant'}\n{text}<|im_end|>"
        elif human:
            system = SYSTEM.get(template)
            text = f"<<SYS>>\n{system}\n<</SYS>>\n\n{text}" if i == 0 and system else text
            out += ("<s>" if template == "llava_llama_2" else "") + f"[INST] {text} [/INST]"
        else:
            out += f" {text} </s>"
    return out.lstrip("<s>") if template == "llava_llama_2" else out


def original_labels(
    text: str, ids: list[int], tokenizer: OriginalTokenizer, separator: str
) -> list[int] | None:
    """The v1 and llama_2 rule; None where it finds a mismatch and masks the whole sample."""
    labels, done = [IGNORE_LABEL], 1
    for turn in text.split("</s>"):
        if not turn:
            break
        parts = turn.split(separator)
        if len(parts) != 2:
            return None
        length = len(tokenizer.with_images(turn))
        asked = len(tokenizer.with_images(parts[0] + separator)) - 2
        labels += [IGNORE_LABEL] * asked + ids[done + asked : done + length]
        done += length
    return labels if done == len(ids) else None


@pytest.fixture(scope="module")
def tokenizer_dir(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LLaMA-2 tokenizer with two added tokens, as the ChatML fine-tunes of LLaMA and Mistral have them."""
    directory = tmp_path_factory.mktemp("llama2")
    shutil.copyfile(shared_data / "tokenizer/llama2-tokenizer.model", directory / "tokenizer.model")
    (directory / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 32000, "<|im_start|>": 32001}))
    return directory


@pytest.fixture(scope="module")
def original(tokenizer_dir: Path) -> OriginalTokenizer:
    added = json.loads((tokenizer_dir / "added_tokens.json").read_text())
    return OriginalTokenizer(tokenizer_dir / "tokenizer.model", added)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_dir)


@pytest.fixture(scope="module")
def samples(shared_data: Path) -> list[dict[str, Any]]:
    """All Vision-Flan samples, and all of LLaVA's GPT-4 pairs: alone, and the three of an image as three turns."""

    def lines(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (shared_data / "llava-gpt4" / name).read_text().splitlines()]

    flan = json.loads((shared_data / "vision-flan-samples/annotation.json").read_text())
    pairs = [(p["id"], p["instruction"], p["output"]) for p in lines("coco2014_val_gpt4_qa_30x3.jsonl")]
    answers = {a["question_id"]: a["text"] for a in lines("qa90_gpt4_answer.jsonl")}
    pairs += [(q["image"], q["text"], answers[q["question_id"]]) for q in lines("qa90_questions.jsonl")]
    alone = [as_sample([pair], marker) for pair in pairs for marker in ("<image>\n{}", "{}\n<image>")]
    text_only = [as_sample([pair], "{}") for pair in pairs]
    images = sorted({pair[0] for pair in pairs})
    threes = [as_sample([pair for pair in pairs if pair[0] == image], "<image>\n{}") for image in images]
    assert (len(flan), len(pairs), len(threes)) == (204, 180, 60)
    return [*flan, *alone, *text_only, *threes]


def as_sample(pairs: list[tuple[str, str, str]], marker: str) -> dict[str, Any]:
    turns = [t for _, q, a in pairs for t in ({"from": "human", "value": q}, {"from": "gpt", "value": a})]
    turns[0]["value"] = marker.format(turns[0]["value"])
    return {"conversations": turns} | ({"image": pairs[0][0]} if "<image>" in marker else {})


def read(sample: dict[str, Any]) -> Conversation:
    conversation, findings = read_llava(sample["conversations"], int("image" in sample), "front")
    assert findings == []
    return conversation


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_front_ids_and_string_equal_the_original(template, tokenizer, original, samples):
    compared = 0
    for sample in samples:
        if template == "plain" and (len(sample["conversations"]) != 2 or "image" not in sample):
            continue  # the original asserts one captioned image
        text = original_string(original_turns(sample), template)
        conversation = read(sample)
        assert render_text(conversation, template, "<s>", "</s>") == text
        assert render(conversation, template, tokenizer).ids.tolist() == original.with_images(text)
        compared += 1
    assert compared == (564 if template == "plain" else 804)


@pytest.mark.parametrize(
    ("template", "separator"),
    [
        ("vicuna_v1", " ASSISTANT: "),
        ("llava_v1", " ASSISTANT: "),
        ("llava_llama_2", "[/INST] "),
        ("mistral", "[/INST] "),
    ],
)
def test_labels_equal_the_original_where_it_does_not_mask_the_sample(
    template, separator, tokenizer, original, samples
):
    compared = 0
    for sample in samples:
        text = original_string(original_turns(sample), template)
        expected = original_labels(text, original.with_images(text), original, separator)
        if expected is not None:
            assert render(read(sample), template, tokenizer).labels.tolist() == expected
            compared += 1
    assert compared == 804


def test_plain_supervises_caption_and_newline_alone(tokenizer, original, samples):
    for sample in samples[:204]:
        ids = original.with_images(original_string(original_turns(sample), "plain"))
        labels = render(read(sample), "plain", tokenizer).labels.tolist()
        assert labels == [IGNORE_LABEL, IGNORE_LABEL, *ids[2:]]
        assert labels[-1] == 13  # the newline


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_the_generation_prompt_is_the_training_ids_up_to_the_answer(template, tokenizer, samples):
    for sample in samples[:204]:
        conversation = read(sample)
        whole = render(conversation, template, tokenizer)
        prompt = render(conversation, template, tokenizer, generation_prompt=True)
        assert not prompt.supervised.any()
        assert prompt.ids.tolist() == whole.ids[~whole.supervised].tolist()
        assert whole.supervised[len(prompt.ids) :].all()


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_supervised_ids_read_as_the_answer_and_its_end(template, tokenizer, samples):
    for sample in samples[:204]:
        rendered = render(read(sample), template, tokenizer)
        ids = rendered.ids[rendered.supervised].tolist()
        assert ids[-1] == {"plain": 13, "chatml": 32000}.get(template, 2)
        answer = sample["conversations"][1]["value"]
        # " answer" decodes without its first space, the dummy prefix of a text that begins anew.
        space = " " if TEMPLATES[template].family == "inst" else ""
        assert tokenizer.decode(ids[:-1]) == answer + space
