"""Omniglot: which alphabet a handwritten character is of."""

from data_pipeline.author import Task, pictures, sampled

alphabet = Task(
    name="OMNIGLOT+alphabet_classification",
    source=pictures(
        "omniglot/images_background_small1.zip",
        "omniglot/images_background_small2.zip",
        path="{part}/{folder}/{character}/{file}",
    ),
    # Greek and Latin are in both parts.
    where=lambda record: record["part"].endswith("1") or record["folder"] not in ("Greek", "Latin"),
    fields={"alphabet": lambda record: record["folder"].replace("_", " ")},
    instructions=["Which alphabet is this character of?", "Identify the writing system of the character."],
    output="{alphabet}",
    options=sampled(5),
    licence="MIT",
    citation="Lake et al.: Human-level concept learning through probabilistic program induction. 2015",
    author="vflax",
)
