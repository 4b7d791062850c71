"""Words that torchrun hands on; among a script's it reads abbreviations of its own options."""

import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import eval.fid_coco30k
import eval.reconstruction
from experiments.evaluation.options import make_parser

README = (Path(__file__).parents[2] / "README.md").read_text()
LINES = re.findall(r"torchrun (--[^\n`]* -m [^\n`]*)", README)
PARSERS = [make_parser(door) for door in (eval.fid_coco30k.DOOR, eval.reconstruction.DOOR)]


@pytest.mark.parametrize("line", LINES)
def test_what_the_readme_says_reaches_the_command(line: str) -> None:
    words = shlex.split(line)
    module = words.index("-m") + 1
    found = get_args_parser().parse_args(words)
    assert found.module and found.training_script == words[module]
    assert found.training_script_args == words[module + 1 :]


def test_options_that_torchrun_takes_for_its_own_are_known() -> None:
    assert len(LINES) >= 4
    theirs = [o for a in get_args_parser()._actions for o in a.option_strings]
    for parser in PARSERS:
        ours = {o: a.help for a in parser._actions for o in a.option_strings}
        lost = {o: text for o, text in ours.items() if any(t.startswith(o) for t in theirs)}
        for option in lost.keys() - {"-h", "--help"}:
            assert f"torchrun takes it as {option[2:]}=N alone" in (lost[option] or "")
