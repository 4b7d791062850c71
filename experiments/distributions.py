"""The distributions of a sweep's parameters by W&B's names; light to import."""

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

Draw = Callable[[random.Random, Mapping[str, Any]], float]


def _uniform(rng: random.Random, p: Mapping[str, Any]) -> float:
    return rng.uniform(p["min"], p["max"])


def _log_values(rng: random.Random, p: Mapping[str, Any]) -> float:
    return math.exp(rng.uniform(math.log(p["min"]), math.log(p["max"])))


def _inverse_log_values(rng: random.Random, p: Mapping[str, Any]) -> float:
    return 1 / math.exp(rng.uniform(math.log(1 / p["max"]), math.log(1 / p["min"])))


def _normal(rng: random.Random, p: Mapping[str, Any]) -> float:
    return rng.gauss(p.get("mu", 0.0), p.get("sigma", 1.0))


# name -> (parameters it needs, those it may have, a draw)
CONTINUOUS: dict[str, tuple[set[str], set[str], Draw]] = {
    "uniform": ({"min", "max"}, set(), _uniform),
    "log_uniform": ({"min", "max"}, set(), lambda rng, p: math.exp(_uniform(rng, p))),
    "log_uniform_values": ({"min", "max"}, set(), _log_values),
    "inv_log_uniform": ({"min", "max"}, set(), lambda rng, p: math.exp(-_uniform(rng, p))),
    "inv_log_uniform_values": ({"min", "max"}, set(), _inverse_log_values),
    "normal": (set(), {"mu", "sigma"}, _normal),
    "log_normal": (set(), {"mu", "sigma"}, lambda rng, p: math.exp(_normal(rng, p))),
    "beta": (set(), {"a", "b"}, lambda rng, p: rng.betavariate(p.get("a", 1), p.get("b", 1))),
}
QUANTIZED = {f"q_{name}" for name in CONTINUOUS if not name.startswith("inv_")}
POSITIVE = {"log_uniform_values", "inv_log_uniform_values", "q_log_uniform_values"}
CHOICES = ("categorical", "categorical_w_probabilities")
NAMES = ("constant", *CHOICES, "int_uniform", *CONTINUOUS, *sorted(QUANTIZED))
NUMBERS = {"min", "max", "mu", "sigma", "q", "a", "b"}


def named(form: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter's form with its distribution, which W&B infers where none is named.

    value: constant; values: categorical, with probabilities categorical_w_probabilities; min and
    max: int_uniform of whole numbers, else uniform.

    Raises:
        ValueError: no distribution has these keys, or a number that it cannot take.
    """
    given = dict(form)
    name = given.pop("distribution", None)
    if name is None:
        whole = all(type(given.get(end)) is int for end in ("min", "max"))
        inferred = {
            ("value",): "constant",
            ("values",): "categorical",
            ("probabilities", "values"): "categorical_w_probabilities",
            ("max", "min"): "int_uniform" if whole else "uniform",
        }
        name = inferred.get(tuple(sorted(given)))
        if name is None:
            raise ValueError(f"`value: x` or `values: [x, y]`, or `min` and `max`: {dict(form)}")
    if name not in NAMES:
        raise ValueError(f"a distribution among {', '.join(NAMES)}, got {name}")
    needed, allowed = _keys(name)
    if not needed <= given.keys() <= needed | allowed:
        rest = f" and may have {', '.join(sorted(allowed))}" if allowed else ""
        raise ValueError(
            f"{name} with {', '.join(sorted(needed)) or 'nothing'}{rest}, got {sorted(given)}"
        )
    _check(name, given)
    return {"distribution": name, **given}


def _keys(name: str) -> tuple[set[str], set[str]]:
    simple: dict[str, tuple[set[str], set[str]]] = {
        "constant": ({"value"}, set()),
        "categorical": ({"values"}, set()),
        "categorical_w_probabilities": ({"values", "probabilities"}, set()),
        "int_uniform": ({"min", "max"}, set()),
    }
    if name in simple:
        return simple[name]
    needed, allowed, _ = CONTINUOUS[name.removeprefix("q_")]
    return needed, allowed | ({"q"} if name in QUANTIZED else set())


def _check(name: str, given: Mapping[str, Any]) -> None:
    for key in NUMBERS & given.keys():
        if isinstance(given[key], bool) or not isinstance(given[key], int | float):
            raise ValueError(f"a number as {key}, got {given[key]!r}")
    if "min" in given and not given["min"] <= given["max"]:
        raise ValueError(f"min ({given['min']}) not above max ({given['max']})")
    if name in POSITIVE and not given["min"] > 0:
        raise ValueError(f"{name} with min above 0, got {given['min']}")
    if name == "int_uniform" and not all(float(given[end]).is_integer() for end in ("min", "max")):
        raise ValueError("int_uniform with whole numbers as min and max")
    if any(given.get(key, 1) <= 0 for key in ("q", "a", "b", "sigma")):
        raise ValueError(f"{name} with q, a, b and sigma above 0")
    if name in CHOICES:
        values, chances = given["values"], given.get("probabilities")
        if not isinstance(values, list) or not values:
            raise ValueError("values with something in the list")
        if chances is not None and (
            len(chances) != len(values) or min(chances) < 0 or abs(sum(chances) - 1) > 1e-6
        ):
            raise ValueError("a probability for each of its values, 1 in all")


def draw(form: Mapping[str, Any], rng: random.Random) -> Any:
    """Draw a value of a parameter whose form `named` has checked.

    A q_ distribution draws round(X / q) q.
    """
    name = form["distribution"]
    if name == "constant":
        return form["value"]
    if name in CHOICES:
        return rng.choices(form["values"], form.get("probabilities"))[0]
    if name == "int_uniform":
        return rng.randint(int(form["min"]), int(form["max"]))
    value = CONTINUOUS[name.removeprefix("q_")][2](rng, form)
    if name not in QUANTIZED:
        return value
    q = form.get("q", 1)
    return round(value / q) * q


def listed(form: Mapping[str, Any]) -> list[Any] | None:
    """Return all values of a parameter, as a grid takes them; None of a continuous one."""
    name = form["distribution"]
    if name == "constant":
        return [form["value"]]
    if name in CHOICES:
        return list(form["values"])
    if name == "int_uniform":
        return list(range(int(form["min"]), int(form["max"]) + 1))
    if name == "q_uniform":
        q, least = form.get("q", 1), form["min"]
        count = math.floor((form["max"] - least) / q + 1e-9)
        return [least + i * q for i in range(count + 1)]
    return None
