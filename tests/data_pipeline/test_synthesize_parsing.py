"""data_pipeline/synthesize: what a reply must be, and our own examples by the same measure."""

from __future__ import annotations

import json
import shutil

import pytest

from data_pipeline.synthesize.contexts import Context, Instance, read_contexts
from data_pipeline.synthesize.parsing import TYPES, Reject, judge
from data_pipeline.synthesize.prompts import OURS, read_prompts, write_prompts
from vflax.endpoint.asking import Reply
from vflax.errors import UserError

CAPTIONS = ("A dog sleeps on a red sofa next to a lamp.", "A dog on a couch.")
LONG = "The dog has found a warm and soft place from which it can watch the room without getting up. " * 3


def blocks(*texts: str) -> str:
    labels = ("Question:", "Answer:")
    return "\n===\n".join(f"{labels[i % 2]}\n{text}" for i, text in enumerate(texts)) + "\n==="


TALK = ("What is on the sofa?", "A dog is lying on it.", "Is it asleep?", "Yes, it is asleep.")


def reason(type: str, reply: str | Reply, captions: tuple[str, ...] = CAPTIONS) -> str:
    """Why it is rejected; "" if it is not."""
    judged = judge(type, captions, reply if isinstance(reply, Reply) else Reply(reply))
    return judged.reason if isinstance(judged, Reject) else ""


def test_a_dialogue_gives_its_questions_and_answers_in_order():
    judged = judge("conversation", CAPTIONS, Reply(blocks(*TALK)))
    assert judged == [TALK[:2], TALK[2:]]


def test_the_last_separator_may_be_missing_and_text_may_follow_its_label():
    text = "Question: What is on the sofa?\n===\nAnswer: A dog.\n ===  \nQuestion:\nIs it asleep?\n===\nAnswer:\nIt is."
    assert judge("conversation", CAPTIONS, Reply(text)) == [
        ("What is on the sofa?", "A dog."),
        ("Is it asleep?", "It is."),
    ]


def test_an_answer_keeps_its_paragraphs():
    text = blocks("Why does it lie there?", f"{LONG}\n\n{LONG}")
    assert judge("complex", CAPTIONS, Reply(text)) == [
        ("Why does it lie there?", f"{LONG}\n\n{LONG}".strip())
    ]


def test_a_description_is_taken_as_it_is():
    assert judge("detail", CAPTIONS, Reply(f"\n{LONG}\n")) == [("", LONG.strip())]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (Reply(""), "empty"),
        (Reply(" \n"), "empty"),
        (Reply(blocks(*TALK), "length"), "truncated"),
        (Reply(blocks(*TALK), "content_filter"), "content_filter"),
        (Reply("", "stop", "I will not do that."), "refused"),
        (Reply(f"<think>\nLet me see.\n</think>\n{LONG}"), "thinking"),
        (Reply("I'm sorry, I can't help with that."), "refused"),
        (Reply("I\u2019m really sorry, but no."), "refused"),
        (Reply("Sorry! This I cannot do."), "refused"),
        (Reply("Unfortunately, I am unable to do this."), "refused"),
        (Reply("I cannot assist with this request."), "refused"),
    ],
)
@pytest.mark.parametrize("type", TYPES)
def test_what_is_wrong_with_a_whole_reply_has_a_name(type, reply, expected):
    assert reason(type, reply) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("There is a dog.", "no_question"),
        ("**Question:**\nWhat?\n===\n**Answer:**\nThat.", "no_question"),
        (blocks(*TALK[:3]), "broken_alternation"),
        ("Answer:\nA dog.\n===\nQuestion:\nWhat is it?", "broken_alternation"),
        ("Question:\nWhat?\n===\nQuestion:\nWhere?\n===\nAnswer:\nThere.", "broken_alternation"),
        ("Here you are:\n===\n" + blocks(*TALK), "broken_alternation"),
        ("Here you are:\n" + blocks(*TALK), "broken_alternation"),
        (blocks(*TALK) + "\nI hope this helps.", "broken_alternation"),
        ("Question:\nWhat is it?\nAnswer:\nA dog.\n===", "missing_separator"),
        (blocks(*TALK).replace("===", "---"), "missing_separator"),
        (blocks(*TALK[:2]), "too_few_questions"),
        (blocks(*TALK * 7), "too_many_questions"),
        (blocks("", "A dog is there.", *TALK), "too_short"),
        (blocks("What is it?", "", *TALK), "too_short"),
        (blocks("What is it?", "dog " * 301, *TALK), "too_long"),
        (blocks("what " * 61, "A dog is there.", *TALK), "too_long"),
    ],
)
def test_what_is_wrong_with_the_form_of_a_dialogue_has_a_name(text, expected):
    assert reason("conversation", text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (blocks("Why is it there?", LONG, "And where else?", LONG), "several_questions"),
        (blocks("Why is it there?", "Because."), "too_short"),
        (blocks("Why is it there?", LONG * 12), "too_long"),
        (blocks("What does a dog sleeps on a red sofa mean?", LONG), "question_leaks_caption"),
    ],
)
def test_what_is_wrong_with_a_complex_reply_has_a_name(text, expected):
    assert reason("complex", text) == expected


def test_only_a_complex_question_must_not_tell_what_is_to_be_seen():
    question = "Is it true that a dog sleeps on a red sofa?"
    assert reason("conversation", blocks(question, "Yes, it does.", *TALK)) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"Question:\nWhat is it?\n===\nAnswer:\n{LONG}", "not_a_paragraph"),
        (f"# The sofa\n{LONG}", "not_a_paragraph"),
        (f"{LONG}\n- a dog\n- a lamp", "not_a_paragraph"),
        (f"1. {LONG}", "not_a_paragraph"),
        (f"```\n{LONG}\n```", "not_a_paragraph"),
        ("A dog on a sofa.", "too_short"),
        (LONG * 12, "too_long"),
    ],
)
def test_what_is_wrong_with_a_description_has_a_name(text, expected):
    assert reason("detail", text) == expected


LEAKS = [
    ("According to the caption, a dog is there.", "mentions_caption"),
    ("The captions agree that it is a dog.", "mentions_caption"),
    ("As the description says, a dog is there.", "mentions_caption"),
    ("From the given sentences one can tell.", "mentions_caption"),
    ("The boxes provided show two of them.", "mentions_caption"),
    ("Based on the provided information, a dog is there.", "mentions_caption"),
    ("The dog lies at [0.12, 0.3, 0.45, 0.7] on it.", "coordinates"),
    ("The dog lies at (0.12, 0.3) on it.", "coordinates"),
    ("It reaches from 0.12, 0.30 to the right.", "coordinates"),
    ("Its bounding box is large.", "coordinates"),
    ("The coordinates tell that it is large.", "coordinates"),
    ("It begins at x1: left of the lamp.", "coordinates"),
    ("As an AI, it is hard to tell for me.", "as_an_ai"),
    ("As a large language model one cannot know.", "as_an_ai"),
    ("Well, I cannot see the image that well.", "as_an_ai"),
    ("Well, I don\u2019t have access to the picture.", "as_an_ai"),
    ("Look at the <image> once more.", "image_marker"),
    ("Look at the <Image> once more.", "image_marker"),
    ("Look at <im_start> once more.", "image_marker"),
]


@pytest.mark.parametrize(("sentence", "expected"), LEAKS)
@pytest.mark.parametrize("type", TYPES)
def test_a_trace_of_how_it_was_made_has_a_name(type, sentence, expected):
    text = {
        "conversation": blocks("What is it?", sentence, *TALK),
        "detail": f"{LONG} {sentence}",
        "complex": blocks("Why is it there?", f"{LONG} {sentence}"),
    }[type]
    assert reason(type, text) == expected


def test_a_trace_in_a_question_counts_too():
    assert (
        reason("conversation", blocks("What does the caption say?", "It is a dog.", *TALK))
        == "mentions_caption"
    )


def test_an_answer_that_refuses_inside_a_dialogue_is_refused():
    text = blocks("What is its name?", "I'm sorry, I can't tell.", *TALK)
    assert reason("conversation", text) == "refused"


@pytest.mark.parametrize(
    "sentence",
    [
        "It is half past 10, 25 minutes before the train leaves.",
        "A sign gives the price: 2.50 dollars.",
        "She gave a description of the place and coordinates the work.",
        "The board lists (1) bread and (2) milk.",
        "He is sorry, and I am sure of it.",
        "The artificial flowers stand in a box.",
    ],
)
def test_ordinary_sentences_are_no_trace(sentence):
    assert reason("detail", f"{LONG} {sentence}") == ""


def test_a_caption_that_is_in_the_picture_may_be_spoken_of():
    sentence = f"{LONG} The caption below the cartoon makes fun of it."
    assert reason("detail", sentence) == "mentions_caption"
    assert reason("detail", sentence, ("A cartoon with a caption about a dog.",)) == ""


# ---------------------------------------------------------------------------------------------------------
# Prompts


@pytest.mark.parametrize(("type", "shots"), [("conversation", 2), ("detail", 3), ("complex", 3)])
def test_our_examples_would_pass_as_replies(type, shots):
    prompts = read_prompts(OURS, type)
    assert len(prompts.shots) == shots
    for shown, answer in prompts.shots:
        assert not reason(type, answer, tuple(shown.split("\n\n")[0].splitlines()))


def test_our_questions_for_descriptions_are_sixteen_different_ones():
    questions = read_prompts(OURS, "detail").questions
    assert len(questions) == len(set(questions)) == 16


@pytest.mark.parametrize("type", TYPES)
def test_our_example_contexts_have_the_form_of_real_ones(type):
    for shown, _ in read_prompts(OURS, type).shots:
        captions, _, boxes = shown.partition("\n\n")
        things = []
        for line in boxes.splitlines():
            category, _, box = line.partition(": ")
            things.append(Instance(category, tuple(json.loads(box))))
        context = Context("1", "1.jpg", tuple(captions.splitlines()), tuple(things))
        assert len(context.captions) == 5
        assert context.text(TYPES[type].with_boxes) == shown
        assert bool(things) == TYPES[type].with_boxes


def test_messages_are_system_examples_and_the_context():
    context = Context("1", "1.jpg", CAPTIONS, (Instance("dog", (0.1, 0.25, 0.5, 1)),))
    prompts = read_prompts(OURS, "complex")
    messages = prompts.messages(context)
    assert [m["role"] for m in messages] == ["system"] + ["user", "assistant"] * 3 + ["user"]
    assert messages[-1]["content"] == "\n".join((*CAPTIONS, "", "dog: [0.100, 0.250, 0.500, 1.000]"))
    talk = read_prompts(OURS, "conversation").messages(context)
    assert talk[-1]["content"] == "\n".join(CAPTIONS)


def test_a_context_without_things_has_no_empty_line():
    assert Context("1", "1.jpg", CAPTIONS, ()).text(with_boxes=True) == "\n".join(CAPTIONS)


def test_prompts_written_out_are_ours_and_can_be_changed(tmp_path):
    write_prompts(tmp_path / "mine")
    assert read_prompts(tmp_path / "mine", "detail").digest == read_prompts(OURS, "detail").digest
    (tmp_path / "mine/detail/system.txt").write_text("Describe it.")
    mine = read_prompts(tmp_path / "mine", "detail")
    assert mine.system == "Describe it."
    assert mine.digest != read_prompts(OURS, "detail").digest


def test_prompts_are_not_written_over_others(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        write_prompts(tmp_path)


@pytest.mark.parametrize(
    "name", ["system.txt", "1_context.txt", "1_answer.txt", "2_context.txt", "2_answer.txt", "questions.txt"]
)
@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_a_damaged_folder_of_prompts_is_told_by_its_file(tmp_path, name, damage):
    write_prompts(tmp_path / "mine")
    path = tmp_path / "mine" / "detail" / name
    path.unlink() if damage == "missing" else path.write_text(" \n")
    with pytest.raises(UserError) as error:
        read_prompts(tmp_path / "mine", "detail")
    assert str(path) in str(error.value)


def test_a_missing_type_is_told_by_its_folder(tmp_path):
    write_prompts(tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine/complex")
    with pytest.raises(UserError, match=r"complex.*--write_prompts"):
        read_prompts(tmp_path / "mine", "complex")


def test_an_example_that_breaks_the_rules_is_refused_before_anything_is_sent(tmp_path):
    write_prompts(tmp_path / "mine")
    path = tmp_path / "mine/complex/2_answer.txt"
    path.write_text(path.read_text().replace("They carry", "The caption says that they carry"))
    with pytest.raises(UserError, match=r"2_answer\.txt.*mentions_caption"):
        read_prompts(tmp_path / "mine", "complex")


# ---------------------------------------------------------------------------------------------------------
# Contexts

GOOD = {
    "id": 7,
    "image": "a/7.jpg",
    "captions": ["A dog."],
    "instances": [{"category": "dog", "bbox": [0, 0.1, 1, 1]}],
}


def test_contexts_are_read_line_by_line(tmp_path):
    path = tmp_path / "contexts.jsonl"
    path.write_text(
        "\ufeff" + json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | {"id": "x", "instances": []}) + "\n"
    )
    first, second = read_contexts(path)
    assert first == Context("7", "a/7.jpg", ("A dog.",), (Instance("dog", (0, 0.1, 1, 1)),))
    assert (second.id, second.instances) == ("x", ())


def test_half_a_pair_of_surrogates_and_line_breaks_in_a_caption_do_no_harm(tmp_path):
    path = tmp_path / "contexts.jsonl"
    path.write_text(json.dumps(GOOD | {"captions": ["A dog\nand \ud83d a cat.\u2028"]}))
    assert read_contexts(path)[0].captions == ("A dog and \ufffd a cat.",)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object"),
        ("[" * 100_000, "not JSON"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "image"}), "image is missing"),
        (json.dumps(GOOD | {"id": True}), "id=True"),
        (json.dumps(GOOD | {"image": ""}), "image=''"),
        (json.dumps(GOOD | {"captions": []}), "captions="),
        (json.dumps(GOOD | {"captions": "A dog."}), "captions="),
        (json.dumps(GOOD | {"captions": ["A dog.", " "]}), "captions="),
        (json.dumps(GOOD | {"instances": None}), "instances=None"),
        (json.dumps(GOOD | {"instances": ["dog"]}), r"instances\[0\]"),
        (json.dumps(GOOD | {"instances": [{"category": "dog"}]}), r"instances\[0\]\.bbox is missing"),
        (json.dumps(GOOD | {"instances": [{"category": "dog", "bbox": [1, 2]}]}), r"instances\[0\]\.bbox"),
        (json.dumps(GOOD | {"instances": [{"category": "dog", "bbox": [3, 4, 200, 90]}]}), "from 0 to 1"),
        (json.dumps(GOOD | {"instances": [{"category": "dog", "bbox": [0.5, 0, 0.2, 1]}]}), "left <= right"),
        (
            json.dumps(GOOD | {"instances": [{"category": "dog", "bbox": [0, 0, float("nan"), 1]}]}),
            "from 0 to 1",
        ),
        (json.dumps(GOOD | {"instances": [{"category": "", "bbox": [0, 0, 1, 1]}]}), "category"),
    ],
)
def test_a_bad_line_is_told_by_its_number(tmp_path, line, words):
    path = tmp_path / "contexts.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(UserError, match=rf"line 2: .*{words}"):
        read_contexts(path)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00"])
def test_a_file_that_is_none_of_contexts_is_told_by_its_name(tmp_path, content):
    path = tmp_path / "contexts.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"contexts\.jsonl"):
        read_contexts(path)
