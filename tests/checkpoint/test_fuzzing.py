"""The fuzzing script, for a few hundred of its cases."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_checkpoints.py"


def test_mutated_files_are_read_or_refused_and_nothing_else():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--count", "400"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout
    assert "400 cases in" in done.stdout
    assert " 0 failures" in done.stdout
    assert "shard taken" in done.stdout
