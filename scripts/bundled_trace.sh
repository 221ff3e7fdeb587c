#!/usr/bin/env bash
# Records the bundled trace again (tests/data/demo.vmat), for when the trace format has changed.
set -euo pipefail
cd "$(dirname "$0")/.."

# A folder whose name tells nothing about this machine: the paths of mapped files are in the trace.
folder=/tmp/vmatrace-demo
mkdir -p "$folder"
gcc -O1 -o "$folder/demo" tests/workloads/demo.c
.venv/bin/vmatrace record --force --quiet -o tests/data/demo.vmat -- "$folder/demo"
chmod 644 tests/data/demo.vmat
.venv/bin/vmatrace replay tests/data/demo.vmat
