"""Prompts that ask for a class."""

from collections.abc import Sequence


def read_label(prompt: str, classes: Sequence[str], count: int) -> int:
    """Read the class that a prompt asks for: a number, or a text that names exactly one class.

    Args:
        prompt: such as "7" or "a handwritten seven"; ValueError: no class, or several.
        classes: names of the classes by label; empty where they have none.
        count: labels are 0..count-1.
    """
    words = "".join(c if c.isalnum() else " " for c in prompt.lower()).split()
    names = [name.lower().split() for name in classes]
    named = [i for i, name in enumerate(names) if name and _contains(words, name)]
    # who names a sea lion does not ask for a lion
    found = [i for i in named if not any(i != j and _contains(names[j], names[i]) for j in named)]
    if len(words) == 1 and words[0].isdecimal():
        found = [int(words[0])]
    if len(found) != 1 or found[0] >= count:
        known = ", ".join(classes[:10]) or "no names"
        raise ValueError(
            f"the prompt {prompt!r} must ask for one class: a number from 0 to {count - 1} or its "
            f"name (classes: {known})"
        )
    return found[0]


def _contains(words: list[str], name: list[str]) -> bool:
    """Whether the words of a name stand side by side."""
    return any(words[i : i + len(name)] == name for i in range(len(words) - len(name) + 1))
