#!/usr/bin/env bash
# Traces a small program on this kernel and shows what the kernel decided; where this kernel may not
# be traced, says why and shows the same from a bundled trace of a real one.
set -euo pipefail
cd "$(dirname "$0")/.."

vmatrace=.venv/bin/vmatrace
folder=demo-out
trace=$folder/demo.vmat
bundled=tests/data/demo.vmat

step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
[ -t 1 ] || step() { printf '\n== %s\n' "$*"; }

# Show a command as the user would type it, then run it.
run() {
    printf '$ %s\n' "$*"
    "$@"
}

# The same, but at most so many lines of what it prints.
run_some() { # lines, command...
    local limit=$1 total
    shift
    printf '$ %s\n' "$*"
    "$@" >"$folder/output"
    total=$(wc -l <"$folder/output")
    head -n "$limit" "$folder/output"
    if [ "$total" -gt "$limit" ]; then
        printf '... and %d lines more\n' "$((total - limit))"
    fi
}

record_live() { # -> 0 and a fresh $trace, or a line that says why not
    local workload=$folder/demo
    if ! gcc -O1 -o "$workload" tests/workloads/demo.c 2>"$folder/errors"; then
        printf 'no live trace here: the workload does not compile: %s\n' "$(head -n 1 "$folder/errors")"
        return 1
    fi
    printf '$ %s record -o %s -- %s\n' "$vmatrace" "$trace" "$workload"
    if "$vmatrace" record --force -o "$trace" -- "$workload" 2>"$folder/errors"; then
        cat "$folder/errors"
        return 0
    fi
    printf 'no live trace here: %s\n' "$(sed -n 's/^error: //p;T;q' "$folder/errors")"
    return 1
}

mkdir -p "$folder"
step "What the kernel does with a small program's memory, live"
if ! record_live; then
    trace=$bundled
    echo "the same from $bundled, recorded on a real kernel:"
fi

step "The events: where it merged, where it split"
run_some 24 "$vmatrace" show "$trace" --kind merge,split

step "The address space when the program ended"
run_some 24 "$vmatrace" timeline "$trace" --at end

step "Did the kernel keep to its rules?"
status=0
run "$vmatrace" replay "$trace" || status=$?

step "Next"
cat <<NEXT
$vmatrace show $trace                        every event, a line each
$vmatrace show $trace --kind merge_refused   why mappings were not made one
$vmatrace timeline $trace --op 10            the address space after operation 10
$vmatrace replay $trace --format json        the verdict, for a program
$vmatrace record -- COMMAND                  trace something of yours
$vmatrace doctor                             what works on this kernel
NEXT
exit "$status"
