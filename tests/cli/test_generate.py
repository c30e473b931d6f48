"""One prompt: text or JSON on stdout, the rest on stderr."""

import dataclasses
import json
import re

import pytest

from llama_jax import Llama, Result
from llama_jax.cli.console import indented_json
from llama_jax.cli.verbs import PARAMETERS
from llama_jax.demo import DEMO_CHECKPOINT
from llama_jax.source import CHECKPOINT_VARIABLE
from llama_jax.text.chat import encode_dialog
from tests.helpers import ROOT
from tests.helpers.commands import PARIS, PARIS_ANSWER, run_py


def test_text_goes_to_stdout_and_the_rest_to_stderr():
    done = run_py(PARIS, "--temperature=0")
    assert (done.returncode, done.stdout) == (0, PARIS_ANSWER)
    demo, summary = done.stderr.splitlines()
    assert demo.startswith("no --checkpoint: running the embedded demo model")
    assert re.fullmatch(
        r"load [\d.]+ s \| compile [\d.]+ s \| prefill 14 tokens in [\d.]+ s \([\d,]+ tok/s\) \| "
        r"decode [\d.]+ s \([\d,]+ tok/s, [\d.]+ GB/s of weights\) \| 9 tokens, stop \| float32 \| "
        r"seed (\d+) \(drawn; --seed=\1 repeats this\)",
        summary,
    )


def test_end_tokens_given_end_the_answer(cli, demo):
    tokens = demo.generate(prompt="What is the capital of France?", temperature=0).tokens
    given = f"--eos_tokens=2,{tokens[3]}"
    status, out, _ = cli(PARIS, "--temperature=0", "--output=json", given)
    result = json.loads(out)
    assert (status, result["tokens"], result["finish_reason"]) == (0, tokens[:3], "stop")


@pytest.mark.parametrize("stream", ["--stream", "--nostream"])
def test_streamed_or_not_the_text_is_the_same(cli, stream):
    assert cli(PARIS, "--seed=1", stream)[1] == PARIS_ANSWER


def test_json_has_the_whole_result_and_every_parameter_reaches_the_model(cli, demo):
    values = {
        "max_tokens": 30,
        "temperature": 3.5,
        "top_p": 0.9,
        "top_k": 30,
        "min_p": 0.001,
        "seed": 2**33,
        "repetition_penalty": 1.5,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.25,
        "ignore_eos": True,
        "logprobs": 2,
    }
    flags = [f"--{name}={value}" for name, value in values.items()]
    values["stop"] = ["zebra", "quagga"]
    flags += [f"--stop={text}" for text in values["stop"]]
    allowed = range(3, 1000)
    values |= {"logit_bias": {"5": -100.0, "40": 2.5}, "allowed_tokens": [*allowed]}
    flags += ["--logit_bias=5:-100, 40:2.5", f"--allowed_tokens={','.join(map(str, allowed))}"]
    assert values.keys() == set(PARAMETERS)
    result = json.loads(cli("--prompt=Hi", "--output=json", *flags)[1])
    assert [*result, "record"] == [field.name for field in dataclasses.fields(Result)]
    assert result["parameters"] == values | {"prompt_logprobs": False}
    assert result["tokens"] == demo.generate(prompt="Hi", **values).tokens
    assert [len(entry["top"]) for entry in result["logprobs"]] == [2] * 30


def test_json_has_a_list_of_numbers_on_one_line(cli, demo):
    out = cli("--prompt=[\n1,\n2\n]", "--output=json", "--seed=1", "--logprobs=1")[1]
    result = json.loads(out)
    assert f'"tokens": [{", ".join(map(str, result["tokens"]))}],' in out
    assert out == indented_json(result) + "\n"
    assert out.count("\n") < 15 * len(result["tokens"])


def test_prompt_tokens_are_printed_without_the_weights(cli, demo, monkeypatch):
    monkeypatch.setattr(Llama, "load", None)
    status, out, err = cli("--prompt=Hi", "--system=Be brief.", "--print_prompt_tokens")
    assert status == 0
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert out == ",".join(map(str, encode_dialog(messages, demo.tokenizer))) + "\n"
    assert "▁[ INST ]" in err


def test_without_a_tokenizer_ids_are_printed(cli, bare_checkpoint):
    bare = f"--checkpoint={bare_checkpoint}"
    arguments = [bare, "--prompt_tokens=1,5", "--seed=1", "--max_tokens=3", "--ignore_eos"]
    whole = cli(*arguments, "--nostream")[1]
    assert len(whole.split(",")) == 3
    assert cli(*arguments)[1] == whole


def test_the_environment_names_a_checkpoint_and_the_flag_comes_first(cli, monkeypatch, tmp_path):
    monkeypatch.setenv(CHECKPOINT_VARIABLE, str(tmp_path / "none"))
    assert "none does not exist" in cli(PARIS)[2]
    assert cli(PARIS, f"--checkpoint={DEMO_CHECKPOINT}", "--seed=1")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--temperature=9"], "temperature is 9.0, expected a number from 0 to 5"),
        (["--max_tokens=510"], "but the context holds 512; shorten the prompt"),
        (["--slots=0"], "slots is 0, expected 1 to 256"),
        (["--output=xml"], "--output is 'xml', expected text or json"),
        (["--output=json", "--stream"], "--stream is given with --output=json, which is printed"),
        (["--logprobs=1"], "--logprobs is given without --output=json, which has them; add it"),
        (["--print_prompt_tokens", "--context=9"], "--context is given with --print_prompt_tokens"),
        (["--checkpoint=" + "a" * 5000], "cannot be read (File name too long)"),
        (["--checkpoint=none"], "none does not exist; check the path"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_2(mistake, arguments, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert expected in mistake("--prompt=a", *arguments)
