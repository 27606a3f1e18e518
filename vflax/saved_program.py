"""A compiled training step in a file, so that a job starts without compiling.

    FILE (zip)    manifest.json      what it was compiled with, and of what; compared key by key before it is loaded
                  executable         jax.experimental.serialize_executable's pickle: load only files of your own

The program itself is compared too: the manifest holds a hash of what JAX hands to the compiler. Whatever differs, the
job says so and compiles as ever. On a CPU the round trip is tested; on TPUs nobody has tried it yet.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.sharding import Mesh

import vflax
from vflax.errors import UserError

_MANIFEST, _EXECUTABLE = "manifest.json", "executable"
# A Pallas kernel stands in the program as bytes with the paths of its source files in them; the versions vouch for it.
_KERNEL = re.compile(r'backend_config = "(?:[^"\\]|\\.)*"')


def manifest(lowered: Any, mesh: Mesh) -> dict[str, Any]:
    """What a compiled program depends on.

    Args:
        lowered: jax.stages.Lowered of the step.
        mesh: its devices, here or described.
    """
    device = mesh.devices.flat[0]
    text = _KERNEL.sub("", lowered.as_text())
    return {
        "vflax": vflax.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "compiler": str(device.client.platform_version).strip(),
        "device": device.device_kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "order": [int(d.id) for d in mesh.devices.flat],
        "program": hashlib.sha256(text.encode()).hexdigest(),
    }


def save(path: Path, lowered: Any, executable: Any, mesh: Mesh, plan: dict[str, Any]) -> None:
    """Write a compiled step.

    Args:
        path: of the file.
        lowered: what it was compiled from.
        executable: jax.stages.Compiled.
        mesh: its devices.
        plan: what is known of it, for a person who reads the manifest.

    Raises:
        UserError: the file cannot be written, or this platform cannot hand its programs out.
    """
    try:
        payload, _, _ = serialize_executable.serialize(executable)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise UserError(f"--save={path}: this compiler cannot hand the program out ({error})") from None
    temporary = path.with_name(f".{path.name}.part")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr(_MANIFEST, json.dumps({**manifest(lowered, mesh), "plan": plan}, indent=1))
            file.writestr(_EXECUTABLE, payload)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"--save={path}: {error.strerror}") from None


def load(path: Path, step: Any, arguments: tuple[Any, ...], mesh: Mesh) -> tuple[Any | None, str]:
    """The step in a file, where it is the one that would be compiled here.

    Args:
        path: of the file.
        step: the jitted step of this run.
        arguments: that it will be called with; ShapeDtypeStructs with shardings will do.
        mesh: its devices.

    Returns:
        (a function of the same arguments, "") or (None, why it has to be compiled).
    """
    try:
        with zipfile.ZipFile(path) as file:
            said, payload = dict(json.loads(file.read(_MANIFEST))), file.read(_EXECUTABLE)
    except Exception as error:  # damage raises what the part that it hits raises; the step can be compiled
        return None, f"it cannot be read ({type(error).__name__}: {error})"
    with jax.set_mesh(mesh):
        lowered = step.lower(*arguments)
        wanted = manifest(lowered, mesh)
        wrong = [
            f"{key} {said.get(key)!r}, here {value!r}"
            for key, value in wanted.items()
            if said.get(key) != value
        ]
        if wrong:
            return None, "it is of another program: " + "; ".join(wrong)
        try:
            executable = serialize_executable.deserialize_and_load(
                payload, lowered.in_tree, lowered.out_tree, backend=mesh.devices.flat[0].client,
                execution_devices=list(mesh.devices.flat),
            )  # fmt: skip
        except Exception as error:  # whatever a runtime has against it, compiling is the way out
            return None, f"this runtime does not load it ({type(error).__name__}: {error})"
    return executable, ""
