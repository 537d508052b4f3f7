"""Which kernel decodes: products on the tensor cores, where they do and are faster."""

from __future__ import annotations

from ...call import Call
from ..spec import DeviceFacts, Plan
from .decode import decode_launch
from .decode_products import decode_products_launch, fit_products, products_are_faster


def plan_step(call: Call, facts: DeviceFacts) -> Plan:
    """Plan `delta_rule_step`."""
    by_products = fit_products(call) and products_are_faster(call)
    launch = decode_products_launch(call) if by_products else decode_launch(call)
    return Plan((launch,), {"o": (call.value_shape, call.dtype)}, sums=call.compute_dtype)
