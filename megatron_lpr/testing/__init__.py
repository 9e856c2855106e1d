"""Toy models and corpora, and functions run on several local ranks: for our tests and for yours."""
