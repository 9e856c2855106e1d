"""The commands of `megatron-lpr`, a module each: its arguments and what it runs. A module with a COMMAND is one."""
