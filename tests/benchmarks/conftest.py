"""The benchmarks' commands in tests."""

import pytest
from absl.testing import flagsaver

from benchmarks import command


@pytest.fixture
def cli(capsys):
    """Execute a command on flags; return (exit status, stdout, stderr)."""

    def call(module, *arguments):
        saved = flagsaver.save_flag_values(module.FLAGS)
        try:
            with pytest.raises(SystemExit) as exit_:
                command.execute(module.run, module.FLAGS, ["benchmarks", *arguments])
        finally:
            flagsaver.restore_flag_values(saved, module.FLAGS)
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return call
