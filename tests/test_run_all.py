"""run_all.sh is valid, and each command that it lists is one that train.py accepts."""

import subprocess

import pytest
from test_train import ROOT

import flags


@pytest.mark.parametrize("settings", [{}, {"SMOKE": "1"}, {"PAPER": "1"}])
def test_it_lists_commands_that_are_valid_and_differ(settings):
    environment = {"PATH": "/usr/bin:/bin", **settings}
    listed = subprocess.run(["bash", ROOT / "run_all.sh", "--list"], capture_output=True, text=True, env=environment)
    commands = [command.split() for command in listed.stdout.splitlines()]
    assert listed.returncode == 0 and all(command[:2] == ["python", "train.py"] for command in commands)
    parsed = {str(flags.parse(command[2:], "")) for command in commands}
    assert len(parsed) == len(commands) > 2
