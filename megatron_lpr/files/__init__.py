"""What is on disk, whatever it is for: locks, durable writes, YAML, JSON lines, safetensors."""
