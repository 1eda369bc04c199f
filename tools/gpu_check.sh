#!/usr/bin/env bash
# All checks that need a GPU, in one call of less than eight minutes: the tests marked `gpu`, then the benchmarks.
#
#     OUT=folder PYTHON=python3 tools/gpu_check.sh
#
# In:  a machine with a CUDA GPU. The script uses the packages that are installed or in PYTHONPATH, such as TRL and
# Liger; it downloads nothing. Out: in $OUT (default: tools/results/gpu) one JSON file a benchmark, log.txt and
# table.txt; the table is also printed at the end. Each part has a time limit, so a part that fails or hangs does
# not stop the others. If a part did not finish, the table gives the reason and the exit status is 1.
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

# part NAME SECONDS COMMAND...: run the command with a time limit, log its output, add a line to `parts`.
part() {
    local name=$1 limit=$2 began=$SECONDS outcome=done
    shift 2
    rm -f "$out/$name.json"
    timeout --kill-after=5 "$limit" "$@" >"$output" 2>&1
    case $? in
        0) ;;
        124 | 137) outcome="STOPPED at its limit of $limit s" ;;
        *) outcome="FAILED" ;;
    esac
    [ "$outcome" = done ] || status=1
    # The last line of a test run has the counts; the last line of a failure has the error.
    if [ "$name" = tests ] || [ "$outcome" = FAILED ]; then
        outcome="$outcome: $(grep -v '^ *$' "$output" | tail -n 1 | cut -c1-100)"
    fi
    parts+=("$(printf '%-9s %4d s  %s' "$name" $((SECONDS - began)) "$outcome")")
    { echo "===== $*"; cat "$output"; } >>"$out/log.txt"
    echo "${parts[-1]}"
}

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    if "$python" -c 'import pytest' 2>/dev/null; then
        part tests 90 "$python" -m pytest -m gpu -q -r f -p no:cacheprovider --continue-on-collection-errors tests
    else
        parts+=("tests      not run: pytest is not installed")
        status=1
    fi
    part logprob 75 "$python" tools/bench.py logprob --rounds=3 --out="$out"
    part decode 110 "$python" tools/bench.py decode --rounds=1 --out="$out"
    part run 100 "$python" tools/bench.py run --rounds=1 --out="$out"
    part step 60 "$python" tools/bench.py step --rounds=2 --out="$out"
    part prefix 20 "$python" tools/bench.py prefix --out="$out"
    part sampling 20 "$python" tools/bench.py sampling --out="$out"
else
    parts+=("nothing was run: $python finds no CUDA GPU, or no torch")
    status=1
fi

{
    "$python" tools/bench.py --show --out="$out"
    printf '%s\n' "${parts[@]}"
} 2>&1 | tee "$out/table.txt"
exit $status
