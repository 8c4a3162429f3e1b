"""A database with the shape of the System Reference Document's, of invented spells and
creatures."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

ATTRIBUTION = "Invented for these tests."


def spell(name: str, level: int = 3, **other) -> dict:
    fixed = {
        "school": {"name": "Evocation"},
        "duration": "Up to 1 minute",
        "level": level,
        "casting_time": "1 action",
    }
    return {"index": name.lower(), "name": name, **fixed, **other}


def creature(name: str, hit_points: int = 19, **other) -> dict:
    fixed = {"armor_class": [{"value": 13}], "challenge_rating": 0.25, "speed": {"walk": "40 ft."}}
    return {"index": name.lower(), "name": name, "hit_points": hit_points, **fixed, **other}


SPELLS = [spell(f"Glow{letter}", level) for level, letter in enumerate("abcd", 1)]
CREATURES = [creature(f"Urk{letter}", 10 + n) for n, letter in enumerate("abcd")]


def write(path: Path, spells: list[dict] = SPELLS, creatures: list[dict] = CREATURES) -> Path:
    with sqlite3.connect(path) as database:
        database.execute("create table metadata (key text, value text)")
        database.execute("insert into metadata values ('attribution', ?)", (ATTRIBUTION,))
        for table, records in (("spells", spells), ("monsters", creatures)):
            database.execute(
                f'create table {table} ("index" text primary key, name text, data text)'
            )
            rows = [(record["index"], record["name"], json.dumps(record)) for record in records]
            database.executemany(f"insert into {table} values (?, ?, ?)", rows)
    database.close()
    return path
