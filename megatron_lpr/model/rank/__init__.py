"""What a rank of a layout holds of a model, from numbers alone: its layers, its weights, their FP8 copies."""
