"""What a study is: launches, what is measured of them, what the paper says of it. Plain data; nothing runs here.

A study is a Python file with get_study(variant, seeds) -> Study, such as configs/studies/two_stage_vs_mixed.py:

    arm     one setting of what is asked about: "10 tasks"; arms with a number x can be drawn as a curve
    cell    an arm with a seed, and the run that is measured for it
    run     one launch; it may start from another run's WORKDIR. Cells and studies share runs that are the same
    metric  a number of each cell
    claim   a sentence of the paper, and the test that decides whether these cells show it
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vflax.config import find_file
from vflax.errors import UserError, line_of

_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Run:
    """One launch.

    Attributes:
        config: what --config gets, "configs/stage1.py:tiny".
        changes: {key of the config: value}, "data.sources[0].cap" too.
        start: the run whose WORKDIR is its init.checkpoint; None: what the config says.
    """

    config: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    start: Run | None = None

    def chain(self) -> Iterator[Run]:
        """Itself and what it starts from, the first first."""
        if self.start is not None:
            yield from self.start.chain()
        yield self


@dataclass(frozen=True)
class Arm:
    """One setting; x: its number where it has one, for curves and trends."""

    name: str
    x: float | None = None


@dataclass(frozen=True)
class Cell:
    """The run that is measured for an arm and a seed."""

    arm: str
    seed: int
    run: Run


@dataclass(frozen=True)
class Metric:
    """A number of each cell: the mean of all measures (vflax.study.measures) that a pattern matches.

    Attributes:
        name: how claims call it.
        label: for tables and plots, with the unit.
        read: names of measures or globs, "accuracy/READING+*".
        without: measures to leave out, likewise.
        better: "higher", "lower", or "" where neither is.
        floor: what one same answer to everything gets; an arm that is not above it shows nothing. None: no such number.
        paper: {arm: what the paper measured}, in the unit of its own benchmark.
        paper_label: what that is and where it stands, "MME (Table 3)".
    """

    name: str
    label: str
    read: tuple[str, ...]
    without: tuple[str, ...] = ()
    better: str = "higher"
    floor: float | None = None
    paper: Mapping[str, float] = dataclasses.field(default_factory=dict)
    paper_label: str = ""


@dataclass(frozen=True)
class Difference:
    """`arm` has more of the metric than `other`, by more than `least`.

    against: another metric that is taken of `other`, which may then be `arm` itself; "": the same one.
    """

    metric: str
    arm: str
    other: str
    least: float = 0.0
    against: str = ""

    @property
    def says(self) -> str:
        more = f" by more than {self.least:g}" if self.least else ""
        other = f"{self.against} of {self.other}" if self.against else self.other
        return f"{self.metric}: {self.arm} above {other}{more}"


@dataclass(frozen=True)
class Trend:
    """The metric rises (sign 1) or falls (-1) with x.

    arms: only these; empty: all that have an x.
    """

    metric: str
    sign: int = 1
    arms: tuple[str, ...] = ()

    @property
    def says(self) -> str:
        return f"{self.metric} {'rises' if self.sign > 0 else 'falls'} with each doubling"


@dataclass(frozen=True)
class NoWorse:
    """`arm` has at most `margin` less of the metric than `other`: a test of non-inferiority, whose margin is chosen
    before anything is run."""

    metric: str
    arm: str
    other: str
    margin: float

    @property
    def says(self) -> str:
        return f"{self.metric}: {self.arm} at most {self.margin:g} below {self.other}"


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper.

    Attributes:
        text: the claim, in our words.
        source: where it stands.
        test: what decides it; None where this study cannot.
        why_not: of a claim without a test, what would be needed.
    """

    text: str
    source: str
    test: Difference | Trend | NoWorse | None = None
    why_not: str = ""


@dataclass(frozen=True)
class Preparation:
    """Something that must be there before the first launch: python -m MODULE ARGUMENTS writes `makes`.

    {work} in any of it, and in a run's changes, is the folder of the studies.
    """

    makes: str
    module: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """See the module.

    Attributes:
        name, variant: of the file.
        title: a line.
        question: what is asked, and how; a paragraph.
        axis: what differs between the arms, for the plots.
        notes: what a reader must know of this variant: how it differs from the paper's experiment.
        prepare: what is made first.
    """

    name: str
    variant: str
    title: str
    question: str
    axis: str
    arms: tuple[Arm, ...]
    cells: tuple[Cell, ...]
    metrics: tuple[Metric, ...]
    claims: tuple[Claim, ...]
    notes: tuple[str, ...] = ()
    prepare: tuple[Preparation, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what does not belong together.

        Raises:
            UserError: naming all of it.
        """
        arms = {arm.name: arm for arm in self.arms}
        metrics = {metric.name for metric in self.metrics}
        wrong = (
            [] if _NAME.fullmatch(self.name) else ["its name is that of a folder: letters, digits, _ and -"]
        )
        wrong += [f"two arms called {name!r}" for name in _repeated([arm.name for arm in self.arms])]
        wrong += [
            f"two metrics called {name!r}" for name in _repeated([metric.name for metric in self.metrics])
        ]
        wrong += [
            f"arm {arm.name!r} has an x below 0" for arm in self.arms if arm.x is not None and arm.x < 0
        ]
        wrong += [f"a cell of {cell.arm!r}, which is no arm" for cell in self.cells if cell.arm not in arms]
        wrong += [f"arm {name!r} has no cell" for name in arms.keys() - {cell.arm for cell in self.cells}]
        wrong += [f"two cells of {pair}" for pair in _repeated([(c.arm, c.seed) for c in self.cells])]
        for metric in self.metrics:
            wrong += [
                f"the paper's number of {name!r}, which is no arm"
                for name in metric.paper
                if name not in arms
            ]
        for claim in self.claims:
            wrong += _wrong_claim(claim, arms, metrics)
        if wrong:
            raise UserError(f"study {self.name}: " + "; ".join(wrong))

    @property
    def seeds(self) -> list[int]:
        return sorted({cell.seed for cell in self.cells})

    def runs(self) -> list[Run]:
        """Every launch, what another one starts from before that."""
        found: list[Run] = []
        for cell in self.cells:
            found += [run for run in cell.run.chain() if run not in found]
        return found


def _wrong_claim(claim: Claim, arms: Mapping[str, Arm], metrics: set[str]) -> list[str]:
    test = claim.test
    if test is None:
        return [] if claim.why_not else [f"claim {claim.text!r} has neither a test nor a reason for none"]
    named = test.arms if isinstance(test, Trend) else (test.arm, test.other)
    wrong = [f"claim {claim.text!r}: no arm {name!r}" for name in named if name not in arms]
    read = [test.metric, *([test.against] if isinstance(test, Difference) and test.against else [])]
    wrong += [f"claim {claim.text!r}: no metric {name!r}" for name in read if name not in metrics]
    if isinstance(test, Trend) and not wrong:
        xs = [x for name in test.arms or arms if (x := arms[name].x)]
        if len(xs) < 2:
            wrong.append(f"claim {claim.text!r}: a trend needs two arms with an x above 0")
        wrong += [f"claim {claim.text!r}: two arms have the x {x:g}" for x in _repeated(xs)]
    return wrong


def _repeated(values: Sequence[Any]) -> list[Any]:
    return sorted({value for value in values if values.count(value) > 1})


def load_study(name: str, seeds: Sequence[int] = ()) -> Study:
    """The study that --study names.

    Args:
        name: "two_stage_vs_mixed", of those installed with vflax, or a file; either with ":variant".
        seeds: in place of the study's own; empty: these.

    Raises:
        UserError: there is none, or its file is not a study's.
    """
    path, _, variant = name.partition(":")
    inside = f"configs/studies/{path}.py" if re.fullmatch(r"\w+", path) else path
    file = find_file(inside, "--study", "studies/*.py")
    spec = importlib.util.spec_from_file_location("vflax_study_file", Path(file))
    if spec is None or spec.loader is None:
        raise UserError(f"--study={name}: {file} is no Python file, so it is no study")
    module = importlib.util.module_from_spec(spec)
    given = {"variant": variant} if variant else {}
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_study"):
            raise UserError(f"{file} has no get_study(variant, seeds), so it is no study")
        return module.get_study(**given, **({"seeds": tuple(seeds)} if seeds else {}))
    except UserError as error:
        raise UserError(f"--study={name}: {error}") from None
    # Whatever a person's file raises; where in it is what they need to know.
    except (Exception, SystemExit) as error:
        raise UserError(
            f"--study={name}: {file}{line_of(error, Path(file))}: {type(error).__name__}: {error}"
        ) from None


def known_studies() -> list[str]:
    """Names of those installed with vflax."""
    folder = Path(find_file("configs/studies/common.py", "--study", "studies/*.py")).parent
    return sorted(file.stem for file in folder.glob("*.py") if "def get_study(" in file.read_text())
