"""Trees as somebody has edited them."""


def changed(tree, dotted, value):
    """Change the entry of a tree of mappings and lists that is named as `a.b.0`; a value of ... takes it out."""
    *parents, last = [int(key) if key.isdigit() else key for key in dotted.split(".")]
    for key in parents:
        tree = tree[key]
    if value is ...:
        del tree[last]
    else:
        tree[last] = value
