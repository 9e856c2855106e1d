"""Documents to a corpus."""
