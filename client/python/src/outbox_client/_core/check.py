"""Check-back: answers the platform's questions about transactions."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING

from outbox_client._gen.outbox.v1 import outbox_service_pb2 as pb
from outbox_client._source.verdict import CheckTransaction
from outbox_client.transaction import DatabaseTransaction

if TYPE_CHECKING:
    from outbox_client._core.engine import Engine
    from outbox_client._core.stream import Stream
    from outbox_client._source.database import Database

MAX_REASON, MAX_EVIDENCE = 1024, 4096  # limits of the API


async def answer_question(
    engine: Engine, database: Database, stream: Stream, question: pb.SessionResponse.CheckQuestion
) -> None:
    """Asks the database and answers. A failure is no answer: the platform asks again, or somebody else."""
    asked = [
        CheckTransaction(uuid.UUID(bytes=t.transaction_id), DatabaseTransaction.from_proto(t.database_transaction))
        for t in question.transactions
        if len(t.transaction_id) == 16
    ]
    try:
        verdicts = await asyncio.wait_for(database.check(asked), engine.config.check_timeout)
    except Exception as e:
        engine.log.error(
            "answering a check-back question: %s", e, exc_info=e, extra=engine.extra(database=database.name)
        )
        return
    if not verdicts:
        return
    engine.stats.checked += len(verdicts)
    answers = [
        pb.SessionRequest.CheckAnswer(
            transaction_id=v.id.bytes,
            outcome=v.outcome.value,
            reason=clip(v.reason, MAX_REASON),
            # What would be cut is left out: half a JSON object is none.
            evidence=v.evidence if len(v.evidence.encode()) <= MAX_EVIDENCE else "",
            naive_wrong=v.naive_wrong,
            failed_over_to=v.failed_over_to,
        )
        for v in verdicts
    ]
    stream.answer(
        pb.SessionRequest(
            check_answers=pb.SessionRequest.CheckAnswers(question_id=question.question_id, answers=answers)
        )
    )


def clip(text: str, size: int) -> str:
    """Cuts a text to at most so many bytes of UTF-8, between characters."""
    return text.encode()[:size].decode(errors="ignore")
