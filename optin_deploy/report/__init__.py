"""A run's report: a JSON document, and its renderings as a web page, as Markdown and for the terminal."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from optin_deploy.errors import UserError
from optin_deploy.report.schema import Report
from optin_deploy.utils.atomic_files import write_text

__all__ = ["Report", "read_report", "write_report"]


def write_report(report: Report, directory: str | Path) -> tuple[Path, Path]:
    """Write report.json, report.html and report.md into ``directory``, each completely or not at all.

    Returns the paths of the first two.
    """
    from optin_deploy.report import markdown
    from optin_deploy.report.web_page import render

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "report.json": report.model_dump_json(indent=1) + "\n",
        "report.html": render(report),
        "report.md": markdown.render(report),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return folder / "report.json", folder / "report.html"


def read_report(path: str | Path) -> Report:
    """Read the report of the run directory ``path``, or the report file ``path``.

    Raises UserError when it is missing or of another layout.
    """
    path = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
    # Reading a device file may never end.
    if path.exists() and not path.is_file():
        raise UserError(f"cannot read the report {path}: it is no file")
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the report {path}: {error.strerror}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        detail = ""
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            detail = f": {'.'.join(str(part) for part in first['loc']) or 'document'}: {first['msg']}"
        raise UserError(f"{path} is not a report of this version{detail}") from error
