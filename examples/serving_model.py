"""A language model with random weights for serving.py: two layers of the gated delta rule.

What it says means nothing, but every token depends on all before it through the states of its
layers, so that a state that is wrong anywhere shows in what comes after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cupy_delta import chunk_delta_rule, recurrent_delta_rule

VOCABULARY, WIDTH, LAYERS, H, HV, K, V = 200, 64, 2, 2, 4, 32, 16
STATE = (HV, K, V)


@dataclass(frozen=True)
class Layer:
    """Weights, as rows of inputs by columns of outputs."""

    q: Any
    k: Any
    v: Any
    write: Any  # beta, before its sigmoid
    forget: Any  # the gate, before its softplus
    out: Any


@dataclass(frozen=True)
class Model:
    """Weights, in arrays of `xp`: NumPy or CuPy."""

    xp: Any
    embedding: Any
    layers: tuple[Layer, ...]

    @staticmethod
    def random(xp, dtype, seed: int = 0) -> Model:
        """Draw the weights; the same ones for every module and dtype."""
        rng = np.random.default_rng(seed)

        def draw(*shape):
            return xp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), dtype)

        def layer():
            columns = (H * K, H * K, HV * V, HV, HV)
            return Layer(*(draw(WIDTH, n) for n in columns), draw(HV * V, WIDTH) * 3)

        embedding = draw(VOCABULARY, WIDTH) * VOCABULARY**0.5
        return Model(xp, embedding, tuple(layer() for _ in range(LAYERS)))

    def logits(self, tokens, rule):
        """Return the logits after each of `tokens` (T,), sequences end to end.

        ``rule(layer, q, k, v, beta, g)`` is the delta rule on the states of a layer, arrays
        (1, T, heads, channels) and (1, T, heads).
        """
        xp, T = self.xp, len(tokens)
        x = self.embedding[tokens]
        for i, layer in enumerate(self.layers):
            y = x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
            q, k = (y @ layer.q).reshape(1, T, H, K), (y @ layer.k).reshape(1, T, H, K)
            v = (y @ layer.v).reshape(1, T, HV, V)
            beta = 1 / (1 + xp.exp(-(y @ layer.write)))
            g = -0.02 * xp.logaddexp(0, y @ layer.forget)
            o = rule(i, q, k, v, beta[None], g[None])
            x = x + o.reshape(T, HV * V) @ layer.out
        return x @ self.embedding.T

    def alone(self, tokens):
        """Return the logits after every token of one request that nothing else is served beside."""

        def rule(layer, *inputs):
            return recurrent_delta_rule(*inputs, qk_l2norm=True).o

        return self.logits(self.xp.asarray(tokens), rule)

    def prefill(self, tokens, pages, checkpoint_every: int, **where):
        """Read prompts; return the logits, and per layer the states after every so many tokens.

        `pages` (slots, layers, HV, K, V) hold the states; `where` says which slots.
        """
        checkpoints = []

        def rule(layer, *inputs):
            result = chunk_delta_rule(
                *inputs,
                qk_l2norm=True,
                state=pages[:, layer],
                checkpoint_every=checkpoint_every,
                **where,
            )
            checkpoints.append(result.checkpoints[0])
            return result.o

        return self.logits(tokens, rule), self.xp.stack(checkpoints, axis=1)
