"""Pick the likeliest answer: python examples/score.py MODEL "prompt" ANSWER ANSWER ..."""

import sys

from lowbit import Client

model, prompt, *answers = sys.argv[1:]
with Client() as client:
    tokens = [client.tokenize(model, one, add_special_tokens=False).token_ids for one in answers]
    scores = client.score(model, prompt, continuations=tokens).scores
    for answer, score in zip(answers, scores, strict=True):
        # Per token, so that a long answer is not at a disadvantage.
        print(f"{score.logprob / len(score.token_logprobs):8.3f}  {answer!r}")
