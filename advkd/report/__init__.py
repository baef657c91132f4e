"""The report of a run: tables, pictures and one self-contained page."""
