"""MNIST: which digit it is, and whether it is even."""

from functools import partial

from data_pipeline.author import Task, all_labels, idx

mnist = partial(
    Task,
    source=idx("mnist/t10k-images-idx3-ubyte.gz", "mnist/t10k-labels-idx1-ubyte.gz"),
    licence="CC BY-SA 3.0",
    citation="LeCun et al.: Gradient-based learning applied to document recognition. 1998",
    author="vflax",
)
digit = mnist(
    name="MNIST+digit_recognition",
    instructions=["Which digit from 0 to 9 is this?", "Read the handwritten digit.", "What number is it?"],
    output="{label}",
)
parity = mnist(
    name="MNIST+even_or_odd",
    instructions=["Is the handwritten number even or odd?", "Tell if the digit can be divided by two."],
    fields={"parity": lambda record: "odd" if record["number"] % 2 else "even"},
    output="{parity}",
    options=all_labels(),
)
