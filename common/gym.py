"""The `reasoning-gym` package: its tasks by name, with their settings.

    reasoning-gym:leg_counting,chain_sum:max_terms=3:level=1

Names, each once, are separated by commas. Behind a name come its settings, `:key=value` each: the
fields of the package's config for that name, and two of ours. `level` is a step of its curriculum,
from 0; `size` is how many problems there are to train on (default: an equal share of 600). A value
is JSON, or True, False and None as Python has them, or else a word.
"""

import difflib
import json
import re
from dataclasses import fields
from functools import lru_cache

PREFIX = "reasoning-gym:"
PYTHON = {"True": True, "False": False, "None": None}


def named(task: str) -> list[tuple[str, dict]]:
    """(name, settings) of each part of a task. Raises ValueError where there is none, and for a
    name or a setting given twice."""
    parts = []
    for part in re.split(r",(?=[a-z][a-z0-9_]*(?:[:,]|$))", task.removeprefix(PREFIX)):
        name, *pairs = part.split(":")
        settings = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"{PREFIX}{part}: {pair!r} is no setting: write NAME:key=value")
            if key in settings:
                raise ValueError(f"{PREFIX}{part}: {key} is given twice: give it once")
            try:
                settings[key] = PYTHON[value] if value in PYTHON else json.loads(value)
            except ValueError:                          # a word
                settings[key] = value
        if name in dict(parts):                         # its problems' ids would be alike
            raise ValueError(f"{task}: {name} is named twice: name it once")
        parts.append((name, settings))
    return parts


@lru_cache(maxsize=64)
def dataset(name: str, settings: str, seed: int, size: int):
    """The package's dataset. settings: of the config, as JSON. Raises ValueError in one line."""
    import reasoning_gym
    from reasoning_gym.factory import CURRICULA, DATASETS

    there = sorted(DATASETS.keys() - {"composite"})     # several in one, which commas do here
    if name not in there:
        close = difflib.get_close_matches(name, there, 1)
        hint = f"; did you mean {close[0]}?" if close else f" among {', '.join(there)}"
        raise ValueError(f"reasoning-gym has no task {name!r}{hint}")
    config, settings = DATASETS[name][1], json.loads(settings)
    level = settings.pop("level", None)
    known = {field.name for field in fields(config)} - {"seed", "size"}
    if unknown := sorted(settings.keys() - known):
        more = ["size", *["level"] * (name in CURRICULA)]
        raise ValueError(f"{PREFIX}{name} has no setting {unknown[0]!r}: it takes "
                         f"{', '.join([*sorted(known), *more])}")
    for field in fields(config):
        value = settings.get(field.name)
        if isinstance(field.default, int | float) and isinstance(value, str):
            wanted = "true or false" if isinstance(field.default, bool) else "a number"
            raise ValueError(f"{PREFIX}{name}:{field.name}={value}: give {wanted}")
    try:
        if level is not None:
            curriculum = CURRICULA[name]()
            last = max(len(attribute.levels) for attribute in curriculum.attributes.values()) - 1
            if level > last:
                raise ValueError(f"level {level}, where the last is {last}")
            for attribute in curriculum.attributes.values():
                curriculum.set_attr_level(attribute.name, min(level, len(attribute.levels) - 1))
            of_level = vars(curriculum.generate_configuration({"seed": seed, "size": size}))
            settings = {key: of_level[key] for key in known if key in of_level} | settings
        return reasoning_gym.create_dataset(name, **settings, seed=seed, size=size)
    except Exception as error:                          # asserts of the package's own, mostly
        wrong = f"no level {level!r}" if isinstance(error, KeyError) else str(error)
        wrong = wrong.strip() or type(error).__name__
        raise ValueError(f"{PREFIX}{name} refuses its settings ({wrong.splitlines()[0]})",
                         ) from error
