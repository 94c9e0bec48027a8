"""Types of the fields in `config.json`: every failed check reads "expected <what>, found <value>".

Owns what one value may be. Read `config.py` next, which says what the values mean together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

MAX_SIZE = 2**31 - 1  # the core counts dimensions in 32-bit integers
MAX_LAYERS = 4096
DMEL_LEVELS = 16  # values that one dMel band can take
MEL_BINS = 800  # at most: below the bins of the transform of 1,600 samples

T = TypeVar("T")


def _expects(what: str) -> WrapValidator:
    def check(value: object, inner: Callable[[object], T]) -> T:
        try:
            return inner(value)
        except ValidationError:
            raise PydanticCustomError("expected", "expected {what}", {"what": what}) from None

    return WrapValidator(check)


def _as_list(value: object) -> object:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


Size = Annotated[int, Field(gt=0, le=MAX_SIZE), _expects("a positive integer")]
Count = Annotated[int, Field(ge=0, le=MAX_SIZE), _expects("a non-negative integer")]
LayerCount = Annotated[
    int, Field(gt=0, le=MAX_LAYERS), _expects(f"an integer from 1 to {MAX_LAYERS}")
]
MtpLayerCount = Annotated[
    int, Field(ge=0, le=MAX_LAYERS), _expects(f"an integer from 0 to {MAX_LAYERS}")
]
BinCount = Annotated[int, Field(gt=0, le=MEL_BINS), _expects(f"an integer from 1 to {MEL_BINS}")]
LevelCount = Annotated[
    int,
    Field(ge=DMEL_LEVELS, le=MAX_SIZE),
    _expects(f"an integer of at least {DMEL_LEVELS}, the levels of dMel"),
]
ChannelCount = Annotated[int, Field(ge=3, le=3), _expects("3 (red, green and blue)")]
TokenId = Annotated[int, Field(ge=0, le=MAX_SIZE), _expects("a token id")]
LayerIndex = Annotated[int, Field(strict=True), _expects("an integer")]
PositiveFloat = Annotated[float, Field(gt=0), _expects("a positive number")]
FiniteFloat = Annotated[float, _expects("a number")]
LayerType = Literal["hybrid", "hybrid_sliding"]
MlpLayerType = Literal["dense", "sparse"]
# note: JSON lists become tuples, so that the models are frozen all the way down.
LayerTypes = Annotated[tuple[LayerType, ...], Field(strict=False)]
MlpLayerTypes = Annotated[tuple[MlpLayerType, ...], Field(strict=False)]
LayerIndices = Annotated[tuple[LayerIndex, ...], Field(strict=False)]
TokenIds = Annotated[
    tuple[Annotated[TokenId, Field(strict=True)], ...],
    Field(strict=False),
    BeforeValidator(_as_list),
]
