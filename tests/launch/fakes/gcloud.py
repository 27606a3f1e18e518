"""A gcloud without Google: checks every argument against the real one's table, keeps its world in $FAKE_WORLD.

$FAKE_WORLD/
    gcloud_flags.json    commands and flags of the real gcloud (its own completion table)
    config.json          {"zone": ..., "project": ...}: gcloud's own configuration
    scenario.json        bookings: the states of each booking in turn; workers: how many; nodes, preempt_after: the
                         TPU's state, and after how many status calls it is taken back, by booking; error of a FAILED
                         request, initiator of a SUSPENDED one; no_pool: node pools that cannot be made or deleted
    calls.jsonl          every command line, in order
    resources.json       the queued resources that there are
    workers/NAME/I/      the home of worker I
    buckets/B/           what is in gs://B
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import sys


def read(*names):
    """A JSON file of the world; None where there is none. (pathlib and shutil take longer to import than all this.)"""
    try:
        with open(os.path.join(WORLD, *names)) as f:
            return json.load(f)
    except FileNotFoundError:
        return None


def write(value, *names):
    with open(os.path.join(WORLD, *names), "w") as f:
        json.dump(value, f)


WORLD = os.environ["FAKE_WORLD"]
TABLE, SCENARIO = read("gcloud_flags.json"), read("scenario.json")
ZONES = re.compile(r"[a-z]+-[a-z]+\d+-[a-z]")


def fail(message, status=1):
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    sys.exit(status)


def parse(words):
    """(command, positional, flags) as the real gcloud would read them; anything it would not take ends here."""
    command = next((c for c in TABLE["commands"] if words[: len(c.split())] == c.split()), None)
    if command is None:
        fail(f"Invalid choice: {' '.join(words)}", 2)
    known = TABLE["wide"] | TABLE["commands"][command]
    positional, flags, rest = [], {}, words[len(command.split()) :]
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            positional.append(word)
            continue
        name, equals, value = word.partition("=")
        if name not in known:
            fail(f"unrecognized arguments: {word}", 2)
        if known[name] == "bool":
            if equals:
                fail(f"argument {name}: ignored explicit argument {value!r}", 2)
            value = True
        elif not equals:
            value = rest.pop(0) if rest else fail(f"argument {name}: expected one argument", 2)
        if isinstance(known[name], list) and value not in known[name]:
            fail(f"argument {name}: Invalid choice: {value!r}", 2)
        if name in flags:
            fail(f"argument {name}: given twice", 2)
        flags[name] = value
    return command, positional, flags


def place(flags):
    """The zone and the project must come from somewhere, and look like ones."""
    config = read("config.json")
    zone = flags.get("--zone") or config.get("zone")
    project = flags.get("--project") or config.get("project")
    if not zone or not ZONES.fullmatch(zone):
        fail(f"argument --zone: {zone!r} is none", 2)
    if not project:
        fail("The required property [project] is not currently set.")


def resources():
    return read("resources.json") or {}


def keep(found):
    write(found, "resources.json")


def get(name, collection="queuedResources"):
    found = resources().get(name)
    if found is None:
        fail(f"NOT_FOUND: Resource 'projects/p/locations/z/{collection}/{name}' was not found")
    return found


def show(value, flags):
    """The two forms of --format that the scripts use: value[separator="|"](a.b,c.len())."""
    match = re.fullmatch(r'value\[separator="\|"\]\(([]A-Za-z.,()0[]+)\)', flags.get("--format", ""))
    if match is None:
        fail(f"this fake has no --format={flags.get('--format')}")
    print("|".join(_look_up(value, key) for key in match[1].split(",")))


def _look_up(value, key):
    for part in key.replace("[0]", ".0").split("."):
        if part == "len()":
            return str(len(value or []))
        value = value[int(part)] if part.isdigit() else (value or {}).get(part)
    return "" if value is None else str(value)


def create(positional, flags):
    (name,) = positional
    place(flags)
    if flags.get("--node-id") != name:
        fail("Exactly one of (--node-id | --node-count) must be specified.", 2)
    if ("--accelerator-type" in flags) == ("--type" in flags):
        fail("Exactly one of (--accelerator-type | --topology --type) must be specified.", 2)
    if "--type" in flags and "--topology" not in flags:
        fail("argument --topology: Must be specified.", 2)
    if "--runtime-version" not in flags:
        fail("argument --runtime-version: Must be specified.", 2)
    kind = flags.get("--accelerator-type") or "v4-" + str(2 * _product(flags["--topology"]))
    if not re.fullmatch(r"(v4|v5p|v6e|v5litepod)-\d+", kind):
        fail(f"INVALID_ARGUMENT: accelerator type {kind}")
    runtime = {"v4": "tpu-ubuntu2204-base", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
    if flags["--runtime-version"] != runtime.get(kind.split("-")[0], "v2-alpha-tpuv5-lite"):
        fail(f"INVALID_ARGUMENT: {flags['--runtime-version']} does not run on {kind}")
    found = resources()
    if name in found:
        fail(f"ALREADY_EXISTS: {name}")
    number = read("booked") or 0
    write(number + 1, "booked")
    states = SCENARIO["bookings"][min(number, len(SCENARIO["bookings"]) - 1)]
    asked = {"acceleratorType": flags.get("--accelerator-type")}
    if "--topology" in flags:
        asked = {"acceleratorConfig": {"type": "V4", "topology": flags["--topology"]}}
    found[name] = {"kind": kind, "booking": number, "states": states, "state": "CREATING", "status_calls": 0,
                   "asked": asked}  # fmt: skip
    keep(found)


def _product(topology):
    size = 1
    for side in topology.split("x"):
        size *= int(side)
    return size


def describe(positional, flags):
    (name,) = positional
    place(flags)
    found = resources()
    resource = get(name)
    if resource["states"]:
        resource["state"] = resource["states"].pop(0)
        keep(found | {name: resource})
    state = {"state": resource["state"], "stateInitiator": "SERVICE"}
    if resource["state"] == "SUSPENDED":
        state["stateInitiator"] = SCENARIO.get("initiator", "SERVICE")
    if resource["state"] == "FAILED":
        state["failedData"] = {"error": {"message": SCENARIO.get("error", "no reason")}}
    show({"state": state, "tpu": {"nodeSpec": [{"node": resource["asked"]}]}}, flags)


def describe_node(positional, flags):
    (name,) = positional
    place(flags)
    resource = get(name, "nodes")
    node = SCENARIO.get("nodes", {}).get(str(resource["booking"]), "READY")
    show({"state": node, "acceleratorType": resource["kind"],
          "networkEndpoints": [{}] * SCENARIO["workers"]}, flags)  # fmt: skip


def delete(positional, flags):
    (name,) = positional
    place(flags)
    resource = get(name)
    if resource["state"] == "ACTIVE" and "--force" not in flags:
        fail("FAILED_PRECONDITION: the queued resource has nodes")
    if "--quiet" not in flags:
        fail("this would ask")
    switch_off(name)
    found = resources()
    del found[name]
    keep(found)


def switch_off(name):
    """The machines are gone: what ran on them and what lay on their disks."""
    import shutil

    for worker in range(SCENARIO["workers"]):
        run = os.path.join(WORLD, "workers", name, str(worker), "vflax", "run")
        if os.path.exists(f"{run}/pid") and not os.path.exists(f"{run}/status"):
            with open(f"{run}/pid") as pid:
                os.killpg(os.getpgid(int(pid.read())), signal.SIGKILL)
    shutil.rmtree(os.path.join(WORLD, "workers", name), ignore_errors=True)


def workers(name, flags):
    which = flags.get("--worker", "0")
    if get(name, "nodes")["state"] != "ACTIVE":
        fail("[255] the TPU is not there")
    if which == "all":
        return list(range(SCENARIO["workers"]))
    if int(which) >= SCENARIO["workers"]:
        fail(f"worker {which} is out of range")
    return [int(which)]


def home(name, worker):
    path = os.path.join(WORLD, "workers", name, str(worker))
    os.makedirs(path, exist_ok=True)
    return path


def ssh(positional, flags):
    import subprocess  # takes as long to import as all the rest here, and most calls need none

    (name,) = positional
    place(flags)
    if "--command" not in flags or "--quiet" not in flags:
        fail("this would open a shell, or ask")
    chosen = workers(name, flags)
    if "worker.sh status" in flags["--command"]:
        count_status(name)
        chosen = workers(name, flags)

    def start(worker):
        environment = {
            "HOME": home(name, worker), "PATH": f"{WORLD}/worker_bin:/usr/bin:/bin",
            "FAKE_WORLD": WORLD, "FAKE_WORKER": str(worker), "LANG": "C.UTF-8",
            "MEGASCALE_NUM_SLICES": "3",
        }  # fmt: skip
        return subprocess.Popen(["bash", "-c", flags["--command"]], env=environment, cwd=home(name, worker),
                                stdin=subprocess.DEVNULL)  # fmt: skip

    statuses = [process.wait() for process in [start(worker) for worker in chosen]]
    for worker, status in zip(chosen, statuses, strict=True):
        if status:
            print(f"##### Command execution on worker {worker} failed with exit status {status}. Continuing.",
                  file=sys.stderr)  # fmt: skip
    sys.exit(next((status for status in statuses if status), 0))


def count_status(name):
    """A Spot slice is taken back after so many looks at it."""
    found = resources()
    found[name]["status_calls"] += 1
    limit = SCENARIO.get("preempt_after", {}).get(str(found[name]["booking"]))
    if limit is not None and found[name]["status_calls"] >= limit:
        found[name]["state"], found[name]["states"] = "SUSPENDED", []
        switch_off(name)
    keep(found)


def scp(positional, flags):
    place(flags)
    if "--quiet" not in flags:
        fail("this would ask")
    *sources, target = positional
    remote = [word for word in positional if ":" in word]
    name = remote[0].split(":")[0]
    for worker in workers(name, flags):
        if ":" in target:
            for source in sources:
                copy(source, os.path.join(home(name, worker), target.split(":")[1]))
            continue
        for source in sources:
            path = os.path.join(home(name, worker), source.split(":")[1])
            if os.path.isdir(path) and "--recurse" not in flags:
                fail(f"{path} is a directory")
            copy(path, target)


def copy(path, target):
    import shutil

    if os.path.isdir(path):
        shutil.copytree(path, os.path.join(target, os.path.basename(path)), dirs_exist_ok=True)
    else:
        shutil.copy(path, target)


def in_bucket(url):
    if not url.startswith("gs://"):
        fail(f"{url} is no gs:// URL")
    return os.path.join(WORLD, "buckets", url.removeprefix("gs://"))


def storage_cp(positional, flags):
    *sources, target = positional
    if not os.path.isdir(target):
        fail(f"{target} is not a folder")
    for source in sources:
        path = in_bucket(source)
        if not os.path.exists(path) or (os.path.isdir(path) and "--recursive" not in flags):
            fail(f"The following URLs matched no objects or files: {source}")
        copy(path, target)


def storage_ls(positional, flags):
    for url in positional:
        if not os.path.exists(in_bucket(url)):
            fail("One or more URLs matched no objects.")
        print(url)


def storage_rsync(positional, flags):
    source, target = positional
    if "--recursive" not in flags:
        fail("only the top folder would be copied")
    import shutil

    shutil.copytree(in_bucket(source), target, dirs_exist_ok=True)


def config_list(positional, flags):
    config = read("config.json")
    show({"compute": {"zone": config.get("zone")}, "core": {"project": config.get("project")}}, flags)


def pool_create(positional, flags):
    (name,) = positional
    for flag in ("--cluster", "--location", "--machine-type", "--num-nodes"):
        if flag not in flags:
            fail(f"argument {flag}: Must be specified.", 2)
    if not re.fullmatch(r"ct(4p-hightpu|5lp-hightpu|5p-hightpu|6e-standard)-[148]t", flags["--machine-type"]):
        fail(f"INVALID_ARGUMENT: machine type {flags['--machine-type']}")
    chips = int(flags["--num-nodes"]) * int(flags["--machine-type"].split("-")[-1][0])
    if "--tpu-topology" in flags and _product(flags["--tpu-topology"]) != chips:
        fail(f"INVALID_ARGUMENT: {flags['--tpu-topology']} is not {chips} chips")
    if name in SCENARIO.get("no_pool", []):
        fail("RESOURCE_EXHAUSTED: quota")


def pool_delete(positional, flags):
    (name,) = positional
    if "--cluster" not in flags or "--quiet" not in flags:
        fail("this would ask")
    if name in SCENARIO.get("no_pool", []):
        fail("NOT_FOUND")


COMMANDS = {
    "compute tpus queued-resources create": create,
    "compute tpus queued-resources describe": describe,
    "compute tpus queued-resources delete": delete,
    "compute tpus tpu-vm describe": describe_node,
    "compute tpus tpu-vm ssh": ssh,
    "compute tpus tpu-vm scp": scp,
    "storage cp": storage_cp,
    "storage ls": storage_ls,
    "storage rsync": storage_rsync,
    "config list": config_list,
    "container node-pools create": pool_create,
    "container node-pools delete": pool_delete,
}


def main():
    with open(os.path.join(WORLD, "calls.jsonl"), "a") as calls:
        fcntl.flock(calls, fcntl.LOCK_EX)
        calls.write(json.dumps(["gcloud", *sys.argv[1:]]) + "\n")
    if sys.argv[1] != "config" and (message := read("gcloud_broken.json")):
        fail(message)
    command, positional, flags = parse(sys.argv[1:])
    # The real one talks on stderr when all is well, too.
    print("WARNING: updates are available for some Google Cloud CLI components.", file=sys.stderr, flush=True)
    COMMANDS[command](positional, flags)
