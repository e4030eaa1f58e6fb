"""The environment that all pages are made in: everything is escaped, nothing may be missing."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from hbxt_compress.render.table import decibel, number, power_db, size

__all__ = ["environment"]


def environment() -> Environment:
    """Jinja over this package's templates, with the formatters of the tables."""
    made = Environment(
        loader=PackageLoader("hbxt_compress.render"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals |= {"number": number, "size": size, "power_db": power_db, "decibel": decibel}
    return made
