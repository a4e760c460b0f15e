"""Run a script as `python on_cpu.py script.py ...` would, after the nudges that CPU ranks need; see hosts.py."""

import runpy
import sys

from tests.integrations.hosts import fsdp_on_cpu, no_inference_extension

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    no_inference_extension()
    with fsdp_on_cpu():
        runpy.run_path(sys.argv[0], run_name="__main__")
