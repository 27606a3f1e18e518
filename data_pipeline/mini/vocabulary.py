"""The mini dataset's own SentencePiece tokenizer, trained on its texts."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import sentencepiece

from data_pipeline.mini.plan import Item
from data_pipeline.mini.tasks import TASKS
from vflax.templates import TEMPLATES

# 259 pieces are control pieces and bytes; the others give nearly every word of the prompts and answers one piece.
VOCAB_SIZE = 1024
# How often a text counts. BPE keeps what is frequent: what a model has to say should be one piece, and so should the
# words of the system prompts, which stand in front of every sample.
_ANSWER_WEIGHT = 10
_SYSTEM_WEIGHT = 2000
_SHORT = {task.name for task in TASKS}


def train_tokenizer(items: Iterable[Item]) -> bytes:
    """A SentencePiece model of the training texts, as the bytes of tokenizer.model.

    BPE with byte fallback, so that every text can be encoded, and without normalisation, so that decoding gives the
    text back. unk 0, bos 1, eos 2, no pad, as in LLaMA. The same texts give the same bytes.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_texts(items),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        hard_vocab_limit=False,  # a small scale has fewer words than that
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=False,  # one piece for a digit and the space before it, as for any other word
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,  # with more threads the order of equally frequent pieces is not fixed
        minloglevel=2,
    )
    return model.getvalue()


def _texts(items: Iterable[Item]) -> Iterator[str]:
    for item in items:
        if item.split != "train":
            continue
        yield from (line for line in item.human.split("\n") if line != "<image>")
        for _ in range(_ANSWER_WEIGHT if item.task in _SHORT else 1):
            yield item.answer
    for template in TEMPLATES.values():
        if template.family != "plain":
            for _ in range(_SYSTEM_WEIGHT):
                yield f"{template.system} {'[INST] [/INST]' if template.family == 'inst' else 'USER: ASSISTANT:'}"
