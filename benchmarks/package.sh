#!/bin/sh
# Build wheel and sdist, check their contents, install the wheel into a new environment, and run the command line there.
# Called by `make package` and `make package-quick`, which set PYTHON (of a new environment) and BIN (an environment with
# `build`). With BASE, a folder of installed packages, dependencies come from there; otherwise the core dependencies alone
# are installed, which takes some 6 GB. The environment is removed at the end.
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
    optin_deploy/report/macros.html.j2 \
    optin_deploy/report/page.html.j2 \
    optin_deploy/report/style.css \
    optin_deploy/report/template.html.j2 \
    optin_deploy/sweeps/template.html.j2; do
    grep -q "^$file " "$out/files" || fail "the wheel lacks $file"
done
if grep -qE '^(tests|benchmarks|docs)/' "$out/files"; then fail "the wheel holds what is not the package"; fi

venv=$out/venv
trap 'rm -rf "$venv"' EXIT
"$PYTHON" -m venv "$venv"
if [ -n "${BASE:-}" ]; then
    # A path in a .pth file is searched, but an editable install in it is not.
    echo "$BASE" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
    "$venv/bin/python" -m pip install --quiet --no-deps --ignore-installed "$out"/dist/*.whl
else
    "$venv/bin/python" -m pip install --quiet torch torchvision
    "$venv/bin/python" -m pip install --quiet "$out"/dist/*.whl
fi
cd "$out"  # no source is found here
"$venv/bin/python" -c 'import optin_deploy, sys; sys.exit(not optin_deploy.__file__.startswith(sys.prefix))' \
    || fail "another optin_deploy is imported"
"$venv/bin/optin-deploy" env >env
if [ -n "${BASE:-}" ]; then echo "package: the wheel works, $(ls dist | tr '\n' ' ')"; exit 0; fi
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
