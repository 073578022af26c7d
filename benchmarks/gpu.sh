#!/usr/bin/env bash
# Everything that wants a GPU, in under 9 minutes, what matters most first: tests marked gpu, step 0 of a real model, the
# benchmark against TRL, an 8B full fine-tune, ms-swift. $OUT gets report.md, errors.log and each benchmark's numbers.
#   benchmarks/gpu.sh                          on a machine with CUDA, torch and transformers
#   MODEL=/path/to/model benchmarks/gpu.sh     with real weights, about 1B, in place of random ones
#   DEVICE=cpu SIZES=tiny benchmarks/gpu.sh    the same lines where there is none
# TRL 1.16, ms-swift 4.6 and what else is missing may lie as wheels in benchmarks/wheels/. A part that takes too long is
# ended, one for which no time is left is left out; both are in the report.
set -u
OUT=$(realpath -m "${OUT:-gpu-results}") DEVICE=${DEVICE:-cuda} SIZES=${SIZES:-full} PYTHON=${PYTHON:-python3}
MODEL=${MODEL:+$(realpath "$MODEL")} LIMIT=${LIMIT:-530}
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
  small=tiny large=tiny answer=60 size=(--pairs 4 --batch-size 4) rounds=1 grid=(2)
else
  small=llama-1b large=llama-8b answer=60 size=(--pairs 32 --batch-size 16) rounds=3 grid=(4)
fi
# How the largest model is trained, a run each: flags of `dpo train` between semicolons.
MODES=${MODES-"--memory split --gradient-checkpointing"}

part() {  # name, seconds, command…
  local name=$1 seconds=$2 left=$((LIMIT - SECONDS)) began=$SECONDS
  shift 2
  [ "$seconds" -le "$left" ] || seconds=$left
  echo "== $name" | tee -a "$OUT/errors.log"
  if [ "$seconds" -lt 5 ]; then
    echo "== $name: left out, no time is left"
    return
  fi
  timeout -k 5 "$seconds" "$@" 2>>"$OUT/errors.log"
  echo "== $name: exit code $? after $((SECONDS - began)) s of at most $seconds"
}

bench() {  # name, seconds, options…
  local name=$1 seconds=$2
  shift 2
  part "$name" "$seconds" "$PYTHON" -m benchmarks.trl.bench --device "$DEVICE" --limit "$answer" --json "$OUT/$name.json" "$@"
}

all() {
  part tests 75 "$PYTHON" -m pytest -m gpu --continue-on-collection-errors -p no:cacheprovider -W ignore::pytest.PytestConfigWarning
  local model=$MODEL
  if [ -z "$model" ]; then
    model=$temporary/small
    part weights 30 "$PYTHON" -m benchmarks.trl.shapes "$small" "$model"
  fi
  part step-0 40 "$PYTHON" -m benchmarks.gpu.step_0 "$model"
  bench hh 75 --model "$model" --case hh --phases precompute train "${size[@]}" --rounds "$rounds"
  part large-weights 45 "$PYTHON" -m benchmarks.trl.shapes "$large" "$temporary/large"
  local number=0
  while IFS= read -r mode; do
    [ -n "$mode" ] || continue
    number=$((number + 1))
    bench "large-$number" 180 --dtype bfloat16 --model "$temporary/large" --case hh --phases command --sides ours \
      "${size[@]}" --rounds 2 --limit 170 --ours-options="$mode"
  done < <(tr ';' '\n' <<<"$MODES")
  rm -rf "$temporary/large"
  bench ultrafeedback 70 --model "$model" --case ultrafeedback --phases train "${size[@]}" --rounds "$rounds"
  part swift 70 "$PYTHON" -m benchmarks.gpu.swift --device "$DEVICE" --limit 60 --model "$model" --case hh "${size[@]}" --rounds 4
  bench agent 60 --model "$model" --case agent --phases train "${size[@]}" --rounds 1
  part flash 20 "$PYTHON" -m benchmarks.gpu.flash
  bench grid 60 --model "$model" --case ultrafeedback --phases train "${size[@]}" --rounds 1 --grid "${grid[@]}"
  echo "== results are in $OUT, after $SECONDS s"
}

: >"$OUT/errors.log"
all | tee "$OUT/report.md"
