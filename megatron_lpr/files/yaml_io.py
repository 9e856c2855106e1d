"""YAML that people write: read strictly, so that nothing is lost or guessed, by the C parser where there is one."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron_lpr.errors import UserError

if TYPE_CHECKING:
    from yaml import SafeDumper as _Dumper
    from yaml import SafeLoader as _Base
else:
    _Base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    _Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_LARGEST = 1 << 64
_MOST_REPEATED = 1_000_000  # entries, by aliases
_MERGE = "tag:yaml.org,2002:merge"
_INT = "tag:yaml.org,2002:int"
_REREAD = (_INT, "tag:yaml.org,2002:timestamp")


class _Loader(_Base):
    """YAML's plain types, but for dates, which stay text; whole numbers are decimal, of at most 64 bits.

    YAML 1.1 would make 86100 of 23:55:00, 8 of 010, and 2026112801 of the name 20261128_01.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REREAD]
        for first, resolvers in _Base.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    try:
        value = loader.construct_yaml_int(node)
    except ValueError:  # more digits than Python is willing to read
        value = _LARGEST
    if abs(value) >= _LARGEST:
        text = node.value if len(node.value) <= 30 else f"{node.value[:30]}..."
        raise yaml.constructor.ConstructorError(None, None, f"the number {text} is too large", node.start_mark)
    return value


_Loader.add_constructor(_INT, _whole_number)


def parse_yaml(text: str, where: str) -> Any:
    """The one document of `text`, of plain types; `where` begins messages.

    Raises:
        UserError: not YAML, a key twice in one mapping (YAML itself would keep the last), a number above 64 bits, or
            aliases that make billions of a few lines.
    """
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            if "*" in text:
                _check_aliases(root, where)
            _check_keys(loader, root, where)
            return loader.construct_object(root, deep=True)  # refuses what lies inside itself
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{where}: not valid YAML: its lists and mappings lie too deep inside one another") from None
    except UserError:
        raise
    except ValueError as error:  # as !!float x
        raise UserError(f"{where}: not valid YAML: {error}") from None


def read_yaml(path: str | Path, where: str) -> Any:
    """`parse_yaml` of a file. UserError also where it is a folder, cannot be read, or is no UTF-8."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}: not UTF-8 text (byte {error.start}, about line {line})") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror or error}") from None
    return parse_yaml(text, where)


def dump_yaml(content: Any) -> str:
    """Plain types as YAML, keys in their order."""
    return yaml.dump(content, None, _Dumper, sort_keys=False, allow_unicode=True)


def _check_aliases(root: yaml.Node, where: str) -> None:
    """Raises UserError where aliases repeat so much that whoever walks through it never comes to an end."""
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if isinstance(node, tuple):
            return size(node[0]) + size(node[1])
        if id(node) not in sizes:
            sizes[id(node)] = 1  # of one that lies inside itself, which is refused later
            sizes[id(node)] += 0 if isinstance(node, yaml.ScalarNode) else sum(map(size, node.value))
        return sizes[id(node)]

    if size(root) - len(sizes) > _MOST_REPEATED:
        raise UserError(f"{where}: its aliases (*name) repeat more than {_MOST_REPEATED:,} entries; write fewer")


def _check_keys(loader: _Loader, root: yaml.Node, where: str) -> None:
    """Looks at the nodes, not at the mappings made of them, where keys that a merge (<<) takes over are allowed twice.

    Raises:
        UserError: a key is there twice.
    """
    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.ScalarNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
            continue
        first_line: dict[Hashable, int] = {}
        for key_node, value_node in node.value:
            nodes.append(value_node)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == _MERGE:
                continue
            key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if key in first_line:
                raise UserError(
                    f"{where}: line {line}: the key '{key}' is there already, in line {first_line[key]}; keep one"
                )
            first_line[key] = line
