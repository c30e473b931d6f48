"""What the tests of deploy/ share."""

import pytest
from absl.testing import flagsaver

from llama_jax.cli.main import main, parse_flags
from tests.helpers import ROOT


@pytest.fixture
def check_fits(_flags, capsys):
    """Check that a shape of configs/ fits a chip, with a command line's values."""

    def check(shape, chip, values):
        names = ("dtype", "devices", "slots")
        given = [f"--{name}={values[name]}" for name in names if name in values]
        model = f"--config={ROOT / 'configs' / f'llama-2-{shape}.json'}"
        with flagsaver.flagsaver():
            main(parse_flags(["run.py", "serve", "--estimate", model, f"--chip={chip}", *given]))
        captured = capsys.readouterr()
        assert captured.err == ""
        assert "fits; " in captured.out.splitlines()[-1]
        if "devices" in values:
            assert f"on each of {values['devices']} devices" in captured.out

    return check
