"""The table of bad input: what each row makes, the command that is given it, and what the one line says."""

from bad_input import checkpoints, data, recipes, runs, transformers_directories, weights
from bad_input.common import MARK, QUICK, Material, Row, save_pickle, save_text_checkpoint

__all__ = ["MARK", "ODD", "QUICK", "ROWS", "UNNOTED", "Material", "Row", "save_pickle", "save_text_checkpoint"]

ROWS: tuple[Row, ...] = (
    *weights.ROWS,
    *checkpoints.ROWS,
    *transformers_directories.ROWS,
    *recipes.ROWS,
    *data.ROWS,
    *runs.ROWS,
)
UNNOTED: tuple[Row, ...] = runs.UNNOTED
ODD: tuple[Row, ...] = (*weights.ODD, *transformers_directories.ODD, *data.ODD)
"""Rows that work."""
