"""Log-likelihoods of continuations under a model: what zero-shot scores are made of."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from raysparse.config import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Likelihood(NamedTuple):
    """Of a continuation, given its context.

    Attributes:
        logprob: sum of the log-probabilities of its tokens, nats.
        greedy: whether each of them is the likeliest one.
        tokens: how many there are.
        cut: tokens of the context that the model's context had no room for.
    """

    logprob: float
    greedy: bool
    tokens: int
    cut: int


@dataclass(frozen=True)
class Window:
    """A stretch of tokens that the model reads at once, of which the last `predicted` ones count."""

    ids: tuple[int, ...]
    predicted: int


def of_pair(context: str, continuation: str, tokenizer: "PreTrainedTokenizerFast", length: int) -> tuple[list[Window], int]:
    """The window of a context and what follows it, and how many of its first tokens are cut.

    As EleutherAI's lm-evaluation-harness: both texts are encoded together, white space at the end of the context belongs to what follows,
    an empty context is the end of text, and what is too long loses its start.

    Args:
        length: tokens that the model reads at most.

    Raises:
        ConfigError: a continuation that is longer.
    """
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    start = _encode(tokenizer, context)
    whole = _encode(tokenizer, context + continuation)
    start, end = (start, whole[len(start) :]) if start else ([tokenizer.eos_token_id], whole)
    if len(end) > length:
        got = f"{len(end)}: {continuation!r:.60}"
        raise ConfigError(f"Expected a continuation within the context of {length} tokens. Got {got}. Raise the context or drop it.")
    ids = [*start, *end]
    cut = max(0, len(ids) - length - 1)
    return [Window(tuple(ids[cut:]), len(end))], cut


def of_text(text: str, tokenizer: "PreTrainedTokenizerFast", length: int, stride: int) -> tuple[list[Window], int]:
    """Windows over a text that predict every token once, the first one after the end of text: `stride` tokens each, with as much left
    context as `length` leaves. ``stride = length`` is lm-evaluation-harness's rolling log-likelihood."""
    ids = [tokenizer.eos_token_id, *_encode(tokenizer, text)]
    windows, done = [], 1
    while done < len(ids):
        end = min(len(ids), done + (length if done == 1 else stride))
        windows.append(Window(tuple(ids[max(0, end - length - 1) : end]), end - done))
        done = end
    return windows, 0


@torch.no_grad()
def likelihoods(
    model: Callable[..., Tensor],
    requests: Sequence[tuple[list[Window], int]],
    device: torch.device,
    batch_size: int,
    rank: int = 0,
    ranks: int = 1,
    progress: bool = True,
) -> dict[int, list[Likelihood]]:
    """Number of a request -> of each of its windows the likelihood of what counts, of this rank's share of the batches.

    Windows of similar length share a batch, longest first; what is batched together depends on the requests alone.

    Args:
        model: [rows, n] token ids -> [rows, n, vocabulary] logits. Rows are padded on the right, where a causal model does not look.
    """
    from tqdm import tqdm

    windows = [(number, place, window) for number, (parts, _) in enumerate(requests) for place, window in enumerate(parts)]
    order = sorted(range(len(windows)), key=lambda k: -len(windows[k][2].ids))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    found: dict[int, dict[int, Likelihood]] = {}
    for batch in tqdm(batches[rank::ranks], desc="likelihoods", disable=None if progress else True):
        rows = [windows[k] for k in batch]
        longest = max(len(window.ids) for _, _, window in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        for row, (_, _, window) in zip(ids, rows, strict=True):
            row[: len(window.ids)] = torch.tensor(window.ids)
        logits = model(ids[:, :-1].to(device))
        for row, (number, place, window) in zip(logits, rows, strict=True):
            targets = torch.tensor(window.ids[len(window.ids) - window.predicted :], device=device)
            last = len(window.ids) - 1
            scores = F.log_softmax(row[last - window.predicted : last].float(), dim=-1)
            chosen = scores.gather(1, targets[:, None]).double().sum()
            greedy = bool((scores.argmax(-1) == targets).all())
            found.setdefault(number, {})[place] = Likelihood(float(chosen), greedy, window.predicted, requests[number][1])
    return {number: [places[place] for place in sorted(places)] for number, places in found.items()}


def merged(parts: Sequence[dict[int, list[Likelihood]]], count: int) -> Iterator[Likelihood]:
    """Of each request in order the likelihood of all of its windows together, from the shares of the ranks."""
    for number in range(count):
        own = [one for part in parts for one in part.get(number, [])]
        yield Likelihood(sum(one.logprob for one in own), all(one.greedy for one in own), sum(one.tokens for one in own), own[0].cut)


def _encode(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    return cast(list[int], tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []
