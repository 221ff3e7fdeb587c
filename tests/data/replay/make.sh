#!/bin/sh
# Records the traces of this folder again, as root, on the kernel at hand; see README.md for what each is.
set -eu
cd "$(dirname "$0")"
vmatrace=$(command -v vmatrace || echo ../../../.venv/bin/vmatrace)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cc -O2 -o "$work/vmafuzz" ../../workloads/vmafuzz.c -lpthread
record() {
	name=$1
	shift
	"$vmatrace" record -q --force -o "$name.vmat" -- "$@" >/dev/null
}
record small "$work/vmafuzz" 3 90 -o /dev/null
record fuzz "$work/vmafuzz" 8 400 --ops default -o /dev/null
record all "$work/vmafuzz" 9 380 --ops all -o /dev/null
record threads "$work/vmafuzz" 10 130 --threads 3 -o /dev/null
record forks sh -c 'for i in 1 2 3 4 5 6; do (exit 3); done; ls / >/dev/null'
record python /usr/bin/python3 -S -c 'import json, threading; t = threading.Thread(target=print); t.start(); t.join()'
