"""A labeller for fresh labels that needs no model: is the number at the end of a response the sum in its prompt?

r2m train --config run.yaml preferences.labeller=examples/verifier.py:label
"""

import re


def right(prompt, response):
    numbers = re.findall(r"-?[0-9]+", response)
    return bool(numbers) and int(numbers[-1]) == sum(map(int, re.findall(r"[0-9]+", prompt)))


def label(pairs):
    scores = [(right(pair.prompt, pair.first), right(pair.prompt, pair.second)) for pair in pairs]
    return [None if first == second else float(first) for first, second in scores]
