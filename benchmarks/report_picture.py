"""Draw the picture of a report for the README: the top of its page in headless Chromium, as a small PNG.

    python benchmarks/report_picture.py runs/demo/minilm docs/images/report.png

Needs chromium or google-chrome on the path.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_WIDTH, _COLOURS = 1_000, 64


def draw(page: Path, picture: Path, height: int) -> None:
    """Write the top ``height`` pixels of ``page`` to ``picture``, in few colours."""
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        sys.exit(f"none of {', '.join(_BROWSERS)} is on the path: install one")
    with TemporaryDirectory(prefix="optin-picture-") as folder:
        shot = Path(folder, "shot.png")
        options = ["--headless=new", "--no-sandbox", "--hide-scrollbars", "--disable-gpu", f"--screenshot={shot}"]
        subprocess.run(
            [browser, *options, f"--window-size={_WIDTH},{height}", page.resolve().as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.open(shot).convert("RGB").quantize(_COLOURS).save(picture, optimize=True)


def main() -> None:
    """Draw the report of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="directory of a run")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--height", type=int, default=900, help="pixels of the page")
    given = parser.parse_args()
    draw(given.run / "report.html", given.picture, given.height)


if __name__ == "__main__":
    main()
