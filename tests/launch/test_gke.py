"""launch/gke.sh and the JobSet that it hands over, against a fake kubectl, docker and gcloud."""

from __future__ import annotations

import subprocess
import sys

import kubernetes_validate
import pytest
import yaml

from tests.launch.conftest import ROOT

sys.path.insert(0, str(ROOT / "launch"))
import render_jobset

IMAGE = "us-docker.pkg.dev/p1/r/vflax:1"
LAUNCH = (
    "--",
    "--config=configs/stage1.py:13b",
    "--workdir=/mnt/vflax/runs/a",
    "--config.mesh.data=4",
    "--config.note=a: 'b' $(HOME) #c",
)


def rendered(desk, accelerator: str, *words: str) -> dict:
    """The manifest as data, rendered in this process: that is what gke.sh calls, and faster."""
    storage = () if any(word.startswith("--claim") for word in words) else ("--bucket=gs://bk",)
    own = ["run1", f"--accelerator={accelerator}", f"--image={IMAGE}", *storage, *words]
    return yaml.safe_load(render_jobset.render(render_jobset.parser().parse_args(own), LAUNCH[1:]))


def job_of(manifest: dict) -> dict:
    (job,) = manifest["spec"]["replicatedJobs"]
    return job


def pod_of(manifest: dict) -> dict:
    return job_of(manifest)["template"]["spec"]["template"]["spec"]


def test_two_slices_are_a_job_each_with_a_node_pool_to_itself(desk):
    manifest = rendered(desk, "2xv5e-256")
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    exclusive = manifest["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert exclusive == "cloud.google.com/gke-nodepool"
    job = job_of(manifest)
    assert (job["name"], job["replicas"]) == ("slice", 2)
    spec = job["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (64, 64, 0)
    assert manifest["spec"]["failurePolicy"] == {"maxRestarts": 10}


@pytest.mark.parametrize(
    ("accelerator", "label", "topology", "nodes", "chips"),
    [
        ("2xv4-32", "tpu-v4-podslice", "2x2x4", 4, 4),
        ("v5e-16", "tpu-v5-lite-podslice", "4x4", 4, 4),
        ("2xv5e-8", "tpu-v5-lite-podslice", "2x4", 2, 4),
        ("v5e-1", "tpu-v5-lite-podslice", "1x1", 1, 1),
        ("4xv5p-16", "tpu-v5p-slice", "2x2x2", 2, 4),
        ("2xv6e-256", "tpu-v6e-slice", "16x16", 64, 4),
    ],
)
def test_a_booked_name_becomes_gkes_labels_and_limits(desk, accelerator, label, topology, nodes, chips):
    manifest = rendered(desk, accelerator)
    assert pod_of(manifest)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label, "cloud.google.com/gke-tpu-topology": topology,
    }  # fmt: skip
    assert job_of(manifest)["template"]["spec"]["parallelism"] == nodes
    assert pod_of(manifest)["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}


@pytest.mark.parametrize("words", [(), ("--claim=nfs",), ("--env=A=1", "--env=B=", "--secret=tokens")])
def test_the_job_in_it_is_valid_in_kubernetes_own_schema(desk, words):
    job = job_of(rendered(desk, "2xv5e-16", *words))
    assert set(job) == {"name", "replicas", "template"}
    alone = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "run1"}, **job["template"]}
    kubernetes_validate.validate(alone, "1.33", strict=True)


def test_the_launchers_flags_arrive_as_they_were_given(desk):
    (container,) = pod_of(rendered(desk, "v5e-16"))["containers"]
    assert container["command"] == ["python", "-m", "vflax.launch", "--distributed"]
    # Kubernetes makes $(HOME) of $$(HOME), and a value of $(HOME).
    assert [word.replace("$$(", "$(") for word in container["args"]] == list(LAUNCH[1:])


def test_a_run_finds_the_variables_that_it_is_given(desk):
    values = {"VFLAX_CACHE": "/mnt/a b's $(HOME)=#", "NOTHING": ""}
    words = [f"--env={name}={value}" for name, value in values.items()]
    text = desk.good("render", *GOOD, *words, "--secret=tokens", *FLAGS, script="gke")
    (container,) = pod_of(yaml.safe_load(text))["containers"]
    found = {entry["name"]: entry["value"].replace("$$(", "$(") for entry in container["env"]}
    assert found == values
    assert container["envFrom"] == [{"secretRef": {"name": "tokens"}}]


def test_a_bucket_is_mounted_by_the_driver_and_keeps_the_pod_off_the_nodes_network(desk):
    manifest = rendered(desk, "v5e-16", "--service-account=ksa", "--namespace=ns", "--max-restarts=3")
    pod = pod_of(manifest)
    template = job_of(manifest)["template"]["spec"]["template"]
    assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "bk"
    assert (pod["hostNetwork"], pod["dnsPolicy"], pod["serviceAccountName"]) == (False, "ClusterFirst", "ksa")
    assert manifest["metadata"]["namespace"] == "ns" and manifest["spec"]["failurePolicy"]["maxRestarts"] == 3


def test_a_claim_is_mounted_in_the_buckets_place(desk):
    pod = pod_of(rendered(desk, "v5e-16", "--claim=filestore", "--mount=/mnt/vflax/"))
    assert pod["volumes"][0] == {"name": "shared", "persistentVolumeClaim": {"claimName": "filestore"}}
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")


def test_a_workdir_on_a_bucket_needs_no_volume_and_keeps_the_pod_off_the_nodes_network(desk):
    own = ["run1", "--accelerator=v5e-16", f"--image={IMAGE}"]
    launch = ("--config=c.py", "--workdir=gs://b/runs/a")
    pod = pod_of(yaml.safe_load(render_jobset.render(render_jobset.parser().parse_args(own), launch)))
    assert [volume["name"] for volume in pod["volumes"]] == ["memory"]
    assert [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]] == ["/dev/shm"]
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (False, "ClusterFirst")


def test_a_flag_on_a_bucket_keeps_a_pod_with_a_claim_off_the_nodes_network(desk):
    own = ["run1", "--accelerator=v5e-16", f"--image={IMAGE}", "--claim=nfs"]
    launch = ("--config=c.py", "--workdir=/mnt/vflax/a", "--config.init.checkpoint=gs://b/runs/stage0")
    pod = pod_of(yaml.safe_load(render_jobset.render(render_jobset.parser().parse_args(own), launch)))
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (False, "ClusterFirst")
    assert pod["volumes"][0]["name"] == "shared"


def test_the_rest_of_the_devices_may_run_across_slices(desk):
    desk.good("render", *GOOD, *FLAGS[:3], "--config.mesh.data=-1", script="gke")


def test_a_run_is_applied_looked_at_followed_and_deleted(desk):
    words = ("--accelerator=2xv5e-16", f"--image={IMAGE}", "--bucket=gs://bk")
    assert "created" in desk.good("apply", "run1", *words, *LAUNCH, script="gke")
    assert yaml.safe_load((desk.world / "applied.yaml").read_text()) == rendered(desk, "2xv5e-16")
    assert "Running" in desk.good("status", "run1", script="gke")
    assert "step 1" in desk.good("logs", "run1", "--slice=1", "--worker=2", "--follow", script="gke")
    selector = "jobset.sigs.k8s.io/job-index=1,batch.kubernetes.io/job-completion-index=2"
    assert any(selector in word for word in desk.calls()[-1])
    assert "node pools go on costing money" in desk.good("delete", "run1", "--yes", script="gke")
    assert "there is no JobSet run1" in desk.bad("status", "run1", script="gke")


def test_logs_of_all_hosts_need_no_number(desk):
    desk.good("logs", "run1", "--all", "--context=c", "--namespace=ns", script="gke")
    (call,) = desk.calls()
    assert "--selector=jobset.sigs.k8s.io/jobset-name=run1" in call
    assert {"--context=c", "--namespace=ns"} <= set(call)


def test_each_slice_gets_a_node_pool_and_all_are_deleted(desk):
    words = ("big", "--accelerator=2xv5e-16", "--cluster=c", "--location=us-west4")
    desk.good("pools", *words, "--node-location=us-west4-a", "--spot", script="gke")
    desk.good("delete-pools", *words, "--yes", script="gke")
    made, deleted = desk.calls()[:2], desk.calls()[2:]
    assert [call[4] for call in made] == [call[4] for call in deleted] == ["big-0", "big-1"]
    flags = {"--machine-type=ct5lp-hightpu-4t", "--num-nodes=4", "--tpu-topology=4x4", "--spot"}
    assert all(flags <= set(call) for call in made)


def test_a_node_pool_that_is_not_made_or_deleted_is_named(desk):
    desk.scenario(bookings=[], no_pool=["big-1"])
    words = ("big", "--accelerator=2xv5e-16", "--cluster=c", "--location=us-west4")
    assert "node pool big-1 was not made" in desk.bad("pools", *words, script="gke")
    error = desk.bad("delete-pools", *words, "--yes", script="gke")
    assert "not deleted: big-1: look at them in the console" in error
    assert any("big-0" in call and "delete" in call for call in desk.calls())


def test_the_image_is_built_of_the_commit_and_pushed(desk):
    desk.good("image", f"--image={IMAGE}", script="gke")
    assert desk.calls() == [
        ["docker", "build", "--file=launch/Dockerfile", f"--tag={IMAGE}", "-"],
        ["docker", "push", IMAGE],
    ]


def test_the_image_has_jax_and_what_reads_bin_files():
    assert "uv pip install --system --no-cache --torch-backend=cpu --editable '.[tpu,torch]'" in (
        ROOT / "launch/Dockerfile"
    ).read_text().replace("\\\n", " ")


def test_dry_run_prints_commands_and_calls_nothing(desk):
    slices = ("--accelerator=2xv5e-16", "--cluster=c", "--location=l")
    for words, expected in {
        ("image", f"--image={IMAGE}"): "docker push",
        ("pools", "big", *slices): "gcloud container node-pools create big-1",
        ("status", "run1"): "kubectl --namespace=default get jobset run1",
        ("logs", "run1"): "kubectl --namespace=default logs",
        ("delete", "run1"): "kubectl --namespace=default delete jobset run1",
        ("delete-pools", "big", *slices): "gcloud container node-pools delete big-1",
    }.items():
        assert expected in desk.good(*words, "--dry-run", script="gke")
    assert desk.calls() == []


def test_the_printed_apply_is_a_command_that_applies_the_manifest(desk):
    words = ("--accelerator=2xv5e-16", f"--image={IMAGE}", "--bucket=gs://bk", "--dry-run")
    plan = desk.good("apply", "run1", *words, *LAUNCH, script="gke")
    assert desk.calls() == []
    shell = 'kubectl() { [ "$*" = "--namespace=default apply --filename=-" ] && cat; }\n'
    applied = subprocess.run(["bash", "-c", shell + plan], capture_output=True, text=True).stdout
    assert yaml.safe_load(applied) == rendered(desk, "2xv5e-16")


GOOD = ("run1", "--accelerator=2xv5e-16", f"--image={IMAGE}", "--bucket=gs://bk")
FLAGS = ("--", "--config=c.py", "--workdir=/mnt/vflax/a", "--config.mesh.data=2")
BAD = {
    "there is no nothing": ("nothing",),
    "give the NAME": ("render",),
    "one NAME": ("render", *GOOD, "more", *FLAGS),
    "up to 39 small letters": ("render", "Run_1", *GOOD[1:], *FLAGS),
    "give --accelerator": ("render", "run1", *GOOD[2:], *FLAGS),
    "give --image": ("render", *GOOD[:2], GOOD[3], *FLAGS),
    "v9-8: v9 is none of": ("render", "run1", "--accelerator=v9-8", *GOOD[2:], *FLAGS),
    "more than one host": ("render", "run1", "--accelerator=2xv5e-4", *GOOD[2:], *FLAGS),
    "give --workdir=gs://BUCKET/FOLDER, --bucket=gs://B or --claim": ("render", *GOOD[:3], *FLAGS),
    "--config.mesh.data=(missing): must be a multiple of the 2 slices": ("render", *GOOD, *FLAGS[:3]),
    "--config.mesh.data=3: must be a multiple of the 2 slices": (
        "render", *GOOD, *FLAGS[:3], "--config.mesh.data=3",
    ),
    "--claim=PVC, one": ("render", *GOOD, "--claim=c", *FLAGS),
    "expected gs://NAME, small letters": ("render", *GOOD[:3], "--bucket=bk", *FLAGS),
    "expected an absolute path": ("render", *GOOD, "--mount=mnt", *FLAGS),
    "--env=TOKEN: expected NAME=VALUE": ("render", *GOOD, "--env=TOKEN", *FLAGS),
    "expected a whole number": ("render", *GOOD, "--max-restarts=few", *FLAGS),
    "after a lone --": ("apply", *GOOD),
    "expected gs://BUCKET/FOLDER": ("apply", *GOOD[:3], "--", "--config=c.py", "--workdir=gs://b"),
    "--workdir=/data/a must lie under /mnt/vflax": (
        "apply",
        *GOOD,
        "--",
        "--config=c.py",
        "--workdir=/data/a",
    ),
    "give --cluster": ("pools", "big", "--accelerator=v5e-16", "--location=l"),
    "give --location": ("pools", "big", "--accelerator=v5e-16", "--cluster=c"),
    "GKE allows 40": ("pools", "p" * 39, "--accelerator=11xv5e-16", "--cluster=c", "--location=l"),
    "no option --cluster": ("status", "run1", "--cluster=c"),
    "not deleted": ("delete", "run1"),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_with_what_to_do(desk, message):
    assert message in desk.bad(*BAD[message], script="gke")
    assert desk.calls() == []


def test_a_missing_kubectl_or_docker_is_told(desk, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "git", "sed", "date"):
        (tools / name).symlink_to(subprocess.check_output(["which", name], text=True).strip())
    (tools / "python3").symlink_to(sys.executable)
    for words, missing in ((("status", "run1"), "kubectl"), (("image", "--image=i"), "docker")):
        ended = desk(*words, script="gke", path=str(tools))
        assert ended.status == 1 and f"error: {missing} is not on PATH: " in ended.error
