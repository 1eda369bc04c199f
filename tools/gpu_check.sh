#!/usr/bin/env bash
# The first 15 minutes on a GPU, in one call: the tests marked `gpu`, then the benchmarks, whole steps of training
# among them, then every figure beside the one that is expected (tests/expected.py).
#
#     OUT=folder PYTHON=python3 tools/gpu_check.sh
#
# In:  a machine with a CUDA GPU of 139 GiB, gcc and Python.h, which Triton needs where it runs. The script uses the
# packages that are installed or in PYTHONPATH, such as TRL and Liger; it downloads nothing. Out: in $OUT (default:
# tools/results/gpu) one JSON file a benchmark, log.txt and table.txt; the table is also printed at the end. Each part
# has a time limit, in all 13 minutes, so a part that fails or hangs does not stop the others; a part that is stopped
# leaves the settings that it has measured. If a part did not finish, the table gives the reason and the exit status
# is 1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${OUT:-tools/results/gpu}"
python="${PYTHON:-$(if [ -x .venv/bin/python ]; then echo .venv/bin/python; else echo python3; fi)}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
mkdir -p "$out"
: >"$out/log.txt"
output="$(mktemp)"
trap 'rm -f "$output"' EXIT
status=0
parts=()
missing=""
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
    missing="$python finds no CUDA GPU, or no torch"

# part NAME SECONDS COMMAND...: run the command with a time limit, log its output, add a line to `parts`.
part() {
    local name=$1 limit=$2 began=$SECONDS outcome=done lacks=$missing
    shift 2
    rm -f "$out/$name.json"
    if [ -z "$lacks" ] && [[ "$*" = *pytest* ]] && ! "$python" -c 'import pytest' 2>/dev/null; then
        lacks="pytest is not installed"
    fi
    if [ -n "$lacks" ]; then
        parts+=("$(printf '%-9s not run: %s' "$name" "$lacks")")
        status=1
        return
    fi
    timeout --kill-after=5 "$limit" "$@" >"$output" 2>&1
    case $? in
        0) ;;
        124 | 137) outcome="STOPPED at its limit of $limit s" ;;
        *) outcome="FAILED" ;;
    esac
    [ "$outcome" = done ] || status=1
    # The last line of a test run has the counts; the last line of a failure has the error.
    if [[ "$*" = *pytest* ]] || [ "$outcome" = FAILED ]; then
        outcome="$outcome: $(grep -v '^ *$' "$output" | tail -n 1 | cut -c1-100)"
    fi
    parts+=("$(printf '%-9s %4d s  %s' "$name" $((SECONDS - began)) "$outcome")")
    { echo "===== $*"; cat "$output"; } >>"$out/log.txt"
    echo "${parts[-1]}"
}

tests=("$python" -m pytest -m gpu -q -r f -p no:cacheprovider --continue-on-collection-errors)
# First what everything else needs: CUDA graphs together with segments that expand.
part graphs 60 "${tests[@]}" tests/test_allocator.py
part tests 200 "${tests[@]}" tests
part run 180 "$python" tools/bench.py run --rounds=1 --out="$out"
part decode 120 "$python" tools/bench.py decode --rounds=1 --out="$out"
part logprob 80 "$python" tools/bench.py logprob --rounds=3 --out="$out"
part step 80 "$python" tools/bench.py step --rounds=2 --out="$out"
part prefix 30 "$python" tools/bench.py prefix --rounds=3 --out="$out"
part sampling 30 "$python" tools/bench.py sampling --rounds=3 --out="$out"

{
    "$python" tools/bench.py --show --out="$out"
    echo
    "$python" tests/expected.py "$out"
    echo
    printf '%s\n' "${parts[@]}"
} 2>&1 | tee "$out/table.txt"
exit $status
