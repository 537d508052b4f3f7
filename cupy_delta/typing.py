"""The types of the public signatures, for those who check theirs.

Arguments are `Array`, of NumPy or CuPy. What a call returns is of the kind that came in; where it
also has the dtype of an argument, the signature says so, and the fields of results are ``Any``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, SupportsFloat, SupportsIndex, TypeVar

import numpy as np

if TYPE_CHECKING:
    from .problem import Problem
    from .results import Residuals

__all__ = ["AnyArray", "Array", "Backend", "Integer", "Real", "StateLayout"]

# Layout of the last two axes of states: (K, V) or (V, K).
StateLayout = Literal["kv", "vk"]
# Python's and NumPy's numbers.
Integer = SupportsIndex
Real = SupportsFloat


class Array(Protocol):
    """An array of NumPy or CuPy: what the two have in common and other libraries' arrays lack."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def strides(self) -> tuple[int, ...]: ...
    @property
    def flags(self) -> Any: ...
    def __getitem__(self, key: Any, /) -> Any: ...


# One kind of array and dtype, in and out.
AnyArray = TypeVar("AnyArray", bound=Array)


class Backend(Protocol):
    """What a backend is: a module with one function for each operator, given a checked call."""

    def chunk_delta_rule(self, problem: Problem, /) -> tuple[Any, Any, Any]: ...
    def chunk_delta_rule_fwd(self, problem: Problem, /) -> tuple[Any, Any, dict[str, Any]]: ...
    def chunk_delta_rule_bwd(
        self, residuals: Residuals, do: Any, dfinal_state: Any, /
    ) -> tuple[Any, Any, Any, Any, Any, Any]: ...
    def recurrent_delta_rule(self, problem: Problem, /) -> tuple[Any, Any]: ...
    def delta_rule_step(self, problem: Problem, /) -> Any: ...
    def wy_factors(self, problem: Problem, /) -> tuple[Any, Any, Any]: ...
    def state_pass(self, problem: Problem, /) -> tuple[Any, Any, Any]: ...
    def chunk_output(self, problem: Problem, /) -> Any: ...
    def sequence_transfer(self, problem: Problem, /) -> tuple[Any, Any]: ...
    def affine(self, p: Any, x: Any, h: Any, /) -> Any: ...
    def joined(self, told: Any, ranks: range, shape: tuple[int, ...], /) -> Any: ...
