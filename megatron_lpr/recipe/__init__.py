"""The settings of every command: declared, read, checked."""
