#!/bin/sh
# Builds wheel and sdist, looks into them, installs the wheel with its core dependencies alone into a new environment,
# and runs the command line there. Called by `make package`, which sets PYTHON (a new environment's) and BIN (one with
# `build`). The environment takes some 6 GB and is removed again.
set -eu
fail() { echo "package: $*" >&2; exit 1; }
out=build/package
rm -rf "$out"
mkdir -p "$out"
out=$(cd "$out" && pwd)
"$BIN/python" -m build --outdir "$out/dist" . >"$out/build.log" 2>&1 || fail "see $out/build.log"
"$BIN/python" -m twine check --strict "$out"/dist/* || fail "twine"

"$BIN/python" -m zipfile -l "$out"/dist/*.whl >"$out/files"
for file in optin_deploy/py.typed exporters/py.typed profilers/py.typed optin_deploy/data/builtin_sentences.txt \
    optin_deploy/report/template.html.j2 optin_deploy/report/style.css optin_deploy/sweeps/template.html.j2; do
    grep -q "^$file " "$out/files" || fail "the wheel lacks $file"
done
if grep -qE '^(tests|benchmarks|docs)/' "$out/files"; then fail "the wheel holds what is not the package"; fi

venv=$out/venv
trap 'rm -rf "$venv"' EXIT
"$PYTHON" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet torch torchvision
"$venv/bin/python" -m pip install --quiet "$out"/dist/*.whl
cd "$out"  # where no source is found instead
"$venv/bin/optin-deploy" env >env
grep -q '^onnxruntime: not installed' env || fail "env does not say that onnxruntime is missing"

"$venv/bin/optin-deploy" --help >/dev/null  # byte code is there from now on
"$venv/bin/python" - "$venv/bin/optin-deploy" <<'PY' || fail "--help takes 1.5 s or more"
import subprocess, sys, time
seconds = []
for _ in range(3):
    start = time.perf_counter()
    subprocess.run([sys.argv[1], "--help"], stdout=subprocess.DEVNULL, check=True)
    seconds.append(time.perf_counter() - start)
print(f"optin-deploy --help: {min(seconds):.2f} s")
sys.exit(min(seconds) >= 1.5)
PY

code=0
"$venv/bin/optin-deploy" prune-export --model test_vit --weights random --flops 0.5 --output run 2>refusal || code=$?
[ "$code" = 2 ] && [ "$(wc -l <refusal)" = 1 ] && grep -q 'optin-deploy\[cpu\]' refusal || fail "no refusal: $(cat refusal)"
cat refusal
[ ! -e run ] || fail "the refused run left files"
echo "package: all is well, $(ls dist | tr '\n' ' ')"
