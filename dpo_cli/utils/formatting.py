"""Numbers as people write them."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
NONE = "–"


def number(value: Any, signed: bool = False) -> str:
    """Four figures or so, thousands apart, a real minus; a dash for what is no finite number."""
    if not is_number(value):
        return NONE
    size = abs(value)
    if not size:
        return "0"
    if isinstance(value, Integral) and size < 1e15:
        text = f"{value:,}"
    elif size < 1e-3 or size >= 1e6:
        text = _powers(f"{value:.2e}")
    else:
        decimals = next(places for above, places in ((1000, 0), (100, 1), (10, 2), (0.1, 3), (0, 4)) if size >= above)
        text = f"{value:,.{decimals}f}"
    return ("+" if signed and value > 0 else "") + text.replace("-", "−")


def nats(value: Any) -> str:
    """A log-prob or an entropy to two decimals, so that many can be compared at a glance."""
    return _minus(f"{value:.2f}") if is_number(value) else NONE


def percent(value: Any, decimals: int = 1) -> str:
    """A share in per cent."""
    if not is_number(value):
        return NONE
    return f"{_minus(f'{100 * value:.{decimals}f}') if abs(value) < 100 else number(100 * float(value))}%"


def fold(logratio: Any) -> str:
    """How many times likelier or rarer something is, from the log of the ratio (nats)."""
    if not is_number(logratio):
        return NONE
    times = math.exp(min(abs(logratio), 700))
    if times < 1.05:
        return "as likely"
    text = f"{times:.1f}" if times < 9.95 else f"{times:,.0f}" if times < 1e6 else _powers(f"{times:.0e}")
    return f"{text}× {'likelier' if logratio > 0 else 'rarer'}"


def between(interval: Any, show: Callable[[Any], str] = number, none: str = "unknown") -> str:
    """Both ends of an interval, or ``none`` where it is no two finite numbers."""
    ends = interval if isinstance(interval, (list, tuple)) and len(interval) == 2 else [None]
    return " to ".join(map(show, ends)) if all(map(is_number, ends)) else none


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _minus(text: str) -> str:
    """With a real minus, and none before what is rounded to nothing."""
    return text.replace("-", "−" if float(text) else "")


def _powers(text: str) -> str:
    """1.50e-05 as 1.5×10⁻⁵."""
    digits, _, power = text.partition("e")
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return f"{digits}×10{str(int(power)).translate(_RAISED)}"
