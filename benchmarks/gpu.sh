#!/usr/bin/env bash
# Everything that wants a GPU, in under 9 minutes: tests marked gpu, then the benchmark. $OUT gets report.md, errors.log
# and the numbers of each benchmark as JSON.
#   benchmarks/gpu.sh                          on a machine with CUDA, torch and transformers
#   DEVICE=cpu SIZES=tiny benchmarks/gpu.sh    the same lines where there is none
# TRL and what else is missing may lie as wheels in benchmarks/wheels/. A part that takes too long is ended, and told.
set -u
OUT=$(realpath -m "${OUT:-gpu-results}") DEVICE=${DEVICE:-cuda} SIZES=${SIZES:-full} PYTHON=${PYTHON:-python3}
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$OUT"
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TMPDIR=$temporary

if compgen -G 'benchmarks/wheels/*.whl' >/dev/null; then
  "$PYTHON" -m pip install -q --no-index --no-deps --target "$temporary/site" benchmarks/wheels/*.whl || exit 1
  export PYTHONPATH="$temporary/site${PYTHONPATH:+:$PYTHONPATH}"
fi

if [ "$SIZES" = tiny ]; then
  small=tiny large=tiny limit=20 size=(--pairs 4 --batch-size 4) rounds=1 grid=(2)
else
  small=llama-1b large=llama-8b limit=60 size=(--pairs 32 --batch-size 16) rounds=3 grid=(4)
fi
# How the largest model is trained, a run each: flags of `dpo train` between semicolons.
MODES=${MODES-"--memory split --gradient-checkpointing"}

part() {  # name, seconds, command…
  local name=$1 seconds=$2 began=$SECONDS
  shift 2
  echo "== $name" | tee -a "$OUT/errors.log"
  timeout -k 10 "$seconds" "$@" 2>>"$OUT/errors.log"
  echo "== $name: exit code $? after $((SECONDS - began)) s of at most $seconds"
}

bench() {  # name, seconds, options…
  local name=$1 seconds=$2
  shift 2
  part "$name" "$seconds" "$PYTHON" -m benchmarks.trl.bench --device "$DEVICE" --limit "$limit" --json "$OUT/$name.json" "$@"
}

all() {
  part tests 75 "$PYTHON" -m pytest -m gpu --continue-on-collection-errors -p no:cacheprovider -W ignore::pytest.PytestConfigWarning
  part model 30 "$PYTHON" -m benchmarks.trl.shapes "$small" "$temporary/small"
  for case in hh ultrafeedback; do
    bench "$case" 95 --model "$temporary/small" --case "$case" --phases precompute train eval "${size[@]}" --rounds "$rounds"
  done
  bench grid 80 --model "$temporary/small" --case ultrafeedback --phases train "${size[@]}" --rounds 1 --grid "${grid[@]}"
  part large 45 "$PYTHON" -m benchmarks.trl.shapes "$large" "$temporary/large"
  local number=0
  while IFS= read -r mode; do
    [ -n "$mode" ] || continue
    number=$((number + 1))
    bench "memory-$number" 115 --dtype bfloat16 --model "$temporary/large" --case hh --phases command --sides ours \
      "${size[@]}" --rounds 2 --limit 105 --ours-options="$mode"
  done < <(tr ';' '\n' <<<"$MODES")
  echo "== results are in $OUT, after $SECONDS s"
}

: >"$OUT/errors.log"
all | tee "$OUT/report.md"
