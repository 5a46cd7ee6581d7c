"""A labeller for fresh labels: a language model behind an OpenAI-compatible API, as vLLM and others serve it.

    pip install openai
    vllm serve Qwen/Qwen2.5-7B-Instruct
    export OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=none JUDGE_MODEL=Qwen/Qwen2.5-7B-Instruct
    r2m train --config run.yaml preferences.labeller=examples/llm_judge.py:label

A pair is asked about twice, the second time with its responses swapped, and the label is the mean: a judge that always
prefers the first place gives 1/2. JUDGE_CALLS bounds the calls of a run, JUDGE_SECONDS the time of each. A pair without
two verdicts, by reason of either, gets no label. Any other error of the API fails the round's labels, and the run says
it.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor

import openai

CALLS = int(os.environ.get("JUDGE_CALLS", 2000))
SECONDS = float(os.environ.get("JUDGE_SECONDS", 30))
AT_ONCE = 8
VERDICTS = {"A": 1.0, "B": 0.0, "TIE": 0.5}
QUESTION = """Which response to the request is better? Think of help, truth and form; length is no merit.

<request>
{prompt}
</request>
<response_A>
{first}
</response_A>
<response_B>
{second}
</response_B>

Answer with one word: A, B, or tie."""

calls = 0  # made so far


def label(pairs):
    """For each pair the probability that the first is better, None where the judge has not said."""
    global calls
    allowed = pairs[: (CALLS - calls) // 2]
    calls += 2 * len(allowed)
    if len(allowed) < len(pairs):
        print(f"llm_judge: JUDGE_CALLS = {CALLS} are spent; {len(pairs) - len(allowed)} pairs get no label", flush=True)
    client = openai.OpenAI(timeout=SECONDS, max_retries=0)
    asked = [(client, pair.prompt, *texts) for pair in allowed for texts in both_orders(pair)]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        verdicts = list(threads.map(lambda question: verdict(*question), asked))
    labels = [
        None if None in (straight, swapped) else (straight + 1 - swapped) / 2
        for straight, swapped in zip(verdicts[::2], verdicts[1::2], strict=True)
    ]
    return labels + [None] * (len(pairs) - len(allowed))


def both_orders(pair):
    return (pair.first, pair.second), (pair.second, pair.first)


def verdict(client, prompt, first, second):
    """1: A is better, 0: B; None after too long a time, or for an answer that says neither."""
    if not isinstance(prompt, str):  # chat messages
        prompt = "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    question = QUESTION.format(prompt=prompt, first=first, second=second)
    try:
        answer = client.chat.completions.create(
            model=os.environ["JUDGE_MODEL"],
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_completion_tokens=16,
        )
    except openai.APITimeoutError:
        return None
    words = re.findall(r"\b(?:A|B|[Tt]ie|TIE)\b", answer.choices[0].message.content or "")
    return VERDICTS[words[-1].upper()] if words else None
