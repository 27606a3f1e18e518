"""CIFAR-10: what the picture shows, and whether that is an animal or a vehicle."""

from functools import partial

from data_pipeline.author import Task, pictures, sampled

VEHICLES = ("airplane", "automobile", "ship", "truck")
cifar10 = partial(
    Task,
    source=pictures("cifar10-jpg/train.zip", path="{label}/{file}"),
    licence="none stated",
    citation="A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images. 2009",
    author="vflax",
)
thing = cifar10(
    name="CIFAR10+object_classification",
    instructions=["Identify the object in this picture.", "Which of the options does the picture show?"],
    output="{label}",
    options=sampled(4),
)
kind = cifar10(
    name="CIFAR10+animal_or_vehicle",
    instructions=["Does the picture show an animal or a vehicle?", "Is this an animal, or a vehicle?"],
    fields={"kind": lambda record: "a vehicle" if record["label"] in VEHICLES else "an animal"},
    output="It is {kind}.",
)
