"""OpenAI's client and Vercel's ai SDK, as they come from npm: two turns, whole and streamed."""

import json
import os
import subprocess

import pytest

from tests.helpers.server_process import TOKEN, served
from tests.helpers.serving import MODEL

ANSWERS = ["The capital of France is Paris.", "The capital of Japan is Tokyo."]

pytestmark = pytest.mark.clients


def test_clients_of_node_hold_a_dialog_whole_and_streamed(node_clients):
    with served() as server:
        done = subprocess.run(
            ["node", node_clients, f"{server.url}/v1", TOKEN, MODEL],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"AI_SDK_LOG_WARNINGS": "false"},
        )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    names = {"openaiWhole", "openaiStream", "vercelWhole", "vercelStream"}
    assert answers == dict.fromkeys(names, ANSWERS)
