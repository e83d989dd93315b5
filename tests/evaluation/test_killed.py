"""A batch that is killed again and again ends in the file of one that was left alone."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_and_resume.py"


@pytest.mark.slow
def test_killed_batches_end_in_the_same_bytes(text_checkpoint):
    command = [sys.executable, str(SCRIPT), str(text_checkpoint), "--prompts", "200", "--kills", "4"]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same bytes" in done.stdout
