"""A world small enough for exact numbers: a tiny decoder, all of whose responses are listed."""

import jax
import numpy as np
from scipy.special import softmax

from jaxalign.evaluation import Verdicts
from jaxalign.models import DecoderConfig
from jaxalign.models.decoder import init_params
from jaxalign.models.responses import response_log_probs
from jaxalign.rows import ResponseRows

LETTERS, END = "abcd", 1
PROMPT = (3, 2)  # two tokens: after one alone, the same again would leave the state as it was
CONFIG = DecoderConfig(
    vocab_size=len(LETTERS),
    width=16,
    layers=1,
    heads=2,
    kv_heads=2,
    head_width=8,
    mlp_width=32,
    context_length=16,
    initializer_range=0.3,
)
CYCLE = {(0, 1): 0.9, (1, 2): 0.8, (2, 0): 0.7}  # a skewed circle of three kinds


class Tokenizer:
    """Tokens are letters."""

    eos_token_id = END

    def encode(self, text, add_special_tokens):
        return [LETTERS.index(letter) for letter in text]

    def decode(self, tokens, skip_special_tokens, clean_up_tokenization_spaces=False):
        return "".join(LETTERS[token] for token in tokens)


class World:
    """All responses of at most so many tokens to one prompt, and who beats whom."""

    def __init__(self, most, *, seed=7):
        self.most = most
        self.responses = [(END,)] if most > 1 else [(token,) for token in range(len(LETTERS))]
        if most > 1:
            self.responses += [(a, b) for a in (0, 2, 3) for b in range(len(LETTERS))]
        # the end token is no part of a text
        self.names = [
            Tokenizer().decode([token for token in response if token != END], True)
            for response in self.responses
        ]
        kinds = [number % 3 for number in range(len(self.responses))]
        win = np.full((len(kinds), len(kinds)), 0.5)
        for i, one in enumerate(kinds):
            for j, other in enumerate(kinds):
                if (one, other) in CYCLE:
                    win[i, j], win[j, i] = CYCLE[one, other], 1 - CYCLE[one, other]
        self.win = win
        self.params = init_params(CONFIG, jax.random.key(seed))

    def rows(self):
        """All responses after the prompt."""
        number = len(self.responses)
        before = len(PROMPT)
        tokens = np.zeros((number, before + self.most), np.int32)
        tokens[:, :before] = PROMPT
        for row, response in enumerate(self.responses):
            tokens[row, before : before + len(response)] = response
        lengths = np.array([len(response) for response in self.responses], np.int32)
        return ResponseRows(
            tokens=tokens,
            prompt_length=np.full(number, before, np.int32),
            response_tokens=tokens[:, before:],
            response_length=lengths,
        )

    def log_probs(self, params):
        """Token log-probs of all responses, [responses, most]."""
        return np.asarray(_log_probs(params, self.rows()), np.float64)

    def policy(self, params):
        """Probabilities of all responses, to float32's precision."""
        probabilities = np.exp(self.log_probs(params).sum(-1))
        assert abs(probabilities.sum() - 1) < 1e-5
        return probabilities / probabilities.sum()

    def mixture(self, policy, reference, beta):
        """Probabilities of the responses where every token is drawn from the geometric mixture."""
        first = np.array([response[0] for response in self.responses])

        def by_token(policy):
            """Of each response's first token, and of what follows it."""
            begun = np.array([policy[first == token].sum() for token in first])
            return begun, policy / begun

        mixed = [
            x ** (1 - beta) * y**beta
            for x, y in zip(by_token(policy), by_token(reference), strict=True)
        ]
        kinds = np.unique(first, return_index=True)[1]
        rest = np.array([mixed[1][first == token].sum() for token in first])
        return mixed[0] / mixed[0][kinds].sum() * mixed[1] / rest

    def target(self, tau, beta):
        """What IPO-MD and Nash-MD-PG learn: the best response to its own token-wise mixture."""
        reference = self.policy(self.params)
        ratio = np.zeros(len(reference))
        for _ in range(20_000):
            policy = softmax(np.log(reference) + ratio)
            gain = self.win @ self.mixture(policy, reference, beta) / tau
            ratio += 0.02 * (gain - gain.mean() - ratio)
        assert np.abs(gain - gain.mean() - ratio).max() < 1e-9
        return policy

    def preferences(self, prompts, first, second):
        """As an annotator."""
        at = {name: number for number, name in enumerate(self.names)}
        said = [self.win[at[x], at[y]] for x, y in zip(first, second, strict=True)]
        return Verdicts(preference=np.array(said), reasons=("",) * len(said))

    def rewards(self, prompts, responses):
        """As an annotator: the number of letters a."""
        return np.array([float(response.count("a")) for response in responses])


@jax.jit
def _log_probs(params, rows):
    return response_log_probs(params, CONFIG, rows).log_prob
