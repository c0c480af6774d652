"""YAML from strangers: plain values only, and not more of them than a recipe can mean."""

from __future__ import annotations

from typing import Any

import yaml

# A recipe has some hundred values. What aliases (&a, *a) unfold to counts in full: ten lines of them can stand for a
# billion values.
LARGEST = 1 << 20  # values and characters
_MOST_DIGITS = 40  # Python reads longer numbers in hexadecimal, but does not write them


def parse_yaml(text: str) -> Any:
    """Plain values only, no Python objects. Raises ValueError where it is no YAML, or unfolds beyond all measure."""
    if len(text) > LARGEST:
        raise ValueError(f"more than {LARGEST:,} characters")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _unfolded_size(node, {}) > LARGEST:
            raise ValueError(f"its aliases unfold to more than {LARGEST:,} characters")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:  # PyYAML's, on values like !!float ""
        raise ValueError(f"a value that its tag does not fit ({type(error).__name__}: {error})") from None


def _unfolded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Values and characters of a node, its aliases unfolded. sizes: of the nodes done, by id. Raises ValueError."""
    if id(node) not in sizes:
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > _MOST_DIGITS:
            raise ValueError(f"a number of {len(node.value):,} digits")
        sizes[id(node)] = LARGEST  # for a node that contains itself
        parts = [node.value] if isinstance(node, yaml.ScalarNode) else node.value
        flat = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
        sizes[id(node)] = 1 + sum(len(p) if isinstance(p, str) else _unfolded_size(p, sizes) for p in flat)
    return sizes[id(node)]
