#!/usr/bin/env bash
# Makes an environment with Apache Beam and vflax, converts a made-up release (with every kind of damage) in it by
# data_pipeline.beam on Beam's local multi-process runner and by data_pipeline.convert, compares, writes RESULT.
#
#   benchmarks/beam.sh WORK [ROWS] [RESULT]      (20000 rows, benchmarks/results/beam.json)
#
# WORK: a folder for the environment (WORK/venv), the release and the datasets (WORK/beam, made anew). Where BEAM_PYTHON names a Python that
# has both, no environment is made. PYTHON: the Python of vflax's own environment (default: python), in which convert
# runs once more: it shows what the older Pillow changes. Exit status 1 when a dataset differs.
#
# vflax does not depend on Beam: Beam 2.77 wants protobuf below 7 and Pillow below 13, and sentencepiece 0.2.3 wants
# protobuf 7.36 without saying so, so that an older one is asked for here.
#
# The tests of the pipeline run with it too: BEAM_PYTHON=WORK/venv/bin/python pytest tests/data_pipeline/test_beam.py
set -euo pipefail
if [ $# -lt 1 ]; then
  sed -n '2,14p' "$0" >&2
  exit 1
fi
mkdir -p "$1"
work=$(cd "$1" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
rows=${2:-20000}
result=${3:-$root/benchmarks/results/beam.json}
own=${PYTHON:-python}
if [ -z "${BEAM_PYTHON:-}" ]; then
  BEAM_PYTHON=$work/venv/bin/python
  [ -x "$BEAM_PYTHON" ] || "$own" -m venv "$work/venv"
  "$BEAM_PYTHON" -m pip install -q 'apache-beam>=2.77' 'sentencepiece<0.2.3' -e "${root}[gcs]"
fi
export PYTHONPATH=$root
# What this script deletes is in a folder of its own: WORK may hold other things.
work=$work/beam
rm -rf "$work"
mkdir "$work"
"$own" - "$work/release" "$rows" <<'PYTHON'
import sys
from pathlib import Path

from tests.data_pipeline.release_files import write_release

write_release(Path(sys.argv[1]), "vision_flan", int(sys.argv[2]))
PYTHON
given=(--format=vision_flan "--annotations=$work/release/annotation_191-task_1k.json" "--images=$work/release/images"
  --shard_size_mb=1)
seconds=()
timed() {
  local began=$EPOCHREALTIME
  "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
  seconds+=("$(awk "BEGIN {printf \"%.1f\", $EPOCHREALTIME - $began}")")
}
timed "$BEAM_PYTHON" -m data_pipeline.convert "${given[@]}" --out="$work/out-convert" --workers=2
timed "$BEAM_PYTHON" -m data_pipeline.beam "${given[@]}" --out="$work/out-beam" \
  --runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=2
timed "$own" -m data_pipeline.convert "${given[@]}" --out="$work/out-own" --workers=2

versions() {
  "$1" -c 'import importlib.metadata as m, json, platform
names = ("apache-beam", "pillow", "protobuf", "sentencepiece", "imagehash", "array_record", "tensorflow-datasets")
found = {d.metadata["Name"].lower().replace("-", "_"): d.version for d in m.distributions()}
kept = {n: found[n.replace("-", "_")] for n in names if n.replace("-", "_") in found}
print(json.dumps({"python": platform.python_version()} | kept))'
}
"$own" - "$work" "$rows" "$result" "$(versions "$BEAM_PYTHON")" "$(versions "$own")" "${seconds[@]}" <<'PYTHON'
import json
import os
import platform
import sys
from pathlib import Path

work, rows, result = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
beam_versions, own_versions = map(json.loads, sys.argv[4:6])
names = ("convert", "beam", "own")
outs = {name: work / f"out-{name}" for name in names}


def differing(one, two):
    found = {str(p.relative_to(out)) for out in (one, two) for p in out.rglob("*") if p.is_file()}
    read = [lambda n, out=out: (out / n).read_bytes() if (out / n).is_file() else None for out in (one, two)]
    return sorted(n for n in found if read[0](n) != read[1](n))


def sha256(out):
    return json.loads((out / "contents.json").read_text())["splits"]["train"]["sha256"]


def manifest_keys(one, two):
    splits = [json.loads((out / "manifest.json").read_text())["splits"]["train"] for out in (one, two)]
    return sorted(key for key in splits[0] if splits[0][key] != splits[1].get(key))


report = json.loads((outs["beam"] / "manifest.json").read_text())["splits"]["train"]
pairs = {"convert_in_the_same_environment": "convert", "convert_in_vflax's_own_environment": "own"}
equal = {
    label: {
        "contents_sha256_equal": sha256(outs["beam"]) == sha256(outs[name]),
        "files_that_differ": differing(outs["beam"], outs[name]),
        "manifest_keys_that_differ": manifest_keys(outs["beam"], outs[name]),
    }
    for label, name in pairs.items()
}
speed = {
    name: {"seconds": float(taken), "rows_per_second": round(rows / float(taken))}
    for name, taken in zip(names, sys.argv[6:9], strict=True)
}
found = {
    "command": f"benchmarks/beam.sh WORK {rows}",
    "machine": f"{os.cpu_count()} cores, {platform.machine()}; 2 workers each, starting them included",
    "load_average": round(os.getloadavg()[1], 1),  # over 5 minutes; above 2, others were at work too
    "versions": {"beam": beam_versions, "own": own_versions},
    "rows": rows,
    "written": report["written"],
    "shards": len(list(outs["beam"].glob("*.array_record-*"))),
    "convert_in_the_same_environment": speed["convert"],
    "beam": speed["beam"],
    "convert_in_vflax's_own_environment": speed["own"],
    "beam_compared_with": equal,
}
result.write_text(json.dumps(found, indent=1) + "\n")
print(json.dumps(found, indent=1))
same = equal["convert_in_the_same_environment"]["files_that_differ"] == []
sys.exit(0 if same and all(pair["contents_sha256_equal"] for pair in equal.values()) else 1)
PYTHON
