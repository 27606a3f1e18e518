"""Mesh and path rules, without devices where that is possible."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from vflax import sharding
from vflax.errors import UserError


def abstract_mesh(data: int, fsdp: int, tensor: int):
    return AbstractMesh((data, fsdp, tensor), sharding.AXES)


def test_a_kernel_is_sharded_over_fsdp_and_tensor():
    mesh = abstract_mesh(2, 2, 2)
    spec = sharding.param_spec("decoder/layers/attention/q/kernel", (4, 8, 8), mesh)
    assert spec == PartitionSpec(None, "fsdp", "tensor")
    assert sharding.param_spec("decoder/layers/mlp/down/kernel", (4, 8, 8), mesh) == PartitionSpec(
        None, "tensor", "fsdp"
    )


def test_an_adapter_lies_like_its_kernel_and_scales_like_its_outputs():
    mesh = abstract_mesh(1, 2, 2)
    for linear, scale in (("attention/q", "tensor"), ("mlp/down", "fsdp")):
        kernel, a, b = (
            sharding.param_spec(f"decoder/layers/{linear}/{leaf}", (4, 8, 8), mesh)
            for leaf in ("kernel", "lora_a", "lora_b")
        )
        assert kernel == a == b
        found = sharding.param_spec(f"decoder/layers/{linear}/kernel_scale", (4, 8), mesh)
        assert found == PartitionSpec(None, scale) and kernel[2] == scale


def test_an_axis_that_does_not_divide_a_dimension_is_left_out():
    assert sharding.param_spec("bridge/layers_0/kernel", (6, 8), abstract_mesh(1, 4, 2)) == PartitionSpec(
        None, "tensor"
    )


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(UserError, match="no rule for the parameter 'decoder/extra/kernel'"):
        sharding.param_spec("decoder/extra/kernel", (2, 2), abstract_mesh(1, 1, 1))


def test_a_model_that_lies_whole_on_every_device_is_refused_by_name():
    shapes = {"bridge/layers_0/kernel": jax.ShapeDtypeStruct((777, 999), jnp.float32)}
    with pytest.raises(
        UserError, match=r"100.0% of the model is not sharded.*bridge/layers_0/kernel \(777, 999\)"
    ):
        sharding.param_shardings(shapes, abstract_mesh(1, 8, 1))


def test_a_mesh_that_does_not_match_the_devices_names_the_keys():
    with pytest.raises(UserError, match=r"config\.mesh.*config\.mesh\.data"):
        sharding.make_mesh(3, -1, 2, jax.devices()[:1])


def test_minus_one_takes_the_devices_that_are_left():
    assert dict(sharding.make_mesh(1, -1, 1, jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


def test_constrain_does_nothing_without_a_mesh():
    x = jnp.ones((2, 3))
    assert sharding.constrain(x, sharding.BATCH_AXES) is x
