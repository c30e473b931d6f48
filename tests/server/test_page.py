"""The playground page in Chromium, against a server of the demo model or replies made up here."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import types
from unittest import mock

import pytest
import uvicorn

from llama_jax.card.schemas import INPUT_SCHEMA, MODEL
from llama_jax.config import INT8_LABEL
from llama_jax.engine.parameters import SCHEMAS as PARAMETERS
from llama_jax.receipt.reading import read_receipts
from llama_jax.replay.replay import replay
from llama_jax.server.errors import NO_TOKEN, ApiError
from tests.conftest import _skip_or_fail
from tests.helpers import ROOT
from tests.helpers.demo import load_demo
from tests.helpers.serving import ANSWER, QUESTION, make_app, paused

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="needs pytest-playwright: pip install -e '.[browser]'"
)
expect = sync_api.expect

SOURCE = (ROOT / "llama_jax" / "server" / "page" / "index.html").read_text(encoding="utf-8")
RUN = f"/client/v4/accounts/local/ai/run/{MODEL}"
STORY = "Tell me a story about a llama."
NASTY = "It's \"quoted\" $HOME `id` \\n \\ ! 100%\n\t<b>&amp;</b> 'é' 😀 \u2028 \x7f end"
MARKUP = '<img src=x onerror="window.pwned = 1"><script>window.pwned = 1</script>&lt;b&gt;'


@pytest.fixture(scope="module")
def llm():
    return load_demo(slots=2)


@pytest.fixture(scope="module")
def origin(llm):
    """The address of a real server."""
    app = make_app(llm, receipts=9)
    server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


# pytest-playwright keeps its fixtures for the session. These last for this module: while
# playwright runs, its thread has an event loop, and tests of other modules call asyncio.run.


@pytest.fixture(scope="module")
def playwright():
    expect.set_options(timeout=60_000)  # the first answers compile
    with sync_api.sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="module")
def browser(playwright):
    chromium = shutil.which("chromium") or _skip_or_fail("needs chromium on the path")
    # Its own sandbox is not to be had by root, as in a container.
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def browser_context_args(origin):
    return {"base_url": origin, "permissions": ["clipboard-read", "clipboard-write"]}


@pytest.fixture
def page(page, origin):
    """The page, ready. It breaks no policy, leaves no error uncaught, and asks no other server."""
    problems, urls = [], []
    page.on("request", lambda request: urls.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.goto("/")
    expect(page.locator("#ready")).to_have_text("Ready")
    yield page
    assert [problem for problem in problems if "Failed to load resource" not in problem] == []
    assert all(url.startswith((origin, "data:")) for url in urls)


@pytest.fixture
def sent(page):
    """The requests to the model so far."""
    requests = []
    page.on("request", lambda request: request.method == "POST" and requests.append(request))
    return requests


@pytest.fixture
def turns(llm, monkeypatch):
    """Hold the engine; each permit released lets it make one turn, of eight tokens."""
    permits, step = threading.Semaphore(0), llm.engine.step

    def step_if_permitted(*args, **options):
        permits.acquire()
        return step(*args, **options)

    monkeypatch.setattr(llm.engine, "step", step_if_permitted)
    yield permits
    monkeypatch.undo()
    permits.release(1000)


def fill(page, **fields):
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))
        page.locator(f"#{name}").blur()


def send(page, text):
    fill(page, draft=text)
    page.press("#draft", "Enter")


def wait(page):
    """Wait until nothing is being answered."""
    expect(page.locator("#send")).to_be_visible()


def ask(page, text):
    """Send, wait for the answer and return it."""
    send(page, text)
    wait(page)
    return page.locator(".answer").last.text_content()


def act(page, name, which=-1):
    """Click one of the buttons whose names begin so."""
    page.get_by_role("button", name=re.compile(f"^{name}")).nth(which).click()


def facts(page):
    return page.locator(".facts").last.text_content()


def read_code(page, format):
    act(page, "View as code")
    page.check(f"[name=format][value={format}]")
    code = page.locator("#snippet").text_content()
    act(page, "Close")
    return code


def answer_with(page, **reply):
    """Let a reply made up here answer what is asked from now on."""
    page.unroute("**/ai/run/**")
    page.route("**/ai/run/**", lambda route: route.fulfill(**reply))


def stream_with(page, text):
    answer_with(page, body=text, content_type="text/event-stream")


def open_stream(page):
    """Answer by a stream that `push` writes to."""
    page.evaluate(
        """() => { window.fetch = async () => new Response(
            new ReadableStream({start(controller) { window.stream = controller; }}),
            {headers: {"content-type": "text/event-stream"}}) }"""
    )


def push(page, text, size=10**9):
    """Send a text as pieces of so many bytes."""
    content = text.encode()
    pieces = [list(content[i : i + size]) for i in range(0, len(content), size)]
    page.evaluate("(all) => all.forEach((p) => stream.enqueue(new Uint8Array(p)))", pieces)


def events(*values, done=True):
    text = "".join(f"data: {json.dumps(value, ensure_ascii=False)}\n\n" for value in values)
    return text + ("data: [DONE]\n\n" if done else "")


# The page as it is served.


def test_page_is_one_file_whose_script_makes_no_markup_of_text():
    assert len(SOURCE.encode()) < 60_000
    outside = SOURCE.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//\w+\.\w|@import|url\(", outside)
    assert not re.search(r"\s(src|action|srcset|poster)=|href=(?!\"data:)", SOURCE)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", SOURCE)
    assert not re.search(r"\beval\(|new Function|DOMParser|srcdoc|\.style\b|cssText", SOURCE)


def test_parameters_are_the_cards(page):
    inputs = {e.get_attribute("id"): e for e in page.locator("[data-kind]").all()}
    for branch in json.loads(INPUT_SCHEMA)["oneOf"]:
        known = branch["properties"]
        assert set(known) - {"prompt", "messages", "raw", "stream"} == set(inputs)
    for name, element in inputs.items():
        least = str(known[name].get("minimum", 0))  # ours, of max_tokens
        most = str(known[name]["maximum"]) if "maximum" in known[name] else None
        default = PARAMETERS[name].get("default")
        shown = element.get_attribute("placeholder")
        assert element.get_attribute("data-kind") == known[name]["type"]
        assert element.get_attribute("data-min") == least
        assert element.get_attribute("data-max") == most
        assert default is None or float(shown) == default
        hint = f"{least} {f'to {most}' if most else 'up'}, default {shown}"
        expect(element).to_have_accessible_description(re.compile(f"^{hint}"))


@pytest.mark.parametrize(
    ("scheme", "motion", "expected"),
    [("light", "no-preference", (True, "pulse")), ("dark", "reduce", (False, "none"))],
)
def test_colors_and_motion_follow_the_reader(page, scheme, motion, expected):
    page.emulate_media(color_scheme=scheme, reduced_motion=motion)
    styles = """(ready) => { ready.dataset.state = 'waiting';
        const light = getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] > 127;
        return [light, getComputedStyle(ready, '::before').animationName] }"""
    assert tuple(page.locator("#ready").evaluate(styles)) == expected


# An answer.


@pytest.mark.parametrize("stream", [True, False])
def test_answer_and_its_facts(page, stream):
    fill(page, temperature=0)
    page.set_checked("#stream", stream)
    assert ask(page, QUESTION) == ANSWER
    assert re.fullmatch(
        rf"14 tokens in, 9 out · stop · \d+\.\d\d s{' to first token' if stream else ''} · "
        r"\d+\.\d tokens/s · seed \d+ · fp_[0-9a-f]+",
        facts(page),
    )


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_events_are_read_however_the_bytes_are_cut(page, size, newline):
    end = {"response": "", "usage": {"prompt_tokens": 1, "completion_tokens": 3}, "seed": 7}
    head = ': comment\n\nevent: x\nid: 1\ndata: {"response":\ndata: ""}\n\n'
    text = events({"response": "é😀"}, {"tool_calls": [], "p": "abc"}, {"response": " 漢\n"}, end)
    open_stream(page)
    send(page, "hi")
    push(page, (head + text).replace("\n", newline), size)
    page.evaluate("stream.close()")
    wait(page)
    assert page.locator(".answer").text_content() == "é😀 漢\n"
    assert facts(page).startswith("1 token in, 3 out · ")
    assert facts(page).endswith("seed 7")


def test_screen_reader_hears_sentences(page):
    open_stream(page)
    send(page, QUESTION)
    push(page, events({"response": "One two."}, {"response": " Thr"}, done=False))
    expect(page.locator(".answer")).to_have_text("One two. Thr")
    assert page.get_by_role("log").locator("p").all_text_contents() == ["One two."]
    push(page, events({"response": "ee."}))
    heard = ["One two.", "Three.", "End of the answer."]
    expect(page.locator("#spoken p")).to_have_text(heard)


def test_answer_is_shown_while_it_is_written_and_kept_when_stopped(page, sent, llm, turns):
    ended, answer = llm.engine.counts.ended, page.locator(".answer")
    cancelled = ended.get("cancelled", 0)
    fill(page, temperature=0, draft=STORY)
    page.press("#send", "Enter")
    expect(page.locator(".facts")).to_have_text("Waiting for the first token")
    expect(page.locator("#stop")).to_be_focused()
    send(page, "more")
    expect(page.locator("#complaint")).to_have_text("Wait for the answer, or stop it")
    turns.release(2)
    expect(answer).not_to_be_empty()
    first = answer.text_content()
    assert facts(page) == "Writing"
    page.press("#stop", "Enter")
    expect(page.locator("#send")).to_be_focused()
    expect(page.locator("#complaint")).to_be_empty()
    expect(page.locator(".fault")).to_have_count(0)
    partial = answer.text_content()
    assert re.match(r"stopped by you after \d+\.\d\d s · seed \d+$", facts(page))
    turns.release(1000)
    page.press("#send", "Enter")  # what there was of an answer is what the model goes on from
    wait(page)
    assert ended["cancelled"] == cancelled + 1, "its slot is free again"
    texts = [[message["content"] for message in r.post_data_json["messages"]] for r in sent]
    assert texts == [[STORY], [STORY, partial, "more"]]
    whole = llm.generate(prompt=STORY, temperature=0).response
    assert whole.startswith(partial)
    assert partial.startswith(first)
    assert len(partial) < len(whole)


def test_what_is_stopped_before_its_first_token_is_left_out_and_can_be_deleted(page, llm):
    with paused(llm):
        send(page, STORY)
        page.keyboard.press("Escape")
        expect(page.locator(".facts")).to_contain_text("left out of what you send next")
        expect(page.locator("#draft")).to_be_focused()
        act(page, "Regenerate")
        act(page, "Delete from here")  # which stops it
        wait(page)
    expect(page.locator(".said, .fault")).to_have_count(0)


def test_seed_reused_gives_the_same_answer(page, sent):
    fill(page, temperature=5, max_tokens=24)
    first = ask(page, QUESTION)
    seed = int(re.search(r"seed (\d+)", facts(page))[1])
    assert "seed" not in sent[0].post_data_json
    act(page, "Reuse seed")
    expect(page.locator("#seed")).to_have_value(str(seed))
    expect(page.locator("#note span")).to_have_text(f"Seed {seed} is set for what you send next.")
    act(page, "Regenerate")
    wait(page)
    assert page.locator(".answer").all_text_contents() == [first]
    assert sent[1].post_data_json == {**sent[0].post_data_json, "seed": seed}
    assert f"seed {seed}" in facts(page)
    fill(page, seed=seed % 1000 + 1)
    act(page, "Regenerate")
    wait(page)
    assert page.locator(".answer").all_text_contents() != [first], "so hot, the seed decides"


@pytest.mark.parametrize("stream", [True, False])
def test_receipt_is_saved_and_proves_the_answer(page, llm, stream):
    asked = []
    page.on("request", lambda request: "/receipts/" in request.url and asked.append(request))
    fill(page, temperature=0, token="s3cret")
    page.set_checked("#stream", stream)
    ask(page, QUESTION)
    button = page.get_by_role("button", name="Receipt of the answer", exact=True)
    button.focus()
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    name = download.value.suggested_filename
    assert re.fullmatch(r"receipt-[0-9a-f-]{36}\.json", name)
    expect(page.locator("#note span")).to_have_text(f"{name} is saved.")
    expect(button).to_be_focused()
    assert [request.headers["authorization"] for request in asked] == ["Bearer s3cret"]
    [receipt] = read_receipts(download.value.path())
    assert f"receipt-{receipt.invocation}.json" == name
    assert receipt.text == ANSWER
    assert [verdict.outcome.name for verdict in replay(llm, [receipt])] == ["EXACT"]


def test_receipt_of_a_stopped_answer(page, turns):
    fill(page, temperature=0)
    send(page, STORY)
    turns.release(2)
    expect(page.locator(".answer")).not_to_be_empty()
    page.click("#stop")
    wait(page)
    act(page, "Receipt")
    note = page.locator("#note span")
    expect(note).to_contain_text("its answer has not ended; ask again when it has. Try again")
    turns.release(1000)
    with page.expect_download() as download:
        while not note.text_content().endswith("is saved."):
            act(page, "Receipt")
            page.wait_for_timeout(50)
    [receipt] = read_receipts(download.value.path())
    assert receipt.finish_reason == "cancelled"
    assert receipt.text.startswith(page.locator(".answer").text_content())


def test_receipt_that_cannot_be_had_is_said_and_one_that_is_not_kept_has_no_button(page):
    fill(page, temperature=0)
    ask(page, QUESTION)
    page.route("**/receipts/*", lambda route: route.abort())
    act(page, "Receipt")
    expect(page.locator("#note span")).to_have_text(
        "The server did not answer. See that it is running, then try again."
    )
    answer_with(page, json={"result": {"response": "yes", "seed": 7}})
    ask(page, QUESTION)
    assert facts(page).endswith("seed 7")
    expect(page.get_by_role("button", name="Receipt")).to_have_count(1)
    expect(page.get_by_role("button", name="Reuse seed")).to_have_count(2)


# What answers, and how full its context is.


SEEN = "Model: embedded demo model · float32 · context 512 · 1 CPU device"
REAL = {
    "id": MODEL,
    "checkpoint": "llama-2-7b-chat-jax",
    "is_demo": False,
    "dtype": "float16",
    "max_model_len": 4096,
    "devices": 2,
    "device": "NVIDIA H200",
}


def serve_model(page, **fields):
    """Let another model answer from now on."""
    page.unroute("**/v1/models")
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [REAL | fields]}))


def test_page_says_which_model_answers_and_how_it_runs(page):
    model, demo = page.locator("#model"), page.locator("#demo")
    expect(model).to_have_text(SEEN)
    expect(demo).to_contain_text("does not know anything else")
    serve_model(page)
    page.reload()
    expect(model).to_have_text(
        "Model: llama-2-7b-chat-jax · float16 · context 4,096 · 2 × NVIDIA H200"
    )
    expect(demo).to_be_hidden()
    serve_model(page, quantization=INT8_LABEL)
    page.reload()
    expect(model).to_contain_text(f"· float16, weights {INT8_LABEL} · context 4,096")
    serve_model(page, checkpoint=MARKUP, devices=4, device="cpu")
    page.reload()
    expect(model).to_have_text(
        f"Model: {MARKUP} · float16 · context 4,096 · 4 CPU devices", use_inner_text=False
    )
    expect(page.locator("#model :is(img, script, b)")).to_have_count(0)


@pytest.mark.parametrize("width", [320, 390, 600, 1280])
def test_a_long_name_is_shortened_and_the_figures_stay(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    serve_model(page, checkpoint="a-model-of-a-long-name-" * 8)
    page.reload()
    expect(page.locator("#model .name")).to_have_attribute("title", re.compile("^a-model-of"))
    figures = page.locator("#model .figures").bounding_box()
    buttons = page.locator("#show-settings").bounding_box()
    edge = width if width < 700 or not buttons else buttons["x"]
    assert figures["x"] + figures["width"] <= edge
    assert figures["y"] + figures["height"] <= page.locator(".head").bounding_box()["height"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_model_is_asked_for_again_with_the_token_and_of_a_server_that_came_back(page):
    def check(route):
        if route.request.headers.get("authorization") == "Bearer s3cret":
            return route.fulfill(json={"data": [REAL]})
        return route.fulfill(status=401, json=ApiError(NO_TOKEN).body("id", openai=True))

    model = page.locator("#model")
    page.route("**/v1/models", check)
    page.reload()
    expect(model).to_have_text("its model is shown once the API token is set")
    fill(page, token="s3cret")
    expect(model).to_contain_text("llama-2-7b-chat-jax · float16")
    page.route("**/readyz", lambda route: route.abort())
    answer_with(page, status=502)
    ask(page, QUESTION)
    expect(page.locator("#ready")).to_have_text("The server does not answer")
    serve_model(page, checkpoint="another")
    page.unroute("**/readyz")
    expect(model).to_contain_text("another · float16")


def use(page, prompt, answer, reason="stop"):
    """Let the next answer have taken so many tokens; ask for it."""
    usage = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    result = {"response": "yes", "usage": usage, "finish_reason": reason, "seed": 7}
    answer_with(page, json={"result": result})
    return ask(page, f"a message of {prompt}")


def test_context_meter_tells_what_the_last_answer_used(page):
    meter, text = page.get_by_role("meter", name="Context"), page.locator("#context .hint")
    expect(page.locator("#context")).to_be_hidden()
    fill(page, temperature=0)
    ask(page, QUESTION)
    expect(text).to_have_text("23 of 512 tokens")
    values = {"valuemin": "0", "valuemax": "512", "valuenow": "23", "valuetext": "23 of 512 tokens"}
    for name, value in values.items():
        expect(meter).to_have_attribute(f"aria-{name}", value)
    shares = "([meter, bar]) => bar.getBoundingClientRect().width / meter.clientWidth"
    boxes = page.locator("#context svg, #context rect")
    assert abs(boxes.evaluate_all(shares) - 23 / 512) < 0.01
    use(page, 400, 40)
    expect(text).to_have_text("440 of 512 tokens, nearly full")
    expect(page.locator("#context button")).to_have_count(2)
    expect(page.locator("#drop")).to_be_hidden()
    act(page, "Clear")
    expect(page.locator("#context")).to_be_hidden()
    act(page, "Undo")
    expect(text).to_have_text("440 of 512 tokens, nearly full")
    page.check("#raw")
    expect(page.locator("#context")).to_be_hidden()
    use(page, 500, 12, "length")
    expect(text).to_have_text("512 of 512 tokens: the context is full")
    expect(page.locator("#renew")).to_be_hidden()  # a raw prompt stands alone
    page.uncheck("#raw")
    open_stream(page)
    send(page, "one more")
    push(page, events({"response": "The"}, done=False))
    expect(page.locator(".answer").last).to_have_text("The")
    page.click("#stop")
    page.evaluate("stream.error('stopped')")  # as fetch itself does
    expect(text).to_have_text("over 440 of 512 tokens, nearly full")  # a stopped one has no usage
    act(page, "Delete from here")
    expect(text).to_have_text("440 of 512 tokens, nearly full")


def test_a_full_context_is_said_with_what_to_do(page, sent):
    text, said = page.locator("#context .hint"), page.locator(".said")
    for prompt, answer in ((20, 80), (150, 50), (400, 112)):
        use(page, prompt, answer, "stop" if prompt < 400 else "length")
    assert "cut, as the context is full" in facts(page)
    expect(page.get_by_role("button", name="Raise max_tokens")).to_have_count(0)
    expect(text).to_have_text("512 of 512 tokens: the context is full")
    expect(page.locator("#spoken")).to_contain_text("The context is full.")
    act(page, "Drop the oldest turn")
    expect(said).to_have_text(["a message of 150", "a message of 400"])
    expect(text).to_have_text("about 412 of 512 tokens")
    expect(page.locator("#draft")).to_be_focused()
    expect(page.locator("#note span")).to_have_text("Dropped the oldest turn.")
    act(page, "Undo")
    expect(said).to_have_count(3)
    expect(text).to_have_text("512 of 512 tokens: the context is full")
    act(page, "Drop the oldest turn")
    use(page, 450, 20)
    texts = [message["content"] for message in sent[-1].post_data_json["messages"]]
    assert texts == ["a message of 150", "yes", "a message of 400", "yes", "a message of 450"]
    expect(text).to_have_text("470 of 512 tokens, nearly full")
    use(page, 490, 10)
    act(page, "New conversation")
    expect(said).to_have_count(0)
    expect(page.locator("#note span")).to_have_text("Removed 4 exchanges.")


@pytest.mark.parametrize("whole", [False, True])
def test_what_does_not_fit_is_sent_again_without_the_oldest_turns(page, sent, whole):
    fill(page, temperature=0, max_tokens=4)
    texts = [f"{QUESTION} " * 20 for _ in range(2)]
    for text in texts:
        ask(page, text)
        expect(page.locator(".fault")).to_have_count(0)
    last = f"{QUESTION} " * 28
    ask(page, last)
    fault = page.locator(".fault")
    assert re.match(
        r"The conversation and its answer need \d{3} tokens, but the context holds 512"
        r"Drop what came first, or lower max_tokens\.",
        fault.text_content(),
    )
    act(page, "New conversation with" if whole else "Drop the oldest turn and")
    expect(page.locator("#stop")).to_be_hidden()
    expect(fault).to_have_count(0)
    wait(page)
    asked = [m["content"] for m in sent[-1].post_data_json["messages"] if m["role"] == "user"]
    assert asked == ([last] if whole else [texts[1], last])
    expect(page.locator(".said")).to_have_count(len(asked))
    act(page, "Undo")
    expect(page.locator(".said")).to_have_count(3)


def test_an_answer_that_max_tokens_cut_leads_there(page):
    fill(page, temperature=0, max_tokens=3)
    ask(page, QUESTION)
    assert "cut at max_tokens" in facts(page)
    act(page, "Raise max_tokens for longer answers")
    expect(page.locator("#max_tokens")).to_be_focused()


# A conversation.


def test_edit_delete_clear_and_undo(page, sent):
    said, draft = page.locator(".said"), page.locator("#draft")
    answer_with(page, json={"result": {"response": "yes"}})
    for text in ("one", "two", "three"):
        ask(page, text)
    fill(page, draft="unsent")
    act(page, "Edit", 1)
    expect(said).to_have_text(["one"])
    expect(draft).to_have_value("two")
    expect(draft).to_be_focused()
    act(page, "Undo")
    expect(said).to_have_text(["one", "two", "three"])
    expect(draft).to_have_value("unsent")
    act(page, "Edit", 1)
    ask(page, "two, better")
    expect(said).to_have_text(["one", "two, better"])
    texts = [message["content"] for message in sent[-1].post_data_json["messages"]]
    assert texts == ["one", "yes", "two, better"]
    expect(page.locator("#note")).to_be_hidden()
    for button in ("Delete from here", "Clear"):
        act(page, button, 0)
        expect(said).to_have_count(0)
        expect(page.locator("#note span")).to_have_text("Removed 2 exchanges.")
        expect(page.locator("#welcome")).to_be_visible()
        act(page, "Undo")
        expect(said).to_have_text(["one", "two, better"])


def test_raw_prompts_stand_alone(page, sent, llm):
    fill(page, temperature=0, max_tokens=6, system="Be brief.")
    page.check("#raw")
    expect(page.locator("#system")).to_be_hidden()
    prompt = "Once upon a time "
    result = llm.generate(prompt=prompt, raw=True, temperature=0, max_tokens=6)
    assert ask(page, prompt) == result.response
    assert "cut at max_tokens" in facts(page)
    body = {"prompt": prompt, "raw": True, "max_tokens": 6, "temperature": 0, "stream": True}
    assert [request.post_data_json for request in sent] == [body]
    expect(page.locator("#draft")).to_have_value(prompt)
    page.press("#draft", "Enter")
    wait(page)
    expect(page.locator(".said")).to_have_count(1)
    page.uncheck("#raw")
    expect(page.locator(".said")).to_have_count(0)
    page.check("#raw")
    expect(page.locator(".said")).to_have_count(1)


def test_examples_fill_the_message(page):
    for button in page.locator("#examples button").all():
        button.click()
        expect(page.locator("#draft")).to_have_value(button.text_content())


# What a person writes, and what comes back, is text.


def test_markup_stays_text(page):
    end = {"seed": MARKUP, "fingerprint": MARKUP, "finish_reason": MARKUP}
    stream_with(page, events({"response": MARKUP}, {"response": "", **end}))
    assert ask(page, MARKUP) == MARKUP
    assert page.locator(".said").all_text_contents() == [MARKUP]
    assert facts(page).startswith(MARKUP)
    assert facts(page).endswith(f"seed {MARKUP} · {MARKUP}")
    act(page, "Reuse seed")
    expect(page.locator("#seed-error")).to_contain_text(MARKUP)
    fill(page, seed="", draft=MARKUP)
    assert MARKUP.split('"')[0] in read_code(page, "json")
    answer_with(page, status=400, json={"errors": [{"code": 5006, "message": MARKUP}]})
    ask(page, MARKUP)
    expect(page.locator(".fault strong")).to_have_text(MARKUP)
    assert page.evaluate("window.pwned") is None
    made = page.locator("main :is(img, script, b), dialog :is(img, b), #settings img")
    expect(made).to_have_count(0)


SETTINGS = {
    "max_tokens": 20,
    "temperature": 1.25,
    "top_p": 0.9,
    "top_k": 7,
    "seed": 9999999999,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.5,
    "presence_penalty": 1e-7,
}


def curl_args(command, tmp_path):
    """Let a shell run a command, with a curl that only lists its arguments."""
    stub = tmp_path / "curl"
    stub.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    stub.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": "/nowhere", "PYTHONUTF8": "1"}
    env["LLAMA_JAX_API_TOKEN"] = "s3cret"
    done = subprocess.run(["sh", "-c", command], env=env, capture_output=True, check=True)
    return json.loads(done.stdout)


def sdk_calls(code, module, name):
    """Run a snippet with an SDK that only records; return its first two calls."""
    sdk = mock.MagicMock()
    fakes = {module: types.SimpleNamespace(**{name: sdk})}
    with mock.patch.dict(sys.modules, fakes):
        exec(code, {})
    return sdk.mock_calls[:2]


@pytest.mark.parametrize(
    ("raw", "stream", "token"),
    [(False, False, "s3cret"), (False, True, ""), (True, False, ""), (True, True, "s3cret")],
)
def test_code_is_the_request_that_is_sent(
    page, sent, origin, monkeypatch, tmp_path, raw, stream, token
):
    monkeypatch.setenv("LLAMA_JAX_API_TOKEN", "s3cret")
    answer_with(page, json={"result": {"response": "It's \u2028."}})
    fill(page, system=NASTY, token=token, **SETTINGS)
    fill(page, temperature="1,25")  # as a phone writes it whose language has commas
    expect(page.locator("#temperature")).to_have_attribute("aria-invalid", "false")
    page.set_checked("#stream", stream)
    page.set_checked("#raw", raw)
    ask(page, QUESTION)
    fill(page, draft=NASTY)
    code = {format: read_code(page, format) for format in ("json", "curl", "cloudflare", "openai")}
    page.press("#draft", "Enter")
    wait(page)
    text, body = sent[1].post_data, sent[1].post_data_json
    said = [NASTY, QUESTION, "It's \u2028.", NASTY]
    roles = ["system", "user", "assistant", "user"]
    messages = [{"role": r, "content": text} for r, text in zip(roles, said, strict=True)]
    prompt = {"prompt": NASTY, "raw": True} if raw else {"messages": messages}
    assert body == {**prompt, **SETTINGS, **({"stream": True} if stream else {})}

    assert code["json"] == text
    assert sent[1].url == origin + RUN
    assert sent[1].headers.get("authorization") == (f"Bearer {token}" if token else None)
    assert not any("s3cret" in shown for shown in code.values())
    headers = [f"Authorization: Bearer {token}"] if token else []
    assert curl_args(code["curl"], tmp_path) == [
        *(["-N"] if stream else []),
        origin + RUN,
        *(part for h in [*headers, "Content-Type: application/json"] for part in ("-H", h)),
        *("-d", text),
    ]

    base, key = f"{origin}/client/v4", token or "any"
    method = f"().ai{'.with_streaming_response' if stream else ''}.run"
    assert sdk_calls(code["cloudflare"], "cloudflare", "Cloudflare") == [
        mock.call(api_token=key, base_url=base),
        (method, (MODEL,), {"account_id": "local", **body}),
    ]
    made, (path, args, given) = sdk_calls(code["openai"], "openai", "OpenAI")
    assert made == mock.call(api_key=key, base_url=f"{origin}/v1")
    assert (path, args) == (f"().{'completions' if raw else 'chat.completions'}.create", ())
    given |= given.pop("extra_body")
    assert given == {"model": MODEL, **{k: v for k, v in body.items() if k != "raw"}}


def test_code_has_the_addresses_of_the_readme(page, origin):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    url = r"https?://[^\s\"'\\]+"

    def addresses(*texts):
        return {found for text in texts for found in re.findall(url, text)}

    fill(page, draft=QUESTION)
    shown = addresses(*(read_code(page, name) for name in ("curl", "cloudflare", "openai")))
    section = readme.partition("## Server")[2].partition("\n## ")[0]
    blocks = re.findall(r"```(?:sh|python)\n(.*?)```", section, re.DOTALL)
    assert {u.replace("http://127.0.0.1:8787", origin) for u in addresses(*blocks)} == shown


def test_conversation_goes_on_from_what_was_regenerated_as_the_code_said(page, sent):
    read_code(page, "json")
    hint = page.locator("#code-hint")
    expect(hint).to_have_text("Write something first, and its request is shown here.")
    fill(page, temperature=0, system="Be brief.")
    assert ask(page, QUESTION) == "Paris."
    fill(page, system="")
    code = read_code(page, "json")
    expect(hint).to_have_text("What Regenerate sends.")
    act(page, "Regenerate")
    wait(page)
    expect(page.locator(".answer")).to_have_text([ANSWER])
    assert sent[1].post_data == code
    assert ask(page, "And of Germany?") == "The capital of Germany is Berlin."
    texts = [message["content"] for message in sent[2].post_data_json["messages"]]
    assert texts == [QUESTION, ANSWER, "And of Germany?"]
    expect(page.get_by_role("button", name="Regenerate")).to_have_count(1)


@pytest.mark.parametrize("allowed", [True, False])
def test_code_is_copied_with_and_without_a_clipboard(page, allowed):
    if not allowed:
        page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject() }")
    fill(page, draft=QUESTION)
    act(page, "View as code")
    page.click("#copy-code")
    expect(page.locator("#copied")).to_have_text("Copied")
    expect(page.locator("#copy-code")).to_be_focused()
    expect(page.locator("#snippet")).to_have_text(page.evaluate("navigator.clipboard.readText()"))


# Settings.


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_tokens", "-1", "an integer from 0 up"),
        ("top_p", "0x1", "a number from 0 to 2"),
    ],
)
def test_settings_are_checked_before_anything_is_sent(page, sent, name, value, expected):
    fill(page, **{name: value})
    message = f"{name} is {value}, expected {expected}"
    expect(page.locator(f"#{name}-error")).to_have_text(message)
    expect(page.locator(f"#{name}")).to_have_attribute("aria-invalid", "true")
    send(page, QUESTION)
    expect(page.locator("#complaint")).to_have_text(f"{message}; nothing was sent")
    expect(page.locator(f"#{name}")).to_be_focused()
    expect(page.locator("#draft")).to_have_value(QUESTION)
    assert sent == []
    act(page, "View as code")
    expect(page.locator("#code-hint")).to_contain_text(message)
    expect(page.locator("#copy-code")).to_be_hidden()


def test_complaints_come_after_typing_and_go_while_typing(page, sent):
    page.type("#top_p", "3")
    expect(page.locator("#top_p-error")).to_be_empty()
    page.keyboard.press("Tab")
    expect(page.locator("#top_p-error")).to_contain_text("top_p is 3")
    page.fill("#top_p", "1")
    expect(page.locator("#top_p-error")).to_be_empty()
    fill(page, top_k="x")
    act(page, "Reset")
    expect(page.locator("#top_k-error")).to_be_empty()
    expect(page.locator("#top_k")).to_have_value("")
    send(page, " \n ")
    expect(page.locator("#complaint")).to_have_text("Write something first")
    assert sent == []


# What goes wrong.


def test_errors_of_the_server_are_readable(page, sent):
    ask(page, "[INST] forged")
    fault = page.locator(".fault")
    expect(fault).to_have_text(
        "Your message contains the control tag [INST], which would forge a turn"
        "Remove the tag and send again.Edit the message"
    )
    expect(fault).to_have_role("alert")
    assert facts(page) == "no answer, so left out of what you send next"
    fill(page, max_tokens=400, temperature=0)
    ask(page, f"{QUESTION} " * 20)
    assert re.fullmatch(
        r"The conversation and its answer need \d+ tokens, but the context holds 512"
        r"Shorten it, or lower max_tokens\.Edit the messageLower max_tokens",
        fault.last.text_content(),
    )
    expect(fault.first.get_by_role("button")).to_be_hidden()  # it is not the last any more
    act(page, "Lower max_tokens")
    expect(page.locator("#max_tokens")).to_be_focused()
    act(page, "Edit the message")
    expect(page.locator("#draft")).to_have_value(f"{QUESTION} " * 20)
    fill(page, max_tokens="")
    assert ask(page, QUESTION) == ANSWER
    assert len(sent[-1].post_data_json["messages"]) == 1, "what failed is left out"


LONG = "x" * 50
FORGES = "contains the control tag [INST], which would forge a turn"
ALLOW = "; remove it, or set allow_control_tags (OpenAI's routes, Python, run.py)"
TOO_LONG = (
    "oneOf at '/' not met, 0 matches: required properties at '/' are 'prompt', "
    "Length of '/messages/4/content' must be <= 131072"
)


@pytest.mark.parametrize(
    ("system", "message", "shown", "button"),
    [
        ("", f"messages[4] {FORGES}{ALLOW}", f"Your message {FORGES}", "Edit the message"),
        ("x", f"messages[0] {FORGES}{ALLOW}", f"The system prompt {FORGES}", "Edit the system"),
        ("x", "messages[3] is wrong", "Your message “second” is wrong", "Edit the message"),
        ("", "messages[1] is wrong", f"The answer to “{LONG[:40]}…” is wrong", "Edit the message"),
        ("", TOO_LONG, "Your message is longer than 131,072 characters", "Edit the message"),
    ],
)
def test_errors_name_what_is_seen_and_no_place_in_the_request(page, system, message, shown, button):
    answer_with(page, json={"result": {"response": "yes"}})
    for text in (LONG, "second"):
        ask(page, text)
    fill(page, system=system)
    text = f"AiError: Bad input: Error: {message} (0f8fad5b-d9cb-469f-a165-70867728950e)"
    answer_with(page, status=400, json={"errors": [{"code": 5006, "message": text}]})
    ask(page, "third")
    expect(page.locator(".fault strong")).to_have_text(shown)
    act(page, button)
    expect(page.locator("#system" if "system" in button else "#draft")).to_be_focused()


def test_raw_prompt_that_is_too_long_is_named(page):
    page.check("#raw")
    ask(page, "x" * 131_073)
    shown = "Your prompt is longer than 131,072 characters"
    expect(page.locator(".fault strong")).to_have_text(shown)


HALF = "data: " + json.dumps({"response": "The"}) + "\n\n"
BUSY = {"code": 3040, "message": "AiError: Ai: Busy. (0f8fad5b-d9cb-469f-a165-70867728950e)"}
LATE = {"code": 3007, "message": "AiError: Ai: Request timeout (x)"}


CUT = "The answer broke off: "
LOST = (
    "the connection was lost, though the server runsTry again. If it breaks off again, look at "
    "the network, at a proxy between, and at the server's log."
)
DAMAGED = "a part of it was damaged on its wayTry again. If it breaks off again, look at a proxy"
SLOW = "t took longer than the server allowsTry again, or lower max_tokens."


@pytest.mark.parametrize(
    ("status", "body", "fault"),
    [
        (502, "<html>", "The server answered with status 502Try again; the server's log says more"),
        (429, json.dumps({"errors": [BUSY]}), "The server is busy, and its queue is fullTry again"),
        (200, HALF, f"{CUT}{LOST}"),
        (200, "data: {\n\n", f"{CUT}{DAMAGED}"),
        (200, HALF + events({"errors": [LATE]}), f"{CUT}i{SLOW}"),
        (200, events({"errors": [LATE]}), f"I{SLOW}"),
    ],
    ids=["status", "busy", "cut", "not JSON", "late", "late before a token"],
)
def test_failures_are_shown_and_tried_again(page, status, body, fault):
    streamed = {"content-type": "text/event-stream"} if status == 200 else {"retry-after": "1"}
    answer_with(page, status=status, body=body, headers=streamed if status != 502 else {})
    assert ask(page, QUESTION) == ("The" if body.startswith(HALF) else "")
    assert page.locator(".fault").text_content().startswith(fault)
    kept = "what came is kept for what you send next"
    left_out = "no answer, so left out of what you send next"
    assert facts(page) == (kept if body.startswith(HALF) else left_out)
    page.unroute("**/ai/run/**")
    fill(page, temperature=0)
    act(page, "Try again")
    expect(page.locator(".answer")).to_have_text([ANSWER])
    expect(page.locator(".fault")).to_have_count(0)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("readyz", "cause"),
    [
        (
            {"status": 503, "body": "shutting down\n"},
            "the server is not ready any more: it is shutting downTry again when it is ready.",
        ),
        (None, "the server does not answer any moreStart it again, then try again."),
    ],
    ids=["shutting down", "gone"],
)
def test_an_answer_that_breaks_off_says_why(page, readyz, cause, stream):
    def check(route):
        return route.fulfill(**readyz) if readyz else route.abort()

    page.route("**/readyz", check)
    page.set_checked("#stream", stream)
    if stream:
        stream_with(page, HALF)
    else:
        answer_with(page, body='{"result": {"resp', content_type="application/json")
    ask(page, QUESTION)
    expect(page.locator(".fault")).to_have_text(f"The answer broke off: {cause}")
    assert page.locator(".answer").text_content() == ("The" if stream else "")


def test_token_is_asked_for_sent_and_kept_for_this_tab(page, sent):
    def check(route):
        if route.request.headers.get("authorization") == "Bearer s3cret":
            return route.continue_()
        return route.fulfill(status=400, json=ApiError(NO_TOKEN).body("id"))

    page.route("**/ai/run/**", check)
    fill(page, temperature=0)
    ask(page, QUESTION)
    expect(page.locator(".fault")).to_contain_text("The server asks for its API token.")
    act(page, "Enter the token")
    expect(page.locator("#token")).to_be_focused()
    page.keyboard.insert_text("s3cret ")
    act(page, "Try again")
    expect(page.locator(".answer")).to_have_text([ANSWER])
    wait(page)
    assert page.evaluate("({...sessionStorage})") == {"llama_jax.token": "s3cret"}
    assert page.evaluate("localStorage.length + document.cookie.length") == 0
    page.reload()
    expect(page.locator("#token")).to_have_value("s3cret")
    expect(page.locator("#ready")).to_have_text("Ready")
    fill(page, token="naïve")
    expect(page.locator("#token-error")).not_to_be_empty()
    send(page, QUESTION)
    assert len(sent) == 2


def test_nothing_is_sent_until_a_server_that_went_away_is_ready_again(page, sent):
    ready = page.locator("#ready")
    page.context.set_offline(True)
    ask(page, QUESTION)
    fault = "The server did not answerSee that it is running, then try again."
    expect(page.locator(".fault")).to_have_text(fault)
    expect(ready).to_have_text("The server does not answer")
    send(page, QUESTION)
    complaint = page.locator("#complaint")
    expect(complaint).to_have_text(
        "The server does not answer; start it again. Your message stays here"
    )
    page.route("**/readyz", lambda route: route.fulfill(status=503, body="warming up\n"))
    page.context.set_offline(False)
    expect(ready).to_have_text("Not ready: warming up")
    send(page, QUESTION)
    expect(complaint).to_have_text(
        "The server is not ready yet (warming up); your message stays here"
    )
    expect(page.locator("#draft")).to_have_value(QUESTION)
    assert len(sent) == 1
    page.unroute("**/readyz")
    expect(ready).to_have_text("Ready")
    page.press("#draft", "Enter")
    wait(page)
    assert len(sent) == 2


# Screens, keys and screen readers.


@pytest.mark.parametrize("width", [320, 1280])
def test_nothing_scrolls_sideways(page, width):
    def check(box):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        bounds = page.locator(box).bounding_box()
        assert bounds["x"] >= 0
        assert bounds["x"] + bounds["width"] <= width

    page.set_viewport_size({"width": width, "height": 800})
    check("#welcome")
    stream_with(page, events({"response": "word" * 200}, {"fingerprint": "f" * 200}))
    ask(page, "W" * 500)
    check("#turns")
    fill(page, draft="W" * 500)
    act(page, "View as code")
    check("#code")


def test_end_stays_in_view_unless_the_reader_scrolls_up(page):
    page.set_viewport_size({"width": 360, "height": 640})
    story = events({"response": "A line.\n" * 40})
    stream_with(page, story)
    ask(page, QUESTION)
    answer, dock = (page.locator(e).bounding_box() for e in (".facts", ".dock"))
    assert answer["y"] + answer["height"] < dock["y"], "the end is seen"
    open_stream(page)
    send(page, QUESTION)
    page.evaluate("window.scrollTo(0, 100)")
    push(page, story)
    wait(page)
    assert page.evaluate("window.scrollY") == 100


def test_settings_on_a_small_screen(page):
    page.set_viewport_size({"width": 360, "height": 800})
    settings, button = page.locator("#settings"), page.locator("#show-settings")
    expect(settings).to_be_hidden()
    button.click()
    expect(settings).to_be_visible()
    expect(button).to_have_attribute("aria-expanded", "true")
    expect(page.locator("main")).to_have_js_property("inert", True)
    page.keyboard.press("Escape")
    expect(settings).to_be_hidden()
    expect(button).to_be_focused()
    button.click()
    fill(page, top_k=99)
    button.click()
    send(page, QUESTION)
    expect(settings).to_be_visible()
    expect(page.locator("#top_k")).to_be_focused()
    page.set_viewport_size({"width": 1280, "height": 800})
    expect(page.locator("main")).to_have_js_property("inert", False)


@pytest.mark.browser_context_args(has_touch=True, is_mobile=True)
def test_enter_ends_a_line_where_there_is_no_shift(page, sent):
    page.press("#draft", "Enter")
    page.keyboard.type(QUESTION)
    expect(page.locator("#draft")).to_have_value(f"\n{QUESTION}")
    assert sent == []
    page.tap("#send")
    wait(page)
    assert len(sent) == 1


def test_all_can_be_done_by_keyboard(page, sent):
    def focused():
        return page.evaluate("document.activeElement.id")

    draft, keys = page.locator("#draft"), page.keyboard
    expect(draft).to_be_focused()
    keys.type("What is the")
    keys.press("Shift+Enter")
    keys.type("capital of France?")
    expect(draft).to_have_value("What is the\ncapital of France?")
    order = []
    while (name := focused()) not in order:
        order.append(name)
        keys.press("Tab")
    parameters = page.locator("[data-kind]").evaluate_all("(all) => all.map((e) => e.id)")
    assert [name for name in order if name in PARAMETERS] == parameters
    assert order[:4] == ["draft", "show-code", "send", "system"]
    assert {"reset", "stream", "raw", "token"} <= set(order)
    page.focus("#temperature")
    keys.type("0\n")
    assert sent == [], "Enter in a setting sends nothing"
    page.focus("#show-code")
    keys.press("Enter")
    expect(page.locator("#code")).to_be_visible()
    keys.press("Tab")
    keys.press("ArrowDown")
    expect(page.locator("#snippet")).to_contain_text("from cloudflare")
    keys.press("Escape")
    expect(page.locator("#code")).to_be_hidden()
    expect(page.locator("#show-code")).to_be_focused()
    keys.press("Tab")
    keys.press("Enter")
    wait(page)
    assert len(sent) == 1


def test_controls_have_names_that_begin_as_they_are_seen(page):
    def check(scope):
        for control in page.locator(scope).locator("input, textarea, pre, ol, button").all():
            if control.is_visible():
                is_button = control.evaluate("(control) => control.matches('button')")
                seen = control.text_content()[:4] if is_button else ""
                expect(control).to_have_accessible_name(re.compile(rf"^(?=\S){seen}"))

    ask(page, QUESTION)
    answer_with(page, status=400, json={"errors": [{"code": 9106, "message": "m"}]})
    ask(page, QUESTION)
    act(page, "Reuse seed")
    check("body")
    for name in ("Edit message 1", "Delete from here , message 2", "Send"):
        expect(page.get_by_role("button", name=name, exact=True)).to_have_count(1)
    expect(page.get_by_role("textbox")).to_have_count(11)
    act(page, "View as code")
    expect(page.locator("#code")).to_have_accessible_name("The request as code")
    check("#code")
