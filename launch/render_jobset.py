"""Fill in launch/jobset.yaml:  python3 launch/render_jobset.py NAME --accelerator=2xv5e-256 --image=... -- FLAGS

gke.sh calls it. Prints the manifest, after it has been read back and checked.
"""

from __future__ import annotations

import argparse
import json
import re
import string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import booking

from vflax.errors import UserError

TEMPLATE = Path(__file__).resolve().parent / "jobset.yaml"
# Names of Pods are NAME-slice-0-0-xxxxx and may have 63 characters.
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,37}[a-z0-9])?")


def render(arguments: argparse.Namespace, launch: Sequence[str]) -> str:
    """The manifest of one run.

    Args:
        arguments: see `parser`.
        launch: the flags of vflax.launch.

    Raises:
        UserError: what cannot run: an unknown slice, slices of one host, a mesh that does not run across the slices,
            a WORKDIR that the hosts do not share.
    """
    facts = booking.facts(arguments.accelerator)
    if int(facts["slices"]) > 1 and int(facts["nodes"]) == 1:
        raise UserError(
            f"{arguments.accelerator}: several slices as one job need slices of more than one host"
        )
    if not _NAME.fullmatch(arguments.name):
        raise UserError(f"{arguments.name}: a name has up to 39 small letters, digits and dashes")
    if arguments.bucket and arguments.claim:
        raise UserError("give --bucket=gs://B or --claim=PVC, one of them: both would be mounted at --mount")
    if not arguments.mount.startswith("/"):
        raise UserError(f"--mount={arguments.mount}: expected an absolute path")
    _check_launch(launch, arguments, int(facts["slices"]))
    # A Pod on the node's network has the node's account, not its own: neither the driver of mounted buckets nor the
    # run itself could open a bucket with it.
    on_host = not arguments.bucket and not any("gs://" in word for word in launch)
    volumes = [_shared(arguments)] if arguments.bucket or arguments.claim else []
    mounts = [{"name": volume["name"], "mountPath": arguments.mount} for volume in volumes]
    # The data loader's workers hand their rows over here.
    volumes.append({"name": "memory", "emptyDir": {"medium": "Memory"}})
    mounts.append({"name": "memory", "mountPath": "/dev/shm"})
    values = {
        "name": arguments.name,
        "namespace": arguments.namespace,
        "max_restarts": arguments.max_restarts,
        "annotations": {"gke-gcsfuse/volumes": "true"} if arguments.bucket else {},
        "host_network": on_host,
        "dns_policy": "ClusterFirstWithHostNet" if on_host else "ClusterFirst",
        "service_account": arguments.service_account,
        "image": arguments.image,
        "args": [_as_it_is(word) for word in launch],
        "env": [_variable(word) for word in arguments.env],
        "env_from": [{"secretRef": {"name": arguments.secret}}] if arguments.secret else [],
        "mounts": mounts,
        "volumes": volumes,
        "gke_accelerator": facts["gke_accelerator"],
        "topology": facts["topology"],
        **{key: int(facts[key]) for key in ("slices", "nodes", "node_chips")},
    }
    text = string.Template(TEMPLATE.read_text()).substitute({k: json.dumps(v) for k, v in values.items()})
    _check_back(text, facts)
    return text


def _as_it_is(text: str) -> str:
    """Kubernetes replaces $(NAME) in arguments and variables."""
    return text.replace("$(", "$$(")


def _variable(word: str) -> dict[str, str]:
    name, equals, value = word.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise UserError(f"--env={name}: expected NAME=VALUE")
    return {"name": name, "value": _as_it_is(value)}


def _check_launch(launch: Sequence[str], arguments: argparse.Namespace, slices: int) -> None:
    given = dict(word.removeprefix("--").partition("=")[::2] for word in launch if word.startswith("--"))
    if not given.get("config") or not given.get("workdir"):
        raise UserError("give --config=... and --workdir=... of vflax.launch after a lone --")
    workdir, mount, data = given["workdir"], arguments.mount.rstrip("/"), given.get("config.mesh.data", "")
    if workdir.startswith("gs://"):
        if not re.fullmatch(r"gs://[^/]+/.+", workdir):
            raise UserError(f"--workdir={workdir}: expected gs://BUCKET/FOLDER")
    elif not arguments.bucket and not arguments.claim:
        raise UserError(
            f"--workdir={workdir}: give --workdir=gs://BUCKET/FOLDER, --bucket=gs://B or --claim=PVC: the hosts share "
            "nothing else"
        )
    elif not workdir.startswith(mount + "/"):
        raise UserError(
            f"--workdir={workdir} must lie under {mount}, which --bucket or --claim is mounted at, or on gs://: the "
            "hosts share nothing else"
        )
    # -1: all devices that the rest of the mesh leaves.
    if slices > 1 and data != "-1" and (not data.isdecimal() or int(data) < 1 or int(data) % slices):
        raise UserError(
            f"--config.mesh.data={data or '(missing)'}: must be a multiple of the {slices} slices, for it runs across "
            f"them: --config.mesh.data={slices}"
        )


def _shared(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.claim:
        return {"name": "shared", "persistentVolumeClaim": {"claimName": arguments.claim}}
    bucket = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]+)/?", arguments.bucket)
    if bucket is None:
        raise UserError(
            f"--bucket={arguments.bucket}: expected gs://NAME, small letters, the bucket as a whole"
        )
    options = (
        "implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0,"
        "file-system:rename-dir-limit:200000"
    )
    attributes = {"bucketName": bucket[1], "mountOptions": options}
    return {
        "name": "shared",
        "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes},
    }


def _check_back(text: str, facts: dict[str, str]) -> None:
    """Read the manifest as Kubernetes will, and look that the chips asked for are those that were booked."""
    try:
        import yaml
    except ImportError:
        raise UserError("the package yaml is missing: pip install pyyaml") from None
    manifest = yaml.safe_load(text)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    asked = job["replicas"] * spec["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    if str(asked) != facts["chips"] or spec["completions"] != spec["parallelism"]:
        raise UserError(f"{TEMPLATE}: asks for {asked} chips, not for {facts['chips']}: mend the template")


def parser() -> argparse.ArgumentParser:
    """The command line, up to the lone --."""
    found = argparse.ArgumentParser(prog="render_jobset.py", allow_abbrev=False)
    found.add_argument("name")
    found.add_argument("--accelerator", required=True, help="2xv5e-256: two slices; v5e-16: one")
    found.add_argument("--image", required=True)
    found.add_argument("--bucket", default="", help="gs://BUCKET, mounted by Cloud Storage FUSE")
    found.add_argument(
        "--claim", default="", help="a PersistentVolumeClaim that many nodes may write (Filestore)"
    )
    found.add_argument("--mount", default="/mnt/vflax")
    found.add_argument("--namespace", default="default")
    found.add_argument("--service-account", default="default")
    found.add_argument("--max-restarts", type=int, default=10)
    found.add_argument(
        "--env", action="append", default=[], help="NAME=VALUE that the run finds; several times"
    )
    found.add_argument(
        "--secret", default="", help="a Kubernetes Secret whose entries the run finds as variables"
    )
    return found


def main() -> int:
    """Entry point."""
    own, launch = _split(sys.argv[1:])
    try:
        print(render(parser().parse_args(own), launch), end="")
    except UserError as error:
        print(f"error: {str(error).replace('--topology=', '', 1)}", file=sys.stderr)
        return 1
    return 0


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


if __name__ == "__main__":
    sys.exit(main())
