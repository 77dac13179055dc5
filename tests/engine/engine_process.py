"""Real vLLM engines, forked from one process that has imported vLLM already: it takes longer than all else.

    python engine_process.py SOCKET

Each connection to the socket is one engine. It begins with one JSON object on a line: `llm`, the arguments of `LLM`;
`env`, more environment; `log`, the file for its output. Then one object a line, answered by one: `{"do": "generate" |
"reset" | "run" | "close", ...}`. While it generates it also says `{"batch": n}` after each batch.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from typing import Any

import vllm.v1.worker.cpu_model_runner  # noqa: F401  (before engines are forked)
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.engine import core  # noqa: F401

DROP_S = 30.0


def connector_of(llm: Any) -> Any:
    """The scheduler's half, where it runs in this process."""
    inner = getattr(llm.llm_engine.engine_core, "engine_core", None)
    return inner.scheduler.connector if inner is not None else None


class Process:
    """See the module's docstring."""

    def __init__(self, llm: Any, say: Any) -> None:
        self.llm = llm
        self._say = say
        self.names: dict[str, Any] = {"llm": llm, "connector": connector_of(llm)}

    def generate(
        self, requests: list[dict[str, Any]], max_tokens: int, batch: int, reset_every: int = 0
    ) -> dict[str, Any]:
        """Serve the requests, `batch` at a time; vLLM's own cache is dropped before every `reset_every`th batch."""
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        tokens, cached, seconds = [], [], []
        for number, at in enumerate(range(0, len(requests), batch)):
            if reset_every and number % reset_every == 0:
                self._drop()
            part = requests[at : at + batch]
            prompts = [
                {"prompt_token_ids": one["tokens"]} | ({"cache_salt": one["salt"]} if one.get("salt") else {})
                for one in part
            ]
            adapters = [LoRARequest(*one["lora"]) if one.get("lora") else None for one in part]
            began = time.perf_counter()
            outputs = self.llm.generate(
                prompts, sampling, use_tqdm=False, lora_request=adapters if any(adapters) else None
            )
            seconds.append(time.perf_counter() - began)
            tokens += [list(output.outputs[0].token_ids) for output in outputs]
            cached += [output.num_cached_tokens for output in outputs]
            self._say({"batch": number})
        return {"tokens": tokens, "cached": cached, "seconds": seconds}

    def _drop(self) -> None:
        """vLLM's own cache, which stays while a connector holds blocks of finished requests: let it end its stores."""
        client, deadline = self.llm.llm_engine.engine_core, time.monotonic() + DROP_S
        while not self.llm.reset_prefix_cache():
            if time.monotonic() >= deadline:
                raise RuntimeError("vLLM's own cache could not be dropped: blocks are held")
            if hasattr(client, "engine_core"):  # it steps when it is told to
                client.get_output()
            else:
                time.sleep(0.01)

    def reset(self, *, connector: bool = False) -> dict[str, Any]:
        """Drop vLLM's own cache; with `connector`, the connector's too."""
        return {"ok": self.llm.reset_prefix_cache(reset_connector=connector)}

    def run(self, code: str) -> dict[str, Any]:
        """Run Python that may set `answer`; `llm`, `connector` and what former code named are there."""
        self.names["answer"] = None
        exec(code, self.names)
        return {"answer": self.names["answer"]}

    def close(self) -> dict[str, Any]:
        self.llm.llm_engine.engine_core.shutdown()
        return {}


def serve(connection: socket.socket) -> None:
    """Be one engine. In a process of its own."""
    orders, answers = connection.makefile("r"), connection.makefile("w")

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    arguments = json.loads(orders.readline())
    log = os.open(arguments["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(arguments["env"])
    say({"pid": os.getpid()})
    process = Process(LLM(**arguments["llm"]), say)
    say({"ready": True})
    for line in orders:
        order = json.loads(line)
        name = order.pop("do")
        try:
            say({"done": getattr(process, name)(**order)})
        except BaseException:
            say({"failed": traceback.format_exc()})
        if name == "close":
            break


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for engines
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(sys.argv[1])
    listening.listen()
    while True:
        connection, _ = listening.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listening.close()
            os.setsid()
            try:
                serve(connection)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        connection.close()


if __name__ == "__main__":
    main()
