"""What a run needs of each GPU, its links and its disk, from numbers alone."""
