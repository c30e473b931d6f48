#!/usr/bin/env bash
# All that is to be measured on a GPU, in one call that ends in time: bash benchmarks/gpu.sh
#
#   OUT         folder for JSON, PNG, text and a log per step (default benchmarks/results)
#   DEADLINE_S  seconds for everything (default 520)
#   SWEEP_S     seconds of the sweep (default 200)
#   STEPS       which steps, in order (default: all of these): install (what pip can do offline),
#               limits, one and many (batch 1, larger batches; the first dtype against other
#               programs), dtypes (the others, alone), sweep (the first dtype), tests
#   SHAPE, DTYPE, AGAINST, CHOICES    as the flags --shape, --dtype, --against and --only say
#   SMALL=1     tiny sizes of the demo model, to try the script itself on any machine
#
# A step that fails does not end the others. The summary at the end names each one's status.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

python=$(command -v python3 || command -v python) || exit 1
out=${OUT:-benchmarks/results}
deadline=${DEADLINE_S:-520}
all="install limits one many dtypes sweep tests"
read -ra steps <<<"${STEPS:-$all}"
choices=${CHOICES:-steps,hlo,attention,fused,projection,prefill,sampling,flags}
if [[ -n ${SMALL:-} ]]; then
  shape=${SHAPE:-demo} dtype=${DTYPE:-float32} against=${AGAINST-hf}
  one=(--context=32,64 --prompt_len=16 --new_tokens=8 --rounds=1)
  many=(--batch=2,3 --context=32 --new_tokens=8 --rounds=1)
  sweep=(--size=small)
else
  shape=${SHAPE:-7b} dtype=${DTYPE:-bfloat16,float16} against=${AGAINST-hf,hf-compile}
  one=(--context=128,1024,4000 --prompt_len=128,2048 --rounds=3)
  many=(--batch=8,32 --context=128,1024,4000 --rounds=3)
  sweep=(--size=full)
fi
first=${dtype%%,*}
rest=${dtype#"$first"}
rest=${rest#,}
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-false}
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.95}
summary=()

say() { printf '%s\n' "$*" >&2; }

left() { echo $((deadline - SECONDS)); }

# step NAME LIMIT COMMAND...: run it for at most LIMIT seconds, or what is left; log to NAME.log.
# An interrupt comes first, so that a program can end its own processes.
step() {
  local name=$1 limit=$2 status began=$SECONDS
  shift 2
  if (($(left) < limit)); then limit=$(left); fi
  if ((limit < 5)); then
    summary+=("$name: left out, the deadline is near")
    return 0
  fi
  say "== $name, at most $limit s: $*"
  timeout --signal=INT --kill-after=20 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  case $status in
    0) status=done ;;
    124 | 137) status="stopped at its limit of $limit s" ;;
    *) status="failed with status $status" ;;
  esac
  summary+=("$name: $status, $((SECONDS - began)) s")
  say "   $status, $((SECONDS - began)) s"
}

# missing LIST: prints what of pyproject.toml's dependencies, or of an extra, is not there.
missing() {
  "$python" - "$@" <<'PYTHON'
import importlib.metadata
import re
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
lists = {"dependencies": project["dependencies"], **project["optional-dependencies"]}
for need in lists[sys.argv[1]]:
    name = re.match(r"[\w.-]+", need)[0]
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        print(name)
PYTHON
}

install() {
  local needed wanted
  needed=$(missing dependencies | xargs)
  wanted=$(missing test | xargs)
  if [[ -n $wanted ]]; then summary+=("not there, some tests will fail: $wanted"); fi
  if [[ -n $needed ]]; then
    summary+=("install: left out; not there: $needed")
    say "== not there: $needed; what imports them will fail"
  elif "$python" -c 'import importlib.metadata as m; m.version("llama_jax")' 2>/dev/null; then
    summary+=("install: it is installed")
  else
    step install 90 "$python" -m pip install --no-deps --no-build-isolation -e .
  fi
}

limits() {
  step limits 60 "$python" -m benchmarks.limits
  # The last line of its output: JAX may have warned before.
  if tail -n 1 "$out/limits.log" 2>/dev/null | grep '^{' >"$out/limits.json"; then
    known=(--limits="$out/limits.json")
    say "   $(cat "$out/limits.json")"
  fi
}

# end_to_end NAME LIMIT FLAGS...: the shape, in turns with other programs if the flags name some.
end_to_end() {
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$python" -m benchmarks --shape="$shape" --name="e2e-$name" \
    --output="$out" --nowarm_start "${known[@]}" "$@"
}

known=()
for name in "${steps[@]}"; do
  case $name in
    install) install ;;
    limits) limits ;;
    one) end_to_end one 200 --dtype="$first" --against="$against" --batch=1 "${one[@]}" ;;
    many)
      end_to_end many 150 --dtype="$first" --against="$against" --prompt_len= "${many[@]}"
      ;;
    dtypes)
      if [[ -n $rest ]]; then
        end_to_end dtypes 100 --dtype="$rest" --batch=1 "${one[@]}"
      else
        summary+=("dtypes: left out, one dtype only")
      fi
      ;;
    sweep)
      budget=${SWEEP_S:-200}
      if (($(left) - 40 < budget)); then budget=$(($(left) - 40)); fi
      # What was begun within the budget may outlast it.
      step sweep $((budget + 40)) "$python" -m benchmarks.sweep --shape="$shape" \
        --dtype="$first" --only="$choices" --budget_s="$budget" --name="$shape" \
        --output="$out" "${sweep[@]}" "${known[@]}"
      ;;
    tests)
      step tests "$(left)" "$python" -m pytest -n 1 -q --ignore=tests/test_benchmarks.py
      ;;
    *) summary+=("$name: no such step; expected $all") ;;
  esac
done

{
  echo "$shape, $SECONDS s of $deadline"
  printf '%s\n' "${summary[@]}"
} | tee "$out/summary.txt"
