"""Files given as --recipe."""

from collections.abc import Callable, Sequence
from pathlib import Path

from bad_input.common import MARK, Material, Row, pipe

FILE = Path("r.yaml")
COMMAND = ["prune-export", "--recipe", str(FILE)]
GOOD = "model: test_vit\nflops: 0.5\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: [*b, *b, *b, *b, *b, *b]\n"


def _written(content: str | bytes) -> Callable[[Material], Sequence[str]]:
    def make(_: Material) -> Sequence[str]:
        FILE.write_bytes(content.encode() if isinstance(content, str) else content)
        return COMMAND

    return make


def _pipe(_: Material) -> Sequence[str]:
    pipe(FILE)
    return COMMAND


def _option(*more: str) -> Callable[[Material], Sequence[str]]:
    return lambda _: ["prune-export", "--model", "test_vit", "--flops", "0.5", *more]


def _directory(_: Material) -> Sequence[str]:
    FILE.mkdir()
    return COMMAND


CODE = f"model: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{MARK}]]\n"
UNREADABLE = r"recipe r\.yaml cannot be read: "
ROWS = (
    Row("recipe-python-object", _written(CODE), UNREADABLE + ".*python/object/apply", runs_code=True),
    Row("recipe-python-name", _written(GOOD + "seed: !!python/name:os.system\n"), UNREADABLE + ".*python/name"),
    Row("recipe-unknown-tag", _written("model: !secret key\n"), UNREADABLE + ".*!secret"),
    Row("recipe-twice", _written(GOOD + "flops: 0.6\n"), r"r\.yaml, line 3: flops .*twice"),
    Row("recipe-alias-bomb", _written(BOMB), r"r\.yaml, line 2: an alias \(\*a\)"),
    Row("recipe-merge-key", _written("a: &a {flops: 0.5}\n<<: *a\n"), r"r\.yaml, line 2: an alias"),
    Row("recipe-near-miss", _written(GOOD + "calibration_sample: 8\n"), "'calibration_sample'.*'calibration_samples'"),
    Row("recipe-wrong-type", _written("model: test_vit\nflops: [0.5]\n"), r"r\.yaml, line 2: --flops \[0\.5\]"),
    Row("recipe-mapping-for-a-number", _written(GOOD + "seed: {a: 1}\n"), r"r\.yaml, line 3: --seed"),
    Row("recipe-nan", _written("model: test_vit\nflops: .nan\n"), r"r\.yaml, line 2: --flops nan"),
    Row("recipe-inf", _written(GOOD + "profile_seconds: .inf\n"), r"r\.yaml, line 3: --profile-seconds inf"),
    Row("recipe-huge-number", _written(GOOD + f"seed: {'9' * 10_000}\n"), r"r\.yaml"),
    Row("recipe-not-utf8", _written(b"model: \xff\n"), UNREADABLE),
    Row("recipe-utf16", _written(GOOD.encode("utf-16")), UNREADABLE),
    Row("recipe-nul", _written("model: a\0b\nflops: 0.5\n"), UNREADABLE),
    Row("recipe-list", _written("- model\n"), r"recipe r\.yaml .*mapping"),
    Row("recipe-empty", _written(""), r"recipe r\.yaml .*mapping"),
    Row("recipe-nested", _written("a: " + "[" * 50_000), UNREADABLE),
    Row("recipe-key-no-text", _written(GOOD + "[1, 2]: 3\n"), r"r\.yaml"),
    Row("recipe-large", _written(GOOD + "#" * (1 << 21)), UNREADABLE + ".*1 MiB"),
    Row("recipe-directory", _directory, UNREADABLE),
    Row("recipe-pipe", _pipe, UNREADABLE + "it is not a file"),
    Row(
        "recipe-hexadecimal-of-5000-digits", _written(GOOD + f"seed: 0x{'f' * 5000}\n"), "--seed of thousands of digits"
    ),
    Row("recipe-seed-in-floating-point", _written(GOOD + "seed: 1.0e+30\n"), r"r\.yaml, line 3: --seed 1e\+30: "),
    Row("batch-size-of-a-billion", _option("--batch-sizes", "1,1000000000"), "--batch-sizes 1000000000: .* 65536"),
    Row("batch-size-of-400-digits", _option("--batch-sizes", str(10**400)), "--batch-sizes 10{79}…: .* 65536"),
    Row("batch-sizes-none", _option("--batch-sizes", ""), "--batch-sizes: .*one value"),
    Row(
        "batch-size-of-a-repository",
        lambda _: ["export", "--model", "test_vit", "--layout", "triton", "--batch-sizes", str(10**30)],
        "--batch-sizes 10{30}: .* 65536",
    ),
    Row("seed-of-65-bits", _option("--seed", str(1 << 64)), "--seed 18446744073709551616: .* less than"),
    Row("task-weight-huge", _option("--task-weight", "1e308"), r"--task-weight 1e\+308: .* 1000000"),
    Row("threads-huge", _option("--threads", str(10**30)), "--threads 10{30}: "),
    Row("samples-huge", _option("--calibration-samples", str(10**12)), "--calibration-samples 10{12}: .* 10000000"),
    Row("image-size-huge", _option("--image-size", str(10**30)), "--image-size 10{30}: .* 16384"),
    Row("profile-seconds-huge", _option("--profile-seconds", "1e300"), r"--profile-seconds 1e\+300: "),
    Row("option-misspelt", _option("--flop", "0.5"), r"No such option.*--flop .*--flops.*; see .*--help"),
    Row("option-no-number", _option("--flops", "half"), r"'--flops'.*number.*; see .*--help"),
    Row("argument-too-many", _option("stray"), r"unexpected extra argument.*stray"),
    Row("command-misspelt", lambda _: ["prune-exprt"], "'prune-exprt'.*'prune-export'"),
    Row("recipe-endless", lambda _: ["prune-export", "--recipe", "/dev/zero"], "recipe /dev/zero cannot be read"),
)
