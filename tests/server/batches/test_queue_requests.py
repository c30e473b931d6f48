"""Workers AI's queue: `?queueRequest=true`, and polling by `request_id`."""

import pytest

from tests.helpers.serving import RUN, serving, wait_until
from tests.helpers.stored_batches import batching

QUEUE = f"{RUN}?queueRequest=true"


def test_requests_are_queued_and_polled_for(demo, tmp_path):
    requests = [
        {"prompt": "What is the capital of France?", "external_reference": "a", "seed": 3},
        {"prompt": "x", "temperature": 99, "external_reference": {"b": 1}},
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "color": "red"},
    ]
    with batching(demo(), tmp_path) as (_, client):
        answer = client.post(QUEUE, json={"requests": requests}).json()
        assert (answer["success"], answer["errors"]) == (True, [])
        queued = answer["result"]
        assert queued.keys() == {"status", "request_id", "model"}
        assert queued["status"] == "queued"
        poll = {"request_id": queued["request_id"]}
        wait_until(lambda: "responses" in client.post(QUEUE, json=poll).json()["result"], 120)
        live = client.post(RUN, json={"prompt": requests[0]["prompt"], "seed": 3}).json()["result"]
        assert client.get("/v1/batches").json()["data"] == []
        assert client.get("/v1/files").json()["data"] == []
        assert not list((tmp_path / "files").iterdir())
    with batching(demo(), tmp_path) as (_, client):  # it is there after a restart
        result = client.post(QUEUE, json=poll).json()["result"]
    first, second, third = result["responses"]
    assert [each["id"] for each in result["responses"]] == [0, 1, 2]
    assert first["result"]["response"] == live["response"]
    assert (first["success"], first["external_reference"]) == (True, "a")
    assert (second["success"], second["external_reference"]) == (False, {"b": 1})
    assert "'/temperature' must be <= 5" in second["errors"][0]["message"]
    assert third["success"]
    assert "color" in third["warnings"][0]
    assert third["external_reference"] is None
    tokens = sum(each["result"]["usage"]["completion_tokens"] for each in (first, third))
    assert result["usage"]["completion_tokens"] == tokens


def test_what_is_wrong_with_a_queue_is_named(llm, tmp_path):
    with batching(llm, tmp_path, max_requests=3) as (_, client):
        for body in ({}, {"prompt": "x"}, {"requests": [], "request_id": "x"}, 5):
            response = client.post(QUEUE, json=body)
            assert response.status_code == 400
            assert "`requests`" in response.json()["errors"][0]["message"]
        for requests in ([], "x", [{}] * 4):
            response = client.post(QUEUE, json={"requests": requests})
            assert response.status_code == 400
            assert "expected a list of 1 to 3 requests" in response.text
        assert client.post(QUEUE, json={"request_id": "none"}).status_code == 404
        assert client.post(f"{RUN}?queueRequest=maybe", json={}).status_code == 400
        body = b'{"requests": [{"prompt": "' + b"x" * 11_000_000 + b'"}]}'
        assert client.post(QUEUE, content=body).status_code == 413


@pytest.mark.parametrize("given", ["false", "FALSE"])
def test_a_request_that_is_not_queued_is_answered_at_once(llm, given):
    with serving(llm) as client:
        body = {"prompt": "hi", "max_tokens": 1}
        result = client.post(f"{RUN}?queueRequest={given}", json=body).json()["result"]
        assert "response" in result
