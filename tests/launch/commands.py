"""Are command lines such as their programs take? Asked of the programs' own parsers; nothing is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.launch.conftest import ROOT

# Parses command lines as their modules do, each in a process of its own, and runs none of them.
PARSE = """
import argparse, json, os, runpy, sys, warnings
from absl import app, flags, logging
from vflax import config, config_flag
# Once, not in each process:
import data_pipeline.convert, data_pipeline.mini_benchmarks, vflax.chat.__main__, vflax.evaluate.__main__, vflax.train
import vflax.generate.open, vflax.preference.judge, vflax.study.__main__, vflax.weights.export

def parse(main, flags_parser):
    flags_parser(sys.argv)
    config.check_values(config_flag.CONFIG.value)
    os._exit(0)

def parse_args(self, argv=None, namespace=None):
    found, rest = self.parse_known_args(argv, namespace)
    os._exit(0 if not rest else self.error(f"unknown: {rest}"))

app.run, argparse.ArgumentParser.parse_args = parse, parse_args
warnings.simplefilter("ignore")  # runpy on modules that are imported already
wrong = []
for module, *argv in json.load(sys.stdin):
    if (child := os.fork()) == 0:
        sys.argv = [module, *argv]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        finally:
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        wrong.append([module, *argv])
print(json.dumps(wrong))
"""


def refused(asked: list[list[str]]) -> list[list[str]]:
    """Those of the command lines, each [module, flag, ...], that their programs do not take."""
    ended = subprocess.run(
        [sys.executable, "-c", PARSE], input=json.dumps(asked), capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    print(ended.stderr)
    return json.loads(ended.stdout.splitlines()[-1])
