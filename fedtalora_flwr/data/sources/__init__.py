"""Data sets by name: each file has ``create(...) -> Source`` and only reads; `tidy` does the rest."""
