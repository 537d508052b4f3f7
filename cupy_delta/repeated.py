"""Steps on the very arrays of an earlier one: the same launch, for which nothing else is asked."""

from __future__ import annotations

from collections.abc import Callable
from weakref import ref

from .checker import KEPT_PLACES, Passed
from .raw import by_name

_nothing = type(None)  # called, it returns None, as the reference to an array that is gone does

# By the identities of the pool and of what steps that take turns on one differ in, `out` and
# `accepted`: references to the arguments, shapes of those that are always arrays, the other arrays
# with their shapes, options, and the launch.
_kept: dict[tuple[int, int, int], tuple] = {}


def find(arguments: tuple) -> Callable[[], None] | None:
    """Return the launch of a step with these arguments, or None where there was none.

    They are q, k, v, beta, g, out, state, state_indices, output_state_indices, cu_seqlens,
    accepted, scale, qk_l2norm and state_layout.

    A CuPy array keeps its memory, its device and its dtype as long as it lives. Only its shape can
    be assigned, and its strides follow. So the same objects with the shapes that they had are the
    same call, which has passed every check. A gate or strength of raw parameters is frozen.
    Of what is gone a reference gives None, as of what was never given, so None is told by itself.
    """
    q, k, v, beta, g, out, state, read, written, ends, accepted, scale, l2norm, layout = arguments
    kept = _kept.get((id(state), id(out), id(accepted)))
    if kept is None or q is None or k is None or v is None or beta is None:
        return None
    given, shapes, others, options, again = kept
    q_, k_, v_, beta_, g_, out_, state_, read_, written_, ends_, accepted_ = given
    ungated, scale_, type_, l2norm_, layout_ = options
    if (
        q_() is q
        and k_() is k
        and v_() is v
        and beta_() is beta
        and g_() is g
        and (g is None) is ungated
        and out_() is out
        and state_() is state
        and read_() is read
        and written_() is written
        and ends_() is ends
        and accepted_() is accepted
        and l2norm_ is l2norm
        and layout_ is layout
        and type(scale) is type_
        and scale == scale_
        and (q.shape, k.shape, v.shape, out.shape, state.shape) == shapes
    ):
        for x_, shape in others:
            x = x_()
            if x is None or x.shape != shape:
                return None
        return again
    return None


def keep(passed: Passed | None, arguments: tuple) -> None:
    """Keep the launch of a step that has passed and is not found yet, if the backend has kept one.

    `arguments` are those of `find`; of arrays there are only weak references here. Where callers
    make new arrays of the same memory for every step it would be in vain: of the steps on one
    memory that were not found, it is the first, the second, the fourth and so on that is kept.
    """
    if passed is None or passed.again is None:
        return
    passed.missed += 1
    if passed.missed & (passed.missed - 1):
        return
    *arrays, scale, qk_l2norm, state_layout = arguments
    q, k, v, beta, g, out, state, *named, accepted = arrays
    others = (*by_name(beta, g).values(), *named, accepted)
    if len(_kept) >= KEPT_PLACES:
        _kept.clear()
    _kept[id(state), id(out), id(accepted)] = (
        tuple(_nothing if x is None else ref(x) for x in arrays),
        tuple(x.shape for x in (q, k, v, out, state)),
        tuple((ref(x), x.shape) for x in others if x is not None),
        (g is None, scale, type(scale), qk_l2norm, state_layout),
        passed.again,
    )
