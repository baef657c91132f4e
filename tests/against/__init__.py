"""This tree against an older commit: the same bits, and no speed lost."""
