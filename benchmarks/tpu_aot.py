"""The training step as TPU compilers make it, for slices that are not here; and MaxText's beside it.

    python -m benchmarks.tpu_aot --out=benchmarks/results/tpu_aot.json [--only=7b-v5e-16]
    python -m benchmarks.tpu_aot --out=... --maxtext=ENV/bin/python      with MaxText and vflax in that environment:
        python3.12 -m venv ENV && ENV/bin/pip install "maxtext[tpu]" && ENV/bin/pip install -e .

Rows of 2048 tokens with three images each (or none), fp32 masters and moments, a frozen tower, windowed einsum off in
both. Every case is a process of its own and takes some minutes; what stands in --out is not compiled again, unless JAX,
libtpu or (but for MaxText) a source that a compilation imports is another by now. Figures are the compiler's, nothing
is run: peak memory of a chip, estimated cycles without Pallas kernels and waiting, bytes of collectives. The MFU
ceiling is (6 N + causal attention) over estimated cycles at the chip's peak; the second one adds splash attention at an
assumed share of the peak (vflax/planner/figures.py).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from vflax.constants import GIB
from vflax.hlo import Instruction, Program
from vflax.planner.environment import ENVIRONMENT

LENGTH, SLOTS, SUPERVISED = 2048, 3, 512
# What a TPU's compiler calls a matrix product.
PRODUCTS = ("convolution", "dot")
# With these every source of vflax is imported that compiling a case imports; `_compile` checks it.
ENTRIES = (
    "configs.common", "vflax.aot", "vflax.config", "vflax.known_models", "vflax.models.splash",
    "vflax.planner.figures", "vflax.planner.workload", "vflax.sharding",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled.

    Attributes:
        system: "vflax", "vflax-theirs" (vflax in MaxText's environment) or "maxtext".
        size: of the decoder.
        topology: as it is booked.
        rows: per chip.
        remat: vflax's policy; MaxText's is "full".
        images: three images per row, or text only.
        stage: of the recipe.
        capacity: supervised positions of a row. All of them where MaxText is the peer, which knows no other.
        data: groups of chips that hold the whole state each; it is shared out within a group.
    """

    system: str
    size: str
    topology: str
    rows: int
    remat: str = "full"
    images: bool = True
    stage: int = 1
    capacity: int = SUPERVISED
    data: int = 1

    @property
    def name(self) -> str:
        parts = [self.system, self.size, self.topology, f"rows{self.rows}", self.remat]
        parts += [] if self.images else ["text"]
        parts += [f"stage{self.stage}"] if self.stage != 1 else []
        parts += [f"capacity{self.capacity}"] if self.capacity != SUPERVISED else []
        parts += [f"data{self.data}"] if self.data != 1 else []
        return "-".join(parts)


# What must fit, and the MFU ceilings.
OWN = (
    Case("vflax", "13b", "v5e-16", 2, "offload"),
    Case("vflax", "7b", "v5e-8", 4, "offload"),
    Case("vflax", "7b", "v5e-16", 1, stage=0),
    Case("vflax", "13b", "v4-32", 2),
    Case("vflax", "13b", "v5p-16", 4),
    Case("vflax", "13b", "v6e-16", 2),
    Case("vflax", "13b", "v5e-256", 2),
    Case("vflax", "13b", "2xv5e-256", 2),
    Case("vflax", "7b", "v5e-16", 4),
    Case("vflax", "13b", "v5e-64", 4, data=2),
)
# The same step on other meshes of a slice: what a smaller fsdp axis does to the reduction of gradients, and to memory.
MESHES = tuple(dataclasses.replace(OWN[8], data=data) for data in (2, 4))
# 13B with 4 and 8 rows per chip needs 64 chips in either system.
PEERS = [
    Case(system, size, topology, rows, images=False, capacity=LENGTH)
    for size, topology in (("7b", "v5e-16"), ("13b", "v5e-64"))
    for rows in (1, 4, 8)
    for system in ("maxtext", "vflax-theirs")
]
# What images add, with all else as in the text-only cases.
WITH_IMAGES = [dataclasses.replace(case, images=True) for case in PEERS if case.system == "vflax-theirs"]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--only", default="", help="only cases whose name has this in it")
    parser.add_argument("--maxtext", type=Path, help="Python of an environment with MaxText and vflax in it")
    parser.add_argument("--case", help="compile this one case here (JSON)")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(_compile(Case(**json.loads(options.case)))))
        return
    results: dict[str, Any] = common.read(options.out).get("cases", {})
    pythons = {"vflax": sys.executable}
    if options.maxtext is not None:
        pythons |= dict.fromkeys(("maxtext", "vflax-theirs"), str(options.maxtext))
    for case in (*OWN, *MESHES, *PEERS, *WITH_IMAGES):
        if case.system not in pythons or options.only not in case.name:
            continue
        if is_current(results.get(case.name), made_with(case, pythons[case.system])):
            continue
        results[case.name] = compile_apart(case, pythons[case.system])
        print(f"{case.name}: {results[case.name]}", file=sys.stderr, flush=True)
        common.save(options.out, summary(results))
    common.write(options.out, summary(results))
    print(table(results))


def summary(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What is written of the cases that were compiled."""
    return {"machine": common.machine(), "cases": results, "marks": marks(results)}


def made_with(case: Case, python: str) -> dict[str, str]:
    """What decides a case's figures: versions of JAX and libtpu in the environment for it, and vflax's code."""
    versions, sources = _environment(python)
    return versions | ({} if case.system == "maxtext" else {"code": common.code(_deciding(case, sources))})


def _deciding(case: Case, sources: Collection[str]) -> set[str]:
    """What decides a case's figures: `sources`, the recipe, which is read and not imported, and this file."""
    return {*sources, _recipe(case), "benchmarks/tpu_aot.py"}


def _recipe(case: Case) -> str:
    return f"configs/stage{case.stage}.py"


def is_current(result: Mapping[str, Any] | None, now: Mapping[str, str]) -> bool:
    """Whether a result is there, and `made_with` what would make it now."""
    return result is not None and all(result.get(name) == value for name, value in now.items())


@functools.cache
def _environment(python: str) -> tuple[dict[str, str], list[str]]:
    """(versions, sources of vflax that compiling a case imports) in the environment of an interpreter."""
    program = (
        "import json; from benchmarks import common, tpu_aot; "
        "print(json.dumps([common.versions('jax', 'libtpu'), tpu_aot.imported(*tpu_aot.ENTRIES)]))"
    )
    versions, sources = json.loads(_run(python, "-c", program).stdout)
    return versions, sources


def imported(*modules: str) -> list[str]:
    """The sources of vflax and its configs that this process has imported; `modules` are imported first."""
    return common.imported(("vflax", "configs"), *modules)


def _run(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [python, *arguments],
        env=os.environ | {"PYTHONPATH": str(common.ROOT)}, cwd=common.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def compile_apart(case: Case, python: str = sys.executable) -> dict[str, Any]:
    """Compile in a process of its own.

    Args:
        case: what to compile.
        python: the interpreter of the environment for it.

    Returns:
        The figures; {"fits": False, "reason": ...} where it needs more memory than a chip has.
    """
    asked = f"--case={json.dumps(dataclasses.asdict(case))}"
    return json.loads(_run(python, "-m", "benchmarks.tpu_aot", asked).stdout.splitlines()[-1])


def _compile(case: Case) -> dict[str, Any]:
    os.environ.update(ENVIRONMENT)
    began, processor = time.perf_counter(), time.process_time()
    result = _maxtext(case) if case.system == "maxtext" else _vflax(case)
    spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - processor}
    made = made_with(case, sys.executable) | {"commit": common.commit()}
    if case.system != "maxtext" and (unknown := set(imported()) - set(_environment(sys.executable)[1])):
        raise SystemExit(f"compiling imports what ENTRIES do not, so that no hash has it: {sorted(unknown)}")
    return {**result, **{k: round(value) for k, value in spent.items()}, **made}


def _vflax(case: Case) -> dict[str, Any]:
    from vflax import aot, sharding
    from vflax.config import load_config
    from vflax.known_models import model_of
    from vflax.planner.figures import describe
    from vflax.planner.workload import Given, find_workload

    config = load_config(f"{_recipe(case)}:{case.size}")
    config.remat = case.remat
    config.mesh.data = case.data
    config.data.max_length, config.data.slots = LENGTH, SLOTS if case.images else 0
    model, _ = model_of(config)
    target = aot.find_target(case.topology)
    mesh, _ = aot.make_mesh(config, target)
    given = Given(case.rows, SLOTS, None, case.capacity)
    work = find_workload(config, model, sharding.batch_shards(mesh), given)
    step = aot.trace_step(config, model, None, mesh, aot.Work(work.rows, case.capacity, 1000))
    compiled = aot.compile_traced(step.traced, mesh)
    plan = describe(config, model, target, step, compiled, work)
    if not plan["fits"]:
        return {"fits": False, "reason": plan["reason"]}
    assert isinstance(compiled, aot.Compiled)
    found = _figures(compiled.memory.peak, plan["collectives"], plan.get("cycles"))
    found["attention_kernels"] = compiled.program.kernels()["tpu_custom_call"] if compiled.program else None
    found["host_gib"] = round(compiled.memory.host / GIB, 3)
    if case.images and compiled.program:
        found["tower_is_sharded"] = _tower_is_sharded(compiled.program, model, case.rows * SLOTS)
    for name in ("mfu_ceiling", "mfu_ceiling_with_kernels"):
        if plan.get(name):
            found[name] = round(plan[name], 4)
    if compiled.program and target.slice:
        chip, flops = target.slice.generation, plan["flops"]
        at_peak = (flops["hardware"] - flops["kernels"]) / chip.peak * chip.clock
        found["products"] = _products(compiled.program, at_peak)
    return found


def _products(program: Program, at_peak: float) -> dict[str, float]:
    """What limits a step: the share of its estimated cycles in which matrix products are made, and how near these come
    to the chip's peak, which would make them in `at_peak` cycles."""
    cycles = sum(found.cycles * times for found, times in program.walk() if _is_product(program, found))
    return {"share_of_cycles": round(cycles / program.cycles, 4), "of_peak": round(at_peak / cycles, 4)}


def _is_product(program: Program, instruction: Instruction) -> bool:
    """A product, or a fusion with one in it."""
    inside = program.computations.get(instruction.called("calls") or "", ())
    return instruction.opcode in PRODUCTS or any(_is_product(program, found) for found in inside)


def _tower_is_sharded(program: Program, model: Any, own: int) -> bool:
    """Whether all products of the tower in one chip are of the images in the chip's own rows.

    Args:
        program: that the chip runs.
        model: its sizes.
        own: how many images these are.

    Raises:
        SystemExit: no product is recognised as the tower's, so that nothing is known of it.
    """
    if not (found := _tower_images(program, model, own)):
        raise SystemExit("none of the compiled products is recognised as the tower's: see _tower_images")
    return found == {own}


def _tower_images(program: Program, model: Any, own: int) -> set[int]:
    """Of how many images the products of the tower are: [images, tokens, ...], or, for a multiple of the chip's own
    images, with images and tokens in one dimension."""
    from vflax.models.splash import beyond

    patches = model.vision.num_patches
    # Patches, with CLS before them, and filled up for attention.
    tokens = {patches, patches + 1, patches + 1 + beyond(patches + 1, causal=False)}
    widths = {model.vision.width, model.vision.mlp_dim}
    found: set[int] = set()
    for shape in (shape for opcode in PRODUCTS for shape in program.shapes(opcode)):
        if len(shape) >= 3 and shape[1] in tokens:
            found.add(shape[0])
        elif len(shape) == 2 and shape[1] in widths:
            # The decoder's products have other widths, or no such number of rows.
            found |= {shape[0] // count for count in tokens if shape[0] % (count * own) == 0}
    return found


def _maxtext(case: Case) -> dict[str, Any]:
    """Their train_compile, run in this process, its compiled step looked at."""
    os.environ["DECOUPLE_GCLOUD"] = "TRUE"  # MaxText's own: without Google's services
    from maxtext.trainers.pre_train import train_compile  # type: ignore[import-not-found]

    from vflax.slices import parse
    from vflax.xla_options import compiler_options

    caught: list[Any] = []
    compile_step = train_compile.jit_and_compile

    def catch(*args: Any, **kwargs: Any) -> Any:
        caught.append(compile_step(*args, **kwargs))
        return caught[-1]

    train_compile.jit_and_compile = catch
    wanted = parse(case.topology)
    base = Path(train_compile.__file__).parents[2] / "configs" / "base.yml"
    flags = " ".join(f"--{name}={value}" for name, value in compiler_options("tpu").items())
    try:
        train_compile.main([
            "train_compile", str(base), f"model_name=llama2-{case.size}",
            f"compile_topology={case.topology.removeprefix(f'{wanted.slices}x')}",
            f"compile_topology_num_slices={wanted.slices}", f"per_device_batch_size={case.rows}",
            f"max_target_length={LENGTH}", "remat_policy=full", f"compile_xla_flags={flags}",
            "enable_checkpointing=false", "log_config=false", "skip_jax_distributed_system=true",
        ])  # fmt: skip
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False, "reason": " ".join(str(error).split())[:300]}
    program = Program(caught[0].as_text())
    peak = caught[0].memory_analysis().peak_memory_in_bytes
    return _figures(peak, program.collective_bytes(), program.cycles)


def _figures(peak: int, collectives: Mapping[str, int], cycles: int | None) -> dict[str, Any]:
    return {
        "fits": True,
        "peak_gib": round(peak / GIB, 3),
        "gcycles": round(cycles / 1e9, 4) if cycles else None,
        "collectives_gb": {kind: round(size / 1e9, 2) for kind, size in collectives.items()},
    }


# Of the table: the kinds by which a step moves much, in the order of COLLECTIVES.
MOVED = ("all-gather", "all-reduce", "reduce-scatter")


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The cases of vflax alone as a table in Markdown."""
    from vflax.slices import parse

    columns = (
        "what", "slice", "rows a chip", "remat", "peak, GiB of", "Gcycles", "MFU ceiling", "with attention",
        *(f"{kind}, GB" for kind in MOVED),
    )  # fmt: skip
    lines = [columns, ["---"] * len(columns)]
    for case in (*OWN, *MESHES):
        if not (result := results.get(case.name)):
            continue
        what = case.size.upper()
        what += f", stage {case.stage}" if case.stage != 1 else ""
        what += f", data={case.data}" if case.data != 1 else ""
        room = f"{parse(case.topology).generation.hbm / GIB:.2f}"
        cells = [what, case.topology, str(case.rows), case.remat]
        if not result["fits"]:
            lines.append([*cells, result["reason"], *[""] * (len(columns) - len(cells) - 1)])
            continue
        host = f", and {result['host_gib']:.2f} of the host" if result["host_gib"] else ""
        ceilings = (result.get(name) for name in ("mfu_ceiling", "mfu_ceiling_with_kernels"))
        lines.append([
            *cells, f"{result['peak_gib']:.2f} of {room}{host}", f"{result['gcycles']:.3f}",
            *(f"{value:.3f}" if value else "" for value in ceilings),
            *(f"{result['collectives_gb'].get(kind, 0):.2f}" for kind in MOVED),
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def marks(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was to be reached, what was found, and whether that is it; of the cases that were compiled."""
    found: list[dict[str, Any]] = []

    def mark(what: str, value: float | None, **limits: float) -> None:
        """A figure that is not there, as of a case that does not fit, misses its mark."""
        missed = {"mark": what, "found": None, **limits, "met": False}
        found.append(missed if value is None else common.mark(what, value, **limits))

    for case in OWN:
        if result := results.get(case.name):
            found.append(common.mark(f"{case.name} fits", bool(result["fits"])))
            if case.images:
                own = bool(result.get("tower_is_sharded"))
                found.append(common.mark(f"{case.name}: a chip's tower sees its own images only", own))
    if stage0 := results.get(OWN[2].name):
        mark("peak GiB of 7B stage 0 on v5e-16", stage0.get("peak_gib"), at_most=2.0)
    for case, least in ((OWN[8], 0.58), (OWN[9], 0.62)):
        if result := results.get(case.name):
            mark(f"MFU ceiling of {case.name}", result.get("mfu_ceiling"), at_least=least)
    _marks_against_maxtext(results, mark)
    return found


def _marks_against_maxtext(results: Mapping[str, Mapping[str, Any]], mark: Any) -> None:
    pairs: Sequence[tuple[Case, Case]] = list(zip(PEERS[::2], PEERS[1::2], strict=True))
    for (theirs, ours), pictures in zip(pairs, WITH_IMAGES, strict=True):
        what = f"{ours.size} on {ours.topology}, {ours.rows} rows per chip"
        a, b, c = (results.get(case.name) for case in (ours, theirs, pictures))
        if a and b:
            mark(f"peak memory over MaxText's: {what}", _ratio(a, b, "peak_gib", 3), at_most=0.90)
            mark(f"cycles over MaxText's: {what}", _ratio(a, b, "gcycles", 3), at_most=0.97)
        if a and c:
            mark(f"cycles with images over without: {what}", _ratio(c, a, "gcycles", 4), at_most=1.02)


def _ratio(over: Mapping[str, Any], under: Mapping[str, Any], figure: str, digits: int) -> float | None:
    """None where either of them lacks the figure."""
    values = over.get(figure), under.get(figure)
    return round(values[0] / values[1], digits) if all(values) else None


if __name__ == "__main__":
    main()
