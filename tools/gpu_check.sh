#!/usr/bin/env bash
# Everything that needs a GPU, in one call and under eight minutes: the tests marked `gpu`, then every benchmark.
#
#     OUT=folder PYTHON=python3 tools/gpu_check.sh
#
# In:  a machine with a CUDA GPU and what is installed on it (nothing is downloaded). Out: in $OUT, by default
# tools/results/gpu, a log and a JSON file of each part; on the screen one table, last. Each part has a time limit
# of its own, so that one that fails or hangs costs the others nothing; what did not come to its end stands in the
# table with the reason. Status 1 where there is such a part.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${OUT:-tools/results/gpu}"
python="${PYTHON:-$(if [ -x .venv/bin/python ]; then echo .venv/bin/python; else echo python3; fi)}"
mkdir -p "$out"
rm -f "$out"/*.json "$out"/*.log
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
status=0

# part NAME SECONDS COMMAND...: run it with its output in a log, and add a line to `parts`.
parts=()
part() {
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    local code=$? said
    case $code in
        0) said="done" ;;
        124 | 137) said="STOPPED at its limit of $limit s" ;;
        *) said="FAILED with status $code: $(grep -v '^ *$' "$out/$name.log" | tail -n 1 | cut -c1-100)" ;;
    esac
    [ $code -eq 0 ] || status=1
    if [ "$name" = tests ]; then
        said="$said: $(grep -E '(passed|failed|error|no tests)' "$out/$name.log" | tail -n 1 | tr -d '=' | cut -c1-100)"
    fi
    parts+=("$(printf '%-9s %4d s  %s' "$name" $((SECONDS - began)) "$said")")
    echo "${parts[-1]}"
}

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    if "$python" -c 'import pytest' 2>/dev/null; then
        part tests 100 "$python" -m pytest -m gpu -q -p no:cacheprovider \
            --continue-on-collection-errors tests
    else
        parts+=("tests     not run: pytest is not installed")
        status=1
    fi
    part logprob 95 "$python" tools/bench.py logprob --rounds=3 --out="$out"
    part decode 130 "$python" tools/bench.py decode --rounds=1 --out="$out"
    part step 95 "$python" tools/bench.py step --rounds=2 --out="$out"
    part prefix 25 "$python" tools/bench.py prefix --out="$out"
    part sampling 25 "$python" tools/bench.py sampling --out="$out"
else
    parts+=("nothing was run: $python finds no CUDA GPU, or no torch")
    status=1
fi

{
    "$python" tools/bench.py --show --out="$out"
    printf '%s\n' "${parts[@]}"
} 2>&1 | tee "$out/table.log"
exit $status
