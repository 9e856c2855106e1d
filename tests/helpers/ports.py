"""Ports for ranks that take seconds until they listen."""

import random
import socket


def port_for_ranks() -> int:
    """A free one that the kernel does not give to whoever asks for any port in the meantime (it begins at 32768)."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
