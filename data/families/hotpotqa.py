"""HotpotQA (Yang et al. 2018, arXiv 1809.09600): questions over several Wikipedia paragraphs.

The prompt has only the paragraphs with supporting facts: with all ten paragraphs it would be about five times as long.
The supporting sentences are the reasoning.
"""

from __future__ import annotations

from data.families.base import Family, Question, Row, RowDroppedError, text_of


def _parse(row: Row) -> Question:
    stem, answer = text_of(row, "question"), text_of(row, "answer")
    sentences = dict(zip(row["context"]["title"], row["context"]["sentences"], strict=True))
    titles, places = row["supporting_facts"]["title"], row["supporting_facts"]["sent_id"]
    # Some rows refer to a sentence after the end of its paragraph.
    facts = [
        sentences[title][place].strip()
        for title, place in zip(titles, places, strict=True)
        if place < len(sentences.get(title, ()))
    ]
    if not facts:
        raise RowDroppedError("no supporting fact is in context")
    passages = [f"{title}: {''.join(text).strip()}" for title, text in sentences.items() if title in titles]
    return Question(stem, " ".join(facts), answer, context="\n".join(passages))


FAMILY = Family(
    name="hotpotqa",
    hub="hotpotqa/hotpot_qa",
    configs=("distractor",),
    columns=("question", "answer", "supporting_facts", "context"),
    parse=_parse,
    task_type="multi_hop",
    large=True,
)
