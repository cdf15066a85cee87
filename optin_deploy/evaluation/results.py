"""Results of comparing both networks, as they are stored in ``report.json``; importing them needs no torch."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

Png = Annotated[str, Field(pattern=r"^iVBORw0KGgo[A-Za-z0-9+/]*={0,2}$")]
"""A PNG file in base64. The pattern admits nothing that could end an attribute of an HTML page."""


@dataclass(frozen=True)
class Agreement:
    """How close an output of the pruned network is to the dense one, on samples that compensation did not use.

    Attributes:
        output: its name.
        cosine: mean over samples of the cosine of the flattened outputs; over all samples for one number per sample.
        relative_error: norm of the difference divided by the norm of the dense output.
        top1_agreement: fraction of equal arg-max, for class logits (of pixels, for class maps).
        samples: number of samples.
        correlation: mean over samples of Pearson's correlation over pixels, for maps of one value.
        sign_agreement: fraction of equal signs, for yes/no logits.
        rank_correlation: Spearman's correlation over samples, for plain numbers and for one logit per sample; the mean
            over the numbers of a sample.
    """

    output: str
    cosine: float
    relative_error: float
    top1_agreement: float | None
    samples: int
    correlation: float | None = None
    sign_agreement: float | None = None
    rank_correlation: float | None = None


@dataclass(frozen=True)
class ExampleImage:
    """One sample of one output, as PNG files in base64. ``image`` is the input, None if that is not an image."""

    output: str
    image: Png | None
    dense: Png
    pruned: Png
