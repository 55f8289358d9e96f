"""The official client library of OpenAI against the example server, which runs already.

    pip install openai
    cargo run --release -p candle-lazy --example serve
    python crates/candle-lazy/examples/serve/client.py --url http://127.0.0.1:8080

Asks for everything that the server does, and for what it refuses; prints what comes, and fails where it is not what it should be.
"""

import argparse
import math
import sys
from array import array

import openai


def check(what, condition):
    if not condition:
        sys.exit(f"client: {what}")


def refused(what, kind, call):
    try:
        call()
    except kind as error:
        print(f"{what}: {error.status_code} {error.body['message']}")
        return error
    sys.exit(f"client: {what} is not refused")


def models(client):
    names = [model.id for model in client.models.list()]
    print("models:", ", ".join(names))
    check("a model is found by its name", client.models.retrieve(names[0]).id == names[0])
    return names[0], names[1:-1], names[-1]


def embeddings(client, model):
    texts = ["A man is eating food.", "A man is eating a meal.", "The stock market fell."]
    # the library asks for base64 by itself
    one, two, three = (item.embedding for item in client.embeddings.create(model=model, input=texts).data)
    floats = client.embeddings.create(model=model, input=texts[0], encoding_format="float")
    # both are numbers of 32 bits, which decimals name by their shortest
    check("one text is the same alone and as floats", array("f", floats.data[0].embedding) == array("f", one))

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b))

    check("a vector has length 1", math.isclose(cosine(one, one), 1.0, abs_tol=1e-5))
    print(f"embeddings: {len(one)} numbers, {cosine(one, two):.3f} alike, {cosine(one, three):.3f} unlike")
    check("what is alike is nearer", cosine(one, two) > cosine(one, three))


def completions(client, model):
    ask = {"model": model, "prompt": "The capital of France is", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**ask)
    print(f"completion: {whole.choices[0].text!r} ({whole.choices[0].finish_reason}, {whole.usage.total_tokens} tokens)")
    pieces = [event.choices[0].text for event in client.completions.create(**ask, stream=True)]
    check("a stream is the same text", "".join(pieces) == whole.choices[0].text and len(pieces) > 2)
    stop = whole.choices[0].text[4:9]
    stopped = client.completions.create(**ask, stop=[stop]).choices[0]
    check("it stops before a stop string", stopped.text == whole.choices[0].text.split(stop)[0])
    check("it says so", stopped.finish_reason == "stop")
    echoed = client.completions.create(**{**ask, "max_tokens": 0}, echo=True).choices[0]
    check("the prompt is echoed", echoed.text == ask["prompt"])
    several = {**ask, "temperature": 0.8, "top_p": 0.9, "seed": 5, "n": 2}
    texts = [[choice.text for choice in client.completions.create(**several).choices] for _ in range(2)]
    check("a seed repeats a text", texts[0] == texts[1])


def chats(client, model):
    ask = {
        "model": model,
        "messages": [
            {"role": "system", "content": "Answer in one short sentence."},
            {"role": "user", "content": "What is the capital of France?"},
        ],
        "max_completion_tokens": 24,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**ask)
    print(f"chat with {model}: {whole.choices[0].message.content!r} ({whole.choices[0].finish_reason})")
    text, usage = "", None
    for event in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        if event.choices:
            text += event.choices[0].delta.content or ""
        usage = event.usage or usage
    check("a stream is the same answer", text == whole.choices[0].message.content)
    check("with the same numbers", usage == whole.usage)


def refusals(client, model):
    ask = {"model": model, "prompt": "a", "max_tokens": 2}
    error = refused("an adapter that is not there", openai.NotFoundError, lambda: client.completions.create(**{**ask, "model": "nobody"}))
    check("it has a code", error.code == "model_not_found" and error.param == "model")
    error = refused("logprobs", openai.BadRequestError, lambda: client.completions.create(**ask, logprobs=1))
    check("it names the field", error.param == "logprobs")
    error = refused("a long prompt", openai.BadRequestError, lambda: client.completions.create(**{**ask, "prompt": "word " * 9000}))
    check("it has a code", error.code == "context_length_exceeded")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    messages = [{"role": "user", "content": "a"}]
    refused("tools", openai.BadRequestError, lambda: client.chat.completions.create(model=model, messages=messages, tools=tools))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    client = openai.OpenAI(base_url=f"{parser.parse_args().url}/v1", api_key="none", max_retries=0)
    model, adapters, encoder = models(client)
    embeddings(client, encoder)
    completions(client, model)
    for name in [model, *adapters]:
        chats(client, name)
    refusals(client, model)
    # who leaves a stream ends its text
    with client.completions.create(model=model, prompt="Once", max_tokens=300, stream=True) as stream:
        next(iter(stream))
    print("client: all as it should be")


main()
