"""Make instances of Vision-Flan's form out of an academic dataset: what a task file declares, and what becomes of it.

    python -m data_pipeline.author new flowers.py
    python -m data_pipeline.author check flowers.py --data=DIR
    python -m data_pipeline.author review flowers.py --data=DIR --out=reviews
    python -m data_pipeline.author accept flowers.py --review=A.json --review=B.json
    python -m data_pipeline.author export flowers.py --data=DIR --out=release

Vision-Flan (Xu et al., 2024, arXiv 2402.11690) was built so: an expert writes tasks for a dataset, each with an
instruction and templates of input and output, at most 10,000 instances each; a new task is tried on 20 samples that
are solved by hand, by two reviewers. docs/author.md leads through it; examples/ has task files.
"""

from __future__ import annotations

from data_pipeline.author.options import all_labels, of_field, sampled
from data_pipeline.author.sources import generated, idx, pictures
from data_pipeline.author.tables import table
from data_pipeline.author.task import Task
from data_pipeline.author.tfds_directory import tfds_directory

# What its files say they are of.
TOOL = "data_pipeline.author"

__all__ = [
    "TOOL",
    "Task",
    "all_labels",
    "generated",
    "idx",
    "of_field",
    "pictures",
    "sampled",
    "table",
    "tfds_directory",
]
