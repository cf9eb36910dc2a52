"""Format numbers for people. None and non-finite values become a dash."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from typing import Any

NOTHING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"


def finite(value: Any) -> float | None:
    """Return a number as float; None if the value is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def strict(value: Any) -> Any:
    """Replace non-finite numbers in plain data by None, for strict JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value


def number(value: Any, digits: int = 0) -> str:
    """`1,234.5`."""
    found = finite(value)
    return NOTHING if found is None else f"{found:,.{digits}f}".replace("-", MINUS)


def signed(value: Any, digits: int) -> str:
    """`+0.12`, with a minus sign (U+2212); values that round to zero have no sign."""
    found = finite(value)
    if found is None:
        return NOTHING
    if round(found, digits) == 0:
        return f"{0:.{digits}f}"
    return f"{found:+,.{digits}f}".replace("-", MINUS)


def difference(value: Any, base: Any) -> str:
    """`+0.123` relative to a base; empty if one of the values is missing."""
    one, other = finite(value), finite(base)
    return "" if one is None or other is None else signed(one - other, 3)


def significant(value: Any, digits: int = 3) -> str:
    """Format significant digits, with an exponent only for small values: `1,230`, `0.00123`, `1.2e-06`."""
    found = finite(value)
    if found is None:
        return NOTHING
    if found == 0:
        return "0"
    size = math.floor(math.log10(abs(found)))
    if size < -4:
        return f"{found:.1e}".replace("-", MINUS)
    rounded = round(found, digits - 1 - size)
    return number(rounded, max(0, digits - 1 - size))


def count(value: Any) -> str:
    """`5.25 M`: parameters, tokens, FLOP."""
    found = finite(value)
    if found is None:
        return NOTHING
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(found) >= size:
            return f"{significant(found / size)} {unit}"
    return significant(found)


def size(value: Any) -> str:
    """Bytes: `1.25 GiB`."""
    found = finite(value)
    if found is None:
        return NOTHING
    for unit, unit_bytes in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(found) >= unit_bytes:
            return f"{significant(found / unit_bytes)} {unit}"
    return f"{found:.0f} B"


def duration(seconds: Any) -> str:
    """`0.45 s`, `9 s`, `12 min 05 s`, `3 h 02 min`, `2 d 4 h`."""
    found = finite(seconds)
    if found is None:
        return NOTHING
    if found < 10:
        return f"{significant(found, 2)} s"
    minutes, rest = divmod(round(found), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def percent(share: Any, digits: int = 0) -> str:
    """`62 %` for a fraction of 0.62."""
    found = finite(share)
    return NOTHING if found is None else f"{100 * found:.{digits}f} %".replace("-", MINUS)


def times(ratio: Any) -> str:
    """`1.43×`."""
    found = finite(ratio)
    return NOTHING if found is None else f"{found:.2f}{TIMES}"


def change(value: Any, base: Any, digits: int = 0) -> str:
    """`−38 %` relative to a base; empty if one of the values is missing."""
    one, other = finite(value), finite(base)
    if one is None or not other:
        return ""
    return f"{signed(100 * (one / other - 1), digits)} %"


def moment(seconds: Any) -> str:
    """Seconds since the epoch as `2026-11-24 07:42 UTC`."""
    found = finite(seconds)
    if found is None:
        return NOTHING
    try:
        return datetime.fromtimestamp(found, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return NOTHING
