"""Files given as --recipe."""

from collections.abc import Callable, Sequence
from pathlib import Path

from bad_input.common import MARK, Material, Row

FILE = Path("r.yaml")
COMMAND = ["prune-export", "--recipe", str(FILE)]
GOOD = "model: test_vit\nflops: 0.5\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: [*b, *b, *b, *b, *b, *b]\n"


def _written(content: str | bytes) -> Callable[[Material], Sequence[str]]:
    def make(_: Material) -> Sequence[str]:
        FILE.write_bytes(content.encode() if isinstance(content, str) else content)
        return COMMAND

    return make


def _directory(_: Material) -> Sequence[str]:
    FILE.mkdir()
    return COMMAND


CODE = f"model: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{MARK}]]\n"
UNREADABLE = r"recipe r\.yaml cannot be read: "
ROWS = (
    Row("recipe-python-object", _written(CODE), UNREADABLE + ".*python/object/apply", runs_code=True),
    Row("recipe-python-name", _written(GOOD + "seed: !!python/name:os.system\n"), UNREADABLE + ".*python/name"),
    Row("recipe-unknown-tag", _written("model: !secret key\n"), UNREADABLE + ".*!secret"),
    Row(
        "recipe-twice", _written(GOOD + "flops: 0.6\n"), r"r\.yaml, line 3: flops is given twice, first in r\.yaml, li"
    ),
    Row("recipe-alias-bomb", _written(BOMB), r"r\.yaml, line 2: an alias \(\*a\)"),
    Row("recipe-merge-key", _written("a: &a {flops: 0.5}\n<<: *a\n"), r"r\.yaml, line 2: an alias"),
    Row("recipe-near-miss", _written(GOOD + "calibration_sample: 8\n"), "did you mean 'calibration_samples'"),
    Row("recipe-wrong-type", _written("model: test_vit\nflops: [0.5]\n"), r"r\.yaml, line 2: --flops \[0\.5\]"),
    Row("recipe-mapping-for-a-number", _written(GOOD + "seed: {a: 1}\n"), r"r\.yaml, line 3: --seed"),
    Row("recipe-nan", _written("model: test_vit\nflops: .nan\n"), r"r\.yaml, line 2: --flops nan"),
    Row("recipe-inf", _written(GOOD + "profile_seconds: .inf\n"), r"r\.yaml, line 3: --profile-seconds inf"),
    Row("recipe-huge-number", _written(GOOD + f"seed: {'9' * 10_000}\n"), r"r\.yaml"),
    Row("recipe-not-utf8", _written(b"model: \xff\n"), UNREADABLE),
    Row("recipe-utf16", _written(GOOD.encode("utf-16")), UNREADABLE),
    Row("recipe-nul", _written("model: a\0b\nflops: 0.5\n"), UNREADABLE),
    Row("recipe-list", _written("- model\n"), r"recipe r\.yaml must be a mapping"),
    Row("recipe-empty", _written(""), r"recipe r\.yaml must be a mapping"),
    Row("recipe-nested", _written("a: " + "[" * 50_000), UNREADABLE),
    Row("recipe-key-no-text", _written(GOOD + "[1, 2]: 3\n"), r"r\.yaml"),
    Row("recipe-large", _written(GOOD + "#" * (1 << 21)), UNREADABLE + "it is larger than 1 MiB"),
    Row("recipe-directory", _directory, UNREADABLE),
    Row("recipe-endless", lambda _: ["prune-export", "--recipe", "/dev/zero"], "recipe /dev/zero cannot be read"),
)
