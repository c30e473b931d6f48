"""--estimate says what a model would take, and the tables of docs/deploy.md are its figures."""

import re

import pytest

from llama_jax.cli.estimate import most_slots
from llama_jax.config import ModelConfig
from llama_jax.decode.chips import CHIPS
from llama_jax.decode.memory import needed_memory
from llama_jax.decode.plan import accelerator_plan
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.errors import InputError
from llama_jax.nn.sharding import choose_shards
from tests.helpers import ROOT

ACCELERATORS = (ROOT / "docs/accelerators.md").read_text("utf-8")
CONFIGS = {size: ROOT / f"configs/llama-2-{size}.json" for size in ("7b", "13b", "70b")}


def test_7b_on_an_h100(cli, monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    arguments = ["--estimate", f"--config={CONFIGS['7b']}", "--chip=h100"]
    status, out, err = cli("serve", *arguments)
    assert (status, err) == (0, "")
    rows = [line.split(maxsplit=3) for line in out.splitlines()]
    assert [row[0] for row in rows] == ["weights", "caches", "working", "total", "h100"]
    assert rows[0][1:] == ["13.48", "GB", "llama-2-7b, float16"]
    assert rows[1][1:] == ["17.18", "GB", "8 slots of 4,096 tokens"]
    assert rows[4][1:3] == ["63.70", "GB"]
    about = r"fits; 23 slots of 4,096 tokens do \(75% of it; XLA_PYTHON_CLIENT_MEM_FRACTION\)"
    assert re.fullmatch(about, rows[4][3])
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".95")
    _, out, _ = cli("serve", *arguments)
    assert "80.69 GB  fits; " in out
    _, out, _ = cli(*arguments, "--slots=200", "--context=4000")
    assert "200 slots of 4,000 tokens" in out
    assert "does not fit" in out


def test_70b_on_four_h100(cli):
    arguments = ["--estimate", f"--config={CONFIGS['70b']}", "--chip=h100"]
    _, out, _ = cli(*arguments)
    assert "does not fit; no slots" in out
    status, out, err = cli(*arguments, "--devices=4")
    assert (status, err) == (0, "")
    weights, caches, _, total, room = out.splitlines()
    assert weights.split()[:3] == ["weights", "34.49", "GB"]
    assert caches.split()[:3] == ["caches", "335.54", "MB"]
    assert total.endswith("GB  on each of 4 devices")
    assert "GB  fits; " in room


def test_two_replicas_of_7b(cli):
    """Each device has what one alone would have with half of the slots."""
    arguments = ["serve", "--estimate", f"--config={CONFIGS['7b']}", "--chip=h100"]
    _, one, _ = cli(*arguments)
    status, two, err = cli(*arguments, "--replicas=2")
    assert (status, err) == (0, "")
    assert two == re.sub(r"(total.*)", r"\1  on each of 2 devices", one)
    _, four, _ = cli(*arguments, "--replicas=2", "--devices=2", "--slots=8")
    assert "4 slots of 4,096 tokens" in four
    assert "on each of 4 devices" in four


def test_a_checkpoint_on_this_machine(cli):
    _, out, err = cli("--estimate", "--dtype=bfloat16")
    assert "demo model" in err
    config = ModelConfig.load(DEMO_CHECKPOINT / "config.json")
    assert f"1 slots of {config.max_seq_len:,} tokens" in out
    assert re.search(r"this (CPU|GPU|TPU) +[\d.,]+ GB  fits", out)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--chip=h100", "--prompt=x"], "--chip is given without --estimate; add it"),
        (["--estimate", "--prompt=x"], "--prompt is given with --estimate, which loads no model"),
        (["serve", "--estimate", "--port=1"], "--port is given with --estimate"),
        (["--estimate", "--config=none.json"], "none.json"),
        (["--estimate", "--config=x", "--checkpoint=y"], "--config is given with --checkpoint"),
        (["--estimate", "--slots=300"], "slots is 300, expected 1 to 256"),
        (["--estimate", "--slots=0"], "slots is 0, expected 1 to 256"),
        (["--estimate", "--context=513"], "context is 513, expected 1 to 512"),
        (["--estimate", "--chip=v5e", "--dtype=float16"], "which a TPU cannot multiply"),
        (["--estimate", "--eos_tokens=2"], "--eos_tokens is given with --estimate"),
        (["--estimate", "--chip=v5e", "--devices=all"], "--devices is 'all', expected a number"),
        (["--estimate", "--chip=v5e", "--devices=0"], "devices is 0, expected a whole number"),
        (["--estimate", "--chip=v5e", "--devices=3"], "split over 3 devices: it has 2 key/value"),
        (["--estimate", "--replicas=0"], "replicas is 0, expected a whole number from 1"),
        (["--estimate", "--replicas=2", "--slots=3"], "slots is 3, expected a multiple of 2"),
        (["--estimate", "--replicas=99"], "devices is 1 with 99 replicas, expected fewer"),
        (["--estimate", "--devices=99"], "devices is 99, expected 'all' or 1 to "),
        (["--estimate", "--devices=two"], "devices is 'two', expected 'all' or 1 to "),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line(cli, arguments, expected):
    status, out, err = cli(*arguments)
    assert (status, out) == (2, "")
    assert expected in err.splitlines()[-1]


def test_the_tables_of_the_page_are_what_it_says():
    page = (ROOT / "docs/deploy.md").read_text()
    found = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in CONFIGS:
            found[cells[0]] = cells[1:]
    assert set(found) == set(CONFIGS)
    for size, (weights, cache, *slots) in found.items():
        config = ModelConfig.load(CONFIGS[size])
        plan = accelerator_plan("gpu", "float16")
        one = needed_memory(config, plan, 1, 4096)
        assert weights == f"{one.weights / 1e9:.1f} GB"
        assert cache == f"{one.caches / 1e9:.2f} GB"
        expected = []
        for chip in CHIPS.values():
            plan = accelerator_plan(chip.platform, "bfloat16")
            room = int(chip.memory * (0.95 if chip.platform == "gpu" else 1))
            most = most_slots(config, plan, 4096, room)
            short = most_slots(config, plan, 1024, room)
            expected.append(f"{most or '–'} / {short or '–'}")
        assert slots == expected


def needed(config, platform, slots, context, devices=1):
    """Return the bytes that each of some devices needs; None: the model cannot be split so."""
    try:
        shards = choose_shards(config, devices)
    except InputError:
        return None
    plan = accelerator_plan(platform, "bfloat16")
    return needed_memory(config, plan, slots, context, shards).total


def least_devices(config, chip, slots, context):
    """Return the least number of chips that hold a model, as the page has it."""
    room = int(chip.memory * (0.95 if chip.platform == "gpu" else 1))
    for count in range(1, config.num_heads + 1):
        total = needed(config, chip.platform, slots, context, count)
        if total is not None and total <= room:
            return str(count)
    return "–"


def test_the_table_of_devices_is_computed():
    rows = re.findall(r"^\| (\d+b) \| ([\d,]+) \| (\d+) \| (.+) \|$", ACCELERATORS, re.MULTILINE)
    assert {size for size, *_ in rows} == set(CONFIGS)
    assert len(rows) == 12
    for size, context, slots, cells in rows:
        config, sizes = ModelConfig.load(CONFIGS[size]), (int(slots), int(context.replace(",", "")))
        chips = [CHIPS[name] for name in ("a100-40", "h100", "v5e", "v5p", "v6e")]
        counts = [least_devices(config, chip, *sizes) for chip in chips]
        memory = f"{needed(config, 'gpu', *sizes) / 1e9:.1f} GB"
        assert cells.split(" | ") == [memory, *counts]


@pytest.mark.parametrize(
    "recipe",
    re.findall(r"^\| (\w+ .+) \| (\S+) \| (\d+b) \| `(.+)` \|$", ACCELERATORS, re.MULTILINE),
)
def test_a_recipe_fits(cli, monkeypatch, recipe):
    hardware, chip, size, flags = recipe
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".95")
    arguments = [f"--config={CONFIGS[size]}", f"--chip={chip}", *flags.split()]
    status, out, err = cli("serve", "--estimate", *arguments)
    assert (status, err) == (0, "")
    assert "fits; " in out.splitlines()[-1]
    count = re.search(r"on each of (\d+) devices", out)
    words = {None: "one", "2": "two", "4": "four", "8": "eight"}
    assert hardware.startswith(f"{words[count and count[1]]} ")
