"""State, train step and evaluation step: what training, planning and benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vflax import freeze
from vflax.constants import IGNORE_LABEL, IMAGE_TOKEN_ID
from vflax.errors import UserError
from vflax.loss import head_loss_sum, head_losses, supervised_positions, supervised_tokens
from vflax.models import llava, lora
from vflax.optimizer import Schedule, make_optimizer
from vflax.sharding import BATCH_AXES, constrain, param_shardings, platform
from vflax.xla_options import compiler_options

Params = dict[str, jax.Array]
Batch = Mapping[str, jax.Array]
REDUCTIONS = ("global", "llava")


class TrainState(NamedTuple):
    """All that an optimizer step changes.

    step: int32 scalar, optimizer steps done.
    trainable: {path: array}, the parameters that learn, in their master dtype.
    opt_state: Optax's state, over the trainable leaves only.
    """

    step: jax.Array
    trainable: Params
    opt_state: optax.OptState


def loss_sum(
    graphdef: nnx.GraphDef, params: Params, batch: Batch, capacity: int, keys: jax.Array | None = None
) -> jax.Array:
    """Summed cross-entropy of one micro-batch in nats; nan if a row supervises more tokens than `capacity`.

    Args:
        graphdef: the model without its parameters.
        params: {path: array}.
        batch: leaves [B, ...] as vflax/data/rows.py makes them.
        capacity: C, the most supervised tokens of a row.
        keys: of the adapters' dropout, key array [B]; None: without dropout.
    """
    model = llava.merge(graphdef, llava.cast_kernels(graphdef, params))
    hidden, targets, _ = _supervised(model, batch, capacity, keys)
    loss = head_loss_sum(hidden, model.decoder.head(), targets)
    return jnp.where(_lost(batch, targets), jnp.nan, loss)


def _supervised(
    model: Any, batch: Batch, capacity: int, keys: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where the loss looks: hidden [B, C, D], targets int32 [B, C] and positions int32 [B, C] in their rows."""
    hidden = model.hidden(batch["ids"], batch["images"], batch["segments"], batch["positions"], keys)
    positions, targets = supervised_positions(batch["labels"], capacity)
    # [B, T, D] gathered by [B, C, 1] -> [B, C, D]
    return jnp.take_along_axis(hidden, positions[..., None], axis=1), targets, positions


def _lost(batch: Batch, targets: jax.Array) -> jax.Array:
    """Whether a row supervises more tokens than there are targets: bool scalar."""
    return supervised_tokens(batch["labels"]) != jnp.sum(targets != IGNORE_LABEL)


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    reduction: str,
    capacity: int,
    dropout_seed: int | None = None,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The function of one optimizer step, to be jitted with the state donated.

    Args:
        graphdef: the model without its parameters.
        tx: transformation over the trainable leaves.
        reduction: "global", the sum of losses over the sum of supervised tokens, across devices, hosts and
            accumulation steps; or "llava", the mean of the micro-batches' means, for parity studies.
        capacity: the most supervised tokens of a row.
        dropout_seed: of the adapters' dropout; None: without dropout.

    Returns:
        step(state, frozen, batch) -> (state, metrics). Batch leaves are [A, B, ...], A accumulation steps.
        Gradients are taken with respect to the trainable leaves alone and summed in float32. Where the loss or a
        gradient's norm is not finite, metrics["skipped"] is 1 and the state is the old one but for the step, so that
        the position in the data goes on, and the learning rate's schedule, which follows the step.
    """
    if reduction not in REDUCTIONS:
        raise UserError(f"config.loss.reduction={reduction!r} is not one of {', '.join(REDUCTIONS)}")

    def train_step(
        state: TrainState, frozen: Params, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        accumulation, rows = batch["labels"].shape[:2]
        keys = None
        if dropout_seed is not None:
            # [A * B] -> [A, B]
            keys = lora.row_keys(dropout_seed, state.step, accumulation * rows).reshape(accumulation, rows)
        total = supervised_tokens(batch["labels"])

        def micro_loss(trainable: Params, micro: Batch, keys: jax.Array | None) -> jax.Array:
            tokens = total if reduction == "global" else supervised_tokens(micro["labels"]) * accumulation
            loss = loss_sum(graphdef, {**frozen, **trainable}, micro, capacity, keys)
            return loss / jnp.maximum(tokens, 1.0)

        def accumulate(
            carry: tuple[jax.Array, Params], part: tuple[Batch, jax.Array | None]
        ) -> tuple[tuple[jax.Array, Params], None]:
            micro = {name: constrain(leaf, BATCH_AXES) for name, leaf in part[0].items()}
            loss, grads = jax.value_and_grad(micro_loss)(state.trainable, micro, part[1])
            return (carry[0] + loss, jax.tree.map(jnp.add, carry[1], grads)), None

        if accumulation == 1:
            only = jax.tree.map(lambda leaf: leaf[0], (dict(batch), keys))
            loss, grads = jax.value_and_grad(micro_loss)(state.trainable, *only)
        else:
            zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trainable))
            (loss, grads), _ = jax.lax.scan(accumulate, zero, (dict(batch), keys))

        norms = {f"grad_norm/{part}": optax.tree.norm(leaves) for part, leaves in _by_part(grads).items()}
        finite = jnp.isfinite(jnp.stack([loss, *norms.values()])).all()
        trainable, opt_state = _update_if(finite, tx, grads, state)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            **norms,
            "skipped": 1 - finite.astype(jnp.int32),
            "supervised_tokens": total,
            "tokens": jnp.sum(batch["segments"] > 0),
            # Keys that the decoder's queries see, for the count of FLOPs.
            "context": jnp.sum((batch["positions"] + 1) * (batch["segments"] > 0), dtype=jnp.float32),
            "image_tokens": jnp.sum(batch["ids"] == IMAGE_TOKEN_ID),
        }
        return TrainState(state.step + 1, trainable, opt_state), metrics

    return train_step


def _by_part(params: Params) -> dict[str, Params]:
    """{"vision" | "bridge" | "decoder": its leaves}; an adapter is with the part that it sits in."""
    parts: dict[str, Params] = {}
    for path, leaf in params.items():
        parts.setdefault(path.split("/")[0], {})[path] = leaf
    return parts


def _update_if(
    finite: jax.Array, tx: optax.GradientTransformation, grads: Params, state: TrainState
) -> tuple[Params, optax.OptState]:
    """Parameters and optimizer state after an update; as they were where `finite` is false.

    A schedule's count goes on in either case; that of Adam, which corrects its moments' bias, stays with the moments.
    The selects join the updates of their leaves, so an update has the bits that it has without them, and no second
    state is held: peak memory on a v5e slice is the same, temporary memory on a CPU grows by an eighth of the state.
    (jax.lax.cond saves that eighth, but its branch is compiled for itself and rounds otherwise.)
    optax.apply_if_finite does not look at the loss, accepts a bad update after its limit, and keeps counters in the
    optimizer's state, which earlier checkpoints do not have.
    """
    updates, opt_state = tx.update(grads, state.opt_state, state.trainable)

    def is_schedule(part: Any) -> bool:
        return isinstance(part, optax.ScaleByScheduleState)

    def choose(new: Any, old: Any) -> Any:
        return new if is_schedule(new) else jnp.where(finite, new, old)

    new = (optax.apply_updates(state.trainable, updates), opt_state)
    return jax.tree.map(choose, new, (state.trainable, state.opt_state), is_leaf=is_schedule)


def make_eval_step(graphdef: nnx.GraphDef, capacity: int) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """step(params, batch) -> the loss of each supervised token of a batch whose leaves are [B, ...].

    "losses": float32 [B, C] in nats, nan where a row supervises more tokens than `capacity`, C; "segments": int32
    [B, C], of the row's samples the one that the token belongs to, 0 where there is none.
    """

    def eval_step(params: Params, batch: Batch) -> dict[str, jax.Array]:
        model = llava.merge(graphdef, llava.cast_kernels(graphdef, params))
        hidden, targets, positions = _supervised(model, batch, capacity)
        losses = head_losses(hidden, model.decoder.head(), targets)
        segments = jnp.take_along_axis(batch["segments"], positions, axis=1)
        return {
            "losses": jnp.where(_lost(batch, targets), jnp.nan, losses),
            "segments": jnp.where(targets != IGNORE_LABEL, segments, 0),
        }

    return eval_step


def init_state(tx: optax.GradientTransformation, trainable: Params) -> TrainState:
    """The state before the first step; the moments take the shardings of their parameters under jit."""
    return TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable))


def state_shardings(abstract: TrainState, params: Mapping[str, Any], replicated: Any) -> TrainState:
    """Shardings of a state: a moment lies where its parameter lies, scalars everywhere.

    Args:
        abstract: jax.eval_shape of init_state.
        params: {path: sharding} of the trainable leaves.
        replicated: sharding of a scalar.
    """

    def of(key_path: tuple[Any, ...], leaf: Any) -> Any:
        names = [entry.key for entry in key_path if isinstance(entry, jax.tree_util.DictKey)]
        for name in names:
            if name in params and leaf.ndim:
                return params[name]
        return replicated

    return jax.tree_util.tree_map_with_path(of, abstract)


class ModelShapes(NamedTuple):
    """The model of a run without its numbers.

    abstract: {path: ShapeDtypeStruct}, trainable leaves in float32, frozen ones in the compute dtype, but int8 kernels
        and their float32 scales.
    verdict: {path: "trainable" | "frozen"}.
    shardings: {path: NamedSharding}.
    """

    graphdef: Any
    abstract: dict[str, jax.ShapeDtypeStruct]
    verdict: dict[str, str]
    shardings: dict[str, NamedSharding]


def shape_model(
    config: Any, model: llava.LlavaConfig, adapters: lora.LoraConfig | None, mesh: Mesh
) -> ModelShapes:
    """What a run holds of a model, and where on the mesh.

    Args:
        config: of the run.
        model: its shapes and numbers.
        adapters: which linears have adapters; None: none has.
        mesh: of devices that are here, or that are only described.

    Raises:
        UserError: for keys of the config that the model cannot have.
    """
    with jax.set_mesh(mesh):  # attention looks at its devices
        graphdef, shapes = llava.abstract(
            model,
            dtype=config.dtype,
            param_dtype="float32",
            remat=config.remat,
            attention=config.attention,
            lora=adapters,
        )
    verdict = freeze.verdicts(shapes, config.freeze)
    lora.check_frozen(adapters, verdict)
    compute = jnp.dtype(config.dtype)
    abstract = {
        path: leaf
        if verdict[path] == freeze.TRAINABLE or lora.is_integers(path, leaf)
        else jax.ShapeDtypeStruct(leaf.shape, compute)
        for path, leaf in shapes.items()
    }
    return ModelShapes(graphdef, abstract, verdict, param_shardings(abstract, mesh))


class TrainProgram(NamedTuple):
    """An optimizer step as a run jits it, and what goes into it; nothing is allocated.

    tx, schedules: see make_optimizer.
    state: the TrainState of ShapeDtypeStructs, with their shardings.
    shardings: the same tree of shardings.
    step: jitted fn(state, frozen, batch) -> (state, metrics); the state is donated.
    """

    tx: optax.GradientTransformation
    schedules: dict[str, Schedule]
    state: TrainState
    shardings: TrainState
    step: Any


def build_train_program(
    config: Any,
    model: ModelShapes,
    adapters: lora.LoraConfig | None,
    mesh: Mesh,
    *,
    capacity: int,
    total_steps: int,
) -> TrainProgram:
    """What training runs and what the planner compiles, from a config and shapes alone.

    Args:
        config: of the run.
        model: anything with graphdef, abstract, verdict and shardings of a ModelShapes.
        adapters, mesh: see shape_model.
        capacity: the most supervised tokens of a row.
        total_steps: optimizer steps of the run.
    """
    trainable, _ = freeze.split(model.abstract, model.verdict)
    tx, schedules = make_optimizer(config.optimizer, list(trainable), total_steps)
    replicated = NamedSharding(mesh, PartitionSpec())
    abstract = jax.eval_shape(lambda p: init_state(tx, p), trainable)
    where = state_shardings(abstract, model.shardings, replicated)
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, where)
    seed = config.seed if adapters is not None and adapters.dropout else None
    step = jax.jit(
        make_train_step(model.graphdef, tx, config.loss.reduction, capacity, seed),
        donate_argnums=0,
        out_shardings=(where, replicated),
        compiler_options=compiler_options(platform(mesh)),
    )
    return TrainProgram(tx, schedules, state, where, step)
