"""Which tokens a step reads."""
