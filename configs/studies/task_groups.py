"""Which task is of which kind: generation, question answering or classification; and which are novel.

    task_groups.groups("vision_flan")["generation"]     names, for data.sources[0].exclude
    task_groups.novel("mini")

The paper (Xu et al., 2024, arXiv 2402.11690) leaves out each kind in turn and does not publish which task it counts
where. So vision_flan_tasks.json is our own reading, of one published sample of each of 204 tasks (and of the
instruction alone of WIT+detailed_description), by these rules, the first that fits:

    generation            The answer is composed, and many wordings are right: captions, descriptions, explanations,
                          rationales, questions, differences, a next step that is to be thought of. Which details are
                          told is left to the model.
    classification        Every sample asks the same of the whole picture or of its one subject, and the answer is one
                          label, or all that apply, of a set that the whole task shares. Whether the labels are listed,
                          and whether the answer puts one into a sentence ("The dog breed is ..."), does not matter;
                          nor that there are thousands (people, species, logos).
    question_answering    All else. What is asked differs from sample to sample: questions, statements to confirm,
                          dialogues, options of the sample's own, be they captions, steps or pictures. Or no set holds
                          the answer: counts without a bound, text that is read off. A question that is answered and
                          explained stays one, and so does the same question in another format.

    novel                 What is asked is not what the dataset was published for, but newly made of its pictures and
                          annotations: the medium of a picture of PACS, the kind of corruption of ImageNet-C, people
                          counted in a detection set, a coarser label that the dataset itself does not have.
                          Not novel are other words, another format, listed options, a part of the classes, levels
                          that the dataset itself defines (iNaturalist, FGVC-Aircraft), naming what a detection set
                          boxes, and the original task with something added. Where this is not certain: existing.

Names say little: Winoground+image_captioning chooses of two captions, MEMOTION+sentiment_detection reads off text.

The built-in data follows the same rules. All its answers are of small sets, counts end at six and words are of one
list; so what is asked of the whole picture or of the only thing in it is classification, and what is asked of a part,
or of one thing among several, is a question. Novel are variations on the pictures of another task.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

from vflax.errors import UserError

GROUPS = ("generation", "question_answering", "classification")
_FILE = "vision_flan_tasks.json"
_MINI = {
    "generation": ("GENERATION+caption", "GENERATION+fact", "GENERATION+reason"),
    "question_answering": (
        "PAIRS+color_at_side",
        "PAIRS+shape_at_side",
        "PAIRS+size_comparison",
        "PAIRS+color_of_shape",
        "PAIRS+shape_of_color",
        "PAIRS+where",
        "GRID+color_at_place",
        "GRID+shape_at_place",
        "GRID+color_of_shape",
        "GRID+shape_of_color",
        "GRID+where",
        "GRID+presence",
        "HANDWRITING+digit_at_side",
        "READING+first_letter",
        "READING+last_letter",
        "CHARTS+tallest_bar",
        "CHARTS+shortest_bar",
        "SIGNS+flag_color",
        "PATTERNS+odd_color",
        "PATTERNS+odd_position",
    ),
    "classification": (
        "SHAPES+shape_naming",
        "SHAPES+color_naming",
        "SHAPES+background_color",
        "SHAPES+position",
        "SHAPES+color_and_shape",
        "COUNTING+how_many",
        "HANDWRITING+digit",
        "HANDWRITING+odd_or_even",
        "READING+word",
        "READING+text_color",
        "SIGNS+arrow_direction",
    ),
}
_MINI_NOVEL = (
    "SHAPES+background_color",
    "PAIRS+size_comparison",
    "GRID+where",
    "HANDWRITING+odd_or_even",
    "READING+first_letter",
    "READING+last_letter",
    "CHARTS+shortest_bar",
    "PATTERNS+odd_position",
)


def groups(kind: str) -> dict[str, tuple[str, ...]]:
    """The names of the tasks of each of GROUPS; each task is in one.

    Args:
        kind: "vision_flan", of which a release may lack some, or "mini", stage 1 of the built-in data.

    Raises:
        UserError: another kind.
    """
    if kind == "mini":
        return dict(_MINI)
    read = _vision_flan(kind)
    return {group: (*read[group]["existing"], *read[group]["novel"]) for group in GROUPS}


def novel(kind: str) -> tuple[str, ...]:
    """The names of the novel tasks; see `groups`."""
    if kind == "mini":
        return _MINI_NOVEL
    read = _vision_flan(kind)
    return tuple(name for group in GROUPS for name in read[group]["novel"])


@functools.cache
def _vision_flan(kind: str) -> dict[str, Any]:
    if kind != "vision_flan":
        raise UserError(
            f"there are no groups of the tasks of {kind!r}; there are those of vision_flan and mini"
        )
    return json.loads(resources.files("configs.studies").joinpath(_FILE).read_text("utf-8"))["tasks"]
