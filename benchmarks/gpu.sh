#!/usr/bin/env bash
# All that is to be measured on a GPU: bash benchmarks/gpu.sh
#
#   OUT       folder for records, plots and logs (default benchmarks/results)
#   STEPS     which steps, in order. The default takes some nine minutes: selftest (the tokens
#             recorded on a CPU), bits (what else must be equal for equal bits), strict (what
#             determinism costs), one (batch 1: time against the least traffic, and against other
#             programs). The others: many (larger batches), values (each operation against
#             float64), invariance (its tests), ablate (what else the plan could say), flags
#             (XLA_FLAGS), tests (all of them). One after the other: XLA compiles with all cores
#   SMALL=1   tiny sizes of the demo model, to try the script itself on any machine
#
# A step that fails or takes longer than its limit does not end the others.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

out=${OUT:-benchmarks/results}
shape=7b dtype=bfloat16 against=hf,hf-compile
one=(--batch=1 --context=128,1024,4000 --prompt_len=128,2048)
many=(--batch=8,32 --context=128,1024,4000 --prompt_len=)
ablate=(--only=steps,prefill,attention,hlo)
strict=(--only=determinism --prompt_len=256)
bits=()
if [[ -n ${SMALL:-} ]]; then
  shape=demo dtype=float32 against=
  one=(--batch=1 --context=32 --prompt_len=16 --new_tokens=8 --rounds=1)
  many=(--batch=2 --context=32 --prompt_len= --new_tokens=8 --rounds=1)
  ablate=(--only=hlo --context=32 --prompt_len=16 --new_tokens=8 --rounds=1)
  strict=(--only=determinism --context=32 --prompt_len=16 --new_tokens=8 --rounds=1)
  bits=(--layers=1 --context=128 --requests=4)
fi
common=(--shape="$shape" --dtype="$dtype" --output="$out")
mkdir -p "$out"

# step NAME LIMIT COMMAND...: run it for at most LIMIT seconds; its output goes to NAME.log.
step() {
  local name=$1 limit=$2
  shift 2
  timeout --signal=INT --kill-after=20 "$limit" "$@" >"$out/$name.log" 2>&1
  echo "$name: status $?, $SECONDS s" | tee -a "$out/summary.txt"
}

for name in ${STEPS:-selftest bits strict one}; do
  case $name in
    selftest) step selftest 120 python run.py selftest ;;
    bits)
      step bits 200 python -m benchmarks.bits "${common[@]}" --name=bits "${bits[@]}"
      ;;
    strict)
      for batch in 1 8; do
        step "strict-$batch" 90 python -m benchmarks.ablate "${common[@]}" "${strict[@]}" \
          --batch="$batch" --name="strict-$batch"
      done
      ;;
    values) step values 90 python -m pytest -n 1 -q tests/nn ;;
    invariance)
      step invariance 140 python -m pytest -n 1 -m "slow or not slow" tests/decode/test_invariance.py
      ;;
    one | many)
      declare -n sizes=$name
      step "$name" 150 python -m benchmarks "${common[@]}" --name="e2e-$name" \
        --against="$against" --nowarm_start "${sizes[@]}"
      ;;
    ablate)
      step ablate 240 python -m benchmarks.ablate "${common[@]}" --name=ablate "${ablate[@]}"
      ;;
    flags)
      for flag in enable_triton_gemm=false enable_command_buffer= enable_dynamic_slice_fusion=true; do
        XLA_FLAGS="--xla_gpu_$flag" step "flags-$flag" 120 python -m benchmarks.ablate \
          "${common[@]}" --only=plan --name="flags-${flag%%=*}"
      done
      ;;
    tests) step tests 300 python -m pytest -n 1 -q --ignore=tests/benchmarks ;;
    *) echo "$name: no such step" ;;
  esac
done
