"""The record of a configuration, which config.json holds, and its identity, which tells two runs
apart.

    record(config)                    # {"epochs": 8}, which `--config=FILE` reads again
    identity(config)                  # what tells two runs apart
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from kafjax.core.command_line import read_flag
from kafjax.core.config import Config, Leaf, leaves, unused
from kafjax.core.errors import UserError, nearest
from kafjax.core.field_types import element_type, has_type, is_collection, json_of, type_name


def record(config: Config) -> dict[str, Any]:
    """Returns the contents of config.json: JSON values by flag."""
    return {
        leaf.flag: json_of(leaf.of(config)) for leaf in leaves(type(config)()) if leaf.about.record
    }


def read_record(
    experiment: type[Config],
    stored: Mapping[str, Any],
    source: object,
    ignore: Collection[str] = (),
) -> dict[str, Any]:
    """Reads a record into values by flag, for `from_flags` and `changed`. A field that it lacks is
    left at its default, and one that the experiment has no use for is passed over.

    Args:
      source: where it came from, for messages.
      ignore: keys that are no fields.

    Raises:
      UserError: naming source and key, for an unknown key or a value of another type.
    """
    known = {leaf.flag: leaf for leaf in leaves(experiment())}
    passed_over = {*ignore, *unused(experiment())}
    found = {}
    for key, value in stored.items():
        if key in passed_over:
            continue
        if key not in known:
            raise UserError(
                f"{source}: '{key}' is no setting of this experiment. {nearest(key, known)}"
            )
        found[key] = _from_json(known[key], value, source)
    return found


def identity(config: Config) -> dict[str, Any]:
    """Returns the fields that tell two runs apart: the record without folders, meshes and other
    fields of `identity=False`."""
    kept = (leaf for leaf in leaves(type(config)()) if leaf.about.record and leaf.about.identity)
    return {
        leaf.flag: json_of(leaf.of(config))
        for leaf in kept
        if not (leaf.about.added and leaf.of(config) == leaf.default)
    }


def config_hash(values: Mapping[str, Any]) -> str:
    """Returns the first 12 hex digits of the sha256 of canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _from_json(leaf: Leaf, value: Any, source: object) -> Any:
    if isinstance(value, str):
        value = leaf.about.aliases.get(value, value)
    # of texts: as records were written when they held what the command line said
    if isinstance(value, list):
        texts = element_type(leaf.hint) is not str and all(isinstance(one, str) for one in value)
        value = read_flag(leaf, value) if texts and is_collection(leaf.hint) else tuple(value)
    if not has_type(value, leaf.hint):
        raise UserError(f"{source}: {leaf.flag}={str(value)[:60]!r} is not {type_name(leaf.hint)}")
    return value
