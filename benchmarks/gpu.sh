#!/usr/bin/env bash
# All checks and benchmarks of one GPU, in under ten minutes on a Hopper: the contract suite, the sanitizer, the kernels
# beside torch and flash-attn, the paged kernel beside a copy, a simulated ring, and the goals. If a stage fails, the
# others still run.
#
#   benchmarks/gpu.sh OUT        PYTHON=... is the interpreter, python3 by default
#
# Writes JSON lines, figures and each stage's log to OUT; exits with 1 if a stage failed or a goal was missed.
set -uo pipefail

out=${1:?usage: benchmarks/gpu.sh OUT}
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2
rm -f "$out/stages.jsonl"

# stage NAME SECONDS COMMAND...: runs a command with a time limit, and shows and logs its output.
stage() {
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    printf '\n== %s (at most %s s)\n' "$name" "$limit"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log" | tail -n 100
    status=${PIPESTATUS[0]}
    printf '{"stage": "%s", "status": %d, "seconds": %d, "limit_s": %d}\n' \
        "$name" "$status" "$((SECONDS - start))" "$limit" >>"$out/stages.jsonl"
}

# skip NAME REASON: records that a stage cannot run here, which is no failure.
skip() {
    printf '\n== %s: skipped, %s\n' "$1" "$2"
    printf '{"stage": "%s", "skipped": "%s"}\n' "$1" "$2" >>"$out/stages.jsonl"
}

# sanitize TOOL SECONDS: runs a small part of the contract suite with every backend and without the caching allocator.
sanitize() {
    stage "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
        "$python" -m pytest tests/kernels/test_contract.py -q -x -p no:cacheprovider \
        -k 'test_case and cuda and bfloat16 and two and not softcap'
}

versions='
import platform, torch
print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)
print("cudnn", torch.backends.cudnn.version(), "device", torch.cuda.get_device_name())
for name in ("triton", "flash_attn", "flash_attn_interface", "flash_attn.cute"):
    try:
        module = __import__(name, fromlist=["_"])
        print(name, getattr(module, "__version__", "is installed"))
    except (ImportError, OSError) as error:
        print(name, "is not installed:", error)
'
stage versions 15 "$python" -c "$versions"
stage info 30 "$python" -c 'from ringattn.cli import main; main(["info"])'
stage contract 130 "$python" -m pytest tests/kernels -q -p no:cacheprovider -k cuda --ignore tests/kernels/test_paged.py
stage paged_contract 55 "$python" -m pytest tests/kernels/test_paged.py -q -p no:cacheprovider -k cuda
stage paged 40 "$python" -m benchmarks paged --out "$out/paged"
stage dense 90 "$python" -m benchmarks kernels --device cuda --cases causal --lengths 16384 65536 --dtypes bfloat16 \
    --head-dims 128 --kv-heads 16 --rounds 7 --out "$out/dense"
stage packed 60 "$python" -m benchmarks kernels --device cuda --cases causal window packed --lengths 65536 \
    --dtypes bfloat16 --head-dims 128 --kv-heads 16 --rounds 3 --warmup 1 --out "$out/packed"
stage simulated_ring 50 "$python" -m benchmarks simulated-ring --device cuda --rounds 3 --out "$out/simulated_ring"
stage others 50 "$python" -m benchmarks kernels --device cuda --kv-heads 4 --rounds 3 --warmup 1 \
    --out "$out/others"
if command -v compute-sanitizer >/dev/null; then
    sanitize memcheck 30
    sanitize racecheck 30
else
    skip memcheck "compute-sanitizer is not installed"
    skip racecheck "compute-sanitizer is not installed"
fi

shopt -s nullglob
results=("$out"/{dense,packed,others}/kernels.jsonl)
if ((${#results[@]})); then
    stage goals 20 "$python" -m benchmarks goals --out "$out/goals" "${results[@]}"
else
    skip goals "nothing was measured"
fi

summary='
import json, sys
failed = False
for stage in map(json.loads, open(sys.argv[1])):
    if "skipped" in stage:
        result = "skipped, " + stage["skipped"]
    elif stage["status"] in (124, 137):
        result = "FAILED: took longer than {limit_s} s".format(**stage)
    else:
        result = ("FAILED: exit status {status}, " if stage["status"] else "passed, ") + "{seconds} s"
        result = result.format(**stage)
    failed |= "FAILED" in result
    print("{:<16} {}".format(stage["stage"], result))
    if stage["stage"] == "goals" and "status" in stage:
        print("{:<16} {}".format("", open(sys.argv[2]).read().strip().splitlines()[-1]))
sys.exit(failed)
'
printf '\n== summary\n'
"$python" -c "$summary" "$out/stages.jsonl" "$out/goals.log" | tee "$out/summary.txt"
exit "${PIPESTATUS[0]}"
