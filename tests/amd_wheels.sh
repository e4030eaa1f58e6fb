#!/usr/bin/env bash
# Runs an artifact on AMD's builds of ONNX Runtime, each in a venv of its own, without a GPU: every
# graph must load and generate on the CPU when asked to, the GPU provider must be refused, and both
# must generate the same clip.
# Usage: tests/amd_wheels.sh ARTIFACT [PYTHON]
set -euo pipefail
artifact=$(realpath "$1")
python=${2:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$(dirname "$0")/.."
failed=0
for wheel in rocm==1.22.2.post3 migraphx==1.27.1; do
    provider=${wheel%%=*}
    "$python" -m venv "$work/$provider"
    bin=$work/$provider/bin
    "$bin/pip" install -q --disable-pip-version-check "onnxruntime-$wheel" \
        "numpy>=2.0" "tokenizers>=0.21" "av>=14" "safetensors>=0.5" "click>=8.1" "rich>=13.7" \
        flatbuffers protobuf packaging sympy
    export PYTHONPATH=$PWD
    if "$bin/python" -m hbxt_compress generate "$artifact" --provider cpu --steps 4 \
        --prompt "a red circle moving right on a black background" --out "$work/$provider.mp4"; then
        echo "onnxruntime-$wheel: generates on the CPU"
    else
        failed=1
    fi
    if "$bin/python" -m hbxt_compress generate "$artifact" --provider "$provider" --steps 1 \
        --prompt "a red circle" --out "$work/gpu.mp4" 2>"$work/refusal"; then
        echo "onnxruntime-$wheel: ran on $provider (a GPU is here, or the fallback was silent)"
        failed=1
    else
        echo "onnxruntime-$wheel: refuses $provider: $(head -n 1 "$work/refusal")"
    fi
done
[ $failed = 0 ] && "$bin/python" - "$work"/rocm.mp4 "$work"/migraphx.mp4 <<'PSNR' || failed=1
import sys
import numpy as np
from hbxt_compress.clips import read_video

one, other = (read_video(path).astype(float) for path in sys.argv[1:])
psnr = 10 * np.log10(255**2 / max(1e-9, float(((one - other) ** 2).mean())))
print(f"both wheels: {psnr:.1f} dB between their clips")
sys.exit(0 if psnr >= 40 else "too far apart: at least 40 dB are expected")
PSNR
exit $failed
