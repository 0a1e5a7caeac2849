"""E2E (Novikova et al. 2017): the attributes of a restaurant to a text, as LoRA and SPDF fine-tune on it."""

import re
from collections.abc import Sequence
from typing import Any, Literal

from raysparse.data import files
from raysparse.tasks.metrics import MetricName
from raysparse.tasks.tables import Layout, TableTask

_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}


class E2E(TableTask):
    """Meaning representations in LoRA's form to one of several texts; all texts of one representation are its references."""

    type: Literal["e2e"] = "e2e"
    separator: str | None = None
    """Text between the prompt and the answer; null: the tokenizer's end of text, as in LoRA."""
    lead: str = " "
    """Text that every answer begins with."""
    metrics: tuple[MetricName, ...] = ("e2e_bleu", "e2e_nist", "e2e_meteor", "e2e_rouge_l", "e2e_cider")
    """The scores of E2E's own script."""

    @property
    def layouts(self) -> Sequence[Layout]:
        return [("mr", "target"), ("mr", "ref"), ("meaning_representation", "human_reference")]

    def read(self, row: dict[str, Any], where: str) -> tuple[str, list[str]]:
        source, target = next(layout for layout in self.layouts if set(layout) <= set(row))
        return linearized(files.as_text(row[source], where, source)), files.as_texts(row[target], where, target)


def linearized(meaning: str) -> str:
    """``name[Aromi], priceRange[more than £30]`` -> ``name : Aromi | price : more than £ 30``, as in LoRA's files; £20-25 -> £ 20 - 25."""
    pairs = re.findall(r"\s*([^\[\],]+)\[([^\]]*)\]", meaning)
    texts = [re.sub(r"£(\d+)-", r"£\1 - ", value).replace("£", "£ ") for _, value in pairs]
    return " | ".join(f"{_NAMES.get(name, name)} : {text}" for (name, _), text in zip(pairs, texts, strict=True))
