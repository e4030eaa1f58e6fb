"""`python -m hbxt_compress`: the command line."""

from __future__ import annotations

from hbxt_compress.cli import main

if __name__ == "__main__":
    main()
