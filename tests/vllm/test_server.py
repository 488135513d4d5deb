"""`beagle-sd serve` over HTTP: the own loop's texts, streamed, to several clients, and whatever these do."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from vllm_engines import INTERPRETED, ROWS, own_answers, smollm

NEW_TOKENS = 32


class Server:
    """A running `beagle-sd serve`."""

    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}"

    def post(self, path: str, body: dict):
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=240)

    def complete(self, ids: list[int], **more) -> str:
        body = {"model": "smollm2-135m", "prompt": ids, "max_tokens": NEW_TOKENS, "temperature": 0, **more}
        return json.load(self.post("/v1/completions", body))["choices"][0]["text"]

    def stream(self, ids: list[int]) -> str:
        body = {"model": "smollm2-135m", "prompt": ids, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True}
        parts = []
        for line in self.post("/v1/completions", body):
            if line.startswith(b"data: {"):
                parts.append(json.loads(line[6:])["choices"][0]["text"])
        assert len(parts) > 2
        return "".join(parts)

    def metric(self, name: str) -> float:
        text = urllib.request.urlopen(self.url + "/metrics", timeout=60).read().decode()
        return sum(float(value) for value in re.findall(rf"^{name}{{.*}} (\S+)$", text, re.M))


@contextmanager
def serving(*options: str, **environment: str):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "beagle_sd", "serve", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "512", "--max-num-seqs", "2", "--max-num-batched-tokens", "512", "--enforce-eager"]
    process = subprocess.Popen([*command, *options], env=os.environ | environment, start_new_session=True)
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}/health")
        yield Server(port), process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        assert ended(process.pid, 60), "processes of the server are left"


def wait_until_ready(process, url: str) -> None:
    for _ in range(240):
        assert process.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError("the server did not start in four minutes")


def ended(group: int, seconds: int) -> bool:
    """Whether no process of the server's session is left; kills those that are."""
    for _ in range(seconds):
        left = subprocess.run(["pgrep", "-s", str(group)], capture_output=True, text=True).stdout.split()
        states = [subprocess.run(["ps", "-o", "stat=", pid], capture_output=True, text=True).stdout for pid in left]
        if all(state.startswith("Z") or not state for state in states):
            return True
        time.sleep(1)
    os.killpg(group, signal.SIGKILL)
    return False


@pytest.fixture(scope="module")
def server():
    with serving() as (running, _):
        yield running


@pytest.fixture(scope="module")
def written(texts) -> list[str]:
    """What our own loop writes."""
    tokenizer = smollm()[1]
    answers = own_answers(texts[: 2 * ROWS], NEW_TOKENS)
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers.tokens]


def test_texts_streamed_and_whole_to_two_clients_at_once(server, texts, written):
    with ThreadPoolExecutor(2) as clients:
        streamed = list(clients.map(server.stream, texts[:4]))
    assert streamed == written[:4]
    assert server.complete(texts[0]) == written[0]
    assert server.metric("vllm:spec_decode_num_drafts_total") > 0
    assert server.metric("vllm:spec_decode_num_accepted_tokens_total") > 0


def test_a_chat_by_the_openai_client(server, texts, written):
    from openai import OpenAI

    from bench.answers.real_prompts import evaluation_prompts

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    question = evaluation_prompts("mt-bench")[0]["turns"][0]
    chat = [{"role": "user", "content": question}]
    answer = client.chat.completions.create(model="smollm2-135m", messages=chat, max_tokens=NEW_TOKENS, temperature=0)
    assert answer.choices[0].message.content == written[0]


def test_a_client_that_goes_away_and_a_full_queue(server, texts, written):
    body = {"model": "smollm2-135m", "prompt": texts[0], "max_tokens": 300, "temperature": 0, "stream": True}
    for _ in range(3):
        response = server.post("/v1/completions", body | {"ignore_eos": True})
        response.readline()
        response.close()
    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(server.complete, texts[:8])) == written[:8]
    for _ in range(30):
        if server.metric("vllm:num_requests_running") == 0:
            return
        time.sleep(1)
    raise AssertionError("requests of clients that went away still run")


def test_ended_in_the_middle_of_an_answer_nothing_is_left(texts):
    with serving() as (running, process):
        body = {"model": "smollm2-135m", "prompt": texts[0], "max_tokens": 300, "temperature": 0, "stream": True}
        running.post("/v1/completions", body).readline()
        process.send_signal(signal.SIGINT)
        process.wait(60)


def test_coupled_by_the_extra_arguments_of_a_request(texts):
    tokenizer = smollm()[1]
    (tokens,) = own_answers(texts[:1], 16, temperature=0.7, top_p=0.9, seed=4).tokens
    extra = {"beagle_temperature": 0.7, "beagle_top_p": 0.9, "beagle_seed": 4}
    path = os.pathsep.join([INTERPRETED["PYTHONPATH"], os.environ.get("PYTHONPATH", "")])
    with serving("--coupled", **(INTERPRETED | {"PYTHONPATH": path})) as (running, _):
        text = running.complete(texts[0], max_tokens=16, vllm_xargs=extra)
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            running.complete(texts[0], vllm_xargs={"beagle_seed": 4})
        assert "beagle_seed given without beagle_temperature" in refused.value.read().decode()


def test_what_cannot_be_served_is_one_line(tmp_path):
    command = [sys.executable, "-m", "beagle_sd", "serve", "--pipeline-parallel-size", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout.count("\n") == 1
    assert done.stdout.startswith("error: pipeline_parallel_size is 2; allowed with a Beagle draft: 1")


def test_past_the_command_the_plug_in_refuses_by_itself(tmp_path):
    from vllm_engines import engine, save_tiny

    target, draft = save_tiny(tmp_path, append_states=False)
    settings = {"method": "eagle", "model": str(draft), "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match="append_states=False; allowed in vLLM: True"):
        with engine(target, settings, skip_tokenizer_init=True, max_model_len=256):
            pass
