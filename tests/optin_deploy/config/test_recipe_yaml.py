"""Recipe files as anybody may have written them: what is wrong is one line that says where."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from optin_deploy.config.recipe import make_recipe
from optin_deploy.config.recipe_yaml import read_options
from optin_deploy.config.sweep_plan import read_sweep
from optin_deploy.errors import UserError

GOOD = "model: deit_tiny\nflops: 0.5\n"


def written(folder: Path, text: str) -> Path:
    file = folder / "r.yaml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    return file


def refusal(file: Path) -> str:
    with pytest.raises(UserError) as caught:
        make_recipe({}, file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values_and_their_places(tmp_path: Path) -> None:
    file = written(tmp_path, "# mine\nmodel: deit_tiny\n\nbatch_sizes: [1, 8]\n")
    found = read_options(file)
    assert found.values == {"model": "deit_tiny", "batch_sizes": [1, 8]}
    assert found.lines == {"model": f"{file}, line 2", "batch_sizes": f"{file}, line 4"}


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        (GOOD + "flop: 0.5\n", 3, "unknown option 'flop': did you mean 'flops'?"),
        ("model: deit_tiny\n\n# half\nflops: 2\n", 4, "--flops 2"),
        (GOOD + "batch_sizes:\n  - 0\n", 3, "--batch-sizes"),
        (GOOD + "flops: 0.6\n", 3, "flops is given twice, first in "),
        ("a: &a [x]\nmodel: *a\n", 2, "an alias (*a)"),
    ],
)
def test_the_line_is_named(tmp_path: Path, text: str, line: int, told: str) -> None:
    file = written(tmp_path, text)
    message = refusal(file)
    assert message.startswith(f"{file}, line {line}: ")
    assert told in message


def test_an_option_of_the_command_line_stands_in_no_file(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD)
    with pytest.raises(UserError, match=r"^--flops 3"):
        make_recipe({"flops": 3.0}, file)


def test_sweeps_name_the_line_as_well(tmp_path: Path) -> None:
    file = written(tmp_path, "model: deit_tiny\nflops: [0.5, 0.6]\nseeds: 1\n")
    with pytest.raises(UserError, match=r"r\.yaml, line 3.*'seeds'.*'seed'"):
        read_sweep({}, file)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5_000,
        "a: {" * 5_000,
        "flops: !!python/object/apply:os.system ['true']",
        "? [a]\n: 1",
        "flops: 2001-99-99",
        "flops: " + "9" * 10_000,
        "model: \x00",
        "model: 'unfinished",
        "\tmodel: a",
        "- a: 1",
        "--- a\n--- b",
        "x" * 2_000_000,
    ],
)
def test_hostile_files(tmp_path: Path, text: str) -> None:
    assert refusal(written(tmp_path, text))


def test_a_file_without_end_is_not_read() -> None:
    if Path("/dev/zero").exists():
        assert "not a file" in refusal(Path("/dev/zero"))


@given(st.text(alphabet="ab:-[]{}&*!?|>#'\"%@`, \n\t0.5~<", max_size=60))
@example("<<: {a: 1}\n")
@example("~: 1")
def test_any_text_is_a_recipe_or_one_line(tmp_path: Path, text: str) -> None:
    try:
        make_recipe({}, written(tmp_path, text))
    except UserError as error:
        assert "\n" not in str(error)
