"""Whether an export is what it should be."""
