"""What a model takes is what its arrays have, and what has no room is refused with the sum."""

import pathlib
import re
import types

import jax
import pytest

from llama_jax import InputError, Llama
from llama_jax.decode import host, memory
from llama_jax.decode.executor import Executor
from llama_jax.decode.plan import Plan
from llama_jax.decode.state_programs import InitState
from llama_jax.nn.kernel_choice import KernelChoice
from llama_jax.nn.sharding import Shards, num_params
from tests.helpers.models import CONFIG, PURE, random_params

BFLOAT16 = Plan("bfloat16", "uint16", KernelChoice("two_rows", "blocks"))


@pytest.mark.parametrize("plan", [PURE, BFLOAT16, PURE._replace(cache="float16")])
@pytest.mark.parametrize(("slots", "context"), [(1, 600), (3, 40)])
def test_a_model_takes_the_bytes_of_its_arrays(plan, slots, context):
    params = random_params(CONFIG)
    ex = Executor(CONFIG, params, "float32", batch=slots, context=context, plan=plan)
    found = memory.needed_memory(CONFIG, plan, slots, context)
    assert found.weights == sum(leaf.nbytes for leaf in jax.tree.leaves(ex.params))
    caches = jax.tree.leaves(ex.programs.shapes(InitState()).cache)
    assert found.caches == sum(leaf.size * leaf.dtype.itemsize for leaf in caches)
    assert found.total == found.weights + found.caches + found.working


def test_a_model_without_room_is_refused_before_its_weights_are_read(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 10_000_000)
    monkeypatch.setattr("llama_jax.llama.load_checkpoint", pytest.fail)
    expected = (
        r"the model needs 1\d\d\.\d\d MB: 4\.20 MB of weights, 134\.22 MB of caches "
        r"\(256 slots of 128 tokens\) and \d+\.\d\d MB to work with; the CPU has 10\.00 MB left; "
        r"choose fewer slots, a smaller context, a 16-bit dtype$"
    )
    with pytest.raises(InputError, match=expected):
        Llama.load(slots=256, context=128)


def test_much_memory_is_said_before_it_is_taken(monkeypatch, capsys):
    Llama.load(progress=True)
    assert "needs" not in capsys.readouterr().err, "the demo model's is not worth a line"
    monkeypatch.setattr(memory, "_MUCH", 10**6)
    monkeypatch.setattr(memory, "free_memory", lambda: 10**9)
    monkeypatch.setattr("llama_jax.llama.load_checkpoint", lambda *_, **__: pytest.fail("enough"))
    with pytest.raises(pytest.fail.Exception):
        Llama.load(progress=True, slots=2)
    assert re.fullmatch(
        r"the model needs \d+\.\d\d MB: .* of caches \(2 slots of 512 tokens\) and .* "
        r"to work with; the CPU has 1\.00 GB left\n",
        capsys.readouterr().err,
    )


def test_devices_of_a_cpu_share_its_memory(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 100)
    cpu = types.SimpleNamespace(platform="cpu")
    assert [memory.available_memory(cpu, count) for count in (1, 4)] == [100, 25]


def test_each_of_several_devices_takes_its_part():
    one, four = (
        memory.needed_memory(CONFIG, PURE, 3, 40, shards) for shards in (Shards(), Shards(2, 2))
    )
    assert four.weights == 4 * num_params(CONFIG, Shards(2, 2))
    assert 1 / 4 < four.weights / one.weights < 1 / 2
    assert four.caches == one.caches / 2


@pytest.mark.parametrize(
    ("stats", "room"), [({"bytes_limit": 100, "bytes_in_use": 30}, 70), ({}, None), (None, None)]
)
def test_a_gpus_room_is_what_jax_may_still_take(stats, room):
    device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    assert memory.available_memory(device) == room


@pytest.mark.parametrize(
    ("files", "free", "total"),
    [
        ({"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   7 kB\n"}, 7 * 1024, 8000),
        ({"/proc/meminfo": "MemAvailable: 7 kB\n", "memory.max": "max\n"}, 7 * 1024, 8000),
        ({"memory.max": "5000\n", "memory.stat": "anon 2000\nfile 900\n"}, 3000, 5000),
        ({"memory.max": "5000\n", "/proc/meminfo": "MemAvailable: 2 kB\n"}, 2048, 5000),
        (
            {"memory/memory.limit_in_bytes": "500\n", "memory/memory.stat": "total_rss 600\n"},
            *(0, 500),
        ),
        ({}, None, 8000),
    ],
)
def test_a_machines_memory_is_the_containers_too(monkeypatch, files, free, total):
    def read_text(self, *_):
        content = files.get(str(self).removeprefix("/sys/fs/cgroup/"))
        if content is None:
            raise FileNotFoundError
        return content

    monkeypatch.setattr(pathlib.Path, "read_text", read_text)
    monkeypatch.setattr(host.os, "sysconf", {"SC_PAGE_SIZE": 4, "SC_PHYS_PAGES": 2000}.get)
    assert host.free_memory() == free
    assert host.total_memory() == total


@pytest.mark.slow
def test_caches_are_allocated_before_the_first_request(monkeypatch):
    llm = Llama.load(slots=2, context=64)
    next(llm.engine.warm_up())  # before the first program
    monkeypatch.setattr(llm.executor, "init_state", pytest.fail)
    assert llm.generate(prompt="Hello", max_tokens=2).tokens
